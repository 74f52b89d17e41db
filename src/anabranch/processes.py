"""Processes that are started here: told to stop as a group, told when their parent has died, and given time to save."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

# From SIGTERM to SIGKILL, for a launcher's job. These nest: a program of the recipe's has 45 s (trainers/command.py), the
# child that runs it 60 s (worker.py), and then the worker still has a checkpoint of gigabytes to push.
LEAVE_SECONDS = 180.0


def signal_group(process: subprocess.Popen[Any], number: int) -> None:
    """Send a signal to all of a process group that `process` leads; nothing if all of it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _prctl() -> Callable[..., int] | None:
    with contextlib.suppress(OSError, AttributeError):  # a C library without it: who cares also looks at its parent's id
        return ctypes.CDLL(None).prctl
    return None


_PRCTL = _prctl() if sys.platform == "linux" else None  # looked up once: between fork and exec is no time for loading


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent is killed; Linux alone can.

    For a process that has started (a worker under a launcher; a worker's child, whose work nobody else would push), or as
    `preexec_fn` of one that is being started. Strictly it is the parent's *thread* that counts: start it from the main one.
    """
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
