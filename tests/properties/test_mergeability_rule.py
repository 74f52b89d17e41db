"""Our rule against planted laws and a reference written by hand; what must not matter to it; when it says nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from anabranch.errors import RecipeError
from anabranch.mergeability import rule
from anabranch.mergeability.artifacts import Predictor
from anabranch.mergeability.predict import (
    complete,
    estimates,
    has_gap,
    make_predictor,
    predict,
    regressors,
    unseen_tasks,
)
from anabranch.mergeability.table import Table
from planted_pairs import NO_SLOPES, SLOPES, planted, renamed, swapped, task_effects

TASKS = 12


@pytest.fixture(scope="module")
def table() -> Table:
    return planted(TASKS)


@pytest.fixture(scope="module")
def predictor(table: Table) -> Predictor:
    return make_predictor(table, ["ties"])


def left_out_scores(table: Table, unseen: int, penalty: float, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured normalised scores of pairs with so many of their tasks left out."""
    both = [(fold.prepared.predict(fold.prepared.rule("ties", penalty, shrinkage), fold.pairs),
             table.normalised("ties")[fold.pairs]) for fold in rule.left_out(rule.Fitter(table, ["ties"]), unseen)]
    predicted, measured = map(np.concatenate, zip(*both, strict=True))
    return predicted, measured


def loss_of(predictor: Predictor, name: str) -> list[float]:
    """What more of an input does to the loss: own and partner of the gap, each by rank and as it is; one of another."""
    own = predictor.ours[0]
    return [beta for what, beta in zip(regressors(predictor), own.beta, strict=True) if what == name]


# ---- planted laws ----------------------------------------------------------------------------------------------------


def test_a_planted_law_is_found_again_on_pairs_left_out():
    clean, individual = [], []
    for unseen, pairs in ((0, 120), (1, 240), (2, 120)):
        for effects, found in ((0.05, clean), (0.2, individual)):
            predicted, measured = left_out_scores(planted(16, effects=effects), unseen, 3.0, 1.0)
            assert len(measured) == pairs
            found.append(float(np.corrcoef(predicted, measured)[0, 1]))
    assert min(clean) > 0.93
    assert individual[0] > individual[1] + 0.03 > individual[2] + 0.06  # what a task's other merges say of it


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_signs_and_order_of_what_matters(sign):
    slopes = {"own": sign * SLOPES["own"], "partner": SLOPES["partner"], "distance": sign * SLOPES["distance"]}
    found = make_predictor(planted(16, slopes=slopes, effects=0.05), ["ties"], cases=(2,))
    assert regressors(found) == ["distance", *["fine_tuning_gap"] * 4, "noise", "noise"]
    gap = loss_of(found, "fine_tuning_gap")
    own, partner = sum(gap[:2]), sum(gap[2:])
    assert sign * loss_of(found, "distance")[0] > 0 and sign * own > 0 and partner > 0
    assert abs(own) > 1.5 * partner > 4 * max(map(abs, loss_of(found, "noise")))


def test_who_suffers_and_who_harms():
    table = planted(16, slopes=NO_SLOPES, effects=0.5, middle=-2.5)
    suffers, harms = task_effects(16)
    own = make_predictor(table, ["ties"], cases=(1,)).ours[0]
    for wanted, other, found in ((suffers, harms, own.suffers), (harms, suffers, own.harms)):
        values = np.array([found[t] for t in table.tasks])
        assert np.corrcoef(values, wanted)[0, 1] > 0.8 and abs(np.corrcoef(values, other)[0, 1]) < 0.6


def test_without_metrics_there_are_only_task_effects():
    table = replace(planted(10, slopes=NO_SLOPES, effects=0.5), metrics={})
    table = replace(table, base=np.full_like(table.base, np.nan))
    found = make_predictor(table, ["ties"])
    own = found.ours[0]
    assert found.columns == [] and own.beta == [] and not has_gap(found)
    score = estimates(found, table)[0].score
    assert np.corrcoef(score, table.normalised("ties"))[0, 1] > 0.9
    strangers = estimates(found, renamed(table, [f"new{i}" for i in range(10)]))[0]
    assert np.ptp(strangers.score) == 0 and strangers.score[0] == pytest.approx(own.ceiling - math.exp(own.intercept))
    half = estimates(found, renamed(table, [*table.tasks[:5], *(f"new{i}" for i in range(5))]))[0]
    known = table.touches(list(range(5)))
    assert np.ptp(half.score[known == 0]) == 0 and np.ptp(half.score[known == 1]) > 0.01


def test_a_task_that_was_not_in_the_table_has_no_effect(table):
    part = table.take(table.touches([3, 7]) == 0)
    found = rule.fit(part, ["ties"], (1,))[1]["ties"].rule
    seen = np.setdiff1d(np.arange(TASKS), [3, 7])
    assert np.all(found.suffers[[3, 7]] == 0) and np.all(found.harms[[3, 7]] == 0)
    assert np.all(found.suffers[seen] != 0) and np.all(found.harms[seen] != 0)
    saved = make_predictor(part, ["ties"], cases=(1,))
    assert saved.tasks == [table.tasks[t] for t in seen]
    assert list(saved.ours[0].suffers) == list(saved.ours[0].harms) == saved.tasks


@pytest.mark.parametrize("methods", [["ties", "linear"], ["linear", "ties"], ["linear"]])
def test_methods_do_not_meet(methods):
    two = planted(TASKS, methods=("ties", "linear"))
    both = {o.method: o for o in make_predictor(two, methods).ours}
    alone = make_predictor(replace(two, outcomes={"linear": two.outcomes["linear"]}), ["linear"]).ours[0]
    assert list(both) == methods and both["linear"] == alone


def test_merges_that_helped():
    table = planted(10, middle=-5.0)
    kept = table.kept("ties")
    assert (kept > 1.01).mean() > 0.3
    found = make_predictor(table, ["ties"])
    e = estimates(found, table)[0]
    assert found.ours[0].ceiling > kept.max() and e.kept is not None and (e.kept > 1).mean() > 0.2
    assert np.corrcoef(e.score, table.normalised("ties"))[0, 1] > 0.9 and not any(e.why_not)


# ---- against a reference ---------------------------------------------------------------------------------------------


HEIGHTS = norm.ppf([(k + 0.5) / 65 for k in range(65)])


def ranks(values: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Gaussian rank among `training`, from 65 quantiles, equal ones with the mean of their ranks; by loops."""
    points = np.quantile(training, [k / 64 for k in range(65)])
    places = sorted(set(points.tolist()))
    return np.interp(values, places, [np.mean(HEIGHTS[points == place]) for place in places])


def reference_inputs(table: Table, train: np.ndarray) -> np.ndarray:
    """Of all directed pairs, less their means over those in `train`."""
    gap, noise = 1 - table.base / table.single, np.stack([table.metrics["noise1"], table.metrics["noise2"]], axis=1)
    ways = [np.concatenate([table.metrics["distance"]] * 2)]
    ways += [np.concatenate([v[:, a], v[:, b]]) for v in (gap, noise) for a, b in ((0, 1), (1, 0))]
    rows = np.concatenate([train, train])
    x = [ranks(v, v[rows]) for v in ways] + [(v - v[rows].mean()) / v[rows].std() for v in ways[1:3]]
    return np.stack(x, axis=1) - np.stack(x, axis=1)[rows].mean(axis=0)


def reference(table: Table, train: np.ndarray, penalty: float, shrinkage: float, x: np.ndarray) -> np.ndarray:
    """(n, 2) kept scores of all pairs as predicted from the pairs in `train`: closed forms on all directed pairs."""
    own, partner = np.concatenate([table.first, table.second]), np.concatenate([table.second, table.first])
    rows = np.concatenate([train, train])
    kept = np.concatenate([table.kept("ties")[:, 0], table.kept("ties")[:, 1]])
    ceiling = kept[rows].max() + kept[rows].std()
    target = np.log(ceiling - kept[rows])
    beta = np.linalg.solve(x[rows].T @ x[rows] + penalty * np.eye(x.shape[1]), x[rows].T @ (target - target.mean()))
    f = target.mean() + x @ beta
    if math.isfinite(shrinkage):  # a and b of least squares with shrinkage * (|a|^2 + |b|^2)
        tasks = len(table.tasks)
        who = np.concatenate([np.eye(tasks)[own], np.eye(tasks)[partner]], axis=1)
        effects = np.linalg.solve(who[rows].T @ who[rows] + shrinkage * np.eye(2 * tasks), who[rows].T @ (target - f[rows]))
        f = f + who @ effects
    return (ceiling - np.exp(f)).reshape(2, -1).T


@pytest.mark.parametrize("shrinkage", [1.0, 10.0, math.inf])
@pytest.mark.parametrize("penalty", [3.0, 300.0])
def test_a_fit_is_ridge_and_shrunken_means(table, penalty, shrinkage):
    train = table.touches([2, 9]) == 0
    fitter = rule.Fitter(table, ["ties"])
    prepared = fitter.prepare(train)
    found = prepared.rule("ties", penalty, shrinkage)
    wanted = reference(table, train, penalty, shrinkage, reference_inputs(table, train))
    assert np.allclose(prepared.predict(found, np.arange(len(table))), wanted.mean(axis=1), atol=1e-6)
    f = found.log_loss(prepared.x, *rule.directions(table))
    assert np.allclose(found.kept(f).reshape(2, -1).T, wanted, atol=1e-6)


def test_penalty_shrinkage_and_interval_are_those_of_tasks_left_out():
    """Everything that `fit` chooses or says, formed again from the reference, one left-out fold after another."""
    table = planted(8, noise=0.4, effects=0.3, seed=4)
    y, n = table.normalised("ties"), len(table)
    alone = [(table.touches([t]) == 0, table.touches([t]) == 1) for t in range(8)]
    apart = [(table.touches([table.first[i], table.second[i]]) == 0, np.arange(n) == i) for i in range(n)]

    inputs = {train.tobytes(): reference_inputs(table, train) for train, _ in (*alone, *apart)}

    def scores(train: np.ndarray, penalty: float, shrinkage: float) -> np.ndarray:
        return reference(table, train, penalty, shrinkage, inputs[train.tobytes()]).mean(axis=1)

    def error(folds: Sequence[tuple[np.ndarray, np.ndarray]], penalty: float, shrinkage: float) -> float:
        return float(np.mean([np.mean((scores(a, penalty, shrinkage) - y)[b] ** 2) for a, b in folds]))

    penalties = {p: error(apart, p, math.inf) for p in rule.PENALTIES}
    penalty = min(penalties, key=penalties.__getitem__)
    shrinkages = {s: error(alone, penalty, s) for s in rule.SHRINKAGES}
    shrinkage = min(shrinkages, key=shrinkages.__getitem__)
    assert penalty > min(rule.PENALTIES) and 1 < shrinkage < math.inf  # nothing at an end, where a wrong search also stops
    own = make_predictor(table, ["ties"]).ours[0]
    assert (own.penalty, own.shrinkage) == (penalty, shrinkage)
    for reach, folds in zip(own.reach[1:], (alone, apart), strict=True):
        off, missed, spread = [], [], []
        for train, held in folds:
            kept = table.kept("ties")[train]
            ceiling = kept.max() + kept.std()
            guess = scores(train, penalty, shrinkage)[held]
            off += list(np.abs(np.log(np.maximum(ceiling - y[held], 1e-3)) - np.log(np.maximum(ceiling - guess, 1e-3))))
            missed += list(np.abs(y[held] - guess))
            spread += list(np.abs(y[held] - y[train].mean()))
        assert reach.pairs == len(off) == {1: 2 * n, 2: n}[reach.unseen]
        assert reach.half_width == pytest.approx(sorted(off)[math.ceil(0.9 * (len(off) + 1)) - 1], rel=1e-4)
        assert (reach.error, reach.error_of_mean) == pytest.approx((np.mean(missed), np.mean(spread)), rel=1e-4)
    e = estimates(make_predictor(table, ["ties"]), renamed(table, [f"new{i}" for i in range(8)]))[0]
    width = own.reach[2].half_width
    middle = np.log(own.ceiling - e.score)
    assert width is not None and np.allclose(e.low, np.maximum(own.ceiling - np.exp(middle + width), 0))
    assert np.allclose(e.high, own.ceiling - np.exp(middle - width))


def test_columns_by_hand():
    low, high = np.zeros(50), np.ones(50)
    c = rule.make_columns({"half": np.concatenate([low, high]), "flat": np.full(100, 7.0), "ten": np.linspace(0, 10, 100)})
    half, flat, ten = (next(k for k in c if k.name == name) for name in ("half", "flat", "ten"))
    one, zero = half.rank(np.array([1.0, 0.0]))
    assert one == pytest.approx(-zero, abs=0.05) and 0.7 < one < 0.9  # the mean of a normal's upper half: 0.80
    assert np.all(flat.rank(np.array([7.0, 9.0])) == 0) and np.all(flat.standard(np.array([7.0, 9.0])) == 0)
    assert flat.beyond(np.array([7.0]))[0] == 0 and flat.beyond(np.array([7.1]))[0] > 1e6
    there = ten.rank(np.linspace(-5, 15, 50))
    assert np.all(np.diff(there) >= 0) and there[0] == rule.STEPS[0] and there[-1] == rule.STEPS[-1]
    assert ten.rank(np.array([5.0]))[0] == pytest.approx(0, abs=1e-9)
    assert np.allclose(ten.beyond(np.array([0, 4, 10, 12, -5.0])), [0, 0, 0, 0.2, 0.5])
    assert np.allclose(ten.standard(np.array([5.0, 5 + np.linspace(0, 10, 100).std()])), [0, 1])


def test_inputs_of_the_pair_and_of_either_task(table):
    found = rule.inputs_of(table)
    assert list(found) == ["distance", "fine_tuning_gap", "noise"] and found["noise"].shape == (len(table), 2)
    assert np.array_equal(found["noise"][:, 1], table.metrics["noise2"])
    assert np.allclose(found["fine_tuning_gap"], 1 - table.base / table.single)
    x, names = rule.design(rule.make_columns(found), found, len(table))
    assert x.shape == (2 * len(table), 7) and names.count("fine_tuning_gap") == 4
    there, back = x[: len(table)], x[len(table):]
    assert np.allclose(there[:, [1, 2, 3, 4]], back[:, [3, 4, 1, 2]]) and np.array_equal(there[:, 0], back[:, 0])
    assert not np.allclose(there[:, [1, 2]], there[:, [3, 4]])
    own = replace(table, metrics={"fine_tuning_gap1": table.base[:, 0], "fine_tuning_gap2": table.base[:, 1], "lone1": found[
        "distance"]})
    assert np.array_equal(rule.inputs_of(own)["fine_tuning_gap"], table.base)  # measured gaps go before ours
    assert rule.inputs_of(own)["lone1"].shape == (len(table),)


# ---- what must not matter --------------------------------------------------------------------------------------------


def same(one: Table, two: Table, rows: np.ndarray | None = None, *, cases: Sequence[int] = (1, 2)) -> None:
    """Fits of both tables say the same of pair i of the first and rows[i] of the second."""
    a, b = (make_predictor(t, ["ties"], cases=cases) for t in (one, two))
    assert (a.ours[0].penalty, a.ours[0].shrinkage) == (b.ours[0].penalty, b.ours[0].shrinkage)
    e, f = estimates(a, one)[0], estimates(b, two)[0]
    order = np.arange(len(one)) if rows is None else rows
    assert np.allclose(e.score, f.score[order], atol=1e-9, rtol=0)
    pairs = zip(a.ours[0].reach, b.ours[0].reach, strict=True)
    assert all(r.half_width == pytest.approx(s.half_width, abs=1e-7) for r, s in pairs)


def test_which_task_stands_first(table):
    rows = np.random.default_rng(3).random(len(table)) < 0.5
    other = swapped(table, rows)
    same(table, other, cases=(0, 1, 2))
    a, b = (estimates(make_predictor(t, ["ties"], cases=(1,)), t)[0] for t in (table, other))
    assert a.kept is not None and b.kept is not None
    assert np.allclose(a.kept, np.where(rows[:, None], b.kept[:, ::-1], b.kept), atol=1e-9)
    assert not np.allclose(a.kept, b.kept, atol=1e-3)


def test_the_order_of_pairs_and_of_tasks(table):
    order = np.random.default_rng(4).permutation(len(table))
    same(table, table.take(order), np.argsort(order))
    names = np.random.default_rng(5).permutation(TASKS)
    place = np.argsort(names)
    same(table, replace(table, tasks=[table.tasks[t] for t in names], first=place[table.first], second=place[table.second]))


def test_a_metric_that_is_constant(table):
    same(table, replace(table, metrics={**table.metrics, "flat": np.full(len(table), 3.7)}))


@pytest.mark.parametrize("bend", [lambda x: np.exp(3 * x), lambda x: x**3 - 5, lambda x: np.log(x + 0.01)])
def test_a_metric_on_another_scale(table, predictor, bend):
    other = replace(table, metrics={**table.metrics, "distance": bend(table.metrics["distance"])})
    a, b = (estimates(make_predictor(t, ["ties"], cases=(1,)), t)[0].score for t in (table, other))
    assert np.abs(a - b).max() < 0.05 * a.std()


def test_a_task_and_its_copy():
    """Two tasks with equal everything are told apart by nothing."""
    table = planted(9)
    n = len(table)
    gain = {"single": table.single.copy(), "base": table.base.copy()}
    metrics = {k: v.copy() for k, v in table.metrics.items()}
    scores = table.outcomes["ties"].copy()
    for i in range(n):
        if table.first[i] == 1:  # (1, j) as (0, j)
            j = int(np.flatnonzero((table.first == 0) & (table.second == table.second[i]))[0])
            scores[i] = scores[j]
            for values in (*metrics.values(), *gain.values()):
                values[i] = values[j]
    pair = int(np.flatnonzero((table.first == 0) & (table.second == 1))[0])
    for values in (scores, *gain.values()):
        values[pair, 1] = values[pair, 0]
    metrics["noise2"][pair] = metrics["noise1"][pair]
    twin = replace(table, **gain, metrics=metrics, outcomes={"ties": scores})
    found = make_predictor(twin, ["ties"])
    effects = found.ours[0]
    assert effects.suffers["task00"] == pytest.approx(effects.suffers["task01"], abs=1e-12)
    assert effects.harms["task00"] == pytest.approx(effects.harms["task01"], abs=1e-12)
    e = estimates(found, twin)[0]
    assert e.kept is not None and e.kept[pair, 0] == pytest.approx(e.kept[pair, 1], abs=1e-12)
    of = [e.score[(twin.first == t) & (twin.second > 1)] for t in (0, 1)]
    assert np.allclose(*of, atol=1e-12)


@pytest.mark.parametrize("unseen", [0, 1, 2])
def test_what_is_left_out_has_no_say(table, unseen):
    """Neither in coefficients and effects nor in ranks: altered, all of it stays."""
    rng = np.random.default_rng(6)
    for fold in rule.left_out(rule.Fitter(table, ["ties"]), unseen)[:4]:
        held = np.ones(len(table), bool)
        held[np.flatnonzero(fold.prepared.rows[: len(table)])] = False
        assert held[fold.pairs].all() and not held.all()
        touched = table.touches(np.union1d(table.first[fold.pairs], table.second[fold.pairs]).tolist())
        if unseen == 2:
            assert len(fold.pairs) == 1 and np.array_equal(held, touched > 0)
        if unseen == 1:
            out = set.intersection(*({table.first[i], table.second[i]} for i in fold.pairs))
            assert len(out) == 1 and np.array_equal(held, table.touches(list(out)) == 1)
        other = {k: np.where(held, rng.permutation(v) + 1, v) for k, v in table.metrics.items()}
        scores = np.where(held[:, None], rng.random((len(table), 2)), table.outcomes["ties"])
        altered = rule.Fitter(replace(table, metrics=other, outcomes={"ties": scores}), ["ties"])
        again = altered.prepare(~held)
        for penalty, shrinkage in ((3.0, 1.0), (100.0, math.inf)):
            a, b = (p.rule("ties", penalty, shrinkage) for p in (fold.prepared, again))
            assert a.ceiling == b.ceiling and a.intercept == b.intercept and np.array_equal(a.mean, b.mean)
            for name in ("beta", "suffers", "harms"):
                assert np.array_equal(getattr(a, name), getattr(b, name)), name


# ---- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "level", "rank"), [
    (9, 0.9, 9), (10, 0.9, 10), (18, 0.9, 18), (19, 0.9, 18), (20, 0.9, 19), (99, 0.9, 90), (100, 0.9, 91), (3, 0.5, 2),
    (8, 0.9, None), (0, 0.9, None), (1, 0.5, 1)])
def test_conformal_ranks(count, level, rank):
    residuals = np.random.default_rng(count).permutation(count) + 1.0
    assert rule.conformal(residuals, level) == (math.inf if rank is None else rank)


def test_conformal_coverage():
    """Of 30 and one more, exchangeable: the one lies within with probability 28 / 31, whatever the distribution."""
    rng = np.random.default_rng(7)
    for draw in (rng.standard_exponential, rng.standard_cauchy):
        values = np.abs(draw((6000, 31)))
        covered = np.mean([v[30] <= rule.conformal(v[:30]) for v in values])
        assert abs(covered - 28 / 31) < 0.016  # four standard errors


def test_intervals_hold_the_score_and_widen_with_what_is_not_known(table, predictor):
    names = [*table.tasks[:6], *(f"new{i}" for i in range(6))]
    e = estimates(predictor, renamed(table, names))[0]
    assert np.all(e.low < e.score) and np.all(e.score < e.high)
    reach = {r.unseen: r.half_width for r in predictor.ours[0].reach}
    assert 0 < reach[0] < reach[1] < reach[2]
    kept = predictor.ours[0].ceiling
    width = np.log(kept - e.low) - np.log(kept - e.score)
    assert np.allclose(width, [reach[int(u)] for u in unseen_tasks(predictor, renamed(table, names))])


def test_intervals_hold_scores_next_to_the_ceiling():
    """Hardly anything is lost: scores above the point where the scale of residuals is cut off."""
    table = planted(10, slopes={"own": 4.0, "partner": 2.0, "distance": 2.0}, middle=-13.0, noise=0.01, effects=0.01)
    table = replace(table, outcomes={"ties": table.outcomes["ties"] - 0.049 * table.single})
    found = make_predictor(table, ["ties"])
    e = estimates(found, table)[0]
    assert (e.score > found.ours[0].ceiling - 1e-3).any()
    assert np.all(e.low <= e.score) and np.all(e.score <= e.high)


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_unseen_tasks_are_counted(table, predictor):
    names = [*table.tasks[:10], "new", "newer"]
    asked = renamed(table, names)
    wanted = (table.first >= 10).astype(int) + (table.second >= 10)
    assert np.array_equal(unseen_tasks(predictor, asked), wanted) and set(wanted) == {0, 1, 2}
    assert [p.unseen for p in predict(predictor, asked)] == wanted.tolist()


def test_predictions_are_by_pair_then_by_method():
    table = planted(8, methods=("ties", "linear"))
    found = make_predictor(table, ["ties", "linear"])
    said = predict(found, table.take(np.array([5, 2])))
    assert [(p.task1, p.task2, p.method) for p in said] == [(*table.pair(i), m) for i in (5, 2) for m in ("ties", "linear")]
    by_method = {e.method: e for e in estimates(found, table)}
    for p, i in zip(said, (5, 5, 2, 2), strict=True):
        e = by_method[p.method]
        assert (p.score, p.low, p.high) == (e.score[i], e.low[i], e.high[i])
        assert e.kept is not None and p.kept == e.kept[i].tolist() and p.score == pytest.approx(sum(p.kept) / 2)


def with_metric(table: Table, name: str, rows: Sequence[int], value: float) -> Table:
    values = table.metrics[name].copy()
    values[list(rows)] = value
    return replace(table, metrics={**table.metrics, name: values})


def test_cannot_say_for_what_is_missing(table, predictor):
    said = predict(predictor, with_metric(table, "distance", [4], math.nan))
    assert [bool(p.cannot_say) for p in said] == [i == 4 for i in range(len(table))]
    assert said[4].cannot_say == "distance is missing"
    assert (said[4].score, said[4].low, said[4].high, said[4].kept, said[4].moved) == (None, None, None, [], [])
    without = replace(table, metrics={k: v for k, v in table.metrics.items() if k != "noise1"})
    assert all("noise is missing" in p.cannot_say for p in predict(predictor, without))
    blind = replace(table, base=np.full_like(table.base, math.nan), metrics={})
    assert all("distance is missing; fine_tuning_gap is missing; noise is missing" in p.cannot_say
               for p in predict(predictor, blind))
    half = table.base.copy()
    half[4, 1] = math.nan
    assert [i for i, p in enumerate(predict(predictor, replace(table, base=half))) if p.cannot_say] == [4]


@pytest.mark.parametrize("swap", [False, True])
def test_cannot_say_where_a_value_of_the_pair_stands_for_one_of_either_task(table, predictor, swap):
    """And the other way round: the names agree, the meanings do not."""
    metrics = {k: v for k, v in table.metrics.items() if not k.startswith("distance" if swap else "noise")}
    metrics |= {"distance1": table.metrics["distance"], "distance2": table.metrics["distance"]} if swap else {
        "noise": table.metrics["noise1"]}
    said = predict(predictor, replace(table, metrics=metrics))
    assert all(("distance" if swap else "noise") + " is missing" in p.cannot_say for p in said)


def test_cannot_say_far_outside_and_can_slightly_outside(table, predictor):
    low, high = table.metrics["distance"].min(), table.metrics["distance"].max()
    for beyond, says in ((0.0, True), (0.45, True), (0.55, False)):  # half of the range that was seen
        for value in (high + beyond * (high - low), low - beyond * (high - low)):
            p = predict(predictor, with_metric(table, "distance", [4], value))[4]
            assert (p.score is not None) == says, value
            assert says or ("distance is" in p.cannot_say and f"{value:.4g}" in p.cannot_say and f"{high:.4g}" in p.cannot_say)
    base = table.base.copy()
    base[4, 0] = 3 * table.single[4, 0]  # the own model is much worse than the base: never seen
    assert "fine_tuning_gap is -2" in predict(predictor, replace(table, base=base))[4].cannot_say


def test_a_gap_beyond_all_seen_still_counts(table, predictor):
    """Its rank ends with the table; the gap itself goes on."""
    gap = 1 - table.base / table.single
    low, high = gap.min(), gap.max()
    scores = []
    for share in (0.0, 0.2, 0.4):
        base = table.base.copy()
        base[:, 0] = (1 - high - share * (high - low)) * table.single[:, 0]
        scores.append(estimates(predictor, replace(table, base=base))[0].score)
    assert np.all(scores[0] != scores[1]) and np.all(scores[1] != scores[2])


def test_cannot_say_with_too_few_pairs_left_out():
    table = planted(6)
    small = table.take(table.touches([0]) < 1)
    small = small.take(np.arange(len(small)) > 1)
    found = make_predictor(small, ["ties"])
    reach = {r.unseen: r for r in found.ours[0].reach}
    assert reach[2].pairs < 9 and reach[2].half_width is None and reach[1].half_width is not None
    said = predict(found, renamed(table, [f"new{i}" for i in range(6)]))
    assert all(f"too few pairs in the table for an interval ({reach[2].pairs} with both" in p.cannot_say for p in said)


def test_cannot_say_without_skill(table, predictor):
    """Errors hardly smaller than those of guessing the mean, with as many tasks unseen."""
    own = predictor.ours[0]
    for share, says in ((0.94, True), (0.96, False), (1.5, False)):
        reach = [r.model_copy(update={"error": share * r.error_of_mean}) if r.unseen == 1 else r for r in own.reach]
        asked = predictor.model_copy(update={"ours": [own.model_copy(update={"reach": reach})]})
        said = predict(asked, renamed(table, [*table.tasks[:-1], "new"]))
        for p in said:
            assert (p.score is not None) == (says or p.unseen == 0)
            assert p.score is not None or "hardly smaller than those of guessing the mean" in p.cannot_say


def test_outcomes_without_any_law_give_no_confidence():
    """Chance alone sometimes looks like skill, by a little; never by much, and mostly not at all."""
    says, ratios = [], []
    for seed in range(8):
        table = planted(8, seed=seed, slopes=NO_SLOPES, effects=0.0, noise=0.3)
        found = make_predictor(table, ["ties"], cases=(2,))
        reach = found.ours[0].reach[0]
        ratios.append(reach.error / reach.error_of_mean)
        says.append(not estimates(found, renamed(table, [f"new{i}" for i in range(8)]))[0].why_not[0])
    assert np.mean(says) <= 0.5 and min(ratios) > 0.8
    constant = replace(table, outcomes={"ties": 0.9 * table.single})
    assert all(p.cannot_say for p in predict(make_predictor(constant, ["ties"]), constant))


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_parts_add_up_to_first_order(table, predictor, shift):
    """score = c - exp(f): what is left over is no more than the second-order term, and little near the middle."""
    own = predictor.ours[0]
    own = own.model_copy(update={"mean": [m + shift for m in own.mean]})
    e = estimates(predictor.model_copy(update={"ours": [own]}), table)[0]
    middle = own.ceiling - math.exp(own.intercept)
    moved = sum(e.parts.values())
    assert e.kept is not None and set(e.parts) == {"the other merges of these tasks", "distance", "fine_tuning_gap", "noise"}
    step = np.log(own.ceiling - e.kept) - own.intercept  # (n, 2)
    rest = (math.exp(own.intercept) * np.exp(np.abs(step)) * step**2 / 2).mean(axis=1)
    assert np.all(np.abs(e.score - middle - moved) <= rest + 1e-12)
    near = np.abs(step).max(axis=1) < 0.25
    assert near.sum() >= 3 and np.corrcoef(moved[near], (e.score - middle)[near])[0, 1] > 0.9
    assert abs(np.corrcoef(e.parts["distance"], table.metrics["distance"])[0, 1] + 1) < 0.3


def test_what_moved_it_is_in_points_largest_first(table, predictor):
    e, said = estimates(predictor, table)[0], predict(predictor, table)
    for i, p in enumerate(said):
        sizes = [abs(m.points) for m in p.moved]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4
        assert all(m.points == pytest.approx(100 * e.parts[m.input][i]) for m in p.moved)
    strangers = predict(predictor, renamed(table, [f"new{i}" for i in range(TASKS)]))
    assert all({m.input for m in p.moved} == {"distance", "fine_tuning_gap", "noise"} for p in strangers)


def test_base_scores_that_are_not_known_leave_the_gap_out(table):
    found = make_predictor(replace(table, base=np.full_like(table.base, math.nan)), ["ties"], cases=(1,))
    assert not has_gap(found) and regressors(found) == ["distance", "noise", "noise"]
    assert has_gap(make_predictor(table, ["ties"], cases=(1,)))


# ---- what a table must be --------------------------------------------------------------------------------------------


def test_complete_rows(table):
    nothing = np.full(len(table), math.nan)
    holes = with_metric(with_metric(table, "distance", [4, 6], math.nan), "noise2", [6], math.nan)
    holes = replace(holes, metrics={**holes.metrics, "empty": nothing})
    with pytest.raises(RecipeError) as error:
        complete(holes, None, drop_missing=False)
    message = str(error.value)
    assert f"2 of {len(table)} pairs lack values" in message and "--drop-missing" in message and "empty" not in message
    assert "distance: task00 + task05, task00 + task07" in message and "noise2: task00 + task07" in message
    kept, methods, dropped = complete(holes, None, drop_missing=True)
    assert (methods, dropped, len(kept)) == (["ties"], 2, len(table) - 2) and "empty" not in kept.metrics
    assert [kept.pair(i) for i in range(len(kept))] == [table.pair(i) for i in range(len(table)) if i not in (4, 6)]
    blind = replace(table, base=np.full_like(table.base, math.nan))
    assert complete(blind, ["ties"], drop_missing=False)[2] == 0


def test_what_cannot_be_fitted(table):
    dead = replace(table, outcomes={**table.outcomes, "dead": np.full((len(table), 2), math.nan)})
    assert complete(dead, None, drop_missing=False)[1] == ["ties"]
    for asked, given, words in [
            (["tie", "dead"], dead, ["`tie`", "Did you mean `ties`?", "`dead`: all its scores are missing"]),
            (None, replace(dead, outcomes={"dead": dead.outcomes["dead"]}), ["every score of a merge is missing"]),
            (None, replace(table, outcomes={}, single=np.full_like(table.single, math.nan)),
             ["no merge is scored", "single_score1"])]:
        with pytest.raises(RecipeError) as error:
            complete(given, asked, drop_missing=True)
        assert all(w in str(error.value) for w in words), str(error.value)


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_too_few_tasks(tasks):
    with pytest.raises(RecipeError, match=rf"{tasks * (tasks - 1) // 2} complete pairs of {tasks} tasks"):
        make_predictor(planted(tasks), ["ties"])
    with pytest.raises(RecipeError, match="0 complete pairs of 0 tasks"):
        make_predictor(planted(tasks).take(np.zeros(0, int)), ["ties"])


def test_five_tasks_are_enough():
    assert len(make_predictor(planted(5), ["ties"]).tasks) == 5


# ---- the published rule ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> tuple[Table, Predictor]:
    table = planted(10, slopes={"own": 0.0, "partner": 0.0, "distance": 2.0}, effects=0.02, distance="activation_l2_distance")
    return table, make_predictor(table, ["ties"], "published")


def test_the_published_rule_in_points(paper):
    """Its score on a line through the training scores; one number per pair; only published metrics."""
    table, found = paper
    assert found.rule == "published" and found.ours == [] and found.columns == [] and len(found.published) == 1
    e, y = estimates(found, table)[0], table.normalised("ties")
    assert list(found.published[0].weights) == ["activation_l2_distance"] == list(e.parts) and e.kept is None
    assert np.corrcoef(e.score, y)[0, 1] > 0.9
    slope, intercept = np.polyfit(table.metrics["activation_l2_distance"], y, 1)
    assert np.allclose(e.score, slope * table.metrics["activation_l2_distance"] + intercept)
    assert np.allclose(sum(e.parts.values()), e.score - found.published[0].intercept)
    reach = {r.unseen: r for r in found.published[0].reach}
    assert all(r.half_width is not None and r.error < 0.5 * r.error_of_mean for r in reach.values())
    assert {unseen: r.pairs for unseen, r in reach.items()} == {0: 90, 1: 90, 2: 45}
    assert np.allclose(e.high - e.score, reach[0].half_width) and np.allclose(e.score - e.low, reach[0].half_width)
    assert all(p.kept == [] and p.score is not None for p in predict(found, table))


def test_the_published_rule_cannot_say_either(paper):
    table, found = paper
    said = predict(found, with_metric(table, "activation_l2_distance", [3], math.nan))
    assert [i for i, p in enumerate(said) if p.cannot_say] == [3] and "activation_l2_distance missing" in said[3].cannot_say
    with pytest.raises(RecipeError, match="no metric"):
        make_predictor(planted(8), ["ties"], "published")
