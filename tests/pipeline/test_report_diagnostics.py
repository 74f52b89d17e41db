"""The diagnostics' pictures and sections: every hostile shape is drawn, nothing is clipped, names are inert."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import linkage
from test_report import Page, fake_run

from anabranch.artifacts import (
    Gradients,
    Interval,
    Operators,
    Pilot,
    PilotAdvice,
    PilotCost,
    PilotDrift,
    PilotForecast,
    PilotPoint,
    PilotScore,
    digest,
)
from anabranch.diagnose.artifacts import (
    KINDS,
    Alignment,
    Calibration,
    ContractionCheck,
    Cost,
    Curvature,
    Diagnostic,
    Displacement,
    FittedModel,
    Generalization,
    GradientMap,
    LinearModeConnectivity,
    LossSurface,
    MapPoint,
    Mark,
    MergingGain,
    ModelDisplacement,
    Perturbation,
    PerturbationCurve,
    Segment,
    UnitCalibration,
)
from anabranch.diagnose.feed import judge_perturbation, judge_segments
from anabranch.errors import CorruptedError
from anabranch.report import markdown_report, write_report
from anabranch.report.canvas import WIDTH, Sheet
from anabranch.report.contents import read_contents
from anabranch.report.diagnostic_figures import DRAWINGS, draw_picture, picture_svg
from anabranch.report.diagnostics import NAMES, finding, flatter, last_pair, lowest, segment_kind
from anabranch.report.displacement_figures import telling
from anabranch.report.figures import DARK, LIGHT, Theme, settings
from anabranch.scores import TIE

EVIL = '<script>alert("1")</script> & \'x\' | `y` $z^$ \u202e\x1b[31m ![i](http://evil.example/p.png)'
COST = Cost(predicted_passes=1234, predicted_seconds=61.5, measured_passes=1240, measured_seconds=58.2)
COMMON = {"settings": {"seed": 0}, "said": ["One sentence with `code` in it.", "Another."], "cost": COST}


def models(branches: int) -> list[str]:
    return ["base", *(f"branch-{k}" for k in range(branches)), "merged", "joint"]


def lmc(branches: int = 4, groups: int = 4, barrier: float = 0.0, names: list[str] | None = None) -> LinearModeConnectivity:
    draw = np.random.default_rng(branches)
    names = names or [f"branch-{k}" for k in range(branches)]
    pairs = [*combinations(names, 2), *((n, "merged") for n in names), ("base", "merged")]
    alphas = np.linspace(0, 1, 21)
    segments = []
    for rows in ["mixture", *(f"group-{g}" for g in range(groups))]:
        level = {n: 2.5 + 0.08 * i + 0.1 * draw.normal() for i, n in enumerate(names)} | {"merged": 2.17, "base": 2.29}
        for i, (a, b) in enumerate(pairs):
            bump = barrier * (i % 5 == 3) * draw.uniform(0.5, 1)
            depth = 0.35 * (a != "base") * (b != "merged") + 0.1
            losses = (1 - alphas) * level[a] + alphas * level[b] + 4 * (bump - depth * (bump == 0)) * alphas * (1 - alphas)
            gap = losses - ((1 - alphas) * level[a] + alphas * level[b])
            at = int(np.argmax(gap))
            half = 0.0 if at in (0, 20) else 0.01 + 0.02 * draw.random()
            segments.append(Segment(start=a, end=b, rows=rows, alphas=alphas.tolist(), losses=losses.tolist(),
                                    barrier=max(0.0, float(gap[at])), at=float(alphas[at]), low=float(gap[at]) - half,
                                    high=float(gap[at]) + half))
    return LinearModeConnectivity(blocks={"mixture": 32}, segments=segments, verdict="bad" if barrier else "good", **COMMON)


def displacement(branches: int = 4, layers: int = 6, whole: bool = True) -> Displacement:
    draw = np.random.default_rng(5)
    names = [n for n in models(branches)[1:] if whole or n != "joint"]
    norm = {"merged": 10.3, "joint": 26.6} | {f"branch-{k}": 17 + 2 * draw.random() for k in range(branches)}
    parts = ["embed_tokens", *map(str, range(layers)), "norm", "lm_head"]
    kinds = {"attention": 0.6, "mlp": 0.7, "norm": 0.1, "embedding": 0.35, "head": 0.3}
    share = np.abs(draw.normal(1, 0.3, len(parts))) * np.array([1.6, *np.linspace(0.6, 1.2, layers), 0.1, 0.9])
    share /= np.linalg.norm(share)
    made = [ModelDisplacement(
        model=n, norm=norm[n], relative=norm[n] / 410, by_type={k: norm[n] * v for k, v in kinds.items()},
        by_layer={p: float(norm[n] * s * draw.uniform(0.9, 1.1)) for p, s in zip(parts, share, strict=True)}) for n in names]
    v = np.vstack([draw.normal(0, 1, (branches, 12)) + 0.5, np.zeros((len(names) - branches, 12))])
    v[branches:] = v[:branches].mean(0) + 0.1 * draw.normal(size=(len(names) - branches, 12))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    check = ContractionCheck(branches=310.2, merged=106.1, spread=204.1, error=3e-9, merged_from_file=106.1, is_average=True)
    return Displacement(base_norm=410, parameters=2_400_000, models=made, labels=names, cosines=(v @ v.T).tolist(),
                        weights=[1 / branches] * branches, contraction=check if whole else None,
                        joint_over_merged=2.58 if whole else None, verdict="none", **COMMON)


def surface(off: float = 0.4, steep: float = 1.0) -> LossSurface:
    x, y = np.linspace(-4, 22, 15), np.linspace(-4, 19, 15)
    losses = 2.15 + steep * 0.0035 * ((x[None] - 9) ** 2 + 1.4 * (y[:, None] - 6) ** 2) ** (1 + 0.35 * (steep > 1))
    marks = [Mark(model="base", x=0, y=0, off=0, loss=2.293), Mark(model="branch-0", x=18.1, y=0, off=0, loss=2.49),
             Mark(model="branch-1", x=7.5, y=16.2, off=0, loss=2.61), Mark(model="merged", x=8.4, y=5.1, off=off, loss=2.171),
             Mark(model="joint", x=13.0, y=8.0, off=17.2, loss=1.904)]
    return LossSurface(corners=["base", "branch-0", "branch-1"], rows="mixture", x=x.tolist(), y=y.tolist(),
                       losses=losses.tolist(), marks=marks, verdict="none", **COMMON)


def generalization(epochs: tuple[float | None, ...] = (0.5, 1, 3), training: bool = True) -> Generalization:
    made = []
    for i, e in enumerate(epochs):
        for model, fit, held in (("merged", 2.20 - 0.03 * i, 2.19 - 0.05 * i),
                                 ("joint", 1.78 - 0.42 * i, 1.95 - 0.11 * i + 0.09 * i**2)):
            made.append(FittedModel(model=model, epochs=e, training=fit if training or model != "joint" else None,
                                    training_low=fit - 0.04 if training else None, held_out=held,
                                    training_high=fit + 0.04 if training else None, held_out_low=held - 0.06,
                                    held_out_high=held + 0.06))
    made.append(FittedModel(model="base", epochs=0.0 if epochs[0] is not None else None, training=2.36, training_low=2.3,
                            training_high=2.42, held_out=2.293, held_out_low=2.22, held_out_high=2.36))
    return Generalization(models=made, verdict="none", **COMMON)


def perturbation(who: list[str] | None = None, draws: int = 5) -> Perturbation:
    draw, curves = np.random.default_rng(8), []
    for noise, sigmas in (("isotropic", [0.002, 0.005, 0.01, 0.02, 0.05]), ("filter", [0.05, 0.1, 0.2, 0.4])):
        for i, model in enumerate(who or ["base", "merged", "joint", "branch-0", "branch-1", "branch-2", "branch-3"]):
            s = np.array(sigmas)
            mean = (1 + 0.35 * i) * 3.0 * (s / s[-1]) ** 2
            values = mean * draw.normal(1, 0.12, (draws, len(s))) - (0.002 if noise == "filter" else 0)
            area = float(np.trapezoid(np.append(0, values.mean(0)), np.append(0, s)))
            curves.append(PerturbationCurve(model=model, noise=noise, sigmas=sigmas, loss=2.2, increases=values.tolist(),
                                            area=area, area_error=0.04 * area))
    return Perturbation(curves=curves, verdict="good", **COMMON)


def curvature(alignment: bool = True, gain: bool = True, axes: int = 3) -> Curvature:
    draw = np.random.default_rng(2)
    top = (40 * 0.72 ** np.arange(10)).tolist()
    cosines = np.abs(draw.normal(0, 0.1, (axes, 10)))
    cosines[0, 0] = 0.304
    found = Alignment(units=["a", "b", "c", "d"], cosines=cosines.tolist(), largest=0.304,
                      angles=[69.5, 78.1, 86.4][:axes], random_mean=0.0009, random_std=0.0002, z=1534.2)
    made = MergingGain(rows="mixture", quadratic=0.281, top=0.094, measured=0.352, low=0.31, high=0.394)
    ritz = sorted([*top, *(draw.exponential(0.4, 34)), *(-draw.exponential(0.2, 6))])
    return Curvature(rows="mixture", eigenvalues=top, residuals=(0.001 * 1.6 ** np.arange(10)).tolist(), ritz=ritz, steps=50,
                     hvp="autodiff", hvp_difference=2.3e-4, alignment=found if alignment else None, gain=made if gain else None,
                     verdict="none", **COMMON)


def calibration(units: int = 24, names: list[str] | None = None) -> Calibration:
    draw, made = np.random.default_rng(3), []
    sizes = [25, 50, 100, 150, 200, 300, 400, 500, 700, 1000]
    for i in range(units):
        noise, rows = float(10 ** draw.uniform(1, 2.6)), int(draw.choice([60, 200, 1000]))
        mine = [n for n in sizes if n < rows] + [rows]
        signal = i % 9 != 8
        made.append(UnitCalibration(
            unit=(names or [f"task_{j:03d}" for j in range(units)])[i], rows=rows, sizes=mine,
            cosines=[*(float(np.sqrt(n / (n + noise))) for n in mine[:-1]), 1.0],
            reliability=[n / (n + noise) if signal else float(draw.normal(-0.05, 0.08)) for n in mine],
            needed=int(9 * noise) if signal else None))
    return Calibration(wanted=0.9, units=made, sizes=sizes, verdict="bad", mean_cosine=np.linspace(0.6, 1, 10).tolist(),
                       mean_reliability=np.linspace(0.4, 0.93, 10).tolist(), **COMMON)


def gradient_map(units: int = 24, groups: int = 4, names: list[str] | None = None) -> GradientMap:
    draw = np.random.default_rng(7)
    group = [i % groups for i in range(units)]
    angle = 2 * np.pi * np.arange(groups) / groups
    centre = np.column_stack([np.cos(angle), np.sin(angle)]) * (0.8 if groups > 1 else 0)
    xy = centre[group] + draw.normal(0, 0.3, (units, 2))
    many, names = units > 4, names or [f"task_{i:03d}" for i in range(units)]
    points = [MapPoint(name=names[i], role="unit", group=group[i], pca=tuple(xy[i]),
                       tsne=tuple(14 * xy[i] + draw.normal(0, 3, 2)) if many else None) for i in range(units)]
    points += [MapPoint(name=f"branch-{g}", role="branch", group=g, pca=tuple(centre[g] * 1.1),
                        tsne=tuple(16 * centre[g]) if many else None) for g in range(groups)]
    points.append(MapPoint(name="merged", role="merged", group=None, pca=(0.02, 0.05), tsne=(0.4, 1.0) if many else None))
    wide = np.hstack([xy, draw.normal(0, 0.3, (units, 6))])
    tree = [(int(a), int(b), float(h), int(n)) for a, b, h, n in linkage(wide, "average", "cosine")] if units > 1 else []
    return GradientMap(points=points, explained=[0.26, 0.18], linkage=tree, cophenetic=0.81,
                       silhouette=0.21 if groups > 1 else None, no_direction=(0.6, 0.5), verdict="none", **COMMON)


def pilot() -> Pilot:
    draw, forecasts, scores = np.random.default_rng(4), [], []
    arms = {"base": 0.3, "joint": 0.0, "joint_matched:merit:2": -0.12, "joint_batch:4": -0.02, "random:4": 0.11,
            "stratified:4": 0.12, "merit:1": 0.06, "merit:2": 0.13, "soup:2": -0.01}
    for arm, gap in arms.items():
        for place, sign in (("held_out", 1.0), ("transfer", -2.0), ("retention", -1.5)):
            value, half = sign * gap, 0.0 if arm == "joint" else 0.05 + 0.05 * draw.random()
            points = [PilotPoint(share=share, tokens=int(2e6 * share), loss=2 + value, versus_joint=value * k)
                      for share, k in ((0.01, 0.3), (0.03, 0.6))]
            here = Interval(value=value, low=value - half, high=value + half)
            forecasts.append(PilotForecast(arm=arm, place=place, points=points, loss=here, versus_joint=here, versus_base=here))
        scores.append(PilotScore(arm=arm, versus_joint=Interval(value=-gap, low=-gap - 0.04, high=-gap + 0.04)))
    advice = PilotAdvice(action="pull_back", arm="joint_matched:merit:2", alpha=0.39, lowest="merit:2", known=False,
                         tied=["joint_matched:merit:2", "merit:2"])
    return Pilot(shares=[0.01, 0.03], tokens=[22_000, 66_000], batches=[16, 16], steps=[20, 60], seeds=[0, 1],
                 full_tokens=2_200_000, full_batch=16, full_steps=2000, form="power_law", trend=0.5, norm_cv=None, runs=[],
                 forecasts=forecasts, drift=[PilotDrift(axes=1, ratio=Interval(value=2.1, low=1.4, high=2.9))], scores=scores,
                 advice=advice, said=["A forecast, not a measurement."],
                 cost=PilotCost(predicted_tokens=900_000, predicted_seconds=40, measured_tokens=901_000, measured_seconds=44))


def operators() -> Operators:
    def result(name: str, loss: float, difference: float | None) -> dict[str, Any]:
        place = {"loss": loss, "token_loss": loss - 0.1, "exact_match": None, "f1": None, "difference": difference,
                 "low": None if difference is None else difference - 0.02, "wins": 3, "ties": 1, "losses": 20,
                 "high": None if difference is None else difference + 0.02}
        return {"name": name, "arguments": None, "displacement": 10.3, "folder": None, "bytes": 0,
                "places": {"held_out": place, "retention": place}}

    return Operators.model_validate({"weights": [0.25] * 4, "verdict": ["`ties` is worse."], "results": [
        result("base", 2.29, 0.12), result("ties", 2.35, 0.18), result("token_weighted", 2.17, None)]})


def long_names(count: int) -> list[str]:
    return [f"a/very/long path to a unit ({i}) of the {'mixture' * 9}_{i:03d}" for i in range(count)]


CASES: dict[str, Diagnostic] = {
    "lmc": lmc(), "lmc: a barrier, 8 branches and groups": lmc(8, 8, 0.4), "lmc: 12 branches": lmc(12, 0),
    "lmc: 2 models from anywhere": lmc(0, 0, 0.2, names=["../my model.v1", EVIL]),
    "lmc: nothing": lmc().model_copy(update={"segments": []}),
    "displacement": displacement(), "displacement: 8 branches, 36 layers": displacement(8, 36),
    "displacement: no joint": displacement(2, 2, whole=False),
    "surface": surface(), "surface: far off a steep plane": surface(3, 20),
    "surface: flat": surface().model_copy(update={"losses": [[2.0] * 15] * 15}),
    "generalization": generalization(), "generalization: epochs unknown": generalization((None,)),
    "generalization: training loss unknown": generalization((1.0,), training=False),
    "perturbation": perturbation(), "perturbation: one draw": perturbation(["merged", "joint"], 1),
    "perturbation: nothing": perturbation().model_copy(update={"curves": []}),
    "curvature": curvature(), "curvature: no alignment": curvature(alignment=False),
    "curvature: no gain, one axis": curvature(gain=False, axes=1), "curvature: neither": curvature(alignment=False, gain=False),
    "calibration": calibration(), "calibration: one unit": calibration(1), "calibration: 300 units": calibration(300),
    "calibration: long names": calibration(3, long_names(3)),
    "map": gradient_map(), "map: without the mark": gradient_map().model_copy(update={"no_direction": None}),
    "map: one group": gradient_map(9, 1), "map: 300 units in 8 groups": gradient_map(300, 8),
    "map: 3 units": gradient_map(3, 3), "map: one unit": gradient_map(1, 1),
    "map: long names": gradient_map(60, 8, long_names(60)),
    "map: names that are markup": gradient_map(5, 2, [EVIL, "b", "c", "d", "e"]),
}


def drawn(diagnostic: Diagnostic, theme: Theme = LIGHT) -> tuple[Figure, float]:
    drawing = DRAWINGS[type(diagnostic)]
    height = drawing.height(diagnostic)
    with settings():
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor=theme.paper)
        FigureCanvasAgg(figure)
        drawing.draw(Sheet(figure, theme, height), diagnostic)
        figure.canvas.draw()
    return figure, height


def run_with(folder: Path, found: list[Diagnostic]) -> Path:
    run = fake_run(folder / "run", 8)
    for diagnostic in found:
        kind = next(k for k, cls in KINDS.items() if isinstance(diagnostic, cls))
        diagnostic.save(run / "diagnostics" / f"{kind}.json")
    return run


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_every_kind_has_a_drawing_a_name_and_a_case():
    assert set(DRAWINGS) == set(KINDS.values()) == {type(d) for d in CASES.values()}
    assert set(NAMES) == set(KINDS)


@pytest.mark.parametrize("case", CASES)
def test_nothing_runs_over_the_edge_or_over_another_text(case):
    """Every panel, with its labels, and every legend and text lies within the sheet, and none on another."""
    figure, height = drawn(CASES[case], DARK)
    renderer = figure.canvas.get_renderer()
    assert figure.axes or "nothing" in case
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        assert box.x0 >= -1 and box.x1 <= WIDTH + 1 and box.y0 >= -1 and box.y1 <= height + 1, axes.get_title(loc="left")
    for text in [*figure.texts, *(t for made in figure.legends for t in made.get_texts())]:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= WIDTH and box.y0 >= 0 and box.y1 <= height, text.get_text()
    frames = [a.get_tightbbox(renderer) for a in figure.axes]
    frames += [part.get_window_extent(renderer) for part in (*figure.legends, *figure.texts)]
    crowded = [(i, j) for i, a in enumerate(frames) for j, b in enumerate(frames[:i])
               if min(a.x1, b.x1) - max(a.x0, b.x0) > 3 and min(a.y1, b.y1) - max(a.y0, b.y0) > 3]
    assert not crowded


@pytest.mark.parametrize("case", ["lmc", "surface", "map", "curvature"])
def test_pictures_are_the_same_bytes_twice_and_of_the_stated_size(tmp_path, case):
    draw_picture(CASES[case], tmp_path / "a.png")
    draw_picture(CASES[case].model_copy(deep=True), tmp_path / "b.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert int.from_bytes(data[16:20]) == 1350
    assert not list(tmp_path.glob(".*"))


def test_dark_pictures_use_no_colour_of_the_light_theme():
    def shades(theme: Theme) -> set[str]:
        return {theme.ink, theme.soft, theme.line, *theme.groups}

    for kind in KINDS:
        figure, _ = drawn(CASES[kind], DARK)
        colours = [artist.get_color() for artist in figure.findobj(lambda a: hasattr(a, "get_color"))]
        used = {to_hex(colour) for colour in colours if isinstance(colour, str) and colour != "none"}
        assert used & shades(DARK) and not used & (shades(LIGHT) - shades(DARK)), kind


def test_axes_carry_units():
    wanted = {"lmc": "nats per response token", "displacement": "L2 distance", "surface": "L2 distance", "perturbation": "σ",
              "generalization": "nats per response token", "curvature": "nats / distance²", "calibration": "examples",
              "map": "of the variance"}
    for kind, unit in wanted.items():
        figure, _ = drawn(CASES[kind])
        labels = [label for a in figure.axes for label in (a.get_xlabel(), a.get_ylabel())]
        assert any(unit in label for label in labels), kind


def test_markup_in_a_name_stays_text_in_the_picture():
    source = picture_svg(CASES["map: names that are markup"], "x") + picture_svg(CASES["lmc: 2 models from anywhere"], "y")
    assert "<script" not in source and "&lt;script&gt;" in source and "\x1b" not in source and "\u202e" not in source


# ---- words -----------------------------------------------------------------------------------------------------------


def test_findings_follow_the_figures():
    assert finding(CASES["lmc"]).startswith("No barrier on any of 11 segments")
    assert "A barrier:" in finding(lmc(8, 8, 0.4))
    assert "2.58 times as far" in finding(displacement())
    assert "The merged model lies 10.30" in finding(displacement(whole=False))
    assert "better than the merged model (1.780 against 2.200)" in finding(generalization((1.0,)))
    assert "None of 1 units" in finding(calibration(1).model_copy(update={
        "units": [calibration(1).units[0].model_copy(update={"needed": None})]}))
    assert finding(surface()).startswith("The merged model has a lower loss, 2.171")
    worse = surface().marks[3].model_copy(update={"loss": 2.4})
    said = finding(surface().model_copy(update={"marks": [*surface().marks[:3], worse]}))
    assert "2.400, is not below the best corner's (base, 2.293)" in said


def test_a_segment_is_named_by_its_ends_whichever_comes_first():
    one = lmc().segments[0]
    for start, end, kind in (("branch-1", "branch-0", "branch–branch"), ("merged", "branch-11", "branch–merged"),
                             ("merged", "base", "base–merged"), ("joint", "merged", "joint–merged")):
        assert segment_kind(one.model_copy(update={"start": start, "end": end})) == kind


def segment(rows: str, barrier: float, low: float) -> Segment:
    return Segment(start="branch-0", end="branch-1", rows=rows, alphas=[0, 0.5, 1], losses=[2, 2 + barrier, 2], barrier=barrier,
                   at=0.5, low=low, high=barrier + 0.1)


@pytest.mark.parametrize(("segments", "blocks", "title"), [
    ([segment("mixture", 0.04, -0.02), segment("group-0", 0.4, 0.3)], 32,
     "No barrier: of 1 segments the highest rise is 0.040"),
    ([segment("mixture", TIE / 2, TIE / 4), segment("mixture", 0.4, -0.1)], 32, "No barrier: of 2 segments"),
    ([segment("mixture", 0.9, -0.1), segment("mixture", 0.2, 0.1), segment("group-0", 2.0, 1.9)], 32,
     "A barrier: 1 of 2 segments rise above the line between their ends; most, by 0.200"),
    ([segment("mixture", 0.2, 0.1)], 2, "Barriers not judged: of 1 segments the highest rise is 0.200")],
    ids=["only a group's rows", "below a tie, or within chance", "a barrier", "too few blocks"])
def test_the_title_of_connectivity_is_the_verdict_s(segments, blocks, title):
    verdict, _ = judge_segments(segments, blocks)
    assert finding(LinearModeConnectivity(blocks={}, segments=segments, verdict=verdict, **COMMON)).startswith(title)


def test_what_the_picture_of_connectivity_marks_is_in_its_title_and_its_sentences():
    """Three marks on single groups' rows under a title of none would be two answers."""
    segments = [segment("mixture", 0.0, 0.0), segment("group-3", 0.0, 0.0)]
    segments[1:1] = [segment(f"group-{g}", 0.4, 0.3) for g in range(3)]
    verdict, said = judge_segments(segments, 32)
    title = finding(LinearModeConnectivity(blocks={}, segments=segments, verdict=verdict, **COMMON))
    assert title == "No barrier on any of 1 segments on the mixture's rows; on single groups' rows: 3 of 4"
    assert "On single groups' rows 3 of 4 curves have a barrier (above 0.01 nats" in " ".join(said)
    assert "over 32 blocks of held-out rows" in " ".join(said)
    one = segments[:2]
    title = finding(LinearModeConnectivity(blocks={}, segments=one, verdict=judge_segments(one, 32)[0], **COMMON))
    assert title.endswith("; on single groups' rows: 1 of 1")
    figure, _ = drawn(LinearModeConnectivity(blocks={"mixture": 32}, segments=segments, verdict=verdict, **COMMON))
    assert any("32 blocks of 8 held-out rows" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("lmc") and "nothing" not in case])
def test_names_of_ticks_keep_clear_of_the_next_panel(case):
    figure, _ = drawn(CASES[case])
    renderer = figure.canvas.get_renderer()
    boxes = [label.get_window_extent(renderer) for axes in figure.axes for label in axes.get_xticklabels() if label.get_text()]
    assert boxes and not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]


def frozen(places: list[str], moved: tuple[str, ...]) -> Displacement:
    """Two models that moved by 1 in `moved` and nowhere else."""
    made = [ModelDisplacement(model=name, norm=1.0, relative=0.1, by_layer={p: 1.0 * (p in moved) for p in places},
                              by_type={"embedding": 1.0 * bool(moved), "other": 0.0}) for name in ("merged", "joint")]
    return displacement().model_copy(update={"models": made})


def test_modules_in_which_nothing_moved_are_left_out_of_the_picture_and_counted():
    places = ["model.vision_tower.embeddings", "model.vision_tower.post_norm", "model.language_model.embed_tokens", "0",
              "model.language_model.norm"]
    figure, _ = drawn(frozen(places, tuple(places[2:])))
    names = {axes.get_title(loc="left"): [label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes}
    assert names["By layer"] == ["embed_tokens", "0", "norm"] and names["By type of module"] == ["embedding"]
    assert any(text.get_text().startswith("Not drawn: 2 of 5 layers and modules") for text in figure.texts)
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes if axes.get_title(loc="left").startswith("By"))
    for case in (frozen(places, ()), displacement()):  # nothing moved at all; everything did
        figure, _ = drawn(case)
        assert not any("Not drawn" in text.get_text() for text in figure.texts)
        assert sum(len(axes.get_xticks()) for axes in figure.axes if axes.get_title(loc="left") == "By layer") >= 5


def test_cut_names_keep_what_tells_them_apart():
    vision = ["model.vision_tower.embeddings.patch_embedding", "model.vision_tower.embeddings.position_embedding",
              "model.audio_tower.embeddings.patch_embedding", "0"]
    assert telling(vision)[1:] == ["position_embedding", telling(vision)[2], "0"]
    assert len(set(telling(vision))) == 4
    long = [f"a.{'same_' * 6}{end}_and_more" for end in ("left", "right")]
    assert [("left" in cut, "right" in cut) for cut in telling(long)] == [(True, False), (False, True)]
    assert telling(["x.norm", "x.norm"]) == ["norm", "norm"]


def noisy(model: str, level: float, draws: int = 5, own: float = 0.0) -> PerturbationCurve:
    """Draws that differ much from each other, but alike in every model; `own`: by how much in this one alone."""
    rises = [[level + 3.0 * i + own * (-1) ** i] for i in range(draws)]
    return PerturbationCurve(model=model, noise="filter", sigmas=[1.0], loss=2, increases=rises,
                             area=sum(r[0] for r in rises) / draws / 2, area_error=2.0)


def test_flatter_is_judged_on_the_same_draws():
    """The errors of the areas, 2.0 each, would hide all of this."""
    assert flatter(noisy("merged", 1.0), noisy("joint", 1.5)) == "merged"
    assert flatter(noisy("merged", 1.5), noisy("joint", 1.0)) == "joint"
    assert flatter(noisy("merged", 1.5, own=2.0), noisy("joint", 1.0)) == ""
    assert flatter(noisy("merged", 1.5, 1), noisy("joint", 1.0, 1)) is None


@pytest.mark.parametrize(("curves", "title"), [
    ([noisy("merged", 1.5), noisy("joint", 1.0), noisy("base", 0.1)], "joint is flatter than the merged model"),
    ([noisy("merged", 1.0), noisy("joint", 1.5)], "the merged model is flatter than joint"),
    ([noisy("merged", 1.0, own=2.0), noisy("joint", 1.5)], "no clear difference between merged and joint"),
    ([noisy("merged", 1.0, 1), noisy("joint", 1.5, 1)], "one draw does not tell merged from joint"),
    ([noisy("merged", 1.0), noisy("base", 1.5), noisy("branch-0", 2.0)], "merged is flattest"),
    ([noisy("merged", 1.0), noisy("base", 1.1, own=2.0)], "no model is clearly flatter than all others"),
    ([noisy("merged", 1.0, 1), noisy("base", 1.5, 1)], "one draw does not tell the models apart")])
def test_the_title_of_perturbation_is_what_its_sentences_say(curves, title):
    assert finding(Perturbation(curves=curves, verdict="none", **COMMON)) == f"Under filter-normalised noise {title}"
    said = " ".join(judge_perturbation(curves)[1])
    assert ("merged is sharper than joint" in said) == (title == "joint is flatter than the merged model")
    assert ("merged is flatter than joint" in said) == (title == "the merged model is flatter than joint")


def test_the_mark_of_no_direction_is_drawn_where_it_lies():
    for case, there in (("map", True), ("map: without the mark", False)):
        figure, _ = drawn(CASES[case])
        marks = [line for line in figure.axes[0].lines if line.get_marker() == "+"]
        assert [(*line.get_xdata(), *line.get_ydata()) for line in marks] == ([(0.6, 0.5)] if there else [])
        assert ("no direction in common" in [t.get_text() for made in figure.legends for t in made.get_texts()]) is there


def test_models_are_compared_at_the_most_epochs_that_both_have():
    fitted = [m for m in generalization((0.5, 3.0)).models if (m.model, m.epochs) != ("joint", 3.0)]
    pair = last_pair(Generalization(models=fitted, verdict="none", **COMMON))
    assert pair is not None and [m.epochs for m in pair] == [0.5, 0.5]


def test_lowest_point_of_the_grid_by_hand():
    small = surface().model_copy(update={"x": [0.0, 1.0, 2.0], "y": [5.0, 7.0], "losses": [[3.0, 2.0, 4.0], [2.5, 2.6, 1.5]]})
    assert lowest(small) == (2.0, 7.0, 1.5)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_sections_are_there_when_and_only_when_something_is(tmp_path):
    bare = write_report(fake_run(tmp_path / "bare", 8)).read_text()
    for key in ("diagnostics", "pilot", "methods"):
        assert f'id="{key}"' not in bare
    run = run_with(tmp_path, [lmc(2, 2, 0.4), surface()])
    pilot().save(run / "pilot.json")
    operators().save(run / "merge_methods.json")
    page, text = Page(write_report(run).read_text()), " ".join(markdown_report(run).split())
    for key in ("diagnostics", "pilot", "methods"):
        assert key in page.ids
    for words in ("Linear mode connectivity", "Loss surface", "A barrier:", "One sentence with",
                  "Recommended: train jointly and", "joint_matched:merit:2", "merge methods", "is worse."):
        assert words in page.text and words in text, words
    assert "Perturbation" not in page.text and "1,240" in page.text and "1,240 forward passes" in text
    assert "0 good, 1 bad" in page.text and "✗" in page.text and "(BAD)" in text


def test_page_with_everything_is_inert_light_and_the_same_twice(tmp_path):
    found = [lmc(4, 4, 0.3, names=[f"branch-{k}" for k in range(3)] + [EVIL]), displacement(), surface(), generalization(),
             perturbation(), curvature(), calibration(8, [EVIL, *long_names(7)]), gradient_map(8, 4, [EVIL, *long_names(7)])]
    run = run_with(tmp_path, [d.model_copy(update={"said": [EVIL]}) for d in found])
    pilot().save(run / "pilot.json")
    source = write_report(run).read_text()
    page = Page(source)
    assert "script" not in page.tags and not [k for k, _ in page.attributes if k.startswith("on")]
    assert "\x1b" not in source and "\u202e" not in source
    assert len(page.ids) == len(set(page.ids))
    assert {v[1:] for k, v in page.attributes if k in ("href", "xlink:href") and v.startswith("#")} <= set(page.ids)
    assert source.count('role="img"') == 8 + len(KINDS) + 1  # the run's own, the diagnostics', the pilot's
    assert not [c for c in (LIGHT.ink, LIGHT.soft, LIGHT.groups[0]) if c in source.split("</style>")[1]]
    assert len(source) < 1_500_000 and write_report(run).read_text() == source
    assert "<script" not in (run / "report.md").read_text().replace("\\<script", "")


def test_what_another_merge_left_is_not_shown_but_said(tmp_path):
    run = run_with(tmp_path, [displacement()])
    here = read_contents(run).merge
    assert here is not None
    surface().model_copy(update={"made_from": {"merged": here.model_hash}}).save(run / "diagnostics" / "surface.json")
    lmc(2, 2).model_copy(update={"made_from": {"merged": "another"}}).save(run / "diagnostics" / "lmc.json")
    operators().model_copy(update={"made_from": {"plan": "another"}}).save(run / "merge_methods.json")
    pilot().model_copy(update={"made_from": {"mixture": "another"}}).save(run / "pilot.json")
    contents = read_contents(run)
    assert set(contents.diagnostics) == {"displacement", "surface"}
    assert contents.outdated == ["lmc", "pilot", "merge_methods"] and contents.operators is None and contents.pilot is None
    page = Page(write_report(run).read_text())
    assert "than this folder now holds: lmc, pilot, merge_methods" in page.text and "Linear mode" not in page.text
    assert contents.plan is not None
    operators().model_copy(update={"made_from": {"plan": contents.plan.hash}}).save(run / "merge_methods.json")
    pilot().model_copy(update={"made_from": {"mixture": contents.mixture.hash}}).save(run / "pilot.json")
    assert read_contents(run).outdated == ["lmc"]


@pytest.mark.parametrize("name", ["base", "plan", "branch-1", "merged", "conflict"])
def test_what_another_input_left_is_not_shown(tmp_path, name):
    run = run_with(tmp_path, [displacement()])
    before = read_contents(run)
    assert before.plan is not None and before.merge is not None and before.conflict is not None
    here = {"base": before.mixture.made_from.get("base", "b"), "plan": before.plan.hash, "merged": before.merge.model_hash,
            "branch-1": digest(before.branches[1].files), "conflict": before.conflict.hash, "joint": "any", "rows": "any"}
    mixture = before.mixture.model_copy(update={"made_from": {"base": here["base"]}})
    mixture.save(run / "mixture" / "mixture.json")
    surface().model_copy(update={"made_from": here}).save(run / "diagnostics" / "surface.json")
    lmc(2, 2).model_copy(update={"made_from": here | {name: "another"}}).save(run / "diagnostics" / "lmc.json")
    assert read_contents(run).outdated == ["lmc"]
    assert "than this folder now holds: lmc" in " ".join(markdown_report(run).split())


def test_diagnostics_of_other_gradients_are_not_shown_and_what_is_not_there_is_not_compared(tmp_path):
    run = run_with(tmp_path, [surface().model_copy(update={"made_from": {"gradients": "another", "branch-99": "another"}})])
    assert read_contents(run).outdated == []  # no gradients there to compare with
    gradients = Gradients(sketch="fold", size=4, parameters=9, seed=0, calibration_samples=2, units=[])
    gradients.save(run / "gradients" / "gradients.json")
    assert read_contents(run).outdated == ["surface"]
    surface().model_copy(update={"made_from": {"gradients": gradients.hash}}).save(run / "diagnostics" / "surface.json")
    assert read_contents(run).outdated == []


def test_a_damaged_diagnostic_is_said(tmp_path):
    run = run_with(tmp_path, [surface()])
    path = run / "diagnostics" / "surface.json"
    path.write_text(path.read_text().replace('"corners"', '"corner"'))
    with pytest.raises(CorruptedError, match=r"surface\.json"):
        write_report(run)
    path.write_text("{")
    with pytest.raises(CorruptedError, match=r"surface\.json"):
        markdown_report(run)
