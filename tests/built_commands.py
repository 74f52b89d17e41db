"""The command line's tree of commands, built once: typer builds it anew, some 50 ms, whenever a command is called.

    with commands_built_once(): cli.main()
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import typer.main

_built = functools.cache(typer.main.get_command)


@contextlib.contextmanager
def commands_built_once() -> Iterator[None]:
    with mock.patch.object(typer.main, "get_command", _built):
        yield
