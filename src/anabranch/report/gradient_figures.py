"""Pictures of gradients and curvature: how sharp, how well measured, and which units lie near which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list

from anabranch.diagnose.artifacts import Calibration, Curvature, GradientMap, MapPoint, MergingGain
from anabranch.report.canvas import (
    LEGEND_ROW,
    WIDTH,
    Sheet,
    branch_number,
    group_key,
    heat,
    legend_height,
    logarithmic,
    spans_orders,
    whiskers,
)
from anabranch.report.contents import shorten
from anabranch.report.diagnostics import PAPER_CALIBRATION, rows_name
from anabranch.report.figures import LABELLED_UNITS, LIGHT, Theme, marker, tip
from anabranch.report.labels import place_labels

NAME = 26  # letters of a unit's name below a picture
NAMED_UNITS = 36  # more units than this stand below the calibration plot without names
NO_DIRECTION = "no direction in common"
EVEN = {"*": 1.5, "P": 1.15, "X": 1.15, "D": 0.88}  # marks of one size look unequally large

# ---- curvature -------------------------------------------------------------------------------------------------------


def _second_row(d: Curvature) -> float:
    cells = min(200.0, 44.0 * len(d.alignment.cosines) + 20) if d.alignment else 0.0
    return max(cells, 120.0 if d.gain else 0.0)


def curvature_height(d: Curvature) -> float:
    second = _second_row(d)
    return 34 + 190 + 56 + (second + 48 + 58 if second else 0)


def draw_curvature(sheet: Sheet, d: Curvature) -> None:
    """Top eigenvalues and all Ritz values; conflict axes against eigenvectors; gain predicted and measured."""
    axes = sheet.axes(72, 34, 320, 190, "Top eigenvalues of the Hessian at the base", "y")
    _eigenvalues(axes, sheet.theme, d)
    axes = sheet.axes(470, 34, WIDTH - 484, 190, f"All Ritz values of {d.steps} Lanczos steps", "x")
    _ritz(axes, sheet.theme, d)
    top = 34 + 190 + 56 + 48
    if d.alignment is not None:
        a = d.alignment
        wide = 410.0 if d.gain is not None else WIDTH - 86
        title = (f"|cos| of conflict axes and eigenvectors: z = {a.z:,.1f}, angles "
                 + ", ".join(f"{v:.1f}°" for v in a.angles)).replace("-", "−")
        cells = sheet.axes(72, top, wide, min(200.0, 44.0 * len(a.cosines) + 20), title)
        values = np.array(a.cosines, dtype=np.float64)
        heat(cells, sheet.theme, values, [f"axis {i + 1}" for i in range(len(values))],
             [str(j + 1) for j in range(values.shape[1] if values.ndim == 2 else 0)], limit=max(0.05, float(values.max())))
        cells.set_xlabel("eigenvector, largest eigenvalue first")
    if d.gain is not None:
        left, wide = (590.0, WIDTH - 604) if d.alignment is not None else (180.0, WIDTH - 194)
        _gain(sheet.axes(left, top, wide, 120, f"Gain of merging ({rows_name(d.gain.rows)})", "x"), sheet.theme, d.gain)


def _eigenvalues(axes: Axes, theme: Theme, d: Curvature) -> None:
    x, values = np.arange(1, len(d.eigenvalues) + 1), np.array(d.eigenvalues, dtype=np.float64)
    if spans_orders(d.eigenvalues):
        logarithmic(axes, "y", d.eigenvalues)
        floor = axes.get_ylim()[0]
    else:
        axes.axhline(0, color=theme.soft, linewidth=0.9)
        floor = 0.0
    axes.vlines(x, floor, values, color=theme.groups[0], linewidth=1.4)
    whiskers(axes, x, values, values - d.residuals, values + d.residuals, theme.ink, width=1.0)
    for i, value in enumerate(values):
        (mark,) = axes.plot(x[i], value, "o" if value >= 0 else "v", color=theme.groups[0] if value >= 0 else theme.groups[1],
                            markersize=6)
        tip(mark, f"{i + 1}: {value:.4g}, residual {d.residuals[i]:.1e}")
    axes.set_xlabel("number (bars: residual)")
    axes.set_ylabel("eigenvalue, nats / distance²")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    axes.set_xlim(0.4, max(len(values), 1) + 0.6)


def _ritz(axes: Axes, theme: Theme, d: Curvature) -> None:
    """Values in ascending order, linear in the middle, logarithmic in the tails."""
    values = np.array(d.ritz, dtype=np.float64)
    sizes = np.sort(np.abs(values[values != 0]))
    if len(sizes) > 2 and sizes[-1] > 30 * np.median(sizes):
        linear = float(f"{np.median(sizes):.0e}")
        axes.set_xscale("symlog", linthresh=linear, linscale=0.6)
        ends = [s * linear * 10.0**k for s in (-1, 1) for k in range(0, 12, 1 + (sizes[-1] > 1e3 * linear))]
        ticks = [0.0, *(t for t in ends if values.min() * 1.2 <= t <= values.max() * 1.2 and abs(t) > 0)]
        axes.set_xticks(sorted(ticks), [f"{t:g}".replace("-", "−") for t in sorted(ticks)])
        axes.minorticks_off()
    rank = np.arange(1, len(values) + 1)
    below = values < 0
    axes.plot(values[~below], rank[~below], "o", color=theme.groups[0], markersize=4)
    axes.plot(values[below], rank[below], "v", color=theme.groups[1], markersize=5)
    axes.axvline(0, color=theme.soft, linewidth=0.9)
    axes.set_xlabel("Ritz value, nats / distance²" + (" (▼: below 0)" if below.any() else ""))
    axes.set_ylabel("rank, ascending")


def _gain(axes: Axes, theme: Theme, gain: MergingGain) -> None:
    rows = [("measured", gain.measured, theme.groups[1], "s"), ("Hessian", gain.quadratic, theme.groups[0], "o"),
            ("top vectors", gain.top, theme.soft, "^")]
    axes.axvline(0, color=theme.soft, linewidth=0.9)
    whiskers(axes, gain.measured, 2, gain.low, gain.high, theme.groups[1], upright=False, width=2)
    for y, (name, value, colour, mark) in zip((2, 1, 0), rows, strict=True):
        (dot,) = axes.plot(value, y, mark, color=colour, markersize=8)
        tip(dot, f"{name}: {value:.5g}")
        axes.annotate(f"{value:.3g}".replace("-", "−"), (value, y), (0, 8), textcoords="offset points", ha="center", fontsize=9,
                      color=theme.ink)
    axes.set_yticks([2, 1, 0], ["measured", "predicted:\nHessian", "predicted:\ntop vectors"])
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axes.set_ylim(-0.5, 2.7)
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.set_xlabel("branches' mean loss − merged,\nnats per response token")


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibration_height(d: Calibration) -> float:
    return 34 + 260 + 50 + 2 * LEGEND_ROW + 66 + 200 + _below(d) + LEGEND_ROW + 10


def _below(d: Calibration) -> float:
    """Room for the units' names, or for an axis' label where there are too many to name."""
    if len(d.units) > NAMED_UNITS:
        return 50.0
    return 0.62 * 9 * max((len(shorten(u.unit, NAME)) for u in d.units), default=0) + 26


def draw_calibration(sheet: Sheet, d: Calibration) -> None:
    """Cosine and reliability by number of examples, a thin line per unit; below, how many examples each unit needs."""
    theme = sheet.theme
    wide = 325.0
    faint = Line2D([], [], color=theme.groups[0], linewidth=0.8, alpha=0.6)
    thick = Line2D([], [], color=theme.groups[0], linewidth=2.4, marker="o", markersize=5)
    axes = sheet.axes(62, 34, wide, 260, "Gradient of n examples against that of all", "y")
    _by_size(axes, theme, d, "cosines", d.mean_cosine)
    paper = Line2D([*PAPER_CALIBRATION], [*PAPER_CALIBRATION.values()], color=theme.soft, linewidth=1.8, linestyle="--",
                   marker="D", markersize=5, markerfacecolor=theme.paper, zorder=3)
    axes.add_line(paper)
    axes.set_ylabel("cosine")
    sheet.legend(62, 34 + 260 + 50, wide, [(faint, "one unit"), (thick, "mean over units"),
                                           (paper, "the paper's (1000 examples = all)")])
    left = 62 + wide + 76
    axes = sheet.axes(left, 34, wide, 260, "Agreement of two halves, stepped up to n", "y")
    _by_size(axes, theme, d, "reliability", d.mean_reliability)
    axes.axhline(d.wanted, color=theme.groups[1], linewidth=1.4, linestyle="-.")
    axes.set_ylabel("reliability")
    wanted = Line2D([], [], color=theme.groups[1], linewidth=1.4, linestyle="-.")
    sheet.legend(left, 34 + 260 + 50, wide, [(faint, "one unit"), (thick, "mean over units"),
                                             (wanted, f"wanted: {d.wanted:g}")])
    _needed(sheet, d, 34 + 260 + 50 + 2 * LEGEND_ROW + 66)


def _by_size(axes: Axes, theme: Theme, d: Calibration, field: str, mean: Sequence[float]) -> None:
    strength = 0.55 if len(d.units) <= 40 else 0.3 if len(d.units) <= 120 else 0.15
    for u in d.units:
        last = -1 if field == "cosines" else None  # the reference's cosine with itself would look like a jump
        sizes, values = u.sizes[:last], getattr(u, field)[:last]
        (line,) = axes.plot(sizes, values, color=theme.groups[0], linewidth=0.8, alpha=strength,
                            marker="." if len(sizes) == 1 else None)
        tip(line, u.unit)
    axes.plot(d.sizes, mean, color=theme.groups[0], linewidth=2.4, marker="o", markersize=5, zorder=4)
    sizes = [*d.sizes, *(n for u in d.units for n in u.sizes)]
    if sizes:
        logarithmic(axes, "x", sizes)
    values = [v for u in d.units for v in getattr(u, field)]
    axes.set_ylim(max(-1.02, min([0.0, *values]) - 0.03), 1.04)
    axes.set_xlabel("examples of the unit")


def _needed(sheet: Sheet, d: Calibration, top: float) -> None:
    """Sorted: a mark per unit at what it needs, a dash at what it has; units without a signal stand at the right end."""
    theme = sheet.theme
    axes = sheet.axes(62, top, WIDTH - 76, 200, f"Examples that each unit needs for a reliability of {d.wanted:g}", "y")
    order = sorted(d.units, key=lambda u: (u.needed is None, u.needed or 0, u.unit))
    known = [u.needed for u in order if u.needed is not None and u.needed > 0]
    if sizes := [*known, *(u.rows for u in order if u.rows > 0)]:
        logarithmic(axes, "y", sizes)
    if len(known) < len(order):
        axes.set_ylim(top=axes.get_ylim()[1] * 1.9)
    height = axes.get_ylim()[1] / 1.3
    size = 6.0 if len(order) <= 60 else 3.6
    for x, u in enumerate(order, start=1):
        enough = u.needed is not None and u.needed <= u.rows
        colour, mark = (theme.groups[0], "o") if enough else (theme.bad, "^") if u.needed is not None else (theme.bad, "X")
        axes.plot(x, u.rows, "_", color=theme.soft, markersize=size + 1, zorder=1)
        (dot,) = axes.plot(x, max(1, u.needed) if u.needed is not None else height, mark, color=colour, markersize=size)
        tip(dot, f"{u.unit}: {'no signal' if u.needed is None else f'needs {u.needed}'}, has {u.rows}")
    axes.set_ylabel("examples")
    axes.set_xlim(0.2, max(len(order), 1) + 0.8)
    if len(order) > NAMED_UNITS:
        axes.set_xlabel("units, least demanding first")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    else:
        axes.set_xticks(range(1, len(order) + 1), [shorten(u.unit, NAME) for u in order], rotation=90, fontsize=9)
    marks = [("o", theme.groups[0], "has enough"), ("^", theme.bad, "has too few"), ("_", theme.soft, "rows it has")]
    if any(u.needed is None for u in order):
        marks.append(("X", theme.bad, "no signal, at the top"))
    sheet.legend(62, top + 200 + _below(d), WIDTH - 76, [(Line2D([], [], linestyle="", marker=m, color=c, markersize=7), words)
                                                  for m, c, words in marks])


# ---- map -------------------------------------------------------------------------------------------------------------


def _units(d: GradientMap) -> list[MapPoint]:
    return [p for p in d.points if p.role == "unit"]


def _named(d: GradientMap) -> bool:
    return len(_units(d)) <= LABELLED_UNITS


def _names_height(d: GradientMap) -> float:
    return 0.62 * _name_size(d) * max((len(shorten(p.name, NAME)) for p in _units(d)), default=0) + 20 if _named(d) else 30.0


def _name_size(d: GradientMap) -> float:
    return 9.0 if len(_units(d)) <= 40 else 8.0


def _map_keys(d: GradientMap, theme: Theme = LIGHT) -> list[tuple[Line2D, str]]:
    groups = sorted({p.group for p in _units(d) if p.group is not None})
    entries = [group_key(theme, g) for g in groups[:24]]
    if any(p.group is None for p in _units(d)):
        entries.append(group_key(theme, None))
    if any(p.role == "branch" for p in d.points):
        entries.append((Line2D([], [], linestyle="", marker="o", markersize=11, markerfacecolor="none", color=theme.ink,
                               markeredgewidth=1.6), "branch (ring)"))
    if any(p.role == "merged" for p in d.points):
        entries.append((_merged_key(theme), "merged"))
    if d.no_direction is not None:
        entries.append((Line2D([], [], linestyle="", marker="+", markersize=12, markeredgewidth=2.2, color=theme.ink),
                        NO_DIRECTION))
    return entries


def _merged_key(theme: Theme) -> Line2D:
    return Line2D([], [], linestyle="", marker="h", markersize=13, color=theme.ink, markeredgecolor=theme.paper)


def map_height(d: GradientMap) -> float:
    legend = legend_height([label for _, label in _map_keys(d)], WIDTH - 74)
    return 34 + 320 + 48 + legend + (64 + 170 + _names_height(d) if d.linkage else 0) + 8


def draw_map(sheet: Sheet, d: GradientMap) -> None:
    """PCA and t-SNE side by side, coloured and shaped by group; below, the tree of the units."""
    share = [f", {v:.0%} of the variance" for v in d.explained[:2]] + ["", ""]
    both = any(p.tsne is not None for p in d.points)
    wide = 330.0 if both else 480.0
    axes = sheet.axes(62, 34, wide, 320, "Principal components")
    if d.no_direction is not None:
        (mark,) = axes.plot(*d.no_direction, "+", color=sheet.theme.ink, markersize=12, markeredgewidth=2.2, zorder=6)
        tip(mark, f"{NO_DIRECTION}: cosine 0 with every unit")
    _scatter(axes, sheet.theme, [(p, p.pca) for p in d.points])
    axes.set_xlabel(f"axis 1{share[0]}")
    axes.set_ylabel(f"axis 2{share[1]}")
    if both:
        right = sheet.axes(62 + wide + 66, 34, wide, 320, "t-SNE (only neighbourhoods mean something)")
        _scatter(right, sheet.theme, [(p, p.tsne) for p in d.points if p.tsne is not None])
        right.set_xticks([])
        right.set_yticks([])
        models = any(p.role != "unit" for p in d.points)
        right.set_xlabel("arbitrary scale" + ("; the place of a model whose\ncosines with the units are small says little"
                                              if models else ""))
        for spine in right.spines.values():
            spine.set_visible(True)
    entries = _map_keys(d, sheet.theme)
    sheet.legend(62, 34 + 320 + 50, WIDTH - 74, entries)
    if d.linkage:
        top = 34 + 320 + 48 + legend_height([label for _, label in entries], WIDTH - 74) + 64
        _tree(sheet.axes(62, top, WIDTH - 76, 170, "Tree of the units (average linkage)", "y"), sheet.theme, d)


def _scatter(axes: Axes, theme: Theme, points: Sequence[tuple[MapPoint, tuple[float, float]]]) -> None:
    units = [(p, xy) for p, xy in points if p.role == "unit"]
    size = 6.5 if len(units) <= 60 else 4.5
    for p, (x, y) in units:
        (mark,) = axes.plot(x, y, marker(p.group), color=theme.group(p.group), markeredgecolor=theme.paper,
                            markersize=size * EVEN.get(marker(p.group), 1.0), markeredgewidth=0.5)
        tip(mark, p.name + ("" if p.group is None else f" (group {p.group})"))
    large = [(p, xy) for p, xy in points if p.role != "unit"]
    for p, (x, y) in large:
        k = branch_number(p.name) if p.group is None else p.group
        if p.role == "branch":
            (mark,) = axes.plot(x, y, marker(k), color=theme.group(k), markeredgecolor=theme.ink, zorder=4,
                                markersize=10 * EVEN.get(marker(k), 1.0), markeredgewidth=1.8)
        else:
            (mark,) = axes.plot(x, y, "h", color=theme.ink, markersize=14, markeredgecolor=theme.paper, zorder=5)
        tip(mark, p.name)
    axes.margins(0.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_aspect("equal", adjustable="datalim")
    axes.apply_aspect()  # now, not when it is drawn: labels are placed in pixels
    if large:
        where = np.array([xy for _, xy in large])
        marks = where if len(units) > 60 else np.array([xy for _, xy in points])  # a cloud cannot be kept clear of
        place_labels(axes, where, [shorten(p.name, 20) for p, _ in large], marks, theme.ink, theme.soft, size=9)
        for text in axes.texts:
            text.set_bbox({"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.4})


def _tree(axes: Axes, theme: Theme, d: GradientMap) -> None:
    """Joins at their distance; a branch of the tree has its group's colour while all units below it share one."""
    units, joins = _units(d), d.linkage
    order = leaves_list(np.array(joins, dtype=np.float64)).tolist()
    place: dict[int, float] = {int(leaf): float(i) for i, leaf in enumerate(order)}
    height: dict[int, float] = dict.fromkeys(place, 0.0)
    group: dict[int, int | None] = {i: u.group for i, u in enumerate(units)}
    lines, colours = [], []
    for i, (a, b, distance, _) in enumerate(joins):
        joint = len(units) + i
        lines.append([(place[a], height[a]), (place[a], distance), (place[b], distance), (place[b], height[b])])
        group[joint] = group[a] if group[a] == group[b] else None
        colours.append(theme.group(group[joint]))
        place[joint], height[joint] = (place[a] + place[b]) / 2, distance
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.2 if len(units) <= 120 else 0.8))
    top = max(distance for _, _, distance, _ in joins) or 1.0
    axes.set(xlim=(-0.8, len(units) - 0.2), ylim=(0, top * 1.06))
    axes.set_ylabel("distance, 1 − cosine")
    axes.spines["bottom"].set_visible(False)
    _leaves(axes, theme, units, place, _name_size(d))


def _leaves(axes: Axes, theme: Theme, units: Sequence[MapPoint], place: Mapping[int, float], size: float) -> None:
    """Under each leaf its group's mark and its name; a strip of colour alone where there are too many to read."""
    axes.set_xticks([])
    if len(units) > LABELLED_UNITS:
        for i, u in enumerate(units):
            strip = axes.add_patch(Rectangle((place[i] - 0.5, -0.08), 1, 0.06, transform=axes.get_xaxis_transform(),
                                             color=theme.group(u.group), linewidth=0.2, clip_on=False))
            tip(strip, u.name)
        axes.annotate(f"{len(units)} units; the strip shows their groups", (0, 0), (0, -18), xycoords="axes fraction",
                      textcoords="offset points", va="top", fontsize=9.5, color=theme.soft)
        return
    for i, u in enumerate(units):
        axes.plot(place[i], -0.03, marker(u.group), color=theme.group(u.group), markersize=5, clip_on=False,
                  transform=axes.get_xaxis_transform())
        name = axes.annotate(shorten(u.name, NAME), (place[i], -0.03), (0, -6), xycoords=("data", "axes fraction"),
                             textcoords="offset points", rotation=90, ha="center", va="top", fontsize=size, color=theme.ink)
        tip(name, u.name)
