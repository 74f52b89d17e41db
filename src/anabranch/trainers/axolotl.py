"""A branch as a config of axolotl (checked against axolotl 0.19's own schema in tests/formats/test_trainer_exports.py).

axolotl keeps the weights themselves in bfloat16 under `bf16: true`, where most steps of a fine-tuning are rounded away. So
whole weights are trained in float32 (with TF32 products where the recipe says bfloat16), and adapters, which PEFT keeps in
float32, under bf16.
"""

from __future__ import annotations

import math
from typing import Any

from anabranch.trainers.translation import OPTIMIZER, BranchJob, translated, translated_lora

NAMES = {"learning_rate": "learning_rate", "lr_scheduler_type": "lr_scheduler", "lr_scheduler_kwargs": "lr_scheduler_kwargs",
         "max_grad_norm": "max_grad_norm", "weight_decay": "weight_decay", "optim": "optimizer", "optim_args": "optim_args",
         "adam_beta1": "adam_beta1", "adam_beta2": "adam_beta2", "adam_epsilon": "adam_epsilon",
         "neftune_noise_alpha": "neftune_noise_alpha", "logging_steps": "logging_steps", "save_steps": "save_steps",
         "save_total_limit": "save_total_limit", "dataloader_num_workers": "dataloader_num_workers",
         "dataloader_pin_memory": "dataloader_pin_memory"}
LORA_NAMES = {"use_rslora": "peft_use_rslora", "rank_pattern": "lora_rank_pattern", "alpha_pattern": "lora_alpha_pattern",
              "modules_to_save": "lora_modules_to_save", "layers_to_transform": "peft_layers_to_transform",
              "layers_pattern": "peft_layers_pattern", "init_lora_weights": "peft_init_lora_weights"}


def axolotl_config(job: BranchJob, data: str, out: str, base: str) -> dict[str, Any]:
    """The YAML of `axolotl train`. Raises RecipeError for what cannot be said there."""
    config: dict[str, Any] = {
        "base_model": base, **({"revision_of_model": job.revision} if job.revision else {}),
        "trust_remote_code": job.model.trust_remote_code,
        # already tokenised: input_ids, attention_mask, labels; no `type`
        "datasets": [{"path": data, "ds_type": "parquet", "split": "train", "type": None}],
        "sequence_len": job.max_length, "excess_length_strategy": "raise", "sample_packing": False,
        "pad_to_sequence_len": False, "val_set_size": 0.0, "output_dir": out, "dataset_prepared_path": "prepared",
        "seed": job.seed, "micro_batch_size": job.batch, "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.steps, "num_epochs": _passes(job), "warmup_steps": job.warmup_steps,
        "optimizer": OPTIMIZER, **translated(job, NAMES, "axolotl"), **_precision(job),
        "gradient_checkpointing": job.checkpointing, "auto_resume_from_checkpoints": True}
    if job.settings.get("save_strategy", "steps") != "steps":
        del config["save_steps"]
        config["save_strategy"] = job.settings["save_strategy"]
    if job.model.lora is not None:
        config |= _lora(job)
    elif job.trainable is not None:
        config["unfrozen_parameters"] = [f"^{name}$" for name in job.trainable]
    return config


def _precision(job: BranchJob) -> dict[str, Any]:
    adapters = job.model.lora is not None and job.bf16
    return {"bf16": adapters, "fp16": False, "tf32": job.bf16 and not adapters}


def _passes(job: BranchJob) -> float:
    """Passes that hold all steps: axolotl takes the smaller of `max_steps` and its own count, which rounds up once over all
    passes where the trainer does in each."""
    passes = float(job.settings["num_train_epochs"])
    while math.ceil(job.rows * passes / (job.batch * job.accumulation)) < job.steps:
        passes += 1
    return passes


def _lora(job: BranchJob) -> dict[str, Any]:
    lora = job.model.lora or {}
    targets = lora.get("target_modules", "all-linear")
    where: dict[str, Any] = {"lora_target_linear": True} if targets == "all-linear" else {"lora_target_modules": targets}
    return {"adapter": "lora", "lora_r": lora.get("r", 8), "lora_alpha": int(lora.get("lora_alpha", 8)),
            "lora_dropout": lora.get("lora_dropout", 0.0), **where, **translated_lora(job, LORA_NAMES, "axolotl")}
