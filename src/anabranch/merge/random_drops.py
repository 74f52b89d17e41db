"""Task vectors with entries dropped at random: DARE and DELLA. Notation of `task_vectors`.

    u_i   `draws[i]`, uniform in [0, 1), one number per entry; the methods themselves draw nothing
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch  # noqa: F401 - the examples use it
from jaxtyping import Float
from torch import Tensor

from anabranch.merge import PerBranch, merge_method, one_each, streams
from anabranch.merge.averaging import finite
from anabranch.merge.consensus import Consensus
from anabranch.merge.sparsify import Dropped, densities, factors_of, l1_factors
from anabranch.merge.stack import RUN, Stack, WholeStack

# Blocks of a tensor up to which a bit for each entry takes less memory than the float32 copies of a block, which the fused
# kernels do without.
FEW_BLOCKS = 256


@merge_method("dare_linear", needs_base=True, reference="arXiv:2311.03099, sec. 3.2, eq. (1)-(3)")
def dare_linear(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    draws: Float[Tensor, " k *shape"],
    *,
    density: PerBranch = 1.0,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: str = "inverse_density",
) -> Float[Tensor, " *shape"]:
    r"""Drop entries of the task vectors at random, scale up the rest, sum.

    s(d_i) = f_i d_i where u_i < rho_i, else 0;   f_i = 1 / rho_i (unbiased)
    \theta = x_0 + \lambda \sum_i w_i s(d_i) / V      (V the sum of weights where `normalize`, otherwise 1)

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        draws: u_i.
        density: rho_i >= 0, the chance of an entry to be kept (the paper's 1 - p); 1 or more keeps all.
        normalize: divide by the sum of the weights (1 where that is below 1e-8 in magnitude).
        scale: lambda, finite.
        rescale: 'inverse_density' as above; 'l1', f_i = ||d_i||_1 / ||kept d_i||_1 over the tensor; 'none', f_i = 1.
    Raises:
        ValueError: a weight, density or the scale is out of range; an unknown `rescale`.
    Example:
        >>> draws = torch.tensor([[0.1, 0.9, 0.4, 0.6]])
        >>> dare_linear(torch.tensor([[1., 2., 3., 4.]]), torch.zeros(4), torch.ones(1), draws, density=0.5)
        tensor([2., 0., 6., 0.])

    Differs from the reference: none with the default; MergeKit's factor is 'l1'. A tensor of no dimension is kept.
    """
    stack = WholeStack(branches, base, draws)
    return stack.apply(_dare(stack, weights, density, rescale, False, normalize, scale))


@streams("dare_linear")
def dare_linear_streamed(
    stack: Stack, weights: Tensor, *, density: PerBranch = 1.0, normalize: bool = False,
    scale: float = 1.0, rescale: str = "inverse_density",
) -> Dropped:
    return _dare(stack, weights, density, rescale, False, normalize, scale)


@merge_method("dare_ties", needs_base=True, reference="arXiv:2311.03099, sec. 3.2; arXiv:2306.01708, sec. 3")
def dare_ties(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    draws: Float[Tensor, " k *shape"],
    *,
    density: PerBranch = 1.0,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: str = "inverse_density",
) -> Float[Tensor, " *shape"]:
    r"""The task vectors of `dare_linear`, merged by an election of signs as in `ties`.

    \theta = x_0 + \lambda \sum_i w_i m_i s(d_i) / V,   V = \sum_i w_i m_i where `normalize`, otherwise 1

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        draws: u_i.
        density: rho_i >= 0, the chance of an entry to be kept.
        normalize: divide by the weights of the branches that agree.
        scale: lambda, finite.
        rescale: as for `dare_linear`.
    Raises:
        ValueError: as for `dare_linear`.
    Example:
        >>> draws = torch.tensor([[0.1, 0.9], [0.2, 0.3]])
        >>> dare_ties(torch.tensor([[3., 2.], [-1., 1.]]), torch.zeros(2), torch.ones(2), draws, density=0.5)
        tensor([6., 2.])

    Differs from the reference: the paper trims by TIES after dropping; here, as in MergeKit, dropping takes the place of
    trimming.
    """
    stack = WholeStack(branches, base, draws)
    return stack.apply(_dare(stack, weights, density, rescale, True, normalize, scale))


@streams("dare_ties")
def dare_ties_streamed(
    stack: Stack, weights: Tensor, *, density: PerBranch = 1.0, normalize: bool = False,
    scale: float = 1.0, rescale: str = "inverse_density",
) -> Dropped:
    return _dare(stack, weights, density, rescale, True, normalize, scale)


@merge_method("della", needs_base=True, block="row", reference="arXiv:2406.11617, sec. 3; arXiv:2306.01708, sec. 3")
def della(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    draws: Float[Tensor, " k *shape"],
    *,
    density: PerBranch = 1.0,
    epsilon: PerBranch = 0.15,
    normalize: bool = True,
    scale: float = 1.0,
    rescale: str = "inverse_probability",
) -> Float[Tensor, " *shape"]:
    r"""The task vectors of `della_linear`, merged by an election of signs as in `ties`.

    \theta = x_0 + \lambda \sum_i w_i m_i s(d_i) / V,   V = \sum_i w_i m_i where `normalize`, otherwise 1

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        draws: u_i.
        density: rho_i, as for `della_linear`.
        epsilon: as for `della_linear`.
        normalize: divide by the weights of the branches that agree.
        scale: lambda, finite.
        rescale: as for `della_linear`.
    Raises:
        ValueError: as for `della_linear`.
    Example:
        >>> draws = torch.tensor([[0.1, 0.5], [0.2, 0.3]])
        >>> della(torch.tensor([[3., 2.], [-1., 1.]]), torch.zeros(2), torch.ones(2), draws, density=0.5, epsilon=0.25)
        tensor([4., 0.])

    Differs from the reference: as `della_linear`; has weights.
    """
    stack = WholeStack(branches, base, draws, kind="row")
    return stack.apply(_della(stack, weights, density, epsilon, rescale, True, normalize, scale))


@streams("della")
def della_streamed(
    stack: Stack, weights: Tensor, *, density: PerBranch = 1.0, epsilon: PerBranch = 0.15,
    normalize: bool = True, scale: float = 1.0, rescale: str = "inverse_probability",
) -> Dropped:
    return _della(stack, weights, density, epsilon, rescale, True, normalize, scale)


@merge_method("della_linear", needs_base=True, block="row", reference="arXiv:2406.11617, sec. 3 (MagPrune)")
def della_linear(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    draws: Float[Tensor, " k *shape"],
    *,
    density: PerBranch = 1.0,
    epsilon: PerBranch = 0.15,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: str = "inverse_probability",
) -> Float[Tensor, " *shape"]:
    r"""Drop entries at random, small ones rather than large ones, scale up the rest, sum.

    p_{ij} = rho_i - epsilon_i + 2 epsilon_i r_{ij} / (n - 1);   s(d_{ij}) = d_{ij} / p_{ij} where u_{ij} < p_{ij}, else 0
    \theta = x_0 + \lambda \sum_i w_i s(d_i) / V      (V the sum of weights where `normalize`, otherwise 1)

    r = 0..n-1 is the rank of |d_{ij}| in its row (last dimension, n entries), ascending; of equal ones the first in the
    row ranks higher. A row of one entry has p = rho. With rho_i >= 1 nothing is dropped, with 0 everything.

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        draws: u_i.
        density: rho_i >= 0.
        epsilon: HALF of the width of the probabilities; 0 < rho - epsilon and rho + epsilon < 1 where 0 < rho < 1.
        normalize: divide by the sum of the weights (1 where that is below 1e-8 in magnitude).
        scale: lambda, finite.
        rescale: 'inverse_probability' as above; 'l1', one factor ||d_i||_1 / ||kept d_i||_1 over the tensor; 'none'.
    Raises:
        ValueError: a weight, density, epsilon or the scale is out of range; an unknown `rescale`.
    Example:
        >>> draws = torch.tensor([[0.2, 0.7]])
        >>> della_linear(torch.tensor([[1., 3.]]), torch.zeros(2), torch.ones(1), draws, density=0.5, epsilon=0.25)
        tensor([4., 4.])

    Differs from the reference: epsilon is half of the paper's, as in MergeKit, whose factor is 'l1'. MergeKit ranks
    tensors of more than two dimensions along dimension 1, this along the last, so that rows are what is stored
    together. A tensor of no dimension is kept.
    """
    stack = WholeStack(branches, base, draws, kind="row")
    return stack.apply(_della(stack, weights, density, epsilon, rescale, False, normalize, scale))


@streams("della_linear")
def della_linear_streamed(
    stack: Stack, weights: Tensor, *, density: PerBranch = 1.0, epsilon: PerBranch = 0.15,
    normalize: bool = False, scale: float = 1.0, rescale: str = "inverse_probability",
) -> Dropped:
    return _della(stack, weights, density, epsilon, rescale, False, normalize, scale)


def _dare(stack: Stack, weights: Tensor, density: PerBranch, rescale: str, consensus: bool, normalize: bool,
          scale: float) -> Dropped:
    _one_of("rescale", rescale, ("inverse_density", "l1", "none"))
    rho = densities(density, stack)
    return _scaled(stack, Dropped(tuple(rho), (1.0,) * stack.k, _merge(weights, consensus, normalize, scale)), rescale)


def _della(stack: Stack, weights: Tensor, density: PerBranch, epsilon: PerBranch, rescale: str, consensus: bool,
           normalize: bool, scale: float) -> Dropped:
    _one_of("rescale", rescale, ("inverse_probability", "l1", "none"))
    rho, half_width = densities(density, stack), one_each(epsilon, stack.k)
    for r, e in zip(rho, half_width, strict=True):
        if 0 < r < 1 and not (e >= 0 and r - e > 0 and r + e < 1):
            raise ValueError(f"density and epsilon: got {r} and {e}, wanted 0 < density - epsilon and "
                             "density + epsilon < 1, with epsilon >= 0 (the probabilities lie between the two)")
    merge = _merge(weights, consensus, normalize, scale)
    columns = max((stack.shape or (1,))[-1], 1)
    return _scaled(stack, Dropped(tuple(rho), (1.0,) * stack.k, merge, tuple(half_width), columns=columns), rescale)


def _merge(weights: Tensor, consensus: bool, normalize: bool, scale: float) -> Consensus:
    w = tuple(finite(weights))
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, wanted a finite number")
    return Consensus(None, (1.0,) * len(w), w, consensus, normalize, scale)


def _scaled(stack: Stack, dropped: Dropped, rescale: str) -> Dropped:
    if rescale == "l1" and any(rho < 1 for rho in dropped.densities):
        quick = getattr(stack, "l1_sums", None)
        if dropped.half_width is not None:
            ranked = ranked_sums(stack, dropped)
            sums, dropped = (None, dropped) if ranked is None else (ranked[:2], replace(dropped, survivors=ranked[2]))
        else:
            sums = quick(dropped.densities) if quick is not None else None
        return replace(dropped, factors=l1_factors(stack, dropped.kept) if sums is None else factors_of(*sums))
    return replace(dropped, each=rescale.startswith("inverse"))


def ranked_sums(stack: Any, dropped: Dropped) -> tuple[list[float], list[float], np.ndarray | None] | None:
    """For each branch the sum of |d_i| and that of its survivors, as `Total` adds them; and a bit for each entry, whether it
    survives, if these are few enough to be kept. None where the fused kernels cannot."""
    if not getattr(stack, "fusible", False):
        return None
    from anabranch.merge import rank_kernels

    chances = dropped.chances()
    sums, runs = np.zeros((2, stack.k)), np.zeros((2, stack.k, RUN), np.float32)
    few = stack.columns % 8 == 0 and stack.numel <= FEW_BLOCKS * stack.entries
    kept = np.empty((stack.k, stack.numel // 8 if few else 0), np.uint8)
    for start, stop in stack.ranges():
        if not rank_kernels.ranked_l1_sums(*stack.stored(start, stop), stack.draw.keys, chances, start, sums, runs, kept):
            return None
    sums += rank_kernels.ended(runs)
    return sums[0].tolist(), sums[1].tolist(), kept if few else None


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, known))}")
