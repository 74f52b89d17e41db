"""What a benchmark writes down: the machine, the versions, the raw runs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Cores, memory, processor and package versions; no host name."""
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    return {
        "cpu": model, "cores": len(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl", "numpy", "scipy")}}


def peak_mb() -> float:
    """Highest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def record(name: str, figures: dict[str, Any]) -> None:
    """Write results/NAME.json and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": name, "machine": machine(), **figures}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
