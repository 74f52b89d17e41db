"""What does sketching cost? The gradient stage against bare forward + backward on the same batches, interleaved.

    python benchmarks/gradient_cost.py --data P3 --model P3_BASE
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from anabranch.gradients import Sketch, calibration_halves, half_gradient
from anabranch.mixture import build_mixture
from anabranch.model import (
    batches,
    can_select,
    device,
    keep_buffers,
    load_model,
    load_tokenizer,
    response_losses,
    select_trainable,
)
from anabranch.recipe import GradientSection, load_recipe
from anabranch.rows import load_unit
from machine import peak_mb, record
from p3 import write_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    keep_buffers()
    runs: dict[str, list[float]] = {"bare": [], "sketched": []}
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(write_recipe(Path(folder) / "recipe.yaml", args.data.resolve(), args.model.resolve(),
                                          Path(folder) / "run", evaluate={"retention": "none", "transfer": []}))
        mixture = build_mixture(recipe, load_tokenizer(args.model), Path(folder) / "mixture", base_hash="benchmark")
        model = load_model(args.model)
        parameters, select = select_trainable(model, recipe.model), can_select(model)
        sketch = Sketch(parameters, GradientSection(), 0)
        units = mixture.units[:: max(1, len(mixture.units) // args.units)][: args.units]
        loaded = [(rows, calibration_halves(rows, u.name, 60, 0)) for u in units
                  for rows in [load_unit(Path(folder) / "mixture" / u.file, "train")]]

        def bare() -> None:
            for rows, halves in loaded:
                for half in halves:
                    for batch in batches(rows, half, 8192, device()):
                        losses, _ = response_losses(model, batch, select=select)
                        losses.sum().backward()
                        model.zero_grad(set_to_none=True)

        def with_sketch() -> None:
            for rows, halves in loaded:
                for half in halves:
                    half_gradient(model, rows, half, parameters, sketch, 8192, select=select)

        for round_ in range(args.rounds + 1):  # the first round warms up
            for name, work in (("bare", bare), ("sketched", with_sketch)):
                start = time.perf_counter()
                work()
                if round_:
                    runs[name].append(time.perf_counter() - start)
    ratios = [s / b for s, b in zip(runs["sketched"], runs["bare"], strict=True)]
    record("gradient_cost", {"seconds": runs, "ratio_median": float(np.median(ratios)), "ratios": ratios,
                             "units": len(units), "peak_mb": peak_mb()})


if __name__ == "__main__":
    main()
