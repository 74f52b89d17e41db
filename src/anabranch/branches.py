"""A group -> one training job on TRL's SFTTrainer.

A branch starts from the base, sees only its group's units (each with its full budget), and talks to nobody.
Weights are trained in float32 (under bf16 autocast if the recipe says `dtype: bfloat16`): steps of a pure bf16 run
are mostly rounded away, and a task vector that is rounded away cannot be merged.

Completion is not an exit code: a branch is done when the trainer has reached its last step and `branch.json`,
written last, holds the hashes of what it came from and of the weights it left.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import threading
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from anabranch.artifacts import BranchManifest, Mixture, Plan, digest, file_digest, write_atomically
from anabranch.errors import BranchFailed, CorruptedError, ProvenanceError, RecipeError
from anabranch.model import check_saved_names, check_vocabulary, keep_buffers, load_model, load_tokenizer, select_trainable
from anabranch.recipe import Recipe, check_train_arguments
from anabranch.rows import Rows, budget_indices, generator, load_unit

NEUTRAL = ("save_", "logging_", "dataloader_", "activation_checkpointing", "gradient_checkpointing", "project",
           "run_name", "torch_empty_cache_steps", "skip_memory_metrics")
POSITIVE = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
MARKER = "complete.json"  # written into a checkpoint after everything else, so that a torn one is never resumed


def train_settings(recipe: Recipe) -> dict[str, Any]:
    """The trainer's arguments of every branch: ours where the recipe is silent."""
    ours = {"learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "max_grad_norm": 1.0,
            "weight_decay": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 8, "logging_steps": 10,
            "save_strategy": "steps", "save_steps": 500, "save_total_limit": 1, "activation_checkpointing": False}
    return ours | recipe.train


def check_train_section(recipe: Recipe) -> None:
    """Names and values under `train:` against the trainer itself. Imports the trainer: seconds. Raises RecipeError."""
    import dataclasses

    from trl import SFTConfig

    check_train_arguments(recipe.train, {f.name for f in dataclasses.fields(SFTConfig) if f.init})
    _check_train_values(recipe.train, typing.get_type_hints(SFTConfig))
    try:
        _trainer_config(recipe, Path("unused"), 0)
    except Exception as error:  # whatever the trainer or a backend that it asks for raises, the values are the cause
        raise RecipeError(f"recipe: train: the trainer refuses these values: {type(error).__name__}: {error}") from error
    if recipe.model.lora is not None:
        try:
            _lora_config(recipe)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"recipe: model.lora: peft.LoraConfig refuses these values: {error}") from error


def _check_train_values(train: dict[str, Any], hints: dict[str, Any]) -> None:
    """Types by the trainer's own annotations, and numbers that must be positive: it would fail on them hours later."""
    problems = []
    for key, value in train.items():
        try:
            TypeAdapter(hints[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=None)
        except ValidationError as error:
            problems.append(f"train.{key}: {error.errors()[0]['msg']} (got {value!r})")
            continue
        except PydanticSchemaGenerationError:  # an annotation of the trainer's that pydantic cannot check
            continue
        if isinstance(value, str) and hints[key] in (int, float):
            problems.append(f"train.{key}: wanted a number, got the text {value!r}")
        if key in POSITIVE and (value is None or value <= 0):
            problems.append(f"train.{key}: wanted more than 0, got {value!r}")
    if problems:
        raise RecipeError.of("recipe:", problems)


def _lora_config(recipe: Recipe) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RecipeError("recipe: model.lora needs peft, which is not installed: pip install 'anabranch[lora]'.") from error
    return LoraConfig(**({"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (recipe.model.lora or {})))


def _trainer_config(recipe: Recipe, out: Path, seed: int) -> Any:
    import torch
    from trl import SFTConfig

    settings = train_settings(recipe)
    settings.setdefault("bf16", recipe.model.dtype == "bfloat16")
    settings.setdefault("use_cpu", not torch.cuda.is_available())
    return SFTConfig(
        output_dir=str(out), seed=seed, data_seed=seed, max_length=None, packing=False, report_to="none",
        disable_tqdm=True, include_num_input_tokens_seen="non_padding",
        dataset_kwargs={"skip_prepare_dataset": True}, **settings)


def branch_samples(plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path,
                   seed: int) -> list[tuple[str, Rows, np.ndarray]]:
    """(unit, its rows, the row numbers this branch trains on, with repeats), in the plan's order.

    `seed` is the recipe's: which rows make up a budget does not change with the seed of a training run.

    In a soup every branch sees the whole mixture, each in another order, for 1/K of the tokens.
    """
    samples = []
    dealt = 0  # dealing goes on from unit to unit, so that many units of one row do not all go to the first branch
    for planned in plan.units:
        if planned.group not in (branch, None):
            continue
        unit = mixture.unit(planned.unit)
        if unit.sha256 != planned.sha256:
            raise ProvenanceError(
                f"plan.json: unit {unit.name!r} was planned with rows {planned.sha256[:12]}, the mixture now has "
                f"{unit.sha256[:12]}. Run `anabranch run recipe.yaml --from split` to plan anew, or restore the data.")
        rows = load_unit(mixture_folder / unit.file, "train")
        chosen = budget_indices(len(rows), unit.epochs, seed, unit.name)
        if planned.group is None:
            order = generator(plan.seed, "soup", unit.name).permutation(len(chosen))
            first = (branch - dealt) % len(plan.groups)
            dealt += len(chosen)
            chosen = chosen[order][first :: len(plan.groups)]
        samples.append((unit.name, rows, chosen))
    return samples


def _dataset(samples: list[tuple[str, Rows, np.ndarray]], seed: int, branch: int) -> Any:
    """One shuffled Dataset with `input_ids` and `labels` (-100 where no loss is taken)."""
    from datasets import Dataset

    where = [(rows, int(i)) for _, rows, chosen in samples for i in chosen]
    ids, labels = [], []
    for position in generator(seed, "order", branch).permutation(len(where)):
        rows, i = where[int(position)]
        tokens, mask = rows.row(i)
        ids.append(tokens.astype(np.int64))
        labels.append(np.where(mask.astype(bool), tokens, -100).astype(np.int64))
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def train_hash(recipe: Recipe) -> str:
    """Hash of what shapes the weights: not of how often is saved or logged, nor of how memory is spent."""
    settings = {k: v for k, v in train_settings(recipe).items() if not k.startswith(NEUTRAL)}
    model = recipe.model
    return digest(settings | {"trainable": model.trainable, "lora": model.lora, "dtype": model.dtype})


def branch_inputs(recipe: Recipe, plan: Plan, branch: int, base_hash: str) -> dict[str, str]:
    """What a branch is made from. A manifest with other hashes is a stranger."""
    data = {u.unit: u.sha256 for u in plan.units if u.group in (branch, None)}
    return {"base": base_hash, "plan": plan.hash, "data": digest(data), "train": train_hash(recipe)}


@contextmanager
def _only_one(folder: Path, patience: float = 30.0) -> Iterator[None]:
    """Hold the branch for this process; the system lets go of it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BranchFailed(f"{folder}: another process is training this branch. Wait for it, or stop it."
                                       ) from error
                time.sleep(0.5)
        yield


def train_branch(recipe: Recipe, plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path, base: Path,
                 base_hash: str, out: Path) -> BranchManifest:
    """Train one branch into `out`, or go on from its newest whole checkpoint; a finished one is returned as it is.

    Raises:
        ProvenanceError: `out` holds a branch of another base, plan, data or settings.
        BranchFailed: the trainer stopped before its last step.
    """
    if not 0 <= branch < len(plan.groups):
        raise BranchFailed(f"branch {branch}: the plan has branches 0 .. {len(plan.groups) - 1}.")
    inputs = branch_inputs(recipe, plan, branch, base_hash)
    with _only_one(out):
        if (out / "branch.json").exists():
            manifest = BranchManifest.load(out / "branch.json")
            check_branch(manifest, inputs, out)
            return manifest
        _begin(out, inputs)
        return _train(recipe, plan, branch, mixture, mixture_folder, base, inputs, out)


def _begin(out: Path, inputs: dict[str, str]) -> None:
    """Checkpoints of a branch with other inputs are not resumed."""
    path = out / "inputs.json"
    if path.exists() and json.loads(path.read_text()) != inputs:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    write_atomically(path, json.dumps(inputs, indent=1).encode())


def _train(recipe: Recipe, plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path, base: Path,
           inputs: dict[str, str], out: Path) -> BranchManifest:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each trainer home unless told not to
    from trl import SFTTrainer

    keep_buffers()
    samples = branch_samples(plan, branch, mixture, mixture_folder, recipe.seed)
    model = load_model(base, "float32", trust_remote_code=recipe.model.trust_remote_code)
    check_saved_names(model, base)
    check_vocabulary(max(int(rows.input_ids.max()) for _, rows, _ in samples), model)
    lora = _lora_config(recipe) if recipe.model.lora is not None else None
    if lora is None:
        select_trainable(model, recipe.model)
    trainer = SFTTrainer(
        model=model, args=_trainer_config(recipe, out / "checkpoints", plan.seed),
        train_dataset=_dataset(samples, plan.seed, branch),
        processing_class=load_tokenizer(base, trust_remote_code=recipe.model.trust_remote_code), peft_config=lora,
        callbacks=[_watch(out)])
    trainer.train(resume_from_checkpoint=newest_checkpoint(out / "checkpoints"))
    state = trainer.state
    if state.global_step < state.max_steps:
        raise BranchFailed(f"branch {branch}: stopped at step {state.global_step} of {state.max_steps}; its checkpoint "
                           "is kept. Run the same command again to go on.")
    files = _save_weights(trainer, lora is not None, out / "model")
    losses = [(int(e["step"]), float(e["loss"])) for e in state.log_history if "loss" in e]
    lengths = [int(rows.lengths[chosen].sum()) for _, rows, chosen in samples]
    passes = train_settings(recipe)["num_train_epochs"]
    manifest = BranchManifest(
        branch=branch, group_units=[name for name, _, _ in samples], steps=state.global_step,
        samples_planned=round(passes * sum(len(chosen) for _, _, chosen in samples)),
        tokens_planned=round(passes * sum(lengths)),
        tokens_seen=int(state.num_input_tokens_seen), final_loss=losses[-1][1] if losses else None, losses=losses,
        files=files, made_from=inputs,
        software={p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")})
    manifest.save(out / "branch.json")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return manifest


def _save_weights(trainer: Any, is_lora: bool, folder: Path) -> dict[str, str]:
    """The branch as a whole float32 checkpoint; adapters are folded into the weights (and kept beside them)."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_lora:
        model.save_pretrained(folder.with_name("adapter"))
        model = model.merge_and_unload()
    model.save_pretrained(partial)
    trainer.processing_class.save_pretrained(partial)
    os.replace(partial, folder)
    return {p.name: file_digest(p) for p in sorted(folder.glob("*.safetensors"))}


def _watch(out: Path) -> Any:
    """Progress for `anabranch status`, whole checkpoints marked as such, and an end when the launcher has died."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        stop = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The trainer's own way to save on SIGTERM leaves a checkpoint that nobody marks, in place of a marked one.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            progress = {"step": state.global_step, "steps": state.max_steps, "tokens": int(state.num_input_tokens_seen),
                        "loss": (logs or {}).get("loss")}
            write_atomically(out / "progress.json", json.dumps(progress).encode())

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != MARKER}
            write_atomically(folder / MARKER, json.dumps(sizes).encode())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            launcher = os.environ.get("ANABRANCH_LAUNCHER_PID")
            if self.stop or (launcher and os.getppid() != int(launcher)):
                control.should_save = control.should_training_stop = True

    return Watch()


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose marker is there and whose files have the sizes it names; torn ones are passed over.

    The trainer itself resumes from a checkpoint without its optimizer state and trains another model in silence.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True)
    for path in found:
        try:
            sizes = json.loads((path / MARKER).read_text())
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return str(path)
        except (OSError, ValueError):
            continue
    return None


def check_branch(manifest: BranchManifest, inputs: dict[str, str], folder: Path) -> None:
    """A branch of this base, plan, data and settings, with undamaged weights.

    Raises:
        ProvenanceError: it was made from something else.
        CorruptedError: a weight file is missing or not the recorded one.
    """
    words = {"base": "another base model", "plan": "another plan (partition)", "data": "other training rows",
             "train": "other training settings"}
    strange = [f"{words[k]}: the branch has {manifest.made_from.get(k, 'none')[:12]}, this run {v[:12]}"
               for k, v in inputs.items() if manifest.made_from.get(k) != v]
    if strange:
        raise ProvenanceError.of(
            f"{folder}: this branch was not made for this run. Train it anew (`--from train`), give the recipe "
            "another `output`, or restore what changed:", strange)
    damaged = [name for name, sha in manifest.files.items()
               if not (folder / "model" / name).is_file() or file_digest(folder / "model" / name) != sha]
    if damaged:
        raise CorruptedError(f"{folder / 'model'}: {', '.join(damaged)} missing or damaged (the bytes are not those in "
                             f"branch.json). Delete {folder} and run again to train this branch anew.")
