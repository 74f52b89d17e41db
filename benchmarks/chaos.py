"""A whole run, with 4 branches, on workers that are killed, paused, short of disk and told the wrong time; the store fails too.

    python benchmarks/chaos.py [--kills 100] [--seed 0] [--faults 0.03] [--work FOLDER]      # writes results/chaos.json

The demo's mixture and base. Three workers at a time; events at exponential intervals from one seeded generator:

    kill       SIGKILL to the worker, to the worker and its child, or to the child alone
    term       SIGTERM to the worker (it saves, and leaves with code 85)
    pause      SIGSTOP to worker and child for 1 to 3 lease times, then SIGCONT: a machine that was taken for dead comes back
    disk       the worker's disk (a tmpfs of its own) is filled for some seconds
    clock      each worker and child is told another time of day (Python's time module), up to two days off

The S3 server (tests/s3_server.py) answers a share of requests with 503, with 500 after having done it, too late, with a body
cut short, or with an old listing. Afterwards: one result a job, every object's hash, the branches' and the merged model's bytes
against a quiet run of the same recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.demo import make_demo
from anabranch.store import leases
from anabranch.store.artifacts import Result
from anabranch.store.files import Store, open_store
from anabranch.worker import read_run
from machine import record

ROOT = Path(__file__).parents[1]
LEASE, WORKERS, DISK = 8.0, 3, 96  # seconds; at a time; MB of a worker's disk
MEAN_PAUSE = 1.2  # seconds between two events
EVENTS = ("kill worker", "kill both", "kill child", "term", "pause", "disk")
WEIGHTS = (6, 6, 2, 4, 2, 2)
SKEWS = (0, 172800, -172800, 10800, -3000, 10)  # seconds
# libfaketime 0.9.10 also shifts absolute sleeps on the monotonic clock that it was told to leave alone: EINVAL, or days.
SKEWED = """import os, time
skew = float(os.environ.get("CHAOS_SKEW", "0"))
for name, unit in (("time", 1), ("time_ns", 10**9)):
    setattr(time, name, lambda real=getattr(time, name), unit=unit: real() + type(real())(skew * unit))
"""


def anabranch(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "anabranch", *map(str, arguments)]


@dataclass
class Slot:
    """A place for a worker, with a disk of its own."""

    number: int
    folder: Path
    log: Path
    small: bool  # the disk is a tmpfs
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0.0
    resume_at: float | None = None
    unfill_at: float | None = None

    def children(self) -> list[int]:
        assert self.process is not None
        try:
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        except OSError:
            return []
        return [int(pid) for pid in text.split()]


def make_slot(number: int, work: Path) -> Slot:
    folder = work / f"worker-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["umount", "-q", str(folder)], check=False, stderr=subprocess.DEVNULL)
    small = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)], check=False,
                           stderr=subprocess.DEVNULL).returncode == 0
    return Slot(number, folder, work / f"worker-{number}.log", small)


def send_signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
        os.kill(pid, number)


class Chaos:
    def __init__(self, url: str, work: Path, seed: int, environment: dict[str, str]) -> None:
        self.url, self.draws, self.environment = url, random.Random(seed), environment
        self.slots = [make_slot(i, work) for i in range(WORKERS)]
        self.events: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.skews: Counter[str] = Counter()
        (work / "skew").mkdir(exist_ok=True)
        (work / "skew" / "sitecustomize.py").write_text(SKEWED)
        self.path = os.pathsep.join([str(work / "skew"), *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(self, slot: Slot) -> None:
        skew = self.draws.choice(SKEWS)
        self.skews[str(skew)] += 1
        faked = {"PYTHONPATH": self.path, "CHAOS_SKEW": str(skew)}
        with open(slot.log, "ab") as log:
            slot.process = subprocess.Popen(anabranch("work", self.url), stdout=log, stderr=subprocess.STDOUT,
                                            start_new_session=True,
                                            env=self.environment | faked | {"ANABRANCH_CACHE": str(slot.folder)})

    def tend(self, slot: Slot, all_done: bool) -> None:
        now = time.monotonic()
        if slot.unfill_at is not None and now > slot.unfill_at:
            (slot.folder / "filler").unlink(missing_ok=True)
            slot.unfill_at = None
        if slot.resume_at is not None and now > slot.resume_at:
            for pid in [*slot.children(), slot.process.pid if slot.process else 0]:
                send_signal(pid, signal.SIGCONT)
            slot.resume_at = None
        if slot.process is not None and (code := slot.process.poll()) is not None:
            self.codes[str(code)] += 1
            slot.process, slot.start_at = None, now + self.draws.uniform(0.0, 2.0)
        if slot.process is None and now >= slot.start_at and not all_done:
            self.start(slot)

    def strike(self) -> None:
        """One event to one worker that runs."""
        slot = self.draws.choice(self.slots)
        event = self.draws.choices(EVENTS, WEIGHTS)[0]
        if slot.process is None or slot.resume_at is not None:
            return
        children, pid = slot.children(), slot.process.pid
        if event == "disk":
            if slot.unfill_at is not None or not slot.small:
                return
            with contextlib.suppress(OSError), open(slot.folder / "filler", "wb", buffering=0) as filler:  # until it is full
                while filler.write(bytes(2**18)):
                    pass
            slot.unfill_at = time.monotonic() + self.draws.uniform(4.0, 12.0)
        elif event == "pause":
            for one in (*children, pid):
                send_signal(one, signal.SIGSTOP)
            slot.resume_at = time.monotonic() + LEASE * self.draws.uniform(1.0, 3.0)
        elif event == "term":
            send_signal(pid, signal.SIGTERM)
        else:
            doomed = {"kill worker": [pid], "kill both": [pid, *children], "kill child": children}[event]
            if not doomed:
                return
            for one in doomed:
                send_signal(one, signal.SIGKILL)
        self.events[event] += 1

    @property
    def kills(self) -> int:
        return sum(self.events[event] for event in ("kill worker", "kill both", "kill child"))

    def end(self) -> None:
        for slot in self.slots:
            if slot.process is not None:
                for pid in [*slot.children(), slot.process.pid]:
                    send_signal(pid, signal.SIGCONT)
                slot.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    slot.process.wait(90)
            if slot.small:
                subprocess.run(["umount", "-q", "-l", str(slot.folder)], check=False)


def torment(url: str, work: Path, seed: int, kills: int, environment: dict[str, str]) -> tuple[Chaos, dict[str, Any]]:
    """Workers and events until every job is done; after `kills` kills the events stop, so that it ends."""
    store = open_store(url, cache=work / "observer")
    run, watch = read_run(store), leases.Watch()
    chaos, begun, jobs_at_kills = Chaos(url, work, seed, environment), time.monotonic(), None
    next_strike, next_look, done = begun + 10.0, 0.0, set[str]()
    try:
        while True:
            if time.monotonic() > next_look:
                done, next_look = leases.finished(store, run, watch), time.monotonic() + 5.0
            for slot in chaos.slots:
                chaos.tend(slot, len(done) == len(run.jobs))
            if len(done) == len(run.jobs):
                break
            if chaos.kills < kills:
                while time.monotonic() > next_strike:
                    chaos.strike()
                    next_strike += chaos.draws.expovariate(1 / MEAN_PAUSE)
            elif jobs_at_kills is None:
                jobs_at_kills = len(done)
            print(f"\r{time.monotonic() - begun:.0f} s, {chaos.kills} kills, {len(done)} of {len(run.jobs)} jobs   ", end="",
                  file=sys.stderr, flush=True)
            time.sleep(0.3)
    finally:
        chaos.end()
    return chaos, {"seconds": round(time.monotonic() - begun), "jobs_done_at_last_kill": jobs_at_kills}


def every_object(store: Store, folder: str = "objects") -> Counter[str]:
    """Read and hash everything that is stored."""
    found: Counter[str] = Counter()
    for part in store.names(folder):
        for name in store.names(f"{folder}/{part}"):
            data = store.read(f"{folder}/{part}/{name}", limit=2**32)
            good = data is not None and hashlib.sha256(data).hexdigest() == name
            found["good" if good else "damaged"] += 1
            found["bytes"] += len(data or b"")
    return found


def states(store: Store) -> dict[str, Any]:
    """What the store says happened."""
    run, ends, attempts, rivals = read_run(store), Counter(), Counter(), []
    for job in run.jobs:
        names = store.names(f"jobs/{job}")
        attempts[job] = sum(name.startswith("claim-") for name in names)
        rivals += [f"{job}/{name}" for name in names if name.startswith("rival-")]
        for name in names:
            if name.startswith("end-"):
                ends[json.loads(store.read(f"jobs/{job}/{name}") or b"{}")["reason"]] += 1
    results = {job: Result.model_validate_json(store.read(leases.result_file(job)) or b"") for job in run.jobs}
    missing = [f"{job}: {path}" for job, result in results.items() for path, ref in result.files.items()
               if not store.has(ref)]
    return {"jobs": len(run.jobs), "results": len(results), "attempts": sum(attempts.values()),
            "attempts_by_job": dict(attempts), "ends": dict(ends), "rivals": rivals, "missing_objects": missing}


def compare(quiet: Path, chaotic: Path) -> dict[str, bool]:
    """Same bytes? The plan, each branch's manifest (tokens seen, losses) and weights, the merged model."""
    paths = ["plan.json", "gradients/gradients.json", "merged/model.safetensors", "merged/manifest.json",
             "evaluation/merged.json"]
    paths += [f"branches/{k}/{name}" for k in range(4) for name in ("branch.json", "model/model.safetensors")]
    return {path: (quiet / path).read_bytes() == (chaotic / path).read_bytes() for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.03, help="share of requests that fail")
    parser.add_argument("--work", type=Path, default=Path("chaos-run"))
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    recipe = make_demo(work / "demo")
    quiet_env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common = ["--set", "train.save_steps=5", "--set", "mixture.epochs=6", "--set", "launch.threads=1"]
    subprocess.run(anabranch("run", recipe, *common, "--set", f"output={work / 'quiet'}"), check=True, env=quiet_env)
    with open(work / "server.env", "w") as told:
        server = subprocess.Popen([sys.executable, ROOT / "tests" / "s3_server.py", "--port", "9321", "--faults",
                                   f"{given.seed}:{given.faults}", "--log", work / "faults.jsonl"], stdout=told)
    try:
        time.sleep(5.0)
        exported = [line.removeprefix("export ").split("=", 1) for line in (work / "server.env").read_text().splitlines()
                    if "=" in line and not line.startswith("#")]
        environment = quiet_env | dict(exported)
        os.environ.update(dict(exported))
        url = f"s3://runs/chaos-{given.seed}"
        settings = [f"launch.lease_seconds={LEASE}", "launch.gradient_shards=4", f"output={work / 'chaotic'}"]
        through = anabranch("run", recipe, *common, "--launcher", "export", "--store", url,
                            *(word for setting in settings for word in ("--set", setting)))
        observer = environment | {"ANABRANCH_CACHE": str(work / "observer")}
        subprocess.run(through, check=True, env=observer)
        chaos, told = torment(url, work, given.seed, given.kills, environment)
        subprocess.run(through, check=True, env=observer)
        with urllib.request.urlopen("http://127.0.0.1:9321/_faults") as answer:
            faults = json.loads(answer.read())
        with urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:9321/_faults?0:0", method="POST")):
            pass
        store = open_store(url, cache=work / "observer")
        record("chaos", {
            "seed": given.seed, "fault_rate": given.faults, "events": dict(chaos.events), "kills": chaos.kills, **told,
            "worker_exit_codes": dict(chaos.codes), "clock_skews": dict(chaos.skews),
            "small_disks": all(slot.small for slot in chaos.slots), "server": faults, "store": states(store),
            "objects": dict(every_object(store)), "same_bytes_as_quiet_run": compare(work / "quiet", work / "chaotic")})
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
