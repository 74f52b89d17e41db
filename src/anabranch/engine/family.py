"""A family of merges: every merge of a file, each after those that it needs, and only where something has changed.

    OUT                    the result of the document without a name; where all have names, a folder with OUT/NAME for each
    OUT.intermediates/     NAME for each of the others; or a folder that the user gives. Removed at the end, unless asked for

Before anything is computed the whole graph is planned: what a merge will give stands for it as an outline (headers,
config and tokenizer, no numbers), so that the plan of the next finds every problem, and the forecast is exact.

A result is known by a key: a hash over the merge's config, the options that decide bytes, and the content of all that it
is made of; of another merge's result, by that one's key. The key stands in the result's manifest (`made_from: family`).
What has its key and is as its manifest says is not made again; in the folders of the family, another key is replaced.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml

from anabranch.artifacts import MergeManifest, digest, file_digest
from anabranch.engine.config import MergeConfig
from anabranch.engine.fetch import BESIDE
from anabranch.engine.graph import Document, Graph, documents_in, read_graph
from anabranch.engine.merging import forecast_lines, place_for, recorded_of, text_of, verify_files, write
from anabranch.engine.outline import write_outline
from anabranch.engine.output import CARD, MANIFEST, OutputFolder
from anabranch.engine.prepare import Options, Prepared, prepare
from anabranch.engine.stream import Progress, Settings
from anabranch.errors import AnabranchError, CorruptedError, OutputError, RecipeError

KEY = "family"
READ = 1 << 22
INDEX = ".safetensors.index.json"
SHOWN = 20
State = Literal["there", "absent", "changed"]


@dataclass(frozen=True)
class Result:
    """One merge of a family. `made`: computed by this call; else it was there."""

    name: str | None
    place: Path
    manifest: MergeManifest
    made: bool


def is_family(config: Path | str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether a file holds several merges. A file that cannot be read, or is no YAML, is none: reading it says why."""
    if not isinstance(config, (str, Path)):
        return True
    try:
        return len(documents_in(text_of(config))) > 1
    except (AnabranchError, yaml.YAMLError, RecursionError):
        return False


def merge_family(
    config: Path | str | Sequence[Mapping[str, Any]],
    out: Path | str,
    *,
    intermediates: Path | str | None = None,
    keep_intermediates: bool = False,
    options: Options | None = None,
    settings: Settings | None = None,
    allow_unknown_keys: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = warnings.warn,
) -> list[Result]:
    """`anabranch merge FAMILY OUT`: make every merge of a file that OUT needs, in order.

    Args:
        config: a YAML file of several documents, or what would stand in them.
        out: the folder of the document without a name; where all have names, a folder for OUT/NAME.
        intermediates: where the named ones go, DIR/NAME, and stay for the next call. None: OUT.intermediates, for this call.
        keep_intermediates: leave OUT.intermediates there.
        options, settings: as for `merge_config`, of every merge.
        progress: called with what is done of all of them.
        warn: told what the user should know.
    Returns:
        what is there now, in the order in which it was made; the last is what was asked for.
    Raises:
        AnabranchError: everything that is wrong with names, configs and models of all documents, in one message, before
            anything is computed; else as `merge_config`.
    """
    with _planned(config, out, intermediates, keep_intermediates, options or Options(), allow_unknown_keys) as family:
        if warn is not None:
            for warning in family.warnings:
                warn(warning)
        if family.out in family.leaves:
            raise OutputError(f"{family.out} is one of the models to be merged. Choose another output folder.")
        with _held(family.root, any(document.name for document in family.needed())) as held:
            needed = family.needed(anew=held)
            if not needed and warn is not None:
                left = "" if family.kept or not family.root.is_dir() else f" (of an earlier call there is still {family.root})"
                warn(f"{family.out} holds this very merge already; nothing was done{left}")
            if held:
                _forget_replaced(family)
            _make(family, needed, settings or Settings(), progress)
            results = [Result(d.name, family.place(d), MergeManifest.load(family.place(d) / MANIFEST), d in needed)
                       for d in family.graph.documents if family.kept or d.name is None]
            if needed and not family.kept:
                _remove_intermediates(family)
    return results


def forecast_family(
    config: Path | str | Sequence[Mapping[str, Any]],
    out: Path | str,
    *,
    intermediates: Path | str | None = None,
    keep_intermediates: bool = False,
    options: Options | None = None,
    settings: Settings | None = None,
    allow_unknown_keys: bool = False,
    warn: Callable[[str], None] | None = None,
) -> list[str]:
    """The lines of a dry run: the graph, what would be made and why, and the forecast of each. Errors as `merge_family`."""
    with _planned(config, out, intermediates, keep_intermediates, options or Options(), allow_unknown_keys) as family:
        if warn is not None:
            for warning in family.warnings:
                warn(warning)
        needed = family.needed()
        lines = [f"graph: {len(family.graph.documents)} merges, in this order: {', '.join(map(str, family.graph.documents))}"]
        for document in family.graph.documents:
            plan = family.plans[document.name]
            lines.append(f"{document}: {plan.config.method} of {', '.join(map(str, plan.config.models))}; "
                         f"{family.fate(document, needed)}")
            if document in needed:
                of_this = forecast_lines(plan.prepared, settings or Settings(), family.place(document))
                lines += [family.told(f"{document}: {line}") for line in of_this]
        return lines


# ------------------------------------------------------------------------------------------------------------ planning


@dataclass(frozen=True)
class Plan:
    """A merge of the graph, planned on outlines of those that it uses."""

    config: MergeConfig
    prepared: Prepared


@dataclass
class _Family:
    """A graph whose every merge is planned. `root`: where the named ones go; `home`: from where relative paths count."""

    graph: Graph
    out: Path
    root: Path
    kept: bool
    home: Path
    options: Options
    outlines: Path
    plans: dict[str | None, Plan] = field(default_factory=dict)
    _keys: dict[str | None, str] = field(default_factory=dict)
    _contents: dict[Path, str] = field(default_factory=dict)
    _states: dict[str | None, State] = field(default_factory=dict)

    def told(self, text: str) -> str:
        """A message with the places where results will be, not those of their outlines."""
        return text.replace(str(self.outlines), str(self.root))

    @property
    def warnings(self) -> list[str]:
        found = [f"{d.where}: {w}" for d in self.graph.documents for w in self.plans[d.name].prepared.warnings]
        if idle := [str(d) for d in self.graph.documents if d not in self._wanted()]:
            found.append(f"{', '.join(idle)}: nothing uses {'it' if len(idle) == 1 else 'them'}, so "
                         f"{'it is' if len(idle) == 1 else 'they are'} not made. (-I DIR or --keep-intermediates makes all.)")
        return [self.told(w) for w in found]

    @property
    def leaves(self) -> set[Path]:
        """The folders of models and adapters that no merge here makes."""
        folders = [f for plan in self.plans.values() for one in plan.prepared.merge.inputs for f in (one.folder, one.adapter)]
        return {f.resolve() for f in folders if f is not None and not self._is_outline(f)}

    def place(self, document: Document) -> Path:
        return self.out if document.name is None else self.root / document.name

    def needed(self, *, anew: bool = False) -> list[Document]:
        """What must be made, in order: what is wanted and not there, and what that needs. `anew`: look again at places that
        another process may have changed."""
        if anew:
            self._states = {name: state for name, state in self._states.items() if state == "there"}
        needed: set[str | None] = set()
        left = [d for d in self.graph.documents if d.name is None] or list(self.graph.documents)
        left += [d for d in self.graph.documents if self.kept]
        while left:
            document = left.pop()
            if document.name not in needed and self.state(document) != "there":
                needed.add(document.name)
                left += [self.graph.named(name) for name in document.uses]
        return [d for d in self.graph.documents if d.name in needed]

    def _wanted(self) -> list[Document]:
        """What the call is for, and all that it rests on."""
        if self.kept or self.graph.result is None:
            return list(self.graph.documents)
        names: set[str] = set()
        left = [self.graph.result]
        while left:
            uses = set(left.pop().uses) - names
            names |= uses
            left += [self.graph.named(name) for name in uses]
        return [d for d in self.graph.documents if d.name is None or d.name in names]

    def fate(self, document: Document, needed: Sequence[Document]) -> str:
        """What will be done about a merge, in words."""
        place = self.place(document)
        if document in needed:
            return (f"{place} is of another config or other inputs, and is made again" if self.state(document) == "changed"
                    else f"to be made in {place}")
        if os.path.lexists(place) and self.state(document) == "there":
            return f"is there already, {place}"
        return "not needed"

    def state(self, document: Document) -> State:
        """Raises OutputError for a place that holds something else than an earlier result of this kind."""
        if document.name not in self._states:
            self._states[document.name] = self._state(document)
        return self._states[document.name]

    def _state(self, document: Document) -> State:
        place = self.place(document)
        if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
            return "absent"
        remedy = ("Choose another output folder" if document.name is None else "Give another folder (-I, or another OUT)")
        remedy = f"{remedy}, or, if nothing in it is needed, remove this one; nothing was changed."
        try:
            manifest = MergeManifest.load(place / MANIFEST)
        except CorruptedError as error:
            raise OutputError(f"{place} is already there, and no readable {MANIFEST} says what it is. {remedy}") from error
        same, damaged = manifest.made_from.get(KEY) == self.key(document), verify_files(place)
        if same and not damaged:
            return "there"
        if document.name is None:
            reason = damaged if same else ["it was made from another config" if manifest.config != document.text else
                                           "it was made of other weights, of merges with other configs, or with other options"]
            raise OutputError.of(f"{place} already holds another or a damaged merge. {remedy}", reason)
        if KEY not in manifest.made_from:
            raise OutputError(f"{place} holds a merge that is no part of a family. {remedy}")
        if place.is_symlink():
            raise OutputError(f"{place} is outdated or damaged, and is a link: what it leads to is not replaced. {remedy}")
        if strange := _strange_in(place, manifest, self.plans[document.name]):
            raise OutputError.of(f"{place} is outdated or damaged and would be made again, but holds what no merge put there. "
                                 f"Move that away, or: {remedy[0].lower()}{remedy[1:]}", strange)
        return "changed"

    def key(self, document: Document) -> str:
        """Hash of config, options and all that goes in."""
        if document.name not in self._keys:
            plan = self.plans[document.name]
            merge = plan.prepared.merge
            inputs = [[self._content(one.folder), self._content(one.adapter)] for one in merge.inputs]
            beside = [file_digest(path) for i in sorted(merge.companions) for path in merge.companions[i]
                      if not self._is_outline(path)]
            self._keys[document.name] = digest([document.text, self.options.seed, self.options.max_shard_size, inputs, beside])
        return self._keys[document.name]

    def _content(self, folder: Path | None) -> str | None:
        if folder is None:
            return None
        if self._is_outline(folder):
            return self.key(self.graph.named(folder.name))
        place = folder.resolve()
        if place not in self._contents:
            self._contents[place] = _content_of(place)
        return self._contents[place]

    def _is_outline(self, path: Path) -> bool:
        return path.is_relative_to(self.outlines)


def _content_of(folder: Path) -> str:
    """Hash of the files of a model or an adapter that could decide what is made of it."""
    files = sorted({path for pattern in ("*.safetensors", *BESIDE) for path in folder.glob(pattern) if path.is_file()})
    return digest([[path.relative_to(folder).as_posix(), _file_hash(path)] for path in files
                   if path.name not in (MANIFEST, CARD)])


def _file_hash(path: Path) -> str:
    """XXH3: every weight of every model is read for it. It tells accidents, not forgers."""
    hasher = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(READ):
                hasher.update(data)
    except OSError as error:
        raise CorruptedError(f"{path}: cannot be read ({error.strerror}).") from error
    return str(hasher.hexdigest())


@contextmanager
def _planned(config: Path | str | Sequence[Mapping[str, Any]], out: Path | str, intermediates: Path | str | None,
             keep: bool, options: Options, allow_unknown_keys: bool) -> Iterator[_Family]:
    place = place_for(out)
    home = Path(config).resolve().parent if isinstance(config, (str, Path)) else Path.cwd()
    source = f"merge config {config}" if isinstance(config, (str, Path)) else "merge config"
    graph = read_graph(_text(config), source=source, folders=(Path.cwd(), home), allow_unknown_keys=allow_unknown_keys)
    root = _root(graph, place, intermediates, keep)
    with _scratch() as outlines:
        family = _Family(graph, place, root, keep or intermediates is not None or graph.result is None, home, options, outlines)
        _plan(family)
        clash = [str(root / name) for name in graph.names
                 if any(leaf.is_relative_to((root / name).resolve()) for leaf in family.leaves)]
        if (model := next((leaf for leaf in family.leaves if root.resolve().is_relative_to(leaf)), None)) is not None:
            raise OutputError(f"{root} is to hold the intermediates, and is one of the models to be merged, or lies in one "
                              f"({model}). Give another folder.")
        if clash:
            raise OutputError.of("these models would be replaced by results of the same names. Keep the intermediates in "
                                 "another folder:", clash)
        yield family


def _text(config: Path | str | Sequence[Mapping[str, Any]]) -> str:
    return text_of(config) if isinstance(config, (str, Path)) else "---\n".join(text_of(document) for document in config)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for outlines, gone at the end."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="anabranch-outlines-")).resolve()
    except OSError as error:
        raise OutputError(f"cannot plan the family: no temporary files ({error.strerror or error}). Set TMPDIR.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _root(graph: Graph, out: Path, intermediates: Path | str | None, keep: bool) -> Path:
    """Where the named merges go."""
    if graph.result is None:
        if intermediates is not None or keep:
            raise RecipeError(f"-I, --keep-intermediates: every merge of this file has a name, so each is a result in {out}, "
                              "and none is in between. Leave the option out, or one document without a name.")
        strange = [p.name for p in (out.iterdir() if out.is_dir() else []) if not _ours(p, graph)]
        if os.path.lexists(out) and (strange or not out.is_dir()):
            raise OutputError(f"{out} is to hold a folder for each merge, and holds something else already: "
                              f"{', '.join(sorted(strange)[:5]) or 'it is no folder'}. Choose another output folder, or move "
                              "it away; nothing was changed.")
        return out
    root = place_for(intermediates) if intermediates is not None else out.with_name(f"{out.name}.intermediates")
    if root == out or root.is_relative_to(out) or any(out.is_relative_to(root / name) for name in graph.names):
        raise OutputError(f"{root}: intermediates cannot be kept inside the result {out}, nor it inside one of them. Give a "
                          "folder beside it.")
    if os.path.lexists(root) and not root.is_dir():
        raise OutputError(f"{root}: intermediates go into this folder, and it is no folder. Give another one (-I).")
    return root


def _ours(path: Path, graph: Graph) -> bool:
    """What may stand in a folder of results."""
    name = path.name.removesuffix(".partial")
    return path.name.startswith(".") or name in graph.names or _is_of_a_family(path)


def _plan(family: _Family) -> None:
    """Fill `family.plans`. Raises all that is wrong with all merges, in one error."""
    problems: list[tuple[Document, AnabranchError]] = []
    for document in family.graph.documents:
        if any(name not in family.plans for name in document.uses):
            continue  # what it stands on cannot be made
        config = family.graph.config(document, family.outlines)
        try:
            prepared = prepare(config, document.text, family.options)
        except AnabranchError as error:
            problems.append((document, error))
            continue
        family.plans[document.name] = Plan(config, prepared)
        if document.name is not None:
            write_outline(family.outlines / document.name, prepared)
    if len(problems) == 1:
        (document, only), = problems
        raise type(only)(family.told(f"{document.where}: {only}"))
    if problems:
        kinds = {type(problem) for _, problem in problems}
        kind = kinds.pop() if len(kinds) == 1 else RecipeError
        raise kind.of(f"{family.graph.source}:", [family.told(f"{d.where}: {problem}") for d, problem in problems])


# -------------------------------------------------------------------------------------------------------------- making


def _make(family: _Family, needed: Sequence[Document], settings: Settings,
          progress: Callable[[Progress], None] | None) -> None:
    total = sum(step.stop - step.start for d in needed for step in family.plans[d.name].prepared.merge.plan.steps)
    done = tensors = 0
    for document in needed:
        place = family.place(document)
        prepared = prepare(family.graph.config(document, family.root), document.text, family.options)
        if family.state(document) == "changed":
            _clear(place)
        folders = [*([family.root] if document.uses else []), Path.cwd(), family.home]
        recorded = recorded_of(prepared, document.text, family.options) | {
            "made_from": {KEY: family.key(document)}, "found_from": [os.path.relpath(f, place) for f in folders]}

        def tell(now: Progress, done: int = done, tensors: int = tensors) -> None:
            assert progress is not None
            progress(Progress(done + now.done, max(total, done + now.total), tensors + now.tensors))

        try:
            write(prepared.merge, OutputFolder(place, prepared.merge.plan, prepared.files), settings, recorded,
                  tell if progress is not None else None)
        except AnabranchError as error:
            raise type(error)(f"{document.where}: {error}") from error
        done += sum(step.stop - step.start for step in prepared.merge.plan.steps)
        tensors += len(prepared.merge.plan.steps)


def _clear(place: Path) -> None:
    """Remove a result of this family. Renamed first, so that a kill leaves no half of it under its name."""
    away = _away(place)
    try:
        if away.exists():
            shutil.rmtree(away)
        os.rename(place, away)
        shutil.rmtree(away)
    except OSError as error:
        raise OutputError(f"{place}: the outdated result cannot be removed ({error.strerror or error}).") from error


def _away(place: Path) -> Path:
    return place.with_name(f".{place.name}.anabranch-replaced")


def _forget_replaced(family: _Family) -> None:
    """Remove what a call was killed over while it removed it."""
    for name in family.graph.names:
        shutil.rmtree(_away(family.root / name), ignore_errors=True)


def _remove_intermediates(family: _Family) -> None:
    """Less those that hold something that no merge put there."""
    for name in family.graph.names:
        place = family.root / name
        if not place.is_symlink() and _is_of_a_family(place) and not _strange_in(
                place, MergeManifest.load(place / MANIFEST), family.plans[name]):
            with suppress(OutputError):  # the result is there; what is left of this is only told
                _clear(place)
    with suppress(OSError):  # not empty, or a link
        family.root.rmdir()


def _strange_in(place: Path, manifest: MergeManifest, plan: Plan) -> list[str]:
    """Files, however deep or hidden, that are no part of a result."""
    indices = [name for name in (*manifest.files, plan.prepared.merge.plan.index_file) if name.endswith(INDEX)]
    stems = "|".join(re.escape(name.removesuffix(INDEX)) for name in indices)
    weights = re.compile(rf"({stems})(-\d+-of-\d+)?\.safetensors")
    ours = {*manifest.files, MANIFEST, CARD}
    found = [path for path in sorted(place.rglob("*")) if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(place).as_posix() for path in found]
    strange = [name for name in names if name not in ours and not weights.fullmatch(name)]
    return [*strange[:SHOWN], *([f".. and {len(strange) - SHOWN} more"] if len(strange) > SHOWN else [])]


def _is_of_a_family(place: Path) -> bool:
    try:
        return KEY in MergeManifest.load(place / MANIFEST).made_from
    except CorruptedError:
        return False


@contextmanager
def _held(root: Path, needed: bool) -> Iterator[bool]:
    """The folder of the named merges, made where it is `needed`, and held against another call. Gives whether it is."""
    if not needed:
        yield False
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{root}: the folder for intermediate results cannot be made ({error.strerror}). Give another one "
                          "(-I), or free space.") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(f"another merge is working in {root}. Wait for it, or give another folder (-I).") from error
    except OSError:
        pass  # a file system without locks: go on unprotected
    try:
        if not root.is_dir() or not os.path.samestat(os.fstat(handle), os.stat(root)):
            raise OutputError(f"another merge has just finished and removed {root}. Run the same command again.")
        yield True
    finally:
        os.close(handle)
