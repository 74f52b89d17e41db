"""What sce, arcee_fusion and ramplus_tl must know of a whole tensor, found by the fused kernels where they can.

Each function gives what its plain form in `importance` gives, or None where the stack's numbers are not stored as the kernels
know them or are not finite: then the plain form runs. A stack of the engine says so by `fusible`, and has `ranges()`,
`columns` and `stored(start, stop)`: the branches [k, n] and the base [n] as they stand in their files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.merge.select import LOWER, UPPER, Cut, place
from anabranch.merge.stack import Block

# A sample says where to look: runs of SAMPLE entries, one of EVERY; and the most buckets of upper bits that are looked through.
SAMPLE, EVERY, MOST_BUCKETS = 1 << 12, 32, 8
# Shorter rows are too many to keep a number for each.
FEWEST_COLUMNS = 64

Ranges = Iterable[tuple[int, int]]


def fusible(stack: Any) -> bool:
    """Whether the fused kernels can read a stack."""
    return getattr(stack, "fusible", False)


def variance_cut(stack: Any, share: float) -> tuple[Cut, int, int] | None:
    """(cut, keep, there): what is larger than the cut and `keep` of the `there` entries that equal it are the int(share * n)
    entries of largest variance over the branches, n those whose variance is not 0. The cut's `last` is not known yet.

    One pass, after one over a sample that says in which buckets of upper bits the cut will be. Where it is elsewhere, all
    buckets are counted.
    """
    if not fusible(stack):
        return None
    branches = replace(stack, base=None)
    runs = [(start, start + SAMPLE) for start in range(0, stack.numel - SAMPLE, SAMPLE * EVERY)]
    whole = len(runs) < 16
    table, varying = _upper_variances(branches, branches.ranges() if whole else runs)
    if varying < 0:
        return None
    wanted = int(varying * share) if whole else varying * share
    margin = 0.0 if whole else 6 * ((wanted * (1 - wanted / (len(runs) * SAMPLE))) ** 0.5 + share * varying**0.5) + 16
    bracket = _bracket(table, wanted, margin)
    for _ in range(2):
        counted, varying, above = _variances(branches, *bracket)
        wanted = int(varying * share)
        if varying < 0:
            return None
        if wanted <= 0:
            return Cut(float("inf")), 0, 0
        if above < wanted <= above + int(counted.sum()):
            offset, keep = place(counted, wanted - above)
            bits = np.uint32(bracket[0] * LOWER + offset)
            return Cut(float(bits.view(np.float32))), keep, int(counted[offset])
        table, varying = _upper_variances(branches, branches.ranges())
        bracket = _bracket(table, wanted, 0.0)
    raise AssertionError("a cut outside the bucket that was counted to hold it")


def _bracket(table: Tensor, wanted: float, margin: float) -> tuple[int, int]:
    """(lowest, highest) bucket in which to look for the `wanted`-th largest."""
    high, low = (place(table, int(min(max(wanted + step, 1), int(table.sum()))))[0] for step in (-margin, margin))
    return low, min(high, low + MOST_BUCKETS - 1)


def _upper_variances(branches: Any, ranges: Ranges) -> tuple[Tensor, int]:
    """(histogram of the upper 16 bits, how many are not 0 or -1 where one is not finite)."""
    from anabranch.merge import rank_kernels

    table, varying = np.zeros(UPPER, np.int64), 0
    for start, stop in ranges:
        more = rank_kernels.count_upper_variances(branches.stored(start, stop)[0], table)
        varying = -1 if more < 0 or varying < 0 else varying + more
    return torch.from_numpy(table), varying


def _variances(branches: Any, low: int, high: int) -> tuple[Tensor, int, int]:
    """(histogram of the bits in buckets low .. high, how many are not 0 or -1 where one is not finite, how many lie above)."""
    from anabranch.merge import rank_kernels

    table, varying, above = np.zeros((high - low + 1) * LOWER, np.int64), 0, 0
    for start, stop in branches.ranges():
        more, beyond = rank_kernels.count_variances(branches.stored(start, stop)[0], low * LOWER, table)
        varying, above = -1 if more < 0 or varying < 0 else varying + more, above + beyond
    return torch.from_numpy(table), varying, above


def selected_energies(stack: Any, cut: Cut | None, keep: int, there: int) -> tuple[Tensor, Cut | None]:
    """Sum over the selected entries of (x_i - x_0)^2, float64 [k], as `Total` adds them; and the cut with its `last`."""
    from anabranch.merge import rank_kernels

    sums, last, left = np.zeros(stack.k), -1, keep
    value = np.float32(cut.value if cut is not None else 0)
    for start, stop in stack.ranges():
        left, place_ = rank_kernels.selected_energies(*stack.stored(start, stop), cut is not None, value, left, sums)
        last = start + place_ if place_ >= 0 else last
    found = None if cut is None else Cut(cut.value, stack.numel if keep == there else last)
    return torch.from_numpy(sums), found


def importance_quantiles(stack: Any, places: Sequence[int], divergence: Callable[[Block], Tensor]
                         ) -> tuple[list[float], np.ndarray] | None:
    """(the importances |x_1 - x_0| * divergence of the row at `places` of their ascending order, the divergences [rows]).

    Two passes: the first finds the divergences, and counts the upper 16 bits of all importances; the second the lower 16 of
    those in the buckets that hold the places.
    """
    if not fusible(stack) or stack.columns < FEWEST_COLUMNS:
        return None
    from anabranch.merge import rank_kernels

    rows = np.empty(stack.numel // stack.columns, np.float32)
    upper = np.zeros((1, 2 * UPPER), np.int64)
    for block in stack:
        x, base = block.branches[0], block.base
        of_block = rows[block.start // stack.columns :][: len(x)]
        of_block[:] = divergence(block).reshape(-1).numpy()
        if not rank_kernels.count_importances(x.reshape(-1).numpy(), base.reshape(-1).numpy(), of_block, np.zeros(1, np.int64),
                                              upper, 16):
            return None
    below = upper[0].cumsum()
    buckets = np.searchsorted(below, places, side="right")
    lower = np.zeros((len(places), LOWER), np.int64)
    for start, stop in stack.ranges():
        x, base = stack.stored(start, stop)
        of_block = rows[start // stack.columns : stop // stack.columns]
        rank_kernels.count_importances(x[0], base, of_block, buckets * LOWER, lower, 0)
    values = []
    for at, bucket, table in zip(places, buckets.tolist(), lower, strict=True):
        offset = int(np.searchsorted(table.cumsum(), at - (int(below[bucket - 1]) if bucket else 0), side="right"))
        ordered = bucket * LOWER + offset - (1 << 31)
        size = float(np.uint32(abs(ordered)).view(np.float32))
        values.append(size if ordered >= 0 else -size)
    return values, rows


def changed_entries(stack: Any, epsilon: float) -> tuple[list[int], list[int]] | None:
    """For each branch how many entries it changed by more than epsilon together with others, and alone."""
    if not fusible(stack):
        return None
    from anabranch.merge import rank_kernels

    changed, alone = np.zeros(stack.k, np.int64), np.zeros(stack.k, np.int64)
    for start, stop in stack.ranges():
        rank_kernels.count_shared(*stack.stored(start, stop), np.float32(epsilon), changed, alone)
    return (changed - alone).tolist(), alone.tolist()
