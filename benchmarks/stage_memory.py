"""Wall time and peak resident memory of each stage, each in a process of its own.

    python benchmarks/stage_memory.py --data P3 --model P3_BASE

`import` is a process that imports what training imports and does nothing else: the floor under every figure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from anabranch.run import STAGES
from machine import record
from p3 import write_recipe


def measured(command: list[str]) -> dict[str, float]:
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return {"seconds": round(time.monotonic() - begun, 1), "peak_mb": round(usage.ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    table = {"import": measured(["-c", "import torch, transformers, datasets; from trl import SFTTrainer"])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = str(write_recipe(folder / "recipe.yaml", args.data.resolve(), args.model.resolve(), folder / "run",
                                  mixture={"max_samples": 8, "max_held_out": 2}, gradients={"calibration_samples": 8},
                                  split={"groups": 2}))
        for stage in STAGES:
            if stage == "train":
                for branch in ("0", "1"):
                    table[f"train-branch {branch}"] = measured(["-m", "anabranch", "train-branch", f"{folder}/run", branch])
            table[stage] = measured(["-m", "anabranch", "run", recipe, "--until", stage])
        weights = sum(p.stat().st_size for p in args.model.glob("*.safetensors"))
    record("stage_memory", {"model_mb": round(weights / 1e6, 1), "stages": table})


if __name__ == "__main__":
    main()
