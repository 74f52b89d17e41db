"""The P3 sample as a recipe: 27 datasets are the mixture, 7 are left out for transfer.

The data (293 tasks from the P3 sample of yizhongw/self-instruct, Apache-2.0) and the small base model are not part of
this repository; `--data` and `--model` say where they lie.
"""

from __future__ import annotations

from pathlib import Path

import yaml

TRANSFER = ("cosmos_qa", "dbpedia_14", "glue_qqp", "quartz", "rotten_tomatoes", "samsum", "trec")


def write_recipe(path: Path, data: Path, model: Path, output: Path, **changes: object) -> Path:
    """A recipe over the P3 sample; `changes` replace whole sections' keys (section={...})."""
    datasets = sorted(p.name for p in data.iterdir() if p.is_dir())
    source = {"unit_column": "task", "format": "prompt_completion"}
    recipe: dict = {
        "model": {"path": str(model)},
        "mixture": {
            "sources": [{"path": str(data / d / "train.parquet"), "held_out": str(data / d / "test.parquet"), **source}
                        for d in datasets if d not in TRANSFER],
            "max_samples": 60, "max_held_out": 6, "max_length": 512},
        "split": {"method": "merit", "groups": 4},
        "train": {"learning_rate": 1e-3, "per_device_train_batch_size": 16, "save_strategy": "no",
                  "train_sampling_strategy": "group_by_length"},
        "evaluate": {"transfer": [{"path": str(data / d / "test.parquet"), **source} for d in TRANSFER],
                     "generate_samples": 2, "short_answer_tokens": 12, "branches": False},
        "output": str(output), "seed": 0}
    for section, values in changes.items():
        if isinstance(values, dict):
            recipe[section] = recipe.get(section, {}) | values
        else:
            recipe[section] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
