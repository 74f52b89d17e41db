"""What a model is worth: losses of units and metrics of tasks, put together to objectives and one score.

    loss of a unit      mean over the response tokens of its rows, nats
    objective           losses: mean over its units (or their tokens); tasks: sum of weight x metric, higher is better
    score               sum of weight x objective, those of tasks with their sign turned: lower is better
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from anabranch.errors import RecipeError
from anabranch.model import batches, device, response_losses
from anabranch.rows import Rows, generator
from anabranch.search.settings import SearchSettings
from anabranch.search.tasks import Half, TaskScorer

RESAMPLES = 4000
FEW = 5
Drawn = Literal["units", "rows"]


@dataclass(frozen=True)
class Measured:
    """Row by row: `sums` and `counts` [rows of the unit]; a unit's value is sum(sums) / sum(counts). A task is a unit whose
    rows count one each; `whole` holds the metrics of tasks that are no means over rows."""

    sums: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    whole: Mapping[str, float]

    def values(self) -> dict[str, float]:
        found = {name: float(self.sums[name].sum() / max(self.counts[name].sum(), 1)) for name in self.sums}
        return found | dict(self.whole)


@dataclass(frozen=True)
class Objective:
    """`units`: names of units or tasks with their weights; `lower`: less is better."""

    name: str
    units: tuple[tuple[str, float], ...]
    weight: float
    lower: bool
    by_tokens: bool = False

    @property
    def sign(self) -> float:
        return self.weight if self.lower else -self.weight

    def value(self, values: Mapping[str, Any], tokens: Mapping[str, Any]) -> Any:
        """From the values of units (numbers, or arrays of resamples) and their tokens."""
        if not self.lower:
            return sum(weight * values[name] for name, weight in self.units)
        if self.by_tokens:
            return (sum(values[name] * tokens[name] for name, _ in self.units)
                    / sum(tokens[name] for name, _ in self.units))
        return sum(values[name] for name, _ in self.units) / len(self.units)


def objectives_of(settings: SearchSettings, units: Sequence[str]) -> list[Objective]:
    """As the file says; by default the loss of all units, and each task. Raises RecipeError for patterns that fit nothing."""
    by_tokens = settings.data is not None and settings.data.weighting == "tokens"
    tasks = {task.name: task.weight for task in settings.tasks}
    if settings.objectives is None:
        found = [Objective("loss", tuple((name, 1.0) for name in units), 1.0, True, by_tokens)] if units else []
        return found + [Objective(name, ((name, weight),), 1.0, False) for name, weight in tasks.items()]
    found, problems = [], []
    for one in settings.objectives:
        if one.tasks is not None:
            found.append(Objective(one.name, tuple((name, tasks[name]) for name in one.tasks), one.weight, False))
            continue
        fitting = [name for name in units if any(fnmatch.fnmatchcase(name, p) for p in one.units or [])]
        if not fitting:
            problems.append(f"objectives.{one.name}: no unit fits {', '.join(one.units or [])}. There are "
                            f"{', '.join(units[:12])}{', ..' if len(units) > 12 else ''}.")
        found.append(Objective(one.name, tuple((name, 1.0) for name in fitting), one.weight, True, by_tokens))
    used = {name for objective in found for name, _ in objective.units}
    problems += [f"tasks: {name} is in no objective" for name in tasks if name not in used]
    if problems:
        raise RecipeError.of("search config:", problems)
    return found


@dataclass(frozen=True)
class Score:
    """`score`: lower is better. `objectives` in their own direction. `units`: losses, and metrics of tasks."""

    score: float
    objectives: dict[str, float]
    units: dict[str, float]


def score_of(objectives: Sequence[Objective], measured: Measured) -> Score:
    values = measured.values()
    tokens = {name: float(counts.sum()) for name, counts in measured.counts.items()}
    found = {objective.name: float(objective.value(values, tokens)) for objective in objectives}
    total = sum(objective.sign * found[objective.name] for objective in objectives)
    return Score(float(total), found, values)


@dataclass(frozen=True)
class Difference:
    """Score of one model minus another's on the same rows, and its 95 % interval; below zero: the one is better. `drawn`: what
    was drawn again for the interval."""

    value: float
    low: float | None
    high: float | None
    drawn: Drawn | None = None


def difference(objectives: Sequence[Objective], one: Measured, other: Measured) -> Difference:
    """Paired bootstrap, the same draws for both models.

    Units are drawn again, each with all its rows, where every objective of losses has FEW units or more and none shares some
    of its units with another: that tells how far other units and other rows might say otherwise. Else rows within each unit,
    which says nothing of other units, and wants FEW rows in each. No interval otherwise, nor where a metric is no mean.

    Plain quantiles are too narrow for few units (five: 84 % instead of 95 %), so they are moved outwards for the smallest
    number that was drawn from: the expanded percentile interval (Hesterberg, arXiv 1411.5279, section 5.3). It holds 92 to
    95 % for means of normal numbers.
    """
    value = score_of(objectives, one).score - score_of(objectives, other).score
    sets = [{name for name, _ in o.units} for o in objectives if o.lower]
    by_units = all(len(s) >= FEW and all(s == more or not s & more for more in sets) for s in sets)
    of_rows = [name for o in objectives if not (o.lower and by_units) for name, _ in o.units]
    if one.whole or other.whole or any(len(one.sums[name]) < FEW for name in of_rows):
        return Difference(value, None, None)
    total: Any = 0.0
    for o in objectives:
        draw = _units_again if o.lower and by_units else _rows_again
        total = total + o.sign * (draw(o, one) - draw(o, other))
    tail = _tail(min([len(one.sums[name]) for name in of_rows] + [len(s) for s in sets if by_units]))
    low, high = np.quantile(total, [tail, 1 - tail])
    return Difference(value, float(low), float(high), "rows" if of_rows else "units")


def _tail(number: int) -> float:
    """Share of resamples beyond either end of a 95 % interval, of a mean over `number`; 0.025 for very many."""
    from scipy.stats import norm, t

    return float(norm.cdf(-math.sqrt(number / (number - 1)) * t.ppf(0.975, number - 1)))


def _units_again(objective: Objective, measured: Measured) -> np.ndarray:
    """[RESAMPLES] of an objective of losses."""
    names = [name for name, _ in objective.units]
    picks = generator(0, "search", "bootstrap", *names).multinomial(len(names), np.full(len(names), 1 / len(names)),
                                                                    size=RESAMPLES)
    sums = np.array([measured.sums[name].sum() for name in names])
    counts = np.array([measured.counts[name].sum() for name in names])
    if objective.by_tokens:
        return (picks @ sums) / np.maximum(picks @ counts, 1)
    return (picks @ (sums / np.maximum(counts, 1))) / len(names)


def _rows_again(objective: Objective, measured: Measured) -> Any:
    """[RESAMPLES] of any objective."""
    values, tokens = {}, {}
    for name, _ in objective.units:
        rows = len(measured.sums[name])
        picks = generator(0, "search", "bootstrap", name).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
        tokens[name] = picks @ measured.counts[name]
        values[name] = (picks @ measured.sums[name]) / np.maximum(tokens[name], 1)
    return objective.value(values, tokens)


def usual_batch() -> int:
    """Padded tokens of a batch. An accelerator wants many; a CPU computes padding as slowly as anything else."""
    return 2048 if device().type == "cpu" else 16384


@torch.no_grad()
def losses(model: Any, units: Mapping[str, Rows], batch_tokens: int, *, select: bool) -> Measured:
    """Loss sums and response tokens of every row. Rows of all units share batches: short ones fill them."""
    names = sorted(units)
    together = Rows.joined([units[name] for name in names])
    sums, counts = np.zeros(len(together)), np.zeros(len(together))
    where = next(model.parameters()).device
    for batch in batches(together, np.arange(len(together)), batch_tokens, where):
        each, _ = response_losses(model, batch, select=select)
        lengths = batch.response[:, 1:].sum(1).tolist()
        for row, part in zip(batch.rows.tolist(), each.double().cpu().split(lengths), strict=True):
            sums[row], counts[row] = float(part.sum()), len(part)
    ends = np.cumsum([len(units[name]) for name in names])[:-1]
    by_unit, of_unit = (dict(zip(names, np.split(values, ends), strict=True)) for values in (sums, counts))
    return Measured(by_unit, of_unit, {})


@dataclass
class Scorer:
    """Scores a loaded model on one half of everything that is asked for."""

    objectives: list[Objective]
    rows: Mapping[Half, Mapping[str, Rows]]
    batch_tokens: int
    select: bool
    tasks: TaskScorer | None = None

    def measure(self, model: Any, tokenizer: Any, half: Half) -> Measured:
        rows = self.rows[half]
        found = losses(model, rows, self.batch_tokens, select=self.select) if rows else Measured({}, {}, {})
        if self.tasks is None:
            return found
        sums, counts, whole = self.tasks.measure(model, tokenizer, half)
        return Measured({**found.sums, **sums}, {**found.counts, **counts}, {**found.whole, **whole})
