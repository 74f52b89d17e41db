"""The config of `anabranch lora merge`: a merge config whose models are adapters, and a few keys more.

    merge_method: ties              any merge method; or cat (all factors side by side), or peft_linear
    base_model: MODEL               where it is needed, and to check shapes against
    models:
      - model: ADAPTER
        parameters: {weight: 0.5, density: 0.6}
    parameters: {normalize: true}
    rank: 32 | energy: 0.99 | budget: 4000000      of the result; none: all that the merge has, at most the sum of the ranks
    space: auto | core | dense | compressed
    dtype: bfloat16                 of the result; none: the adapters' own, where they agree
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from anabranch.engine.config import MergeConfig
from anabranch.engine.conventions import BASE_IS_A_BRANCH
from anabranch.engine.dialect import config_of
from anabranch.engine.parameters import shown
from anabranch.engine.reference import Reference, read_reference
from anabranch.errors import RecipeError, closest
from anabranch.lora.factors import Choice
from anabranch.lora.spaces import REFUSED
from anabranch.merge import METHODS
from anabranch.recipe import read_yaml

CAT, PEFT_LINEAR = "cat", "peft_linear"
SPACES = ("auto", "core", "dense", "compressed")
OWN = ("rank", "energy", "budget", "space", "base_model")
KNOWN = ("merge_method", "dialect", "name", "models", "parameters", "dtype")
ELSEWHERE = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "out_dtype")
PLACEHOLDER = "base/of-the-adapters"
Space = Literal["auto", "core", "dense", "compressed"]


@dataclass(frozen=True)
class AdapterMerge:
    """A validated config. `merge` holds models, weights and parameters; of `cat` and `peft_linear` as task_arithmetic."""

    method: str
    merge: MergeConfig
    base: Reference | None
    choice: Choice
    space: Space
    text: str

    @property
    def adapters(self) -> tuple[Reference, ...]:
        return tuple(entry.model for entry in self.merge.modules[None].models)


def read_adapter_merge(config: Path | str | Mapping[str, Any]) -> AdapterMerge:
    """Read and validate; relative paths count from the working folder, then from the config's own.

    Raises RecipeError with every problem in one message.
    """
    where = "lora config" if isinstance(config, Mapping) else f"lora config {config}"
    folders = (Path.cwd(), *([] if isinstance(config, Mapping) else [Path(config).resolve().parent]))
    value, text = _loaded(config, where)
    problems: list[str] = []
    problems += [f"`{key}`: has no place in a merge of adapters" for key in ELSEWHERE if value.get(key) is not None]
    problems += [f"unknown key `{str(key)[:60]}`.{closest(str(key)[:80], (*KNOWN, *OWN))}"
                 for key in value if key not in (*KNOWN, *OWN, *ELSEWHERE)]
    own = {key: value.get(key) for key in OWN}
    rest = {key: v for key, v in value.items() if key in KNOWN}
    method = rest.get("merge_method")
    if method is not None and not isinstance(method, str):
        problems.append(f"merge_method: got {shown(method)}, wanted the name of a method")
    elif method in REFUSED:
        problems.append(f"merge_method: `{method}` is not for adapters: {REFUSED[str(method)]}")
    elif method not in METHODS and method not in (CAT, PEFT_LINEAR):
        problems.append("merge_method: required, and not given." if method is None else
                        f"merge_method: `{shown(method)[:60]}` is no merge method."
                        + closest(str(method)[:80], [*METHODS, CAT, PEFT_LINEAR]))
    base = read_reference(own["base_model"], "base_model", folders, problems, []) if own["base_model"] is not None else None
    if base is not None and base.adapter is not None:
        problems.append(f"base_model: `{base}` is a model with an adapter. The adapters of a merge change a model: name that, "
                        "or fold the adapter into it first (`anabranch lora apply`)")
    choice = _choice(own, problems)
    space = own["space"] if own["space"] is not None else "auto"
    if space not in SPACES:
        problems.append(f"space: got {shown(space)}, wanted one of {', '.join(SPACES)}")
    if space == "compressed" and choice.rank is None:
        problems.append("space: `compressed` merges in a space of a given rank. Give `rank:`")
    if method in (CAT, PEFT_LINEAR):
        problems += [f"`{key}`: {method} has its own rank and needs none" for key in OWN[:4] if own[key] is not None]
    problems += _too_many_to_slerp(rest)
    before = len(problems)
    merge = _merge(rest, str(method), where, folders, problems)
    if str(method) not in (*METHODS, CAT, PEFT_LINEAR):  # it was read as another one, whose needs are not its own
        problems[before:] = [problem for problem in problems[before:] if "task_arithmetic" not in problem]
    if problems or merge is None:
        raise RecipeError.of(f"{where}:", list(dict.fromkeys(problems)))
    return AdapterMerge(str(method), merge, base, choice, cast(Space, space), text)


def _loaded(config: Path | str | Mapping[str, Any], where: str) -> tuple[dict[str, Any], str]:
    try:
        text = (yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True) if isinstance(config, Mapping)
                else Path(config).read_text(encoding="utf-8-sig"))
        value = read_yaml(text)
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not text in UTF-8 ({error}).") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, yaml.MarkedYAMLError) and "single document" in str(error.context):
            raise RecipeError(f"{where}: holds several documents (parts after a line `---`), wanted one. Give each a file of "
                              "its own.") from error
        raise RecipeError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: holds {shown(value)}, wanted a mapping with at least `merge_method:` and `models:`")
    return value, text


def _choice(own: Mapping[str, Any], problems: list[str]) -> Choice:
    numbers: dict[str, Any] = {}
    for key, kinds, wanted in (("rank", (int,), "a whole number"), ("energy", (int, float), "a share"),
                               ("budget", (int,), "a whole number of parameters")):
        value = own[key]
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
            numbers[key] = value
        else:
            problems.append(f"{key}: got {shown(value)}, wanted {wanted}")
    choice = Choice(numbers.get("rank"), numbers.get("energy"), numbers.get("budget"))
    try:
        choice.check()
    except RecipeError as error:
        problems += [line.strip(" -") for line in str(error).splitlines()[1:]]
        return Choice()
    return choice


def _too_many_to_slerp(rest: Mapping[str, Any]) -> list[str]:
    """`anabranch merge` says it of models, two of which slerp does take."""
    method, models = rest.get("merge_method"), rest.get("models")
    if method != "slerp" or not isinstance(models, list) or len(models) < 2:
        return []
    others = "nuslerp, which takes two, or multislerp" if len(models) == 2 else "multislerp, or nuslerp, which takes two"
    return [f"models: slerp goes from `base_model` to the base with one adapter on it, and here are {len(models)} adapters. "
            f"List one; for several use {others}"]


def _merge(rest: Mapping[str, Any], method: str, where: str, folders: Sequence[Path],
           problems: list[str]) -> MergeConfig | None:
    """The part that is a merge config, with problems in the words of one."""
    known = method if method in METHODS and method not in REFUSED else "task_arithmetic"
    given = dict(rest) | {"merge_method": known}
    if known not in BASE_IS_A_BRANCH:
        given["base_model"] = PLACEHOLDER
    if _too_many_to_slerp(rest):  # said already
        given["models"] = given["models"][:1]
    try:
        return config_of(given, source=where, folders=folders)
    except RecipeError as error:
        problems += [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
        return None
