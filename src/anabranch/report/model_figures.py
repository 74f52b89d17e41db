"""Pictures of models: what lies between them, the loss around them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from anabranch.diagnose.artifacts import (
    FittedModel,
    Generalization,
    LinearModeConnectivity,
    LossSurface,
    Perturbation,
    PerturbationCurve,
    Segment,
)
from anabranch.report.canvas import (
    CHARACTER,
    LEGEND_ROW,
    WIDTH,
    Look,
    Sheet,
    cycle,
    key,
    legend_height,
    logarithmic,
    look,
    spans_orders,
    whiskers,
)
from anabranch.report.contents import shorten
from anabranch.report.diagnostics import NOISES, fitted_name, is_barrier, lowest, main_rows, rows_name, segment_kind
from anabranch.report.figures import dress, tip
from anabranch.report.labels import place_labels
from anabranch.scores import TIE

LOSS = "loss, nats per response token"
NAMED_LINES = 6  # more segments in one panel are drawn faint, the highest barrier alone in colour
KIND_ORDER = ("branch–branch", "branch–merged", "base–merged", "base–branch", "joint–merged")
BARRIER_ROWS = 45
BARRIER_COLUMNS = 9
BARRIER_ROW = 15.0
LMC_TOP = 56.0  # of the curves: above them their titles and what the losses are over
LEAST_RANGE = 0.01  # nats; the barriers' axis is never narrower, or rounding would look like a ridge


# ---- connectivity ----------------------------------------------------------------------------------------------------


def _kinds(d: LinearModeConnectivity) -> dict[str, list[Segment]]:
    """Segments on the main rows by kind, in the order of KIND_ORDER."""
    rows = main_rows(d)
    found = {kind: [s for s in d.segments if s.rows == rows and segment_kind(s) == kind] for kind in KIND_ORDER}
    return {kind: segments for kind, segments in found.items() if segments}


def _name(segment: Segment) -> str:
    return shorten(f"{segment.start} – {segment.end}", 34)


def _line_entries(segments: Sequence[Segment]) -> list[str]:
    if len(segments) <= NAMED_LINES:
        return [_name(s) for s in segments]
    return [f"highest: {_name(max(segments, key=lambda s: s.barrier))}", f"{len(segments) - 1} others"]


def _panels(count: int) -> list[tuple[float, float]]:
    """Left edge and width of `count` panels that share the y axis of the first."""
    width = (WIDTH - 62 - 12 - 14 * (count - 1)) / max(count, 1)
    return [(62 + i * (width + 14), width) for i in range(count)]


def _barrier_table(d: LinearModeConnectivity) -> tuple[list[tuple[str, str]], list[str], bool]:
    """Pairs (rows of the dot plot), sets of rows (its columns), and whether any were left out: the lowest go first."""
    order = {kind: i for i, kind in enumerate(KIND_ORDER)}
    height: dict[tuple[str, str], float] = {}
    rank: dict[tuple[str, str], tuple[int, int]] = {}
    by_rows: dict[str, float] = {}
    for i, s in enumerate(d.segments):
        pair = (s.start, s.end)
        height[pair] = max(height.get(pair, 0.0), s.barrier)
        rank.setdefault(pair, (order[segment_kind(s)], i))
        by_rows[s.rows] = max(by_rows.get(s.rows, 0.0), s.barrier)
    pairs = sorted(sorted(height, key=lambda p: -height[p])[:BARRIER_ROWS], key=lambda p: rank[p])
    first = main_rows(d)
    kept = set(sorted((r for r in by_rows if r != first), key=lambda r: -by_rows[r])[: BARRIER_COLUMNS - 1])
    columns = [first] * (first in by_rows) + [r for r in by_rows if r in kept]
    return pairs, columns, len(pairs) < len(height) or len(columns) < len(by_rows)


def lmc_height(d: LinearModeConnectivity) -> float:
    kinds = _kinds(d)
    if not kinds:
        return 60.0
    width = _panels(len(kinds))[0][1]
    legend = max(legend_height(_line_entries(s), width) for s in kinds.values())
    pairs, _, cut = _barrier_table(d)
    return LMC_TOP + 200 + 48 + legend + 60 + BARRIER_ROW * len(pairs) + 80 + 18 * cut


def draw_lmc(sheet: Sheet, d: LinearModeConnectivity) -> None:
    """Loss along the segments on the mixture, a panel per kind of segment; below, every barrier with its interval."""
    kinds = _kinds(d)
    if not kinds:
        sheet.words(62, 20, "No segment was measured.")
        return
    losses = [v for segments in kinds.values() for s in segments for v in s.losses]
    room = 0.06 * (max(losses) - min(losses)) or 0.01
    legend = 0.0
    for i, ((kind, segments), (left, width)) in enumerate(zip(kinds.items(), _panels(len(kinds)), strict=True)):
        axes = sheet.axes(left, LMC_TOP, width, 200, f"{kind}, {rows_name(main_rows(d))}", "y")
        entries = _segment_lines(axes, sheet, segments)
        axes.set(xlim=(-0.025, 1.025), ylim=(min(losses) - room, max(losses) + room))
        axes.set_xlabel("α, from the first to the second")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        if i:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel(LOSS)
        sheet.legend(left, LMC_TOP + 200 + 48, width, entries)
        legend = max(legend, legend_height([label for _, label in entries], width))
    if (blocks := d.blocks.get(main_rows(d))) is not None:
        sheet.words(62, 2, f"{rows_name(main_rows(d))}: {blocks} blocks of {d.settings.get('batch_rows', 8)} held-out rows, "
                    "every token with the same say (the evaluation: every unit)", WIDTH - 62)
    _draw_barriers(sheet, d, LMC_TOP + 200 + 48 + legend + 60)


def _segment_lines(axes: Axes, sheet: Sheet, segments: Sequence[Segment]) -> list[tuple[Line2D, str]]:
    theme, entries = sheet.theme, []
    few = len(segments) <= NAMED_LINES
    top = max(segments, key=lambda s: s.barrier)
    faint = Line2D([], [])
    for i, s in enumerate(segments):
        if few:
            colour, dash, mark = cycle(theme, i)
            (line,) = axes.plot(s.alphas, s.losses, dash, color=colour, marker=mark, markevery=(2 * i % 5, 5), markersize=4.5,
                                linewidth=1.5)
            entries.append((line, _name(s)))
        elif s is top:
            (line,) = axes.plot(s.alphas, s.losses, "--", color=theme.groups[1], linewidth=2, zorder=3)
            entries.insert(0, (line, f"highest: {_name(s)}"))
        else:
            (line,) = (faint,) = axes.plot(s.alphas, s.losses, color=theme.soft, linewidth=0.8, alpha=0.7)
        tip(line, f"{s.start} – {s.end}: barrier {s.barrier:.4f} at α = {s.at:.2f}")
    return entries if few else [*entries, (faint, f"{len(segments) - 1} others")]


def _draw_barriers(sheet: Sheet, d: LinearModeConnectivity, top: float) -> None:
    pairs, columns, cut = _barrier_table(d)
    place = {pair: len(pairs) - 1 - i for i, pair in enumerate(pairs)}
    labels = min(250.0, 14 + 6.0 * max(len(shorten(f"{a} – {b}", 38)) for a, b in pairs))
    first = 1.6 if len(columns) > 1 else 1.0
    unit = min(320.0, (WIDTH - labels - 16 - 10 * (len(columns) - 1)) / (first + len(columns) - 1))
    shown = [s for s in d.segments if (s.start, s.end) in place and s.rows in columns]
    low, high = min(0.0, *(s.low for s in shown)), max(LEAST_RANGE, *(max(s.high, s.barrier) for s in shown))
    pad = 0.07 * (high - low)
    sheet.words(labels, top - 40, "Barriers: largest rise above the line between both ends", WIDTH - labels, 10.5,
                sheet.theme.ink)
    left = labels
    for i, rows in enumerate(columns):
        width = unit * (first if i == 0 else 1.0)
        axes = sheet.axes(left, top, width, BARRIER_ROW * len(pairs) + 10, grid="x")
        axes.set_title(shorten(rows_name(rows), max(8, int(width / 6.4))), loc="left", fontsize=9.5, color=sheet.theme.soft)
        _barrier_dots(axes, sheet, [s for s in shown if s.rows == rows], place)
        axes.set(xlim=(low - pad, high + pad), ylim=(-0.8, len(pairs) - 0.2))
        axes.set_xticks(*_inner_ticks(low - pad, high + pad, width))
        axes.set_yticks(range(len(pairs)), [shorten(f"{a} – {b}", 38) for a, b in reversed(pairs)] if i == 0 else [])
        axes.tick_params(axis="y", length=0, labelcolor=sheet.theme.ink, labelsize=9)
        left += width + 10
    sheet.words(labels, top + BARRIER_ROW * len(pairs) + 34, "barrier, nats per response token    ● none to speak of"
                f"    ✖ above {TIE:g}, and its interval above 0", WIDTH - labels)
    sheet.words(labels, top + BARRIER_ROW * len(pairs) + 52, "Bars: 95 % intervals over blocks, for all segments at once",
                WIDTH - labels)
    if cut:
        sheet.words(labels, top + BARRIER_ROW * len(pairs) + 72, "Only the highest are drawn; the table has all.",
                    WIDTH - labels)


def _inner_ticks(low: float, high: float, width: float) -> tuple[list[float], list[str]]:
    """Round places on an axis `width` pixels wide, and their names: only those that stay clear of the next panel's."""
    values = [float(v) + 0.0 for v in MaxNLocator(nbins=max(1, int(width / 50)), steps=[1, 2, 5, 10]).tick_values(low, high)]
    names = [f"{v:g}".replace("-", "−") for v in values]
    at = [(v - low) / (high - low) * width for v in values]
    half = [CHARACTER / 2 * len(name) for name in names]
    clear = [i for i, x in enumerate(at) if x - half[i] >= -4 and x + half[i] <= width + 4]
    return [values[i] for i in clear], [names[i] for i in clear]


def _barrier_dots(axes: Axes, sheet: Sheet, segments: Sequence[Segment], place: dict[tuple[str, str], int]) -> None:
    theme = sheet.theme
    axes.axvline(0, color=theme.soft, linewidth=0.9)
    for s in segments:
        y, above = place[s.start, s.end], is_barrier(s)
        colour = theme.bad if above else theme.groups[0]
        whiskers(axes, s.barrier, y, min(s.low, s.barrier), max(s.high, s.barrier), colour, upright=False, width=1.2)
        (mark,) = axes.plot(s.barrier, y, "X" if above else "o", color=colour, markersize=6.5 if above else 4.5)
        tip(mark, f"{s.start} – {s.end}, {rows_name(s.rows)}: {s.barrier:.4f} ({s.low:.4f} to {s.high:.4f})")


# ---- surface ---------------------------------------------------------------------------------------------------------


def _plane_size(d: LossSurface) -> tuple[float, float]:
    """Pixels of the axes, in the plane's own proportions, within 620 x 500."""
    wide, tall = (max(v) - min(v) or 1.0 for v in (d.x, d.y))
    scale = min(620 / wide, 500 / tall)
    return max(120.0, wide * scale), max(120.0, tall * scale)


def surface_height(d: LossSurface) -> float:
    return 20 + _plane_size(d)[1] + 58


def draw_surface(sheet: Sheet, d: LossSurface) -> None:
    """Filled contours of the loss; models where they lie on the plane. Equal distances look equal."""
    theme = sheet.theme
    wide, tall = _plane_size(d)
    left = 62 + (WIDTH - 62 - wide - 110) / 2
    axes = sheet.axes(left, 20, wide, tall)
    losses = np.ma.masked_invalid(np.array(d.losses, dtype=np.float64))
    levels = _levels(d, losses)
    clipped = float(losses.max()) > levels[-1] + 1e-9
    filled = axes.contourf(d.x, d.y, losses, levels=levels, cmap="cividis", extend="max" if clipped else "neither")
    axes.contour(d.x, d.y, losses, levels=levels[1::2], colors="#ffffff", linewidths=0.5, alpha=0.5)
    bar = sheet.axes(left + wide + 24, 20, 14, tall)
    scale = sheet.figure.colorbar(filled, cax=bar, ticks=levels[::2])
    scale.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}".replace("-", "−")))
    scale.outline.set_edgecolor(theme.line)
    dress(bar, theme)
    bar.set_ylabel(f"{LOSS} ({shorten(rows_name(d.rows), 24)})")
    axes.set_aspect("equal")
    axes.set_xlabel(f"L2 distance in parameter space, from {shorten(d.corners[0], 20)} towards {shorten(d.corners[1], 20)}")
    axes.set_ylabel("L2 distance, at right angles")
    _mark_models(axes, sheet, d)


def _reach(d: LossSurface) -> float:
    """A model nearer to the plane than this is drawn as lying on it."""
    return 0.02 * float(np.hypot(max(d.x) - min(d.x), max(d.y) - min(d.y)))


def _levels(d: LossSurface, losses: np.ma.MaskedArray) -> np.ndarray:
    """Round values from the lowest loss to twice as far up as the models lie: what is above would hide their differences."""
    low, high = float(losses.min()), float(losses.max())
    models = [m.loss for m in d.marks if m.off <= _reach(d)]
    top = min(high, low + 2 * (max(models) - low)) if models and max(models) > low else high
    return np.asarray(MaxNLocator(15, steps=[1, 2, 2.5, 5, 10]).tick_values(low, max(top, low + 1e-6)))


def _mark_models(axes: Axes, sheet: Sheet, d: LossSurface) -> None:
    theme = sheet.theme
    x, y, loss = lowest(d)
    axes.plot(x, y, "+", color="#ffffff", markersize=11, markeredgewidth=3.4)
    axes.plot(x, y, "+", color="#000000", markersize=10, markeredgewidth=1.6)
    names = []
    for m in d.marks:
        _, mark, _, size, _ = look(theme, m.model)
        on = m.off <= _reach(d)
        axes.plot(m.x, m.y, mark, markersize=size + 1, markeredgewidth=4, color="none", markeredgecolor="#000000", zorder=6)
        (dot,) = axes.plot(m.x, m.y, mark, markersize=size + 1, markeredgewidth=1.6, zorder=6,
                           color="#ffffff" if on else "none", markeredgecolor="#ffffff")
        tip(dot, f"{m.model}: loss {m.loss:.4f}, {m.off:.2f} off the plane")
        names.append(f"{shorten(m.model, 22)} {m.loss:.3f}" + ("" if on else f" ({m.off:.1f} off the plane)"))
    places = np.array([(m.x, m.y) for m in d.marks] + [(x, y)])
    place_labels(axes, places, [*names, f"lowest of the grid {loss:.3f}"], places, theme.ink, "#ffffff", size=9.5)
    for text in axes.texts:
        text.set_bbox({"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.85, "pad": 0.6})


# ---- generalization --------------------------------------------------------------------------------------------------


def _series(models: Sequence[FittedModel]) -> dict[str, list[FittedModel]]:
    found: dict[str, list[FittedModel]] = {}
    for m in models:
        found.setdefault(m.model, []).append(m)
    return {name: sorted(group, key=lambda m: m.epochs if m.epochs is not None else -1.0) for name, group in found.items()}


def _has_epochs(d: Generalization) -> bool:
    return any(len({m.epochs for m in group if m.epochs is not None}) > 1 for group in _series(d.models).values())


def _unplaced(d: Generalization) -> str:
    unknown = [f"{shorten(fitted_name(m), 24)} {m.held_out:.3f}" for m in d.models if m.training is None]
    return f"Held-out loss alone is known of: {', '.join(unknown)}." if unknown else ""


def generalization_height(d: Generalization) -> float:
    return 30 + 340 + 52 + legend_height([*_series(d.models)], WIDTH - 74) + 24 + 30 * bool(_unplaced(d))


def draw_generalization(sheet: Sheet, d: Generalization) -> None:
    """Training loss across, held-out loss up, and the line where both are equal; beside it both by epochs."""
    theme, series = sheet.theme, _series(d.models)
    wide = 400.0 if _has_epochs(d) else WIDTH - 76
    axes = sheet.axes(62, 30, wide, 340, "Fitted against held out", "both")
    placed = [m for m in d.models if m.training is not None]
    for name, group in series.items():
        _fitted_points(axes, look(theme, name), [m for m in group if m.training is not None])
    axes.margins(0.16)
    if placed:
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
        axes.axline((0, 0), slope=1, color=theme.soft, linewidth=1, dashes=(5, 4), zorder=1)
        where = np.array([(m.training, m.held_out) for m in placed])
        place_labels(axes, where, [shorten(fitted_name(m), 24) for m in placed], where, theme.ink, theme.soft, size=9.5,
                     lines=_drawn(series, axes.get_xlim()))
    axes.set_xlabel("training loss, nats per response token")
    axes.set_ylabel("held-out loss, nats per response token")
    if _has_epochs(d):
        right = sheet.axes(62 + wide + 62, 30, WIDTH - 74 - wide - 62, 340, "By epochs", "y")
        for name, group in series.items():
            _by_epochs(right, look(theme, name), [m for m in group if m.epochs is not None])
        epochs = sorted({m.epochs for m in d.models if m.epochs is not None})
        right.set_xticks(epochs, [f"{e:g}" for e in epochs])
        right.set_xlabel("epochs (filled: held-out; hollow: training)")
        right.set_ylabel(LOSS)
    entries = [(key(look(theme, name)), shorten(name, 26)) for name in series]
    entries.append((Line2D([], [], color=theme.soft, linewidth=1, dashes=(5, 4)), "training = held-out"))
    sheet.legend(62, 30 + 340 + 56, WIDTH - 74, entries)
    if words := _unplaced(d):
        sheet.words(62, 30 + 340 + 56 + LEGEND_ROW + legend_height([*series], WIDTH - 74), words, WIDTH - 74)


def _drawn(series: dict[str, list[FittedModel]], across: tuple[float, float]) -> np.ndarray:
    """Points along the bars, the arrows and the diagonal, which names had better not lie on, [n, 2]."""
    lines = [((across[0], across[0]), (across[1], across[1]))]
    for group in series.values():
        known = [(m, m.training) for m in group if m.training is not None]
        lines += [((x, m.held_out_low), (x, m.held_out_high)) for m, x in known]
        lines += [((m.training_low or x, m.held_out), (m.training_high or x, m.held_out)) for m, x in known]
        lines += [((x, a.held_out), (y, b.held_out)) for (a, x), (b, y) in pairwise(known)]
    share = np.linspace(0, 1, 40)[:, None]
    return np.concatenate([(1 - share) * np.array([a]) + share * np.array([b]) for a, b in lines])


def _fitted_points(axes: Axes, here: Look, group: Sequence[FittedModel]) -> None:
    for m in group:
        assert m.training is not None
        whiskers(axes, m.training, m.held_out, m.held_out_low, m.held_out_high, here.colour)
        if m.training_low is not None and m.training_high is not None:
            whiskers(axes, m.training, m.held_out, m.training_low, m.training_high, here.colour, upright=False)
        (mark,) = axes.plot(m.training, m.held_out, here.marker, color=here.colour, markersize=here.size, zorder=3)
        tip(mark, f"{fitted_name(m)}: training {m.training:.3f}, held-out {m.held_out:.3f}")
    for a, b in pairwise(group):
        axes.annotate("", (b.training, b.held_out), (a.training, a.held_out), zorder=2,
                      arrowprops={"arrowstyle": "-|>", "color": here.colour, "linewidth": 1, "shrinkA": 5, "shrinkB": 5,
                                  "linestyle": "-"})


def _by_epochs(axes: Axes, here: Look, group: Sequence[FittedModel]) -> None:
    if not group:
        return
    epochs = [float(m.epochs or 0) for m in group]
    axes.plot(epochs, [m.held_out for m in group], here.dash, marker=here.marker, color=here.colour, linewidth=here.width,
              markersize=here.size * 0.8)
    whiskers(axes, epochs, [m.held_out for m in group], [m.held_out_low for m in group], [m.held_out_high for m in group],
             here.colour)
    known = [(m.epochs, m.training) for m in group if m.training is not None]
    if known:
        axes.plot(*zip(*known, strict=True), here.dash, marker=here.marker, color=here.colour, linewidth=here.width * 0.5,
                  markersize=here.size * 0.8, markerfacecolor="none")


# ---- perturbation ----------------------------------------------------------------------------------------------------


def _noise_panels(d: Perturbation) -> dict[str, list[PerturbationCurve]]:
    found = {noise: sorted((c for c in d.curves if c.noise == noise), key=lambda c: c.area) for noise in NOISES}
    return {noise: curves for noise, curves in found.items() if curves}


def _area(curve: PerturbationCurve) -> str:
    return f"{shorten(curve.model, 22)}: area {curve.area:.3g} ± {curve.area_error:.1g}"


def perturbation_height(d: Perturbation) -> float:
    panels = _noise_panels(d)
    return 34 + 280 + 52 + max((legend_height([_area(c) for c in curves], 326) for curves in panels.values()), default=0) + 14


def draw_perturbation(sheet: Sheet, d: Perturbation) -> None:
    """Mean increase of the loss by size of the noise, a panel per kind of noise; bars: standard error over draws."""
    units = {"isotropic": "σ: standard deviation of the noise on every weight",
             "filter": "σ: length of the noise as a share of its row's"}
    for i, (noise, curves) in enumerate(_noise_panels(d).items()):
        left = 62 + i * 396
        axes = sheet.axes(left, 34, 326, 280, NOISES[noise].capitalize(), "y")
        sigmas = [s for c in curves for s in c.sigmas if s > 0]
        far = len(set(sigmas)) > 2 and max(sigmas) / min(sigmas) >= 5
        means = [float(v) for c in curves
                 for v, s in zip(np.mean(np.array(c.increases), axis=0), c.sigmas, strict=True) if s > 0]
        for at, c in enumerate(curves):
            _noise_curve(axes, sheet, c, (at - (len(curves) - 1) / 2) * 0.02, far)
        if far:
            logarithmic(axes, "x", sigmas)
        if spans_orders(means):
            logarithmic(axes, "y", means)
        else:
            axes.axhline(0, color=sheet.theme.soft, linewidth=0.8)
        axes.set_xlabel(units[noise])
        axes.set_ylabel("rise of the loss, nats per response token")
        sheet.legend(left, 34 + 280 + 52, 326, [(key(look(sheet.theme, c.model)), _area(c)) for c in curves])


def _noise_curve(axes: Axes, sheet: Sheet, curve: PerturbationCurve, shift: float, far: bool) -> None:
    """`shift` keeps the bars of several models apart: a share of sigma, or of the largest sigma on a linear axis."""
    here = look(sheet.theme, curve.model)
    values, sigmas = np.array(curve.increases, dtype=np.float64), np.array(curve.sigmas, dtype=np.float64)
    mean = values.mean(axis=0)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros_like(mean)
    x = sigmas * (1 + shift) if far else sigmas + shift * 0.3 * sigmas.max()
    shown = sigmas > 0 if far else np.ones(len(sigmas), bool)
    axes.plot(x[shown], mean[shown], here.dash, color=here.colour, linewidth=here.width, marker=here.marker,
              markersize=here.size * 0.75, zorder=2 + here.width)
    whiskers(axes, x[shown], mean[shown], (mean - error)[shown], (mean + error)[shown], here.colour)
