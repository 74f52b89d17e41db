"""How true are sketched cosines? Fold sketches (2^12, 2^14, 2^16) and the paper's stride 5 against full gradients.

    python benchmarks/sketch_fidelity.py --data P3 --model P3_BASE [--units 200]

One backward pass gives each unit's full gradient; every sketch is made from that same vector, so nothing but the
sketch differs. Figures over all pairs of units.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from anabranch.artifacts import Mixture
from anabranch.gradients import Sketch, calibration_halves, half_gradient
from anabranch.mixture import build_mixture
from anabranch.model import can_select, keep_buffers, load_model, load_tokenizer, select_trainable
from anabranch.recipe import GradientSection, Recipe, load_recipe
from anabranch.rows import load_unit
from machine import record
from p3 import write_recipe


def full_gradients(recipe: Recipe, mixture: Mixture, folder: Path, count: int, samples: int) -> tuple[np.ndarray, dict]:
    model = load_model(Path(recipe.model.path))
    parameters = select_trainable(model, recipe.model)
    sketch, select = Sketch(parameters, GradientSection(sketch="full"), 0), can_select(model)
    rows_of = np.empty((min(count, len(mixture.units)), sketch.size), dtype=np.float32)
    for i, unit in enumerate(mixture.units[:: max(1, len(mixture.units) // count)][: len(rows_of)]):
        rows = load_unit(folder / unit.file, "train")
        chosen = np.sort(np.concatenate(calibration_halves(rows, unit.name, samples, 0)))
        rows_of[i], _ = half_gradient(model, rows, chosen, parameters, sketch, 8192, select=select)
    return rows_of, parameters


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(unit), 1)]


def sketched(vectors: np.ndarray, parameters: dict, section: GradientSection, seed: int) -> np.ndarray:
    sketch, out = Sketch(parameters, section, seed), []
    for vector in torch.from_numpy(vectors):
        sketch.total.zero_()
        offset = 0
        for name, parameter in parameters.items():
            sketch.add(name, vector[offset : offset + parameter.numel()])
            offset += parameter.numel()
        out.append(sketch.total.numpy().copy())
    return np.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--units", type=int, default=110, help="spread over the mixture")
    parser.add_argument("--samples", type=int, default=40)
    args = parser.parse_args()
    keep_buffers()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(write_recipe(Path(folder) / "recipe.yaml", args.data.resolve(), args.model.resolve(),
                                          Path(folder) / "run", evaluate={"retention": "none", "transfer": []}))
        mixture = build_mixture(recipe, load_tokenizer(args.model), Path(folder) / "mixture", base_hash="benchmark")
        vectors, parameters = full_gradients(recipe, mixture, Path(folder) / "mixture", args.units, args.samples)
    truth, table = cosines(vectors), []
    kinds = [("fold", size, seed) for size in (2**12, 2**14, 2**16) for seed in range(3)] + [("stride", 5, 0)]
    for kind, size, seed in kinds:
        section = GradientSection(sketch=kind, size=size) if kind == "fold" else GradientSection(sketch=kind, stride=size)
        short = sketched(vectors, parameters, section, seed)
        found = cosines(short)
        table.append({"sketch": kind, "size": size, "seed": seed, "numbers": short.shape[1],
                      "bytes_per_unit": short.shape[1] * 4, "pearson": float(stats.pearsonr(truth, found).statistic),
                      "spearman": float(stats.spearmanr(truth, found).statistic),
                      "rmse": float(np.sqrt(np.mean((truth - found) ** 2)))})
    record("sketch_fidelity", {"units": len(vectors), "entries": vectors.shape[1], "full_bytes_per_unit": vectors.shape[1] * 4,
                               "calibration_samples": args.samples, "cosine_mean": float(truth.mean()),
                               "cosine_min": float(truth.min()), "table": table})


if __name__ == "__main__":
    main()
