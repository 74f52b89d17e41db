"""Files of rows -> raw rows: JSON, JSONL, CSV, Parquet; packed by gzip or zstd, or in a zip."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from anabranch.errors import MixtureError

CONTAINERS = (".json", ".jsonl", ".csv")
SUFFIXES = (*CONTAINERS, ".parquet", *(c + z for c in CONTAINERS for z in (".gz", ".zst")))
ZIP = ".zip"  # holds such files, and images
MOST_UNZIPPED = 2**32  # bytes of a file of rows in a zip


def read_rows(path: Path, member: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file: lines of JSONL, elements of JSON, records of CSV below the header, Parquet rows.

    Args:
        member: of a zip file; '': the file itself (of a zip: all its members of rows, one after the other).
    Raises:
        MixtureError: with the file, and the line where there is one.
    """
    import zstandard

    if path.name.endswith(ZIP) and not member:
        for each in members(path):
            yield from read_rows(path, each)
        return
    shown, full = (f"{path}!{member}", member) if member else (str(path), path.name)
    name = full.removesuffix(".gz").removesuffix(".zst")
    try:
        with _unzipped(path, member) if member else open(path, "rb") as raw:
            if name.endswith(".parquet"):
                yield from _parquet(raw if member else path, shown)
                return
            with _decompressed(raw, full) as stream:
                text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="" if name.endswith(".csv") else None)
                yield from (_csv if name.endswith(".csv") else _jsonl if name.endswith(".jsonl") else _json)(text, shown)
    except UnicodeDecodeError as error:
        raise MixtureError(f"{shown}: not UTF-8 text ({error.reason}). Convert it, then run again.") from error
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, zstandard.ZstdError, csv.Error) as error:
        raise MixtureError(f"{shown}: damaged or cut short ({error}). Fetch it again.") from error
    except (OSError, NotImplementedError) as error:
        raise MixtureError(f"{shown}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def open_zip(path: Path | str) -> zipfile.ZipFile:
    """Raises MixtureError."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise MixtureError(f"{path}: not a readable zip file ({error}). Fetch it again.") from error


def members(path: Path) -> list[str]:
    """The files of rows in a zip: those of the folder nearest to its top that has any. Raises MixtureError."""
    with open_zip(path) as archive:
        names = [i.filename for i in archive.infolist() if i.filename.endswith(SUFFIXES)]
    names = [n for n in names if not n.startswith("__MACOSX/") and not n.rsplit("/", 1)[-1].startswith(".")]
    if not names:
        raise MixtureError(f"{path}: the zip holds no file of rows ({' '.join(SUFFIXES)}). If it holds images of rows that lie "
                           "elsewhere, name it under `images`, and the rows' file under `path`.")
    top = min(n.count("/") for n in names)
    return sorted(n for n in names if n.count("/") == top)


@contextlib.contextmanager
def _unzipped(path: Path, member: str) -> Iterator[IO[bytes]]:
    """A member of a zip in an unnamed temporary file, as Parquet is read from its end. Raises MixtureError."""
    with open_zip(path) as archive, tempfile.TemporaryFile() as out:
        info = archive.getinfo(member)
        if info.file_size > MOST_UNZIPPED or info.flag_bits & 1:
            why = "encrypted" if info.flag_bits & 1 else f"{info.file_size:,} bytes; {MOST_UNZIPPED:,} are unpacked at most"
            raise MixtureError(f"{path}!{member}: {why}. Unpack it first.")
        with archive.open(info) as stream:
            shutil.copyfileobj(stream, out, 2**20)
        out.seek(0)
        yield out


def _decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    return _unzstd(raw.read()) if name.endswith(".zst") else raw


def _unzstd(data: bytes) -> io.BytesIO:
    """All frames of a .zst file. zstandard's stream reader would take a file cut short for a shorter one."""
    import zstandard

    out = io.BytesIO()
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        out.write(frame.decompress(data))
        if not frame.eof:
            raise zstandard.ZstdError("it ends inside a frame")
        data = frame.unused_data
    out.seek(0)
    return out


def _jsonl(text: Iterable[str], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MixtureError(f"{path}, line {number}: not JSON ({_told(error)}). Mend the line or take it out.") from error
        yield number, _object(value, f"{path}, line {number}")


def _told(error: ValueError | RecursionError) -> str:
    return "lists or objects nested too deep" if isinstance(error, RecursionError) else str(error)


def _json(text: io.TextIOWrapper, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        value = json.loads(text.read())
    except json.JSONDecodeError as error:
        hint = " One object per line? Then name it .jsonl." if error.msg == "Extra data" else ""
        where = f"{path}, line {error.lineno}"
        raise MixtureError(f"{where}: not JSON ({error.msg}, column {error.colno}).{hint}") from error
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise MixtureError(f"{path}: not JSON that can be read ({_told(error)}).") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        got = f"an object with {', '.join(list(value)[:6])}" if isinstance(value, dict) else type(value).__name__
        raise MixtureError(f"{path}: holds {got}; wanted a list of rows, or an object with such a list under `data`.")
    for number, row in enumerate(value, 1):
        yield number, _object(row, f"{path}, row {number}")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MixtureError(f"{where}: holds {type(value).__name__}, wanted an object with named columns.")
    return value


def _csv(text: Iterable[str], path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters refuses long documents
    reader = csv.DictReader(text, strict=True)
    header = list(reader.fieldnames or [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise MixtureError(f"{path}: the header names {', '.join(map(repr, twice))} more than once.")
    for number, row in enumerate(reader, 1):
        if None in row or any(v is None for v in row.values()):
            raise MixtureError(f"{path}, line {reader.line_num}: another number of fields than the header's "
                               f"{len(header)}. Put fields with commas or line breaks in double quotes.")
        yield number, row


def _parquet(file: IO[bytes] | Path, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        opened = pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)  # else all of a row group is read
        size = 32 if "binary" in str(opened.schema_arrow) else 4096  # images: 32 of 10 MB may be in memory
        for batch in opened.iter_batches(batch_size=size):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise MixtureError(f"{path}: not a readable Parquet file ({reason}). Fetch it again.") from error
