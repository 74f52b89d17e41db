"""The two commonest merges and the ranking of task vectors, fused: one pass over bytes that are in the cache.

    x       [k, n] the branches as stored: uint16 (bfloat16) or float32          base [n] likewise
    out     [n] uint16 (bfloat16) or float32
    TILE    numbers that are worked on at a time; their float32 copies stay in the first-level cache

Modules combination, consensus and select are the definition, operation by operation; a test holds these
kernels to them bit for bit. Each returns whether all numbers of its result are finite: where they are not, the caller
runs the definition, which says what is wrong.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TILE = 1024
FLAGS = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}


@njit(**FLAGS)
def _widen(source, into):
    """All of `source` as float32, to the beginning of `into`."""
    if source.itemsize == 2:
        bits = into.view(np.uint32)
        for j in range(source.size):
            bits[j] = np.uint32(np.uint32(source[j]) << np.uint32(16))
    else:
        for j in range(source.size):
            into[j] = source[j]


@njit(**FLAGS)
def _narrow(tile, out):
    """Round to nearest, ties to even. True if all are finite."""
    bits = tile.view(np.uint32)
    worst = np.uint32(0)
    if out.itemsize == 2:
        for j in range(out.size):
            b = bits[j]
            r = np.uint32(b + np.uint32(np.uint32(0x7FFF) + np.uint32(np.uint32(b >> np.uint32(16)) & np.uint32(1))))
            worst = max(worst, max(np.uint32(b & np.uint32(0x7FFFFFFF)), np.uint32(r & np.uint32(0x7FFF0000))))
            out[j] = np.uint16(r >> np.uint32(16))
    else:
        for j in range(out.size):
            worst = max(worst, np.uint32(bits[j] & np.uint32(0x7FFFFFFF)))
            out[j] = tile[j]
    return worst < np.uint32(0x7F800000)


@njit(**FLAGS)
def combine_with_base(x, base, coefficients, base_coefficient, out):
    """sum_i c_i x_i + c_0 x_0; terms of coefficient 0 are left out."""
    k, n = x.shape
    wide, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    finite = True
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        begun = False
        for i in range(k + 1):
            c = coefficients[i] if i < k else base_coefficient
            if c == 0:
                continue
            _widen(x[i, start : start + count] if i < k else base[start : start + count], wide)
            if begun:
                for j in range(count):
                    total[j] += wide[j] * c
            else:
                for j in range(count):
                    total[j] = wide[j] * c
                begun = True
        if not begun:
            total[:] = 0
        finite &= _narrow(total, out[start : start + count])
    return finite


def combine(x, coefficients, out):
    """sum_i c_i x_i; terms of coefficient 0 are left out."""
    return combine_with_base(x, x[0], coefficients, np.float32(0), out)


@njit(**FLAGS)
def combine_anchored(x, base, coefficients, out):
    """x_0 + sum_i c_i (x_i - x_0); terms of coefficient 0 are left out."""
    k, n = x.shape
    wide, zero, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    finite = True
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        begun = False
        for i in range(k):
            c = coefficients[i]
            if c == 0:
                continue
            _widen(x[i, start : start + count], wide)
            if begun:
                for j in range(count):
                    total[j] += (wide[j] - zero[j]) * c
            else:
                for j in range(count):
                    total[j] = (wide[j] - zero[j]) * c
                begun = True
        if begun:
            for j in range(count):
                total[j] = total[j] + zero[j]
            finite &= _narrow(total, out[start : start + count])
        else:
            finite &= _narrow(zero, out[start : start + count])
    return finite


@njit(**FLAGS)
def consent(x, base, cuts, lasts, ceilings, ceiling_lasts, factors, weights, elect, normalize, multiplier, first, out):
    """`Consensus`: task vectors cut, scaled, weighted, and merged with (`elect`) or without an election of signs.

    cuts, ceilings [k] float32 (-inf keeps all, +inf none); lasts [k]: flat index up to which equal entries count;
    multiplier: what the sum is multiplied by at the end; first: flat index of entry 0 in the tensor.
    """
    k, n = x.shape
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    total, divisor = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    steps = np.empty((k, TILE), np.float32)
    none, infinity = np.float32(0), np.float32(np.inf)
    finite = True
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        for i in range(k):
            _widen(x[i, start : start + count], wide)
            row, cut, ceiling, factor, weight = steps[i], cuts[i], ceilings[i], factors[i], weights[i]
            last, ceiling_last = lasts[i] - first - start, ceiling_lasts[i] - first - start
            if cut < 0 and ceiling == np.inf:
                for j in range(count):
                    row[j] = wide[j] - zero[j]
            elif last >= count and ceiling == np.inf:
                for j in range(count):
                    d = wide[j] - zero[j]
                    row[j] = none if abs(d) < cut else d
            elif last < 0 and ceiling == np.inf:
                for j in range(count):
                    d = wide[j] - zero[j]
                    row[j] = none if (abs(d) <= cut) & (abs(d) < infinity) else d
            else:
                for j in range(count):
                    d = wide[j] - zero[j]
                    size = abs(d)
                    kept = (size > cut) | ((size == cut) & (j <= last))
                    over = (size > ceiling) | ((size == ceiling) & (j <= ceiling_last))
                    row[j] = d if (kept & (not over)) | (not size < infinity) else none
            if factor != 1:
                for j in range(count):
                    row[j] = row[j] * factor
            for j in range(count):
                row[j] = row[j] * weight
        _merge_steps(steps, weights, elect, normalize, multiplier, wide, total, divisor, count)
        for j in range(count):
            total[j] = total[j] + zero[j]
        finite &= _narrow(total, out[start : start + count])
    return finite


@njit(**FLAGS)
def consent_drawn(x, base, keys, chances, factors, weights, elect, normalize, multiplier, first, out):
    """`Dropped`: entries kept where their draw is below chances[i], and scaled by factors[i]; then as `consent`."""
    k, n = x.shape
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    total, divisor = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    steps, drawn = np.empty((k, TILE), np.float32), np.empty(TILE, np.float32)
    none = np.float32(0)
    finite = True
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        for i in range(k):
            _widen(x[i, start : start + count], wide)
            _draw(first + start, keys[i, 0], keys[i, 1], drawn)
            row, chance, factor, weight = steps[i], chances[i], factors[i], weights[i]
            for j in range(count):
                row[j] = wide[j] - zero[j] if drawn[j] < chance else none
            if factor != 1:
                for j in range(count):
                    row[j] = row[j] * factor
            for j in range(count):
                row[j] = row[j] * weight
        _merge_steps(steps, weights, elect, normalize, multiplier, wide, total, divisor, count)
        for j in range(count):
            total[j] = total[j] + zero[j]
        finite &= _narrow(total, out[start : start + count])
    return finite


@njit(**FLAGS)
def _merge_steps(steps, weights, elect, normalize, multiplier, wide, total, divisor, count):
    """The weighted steps [k, TILE] into total[:count]: `Consensus.merged` without the base."""
    none = np.float32(0)
    for j in range(count):
        total[j] = steps[0, j]
    for i in range(1, steps.shape[0]):
        row = steps[i]
        for j in range(count):
            total[j] += row[j]
    if elect:
        for j in range(count):
            wide[j] = total[j]
            total[j] = wide[j] * none
            divisor[j] = none
        for i in range(steps.shape[0]):
            row, weight = steps[i], weights[i]
            for j in range(count):
                agrees = (row[j] > 0) if wide[j] >= 0 else (row[j] < 0)
                total[j] += row[j] if agrees else none
                divisor[j] += weight if agrees else none
        if normalize:
            for j in range(count):
                total[j] = total[j] / (divisor[j] if divisor[j] != 0 else np.float32(1))
    if multiplier != 1:
        for j in range(count):
            total[j] = total[j] * multiplier


@njit(**FLAGS)
def _mix(x):
    """lowbias32 of the engine's draws."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))


@njit(**FLAGS)
def _draw(first, one, other, into):
    """into.size draws in [0, 1) from flat index `first` on, which is a multiple of TILE."""
    low = np.uint32(first & 0xFFFFFFFF)
    key = np.uint32(other ^ np.uint32(np.uint32(first >> 32) * np.uint32(0x9E3779B9)))
    for j in range(into.size):
        mixed = _mix(np.uint32(_mix(np.uint32(np.uint32(low + np.uint32(j)) ^ one)) ^ key))
        into[j] = np.float32(np.int32(mixed >> np.uint32(8))) * np.float32(5.9604644775390625e-08)


@njit(**FLAGS)
def l1_sums(x, base, first, keys, chances, before, after):
    """Add to before[i] the sum of |x_i - x_0| and to after[i] that of the entries whose draw is below chances[i].

    In the order of `Total`: runs of TILE entries by halving in float32, the runs in float64.
    """
    k, n = x.shape
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    drawn, kept = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    none = np.float32(0)
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        for i in range(k):
            _widen(x[i, start : start + count], wide)
            _draw(first + start, keys[i, 0], keys[i, 1], drawn)
            chance = chances[i]
            for j in range(count):
                wide[j] = abs(wide[j] - zero[j])
                kept[j] = wide[j] if drawn[j] < chance else none
            for j in range(count, TILE):
                wide[j] = none
                kept[j] = none
            half = TILE // 2
            while half:
                for j in range(half):
                    wide[j] += wide[half + j]
                    kept[j] += kept[half + j]
                half //= 2
            before[i] += wide[0]
            after[i] += kept[0]


@njit(**FLAGS)
def count_upper(x, base, table):
    """Add to table[i, b] the number of entries of |x_i - x_0| whose upper 16 bits are b."""
    k, n = x.shape
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = wide.view(np.uint32)
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        for i in range(k):
            _widen(x[i, start : start + count], wide)
            for j in range(count):
                wide[j] = abs(wide[j] - zero[j])
            row = table[i]
            for j in range(count):
                row[bits[j] >> np.uint32(16)] += 1


@njit(**FLAGS)
def count_bracket(x, base, rows, low, above, tables):
    """For cut c, of branch rows[c]: add to above[c] the number of entries of |x_i - x_0| whose bits lie beyond tables[c],
    and to tables[c, b] that of entries with bits low[c] + b. `rows` must be sorted."""
    n = x.shape[1]
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = wide.view(np.uint32)
    width = np.uint32(tables.shape[1])
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        for c in range(len(rows)):
            if c == 0 or rows[c] != rows[c - 1]:
                _widen(x[rows[c], start : start + count], wide)
                for j in range(count):
                    wide[j] = abs(wide[j] - zero[j])
            first, row = np.uint32(low[c]), tables[c]
            last = np.uint32(first + width)
            beyond = np.int32(0)
            for j in range(count):
                beyond = np.int32(beyond + np.int32(bits[j] >= last))
            above[c] += beyond
            for j in range(count):
                place = np.uint32(bits[j] - first)
                if place < width:
                    row[place] += 1


@njit(**FLAGS)
def nth_equal(x, base, bits, n):
    """(index of the n-th entry of |x - x_0| with these bits, 0), or (-1, how many of n are still to come)."""
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    have = wide.view(np.uint32)
    sought = np.uint32(bits)
    for start in range(0, x.size, TILE):
        count = min(TILE, x.size - start)
        _widen(base[start : start + count], zero)
        _widen(x[start : start + count], wide)
        equal = 0
        for j in range(count):
            wide[j] = abs(wide[j] - zero[j])
            equal += have[j] == sought
        if equal >= n:
            for j in range(count):
                n -= have[j] == sought
                if n == 0:
                    return start + j, 0
        n -= equal
    return -1, n
