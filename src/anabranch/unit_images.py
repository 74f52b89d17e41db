"""The images of a unit's rows: looked at when a row is drawn, scaled down where the cap says so, stored once each.

What an image becomes depends on its sides alone, so they are found once for each content (SHA-256), by decoding all of it: an
image that is cut short must not be met in training. Bytes are read again when the unit's file of images is written, one image
at a time; those that are scaled down wait in an unnamed temporary file, as a file's header tells the sizes of all images.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import CorruptedError, MixtureError, ModelError
from anabranch.images import MOST_STRETCHED, BadImage, image_size, open_image, scaled_down
from anabranch.pictures import Picture, Pictures
from anabranch.rows import RowImages, StoredImage, images_file, load_unit, read_image, save_images
from anabranch.sources import Row
from anabranch.vision import Vision

THREADS = min(8, os.cpu_count() or 1)  # decoding leaves Python's lock; each may hold an image of 256 MiB


def passing_folder() -> Path:
    """A new folder for images that no run keeps. It goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="anabranch-images-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True, slots=True)
class Look:
    """An image as the model will be shown it: sides in pixels, and whether it was scaled down to them."""

    picture: Picture
    width: int
    height: int
    scaled: bool


@dataclass
class Eye:
    """What looks at the images of one mixture."""

    vision: Vision
    pictures: Pictures
    max_pixels: int | None
    _tokens: dict[tuple[int, int], int] = field(default_factory=dict)

    def look(self, rows: Sequence[Row]) -> list[list[Look] | tuple[str, str]]:
        """The images of each row; or the rule that leaves the row out, and why."""
        new = {p.sha256: p for row in rows for p in row.images if p.sha256 not in self.pictures.sizes}
        with ThreadPoolExecutor(THREADS) as threads:
            for sha, size in zip(new, threads.map(self._size, new.values()), strict=True):
                self.pictures.sizes[sha] = size
        return [self._row(row) for row in rows]

    def _size(self, picture: Picture) -> tuple[int, int] | tuple[str, str]:
        try:
            return image_size(self.pictures.read(picture))
        except BadImage as error:
            return error.rule, error.why

    def _row(self, row: Row) -> list[Look] | tuple[str, str]:
        looks = []
        for picture in row.images:
            size = self.pictures.sizes[picture.sha256]
            if isinstance(size[0], str) or isinstance(size[1], str):
                return str(size[0]), f"{picture.name}: {size[1]}"
            width, height = int(size[0]), int(size[1])
            if max(width, height) > MOST_STRETCHED * min(width, height):
                return "broken_image", f"{picture.name}: {width} x {height} pixels, an aspect ratio above {MOST_STRETCHED}"
            target = self.vision.capped(width, height, self.max_pixels) if self.max_pixels else None
            look = Look(picture, *(target or (width, height)), target is not None)
            try:
                self.vision.text_of(look.width, look.height)
            except (ValueError, ZeroDivisionError) as error:  # Qwen2-VL takes no image 200 times longer than wide
                return "broken_image", f"{picture.name}: {width} x {height} pixels, refused by the model: {str(error)[:120]}"
            looks.append(look)
        return looks

    def texts(self, looks: Sequence[Look]) -> list[str]:
        """What stands in the conversation for each."""
        return [self.vision.text_of(look.width, look.height) for look in looks]

    def uncapped(self, look: Look) -> int:
        """Tokens of the image, had it not been scaled down."""
        width, height = (int(side) for side in self.pictures.sizes[look.picture.sha256])
        if (width, height) not in self._tokens:
            self._tokens[width, height] = self.vision.tokens(width, height)
        return self._tokens[width, height]


@dataclass(frozen=True)
class Stored:
    """The images of a unit on disk: SHA-256 of each in the order of the file, the numbers of those that were scaled down, and
    which of them each row of the two splits shows."""

    hashes: list[bytes]
    scaled: list[int]
    train: RowImages
    held_out: RowImages


def store(unit_file: Path, eye: Eye, train: Sequence[Sequence[Look]], held_out: Sequence[Sequence[Look]]) -> Stored:
    """Write the file of images beside a unit's file. Same rows, same bytes.

    Raises:
        MixtureError: an image that changed since it was read.        OutputError: it cannot be written.
    """
    looks = {(look.picture.sha256, look.scaled): look for shown in (*train, *held_out) for look in shown}
    numbers: dict[bytes, int] = {}
    place: dict[tuple[bytes, bool], int] = {}
    sources: list[tuple[int, Look | int]] = []
    with contextlib.ExitStack() as open_files:
        with eye.pictures.writing():
            waiting = open_files.enter_context(eye.pictures.temporary())
        end = 0
        for key, (sha, made) in zip(looks, _made(eye, looks.values()), strict=True):
            if sha not in numbers:
                numbers[sha] = len(sources)
                sources.append((looks[key].picture.size, looks[key]) if made is None else (len(made), end))
                with eye.pictures.writing():
                    end += waiting.write(made or b"")
            place[key] = numbers[sha]

        def read(number: int) -> bytes:
            size, source = sources[number]
            return eye.pictures.read(source.picture) if isinstance(source, Look) else os.pread(waiting.fileno(), size, source)

        file = images_file(unit_file)
        try:
            hashes = save_images(file, [size for size, _ in sources], read)
        except (BadImage, CorruptedError) as error:
            raise MixtureError(str(error)) from error
    shown = [_shown(file, rows, place) for rows in (train, held_out)]
    return Stored(hashes, sorted({place[key] for key in looks if key[1]}), *shown)


def _made(eye: Eye, looks: Iterable[Look]) -> Iterable[tuple[bytes, bytes | None]]:
    """(SHA-256, bytes where they are new) of what is stored for each, some at a time in memory."""
    def make(look: Look) -> tuple[bytes, bytes | None]:
        if not look.scaled:
            return look.picture.sha256, None
        data = scaled_down(eye.pictures.read(look.picture), look.width, look.height)
        return hashlib.sha256(data).digest(), data

    every = list(looks)
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(every), 4 * THREADS):
            yield from threads.map(make, every[start : start + 4 * THREADS])


def _shown(file: Path, rows: Sequence[Sequence[Look]], place: dict[tuple[bytes, bool], int]) -> RowImages:
    numbers = np.array([place[look.picture.sha256, look.scaled] for shown in rows for look in shown], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(shown) for shown in rows])]).astype(np.int64)
    return RowImages((file,), np.zeros(len(numbers), np.int32), numbers, offsets)


def check_row(eye: Eye, text: str, shown: Sequence[StoredImage], input_ids: np.ndarray, unit: str) -> None:
    """Hold one row to the model's own processor. Raises ModelError."""
    try:
        eye.vision.check(text, [open_image(read_image(image)) for image in shown], input_ids)
    except ModelError as error:
        raise ModelError(f"unit {unit!r}: {error}") from error


def whole(unit_file: Path) -> bool:
    """Whether a unit's file of images holds just the images that its rows were made with."""
    file = images_file(unit_file)
    try:
        hashes = image_hashes(unit_file)
        for number in range(len(hashes)):
            read_image(StoredImage(file, number))
        load_unit(unit_file, "train")
    except (CorruptedError, OSError):
        return False
    return bool(len(hashes))


def image_hashes(unit_file: Path) -> np.ndarray:
    """SHA-256 of every image of a unit, uint8 [k, 32]; k is 0 where it has none. Raises CorruptedError."""
    from safetensors import safe_open

    try:
        with safe_open(unit_file, "np") as opened:
            has = "image_sha256" in list(opened.keys())
            return np.asarray(opened.get_tensor("image_sha256")) if has else np.zeros((0, 32), np.uint8)
    except Exception as error:  # safetensors raises its own type for a damaged header
        raise CorruptedError(f"{unit_file}: unreadable unit file ({error}). Delete it and run again.") from error


def run_lengths(runs: Iterable[Counter[int]]) -> tuple[int, int, int]:
    """(least, middle, most) of counted lengths; zeros where there are none."""
    total: Counter[int] = Counter()
    for run in runs:
        total.update(run)
    every: list[Any] = sorted(total.elements())
    return (every[0], int(statistics.median_low(every)), every[-1]) if every else (0, 0, 0)
