"""The sources of a recipe: located, then read, into the rows of each unit before any token is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from anabranch.artifacts import Exclusion
from anabranch.errors import MixtureError
from anabranch.mixture_summary import nothing_usable
from anabranch.pictures import Pictures
from anabranch.recipe import Recipe, Source
from anabranch.sources import IMAGE, Located, Rejected, Row, Split, UnitRows, is_hub_id, label_of, locate, read_source

Place = Literal["units", "transfer", "retention"]
PLACES: tuple[Place, ...] = ("units", "transfer", "retention")
MAKING = 1  # raised when the same rows would give other files, so that older files are made again


@dataclass(frozen=True)
class Entry:
    """A source of the recipe and where its rows lie."""

    place: Place
    where: str
    source: Source
    label: str
    rows: Located
    held_out: Located | None


@dataclass
class Material:
    """All rows, by place and unit, and the rows of no unit."""

    units: dict[str, UnitRows] = field(default_factory=dict)
    transfer: dict[str, UnitRows] = field(default_factory=dict)
    retention: dict[str, UnitRows] = field(default_factory=dict)
    stray: list[Exclusion] = field(default_factory=list)
    names: list[tuple[Entry, list[str]]] = field(default_factory=list)  # the units of each source

    def at(self, place: Place) -> dict[str, UnitRows]:
        return {"units": self.units, "transfer": self.transfer, "retention": self.retention}[place]


def sources_of(recipe: Recipe) -> Iterator[tuple[Place, str, Source]]:
    retention = recipe.evaluate.retention
    lists: list[tuple[Place, str, list[Source]]] = [
        ("units", "mixture.sources", recipe.mixture.sources),
        ("transfer", "evaluate.transfer", recipe.evaluate.transfer),
        ("retention", "evaluate.retention", retention if isinstance(retention, list) else [])]
    for place, name, sources in lists:
        for i, source in enumerate(sources):
            yield place, f"{name}[{i}]", source


def _label(path: str, recipe: Recipe) -> str:
    hub = is_hub_id(path) and not Path(path).exists()
    return path if hub else label_of(path, recipe.output.parent)


def settings_of(recipe: Recipe) -> Any:
    """All of the recipe that decides the rows, without places."""

    def plain(source: Source) -> dict[str, Any]:
        held_out = _label(source.held_out, recipe) if isinstance(source.held_out, str) else source.held_out
        settings = source.model_dump(mode="json", exclude={"images"})
        images = {"images": label_of(source.images, recipe.output.parent)} if source.images is not None else {}
        return settings | {"path": _label(source.path, recipe), "held_out": held_out} | images

    section = recipe.mixture.model_dump(mode="json", exclude={"sources", "chat_template", "images"})
    if recipe.mixture.images.max_pixels is not None:
        section["images"] = recipe.mixture.images.model_dump(mode="json")
    sources = [[where, plain(source)] for _, where, source in sources_of(recipe)]
    prompts = recipe.evaluate.retention == "held_out_prompts"
    return {"making": MAKING, "mixture": section, "sources": sources, "held_out_prompts": prompts, "seed": recipe.seed}


def locate_all(recipe: Recipe) -> tuple[list[Entry], list[str]]:
    """Where all sources lie, and what is wrong with each that is not there."""
    entries, problems = [], []
    folder = recipe.output.parent
    for place, where, source in sources_of(recipe):
        try:
            rows = locate(source.path, source, source.split, folder)
            held_out = None
            if place == "units" and isinstance(source.held_out, str):
                split = rows.dataset is not None and is_hub_id(source.held_out) and not Path(source.held_out).exists()
                held_out = (locate(source.path, source, source.held_out, folder) if split
                            else locate(source.held_out, source, source.split, folder))
            entries.append(Entry(place, where, source, _label(source.path, recipe), rows, held_out))
        except MixtureError as error:
            problems.append(f"{where}: {error}")
    return entries, problems


def read_all(recipe: Recipe, entries: list[Entry], pictures: Pictures | None, keys: list[str], *, missing: Sequence[str] = (),
             on_source: Callable[[str], None] = lambda _: None) -> Material:
    """All rows.

    Args:
        keys: under which `pictures` remembers the image files of each entry.
        missing: what is wrong with sources that are not among the entries.
        on_source: told each source before it is read.
    Raises:
        MixtureError: with every source that cannot be read, or of which no row is usable, and every name that stands twice.
    """
    material, problems = Material(), list(missing)
    taken: dict[tuple[bool, str], str] = {}
    for entry, key in zip(entries, keys, strict=True):
        on_source(entry.label)
        try:
            with pictures.reading(key) if pictures is not None else contextlib.nullcontext():
                units, stray = _read_entry(entry, recipe, pictures)
        except MixtureError as error:
            problems.append(f"{entry.where}: {error}")
            continue
        strays = count(entry.label, stray)
        material.stray += strays
        material.names.append((entry, list(units)))
        side: Split = "train" if entry.place == "units" else "held_out"
        if not any(unit.side(side) for unit in units.values()):
            lost = strays + [e for name, unit in units.items() for e in count(name, unit.rejected)]
            if why := nothing_usable(entry.source, [e for e in lost if e.split == side]):
                problems.append(f"{entry.where} ({entry.label}): {why}")
        for name, unit in units.items():
            scope = (entry.place == "retention", name)
            if scope in taken:
                problems.append(f"two sources give a unit named {name!r}: {taken[scope]} and {entry.where} "
                                f"({entry.label}). Set another `unit` for one of them.")
            else:
                taken[scope] = f"{entry.where} ({entry.label})"
                material.at(entry.place)[name] = unit
    if problems:
        raise MixtureError.of("the mixture cannot be read:", problems)
    return material


def _read_entry(entry: Entry, recipe: Recipe, pictures: Pictures | None) -> tuple[dict[str, UnitRows], list[Rejected]]:
    source = entry.source
    if entry.place != "units":
        plain = entry.place == "retention" and source.format == "auto"
        return read_source(entry.rows, source, entry.label, form="text" if plain else source.format,
                           split_of=lambda _: "held_out", pictures=pictures)
    if entry.held_out is None:
        fraction = source.held_out if isinstance(source.held_out, float) else recipe.mixture.held_out
        return read_source(entry.rows, source, entry.label, form=source.format, split_of=_by_prompt(fraction),
                           pictures=pictures)
    units, stray = read_source(entry.rows, source, entry.label, form=source.format, split_of=lambda _: "train",
                               pictures=pictures)
    alone = next(iter(units)) if len(units) == 1 and source.unit_column is None else None
    label = entry.label if entry.held_out.dataset is not None else _label(str(source.held_out), recipe)
    others, more = read_source(entry.held_out, source, label, form=source.format, split_of=lambda _: "held_out",
                               only_unit=alone, pictures=pictures)
    for name, other in others.items():
        unit = units.setdefault(name, UnitRows(name, entry.label, other.format, source))
        unit.held_out += other.held_out
        unit.rejected += other.rejected
    return units, stray + more


def _by_prompt(fraction: float) -> Callable[[Row | None], Split]:
    """The side of a row by the hash of its prompt: equal prompts share a side, in any order and under any seed."""

    def side(row: Row | None) -> Split:
        if row is None:
            return "train"
        number = int.from_bytes(row.prompt_key[:8], "big")
        return "held_out" if number < fraction * 2**64 else "train"

    return side


def count(unit: str, rejected: Sequence[Rejected]) -> list[Exclusion]:
    """Rejected rows counted by rule and side, with the first as the example."""
    groups: dict[tuple[str, str], list[Rejected]] = {}
    for r in rejected:
        groups.setdefault((r.rule, r.split), []).append(r)
    return [Exclusion.model_validate({"unit": unit, "rule": rule, "split": split, "rows": len(some),
                                      "example": f"{some[0].where}: {some[0].why}" if some[0].where else some[0].why})
            for (rule, split), some in groups.items()]


def prompts_alone(rows: Sequence[Row]) -> list[Row]:
    """Prompts as plain text. Of rows with images what is left without them, each once: a task asks the same of every image."""
    texts, said = [], set()
    for row in rows:
        text = row.prompt.replace(IMAGE, "") if row.images else row.prompt
        if row.images and (text in said or not text.strip()):
            continue
        said.add(text)
        texts.append(Row(row.where, [{"role": "text", "content": text}]))
    return texts
