"""A branch as a config of LLaMA-Factory (checked against LLaMA-Factory 0.9.5's own arguments in
tests/formats/test_trainer_exports.py).

It loads the base in the compute dtype and widens what trains to float32, so under bf16 a float32 base is rounded once.
"""

from __future__ import annotations

from typing import Any

from anabranch.errors import RecipeError
from anabranch.trainers.translation import OPTIMIZER, BranchJob, translated, translated_lora

SAME = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm", "weight_decay", "optim", "optim_args",
        "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "label_smoothing_factor", "tf32", "logging_steps",
        "save_strategy", "save_steps", "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_drop_last")
LORA_NAMES = {"use_rslora": "use_rslora", "modules_to_save": "additional_target"}


def llamafactory_config(job: BranchJob, data: str, out: str, base: str) -> dict[str, Any]:
    """The YAML of `llamafactory-cli train`. Raises RecipeError for what cannot be said there."""
    if job.trainable is not None:
        raise RecipeError("this recipe's branches cannot be exported to llamafactory:\n  - model.trainable: it freezes by "
                          "layers, not by names of parameters; export with --trainer trl, axolotl or command")
    config: dict[str, Any] = {
        "model_name_or_path": base, **({"model_revision": job.revision} if job.revision else {}),
        "trust_remote_code": job.model.trust_remote_code, "stage": "sft", "do_train": True, "finetuning_type": "full",
        # rows are read from tokenized_path as they stand; `dataset` must be named all the same, and `template: empty`
        # leaves the tokenizer alone
        "dataset": f"branch_{job.branch}", "tokenized_path": data, "template": "empty", "cutoff_len": job.max_length,
        "packing": False, "output_dir": out, "overwrite_output_dir": False, "seed": job.seed, "data_seed": job.seed,
        "per_device_train_batch_size": job.batch, "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.steps, "num_train_epochs": float(job.settings["num_train_epochs"]),
        "warmup_steps": job.warmup_steps, "optim": OPTIMIZER,
        **translated(job, {name: name for name in SAME}, "llamafactory"),
        "bf16": job.bf16, "fp16": False, "pure_bf16": False, "disable_gradient_checkpointing": not job.checkpointing,
        "include_num_input_tokens_seen": "non_padding", "report_to": "none"}
    if job.model.lora is not None:
        config |= _lora(job)
    return config


def _lora(job: BranchJob) -> dict[str, Any]:
    lora = job.model.lora or {}
    targets = lora.get("target_modules", "all-linear")
    if isinstance(targets, str) and targets != "all-linear":
        raise RecipeError("this recipe's branches cannot be exported to llamafactory:\n  - model.lora.target_modules: it takes "
                          "names of modules, not a pattern; list them")
    named = translated_lora(job, LORA_NAMES, "llamafactory")
    if "additional_target" in named:
        named["additional_target"] = ",".join(named["additional_target"])
    return {"finetuning_type": "lora", "lora_rank": lora.get("r", 8), "lora_alpha": int(lora.get("lora_alpha", 8)),
            "lora_dropout": float(lora.get("lora_dropout", 0.0)),
            "lora_target": "all" if targets == "all-linear" else ",".join(targets), **named}
