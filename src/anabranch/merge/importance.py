"""Merges that read from the task vectors themselves which entries, rows or branches matter.

    k   branches          *shape   of one tensor, of N entries          float32 throughout

    x_0   `base`                  x_i   `branches[i]`          d_i = x_i - x_0   task vector
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anabranch.merge import Argument, BlockKind, merge_method, streams
from anabranch.merge.combination import Combination
from anabranch.merge.consensus import agreeing
from anabranch.merge.rank_passes import changed_entries, fusible, importance_quantiles, selected_energies, variance_cut
from anabranch.merge.select import NAN, Cut, above, largest
from anabranch.merge.spherical import dots
from anabranch.merge.stack import Block, Blockwise, Stack, Total, WholeStack, gram

# sce: what an entry's agreeing weights are at least taken to be when they divide.
SCE_DIVISOR = 1e-6
# nearswap: the smallest distance that is told apart.
NEARSWAP_DISTANCE = 1e-6
# arcee_fusion: added to every probability, and the reach above the median in interquartile ranges.
ARCEE_PROBABILITY, ARCEE_REACH = 1e-8, 1.5


def _model_stock_block(arguments: Mapping[str, Argument]) -> BlockKind:
    return "row" if arguments["filter_wise"] else "entry"


@merge_method("model_stock", needs_base=True, branches=(2, math.inf), block=_model_stock_block,
              reference="arXiv:2403.19522, eq. (7)")
def model_stock(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    *,
    filter_wise: bool = False,
    floor: float = 1e-20,
    clamp: bool = True,
) -> Float[Tensor, " *shape"]:
    r"""The point between the base and the branches' mean that their angles say is closest to the centre of all fine-tunes.

    c = mean over pairs i < j of d_i \cdot d_j / \max(||d_i|| ||d_j||, f);   t = k c / (1 + (k - 1) c)
    \theta = t \bar x + (1 - t) x_0 = x_0 + (t / k) \sum_i d_i

    Args:
        branches: x_i, at least two.
        base: x_0.
        filter_wise: one c and t per row (last dimension) in place of one for the tensor.
        floor: f > 0; MergeKit's 1e-6 shrinks the cosine of tensors that moved by less than 1e-3.
        clamp: confine t to [0, 1]; without it branches that disagree lead away from their mean.
    Raises:
        ValueError: fewer than two branches; floor is not > 0.
    Example:
        >>> model_stock(torch.tensor([[2., 0.], [2., 0.]]), torch.zeros(2))
        tensor([2., 0.])

    Differs from the reference: the paper takes one common angle, this, as MergeKit, the mean of the pairs' cosines. t is
    confined to [0, 1] unless `clamp` is off. Where t is not finite the result is the base.
    """
    stack = WholeStack(branches, base, kind="row" if filter_wise else "entry")
    return stack.apply(model_stock_streamed(stack, filter_wise=filter_wise, floor=floor, clamp=clamp))


@streams("model_stock")
def model_stock_streamed(
    stack: Stack, *, filter_wise: bool = False, floor: float = 1e-20, clamp: bool = True
) -> Blockwise:
    if stack.k < 2:
        raise ValueError(f"branches: model_stock reads the angles between them and wants at least 2, got {stack.k}")
    if not floor > 0:
        raise ValueError(f"floor: got {floor}, wanted a number > 0")
    if filter_wise:
        return RowStock(floor, clamp)
    g = gram(stack, offset=True)
    pairs = {(i, j): g[i, j] for i in range(stack.k) for j in range(i, stack.k)}
    return Combination((float(_stock_ratio(pairs, stack.k, floor, clamp)) / stack.k,) * stack.k, anchored=True)


@dataclass(frozen=True)
class RowStock:
    """model_stock with a ratio for each row of a block [rows, columns]."""

    floor: float
    clamp: bool

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        assert block.base is not None
        d, k = block.branches - block.base, len(block.branches)
        pairs = {(i, j): dots(d[i], d[j], -1) for i in range(k) for j in range(i, k)}
        step = d[0].clone()
        for more in d[1:]:
            step += more
        return step.mul_((_stock_ratio(pairs, k, self.floor, self.clamp) / k).float()).add_(block.base)


def _stock_ratio(products: Mapping[tuple[int, int], Tensor], k: int, floor: float, clamp: bool) -> Tensor:
    """t of every vector, float64; 0 where it is not finite, but for a NaN among the vectors, which shows."""
    norms = [products[i, i].clamp(min=0).sqrt() for i in range(k)]
    total = torch.zeros_like(norms[0])
    for i, j in combinations(range(k), 2):
        total = total + (products[i, j] / (norms[i] * norms[j]).clamp(min=floor)).clamp(-1, 1)
    cosine = total / math.comb(k, 2)
    ratio = k * cosine / (1 + (k - 1) * cosine)
    ratio = torch.where(torch.isfinite(ratio) | cosine.isnan(), ratio, 0.0)
    return ratio.clamp(0, 1) if clamp else ratio


@merge_method("sce", needs_base=True, reference="arXiv:2408.07990, sec. 3.3 (FuseChat)")
def sce(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    *,
    select_topk: float = 1.0,
    floor: float = 0.0,
) -> Float[Tensor, " *shape"]:
    r"""Select the entries on which the branches differ most, weigh branches by their energy there, erase minorities.

    select:     S = the int(select_topk * n) entries of largest variance over the branches, n those whose variance is not 0
    calculate:  q_i = e_i / \sum_j e_j,   e_i = mean over the tensor of (d_i on S, else 0)^2
    erase:      m_i = [sign d_i = sign \sum_j d_j] on S, + for 0
    \theta = x_0 + \sum_i q_i m_i d_i / \max(\sum_i q_i m_i, 10^{-6})

    With select_topk >= 1 all entries are selected; with none selected the result is the base.

    Args:
        branches: x_i.
        base: x_0.
        select_topk: share of the varying entries, in [0, 1]; more counts as 1.
        floor: total energy \sum_j e_j below which all q_i are 1/k (MergeKit: 1e-6, which most fine-tunes stay below).
    Raises:
        ValueError: select_topk is negative or NaN; a NaN among the inputs.
    Example:
        >>> sce(torch.tensor([[3., 1.], [1., -3.]]), torch.zeros(2))
        tensor([ 2., -3.])

    Differs from the reference: none with floor 0. MergeKit returns a tensor of another shape where nothing is selected.
    """
    stack = WholeStack(branches, base)
    return stack.apply(sce_streamed(stack, select_topk=select_topk, floor=floor))


@streams("sce")
def sce_streamed(stack: Stack, *, select_topk: float = 1.0, floor: float = 0.0) -> Blockwise:
    if not select_topk >= 0:
        raise ValueError(f"select_topk: got {select_topk}, wanted a share in [0, 1]")
    if fusible(stack):
        found = variance_cut(stack, select_topk) if select_topk < 1 else (None, 0, 0)
        if found is not None:
            return _elected(stack, *selected_energies(stack, *found), floor)
    cut = None
    if select_topk < 1:
        varying = sum(int((_variance(block) > 0).sum()) for block in stack)
        ((cut,),) = largest(stack, _variance, [[int(varying * select_topk)]])
    unweighted = Elected(cut, (1.0,) * stack.k)
    total = Total()
    for block in stack:
        total.add(torch.stack(unweighted.steps(block)).square_().flatten(1))
    return _elected(stack, torch.as_tensor(total.value, dtype=torch.float64).expand(stack.k), cut, floor)


def _elected(stack: Stack, sums: Float[Tensor, " k"], cut: Cut | None, floor: float) -> Elected:
    """The weights of sce, from the sum of squares that each branch has where it is selected."""
    energies = sums.div(max(stack.numel, 1)).tolist()
    whole = math.fsum(energies)
    if whole < floor or whole == 0:
        return Elected(cut, (1.0 / stack.k,) * stack.k)
    # A NaN without the sign and payload that it got on its way here: those differ between the fused kernels and torch.
    return Elected(cut, tuple(math.nan if math.isnan(e / whole) else e / whole for e in energies))


def _variance(block: Block) -> Float[Tensor, " 1 *n"]:
    """Population variance over the branches: of x_i - x_1, so that equal branches have exactly 0."""
    shifted = block.branches - block.branches[0]
    mean = torch.zeros_like(shifted[0])
    for x in shifted:
        mean += x
    mean /= len(shifted)
    variance = torch.zeros_like(mean)
    for x in shifted:
        variance += (x - mean).square_()
    # abs_ changes nothing but the sign of a NaN, and one with a sign could not be told where numbers are ranked.
    return variance.div_(len(shifted)).abs_().unsqueeze(0)


@dataclass(frozen=True)
class Elected:
    """sce of a block, with its weights known; `cut` selects by variance, None selects all."""

    cut: Cut | None
    weights: tuple[float, ...]

    def fused(self, start: int, x: np.ndarray, base: np.ndarray, out: np.ndarray) -> bool:
        """The same on numbers as they are stored (see rank_kernels), rounded into `out`; False where one is not finite."""
        from anabranch.merge import rank_kernels

        if not all(map(math.isfinite, self.weights)):
            return False
        cut = self.cut or Cut(-math.inf)
        return rank_kernels.elect_selected(x, base, self.cut is not None, np.float32(cut.value), cut.last - start,
                                           np.array(self.weights, np.float32), out)

    def steps(self, block: Block) -> list[Tensor]:
        assert block.base is not None
        steps = [branch - block.base for branch in block.branches]
        if self.cut is not None:
            erased = ~above(_variance(block)[0], self.cut, block.start)
            steps = [step.masked_fill_(erased, 0.0) for step in steps]
        return steps

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        assert block.base is not None
        steps = self.steps(block)
        total, divisor = torch.zeros_like(block.base), torch.zeros_like(block.base)
        for step, mask, q in zip(steps, agreeing(torch.stack(steps)), self.weights, strict=True):
            total += step.mul_(q).masked_fill_(~mask, 0.0)
            divisor += mask * q
        return total.div_(divisor.clamp_(min=SCE_DIVISOR)).add_(block.base)


@merge_method("ram", needs_base=True, reference="arXiv:2601.13572, sec. 3 (RAM)")
def ram(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    *,
    epsilon: float = 1e-5,
) -> Float[Tensor, " *shape"]:
    r"""Entries that one branch changed are taken whole, entries that several changed are averaged over those.

    \theta = x_0 + \sum_i z_i / \max(C, 1),   z_i = d_i where |d_i| > \epsilon, else 0,   C the number of such branches

    Args:
        branches: x_i.
        base: x_0.
        epsilon: change that counts as none, >= 0.
    Raises:
        ValueError: epsilon is negative or NaN.
    Example:
        >>> ram(torch.tensor([[1., 1., 0.], [0., 3., 0.]]), torch.zeros(3))
        tensor([1., 2., 0.])

    Differs from the reference: none.
    """
    stack = WholeStack(branches, base)
    return stack.apply(ram_streamed(stack, epsilon=epsilon))


@streams("ram")
def ram_streamed(stack: Stack, *, epsilon: float = 1e-5) -> Blockwise:
    return Shared(_not_negative("epsilon", epsilon), (1.0,) * stack.k)


@merge_method("ramplus_tl", needs_base=True, reference="arXiv:2601.13572, sec. 3 (RAM+, counts per tensor)")
def ramplus_tl(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
) -> Float[Tensor, " *shape"]:
    r"""`ram`, with a branch's own changes scaled up the more of its changes are shared, and so watered down.

    \theta = x_0 + \sum_i z_i (l_i where C = 1, 1 / C where C > 1),   l_i = 1 + r \, clamp(s_i / \max(o_i, \epsilon), 0, \alpha)

    s_i and o_i count the entries of the tensor that branch i changed together with others, and alone.

    Args:
        branches: x_i.
        base: x_0.
        r: strength, finite.
        alpha: the most of the ratio that counts, >= 0.
        epsilon: change that counts as none, >= 0.
    Raises:
        ValueError: a number is out of range.
    Example:
        >>> ramplus_tl(torch.tensor([[1., 1., 0.], [0., 3., 0.]]), torch.zeros(3))
        tensor([1.0200, 2.0000, 0.0000])

    Differs from the reference: the paper counts over the whole model, this, as MergeKit, over each tensor.
    """
    stack = WholeStack(branches, base)
    return stack.apply(ramplus_tl_streamed(stack, r=r, alpha=alpha, epsilon=epsilon))


@streams("ramplus_tl")
def ramplus_tl_streamed(stack: Stack, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Blockwise:
    if not math.isfinite(r):
        raise ValueError(f"r: got {r}, wanted a finite number")
    _not_negative("alpha", alpha)
    _not_negative("epsilon", epsilon)
    counts = changed_entries(stack, epsilon)
    shared, own = counts if counts is not None else _changed_entries(stack, epsilon)
    ratios = [s / max(o, epsilon) if max(o, epsilon) > 0 else math.inf if s else 0.0 for s, o in zip(shared, own, strict=True)]
    return Shared(epsilon, tuple(1 + r * min(max(p, 0.0), alpha) for p in ratios))


def _changed_entries(stack: Stack, epsilon: float) -> tuple[list[int], list[int]]:
    """For each branch how many entries it changed together with others, and alone."""
    shared, own = [0] * stack.k, [0] * stack.k
    for block in stack:
        assert block.base is not None
        changed = (block.branches - block.base).abs_() > epsilon
        several = changed.sum(0) > 1
        for i, mask in enumerate(changed):
            together = int((mask & several).sum())
            shared[i] += together
            own[i] += int(mask.sum()) - together
    return shared, own


@dataclass(frozen=True)
class Shared:
    """ram of a block: `own[i]` scales the entries that branch i alone changed."""

    epsilon: float
    own: tuple[float, ...]

    def fused(self, start: int, x: np.ndarray, base: np.ndarray, out: np.ndarray) -> bool:
        """The same on numbers as they are stored (see rank_kernels), rounded into `out`; False where one is not finite."""
        from anabranch.merge import rank_kernels

        return rank_kernels.share(x, base, np.float32(self.epsilon), np.array(self.own, np.float32), out)

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        assert block.base is not None
        deltas = block.branches - block.base
        changed = ~(deltas.abs() <= self.epsilon)  # a NaN counts as changed, and shows
        count = changed.sum(0)
        step = torch.zeros_like(block.base)
        for delta, mask, factor in zip(deltas, changed, self.own, strict=True):
            if factor != 1:
                delta = torch.where(count == 1, delta * factor, delta)
            step += delta.masked_fill(~mask, 0.0)
        return step.div_(count.clamp_(min=1)).add_(block.base)


@merge_method("nearswap", needs_base=True, branches=(1, 1), reference="MergeKit, nearswap (no paper)")
def nearswap(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
    *,
    t: float,
) -> Float[Tensor, " *shape"]:
    r"""The branch where it is near the base, and a step of about t towards it elsewhere.

    \theta = x_0 + q (x_1 - x_0),   q = clamp(t / \max(|x_0 - x_1|, 10^{-6}), 0, 1);   x_1 itself where q = 1

    Args:
        branches: x_1.
        base: x_0.
        t: distance, finite; 0 or less gives the base.
    Raises:
        ValueError: more than one branch, or t is not finite.
    Example:
        >>> nearswap(torch.tensor([[1., 2., 5.]]), torch.tensor([1., 1.9, 4.]), t=0.1)
        tensor([1.0000, 2.0000, 4.1000])

    Differs from the reference: computes x_0 + q (x_1 - x_0) where MergeKit computes q x_1 + (1 - q) x_0.
    """
    stack = WholeStack(branches, base)
    return stack.apply(nearswap_streamed(stack, t=t))


@streams("nearswap")
def nearswap_streamed(stack: Stack, *, t: float) -> Blockwise:
    if stack.k != 1:
        raise ValueError(f"branches: nearswap takes one and the base, got {stack.k}")
    if not math.isfinite(t):
        raise ValueError(f"t: got {t}, wanted a finite number")
    return Near(t)


@dataclass(frozen=True)
class Near:
    """nearswap of a block."""

    t: float

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        assert block.base is not None
        branch = block.branches[0]
        step = branch - block.base
        q = self.t / step.abs().clamp_(min=NEARSWAP_DISTANCE)
        return torch.where(q >= 1, branch, step.mul_(q.clamp_(0, 1)).add_(block.base))


@merge_method("arcee_fusion", needs_base=True, branches=(1, 1), block="row", reference="MergeKit, arcee_fusion (no paper)")
def arcee_fusion(
    branches: Float[Tensor, " k *shape"],
    base: Float[Tensor, " *shape"],
) -> Float[Tensor, " *shape"]:
    r"""The branch on its most important entries, the base elsewhere.

    I = |x_1 - x_0| KL,   KL = \sum_n P \log(P / Q),   P, Q = softmax(x_1), softmax(x_0) along the row, plus 10^{-8}
    \theta = x_1 where I >= median(I) + 1.5 (q_{75}(I) - q_{25}(I)), else x_0

    Rows are the last dimension; quantiles are over all N entries, the entry of place floor(q (N - 1)) in ascending
    order, without interpolation. Where all I are equal (say 0) the branch is taken everywhere.

    Args:
        branches: x_1.
        base: x_0.
    Raises:
        ValueError: more than one branch; a NaN among the inputs.
    Example:
        >>> arcee_fusion(torch.tensor([[1., 2., 3., 9.]]), torch.tensor([1., 2., 3., 4.]))
        tensor([1., 2., 3., 9.])

    Differs from the reference: MergeKit samples a million entries of larger tensors at random, here quantiles are exact;
    x_1 is copied where MergeKit computes x_0 + (x_1 - x_0).
    """
    stack = WholeStack(branches, base, kind="row")
    return stack.apply(arcee_fusion_streamed(stack))


@streams("arcee_fusion")
def arcee_fusion_streamed(stack: Stack) -> Blockwise:
    if stack.k != 1:
        raise ValueError(f"branches: arcee_fusion takes one and the base, got {stack.k}")
    n = stack.numel
    if n == 0:
        return Important(0.0)
    places = [(n - 1) // 4, (n - 1) // 2, 3 * (n - 1) // 4]
    quick = importance_quantiles(stack, places, _divergence)
    values, divergences = quick if quick is not None else (_order_statistics(stack, places), None)
    low, median, high = map(torch.tensor, values)
    # float32, as the importances are: 1.5 (high - low) in float64 could miss an entry that equals the threshold.
    return Important(float(median + ARCEE_REACH * (high - low)), divergences, (stack.shape or (1,))[-1])


def _order_statistics(stack: Stack, places: list[int]) -> list[float]:
    """The importances at `places` of their ascending order. Rounding leaves some below 0: they are ranked apart."""
    def sides(block: Block) -> Tensor:
        i = _importance(block)
        # Adding 0 turns the -0.0 that a clamp may leave into 0.0, whose bits are in order.
        return torch.stack([i.clamp(min=0).add_(0.0), (-i).clamp_(min=0).add_(0.0)])

    negative, least = 0, math.inf
    for block in stack:
        i = _importance(block)
        if bool(i.isnan().any()):
            raise ValueError(NAN)
        negative, least = negative + int((i < 0).sum()), min(least, float(i.min()))
    up, down = largest(stack, sides, [[stack.numel - place for place in places], [place + 1 for place in places]])
    return [least if place == 0 else -d.value if place < negative else u.value
            for place, u, d in zip(places, up, down, strict=True)]


def _divergence(block: Block) -> Float[Tensor, "*n 1"]:
    """KL of every row."""
    assert block.base is not None
    p = torch.softmax(block.branches[0], -1).add_(ARCEE_PROBABILITY)
    q = torch.softmax(block.base, -1).add_(ARCEE_PROBABILITY)
    return torch.div(p, q, out=q).log_().mul_(p).sum(-1, keepdim=True)


def _importance(block: Block) -> Float[Tensor, "*n"]:
    assert block.base is not None
    return (block.branches[0] - block.base).abs_().mul_(_divergence(block))


@dataclass(frozen=True)
class Important:
    """arcee_fusion of a block, with its threshold known; and perhaps the divergences of all rows, of `columns` entries."""

    threshold: float
    divergences: np.ndarray | None = None
    columns: int = 1

    @property
    def fused(self) -> Callable[..., bool] | None:
        """The same on numbers as they are stored (see rank_kernels): (start, x, base, out) -> whether all are finite."""
        return None if self.divergences is None else self._fused

    def _fused(self, start: int, x: np.ndarray, base: np.ndarray, out: np.ndarray) -> bool:
        from anabranch.merge import rank_kernels

        assert self.divergences is not None
        first = start // self.columns
        rows = self.divergences[first : first + x.shape[1] // self.columns]
        return rank_kernels.take_important(x[0], base, rows, np.float32(self.threshold), out)

    def __call__(self, block: Block) -> Float[Tensor, "*n"]:
        assert block.base is not None
        return torch.where(_importance(block) >= self.threshold, block.branches[0], block.base)


def _not_negative(name: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{name}: got {value}, wanted a number >= 0")
    return value
