"""A LoRA adapter as PEFT saves it, folded into its base tensor by tensor. The model is never built.

    r   rank          W   [out, in]      B   lora_B [out, r]      A   lora_A [r, in]      s   alpha / r, or alpha / sqrt(r)

    linear, 1x1 and other ungrouped convolutions    W + s (B A)             A and B flattened after their first dimension
    embedding, Conv1D (`fan_in_fan_out`)            W + s (B A)^T           W is [in, out]
    experts (`target_parameters`, W of 3 dims)      W[e] + s (B_e A_e)      transposed as well where W[e] is [in, out]
    `modules_to_save`, `bias: all | lora_only`      the adapter's tensor, in place of W
    `trainable_token_indices`                       the adapter's rows, in place of rows of W

LoRA: arXiv 2106.09685, eq. 3; rsLoRA: arXiv 2312.03732. PEFT folds in the dtype of the model; here all is float32, from
the base's bytes as they stand, and rounded once by whoever writes it.

Products are formed in runs of whole rows that begin at multiples of a number fixed by the tensor's shape, whatever part is
asked for, so the bits of an entry do not depend on how a tensor is cut.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import CorruptedError, ModelError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CHUNK = 1 << 16  # numbers of a product formed at once
MAGNITUDE = "lora_magnitude_vector"  # of DoRA
SHOWN = 20
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<kind>\.weight|\.bias)?$")
# Parts of names that transformers puts in, leaves out or moves when it loads a checkpoint (model.language_model.layers
# in memory, language_model.model.layers in the file); names that differ only in these may be one tensor.
WRAPPERS = {"model", "base_model", "module", "transformer", "language_model", "text_model", "vision_model", "backbone",
            "gpt_neox", "bert", "roberta", "_orig_mod", "_fsdp_wrapped_module"}
DORA = "Fold it once, `anabranch lora apply BASE ADAPTER FOLDER`, and merge the result."
ONCE = ("Fold it with PEFT once, and merge the result: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
        ".save_pretrained(folder).")
EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in|shared|tok_embeddings)\.weight$")
HEAD = re.compile(r"(lm_head|embed_out)\.weight$")
# Settings under which the adapter is something else than W + s B A.
REFUSED = {
    "use_dora": "DoRA rescales each column of the weight by a norm of all of it",
    "use_qalora": "QALoRA pools the inputs of a quantised layer",
    "use_bdlora": "its factors are block-diagonal over devices",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens, so no fixed weights equal it",
    "arrow_config": "Arrow routes between adapters by the input, so no fixed weights equal it",
    "kasa_config": "KaSA changes the base's own singular values",
    "monteclora_config": "its factors are drawn anew",
    "layer_replication": "it repeats layers of the base; build the model with `slices` first, and fold a plain LoRA",
}
# Initialisations that take a part out of the base's weights: the saved factors belong to what is left.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Product:
    """One pair of factors, by their keys in the adapter's file, and how they make a change of W. `experts`: 0 for none."""

    a: str
    b: str
    scale: float
    experts: int
    transposed: bool


@dataclass
class _Change:
    """All that an adapter does to one tensor, in this order."""

    replaced: str | None = None
    rows: tuple[str, tuple[int, ...]] | None = None
    products: list[_Product] = field(default_factory=list)
    added: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. `warnings`: what its user should know, though it can be folded."""

    folder: Path
    base: Checkpoint
    warnings: tuple[str, ...]
    _changes: dict[str, _Change] = field(repr=False)
    _file: Any = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path, base: Checkpoint, *, but_magnitudes: bool = False) -> Adapter:
        """Match every tensor of the adapter with one of the base. Reads headers, and factors no further.

        Args:
            but_magnitudes: take a DoRA adapter for the plain LoRA inside it; the caller sees to its magnitudes.
        Raises:
            ModelError: no adapter there; one that is no LoRA or needs more than its factors; factors that fit no
                tensor of the base, or another shape; a quantised base. All problems in one message.
            CorruptedError: a file that cannot be read.
        """
        config, file = _open_files(folder)
        if but_magnitudes:
            config = config | {"use_dora": False}
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())
                  if not (but_magnitudes and MAGNITUDE in key)}
        problems = _refusals(config, base, shapes)
        if not problems:
            changes, problems = _Matching(config, base, shapes).changes()
        if not problems:
            problems = _with_tied_head(changes, base, file, bool(config.get("ensure_weight_tying")))
        if problems:
            more = len(problems) - SHOWN
            shown = problems[:SHOWN] + ([f".. and {more} more like these"] if more > 0 else [])
            raise ModelError.of(f"adapter {folder}: cannot be folded into {base.folder}:", shown)
        warnings = [*_other_base(config, base), *_tied_product(config, changes, base)]
        return cls(folder, base, tuple(warnings), changes, file)

    @property
    def names(self) -> tuple[str, ...]:
        """The base's tensors that the adapter changes, in the base's order."""
        return tuple(name for name in self.base.tensors if name in self._changes)

    def touches(self, name: str) -> bool:
        return name in self._changes

    def factor_keys(self, name: str) -> tuple[str, bool] | None:
        """Where the adapter has factors for a tensor: the key of A in its file, and whether B A is added transposed."""
        products = self._changes[name].products if name in self._changes else []
        return (products[0].a, products[0].transposed) if products else None

    def folded(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of the folded tensor, float32 [rows, ..], in memory of its own. Rows are of the first dimension, step 1.

        Raises CorruptedError if the base or the adapter cannot be read.
        """
        shape = self.base.tensors[name].shape
        if not shape:
            return self.entries(name, 0, 1).reshape(())
        start, stop, _ = rows.indices(shape[0])
        row = math.prod(shape[1:])
        return self.entries(name, start * row, max(start, stop) * row).reshape(-1, *shape[1:])

    def rows(self, name: str, indices: np.ndarray) -> Tensor:
        """Rows `indices` (int64 [n], in any order, each >= 0 and below the rows there are) of a tensor that the adapter
        changes: float32 [n, ..], in memory of its own, the bits of `folded(name)[indices]`.

        Of a product no more is formed than the runs that these rows lie in, a run at a time.
        Raises CorruptedError if the base or the adapter cannot be read.
        """
        shape = self.base.tensors[name].shape
        row = math.prod(shape[1:])
        together = max(1, CHUNK // max(1, row))
        out = torch.empty(len(indices), *shape[1:])
        order = np.argsort(indices, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(indices[order] // together)) + 1):
            if len(places):
                first, last = int(indices[places[0]]), int(indices[places[-1]])
                run = self.entries(name, first * row, (last + 1) * row).reshape(last + 1 - first, *shape[1:])
                out[torch.from_numpy(places)] = run[torch.from_numpy(indices[places] - first)]
        return out

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start .. stop of the folded tensor, flattened: float32 [stop - start], in memory of its own."""
        change = self._changes[name]
        weight = self._factor(change.replaced) if change.replaced else self.base.read(name)
        block = weight.reshape(-1)[start:stop].to(torch.float32, copy=True)
        if change.rows:
            self._put_rows(change.rows[0], change.rows[1], self._columns(name), block, start)
        for product in change.products:
            self._add(product, self._columns(name), block, start)
        for key, scale in change.added:
            block += self._factor(key).reshape(-1)[start:stop].float() * scale
        return block

    def _columns(self, name: str) -> int:
        """Numbers in a row of the products: of all dimensions but the first; of the last one where there are experts."""
        shape = self.base.tensors[name].shape
        experts = any(p.experts for p in self._changes[name].products)
        return max(1, math.prod(shape[2:] if experts else shape[1:]))

    def _factor(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key)
        except Exception as error:
            raise CorruptedError(f"{self.folder / WEIGHTS}: tensor '{key}' cannot be read ({error}).") from error

    def _put_rows(self, key: str, rows: Sequence[int], columns: int, block: Tensor, start: int) -> None:
        values = self._factor(key).reshape(-1, columns)
        for i, row in enumerate(rows):
            first, last = max(row * columns, start), min((row + 1) * columns, start + len(block))
            if first < last:
                block[first - start : last - start] = values[i, first - row * columns : last - row * columns].float()

    def _add(self, product: _Product, columns: int, block: Tensor, start: int) -> None:
        """block += entries from `start` on of the product's change."""
        a, b = self._factor(product.a), self._factor(product.b)
        if not product.experts:
            _add_product(a.flatten(1), b.flatten(1), product, columns, block, start)
            return
        a = a.unflatten(0, (product.experts, -1))  # [experts, r, in]
        b = b.unflatten(1, (-1, product.experts))  # [out, r, experts]
        size = columns * (a.shape[2] if product.transposed else b.shape[0])
        for expert in range(start // size, -(-(start + len(block)) // size)):
            low, high = max(expert * size, start), min((expert + 1) * size, start + len(block))
            _add_product(a[expert], b[:, :, expert], product, columns, block[low - start : high - start], low - expert * size)


def _add_product(a: Tensor, b: Tensor, product: _Product, columns: int, block: Tensor, start: int) -> None:
    """block += entries from `start` on of s B A, or of its transpose, flattened."""
    left, right = (a.T, b.T) if product.transposed else (b, a)
    right = right.float().contiguous()
    step, stop = max(1, CHUNK // columns), start + len(block)
    for row in range(start // columns // step * step, -(-stop // columns), step):
        piece = (left[row : row + step].float().contiguous() @ right).flatten()
        piece *= product.scale
        at = row * columns
        first, last = max(at, start), min(at + len(piece), stop)
        block[first - start : last - start] += piece[first - at : last - at]


# ------------------------------------------------------------------------------------------------------------- opening


def _open_files(folder: Path) -> tuple[dict[str, Any], Any]:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"adapter {folder}: no {CONFIG} there. Give the folder of an adapter that PEFT saved.")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(f"adapter {folder}: no {WEIGHTS} there." + (
            " It has adapter_model.bin: pickled weights are refused, because loading them can run code. Load it with "
            "PEFT where you trust it, and `save_pretrained` it again." if pickled else
            " Give the folder of an adapter that PEFT saved."))
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"holds {type(config).__name__}, wanted an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptedError(f"{folder / CONFIG}: cannot be read as JSON ({error}). Fetch this file again.") from error
    try:
        return config, safe_open(folder / WEIGHTS, framework="pt")
    except Exception as error:  # SafetensorError for a bad header or size, OSError for a bad disk
        raise CorruptedError(f"{folder / WEIGHTS}: damaged or cut short ({error}). Fetch this file again.") from error


def _refusals(config: Mapping[str, Any], base: Checkpoint, shapes: Mapping[str, Any]) -> list[str]:
    """What this adapter is, where it is not a plain LoRA of a plain base."""
    problems = []
    kind = config.get("peft_type")
    if kind != "LORA":
        problems.append(f"{CONFIG}: `peft_type` is {kind!r}, and only LORA can be folded here. {ONCE}")
    problems += [f"{CONFIG}: `{key}` is set: {why}. {DORA if key == 'use_dora' else ONCE}" for key, why in REFUSED.items()
                 if config.get(key)]
    if not config.get("use_dora") and any(MAGNITUDE in key for key in shapes):
        problems.append(f"{WEIGHTS} has DoRA's magnitude vectors: {REFUSED['use_dora']}. {DORA}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        problems.append(
            f"{CONFIG}: `init_lora_weights` is {init!r}, which took a part out of the base's weights: the factors do not "
            "belong to this base. Convert it where it was trained: `save_pretrained(.., "
            "path_initial_model_for_weight_conversion=..)` writes a plain LoRA.")
    if kind == "LORA":
        problems += _bad_settings(config)
    if base.config.get("quantization_config"):
        problems.append("the base is quantised (`quantization_config` in its config.json), and a sum with packed weights "
                        "has no meaning. Give the base as it was before it was quantised.")
    return problems


def _bad_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings that the fold reads, where they are not what PEFT writes."""
    def is_rank(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value)

    for key, pattern, fits, wanted in (("r", "rank_pattern", is_rank, "a whole number above zero"),
                                       ("lora_alpha", "alpha_pattern", is_number, "a number")):
        if not fits(config.get(key)):
            yield f"{CONFIG}: `{key}` is {config.get(key)!r}; wanted {wanted}."
        table = config.get(pattern) or {}
        if not isinstance(table, dict):
            yield f"{CONFIG}: `{pattern}` is {type(table).__name__}; wanted an object of patterns and numbers."
            continue
        for expression, value in table.items():
            if not fits(value):
                yield f"{CONFIG}: `{pattern}` of {expression!r} is {value!r}; wanted {wanted}."
            try:
                re.compile(expression)
            except re.error as error:
                yield f"{CONFIG}: `{pattern}` has {expression!r}, which is no regular expression ({error})."
    given = config.get("target_parameters")
    if given is not None and not (isinstance(given, list) and all(isinstance(g, str) for g in given)):
        yield f"{CONFIG}: `target_parameters` is {given!r}; wanted a list of names."


def _other_base(config: Mapping[str, Any], base: Checkpoint) -> Iterator[str]:
    """A word where the adapter names another base than the one at hand."""
    named = config.get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        return
    at_hand = base.folder.resolve()
    parts = {part.lower() for part in at_hand.parts}
    last = re.split(r"[/\\]", named.rstrip("/\\"))[-1].lower()
    same = Path(named).is_dir() and Path(named).resolve() == at_hand
    if not (same or last in parts or f"models--{named.replace('/', '--')}".lower() in parts):
        yield (f"the adapter was trained on {named}, and is folded into {base.folder}: every shape fits, but only on the same "
               "weights does it do what it was trained to do")


def _tied_product(config: Mapping[str, Any], changes: Mapping[str, _Change], base: Checkpoint) -> Iterator[str]:
    """PEFT's `ensure_weight_tying` gives the head the embedding's factors, and knows the embedding by this name only."""
    for name, change in changes.items():
        if change.products and EMBEDDING.search(name) and _has_tied_head(base):
            both = bool(config.get("ensure_weight_tying")) and name.endswith("embed_tokens.weight")
            yield (f"the adapter changes '{name}', which is also the output head of this base: once folded it acts in both "
                   "places, " + ("as it does unmerged in PEFT (`ensure_weight_tying`); PEFT's merge_and_unload adds it twice"
                                 if both else
                                 "as with PEFT's merge_and_unload; while it was trained it acted in the embedding alone"))


# ------------------------------------------------------------------------------------------------ the adapter's tensors


class _Matching:
    """Keys of the adapter's file -> tensors of the base."""

    def __init__(self, config: Mapping[str, Any], base: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config, self.base, self.shapes = config, base, shapes
        self.problems: list[str] = []
        self.found: dict[str, _Change] = {}
        self.loose: dict[str, list[str]] = {}
        for name in base.tensors:
            self.loose.setdefault(_bare(name), []).append(name)

    def changes(self) -> tuple[dict[str, _Change], list[str]]:
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        for key in self.shapes:
            name = key.removeprefix(PREFIX)
            if match := FACTOR.match(name):
                kind = "bias" if match["kind"] == ".bias" else match["side"]
                pairs.setdefault((match["path"], bool(match["embedding"])), {})[kind] = key
            elif name.endswith(".token_adapter.trainable_tokens_delta"):
                self._tokens(key, name.removesuffix(".token_adapter.trainable_tokens_delta"))
            elif ".original_module." not in name:
                self._whole(key, re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", name))
        if not self.shapes:
            self.problems.append(f"{WEIGHTS} holds no tensors")
        targets = [t for (path, embedding), pair in pairs.items() if (t := self._target(path, embedding, pair))]
        turned = {experts: self._turned([t for t in targets if bool(t.experts) == experts]) for experts in (True, False)}
        for target in targets:
            self._factors(target, turned[bool(target.experts)])
        return self.found, self.problems

    def _name(self, path: str, key: str) -> str | None:
        """The base's tensor that the adapter calls `path`."""
        if path in self.base.tensors:
            return path
        alike = self.loose.get(_bare(path), [])
        if len(alike) == 1:
            return alike[0]
        leaf = path.rsplit(".", 2)[-2:]
        hint = (f" More than one could be meant: {', '.join(alike[:4])}." if alike else
                " Its output head is tied to the input embedding, and folding this would change both. Save the base with a "
                "head of its own first (`tie_word_embeddings: false`)." if leaf[0] in ("lm_head", "embed_out", "output")
                and self.base.ties_embeddings else
                f" Names there look like {', '.join(list(self.base.tensors)[:2])}. If transformers renames this model's "
                f"tensors when it loads them: {ONCE}")
        self.problems.append(f"adapter tensor '{key}': the base has no '{path}'.{hint}")
        return None

    def _change(self, name: str) -> _Change:
        return self.found.setdefault(name, _Change())

    def _fits(self, key: str, name: str, wanted: tuple[int, ...], got: tuple[int, ...]) -> bool:
        if wanted != got:
            self.problems.append(
                f"adapter tensor '{key}' has shape {self.shapes[key]}, and '{name}' of the base "
                f"{self.base.tensors[name].shape}: it was trained on another model, or on one with more tokens. Give the base "
                "it was trained on, with its embeddings resized as they were then.")
        return wanted == got

    def _whole(self, key: str, path: str) -> None:
        held = path in self.base.tensors or _bare(path) in self.loose
        if not held and HEAD.search(path) and _has_tied_head(self.base):
            self.found.setdefault("", _Change()).replaced = key  # a tied head: see _with_tied_head
        elif (name := self._name(path, key)) and self._fits(key, name, self.base.tensors[name].shape, self.shapes[key]):
            if (change := self._change(name)).replaced is not None:
                self.problems.append(f"adapter tensors '{change.replaced}' and '{key}' are both '{name}' of the base")
            change.replaced = key

    def _tokens(self, key: str, path: str) -> None:
        given = self.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((ids for module, ids in given.items() if re.match(rf"(.*\.)?({re.escape(module)})$", path)), None)
        name = self._name(f"{path}.weight", key)
        if name is None:
            return
        count, *rest = self.base.tensors[name].shape or (0,)
        rows = tuple(given) if isinstance(given, list) and all(isinstance(i, int) and 0 <= i < count for i in given) else None
        if rows is None:
            self.problems.append(f"{CONFIG}: `trainable_token_indices` for '{name}' is {str(given)[:60]}; wanted a list of "
                                 f"numbers below {count}, the rows of the base")
        elif self._fits(key, name, (len(rows), *rest), self.shapes[key]):
            self._change(name).rows = (key, rows)

    def _target(self, path: str, embedding: bool, pair: dict[str, str]) -> _Target | None:
        """The tensor that a pair of factors changes, with its rank and scale. None: a problem was told."""
        if not {"A", "B"} <= pair.keys():
            self.problems.append(f"adapter tensor '{next(iter(pair.values()))}' stands alone: a LoRA has an A and a B")
            return None
        module = re.sub(r"\.base_layer(?=\.|$)", "", path)
        a, b = self.shapes[pair["A"]], self.shapes[pair["B"]]
        parameter = self._parameter(module, a, b) if not embedding else None
        name = self._name(parameter or f"{module}.weight", pair["A"])
        if name is None:
            return None
        rank = _by_pattern(self.config.get("rank_pattern"), parameter or module, self.config["r"])
        alpha = _by_pattern(self.config.get("alpha_pattern"), parameter or module, self.config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        shape = self.base.tensors[name].shape
        experts = shape[0] if parameter and len(shape) == 3 else 0
        if min(len(a), len(b)) < 2 or not a[0] == math.prod(b[1:]) == rank * (experts or 1):
            self.problems.append(f"adapter tensors '{pair['A']}' {a} and '{pair['B']}' {b}: not of rank {rank}, which {CONFIG} "
                                 "says (`r`, `rank_pattern`). The two files do not belong together.")
            return None
        return _Target(name, pair, scale, shape[1:] if experts else shape, experts, embedding, (b[0], *a[1:]))

    def _parameter(self, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> str | None:
        """The entry of `target_parameters` that factors saved under `module` belong to.

        PEFT nests the wrappers of several parameters of one module in an order that only the model knows; their shapes
        tell them apart.
        """
        fitting = []
        for entry in sorted(self.config.get("target_parameters") or ()):
            name = f"{module}.{entry.rpartition('.')[2]}"
            known = name if name in self.base.tensors else next(iter(self.loose.get(_bare(name), [])), None)
            if known is None or not (name == entry or name.endswith(f".{entry}")):
                continue
            shape = self.base.tensors[known].shape
            if len(shape) in (2, 3) and len(a) == len(b) == 2 and {(b[0], a[1]), (a[1], b[0])} & {tuple(shape[-2:])}:
                fitting.append(name)
        return fitting[0] if len(fitting) == 1 else None

    def _turned(self, targets: Sequence[_Target]) -> bool | None:
        """Whether weights that are square are [in, out], as those that are not square tell. None: nothing tells.

        Conv1D tells by a bias as long as its second dimension; `fan_in_fan_out` is what PEFT found at the last layer.
        """
        rectangular = [t for t in targets if not t.embedding and len(t.inner) == 2 and t.inner[0] != t.inner[1]]
        if any(t.inner == t.change[::-1] for t in rectangular):
            return True
        if any(t.experts for t in targets):
            return False if rectangular else None
        shapes = {name: info.shape for name, info in self.base.tensors.items() if len(info.shape) in (1, 2)}
        return bool(self.config.get("fan_in_fan_out")) or any(
            len(shape) == 2 and shape[0] != shape[1] and shapes.get(name.removesuffix("weight") + "bias") == shape[1:]
            for name, shape in shapes.items())

    def _factors(self, target: _Target, turned: bool | None) -> None:
        a, b = target.pair["A"], target.pair["B"]
        square = len(target.inner) == 2 and target.inner[0] == target.inner[1] and not target.embedding
        if square and turned is None:
            self.problems.append(f"adapter tensor '{a}': each expert of '{target.name}' is a square matrix, and nothing tells "
                                 f"whether it is stored as [in, out] or as [out, in]. {ONCE}")
            return
        transposed = bool(target.embedding or (turned if square else
                                               target.inner != target.change and len(target.inner) == 2))
        wanted = target.change[::-1] if transposed else target.change
        if not self._fits(b if target.inner[-1:] == wanted[-1:] else a, target.name, target.inner, wanted):
            return
        change = self._change(target.name)
        if change.products:
            self.problems.append(f"adapter tensors '{change.products[0].a}' and '{a}' both change '{target.name}' of the base")
        change.products.append(_Product(a, b, target.scale, target.experts, transposed))
        if "bias" in target.pair:
            name = self._name(re.sub(r"weight$", "bias", target.name), target.pair["bias"])
            if name and self._fits(target.pair["bias"], name, self.base.tensors[name].shape, self.shapes[target.pair["bias"]]):
                self._change(name).added.append((target.pair["bias"], target.scale))


@dataclass(frozen=True)
class _Target:
    """A pair of factors and its tensor. `inner`: shape that one product must have; `change`: shape of B A."""

    name: str
    pair: dict[str, str]
    scale: float
    inner: tuple[int, ...]
    experts: int
    embedding: bool
    change: tuple[int, ...]


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """The value of the first pattern that ends `path`, as PEFT matches `rank_pattern` and `alpha_pattern`."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def _has_tied_head(base: Checkpoint) -> bool:
    """Whether the output head is the input embedding. Models without a head (classifiers) say that they are tied, too."""
    kinds = base.config.get("architectures") or ["CausalLM"]
    return base.ties_embeddings and any(re.search(r"CausalLM|Conditional|LMHead|MaskedLM", str(kind)) for kind in kinds)


def _with_tied_head(changes: dict[str, _Change], base: Checkpoint, file: Any, tying: bool) -> list[str]:
    """Problems of an adapter that trained only one of two tied matrices as a whole. A copy of the embedding that the base
    stores as its head gets the embedding's change."""
    if not _has_tied_head(base):
        return []
    head = changes.pop("", None)
    # `base_layer`: PEFT saves an embedding under its factors as it found it (untrained, perhaps resized)
    whole = [(name, c.replaced) for name, c in changes.items()
             if c.replaced is not None and EMBEDDING.search(name) and ".base_layer." not in c.replaced]
    stored = [name for name in changes if HEAD.search(name)]
    if head is not None or whole:
        saved = file.get_tensor(head.replaced) if head is not None else None
        alike = any(saved is not None and file.get_tensor(key).equal(saved) for _, key in whole)
        if not (alike or (tying and head is None) or stored):
            name = head.replaced if head is not None else whole[0][1]
            return [f"adapter tensor '{name}' replaces one of two matrices that the base ties to each other (input embedding "
                    "and output head), and the other kept its own numbers in training. Save the base with a head of its own "
                    "first (`tie_word_embeddings: false`), and fold the adapter into that."]
    shapes = {base.tensors[name].shape for name in changes}
    for name, info in base.tensors.items():
        if HEAD.search(name) and name not in changes and info.shape in shapes:
            twin = base.tied_copy_of(name)
            if twin in changes:
                changes[name] = changes[twin]
    return []
