"""Commands on this machine, a few at a time, each a process group of its own with a log."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import BranchFailed
from anabranch.launch.logs import end_of_log
from anabranch.processes import LEAVE_SECONDS, signal_group


@dataclass(frozen=True)
class Job:
    """One command. `log` is appended to; `needs` are the names of jobs that must have ended well before it starts."""

    name: str
    command: list[str]
    log: Path
    needs: tuple[str, ...] = ()


def run_jobs(jobs: list[Job], *, max_parallel: int = 1, threads: int | None = None,
             on_tick: Callable[[list[str], int], None] | None = None) -> None:
    """Run every job, once its `needs` ended well; others go on when one fails, so that finished work is never thrown away.

    A need that is not among `jobs` counts as done.

    Args:
        threads: CPU threads per job; None shares the cores. Two processes that both take every core spin
            against each other and lose a factor of two.
        on_tick: told (names of running jobs, jobs finished) about twice a second.
    Raises:
        BranchFailed: naming every job that failed and what waited for it, with the end of its log.
        KeyboardInterrupt: after the jobs were told to stop (SIGTERM: they save a checkpoint) and have ended; a second one
            meanwhile kills them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads or max(1, cores // max_parallel)), "TOKENIZERS_PARALLELISM": "false",
        "ANABRANCH_LAUNCHER_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    waiting, failed, well, names = list(jobs), list[str](), set[str](), {job.name for job in jobs}
    running: dict[str, tuple[Job, subprocess.Popen[bytes], int]] = {}
    try:
        while running or _ready(waiting, well, names):
            for job in _ready(waiting, well, names)[:max_parallel - len(running)]:
                waiting.remove(job)
                taken = {slot for _, _, slot in running.values()}
                slot = next(i for i in range(max_parallel) if i not in taken)
                running[job.name] = (job, _start(job, environment, slot), slot)
            for name, (job, process, _) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    if code:
                        failed.append(f"{name}: exit code {code}; the end of {job.log}:\n{end_of_log(job.log)}")
                    else:
                        well.add(name)
            if on_tick:
                on_tick(list(running), len(jobs) - len(waiting) - len(running))
            time.sleep(0.2)
    except BaseException:
        _stop([process for _, process, _ in running.values()])
        raise
    failed += [f"{job.name}: not started, it needs {', '.join(n for n in job.needs if n in names - well)}" for job in waiting]
    if failed:
        raise BranchFailed.of(f"{len(failed)} of {len(jobs)} jobs failed; the others' work is kept. Mend the cause and "
                              "run the same command again:", failed)


def _ready(waiting: Sequence[Job], well: set[str], names: set[str]) -> list[Job]:
    return [job for job in waiting if all(need in well or need not in names for need in job.needs)]


def _start(job: Job, environment: dict[str, str], slot: int) -> subprocess.Popen[bytes]:
    """Each slot sees one GPU, where there are several: a trainer that sees more wants a launcher of its own."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    gpus = _gpus()
    if gpus:
        environment = environment | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    with open(job.log, "ab") as log:
        return subprocess.Popen(job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)


def _gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [g for g in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if g]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _stop(processes: list[subprocess.Popen[bytes]], grace: float = LEAVE_SECONDS) -> None:
    for process in processes:
        signal_group(process, signal.SIGTERM)
    deadline, told = time.monotonic() + grace, time.monotonic() + 2.0
    try:
        while any([process.poll() is None for process in processes]) and (now := time.monotonic()) < deadline:
            if now > told:
                told = deadline
                logging.getLogger("anabranch").warning("The jobs were told to save and stop, and have %.0f s for it. Ctrl-C "
                                                       "again ends them at once: what they saved before is kept.", grace)
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass  # whoever asks twice will not wait
    for process in processes:
        if process.poll() is None:
            signal_group(process, signal.SIGKILL)
            process.wait()
