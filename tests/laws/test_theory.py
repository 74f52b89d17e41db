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
    spectral_filtering,
    split_merge,
    two_group_gain,
    unequal_curvature,
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
def test_contraction_by_weights(seed):
    """With the merge's own weights, against the squared lengths of the vectors themselves."""
    rng = np.random.default_rng(seed)
    deltas, share = rng.normal(size=(4, 9)) + 1, rng.dirichlet(np.ones(4))
    merged = sum(w * d for w, d in zip(share, deltas, strict=True))
    terms = contraction(deltas, 7 * share)
    assert terms.merged == pytest.approx(merged @ merged, rel=1e-12)
    assert terms.spread == pytest.approx(sum(w * (d - merged) @ (d - merged) for w, d in zip(share, deltas, strict=True)))
    assert terms.branches == pytest.approx(terms.merged + terms.spread, rel=1e-12)
    assert abs(terms.merged - contraction(deltas).merged) > 1e-3 * terms.merged  # the weights are heard


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


@pytest.mark.parametrize("seed", SEEDS)
def test_random_split_with_a_hessian(seed):
    """F.10 as the paper has it, eta^2/(2T(T-1)) tr(M): M = G H G^T of gradients without their mean, all 35 splits of 8."""
    rng = np.random.default_rng(seed)
    gradients, hessian, step = rng.normal(size=(8, 5)) + 2, random_hessian(rng, 5), 0.2
    centred = amplified_gram(gradients - gradients.mean(axis=0), hessian)
    gains = [two_group_gain(hessian, gradients[s > 0].mean(axis=0), gradients[s < 0].mean(axis=0), step)
             for s in balanced_signs(8)]
    assert len(gains) == 35
    assert np.mean(gains) == pytest.approx(step**2 / (2 * 8 * 7) * np.trace(centred), rel=1e-10)
    assert step**2 * spectral_tests(amplified_gram(gradients, hessian))[0].random_gain == pytest.approx(np.mean(gains))


@pytest.mark.parametrize("seed", SEEDS)
def test_bound_f11_with_a_hessian(seed):
    """eta^2/(2T^2) mu_1 |v_1|_1^2 is below the gain of the leading eigenvector's balanced signs, which F.1 gives itself."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(4, 5)) * [5, 1, 1, 1, 1]
    gradients, hessian, step = np.vstack([half, -half]) + 1, random_hessian(rng, 5), 0.2  # +- pairs: signs are balanced
    m = amplified_gram(gradients - gradients.mean(axis=0), hessian)
    variances, vectors = np.linalg.eigh(m)
    signs = np.sign(vectors[:, -1])
    assert signs.sum() == 0
    exact = merging_gain(hessian, [-step * gradients[signs == s].mean(axis=0) for s in (1, -1)], [1, 1])
    bound = step**2 / (2 * 8**2) * variances[-1] * np.abs(vectors[:, -1]).sum() ** 2
    assert step**2 * spectral_tests(amplified_gram(gradients, hessian))[0].pca_bound == pytest.approx(bound, rel=1e-9)
    assert 0 < bound <= exact * (1 + 1e-12)


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


@pytest.mark.parametrize("units", [4, 6, 10])
def test_rank_one_conflicts_of_unequal_size_reach_less(units):
    """T - 1 is the most there is, not the least: |v|_1^2 <= T with equality for a delocalised v only (Cauchy-Schwarz)."""
    sizes = np.repeat(np.arange(1.0, units // 2 + 1), 2) * np.tile([1.0, -1.0], units // 2)
    (test, *_) = spectral_tests(np.outer(sizes, sizes))
    expected = (units - 1) * np.abs(sizes).sum() ** 2 / (units * (sizes**2).sum())
    assert test.ratio == pytest.approx(expected)
    assert 1 < test.ratio < units - 1
    best = max(sign_split_gain(np.outer(sizes, sizes), s, 1.0) for s in balanced_signs(units))
    assert best / test.random_gain == pytest.approx(expected)  # nor does any other split do better


def test_spectral_tests_stop_where_groups_would_be_empty():
    rng = np.random.default_rng(0)
    grams = [g @ g.T for g in (rng.normal(size=(units, 9)) for units in (1, 3, 7, 8))]
    counts = {len(gram): [t.axes for t in spectral_tests(gram)] for gram in grams}
    assert counts == {1: [], 3: [1], 7: [1, 2], 8: [1, 2, 3]}


def test_equal_gradients_do_not_drift():
    (test,) = spectral_tests(np.ones((3, 3)))
    assert (test.ratio, test.above_random) == (0.0, False)
    assert test.random_gain == pytest.approx(0.0, abs=1e-15)


# ---- spectral filtering ----------------------------------------------------------------------------------------------


def test_filtering_the_top_eigenvectors_leaves_the_next_one():
    rng = np.random.default_rng(0)
    basis, curvatures = np.linalg.qr(rng.normal(size=(6, 6)))[0], np.array([0.5, 1, 2, 4, 30, 100.0])
    hessian = basis @ np.diag(curvatures) @ basis.T
    for count, left in ((1, 30.0), (2, 4.0), (5, 0.5)):
        mixed = rng.normal(size=(count, count)) @ basis[:, 6 - count:].T  # any vectors that span them
        found = spectral_filtering(hessian, mixed)
        assert found.before == pytest.approx(200.0)
        assert found.after == pytest.approx(left / 0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_filtering_other_directions_interlaces(seed):
    rng = np.random.default_rng(seed)
    hessian, directions = random_hessian(rng, 6) + np.eye(6), rng.normal(size=(2, 6))
    curvatures = np.linalg.eigvalsh(hessian)
    found = spectral_filtering(hessian, directions)
    assert curvatures[-3] <= found.after * curvatures[0] <= curvatures[-1]
    # the largest Rayleigh quotient over the complement, looked for by brute force: never above, and nearly reached
    probe = rng.normal(size=(20000, 6))
    probe -= probe @ np.linalg.pinv(directions) @ directions
    quotients = np.einsum("nd,de,ne->n", probe, hessian, probe) / (probe**2).sum(axis=1) / curvatures[0]
    assert 0.97 * found.after < quotients.max() <= found.after * (1 + 1e-12)


def test_filtering_is_the_condition_number_that_descent_meets_after_the_merge():
    """Branches +-c along the top eigenvector: the merge has lost it, and the best step is set by what is left."""
    curvatures = np.array([1.0, 5.0, 80.0])
    hessian, rest = np.diag(curvatures), np.array([1.0, 1.0, 0.0])
    branches = rest + np.array([[0, 0, 3.0], [0, 0, -3.0]])
    found = spectral_filtering(hessian, branches[0] - branches.mean(axis=0))
    assert (found.before, found.after) == (pytest.approx(80.0), pytest.approx(5.0))

    def rate(delta: np.ndarray, largest: float) -> float:
        after = delta - 2 / (largest + curvatures[0]) * hessian @ delta
        return float(np.abs(after[delta != 0] / delta[delta != 0]).max())

    assert rate(branches.mean(axis=0), 5.0) == pytest.approx((found.after - 1) / (found.after + 1))
    assert rate(branches[0], 80.0) == pytest.approx((found.before - 1) / (found.before + 1))


@pytest.mark.parametrize(("hessian", "directions"), [(np.diag([1.0, 0.0]), [1.0, 0.0]), (np.eye(2), np.eye(2))])
def test_filtering_refuses_what_has_no_condition_number(hessian, directions):
    with pytest.raises(ValueError, match="spectral filtering"):
        spectral_filtering(hessian, directions)


# ---- Hessians of their own -------------------------------------------------------------------------------------------


def descended(hessians: np.ndarray, optima: np.ndarray, budgets: np.ndarray, start: np.ndarray, step: float,
              steps: int) -> np.ndarray:
    """Gradient descent on the budget-weighted mean loss of some units, step by step."""
    theta = start
    for _ in range(steps):
        slopes = [h @ (theta - o) for h, o in zip(hessians, optima, strict=True)]
        theta = theta - step * np.average(slopes, axis=0, weights=budgets)
    return theta


def mixture_of_quadratics(seed: int, spread: float, units: int = 8, d: int = 4) -> dict[str, np.ndarray]:
    """Units around one Hessian, each with `spread` times a symmetric matrix of its own added; largest curvature near 1."""
    rng = np.random.default_rng(seed)
    shared = random_hessian(rng, d)
    shared = shared / np.linalg.eigvalsh(shared)[-1] + 0.1 * np.eye(d)
    own = rng.normal(size=(units, d, d)) / d
    return {"hessians": shared + spread * (own + own.transpose(0, 2, 1)) / 2, "optima": rng.normal(size=(units, d)),
            "budgets": rng.integers(1, 5, size=units).astype(float), "start": rng.normal(size=d)}


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_split_merge_is_where_descent_arrives(seed, steps):
    given = mixture_of_quadratics(seed, 0.3)
    groups, step = np.array([0, 1, 2, 0, 1, 2, 2, 2]), 0.4
    weights = [given["budgets"][groups == k].sum() for k in range(3)]
    branches = [descended(given["hessians"][groups == k], given["optima"][groups == k], given["budgets"][groups == k],
                          given["start"], step, steps) for k in range(3)]
    found = split_merge(**given, groups=groups, step=step, steps=steps)
    np.testing.assert_allclose(found, np.average(branches, axis=0, weights=weights), rtol=1e-9, atol=1e-12)


def test_split_merge_goes_straight_where_the_loss_is_nearly_flat():
    """lambda = 1e-14: 1 - (1 - eta lambda)^n would round to nothing; it moves n eta lambda of the way."""
    for curvature in (1e-14, 1e-9):
        (moved,) = split_merge([[[curvature]]], [[1.0]], [1], [0], [0.0], step=0.5, steps=10)
        assert moved == pytest.approx(5 * curvature, rel=1e-7, abs=0)
    assert split_merge([[[0.0]]], [[1.0]], [1], [0], [3.0], step=0.5, steps=10) == [3.0]


@pytest.mark.parametrize("steps", [1, 5, 60])
def test_one_common_hessian_every_split_is_joint_with_k_times_fewer_steps(steps):
    """Our law, with unequal budgets and groups: to rounding, for splits whose branches are far apart."""
    given = mixture_of_quadratics(0, 0.0)
    joint = descended(**{k: given[k] for k in ("hessians", "optima", "budgets", "start")}, step=0.4, steps=steps)
    rng = np.random.default_rng(1)
    for count in (2, 3, 4):
        groups = rng.permutation(np.arange(8) % count)
        found = split_merge(**given, groups=groups, step=0.4, steps=steps)
        np.testing.assert_allclose(found, joint, rtol=1e-11, atol=1e-13)
        # joint with the same tokens takes `count` times the steps, and is elsewhere until all have converged
        longer = split_merge(**given, groups=np.zeros(8), step=0.4, steps=count * steps)
        assert np.linalg.norm(longer - found) > 1e-3
        assert np.abs(unequal_curvature(**given, groups=groups, step=0.4, steps=steps)).max() < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_unequal_hessians_by_how_much_not(seed):
    """Exact for one and two steps against descent itself; and two splits then differ from each other."""
    given = mixture_of_quadratics(seed, 0.5)
    groups, other, step = np.arange(8) // 4, np.arange(8) % 2, 0.3
    for steps in (1, 2):
        joint = descended(**given, step=step, steps=steps)
        apart = split_merge(**given, groups=groups, step=step, steps=steps) - joint
        predicted = unequal_curvature(**given, groups=groups, step=step, steps=steps)
        np.testing.assert_allclose(apart, predicted, rtol=1e-8, atol=1e-13)
        assert (np.linalg.norm(apart) > 1e-4) == (steps == 2)
    merges = [split_merge(**given, groups=g, step=step, steps=2) for g in (groups, other)]
    assert np.linalg.norm(merges[0] - merges[1]) > 1e-4


def test_unequal_hessians_the_rest_is_of_third_order():
    """Halving the step divides what the leading term leaves by about 8, the leading term itself by 4."""
    given, groups = mixture_of_quadratics(3, 0.5), np.arange(8) // 2
    left, leading = [], []
    for step in (0.02, 0.01, 0.005):
        joint = split_merge(**given, groups=np.zeros(8), step=step, steps=6)
        term = unequal_curvature(**given, groups=groups, step=step, steps=6)
        left.append(np.linalg.norm(split_merge(**given, groups=groups, step=step, steps=6) - joint - term))
        leading.append(np.linalg.norm(term))
    assert left[0] / left[1] == pytest.approx(8, rel=0.1) and left[1] / left[2] == pytest.approx(8, rel=0.05)
    assert leading[0] / leading[1] == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_unequal_hessians_the_difference_is_in_proportion_to_their_spread(steps):
    """By descent itself: with s times the deviations, merge - joint is s times as long, for small s and any n."""
    groups, lengths = np.arange(8) // 4, []
    for spread in (1e-3, 2e-3, 4e-3):
        given = mixture_of_quadratics(5, spread)
        joint = descended(**given, step=0.4, steps=steps)
        lengths.append(np.linalg.norm(split_merge(**given, groups=groups, step=0.4, steps=steps) - joint))
    assert lengths[0] > 1e-6
    assert lengths[1] / lengths[0] == pytest.approx(2, rel=0.03) and lengths[2] / lengths[1] == pytest.approx(2, rel=0.05)


def test_equal_curvature_of_groups_is_enough():
    """Units differ, groups do not: pairs (A, B) with the same budgets in every group merge into joint."""
    given = mixture_of_quadratics(2, 0.5)
    given["hessians"], given["budgets"] = np.tile(given["hessians"][:2], (4, 1, 1)), np.ones(8)
    joint = descended(**given, step=0.4, steps=20)
    np.testing.assert_allclose(split_merge(**given, groups=np.arange(8) // 2, step=0.4, steps=20), joint, rtol=1e-10)
    parted = split_merge(**given, groups=np.arange(8) % 2, step=0.4, steps=20)
    assert np.linalg.norm(parted - joint) > 1e-2
