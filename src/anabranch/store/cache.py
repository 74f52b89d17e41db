"""Downloads on this machine's disk: kept by their hash, shared by all its processes, checked each time they are used.

    CACHE/objects/ab/abcdef..         an object, whole
    CACHE/objects/ab/abcdef...part    its beginning; locked by whoever fetches it

What is needed once is moved out of it (`Store.get`), and what nobody used for UNUSED is removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from anabranch.artifacts import file_digest
from anabranch.errors import OutputError
from anabranch.store.artifacts import FileRef

LARGE = 2**20  # bytes; smaller files are copied, not linked: they are what programs append to
UNUSED = 30 * 86400.0  # seconds


def check_room(folder: Path, needed: int) -> None:
    """Raises OutputError unless the disk of a folder has `needed` bytes free."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise OutputError(f"{folder}: {needed:,} bytes are needed and {free:,} are free on this disk. Free some, or set "
                          "ANABRANCH_CACHE to a folder on another disk; what is there already is kept.")


@functools.cache  # once a process
def sweep(cache: Path) -> None:
    """Remove downloads that nobody read or linked for UNUSED: bases of runs that are over, parts that broke off.

    By this disk's own times: of the last read (where the file system notes it), the last write, and the last link.
    """
    now = time.time()
    for file in (cache / "objects").glob("??/*"):
        with contextlib.suppress(OSError):  # another process sweeps too, or it is not ours
            about = file.stat(follow_symlinks=False)
            if now - max(about.st_atime, about.st_mtime, about.st_ctime) > UNUSED and about.st_nlink == 1:
                file.unlink()


def is_good(cached: Path, ref: FileRef) -> bool:
    """Whether the cache holds the object undamaged. Hashed every time: another program may have written to a linked copy."""
    try:
        return cached.stat().st_size == ref.size and file_digest(cached) == ref.sha256
    except OSError:
        return False


def place(cached: Path, to: Path) -> None:
    """Bring a file of the cache to `to`: linked if large and on the same file system, else copied; whole or not at all."""
    temporary = to.with_name(f".{to.name}.{secrets.token_hex(8)}.partial")
    try:
        try:
            if cached.stat().st_size < LARGE:
                raise OSError(errno.EXDEV, "small files are copied: they are what programs append to")
            os.link(cached, temporary)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            check_room(to.parent, cached.stat().st_size)
            shutil.copyfile(cached, temporary)
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)


def move(part: Path, to: Path) -> None:
    """Bring a finished download to `to`, leaving nothing behind."""
    try:
        os.replace(part, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        place(part, to)
        part.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The file at `path` (made if need be), open to read and append, and locked against other processes and threads."""
    import fcntl

    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise OutputError(f"{path}: cannot be locked ({error.strerror}). Set ANABRANCH_CACHE to a folder on a local "
                                  "disk.") from error
            if not _is_at(path, file):  # its last holder has finished and renamed it
                continue
            try:
                yield file
            finally:
                if os.fstat(file.fileno()).st_size == 0 and _is_at(path, file):
                    os.unlink(path)  # nothing to go on from
            return


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether `path` still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


@contextlib.contextmanager
def telling(to: Path) -> Iterator[None]:
    """Errors of this machine's disk as OutputError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(f"{error.filename2 or error.filename or to}: cannot be written: {error.strerror or error}. "
                          + ("Free some space" if full else "Check the folder")
                          + ", or set ANABRANCH_CACHE to a folder elsewhere: downloads go there first.") from error
