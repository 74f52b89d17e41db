"""The report's pictures, drawn on matplotlib axes: once as theme-neutral SVG for the page, once as PNG.

In the SVG every colour is a placeholder that becomes a CSS variable, so one picture serves light and dark; text stays
text. Nothing here depends on the clock or on pyplot's global state.

    T   units of the mixture     R   axes that were kept
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from anabranch.artifacts import ArmSummary, BranchManifest, Conflict, write_atomically
from anabranch.report.contents import PLACE_WORDS, Contents, clean, read_contents, shorten
from anabranch.report.labels import place_labels
from anabranch.report.verdict import Difference, signed
from anabranch.scores import macro_loss

MARKERS = "os^DvPX*"
DASHES = ("-", "--", "-.", ":")
Box = tuple[float, float, float, float]  # left, bottom, width, height as shares of the figure
LABELLED_UNITS = 60  # more rows than this and the heat map carries no names
CURVE_POINTS = 300


@dataclass(frozen=True)
class Theme:
    """Colours by role. Group colours: Okabe and Ito's, tuned to 3:1 against the paper; markers differ as well."""

    paper: str
    card: str
    ink: str
    soft: str
    line: str
    good: str
    bad: str
    mixed: str
    groups: tuple[str, ...]

    def group(self, group: int | None) -> str:
        return self.soft if group is None else self.groups[group % len(self.groups)]


LIGHT = Theme("#ffffff", "#f5f6f8", "#1b1f24", "#59636e", "#d5dae0", "#0a7a55", "#b3400a", "#8a6100",
              ("#0072b2", "#d55e00", "#009e73", "#b5508f", "#2f9fd8", "#a87b00", "#5a4fcf", "#6b7280"))
DARK = Theme("#14171a", "#1e2226", "#e8eaed", "#a3abb4", "#3a4149", "#4ccf9f", "#ff9a66", "#e3b341",
             ("#4aa8e8", "#ff8a3d", "#2fcf9d", "#e58fc4", "#8fd0f5", "#e3c04a", "#a79ef5", "#9aa3ad"))
_ROLES = ("paper", "card", "ink", "soft", "line", "good", "bad", "mixed")
_PLACEHOLDER = {role: f"#fe01{i:02x}" for i, role in enumerate(_ROLES)}
_GROUP_PLACEHOLDER = tuple(f"#fe02{i:02x}" for i in range(len(LIGHT.groups)))
NEUTRAL = Theme(**_PLACEHOLDER, groups=_GROUP_PLACEHOLDER)
# Both ends stand out from white and from near-black paper; zero lets the paper through.
ALIKE, OPPOSED = "#1f77b8", "#d9581a"


def css_variables(theme: Theme) -> str:
    """`--ink:#...;` and so on, for the page's style sheet."""
    roles = [f"--{role}:{getattr(theme, role)}" for role in _ROLES]
    return ";".join([*roles, *(f"--g{i}:{colour}" for i, colour in enumerate(theme.groups))])


def _diverging() -> ListedColormap:
    value = np.linspace(-1, 1, 129)
    colours = np.where(value[:, None] < 0, to_rgb(OPPOSED), to_rgb(ALIKE))
    return ListedColormap(np.column_stack([colours, np.abs(value) ** 0.75]))


@contextmanager
def settings() -> Iterator[None]:
    """Fonts and the like for everything drawn inside; pyplot's own are left alone."""
    rc = {"font.family": "DejaVu Sans", "font.size": 10.5, "svg.fonttype": "none", "text.parse_math": False,
          "axes.spines.top": False, "axes.spines.right": False, "axes.unicode_minus": True, "path.simplify": True,
          "axes.titlesize": 10.5, "axes.labelsize": 10.5, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5}
    with matplotlib.rc_context(rc), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # a glyph that the measuring font lacks
        yield


def svg(name: str, alt: str, draw: Callable[[Figure, Theme], None], size: tuple[float, float]) -> str:
    """An inline `<svg>` that scales with its container. `name` keeps its ids apart from other figures'."""
    with settings(), matplotlib.rc_context({"svg.hashsalt": f"anabranch {name}"}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        FigureCanvasAgg(figure)
        figure.patch.set_visible(False)
        draw(figure, NEUTRAL)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(file.getvalue(), name, alt, size)


def _inline(text: str, name: str, alt: str, size: tuple[float, float]) -> str:
    text = text[text.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">") + 1:], flags=re.S)
    body = re.sub(r' id="tip-([0-9a-f]*)">',
                  lambda m: f"><title>{html.escape(bytes.fromhex(m[1]).decode())}</title>", body)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for role, colour in _PLACEHOLDER.items():
        body = body.replace(colour, f"var(--{role})")
    for i, colour in enumerate(_GROUP_PLACEHOLDER):
        body = body.replace(colour, f"var(--g{i})")
    body = re.sub(r"\n\s*", "\n", body.replace("'DejaVu Sans'", "system-ui,sans-serif")).replace("xlink:href", "href")
    label = html.escape(clean(alt), quote=True)
    return (f'<svg viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{label}" '
            f'style="--w:{size[0]:g}px">{body}')


def tip(artist: Any, text: str) -> None:
    """What a pointer resting on the mark is told; in hex on its way through matplotlib, so that no name is markup."""
    artist.set_gid("tip-" + clean(text).encode().hex())


def dress(axes: Axes, theme: Theme, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Axes in the theme's colours, quiet; the figures are what should stand out."""
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(theme.line)
    axes.tick_params(colors=theme.line, labelcolor=theme.soft, length=3)
    axes.xaxis.label.set_color(theme.soft)
    axes.yaxis.label.set_color(theme.soft)
    axes.title.set_color(theme.ink)
    if grid:
        axes.grid(axis=grid, color=theme.line, linewidth=0.6)
        axes.set_axisbelow(True)


def heat_order(matrix: np.ndarray) -> np.ndarray:
    """A permutation of the rows that puts like beside like: leaves of average linkage on 1 - similarity.

    Args:
        matrix: similarities in [-1, 1], float [T, T].
    """
    units = len(matrix)
    if units < 3:
        return np.arange(units)
    distance = 1.0 - (matrix + matrix.T) / 2
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(np.clip(distance, 0.0, None), checks=False), "average", optimal_ordering=units <= 400)
    return np.asarray(leaves_list(tree))


def heat_size(units: int) -> tuple[float, float]:
    """Width and height of the heat map, in CSS pixels at scale one."""
    if units > LABELLED_UNITS:
        return 460.0, 490.0
    side = max(220.0, units * (15.0 if units <= 36 else 11.5))
    return side + 212.0, side + 86.0


def draw_heat_map(figure: Figure, theme: Theme, contents: Contents, box: Box | None = None) -> None:
    """Cosines in clustered order, with group bars left and above; named rows where they stay legible."""
    assert contents.conflict is not None
    matrix, units = contents.matrix, contents.conflict.units
    order, count = heat_order(matrix), len(units)
    named = count <= LABELLED_UNITS and box is None
    width, height = heat_size(count)
    bar = 9 / (72 * figure.get_figwidth())
    start, side = (180, width - 212) if named else (24, width - 60)
    left, bottom, w, h = box or (start / width, 48 / height, side / width, side / height)
    axes = figure.add_axes((left, bottom, w, h))
    shades = axes.imshow(matrix[np.ix_(order, order)], cmap=_diverging(), vmin=-1, vmax=1, interpolation="none",
                         aspect="auto")
    dress(axes, theme)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
    _group_bars(figure, theme, contents, order, (left, bottom, w, h), bar, named)
    if named:
        _row_names(axes, theme, [units[i] for i in order])
    scale = figure.add_axes((left, bottom - 18 / height, w, 9 / height))
    bar_axis = figure.colorbar(shades, cax=scale, orientation="horizontal", ticks=[-1, -0.5, 0, 0.5, 1])
    bar_axis.outline.set_edgecolor(theme.line)
    dress(scale, theme)
    scale.set_xticklabels(["−1 opposed", "−0.5", "0", "0.5", "alike 1"])
    scale.get_xticklabels()[0].set_horizontalalignment("left")
    scale.get_xticklabels()[-1].set_horizontalalignment("right")


def _group_bars(figure: Figure, theme: Theme, contents: Contents, order: np.ndarray,
                frame: Box, bar: float, named: bool) -> None:
    """Strips in group colours beside the rows and above the columns; each row's patch tells its unit."""
    assert contents.conflict is not None
    left, bottom, w, h = frame
    thick = bar * figure.get_figwidth() / figure.get_figheight()
    rows = figure.add_axes((left - bar * 1.3, bottom, bar, h))
    columns = figure.add_axes((left, bottom + h + thick * 0.3, w, thick))
    count, groups = len(order), contents.groups
    for at, row in enumerate(order):
        unit = contents.conflict.units[row]
        group = groups.get(unit)
        colour = theme.group(group)
        patch = rows.add_patch(Rectangle((0, at), 1, 1, color=colour, linewidth=0.4))
        tip(patch, f"{at + 1}. {unit}" + ("" if group is None else f" (group {group})"))
        columns.add_patch(Rectangle((at, 0), 1, 1, color=colour, linewidth=0.4))
    rows.set(xlim=(0, 1), ylim=(count, 0))
    columns.set(xlim=(0, count), ylim=(0, 1))
    for axes in (rows, columns):
        axes.axis("off")
    if named:
        step = 1 if count <= 36 else 5
        for at in range(count):
            if at == 0 or (at + 1) % step == 0:
                columns.text(at + 0.5, 1.5, str(at + 1), ha="center", va="bottom", color=theme.soft, fontsize=7.5)


def _row_names(axes: Axes, theme: Theme, units: Sequence[str]) -> None:
    size = 9.0 if len(units) <= 36 else 8.0
    for at, unit in enumerate(units):
        text = axes.annotate(f"{shorten(unit, 26)}\u2002{at + 1}", (0, at), xycoords=("axes fraction", "data"),
                             xytext=(-16, 0), textcoords="offset points", ha="right", va="center", fontsize=size,
                             color=theme.ink)
        tip(text, unit)


def draw_map(axes: Axes, theme: Theme, contents: Contents) -> None:
    """Scores on the first two axes, coloured and shaped by group; the units farthest out are named."""
    assert contents.conflict is not None
    conflict, scores = contents.conflict, contents.tensors["scores"].astype(np.float64)
    xy = np.zeros((len(conflict.units), 2))
    xy[:, : min(2, scores.shape[1])] = scores[:, :2]
    groups = contents.groups
    dress(axes, theme)
    axes.axhline(0, color=theme.line, linewidth=0.8, zorder=0)
    axes.axvline(0, color=theme.line, linewidth=0.8, zorder=0)
    size = 6.5 if len(xy) <= 60 else 4.5
    for (x, y), unit in zip(xy, conflict.units, strict=True):
        group = groups.get(unit)
        (mark,) = axes.plot(x, y, marker(group), color=theme.group(group), markersize=size,
                            markeredgecolor=theme.paper, markeredgewidth=0.6)
        tip(mark, unit + ("" if group is None else f" (group {group})"))
    axes.margins(0.12)
    share = [f", {value:.0%} of the variance" for value in conflict.explained[:2]] + ["", ""]
    axes.set_xlabel(f"axis 1{share[0]}")
    axes.set_ylabel(f"axis 2{share[1]}")
    _legend(axes, theme, sorted({g for g in groups.values() if g is not None}))
    extremes = sorted({int(i) for k in range(2) for i in (*np.argsort(xy[:, k])[:2], *np.argsort(xy[:, k])[-2:])})
    place_labels(axes, xy[extremes], [shorten(conflict.units[i], 22) for i in extremes], xy, theme.ink, theme.soft)


def marker(group: int | None) -> str:
    """A group's mark: colour and mark together repeat only after 64 groups."""
    return MARKERS[0 if group is None else (group + group // len(MARKERS)) % len(MARKERS)]


def _legend(axes: Axes, theme: Theme, groups: Sequence[int]) -> None:
    if not groups or len(groups) > 12:
        return
    marks = [Line2D([], [], linestyle="", marker=marker(g), color=theme.group(g), markersize=6)
             for g in groups]
    axes.legend(marks, [f"group {g}" for g in groups], ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0),
                frameon=False, labelcolor=theme.soft, fontsize=9.5, handletextpad=0.2, columnspacing=1.2)


def draw_spectrum(axes: Axes, theme: Theme, conflict: Conflict) -> None:
    """Share of variance by axis, the first twelve."""
    shown = conflict.explained[:12]
    dress(axes, theme, "y")
    bars = axes.bar(range(1, len(shown) + 1), [100 * v for v in shown], color=theme.groups[0], width=0.7)
    for i, (bar, value) in enumerate(zip(bars, shown, strict=True)):
        tip(bar, f"axis {i + 1}: {value:.1%}")
        if i < 4:
            axes.text(i + 1, 100 * value, f"{value:.0%}", ha="center", va="bottom", color=theme.ink, fontsize=9.5)
    axes.set_xlabel("axis")
    axes.set_ylabel("share of variance, %")
    axes.set_xticks(range(1, len(shown) + 1))


def draw_reliability(axes: Axes, theme: Theme, conflict: Conflict) -> None:
    """Each unit's split-half reliability, lowest first; units at or below zero stand out in colour and shape."""
    order = np.argsort(np.array(conflict.reliability), kind="stable")
    dress(axes, theme, "y")
    axes.axhline(0, color=theme.soft, linewidth=0.8)
    for at, i in enumerate(order):
        value = conflict.reliability[i]
        bad = conflict.units[i] in conflict.unreliable
        (mark,) = axes.plot(at + 1, max(value, -1.0), "X" if bad else "o", color=theme.bad if bad else theme.groups[0],
                            markersize=5 if bad else 3.5)
        tip(mark, f"{conflict.units[i]}: {value:.2f}")
    axes.set_xlabel("units, lowest first")
    axes.set_ylabel("reliability")
    axes.set_ylim(min(-0.05, max(-1.05, min(conflict.reliability, default=0.0) - 0.1)), 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def draw_composition(axes: Axes, theme: Theme, contents: Contents) -> None:
    """Three stacked bars: each group's share of units, samples and tokens."""
    assert contents.plan is not None
    groups = contents.plan.groups
    dress(axes, theme)
    for y, name in enumerate(("tokens", "samples", "units")):
        values = np.array([getattr(g, name) for g in groups], dtype=np.float64)
        share = values / max(values.sum(), 1.0)
        start = 0.0
        for group, part in zip(groups, share, strict=True):
            (bar,) = axes.barh(y, part, left=start, color=theme.group(group.group), height=0.62, edgecolor=theme.paper,
                               linewidth=1.0)
            tip(bar, f"group {group.group}: {getattr(group, name):,} {name}, {part:.1%}")
            if part >= 0.09:
                axes.text(start + part / 2, y, f"{group.group}: {part:.0%}", ha="center", va="center",
                          color=theme.paper, fontsize=9.5, fontweight="bold")
            start += part
    axes.set_yticks(range(3), ["tokens", "samples", "units"])
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_losses(axes: Axes, theme: Theme, branches: Mapping[int, BranchManifest]) -> None:
    """Training loss by optimizer step, one line per branch; long logs averaged down to CURVE_POINTS."""
    dress(axes, theme, "y")
    for k, branch in branches.items():
        if not branch.losses:
            continue
        steps, values = np.array(branch.losses, dtype=np.float64).T
        if len(steps) > CURVE_POINTS:
            steps, values = (np.array([p.mean() for p in np.array_split(a, CURVE_POINTS)]) for a in (steps, values))
        (line,) = axes.plot(steps, values, DASHES[k % len(DASHES)], color=theme.group(k), linewidth=1.6,
                            label=f"branch {k}")
        tip(line, f"branch {k}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, nats per token")
    if 1 <= len(branches) <= 12:
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, labelcolor=theme.soft,
                    fontsize=9.5, handlelength=2.2, columnspacing=1.0, handletextpad=0.5)


def draw_differences(axes: Axes, theme: Theme, found: Sequence[Difference]) -> None:
    """One row per place: a dot per unit, loss of the merged model minus the base's, and the mean with its interval."""
    dress(axes, theme, "x")
    axes.axvline(0, color=theme.soft, linewidth=1.0)
    for y, place in enumerate(reversed(found)):
        for unit, value in sorted(place.by_unit.items()):
            lift = int(hashlib.sha256(unit.encode("utf-8", "replace")).hexdigest()[:4], 16) / 65535 - 0.5
            won = value < 0
            (mark,) = axes.plot(value, y + 0.12 + 0.38 * (lift + 0.5), "o" if won else "^", markersize=4,
                                color=theme.good if won else theme.bad, alpha=0.75, markeredgewidth=0)
            tip(mark, f"{unit}: {signed(value)}")
        if place.low is not None and place.high is not None:
            axes.plot([place.low, place.high], [y, y], color=theme.ink, linewidth=2.4, solid_capstyle="butt")
        (mean,) = axes.plot(place.mean, y, "D", color=theme.ink, markersize=6)
        tip(mean, f"mean: {signed(place.mean)}")
    axes.set_yticks(range(len(found)), [PLACE_WORDS[d.place] for d in reversed(found)])
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    axes.set_ylim(-0.3, len(found) - 0.3)
    axes.set_xlabel("merged minus base, nats per token (left of 0: better)")


@dataclass(frozen=True)
class TradePoint:
    """An arm (or a model of one run) between learning and keeping; losses in nats per token, intervals if known."""

    name: str
    held_out: float
    retention: float
    intervals: tuple[tuple[float, float], tuple[float, float]] | None = None
    seeds: tuple[tuple[float, float], ...] = ()

    @property
    def family(self) -> str:
        head = self.name.split(":")[0].split("-")[0]
        return {"merit": "ours", "merged": "ours", "base": "base", "branch": "branch"}.get(
            head, "joint" if head.startswith("joint") else "other")


_FAMILY = {"ours": (0, "o", 9), "joint": (1, "s", 7), "other": (2, "^", 7), "branch": (7, "v", 5), "base": (7, "D", 7)}


def trade_points(contents: Contents) -> list[TradePoint]:
    """The comparison's arms; without one, the run's own models. Only what was scored at both places."""
    if contents.comparison is None:
        pairs = {name: (macro_loss(e.held_out), macro_loss(e.retention)) for name in contents.models
                 for e in [contents.evaluations[name]]}
        return [TradePoint(name, h, r) for name, (h, r) in pairs.items() if h is not None and r is not None]
    table = {(row.arm, row.place): row for row in contents.comparison.summary}
    points = []
    for arm in dict.fromkeys(row.arm for row in contents.comparison.summary):
        held, kept = table.get((arm, "held_out")), table.get((arm, "retention"))
        if held and kept:
            points.append(TradePoint(arm, held.loss, kept.loss,
                                     (_ends(held), _ends(kept)),
                                     tuple(zip(held.loss_by_seed, kept.loss_by_seed, strict=False))))
    return points


def _ends(row: ArmSummary) -> tuple[float, float]:
    """The ends of a row's interval; the mean twice where there were too few units for one."""
    return (row.loss if row.loss_low is None else row.loss_low, row.loss if row.loss_high is None else row.loss_high)


def draw_trade(axes: Axes, theme: Theme, points: Sequence[TradePoint]) -> None:
    """Held-out loss across, retention loss up; towards the lower left is better in both. Faint marks: single seeds."""
    dress(axes, theme, "both")
    crosses: list[tuple[float, float]] = []
    for p in points:
        hue, marker, size = _FAMILY[p.family]
        colour = theme.groups[hue] if p.family != "base" else theme.ink
        if p.intervals:
            (x0, x1), (y0, y1) = p.intervals
            axes.plot([x0, x1], [p.retention] * 2, color=colour, linewidth=1.0, alpha=0.6)
            axes.plot([p.held_out] * 2, [y0, y1], color=colour, linewidth=1.0, alpha=0.6)
            crosses += [(x, p.retention) for x in np.linspace(x0, x1, 9)]
            crosses += [(p.held_out, y) for y in np.linspace(y0, y1, 9)]
        if len(p.seeds) > 1:
            axes.plot(*np.array(p.seeds).T, marker, color=colour, markersize=size * 0.45, alpha=0.45, markeredgewidth=0)
        (mark,) = axes.plot(p.held_out, p.retention, marker, color=colour, markersize=size, markeredgecolor=theme.paper,
                            markeredgewidth=0.8, zorder=4)
        tip(mark, f"{p.name}: held-out {p.held_out:.3f}, retention {p.retention:.3f}")
    axes.margins(0.14)
    axes.set_xlabel("← better · held-out loss, nats per token")
    axes.set_ylabel("← better · retention loss, nats per token")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6))
    where = np.array([(p.held_out, p.retention) for p in points])
    place_labels(axes, where, [shorten(p.name, 22) for p in points], where, theme.ink, theme.soft, size=9.5,
                 lines=np.array(crosses) if crosses else None)


def summary_picture(run: Path, out: Path) -> None:
    """One PNG, 1600 x 560 pixels: conflict heat map, map of the units, and the trade between learning and keeping.

    A panel whose stage is not done says so.

    Raises:
        OutputError: no run folder there, or `out` cannot be written.
        CorruptedError: a damaged artifact.
    """
    contents = read_contents(run)
    with settings():
        figure = Figure(figsize=(16, 5.6), dpi=100, facecolor=LIGHT.paper)
        FigureCanvasAgg(figure)
        figure.text(0.02, 0.94, "Conflict between units", fontsize=14, color=LIGHT.ink, parse_math=False)
        figure.text(0.36, 0.94, "Where the conflict lies, and the split", fontsize=14, color=LIGHT.ink)
        figure.text(0.705, 0.94, "Learning the mixture against keeping the base", fontsize=14, color=LIGHT.ink)
        if contents.conflict is not None:
            draw_heat_map(figure, LIGHT, contents, (0.032, 0.12, 0.27, 0.27 * 1600 / 560))
            draw_map(figure.add_axes((0.39, 0.13, 0.265, 0.70)), LIGHT, contents)
        else:
            figure.text(0.02, 0.5, "not measured yet", fontsize=12, color=LIGHT.soft)
            figure.text(0.36, 0.5, "not measured yet", fontsize=12, color=LIGHT.soft)
        if len(points := trade_points(contents)) > 1:
            draw_trade(figure.add_axes((0.745, 0.13, 0.245, 0.74)), LIGHT, points)
        else:
            figure.text(0.705, 0.5, "not evaluated yet", fontsize=12, color=LIGHT.soft)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    write_atomically(out, file.getvalue())
