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
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from anabranch import jobs
from anabranch.artifacts import Mixture, Plan
from anabranch.errors import AnabranchError, BranchFailed, CorruptedError, OutputError, Preempted, RecipeError
from anabranch.exit_codes import DONE, PREEMPTED, TRY_AGAIN
from anabranch.launch.logs import end_of_log, redacted
from anabranch.perform import recipe_of, trusted_parts
from anabranch.processes import end_with_parent, signal_group
from anabranch.store import leases
from anabranch.store.artifacts import Beat, Checkpoint, End, Result, StoredRun
from anabranch.store.files import Store, fetch_all, open_store

BACKOFF = (10.0, 60.0, 300.0)  # seconds before this worker tries a job again that failed here; others need not wait
UNFIT = 3  # jobs that fail here one after another before the worker says that it is the machine
STORE_TROUBLES = 4  # times in a row that a waiting worker finds the store away for Store.patience before it gives up
GRACE = 60.0  # seconds that a child has to save after it was told to stop
LAST_PATIENCE = 20.0  # with the store, once this worker was told to stop
KEPT_CHECKPOINTS = 2

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
    """The run of a store. Raises CorruptedError where there is none, or one that cannot be."""
    data = store.read("run.json")
    if data is None:
        raise CorruptedError(f"{store.url}: no run here (no run.json). `anabranch run recipe.yaml` with `launch.store` set to "
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
    store = open_store(url, cache=cache)
    run = read_run(store)
    if only is not None and only not in run.jobs:
        raise RecipeError(f"{only}: the run has no such job. It has {', '.join(run.jobs)}.")
    if (parts := trusted_parts(recipe_of(run))) and not trust:
        raise RecipeError.of(f"{store.url}: this run asks its workers to run things that it brings along. If you trust whoever "
                             "made it, say --trust:", parts)
    if "ANABRANCH_LAUNCHER_PID" in os.environ:
        end_with_parent()
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:60] + f"-{os.getpid()}-{secrets.token_hex(3)}"
    with _workspace(store.cache, run, name) as folder, _signals() as stop:
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
        needs = {need for job in left for need in _all_needs(run, job)} - done - set(left)
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
    beat = _Beats(worker, lease)
    try:
        with beat:
            beat.doing = "pull"
            base = _pull(worker, lease, space)
            beat.doing = "work"
            end = _attend(worker, lease, space, base, beat)
            if end.reason == "done":
                beat.doing = "push"
                _push(worker, lease, space)
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


class _Beats:
    """Sends beats from a thread of its own, so that neither a pull nor a push is taken for a death."""

    def __init__(self, worker: Worker, lease: leases.Lease) -> None:
        self.worker, self.lease = worker, lease
        self.doing, self.progress = "start", Path()
        self.lost, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> _Beats:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5.0)

    def _send(self) -> None:
        count = 0
        while True:
            with contextlib.suppress(AnabranchError):  # the store does not answer: work goes on, and it is asked again
                if not leases.renew(self.worker.store, self.lease, self._beat(count)):
                    self.lost.set()
                    return
            count += 1
            if self._over.wait(self.worker.run.lease_seconds / 4 * self.worker.draws.uniform(0.8, 1.0)):
                return

    def _beat(self, count: int) -> Beat:
        plain = {"count": count, "doing": self.doing, "cores": os.cpu_count() or 0}
        try:  # a trainer of any kind writes this file: what cannot be told must not end the beats
            told = json.loads(self.progress.read_text(), parse_constant=lambda _: None)
            known = {key: told[key] for key in ("step", "steps", "tokens", "tokens_per_second", "seconds_left", "loss")
                     if isinstance(told.get(key), int | float)}
            return Beat.model_validate(plain | known)
        except (OSError, ValueError, AttributeError, RecursionError):  # nothing was told yet, or it is being written
            return Beat.model_validate(plain)


def _pull(worker: Worker, lease: leases.Lease, space: Path) -> Path | None:
    """Everything the job reads, into `space`; returns where the base is, if it came from the store or was given."""
    run, store, job = worker.run, worker.store, lease.job
    space.mkdir(parents=True)
    (space / "run.json").write_text(run.model_dump_json())
    mixture = _mixture(store, run, space)
    results = {need: _need(worker, need) for need in _all_needs(run, job)}
    plan = None
    if jobs.branch_of(job) is not None and "plan" in results:
        store.get(results["plan"].files["plan.json"], space / "plan.json")
        plan = Plan.load(space / "plan.json")
    # a merge reads every branch once: nobody else on this machine will want them
    fetch_all(store, jobs.reads(job, run, results, mixture, plan), space, keep=job != "merge", stop=worker.stop)
    if job.startswith("branch-"):
        _resume(worker, job, space)
    if not jobs.needs_base(job) or worker.model is not None or run.base.hub is not None:
        return worker.model
    fetch_all(store, run.base.files, space / "base", stop=worker.stop)
    return space / "base"


def _mixture(store: Store, run: StoredRun, space: Path) -> Mixture:
    store.get(run.mixture["mixture/mixture.json"], space / "mixture" / "mixture.json")
    mixture = Mixture.load(space / "mixture" / "mixture.json")
    jobs.check_mixture(mixture, run)
    return mixture


def _all_needs(run: StoredRun, job: str) -> list[str]:
    """Direct needs, and theirs: the plan behind a branch behind a merge."""
    found: dict[str, None] = {}
    for need in run.jobs[job]:
        found |= dict.fromkeys([*_all_needs(run, need), need])
    return list(found)


def _need(worker: Worker, job: str) -> Result:
    result = leases.result_of(worker.store, worker.run, job, worker.watch)
    if result is None:
        raise CorruptedError(f"results/{job}.json was there and is gone.")
    jobs.check_result(result)
    return result


def _resume(worker: Worker, job: str, space: Path) -> None:
    """The furthest whole checkpoint that anybody left; a damaged one is passed over, and said so."""
    for attempt, step in leases.checkpoints(worker.store, job):
        try:
            checkpoint = leases.read_checkpoint(worker.store, job, attempt, step)
            if checkpoint is None:
                continue
            jobs.check_checkpoint(checkpoint)
            fetch_all(worker.store.below(f"jobs/{job}"), checkpoint.files, space, keep=False, stop=worker.stop)
            _check_whole(space / "branches" / str(jobs.branch_of(job)) / "checkpoints" / f"checkpoint-{step}")
            worker.tell(f"{job}: goes on from step {step} of attempt {attempt}")
            return
        except CorruptedError as error:
            worker.tell(f"{job}: checkpoint {step} of attempt {attempt} is passed over: {error}")
            shutil.rmtree(space / "branches", ignore_errors=True)


def _check_whole(folder: Path) -> None:
    """Whether the marker names just the files that came, with their sizes: the child would pass over a checkpoint that does not
    hold together, and begin anew though an older one is whole. It looks at the hashes. Raises CorruptedError."""
    marker = folder / jobs.MARKER
    try:
        told = {str(name): size for name, (size, _) in json.loads(marker.read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptedError(f"{marker.name}: not the marker of a checkpoint.") from error
    there = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file() and p != marker}
    if told != there:
        strange = sorted(name for name in told.keys() | there.keys() if told.get(name) != there.get(name))
        raise CorruptedError(f"{marker.name}: of other files than came with it: {', '.join(strange[:3])}.")


def _attend(worker: Worker, lease: leases.Lease, space: Path, base: Path | None, beat: _Beats) -> End:
    """Start the child and look after it to its end, pushing checkpoints as they appear."""
    command = [sys.executable, "-m", "anabranch", "perform", str(space), lease.job]
    command += ["--model", str(base)] if base is not None else []
    command += ["--trust"] if worker.trust else []
    k = jobs.branch_of(lease.job)
    at = space / "branches" / str(k) if lease.job.startswith("branch-") else space
    beat.progress = at / "progress.json"
    log, told = space / "log.txt", 0.0
    environment = os.environ | {"ANABRANCH_LAUNCHER_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1",
                                "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
                                 start_new_session=True)
    try:
        with _Pusher(worker, lease, at):
            while (code := child.poll()) is None:
                if (worker.stop.is_set() or beat.lost.is_set()) and not told:
                    told, worker.store.patience = time.monotonic(), min(worker.store.patience, LAST_PATIENCE)
                    signal_group(child, signal.SIGTERM)
                if told and time.monotonic() - told > GRACE:
                    signal_group(child, signal.SIGKILL)
                time.sleep(0.3)
    finally:
        signal_group(child, signal.SIGKILL)  # whatever the child left running
        child.wait()
    return _judge(worker, lease, beat, code, log)


def _judge(worker: Worker, lease: leases.Lease, beat: _Beats, code: int, log: Path) -> End:
    """What a child's end means."""
    if beat.lost.is_set():
        return End(attempt=lease.attempt, reason="lost", message="another worker had taken it over")
    if code == 0:
        return End(attempt=lease.attempt, reason="done")
    if worker.stop.is_set() or code == PREEMPTED:
        return End(attempt=lease.attempt, reason="preempted", message="asked to stop")
    tail = redacted(end_of_log(log, 25))[-4000:]  # others can read it
    if code == TRY_AGAIN:
        raise OutputError(tail)
    how = f"killed by signal {-code} (9: often out of memory)" if code < 0 else f"exit code {code}"
    return End(attempt=lease.attempt, reason="failed", message=f"on {worker.name}: {how}\n{tail}")


def _furthest(at: Path) -> int:
    names = [p.parent.name.removeprefix("checkpoint-") for p in at.glob("checkpoints/checkpoint-*/complete.json")]
    steps = [int(name) for name in names if name.isdecimal()]
    return max(steps, default=-1)


class _Pusher:
    """Pushes each checkpoint as it appears, from a thread of its own: a push may take longer than a machine has to live once
    it was told to stop. The last one is pushed after the child has ended."""

    def __init__(self, worker: Worker, lease: leases.Lease, at: Path) -> None:
        self.worker, self.lease, self.at = worker, lease, at
        self.pushed = self.tried = _furthest(at)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Pusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.tried = self.pushed  # what could not be pushed while the child worked has another chance
        self._push_newest()

    def _look(self) -> None:
        while not self._over.wait(0.3):
            self._push_newest()

    def _push_newest(self) -> None:
        """A failure is told, and the next checkpoint is tried: it is further anyway."""
        step = _furthest(self.at)
        if step <= self.tried:
            return
        self.tried = step
        try:
            if push_checkpoint(self.worker, self.lease, self.at, step):
                self.pushed = step
        except (AnabranchError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.worker.tell(f"{self.lease.job}: step {step} could not be pushed; the next one will be tried: {error}")


def push_checkpoint(worker: Worker, lease: leases.Lease, at: Path, step: int) -> bool:
    """Push a whole checkpoint. False: the trainer has removed it meanwhile, as it does when it has a newer one.

    Its files are linked aside first. They go to objects of this job alone, so that what was overtaken can be removed: shards
    of frozen weights and random states may be the same in two branches.
    """
    aside, folder, files = worker.folder / "pushing", at / "checkpoints" / f"checkpoint-{step}", {}
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        try:
            wanted = [*json.loads((folder / jobs.MARKER).read_text())["files"], jobs.MARKER]
            for name in wanted:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / name, aside / name)
        except FileNotFoundError:
            return False
        mine = worker.store.below(f"jobs/{lease.job}")
        for name in wanted:
            files[f"branches/{at.name}/checkpoints/checkpoint-{step}/{name}"] = mine.put(aside / name)
        checkpoint = Checkpoint(job=lease.job, attempt=lease.attempt, step=step, files=files)
        worker.store.create(leases.checkpoint_file(lease.job, lease.attempt, step), checkpoint.model_dump_json().encode())
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _prune(worker, lease.job)
    return True


def _prune(worker: Worker, job: str, keep: int = KEPT_CHECKPOINTS) -> None:
    """Remove checkpoints that were overtaken: three times a model's size each. What cannot be removed stays."""
    found = leases.checkpoints(worker.store, job)
    steps = sorted({step for _, step in found}, reverse=True)[:keep]
    mine, kept, gone = worker.store.below(f"jobs/{job}"), set[str](), list[Checkpoint]()
    for attempt, step in found:
        with contextlib.suppress(CorruptedError):  # a stranger's record: whoever resumes passes it over
            if (one := leases.read_checkpoint(worker.store, job, attempt, step)) is not None:
                if step in steps:
                    kept |= {ref.sha256 for ref in one.files.values()}
                else:
                    gone.append(one)
    for one in gone:
        worker.store.remove(leases.checkpoint_file(job, one.attempt, one.step))
        for ref in one.files.values():
            if ref.sha256 not in kept:
                mine.remove_object(ref)


def _push(worker: Worker, lease: leases.Lease, space: Path) -> None:
    """Publish what the job made, and say so if another came first with something else."""
    made = sorted(p.relative_to(space).as_posix() for p in space.rglob("*") if p.is_file() and not p.is_symlink())
    files = {path: worker.store.put(space / path) for path in made if jobs.may_leave(lease.job, path)}
    result = Result(job=lease.job, run=worker.run.hash, attempt=lease.attempt, worker=worker.name, files=files)
    jobs.check_result(result)
    standing = leases.publish(worker.store, worker.run, result)
    worker.watch.results[lease.job] = standing
    if lease.job.startswith("branch-"):
        with contextlib.suppress(OutputError):  # the result stands; leftovers cost room, nothing else
            _prune(worker, lease.job, keep=0)
    if standing.worker != worker.name:
        same = "the same bytes" if standing.content == result.content else "OTHER bytes, kept as a rival; theirs stands"
        worker.tell(f"{lease.job}: {standing.worker} had finished it already, with {same}")


def describe(error: OSError) -> str:
    """An operating-system error of this machine, for a person."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error.strerror}: {error.filename or ''}" + ("; free space, or set ANABRANCH_CACHE" if full else "")
