"""Adapters: what extraction and merging keep, and what they cost. One command per question, each writes results/lora_*.json.

    python benchmarks/lora.py extract-loss  --branches RUN/branches --mixture RUN/mixture --base MODEL --work DIR
    python benchmarks/lora.py merge-loss    --branches RUN/branches --mixture RUN/mixture --base MODEL --work DIR
    python benchmarks/lora.py extract-cost  --work DIR          1.1 B parameters, 4.5 GB in DIR, some minutes
    python benchmarks/lora.py merge-cost    --work DIR

RUN is a run of full fine-tunes for extract-loss (branches/K/model) and of adapters for merge-loss (branches/K/adapter).
Loss: mean over the mixture's units of the held-out loss per response token. Memory: the highest anonymous memory of a process
of its own, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from anabranch.artifacts import Mixture
from anabranch.lora.apply import apply
from anabranch.lora.combine import merge_adapters
from anabranch.lora.extract import extract
from anabranch.merge import METHODS
from anabranch.model import batches, can_select, device, load_model, response_losses
from anabranch.rows import load_unit
from llama import build
from machine import RESULTS, record
from merge_speed import timed

RANKS = (1, 2, 4, 8, 16, 32, 64, 192)
BATCH = 8192
# Modules of a 1.1B Llama in a merge of adapters: (rows, columns).
SHAPES = {"q": (2048, 2048), "gate": (5632, 2048)}
QUIET = {"OMP_NUM_THREADS": "1"}


class Scorer:
    """Held-out loss of models, over all units or those of one group of the run's plan."""

    def __init__(self, mixture: Path, units: int | None, group: int | None = None) -> None:
        listed = [unit for unit in Mixture.load(mixture / "mixture.json").units if unit.held_out_rows]
        if group is not None:
            plan = json.loads((mixture.parent / "plan.json").read_text())
            own = {one["unit"] for one in plan["units"] if one["group"] == group}
            listed = [unit for unit in listed if unit.name in own]
        step = max(1, len(listed) // units) if units else 1
        self.rows = [load_unit(mixture / unit.file, "held_out") for unit in listed[::step]]

    def __call__(self, model: Any) -> float:
        losses = []
        select = can_select(model)
        with torch.no_grad():
            for rows in self.rows:
                total, count = 0.0, 0
                for batch in batches(rows, np.arange(len(rows.lengths)), BATCH, device()):
                    loss, _ = response_losses(model, batch, select=select)
                    total, count = total + float(loss.double().sum()), count + loss.numel()
                losses.append(total / max(count, 1))
        return round(float(np.mean(losses)), 5)

    def folder(self, path: Path) -> float:
        return self(load_model(path))


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(path.with_name(path.name + ".factors"), ignore_errors=True)
    return path


def table(title: str, columns: list[str], rows: list[list[Any]]) -> list[str]:
    return [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
            *("| " + " | ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row) + " |" for row in rows), ""]


def write(name: str, figures: dict[str, Any], lines: list[str]) -> None:
    record(name, figures)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


# --- extraction: loss by rank ---


def extract_loss(given: argparse.Namespace) -> None:
    """Round trip at full rank; kept energy and held-out loss by rank, energy and budget, of every branch."""
    branches = sorted((p for p in given.branches.iterdir() if (p / "model").is_dir()), key=lambda p: int(p.name))[:given.most]
    figures: dict[str, Any] = {"branches": {}}
    lines = ["Held-out loss of each branch on the units that it was trained on.", ""]
    for branch in branches:
        score = Scorer(given.mixture, given.units, int(branch.name))
        start = score.folder(given.base)
        tuned = score.folder(branch / "model")
        rows, wishes = [], [("rank", {"rank": r}) for r in RANKS] + [("energy 0.95", {"energy": 0.95}), ("budget", {})]
        for label, wish in wishes:
            if label == "budget":  # as many parameters as rank 8 everywhere
                wish = {"budget": next(r["parameters"] for r in rows if r["asked"] == "rank 8")}
            out = fresh(given.work / "adapter")
            manifest = extract(branch / "model", given.base, out, dtype="float32", **wish)
            apply(given.base, out, fresh(given.work / "applied"))
            rows.append({"asked": label if label != "rank" else "rank "
                                                                f"{wish['rank']}", "loss": score.folder(given.work / "applied"),
                         "kept_energy": manifest.report["kept_energy"], "relative_error": manifest.report["relative_error"],
                         "parameters": manifest.report["parameters"], "ranks": manifest.report["ranks"]})
        full = round_trip(branch / "model", given.base, given.work)
        figures["branches"][branch.name] = {"units": len(score.rows), "base_loss": start, "loss": tuned, "rows": rows,
                                            "round_trip": full}
        lines += [f"Branch {branch.name}, {len(score.rows)} units: held-out loss {tuned}, the base's {start}. Full rank, "
                  f"applied: {json.dumps(full)}", ""]
        lines += table(f"Branch {branch.name}", ["asked", "parameters", "ranks", "kept energy", "loss", "of the gain"], [
            [r["asked"], r["parameters"], "-".join(map(str, r["ranks"])), r["kept_energy"], r["loss"],
             round((start - r["loss"]) / (start - tuned), 4) if start != tuned else 0.0] for r in rows])
    write("lora_extract_loss", figures, lines)


def round_trip(tuned: Path, base: Path, work: Path) -> dict[str, Any]:
    """The model in bfloat16, extracted at full rank and applied: numbers that differ, for factors of either dtype."""
    low = {}
    for name, folder in (("tuned", tuned), ("base", base)):
        low[name] = fresh(work / f"bf16-{name}")
        low[name].mkdir(parents=True)
        shutil.copy(folder / "config.json", low[name])
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()},
                  low[name] / "model.safetensors")
    result: dict[str, Any] = {}
    wanted = load_file(low["tuned"] / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        extract(low["tuned"], low["base"], fresh(work / "full"), rank=10**6, dtype=dtype)
        apply(low["base"], work / "full", fresh(work / "again"))
        got = load_file(work / "again" / "model.safetensors")
        units = [(got[k].float() - v.float()).abs() / (v.float().abs().clamp(min=1e-30).log2().floor().exp2() * 2**-7)
                 for k, v in wanted.items()]
        result[dtype] = {"numbers": sum(v.numel() for v in wanted.values()),
                         "differing": sum(int((got[k] != v).sum()) for k, v in wanted.items()),
                         "more_than_one_unit_in_the_last_place": sum(int((u > 1.001).sum()) for u in units)}
    return result


# --- merging: loss ---


def merge_loss(given: argparse.Namespace) -> None:
    """Held-out loss of merged adapters: every method of ours, and PEFT's linear, cat and svd, at equal rank."""
    score = Scorer(given.mixture, given.units)
    folders = sorted((p / "adapter" for p in given.branches.iterdir() if (p / "adapter").is_dir()),
                     key=lambda p: int(p.parent.name))
    rank = json.loads((folders[0] / "adapter_config.json").read_text())["r"]
    weights = [1 / len(folders)] * len(folders)
    rows = [{"merge": "base", "rank": 0, "loss": score.folder(given.base)}]

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)

    for i, folder in enumerate(folders):
        apply(given.base, folder, fresh(given.work / "applied"))
        tell({"merge": f"adapter {i}", "rank": rank, "loss": score.folder(given.work / "applied")})
    scaled = {"weight": 1.0}
    asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("task_arithmetic", {"weight": weights[0]}, {}), ("task_arithmetic", {"weight": 0.5}, {}),
        ("ties", scaled | {"density": 0.5}, {}), ("dare_linear", {"weight": weights[0], "density": 0.5}, {}),
        ("tsv_m", scaled, {}), ("iso_c", {"weight": weights[0]}, {}), ("iso_cts", {"weight": weights[0]}, {})]
    spaces_ = {"ties": ("dense", "core", "compressed"), "dare_linear": ("dense",)}
    for method, each, overall in asked:
        for space in spaces_.get(method, ("core",)):
            for cut in ([rank] if space == "compressed" else [rank, rank * len(folders)]):
                config = {"merge_method": method, "models": [{"model": str(f), "parameters": each} for f in folders],
                          "parameters": overall, "rank": cut, "space": space, "dtype": "float32", "base_model": str(given.base)}
                begun = time.perf_counter()
                manifest = merge_adapters(config, fresh(given.work / "merged"))
                seconds = time.perf_counter() - begun
                apply(given.base, given.work / "merged", fresh(given.work / "applied"))
                tell({"merge": f"{method} {each} {space}", "rank": cut, "loss": score.folder(given.work / "applied"),
                      "kept_energy": manifest.report["kept_energy"], "seconds": round(seconds, 2)})
    tell(_peft_linear(given, folders, weights, rank, score))
    for kind, cut in (("linear", rank), ("svd", rank), ("cat", rank * len(folders)), ("ties", rank)):
        begun = time.perf_counter()
        model = peft_merge(given.base, folders, weights if kind != "ties" else [1.0] * len(folders), kind, rank)
        seconds = time.perf_counter() - begun
        tell({"merge": f"PEFT {kind}", "rank": cut, "loss": score(model), "seconds": round(seconds, 2)})
    lines = table(f"{len(folders)} adapters of rank {rank}", ["merge", "rank", "loss", "kept energy", "s"], [
        [r["merge"], r["rank"], r["loss"], r.get("kept_energy", ""), r.get("seconds", "")] for r in rows])
    write("lora_merge_loss", {"units": len(score.rows), "rank": rank, "rows": rows}, lines)


def _peft_linear(given: argparse.Namespace, folders: list[Path], weights: list[float], rank: int,
                 score: Scorer) -> dict[str, Any]:
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, weights, strict=True)]
    manifest = merge_adapters({"merge_method": "peft_linear", "models": models}, fresh(given.work / "merged"))
    apply(given.base, given.work / "merged", fresh(given.work / "applied"))
    return {"merge": "peft_linear (ours)", "rank": rank, "loss": score.folder(given.work / "applied"),
            "wrong": manifest.report["wrong"]}


def peft_merge(base: Path, folders: list[Path], weights: list[float], kind: str, rank: int) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_model(base), str(folders[0]), adapter_name="0")
        for i, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=str(i))
        more = {"svd_rank": rank} if kind == "svd" else {"density": 0.5} if kind == "ties" else {}
        model.add_weighted_adapter([str(i) for i in range(len(folders))], weights, "new", combination_type=kind, **more)
        model.set_adapter("new")
        return model.merge_and_unload(adapter_names=["new"]).eval()


# --- cost ---


def extract_cost(given: argparse.Namespace) -> None:
    """Wall time and memory of extractions from a synthetic 1.1B model in bfloat16."""
    base, (tuned,) = build(given.work / "model", given.size, 1)
    rows = []
    for wish in given.wishes or ["--rank 16", "--rank 64"]:
        out = fresh(given.work / "extracted")
        command = [
            sys.executable, "-c", "from anabranch import cli_lora; cli_lora.app()", "extract", str(tuned), str(base), str(out),
            *wish.split(), "--threads", str(given.threads), "--json", "--quiet"]
        seconds, peak, told = timed(command, QUIET)
        done = json.loads(told.strip().splitlines()[-1])
        rows.append({"wish": wish, "threads": given.threads, "wall_s": round(seconds, 1), "peak_anonymous_mb": round(peak),
                     "kept_energy": done["kept_energy"], "parameters": done["parameters"]})
        print(rows[-1], flush=True)
    largest, embedding = 4 * 5632 * 2048 / 1e6, 4 * 32000 * 2048 / 1e6
    lines = table(f"{given.size}, bfloat16", ["asked", "threads", "wall s", "peak anonymous MB", "kept energy"], [
        [r["wish"], r["threads"], r["wall_s"], r["peak_anonymous_mb"], r["kept_energy"]] for r in rows])
    lines += [f"The largest matrix that is decomposed is {largest:.0f} MB in float32, the embeddings, saved whole, "
              f"{embedding:.0f} MB; the libraries take 290 MB. The difference is noise (N(0, 0.001^2)), the hardest to "
              "compress."]
    write("lora_extract_cost", {"size": given.size, "largest_matrix_mb": round(largest), "rows": rows}, lines)


def merge_cost(given: argparse.Namespace) -> None:
    """One module of each shape, three adapters of rank 16: the joint core space beside dense SVD. Errors against it."""
    rows = []
    for method in ("task_arithmetic", "tsv_m", "iso_c", "iso_cts", "ties"):
        for shape in SHAPES:
            figures = {}
            for way in ("ours", "dense"):
                command = [sys.executable, __file__, "one-module", "--method", method, "--shape", shape, "--way", way,
                           "--work", str(given.work)]
                _, peak, told = timed(command, QUIET)
                figures[way] = {"seconds": json.loads(told.strip().splitlines()[-1])["seconds"], "peak_mb": round(peak)}
            ours, dense = (np.load(given.work / f"{method}-{shape}-{way}.npy") for way in ("ours", "dense"))
            apart = float(np.abs(ours - dense).max() / np.abs(dense).max())
            rows.append({"method": method, "shape": list(SHAPES[shape]), "apart": apart, **figures})
            print(rows[-1], flush=True)
    lines = table("Three adapters of rank 16, one module; rank 48, the sum of theirs (ties, of full rank, is cut to it)", [
        "method", "shape", "ours s", "dense s", "ours MB", "dense MB", "largest difference / largest number"], [
        [r["method"], "x".join(map(str, r["shape"])), r["ours"]["seconds"], r["dense"]["seconds"], r["ours"]["peak_mb"],
         r["dense"]["peak_mb"], r["apart"]] for r in rows])
    write("lora_merge_cost", {"rows": rows}, lines)


def one_module(given: argparse.Namespace) -> None:
    """The merged change of one module, by adapters, or by dense matrices and numpy's SVD; written to a file."""
    rows, columns = SHAPES[given.shape]
    rng = np.random.default_rng(0)
    factors = [((rng.standard_normal((rows, 16)) * 0.02).astype(np.float32),
                rng.standard_normal((16, columns)).astype(np.float32)) for _ in range(3)]
    each = {"weight": 0.4} | ({"density": 0.5} if given.method == "ties" else {})
    begun = time.perf_counter()
    if given.way == "ours":
        seconds, result = _by_adapters(given, factors, each)
    else:
        torch.set_num_threads(1)
        changes = torch.from_numpy(np.stack([b @ a for b, a in factors]))
        more = {"density": 0.5} if given.method == "ties" else {}
        merged = METHODS[given.method].function(changes, torch.zeros(rows, columns), torch.full((3,), 0.4), **more)
        u, s, vt = np.linalg.svd(merged.numpy(), full_matrices=False)
        result, seconds = (u[:, :48] * s[:48]) @ vt[:48], time.perf_counter() - begun
    np.save(given.work / f"{given.method}-{given.shape}-{given.way}.npy", result)
    print(json.dumps({"seconds": round(seconds, 3)}))


def _by_adapters(given: argparse.Namespace, factors: list[tuple[np.ndarray, np.ndarray]],
                 each: Mapping[str, float]) -> tuple[float, np.ndarray]:
    folders = []
    for i, (b, a) in enumerate(factors):
        folder = fresh(given.work / f"one-{i}")
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(
            {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["p"]}))
        save_file({"base_model.model.m.p.lora_A.weight": torch.from_numpy(a), "base_model.model.m.p.lora_B.weight":
                   torch.from_numpy(b)}, folder / "adapter_model.safetensors")
        folders.append(folder)
    out = fresh(given.work / "one-out")
    models = [{"model": str(f), "parameters": dict(each)} for f in folders]
    config = {"merge_method": given.method, "models": models, "rank": 48, "dialect": "native"}
    begun = time.perf_counter()
    merge_adapters(yaml.safe_load(yaml.safe_dump(config)), out, threads=1)
    seconds = time.perf_counter() - begun
    state = load_file(out / "adapter_model.safetensors")
    return seconds, (state["base_model.model.m.p.lora_B.weight"] @ state["base_model.model.m.p.lora_A.weight"]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    every: dict[str, Callable[[argparse.Namespace], None]] = {
        "extract-loss": extract_loss, "merge-loss": merge_loss, "extract-cost": extract_cost, "merge-cost": merge_cost,
        "one-module": one_module}
    for name, function in every.items():
        one = commands.add_parser(name)
        one.set_defaults(function=function)
        one.add_argument("--work", type=Path, required=True)
        if name.endswith("-loss"):
            for option in ("--branches", "--mixture", "--base"):
                one.add_argument(option, type=Path, required=True)
            one.add_argument("--units", type=int, help="score that many units, evenly chosen; all by default")
            one.add_argument("--most", type=int, default=4, help="branches")
        if name == "extract-cost":
            one.add_argument("--size", default="1.1b")
            one.add_argument("--threads", type=int, default=1)
            one.add_argument("--wishes", nargs="*", help="such as '--rank 64'")
        if name == "one-module":
            for option in ("--method", "--shape", "--way"):
                one.add_argument(option, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    given.function(given)


if __name__ == "__main__":
    main()
