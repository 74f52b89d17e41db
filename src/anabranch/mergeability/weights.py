"""Weight-only metrics of every pair, by one pass over the checkpoints: any size, any number of shards, bounded memory.

    BASE + n models   ->   one tensor at a time, all models together   ->   n (n - 1) / 2 pairs

Each matrix of each model is decomposed once, not once for every pair. Workers take whole tensors, the dearest first;
sums are formed afterwards in the order of the names. So neither the number of threads nor a kill and a second start
change a bit. Formulas: `metrics`; the numbers of one tensor: `weight_pass`.

Integer tensors (counters, position ids) are skipped. A tensor that no model moved is left out of everything. One that a
single model of a pair did not move is left out of that pair's layerwise rank and subspace means, since directions of a zero
matrix are arbitrary; it counts with its zeros in the global metrics.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from math import prod, sqrt
from pathlib import Path
from threading import Event, local

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from anabranch.artifacts import digest
from anabranch.engine.blocks import MERGED, Buffers
from anabranch.engine.checkpoint import ITEM_SIZES, Checkpoint, checkpoint_hash
from anabranch.engine.memory import occupied
from anabranch.engine.plan import label as numbered
from anabranch.engine.plan import line_up
from anabranch.errors import AnabranchError, ModelError, RecipeError
from anabranch.mergeability.eigen import add_gram, ends, native
from anabranch.mergeability.journal import Journal
from anabranch.mergeability.metrics import (
    DIRECTIONS,
    METRICS,
    extra_metrics,
    layerwise_rank_metrics,
    subspace_metrics,
    task_vector_metrics,
)
from anabranch.mergeability.weight_pass import (
    KEPT,
    LOW,
    MATRIX_METRICS,
    NotFinite,
    TensorNumbers,
    bytes_held,
    tensor_numbers,
)

Floats = NDArray[np.float64]
Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]

BASE = "base"
# Changes whenever the same checkpoints give other numbers: older journals are then begun anew.
VERSION = 1
# Mean cosine of the pairs above which a common offset is likelier than tasks that agree.
SUSPICIOUS = 0.9
# Different models from which on this is said of all; of fewer, two are called nearly the same.
LEAST_OFFSET = 4
MOST_THREADS = 8
# Numbers that are compared, or looked at for NaN, at a time.
CHUNK = 1 << 20


@dataclass(frozen=True)
class WeightMetrics:
    """Every pair's weight-only metrics.

    pairs     (task1, task2), in the order of the models -> metric -> value, in the order of METRICS
    norms     task -> L2 norm of its task vector;   base_norm: of the base, over the same tensors
    hashes    'base' and tasks -> hash of config and weights
    excluded  tensor -> why it is in no metric
    left_out  metric -> why a pair lacks it, of those that one lacks
    seconds   wall time, hashing included
    """

    pairs: dict[tuple[str, str], dict[str, float]]
    norms: dict[str, float]
    base_norm: float
    hashes: dict[str, str]
    excluded: dict[str, str]
    left_out: dict[str, str]
    seconds: float = field(compare=False)


def weight_metrics(base: Path, models: Mapping[str, Path], *, journal: Path | None = None, threads: int | None = None,
                   hashes: Mapping[str, str] | None = None, tell: Tell = lambda _: None,
                   progress: Progress = lambda *_: None) -> WeightMetrics:
    """Measure every pair of models.

    Args:
        base: folder of the model that all were trained from.
        models: task -> folder, two or more.
        journal: file that finished tensors are noted in. One of the same checkpoints is taken over; it is left for the
            caller to delete once the result is safe.
        threads: workers; None: one for each core, eight at most. Memory grows with them (`weight_cost`).
        hashes: 'base' and tasks -> `checkpoint_hash`, where already known.
        tell: remarks for the user. progress: (what, done, in all).
    Raises:
        AnabranchError: everything that is wrong with the models, in one message.
    """
    begun = time.monotonic()
    opened = _Opened.of(base, models)
    threads = threads or default_threads()
    known = dict(hashes) if hashes is not None else _hashes(opened, threads, progress)
    _check_moved(opened)
    for one, other in combinations(models, 2):
        if known[one] == known[other]:
            tell(f"{one} and {other} are the same model ({models[one]}, {models[other]}): their pair says nothing.")
    key = digest({"version": VERSION, "native": native(), "checkpoints": [known[label] for label in (BASE, *models)]})
    with Journal(journal, key) as kept, threadpool_limits(1):  # sums must not depend on how many threads BLAS has
        numbers = {name: TensorNumbers.from_json(value) for name, value in kept.done.items() if name in opened.names}
        if numbers:
            tell(f"{len(numbers)} of {len(opened.names)} tensors were measured before and are not measured again.")
        for name, found in _computed(opened, numbers, threads, progress):
            kept.add(name, found.to_json())
            numbers[name] = found
    moved = [name for name in opened.names if numbers[name].moved]
    excluded = opened.excluded | {name: "no model moved it" for name in opened.names if name not in moved}
    sums = _Sums.of([numbers[name] for name in moved])
    pairs = {(one, other): sums.pair(i, j, list(models)) for (i, one), (j, other) in combinations(enumerate(models), 2)}
    _remark_on_offset(pairs, known, tell)
    return WeightMetrics(pairs, dict(zip(models, np.sqrt(np.diag(sums.gram)).tolist(), strict=True)), sqrt(sums.base), known,
                         dict(sorted(excluded.items())), _left_out(pairs), round(time.monotonic() - begun, 3))


def default_threads() -> int:
    """One for each core that this process may use, eight at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_THREADS)


# ---- the checkpoints --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """Base and models, found to line up. `names`: of the float tensors, sorted; `excluded`: the others, and why."""

    base: Checkpoint
    models: dict[str, Checkpoint]
    names: list[str]
    excluded: dict[str, str]

    @classmethod
    def of(cls, base: Path, models: Mapping[str, Path]) -> _Opened:
        problems = []
        if len(models) < 2:
            problems.append(f"{len(models)} models given: wanted two or more, since what is measured is a pair")
        if BASE in models:
            problems.append(f"a model is called '{BASE}', as the base is; give it another name")
        opened: dict[str, Checkpoint] = {}
        for label, folder in ((BASE, base), *((f"{task} ", folder) for task, folder in models.items())):
            try:
                opened[label] = Checkpoint.open(folder)
                if "quantization_config" in opened[label].config:
                    problems.append(f"{folder}: config.json has a `quantization_config`, and packed weights have no task "
                                    "vector. Give the model as it was before, or dequantised")
            except AnabranchError as error:
                problems.append(f"{label.strip()}: {error}")
        if problems:
            raise (ModelError if len(models) > 1 else RecipeError).of("these models cannot be measured:", problems)
        excluded = {name: f"{info.dtype}: integers have no update" for name, info in opened[BASE].tensors.items()
                    if _is_integer(info.dtype)}
        root, others = _floats_of(opened[BASE]), {task: _floats_of(opened[f"{task} "]) for task in models}
        names = _lined_up(root, others)
        excluded |= {name: "the output head of some models only; config.json ties it to the input embedding"
                     for name in root.tensors if name not in names}
        for name in [n for n in names if n.split(".")[-2:] == ["lm_head", "weight"]]:
            checkpoints = (root, *others.values())
            if all(c.ties_embeddings for c in checkpoints) and all(c.tied_copy_of(name) for c in checkpoints):
                excluded[name] = "a copy of the input embedding, to which config.json ties it"
        return cls(root, others, sorted(n for n in names if n not in excluded), excluded)

    def tensors(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Of the base and of every model: views of the mapped files."""
        return self.base.read(name), [model.read(name) for model in self.models.values()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.tensors[name].shape


def _lined_up(base: Checkpoint, models: Mapping[str, Checkpoint]) -> list[str]:
    """`line_up`, which numbers what it compares, with tasks named in what it raises."""
    try:
        return line_up(base, list(models.values()))
    except AnabranchError as error:
        message = str(error).replace("every branch must", "every model must").replace("Train the branch", "Train the model")
        for k, (task, model) in enumerate(models.items()):
            message = message.replace(numbered(k, model), f"{task} ({model.folder})")
        raise type(error)(message) from error


def _is_integer(dtype: str) -> bool:
    return dtype in ITEM_SIZES and dtype not in MERGED and not dtype.startswith("F")


def _floats_of(checkpoint: Checkpoint) -> Checkpoint:
    """The same without its integer tensors, which need not line up."""
    return replace(checkpoint, tensors={n: i for n, i in checkpoint.tensors.items() if not _is_integer(i.dtype)})


def _hashes(opened: _Opened, threads: int, progress: Progress) -> dict[str, str]:
    checkpoints = {BASE: opened.base, **opened.models}
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        for label, one in zip(checkpoints, pool.map(lambda c: checkpoint_hash(c.folder), checkpoints.values()), strict=True):
            found[label] = one
            progress("hashing", len(found), len(checkpoints))
    return found


def _check_moved(opened: _Opened) -> None:
    """Raises ModelError naming every model whose task vector is zero. Reads no further than the first number that moved."""
    def differs(name: str, model: Checkpoint) -> bool:
        one, other = opened.base.read(name).reshape(-1), model.read(name).reshape(-1)
        return any(not torch.equal(one[at : at + CHUNK].double(), other[at : at + CHUNK].double())
                   for at in range(0, len(one), CHUNK))

    still = [f"{task} ({model.folder}): every float tensor equals the base's" for task, model in opened.models.items()
             if not any(differs(name, model) for name in opened.names)]
    if still:
        raise ModelError.of(f"models that are the base {opened.base.folder} itself. A task vector of zero has no direction and "
                            "merges with anything. Give tuned models:", still)


def _not_finite(opened: _Opened) -> AnabranchError:
    """Every checkpoint that holds NaN or infinity."""
    problems = []
    for label, checkpoint in {BASE: opened.base, **opened.models}.items():
        bad = [name for name in opened.names if not all(
            bool(torch.isfinite(part).all()) for part in checkpoint.read(name).reshape(-1).split(CHUNK))]
        if bad:
            problems.append(f"{label} ({checkpoint.folder}): {len(bad)} tensors, '{bad[0]}' the first")
    return ModelError.of("models with NaN or infinity in their weights. Make or fetch them again:", problems)


# ---- the pass ---------------------------------------------------------------------------------------------------------


def _computed(opened: _Opened, known: Mapping[str, TensorNumbers], threads: int,
              progress: Progress) -> Iterator[tuple[str, TensorNumbers]]:
    """Every tensor that is not known yet, as workers finish them. Raises ModelError for NaN or infinity."""
    sizes = {name: prod(opened.shape(name)) for name in opened.names}
    done, total = sum(sizes[name] for name in known), sum(sizes.values())
    left = sorted((n for n in opened.names if n not in known), key=lambda n: (-_flops(opened.shape(n), len(opened.models)), n))
    own, stop = local(), Event()

    def work(name: str) -> TensorNumbers:
        torch.set_num_threads(1)  # of this worker
        if not hasattr(own, "buffers"):
            own.buffers = Buffers()
        base, models = opened.tensors(name)
        return tensor_numbers(base, models, own.buffers, stop.is_set)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    try:
        running = {pool.submit(work, name): name for name in left}
        for future in as_completed(running):
            name = running[future]
            yield name, future.result()
            done += sizes[name]
            progress("weights", done, total)
    except NotFinite:
        stop.set()
        raise _not_finite(opened) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


# ---- from tensors to pairs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Tensors by rows, models by columns: grams [tensors, n, n]; gram, mass [n, n] over all; base: squared norm."""

    tensors: list[TensorNumbers]
    grams: Floats
    norms: Floats
    gram: Floats
    mass: Floats
    base: float

    @classmethod
    def of(cls, tensors: list[TensorNumbers]) -> _Sums:
        grams = np.stack([t.gram for t in tensors])
        gram, mass, base = np.zeros(grams.shape[1:]), np.zeros(grams.shape[1:]), 0.0
        for tensor in tensors:  # one after the other: the order decides the last bit
            gram += tensor.gram
            mass += tensor.mass
            base += tensor.base
        return cls(tensors, grams, np.sqrt(grams.diagonal(axis1=1, axis2=2)), gram, mass, base)

    def pair(self, i: int, j: int, models: Sequence[str]) -> dict[str, float]:
        n, squares = len(models), np.square(self.norms)
        place = i * n - i * (i + 1) // 2 + j - i - 1
        a2, b2, dot = float(self.gram[i, i]), float(self.gram[j, j]), float(self.gram[i, j])
        matrices = [dict(zip(MATRIX_METRICS, row, strict=True)) for t in self.tensors
                    if t.pairs is not None and (row := t.pairs[place]) is not None]
        found = (task_vector_metrics(a2, b2, dot) | subspace_metrics(matrices)
                 | layerwise_rank_metrics(squares[:, i], squares[:, j], self.grams[:, i, j])
                 | extra_metrics(a2, b2, dot, float(self.mass[i, j]), self.base, self.norms[:, i], self.norms[:, j]))
        return {name: found[name] for name in METRICS if name in found}


def _left_out(pairs: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[str, str]:
    reasons = dict.fromkeys(MATRIX_METRICS, "there is no matrix that both models of a pair moved") | {
        "sign_conflict": "the two models moved different weights"}
    return {name: reasons.get(name, "there is no tensor that both models of a pair moved") for name, metric in METRICS.items()
            if metric.needs == "weights" and not all(name in found for found in pairs.values())}


def _remark_on_offset(pairs: Mapping[tuple[str, str], Mapping[str, float]], hashes: Mapping[str, str], tell: Tell) -> None:
    """Of models that are the same has been told: of each, one counts. Few that agree say little of the base."""
    first: dict[str, str] = {}
    for task in (task for pair in pairs for task in pair):
        first.setdefault(hashes[task], task)
    cosines = {pair: found["task_vector_cosine_similarity"] for pair, found in pairs.items()
               if all(first[hashes[task]] == task for task in pair)}
    if len(first) < LEAST_OFFSET:
        for (one, other), cosine in cosines.items():
            if cosine > SUSPICIOUS:
                tell(f"{one} and {other} are nearly the same model: their task vectors have a cosine of {cosine:.3f}. Two "
                     "checkpoints of one training run? Or the base is not the checkpoint that they were trained from.")
        return
    mean = sum(cosines.values()) / len(cosines)
    if mean > SUSPICIOUS:
        tell(f"the task vectors of all pairs have a mean cosine of {mean:.3f}. Tasks seldom agree so well: the base may not be "
             "the checkpoint that these models were trained from, so that they share an offset. Give that checkpoint; where "
             "it is lost, merge all of these models with equal weights and give their mean as the base, which takes off what "
             "they share.")


# ---- what it will take ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightCost:
    """A forecast. `size`: bytes of all checkpoints; `read`: bytes read, of which all but `size` mostly from the page cache;
    `seconds`: rough; `peak`: anonymous memory of this process, bytes."""

    models: int
    tensors: int
    matrices: int
    size: int
    read: int
    seconds: float
    peak: int
    threads: int

    @property
    def decompositions(self) -> int:
        return self.matrices * self.models

    def lines(self) -> list[str]:
        return [f"{self.models * (self.models - 1) // 2} pairs of {self.models} models, {self.tensors} tensors, of which "
                f"{self.matrices} matrices: {self.decompositions:,} decompositions",
                f"{self.size / 1e9:,.2f} GB of checkpoints, {self.read / 1e9:,.2f} GB to read, most of it again from memory",
                f"about {self.seconds:,.0f} s on {self.threads} threads, up to {self.peak / 1e6:,.0f} MB"]


def weight_cost(base: Path, models: Mapping[str, Path], *, threads: int | None = None) -> WeightCost:
    """What `weight_metrics` will take. A probe of a tenth of a second tells how fast this machine is. Raises as it does."""
    opened = _Opened.of(base, models)
    threads, n = threads or default_threads(), len(models)
    shapes = {name: opened.shape(name) for name in opened.names}
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    files = (opened.base, *opened.models.values())
    size = sum(checkpoint.size for checkpoint in files)
    again = sum(checkpoint.tensors[name].size for checkpoint in files for name, shape in shapes.items() if len(shape) == 2)
    once = sum(checkpoint.tensors[name].size for checkpoint in files for name, shape in shapes.items() if len(shape) != 2)
    flops, cubes, entry = _speeds()
    costs = [_flops(shape, n) / flops + (n * min(shape) ** 3 / cubes if len(shape) == 2 else 0) + 2 * n * prod(shape) * entry
             for shape in shapes.values()]
    seconds = max(sum(costs) / threads, max(costs, default=0)) + size / HASHED / threads
    held = sorted((bytes_held(shape, n) for shape in shapes.values()), reverse=True)
    return WeightCost(n, len(shapes), len(matrices), size, size + 2 * again + once, seconds,
                      occupied() + sum(held[:threads]), threads)


# Bytes hashed per second and core, roughly.
HASHED = 1.5e9


def _flops(shape: Sequence[int], n: int) -> float:
    """Multiplications of the Gram matrices and products of one tensor; the eigenvectors aside."""
    pairwise = 2.0 * n * n * prod(shape)
    if len(shape) != 2:
        return pairwise
    short, long = sorted(shape)
    return pairwise + n * long * short * (short + 2 * KEPT) + long * (n * KEPT) ** 2


def _speeds() -> tuple[float, float, float]:
    """(multiplications of a Gram matrix per second, s^3 of `ends` per second, seconds to read and subtract one number)."""
    s, long = 512, 1024
    x = np.random.default_rng(0).standard_normal((long, s))
    gram, stored = np.zeros((s, s), order="F"), torch.zeros(long * s)
    into, taken = torch.empty(long * s, dtype=torch.float64), [0.0, 0.0, 0.0]
    with threadpool_limits(1):
        for _ in range(2):  # the first warms up
            gram[:] = 0
            times = [time.perf_counter()]
            add_gram(x, gram, rows=False)
            times.append(time.perf_counter())
            ends(gram, DIRECTIONS, LOW)
            times.append(time.perf_counter())
            into.copy_(stored).sub_(into)
            times.append(time.perf_counter())
            taken = [b - a for a, b in pairwise(times)]
    return long * s * s / taken[0], s**3 / taken[1], taken[2] / (long * s)
