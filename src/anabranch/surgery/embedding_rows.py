"""Embedding matrices rebuilt for another vocabulary, any range of rows at a time.

    size   rows of the result, padding included        m   rows that are means        p   (input, row) pairs behind them

Every input's matrix gets one row per token of the result: its own row where it has the token, else the token's default
row (section 5.3 of the merge specification: the row of the only holder, of the base, or the mean of the holders).
A row map says where each row comes from, so that the rebuilt matrix never has to exist as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Kinds of row that are not a copy, in `RowMap.input`.
ZERO, MEAN, PADDING = -1, -2, -3
# Rows of one partial sum of a padding row: fixed, so that the sum does not depend on what was asked for.
CHUNK = 1024

# Rows `numbers` (int64 [r]) of an input's own matrix, float32 [r, width].
Read = Callable[[int, np.ndarray], Tensor]


@dataclass(frozen=True)
class RowMap:
    """Where each row of one input's rebuilt matrix comes from.

    input        int64 [size]: the input whose row it is, or ZERO, MEAN or PADDING
    row          int64 [size]: the row of that input's own matrix; for MEAN, the number of the mean; else 0
    mean_starts  int64 [m + 1]: mean i is taken over the pairs mean_starts[i] .. mean_starts[i + 1]
    mean_inputs, mean_rows   int64 [p]: those pairs, in the order of the inputs
    of           the input that is rebuilt
    """

    of: int
    input: np.ndarray
    row: np.ndarray
    mean_starts: np.ndarray
    mean_inputs: np.ndarray
    mean_rows: np.ndarray

    @property
    def size(self) -> int:
        return len(self.input)

    @cached_property
    def is_padded(self) -> bool:
        """Whether any row is the mean of all others, so that `padding_row` has something to do."""
        return bool((self.input == PADDING).any())

    @property
    def reads(self) -> list[int]:
        """The inputs whose matrices are read, ascending."""
        copied = self.input[self.input >= 0]
        used = self.mean_inputs if (self.input == MEAN).any() else copied[:0]
        return sorted({int(i) for i in np.unique(np.concatenate([copied, used, [self.of]]))})


@dataclass(frozen=True)
class RowMaps:
    """The row maps of the inputs of one tensor, by input.

    `owned` bool [size]: rows that are the same in all inputs, since all of them are made of the same rows of the same
    matrices. There is nothing to merge in them. All false for a single input.
    """

    maps: dict[int, RowMap]
    owned: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """What a recipe says about single tokens: `input` and `row` int64 [n] (or ZERO in `input`) for the tokens with the
    ids `token`, int64 [n] ascending."""

    token: np.ndarray
    input: np.ndarray
    row: np.ndarray


def row_maps(own: Mapping[int, np.ndarray], *, base: int | None, chosen: Chosen, forced: np.ndarray) -> RowMaps:
    """The row maps of these inputs.

    Args:
        own: for each input, in listing order, its own row for each token: int64 [size], -1 where it has none. Rows
            that are no token's have -1 in all inputs.
        base: the input whose row is the default where several inputs have the token; None: their mean is.
        chosen: default rows that stand firm.
        forced: bool [size]: tokens whose default row replaces every input's own.

    A token that no input has, and padding, become the mean of the other rows.
    """
    inputs = list(own)
    rows_of = np.stack([own[i] for i in inputs])
    has = rows_of >= 0
    holders = has.sum(0)
    first = has.argmax(0)
    default_input = np.where(holders == 0, PADDING, np.array(inputs, dtype=np.int64)[first])
    default_row = np.where(holders == 0, 0, np.take_along_axis(rows_of, first[None], 0)[0])
    if base is not None and base in own:
        from_base = (holders > 1) & (own[base] >= 0)
        default_input[from_base], default_row[from_base] = base, own[base][from_base]
        several = (holders > 1) & ~from_base
    else:
        several = holders > 1
    several[chosen.token] = False
    meant = np.flatnonzero(several)
    default_input[meant], default_row[meant] = MEAN, np.arange(len(meant))
    which, place = np.nonzero(has[:, meant].T)
    starts = np.concatenate([[0], np.cumsum(holders[meant])]).astype(np.int64)
    pairs = np.array(inputs, dtype=np.int64)[place], rows_of[place, meant[which]]
    default_input[chosen.token], default_row[chosen.token] = chosen.input, chosen.row

    maps = {}
    for i in inputs:
        keeps = (own[i] >= 0) & ~forced
        maps[i] = RowMap(i, np.where(keeps, i, default_input), np.where(keeps, own[i], default_row), starts, *pairs)
    return RowMaps(maps, _owned(list(maps.values())))


def _owned(maps: Sequence[RowMap]) -> np.ndarray:
    if len(maps) < 2:
        return np.zeros(maps[0].size, dtype=bool)
    same = maps[0].input != PADDING
    for other in maps[1:]:
        same &= (maps[0].input == other.input) & (maps[0].row == other.row)
    return same


def rows(row_map: RowMap, start: int, stop: int, read: Read, padding: Tensor | None = None) -> Tensor:
    """Rows `start` to `stop` (not included) of the rebuilt matrix, float32 [stop - start, width].

    Args:
        read: gives rows of an input's own matrix; it is called once for each input that is needed.
        padding: what `padding_row` gives; found here, at the cost of a pass over the matrix, where it is needed and
            not given.

    The result does not depend on how a matrix is cut into ranges.
    """
    source, row = row_map.input[start:stop], row_map.row[start:stop]
    used = np.unique(source[source >= 0])
    if len(used) == 1 and (source >= 0).all():
        return read(int(used[0]), row)
    out = read(row_map.of, row[:0]).new_zeros(len(source), *read(row_map.of, row[:0]).shape[1:])
    for number in used:
        places = np.flatnonzero(source == number)
        out[torch.from_numpy(places)] = read(int(number), row[places])
    meant = np.flatnonzero(source == MEAN)
    if len(meant):
        out[torch.from_numpy(meant)] = _means(row_map, row[meant], read)
    padded = np.flatnonzero(source == PADDING)
    if len(padded):
        out[torch.from_numpy(padded)] = padding_row(row_map, read) if padding is None else padding
    return out


def padding_row(row_map: RowMap, read: Read) -> Tensor:
    """The mean of all rebuilt rows that are not padding themselves, float32 [width].

    A float64 sum, row after row within chunks of CHUNK rows, chunk after chunk: the same for any threads and ranges.
    """
    real = int((row_map.input != PADDING).sum())
    nothing = read(row_map.of, row_map.row[:0])
    total = np.zeros(nothing.shape[1:], dtype=np.float64)
    for start in range(0, row_map.size, CHUNK):
        chunk = rows(row_map, start, min(start + CHUNK, row_map.size), read, nothing.new_zeros(nothing.shape[1:]))
        total += chunk.cpu().numpy().sum(axis=0, dtype=np.float64)
    return torch.from_numpy(np.asarray(total / max(real, 1), dtype=np.float32)).to(nothing.device)


def _means(row_map: RowMap, means: np.ndarray, read: Read) -> Tensor:
    """Means number `means`, float32 [len(means), width]: a float64 sum in the order of the inputs, rounded once."""
    starts = row_map.mean_starts[means]
    held = row_map.mean_starts[means + 1] - starts
    # Only the pairs of these means, whose number is that of the rows asked for: pair p belongs to means[of[p]].
    of = np.repeat(np.arange(len(means)), held)
    pairs = np.arange(len(of)) + np.repeat(starts - np.cumsum(held) + held, held)
    inputs, numbers = row_map.mean_inputs[pairs], row_map.mean_rows[pairs]
    total: Tensor | None = None
    for input_ in np.unique(inputs):
        mine = np.flatnonzero(inputs == input_)  # at most one pair of each mean
        values = read(int(input_), numbers[mine]).double()
        if total is None:
            total = values.new_zeros(len(means), *values.shape[1:])
        total[torch.from_numpy(of[mine])] += values
    assert total is not None
    counts = torch.from_numpy(held).to(total).reshape(-1, *[1] * (total.ndim - 1))
    return (total / counts).float()
