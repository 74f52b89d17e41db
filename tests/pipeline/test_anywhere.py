"""A run through a store with real workers: killed, told to stop, taken over; the same bytes as a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from anabranch.artifacts import BranchManifest
from anabranch.recipe import load_recipe
from anabranch.run import open_run, run_stages
from anabranch.store import leases
from anabranch.store.artifacts import End
from anabranch.store.files import open_store
from anabranch.worker import read_run
from conftest import write_recipe
from jobs_here import call, jobs_done_here
from warm_python import warm_python

PATIENCE = 240.0


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, tiny_base):
    """The recipe run in one folder, without a store and in this process."""
    folder = tmp_path_factory.mktemp("quiet")
    recipe = write_recipe(folder, tiny_base)
    value = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(value | {"launch": {"threads": 1}}))
    with jobs_done_here():
        run_stages(open_run(load_recipe(recipe), tell=lambda _: None), until="evaluate")
    return recipe


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """`anabranch ..` in this process, but for the workers that it starts: exit code, what it said, what it complained of."""
    code = call([sys.executable, "-m", "anabranch", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def warm():
    """What stands for sys.executable where a worker's children need not import all anew."""
    with tempfile.TemporaryDirectory() as folder, warm_python(Path(folder)) as script:
        yield str(script)


def start_worker(python: str, address: str, log: Path, *more: str) -> subprocess.Popen:
    with open(log, "ab") as out:
        return subprocess.Popen([python, "-m", "anabranch", "work", address, *more], stdout=out, stderr=out,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "ANABRANCH_CACHE": str(log.with_suffix(".cache"))})


def wait_until(what, condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.1)


def test_killed_and_stopped_workers_lose_nothing(quiet, warm, tmp_path, capsys):
    """SIGKILL in the middle of a branch: another takes over from its checkpoint. SIGTERM: it saves and leaves with 85.

    The plan is taken along from the run folder, where somebody has made it. The first worker and its child are started as
    anybody starts them.
    """
    address, mine, theirs = str(tmp_path / "store"), tmp_path / "run", quiet.parent / "run"
    for name in ("gradients", "conflict"):
        shutil.copytree(theirs / name, mine / name)
    shutil.copy(theirs / "plan.json", mine)
    settings = [f"output={mine}", "evaluate.branches=false", "launch.lease_seconds=5", "train.save_steps=1"]
    through = ["run", quiet, "--launcher", "export", "--store", address, *(w for s in settings for w in ("--set", s))]
    code, told, complaint = command(capsys, *through)
    assert code == 0 and "anabranch work" in told, complaint
    store = open_store(address)
    run = read_run(store)
    first = start_worker(sys.executable, address, tmp_path / "first.log")
    wait_until("a checkpoint of some branch", lambda: any(leases.checkpoints(store, f"branch-{k}") for k in (0, 1)))
    first.send_signal(signal.SIGKILL)
    first.wait()
    taken = next(k for k in (0, 1) if leases.checkpoints(store, f"branch-{k}"))
    second = start_worker(warm, address, tmp_path / "second.log", "--only", f"branch-{taken}")
    wait_until("the second attempt", lambda: (tmp_path / "second.log").read_text().count("goes on from step") == 1)
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 85
    assert leases.end_of(store, f"branch-{taken}", 1, leases.Watch()).reason == "preempted"
    third = start_worker(warm, address, tmp_path / "third.log")
    assert third.wait(PATIENCE) == 0, (tmp_path / "third.log").read_text()
    code, _, complaint = command(capsys, *through)
    assert code == 0, complaint
    for path in ("plan.json", "branches/0/branch.json", "branches/1/branch.json", "branches/0/model/model.safetensors",
                 "branches/1/model/model.safetensors", "merged/model.safetensors", "merged/manifest.json",
                 "evaluation/merged.json", "evaluation/base.json"):
        assert (mine / path).read_bytes() == (theirs / path).read_bytes(), path
    assert (mine / "report.html").exists()
    assert BranchManifest.load(mine / f"branches/{taken}/branch.json").tokens_seen > 0
    ends = [leases.end_of(store, f"branch-{taken}", n, leases.Watch()) for n in range(3)]
    assert [end.reason for end in ends if isinstance(end, End)] == ["lost", "preempted", "done"]
    assert not [name for job in run.jobs for name in store.names(f"jobs/{job}") if name.startswith("rival")]
    # the finished branch keeps no checkpoints: three times a model's size each
    assert leases.checkpoints(store, f"branch-{taken}") == []
    code, said, _ = command(capsys, "status", address, "--json")
    assert code == 0 and json.loads(said)["finished"]


def test_the_local_launcher_starts_workers_on_a_store(quiet, warm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", warm)
    sharded = ["run", quiet, "--store", tmp_path / "store", "--set", f"output={tmp_path / 'run'}",
               "--set", "launch.gradient_shards=2"]
    code, _, complaint = command(capsys, *sharded, "--until", "merge")
    assert code == 0, complaint
    for path in ("plan.json", "merged/model.safetensors"):
        assert (tmp_path / "run" / path).read_bytes() == (quiet.parent / "run" / path).read_bytes(), path
    assert not (tmp_path / "run/evaluation").exists()
    code, _, complaint = command(capsys, *sharded, "--set", "split.groups=3")
    assert code == 2 and "recipe.split" in complaint and "Traceback" not in complaint
