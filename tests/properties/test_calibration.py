"""Calibration size against cases whose answer is known: mean plus independent noise, and linear regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.diagnose.calibration import (
    calibrate,
    cosine,
    examples_needed,
    halves_of,
    mean_curves,
    nested_cosine,
    noise_ratio,
    reliability,
    usable_sizes,
)
from anabranch.rows import generator

SIZES = [25, 50, 100, 200, 400, 800]


def prefix_sums(gradients: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the alternating halves of each prefix of per-example gradients [N, m]."""
    return (np.stack([gradients[:n][0::2].sum(0) for n in sizes]), np.stack([gradients[:n][1::2].sum(0) for n in sizes]))


def noisy(ratio: float, seed: int, count: int = 800, size: int = 4000) -> np.ndarray:
    """mu + e with tr(Sigma) / |mu|^2 = ratio."""
    draw = generator(seed, "noisy")
    mean = draw.normal(size=size)
    mean /= np.linalg.norm(mean)
    return mean + draw.normal(scale=math.sqrt(ratio / size), size=(count, size))


@pytest.mark.parametrize("ratio", [5.0, 40.0, 300.0])
def test_reliability_of_mean_and_noise_is_what_it_was_made_with(ratio):
    found = [calibrate("u", 800, SIZES, *prefix_sums(noisy(ratio, seed), SIZES), 0.9) for seed in range(4)]
    for i, n in enumerate(SIZES):
        assert np.mean([f.reliability[i] for f in found]) == pytest.approx(n / (n + ratio), abs=0.03)
        assert np.mean([f.cosines[i] for f in found]) == pytest.approx(nested_cosine(n, 800, ratio), abs=0.02)
    assert np.mean([f.needed for f in found]) == pytest.approx(9 * ratio, rel=0.1)


def test_noise_alone_looks_good_to_nested_cosines_and_to_nothing_else():
    noise = generator(0, "pure noise").normal(size=(800, 4000))
    found = calibrate("u", 800, SIZES, *prefix_sums(noise, SIZES), 0.9)
    assert found.cosines[3] == pytest.approx(math.sqrt(200 / 800), abs=0.03)
    assert max(map(abs, found.reliability)) < 0.1
    opposed = calibrate("u", 4, [2, 4], [[1.0, 0.0], [1.0, 0.0]], [[-1.0, 0.1], [-1.0, 0.1]], 0.9)
    assert opposed.needed is None and opposed.reliability[-1] < 0


def test_linear_regression_has_the_reliability_that_its_covariances_say():
    """Gradient of 1/2 (x.w - y)^2 at w = 0 is -y x, with y = x.w* + s e and x ~ N(0, I_d): its mean is -w*, and the trace of
    its covariance E[y^2 |x|^2] - |w*|^2 = (d + 2) |w*|^2 + d s^2 - |w*|^2."""
    d, noise, seeds = 60, 0.5, 12
    truth = np.ones(d) / math.sqrt(d)
    ratio = (d + 1) + d * noise**2
    found = []
    for seed in range(seeds):
        draw = generator(seed, "regression")
        x = draw.normal(size=(800, d))
        y = x @ truth + noise * draw.normal(size=800)
        found.append(calibrate("u", 800, SIZES, *prefix_sums(-y[:, None] * x, SIZES), 0.8))
    for i, n in list(enumerate(SIZES))[2:]:
        assert np.mean([f.reliability[i] for f in found]) == pytest.approx(n / (n + ratio), abs=0.05)
    assert np.median([f.needed for f in found]) == pytest.approx(4 * ratio, rel=0.15)


@given(st.floats(1e-3, 1 - 1e-9), st.integers(1, 1000))
def test_equal_halves_are_stepped_up_as_spearman_and_brown_do(r, half):
    assert reliability(2 * half, noise_ratio(r, half, half)) == pytest.approx(2 * r / (1 + r), rel=1e-6)


@given(st.floats(1e-2, 1e5), st.integers(2, 2000))
def test_unequal_halves_give_back_the_noise_they_were_made_with(ratio, n):
    a, b = halves_of(n)
    assert a + b == n and 0 <= a - b <= 1
    r = 1 / math.sqrt((1 + ratio / a) * (1 + ratio / b))
    assert noise_ratio(r, a, b) == pytest.approx(ratio, rel=1e-4, abs=1e-6)


@given(st.floats(1e-3, 1e6), st.floats(0.01, 0.99))
def test_the_number_needed_is_the_first_that_reaches(ratio, wanted):
    n = examples_needed(ratio, wanted)
    assert reliability(n, ratio) >= wanted * (1 - 1e-8)
    assert n == 1 or reliability(n - 1, ratio) < wanted
    assert examples_needed(math.inf, wanted) is None


def test_whole_answers_are_not_rounded_up():
    assert [examples_needed(k, 0.9) for k in (10.0, 1 / 3 * 30, 100.0)] == [90, 90, 900]


def test_sizes_and_cosines():
    assert usable_sizes([100, 25, 50, 25, 1], 60) == [25, 50]
    assert cosine([3.0, 4.0], [6.0, 8.0]) == pytest.approx(1) and cosine([1.0, 0.0], [0.0, 0.0]) == 0


def test_means_leave_a_unit_s_own_reference_out():
    mean, other = np.ones(3), np.array([1.0, 0.0, 0.0])
    short = calibrate("a", 4, [2, 4], [mean, 2 * mean], [mean, 2 * mean], 0.9)
    long = calibrate("b", 8, [2, 4, 8], [other, mean, 2 * mean], [other, mean, 2 * mean], 0.9)
    sizes, cosines, _ = mean_curves([short, long])
    assert sizes == [2, 4, 8] and cosines[2] == 1
    assert cosines[0] == pytest.approx((1 + 1 / math.sqrt(3)) / 2) and cosines[1] == pytest.approx(long.cosines[1])
