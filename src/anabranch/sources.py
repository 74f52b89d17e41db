"""Files and Hub datasets -> rows of one shape, grouped by unit.

Whatever a source holds (prompt/completion, instruction/output, `messages`, ShareGPT `conversations`, plain text)
becomes a list of {role, content} messages. A source that cannot be read is an error; a row that cannot be used is left
out and named with its place. Nothing is trimmed, mended or guessed.

Images come in by the same door: `to_messages` sees the whole raw row, so a further column is a further field of Row.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, cast

from anabranch.artifacts import canonical, digest, file_digest
from anabranch.errors import MixtureError, closest
from anabranch.recipe import Source

Messages = list[dict[str, str]]
Split = Literal["train", "held_out"]
# format -> the columns it needs, in the order of detection; `text` is never guessed
FORMATS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output"),
           "prompt_completion": ("prompt", "completion"), "text": ("text",)}
COLUMNS = ("prompt", "completion", "instruction", "input", "output", "messages", "conversations", "text")
ACCEPTED = ("prompt + completion (or response), instruction + output (+ input), messages, conversations; or text "
            "with `format: text`")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
         "model": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool"}
CONTAINERS = (".json", ".jsonl", ".csv")
SUFFIXES = (*CONTAINERS, ".parquet", *(c + z for c in CONTAINERS for z in (".gz", ".zst")))


@dataclass(frozen=True)
class Row:
    """One usable row: where it stands ('file:row') and what it says. A text row is one message of role 'text'."""

    where: str
    messages: Messages

    @cached_property
    def key(self) -> bytes:
        """Equal for rows of equal text, 32 bytes."""
        return hashlib.sha256(canonical([[m["role"], m["content"]] for m in self.messages])).digest()

    @property
    def prompt(self) -> str:
        """What stands before the first answer to a user (a text row: all of it), contents joined by newlines."""
        parts, asked = [], False
        for message in self.messages:
            if asked and message["role"] == "assistant":
                break
            asked = asked or message["role"] == "user"
            parts.append(message["content"])
        return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that a rule leaves out."""

    split: Split
    rule: str
    where: str
    why: str


@dataclass
class UnitRows:
    """The rows of one unit before any token is made."""

    name: str
    source: str
    format: str
    settings: Source
    train: list[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def side(self, split: Split) -> list[Row]:
        return self.train if split == "train" else self.held_out


@dataclass(frozen=True)
class Located:
    """Where a source's rows lie: files by the name that messages use, or a Hub dataset that is already loaded."""

    files: list[tuple[str, Path]]
    dataset: Any = None
    name: str = ""

    def digest(self) -> str:
        """SHA-256 (hex) of the content, and of the files' names as the recipe sees them."""
        if self.dataset is None:
            return digest([[label, file_digest(path)] for label, path in self.files])
        whole = hashlib.sha256()
        for row in self.dataset:
            whole.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        return whole.hexdigest()


# ---- finding ---------------------------------------------------------------------------------------------------------


def locate(path: str, source: Source, split: str, folder: Path) -> Located:
    """The files behind a path, a folder or a glob; or the Hub dataset of that name.

    Args:
        path: `source.path`, or the path of its held-out rows.
        split: of a Hub dataset.
        folder: where the recipe stands: files are called by their path from there.
    Raises:
        MixtureError: nothing there, nothing readable there, or no such dataset to be had.
    """
    here = Path(path)
    if here.is_dir():
        found = sorted(p for p in here.iterdir() if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
        if not found:
            raise MixtureError(f"{path}: the folder has no {' '.join(SUFFIXES)} file. Name a file or a glob such as "
                               f"{here / '**' / '*.parquet'}.")
    elif here.is_file():
        found = [here]
    elif any(c in path for c in "*?["):
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
        if not found:
            raise MixtureError(f"{path}: no file matches.{_near(folder / here)}")
    elif is_hub_id(path) and not ("/" in path and (folder / here).parent.is_dir()):
        return Located([], load_hub(path, source, split), path.rsplit("/", 1)[-1])
    else:
        raise MixtureError(f"{path}: no such file or folder.{_near(folder / here)}")
    unknown = [p.name for p in found if not p.name.endswith(SUFFIXES)]
    if unknown:
        raise MixtureError(f"{path}: {', '.join(unknown[:5])}: not a kind of file that is read here. Wanted one of "
                           f"{' '.join(SUFFIXES)}.")
    return Located([(label_of(p, folder), p) for p in found])


def label_of(path: Path | str, folder: Path) -> str:
    """A path as seen from the recipe's folder, so that no machine's folders stand in an artifact."""
    return Path(os.path.relpath(path, folder)).as_posix()


def is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)) and not path.endswith(SUFFIXES)


def load_hub(path: str, source: Source, split: str) -> Any:
    """A split of a Hub dataset; code in the dataset is never run. Raises MixtureError."""
    from datasets import load_dataset

    try:
        return load_dataset(path, source.config, split=split, revision=source.revision)
    except Exception as error:  # the client raises a dozen types for "cannot"; its message is what helps
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        asked = "".join(f", {k} {v!r}" for k, v in (("config", source.config), ("split", split),
                                                   ("revision", source.revision)) if v)
        raise MixtureError(f"{path}: neither a file here nor a dataset to be had from the Hub{asked} "
                           f"({type(error).__name__}: {reason}). Check the name and the network; without a network "
                           "download the dataset's files first and give their path.") from error


def _near(path: Path) -> str:
    """What stands nearby, for the end of a message about a missing file."""
    folder = next(p for p in path.parents if p.is_dir() and not any(c in p.name for c in "*?["))
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    wanted = path.relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5) or names[:6]
    more = ", .." if len(near) < len(names) else ""
    return f" {folder} holds {', '.join(near)}{more}." if near else f" {folder} is empty."


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file: lines of JSONL, elements of JSON, records of CSV below the header, Parquet rows.

    Raises:
        MixtureError: with the file, and the line where there is one.
    """
    import zstandard

    name = path.name.removesuffix(".gz").removesuffix(".zst")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
            return
        with open(path, "rb") as raw, _decompressed(raw, path.name) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="" if name.endswith(".csv") else None)
            if name.endswith(".csv"):
                yield from _csv(text, path)
            elif name.endswith(".jsonl"):
                yield from _jsonl(text, path)
            else:
                yield from _json(text, path)
    except UnicodeDecodeError as error:
        raise MixtureError(f"{path}: not UTF-8 text ({error.reason}). Convert it, then run again.") from error
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError, csv.Error) as error:
        raise MixtureError(f"{path}: damaged or cut short ({error}). Fetch it again.") from error
    except OSError as error:
        raise MixtureError(f"{path}: cannot be read ({error.strerror or error}).") from error


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


def _jsonl(text: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise MixtureError(f"{path}, line {number}: not JSON ({error}). Mend the line or take it out.") from error
        yield number, _object(value, f"{path}, line {number}")


def _json(text: io.TextIOWrapper, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        value = json.loads(text.read())
    except json.JSONDecodeError as error:
        hint = " One object per line? Then name it .jsonl." if error.msg == "Extra data" else ""
        where = f"{path}, line {error.lineno}"
        raise MixtureError(f"{where}: not JSON ({error.msg}, column {error.colno}).{hint}") from error
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


def _csv(text: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise MixtureError(f"{path}: not a readable Parquet file ({reason}). Fetch it again.") from error


# ---- formats ---------------------------------------------------------------------------------------------------------


class Malformed(ValueError):
    """A row that says nothing usable, and why."""


def detect_format(columns: set[str], mapped: Mapping[str, str], wanted: str) -> str:
    """The format of rows with these columns (already under our names).

    Args:
        mapped: the recipe's `columns`; a format that uses one of them goes first.
        wanted: the recipe's `format`.
    Raises:
        MixtureError: what was found and what would do.
    """
    have = columns | ({"completion"} if "response" in columns else set())
    found = ", ".join(sorted(columns)) or "none"
    if wanted != "auto":
        missing = [c for c in FORMATS[wanted] if c not in have]
        if missing:
            raise MixtureError(f"format {wanted} needs {' and '.join(f'`{c}`' for c in missing)}; columns found: "
                               f"{found}. Map under `columns`, as in columns: {{{missing[0]}: its name in the file}}.")
        return wanted
    fitting = [f for f, needs in FORMATS.items() if f != "text" and set(needs) <= have]
    fitting.sort(key=lambda f: not set(mapped) & set(FORMATS[f]))  # stable: else the order of FORMATS
    if not fitting:
        raise MixtureError(f"no format fits the columns found: {found}. Accepted: {ACCEPTED}. Name them under "
                           "`columns`, as in columns: {prompt: question, completion: answer}.")
    return fitting[0]


def to_messages(row: Mapping[str, Any], form: str) -> Messages:
    """A raw row, its columns under our names, as messages. Raises Malformed."""
    if form == "text":
        return [{"role": "text", "content": _string(row.get("text"), "text")}]
    if form in ("messages", "sharegpt"):
        return _conversation(row.get(FORMATS[form][0]), FORMATS[form][0])
    if form == "alpaca":
        parts = [_string(row.get(c), c) for c in ("instruction", "input")]
        return [{"role": "user", "content": "\n\n".join(p for p in parts if p)},
                {"role": "assistant", "content": _string(row.get("output"), "output")}]
    answer = "completion" if "completion" in row else "response"
    return _side(row.get("prompt"), "prompt", "user") + _side(row.get(answer), answer, "assistant")


def _side(value: Any, column: str, role: str) -> Messages:
    """A prompt or a completion: text, or messages of its own."""
    if isinstance(value, list):
        return _conversation(value, column)
    return [{"role": role, "content": _string(value, column)}]


def _conversation(value: Any, column: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise Malformed(f"`{column}` is {'empty' if value in (None, []) else type(value).__name__}, wanted messages")
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise Malformed(f"message {number} is {type(turn).__name__}, wanted an object")
        role = turn["role"] if turn.get("role") is not None else turn.get("from")
        if role not in ROLES:
            raise Malformed(f"message {number} has the role {role!r}; known: {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise Malformed(f"message {number} has tool_calls, which are not trained on here")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        messages.append({"role": ROLES[role], "content": _string(_joined(content), f"message {number}")})
    return messages


def _joined(content: Any) -> Any:
    """Content given in parts, as one text. Raises Malformed on a part that is no text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise Malformed(f"holds a part that is no text ({str(part)[:60]})")
    return "".join(part["text"] for part in content)


def _string(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"`{column}` is {type(value).__name__}, wanted text")
    if not _encodable(value):
        raise Malformed(f"`{column}` holds half a surrogate pair, which is no text")
    return value


def _encodable(text: str) -> bool:
    """JSON may spell lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unusable(messages: Messages) -> tuple[str, str] | None:
    """(rule, why) of a row that has nothing to learn from, or None. Spaces alone are nothing."""
    if messages[0]["role"] == "text":
        return None if messages[0]["content"].strip() else ("empty_response", "the text is empty")
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        return "empty_prompt", "no user turn says anything"
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    if not answers or not all(answers):
        return "empty_response", "an assistant turn is empty" if answers else "no assistant turn"
    return None


# ---- a source --------------------------------------------------------------------------------------------------------


def read_source(located: Located, source: Source, label: str, *, form: str, split_of: Callable[[Row | None], Split],
                only_unit: str | None = None) -> tuple[dict[str, UnitRows], list[Rejected]]:
    """All rows of a source by unit, and those of no unit.

    Args:
        label: how the source is called in artifacts and messages.
        form: a format, or 'auto'.
        split_of: the side of a row; of a row that says nothing usable (None).
        only_unit: the name for rows of a source that has no other; None: `unit`, or the file's name.
    Raises:
        MixtureError: every file that cannot be read; columns that fit no format.
    """
    raw = _raw_rows(located, source.unit or only_unit)
    forms = _forms(raw, source, label, form)
    units: dict[str, UnitRows] = {}
    stray: list[Rejected] = []
    for where, name, row in raw:
        if source.unit_column is not None:
            value = row.get(source.unit_column)
            named = isinstance(value, (str, int)) and not isinstance(value, bool)
            if not (named and str(value).strip() and _encodable(str(value))):
                why = f"`{source.unit_column}` names no unit ({value!r})"
                stray.append(Rejected(split_of(None), "malformed", where, why))
                continue
            name = str(value)
        found = forms[_file(where)]
        unit = units.setdefault(name, UnitRows(name, label, found, source))
        if found not in unit.format.split("+"):
            unit.format += f"+{found}"
        # a mapped column takes its name from a column of the file that has it by chance
        mapped = row | {ours: row.get(theirs) for ours, theirs in source.columns.items()}
        _place(unit, found, where, mapped, split_of)
    return units, stray


def _file(where: str) -> str:
    return where.rsplit(":", 1)[0]


def _forms(raw: list[tuple[str, str, dict[str, Any]]], source: Source, label: str, form: str) -> dict[str, str]:
    """File -> its format: files of one glob need not agree. Raises MixtureError with every file that fits none."""
    try:
        _columns(raw, source)
        columns: dict[str, set[str]] = {}
        for where, _, row in raw:
            columns.setdefault(_file(where), set()).update(row)
    except MixtureError as error:
        raise MixtureError(f"{label}: {error}") from error
    forms, problems = {}, []
    for file, have in columns.items():
        ours = {ours for ours, theirs in source.columns.items() if theirs in have}
        try:
            forms[file] = detect_format((have - set(source.columns.values())) | ours, source.columns, form)
        except MixtureError as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise MixtureError("\n  - ".join(problems))
    return forms


def _place(unit: UnitRows, form: str, where: str, raw: Mapping[str, Any], split_of: Callable[[Row | None], Split]) -> None:
    try:
        row = Row(where, to_messages(raw, form))
    except Malformed as error:
        unit.rejected.append(Rejected(split_of(None), "malformed", where, str(error)))
        return
    side, problem = split_of(row), unusable(row.messages)
    if problem:
        unit.rejected.append(Rejected(side, problem[0], where, problem[1]))
    else:
        unit.side(side).append(row)


def _raw_rows(located: Located, unit: str | None) -> list[tuple[str, str, dict[str, Any]]]:
    """(where, unit name, raw row) of all files. Raises MixtureError with every file that cannot be read."""
    if located.dataset is not None:
        return [(f"{located.name}:{i}", unit or located.name, row) for i, row in enumerate(located.dataset, 1)]
    names = [unit] * len(located.files) if unit else unit_names([p for _, p in located.files])
    raw, problems = [], []
    for (label, path), name in zip(located.files, names, strict=True):
        try:
            rows = [(f"{label}:{number}", name, row) for number, row in read_rows(path)]
            raw += rows
            if not rows:
                problems.append(f"{label}: no row in it. Take the file out of the source, or fill it.")
        except MixtureError as error:
            problems.append(str(error))
    if problems:
        raise MixtureError("\n  - ".join(problems))
    return raw


def unit_names(paths: list[Path]) -> list[str]:
    """A name for each file: its stem, or its folder's name where stems repeat (many folders with one train.parquet)."""
    for names in ([_stem(p) for p in paths], [p.parent.name for p in paths],
                  [f"{p.parent.name}/{_stem(p)}" for p in paths]):
        if len(set(names)) == len(names):
            return names
    raise MixtureError(f"{paths[0]} and {len(paths) - 1} more: neither file nor folder names tell the units apart. "
                       "Give `unit` (one name for all) or `unit_column`.")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[0]


def _columns(raw: list[tuple[str, str, dict[str, Any]]], source: Source) -> set[str]:
    """The columns under our names. Raises MixtureError on a mapping that does not fit."""
    have: set[str] = set()
    for _, _, row in raw:
        have |= row.keys()
    if not raw:
        raise MixtureError("no row in it.")
    problems = [f"columns.{ours}: not one of ours.{closest(ours, COLUMNS)}"
                for ours in source.columns if ours not in COLUMNS]
    problems += [f"columns.{ours}: the data has no column {theirs!r}.{closest(theirs, have)}"
                 for ours, theirs in source.columns.items() if theirs not in have]
    if source.unit_column is not None and source.unit_column not in have:
        hint = closest(source.unit_column, have)
        problems.append(f"unit_column: the data has no column {source.unit_column!r}.{hint}")
    if problems:
        raise MixtureError("\n    ".join(problems))
    return (have - set(source.columns.values())) | set(source.columns)
