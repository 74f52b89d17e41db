"""Checkpoints of a branch in training, from the workspace into the store, and out of it once they were overtaken."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch import jobs
from anabranch.errors import AnabranchError, CorruptedError
from anabranch.store import leases
from anabranch.store.artifacts import Checkpoint

if TYPE_CHECKING:
    from anabranch.worker import Worker

KEPT_CHECKPOINTS = 2


def furthest(at: Path) -> int:
    """The step of the newest whole checkpoint in a branch's folder, or -1."""
    names = [p.parent.name.removeprefix("checkpoint-") for p in at.glob("checkpoints/checkpoint-*/complete.json")]
    steps = [int(name) for name in names if name.isdecimal()]
    return max(steps, default=-1)


class Pusher:
    """Pushes each checkpoint as it appears, from a thread of its own: a push may take longer than a machine has to live once
    it was told to stop. The last one is pushed after the child has ended."""

    def __init__(self, worker: Worker, lease: leases.Lease, at: Path) -> None:
        self.worker, self.lease, self.at = worker, lease, at
        self.pushed = self.tried = furthest(at)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Pusher:
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
        step = furthest(self.at)
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
    prune(worker, lease.job)
    return True


def prune(worker: Worker, job: str, keep: int = KEPT_CHECKPOINTS) -> None:
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
