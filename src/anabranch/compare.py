"""The paper's table on the user's own mixture: every arm on the same token budget, at three places, over seeds.

An arm is written `name` or `name:number`:

    base                 no training
    joint                one branch on everything
    joint_matched[:ARM]  joint pulled back to a merged arm's distance from the base: base + alpha (joint - base),
                         alpha = that arm's displacement / joint's (WiSE-FT, arXiv:2109.01903); default ARM: the last
                         merit arm. Tells whether a shorter step alone explains a gain
    joint_batch:F        joint with F times the batch and 1/F of the steps: what a merge of F branches imitates if all
                         units share one Hessian
    soup:K               K branches on the whole mixture in different orders, each for 1/K of the tokens
    random:K stratified:K kmeans:K conflict_greedy:K
    merit:R              R axes, 2^R groups

Arms are independent jobs; each trains its branches, merges, evaluates, and leaves arm.json last.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anabranch.artifacts import (
    ArmRun,
    ArmSummary,
    BranchManifest,
    Comparison,
    Evaluation,
    MergeManifest,
    Mixture,
    Plan,
    UnitScore,
    digest,
)
from anabranch.branches import train_hash, train_settings
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import ProvenanceError, RecipeError, closest
from anabranch.evaluate import evaluation_inputs
from anabranch.families import frozen_tensors
from anabranch.launch.local import Job, run_jobs
from anabranch.recipe import Recipe
from anabranch.run import (
    Run,
    check_ahead,
    check_groups,
    conflict_stage,
    evaluate_folder,
    gradient_stage,
    merge_branches,
    mixture_stage,
    record_recipe,
    split_groups,
)
from anabranch.scores import PLACES, TIE, Place, macro_loss, mean_answer, paired_interval, token_loss, wilcoxon_better
from anabranch.trainers.command import train_group

SPLITS = ("random", "stratified", "kmeans", "conflict_greedy", "soup")
PARTITIONED = ("merit", "random", "stratified", "kmeans", "conflict_greedy")
NAMES = ("base", "joint", "joint_matched", "joint_batch", "merit", *SPLITS)
DEFAULT = ("base,joint,joint_matched,joint_batch:4,soup:2,random:4,stratified:4,kmeans:4,merit:1,merit:2,merit:3")


Scores = dict[str, UnitScore]
Table = dict[tuple[str, Place], ArmSummary]


@dataclass(frozen=True)
class Arm:
    """One column of the comparison. `number` is K (merit: already 2^R; joint_batch: the factor)."""

    label: str
    method: str
    number: int = 1
    reference: str = ""

    @property
    def slug(self) -> str:
        return self.label.replace(":", "-")


def parse_arms(text: str) -> list[Arm]:
    """'joint,merit:2' -> arms. Raises RecipeError naming every problem."""
    arms, problems = [], []
    labels = [part.strip() for part in text.split(",") if part.strip()]
    if not labels:
        problems.append("wanted arms, as in joint,random:4,merit:2")
    for label in labels:
        name, _, rest = label.partition(":")
        if name not in NAMES:
            problems.append(f"`{label}`: no such arm.{closest(name, NAMES)}")
        elif name in ("base", "joint"):
            if rest:
                problems.append(f"`{label}`: {name} takes no number.")
            arms.append(Arm(name, name))
        elif name == "joint_matched":
            arms.append(Arm(label, name, 1, rest))
        elif not rest.isdigit() or int(rest) < 1:
            problems.append(f"`{label}`: wants a number, as in {name}:{2 if name in ('merit', 'soup') else 4}.")
        else:
            arms.append(Arm(label, name, 2 ** int(rest) if name == "merit" else int(rest)))
    if problems:
        raise RecipeError.of("--methods:", problems)
    arms = _with_references(arms)
    labels = [a.label for a in arms]
    if repeated := sorted({x for x in labels if labels.count(x) > 1}):
        raise RecipeError.of("--methods:", [f"`{label}` stands twice." for label in repeated])
    return arms


def _with_references(arms: list[Arm]) -> list[Arm]:
    """joint_matched needs joint and a merged arm to match."""
    merged = [a.label for a in arms if a.method in ("merit", *SPLITS)]
    merit = [a.label for a in arms if a.method == "merit"]
    done = []
    for arm in arms:
        if arm.method == "joint_matched":
            reference = arm.reference or (merit or merged or [""])[-1]
            if reference not in merged or not any(a.method == "joint" for a in arms):
                raise RecipeError(f"--methods: `{arm.label}` pulls joint training back to a merged arm's distance from the "
                                  "base: the list must have `joint` and that arm (merit:2, say).")
            arm = Arm(f"joint_matched:{reference}", arm.method, 1, reference)
        done.append(arm)
    return done


PlanOf = Callable[[Run, Mixture, Arm, int], Plan]


def arm_folder(run: Run, arm: Arm, seed: int) -> Path:
    return run.folder / "compare" / arm.slug / f"seed-{seed}"


def run_comparison(run: Run, arms: list[Arm], seeds: Sequence[int]) -> Comparison:
    """Every arm under every seed that is not there yet, then the table. Resumable.

    Raises:
        BranchFailed: naming the arms that failed; the others are kept.
    """
    check_ahead(run.recipe)
    mixture = mixture_stage(run)
    check_groups(len(mixture.units), {a.label: a.number for a in arms if a.method in PARTITIONED})
    if any(a.method in ("merit", "stratified", "kmeans", "conflict_greedy") for a in arms):
        gradient_stage(run)
        conflict_stage(run)
    first = [(a, s) for a in arms if a.method != "joint_matched" for s in (seeds[:1] if a.method == "base" else seeds)]
    second = [(a, s) for a in arms if a.method == "joint_matched" for s in seeds]
    for arm, seed in first + second:
        _is_done(run, arm, seed)  # refuses work made from something else before anything new is paid for
    record_recipe(run)
    for done, wave in ((0, first), (len(first), second)):
        _run_wave(run, wave, done, len(first) + len(second))
    runs = [ArmRun.load(arm_folder(run, a, s) / "arm.json") for a, s in first + second]
    summary = summarise(run, arms, runs)
    comparison = Comparison(seeds=list(seeds), runs=runs, summary=summary, verdict=verdict(summary, runs, seeds),
                            made_from={"mixture": digest({u.name: u.sha256 for u in mixture.units}),
                                       "base": run.base_hash, "arms": digest([r.hash for r in runs])})
    comparison.save(run.folder / "compare.json")
    return comparison


def _run_wave(run: Run, wave: list[tuple[Arm, int]], before: int, total: int) -> None:
    """An arm is one process: the trainer's imports alone take longer than a small branch."""
    todo = [(a, s) for a, s in wave if not _is_done(run, a, s)]
    jobs = [Job(f"{a.label} seed {s}", [sys.executable, "-m", "anabranch", "compare-arm", str(run.folder),
                                        a.label, str(s)], arm_folder(run, a, s) / "log.txt") for a, s in todo]
    skipped = before + len(wave) - len(todo)
    if jobs:
        launch = run.recipe.launch
        run_jobs(jobs, max_parallel=launch.max_parallel, threads=launch.threads,
                 on_tick=lambda names, done: run.progress("compare", ", ".join(names), skipped + done, total))


def _is_done(run: Run, arm: Arm, seed: int) -> bool:
    path = arm_folder(run, arm, seed) / "arm.json"
    if not path.exists():
        return False
    known, inputs = ArmRun.load(path).made_from, arm_inputs(run, arm, seed)
    changed = [k for k in inputs if known.get(k) != inputs[k] and k != "evaluation"]
    if changed:
        raise ProvenanceError(
            f"{path.parent}: arm {arm.label} seed {seed} was made from another {', '.join(changed)} than the recipe now "
            f"asks for. Delete {run.folder / 'compare'} to compare anew, give the recipe another `output`, or take the "
            "change back.")
    return known["evaluation"] == inputs["evaluation"]


def arm_plan(run: Run, mixture: Mixture, arm: Arm, seed: int) -> Plan:
    """The plan that an arm would get now."""
    method, count = ("joint", 1) if arm.method == "joint_batch" else (arm.method, arm.number)
    return split_groups(run, mixture, method, count, seed)


def arm_inputs(run: Run, arm: Arm, seed: int, plan_of: PlanOf = arm_plan) -> dict[str, str]:
    """What an arm's figures depend on."""
    mixture = run.mixture
    data = {u.name: [u.sha256, u.samples, u.tokens] for u in mixture.units}
    return {"base": run.base_hash, "mixture": digest(data), "train": train_hash(run.recipe),
            "plan": _plan_hash(run, mixture, arm, seed, plan_of),
            "merge": digest(run.recipe.merge.model_dump(mode="json")), "arm": digest([arm.label, seed]),
            "evaluation": digest(evaluation_inputs(run.recipe, mixture, "any"))}


def _plan_hash(run: Run, mixture: Mixture, arm: Arm, seed: int, plan_of: PlanOf) -> str:
    if arm.method == "base":
        return "none"
    if arm.method == "joint_matched":
        return plan_of(run, mixture, parse_arms(arm.reference)[0], seed).hash
    return plan_of(run, mixture, arm, seed).hash


def run_arm(run: Run, arm: Arm, seed: int, plan_of: PlanOf = arm_plan) -> ArmRun:
    """Train, merge and evaluate one arm in this process. `plan_of` makes its plan from (run, mixture, arm, seed)."""
    folder, mixture = arm_folder(run, arm, seed), run.mixture
    folder.mkdir(parents=True, exist_ok=True)
    tokens, branches, alpha = 0, 0, None
    if arm.method == "base":
        model, model_hash, displacement = run.base, run.base_hash, 0.0
    else:
        if arm.method == "joint_matched":
            manifest, alpha = _pull_back(run, arm, seed, folder / "merged")
            tokens, branches = ArmRun.load(arm_folder(run, Arm("joint", "joint"), seed) / "arm.json").tokens, 1
        else:
            manifest, trained = _train_arm(run, arm, seed, folder, plan_of)
            tokens, branches = sum(b.tokens_seen for b in trained), len(trained)
        model, model_hash, displacement = folder / "merged", manifest.model_hash, displacement_of(manifest)
    evaluate_folder(run, mixture, model, arm.label, model_hash, folder / "evaluation.json")
    result = ArmRun(arm=arm.label, seed=seed, tokens=tokens, displacement=displacement, branches=branches, alpha=alpha,
                    evaluation=str((folder / "evaluation.json").relative_to(run.folder)),
                    made_from=arm_inputs(run, arm, seed, plan_of))
    result.save(folder / "arm.json")
    if arm.method != "joint":  # joint's float32 weights are pulled back later
        for weights in folder.glob("branches/*/model"):
            shutil.rmtree(weights)
    return result


def _train_arm(run: Run, arm: Arm, seed: int, folder: Path, plan_of: PlanOf) -> tuple[MergeManifest, list[BranchManifest]]:
    """Plan, branches and merge of an arm; what is already merged is not made again."""
    mixture, path = run.mixture, folder / "plan.json"
    plan = plan_of(run, mixture, arm, seed)
    if path.exists() and Plan.load(path) != plan and list(folder.glob("branches/*/branch.json")):
        raise ProvenanceError(f"{folder}: this arm was begun with another partition or other budgets than the recipe now "
                              f"asks for. Delete {folder}, or take the change back.")
    plan.save(path)
    paths = [folder / "branches" / str(g.group) for g in plan.groups]
    merged = folder / "merged" / "manifest.json"
    if merged.exists() and not (paths[0] / "model").exists():  # only the evaluation changed
        return MergeManifest.load(merged), [BranchManifest.load(p / "branch.json") for p in paths]
    recipe = with_larger_batch(run.recipe, arm.number) if arm.method == "joint_batch" else run.recipe
    trained = [train_group(recipe, plan, g.group, mixture, run.folder / "mixture", run.base, run.base_hash, p)
               for g, p in zip(plan.groups, paths, strict=True)]
    as_trained = Run(recipe, run.folder, run.base, run.base_hash, run.tell, run.progress)
    return merge_branches(as_trained, plan, paths, folder / "merged"), trained


def with_larger_batch(recipe: Recipe, factor: int) -> Recipe:
    """`factor` times the batch, by accumulation: the same memory, 1/factor of the steps."""
    accumulation = train_settings(recipe).get("gradient_accumulation_steps", 1) * factor
    return recipe.model_copy(update={"train": recipe.train | {"gradient_accumulation_steps": accumulation}})


def _pull_back(run: Run, arm: Arm, seed: int, out: Path) -> tuple[MergeManifest, float]:
    """base + alpha (joint - base) at the reference arm's distance. alpha > 1 lengthens joint's step: it is said, not cut."""
    reference = parse_arms(arm.reference)[0]
    joint = arm_folder(run, Arm("joint", "joint"), seed)
    far = displacement_of(MergeManifest.load(joint / "merged" / "manifest.json"))
    near = displacement_of(MergeManifest.load(arm_folder(run, reference, seed) / "merged" / "manifest.json"))
    alpha = near / far
    plan = Plan.load(joint / "plan.json")
    manifest = BranchManifest.load(joint / "branches" / "0" / "branch.json")
    made_from = {"base": run.base_hash, "plan": plan.hash, "branch-0": digest(manifest.files)}
    section = run.recipe.merge
    return merge_checkpoints("interpolate", run.base, [joint / "branches" / "0" / "model"], [1.0], out,
                             dtype=section.dtype, max_shard_size=section.max_shard_size, parameters={"alpha": alpha},
                             made_from=made_from, frozen=frozen_tensors(run.base, run.recipe.model)), alpha


def displacement_of(manifest: MergeManifest) -> float:
    """Every merge of a run measures it; one made by `anabranch merge` in its place does not."""
    if manifest.displacement is None:
        raise ProvenanceError("the merged model of an arm was not made by this comparison: its manifest.json has no "
                              "`displacement`. Remove that folder and run the same command again.")
    return manifest.displacement


# ---- the table ------------------------------------------------------------------------------------------------------


def summarise(run: Run, arms: list[Arm], runs: list[ArmRun]) -> list[ArmSummary]:
    """Per arm and place: means over units and seeds, and the paired difference to joint."""
    evaluations: dict[str, list[Evaluation]] = {}
    for record in runs:
        evaluations.setdefault(record.arm, []).append(Evaluation.load(run.folder / record.evaluation))
    rows = []
    for place in PLACES:
        joint = evaluations.get("joint", [])
        for arm in arms:
            scores = [getattr(e, place) for e in evaluations[arm.label]]
            if scores and scores[0]:
                rows.append(_summary_row(arm.label, place, scores, [getattr(e, place) for e in joint]))
    return rows


def _summary_row(arm: str, place: Place, scores: list[Scores], joint: list[Scores]) -> ArmSummary:
    by_seed = [macro_loss(s) or 0.0 for s in scores]
    loss, difference, p, counts = float(np.mean(by_seed)), None, None, (0, 0, 0)
    low: float | None = None
    high: float | None = None
    if joint:
        units = sorted(scores[0])
        gaps = (np.array([np.mean([s[u].loss for s in scores]) for u in units])
                - np.array([np.mean([s[u].loss for s in joint]) for u in units]))
        joint_by_seed = [macro_loss(s) or 0.0 for s in joint]
        difference = float(gaps.mean())
        if (interval := paired_interval(gaps.tolist(), place)) is not None:
            low, high = (x + float(np.mean(joint_by_seed)) for x in interval)
        counts = (int((gaps < -TIE).sum()), int((np.abs(gaps) <= TIE).sum()), int((gaps > TIE).sum()))
        paired = by_seed if len(by_seed) == len(joint_by_seed) else by_seed[:1] * len(joint_by_seed)
        p = wilcoxon_better([a - b for a, b in zip(paired, joint_by_seed, strict=True)])
    exact = [v for s in scores if (v := mean_answer(s, "exact_match")) is not None]
    f1 = [v for s in scores if (v := mean_answer(s, "f1")) is not None]
    return ArmSummary(
        arm=arm, place=place, loss=loss, loss_low=low, loss_high=high, loss_by_seed=by_seed,
        token_loss=float(np.mean([token_loss(s) or 0.0 for s in scores])),
        exact_match=float(np.mean(exact)) if exact else None, f1=float(np.mean(f1)) if f1 else None,
        versus_joint=difference, wins=counts[0], ties=counts[1], losses=counts[2], wilcoxon_p=p)


def verdict(summary: list[ArmSummary], runs: list[ArmRun], seeds: Sequence[int]) -> list[str]:
    """What the figures say, in sentences, and what they do not."""
    table = {(s.arm, s.place): s for s in summary}
    places = [p for p in PLACES if any(s.place == p for s in summary)]
    labels = list(dict.fromkeys(s.arm for s in summary))
    merged = [a for a in labels if a.split(":")[0] in ("merit", *SPLITS)]
    if len(set(labels) - {"base"}) < 2:
        return [f"Only {labels[-1]} was run: there is no other arm to compare it with. Give more with --methods."]
    lines = []
    for place in places:
        lines.append(_best_line(table, place, labels, merged))
    lines += _rivals_lines(table, places, labels, merged)
    lines += _split_lines(table, places, labels, len(seeds))
    lines.append("What this does not show: other model sizes, learning rates or token budgets; "
                 f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} cannot give a one-sided signed-rank p below "
                 f"{0.5 ** len(seeds):.3f}; intervals are over units, not over seeds; loss is not a chat's quality.")
    return [line for line in lines if line]


def _best_line(table: Table, place: Place, labels: list[str], merged: list[str]) -> str:
    words = {"held_out": "On held-out rows of the mixture", "transfer": "On units nobody trained on",
             "retention": "On what the base could do before"}
    ranked = sorted(labels, key=lambda a: table[a, place].loss)
    line = f"{words[place]}, {ranked[0]} is best (loss {table[ranked[0], place].loss:.3f})"
    if merged:
        best = min(merged, key=lambda a: table[a, place].loss)
        if best != ranked[0]:
            line += f"; the best merge is {best} ({table[best, place].loss:.3f})"
        row = table[best, place]
        if row.versus_joint is not None and "joint" in labels:
            gap, joint = row.versus_joint, table["joint", place].loss
            line += f"; {best} is {'better' if gap < 0 else 'worse'} than joint by {abs(gap):.3f}"
            if row.loss_low is not None and row.loss_high is not None:
                sure = row.loss_high < joint or row.loss_low > joint
                line += (f" [95 % over units: {row.loss_low - joint:+.3f} to {row.loss_high - joint:+.3f}]"
                         f"{'' if sure else ', which may be chance'}")
    return line + "."


def _rivals_lines(table: Table, places: list[Place], labels: list[str], merged: list[str]) -> list[str]:
    """Arms without a merge that are no worse anywhere: then splitting is not what helped."""
    if not merged:
        return []
    lines = []
    for rival in labels:
        if rival in merged or rival in ("base", "joint"):
            continue
        beaten = [m for m in merged if all(table[rival, p].loss < table[m, p].loss - TIE for p in places)]
        if len(beaten) == len(merged):
            lines.append(f"Not worth splitting on this evidence: {rival}, which splits nothing, beats every merge in "
                         f"all {len(places)} places.")
        elif beaten:
            lines.append(f"{rival}, which splits nothing, beats {', '.join(beaten)} in all {len(places)} places.")
    if "joint" in labels:
        both = [m for m in merged if all(table[m, p].loss < table["joint", p].loss - TIE for p in places)]
        if both:
            lines.append(f"{', '.join(both)}: better than joint in all {len(places)} places.")
    return lines


def _split_lines(table: Table, places: list[Place], labels: list[str], seeds: int) -> list[str]:
    """Whether the way of splitting mattered, at equal K: the spread between splits against the spread between seeds."""
    by_count: dict[int, list[str]] = {}
    for label in labels:
        name, _, number = label.partition(":")
        if name in PARTITIONED:
            by_count.setdefault(2 ** int(number) if name == "merit" else int(number), []).append(label)
    lines = []
    for count, arms in sorted(by_count.items()):
        if len(arms) < 2:
            continue
        merit, random = f"merit:{count.bit_length() - 1}", f"random:{count}"
        if merit in arms and random in arms:
            gaps = [table[merit, p].loss - table[random, p].loss for p in places]
            lines.append(f"{merit} against {random}, both {count} groups: " + ", ".join(
                f"{p.replace('_', '-')} {gap:+.3f}" for p, gap in zip(places, gaps, strict=True)) + (
                ". The conflict-aware split was no better than chance." if min(gaps) > -TIE else "."))
        spreads = []
        for place in places:
            rows = [table[a, place] for a in arms]
            spread = max(r.loss for r in rows) - min(r.loss for r in rows)
            told = ", ".join(f"{r.arm} {r.loss:.3f}" for r in sorted(rows, key=lambda r: r.loss))
            noise = float(np.mean([max(r.loss_by_seed) - min(r.loss_by_seed) for r in rows]))
            meaning = "" if seeds < 2 else (
                f", {'no more' if spread <= noise else 'more'} than another seed moves one of them ({noise:.3f})")
            spreads.append(f"{place.replace('_', '-')} {told}, a spread of {spread:.3f}{meaning}")
        unknown = " One seed: whether that is noise is not known." if seeds < 2 else ""
        lines.append(f"How {count} groups were split: {'; '.join(spreads)}.{unknown}")
    return lines
