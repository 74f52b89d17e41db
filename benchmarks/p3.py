"""The P3 sample as a recipe: 27 datasets are the mixture, 7 are left out for transfer.

The data (293 tasks from the P3 sample of yizhongw/self-instruct, Apache-2.0) and the small base model are not part of
this repository; `--data` and `--model` say where they lie.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
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


def short_units(data: Path, out: Path, *, per_dataset: int = 2, characters: int = 640,
                rows: int = 32) -> tuple[list[dict], list[dict]]:
    """Sources of a smaller mixture, and of transfer: tasks whose rows are mostly short, so that many runs fit in an hour.

    Of each dataset the `per_dataset` tasks with at least `rows` short training rows and 6 test rows that come first in
    the order of their names' SHA-256. Writes train and test JSONL files under `out`.
    """
    found: dict[str, list[dict]] = {"mixture": [], "transfer": []}
    for folder in sorted(p for p in data.iterdir() if p.is_dir()):
        place = "transfer" if folder.name in TRANSFER else "mixture"
        sides = {side: _short_rows(folder / f"{side}.parquet", characters) for side in ("train", "test")}
        enough = [t for t, r in sides["train"].items() if len(r) >= rows and len(sides["test"].get(t, [])) >= 6]
        for task in sorted(enough, key=lambda t: hashlib.sha256(t.encode()).hexdigest())[:per_dataset]:
            for side in ("train", "test"):
                path = out / place / f"{task}.{side}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in sides[side][task]))
            names = {side: str(out / place / f"{task}.{side}.jsonl") for side in ("train", "test")}
            form = {"unit": task, "format": "prompt_completion"}
            found[place].append({"path": names["train"], "held_out": names["test"], **form} if place == "mixture"
                                else {"path": names["test"], **form})
    return found["mixture"], found["transfer"]


def _short_rows(path: Path, characters: int) -> dict[str, list[dict]]:
    """task -> its rows of at most so many characters, prompt and completion together, none of them empty."""
    tasks: dict[str, list[dict]] = {}
    for row in pq.read_table(path).to_pylist():
        if row["completion"].strip() and len(row["prompt"]) + len(row["completion"]) <= characters:
            tasks.setdefault(row["task"], []).append({"prompt": row["prompt"], "completion": row["completion"]})
    return tasks
