"""Noise on the weights: how fast does the loss rise? Pure.

Isotropic: every entry gets sigma x N(0, 1) (arXiv 2606.01717, merge-readiness). Filter-normalised: the noise of each row is
scaled to sigma x the norm of that row, so that models of other scales can be compared; vectors (norms, biases) are left
alone (arXiv:1712.09913, sec. 4). A row runs along the last dimension: one neuron's weights in a Linear's [out, in] and in
fused experts' [E, out, in]. Where we differ: a convolution's filter [in, height, width] counts as several rows, and layers
that are stored as [in, out] (GPT-2's Conv1D, some fused experts) keep their filters in columns: there a row is what one
input feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import t as student

from anabranch.rows import generator

if TYPE_CHECKING:
    from torch import Tensor

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
    import torch  # here: the report judges by `paired_difference` and has no need of it

    stream = generator(seed, "perturbation", name, draw)
    found = torch.from_numpy(stream.standard_normal(like.numel(), dtype=np.float32)).reshape(like.shape)
    if kind == "isotropic":
        return found
    if like.ndim < 2:
        return torch.zeros_like(found)
    return found * (like.float().norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True).clamp_min(1e-30))


def area(sigmas: Floats, increases: Floats) -> Area:
    """Area under the curve of loss increases [draws, sigmas] by trapezoids, with (0, 0) as the first point."""
    x = np.concatenate([[0.0], sigmas])
    areas = np.trapezoid(np.concatenate([np.zeros((len(increases), 1)), increases], axis=1), x, axis=1)
    error = float(areas.std(ddof=1) / np.sqrt(len(areas))) if len(areas) > 1 else 0.0
    return Area(float(areas.mean()), error)


def paired_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]],
                      sigmas: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean area under `first` minus that under `second`, and its 95 % interval: (mean, low, high).

    Paired: draw i is the same noise in both, so what it does to both alike cancels. Student's t with draws - 1 degrees of
    freedom; below zero throughout, `first` is the flatter. None for fewer than two draws: nothing tells chance from them.

    Args:
        first, second: loss increases, [draws, S]. sigmas: [S], ascending.
    Raises:
        ValueError: not the same draws and sigmas in both.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"increases of shapes {a.shape} and {b.shape}; wanted the same draws and sigmas of both")
    draws = len(a)
    if draws < 2:
        return None
    mean, error = area(np.asarray(sigmas, dtype=np.float64), a - b)
    reach = float(student.ppf(0.975, draws - 1)) * error
    return mean, mean - reach, mean + reach
