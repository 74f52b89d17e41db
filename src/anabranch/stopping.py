"""Being told to stop: a queue's time limit, a preempted machine, a launcher's Ctrl-C, a lost lease.

SIGTERM is what most send; Slurm (and submitit) may send USR1 or USR2, a person SIGINT. All mean: save, and end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from anabranch.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class _AtOnce(BaseException):
    """Unwinds through libraries that catch every Exception."""


@dataclass
class Stop:
    """What has been heard.

    asked     name of the signal, once there was one
    at_once   end where we stand when it comes (loading, waiting); else whoever works looks at `asked`
    """

    asked: str | None = None
    at_once: bool = True

    def hear(self, number: int, _: FrameType | None) -> None:
        first, self.asked = self.asked is None, signal.Signals(number).name
        if first and self.at_once:
            raise _AtOnce
        if not first and number == signal.SIGINT:
            raise KeyboardInterrupt

    def check(self) -> None:
        """For the borders between phases: an exception raised in a library's callback may have been dropped there."""
        if self.asked:
            raise _AtOnce


@contextmanager
def stoppable(what: str) -> Iterator[Stop]:
    """Listen for signals meanwhile; only in a process's main thread can there be any.

    Raises:
        Preempted: `what` was told to stop while `at_once` held: nothing was lost by it.
    """
    stop = Stop()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop.hear) for number in SIGNALS} if main else {}
    try:
        yield stop
    except _AtOnce:
        raise Preempted(f"{what}: told to stop ({stop.asked}) before it took a step; nothing is lost. Run the same command "
                        "again to go on.") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
