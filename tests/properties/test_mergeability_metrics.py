"""The formulas: identities that the published definitions imply, and the explicit definitions on small vectors."""

from __future__ import annotations

import csv
from math import acos, degrees, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.mergeability.metrics import (
    METRICS,
    PUBLISHED,
    activation_metrics,
    extra_metrics,
    gradient_metrics,
    layerwise_rank_metrics,
    matrix_metrics,
    subspace_metrics,
    task_vector_metrics,
    two_singular_values,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "mergeability" / "pairs.csv"
NORMS, COSINES = st.floats(1e-6, 1e6), st.floats(-1, 1)


def near(wanted, **how):
    return pytest.approx(wanted, rel=1e-9, abs=how.get("abs", 1e-9))


def vectors(seed: int, size: int = 30) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    one = draw.standard_normal(size)
    return one, 0.3 * draw.uniform() * one + draw.uniform(0.1, 3) * draw.standard_normal(size)


def of(u: np.ndarray, v: np.ndarray) -> dict[str, float]:
    return task_vector_metrics(float(u @ u), float(v @ v), float(u @ v))


def test_published_names_and_order_are_those_of_the_published_table():
    if not SHARED.exists():
        pytest.skip("the published tables are not beside this repository")
    with open(SHARED) as file:
        columns = next(csv.reader(file))
    start = columns.index("right_subspace_overlap_top_k")
    found = [c for c in columns[start : columns.index("single_acc1")] if c != "right_subspace_overlap"]
    assert list(PUBLISHED) == found


def test_categories_are_the_published_ones():
    sizes = {c: sum(METRICS[n].category == c for n in PUBLISHED) for c in
             ("task_vector", "effective_rank", "subspace", "activation", "gradient")}
    assert sizes == {"task_vector": 5, "effective_rank": 7, "subspace": 6, "activation": 4, "gradient": 6}
    assert all(m.name == name and m.formula for name, m in METRICS.items())
    assert sum(METRICS[n].needs == "weights" for n in PUBLISHED) == 18


@pytest.mark.parametrize("seed", range(5))
def test_global_metrics_are_the_definitions(seed):
    """The stacked SVD and the vectors themselves, instead of squared norms."""
    u, v = vectors(seed)
    s = np.linalg.svd(np.stack([u, v]), compute_uv=False)
    p = s / s.sum()
    rank = float(np.exp(-(p * np.log(p)).sum()))
    cos = float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    low, high = sorted((np.linalg.norm(u), np.linalg.norm(v)))
    assert of(u, v) == near({
        "task_vector_cosine_similarity": cos, "task_vector_l2_distance": float(np.linalg.norm(u - v)),
        "task_vector_dot_product": float(u @ v), "weight_space_angle": degrees(acos(cos)),
        "task_vector_magnitude_ratio": float(low / high), "effective_rank": rank,
        "effective_rank_mergeability_score": 2 - rank, "stable_rank": float(s.sum() ** 2 / (s @ s)),
        "spectral_gap": float((s[0] - s[1]) / s[0]), "singular_value_ratio": float(s[1] / s[0])})


@given(NORMS, NORMS, COSINES)
def test_identities(a, b, cos):
    found = task_vector_metrics(a * a, b * b, cos * a * b)
    ratio = found["singular_value_ratio"]
    assert found["spectral_gap"] + ratio == near(1)
    assert found["effective_rank"] + found["effective_rank_mergeability_score"] == near(2)
    assert 1 <= found["effective_rank"] <= 2 + 1e-12
    assert found["stable_rank"] == near((1 + ratio) ** 2 / (1 + ratio**2))
    assert found["weight_space_angle"] == near(degrees(acos(found["task_vector_cosine_similarity"])))
    assert found["task_vector_dot_product"] == near(found["task_vector_cosine_similarity"] * a * b, abs=1e-12 * a * b)
    assert found["task_vector_l2_distance"] ** 2 == near(
        a * a + b * b - 2 * found["task_vector_dot_product"], abs=1e-9 * max(a, b) ** 2)


@given(NORMS, NORMS, COSINES)
def test_the_pair_has_no_order(a, b, cos):
    assert task_vector_metrics(a * a, b * b, cos * a * b) == task_vector_metrics(b * b, a * a, cos * a * b)


@given(NORMS, NORMS, COSINES, st.floats(0.1, 1e3))
def test_scaling_both_changes_only_what_has_a_scale(a, b, cos, factor):
    plain = task_vector_metrics(a * a, b * b, cos * a * b)
    scaled = task_vector_metrics((factor * a) ** 2, (factor * b) ** 2, cos * a * b * factor**2)
    power = {"task_vector_l2_distance": 1, "task_vector_dot_product": 2}
    for name, value in plain.items():
        size = factor ** power.get(name, 0)
        # where the two are almost parallel, the smaller singular value and the distance have half the digits
        slack = 3e-6 * size * (max(a, b) if name == "task_vector_l2_distance" else a * b if name in power else 1)
        assert scaled[name] == pytest.approx(value * size, rel=1e-6, abs=slack), name


@given(NORMS, NORMS, COSINES)
def test_global_rank_metrics_depend_on_cosine_and_ratio_alone(a, b, cos):
    found, same = task_vector_metrics(a * a, b * b, cos * a * b), task_vector_metrics(1.0, (b / a) ** 2, cos * b / a)
    for name in ("effective_rank", "stable_rank", "spectral_gap", "singular_value_ratio"):
        assert found[name] == pytest.approx(same[name], rel=1e-6, abs=1e-6), name


def test_parallel_orthogonal_opposite_and_zero():
    parallel, orthogonal, opposite = (task_vector_metrics(4, 4, dot) for dot in (4.0, 0.0, -4.0))
    assert (parallel["effective_rank"], orthogonal["effective_rank"]) == (1, near(2))
    assert parallel["singular_value_ratio"] == opposite["singular_value_ratio"] == 0
    assert [x["weight_space_angle"] for x in (parallel, orthogonal, opposite)] == near([0, 90, 180])
    zero = task_vector_metrics(4, 0, 0)
    assert (zero["task_vector_cosine_similarity"], zero["task_vector_magnitude_ratio"], zero["effective_rank"]) == (0, 0, 1)
    assert two_singular_values(0, 0, 0) == (0, 0)
    assert task_vector_metrics(1e-20, 1, 0)["task_vector_magnitude_ratio"] == 0  # below 1e-8: no task vector


def test_layerwise_rank_is_weighted_by_norms_and_skips_what_one_did_not_move():
    u = [np.array([3.0, 0, 0]), np.array([1.0, 0]), np.array([5.0])]
    v = [np.array([0, 4.0, 0]), np.array([2.0, 0]), np.array([0.0])]  # orthogonal, parallel, unmoved
    found = layerwise_rank_metrics(*(np.array(x) for x in zip(*[(a @ a, b @ b, a @ b) for a, b in zip(u, v, strict=True)],
                                                              strict=True)))
    p = np.array([3, 4]) / 7
    wanted = (7 * np.exp(-(p * np.log(p)).sum()) + 3 * 1) / 10
    assert found["layerwise_effective_rank"] == near(float(wanted))
    assert found["layerwise_effective_rank_mergeability_score"] == near(2 - float(wanted))
    assert layerwise_rank_metrics(np.array([1.0]), np.array([0.0]), np.array([0.0])) == {}


def test_a_matrix_with_itself_and_with_one_that_shares_nothing():
    eye, none, s = np.eye(10), np.zeros((10, 10)), np.arange(100, 0, -1.0)
    same = matrix_metrics(eye, eye, eye, s, 2 * s, float(s @ s), 4 * float(s @ s))
    assert same["right_subspace_overlap_top_k"] == same["right_subspace_overlap_bottom_k"] == near(1)
    assert same["subspace_overlap"] == near(1 / sqrt(10))  # the left one is divided by k, not by its root
    assert (same["singular_value_overlap"], same["top_k_cosine"]) == near((1, 1))
    assert same["top_k_energy"] == near(float(s[:10] @ s[:10] / (s @ s)))
    other = matrix_metrics(none, none, none, s, s, 1e9, 1e9)
    assert {other[n] for n in ("right_subspace_overlap_top_k", "interaction_matrix_overlap_bottom_k", "subspace_overlap",
                               "top_k_cosine")} == {0.0}
    assert subspace_metrics([same, other])["right_subspace_overlap_top_k"] == near(0.5)
    assert subspace_metrics([]) == {}


@given(st.integers(0, 2**32 - 1))
def test_interaction_is_the_square_of_the_right_overlap_of_each_matrix(seed):
    draw = np.random.default_rng(seed)
    cross = [draw.uniform(-0.3, 0.3, (10, 10)) for _ in range(3)]
    found = matrix_metrics(*cross, np.ones(20), np.ones(20), 40.0, 40.0)
    assert found["interaction_matrix_overlap_top_k"] == near(found["right_subspace_overlap_top_k"] ** 2)
    assert found["interaction_matrix_overlap_bottom_k"] == near(found["right_subspace_overlap_bottom_k"] ** 2)
    singular = np.linalg.svd(cross[1], compute_uv=False)
    assert found["interaction_matrix_overlap_top_k"] == near(float((singular**2).mean()))


@given(st.integers(0, 2**32 - 1))
def test_cosine_is_magnitude_overlap_less_sign_conflict(seed):
    u, v = vectors(seed)
    norms = np.ones(2)
    found = extra_metrics(float(u @ u), float(v @ v), float(u @ v), float(abs(u) @ abs(v)), 4.0, norms, norms)
    cos = found["magnitude_overlap"] * (1 - 2 * found["sign_conflict"])
    assert cos == near(of(u, v)["task_vector_cosine_similarity"])
    wrong = (u * v < 0).astype(float)
    assert found["sign_conflict"] == near(float((wrong * abs(u * v)).sum() / abs(u * v).sum()))
    assert found["relative_norm1"] == near(np.linalg.norm(u) / 2) and found["relative_norm2"] == near(np.linalg.norm(v) / 2)


def test_models_that_moved_different_weights_have_no_sign_conflict():
    found = extra_metrics(1.0, 1.0, 0.0, 0.0, 1.0, np.array([1.0, 0]), np.array([0, 1.0]))
    assert "sign_conflict" not in found
    assert (found["magnitude_overlap"], found["layer_profile_cosine"]) == (0, 0)


def test_activations_and_gradients():
    u, v = vectors(3)
    cos = of(u, v)["task_vector_cosine_similarity"]
    found = activation_metrics(u, v)
    assert found == near({"activation_l2_distance": float(np.linalg.norm(u - v)), "activation_cosine_similarity": cos,
                          "activation_magnitude_ratio": of(u, v)["task_vector_magnitude_ratio"],
                          "activation_dot_product": float(u @ v)})
    assert activation_metrics(u.astype(np.float32), u.astype(np.float32))["activation_l2_distance"] == 0
    for kind in ("encoder", "input"):
        assert gradient_metrics(kind, float(u @ u), float(v @ v), float(u @ v)) == near({
            f"{kind}_gradient_cosine_similarity": cos, f"{kind}_gradient_l2_distance": float(np.linalg.norm(u - v)),
            f"{kind}_gradient_dot_product": float(u @ v)})
    given_names = {*found, *gradient_metrics("encoder", 1, 1, 0), *gradient_metrics("input", 1, 1, 0)}
    assert given_names == {n for n, m in METRICS.items() if m.category in ("activation", "gradient") and n in PUBLISHED}
