"""Does splitting pay, where and when? Ten arms at equal tokens over two learning rates and three training lengths.

    python benchmarks/p3_regimes.py --data P3 --model P3_BASE --output runs/regimes [--seeds 2] [--parallel 1]

The mixture: two tasks of each of the P3 sample's datasets that have enough short rows (see p3.short_units), 24 rows each;
seven other datasets are transfer, plain prompts of the mixture's held-out rows are retention. A cell is one learning rate
and one training length; an arm of a cell sees the same rows for as many epochs, whatever the split. Joint training at a
third of the learning rate is the joint arm of the cell below (9e-4 -> 3e-4), and for 3e-4 a cell of its own (1e-4).

Resumable: stop it and call it again. All cells of one seed are finished before the next seed begins, and
results/p3_regimes.json and .md are written anew after every cell.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.artifacts import Comparison, Evaluation
from anabranch.compare import parse_arms, run_comparison
from anabranch.recipe import load_recipe
from anabranch.run import open_run
from anabranch.scores import PLACES, Place, paired_interval
from machine import RESULTS, machine
from p3 import short_units, write_recipe

ARMS = "base,joint,joint_matched:merit:2,joint_batch:4,soup:2,random:4,stratified:4,merit:1,merit:2,merit:3"
RATES, EPOCHS, BELOW = (9e-4, 3e-4), (1.0, 0.5, 3.0), 1e-4
GRADIENTS = ("mixture", "gradients", "conflict")  # the same in every cell: they depend on neither rate nor epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/regimes"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=1)
    args = parser.parse_args()
    output = args.output.resolve()
    sources, transfer = short_units(args.data.resolve(), output / "data")
    begun = time.monotonic()
    for seeds in range(1, args.seeds + 1):
        for epochs in EPOCHS:
            for rate in (*RATES, BELOW):
                folder = output / cell_name(rate, epochs)
                write_recipe(
                    folder / "recipe.yaml", args.data.resolve(), args.model.resolve(), folder / "run",
                    mixture={"sources": sources, "epochs": epochs, "max_samples": 24, "max_held_out": 8, "max_length": 256},
                    gradients={"calibration_samples": 24}, train={"per_device_train_batch_size": 8, "learning_rate": rate},
                    evaluate={"transfer": transfer, "generate_samples": 0, "max_samples": 8},
                    launch={"max_parallel": args.parallel, "threads": 1})
                _share(output, folder)
                run = open_run(load_recipe(folder / "recipe.yaml"), tell=lambda *_: None)
                run_comparison(run, parse_arms("base,joint" if rate == BELOW else ARMS), range(seeds))
                print(f"{time.monotonic() - begun:6.0f} s  {folder.name}, {seeds} seeds", flush=True)
                write_results(output)


def cell_name(rate: float, epochs: float) -> str:
    return f"lr-{rate:g}_epochs-{epochs:g}"


def _share(output: Path, folder: Path) -> None:
    """Gradients are measured once: the other cells find them by their keys."""
    first = output / cell_name(RATES[0], EPOCHS[0]) / "run"
    for name in GRADIENTS:
        if (first / name).exists() and not (folder / "run" / name).exists():
            shutil.copytree(first / name, folder / "run" / name)


def write_results(output: Path) -> None:
    """Every cell that is there, as JSON and as one table."""
    found = {cell_name(rate, epochs): (rate, epochs, Comparison.load(path)) for epochs in sorted(EPOCHS)
             for rate in (*RATES, BELOW)
             if (path := output / cell_name(rate, epochs) / "run" / "compare.json").exists()}
    cells = {name: {"learning_rate": rate, "epochs": epochs, "seeds": len(c.seeds),
                    "runs": [r.model_dump(exclude={"made_from"}) for r in c.runs],
                    "summary": [s.model_dump() for s in c.summary], "verdict": c.verdict}
             for name, (rate, epochs, c) in found.items()}
    shares = decompose(output, found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "p3_regimes.json").write_text(
        json.dumps({"benchmark": "p3_regimes", "machine": machine(), "cells": cells, "shares": shares}, indent=1) + "\n")
    (RESULTS / "p3_regimes.md").write_text("\n".join([*table(found), "", *share_table(shares)]) + "\n")


def table(found: dict[str, tuple[float, float, Comparison]]) -> list[str]:
    """Mean loss by arm and place; in brackets the difference to joint and its 95 % interval over units."""
    lines = ["| learning rate | epochs | seeds | arm | held-out | transfer | retention | distance |", "|" + "---|" * 8]
    for rate, epochs, c in found.values():
        for arm in dict.fromkeys(s.arm for s in c.summary):
            places = []
            for place in PLACES:
                row = next(s for s in c.summary if (s.arm, s.place) == (arm, place))
                joint = next(s for s in c.summary if (s.arm, s.place) == ("joint", place)).loss
                gap = ("" if arm == "joint" or row.loss_low is None or row.loss_high is None else
                       f" ({row.loss - joint:+.3f}; {row.loss_low - joint:+.3f} to {row.loss_high - joint:+.3f})")
                places.append(f"{row.loss:.3f}{gap}")
            distance = np.mean([r.displacement for r in c.runs if r.arm == arm])
            lines.append(f"| {rate:g} | {epochs:g} | {len(c.seeds)} | {arm} | {' | '.join(places)} | {distance:.1f} |")
    return lines


def decompose(output: Path, found: dict[str, tuple[float, float, Comparison]]) -> list[dict[str, Any]]:
    """merit:2 - joint, taken apart, by cell and place: every difference paired over units, seeds averaged.

    near      joint pulled back to merit:2's distance - joint: what a shorter step alone does
    merging   random:4 - joint pulled back: what training in four parts and averaging does, at about one distance
    split     merit:2 - random:4: what the conflict-aware split does
    third     joint at a third of the learning rate - joint
    The first three add up to merit:2 - joint.
    """
    rows = []
    for name, (rate, epochs, c) in found.items():
        if rate == BELOW:
            continue
        folder = output / name / "run"
        below = output / cell_name(RATES[RATES.index(rate) + 1] if rate != RATES[-1] else BELOW, epochs) / "run"
        for place in PLACES:
            arms = {arm: _losses(folder, c, arm, place) for arm in ("joint", "joint_matched:merit:2", "random:4", "merit:2",
                                                                    "stratified:4", "joint_batch:4")}
            parts = {"near": arms["joint_matched:merit:2"] - arms["joint"],
                     "merging": arms["random:4"] - arms["joint_matched:merit:2"],
                     "split": arms["merit:2"] - arms["random:4"], "merit:2 - joint": arms["merit:2"] - arms["joint"],
                     "merit:2 - stratified:4": arms["merit:2"] - arms["stratified:4"],
                     "merit:2 - joint_batch:4": arms["merit:2"] - arms["joint_batch:4"]}
            if (below / "compare.json").exists():
                parts["third"] = _losses(below, Comparison.load(below / "compare.json"), "joint", place) - arms["joint"]
            for part, gaps in parts.items():
                interval = paired_interval(gaps.tolist(), place)
                rows.append({"learning_rate": rate, "epochs": epochs, "seeds": len(c.seeds), "place": place, "part": part,
                             "mean": float(gaps.mean()), "interval": interval})
    return rows


def _losses(folder: Path, comparison: Comparison, arm: str, place: Place) -> np.ndarray:
    """Loss of each unit, in name order, mean over seeds."""
    scores = [getattr(Evaluation.load(folder / r.evaluation), place) for r in comparison.runs if r.arm == arm]
    return np.array([np.mean([s[unit].loss for s in scores]) for unit in sorted(scores[0])])


def share_table(rows: list[dict[str, Any]]) -> list[str]:
    parts = list(dict.fromkeys(r["part"] for r in rows))
    lines = ["| learning rate | epochs | place | " + " | ".join(parts) + " |", "|" + "---|" * (3 + len(parts))]
    for key in dict.fromkeys((r["learning_rate"], r["epochs"], r["place"]) for r in rows):
        mine = {r["part"]: r for r in rows if (r["learning_rate"], r["epochs"], r["place"]) == key}
        cells = [f"{mine[p]['mean']:+.3f} ({mine[p]['interval'][0]:+.3f} to {mine[p]['interval'][1]:+.3f})" if p in mine else ""
                 for p in parts]
        lines.append(f"| {key[0]:g} | {key[1]:g} | {key[2]} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
