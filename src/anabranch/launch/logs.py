"""The end of a log, for a message; and what must not stand in one."""

from __future__ import annotations

import os
import re
from pathlib import Path

# In the name of an environment variable.
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL", re.IGNORECASE)


def end_of_log(path: Path, lines: int = 12, limit: int = 16384) -> str:
    """The last lines of a file, as `indented`; '' where there is none. Reads `limit` bytes at most, however long it is."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, log.seek(0, 2) - limit))
            text = log.read(limit)
    except OSError:
        return ""
    return indented(text, lines)


def indented(text: bytes, lines: int = 12) -> str:
    """The last lines, indented, and redacted: they go into messages that others see."""
    return redacted("\n".join("      " + line for line in text.decode(errors="replace").splitlines()[-lines:]))


def redacted(text: str) -> str:
    """The text with *** for the values of environment variables whose names look like secrets (6 characters or more)."""
    values = {line for name, value in os.environ.items() if SECRET.search(name)
              for line in (value, value.strip(), *value.splitlines()) if len(line) >= 6}
    for value in sorted(values, key=len, reverse=True):  # a secret may hold a shorter one
        text = text.replace(value, "***")
    return text
