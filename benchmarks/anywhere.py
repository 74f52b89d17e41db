"""The demo's mixture through local, Ray, Slurm and two workers over S3: the same plan, the same data, the same bytes?

    python benchmarks/anywhere.py [--work FOLDER] [--only local,ray,slurm,s3]      # writes results/anywhere.json

Real engines on this machine, started and stopped here: a Ray head with two nodes, a Slurm of one node (Debian's slurm-wlm and
munge), an S3 server on the loopback. One thread per job everywhere, so that sums are formed in one order.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch.artifacts import BranchManifest, Plan
from anabranch.demo import make_demo
from machine import record

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "engines")]
SAME = ["plan.json", "gradients/gradients.json", "merged/model.safetensors", "merged/manifest.json", "evaluation/merged.json",
        *(f"branches/{k}/{name}" for k in range(4) for name in ("branch.json", "model/model.safetensors"))]


def run(recipe: Path, output: Path, *more: str) -> None:
    subprocess.run([sys.executable, "-m", "anabranch", "run", str(recipe), "--set", f"output={output}", "--set",
                    "launch.threads=1", *more], check=True)


def local(recipe: Path, output: Path) -> None:
    run(recipe, output)


def over_s3(recipe: Path, output: Path) -> None:
    """A folder that one machine prepares, two workers, and the results brought home."""
    import s3_server

    with s3_server.start() as server, environment(server.env):
        through = ["--launcher", "export", "--store", f"s3://{server.bucket}/demo"]
        run(recipe, output, *through)
        workers = [subprocess.Popen([sys.executable, "-m", "anabranch", "work", f"s3://{server.bucket}/demo"],
                                    env=os.environ | {"ANABRANCH_CACHE": str(output) + f".cache{i}"}) for i in (1, 2)]
        assert [w.wait() for w in workers] == [0, 0]
        run(recipe, output, *through)


def on_ray(recipe: Path, output: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        run(recipe, output, "--launcher", "ray", "--set", f"launch.ray.address={cluster.address}")
    finally:
        cluster.shutdown()


def on_slurm(recipe: Path, output: Path) -> None:
    script = ROOT / "tests" / "engines" / "slurm_one_node.py"
    folder = output.with_name(output.name + ".slurm")
    told = subprocess.run([sys.executable, script, "start", folder, "2"], check=True, capture_output=True, text=True).stdout
    try:
        found = [line.removeprefix("export ").split("=", 1) for line in told.splitlines() if line.startswith("export ")]
        with environment(dict(found)):
            run(recipe, output, "--launcher", "slurm")
    finally:
        subprocess.run([sys.executable, script, "stop", folder], check=False)


ENGINES: dict[str, Callable[[Path, Path], None]] = {"local": local, "s3": over_s3, "ray": on_ray, "slurm": on_slurm}


@contextmanager
def environment(more: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def figures(output: Path) -> dict[str, Any]:
    plan = Plan.load(output / "plan.json")
    branches = [BranchManifest.load(output / "branches" / str(k) / "branch.json") for k in range(len(plan.groups))]
    return {"plan": plan.hash, "branch_data": [b.made_from["data"][:16] for b in branches],
            "tokens_seen": [b.tokens_seen for b in branches],
            "sha256": {path: hashlib.sha256((output / path).read_bytes()).hexdigest() for path in SAME}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("anywhere-run"))
    parser.add_argument("--only", default=",".join(ENGINES))
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ANABRANCH_CACHE": str(work / "cache"),
                   "RAY_USAGE_STATS_ENABLED": "0"}
    recipe = make_demo(work / "demo")
    found: dict[str, Any] = {}
    for name in given.only.split(","):
        begun = time.monotonic()
        ENGINES[name](recipe, work / name)
        found[name] = figures(work / name) | {"seconds": round(time.monotonic() - begun, 1)}
        print(name, json.dumps(found[name] | {"sha256": "..."}), flush=True)
    first = found[next(iter(found))]
    differ = {name: [key for key in ("plan", "branch_data", "tokens_seen") if one[key] != first[key]]
              + [path for path in SAME if one["sha256"][path] != first["sha256"][path]] for name, one in found.items()}
    record("anywhere", {"engines": found, "differs_from_the_first_in": differ})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
