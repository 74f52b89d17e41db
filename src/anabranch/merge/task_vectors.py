"""Sums of task vectors, of their largest entries, or of entries drawn at random.

    k   branches          *shape   of one tensor, of N entries          float32 throughout

    x_0   `base`                  x_i   `branches[i]`          d_i = x_i - x_0   task vector
    w_i   `weights[i]`            rho_i   `density`, the share of d_i's entries that is kept
    lambda   `scale`              s(.)   a task vector made sparse and its survivors scaled

The family is  x_0 + lambda \\sum_i w_i s(d_i) / V,  V being 1, or where `normalize` the sum of the weights. With an
election of signs (`ties`, `dare_ties`, `della`, `breadcrumbs_ties`) an entry's sum and V take only the branches whose
w_i s(d_i) points where the sum of all of them does; `Consensus` has the order of operations.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch  # noqa: F401 - the examples use it
from jaxtyping import Float
from torch import Tensor

from anabranch.merge import PerBranch, merge_method, one_each, streams
from anabranch.merge.averaging import finite
from anabranch.merge.combination import Combination
from anabranch.merge.consensus import Consensus, divisor_of
from anabranch.merge.select import Cut
from anabranch.merge.sparsify import band_cuts, cut_at, densities, l1_factors, largest_cuts
from anabranch.merge.stack import Stack, WholeStack


@merge_method("task_arithmetic", needs_base=True, reference="arXiv:2212.04089, sec. 2")
def task_arithmetic(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> Float[Tensor, " *shape"]:
    r"""The base and the weighted sum of the task vectors.

    \theta = x_0 + \lambda \sum_i w_i d_i / V,   V = \sum_i w_i where `normalize`, otherwise 1

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite, of any sign; a negative one takes a skill away.
        normalize: divide by the sum of the weights, unless that is below 1e-8 in magnitude.
        scale: lambda, finite.
    Raises:
        ValueError: a weight or the scale is not finite.
    Example:
        >>> task_arithmetic(torch.tensor([[3., 1.], [-1., -1.]]), torch.zeros(2), torch.ones(2), scale=2.0)
        tensor([4., 0.])

    Differs from the reference: has a weight per branch beside the paper's one lambda, as MergeKit has.
    """
    stack = WholeStack(branches, base)
    return stack.apply(task_arithmetic_streamed(stack, weights, normalize=normalize, scale=scale))


@streams("task_arithmetic")
def task_arithmetic_streamed(
    stack: Stack, weights: Tensor, *, normalize: bool = False, scale: float = 1.0
) -> Combination:
    w = finite(weights)
    factor = _finite("scale", scale) / (divisor_of(w) if normalize else 1.0)
    return Combination(tuple(factor * v for v in w), anchored=True)


@merge_method("task_vector_mean", needs_base=True, reference="arXiv:2412.00081, sec. 4 (for tensors that are no matrix)")
def task_vector_mean(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    *,
    scale: float = 1.0,
) -> Float[Tensor, " *shape"]:
    r"""The base and the weighted mean of the task vectors: what spectral methods do to vectors, norms and embeddings.

    \theta = x_0 + \lambda \sum_i w_i d_i / \sum_i w_i

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite; their sum counts as 1 where it is below 1e-8 in magnitude.
        scale: lambda, finite.
    Raises:
        ValueError: a weight or the scale is not finite.
    Example:
        >>> task_vector_mean(torch.tensor([[3., 1.], [-1., -1.]]), torch.zeros(2), torch.ones(2))
        tensor([1., 0.])

    Differs from the reference: weights per branch; with equal ones, none.
    """
    stack = WholeStack(branches, base)
    return stack.apply(task_vector_mean_streamed(stack, weights, scale=scale))


@streams("task_vector_mean")
def task_vector_mean_streamed(stack: Stack, weights: Tensor, *, scale: float = 1.0) -> Combination:
    return task_arithmetic_streamed(stack, weights, normalize=True, scale=scale)


@merge_method("layer_scaled", needs_base=True, reference="arXiv:2410.17146, eq. (2) (LiNeS)")
def layer_scaled(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    depth: float,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    normalize: bool = False,
    scale: float = 1.0,
) -> Float[Tensor, " *shape"]:
    r"""Task arithmetic that lets deep layers move more than shallow ones.

    \theta^{(l)} = x_0 + \lambda (\alpha + \beta \delta_l) \sum_i w_i d_i / V,   \delta_l = (l - 1) / (L - 1)

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        depth: delta_l in [0, 1], place of the layer l of L.
        alpha: factor of the first layer, finite.
        beta: what the last layer's factor has more than the first's, finite.
        normalize: V is the sum of the weights (1 where that is below 1e-8 in magnitude); otherwise 1.
        scale: lambda, finite.
    Raises:
        ValueError: a number is not finite.
    Example:
        >>> layer_scaled(torch.tensor([[4., 8.]]), torch.zeros(2), torch.ones(1), 0.5, alpha=0.0, beta=1.0)
        tensor([2., 4.])

    Differs from the reference: there alpha is found from norms over all branches and beta by validation, here both are
    given (the defaults keep half of the first layer's step and all of the last one's); tensors behind the last layer
    (final norm, head) count as deep here, while the authors' code scales all tensors outside of layers by alpha.
    """
    stack = WholeStack(branches, base)
    return stack.apply(layer_scaled_streamed(stack, weights, depth, alpha=alpha, beta=beta, normalize=normalize,
                                             scale=scale))


@streams("layer_scaled")
def layer_scaled_streamed(
    stack: Stack, weights: Tensor, depth: float, *, alpha: float = 0.5, beta: float = 0.5, normalize: bool = False,
    scale: float = 1.0,
) -> Combination:
    factor = _finite("alpha", alpha) + _finite("beta", beta) * _finite("depth", depth)
    return task_arithmetic_streamed(stack, weights, normalize=normalize, scale=_finite("scale", scale) * factor)


@merge_method("ties", needs_base=True, reference="arXiv:2306.01708, sec. 3 (trimmed per tensor)")
def ties(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    *,
    density: PerBranch = 1.0,
    normalize: bool = True,
    scale: float = 1.0,
    rescale: bool = False,
) -> Float[Tensor, " *shape"]:
    r"""Trim, elect, merge: the largest entries of each task vector, the sign most of their mass has, their mean.

    s(d_i) = d_i on its int(rho_i N) largest |d_i|, else 0 (times ||d_i||_1 / ||s(d_i)||_1 where `rescale`)
    \gamma = sign \sum_i w_i s(d_i), + for 0;   m_i = [sign(w_i s(d_i)) = \gamma]
    \theta = x_0 + \lambda \sum_i w_i m_i s(d_i) / \sum_i w_i m_i      (divisor 1 where it is 0, or without `normalize`)

    At least one entry is kept where rho_i > 0; of equal magnitudes the one with the lower flat index is kept.

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite; mixed signs can make the divisor small.
        density: rho_i >= 0; 0 drops a branch, 1 or more keeps all of it.
        normalize: divide by the weights of the branches that agree.
        scale: lambda, finite.
        rescale: keep each task vector's L1 norm.
    Raises:
        ValueError: a weight, density or the scale is out of range; a NaN among the inputs.
    Example:
        >>> branches = torch.tensor([[3., 1., 0., 2.], [-1., -1., 0., 4.], [-1., 0., 0., -1.]])
        >>> ties(branches, torch.zeros(4), torch.ones(3))
        tensor([3., 1., 0., 3.])

    Differs from the reference: trims each tensor by itself, as MergeKit does (`ties_global` trims as the paper does);
    has weights, which enter election and mean; ties in the election go to +, where the paper leaves them open.
    """
    stack = WholeStack(branches, base)
    return stack.apply(ties_streamed(stack, weights, density=density, normalize=normalize, scale=scale, rescale=rescale))


@streams("ties")
def ties_streamed(
    stack: Stack, weights: Tensor, *, density: PerBranch = 1.0, normalize: bool = True, scale: float = 1.0,
    rescale: bool = False,
) -> Consensus:
    cuts = largest_cuts(stack, densities(density, stack))
    return _consensus(stack, weights, cuts, None, rescale=rescale, consensus=True, normalize=normalize, scale=scale)


@merge_method("ties_global", needs_base=True, reference="arXiv:2306.01708, sec. 3", cuts_from="density")
def ties_global(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    cuts: Float[Tensor, " k"],
    *,
    density: PerBranch = 1.0,
    normalize: bool = True,
    scale: float = 1.0,
) -> Float[Tensor, " *shape"]:
    r"""TIES as published: the largest entries of the whole model's task vector, then election and mean as in `ties`.

    s(d_i) = d_i where |d_i| >= c_i, else 0;   c_i the int(rho_i N)-th largest |d_i| over all N entries of the model

    The engine finds the cuts from `density` before the first tensor is merged. Entries that equal the cut are all kept.
    A tensor of no dimension is not trimmed.

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        cuts: c_i >= 0; infinity drops a branch.
        density: rho_i, from which the cuts were found; checked here and not used.
        normalize: divide by the weights of the branches that agree.
        scale: lambda, finite.
    Raises:
        ValueError: a weight, density or the scale is out of range; a cut is negative or NaN.
    Example:
        >>> branches = torch.tensor([[3., 1., 0., 2.], [-1., -1., 0., 4.]])
        >>> ties_global(branches, torch.zeros(4), torch.ones(2), torch.tensor([2., 2.]))
        tensor([3., 0., 0., 3.])

    Differs from the reference: has weights; keeps the authors' rule for equal magnitudes (`>=` the cut).
    """
    stack = WholeStack(branches, base)
    return stack.apply(ties_global_streamed(stack, weights, cuts, density=density, normalize=normalize, scale=scale))


@streams("ties_global")
def ties_global_streamed(
    stack: Stack, weights: Tensor, cuts: Tensor, *, density: PerBranch = 1.0, normalize: bool = True, scale: float = 1.0
) -> Consensus:
    rho, sizes = densities(density, stack), [float(c) for c in cuts.tolist()]
    if not all(c >= 0 for c in sizes):
        raise ValueError(f"cuts: got {sizes}, wanted magnitudes >= 0")
    found = None
    if stack.shape != () or min(rho) <= 0:
        found = tuple(Cut(math.inf) if r <= 0 else Cut(-math.inf) if stack.shape == () else cut_at(c)
                      for c, r in zip(sizes, rho, strict=True))
    return _consensus(stack, weights, found, None, rescale=False, consensus=True, normalize=normalize, scale=scale)


@merge_method("breadcrumbs", needs_base=True, reference="arXiv:2312.06795, sec. 3")
def breadcrumbs(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    *,
    density: PerBranch = 1.0,
    gamma: PerBranch = 0.01,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = False,
) -> Float[Tensor, " *shape"]:
    r"""Task vectors without their largest and without their smallest entries, summed.

    s(d_i) = d_i on the int(rho_i N) largest |d_i| that are left when the int(gamma_i N) largest are taken away, else 0
    \theta = x_0 + \lambda \sum_i w_i s(d_i) / V      (V the sum of weights where `normalize`, otherwise 1)

    Where fewer than rho_i N are left, fewer of the largest are taken away. With rho_i >= 1 nothing is.

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        density: rho_i >= 0, the share kept.
        gamma: the share of the largest entries that goes, in [0, 1].
        normalize: divide by the sum of the weights (1 where that is below 1e-8 in magnitude).
        scale: lambda, finite.
        rescale: keep each task vector's L1 norm.
    Raises:
        ValueError: a weight, density, gamma or the scale is out of range; a NaN among the inputs.
    Example:
        >>> branches = torch.tensor([[1., 2., 3., 4.]])
        >>> breadcrumbs(branches, torch.zeros(4), torch.ones(1), density=0.5, gamma=0.25)
        tensor([0., 2., 3., 0.])

    Differs from the reference: the paper names the shares that go, this the share that stays and the largest that go.
    MergeKit erases the whole task vector where int(gamma N) is 0; here only the smallest entries go then.
    """
    stack = WholeStack(branches, base)
    return stack.apply(breadcrumbs_streamed(stack, weights, density=density, gamma=gamma, normalize=normalize,
                                            scale=scale, rescale=rescale))


@streams("breadcrumbs")
def breadcrumbs_streamed(
    stack: Stack, weights: Tensor, *, density: PerBranch = 1.0, gamma: PerBranch = 0.01, normalize: bool = False,
    scale: float = 1.0, rescale: bool = False,
) -> Consensus:
    cuts, ceilings = _band(stack, density, gamma)
    return _consensus(stack, weights, cuts, ceilings, rescale=rescale, consensus=False, normalize=normalize, scale=scale)


@merge_method("breadcrumbs_ties", needs_base=True, reference="arXiv:2312.06795, sec. 3; arXiv:2306.01708, sec. 3")
def breadcrumbs_ties(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    weights: Float[Tensor, " k"],
    *,
    density: PerBranch = 1.0,
    gamma: PerBranch = 0.01,
    normalize: bool = False,
    scale: float = 1.0,
    rescale: bool = False,
) -> Float[Tensor, " *shape"]:
    r"""The task vectors of `breadcrumbs`, merged as in `ties`.

    \theta = x_0 + \lambda \sum_i w_i m_i s(d_i) / V,   V = \sum_i w_i m_i where `normalize`, otherwise 1

    Args:
        branches: x_i.
        base: x_0.
        weights: w_i, finite.
        density: rho_i >= 0, the share kept.
        gamma: the share of the largest entries that goes, in [0, 1].
        normalize: divide by the weights of the branches that agree.
        scale: lambda, finite.
        rescale: keep each task vector's L1 norm.
    Raises:
        ValueError: as for `breadcrumbs`.
    Example:
        >>> branches = torch.tensor([[1., 2., 3., 4.], [1., -1., 1., 1.]])
        >>> breadcrumbs_ties(branches, torch.zeros(4), torch.ones(2), density=[0.5, 1.0], gamma=[0.25, 0.0])
        tensor([1., 2., 4., 1.])

    Differs from the reference: no paper has the combination; as MergeKit's, but for `breadcrumbs`' small tensors.
    """
    stack = WholeStack(branches, base)
    return stack.apply(breadcrumbs_ties_streamed(stack, weights, density=density, gamma=gamma, normalize=normalize,
                                                 scale=scale, rescale=rescale))


@streams("breadcrumbs_ties")
def breadcrumbs_ties_streamed(
    stack: Stack, weights: Tensor, *, density: PerBranch = 1.0, gamma: PerBranch = 0.01, normalize: bool = False,
    scale: float = 1.0, rescale: bool = False,
) -> Consensus:
    cuts, ceilings = _band(stack, density, gamma)
    return _consensus(stack, weights, cuts, ceilings, rescale=rescale, consensus=True, normalize=normalize, scale=scale)


def _band(stack: Stack, density: PerBranch, gamma: PerBranch) -> tuple[tuple[Cut, ...] | None, tuple[Cut, ...] | None]:
    tops = one_each(gamma, stack.k)
    if not all(0 <= g <= 1 for g in tops):
        raise ValueError(f"gamma: got {tops}, wanted shares in [0, 1] (of the largest entries, which go)")
    return band_cuts(stack, densities(density, stack), tops) or (None, None)


def _consensus(
    stack: Stack, weights: Tensor, cuts: tuple[Cut, ...] | None, ceilings: tuple[Cut, ...] | None, *, rescale: bool,
    consensus: bool, normalize: bool, scale: float,
) -> Consensus:
    factors = (1.0,) * stack.k
    merge = Consensus(cuts, factors, tuple(finite(weights)), consensus, normalize, _finite("scale", scale), ceilings)
    if not rescale or cuts is None:
        return merge
    return replace(merge, factors=l1_factors(stack, merge.kept))


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return value
