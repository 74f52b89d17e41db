"""Read exported jobs with the very classes that their trainer reads them with: python trainer_schemas.py TRAINER FOLDER..

Run with that trainer's packages ahead on PYTHONPATH (test_trainer_exports.py installs them). Prints one JSON object a job:
`config` as the trainer understood it and its `rows`, or `error`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def axolotl(config: dict[str, Any]) -> dict[str, Any]:
    """AxolotlInputConfig, as `axolotl.utils.config.validate_config` calls it; it takes unknown keys in silence, we do not."""
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import SFTDataset

    fields = AxolotlInputConfig.model_fields
    unknown = [key for key in config if key not in fields]
    unknown += [f"datasets.{key}" for one in config["datasets"] for key in one if key not in SFTDataset.model_fields]
    if unknown:
        raise ValueError(f"unknown keys: {', '.join(unknown)}")
    read = AxolotlInputConfig(**config | {"datasets": [SFTDataset(**one) for one in config["datasets"]]})
    return read.model_dump(mode="json", exclude_none=True)


def llamafactory(config: dict[str, Any]) -> dict[str, Any]:
    """The dataclasses of `llamafactory-cli train`, through its own parser, which refuses unknown keys; then its checks."""
    import dataclasses

    import torch
    from llamafactory.hparams.parser import _parse_train_args, _verify_model_args
    from transformers.training_args import ParallelMode

    # without a GPU it refuses bf16, unless it is told to use none
    model, data, training, finetuning, _ = _parse_train_args(config | {"use_cpu": not torch.cuda.is_available()})
    _verify_model_args(model, data, finetuning)
    assert training.parallel_mode != ParallelMode.DISTRIBUTED
    if training.do_train and data.dataset is None:
        raise ValueError("Please specify dataset for training.")
    return {field.name: value for part in (model, data, training, finetuning) for field in dataclasses.fields(part)
            if isinstance(value := getattr(part, field.name, None), str | int | float | bool | list | dict)}


def rows(trainer: str, folder: Path, config: dict[str, Any]) -> list[list[list[int]]]:
    """[input_ids, labels, attention_mask] of every row, as the trainer's version of `datasets` reads them."""
    from datasets import load_dataset, load_from_disk

    if trainer == "axolotl":
        data = load_dataset("parquet", data_files=str(folder / config["datasets"][0]["path"]), split="train")
    else:
        data = load_from_disk(str(folder / config["tokenized_path"]))["train"]
    return [[row["input_ids"], row["labels"], row["attention_mask"]] for row in data]


def main(trainer: str, folders: list[str]) -> None:
    """Each job as the trainer understands it."""
    for folder in map(Path, folders):
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text())
            read = {"axolotl": axolotl, "llamafactory": llamafactory}[trainer](dict(config))
            print(json.dumps({"config": read, "rows": rows(trainer, folder, config)}, default=str))
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
