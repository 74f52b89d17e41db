"""Tokenised rows of a unit, and the file that holds them.

    n   rows of a split          N   tokens of all rows, end to end

A unit's safetensors file has, for each split s in (train, held_out):
    s.input_ids  int32 [N]       s.response  uint8 [N], 1 where the loss is taken       s.offsets  int64 [n+1]
Rows of images will bring further tensors with the same prefix.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from anabranch.artifacts import write_atomically
from anabranch.errors import CorruptedError


@dataclass(frozen=True)
class Rows:
    """Rows of one split. `response[i]` tells whether token i (as a target) counts in the loss."""

    input_ids: np.ndarray
    response: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: list[tuple[list[int], list[int]]]) -> Rows:
        """From (input_ids, response mask) pairs of equal length."""
        lengths = [len(ids) for ids, _ in rows]
        return cls(
            np.array([t for ids, _ in rows for t in ids], dtype=np.int32),
            np.array([m for _, mask in rows for m in mask], dtype=np.uint8),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> np.ndarray:
        """Response tokens of each row, int64 [n]."""
        total = np.concatenate([[0], np.cumsum(self.response, dtype=np.int64)])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def take(self, chosen: np.ndarray) -> Rows:
        """The rows with these numbers, in their order."""
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        where = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][chosen] - offsets[:-1], lengths)
        return Rows(self.input_ids[where], self.response[where], offsets)

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """All rows of several, one after the other."""
        lengths = np.concatenate([np.zeros(0, np.int64), *(p.lengths for p in parts)])
        return cls(np.concatenate([np.zeros(0, np.int32), *(p.input_ids for p in parts)]),
                   np.concatenate([np.zeros(0, np.uint8), *(p.response for p in parts)]),
                   np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32, response uint8) of row i."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.input_ids[span], self.response[span]


def save_unit(path: Path, train: Rows, held_out: Rows) -> str:
    """Write both splits; returns the SHA-256 of the file. Same rows, same bytes."""
    tensors = {
        f"{split}.{name}": np.ascontiguousarray(getattr(rows, name))
        for split, rows in (("train", train), ("held_out", held_out))
        for name in ("input_ids", "response", "offsets")
    }
    data = save(tensors)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def load_unit(path: Path, split: str) -> Rows:
    """One split ('train' or 'held_out') of a unit's file. Raises CorruptedError."""
    try:
        tensors = load_file(path)
        return _checked(Rows(tensors[f"{split}.input_ids"], tensors[f"{split}.response"], tensors[f"{split}.offsets"]))
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise CorruptedError(f"{path}: unreadable unit file ({error}). Delete it and run again.") from error


def _checked(rows: Rows) -> Rows:
    """Rows as `save_unit` writes them: a file may have been made elsewhere. Raises ValueError."""
    wanted = {"input_ids": np.int32, "response": np.uint8, "offsets": np.int64}
    for name, dtype in wanted.items():
        values = getattr(rows, name)
        if values.dtype != dtype or values.ndim != 1:
            raise ValueError(f"{name} is {values.dtype} {list(values.shape)}, wanted {np.dtype(dtype)} in one dimension")
    offsets, ids = rows.offsets, rows.input_ids
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(ids) or len(rows.response) != len(ids):
        raise ValueError(f"offsets do not span the {len(ids):,} tokens and {len(rows.response):,} marks")
    if (offsets[1:] < offsets[:-1]).any() or (len(ids) and int(ids.min()) < 0):
        raise ValueError("offsets that go back, or a negative token")
    return rows


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream that depends on the seed and on names only, never on order or process."""
    key = hashlib.sha256("\0".join(map(str, (seed, *names))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64)))


def budget_indices(rows: int, epochs: float, seed: int, unit: str) -> np.ndarray:
    """Row numbers of one budget: whole passes, then a seeded draw for the fraction. int64 [round(rows * epochs)]."""
    whole, total = int(epochs), round(rows * epochs)
    rest = generator(seed, "budget", unit).permutation(rows)[: total - whole * rows]
    return np.concatenate([np.tile(np.arange(rows), whole), np.sort(rest)]).astype(np.int64)
