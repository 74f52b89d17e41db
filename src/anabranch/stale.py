"""What a run folder holds that no longer follows from what it was made from: rows or images changed, or a plan was edited,
after branches were trained. Told from the artifacts alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from anabranch.artifacts import BranchManifest, Evaluation, MergeManifest, Mixture, Plan, digest
from anabranch.plan import misfits, plan_hash

REMEDY = ("Put rows, images or plan back as they were to go on with what is trained; `anabranch run recipe.yaml --from split` "
          "plans and trains anew; another `output` keeps both.")


def made(run: Path) -> tuple[Plan | None, dict[int, BranchManifest], MergeManifest | None, dict[str, Evaluation]]:
    """What a run folder holds beside its mixture. Raises CorruptedError of what is damaged."""
    plan, merge = run / "plan.json", run / "merged" / "manifest.json"
    branches = [BranchManifest.load(path) for path in (run / "branches").glob("*/branch.json")]
    return (Plan.load(plan) if plan.is_file() else None, {b.branch: b for b in sorted(branches, key=lambda b: b.branch)},
            MergeManifest.load(merge) if merge.is_file() else None,
            {path.stem: Evaluation.load(path) for path in sorted((run / "evaluation").glob("*.json"))})


def stale(mixture: Mixture, plan: Plan | None, branches: Mapping[int, BranchManifest], merge: MergeManifest | None,
          evaluations: Mapping[str, Evaluation]) -> dict[str, str]:
    """Name of what is stale -> why: `plan`, `branch-K`, `merged`, `evaluation of LABEL`.

    What an artifact does not say of itself cannot be compared, and makes nothing stale.
    """
    found: dict[str, str] = {}
    used = plan_hash(plan) if plan is not None else ""
    if plan is not None:
        if problems := misfits(plan, mixture):
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            found["plan"] = f"made for another mixture than the folder now holds: {problems[0]}{more}"
        for number, branch in branches.items():
            if used != branch.made_from.get("plan", used):
                found[f"branch-{number}"] = "trained by another plan"
            elif "plan" in found:
                found[f"branch-{number}"] = "trained on other rows than the mixture now has"
    if merge is not None:
        own = {f"branch-{k}": digest(b.files) for k, b in branches.items()} | ({"plan": used} if plan is not None else {})
        if strange := sorted(name for name, known in own.items() if merge.made_from.get(name, known) != known):
            found["merged"] = f"merged from another {', '.join(strange)}"
        elif old := [name for name in found if name in merge.made_from]:
            found["merged"] = f"merged from what is stale itself: {', '.join(old)}"
    rows = mixture.scored_rows
    for label, evaluation in evaluations.items():
        if evaluation.made_from.get("units", rows) != rows:
            found[f"evaluation of {label}"] = "scored on other rows than the mixture now has"
        elif label in found:
            found[f"evaluation of {label}"] = "of a model that is stale itself"
    return found
