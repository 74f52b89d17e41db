"""The diagnostics' arithmetic against exact answers: parabolas, quadratics, geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anabranch.diagnose.connectivity import barrier, curve, mean_interval
from anabranch.diagnose.displacement import Moments, kind_of, layer_of
from anabranch.diagnose.perturbation import area, noise_for
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
    check = moments([*branches, mean], base, 3, [0, 1, 2], weights).contraction(3, tolerance=1e-5)
    assert check.error < 1e-12 and check.is_average
    assert check.merged_from_file == pytest.approx(check.merged, rel=1e-5)
    longer = {n: base[n] + 1.1 * (mean[n] - base[n]) for n in base}
    other = moments([*branches, longer], base, 3, [0, 1, 2], weights).contraction(3, tolerance=1e-5)
    assert other.error < 1e-12 and other.is_average is False


@pytest.mark.parametrize(("name", "layer", "kind"), [
    ("model.layers.11.self_attn.k_proj.bias", "11", "attention"), ("transformer.h.3.mlp.c_fc.weight", "3", "mlp"),
    ("lm_head.weight", "lm_head", "head"), ("model.layers.2.post_attention_layernorm.weight", "2", "norm"),
    ("transformer.wte.weight", "transformer.wte", "embedding"), ("model.layers.0.mlp.experts.5.w1.weight", "0", "mlp")])
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
