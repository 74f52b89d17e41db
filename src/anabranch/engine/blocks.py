"""One tensor of every input, read block by block into buffers that are used again and again.

    Reader         entries [start, stop) of one input's tensor, as float32
    TensorStack    the readers of one tensor of the result: what a method sees (anabranch.merge.stack.Stack)
    Buffers        the memory of one worker
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from anabranch.engine.checkpoint import ITEM_SIZES, Checkpoint
from anabranch.merge import BlockKind
from anabranch.merge.stack import CHUNK, Block

# Widened to float32 without loss. Integers and booleans are copied, and must be equal in all inputs.
MERGED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What the fused kernels read, as numpy spells it.
STORED: dict[str | None, np.dtype] = {"F32": np.dtype(np.float32), "BF16": np.dtype(np.uint16)}


class Buffers:
    """Memory by name, grown when more is wanted and given back only when asked."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[count] of `dtype`, with whatever stood there before."""
        size = count * dtype.itemsize
        if name not in self._held or self._held[name].numel() < size:
            self._held[name] = torch.empty(size, dtype=torch.uint8)
        return self._held[name][:size].view(dtype)

    def drop(self) -> None:
        """Give the memory back."""
        self._held.clear()


class Reader(Protocol):
    """Entries of one input's tensor. `hashed` is filled by the pass that asks for it."""

    def read(self, start: int, stop: int, into: Tensor) -> None:
        """Entries [start, stop) of the flattened tensor as float32 [stop - start]."""


@dataclass
class PlainReader:
    """A tensor as it stands in its file. `key` names it in the journal."""

    checkpoint: Checkpoint
    name: str
    buffers: Buffers
    place: str
    key: str | None = None
    hasher: Any = None
    hashed: int = 0

    def __post_init__(self) -> None:
        self.dtype = self.checkpoint.tensors[self.name].dtype

    def read(self, start: int, stop: int, into: Tensor) -> None:
        into.copy_(self.read_raw(start, stop).view(MERGED[self.dtype]))

    def read_raw(self, start: int, stop: int) -> Tensor:
        """The bytes of entries [start, stop), uint8."""
        raw = self.buffers.take(self.place, (stop - start) * ITEM_SIZES[self.dtype], torch.uint8)
        self.read_bytes(start, raw.numpy())
        return raw

    def read_bytes(self, start: int, into: np.ndarray) -> None:
        """As many bytes as `into` holds, from entry `start` on; hashed on the way where a hash is wanted."""
        self.checkpoint.read_bytes(self.name, start * ITEM_SIZES[self.dtype], into)
        if self.hasher is not None and start == self.hashed:  # what is read again is not hashed again
            self.hasher.update(into.data)
            self.hashed += into.nbytes // ITEM_SIZES[self.dtype]


@dataclass
class TensorStack:
    """One tensor of every input. Iterating reads it anew; `entries` bounds what a block holds."""

    shape: tuple[int, ...]
    branches: Sequence[Reader]
    base: Reader | None
    fisher: Sequence[Reader]
    kind: BlockKind
    entries: int
    buffers: Buffers
    draw: Uniform | None = None
    device: str = "cpu"
    fused: bool = False

    @property
    def k(self) -> int:
        return len(self.branches)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def has_base(self) -> bool:
        return self.base is not None

    def ranges(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of each block."""
        step = block_entries(self.shape, self.kind, self.entries)
        for start in range(0, self.numel, step):
            yield start, min(start + step, self.numel)

    def __iter__(self) -> Iterator[Block]:
        for start, stop in self.ranges():
            yield self.block(start, stop)

    def block(self, start: int, stop: int) -> Block:
        n = stop - start
        inner = ((n,) if self.kind == "entry" else (n // self.columns, self.columns) if self.kind == "row" else self.shape)
        base = None
        if self.base is not None:
            flat = self.buffers.take("base", n)
            self.base.read(start, stop, flat)
            base = flat.view(inner).to(self.device)
        draws = None
        if self.draw is not None:
            flat = self.buffers.take("draws", self.k * n)
            self.draw(start, stop, flat.view(self.k, n))
            draws = flat.view(self.k, *inner).to(self.device)
        return Block(start, self._read("branches", self.branches, start, stop, inner), base, draws,
                     self._read("fisher", self.fisher, start, stop, inner) if self.fisher else None)

    def _read(self, name: str, readers: Sequence[Reader], start: int, stop: int, inner: tuple[int, ...]) -> Tensor:
        rows = self.buffers.take(name, len(readers) * (stop - start)).view(len(readers), stop - start)
        for row, reader in zip(rows, readers, strict=True):
            reader.read(start, stop, row)
        return rows.view(len(readers), *inner).to(self.device)

    @property
    def columns(self) -> int:
        return (self.shape or (1,))[-1]

    @property
    def fusible(self) -> bool:
        """Whether all inputs stand in their files as numbers of one dtype that the fused kernels know."""
        readers = [*self.branches, *([self.base] if self.base is not None else [])]
        dtypes = {reader.dtype if isinstance(reader, PlainReader) else None for reader in readers}
        return self.fused and self.device == "cpu" and self.kind != "tensor" and len(dtypes) == 1 and dtypes <= STORED.keys()

    def stored(self, start: int, stop: int, only: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(branches [k, n], or `only` some of them, base [n] or [0]) as they stand in the files: uint16 for bfloat16, or
        float32."""
        chosen = self.branches if only is None else [self.branches[i] for i in only]
        readers = [reader for reader in chosen if isinstance(reader, PlainReader)]
        n, dtype = stop - start, STORED[readers[0].dtype]
        x = self.buffers.take("stored", len(readers) * n * dtype.itemsize, torch.uint8).numpy().view(dtype).reshape(-1, n)
        for row, reader in zip(x, readers, strict=True):
            reader.read_bytes(start, row)
        base = np.empty(0, dtype)
        if isinstance(self.base, PlainReader):
            base = self.buffers.take("stored-base", n * dtype.itemsize, torch.uint8).numpy().view(dtype)
            self.base.read_bytes(start, base)
        return x, base

    def l1_sums(self, densities: Sequence[float]) -> tuple[list[float], list[float]] | None:
        """For each branch the sum of |branch - base|, and of those entries whose draw is below its density, as `Total` adds
        them; None where the fused kernels cannot."""
        if not self.fusible or self.draw is None:
            return None
        from anabranch.merge import kernels

        before, after = np.zeros(self.k), np.zeros(self.k)
        chances = np.array(densities, np.float32)
        for start, stop in self.ranges():
            kernels.l1_sums(*self.stored(start, stop), start, self.draw.keys, chances, before, after)
        return before.tolist(), after.tolist()

    def rank_magnitudes(self, counts: Sequence[Sequence[int]]) -> list[list[tuple[int, int, int]]] | None:
        """For select.largest: for each branch and count (bits of the cut, equal entries to keep, equal entries there are).

        One pass over the tensor, and one over a sample of it that says in which few buckets of upper bits the cut will
        be. Where a cut is elsewhere, all buckets are counted. None where the fused kernels cannot.
        """
        from anabranch.merge.select import LOWER, place

        if not self.fusible:
            return None
        wanted = [(row, count) for row, of_row in enumerate(counts) for count in of_row]
        brackets = self._brackets(wanted)
        found = self._count(wanted, brackets)
        if any(not above < count <= above + int(table.sum())
               for (_, count), (above, table) in zip(wanted, found, strict=True)):
            table = self._upper(self.ranges())
            brackets = [(bucket, bucket) for row, count in wanted for bucket, _ in [place(torch.from_numpy(table[row]), count)]]
            found = self._count(wanted, brackets)
        out: list[list[tuple[int, int, int]]] = [[] for _ in counts]
        for (row, count), (low, _), (above, table) in zip(wanted, brackets, found, strict=True):
            offset, keep = place(torch.from_numpy(table), count - above)
            out[row].append((low * LOWER + offset, keep, int(table[offset])))
        return out

    def nth_equal(self, wanted: Sequence[tuple[int, int, int]]) -> list[int] | None:
        """For each (branch, bits, n) the flat index of the n-th entry whose magnitude has these bits; None where the fused
        kernels cannot. Reads no further than it must."""
        if not self.fusible:
            return None
        from anabranch.merge import kernels

        left = {key: key[2] for key in wanted}
        found: dict[tuple[int, int, int], int] = {}
        ranges = self.ranges()
        while left:
            start, stop = next(ranges)
            rows = sorted({row for row, _, _ in left})
            x, base = self.stored(start, stop, rows)
            for key in list(left):
                index, left[key] = kernels.nth_equal(x[rows.index(key[0])], base, key[1], left[key])
                if left[key] == 0:
                    found[key] = start + index
                    del left[key]
        return [found[key] for key in wanted]

    def _brackets(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(lowest, highest) bucket of upper bits in which each (branch, count) is to be looked for."""
        from anabranch.merge.select import place

        sample = list(range(0, self.numel - RUN, RUN * EVERY)) if self.numel > RUN * EVERY * 16 else []
        if not sample:
            table = torch.from_numpy(self._upper(self.ranges()))
            return [(bucket, bucket) for row, count in wanted for bucket, _ in [place(table[row], count)]]
        table = torch.from_numpy(self._upper((start, start + RUN) for start in sample))
        drawn = len(sample) * RUN
        brackets = []
        for row, count in wanted:
            share = count / self.numel
            margin = 6 * (drawn * share * (1 - share)) ** 0.5 + 16
            high, low = (place(table[row], int(min(max(share * drawn + step, 1), drawn)))[0] for step in (-margin, margin))
            brackets.append((low, min(high, low + MOST_BUCKETS - 1)))
        return brackets

    def _upper(self, ranges: Iterable[tuple[int, int]]) -> np.ndarray:
        """Histogram of the upper 16 bits of |branch - base|, int64 [k, 2^15]."""
        from anabranch.merge import kernels
        from anabranch.merge.select import UPPER

        table = np.zeros((self.k, UPPER), np.int64)
        for start, stop in ranges:
            kernels.count_upper(*self.stored(start, stop), table)
        return table

    def _count(self, wanted: Sequence[tuple[int, int]], brackets: Sequence[tuple[int, int]]) -> list[tuple[int, np.ndarray]]:
        """For each (branch, count): how many entries lie above its bracket, and a histogram of those in it."""
        from anabranch.merge import kernels
        from anabranch.merge.select import LOWER

        rows = np.array([row for row, _ in wanted])
        low = np.array([low for low, _ in brackets]) * LOWER
        above = np.zeros(len(wanted), np.int64)
        tables = np.zeros((len(wanted), (1 + max(high - low for low, high in brackets)) * LOWER), np.int64)
        for start, stop in self.ranges():
            kernels.count_bracket(*self.stored(start, stop), rows, low, above, tables)
        return list(zip(above.tolist(), tables, strict=True))


# A sample for ranking: runs of RUN entries, one of EVERY; and the most buckets of upper bits that a bracket spans.
RUN, EVERY, MOST_BUCKETS = 1 << 12, 32, 8


def block_entries(shape: tuple[int, ...], kind: BlockKind, entries: int) -> int:
    """Entries of a block: at most `entries` where the kind allows, whole chunks or whole rows."""
    if kind == "tensor":
        return max(1, prod(shape))
    if kind == "row":
        columns = (shape or (1,))[-1]
        return max(1, entries // max(1, columns)) * max(1, columns)
    return max(1, entries // CHUNK) * CHUNK


class Uniform:
    """Draws for every branch: entry i of branch k depends on (seed, keys[k], tensor, i) and on nothing else.

    A counter-based generator: the index and a key of 64 bits go through two rounds of the 32-bit mixer `lowbias32`, and the
    upper 24 bits become a multiple of 2^-24 in [0, 1). The fused kernels draw the same numbers.
    """

    def __init__(self, seed: int, keys: Sequence[str], tensor: str) -> None:
        names = ["\0".join((str(seed), key, tensor)) for key in keys]
        self.keys = np.frombuffer(b"".join(hashlib.sha256(n.encode()).digest()[:8] for n in names), "<u4").reshape(-1, 2)

    def __call__(self, start: int, stop: int, into: Tensor) -> None:
        out = into.numpy()
        for first in range(start, stop, CHUNK):
            index = np.arange(first, min(first + CHUNK, stop), dtype=np.uint64)
            low, high = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
            for row, (one, other) in enumerate(self.keys):
                mixed = _lowbias32(_lowbias32(low ^ one) ^ other ^ (high * np.uint32(0x9E3779B9)))
                place = out[row, first - start : first - start + len(index)]
                np.multiply(mixed >> np.uint32(8), np.float32(2.0**-24), out=place)


def _lowbias32(x: np.ndarray) -> np.ndarray:
    """A bijection of 32 bits in which each input bit flips each output bit about half the time (C. Wellons, 2018)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def begin_hash(dtype: str, shape: Sequence[int]) -> Any:
    """A 128-bit hash of a tensor, at the speed of memory. It holds dtype and shape already; the bytes come next.

    It tells accidents, not forgers: XXH3 is no cryptographic hash.
    """
    return xxhash.xxh3_128(f"{dtype} {list(shape)} ".encode())
