"""1,000 units, 64 branches, 500 workers that vanish: a discrete-event simulation of the lease protocol.

    python benchmarks/lease_simulation.py [--seeds 3]          # writes results/lease_simulation.json

The protocol is not modelled: every simulated worker calls the functions that real workers call (anabranch.store.leases,
anabranch.jobs) on a store in memory, in simulated time; each request is counted. What is modelled are durations (below) and
deaths: exponential lifetimes, half of them with a notice (the worker says its end), half without.

    ideal      no deaths, no store, no waiting, and the fastest 64 workers get the branches
    rates      per worker and hour. Dedicated machines: 419 unexpected interruptions in 54 days on 16,384 GPUs
               (arXiv:2407.21783, sec. 3.3.4), 8 GPUs a machine. Spot machines have no one rate; the sweep goes from 5 % to
               50 % an hour.
    speeds     all 1 (what the protocol costs), or between 0.6 and 1.4 (what it costs that nobody knows who is fast)
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from anabranch import jobs
from anabranch.store import leases
from anabranch.store.artifacts import Beat, Checkpoint, End, FileRef, Result, StoredBase, StoredRun
from machine import record

UNITS, BRANCHES, WORKERS, SHARDS = 1000, 64, 500, 100
PARAMETERS = 7.6e9
RATE = 400e12  # FLOP/s of a worker of speed 1
TOKENS = 100e6  # of a branch
UNIT_TOKENS = 200 * 600  # calibration
BANDWIDTH = 1e9  # bytes/s between a worker and the store, each way
BASE_BYTES, BRANCH_BYTES, CHECKPOINT_BYTES = 2 * PARAMETERS, 4 * PARAMETERS, 12 * PARAMETERS
ROW_BYTES = 5  # of a stored token and its mask
WORK = {"gradients": UNITS / SHARDS * UNIT_TOKENS * 6 * PARAMETERS / RATE, "plan": 30.0,
        "branch": TOKENS * 6 * PARAMETERS / RATE, "merge": 60.0, "evaluate": 600.0}
CHECKPOINT_EVERY, BEAT_EVERY, LEASE, REPLACED_AFTER = 600.0, 0.25, 120.0, 600.0
LLAMA = 419 / (54 * 24 * 16384 / 8)
REF = FileRef(sha256="0" * 64, size=1)


class Table:
    """A store in memory that counts."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.folders: dict[str, set[str]] = {}
        self.requests: Counter[str] = Counter()
        self.by_minute: Counter[int] = Counter()
        self.now = 0.0

    def _count(self, kind: str) -> None:
        self.requests[kind] += 1
        self.by_minute[int(self.now // 60)] += 1

    def _put(self, name: str, data: bytes) -> None:
        self.files[name] = data
        parts = name.split("/")
        for depth in range(1, len(parts)):
            self.folders.setdefault("/".join(parts[:depth]), set()).add(parts[depth])

    def create(self, name: str, data: bytes) -> bool:
        self._count("create")
        if name in self.files:
            return False
        self._put(name, data)
        return True

    def replace(self, name: str, data: bytes) -> None:
        self._count("replace")
        self._put(name, data)

    def read(self, name: str, limit: int = 0) -> bytes | None:
        self._count("read")
        return self.files.get(name)

    def names(self, folder: str) -> list[str]:
        self._count("list")
        return sorted(self.folders.get(folder, ()))


@dataclass
class World:
    run: StoredRun
    rate: float
    draws: random.Random
    store: Table = field(default_factory=Table)
    now: float = 0.0
    bytes: dict[int, float] = field(default_factory=dict)
    deaths: Counter[str] = field(default_factory=Counter)
    lost_work: float = 0.0
    finished: dict[str, float] = field(default_factory=dict)
    holding: dict[int, tuple[leases.Lease, float]] = field(default_factory=dict)  # worker -> lease, work that is not durable


def simulated_run() -> StoredRun:
    table = {f"gradients-{i}": [] for i in range(SHARDS)}
    table["plan"] = [f"gradients-{i}" for i in range(SHARDS)]
    branches = [f"branch-{k}" for k in range(BRANCHES)]
    table |= {b: ["plan"] for b in branches} | {"merge": branches, "evaluate-base": [], "evaluate-merged": ["merge"]}
    table |= {f"evaluate-{b}": [b] for b in branches}
    return StoredRun(recipe={}, base=StoredBase(hash="simulated"), mixture={"mixture/mixture.json": REF}, jobs=table,
                     lease_seconds=LEASE, retries=3)


def read_bytes(job: str) -> float:
    """What a worker pulls for a job."""
    kind = job.split("-")[0]
    rows = TOKENS * BRANCHES * ROW_BYTES
    return {"gradients": BASE_BYTES + rows / SHARDS, "plan": UNITS * 2 * 65536 * 4, "branch": BASE_BYTES + rows / BRANCHES,
            "merge": BASE_BYTES + BRANCHES * BRANCH_BYTES, "evaluate": BRANCH_BYTES + 0.02 * rows}[kind]


def written_bytes(job: str) -> float:
    kind = job.split("-")[0]
    return {"gradients": UNITS / SHARDS * 2 * 65536 * 4, "plan": 2e7, "branch": BRANCH_BYTES, "merge": BASE_BYTES,
            "evaluate": 1e6}[kind]


def worker(world: World, number: int, speed: float) -> Generator[float, None, None]:
    """One life of a worker, as worker.py lives it; yields seconds to wait."""
    watch, run, store = leases.Watch(), world.run, world.store
    order = list(run.jobs)
    start = world.draws.randrange(len(order))
    order = order[start:] + order[:start]
    while True:
        done = leases.finished(store, run, watch)
        if len(done) == len(run.jobs):
            return
        ready = leases.ready(run, [j for j in order if j not in done], done.__contains__)
        lease, _ = leases.take_any(store, run, ready, f"w{number}", watch, world.now, world.draws)
        if lease is None:
            yield min(LEASE / 6, 15.0) * world.draws.uniform(0.5, 1.5)
            continue
        yield from perform(world, number, speed, lease)


def perform(world: World, number: int, speed: float, lease: leases.Lease) -> Generator[float, None, None]:
    """A job under its lease. Beats are sent as time passes; the work done since the last durable checkpoint may be lost."""
    store, job = world.store, lease.job
    left, step = WORK[job.split("-")[0]], 0
    volume = read_bytes(job)
    if (found := leases.checkpoints(store, job)) and leases.read_checkpoint(store, job, *found[0]) is not None:
        step = found[0][1]
        left -= step
        volume += CHECKPOINT_BYTES
    world.holding[number] = (lease, 0.0)
    if not (yield from beating(world, lease, volume / BANDWIDTH)):
        return
    world.bytes[number] = world.bytes.get(number, 0.0) + volume
    while left > 0:
        # work units are seconds at speed 1; a checkpoint is on its way to the store while the next part is worked on
        part = min(left, CHECKPOINT_EVERY * speed) if job.startswith("branch") else left
        world.holding[number] = (lease, world.holding[number][1] + part)
        if not (yield from beating(world, lease, part / speed)):
            return
        left -= part
        step += int(part)
        if left > 0:
            world.bytes[number] += CHECKPOINT_BYTES
            checkpoint = Checkpoint(job=job, attempt=lease.attempt, step=step, files={f"branches/0/{step}.json": REF})
            store.create(leases.checkpoint_file(job, lease.attempt, step), checkpoint.model_dump_json().encode())
            world.holding[number] = (lease, 0.0)
    if not (yield from beating(world, lease, written_bytes(job) / BANDWIDTH)):
        return
    world.bytes[number] += written_bytes(job)
    result = Result(job=job, run=world.run.hash, attempt=lease.attempt, worker=f"w{number}", files={"plan.json": REF})
    leases.publish(store, world.run, result)
    world.finished.setdefault(job, world.now)
    leases.let_go(store, lease, End(attempt=lease.attempt, reason="done"))
    world.holding.pop(number, None)


def beating(world: World, lease: leases.Lease, seconds: float) -> Generator[float, None, bool]:
    """Let time pass, sending beats. False: the job was taken over."""
    end, count = world.now + seconds, 0
    while True:
        if not leases.renew(world.store, lease, Beat(count=int(world.now * 1000) + count)):
            return False
        count += 1
        pause = LEASE * BEAT_EVERY * world.draws.uniform(0.8, 1.0)
        if world.now + pause >= end:
            yield max(end - world.now, 0.0)
            return True
        yield pause


def simulate(rate: float, workers: int, seed: int, even: bool) -> dict[str, Any]:
    """One run; `rate`: deaths per worker and hour."""
    world = World(simulated_run(), rate / 3600, random.Random(seed))
    speeds = [1.0 if even else world.draws.uniform(0.6, 1.4) for _ in range(workers)]
    queue: list[tuple[float, int, int, Any, float]] = []
    count = 0

    def born(number: int, at: float) -> None:
        nonlocal count
        count += 1
        death = at + (world.draws.expovariate(world.rate) if world.rate else float("inf"))
        heapq.heappush(queue, (at, count, number, worker(world, number, speeds[number]), death))

    for number in range(workers):
        born(number, world.draws.uniform(0.0, 300.0))
    while queue and len(world.finished) < len(world.run.jobs):
        world.now, _, number, life, death = heapq.heappop(queue)
        world.store.now = world.now
        if world.now >= death:
            die(world, number)
            life.close()
            born(number, world.now + world.draws.expovariate(1 / REPLACED_AFTER))
            continue
        try:
            pause = next(life)
        except StopIteration:
            continue
        count += 1
        heapq.heappush(queue, (min(world.now + pause, death), count, number, life, death))
    return summary(world, speeds, rate, workers, seed, even)


def die(world: World, number: int) -> None:
    notice = world.draws.random() < 0.5
    world.deaths["with notice" if notice else "without"] += 1
    lease, unsaved = world.holding.pop(number, (None, 0.0))
    if lease is not None:
        world.deaths["while holding a job"] += 1
        world.lost_work += unsaved
        if notice:
            leases.let_go(world.store, lease, End(attempt=lease.attempt, reason="preempted"))


def ideal(speeds: list[float]) -> float:
    """No deaths, no store, no waiting; each stage by the fastest workers."""
    best = sorted(speeds, reverse=True)
    branch = max(WORK["branch"] / best[k % len(best)] * (1 + k // len(best)) for k in range(BRANCHES))
    return WORK["gradients"] * SHARDS / sum(best) + (WORK["plan"] + WORK["merge"] + WORK["evaluate"]) / best[0] + branch


def summary(world: World, speeds: list[float], rate: float, workers: int, seed: int,
            even: bool) -> dict[str, Any]:
    moved = sorted(world.bytes.values())
    run, store = world.run, world.store
    doubled = sum(1 for name in store.files if "/rival-" in name)
    claims = sum(1 for name in store.files if "/claim-" in name)
    complete = len(leases.finished(store, run, leases.Watch())) == len(run.jobs)
    stages = {stage: max((t for j, t in world.finished.items() if jobs.stage_of(j) == stage), default=None)
              for stage in ("gradients", "split", "train", "merge", "evaluate")}
    return {"deaths_per_hour": rate, "workers": workers, "even": even, "seed": seed, "complete": complete, "rivals": doubled,
            "hours": world.now / 3600, "ideal_hours": ideal(speeds) / 3600, "ratio": world.now / ideal(speeds),
            "stage_ends_hours": {k: None if v is None else round(v / 3600, 3) for k, v in stages.items()},
            "deaths": dict(world.deaths), "attempts": claims, "jobs": len(run.jobs),
            "lost_work_hours": world.lost_work / 3600, "work_hours": sum(
                WORK[j.split("-")[0]] for j in run.jobs) / 3600,
            "requests": dict(store.requests), "requests_per_second": sum(store.requests.values()) / world.now,
            "busiest_minute_per_second": max(store.by_minute.values()) / 60,
            "gigabytes_per_busy_worker": {"median": moved[len(moved) // 2] / 1e9, "most": moved[-1] / 1e9, "busy": len(moved)}}


def moved_by_data_parallel() -> dict[str, float]:
    """What each of 64 workers sends in a ring all-reduce of bfloat16 gradients, for the same tokens in batches of 2^19."""
    steps = TOKENS * BRANCHES / 2**19
    sent = steps * 2 * (BRANCHES - 1) / BRANCHES * 2 * PARAMETERS
    branch = BASE_BYTES + TOKENS * ROW_BYTES + BRANCH_BYTES
    hours = WORK["branch"] / 3600
    return {"steps": steps, "data_parallel_terabytes_per_worker": sent / 1e12,
            "data_parallel_gigabytes_per_second_to_keep_pace": sent / WORK["branch"] / 1e9,
            "branch_terabytes_per_worker": branch / 1e12,
            "branch_with_checkpoints_terabytes": (branch + CHECKPOINT_BYTES * (WORK["branch"] // CHECKPOINT_EVERY)) / 1e12,
            "branch_hours": hours, "ratio_without_checkpoints": sent / branch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    runs = []
    cells = [(rate, workers, True) for rate in (0.0, LLAMA, 0.05, 0.2, 0.5) for workers in (WORKERS, 80, 64)]
    for rate, workers, even in [*cells, (0.0, WORKERS, False), (0.2, WORKERS, False)]:
        for seed in range(given.seeds):
            runs.append(one := simulate(rate, workers, seed, even))
            print(f"{rate:.5f}/h, {workers} {'even' if even else 'uneven'} workers, seed {seed}: {one['hours']:.2f} h, ideal "
                  f"{one['ideal_hours']:.2f} h, x{one['ratio']:.2f}, {one['requests_per_second']:.1f} requests/s (busiest "
                  f"minute {one['busiest_minute_per_second']:.0f}), {one['deaths'].get('while holding a job', 0)} jobs "
                  f"interrupted, complete {one['complete']}, rivals {one['rivals']}", flush=True)
    moved = moved_by_data_parallel()
    record("lease_simulation", {"runs": runs, "seven_b": moved})


if __name__ == "__main__":
    main()
