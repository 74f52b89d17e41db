"""The identities behind splitting and merging, on a quadratic loss: what can be checked to rounding.

    d   parameters        K   branches        T   units
    H   Hessian [d, d], symmetric, >= 0, H = sum_l lambda_l u_l u_l^T
    L(theta) = 1/2 (theta - theta*)^T H (theta - theta*)
    delta_k = theta_k - theta*, rows of [K, d]        w   branch weights [K], positive, scaled here to sum 1

All from MERIT, arXiv 2606.01717, section 3 and appendix F, but for the last part. They compare the merged model with its
own branches; they do not say that it beats another merge: with one common Hessian and n gradient steps per branch the
token-weighted merge is the same for every balanced split. `split_merge` and `unequal_curvature` (ours) say what is left where
units have Hessians of their own. `conflict.spectral_tests` has F.10 and F.11.
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


class Conditioning(NamedTuple):
    """Condition numbers: of H, and of what is left of it once some directions are averaged out."""

    before: float
    after: float


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


def contraction(deltas: ArrayLike, weights: ArrayLike | None = None) -> Contraction:
    """Eq. 11: mean_k |delta_k|^2 = |mean_k delta_k|^2 + mean_k |delta_k - mean delta|^2, exactly, for any loss.

    The paper's means are uniform; `weights` [K], our addition, makes them those of the merge.
    """
    rows = np.asarray(deltas, dtype=np.float64)
    share = _shares(np.ones(len(rows)) if weights is None else weights)
    mean = share @ rows
    return Contraction(branches=float(share @ (rows**2).sum(axis=1)), merged=float(mean @ mean),
                       spread=float(share @ ((rows - mean) ** 2).sum(axis=1)))


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


def spectral_filtering(hessian: ArrayLike, directions: ArrayLike) -> Conditioning:
    """Condition number lambda_max / lambda_min of H, and lambda_perp,max / lambda_min once `directions` are averaged out.

    Merging averages the branches' differences out. Where they disagree along the directions of largest curvature, what is
    left of the merge's error lies in the orthogonal complement, where the largest curvature is lambda_perp,max: the largest
    eigenvalue of H between vectors orthogonal to `directions`. It is never more than lambda_max, and never less than the
    (r+1)-th eigenvalue (Cauchy interlacing), which it is where the r directions are the top eigenvectors.

    Args:
        hessian: [d, d], positive definite.
        directions: [r, d], r < d, linearly independent; of any length.
    Raises:
        ValueError: H is not positive definite, or nothing is left.
    """
    matrix, rows = np.asarray(hessian, dtype=np.float64), np.atleast_2d(np.asarray(directions, dtype=np.float64))
    curvatures = np.linalg.eigvalsh(matrix)
    if curvatures[0] <= 0 or len(rows) >= len(matrix):
        raise ValueError(f"spectral filtering: wanted a positive definite Hessian and fewer directions than its {len(matrix)} "
                         f"rows; got a smallest eigenvalue of {curvatures[0]:.3g} and {len(rows)} directions")
    complement = np.linalg.qr(rows.T, mode="complete")[0][:, len(rows):]
    left = np.linalg.eigvalsh(complement.T @ matrix @ complement)[-1]
    return Conditioning(before=float(curvatures[-1] / curvatures[0]), after=float(left / curvatures[0]))


# ---- units with Hessians of their own (ours) -------------------------------------------------------------------------
#
#   unit t: L_t(theta) = 1/2 (theta - theta*_t)^T H_t (theta - theta*_t), budget n_t       eta   step size      n   steps
#   group k: mean of its units' losses by budget, with Hessian H_k and gradient g_k at theta0, and N_k = sum of its n_t


def split_merge(hessians: ArrayLike, optima: ArrayLike, budgets: ArrayLike, groups: ArrayLike, start: ArrayLike, *,
                step: float, steps: int) -> Floats:
    """Where the token-weighted merge lies after n gradient steps of every branch, [d]; one group: joint training.

        theta_k = theta0 - phi(H_k) g_k,   phi(lambda) = (1 - (1 - eta lambda)^n) / lambda,   n eta where lambda = 0
        merge = sum_k (N_k / N) theta_k

    in closed form, by the eigenvectors of each H_k. If every H_t is the same H, then phi(H) comes out of the sum and the
    merge is theta0 - phi(H) gbar whatever the groups: joint training with n steps, that is with K times fewer steps than joint
    training takes for the same tokens. Otherwise it depends on the groups: `unequal_curvature`.

    Args:
        hessians: [T, d, d], symmetric, >= 0.    optima: theta*_t, [T, d].    budgets: n_t > 0, [T].
        groups: whole numbers [T]; units of one number train together.    start: theta0 [d].
        step: eta > 0.    steps: n >= 0, of every branch; branches may take them at the same time.
    """
    curvatures, slopes, weights = _group_means(hessians, optima, budgets, groups, start)
    theta = np.asarray(start, dtype=np.float64).copy()
    for curvature, slope, weight in zip(curvatures, slopes, weights, strict=True):
        values, vectors = np.linalg.eigh(curvature)
        theta -= weight * (vectors @ (_travelled(values, step, steps) * (vectors.T @ slope)))
    return theta


def unequal_curvature(hessians: ArrayLike, optima: ArrayLike, budgets: ArrayLike, groups: ArrayLike, start: ArrayLike, *,
                      step: float, steps: int) -> Floats:
    """Leading term of merge - joint at the same number of steps, [d]:  eta^2 n(n-1)/2 sum_k w_k (H_k - Hbar) (g_k - gbar).

    After n steps theta_k = theta0 - n eta g_k + eta^2 n(n-1)/2 H_k g_k - .., and the second term is the first that is not
    linear in the group: what a split changes in the merge is the covariance, over groups, of curvature and gradient. Exact
    for n = 1 (zero: one step forgets the split) and n = 2, off by O((n eta |H|)^3) beyond. Zero where all H_k are the same,
    however far the gradients are apart; a plan's conflict axes look at gradients alone, so they do not see it.

    Args as `split_merge`.
    """
    curvatures, slopes, weights = _group_means(hessians, optima, budgets, groups, start)
    bent = np.einsum("k,kij,kj->i", weights, curvatures - np.tensordot(weights, curvatures, 1), slopes - weights @ slopes)
    term: Floats = step**2 * steps * (steps - 1) / 2 * bent
    return term


def _travelled(curvatures: Floats, step: float, steps: int) -> Floats:
    """phi = (1 - (1 - eta lambda)^n) / lambda, to rounding also where lambda is next to nothing."""
    each = step * curvatures
    gentle = np.abs(each) < 0.5
    lost = np.where(gentle, -np.expm1(steps * np.log1p(-np.where(gentle, each, 0.0))), 1 - (1 - each) ** steps)
    flat = curvatures == 0
    ratio: Floats = np.where(flat, step * steps, lost / np.where(flat, 1.0, curvatures))
    return ratio


def _group_means(hessians: ArrayLike, optima: ArrayLike, budgets: ArrayLike, groups: ArrayLike,
                 start: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """H_k [K, d, d], g_k [K, d] and w_k [K]."""
    matrices, group, share = np.asarray(hessians, dtype=np.float64), np.asarray(groups), _shares(budgets)
    slopes = np.einsum("tij,tj->ti", matrices, np.asarray(start, dtype=np.float64) - np.asarray(optima, dtype=np.float64))
    member = (group[None, :] == np.unique(group)[:, None]) * share
    weights = member.sum(axis=1)
    inside = member / weights[:, None]
    return np.tensordot(inside, matrices, 1), inside @ slopes, weights


def _shares(weights: ArrayLike) -> Floats:
    values = np.asarray(weights, dtype=np.float64)
    share: Floats = values / values.sum()
    return share
