"""What is done in a run folder, read from its files: any machine that sees the folder can ask."""

from __future__ import annotations

from pathlib import Path

from anabranch.artifacts import ArmRun, BranchManifest, Conflict, Mixture, Plan
from anabranch.errors import CorruptedError
from anabranch.run import branch_progress


def status_lines(folder: Path) -> list[str]:
    """One line a stage. Raises CorruptedError if the folder is no run."""
    if not (folder / "recipe.json").exists():
        raise CorruptedError(f"{folder}: not a run folder (no recipe.json). Give the folder that `anabranch run` made: "
                             "the recipe's `output`.")
    lines = [_mixture(folder), _gradients(folder), _conflict(folder), *_branches(folder)]
    merged = (folder / "merged" / "manifest.json").exists()
    lines.append(f"merge      {'done' if merged else 'to do'}")
    scored = sorted(p.stem for p in (folder / "evaluation").glob("*.json"))
    lines.append(f"evaluate   {', '.join(scored) if scored else 'to do'}")
    arms = sorted((folder / "compare").glob("*/seed-*"))
    if arms:
        done = [ArmRun.load(a / "arm.json").arm for a in arms if (a / "arm.json").exists()]
        lines.append(f"compare    {len(done)} arm runs done, {len(arms) - len(done)} begun")
    page = folder / "report.html"
    return [*lines, f"report     {page if page.exists() else 'to do'}"]


def _mixture(folder: Path) -> str:
    path = folder / "mixture" / "mixture.json"
    if not path.exists():
        return f"mixture    {len(list((folder / 'mixture' / 'units').glob('*.safetensors')))} units so far"
    mixture = Mixture.load(path)
    return f"mixture    done: {len(mixture.units)} units, {mixture.tokens:,} tokens"


def _gradients(folder: Path) -> str:
    if (folder / "gradients" / "gradients.json").exists():
        return "gradients  done"
    return f"gradients  {len(list((folder / 'gradients' / 'units').glob('*.safetensors')))} units so far"


def _conflict(folder: Path) -> str:
    path = folder / "conflict" / "conflict.json"
    return f"conflict   done: cosines {Conflict.load(path).cosine_min:.2f} and up" if path.exists() else "conflict   to do"


def _branches(folder: Path) -> list[str]:
    if not (folder / "plan.json").exists():
        return ["split      to do", "train      to do"]
    plan = Plan.load(folder / "plan.json")
    lines = [f"split      done: {plan.method}, {len(plan.groups)} groups"]
    for group in plan.groups:
        path = folder / "branches" / str(group.group)
        if (path / "branch.json").exists():
            manifest = BranchManifest.load(path / "branch.json")
            loss = f", loss {manifest.final_loss:.3f}" if manifest.final_loss is not None else ""
            lines.append(f"branch {group.group:<3} done: {manifest.steps} steps, {manifest.tokens_seen:,} tokens{loss}")
        else:
            step, steps = branch_progress(path)
            begun = f"step {step} of {steps}" if steps else "begun" if (path / "log.txt").exists() else "to do"
            lines.append(f"branch {group.group:<3} {begun}")
    return lines
