"""`layer_slices:` configs (bakllama): layers of models one after another, the MLP's way out of some of them scaled.

    layer_slices: [{model, start, end, scale}]   layers start .. end-1; scale: a factor of tensors with `down_proj` in their
                                                 name, none if it is not given
    embedding_source: MODEL                      whose embeddings the result has, and with them tokenizer and config.json;
                                                 the first slice's if it is not given
    lm_head_source: MODEL                        whose final norm and output head; the last slice's if it is not given

It is a `passthrough` merge of slices. The peer (merge specification, 7.8) cannot run it any more, and never read the two
sources. There they are slices of no layer, in front and behind: what stands in no layer comes from the outermost slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from anabranch.engine.config import Entry, Part, Slice
from anabranch.engine.parameters import Choice, Setting, read_setting, shown
from anabranch.engine.reference import Reference

SCALED = "down_proj"
KEYS = ("layer_slices", "embedding_source", "lm_head_source")
SLICE = ("model", "start", "end", "scale")


class Reader(Protocol):
    """What is needed of the reader of merge configs."""

    problems: list[str]
    warnings: list[str]

    def reference(self, value: Any, where: str) -> Reference | None: ...

    def is_mapping(self, value: Any, where: str, wanted: str) -> bool: ...

    def list_of(self, value: Any, where: str, read: Callable[[Any, str], Slice | None]) -> tuple[Slice, ...]: ...

    def maybe(self, value: dict, key: str, where: str, read: Callable[[Any, str], Reference | None]) -> Reference | None: ...

    def required(self, value: dict, key: str, where: str, read: Callable[[Any, str], Reference | None]) -> Reference | None: ...

    def keys(self, value: dict, where: str, known: Sequence[str]) -> None: ...


def read_layer_slices(reader: Reader, config: dict[str, Any]) -> Part:
    """The slices of such a config; what is wrong with it goes to the reader's `problems`."""
    if config.get("merge_method") not in (None, "passthrough"):
        reader.problems.append(f"merge_method: got {shown(config['merge_method'])}; `layer_slices` is always `passthrough`. "
                               "Leave it out")
    if not config["layer_slices"]:
        reader.problems.append("layer_slices: got none, wanted a list of {model, start, end}")
    slices = reader.list_of(config["layer_slices"], "layer_slices", lambda value, where: _slice(reader, value, where))
    ends = [reader.maybe(config, key, "", reader.reference) for key in KEYS[1:]]
    front, back = ([] if model is None else [_no_layers(model, key)] for model, key in zip(ends, KEYS[1:], strict=True))
    return Part((), (*front, *slices, *back), {}, "")


def _slice(reader: Reader, value: Any, where: str) -> Slice | None:
    if not reader.is_mapping(value, where, "with `model:`, `start:` and `end:`"):
        return None
    reader.keys(value, where, SLICE)
    model = reader.required(value, "model", where, reader.reference)
    parameters: Mapping[str, Setting] = {}
    if value.get("scale") is not None:
        parameters = _scale(reader, value["scale"], f"{where}.scale")
    start, end = (_number(reader, value, key, where) for key in ("start", "end"))
    if start is None or end is None or model is None:
        return None
    if not start < end:
        reader.problems.append(f"{where}: start {start}, end {end} hold no layer, wanted start < end (the one after the last)")
        return None
    return Slice((Entry(model, parameters, where, (start, end)),), None, {}, where)


def _scale(reader: Reader, value: Any, where: str) -> dict[str, Setting]:
    if isinstance(value, (list, dict)):
        reader.problems.append(f"{where}: got {shown(value)}, wanted a number")
        return {}
    read = read_setting(value, where, reader.problems, reader.warnings)
    return {} if read is None else {"scale": Setting(where, (Choice(read.choices[0].value, SCALED),))}


def _number(reader: Reader, value: dict[str, Any], key: str, where: str) -> int | None:
    got = value.get(key)
    if type(got) is int and 0 <= got < 10**6:
        return got
    reader.problems.append(f"{where}.{key}: got {shown(got)}, wanted a layer's number, from 0 on")
    return None


def _no_layers(model: Reference, where: str) -> Slice:
    return Slice((Entry(model, {}, where, (0, 0)),), None, {}, where)
