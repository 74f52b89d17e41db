"""How much memory a merge will take, known before it begins and held while it runs.

A worker holds, for each entry of its block, the bytes as read, a float32 copy per input, what the method keeps beside
them, and the rounded result. Methods that run on entries or rows work in blocks as small as the limit asks for; those
that need a whole tensor at once take turns where they would not fit side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anabranch.merge as maths
from anabranch.engine.blocks import block_entries
from anabranch.engine.plan import Step
from anabranch.errors import RecipeError
from anabranch.merge.stack import CHUNK

# Entries of a block when memory is no concern: the float32 copies of a few inputs stay in a core's cache.
ENTRIES = 1 << 18
# What a method keeps beside its inputs, in float32 numbers per entry: so many for each branch, and so many more.
TEMPORARIES = {"entry": (5, 8), "row": (6, 8), "tensor": (12, 18)}
# Interpreter and libraries, where the system does not tell; and what allocators keep without need.
# KERNELS: numba, and what compiling takes the first time.
UNKNOWN, KERNELS, SLACK = 300 * 10**6, 96 * 10**6, 32 * 10**6


@dataclass(frozen=True)
class MemoryPlan:
    """`entries` of a block at most; bytes `taken` before the merge, `room` for it, `needs` of each step by name; whether
    the `fused` kernels may be loaded: they take memory too, and give the same bytes."""

    entries: int
    taken: int
    room: int
    needs: dict[str, int]
    threads: int
    fused: bool

    @property
    def peak(self) -> int:
        """Predicted peak of anonymous memory, bytes."""
        together = sorted(self.needs.values(), reverse=True)[: self.threads]
        return self.taken + min(self.room, sum(together))


def plan_memory(steps: Sequence[Step], memory: int, threads: int, fused: bool) -> MemoryPlan:
    """Block size and needs under a limit of `memory` bytes for the whole process. `fused`: with the kernels, if they fit.

    Raises RecipeError, naming every tensor that cannot be merged within the limit.
    """
    costs = [_bytes_per_entry(s, kind) for s in steps if (kind := kind_of(s)) != "tensor"]
    taken = occupied() + SLACK
    fused = fused and memory - taken - KERNELS >= CHUNK * max(costs, default=1) * max(1, threads)
    taken += KERNELS if fused else 0
    room = max(memory - taken, 0)
    entries = max(CHUNK, min(ENTRIES, room // max(1, threads) // max(costs, default=1) // CHUNK * CHUNK))
    needs = {}
    for step in steps:
        kind = kind_of(step)
        held = min(step.wanted.numel, block_entries(step.wanted.shape, kind, entries))
        needs[step.name] = held * _bytes_per_entry(step, kind)
    tight = [step for step in steps if needs[step.name] > room]
    if not room:
        raise RecipeError(f"--memory {memory / 1e6:,.0f}MB is too little: the program itself takes {taken / 1e6:,.0f} MB. Give "
                          f"--memory {(taken + max(needs.values(), default=0)) / 1e6 + 1:,.0f}MB or more.")
    if tight:
        lines = [f"tensor '{s.name}' {s.wanted.shape}: {s.wanted.method or 'a copy'} needs {needs[s.name] / 1e6:,.0f} MB"
                 for s in tight[:20]]
        lines += [f".. and {len(tight) - 20} more like these"] if len(tight) > 20 else []
        wanted = taken + max(needs.values())
        raise RecipeError.of(f"--memory {memory / 1e6:,.0f}MB is too little: the program itself takes {taken / 1e6:,.0f} MB, "
                             "and these tensors cannot be worked in smaller blocks:",
                             [*lines, f"Give --memory {wanted / 1e6 + 1:,.0f}MB or more, or another merge method."])
    return MemoryPlan(entries, taken, room, needs, threads, fused)


def kind_of(step: Step) -> maths.BlockKind:
    """What a block of this step must hold."""
    if not step.merged:
        return "entry"
    return maths.method_named(step.wanted.method).block_for(dict(step.wanted.arguments))


def _bytes_per_entry(step: Step, kind: maths.BlockKind) -> int:
    if not step.merged:
        return (24 if step.wanted.frozen else 8) * (1 + len(step.wanted.sources))  # frozen numbers are widened to compare them
    method, k = maths.method_named(step.wanted.method), len(step.wanted.branches)
    inputs = len(step.wanted.sources) + k * sum(name in method.inputs for name in ("draws", "fisher"))
    each, more = TEMPORARIES[kind]
    return 4 * (2 * inputs + each * k + more)


def occupied() -> int:
    """Anonymous memory of this process, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return UNKNOWN


@dataclass
class Budget:
    """Room that workers share: one waits until what it needs is free."""

    free: int
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def acquire(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.free >= size)
            self.free -= size

    def release(self, size: int) -> None:
        with self._changed:
            self.free += size
            self._changed.notify_all()
