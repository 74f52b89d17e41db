"""Inner products, cosines, axes: right, the same bytes however computed, and errors instead of nan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from anabranch import conflict
from anabranch.conflict import (
    InnerProducts,
    analyse,
    corrected_cosine_matrix,
    cosine_matrix,
    drift_in_words,
    inner_products,
    most_conflicting,
    norm_concentration,
    partition_gain,
    principal_axes,
    raw_gradient_axes,
    reliability,
    spectral_tests,
    unreliable_units,
)
from anabranch.errors import MixtureError, PlanError


class Sketches:
    """T units' halves with very different lengths and tails, and how to take some of them."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        common = rng.normal(size=size)
        spread = np.exp(rng.normal(size=(count, 1)) * 3) * np.abs(rng.normal(size=(count, size))) ** 2
        self.a = ((common + rng.normal(size=(count, size))) * spread).astype(np.float32)
        self.b = ((common + rng.normal(size=(count, size))) * spread).astype(np.float32)
        self.tokens = rng.integers(1, 5000, size=(2, count))
        self.names = [f"unit-{i:03d}" for i in range(count)]

    def products(self, chosen: list[int] | None = None, previous: InnerProducts | None = None) -> InnerProducts:
        c = list(range(len(self.names))) if chosen is None else chosen
        names = [self.names[i] for i in c]
        return inner_products(names, ["hash of " + n for n in names], self.a[c], self.b[c],
                              self.tokens[0, c].tolist(), self.tokens[1, c].tolist(), previous)

    @property
    def means(self) -> np.ndarray:
        n_a, n_b = self.tokens[:, :, None].astype(np.float64)
        return (n_a * self.a + n_b * self.b) / (n_a + n_b)


def as_bytes(p: InnerProducts) -> list[bytes]:
    return [x.tobytes() for x in (p.gram, p.half_products, p.norms_a, p.norms_b, p.tokens)]


@pytest.mark.parametrize("size", [1, 17, 3000, conflict.CHUNK + 5, conflict.BLOCK + 100])
def test_products_agree_with_float64(size):
    s = Sketches(6, size, seed=size)
    p = s.products()
    g, a, b = s.means, s.a.astype(np.float64), s.b.astype(np.float64)
    lengths = np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(p.gram / np.outer(lengths, lengths), (g / lengths[:, None]) @ (g / lengths[:, None]).T,
                               rtol=0, atol=2e-7)
    np.testing.assert_allclose(p.norms_a, np.linalg.norm(a, axis=1), rtol=2e-7)
    np.testing.assert_allclose(p.norms_b, np.linalg.norm(b, axis=1), rtol=2e-7)
    error = np.abs(p.half_products - (a * b).sum(axis=1)) / (p.norms_a * p.norms_b)
    assert error.max() < 2e-7
    assert (p.gram == p.gram.T).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.sampled_from([1, 33, 700, conflict.CHUNK + 1]), st.integers(0, 10**6), st.data())
def test_adding_units_gives_the_same_bytes(count, size, seed, data):
    s = Sketches(count, size, seed)
    old = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    now = data.draw(st.permutations(range(count)))
    once = s.products(now)
    assert as_bytes(s.products(now, previous=s.products(old))) == as_bytes(once)
    back = np.argsort(now)
    assert s.products().gram.tobytes() == once.gram[np.ix_(back, back)].tobytes()  # nor does order matter


def test_adding_units_gives_the_same_bytes_over_several_blocks_and_threads():
    s = Sketches(24, conflict.BLOCK + 3000, seed=4)
    with threadpool_limits(limits=1):
        once = s.products()
    with threadpool_limits(limits=2):
        part = s.products(list(range(0, 24, 3)))
        again = s.products(previous=part)
    assert as_bytes(once) == as_bytes(again)
    rows = inner_products(once.units, once.hashes, list(s.a), list(s.b), s.tokens[0].tolist(), s.tokens[1].tolist())
    assert as_bytes(rows) == as_bytes(once)


def test_only_new_rows_are_multiplied():
    """A previous Gram matrix is used as it is where name, hash and tokens agree, and nowhere else."""
    s = Sketches(5, 50, seed=1)
    previous = s.products([0, 1, 2])
    marked = InnerProducts(previous.units, previous.hashes, previous.tokens, previous.gram + 1000.0,
                           previous.half_products, previous.norms_a, previous.norms_b)
    plain = s.products()
    assert (s.products(previous=marked).gram - plain.gram != 0).sum() == 9
    s.tokens[0, 1] += 1
    kept = np.isclose(s.products(previous=marked).gram - s.products().gram, 1000.0)
    assert np.argwhere(kept).tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    other = inner_products(s.names, [n + "!" for n in s.names], s.a, s.b, *s.tokens.tolist(), previous=marked)
    assert as_bytes(other) == as_bytes(s.products())


def test_scale_of_a_sketch_does_not_matter():
    """float32's whole range, denormals and 2^120 alike."""
    s = Sketches(3, 400, seed=0)
    s.a, s.b = (x / np.abs(x).max(axis=1, keepdims=True) for x in (s.a, s.b))
    small = np.array([1.0, 2.0**-100, 2.0**120], dtype=np.float32)[:, None]
    plain = cosine_matrix(s.products())
    s.a, s.b = s.a * small, s.b * small
    np.testing.assert_allclose(cosine_matrix(s.products()), plain, atol=1e-6)


def test_unusable_gradients_are_named_together():
    s = Sketches(5, 30, seed=2)
    s.a[1, 3] = np.nan
    s.b[2, 0] = np.inf
    s.a[4] = s.b[4] = 0
    with pytest.raises(MixtureError) as caught:
        s.products()
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip("- ") for line in lines] == ["unit-001", "unit-002", "unit-004"]
    assert "not finite" in lines[0] and "not finite" in lines[1] and "zero" in lines[2]


def test_halves_that_cancel_are_a_zero_gradient():
    a = np.ones((2, 8), dtype=np.float32)
    b = np.array([[1] * 8, [-1] * 8], dtype=np.float32)
    with pytest.raises(MixtureError, match=r"- v: its mean gradient is zero"):
        inner_products(["u", "v"], ["1", "2"], a, b, [3, 3], [3, 3])


def test_gradients_that_do_not_fit_are_refused():
    a = [np.ones(8, np.float32), np.ones(9, np.float32)]
    with pytest.raises(MixtureError) as caught:
        inner_products(["u", "v"], ["1", "2"], a, a, [3, 0], [3, 3])
    assert "v: sketch halves of 9 and 9 numbers, wanted 8" in str(caught.value)
    assert "v: 0 and 3 response tokens" in str(caught.value)
    with pytest.raises(MixtureError, match="units of one name: u"):
        inner_products(["u", "u"], ["1", "2"], [a[0]] * 2, [a[0]] * 2, [3, 3], [3, 3])
    with pytest.raises(MixtureError, match="hashes: 1 given for 2 units"):
        inner_products(["u", "v"], ["1"], [a[0]] * 2, [a[0]] * 2, [3, 3], [3, 3])


def noisy(noise: float, size: int = 4000, seed: int = 0) -> tuple[InnerProducts, np.ndarray]:
    """Halves with independent noise around known gradients, and the true cosines."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(12, 4)) @ rng.normal(size=(4, size))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    a, b = ((truth + noise * rng.normal(size=truth.shape) / np.sqrt(size)).astype(np.float32) for _ in range(2))
    names = [f"u{i:02d}" for i in range(12)]
    return inner_products(names, names, a, b, [100] * 12, [100] * 12), truth @ truth.T


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_corrected_cosines_are_nearer_the_truth(noise):
    products, truth = noisy(noise)
    plain, corrected = (np.abs(m - truth).mean() for m in (cosine_matrix(products), corrected_cosine_matrix(products)))
    assert corrected < 0.3 * plain
    # noise of length `noise` on each half leaves cos / (1 + noise^2 / 2) of a cosine
    pairs = np.triu_indices(12, 1)
    shrink = (cosine_matrix(products)[pairs] @ truth[pairs]) / (truth[pairs] @ truth[pairs])
    assert shrink == pytest.approx(1 / (1 + noise**2 / 2), rel=0.05)


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_reliability_is_the_cosine_to_another_calibration_set(noise):
    products, _ = noisy(noise)
    # signal / (signal + noise variance of the mean of two halves)
    assert np.mean(reliability(products)) == pytest.approx(1 / (1 + noise**2 / 2), rel=0.06)


def test_units_whose_halves_disagree_fall_back_to_the_plain_norm():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 60)).astype(np.float32)
    b = a.copy()
    b[1] = -0.5 * a[1]
    b[2] = 0
    p = inner_products(list("xyz"), list("xyz"), a, b, [5] * 3, [5] * 3)
    assert unreliable_units(p) == ["y", "z"]
    assert reliability(p).tolist() == pytest.approx([1.0, -1.0, 0.0])
    plain, corrected = cosine_matrix(p), corrected_cosine_matrix(p)
    np.testing.assert_allclose(corrected, plain, atol=1e-6)  # x has no noise, y and z fall back
    assert corrected.diagonal().tolist() == [1.0] * 3 and np.isfinite(corrected).all()


def test_cosines_are_clipped_symmetric_and_one_on_the_diagonal():
    products, _ = noisy(6.0, size=300)  # noise so large that the correction overshoots
    for m in (cosine_matrix(products), corrected_cosine_matrix(products)):
        assert (m == m.T).all() and (m.diagonal() == 1).all() and np.abs(m).max() <= 1
    assert np.abs(np.triu(corrected_cosine_matrix(products), 1)).max() == 1


def test_norm_concentration_by_hand():
    c = norm_concentration([1.0, 3.0, 5.0])
    assert (c.mean, c.max_over_min) == (3.0, 5.0)
    assert c.std == pytest.approx((8 / 3) ** 0.5) and c.cv == pytest.approx(c.std / 3)


@pytest.mark.parametrize("count", [2, 3, 9, 40])
def test_axes_are_those_of_a_singular_value_decomposition(count):
    matrix = np.corrcoef(np.random.default_rng(count).normal(size=(count, 6)))
    scores, explained = principal_axes(matrix, 4)
    u, s, _ = np.linalg.svd(matrix - matrix.mean(axis=0))
    kept = min(4, count - 1)
    assert scores.shape == (count, kept) and len(explained) == count - 1
    np.testing.assert_allclose(explained, (s**2 / (s**2).sum())[: count - 1], atol=1e-12)
    wanted = (u * s)[:, :kept]
    wanted = wanted * np.sign((wanted * scores).sum(axis=0))
    np.testing.assert_allclose(scores, wanted, atol=1e-9)
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-9)


def test_raw_axes_are_those_of_the_gradients():
    gradients = np.random.default_rng(0).normal(size=(10, 30)) * np.linspace(1, 4, 10)[:, None] + 2
    scores, explained = raw_gradient_axes(gradients @ gradients.T, 3)
    u, s, _ = np.linalg.svd(gradients - gradients.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs((u * s)[:, :3]), atol=1e-9)
    np.testing.assert_allclose(explained, (s**2 / (s**2).sum())[:9], atol=1e-12)


def test_signs_are_fixed():
    matrix = np.corrcoef(np.random.default_rng(7).normal(size=(15, 5)))
    scores, _ = principal_axes(matrix, 5)
    assert (scores[np.abs(scores).argmax(axis=0), np.arange(5)] > 0).all()
    two, _ = principal_axes([[1, -0.5], [-0.5, 1]], 1)
    assert two[0, 0] > 0 and two[0, 0] == -two[1, 0]  # a tie in size: the first is positive


def test_equal_gradients_get_equal_scores():
    """Ties must survive the eigensolver, or unit names could not break them."""
    rng = np.random.default_rng(3)
    gradients = np.repeat(rng.normal(size=(9, 20)), 3, axis=0)
    for scores in (principal_axes(np.corrcoef(gradients), 8)[0], raw_gradient_axes(gradients @ gradients.T, 8)[0]):
        assert (scores.reshape(9, 3, 8) == scores.reshape(9, 3, 8)[:, :1]).all()


def test_one_unit_and_equal_units_have_no_axis():
    scores, explained = principal_axes([[1.0]], 8)
    assert scores.shape == (1, 0) and explained == []
    scores, explained = principal_axes(np.ones((4, 4)), 8)
    assert (scores == 0).all() and explained == [0.0, 0.0, 0.0]


def test_partition_gain_weighs_by_budget():
    gradients = np.array([[0.0], [2.0], [9.0]])
    # groups {0, 1} of budget 4 with mean (3*0 + 1*2)/4 = 0.5, and {2} of budget 4; mean of all 4.75
    wanted = 0.5 * (0.5 * (0.5 - 4.75) ** 2 + 0.5 * (9 - 4.75) ** 2)
    assert partition_gain(gradients @ gradients.T, [0, 0, 1], [3, 1, 4]) == pytest.approx(wanted)
    assert partition_gain(gradients @ gradients.T, [-1, -1, -1], [3, 1, 4]) == 0
    assert partition_gain(gradients @ gradients.T, [0, 0, 0], [3, 1, 4]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("groups", "weights"), [([0, 1], [1, 1, 1]), ([0, 1, 1], [1, 0, 1]), ([0, -1, 1], [1, 1, 1])])
def test_partition_gain_refuses_what_is_no_plan(groups, weights):
    with pytest.raises(PlanError):
        partition_gain(np.eye(3), groups, weights)


def test_most_conflicting_pairs_by_value_then_name():
    cosine = np.eye(4)
    for i, j, c in [(0, 1, 0.5), (0, 2, -0.5), (0, 3, 0.1), (1, 2, -0.5), (1, 3, 0.9), (2, 3, 0.2)]:
        cosine[i, j] = cosine[j, i] = c
    assert most_conflicting(["d", "c", "b", "a"], cosine, 3) == [("b", "c", -0.5), ("b", "d", -0.5), ("a", "d", 0.1)]
    assert most_conflicting(["a"], np.eye(1)) == []


@pytest.mark.parametrize("matrix", ["cosine", "corrected", "gram"])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_analyse_tells_everything_in_finite_numbers(matrix, count):
    result = analyse(Sketches(count, 500, seed=count).products(), matrix)
    assert result.scores.shape == (count, min(8, count - 1))
    for array in (result.cosine, result.corrected, result.gram, result.scores, result.norms, result.reliability,
                  result.explained, [result.norm_cv, result.norm_max_over_min, result.cosine_mean]):
        assert np.isfinite(array).all()
    if count > 1:
        pairs = result.cosine[np.triu_indices(count, 1)]
        assert result.cosine_min == pairs.min() == result.most_conflicting[0][2]
        assert result.negative_share == np.mean(pairs < 0)
        assert sum(result.explained) == pytest.approx(1)
    assert len(result.spectral_tests) == {1: 0, 2: 1, 20: 3}[count]


def test_analyse_uses_the_chosen_matrix():
    products = Sketches(20, 500, seed=0).products()
    wanted = {"cosine": principal_axes(cosine_matrix(products), 8),
              "corrected": principal_axes(corrected_cosine_matrix(products), 8),
              "gram": raw_gradient_axes(products.gram, 8)}
    for matrix, (scores, explained) in wanted.items():
        result = analyse(products, matrix)
        assert (result.scores == scores).all() and result.explained == explained


def test_drift_in_words_promises_no_better_model():
    gradients = np.outer([1.0, -1.0] * 4, np.ones(3))
    for test in (spectral_tests(gradients @ gradients.T)[0], spectral_tests(np.eye(8))[2]):
        text = drift_in_words(test)
        assert "has to be measured" in text and f"{test.ratio:.2f}" in text
        assert ("nothing says" in text) is not test.above_random
