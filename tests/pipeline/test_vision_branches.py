"""Branches of rows with images: TRL's loss is ours, what is frozen stays, and a stopped branch is the same branch."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from anabranch import branches
from anabranch.artifacts import BranchManifest
from anabranch.branches import branch_order, branch_samples, train_branch
from anabranch.diagnose.run import subject_of_run
from anabranch.diagnose.subject import Settings, make_probe
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import BranchFailed, ModelError, Preempted, ProvenanceError, RecipeError
from anabranch.families import frozen_tensors
from anabranch.jobs import reads
from anabranch.model import can_select, load_model, padded, response_losses
from anabranch.plan import load_plan
from anabranch.recipe import Recipe, load_recipe
from anabranch.rows import Rows, load_unit
from anabranch.run import Run, open_run, run_stages
from anabranch.store.artifacts import FileRef, Result, StoredBase, StoredRun
from anabranch.trainers.command import train_by_command
from anabranch.trainers.job_files import write_job_files
from anabranch.trainers.returned import accept_branch
from vision_models import write_picture_units, write_vision_model

FREEZE = ["vision tower", "projector"]
ONE_FAMILY = pytest.mark.parametrize("run", ["qwen2_5_vl"], indirect=True)


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of five units, one of words alone, up to its plan."""
    home = tmp_path_factory.mktemp(request.param)
    base = write_vision_model(home / "base", request.param, tied=request.param != "llava", shards=2)
    recipe = {"model": {"path": str(base), "freeze": FREEZE},
              "mixture": {"sources": write_picture_units(home, rows=12), "held_out": 0.2, "max_length": 1024},
              "gradients": {"calibration_samples": 6, "size": 256}, "split": {"method": "random", "groups": 2},
              "train": {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3},
              "evaluate": {"generate_samples": 1, "max_samples": 4}, "output": "run", "seed": 1}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = open_run(load_recipe(home / "recipe.yaml"), tell=lambda _: None)
    run_stages(made, until="split")
    plan, _ = load_plan(made.folder / "plan.json", made.mixture)
    with_words = {u.unit: u.model_copy(update={"group": int(u.unit in ("place", "not_colour"))}) for u in plan.units}
    plan.model_copy(update={"units": list(with_words.values())}).save(made.folder / "plan.json")
    run_stages(made, until="split")
    return made


def changed(run: Run, train: dict[str, Any] | None = None, **model: Any) -> Recipe:
    section = run.recipe.model.model_copy(update=model)
    return run.recipe.model_copy(update={"train": run.recipe.train | (train or {}), "model": section})


def train(run: Run, recipe: Recipe, out: Path, branch: int = 0) -> BranchManifest:
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    return train_branch(recipe, plan, branch, mixture, run.folder / "mixture", run.base, run.base_hash, out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def weights(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "model").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(run: Run) -> tuple[Path, BranchManifest]:
    return run.branch(0), train(run, run.recipe, run.branch(0))


def test_a_branch_has_the_base_s_tensors_its_frozen_numbers_and_its_files(run, whole):
    out, manifest = whole
    base, ours = tensors(run.base), tensors(out / "model")
    frozen = frozen_tensors(run.base, run.recipe.model)
    assert base.keys() == ours.keys() and len(frozen) >= 30
    assert all(ours[n].dtype == torch.float32 and ours[n].equal(base[n]) for n in frozen)
    moved = [n for n in base.keys() - frozen if not ours[n].equal(base[n])]
    assert len(moved) == len(base) - len(frozen)
    for path in run.base.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json" and "index" not in path.name:
            assert (out / "model" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (out / "model" / "preprocessor_config.json").is_file()
    units = {u.name: u for u in run.mixture.units}
    assert manifest.tokens_seen == manifest.tokens_planned == sum(units[n].tokens for n in manifest.group_units)
    assert "words" in manifest.group_units and sum(units[n].image_tokens for n in manifest.group_units) > 0


class Stop:
    asked, at_once = "", False

    def check(self) -> None:
        pass


def test_trl_s_loss_is_ours(run, tmp_path):
    """The mean over the response tokens of a step, also over accumulated batches; some rows show no image, some two."""
    recipe = changed(run, {"gradient_accumulation_steps": 3})
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    samples = branch_samples(plan, 0, run.mixture, run.folder / "mixture", recipe.seed)
    hold = branches.Hold({}, Stop(), 0)  # type: ignore[arg-type] - no signal comes
    trainer = branches._trainer(recipe, plan.seed, 0, samples, run.base, tmp_path, hold)
    order = list(branch_order(samples, plan.seed, 0))
    batches = [[0, 1, 2, 3], [4, 5], [next(i for i, (rows, n) in enumerate(order) if not rows.images_of([n])[0])]]
    made = [trainer.data_collator([trainer.train_dataset[i] for i in chosen]) for chosen in batches]
    assert "pixel_values" in made[0] and set(made[2]) == {"input_ids", "labels", "attention_mask"}
    count = trainer._get_num_items_in_batch(made, torch.device("cpu"))
    trainer.model.eval()
    with torch.no_grad():
        theirs = sum(float(trainer.compute_loss(trainer.model, dict(b), num_items_in_batch=count)) for b in made)
        model = load_model(run.base)
        ours = [response_losses(model, padded(Rows.joined([order[i][0].take(np.array([order[i][1]])) for i in chosen]),
                                              np.arange(len(chosen)), torch.device("cpu")), select=can_select(model))[0]
                for chosen in batches]
    assert int(count) == sum(map(len, ours)) and trainer.model_accepts_loss_kwargs
    assert theirs == pytest.approx(float(torch.cat(ours).mean()), rel=1e-5)


@ONE_FAMILY
def test_accumulated_batches_are_one_batch(run, whole, tmp_path):
    """Four rows at once, or one by one: the same gradients but for rounding, though answers differ in length."""
    _, manifest = whole
    ones = train(run, changed(run, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}), tmp_path)
    assert [loss for _, loss in ones.losses] == pytest.approx([loss for _, loss in manifest.losses], rel=1e-3)
    assert ones.tokens_seen == manifest.tokens_seen and ones.steps == manifest.steps


class At:
    """Sends this process SIGTERM when the trainer begins its n-th batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
        from trl import SFTTrainer

        seen, step = [0], SFTTrainer.training_step

        def counted(trainer: Any, *args: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer, *args, **named)

        monkeypatch.setattr(SFTTrainer, "training_step", counted)


def test_stopped_and_started_again_with_other_workers_is_the_same_branch(run, whole, tmp_path, monkeypatch):
    """The trainer's own loading finds none of these names in a checkpoint, warns, and would go on from the base."""
    out, manifest = whole
    with monkeypatch.context() as patched:
        At(patched, 5)
        with pytest.raises(Preempted):
            train(run, run.recipe, tmp_path)
    again = train(run, changed(run, {"dataloader_num_workers": 2}), tmp_path)
    assert weights(tmp_path) == weights(out)
    assert again.losses == manifest.losses and again.tokens_seen == manifest.tokens_seen


@ONE_FAMILY
def test_adapters_beside_frozen_parts_also_after_a_stop(run, tmp_path, monkeypatch):
    recipe = changed(run, {"learning_rate": 1e-2}, lora={"r": 2, "lora_alpha": 4, "lora_dropout": 0.1})
    train(run, recipe, tmp_path)
    with monkeypatch.context() as patched:
        At(patched, 5)
        with pytest.raises(Preempted):
            train(run, recipe, tmp_path / "again")
    train(run, recipe, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path)
    base, ours = tensors(run.base), tensors(tmp_path / "model")
    moved = {n for n in base if not ours[n].equal(base[n])}
    assert base.keys() == ours.keys() and moved and not moved & frozen_tensors(run.base, recipe.model)
    assert all(n.endswith("_proj.weight") for n in moved)
    assert not [n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "vis" in n or "projector" in n]


@ONE_FAMILY
def test_a_setting_that_trains_what_is_frozen_is_found_before_the_branch_counts(run, tmp_path, monkeypatch):
    monkeypatch.setattr(branches, "select_trainable", lambda model, section: model)
    with pytest.raises(BranchFailed, match=r"changed \d+ tensors that the recipe freezes"):
        train(run, run.recipe, tmp_path)
    assert not (tmp_path / "branch.json").exists()


@ONE_FAMILY
def test_what_cannot_train_on_images_says_so(run, tmp_path, tiny_base, monkeypatch):
    with pytest.raises(RecipeError, match="padding_free"):
        train(run, changed(run, {"padding_free": True}), tmp_path / "a")
    monkeypatch.setattr(branches, "vision_of", lambda model: None)
    with pytest.raises(RecipeError, match="show images, and the base is a language model"):
        train(run, run.recipe, tmp_path / "b")
    for trainer in ("trl", "axolotl", "llamafactory", "command"):
        with pytest.raises(RecipeError, match=r"4 of 5 units show images .* are given tokens alone"):
            write_job_files(run, tmp_path / trainer, trainer)
        assert not (tmp_path / trainer).exists()
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    recipe = run.recipe.model_copy(update={"trainer": run.recipe.trainer.model_copy(
        update={"kind": "command", "command": ["true", "{out}"]})})
    with pytest.raises(RecipeError, match="are given tokens alone"):
        train_by_command(recipe, plan, 0, run.mixture, run.folder / "mixture", run.base, run.base_hash, tmp_path / "c")


@ONE_FAMILY
def test_images_travel_with_their_units(run):
    """A worker that trains a branch is given the images of its units, and of no others."""
    ref = FileRef(sha256="0" * 64, size=1)
    files = {f"mixture/{f}": ref for u in run.mixture.units for f in u.files} | {"mixture/mixture.json": ref}
    stored = StoredRun(recipe={}, base=StoredBase(hash="h"), mixture=files, jobs={"gradients-0": [], "gradients-1": []},
                       lease_seconds=1.0, retries=1)
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    results = {"plan": Result(job="plan", run="0" * 64, attempt=0, worker="w", files={"plan.json": ref})}
    groups = {u.unit: u.group for u in plan.units}
    wanted = {f"mixture/{f}" for u in run.mixture.units if groups[u.name] == 1 for f in u.files}
    assert len(wanted) == 4 and all(p.endswith(".safetensors") for p in wanted)
    assert reads("branch-1", stored, results, run.mixture, plan).keys() == wanted | {"mixture/mixture.json", "plan.json"}
    shards = [set(reads(f"gradients-{i}", stored, {}, run.mixture, None)) for i in range(2)]
    assert shards[0] | shards[1] == set(files) and shards[0] & shards[1] == {"mixture/mixture.json"}


def test_the_merge_diagnoses_and_a_returned_branch(run, whole):
    """A branch that came back is taken in; with a tower that moved it is refused, and so is its merge."""
    train(run, run.recipe, run.branch(1), 1)
    run_stages(run, until="merge")
    frozen = frozen_tensors(run.base, run.recipe.model)
    base, out = Checkpoint.open(run.base), Checkpoint.open(run.folder / "merged")
    assert out.tensors.keys() == base.tensors.keys() and all(out.read(n).equal(base.read(n)) for n in frozen)
    assert sum(not out.read(n).equal(base.read(n)) for n in base.tensors) == len(base.tensors) - len(frozen)
    subject = subject_of_run(run, Settings(rows=8, batch_rows=2))
    assert not subject.live.weights["merged"]._loaded, "read from its files, under their names"
    assert set(subject.live.trainable) and not any("vis" in n for n in subject.live.trainable)
    subject.live.put({"merged": 1.0})
    assert np.isfinite(subject.live.mean_loss(subject.probes["mixture"]))
    place = run.branch(1)
    kept = tensors(place / "model")
    model = place.rename(place.with_name("gone")) / "model"
    accept_branch(run, 1, model)
    assert weights(place) == weights(model.parent)
    moved = sorted(frozen)[0]
    shutil.rmtree(place)
    save_file(kept | {moved: kept[moved] + 1e-3}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor '{moved}' was changed .* freezes it"):
        accept_branch(run, 1, model)
    with pytest.raises(ProvenanceError, match=f"1 of {len(frozen)} tensors: {moved}"):
        merge_checkpoints("token_weighted", run.base, [model], [1.0], run.folder / "other", made_from={}, frozen=frozen)


@ONE_FAMILY
def test_a_probe_s_hash_is_of_its_images_too(run):
    unit = next(u for u in run.mixture.units if u.name == "colour")
    rows = load_unit(run.folder / "mixture" / unit.file, "train")
    assert rows.images is not None
    turned = Rows(rows.input_ids, rows.response, rows.offsets,
                  type(rows.images)(rows.images.files, rows.images.file, rows.images.numbers[::-1].copy(), rows.images.offsets))
    one, other = (make_probe("x", {"colour": r}, Settings(rows=4)).hash for r in (rows, turned))
    assert one != other
