"""What a rule is worth on tasks that it never saw. Everything in it is made again from each fold's own rows.

One task left out (T folds): its pairs are predicted; their other task was seen. Several left out (`draws` folds, 30 % of
the tasks each): only pairs of two unseen tasks are predicted. Pairs left out (5 folds): both tasks were seen elsewhere. r is
Pearson's within a fold, then averaged, as published.
Controls: `task effects alone` knows no metric, only what a task's other merges scored (and nothing of unseen tasks);
`shuffled` is our rule on scores dealt anew among all pairs, which must find nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anabranch.mergeability.artifacts import Predictor, Trial
from anabranch.mergeability.metrics import PUBLISHED
from anabranch.mergeability.predict import Estimate, RuleName, estimates, make_predictor
from anabranch.mergeability.rule import FEWEST_PAIRS, FEWEST_TASKS, conformal
from anabranch.mergeability.table import Table
from anabranch.rows import generator

Progress = Callable[[str, int, int], None]
SHARE_OUT = 0.3
DRAWS = 20
LEAST_PAIRS = 3  # a correlation over fewer is +-1 by construction
WITHOUT_EFFECTS, EFFECTS_ALONE, SHUFFLED = "ours without task effects", "task effects alone", "shuffled"


@dataclass(frozen=True)
class Fold:
    """Pairs to learn from and pairs to predict, (n,) masks; `unseen` tasks of each of these."""

    train: np.ndarray
    test: np.ndarray
    unseen: int


def pairs_left_out(table: Table) -> list[Fold]:
    """A fifth of the pairs each, dealt by name; their tasks stay, in other pairs."""
    part = np.empty(len(table), int)
    part[sorted(range(len(table)), key=lambda i: sorted(table.pair(i)))] = generator(0, "fifths").permutation(len(table)) % 5
    return [Fold(part != k, part == k, 0) for k in range(5)]


def one_left_out(table: Table) -> list[Fold]:
    touched = [table.touches([t]) for t in np.union1d(table.first, table.second)]
    return [Fold(t == 0, t == 1, 1) for t in touched]


def several_left_out(table: Table, draws: int, seed: int = 0) -> list[Fold]:
    """Draws of 30 % of the tasks, at least three; drawn by `seed`."""
    tasks = np.union1d(table.first, table.second)
    size = max(3, round(SHARE_OUT * len(tasks)))
    found = []
    for k in range(draws):
        touched = table.touches(generator(seed, "tasks left out", k).permutation(tasks)[:size].tolist())
        found.append(Fold(touched == 0, touched == 2, 2))
    return found


@dataclass(frozen=True)
class LeftOutPairs:
    """One method's pairs, each twice (with either task left out): arrays of equal length."""

    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    measured: np.ndarray
    said: np.ndarray


def trials(table: Table, methods: Sequence[str], rule: RuleName = "ours", *, draws: int = DRAWS, seed: int = 0,
           controls: bool = True, progress: Progress | None = None) -> tuple[list[Trial], dict[str, LeftOutPairs]]:
    """Every method, one and several tasks left out, and the controls; and the pairs of the first, by method.

    Folds that leave too little to learn from or to correlate are skipped, so a small table may have no trial at all.
    """
    folds = one_left_out(table) + several_left_out(table, draws, seed) + pairs_left_out(table)
    known = [f for f in folds if _fits(table, f)]
    found: dict[tuple[int, str], list[list[_Scored]]] = {}
    for done, fold in enumerate(known):
        if progress:
            progress("leaving tasks out", done, len(known))
        for name, scored in _fold(table, methods, rule, fold, seed, controls).items():
            found.setdefault((fold.unseen, name), []).append(scored)
    if progress:
        progress("", len(known), len(known))
    judged = [_trial(name, unseen, [fold[m] for fold in folds], name == rule)
              for (unseen, name), folds in found.items() for m in range(len(methods))]
    pairs = {method: _left_out_pairs([fold[m] for fold in found[1, rule]]) for m, method in enumerate(methods)
             if (1, rule) in found}
    return judged, pairs


def _left_out_pairs(folds: Sequence[_Scored]) -> LeftOutPairs:
    score, low, high = (np.concatenate([getattr(f.estimate, name) for f in folds]) for name in ("score", "low", "high"))
    return LeftOutPairs(score, low, high, np.concatenate([f.measured for f in folds]),
                        np.array([not why for f in folds for why in f.estimate.why_not], bool))


def _fits(table: Table, fold: Fold) -> bool:
    """Enough to correlate, and to leave two further tasks out and learn from the others, as a fit does."""
    train = table.take(fold.train)
    if len(np.union1d(train.first, train.second)) < FEWEST_TASKS or fold.test.sum() < LEAST_PAIRS or len(train) < 10:
        return False
    return any((train.touches(pair) == 0).sum() >= FEWEST_PAIRS for pair in zip(train.first, train.second, strict=True))


@dataclass(frozen=True)
class _Scored:
    """One fold under one rule and one method. `estimate` of a control has no interval that is looked at."""

    estimate: Estimate
    measured: np.ndarray
    mean: float
    naive: float


def _fold(table: Table, methods: Sequence[str], rule: RuleName, fold: Fold, seed: int,
          controls: bool) -> dict[str, list[_Scored]]:
    train, test = table.take(fold.train), table.take(fold.test)
    predictor = make_predictor(train, methods, rule, cases=(fold.unseen,), seed=seed)
    asked = {rule: predictor} | (_controls(predictor, train, methods, fold, seed) if controls else {})
    found: dict[str, list[_Scored]] = {}
    for name, one in asked.items():
        found[name] = []
        for estimate in estimates(one, test):
            learnt = train.normalised(estimate.method)
            found[name].append(_Scored(estimate, test.normalised(estimate.method), float(learnt.mean()),
                                       conformal(np.abs(learnt - learnt.mean()))))
    if rule == "ours" and controls:
        found[SHUFFLED] = _shuffled(table, methods, fold)
    return found


def _controls(predictor: Predictor, train: Table, methods: Sequence[str], fold: Fold, seed: int) -> dict[str, Predictor]:
    """What the same fold gives with less: see the head of this file. The published rule beside ours, where it can be fitted."""
    found = {}
    if predictor.rule == "ours":
        bare = replace(train, metrics={}, base=np.full_like(train.base, np.nan))
        without = [o.model_copy(update={"suffers": {}, "harms": {}}) for o in predictor.ours]
        found[WITHOUT_EFFECTS] = predictor.model_copy(update={"ours": without})
        if fold.unseen < 2:
            found[EFFECTS_ALONE] = make_predictor(bare, methods, cases=(fold.unseen,))
        if set(PUBLISHED) & set(train.metrics):
            found["published"] = make_predictor(train, methods, "published", cases=(), seed=seed)
    return found


def _shuffled(table: Table, methods: Sequence[str], fold: Fold) -> list[_Scored]:
    """All that a fold does, on a table whose scores were dealt anew among its pairs, those to be predicted with them."""
    order = generator(0, "shuffled", *np.flatnonzero(fold.test).tolist()).permutation(len(table))
    dealt = replace(table, outcomes={m: table.kept(m)[order] * table.single for m in methods})
    return _fold(dealt, methods, "ours", fold, 0, False)["ours"]


def _trial(rule: str, unseen: int, folds: Sequence[_Scored], judged: bool) -> Trial:
    r = np.array([_correlation(f.estimate.score, f.measured) for f in folds])
    known = r[~np.isnan(r)]
    found: dict[str, object] = {"method": folds[0].estimate.method, "rule": rule, "unseen": unseen, "folds": len(folds),
                                "r": float(known.mean()) if len(known) else None,
                                "sd": float(known.std()) if len(known) else None}
    if judged:
        y = np.concatenate([f.measured for f in folds])
        low, high = (np.concatenate([getattr(f.estimate, side) for f in folds]) for side in ("low", "high"))
        said = np.array([not why for f in folds for why in f.estimate.why_not])
        inside = (low <= y) & (y <= high)
        naive = np.concatenate([np.abs(f.measured - f.mean) <= f.naive for f in folds])
        width = np.concatenate([np.full(len(f.measured), 2 * f.naive) for f in folds])
        found |= {"coverage": float(inside.mean()), "width": _finite_mean(high - low), "naive_coverage": float(naive.mean()),
                  "naive_width": _finite_mean(width), "answered": float(said.mean()),
                  "answered_coverage": float(inside[said].mean()) if said.any() else None}
    return Trial.model_validate(found)


def _finite_mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if np.isfinite(values).all() else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson r; 0 for a constant prediction, NaN for constant measurements."""
    if np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 else 0.0
