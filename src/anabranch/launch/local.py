"""Commands on this machine, a few at a time, each a process group of its own with a log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import BranchFailed


@dataclass(frozen=True)
class Job:
    """One command. `log` is appended to; `needs` are the names of jobs that must have ended well before it starts."""

    name: str
    command: list[str]
    log: Path
    needs: tuple[str, ...] = ()


def run_jobs(jobs: list[Job], *, max_parallel: int = 1, threads: int | None = None,
             on_tick: Callable[[list[str], int], None] | None = None) -> None:
    """Run every job; others go on when one fails, so that finished work is never thrown away.

    Args:
        threads: CPU threads per job; None shares the cores. Two processes that both take every core spin
            against each other and lose a factor of two.
        on_tick: told (names of running jobs, jobs finished) about twice a second.
    Raises:
        BranchFailed: naming every job that failed, with the end of its log.
        KeyboardInterrupt: after the jobs were told to stop (SIGTERM: they save a checkpoint) and have ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads or max(1, cores // max_parallel)), "TOKENIZERS_PARALLELISM": "false",
        "ANABRANCH_LAUNCHER_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    waiting, failed = list(jobs), []
    running: dict[str, tuple[Job, subprocess.Popen[bytes], int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max_parallel:
                job, taken = waiting.pop(0), {slot for _, _, slot in running.values()}
                slot = next(i for i in range(max_parallel) if i not in taken)
                running[job.name] = (job, _start(job, environment, slot), slot)
            for name, (job, process, _) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    if code:
                        failed.append(f"{name}: exit code {code}; the end of {job.log}:\n{_tail(job.log)}")
            if on_tick:
                on_tick(list(running), len(jobs) - len(waiting) - len(running))
            time.sleep(0.2)
    except BaseException:
        _stop([process for _, process, _ in running.values()])
        raise
    if failed:
        raise BranchFailed.of(f"{len(failed)} of {len(jobs)} jobs failed; the others' work is kept. Mend the cause and "
                              "run the same command again:", failed)


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


def _stop(processes: list[subprocess.Popen[bytes]], grace: float = 60.0) -> None:
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _tail(path: Path, lines: int = 12) -> str:
    text = path.read_text(errors="replace").splitlines()
    return "\n".join("      " + line for line in text[-lines:])
