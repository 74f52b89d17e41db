"""One model per task for a table of one's own: rows set aside for calibration, then a branch trained on the rest.

    RUN/mergeability/mixture/mixture.json           the tasks (units of the run's mixture) without their calibration rows
    RUN/mergeability/calibration/TASK.safetensors   those rows (as `train`): what a predictor's inputs are measured on
    RUN/mergeability/models/TASK/branch.json        model/: float32 weights; trained by the pipeline's own trainer

Three kinds of rows never meet: a model trains on its task's training rows, the inputs of a predictor are measured on the
calibration rows, merges are scored on the held-out rows. (A row that stands twice counts as one.)

`python -m anabranch.mergeability.models RUN NAME ..` trains some of them in one process: the trainer's imports alone take
longer than a small model.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from anabranch.artifacts import BranchManifest, Mixture, Plan, Unit, digest
from anabranch.branches import branch_inputs, check_branch
from anabranch.errors import AnabranchError, BranchFailed, MixtureError
from anabranch.launch.local import Job, run_jobs
from anabranch.plan import make_plan
from anabranch.rows import Rows, budget_indices, generator, load_unit, save_part
from anabranch.run import Run, branch_progress, reopen_run
from anabranch.trainers.command import train_group

FOLDER = "mergeability"
CALIBRATION_SHARE = 0.25  # of a task's training rows, at most
LEAST_CALIBRATION = 2


def folder_of(run: Run) -> Path:
    return run.folder / FOLDER


def stem(unit: Unit) -> str:
    """The task's name as a file name: what the mixture made of it."""
    return Path(unit.file).stem


def model_folder(run: Run, unit: Unit) -> Path:
    return folder_of(run) / "models" / stem(unit)


def calibration_rows(run: Run, mixture: Mixture) -> dict[str, Rows]:
    """Task -> the rows set aside for it."""
    return {u.name: load_unit(folder_of(run) / "calibration" / Path(u.file).name, "train") for u in mixture.units}


def set_aside(rows: Rows, count: int, seed: int, task: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows for calibration, rows for training): numbers, in order. Copies of a calibration row are in neither.

    Args:
        count: rows wanted for calibration; at most CALIBRATION_SHARE of those there are.
    """
    contents = [rows.content(i) for i in range(len(rows))]
    wanted = min(count, int(len(rows) * CALIBRATION_SHARE))
    chosen: dict[bytes, int] = {}
    for i in generator(seed, "calibration", task).permutation(len(rows)):
        if len(chosen) == wanted:
            break
        chosen.setdefault(contents[i], int(i))
    rest = [i for i, content in enumerate(contents) if content not in chosen]
    return np.array(sorted(chosen.values()), np.int64), np.array(rest, np.int64)


def task_mixture(run: Run, mixture: Mixture, tasks: Sequence[str], calibration: int, *, out: Path | None = None) -> Mixture:
    """The chosen units without their calibration rows, written under RUN/mergeability (or `out`) with those rows.

    Raises:
        MixtureError: naming every task that has no held-out rows, or too few training rows.
    """
    out = folder_of(run) if out is None else out
    units, problems = [], []
    for name in tasks:
        unit = mixture.unit(name)
        rows = load_unit(run.folder / "mixture" / unit.file, "train")
        aside, rest = set_aside(rows, calibration, run.recipe.seed, name)
        if unit.held_out_rows < 1:
            problems.append(f"{name}: no held-out rows, so no merge can be scored on it")
        elif len(aside) < LEAST_CALIBRATION or len(rest) < 1:
            problems.append(f"{name}: {len(rows)} training rows, of which at most {CALIBRATION_SHARE:.0%} are set aside for "
                            f"calibration: wanted at least {LEAST_CALIBRATION / CALIBRATION_SHARE:.0f} different ones")
        else:
            units.append(_without(run, unit, rows, aside, rest, out))
    if problems:
        raise MixtureError.of("these tasks cannot be in the table. Give them more rows (`mixture.held_out`, `max_samples`), or "
                              "leave them out with --tasks:", problems)
    reduced = mixture.model_copy(update={"units": units, "transfer": [], "retention": [], "made_from": {
        "mixture": digest({u.name: mixture.unit(u.name).sha256 for u in units}), "calibration": digest([calibration,
                                                                                                        run.recipe.seed])}})
    reduced.save(out / "mixture" / "mixture.json")
    return reduced


def _without(run: Run, unit: Unit, rows: Rows, aside: np.ndarray, rest: np.ndarray, out: Path) -> Unit:
    kept = rows.take(rest)
    origin = run.folder / "mixture" / unit.file
    sha = save_part(out / "mixture" / unit.file, origin, kept, load_unit(origin, "held_out"))
    save_part(out / "calibration" / Path(unit.file).name, origin, rows.take(aside), rows.take(aside[:0]))
    budget = budget_indices(len(kept), unit.epochs, run.recipe.seed, unit.name)
    return unit.model_copy(update={
        "sha256": sha, "rows": len(kept), "samples": len(budget), "tokens": int(kept.lengths[budget].sum()),
        "response_tokens": int(kept.response_lengths[budget].sum())})


def model_plan(run: Run, mixture: Mixture, task: str) -> Plan:
    """A plan of one branch on one unit: other tasks of the table do not change it."""
    alone = mixture.model_copy(update={"units": [mixture.unit(task)]})
    return make_plan("joint", {task: 0}, 1, alone, run.recipe.seed, {"base": run.base_hash, "task": mixture.unit(task).sha256})


def known_model(run: Run, mixture: Mixture, task: str) -> BranchManifest | None:
    """A task's model, if it is trained. Raises ProvenanceError, CorruptedError for one made from something else."""
    folder = model_folder(run, mixture.unit(task))
    if not (folder / "branch.json").exists():
        return None
    manifest = BranchManifest.load(folder / "branch.json")
    check_branch(manifest, branch_inputs(run.recipe, model_plan(run, mixture, task), 0, run.base_hash), folder)
    return manifest


def train_models(run: Run, mixture: Mixture) -> dict[str, BranchManifest]:
    """Every task's model, trained where it is not there: task -> manifest.

    Raises:
        BranchFailed: naming the tasks that failed; the others' models are kept.
    """
    tasks = [u.name for u in mixture.units]
    todo = [t for t in tasks if known_model(run, mixture, t) is None]
    if todo:
        launch = run.recipe.launch
        workers = min(launch.max_parallel, len(todo))
        jobs = [Job(f"models {w}", [sys.executable, "-m", "anabranch.mergeability.models", str(run.folder), *todo[w::workers]],
                    folder_of(run) / f"train-{w}.log") for w in range(workers)]
        run_jobs(jobs, max_parallel=launch.max_parallel, threads=launch.threads,
                 on_tick=lambda *_: _tell_training(run, mixture, len(tasks) - len(todo), todo))
    manifests = {t: known_model(run, mixture, t) for t in tasks}
    return {t: m for t, m in manifests.items() if m is not None}


def _tell_training(run: Run, mixture: Mixture, before: int, todo: Sequence[str]) -> None:
    done, current = 1000 * before, ""
    for task in todo:
        folder = model_folder(run, mixture.unit(task))
        if (folder / "branch.json").exists():
            done += 1000
            continue
        step, steps = branch_progress(folder)
        if steps:
            done, current = done + 1000 * step // steps, task
    run.progress("train", current, done, 1000 * (before + len(todo)))


def train_some(run: Run, tasks: Sequence[str], tell: Callable[[str], None]) -> None:
    """Train these tasks' models in this process, one after the other; one that fails does not stop the next.

    Raises:
        BranchFailed: naming every one that failed; or at once when training was told to stop.
    """
    mixture = Mixture.load(folder_of(run) / "mixture" / "mixture.json")
    failed = []
    for task in tasks:
        unit = mixture.unit(task)
        try:
            manifest = train_group(run.recipe, model_plan(run, mixture, task), 0, mixture, folder_of(run) / "mixture",
                                    run.base, run.base_hash, model_folder(run, unit))
        except BranchFailed:
            raise
        except AnabranchError as error:
            failed.append(f"{task}: {error}")
            continue
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the trainer's own handler would swallow it between two models
        tell(f"{task}: {manifest.steps} steps, {manifest.tokens_seen:,} tokens seen")
    if failed:
        raise BranchFailed.of("models that could not be trained:", failed)


def main() -> None:
    folder, *tasks = sys.argv[1:]
    try:
        train_some(reopen_run(Path(folder)), tasks, print)
    except AnabranchError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
