"""The paper's identities and worked case (arXiv 2606.01717, section 3 and appendix F), on random quadratics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from anabranch.conflict import partition_gain, raw_gradient_axes, spectral_tests
from anabranch.partition import partition
from anabranch.theory import (
    amplified_gram,
    contraction,
    merging_gain,
    merging_gain_by_pairs,
    sign_split_gain,
    two_group_gain,
)

SEEDS = range(5)


def random_hessian(rng: np.random.Generator, d: int) -> np.ndarray:
    root = rng.normal(size=(d, d))
    return root @ root.T


def quadratic(hessian: np.ndarray, delta: np.ndarray) -> float:
    return float(delta @ hessian @ delta) / 2


def balanced_signs(count: int) -> list[np.ndarray]:
    """Every balanced split of `count` units in two, once."""
    rest = itertools.combinations(range(1, count), count // 2 - 1)
    return [np.where(np.isin(np.arange(count), (0, *others)), 1.0, -1.0) for others in rest]


@pytest.mark.parametrize("seed", SEEDS)
def test_merging_gain_is_what_the_merge_saves(seed):
    """Eq. 1 / F.1: mean loss of the branches minus loss of the merge."""
    rng = np.random.default_rng(seed)
    hessian, deltas, weights = random_hessian(rng, 7), rng.normal(size=(5, 7)), rng.uniform(0.1, 3, size=5)
    share = weights / weights.sum()
    branches = sum(w * quadratic(hessian, d) for w, d in zip(share, deltas, strict=True))
    saved = branches - quadratic(hessian, share @ deltas)
    assert merging_gain(hessian, deltas, weights) == pytest.approx(saved, rel=1e-10)
    assert merging_gain_by_pairs(hessian, deltas, weights) == pytest.approx(saved, rel=1e-10)


def test_pairs_without_weights_are_the_papers_uniform_formula():
    rng = np.random.default_rng(1)
    hessian, deltas = random_hessian(rng, 4), rng.normal(size=(3, 4))
    by_hand = sum(float((a - b) @ hessian @ (a - b)) for a in deltas for b in deltas) / (4 * 3**2)
    assert merging_gain_by_pairs(hessian, deltas) == pytest.approx(by_hand, rel=1e-12)
    assert merging_gain(hessian, deltas, np.ones(3)) == pytest.approx(by_hand, rel=1e-10)


def test_no_gain_where_branches_agree_along_every_curved_direction():
    hessian = np.diag([3.0, 0.0])
    assert merging_gain(hessian, [[1.0, -5.0], [1.0, 8.0]], [1, 2]) == pytest.approx(0.0, abs=1e-12)
    assert merging_gain(hessian, [[1.0, 0.0], [3.0, 0.0]], [1, 1]) == pytest.approx(1.5)  # 1/2 * 3 * variance 1


@pytest.mark.parametrize("seed", SEEDS)
def test_contraction(seed):
    """Eq. 11."""
    deltas = np.random.default_rng(seed).normal(size=(6, 9)) + 1
    terms = contraction(deltas)
    assert terms.branches == pytest.approx(terms.merged + terms.spread, rel=1e-12)
    assert terms.branches == pytest.approx(float(np.mean([d @ d for d in deltas])))
    assert terms.merged == pytest.approx(float(np.linalg.norm(deltas.mean(axis=0)) ** 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_two_groups_after_one_step(seed):
    """The gain of the pair (theta0 - eta gbar_1, theta0 - eta gbar_2), by F.1 and by the two short formulas."""
    rng = np.random.default_rng(seed)
    hessian, gradients, start, step = random_hessian(rng, 5), rng.normal(size=(6, 5)), rng.normal(size=5), 0.3
    signs = np.array([1, 1, -1, 1, -1, -1.0])
    means = [gradients[signs == s].mean(axis=0) for s in (1, -1)]
    exact = merging_gain(hessian, [start - step * m for m in means], [1, 1])
    assert two_group_gain(hessian, *means, step) == pytest.approx(exact, rel=1e-10)
    assert sign_split_gain(amplified_gram(gradients, hessian), signs, step) == pytest.approx(exact, rel=1e-10)
    # the factor of H may be taken into the gradients: partition_gain then sees H = I
    groups = (signs < 0).astype(int)
    assert step**2 * partition_gain(amplified_gram(gradients, hessian), groups, np.ones(6)) == pytest.approx(exact)


def test_sign_split_gain_refuses_lopsided_signs():
    with pytest.raises(ValueError, match="balanced"):
        sign_split_gain(np.eye(4), [1, 1, 1, -1], 1.0)


def test_curvature_amplification():
    rng = np.random.default_rng(2)
    hessian, optima = random_hessian(rng, 4), rng.normal(size=(5, 4))
    m = amplified_gram(-optima @ hessian, hessian)
    np.testing.assert_allclose(m, optima @ np.linalg.matrix_power(hessian, 3) @ optima.T, rtol=1e-9, atol=1e-9)


# T = 4, d = 2: H = diag(l1, l2), optima at (+-a, +-b)
WORKED = [(3.0, 1.0, 0.7, 1.1), (1.0, 2.0, 1.5, 2.0), (2.0, 2.0, 1.0, 0.2)]


def worked_case(l1: float, l2: float, a: float, b: float) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(gradients, H, the three balanced splits as signs) of the spec's example."""
    optima = np.array([(a, b), (a, -b), (-a, b), (-a, -b)])
    hessian = np.diag([l1, l2])
    splits = {"first": np.array([1, 1, -1, -1.0]), "second": np.array([1, -1, 1, -1.0]),
              "cancelling": np.array([1, -1, -1, 1.0])}
    return -optima @ hessian, hessian, splits


@pytest.mark.parametrize("case", WORKED)
def test_worked_case_gains(case):
    l1, l2, a, b = case
    gradients, hessian, splits = worked_case(*case)
    m, step = amplified_gram(gradients, hessian), 0.1
    gains = {name: sign_split_gain(m, s, step) for name, s in splits.items()}
    assert gains["first"] == pytest.approx(step**2 / 2 * l1**3 * a**2)
    assert gains["second"] == pytest.approx(step**2 / 2 * l2**3 * b**2)
    assert gains["cancelling"] == pytest.approx(0.0, abs=1e-15)
    expected = step**2 / 6 * (l1**3 * a**2 + l2**3 * b**2)
    assert np.mean(list(gains.values())) == pytest.approx(expected)
    assert step**2 * spectral_tests(m)[0].random_gain == pytest.approx(expected)


@pytest.mark.parametrize("case", WORKED)
def test_worked_case_pca_picks_the_axis_of_larger_gradient_variance(case):
    l1, l2, a, b = case
    gradients, _, splits = worked_case(*case)
    gram = gradients @ gradients.T
    scores, _ = raw_gradient_axes(gram, 3)
    groups = partition("merit", list("pqrs"), [1, 1, 1, 1], scores, np.eye(4), 2, 0)
    wanted = splits["first"] if l1**2 * a**2 > l2**2 * b**2 else splits["second"]
    assert abs(np.where(groups == 0, 1, -1) @ wanted) == 4


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_shared_hessian_merges_do_not_depend_on_the_split(groups):
    """Our law: n gradient steps per branch, one Hessian -> the same merge for every balanced split, and for joint."""
    rng = np.random.default_rng(groups)
    d, units, steps = 6, 12, 40
    hessian = random_hessian(rng, d) + 0.1 * np.eye(d)
    eta = 0.5 / np.linalg.eigvalsh(hessian)[-1]
    optima, start = rng.normal(size=(units, d)), rng.normal(size=d)

    def train(members: np.ndarray) -> np.ndarray:
        theta = start
        for _ in range(steps):
            theta = theta - eta * np.mean([hessian @ (theta - optima[t]) for t in members], axis=0)
        return theta

    joint = train(np.arange(units))
    merges, gains = [], []
    for _ in range(6):
        branches = [train(part) for part in rng.permutation(units).reshape(groups, -1)]
        merges.append(np.mean(branches, axis=0))
        gains.append(merging_gain(hessian, branches, np.ones(groups)))
    for merged in merges:
        np.testing.assert_allclose(merged, joint, rtol=1e-10, atol=1e-12)
    assert max(gains) > 1.05 * min(gains)  # the splits do differ, in how far the branches are apart


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("units", [4, 7, 12])
def test_bound_f11_is_below_the_gain_of_the_sign_split(seed, units):
    """Signs as they come, so lopsided splits too; gradients with a mean, which must not count."""
    gradients = np.random.default_rng(seed).normal(size=(units, 5)) * [4, 2, 1, 1, 1] + 3
    gram = gradients @ gradients.T
    scores, _ = raw_gradient_axes(gram, 1)
    exact = partition_gain(gram, (scores[:, 0] > 0).astype(int), np.ones(units))
    assert spectral_tests(gram)[0].pca_bound <= exact * (1 + 1e-12)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_bound_along_several_axes_holds_where_signs_are_balanced(axes):
    """Factorial design: 2^3 sign patterns, twice, with unequal sizes that keep each axis an eigenvector's sign."""
    rng = np.random.default_rng(axes)
    corners = np.array(list(itertools.product([-1, 1], repeat=3)) * 2, dtype=float)
    for _ in range(20):
        sizes = np.repeat(rng.uniform(0.5, 2, size=(1, 3)), 16, axis=0) * [9, 3, 1]
        noise = rng.normal(size=(8, 4)) * 0.05
        gradients = np.hstack([corners * sizes, np.vstack([noise, -noise])]) + 1
        gram = gradients @ gradients.T
        scores, _ = raw_gradient_axes(gram, axes)
        groups = (scores > 0) @ (2 ** np.arange(axes))
        assert np.bincount(groups).tolist() == [16 // 2**axes] * 2**axes
        test = spectral_tests(gram)[axes - 1]
        assert test.pca_bound <= partition_gain(gram, groups, np.ones(16)) * (1 + 1e-12)
        assert test.above_random and test.ratio > 1


@pytest.mark.parametrize(("units", "axes"), [(6, 1), (8, 2)])
def test_random_gain_is_the_mean_over_all_balanced_splits(units, axes):
    """F.10 and its extension to K = 4, by enumeration."""
    gradients = np.random.default_rng(3).normal(size=(units, 4)) + 2
    gram, size = gradients @ gradients.T, units // 2**axes

    def splits(left: frozenset[int], label: int) -> list[dict[int, int]]:
        if not left:
            return [{}]
        first = min(left)  # it names its group, so that each split comes once
        found = []
        for others in itertools.combinations(sorted(left - {first}), size - 1):
            members = frozenset((first, *others))
            found += [dict.fromkeys(members, label) | rest for rest in splits(left - members, label + 1)]
        return found

    found = splits(frozenset(range(units)), 0)
    gains = [partition_gain(gram, [s[t] for t in range(units)], np.ones(units)) for s in found]
    assert len(gains) == {(6, 1): 10, (8, 2): 105}[units, axes]
    assert spectral_tests(gram)[axes - 1].random_gain == pytest.approx(np.mean(gains), rel=1e-10)


def test_isotropic_conflicts_no_split_beats_random():
    gram = 2.5 * np.eye(8) + 1.0  # equally long, equally far from each other, and a common part
    tests = spectral_tests(gram)
    for signs in balanced_signs(8):
        assert partition_gain(gram, (signs > 0).astype(int), np.ones(8)) == pytest.approx(tests[0].random_gain)
    assert not any(t.above_random for t in tests)


@pytest.mark.parametrize("units", [4, 6, 10])
def test_rank_one_conflicts_reach_the_full_advantage(units):
    gradients = np.outer(np.tile([1.0, -1.0], units // 2), [3.0, 4.0])
    assert spectral_tests(gradients @ gradients.T)[0].ratio >= (units - 1) * (1 - 1e-12)


def test_spectral_tests_stop_where_groups_would_be_empty():
    rng = np.random.default_rng(0)
    grams = [g @ g.T for g in (rng.normal(size=(units, 9)) for units in (1, 3, 7, 8))]
    counts = {len(gram): [t.axes for t in spectral_tests(gram)] for gram in grams}
    assert counts == {1: [], 3: [1], 7: [1, 2], 8: [1, 2, 3]}


def test_equal_gradients_do_not_drift():
    (test,) = spectral_tests(np.ones((3, 3)))
    assert (test.ratio, test.above_random) == (0.0, False)
    assert test.random_gain == pytest.approx(0.0, abs=1e-15)
