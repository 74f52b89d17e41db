"""What holds for every partition, and what sets the methods apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.conflict import partition_gain, principal_axes
from anabranch.errors import PlanError
from anabranch.partition import BALANCED, PARTITIONERS, partition, whole_shares
from anabranch.recipe import Recipe

GROUPING = (*BALANCED, "conflict_greedy")


@dataclass
class Case:
    names: list[str]
    samples: list[int]
    scores: np.ndarray
    cosine: np.ndarray
    groups: int
    seed: int

    def split(self, method: str, order: list[int] | None = None, capacities: list[float] | None = None) -> np.ndarray:
        o = list(range(len(self.names))) if order is None else order
        return partition(method, [self.names[i] for i in o], [self.samples[i] for i in o], self.scores[o],
                         self.cosine[np.ix_(o, o)], self.groups, self.seed, capacities)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few distinct scores and very uneven samples, so that ties and forced cuts are common."""
    count = draw(st.integers(1, 40))
    samples = draw(st.lists(st.sampled_from([1, 2, 3, 50, 1000]) | st.integers(1, 200), min_size=count, max_size=count))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    axes = draw(st.integers(1, 4))
    scores = rng.integers(-2, 3, size=(count, axes)) * 1.0 if draw(st.booleans()) else rng.normal(size=(count, axes))
    cosine = np.round(np.corrcoef(rng.normal(size=(count, 5))), draw(st.sampled_from([1, 9]))).reshape(count, count)
    names = [f"unit-{i}" for i in rng.permutation(count)]
    return Case(names, samples, scores, cosine, draw(st.integers(1, count)), draw(st.integers(0, 5)))


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(GROUPING))
def test_covers_and_no_group_is_empty(case, method):
    groups = case.split(method)
    assert groups.shape == (len(case.names),)  # one group each: disjoint
    assert sorted(set(groups.tolist())) == list(range(case.groups))


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(BALANCED))
def test_balance_within_the_largest_unit(case, method):
    weight = np.bincount(case.split(method), weights=case.samples)
    assert np.abs(weight - sum(case.samples) / case.groups).max() <= max(case.samples) + 1e-9


def test_balance_where_nearest_cuts_alone_would_break_it():
    """K = 9 -> 5 -> 3 -> 2 -> 1, and at each level a unit of 1000 lies across the target, a little towards its left.

    The nearest cuts give group 0 2015 + 1000 samples; its share is 18000 / 9 = 2000 and the largest unit 1000.
    """
    parts = {"a": [100] * 20 + [1] * 15 + [1000], "b": [1] * 17 + [1000, 1000], "c": [100] * 7 + [1] * 67 + [1000],
             "d": [100] * 37, "e": [100] * 75 + [1]}
    samples = [n for part in parts.values() for n in part]
    part = "".join(name * len(values) for name, values in parts.items())
    heavy = [i for i, n in enumerate(samples) if n == 1000]  # in a, b, b, c
    scores = np.zeros((len(samples), 4))
    for axis, (left, across) in enumerate([("abcd", heavy[3]), ("abc", heavy[1]), ("ab", heavy[2]), ("a", heavy[0])]):
        scores[:, axis] = [0 if p in left else 2 for p in part]
        scores[across, axis] = 1
    groups = partition("merit", [f"{i:04d}" for i in range(len(samples))], samples, scores, np.eye(len(samples)), 9, 0)
    assert np.abs(np.bincount(groups, weights=samples) - sum(samples) / 9).max() <= 1000


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from((*GROUPING, "joint", "soup")), st.randoms(use_true_random=False))
def test_order_of_input_changes_nothing(case, method, random):
    order = list(range(len(case.names)))
    random.shuffle(order)
    assert case.split(method, order).tolist() == case.split(method)[order].tolist()


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 30), st.integers(1, 6), st.integers(0, 9), st.randoms(use_true_random=False))
def test_kmeans_covers_is_order_free_and_repeats(count, groups, seed, random):
    rng = np.random.default_rng(seed)
    case = Case([f"u{i}" for i in rng.permutation(count)], [1] * count, rng.normal(size=(count, 4)), np.eye(count),
                min(groups, count), seed)
    found = case.split("kmeans")
    order = list(range(count))
    random.shuffle(order)
    assert sorted(set(found.tolist())) == list(range(case.groups))
    assert case.split("kmeans", order).tolist() == found[order].tolist()
    in_name_order = found[np.argsort(case.names)]
    assert list(dict.fromkeys(in_name_order.tolist())) == list(range(case.groups))


def blobs(size: int = 5) -> Case:
    """Four clusters of units, far apart on two axes; names carry the cluster."""
    rng = np.random.default_rng(0)
    centres = np.array([(-9, -3), (-9, 3), (9, -3), (9, 3)])
    points = np.repeat(centres, size, axis=0) + rng.normal(size=(4 * size, 2)) * 0.1
    cosine = np.kron(np.eye(4), np.ones((size, size))) * 1.5 - 0.5 + 0.001 * rng.normal(size=(4 * size, 4 * size))
    names = [f"{c}{i}" for c in "abcd" for i in range(size)]
    return Case(names, [7] * len(names), points, (cosine + cosine.T) / 2, 4, 0)


@pytest.mark.parametrize("method", ["merit", "kmeans", "conflict_greedy"])
def test_methods_that_separate_find_the_clusters(method):
    groups = blobs().split(method).reshape(4, 5)
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0].tolist())) == 4


def test_stratified_gives_every_group_a_share_of_every_cluster():
    groups = blobs(8).split("stratified").reshape(4, 8)
    assert all(np.bincount(row).tolist() == [2, 2, 2, 2] for row in groups)


def test_stratified_drifts_less_than_random_and_merit_more():
    rng = np.random.default_rng(5)
    gradients = rng.normal(size=(96, 12)) * [5, 4, 3, *[1] * 9]
    cosine = (unit := gradients / np.linalg.norm(gradients, axis=1, keepdims=True)) @ unit.T
    scores, _ = principal_axes(cosine, 8)
    case = Case([f"u{i:02d}" for i in range(96)], rng.integers(5, 20, 96).tolist(), scores, cosine, 4, 0)

    def gain(method: str, seed: int = 0) -> float:
        case.seed = seed
        return partition_gain(cosine, case.split(method), case.samples)

    chance = np.mean([gain("random", seed) for seed in range(20)])
    assert gain("stratified") < 0.8 * chance
    assert gain("merit") > 3 * chance


def test_merit_by_hand():
    """Axis 1 at the sample-weighted median, then each half at its own along axis 2."""
    names = list("abcdef")
    samples = [6, 2, 2, 2, 4, 4]  # W = 20: along axis 1 a+b+c reach 10 exactly
    scores = np.array([(0, 5), (1, 1), (2, 2), (3, 9), (4, 8), (5, 7)], dtype=float)
    # low half, by axis 2: b2 c2 a6 of 10 -> nearest to 5 is b+c; high half: f4 e4 d2 of 10 -> f is nearer than f+e
    assert partition("merit", names, samples, scores, np.eye(6), 4, 0).tolist() == [1, 0, 0, 3, 3, 2]
    # three groups: two of 13.3 together: a+b+c+d = 12 beats 16; the low part then splits along axis 2 at 6 = b+c+... a
    assert partition("merit", names, samples, scores, np.eye(6), 3, 0).tolist() == [1, 0, 0, 1, 2, 2]


def test_merit_uses_the_axes_again_when_levels_run_out():
    scores = np.arange(8.0)[:, None]
    assert partition("merit", list("abcdefgh"), [1] * 8, scores, np.eye(8), 8, 0).tolist() == list(range(8))


def test_merit_breaks_ties_by_name():
    groups = partition("merit", ["d", "b", "a", "c"], [1] * 4, np.zeros((4, 1)), np.eye(4), 2, 0)
    assert groups.tolist() == [1, 0, 0, 1]


def test_conflict_greedy_starts_from_the_most_conflicting_pair():
    cosine = np.eye(5)
    for i, j, value in [(1, 3, -0.9), (0, 1, 0.8), (2, 3, 0.7), (4, 3, 0.6)]:
        cosine[i, j] = cosine[j, i] = value
    groups = partition("conflict_greedy", list("abcde"), [1] * 5, np.zeros((5, 1)), cosine, 2, 0)
    assert groups.tolist() == [0, 0, 1, 1, 1]


def test_random_depends_on_the_seed_and_on_nothing_else_of_chance():
    names = [f"u{i:02d}" for i in range(30)]
    draws = [tuple(Case(names, [1] * 30, np.zeros((30, 1)), np.eye(30), 3, s).split("random")) for s in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len(set(draws)) == 3


def test_joint_is_one_group_and_soup_is_none():
    case = blobs()
    assert set(case.split("joint").tolist()) == {0}
    case.groups = 30  # more branches than units: each sees everything
    assert set(case.split("soup").tolist()) == {-1}


def test_the_recipe_and_the_registry_know_the_same_methods():
    split = Recipe.model_fields["split"].annotation
    assert tuple(PARTITIONERS) == get_args(split.model_fields["method"].annotation)


@pytest.mark.parametrize("method", [*GROUPING, "kmeans"])
def test_more_groups_than_units_is_refused(method):
    with pytest.raises(PlanError, match=r"got 3 for 2 units.*lower `split.groups` to 2"):
        partition(method, ["a", "b"], [1, 1], np.zeros((2, 1)), np.eye(2), 3, 0)


def test_kmeans_refuses_too_few_distinct_places():
    with pytest.raises(PlanError, match=r"2 distinct places of 5 units.*Lower `split.groups` to 2"):
        partition("kmeans", list("abcde"), [1] * 5, np.array([[0.0], [0], [0], [1], [1]]), np.eye(5), 3, 0)


def test_all_problems_come_in_one_message():
    with pytest.raises(PlanError) as caught:
        partition("merit", ["a", "a"], [1, 0], np.full((2, 1), np.nan), np.eye(3), 0, 0)
    for part in ("units of one name: a", "a (0)", "not finite", "got shape (3, 3)", "split.groups: got 0"):
        assert part in str(caught.value)


def test_an_unknown_method_gets_the_closest_name():
    with pytest.raises(PlanError, match=r"unknown method `stratify`.*`stratified`"):
        partition("stratify", ["a"], [1], np.zeros((1, 1)), np.eye(1), 1, 0)


# ---- groups of unequal capacity -------------------------------------------------------------------------------------

SPEEDS = (st.sampled_from([1.0, 2.0, 3.0, 10.0]) | st.floats(0.05, 20) | st.sampled_from([1e-6, 0.1, 1e6])
          | st.floats(5e-324, 1.7e308))  # any number > 0 that a recipe can hold


@st.composite
def uneven(draw: st.DrawFn) -> tuple[Case, list[float]]:
    case = draw(cases())
    return case, draw(st.lists(SPEEDS, min_size=case.groups, max_size=case.groups))


def targets(case: Case, capacities: list[float]) -> list[Fraction]:
    """t_k = W c_k / C, exactly; a capacity counts as it is written."""
    exact = [Fraction(repr(c)) for c in capacities]
    return [sum(case.samples) * c / sum(exact) for c in exact]


@settings(max_examples=400, deadline=None)
@given(uneven(), st.sampled_from(BALANCED))
def test_balance_by_capacity(drawn, method):
    """The bound in partition.py, in exact numbers: t_k - m - F_k <= W_k <= t_k + m, and no group is empty."""
    case, capacities = drawn
    groups = case.split(method, capacities=capacities)
    assert sorted(set(groups.tolist())) == list(range(case.groups))
    heaviest, wanted = max(case.samples), targets(case, capacities)
    for k, target in enumerate(wanted):
        weight = sum(s for s, group in zip(case.samples, groups, strict=True) if group == k)
        too_small = sum(max(Fraction(0), heaviest - t) for j, t in enumerate(wanted) if j != k)
        assert target - heaviest - too_small <= weight <= target + heaviest
        if min(wanted) >= heaviest:
            assert abs(weight - target) <= heaviest


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(BALANCED))
def test_balance_within_the_largest_unit_where_every_group_can_hold_one(data, method):
    """As for equal groups. Drawn so that every target is at least the largest unit."""
    samples = data.draw(st.lists(st.integers(1, 30), min_size=30, max_size=60))
    capacities = data.draw(st.lists(st.floats(1, 5), min_size=2, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    case = Case([f"u{i}" for i in rng.permutation(len(samples))], samples, rng.normal(size=(len(samples), 2)),
                np.eye(len(samples)), len(capacities), 0)
    wanted = targets(case, capacities)
    if min(wanted) < max(samples):
        return
    weight = np.bincount(case.split(method, capacities=capacities), weights=samples)
    assert max(abs(Fraction(int(w)) - t) for w, t in zip(weight, wanted, strict=True)) <= max(samples)


@settings(max_examples=150, deadline=None)
@given(uneven(), st.sampled_from(BALANCED), st.randoms(use_true_random=False))
def test_order_of_input_changes_nothing_by_capacity_either(drawn, method, random):
    case, capacities = drawn
    order = list(range(len(case.names)))
    random.shuffle(order)
    whole = case.split(method, capacities=capacities)
    assert case.split(method, order, capacities).tolist() == whole[order].tolist()


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([*GROUPING, "joint", "soup"]), SPEEDS)
def test_equal_capacities_are_none_at_all(case, method, speed):
    if method == "joint":
        case.groups = 1
    assert case.split(method, capacities=[speed] * case.groups).tolist() == case.split(method).tolist()


def halved_before_there_were_capacities(names: list[str], samples: list[int], scores: np.ndarray, groups: int) -> list[int]:
    """`merit` as it was while all groups were equal, in plain words: K groups into ceil(K/2) and floor(K/2), each cut the one
    nearest to the proportion of the part among those that keep both sides within the largest unit of their share of all."""
    whole, heaviest = sum(samples), max(samples)
    result = [0] * len(names)

    def divide(part: list[int], count: int, first: int, level: int) -> None:
        if count == 1:
            for unit in part:
                result[unit] = first
            return
        part = sorted(part, key=lambda i: (scores[i, level % scores.shape[1]], names[i]))
        left, weight = (count + 1) // 2, sum(samples[i] for i in part)
        cuts = [(n, sum(samples[i] for i in part[:n])) for n in range(left, len(part) - (count - left) + 1)]
        sound = [(n, w) for n, w in cuts if abs(w - Fraction(left * whole, groups)) <= heaviest
                 and abs(weight - w - Fraction((count - left) * whole, groups)) <= heaviest]
        cut = min(sound or cuts, key=lambda c: (abs(c[1] - Fraction(weight * left, count)), c[0]))[0]
        divide(part[:cut], left, first, level + 1)
        divide(part[cut:], count - left, first + left, level + 1)

    divide(list(range(len(names))), groups, 0, 0)
    return result


@settings(max_examples=300, deadline=None)
@given(cases())
def test_plans_without_capacities_are_what_they_always_were(case):
    assert case.split("merit").tolist() == halved_before_there_were_capacities(case.names, case.samples, case.scores,
                                                                               case.groups)


@settings(max_examples=100, deadline=None)
@given(uneven(), st.sampled_from(BALANCED), st.integers(2, 9))
def test_only_the_ratios_of_capacities_count(drawn, method, factor):
    case, _ = drawn
    speeds = [float(1 + (k * 7) % 5) for k in range(case.groups)]
    assert case.split(method, capacities=[factor * s for s in speeds]).tolist() == case.split(
        method, capacities=speeds).tolist()


def test_a_fast_worker_gets_its_share_by_hand():
    """Eight equal units along one axis, capacities 1 : 3 -> 2 and 6; the cut is where axis 1 puts it."""
    scores = np.arange(8.0)[:, None]
    assert partition("merit", list("hgfedcba"), [5] * 8, scores, np.eye(8), 2, 0, [1, 3]).tolist() == [0, 0] + [1] * 6
    assert partition("merit", list("hgfedcba"), [5] * 8, scores, np.eye(8), 2, 0, [3, 1]).tolist() == [0] * 6 + [1] * 2


def test_no_group_is_empty_however_small_its_capacity():
    """Ten equal units, ten groups: one each, though the first could train 91 % of them. No balance can be had here."""
    for method in BALANCED:
        groups = partition(method, list("abcdefghij"), [1] * 10, np.arange(10.0)[:, None], np.eye(10), 10, 0, [91] + [1] * 9)
        assert sorted(groups.tolist()) == list(range(10))


def test_stratified_by_capacity_still_gives_every_group_a_share_of_every_cluster():
    """Clusters of 8 to groups that take 1 : 1 : 2 of everything: 2, 2 and 4 of each, or one unit off."""
    case = blobs(8)
    case.groups = 3
    groups = case.split("stratified", capacities=[1, 1, 2]).reshape(4, 8)
    for row in groups:
        assert np.abs(np.bincount(row, minlength=3) - [2, 2, 4]).max() <= 1


def test_whole_shares_are_the_ratios_as_written():
    assert whole_shares("merit", None, 3) == (1, 1, 1)
    assert whole_shares("merit", [0.1, 0.3], 2) == (1, 3)  # 0.3 / 0.1 is 2.9999999999999996 in binary
    assert whole_shares("merit", [1.5, 3, 4.5], 3) == (1, 2, 3)
    assert whole_shares("soup", [7, 7], 2) == (1, 1)


@pytest.mark.parametrize(("capacities", "said"), [
    ([1, 2, 3], "3 given for 2 groups"), ([], "0 given for 2 groups"), ([1, 0], "group 1: got 0"),
    ([-1.0, 1], r"group 0: got -1\.0"), ([1, float("nan")], "group 1: got nan"), ([float("inf"), 1], "group 0: got inf")])
def test_capacities_that_mean_nothing_are_refused(capacities, said):
    with pytest.raises(PlanError, match=said):
        blobs_of_two().split("merit", capacities=capacities)


def blobs_of_two() -> Case:
    case = blobs()
    case.groups = 2
    return case


def test_all_problems_of_capacities_come_in_one_message():
    with pytest.raises(PlanError) as caught:
        blobs_of_two().split("random", capacities=[0, float("nan"), 1])
    assert all(part in str(caught.value) for part in ("group 0: got 0", "group 1: got nan", "3 given for 2 groups"))


@pytest.mark.parametrize("method", sorted(set(PARTITIONERS) - set(BALANCED) - {"joint"}))
def test_methods_that_do_not_balance_refuse_unequal_capacities(method):
    with pytest.raises(PlanError, match=r"does not balance its groups.*`merit`"):
        blobs_of_two().split(method, capacities=[1, 2])


def test_equal_capacities_leave_no_trace_in_what_a_plan_is_made_from():
    from anabranch.artifacts import Mixture
    from anabranch.plan import plan_inputs

    mixture = Mixture(units=[], transfer=[], retention=[], excluded=[], duplicates_in_train=0, duplicates_across=0,
                      max_length=8, chat_template="plain", examples=[])
    split = {"method": "merit", "groups": 2, "seed": 0}
    before = plan_inputs("base", mixture, "conflict", split)
    # the digest that runs made before there were capacities: SHA-256 of the canonical JSON of `split`
    assert before["split"] == hashlib.sha256(b'{"groups":2,"method":"merit","seed":0}').hexdigest()
    assert plan_inputs("base", mixture, "conflict", split, (1, 1)) == before
    uneven_plan = plan_inputs("base", mixture, "conflict", split, (1, 2))
    assert {k for k in before if uneven_plan[k] != before[k]} == {"split"}
