"""A predictor: made from a table, asked about pairs. Per pair and method a normalised score with its interval, or why not.

It says `cannot say` where a value that it needs is missing, where one lies far outside of what the table held, where too
few pairs were left out to give an interval, and where, with as many tasks unseen, its errors were no smaller than those of
guessing the mean. Intervals are conformal over left-out pairs (arXiv:2107.07511, sec. 1); pairs that share a task are not
exchangeable, so their coverage is measured (trial.py), not promised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.errors import RecipeError, closest
from anabranch.mergeability import published as paper
from anabranch.mergeability.artifacts import (
    GAP,
    InputColumn,
    Moved,
    OwnRule,
    Prediction,
    Predictor,
    PublishedRule,
    Reach,
)
from anabranch.mergeability.metrics import PUBLISHED
from anabranch.mergeability.rule import (
    CASES,
    LEVEL,
    Column,
    Fit,
    Prepared,
    Rule,
    conformal,
    design,
    directions,
    fit,
    inputs_of,
)
from anabranch.mergeability.table import Table

# A query may lie this far outside of what was seen, as a share of the range that was seen.
BEYOND = 0.5
SAME_GAP = 1e-4  # rounding in other batches is far below; another model's gap is hardly so near
# An own model that a merge beats by so much did not learn its task, and no share of its score means anything.
MOST_KEPT = 3.0
# Of outcomes without any law, errors fall below this share of the mean's in 1 table of 10 to 40, below the mean's in 1 of 2.
SKILL = 0.95
RuleName = Literal["ours", "published"]
MOST_MOVED = 5
SHOWN = 6


# ---- what a table must be ----------------------------------------------------------------------------------------------


def complete(table: Table, methods: Sequence[str] | None, *, drop_missing: bool) -> tuple[Table, list[str], int]:
    """The rows on which nothing is missing, the methods, and how many rows were dropped.

    A score or metric that is missing everywhere is not in the table. base scores may be missing: there is no gap then.

    Raises:
        RecipeError: cells are missing and `drop_missing` does not allow to leave their rows out; no outcomes; no own scores.
    """
    problems = [f"method `{m}`: no such columns.{closest(m, table.methods)}" for m in methods or [] if m not in table.outcomes]
    if not table.outcomes:
        problems.append("no merge is scored in it: columns METHOD_score1 and METHOD_score2 are wanted")
    if np.isnan(table.single).all():
        problems.append("no own scores: columns single_score1 and single_score2 are wanted, to normalise by")
    scored = [m for m, scores in table.outcomes.items() if not np.isnan(scores).all()]
    problems += [f"method `{m}`: all its scores are missing" for m in (methods or []) if m in set(table.outcomes) - set(scored)]
    if table.outcomes and not scored:
        problems.append("every score of a merge is missing")
    if problems:
        raise RecipeError.of("This table cannot be fitted:", problems)
    names = list(methods or scored)
    columns: dict[str, np.ndarray] = {k: v for k, v in table.metrics.items() if not np.isnan(v).all()}
    cells = columns | {f"{m} scores": table.outcomes[m] for m in names} | {"single scores": table.single}
    if not np.isnan(table.base).all():
        cells["base scores"] = table.base
    missing = {name: np.isnan(v).reshape(len(table), -1).any(axis=1) for name, v in cells.items()}
    lost = np.any(list(missing.values()), axis=0)
    if lost.any() and not drop_missing:
        where = [f"{name}: {_pairs_of(table, gone)}" for name, gone in missing.items() if gone.any()]
        shown = where[:SHOWN] + ([f"and {len(where) - SHOWN} more columns"] if len(where) > SHOWN else [])
        raise RecipeError.of(f"{lost.sum()} of {len(table)} pairs lack values. Fill them in, or leave these pairs out with "
                             "--drop-missing:", shown)
    kept = table.take(~lost)
    kept = Table(kept.tasks, kept.first, kept.second, {k: kept.metrics[k] for k in columns}, kept.single, kept.base,
                 {m: kept.outcomes[m] for m in names})
    weak = sorted({kept.tasks[t] for m in names for side, tasks in enumerate((kept.first, kept.second))
                   for t in tasks[kept.kept(m)[:, side] > MOST_KEPT]})
    if weak:
        raise RecipeError(f"merges score more than {MOST_KEPT:g} times what the own model does on {', '.join(weak[:SHOWN])}"
                          + (f" and {len(weak) - SHOWN} more tasks" if len(weak) > SHOWN else "") +
                          ". That model did not learn its task: leave its pairs out, or tune it again.")
    return kept, names, int(lost.sum())


def _pairs_of(table: Table, rows: np.ndarray) -> str:
    found = [" + ".join(table.pair(i)) for i in np.flatnonzero(rows)]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more pairs" if len(found) > 3 else "")


# ---- fitting -------------------------------------------------------------------------------------------------------------


def make_predictor(table: Table, methods: Sequence[str], rule: RuleName = "ours", *, cases: Sequence[int] = CASES,
                   dropped: int = 0, seed: int = 0) -> Predictor:
    """Fit on the rows of a complete table (`complete`).

    Args:
        rule: `ours` (rule.py), or `published`: arXiv:2601.22285's (published.py, its Adam from draw `seed`).
        cases: the numbers of unseen tasks that it will be asked about.

    Raises:
        RecipeError: too few tasks or pairs; the published rule without any published metric.
    """
    tasks = [table.tasks[t] for t in np.union1d(table.first, table.second)]
    asked = inputs_of(table).get(GAP)
    gaps = {} if asked is None or asked.ndim != 2 else dict(zip(table.tasks, table.by_task(asked).tolist(), strict=True))
    columns: list[InputColumn] = []
    ours: list[OwnRule] = []
    theirs: list[PublishedRule] = []
    if rule == "ours":
        whole, fits = fit(table, methods, cases)
        columns = [InputColumn(name=c.name, side=c.side, knots=c.knots.tolist(), mean=c.mean, sd=c.sd) for c in whole.columns]
        ours = [_own_rule(table, whole, fits[m]) for m in methods]
    else:
        theirs = [_published_rule(table, m, cases, seed) for m in methods]
    return Predictor(rule=rule, level=LEVEL, tasks=tasks, gaps={t: gaps[t] for t in tasks if t in gaps}, pairs=len(table),
                     dropped=dropped, columns=columns, ours=ours, published=theirs, trials=[], settings={"seed": seed})


def _own_rule(table: Table, whole: Prepared, found: Fit) -> OwnRule:
    rule = found.rule
    reach = [_reach(case, found.residuals[case], found.errors[case], found.spread[case]) for case in found.residuals]
    shrinkage = None if math.isinf(found.shrinkage) else found.shrinkage
    return OwnRule(method=found.method, penalty=found.penalty, shrinkage=shrinkage, ceiling=rule.ceiling,
                   intercept=rule.intercept, mean=rule.mean.tolist(), beta=rule.beta.tolist(),
                   suffers=_by_task(table, rule.suffers), harms=_by_task(table, rule.harms), reach=reach)


def _by_task(table: Table, effects: np.ndarray) -> dict[str, float]:
    return {table.tasks[t]: float(effects[t]) for t in np.union1d(table.first, table.second)}


def _reach(case: int, residuals: np.ndarray, errors: np.ndarray, spread: np.ndarray) -> Reach:
    width = conformal(residuals)
    return Reach.model_validate({
        "unseen": case, "pairs": len(residuals), "half_width": None if math.isinf(width) else width,
        "error": float(errors.mean()) if len(errors) else 0.0, "error_of_mean": float(spread.mean()) if len(spread) else 0.0})


def _published_rule(table: Table, method: str, cases: Sequence[int], seed: int) -> PublishedRule:
    """With residuals of leaving one task out (for 0 or 1 unseen tasks) and both (for 2)."""
    metrics = [m for m in PUBLISHED if m in table.metrics]
    found = paper.fit_rule(table, method, metrics, normalised=True, seed=seed)
    s = paper.study(table, [method], metrics, normalised=True)
    y = s.y[:, 0]
    slope, middle = _line(found.score(table), y)
    reach = []
    for case in cases:
        folds = paper.leave_pair_out(s) if case == 2 else paper.leave_one_task_out(s)
        moments = paper.moments(s, folds)
        scores = paper.predict(moments, paper.fit(s, folds, paper.V6, [seed], moments))[:, 0, 0]
        errors, spread = [], []
        for k, (learnt, held) in enumerate(zip(folds.train, folds.held, strict=True)):
            if learnt.sum() >= paper.LEAST_ROWS:
                a, b = _line(scores[k][learnt], y[learnt])
                errors.append(np.abs(y[held] - a * scores[k][held] - b))
                spread.append(np.abs(y[held] - y[learnt].mean()))
        off = np.concatenate(errors) if errors else np.zeros(0)
        reach.append(_reach(case, off, off, np.concatenate(spread) if spread else np.zeros(0)))
    return PublishedRule(method=method, weights=dict(zip(found.metrics, found.weights.tolist(), strict=True)),
                         low=dict(zip(found.metrics, found.low.tolist(), strict=True)),
                         high=dict(zip(found.metrics, found.high.tolist(), strict=True)), slope=slope, intercept=middle,
                         reach=reach)


def _line(score: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares y = slope score + intercept; slope 0 for a score without variation."""
    spread = float(((score - score.mean()) ** 2).sum())
    slope = float(((score - score.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
    return slope, float(y.mean() - slope * score.mean())


# ---- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """One method on n pairs: numbers wherever they can be computed, and whether they should be believed.

    score, low, high: (n,), NaN where a value is missing. kept: (n, 2), score(merge) / score(own model) of either task; None
    with the published rule. parts: input -> (n,) its share of the way from the middle of the table to the score.
    why_not: '' or why nothing should be said.
    """

    method: str
    score: np.ndarray
    low: np.ndarray
    high: np.ndarray
    kept: np.ndarray | None
    parts: dict[str, np.ndarray]
    why_not: list[str]


def predict(predictor: Predictor, table: Table) -> list[Prediction]:
    """Every pair of the table under every method of the predictor, pairs outermost."""
    found = estimates(predictor, table)
    unseen = unseen_tasks(predictor, table)
    return [_prediction(table, i, e, int(unseen[i])) for i in range(len(table)) for e in found]


def _prediction(table: Table, i: int, e: Estimate, unseen: int) -> Prediction:
    one, two = table.pair(i)
    if e.why_not[i]:
        return Prediction.model_validate({"task1": one, "task2": two, "method": e.method, "unseen": unseen, "score": None,
                                          "low": None, "high": None, "kept": [], "moved": [], "cannot_say": e.why_not[i]})
    largest = sorted(((name, float(values[i])) for name, values in e.parts.items() if values[i]),
                     key=lambda part: (-abs(part[1]), part[0]))[:MOST_MOVED]
    return Prediction.model_validate({
        "task1": one, "task2": two, "method": e.method, "unseen": unseen, "score": float(e.score[i]), "low": float(e.low[i]),
        "high": float(e.high[i]), "kept": [] if e.kept is None else e.kept[i].tolist(),
        "moved": [Moved(input=name, points=100 * value) for name, value in largest]})


def estimates(predictor: Predictor, table: Table) -> list[Estimate]:
    """One per method of the predictor."""
    unseen = unseen_tasks(predictor, table)
    if predictor.rule == "published":
        return [_published_estimate(rule, table, unseen) for rule in predictor.published]
    columns = [Column(c.name, c.side, np.array(c.knots), c.mean, c.sd) for c in predictor.columns]
    inputs = inputs_of(table)
    for c in columns:
        shape = (len(table),) if c.side == "pair" else (len(table), 2)
        if c.name not in inputs or inputs[c.name].shape != shape:  # one of the pair is none of either task
            inputs[c.name] = np.full(shape, math.nan)
    outside = _outside(columns, inputs, len(table))
    x, names = design(columns, inputs, len(table))
    seen = recognised(predictor, table)
    return [_own_estimate(rule, table, x, names, unseen, outside, seen) for rule in predictor.ours]


def recognised(predictor: Predictor, table: Table) -> np.ndarray:
    """(T,) whether a task's model is one that the predictor saw: of the same name, and with the same fine-tuning gap.

    Another model of that name has another gap. Where the predictor knows no gaps, the name alone must do.
    """
    named = np.isin(table.tasks, predictor.tasks)
    if not predictor.gaps:
        return named
    known = np.array([predictor.gaps.get(task, math.nan) for task in table.tasks])
    asked = inputs_of(table).get(GAP)
    here = np.full(len(known), math.nan) if asked is None or asked.ndim != 2 else table.by_task(asked)
    return np.asarray(named & (np.abs(here - known) <= SAME_GAP))


def unseen_tasks(predictor: Predictor, table: Table) -> np.ndarray:
    """(n,) how many of a pair's models the predictor never saw."""
    known = recognised(predictor, table).astype(int)
    return np.asarray(2 - known[table.first] - known[table.second])


def _why_not(reach: Reach | None, unseen: int) -> str:
    """'' where left-out pairs support a prediction."""
    who = {0: "pairs left out", 1: "tasks left out one by one", 2: "both tasks of a pair left out"}[unseen]
    if reach is None or reach.half_width is None:
        return f"too few pairs in the table for an interval ({0 if reach is None else reach.pairs} with {who})"
    if reach.error > SKILL * reach.error_of_mean - 1e-9:  # both 0 but for rounding where every merge scores the same
        return (f"with {who}, its errors ({100 * reach.error:.1f} points) were hardly smaller than those of guessing the mean "
                f"({100 * reach.error_of_mean:.1f})")
    return ""


def _half_widths(reaches: Sequence[Reach], unseen: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Per pair: half the interval on the rule's scale, infinite where it is not known; and why nothing should be said."""
    by_case: dict[int, Reach] = {r.unseen: r for r in reaches}
    widths = {case: math.inf if (r := by_case.get(case)) is None or r.half_width is None else r.half_width for case in CASES}
    why = {case: _why_not(by_case.get(case), case) for case in CASES}
    return np.array([widths[int(u)] for u in unseen]), [why[int(u)] for u in unseen]


def _outside(columns: Sequence[Column], inputs: Mapping[str, np.ndarray], n: int) -> list[str]:
    """Per pair: '' or what is missing, or lies more than BEYOND of the training range outside of it."""
    found: list[dict[str, str]] = [{} for _ in range(n)]
    for column in columns:
        values = inputs[column.name].reshape(n, -1)
        beyond = column.beyond(values)
        for i in np.flatnonzero(np.isnan(values).any(axis=1) | (beyond > BEYOND).any(axis=1)):
            if np.isnan(values[i]).any():
                found[i][column.name] = f"{column.name} is missing"
            else:
                found[i][column.name] = (f"{column.name} is {values[i, np.argmax(beyond[i])]:.4g}, and the table held "
                                         f"{column.knots[0]:.4g} to {column.knots[-1]:.4g}")
    return ["; ".join(list(why.values())[:3]) + (f"; and {len(why) - 3} more" if len(why) > 3 else "") for why in found]


def _own_estimate(own: OwnRule, table: Table, x: np.ndarray, names: Sequence[str], unseen: np.ndarray,
                  outside: Sequence[str], seen: np.ndarray) -> Estimate:
    n = len(table)
    suffers, harms = (np.where(seen, [side.get(t, 0.0) for t in table.tasks], 0.0) for side in (own.suffers, own.harms))
    rule = Rule(own.ceiling, np.array(own.mean), own.intercept, np.array(own.beta), suffers, harms)
    me, other = directions(table)
    f = rule.log_loss(x, me, other)
    kept, way = rule.kept(f), f - rule.intercept
    # What a unit of f moved, on average along the straight way from the middle of the table: so parts add up to the whole.
    pull = -np.exp(rule.intercept) * np.divide(np.expm1(way), way, out=np.ones_like(way), where=way != 0)
    parts = {"the other merges of these tasks": pull * (suffers[me] + harms[other])}
    for k, name in enumerate(names):
        parts[name] = parts.get(name, 0.0) + pull * (x[:, k] - rule.mean[k]) * rule.beta[k]
    half, why = _half_widths(own.reach, unseen)
    both = kept.reshape(2, n)
    score = both.mean(axis=0)
    middle = rule.f(score)
    with np.errstate(over="ignore"):  # no interval: from minus infinity
        low, high = rule.kept(middle + half), rule.kept(middle - half)
    low = np.maximum(low, 0.0)  # as a score cannot be less
    high = np.maximum(high, score)  # a score so close to the ceiling that `f` cuts it off
    return Estimate(own.method, score, low, high, both.T, {k: v.reshape(2, n).mean(axis=0) for k, v in parts.items()},
                    [o or w for o, w in zip(outside, why, strict=True)])


def _published_estimate(rule: PublishedRule, table: Table, unseen: np.ndarray) -> Estimate:
    names = tuple(rule.weights)
    found = paper.Rule(names, *(np.array([side[m] for m in names]) for side in (rule.weights, rule.low, rule.high)))
    score = rule.slope * found.score(table) + rule.intercept
    x = np.stack([table.metrics.get(m, np.full(len(table), math.nan)) for m in names], axis=1)
    width = np.where(found.high > found.low, found.high - found.low, 1.0)
    parts = rule.slope * found.weights * (2 * (x - found.low) / width - 1)
    half, why = _half_widths(rule.reach, unseen)
    missing = [[m for m, gone in zip(names, row, strict=True) if gone] for row in np.isnan(x)]
    lost = [", ".join(m[:3]) + (f" and {len(m) - 3} more" if len(m) > 3 else "") + " missing" if m else "" for m in missing]
    return Estimate(rule.method, score, score - half, score + half, None, dict(zip(names, parts.T, strict=True)),
                    [gone or w for gone, w in zip(lost, why, strict=True)])


def has_gap(predictor: Predictor) -> bool:
    """Whether it knows how far tuning moved each task, without which it knows much less."""
    return any(c.name == GAP for c in predictor.columns)


def regressors(predictor: Predictor) -> list[str]:
    """The input behind each coefficient of our rule."""
    columns = [Column(c.name, c.side, np.array(c.knots), c.mean, c.sd) for c in predictor.columns]
    nothing = {c.name: np.zeros(0 if c.side == "pair" else (0, 2)) for c in columns}
    return design(columns, nothing, 0)[1]
