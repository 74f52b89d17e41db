"""Where adapters are merged: in the small space that all of them span, or on the whole matrices. Pure functions.

    d_i = s_i B_i A_i = U M_i V^T      M_i [p, q], p and q at most the sum of the ranks      (joint core space)

A method merges the changes d_i to d. Three kinds of methods, by two laws that the tests hold every one of them to:

    turning     d(R d_i S^T) = R d(d_i) S^T for rotations R, S: linear combinations, and what looks at lengths, angles and
                singular values only. Computed on the M_i: exact, the dense merge to rounding, at the price of the ranks.
    entrywise   signs, magnitudes, or random draws of single entries (TIES, DARE, DELLA, Breadcrumbs, SCE, RAM, nearswap), or
                lengths of single rows (nuslerp without `flatten`, model_stock with `filter_wise`):
                they do not commute with a rotation. `dense`: on the whole matrices, one at a time: the dense merge itself.
                `core`: the same rule on the entries of the M_i, as Core Space proposes: another merge, low-rank without loss.
    weights     the result depends on the base's own weights (slerp, karcher, arcee_fusion; a `linear` whose weights do not
                sum to one): only dense, with `base_model`.

Core Space: arXiv 2509.17786. Compress-then-Merge: arXiv 2606.03723.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.merge import Argument, MergeMethod
from anabranch.merge.low_rank import shared_bases

Kind = Literal["turning", "entrywise", "weights"]
TURNING = ("linear", "token_weighted", "interpolate", "task_arithmetic", "task_vector_mean", "layer_scaled", "passthrough",
           "nuslerp", "multislerp", "model_stock", "tsv_m", "iso_c", "iso_cts", "star")
SHARING = ("tsv_m", "iso_cts")  # the smaller dimension of the matrix, among the branches
WEIGHTS = ("slerp", "karcher", "arcee_fusion")
# What cannot be had from adapters, and why.
REFUSED = {
    "fisher": "it needs the Fisher information of whole models. Merge these: `anabranch merge` takes MODEL+ADAPTER",
}
Call = Callable[[Tensor, Tensor], Tensor]
"""(branches [k, *shape], base [*shape]) -> merged [*shape], all float32."""


def kind_of(method: MergeMethod, arguments: Mapping[str, Argument], weights: Sequence[float] | None) -> Kind:
    """Which of the three kinds a method is, under these arguments."""
    if method.name in WEIGHTS:
        return "weights"
    if method.name == "passthrough" and arguments.get("scale") not in (1, 1.0, (1.0,)):
        return "weights"
    if method.name == "linear" and not arguments.get("normalize") and weights is not None and abs(sum(weights) - 1) > 1e-6:
        return "weights"
    by_rows = method.name == "nuslerp" and not arguments.get("flatten", True)
    if method.name not in TURNING or by_rows or arguments.get("filter_wise"):
        return "entrywise"
    return "turning"


def in_core(call: Call, cores: Tensor) -> Tensor:
    """The merged core matrix [p, q], float64, of cores [k, p, q]. The base of a change is zero."""
    small = cores.float()
    return call(small, torch.zeros_like(small[0])).double()


def compressed(call: Call, cores: Tensor, rank: int) -> Tensor:
    """Compress-then-Merge: the same in the `rank` directions on each side that the cores share, back in [p, q]."""
    left, right = shared_bases(cores, rank)
    return left @ in_core(call, left.T @ cores @ right.T) @ right


def padded(method: MergeMethod, arguments: Mapping[str, Argument], shape: Sequence[int], ranks: Sequence[int], k: int,
           ) -> tuple[int, dict[str, Argument]]:
    """The least size of core matrices in which a method does what it does on matrices of `shape`, and its arguments there.

    TSV-M and Iso-CTS share the smaller dimension r of the matrix out among the branches. On core matrices that would be a
    smaller number, and cut off directions that the dense merge keeps; rows and columns of zeros make up for it.
    `k`: branches whose weight is not 0, of these `ranks`; directions of others must not be in the cores. Size 0: any.
    """
    least, given = min(shape), dict(arguments)
    if method.name == "tsv_m":
        return min(least, max(1, k) * max(ranks)), given
    if method.name == "iso_cts":
        share = float(str(given["common_share"]))
        own = min(round((least - int(least * share)) / max(1, k)), least // max(1, k))
        common = least - own * k
        own, common = min(own, max(ranks)), min(common, sum(ranks))
        size = own * k + common
        return size, given | {"common_share": min(1.0, (common + 0.5) / size)}
    return 0, given


def with_zeros(cores: Tensor, size: int) -> Tensor:
    """Cores [k, p, q] with rows and columns of zeros up to `size`."""
    k, p, q = cores.shape
    if p >= size and q >= size:
        return cores
    grown = cores.new_zeros(k, max(p, size), max(q, size))
    grown[:, :p, :q] = cores
    return grown


def without_zeros(core: Tensor, shape: Sequence[int]) -> Tensor:
    return core[: shape[0], : shape[1]]


def call_of(method: MergeMethod, arguments: Mapping[str, Argument], inputs: Mapping[str, Any],
            draws: Callable[[Sequence[int]], Tensor]) -> Call:
    """A method with everything but branches and base. `draws`: uniform numbers of a shape [k, *shape], if it takes any."""
    def call(branches: Tensor, base: Tensor) -> Tensor:
        every = {**inputs, "branches": branches, "base": base}
        if "draws" in method.inputs:
            every["draws"] = draws(branches.shape[1:])
        with torch.no_grad():
            return method.function(*(every[name] for name in method.inputs), **arguments)

    return call
