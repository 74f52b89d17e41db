"""Work that is done, one JSON line each, beside a result under way: a run that was killed goes on where it was.

    {"key": ".."}                      what all of it was made from; a journal of anything else is begun anew
    {"name": "..", "value": ..}        one piece of work

A line is appended and handed to the system as soon as its work is done. The last one may be torn; it is dropped.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anabranch.errors import OutputError


class Journal:
    """Open it with `with`. `done`: name -> value of what an earlier run left; without a path nothing is kept.

    Raises OutputError where it cannot be read or written.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.done: dict[str, Any] = {}
        self._file: Any = None

    def __enter__(self) -> Self:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "a+b")
                self._take_over()
            except OSError as error:
                raise self._failed(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with suppress(OSError):  # what a full disk does not take is done again
                self._file.close()

    def add(self, name: str, value: Any) -> None:
        """Note that a piece of work is done. `value` comes back from JSON as it went in: floats to the last bit."""
        self._append({"name": name, "value": value})

    def _take_over(self) -> None:
        """Read the whole lines; cut off what follows them, or everything if it is of other work."""
        self._file.seek(0)
        sound = 0
        for number, line in enumerate(self._file):
            try:
                entry = json.loads(line)
                whole = line.endswith(b"\n")
                mine = whole and (entry == {"key": self.key} if number == 0 else entry.keys() == {"name", "value"})
            except (ValueError, AttributeError):
                mine = False
            if not mine:
                break
            sound += len(line)
            if number:
                self.done[entry["name"]] = entry["value"]
        self._file.truncate(sound)
        if not sound:
            self._append({"key": self.key})

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror or error}. Free space or choose another output, "
                           "then run the same command again: finished work is kept.")
