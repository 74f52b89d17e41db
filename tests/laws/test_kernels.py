"""The fused kernels give the bits of the methods they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anabranch.engine.blocks import Buffers, PlainReader, TensorStack
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.stream import numbers
from anabranch.merge.combination import Combination
from anabranch.merge.consensus import Consensus
from anabranch.merge.select import Cut, above, largest, magnitudes
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
