"""What the report says of the diagnostics: a finding, a meaning, tables of the key figures. The pictures are elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.diagnose.artifacts import (
    Calibration,
    Cost,
    Curvature,
    Diagnostic,
    Displacement,
    FittedModel,
    Generalization,
    GradientMap,
    LinearModeConnectivity,
    LossSurface,
    Perturbation,
    PerturbationCurve,
    Segment,
    Verdict,
)
from anabranch.diagnose.perturbation import paired_difference
from anabranch.report.contents import Contents
from anabranch.report.tables import NONE, Table, number
from anabranch.scores import TIE

NAMES = {
    "lmc": "Linear mode connectivity", "displacement": "Displacement", "surface": "Loss surface",
    "generalization": "Training loss against held-out loss", "perturbation": "Perturbation", "curvature": "Curvature",
    "calibration": "Calibration size", "map": "Gradient map",
}
MEANINGS = {
    "lmc": "The loss on the straight line from one model to another. A barrier, where the loss rises above the line between "
           "both ends, means that they lie in different valleys and that averaging them crosses a ridge. Barrier: the largest "
           "such rise; interval: over blocks of rows.",
    "displacement": "How far each model lies from the base (L2 distance over all parameters), where in the network, and how "
                    "alike the directions are. Averaging branches that pull apart cancels, so the merged model moves less "
                    "than they do: that alone keeps more of the base, whatever the split.",
    "surface": "The loss over the plane through three models. Distances are true distances; a model that does not lie on the "
               "plane is drawn at its foot, hollow.",
    "generalization": "Loss on rows that were trained on against loss on rows that were not. Far above the diagonal: learned "
                      "by heart.",
    "perturbation": "How much the loss rises when random noise is added to the weights: how flat the place is where the model "
                    "lies. Isotropic noise is the same for every weight; filter-normalised noise is a share of each row's "
                    "length, so that large weights get more. Bars: standard error over draws of the noise.",
    "curvature": "The Hessian's largest eigenvalues at the base, whether conflict between units lies along their eigenvectors, "
                 "and what curvature says merging gains over the branches' mean loss. That gain compares the merged model with "
                 "its own branches, not with joint training.",
    "calibration": "How many rows a unit's mean gradient needs: its cosine with the gradient over all its calibration rows, "
                   "and how well two separate halves agree (1: fully).",
    "map": "Units by their gradients, branches and the merged model by where they moved. Near: alike. In t-SNE only "
           "neighbourhoods mean something, not distances or sizes. The tree joins the most alike units first. The mark \"no "
           "direction in common\" is where a direction lies that has cosine 0 with every unit: a model of small cosines lies "
           "near it whatever it learned, so which units it went with is told by its cosines, not by its place on either map.",
}
# Cosine of the n-example gradient with the 1000-example one, Qwen2.5-VL-3B on Vision-FLAN (arXiv:2606.01717).
PAPER_CALIBRATION = {50: 0.683, 100: 0.762, 150: 0.814, 200: 0.847, 300: 0.891, 400: 0.920, 500: 0.940, 700: 0.968}


@dataclass(frozen=True)
class Section:
    """One diagnostic as the page and the terminal show it; `tables` in the order of their weight."""

    key: str
    name: str
    verdict: Verdict
    finding: str
    meaning: str
    said: list[str]
    tables: list[Table]
    cost: Table | None


def sections(contents: Contents) -> list[Section]:
    """Every diagnostic that is there, in the order of NAMES."""
    return [Section(key, NAMES[key], found.verdict, finding(found), MEANINGS[key], found.said, key_tables(found),
                    _cost(found.cost)) for key in NAMES if (found := contents.diagnostics.get(key)) is not None]


def finding(diagnostic: Diagnostic) -> str:
    """The title: what this picture shows, in one sentence with its figure."""
    return _FINDINGS[type(diagnostic)](diagnostic)


def key_tables(diagnostic: Diagnostic) -> list[Table]:
    """The figures behind the picture, raw text."""
    return _TABLES[type(diagnostic)](diagnostic)


def _cost(cost: Cost | None) -> Table | None:
    if cost is None:
        return None
    return Table("Cost: predicted before, measured after", ["", "forward passes", "seconds"],
                 [["predicted", f"{cost.predicted_passes:,.0f}", f"{cost.predicted_seconds:,.1f}"],
                  ["measured", f"{cost.measured_passes:,.0f}", f"{cost.measured_seconds:,.1f}"]])


def short(value: float) -> str:
    """Three digits that matter, with a true minus."""
    return f"{value:.3g}".replace("-", "−")


def span(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{short(low)} to {short(high)}"


# ---- connectivity ----------------------------------------------------------------------------------------------------


def segment_kind(segment: Segment) -> str:
    """branch–branch, branch–merged, base–merged, base–branch or joint–merged: by the two ends, whichever comes first."""
    ends = sorted("branch" if e.startswith("branch-") else e for e in (segment.start, segment.end))
    known = {("branch", "branch"): "branch–branch", ("branch", "merged"): "branch–merged", ("base", "merged"): "base–merged",
             ("base", "branch"): "base–branch"}
    return known.get((ends[0], ends[1]), "joint–merged")


def main_rows(diagnostic: LinearModeConnectivity) -> str:
    """`mixture`, or what comes first where there is none."""
    rows = [s.rows for s in diagnostic.segments]
    return "mixture" if "mixture" in rows or not rows else rows[0]


def is_barrier(segment: Segment) -> bool:
    """Higher than a tie, and beyond chance: what the verdict counts, on the mixture's rows alone."""
    return segment.barrier > TIE and segment.low > 0


def _lmc_finding(d: LinearModeConnectivity) -> str:
    """As the verdict is: rows of single groups are not judged, but what the picture marks there is counted behind it."""
    if not d.segments:
        return "No segment was measured"
    rows = main_rows(d)
    judged, others = [s for s in d.segments if s.rows == rows], [s for s in d.segments if s.rows != rows]
    found = [s for s in judged if is_barrier(s)] if rows == "mixture" else []
    top = max(found or judged, key=lambda s: s.barrier)
    where = f"{top.start} – {top.end}, {rows_name(rows)}"
    single = sum(is_barrier(s) for s in others)
    beside = f"; on single groups' rows: {single} of {len(others)}" if single else ""
    if d.verdict == "bad":
        return (f"A barrier: {max(1, len(found))} of {len(judged)} segments rise above the line between their ends; most, by "
                f"{top.barrier:.3f} nats per token: {where}{beside}")
    if d.verdict == "good" and top.barrier < 5e-4:
        return f"No barrier on any of {len(judged)} segments on the mixture's rows{beside}"
    words = "No barrier" if d.verdict == "good" else "Barriers not judged"
    return f"{words}: of {len(judged)} segments the highest rise is {top.barrier:.3f} nats per token ({where}){beside}"


def rows_name(rows: str) -> str:
    return rows.replace("group-", "group ") if rows.startswith("group-") else rows


def _lmc_tables(d: LinearModeConnectivity) -> list[Table]:
    rows = sorted(d.segments, key=lambda s: -s.barrier)
    return [Table("Barriers, highest first (nats per response token)",
                  ["from", "to", "rows", "barrier", "interval, 95 % for all segments at once", "at", "loss at the ends"],
                  [[s.start, s.end, rows_name(s.rows), number(s.barrier, 4), span(s.low, s.high), f"{s.at:.2f}",
                    f"{number(s.losses[0])} and {number(s.losses[-1])}" if s.losses else NONE] for s in rows], 3)]


# ---- displacement, surface, generalization ---------------------------------------------------------------------------


def _displacement_finding(d: Displacement) -> str:
    norm = {m.model: m for m in d.models}
    if d.joint_over_merged is not None and "joint" in norm and "merged" in norm:
        return (f"Joint training moved {d.joint_over_merged:.2f} times as far from the base as the merged model "
                f"({norm['joint'].norm:.2f} against {norm['merged'].norm:.2f})")
    if "merged" in norm:
        return (f"The merged model lies {norm['merged'].norm:.2f} from the base, {norm['merged'].relative:.1%} of the base's "
                "own length")
    moved = [m.norm for m in d.models]
    return f"The models lie {min(moved):.2f} to {max(moved):.2f} from the base" if moved else "No model was measured"


def _displacement_tables(d: Displacement) -> list[Table]:
    weights = iter(d.weights)
    rows = [[m.model, number(m.norm), f"{m.relative:.2%}",
             number(next(weights, None)) if m.model.startswith("branch-") else NONE] for m in d.models]
    tables = [Table("Distance from the base (L2 over all parameters)",
                    ["model", "distance", "share of the base's length", "weight in the merge"], rows)]
    if d.labels:
        tables.append(Table("Cosines between task vectors (model minus base)", ["", *d.labels],
                            [[label, *(number(v, 2) for v in row)] for label, row in zip(d.labels, d.cosines, strict=True)]))
    if (c := d.contraction) is not None:
        average = NONE if c.is_average is None else "yes" if c.is_average else "no"
        tables.append(Table("Contraction: mean square of the branches = square of their mean + spread",
                            ["", "squared distance"],
                            [["branches, weighted mean", short(c.branches)], ["their weighted mean", short(c.merged)],
                             ["spread around it", short(c.spread)], ["relative error of the identity", f"{c.error:.1e}"],
                             ["the merged model's own", NONE if c.merged_from_file is None else short(c.merged_from_file)],
                             ["the merged model is that mean", average]]))
    return tables


def lowest(d: LossSurface) -> tuple[float, float, float]:
    """x, y and loss of the grid's lowest point."""
    i, j = np.unravel_index(int(np.nanargmin(np.asarray(d.losses, dtype=np.float64))), (len(d.y), len(d.x)))
    return d.x[int(j)], d.y[int(i)], d.losses[int(i)][int(j)]


def _surface_finding(d: LossSurface) -> str:
    plane = f"on the plane through {', '.join(d.corners[:-1])} and {d.corners[-1]}"
    merged = next((m for m in d.marks if m.model == "merged"), None)
    if merged is None:
        return f"Lowest loss {plane}: {lowest(d)[2]:.3f} nats per token"
    best = min((m for m in d.marks if m.model in d.corners), key=lambda m: m.loss, default=None)
    if best is None or merged.loss < best.loss:
        return f"The merged model has a lower loss, {merged.loss:.3f}, than each of the three corners {plane}"
    return f"The merged model's loss, {merged.loss:.3f}, is not below the best corner's ({best.model}, {best.loss:.3f}) {plane}"


def _surface_tables(d: LossSurface) -> list[Table]:
    rows = [[m.model, number(m.loss), number(m.x, 2), number(m.y, 2), number(m.off, 2)] for m in d.marks]
    rows.append(["lowest point of the grid", number(lowest(d)[2]), *(number(v, 2) for v in lowest(d)[:2]), NONE])
    return [Table(f"Models on the plane (loss on {rows_name(d.rows)}, nats per response token)",
                  ["model", "loss", "x", "y", "distance from the plane"], rows)]


def fitted_name(m: FittedModel) -> str:
    return m.model if not m.epochs else f"{m.model}, {m.epochs:g} ep"


def last_pair(d: Generalization) -> tuple[FittedModel, FittedModel] | None:
    """merged and joint at the most epochs that both were trained for."""
    merged, joint = ({m.epochs: m for m in d.models if m.model == name} for name in ("merged", "joint"))
    both = sorted(set(merged) & set(joint), key=lambda e: -1.0 if e is None else e)
    if both:
        return merged[both[-1]], joint[both[-1]]
    return (list(merged.values())[-1], list(joint.values())[-1]) if merged and joint else None


def _generalization_finding(d: Generalization) -> str:
    if (pair := last_pair(d)) is None:
        best = min(d.models, key=lambda m: m.held_out, default=None)
        return "No model was measured" if best is None else f"Lowest held-out loss: {fitted_name(best)}, {best.held_out:.3f}"
    merged, joint = pair
    held, figures = _fits(joint.held_out, merged.held_out)
    if joint.training is None or merged.training is None:
        return f"Joint training fits held-out rows {held} the merged model ({figures})"
    fitted, of_training = _fits(joint.training, merged.training)
    return f"Joint training fits training rows {fitted} the merged model ({of_training}), held-out rows {held} it ({figures})"


def _fits(joint: float, merged: float) -> tuple[str, str]:
    word = "as well as" if abs(joint - merged) <= TIE else "better than" if joint < merged else "worse than"
    return word, f"{joint:.3f} against {merged:.3f}"


def _generalization_tables(d: Generalization) -> list[Table]:
    rows = [[m.model, NONE if m.epochs is None else f"{m.epochs:g}", number(m.training), span(m.training_low, m.training_high),
             number(m.held_out), span(m.held_out_low, m.held_out_high),
             NONE if m.training is None else number(m.held_out - m.training)] for m in d.models]
    return [Table("Training and held-out loss (nats per response token)",
                  ["model", "epochs", "training", "95 % interval", "held-out", "95 % interval", "held-out minus training"],
                  rows)]


# ---- perturbation ----------------------------------------------------------------------------------------------------

NOISES = {"isotropic": "isotropic noise", "filter": "filter-normalised noise"}


def flatter(first: PerturbationCurve, second: PerturbationCurve) -> str | None:
    """The model with the smaller area, beyond chance over the draws; `""`: neither; None: one draw, which cannot tell."""
    if (gap := paired_difference(first.increases, second.increases, first.sigmas)) is None:
        return None
    _, low, high = gap
    return first.model if high < 0 else second.model if low > 0 else ""


def _flattest(curves: Sequence[PerturbationCurve]) -> str:
    """In words: merged against joint where both are there, else the lowest curve against every other."""
    by = {c.model: c for c in curves}
    if "merged" in by and "joint" in by:
        who = flatter(by["merged"], by["joint"])
        words = {"merged": "the merged model is flatter than joint", "joint": "joint is flatter than the merged model",
                 "": "no clear difference between merged and joint"}
        return "one draw does not tell merged from joint" if who is None else words[who]
    first, *others = sorted(curves, key=lambda c: c.area)
    told = {flatter(first, other) for other in others}
    if None in told:
        return "one draw does not tell the models apart"
    return f"{first.model} is flattest" if told == {first.model} else "no model is clearly flatter than all others"


def _perturbation_finding(d: Perturbation) -> str:
    if not d.curves:
        return "No model was measured"
    told: dict[str, str] = {}
    for noise, words in NOISES.items():
        curves = [c for c in d.curves if c.noise == noise]
        if curves:
            told[words] = _flattest(curves)
    if len(told) > 1 and len(set(told.values())) == 1:
        told = {"both kinds of noise": next(iter(told.values()))}
    joined = "; ".join(f"under {words} {who}" for words, who in told.items())
    return joined[0].upper() + joined[1:]


def _perturbation_tables(d: Perturbation) -> list[Table]:
    rows = []
    for c in d.curves:
        mean = np.mean(np.asarray(c.increases, dtype=np.float64), axis=0) if c.increases else np.zeros(0)
        rows.append([c.model, NOISES[c.noise], number(c.loss), f"{short(c.area)} ± {short(c.area_error)}",
                     f"{len(c.increases)}", ", ".join(f"{s:g}: {short(v)}" for s, v in zip(c.sigmas, mean, strict=True))])
    return [Table("Loss with noise minus loss (nats per response token)",
                  ["model", "noise", "loss without noise", "area under the curve", "draws", "σ: mean increase"], rows, 2)]


# ---- curvature, calibration, map -------------------------------------------------------------------------------------


def _curvature_finding(d: Curvature) -> str:
    told = []
    if d.alignment is not None:
        a = d.alignment
        told.append(f"conflict axes meet the sharpest directions with |cos| up to {a.largest:.2f}, random directions with "
                    f"{a.random_mean:.2g} (z = {a.z:,.1f})")
    if d.gain is not None:
        told.append(f"merging gains {short(d.gain.measured)} nats over the branches' mean loss, curvature predicts "
                    f"{short(d.gain.quadratic)}")
    if not told:
        told.append(f"largest eigenvalue of the Hessian {short(d.eigenvalues[0])}" if d.eigenvalues else "nothing was measured")
    joined = "; ".join(told)
    return joined[0].upper() + joined[1:]


def _curvature_tables(d: Curvature) -> list[Table]:
    tables = [Table(f"Top Hessian eigenvalues at the base ({d.steps} Lanczos steps, {d.hvp.replace('_', ' ')}; the two ways "
                    f"to a Hessian-vector product differ by {d.hvp_difference:.1e})", ["number", "eigenvalue", "residual"],
                    [[str(i), short(v), f"{r:.1e}"]
                     for i, (v, r) in enumerate(zip(d.eigenvalues, d.residuals, strict=True), start=1)])]
    if (a := d.alignment) is not None:
        tables.append(Table("Alignment of conflict axes with top eigenvectors", ["", "figure"], [
            ["largest |cos|", number(a.largest)], ["of random directions", f"{short(a.random_mean)} ± {short(a.random_std)}"],
            ["z", f"{a.z:,.1f}".replace("-", "−")], ["principal angles, degrees", ", ".join(number(v, 1) for v in a.angles)],
            ["representative units", str(len(a.units))]]))
    if (g := d.gain) is not None:
        tables.append(Table(f"Gain of merging over the branches' mean loss ({rows_name(g.rows)}, nats per response token)",
                            ["", "gain", "95 % interval"], [
            ["measured", short(g.measured), span(g.low, g.high)], ["predicted by the Hessian", short(g.quadratic), NONE],
            ["by its top eigenvectors alone", short(g.top), NONE]]))
    return tables


def _calibration_finding(d: Calibration) -> str:
    needed = [u.needed for u in d.units if u.needed is not None]
    if not needed:
        return f"None of {len(d.units)} units shows a signal: how many rows they need cannot be told"
    enough = sum(u.needed is not None and u.needed <= u.rows for u in d.units)
    return (f"A reliability of {d.wanted:g} takes {float(np.median(needed)):,.0f} rows of the median unit; {enough} of "
            f"{len(d.units)} units have as many as they need")


def _calibration_tables(d: Calibration) -> list[Table]:
    means = [[f"{n:,}", number(c), number(r), number(PAPER_CALIBRATION.get(n))]
             for n, c, r in zip(d.sizes, d.mean_cosine, d.mean_reliability, strict=True)]
    worst = sorted(d.units, key=lambda u: (u.needed is not None, -(u.needed or 0), u.unit))
    rows = [[u.unit, f"{u.rows:,}", "no signal" if u.needed is None else f"{u.needed:,}",
             number(u.reliability[-1] if u.reliability else None)] for u in worst]
    return [Table("Mean over units by number of examples",
                  ["examples", "cosine with all", "reliability", "the paper's, with 1000"], means, 0),
            Table(f"Examples for a reliability of {d.wanted:g}, most first",
                  ["unit", "calibration rows", "needed", "reliability with all"], rows)]


def _map_finding(d: GradientMap) -> str:
    if d.silhouette is None:
        return "One group: nothing to separate"
    word = "form clusters" if d.silhouette > 0.25 else "overlap" if d.silhouette > 0 else "are mixed, not clusters,"
    return f"The groups {word} in gradient space (silhouette {number(d.silhouette, 2)}, on a scale from −1 to 1)"


def _map_tables(d: GradientMap) -> list[Table]:
    return [Table("The map's figures", ["", "figure"], [
        ["units", str(sum(p.role == "unit" for p in d.points))],
        ["variance on the two axes", ", ".join(f"{v:.0%}" for v in d.explained)],
        ["silhouette of the groups", number(d.silhouette)],
        ["cophenetic correlation of tree", number(d.cophenetic)]])]


_FINDINGS: dict[type[Diagnostic], Callable[[Any], str]] = {
    LinearModeConnectivity: _lmc_finding, Displacement: _displacement_finding, LossSurface: _surface_finding,
    Generalization: _generalization_finding, Perturbation: _perturbation_finding, Curvature: _curvature_finding,
    Calibration: _calibration_finding, GradientMap: _map_finding}
_TABLES: dict[type[Diagnostic], Callable[[Any], list[Table]]] = {
    LinearModeConnectivity: _lmc_tables, Displacement: _displacement_tables, LossSurface: _surface_tables,
    Generalization: _generalization_tables, Perturbation: _perturbation_tables, Curvature: _curvature_tables,
    Calibration: _calibration_tables, GradientMap: _map_tables}
