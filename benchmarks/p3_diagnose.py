"""All diagnostics on a MERIT-2D run and joint training on the P3 sample, beside the paper's figures.

    python benchmarks/p3_diagnose.py --data P3 --model P3_BASE --output runs/diagnose

The mixture of p3_regimes (40 units, 24 rows each), learning rate 9e-4. Runs of 0.5, 1 and 3 epochs give displacement and
training against held-out loss by epoch; all other diagnostics are of the longest. Resumable. Writes results/p3_diagnose.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from anabranch.compare import parse_arms, run_comparison
from anabranch.diagnose.artifacts import KINDS
from anabranch.diagnose.feed_gradients import measure_calibration
from anabranch.diagnose.run import DIAGNOSTICS, run_diagnostics, subject_of_run
from anabranch.diagnose.subject import Settings, Subject, live_model
from anabranch.model import select_trainable
from anabranch.recipe import load_recipe
from anabranch.report.diagnostic_figures import draw_picture
from anabranch.run import Run, mixture_stage, open_run, run_stages
from machine import RESULTS, machine
from p3 import short_units, write_recipe

EPOCHS = (0.5, 1.0, 3.0)
BY_EPOCH = ["displacement", "generalization"]
SIZES = (10, 25, 50, 75, 100, 150)
# arXiv 2606.01717, Qwen2.5-VL-3B, K = 4; see docs/story.md for what each means.
PAPER = {
    "barriers": "all 10 are 0.0",
    "displacement_joint_merged": {"0.5": [13.73, 5.65], "1": [19.73, 7.50], "2": [28.15, 10.11], "6": [34.61, 11.87]},
    "training_loss_joint_merged": {"0.5": [0.709, 1.198], "1": [0.560, 1.172], "2": [0.370, 1.167], "3": [0.205, 1.202],
                                   "6": [0.064, 1.330]},
    "perturbation": "merged flatter than joint at sigma 0.01, 0.05 and 0.1",
    "alignment": {"largest_cosine": 0.30, "leading_angle": 69.5, "z": 15386, "parameters": 3e9},
    "calibration_cosine": {"50": .683, "100": .762, "150": .814, "200": .847, "300": .891, "400": .920, "500": .940,
                           "700": .968},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/diagnose"))
    parser.add_argument("--only", default=",".join(DIAGNOSTICS))
    args = parser.parse_args()
    output, begun = args.output.resolve(), time.monotonic()
    sources, transfer = short_units(args.data.resolve(), output / "data")
    figures: dict[str, Any] = {"benchmark": "p3_diagnose", "machine": machine(), "paper": PAPER, "by_epoch": {}}
    for epochs in EPOCHS:
        run = _trained(output, args, sources, transfer, epochs)
        names = BY_EPOCH if epochs != EPOCHS[-1] else args.only.split(",")
        subject = subject_of_run(run, Settings())
        run_diagnostics(subject, run.folder / "diagnostics", Settings(), only=names)
        found = {n: KINDS[n].load(run.folder / "diagnostics" / f"{n}.json").model_dump(mode="json", exclude={"made_from"})
                 for n in names if (run.folder / "diagnostics" / f"{n}.json").exists()}
        if epochs == EPOCHS[-1]:
            figures["diagnostics"] = found
        figures["by_epoch"][f"{epochs:g}"] = {n: found[n] for n in BY_EPOCH if n in found}
        if epochs == EPOCHS[-1] and "calibration" in names:
            figures["diagnostics"]["calibration"] = _calibrated(output, args, sources, transfer)
        figures["seconds_of_this_call"] = round(time.monotonic() - begun)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "p3_diagnose.json").write_text(json.dumps(figures, indent=1) + "\n")


def _calibrated(output: Path, args: argparse.Namespace, sources: list[dict], transfer: list[dict]) -> dict[str, Any]:
    """On all short rows of the same units: the runs above train on 24 a unit, too few to ask how many are needed."""
    folder = output / "calibration"
    write_recipe(folder / "recipe.yaml", args.data.resolve(), args.model.resolve(), folder / "run",
                 mixture={"sources": sources, "max_samples": 400, "max_held_out": 8, "max_length": 256},
                 evaluate={"transfer": transfer})
    run = open_run(load_recipe(folder / "recipe.yaml"))
    mixture_stage(run)
    live = live_model({"base": run.base}, trainable=lambda model: list(select_trainable(model, run.recipe.model)))
    subject = Subject(live, ["base"], [], [], {}, {"base": run.base_hash}, run)
    begun = time.monotonic()
    found = measure_calibration(subject, Settings(sizes=SIZES))
    draw_picture(found, folder / "calibration.png")
    for line in found.said:
        print(f"  {line}")
    return {**found.model_dump(mode="json"), "passes": live.passes, "seconds": round(time.monotonic() - begun, 1)}


def _trained(output: Path, args: argparse.Namespace, sources: list[dict], transfer: list[dict], epochs: float) -> Run:
    """MERIT in four groups, trained, merged and evaluated; joint training on the same rows beside it."""
    folder, first = output / f"epochs-{epochs:g}", output / f"epochs-{EPOCHS[0]:g}" / "run"
    write_recipe(
        folder / "recipe.yaml", args.data.resolve(), args.model.resolve(), folder / "run",
        mixture={"sources": sources, "epochs": epochs, "max_samples": 24, "max_held_out": 8, "max_length": 256},
        gradients={"calibration_samples": 24}, train={"per_device_train_batch_size": 8, "learning_rate": 9e-4},
        evaluate={"transfer": transfer, "generate_samples": 0, "max_samples": 8}, launch={"max_parallel": 1, "threads": 1})
    for name in ("mixture", "gradients", "conflict"):
        if (first / name).exists() and not (folder / "run" / name).exists():
            shutil.copytree(first / name, folder / "run" / name)
    run = open_run(load_recipe(folder / "recipe.yaml"))
    run_stages(run, until="evaluate")
    run_comparison(run, parse_arms("joint"), [0])
    return run


if __name__ == "__main__":
    main()
