"""A run through a store with real workers: killed, told to stop, taken over; the same bytes as a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from anabranch.artifacts import BranchManifest
from anabranch.store import leases
from anabranch.store.artifacts import End
from anabranch.store.files import open_store
from anabranch.worker import read_run
from conftest import anabranch, write_recipe

PATIENCE = 240.0


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, tiny_base):
    """The recipe run in one folder, without a store."""
    folder = tmp_path_factory.mktemp("quiet")
    recipe = write_recipe(folder, tiny_base)
    value = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(value | {"launch": {"threads": 1}}))
    anabranch("run", recipe)
    return recipe


def start_worker(address: str, log: Path, *more: str) -> subprocess.Popen:
    with open(log, "ab") as out:
        return subprocess.Popen([sys.executable, "-m", "anabranch", "work", address, *more], stdout=out, stderr=out,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "ANABRANCH_CACHE": str(log.with_suffix(".cache"))})


def wait_until(what, condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.1)


def test_killed_and_stopped_workers_lose_nothing(quiet, tmp_path):
    """SIGKILL in the middle of a branch: another takes over from its checkpoint. SIGTERM: it saves and leaves with 85."""
    address = str(tmp_path / "store")
    settings = [f"output={tmp_path / 'run'}", "evaluate.branches=false", "launch.lease_seconds=5", "train.save_steps=1"]
    through = ["run", str(quiet), "--launcher", "export", "--store", address, *(w for s in settings for w in ("--set", s))]
    told = anabranch(*through)
    assert "anabranch work" in told.stdout
    store = open_store(address)
    run = read_run(store)
    first = start_worker(address, tmp_path / "first.log")
    wait_until("a checkpoint of some branch", lambda: any(leases.checkpoints(store, f"branch-{k}") for k in (0, 1)))
    first.send_signal(signal.SIGKILL)
    first.wait()
    taken = next(k for k in (0, 1) if leases.checkpoints(store, f"branch-{k}"))
    second = start_worker(address, tmp_path / "second.log", "--only", f"branch-{taken}")
    wait_until("the second attempt", lambda: (tmp_path / "second.log").read_text().count("goes on from step") == 1)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 85
    assert leases.end_of(store, f"branch-{taken}", 1, leases.Watch()).reason == "preempted"
    third = start_worker(address, tmp_path / "third.log")
    assert third.wait(PATIENCE) == 0, (tmp_path / "third.log").read_text()
    anabranch(*through)
    mine, theirs = tmp_path / "run", quiet.parent / "run"
    for path in ("plan.json", "branches/0/branch.json", "branches/1/branch.json", "branches/0/model/model.safetensors",
                 "branches/1/model/model.safetensors", "merged/model.safetensors", "merged/manifest.json",
                 "evaluation/merged.json"):
        assert (mine / path).read_bytes() == (theirs / path).read_bytes(), path
    assert BranchManifest.load(mine / f"branches/{taken}/branch.json").tokens_seen > 0
    ends = [leases.end_of(store, f"branch-{taken}", n, leases.Watch()) for n in range(3)]
    assert [end.reason for end in ends if isinstance(end, End)] == ["lost", "preempted", "done"]
    assert not [name for job in run.jobs for name in store.names(f"jobs/{job}") if name.startswith("rival")]
    # the finished branch keeps no checkpoints: three times a model's size each
    assert leases.checkpoints(store, f"branch-{taken}") == []
    status = json.loads(anabranch("status", address, "--json").stdout)
    assert status["finished"]


def test_the_local_launcher_starts_workers_on_a_store(quiet, tmp_path):
    anabranch("run", quiet, "--store", tmp_path / "store", "--until", "merge", "--set", f"output={tmp_path / 'run'}",
              "--set", "launch.gradient_shards=2", env=os.environ | {"ANABRANCH_CACHE": str(tmp_path / "cache")})
    theirs = quiet.parent / "run"
    assert (tmp_path / "run/merged/model.safetensors").read_bytes() == (theirs / "merged/model.safetensors").read_bytes()
    assert not (tmp_path / "run/evaluation").exists()
    again = anabranch("run", quiet, "--store", tmp_path / "store", "--set", f"output={tmp_path / 'run'}",
                      "--set", "launch.gradient_shards=2", "--set", "split.groups=3", check=False)
    assert again.returncode == 2 and "recipe.split" in again.stderr and "Traceback" not in again.stderr
