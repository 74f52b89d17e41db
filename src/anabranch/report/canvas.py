"""A sheet that pictures of several panels are laid out on, measured in CSS pixels, and how models look on all of them."""

from __future__ import annotations

import re
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from anabranch.report.contents import clean, shorten
from anabranch.report.figures import ALIKE, DASHES, MARKERS, OPPOSED, Theme, dress, marker, tip

WIDTH = 800.0
LEGEND_ROW = 17.0
CHARACTER = 5.8  # width of a letter at size 9.5 in the measuring font, which is wider than what browsers show
ORDERS = 30.0  # values that span more than this factor go on a logarithmic axis


class Look(NamedTuple):
    """Of a model: colour, marker, dash, size of its mark, width of its line."""

    colour: str
    marker: str
    dash: str
    size: float
    width: float


def branch_number(model: str) -> int | None:
    found = re.fullmatch(r"branch-(\d+)", model)
    return int(found[1]) if found else None


def look(theme: Theme, model: str) -> Look:
    """The same on every picture: what is compared stands out, branches stay in the background; shape says it too."""
    if model == "merged":
        return Look(theme.groups[0], "o", "-", 8, 2.2)
    if model == "joint":
        return Look(theme.groups[1], "s", "--", 7.5, 2.2)
    if model == "base":
        return Look(theme.ink, "D", ":", 7, 1.6)
    if (k := branch_number(model)) is not None:
        return Look(theme.soft, "v^<>phd8"[k % 8], "-.", 5.5, 0.9)
    draw = zlib.crc32(model.encode("utf-8", "replace"))
    return Look(theme.groups[2 + draw % 5], "P*X"[draw // 5 % 3], DASHES[draw // 15 % 4], 8, 1.6)


def fit(text: str, width: float, size: float = 10.5) -> str:
    """Text broken into lines of `width` pixels."""
    return textwrap.fill(clean(text), max(8, int(width / (CHARACTER * size / 9.5))), break_on_hyphens=False)


@dataclass(frozen=True)
class Sheet:
    """WIDTH by `height` pixels, below `head` pixels that a title takes; places are given from the upper left corner."""

    figure: Figure
    theme: Theme
    height: float
    head: float = 0.0

    def shares(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """Left, bottom, width, height as matplotlib wants them."""
        whole = self.height + self.head
        return left / WIDTH, 1 - (self.head + top + height) / whole, width / WIDTH, height / whole

    def axes(self, left: float, top: float, width: float, height: float, title: str = "",
             grid: Literal["x", "y", "both"] | None = None) -> Axes:
        """`title` stands above, within the panel's width, broken where it must be."""
        axes = self.figure.add_axes(self.shares(left, top, width, height))
        dress(axes, self.theme, grid)
        if title:
            axes.set_title(fit(title, width), loc="left", color=self.theme.ink, pad=8)
        return axes

    def words(self, left: float, top: float, text: str, width: float = WIDTH, size: float = 9.5,
              colour: str | None = None) -> None:
        """Text whose first line starts at that place, broken at `width`."""
        x, y, _, _ = self.shares(left, top, 0, 0)
        self.figure.text(x, y, fit(text, width, size), va="top", fontsize=size, color=colour or self.theme.soft)

    def legend(self, left: float, top: float, width: float, entries: Sequence[tuple[Line2D, str]]) -> None:
        """Below or beside the data, never on it; `legend_height` says how much room it takes."""
        if not entries:
            return
        x, y, _, _ = self.shares(left, top, 0, 0)
        columns = _columns([label for _, label in entries], width)
        entries = [entries[i] for c in range(columns) for i in range(c, len(entries), columns)]  # matplotlib goes down first
        made = self.figure.legend([line for line, _ in entries], [label for _, label in entries], ncols=columns,
                                  loc="upper left", bbox_to_anchor=(x, y), frameon=False, labelcolor=self.theme.soft,
                                  fontsize=9.5, handlelength=2.4, columnspacing=1.0, handletextpad=0.5, borderpad=0,
                                  borderaxespad=0, labelspacing=0.45)
        made.set_in_layout(False)


def _columns(labels: Sequence[str], width: float) -> int:
    longest = max(len(label) for label in labels) * CHARACTER + 44
    most = max(1, min(len(labels), int(width / longest)))
    return -(-len(labels) // -(-len(labels) // most))  # rows of equal length


def legend_height(labels: Sequence[str], width: float) -> float:
    return -(-len(labels) // _columns(labels, width)) * LEGEND_ROW if labels else 0.0


def key(look: Look, line: bool = True) -> Line2D:
    """What a legend shows for a model."""
    return Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.dash if line else "",
                  markersize=look.size * 0.8, linewidth=look.width)


def group_key(theme: Theme, group: int | None) -> tuple[Line2D, str]:
    return (Line2D([], [], linestyle="", marker=marker(group), color=theme.group(group), markersize=6.5),
            "no group" if group is None else f"group {group}")


def cycle(theme: Theme, i: int) -> tuple[str, str, str]:
    """Colour, dash and marker of the i-th of a few lines that have no colour of their own."""
    return theme.groups[i % len(theme.groups)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]


def logarithmic(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """A logarithmic axis over those of `values` that are above 0, with plain figures at its ticks."""
    found = [v for v in values if v > 0]
    low, high = min(found) / 1.25, max(found) * 1.25
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    few = high / low < 200
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if few else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())


def spans_orders(values: Sequence[float]) -> bool:
    """Whether all are above zero and too far apart for a linear axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > ORDERS


def heat(axes: Axes, theme: Theme, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], limit: float = 1.0,
         size: float = 8.5) -> None:
    """A matrix as shades from the paper to blue (above 0) or orange (below 0); figures where they have room.

    Args:
        values: float [rows, columns], in [-1, 1].
        limit: the absolute value that has the darkest shade.
    """
    scale = np.linspace(-1, 1, 129)
    colours = np.where(scale[:, None] < 0, to_rgb(OPPOSED), to_rgb(ALIKE))
    shades = ListedColormap(np.column_stack([colours, 0.75 * np.abs(scale) ** 0.75]))  # figures stay legible on the darkest
    axes.imshow(np.clip(values, -limit, limit), cmap=shades, vmin=-limit, vmax=limit, interpolation="none", aspect="auto")
    box = axes.get_window_extent()
    wide = box.width / max(1, len(columns)) * 72 / axes.figure.dpi
    tall = box.height / max(1, len(rows)) * 72 / axes.figure.dpi
    if wide >= 27 and tall >= 12:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                text = axes.text(j, i, f"{value:.2f}".replace("-", "−"), ha="center", va="center", fontsize=size,
                                 color=theme.ink)
                tip(text, f"{rows[i]}, {columns[j]}: {value:.4f}")
    axes.set_yticks(range(len(rows)), [shorten(r, 22) for r in rows], fontsize=min(9.5, tall))
    axes.set_xticks(range(len(columns)), [shorten(c, 22) for c in columns], fontsize=min(9.5, wide))
    axes.tick_params(length=0, labelcolor=theme.ink)
    if any(len(c) * CHARACTER > wide for c in columns):
        axes.tick_params(axis="x", labelrotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    for spine in axes.spines.values():
        spine.set_visible(True)


def whiskers(axes: Axes, x: Any, y: Any, low: Any, high: Any, colour: str, upright: bool = True, width: float = 1.4) -> None:
    """Intervals `low` to `high` through points, as plain bars with short caps."""
    x, y, low, high = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (x, y, low, high))
    middle = y if upright else x
    ends = np.maximum(np.stack([middle - low, high - middle]), 0.0)
    axes.errorbar(x, y, **{"yerr" if upright else "xerr": ends}, fmt="none", ecolor=colour, elinewidth=width, capsize=2.5,
                  capthick=width)
