"""Model + calibration rows -> one gradient sketch per unit.

The gradient of a unit is that of the token mean of its response loss at the base (MERIT step 1, arXiv:2606.01717),
over at most `calibration_samples` training rows, on the trainable subset. It is never stored: each parameter's
gradient is sketched inside the backward pass and dropped, so peak memory is the weights, the activations and one
gradient tensor. Sketching is linear, so batches add up, in float32.

    d   entries of the trainable subset      m   numbers of a sketch

Three sketches:
    fold    (default) blocks of m entries, each multiplied by random signs, rotated by a random offset and added up:
            a sparse random projection with one nonzero per column; inner products are unbiased, with an error
            of about 1/sqrt(m) of the norms' product. m numbers.
    stride  every n-th entry, as in the paper (n = 5). d/n numbers.
    full    every entry. d numbers.

Where we differ from the paper: a fold sketch in place of a stride, and two halves of the calibration rows kept
apart, so that noise can be corrected for and reliability told.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from anabranch.artifacts import GradientRecord, Gradients, Mixture, Unit, canonical, digest, write_atomically
from anabranch.errors import CorruptedError, ModelError
from anabranch.model import batches, can_select, check_saved_names, load_model, response_losses, select_trainable
from anabranch.recipe import GradientSection, Recipe
from anabranch.rows import Rows, generator, load_unit

Progress = Callable[[str, int, int], None]
SKETCH_FILE = re.compile(r"units/[0-9a-f]{16}\.safetensors")


class Sketch:
    """Adds up sketches of named gradient tensors. `total` is float32 [m]."""

    def __init__(self, parameters: dict[str, nn.Parameter], section: GradientSection, seed: int) -> None:
        self.kind = section.sketch
        entries = sum(p.numel() for p in parameters.values())
        step = section.stride if self.kind == "stride" else 1
        self.size = section.size if self.kind == "fold" else len(range(0, entries, step))
        self.step = step
        where = next(iter(parameters.values())).device
        self.total = torch.zeros(self.size, device=where)
        self._offsets: dict[str, int] = {}
        self._random: dict[str, tuple[Tensor, list[int], list[int]]] = {}
        offset = 0
        for name, parameter in parameters.items():
            self._offsets[name] = offset
            offset += parameter.numel()
            if self.kind == "fold":
                self._random[name] = self._draw(name, parameter.numel(), seed, where)

    def _draw(self, name: str, entries: int, seed: int, where: torch.device) -> tuple[Tensor, list[int], list[int]]:
        """Signs within a block, and a rotation and a sign per block: from raw Philox bits, the same everywhere.

        Blocks share their inner signs, so memory is m and not d. Two entries of different blocks meet with
        independent block signs (unbiased), and, as the rotations differ, with different inner signs.
        """
        blocks = -(-entries // self.size)
        bits = generator(seed, "sketch", name)
        inner = bits.bit_generator.random_raw(min(entries, self.size)) >> np.uint64(63)
        outer = bits.bit_generator.random_raw(2 * blocks)
        signs = torch.from_numpy(inner.astype(np.float32) * 2 - 1).to(where)
        rotations = [int(r) for r in outer[:blocks] % np.uint64(self.size)]
        return signs, rotations, [1 if b >> np.uint64(63) else -1 for b in outer[blocks:]]

    def add(self, name: str, gradient: Tensor) -> None:
        """Add one parameter's gradient."""
        flat = gradient.reshape(-1)
        if self.kind == "fold":
            self._fold(name, flat)
            return
        first = -self._offsets[name] % self.step
        kept = flat[first :: self.step]
        start = (self._offsets[name] + first) // self.step
        self.total[start : start + len(kept)] += kept

    def _fold(self, name: str, flat: Tensor) -> None:
        signs, rotations, block_signs = self._random[name]
        for block, (rotation, sign) in enumerate(zip(rotations, block_signs, strict=True)):
            piece = flat[block * self.size : (block + 1) * self.size]
            inner = signs[: len(piece)]
            head = min(self.size - rotation, len(piece))
            self.total[rotation : rotation + head].addcmul_(piece[:head].float(), inner[:head], value=sign)
            if head < len(piece):
                self.total[: len(piece) - head].addcmul_(piece[head:].float(), inner[head:], value=sign)


@contextmanager
def sketching(parameters: dict[str, nn.Parameter], sketch: Sketch) -> Iterator[None]:
    """While open, every backward pass adds its gradients to the sketch and keeps none."""

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            sketch.add(name, parameter.grad)
            parameter.grad = None

        return take

    handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibration_halves(rows: Rows, unit: str, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two disjoint halves of a seeded draw of at most `samples` training rows."""
    drawn = generator(seed, "calibration", unit).permutation(len(rows))[:samples]
    return np.sort(drawn[0::2]), np.sort(drawn[1::2])


def half_gradient(model: Any, rows: Rows, indices: np.ndarray, parameters: dict[str, nn.Parameter], sketch: Sketch,
                  batch_tokens: int, *, select: bool, autocast: bool = False) -> tuple[Float[np.ndarray, " m"], int]:
    """Sketch of the token-mean response gradient over some rows, and the number of response tokens."""
    sketch.total.zero_()
    tokens = 0
    with sketching(parameters, sketch):
        for batch in batches(rows, indices, batch_tokens, sketch.total.device):
            with torch.autocast(sketch.total.device.type, torch.bfloat16, enabled=autocast):
                losses, _ = response_losses(model, batch, select=select)
            losses.sum().backward()
            tokens += losses.numel()
    return (sketch.total / max(tokens, 1)).cpu().numpy(), tokens


def unit_key(unit: Unit, base_hash: str, recipe: Recipe) -> str:
    """What a unit's sketch depends on: it is computed again only if one of these changes."""
    section = recipe.gradients
    size = {"fold": section.size, "stride": section.stride, "full": 1}[section.sketch]
    frozen = {"freeze": recipe.model.freeze} if recipe.model.freeze else {}
    return digest(frozen | {"base": base_hash, "data": unit.sha256, "unit": unit.name, "seed": recipe.seed,
                   "samples": section.calibration_samples, "sketch": section.sketch, "size": size,
                   "batch_tokens": section.batch_tokens, "trainable": recipe.model.trainable,
                   "lora": recipe.model.lora is not None, "dtype": recipe.model.dtype})


def measure_gradients(recipe: Recipe, mixture: Mixture, mixture_folder: Path, base: Path, base_hash: str, out: Path,
                      *, shard: tuple[int, int] = (0, 1), progress: Progress | None = None) -> Gradients | None:
    """Sketch every unit of this shard that is not there yet; write gradients.json once all shards are complete.

    Args:
        shard: (i, n): this process takes units i, i+n, i+2n, .. in name order.
    Returns:
        The artifact, or None while units of other shards are missing.
    Raises:
        ModelError, CorruptedError.
    """
    keys = {u.name: unit_key(u, base_hash, recipe) for u in mixture.units}
    mine = mixture.units[shard[0] :: shard[1]]
    todo = [u for u in mine if not _is_there(out, u, keys[u.name])]
    if todo:
        _sketch_units(recipe, todo, keys, mixture_folder, base, out, done=len(mine) - len(todo), progress=progress)
    missing = [u for u in mixture.units if not _is_there(out, u, keys[u.name])]
    if missing:
        return None
    records, parameters, size = [], 0, 0
    for unit in mixture.units:
        record, parameters, size = _record(out, unit)
        records.append(record)
    artifact = Gradients(
        sketch=recipe.gradients.sketch, size=size, parameters=parameters, seed=recipe.seed,
        calibration_samples=recipe.gradients.calibration_samples, units=records,
        made_from={"base": base_hash, "mixture": digest({u.name: u.sha256 for u in mixture.units}),
                   "settings": digest(keys)})
    artifact.save(out / "gradients.json")
    return artifact


def _sketch_units(recipe: Recipe, units: list[Unit], keys: dict[str, str], mixture_folder: Path, base: Path,
                  out: Path, *, done: int, progress: Progress | None) -> None:
    section = recipe.gradients
    # float32 weights under bf16 autocast, as the branches train: bf16 gradients would be rounded before they are summed
    model = load_model(base, "float32", trust_remote_code=recipe.model.trust_remote_code)
    check_saved_names(model, base)
    parameters = select_trainable(model, recipe.model)
    sketch, select = Sketch(parameters, section, recipe.seed), can_select(model)
    entries = sum(p.numel() for p in parameters.values())
    total = done + len(units)
    for i, unit in enumerate(units):
        if progress:
            progress(unit.name, done + i, total)
        rows = load_unit(mixture_folder / unit.file, "train")
        halves = calibration_halves(rows, unit.name, section.calibration_samples, recipe.seed)
        (a, tokens_a), (b, tokens_b) = (
            half_gradient(model, rows, half, parameters, sketch, section.batch_tokens, select=select,
                          autocast=recipe.model.dtype == "bfloat16")
            for half in halves)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ModelError(f"unit {unit.name!r}: its gradient at the base is not finite. The base's weights may hold "
                             "NaN, or `model.dtype` is too narrow: try `dtype: float32`.")
        about = {"unit": unit.name, "key": keys[unit.name], "tokens_a": tokens_a, "tokens_b": tokens_b,
                 "examples": len(halves[0]) + len(halves[1]), "parameters": entries}
        # one entry: safetensors writes several in an order that changes from process to process
        metadata = {"anabranch": canonical(about).decode()}
        write_atomically(_file(out, unit.name), save({"half_a": a, "half_b": b}, metadata))
    if progress:
        progress("", total, total)


def _file(out: Path, unit: str) -> Path:
    return out / "units" / f"{hashlib.sha256(unit.encode()).hexdigest()[:16]}.safetensors"


def _is_there(out: Path, unit: Unit, key: str) -> bool:
    path = _file(out, unit.name)
    if not path.exists():
        return False
    try:
        with safe_open(path, "np") as file:
            return json.loads((file.metadata() or {})["anabranch"])["key"] == key
    except Exception:  # a damaged file counts as absent: it is computed again
        return False


def _record(out: Path, unit: Unit) -> tuple[GradientRecord, int, int]:
    path = _file(out, unit.name)
    try:
        with safe_open(path, "np") as file:
            about, size = json.loads(file.metadata()["anabranch"]), file.get_slice("half_a").get_shape()[0]
            counts = [int(about[key]) for key in ("examples", "tokens_a", "tokens_b", "parameters")]
            if not all(0 <= count < 2**53 for count in counts):
                raise ValueError(f"it counts {counts}")
    except Exception as error:
        raise CorruptedError(f"{path}: unreadable gradient sketch of unit {unit.name!r} ({error}). Delete it and run "
                             "the same command again.") from error
    data = path.read_bytes()
    record = GradientRecord(unit=unit.name, file=f"units/{path.name}", sha256=hashlib.sha256(data).hexdigest(),
                            examples=counts[0], tokens_a=counts[1], tokens_b=counts[2])
    return record, counts[3], size


def load_halves(folder: Path, record: GradientRecord) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """The two halves of a unit's sketch, float32 [m]. Raises CorruptedError if the bytes are not the recorded ones."""
    from safetensors.numpy import load

    path = folder / record.file
    if not SKETCH_FILE.fullmatch(record.file):
        raise CorruptedError(f"{folder / 'gradients.json'}: {record.file!r} of {record.unit!r} is no name of a sketch. Delete "
                             "gradients.json and run again.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptedError(f"{path}: missing gradient sketch of unit {record.unit!r}. Run "
                             "`anabranch run recipe.yaml --from gradients`.") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise CorruptedError(f"{path}: damaged gradient sketch of unit {record.unit!r}. Delete it and run again.")
    try:
        halves = [load(data)[name] for name in ("half_a", "half_b")]
        if any(half.dtype != np.float32 or half.ndim != 1 for half in halves) or halves[0].shape != halves[1].shape:
            raise ValueError(", ".join(f"{half.dtype} {list(half.shape)}" for half in halves) + "; wanted float32 [m] twice")
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise CorruptedError(f"{path}: no gradient sketch of unit {record.unit!r} ({error}). Delete it and run again."
                             ) from error
    return halves[0], halves[1]


