"""The fused kernels give the bits of the methods they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anabranch.engine.blocks import Buffers, PlainReader, TensorStack, Uniform
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.stream import numbers
from anabranch.merge.combination import Combination
from anabranch.merge.consensus import Consensus
from anabranch.merge.select import Cut, above, largest, magnitudes
from anabranch.merge.sparsify import Dropped, factors_of, l1_factors
from anabranch.merge.stack import Block, WholeStack

SIZES = [1, 7, 1024, 1025, 5000]


def tensors(k: int, n: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Branches near a base; some entries did not move, some are equal in size."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(n, generator=generator)
    steps = 0.01 * torch.randn(k, n, generator=generator).mul(64).round().div(64)
    return (base + steps * (torch.rand(k, n, generator=generator) > 0.3)).to(dtype), base.to(dtype)


def agree(method, x: torch.Tensor, base: torch.Tensor, out_dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    """Run both forms on the same numbers; the same bits must come out."""
    plain = method(Block(start, x.float(), base.float())).to(out_dtype)
    out = torch.empty_like(plain)
    stored = [numbers(t.contiguous()) for t in (x, base)]
    assert method.fused(start, *stored, numbers(out)) == bool(torch.isfinite(plain).all())
    assert out.view(torch.uint8).equal(plain.view(torch.uint8))
    return plain


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
outs = pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])


@dtypes
@outs
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("coefficients, more", [
    ((0.5, 0.3, 0.2), {}), ((0.5, 0.0, -1.7), {"anchored": True}), ((0.0, 0.0, 0.0), {"anchored": True}),
    ((0.0, 0.0, 0.0), {}), ((0.1, 0.7, 0.2), {"base_coefficient": -0.37}), ((1 / 3, 0.0, 1e-3), {"anchored": True})])
def test_combination(dtype, out, n, coefficients, more):
    x, base = tensors(3, n, dtype, n)
    got = agree(Combination(coefficients, **more), x, base, out)
    exact = sum(c * (branch.double() - (base.double() if more.get("anchored") else 0))
                for c, branch in zip(coefficients, x, strict=True))
    exact = exact + base.double() * (1.0 if more.get("anchored") else more.get("base_coefficient", 0.0))
    torch.testing.assert_close(got.double(), exact, rtol=1e-2 if out == torch.bfloat16 else 1e-5, atol=1e-6)


@dtypes
@outs
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), n=st.sampled_from(SIZES), elect=st.booleans(),
       normalize=st.booleans(), scale=st.sampled_from([1.0, 0.7]), cut=st.sampled_from(["none", "plain", "tied", "band"]),
       start=st.sampled_from([0, 65536]))
def test_consensus(dtype, out, seed, k, n, elect, normalize, scale, cut, start):
    x, base = tensors(k, n, dtype, seed)
    generator = np.random.default_rng(seed)
    sizes = (x.float() - base.float()).abs()
    values = [float(np.float32(generator.choice(sizes[i].numpy()))) for i in range(k)]
    last = {"plain": -1, "tied": start + n // 2, "band": start + n // 3}.get(cut, -1)
    cuts = None if cut == "none" else tuple(Cut(value, last) for value in values)
    ceilings = tuple(Cut(value * 2, start + n // 4) for value in values) if cut == "band" else None
    weights = tuple(float(np.float32(w)) for w in generator.uniform(-0.2, 1.0, k))
    factors = tuple(1.0 if i % 2 else 1.3 for i in range(k))
    agree(Consensus(cuts, factors, weights, elect, normalize, scale, ceilings), x, base, out, start)


@dtypes
@outs
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), n=st.sampled_from(SIZES), elect=st.booleans(),
       normalize=st.booleans(), each=st.booleans(), start=st.sampled_from([0, 65536, 5 * 2**32]))
def test_dropped_at_random(dtype, out, seed, k, n, elect, normalize, each, start):
    """The kernel draws what the engine hands to the method, also beyond the 32 bits of an index."""
    x, base = tensors(k, n, dtype, seed)
    generator = np.random.default_rng(seed)
    draw = Uniform(seed, [f"model-{i}" for i in range(k)], "some.weight")
    draws = torch.empty(k, n)
    draw(start, start + n, draws)
    rho = tuple(generator.choice([0.0, 0.3, 0.55, 1.0], k).tolist())
    weights = tuple(float(np.float32(w)) for w in generator.uniform(-0.2, 1.0, k))
    method = Dropped(rho, (1.0,) * k if each else tuple(generator.uniform(1, 2, k).tolist()),
                     Consensus(None, (1.0,) * k, weights, elect, normalize, 0.9), each=each)
    plain = method(Block(start, x.float(), base.float(), draws)).to(out)
    got = torch.empty_like(plain)
    assert method.fused_by_keys(start, *(numbers(t.contiguous()) for t in (x, base)), numbers(got), draw.keys)
    assert got.view(torch.uint8).equal(plain.view(torch.uint8))


def test_draws_are_uniform_and_independent():
    """Means, variances, neighbours and pairs of branches within 5 sigma; other names and seeds give other numbers."""
    n = 1 << 20
    keys = ["a", "b"]
    draws = torch.empty(2, n)
    Uniform(0, keys, "w")(0, n, draws)
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    u = (draws.double() - 0.5) * 12**0.5
    assert bool((u.mean(1).abs() < 5 / n**0.5).all()) and bool(((u.square().mean(1) - 1).abs() < 5 * 0.9 / n**0.5).all())
    for lag in (1, 2, 7, 64, 1024, 65536):
        assert abs(float((u[0, lag:] * u[0, :-lag]).mean())) < 5 / (n - lag) ** 0.5
    assert abs(float((u[0] * u[1]).mean())) < 5 / n**0.5
    counts = torch.histc(draws[0], 256, 0, 1)
    assert abs(float(((counts - n / 256) ** 2 / (n / 256)).sum()) - 255) < 5 * (2 * 255) ** 0.5
    for seed, key, name in ((1, "a", "w"), (0, "c", "w"), (0, "a", "v")):
        other = torch.empty(1, n)
        Uniform(seed, [key], name)(0, n, other)
        assert abs(float(((other[0].double() - 0.5) * 12**0.5 * u[0]).mean())) < 5 / n**0.5
    part = torch.empty(2, 1000)
    Uniform(0, keys, "w")(65536, 66536, part)
    assert part.equal(draws[:, 65536:66536])


@dtypes
@pytest.mark.parametrize("n", [5, 1024, 70_001])
def test_l1_sums_are_those_of_the_definition(tmp_path, dtype, n):
    x, base = tensors(2, n, dtype, 3)
    opened = []
    for i, tensor in enumerate([base, *x]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text("{}")
        save_file({"w": tensor.contiguous()}, tmp_path / str(i) / "model.safetensors")
        opened.append(Checkpoint.open(tmp_path / str(i)))
    buffers, draw = Buffers(), Uniform(0, ["a", "b"], "w")
    readers = [PlainReader(checkpoint, "w", buffers, f"raw-{i}") for i, checkpoint in enumerate(opened)]
    stack = TensorStack((n,), readers[1:], readers[0], (), "entry", 1 << 16, buffers, draw, fused=True)
    draws = torch.empty(2, n)
    draw(0, n, draws)
    dropped = Dropped((0.3, 0.8), (1.0, 1.0), Consensus(None, (1.0, 1.0), (1.0, 1.0), False, False, 1.0))
    found = factors_of(*stack.l1_sums(dropped.densities))
    assert found == l1_factors(WholeStack(x.float(), base.float(), draws), dropped.kept)
    size = (x.double() - base.double()).abs()
    for factor, s, d, rho in zip(found, size, draws, dropped.densities, strict=True):
        left = float(s[d < rho].sum())
        assert factor == (pytest.approx(float(s.sum()) / left, rel=1e-6) if left > 1e-7 else 1.0)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_numbers_that_are_not_finite_are_noticed(dtype, value):
    """The last is finite in float32 and infinite once it is rounded to bfloat16."""
    x, base = tensors(2, 1500, torch.float32, 0)
    x[0, 1400] = value
    x, base = x.to(dtype), base.to(dtype)
    out = torch.empty(1500, dtype=torch.bfloat16)
    stored = [numbers(t.contiguous()) for t in (x, base)]
    assert not Combination((1.0, 0.0)).fused(0, *stored, numbers(out))
    assert not Consensus(None, (1.0, 1.0), (1.0, 1.0), True, False, 1.0).fused(0, *stored, numbers(out))
    assert Combination((0.0, 1.0)).fused(0, *stored, numbers(out))


@dtypes
@pytest.mark.parametrize("n, frozen", [(3, 0.0), (70_001, 0.4), (2_300_017, 0.4), (2_300_017, 0.0)])
def test_ranks_found_in_a_sample_and_one_pass_are_the_exact_ones(tmp_path, dtype, n, frozen):
    generator = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(n, generator=generator)).to(dtype)
    branches = [(base.float() + 1e-3 * torch.randn(n, generator=generator)
                 * (torch.rand(n, generator=generator) >= frozen)).to(dtype) for _ in range(2)]
    opened = []
    for i, tensor in enumerate([base, *branches]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text("{}")
        save_file({"w": tensor}, tmp_path / str(i) / "model.safetensors")
        opened.append(Checkpoint.open(tmp_path / str(i)))
    buffers = Buffers()
    readers = [PlainReader(checkpoint, "w", buffers, f"raw-{i}") for i, checkpoint in enumerate(opened)]
    stack = TensorStack((n,), readers[1:], readers[0], (), "entry", 1 << 16, buffers, fused=True)
    assert stack.fusible
    counts = [[max(1, n // 2), max(1, n // 1000)], [max(1, int(0.9 * n))]]
    found = largest(stack, magnitudes, counts)
    plain = WholeStack(torch.stack([b.float() for b in branches]), base.float())
    assert found == largest(plain, magnitudes, counts)
    for branch, cuts, of_branch in zip(branches, found, counts, strict=True):
        size = (branch.float() - base.float()).abs()
        for cut, count in zip(cuts, of_branch, strict=True):
            kept = above(size, cut, 0)
            assert int(kept.sum()) == count and float(size[kept].min()) >= float(size[~kept].max())


def test_a_sample_that_misleads_costs_a_pass_and_no_bit(tmp_path):
    """The entries that the sample sees did not move at all, so its brackets are wrong."""
    n = 1 << 22
    base = torch.zeros(n)
    branch = torch.rand(n, generator=torch.Generator().manual_seed(0)).reshape(-1, 32, 4096)
    branch[:, 0] = 0
    branch = branch.reshape(-1)
    opened = []
    for name, tensor in (("base", base), ("branch", branch)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
        opened.append(Checkpoint.open(tmp_path / name))
    buffers = Buffers()
    readers = [PlainReader(checkpoint, "w", buffers, f"raw-{i}") for i, checkpoint in enumerate(opened)]
    stack = TensorStack((n,), readers[1:], readers[0], (), "entry", 1 << 18, buffers, fused=True)
    assert largest(stack, magnitudes, [[n // 2]]) == largest(WholeStack(branch[None], base), magnitudes, [[n // 2]])
