"""Names beside points, moved until none lies on another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties

_RINGS = (7.0, 13.0, 21.0, 31.0, 43.0, 57.0, 73.0, 91.0, 111.0)
_DIRECTIONS = 16


def place_labels(axes: Axes, xy: np.ndarray, names: Sequence[str], marks: np.ndarray, colour: str, leader: str,
                 size: float = 9.0, lines: np.ndarray | None = None) -> None:
    """Write `names` near `xy`, clear of each other and of `marks`, inside the axes; a thin line leads to a far one.

    Greedy, in the given order: of all positions on rings around the point the first that hides nothing, else the one
    that hides least.

    Args:
        xy: [n, 2] data coordinates of the named points.
        marks: [m, 2] data coordinates of every mark, named or not.
        lines: [l, 2] data coordinates along thin lines that labels had better not lie on.
    """
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer, scale = canvas.get_renderer(), axes.figure.dpi / 72  # pixels per point
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # settled here: leaders must not move them
    frame, font = axes.get_window_extent(renderer), FontProperties(size=size)
    points = axes.transData.transform(marks)
    dots = np.column_stack([points - 4 * scale, points + 4 * scale])
    along = np.zeros((0, 2)) if lines is None else axes.transData.transform(lines)
    thin = np.column_stack([along - scale, along + scale])
    taken = np.zeros((0, 4))
    for name, here in zip(names, axes.transData.transform(xy), strict=True):
        width, height, _ = renderer.get_text_width_height_descent(name, font, ismath=False)
        boxes = here + _candidates(width, height, scale).reshape(-1, 2, 2)
        boxes = boxes.reshape(-1, 4)
        outside = (np.maximum(frame.x0 - boxes[:, 0], 0) + np.maximum(boxes[:, 2] - frame.x1, 0)
                   + np.maximum(frame.y0 - boxes[:, 1], 0) + np.maximum(boxes[:, 3] - frame.y1, 0))
        cost = 10 * _overlap(boxes, taken) + _overlap(boxes, dots) + _overlap(boxes, thin) + 1000 * outside
        best = boxes[int(np.argmin(cost))]
        taken = np.vstack([taken, best])
        _write(axes, name, here, best, scale, colour, leader if _unclear(here, best, points, scale) else None, size)


def _candidates(width: float, height: float, scale: float) -> np.ndarray:
    """Boxes (x0, y0, x1, y1) around the origin, nearest first, [rings * directions, 4] pixels."""
    angle = 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
    unit = np.column_stack([np.cos(angle), np.sin(angle)])
    centres = []
    for ring in _RINGS:
        # the box's own half-size in each direction, so that a ring means the gap between point and text
        reach = np.clip(unit * 1.6, -1, 1) * [width / 2, height / 2]
        centres.append(unit * ring * scale + reach)
    middle = np.concatenate(centres)
    half = np.array([width / 2, height / 2]) + scale
    return np.column_stack([middle - half, middle + half])


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that each box shares with the others, [n]."""
    if not len(others):
        return np.zeros(len(boxes))
    w = np.minimum(boxes[:, None, 2], others[None, :, 2]) - np.maximum(boxes[:, None, 0], others[None, :, 0])
    h = np.minimum(boxes[:, None, 3], others[None, :, 3]) - np.maximum(boxes[:, None, 1], others[None, :, 1])
    return (np.maximum(w, 0) * np.maximum(h, 0)).sum(axis=1)


def _unclear(here: np.ndarray, box: np.ndarray, points: np.ndarray, scale: float) -> bool:
    """Whether a reader could take the label for another mark's: it stands far off, or another mark is as near."""
    gaps = np.hypot(*(np.clip(points, box[:2], box[2:]) - points).T)
    gap = np.hypot(*(np.clip(here, box[:2], box[2:]) - here))
    others = gaps[np.hypot(*(points - here).T) > scale]
    return bool(gap > 10 * scale or (len(others) and others.min() < gap + 3 * scale))


def _write(axes: Axes, name: str, here: np.ndarray, box: np.ndarray, scale: float, colour: str, leader: str | None,
           size: float) -> None:
    centre = np.array([box[0] + box[2], box[1] + box[3]]) / 2
    to_data = axes.transData.inverted().transform
    nearest = np.clip(here, box[:2], box[2:])
    if leader is not None:
        (x0, y0), (x1, y1) = to_data(here), to_data(nearest)
        axes.plot([x0, x1], [y0, y1], color=leader, linewidth=0.6, zorder=1)
    x, y = to_data(centre)
    axes.text(x, y, name, ha="center", va="center", fontsize=size, color=colour, zorder=5)
