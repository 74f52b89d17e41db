"""A merge config: MergeKit's YAML, validated whole before anything is read or fetched.

    config    merge_method, models | slices | modules, base_model, parameters, dtype, out_dtype, tokenizer, ..
    models    [{model, parameters, fisher}]                               whole models
    slices    [{sources: [{model, layer_range, parameters}], base_model, parameters}]     layers put together anew
    modules   {NAME: {models | slices, parameters}}                       each stack of a model of several

Grammar: merge specification, sections 2 and 5. The peer ignores what it does not know; here it is an error that names
the closest key, all of them in one message. Two dialects share the grammar, `dialect: mergekit` (if none is named) and
`dialect: native`; what they differ in stands in `conventions` and docs/numerics.md.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from anabranch.engine.config import Entry, MergeConfig, Part, Slice, Tokenizer, TokenRow, TokenSetting
from anabranch.engine.conventions import DIALECTS, known_anywhere, our_name, takes_words
from anabranch.engine.parameters import Setting, read_setting, shown
from anabranch.engine.plan import DTYPES
from anabranch.engine.reference import Reference, local, read_reference
from anabranch.engine.requirements import check_method
from anabranch.errors import RecipeError, closest
from anabranch.merge import METHODS
from anabranch.recipe import read_documents
from anabranch.surgery import layer_slices

TOP = ("merge_method", "dialect", "name", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
       "tokenizer_source", "tokenizer", "chat_template")
OF_PARTS = ("models", "slices", "modules", "parameters", "base_model")
MODEL = ("model", "parameters", "fisher")
SOURCE = ("model", "layer_range", "parameters", "fisher")
SLICE = ("sources", "base_model", "parameters")
MODULE = ("models", "slices", "parameters")
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
SHORTEST_TEMPLATE = 20
# Keys of configs for other tools.
FOREIGN = {
    "experts": "it makes a mixture of experts: `anabranch experts CONFIG OUT`",
    "gate_mode": "it makes a mixture of experts: `anabranch experts CONFIG OUT`",
    "genome": "it is of mergekit-evolve, which looks for a merge: `anabranch search CONFIG OUT`",
}
SHOWN = 40
T = TypeVar("T")



def load_config(path: Path, *, allow_unknown_keys: bool = False) -> MergeConfig:
    """Read and validate a config; relative paths count from the working folder, then from the config's own.

    Raises:
        RecipeError: it cannot be read, or every problem found, in one message.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"merge config {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"merge config {path}: not text in UTF-8 ({error}).") from error
    return read_config(text, source=f"merge config {path}", folders=(Path.cwd(), path.resolve().parent),
                       allow_unknown_keys=allow_unknown_keys)


def read_config(text: str, *, source: str = "merge config", folders: Sequence[Path] | None = None,
                allow_unknown_keys: bool = False) -> MergeConfig:
    """Validate the text of a config. Raises RecipeError, as `load_config`."""
    try:
        documents = read_documents(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    full = [d for d in documents if d is not None]
    if len(full) > 1:
        names = [str(d["name"]) for d in full if isinstance(d, dict) and "name" in d]
        raise RecipeError(f"{source}: holds {len(full)} documents{' (' + ', '.join(names) + ')' if names else ''}, wanted "
                          "one. Several merges in one file (mergekit-multi) are a family: `anabranch merge FILE OUT` makes "
                          "them all.")
    return config_of(full[0] if full else None, source=source, folders=folders, allow_unknown_keys=allow_unknown_keys)


def config_of(value: Any, *, source: str = "merge config", folders: Sequence[Path] | None = None,
              allow_unknown_keys: bool = False) -> MergeConfig:
    """Validate a config that is already a mapping. Raises RecipeError, as `load_config`."""
    reader = ConfigReader(tuple(folders or (Path.cwd(),)), allow_unknown_keys)
    config = reader.config(value, source)
    if config is None or reader.problems:
        more = len(reader.problems) - SHOWN
        raise RecipeError.of(f"{source}:", [*reader.problems[:SHOWN], *([f".. and {more} more"] if more > 0 else [])])
    return config


class ConfigReader:
    """One pass over a config: what is found, and what is wrong with it."""

    def __init__(self, folders: tuple[Path, ...], allow_unknown: bool) -> None:
        self.folders = folders
        self.allow_unknown = allow_unknown
        self.method = ""
        self.problems: list[str] = []
        self.warnings: list[str] = []

    # ---- levels of the document

    def config(self, value: Any, source: str) -> MergeConfig | None:
        if not isinstance(value, dict):
            self.problems.append(f"the file holds {shown(value)}, wanted a mapping with at least `merge_method:` and `models:`")
            return None
        foreign = [f"unknown key `{key}`: {FOREIGN[key]}" for key in FOREIGN if key in value]
        if foreign:
            self.problems += foreign
            return None
        sliced = "layer_slices" in value
        self.keys(value, "", (*layer_slices.KEYS, *(k for k in TOP if k not in OF_PARTS)) if sliced else TOP)
        self.method = "passthrough" if sliced else self._method(value.get("merge_method"))
        dialect = self.one_of(value.get("dialect", "mergekit"), "dialect", DIALECTS)
        base = self.maybe(value, "base_model", "", self.reference)
        modules: dict[str | None, Part] = ({None: layer_slices.read_layer_slices(self, value)} if sliced
                                           else self._modules(value))
        parameters = self.parameters(value.get("parameters"), "parameters")
        tokenizer = self._tokenizer(value)
        config = MergeConfig(
            self.method, "native" if dialect == "native" else "mergekit", modules, base, parameters,
            self.maybe(value, "dtype", "", self.dtype), self.maybe(value, "out_dtype", "", self.dtype), tokenizer,
            self.maybe(value, "chat_template", "", self._template), self.maybe(value, "name", "", self.text), source, ())
        if self.problems:
            return None
        check_method(config, self.problems, self.warnings)
        return replace(config, warnings=tuple(dict.fromkeys(self.warnings)))

    def _modules(self, value: dict) -> dict[str | None, Part]:
        given = [key for key in ("models", "slices", "modules") if value.get(key) not in (None, [], {})]
        if len(given) != 1:
            self.problems.append("one of `models`, `slices` and `modules` must be given, "
                                 + (f"and {' and '.join(f'`{g}`' for g in given)} are" if given else
                                    "and none is (an empty list does not count)"))
            return {}
        if given[0] != "modules":
            return {None: Part(self._models(value, ""), self._slices(value, ""), {}, "")}
        modules = value["modules"]
        if not isinstance(modules, dict):
            self.problems.append(f"modules: got {shown(modules)}, wanted a mapping of module names")
            return {}
        return {str(name): self._module(name, module) for name, module in modules.items()}

    def _module(self, name: Any, value: Any) -> Part:
        where = f"modules.{name}"
        if not isinstance(name, str):
            self.problems.append(f"modules: got {shown(name)} as a name, wanted text, in quotes")
        if not self.is_mapping(value, where, "with `models:` or `slices:`"):
            return Part((), (), {}, where)
        self.keys(value, where, MODULE)
        given = [key for key in ("models", "slices") if value.get(key) not in (None, [], {})]
        if len(given) != 1:
            self.problems.append(f"{where}: one of `models` and `slices` must be given, and "
                                 + ("both are" if given else "none is"))
        return Part(self._models(value, f"{where}."), self._slices(value, f"{where}."),
                    self.parameters(value.get("parameters"), f"{where}.parameters"), where)

    def _models(self, value: dict, prefix: str) -> tuple[Entry, ...]:
        return self.list_of(value.get("models"), f"{prefix}models", self._entry)

    def _slices(self, value: dict, prefix: str) -> tuple[Slice, ...]:
        return self.list_of(value.get("slices"), f"{prefix}slices", self._slice)

    def _entry(self, value: Any, where: str, known: tuple[str, ...] = MODEL) -> Entry | None:
        if isinstance(value, str):
            self.problems.append(f"{where}: got {shown(value)}, wanted a mapping: `- model: {value}`")
            return None
        if not self.is_mapping(value, where, "with `model:`"):
            return None
        self.keys(value, where, known, ("layer_range",) if known is MODEL else ())
        model = self.required(value, "model", where, self.reference)
        layers = self.required(value, "layer_range", where, self._layer_range) if known is SOURCE else None
        fisher = self.maybe(value, "fisher", where, self.text)
        fisher = fisher and (local(fisher, self.folders) or fisher)
        parameters = self.parameters(value.get("parameters"), f"{where}.parameters")
        return Entry(model, parameters, where, layers, fisher) if model else None

    def _source(self, value: Any, where: str) -> Entry | None:
        return self._entry(value, where, SOURCE)

    def _slice(self, value: Any, where: str) -> Slice | None:
        if not self.is_mapping(value, where, "with `sources:`"):
            return None
        self.keys(value, where, SLICE, ("residual_weight",))
        if value.get("sources") in (None, [], {}):
            self.problems.append(f"{where}.sources: required, and not given.")
            return None
        entries = self.list_of(value["sources"], f"{where}.sources", self._source)
        lengths = {str(e.model): e.layers[1] - e.layers[0] for e in entries if e.layers}
        if len(set(lengths.values())) > 1:
            self.problems.append(f"{where}: sources of one slice must span as many layers, got "
                                 + ", ".join(f"{n} of {model}" for model, n in lengths.items()))
        return Slice(entries, self.maybe(value, "base_model", where, self.reference),
                     self.parameters(value.get("parameters"), f"{where}.parameters"), where)

    def _layer_range(self, value: Any, where: str) -> tuple[int, int] | None:
        whole = isinstance(value, list) and len(value) == 2 and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and v == v and abs(v) < 1e6 and v == int(v) for v in value)
        if not whole:
            self.problems.append(f"{where}: got {value if isinstance(value, list) and len(str(value)) < 60 else shown(value)}, "
                                 "wanted two whole numbers [first, after the last], such as [0, 32]")
            return None
        start, stop = int(value[0]), int(value[1])
        if not 0 <= start < stop:
            self.problems.append(f"{where}: [{start}, {stop}] holds no layer, wanted 0 <= first < after the last")
            return None
        return start, stop

    # ---- tokenizer and chat template

    def _tokenizer(self, value: dict) -> Tokenizer | None:
        new, old = value.get("tokenizer"), value.get("tokenizer_source")
        if new is not None and old is not None:
            self.problems.append("`tokenizer` and `tokenizer_source` are both given: say it once, as `tokenizer: {source: ..}`")
            return None
        if old is not None:
            source = self._tokenizer_source(old, "tokenizer_source")
            return Tokenizer(source) if source is not None else None
        if new is None:
            return None
        if isinstance(new, str):
            self.problems.append(f"tokenizer: got {shown(new)}, wanted a mapping: `tokenizer: {{source: {new[:60]}}}`")
            return None
        if not self.is_mapping(new, "tokenizer", "with `source:`"):
            return None
        self.keys(new, "tokenizer", TOKENIZER)
        if new.get("source") is None:
            self.warnings.append("tokenizer: no `source`, so it is `union`, the tokens of all models")
        source = self._tokenizer_source(new.get("source") or "union", "tokenizer.source")
        tokens = new.get("tokens") or {}
        if not self.is_mapping(tokens, "tokenizer.tokens", "from tokens to `{source: ..}`"):
            tokens = {}
        settings = {str(t): self._token(t, v, f"tokenizer.tokens['{str(t)[:40]}']") for t, v in tokens.items()}
        pad = self.maybe(new, "pad_to_multiple_of", "tokenizer", self._positive)
        return Tokenizer(source or "union", settings, pad)

    def _tokenizer_source(self, value: Any, where: str) -> Literal["union", "base"] | Reference | None:
        words = ("union", "base")
        if isinstance(value, str) and value not in words and not os.path.isdir(value) and (
                match := difflib.get_close_matches(value.casefold(), words, n=1, cutoff=0.6)):
            self.problems.append(f"{where}: got {value!r}. Did you mean `{match[0]}`?")
            return None
        return value if value in ("union", "base") else self.reference(value, where)

    def _token(self, token: Any, value: Any, where: str) -> TokenSetting:
        if not isinstance(token, str):
            self.problems.append(f"tokenizer.tokens: got {shown(token)} as a token, wanted text, in quotes")
        if value is None:
            return TokenSetting()
        if not self.is_mapping(value, where, "with `source:` and `force:`"):
            return TokenSetting()
        self.keys(value, where, ("source", "force"))
        force = value.get("force", False)
        if force not in (True, False):
            self.problems.append(f"{where}.force: got {shown(force)}, wanted true or false")
        return TokenSetting(self.maybe(value, "source", where, self._token_source), bool(force))

    def _token_source(self, value: Any, where: str) -> TokenRow | Literal["zero"] | None:
        if not (isinstance(value, dict) and "kind" in value):
            model = self.reference(value, where)
            return TokenRow(model) if model else None
        kind = self.one_of(value["kind"], f"{where}.kind", ("zero", "model_token"))
        if kind is None or kind == "zero":
            self.keys(value, where, ("kind",) if kind else tuple(map(str, value)))
            return "zero" if kind else None
        self.keys(value, where, ("kind", "model", "token", "token_id"))
        model = self.required(value, "model", where, self.reference)
        token, number = value.get("token"), value.get("token_id")
        if (token is None) == (number is None):
            self.problems.append(f"{where}: one of `token` and `token_id` must be given")
        elif token is not None and not isinstance(token, str):
            self.problems.append(f"{where}.token: got {shown(token)}, wanted text, in quotes")
        elif number is not None and (type(number) is not int or not 0 <= number < 2**31):
            self.problems.append(f"{where}.token_id: got {shown(number)}, wanted a whole number of at least 0")
        else:
            return TokenRow(model, token, number) if model else None
        return None

    def _template(self, value: Any, where: str) -> str | None:
        text = self.text(value, where)
        if text is None or text in CHAT_TEMPLATES or (len(text) >= SHORTEST_TEMPLATE and "{" in text):
            return text
        self.problems.append(f"{where}: got {shown(text)}, wanted one of {', '.join(CHAT_TEMPLATES)}, or the Jinja text of a "
                             f"template (at least {SHORTEST_TEMPLATE} characters, with a `{{`)."
                             + closest(text[:80], CHAT_TEMPLATES).split(" Known:")[0])
        return None

    # ---- leaves

    def parameters(self, value: Any, where: str) -> dict[str, Setting]:
        """Settings by our names. Names that no method knows are problems; those of other methods are judged later."""
        if value is None or not self.is_mapping(value, where, "of parameters"):
            return {}
        method = METHODS.get(self.method)
        known = known_anywhere()
        found: dict[str, Setting] = {}
        for key, setting in value.items():
            if key not in known:
                self.unknown(key, where, known, in_parameters=True)
                continue
            name = our_name(method, key) if method else key
            words = method is not None and takes_words(method, name)
            read = read_setting(setting, f"{where}.{key}", self.problems, self.warnings, words=words)
            if name in found:
                beside = found[name].where.rpartition(".")[2]
                self.problems.append(f"{where}.{key}: says the same as `{beside}` beside it; keep one")
            elif read is not None:
                found[name] = read
        return found

    def reference(self, value: Any, where: str) -> Reference | None:
        return read_reference(value, where, self.folders, self.problems, self.warnings)

    def dtype(self, value: Any, where: str) -> str | None:
        text = self.text(value, where)
        return None if text is None else self.one_of(text.removeprefix("torch."), where, tuple(DTYPES))

    def text(self, value: Any, where: str) -> str | None:
        if isinstance(value, str) and value:
            return value
        self.problems.append(f"{where}: got {shown(value)}, wanted text"
                             + (", in quotes" if isinstance(value, (bool, int, float)) else ""))
        return None

    def one_of(self, value: Any, where: str, known: Sequence[str]) -> str | None:
        if isinstance(value, str) and value in known:
            return value
        self.problems.append(f"{where}: got {shown(value)}.{closest(str(value)[:80], known)}"
                             if isinstance(value, str) else f"{where}: got {shown(value)}, wanted one of {', '.join(known)}")
        return None

    def _method(self, value: Any) -> str:
        if value is None:
            self.problems.append("merge_method: required, and not given.")
            return ""
        return self.one_of(value, "merge_method", tuple(METHODS)) or ""

    def _positive(self, value: Any, where: str) -> int | None:
        if type(value) is int and 1 <= value < 2**31:
            return value
        self.problems.append(f"{where}: got {shown(value)}, wanted a whole number of at least 1")
        return None

    # ---- shapes

    def is_mapping(self, value: Any, where: str, wanted: str) -> bool:
        if isinstance(value, dict):
            return True
        self.problems.append(f"{where}: got {shown(value)}, wanted a mapping {wanted}")
        return False

    def list_of(self, value: Any, where: str, read: Callable[[Any, str], T | None]) -> tuple[T, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            self.problems.append(f"{where}: got {shown(value)}, wanted a list (entries that begin with `-`)")
            return ()
        found = [read(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(f for f in found if f is not None)

    def maybe(self, value: dict, key: str, where: str, read: Callable[[Any, str], T | None]) -> T | None:
        return None if value.get(key) is None else read(value[key], f"{where}.{key}" if where else key)

    def required(self, value: dict, key: str, where: str, read: Callable[[Any, str], T | None]) -> T | None:
        if value.get(key) is None:
            self.problems.append(f"{where}.{key}: required, and not given.")
        return self.maybe(value, key, where, read)

    def keys(self, value: dict, where: str, known: Sequence[str], idle: Sequence[str] = ()) -> None:
        """Every key of a mapping that is not among `known`; `idle` ones are read by nobody, the peer included."""
        for key in value:
            if key in idle:
                self.warnings.append(f"{where}.{key}: nothing reads it there. "
                                     + ("Whole models are merged under `models`; `slices` take layers apart."
                                        if key == "layer_range" else "It has no effect."))
            elif key not in known:
                self.unknown(key, where, known)

    def unknown(self, key: Any, where: str, known: Iterable[str], in_parameters: bool = False) -> None:
        at = f"{where}: " if where else ""
        belongs = _home_of(key, where, in_parameters)
        message = f"{at}unknown key `{str(key)[:60]}`{belongs or '.' + closest(str(key)[:80], known)}"
        if self.allow_unknown:
            self.warnings.append(f"{message} It has no effect.")
        else:
            self.problems.append(message)


def _home_of(key: Any, where: str, in_parameters: bool) -> str | None:
    """Where a key that stands in the wrong place belongs."""
    if in_parameters:
        return ": it belongs at the top level, not under `parameters`" if key in TOP else None
    if key == "revision":
        return ": a revision is part of the name, `model: NAME@REVISION`"
    if key in ("lora", "adapter"):
        return ": an adapter is part of the name, `model: NAME+ADAPTER`"
    if key in known_anywhere():
        return f": it is read under `parameters`. Write `parameters: {{{key}: ..}}`"
    if key == "layer_range":
        return ": it belongs to each of the `sources` of a slice"
    if where and key in TOP:
        return ": it belongs at the top level"
    return None
