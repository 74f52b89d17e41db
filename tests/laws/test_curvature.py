"""Curvature against what is known exactly: matrices with a chosen spectrum, linear regression, a network's full Hessian."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from anabranch.conflict import principal_axes
from anabranch.diagnose.curvature import (
    align,
    central_differences,
    conflict_axes,
    double_backward,
    lanczos,
    measured_gain,
    principal_angles,
    quadratic_gain,
    random_direction,
    random_largest,
    relative_difference,
    top_gain,
)
from anabranch.errors import ShapeMismatch
from anabranch.theory import merging_gain

SEEDS = range(3)


def rotated(curvatures: list[float], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(H with these eigenvalues, its eigenvectors as rows in their order)."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(curvatures), len(curvatures))))
    return torch.from_numpy(basis @ np.diag(curvatures) @ basis.T).to(dtype), torch.from_numpy(basis.T).to(dtype)


# ---- Lanczos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_lanczos_finds_a_known_spectrum(seed):
    curvatures = [50.0, 20.0, 11.0, 6.0, *np.linspace(3, -4, 36)]
    hessian, vectors = rotated(curvatures, seed)
    found = lanczos(lambda v: hessian @ v, random_direction(40, seed), 40, 4)
    np.testing.assert_allclose(found.values, curvatures[:4], rtol=1e-10)
    np.testing.assert_allclose(np.abs((found.vectors @ vectors[:4].T).numpy()), np.eye(4), atol=1e-7)
    np.testing.assert_allclose(found.ritz, sorted(curvatures), atol=1e-8)
    assert found.steps == 40


def test_residual_bounds_are_the_residuals():
    hessian, _ = rotated([30.0, 12.0, *np.linspace(5, 0, 58)])
    found = lanczos(lambda v: hessian @ v, random_direction(60, 1), 9, 5)
    residuals = [float((hessian @ u - value * u).norm()) for u, value in zip(found.vectors, found.values, strict=True)]
    np.testing.assert_allclose(found.residuals, residuals, rtol=1e-6, atol=1e-12)
    assert found.residuals[0] < 1e-2 < found.residuals[4]  # some have converged after 9 steps, some have not
    for value, bound in zip(found.values, found.residuals, strict=True):
        assert np.abs(np.linalg.eigvalsh(hessian.numpy()) - value).min() <= bound + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_ghosts_of_an_eigenvalue_that_converged_long_ago(dtype):
    """Where one curvature dwarfs the rest, Lanczos without reorthogonalisation finds it again and again."""
    curvatures = [1000.0, *np.linspace(1, 0.1, 199)]
    hessian, _ = rotated(curvatures, dtype=dtype)
    found = lanczos(lambda v: hessian @ v, random_direction(200, 0).to(dtype), 60, 10)
    assert (found.ritz > 1.01).sum() == 1
    gram = (found.vectors.double() @ found.vectors.double().T).numpy()
    np.testing.assert_allclose(gram, np.eye(10), atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [[0.0], [2.0], [7.0, 3.0, 1.0], [5.0, -5.0]])
def test_lanczos_ends_where_the_spectrum_does(distinct, dtype):
    hessian, _ = rotated((distinct * 12)[:12], dtype=dtype)
    found = lanczos(lambda v: hessian @ v, random_direction(12, 0).to(dtype), 12, 4)
    np.testing.assert_allclose(found.ritz, sorted(distinct), atol=1e-5)
    assert found.vectors.shape == (min(4, len(distinct)), 12)
    assert found.residuals.max() < 1e-4


def test_vectors_of_millions_of_float32_entries_have_unit_length():
    """A float32 sum of as many squares is off in the fourth digit."""
    entries = 2_000_000
    scale = torch.linspace(1, 2, entries)
    found = lanczos(lambda v: scale * v, torch.ones(entries), 3, 2)
    np.testing.assert_allclose(found.vectors.double().norm(dim=1).numpy(), 1, rtol=1e-6)
    axes = conflict_axes(torch.stack([torch.ones(entries), scale, scale**3]), 2)
    np.testing.assert_allclose(axes.double().norm(dim=1).numpy(), 1, rtol=1e-6)


def test_lanczos_takes_no_more_steps_than_there_are_parameters():
    found = lanczos(lambda v: torch.tensor([3.0, 1.0], dtype=torch.float64) * v, random_direction(2, 0), 50, 10)
    np.testing.assert_allclose(found.values, [3.0, 1.0])


def test_lanczos_tells_its_steps():
    told = []
    lanczos(lambda v: v * torch.arange(5.0), torch.ones(5), 3, 1, lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_random_directions_depend_on_seed_and_name_alone():
    a = random_direction(50, 3, "x")
    assert float(a.norm()) == pytest.approx(1)
    assert torch.equal(a, random_direction(50, 3, "x"))
    assert abs(float(a @ random_direction(50, 3, "y"))) < 0.6 and abs(float(a @ random_direction(50, 4, "x"))) < 0.6


def test_bounds_do_not_claim_more_than_the_arithmetic_gives():
    hessian, _ = rotated([100.0, *np.linspace(1, 0, 29)], dtype=torch.float32)
    found = lanczos(lambda v: hessian @ v, random_direction(30, 0).float(), 20, 1)
    assert found.residuals[0] == pytest.approx(100 * 2.0**-23, rel=1e-3)


# ---- products --------------------------------------------------------------------------------------------------------


class Network:
    """Two layers, squared loss and 3 micro-batches, float64; its full Hessian by torch.func."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.shapes = [(6, 4), (6,), (2, 6)]
        self.flat = torch.from_numpy(rng.normal(size=sum(int(np.prod(s)) for s in self.shapes)))
        self.rows = [torch.from_numpy(rng.normal(size=(5, 4))) for _ in range(3)]
        self.wanted = [torch.from_numpy(rng.normal(size=(5, 2))) for _ in range(3)]

    def pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [p.view(s) for p, s in zip(flat.split([int(np.prod(s)) for s in self.shapes]), self.shapes, strict=True)]

    def share(self, i: int, weights: list[torch.Tensor]) -> torch.Tensor:
        inner, bias, outer = weights
        return ((torch.tanh(self.rows[i] @ inner.T + bias) @ outer.T - self.wanted[i]) ** 2).sum() / 15

    def loss(self, flat: torch.Tensor) -> torch.Tensor:
        return sum((self.share(i, self.pieces(flat)) for i in range(3)), torch.zeros(()))

    def autodiff(self):
        leaves = [p.clone().requires_grad_(True) for p in self.pieces(self.flat)]
        return double_backward(lambda: (self.share(i, leaves) for i in range(3)), leaves)

    def numeric(self, step: float):
        return central_differences(lambda shift: torch.func.grad(self.loss)(self.flat + shift), step)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_products_against_the_full_hessian(seed):
    network = Network(seed)
    full = torch.func.hessian(network.loss)(network.flat)
    for k in range(3):
        v = 3 * random_direction(len(network.flat), seed, str(k))
        assert relative_difference(full @ v, network.autodiff()(v)) < 1e-12
        assert relative_difference(full @ v, network.numeric(1e-4)(v)) < 1e-7


def test_double_backward_leaves_no_gradient_behind():
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    product = double_backward(lambda: iter([(leaf**3).sum()]), [leaf])
    assert product(torch.tensor([1.0, 1.0])).tolist() == [6.0, 12.0]
    assert leaf.grad is None


def test_double_backward_where_a_parameter_bends_nothing():
    """One that the loss does not see, and one that it is linear in; micro-batches that are linear altogether."""
    curved, straight, unseen = (torch.tensor([2.0], dtype=torch.float64, requires_grad=True) for _ in range(3))

    def losses() -> Iterator[torch.Tensor]:
        yield (curved**3 + 5 * straight).sum()
        yield (7 * straight).sum()

    assert double_backward(losses, [curved, straight, unseen])(torch.ones(3, dtype=torch.float64)).tolist() == [12.0, 0.0, 0.0]


def test_double_backward_refuses_a_vector_of_another_length():
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(ShapeMismatch, match=r"\(2,\).*\(3,\)"):
        double_backward(lambda: iter([(leaf**2).sum()]), [leaf])(torch.ones(2))


def test_central_differences_err_with_the_square_of_the_step():
    network = Network(0)
    v = random_direction(len(network.flat), 0)
    exact = network.autodiff()(v)
    coarse, fine = (relative_difference(exact, network.numeric(step)(v)) for step in (0.02, 0.01))
    assert coarse / fine == pytest.approx(4, rel=0.02)


def test_the_step_is_a_distance_whatever_the_length_of_v():
    visited = []

    def gradient(shift: torch.Tensor) -> torch.Tensor:
        visited.append(float(shift.norm()))
        return shift**3 + 2 * shift

    product = central_differences(gradient, 0.25)
    v = torch.tensor([3.0, 4.0], dtype=torch.float64)
    np.testing.assert_allclose(product(100 * v).numpy(), 100 * product(v).numpy(), rtol=1e-12)
    np.testing.assert_allclose(visited, 0.25)
    assert product(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_linear_regression():
    """H = X^T X / n whatever the weights and targets, so central differences are exact for any step, and Lanczos with them."""
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(30, 8)) * np.arange(1, 9)), torch.from_numpy(rng.normal(size=30))
    theta = torch.from_numpy(rng.normal(size=8))
    product = central_differences(lambda shift: x.T @ (x @ (theta + shift) - y) / 30, 10.0)
    values, vectors = np.linalg.eigh((x.T @ x / 30).numpy())
    found = lanczos(product, random_direction(8, 0), 8, 3)
    np.testing.assert_allclose(found.values, values[::-1][:3], rtol=1e-9)
    np.testing.assert_allclose(np.abs(found.vectors.numpy() @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-6)


@pytest.mark.parametrize("way", ["autodiff", "numeric"])
def test_lanczos_on_a_network_against_its_full_hessian(way):
    network = Network(1)
    product = network.autodiff() if way == "autodiff" else network.numeric(1e-4)
    values, vectors = np.linalg.eigh(torch.func.hessian(network.loss)(network.flat).numpy())
    found = lanczos(product, random_direction(len(network.flat), 2), 36, 4)
    accuracy = 1e-9 if way == "autodiff" else 1e-6
    np.testing.assert_allclose(found.values, values[::-1][:4], rtol=accuracy)
    np.testing.assert_allclose(np.abs(found.vectors.numpy() @ vectors[:, ::-1][:, :4]), np.eye(4), atol=1e3 * accuracy)
    assert values[0] < 0  # a network's Hessian is not positive; the lower end is found too
    assert found.ritz[0] == pytest.approx(values[0], rel=1e-4)


def test_relative_difference():
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) == pytest.approx(0.2)
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_difference(torch.zeros(2), torch.ones(2)) == float("inf")


# ---- alignment -------------------------------------------------------------------------------------------------------


def test_a_planted_direction_is_seen():
    eigenvectors = torch.eye(1000, dtype=torch.float64)[:5]
    tilt = np.deg2rad(40)
    axes = torch.zeros((2, 1000), dtype=torch.float64)
    axes[0, 3], axes[0, 700] = -np.cos(tilt), np.sin(tilt)  # against the fourth eigenvector, by its other sign
    axes[1, 800] = 1
    found = align(axes, eigenvectors, ["p", "q", "r"], 0)
    assert found.largest == pytest.approx(np.cos(tilt)) == found.cosines[0][3]
    assert found.cosines[1] == [0.0] * 5
    np.testing.assert_allclose(found.angles, [40, 90])
    assert found.z == pytest.approx((np.cos(tilt) - found.random_mean) / found.random_std)
    assert found.z > 30
    assert found.units == ["p", "q", "r"]


@pytest.mark.parametrize("shapes", [(3, 10), (10, 3), (4, 4), (1, 1)])
def test_principal_angles_against_scipy(shapes):
    rng = np.random.default_rng(sum(shapes))
    a, b = (rng.normal(size=(n, 40)) * rng.uniform(0.1, 9, size=(n, 1)) for n in shapes)
    b[0] = a[0] + 0.01 * b[0]  # one small angle
    expected = np.rad2deg(subspace_angles(a.T, b.T))[::-1]
    np.testing.assert_allclose(principal_angles(torch.from_numpy(a), torch.from_numpy(b)), expected, rtol=1e-6)


def test_principal_angles_of_rows_that_repeat():
    a = torch.tensor([[1.0, 0, 0], [2.0, 0, 0]])
    np.testing.assert_allclose(principal_angles(a, torch.tensor([[1.0, 1, 0], [0, 0, 1.0]])), [45], rtol=1e-6)


@pytest.mark.parametrize(("directions", "eigenvectors", "entries"), [(3, 10, 40), (3, 10, 400), (1, 1, 5), (4, 6, 6)])
def test_chance_is_that_of_random_vectors_of_full_length(directions, eigenvectors, entries):
    """Against vectors drawn whole: quantiles, and z of such vectors has mean 0 and standard deviation 1."""
    rng = np.random.default_rng(7)
    drawn = rng.normal(size=(4000, directions, entries))
    drawn /= np.linalg.norm(drawn, axis=2, keepdims=True)
    frame = np.linalg.qr(rng.normal(size=(entries, eigenvectors)))[0]
    seen = np.abs(drawn @ frame).max(axis=(1, 2))
    null = random_largest(directions, eigenvectors, entries, 0)
    np.testing.assert_allclose(np.quantile(null, [0.1, 0.5, 0.9]), np.quantile(seen, [0.1, 0.5, 0.9]), rtol=0.04)
    z = (seen - null.mean()) / null.std()
    assert abs(z.mean()) < 0.07 and abs(z.std() - 1) < 0.05


def test_z_over_seeds_of_unrelated_axes():
    eigenvectors = torch.eye(2000)[:10]
    z = [align(torch.stack([random_direction(2000, s, str(i)).float() for i in range(3)]), eigenvectors, [], 0).z
         for s in range(60)]
    assert abs(np.mean(z)) < 0.4 and 0.7 < np.std(z) < 1.4


@pytest.mark.parametrize("seed", SEEDS)
def test_lifted_axes_measure_the_scores(seed):
    """<normalised gradient, axis>, centred, is the conflict stage's score up to the axis' length and sign."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(5, 60)) * rng.uniform(0.1, 9, size=(5, 1)) + 0.3
    axes = conflict_axes(torch.from_numpy(gradients), 3).numpy()
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    scores, _ = principal_axes(unit @ unit.T, 3)
    np.testing.assert_allclose(np.linalg.norm(axes, axis=1), 1)
    along = unit @ axes.T
    along -= along.mean(axis=0)
    for axis in range(3):
        ratio = along[:, axis] / scores[:, axis]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


def test_there_are_no_more_axes_than_conflicts():
    one, two = torch.eye(6)[0], torch.eye(6)[1]
    assert conflict_axes(torch.stack([one, two, 3 * one, 4 * two]), 3).shape == (1, 6)
    assert conflict_axes(torch.stack([one, 5 * one]), 3).shape == (0, 6)
    (axis,) = conflict_axes(torch.stack([one, two]), 3)
    np.testing.assert_allclose(np.abs(axis.numpy()), np.abs((one - two).numpy()) / np.sqrt(2), atol=1e-7)


# ---- merging gain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_gain_by_products_is_theorem_3_1(seed):
    rng = np.random.default_rng(seed)
    hessian, _ = rotated(list(rng.uniform(0, 9, size=12)), seed)
    taus, weights = torch.from_numpy(rng.normal(size=(4, 12))), list(rng.dirichlet(np.ones(4)))
    theorem = merging_gain(hessian.numpy(), taus.numpy(), weights)
    assert quadratic_gain(lambda v: hessian @ v, lambda b: taus[b], weights) == pytest.approx(theorem, rel=1e-10)
    found = lanczos(lambda v: hessian @ v, random_direction(12, seed), 12, 12)
    assert top_gain(found, lambda b: taus[b], weights) == pytest.approx(theorem, rel=1e-8)


def test_gain_of_the_top_counts_the_top_alone():
    curvatures = [40.0, 9.0, 2.0, 1.0, 0.5, 0.1]
    hessian, vectors = rotated(curvatures)
    taus = torch.stack([vectors[0] + 3 * vectors[5], 2 * vectors[1], -vectors[0]])
    found = lanczos(lambda v: hessian @ v, random_direction(6, 0), 6, 2)
    weights, along = [0.5, 0.25, 0.25], np.array([[1, 0], [0, 2], [-1, 0.0]])
    by_hand = sum(c * np.average((x - np.average(x, weights=weights)) ** 2, weights=weights)
                  for c, x in zip(curvatures, along.T, strict=False)) / 2
    assert top_gain(found, lambda b: taus[b], weights) == pytest.approx(by_hand, rel=1e-8)


def test_measured_gain_is_a_ratio_of_sums():
    branches = np.array([[[10.0, 2], [30.0, 8]], [[20.0, 2], [10.0, 8]]])
    merged = np.array([[6.0, 2], [9.0, 8]])
    gain, low, high = measured_gain(branches, merged, [0.75, 0.25], 0)
    assert gain == pytest.approx(0.75 * 4 + 0.25 * 3 - 1.5)
    per_batch = [(0.75 * 10 + 0.25 * 20 - 6) / 2, (0.75 * 30 + 0.25 * 10 - 9) / 8]  # what one batch twice would give
    assert [low, high] == pytest.approx(sorted(per_batch))


def test_interval_holds_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = rng.integers(5, 15, size=40).astype(float)
        hard = rng.normal(size=40) * 20  # moves every model alike, and must not widen the interval
        merged = np.stack([hard + tokens, tokens], axis=1)
        branches = np.stack([np.stack([hard + tokens * 1.5 + rng.normal(size=40) * 3, tokens], axis=1) for _ in range(2)])
        _, low, high = measured_gain(branches, merged, [0.5, 0.5], 0)
        hits += low <= 0.5 <= high
        assert high - low < 0.4
    assert 0.89 <= hits / 200 <= 0.99
