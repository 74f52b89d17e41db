"""Loss along the straight line between two models: is there a barrier? Pure.

    P  points along the line, a_0 = 0 .. a_{P-1} = 1          B  blocks of rows

Linear mode connectivity: arXiv:1912.05671; the barrier as in MERIT, arXiv 2606.01717 (merge-readiness).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.rows import generator

Floats = NDArray[np.float64]
RESAMPLES = 4000


class Barrier(NamedTuple):
    """`height` = max_a [L(a) - ((1-a) L(0) + a L(1))] >= 0 (the ends give 0); `low`, `high`: of the gap at that a."""

    height: float
    at: float
    low: float
    high: float


def curve(sums: Floats, tokens: Floats) -> Floats:
    """Mean loss per token at every point, [P], from summed losses [P, B] and token counts [B]."""
    loss: Floats = sums.sum(axis=1) / tokens.sum()
    return loss


def barrier(alphas: Floats, sums: Floats, tokens: Floats, *, name: str, tests: int = 1) -> Barrier:
    """The barrier of a curve and its 95 % bootstrap interval over blocks of rows.

    Args:
        alphas: [P], ascending, from 0 to 1.
        sums: [P, B], summed nats of each block at each point. tokens: [B].
        name: of the segment; names the random stream.
        tests: how many segments are looked at together: the intervals of all of them hold at once in 95 % (Bonferroni).

    The interval is of the gap at the one point that the full data chose: so it can lie below zero, which the height
    cannot, and it does not grow with the number of points. With one block there is nothing to resample: low = high.
    """
    gaps = _gaps(alphas, curve(sums, tokens))
    best = int(np.argmax(gaps))
    ends = sums[[0, -1, best]]
    picks = generator(0, "barrier", name).integers(0, sums.shape[1], (RESAMPLES, sums.shape[1]))
    drawn = ends[:, picks].sum(axis=2) / tokens[picks].sum(axis=1)
    a = alphas[best]
    low, high = np.quantile(drawn[2] - ((1 - a) * drawn[0] + a * drawn[1]), [0.025 / tests, 1 - 0.025 / tests])
    return Barrier(float(gaps[best]), float(a), float(low), float(high))


def _gaps(alphas: Floats, losses: Floats) -> Floats:
    gaps: Floats = losses - ((1 - alphas) * losses[0] + alphas * losses[-1])
    gaps[[0, -1]] = 0.0  # so they are but for rounding
    return gaps


def paired_gap(sums: Floats, others: Floats, tokens: Floats, *, name: str) -> tuple[float, float, float]:
    """Mean loss of one model minus another's on the same blocks, all [B]: (gap, low, high), 95 % bootstrap over blocks."""
    low, high = mean_interval(sums - others, tokens, name=name)
    return float((sums - others).sum() / tokens.sum()), low, high


def mean_interval(sums: Floats, tokens: Floats, *, name: str) -> tuple[float, float]:
    """95 % bootstrap interval of a mean loss over blocks, from [B] and [B]."""
    picks = generator(0, "mean", name).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.quantile(sums[picks].sum(axis=1) / tokens[picks].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)
