"""The folder that a merge writes: hidden under a temporary name until it is whole, resumable, held by one process.

    OUT.partial/                  everything, until the rename
      .merge-journal.jsonl        first line: which merge this is; then one line per finished tensor, with its hash
      model*.safetensors          full size from the start; tensors are written where the plan puts them, in any order

A line of the journal counts only if the bytes on the disk still have the hash that it names. So nothing need be
flushed while a merge runs, and whatever a kill or a power cut leaves behind is either right or written again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.artifacts import MergeManifest, file_digest, write_atomically
from anabranch.engine.blocks import begin_hash
from anabranch.engine.plan import OutputPlan, Step
from anabranch.errors import CorruptedError, OutputError

MANIFEST = "manifest.json"
JOURNAL = ".merge-journal.jsonl"
# Written for people, who may go on writing it: no part of what the manifest vouches for.
CARD = "README.md"
READ = 1 << 22


@dataclass
class Done:
    """What the journal says of a finished tensor.

    hash      of its dtype, shape and bytes
    inputs    '3 model.norm.weight' (number of the input, tensor) -> its hash, for those first read here
    squares   squared distances from the base: the result's, then each branch's; empty where they were not wanted
    """

    hash: str
    inputs: dict[str, str]
    squares: list[float]


@dataclass
class OutputFolder:
    """The result on its way."""

    out: Path
    plan: OutputPlan
    carried: Mapping[str, Path | bytes]
    done: dict[str, Done] = field(default_factory=dict)
    _files: list[int] = field(default_factory=list)
    _journal: Any = None

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def size(self) -> int:
        """Bytes of the whole result, its manifest aside."""
        return self.plan.size + sum(len(source) if isinstance(source, bytes) else source.stat().st_size
                                    for source in self.carried.values())

    @property
    def written(self) -> int:
        return sum(step.stop - step.start for step in self.plan.steps if step.name in self.done)

    @contextmanager
    def opened(self, key: str) -> Iterator[None]:
        """Hold the temporary folder, take over what an earlier call of the same merge (`key`) left, open its files."""
        with self._locked():
            try:
                with self.writing():
                    self._resume(key)
                    self._check_space()
                    self._open_files()
                yield
            finally:
                for file in self._files:
                    os.close(file)
                self._files.clear()
                if self._journal is not None:
                    with suppress(OSError):  # a full disk takes no last line; that tensor is then made again
                        self._journal.close()

    def write(self, step: Step, at: int, data: np.ndarray) -> None:
        """Bytes of a tensor from its byte `at` on. Any thread may call it."""
        file, position, left = self._files[step.shard], step.start + at, data.data
        while left:
            count = _pwrite(file, left, position)
            left, position = left[count:], position + count

    def finished(self, step: Step, done: Done) -> None:
        """Note that all bytes of a tensor are written."""
        self.done[step.name] = done
        self._journal.write(json.dumps({"name": step.name, **vars(done)}) + "\n")
        self._journal.flush()

    def publish(self, manifest: Callable[[dict[str, str]], MergeManifest]) -> MergeManifest:
        """Side files, manifest (made from the hashes of the side files), and the rename that makes the folder appear."""
        with self.writing():
            for file in self._files:
                os.fsync(file)
            for name, source in self.carried.items():
                write_atomically(self.partial / name, source if isinstance(source, bytes) else source.read_bytes())
            expected = {shard.file for shard in self.plan.shards} | self.carried.keys()
            for path in [p for p in self.partial.rglob("*") if p.is_file()]:
                if path.relative_to(self.partial).as_posix() not in expected | {JOURNAL}:
                    path.unlink()  # left over from a kill
            made = manifest({name: file_digest(self.partial / name) for name in sorted(self.carried) if name != CARD})
            made.save(self.partial / MANIFEST)
            (self.partial / JOURNAL).unlink()
            _flush_folder(self.partial)
            if self.out.is_dir():
                self.out.rmdir()  # an empty one
            os.rename(self.partial, self.out)
            _flush_folder(self.out.parent)
        return made

    def abandon(self) -> None:
        """Nothing of this can be used again."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what the operating system says while writing into one message with the sizes in it."""
        try:
            yield
        except (OSError, OutputError) as error:
            if isinstance(error, OutputError) and error.__cause__ is None:
                raise
            raise OutputError(self._no_room(_reason(error))) from error

    def _no_room(self, reason: str) -> str:
        written, free = self.written, shutil.disk_usage(existing_parent(self.out)).free
        kept = (f" What is written so far ({written:,} bytes) stays in {self.partial} and will be used; delete that "
                "folder if you give up." if written else "")
        return (f"cannot write the merged model {self.out}: {reason}. It needs {self.size:,} bytes, of which "
                f"{self.size - written:,} are still to be written; {free:,} bytes are free there. Free space, "
                f"or choose another output folder, and run the same command again.{kept}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The temporary folder, made, and held against a second merge into it. The lock goes with the process."""
        handle = -1
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.partial, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise OutputError(f"another merge is writing {self.out}. Wait for it, or choose another output folder.") from error
        except OSError as error:
            if handle < 0:
                raise OutputError(self._no_room(_reason(error))) from error
            # A file system without locks: go on unprotected.
        try:
            if not self.partial.is_dir():
                raise OutputError(f"another merge has just finished {self.out}. Run the same command again.")
            if self.out.is_dir() and any(self.out.iterdir()):  # since the caller looked
                with suppress(OSError):
                    self.partial.rmdir()  # empty, where it was made here
                raise OutputError(f"another merge has just finished {self.out}. Run the same command again.")
            yield
        finally:
            os.close(handle)

    def _resume(self, key: str) -> None:
        """Fill `done` from the journal of the temporary folder if it is of this merge; else begin with an empty one."""
        names = {path.name for path in self.partial.iterdir()}
        finished = MANIFEST in names and _is_ours(self.partial / MANIFEST)  # killed between the journal's end and the rename
        if names and JOURNAL not in names and not finished and not all(n.startswith(f".{JOURNAL}") for n in names):
            raise OutputError(f"{self.partial} is needed for writing, and holds files that no merge put there. Move them "
                              "away or choose another output folder.")
        path = self.partial / JOURNAL
        lines = _journal_lines(path)
        if not (lines and lines[0] == {"merge": key}):
            write_atomically(path, (json.dumps({"merge": key}) + "\n").encode())  # first: it marks the folder as ours
            for stale in [p for p in self.partial.iterdir() if p.name != JOURNAL]:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            lines = []
        steps = {step.name: step for step in self.plan.steps}
        for line in lines[1:]:
            with suppress(KeyError, TypeError):
                step = steps[line.pop("name")]
                done = Done(**line)
                if tensor_hash(self.partial / self.plan.shards[step.shard].file, step) == done.hash:
                    self.done[step.name] = done
        kept = [{"merge": key}, *({"name": name, **vars(done)} for name, done in self.done.items())]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._journal = open(path, "a")  # noqa: SIM115 - `opened` closes it

    def _check_space(self) -> None:
        """Counts what files of the folder already occupy."""
        held = sum(p.stat().st_blocks * 512 for p in self.partial.glob("*.safetensors"))
        if self.size - held > shutil.disk_usage(self.partial).free:
            message = self._no_room("the disk has too little space")
            if not self.done:
                self.abandon()
            raise OutputError(message)

    def _open_files(self) -> None:
        for shard in self.plan.shards:
            file = os.open(self.partial / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
            self._files.append(file)
            os.ftruncate(file, shard.size)
            _write_all(file, shard.header, 0)


def tensor_hash(file: Path, step: Step) -> str | None:
    """Hash of a tensor as it stands in a weight file at its step's place; None where the file is too short."""
    hasher = begin_hash(step.wanted.dtype, step.wanted.shape)
    try:
        with open(file, "rb", buffering=0) as handle:
            handle.seek(step.start)
            left = step.stop - step.start
            while left:
                data = handle.read(min(left, READ))
                if not data:
                    return None
                hasher.update(data)
                left -= len(data)
    except FileNotFoundError:
        return None
    return hasher.hexdigest()


def vouched_for(folder: Path) -> dict[str, str]:
    """Tensor -> hash, as a model folder's own manifest has it; empty where no merge of ours made the folder."""
    try:
        return MergeManifest.load(folder / MANIFEST).tensors
    except CorruptedError:
        return {}


def _is_ours(manifest: Path) -> bool:
    try:
        MergeManifest.load(manifest)
    except CorruptedError:
        return False
    return True


def _journal_lines(path: Path) -> list[Any]:
    """The lines that are whole; a kill may have cut the last."""
    lines = []
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            lines.append(json.loads(line))
    return lines


def _write_all(file: int, data: bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        count = _pwrite(file, left, at)
        left, at = left[count:], at + count


def _pwrite(file: int, data: memoryview, at: int) -> int:
    """One system call, which may take less than all of it."""
    return os.pwrite(file, data, at)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def existing_parent(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.exists())


def _reason(error: BaseException) -> str:
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError):
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return "the disk is full" if full else (cause.strerror or str(cause))
    return str(error)
