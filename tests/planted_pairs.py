"""Tables of pairs whose law is known: log(CEILING - kept) is linear in both gaps and in a metric, plus effects of the tasks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from anabranch.mergeability.table import Table

CEILING = 1.05
# What one unit more of each does to log(CEILING - kept): more gap or more distance, more is lost.
SLOPES = {"own": 2.0, "partner": 0.8, "distance": 1.2}
NO_SLOPES = dict.fromkeys(SLOPES, 0.0)


def task_effects(tasks: int, method: str = "ties", seed: int = 0) -> np.ndarray:
    """[2, tasks] of standard deviation 1: a_i, what task i suffers, and b_j, what task j does to others."""
    return np.random.default_rng([seed, zlib.crc32(method.encode())]).standard_normal((2, tasks))


def planted(tasks: int = 12, *, seed: int = 0, noise: float = 0.05, effects: float = 0.2, methods: Sequence[str] = ("ties",),
            slopes: Mapping[str, float] = SLOPES, middle: float = -3.6, distance: str = "distance") -> Table:
    """Every pair of `tasks` tasks; metrics `distance` (which matters, uniform in [0, 1]) and `noise1`, `noise2` (which do not).

    effects: standard deviation of a_i and b_j.
    """
    rng = np.random.default_rng(seed)
    single, gap = rng.uniform(0.6, 0.9, tasks), rng.uniform(0.05, 0.7, tasks)
    one, two = np.triu_indices(tasks, 1)
    far = rng.uniform(0, 1, len(one))
    aside = rng.standard_normal(tasks)
    own, partner = np.stack([one, two], axis=1), np.stack([two, one], axis=1)
    outcomes = {}
    for method in methods:
        suffers, harms = effects * task_effects(tasks, method, seed)
        f = (middle + slopes["own"] * gap[own] + slopes["partner"] * gap[partner] + slopes["distance"] * far[:, None]
             + suffers[own] + harms[partner] + noise * rng.standard_normal(own.shape))
        outcomes[method] = (CEILING - np.exp(f)) * single[own]
    return Table([f"task{i:02}" for i in range(tasks)], one, two, {distance: far, "noise1": aside[one], "noise2": aside[two]},
                 single[own], ((1 - gap) * single)[own], outcomes)


def swapped(table: Table, rows: np.ndarray) -> Table:
    """The same pairs, with task1 and task2 exchanged, and all that belongs to them, in `rows` (a mask)."""
    def sides(values: np.ndarray) -> np.ndarray:
        return np.where(rows[:, None], values[:, ::-1], values)
    noise = sides(np.stack([table.metrics["noise1"], table.metrics["noise2"]], axis=1))
    pairs = sides(np.stack([table.first, table.second], axis=1))
    return replace(table, first=pairs[:, 0], second=pairs[:, 1], single=sides(table.single), base=sides(table.base),
                   metrics={**table.metrics, "noise1": noise[:, 0], "noise2": noise[:, 1]},
                   outcomes={m: sides(scores) for m, scores in table.outcomes.items()})


def renamed(table: Table, tasks: Sequence[str]) -> Table:
    """The same pairs of tasks called otherwise, as a predictor meets them that never saw these tasks."""
    return replace(table, tasks=list(tasks))
