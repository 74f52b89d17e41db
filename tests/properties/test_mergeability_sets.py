"""From pairs to sets: the parabola, the search against brute force, and what following a suggestion costs, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from anabranch.errors import RecipeError
from anabranch.mergeability import sets
from anabranch.mergeability.artifacts import Predictor
from anabranch.mergeability.predict import estimates, make_predictor
from anabranch.mergeability.sets import PairScores, in_sets, kept_in, pair_scores, set_trials, step_curve, suggest
from anabranch.mergeability.table import MeasuredSet, Table
from planted_pairs import planted, renamed

NAN = math.nan


def scores_of(count: int, seed: int = 0, method: str = "ties") -> PairScores:
    rng = np.random.default_rng(seed)
    kept = rng.uniform(0.5, 1.0, (count, count))
    np.fill_diagonal(kept, NAN)
    single, base = rng.uniform(0.6, 0.9, count), rng.uniform(0.1, 0.5, count)
    return PairScores([f"t{i}" for i in range(count)], {method: kept}, single, base)


@pytest.fixture(scope="module")
def asked() -> tuple[Predictor, Table]:
    table = planted(9, methods=("ties", "linear"))
    return make_predictor(table, ["ties", "linear"]), table


# ---- the curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 20])
def test_the_curve_is_exact_for_parabolas(k):
    rng = np.random.default_rng(k)
    weights = step_curve(k)
    assert sum(weights) == pytest.approx(1)
    for a, b, c in rng.standard_normal((5, 3)):
        at_base, at_half, at_own = (a * s * s + b * s + c for s in (0.0, 0.5, 1.0))
        found = weights[0] * at_base + weights[1] * at_half + weights[2] * at_own
        assert found == pytest.approx(a / k**2 + b / k + c)
    assert (step_curve(1), step_curve(2)) == ((0, 0, 1), (0, 1, 0))


def test_only_averages_shrink_a_step():
    for method in ("ties", "tsv", "arithmetic", "dare_ties"):
        scores = scores_of(5, method=method)
        assert in_sets(scores, method, 4) is scores.kept[method]
    for method in ("linear", "weight_avg", "token_weighted", "dare", "dare_linear"):
        scores = scores_of(5, method=method)
        assert np.allclose(in_sets(scores, method, 2), scores.kept[method], equal_nan=True)
        at_base, at_half, at_own = step_curve(4)
        q = in_sets(scores, method, 4)
        ratio = scores.base[3] / scores.single[3]
        assert q[3, 1] == pytest.approx(at_base * ratio + at_half * scores.kept[method][3, 1] + at_own)  # the row's task
        assert q[3, 1] < scores.kept[method][3, 1]
        unknown = replace(scores, base=np.where(np.arange(5) == 2, NAN, scores.base))
        half_known = in_sets(unknown, method, 4)
        assert np.array_equal(half_known[2], unknown.kept[method][2], equal_nan=True)  # no curve for this one
        assert np.allclose(np.delete(half_known, 2, 0), np.delete(q, 2, 0), equal_nan=True)


def test_what_members_keep_by_hand():
    q = np.array([[NAN, 0.9, 0.7, 0.2], [0.8, NAN, 0.6, 0.1], [0.5, 0.3, NAN, 0.4], [1, 1, 1, NAN]])
    assert kept_in(q, [0, 1]).tolist() == [0.9, 0.8]
    assert np.allclose(kept_in(q, [0, 1, 2]), [0.8, 0.7, 0.4])
    assert np.allclose(kept_in(q, [3, 2]), [1, 0.4])
    q[0, 2] = NAN
    assert np.array_equal(np.isnan(kept_in(q, [0, 1, 2])), [True, False, False])


# ---- the search ------------------------------------------------------------------------------------------------------


def best_by_hand(q: np.ndarray, k: int) -> list[tuple[tuple[int, ...], float]]:
    every = [(s, float(np.mean([q[i, j] for i in s for j in s if i != j]))) for s in combinations(range(len(q)), k)]
    return sorted([e for e in every if not math.isnan(e[1])], key=lambda e: -e[1])


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_all_sets_are_tried(k):
    q = scores_of(8, seed=k).kept["ties"]
    q[1, 4] = NAN
    wanted = best_by_hand(q, k)[:sets.BEST]
    found = sets._best_sets(q, k)
    assert found == [s for s, _ in wanted]
    assert all(kept_in(q, s).mean() == pytest.approx(value) for s, value in wanted)
    assert (k == 8) == (not found) and not any({1, 4} <= set(s) for s in found)


def test_too_many_sets_are_searched(monkeypatch):
    """A planted set that stands out is found, without every set being tried; so it is on random scores, mostly."""
    q = scores_of(40, seed=1).kept["ties"] * 0.7
    planted_set = (3, 11, 12, 20, 27, 33, 39)
    q[np.ix_(planted_set, planted_set)] += 0.25
    q[5, :] = q[:, 6] = NAN
    assert math.comb(40, 7) > sets.MOST_SETS
    found = sets._best_sets(q, 7)
    assert found[0] == planted_set and len(set(found)) == len(found)
    assert all(list(s) == sorted(set(s)) and len(s) == 7 and not {5, 6} & set(s) for s in found)
    monkeypatch.setattr(sets, "MOST_SETS", 0)
    hits = 0
    for seed in range(12):
        q = scores_of(16, seed=seed).kept["ties"]
        pairs = q + q.T
        values = {s: sum(pairs[i, j] for i, j in combinations(s, 2)) for s in combinations(range(16), 5)}
        hits += sets._best_sets(q, 5)[0] == max(values, key=values.__getitem__)
    assert hits >= 11  # growing alone finds 9
    q = np.full((6, 6), NAN)
    q[:3, :3] = 0.5
    assert sets._best_sets(q, 4) == [] and sets._best_sets(q, 3) == [(0, 1, 2)]
    assert sets._best_sets(scores_of(6).kept["ties"], 6) == [(0, 1, 2, 3, 4, 5)]


# ---- suggestions -----------------------------------------------------------------------------------------------------


def test_a_suggestion_is_the_best_of_all_methods(asked):
    predictor, table = asked
    found = suggest(predictor, table, 3)
    scores = pair_scores(predictor, table)
    wanted = []
    for method in ("ties", "linear"):
        q = in_sets(scores, method, 3)
        wanted += [(value, method, s) for s, value in best_by_hand(q, 3)]
    wanted.sort(reverse=True)
    assert [(s.method, tuple(scores.tasks.index(t) for t in s.tasks)) for s in found.best] == [
        (m, s) for _, m, s in wanted[:5]]
    assert [s.score for s in found.best] == pytest.approx([v for v, _, _ in wanted[:5]])
    assert {s.method for s in found.methods} == {"ties", "linear"} and found.methods[0] == found.best[0]
    for s in (*found.best, *found.methods):
        assert list(s.kept) == s.tasks and s.score == pytest.approx(np.mean(list(s.kept.values())))
        place = [scores.tasks.index(t) for t in s.tasks]
        gain = np.mean([s.kept[t] * scores.single[i] - scores.base[i] for t, i in zip(s.tasks, place, strict=True)])
        assert s.gain == pytest.approx(gain)
    assert found.k == 3 and found.searched == "all 84 sets" and any("pairs" in line for line in found.said)


def test_pair_scores_are_the_predictions_in_both_directions(asked):
    predictor, table = asked
    holes = table.metrics["distance"].copy()
    holes[7] = NAN
    scores = pair_scores(predictor, replace(table, metrics={**table.metrics, "distance": holes}))
    one, two = table.first, table.second
    for e in estimates(predictor, table):
        assert e.kept is not None
        square = scores.kept[e.method]
        known = np.arange(len(table)) != 7
        assert np.array_equal(square[one, two][known], e.kept[known, 0])
        assert np.array_equal(square[two, one][known], e.kept[known, 1])
        assert np.isnan(square[one[7], two[7]]) and np.isnan(square[two[7], one[7]]) and np.isnan(np.diag(square)).all()
    assert np.array_equal(scores.single[one], table.single[:, 0]) and np.array_equal(scores.base[two], table.base[:, 1])


def test_without_base_scores_it_says_what_that_hides():
    table = planted(8, methods=("linear",))
    table = replace(table, base=np.full_like(table.base, NAN))
    predictor = make_predictor(table, ["linear"], cases=(0,))
    found = suggest(predictor, table, 3)
    assert all(s.gain is None for s in found.best) and any("Base scores are not known" in line for line in found.said)


def test_suggestions_that_cannot_be_made(asked):
    predictor, table = asked
    for k in (-1, 0, 1, 10):
        with pytest.raises(RecipeError, match="wanted 2 to 9"):
            suggest(predictor, table, k)
    blind = replace(table, metrics={})
    with pytest.raises(RecipeError, match="no set of 3 models has all its pairs predicted"):
        suggest(predictor, blind, 3)
    alone = table.take(table.touches([0]) == 1)  # a star: no three of them have all their pairs
    assert len(suggest(predictor, alone, 2).best) == 5
    with pytest.raises(RecipeError, match="no set of 3"):
        suggest(predictor, alone, 3)
    with pytest.raises(RecipeError, match="--rule ours"):
        suggest(predictor.model_copy(update={"rule": "published", "ours": []}), table, 3)


def test_a_suggestion_for_tasks_never_seen(asked):
    predictor, table = asked
    found = suggest(predictor, renamed(table, [f"new{i}" for i in range(9)]), 4)
    assert all(t.startswith("new") for s in found.best for t in s.tasks)


# ---- measured sets ---------------------------------------------------------------------------------------------------


def by_hand() -> PairScores:
    """Two methods whose predictions of a set of two are half the sum of these."""
    ties = np.array([[NAN, 0.8, 0.6], [0.8, NAN, 0.5], [0.6, 0.5, NAN]])
    tsv = np.array([[NAN, 0.7, 0.7], [0.7, NAN, 0.7], [0.9, 0.6, NAN]])
    return PairScores(["a", "b", "c"], {"ties": ties, "tsv": tsv}, np.array([1.0, 0.5, 0.8]), np.array([0.1, 0.1, 0.1]))


def test_regrets_by_hand():
    """Predicted: ab ties 0.80, tsv 0.70; ac ties 0.60, tsv 0.80. Measured, normalised: ab 0.9, 0.6; ac 0.7, 0.5."""
    measured = [MeasuredSet(("a", "b"), "ties", (0.9, 0.45)), MeasuredSet(("b", "a"), "tsv", (0.25, 0.7)),
                MeasuredSet(("a", "c"), "ties", (0.8, 0.48)), MeasuredSet(("a", "c"), "tsv", (0.6, 0.32)),
                MeasuredSet(("a", "x"), "ties", (0.1, 0.1)), MeasuredSet(("a", "c"), "unknown", (0.1, 0.1))]
    assert set_trials(by_hand(), measured) == pytest.approx({
        "not predicted": 2, "sets": 2, "regret": (0 + 0.2) / 2, "regret of random": (0 + 0.3 + 0 + 0.2) / 4,
        "regret of the best method on average": 0, "regret of a random set": 0.9 - 0.675,
        "regret of the best set": 0.0})  # of equal predictions the first


def test_correlation_error_and_regret_of_a_method_by_hand():
    measured = [MeasuredSet(("a", "b"), "ties", (0.9, 0.45)), MeasuredSet(("a", "c"), "ties", (0.8, 0.8)),
                MeasuredSet(("b", "c"), "ties", (0.2, 0.32))]
    found = set_trials(by_hand(), measured)  # predicted 0.8, 0.6, 0.5; measured 0.9, 0.9, 0.4
    p, y = np.array([0.8, 0.6, 0.5]), np.array([0.9, 0.9, 0.4])
    wanted = ((p - p.mean()) * (y - y.mean())).sum() / math.sqrt(((p - p.mean())**2).sum() * ((y - y.mean())**2).sum())
    assert found["r ties"] == pytest.approx(wanted) and found["error ties"] == pytest.approx((0.1 + 0.3 + 0.1) / 3)
    assert found["regret ties"] == pytest.approx(0) and found["regret of random ties"] == pytest.approx(0.9 - 2.2 / 3)
    worse = [replace(one, scores=(0.45, 0.225)) if one.tasks == ("a", "b") else one for one in measured]
    assert set_trials(by_hand(), worse)["regret ties"] == pytest.approx(0.9 - 0.45)
    assert set_trials(by_hand(), worse)["regret of the best set"] == pytest.approx(0.9 - 0.45)


def test_sets_measured_by_different_methods():
    """Only sets that share the methods can be compared: those of most methods, then of most sets."""
    measured = [MeasuredSet(("a", "b"), "ties", (0.9, 0.45)), MeasuredSet(("a", "b"), "tsv", (0.7, 0.25)),
                MeasuredSet(("a", "c"), "tsv", (0.1, 0.1)), MeasuredSet(("b", "c"), "ties", (0.1, 0.1))]
    found = set_trials(by_hand(), measured)
    assert found["sets"] == 1 and found["regret"] == 0 and found["regret of random"] == pytest.approx(0.15)
    third = replace(by_hand(), kept={**by_hand().kept, "linear": by_hand().kept["ties"]})
    other = [*measured, MeasuredSet(("b", "c"), "linear", (0.3, 0.3))]
    assert set_trials(third, other)["sets"] == 1


def test_nothing_to_judge_and_nothing_to_tell_apart():
    assert set_trials(by_hand(), []) == {"not predicted": 0}
    assert set_trials(by_hand(), [MeasuredSet(("x", "y"), "ties", (0.1, 0.1))]) == {"not predicted": 1}
    alike = PairScores(list("abcd"), {"ties": np.full((4, 4), 0.9)}, np.ones(4), np.full(4, 0.5))
    measured = [MeasuredSet(tuple(s), "ties", (v, v, v)) for s, v in (("abc", 0.9), ("abd", 0.6), ("bcd", 0.9))]
    found = set_trials(alike, measured)
    assert found["r ties"] == 0 and found["regret ties"] == pytest.approx(0.1) == found["regret of random ties"]
    assert not any(math.isnan(v) for v in found.values())
    assert set_trials(alike, [replace(m, scores=(0.5, 0.5, 0.5)) for m in measured])["r ties"] == 0


def test_sets_predicted_from_pairs_of_a_planted_law(asked):
    """Sets of three that obey the mean over partners exactly are predicted as well as their pairs."""
    predictor, table = asked
    scores = pair_scores(predictor, table)
    true = np.full((9, 9), NAN)
    true[table.first, table.second], true[table.second, table.first] = table.kept("ties").T
    measured = [MeasuredSet(tuple(table.tasks[i] for i in s), "ties", tuple(kept_in(true, s) * scores.single[list(s)]))
                for s in combinations(range(9), 3)]
    found = set_trials(scores, measured)
    assert found["r ties"] > 0.9 and found["regret ties"] < 0.5 * found["regret of random ties"] and found["sets"] == 84
