"""Train one exported branch with TRL: python train.py

Reads config.json and data.parquet beside it, writes model/ (float32 weights, tokenizer, trainer_state.json). Started again,
it goes on from its newest checkpoint. Needs torch, transformers, trl, datasets, and peft for LoRA; not anabranch. It is
written to give the branch that `anabranch train-branch` gives.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each trainer home unless told not to

import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train, or go on, to the last step."""
    here = Path(__file__).resolve().parent
    config = json.loads((here / "config.json").read_text())
    base, code = os.environ.get("BASE_MODEL", config["base"]), config["trust_remote_code"]
    kind = getattr(transformers, config["class"])
    model = kind.from_pretrained(base, revision=config["revision"], dtype=torch.float32, trust_remote_code=code)
    lora = None
    if config["lora"] is not None:
        from peft import LoraConfig

        lora = LoraConfig(**({"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config["lora"]))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in config["trainable"]))
    arguments = SFTConfig(output_dir=str(here / "checkpoints"), use_cpu=not torch.cuda.is_available(), **config["arguments"])
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_parquet(str(here / "data.parquet")), peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(base, revision=config["revision"], trust_remote_code=code))
    there = here / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(there)) if there.is_dir() else None)
    if trainer.state.global_step < trainer.state.max_steps:
        sys.exit(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; start it again to go on")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if lora is not None:
        model = model.merge_and_unload()
    model.save_pretrained(here / "model")
    trainer.processing_class.save_pretrained(here / "model")
    trainer.state.save_to_json(str(here / "model" / "trainer_state.json"))


if __name__ == "__main__":
    main()
