"""The metrics of two task vectors: what they are called, what they need, and their formulas. Pure, float64.

    tau_i = theta_i - theta_0    task vector: a model minus the base, over every float tensor but those that no model moved
    u, v                         two of them, flattened;   u_l, v_l one tensor of each;   U S V^T its thin SVD
    k = 10                       directions of a subspace;   100 values of a spectrum; both at most min(shape)

Published (arXiv:2601.22285): 28 per pair, under the column names of the authors' tables. Extra: ours. All are symmetric in
the pair, but for those that end in 1 or 2, which are of one of the two. Every formula takes what streaming a checkpoint
leaves behind (squared norms, inner products, k x k products of singular vectors), never a whole model.

Differs from the published computation, on purpose: float64 throughout; tensors that no model moved are left out (an SVD of
zeros returns unit vectors, so such tensors entered every published mean as a constant); singular directions whose values
are zero count for nothing; an entropy at p = 0 is 0, without a small number inside the logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import acos, degrees, exp, hypot, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Category = Literal["task_vector", "effective_rank", "subspace", "activation", "gradient", "extra"]
Needs = Literal["weights", "rows", "labels", "gradients"]

DIRECTIONS, SPECTRUM = 10, 100
# Norms below these are no task vector (published), and no update of one tensor (published).
NO_VECTOR, NO_UPDATE = 1e-8, 1e-10


@dataclass(frozen=True)
class Metric:
    """One metric of a pair. `needs`: checkpoints alone, rows besides, rows with a loss, its gradient; `formula`: for people.

    Names that end in 1 and 2 belong to either task of the pair.
    """

    name: str
    category: Category
    needs: Needs
    formula: str


def _registered(category: Category, needs: Needs, formulas: Mapping[str, str]) -> dict[str, Metric]:
    return {name: Metric(name, category, needs, formula) for name, formula in formulas.items()}


METRICS: dict[str, Metric] = {
    **_registered("subspace", "weights", {
        "right_subspace_overlap_top_k": "mean over matrices of ||V1^T V2||_F / sqrt(k), first k right singular vectors",
        "right_subspace_overlap_bottom_k": "the same, last k",
        "interaction_matrix_overlap_top_k": "mean over matrices of ||V1^T V2||_F^2 / k, first k right singular vectors",
        "interaction_matrix_overlap_bottom_k": "the same, last k"}),
    **_registered("effective_rank", "weights", {
        "effective_rank": "exp(-sum p ln p), p = s / (s1 + s2), s the singular values of the two rows u and v",
        "effective_rank_mergeability_score": "2 - effective_rank, within 0 and 1",
        "stable_rank": "(s1 + s2)^2 / (s1^2 + s2^2): the participation ratio of s",
        "spectral_gap": "(s1 - s2) / s1",
        "singular_value_ratio": "s2 / s1",
        "layerwise_effective_rank": "mean over tensors of the effective rank of u_l and v_l, weighted by ||u_l|| + ||v_l||",
        "layerwise_effective_rank_mergeability_score": "2 - layerwise_effective_rank, within 0 and 1"}),
    **_registered("task_vector", "weights", {
        "task_vector_cosine_similarity": "u.v / (||u|| ||v||)",
        "task_vector_l2_distance": "||u - v||",
        "task_vector_dot_product": "u.v",
        "weight_space_angle": "arccos of the cosine, degrees",
        "task_vector_magnitude_ratio": "min(||u||, ||v||) / max(||u||, ||v||); 0 where either is below 1e-8"}),
    **_registered("subspace", "weights", {
        "singular_value_overlap": "mean over matrices of the cosine of the two leading spectra (100 values)",
        "subspace_overlap": "mean over matrices of ||U1^T U2||_F / k, first k left singular vectors: at most 1 / sqrt(k)"}),
    **_registered("activation", "rows", {
        "activation_l2_distance": "||a1 - a2||, a the last block's output, meant over tokens, then over rows",
        "activation_cosine_similarity": "a1.a2 / (||a1|| ||a2||)",
        "activation_magnitude_ratio": "min(||a1||, ||a2||) / max(||a1||, ||a2||)",
        "activation_dot_product": "a1.a2"}),
    **_registered("gradient", "labels", {
        f"{kind}_gradient_{name}": formula.format(g=g, what=what)
        for kind, g, what in (("encoder", "G", "gradient of each model's loss on its own task's rows, over its parameters"),
                              ("input", "g", "gradient of each model's loss on its own task's rows, over its inputs"))
        for name, formula in {"cosine_similarity": "{g}1.{g}2 / (||{g}1|| ||{g}2||), {g} the {what}",
                              "l2_distance": "||{g}1 - {g}2||", "dot_product": "{g}1.{g}2"}.items()}),
    **_registered("extra", "weights", {
        "sign_conflict": "share of the overlapping mass sum |u||v| where the signs of u and v differ: 0.5 if unrelated",
        "magnitude_overlap": "sum |u||v| / (||u|| ||v||): whether the same weights moved, whichever way",
        "layer_profile_cosine": "cosine of the vectors (||u_l||)_l and (||v_l||)_l: whether the same tensors moved",
        "top_k_cosine": "mean over matrices of the cosine of the two best approximations of rank k",
        "top_k_energy": "mean over matrices and both models of sum of the first k s^2 / sum of all s^2: how low-rank they are",
        "relative_norm1": "||u|| / ||theta_0||", "relative_norm2": "||v|| / ||theta_0||"}),
    **_registered("extra", "rows", {
        "activation_shift_cosine_similarity": "cosine of a1 - a0 and a2 - a0, a0 the base's mean activation on the same rows",
        "activation_shift_magnitude_ratio": "min / max of ||a1 - a0|| and ||a2 - a0||"}),
    **_registered("extra", "labels", {
        "cross_task_score1": "score of model 2 on task 1's rows / the base's",
        "cross_task_score2": "score of model 1 on task 2's rows / the base's",
        "fine_tuning_gap1": "1 - score of the base / score of model 1, on task 1's rows",
        "fine_tuning_gap2": "1 - score of the base / score of model 2, on task 2's rows"}),
    **_registered("extra", "gradients", {
        "base_gradient_cosine_similarity":
            "cosine of the two tasks' gradients at the base: do they fight before any is tuned?"}),
}
PUBLISHED: tuple[str, ...] = tuple(name for name, metric in METRICS.items() if metric.category != "extra")


def cosine(a2: float, b2: float, dot: float) -> float:
    """From squared norms and inner product, within -1 and 1; 0 where either is zero."""
    scale = sqrt(a2) * sqrt(b2)
    return max(-1.0, min(1.0, dot / scale)) if scale > 0 else 0.0


def distance(a2: float, b2: float, dot: float) -> float:
    """||a - b|| from squared norms and inner product. Of two vectors that are nearly equal, good to 1e-8 of their norms."""
    return sqrt(max(a2 + b2 - 2 * dot, 0.0))


def magnitude_ratio(a2: float, b2: float) -> float:
    """The smaller norm over the larger one; 0 where either is below 1e-8, as published."""
    low, high = sorted((sqrt(a2), sqrt(b2)))
    return low / high if low >= NO_VECTOR else 0.0


def two_singular_values(a2: float, b2: float, dot: float) -> tuple[float, float]:
    """s1 >= s2 of the matrix with two rows of squared norms `a2`, `b2` and inner product `dot`; no SVD is needed.

    s1^2 is the larger eigenvalue of [[a2, dot], [dot, b2]]; s1 s2 is the root of its determinant, which loses fewer digits
    than the smaller eigenvalue does.
    """
    first = sqrt((a2 + b2) / 2 + hypot((a2 - b2) / 2, dot))
    if first == 0:
        return 0.0, 0.0
    scale = sqrt(a2) * sqrt(b2)
    return first, min(first, sqrt(max((scale - abs(dot)) * (scale + abs(dot)), 0.0)) / first)


def effective_rank(first: float, second: float) -> float:
    """exp of the entropy of two singular values' shares, in [1, 2]; 1 where both are zero."""
    total = first + second
    return exp(-sum(p * log(p) for p in (first / total, second / total) if p > 0)) if total > 0 else 1.0


def task_vector_metrics(a2: float, b2: float, dot: float) -> dict[str, float]:
    """The 5 of task-vector geometry and the 5 global ones of effective rank. Of two zero vectors: rank 1, gap 1, ratio 0.

    Args:
        a2, b2: squared norms. dot: inner product.
    """
    cos, (first, second) = cosine(a2, b2, dot), two_singular_values(a2, b2, dot)
    rank, ratio = effective_rank(first, second), second / first if first > 0 else 0.0
    return {"task_vector_cosine_similarity": cos, "task_vector_l2_distance": distance(a2, b2, dot),
            "task_vector_dot_product": dot, "weight_space_angle": degrees(acos(cos)),
            "task_vector_magnitude_ratio": magnitude_ratio(a2, b2),
            "effective_rank": rank, "effective_rank_mergeability_score": _score(rank),
            "stable_rank": (1 + ratio) ** 2 / (1 + ratio**2), "spectral_gap": 1 - ratio, "singular_value_ratio": ratio}


def layerwise_rank_metrics(squares1: Floats, squares2: Floats, dots: Floats) -> dict[str, float]:
    """The 2 layerwise ones of effective rank; none where no tensor was moved by both.

    Args:
        squares1, squares2: [tensors], squared norms of each tensor's update. dots: [tensors], inner products.
    """
    weights, ranks = [], []
    for a2, b2, dot in zip(squares1.tolist(), squares2.tolist(), dots.tolist(), strict=True):
        if min(sqrt(a2), sqrt(b2)) >= NO_UPDATE:
            weights.append(sqrt(a2) + sqrt(b2))
            ranks.append(effective_rank(*two_singular_values(a2, b2, dot)))
    if not weights:
        return {}
    mean = sum(w * r for w, r in zip(weights, ranks, strict=True)) / sum(weights)
    return {"layerwise_effective_rank": mean, "layerwise_effective_rank_mergeability_score": _score(mean)}


def _score(rank: float) -> float:
    return max(0.0, min(1.0, 2 - rank))


def matrix_metrics(left: Floats, right: Floats, bottom: Floats, spectrum1: Floats, spectrum2: Floats,
                   square1: float, square2: float) -> dict[str, float]:
    """The 6 of subspaces and 2 extra, for one matrix of a pair. `subspace_metrics` means them over matrices.

    Args:
        left, right: [k, k], U1^T U2 and V1^T V2 of the first k directions. bottom: [k, k], V1^T V2 of the last k.
            k: at most DIRECTIONS, min(shape) and the number of values above zero of either matrix.
        spectrum1, spectrum2: the leading singular values, descending, at most SPECTRUM and at least k.
        square1, square2: squared norms of the two updates.
    """
    k = len(left)
    top, low = float(np.vdot(right, right)), float(np.vdot(bottom, bottom))
    s1, s2 = spectrum1[:k], spectrum2[:k]
    kept1, kept2 = float(s1 @ s1), float(s2 @ s2)
    return {"right_subspace_overlap_top_k": sqrt(top / k), "right_subspace_overlap_bottom_k": sqrt(low / k),
            "interaction_matrix_overlap_top_k": top / k, "interaction_matrix_overlap_bottom_k": low / k,
            "singular_value_overlap": cosine(float(spectrum1 @ spectrum1), float(spectrum2 @ spectrum2),
                                             float(spectrum1 @ spectrum2)),
            "subspace_overlap": float(np.linalg.norm(left)) / k,
            "top_k_cosine": cosine(kept1, kept2, float(s1 @ (left * right) @ s2)),
            "top_k_energy": (min(1.0, kept1 / square1) + min(1.0, kept2 / square2)) / 2}


def subspace_metrics(matrices: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Plain mean over matrices of what `matrix_metrics` gave; none where there is no matrix that both moved."""
    return {name: sum(m[name] for m in matrices) / len(matrices) for name in matrices[0]} if matrices else {}


def extra_metrics(a2: float, b2: float, dot: float, mass: float, base2: float,
                  norms1: Floats, norms2: Floats) -> dict[str, float]:
    """The extra ones that need no matrix.

    cosine = magnitude_overlap x (1 - 2 sign_conflict): the published cosine, taken apart into where two models moved and
    whether they moved the same way.

    Args:
        a2, b2, dot: squared norms and inner product of u and v. mass: sum |u||v|. base2: squared norm of the base.
        norms1, norms2: [tensors], norms of each tensor's update.
    """
    found = {"magnitude_overlap": cosine(a2, b2, mass),
             "layer_profile_cosine": cosine(float(norms1 @ norms1), float(norms2 @ norms2), float(norms1 @ norms2))}
    if mass > 0:  # of two models that moved no common weight, no sign can differ or agree
        found["sign_conflict"] = max(0.0, min(1.0, (1 - dot / mass) / 2))
    if base2 > 0:
        found |= {"relative_norm1": sqrt(a2 / base2), "relative_norm2": sqrt(b2 / base2)}
    return found


def activation_metrics(mean1: Floats, mean2: Floats) -> dict[str, float]:
    """The 4 of activations, from two models' mean activations on the same rows."""
    first, second = (np.asarray(m, np.float64).ravel() for m in (mean1, mean2))
    a2, b2, dot = float(first @ first), float(second @ second), float(first @ second)
    return {"activation_l2_distance": float(np.linalg.norm(first - second)),
            "activation_cosine_similarity": cosine(a2, b2, dot),
            "activation_magnitude_ratio": magnitude_ratio(a2, b2), "activation_dot_product": dot}


def gradient_metrics(kind: Literal["encoder", "input"], a2: float, b2: float, dot: float) -> dict[str, float]:
    """The 3 of one kind of gradient, from squared norms and inner product."""
    return {f"{kind}_gradient_cosine_similarity": cosine(a2, b2, dot), f"{kind}_gradient_l2_distance": distance(a2, b2, dot),
            f"{kind}_gradient_dot_product": dot}
