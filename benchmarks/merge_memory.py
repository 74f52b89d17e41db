"""Does a merge stay within its limit? TIES of 16 inputs, and an embedding of two billion numbers, under 512 MB.

    python benchmarks/merge_memory.py --work DIR          needs 25 GB in DIR

Each is a process of its own under `--memory 512MB`. Written down: the highest anonymous memory seen (sampled every 20 ms),
what `--dry-run` had predicted, and the time.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from llama import build
from machine import record
from merge_speed import timed

LIMIT = "512MB"
ROWS, COLUMNS = 1_000_000, 2048
REPEATED = 1 << 24  # numbers: drawing two billion would take longer than merging them


def large(folder: Path, branches: int) -> tuple[Path, list[Path]]:
    """Checkpoints of one embedding, [1,000,000, 2,048] in bfloat16: 4.1 GB each."""
    paths = [folder / "base", *(folder / f"branch-{i}" for i in range(branches))]
    base = torch.randn(REPEATED, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for i, path in enumerate(paths):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        step = torch.randn(REPEATED, generator=torch.Generator().manual_seed(i)).mul_(0.001) if i else torch.zeros(1)
        data = (base + step).bfloat16().view(torch.uint8).numpy()
        size = ROWS * COLUMNS * 2
        header = json.dumps({"model.embed_tokens.weight": {"dtype": "BF16", "shape": [ROWS, COLUMNS],
                                                           "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        with open(path / "model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, size, len(data)):
                file.write(data[: min(len(data), size - start)])
        (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                                                      "vocab_size": ROWS, "hidden_size": COLUMNS, "num_hidden_layers": 0}))
    return paths[0], paths[1:]


def ties(base: Path, branches: list[Path]) -> dict[str, Any]:
    each = {"weight": 1.0 / len(branches), "density": 0.5}
    return {"merge_method": "ties", "base_model": str(base), "dtype": "bfloat16",
            "models": [{"model": str(b), "parameters": each} for b in branches]}


def measure(name: str, config: dict[str, Any], work: Path) -> dict[str, Any]:
    path, out = work / "config.yaml", work / "out"
    path.write_text(yaml.safe_dump(config))
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "anabranch", "merge", str(path), str(out), "--memory", LIMIT, "--threads", "2"]
    told = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True).stdout
    predicted = int(re.search(r"memory: at most ([\d,]+) MB", told)[1].replace(",", ""))  # type: ignore[index]
    seconds, peak, _ = timed(command, {"OMP_NUM_THREADS": "1"})
    shutil.rmtree(out)
    figures = {"limit": LIMIT, "predicted_mb": predicted, "peak_mb": round(peak), "wall_s": round(seconds, 1)}
    print(name, figures, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    base, branches = build(work / "many", "0.3b", 15)
    figures = {"ties of 16 inputs (0.3 billion parameters each)": measure("16 inputs", ties(base, branches), work)}
    shutil.rmtree(work / "many")
    base, branches = large(work / "large", 2)
    figures["ties of one tensor of 2,048,000,000 numbers, base and 2"] = measure("large", ties(base, branches), work)
    shutil.rmtree(work / "large")
    record("merge_memory", {"merges": figures})


if __name__ == "__main__":
    main()
