"""Tokenised rows of a unit, and the file that holds them.

    n   rows of a split          N   tokens of all rows, end to end

A unit's safetensors file has, for each split s in (train, held_out):
    s.input_ids  int32 [N]       s.response  uint8 [N], 1 where the loss is taken       s.offsets  int64 [n+1]

A unit whose rows show images has beside it NAME.images.safetensors, for both splits:
    bytes        uint8 [B], encoded images (PNG, JPEG, ..) end to end, each once        offsets    int64 [k+1]
and in its own file
    image_sha256   uint8 [k, 32]     s.image_numbers  int32 [m], of the images that the rows show, row after row
                                     s.image_offsets  int64 [n+1], where a row's begin
so the hash of a unit's file stands for its images too. Tokens of images stand in input_ids already.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save

from anabranch.artifacts import write_atomically, write_streamed
from anabranch.errors import CorruptedError


class StoredImage(NamedTuple):
    """Image `number` of a unit's file of images."""

    file: Path
    number: int


@dataclass(frozen=True)
class RowImages:
    """Which images rows show: row i shows those from offsets[i] to offsets[i+1], in the order of their tokens.

    file     int32 [m]   index into `files`          numbers  int32 [m]   of the image in that file
    offsets  int64 [n+1]
    """

    files: tuple[Path, ...]
    file: np.ndarray
    numbers: np.ndarray
    offsets: np.ndarray

    @classmethod
    def none(cls, rows: int) -> RowImages:
        """For rows without images."""
        nothing = np.zeros(0, np.int32)
        return cls((), nothing, nothing, np.zeros(rows + 1, np.int64))

    def of(self, row: int) -> tuple[StoredImage, ...]:
        span = range(int(self.offsets[row]), int(self.offsets[row + 1]))
        return tuple(StoredImage(self.files[int(self.file[i])], int(self.numbers[i])) for i in span)

    def take(self, chosen: np.ndarray) -> RowImages:
        counts = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        where = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][chosen] - offsets[:-1], counts)
        return RowImages(self.files, self.file[where], self.numbers[where], offsets)

    @classmethod
    def joined(cls, parts: Sequence[RowImages]) -> RowImages:
        files = tuple(dict.fromkeys(file for part in parts for file in part.files))
        place = {file: i for i, file in enumerate(files)}
        renumbered = [np.array([place[f] for f in part.files], np.int32)[part.file] for part in parts if len(part.file)]
        counts = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.offsets) for part in parts)])
        return cls(files, np.concatenate([np.zeros(0, np.int32), *renumbered]),
                   np.concatenate([np.zeros(0, np.int32), *(part.numbers for part in parts)]),
                   np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


@dataclass(frozen=True)
class Rows:
    """Rows of one split. `response[i]` tells whether token i (as a target) counts in the loss. `images` is None where no row
    of the unit shows any."""

    input_ids: np.ndarray
    response: np.ndarray
    offsets: np.ndarray
    images: RowImages | None = None

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
        return Rows(self.input_ids[where], self.response[where], offsets, self.images.take(chosen) if self.images else None)

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """All rows of several, one after the other."""
        lengths = np.concatenate([np.zeros(0, np.int64), *(p.lengths for p in parts)])
        images = (RowImages.joined([p.images or RowImages.none(len(p)) for p in parts])
                  if any(p.images is not None for p in parts) else None)
        return cls(np.concatenate([np.zeros(0, np.int32), *(p.input_ids for p in parts)]),
                   np.concatenate([np.zeros(0, np.uint8), *(p.response for p in parts)]),
                   np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), images)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32, response uint8) of row i."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.input_ids[span], self.response[span]

    def content(self, i: int) -> bytes:
        """Tokens and images of row i: equal for rows that say and show the same."""
        return self.row(i)[0].tobytes() + self.pictures(i)

    def pictures(self, i: int) -> bytes:
        """SHA-256 of each image of row i, end to end."""
        shown = self.images.of(i) if self.images is not None else ()
        return b"".join(_image_hashes(image.file)[image.number].tobytes() for image in shown)

    def images_of(self, chosen: np.ndarray | Sequence[int]) -> list[tuple[StoredImage, ...]]:
        """The images of each of these rows, in the order of their tokens."""
        return [self.images.of(int(i)) if self.images is not None else () for i in chosen]

    def hash_of_images(self) -> bytes:
        """SHA-256 over the contents of all rows' images in their order; empty where no row can have any."""
        if self.images is None:
            return b""
        whole = hashlib.sha256()
        for i in range(len(self)):
            whole.update(b"|" + self.pictures(i))
        return whole.digest()


def images_file(unit_file: Path) -> Path:
    """Where the images of a unit's file lie."""
    return unit_file.with_name(unit_file.name.removesuffix(".safetensors") + ".images.safetensors")


def save_unit(path: Path, train: Rows, held_out: Rows, image_hashes: Sequence[bytes] = ()) -> str:
    """Write both splits; returns the SHA-256 of the file. Same rows, same bytes.

    Args:
        image_hashes: SHA-256 of every image in the file of images, in its order (`save_images` returns them).
    """
    assert image_hashes or not any(r.images is not None and len(r.images.numbers) for r in (train, held_out)), "images get lost"
    splits = (("train", train), ("held_out", held_out))
    tensors = {f"{split}.{name}": np.ascontiguousarray(getattr(rows, name))
               for split, rows in splits for name in ("input_ids", "response", "offsets")}
    if image_hashes:
        tensors["image_sha256"] = np.frombuffer(b"".join(image_hashes), np.uint8).reshape(-1, 32)
        for split, rows in splits:
            shown = rows.images or RowImages.none(len(rows))
            tensors[f"{split}.image_numbers"] = np.ascontiguousarray(shown.numbers, np.int32)
            tensors[f"{split}.image_offsets"] = np.ascontiguousarray(shown.offsets, np.int64)
    data = save(tensors)
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def save_part(path: Path, origin: Path, train: Rows, held_out: Rows) -> str:
    """As `save_unit`, of some rows of another unit file, whose images are copied beside them."""
    source = images_file(origin)
    if not any(rows.images is not None for rows in (train, held_out)):
        return save_unit(path, train, held_out)
    with open(source, "rb") as file:
        write_streamed(images_file(path), iter(lambda: file.read(1 << 22), b""))
    return save_unit(path, train, held_out, [one.tobytes() for one in _image_hashes(source)])


def load_unit(path: Path, split: str) -> Rows:
    """One split ('train' or 'held_out') of a unit's file. Raises CorruptedError."""
    try:
        tensors = load_file(path)
        images = None
        if "image_sha256" in tensors:
            numbers, offsets = tensors[f"{split}.image_numbers"], tensors[f"{split}.image_offsets"]
            images = RowImages((images_file(path),), np.zeros(len(numbers), np.int32), numbers, offsets)
            _check_images(images, len(tensors["image_sha256"]), len(tensors[f"{split}.offsets"]) - 1)
        return _checked(Rows(tensors[f"{split}.input_ids"], tensors[f"{split}.response"], tensors[f"{split}.offsets"], images))
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise CorruptedError(f"{path}: unreadable unit file ({error}). Delete it and run again.") from error


# ---- images ----------------------------------------------------------------------------------------------------------


def save_images(path: Path, sizes: Sequence[int], read: Callable[[int], bytes]) -> list[bytes]:
    """Write a file of images, one in memory at a time; returns their SHA-256. Same images, same bytes.

    Args:
        sizes: bytes of each encoded image.
        read: number -> those bytes.
    Raises:
        OutputError: it cannot be written.
    """
    offsets = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype("<i8")
    total, start = int(offsets[-1]), offsets.nbytes
    header = json.dumps({"offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, start]},
                         "bytes": {"dtype": "U8", "shape": [total], "data_offsets": [start, start + total]}}).encode()
    header += b" " * (-len(header) % 8)
    hashes = []

    def pieces() -> Iterator[bytes]:
        yield len(header).to_bytes(8, "little") + header + offsets.tobytes()
        for number, size in enumerate(sizes):
            data = read(number)
            if len(data) != size:
                raise CorruptedError(f"{path}: image {number} has {len(data):,} bytes, and had {size:,} a moment ago. Is its "
                                     "file being written? Run again.")
            hashes.append(hashlib.sha256(data).digest())
            yield data

    write_streamed(path, pieces())
    return hashes


def read_image(image: StoredImage) -> bytes:
    """An encoded image, checked against its unit's file. Raises CorruptedError."""
    try:
        offsets = _image_offsets(image.file)
        start, stop = int(offsets[image.number]), int(offsets[image.number + 1])
        data: bytes = _opened(image.file).get_slice("bytes")[start:stop].tobytes()
        wanted = _image_hashes(image.file)[image.number].tobytes()
    except CorruptedError:
        raise
    except Exception as error:  # safetensors raises its own type, the operating system and numpy others
        raise CorruptedError(f"{image.file}: unreadable file of images ({error}). Delete it and run again.") from error
    if hashlib.sha256(data).digest() != wanted:
        raise CorruptedError(f"{image.file}: image {image.number} is not the one that the unit was made with. Delete the "
                             "file and run again.")
    return data


def image_hash(image: StoredImage) -> bytes:
    """SHA-256 of an encoded image, as its unit's file has it; whether its bytes are so, `read_image` tells."""
    return bytes(_image_hashes(image.file)[image.number].tobytes())


@functools.lru_cache(maxsize=512)
def _opened_once(file: Path, changed: tuple[int, int, int]) -> Any:
    return safe_open(file, "np")


def _mark(file: Path) -> tuple[int, int, int]:
    about = file.stat()
    return about.st_mtime_ns, about.st_ino, about.st_size


def _opened(file: Path) -> Any:
    """A file of images, mapped into memory; opened again once it was replaced."""
    return _opened_once(file, _mark(file))


@functools.lru_cache(maxsize=512)
def _read_once(file: Path, tensor: str, changed: tuple[int, int, int]) -> np.ndarray:
    with safe_open(file, "np") as opened:
        return np.asarray(opened.get_tensor(tensor))


def _image_offsets(file: Path) -> np.ndarray:
    return _read_once(file, "offsets", _mark(file))


def _image_hashes(file: Path) -> np.ndarray:
    unit = file.with_name(file.name.removesuffix(".images.safetensors") + ".safetensors")
    return _read_once(unit, "image_sha256", _mark(unit))


def _check_images(images: RowImages, count: int, rows: int) -> None:
    """A file may have been made elsewhere. Raises ValueError."""
    numbers, offsets = images.numbers, images.offsets
    if numbers.dtype != np.int32 or offsets.dtype != np.int64 or numbers.ndim != 1 or offsets.ndim != 1:
        raise ValueError(f"image_numbers is {numbers.dtype}, image_offsets {offsets.dtype}; wanted int32 [m], int64 [n+1]")
    if len(offsets) != rows + 1 or offsets[0] != 0 or offsets[-1] != len(numbers) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"image_offsets do not span the {len(numbers):,} images of {rows:,} rows")
    if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= count):
        raise ValueError(f"image_numbers beyond the {count:,} images")


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
