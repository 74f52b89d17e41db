"""Everything that the weight-only metrics need of one tensor: of all models at once, in two readings, in bounded memory. Pure.

    n   models        s, l   short and long side of a matrix        K = k + LOW   directions kept of each model
    D [n, piece]      updates tau_i = model_i - base of one piece: some rows of a tall matrix, columns of a wide one

First reading, one model at a time: G = A^T A (A the matrix stood up, [l, s]) and the two ends of its spectrum. Of a tall
matrix the eigenvectors W are right singular vectors, of a wide one left ones. Second reading, all models side by side:
Y_i = A_i W_i are the other side's singular vectors times their values, and one Gram matrix of all Y holds every product of
every pair, so that no long vector is ever kept. Inner products of whole tensors are summed on the way.

The Gram matrix squares the matrix, so among the smallest values eigenvectors mix: neighbours whose squares differ by less
than rounding of the largest. So LOW of them, more than k, are taken and told apart again by the Gram matrix of Y alone
(Rayleigh-Ritz), whose largest value is theirs. Then bottom-k directions are as good as those of an SVD in float64.

Zero is what such an SVD would call so: below s spacings of float64 of the largest value. (Of updates of low rank, what the
Gram matrix cannot tell from zero: `eigen.ends`.) Directions of zero values are arbitrary and count for nothing: of an update of
rank r < k (LoRA) all r directions are top and bottom alike. In checkpoints that were rounded to few digits the smallest
values are rounding, not tuning: bottom-k metrics of bfloat16 models compare noise, as they do by the published definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.mergeability.eigen import EPS, Ends, add_gram, ends, native
from anabranch.mergeability.metrics import DIRECTIONS, matrix_metrics

Floats = NDArray[np.float64]

# Smallest directions that are told apart again, of which the last k are wanted.
LOW = 3 * DIRECTIONS
KEPT = DIRECTIONS + LOW
# Numbers of one model in a piece, and of all models together.
PIECE, PIECES = 1 << 18, 1 << 23
MATRIX_METRICS = ("right_subspace_overlap_top_k", "right_subspace_overlap_bottom_k", "interaction_matrix_overlap_top_k",
                  "interaction_matrix_overlap_bottom_k", "singular_value_overlap", "subspace_overlap", "top_k_cosine",
                  "top_k_energy")


class Memory(Protocol):
    """Buffers by name that are used again and again: fresh pages cost more than what is written to them."""

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor: ...


class NotFinite(Exception):
    """NaN or infinity in this tensor of some model or of the base."""


class Stopped(Exception):
    """The caller wants no more of this."""


@dataclass(frozen=True)
class TensorNumbers:
    """What one tensor adds. Models i, j in the caller's order.

    gram      [n, n] inner products tau_i . tau_j
    mass      [n, n] sums of |tau_i| |tau_j|
    base      squared norm of the base's tensor
    pairs     of a matrix: MATRIX_METRICS of each pair i < j, None where one of the two did not move it; None of others
    """

    gram: Floats
    mass: Floats
    base: float
    pairs: list[list[float] | None] | None

    @property
    def moved(self) -> bool:
        return bool(np.diag(self.gram).any())

    def to_json(self) -> dict[str, Any]:
        return {"gram": self.gram.tolist(), "mass": self.mass.tolist(), "base": self.base, "pairs": self.pairs}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TensorNumbers:
        return cls(np.array(value["gram"]), np.array(value["mass"]), value["base"], value["pairs"])


def piece_entries(shape: Sequence[int], models: int) -> tuple[int, int]:
    """(numbers across, how many of these lines at most stand in a piece). A matrix is cut along its long side."""
    across = min(shape) if len(shape) == 2 else 1
    return across, max(1, min(PIECE, PIECES // models) // max(1, across))


def bytes_held(shape: Sequence[int], models: int) -> int:
    """What `tensor_numbers` holds at a time, bytes: pieces, and for a matrix the Gram matrix and the directions."""
    if not all(shape):
        return 0
    across, lines = piece_entries(shape, models)
    lines = min(lines, int(np.prod(shape, dtype=np.int64)) // across)
    pieces = (models + 1) * across * lines
    if len(shape) != 2:
        return 8 * pieces
    kept = models * KEPT
    matrices = 1 if native() else 5  # numpy computes all eigenvectors, in copies
    return 8 * (pieces + across * (matrices * across + 4 * KEPT) + kept * (across + lines) + 6 * kept * kept)


def tensor_numbers(base: Tensor, models: Sequence[Tensor], memory: Memory,
                   stopped: Callable[[], bool] = lambda: False) -> TensorNumbers:
    """All numbers of one tensor. Same bytes however often and wherever it is computed, given BLAS of one thread.

    Args:
        base, models: the tensor of the base and of each model: of one shape, float, in any float dtype.
        stopped: asked now and then; where it says yes, Stopped is raised.
    Raises:
        NotFinite.
    """
    updates = _Updates(base, models, memory)
    matrix = _Matrix(updates, stopped) if base.dim() == 2 and base.numel() else None
    n, base2 = len(models), 0.0
    gram, mass = np.zeros((n, n)), np.zeros((n, n))
    for piece in updates.pieces():
        if stopped():
            raise Stopped
        origin = updates.origin(piece)
        base2 += float(origin @ origin)
        d = updates.all(piece)
        if matrix is not None:
            matrix.add(d)
        d = d.reshape(n, -1)
        gram += d @ d.T
        np.abs(d, out=d)
        mass += d @ d.T
    if not (np.isfinite(gram).all() and np.isfinite(base2)):
        raise NotFinite
    return TensorNumbers(gram, mass, base2, None if matrix is None else matrix.pairs(np.diag(gram)))


@dataclass
class _Updates:
    """One tensor of the base and all models, read in pieces as float64."""

    base: Tensor
    models: Sequence[Tensor]
    memory: Memory

    def __post_init__(self) -> None:
        shape = tuple(self.base.shape)
        self.wide = len(shape) == 2 and shape[0] < shape[1]
        self.across, self.lines = piece_entries(shape, len(self.models))
        self.long = self.base.numel() // self.across if self.across else 0
        self.matrix = len(shape) == 2

    def pieces(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.long, self.lines):
            yield start, min(start + self.lines, self.long)

    def _cut(self, tensor: Tensor, piece: tuple[int, int]) -> Tensor:
        if not self.matrix:
            return tensor.reshape(-1)[slice(*piece)]
        return tensor[:, slice(*piece)] if self.wide else tensor[slice(*piece)]

    def origin(self, piece: tuple[int, int]) -> Floats:
        """The base's numbers, flat; they stay for `one` and `all` of the same piece."""
        cut = self._cut(self.base, piece)
        return self.memory.take("base", cut.numel(), torch.float64).view(cut.shape).copy_(cut).view(-1).numpy()

    def one(self, model: int, piece: tuple[int, int], into: Tensor) -> None:
        cut = self._cut(self.models[model], piece)
        into.copy_(cut).sub_(self.memory.take("base", cut.numel(), torch.float64).view(cut.shape))

    def all(self, piece: tuple[int, int]) -> Floats:
        """[n, r, s] of a tall matrix, [n, s, c] of a wide one, [n, r] of any other tensor."""
        shape = self._cut(self.base, piece).shape
        d = self.memory.take("updates", len(self.models) * shape.numel(), torch.float64).view(-1, *shape)
        for model in range(len(self.models)):
            self.one(model, piece, d[model])
        return d.numpy()


class _Matrix:
    """Both ends of every model's spectrum, by a reading of its own, and the products of all projections."""

    def __init__(self, updates: _Updates, stopped: Callable[[], bool]) -> None:
        self.updates, self.ends = updates, []
        n, s, memory = len(updates.models), updates.across, updates.memory
        self.directions = memory.take("directions", n * KEPT * s, torch.float64).numpy().reshape(n, KEPT, s)
        self.products = memory.take("products", (n * KEPT) ** 2, torch.float64).numpy().reshape((n * KEPT,) * 2, order="F")
        self.directions[:], self.products[:] = 0, 0
        for model in range(n):
            if stopped():
                raise Stopped
            self.ends.append(self._ends(model))

    def _ends(self, model: int) -> Ends | None:
        """None of a model that did not move the tensor. Its directions go into a block of rows: top k, then LOW last."""
        updates, s = self.updates, self.updates.across
        gram = updates.memory.take("gram", s * s, torch.float64).numpy().reshape(s, s, order="F")
        gram[:] = 0
        for piece in updates.pieces():
            updates.origin(piece)
            x = updates.memory.take("updates", s * (piece[1] - piece[0]), torch.float64)
            x = x.view(s, -1) if updates.wide else x.view(-1, s)
            updates.one(model, piece, x)
            add_gram(x.numpy(), gram, rows=updates.wide)
        trace = np.trace(gram)
        if not np.isfinite(trace):
            raise NotFinite
        if not trace > 0:
            return None
        found = ends(gram, DIRECTIONS, LOW)
        rows = self.directions[model]
        rows[: found.top.shape[1]], rows[DIRECTIONS : DIRECTIONS + found.low.shape[1]] = found.top.T, found.low.T
        return found

    def add(self, d: Floats) -> None:
        """Add the products of one piece: Y_i^T = W_i^T A_i^T, [n K, lines], times its own transpose."""
        n, lines = len(d), d.shape[2 if self.updates.wide else 1]
        y = self.updates.memory.take("projected", n * KEPT * lines, torch.float64).numpy().reshape(n, KEPT, lines)
        for model in range(n):
            np.matmul(self.directions[model], d[model] if self.updates.wide else d[model].T, out=y[model])
        add_gram(y.reshape(n * KEPT, lines), self.products, rows=True)

    def pairs(self, squares: Floats) -> list[list[float] | None]:
        """MATRIX_METRICS of every pair i < j, from the products over the short and the long side."""
        n, k = len(self.ends), DIRECTIONS
        lower = self.products
        long = (np.tril(lower) + np.tril(lower, -1).T).reshape(n, KEPT, n, KEPT)
        w = self.directions.reshape(n * KEPT, -1)
        short = (w @ w.T).reshape(n, KEPT, n, KEPT)
        # of the long side: singular vectors times values, so their norms are taken off
        values = np.sqrt(long.reshape(n * KEPT, n * KEPT).diagonal().reshape(n, KEPT)[:, :k])
        unit = np.divide(1, values, out=np.zeros_like(values), where=values > 0)
        long_top = long[:, :k, :, :k] * unit[:, :, None, None] * unit[None, None]
        turn, low_values = self._told_apart(long)
        if self.updates.wide:
            unit = np.divide(1, low_values, out=np.zeros_like(low_values), where=low_values > 0)
            left, right = short[:, :k, :, :k], long_top
            bottom = _turned(long, turn * unit[:, None])
        else:
            left, right, bottom = long_top, short[:, :k, :, :k], _turned(short, turn)
        found: list[list[float] | None] = []
        for i, j in combinations(range(n), 2):
            one, other = self.ends[i], self.ends[j]
            if one is None or other is None:
                found.append(None)
                continue
            c = min(k, one.rank, other.rank)
            metrics = matrix_metrics(left[i, :c, j, :c], right[i, :c, j, :c], bottom[i, :c, j, :c],
                                     one.spectrum, other.spectrum, float(squares[i]), float(squares[j]))
            found.append([metrics[name] for name in MATRIX_METRICS])
        return found

    def _told_apart(self, long: Floats) -> tuple[Floats, Floats]:
        """How the LOW directions of each model combine to its last k singular directions whose values are not zero, smallest
        first [n, LOW, k]; and these values [n, k]. Zeros where there are fewer."""
        n, k = len(self.ends), DIRECTIONS
        turn, values = np.zeros((n, LOW, k)), np.zeros((n, k))
        for i, end in enumerate(self.ends):
            if end is not None:
                p = end.low.shape[1]
                low = long[i, k : k + p, i, k : k + p]
                squares, vectors = np.linalg.eigh(low)
                zero = max(p * EPS * squares[-1], (len(end.values) * EPS) ** 2 * end.values[0])
                first = int((squares <= zero).sum())
                c = min(k, p - first)
                turn[i, :p, :c], values[i, :c] = vectors[:, first : first + c], np.sqrt(squares[first : first + c])
        return turn, values


def _turned(products: Floats, turn: Floats) -> Floats:
    """[n, k, n, k]: turn_i^T P_ij turn_j, with P_ij the products of the LOW directions of i and j."""
    n, low, k = turn.shape
    inner = np.ascontiguousarray(products[:, DIRECTIONS:, :, DIRECTIONS:]).reshape(n, low, n * low)
    half = (turn.transpose(0, 2, 1) @ inner).reshape(n * k, n, low).transpose(1, 0, 2)
    found: Floats = (half @ turn).reshape(n, n, k, k).transpose(1, 2, 0, 3)
    return found
