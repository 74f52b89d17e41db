"""Checkpoints of a branch in training: whole or not there, known by their hashes, and without a pickle.

    checkpoints/checkpoint-N/
        model.safetensors ..        weights (or adapter_model.safetensors), config and tokenizer, as the trainer saves them
        optimizer.safetensors       state of optimizer and scheduler: a tree (below)
        random.safetensors          random states, and the loss that is not logged yet: a tree
        trainer_state.json          step, tokens seen, losses
        complete.json               written last: what the branch is made from; size and XXH3-128 of every other file

A checkpoint may have been made on another machine. Its hashes are checked before anything is read from it, and nothing
in it is ever unpickled: the trainer's own `optimizer.pt`, `rng_state.pth` and `training_args.bin` are not written.

A tree is a value of dicts, lists, tuples, tensors, arrays, numbers, text, true, false and null, kept in one safetensors
file: its tensors under numbers, all else as JSON in the header.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anabranch.artifacts import write_atomically
from anabranch.errors import CorruptedError, RecipeError

MARKER = "complete.json"
OPTIMIZER, RANDOM = "optimizer.safetensors", "random.safetensors"
MARKER_LIMIT = 2**22  # bytes: some 30,000 files
READ = 1 << 22


def mark_complete(folder: Path, inputs: dict[str, str]) -> None:
    """Flush every file of a checkpoint to the disk, then say that it is whole. Raises OutputError."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _hash(path)]
    write_atomically(folder / MARKER, json.dumps({"inputs": inputs, "files": files}, indent=1).encode())
    for place in (folder, folder.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_complete(folder: Path, inputs: dict[str, str] | None = None, needs: tuple[str, ...] = ()) -> bool:
    """Whether a checkpoint has its marker, all files that it names with their bytes, these inputs (None: any), and `needs`."""
    try:
        if (folder / MARKER).stat().st_size > MARKER_LIMIT:
            return False
        told = json.loads((folder / MARKER).read_bytes())
        there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
        files = told["files"]  # a name that leads out of the folder is not among those there
        return (inputs is None or told["inputs"] == inputs) and set(needs) <= files.keys() <= there.keys() and all(
            there[name].stat().st_size == size and _hash(there[name]) == wanted for name, (size, wanted) in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def checkpoints_in(folder: Path) -> list[Path]:
    """checkpoint-N folders, newest (highest N) first, whole or not."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_checkpoint(folder: Path, inputs: dict[str, str] | None = None) -> str | None:
    """The newest whole checkpoint of a branch with these inputs; torn, damaged and foreign ones are passed over.

    The trainer by itself would resume from one without its optimizer state, and train another model in silence.
    """
    return next((str(path) for path in checkpoints_in(folder) if is_complete(path, inputs, (OPTIMIZER, RANDOM))), None)


def keep_newest(folder: Path, count: int) -> None:
    """Remove checkpoints older than the `count` newest. Called once the newest is marked: one whole is always there."""
    for stale in checkpoints_in(folder)[count:]:
        (stale / MARKER).unlink(missing_ok=True)  # first: what is half removed is not whole
        shutil.rmtree(stale, ignore_errors=True)


def _hash(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(READ):
            hasher.update(data)
    return hasher.hexdigest()


# --------------------------------------------------------------------------------------------------------- the trainer


def with_our_checkpoints(trainer: type) -> Any:
    """A trainer whose optimizer, scheduler and random states go through `checkpoints.save_tree`, in place of pickles.

    Only on one device: what FSDP and DeepSpeed save is theirs.
    """
    class Trainer(trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            save_tree(Path(output_dir) / OPTIMIZER, {"optimizer": self.optimizer.state_dict(),
                                                     "scheduler": self.lr_scheduler.state_dict()})
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)

        def _save_rng_state(self, output_dir: str) -> None:
            save_tree(Path(output_dir) / RANDOM, {
                "python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                "unlogged": [self._tr_loss, self._globalstep_last_logged]})

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if not load_renamed(Path(resume_from_checkpoint), self.model if model is None else model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                saved = load_tree(Path(checkpoint) / OPTIMIZER)
                self.optimizer.load_state_dict(saved["optimizer"])
                self.lr_scheduler.load_state_dict(saved["scheduler"])

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                saved = load_tree(Path(checkpoint) / RANDOM)
                try:
                    _check_random(saved)
                    random.setstate(saved["python"])
                    np.random.set_state(saved["numpy"])
                    torch.set_rng_state(saved["cpu"])
                    if torch.cuda.is_available() and saved["cuda"] is not None:
                        torch.cuda.set_rng_state(saved["cuda"])
                except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
                    raise CorruptedError(f"{checkpoint}: random states that cannot be ({error}). Delete this checkpoint; "
                                         "training then goes on from the one before it.") from error

    return Trainer


def load_renamed(checkpoint: Path, model: Any) -> bool:
    """Load whole weights whose names in files are not those in memory. The trainer's own loading would pass such files over
    with a warning, and go on from the base. False, and nothing done, where the names are the same, or there are adapters.

    Raises:
        CorruptedError: weights are missing.
    """
    files = sorted(checkpoint.glob("model*.safetensors"))
    names = {name for path in files for name in _names_in(path)}
    if not names or names <= set(model.state_dict()):
        return False
    loaded, told = type(model).from_pretrained(str(checkpoint), dtype=torch.float32, output_loading_info=True)
    if lost := sorted({*told["missing_keys"], *(str(key) for key, *_ in told["mismatched_keys"])}):
        raise CorruptedError(f"{checkpoint}: no weights for {', '.join(lost[:4])}{', ..' if len(lost) > 4 else ''}. Delete "
                             "this checkpoint; training then goes on from the one before it.")
    with torch.no_grad():
        kept = loaded.state_dict()
        for name, tensor in model.state_dict().items():
            tensor.copy_(kept[name])
    return True


def _names_in(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _check_random(saved: Any) -> None:
    """numpy takes a position beyond its 624 words, and reads there. Raises ValueError."""
    kind, words, position = saved["numpy"][:3]
    if kind != "MT19937" or words.shape != (624,) or words.dtype != np.uint32 or not 0 <= position <= 624:
        raise ValueError(f"numpy's state is {kind}, {words.dtype} {words.shape}, at {position}")


# ------------------------------------------------------------------------------------------------------------ the tree


def save_tree(path: Path, value: Any) -> None:
    """Raises RecipeError if the value has something in it that is no part of a tree."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_folded(value, tensors, "state"))
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, {"tree": text})


def load_tree(path: Path) -> Any:
    """What `save_tree` was given, its tensors on the CPU. Raises CorruptedError."""
    try:
        with safe_open(path, "pt") as file:
            return _unfolded(json.loads(file.metadata()["tree"]), file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptedError(f"{path}: not a training state ({type(error).__name__}: {error}). Delete this checkpoint; "
                             "training then goes on from the one before it.") from error


def _folded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        tensors[name := str(len(tensors))] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        return {"array" if isinstance(value, np.ndarray) else "tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_folded(k, tensors, where), _folded(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_folded(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise RecipeError(f"the training state has a {type(value).__name__} at {where}, which cannot be kept without a pickle. "
                      "Choose another `train.optim` or `train.lr_scheduler_type`.")


def _unfolded(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_unfolded(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), = value.items()
    if kind == "dict":
        return {_unfolded(k, file): _unfolded(v, file) for k, v in inner}
    if kind == "tuple":
        return tuple(_unfolded(v, file) for v in inner)
    if kind not in ("tensor", "array"):
        raise ValueError(f"unknown part {kind!r}")
    tensor = file.get_tensor(inner)
    return tensor.numpy() if kind == "array" else tensor
