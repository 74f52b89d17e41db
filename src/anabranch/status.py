"""What is done, what is under way and when it will be finished: read from a run folder or its store, by any machine that sees
it. Nothing is written."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from anabranch.artifacts import ArmRun, BranchManifest, Conflict, MergeManifest, Mixture, Part, Plan
from anabranch.errors import CorruptedError
from anabranch.finish import Work, duration, finish_words, predict_finish
from anabranch.stale import REMEDY, made, stale
from anabranch.store.status import RunStatus, Sight, branch_tokens, store_status


class FolderStatus(Part):
    """A look at a plain run folder: nobody holds anything there, and what is under way shows by what it last told."""

    folder: str
    told: list[str]
    finished: bool
    seconds_left: float | None
    unknown: list[str]

    def as_json(self) -> str:
        return self.model_dump_json()

    def lines(self) -> list[str]:
        return self.told


def folder_status(folder: Path) -> FolderStatus:
    """Raises CorruptedError if the folder is no run."""
    path = folder / "recipe.json"
    if not path.exists():
        raise CorruptedError(f"{folder}: not a run folder (no recipe.json), nor a store (no run.json). Give the folder that "
                             "`anabranch run` made, which is the recipe's `output`, or its store.")
    try:
        recipe = json.loads(path.read_text())["recipe"]
        parallel = int(recipe.get("launch", {}).get("max_parallel", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptedError(f"{path}: not readable as a run's recipe. `anabranch run recipe.yaml` writes it anew.") from error
    works = _folder_works(folder, recipe)
    finish = predict_finish(works, parallel)
    lines = [_mixture(folder), _gradients(folder), _conflict(folder), *_branches(folder), *_last_stages(folder),
             *_stale(folder)]
    left = [w for w in works if not w.done]
    if any(w.seconds is not None for w in left):
        lines += finish_words(finish, "one branch at a time" if parallel == 1 else f"{parallel} branches at a time")
    elif left:
        lines.append("finish     not known: nothing is measured yet")
    return FolderStatus(folder=str(folder), told=lines, finished=not left, seconds_left=finish.seconds,
                        unknown=list(finish.unknown))


def _folder_works(folder: Path, recipe: dict[str, Any]) -> list[Work]:
    """The stages as jobs; branches with their times where their speed is known."""
    gradients = Work("gradients", (), done=(folder / "gradients" / "gradients.json").exists())
    works = [gradients, Work("split", ("gradients",), done=(folder / "plan.json").exists())]
    if (folder / "plan.json").exists():
        branches = _branch_works(folder, Plan.load(folder / "plan.json"), recipe)
    else:
        branches = [Work("train", ("split",))]
    merged = _merge_done(folder)
    scored = (folder / "evaluation" / "merged.json").exists()
    return [*works, *branches, Work("merge", tuple(b.name for b in branches), done=merged),
            Work("evaluate", ("merge",), done=scored),
            Work("report", ("evaluate",), done=(folder / "report.html").exists())]


def _branch_works(folder: Path, plan: Plan, recipe: dict[str, Any]) -> list[Work]:
    """Branches under way by what they last told; the others by their tokens and the mean speed of those."""
    tokens = branch_tokens(plan, recipe)
    told = {g.group: _told(folder / "branches" / str(g.group)) for g in plan.groups}
    speeds = [t["tokens_per_second"] for t in told.values() if t.get("tokens_per_second")]
    works = []
    for g in plan.groups:
        done = (folder / "branches" / str(g.group) / "branch.json").exists()
        left = None if done else told[g.group].get("seconds_left")
        name = f"branch-{g.group}"
        whole = tokens[name] * len(speeds) / sum(speeds) if speeds and name in tokens else None
        works.append(Work(name, ("split",), done, left is not None, whole if left is None else left))
    return works


def _told(branch: Path) -> dict[str, float]:
    """What a branch last said of itself; {} before its first word."""
    try:
        told = json.loads((branch / "progress.json").read_text())
        known = {k: told.get(k) for k in ("step", "steps", "tokens_per_second", "seconds_left")}
        return {k: v for k, v in known.items() if isinstance(v, int | float) and 0 <= v < math.inf}
    except (OSError, ValueError, AttributeError):
        return {}


def _merge_done(folder: Path) -> bool:
    path = folder / "merged" / "manifest.json"
    return path.exists() and not MergeManifest.load(path).missing


def _last_stages(folder: Path) -> list[str]:
    lines = [f"merge      {'done' if _merge_done(folder) else 'to do'}"]
    scored = sorted(p.stem for p in (folder / "evaluation").glob("*.json"))
    lines.append(f"evaluate   {', '.join(scored) if scored else 'to do'}")
    arms = sorted((folder / "compare").glob("*/seed-*"))
    if arms:
        done = [ArmRun.load(a / "arm.json").arm for a in arms if (a / "arm.json").exists()]
        lines.append(f"compare    {len(done)} arm runs done, {len(arms) - len(done)} begun")
    page = folder / "report.html"
    return [*lines, f"report     {page if page.exists() else 'to do'}"]


def _stale(folder: Path) -> list[str]:
    """What no longer follows from the mixture or the plan, and why."""
    if not (folder / "mixture" / "mixture.json").exists():
        return []
    try:
        found = stale(Mixture.load(folder / "mixture" / "mixture.json"), *made(folder))
    except CorruptedError as error:
        return [f"stale      not known: {error}"]
    lines = [f"stale      {name}: {why}" for name, why in found.items()]
    return [*lines, f"           {REMEDY}"] if lines else []


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
            lines.append(f"branch {group.group:<3} {_under_way(path)}")
    return lines


def _under_way(branch: Path) -> str:
    told = _told(branch)
    if not told.get("steps"):
        return "begun" if (branch / "log.txt").exists() else "to do"
    words = f"step {told.get('step', 0)} of {told['steps']}"
    words += f", {told['tokens_per_second']:,.0f} tokens/s" if told.get("tokens_per_second") else ""
    words += f", {duration(told['seconds_left'])} left" if told.get("seconds_left") is not None else ""
    silent = time.time() - (branch / "progress.json").stat().st_mtime  # this machine's clock against the file system's
    return words + (f" at its last word, {duration(silent)} ago" if silent > 120 else "")


class Observer:
    """Looks again and again at a run folder, or at the store at `address`."""

    def __init__(self, root: str, address: str | None) -> None:
        """Raises CorruptedError if there is no run, OutputError or RecipeError if the store cannot be opened."""
        self._folder, self._sight = Path(root), Sight()
        self._store = None
        if address is not None:
            from anabranch.store.files import open_store
            from anabranch.worker import read_run

            self._store = open_store(address)
            self._run = read_run(self._store)

    def look(self) -> RunStatus | FolderStatus:
        if self._store is None:
            return folder_status(self._folder)
        return store_status(self._store, self._run, self._sight, time.monotonic(), self._store.url)
