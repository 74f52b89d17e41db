"""Truncated decompositions, ranks under a budget and joint bases, against numpy's dense SVD and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from anabranch.merge.low_rank import (
    energy_of,
    first,
    joint_bases,
    kept_share,
    low_rank,
    product_difference,
    product_length,
    rank_for,
    ranks_for_budget,
    shared_bases,
)
from anabranch.rows import generator


def matrix(m: int, n: int, decay: float, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    u, v = np.linalg.qr(rng.normal(size=(m, m)))[0], np.linalg.qr(rng.normal(size=(n, n)))[0]
    r = min(m, n)
    return torch.from_numpy((u[:, :r] * decay ** np.arange(r)) @ v[:, :r].T).float()


def product(found: object) -> torch.Tensor:
    return (found.left * found.values) @ found.right  # type: ignore[attr-defined] - a LowRank


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (1, 7), (7, 1), (25, 25)])
def test_without_a_rank_the_matrix_comes_back(shape: tuple[int, int]) -> None:
    a = matrix(*shape, decay=0.8)
    found = low_rank(a, generator(0, "x"))
    assert found.whole
    torch.testing.assert_close(product(found), a, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(len(found.values)), atol=1e-5, rtol=0)
    assert found.energy == pytest.approx(float(np.linalg.norm(a.numpy().astype(float)) ** 2), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 13])
@pytest.mark.parametrize("shape", [(200, 150), (90, 260)])
def test_a_random_subspace_is_nearly_the_best_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    a = matrix(*shape, decay=0.95)
    s = np.linalg.svd(a.numpy().astype(float), compute_uv=False)
    best = float((s[rank:] ** 2).sum())
    found = low_rank(a, generator(0, "x"), count=rank)
    assert len(found.values) == rank and not found.whole
    lost = float((a - product(found)).double().square().sum())
    assert best <= lost * (1 + 1e-4) and lost <= best * 1.01
    np.testing.assert_allclose(found.values.numpy(), s[:rank], rtol=1e-3)
    assert found.kept == pytest.approx(1 - lost / found.energy, abs=1e-5)  # what it says of itself is what it keeps


def test_a_noisy_matrix_still_keeps_nearly_the_best() -> None:
    a = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 400)).astype(np.float32))  # the hardest: a flat spectrum
    s = np.linalg.svd(a.numpy().astype(float), compute_uv=False)
    found = low_rank(a, generator(0, "x"), count=40)
    assert found.kept >= 0.97 * float((s[:40] ** 2).sum() / (s**2).sum())


def test_the_same_bits_again_and_other_draws_otherwise() -> None:
    a = matrix(200, 150, 0.97)
    one, same, other = (low_rank(a, generator(0, n), count=8) for n in ("x", "x", "y"))
    assert torch.equal(one.left, same.left) and torch.equal(one.right, same.right)
    assert not torch.equal(one.left, other.left)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_a_share_of_energy_is_reached_with_the_fewest_directions(share: float) -> None:
    a = matrix(160, 140, decay=0.9)
    s = np.linalg.svd(a.numpy().astype(float), compute_uv=False) ** 2
    wanted = int((s.cumsum() < share * s.sum() * (1 - 1e-6)).sum()) + 1
    found = low_rank(a, generator(0, "x"), share=share)
    assert found.kept >= share - 1e-5
    assert abs(len(found.values) - wanted) <= (1 if share < 1 else 12)  # at 1 only rounding is left to keep


def test_zeros_have_no_directions() -> None:
    found = low_rank(torch.zeros(6, 5), generator(0, "x"), count=3)
    assert len(found.values) == 0 and found.whole and found.kept == 1 and product(found).shape == (6, 5)


def test_a_matrix_of_low_rank_gets_no_more_than_it_has() -> None:
    a = matrix(300, 200, 0.9)
    u, s, vt = np.linalg.svd(a.numpy().astype(float))
    small = torch.from_numpy((u[:, :3] * s[:3]) @ vt[:3]).float()
    found = low_rank(small, generator(0, "x"), count=20)
    torch.testing.assert_close(product(found), small, atol=1e-6, rtol=0)
    assert len(first(found, 2).values) == 2
    exact = low_rank(torch.cat([small[:40, :30], torch.zeros(2, 30)]), generator(0, "x"))  # by the Gram matrix
    assert len(exact.values) <= 6 and exact.whole and bool((exact.values > 0).all())


def test_ranks_for_a_share() -> None:
    values = torch.tensor([3.0, 2.0, 1.0])  # squares 9, 4, 1
    assert [rank_for(values, 14.0, s) for s in (0.5, 9 / 14, 0.7, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for(values, 100.0, 0.9) == 3 and kept_share(values, 14.0) == 1


def test_a_budget_keeps_as_much_as_any_other_choice_of_its_cost() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        spectra = {n: torch.from_numpy(np.sort(rng.exponential(size=4))[::-1].copy()).float() for n in "abc"}
        costs = {"a": 3, "b": 5, "c": 4}
        ranks = ranks_for_budget(spectra, costs, 24)
        spent = sum(ranks[n] * costs[n] for n in "abc")
        assert spent <= 24
        kept = sum(float(spectra[n][: ranks[n]].square().sum()) for n in "abc")
        best = max(sum(float(spectra[n][:r].square().sum()) for n, r in zip("abc", chosen, strict=True))
                   for chosen in itertools.product(range(5), repeat=3)
                   if sum(r * costs[n] for n, r in zip("abc", chosen, strict=True)) <= spent)
        assert kept == pytest.approx(best, rel=1e-6)


def test_a_budget_of_equal_sizes_takes_the_largest_singular_values() -> None:
    spectra = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([4.0, 3.0])}
    assert ranks_for_budget(spectra, {"a": 7, "b": 7}, 21) == {"a": 1, "b": 2}
    assert ranks_for_budget(spectra, {"a": 7, "b": 7}, 6) == {"a": 0, "b": 0}


def test_every_product_is_whole_in_the_joint_bases() -> None:
    rng = np.random.default_rng(2)
    for m, n, ranks in ((20, 30, (2, 5, 1)), (4, 30, (3, 3, 3)), (20, 3, (2, 0, 2)), (5, 5, (5, 5))):
        lefts = [torch.from_numpy(rng.normal(size=(m, r))).float() for r in ranks]
        rights = [torch.from_numpy(rng.normal(size=(r, n))).float() for r in ranks]
        u, vt, cores = joint_bases(lefts, rights)
        assert cores.shape == (len(ranks), min(m, sum(ranks)), min(n, sum(ranks)))
        torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64))
        for b, a, core in zip(lefts, rights, cores, strict=True):
            torch.testing.assert_close((u @ core @ vt).float(), b @ a, atol=1e-5, rtol=1e-5)


def test_shared_bases_hold_all_at_full_rank_and_the_strongest_below() -> None:
    cores = torch.from_numpy(np.random.default_rng(3).normal(size=(3, 6, 6)))
    left, right = shared_bases(cores, 6)
    torch.testing.assert_close(left @ (left.T @ cores @ right.T) @ right, cores)
    left, _ = shared_bases(cores, 2)
    wanted = np.linalg.svd(np.concatenate(list(cores.numpy()), 1))[0][:, :2]
    np.testing.assert_allclose((left @ left.T).numpy(), wanted @ wanted.T, atol=1e-9)


def test_energy_is_summed_in_float64() -> None:
    a = torch.full((2000, 2000), 1e-3)
    assert energy_of(a) == pytest.approx(2000 * 2000 * float(a[0, 0].double()) ** 2, rel=1e-12)


def test_the_difference_of_two_products_without_forming_them() -> None:
    rng = np.random.default_rng(4)
    b, a = torch.from_numpy(rng.normal(size=(30, 7))).float(), torch.from_numpy(rng.normal(size=(7, 20))).float()
    for c, d in ((b.bfloat16(), a.bfloat16()), (b * (1 + 1e-5), a), (-b, 0.5 * a)):
        wanted = np.linalg.norm(b.double().numpy() @ a.double().numpy() - c.double().numpy() @ d.double().numpy()) ** 2
        assert product_difference(b, a, c, d) == pytest.approx(wanted, rel=1e-6)
    assert product_difference(b, a, b, a) == 0
    assert product_length(b, a) == pytest.approx(float((b.double() @ a.double()).square().sum()), rel=1e-9)
