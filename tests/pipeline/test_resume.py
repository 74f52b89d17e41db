"""A branch that is told to stop, or killed, and started again: the same branch as if nobody had stopped it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import branches, checkpoints
from anabranch.branches import branch_inputs, branch_steps, train_branch, train_hash
from anabranch.checkpoints import MARKER, OPTIMIZER, RANDOM, is_complete, load_tree, mark_complete, newest_checkpoint, save_tree
from anabranch.errors import BranchFailed, CorruptedError, Preempted, RecipeError
from anabranch.plan import load_plan
from anabranch.recipe import Recipe, load_recipe
from anabranch.run import Run, open_run, run_stages
from anabranch.stopping import stoppable
from conftest import write_recipe

INPUTS = {"base": "b", "plan": "p"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Run:
    """A run up to its plan: two groups."""
    folder = tmp_path_factory.mktemp("resume")
    made = open_run(load_recipe(write_recipe(folder, tiny_base)), tell=lambda _: None)
    run_stages(made, until="split")
    return made


def changed(run: Run, train: dict[str, Any], lora: dict[str, Any] | None = None) -> Recipe:
    model = run.recipe.model.model_copy(update={"lora": lora})
    return run.recipe.model_copy(update={"train": run.recipe.train | train, "model": model})


def train(run: Run, recipe: Recipe, out: Path) -> dict[str, Any]:
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    return train_branch(recipe, plan, 0, mixture, run.folder / "mixture", run.base, run.base_hash, out).model_dump()


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted((folder / "model").rglob("*")) if p.is_file()} | {
        "branch.json": hashlib.sha256((folder / "branch.json").read_bytes()).hexdigest()}


class At:
    """Sends this process a signal when the trainer begins its n-th micro batch, counted over all calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int, number: int = signal.SIGTERM) -> None:
        from trl import SFTTrainer

        self.batch, self.number, self.seen, step = batch, number, 0, SFTTrainer.training_step
        at = self

        def counted(trainer: Any, *args: Any, **named: Any) -> Any:
            at.seen += 1
            if at.seen == at.batch:
                os.kill(os.getpid(), at.number)
            return step(trainer, *args, **named)

        monkeypatch.setattr(SFTTrainer, "training_step", counted)


# What trains, in which batches it is interrupted. Group 0 has some 38 or 57 rows of the tiny mixture.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, tuple[int, ...]]] = {
    "one pass": ({"save_steps": 3}, None, (1, 9)),
    "second pass, accumulation": ({"num_train_epochs": 2, "gradient_accumulation_steps": 3, "save_steps": 100}, None,
                                  (2, 18)),
    "a pass and a half": ({"num_train_epochs": 1.5, "save_steps": 4, "weight_decay": 0.1}, None, (10, 12)),
    "LoRA with dropout": ({"num_train_epochs": 2, "learning_rate": 1e-2},
                          {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3}, (3, 13)),
    "noise": ({"neftune_noise_alpha": 5.0, "optim": "adafactor", "lr_scheduler_type": "linear"}, None, (5,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_started_again_is_the_same_branch_bit_for_bit(way, run, tmp_path, monkeypatch):
    settings, lora, batches = WAYS[way]
    recipe = changed(run, {"logging_steps": 2} | settings, lora)
    whole = train(run, recipe, tmp_path / "whole")
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    assert whole["steps"] == branch_steps(recipe, plan.groups[0].samples)
    for batch in batches:
        out = tmp_path / f"stopped-{batch}"
        with monkeypatch.context() as patch:
            At(patch, batch)
            with pytest.raises(Preempted, match="Run the same command again"):
                train(run, recipe, out)
        kept = newest_checkpoint(out / "checkpoints")
        assert kept is not None and not list(out.rglob("*.pt")) + list(out.rglob("*.pth")) + list(out.rglob("*.bin"))
        random.seed(1), np.random.seed(2), torch.manual_seed(3)  # nothing may hang on what this process drew before
        assert train(run, recipe, out) == whole
        assert digests(out) == digests(tmp_path / "whole"), f"stopped in batch {batch}"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_every_signal_that_queues_send_saves(number, run, tmp_path, monkeypatch):
    At(monkeypatch, 3, number)
    with pytest.raises(Preempted, match=signal.Signals(number).name):
        train(run, changed(run, {"save_steps": 100}), tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints")


def test_told_to_stop_while_a_checkpoint_is_written(run, tmp_path, monkeypatch):
    """It is the one that is gone on from: no further step is taken, and none is saved twice."""
    mark = branches.mark_complete

    def told(folder: Path, inputs: dict[str, str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        mark(folder, inputs)

    monkeypatch.setattr(branches, "mark_complete", told)
    with pytest.raises(Preempted, match="at step 3 of"):
        train(run, changed(run, {"save_steps": 3}), tmp_path)
    assert newest_checkpoint(tmp_path / "checkpoints") == str(tmp_path / "checkpoints" / "checkpoint-3")


def test_stopped_again_and_again(run, tmp_path, monkeypatch):
    recipe = changed(run, {"save_steps": 100, "num_train_epochs": 2, "per_device_train_batch_size": 16})
    whole = train(run, recipe, tmp_path / "whole")
    assert whole["steps"] > 4
    for _ in range(whole["steps"] - 1):
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            At(patch, 1)
            train(run, recipe, tmp_path / "again")
    assert train(run, recipe, tmp_path / "again") == whole
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


@pytest.mark.parametrize("where", ["load_model", "load_tokenizer", "_dataset"])
def test_told_to_stop_before_the_first_step(where, run, tmp_path, monkeypatch):
    original = getattr(branches, where)

    def interrupted(*args: Any, **named: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **named)
        except Exception as error:  # as loaders do, which call everything a bad file
            raise RuntimeError("swallowed") from error

    with monkeypatch.context() as patch:
        patch.setattr(branches, where, interrupted)
        with pytest.raises(Preempted, match="nothing is lost"):
            train(run, run.recipe, tmp_path)
    assert train(run, run.recipe, tmp_path)["steps"] > 0


def test_told_to_stop_while_the_finished_weights_are_written(run, tmp_path, monkeypatch):
    save = branches._save_weights

    def told(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args)

    monkeypatch.setattr(branches, "_save_weights", told)
    assert train(run, run.recipe, tmp_path)["steps"] > 0  # the last thing to do is done


@pytest.mark.parametrize(("passes", "lora"), [(1.5, None), (1, {"r": 2})])
def test_killed_while_the_finished_weights_are_written(passes, lora, run, tmp_path, monkeypatch):
    """The checkpoint of the last step is there: not a step more is trained, though a pass is not over."""
    recipe = changed(run, {"num_train_epochs": passes}, lora)
    whole = train(run, recipe, tmp_path / "whole")

    def killed(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(branches, "_save_weights", killed)
        train(run, recipe, tmp_path / "again")
    at = At(monkeypatch, 10**9)
    assert train(run, recipe, tmp_path / "again") == whole and at.seen == 0
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")


def test_there_is_a_whole_checkpoint_at_every_moment(run, tmp_path, monkeypatch):
    """Killed anywhere in the writing, marking and clearing away of checkpoints, though one alone is kept."""
    seen: list[tuple[str, str | None]] = []

    def look(name: str) -> None:
        seen.append((name, newest_checkpoint(tmp_path / "checkpoints")))

    for module, name in ((branches, "mark_complete"), (branches, "keep_newest"), (shutil, "rmtree"), (checkpoints, "save_tree"),
                         (os, "replace")):
        original = getattr(module, name)

        def wrapped(*args: Any, _name: str = name, _call: Any = original, **named: Any) -> Any:
            look("before " + _name)
            done = _call(*args, **named)
            look("after " + _name)
            return done

        monkeypatch.setattr(module, name, wrapped)
    train(run, changed(run, {"save_steps": 2, "save_total_limit": 1}), tmp_path)
    first = next(i for i, (_, found) in enumerate(seen) if found)
    last = max(i for i, (_, found) in enumerate(seen) if found)
    assert all(found for _, found in seen[first : last + 1]) and last - first > 20
    assert not (tmp_path / "checkpoints").exists()


def test_progress_tells_speed_and_time_left(run, tmp_path, monkeypatch):
    told = []
    write = branches.write_atomically
    monkeypatch.setattr(branches, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(branches, "write_atomically", lambda path, data: (told.append((path.name, data)), write(path, data)))
    manifest = train(run, run.recipe, tmp_path)
    progress = [json.loads(data) for name, data in told if name == "progress.json"]
    assert [p["step"] for p in progress][-1] == manifest["steps"] == progress[-1]["steps"]
    assert {p["step"] for p in progress} == set(range(1, manifest["steps"] + 1))
    assert progress[-1]["seconds_left"] == 0 and progress[0]["seconds_left"] > 0
    assert progress[-1]["tokens"] == manifest["tokens_seen"] and all(p["tokens_per_second"] > 0 for p in progress)


def checkpoint(folder: Path, step: int, inputs: dict[str, str] = INPUTS) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in (OPTIMIZER, RANDOM, "model.safetensors", "trainer_state.json"):
        (path / name).write_bytes(f"{name} {step}".encode() * 50)
    mark_complete(path, inputs)
    return path


def test_torn_damaged_and_foreign_checkpoints_are_passed_over(tmp_path):
    good = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8, {"base": "another", "plan": "p"})
    (checkpoint(tmp_path, 12) / MARKER).unlink()
    (checkpoint(tmp_path, 16) / OPTIMIZER).unlink()
    cut = checkpoint(tmp_path, 20) / RANDOM
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped = checkpoint(tmp_path, 100) / "model.safetensors"  # a hundred is newer than twenty
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"!")
    assert newest_checkpoint(tmp_path, INPUTS) == str(good)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_marker_that_names_too_little_or_leads_elsewhere_is_no_marker(tmp_path):
    path = checkpoint(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    told = json.loads((path / MARKER).read_text())
    for files in ({}, {k: v for k, v in told["files"].items() if k != RANDOM},
                  told["files"] | {"../outside": [1, "0"]}, told["files"] | {"/dev/zero": [0, "0"]}, [], None, "x"):
        (path / MARKER).write_text(json.dumps(told | {"files": files}))
        assert newest_checkpoint(tmp_path, INPUTS) is None, files
    (path / MARKER).write_text("[" * 100_000)
    assert not is_complete(path)
    (path / MARKER).write_text(json.dumps(told))
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(outside)
    assert not is_complete(path)


def test_half_removed_is_not_whole(tmp_path, monkeypatch):
    old = checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it removed a file
    checkpoints.keep_newest(tmp_path, 1)
    assert not (old / MARKER).exists() and newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_only_marked_checkpoints_count_and_the_older_go(tmp_path):
    for step in (2, 10, 6):
        checkpoint(tmp_path, step)
    checkpoints.keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-6"]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.builds(lambda n: torch.arange(n, dtype=torch.float32) / 3, st.integers(0, 5))
    | st.builds(lambda n: np.arange(n, dtype=np.uint32), st.integers(1, 5)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3), max_leaves=12)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_a_tree_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("tree") / "state.safetensors"
    save_tree(path, value)
    assert same(load_tree(path), value)


def test_what_is_no_tree_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"set at state.optimizer\[0\]"):
        save_tree(tmp_path / "x", {"optimizer": [{1, 2}]})
    (tmp_path / "y").write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(CorruptedError, match="not a training state"):
        load_tree(tmp_path / "y")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the dropped exception is the point
def test_a_signal_whose_exception_was_dropped_is_found_at_the_next_border():
    """Python drops what is raised in a callback of a C library, say while a module is loaded."""

    class Loader:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="SIGTERM"), stoppable("x") as stop:
        loader = Loader()
        del loader
        assert stop.asked == "SIGTERM"
        stop.check()


def test_a_second_ctrl_c_is_obeyed_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stoppable("x") as stop:
        stop.at_once = False
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_trainer_is_part_of_what_a_branch_is_made_from(run):
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    other = Recipe.model_validate(run.recipe.model_dump() | {"trainer": {"kind": "command", "command": ["x", "{out}"]}})
    third = Recipe.model_validate(run.recipe.model_dump() | {"trainer": {"kind": "command", "command": ["y", "{out}"]}})
    hashes = {branch_inputs(r, plan, 0, "base")["train"] for r in (run.recipe, other, third)}
    assert len(hashes) == 3
    with pytest.raises(RecipeError, match="TRL does not train"):
        train(run, other, run.folder / "no")


def test_the_hash_of_trl_s_settings_is_what_it_was():
    """As of the version before other trainers: finished branches must not become strangers."""
    recipe = Recipe.model_validate({"model": {"path": "x"}, "mixture": {"sources": [{"path": "y"}]},
                                    "train": {"learning_rate": 1e-4}})
    settings = {"learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "max_grad_norm": 1.0,
                "weight_decay": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 8, "trainable": ["*"], "lora": None,
                "dtype": "float32"}
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    assert train_hash(recipe) == hashlib.sha256(text.encode()).hexdigest()


def test_killed_with_sigkill_in_a_process_of_its_own(run, tmp_path):
    """The real command, kill -9 at a random moment with checkpoints every step, then again: the same bytes."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    text = json.loads((folder / "recipe.json").read_text())
    text["recipe"]["train"] |= {"save_steps": 1}
    (folder / "recipe.json").write_text(json.dumps(text))
    recipe = changed(run, {"save_steps": 1})
    whole = train(run, recipe, tmp_path / "whole")
    branch = folder / "branches" / "0"
    process = subprocess.Popen([sys.executable, "-m", "anabranch", "train-branch", str(folder), "0"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((branch / "checkpoints").glob(f"checkpoint-*/{MARKER}")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.Random(os.getpid()).random() * 0.2)
    process.kill()
    process.wait()
    if not (branch / "branch.json").exists():
        assert newest_checkpoint(branch / "checkpoints") is not None
    assert train(run, recipe, branch) == whole and digests(branch) == digests(tmp_path / "whole")


def test_a_branch_out_of_range(run, tmp_path):
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    with pytest.raises(BranchFailed, match=r"0 \.\. 1"):
        train_branch(run.recipe, plan, 7, mixture, run.folder / "mixture", run.base, run.base_hash, tmp_path)
