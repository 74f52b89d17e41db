"""Averages of branches.

    k   branches          *shape   of one tensor          float32 throughout

    theta_0   `base`, the checkpoint that every branch started from
    theta_k   `branches[k]`
    w_k       `weights[k]`
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from anabranch.merge import PerBranch, merge_method, one_each, streams
from anabranch.merge.combination import Combination
from anabranch.merge.stack import Stack, WholeStack

# Weights arrive as k float32 numbers; their sum is off by rounding only.
SUM_TOLERANCE = 1e-5
# Share of their magnitudes below which weights of either sign cancel.
NO_SUM = 1e-6


@merge_method("linear", needs_base=False, reference="arXiv:2203.05482, sec. 2 (model soups)")
def linear(
    branches: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    *,
    normalize: bool = True,
) -> Float[Tensor, " *shape"]:
    r"""Weighted average, or weighted sum, of the branches.

    \theta = \sum_k c_k \theta_k,   c_k = w_k / \sum_j w_j where `normalize`, otherwise w_k

    The coefficients are found in float64 and rounded once; see `Combination` for the order of the sum.

    Args:
        branches: theta_k.
        weights: w_k, finite, of any sign.
        normalize: divide by the sum of the weights.
    Raises:
        ValueError: a weight is not finite, or they sum to nothing and `normalize` is set.
    Example:
        >>> linear(torch.tensor([[1., 3.], [5., 7.]]), torch.tensor([3., 1.]))
        tensor([2., 4.])

    Differs from the reference: allows weights of any sign and a sum that is not one. MergeKit divides after the sum and
    in the inputs' own precision.
    """
    return WholeStack(branches).apply(linear_streamed(WholeStack(branches), weights, normalize=normalize))


@streams("linear")
def linear_streamed(stack: Stack, weights: Tensor, *, normalize: bool = True) -> Combination:
    w = finite(weights)
    total = math.fsum(w) if normalize else 1.0
    if normalize and abs(total) <= NO_SUM * math.fsum(map(abs, w)):
        raise ValueError(f"weights: got {w}, which sum to {total:.6g}, so there is no average. "
                         "Set normalize to false for a plain sum")
    return Combination(tuple(v / total for v in w))


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
    stack = WholeStack(branches, base)
    return stack.apply(token_weighted_streamed(stack, weights))


@streams("token_weighted")
def token_weighted_streamed(stack: Stack, weights: Tensor) -> Combination:
    return Combination(tuple(_shares(weights)), anchored=True)


@merge_method("interpolate", needs_base=True, reference="arXiv:2109.01903, eq. (1) (WiSE-FT)")
def interpolate(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    *,
    alpha: float = 0.5,
) -> Float[Tensor, " *shape"]:
    r"""The base, and a share alpha of the step from it to the (averaged) branch.

    \theta = \theta_0 + \alpha (\sum_k w_k \theta_k - \theta_0) = \theta_0 + \sum_k \alpha w_k (\theta_k - \theta_0)

    With one branch of weight 1 this pulls joint training back towards the base; its displacement is alpha times
    joint training's.

    Args:
        branches: theta_k.
        base: theta_0.
        weights: w_k in [0, 1], summing to one.
        alpha: >= 0; 0 is the base, 1 the average, more than 1 goes past it.
    Raises:
        ValueError: alpha is negative or not finite; weights as for `token_weighted`.
    Example:
        >>> interpolate(torch.tensor([[1., 3.]]), torch.tensor([0., 1.]), torch.tensor([1.]), alpha=0.25)
        tensor([0.2500, 1.5000])

    Differs from the reference: takes several branches and averages them first, and allows alpha > 1.
    """
    stack = WholeStack(branches, base)
    return stack.apply(interpolate_streamed(stack, weights, alpha=alpha))


@streams("interpolate")
def interpolate_streamed(stack: Stack, weights: Tensor, *, alpha: float = 0.5) -> Combination:
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha: got {alpha}, wanted a finite number >= 0")
    return Combination(tuple(alpha * w for w in _shares(weights)), anchored=True)


@merge_method("passthrough", needs_base=False, branches=(1, 1), reference="MergeKit, passthrough (no paper)")
def passthrough(
    branches: Float[Tensor, " k *shape"],
    *,
    scale: PerBranch = 1.0,
) -> Float[Tensor, " *shape"]:
    r"""The one branch, times a number: layers are stacked, dropped and repeated with it.

    \theta = s \, \theta_1

    Args:
        branches: theta_1.
        scale: s, finite; 0 silences a projection.
    Raises:
        ValueError: more than one branch, or a scale that is not finite.
    Example:
        >>> passthrough(torch.tensor([[1., 3.]]), scale=0.5)
        tensor([0.5000, 1.5000])

    Differs from the reference: the product is rounded once, from float32.
    """
    stack = WholeStack(branches)
    return stack.apply(passthrough_streamed(stack, scale=scale))


@streams("passthrough")
def passthrough_streamed(stack: Stack, *, scale: PerBranch = 1.0) -> Combination:
    if stack.k != 1:
        raise ValueError(f"branches: passthrough copies exactly one, got {stack.k}")
    (factor,) = one_each(scale, 1)
    if not math.isfinite(factor):
        raise ValueError(f"scale: got {factor}, wanted a finite number")
    return Combination((factor,))


@merge_method("fisher", needs_base=False, reference="arXiv:2111.09832, eq. (4)")
def fisher(
    branches: Float[Tensor, " k *shape"],
    weights: Float[Tensor, " k"],
    fisher: Float[Tensor, " k *shape"],
) -> Float[Tensor, " *shape"]:
    r"""Average in which every entry is weighted by what each branch's data say about it.

    \theta = \sum_k w_k F_k \theta_k / \sum_k w_k F_k = \theta_b + \sum_k w_k F_k (\theta_k - \theta_b) / \sum_k w_k F_k

    F_k is the diagonal of branch k's Fisher information (mean squared gradient of the log-likelihood). The second form
    is computed, b being the branch whose w_b F_b is largest at that entry: what all branches agree on, and what one
    branch alone knows, is kept to the bit. An entry of which no branch's data say
    anything (all w_k F_k are 0) takes the plain weighted mean, F_k = 1.

    Args:
        branches: theta_k.
        weights: w_k >= 0, not all 0.
        fisher: F_k >= 0.
    Raises:
        ValueError: a weight is negative or not finite, or all are 0; an F is negative or not finite.
    Example:
        >>> fisher(torch.tensor([[1., 3.], [5., 7.]]), torch.ones(2), torch.tensor([[3., 0.], [1., 0.]]))
        tensor([2., 5.])

    Differs from the reference: the paper's code adds 1e-6 to every F; here an entry without information falls back to
    the mean and the others are exact. The paper normalises F per model where models differ much in scale; here that is
    left to the weights.
    """
    w = finite(weights)
    if min(w) < 0 or max(w) == 0:
        raise ValueError(f"weights: got {w}, wanted numbers >= 0 that are not all 0")
    wrong = [i for i, row in enumerate(fisher, 1) if not bool(torch.isfinite(row).all()) or bool((row < 0).any())]
    if wrong:
        raise ValueError(f"the Fisher information of model {', '.join(map(str, wrong))} of {len(fisher)} (in the order of the "
                         "list) holds negative numbers, NaN or infinity. It is a mean of squared gradients, so each number is "
                         "finite and >= 0: make that file again")
    # [k, *shape]: what each branch's number counts; its weight alone where no branch's data say anything.
    said = torch.stack([information * weight for information, weight in zip(fisher, w, strict=True)])
    unsaid = said.amax(0) == 0
    for row, weight in zip(said, w, strict=True):
        row.masked_fill_(unsaid, weight)
    best = said.argmax(0, keepdim=True)
    anchor = branches.gather(0, best)[0]
    divisor, step = torch.zeros_like(anchor), torch.zeros_like(anchor)
    for row in said:
        divisor += row
    for branch, row in zip(branches, said, strict=True):
        step += (branch - anchor).mul_(row.div_(divisor))
    return step.add_(anchor)


def finite(weights: Float[Tensor, " k"]) -> list[float]:
    """The numbers of `weights`. Raises ValueError where one is not finite."""
    numbers = [float(w) for w in weights.tolist()]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"weights: got {numbers}, wanted finite numbers")
    return numbers


def _shares(weights: Tensor) -> list[float]:
    """`weights` if they are an average's."""
    shares = finite(weights)
    if min(shares, default=0.0) < 0:
        raise ValueError(f"weights: got {shares}, wanted finite numbers >= 0")
    if abs(math.fsum(shares) - 1) > SUM_TOLERANCE:
        raise ValueError(f"weights: got {shares}, which sum to {math.fsum(shares):.6g}, wanted 1")
    return shares
