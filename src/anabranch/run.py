"""Stage order, what is already done, resume, status.

A run folder:

    recipe.json               the recipe as understood, and the base's hash: all that a worker elsewhere needs
    mixture/mixture.json      units/*.safetensors: tokenised rows
    gradients/gradients.json  units/*.safetensors: sketches
    conflict/conflict.json    conflict.safetensors
    plan.json                 who trains what; may be edited by hand before training
    branches/K/branch.json    model/: float32 weights; log.txt; progress.json
    merged/                   a model folder with manifest.json
    evaluation/*.json         base, branch-K, merged
    report.html, report.md

The first three stages follow their inputs: a changed mixture is measured again, unit by unit, only where it changed.
From `split` on, work made from other inputs is never overwritten unless the user says `--from`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from anabranch import conflict as conflict_maths
from anabranch.artifacts import (
    BranchManifest,
    Conflict,
    Evaluation,
    Gradients,
    MergeManifest,
    Mixture,
    Plan,
    digest,
    file_digest,
    write_atomically,
)
from anabranch.branches import branch_inputs, check_branch, check_train_section
from anabranch.engine.checkpoint import checkpoint_hash
from anabranch.engine.merging import merge_checkpoints
from anabranch.engine.plan import parse_size
from anabranch.errors import CorruptedError, PlanError, ProvenanceError, RecipeError
from anabranch.evaluate import evaluate_model, evaluation_inputs
from anabranch.families import adapter_arguments, describe_frozen, freezes, frozen_tensors, skeleton
from anabranch.gradients import load_halves, measure_gradients
from anabranch.launch.local import Job, run_jobs
from anabranch.merge import method_named
from anabranch.mixture import build_mixture
from anabranch.mixture_summary import exclusion_lines, image_line, number_of, unwanted_lines
from anabranch.model import keep_buffers, load_tokenizer, release_memory, resolve_model, select_trainable
from anabranch.partition import partition, whole_shares
from anabranch.plan import load_plan, make_plan, plan_inputs
from anabranch.recipe import Recipe
from anabranch.report import write_report
from anabranch.trainers.command import check_command, refuse_images, train_group
from anabranch.vision import load_vision

STAGES = ("mixture", "gradients", "conflict", "split", "train", "merge", "evaluate", "report")
# What each stage leaves; `--from STAGE` removes what it and the stages after it left.
LEAVES = {"mixture": ["mixture"], "gradients": ["gradients"], "conflict": ["conflict"], "split": ["plan.json"],
          "train": ["branches"], "merge": ["merged", "merged.partial", "merge_methods", "merge_methods.json"],
          "evaluate": ["evaluation"], "report": ["report.html", "report.md"]}

RANDOM_PLANS = 20  # drawn to tell how far the branches of random groups drift apart

Tell = Callable[[str], None]
Progress = Callable[[str, str, int, int], None]  # stage, what, done, total


@dataclass(frozen=True)
class Run:
    """A run folder with its recipe and its base; what every stage is given."""

    recipe: Recipe
    folder: Path
    base: Path
    base_hash: str
    tell: Tell
    progress: Progress

    def branch(self, k: int) -> Path:
        return self.folder / "branches" / str(k)

    @property
    def mixture(self) -> Mixture:
        return Mixture.load(self.folder / "mixture" / "mixture.json")


def open_run(recipe: Recipe, *, tell: Tell = print, progress: Progress = lambda *_: None) -> Run:
    """Resolve the base; a new folder gets its recipe.json. Raises ModelError, OutputError."""
    base = resolve_model(recipe.model)
    run = Run(recipe, recipe.output, base, checkpoint_hash(base), tell, progress)
    if not (run.folder / "recipe.json").exists():
        record_recipe(run)
    return run


def record_recipe(run: Run) -> None:
    """What workers go by. Written again only once the recipe has been found to fit what is there: a refused one must
    not reach a branch that starts later."""
    content = {"recipe": run.recipe.model_dump(mode="json"), "base": str(run.base), "base_hash": run.base_hash}
    write_atomically(run.folder / "recipe.json", (json.dumps(content, indent=1) + "\n").encode())


def reopen_run(folder: Path, *, model: Path | None = None, tell: Tell = print,
               progress: Progress = lambda *_: None) -> Run:
    """A run from its folder alone, perhaps on another machine (`model`: where the base lies there).

    Raises:
        ProvenanceError: the base there is another one.
        CorruptedError: the folder is no run.
    """
    path = folder / "recipe.json"
    try:
        content = json.loads(path.read_text())
        recipe, wanted = Recipe.model_validate(content["recipe"]), str(content["base_hash"])
    except (OSError, ValueError, KeyError) as error:
        raise CorruptedError(f"{folder}: not a run folder ({path.name} is missing or unreadable). Give the folder that "
                             "`anabranch run` made: the recipe's `output`.") from error
    recipe = recipe.model_copy(update={"output": folder.resolve()})
    if model is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(model)})})
    base = resolve_model(recipe.model)
    found = checkpoint_hash(base)
    if found != wanted:
        raise ProvenanceError(f"{base}: another base than this run's (its hash is {found[:12]}, the run's "
                              f"{wanted[:12]}). Give the run's own base with --model.")
    return Run(recipe, folder.resolve(), base, found, tell, progress)


def run_stages(run: Run, *, start: str | None = None, until: str = "report") -> None:
    """Every stage that is not done, in order, to `until`.

    Args:
        start: make this stage and all after it anew.
    """
    last = STAGES.index(until)
    if start is not None and STAGES.index(start) > last:
        raise RecipeError(f"--from {start} comes after --until {until}; stages run in the order {', '.join(STAGES)}.")
    if last >= STAGES.index("train"):
        check_ahead(run.recipe)
    if start is not None:
        forget(run, start)
    if last >= STAGES.index("gradients"):
        check_model(run)
    stages: dict[str, Callable[[Run], object]] = {
        "mixture": _mixture_for_split, "gradients": gradient_stage, "conflict": conflict_stage, "split": split_stage,
              "train": train_stage, "merge": merge_stage, "evaluate": evaluate_stage, "report": report_stage}
    for name in STAGES[: last + 1]:
        stages[name](run)
        if name == "mixture" and last >= STAGES.index("split") and (run.folder / "plan.json").exists():
            load_plan(run.folder / "plan.json", run.mixture)  # before hours of gradients that it would not go with


def check_model(run: Run) -> None:
    """What `model.freeze` holds still in this family, before it is used. Raises ModelError; RecipeError of adapters that do
    not fit the model."""
    section = run.recipe.model
    model = skeleton(run.base, section.trust_remote_code) if freezes(section) or section.lora is not None else None
    if model is not None:
        select_trainable(model, section)
        adapter_arguments(model, section)
        for line in describe_frozen(model, section):
            run.tell(line)


def check_ahead(recipe: Recipe) -> None:
    """What later stages would refuse, told before hours of work. Raises RecipeError, PlanError."""
    check_train_section(recipe)
    check_command(recipe)
    method_named(recipe.merge.method)
    check_capacities(recipe)
    parse_size(recipe.merge.max_shard_size)


def check_capacities(recipe: Recipe) -> None:
    """`split.capacities` against the method and the number of groups. Raises PlanError."""
    whole_shares(recipe.split.method, recipe.split.capacities, 1 if recipe.split.method == "joint" else recipe.split.groups)


def check_groups(units: int, arms: dict[str, int]) -> None:
    """Every group needs a unit. `arms`: name -> K. Raises PlanError."""
    if too_many := [f"{name} wants {count} groups" for name, count in arms.items() if count > units]:
        raise PlanError(f"{', '.join(too_many)}, and the mixture has {number_of(units, 'unit')}: every group needs one. Lower "
                        "`split.groups` (or the arm's number), or cut the sources into more units (`unit_column`).")


def forget(run: Run, start: str) -> None:
    """Remove what `start` and later stages left. The mixture's and gradients' caches are checked, not trusted."""
    for stage in STAGES[STAGES.index(start) :]:
        for name in LEAVES[stage]:
            path = run.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


# ---- the stages -----------------------------------------------------------------------------------------------------


def mixture_stage(run: Run) -> Mixture:
    tokenizer = load_tokenizer(run.base, trust_remote_code=run.recipe.model.trust_remote_code)
    vision = load_vision(run.base, trust_remote_code=run.recipe.model.trust_remote_code)
    mixture = build_mixture(run.recipe, tokenizer, run.folder / "mixture", vision=vision, base_hash=run.base_hash,
                            progress=lambda *a: run.progress("mixture", *a))
    run.tell(f"mixture: {number_of(len(mixture.units), 'unit')}, {sum(u.samples for u in mixture.units):,} samples, "
             f"{mixture.tokens:,} tokens ({sum(u.response_tokens for u in mixture.units):,} of responses); "
             f"{sum(e.rows for e in mixture.excluded):,} rows left out by rule")
    if mixture.vision is not None:
        run.tell("  " + image_line(mixture.vision))
    for line in unwanted_lines(mixture):
        run.tell(f"  left out: {line}")
    if lost := [e.unit for e in mixture.excluded if e.rule == "too_few_samples" and e.split == "train"]:
        run.tell(f"  left out whole, as too few rows are usable: {', '.join(lost[:8])}{', ..' if len(lost) > 8 else ''} "
                 f"(mixture/mixture.json says why, under `excluded`)")
    return mixture


def _mixture_for_split(run: Run) -> Mixture:
    """The mixture, once it is known to hold as many units as the recipe wants groups."""
    check_capacities(run.recipe)
    mixture, split = mixture_stage(run), run.recipe.split
    if run.recipe.trainer.kind == "command":
        refuse_images(mixture, "recipe: trainer.command")
    if split.method not in ("joint", "soup"):
        try:
            check_groups(len(mixture.units), {f"split.groups ({split.method})": split.groups})
        except PlanError as error:
            if whole := [e for e in mixture.excluded if e.rule != "max_samples" and e.rule != "max_tokens"]:
                raise PlanError.of(f"{error} What was left out of the mixture:", exclusion_lines(whole)) from error
            raise
    return mixture


def gradient_stage(run: Run, shard: tuple[int, int] = (0, 1)) -> Gradients | None:
    keep_buffers()
    gradients = measure_gradients(run.recipe, run.mixture, run.folder / "mixture", run.base, run.base_hash,
                                  run.folder / "gradients", shard=shard,
                                  progress=lambda *a: run.progress("gradients", *a))
    release_memory()
    if gradients is not None:
        stored = sum((run.folder / "gradients" / r.file).stat().st_size for r in gradients.units)
        run.tell(f"gradients: {len(gradients.units)} units of {gradients.parameters:,} entries, kept as "
                 f"{gradients.size:,} numbers per half ({stored / 1e6:.1f} MB)")
    return gradients


def conflict_stage(run: Run) -> Conflict:
    folder, source = run.folder / "conflict", run.folder / "gradients"
    gradients = Gradients.load(source / "gradients.json")
    matrix = run.recipe.split.matrix
    made_from = {"gradients": gradients.hash, "matrix": digest(matrix)}
    if (folder / "conflict.json").exists():
        known = Conflict.load(folder / "conflict.json")
        if known.made_from == made_from and _same(folder / "conflict.safetensors", known.tensors_sha256):
            run.tell(conflict_line(known))
            return known
    run.progress("conflict", "inner products", 0, 2)
    halves = [load_halves(source, record) for record in gradients.units]
    products = conflict_maths.inner_products(
        [r.unit for r in gradients.units], [r.sha256 for r in gradients.units],
        [a for a, _ in halves], [b for _, b in halves],
        [r.tokens_a for r in gradients.units], [r.tokens_b for r in gradients.units], previous=_known_products(folder))
    del halves
    run.progress("conflict", "axes", 1, 2)
    result = conflict_maths.analyse(products, matrix)
    names = json.dumps({"units": list(products.units), "hashes": list(products.hashes)})
    tensors = {"cosine": result.cosine, "corrected": result.corrected, "scores": np.ascontiguousarray(result.scores),
               "gram": products.gram, "tokens": products.tokens, "half_products": products.half_products,
               "norms_a": products.norms_a, "norms_b": products.norms_b}
    write_atomically(folder / "conflict.safetensors", save(tensors, {"products": names}))
    told = {f: getattr(result, f) for f in Conflict.model_fields if hasattr(result, f)}
    artifact = Conflict(**told | {"units": list(result.units)}, made_from=made_from,
                        tensors_sha256=file_digest(folder / "conflict.safetensors"))
    artifact.save(folder / "conflict.json")
    run.progress("conflict", "", 2, 2)
    run.tell(conflict_line(artifact))
    if artifact.spectral_tests:
        run.tell("  " + conflict_maths.drift_in_words(artifact.spectral_tests[0]))
    return artifact


def conflict_line(conflict: Conflict) -> str:
    pair = conflict.most_conflicting[0] if conflict.most_conflicting else None
    worst = f"; the worst pair is {pair[0]} against {pair[1]}" if pair else ""
    axes = f"the first axis holds {conflict.explained[0]:.0%} of the variance; " if conflict.explained else ""
    return (f"conflict: {axes}cosines {conflict.cosine_min:.2f} and up, mean {conflict.cosine_mean:.2f}, "
            f"{conflict.negative_share:.0%} of pairs negative{worst}")


def _same(path: Path, sha: str) -> bool:
    return path.exists() and file_digest(path) == sha


def _known_products(folder: Path) -> Any:
    """Inner products of an earlier mixture: only what is new is computed. None if there are none to trust."""
    from safetensors import safe_open

    try:
        known = Conflict.load(folder / "conflict.json")
        if not _same(folder / "conflict.safetensors", known.tensors_sha256):
            return None
        with safe_open(folder / "conflict.safetensors", "np") as file:
            names = json.loads(file.metadata()["products"])
            return conflict_maths.InnerProducts(
                tuple(names["units"]), tuple(names["hashes"]),
                *(file.get_tensor(n) for n in ("tokens", "gram", "half_products", "norms_a", "norms_b")))
    except (CorruptedError, SafetensorError, OSError):
        return None


def split_groups(run: Run, mixture: Mixture, method: str, count: int, seed: int,
                 capacities: list[float] | None = None) -> Plan:
    """A plan by a partition method, from the conflict stage's matrices (joint and soup need none)."""
    names = [u.name for u in mixture.units]
    conflict_hash = "none"
    tensors: dict[str, np.ndarray] = {}
    if method not in ("joint", "soup", "random"):
        conflict = Conflict.load(run.folder / "conflict" / "conflict.json")
        if conflict.units != names:
            raise ProvenanceError(f"{run.folder / 'conflict'}: measured on other units than the mixture's. Run "
                                  "`anabranch run recipe.yaml --from gradients`.")
        tensors, conflict_hash = load_file(run.folder / "conflict" / "conflict.safetensors"), conflict.hash
    groups = partition(method, names, [u.samples for u in mixture.units],
                       tensors.get("scores", np.zeros((len(names), 1))),
                       tensors.get("cosine", np.eye(len(names))), count, seed, capacities)
    split = {"method": method, "groups": count, "seed": seed}
    inputs = plan_inputs(run.base_hash, mixture, conflict_hash, split, whole_shares(method, capacities, count))
    named = {name: int(g) if g >= 0 else None for name, g in zip(names, groups, strict=True)}
    return make_plan(method, named, count, mixture, seed, inputs)


def wanted_plan(run: Run, mixture: Mixture) -> Plan:
    """The plan that the recipe asks for."""
    split = run.recipe.split
    return split_groups(run, mixture, split.method, 1 if split.method == "joint" else split.groups, run.recipe.seed,
                        split.capacities)


def refuse_other_plan(path: Path, plan: Plan, wanted: Plan) -> None:
    """Raises ProvenanceError if a plan was made from other things than the recipe now asks for."""
    changed = [k for k, v in wanted.made_from.items() if plan.made_from.get(k) != v]
    if changed:
        raise ProvenanceError(
            f"{path}: made from another {', '.join(changed)} than the recipe now asks for. `--from split` plans anew "
            "(and trains anew); another `output` keeps both; or take the change in the recipe back.")


def split_stage(run: Run) -> Plan:
    mixture, path = run.mixture, run.folder / "plan.json"
    wanted = wanted_plan(run, mixture)
    if not path.exists():
        wanted.save(path)
        record_recipe(run)
        run.tell(plan_line(wanted) + spread_line(run, wanted))
        return wanted
    plan, edited = load_plan(path, mixture)
    refuse_other_plan(path, plan, wanted)
    record_recipe(run)
    moved = sum(a.group != b.group for a, b in zip(plan.units, wanted.units, strict=True))
    if edited:
        plan.save(path)
    run.tell(plan_line(plan) + (f"; {moved} units moved by hand" if moved else "") + spread_line(run, plan))
    return plan


def spread_line(run: Run, plan: Plan) -> str:
    """How far this very plan's branches drift apart in one step, against random groups of as many: '' where that is 0."""
    groups = [u.group for u in plan.units if u.group is not None]
    if len(plan.groups) < 2 or not groups:
        return ""
    conflict = Conflict.load(run.folder / "conflict" / "conflict.json")
    if conflict.units != [u.unit for u in plan.units]:
        return ""
    gram = load_file(run.folder / "conflict" / "conflict.safetensors")["gram"]
    tokens = [u.tokens for u in plan.units]
    given = run.recipe.split.capacities
    capacities = given if given and len(given) == len(plan.groups) else None  # a person may have made other groups
    chance = np.mean([conflict_maths.partition_gain(
        gram, partition("random", conflict.units, [u.samples for u in plan.units], np.zeros((len(groups), 1)),
                        np.eye(len(groups)), len(plan.groups), seed, capacities), tokens) for seed in range(RANDOM_PLANS)])
    ratio = conflict_maths.partition_gain(gram, groups, tokens) / chance if chance else 0.0
    return f"; spread of its branches after one step (G_var): {ratio:.2f} times that of random groups"


def plan_line(plan: Plan) -> str:
    sizes = ", ".join(f"{g.units} units {g.tokens:,} tokens" for g in plan.groups)
    return f"split: {plan.method} into {len(plan.groups)} groups ({sizes})"


def train_stage(run: Run) -> list[BranchManifest]:
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    todo = []
    for group in plan.groups:
        folder = run.branch(group.group)
        if (folder / "branch.json").exists():
            manifest = BranchManifest.load(folder / "branch.json")
            check_branch(manifest, branch_inputs(run.recipe, plan, group.group, run.base_hash), folder)
        else:
            todo.append(group.group)
    jobs = [Job(f"branch {k}", [sys.executable, "-m", "anabranch", "train-branch", str(run.folder), str(k)],
                run.branch(k) / "log.txt") for k in todo]
    if jobs:
        launch = run.recipe.launch
        run_jobs(jobs, max_parallel=launch.max_parallel, threads=launch.threads,
                 on_tick=lambda names, _: _tell_training(run, len(plan.groups), names))
    manifests = [BranchManifest.load(run.branch(g.group) / "branch.json") for g in plan.groups]
    run.tell(f"train: {len(manifests)} branches, {sum(m.tokens_seen for m in manifests):,} tokens seen; last loss "
             + ", ".join(f"{m.final_loss:.3f}" if m.final_loss is not None else "-" for m in manifests))
    return manifests


def branch_progress(folder: Path) -> tuple[int, int]:
    """(step, steps) of a branch as it last told; (0, 0) before its first word."""
    try:
        told = json.loads((folder / "progress.json").read_text())
        return told["step"], told["steps"]
    except (OSError, ValueError, KeyError):
        return 0, 0


def _tell_training(run: Run, branches: int, names: list[str]) -> None:
    shares = []
    for k in range(branches):
        step, steps = branch_progress(run.branch(k))
        shares.append(1000 if (run.branch(k) / "branch.json").exists() else 1000 * step // steps if steps else 0)
    run.progress("train", ", ".join(names), sum(shares), 1000 * branches)


def train_one(run: Run, branch: int) -> BranchManifest:
    """One branch in this process (`anabranch train-branch`)."""
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    refuse_other_plan(run.folder / "plan.json", plan, wanted_plan(run, mixture))
    return train_planned(run, branch)


def train_planned(run: Run, branch: int) -> BranchManifest:
    """One branch of the plan that is in the folder: a worker takes that as given, and has no conflict to hold it against."""
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    return train_group(run.recipe, plan, branch, mixture, run.folder / "mixture", run.base, run.base_hash,
                        run.branch(branch))


def merge_branches(run: Run, plan: Plan, branches: list[Path], out: Path) -> MergeManifest:
    """Merge the branches of a plan by its weights, after checking where each comes from."""
    made_from = {"base": run.base_hash, "plan": plan.hash}
    for group, folder in zip(plan.groups, branches, strict=True):
        if not (folder / "branch.json").exists():
            raise ProvenanceError(f"{folder}: branch {group.group} is not trained. Run "
                                  f"`anabranch train-branch {run.folder} {group.group}` first.")
        manifest = BranchManifest.load(folder / "branch.json")
        check_branch(manifest, branch_inputs(run.recipe, plan, group.group, run.base_hash), folder)
        made_from[f"branch-{group.group}"] = digest(manifest.files)
    section = run.recipe.merge
    return merge_checkpoints(section.method, run.base, [b / "model" for b in branches], [g.weight for g in plan.groups],
                             out, dtype=section.dtype, max_shard_size=section.max_shard_size, made_from=made_from,
                             labels=[*(f"branch-{g.group}" for g in plan.groups), "base"],  # not paths: the same bytes anywhere
                             frozen=frozen_tensors(run.base, run.recipe.model),
                             progress=lambda p: run.progress("merge", "", p.done, p.total))


def merge_stage(run: Run) -> MergeManifest:
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    manifest = merge_branches(run, plan, [run.branch(g.group) for g in plan.groups], run.folder / "merged")
    mean = sum(w * d for w, d in zip(manifest.weights, manifest.branch_displacements, strict=True))
    run.tell(f"merge: {manifest.parameters:,} parameters, {manifest.displacement or 0.0:.2f} from the base (the branches "
             f"{mean:.2f} on average) -> {run.folder / 'merged'}")
    return manifest


def evaluate_folder(run: Run, mixture: Mixture, model: Path, label: str, weights_hash: str, out: Path) -> Evaluation:
    """Score a model folder, unless `out` holds just this."""
    if out.exists():
        known = Evaluation.load(out)
        if known.made_from == evaluation_inputs(run.recipe, mixture, weights_hash):
            return known
    return evaluate_model(run.recipe, mixture, run.folder / "mixture", model, label, weights_hash, out,
                          progress=lambda *a: run.progress("evaluate", *a))


def evaluate_stage(run: Run) -> list[Evaluation]:
    out, labels = run.folder / "evaluation", ["base"]
    if run.recipe.evaluate.branches:
        labels += [f"branch-{group.group}" for group in load_plan(run.folder / "plan.json", run.mixture)[0].groups]
    results = [evaluate_label(run, label) for label in [*labels, "merged"]]
    run.tell(f"evaluate: {', '.join(e.model for e in results)} -> {out}")
    return results


def evaluate_label(run: Run, label: str) -> Evaluation:
    """Score one of the run's models: base, branch-K or merged."""
    keep_buffers()
    if label == "base":
        folder, weights_hash = run.base, run.base_hash
    elif label == "merged":
        folder = run.folder / "merged"
        weights_hash = MergeManifest.load(folder / "manifest.json").model_hash
    else:
        branch = run.branch(int(label.removeprefix("branch-")))
        folder, weights_hash = branch / "model", digest(BranchManifest.load(branch / "branch.json").files)
    return evaluate_folder(run, run.mixture, folder, label, weights_hash, run.folder / "evaluation" / f"{label}.json")


def report_stage(run: Run) -> Path:
    path = write_report(run.folder)
    run.tell(f"report: {path}")
    return path
