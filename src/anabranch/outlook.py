"""Small budgets -> the full one: what a pilot's losses say about every arm's loss after all the tokens. Pure.

    A  arms, `base` among them      P  places      R  rungs (small token budgets, ascending)      N  the full budget
    S  seeds      U  units of a place      B  draws      L  macro loss: mean over units of nats per response token

Each form turns an arm's curve L(n_1) .. L(n_R) into a loss at N. Which form is the default was decided by the record
(benchmarks/pilot_record), and so was TREND; docs/log.md keeps the figures of the forms that lost.

Intervals: every draw resamples units and seeds, the same for every arm, so that differences are paired; the uncertainty of
extrapolating is a trend whose weight z is drawn too: L(n_R) + z (log_linear - L(n_R)), z uniform in [-TREND, TREND] and the
same for all arms and places of a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anabranch.rows import generator
from anabranch.scores import PLACES, TIE, Place

Floats = NDArray[np.float64]
Form = Callable[[Floats, Floats, Floats, float], Floats]

BASE = "base"
DRAWS = 2000
# Simplest first: one training, one training with another batch, one training and an average with the base, then what needs
# several branches. A simpler arm is preferred to one whose forecast is no more than TIE lower.
SIMPLICITY = ("joint", "joint_batch", "joint_matched", "soup", "random", "stratified", "conflict_greedy", "kmeans", "merit")


class Observation(NamedTuple):
    """One unit's loss for one arm after a small budget; `base` has tokens = 0 and its seed is not looked at."""

    arm: str
    place: Place
    unit: str
    seed: int
    tokens: int
    loss: float


class Span(NamedTuple):
    """A forecast and its 95 % interval, nats."""

    value: float
    low: float
    high: float


# ---- forms: curves [..., R], base [...], log n [R], log N -> losses at N [...] ---------------------------------------


def persistence(curves: Floats, base: Floats, at: Floats, target: float) -> Floats:
    """The loss at the largest pilot budget, as it stands."""
    return np.asarray(curves[..., -1])


def log_linear(curves: Floats, base: Floats, at: Floats, target: float) -> Floats:
    """L = a + b log n by least squares."""
    return np.asarray(curves.mean(axis=-1) + _slope(curves, at) * (target - at.mean()))


def power_law(curves: Floats, base: Floats, at: Floats, target: float) -> Floats:
    """base - L = +-c n^p with p in [0, 1], least squares on logarithms; persistence where the sign changes on the way.

    p = 1 is as fast as a loss can change along a straight path, p < 0 would run back to the base.
    """
    gain = base[..., None] - curves
    same = (np.sign(gain) == np.sign(gain[..., -1:])).all(axis=-1) & (gain[..., -1] != 0)
    size = np.log(np.where(same[..., None], np.abs(gain), 1.0))
    power = np.clip(_slope(size, at), 0.0, 1.0)
    reached = np.exp(size.mean(axis=-1) + power * (target - at.mean()))
    return np.asarray(np.where(same, base - np.sign(gain[..., -1]) * reached, curves[..., -1]))


def damped(curves: Floats, base: Floats, at: Floats, target: float) -> Floats:
    """Half-way between persistence and log_linear: a trend that is believed by half."""
    return (persistence(curves, base, at, target) + log_linear(curves, base, at, target)) / 2


def _slope(curves: Floats, at: Floats) -> Floats:
    centred = at - at.mean()
    return np.asarray(curves @ centred / (centred @ centred))


FORMS: dict[str, Form] = {"persistence": persistence, "log_linear": log_linear, "power_law": power_law, "damped": damped}
DEFAULT_FORM = "persistence"
# The trend may as well go on as turn round. Intervals then hold 97 to 98 % of the measured differences on quadratics, and
# 56 to 100 % on trained models: a pilot does not know what it has not seen.
TREND = 1.0


# ---- the forecast ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outlook:
    """Losses at the full budget: `losses` [A, P], `draws` [B, A, P]; `curves` [A, P, R] are the pilot's own."""

    arms: tuple[str, ...]
    places: tuple[Place, ...]
    tokens: tuple[int, ...]
    curves: Floats
    losses: Floats
    draws: Floats

    def loss(self, arm: str, place: Place) -> Span:
        a, p = self.arms.index(arm), self.places.index(place)
        return self._span(self.losses[a, p], self.draws[:, a, p])

    def difference(self, arm: str, other: str, place: Place | None = None) -> Span:
        """loss(arm) - loss(other) at a place, or its mean over the places; negative: `arm` is forecast to be better."""
        a, o = self.arms.index(arm), self.arms.index(other)
        gap, draws = self.losses[a] - self.losses[o], self.draws[:, a] - self.draws[:, o]
        if place is None:
            return self._span(gap.mean(), draws.mean(axis=1))
        p = self.places.index(place)
        return self._span(gap[p], draws[:, p])

    def _span(self, value: float, draws: Floats) -> Span:
        low, high = np.quantile(draws, [0.025, 0.975])
        return Span(float(value), float(min(low, value)), float(max(high, value)))


def forecast(observations: Sequence[Observation], full_tokens: int, seed: int, *, form: str = DEFAULT_FORM,
             trend: float = TREND, draws: int = DRAWS) -> Outlook:
    """Every arm's loss at the full budget, at every place that has units.

    Args:
        observations: for each arm the same seeds, the same >= 2 budgets and the same units of a place; and the base.
        full_tokens: N, more than the largest budget.
        seed: of the draws.
        form: a key of FORMS.
        trend: largest weight of the trend in a draw.
    Raises:
        ValueError: observations are missing, budgets are fewer than 2 or not below N.
    """
    table: dict[tuple[object, ...], float] = {
        o[:5] if o.arm != BASE else (BASE, o.place, o.unit, 0, 0): o.loss for o in observations}
    arms = tuple(dict.fromkeys([BASE, *(o.arm for o in observations)]))
    places = tuple(p for p in PLACES if any(o.place == p for o in observations))
    tokens = tuple(sorted({o.tokens for o in observations if o.arm != BASE}))
    seeds = sorted({o.seed for o in observations if o.arm != BASE})
    if len(tokens) < 2 or tokens[0] < 1 or tokens[-1] >= full_tokens:
        raise ValueError(f"budgets {tokens} of {full_tokens} tokens: wanted at least two, all above 0 and below the full one")
    at, target = np.log(np.array(tokens, dtype=np.float64)), float(np.log(full_tokens))
    seed_picks = generator(seed, "pilot", "seeds").integers(0, len(seeds), (draws, len(seeds)))
    weights = generator(seed, "pilot", "trend").uniform(-trend, trend, draws)
    curves, losses, drawn = [], [], []
    for place in places:
        units = sorted({o.unit for o in observations if o.place == place})
        values = _values(table, arms, place, units, seeds, tokens)  # [A, R, S, U]
        curves.append(values.mean(axis=(2, 3)))
        losses.append(FORMS[form](curves[-1], curves[-1][0, :1], at, target))
        drawn.append(_draw(values, seed_picks, weights, generator(seed, "pilot", place), at, target, form))
    return Outlook(arms, places, tokens, np.stack(curves, axis=1), np.stack(losses, axis=1), np.stack(drawn, axis=2))


def _values(table: dict[tuple[object, ...], float], arms: Sequence[str], place: Place, units: Sequence[str],
            seeds: Sequence[int], tokens: Sequence[int]) -> Floats:
    """[A, R, S, U]; the base's loss stands at every budget and seed. Raises ValueError."""
    try:
        return np.array([[[[table[(BASE, place, u, 0, 0) if a == BASE else (a, place, u, s, n)] for u in units]
                           for s in seeds] for n in tokens] for a in arms], dtype=np.float64)
    except KeyError as error:
        arm, where, unit, seed, budget = error.args[0]
        raise ValueError(f"no loss of arm {arm} on {where} unit {unit!r} for seed {seed} at {budget} tokens") from error


def _draw(values: Floats, seed_picks: NDArray[np.int64], weights: Floats, random: np.random.Generator, at: Floats,
          target: float, form: str) -> Floats:
    """Losses at N [B, A] under resampled units and seeds, each draw with its own weight of the trend."""
    draws, units = len(weights), values.shape[-1]
    # how often each seed and unit was picked, as weights: the same means as indexing, without [B, A, R, S, U] numbers
    by_seed = np.stack([np.bincount(p, minlength=values.shape[2]) for p in seed_picks]) / values.shape[2]
    by_unit = np.stack([np.bincount(p, minlength=units) for p in random.integers(0, units, (draws, units))]) / units
    curves = np.einsum("arsu,bs,bu->bar", values, by_seed, by_unit, optimize=True)
    base = np.broadcast_to(curves[:, :1, 0], curves.shape[:2])
    told = FORMS[form](curves, base, at, target)
    return np.asarray(told + weights[:, None] * (log_linear(curves, base, at, target) - persistence(curves, base, at, target)))


# ---- the recommendation ----------------------------------------------------------------------------------------------


class Advice(NamedTuple):
    """`arm` is recommended; `tied` (simplest first) cannot be told from `best`, the arm with the lowest forecast."""

    arm: str
    best: str
    tied: tuple[str, ...]


def advise(outlook: Outlook) -> Advice:
    """The simplest arm whose score is within TIE (0.01 nats) of the lowest; a score is the mean loss over the places present.

    Simplicity is the order SIMPLICITY, then fewer branches, then the label. The base is no candidate. `tied` has the arms
    that are not shown to be worse than `best`: the 95 % interval of their score minus the best one's does not lie above 0.
    The recommendation does not wait for that: taking the simplest of the tied arms would nearly always mean joint training,
    and on quadratics it lost ten times as much (benchmarks/pilot_record, `regret` against `regret_of_simplest_tied`).
    """
    arms = sorted((a for a in outlook.arms if a != BASE), key=simplicity)
    best = min(arms, key=lambda a: outlook.difference(a, BASE).value)
    gaps = {a: outlook.difference(a, best) for a in arms}
    tied = tuple(a for a in arms if a == best or gaps[a].low <= 0)
    return Advice(next(a for a in arms if gaps[a].value <= TIE), best, tied)


def simplicity(arm: str) -> tuple[int, int, str]:
    """Sorting key: simplest arm first."""
    name, _, rest = arm.partition(":")
    return SIMPLICITY.index(name), int(rest) if rest.isdigit() else 0, arm


def jackknife(statistic: Callable[[NDArray[np.int64]], float], count: int, seed: int, *, blocks: int = 100) -> Span:
    """A statistic of `count` units and its 95 % interval, leaving out one unit (of many units: one block) at a time.

    Resampling with replacement would put identical units beside each other, and pairs of units are what it is about.

    Args:
        statistic: of the numbers of the units that are kept, ascending.
        count: T >= 3.
        blocks: at most so many parts are left out in turn; units are dealt to them by `seed`.
    """
    value = statistic(np.arange(count))
    parts = np.array_split(generator(seed, "jackknife").permutation(count), min(blocks, count))
    without = np.array([statistic(np.setdiff1d(np.arange(count), part)) for part in parts])
    error = float(np.sqrt((len(parts) - 1) / len(parts) * ((without - without.mean()) ** 2).sum()))
    return Span(value, value - 1.96 * error, value + 1.96 * error)
