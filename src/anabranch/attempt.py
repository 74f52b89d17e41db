"""One job under its lease: beats, the pull of what it reads, the child that does it, the push of what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch import jobs
from anabranch.artifacts import Mixture, Plan
from anabranch.errors import AnabranchError, CorruptedError, OutputError
from anabranch.exit_codes import PREEMPTED, TRY_AGAIN
from anabranch.launch.logs import end_of_log
from anabranch.processes import signal_group
from anabranch.pushing import Pusher, prune
from anabranch.store import leases
from anabranch.store.artifacts import Beat, End, Result, StoredRun
from anabranch.store.files import Store, fetch_all, put_all

if TYPE_CHECKING:
    from anabranch.worker import Worker

GRACE = 60.0  # seconds that a child has to save after it was told to stop


class Beats:
    """Sends beats from a thread of its own, so that neither a pull nor a push is taken for a death."""

    def __init__(self, worker: Worker, lease: leases.Lease) -> None:
        self.worker, self.lease = worker, lease
        self.doing, self.progress = "start", Path()
        self.lost, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> Beats:
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


def pull(worker: Worker, lease: leases.Lease, space: Path) -> Path | None:
    """Everything the job reads, into `space`; returns where the base is, if it came from the store or was given."""
    run, store, job = worker.run, worker.store, lease.job
    space.mkdir(parents=True)
    (space / "run.json").write_text(run.model_dump_json())
    mixture = _mixture(store, run, space)
    results = {need: _need(worker, need) for need in jobs.all_needs(run, job)}
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


def attend(worker: Worker, lease: leases.Lease, space: Path, base: Path | None, beat: Beats) -> End:
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
        with Pusher(worker, lease, at):
            while (code := child.poll()) is None:
                if (worker.stop.is_set() or beat.lost.is_set()) and not told:
                    told = time.monotonic()
                    signal_group(child, signal.SIGTERM)
                if told and time.monotonic() - told > GRACE:
                    signal_group(child, signal.SIGKILL)
                time.sleep(0.3)
    finally:
        signal_group(child, signal.SIGKILL)  # whatever the child left running
        child.wait()
    return _judge(worker, lease, beat, code, log)


def _judge(worker: Worker, lease: leases.Lease, beat: Beats, code: int, log: Path) -> End:
    """What a child's end means."""
    if beat.lost.is_set():
        return End(attempt=lease.attempt, reason="lost", message="another worker had taken it over")
    if code == 0:
        return End(attempt=lease.attempt, reason="done")
    if worker.stop.is_set() or code == PREEMPTED:
        return End(attempt=lease.attempt, reason="preempted", message="asked to stop")
    tail = end_of_log(log, 25)[-4000:]
    if code == TRY_AGAIN:
        raise OutputError(tail)
    how = f"killed by signal {-code} (9: often out of memory)" if code < 0 else f"exit code {code}"
    return End(attempt=lease.attempt, reason="failed", message=f"on {worker.name}: {how}\n{tail}")


def push(worker: Worker, lease: leases.Lease, space: Path) -> None:
    """Publish what the job made, and say so if another came first with something else."""
    made = sorted(p.relative_to(space).as_posix() for p in space.rglob("*") if p.is_file() and not p.is_symlink())
    files = put_all(worker.store, {path: space / path for path in made if jobs.may_leave(lease.job, path)})
    result = Result(job=lease.job, run=worker.run.hash, attempt=lease.attempt, worker=worker.name, files=files)
    jobs.check_result(result)
    standing = leases.publish(worker.store, worker.run, result)
    worker.watch.results[lease.job] = standing
    if lease.job.startswith("branch-"):
        with contextlib.suppress(OutputError):  # the result stands; leftovers cost room, nothing else
            prune(worker, lease.job, keep=0)
    if standing.worker != worker.name:
        same = "the same bytes" if standing.content == result.content else "OTHER bytes, kept as a rival; theirs stands"
        worker.tell(f"{lease.job}: {standing.worker} had finished it already, with {same}")
