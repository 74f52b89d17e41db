"""Merges of the singular vectors and values of task vectors: for matrices only.

    k   branches          m, n   rows and columns          r = min(m, n)

    x_0   `base`          x_i   `branches[i]`          w_i   `weights[i]`          d_i = x_i - x_0 = U_i S_i V_i^T
    polar(A) = U V^T, the partial isometry next to A = U S V^T

Singular triples come from the eigenvectors of A A^T or A^T A, whichever is smaller, in float64: exact enough for float32
data, and several times faster than a full decomposition of a long matrix. Directions whose singular value is below 1e-5 of
the largest are no directions but rounding (a LoRA's sum, a frozen block), and are left out everywhere: a polar factor
would give them full length. Branches of weight 0 are left out, and do not count in k.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from anabranch.merge import merge_method
from anabranch.merge.averaging import finite
from anabranch.merge.consensus import divisor_of

RANK_TOLERANCE = 1e-5
SHARE_ROUNDING = 1e-6


@merge_method("tsv_m", needs_base=True, block="tensor", fits="matrix", otherwise="task_vector_mean",
              reference="arXiv:2412.00081, sec. 4.2, alg. 1 (TSV-Merge)")
def tsv_m(
    branches: Float[Tensor, "k m n"],
    base: Float[Tensor, "m n"],
    weights: Float[Tensor, " k"],
    *,
    scale: float = 1.0,
) -> Float[Tensor, "m n"]:
    r"""The strongest directions of every task vector, made orthogonal to each other.

    \theta = x_0 + \lambda polar([U_1 .. U_k]) diag(w_1 S_1, .., w_k S_k) polar([V_1 .. V_k])^T

    with the first \max(1, \lfloor r / k \rfloor) triples of each d_i.

    Args:
        branches: x_i, matrices.
        base: x_0.
        weights: w_i, finite.
        scale: lambda, finite; the paper's 1 needs no tuning.
    Raises:
        ValueError: not a matrix; a weight or the scale is not finite.
    Example:
        >>> branches = torch.tensor([[[3., 0.], [0., 0.]], [[0., 0.], [0., 2.]]])
        >>> tsv_m(branches, torch.zeros(2, 2), torch.ones(2))
        tensor([[3., 0.],
                [0., 2.]])

    Differs from the reference: has weights; keeps one triple where r < k, where the authors' code keeps none; leaves out
    directions of singular value 0, whose arbitrary vectors turn the others in the authors' code.
    """
    _check(branches, scale)
    deltas, w = _deltas(branches, base, weights)
    count = max(1, min(base.shape) // max(len(deltas), 1))
    parts = [_thin(d, count) for d in deltas]
    if not any(len(s) for _, s, _ in parts):
        return base.clone()
    left = polar(torch.cat([u for u, _, _ in parts], 1))
    right = polar(torch.cat([vt for _, _, vt in parts], 0))
    values = torch.cat([s * v for (_, s, _), v in zip(parts, w, strict=True)])
    return _moved(base, (left * values) @ right, scale)


@merge_method("iso_c", needs_base=True, block="tensor", fits="matrix", otherwise="task_vector_mean",
              reference="arXiv:2502.04959, sec. 4.1, alg. 1 (Iso-C)")
def iso_c(
    branches: Float[Tensor, "k m n"],
    base: Float[Tensor, "m n"],
    weights: Float[Tensor, " k"],
    *,
    scale: float = 1.0,
) -> Float[Tensor, "m n"]:
    r"""The sum of the task vectors with all its singular values set to their mean.

    \theta = x_0 + \lambda \bar\sigma polar(\sum_i w_i d_i),   \bar\sigma the mean singular value of the sum

    Args:
        branches: x_i, matrices.
        base: x_0.
        weights: w_i, finite.
        scale: lambda, finite; the authors tune it (1.0 to 1.5 for 8 to 20 vision models; too much for two).
    Raises:
        ValueError: not a matrix; a weight or the scale is not finite.
    Example:
        >>> branches = torch.tensor([[[3., 0.], [0., 0.]], [[0., 0.], [0., 1.]]])
        >>> iso_c(branches, torch.zeros(2, 2), torch.ones(2))
        tensor([[2., 0.],
                [0., 2.]])

    Differs from the reference: has weights; mean and polar factor are over the directions that the sum has, so a sum
    that lacks rank keeps its nuclear norm and its range, where the authors' code moves along arbitrary directions.
    """
    _check(branches, scale)
    deltas, w = _deltas(branches, base, weights)
    if not deltas:
        return base.clone()
    u, s, vt = _thin(_summed(deltas, w))
    return _moved(base, s.mean() * (u @ vt), scale) if len(s) else base.clone()


@merge_method("iso_cts", needs_base=True, block="tensor", fits="matrix", otherwise="task_vector_mean",
              reference="arXiv:2502.04959, sec. 4.2, alg. 2 (Iso-CTS)")
def iso_cts(
    branches: Float[Tensor, "k m n"],
    base: Float[Tensor, "m n"],
    weights: Float[Tensor, " k"],
    *,
    common_share: float = 0.8,
    scale: float = 1.0,
) -> Float[Tensor, "m n"]:
    r"""Iso-C whose weakest common directions make room for each branch's own.

    A = \sum_i w_i d_i = U S V^T,   c = r - k p,   p = round((r - \lfloor r \phi \rfloor) / k), at most \lfloor r / k \rfloor
    (I - U_c U_c^T) w_i d_i = U'_i S'_i V'_i^T, of which the first p triples
    \theta = x_0 + \lambda \bar\sigma polar([U'_1 .. U'_k, U_c]) polar([V'_1 .. V'_k, V_c])^T

    \bar\sigma is the mean of S'_1 .. S'_k and S_c.

    Args:
        branches: x_i, matrices.
        base: x_0.
        weights: w_i, finite.
        common_share: phi in [0, 1], the share of directions taken from the sum; 1 is Iso-C.
        scale: lambda, finite.
    Raises:
        ValueError: not a matrix; common_share out of range; a weight or the scale is not finite.
    Example:
        >>> branches = torch.tensor([[[3., 0.], [0., 0.]], [[0., 0.], [0., 1.]]])
        >>> iso_cts(branches, torch.zeros(2, 2), torch.ones(2), common_share=1.0)
        tensor([[2., 0.],
                [0., 2.]])

    Differs from the reference: has weights; directions without a singular value are left out of the mean and of the
    polar factors.
    """
    _check(branches, scale)
    if not 0 <= common_share <= 1:
        raise ValueError(f"common_share: got {common_share}, wanted a share in [0, 1]")
    deltas, w = _deltas(branches, base, weights)
    if not deltas:
        return base.clone()
    r, k = min(base.shape), len(deltas)
    own = min(round((r - int(r * common_share)) / k), r // k)
    u, s, vt = _thin(_summed(deltas, w), r - own * k)
    parts = []
    for d, v in zip(deltas, w, strict=True):
        d = d.double() * v
        parts.append(_thin(d - u @ (u.T @ d), own, RANK_TOLERANCE * float(d.norm())))
    parts.append((u, s, vt))
    values = torch.cat([sigma for _, sigma, _ in parts])
    if not len(values):
        return base.clone()
    left, right = polar(torch.cat([p[0] for p in parts], 1)), polar(torch.cat([p[2] for p in parts], 0))
    return _moved(base, values.mean() * (left @ right), scale)


@merge_method("star", needs_base=True, block="tensor", fits="matrix", otherwise="task_vector_mean",
              reference="arXiv:2502.10339, sec. 3 (STAR)")
def star(
    branches: Float[Tensor, "k m n"],
    base: Float[Tensor, "m n"],
    weights: Float[Tensor, " k"],
    *,
    energy: float = 0.4,
    scale: float = 1.0,
) -> Float[Tensor, "m n"]:
    r"""The mean of the task vectors, each cut to its strongest directions and scaled back to its nuclear norm.

    \theta = x_0 + \lambda \sum_i w_i f_i U_i S_i^{(q_i)} V_i^T / \sum_i w_i,   f_i = \sum_j S_{ij} / \sum_{j \le q_i} S_{ij}

    q_i is the smallest count whose singular values hold the share eta of their sum.

    Args:
        branches: x_i, matrices.
        base: x_0.
        weights: w_i, finite; their sum counts as 1 where it is below 1e-8 in magnitude.
        energy: eta in (0, 1]; 1 gives the plain mean of the task vectors.
        scale: lambda, finite.
    Raises:
        ValueError: not a matrix; energy out of range; a weight or the scale is not finite.
    Example:
        >>> star(torch.tensor([[[3., 0.], [0., 1.]]]), torch.zeros(2, 2), torch.ones(1))
        tensor([[4., 0.],
                [0., 0.]])

    Differs from the reference: has weights.
    """
    _check(branches, scale)
    if not 0 < energy <= 1:
        raise ValueError(f"energy: got {energy}, wanted a share in (0, 1]")
    deltas, w = _deltas(branches, base, weights)
    step = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    for d, v in zip(deltas, w, strict=True):
        u, s, vt = _thin(d)
        if not len(s):
            continue
        # A share counts as reached where only the rounding of float32 data is missing.
        q = min(int((s.cumsum(0) < energy * s.sum() * (1 - SHARE_ROUNDING)).sum()) + 1, len(s))
        step += v / divisor_of(w) * (s.sum() / s[:q].sum()) * ((u[:, :q] * s[:q]) @ vt[:q])
    return _moved(base, step, scale)


def polar(a: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """U V^T of a = U S V^T, float64, over the directions that `a` has; the orthogonal matrix next to it at full rank."""
    u, _, vt = _thin(a)
    return u @ vt


def _thin(a: Tensor, count: int | None = None, least: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, q], S [q] descending, V^T [q, n]) in float64, of the first `count` directions that `a` has.

    A direction's singular value is above RANK_TOLERANCE of the largest, and above `least`.
    """
    a = a.double()
    if a.shape[0] > a.shape[1]:
        v, s, ut = _thin(a.T, count, least)
        return ut.T, s, v.T
    if not a.numel():
        return a.new_zeros(a.shape[0], 0), a.new_zeros(0), a.new_zeros(0, a.shape[1])
    squares, u = torch.linalg.eigh(a @ a.T)
    s = squares.flip(0).clamp(min=0).sqrt()
    rank = int((s > max(RANK_TOLERANCE * float(s[0]), least)).sum())
    rank = rank if count is None else min(rank, count)
    u, s = u.flip(1)[:, :rank], s[:rank]
    return u, s, (u / s).T @ a


def _deltas(branches: Tensor, base: Tensor, weights: Tensor) -> tuple[list[Tensor], list[float]]:
    """Task vectors and weights of the branches whose weight is not 0. Raises ValueError for one that is not finite."""
    chosen = [(branch - base, w) for branch, w in zip(branches, finite(weights), strict=True) if w != 0]
    if not all(bool(d.isfinite().all()) for d, _ in chosen):
        raise ValueError("a NaN or an infinity in an input, or in its difference from the base: such a matrix has no singular "
                         "values. Find which input has it, and make or fetch that one again")
    return [d for d, _ in chosen], [w for _, w in chosen]


def _summed(deltas: list[Tensor], weights: list[float]) -> Tensor:
    total = torch.zeros(deltas[0].shape, dtype=torch.float64, device=deltas[0].device)
    for d, w in zip(deltas, weights, strict=True):
        total += d.double() * w
    return total


def _moved(base: Tensor, step: Tensor, scale: float) -> Tensor:
    return (step * scale).float().add_(base)


def _check(branches: Tensor, scale: float) -> None:
    if branches.ndim != 3:
        raise ValueError(f"branches: got tensors of {branches.ndim - 1} dimensions, wanted matrices")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, wanted a finite number")
