"""Several merges in one file, and which needs which: a graph without circles, in an order in which it can be made.

    name: blend                      a merge config as `dialect` reads it, with a name; its result is called so
    merge_method: linear ..
    ---
    models: [{model: blend}, ..]     wherever a model is named, `blend`, or `blend+ADAPTER`, is that result
    ---
    ..                               at most one document without a name: the result that was asked for

The peer (mergekit-multi; merge specification, 7.2) puts results for names in every string of a document, so that a merge
called `linear` spoils `merge_method: linear`, and a chat template with two `+` is an error. Here a name stands for a
result where a model is named, and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from anabranch.engine.config import MergeConfig
from anabranch.engine.dialect import SHOWN, ConfigReader
from anabranch.engine.parameters import shown
from anabranch.engine.reference import Reference, local, read_reference
from anabranch.errors import RecipeError, closest
from anabranch.recipe import read_documents

# Names become folders: of any file system, and none that the engine keeps for itself.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NOT_AT_THE_END = (".partial", ".")


@dataclass(frozen=True)
class Document:
    """One merge of a family. `name` None: the result that was asked for. `uses`: names, in the order of first mention."""

    name: str | None
    text: str
    value: Any
    uses: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        return self.name or "OUT"


@dataclass(frozen=True)
class Graph:
    """`documents` stand so that each comes after all that it uses; the one without a name is the last."""

    documents: tuple[Document, ...]
    source: str
    folders: tuple[Path, ...]
    allow_unknown_keys: bool

    @property
    def names(self) -> list[str]:
        return [d.name for d in self.documents if d.name is not None]

    @property
    def result(self) -> Document | None:
        """The document without a name."""
        return next((d for d in self.documents if d.name is None), None)

    def named(self, name: str) -> Document:
        return next(d for d in self.documents if d.name == name)

    def config(self, document: Document, root: Path) -> MergeConfig:
        """The config of a document, its names standing for the folders root/NAME."""
        reader = _Reader(self.folders, self.allow_unknown_keys, {name: root / name for name in self.names})
        config = reader.config(document.value, f"{self.source}, {document.where}")
        assert config is not None, "read without a problem before"
        return config


def documents_in(text: str) -> list[tuple[str, Any]]:
    """(text, value) of every document that is not empty. Raises yaml.YAMLError."""
    values = read_documents(text)
    starts = [event.start_mark.index for event in yaml.parse(text, Loader=yaml.SafeLoader)
              if isinstance(event, yaml.DocumentStartEvent) and event.start_mark is not None]
    cuts = [0, *starts[1:], len(text)] if starts else []  # what stands before the first document is the first's
    texts = [text[begin:end] for begin, end in pairwise(cuts)]
    return [(piece, value) for piece, value in zip(texts, values, strict=True) if value is not None]


def read_graph(text: str, *, source: str = "merge config", folders: Sequence[Path] | None = None,
               allow_unknown_keys: bool = False) -> Graph:
    """Every document of a family, validated, in an order in which they can be made.

    Args:
        folders: where relative paths are looked for.
    Raises:
        RecipeError: all that is wrong with all documents, names and uses, in one message.
    """
    try:
        found = documents_in(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    if not found:
        raise RecipeError(f"{source}: holds no merge.")
    places, problems = tuple(folders or (Path.cwd(),)), list[str]()
    names = _names([value for _, value in found], problems)
    known = {name: Path(name) for name in names if name is not None}
    documents = []
    for number, ((piece, value), name) in enumerate(zip(found, names, strict=True)):
        where = f"merge `{name}`" if name is not None else f"document {number + 1}"
        reader = _Reader(places, allow_unknown_keys, known)
        reader.config(value, where)
        problems += [f"{where}: {problem}" for problem in reader.problems]
        documents.append(Document(name, piece, value, tuple(reader.uses), where))
    problems += [f"{' needs '.join(circle)}: a circle, and none of them can be made first" for circle in _circles(documents)]
    if problems:
        more = len(problems) - SHOWN
        raise RecipeError.of(f"{source}:", [*problems[:SHOWN], *([f".. and {more} more"] if more > 0 else [])])
    return Graph(tuple(_ordered(documents)), source, places, allow_unknown_keys)


def _names(values: Sequence[Any], problems: list[str]) -> list[str | None]:
    """The name of each document; None for the one without, and for one that cannot be."""
    names: list[str | None] = []
    nameless: list[int] = []
    seen: dict[str, int] = {}
    for number, value in enumerate(values, 1):
        name = value.get("name") if isinstance(value, dict) else None
        names.append(None)
        if name is None:
            nameless.append(number)
        elif not (isinstance(name, str) and NAME.fullmatch(name) and not name.endswith(NOT_AT_THE_END)):
            problems.append(f"document {number}: name: got {shown(name)}, wanted one that can be a folder: letters, digits, "
                            "`-`, `_` and `.`, the first a letter or a digit, at most 100")
        elif name.casefold() in seen:
            problems.append(f"document {number}: name: `{name}` is document {seen[name.casefold()]} already"
                            " (small letters or capitals do not tell folders apart everywhere)")
        else:
            names[-1], seen[name.casefold()] = name, number
    if len(nameless) > 1:
        problems.append(f"documents {', '.join(map(str, nameless))} have no `name:`, and only one may be without: the one that "
                        "gives OUT")
    return names


def _circles(documents: Sequence[Document]) -> Iterator[list[str]]:
    """Each circle once, as the way round it: [a, b, a]."""
    uses = {d.name: d.uses for d in documents if d.name is not None}
    done: set[str] = set()
    for start in uses:
        path: list[str] = []
        left = [(start, iter(uses[start]))] if start not in done else []
        path += [start] if left else []
        while left:
            name, rest = left[-1]
            following = next(rest, None)
            if following is None:
                done.add(name)
                left.pop()
                path.pop()
            elif following in path:
                yield [*path[path.index(following):], following]
            elif following not in done and following in uses:
                left.append((following, iter(uses[following])))
                path.append(following)


def _ordered(documents: Sequence[Document]) -> Iterator[Document]:
    """As in the file where that can be; the one without a name, which none needs, last."""
    left, made = sorted(documents, key=lambda d: d.name is None), set[str]()
    while left:
        document = next(d for d in left if made.issuperset(d.uses))
        left.remove(document)
        if document.name is not None:
            made.add(document.name)
        yield document


class _Reader(ConfigReader):
    """A config in which a model may be called by the name of a merge. `uses`: those that are, and where first."""

    def __init__(self, folders: tuple[Path, ...], allow_unknown: bool, names: Mapping[str, Path]) -> None:
        super().__init__(folders, allow_unknown)
        self.names = names
        self.uses: dict[str, str] = {}

    def reference(self, value: Any, where: str) -> Reference | None:
        name, wanted = self._of_family(value, where)
        if name is None:
            found = super().reference(value, where)
            return found if found is None or not self._misspelt(found, where) else None
        if wanted is None:
            return None
        if (there := local(name, self.folders)) is not None and os.path.isdir(there):
            self.warnings.append(f"{where}: `{name}` is a merge of this file and a folder here ({name}); the merge is meant. "
                                 f"Write `./{name}` for the folder")
        self.uses.setdefault(name, where)
        read = read_reference(wanted, where, self.folders, self.problems, self.warnings)
        said = value.strip() if isinstance(value, str) else None
        return read and replace(read, path=str(self.names[name]), said=said or name + read.said.removeprefix(_path(wanted)))

    def _of_family(self, value: Any, where: str) -> tuple[str | None, dict[str, Any] | None]:
        """(the merge that is meant, the reference as an object with its folder as the path); None for other models, and
        for what cannot be."""
        inner = value.get("model") if isinstance(value, dict) else value
        text = inner.get("path") if isinstance(inner, dict) else inner
        if not isinstance(text, str):
            return None, None
        text = text.strip()
        head, plus, adapter = text.partition("+") if isinstance(value, str) else (text, "", "")
        name, at, _ = head.partition("@") if not isinstance(inner, dict) else (head, "", "")
        if name not in self.names or (text != name and local(text, self.folders) is not None):
            return None, None
        if at or (isinstance(inner, dict) and inner.get("revision") is not None):
            self.problems.append(f"{where}: `{name}` is a merge of this file, and has no revision")
            return name, None
        if "+" in adapter or (plus and not adapter):
            self.problems.append(f"{where}: '{text}': wanted NAME or NAME+ADAPTER")
            return name, None
        wanted = dict(value) if isinstance(value, dict) else ({"lora": adapter} if adapter else {})
        known = dict(inner) if isinstance(inner, dict) else {}
        return name, wanted | {"model": known | {"path": str(self.names[name])}}

    def _misspelt(self, found: Reference, where: str) -> bool:
        """A name that is no merge, no folder here and like one of the merges: not to be asked for on the Hub."""
        for part, what in ((found.path, "model"), (found.adapter, "adapter")):
            if part is None or "/" in part or os.path.isdir(part):
                continue
            if part in self.names:
                self.problems.append(f"{where}: `{part}` is a merge of this file, a whole model, and stands where an adapter "
                                     "is wanted")
                return True
            names = {name.casefold(): name for name in self.names}
            if difflib.get_close_matches(part.casefold(), names, n=1, cutoff=0.6):
                self.problems.append(f"{where}: {what} '{part}' is no merge of this file and no folder here."
                                     + closest(part, self.names))
                return True
        return False

    def _tokenizer_source(self, value: Any, where: str) -> Literal["union", "base"] | Reference | None:
        if isinstance(value, str) and value.strip() in self.names and value not in ("union", "base"):
            return self.reference(value, where)
        return super()._tokenizer_source(value, where)


def _path(wanted: Mapping[str, Any]) -> str:
    return str(wanted["model"]["path"])
