"""From pairs to sets: which k models to merge together, and by which method. Pure.

What task i keeps in a merge of the set S is the mean over its partners of what it keeps in a pair, predicted or measured,

    kept_i(S) = mean over j in S, j != i, of q_ij          q_ij = kept_ij

for methods that add task vectors up: there every model's step stays what it was in a pair. Methods that average shrink it:
of k models each takes 1/k of its step. Along that step three points are known, the base (0), the pair (1/2) and the task's own
model (1, which keeps everything), so the parabola through them gives

    q_ij = L0 base_i / single_i + L1 kept_ij + L2          L: Lagrange's polynomials of (0, 1/2, 1) at 1/k

exact where the score is quadratic along the step. Without base scores there is no curve, and averages are taken as the others.
Not in arXiv:2601.22285, whose score of a set is the mean of its pairs' scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from anabranch.errors import RecipeError
from anabranch.mergeability.artifacts import Predictor, SuggestedSet, Suggestion
from anabranch.mergeability.predict import estimates
from anabranch.mergeability.table import MeasuredSet, Table

# Weighted means of models, drop or no drop; also by the names of arXiv:2601.22285's tables.
AVERAGES = frozenset({"weight_avg", "dare", "linear", "token_weighted", "dare_linear"})
MOST_SETS = 200_000
BEST = 5


def step_curve(k: int) -> tuple[float, float, float]:
    """Weights of what is known at steps 0, 1/2 and 1 in the parabola's value at 1/k; their sum is 1."""
    s = 1.0 / k
    return (1 - s) * (1 - 2 * s), 4 * s * (1 - s), s * (2 * s - 1)


@dataclass(frozen=True)
class PairScores:
    """kept: method -> (T, T), what the row's task keeps merged with the column's; NaN where nothing can be said.

    single, base: (T,) scores, NaN where not known.
    """

    tasks: list[str]
    kept: dict[str, np.ndarray]
    single: np.ndarray
    base: np.ndarray


def pair_scores(predictor: Predictor, table: Table) -> PairScores:
    """Predicted scores of every pair of the table, without those of which the predictor cannot say anything.

    Raises:
        RecipeError: the published rule has one score per pair, and in no unit: nothing to build sets from.
    """
    if predictor.rule != "ours":
        raise RecipeError("suggestions need what each task keeps, and the published rule scores pairs only. Fit with "
                          "--rule ours.")
    count = len(table.tasks)
    kept = {}
    for e in estimates(predictor, table):
        square = np.full((count, count), math.nan)
        said = np.array([not why for why in e.why_not], bool)
        both = np.where(said[:, None], e.kept if e.kept is not None else math.nan, math.nan)
        square[table.first, table.second], square[table.second, table.first] = both[:, 0], both[:, 1]
        kept[e.method] = square
    return PairScores(table.tasks, kept, table.by_task(table.single), table.by_task(table.base))


def in_sets(scores: PairScores, method: str, k: int) -> np.ndarray:
    """(T, T): q_ij of the head of this file, in sets of k."""
    kept = scores.kept[method]
    if method not in AVERAGES:
        return kept
    at_base, at_half, at_own = step_curve(k)
    curve = at_base * (scores.base / scores.single)[:, None] + at_half * kept + at_own
    return np.asarray(np.where(np.isnan(scores.base / scores.single)[:, None], kept, curve))


def kept_in(q: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """(k,) what each member keeps."""
    inner = q[np.ix_(members, members)]
    return np.asarray([np.delete(row, i).mean() for i, row in enumerate(inner)])


# ---- which set, which method ---------------------------------------------------------------------------------------------


def suggest(predictor: Predictor, table: Table, k: int) -> Suggestion:
    """The sets of k models and the method of highest predicted normalised score.

    Raises:
        RecipeError: k does not fit the number of models, or no set of k has all its pairs predicted.
    """
    count = len(table.tasks)
    if not 2 <= k <= count:
        raise RecipeError(f"--k {k}: wanted 2 to {count}, the number of models.")
    scores = pair_scores(predictor, table)
    found: list[SuggestedSet] = []
    tops: list[SuggestedSet] = []
    searched = f"all {math.comb(count, k):,} sets" if math.comb(count, k) <= MOST_SETS else (
        "sets grown one model at a time from every model, then bettered by swaps: not all")
    for method in scores.kept:
        q = in_sets(scores, method, k)
        ranked = [_suggested(scores, q, method, s) for s in _best_sets(q, k)]
        tops += ranked[:1]
        found += ranked
    if not found:
        raise RecipeError(f"no set of {k} models has all its pairs predicted. `anabranch mergeability predict` says why of "
                          "each pair.")
    if k == 2:
        found = [_with_interval(predictor, table, s) for s in found]
    found.sort(key=lambda s: (-s.score, s.method, s.tasks))
    tops.sort(key=lambda s: (-s.score, s.method))
    return Suggestion(k=k, searched=searched, best=found[:BEST], methods=tops, said=_said(scores, found[0], k))


def _with_interval(predictor: Predictor, table: Table, pair: SuggestedSet) -> SuggestedSet:
    rows = np.array([set(table.pair(i)) == set(pair.tasks) for i in range(len(table))])
    one = next(e for e in estimates(predictor, table.take(rows)) if e.method == pair.method)
    return pair.model_copy(update={"low": float(one.low[0]), "high": float(one.high[0])})


def _suggested(scores: PairScores, q: np.ndarray, method: str, members: Sequence[int]) -> SuggestedSet:
    kept = kept_in(q, members)
    place = list(members)
    gain = kept * scores.single[place] - scores.base[place]
    return SuggestedSet(tasks=[scores.tasks[i] for i in members], method=method, score=float(kept.mean()),
                        kept={scores.tasks[i]: float(v) for i, v in zip(members, kept, strict=True)},
                        gain=None if np.isnan(gain).any() else float(gain.mean()))


def _best_sets(q: np.ndarray, k: int) -> list[tuple[int, ...]]:
    """Up to BEST sets of largest mean q, best first; sets with a pair that is not known are left out."""
    count = len(q)
    pairs = q + q.T
    if math.comb(count, k) <= MOST_SETS:
        every = np.array(list(combinations(range(count), k)))
        total = sum(pairs[every[:, a], every[:, b]] for a, b in combinations(range(k), 2))
        order = np.argsort(-np.where(np.isnan(total), -math.inf, total), kind="stable")[:BEST]
        return [tuple(map(int, every[i])) for i in order if not np.isnan(total[i])]
    return _searched(np.where(np.isnan(pairs), -1e9, pairs), k)


def _searched(pairs: np.ndarray, k: int) -> list[tuple[int, ...]]:
    def total(members: Sequence[int]) -> float:
        return float(pairs[np.ix_(members, members)][np.triu_indices(len(members), 1)].sum())

    found = set()
    for start in range(len(pairs)):
        chosen = [start]
        while len(chosen) < k:
            joins = np.where(np.isin(np.arange(len(pairs)), chosen), -math.inf, pairs[:, chosen].sum(axis=1))
            chosen.append(int(joins.argmax()))
        better = len(pairs) > k
        while better:
            swaps = [[*(c for c in chosen if c != old), new]
                     for old in chosen for new in range(len(pairs)) if new not in chosen]
            best = max(swaps, key=total)
            better = total(best) > total(chosen) + 1e-12
            chosen = best if better else chosen
        found.add(tuple(sorted(chosen)))
    good = [s for s in found if total(s) > -1e8]
    return sorted(good, key=lambda s: (-total(s), s))[:BEST]


def _said(scores: PairScores, best: SuggestedSet, k: int) -> list[str]:
    lines = []
    if k > 2:
        lines.append(f"The predictor learnt from pairs; what {k} models keep together is put together from their pairs, and "
                     "has no interval. Differences as small as an interval of `predict` say nothing.")
    lines.append("Methods are with the parameters that the table's merges had.")
    if k > 2 and np.isnan(scores.base).any():
        lines.append("Base scores are not known, so what averaging of more than two models costs is understated.")
    elif best.gain is not None:
        lines.append(f"The best set is to bring {100 * best.gain:+.1f} points of score over the base on its tasks. A model "
                     "that tuning hardly moved keeps everything in any merge: look at the gain as well.")
    return lines


# ---- measured sets -----------------------------------------------------------------------------------------------------


def set_trials(scores: PairScores, measured: Sequence[MeasuredSet]) -> Mapping[str, float]:
    """How predictions of sets compare with measured ones, and what following them costs.

    Returns:
        `r METHOD`, `error METHOD`: Pearson, and mean absolute error, over that method's sets.
        `regret METHOD`: the best set's measured normalised score less that of the set predicted best; `regret of random
        METHOD`: less the mean.
        `regret`, `regret of random`, `regret of the best method on average`: mean over sets of the best method's score less
        that of the method chosen by prediction, at random, or always the same.
        `regret of the best set`, `regret of a random set`: of choosing set and method at once.
        `not predicted`: measured sets (each with each method) of which nothing can be said: a task or method that the
        predictor's table does not hold, or a pair of which it cannot say anything.
    """
    lost = 0
    true: dict[tuple[str, ...], dict[str, float]] = {}
    said: dict[tuple[str, ...], dict[str, float]] = {}
    place = {task: i for i, task in enumerate(scores.tasks)}
    for one in measured:
        if one.method not in scores.kept or any(t not in place for t in one.tasks):
            lost += 1
            continue
        members = [place[t] for t in one.tasks]
        predicted = float(kept_in(in_sets(scores, one.method, len(members)), members).mean())
        actual = float((np.array(one.scores) / scores.single[members]).mean())
        lost += math.isnan(predicted) or math.isnan(actual)
        if not math.isnan(predicted) and not math.isnan(actual):
            key = tuple(sorted(one.tasks))
            true.setdefault(key, {})[one.method] = actual
            said.setdefault(key, {})[one.method] = predicted
    found: dict[str, float] = {"not predicted": float(lost)}
    for method in scores.kept:
        both = [(said[s][method], true[s][method]) for s in true if method in true[s]]
        if len(both) > 2:
            p, y = np.array(both).T
            # Alike in all sets: nothing to correlate.
            found[f"r {method}"] = float(np.corrcoef(p, y)[0, 1]) if min(np.ptp(p), np.ptp(y)) > 0 else 0.0
            found[f"error {method}"] = float(np.abs(p - y).mean())
            found[f"regret {method}"] = float(y.max() - y[p == p.max()].mean())
            found[f"regret of random {method}"] = float(y.max() - y.mean())
    return found | _regrets(true, said)


def _regrets(true: Mapping[tuple[str, ...], Mapping[str, float]],
             said: Mapping[tuple[str, ...], Mapping[str, float]]) -> dict[str, float]:
    if not true:
        return {}
    # Sets that share their methods can be compared; of several such groups, the one of most methods, then of most sets.
    groups = Counter(tuple(sorted(scores)) for scores in true.values())
    methods = max(groups, key=lambda g: (len(g), groups[g], g))
    whole = [s for s in true if set(methods) <= set(true[s])]
    y = np.array([[true[s][m] for m in methods] for s in whole])
    p = np.array([[said[s][m] for m in methods] for s in whole])
    best = y.max(axis=1)
    chosen = y[np.arange(len(y)), p.argmax(axis=1)]
    return {"sets": float(len(y)), "regret": float((best - chosen).mean()),
            "regret of random": float((best[:, None] - y).mean()),
            "regret of the best method on average": float((best - y[:, y.mean(axis=0).argmax()]).mean()),
            "regret of the best set": float(y.max() - y.reshape(-1)[p.argmax()]),
            "regret of a random set": float(y.max() - y.mean())}
