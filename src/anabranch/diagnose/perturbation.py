"""Noise on the weights: how fast does the loss rise? Pure.

Isotropic: every entry gets sigma x N(0, 1) (arXiv 2606.01717, merge-readiness). Filter-normalised: the noise of each row of
a matrix is scaled to sigma x the norm of that row, so that models of other scales can be compared; vectors (norms,
biases) are left alone (arXiv:1712.09913, sec. 4, where a filter is a row of the weight matrix).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from anabranch.rows import generator

Floats = NDArray[np.float64]
Noise = Literal["isotropic", "filter"]


class Area(NamedTuple):
    """Under the mean curve from sigma = 0 (no increase) to the largest sigma; `error`: standard error over draws."""

    mean: float
    error: float


def noise_for(kind: Noise, name: str, like: Float[Tensor, " *shape"], draw: int, seed: int) -> Float[Tensor, " *shape"]:
    """A perturbation of sigma = 1 for one parameter, float32 on the CPU; the same for every model but for the row norms.

    Args:
        like: the parameter's own values: filter normalisation takes the norms of its rows.
    """
    stream = generator(seed, "perturbation", name, draw)
    found = torch.from_numpy(stream.standard_normal(like.numel(), dtype=np.float32)).reshape(like.shape)
    if kind == "isotropic":
        return found
    if like.ndim < 2:
        return torch.zeros_like(found)
    flat, own = found.reshape(like.shape[0], -1), like.reshape(like.shape[0], -1).float()
    flat *= own.norm(dim=1, keepdim=True) / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return flat.reshape(like.shape)


def area(sigmas: Floats, increases: Floats) -> Area:
    """Area under the curve of loss increases [draws, sigmas] by trapezoids, with (0, 0) as the first point."""
    x = np.concatenate([[0.0], sigmas])
    areas = np.trapezoid(np.concatenate([np.zeros((len(increases), 1)), increases], axis=1), x, axis=1)
    error = float(areas.std(ddof=1) / np.sqrt(len(areas))) if len(areas) > 1 else 0.0
    return Area(float(areas.mean()), error)
