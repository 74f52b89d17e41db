"""The exact k-th largest entry of a tensor that is read block by block.

The bits of a float32 >= 0, read as an integer, are in the order of the numbers. Two passes count them: the upper 16 bits
first, then the lower 16 of those entries whose upper bits hold the place that is looked for. Memory is half a megabyte
per cut, whatever the size of the tensor; the result is exact, so it cannot depend on blocks, threads or sampling. Where
several entries equal the last one kept, those with the lower flat index are kept (a third pass finds where that ends).

A stack may rank the magnitudes of its task vectors in a faster way of its own, to the same result:
`rank_magnitudes(counts) -> [[(bits, kept, there), ..], ..]` as `_exact` gives it, and `nth_equal([(row, bits, n), ..])
-> [index, ..]`; None where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from anabranch.merge.stack import Block, Stack

UPPER, LOWER = 1 << 15, 1 << 16

NAN = ("a NaN among the numbers by which entries are ranked: an input holds a NaN or an infinity, or differences so large "
       "(about 1e19) that float32 cannot hold their squares. Find which input has them, and make or fetch that one again")


@dataclass(frozen=True)
class Cut:
    """Keeps what is larger than `value`, and what equals it up to flat index `last`.

    `value` is a float32 number; -inf keeps all and +inf nothing.
    """

    value: float
    last: int = -1


def magnitudes(block: Block) -> Float[Tensor, " k *n"]:
    """|branch - base|."""
    assert block.base is not None
    return (block.branches - block.base).abs_()


def above(values: Float[Tensor, "*n"], cut: Cut, start: int) -> Bool[Tensor, "*n"]:
    """Which of `values`, the first of which has flat index `start` in its tensor, are kept by `cut`."""
    kept = values > cut.value
    if cut.last >= start:
        index = torch.arange(start, start + values.numel(), device=values.device).reshape(values.shape)
        kept |= (values == cut.value) & (index <= cut.last)
    return kept


def largest(
    stack: Stack, of: Callable[[Block], Float[Tensor, " m *n"]], counts: Sequence[Sequence[int]]
) -> list[list[Cut]]:
    """For each of m rows of numbers >= 0 and each count asked of it, the cut that keeps exactly that many of the largest.

    Args:
        of: the rows of one block; the flat index of an entry is the block's start plus its place in the row.
        counts: for each row the counts wanted; 0 keeps none, the number of entries (or more) keeps all.
    Raises:
        ValueError: a NaN among the numbers: it has no place in an order. Among `magnitudes` it ranks above infinity, and
            is left to show in the result.
    """
    total = stack.numel
    open_counts = [sorted({c for c in row if 0 < c < total}) for row in counts]
    found: list[dict[int, Cut]] = [{} for _ in counts]
    if any(open_counts):
        ranks = getattr(stack, "rank_magnitudes", None) if of is magnitudes else None
        exact = ranks(open_counts) if ranks is not None else None
        if exact is None:
            counted = _histogram(stack, of, len(counts))
            places = [[place(counted[row], count) for count in wanted] for row, wanted in enumerate(open_counts)]
            exact = _exact(stack, of, places)
        found = _with_last(stack, of, [dict(zip(wanted, cuts, strict=True))
                                       for wanted, cuts in zip(open_counts, exact, strict=True)])
    none, everything = Cut(float("inf")), Cut(float("-inf"))
    return [[none if c <= 0 else everything if c >= total else found[row][c] for c in wanted]
            for row, wanted in enumerate(counts)]


def _bits(values: Tensor) -> Tensor:
    """[m, n] int32, in the order of the numbers. -0.0 cannot occur: they are absolute values or squares."""
    return values.reshape(values.shape[0], -1).contiguous().view(torch.int32)


def _histogram(stack: Stack, of: Callable[[Block], Tensor], m: int) -> Int64[Tensor, "m upper"]:
    counted = torch.zeros(m * UPPER, dtype=torch.int64)
    for block in stack:
        upper = _bits(of(block)) >> 16
        upper += torch.arange(m, dtype=torch.int32, device=upper.device)[:, None] * UPPER
        counted += torch.bincount(upper.reshape(-1), minlength=m * UPPER).cpu()
    table = counted.reshape(m, UPPER)
    if of is not magnitudes and int(table[:, 0x7F80 + 1:].sum()):
        raise ValueError(NAN)
    return table


def place(counted: Tensor, count: int) -> tuple[int, int]:
    """(bucket that holds the count-th largest of the numbers counted, how many of that bucket are to be kept)."""
    from_top = counted.flip(0).cumsum(0)
    bucket = int(torch.searchsorted(from_top, count))
    above_it = int(from_top[bucket - 1]) if bucket else 0
    return counted.numel() - 1 - bucket, count - above_it


def _exact(stack: Stack, of: Callable[[Block], Tensor],
           places: list[list[tuple[int, int]]]) -> list[list[tuple[int, int, int]]]:
    """For each place (bits of the cut, equal entries to keep, equal entries there are)."""
    tables = {(row, bucket): torch.zeros(LOWER, dtype=torch.int64) for row, p in enumerate(places) for bucket, _ in p}
    for block in stack:
        bits = _bits(of(block))
        for (row, bucket), table in tables.items():
            inside = bits[row][(bits[row] >> 16) == bucket]
            table += torch.bincount(inside & (LOWER - 1), minlength=LOWER).cpu()
    out = []
    for row, wanted in enumerate(places):
        cuts = []
        for bucket, keep in wanted:
            lower, rest = place(tables[row, bucket], keep)
            cuts.append(((bucket << 16) | lower, rest, int(tables[row, bucket][lower])))
        out.append(cuts)
    return out


def _with_last(stack: Stack, of: Callable[[Block], Tensor],
               exact: list[dict[int, tuple[int, int, int]]]) -> list[dict[int, Cut]]:
    """The cuts, with the index up to which equal entries are kept; a pass is made only where they are not all kept."""
    left = {(row, count): keep for row, cuts in enumerate(exact) for count, (_, keep, there) in cuts.items() if keep < there}
    last: dict[tuple[int, int], int] = {}
    quick = getattr(stack, "nth_equal", None) if of is magnitudes and left else None
    if quick is not None:
        keys = list(left)
        indices = quick([(row, exact[row][count][0], left[row, count]) for row, count in keys])
        if indices is not None:
            last, left = dict(zip(keys, indices, strict=True)), {}
    if left:
        for block in stack:
            bits = _bits(of(block))
            for key in [key for key in left if key not in last]:
                row, count = key
                equal = torch.nonzero(bits[row] == exact[row][count][0])[:, 0]
                if len(equal) >= left[key]:
                    last[key] = block.start + int(equal[left[key] - 1])
                left[key] -= len(equal)
    end = stack.numel
    return [{count: Cut(_number(bits), last.get((row, count), end)) for count, (bits, _, _) in cuts.items()}
            for row, cuts in enumerate(exact)]


def _number(bits: int) -> float:
    """Of a NaN's bits: infinity."""
    return float(torch.tensor(min(bits, 0x7F800000), dtype=torch.int32).view(torch.float32))
