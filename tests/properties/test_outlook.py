"""The pilot's forecast on curves whose answer is known, its rounding, and its recommendation as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.outlook import (
    FORMS,
    SIMPLICITY,
    Observation,
    Outlook,
    advise,
    forecast,
    jackknife,
    simplicity,
)
from anabranch.pilot_budget import rounded, shares_up_to
from anabranch.scores import PLACES, Place

UNITS = [f"u{i}" for i in range(8)]
FULL = 10_000
BASE_LOSS = 3.0


def observed(curves: Mapping[str, Callable[[int], float]], *, tokens: tuple[int, ...] = (100, 400), place: Place = "held_out",
             seeds: tuple[int, ...] = (0, 1), scatter: float = 0.0) -> list[Observation]:
    """Each arm's loss after n tokens is curve(n), shifted by the unit's own level; `scatter` differs by arm, unit and seed."""
    random = np.random.default_rng(0)
    seen = [Observation("base", place, u, 0, 0, BASE_LOSS + i / 10) for i, u in enumerate(UNITS)]
    for arm, curve in curves.items():
        seen += [Observation(arm, place, u, s, n, curve(n) + i / 10 + scatter * random.normal())
                 for i, u in enumerate(UNITS) for s in seeds for n in tokens]
    return seen


LEVEL = sum(range(len(UNITS))) / 10 / len(UNITS)  # mean of the units' own levels


@pytest.mark.parametrize(("form", "curve", "expected"), [
    ("persistence", lambda n: 5 - n / 400, 4.0),
    ("log_linear", lambda n: 4 - 0.1 * math.log(n), 4 - 0.1 * math.log(FULL)),
    ("damped", lambda n: 4 - 0.1 * math.log(n), 4 - 0.1 * (math.log(FULL) + math.log(400)) / 2),
    ("power_law", lambda n: BASE_LOSS - 0.01 * n**0.5, BASE_LOSS - 0.01 * FULL**0.5),
    ("power_law", lambda n: BASE_LOSS + 0.02 * n**0.25, BASE_LOSS + 0.02 * FULL**0.25),
])
def test_a_curve_of_the_form_s_own_kind_is_continued_exactly(form, curve, expected):
    got = forecast(observed({"joint": curve}), FULL, 0, form=form).loss("joint", "held_out").value
    assert got == pytest.approx(expected + LEVEL)


def test_power_law_where_the_sign_changes_stays_where_it_is():
    seen = observed({"joint": lambda n: BASE_LOSS + (0.5 if n == 100 else -0.25)})
    assert forecast(seen, FULL, 0, form="power_law").loss("joint", "held_out").value == pytest.approx(
        BASE_LOSS - 0.25 + LEVEL)


@pytest.mark.parametrize("form", FORMS)
def test_the_base_is_forecast_to_stay_what_it_is(form):
    view = forecast(observed({"joint": lambda n: 5 / n}), FULL, 0, form=form)
    assert view.loss("base", "held_out").value == pytest.approx(BASE_LOSS + LEVEL)


def test_intervals_are_paired_and_hold_the_trend():
    """What units share cancels in a difference; without scatter only the trend is uncertain, by at most its weight."""
    view = forecast(observed({"joint": lambda n: 2.0, "merit:2": lambda n: 2.0 - 0.1 * math.log(n / 400)}), FULL, 0, trend=0.5)
    gap = view.difference("merit:2", "joint", "held_out")
    most = 0.5 * 0.1 * math.log(FULL / 400)
    assert gap.value == pytest.approx(0.0, abs=1e-12)
    assert -most <= gap.low < -0.9 * most and 0.9 * most < gap.high <= most
    none = forecast(observed({"joint": lambda n: 2.0, "merit:2": lambda n: 2.0 - 0.1 * math.log(n / 400)}), FULL, 0, trend=0.0)
    assert none.difference("merit:2", "joint", "held_out")[1:] == pytest.approx((0.0, 0.0), abs=1e-12)


def test_intervals_of_scatter_are_about_as_wide_as_they_should_be():
    scatter = 0.2
    view = forecast(observed({"joint": lambda n: 2.0, "soup:2": lambda n: 2.0}, scatter=scatter), FULL, 0, trend=0.0)
    low, high = view.difference("soup:2", "joint", "held_out")[1:]
    error = scatter * math.sqrt(2 / (2 * len(UNITS)))  # of the mean over 8 units and 2 seeds of a difference
    # resampling units and seeds both counts the scatter twice at most, and few units give a rough figure
    assert 1.0 * error < high - low < 8 * error


def test_forecast_depends_on_nothing_but_its_input():
    seen = observed({"joint": lambda n: 2.0, "merit:2": lambda n: 1.9}, scatter=0.1)
    one, other = forecast(seen, FULL, 3), forecast(list(reversed(seen)), FULL, 3)
    for arm in ("joint", "merit:2"):
        assert one.loss(arm, "held_out") == pytest.approx(other.loss(arm, "held_out"))


@pytest.mark.parametrize(("tokens", "full"), [((100,), 1000), ((100, 400), 400)])
def test_budgets_that_cannot_be_extrapolated_are_refused(tokens, full):
    with pytest.raises(ValueError, match="budgets"):
        forecast(observed({"joint": lambda n: 2.0}, tokens=tokens), full, 0)


def test_a_missing_loss_is_named():
    seen = [o for o in observed({"joint": lambda n: 2.0}) if (o.unit, o.seed, o.tokens) != ("u3", 1, 400)]
    with pytest.raises(ValueError, match="'u3' for seed 1 at 400"):
        forecast(seen, FULL, 0)


# ---- the recommendation ----------------------------------------------------------------------------------------------


def outlook(scores: Mapping[str, float], spread: float) -> Outlook:
    """Forecasts at one place; every arm's draws are off by independent noise of this standard deviation."""
    arms = ("base", *scores)
    losses = np.array([[5.0], *[[x] for x in scores.values()]])
    draws = losses + np.random.default_rng(1).normal(size=(4000, len(arms), 1)) * spread
    return Outlook(arms, ("held_out",), (1, 2), np.repeat(losses[:, :, None], 2, axis=2), losses, draws)


@pytest.mark.parametrize(("scores", "spread", "arm", "tied"), [
    ({"joint": 2.0, "merit:2": 1.5}, 0.01, "merit:2", ("merit:2",)),
    ({"joint": 2.0, "merit:2": 1.5}, 1.0, "merit:2", ("joint", "merit:2")),  # lower, and not known to be
    ({"joint": 2.0, "merit:2": 1.995}, 0.1, "joint", ("joint", "merit:2")),  # a tie: the simpler one
    ({"joint": 2.0, "merit:2": 1.995}, 0.0001, "joint", ("merit:2",)),  # a tie in value is one however sure it is
    ({"merit:2": 1.5, "random:4": 1.501, "joint": 2.0}, 0.05, "random:4", ("random:4", "merit:2")),
    ({"merit:2": 1.5, "joint_matched:merit:2": 1.505, "joint": 2.0}, 0.05, "joint_matched:merit:2",
     ("joint_matched:merit:2", "merit:2")),
    ({"joint_batch:4": 1.5, "joint_matched:merit:2": 1.4, "soup:2": 1.45}, 0.3, "joint_matched:merit:2",
     ("joint_batch:4", "joint_matched:merit:2", "soup:2")),
    ({"joint": 1.0, "merit:2": 2.0}, 0.01, "joint", ("joint",)),
])
def test_recommendation(scores, spread, arm, tied):
    advice = advise(outlook(scores, spread))
    assert (advice.arm, advice.tied) == (arm, tied)
    assert advice.best == min(scores, key=lambda a: scores[a])


def test_simplicity_orders_every_kind_of_arm():
    arms = ["merit:2", "random:8", "random:4", "joint_matched:merit:2", "soup:2", "joint", "joint_batch:4", "stratified:4"]
    assert sorted(arms, key=simplicity) == ["joint", "joint_batch:4", "joint_matched:merit:2", "soup:2", "random:4", "random:8",
                                            "stratified:4", "merit:2"]
    assert set(SIMPLICITY) >= {"kmeans", "conflict_greedy"} and set(PLACES) == {"held_out", "transfer", "retention"}


# ---- rounding, jackknife ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.floats(0.001, 0.5), st.integers(0, 20))
def test_rounding_keeps_the_total_and_every_unit(samples, share, seed):
    names = [f"unit {i}" for i in range(len(samples))]
    counts = rounded(samples, names, share, seed)
    assert abs(sum(counts) - share * sum(samples)) < 1 + 1e-6
    assert all(math.floor(share * s - 1e-6) <= n <= math.ceil(share * s + 1e-6)
               for n, s in zip(counts, samples, strict=True))


def test_rounding_does_not_look_at_the_order_of_units():
    samples, names = [3, 9, 1, 40, 7, 7], list("abcdef")
    shuffled = [4, 0, 5, 2, 1, 3]
    counts = rounded(samples, names, 0.1, 5)
    assert rounded([samples[i] for i in shuffled], [names[i] for i in shuffled], 0.1, 5) == [counts[i] for i in shuffled]


def test_rounding_is_fair_over_seeds():
    """40 units of 10 rows at 4 %: each gets a row in 40 % of the seeds, and none is always left out."""
    names = [f"unit {i}" for i in range(40)]
    got = np.mean([rounded([10] * 40, names, 0.04, seed) for seed in range(400)], axis=0)
    assert got.mean() == pytest.approx(0.4, abs=0.002) and got.min() > 0.25 and got.max() < 0.55


def test_shares():
    assert shares_up_to(0.06) == pytest.approx([0.015, 0.06])


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    span = jackknife(lambda kept: float(values[kept].mean()), 5, 0)
    error = values.std(ddof=1) / math.sqrt(5)
    assert span == pytest.approx((4.0, 4.0 - 1.96 * error, 4.0 + 1.96 * error))
