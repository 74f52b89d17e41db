"""A branch trained by any program: it gets a base, rows, hyperparameters and a budget, and leaves a checkpoint.

    trainer: {kind: command, command: [python, my_trainer.py, --settings, "{settings}"]}

    {base}         the base model's folder
    {data}         rows, one JSON object a line: input_ids, attention_mask, labels (-100: no loss); already tokenised, in order
    {settings}     settings.json: all of this, the recipe's `train` section, seed, rows, tokens and optimizer steps
    {checkpoints}  a folder that is kept until the branch is done: for what the program wants to go on from. What it leaves
                   there as checkpoint-N/ without pickles also travels to another machine
    {out}          an empty folder for the model that it makes: whole, float32, safetensors; or a LoRA adapter

The program ends with exit code 0 when the model is there; it is then checked (returned.py) before it counts. On SIGTERM it
has 45 seconds to save and end. It may write `progress` (named in settings.json): {"step": 3, "steps": 10, "tokens": 900}.
A trainer of the Hugging Face family that leaves trainer_state.json in {out} or {checkpoints} is believed about its losses.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from anabranch import __version__, jobs
from anabranch.artifacts import BranchManifest, Mixture, Plan, write_atomically
from anabranch.branches import (
    Hold,
    branch_rows,
    branch_samples,
    branch_steps,
    held_branch,
    planned_budget,
    train_branch,
    train_settings,
)
from anabranch.checkpoints import MARKER, checkpoints_in, is_complete, mark_complete
from anabranch.errors import BranchFailed, Preempted, RecipeError, closest
from anabranch.launch.logs import end_of_log
from anabranch.processes import end_with_parent, signal_group
from anabranch.recipe import Recipe
from anabranch.trainers.returned import Told, record_branch, take_in, told_by_trainer

PLACES = ("base", "data", "settings", "checkpoints", "out")
PLACE = re.compile(r"\{([a-z_]+)\}")
GRACE = 45.0  # seconds from SIGTERM to SIGKILL; what runs us waits a little longer
QUIET = 15.0  # seconds without a write, after which a checkpoint of the program's is taken to be whole
TAIL = 25  # lines of the program's log in a message


def train_group(recipe: Recipe, plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path, base: Path,
                base_hash: str, out: Path) -> BranchManifest:
    """A branch by the trainer that the recipe names. Raises as `train_branch` and `train_by_command`."""
    train = train_by_command if recipe.trainer.kind == "command" else train_branch
    return train(recipe, plan, branch, mixture, mixture_folder, base, base_hash, out)


def check_command(recipe: Recipe) -> None:
    """The placeholders of `trainer.command`. Raises RecipeError."""
    command = recipe.trainer.command
    used = {name for part in command for name in PLACE.findall(part)}
    problems = [f"{{{name}}} is no place that is filled in.{closest(name, PLACES)}" for name in sorted(used - set(PLACES))]
    if command and not used & {"out", "settings"}:
        problems.append("neither {out} nor {settings} stands in it, so the program cannot know where to leave its model")
    if problems:
        raise RecipeError.of("recipe: trainer.command:", problems)


def refuse_images(mixture: Mixture, who: str) -> None:
    """Programs are given tokens, and images are none. Raises RecipeError where a unit of the mixture shows images."""
    if shown := [u.name for u in mixture.units if u.images_file is not None]:
        raise RecipeError(f"{who}: {len(shown)} of {len(mixture.units)} units show images ({', '.join(shown[:3])}"
                          f"{', ..' if len(shown) > 3 else ''}), and other trainers are given tokens alone. Leave `trainer` "
                          "out: Anabranch's own branches (TRL) train on images, here and on workers (`launch`).")


def train_by_command(recipe: Recipe, plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path, base: Path,
                     base_hash: str, out: Path) -> BranchManifest:
    """Have the recipe's program train one branch into `out`; a finished one is returned as it is.

    Raises:
        RecipeError: no such program, an unknown placeholder, or rows with images.
        ProvenanceError: `out` holds a branch of another base, plan, data, settings or trainer.
        Preempted: a signal told us to stop, and the program has ended.
        BranchFailed: the program failed; the message has the end of its log.
        ModelError, ShapeMismatch, CorruptedError: what it left cannot be this branch (returned.py).
    """
    check_command(recipe)
    refuse_images(mixture, "recipe: trainer.command")
    with held_branch(recipe, plan, branch, base_hash, out) as (done, hold):
        if done is not None:
            return done
        samples = branch_samples(plan, branch, mixture, mixture_folder, recipe.seed)
        places = {"base": base, "data": out / "data.jsonl", "settings": out / "settings.json",
                  "checkpoints": out / "checkpoints", "out": out / "returned"}
        settings = job_settings(recipe, plan, branch, samples, base_hash, places | {"progress": out / "progress.json"})
        _make_places(places, settings, branch_rows(samples, plan.seed, branch))
        _run(filled(recipe.trainer.command, places), out, hold, branch)
        hold.stop.at_once = False  # a result of hours: taking it in is worth finishing
        told = told_by_trainer(places["out"], places["checkpoints"])
        taken = take_in(places["out"], base, recipe, out / "model", kept=out / "adapter")
        for warning in taken.warnings:
            print(f"branch {branch}: {warning}", flush=True)
        manifest = record_branch(recipe, plan, branch, mixture, mixture_folder, hold.inputs, taken.files, told or Told(),
                                 "command", {"anabranch": __version__}, out)
        for leftover in (places["data"], places["checkpoints"], places["out"]):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        return manifest


def job_settings(recipe: Recipe, plan: Plan, branch: int, samples: Any, base_hash: str,
                 places: dict[str, Path]) -> dict[str, Any]:
    """settings.json: everything that makes up a training job, for a program of any kind."""
    rows, tokens = planned_budget(recipe, samples)
    model = recipe.model
    return {"kind": "branch_settings", "version": 1, "branch": branch, "units": [name for name, _, _ in samples],
            "base_hash": base_hash, "seed": plan.seed,
            "budget": {"rows_in_file": sum(len(chosen) for _, _, chosen in samples), "rows": rows, "tokens": tokens,
                       "passes": train_settings(recipe)["num_train_epochs"],
                       "steps": branch_steps(recipe, sum(len(chosen) for _, _, chosen in samples))},
            "train": train_settings(recipe),
            "model": {"trainable": model.trainable, "lora": model.lora, "dtype": model.dtype,
                      "trust_remote_code": model.trust_remote_code} | ({"freeze": model.freeze} if model.freeze else {}),
            "places": {name: str(path.absolute()) for name, path in places.items()}}


def filled(command: list[str], places: dict[str, Path]) -> list[str]:
    """The command with its placeholders replaced; other braces stay."""
    return [PLACE.sub(lambda found: str(places[found[1]].absolute()), part) for part in command]


def write_rows(path: Path, rows: Any) -> None:
    """Rows (input_ids, labels) as JSON lines, whole or not there."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        for ids, labels in rows:
            file.write(json.dumps({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}))
            file.write("\n")
    os.replace(partial, path)


def _make_places(places: dict[str, Path], settings: dict[str, Any], rows: Any) -> None:
    """A clean place for the result; what the program left to go on from, less what has been damaged since."""
    shutil.rmtree(places["out"], ignore_errors=True)
    places["out"].mkdir(parents=True)
    places["checkpoints"].mkdir(exist_ok=True)
    for folder in checkpoints_in(places["checkpoints"]):
        if (folder / MARKER).exists() and not is_complete(folder):
            shutil.rmtree(folder)
    write_rows(places["data"], rows)
    write_atomically(places["settings"], (json.dumps(settings, indent=1) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------- the program


def _run(command: list[str], out: Path, hold: Hold, branch: int) -> None:
    """Run the program to its end, in a process group of its own; pass a signal on, and leave nothing of it running."""
    if shutil.which(command[0]) is None:
        raise RecipeError(f"recipe: trainer.command: no program `{command[0]}` on this machine. Give its full path, or a "
                          "name that is on the PATH of whoever trains the branch.")
    log = out / "program.txt"
    hold.stop.check()
    hold.stop.at_once = False
    with open(log, "wb") as file:
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, process_group=0,
                                   pass_fds=[hold.lock], preexec_fn=end_with_parent)
    try:
        code, told = _wait(program, out / "checkpoints", hold)
    finally:
        signal_group(program, signal.SIGKILL)  # whatever it left running
        program.wait()
    if told:  # also after exit code 0: that may mean "saved and stopped", with half a model in {out}
        raise Preempted(f"branch {branch}: told to stop ({hold.stop.asked}); the program has ended (exit code {code}) and what "
                        f"it keeps in {out / 'checkpoints'} is there. Run the same command again to go on.")
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise BranchFailed(f"branch {branch}: the program {command[0]} {how}; the end of {log}:\n{end_of_log(log, TAIL)}")


def _wait(program: subprocess.Popen[bytes], checkpoints: Path, hold: Hold) -> tuple[int, bool]:
    """(its exit code, whether it was told to stop)."""
    told, looked, launcher = 0.0, time.monotonic(), os.environ.get("ANABRANCH_LAUNCHER_PID")
    while (code := program.poll()) is None:
        now = time.monotonic()
        if launcher and os.getppid() != int(launcher) and not hold.stop.asked:
            hold.stop.asked = "its launcher has died"
        if hold.stop.asked and not told:
            told = now
            signal_group(program, signal.SIGTERM)
        if told and now - told > GRACE:
            signal_group(program, signal.SIGKILL)
        if now - looked > QUIET / 3:
            looked = now
            _mark_quiet(checkpoints, hold, QUIET)
        time.sleep(0.1)
    _mark_quiet(checkpoints, hold, 0.0 if told and code >= 0 else QUIET)
    return code, bool(told)


def _mark_quiet(folder: Path, hold: Hold, quiet: float) -> None:
    """Mark the newest checkpoint-N that nobody has written to for `quiet` seconds, so that it may travel. Pickles do not."""
    for path in checkpoints_in(folder):
        try:
            files = [p for p in path.rglob("*") if p.is_file()]
            if (path / MARKER).exists() or not files:
                return
            if time.time() - max(p.stat().st_mtime for p in (path, *files)) < quiet:
                continue
            if all(jobs.may_travel(f"checkpoint/{p.name}") and p.parent == path for p in files):
                mark_complete(path, hold.inputs)
            return
        except FileNotFoundError:  # the program is removing it
            continue
