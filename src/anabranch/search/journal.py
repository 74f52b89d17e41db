"""The journal of a search: one line per scored candidate, added at once, read again after a kill.

    {"search": {name: hash, ..}}                                               first line: which search this is
    {"arm": "search", "n": 0, "vector": [..], "score": 1.2, "objectives": {..}, "units": {..}, "seconds": .., "failed": null}

A line that a kill cut short is dropped; so is everything that does not end in a newline. A journal without candidates holds
nothing to lose, and is begun anew by any search.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.artifacts import write_atomically
from anabranch.errors import CorruptedError, OutputError

JOURNAL = "journal.jsonl"
ARMS = ("search", "random")


@dataclass(frozen=True)
class Line:
    """One candidate. `score` is None where it could not be merged or scored; `failed` says why."""

    arm: str
    n: int
    vector: list[Any]
    score: float | None
    objectives: dict[str, float]
    units: dict[str, float]
    seconds: float
    failed: str | None = None


@dataclass
class Journal:
    """An opened journal. `lines` in the order in which they were written."""

    path: Path
    lines: list[Line] = field(default_factory=list)

    def of(self, arm: str) -> list[Line]:
        return [line for line in self.lines if line.arm == arm]

    def add(self, line: Line) -> None:
        """On the disk when this returns. Raises OutputError."""
        text = json.dumps(vars(line)) + "\n"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                data = memoryview(text.encode())
                while data:
                    data = data[os.write(handle, data):]
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}). What it holds is kept: free space and run "
                              "the same command again.") from error
        self.lines.append(line)


@contextmanager
def opened(folder: Path, search: Mapping[str, str]) -> Iterator[Journal]:
    """The journal in `folder`, held against a second search in it. `search`: what makes it this search.

    Raises:
        OutputError: another process writes it, or it has candidates of another search.
        CorruptedError: a line that ends in a newline and is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another search is writing {folder}. Wait for it, or choose another OUT.") from error
        except OSError:
            pass  # a file system without locks: go on unprotected
        yield _read(folder / JOURNAL, search)
    finally:
        os.close(handle)


def _read(path: Path, search: Mapping[str, str]) -> Journal:
    data = b""
    with suppress(FileNotFoundError):
        data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if not lines:
        write_atomically(path, _header(search))
        return Journal(path)
    try:
        said = json.loads(lines[0])["search"]
        read = [_line(json.loads(line)) for line in lines[1:]]
        if not isinstance(said, dict):
            raise ValueError("no `search` in the first line")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptedError(f"{path}: not the journal of a search ({error}). Remove it to search anew.") from error
    differing = [f"{name}: other than when it was begun" for name in sorted(said.keys() | search.keys())
                 if said.get(name) != search.get(name)]
    if differing and not read:
        write_atomically(path, _header(search))
        return Journal(path)
    if differing:
        raise OutputError.of(f"{path} is the journal of another search. Choose another OUT, or remove it (what it found is "
                             "lost); nothing was changed.", differing)
    if len(whole) < len(data):
        write_atomically(path, whole)
    return Journal(path, read)


def _header(search: Mapping[str, str]) -> bytes:
    return (json.dumps({"search": dict(search)}) + "\n").encode()


def _line(value: Any) -> Line:
    """Raises ValueError or TypeError for what `Journal.add` cannot have written."""
    line = Line(**value)
    numbers = [line.seconds, *line.objectives.values(), *line.units.values(), *([] if line.score is None else [line.score])]
    if (line.arm not in ARMS or type(line.n) is not int or type(line.vector) is not list
            or any(type(v) not in (int, float) for v in numbers) or (line.score is None) != isinstance(line.failed, str)
            or (line.score is not None and not (math.isfinite(line.score) and line.objectives))):
        raise ValueError(f"no candidate: {str(value)[:200]}")
    return line
