"""A store in a folder of a file system (local disk, NFS, Lustre, ..): whole files or none, and no way out by a symbolic link.

Every path is walked from the root's descriptor, one component at a time, without following symbolic links (openat(2),
O_NOFOLLOW): a link that somebody with write access plants below the root is refused, also one planted between check and use.

Names that begin with `.` are unfinished files of ours and are never listed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from anabranch.errors import CorruptedError, OutputError
from anabranch.store.cache import LARGE, check_room

_BLOCK = 2**20  # bytes per read while copying
_OBJECT_MODE = 0o444  # less the umask: an object never changes, and says so to whoever has it as a link
_OTHERS_WRITE = 0o022
_STALE = 86400.0  # seconds, by the file server's clock alone: an unfinished file this much older than ours is nobody's


class Folder:
    """The primitives that `files.Store` needs, on a folder. Nothing here retries; OSError goes out as it is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def create(self, name: str, data: bytes) -> bool:
        with self._parent(name, make=True) as (folder, leaf):
            temporary = _write_temporary(folder, leaf, data)
            try:
                os.link(temporary, leaf, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                created = True
            except FileExistsError:
                # NFS may repeat a request whose answer was lost and then say "exists" of our own link: count the links.
                created = os.stat(temporary, dir_fd=folder, follow_symlinks=False).st_nlink == 2
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise OutputError(f"{self.root}: this file system has no hard links, so nothing can be created atomically. "
                                      "Put the store on another, or give the bucket's own URL (s3://.., gs://..).") from error
                raise
            finally:
                os.unlink(temporary, dir_fd=folder)
            _flush_folder(folder)
            return created

    def replace(self, name: str, data: bytes) -> None:
        with self._parent(name, make=True) as (folder, leaf):
            temporary = _write_temporary(folder, leaf, data)
            try:
                os.replace(temporary, leaf, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(temporary, dir_fd=folder)
                raise

    def read(self, name: str, limit: int) -> bytes | None:
        """At most `limit` + 1 bytes; None if absent. A larger file is not read at all: its size is asked first."""
        with self._open(name) as file:
            if file is None:
                return None
            if (size := os.fstat(file).st_size) > limit:
                raise CorruptedError(f"{self.root}/{name}: {size:,} bytes where at most {limit:,} make sense. "
                                     "This file was not written by Anabranch; delete it.")
            return _read(file, limit + 1)

    def holds(self, name: str, data: bytes) -> bool:
        return self.size(name) == len(data) and self.read(name, len(data)) == data

    def read_range(self, name: str, start: int, end: int) -> bytes:
        with self._open(name) as file:
            if file is None:
                raise FileNotFoundError(errno.ENOENT, "absent", name)
            os.lseek(file, start, os.SEEK_SET)
            return _read(file, end - start)

    def size(self, name: str) -> int | None:
        with self._open(name) as file:
            return None if file is None else os.fstat(file).st_size

    def names(self, folder: str) -> list[str]:
        try:
            with self._parent(f"{folder}/any", make=False) as (descriptor, _):
                return sorted(name for name in os.listdir(descriptor) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._parent(name, make=False) as (folder, leaf):
            os.unlink(leaf, dir_fd=folder)

    def upload(self, file: Path, name: str) -> int:
        """Hard-linked where that can be (same file system, not small), else copied; there as a whole or not at all.
        Returns the bytes copied."""
        source = Path(os.path.realpath(file))
        copied = 0
        with self._parent(name, make=True) as (folder, leaf):
            temporary = f".{leaf}.{secrets.token_hex(8)}.partial"
            try:
                if not _is_shareable(source, folder) or not _link(source, None, temporary, folder):
                    copied = _copy(source, temporary, folder)
                _flush(temporary, folder)
                _sweep(folder, temporary)
                os.replace(temporary, leaf, src_dir_fd=folder, dst_dir_fd=folder)
            finally:  # rename(2) of two links to one file leaves both
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
            _flush_folder(folder)
        return copied

    def is_near(self, to: Path) -> bool:
        """Whether `to` is on the store's own file system."""
        try:
            return os.stat(self.root).st_dev == os.stat(to.parent).st_dev
        except FileNotFoundError:
            return False

    def fetch_near(self, name: str, to: Path) -> str:
        """Bring an object to `to` (which must not be there), linked or copied; SHA-256 of what was brought.

        Linked only if the file is ours and ours alone to write: others could change it after its hash was taken.
        """
        with self._open(name) as file:
            if file is None:
                raise FileNotFoundError(errno.ENOENT, "absent", name)
            about = os.fstat(file)
            ours = about.st_uid == os.geteuid() and not about.st_mode & _OTHERS_WRITE
            with self._parent(name, make=False) as (folder, leaf):
                linked = about.st_size >= LARGE and ours and _link(leaf, folder, to, None)
            if not linked:
                check_room(to.parent, about.st_size)
            if linked and os.stat(to, follow_symlinks=False).st_ino != about.st_ino:
                raise OSError(errno.EAGAIN, "replaced while it was being read", name)  # asked again
            seen = hashlib.sha256()
            with contextlib.nullcontext() if linked else open(to, "xb") as out:
                while block := os.read(file, _BLOCK):
                    seen.update(block)
                    if out is not None:
                        out.write(block)
            return seen.hexdigest()

    @contextlib.contextmanager
    def _parent(self, name: str, *, make: bool) -> Iterator[tuple[int, str]]:
        """Descriptor of the folder that holds `name`, and the last component."""
        *folders, leaf = name.split("/")
        if make:
            self.root.mkdir(parents=True, exist_ok=True)
        here = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in folders:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=here)
                below = self._enter(here, part, name)
                os.close(here)
                here = below
            yield here, leaf
        finally:
            os.close(here)

    def _enter(self, here: int, part: str, name: str) -> int:
        try:
            return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise CorruptedError(f"{self.root}/{name}: `{part}` is a symbolic link or a file where a folder must be. "
                                     "Nothing below a store may be a link: put a folder there.") from error
            raise

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[int | None]:
        """Descriptor of a plain file, None if there is none."""
        file: int | None = None
        try:
            # Opening the folder makes an NFS client ask the server anew whether the folder changed (close-to-open), which a
            # lookup alone need not: without it a file made elsewhere may stay unseen for 30 s and more.
            with self._parent(name, make=False) as (folder, leaf):
                file = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CorruptedError(f"{self.root}/{name}: a symbolic link, as nothing below a store may be. Delete it."
                                     ) from error
            if error.errno == errno.ENXIO:
                raise CorruptedError(f"{self.root}/{name}: a socket, not a plain file. Delete it.") from error
            raise
        try:
            if file is not None and not stat.S_ISREG(os.fstat(file).st_mode):
                raise CorruptedError(f"{self.root}/{name}: not a plain file. Delete it.")
            yield file
        finally:
            if file is not None:
                os.close(file)


def _read(file: int, count: int) -> bytes:
    blocks = []
    while count > 0 and (block := os.read(file, min(count, 16 * _BLOCK))):
        blocks.append(block)
        count -= len(block)
    return b"".join(blocks)


def _write_temporary(folder: int, leaf: str, data: bytes) -> str:
    """A finished, flushed file with `data` beside `leaf`; its name."""
    temporary = f".{leaf}.{secrets.token_hex(8)}.partial"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        with open(file, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(file)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise
    return temporary


def _link(source: Path | str, source_folder: int | None, to: Path | str, folder: int | None) -> bool:
    """Hard-link, or False where that cannot be (another file system, not permitted, no links there)."""
    try:
        os.link(source, to, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            return False
        raise
    return True


def _copy(source: Path, temporary: str, folder: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    copied = 0
    with open(source, "rb") as stream, open(os.open(temporary, flags, _OBJECT_MODE, dir_fd=folder), "wb") as out:
        while block := stream.read(_BLOCK):
            out.write(block)
            copied += len(block)
    return copied


def _flush(name: str, folder: int) -> None:
    """To the disk: what state names must not be lost with the power."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _flush_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, for folders
            raise


def _is_shareable(source: Path, folder: int) -> bool:
    """Whether a link to the file serves as an object: not small, readable by whoever may read the folder, and not to be written
    by others than its owner (as with umask 002: then it is copied)."""
    about, readers = source.stat(), os.fstat(folder).st_mode & 0o444
    return about.st_size >= LARGE and about.st_mode & readers == readers and not about.st_mode & _OTHERS_WRITE


def _sweep(folder: int, ours: str) -> None:
    """Remove what a killed process left unfinished here long ago. `ours` tells the time, by the file server's clock."""
    names = [name for name in os.listdir(folder) if name.startswith(".") and name.endswith(".partial") and name != ours]
    if not names:
        return
    os.utime(ours, dir_fd=folder)
    now = os.stat(ours, dir_fd=folder, follow_symlinks=False).st_mtime
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if now - os.stat(name, dir_fd=folder, follow_symlinks=False).st_ctime > _STALE:
                os.unlink(name, dir_fd=folder)
