"""A branch as a job for another trainer, and its hyperparameters in that trainer's words.

What is not in a trainer's table is refused by name: a setting that is dropped in silence makes another branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.branches import NEUTRAL
from anabranch.errors import RecipeError
from anabranch.recipe import Model

# What TRL's SFTConfig takes where a recipe is silent, for trainers that may take something else.
OPTIMIZER = "adamw_torch_fused"
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # new and old name of the same


@dataclass(frozen=True)
class BranchJob:
    """All that a trainer is told of a branch.

    base      Hub id or absolute folder             settings   branches.train_settings of the recipe
    rows      in the data file, one pass            tokens     over all passes
    steps     optimizer steps on one device, over all passes
    trainable names of the parameters that train; None: all of them, or LoRA
    """

    branch: int
    base: str
    revision: str | None
    seed: int
    rows: int
    tokens: int
    steps: int
    max_length: int
    settings: dict[str, Any]
    model: Model
    trainable: tuple[str, ...] | None
    made_from: dict[str, str]

    @property
    def accumulation(self) -> int:
        return int(self.settings.get("gradient_accumulation_steps", 1))

    @property
    def batch(self) -> int:
        """Rows of a batch on one device, before accumulation."""
        return int(self.settings["per_device_train_batch_size"])

    @property
    def warmup_steps(self) -> int:
        """Steps of warmup; a number below one is a share of all steps, rounded up, as the trainer takes it."""
        asked = self.settings.get("warmup_ratio") or self.settings["warmup_steps"]
        return math.ceil(self.steps * asked) if asked < 1 else int(asked)

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return any(bool(self.settings.get(name)) for name in CHECKPOINTING)

    @property
    def bf16(self) -> bool:
        return bool(self.settings.get("bf16", self.model.dtype == "bfloat16"))


# Settings that every translation reads from a BranchJob itself, and those that only say how TRL's own process runs.
HANDLED = {"warmup_steps", "warmup_ratio", "bf16", "use_cpu", "num_train_epochs", "per_device_train_batch_size",
           "gradient_accumulation_steps", "include_num_input_tokens_seen", *CHECKPOINTING}
LORA_HANDLED = {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "bias", "inference_mode"}


def translated(job: BranchJob, table: Mapping[str, str], trainer: str) -> dict[str, Any]:
    """The job's settings under the names of `table` (SFTConfig's name -> the trainer's).

    Raises:
        RecipeError: every setting that is not in the table and is not known to leave the weights alone.
    """
    problems, found = [], {}
    for name, value in job.settings.items():
        if name in table:
            found[table[name]] = value
        elif name not in HANDLED and not name.startswith(NEUTRAL):
            problems.append(f"train.{name}: {trainer} has no such setting, or it means another thing there")
    if problems:
        raise RecipeError.of(f"this recipe's branches cannot be exported to {trainer}:", [
            *problems, "take these out of the recipe, or export with --trainer trl or --trainer command"])
    return found


def translated_lora(job: BranchJob, table: Mapping[str, str], trainer: str) -> dict[str, Any]:
    """LoRA settings beyond rank, alpha, dropout and targets. Raises RecipeError as `translated`."""
    lora = job.model.lora or {}
    problems = [f"model.lora.{name}: {trainer} has no such setting" for name in lora if name not in LORA_HANDLED | table.keys()]
    if lora.get("bias", "none") != "none":
        problems.append(f"model.lora.bias: {trainer} trains no biases beside adapters")
    alpha = lora.get("lora_alpha", 8)
    if alpha != int(alpha):
        problems.append(f"model.lora.lora_alpha: {trainer} takes whole numbers, got {alpha}")
    if problems:
        raise RecipeError.of(f"this recipe's branches cannot be exported to {trainer}:", problems)
    return {table[name]: value for name, value in lora.items() if name in table}
