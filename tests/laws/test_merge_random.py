"""What DARE and DELLA do over many entries: how many survive, which, and how large they become."""

import math

import pytest
import torch
from merge_inputs import call

from anabranch.merge.sparsify import rank_probabilities

N = 200_000


def one_branch(shape=(N,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    branches = torch.randn((1, *shape), generator=generator)
    return {"branches": branches, "base": torch.zeros(shape), "weights": torch.ones(1),
            "draws": torch.rand((1, *shape), generator=generator)}


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_a_binomial_number_and_is_unbiased(name, density):
    """C42: within 5 standard deviations, not a fixed number; survivors are d times 1 / rho."""
    counts = []
    for seed in range(3):
        given = one_branch(seed=seed)
        out, d = call(name, given, density=density), given["branches"][0]
        kept = out != 0
        torch.testing.assert_close(out[kept], d[kept] / density, rtol=2e-7, atol=0)
        assert abs(int(kept.sum()) - density * N) < 5 * math.sqrt(N * density * (1 - density))
        deviation = math.sqrt(float((d.double() ** 2).sum()) * (1 - density) / density)
        assert abs(float(out.double().sum() - d.double().sum())) < 5 * deviation
        counts.append(int(kept.sum()))
    assert len(set(counts)) > 1


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_l1_rescale_is_one_factor_that_keeps_the_norm(name):
    """C41; and without rescale survivors are untouched."""
    given = one_branch((400, 50))
    d, out = given["branches"][0], call(name, given, density=0.3, rescale="l1")
    kept = out != 0
    factors = out[kept] / d[kept]
    assert 0.2 < float(kept.float().mean()) < 0.4
    assert float(factors.max() / factors.min()) == pytest.approx(1, abs=1e-6)
    assert float(out.double().abs().sum()) == pytest.approx(float(d.double().abs().sum()), rel=1e-6)
    plain = call(name, given, density=0.3, rescale="none")
    assert plain[kept].equal(d[kept]) and bool((plain[~kept] == 0).all())


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_density_one_is_the_branch_and_zero_the_base(name):
    given = one_branch((40, 50))
    given["base"] = torch.full((40, 50), 0.25)
    for rescale in ("l1", "none"):
        task = call("task_arithmetic", given)
        assert call(name, given, density=1.0, rescale=rescale).equal(task)
        assert call(name, given, density=0.0, rescale=rescale).equal(given["base"])


def test_della_keeps_the_large_more_often():
    """Shares within 5 standard deviations of rho -+ epsilon in the lowest and highest tenth of each row."""
    given = one_branch((400, 500))
    out = call("della_linear", given, density=0.5, epsilon=0.3, rescale="none")
    order = given["branches"][0].abs().argsort(-1)
    kept = (out != 0).gather(-1, order).float()
    lowest, highest = 0.2 + 0.6 * 24.5 / 499, 0.2 + 0.6 * 474.5 / 499
    for ranks, share in [(slice(0, 50), lowest), (slice(450, 500), highest), (slice(0, 500), 0.5)]:
        n = kept[:, ranks].numel()
        assert abs(float(kept[:, ranks].mean()) - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_della_scales_each_survivor_by_its_own_chance():
    given = one_branch((400, 50))
    d, out = given["branches"][0], call("della_linear", given, density=0.4, epsilon=0.2)
    p, kept = rank_probabilities(d, 0.4, 0.2), out != 0
    torch.testing.assert_close(out[kept], (d / p)[kept], rtol=1e-6, atol=0)
    variance = float((d.double() ** 2 * (1 - p) / p).sum())
    assert abs(float(out.double().sum() - d.double().sum())) < 5 * math.sqrt(variance)


def test_large_sums_stay_finite():
    """C83: magnitudes whose sum no half-precision number can hold."""
    given = one_branch((300,))
    given["branches"] = given["branches"] * 60_000
    for name in ("dare_linear", "della_linear"):
        assert bool(torch.isfinite(call(name, given, density=0.5, rescale="l1")).all())
