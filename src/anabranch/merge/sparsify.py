"""Which entries of a task vector survive, and by what the survivors are scaled.

    k   branches          N   entries of a tensor          d_i = x_i - x_0, task vector
    rho_i   density, the share of entries that is kept     p   probability that an entry is kept
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from anabranch.merge import PerBranch, one_each
from anabranch.merge.consensus import Consensus, divisor_of
from anabranch.merge.select import Cut, largest, magnitudes
from anabranch.merge.stack import CHUNK, Block, Stack, Total

# Below it a sum of magnitudes counts as none, and nothing is scaled by it.
SMALLEST_NORM = 1e-7


def densities(density: PerBranch, stack: Stack) -> list[float]:
    """rho_i; 1 for a tensor of no dimension, since its only entry is not to be pruned. Raises ValueError: rho_i < 0."""
    each = one_each(density, stack.k)
    if any(not math.isfinite(rho) or rho < 0 for rho in each):
        raise ValueError(f"density: got {each}, wanted finite numbers >= 0 (the share of entries that is kept)")
    return [1.0 if stack.shape == () and rho > 0 else rho for rho in each]


def kept_count(density: float, n: int) -> int:
    """How many of n entries a density keeps: the product truncated, as a whole number, but at least 1 where rho > 0."""
    if density >= 1:
        return n
    return max(1, int(density * n)) if density > 0 else 0


def largest_cuts(stack: Stack, rho: Sequence[float]) -> tuple[Cut, ...] | None:
    """The cut of each branch that keeps its share of the largest |d_i|; None where all are kept."""
    if all(r >= 1 for r in rho):
        return None
    counts = [[kept_count(r, stack.numel)] for r in rho]
    return tuple(cuts[0] for cuts in largest(stack, magnitudes, counts))


def band_cuts(stack: Stack, rho: Sequence[float], gamma: Sequence[float]) -> tuple[tuple[Cut, ...], tuple[Cut, ...]] | None:
    """(cuts, ceilings) of each branch: its largest |d_i| go, a share gamma, and what follows them stays, a share rho.

    Where the two shares do not fit, fewer of the largest go. With rho >= 1 nothing goes.
    """
    if all(r >= 1 for r in rho):
        return None
    counts = []
    for r, g in zip(rho, gamma, strict=True):
        target = kept_count(r, stack.numel)
        top = min(int(g * stack.numel), stack.numel - target) if r < 1 else 0
        counts.append([top + target if target else 0, top])
    found = largest(stack, magnitudes, counts)
    return tuple(cuts[0] for cuts in found), tuple(cuts[1] for cuts in found)


def cut_at(magnitude: float) -> Cut:
    """Keeps all entries that are at least as large as `magnitude`."""
    below = torch.nextafter(torch.tensor(magnitude, dtype=torch.float32), torch.tensor(-math.inf))
    return Cut(float(below))


Kept = Callable[[Block, int], Tensor]


class RunningTotal(Total):
    """A `Total` whose blocks may end anywhere: it waits for whole chunks, so that cuts do not change the sum."""

    def __init__(self) -> None:
        super().__init__()
        self._left: Tensor | None = None

    def add(self, x: Float[Tensor, "k n"]) -> None:
        x = x if self._left is None else torch.cat([self._left, x], dim=-1)
        whole = x.shape[-1] // CHUNK * CHUNK
        if whole:
            super().add(x[..., :whole])
        self._left = x[..., whole:].clone()

    def finish(self) -> Tensor:
        if self._left is not None and (self._left.shape[-1] or isinstance(self.value, float)):
            super().add(self._left)
        return self.value


def l1_factors(stack: Stack, kept: Kept) -> tuple[float, ...]:
    """sum|d_i| / sum|kept d_i| of each branch, so that its L1 norm survives; 1 where either sum is below 1e-7."""
    if stack.numel == 0:
        return (1.0,) * stack.k
    total = RunningTotal()
    for block in stack:
        size = magnitudes(block)
        survivors = torch.stack([s.masked_fill(~kept(block, i), 0.0) for i, s in enumerate(size)])
        total.add(torch.cat([size, survivors]).flatten(1))
    sums = total.finish().tolist()
    return factors_of(sums[: stack.k], sums[stack.k :])


def factors_of(before: Sequence[float], after: Sequence[float]) -> tuple[float, ...]:
    """What brings a sum of magnitudes back to what it was before entries were dropped; 1 where either is below 1e-7."""
    return tuple(b / a if min(a, b) >= SMALLEST_NORM else 1.0 for a, b in zip(after, before, strict=True))


@dataclass(frozen=True)
class Dropped:
    """Task vectors with entries dropped at random, the survivors scaled, then merged by `then`.

    An entry of branch i is kept where its draw is below its probability: `densities[i]`, or with `half_width` one that
    grows with the rank of the entry's magnitude in its row. `each` scales every survivor by 1 / its own probability.
    `survivors` [k, bytes]: a bit for each entry, where it is known already which are kept.
    """

    densities: tuple[float, ...]
    factors: tuple[float, ...]
    then: Consensus
    half_width: tuple[float, ...] | None = None
    each: bool = False
    columns: int = 1
    survivors: np.ndarray | None = None

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        assert block.base is not None
        deltas = []
        for i, (branch, factor) in enumerate(zip(block.branches, self.factors, strict=True)):
            delta = branch - block.base
            kept, p = self._kept(block, i, delta)
            delta.masked_fill_(~kept, 0.0)
            if self.each and self.densities[i] < 1:
                delta = delta / p.masked_fill(~kept, 1.0) if isinstance(p, Tensor) else delta.mul_(1.0 / (p or 1.0))
            deltas.append(delta if factor == 1 else delta.mul_(factor))
        return self.then.merged(deltas, block.base)

    @property
    def fused_by_keys(self) -> Callable[..., bool] | None:
        """The same on numbers as they are stored (see kernels): (start, x, base, out, keys of the draws) -> all finite."""
        return self._fused if self.half_width is None else self._fused_ranks

    def _fused_ranks(self, start: int, x: np.ndarray, base: np.ndarray, out: np.ndarray, keys: np.ndarray) -> bool:
        from anabranch.merge import rank_kernels

        merge = self.then
        every = np.array([self.each and 0 < rho < 1 for rho in self.densities])
        scale = merge.scale if merge.consensus or not merge.normalize else merge.scale / divisor_of(merge.weights)
        rest = (np.array(self.factors, np.float32), np.array(merge.weights, np.float32), merge.consensus, merge.normalize,
                np.float32(scale), start, out)
        if self.survivors is not None:
            return rank_kernels.consent_kept(x, base, self.survivors, *rest)
        return rank_kernels.consent_ranked(x, base, keys, self.chances(), every, *rest)

    def chances(self) -> np.ndarray:
        """[k, columns] float32: the chance to be kept of every rank in a row, ascending."""
        assert self.half_width is not None
        return np.stack([
            chances_by_rank(self.columns, rho, e).numpy() if 0 < rho < 1 else np.full(self.columns, rho, np.float32)
            for rho, e in zip(self.densities, self.half_width, strict=True)])

    def _fused(self, start: int, x: np.ndarray, base: np.ndarray, out: np.ndarray, keys: np.ndarray) -> bool:
        from anabranch.merge import kernels

        merge = self.then
        factors = [1.0 / rho if self.each and 0 < rho < 1 else f for rho, f in zip(self.densities, self.factors, strict=True)]
        scale = merge.scale if merge.consensus or not merge.normalize else merge.scale / divisor_of(merge.weights)
        return kernels.consent_drawn(
            x, base, keys, np.array(self.densities, np.float32), np.array(factors, np.float32),
            np.array(merge.weights, np.float32), merge.consensus, merge.normalize, np.float32(scale), start, out)

    def kept(self, block: Block, i: int) -> Bool[Tensor, "*n"]:
        assert block.base is not None
        return self._kept(block, i, block.branches[i] - block.base)[0]

    def _kept(self, block: Block, i: int, delta: Tensor) -> tuple[Tensor, Tensor | float]:
        assert block.draws is not None
        rho = self.densities[i]
        p: Tensor | float = rho
        if self.half_width is not None and 0 < rho < 1:
            p = rank_probabilities(delta.reshape(-1, self.columns), rho, self.half_width[i]).reshape(delta.shape)
        return block.draws[i] < p, p


def chances_by_rank(n: int, density: float, half_width: float) -> Float[Tensor, " n"]:
    """density -+ half_width in n equal steps, float32; of one entry the density itself."""
    if n < 2:
        return torch.full((n,), density)
    return torch.arange(n, dtype=torch.float32).mul_(2 * half_width / (n - 1)).add_(density - half_width)


def rank_probabilities(delta: Float[Tensor, "rows n"], density: float, half_width: float) -> Float[Tensor, "rows n"]:
    """Chance of each entry to be kept, linear in the rank of |d| in its row: density -+ half_width, the largest most.

    Of equal magnitudes the one that stands first ranks higher. A row of one entry has the density itself.
    """
    # Ascending and stable on the reversed row: of equal entries the first of the row comes last, with the higher rank.
    order = delta.abs().flip(-1).argsort(dim=-1, stable=True)
    steps = chances_by_rank(delta.shape[-1], density, half_width).to(delta.device)
    return torch.empty_like(delta).scatter_(-1, order, steps.expand_as(delta)).flip(-1)
