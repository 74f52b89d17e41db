"""The paper's rule and its protocol (arXiv:2601.22285 and the authors' code), on arrays.

    n pairs   m metrics   K merge methods   F folds   S seeds

The score of a pair is w·x, x its metrics scaled to [-1, 1] by the training rows; no intercept. w minimises
-corr(Xw, y) + penalty * |w|_1 by Adam. Three things to know about that objective:

  - corr does not change when w is multiplied by c > 0, and penalty * |w|_1 does: for every penalty > 0 there is no minimiser,
    the infimum lies at w -> 0. What is reported is where Adam stalls. The well-posed relative is the lasso.
  - With penalty 0 the optimum is least squares with an intercept, in closed form; its training r bounds that of any w.
  - The score has no unit, and not even a common one between folds: correlations are within folds, pooled ones are noise.

Because corr needs nothing of the rows but their second moments, all folds, methods and seeds descend together on [m, m]
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from anabranch.errors import RecipeError
from anabranch.mergeability.table import Table
from anabranch.rows import generator

LEAST_ROWS = 3  # a correlation over fewer is +-1 by construction
LEAST_TASKS = 4  # with three, the two others are one pair
EPS = 1e-8  # in Adam's and in both the paper's quotients
TOP = 5
COMPACT = 20  # iterations between the throwing-out of finished descents


@dataclass(frozen=True)
class Descent:
    """How w is found.

    Attributes:
        penalty: on |w|_1.
        spread: sd of the normal draw w starts from.
        most: iterations at most; it stops sooner, `patience` iterations after the training loss last fell by `tolerance`.
        cut: smaller coefficients become 0 at the end.
        sum_to_one: w is divided by its sum before every step (v1).
    """

    penalty: float
    spread: float
    most: int
    patience: int
    tolerance: float
    cut: float
    sum_to_one: bool = False
    rate: float = 0.01


V6 = Descent(penalty=1.0, spread=0.1, most=2000, patience=100, tolerance=1e-5, cut=1e-3)
V1 = Descent(penalty=0.0, spread=1.0, most=1000, patience=50, tolerance=1e-4, cut=0.0, sum_to_one=True)


# ---- what is fitted --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """Complete pairs as arrays: x float [n, m], y float [n, K], the pairs' tasks int [n]."""

    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    tasks: list[str]
    first: np.ndarray
    second: np.ndarray
    dropped: int = 0

    def without(self, metrics: Collection[str]) -> Study:
        """Fewer columns, the same pairs."""
        kept = [i for i, name in enumerate(self.metrics) if name not in metrics]
        return Study(tuple(self.metrics[i] for i in kept), self.methods, self.x[:, kept], self.y, self.tasks, self.first,
                     self.second, self.dropped)


def study(table: Table, methods: Sequence[str], metrics: Sequence[str], *, normalised: bool = False) -> Study:
    """The pairs of `table` on which no metric and no method is missing.

    Args:
        normalised: the target that the paper names, score(merge) / score(own model); without it the one that was computed,
            the merge's raw score. Both are means over the pair's tasks.

    Raises:
        RecipeError: unknown methods or metrics, scores missing, or too little left.
    """
    problems = [f"method `{m}`: no such columns. In the table: {', '.join(table.methods)}" for m in methods
                if m not in table.outcomes]
    problems += [f"metric `{m}`: no such column" for m in metrics if m not in table.metrics]
    if not metrics:
        problems.append("no metric to fit on")
    if problems:
        raise RecipeError.of("The published rule cannot be fitted to this table:", problems)
    x = np.stack([table.metrics[m] for m in metrics], axis=1)
    y = np.stack([table.normalised(m) if normalised else table.raw(m) for m in methods], axis=1)
    whole = np.isfinite(x).all(1) & np.isfinite(y).all(1)
    found = Study(tuple(metrics), tuple(methods), x[whole], y[whole], table.tasks, table.first[whole], table.second[whole],
                  int((~whole).sum()))
    present = len(np.union1d(found.first, found.second))
    if present < LEAST_TASKS or len(found.y) <= LEAST_ROWS:
        raise RecipeError(f"the published rule: {len(found.y)} complete pairs of {present} tasks ({found.dropped} pairs have a "
                          f"missing metric or score). Wanted at least {LEAST_TASKS} tasks and {LEAST_ROWS + 1} pairs.")
    return found


@dataclass(frozen=True)
class Folds:
    """Which rows each fold learns from and is scored on: bool [F, n], never both."""

    names: list[str]
    train: np.ndarray
    held: np.ndarray


def leave_one_task_out(s: Study) -> Folds:
    """A fold per task: its pairs are held out. Tasks without a pair have no fold."""
    seen = np.union1d(s.first, s.second)
    held = (s.first == seen[:, None]) | (s.second == seen[:, None])
    return Folds([s.tasks[t] for t in seen], ~held, held)


def leave_pair_out(s: Study) -> Folds:
    """A fold per pair: held out alone, learnt from the pairs that share no task with it (v1's L2TO)."""
    meets = ((s.first == s.first[:, None]) | (s.first == s.second[:, None])
             | (s.second == s.first[:, None]) | (s.second == s.second[:, None]))
    names = [f"{s.tasks[a]}+{s.tasks[b]}" for a, b in zip(s.first, s.second, strict=True)]
    return Folds(names, ~meets, np.eye(len(s.y), dtype=bool))


def ranges(x: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minima and ranges of the metrics over each fold's training rows, [F, m]; a constant metric has range 1."""
    low = np.where(train[:, :, None], x, np.inf).min(axis=1)
    width = np.where(train[:, :, None], x, -np.inf).max(axis=1) - low
    return low, np.where(width > 0, width, 1.0)


def scaled(x: np.ndarray, low: np.ndarray, width: np.ndarray) -> np.ndarray:
    """[F, n, m]: to [-1, 1] by each fold's training rows; held-out rows may lie outside."""
    return 2 * (x - low[:, None]) / width[:, None] - 1


@dataclass(frozen=True)
class Moments:
    """All that corr(Xw, y) needs of each fold's training rows.

    Attributes:
        inputs: scaled metrics of all rows [F, n, m].
        gram: X'X of the centred training rows [F, m, m].
        cross: X'y/|y|, both centred [F, K, m].
    """

    inputs: np.ndarray
    gram: np.ndarray
    cross: np.ndarray


def moments(s: Study, folds: Folds) -> Moments:
    inputs = scaled(s.x, *ranges(s.x, folds.train))
    share = folds.train / folds.train.sum(1, keepdims=True)
    x = (inputs - np.einsum("fn,fnm->fm", share, inputs)[:, None]) * folds.train[:, :, None]
    y = (s.y - (share @ s.y)[:, None]) * folds.train[:, :, None]
    length = np.sqrt((y**2).sum(1, keepdims=True))
    y = np.divide(y, length, out=np.zeros_like(y), where=length > 0)
    return Moments(inputs, x.transpose(0, 2, 1) @ x, y.transpose(0, 2, 1) @ x)


# ---- the rule --------------------------------------------------------------------------------------------------------


def starts(s: Study, folds: int, seeds: Sequence[int], spread: float) -> np.ndarray:
    """Initial w, [F, K, S, m]; a method's do not depend on which others are there."""
    draws = [[generator(seed, "published rule", method).normal(size=(folds, len(s.metrics))) for seed in seeds]
             for method in s.methods]
    return spread * np.array(draws).transpose(2, 0, 1, 3)


def descend(gram: np.ndarray, cross: np.ndarray, start: np.ndarray, how: Descent,
            allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Adam on -corr + penalty |w|_1, for N starting points in each of F folds at once.

    Args:
        gram: [F, m, m];  cross: [F, N, m];  start: [F, N, m].
        allowed: bool [F, N, m], metrics that w may use; all without it.

    Returns:
        (w [F, N, m], iterations [F, N]). w is that of the last iteration, as published, not of the best.
    """
    result, steps = start.copy(), np.full(start.shape[:2], how.most)
    free = np.ones_like(start) if allowed is None else allowed.astype(start.dtype)
    w, b = start * free, cross
    mean, square = np.zeros_like(w), np.zeros_like(w)
    best, since = np.full(w.shape[:2], np.inf), np.zeros(w.shape[:2], int)
    place, live = np.indices(w.shape[:2]), np.ones(w.shape[:2], bool)
    for t in range(1, how.most + 1):
        if how.sum_to_one:
            w = w / (w.sum(-1, keepdims=True) + EPS)
        gw = w @ gram
        length = np.sqrt(np.maximum((gw * w).sum(-1, keepdims=True), 0.0)) + EPS
        r = (w * b).sum(-1, keepdims=True) / length
        slope = gw * (r / length**2) - b / length
        loss = -r[..., 0]
        if how.penalty:
            slope += how.penalty * np.sign(w)
            loss = loss + how.penalty * np.abs(w).sum(-1)
        slope *= free
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        w = w - (how.rate / (1 - 0.9**t)) * mean / (np.sqrt(square / (1 - 0.999**t)) + EPS)
        better = loss < best - how.tolerance
        best, since = np.where(better, loss, best), np.where(better, 0, since + 1)
        ended = live & ((since >= how.patience) | (t == how.most))
        if ended.any():
            at = tuple(place[:, ended])
            result[at], steps[at] = w[ended], t
            live &= ~ended
            if not live.any():
                break
        most = int(live.sum(1).max())
        if t % COMPACT == 0 and most <= 0.8 * live.shape[1]:  # finished ones leave: the rest goes on alone
            rest = np.argsort(~live, axis=1, kind="stable")[:, :most]
            w, b, mean, square, free = (np.take_along_axis(v, rest[..., None], 1) for v in (w, b, mean, square, free))
            best, since, live = (np.take_along_axis(v, rest, 1) for v in (best, since, live))
            place = np.take_along_axis(place, rest[None], 2)
    return np.where(np.abs(result) < how.cut, 0.0, result), steps


def fit(s: Study, folds: Folds, how: Descent, seeds: Sequence[int], found: Moments | None = None) -> np.ndarray:
    """w of every fold, method and seed, [F, K, S, m]."""
    found = found or moments(s, folds)
    start = starts(s, len(folds.names), seeds, how.spread)
    f, k, n, m = start.shape
    cross = np.repeat(found.cross, n, axis=1)
    return descend(found.gram, cross, start.reshape(f, k * n, m), how)[0].reshape(f, k, n, m)


def least_squares(s: Study, folds: Folds, found: Moments) -> np.ndarray:
    """The optimum of the rule with penalty 0: slopes of least squares with intercept, [F, K, 1, m]; of least norm.

    From the rows, not from `gram`: metrics that depend on one another but for rounding would square their condition.
    """
    def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0].T
    return np.stack([slopes(x[rows], s.y[rows]) for x, rows in zip(found.inputs, folds.train, strict=True)])[:, :, None]


def training_r(found: Moments, w: np.ndarray) -> np.ndarray:
    """corr(Xw, y) on the training rows, [F, N], of w [F, N, m] and cross [F, N, m]."""
    length = np.sqrt(np.maximum(((w @ found.gram) * w).sum(-1), 0.0))
    return np.divide((w * found.cross).sum(-1), length, out=np.zeros_like(length), where=length > 0)


def predict(found: Moments, w: np.ndarray) -> np.ndarray:
    """Scores of all rows under each fold's w, [F, K, S, n]."""
    f, k, s, m = w.shape
    return (w.reshape(f, k * s, m) @ found.inputs.transpose(0, 2, 1)).reshape(f, k, s, -1)


# ---- the protocol's statistics ---------------------------------------------------------------------------------------


def correlations(predicted: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson r along the last axis; 0 where nothing was predicted (a constant), NaN where nothing was to be predicted."""
    p, q = predicted - predicted.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    length = np.sqrt((p**2).sum(-1)) * np.sqrt((q**2).sum(-1))
    r = np.divide((p * q).sum(-1), length, out=np.zeros_like(length), where=length > 0)
    return np.where((q**2).sum(-1) > 0, r, np.nan)


@dataclass(frozen=True)
class Judged:
    """What the paper reports of one experiment, by seed.

    Attributes:
        train_r, val_r, val_rho: [F, K, S], within folds; NaN for a fold with fewer than LEAST_ROWS held-out pairs.
        aggregate_r, aggregate_train_r: [K, S], over all folds' scores end to end (which have no common scale).
    """

    train_r: np.ndarray
    val_r: np.ndarray
    val_rho: np.ndarray
    aggregate_r: np.ndarray
    aggregate_train_r: np.ndarray


def judge(s: Study, folds: Folds, predicted: np.ndarray) -> Judged:
    """predicted: [F, K, S, n], scores of all rows by each fold's fit."""
    y = np.broadcast_to(s.y.T[:, None], predicted.shape[1:])
    blank = np.full(predicted.shape[:3], np.nan)
    train, held, rho = blank, blank.copy(), blank.copy()
    for f, (learnt, kept) in enumerate(zip(folds.train, folds.held, strict=True)):
        train[f] = correlations(predicted[f][..., learnt], y[..., learnt])
        if kept.sum() >= LEAST_ROWS:
            held[f] = correlations(predicted[f][..., kept], y[..., kept])
            rho[f] = correlations(rankdata(predicted[f][..., kept], axis=-1), rankdata(y[..., kept], axis=-1))
    pooled = [correlations(np.concatenate([predicted[f][..., rows] for f, rows in enumerate(which)], axis=-1),
                           np.concatenate([y[..., rows] for rows in which], axis=-1)) for which in (folds.held, folds.train)]
    return Judged(train, held, rho, pooled[0], pooled[1])


def mean_r(r: np.ndarray) -> np.ndarray:
    """The headline, [K, S]: mean over the folds that have an r; NaN where none has."""
    known = np.isfinite(r)
    return np.divide(np.where(known, r, 0.0).sum(0), known.sum(0), out=np.full(r.shape[1:], np.nan), where=known.sum(0) > 0)


# ---- what is read off the coefficients -------------------------------------------------------------------------------


def _over_method_pairs(coefficients: np.ndarray, share: Callable[[np.ndarray, np.ndarray], float]) -> float:
    return float(np.mean([share(a, b) for i, a in enumerate(coefficients) for b in coefficients[i + 1:]]))


def top_overlap(coefficients: np.ndarray, top: int = TOP) -> float:
    """Mean over pairs of methods of the share of common metrics among each one's `top` largest |w|. [K, m] -> [0, 1]."""
    def share(a: np.ndarray, b: np.ndarray) -> float:
        leading = [set(np.argsort(-np.abs(v), kind="stable")[:top].tolist()) for v in (a, b)]
        return len(leading[0] & leading[1]) / top
    return _over_method_pairs(coefficients, share)


def sign_agreement(coefficients: np.ndarray) -> float:
    """Mean over pairs of methods of the share of equal signs among metrics that are non-zero for both. [K, m] -> [0, 1]."""
    def share(a: np.ndarray, b: np.ndarray) -> float:
        both = (a != 0) & (b != 0)
        return float((np.sign(a) == np.sign(b))[both].mean()) if both.any() else np.nan
    return _over_method_pairs(coefficients, share)


def set_scores(tasks: np.ndarray, first: np.ndarray, second: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of a pair's value over the pairs within each set; NaN where one of them is unknown.

    Args:
        tasks: int [sets, k], the members.
        values: [n] by pair, whose tasks are `first` and `second`.
    """
    size = int(max(first.max(), second.max(), tasks.max())) + 1
    square = np.full((size, size), np.nan)
    square[first, second] = square[second, first] = values
    one, two = np.triu_indices(tasks.shape[1], 1)
    return square[tasks[:, one], tasks[:, two]].mean(axis=1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho over the places where both are known."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < LEAST_ROWS:
        return float("nan")
    return float(correlations(rankdata(a[known]), rankdata(b[known])))


# ---- as a predictor --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One method's fitted rule. Its score has no unit: only the order of pairs means something."""

    metrics: tuple[str, ...]
    weights: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def score(self, table: Table) -> np.ndarray:
        """[n]; NaN for a pair that lacks one of the metrics."""
        missing = np.full(len(table), np.nan)
        x = np.stack([table.metrics.get(m, missing) for m in self.metrics], axis=1)
        width = np.where(self.high > self.low, self.high - self.low, 1.0)
        return scaled(x, self.low[None], width[None])[0] @ self.weights


def fit_rule(table: Table, method: str, metrics: Sequence[str], *, normalised: bool = True, how: Descent = V6,
             seed: int = 0) -> Rule:
    """The published rule on all complete pairs of a table, for one merge method.

    Raises:
        RecipeError: the table has no such method or metrics, or too few complete pairs.
    """
    s = study(table, [method], metrics, normalised=normalised)
    everything = Folds(["all"], np.ones((1, len(s.y)), bool), np.zeros((1, len(s.y)), bool))
    w = fit(s, everything, how, [seed])[0, 0, 0]
    return Rule(s.metrics, w, s.x.min(0), s.x.max(0))
