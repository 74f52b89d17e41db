"""A worker: takes a job of a run, pulls what it reads, has it done, pushes what it leaves, and takes the next.

The worker is a light parent that never imports torch. It holds the lease, and starts the work itself as a child
(perform.py) in a workspace that looks like a run folder. So a training that hangs or is killed cannot stop beats from
being sent, and a worker that is killed takes nothing along but the steps since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from anabranch import jobs
from anabranch.attempt import Beats, attend, pull, push
from anabranch.errors import AnabranchError, BranchFailed, OutputError, Preempted, RecipeError
from anabranch.exit_codes import DONE, PREEMPTED, TRY_AGAIN
from anabranch.launch.logs import redacted
from anabranch.perform import recipe_of, trusted_parts
from anabranch.processes import end_with_parent
from anabranch.store import leases
from anabranch.store.artifacts import End, StoredRun
from anabranch.store.files import Store, open_store

BACKOFF = (10.0, 60.0, 300.0)  # seconds before this worker tries a job again that failed here; others need not wait
UNFIT = 3  # jobs that fail here one after another before the worker says that it is the machine
STORE_TROUBLES = 4  # times in a row that a waiting worker finds the store away for Store.patience before it gives up

Tell = Callable[[str], None]


@dataclass
class Worker:
    """One worker: where it works, what it may do, what it knows."""

    store: Store
    run: StoredRun
    model: Path | None
    trust: bool
    tell: Tell
    name: str
    folder: Path
    watch: leases.Watch = field(default_factory=leases.Watch)
    stop: threading.Event = field(default_factory=threading.Event)
    not_before: dict[str, float] = field(default_factory=dict)
    failed_here: dict[str, int] = field(default_factory=dict)
    hopeless: dict[str, leases.GivenUp] = field(default_factory=dict)  # needs of what it waits for, as last asked
    next_needs: float = 0.0
    draws: random.Random = field(default_factory=random.Random)  # spreads requests in time, decides nothing


def read_run(store: Store) -> StoredRun:
    """The run of a store. Raises RecipeError where there is none, CorruptedError for one that cannot be."""
    data = store.read("run.json")
    if data is None:
        raise RecipeError(f"{store.url}: no run here (no run.json). `anabranch run recipe.yaml` with `launch.store` set to "
                          "this place makes one; check the address.")
    run = leases.parse(StoredRun, data, f"{store.url}: run.json")
    jobs.check_run(run, store.url)
    return run


def work(url: str | Path, *, only: str | None = None, model: Path | None = None, trust: bool = False,
         cache: Path | None = None, tell: Tell = print) -> int:
    """Take jobs until all are done (or `only` is).

    Args:
        only: the one job to do; waits while its needs are not done or another holds it.
        model: where the base lies on this machine.
        trust: run what the recipe brings along: a trainer's command, a model's own code.
    Returns:
        the exit code: DONE; PREEMPTED, stopped by a signal after saving; TRY_AGAIN, this machine or the store had trouble
        for so long that another worker had better go on.
    Raises:
        BranchFailed: what is left cannot be done; CorruptedError, OutputError, RecipeError: one message.
    """
    with _signals() as stop:
        store = open_store(url, cache=cache)
        store.halt = stop
        return _work(store, only, model, trust, tell, stop)


def _work(store: Store, only: str | None, model: Path | None, trust: bool, tell: Tell, stop: threading.Event) -> int:
    run = read_run(store)
    if only is not None and only not in run.jobs:
        raise RecipeError(f"{only}: the run has no such job. It has {', '.join(run.jobs)}.")
    if (parts := trusted_parts(recipe_of(run))) and not trust:
        raise RecipeError.of(f"{store.url}: this run asks its workers to run things that it brings along. If you trust whoever "
                             "made it, say --trust:", parts)
    if "ANABRANCH_LAUNCHER_PID" in os.environ:
        end_with_parent()
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:60] + f"-{os.getpid()}-{secrets.token_hex(3)}"
    with _workspace(store.cache, run, name) as folder:
        worker = Worker(store, run, model, trust, tell, name, folder, stop=stop)
        try:
            return _until_done(worker, [only] if only else _order(run, name))
        except OutputError as error:
            tell(f"OutputError: {error}")
            return TRY_AGAIN


def _order(run: StoredRun, name: str) -> list[str]:
    """Stages in their order; within a stage each worker begins elsewhere, so that they do not all reach for one job."""
    stages: dict[str, list[str]] = {}
    for job in run.jobs:
        stages.setdefault(jobs.stage_of(job), []).append(job)
    start = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return [mine[(i + start) % len(mine)] for mine in stages.values() for i in range(len(mine))]


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Asked to stop in any of the ways that schedulers know: save, let go of the job, leave."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _workspace(cache: Path, run: StoredRun, name: str) -> Iterator[Path]:
    """A folder of this worker alone. What dead workers of this machine left is removed: its files are in the store."""
    folder = cache / "work" / run.hash[:16] / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        folder.mkdir()
        for other in folder.parent.glob("*.lock"):
            if other != _lock_of(folder):
                _remove_if_dead(other)
    except OSError as error:
        raise OutputError(f"cannot work in {folder}: {error.strerror}. Set ANABRANCH_CACHE to a folder on a disk with room."
                          ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
        lock.close()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _locked(folder: Path) -> IO[str]:
    """Hold a folder that is about to be made. Whoever sweeps may have removed the lock before it was ours."""
    while True:
        lock = open(_lock_of(folder), "w")  # noqa: SIM115 - held until the worker ends
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()


def _remove_if_dead(lock: Path) -> None:
    with contextlib.suppress(OSError), open(lock) as held:  # its worker lives, or another sweeps
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink()


def _until_done(worker: Worker, wanted: list[str]) -> int:
    poll = min(worker.run.lease_seconds / 6, 15.0)
    waited_for, troubles = "", 0
    while not worker.stop.is_set():
        try:
            done = leases.finished(worker.store, worker.run, worker.watch)
            left = [job for job in wanted if job not in done]
            if not left:
                return DONE
            lease, given_up = _take_any(worker, left, done)
            troubles = 0
        except OutputError as error:  # the store: it may come back
            troubles += 1
            if troubles == STORE_TROUBLES:
                raise
            worker.tell(f"{error}\nTried again in a while.")
            worker.stop.wait(poll * 2**troubles)
            continue
        if lease is not None:
            waited_for = ""
            worker.tell(f"{lease.job}: taken (attempt {lease.attempt})")
            _do(worker, lease)
            continue
        _refuse_hopeless(worker, left, given_up)
        if waited_for != (waited_for := ", ".join(left)):
            worker.tell(f"waiting for {waited_for[:200]}")
        worker.stop.wait(poll * worker.draws.uniform(0.5, 1.5))
    return PREEMPTED


def _take_any(worker: Worker, left: list[str], done: set[str]) -> tuple[leases.Lease | None, dict[str, leases.GivenUp]]:
    """A lease, if there is one to be had; and the jobs that were given up, also among what the others wait for."""
    now, run = time.monotonic(), worker.run
    ready = leases.ready(run, left, done.__contains__)
    mine = [job for job in ready if now >= worker.not_before.get(job, now)]
    lease, given_up = leases.take_any(worker.store, run, mine, worker.name, worker.watch, now, worker.draws)
    if lease is None and now > worker.next_needs:
        worker.next_needs = now + run.lease_seconds
        needs = {need for job in left for need in jobs.all_needs(run, job)} - done - set(left)
        worker.hopeless = {need: one for need in leases.ready(run, [job for job in run.jobs if job in needs], done.__contains__)
                           if (one := leases.hopeless(worker.store, run, need, worker.watch)) is not None}
    return lease, given_up | worker.hopeless


def _refuse_hopeless(worker: Worker, left: list[str], given_up: dict[str, leases.GivenUp]) -> None:
    """Raises BranchFailed if nothing that is left can ever be done."""
    if not given_up:
        return
    hopeless = set(given_up)
    for job in worker.run.jobs:  # in the order of the pipeline: needs come first
        if set(worker.run.jobs[job]) & hopeless:
            hopeless.add(job)
    if set(left) <= hopeless:
        raise BranchFailed.of(f"{worker.store.url}: {len(given_up)} jobs were given up, and nothing else is left to do. Mend "
                              "the cause, then give the run another `launch.store`: finished work is taken along.",
                              [f"{job}: failed {one.failures} times without getting further; the last time:\n{one.why}"
                               for job, one in given_up.items()])


def _do(worker: Worker, lease: leases.Lease) -> None:
    """One job under its lease, from pull to result. What fails is told to the store, and the worker goes on."""
    space = worker.folder / "run"
    shutil.rmtree(space, ignore_errors=True)
    beat = Beats(worker, lease)
    try:
        with beat:
            beat.doing = "pull"
            base = pull(worker, lease, space)
            beat.doing = "work"
            end = attend(worker, lease, space, base, beat)
            if end.reason == "done":
                beat.doing = "push"
                push(worker, lease, space)
                worker.failed_here.clear()
    except (OutputError, Preempted) as error:  # this machine's disk, the store, a signal: not the job's fault
        end = End(attempt=lease.attempt, reason="preempted", message=redacted(str(error))[-4000:])
    except AnabranchError as error:
        end = End(attempt=lease.attempt, reason="failed", message=redacted(str(error))[-4000:])
    except OSError as error:  # this machine's, too
        end = End(attempt=lease.attempt, reason="preempted", message=describe(error))
    finally:
        shutil.rmtree(space, ignore_errors=True)
    if end.reason != "lost":
        with contextlib.suppress(OutputError):  # the store is away: the lease runs out, which says the same, later
            leases.let_go(worker.store, lease, end)
    worker.tell(f"{lease.job}: {end.reason}{': ' + end.message if end.message else ''}")
    if end.reason == "failed" or (end.reason == "preempted" and not worker.stop.is_set()):
        _step_back(worker, lease.job, end)


def _step_back(worker: Worker, job: str, end: End) -> None:
    """Let others try first. Raises OutputError when it looks like the machine."""
    worker.failed_here[job] = worker.failed_here.get(job, 0) + 1
    if sum(worker.failed_here.values()) >= UNFIT and (end.reason == "preempted" or len(worker.failed_here) >= UNFIT):
        raise OutputError(f"{UNFIT} jobs in a row failed on this machine, so this worker stops; others may go on. The last "
                          f"one, {job}:\n{end.message}")
    worker.not_before[job] = time.monotonic() + BACKOFF[min(worker.failed_here[job], len(BACKOFF)) - 1]


def describe(error: OSError) -> str:
    """An operating-system error of this machine, for a person."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error.strerror}: {error.filename or ''}" + ("; free space, or set ANABRANCH_CACHE" if full else "")
