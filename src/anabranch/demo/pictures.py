"""Small pictures of coloured shapes and digits, drawn with PIL.

A picture is SIDE x SIDE pixels, a grid of GRID x GRID cells with at most one mark in each. It is written as one line of
text, so that it can stand in a task's fields: marks separated by `;`, each `what colour column row right down`, the last
two by how many pixels the mark sits off its cell's corner. Same text, same pixels.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE, GRID = 64, 4
CELL = SIDE // GRID
MARK = 14  # pixels of a mark's sides; the rest of its cell is room to sit anywhere in
FINER = 8  # marks are drawn this many times larger and scaled down: smooth edges
PAPER = (232, 230, 224)
PAINT = {"red": (214, 40, 40), "blue": (38, 84, 200), "green": (30, 150, 70), "black": (30, 30, 34), "gold": (235, 175, 20),
         "pink": (240, 110, 170)}
SHAPES = ["circle", "square", "triangle", "star", "cross"]
# 5 columns of 7 dots each, the lowest bit on top; no font file, so the same dots everywhere
DIGITS = {"0": "3E5149453E", "1": "00427F4000", "2": "4261514946", "3": "2141454B31", "4": "1814127F10", "5": "2745454539",
          "6": "3C4A494930", "7": "0171090503", "8": "3649494936", "9": "064949291E"}


class Mark(NamedTuple):
    """One shape or digit: in which cell, and how many pixels off the cell's upper left corner."""

    what: str
    colour: str
    column: int
    row: int
    right: int
    down: int


def written(marks: Sequence[Mark]) -> str:
    """A picture as text, its marks in reading order."""
    return ";".join(" ".join(map(str, m)) for m in sorted(marks, key=lambda m: (m.row, m.column)))


def marks_of(picture: str) -> list[Mark]:
    """The marks of a written picture."""
    parts = [mark.split() for mark in picture.split(";")]
    return [Mark(what, colour, *map(int, numbers)) for what, colour, *numbers in parts]


def drawn(picture: str) -> Image.Image:
    """A written picture as an image, RGB, SIDE x SIDE."""
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    for mark in marks_of(picture):
        place = (mark.column * CELL + mark.right, mark.row * CELL + mark.down)
        image.paste(PAINT[mark.colour], place, _stencil(mark.what))
    return image


def png(picture: str) -> bytes:
    """A written picture as the bytes of a PNG file."""
    out = io.BytesIO()
    drawn(picture).save(out, "PNG", optimize=True)
    return out.getvalue()


def mark(rng: np.random.Generator, what: str, colour: str, column: int, row: int) -> Mark:
    """A mark somewhere in this cell."""
    right, down = (int(x) for x in rng.integers(0, CELL - MARK + 1, 2))
    return Mark(what, colour, column, row, right, down)


def scene(rng: np.random.Generator) -> str:
    """A written picture of one to sixteen marks of all sorts, in cells by chance."""
    full, marks = 0.1 + 0.6 * rng.random(), list[Mark]()
    while not marks:
        for cell in range(GRID * GRID):
            if rng.random() < full:
                pool = [*SHAPES, *DIGITS] if rng.integers(2) else SHAPES
                what, colour = pool[rng.integers(len(pool))], list(PAINT)[rng.integers(len(PAINT))]
                marks.append(mark(rng, what, colour, cell % GRID, cell // GRID))
    return written(marks)


@functools.cache
def _stencil(what: str) -> Image.Image:
    """Where a mark has paint: MARK x MARK, 0 to 255."""
    side = MARK * FINER
    large = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(large)
    if what in DIGITS:
        columns, dot = bytes.fromhex(DIGITS[what]), side // 7
        for x, column in enumerate(columns):
            for y in (y for y in range(7) if column >> y & 1):
                pen.rectangle((dot * (x + 1), dot * y, dot * (x + 2) - 1, dot * (y + 1) - 1), fill=255)
    elif what == "circle":
        pen.ellipse((4, 4, side - 5, side - 5), fill=255)
    else:
        pen.polygon([(x * side, y * side) for x, y in _outline(what)], fill=255)
    return large.resize((MARK, MARK), Image.Resampling.BOX)


def _outline(what: str) -> list[tuple[float, float]]:
    """Corners of a shape in a square of side 1."""
    if what == "square":
        return [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    if what == "triangle":
        return [(0.5, 0.04), (0.98, 0.94), (0.02, 0.94)]
    if what == "cross":
        near, far = 0.34, 0.66
        return [(near, 0.02), (far, 0.02), (far, near), (0.98, near), (0.98, far), (far, far), (far, 0.98), (near, 0.98),
                (near, far), (0.02, far), (0.02, near), (near, near)]
    turns = [(math.pi * (i / 5 - 0.5), 0.5 if i % 2 == 0 else 0.21) for i in range(10)]
    return [(0.5 + radius * math.cos(turn), 0.52 + radius * math.sin(turn)) for turn, radius in turns]
