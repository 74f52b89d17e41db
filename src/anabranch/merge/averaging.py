"""Averages of branches.

    k   branches          *shape   of one tensor          float32 throughout

    theta_0   `base`, the checkpoint that every branch started from
    theta_k   `branches[k]`
    w_k       `weights[k]`, >= 0, summing to one
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from anabranch.merge import merge_method

# Weights arrive as k float32 numbers; their sum is off by rounding only.
SUM_TOLERANCE = 1e-5


@merge_method("token_weighted", needs_base=True, reference="arXiv:2606.01717, step 5 (MERIT's one merge)")
def token_weighted(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
) -> Float[Tensor, " *shape"]:
    r"""Average of the branches, each weighted by its share of the tokens.

    \bar\theta = \sum_k w_k \theta_k = \theta_0 + \sum_k w_k (\theta_k - \theta_0),   w_k = N_k / \sum_j N_j

    The two forms are equal because the weights sum to one. The second is computed: its rounding error is in
    proportion to how far the branches moved and not to the parameters themselves, so a tensor that no branch trained
    stays the base's to the bit, and weights whose float32 sum misses one by a last digit do no harm. Terms are added
    in the order of the branches; another order may change the last digit of the float32 result.

    Args:
        branches: theta_k.
        base: theta_0.
        weights: w_k in [0, 1]; N_k is the token budget of group k.
    Raises:
        ValueError: a weight is negative or not finite, or they do not sum to one.
    Example:
        >>> token_weighted(torch.tensor([[1., 3.], [5., 7.]]), torch.zeros(2), torch.tensor([0.75, 0.25]))
        tensor([2., 4.])

    Differs from the reference: none (the paper does not say how it computes the sum).
    """
    return base + _mean_step(branches, base, weights)


@merge_method("interpolate", needs_base=True, reference="arXiv:2109.01903, eq. (1) (WiSE-FT)")
def interpolate(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    *,
    alpha: float = 0.5,
) -> Float[Tensor, " *shape"]:
    r"""The base, and a share alpha of the step from it to the (averaged) branch.

    \theta = \theta_0 + \alpha \left( \sum_k w_k \theta_k - \theta_0 \right)

    With one branch of weight 1 this pulls joint training back towards the base; its displacement is alpha times
    joint training's.

    Args:
        branches: theta_k.
        base: theta_0.
        weights: w_k in [0, 1].
        alpha: >= 0; 0 is the base, 1 the average, more than 1 goes past it.
    Raises:
        ValueError: alpha is negative or not finite; weights as for `token_weighted`.
    Example:
        >>> interpolate(torch.tensor([[1., 3.]]), torch.tensor([0., 1.]), torch.tensor([1.]), alpha=0.25)
        tensor([0.2500, 1.5000])

    Differs from the reference: takes several branches and averages them first, and allows alpha > 1.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha: got {alpha}, wanted a finite number >= 0")
    return base + _mean_step(branches, base, weights).mul_(alpha)


def _mean_step(branches: Tensor, base: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_k (theta_k - theta_0), a fresh tensor."""
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(f"weights: got {weights.tolist()}, wanted finite numbers >= 0")
    if abs(float(weights.double().sum()) - 1) > SUM_TOLERANCE:
        raise ValueError(f"weights: got {weights.tolist()}, which sum to {float(weights.double().sum()):.6g}, wanted 1")
    step = torch.zeros_like(base)
    for branch, weight in zip(branches, weights.tolist(), strict=True):
        # Product and sum stay apart: a fused multiply-add is used for some elements of a vector and not for its
        # tail, and then a number's last digit would depend on where in the tensor it stands.
        step += (branch - base).mul_(weight)
    return step
