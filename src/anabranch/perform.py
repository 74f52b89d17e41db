"""One job of a run, in a folder that holds what the job reads and looks like a run folder: the child of a worker."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from anabranch import jobs
from anabranch.artifacts import BranchManifest, MergeManifest, file_digest, write_atomically
from anabranch.errors import (
    CorruptedError,
    OutputError,
    Preempted,
    ProvenanceError,
    RecipeError,
    describe_validation_error,
)
from anabranch.exit_codes import PREEMPTED, TRY_AGAIN
from anabranch.processes import end_with_parent
from anabranch.recipe import Recipe
from anabranch.store.artifacts import StoredRun

LORA_TABLES = ("rank_pattern", "alpha_pattern")  # ranks by layer: no more than numbers
SETTINGS_FILES = (".json", ".yaml", ".yml", ".py", ".jinja")
CONFIG_REFUSED = {"quantization_config", "base_model_name_or_path"}


def trusted_parts(recipe: Recipe) -> list[str]:
    """What a recipe makes its workers run or open, beyond this library: told before anything is fetched."""
    parts = []
    if recipe.trainer.kind == "command":
        parts.append("trainer.command: " + " ".join(recipe.trainer.command))
    if recipe.model.trust_remote_code:
        parts.append("model.trust_remote_code: the model's own Python code")
    settings = [(f"train.{key}", value) for key, value in recipe.train.items()]
    settings += [(f"model.lora.{key}", value) for key, value in (recipe.model.lora or {}).items() if key not in LORA_TABLES]
    parts += [f"{key}: {value!r} (a path, a program or settings of another library)"
              for key, value in settings if _reaches_out(value)]
    return parts


def _reaches_out(value: object) -> bool:
    if isinstance(value, list):
        return any(_reaches_out(inner) for inner in value)
    return isinstance(value, dict) or (isinstance(value, str) and ("/" in value or value.endswith(SETTINGS_FILES)))


def recipe_of(run: StoredRun) -> Recipe:
    """Raises CorruptedError if the stored recipe is none of this version's."""
    try:
        return Recipe.model_validate(run.recipe)
    except ValueError as error:
        problems = describe_validation_error(error, Recipe) if isinstance(error, ValidationError) else [str(error)]
        raise CorruptedError.of("run.json: its recipe does not fit this version of anabranch:", problems[:20]) from error


def check_config(model: Path) -> None:
    """A model that somebody else made is loaded as its config.json says: not if that names kernels, other models or packings.

    Code beside it (`auto_map`) is not run in any case, unless the recipe says trust_remote_code. Raises CorruptedError.
    """
    path = model / "config.json"
    strange: set[str] = set()
    try:
        value = json.loads(path.read_text())
        below = [value]
        while below:
            here = below.pop()
            pairs = here.items() if isinstance(here, dict) else ()
            strange |= {key for key, inner in pairs if key in CONFIG_REFUSED
                        or ("implementation" in key and "/" in str(inner))}  # a kernel of the Hub
            below += here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptedError(f"{path}: cannot be read as JSON ({error}).") from error
    if strange or not isinstance(value, dict):
        raise CorruptedError(f"{path}: says {', '.join(sorted(strange)) or 'no object'}, which makes transformers load "
                             "kernels, other models or packed weights. It came from another machine, so it is not loaded "
                             "without --trust.")


def check_model(model: Path) -> None:
    """Before a library loads a model folder that came through a store: its config (`check_config`), that it holds whole weights
    to which no index of another folder leads, and that they are those of the manifest that came with them: by hash for a
    branch, by name for a merge, whose tensors' hashes `anabranch verify` reads.

    Raises CorruptedError, ModelError.
    """
    from anabranch.engine.checkpoint import Checkpoint, weight_files

    check_config(model)
    tensors, files = set(Checkpoint.open(model).tensors), {path.name for path in weight_files(model)}
    if (model.parent / "branch.json").exists():
        told = BranchManifest.load(model.parent / "branch.json").files
        strange = files - set(told)
    else:
        manifest = MergeManifest.load(model / "manifest.json")
        told, strange = manifest.files, tensors ^ set(manifest.tensors)
    strange |= {name for name, sha in told.items() if Path(name).name != name or not (model / name).is_file()
                or file_digest(model / name) != sha}
    if strange:
        raise CorruptedError.of(f"{model}: not the model of the manifest that came with it. Missing there, or other bytes:",
                                [repr(name)[:300] for name in sorted(strange)[:20]])


def perform(folder: Path, job: str, *, model: Path | None = None, trust: bool = False,
            tell: Callable[[str], None] = print) -> None:
    """Do one job in `folder` (run.json and what `jobs.reads` says are there).

    Raises:
        ProvenanceError: the base here is another one than the run's. RecipeError: it wants more trust than was given.
        Whatever the stage raises.
    """
    stored = StoredRun.load(folder / "run.json")
    recipe = recipe_of(stored).model_copy(update={"output": folder})
    if (parts := trusted_parts(recipe)) and not trust:
        raise RecipeError.of("this job runs what its recipe brings along; say --trust if you trust it:", parts)
    base = _base(stored, recipe, model) if jobs.needs_base(job) else folder
    if stored.base.files and jobs.needs_base(job) and not trust:
        check_config(base)  # whoever made the run brought it along
    from anabranch import run as stages

    run = stages.Run(recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(base)})}), folder, base,
                     stored.base.hash, tell, _progress(folder))
    kind = job.split("-")[0]
    shards = sum(1 for name in stored.jobs if name.startswith("gradients-"))
    if kind == "gradients":
        stages.gradient_stage(run, (int(job.split("-")[1]), shards))
    elif kind == "plan":
        nobody = (len(run.mixture.units), 1)  # a share without units: what is missing is told, as there is no base here
        if stages.gradient_stage(run, nobody) is None:
            raise CorruptedError(f"{folder / 'gradients' / 'units'}: not every unit has a whole gradient sketch, though all "
                                 "shards are done: one of results/gradients-*.json is damaged, or of another mixture. "
                                 "Remove it to have it done again.")
        stages.conflict_stage(run)
        stages.split_stage(run)
    elif kind == "branch":
        stages.train_planned(run, int(job.split("-")[1]))
    elif kind == "merge":
        for need in stored.jobs["merge"] if not trust else ():
            check_config(run.branch(jobs.branch_of(need) or 0) / "model")  # their weights are checked where they are merged
        stages.merge_stage(run)
    else:
        label = job.removeprefix("evaluate-")
        if label != "base" and not trust:
            check_model(folder / "merged" if label == "merged" else run.branch(jobs.branch_of(job) or 0) / "model")
        stages.evaluate_label(run, label)


def _base(stored: StoredRun, recipe: Recipe, model: Path | None) -> Path:
    """The run's base on this machine, and no other."""
    from anabranch.engine.checkpoint import checkpoint_hash
    from anabranch.model import resolve_model

    wanted: dict[str, Any] = {"path": str(model)} if model else {"path": stored.base.hub, "revision": stored.base.revision}
    if model is None and wanted["path"] is not None and Path(wanted["path"]).exists():
        raise ProvenanceError(f"the run's base is {wanted['path']} of the Hub, and something of that name is here. Give "
                              "--model, or work from another folder.")
    if wanted["path"] is None:
        raise ProvenanceError("the run's base is in its store, and was not fetched. Give --model.")
    base = resolve_model(recipe.model.model_copy(update=wanted))
    if (found := checkpoint_hash(base)) != stored.base.hash:
        raise ProvenanceError(f"{base}: another base than this run's (its hash is {found[:12]}, the run's "
                              f"{stored.base.hash[:12]}). Give the run's own with --model.")
    return base


def _progress(folder: Path) -> Callable[[str, str, int, int], None]:
    """progress.json, at most once a second: the worker tells it to the store."""
    state = {"told": 0.0, "begun": time.monotonic()}

    def tell(stage: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - state["told"] < 1.0 and done < total:
            return
        state["told"] = now
        left = (now - state["begun"]) * (total - done) / done if done else None
        write_atomically(folder / "progress.json", json.dumps({"step": done, "steps": total, "seconds_left": left}).encode())

    return tell


def main(folder: Path, job: str, model: Path | None, trust: bool) -> None:
    """As `perform`; a full disk or lack of memory ends with TRY_AGAIN, so that the job is not blamed."""
    end_with_parent()
    try:
        perform(folder, job, model=model, trust=trust)
    except Preempted as error:
        print(error, file=sys.stderr)
        sys.exit(PREEMPTED)
    except OutputError as error:
        print(f"OutputError: {error}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    except MemoryError:
        print("out of memory", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE):
            raise
        print(f"{error.strerror}: {error.filename or ''}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
