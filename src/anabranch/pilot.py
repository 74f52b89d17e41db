"""`anabranch pilot`: every arm on a few per cent of the tokens, and what that says about the full budget.

Two questions, never mixed. How far will the branches drift apart? That the conflict stage's spectral test answers. Which arm
gives the better model, where, at what trade? That only training answers: each arm is trained on two small budgets under
every seed, evaluated at the three places, and its loss forecast (outlook.py).

    RUN/mixture gradients conflict       of the run itself, made if they are not there
    RUN/pilot/recipe.json                what workers go by
    RUN/pilot/share-S/mixture/mixture.json        budgets of share S; rows stay where they are
    RUN/pilot/share-S/compare/ARM/seed-N/arm.json written last; weights are removed after it
    RUN/pilot.json

The groups are the full run's, whatever the share.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from anabranch import conflict as conflict_maths
from anabranch import outlook as maths
from anabranch import pilot_budget as budget
from anabranch.artifacts import (
    ArmRun,
    Conflict,
    Evaluation,
    Interval,
    Mixture,
    Pilot,
    PilotAdvice,
    PilotCost,
    PilotDrift,
    PilotForecast,
    PilotPoint,
    PilotRun,
    PilotScore,
    Plan,
    digest,
    write_atomically,
)
from anabranch.branches import train_settings
from anabranch.compare import PARTITIONED, Arm, arm_folder, arm_inputs, arm_plan, parse_arms, run_arm
from anabranch.errors import ProvenanceError, RecipeError
from anabranch.launch.local import Job as Process
from anabranch.launch.local import run_jobs
from anabranch.mixture import build_mixture
from anabranch.model import load_tokenizer, resolve_model
from anabranch.pilot_words import QUESTIONS, drift_lines, sentences
from anabranch.plan import make_plan
from anabranch.recipe import Recipe
from anabranch.run import (
    Progress,
    Run,
    check_ahead,
    check_groups,
    conflict_stage,
    gradient_stage,
    mixture_stage,
    record_recipe,
    reopen_run,
)
from anabranch.scores import PLACES
from anabranch.vision import load_vision

# Of the full budget. Budgets of this share and a quarter of it, two seeds and six arms to train are 0.9 joint trainings: a
# pilot sees fewer tokens than one of the arms that it helps to choose among, and 5 % of what `anabranch compare` would.
SHARE = 0.06
SEEDS = 2

Todo = tuple[Arm, int]


def default_arms(recipe: Recipe) -> str:
    """Joint training in three ways, a soup, and three ways to make the recipe's number of groups (merit: 2^r, at least K)."""
    groups = recipe.split.groups if recipe.split.method not in ("joint", "soup") and recipe.split.groups > 1 else 4
    axes = max(1, (groups - 1).bit_length())
    return f"joint,joint_matched,joint_batch:{groups},soup:2,random:{groups},stratified:{groups},merit:{axes}"


def parse_pilot_arms(text: str) -> list[Arm]:
    """Arms of a pilot: `joint` must be among them, the base always is. Raises RecipeError."""
    arms = [a for a in parse_arms(text) if a.method != "base"]
    if not any(a.method == "joint" for a in arms) or len(arms) < 2:
        raise RecipeError("--methods: a pilot forecasts differences to joint training: the list must have `joint` and at least "
                          "one other arm (joint,joint_matched,merit:2, say).")
    return [Arm("base", "base"), *arms]


@dataclass(frozen=True)
class Prospect:
    """What a pilot would do and cost, for one mixture."""

    recipe: Recipe
    arms: list[Arm]
    seeds: int
    shares: list[float]
    mixtures: list[Mixture]
    full: Mixture
    jobs: list[budget.Job]
    seconds: float

    @property
    def passes(self) -> float:
        return float(train_settings(self.recipe)["num_train_epochs"])

    @property
    def full_tokens(self) -> int:
        return round(self.passes * self.full.tokens)

    @property
    def rung_tokens(self) -> list[int]:
        return [round(self.passes * m.tokens) for m in self.mixtures]

    @property
    def trained(self) -> list[Arm]:
        return [a for a in self.arms if a.method not in ("base", "joint_matched")]

    @property
    def tokens(self) -> int:
        return sum(self.rung_tokens) * len(self.trained) * self.seeds

    def joint_steps(self, share: float) -> int:
        return next(j.steps for j in self.jobs if j.arm == "joint" and j.share == share)

    @property
    def full_steps(self) -> int:
        return math.ceil(self.passes * sum(u.samples for u in self.full.units) / budget.full_batch(self.recipe))

    def lines(self) -> list[str]:
        rungs = "; ".join(f"{s:.3g} of the tokens ({t:,}): for joint {self.joint_steps(s):,} steps, rows of a step "
                          f"{budget.pilot_batch(self.recipe, s)}" for s, t in zip(self.shares, self.rung_tokens, strict=True))
        return [f"pilot: {len(self.arms) - 1} arms ({', '.join(a.label for a in self.arms[1:])}), {self.seeds} "
                f"seed{'s' if self.seeds > 1 else ''}",
                f"  budgets: {rungs}. The full run: {self.full_tokens:,} tokens, {self.full_steps:,} steps, rows of a step "
                f"{budget.full_batch(self.recipe)}",
                f"  cost, predicted: {self.tokens:,} tokens of training, {self.tokens / self.full_tokens:.2f} of one full "
                f"joint training, about {self.seconds:,.0f} s of work, {self.recipe.launch.max_parallel} process"
                f"{'es' if self.recipe.launch.max_parallel > 1 else ''} at a time"]


def look_ahead(run: Run, mixture: Mixture, folder: Path, arms: list[Arm], seeds: int, share: float) -> Prospect:
    """Budgets, steps, cost. Before the conflict is measured the groups are not known: then balanced ones are assumed.

    Raises:
        RecipeError, PlanError: a share or an arm that cannot be, before anything is trained.
    """
    shares = budget.shares_up_to(share)
    check_groups(len(mixture.units), {a.label: a.number for a in arms if a.method in PARTITIONED})
    lengths, recipe = budget.row_lengths(mixture, folder), run.recipe
    mixtures = [budget.pilot_mixture(mixture, lengths, s, recipe.seed, "") for s in shares]
    jobs = _checked_jobs(run, mixture, mixtures, arms, seeds, shares)
    speed = budget.try_speed(recipe, run.base, mixture, folder, [j.batch for j in jobs])
    matched = sum(a.method == "joint_matched" for a in arms) * len(shares)
    return Prospect(recipe, arms, seeds, shares, mixtures, mixture, jobs, speed.of(jobs, seeds, matched))


def _checked_jobs(run: Run, full: Mixture, small: list[Mixture], arms: list[Arm], seeds: int,
                  shares: list[float]) -> list[budget.Job]:
    """The jobs of one seed, once every seed's branches are known to get a step. Raises RecipeError."""
    jobs = [[job for s, m in zip(shares, small, strict=True) for job in _jobs(run, full, m, arms, s, seed)]
            for seed in range(seeds)]
    everything = [job for one in jobs for job in one]
    if any(min(j.branch_rows) < j.batch for j in everything):
        budget.check_jobs(everything, shares[-1], _workable(run, full, arms, seeds, shares[-1]))
    return jobs[0]


def _jobs(run: Run, full: Mixture, small: Mixture, arms: list[Arm], share: float, seed: int) -> list[budget.Job]:
    passes, batch = float(train_settings(run.recipe)["num_train_epochs"]), budget.pilot_batch(run.recipe, share)
    samples = {u.name: u.samples * passes for u in small.units}
    jobs = []
    for arm in arms:
        if arm.method in ("base", "joint_matched"):
            continue
        rows = [sum(samples.values()) / arm.number] * arm.number
        if arm.method == "joint_batch":
            rows = [sum(samples.values())]
        elif arm.method == "random" or (arm.method in PARTITIONED and (run.folder / "conflict" / "conflict.json").exists()):
            plan = arm_plan(run, full, arm, seed)
            rows = [sum(samples[u.unit] for u in plan.units if u.group == g.group) for g in plan.groups]
        jobs.append(budget.Job(arm.label, share, tuple(rows), batch * (arm.number if arm.method == "joint_batch" else 1)))
    return jobs


def _workable(run: Run, mixture: Mixture, arms: list[Arm], seeds: int, share: float) -> float | None:
    """The smallest share, in steps of a tenth, whose budgets all give every branch a step; None: none does."""
    while (share := math.ceil(share * 1.1 * 1e4) / 1e4) <= budget.LARGEST_SHARE:
        ok = True
        for s in budget.shares_up_to(share):
            counts = budget.rounded([u.samples for u in mixture.units], [u.name for u in mixture.units], s, run.recipe.seed)
            small = mixture.model_copy(update={"units": [u.model_copy(update={"samples": n})
                                                         for u, n in zip(mixture.units, counts, strict=True)]})
            ok = ok and all(min(j.branch_rows) >= j.batch for seed in range(seeds)
                            for j in _jobs(run, mixture, small, arms, s, seed))
        if ok:
            return share
    return None


def dry_pilot(recipe: Recipe, arms: list[Arm], seeds: int, share: float, progress: Progress = lambda *_: None) -> list[str]:
    """What a pilot would do and cost, as lines; the mixture is made in a folder that is thrown away."""
    check_ahead(recipe)
    run = Run(recipe, recipe.output, resolve_model(recipe.model), "dry run", lambda _: None, progress)
    tokenizer = load_tokenizer(run.base, trust_remote_code=run.recipe.model.trust_remote_code)
    vision = load_vision(run.base, trust_remote_code=run.recipe.model.trust_remote_code)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixture = build_mixture(run.recipe, tokenizer, folder, vision=vision, base_hash="dry run",
                                progress=lambda *a: run.progress("mixture", *a))
        prospect = look_ahead(replace(run, folder=folder), mixture, folder, arms, seeds, share)
    return [*prospect.lines(), *_gradient_line(run, mixture), "Nothing was written. Without --dry-run the same command starts."]


def _gradient_line(run: Run, mixture: Mixture) -> list[str]:
    if (run.folder / "gradients" / "gradients.json").exists():
        return []
    rows = [min(u.rows, run.recipe.gradients.calibration_samples) * u.tokens / max(u.samples, 1) for u in mixture.units]
    return [f"  gradients are measured first, once for this pilot and every later run: about {sum(rows):,.0f} tokens"]


# ---- running ---------------------------------------------------------------------------------------------------------


def run_pilot(run: Run, arms: list[Arm], seeds: int = SEEDS, share: float = SHARE) -> Pilot:
    """Mixture, gradients and conflict if they are not there; every arm at every share and seed that is not; the forecast.

    Raises:
        RecipeError, PlanError: a share or an arm that cannot be, before anything is trained.
        ProvenanceError: RUN/pilot was made from something else.
        BranchFailed: naming what failed; the others are kept.
    """
    check_ahead(run.recipe)
    mixture = mixture_stage(run)
    prospect = look_ahead(run, mixture, run.folder / "mixture", arms, seeds, share)
    for line in [*prospect.lines(), *_gradient_line(run, mixture)]:
        run.tell(line)
    gradient_stage(run)
    conflict = conflict_stage(run)
    drift, norm_cv = measure_drift(run, conflict)
    run.tell(QUESTIONS[0])
    for line in drift_lines(drift, norm_cv):
        run.tell(f"  {line}")
    _checked_jobs(run, mixture, prospect.mixtures, arms, seeds, prospect.shares)  # now by the groups that the conflict makes
    _train(run, prospect)
    pilot = _result(run, prospect, drift, norm_cv)
    pilot.save(run.folder / "pilot.json")
    return pilot


def _train(run: Run, prospect: Prospect) -> None:
    for share, mixture in zip(prospect.shares, prospect.mixtures, strict=True):
        up = "../../../mixture/"
        placed = {p: [u.model_copy(update={"file": up + u.file}) for u in getattr(mixture, p)]
                  for p in ("units", "transfer", "retention")}
        mixture.model_copy(update=placed).save(_rung_folder(run, share) / "mixture" / "mixture.json")
    seeds = range(prospect.seeds)
    first = [(a, s) for a in prospect.arms if a.method != "joint_matched" for s in (seeds[:1] if a.method == "base" else seeds)]
    second = [(a, s) for a in prospect.arms if a.method == "joint_matched" for s in seeds]
    _forget_stale(run, first, second, prospect.shares)
    record_recipe(_worker_run(run))
    for wave in (first, second):
        _run_wave(run, [(a, s) for a, s in wave if not _all_done(run, a, s, prospect.shares)], prospect)
    for share in prospect.shares:
        for joint in _rung_folder(run, share).glob("compare/joint/seed-*/branches/*/model"):
            shutil.rmtree(joint)


def _worker_run(run: Run) -> Run:
    return replace(run, folder=run.folder / "pilot")


def _rung_folder(run: Run, share: float) -> Path:
    return run.folder / "pilot" / f"share-{share:g}"


def rung(run: Run, share: float) -> Run:
    """A run folder inside the run's, with the small budget's mixture and recipe: `run_arm` needs no more."""
    return replace(run, recipe=budget.pilot_recipe(run.recipe, share), folder=_rung_folder(run, share))


def _groups_of(run: Run) -> Callable[[Run, Mixture, Arm, int], Plan]:
    """The full run's groups with a small budget's sizes."""
    full = run.mixture

    def plan_of(_: Run, mixture: Mixture, arm: Arm, seed: int) -> Plan:
        whole = arm_plan(run, full, arm, seed)
        return make_plan(whole.method, {u.unit: u.group for u in whole.units}, len(whole.groups), mixture, seed,
                         whole.made_from | {"whole": whole.hash, "mixture": digest(
                             {u.name: [u.sha256, u.samples, u.tokens] for u in mixture.units})})

    return plan_of


def _shares_of(arm: Arm, shares: Sequence[float]) -> Sequence[float]:
    return shares[:1] if arm.method == "base" else shares


def _forget_stale(run: Run, first: list[Todo], second: list[Todo], shares: Sequence[float]) -> None:
    """Refuse work made from something else; remove what was evaluated otherwise, and arms whose weights are needed again."""
    for arm, seed in first + second:
        for share in _shares_of(arm, shares):
            folder = arm_folder(rung(run, share), arm, seed)
            state = _state(run, arm, seed, share)
            emptied = (folder / "merged" / "manifest.json").exists() and not list((folder / "merged").glob("*.safetensors"))
            if state == "evaluated otherwise" or (state == "missing" and emptied):
                shutil.rmtree(folder)
    for arm, seed in second:
        for share in shares:
            joint = arm_folder(rung(run, share), Arm("joint", "joint"), seed)
            if _state(run, arm, seed, share) != "done" and not (joint / "branches" / "0" / "model").exists():
                shutil.rmtree(joint, ignore_errors=True)


def _state(run: Run, arm: Arm, seed: int, share: float) -> str:
    """missing, done, or evaluated otherwise. Raises ProvenanceError."""
    small = rung(run, share)
    path = arm_folder(small, arm, seed) / "arm.json"
    if not path.exists():
        return "missing"
    known, inputs = ArmRun.load(path).made_from, arm_inputs(small, arm, seed, _groups_of(run))
    if changed := [k for k in inputs if known.get(k) != inputs[k] and k != "evaluation"]:
        raise ProvenanceError(f"{path.parent}: made from another {', '.join(changed)} than the recipe now asks for. Delete "
                              f"{run.folder / 'pilot'} to run the pilot anew, give the recipe another `output`, or take the "
                              "change back.")
    return "done" if known["evaluation"] == inputs["evaluation"] else "evaluated otherwise"


def _all_done(run: Run, arm: Arm, seed: int, shares: Sequence[float]) -> bool:
    return all(_state(run, arm, seed, s) == "done" for s in _shares_of(arm, shares))


def _run_wave(run: Run, todo: list[Todo], prospect: Prospect) -> None:
    """As many processes as may run at once, each with its part of the arms: importing the trainer takes longer than a rung."""
    count = min(run.recipe.launch.max_parallel, len(todo))
    shares = ",".join(map(repr, prospect.shares))
    jobs = [Process(f"pilot {i}", [sys.executable, "-m", "anabranch", "pilot-arms", str(run.folder), shares,
                                   ",".join(f"{a.label}@{s}" for a, s in todo[i::count])],
                    run.folder / "pilot" / f"log-{i}.txt") for i in range(count)]
    results = [arm_folder(rung(run, share), arm, seed) / "arm.json" for arm in prospect.arms
               for share in _shares_of(arm, prospect.shares)
               for seed in range(1 if arm.method == "base" else prospect.seeds)]
    if jobs:
        launch = run.recipe.launch
        run_jobs(jobs, max_parallel=launch.max_parallel, threads=launch.threads, on_tick=lambda *_: run.progress(
            "pilot", "", sum(p.exists() for p in results), len(results)))


def work(folder: Path, shares: list[float], todo: list[Todo], tell: Callable[[str], None]) -> None:
    """Some arms under some seeds at all shares, in this process (`anabranch pilot-arms`)."""
    run = replace(reopen_run(folder / "pilot", tell=tell), folder=folder.resolve())
    for arm, seed in todo:
        for share in _shares_of(arm, shares):
            small = rung(run, share)
            place = arm_folder(small, arm, seed)
            if _state(run, arm, seed, share) != "done":
                begun = time.monotonic()
                run_arm(small, arm, seed, _groups_of(run))
                write_atomically(place / "seconds.json", json.dumps(time.monotonic() - begun).encode())
            for weights in (place / "merged").glob("*.safetensors"):  # evaluated; only its manifest is needed again
                weights.unlink()


# ---- what it says ----------------------------------------------------------------------------------------------------

def measure_drift(run: Run, conflict: Conflict) -> tuple[list[PilotDrift], Interval | None]:
    """The spectral tests' ratio and the norms' spread, with jackknife intervals over units."""
    gram, count = load_file(run.folder / "conflict" / "conflict.safetensors")["gram"], len(conflict.units)
    if count < 3:
        return [], None
    drift = []
    for test in conflict.spectral_tests:
        if 2 ** test.axes > count - 1 - count // 100:  # one unit (or block) less must still make as many groups
            continue

        def log_ratio(kept: np.ndarray, axes: int = test.axes) -> float:  # a ratio: its error is a factor
            return math.log(max(conflict_maths.spectral_tests(gram[np.ix_(kept, kept)], axes)[-1].ratio, 1e-12))

        span = maths.jackknife(log_ratio, count, run.recipe.seed)
        drift.append(PilotDrift(axes=test.axes, ratio=_interval(maths.Span(*map(math.exp, span)))))
    norms = np.array(conflict.norms)
    spread = maths.jackknife(lambda kept: conflict_maths.norm_concentration(norms[kept]).cv, count, run.recipe.seed)
    return drift, _interval(spread)


def _interval(span: maths.Span) -> Interval:
    return Interval(value=span.value, low=span.low, high=span.high)


def _result(run: Run, prospect: Prospect, drift: list[PilotDrift], norm_cv: Interval | None) -> Pilot:
    runs, seen, seconds, hashes = [], [], 0.0, []
    for arm in prospect.arms:
        for share, tokens in zip(_shares_of(arm, prospect.shares), prospect.rung_tokens, strict=False):
            for seed in range(1 if arm.method == "base" else prospect.seeds):
                folder = arm_folder(rung(run, share), arm, seed)
                told = ArmRun.load(folder / "arm.json")
                evaluation = Evaluation.load(folder / "evaluation.json")
                runs.append(PilotRun(arm=arm.label, share=share, seed=seed, tokens=told.tokens, alpha=told.alpha,
                                     displacement=told.displacement,
                                     evaluation=str((folder / "evaluation.json").relative_to(run.folder))))
                seen += [maths.Observation(arm.label, place, unit, seed, 0 if arm.method == "base" else tokens, score.loss)
                         for place in PLACES for unit, score in getattr(evaluation, place).items()]
                seconds += _seconds(folder)
                hashes.append(told.hash)
    view = maths.forecast(seen, prospect.full_tokens, run.recipe.seed)
    advice = _advice(view, runs, prospect.shares[-1])
    trained = {a.label for a in prospect.trained}
    measured = sum(r.tokens for r in runs if r.arm in trained)
    return Pilot(
        shares=prospect.shares, tokens=prospect.rung_tokens, seeds=list(range(prospect.seeds)),
        batches=[budget.pilot_batch(run.recipe, s) for s in prospect.shares],
        steps=[prospect.joint_steps(s) for s in prospect.shares], full_tokens=prospect.full_tokens,
        full_batch=budget.full_batch(run.recipe), full_steps=prospect.full_steps, form=maths.DEFAULT_FORM, trend=maths.TREND,
        drift=drift, norm_cv=norm_cv, runs=runs, forecasts=_forecasts(view, prospect), advice=advice,
        scores=[PilotScore(arm=a, versus_joint=_interval(view.difference(a, "joint"))) for a in view.arms],
        said=sentences(view, advice, prospect.shares[-1], prospect.seeds),
        cost=PilotCost(predicted_tokens=prospect.tokens, predicted_seconds=prospect.seconds, measured_tokens=measured,
                       measured_seconds=seconds),
        made_from={"base": run.base_hash, "mixture": prospect.full.hash, "arms": digest(hashes)})


def _seconds(folder: Path) -> float:
    try:
        return float(json.loads((folder / "seconds.json").read_text()))
    except (OSError, ValueError):  # stopped between the result and its time
        return 0.0


def _forecasts(view: maths.Outlook, prospect: Prospect) -> list[PilotForecast]:
    rows = []
    joint = view.arms.index("joint")
    for p, place in enumerate(view.places):
        for a, arm in enumerate(view.arms):
            points = [PilotPoint(share=s, tokens=t, loss=float(view.curves[a, p, i]),
                                 versus_joint=float(view.curves[a, p, i] - view.curves[joint, p, i]))
                      for i, (s, t) in enumerate(zip(prospect.shares, prospect.rung_tokens, strict=True))]
            rows.append(PilotForecast(arm=arm, place=place, points=points, loss=_interval(view.loss(arm, place)),
                                      versus_joint=_interval(view.difference(arm, "joint", place)),
                                      versus_base=_interval(view.difference(arm, "base", place))))
    return rows


def _advice(view: maths.Outlook, runs: list[PilotRun], share: float) -> PilotAdvice:
    advice = maths.advise(view)
    method = advice.arm.split(":")[0]
    alphas = [r.alpha for r in runs if r.arm == advice.arm and r.share == share and r.alpha is not None]
    return PilotAdvice(action="pull_back" if method == "joint_matched" else "joint" if method.startswith("joint") else "split",
                       arm=advice.arm, alpha=float(np.mean(alphas)) if alphas else None, lowest=advice.best,
                       tied=list(advice.tied), known=set(advice.tied) <= {advice.arm, advice.best})


def parse_todo(text: str) -> list[Todo]:
    """'joint@0,joint_matched:merit:2@1' -> arms and seeds, as the launcher writes them."""
    todo = []
    for part in text.split(","):
        label, _, seed = part.rpartition("@")
        name, _, reference = label.partition(":")
        todo.append((Arm(label, name, 1, reference) if name == "joint_matched" else parse_arms(label)[0], int(seed)))
    return todo
