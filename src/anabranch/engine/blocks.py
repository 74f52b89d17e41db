"""One tensor of every input, read block by block into buffers that are used again and again.

    Reader         entries [start, stop) of one input's tensor, as float32
    TensorStack    the readers of one tensor of the result: what a method sees (anabranch.merge.stack.Stack)
    Buffers        the memory of one worker
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
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
STORED = {"F32": np.dtype(np.float32), "BF16": np.dtype(np.uint16)}


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
    draw: Callable[[int, int, Tensor], None] | None = None
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
        return (self.fused and self.device == "cpu" and self.kind == "entry"
                and all(isinstance(reader, PlainReader) for reader in readers)
                and len({reader.dtype for reader in readers}) == 1 and readers[0].dtype in STORED)

    def stored(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(branches [k, n], base [n] or [0]) as they stand in the files: uint16 for bfloat16, or float32."""
        n, dtype = stop - start, STORED[self.branches[0].dtype]
        x = self.buffers.take("stored", self.k * n * dtype.itemsize, torch.uint8).numpy().view(dtype).reshape(self.k, n)
        for row, reader in zip(x, self.branches, strict=True):
            reader.read_bytes(start, row)
        base = np.empty(0, dtype)
        if self.base is not None:
            base = self.buffers.take("stored-base", n * dtype.itemsize, torch.uint8).numpy().view(dtype)
            self.base.read_bytes(start, base)
        return x, base

    def count_upper(self) -> np.ndarray | None:
        """Histogram of the upper 16 bits of |branch - base|, int64 [k, 2^15]; None where the kernels cannot."""
        if not self.fusible:
            return None
        from anabranch.merge import kernels

        table = np.zeros((self.k, 1 << 15), np.int64)
        for start, stop in self.ranges():
            kernels.count_upper(*self.stored(start, stop), table)
        return table

    def count_lower(self, wanted: Sequence[tuple[int, int]]) -> np.ndarray | None:
        """Histograms of the lower 16 bits of |branch - base| among those of (branch, upper bits), int64 [.., 2^16]."""
        if not self.fusible:
            return None
        from anabranch.merge import kernels

        table = np.zeros((len(wanted), 1 << 16), np.int64)
        branches, buckets = (np.array(column, np.int64) for column in zip(*wanted, strict=True))
        for start, stop in self.ranges():
            kernels.count_lower(*self.stored(start, stop), branches, buckets, table)
        return table


def block_entries(shape: tuple[int, ...], kind: BlockKind, entries: int) -> int:
    """Entries of a block: at most `entries` where the kind allows, whole chunks or whole rows."""
    if kind == "tensor":
        return max(1, prod(shape))
    if kind == "row":
        columns = (shape or (1,))[-1]
        return max(1, entries // max(1, columns)) * max(1, columns)
    return max(1, entries // CHUNK) * CHUNK


def uniform(seed: int, keys: Sequence[str], tensor: str) -> Callable[[int, int, Tensor], None]:
    """Draws for every branch: entry i of branch k depends on (seed, keys[k], tensor, i) and on nothing else."""

    def draw(start: int, stop: int, into: Tensor) -> None:
        out = into.numpy()
        for row, key in enumerate(keys):
            for chunk in range(start // CHUNK, -(-stop // CHUNK)):
                first, last = max(start, chunk * CHUNK), min(stop, (chunk + 1) * CHUNK)
                numbers = _chunk(seed, key, tensor, chunk)[first - chunk * CHUNK : last - chunk * CHUNK]
                np.multiply(numbers, np.float32(2.0**-24), out=out[row, first - start : last - start])

    return draw


def _chunk(seed: int, key: str, tensor: str, chunk: int) -> np.ndarray:
    """CHUNK integers in [0, 2^24), uint32, from a generator of their own."""
    name = hashlib.sha256("\0".join((str(seed), key, tensor, str(chunk))).encode()).digest()
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(int.from_bytes(name[:16], "little"))))
    return generator.integers(0, 2**64, size=CHUNK // 2, dtype=np.uint64).view(np.uint32) >> np.uint32(8)


def new_hash() -> Any:
    """A 128-bit hash at the speed of memory. It tells accidents, not forgers: XXH3 is no cryptographic hash."""
    return xxhash.xxh3_128()
