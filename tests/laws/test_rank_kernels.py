"""The fused kernels of della, sce, arcee_fusion and ram give the bits of the methods they stand for, statistics included."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anabranch.engine.blocks import MERGED, Buffers, PlainReader, TensorStack, Uniform
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.stream import fused_form, numbers
from anabranch.merge import METHODS, rank_kernels
from anabranch.merge.random_drops import ranked_sums
from anabranch.merge.rank_passes import variance_cut
from anabranch.merge.sparsify import factors_of, l1_factors, rank_probabilities
from anabranch.merge.stack import WholeStack

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def tensors(k: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, frozen: float = 0.3):
    """Branches near a base: some entries did not move, some moved by equal amounts, rows move unevenly."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(shape, generator=generator)
    size = 0.01 * torch.rand((*shape[:-1], 1), generator=generator)
    steps = size * torch.randn((k, *shape), generator=generator).mul(64).round().div(64)
    return (base + steps * (torch.rand((k, *shape), generator=generator) > frozen)).to(dtype), base.to(dtype)


def opened(folder, x, base, kind: str, entries: int = 1 << 16) -> TensorStack:
    readers, buffers = [], Buffers()
    for i, tensor in enumerate([base, *x]):
        (folder / str(i)).mkdir()
        (folder / str(i) / "config.json").write_text("{}")
        save_file({"w": tensor.contiguous()}, folder / str(i) / "model.safetensors")
        readers.append(PlainReader(Checkpoint.open(folder / str(i)), "w", buffers, f"raw-{i}"))
    draw = Uniform(0, [f"model-{i}" for i in range(len(x))], "w")
    return TensorStack(tuple(base.shape), readers[1:], readers[0], (), kind, entries, buffers, draw, fused=True)


def agree(folder, name: str, x, base, arguments, out=torch.bfloat16, entries: int = 1 << 16) -> torch.Tensor:
    """The method on whole float32 tensors, and its fused form block by block on what is stored: the same bits."""
    method, weights = METHODS[name], WEIGHTS[: len(x)]
    stack = opened(folder, x, base, method.block_for(arguments), entries)
    draws = torch.empty(len(x), base.numel())
    stack.draw(0, base.numel(), draws)
    inputs = {"branches": x.float(), "base": base.float(), "weights": weights, "draws": draws.view(x.shape)}
    plain = method.function(*(inputs[i] for i in method.inputs), **arguments).to(out)
    blockwise = method.streamed(stack, *([weights] if "weights" in method.inputs else []), **arguments)
    fast, got = fused_form(blockwise, stack), torch.empty_like(plain).reshape(-1)
    assert fast is not None
    for start, stop in stack.ranges():
        assert fast(start, *stack.stored(start, stop), numbers(got[start:stop]))
    assert got.view(torch.uint8).equal(plain.reshape(-1).view(torch.uint8))
    return plain


@dtypes
@pytest.mark.parametrize("shape", [(1,), (7,), (1500,), (3, 1), (300, 3), (700, 97), (40, 2048), (9, 5000), (2100, 64)])
@pytest.mark.parametrize("name, arguments", [
    ("della", {"density": 0.5, "rescale": "l1"}), ("della", {"density": [0.3, 1.0, 0.0], "epsilon": 0.1, "scale": 0.7}),
    ("della_linear", {"density": 0.5, "rescale": "none", "normalize": True}),
    ("della_linear", {"density": 0.4, "epsilon": 0.3})])
def test_della(tmp_path, dtype, shape, name, arguments):
    agree(tmp_path, name, *tensors(3, shape, dtype), arguments)


def test_survivors_that_are_too_many_to_be_kept_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr("anabranch.merge.random_drops.FEW_BLOCKS", 1)
    agree(tmp_path, "della", *tensors(2, (2100, 64), torch.bfloat16), {"density": 0.5, "rescale": "l1"})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.sampled_from([1, 2, 3, 31, 64, 1000, 5000]),
       values=st.sampled_from(["normal", "few", "equal", "outlier", "falling", "wide"]))
def test_chances_are_those_of_the_stable_sort(seed, n, values):
    generator = np.random.default_rng(seed)
    d = generator.standard_normal(n)
    d = {"normal": d, "few": np.round(d * 4), "equal": np.ones(n), "outlier": np.where(np.arange(n) == n // 2, 1e30, d),
         "falling": -np.sort(-1 - 1e-4 * abs(d)), "wide": np.exp(15 * d)}[values].astype(np.float32)
    if values == "outlier":
        d[: n // 3] = 1e-30  # all but one share the lowest bucket
    wanted = rank_probabilities(torch.from_numpy(d)[None], 0.5, 0.2)[0].numpy()
    table, chance = np.sort(wanted), np.empty(n, np.float32)
    room = rank_kernels.OCTAVES << rank_kernels.FINEST
    assert rank_kernels._chances(abs(d).view(np.uint32), table, np.empty(n, np.uint32), np.empty(room, np.uint32),
                                 np.empty(n, np.uint64), chance)
    assert np.array_equal(chance, wanted)


@dtypes
def test_sums_of_survivors_are_those_of_the_definition(tmp_path, dtype):
    """Rows do not end where runs do."""
    x, base = tensors(2, (333, 501), dtype)
    stack = opened(tmp_path, x, base, "row", 50_000)
    dropped = METHODS["della"].streamed(stack, WEIGHTS[:2], density=[0.5, 0.7], rescale="none")
    draws = torch.empty(2, base.numel())
    stack.draw(0, base.numel(), draws)
    plain = WholeStack(x.float(), base.float(), draws.view(x.shape), kind="row")
    before, after, _ = ranked_sums(stack, dropped)
    assert factors_of(before, after) == l1_factors(plain, dropped.kept)


def test_draws_of_a_row_across_the_bounds_of_32_bits():
    draw, out = Uniform(3, ["a"], "w"), torch.empty(1, 3000)
    first = (1 << 32) - 1700
    for start in (first, 5):
        draw(start, start + 3000, out)
        got = np.empty(3000, np.float32)
        rank_kernels._draw_row(start, draw.keys[0, 0], draw.keys[0, 1], got)
        assert np.array_equal(got, out[0].numpy())


@dtypes
@pytest.mark.parametrize("k, shape", [(3, (7,)), (3, (700, 300)), (2, (1200, 2000)), (1, (4, 100))])
@pytest.mark.parametrize("arguments", [{"select_topk": 0.3}, {"select_topk": 1.0, "floor": 1.0}, {"select_topk": 0.0}])
def test_sce(tmp_path, dtype, k, shape, arguments):
    agree(tmp_path, "sce", *tensors(k, shape, dtype), arguments)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_cut_of_variances_among_equal_ones(tmp_path, share):
    """Steps of a few sizes: the cut falls among many equal variances, of which the first are kept."""
    generator = torch.Generator().manual_seed(1)
    base = torch.zeros(300_000)
    x = torch.randint(-3, 4, (3, 300_000), generator=generator).float()
    agree(tmp_path, "sce", x, base, {"select_topk": share}, torch.float32)


def test_a_sample_that_misleads_costs_a_pass_and_no_bit(tmp_path):
    """The entries that the sample sees did not move at all."""
    n = 1 << 22
    x = torch.rand((2, n), generator=torch.Generator().manual_seed(0)).reshape(2, -1, 32, 4096)
    x[:, :, 0] = 0
    x, base = x.reshape(2, n), torch.zeros(n)
    agree(tmp_path, "sce", x, base, {"select_topk": 0.4}, torch.float32, 1 << 18)
    variance = (x[0] - x[1]).double() ** 2
    cut, keep, there = variance_cut(opened(tmp_path / "0", x, base, "entry"), 0.4)
    count = int(int((variance > 0).sum()) * 0.4)
    assert abs(int((variance / 4 > cut.value).sum()) + keep - count) <= 3 and 1 <= keep <= there  # float32 against float64


@dtypes
@pytest.mark.parametrize("shape", [(64,), (1500,), (700, 97), (300, 2048)])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
def test_arcee_fusion(tmp_path, dtype, shape, out):
    x, base = tensors(1, shape, dtype)
    merged = agree(tmp_path, "arcee_fusion", x, base, {}, out)
    if base.numel() > 10_000:
        assert 0 < int((merged == x[0].to(out)).sum()) < base.numel()


def test_importances_below_zero(tmp_path):
    """Where rounding makes divergences negative, and all quantiles with them."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(500, 64, generator=generator)
    x = base + 1e-6 * torch.randn(1, 500, 64, generator=generator)
    agree(tmp_path, "arcee_fusion", x, base, {}, torch.float32, 5000)


@dtypes
@pytest.mark.parametrize("name, arguments", [("ram", {}), ("ram", {"epsilon": 0.004}), ("ramplus_tl", {}),
                                             ("ramplus_tl", {"r": 0.5, "alpha": 9.0, "epsilon": 0.004})])
@pytest.mark.parametrize("k, shape", [(1, (5,)), (3, (300, 500)), (3, (1025,))])
def test_ram(tmp_path, dtype, name, arguments, k, shape):
    agree(tmp_path, name, *tensors(k, shape, dtype), arguments)


@dtypes
@pytest.mark.parametrize("arguments", [{}, {"floor": 1e-6}])
@pytest.mark.parametrize("bits", [(0x7FC1, 0), (0xFFC1, 0), (0x7FC0, 0xFFC0), (0x7F80, 0x7F80), (0x7F80, 0xFF80)])
def test_sce_of_numbers_that_are_not_finite(tmp_path, dtype, arguments, bits):
    """As `--allow-nonfinite` merges them: one NaN for all, wherever the sums were formed."""
    x, base = tensors(3, (40, 100), torch.bfloat16)
    base.view(torch.int16)[20, 50] = np.array(bits[0], np.uint16).view(np.int16).item()
    if bits[1]:
        x.view(torch.int16)[:, 20, 50] = np.array(bits[1], np.uint16).view(np.int16).item()
    stack, found = opened(tmp_path, x.to(dtype), base.to(dtype), "entry"), []
    for stack.fused in (True, False):
        blockwise = METHODS["sce"].streamed(stack, **arguments)
        (block,) = stack
        found.append((np.array(blockwise.weights).view(np.uint64).tolist(), blockwise(block).view(torch.int32)))
        assert not stack.fused or not blockwise.fused(0, *stack.stored(0, 4000), np.empty(4000, np.float32))
    assert found[0][0] == found[1][0] and found[0][1].equal(found[1][1])


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.4e38])
@pytest.mark.parametrize("name, k", [("della", 3), ("sce", 3), ("ram", 3), ("ramplus_tl", 3), ("arcee_fusion", 1)])
def test_numbers_that_are_not_finite_are_left_to_the_definition(tmp_path, name, k, value):
    """3.4e38 is finite in float32 and infinite once it is rounded to bfloat16."""
    x, base = tensors(k, (40, 100), torch.float32)
    x[:, 20, 50] = value
    method, arguments = METHODS[name], {"density": 1.0} if name == "della" else {}
    stack = opened(tmp_path, x, base, method.block_for(arguments))
    weights = [WEIGHTS[:k]] if "weights" in method.inputs else []
    out, told = torch.empty(4000, dtype=torch.bfloat16), []
    try:
        blockwise = method.streamed(stack, *weights, **arguments)
        for start, stop in stack.ranges():
            fast = fused_form(blockwise, stack)
            told.append(fast is not None and fast(start, *stack.stored(start, stop), numbers(out[start:stop])))
    except ValueError:
        told.append(False)
    assert not all(told)
    assert MERGED["BF16"] == out.dtype
