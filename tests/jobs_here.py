"""Jobs of this machine done in the tests' own process. A stage starts each branch as a process, whose imports take several
seconds and its few steps a fraction of one; what such a process does is the same command here.

    with jobs_done_here(): run_stages(run)
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from anabranch import cli, compare
from anabranch import run as stages
from anabranch.errors import BranchFailed
from anabranch.launch.local import Job
from anabranch.mergeability import models
from built_commands import commands_built_once

MODULES: dict[str, Callable[[], None]] = {"anabranch": cli.main, "anabranch.mergeability.models": models.main}


def call(command: list[str]) -> int:
    """`python -m MODULE WORDS` in this process: its exit code. What it said is shown as any test's output."""
    assert command[:2] == [sys.executable, "-m"], command
    with mock.patch.object(sys, "argv", command[2:]), mock.patch.dict(os.environ), commands_built_once():
        try:
            MODULES[command[2]]()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def run_here(jobs: list[Job], *, on_tick: Callable[[list[str], int], None] | None = None, **_: Any) -> None:
    """As launch.local.run_jobs, one after the other."""
    failed = []
    for i, job in enumerate(jobs):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = call(job.command)
        failed += [f"{job.name}: exit code {code}:\n{job.log.read_text()}"] if code else []
        if on_tick is not None:
            on_tick([], i + 1)
    if failed:
        raise BranchFailed.of("jobs failed:", failed)


@contextlib.contextmanager
def jobs_done_here() -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        for module in (stages, compare, models):
            patches.enter_context(mock.patch.object(module, "run_jobs", run_here))
        yield
