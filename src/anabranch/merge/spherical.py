"""Merges of directions and lengths.

    k   branches          *shape   of one tensor          float32 throughout, coefficients in float64

    x_0   `base`                  x_i   `branches[i]`          v_i = x_i - x_0 where a base is given, otherwise x_i
    G     inner products of what is merged, each tensor flattened (`stack.gram`)

A method that takes a tensor as one vector is a combination of its inputs whose coefficients follow from G alone: one
pass finds G, k numbers are computed, a second pass adds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anabranch.merge import Argument, BlockKind, merge_method, streams
from anabranch.merge.averaging import NO_SUM, finite
from anabranch.merge.combination import Combination
from anabranch.merge.stack import Block, Blockwise, Stack, WholeStack, gram

# slerp: above this cosine, of either sign, the straight line is taken; below this norm a vector is not normalised.
STRAIGHT, SLERP_NORM = 0.9995, 1e-8
# nuslerp: the same; and the sum of weights that counts as none.
COLINEAR, NUSLERP_NORM, NUSLERP_SUM = 1 - 1e-6, 1e-7, 1e-6
# Share of its terms' squares below which a sum of vectors is rounding of float32 products.
CANCELLED = 1e-6
# Cosine from which on two points are antipodes, and no direction leads from one to the other.
ANTIPODE = -1 + 1e-6


@merge_method("slerp", needs_base=True, branches=(1, 1), reference="Shoemake 1985, doi:10.1145/325334.325242, sec. 3.3")
def slerp(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    *,
    t: float,
) -> Float[Tensor, " *shape"]:
    r"""Along the arc from the base to the one branch.

    \theta = [ \sin((1 - t) \Omega) x_0 + \sin(t \Omega) x_1 ] / \sin \Omega,   \cos \Omega = u_0 \cdot u_1

    with u = x / ||x|| (x itself where its norm is at most 1e-8) over the whole flattened tensor. Where
    |\cos \Omega| > 0.9995 the straight line x_0 + t (x_1 - x_0), also for opposite vectors; so t = 1/2 of v and -v is 0.

    Args:
        branches: x_1.
        base: x_0.
        t: 0 is the base, 1 the branch; finite, and not confined to [0, 1].
    Raises:
        ValueError: more than one branch, or t is not finite.
    Example:
        >>> slerp(torch.tensor([[0., 2.]]), torch.tensor([2., 0.]), t=0.5)
        tensor([1.4142, 1.4142])

    Differs from the reference: as in MergeKit the coefficients multiply vectors that are not normalised, so the length
    follows from both; most pairs of fine-tunes of one base are closer than 0.9995 and take the straight line.
    """
    stack = WholeStack(branches, base)
    return stack.apply(slerp_streamed(stack, t=t))


@streams("slerp")
def slerp_streamed(stack: Stack, *, t: float) -> Combination:
    if stack.k != 1:
        raise ValueError(f"branches: slerp takes one and the base, got {stack.k}. Use karcher or multislerp for more")
    if not math.isfinite(t):
        raise ValueError(f"t: got {t}, wanted a finite number")
    g = gram(stack, offset=False).tolist()
    norms = [math.sqrt(max(g[i][i], 0.0)) for i in (0, 1)]
    units = [n if n > SLERP_NORM else 1.0 for n in norms]
    cosine = g[0][1] / (units[0] * units[1])
    if abs(cosine) > STRAIGHT:
        return Combination((1.0,)) if t == 1 else Combination((t,), anchored=True)
    angle = math.acos(cosine)
    return Combination((math.sin(t * angle) / math.sin(angle),), math.sin((1 - t) * angle) / math.sin(angle))


def _nuslerp_block(arguments: Mapping[str, Argument]) -> BlockKind:
    return "entry" if arguments["flatten"] else "tensor" if arguments["row_wise"] else "row"


@merge_method("nuslerp", needs_base=False, branches=(1, 2), block=_nuslerp_block,
              reference="MergeKit, nuslerp; Shoemake 1985, doi:10.1145/325334.325242, sec. 3.3")
def nuslerp(
    branches: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    base: Float[Tensor, " *shape"] | None = None,
    *,
    flatten: bool = True,
    row_wise: bool = False,
) -> Float[Tensor, " *shape"]:
    r"""Along the arc between two branches, as seen from the base where one is given.

    \theta = [ \sin((1 - t) \Omega) v_1 + \sin(t \Omega) v_2 ] / \sin \Omega  (+ x_0),   t = w_2 / (w_1 + w_2)

    with \cos \Omega = u_1 \cdot u_2, u = v / \max(||v||, 10^{-7}). Where |\cos \Omega| > 1 - 10^{-6} it is
    (1 - t) v_1 + t v_2. A branch that stands alone is returned as it is.

    Args:
        branches: x_1, x_2.
        weights: w_i; where they sum to less than 1e-6 in magnitude, t is 1/2.
        base: x_0, or None for v_i = x_i.
        flatten: the tensor is one vector; otherwise it holds many:
        row_wise: False, along the last dimension (each stored row); True, along the first (each stored column).
    Raises:
        ValueError: more than two branches, or a weight is not finite.
    Example:
        >>> nuslerp(torch.tensor([[1., 0.], [0., 2.]]), torch.ones(2))
        tensor([0.7071, 1.4142])

    Differs from the reference: opposite and equal vectors take the straight line from |cos| > 1 - 1e-6, where MergeKit
    divides rounding noise by a sine of 1e-7; tensors of any number of dimensions and one branch beside a base work.
    """
    kind = "entry" if flatten else "tensor" if row_wise else "row"
    stack = WholeStack(branches, base, kind=kind)
    return stack.apply(nuslerp_streamed(stack, weights, flatten=flatten, row_wise=row_wise))


@streams("nuslerp")
def nuslerp_streamed(stack: Stack, weights: Tensor, *, flatten: bool = True, row_wise: bool = False) -> Blockwise:
    w = finite(weights)
    if stack.k == 1:
        return Combination((1.0,))
    if stack.k != 2:
        raise ValueError(f"branches: nuslerp takes two, got {stack.k}. Use multislerp or karcher for more")
    t = 0.5 if abs(math.fsum(w)) < NUSLERP_SUM else w[1] / math.fsum(w)
    if not flatten:
        return VectorArcs(t, 0 if row_wise else -1)
    g = gram(stack, offset=stack.has_base)
    first, second = _arc(g[0, 0], g[1, 1], g[0, 1], t)
    return Combination((float(first), float(second)), anchored=stack.has_base)


@dataclass(frozen=True)
class VectorArcs:
    """nuslerp of many vectors at once, along dimension `dim` (0 or -1) of a block of whole vectors."""

    t: float
    dim: int

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        v = block.branches if block.base is None else block.branches - block.base
        if v.ndim == 1:  # a tensor of no dimension is a vector of one entry
            v = v[:, None]
        first, second = v[0], v[1]
        c1, c2 = _arc(dots(first, first, self.dim), dots(second, second, self.dim), dots(first, second, self.dim), self.t)
        out = (first * c1.float()).add_(second * c2.float()).reshape(block.branches.shape[1:])
        return out if block.base is None else out.add_(block.base)


def dots(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"], dim: int) -> Float[Tensor, "*n"]:
    """Inner products along `dim`, which is kept with length 1; products in float32, sums in float64."""
    return (a * b).sum(dim, keepdim=True, dtype=torch.float64)


def _arc(aa: Tensor, bb: Tensor, ab: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """nuslerp's two coefficients from inner products, float64."""
    cosine = ab / (aa.clamp(min=0).sqrt().clamp(min=NUSLERP_NORM) * bb.clamp(min=0).sqrt().clamp(min=NUSLERP_NORM))
    straight = cosine.abs() > COLINEAR
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    first, second = torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)
    return torch.where(straight, 1 - t, first), torch.where(straight, t, second)


@merge_method("multislerp", needs_base=False, reference="MergeKit, multislerp (no paper)")
def multislerp(
    branches: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    base: Float[Tensor, " *shape"] | None = None,
    *,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, " *shape"]:
    r"""The mean direction of the branches with their mean length, as seen from the base where one is given.

    u_i = v_i / (||v_i|| + \epsilon),   m = \sum_i w_i u_i,   \theta = (\sum_i w_i ||v_i||) \, m / ||m||  (+ x_0)

    One branch is returned as it is. Where all v_i are shorter than epsilon, so that none has a direction, the result is
    the base (or zero). Two branches whose directions cancel give \sum_i w_i v_i.

    Args:
        branches: x_i.
        weights: w_i, finite.
        base: x_0, or None for v_i = x_i.
        normalize: divide the weights by their sum.
        eps: epsilon >= 0.
    Raises:
        ValueError: more than two branches whose directions cancel; weights that sum to nothing under `normalize`.
    Example:
        >>> multislerp(torch.tensor([[1., 0.], [0., 2.]]), torch.ones(2))
        tensor([1.0607, 1.0607])

    Differs from the reference: MergeKit then steps along the mean of the branches' tangents at m; that mean is
    \sum_i w_i (u_i - (u_i \cdot m) m) = 0 for this m, so the step is rounding noise and is left out. Branches that equal
    the base are no error. Directions count as cancelled from ||m||^2 <= 1e-6 \sum_i w_i^2 on, where MergeKit asks
    ||m|| < epsilon of a float32 sum.
    """
    stack = WholeStack(branches, base)
    return stack.apply(multislerp_streamed(stack, weights, normalize=normalize, eps=eps))


@streams("multislerp")
def multislerp_streamed(stack: Stack, weights: Tensor, *, normalize: bool = True, eps: float = 1e-8) -> Combination:
    w, anchored = finite(weights), stack.has_base
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, wanted a number >= 0")
    if stack.k == 1:
        return Combination((1.0,))
    if normalize:
        total = math.fsum(w)
        if abs(total) <= NO_SUM * math.fsum(map(abs, w)):
            raise ValueError(f"weights: got {w}, which sum to {total:.6g}, so there is no mean direction. "
                             "Set normalize to false")
        w = [v / total for v in w]
    g = gram(stack, offset=anchored).tolist()
    norms = [math.sqrt(max(g[i][i], 0.0)) for i in range(stack.k)]
    if max(norms) <= eps:
        return Combination((0.0,) * stack.k, anchored=anchored)
    units = [v / (n + eps) if n > 0 else 0.0 for v, n in zip(w, norms, strict=True)]
    length = _quadratic(g, units)
    if length <= max(eps**2, CANCELLED * math.fsum((u * n) ** 2 for u, n in zip(units, norms, strict=True))):
        if stack.k == 2:
            return Combination(tuple(w), anchored=anchored)
        given = ", ".join(f"{v:.4g}" for v in w)
        raise ValueError(f"the directions in which the {stack.k} models point cancel under their weights here ({given}), so "
                         "there is no mean direction. Give this tensor other weights (in a config: a `weight` with a `filter` "
                         "that is a piece of its name), or merge by linear or karcher, which need no such direction")
    mean = math.fsum(v * n for v, n in zip(w, norms, strict=True)) / math.sqrt(length)
    return Combination(tuple(mean * u for u in units), anchored=anchored)


@merge_method("karcher", needs_base=False, reference="arXiv:2603.04972; Karcher 1977, doi:10.1002/cpa.3160300502")
def karcher(
    branches: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Float[Tensor, " *shape"]:
    r"""The mean of the branches' directions on the sphere, with their mean length.

    \theta = (\sum_i w_i ||x_i||) u,   u = argmin \sum_i b_i \Omega(u, u_i)^2,   u_i = x_i / ||x_i||

    Found by  u <- \cos||T|| u + \sin||T|| T / ||T||,  T = \sum_i b_i (\Omega_i / \sin \Omega_i)(u_i - \cos \Omega_i u),
    from the normalised mean of the u_i, or the first of them where they cancel. Branches of norm <= tol have no
    direction and only shorten the result; b are the other weights, brought to sum one.

    Args:
        branches: x_i; MergeKit's base, if it has one, is one of them.
        weights: w_i >= 0; 1/k each in MergeKit.
        max_iter: the most steps, >= 0.
        tol: > 0; ends the steps when ||T|| is below it.
    Raises:
        ValueError: a weight is negative or not finite, or all are 0; max_iter < 0; tol is not > 0.
    Example:
        >>> karcher(torch.tensor([[1., 0.], [0., 2.]]), torch.tensor([0.5, 0.5]))
        tensor([1.0607, 1.0607])

    Differs from the reference: has weights, taken relative to their sum. A branch at the antipode of u (cosine below
    -1 + 1e-6) has no direction to it and does not pull.
    """
    stack = WholeStack(branches)
    return stack.apply(karcher_streamed(stack, weights, max_iter=max_iter, tol=tol))


@streams("karcher")
def karcher_streamed(stack: Stack, weights: Tensor, *, max_iter: int = 10, tol: float = 1e-5) -> Combination:
    w = finite(weights)
    if min(w) < 0 or max(w) <= 0:
        raise ValueError(f"weights: got {w}, wanted numbers >= 0 that are not all 0")
    if max_iter < 0 or not tol > 0:
        raise ValueError(f"max_iter and tol: got {max_iter} and {tol}, wanted max_iter >= 0 and tol > 0")
    if stack.k == 1:
        return Combination((1.0,))
    g = gram(stack, offset=False).tolist()
    norms = [math.sqrt(max(g[i][i], 0.0)) for i in range(stack.k)]
    kept = [i for i in range(stack.k) if norms[i] > tol and w[i] > 0]
    if not kept:
        return Combination((0.0,) * stack.k)
    shares = [w[i] / math.fsum(w[j] for j in kept) for i in kept]
    cosines = [[g[i][j] / (norms[i] * norms[j]) for j in kept] for i in kept]
    direction = _karcher_mean(cosines, shares, max_iter, tol)
    length = math.fsum(v * n for v, n in zip(w, norms, strict=True)) / math.fsum(w)
    coefficients = [0.0] * stack.k
    for i, u in zip(kept, direction, strict=True):
        coefficients[i] = length * u / norms[i]
    return Combination(tuple(coefficients))


def _karcher_mean(cosines: Sequence[Sequence[float]], shares: Sequence[float], max_iter: int, tol: float) -> list[float]:
    """The mean of n unit vectors as a combination of them, from the cosines between them."""
    u, n = list(shares), range(len(shares))
    norm = math.sqrt(max(_quadratic(cosines, u), 0.0))
    u = [1.0 if i == 0 else 0.0 for i in n] if norm < tol else [c / norm for c in u]
    for _ in range(max_iter):
        to_u = [min(1.0, max(-1.0, math.fsum(cosines[i][j] * u[j] for j in n))) for i in n]
        pull = [b * _stretch(c, tol) for b, c in zip(shares, to_u, strict=True)]
        along = math.fsum(p * c for p, c in zip(pull, to_u, strict=True))
        tangent = [p - along * c for p, c in zip(pull, u, strict=True)]
        size = math.sqrt(max(_quadratic(cosines, tangent), 0.0))
        if size < tol:
            break
        u = [math.cos(size) * c + math.sin(size) / size * s for c, s in zip(u, tangent, strict=True)]
        norm = math.sqrt(max(_quadratic(cosines, u), 0.0))
        u = [c / norm for c in u] if norm > tol else u
    return u


def _stretch(cosine: float, tol: float) -> float:
    """Omega / sin(Omega); 0 for a point that is at hand already, or opposite."""
    angle = math.acos(cosine)
    return 0.0 if angle < tol or cosine < ANTIPODE else angle / math.sin(angle)


def _quadratic(g: Sequence[Sequence[float]], c: Sequence[float]) -> float:
    """c^T G c."""
    return math.fsum(c[i] * g[i][j] * c[j] for i in range(len(c)) for j in range(len(c)))
