"""Which diagnostics run, in which order, in how much time, and what they leave.

    diagnostics/NAME.json   diagnostics/NAME.png

A diagnostic whose JSON was made from just these models, rows and settings is not measured again. Before one starts, its
cost is predicted from the number of forward passes and the time of one on these rows; what does not fit the time that is
left is left out by name, with the time that it would take.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from anabranch.artifacts import (
    ArmRun,
    BranchManifest,
    Conflict,
    Gradients,
    MergeManifest,
    Mixture,
    Plan,
    digest,
    file_digest,
)
from anabranch.branches import train_settings
from anabranch.compare import Arm, arm_inputs
from anabranch.diagnose.arguments import NAMES, check_models
from anabranch.diagnose.artifacts import KINDS, Cost, Diagnostic
from anabranch.diagnose.feed import (
    displacement_passes,
    generalization_passes,
    lmc_passes,
    measure_displacement,
    measure_generalization,
    measure_lmc,
    measure_perturbation,
    measure_surface,
    perturbation_passes,
    surface_passes,
)
from anabranch.diagnose.feed_curvature import curvature_passes, measure_curvature
from anabranch.diagnose.feed_gradients import calibration_passes, map_passes, measure_calibration, measure_map
from anabranch.diagnose.subject import (
    BASE,
    JOINT,
    MERGED,
    MIXTURE,
    TRAINING,
    NotApplicable,
    Probe,
    Settings,
    Subject,
    check_finite,
    check_probes,
    joined_probe,
    live_model,
    make_probe,
)
from anabranch.engine.checkpoint import checkpoint_hash
from anabranch.engine.fetch import resolve
from anabranch.engine.merging import verify_files
from anabranch.errors import CorruptedError, OutputError, ProvenanceError
from anabranch.mixture import held_out_rows
from anabranch.mixture_summary import exclusion_lines
from anabranch.model import keep_buffers, load_tokenizer, resolve_model, select_trainable
from anabranch.plan import load_plan
from anabranch.recipe import EvaluateSection, MixtureSection, Recipe, Source
from anabranch.recipe import Model as ModelSection
from anabranch.report.diagnostic_figures import draw_picture
from anabranch.rows import Rows, budget_indices, load_unit
from anabranch.run import Run
from anabranch.vision import load_vision

Passes = Callable[[Subject, Settings], float]
Measure = Callable[[Subject, Settings], Diagnostic]
WORK: dict[str, tuple[Passes, Measure]] = {
    "displacement": (displacement_passes, measure_displacement),
    "generalization": (generalization_passes, measure_generalization),
    "lmc": (lmc_passes, measure_lmc),
    "map": (map_passes, measure_map),
    "perturbation": (perturbation_passes, measure_perturbation),
    "surface": (surface_passes, measure_surface),
    "calibration": (calibration_passes, measure_calibration),
    "curvature": (curvature_passes, measure_curvature),
}
DIAGNOSTICS = {name: WORK[name] for name in NAMES}
READS_EVERY_MODEL = ("displacement", "map", "surface")
# The settings that decide each; the others may change without it being measured again.
PROBE_SETTINGS = ("seed", "rows", "batch_rows")
USES: dict[str, tuple[str, ...]] = {
    "displacement": (), "generalization": PROBE_SETTINGS, "lmc": ("points", *PROBE_SETTINGS), "map": ("seed",),
    "perturbation": ("draws", "sigmas_isotropic", "sigmas_filter", *PROBE_SETTINGS), "surface": ("grid", *PROBE_SETTINGS),
    "calibration": ("seed", "batch_rows", "sizes", "wanted_reliability"),
    "curvature": ("steps", "top", "axes", "representatives", *PROBE_SETTINGS)}
FROM_GRADIENTS = ("map", "calibration", "curvature")
MINUTES = 10.0


@dataclass(frozen=True)
class Outcome:
    """What became of a diagnostic: `found`, or why there is none."""

    name: str
    found: Diagnostic | None
    why: str = ""


# ---- what is diagnosed -----------------------------------------------------------------------------------------------


def subject_of_run(run: Run, settings: Settings) -> Subject:
    """Base, branches, merged, and joint where the run's comparison has it, with held-out rows by group.

    Raises:
        ProvenanceError: the run has no trained branches or no merged model yet, or they are not of this plan.
    """
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    folders, hashes, epochs = {BASE: run.base}, {BASE: run.base_hash}, {BASE: 0.0}
    passes = float(train_settings(run.recipe)["num_train_epochs"])
    own = passes * sum(u.samples for u in mixture.units) / max(1, sum(u.rows for u in mixture.units))
    missing = [str(g.group) for g in plan.groups if not (run.branch(g.group) / "branch.json").exists()]
    if missing or not (run.folder / "merged" / "manifest.json").exists():
        what = f"branch {', '.join(missing)}" if missing else "the merged model"
        raise ProvenanceError(f"{run.folder}: {what} is not there yet. Run `anabranch run recipe.yaml` to the end first.")
    problems: list[str] = []
    for group in plan.groups:
        manifest = BranchManifest.load(run.branch(group.group) / "branch.json")
        if manifest.made_from.get("plan") != plan.hash:
            raise ProvenanceError(f"{run.branch(group.group)}: was trained for another plan than plan.json now holds. Run "
                                  "`anabranch run recipe.yaml` again: it says what to do.")
        folders[f"branch-{group.group}"] = run.branch(group.group) / "model"
        hashes[f"branch-{group.group}"] = digest(manifest.files)
        epochs[f"branch-{group.group}"] = own
        problems += [f"{run.branch(group.group) / 'model' / name}: changed since it was trained" for name, sha in
                     manifest.files.items() if file_digest(run.branch(group.group) / "model" / name) != sha]
    merged = MergeManifest.load(run.folder / "merged" / "manifest.json")
    problems += _changed(run.folder / "merged") + _strangers(run, merged, plan, hashes)
    if problems:
        raise ProvenanceError.of(f"{run.folder}: these are not the models that the run made:", [
            *problems, "Restore them, or run `anabranch run recipe.yaml --from merge` (from train, for a branch)."])
    folders[MERGED], hashes[MERGED], epochs[MERGED] = run.folder / "merged", merged.model_hash, own
    if (joint := _joint_of(run)) is not None:
        folders[JOINT], epochs[JOINT] = joint, own
        hashes[JOINT] = MergeManifest.load(joint / "manifest.json").model_hash
    groups = {u.unit: u.group for u in plan.units}
    held = _rows(run, mixture, "held_out")
    by_group = {f"group-{g.group}": {u: r for u, r in held.items() if groups[u] == g.group} for g in plan.groups}
    live = live_model(folders, trainable=lambda model: list(select_trainable(model, run.recipe.model)),
                      trust_remote_code=run.recipe.model.trust_remote_code)
    return Subject(
        live, list(folders), [f"branch-{g.group}" for g in plan.groups], [g.weight for g in plan.groups],
        _probes(held, by_group, _rows(run, mixture, "train"), settings), hashes, run, plan, epochs)


def _strangers(run: Run, merged: MergeManifest, plan: Plan, hashes: dict[str, str]) -> list[str]:
    """What the merged model says it was made from, against what is there."""
    wanted = {"base": run.base_hash, "plan": plan.hash} | {k: h for k, h in hashes.items() if k != BASE}
    return [f"{run.folder / 'merged'}: was merged from another {name} than is there now" for name, found in wanted.items()
            if merged.made_from.get(name) != found]


def _changed(folder: Path) -> list[str]:
    """Tensors and files of a merged folder that are not as its manifest says; files that somebody added do no harm."""
    return [p for p in verify_files(folder) if p.startswith("tensor ") or not p.endswith("not made by the merge")]


def _joint_of(run: Run) -> Path | None:
    """The comparison's jointly trained model, of the recipe's seed if it is among them; one of other budgets is not taken."""
    joint = Arm("joint", "joint")
    found = sorted((run.folder / "compare" / "joint").glob("seed-*/arm.json"),
                   key=lambda p: (p.parent.name != f"seed-{run.recipe.seed}", p.parent.name))
    for path in found:
        known, now = ArmRun.load(path).made_from, arm_inputs(run, joint, int(path.parent.name.removeprefix("seed-")))
        changed = [key for key in now if key != "evaluation" and known.get(key) != now[key]]
        if not changed and not (problems := _changed(path.parent / "merged")):
            if path.parent.name != f"seed-{run.recipe.seed}":
                run.tell(f"joint: of {path.parent.name}, the comparison has none of the recipe's seed {run.recipe.seed}")
            return path.parent / "merged"
        run.tell(f"joint of {path.parent.name}: left out: " + (f"trained with another {', '.join(changed)} than the recipe now "
                                                               "asks for" if changed else problems[0]))
    return None


def _rows(run: Run, mixture: Mixture, split: str) -> dict[str, Rows]:
    """unit -> its rows; of training rows only those that its budget holds."""
    rows = {}
    for unit in mixture.units:
        found = load_unit(run.folder / "mixture" / unit.file, split)
        if split == "train":
            found = found.take(np.unique(budget_indices(len(found), unit.epochs, run.recipe.seed, unit.name)))
        if len(found):
            rows[unit.name] = found
    return rows


def _probes(held: dict[str, Rows], by_group: dict[str, dict[str, Rows]], training: dict[str, Rows],
            settings: Settings) -> dict[str, Probe]:
    """Groups share the mixture's rows, so that what is measured on them is also measured on it."""
    if not held:
        raise ProvenanceError("no unit has held-out rows, so there is nothing to diagnose on. Set `mixture.held_out` in the "
                              "recipe, and run it again.")
    filled = {name: rows for name, rows in by_group.items() if rows}
    probes = {}
    if len(filled) > 1:
        each = Settings(**(asdict(settings) | {"rows": max(1, settings.rows // len(filled))}))
        probes = {name: make_probe(name, rows, each) for name, rows in filled.items()}
        mixture = joined_probe(MIXTURE, list(probes.values()))
    else:
        mixture = make_probe(MIXTURE, held, settings)
    probes = {MIXTURE: mixture, **probes}
    return probes | ({TRAINING: make_probe(TRAINING, training, settings)} if training else {})


def subject_of_models(base: str, branches: Sequence[str], merged: str | None, joint: str | None, data: Sequence[str],
                      settings: Settings, *, max_length: int = 1024, warn: Callable[[str], None] = lambda _: None) -> Subject:
    """Models from anywhere, judged on files of held-out rows; each file (or unit in it) is a unit.

    Branch weights are those of the merged model's own manifest where it has as many, else equal.
    Raises:
        ModelError, ShapeMismatch, MixtureError: what does not load or line up, or has no usable row.
    """
    check_models(branches, merged)
    wanted = {BASE: base, **{f"branch-{i}": b for i, b in enumerate(branches)}}
    wanted |= ({MERGED: merged} if merged else {}) | ({JOINT: joint} if joint else {})
    folders = {label: resolve(path) for label, path in wanted.items()}
    resolve_model(ModelSection(path=str(folders[BASE])))  # the base must have a tokenizer
    live = live_model(folders, trainable=lambda model: [n for n, _ in model.named_parameters()])
    sources = [Source(path=str(Path(d).resolve()) if Path(d).exists() else d) for d in data]
    recipe = Recipe(model=ModelSection(path=str(folders[BASE])), mixture=MixtureSection(sources=sources, max_length=max_length),
                    evaluate=EvaluateSection(transfer=sources), seed=settings.seed, output=Path.cwd() / "diagnostics")
    rows, excluded = held_out_rows(recipe, load_tokenizer(folders[BASE]), vision=load_vision(folders[BASE]))
    for line in exclusion_lines(excluded):
        warn(f"left out: {line}")
    labels = [f"branch-{i}" for i in range(len(branches))]
    told = _told_weights(folders[MERGED]) if merged else {}
    weights = [told.get(folders[label].resolve(), 0.0) for label in labels]
    if len(told) != len(labels) or not all(weights):
        weights = [1 / len(labels)] * len(labels) if labels else []
        if len(labels) > 1:
            warn("branches weigh the same in the mean: the merged model's manifest.json does not name these branches' weights")
    hashes = {label: checkpoint_hash(folder) for label, folder in folders.items()}
    for one, other in itertools.combinations(hashes, 2):
        if hashes[one] == hashes[other]:
            warn(f"{one} and {other} are the same model ({folders[one]}, {folders[other]})")
    return Subject(live, list(folders), labels, weights, _probes(rows, {}, {}, settings), hashes)


def _told_weights(merged: Path) -> dict[Path, float]:
    """Folder of each branch -> its share, as the merge's own manifest has it; {} where it has none, or is another tool's."""
    try:
        manifest = MergeManifest.load(merged / "manifest.json")
    except CorruptedError:
        return {}
    places = [Path(one.label).expanduser().resolve() for one in manifest.inputs if one.local][: len(manifest.weights)]
    total = sum(manifest.weights)
    return {place: w / total for place, w in zip(places, manifest.weights, strict=False)} if total > 0 else {}


# ---- cost, order, files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """Predicted cost of a diagnostic; `why`: it cannot run on this subject."""

    name: str
    passes: float = 0.0
    seconds: float = 0.0
    why: str = ""


def _speed(subject: Subject) -> tuple[float, float]:
    """(seconds of a forward pass over a batch of the mixture's held-out rows, placing the weights included; seconds of
    reading one model), the faster of two."""
    probe, times, reads = subject.probes[MIXTURE], [], []
    for _ in range(2):
        begun = time.monotonic()
        subject.live.put({BASE: 1.0})
        reads.append(time.monotonic() - begun)
        subject.live.losses(probe)
        times.append(time.monotonic() - begun)
    return min(times) / len(probe.batches), min(reads)


def forecasts(subject: Subject, settings: Settings, names: Sequence[str]) -> list[Forecast]:
    """What each diagnostic would cost here.

    Raises:
        ModelError: a model holds NaN or infinity, or a row a token without an embedding.
    """
    check_probes(subject.probes, subject.live.model)
    check_finite(subject.live)
    (each, read), found = _speed(subject), []
    for name in names:
        try:
            passes = DIAGNOSTICS[name][0](subject, settings)
            reads = len(subject.labels) if name in READS_EVERY_MODEL else 0
            found.append(Forecast(name, passes, passes * each + reads * read))
        except NotApplicable as error:
            found.append(Forecast(name, why=str(error)))
    return found


def run_diagnostics(subject: Subject, out: Path, settings: Settings, *, only: list[str] | None = None,
                    minutes: float = MINUTES, tell: Callable[[str], None] = print,
                    progress: Callable[[str, str, int, int], None] = lambda *_: None) -> list[Outcome]:
    """Measure what is not there yet, in order, while the time lasts.

    Args:
        only: just these, whatever they take. None: all that fit `minutes`, by prediction.
    """
    keep_buffers()
    _writable(out)
    begun, outcomes = time.monotonic(), []
    names = only or list(DIAGNOSTICS)
    inputs = {name: _inputs(subject, settings, name) for name in names}
    there = {name: _known(out / f"{name}.json", name, inputs[name]) for name in names}
    todo = [name for name in names if there[name] is None]
    costs = {cost.name: cost for cost in forecasts(subject, settings, todo)} if todo else {}
    for name in names:
        path = out / f"{name}.json"
        if (known := there[name]) is not None:
            if not path.with_suffix(".png").exists():
                draw_picture(known, path.with_suffix(".png"))
            tell(f"{name}: as it was measured before ({path})")
            outcomes.append(Outcome(name, known))
            continue
        cost, left = costs[name], minutes * 60 - (time.monotonic() - begun)
        if cost.why or (only is None and cost.seconds > left):
            why = cost.why or (f"would take {_clock(cost.seconds)}, and {_clock(max(left, 0))} of --minutes {minutes:g} are "
                               f"left; `--only {name}` runs it whatever it takes")
            tell(f"{name}: left out: {why}")
            outcomes.append(Outcome(name, None, why))
            continue
        outcomes.append(_measure(subject, settings, cost, inputs[name], path, tell, progress))
    return outcomes


def _measure(subject: Subject, settings: Settings, cost: Forecast, inputs: dict[str, str], path: Path,
             tell: Callable[[str], None], progress: Callable[[str, str, int, int], None]) -> Outcome:
    tell(f"{cost.name}: {cost.passes:,.0f} forward passes, about {_clock(cost.seconds)}")
    subject.tell = lambda what, done, total: progress(cost.name, what, done, total)
    begun, before = time.monotonic(), subject.live.passes
    try:
        found = DIAGNOSTICS[cost.name][1](subject, settings)
    except NotApplicable as error:
        tell(f"{cost.name}: left out: {error}")
        return Outcome(cost.name, None, str(error))
    progress(cost.name, "", 1, 1)
    spent = Cost(predicted_passes=cost.passes, predicted_seconds=round(cost.seconds, 2),
                 measured_passes=subject.live.passes - before, measured_seconds=round(time.monotonic() - begun, 2))
    found = found.model_copy(update={"made_from": inputs, "cost": spent})
    found.save(path)
    draw_picture(found, path.with_suffix(".png"))
    for line in found.said:
        tell(f"  {line}")
    mark = {"good": "good", "bad": "BAD", "none": "no verdict"}[found.verdict]
    tell(f"  {mark}; {spent.measured_passes:,.0f} passes, {_clock(spent.measured_seconds)} -> {path}, {path.stem}.png")
    return Outcome(cost.name, found)


def _inputs(subject: Subject, settings: Settings, name: str) -> dict[str, str]:
    """What a diagnostic depends on."""
    made_from = {label: subject.hashes[label] for label in subject.labels}
    used = {key: getattr(settings, key) for key in USES[name]}
    made_from["settings"] = digest([name, used, subject.weights, list(subject.live.trainable)])
    made_from["rows"] = digest({n: p.hash for n, p in subject.probes.items()})
    if subject.plan is not None:
        made_from["plan"] = subject.plan.hash
    if subject.run is not None and name in FROM_GRADIENTS:
        for kind, path in ((Gradients, "gradients/gradients.json"), (Conflict, "conflict/conflict.json")):
            if (subject.run.folder / path).exists():
                made_from[path.split("/")[0]] = kind.load(subject.run.folder / path).hash
    return made_from


def _known(path: Path, name: str, inputs: dict[str, str]) -> Diagnostic | None:
    """The artifact that is there, if it was made from just this. A damaged one is made again."""
    try:
        found = KINDS[name].load(path)
    except CorruptedError:
        return None
    return found if found.made_from == inputs else None


def _writable(out: Path) -> None:
    """Told before minutes of work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}. Give another folder with --output.") from error


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
