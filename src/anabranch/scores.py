"""What unit scores add up to: means, paired intervals, a test over seeds. Pure.

Losses are nats per response token; a difference is an arm's loss minus another's on the same unit, negative is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

from anabranch.artifacts import UnitScore
from anabranch.rows import generator

Place = Literal["held_out", "transfer", "retention"]
PLACES: tuple[Place, ...] = ("held_out", "transfer", "retention")
# A loss difference smaller than this (nats) is a tie: far below what seeds move a unit by.
TIE = 0.01
UNITS_FOR_INTERVAL = 5
RESAMPLES = 2000


def macro_loss(scores: Mapping[str, UnitScore]) -> float | None:
    """Unweighted mean of unit losses, nats; None without units."""
    return float(np.mean([s.loss for s in scores.values()])) if scores else None


def token_loss(scores: Mapping[str, UnitScore]) -> float | None:
    """Mean weighted by response tokens."""
    tokens = sum(s.tokens for s in scores.values())
    return sum(s.loss * s.tokens for s in scores.values()) / tokens if tokens else None


def mean_answer(scores: Mapping[str, UnitScore], field: Literal["exact_match", "f1"]) -> float | None:
    """Macro mean of `exact_match` or `f1` over the units that have short answers."""
    values = [getattr(s, field) for s in scores.values() if getattr(s, field) is not None]
    return float(np.mean(values)) if values else None


def paired_interval(differences: Sequence[float], name: str) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of paired per-unit differences, resampling units.

    None for fewer than UNITS_FOR_INTERVAL units: too few to resample. `name` (the place) names the random stream.
    """
    if len(differences) < UNITS_FOR_INTERVAL:
        return None
    values = np.asarray(differences)
    picks = generator(0, "bootstrap", name).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def wilcoxon_better(differences: Sequence[float]) -> float | None:
    """One-sided signed-rank p over seeds for 'lower than joint'; None for fewer than 2 seeds or no difference at all.

    With n seeds it cannot fall below 2^-n: three seeds give 0.125 at best, five 0.03125.
    """
    if len(differences) < 2 or not np.any(differences):
        return None
    return float(stats.wilcoxon(differences, alternative="less", method="exact").pvalue)
