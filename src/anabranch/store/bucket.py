"""A store in a bucket (S3, Google Cloud Storage) or in memory, through fsspec; and what a failed request means.

Atomic create is a conditional PUT: `If-None-Match: *` (s3fs, `pipe_file(mode="create")`) or `ifGenerationMatch=0` (gcsfs, the
same argument). An "exists" is never trusted alone: a PUT whose answer was lost is repeated by aiohttp (it holds PUT to be
idempotent), by gcsfs and by us, so the name is read back and compared.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import math
import os
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from anabranch.errors import OutputError, RecipeError

_PART = 16 * 2**20  # bytes of an upload's part; S3 takes 10,000 of them, and four are in memory at a time
_MEMORY_LOCK = threading.Lock()  # fsspec's memory file system looks, then writes: not atomic by itself


class Verdict(Enum):
    """What a failed request means."""

    ABSENT = "absent"
    EXISTS = "exists"
    TRANSIENT = "transient"
    DENIED = "denied"
    NO_BUCKET = "no bucket"
    LACKING = "lacking"
    FULL = "full"
    OTHER = "other"


_ERRNO = {
    **dict.fromkeys((errno.ESTALE, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNRESET,
                     errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPIPE, errno.ENOLINK, errno.EHOSTDOWN),
                    Verdict.TRANSIENT),
    errno.ENOSPC: Verdict.FULL, errno.EDQUOT: Verdict.FULL, errno.EROFS: Verdict.DENIED, errno.ENOSYS: Verdict.LACKING,
}
_CODES = {
    "NoSuchBucket": Verdict.NO_BUCKET, "InvalidBucketName": Verdict.NO_BUCKET, "PreconditionFailed": Verdict.EXISTS,
    "NoSuchKey": Verdict.ABSENT, "NotImplemented": Verdict.LACKING,
    **dict.fromkeys(("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "Throttling", "SlowDown",
                     "ThrottlingException", "RequestLimitExceeded", "NoSuchUpload", "InvalidPart"), Verdict.TRANSIENT),
}
_TRANSIENT_TYPES = {  # by name: neither botocore nor aiohttp nor google.auth need be installed
    "HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError", "FSTimeoutError", "ChecksumError",
    "RefreshError", "TransportError", "CredentialRetrievalError", "MetadataRetrievalError", "IncompleteRead",
}
_BUILT_IN = {"FileNotFoundError": Verdict.ABSENT, "FileExistsError": Verdict.EXISTS, "PermissionError": Verdict.DENIED}
_DENIED_TYPES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError",
                 "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError", "NoAuthTokenError"}


def judge(error: BaseException) -> Verdict:
    """What an exception of a file system library (or of the operating system) means."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore's ClientError
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            return _CODES.get(code) or _by_status(status if isinstance(status, int) else int(code) if code.isdecimal() else 400)
        if type(link).__name__ == "HttpError" and str(getattr(link, "code", "")).isdecimal():  # gcsfs
            return _by_status(int(link.code))  # type: ignore[attr-defined]  # looked at in the line above
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _DENIED_TYPES or (isinstance(error, OSError) and str(error).startswith("Forbidden")):  # the latter is gcsfs's
        return Verdict.DENIED
    if kinds & _TRANSIENT_TYPES or isinstance(error, (TimeoutError, asyncio.TimeoutError, ConnectionError)):
        return Verdict.TRANSIENT
    if any(kind.__module__.startswith(("aiohttp", "requests.", "urllib3.")) for kind in type(error).__mro__):
        return Verdict.TRANSIENT
    for name, verdict in _BUILT_IN.items():
        if name in kinds:
            return verdict
    return _ERRNO.get(error.errno or 0, Verdict.OTHER) if isinstance(error, OSError) else Verdict.OTHER


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__


def _by_status(status: int) -> Verdict:
    if status in (408, 409, 423, 425, 429) or (status >= 500 and status != 501):
        return Verdict.TRANSIENT
    return {404: Verdict.ABSENT, 412: Verdict.EXISTS, 401: Verdict.DENIED, 403: Verdict.DENIED, 501: Verdict.LACKING,
            301: Verdict.NO_BUCKET}.get(status, Verdict.OTHER)


def plain(error: BaseException) -> str:
    """One line of an error for people, without the secrets that a library may have put into it."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text.split("?X-Amz-")[0]


class Bucket:
    """The primitives that `files.Store` needs, on an fsspec file system. Nothing here retries; the library's errors go out."""

    def __init__(self, protocol: str, root: str, patience: float) -> None:
        self.protocol, self.root = protocol, root
        self.url = f"{protocol}://{root}"
        # A request is tried once here and again by the store, which knows how long. Only the parts of an upload are tried
        # again one by one by the library: else no large file would ever arrive over a bad line.
        self._files = _file_system(protocol, patience, tries=1)
        self._uploads = _file_system(protocol, patience, tries=5) if protocol == "s3" else self._files

    def create(self, name: str, data: bytes) -> bool:
        try:
            if self.protocol == "memory":
                with _MEMORY_LOCK:
                    self._files.pipe_file(self._path(name), data, mode="create")
            else:
                self._files.pipe_file(self._path(name), data, mode="create")
        except Exception as error:  # every library raises its own kinds: judged
            if judge(error) is not Verdict.EXISTS:
                raise
            return self.holds(name, data)
        return True

    def holds(self, name: str, data: bytes) -> bool:
        return self.read(name, len(data)) == data

    def replace(self, name: str, data: bytes) -> None:
        self._files.pipe_file(self._path(name), data)

    def read(self, name: str, limit: int) -> bytes | None:
        """At most `limit` + 1 bytes (asked as a range, so a larger object is not transferred); None if absent."""
        try:
            return bytes(self._files.cat_file(self._path(name), start=0, end=limit + 1))
        except Exception as error:  # judged
            if judge(error) is Verdict.ABSENT:
                return None
            if _beyond_end(error):
                return b""
            raise

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._files.cat_file(self._path(name), start=start, end=end))

    def size(self, name: str) -> int | None:
        try:
            about = self._files.info(self._path(name))
        except Exception as error:  # judged
            if judge(error) is Verdict.ABSENT:
                return None
            raise
        return int(about["size"]) if about["type"] == "file" else None

    def names(self, folder: str) -> list[str]:
        path = self._path(folder)
        try:
            found = self._files.ls(path, detail=True)
        except Exception as error:  # judged
            if judge(error) is Verdict.ABSENT:
                return []
            raise
        parts = (str(one["name"]).rstrip("/").rpartition("/") for one in found)
        names = {leaf for above, _, leaf in parts if above.strip("/") == path.strip("/")}
        return sorted(name for name in names if name and not name.startswith("."))

    def remove(self, name: str) -> None:
        try:
            self._files.rm_file(self._path(name))
        except Exception as error:  # judged
            if judge(error) is not Verdict.ABSENT:
                raise

    def upload(self, file: Path, name: str) -> int:
        """Returns the bytes sent."""
        size = file.stat().st_size
        part = max(_PART, math.ceil(size / 9000))
        limits = {"s3": {"chunksize": part, "max_concurrency": 4}, "gs": {"chunksize": math.ceil(part / 2**18) * 2**18}}
        self._uploads.put_file(str(file), self._path(name), **limits.get(self.protocol, {}))
        return size

    def is_near(self, to: Path) -> bool:
        return False

    def fetch_near(self, name: str, to: Path) -> str:
        raise NotImplementedError("`is_near` says no, so nobody asks a bucket for it")

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def _beyond_end(error: BaseException) -> bool:
    """416: a range of an empty object."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
            return True
        if str(getattr(link, "code", "")) == "416":  # gcsfs
            return True
    return False


def _file_system(protocol: str, patience: float, tries: int) -> Any:
    """An fsspec file system of our own: no listing is ever cached, and no other code's instance is shared."""
    import fsspec

    common: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    seconds = min(15.0, max(0.25, patience / 4))
    try:
        if protocol == "s3":
            made = fsspec.filesystem("s3", **common, config_kwargs={
                "connect_timeout": min(5.0, seconds), "read_timeout": seconds, "max_pool_connections": 32,
                "retries": {"total_max_attempts": tries, "mode": "standard"}})
            made.retries = 1  # s3fs's own, around botocore's
            return made
        if protocol == "gs":
            core = importlib.import_module("gcsfs.core")  # the default class asks a second API (gRPC) about the bucket, too
            import aiohttp

            logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # it logs every failed try with its traceback
            # It tries six times by itself, half a minute in all; that cannot be set.
            limits = aiohttp.ClientTimeout(sock_connect=min(5.0, seconds), sock_read=seconds)
            return core.GCSFileSystem(**common, requests_timeout=limits)
        return fsspec.filesystem(protocol, **common)
    except ImportError as error:
        package, extra = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}[protocol]
        raise RecipeError(f"{protocol}:// needs {package}, which is not installed: pip install 'anabranch[{extra}]'") from error
    except Exception as error:  # gcsfs looks for credentials at once, and raises what its libraries raise
        raise OutputError(f"{protocol}://: cannot be opened: {plain(error)}. Check the credentials of this machine.") from error

