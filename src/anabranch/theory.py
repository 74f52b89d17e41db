"""The identities behind splitting and merging, on a quadratic loss: what can be checked to rounding.

    d   parameters        K   branches        T   units
    H   Hessian [d, d], symmetric, >= 0, H = sum_l lambda_l u_l u_l^T
    L(theta) = 1/2 (theta - theta*)^T H (theta - theta*)
    delta_k = theta_k - theta*, rows of [K, d]        w   branch weights [K], positive, scaled here to sum 1

All from MERIT, arXiv 2606.01717, section 3 and appendix F. They compare the merged model with its own branches; they
do not say that it beats another merge: with one common Hessian and n gradient steps per branch the token-weighted merge
is the same for every balanced split. `conflict.spectral_tests` has F.10 and F.11.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Contraction(NamedTuple):
    """Terms of eq. 11: `branches` = `merged` + `spread`, each a squared distance."""

    branches: float
    merged: float
    spread: float


def merging_gain(hessian: ArrayLike, deltas: ArrayLike, weights: ArrayLike) -> float:
    """G_var = 1/2 sum_l lambda_l Var_w(u_l^T delta): what the merge gains on the mean loss of its branches, >= 0.

    Theorem 3.1 / F.1, by the eigenvectors of H; equals sum_k w_k L(theta_k) - L(sum_k w_k theta_k).
    """
    curvatures, directions = np.linalg.eigh(np.asarray(hessian, dtype=np.float64))
    share = _shares(weights)
    along = np.asarray(deltas, dtype=np.float64) @ directions
    variances = share @ (along - share @ along) ** 2
    return float(curvatures @ variances) / 2


def merging_gain_by_pairs(hessian: ArrayLike, deltas: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The same G_var from differences of branches: 1/4 sum_ij w_i w_j (delta_i - delta_j)^T H (delta_i - delta_j).

    Without `weights` every branch weighs 1/K, which is the paper's 1/(4 K^2) sum_ij (F.1); weights are our addition.
    """
    rows = np.asarray(deltas, dtype=np.float64)
    share = _shares(np.ones(len(rows)) if weights is None else weights)
    difference = rows[:, None, :] - rows[None, :, :]
    squares = np.einsum("ijd,de,ije->ij", difference, np.asarray(hessian, dtype=np.float64), difference, optimize=True)
    return float(share @ squares @ share) / 4


def contraction(deltas: ArrayLike) -> Contraction:
    """Eq. 11: mean_k |delta_k|^2 = |mean_k delta_k|^2 + mean_k |delta_k - mean delta|^2, exactly, for any loss."""
    rows = np.asarray(deltas, dtype=np.float64)
    mean = rows.mean(axis=0)
    return Contraction(branches=float((rows**2).sum(axis=1).mean()), merged=float(mean @ mean),
                       spread=float(((rows - mean) ** 2).sum(axis=1).mean()))


def two_group_gain(hessian: ArrayLike, mean_1: ArrayLike, mean_2: ArrayLike, step: float) -> float:
    """G_var of two equal groups after one gradient step: eta^2/8 (gbar_1 - gbar_2)^T H (gbar_1 - gbar_2).

    Args:
        mean_1, mean_2: mean gradients [d] of the groups at the common start.
        step: eta > 0.
    """
    apart = np.asarray(mean_1, dtype=np.float64) - np.asarray(mean_2, dtype=np.float64)
    return float(step**2 / 8 * (apart @ np.asarray(hessian, dtype=np.float64) @ apart))


def amplified_gram(gradients: ArrayLike, hessian: ArrayLike) -> Floats:
    """M = G H G^T, [T, T], from gradients G [T, d]; M_ij = Delta_i^T H^3 Delta_j for g_t = -H Delta_t.

    Curvature amplification: a disagreement about the optimum counts with the cube of the curvature along it.
    Pass it to `conflict.spectral_tests` in place of the plain Gram matrix (which is H = I).
    """
    rows = np.asarray(gradients, dtype=np.float64)
    return rows @ np.asarray(hessian, dtype=np.float64) @ rows.T


def sign_split_gain(amplified: ArrayLike, signs: ArrayLike, step: float) -> float:
    """G_var(s) = eta^2/(2 T^2) s^T M s of the two groups that a balanced sign vector s [T] makes.

    Raises:
        ValueError: s has other entries than -1 and 1, or they do not sum to 0.
    """
    s = np.asarray(signs, dtype=np.float64)
    if not (np.abs(s) == 1).all() or s.sum() != 0:
        raise ValueError("signs: wanted as many 1 as -1 and nothing else; the formula holds for balanced splits only")
    return float(step**2 / (2 * len(s) ** 2) * (s @ np.asarray(amplified, dtype=np.float64) @ s))


def _shares(weights: ArrayLike) -> Floats:
    values = np.asarray(weights, dtype=np.float64)
    share: Floats = values / values.sum()
    return share
