"""Files and Hub datasets -> rows of one shape, grouped by unit.

Whatever a source holds (prompt/completion, instruction/output, `messages`, ShareGPT `conversations`, plain text)
becomes a list of {role, content} messages. A source that cannot be read is an error; a row that cannot be used is left
out and named with its place. Nothing is trimmed, mended or guessed.

Images come in by the same door (formats.py: where they stand in the messages; pictures.py: where they lie). Those in the
rows themselves go to the spool while the file is read, so rows in memory hold references only.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from anabranch.artifacts import canonical, digest, file_digest
from anabranch.containers import SUFFIXES as SUFFIXES
from anabranch.containers import ZIP, members
from anabranch.containers import read_rows as read_rows
from anabranch.errors import MixtureError, closest
from anabranch.formats import COLUMNS as COLUMNS
from anabranch.formats import IMAGE as IMAGE
from anabranch.formats import (
    IMAGE_COLUMNS,
    Malformed,
    column_images,
    encodable,
    refuse_misnamed_image,
    to_messages,
    unusable,
    unused_columns,
)
from anabranch.formats import Messages as Messages
from anabranch.formats import detect_format as detect_format
from anabranch.images import BadImage
from anabranch.pictures import Outside, Picture, Pictures, Root, data_uri, root_of
from anabranch.recipe import Source

Split = Literal["train", "held_out"]
TEXT_ONLY = ("shows an image, and the base is a language model, which takes text only. Give a vision-language model as "
             "`model.path`, or rows without images.")
DEEPEST = 16  # levels of a row in which images are looked for: a message's part stands in the third
IMAGE_KEYS = frozenset((*IMAGE_COLUMNS, "bytes", "path", "url", "image_url"))  # of rows and their parts, that hold images


@dataclass(frozen=True)
class Row:
    """One usable row: where it stands ('file:row') and what it says. A text row is one message of role 'text'."""

    where: str
    messages: Messages
    images: tuple[Picture, ...] = ()

    @cached_property
    def key(self) -> bytes:
        """Equal for rows of equal text and equal images, 32 bytes."""
        text = canonical([[m["role"], m["content"]] for m in self.messages])
        return hashlib.sha256(text + b"".join(i.sha256 for i in self.images)).digest()

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

    @property
    def prompt_key(self) -> bytes:
        """Equal for rows that ask the same: equal prompts, over equal images. 32 bytes."""
        shown = self.images[: self.prompt.count(IMAGE)]
        return hashlib.sha256(self.prompt.encode() + b"".join(i.sha256 for i in shown)).digest()


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
    unused: set[str] = field(default_factory=set)  # columns that its format says nothing by

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
        for row in _plain_rows(self.dataset):
            whole.update(json.dumps(row, sort_keys=True, default=_hashable).encode() + b"\n")
        return whole.hexdigest()


def _hashable(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


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
        _refuse_saved_to_disk(here)
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
    unknown = [p.name for p in found if not p.name.endswith((*SUFFIXES, ZIP))]
    if unknown:
        raise MixtureError(f"{path}: {', '.join(unknown[:5])}: not a kind of file that is read here. Wanted one of "
                           f"{' '.join(SUFFIXES)} {ZIP}.")
    return Located([(label_of(p, folder), p) for p in found])


def _refuse_saved_to_disk(folder: Path) -> None:
    """Raises MixtureError on a folder that datasets' save_to_disk wrote: its JSON files tell of rows, and hold none."""
    several = (folder / "dataset_dict.json").is_file()
    if several or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        one = f"load_from_disk({str(folder)!r}){'[SPLIT]' if several else ''}"
        raise MixtureError(f"{folder}: a {'DatasetDict' if several else 'Dataset'} as datasets' save_to_disk writes it, which "
                           f"is not read here. In Python: datasets.{one}.to_parquet('rows.parquet'); then name that file.")


def label_of(path: Path | str, folder: Path) -> str:
    """A path as seen from the recipe's folder, so that no machine's folders stand in an artifact."""
    return Path(os.path.relpath(path, folder)).as_posix()


def is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)) and not path.endswith((*SUFFIXES, ZIP))


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


# ---- a source --------------------------------------------------------------------------------------------------------


def read_source(located: Located, source: Source, label: str, *, form: str, split_of: Callable[[Row | None], Split],
                only_unit: str | None = None, pictures: Pictures | None = None) -> tuple[dict[str, UnitRows], list[Rejected]]:
    """All rows of a source by unit, and those of no unit.

    Args:
        label: how the source is called in artifacts and messages.
        form: a format, or 'auto'.
        split_of: the side of a row; of a row that says nothing usable (None).
        only_unit: the name for rows of a source that has no other; None: `unit`, or the file's name.
        pictures: where images are kept and looked up; None: the base is a language model, and rows may show none.
    Raises:
        MixtureError: every file that cannot be read; columns that fit no format; images outside of the image root; images
            for a language model.
    """
    files = _rows_files(located, source if pictures is not None else None)
    finders = {f.label: _Finder(pictures, _root(source, f)) for f in files} if pictures is not None else {}
    raw = _raw_rows(located, files, source, source.unit or only_unit, pictures)
    forms, unused = _forms(raw, source, label, form)
    units: dict[str, UnitRows] = {}
    stray: list[Rejected] = []
    for where, name, row in raw:
        if source.unit_column is not None:
            value = row.get(source.unit_column)
            named = isinstance(value, (str, int)) and not isinstance(value, bool)
            if not (named and str(value).strip() and encodable(str(value))):
                why = f"`{source.unit_column}` names no unit ({value!r})"
                stray.append(Rejected(split_of(None), "malformed", where, why))
                continue
            name = str(value)
        found = forms[_file(where)]
        unit = units.setdefault(name, UnitRows(name, label, found, source))
        if found not in unit.format.split("+"):
            unit.format += f"+{found}"
        unit.unused |= unused[_file(where)]
        _place(unit, found, where, _mapped(row, source), split_of, finders.get(_file(where)))
    outside = [name for finder in finders.values() for name in finder.outside]
    if outside:
        roots = sorted({finder.root.shown for finder in finders.values() if finder.outside and finder.root})
        rows = "1 row names an image" if len(outside) == 1 else f"{len(outside):,} rows name images"
        raise MixtureError(f"{label}: {rows} outside of {', '.join(roots[:3])}: {'; '.join(outside[:3])}"
                           f"{'; ..' if len(outside) > 3 else ''}. Paths in rows may not leave the folder (or zip) that they "
                           "start from, nor may links in it. Set the source's `images` to the folder that holds them all, or "
                           "copy them.")
    return units, stray


def _mapped(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """The row under our names: a mapped column takes its name from a column of the file that has it by chance, and one of
    images makes the file's other column of images another's business."""
    ours = set(source.columns) & set(IMAGE_COLUMNS)
    own = {k: v for k, v in row.items() if k not in IMAGE_COLUMNS} if ours else row
    return own | {ours: row.get(theirs) for ours, theirs in source.columns.items()}


@dataclass
class _Finder:
    """Looks up the images of one file's rows. `root`: where paths start (None: a Hub dataset, which brings no files)."""

    pictures: Pictures
    root: Root | None
    outside: list[str] = field(default_factory=list)

    def picture(self, image: Any) -> Picture:
        """Raises Malformed, BadImage, Outside."""
        if isinstance(image, Picture):
            return image
        if isinstance(image, dict):
            given = image.get("bytes") or image.get("path") or image.get("url") or image.get("image")
            return self.picture("" if isinstance(given, dict) else given)
        if not isinstance(image, str) or not image:
            raise Malformed(f"an image is {type(image).__name__}, wanted a path, bytes, {{bytes, path}} or a data URI")
        if self.root is None and not image.startswith("data:"):
            raise BadImage("missing_image", f"a path in a Hub dataset, {image[:100]!r}: set the source's `images`")
        return self.pictures.find(image, self.root or Root())


def _root(source: Source, file: _RowsFile) -> Root | None:
    """Where image paths of a file start: what the source says, else the folder of the file (in a zip: in the zip)."""
    if source.images is not None:
        return root_of(Path(source.images))
    if file.path is None:
        return None
    if file.member:
        return Root(archive=str(file.path), inside=os.path.dirname(file.member))
    return Root(folder=os.path.realpath(file.path.parent), given=str(file.path.parent))


def _file(where: str) -> str:
    return where.rsplit(":", 1)[0]


def _forms(raw: list[tuple[str, str, dict[str, Any]]], source: Source, label: str,
           form: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """File -> its format: files of one glob need not agree; and file -> the columns that this format does not use.

    Raises:
        MixtureError: with every file that fits none.
    """
    try:
        _columns(raw, source)
        columns: dict[str, set[str]] = {}
        for where, _, row in raw:
            columns.setdefault(_file(where), set()).update(row)
    except MixtureError as error:
        raise MixtureError(f"{label}: {error}") from error
    forms, problems = dict[str, str](), []
    for file, have in columns.items():
        ours = {ours for ours, theirs in source.columns.items() if theirs in have}
        try:
            forms[file] = detect_format((have - set(source.columns.values())) | ours, source.columns, form)
        except MixtureError as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise MixtureError("\n  - ".join(problems))
    return forms, {file: unused_columns(have, forms[file], _named(source)) for file, have in columns.items()}


def _named(source: Source) -> set[str]:
    """Columns of the file that the recipe speaks of."""
    return {*source.columns.values(), *([source.unit_column] if source.unit_column else [])}


def _place(unit: UnitRows, form: str, where: str, raw: Mapping[str, Any], split_of: Callable[[Row | None], Split],
           finder: _Finder | None) -> None:
    try:
        messages, images = to_messages(raw, form, images=finder is not None)
        if images and finder is None:
            raise MixtureError(f"{where}: {TEXT_ONLY}")
        mapped = unit.settings.columns.keys() & set(IMAGE_COLUMNS)
        if finder and not (images or mapped or form == "text"):
            refuse_misnamed_image(raw, _named(unit.settings), finder.pictures.start_of)
        row = Row(where, messages, tuple(finder.picture(image) for image in images) if finder else ())
    except Malformed as error:
        unit.rejected.append(Rejected(split_of(None), "malformed", where, str(error)))
        return
    except BadImage as error:
        unit.rejected.append(Rejected(split_of(None), error.rule, where, error.why))
        return
    except Outside as error:
        assert finder is not None  # it is the finder's
        finder.outside.append(f"{where}: {str(error)[:120]}")
        return
    side, problem = split_of(row), unusable(row.messages)
    if problem:
        unit.rejected.append(Rejected(side, problem[0], where, problem[1]))
    else:
        unit.side(side).append(row)


@dataclass(frozen=True, slots=True)
class _RowsFile:
    """A file of rows by the name that messages use; `member` of the zip `path`, or the file itself. No path: a Hub dataset."""

    label: str
    path: Path | None
    member: str = ""


def _rows_files(located: Located, pictured: Source | None) -> list[_RowsFile]:
    """Raises MixtureError with every zip that has none, and an image root that is none of the source, if it may show images."""
    files, problems = [], []
    if pictured is not None and pictured.images is not None:
        try:
            root_of(Path(pictured.images))
        except MixtureError as error:
            problems.append(str(error))
    if located.dataset is not None:
        files.append(_RowsFile(located.name, None))
    for label, path in located.files:
        try:
            inside = members(path) if path.name.endswith(ZIP) else [""]
            files += [_RowsFile(f"{label}!{m}" if m else label, path, m) for m in inside]
        except MixtureError as error:
            problems.append(str(error))
    if problems:
        raise MixtureError("\n  - ".join(problems))
    return files


def _raw_rows(located: Located, files: list[_RowsFile], source: Source, unit: str | None,
              pictures: Pictures | None) -> list[tuple[str, str, dict[str, Any]]]:
    """(where, unit name, raw row) of all files. Raises MixtureError with every file that cannot be read."""
    images = {source.columns.get(name, name) for name in IMAGE_COLUMNS}
    if located.dataset is not None:
        return [(f"{located.name}:{i}", unit or located.name, _light(row, images, f"{located.name}:{i}", pictures))
                for i, row in enumerate(_plain_rows(located.dataset), 1)]
    paths = [(f, f.path) for f in files if f.path is not None]
    zips = Counter(path for _, path in paths)
    names = [unit] * len(paths) if unit else unit_names([Path(f.member) if zips[path] > 1 else path for f, path in paths])
    raw, problems = [], []
    for (file, path), name in zip(paths, names, strict=True):
        try:
            rows = [(where, name, _light(row, images, where, pictures)) for number, row in read_rows(path, file.member)
                    for where in [f"{file.label}:{number}"]]
            raw += rows
            if not rows:
                problems.append(f"{file.label}: no row in it. Take the file out of the source, or fill it.")
        except MixtureError as error:
            problems.append(str(error))
    if problems:
        raise MixtureError("\n  - ".join(problems))
    return raw


def _plain_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows of a Hub dataset; images as they are stored, not decoded."""
    if "Image(" not in str(getattr(dataset, "features", "")):
        yield from dataset
        return
    for table in dataset.with_format("arrow").iter(batch_size=32):
        yield from table.to_pylist()


def _light(row: dict[str, Any], images: set[str], where: str, pictures: Pictures | None) -> dict[str, Any]:
    """The row with its embedded images in the spool. Raises MixtureError on an image for a language model."""
    if pictures is None:
        if any(row.get(name) not in (None, "", []) for name in images):
            _refuse_unless_empty(row, where)
        return row
    return {key: _spooled(value, key in images, pictures, DEEPEST) for key, value in row.items()}


def _refuse_unless_empty(row: dict[str, Any], where: str) -> None:
    try:
        shown = bool(column_images(row))
    except Malformed:
        shown = True
    if shown:
        raise MixtureError(f"{where}: {TEXT_ONLY}")


def _spooled(value: Any, of_image: bool, pictures: Pictures, levels: int) -> Any:
    if isinstance(value, list) and levels:
        return [_spooled(v, of_image, pictures, levels - 1) for v in value]
    if isinstance(value, dict) and levels:
        return {k: _spooled(v, of_image or k in IMAGE_KEYS, pictures, levels - 1) for k, v in value.items()}
    if not of_image or not isinstance(value, (bytes, str)):
        return value
    data = value if isinstance(value, bytes) else data_uri(value)
    return value if data is None else pictures.keep(data)


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
