"""Adapters as inputs of a merge: their factors by module, with no base at hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.engine.adapter import CHANGES_BASE, CONFIG, FACTOR, MAGNITUDE, ONCE, PREFIX, REFUSED, WEIGHTS
from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import CorruptedError, ModelError

FOLD = "Fold it first (`anabranch lora apply BASE ADAPTER OUT`), merge the models, and extract the adapter again."


@dataclass(frozen=True)
class Pair:
    """The factors of a module in one adapter: B A times `scale` is its change.

    a, b       keys in the file          rank    rows of A
    shape      (out, in) of B A, an `in` of several dimensions (convolutions) as one
    outer      dimensions of A after the first
    """

    a: str
    b: str
    scale: float
    rank: int
    shape: tuple[int, int]
    outer: tuple[int, ...]
    embedding: bool


@dataclass(frozen=True)
class Source:
    """An opened adapter. `whole`: tensor name -> key, of what it saves instead of changing."""

    label: str
    folder: Path
    config: Mapping[str, Any]
    file: Checkpoint
    pairs: Mapping[str, Pair] = field(repr=False)
    whole: Mapping[str, str] = field(repr=False)

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """(B [out, r], A [r, in]), float32, the scale not in them."""
        pair = self.pairs[path]
        return self.file.read(pair.b).flatten(1).float(), self.file.read(pair.a).flatten(1).float()


def open_source(folder: Path, label: str) -> Source:
    """Raises ModelError for what is no plain LoRA, by name, all in one message; CorruptedError for damaged files."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"adapter {label}: no {name} in {folder}. Give the folder of an adapter that PEFT saved, in "
                             "safetensors.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"holds {type(config).__name__}, wanted an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptedError(f"{folder / CONFIG}: cannot be read as JSON ({error}). Fetch this file again.") from error
    file = Checkpoint.of_file(folder / WEIGHTS)
    problems = _refusals(config, file)
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in file.tensors:
        name = key.removeprefix(PREFIX)
        if match := FACTOR.match(name):
            side = "bias" if match["kind"] == ".bias" else match["side"] + (match["embedding"] or "")
            found.setdefault(re.sub(r"\.base_layer(?=\.|$)", "", match["path"]), {})[side] = key
        elif ".original_module." not in name:
            whole[re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", name)] = key
    pairs: dict[str, Pair] = {}
    for path, keys in found.items() if not problems else ():
        pair, problem = _pair(path, keys, config, file)
        if pair is not None:
            pairs[path] = pair
        else:
            problems.append(problem)
    if not (problems or pairs):
        problems.append(f"{WEIGHTS} holds no factors of a LoRA")
    if problems:
        more = [f".. and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ModelError.of(f"adapter {label}: cannot be merged with others:", problems[:20] + more)
    # PEFT writes an embedding that has factors out as it found it
    untouched = [name for name in whole if name.removesuffix(".weight") in pairs]
    return Source(label, folder, config, file, pairs, {n: k for n, k in whole.items() if n not in untouched})


def _refusals(config: Mapping[str, Any], file: Checkpoint) -> list[str]:
    if config.get("peft_type") != "LORA":
        return [f"{CONFIG}: `peft_type` is {config.get('peft_type')!r}, and only LORA is merged here. {ONCE}"]
    problems = [f"{CONFIG}: `{key}` is set: {why}. {FOLD}" for key, why in REFUSED.items() if config.get(key)]
    if not config.get("use_dora") and any(MAGNITUDE in key for key in file.tensors):
        problems.append(f"{WEIGHTS} has DoRA's magnitude vectors: {REFUSED['use_dora']}. {FOLD}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        problems.append(f"{CONFIG}: `init_lora_weights` is {init!r}, which took a part out of the base's weights, so its "
                        "factors and another adapter's belong to different bases. Convert it where it was trained: "
                        "`save_pretrained(.., path_initial_model_for_weight_conversion=..)`.")
    if config.get("lora_bias"):
        problems.append(f"{CONFIG}: `lora_bias` is set: a bias that is trained with the factors has no place in a merged pair. "
                        f"{FOLD}")
    if config.get("target_parameters"):
        problems.append(f"{CONFIG}: `target_parameters` is set: stacked experts' factors are not merged here. {FOLD}")
    if config.get("trainable_token_indices"):
        problems.append(f"{CONFIG}: `trainable_token_indices` is set: rows of single tokens are not merged here. {FOLD}")
    for key, fits in (("r", type(config.get("r")) is int), ("lora_alpha", isinstance(config.get("lora_alpha"), int | float))):
        if not fits or not math.isfinite(config[key]) or (key == "r" and config[key] < 1):
            problems.append(f"{CONFIG}: `{key}` is {config.get(key)!r}; wanted a number")
    for key in ("rank_pattern", "alpha_pattern"):
        problems += _bad_patterns(key, config.get(key) or {})
    return problems


def _bad_patterns(key: str, patterns: Any) -> list[str]:
    if not isinstance(patterns, dict):
        return [f"{CONFIG}: `{key}` is {type(patterns).__name__}; wanted an object of patterns and numbers"]
    problems = []
    for pattern, value in patterns.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(f"{CONFIG}: `{key}` of {pattern!r} is {value!r}; wanted a number")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"{CONFIG}: `{key}` has {pattern!r}, which is no regular expression ({error})")
    return problems


def _pair(path: str, keys: Mapping[str, str], config: Mapping[str, Any], file: Checkpoint) -> tuple[Pair | None, str]:
    embedding = "Aembedding_" in keys
    a, b = (keys.get(side + ("embedding_" if embedding else "")) for side in "AB")
    if "bias" in keys:
        return None, f"'{keys['bias']}': a bias that is trained with the factors has no place in a merged pair. {FOLD}"
    if a is None or b is None:
        return None, f"'{next(iter(keys.values()))}' stands alone: a LoRA has an A and a B"
    a_shape, b_shape = file.tensors[a].shape, file.tensors[b].shape
    rank = _by_pattern(config.get("rank_pattern"), path, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    if min(len(a_shape), len(b_shape)) < 2 or not a_shape[0] == math.prod(b_shape[1:]) == rank:
        return None, (f"'{a}' {a_shape} and '{b}' {b_shape}: not of rank {rank}, which {CONFIG} says (`r`, `rank_pattern`). "
                      "The two files do not belong together")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    outer = tuple(a_shape[1:]) if len(a_shape) > 2 else ()
    return Pair(a, b, scale, rank, (b_shape[0], math.prod(a_shape[1:])), outer, embedding), ""


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """The value of the first pattern that ends `path`, as PEFT matches them."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def shapes_together(sources: Sequence[Source]) -> tuple[dict[str, Pair], list[str]]:
    """Every module that some adapter changes, with a pair that tells its shape; and where they do not agree."""
    found: dict[str, Pair] = {}
    problems = []
    for source in sources:
        for path, pair in source.pairs.items():
            known = found.setdefault(path, pair)
            if (known.shape, known.embedding) != (pair.shape, pair.embedding):
                problems.append(f"'{path}': {pair.shape} in {source.label}, {known.shape} in another: they were trained on "
                                "different models")
    return found, problems
