"""A model folder before there are numbers in it: the result of a merge as a later merge's plan may look at it."""

from __future__ import annotations

import os
from pathlib import Path

from anabranch.engine.prepare import Prepared
from anabranch.errors import OutputError


def write_outline(folder: Path, prepared: Prepared) -> None:
    """The folder that a merge will make, with the headers of its weight files and holes where numbers come: it takes no
    room on the disk. Its other files are links. Raises OutputError."""
    try:
        folder.mkdir(parents=True)
        for shard in prepared.merge.plan.shards:
            with open(folder / shard.file, "wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        for name, source in prepared.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                (folder / name).write_bytes(source)
            else:
                os.symlink(source.resolve(), folder / name)
    except OSError as error:
        raise OutputError(f"cannot plan the family: {folder}, an outline of a result, cannot be written "
                          f"({error.strerror or error}). Set TMPDIR to a folder on a file system that allows large sparse "
                          "files.") from error
