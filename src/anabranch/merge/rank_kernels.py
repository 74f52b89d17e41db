"""The merges that rank or weigh entries, fused: della, sce, arcee_fusion and ram over bytes that are in the cache.

    x       [k, n] the branches as stored: uint16 (bfloat16) or float32          base [n] likewise
    out     [n] uint16 (bfloat16) or float32
    first   flat index of entry 0 in the tensor

As in `kernels`, modules sparsify, importance and select are the definition, operation by operation, and a test holds these
kernels to them bit for bit. Each that fills `out` returns whether all numbers there are finite: where they are not, the
caller runs the definition, which says what is wrong.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from anabranch.merge.kernels import FLAGS, TILE, _draw, _merge_steps, _narrow, _widen

# Buckets for ranking: powers of 2 below a row's largest magnitude that are told apart, and into how many parts (2^FINEST).
OCTAVES, FINEST = 16, 9


@njit(**FLAGS)
def _draw_row(first, one, other, into):
    """Draws from any flat index on: `_draw` must not cross a multiple of TILE."""
    start = 0
    while start < into.size:
        count = min(into.size - start, TILE - (first + start) % TILE)
        _draw(first + start, one, other, into[start : start + count])
        start += count


@njit(**FLAGS)
def _rank(bits, buckets, starts, ranked):
    """ranked: (bits << 32 | n - 1 - place) of every entry, ascending: of equal magnitudes the first of the row comes last.

    Entries are dealt into buckets by their upper bits, the more bits the more entries there are (what lies OCTAVES below the
    largest shares a bucket), and put in order within them: few have far to go. False where a magnitude is not finite.
    """
    n, top, fine = bits.size, np.uint32(0), 0
    for j in range(n):
        top = max(top, bits[j])
    if top >= np.uint32(0x7F800000):
        return False
    while fine < FINEST and n >> (fine + 5):
        fine += 1
    count, shift = OCTAVES << fine, np.uint32(23 - fine)
    lowest = np.int32(top >> shift) - np.int32(count - 1)
    for j in range(n):
        buckets[j] = np.uint32(max(np.int32(bits[j] >> shift) - lowest, np.int32(0)))
    starts[:count] = 0
    for j in range(n):
        starts[buckets[j]] += np.uint32(1)
    below = np.uint32(0)
    for b in range(count):
        here, starts[b] = starts[b], below
        below = np.uint32(below + here)
    for back in range(n):
        j = np.uint64(n - 1 - back)
        b = buckets[j]
        ranked[starts[b]] = (np.uint64(bits[j]) << np.uint64(32)) | np.uint64(back)
        starts[b] += np.uint32(1)
    _insert(ranked)
    return True


@njit(**FLAGS)
def _insert(ranked):
    """Sort what is nearly sorted; should it prove not to be, sort it anyhow."""
    highest, moves = ranked[0], 0
    for r in range(1, ranked.size):
        one, at = ranked[r], r
        if one >= highest:
            highest = one
            continue
        while at > 0 and ranked[at - 1] > one:
            ranked[at] = ranked[at - 1]
            at -= 1
        ranked[at] = one
        moves += r - at
        if moves > 32 * ranked.size:
            ranked.sort()
            return


@njit(**FLAGS)
def _chances(bits, p, buckets, starts, ranked, chance):
    """chance[j] = p[rank of bits[j]], as `sparsify.rank_probabilities` ranks. False where a magnitude is not finite."""
    n = bits.size
    if p[0] == p[n - 1]:
        chance[:] = p[0]
        return True
    if not _rank(bits, buckets, starts, ranked):
        return False
    for r in range(n):
        chance[np.uint64(n - 1) - (ranked[r] & np.uint64(0xFFFFFFFF))] = p[r]
    return True


@njit(**FLAGS)
def consent_ranked(x, base, keys, p, every, factors, weights, elect, normalize, multiplier, first, out):
    """`Dropped` with ranks: entries of rows of p.shape[1] kept where their draw is below p[i, rank], scaled by factors[i] or,
    where every[i], by 1 / their p; then as `consent`."""
    k, n = x.shape
    columns = p.shape[1]
    together = max(1, TILE // columns) * columns
    zero, wide, drawn = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    size, chance = np.empty(columns, np.float32), np.empty(columns, np.float32)
    bits, buckets = size.view(np.uint32), np.empty(columns, np.uint32)
    starts, ranked = np.empty(OCTAVES << FINEST, np.uint32), np.empty(columns, np.uint64)
    deltas, steps = np.empty((k, together), np.float32), np.empty((k, TILE), np.float32)
    total, divisor, tile = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    none, finite = np.float32(0), True
    for start in range(0, n, together):
        rows = min(together, n - start)
        for at in range(0, rows, columns):
            here = start + at
            _widen(base[here : here + columns], zero)
            for i in range(k):
                _widen(x[i, here : here + columns], wide)
                _draw_row(first + here, keys[i, 0], keys[i, 1], drawn)
                for j in range(columns):
                    wide[j] = wide[j] - zero[j]
                    size[j] = abs(wide[j])
                if not _chances(bits, p[i], buckets, starts, ranked, chance):
                    return False
                row = deltas[i, at : at + columns]
                if every[i]:
                    for j in range(columns):
                        row[j] = wide[j] / chance[j] if drawn[j] < chance[j] else none
                else:
                    for j in range(columns):
                        row[j] = wide[j] if drawn[j] < chance[j] else none
        for at in range(0, rows, TILE):
            count = min(TILE, rows - at)
            for i in range(k):
                row, step, factor, weight = deltas[i, at : at + count], steps[i], factors[i], weights[i]
                if factor != 1:
                    for j in range(count):
                        row[j] = row[j] * factor
                for j in range(count):
                    step[j] = row[j] * weight
            _merge_steps(steps, weights, elect, normalize, multiplier, tile, total, divisor, count)
            _widen(base[start + at : start + at + count], tile)
            for j in range(count):
                total[j] = total[j] + tile[j]
            finite &= _narrow(total, out[start + at : start + at + count])
    return finite


@njit(**FLAGS)
def consent_kept(x, base, kept, factors, weights, elect, normalize, multiplier, first, out):
    """`consent_ranked` without `every`, where `ranked_l1_sums` has told which entries are kept. `first`: a multiple of 8."""
    k, n = x.shape
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    total, divisor, steps = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty((k, TILE), np.float32)
    none, finite = np.float32(0), True
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        for i in range(k):
            step, factor, weight = steps[i], factors[i], weights[i]
            _widen(x[i, start : start + count], wide)
            bits = kept[i, (first + start) // 8 : (first + start + count) // 8]
            for b in range(bits.size):
                for j in range(8):
                    step[np.uint64(8 * b + j)] = np.float32(np.uint8(bits[b] >> np.uint8(j)) & np.uint8(1))
            for j in range(count):
                step[j] = wide[j] - zero[j] if step[j] != 0 else none
            if factor != 1:
                for j in range(count):
                    step[j] = step[j] * factor
            for j in range(count):
                step[j] = step[j] * weight
        _merge_steps(steps, weights, elect, normalize, multiplier, wide, total, divisor, count)
        for j in range(count):
            total[j] = total[j] + zero[j]
        finite &= _narrow(total, out[start : start + count])
    return finite


@njit(**FLAGS)
def _halved(run):
    """The sum of TILE numbers, which are overwritten, as `Total` adds them."""
    half = TILE // 2
    while half:
        lower, upper = run[:half], run[half : 2 * half]
        for j in range(half):
            lower[j] += upper[j]
        half //= 2
    return run[0]


@njit(**FLAGS)
def ranked_l1_sums(x, base, keys, p, first, sums, runs, kept):
    """Add to sums[0, i] the sum of |x_i - x_0|, and to sums[1, i] that of the entries that `consent_ranked` keeps.

    In the order of `Total`. A run need not end where a block does: runs [2, k, TILE] holds the one that is open, zeros after
    the tensor's last entry included, and must be zero at first. kept [k, bytes] uint8: a bit per entry, in the order of the
    entries, is set there for those that are kept, and rows must have a multiple of 8 entries; or it is empty. False where a
    number is not finite.
    """
    k, n = x.shape
    columns = p.shape[1]
    zero, wide, drawn = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    chance, buckets = np.empty(columns, np.float32), np.empty(columns, np.uint32)
    starts, ranked = np.empty(OCTAVES << FINEST, np.uint32), np.empty(columns, np.uint64)
    none, flags = np.float32(0), np.empty((columns + 7) // 8 * 8, np.uint8)
    for here in range(0, n, columns):
        _widen(base[here : here + columns], zero)
        for i in range(k):
            _widen(x[i, here : here + columns], wide)
            _draw_row(first + here, keys[i, 0], keys[i, 1], drawn)
            for j in range(columns):
                wide[j] = abs(wide[j] - zero[j])
            if not _chances(wide.view(np.uint32), p[i], buckets, starts, ranked, chance):
                return False
            if kept.size:
                packed = kept[i, (first + here) // 8 : (first + here + columns) // 8]
                for j in range(columns):
                    flags[j] = drawn[j] < chance[j]
                eights = flags.view(np.uint64)
                for b in range(packed.size):  # the product moves the lowest bit of byte j to bit 56 + j
                    packed[b] = np.uint8((eights[b] * np.uint64(0x0102040810204080)) >> np.uint64(56))
            before, after = runs[0, i], runs[1, i]
            done, filled = 0, (first + here) % TILE
            while done < columns:
                count = min(TILE - filled, columns - done)
                size, draw, own = wide[done : done + count], drawn[done : done + count], chance[done : done + count]
                into, kept_into = before[filled : filled + count], after[filled : filled + count]
                for j in range(count):
                    into[j] = size[j]
                    kept_into[j] = size[j] if draw[j] < own[j] else none
                done, filled = done + count, filled + count
                if filled == TILE:
                    sums[0, i] += _halved(before)
                    sums[1, i] += _halved(after)
                    before[:] = 0
                    after[:] = 0
                    filled = 0
    return True


@njit(**FLAGS)
def ended(runs):
    """What the runs [2, k, TILE] that were open at a tensor's end add to its sums."""
    sums = np.empty(runs.shape[:2])
    for part in range(runs.shape[0]):
        for i in range(runs.shape[1]):
            sums[part, i] = _halved(runs[part, i])
    return sums


@njit(**FLAGS)
def _variance(x, start, count, wide, mean, variance):
    """`importance._variance` of entries start .. start + count; wide [k, TILE] and mean are overwritten."""
    k, parts, one = x.shape[0], np.float32(x.shape[0]), wide[0]
    _widen(x[0, start : start + count], one)
    for j in range(count):
        mean[j] = one[j] - one[j]
    for i in range(1, k):
        row = wide[i]
        _widen(x[i, start : start + count], row)
        for j in range(count):
            row[j] = row[j] - one[j]
            mean[j] += row[j]
    for j in range(count):
        mean[j] = mean[j] / parts
        variance[j] = mean[j] * mean[j]  # the first: 0 - mean, squared
    for i in range(1, k):
        row = wide[i]
        for j in range(count):
            d = row[j] - mean[j]
            variance[j] += d * d
    for j in range(count):
        variance[j] = abs(variance[j] / parts)


@njit(**FLAGS)
def count_upper_variances(x, table):
    """Add to table[b] the number of entries whose variance has the upper 16 bits b. Returns how many are not 0, -1 where one
    is not finite."""
    n = x.shape[1]
    wide, mean, variance = np.empty((x.shape[0], TILE), np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = variance.view(np.uint32)
    varying, top = 0, np.uint32(0)
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _variance(x, start, count, wide, mean, variance)
        for j in range(count):
            varying += bits[j] != 0
            top = max(top, bits[j])
        for j in range(count):
            table[bits[j] >> np.uint32(16)] += 1
    return varying if top < np.uint32(0x7F800000) else -1


@njit(**FLAGS)
def count_variances(x, low, table):
    """Add to table[b] the number of entries whose variance has the bits low + b. Returns (how many are not 0, -1 where one is
    not finite; how many lie beyond the table)."""
    n = x.shape[1]
    wide, mean, variance = np.empty((x.shape[0], TILE), np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits = variance.view(np.uint32)
    first, width = np.uint32(low), np.uint32(table.size)
    varying, beyond, top = 0, 0, np.uint32(0)
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _variance(x, start, count, wide, mean, variance)
        for j in range(count):
            varying += bits[j] != 0
            beyond += bits[j] >= np.uint32(first + width)
            top = max(top, bits[j])
        for j in range(count):
            place = np.uint32(bits[j] - first)
            if place < width:
                table[place] += 1
    return (varying if top < np.uint32(0x7F800000) else -1), beyond


@njit(**FLAGS)
def _steps(x, base, start, count, ranked, cut, last, variance, tile, steps):
    """steps[i] = x_i - x_0 where the variance is above the cut or, up to place `last`, equal to it; 0 elsewhere."""
    none = np.float32(0)
    _widen(base[start : start + count], tile)
    for i in range(x.shape[0]):
        _widen(x[i, start : start + count], steps[i])
        step = steps[i]
        if not ranked:
            for j in range(count):
                step[j] = step[j] - tile[j]
        else:
            for j in range(count):
                kept = (variance[j] > cut) | ((variance[j] == cut) & (j <= last))
                step[j] = step[j] - tile[j] if kept else none


@njit(**FLAGS)
def selected_energies(x, base, ranked, cut, left, sums):
    """Add to sums[i] the squares of x_i - x_0, in the order of `Total`, where the variance is above the cut or, for the first
    `left` of those, equal to it. Returns (what is then left of `left`, place of the last of these or -1)."""
    k, n = x.shape
    wide, steps = np.empty((k, TILE), np.float32), np.empty((k, TILE), np.float32)
    mean, variance, tile, found = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), -1
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        last = -1
        if ranked:
            _variance(x, start, count, wide, mean, variance)
            equal = 0
            for j in range(count):
                equal += variance[j] == cut
            if equal and left:
                for j in range(count):
                    if left and variance[j] == cut:
                        last, left = j, left - 1
                found = start + last
        _steps(x, base, start, count, ranked, cut, last, variance, tile, steps)
        for i in range(k):
            step = steps[i]
            for j in range(count):
                step[j] = step[j] * step[j]
            step[count:] = 0
            sums[i] += _halved(step)
    return left, found


@njit(**FLAGS)
def elect_selected(x, base, ranked, cut, last, weights, out):
    """`importance.Elected`; last: place in this block up to which entries whose variance equals the cut are kept."""
    k, n = x.shape
    wide, steps = np.empty((k, TILE), np.float32), np.empty((k, TILE), np.float32)
    mean, variance, tile = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    total, divisor, way = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    none, least, finite = np.float32(0), np.float32(1e-6), True
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        if ranked:
            _variance(x, start, count, wide, mean, variance)
        _steps(x, base, start, count, ranked, cut, last - start, variance, tile, steps)
        for j in range(count):
            way[j] = steps[0, j]
            total[j] = none
            divisor[j] = none
        for i in range(1, k):
            step = steps[i]
            for j in range(count):
                way[j] += step[j]
        for i in range(k):
            step, weight = steps[i], weights[i]
            for j in range(count):
                agrees = (step[j] > 0) if way[j] >= 0 else (step[j] < 0)
                total[j] += step[j] * weight if agrees else none
                divisor[j] += weight if agrees else none
        for j in range(count):
            total[j] = total[j] / max(divisor[j], least) + tile[j]
        finite &= _narrow(total, out[start : start + count])
    return finite


@njit(**FLAGS)
def count_importances(x, base, divergence, lows, tables, shift):
    """Importance |x_1 - x_0| * divergence of its row, as an integer in the order of the numbers, without its last `shift` bits:
    add to tables[c, b] the number of entries where that is lows[c] + b. The integer is 2^31 plus the number's bits without the
    sign, or 2^31 minus those where it is negative. False where one is not finite."""
    columns, width, top = x.size // divergence.size, np.uint32(tables.shape[1]), np.uint32(0)
    wide, zero = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bits, small = wide.view(np.uint32), np.uint32(shift)
    for row in range(divergence.size):
        factor = divergence[row]
        for start in range(row * columns, row * columns + columns, TILE):
            count = min(TILE, row * columns + columns - start)
            _widen(x[start : start + count], wide)
            _widen(base[start : start + count], zero)
            for j in range(count):
                wide[j] = abs(wide[j] - zero[j]) * factor
            for j in range(count):
                size = np.uint32(bits[j] & np.uint32(0x7FFFFFFF))
                top = max(top, size)
                up, down = np.uint32(np.uint32(0x80000000) + size), np.uint32(np.uint32(0x80000000) - size)
                bits[j] = np.uint32((up if bits[j] == size else down) >> small)
            for c in range(len(lows)):
                table, low = tables[c], np.uint32(lows[c])
                for j in range(count):
                    place = np.uint32(bits[j] - low)
                    if place < width:
                        table[place] += 1
    return top < np.uint32(0x7F800000)


@njit(**FLAGS)
def take_important(x, base, divergence, threshold, out):
    """`importance.Important`, for rows whose divergences are known."""
    columns, finite = x.size // divergence.size, True
    wide, zero = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for row in range(divergence.size):
        factor = divergence[row]
        for start in range(row * columns, row * columns + columns, TILE):
            count = min(TILE, row * columns + columns - start)
            _widen(x[start : start + count], wide)
            _widen(base[start : start + count], zero)
            for j in range(count):
                wide[j] = wide[j] if abs(wide[j] - zero[j]) * factor >= threshold else zero[j]
            finite &= _narrow(wide, out[start : start + count])
    return finite


@njit(**FLAGS)
def share(x, base, epsilon, own, out):
    """`importance.Shared`."""
    k, n = x.shape
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    total, many, steps = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty((k, TILE), np.float32)
    none, one, finite = np.float32(0), np.float32(1), True
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        for j in range(count):
            total[j] = none
            many[j] = none
        for i in range(k):
            step = steps[i]
            _widen(x[i, start : start + count], wide)
            for j in range(count):
                d = wide[j] - zero[j]
                same = abs(d) <= epsilon
                step[j] = none if same else d
                many[j] += none if same else one
        for i in range(k):
            step, factor = steps[i], own[i]
            if factor != 1:
                for j in range(count):
                    step[j] = step[j] * factor if many[j] == one else step[j]
            for j in range(count):
                total[j] += step[j]
        for j in range(count):
            total[j] = total[j] / max(many[j], one) + zero[j]
        finite &= _narrow(total, out[start : start + count])
    return finite


@njit(**FLAGS)
def count_shared(x, base, epsilon, changed, alone):
    """Add to changed[i] the number of entries where |x_i - x_0| > epsilon, to alone[i] that of those where no other's is."""
    k, n = x.shape
    zero, wide = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    moved, many = np.empty((k, TILE), np.uint8), np.empty(TILE, np.int32)
    for start in range(0, n, TILE):
        count = min(TILE, n - start)
        _widen(base[start : start + count], zero)
        many[:] = 0
        for i in range(k):
            row, total = moved[i], 0
            _widen(x[i, start : start + count], wide)
            for j in range(count):
                row[j] = abs(wide[j] - zero[j]) > epsilon
                many[j] += row[j]
                total += row[j]
            changed[i] += total
        for i in range(k):
            row, total = moved[i], 0
            for j in range(count):
                total += row[j] & (many[j] == 1)
            alone[i] += total
