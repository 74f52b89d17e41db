"""Our rule: how much of its own model's score does each task keep in a merge of two? Pure.

For task i merged with task j by one method, with kept_ij = score(merge on i) / score(i's own model), in training rows:

    f(kept_ij) = log(c - kept_ij) = x_ij . beta + a_i + b_j + noise          c: largest kept score + one standard deviation

x_ij: how far tuning moved the own task and the partner's (`fine_tuning_gap`), and every metric of the pair, each by its
Gaussian rank among the training rows; the gaps also as they are, so that a gap beyond all seen ones still counts. beta is
ridge's. a_i (what a task suffers whoever it is merged with) and b_j (what it does to others) are shrunken means of what
beta leaves; a task that was not in the table gets 0 for both: unseen tasks are never guessed from seen ones. The pair's
score is the mean of its two kept scores.

Penalty and shrinkage are chosen inside the rows at hand by leaving tasks out. Intervals are conformal: the 90 % quantile
of |f(measured) - f(predicted)| over training pairs predicted with none, one or both of their tasks left out, whichever is
the case of the query.

Where we differ from the source (arXiv:2601.22285, sec. 2 of our notes: one linear score per pair, Pearson objective, raw
accuracies): normalised targets, one per task; ranks; ridge; the gap; task effects; intervals; abstention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm

from anabranch.errors import RecipeError
from anabranch.mergeability.artifacts import GAP, KNOTS
from anabranch.mergeability.table import Table
from anabranch.rows import generator

STEPS = norm.ppf((np.arange(KNOTS) + 0.5) / KNOTS)
PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0)
SHRINKAGES = (1.0, 3.0, 10.0, 30.0, math.inf)
LEVEL = 0.9
FEWEST_TASKS = 5
FEWEST_PAIRS = 3  # that a fit learns from
MOST_FITS = 300
# How many of a query's tasks the table may have held no pair of.
CASES = (0, 1, 2)
Values = dict[str, np.ndarray]
Side = Literal["own", "partner", "pair"]
SIDES: tuple[Side, ...] = ("own", "partner")
PAIR: tuple[Side, ...] = ("pair",)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def inputs_of(table: Table) -> Values:
    """What the rule may look at: (n,) what belongs to the pair, (n, 2) what belongs to either task.

    Columns of the table called NAME1 and NAME2 belong to task1 and task2. The gap is the table's own `fine_tuning_gap1`, `2`
    where it has them, else 1 - base score / single score: the share of its score that tuning gave the model.
    """
    found: Values = {}
    for name, values in table.metrics.items():
        stem, side = name[:-1], name[-1:]
        if side in "12" and f"{stem}1" in table.metrics and f"{stem}2" in table.metrics:
            found[stem] = np.stack([table.metrics[f"{stem}1"], table.metrics[f"{stem}2"]], axis=1)
        else:
            found[name] = values
    if GAP not in found and not np.isnan(table.base).all():
        found[GAP] = 1.0 - table.base / table.single
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Column:
    """One input of the regression. `side`: whose value it is, or the pair's. `knots`: (KNOTS,) quantiles in training rows."""

    name: str
    side: Side
    knots: np.ndarray
    mean: float
    sd: float

    def rank(self, values: np.ndarray) -> np.ndarray:
        """Gaussian rank among the training rows, within +-2.4."""
        if self.knots[-1] <= self.knots[0]:
            return np.zeros(len(values))
        fresh = np.concatenate([[True], self.knots[1:] > self.knots[:-1]])
        place = np.cumsum(fresh) - 1  # equal knots: one place, with the mean of their ranks
        return np.asarray(np.interp(values, self.knots[fresh], np.bincount(place, STEPS) / np.bincount(place)))

    def standard(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / self.sd if self.sd > 0 else np.zeros(len(values))

    def beyond(self, values: np.ndarray) -> np.ndarray:
        """How far outside of the training rows, as a share of their range; 0 inside."""
        low, high = self.knots[0], self.knots[-1]
        out = np.maximum(np.maximum(low - values, values - high), 0.0)
        return np.where(out > 1e-12 * max(abs(low), abs(high)), out / max(high - low, 1e-300), 0.0)


def _sided(values: np.ndarray, side: Side) -> np.ndarray:
    """(2n,) of both directions: first (own, partner) = (task1, task2), then the other way round."""
    if values.ndim == 1:
        return np.concatenate([values, values])
    own, partner = values[:, 0], values[:, 1]
    return np.concatenate([own, partner] if side == "own" else [partner, own])


def make_columns(inputs: Mapping[str, np.ndarray]) -> list[Column]:
    keys = [(name, side) for name, values in inputs.items() for side in (SIDES if values.ndim == 2 else PAIR)]
    if not keys:
        return []
    both = np.stack([_sided(inputs[name], side) for name, side in keys], axis=1)
    knots, means, sds = np.quantile(both, np.linspace(0, 1, KNOTS), axis=0), both.mean(axis=0), both.std(axis=0)
    return [Column(name, side, knots[:, k], float(means[k]), float(sds[k])) for k, (name, side) in enumerate(keys)]


def design(columns: Sequence[Column], inputs: Mapping[str, np.ndarray], n: int) -> tuple[np.ndarray, list[str]]:
    """(2n, p) regressors of n pairs, rows as in `_sided`, and the input behind each."""
    parts, names = [], []
    for column in columns:
        values = _sided(inputs[column.name], column.side)
        parts.append(column.rank(values))
        names.append(column.name)
        if column.name == GAP:
            parts.append(column.standard(values))
            names.append(column.name)
    return np.stack(parts, axis=1) if parts else np.zeros((2 * n, 0)), names


# ---- one fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The rule of one merge method. `beta`: (p,); `suffers`, `harms`: (T,) effects a and b, 0 for tasks that it never saw."""

    ceiling: float
    mean: np.ndarray
    intercept: float
    beta: np.ndarray
    suffers: np.ndarray
    harms: np.ndarray

    def log_loss(self, x: np.ndarray, own: np.ndarray, partner: np.ndarray) -> np.ndarray:
        """f(kept) as predicted, (rows,)."""
        return np.asarray(self.intercept + (x - self.mean) @ self.beta + self.suffers[own] + self.harms[partner])

    def kept(self, f: np.ndarray) -> np.ndarray:
        return np.asarray(np.maximum(self.ceiling - np.exp(f), 0.0))

    def f(self, kept: np.ndarray) -> np.ndarray:
        """Of scores at or above the ceiling: as of one just below it."""
        return np.asarray(np.log(np.maximum(self.ceiling - kept, 1e-3)))


def directions(table: Table) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([table.first, table.second]), np.concatenate([table.second, table.first])


class Fitter:
    """Fits of one table without some of its rows. (n pairs are 2n directed rows: see `_sided`.)"""

    def __init__(self, table: Table, methods: Sequence[str]) -> None:
        self.table, self.methods = table, list(methods)
        self.inputs = inputs_of(table)
        self.own, self.partner = directions(table)
        self.present = len(np.union1d(table.first, table.second))
        kept = {m: table.kept(m) for m in methods}
        self.kept = {m: np.concatenate([k[:, 0], k[:, 1]]) for m, k in kept.items()}
        self.pair = {m: k.mean(axis=1) for m, k in kept.items()}

    def prepare(self, train: np.ndarray) -> Prepared:
        """`train`: (n,) mask of pairs."""
        columns = make_columns({k: v[train] for k, v in self.inputs.items()})
        x, names = design(columns, self.inputs, len(self.table))
        rows = np.concatenate([train, train])
        mean = x[rows].mean(axis=0)
        u, s, vt = np.linalg.svd(x[rows] - mean, full_matrices=False)
        return Prepared(self, columns, names, x, rows, mean, u, s, vt, {})


@dataclass(frozen=True)
class Prepared:
    """What every method's fit on the same rows shares."""

    fitter: Fitter
    columns: list[Column]
    names: list[str]
    x: np.ndarray
    rows: np.ndarray
    mean: np.ndarray
    u: np.ndarray
    s: np.ndarray
    vt: np.ndarray
    targets: dict[str, tuple[float, float, np.ndarray, np.ndarray]]

    def target(self, method: str) -> tuple[float, float, np.ndarray, np.ndarray]:
        """Ceiling, mean of f(kept), f(kept) less that mean, and that along the singular directions; formed once."""
        if method not in self.targets:
            kept = self.fitter.kept[method][self.rows]
            ceiling = float(kept.max() + max(kept.std(), 1e-3))
            f = np.log(ceiling - kept)
            middle = float(f.mean())
            self.targets[method] = ceiling, middle, f - middle, self.u.T @ (f - middle)
        return self.targets[method]

    def rule(self, method: str, penalty: float, shrinkage: float) -> Rule:
        """Ridge of f(kept), then shrunken effects of what it leaves."""
        ceiling, middle, target, along = self.target(method)
        beta = self.vt.T @ (self.s / (self.s**2 + penalty) * along)
        tasks = len(self.fitter.table.tasks)
        if math.isinf(shrinkage):
            return Rule(ceiling, self.mean, middle, beta, np.zeros(tasks), np.zeros(tasks))
        left = target - (self.x[self.rows] - self.mean) @ beta
        effects = _effects(left, self.fitter.own[self.rows], self.fitter.partner[self.rows], tasks, shrinkage)
        return Rule(ceiling, self.mean, middle, beta, *effects)

    def predict(self, rule: Rule, pairs: np.ndarray) -> np.ndarray:
        """Normalised scores of some pairs of the table, by index."""
        rows = np.concatenate([pairs, pairs + len(self.fitter.table)])
        f = rule.log_loss(self.x[rows], self.fitter.own[rows], self.fitter.partner[rows])
        return np.asarray(rule.kept(f).reshape(2, -1).mean(axis=0))


def _effects(left: np.ndarray, own: np.ndarray, partner: np.ndarray, tasks: int,
             shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """a, b of left_ij = a_i + b_j, by backfitting; each a mean over a task's rows as if `shrinkage` more rows were 0."""
    suffers, harms = np.zeros(tasks), np.zeros(tasks)
    counts = np.bincount(own, minlength=tasks) + shrinkage
    for _ in range(20):
        suffers = np.bincount(own, left - harms[partner], minlength=tasks) / counts
        harms = np.bincount(partner, left - suffers[own], minlength=tasks) / counts
    return suffers, harms


# ---- left-out predictions of the rows at hand ------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """Pairs of the table that a fit did not see. `unseen`: how many of a pair's tasks it did not see either."""

    pairs: np.ndarray
    prepared: Prepared


def left_out(fitter: Fitter, unseen: int) -> list[LeftOut]:
    """Fits without the tasks of what they predict (`unseen` 1 or 2), or without the pairs only (0).

    At most MOST_FITS, drawn by a fixed seed. A fit that would learn from fewer than FEWEST_PAIRS is left out.
    """
    table = fitter.table
    n = len(table)
    by_name = sorted(range(n), key=lambda i: sorted(table.pair(i)))  # the order of a table's rows decides nothing
    if unseen == 0:
        fold = np.empty(n, int)
        fold[by_name] = generator(0, "pairs left out").permutation(n) % min(10, n)
        held = [fold == k for k in range(min(10, n))]
        splits = [(~h, h) for h in held]
    elif unseen == 1:
        touched = [table.touches([t]) for t in range(len(table.tasks))]
        splits = [(t == 0, t == 1) for t in touched]
    else:
        chosen = np.sort(np.array(by_name)[generator(0, "task pairs left out").permutation(n)[:MOST_FITS]])
        splits = [(table.touches([table.first[i], table.second[i]]) == 0, np.arange(n) == i) for i in chosen]
    return [LeftOut(np.flatnonzero(test), fitter.prepare(train)) for train, test in splits
            if train.sum() >= FEWEST_PAIRS and test.any()]


def _error(folds: Sequence[LeftOut], method: str, penalty: float, shrinkage: float) -> float:
    """Mean squared error of left-out pairs, each task (fold) as much as another."""
    errors = []
    for fold in folds:
        predicted = fold.prepared.predict(fold.prepared.rule(method, penalty, shrinkage), fold.pairs)
        errors.append(np.mean((predicted - fold.prepared.fitter.pair[method][fold.pairs]) ** 2))
    return float(np.mean(errors))


@dataclass(frozen=True)
class Fit:
    """One method: the rule of all rows, and by how many unseen tasks (0, 1, 2) what left-out rows say of it.

    `residuals`: |f(measured) - f(predicted)| of left-out pairs, the larger `conformal`'s, the wider the interval.
    `errors`, `spread`: |measured - predicted| of the same pairs by the rule, and by a guess that knows only the mean.
    """

    method: str
    penalty: float
    shrinkage: float
    rule: Rule
    residuals: dict[int, np.ndarray]
    errors: dict[int, np.ndarray]
    spread: dict[int, np.ndarray]


def fit(table: Table, methods: Sequence[str], cases: Sequence[int] = CASES) -> tuple[Prepared, dict[str, Fit]]:
    """The rule of each method and its left-out residuals.

    The penalty is the one of least error on pairs with both tasks left out, the shrinkage of the effects, which have no say
    there, on pairs with one left out.

    Args:
        cases: the numbers of unseen tasks that residuals are wanted for.

    Raises:
        RecipeError: too few tasks or pairs.
    """
    fitter = Fitter(table, methods)
    folds = {case: left_out(fitter, case) for case in CASES if case or case in cases}
    if not folds[1] or not folds[2]:
        raise RecipeError(f"got {len(table)} complete pairs of {fitter.present} tasks: not enough to leave two tasks out and "
                          f"learn from the others. At least {FEWEST_TASKS} tasks, with most of their pairs, are wanted.")
    whole = fitter.prepare(np.ones(len(table), bool))
    found = {}
    for method in methods:
        penalty = min(PENALTIES, key=lambda p: _error(folds[2], method, p, math.inf))
        shrinkage = min(SHRINKAGES, key=lambda s: _error(folds[1], method, penalty, s))
        found[method] = _judged(method, penalty, shrinkage, whole, {c: folds[c] for c in cases})
    return whole, found


def _judged(method: str, penalty: float, shrinkage: float, whole: Prepared, folds: Mapping[int, Sequence[LeftOut]]) -> Fit:
    measured = whole.fitter.pair[method]
    found: dict[str, dict[int, np.ndarray]] = {"residuals": {}, "errors": {}, "spread": {}}
    for case, each in folds.items():
        off: list[list[np.ndarray]] = [[], [], []]
        for fold in each:
            rule = fold.prepared.rule(method, penalty, shrinkage)
            predicted, true = fold.prepared.predict(rule, fold.pairs), measured[fold.pairs]
            learnt = measured[fold.prepared.rows[: len(measured)]]
            beyond = np.where(true < rule.ceiling, rule.f(true) - rule.f(predicted), np.inf)  # no interval goes so far
            missed = (beyond, true - predicted, true - learnt.mean())
            for parts, part in zip(off, missed, strict=True):
                parts.append(np.abs(part))
        for name, parts in zip(found, off, strict=True):
            found[name][case] = np.concatenate(parts)
    return Fit(method, penalty, shrinkage, whole.rule(method, penalty, shrinkage), **found)


def conformal(residuals: np.ndarray, level: float = LEVEL) -> float:
    """The ceil((n + 1) level)-th smallest residual; infinity where there are too few of them for that level."""
    rank = math.ceil((len(residuals) + 1) * level)
    return float(np.sort(residuals)[rank - 1]) if rank <= len(residuals) else math.inf
