"""What holds for every partition, and what sets the methods apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.conflict import partition_gain, principal_axes
from anabranch.errors import PlanError
from anabranch.partition import PARTITIONERS, partition
from anabranch.recipe import PARTITIONS

BALANCED = ("merit", "random", "stratified")
GROUPING = (*BALANCED, "conflict_greedy")


@dataclass
class Case:
    names: list[str]
    samples: list[int]
    scores: np.ndarray
    cosine: np.ndarray
    groups: int
    seed: int

    def split(self, method: str, order: list[int] | None = None) -> np.ndarray:
        o = list(range(len(self.names))) if order is None else order
        return partition(method, [self.names[i] for i in o], [self.samples[i] for i in o], self.scores[o],
                         self.cosine[np.ix_(o, o)], self.groups, self.seed)


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
    assert tuple(PARTITIONERS) == PARTITIONS


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
