"""One shared folder on a disk, on NFS, in S3 or in Google Cloud Storage: objects by hash, state by atomic create.

    store = open_store("s3://bucket/run")      # or a path, file://, gs://, memory:// (one process)
    ref = store.put(Path("model.safetensors")) # -> objects/ab/abcdef.., uploaded unless it is there
    store.create("jobs/plan/claim-0000.json", b"...")   # True for one caller in the world
    store.get(ref, Path("copy.safetensors"))   # through a cache, resumed, checked by hash

Requests that fail for a moment (timeouts, lost connections, 429, 5xx, throttling, a stale NFS handle, cut-off bodies) are
repeated with growing, jittered pauses for `patience` seconds. Everything that comes back is a stranger's: names are
matched before they are joined, sizes are bounded before reading, objects are checked by their SHA-256.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

from anabranch.artifacts import file_digest
from anabranch.errors import AnabranchError, CorruptedError, OutputError, Preempted, RecipeError, printable
from anabranch.store.artifacts import STATE_LIMIT, FileRef, Files, check_relative
from anabranch.store.bucket import Bucket, Verdict, judge, plain
from anabranch.store.cache import LARGE, check_room, is_good, locked, move, place, sweep, telling
from anabranch.store.folder import Folder

CHUNK = 16 * 2**20  # bytes of one range of a download
_STREAMS = 4  # ranges of one download under way at a time
_AT_ONCE = 8  # small files under way at a time: a bucket takes 50 ms for each, however small
_LAST_PATIENCE, _WORD_AFTER = 20.0, 5.0  # seconds
_PAUSE = (0.1, 5.0)  # seconds: the first pause before a request is repeated, and the longest

Answer = TypeVar("Answer")


class Backend(Protocol):
    """What a kind of storage must be able to do: folder.Folder and bucket.Bucket."""

    url: str

    def create(self, name: str, data: bytes) -> bool: ...
    def replace(self, name: str, data: bytes) -> None: ...
    def read(self, name: str, limit: int) -> bytes | None: ...
    def holds(self, name: str, data: bytes) -> bool: ...
    def read_range(self, name: str, start: int, end: int) -> bytes: ...
    def size(self, name: str) -> int | None: ...
    def names(self, folder: str) -> list[str]: ...
    def remove(self, name: str) -> None: ...
    def upload(self, file: Path, name: str) -> int: ...
    def is_near(self, to: Path) -> bool: ...
    def fetch_near(self, name: str, to: Path) -> str: ...


class Store:
    """A store that is open. Made by `open_store`; usable from several threads at once.

    Attributes:
        url: where it is, for messages; holds no secret.
        patience: seconds that a request is repeated before OutputError; may be changed at any time (a worker that must leave
            within 30 s lowers it).
        requests: how often each kind of request was sent, repeats included.
        cache: the folder of downloads.
        halt: once set, the store is waited for no longer than 20 s more: its user was asked to stop.
        moved: bytes "sent" and "received"; a hard link moves none.
    """

    def __init__(self, backend: Backend, cache: Path, patience: float) -> None:
        self.url = backend.url
        self.patience = patience
        self.requests: dict[str, int] = {}
        self.moved = {"sent": 0, "received": 0}
        self._backend = backend
        self.cache = cache
        self._lock = threading.Lock()
        self.halt: threading.Event | None = None
        self._folder = "objects"
        self._said = float("-inf")

    def below(self, folder: str) -> Store:
        """The same store, with objects of its own below a folder: they are not shared with others, so they may be removed."""
        other = copy.copy(self)
        other._folder = f"{folder}/objects"
        return other

    def _object(self, ref: FileRef) -> str:
        return f"{self._folder}/{ref.sha256[:2]}/{ref.sha256}"

    def create(self, name: str, data: bytes) -> bool:
        """Create a file unless the name is taken; whole or not at all.

        Returns whether the file is this caller's. An answer that was lost is settled by reading back, so of two callers with
        the *same* bytes both may be told True: put a random token in where that matters.
        Raises OutputError if the store does not answer or does not allow it.
        """
        tries = 0

        def once() -> bool:
            nonlocal tries
            tries += 1
            return self._backend.create(name, data) or (tries > 1 and self._backend.holds(name, data))

        created = self._ask("create", name, once)
        self._count_bytes("sent", len(data))
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write a file as a whole, over what was there. For names that one writer owns. Raises OutputError."""
        self._ask("replace", name, lambda: self._backend.replace(name, data))
        self._count_bytes("sent", len(data))

    def read(self, name: str, limit: int = STATE_LIMIT) -> bytes | None:
        """A file's content, None if there is no such file.

        Raises CorruptedError if it has more than `limit` bytes (never more than `limit` + 1 are read), OutputError.
        """
        data = self._ask("read", name, lambda: self._backend.read(name, limit))
        if data is None:
            return None
        self._count_bytes("received", len(data))
        if len(data) > limit:
            raise CorruptedError(f"{self.url}/{name}: more than {limit:,} bytes, which makes no sense there. Anabranch did not "
                                 "write this file; delete it.")
        return data

    def names(self, folder: str) -> list[str]:
        """Plain names in a folder, sorted; [] if there is no such folder. May be stale: what was created a moment ago elsewhere
        may be missing. Hidden (unfinished) files are left out. Raises OutputError."""
        return self._ask("list", folder, lambda: self._backend.names(folder))

    def has(self, ref: FileRef) -> bool:
        """Whether the object is there with its size. Its bytes are not read. Raises OutputError."""
        return self._size(ref) == ref.size

    def put(self, file: Path, ref: FileRef | None = None) -> FileRef:
        """Bring a file into `objects/`, unless an object of that hash and size is there.

        On the same file system as a local store a file of 1 MiB or more is hard-linked: do not change it in place afterwards.

        Args:
            ref: the file's hash and size where the caller has them already; only the size is checked then.
        Raises OutputError if the file cannot be read, changes meanwhile, is not what `ref` says, or the store refuses.
        """
        before = _stamp(file)
        ref = ref or FileRef(sha256=_digest(file), size=before[0])
        if before[0] != ref.size:
            raise OutputError(f"{file}: has {before[0]:,} bytes, and {ref.size:,} were announced. It changed after it was "
                              "hashed: do not write to a file that is being stored.")
        if not self.has(ref):
            name = self._object(ref)
            self._count_bytes("sent", self._upload(file, ref, name))
            if _stamp(file) != before:
                self._ask("remove", name, lambda: self._backend.remove(name))
                raise OutputError(f"{file}: changed while it was stored in {self.url}. Do not write to it meanwhile; run the "
                                  "same command again.")
        return ref

    def get(self, ref: FileRef, to: Path, *, keep: bool = True) -> None:
        """Bring an object to `to` (over what is there), checked by its hash; `to` is whole or not there.

        It goes through a cache (`cache/objects/ab/<sha256>`, shared by all processes of this machine): a download that broke
        off is resumed by ranges, a damaged entry is fetched again. From a local store on the same file system it comes
        without the cache, hard-linked if it has 1 MiB or more: do not change such a file in place.

        Args:
            keep: False: needed once, as the weights of a checkpoint: if it has 1 MiB or more it does not stay in the cache.
        Raises:
            CorruptedError: the store has no such object, or a damaged one.
            OutputError: no space (says how much is needed), not permitted, or the store does not answer.
        """
        with telling(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            name = self._object(ref)
            if self._near(ref, name, to):
                return
            sweep(self.cache)
            cached = self.cache / _cached(ref)
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            kept = keep or ref.size < LARGE
            for _ in range(3):  # another process may throw the entry away between these steps
                with contextlib.suppress(FileNotFoundError):
                    good = is_good(cached, ref)
                    if not good:
                        self._download(ref, name, cached, None if kept else to)
                    if good or kept:
                        place(cached, to)
                    return
            raise OutputError(f"{cached}: vanishes as soon as it is there. Something cleans this folder: set ANABRANCH_CACHE.")

    def read_object(self, ref: FileRef, limit: int = STATE_LIMIT) -> bytes:
        """A small object's bytes, checked by their hash. Raises CorruptedError, OutputError."""
        self._require(ref)
        data = self.read(self._object(ref), limit)
        if data is None or hashlib.sha256(data).hexdigest() != ref.sha256:
            raise self._damaged(ref)
        return data

    def remove(self, name: str) -> None:
        """Remove a state file, if it is there. For what was overtaken, never for a claim, an end or a result."""
        self._ask("remove", name, lambda: self._backend.remove(name))

    def remove_object(self, ref: FileRef) -> None:
        """Remove an object, here and in the cache. For what no other file can name."""
        self.remove(self._object(ref))
        (self.cache / _cached(ref)).unlink(missing_ok=True)

    def probe(self) -> None:
        """Check that the store can be written and that of two creates one fails. Leaves nothing behind. Raises OutputError."""
        name = f"probe-{secrets.token_hex(16)}"
        try:
            first, second = self.create(name, secrets.token_bytes(16)), self.create(name, secrets.token_bytes(16))
        finally:
            with contextlib.suppress(OutputError):  # what is wrong with the store is told by the create
                self._ask("remove", name, lambda: self._backend.remove(name))
        if (first, second) != (True, False):
            raise OutputError(f"{self.url}: creates the same name twice, so two workers could publish the same result. "
                              "It ignores `If-None-Match: *`, as older S3 servers and proxies do. Upgrade it, or use another.")

    def _upload(self, file: Path, ref: FileRef, name: str) -> int:
        """Bytes that were moved. A repeat looks first: the answer to the request that did it may have been lost."""
        tries = 0

        def once() -> int:
            nonlocal tries
            tries += 1
            return ref.size if tries > 1 and self._backend.size(name) == ref.size else self._backend.upload(file, name)

        return self._ask("put", name, once)

    def _near(self, ref: FileRef, name: str, to: Path) -> bool:
        """From a local store on the file system of `to`, without the cache. False: it is not such a store."""
        if not self._backend.is_near(to):
            return False
        self._require(ref)
        temporary = to.with_name(f".{to.name}.{secrets.token_hex(8)}.partial")
        try:
            if self._ask("read", name, lambda: self._backend.fetch_near(name, temporary)) != ref.sha256:
                raise self._damaged(ref)
            os.replace(temporary, to)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _size(self, ref: FileRef) -> int | None:
        name = self._object(ref)
        return self._ask("stat", name, lambda: self._backend.size(name))

    def _require(self, ref: FileRef) -> None:
        """CorruptedError unless the store holds an object of this name and size."""
        size = self._size(ref)
        if size is None:
            raise CorruptedError(f"{self.url}/{self._object(ref)}: there is no such object, but a state file names it. "
                                 "Bring it back from where it was made, or remove the state file that names it.")
        if size != ref.size:
            raise self._damaged(ref, f"it has {size:,} bytes, wanted {ref.size:,}")

    def _damaged(self, ref: FileRef, why: str = "its bytes have another SHA-256 than its name") -> CorruptedError:
        return CorruptedError(f"{self.url}/{self._object(ref)}: damaged: {why}. Delete this object and have it stored again.")

    def _download(self, ref: FileRef, name: str, cached: Path, to: Path | None = None) -> None:
        """Fetch an object into the cache, going on where an earlier download broke off; and, with `to`, out of it."""
        with locked(cached.with_name(cached.name + ".part")) as part:
            if is_good(cached, ref):  # another process was faster
                if to is not None:
                    place(cached, to)
                return
            self._require(ref)
            cached.unlink(missing_ok=True)
            for resumed in (True, False):  # what was resumed, or garbled on its way, gets a second try from nothing
                if not resumed:
                    part.truncate(0)
                if self._fill(ref, name, part) == ref.sha256:
                    part.flush()
                    os.fsync(part.fileno())
                    if to is None:
                        os.replace(part.name, cached)
                    else:
                        move(Path(part.name), to)
                    return
            os.unlink(part.name)
            raise self._damaged(ref)

    def _fill(self, ref: FileRef, name: str, part: BinaryIO) -> str:
        """Complete the part by ranges; its SHA-256. The part is always a beginning of the object, so it can be resumed."""
        have = os.fstat(part.fileno()).st_size
        if have > ref.size:
            part.truncate(0)
            have = 0
        check_room(Path(part.name).parent, ref.size - have)
        part.seek(0)
        seen = hashlib.sha256()
        while block := part.read(2**20):
            seen.update(block)

        def fetch(start: int) -> bytes:
            return self._ask("read", name, lambda: self._whole_range(name, start, min(start + CHUNK, ref.size)))

        starts = list(range(have, ref.size, CHUNK))
        with ThreadPoolExecutor(_STREAMS) as pool:
            ahead = [pool.submit(fetch, start) for start in starts[:_STREAMS]]
            for i in range(len(starts)):
                data = ahead.pop(0).result()
                if i + _STREAMS < len(starts):
                    ahead.append(pool.submit(fetch, starts[i + _STREAMS]))
                part.write(data)
                part.flush()
                seen.update(data)
                self._count_bytes("received", len(data))
        return seen.hexdigest()

    def _whole_range(self, name: str, start: int, end: int) -> bytes:
        data = self._backend.read_range(name, start, end)
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} of {end - start} bytes came")
        return data

    def _ask(self, kind: str, name: str, request: Callable[[], Answer]) -> Answer:
        """Send a request, again and again while the store's trouble looks passing. Raises OutputError."""
        try:
            check_relative(name)
        except ValueError as error:
            raise CorruptedError(f"{name[:200]!r}: not a name inside {self.url}: {error}") from error
        began, pause = time.monotonic(), _PAUSE[0]
        while True:
            with self._lock:
                self.requests[kind] = self.requests.get(kind, 0) + 1
            try:
                return request()
            except AnabranchError:
                raise
            except Exception as error:  # every library raises its own kinds: judged
                verdict = judge(error)
                waited = time.monotonic() - began
                if verdict is not Verdict.TRANSIENT:
                    raise self._refusal(kind, name, verdict, error) from error
                halted = self.halt is not None and self.halt.is_set()
                patience = min(self.patience, _LAST_PATIENCE) if halted else self.patience
                self._say_that_it_waits(waited, patience, error)
                if waited >= patience:
                    raise OutputError(f"the store {self.url} did not answer for {waited:.0f} s: {kind} {name}: {plain(error)}. "
                                      "Check the network and the store, then run the same command again.") from error
            # Jitter keeps hundreds of workers from coming back at the same instant. It reaches no result.
            time.sleep(min(pause, max(0.0, patience - waited)) * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _PAUSE[1])

    def _say_that_it_waits(self, waited: float, patience: float, error: Exception) -> None:
        """Two minutes without a word look like a hang. Once a minute, however many threads wait."""
        if waited > _WORD_AFTER and time.monotonic() - self._said > 60.0:
            self._said = time.monotonic()
            logging.getLogger("anabranch").warning("the store %s does not answer (%s); it is asked again for up to %.0f s",
                                                   self.url, printable(plain(error)), patience)

    def _refusal(self, kind: str, name: str, verdict: Verdict, error: Exception) -> AnabranchError:
        remedy = {
            Verdict.DENIED: "not permitted. A worker must read, write and list here: check the rights, this machine's "
                            "credentials and its clock.",
            Verdict.NO_BUCKET: "there is no such bucket, or it is in another region. Make it, or correct the URL.",
            Verdict.LACKING: "the store cannot do this. It must support atomic create (S3: `If-None-Match: *`).",
            Verdict.FULL: "no space left on the device. Free some, then run the same command again.",
            Verdict.ABSENT: "there is no such folder or bucket, or it has vanished.",
        }.get(verdict, "refused.")
        return OutputError(f"the store {self.url}: {kind} {name}: {remedy} ({plain(error)})")

    def _count_bytes(self, way: str, count: int) -> None:
        with self._lock:
            self.moved[way] += count


def open_store(url: str | Path, *, cache: Path | None = None, patience: float = 120.0) -> Store:
    """Open the store at a path or URL. Nothing is asked of it yet: see `Store.probe`.

    Args:
        url: a folder, file:///folder, s3://bucket/folder, gs://bucket/folder or memory://folder (this process only).
        cache: where downloads are kept; default $ANABRANCH_CACHE or ~/.cache/anabranch.
        patience: seconds that a request is repeated while the store does not answer.
    Raises:
        RecipeError: an unknown protocol, a URL with credentials in it (not repeated in the message), a package missing.
        OutputError: no credentials.
    """
    cache = cache or Path(os.environ.get("ANABRANCH_CACHE") or Path.home() / ".cache" / "anabranch")
    text = str(url)
    if isinstance(url, Path) or "://" not in text:
        return Store(Folder(Path(os.path.realpath(os.path.expanduser(text)))), cache, patience)
    protocol, rest = text.split("://", 1)
    if protocol == "file":
        return Store(Folder(Path(os.path.realpath(_local_path(rest)))), cache, patience)
    if protocol not in ("s3", "gs", "memory"):
        shown = protocol if re.fullmatch(r"[A-Za-z0-9+.-]{1,20}", protocol) else "this"
        raise RecipeError(f"{shown}://: no store of this kind. Known: a folder's path, file://, s3://, gs://, memory://. "
                          "Of others it is not known that they create atomically.")
    return Store(Bucket(protocol, _bucket_path(protocol, text), patience), cache, patience)


def fetch_all(store: Store, files: Files, folder: Path, *, keep: bool = True, stop: threading.Event | None = None,
              told: Callable[[str, int, int], None] = lambda *_: None) -> None:
    """Bring files of a run into a folder that has no links in it; those that are there stay as they are.

    Args:
        keep: as in `Store.get`.
        stop: once set, no further file is begun.
        told: (path, files done, files) as they arrive.
    Raises:
        Preempted: `stop` was set. CorruptedError, OutputError: as `Store.get`; several of a kind in one message.
    """
    def fetch(path: str) -> None:
        if not (folder / path).exists():
            store.get(files[path], folder / path, keep=keep)

    _spread(fetch, {path: ref.size for path, ref in files.items()}, stop, told)


def put_all(store: Store, files: Mapping[str, Path], *, known: Mapping[str, FileRef] | None = None,
            stop: threading.Event | None = None, told: Callable[[str, int, int], None] = lambda *_: None) -> Files:
    """Bring files into `objects/`; path inside a run folder -> its object, in the order of `files`.

    Args:
        known: hashes and sizes of those that were hashed already.
        stop, told: as in `fetch_all`.
    Raises Preempted, OutputError: as `fetch_all` and `Store.put`.
    """
    made: Files = {}

    def put(path: str) -> None:
        made[path] = store.put(files[path], (known or {}).get(path))

    _spread(put, {path: _stamp(file)[0] for path, file in files.items()}, stop, told)
    return {path: made[path] for path in files}


def _spread(work: Callable[[str], None], sizes: Mapping[str, int], stop: threading.Event | None,
            told: Callable[[str, int, int], None]) -> None:
    """Small files several at a time, then large ones one by one: those have several streams each. What is under way when the
    first one fails is waited for, nothing else is begun, and what failed in the same way is told together."""
    over, errors = threading.Event(), []

    def one(path: str) -> None:
        if stop is not None and stop.is_set():
            raise Preempted("asked to stop")
        if not over.is_set():
            work(path)

    small = [path for path, size in sizes.items() if size <= CHUNK]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waits: dict[str, Callable[[], None]] = {path: pool.submit(one, path).result for path in small}
        waits |= {path: functools.partial(one, path) for path in sizes if path not in waits}
        try:
            for done, (path, wait) in enumerate(waits.items(), 1):
                try:
                    wait()
                except AnabranchError as error:
                    over.set()
                    errors.append(error)
                told(path, done, len(sizes))
        finally:
            over.set()  # Ctrl-C: what was not begun never is
    alike = [error for error in errors if type(error) is type(errors[0])]
    if len(alike) == 1 or any(isinstance(error, Preempted) for error in alike):
        raise alike[0]
    if alike:
        raise type(alike[0]).of(f"{len(alike)} files cannot be brought from or to the store:", [str(e) for e in alike[:20]])


def _local_path(rest: str) -> str:
    if not rest.startswith("/"):
        raise RecipeError("file://: wanted file:///absolute/path (three slashes), or the plain path.")
    return rest


def _bucket_path(protocol: str, url: str) -> str:
    """`bucket/folder` of a URL, or RecipeError. The URL is not repeated in a message: it may hold a secret."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise RecipeError(f"{protocol}://: not a URL.") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError(f"{protocol}://: the URL holds credentials or parameters (`@`, `?` or `#`); logs and process lists "
                          "would show it. Give s3://bucket/folder, and credentials by the environment, a profile or a role.")
    path = f"{parts.netloc}{parts.path}".rstrip("/")
    try:
        check_relative(path)
    except ValueError as error:
        raise RecipeError(f"{protocol}://: wanted {protocol}://bucket/folder: {error}") from error
    if protocol != "memory" and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,221}", parts.netloc):
        raise RecipeError(f"{protocol}://: wanted {protocol}://bucket/folder, the bucket in lower case.")
    return path


def _cached(ref: FileRef) -> str:
    return f"objects/{ref.sha256[:2]}/{ref.sha256}"


def _stamp(file: Path) -> tuple[int, int, int]:
    """Size, time of change (ns) and inode: whether a file was touched."""
    try:
        about = file.stat()
    except OSError as error:
        raise OutputError(f"{file}: cannot be stored: {error.strerror}.") from error
    return about.st_size, about.st_mtime_ns, about.st_ino


def _digest(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be stored: {error.strerror}.") from error
