"""When a run will be finished: its jobs laid out over the workers that are seen, at the speeds that are measured. Pure.

Nothing is assumed where nothing is known: a job whose time cannot be told counts as no time at all, and is named, so that
the figure is a lower bound and says of what.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A job as far as time goes.

    needs      names of jobs that must be done before it starts
    running    a worker that is taken to be alive is at it
    seconds    left of it, from now if it is running, else from its start; None: not known
    never      it has failed too often, or cannot be read
    """

    name: str
    needs: tuple[str, ...]
    done: bool = False
    running: bool = False
    seconds: float | None = None
    never: bool = False


@dataclass(frozen=True)
class Finish:
    """seconds    from now until all is done that can be; None: nobody is at work, or no time is known at all
    unknown    jobs whose time is not in it
    blocked    jobs that will not be done, as they, or what they need, have failed
    """

    seconds: float | None
    unknown: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()


def predict_finish(works: Sequence[Work], workers: int) -> Finish:
    """List scheduling: whenever a worker is free it takes the first job, in the order given, whose needs are done.

    Args:
        works: every job; those it needs come before it.
        workers: how many work on from now, the running ones included.
    """
    blocked: set[str] = set()
    for work in works:
        if not work.done and (work.never or any(need in blocked for need in work.needs)):
            blocked.add(work.name)
    open_ones = [w for w in works if not w.done and w.name not in blocked]
    named = tuple(w.name for w in works if w.name in blocked)
    unknown = tuple(w.name for w in open_ones if w.seconds is None)
    if not open_ones:
        return Finish(None if blocked else 0.0, (), named)
    if workers < 1 or len(unknown) == len(open_ones):
        return Finish(None, unknown, named)
    return Finish(_makespan(open_ones, workers), unknown, named)


def _makespan(works: Sequence[Work], workers: int) -> float:
    """Seconds until the last of these jobs ends; jobs that they need and that are not among them are done."""
    left = {w.name for w in works}
    waiting = [w for w in works if not w.running]
    ends = [(w.seconds or 0.0, w.name) for w in works if w.running]
    heapq.heapify(ends)
    now = 0.0
    while ends or waiting:
        for work in [w for w in waiting if not left & set(w.needs)][: max(0, workers - len(ends))]:
            waiting.remove(work)
            heapq.heappush(ends, (now + (work.seconds or 0.0), work.name))
        if not ends:  # what is left needs itself, in a circle: it never starts
            return now
        now, name = heapq.heappop(ends)
        left.discard(name)
    return now


def finish_words(finish: Finish, seen: str) -> list[str]:
    """Lines for a person. `seen`: who is at work, as in '3 workers'; '' for nobody."""
    lines = []
    if finish.blocked:
        lines.append(f"finish     not of {_named(finish.blocked)}: failed, or in need of what has failed")
    if finish.seconds is None:
        if finish.unknown or not finish.blocked:
            lines.append(f"finish     not known: {'nothing is measured yet' if seen else 'nobody is seen at work'}")
    elif finish.unknown and finish.seconds < 1:
        lines.append("finish     not known: of what is left nothing is measured yet")
    elif finish.seconds > 0:
        about = "at least" if finish.unknown else "about"
        lines.append(f"finish     in {about} {duration(finish.seconds)}, with {seen}, at the speeds measured so far")
        if finish.unknown:
            lines.append(f"           not counted, as nothing like it is measured: {_named(finish.unknown)}")
    return lines


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3.4 h', '2.5 days'."""
    for limit, unit, name in ((100, 1, "s"), (5400, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}" if name == "h" else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} days"


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
