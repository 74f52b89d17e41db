"""`anabranch merge RUN OUT`: a run's branches, merged into a folder of the user's choice; with `partial` those that are there.

MERIT's merge is a mean weighted by tokens, w_k = N_k / sum N_j. With branches missing, the sum runs over those that are
there: it is the merge of a smaller mixture, not of the run, and says so in its manifest (`missing`). The run's own `merged`
is never made here from less than all branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anabranch.artifacts import BranchManifest, MergeManifest, Plan, digest
from anabranch.branches import branch_inputs, check_branch
from anabranch.distribute import collect, goes_through_store, store_url
from anabranch.engine.merging import merge_checkpoints
from anabranch.engine.stream import Progress, Settings
from anabranch.errors import AnabranchError, OutputError, ProvenanceError
from anabranch.families import frozen_tensors
from anabranch.plan import load_plan
from anabranch.run import Run
from anabranch.store import leases
from anabranch.store.files import open_store
from anabranch.worker import read_run


@dataclass(frozen=True)
class Present:
    """Which branches of a plan are trained.

    weights    of the branches that are there, in their order; they sum to one
    absent     share of the plan's tokens that the missing branches were to learn, in [0, 1)
    """

    plan: Plan
    there: list[int]
    missing: list[int]
    weights: list[float]
    absent: float


def bring_finished(run: Run) -> None:
    """Bring the plan and the branches that are done in the run's store, if it has one, home into the run folder.

    Raises:
        BranchFailed: results that cannot be taken; ProvenanceError: the workers follow another plan than the folder's.
        CorruptedError, OutputError: the store is damaged, or does not answer.
    """
    if not goes_through_store(run.recipe):
        return
    store = open_store(store_url(run.recipe))
    if store.read("run.json") is None:
        return  # nothing was sent there yet
    stored = read_run(store)
    done = leases.finished(store, stored, leases.Watch())
    collect(run, store, stored, [job for job in stored.jobs if job in done and (job == "plan" or job.startswith("branch-"))])


def present_branches(run: Run, out: Path, *, partial: bool) -> Present:
    """What there is to merge. A branch is there once its `branch.json` is.

    Raises:
        ProvenanceError: no plan, no branch, or some missing and `partial` not said.
        OutputError: some missing, and `out` is the place of the run's own merge.
    """
    path = run.folder / "plan.json"
    if not path.exists():
        raise ProvenanceError(f"{run.folder}: nothing is split yet (no plan.json), so there are no branches to merge. Run "
                              "`anabranch run recipe.yaml --until train` first.")
    plan, _ = load_plan(path, run.mixture)
    there = [g for g in plan.groups if (run.branch(g.group) / "branch.json").exists()]
    missing = [g.group for g in plan.groups if g not in there]
    first = f"anabranch train-branch {run.folder} {missing[0]}" if missing else ""
    if not there:
        raise ProvenanceError(f"{run.folder}: none of the {len(plan.groups)} branches is trained: there is nothing to merge. "
                              f"Train one first: {first}")
    if missing and not partial:
        raise ProvenanceError(f"{run.folder}: {_branches(missing, f' of {len(plan.groups)}')} not trained. Train the rest "
                              f"({first}), or merge what is there with --partial.")
    if missing and out.resolve().is_relative_to((run.folder / "merged").resolve()):
        raise OutputError(f"{out}: this is where the run's own merge goes, and {_branches(missing)} missing. Give a partial "
                          "merge another folder.")
    whole = sum(g.weight for g in there)
    weights = [g.weight / whole for g in there] if missing else [g.weight for g in there]
    return Present(plan, [g.group for g in there], missing, weights, 1.0 - whole if missing else 0.0)


def merge_present(run: Run, out: Path, *, partial: bool = False, settings: Settings | None = None,
                  progress: Callable[[Progress], None] | None = None) -> MergeManifest:
    """Merge the branches of a run as its recipe says, into `out`; the same bytes as the run's own merge if all are there.

    Args:
        partial: merge those that are there, with their weights raised to sum to one; `missing` in the manifest names the
            others. Nothing in the run folder changes.
        settings: threads, memory, device.
    Raises:
        ProvenanceError: branches are missing (without `partial`: any; with it: all), were not made for this run, or changed
            what its recipe freezes.
        CorruptedError: weights of a branch are damaged.
        OutputError: a partial merge into the run's own `merged`; `out` holds something else, or cannot be written.
        RecipeError: the recipe's merge method cannot merge so many (slerp wants two).
    """
    present = present_branches(run, out, partial=partial)
    made_from = {"base": run.base_hash, "plan": present.plan.hash} | checked_inputs(run, present)
    section = run.recipe.merge
    return merge_checkpoints(section.method, run.base, [run.branch(k) / "model" for k in present.there], present.weights, out,
                             dtype=section.dtype, max_shard_size=section.max_shard_size, made_from=made_from,
                             labels=[*(f"branch-{k}" for k in present.there), "base"], missing=present.missing,
                             frozen=frozen_tensors(run.base, run.recipe.model), settings=settings, progress=progress)


def checked_inputs(run: Run, present: Present) -> dict[str, str]:
    """branch-k -> hash of its weights. Raises the first branch's error with those of all others in it."""
    hashes, refused = {}, []
    for k in present.there:
        try:
            manifest = BranchManifest.load(run.branch(k) / "branch.json")
            check_branch(manifest, branch_inputs(run.recipe, present.plan, k, run.base_hash), run.branch(k))
            hashes[f"branch-{k}"] = digest(manifest.files)
        except AnabranchError as error:
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise type(refused[0]).of(f"{run.folder}: {len(refused)} branches cannot be merged:", [str(e) for e in refused])
    return hashes


def _branches(numbers: list[int], of: str = "") -> str:
    """'branch 2 is', 'branches 2, 5 of 8 are', for the start of a sentence about them."""
    listed = ", ".join(map(str, numbers[:20])) + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")
    return f"branch {listed}{of} is" if len(numbers) == 1 else f"branches {listed}{of} are"


def present_lines(present: Present) -> list[str]:
    """What is merged, with which weights; and, first and loudly, what is not in it."""
    lines = []
    if present.missing:
        lines.append(f"PARTIAL MERGE: {_branches(present.missing)} not in it, nor what was to be learnt there, "
                     f"{present.absent:.1%} of the tokens. Once the rest is trained, merge anew, into another folder.")
    planned = {g.group: g.weight for g in present.plan.groups}
    for k, weight in zip(present.there, present.weights, strict=True):
        instead = f" instead of {planned[k]:.4f}" if present.missing else ""
        lines.append(f"branch {k:<3} weight {weight:.4f}{instead}")
    return lines
