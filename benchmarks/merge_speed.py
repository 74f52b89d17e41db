"""How far is a merge from the floor, reading its inputs and writing its result? And how far is the peer?

    python benchmarks/merge_speed.py --work DIR                       1.1 billion parameters, base and 3 branches: 9 GB
    python benchmarks/merge_speed.py --work DIR --growth              0.1, 0.3, 1.1 and 3 billion; 2 to 16 inputs
    python benchmarks/merge_speed.py --work DIR --spectral            methods that decompose matrices, 0.1 billion
    MERGEKIT_PYTHON=venv/bin/python python benchmarks/merge_speed.py --work DIR

For each method, `anabranch merge` in a process of its own, warm, the median of 3: wall time from start to exit, start of
interpreter and libraries included, and `merge`, the part of it from reading the config to the folder's appearance. The
floor moves the same bytes with the same calls, threads and block size, flushes the result to the disk as a merge does, and
computes nothing; it is measured before each method. Memory is the highest anonymous memory seen (sampled every 20 ms).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from llama import build
from machine import record

BLOCK = 1 << 19  # bytes: 2^18 numbers of two bytes, as the engine reads them
THREADS = 2
WEIGHTS = [0.5, 0.3, 0.2]


def configs(base: Path, branches: list[Path]) -> dict[str, dict[str, Any]]:
    """One config per method, in MergeKit's grammar; those it lacks are native."""
    def models(n: int, **parameters: Any) -> list[dict[str, Any]]:
        return [{"model": str(b), **({"parameters": {k: v[i] if isinstance(v, list) else v for k, v in parameters.items()}}
                                     if parameters else {})} for i, b in enumerate(branches[:n])]

    def config(method: str, n: int = 3, with_base: bool = True, top: dict[str, Any] | None = None,
               **each: Any) -> dict[str, Any]:
        return {"merge_method": method, "models": models(n, **each), **({"base_model": str(base)} if with_base else {}),
                **({"parameters": top} if top else {}), "dtype": "bfloat16"}

    half = {"density": 0.5}
    return {
        "passthrough": config("passthrough", 1, False),
        "linear": config("linear", 3, False, weight=WEIGHTS),
        "task_arithmetic": config("task_arithmetic", weight=WEIGHTS),
        "nearswap": config("nearswap", 1, top={"t": 0.001}),
        "ram": config("ram"),
        "slerp": config("slerp", 1, top={"t": 0.4}),
        "nuslerp": config("nuslerp", 2, weight=[0.6, 0.4]),
        "multislerp": config("multislerp", weight=WEIGHTS),
        "karcher": config("karcher", 3, False),
        "model_stock": config("model_stock"),
        "ties": config("ties", weight=WEIGHTS, **half),
        "dare_linear": config("dare_linear", weight=WEIGHTS, **half),
        "dare_ties": config("dare_ties", weight=WEIGHTS, **half),
        "breadcrumbs": config("breadcrumbs", weight=WEIGHTS, **half),
        "della": config("della", weight=WEIGHTS, **half),
        "sce": config("sce", top={"select_topk": 0.3}),
        "arcee_fusion": config("arcee_fusion", 1),
        "ties_global": config("ties_global", weight=WEIGHTS, **half)}


def spectral(base: Path, branches: list[Path]) -> dict[str, dict[str, Any]]:
    """Methods that decompose every matrix: bounded by eigenvalues and singular values in float64, not by bytes."""
    return {name: configs(base, branches)["ties"] | {
        "merge_method": name, "models": [{"model": str(b), "parameters": {"weight": w}}
                                         for b, w in zip(branches[:3], WEIGHTS, strict=True)]}
            for name in ("iso_c", "star", "tsv_m", "iso_cts")}


def floor(inputs: list[Path], out: Path) -> float:
    """Seconds to read all weight files of the inputs, side by side, and to write as much as the first one holds."""
    files = [sorted(folder.glob("*.safetensors")) for folder in inputs]
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    out.mkdir()
    sizes = [path.stat().st_size for path in files[0]]
    written = [os.open(out / path.name, os.O_CREAT | os.O_RDWR) for path in files[0]]
    for handle, size in zip(written, sizes, strict=True):
        os.ftruncate(handle, size)
    read = [[os.open(path, os.O_RDONLY) for path in of_input] for of_input in files]
    jobs = iter([(i, start) for i, size in enumerate(sizes) for start in range(0, size, 64 * BLOCK)])
    lock = threading.Lock()

    def work() -> None:
        buffers = [memoryview(bytearray(BLOCK)) for _ in inputs]
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            number, first = job
            for start in range(first, min(first + 64 * BLOCK, sizes[number]), BLOCK):
                count = min(BLOCK, sizes[number] - start)
                for handles, buffer in zip(read, buffers, strict=True):
                    os.preadv(handles[number], [buffer[:count]], start)
                os.pwrite(written[number], buffers[0][:count], start)

    workers = [threading.Thread(target=work) for _ in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for handle in written:
        os.fsync(handle)
    seconds = time.perf_counter() - begun
    for handle in [*written, *(h for handles in read for h in handles)]:
        os.close(handle)
    shutil.rmtree(out)
    return seconds


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """(wall seconds, peak anonymous MB, standard output) of a process. Raises where it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, **environment})
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with suppress(OSError, StopIteration):  # it may end just now
            lines = status.read_text().splitlines()
            peak = max(peak, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors[-2000:]}")
    return seconds, peak * 1024 / 1e6, output


def ours(config: dict[str, Any], work: Path) -> dict[str, float]:
    path, out = work / "config.yaml", work / "out"
    path.write_text(yaml.safe_dump(config))
    shutil.rmtree(out, ignore_errors=True)
    wall, peak, output = timed([sys.executable, "-m", "anabranch", "merge", str(path), str(out), "--threads", str(THREADS),
                                "--json"], {"OMP_NUM_THREADS": "1"})
    done = json.loads(output.strip().splitlines()[-1])
    return {"wall_s": round(wall, 3), "merge_s": done["seconds"], "peak_mb": round(peak)}


def theirs(config: dict[str, Any], work: Path) -> dict[str, float]:
    path, out = work / "config.yaml", work / "out"
    path.write_text(yaml.safe_dump(config))
    shutil.rmtree(out, ignore_errors=True)
    wall, peak, _ = timed([os.environ["MERGEKIT_PYTHON"], "-m", "mergekit.scripts.run_yaml", str(path), str(out)],
                          {"OMP_NUM_THREADS": str(THREADS)})
    return {"wall_s": round(wall, 3), "peak_mb": round(peak)}


def measure(name: str, config: dict[str, Any], work: Path, runs: int) -> dict[str, Any]:
    """Floor and merge by turns, `runs` times; medians and the raw figures."""
    inputs = [Path(m["model"]) for m in config["models"]] + ([Path(config["base_model"])] if "base_model" in config else [])
    floors, raw = [], []
    for _ in range(runs):
        floors.append(round(floor(inputs, work / "floor"), 3))
        raw.append(ours(config, work))
    base = statistics.median(floors)
    wall, merge = (statistics.median(r[key] for r in raw) for key in ("wall_s", "merge_s"))
    figures = {"floor_s": base, "wall_s": wall, "merge_s": merge, "ratio_wall": round(wall / base, 2),
               "ratio_merge": round(merge / base, 2), "peak_mb": max(r["peak_mb"] for r in raw), "inputs": len(inputs),
               "floors": floors, "runs": raw}
    if "MERGEKIT_PYTHON" in os.environ:
        figures["peer"] = theirs(config, work)
        figures["peer_over_ours"] = round(figures["peer"]["wall_s"] / wall, 1)
    print(f"{name:16} floor {base:6.2f}  wall {wall:7.2f} ({figures['ratio_wall']:.2f}x)  merge {merge:7.2f} "
          f"({figures['ratio_merge']:.2f}x)  peak {figures['peak_mb']:.0f} MB", flush=True)
    return figures


def growth(work: Path, out: Path, runs: int) -> dict[str, Any]:
    """linear and ties over sizes, with three branches; then over 2 to 16 inputs at 0.1 billion parameters."""
    figures: dict[str, Any] = {}
    for size in ("0.1b", "0.3b", "1.1b", "3b"):
        base, branches = build(work / size, size, 3)
        for name in ("linear", "ties"):
            figures[f"{name} {size}"] = measure(f"{name} {size}", configs(base, branches)[name], out, runs)
        if size == "3b":
            shutil.rmtree(work / size)
    base, branches = build(work / "0.1b", "0.1b", 15)
    for count in (2, 4, 8, 16):
        for name in ("linear", "ties"):
            chosen = branches[: count - 1] if name == "ties" else [base, *branches[: count - 1]]
            each = {"weight": 1.0 / len(chosen), **({"density": 0.5} if name == "ties" else {})}
            config = {"merge_method": name, "models": [{"model": str(b), "parameters": each} for b in chosen],
                      **({"base_model": str(base)} if name == "ties" else {}), "dtype": "bfloat16"}
            figures[f"{name} {count} inputs"] = measure(f"{name} {count} inputs", config, out, runs)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder with 15 GB free (40 with --growth)")
    parser.add_argument("--out", type=Path, help="where results go, if not into --work: a folder in memory such as /dev/shm/x "
                                                 "takes the disk's own moods out of the measurement")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--spectral", action="store_true", help="the spectral methods, on 0.1 billion parameters")
    parser.add_argument("--only", help="methods, comma-separated")
    args = parser.parse_args()
    out = args.out or args.work
    for folder in (args.work, out):
        folder.mkdir(parents=True, exist_ok=True)
    where = {"threads": THREADS, "results_in_memory": args.out is not None}
    if args.growth:
        record("merge_growth", {**where, "merges": growth(args.work, out, args.runs)})
        return
    if args.spectral:
        chosen = spectral(*build(args.work / "0.1b", "0.1b", 3))
        merges = {name: measure(name, config, out, args.runs) for name, config in chosen.items()}
        record("merge_spectral", {**where, "size": "0.1b", "merges": merges})
        return
    base, branches = build(args.work / "1.1b", "1.1b", 3)
    chosen = configs(base, branches)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    ours(next(iter(chosen.values())), out)  # the kernels are compiled once per machine; the page cache is filled
    merges = {name: measure(name, config, out, args.runs) for name, config in chosen.items()}
    if not args.only:
        record("merge_speed", {**where, "parameters": 1_100_048_384, "merges": merges})


if __name__ == "__main__":
    main()
