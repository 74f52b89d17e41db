"""Where the images of rows lie: folders, zip files, and a spool for those that stand in the rows themselves.

A row holds a `Picture`: what it is called, the hash of its bytes, and where they are read again. Images embedded in rows
(Parquet, data URIs) go to an unnamed temporary file as they are met, each once, so that no more than a row group of them is
ever in memory.

Paths come from the data and are not trusted. A root is a folder or a zip; a path that leads out of it, by `..`, as an
absolute path or over a symbolic link, is refused. Members of a zip are read, never unpacked.

    out/.images.json     path, size, times of change and inode -> SHA-256; SHA-256 -> sides of the image; the paths each source
                         uses, as its rows spell them

spares reading every image again to see that nothing changed, as git's index does: a file of the size, times and inode that are
written there is taken for the same, except where it changed within two seconds before the writing.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from anabranch.artifacts import digest, write_atomically
from anabranch.containers import open_zip
from anabranch.errors import MixtureError, OutputError
from anabranch.formats import encodable
from anabranch.images import FORMATS, MOST_BYTES, MOST_PIXELS, BadImage

SEEN = ".images.json"
RULES = ("missing_image", "broken_image", "huge_image", "animated_image")
FRESH = 2_000_000_000  # nanoseconds: a file may change again without a new time
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
PATH_BYTES = 4096  # more is no path
LIMITS = [2, MOST_BYTES, MOST_PIXELS, list(FORMATS)]  # what sizes were found under


class Outside(ValueError):
    """A path that leads out of the image root."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a row: its name there, the SHA-256 and number of its bytes, and where they lie.

    `place`: (offset,) in the spool; (path,) of a file; (zip, member).
    """

    name: str
    sha256: bytes
    size: int
    place: tuple[int] | tuple[str] | tuple[str, str]


@dataclass(frozen=True)
class Root:
    """Where a file's image paths start: a folder, or `inside` of the zip file `archive` (then at its top)."""

    folder: str = ""
    archive: str = ""
    inside: str = ""
    given: str = ""  # the folder as the recipe calls it: a link on the way may lead elsewhere next time

    @property
    def shown(self) -> str:
        return self.archive or self.folder


def root_of(path: Path) -> Root:
    """The root that a recipe's `images` names. Raises MixtureError."""
    if path.is_dir():
        return Root(folder=os.path.realpath(path), given=str(path))
    if path.is_file() and zipfile.is_zipfile(path):
        return Root(archive=str(path))
    raise MixtureError(f"images: {path} is neither a folder nor a .zip file.")


def data_uri(text: str) -> bytes | None:
    """The bytes of a `data:` URI in base64; None: it is none."""
    head, comma, body = text.partition(",")
    if not (text.startswith("data:") and comma and head.endswith(";base64")):
        return None
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        return None


class Pictures:
    """The images of one mixture. `base`: where the recipe stands; `folder`: of the spool and of what was seen before, or None
    (a temporary folder, and nothing is remembered)."""

    def __init__(self, base: Path, folder: Path | None) -> None:
        self.base, self.folder = base, folder
        self._spool: Any = None
        self._end = 0
        self._kept: dict[bytes, Picture] = {}
        self._archives: dict[str, zipfile.ZipFile] = {}
        self._parents: dict[str, str] = {}
        self._files: dict[str, list[Any]] = {}
        self._used: dict[str, list[str]] = {}
        self._touched: set[str] = set()
        self._met: set[str] = set()
        self.sizes: dict[bytes, tuple[int, int] | tuple[str, str]] = {}
        self._load()

    def close(self) -> None:
        for opened in (self._spool, *self._archives.values()):
            if opened is not None:
                opened.close()
        self._spool, self._archives = None, {}

    # ---- images in the rows themselves ----

    def keep(self, data: bytes) -> Picture:
        """An embedded image, written to the spool unless it is there. Raises OutputError."""
        sha = hashlib.sha256(data).digest()
        if sha not in self._kept:
            self._kept[sha] = Picture("(in the row)", sha, len(data), (self._end,))
            with self.writing():
                if self._spool is None:
                    self._spool = self.temporary()
                left = memoryview(data)
                while left:
                    written = os.pwrite(self._spool.fileno(), left, self._end)
                    left, self._end = left[written:], self._end + written
        return self._kept[sha]

    def start_of(self, value: Any) -> bytes:
        """The first bytes of an image that was embedded in a row; b'' for anything else."""
        if not isinstance(value, Picture) or not isinstance(value.place[0], int):
            return b""
        return os.pread(self._spool.fileno(), min(16, value.size), value.place[0])

    def temporary(self) -> IO[bytes]:
        """A file without a name, which is gone when it is closed or the process ends. Raises OSError."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        return cast(IO[bytes], tempfile.TemporaryFile(dir=self.folder, buffering=0))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises OutputError for an OSError."""
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write images to {self.folder or tempfile.gettempdir()}: {error.strerror or error}. Free "
                              "space or change `output`, then run again.") from error

    # ---- images by path ----

    def find(self, name: str, root: Root) -> Picture:
        """The image that a row calls `name`.

        Raises:
            Outside: the path leads out of the root.
            BadImage: `missing_image`, `huge_image` (more bytes than are read), `broken_image` (a damaged zip member).
        """
        if SCHEME.match(name):
            raise BadImage("missing_image", f"not downloaded: {name[:120]}")
        if name.startswith("data:"):
            raise BadImage("broken_image", f"a data URI that is no base64: {name[:40]}")
        if not encodable(name):
            raise BadImage("missing_image", f"{name[:120]!r} is no text")
        if len(name.encode()) > PATH_BYTES:
            raise BadImage("missing_image", f"{name[:40]!r} and {len(name) - 40:,} characters more are no path. If it is "
                                            "the image in base64, write data:image/png;base64, before it")
        return self._member(name, root) if root.archive else self._file(name, root)

    def _file(self, name: str, root: Root) -> Picture:
        self._touched.add(os.path.join(os.path.relpath(root.given, self.base), name))
        path = self._resolved(name, root.folder)
        sha, size = self._hash(path)
        return Picture(name, sha, size, (path,))

    def _resolved(self, name: str, root: str) -> str:
        """The real path of a regular file inside the root. Raises Outside, BadImage."""
        if "\0" in name:
            raise BadImage("missing_image", f"{name[:120]!r} names no file")
        try:
            path = self._real(os.path.join(root, name))
        except (OSError, UnicodeError) as error:
            raise BadImage("missing_image", f"{name[:120]!r}: {getattr(error, 'strerror', None) or error}") from error
        if not _within(path, root) and path != root:
            raise Outside(name)
        return path

    def _real(self, path: str) -> str:
        """Without links and dots; a folder is looked at once."""
        parent, last = os.path.split(path)
        if last in ("", ".", ".."):
            parent, last = os.path.realpath(path), ""
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent)
        path = os.path.join(self._parents[parent], last).rstrip(os.sep) or os.sep
        return os.path.realpath(path) if os.path.islink(path) else path

    def _hash(self, path: str) -> tuple[bytes, int]:
        """(SHA-256, bytes) of a file. Raises BadImage."""
        label = os.path.relpath(path, self.base)
        if not encodable(label):
            raise BadImage("missing_image", f"{label[:120]!r} is no text")
        self._met.add(label)
        try:
            about = os.stat(path)
            if not stat.S_ISREG(about.st_mode):
                raise BadImage("missing_image", f"{label} is no file")
            if about.st_size > MOST_BYTES:
                raise BadImage("huge_image", f"{about.st_size:,} bytes, at most {MOST_BYTES:,} are read")
            known = self._files.get(label)
            if known is None or known[:-1] != _mark(about):
                with open(path, "rb") as file:
                    known = [*_mark(about), hashlib.file_digest(file, "sha256").hexdigest()]
                self._files[label] = known
            return bytes.fromhex(known[-1]), about.st_size
        except OSError as error:
            raise BadImage("missing_image", f"{label}: {error.strerror or error}") from error

    def _member(self, name: str, root: Root) -> Picture:
        """A member of a zip, looked up beside the rows, then from the top. Raises Outside, BadImage."""
        archive = self.archive(root.archive)
        places = dict.fromkeys(os.path.normpath(os.path.join(start, name)) for start in (root.inside, ""))
        if name.startswith("/") or all(f"{place}/".startswith("../") for place in places):
            raise Outside(name)
        member = next((place for place in places if place in archive.NameToInfo), None)
        shown = os.path.relpath(root.archive, self.base)
        label = f"{shown}\0{member or next(iter(places))}"
        self._touched.add(label)
        if member is None:
            raise BadImage("missing_image", f"{shown} has no member {name[:120]!r}")
        sha, size = self._hash_member(label, root.archive, member)
        return Picture(name, sha, size, (root.archive, member))

    def archive(self, path: str) -> zipfile.ZipFile:
        """An open zip file. Raises MixtureError."""
        if path not in self._archives:
            self._archives[path] = open_zip(path)
        return self._archives[path]

    def _hash_member(self, label: str, archive: str, member: str) -> tuple[bytes, int]:
        size = self.archive(archive).NameToInfo[member].file_size
        about = _mark(os.stat(archive))
        known = self._files.get(label)
        self._met.add(label)
        if known is None or known[:-1] != about:
            data = read_member(self.archive(archive), member)
            known = [*about, hashlib.sha256(data).hexdigest()]
            self._files[label] = known
        return bytes.fromhex(known[-1]), size

    # ---- reading ----

    def read(self, picture: Picture) -> bytes:
        """The encoded image, and the one that was hashed. Raises MixtureError, BadImage."""
        place = picture.place
        if len(place) == 2:
            data = read_member(self.archive(place[0]), place[1])
        elif isinstance(place[0], int):
            data = os.pread(self._spool.fileno(), picture.size, place[0])
        else:
            try:
                data = Path(place[0]).read_bytes()
            except OSError as error:
                raise BadImage("missing_image", f"{picture.name}: {error.strerror or error}") from error
        if hashlib.sha256(data).digest() != picture.sha256:
            if self.folder is not None:
                (self.folder / SEEN).unlink(missing_ok=True)
            raise MixtureError(f"image {picture.name}: its bytes are not those that were there when the rows were read. If "
                               "something is still writing it, wait; then run again.")
        return data

    # ---- what was seen before ----

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Remember the image files that the rows read meanwhile use, as those of the source `key`."""
        self._touched = set()
        yield
        self._used[key] = sorted(self._touched)

    def knows(self, key: str) -> bool:
        return key in self._used

    def digest(self, key: str) -> str | None:
        """SHA-256 (hex) over the names and contents of the image files of a source as they are now; None: it uses none."""
        if not self._used[key]:
            return None
        return digest([[label.replace("\0", "!"), self._now(label)] for label in self._used[key]])

    def _now(self, label: str) -> str:
        name, _, member = label.partition("\0")
        try:
            found = (self._hash_member(label, os.path.normpath(self.base / name), member) if member
                     else self._hash(self._real(os.path.join(self.base, name))))
            return found[0].hex()
        except (BadImage, MixtureError, KeyError, OSError) as error:
            return type(error).__name__

    def whole(self, label: str, path: Path, check: Any) -> bool:
        """Whether `check()` found this file whole, now or when it last had this size and time."""
        try:
            about = path.stat()
        except OSError:
            return False
        label = f"\0{label}"  # no image is called so
        self._met.add(label)
        known = [*_mark(about), "whole"]
        if self._files.get(label) != known and not check():
            return False
        self._files[label] = known
        return True

    def _load(self) -> None:
        """What was seen before; nothing where the file is missing, damaged, or of other rules than today's."""
        if self.folder is None:
            return
        try:
            content = json.loads((self.folder / SEEN).read_text(encoding="utf-8"))
            said = content.pop("checksum")
            if said != digest(content) or content["limits"] != LIMITS or not _well_formed(content):
                return
            sizes = {bytes.fromhex(sha): tuple(size) for sha, size in content["sizes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        self._files, self._used, self.sizes = content["files"], content["used"], sizes

    def save(self, keep: Iterable[str] | None = None) -> None:
        """Write what was seen, less the files that changed a moment ago. Raises OutputError.

        Args:
            keep: the sources that the mixture has; files of others are forgotten. None: it is not known yet.
        """
        if keep is not None:
            self._used = {key: self._used[key] for key in keep}
            self._files = {label: about for label, about in self._files.items() if label in self._met}
        if self.folder is None or not (self._files or self.sizes):
            return
        late = time.time_ns() - FRESH
        content: dict[str, Any] = {
            "limits": LIMITS, "files": {k: v for k, v in self._files.items() if v[1] < late}, "used": self._used,
            "sizes": {sha.hex(): list(size) for sha, size in self.sizes.items()}}
        text = json.dumps(content | {"checksum": digest(content)}, ensure_ascii=False)
        write_atomically(self.folder / SEEN, text.encode())


def _within(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _mark(about: os.stat_result) -> list[int]:
    """What a file is known again by. A copy may bring another file's size and time; not its time of arrival and inode."""
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _well_formed(content: dict[str, Any]) -> bool:
    """Whether what was seen before could have been written by us: the folder may have come from elsewhere."""
    def a_size(size: Any) -> bool:
        if len(size) != 2 or isinstance(size[0], str):
            return len(size) == 2 and size[0] in RULES and isinstance(size[1], str)
        return all(type(side) is int and side > 0 for side in size) and size[0] * size[1] <= MOST_PIXELS

    return (all(len(known) == 5 and all(type(n) is int for n in known[:4]) and re.fullmatch("[0-9a-f]{64}|whole", known[4])
                for known in content["files"].values())
            and all(isinstance(label, str) for labels in content["used"].values() for label in labels)
            and all(a_size(size) for size in content["sizes"].values()))


def read_member(archive: zipfile.ZipFile, name: str, most: int = MOST_BYTES) -> bytes:
    """A member's bytes. What it claims to unpack to is believed only as an upper bound. Raises BadImage."""
    info, shown = archive.NameToInfo[name], f"{name} in {os.path.basename(str(archive.filename))}"  # no machine's folders
    if info.file_size > most:
        raise BadImage("huge_image", f"{shown}: {info.file_size:,} bytes, at most {most:,} are read")
    if info.flag_bits & 1:
        raise BadImage("broken_image", f"{shown} is encrypted")
    try:
        with archive.open(info) as member:
            return member.read(most)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError, RuntimeError) as error:
        raise BadImage("broken_image", f"{shown}: {str(error)[:120]}") from error
