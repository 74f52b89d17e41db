"""The diagnostics' arithmetic against exact answers: parabolas, quadratics, geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anabranch.diagnose.connectivity import barrier, curve, mean_interval, paired_gap
from anabranch.diagnose.displacement import Moments, kind_of, layer_of
from anabranch.diagnose.perturbation import area, noise_for, paired_difference
from anabranch.diagnose.surface import Plane

ALPHAS = np.linspace(0, 1, 21)


def sums(losses: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The same curve in every batch."""
    return losses[:, None] * tokens[None, :]


def test_a_hump_has_its_height_and_place():
    tokens = np.array([10.0, 30.0, 7.0])
    found = barrier(ALPHAS, sums(1 + 4 * 0.3 * ALPHAS * (1 - ALPHAS), tokens), tokens, name="hump")
    assert found.height == pytest.approx(0.3) and found.at == 0.5
    assert found.low == pytest.approx(0.3) and found.high == pytest.approx(0.3)  # all batches agree


def test_a_slope_and_a_bowl_have_no_barrier():
    tokens = np.ones(4)
    for losses in (2 + 3 * ALPHAS, (ALPHAS - 0.3) ** 2, np.full(21, 1.7)):
        assert barrier(ALPHAS, sums(losses, tokens), tokens, name="none").height == pytest.approx(0, abs=1e-12)


def test_the_barrier_is_above_the_line_between_unequal_ends():
    """Ends 0 and 1, one in the middle: the line is at 0.5 there, so the barrier is 0.5 and not 1."""
    tokens = np.ones(2)
    found = barrier(np.array([0, 0.5, 1.0]), sums(np.array([0.0, 1.0, 1.0]), tokens), tokens, name="step")
    assert found.height == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5) and found.high == pytest.approx(0.5)


def test_a_paired_gap_forgets_what_both_models_share():
    rng = np.random.default_rng(3)
    hard, tokens = rng.normal(3, 2, 30), np.full(30, 4.0)  # rows differ far more than models do
    gap, low, high = paired_gap(4 * (hard + 0.1), 4 * hard, tokens, name="p")
    assert (gap, low, high) == pytest.approx((0.1, 0.1, 0.1))
    alone = mean_interval(4 * hard, tokens, name="p")
    assert alone[1] - alone[0] > 0.5


def test_the_interval_of_a_barrier_covers_the_truth_about_as_often_as_it_says():
    hits, rng, truth = 0, np.random.default_rng(0), 0.2
    middle = np.array([0.0, 0.5, 1.0])
    for trial in range(200):
        heights = truth + rng.normal(0, 0.3, 40)  # of each batch
        found = barrier(middle, np.stack([np.ones(40), 1 + heights, np.ones(40)]), np.ones(40), name=f"trial {trial}")
        hits += found.low <= truth <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_losses_are_weighted_by_tokens():
    assert curve(np.array([[10.0, 2.0]]), np.array([5.0, 1.0]))[0] == pytest.approx(2.0)
    low, high = mean_interval(np.array([3.0, 6.0, 9.0]), np.array([1.0, 2.0, 3.0]), name="equal")
    assert low == pytest.approx(3.0) and high == pytest.approx(3.0)


# ---- displacement ----------------------------------------------------------------------------------------------------


def moved(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": 60, "model.layers.0.self_attn.q_proj.weight": 25,
              "model.layers.0.mlp.up_proj.weight": 40, "model.layers.1.input_layernorm.weight": 5, "model.norm.weight": 5}
    return {n: scale * torch.randn(c, generator=g) for n, c in shapes.items()}


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return torch.cat(list(tensors.values())).double().numpy()


def moments(models: list[dict[str, torch.Tensor]], base: dict[str, torch.Tensor], merged: int | None,
            branches: list[int], weights: list[float]) -> Moments:
    found = Moments(len(models), branches, weights)
    for name in base:
        found.add(name, base[name], [m[name] for m in models], merged)
    return found


def test_norms_cosines_and_parts_are_those_of_the_whole_vectors():
    base, models = moved(0), [moved(1), moved(2), moved(3)]
    found = moments(models, base, None, [0, 1, 2], [0.5, 0.25, 0.25])
    tau = np.stack([flat(m) - flat(base) for m in models])
    assert found.norms == pytest.approx(np.linalg.norm(tau, axis=1))
    unit = tau / np.linalg.norm(tau, axis=1, keepdims=True)
    assert found.cosines == pytest.approx(unit @ unit.T)
    assert sum(found.layers.values()) == pytest.approx((tau**2).sum(1))
    assert sum(found.kinds.values()) == pytest.approx((tau**2).sum(1))
    assert set(found.layers) == {"0", "1", "model.embed_tokens", "model.norm"}
    assert set(found.kinds) == {"embedding", "attention", "mlp", "norm"}


def test_the_contraction_identity_holds_and_a_stranger_is_not_the_mean():
    base, branches, weights = moved(0), [moved(1), moved(2), moved(3)], [0.2, 0.3, 0.5]
    mean = {n: sum(w * b[n] for w, b in zip(weights, branches, strict=True)) for n in base}
    check = moments([*branches, mean], base, 3, [0, 1, 2], weights).contraction(3)
    assert check.error < 1e-12 and check.is_average
    assert check.merged_from_file == pytest.approx(check.merged, rel=1e-5)
    longer = {n: base[n] + 1.1 * (mean[n] - base[n]) for n in base}
    other = moments([*branches, longer], base, 3, [0, 1, 2], weights).contraction(3)
    assert other.error < 1e-12 and other.is_average is False


@pytest.mark.parametrize(("factor", "is_mean"), [(1.0, True), (0.75, False)])
def test_a_mean_in_bfloat16_is_known_from_another_merge_in_bfloat16(factor, is_mean):
    base, branches = moved(0), [{n: t + 0.03 * moved(i)[n] for n, t in moved(0).items()} for i in (1, 2)]
    merged = {n: (base[n] + factor * (branches[0][n] / 2 + branches[1][n] / 2 - base[n])).bfloat16() for n in base}
    found = Moments(3, [0, 1], [0.5, 0.5], rounding=torch.finfo(torch.bfloat16).eps)
    for name in base:
        found.add(name, base[name], [branches[0][name], branches[1][name], merged[name]], 2)
    assert found.contraction(2).is_average is is_mean


def test_intervals_of_many_segments_are_wider():
    rng = np.random.default_rng(2)
    sums = np.stack([np.ones(20), 1.05 + rng.normal(0, 0.1, 20), np.ones(20)])
    alone = barrier(np.array([0, 0.5, 1.0]), sums, np.ones(20), name="s")
    among = barrier(np.array([0, 0.5, 1.0]), sums, np.ones(20), name="s", tests=20)
    assert among.low < alone.low <= alone.high < among.high and among.height == alone.height


@pytest.mark.parametrize(("name", "layer", "kind"), [
    ("model.layers.11.self_attn.k_proj.bias", "11", "attention"), ("transformer.h.3.mlp.c_fc.weight", "3", "mlp"),
    ("lm_head.weight", "lm_head", "head"), ("model.layers.2.post_attention_layernorm.weight", "2", "norm"),
    ("transformer.wte.weight", "transformer.wte", "embedding"), ("model.layers.0.mlp.experts.5.w1.weight", "0", "mlp"),
    ("rwkv.blocks.0.attention.output.weight", "0", "attention"), ("rwkv.blocks.0.feed_forward.key.weight", "0", "mlp"),
    ("rwkv.blocks.3.ln1.weight", "3", "norm"), ("rwkv.blocks.3.ln2.bias", "3", "norm"),
    ("rwkv.blocks.0.pre_ln.weight", "0", "norm"), ("rwkv.ln_out.weight", "rwkv.ln_out", "norm"),
    ("rwkv.embeddings.weight", "rwkv.embeddings", "embedding"), ("head.weight", "head", "head"),
    ("model.layers.7.attention.wo.weight", "7", "attention"), ("model.layers.7.attention_norm.weight", "7", "norm"),
    ("model.layers.7.ffn_norm.weight", "7", "norm"), ("model.tok_embeddings.weight", "model.tok_embeddings", "embedding"),
    ("output.weight", "output", "head"), ("embed_out.weight", "embed_out", "head"),
    ("language_model.lm_head.weight", "language_model.lm_head", "head"),
    ("transformer.output_layer.weight", "transformer.output_layer", "head"),
    ("model.layers.1.mlp.gate.weight", "1", "mlp"), ("model.layers.1.block_sparse_moe.gate.weight", "1", "mlp"),
    ("model.layers.1.mlp.shared_expert_gate.weight", "1", "mlp"), ("transformer.blocks.2.ffn.up_proj.weight", "2", "mlp"),
    ("transformer.blocks.2.norm_attn_norm.attn.Wqkv.weight", "2", "attention"),
    ("transformer.blocks.2.norm_attn_norm.norm_1.weight", "2", "norm"),
    ("transformer.h.3.ln_1.weight", "3", "norm"), ("model.layers.0.self_attn.q_norm.weight", "0", "norm"),
    ("encoder.layer.4.attention.output.dense.weight", "4", "attention"), ("model.norm.weight", "model.norm", "norm"),
    ("backbone.layers.0.mixer.in_proj.weight", "0", "other"),
    ("language_model.model.layers.0.mlp.up_proj.weight", "0", "mlp"), ("visual.blocks.0.mlp.fc1.weight", "visual", "mlp"),
    ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision_tower.vision_model.encoder", "attention")])
def test_names_are_read_as_people_read_them(name, layer, kind):
    assert layer_of(name) == layer and kind_of(name) == kind


# ---- surface ---------------------------------------------------------------------------------------------------------


def test_the_plane_keeps_distances_and_mixes_come_back_to_their_place():
    rng = np.random.default_rng(1)
    corners = rng.normal(size=(3, 50))
    edges = corners[1:] - corners[0]
    plane = Plane.through(edges @ edges.T)
    places = [(0.0, 0.0), (plane.one, 0.0), plane.two]
    for i in range(3):
        assert plane.mix(*places[i]) == pytest.approx(np.eye(3)[i], abs=1e-9)
        for j in range(3):
            assert np.hypot(*np.subtract(places[i], places[j])) == pytest.approx(np.linalg.norm(corners[i] - corners[j]))
    point = np.array(plane.mix(0.7, -1.3)) @ corners - corners[0]
    assert plane.place(edges @ point, float(point @ point)) == pytest.approx((0.7, -1.3, 0.0), abs=1e-6)
    outside = point + 2.0 * (up := np.linalg.qr(np.vstack([edges, rng.normal(size=50)]).T)[0][:, 2])
    assert plane.place(edges @ outside, float(outside @ outside)) == pytest.approx((0.7, -1.3, 2.0), abs=1e-6)
    assert edges @ up == pytest.approx(np.zeros(2), abs=1e-9)


@pytest.mark.parametrize("gram", [[[1.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
def test_models_on_a_line_span_no_plane(gram):
    with pytest.raises(ValueError, match="no plane"):
        Plane.through(np.array(gram))


def test_the_grid_holds_every_mark():
    plane = Plane(2.0, (1.0, 1.5))
    xs, ys = plane.grid(15, [(5.0, -3.0)])
    assert xs[0] < 0 and xs[-1] > 5 and ys[0] < -3 and ys[-1] > 1.5
    assert xs[1] - xs[0] == pytest.approx(ys[1] - ys[0], rel=0.1)  # near enough square


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_isotropic_noise_costs_half_the_trace():
    """E[L(theta + sigma n) - L(theta)] = sigma^2/2 tr H at a minimum of a quadratic."""
    spectrum = torch.tensor([5.0, 1.0, 0.2, 0.01] * 50)
    rises = [0.5 * float((spectrum * noise_for("isotropic", "w", spectrum, draw, 0) ** 2).sum()) for draw in range(300)]
    error = np.std(rises) / np.sqrt(300)
    assert abs(np.mean(rises) - float(spectrum.sum()) / 2) < 4 * error


def test_filter_noise_has_the_length_of_each_row_and_leaves_vectors_alone():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
    noise = noise_for("filter", "w", weight, 0, 0)
    assert torch.allclose(noise.norm(dim=1), weight.norm(dim=1), rtol=1e-5)
    assert not noise_for("filter", "norm", torch.ones(10), 0, 0).any()
    again = noise_for("filter", "w", 2 * weight, 0, 0)
    assert torch.allclose(again, 2 * noise)  # a model twice as large gets twice the noise


@pytest.mark.parametrize("shape", [(3, 6, 10), (4, 2, 3, 5)], ids=["fused experts", "convolution"])
def test_a_row_of_fused_experts_is_one_neuron_s_and_not_a_whole_expert(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    weight *= torch.arange(1, shape[-2] + 1)[:, None]
    weight[0, 0] = 0.0
    noise = noise_for("filter", "experts", weight, 0, 0)
    assert noise.shape == weight.shape
    assert torch.allclose(noise.norm(dim=-1), weight.norm(dim=-1), rtol=1e-5) and not noise[0, 0].any()


def test_a_paired_difference_by_hand():
    """Areas of the two draws 2 and 6 against 1 and 2: differences 1 and 4, mean 2.5, error 1.5, t with one degree 12.706."""
    found = paired_difference([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]], [[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]], [0.0, 1.0, 2.0])
    assert found == pytest.approx((2.5, 2.5 - 12.7062 * 1.5, 2.5 + 12.7062 * 1.5), rel=1e-5)


def test_pairing_finds_what_lies_under_the_draws_common_noise_and_keeps_its_promise_for_few_draws():
    sigmas, rng = np.array([0.5, 1.0]), np.random.default_rng(0)
    common = rng.normal(5, 3, (5, 1)) * sigmas
    sharp = common + (0.2 + rng.normal(0, 0.01, (5, 1))) * sigmas
    mean, low, high = paired_difference(sharp.tolist(), common.tolist(), sigmas.tolist())
    assert 0 < low < mean < high and mean == pytest.approx(0.1, abs=0.02)
    assert paired_difference(common.tolist(), sharp.tolist(), sigmas.tolist()) == pytest.approx((-mean, -high, -low))
    false = 0
    for _ in range(1000):
        a, b = rng.normal(1, 0.2, (2, 3, 1)) * sigmas
        _, low, high = paired_difference(a.tolist(), b.tolist(), sigmas.tolist())
        false += low > 0 or high < 0
    assert 0.03 < false / 1000 < 0.07  # two errors would be 0.18 with three draws


def test_one_draw_tells_no_difference_and_unequal_draws_are_refused():
    assert paired_difference([[1.0]], [[2.0]], [1.0]) is None
    assert paired_difference([], [], [1.0]) is None
    with pytest.raises(ValueError, match="the same draws"):
        paired_difference([[1.0], [2.0]], [[1.0]], [1.0])


def test_noise_depends_on_seed_draw_and_name_only():
    like = torch.zeros(100)
    first = noise_for("isotropic", "w", like, 0, 0)
    assert torch.equal(first, noise_for("isotropic", "w", like + 3, 0, 0))
    for other in (("v", 0, 0), ("w", 1, 0), ("w", 0, 1)):
        assert not torch.equal(first, noise_for("isotropic", other[0], like, other[1], other[2]))


def test_the_area_of_a_straight_rise_is_its_triangle():
    sigmas = np.array([0.5, 1.0, 2.0])
    found = area(sigmas, np.stack([3 * sigmas, 5 * sigmas]))
    assert found.mean == pytest.approx(4 * 2.0**2 / 2)
    assert found.error == pytest.approx(np.std([6.0, 10.0], ddof=1) / np.sqrt(2))
