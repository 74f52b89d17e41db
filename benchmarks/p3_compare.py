"""Did the split pay on a real instruction mixture? The paper's table on the P3 sample, at three places, over seeds.

    python benchmarks/p3_compare.py --data P3 --model P3_BASE --output runs/p3 [--seeds 3]

227 usable units of 27 datasets are the mixture, 7 other datasets are transfer, the prompts of the mixture's held-out rows
are retention. Each arm sees the same 12 % of at most 60 rows a unit. Resumable; the result is written to
results/p3_compare.json and, as a table, results/p3_compare.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from anabranch.artifacts import Conflict, MergeManifest
from anabranch.compare import DEFAULT, parse_arms, run_comparison
from anabranch.recipe import load_recipe
from anabranch.report import comparison_markdown, summary_picture, write_report
from anabranch.run import open_run
from machine import RESULTS, machine
from p3 import write_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/p3"))
    parser.add_argument("--methods", default=DEFAULT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2)
    args = parser.parse_args()
    output = args.output.resolve()
    recipe = write_recipe(
        output / "recipe.yaml", args.data.resolve(), args.model.resolve(), output / "run",
        mixture={"epochs": 0.12, "max_samples": 60, "max_held_out": 4}, gradients={"calibration_samples": 40},
        train={"per_device_train_batch_size": 8}, launch={"max_parallel": args.parallel, "threads": 1})
    begun = time.monotonic()
    run = open_run(load_recipe(recipe), progress=_tell(begun))
    comparison = run_comparison(run, parse_arms(args.methods), range(args.seeds))
    page = write_report(run.folder)
    conflict = Conflict.load(run.folder / "conflict" / "conflict.json")
    text = comparison_markdown(comparison)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "p3_compare.md").write_text(text)
    summary_picture(run.folder, output / "p3.png")
    figures = {
        "benchmark": "p3_compare", "machine": machine(), "seconds_of_this_call": round(time.monotonic() - begun),
        "recipe": {k: v for k, v in json.loads((run.folder / "recipe.json").read_text())["recipe"].items()
                   if k in ("train", "gradients", "seed")},
        "mixture": {"units": len(run.mixture.units), "tokens": run.mixture.tokens,
                    "transfer_units": len(run.mixture.transfer), "retention_units": len(run.mixture.retention)},
        "conflict": {"explained": conflict.explained[:4], "cosine_min": conflict.cosine_min,
                     "cosine_mean": conflict.cosine_mean, "negative_share": conflict.negative_share,
                     "norm_cv": conflict.norm_cv, "unreliable": len(conflict.unreliable),
                     "spectral_tests": [t.model_dump() for t in conflict.spectral_tests]},
        "branch_displacements": _branch_displacements(run.folder),
        "runs": [r.model_dump() for r in comparison.runs], "summary": [s.model_dump() for s in comparison.summary],
        "verdict": comparison.verdict}
    (RESULTS / "p3_compare.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)
    print(f"report: {page}")


def _branch_displacements(run: Path) -> dict[str, list[float]]:
    manifests = sorted((run / "compare").glob("*/seed-*/merged/manifest.json"))
    return {"/".join(p.parts[-4:-2]): MergeManifest.load(p).branch_displacements for p in manifests}


def _tell(begun: float):  # type: ignore[no-untyped-def]
    last = [0.0]

    def progress(stage: str, what: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"{time.monotonic() - begun:6.0f} s  {stage} {done}/{total} {what}", flush=True)

    return progress


if __name__ == "__main__":
    main()
