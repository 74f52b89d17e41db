"""Which branches agree on the direction of an entry, and the merge of those that do.

    k   branches          n   entries of a block
    d_i = x_i - x_0   task vector, perhaps with entries dropped and survivors scaled          D_i = w_i d_i
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from anabranch.merge.select import Cut, above
from anabranch.merge.stack import Block

# Below it a sum of weights counts as none, and nothing is divided by it.
SMALLEST_DIVISOR = 1e-8


def agreeing(steps: Float[Tensor, " k *n"]) -> Bool[Tensor, " k *n"]:
    """Which branches step in the elected direction of each entry: the sign of the sum of all steps, + where it is 0.

    A branch that does not move an entry never agrees. The sum is formed in float32 in the order of the branches.
    """
    up = summed(steps) >= 0
    return torch.stack([((step > 0) & up) | ((step < 0) & ~up) for step in steps])


def summed(steps: Float[Tensor, " k *n"]) -> Float[Tensor, "*n"]:
    """The sum of all steps, in float32 in the order of the branches."""
    total = steps[0].clone()
    for step in steps[1:]:
        total += step
    return total


@dataclass(frozen=True)
class Consensus:
    r"""x_0 + scale * M / V: the task vectors cut, scaled, weighted, and merged with or without an election of signs.

    The order of operations, which a faster kernel must keep to agree bit for bit (all in float32, each product, sum and
    quotient rounded by itself, no fused multiply-add; terms in the order of the branches):

        d_i = x_i - x_0
        d_i = 0 where `cuts[i]` does not keep |d_i|, or `ceilings[i]` does (see select.above); what is not finite stays
        d_i = d_i * factors[i], if that is not 1
        D_i = d_i * weights[i]
        consensus:   S = D_1 + D_2 + ..;  m_i = D_i > 0 where S >= 0, D_i < 0 elsewhere
                     M = S * 0 + (D_1 where m_1, else 0) + ..      (S * 0: a NaN or an infinity is not outvoted)
                     normalize:  V = 0 + (weights[1] where m_1, else 0) + ..;  M = M / (V, or 1 where V == 0)
                     M = M * scale, if that is not 1
        otherwise:   M = D_1 + D_2 + ..;  M = M * float32(scale / V), if that is not 1, where V is 1 unless normalize:
                     then the float64 sum of weights, or 1 where that is below 1e-8 in magnitude
        the result is x_0 + M
    """

    cuts: tuple[Cut, ...] | None
    factors: tuple[float, ...]
    weights: tuple[float, ...]
    consensus: bool
    normalize: bool
    scale: float
    ceilings: tuple[Cut, ...] | None = None

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        assert block.base is not None
        deltas = []
        for i, (branch, factor) in enumerate(zip(block.branches, self.factors, strict=True)):
            delta = branch - block.base
            if self.cuts is not None:
                delta.masked_fill_(~self._kept(delta, i, block.start), 0.0)
            deltas.append(delta if factor == 1 else delta.mul_(factor))
        return self.merged(deltas, block.base)

    def fused(self, start: int, x: np.ndarray, base: np.ndarray, out: np.ndarray) -> bool:
        """The same on numbers as they are stored (see kernels), rounded into `out`; False where one is not finite."""
        from anabranch.merge import kernels

        k = len(self.weights)
        cuts = self.cuts or (Cut(-math.inf),) * k
        ceilings = self.ceilings or (Cut(math.inf),) * k
        scale = self.scale if self.consensus or not self.normalize else self.scale / divisor_of(self.weights)
        return kernels.consent(
            x, base, *_columns(cuts), *_columns(ceilings), np.array(self.factors, np.float32),
            np.array(self.weights, np.float32), self.consensus, self.normalize, np.float32(scale), start, out)

    def kept(self, block: Block, i: int) -> Bool[Tensor, "*n"]:
        """The entries of branch i that its cut and its ceiling leave."""
        assert block.base is not None
        return self._kept(block.branches[i] - block.base, i, block.start)

    def _kept(self, delta: Tensor, i: int, start: int) -> Tensor:
        assert self.cuts is not None
        size = delta.abs()
        kept = above(size, self.cuts[i], start)
        if self.ceilings is not None:
            kept &= ~above(size, self.ceilings[i], start)
        return kept.logical_or_(~size.isfinite())

    def merged(self, deltas: Sequence[Float[Tensor, "*n"]], base: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The steps from D_i on, for task vectors that are cut already. `deltas` are overwritten."""
        weighted = torch.stack([delta.mul_(w) for delta, w in zip(deltas, self.weights, strict=True)])
        return (self._elected(weighted) if self.consensus else self._summed(weighted)).add_(base)

    def _elected(self, weighted: Tensor) -> Tensor:
        agree = agreeing(weighted)
        total, divisor = summed(weighted).mul_(0.0), torch.zeros_like(weighted[0])
        for step, mask, w in zip(weighted, agree, self.weights, strict=True):
            total += step.masked_fill_(~mask, 0.0)
            divisor += mask * w
        if self.normalize:
            total /= divisor.masked_fill_(divisor == 0, 1.0)
        return total if self.scale == 1 else total.mul_(self.scale)

    def _summed(self, weighted: Tensor) -> Tensor:
        total = weighted[0]
        for step in weighted[1:]:
            total += step
        multiplier = self.scale / divisor_of(self.weights) if self.normalize else self.scale
        return total if multiplier == 1 else total.mul_(multiplier)


def _columns(cuts: Sequence[Cut]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([cut.value for cut in cuts], np.float32), np.array([cut.last for cut in cuts], np.int64)


def divisor_of(weights: Sequence[float]) -> float:
    """Their sum, or 1 where it is below 1e-8 in magnitude."""
    total = math.fsum(weights)
    return 1.0 if abs(total) < SMALLEST_DIVISOR else total
