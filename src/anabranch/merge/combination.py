"""A merge that is one sum: the same few coefficients for every entry of a tensor.

    x_i   branches          x_0   base          c   float32 numbers, rounded once from the float64 they were found in
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anabranch.merge.stack import Block


@dataclass(frozen=True)
class Combination:
    r"""\sum_i c_i x_i + c_0 x_0;   where `anchored`:  x_0 + \sum_i c_i (x_i - x_0), and c_0 is not used.

    The order of operations, which a faster kernel must keep to agree bit for bit (all in float32, each product and each
    sum rounded by itself, no fused multiply-add):

        anchored:      s = c_1 (x_1 - x_0);  s = s + c_2 (x_2 - x_0);  ..;  the result is x_0 + s
        not anchored:  s = c_1 x_1;  s = s + c_2 x_2;  ..;  s = s + c_0 x_0

    Terms whose coefficient is 0 are left out, so that such an input has no say whatever it holds; s begins with the
    first that is left. With none left the result is the base (anchored) or zero.
    """

    coefficients: tuple[float, ...]
    base_coefficient: float = 0.0
    anchored: bool = False

    def __post_init__(self) -> None:
        rounded = torch.tensor([*self.coefficients, self.base_coefficient], dtype=torch.float32).tolist()
        object.__setattr__(self, "coefficients", tuple(rounded[:-1]))
        object.__setattr__(self, "base_coefficient", rounded[-1])

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        return self._anchored(block) if self.anchored else self._plain(block)

    def fused(self, start: int, x: np.ndarray, base: np.ndarray, out: np.ndarray) -> bool:
        """The same on numbers as they are stored (see kernels), rounded into `out`; False where one is not finite."""
        from anabranch.merge import kernels

        if self.anchored:
            return kernels.combine_anchored(x, base, np.array(self.coefficients, np.float32), out)
        if self.base_coefficient != 0:
            return kernels.combine_with_base(x, base, np.array(self.coefficients, np.float32),
                                             np.float32(self.base_coefficient), out)
        return kernels.combine(x, np.array(self.coefficients, np.float32), out)

    def _anchored(self, block: Block) -> Tensor:
        assert block.base is not None
        step: Tensor | None = None
        for branch, c in zip(block.branches, self.coefficients, strict=True):
            if c != 0:
                # Product and sum stay apart: a fused multiply-add is used for some elements of a vector and not for
                # its tail, and then a number's last digit would depend on where in the tensor it stands.
                term = (branch - block.base).mul_(c)
                step = term if step is None else step.add_(term)
        return block.base.clone() if step is None else step.add_(block.base)

    def _plain(self, block: Block) -> Tensor:
        total: Tensor | None = None
        for branch, c in zip(block.branches, self.coefficients, strict=True):
            if c != 0:
                total = branch * c if total is None else total.add_(branch * c)
        if self.base_coefficient != 0:
            assert block.base is not None
            term = block.base * self.base_coefficient
            total = term if total is None else total.add_(term)
        return torch.zeros_like(block.branches[0]) if total is None else total
