"""A table of merges on language: one task of each dataset of the P3 sample, every pair, six methods, and sets of four.

    python benchmarks/mergeability_p3.py --data P3 --model P3_BASE --output runs/mergeability [--sets 60]

A task is one dataset under one prompt template: of each dataset that is not kept for transfer the template with enough short
rows that comes first in the order of its name's SHA-256 (no two tasks share a text). Models train on the sample's train rows
but 24 of each task, on which the predictor's inputs are measured; merges are scored on its test rows. Resumable: stop it and
call it again.

Learning rate and epochs were chosen on train rows alone (a fifth of them held out, every third task, `linear` only), before any
prediction: 1e-4 for four epochs teaches as much as 3e-4 for two (own models gain 0.33 and 0.34 nats over the base) and merging
costs more (7 % of the score against 3 %); at 3e-4 for four the models overfit, and their average beats them (up to 1.07). That
1e-3 is far too much was seen on the test rows of five tasks.

Writes results/mergeability_p3/: table.csv, sets.csv, collect.json and summary.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.mergeability.collect import collect
from anabranch.mergeability.table import Table, read_table
from anabranch.recipe import load_recipe
from machine import RESULTS, machine
from p3 import short_units, write_recipe

ROWS, CHARACTERS = 100, 900  # a task has at least so many train rows of at most so many characters
HELD_OUT, EPOCHS, RATE, BATCH = 40, 4.0, 1e-4, 8
PLACE = RESULTS / "mergeability_p3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/mergeability"))
    parser.add_argument("--sets", type=int, default=60)
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--tasks", help="some of the tasks, comma-separated, for a trial; writes no results")
    args = parser.parse_args()
    output = args.output.resolve()
    recipe = task_recipe(output, args.data.resolve(), args.model.resolve(), args.rate, args.epochs)
    begun = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {text}", flush=True)

    tasks = args.tasks.split(",") if args.tasks else None
    table = collect(load_recipe(recipe), tasks=tasks, sets=args.sets, k=4, tell=tell)
    tell("done")
    figures = summary(read_table(table))
    print(json.dumps(figures, indent=1))
    if tasks is None:
        publish(table.parent, figures)


def task_recipe(output: Path, data: Path, model: Path, rate: float, epochs: float) -> Path:
    sources, _ = short_units(data, output / "data", per_dataset=1, characters=CHARACTERS, rows=ROWS)
    return write_recipe(
        output / "recipe.yaml", data, model, output / "run",
        mixture={"sources": sources, "epochs": epochs, "max_samples": None, "max_held_out": HELD_OUT, "max_length": 400},
        train={"per_device_train_batch_size": BATCH, "learning_rate": rate},
        evaluate={"transfer": [], "retention": "none", "generate_samples": 0, "branches": False},
        launch={"max_parallel": 1, "threads": 1})


def summary(table: Table) -> dict[str, Any]:
    """Per task the scores of base, own model and merges; per method how much of the own models' score is kept."""
    tasks: dict[str, dict[str, Any]] = {}
    for t, name in enumerate(table.tasks):
        place = np.concatenate([np.flatnonzero(table.first == t), np.flatnonzero(table.second == t)])
        side = np.concatenate([np.zeros((table.first == t).sum(), int), np.ones((table.second == t).sum(), int)])
        tasks[name] = {"base": round(float(table.base[place[0], side[0]]), 4),
                       "single": round(float(table.single[place[0], side[0]]), 4),
                       "merged": {m: round(float(v[place, side].mean()), 4) for m, v in table.outcomes.items()}}
    methods = {}
    for m in table.methods:
        values = table.normalised(m)
        methods[m] = {"mean": round(float(values.mean()), 4), "sd": round(float(values.std()), 4),
                      "least": round(float(values.min()), 4), "most": round(float(values.max()), 4)}
    best = np.stack([table.normalised(m) for m in table.methods]).argmax(0)
    return {"pairs": len(table), "tasks": tasks, "normalised": methods,
            "best_of_pairs": {m: int((best == i).sum()) for i, m in enumerate(table.methods)}}


def publish(folder: Path, figures: dict[str, Any]) -> None:
    PLACE.mkdir(parents=True, exist_ok=True)
    for name in ("table.csv", "sets.csv", "collect.json"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, PLACE / name)
    (PLACE / "summary.json").write_text(
        json.dumps({"benchmark": "mergeability_p3", "machine": machine(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
