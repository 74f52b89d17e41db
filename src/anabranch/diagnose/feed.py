"""Feeds the measures that need nothing but models and rows: connectivity, displacement, surface, generalization, noise."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

from anabranch.diagnose.artifacts import (
    Displacement,
    FittedModel,
    Generalization,
    LinearModeConnectivity,
    LossSurface,
    Mark,
    ModelDisplacement,
    Perturbation,
    PerturbationCurve,
    Segment,
    Verdict,
)
from anabranch.diagnose.connectivity import barrier, curve, mean_interval, paired_gap
from anabranch.diagnose.displacement import Moments
from anabranch.diagnose.perturbation import Noise, area, noise_for, paired_difference
from anabranch.diagnose.subject import BASE, JOINT, MERGED, MIXTURE, TRAINING, NotApplicable, Probe, Settings, Subject
from anabranch.diagnose.surface import Plane
from anabranch.scores import TIE

Floats = NDArray[np.float64]
BLOCKS_TO_JUDGE = 8  # with 4, one segment in eight without a barrier is taken for one with; with 8, one in twenty-five
PAPER_RATIO = (2.43, 2.92)  # arXiv 2606.01717: displacement, joint over merged


def _groups(subject: Subject) -> list[Probe]:
    """Probes that make up the mixture's: one per group, or the mixture itself."""
    return [p for name, p in subject.probes.items() if name.startswith("group-")] or [subject.probes[MIXTURE]]


# ---- linear mode connectivity ----------------------------------------------------------------------------------------


def _segments(subject: Subject) -> list[tuple[str, str]]:
    """Branch-branch, branch-merged, base-merged; joint-merged where there is one."""
    pairs = list(itertools.combinations(subject.branches, 2))
    if MERGED in subject.labels:
        pairs += [(b, MERGED) for b in subject.branches] + [(BASE, MERGED)]
        pairs += [(JOINT, MERGED)] if JOINT in subject.labels else []
    else:
        pairs += [(BASE, b) for b in subject.branches]
    return pairs


def lmc_passes(subject: Subject, settings: Settings) -> float:
    pairs = _segments(subject)
    ends = len({label for pair in pairs for label in pair})
    return float((len(pairs) * (settings.points - 2) + ends) * sum(len(p.batches) for p in _groups(subject)))


def measure_lmc(subject: Subject, settings: Settings) -> LinearModeConnectivity:
    """Loss at `points` places along every segment, on each group's held-out rows and on all of them together."""
    pairs, groups = _segments(subject), _groups(subject)
    if not pairs:
        raise NotApplicable("one model alone has no segment: give branches or a merged model")
    alphas = np.linspace(0.0, 1.0, settings.points)
    ends: dict[str, list[Floats]] = {}
    segments: list[Segment] = []
    for i, (start, end) in enumerate(pairs):
        subject.tell(f"{start} to {end}", i, len(pairs))
        for label in (start, end):
            if label not in ends:
                ends[label] = _losses_at(subject, {label: 1.0}, groups)
        inner = [_losses_at(subject, {start: 1.0 - a, end: float(a)}, groups) for a in alphas[1:-1]]
        found = [ends[start], *inner, ends[end]]
        for rows, picked in _row_sets(groups):
            sums = np.array([np.concatenate([point[g][:, 0] for g in picked]) for point in found])
            tokens = np.concatenate([found[0][g][:, 1] for g in picked])
            high = barrier(alphas, sums, tokens, name=f"{start} {end} {rows}", tests=len(pairs))
            segments.append(Segment(
                start=start, end=end, rows=rows, alphas=alphas.tolist(), losses=curve(sums, tokens).tolist(),
                barrier=high.height, at=high.at, low=high.low, high=high.high))
    blocks = {rows: sum(groups[g].block_count for g in picked) for rows, picked in _row_sets(groups)}
    verdict, said = judge_segments(segments, blocks[MIXTURE])
    return LinearModeConnectivity(settings={"points": settings.points, "seed": settings.seed, "rows": settings.rows,
                                            "batch_rows": settings.batch_rows},
                                  verdict=verdict, said=said, blocks=blocks, segments=segments)


def _losses_at(subject: Subject, mix: dict[str, float], groups: list[Probe]) -> list[Floats]:
    subject.live.put(mix)
    return [subject.live.losses(probe) for probe in groups]


def _row_sets(groups: list[Probe]) -> list[tuple[str, list[int]]]:
    """The mixture (all groups' batches together), and each group."""
    alone = [] if len(groups) == 1 and groups[0].name == MIXTURE else [(p.name, [g]) for g, p in enumerate(groups)]
    return [(MIXTURE, list(range(len(groups)))), *alone]


def judge_segments(segments: list[Segment], blocks: int) -> tuple[Verdict, list[str]]:
    """Bad: a barrier above TIE nats whose interval excludes zero, on the mixture's rows; none with too few `blocks` to tell.

    A group's own rows are told but do not condemn a merge: there, a line from that group's branch to any other model must
    climb, and where it climbs most is the barrier; and many segments times many groups find chance barriers.
    """
    def is_barrier(s: Segment) -> bool:
        return s.barrier > TIE and s.low > 0

    mixture = [s for s in segments if s.rows == MIXTURE]
    found = sorted((s for s in mixture if is_barrier(s)), key=lambda s: -s.barrier)
    others = sorted((s for s in segments if s.rows != MIXTURE and is_barrier(s)), key=lambda s: -s.barrier)
    worst = max(mixture, key=lambda s: s.barrier)
    if found:
        said = [f"{len(found)} of {len(mixture)} segments cross a barrier on the mixture's held-out rows: "
                + "; ".join(f"{s.start} to {s.end}: {s.barrier:.3f} nats at {s.at:.2f} [{s.low:.3f} to {s.high:.3f}]"
                            for s in found[:4])
                + ". These models do not lie in one basin: their average is not to be trusted."]
    else:
        said = [f"No barrier: along all {len(mixture)} segments the loss on the mixture's held-out rows stays within "
                f"{TIE} nats of the straight line between its ends, or within chance of it (the highest: {worst.start} to "
                f"{worst.end}, {worst.barrier:.4f} nats)."]
    if others:
        top, curves = others[0], f"{len(others)} of {len(segments) - len(mixture)} curves"
        said.append(f"On single groups' rows {curves} {'has' if len(others) == 1 else 'have'} a barrier (above {TIE} nats, and "
                    f"beyond chance), the highest from {top.start} to {top.end} on {top.rows}: {top.barrier:.3f} nats. "
                    "They are not judged.")
    said.append(f"These losses are over {blocks} blocks of held-out rows, every token with the same say; the evaluation's are "
                "over all held-out rows that it scores, every unit with the same say, and so differ.")
    said.append("No barrier does not mean that the merge is better than joint training; it means that averaging did not break "
                "what was averaged.")
    if blocks < BLOCKS_TO_JUDGE:
        return "none", [*said, f"With {blocks} blocks of rows there is no telling chance from barriers: no verdict. Give more "
                               "rows (--rows)."]
    return ("bad" if found else "good"), said


# ---- displacement ----------------------------------------------------------------------------------------------------


def displacement_passes(subject: Subject, settings: Settings) -> float:
    return 0.0


def measure_displacement(subject: Subject, settings: Settings) -> Displacement:
    """Task vectors of every model but the base, read tensor by tensor from the files."""
    labels = [label for label in subject.labels if label != BASE]
    if not labels:
        raise NotApplicable("only the base is there: nothing moved")
    place = {label: i for i, label in enumerate(labels)}
    merged = place.get(MERGED)
    live = subject.live
    moments = Moments(len(labels), [place[b] for b in subject.branches], subject.weights,
                      live.weights[MERGED].rounding if merged is not None else 0.0)
    for i, name in enumerate(live.parameters):
        subject.tell(name, i, len(live.parameters))
        moments.add(name, live.weights[BASE].read(name).reshape(-1),
                    [live.weights[label].read(name).reshape(-1) for label in labels], merged)
    norms, base = moments.norms, float(np.sqrt(moments.base))
    models = [ModelDisplacement(
        model=label, norm=float(norms[i]), relative=float(norms[i] / base),
        by_layer={layer: float(np.sqrt(s[i])) for layer, s in moments.layers.items()},
        by_type={kind: float(np.sqrt(s[i])) for kind, s in moments.kinds.items()}) for label, i in place.items()]
    check = moments.contraction(merged) if len(subject.branches) > 1 else None
    ratio = float(norms[place[JOINT]] / norms[merged]) if JOINT in place and merged is not None and norms[merged] else None
    result = Displacement(
        settings={"seed": settings.seed}, verdict="none", said=[], base_norm=base, parameters=moments.parameters,
        models=models, labels=labels, cosines=moments.cosines.tolist(), weights=subject.weights, contraction=check,
        joint_over_merged=ratio)
    verdict, said = judge_displacement(result)
    return result.model_copy(update={"verdict": verdict, "said": said})


def judge_displacement(found: Displacement) -> tuple[Verdict, list[str]]:
    """Bad: the contraction identity fails on the real weights: then a file is not what it is taken for."""
    norm = {m.model: m.norm for m in found.models}
    said = ["Distance from the base: " + ", ".join(f"{label} {value:.3g}" for label, value in norm.items())
            + f" (the base's own length: {found.base_norm:.3g})."]
    if found.joint_over_merged is not None:
        said.append(f"Joint training moved {found.joint_over_merged:.2f} times as far as the merge (the paper: "
                    f"{PAPER_RATIO[0]} to {PAPER_RATIO[1]}). A shorter step alone keeps more of the base: compare with "
                    "`joint_matched` before crediting the split.")
    bad = False
    if (check := found.contraction) is not None:
        bad = not check.error <= 1e-6
        share = check.spread / check.branches if check.branches else 0.0
        said.append(f"Contraction (eq. 11): {check.branches:.6g} = {check.merged:.6g} + {check.spread:.6g}, to "
                    f"{check.error:.0e}: averaging cancels {share:.0%} of the branches' mean squared step."
                    + (" THE IDENTITY FAILS: a weight is not finite, or a file changed while it was read." if bad else ""))
        if check.is_average is False:
            said.append("The merged model is not that weighted mean of these branches: another merge method, other weights or "
                        "other branches made it. The identity is told of the mean.")
    return ("bad" if bad else "none"), said  # an identity that holds says nothing for the merge


# ---- loss surface ----------------------------------------------------------------------------------------------------


def _corners(subject: Subject) -> list[str]:
    """Base and two branches; without two branches, base, joint or a branch, and merged."""
    others = [*subject.branches[:2], JOINT, MERGED]
    found = [BASE, *(label for label in others if label in subject.labels)][:3]
    if len(found) < 3:
        raise NotApplicable("a plane wants three models: give two branches, or a branch and a merged model")
    return found


def surface_passes(subject: Subject, settings: Settings) -> float:
    _corners(subject)
    # the grid is `grid` points along the longer side; triangles of branches are about as high as wide
    return float((settings.grid**2 * 0.9 + len(subject.labels)) * len(subject.probes[MIXTURE].batches))


def measure_surface(subject: Subject, settings: Settings) -> LossSurface:
    """Loss over the plane through base and two branches on the mixture's held-out rows; every model is marked."""
    corners, probe, live = _corners(subject), subject.probes[MIXTURE], subject.live
    origin = corners[0]
    others = [label for label in subject.labels if label != origin]
    moments = Moments(len(others))
    for name in live.parameters:
        moments.add(name, live.weights[origin].read(name).reshape(-1),
                    [live.weights[label].read(name).reshape(-1) for label in others], None)
    gram = moments.gram
    spans = [others.index(c) for c in corners[1:]]
    try:
        plane = Plane.through(gram[np.ix_(spans, spans)])
    except ValueError as error:
        raise NotApplicable(f"{', '.join(corners)}: {error}") from error
    marks = []
    for label in subject.labels:
        i = others.index(label) if label != origin else None
        x, y, off = (0.0, 0.0, 0.0) if i is None else plane.place(gram[i, spans], gram[i, i])
        live.put({label: 1.0})
        marks.append(Mark(model=label, x=x, y=y, off=off, loss=live.mean_loss(probe)))
    xs, ys = plane.grid(settings.grid, [(m.x, m.y) for m in marks])
    losses = []
    for j, y in enumerate(ys):
        row = []
        for x in xs:
            live.put(dict(zip(corners, plane.mix(float(x), float(y)), strict=True)))
            row.append(live.mean_loss(probe))
        losses.append(row)
        subject.tell(f"row {j + 1}", j + 1, len(ys))
    return LossSurface(
        settings={"seed": settings.seed, "rows": settings.rows, "grid": settings.grid}, verdict="none",
        said=_surface_said(marks, losses, xs, ys, corners), corners=corners, rows=MIXTURE, x=xs.tolist(), y=ys.tolist(),
        losses=losses, marks=marks)


def _surface_said(marks: list[Mark], losses: list[list[float]], xs: Floats, ys: Floats, corners: list[str]) -> list[str]:
    grid = np.array(losses)
    j, i = np.unravel_index(int(np.argmin(grid)), grid.shape)
    best = min(marks, key=lambda m: m.loss)
    said = [f"The plane through {', '.join(corners)}: the lowest loss of the grid is {grid.min():.3f} nats at "
            f"({xs[i]:.3g}, {ys[j]:.3g}); the best model is {best.model} ({best.loss:.3f})."]
    if off := [m for m in marks if m.off > 1e-3 * max(abs(m.x), abs(m.y), 1e-9) and m.model not in corners]:
        said.append("Not in the plane, drawn at their feet: " + ", ".join(f"{m.model} ({m.off:.3g} away)" for m in off) + ".")
    return said


# ---- training against held-out loss ----------------------------------------------------------------------------------


def generalization_passes(subject: Subject, settings: Settings) -> float:
    probes = [subject.probes[name] for name in (MIXTURE, TRAINING) if name in subject.probes]
    return float(len(subject.labels) * sum(len(p.batches) for p in probes))


def measure_generalization(subject: Subject, settings: Settings) -> Generalization:
    """Loss on a draw of the training rows (where there are any) and on held-out rows, for every model."""
    models = []
    base = np.zeros((0, 2))
    for i, label in enumerate(subject.labels):
        subject.tell(label, i, len(subject.labels))
        subject.live.put({label: 1.0})
        held = subject.live.losses(subject.probes[MIXTURE])
        base = held if label == BASE else base  # it is the first
        gap = (None, None, None) if label == BASE else paired_gap(held[:, 0], base[:, 0], held[:, 1], name=MIXTURE)
        low, high = mean_interval(held[:, 0], held[:, 1], name=MIXTURE)
        training: tuple[float, float, float] | tuple[None, None, None] = (None, None, None)
        if TRAINING in subject.probes:
            seen = subject.live.losses(subject.probes[TRAINING])
            training = (float(seen[:, 0].sum() / seen[:, 1].sum()), *mean_interval(seen[:, 0], seen[:, 1], name=TRAINING))
        models.append(FittedModel(
            model=label, epochs=subject.epochs.get(label), training=training[0], training_low=training[1],
            training_high=training[2], held_out=float(held[:, 0].sum() / held[:, 1].sum()), held_out_low=low,
            held_out_high=high, versus_base=gap[0], versus_base_low=gap[1], versus_base_high=gap[2]))
    probe = subject.probes[MIXTURE]
    verdict, said = judge_generalization(models, probe.block_count)
    said.append(f"Means over the response tokens of {probe.rows} held-out rows; `anabranch run` evaluates more rows, and takes "
                "the mean over units, so that a unit of long answers counts no more than another.")
    return Generalization(settings={"seed": settings.seed, "rows": settings.rows, "batch_rows": settings.batch_rows},
                          verdict=verdict, said=said, models=models)


def judge_generalization(models: list[FittedModel], blocks: int) -> tuple[Verdict, list[str]]:
    """Bad: the merged model is worse than the base on held-out rows of its own mixture, by more than TIE and beyond chance."""
    by = {m.model: m for m in models}
    said = ["Held-out loss: " + ", ".join(f"{m.model} {m.held_out:.3f}" for m in models) + " nats."]
    if all(m.training is not None for m in models):
        said.append("Training loss: " + ", ".join(f"{m.model} {m.training:.3f}" for m in models) + " nats.")
    base, merged, joint = by.get(BASE), by.get(MERGED), by.get(JOINT)
    if merged is None or base is None or merged.versus_base is None:
        return "none", said
    if joint is not None and joint.training is not None and merged.training is not None:
        fit, held = joint.training - merged.training, joint.held_out - merged.held_out
        said.append(f"Joint training is {abs(fit):.3f} nats {'below' if fit < 0 else 'above'} the merge on training rows and "
                    f"{abs(held):.3f} {'below' if held < 0 else 'above'} it on held-out rows.")
    gap, low, high = merged.versus_base or 0.0, merged.versus_base_low or 0.0, merged.versus_base_high or 0.0
    told = f"merged minus base on held-out rows: {gap:+.3f} nats [{low:+.3f} to {high:+.3f}, paired]"
    if blocks < BLOCKS_TO_JUDGE:
        return "none", [*said, f"{blocks} blocks of rows are too few to tell that from chance ({told}): give more --rows."]
    if gap > TIE and low > 0:
        return "bad", [*said, f"The merged model is worse than the base on its own mixture: do not use it ({told})."]
    if high < 0:
        return "good", [*said, f"The merged model is better than the base on its own mixture ({told})."]
    return "none", [*said, f"On these rows the merged model cannot be told from the base ({told}): try more --rows."]


# ---- noise on the weights --------------------------------------------------------------------------------------------


def _disturbed(subject: Subject) -> list[str]:
    """Base, merged, and joint to compare with; without joint, the branches."""
    others = [JOINT] if JOINT in subject.labels else subject.branches
    return [label for label in subject.labels if label in (BASE, MERGED, *others)]


def _sigmas(settings: Settings) -> dict[Noise, tuple[float, ...]]:
    return {"isotropic": settings.sigmas_isotropic, "filter": settings.sigmas_filter}


def perturbation_passes(subject: Subject, settings: Settings) -> float:
    points = settings.draws * sum(len(s) for s in _sigmas(settings).values()) + 1
    return float(len(_disturbed(subject)) * points * len(subject.probes[MIXTURE].batches))


def measure_perturbation(subject: Subject, settings: Settings) -> Perturbation:
    """Loss under noise of both kinds at every sigma and draw; a draw is the same numbers for every model."""
    probe, labels = subject.probes[MIXTURE], _disturbed(subject)
    curves = []
    for i, label in enumerate(labels):
        subject.live.put({label: 1.0})
        loss = subject.live.mean_loss(probe)
        for kind, sigmas in _sigmas(settings).items():
            subject.tell(f"{label}, {kind}", i, len(labels))
            increases = np.array([_increases(subject, probe, label, kind, draw, sigmas, loss, settings.seed)
                                  for draw in range(settings.draws)])
            found = area(np.array(sigmas), increases)
            curves.append(PerturbationCurve(model=label, noise=kind, sigmas=list(sigmas), loss=loss,
                                            increases=increases.tolist(), area=found.mean, area_error=found.error))
    verdict, said = judge_perturbation(curves)
    return Perturbation(settings={"seed": settings.seed, "draws": settings.draws, "rows": settings.rows}, verdict=verdict,
                        said=said, curves=curves)


@torch.no_grad()
def _increases(subject: Subject, probe: Probe, label: str, kind: Noise, draw: int, sigmas: tuple[float, ...], loss: float,
               seed: int) -> list[float]:
    live, found = subject.live, []
    noise = {name: noise_for(kind, name, live.read(label, name), draw, seed) for name in live.parameters}
    for sigma in sigmas:
        for name, parameter in live.parameters.items():
            parameter.copy_(live.read(label, name).add_(noise[name], alpha=sigma))
        found.append(live.mean_loss(probe) - loss)
    return found


def judge_perturbation(curves: list[PerturbationCurve]) -> tuple[Verdict, list[str]]:
    """Describes: a flat minimum is no merit of its own. Says whether merged is flatter, beyond the draws' noise."""
    said = []
    for kind, words in (("isotropic", "Isotropic noise"), ("filter", "Noise in proportion to each row of weights")):
        areas = {c.model: c for c in curves if c.noise == kind}
        line = f"{words}, area under the rise of the loss: " + ", ".join(
            f"{m} {c.area:.3g} ± {c.area_error:.1g}" for m, c in areas.items())
        merged, joint = areas.get(MERGED), areas.get(JOINT)
        gap = paired_difference(merged.increases, joint.increases, merged.sigmas) if merged and joint else None
        if gap is not None:
            sure = not gap[1] <= 0 <= gap[2]
            line += "; merged is " + (f"{'flatter' if gap[0] < 0 else 'sharper'} than joint" if sure else "as flat as joint")
        said.append(line + ".")
    return "none", said
