"""What do all pairs of 20 models of 86 million parameters cost, weight-only, beside the pairwise way?

    python benchmarks/mergeability_cost.py --work DIR                 20 checkpoints in float32: 7 GB, made and deleted

Ours: `weight_metrics` in a process of its own, from start to exit, forecast first. Naive: the definitions as they stand,
for one pair after the other: both models and the base are loaded, every matrix of both is decomposed in full
(`torch.linalg.svd`), the flattened task vectors are stacked and decomposed. In float32, as published, and in float64 to
compare the numbers. Pairs do not wait for each other, so as many run side by side as ours has threads, each on one. All
pairs' seconds from those of a few is an extrapolation, and is called so. Memory is the highest anonymous memory of one
process (sampled every 20 ms). On a machine that does other work, seconds of processor tell more than those of the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import acos, degrees, prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.mergeability.metrics import METRICS, PUBLISHED
from anabranch.mergeability.weights import weight_cost, weight_metrics
from machine import machine, record
from merge_speed import timed

BLOCKS, WIDTH, LOW = 12, 768, 64
THREADS = 2


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ViT-B/16 image encoder as CLIP has it: 86 million numbers, 50 matrices."""
    found: dict[str, tuple[int, ...]] = {
        "class_embedding": (WIDTH,), "conv1.weight": (WIDTH, 3, 16, 16), "ln_post.weight": (WIDTH,), "ln_pre.weight": (WIDTH,),
        "positional_embedding": (197, WIDTH), "proj": (WIDTH, 512)}
    for i in range(BLOCKS):
        at = f"resblocks.{i}."
        for name, rows, columns in (("attn.in_proj", 3 * WIDTH, WIDTH), ("attn.out_proj", WIDTH, WIDTH),
                                    ("mlp.c_fc", 4 * WIDTH, WIDTH), ("mlp.c_proj", WIDTH, 4 * WIDTH)):
            found |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
        found |= {f"{at}ln_{j}.{part}": (WIDTH,) for j in (1, 2) for part in ("weight", "bias")}
    return found


def build(folder: Path, count: int) -> tuple[Path, dict[str, Path]]:
    """The base's numbers are N(0, 0.02^2). A model's update: dense noise of 1e-4, and in matrices directions whose strength
    falls off as 1/rank, a quarter of them shared by all models. What is there already is kept."""
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(i)).mul_(0.02)
            for i, (name, shape) in enumerate(shapes().items())}
    for number in range(count + 1):
        path = folder / (f"model-{number:02d}" if number else "base")
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        ours = torch.Generator().manual_seed(10**6 + number)
        tensors = {}
        for i, (name, tensor) in enumerate(base.items()):
            shared = torch.Generator().manual_seed(10**5 + i)
            tensors[name] = tensor if number == 0 else tensor + _update(tensor.shape, ours, shared)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return folder / "base", {path.name: path for path in sorted(folder.glob("model-*"))}


def _update(shape: torch.Size, ours: torch.Generator, shared: torch.Generator) -> Tensor:
    found = torch.randn(shape, generator=ours).mul_(1e-4)
    if len(shape) == 2:
        left, right = (torch.cat([torch.randn(n, LOW // 4, generator=shared), torch.randn(n, 3 * LOW // 4, generator=ours)], 1)
                       for n in shape)
        found += (left * (5e-4 / (1 + torch.randperm(LOW, generator=ours)))) @ right.T
    return found


def naive(base: Path, one: Path, two: Path, dtype: torch.dtype) -> dict[str, float]:
    """The 18 weight-only metrics of one pair by their definitions."""
    loaded = [load_file(folder / "model.safetensors") for folder in (base, one, two)]
    us, vs = ({n: loaded[k][n].to(dtype) - loaded[0][n].to(dtype) for n in sorted(loaded[0])} for k in (1, 2))
    del loaded
    rows, ranks, weights = [], [], []
    for n in us:
        ranks.append(_rank(torch.stack([us[n].flatten(), vs[n].flatten()]))[0])
        weights.append(float(us[n].norm() + vs[n].norm()))
        if us[n].dim() == 2:
            (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(x, full_matrices=False) for x in (us[n], vs[n]))
            top, low = v1[:10] @ v2[:10].T, v1[-10:] @ v2[-10:].T
            p, q = s1[:100] / s1.sum(), s2[:100] / s2.sum()
            rows.append([float(x) for x in (
                top.norm() / 10**0.5, low.norm() / 10**0.5, (torch.linalg.svdvals(top) ** 2).mean(),
                (torch.linalg.svdvals(low) ** 2).mean(), p @ q / p.norm() / q.norm(), (u1[:, :10].T @ u2[:, :10]).norm() / 10)])
    u, v = (torch.cat([t.flatten() for t in x.values()]) for x in (us, vs))
    rank, s = _rank(torch.stack([u, v]))
    layer = sum(w * r for w, r in zip(weights, ranks, strict=True)) / sum(weights)
    cos, norms = float(u @ v / u.norm() / v.norm()), sorted((float(u.norm()), float(v.norm())))
    names = [n for n in PUBLISHED if METRICS[n].category == "subspace"]
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).mean(0).tolist(), strict=True)) | {
        "effective_rank": rank, "effective_rank_mergeability_score": 2 - rank, "stable_rank": float(s.sum() ** 2 / (s @ s)),
        "spectral_gap": float((s[0] - s[1]) / s[0]), "singular_value_ratio": float(s[1] / s[0]),
        "layerwise_effective_rank": layer, "layerwise_effective_rank_mergeability_score": 2 - layer,
        "task_vector_cosine_similarity": cos, "task_vector_l2_distance": float((u - v).norm()),
        "task_vector_dot_product": float(u @ v), "weight_space_angle": degrees(acos(max(-1.0, min(1.0, cos)))),
        "task_vector_magnitude_ratio": norms[0] / norms[1]}


def _rank(rows: Tensor) -> tuple[float, Tensor]:
    s = torch.linalg.svdvals(rows)
    p = s / s.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum())), s


def run(*arguments: str, threads: int) -> tuple[float, float, dict[str, Any]]:
    """(wall seconds, peak anonymous MB, what it found) of this file in a process of its own."""
    wall, peak, output = timed([sys.executable, __file__, *arguments], {"OMP_NUM_THREADS": str(threads)})
    return round(wall, 2), round(peak), json.loads(Path(output.strip().splitlines()[-1]).read_text())


def compare(work: Path, count: int, pairs: int) -> dict[str, Any]:
    """Ours once, the naive way on some pairs; seconds, memory, and how far the numbers are apart."""
    _, models = build(work, count)
    total = count * (count - 1) // 2
    figures: dict[str, Any] = {"models": count, "pairs": total, "parameters": sum(map(prod, shapes().values())),
                               "threads": THREADS, "load_before": os.getloadavg()}
    wall, peak, found = run("--ours", str(work), threads=1)
    figures["forecast"] = found.pop("forecast")
    figures["ours"] = {"wall_s": wall, "peak_mb": peak, "cpu_s": found.pop("cpu"), "measured_s": found.pop("seconds"),
                       "hashing_s": found.pop("hashing"), "load_after": os.getloadavg()}
    print(figures, flush=True)
    chosen = list(combinations(models, 2))[:: max(1, total // pairs)][:pairs]
    for dtype, together in (("float32", THREADS), ("float64", 1)):  # in float64 two pairs may be more than memory holds
        begun = time.perf_counter()
        with ThreadPoolExecutor(together) as pool:
            done = list(pool.map(lambda pair, dtype=dtype: run("--naive", str(work), *pair, dtype, threads=1), chosen))
        seconds = (time.perf_counter() - begun) * total / len(chosen)
        apart: dict[str, float] = {}
        cpu = [values.pop("cpu") for _, _, values in done]
        for (one, two), (_, _, values) in zip(chosen, done, strict=True):
            for name, value in values.items():
                apart[name] = max(apart.get(name, 0.0), abs(value - found[f"{one} {two}"][name]))
        figures[f"naive_{dtype}"] = {
            "runs": [{"pair": " ".join(pair), "wall_s": wall, "cpu_s": c, "peak_mb": peak}
                     for pair, c, (wall, peak, _) in zip(chosen, cpu, done, strict=True)],
            "processes_side_by_side": together, "extrapolated_to_all_pairs_s": round(seconds),
            "over_ours": round(seconds / figures["ours"]["wall_s"], 1),
            "cpu_over_ours": round(total * sum(cpu) / len(cpu) / figures["ours"]["cpu_s"], 1),
            "apart": {n: float(f"{v:.1e}") for n, v in apart.items()}, "load_after": os.getloadavg()}
        print(figures[f"naive_{dtype}"], flush=True)
    return figures


def ours(work: Path) -> dict[str, Any]:
    """Forecast, then measure. Every pair's metrics, and what it took."""
    folders = {path.name: path for path in sorted(work.glob("model-*"))}
    cost = weight_cost(work / "base", folders, threads=THREADS)
    begun, hashed = time.perf_counter(), [0.0]

    def progress(what: str, done: int, total: int) -> None:
        if what == "hashing":
            hashed[0] = time.perf_counter() - begun

    found = weight_metrics(work / "base", folders, threads=THREADS, journal=work / "journal", progress=progress)
    return {" ".join(pair): values for pair, values in found.pairs.items()} | {
        "seconds": found.seconds, "hashing": round(hashed[0], 2), "cpu": round(time.process_time(), 1),
        "forecast": {"seconds": round(cost.seconds, 1), "peak_mb": round(cost.peak / 1e6), "read_gb": round(cost.read / 1e9, 2),
                     "checkpoints_gb": round(cost.size / 1e9, 2), "decompositions": cost.decompositions}}


def hand_over(path: Path, found: dict[str, Any]) -> None:
    """By a file whose name is printed: a pipe that nobody reads yet holds less than 190 pairs."""
    path.write_text(json.dumps(found))
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder with 8 GB free; a folder is made in it, and deleted")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=2, help="pairs that the naive way is timed on")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--naive", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        hand_over(args.ours / "ours.json", ours(args.ours))
    elif args.naive:
        work, one, two, dtype = args.naive
        hand_over(Path(work) / f"{one} {two} {dtype}.json",
                  naive(*(Path(work) / name for name in ("base", one, two)), getattr(torch, dtype))
                  | {"cpu": round(time.process_time(), 1)})
    else:
        folder = args.work / "mergeability-cost"
        try:
            figures = compare(folder, args.models, args.pairs)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if args.models == 20:
            record("mergeability_cost", figures)
        else:
            print(json.dumps({"machine": machine(), **figures}, indent=1))


if __name__ == "__main__":
    main()
