"""Pictures of mergeability: predicted against measured, coefficients by method, scores task by task.

    picture = agreement_picture([...])          # or fingerprint_picture, task_picture
    save_picture(picture, path)                 # PNG, 1350 pixels wide
    picture_svg(picture, "name")                # inline SVG for a page, light and dark

Same arrays, same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from anabranch.artifacts import write_atomically
from anabranch.report.canvas import CHARACTER, LEGEND_ROW, WIDTH, Sheet, fit, heat
from anabranch.report.contents import clean, shorten
from anabranch.report.diagnostic_figures import PIXELS, TITLE
from anabranch.report.figures import LIGHT, Theme, dress, settings, svg, tip

GAP = 16.0
SHADES = "cividis"  # equally read by people with and without colour vision
OUTSIDE = 0.02  # share of cells at either end that may lie beyond the colour scale, so that one task does not take all of it
TOP = 5
NAME = 30  # characters of a task's or metric's name


class Picture(NamedTuple):
    """What it shows in a sentence, its height in CSS pixels at width WIDTH, and what draws it on a sheet of that size."""

    finding: str
    height: float
    draw: Callable[[Sheet], None]


def save_picture(picture: Picture, path: Path, theme: Theme = LIGHT) -> None:
    """Write one PNG with the finding as its title.

    Raises:
        OutputError: `path` cannot be written.
    """
    title = fit(picture.finding, WIDTH - 28, TITLE)
    head = 22 + 19 * (title.count("\n") + 1)
    with settings():
        figure = Figure(figsize=(WIDTH / 72, (picture.height + head) / 72), dpi=PIXELS / WIDTH * 72, facecolor=theme.paper)
        FigureCanvasAgg(figure)
        figure.text(14 / WIDTH, 1 - 14 / (picture.height + head), title, va="top", fontsize=TITLE, color=theme.ink)
        picture.draw(Sheet(figure, theme, picture.height, head))
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"dpi": (150, 150)})
    write_atomically(path, file.getvalue())


def picture_svg(picture: Picture, name: str) -> str:
    """An inline `<svg>` in the page's colours; `name` keeps its ids apart from other figures'."""
    def onto(figure: Figure, theme: Theme) -> None:
        picture.draw(Sheet(figure, theme, picture.height))
    return svg(name, picture.finding, onto, (WIDTH, picture.height))


# ---- predicted against measured --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Predictions of one method, [n] each; NaN where there is none. `low` and `high` are the ends of the intervals."""

    method: str
    measured: np.ndarray
    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    names: Sequence[str] = ()

    @property
    def known(self) -> np.ndarray:
        return np.isfinite(self.measured) & np.isfinite(self.predicted)

    @property
    def bounded(self) -> np.ndarray:
        return self.known & np.isfinite(self.low) & np.isfinite(self.high)

    @property
    def held(self) -> np.ndarray:
        return self.bounded & (self.low <= self.measured) & (self.measured <= self.high)


def agreement_picture(panels: Sequence[Agreement], score: str = "normalised score of the merge") -> Picture:
    """A panel per method: measured across, predicted up, with intervals; on the diagonal the two are equal."""
    panels = [p for p in panels if p.known.any()]
    across = min(3, max(1, len(panels)))
    side = min(330.0, (WIDTH - 62 - 12 - 46 * (across - 1)) / across)
    down = -(-len(panels) // across)
    bounded, held = (sum(int(getattr(p, name).sum()) for p in panels) for name in ("bounded", "held"))
    finding = "Predicted against measured"
    if bounded:
        finding += f": {held / bounded:.0%} of {bounded} intervals hold the measured score"
    row = side + 72

    def draw(sheet: Sheet) -> None:
        if not panels:
            sheet.words(62, 20, "Nothing was predicted.")
            return
        for i, panel in enumerate(panels):
            left, top = 62 + i % across * (side + 46), 28 + i // across * row
            axes = sheet.axes(left, top, side, side, _agreement_title(panel), "both")
            _scatter(axes, sheet.theme, panel)
            if i % across == 0:
                axes.set_ylabel(f"predicted {score}")
            if i + across >= len(panels):
                axes.set_xlabel(f"measured {score}" if across < 3 else "measured")
        theme = sheet.theme
        entries = [(Line2D([], [], color=theme.groups[0], marker="o", linewidth=1.2, markersize=5), "interval holds it"),
                   (Line2D([], [], color=theme.groups[1], marker="^", linewidth=1.2, markersize=6), "interval misses it"),
                   (Line2D([], [], color=theme.soft, linestyle="--", linewidth=1.0), "predicted = measured")]
        alone = Line2D([], [], color=theme.soft, marker="o", linestyle="", markersize=5)
        if not bounded:
            entries = [(alone, "pair"), entries[2]]
        elif any((p.known & ~p.bounded).any() for p in panels):
            entries.insert(2, (alone, "cannot say"))
        sheet.legend(62, 28 + down * row - 8, WIDTH - 80, entries)

    return Picture(finding, 28 + down * row + LEGEND_ROW + 6 if panels else 60.0, draw)


def _agreement_title(panel: Agreement) -> str:
    known = panel.known
    title = f"{shorten(panel.method, NAME)}, {int(known.sum())} pairs"
    if known.sum() > 2 and np.ptp(panel.measured[known]) > 0 and np.ptp(panel.predicted[known]) > 0:
        title += f", r = {np.corrcoef(panel.measured[known], panel.predicted[known])[0, 1]:.2f}".replace("-", "−")
    return title


def _scatter(axes: Axes, theme: Theme, panel: Agreement) -> None:
    """Bars first, thin where they are many; those that miss lie on top."""
    known, many = panel.known, panel.known.sum() > 60
    ends = [panel.measured[known], panel.predicted[known], panel.low[panel.bounded], panel.high[panel.bounded]]
    low, high = min(float(e.min()) for e in ends if len(e)), max(float(e.max()) for e in ends if len(e))
    room = 0.04 * (high - low) or 0.01
    axes.plot([low - room, high + room], [low - room, high + room], color=theme.soft, linestyle="--", linewidth=1.0, zorder=1)
    kinds = ((panel.known & ~panel.bounded, theme.soft, "o", 4.0), (panel.held, theme.groups[0], "o", 4.0),
             (panel.bounded & ~panel.held, theme.groups[1], "^", 5.0))
    for z, (rows, colour, mark, size) in enumerate(kinds):
        barred = rows & panel.bounded
        axes.vlines(panel.measured[barred], panel.low[barred], panel.high[barred], color=colour, alpha=0.3 if many else 0.7,
                    linewidth=0.9 if many else 1.4, zorder=2 + z)
        marks: dict[str, Any] = {"color": colour, "zorder": 5 + z, "markersize": size * (0.8 if many else 1.3),
                                 "markeredgecolor": theme.paper, "markeredgewidth": 0.4}
        if many:  # too many to be pointed at one by one
            axes.plot(panel.measured[rows], panel.predicted[rows], mark, **marks)
            continue
        for i in np.flatnonzero(rows):
            (point,) = axes.plot(panel.measured[i], panel.predicted[i], mark, **marks)
            name = f"{panel.names[int(i)]}: " if len(panel.names) > i else ""
            tip(point, f"{name}measured {panel.measured[i]:.3f}, predicted {panel.predicted[i]:.3f}")
    axes.set(xlim=(low - room, high + room), ylim=(low - room, high + room))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint_picture(metrics: Sequence[str], methods: Sequence[str], coefficients: np.ndarray, *,
                        finding: str | None = None, by_method: bool = False) -> Picture:
    """Metrics by methods, blue above and orange below zero; each method's TOP largest are framed.

    Args:
        coefficients: [metrics, methods]; NaN is drawn as 0.
        by_method: every method has its own scale (its largest |coefficient|), for rules that are not on a common one.
    """
    values = np.nan_to_num(np.asarray(coefficients, np.float64))
    largest = np.abs(values).max(axis=0) if by_method else np.full(len(methods), np.abs(values).max(initial=0.0))
    shares = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
    shares[np.abs(shares) < 0.005] = 0.0  # what would read -0.00
    names = [clean(m).replace("_", " ") for m in metrics]
    left = 24 + CHARACTER * min(46, max((len(n) for n in names), default=0))
    row = 17.0 if len(names) <= 45 else 13.0
    width = min(WIDTH - left - 16, 92.0 * max(1, len(methods)))
    tall = row * len(names)
    unit = "each method's largest |coefficient|" if by_method else f"the largest |coefficient|, {largest.max(initial=0.0):.3g}"

    def draw(sheet: Sheet) -> None:
        if not len(names) or not len(methods):
            sheet.words(14, 20, "No coefficients.")
            return
        axes = sheet.axes(left, 12, width, tall)
        heat(axes, sheet.theme, shares, names, methods, size=8.0)
        axes.set_yticks(range(len(names)), [shorten(n, 46) for n in names], fontsize=min(9.5, row - 4))
        for k in range(len(methods)):
            for i in np.argsort(-np.abs(shares[:, k]), kind="stable")[:TOP]:
                if shares[i, k]:
                    axes.add_patch(Rectangle((k - 0.47, i - 0.45), 0.94, 0.9, fill=False, edgecolor=sheet.theme.ink,
                                             linewidth=1.1))
        sheet.words(14, 12 + tall + _slanted(methods, width / len(methods)) + 8,
                    f"Figures: shares of {unit}. Blue: more of the metric, a higher score; orange: a lower one. "
                    f"Framed: the {TOP} largest of each method.", WIDTH - 28)

    height = 12 + tall + _slanted(methods, width / max(1, len(methods))) + 46 if len(names) and len(methods) else 60.0
    return Picture(finding or "Which metrics each method's score rests on", height, draw)


def _slanted(names: Sequence[str], column: float) -> float:
    """Room below a heat map for its column names, which `heat` slants where they are too long."""
    longest = max((len(n[:22]) for n in names), default=0) * CHARACTER
    return 22.0 if longest <= column else 26.0 + 0.66 * longest


# ---- task by task ----------------------------------------------------------------------------------------------------


def task_picture(tasks: Sequence[str], panels: Sequence[tuple[str, np.ndarray]], *,
                 score: str = "normalised score of the merge", finding: str | None = None, ordered: bool = True) -> Picture:
    """A square per method (or per method, measured and predicted): the score of merging the row's task with the column's.

    Args:
        panels: (title, values [tasks, tasks]); NaN stays blank. All share one colour scale.
        ordered: tasks by their mean over all panels, the best first; without it as given.
    """
    stack = np.array([np.asarray(v, np.float64) for _, v in panels]).reshape(len(panels), len(tasks), len(tasks))
    order = np.arange(len(tasks))
    known = np.isfinite(stack)
    if ordered and known.any():
        count = np.maximum(known.sum((0, 2)), 1)
        order = np.argsort(-np.where(known, stack, 0.0).sum((0, 2)) / count, kind="stable")
    stack, names = stack[:, order][:, :, order], [tasks[int(i)] for i in order]
    known = np.isfinite(stack)
    across = 1 if len(panels) == 1 or len(tasks) > 24 else 2
    labels = 12 + CHARACTER * min(18, max((len(clean(t)) for t in tasks), default=0))
    side = min((WIDTH - labels - 24 - GAP * (across - 1)) / across, 72.0 * max(1, len(tasks)), 640.0)
    below = 0.75 * labels + 14
    down = -(-len(panels) // across)
    low, high = (float(v) for v in np.quantile(stack[known], [OUTSIDE, 1 - OUTSIDE])) if known.any() else (0.0, 1.0)
    scale = Normalize(low, high if high > low else low + 0.01)
    foot = 26 + down * (side + 30) + below

    def draw(sheet: Sheet) -> None:
        if not known.any():
            sheet.words(14, 20, "No score is known.")
            return
        for i, ((title, _), values) in enumerate(zip(panels, stack, strict=True)):
            axes = sheet.axes(labels + i % across * (side + GAP), 26 + i // across * (side + 30), side, side,
                              shorten(title, max(6, int(side / CHARACTER) - 3)))
            _squares(axes, sheet.theme, values, names, scale, rows=i % across == 0, columns=i + across >= len(panels))
        _scale_bar(sheet, labels, foot, min(300.0, WIDTH - labels - 24), scale, score)

    text = finding or f"{score[:1].upper()}{score[1:]}, task by task"
    return Picture(text, foot + 62 if known.any() else 60.0, draw)


def _squares(axes: Axes, theme: Theme, values: np.ndarray, names: Sequence[str], scale: Normalize, *, rows: bool,
             columns: bool) -> None:
    shades = matplotlib.colormaps[SHADES]
    axes.imshow(np.ma.masked_invalid(values), cmap=shades, norm=scale, interpolation="none", aspect="auto")
    cell = axes.get_window_extent().width / len(names) * 72 / axes.figure.dpi
    if cell >= 27:
        for i, j in np.argwhere(np.isfinite(values)):
            red, green, blue, _ = shades(scale(values[i, j]))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            text = axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8.5 if cell < 48 else 10.5,
                             color="#111111" if light else "#ffffff")
            tip(text, f"{names[i]} with {names[j]}: {values[i, j]:.4f}")
    size = max(5.5, min(9.5, cell - 1))
    short = [shorten(n, 18) for n in names]
    axes.set_yticks(range(len(names)) if rows else [], short if rows else [], fontsize=size)
    axes.set_xticks(range(len(names)) if columns else [], short if columns else [], fontsize=size, rotation=45, ha="right",
                    rotation_mode="anchor")
    axes.tick_params(length=0, labelcolor=theme.ink)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _scale_bar(sheet: Sheet, left: float, top: float, width: float, scale: Normalize, score: str) -> None:
    """The colours' meaning; arrows say that values lie beyond the ends."""
    axes = sheet.figure.add_axes(sheet.shares(left, top, width, 9))
    bar = sheet.figure.colorbar(ScalarMappable(scale, matplotlib.colormaps[SHADES]), cax=axes, orientation="horizontal",
                                extend="both", ticks=MaxNLocator(nbins=5), format=FuncFormatter(lambda v, _: f"{v:g}"))
    bar.outline.set_edgecolor(sheet.theme.line)
    dress(axes, sheet.theme)
    axes.set_xlabel(f"{score}; blank: not known")
