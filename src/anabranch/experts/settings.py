"""The config of `anabranch experts`: mergekit-moe's as it is, and what it says that cannot be.

    base_model           all that is not an expert's MLP; also the tokenizer, and the model that reads the prompts
    experts              source_model, positive_prompts, negative_prompts, noise_scale, residual_scale of each
    shared_experts       the same, for experts that every token passes
    gate_mode            how router rows are made (see `routers`)
    architecture         the start of Mixtral, DeepSeek MoE, Qwen MoE or Qwen3 MoE, whatever its case
    experts_per_token    2 by default
    dtype                of the result; by default the base's
    dialect              ours: `mergekit` makes routers to its letter (bfloat16; `hidden_avg` counts padding)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictInt, field_validator

from anabranch.engine.reference import Reference, read_reference
from anabranch.errors import RecipeError, closest
from anabranch.settings_file import Strict, read_settings

GATE_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random", "mlp_input")
DRAWN = ("random", "uniform_random")  # modes that read no prompts
DTYPES = ("float32", "bfloat16", "float16")
TRAINING = "--i-understand-this-is-not-useful-without-training"


class Entry(Strict):
    """An expert as the file has it. null stands for not given, as in mergekit-moe's own files."""

    source_model: Any
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: float | None = Field(None, ge=0)
    residual_scale: float | None = None


class File(Strict):
    base_model: Any
    experts: list[Entry] = Field(min_length=1)
    shared_experts: list[Entry] | None = None
    gate_mode: str = "hidden"
    architecture: str | None = None
    experts_per_token: StrictInt = 2
    dtype: str | None = None
    dialect: Literal["mergekit", "native"] | None = None

    @field_validator("gate_mode")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if value not in GATE_MODES:
            raise ValueError(f"no such gate mode.{closest(value, GATE_MODES)}")
        return value

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        name = value.removeprefix("torch.") if value is not None else None
        if name is not None and name not in DTYPES:
            raise ValueError(f"no dtype that a model can be written in. Wanted: {', '.join(DTYPES)}")
        return name


@dataclass(frozen=True)
class Expert:
    """`where`: its place in the file, for messages."""

    model: Reference
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    noise_scale: float
    residual_scale: float
    where: str


@dataclass(frozen=True)
class Config:
    """A config that makes sense, as far as can be told without its models.

    text      of the file          warnings    for the user, once
    literal   routers to mergekit-moe's letter
    """

    base: Reference
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    gate_mode: str
    architecture: str | None
    per_token: int
    dtype: str | None
    literal: bool
    text: str
    warnings: tuple[str, ...]

    @property
    def prompted(self) -> bool:
        """Whether the router is made of prompts."""
        return self.gate_mode not in DRAWN

    @property
    def models(self) -> tuple[Reference, ...]:
        """The base first; each model once."""
        return tuple(dict.fromkeys([self.base, *(e.model for e in (*self.experts, *self.shared))]))


def read_config(config: Path | str | Mapping[str, Any], *, untrained: bool = False) -> Config:
    """Read and check a config.

    Args:
        untrained: the user knows that experts which are all one model need training (the peer's long option).
    Raises:
        RecipeError: unreadable, unknown keys, or what mergekit-moe refuses; all problems in one message.
    """
    file, text = read_settings(config, File, "experts config")
    where = "experts config" if isinstance(config, Mapping) else f"experts config {config}"
    folders = [Path.cwd(), *([] if isinstance(config, Mapping) else [Path(config).resolve().parent])]
    problems: list[str] = []
    warnings: list[str] = []
    base = read_reference(file.base_model, "base_model", folders, problems, warnings)
    experts = _experts(file.experts, "experts", folders, problems, warnings)
    shared = _experts(file.shared_experts or [], "shared_experts", folders, problems, warnings)
    problems += _wrong_numbers(file)
    if file.gate_mode not in DRAWN:
        problems += _wrong_prompts(experts)
    if len(experts) == len(file.experts) and len({e.model for e in experts}) == 1 and not untrained:
        alike = f"experts: all are {experts[0].model}. Such a mixture computes what that model does until it is trained"
        if file.gate_mode in DRAWN:  # the peer, too, checks nothing then
            warnings.append(alike)
        else:
            problems.append(f"{alike}; if that is what you want, say {TRAINING}.")
    if problems or base is None:
        raise RecipeError.of(f"{where}:", problems)
    if len(experts) & (len(experts) - 1):
        warnings.append(f"{len(experts)} experts: not a power of two, which some runtimes ask for")
    return Config(base, tuple(experts), tuple(shared), file.gate_mode, file.architecture, file.experts_per_token, file.dtype,
                  file.dialect == "mergekit", text, tuple(dict.fromkeys(warnings)))


def _experts(entries: Sequence[Entry], key: str, folders: Sequence[Path], problems: list[str],
             warnings: list[str]) -> list[Expert]:
    found = []
    for number, entry in enumerate(entries):
        where = f"{key}[{number}]"
        model = read_reference(entry.source_model, f"{where}.source_model", folders, problems, warnings)
        if model is not None:
            found.append(Expert(model, tuple(entry.positive_prompts or ()), tuple(entry.negative_prompts or ()),
                                entry.noise_scale or 0.0, 1.0 if entry.residual_scale is None else entry.residual_scale, where))
    return found


def _wrong_numbers(file: File) -> list[str]:
    if file.experts_per_token < 1:
        return [f"experts_per_token: got {file.experts_per_token}, wanted a whole number from 1 on"]
    if len(file.experts) < file.experts_per_token:
        return [f"experts_per_token: each token is to pass {file.experts_per_token} experts, and there are "
                f"{len(file.experts)}. Give more experts, or a smaller number"]
    return []


def _wrong_prompts(experts: Sequence[Expert]) -> list[str]:
    bare = [e.where for e in experts if not e.positive]
    if bare:
        return [f"{', '.join(bare)}: no positive_prompts, of which router rows are made. Give each expert some, or set "
                "`gate_mode: random`"]
    if len(experts) > 1 and len({(e.positive, e.negative) for e in experts}) == 1:
        return ["experts: all have the same prompts, so the router could not tell them apart. Give each its own"]
    return []
