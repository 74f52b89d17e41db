"""Result files as bytes, JSON and words: what is not a plain file of sensible size, or says a thing twice, is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from anabranch.errors import printable

MOST_QUESTIONS = 10**9
LETTERS = 500


def read_plain(file: Path, most_bytes: int) -> bytes:
    """Raises OSError, ValueError."""
    if not file.is_file():  # opening a named pipe would wait for its other end
        raise ValueError("no plain file")
    if (size := file.stat().st_size) > most_bytes:
        raise ValueError(f"{size:,} bytes, more than such a file has")
    return file.read_bytes()


def parse(data: bytes) -> Any:
    """JSON in UTF-8, 16 or 32, with or without a byte order mark. Raises ValueError, also for a key that stands twice."""
    return json.loads(data, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"`{said(next(k for k in keys if keys.count(k) > 1))}` stands twice in one object")
    return found


def number(value: Any) -> float | None:
    """A finite number, or None: of what is none, NaN, infinite, or too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: Any) -> int | None:
    """How many questions, if the value can be that."""
    found = number(value)
    return int(found) if found is not None and found == int(found) and 0 < found <= MOST_QUESTIONS else None


def said(text: Any, letters: int = LETTERS) -> str:
    """Somebody else's words as one line that can be shown and stored: no control characters, no lone surrogates."""
    line = " ".join(printable(str(text)[: 4 * letters]).split())
    return line.encode("utf-8", "replace").decode()[:letters]
