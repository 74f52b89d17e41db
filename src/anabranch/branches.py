"""A group -> one training job on TRL's SFTTrainer.

A branch starts from the base, sees only its group's units (each with its full budget), and talks to nobody.
Weights are trained in float32 (under bf16 autocast if the recipe says `dtype: bfloat16`): steps of a pure bf16 run
are mostly rounded away, and a task vector that is rounded away cannot be merged.

Completion is not an exit code: a branch is done when the trainer has reached its last step and `branch.json`,
written last, holds the hashes of what it came from and of the weights it left.

A branch that is told to stop saves, and goes on from there when it is started again, here or elsewhere: same rows, same
order, same random states, so the same tokens seen and (where the arithmetic is deterministic: one CPU thread count, one
kind of device) the same weights bit for bit as if nobody had stopped it.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import math
import os
import shutil
import time
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from anabranch.artifacts import BranchManifest, Mixture, Plan, digest, file_digest, write_atomically
from anabranch.branch_folder import check_weights, dress
from anabranch.checkpoints import (
    RANDOM,
    keep_newest,
    load_tree,
    mark_complete,
    newest_checkpoint,
    with_our_checkpoints,
)
from anabranch.errors import BranchFailed, CorruptedError, Preempted, ProvenanceError, RecipeError
from anabranch.families import adapter_arguments, describe_frozen
from anabranch.image_batches import ROW, ImageBatches
from anabranch.model import (
    check_saved_names,
    check_vocabulary,
    keep_buffers,
    load_model,
    load_tokenizer,
    select_trainable,
    vision_of,
)
from anabranch.recipe import Recipe, check_train_arguments
from anabranch.rows import Rows, StoredImage, budget_indices, generator, load_unit
from anabranch.stopping import Stop, stoppable
from anabranch.vision import is_vision_language

NEUTRAL = ("save_", "logging_", "dataloader_", "activation_checkpointing", "gradient_checkpointing", "project",
           "run_name", "torch_empty_cache_steps", "skip_memory_metrics")
POSITIVE = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
PROGRESS_SECONDS = 2.0  # between two words of a branch about itself


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
            _lora_config(recipe.model.lora)
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


def _lora_config(lora: dict[str, Any]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise RecipeError("recipe: model.lora needs peft, which is not installed: pip install 'anabranch[lora]'.") from error
    return LoraConfig(**({"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora))


def trainer_arguments(recipe: Recipe, seed: int) -> dict[str, Any]:
    """What TRL's SFTConfig is given, less where to write and on what to run."""
    settings = train_settings(recipe)
    settings["save_total_limit"] = None  # the trainer removes the old checkpoint before the new one is whole: we do it after
    settings.setdefault("bf16", recipe.model.dtype == "bfloat16")
    return {"seed": seed, "data_seed": seed, "max_length": None, "packing": False, "report_to": "none", "disable_tqdm": True,
            "include_num_input_tokens_seen": "non_padding", "dataset_kwargs": {"skip_prepare_dataset": True}} | settings


def _trainer_config(recipe: Recipe, out: Path, seed: int) -> Any:
    import torch
    from trl import SFTConfig

    return SFTConfig(output_dir=str(out), **({"use_cpu": not torch.cuda.is_available()} | trainer_arguments(recipe, seed)))


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


def branch_order(samples: list[tuple[str, Rows, np.ndarray]], seed: int, branch: int) -> Iterator[tuple[Rows, int]]:
    """(rows, number of a row) of every sample of a branch, in its order."""
    where = [(rows, int(i)) for _, rows, chosen in samples for i in chosen]
    for position in generator(seed, "order", branch).permutation(len(where)):
        yield where[int(position)]


def branch_rows(samples: list[tuple[str, Rows, np.ndarray]], seed: int,
                branch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) int64 of every sample of a branch in its order; labels are -100 where no loss is taken."""
    for rows, i in branch_order(samples, seed, branch):
        tokens, mask = rows.row(i)
        yield tokens.astype(np.int64), np.where(mask.astype(bool), tokens, -100).astype(np.int64)


def branch_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a branch of so many rows on one device, as the trainer counts them: the last batch and the last
    accumulation of a pass may be short, and a fraction of a pass is rounded up to whole steps."""
    settings = train_settings(recipe)
    batches = math.ceil(rows / settings["per_device_train_batch_size"])
    per_pass = max(1, math.ceil(batches / settings.get("gradient_accumulation_steps", 1)))
    return math.ceil(settings["num_train_epochs"] * per_pass)


def _dataset(samples: list[tuple[str, Rows, np.ndarray]], seed: int, branch: int) -> Any:
    """One shuffled Dataset with `input_ids` and `labels`."""
    from datasets import Dataset

    ids, labels = [], []
    for tokens, marked in branch_rows(samples, seed, branch):
        ids.append(tokens)
        labels.append(marked)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def _images(samples: list[tuple[str, Rows, np.ndarray]], seed: int, branch: int) -> list[tuple[StoredImage, ...]]:
    """The images of every sample in the branch's order; [] where no row has any."""
    if all(rows.images is None for _, rows, _ in samples):
        return []
    shown = [rows.images_of([i])[0] for rows, i in branch_order(samples, seed, branch)]
    return shown if any(shown) else []


def train_hash(recipe: Recipe) -> str:
    """Hash of what shapes the weights: not of how often is saved or logged, nor of how memory is spent."""
    settings = {k: v for k, v in train_settings(recipe).items() if not k.startswith(NEUTRAL)}
    model, trainer = recipe.model, recipe.trainer
    other: dict[str, Any] = {} if trainer.kind == "trl" else {"trainer": trainer.model_dump(mode="json")}
    other |= {"freeze": model.freeze} if model.freeze else {}
    return digest(settings | {"trainable": model.trainable, "lora": model.lora, "dtype": model.dtype} | other)


def branch_inputs(recipe: Recipe, plan: Plan, branch: int, base_hash: str) -> dict[str, str]:
    """What a branch is made from. A manifest with other hashes is a stranger."""
    data = {u.unit: u.sha256 for u in plan.units if u.group in (branch, None)}
    return {"base": base_hash, "plan": plan.hash, "data": digest(data), "train": train_hash(recipe)}


@contextmanager
def only_one(folder: Path, patience: float = 30.0) -> Iterator[int]:
    """Hold the branch for this process (and for those that inherit the file descriptor); the system lets go of it
    however they end."""
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
        yield lock.fileno()


def train_branch(recipe: Recipe, plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path, base: Path,
                 base_hash: str, out: Path) -> BranchManifest:
    """Train one branch into `out`, or go on from its newest whole checkpoint; a finished one is returned as it is.

    Raises:
        ProvenanceError: `out` holds a branch of another base, plan, data or settings.
        Preempted: a signal told it to stop (stopping.py); it has saved.
        BranchFailed: the trainer stopped before its last step.
        RecipeError: the recipe has another trainer.
    """
    if recipe.trainer.kind != "trl":
        raise RecipeError(f"trainer.kind is {recipe.trainer.kind}: TRL does not train the branches of this recipe.")
    with held_branch(recipe, plan, branch, base_hash, out) as (done, hold):
        return done or _train(recipe, plan, branch, mixture, mixture_folder, base, out, hold)


@dataclass(frozen=True)
class Hold:
    """The right to train into a branch's folder: what the branch is made from, whether it shall stop, and the descriptor of
    its lock."""

    inputs: dict[str, str]
    stop: Stop
    lock: int


@contextmanager
def held_branch(recipe: Recipe, plan: Plan, branch: int, base_hash: str,
                out: Path) -> Iterator[tuple[BranchManifest | None, Hold]]:
    """A branch's folder, held for whoever trains into it; and its manifest, if it is done.

    Checkpoints of a branch with other inputs are gone afterwards. Raises as `train_branch`.
    """
    if not 0 <= branch < len(plan.groups):
        raise BranchFailed(f"branch {branch}: the plan has branches 0 .. {len(plan.groups) - 1}.")
    inputs = branch_inputs(recipe, plan, branch, base_hash)
    with stoppable(f"branch {branch}") as stop, only_one(out) as lock:
        if (out / "branch.json").exists():
            manifest = BranchManifest.load(out / "branch.json")
            check_branch(manifest, inputs, out)
            yield manifest, Hold(inputs, stop, lock)
            return
        path = out / "inputs.json"
        if path.exists() and json.loads(path.read_text()) != inputs:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
        write_atomically(path, json.dumps(inputs, indent=1).encode())
        yield None, Hold(inputs, stop, lock)


def _train(recipe: Recipe, plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path, base: Path,
           out: Path, hold: Hold) -> BranchManifest:
    samples = branch_samples(plan, branch, mixture, mixture_folder, recipe.seed)
    trainer = _trainer(recipe, plan.seed, branch, samples, base, out, hold)
    _go_on(trainer, newest_checkpoint(out / "checkpoints", hold.inputs))
    state = trainer.state
    if state.global_step < state.max_steps:
        raise Preempted(f"branch {branch}: told to stop ({hold.stop.asked or 'its launcher has died'}) at step "
                        f"{state.global_step} of {state.max_steps}; its checkpoint is kept. Run the same command again to "
                        "go on.")
    files = _save_weights(trainer, recipe, base, out / "model")
    losses = [(int(e["step"]), float(e["loss"])) for e in state.log_history if "loss" in e]
    rows, tokens = planned_budget(recipe, samples)
    manifest = BranchManifest(
        branch=branch, group_units=[name for name, _, _ in samples], steps=state.global_step,
        samples_planned=rows, tokens_planned=tokens,
        tokens_seen=int(state.num_input_tokens_seen), final_loss=losses[-1][1] if losses else None, losses=losses,
        files=files, made_from=hold.inputs,
        software={p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")})
    manifest.save(out / "branch.json")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return manifest


def planned_budget(recipe: Recipe, samples: list[tuple[str, Rows, np.ndarray]]) -> tuple[int, int]:
    """(rows, tokens) of a branch over all its passes."""
    passes = train_settings(recipe)["num_train_epochs"]
    return (round(passes * sum(len(chosen) for _, _, chosen in samples)),
            round(passes * sum(int(rows.lengths[chosen].sum()) for _, rows, chosen in samples)))


def _trainer(recipe: Recipe, seed: int, branch: int, samples: list[tuple[str, Rows, np.ndarray]], base: Path,
             out: Path, hold: Hold) -> Any:
    """TRL's trainer on the branch's rows, with our checkpoints."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each trainer home unless told not to
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # whatever a library loads with torch: no pickle may run code
    from trl import SFTTrainer

    hold.stop.check()
    keep_buffers()
    model = load_model(base, "float32", trust_remote_code=recipe.model.trust_remote_code)
    check_saved_names(model, base)
    check_vocabulary(max(int(rows.input_ids.max()) for _, rows, _ in samples), model)
    for line in describe_frozen(model, recipe.model):
        print(line, flush=True)
    lora = _lora_config(adapter_arguments(model, recipe.model)) if recipe.model.lora is not None else None
    if lora is None:
        select_trainable(model, recipe.model)
    hold.stop.check()
    arguments, data = _trainer_config(recipe, out / "checkpoints", seed), _dataset(samples, seed, branch)
    collator = None
    if images := _images(samples, seed, branch):
        data, collator = data.add_column(ROW, list(range(len(data)))), _image_batches(model, images, arguments, branch)
    trainer = with_our_checkpoints(SFTTrainer)(
        model=model, args=arguments, train_dataset=data, data_collator=collator,
        processing_class=load_tokenizer(base, trust_remote_code=recipe.model.trust_remote_code), peft_config=lora)
    if is_vision_language(base):  # some of their classes say no, of a loss that TRL does not take: without it, accumulated
        trainer.model_accepts_loss_kwargs = True  # batches would count alike, however many tokens of responses they hold
    limit = train_settings(recipe)["save_total_limit"]
    trainer.add_callback(_watch(trainer, out, hold, limit))
    hold.stop.check()
    return trainer


def _image_batches(model: Any, images: list[tuple[StoredImage, ...]], arguments: Any, branch: int) -> ImageBatches:
    """The collator of a branch whose rows show images. Raises RecipeError."""
    vision = vision_of(model)
    if vision is None:
        raise RecipeError(f"branch {branch}: its rows show images, and the base is a language model. Give the vision-language "
                          "model that the mixture was made for.")
    if arguments.padding_free:
        raise RecipeError("recipe: train.padding_free: not for rows with images: their batches are padded. Take it out.")
    arguments.remove_unused_columns = False  # the row's number is none of the model's arguments
    return ImageBatches.of(vision, images, model, arguments.pad_to_multiple_of)


def _go_on(trainer: Any, checkpoint: str | None) -> None:
    """Train to the last step from a checkpoint, or from the start.

    From a checkpoint of the last step (killed while the branch was being written) there is nothing to train, and a
    trainer whose last pass is a fraction of one would take a step too many.
    """
    from transformers.trainer_callback import TrainerState

    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def _in_order(adapters: Mapping[str, Any]) -> None:
    """Sets in peft's settings, which it would write in an order that differs from process to process."""
    for config in adapters.values():
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))


def _save_weights(trainer: Any, recipe: Recipe, base: Path, folder: Path) -> dict[str, str]:
    """The branch as a whole float32 checkpoint with the base's other files; adapters are folded into the weights (and kept
    beside them). Raises BranchFailed where it could not be merged with the base."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.model.lora is not None:
        _in_order(model.peft_config)
        model.save_pretrained(folder.with_name("adapter"))
        model = model.merge_and_unload()
    model.save_pretrained(partial)
    dress(partial, base, code=recipe.model.trust_remote_code)
    check_weights(partial, base, model, recipe.model)
    os.replace(partial, folder)
    return {p.name: file_digest(p) for p in sorted(folder.glob("*.safetensors"))}


def _watch(trainer: Any, out: Path, hold: Hold, limit: int | None) -> Any:
    """Progress for `anabranch status`; checkpoints marked whole, then older ones removed; an end when told to, or when the
    launcher has died."""
    from transformers import TrainerCallback

    stop = hold.stop

    class Watch(TrainerCallback):
        begun, told, first, loss = 0.0, 0.0, (0, 0), None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            stop.check()
            stop.at_once = False  # from here on a step's work would be lost
            self.begun, self.first = time.monotonic(), (state.global_step, int(state.num_input_tokens_seen))
            if state.global_step:
                saved = load_tree(Path(args.output_dir) / f"checkpoint-{state.global_step}" / RANDOM)["unlogged"]
                trainer._tr_loss, trainer._globalstep_last_logged = saved[0].to(args.device), saved[1]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = (logs or {}).get("loss", self.loss)
            self.tell(state)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", hold.inputs)
            if limit is not None:
                keep_newest(Path(args.output_dir), max(1, limit))
            if stop.asked:  # heard while it was saving
                control.should_training_stop = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            launcher = os.environ.get("ANABRANCH_LAUNCHER_PID")
            if stop.asked or (launcher and os.getppid() != int(launcher)):
                control.should_save = control.should_training_stop = True
            if time.monotonic() - self.told > PROGRESS_SECONDS:
                self.tell(state)

        def tell(self, state: Any) -> None:
            self.told, tokens = time.monotonic(), int(state.num_input_tokens_seen)
            seconds, steps = self.told - self.begun, state.global_step - self.first[0]
            progress = {"step": state.global_step, "steps": state.max_steps, "tokens": tokens, "loss": self.loss,
                        "tokens_per_second": round((tokens - self.first[1]) / seconds, 1) if steps else 0.0,
                        "seconds_left": round(seconds / steps * (state.max_steps - state.global_step), 1) if steps else None}
            write_atomically(out / "progress.json", json.dumps(progress).encode())

    return Watch()


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
               if Path(name).name != name or not (folder / "model" / name).is_file()
               or file_digest(folder / "model" / name) != sha]
    damaged += sorted(p.name for p in (folder / "model").glob("*.safetensors") if p.name not in manifest.files)
    if damaged:
        raise CorruptedError(f"{folder / 'model'}: {', '.join(damaged)} missing or damaged (the bytes are not those in "
                             f"branch.json). Delete {folder} and run again: it is trained anew, or comes home again where the "
                             "run goes through a store. If it comes home like this, remove "
                             f"results/branch-{folder.name}.json from the store, and let workers train it anew.")
