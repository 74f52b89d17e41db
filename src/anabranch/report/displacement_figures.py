"""The picture of displacement: how far models moved, in which directions, and where in the network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from anabranch.diagnose.artifacts import Displacement, ModelDisplacement
from anabranch.report.canvas import WIDTH, Sheet, branch_number, heat, key, legend_height, look
from anabranch.report.contents import shorten
from anabranch.report.figures import tip

BELOW_PLACES = 108.0  # names of modules, slanted, and the axis's own


def displacement_height(d: Displacement) -> float:
    return (34 + _upper(d) + 74 + 34 + 190 + BELOW_PLACES + legend_height([m.model for m in d.models], WIDTH - 74) + 6
            + 20 * bool(_still(d)))


def _upper(d: Displacement) -> float:
    return max(170.0, 24.0 * len(d.models), min(300.0, 26.0 * len(d.labels)))


def draw_displacement(sheet: Sheet, d: Displacement) -> None:
    """Distances from the base, cosines of task vectors; the same distances by layer and by type of module."""
    height = _upper(d)
    names = [shorten(m.model, 18) for m in d.models]
    left = 20 + 6.4 * max(map(len, names), default=4)
    axes = sheet.axes(left, 34, 400 - left, height, "Distance from the base", "x")
    _norms(axes, sheet, d.models, names)
    if d.labels:
        side = 22 + 6.4 * max(len(shorten(label, 22)) for label in d.labels)
        cells = sheet.axes(418 + side, 34, WIDTH - 432 - side, height, "Cosines between task vectors")
        heat(cells, sheet.theme, np.array(d.cosines, dtype=np.float64), d.labels, d.labels)
    top = 34 + height + 74 + 34
    layers, still = _layers(d.models), _still(d)
    wide = 400.0 if len(layers) <= 12 else 480.0
    axes = sheet.axes(62, top, wide, 190, "By layer", "y")
    _by_place(axes, sheet, d.models, layers, "by_layer")
    axes.set(xlabel="layer by number, other modules by name", ylabel="L2 distance there")
    moved = _moved(d.models, "by_type")
    usual = ["embedding", "attention", "mlp", "norm", "head", "other"]
    kinds = [k for k in usual if k in moved] + sorted(moved.difference(usual))
    axes = sheet.axes(62 + wide + 44, top, WIDTH - 74 - wide - 44, 190, "By type of module", "y")
    _by_place(axes, sheet, d.models, kinds, "by_type")
    axes.set(xlabel="type of module", ylabel="L2 distance there")
    entries = [(key(look(sheet.theme, m.model)), shorten(m.model, 26)) for m in d.models]
    sheet.legend(62, top + 190 + BELOW_PLACES, WIDTH - 74, entries)
    if still:
        below = top + 190 + BELOW_PLACES + legend_height([label for _, label in entries], WIDTH - 74) + 4
        sheet.words(62, below, f"Not drawn: {still} of {len(layers) + still} layers and modules, in which no model differs "
                    "from the base, as where they are frozen", WIDTH - 62)


def _norms(axes: Axes, sheet: Sheet, models: Sequence[ModelDisplacement], names: list[str]) -> None:
    top = max((m.norm for m in models), default=1.0) or 1.0
    for y, m in enumerate(reversed(models)):
        colour, mark, _, size, _ = look(sheet.theme, m.model)
        axes.plot([0, m.norm], [y, y], color=colour, linewidth=2)
        (dot,) = axes.plot(m.norm, y, mark, color=colour, markersize=size)
        tip(dot, f"{m.model}: {m.norm:.3f}")
        axes.annotate(f"{m.norm:.2f} ({m.relative:.1%})", (m.norm, y), (8, 0), textcoords="offset points", va="center",
                      fontsize=9, color=sheet.theme.ink)
    axes.set(xlim=(0, top * 1.55), ylim=(-0.6, len(models) - 0.4))
    axes.set_yticks(range(len(models)), names[::-1])
    axes.tick_params(axis="y", length=0, labelcolor=sheet.theme.ink)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("L2 distance in parameter space (share of the base's length)")


def _moved(models: Sequence[ModelDisplacement], field: str) -> set[str]:
    """Places where some model differs from the base; all of them where none does anywhere."""
    every: list[dict[str, float]] = [getattr(m, field) for m in models]
    return {p for places in every for p, v in places.items() if v > 0} or {p for places in every for p in places}


def _still(d: Displacement) -> int:
    """Layers and modules that are left out of the picture."""
    return len({p for m in d.models for p in m.by_layer} - _moved(d.models, "by_layer"))


def _layers(models: Sequence[ModelDisplacement]) -> list[str]:
    """Embeddings, layers by number, other top modules, the head last; without those in which no model moved."""
    found = _moved(models, "by_layer")
    before = sorted(layer for layer in found if "emb" in layer and not layer.isdigit())
    numbered = sorted((layer for layer in found if layer.isdigit()), key=int)
    return [*before, *numbered, *sorted(found - set(before) - set(numbered), key=lambda layer: ("head" in layer, layer))]


def telling(names: Sequence[str], width: int = 18) -> list[str]:
    """Dotted names cut to about `width` characters such that different names stay different: the last parts that tell."""
    def last(name: str, count: int) -> str:
        return ".".join(name.split(".")[-count:])

    tails = []
    for name in names:
        count = 1
        while count < len(name.split(".")) and any(o != name and last(o, count) == last(name, count) for o in names):
            count += 1
        tails.append(last(name, count))
    cut = [shorten(tail, width) for tail in tails]
    alike = {c: sorted({t for t, other in zip(tails, cut, strict=True) if other == c}) for c in cut}
    return [c if len(alike[c]) == 1 else "…" + shorten(tail[_shared(alike[c]):], width)
            for tail, c in zip(tails, cut, strict=True)]


def _shared(names: Sequence[str]) -> int:
    """How many characters sorted names have in common in front."""
    first, last = names[0], names[-1]
    return next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def _by_place(axes: Axes, sheet: Sheet, models: Sequence[ModelDisplacement], places: Sequence[str], field: str) -> None:
    """A mark per model and place; a line runs through numbered layers, which have an order."""
    few = len(models) * len(places) <= 160
    room = max(1.0, len(places) / 15)  # names need more of it than numbers
    gaps = [1.0 if a.isdigit() and b.isdigit() else room for a, b in pairwise(places)]
    at = dict(zip(places, [sum(gaps[:i]) for i in range(len(places))], strict=True))
    for i, m in enumerate(models):
        values: dict[str, float] = getattr(m, field)
        here = look(sheet.theme, m.model)
        shift = 0.0 if field == "by_layer" else 0.7 * ((i + 0.5) / len(models) - 0.5)
        ordered = [(at[p] + shift, values[p]) for p in places if p in values and p.isdigit()]
        if ordered:
            axes.plot(*np.array(ordered).T, here.dash, color=here.colour, linewidth=here.width)
        loud = few or branch_number(m.model) is None
        for p in places:
            if p in values:
                (mark,) = axes.plot(at[p] + shift, values[p], here.marker, color=here.colour,
                                    markersize=here.size * (0.75 if few else 0.5) if loud or not p.isdigit() else 0,
                                    zorder=2 + here.width)
                tip(mark, f"{m.model}, {p}: {values[p]:.3f}")
    step = -(-sum(p.isdigit() for p in places) // 14)
    named = [p for p in places if not p.isdigit() or int(p) % step == 0]
    axes.set_xticks([at[p] for p in named], telling(named))
    for label, p in zip(axes.get_xticklabels(), named, strict=True):
        if not p.isdigit():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.6, max(at.values(), default=0.0) + 0.6)
