"""How far a tensor moved."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Numbers worked on at a time: the two float64 temporaries stay in the cache.
BLOCK = 1 << 16


def squared_distance(moved: Float[Tensor, " *shape"], base: Float[Tensor, " *shape"]) -> float:
    """||moved - base||^2 over all entries, differences and sum in float64.

    Blocks are added in order and each by numpy's pairwise sum, which uses one thread: the number does not depend on
    how many threads the machine has.
    """
    left, right = moved.detach().reshape(-1).to(torch.float32), base.detach().reshape(-1).to(torch.float32)
    a, b = left.numpy(), right.numpy()
    total = 0.0
    for start in range(0, a.size, BLOCK):
        difference = a[start : start + BLOCK].astype(np.float64)
        difference -= b[start : start + BLOCK]
        total += float(np.sum(np.square(difference, out=difference)))
    return total
