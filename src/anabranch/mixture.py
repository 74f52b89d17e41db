"""Units, token counts, response masks: the data of every later stage. Only here does text become tokens.

    out/mixture.json                     written last
    out/units/NAME-HASH.safetensors      rows of a unit (rows.py); beside it .json: what it was made from
    out/transfer/  out/retention/        likewise, held-out rows only

The rules that leave rows out, in the order they apply; each row counts under the first that fits:

    malformed            no row of its format                       empty_prompt     no user turn says anything
    empty_response       an assistant turn without text             duplicate_held_out   a held-out row that is also a
    over_long            more tokens than max_length, never cut                          training row, drawn or not
    max_samples, max_tokens   not drawn                             too_few_samples  the whole unit

Rows are drawn by a seeded order of the unit's rows and tokenised until the cap is reached; those never looked at count
under the cap. A unit's file is made again only if its rows, the tokenizer, the template or its settings changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.artifacts import Exclusion, Mixture, Unit, digest, file_digest, write_atomically
from anabranch.errors import CorruptedError, MixtureError
from anabranch.recipe import Recipe, Source
from anabranch.rows import Rows, budget_indices, generator, load_unit, save_unit
from anabranch.sources import (
    Located,
    Messages,
    Rejected,
    Row,
    Split,
    UnitRows,
    is_hub_id,
    label_of,
    locate,
    read_source,
)
from anabranch.templates import Encoded, Template, choose_template, encode_rows, tokenizer_hash

Place = Literal["units", "transfer", "retention"]
PLACES: tuple[Place, ...] = ("units", "transfer", "retention")
Progress = Callable[[str, int, int], None]
RULES = ("malformed", "empty_prompt", "empty_response", "over_long", "duplicate_held_out", "max_samples", "max_tokens",
         "too_few_samples")
MAKING = 1  # raised when the same rows would give other files, so that older files are made again
BATCH = 256  # rows that are tokenised at a time; has no say in the result
EXAMPLES, EXAMPLE_CHARACTERS = 8, 300


def build_mixture(recipe: Recipe, tokenizer: Any, out: Path, *, base_hash: str,
                  progress: Progress | None = None) -> Mixture:
    """Read, check, tokenise and save the mixture; what is unchanged since the last time is not made again.

    Args:
        recipe: as `load_recipe` gives it (absolute paths).
        tokenizer: a fast tokenizer of transformers.
        out: the mixture folder; files in its units/, transfer/ and retention/ that this mixture has no use for go.
        base_hash: recorded in `made_from`; the tokens depend on the tokenizer only.
        progress: told (unit, done, total).
    Raises:
        MixtureError: every source that cannot be read, in one message; units of one name; a template that gives no
            response mask; no unit left (with the table of what was left out).
    """
    template = choose_template(recipe.mixture.chat_template, tokenizer)
    entries = _locate_all(recipe)
    made_from = {
        "base": base_hash, "tokenizer": tokenizer_hash(tokenizer), "chat_template": template.hash,
        "sources": digest([[e.where, e.rows.digest(), e.held_out.digest() if e.held_out else None] for e in entries]),
        "settings": digest(_settings(recipe))}
    finished = _finished(out, made_from)
    if finished is not None:
        return finished
    material = _read_all(recipe, entries)
    making = _Making(recipe, tokenizer, template, made_from, out,
                     frozenset(row.key for unit in material.units.values() for row in unit.train))
    built = _build_all(making, material, progress or (lambda *_: None))
    units, transfer, retention = ([b.unit for b in built[place] if b.unit] for place in PLACES)
    excluded = _sorted(material.stray + [e for place in built.values() for b in place for e in b.excluded])
    if not units:
        raise MixtureError.of("the mixture has no usable row. What was left out, and why:", exclusion_lines(excluded))
    repeated, examples = _look_back(out, units, tokenizer)
    mixture = Mixture(
        units=units, transfer=transfer, retention=retention, excluded=excluded, duplicates_in_train=repeated,
        duplicates_across=sum(e.rows for e in excluded if e.rule == "duplicate_held_out"), examples=examples,
        max_length=recipe.mixture.max_length, chat_template=template.kind, made_from=made_from)
    _sweep(out, {b.stem for place in built.values() for b in place})
    mixture.save(out / "mixture.json")
    return mixture


def held_out_rows(recipe: Recipe, tokenizer: Any) -> tuple[dict[str, Rows], list[Exclusion]]:
    """The rows of `evaluate.transfer` alone, tokenised: unit -> its rows, and what was left out. Nothing is written.

    Raises:
        MixtureError: as `build_mixture`; no usable row at all.
    """
    template = choose_template(recipe.mixture.chat_template, tokenizer)
    material = _read_all(recipe, [e for e in _locate_all(recipe) if e.place == "transfer"])
    making = _Making(recipe, tokenizer, template, {}, Path(), frozenset())
    rows, excluded = {}, list(material.stray)
    for name, unit in sorted(material.transfer.items()):
        drawn, _, lost = _draw(making, unit, "held_out")
        excluded += _count(name, unit.rejected + lost)
        if len(drawn):
            rows[name] = drawn
    if not rows:
        raise MixtureError.of("the data has no usable row. What was left out, and why:", exclusion_lines(_sorted(excluded)))
    return rows, _sorted(excluded)


def exclusion_lines(excluded: Sequence[Exclusion]) -> list[str]:
    """One line per rule, unit and side: how many rows, and the first of them."""
    return [f"{e.unit} ({e.split}): {e.rows:,} {'row' if e.rows == 1 else 'rows'}, {e.rule}: {e.example}"
            for e in excluded]


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A source of the recipe and where its rows lie."""

    place: Place
    where: str
    source: Source
    label: str
    rows: Located
    held_out: Located | None


@dataclass
class _Material:
    """All rows, by place and unit, and the rows of no unit."""

    units: dict[str, UnitRows] = field(default_factory=dict)
    transfer: dict[str, UnitRows] = field(default_factory=dict)
    retention: dict[str, UnitRows] = field(default_factory=dict)
    stray: list[Exclusion] = field(default_factory=list)

    def at(self, place: Place) -> dict[str, UnitRows]:
        return {"units": self.units, "transfer": self.transfer, "retention": self.retention}[place]


def _sources(recipe: Recipe) -> Iterator[tuple[Place, str, Source]]:
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


def _settings(recipe: Recipe) -> Any:
    """All of the recipe that decides the rows, without places."""

    def plain(source: Source) -> dict[str, Any]:
        held_out = _label(source.held_out, recipe) if isinstance(source.held_out, str) else source.held_out
        return source.model_dump(mode="json") | {"path": _label(source.path, recipe), "held_out": held_out}

    section = recipe.mixture.model_dump(mode="json", exclude={"sources", "chat_template"})
    sources = [[where, plain(source)] for _, where, source in _sources(recipe)]
    prompts = recipe.evaluate.retention == "held_out_prompts"
    return {"making": MAKING, "mixture": section, "sources": sources, "held_out_prompts": prompts, "seed": recipe.seed}


def _locate_all(recipe: Recipe) -> list[_Entry]:
    """Raises MixtureError with every source that is not there."""
    entries, problems = [], []
    folder = recipe.output.parent
    for place, where, source in _sources(recipe):
        try:
            rows = locate(source.path, source, source.split, folder)
            held_out = None
            if place == "units" and isinstance(source.held_out, str):
                split = rows.dataset is not None and is_hub_id(source.held_out) and not Path(source.held_out).exists()
                held_out = (locate(source.path, source, source.held_out, folder) if split
                            else locate(source.held_out, source, source.split, folder))
            entries.append(_Entry(place, where, source, _label(source.path, recipe), rows, held_out))
        except MixtureError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise MixtureError.of("the mixture cannot be read:", problems)
    return entries


def _read_all(recipe: Recipe, entries: list[_Entry]) -> _Material:
    """Raises MixtureError with every source that cannot be read and every name that stands twice."""
    material, problems = _Material(), []
    taken: dict[tuple[bool, str], str] = {}
    for entry in entries:
        try:
            units, stray = _read_entry(entry, recipe)
        except MixtureError as error:
            problems.append(f"{entry.where}: {error}")
            continue
        material.stray += _count(entry.label, stray)
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


def _read_entry(entry: _Entry, recipe: Recipe) -> tuple[dict[str, UnitRows], list[Rejected]]:
    source = entry.source
    if entry.place != "units":
        plain = entry.place == "retention" and source.format == "auto"
        return read_source(entry.rows, source, entry.label, form="text" if plain else source.format,
                           split_of=lambda _: "held_out")
    if entry.held_out is None:
        fraction = source.held_out if isinstance(source.held_out, float) else recipe.mixture.held_out
        return read_source(entry.rows, source, entry.label, form=source.format, split_of=_by_prompt(fraction))
    units, stray = read_source(entry.rows, source, entry.label, form=source.format, split_of=lambda _: "train")
    alone = next(iter(units)) if len(units) == 1 and source.unit_column is None else None
    label = entry.label if entry.held_out.dataset is not None else _label(str(source.held_out), recipe)
    others, more = read_source(entry.held_out, source, label, form=source.format, split_of=lambda _: "held_out",
                               only_unit=alone)
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
        number = int.from_bytes(hashlib.sha256(row.prompt.encode()).digest()[:8], "big")
        return "held_out" if number < fraction * 2**64 else "train"

    return side


# ---- one unit --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Making:
    """What every unit is made with."""

    recipe: Recipe
    tokenizer: Any
    template: Template
    made_from: dict[str, str]
    out: Path
    training: frozenset[bytes]

    def encode(self, rows: Sequence[Messages], unit: str) -> list[Encoded | str]:
        try:
            return encode_rows(self.template, self.tokenizer, rows)
        except MixtureError as error:
            raise MixtureError(f"unit {unit!r}: {error}") from error


@dataclass(frozen=True)
class _Built:
    """A unit's record (None: left out whole), what was left out, and which held-out rows were kept."""

    stem: str
    unit: Unit | None
    excluded: list[Exclusion]
    held_out: list[Row]


@dataclass(frozen=True)
class _Caps:
    rows: int | None
    tokens: int | None


def _build_all(making: _Making, material: _Material, progress: Progress) -> dict[str, list[_Built]]:
    prompts = making.recipe.evaluate.retention == "held_out_prompts"
    total = sum(len(material.at(p)) for p in PLACES) + prompts * len(material.units)
    done = 0
    built: dict[str, list[_Built]] = {"units": [], "transfer": [], "retention": []}

    def build(place: Place, unit: UnitRows) -> _Built:
        nonlocal done
        progress(unit.name, done, total)
        done += 1
        built[place].append(_build_unit(making, place, unit))
        return built[place][-1]

    for _, unit in sorted(material.units.items()):
        made = build("units", unit)
        if prompts and unit.format != "text" and made.unit is not None and made.held_out:
            texts = [Row(r.where, [{"role": "text", "content": r.prompt}]) for r in made.held_out]
            build("retention", UnitRows(unit.name, unit.source, "text", unit.settings, held_out=texts))
        else:
            done += prompts
    for place in ("transfer", "retention"):
        for _, unit in sorted(material.at(place).items()):
            build(place, unit)
    progress("", total, total)
    return built


def _build_unit(making: _Making, place: Place, unit: UnitRows) -> _Built:
    """From the cache if nothing changed, else tokenised and saved: the unit's file, then its record."""
    repeats = [Rejected("held_out", "duplicate_held_out", r.where, "also a training row") for r in unit.held_out
               if r.key in making.training]
    unit = replace(unit, held_out=[r for r in unit.held_out if r.key not in making.training],
                   rejected=unit.rejected + repeats)
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", unit.name).strip(".-")[:60] or "unit"
    stem = f"{place}/{slug}-{hashlib.sha256(unit.name.encode()).hexdigest()[:8]}"
    key = _unit_key(making, place, unit)
    cached = _cached(making.out, stem, key, unit)
    if cached is not None:
        return cached
    name = f"{unit.name} (retention)" if place == "retention" else unit.name
    train, kept_train, lost_train = _draw(making, unit, "train")
    held_out, kept, lost = _draw(making, unit, "held_out")
    excluded = _count(name, unit.rejected + lost_train + lost)
    record = _record(making, place, unit, stem, train, held_out)
    shortage = _shortage(making, place, unit, record)
    if shortage:
        left: dict[Split, int] = {"train": len(kept_train), "held_out": len(kept)}
        always = "train" if place == "units" else "held_out"  # the line that tells why, with or without rows
        excluded += [Exclusion(unit=name, rule="too_few_samples", rows=n, split=split, example=shortage)
                     for split, n in left.items() if n or split == always]
        kept = []
    else:
        record = record.model_copy(update={"sha256": save_unit(making.out / f"{stem}.safetensors", train, held_out)})
    built = _Built(stem, None if shortage else record, excluded, [unit.held_out[i] for i in kept])
    content = {"key": key, "unit": built.unit.model_dump(mode="json") if built.unit else None,
               "excluded": [e.model_dump(mode="json") for e in built.excluded], "held_out": kept}
    write_atomically(making.out / f"{stem}.json", (json.dumps(content, ensure_ascii=False) + "\n").encode())
    return built


def _unit_key(making: _Making, place: Place, unit: UnitRows) -> str:
    section, own = making.recipe.mixture, unit.settings
    rows = hashlib.sha256()
    for split in (unit.train, unit.held_out):
        for row in split:
            rows.update(row.where.encode() + b"\0" + row.key)
        rows.update(b"\1")
    rejected = [[r.split, r.rule, r.where, r.why] for r in unit.rejected]
    settings = [section.max_length, section.max_held_out, section.min_samples, section.max_samples, section.max_tokens,
                section.epochs, own.max_samples, own.max_tokens, own.epochs, making.recipe.seed]
    return digest([MAKING, place, unit.name, unit.source, unit.format, rows.hexdigest(), digest(rejected), settings,
                   making.made_from["tokenizer"], making.made_from["chat_template"]])


def _cached(out: Path, stem: str, key: str, unit: UnitRows) -> _Built | None:
    """The unit as it lies there, if it was made from just this and is whole."""
    try:
        content = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        record = Unit.model_validate(content["unit"]) if content["unit"] else None
        if record is not None and file_digest(out / record.file) != record.sha256:
            return None
        return _Built(stem, record, [Exclusion.model_validate(e) for e in content["excluded"]],
                      [unit.held_out[i] for i in content["held_out"]])
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # never written, or not by us: made again
        return None


def _draw(making: _Making, unit: UnitRows, split: Split) -> tuple[Rows, list[int], list[Rejected]]:
    """Tokenise rows in the order of the draw to the cap: (rows in source order, their numbers, what was left out)."""
    section, own, pool = making.recipe.mixture, unit.settings, unit.side(split)
    caps = (_Caps(own.max_samples or section.max_samples, own.max_tokens or section.max_tokens) if split == "train"
            else _Caps(section.max_held_out, None))
    order = np.arange(len(pool))
    if caps.rows or caps.tokens:
        stream = "max_samples" if split == "train" else "max_held_out"
        order = generator(making.recipe.seed, stream, unit.name).permutation(len(pool))
    kept: dict[int, Encoded] = {}
    lost: dict[int, Rejected] = {}
    tokens, seen, full = 0, 0, ""
    while seen < len(order) and not full:
        if caps.rows is not None and len(kept) == caps.rows:
            full = "max_samples"
            break
        wanted = BATCH if caps.rows is None else min(BATCH, max(16, caps.rows - len(kept)))
        batch = order[seen : seen + wanted]
        for i, row in zip(batch, making.encode([pool[i].messages for i in batch], unit.name), strict=True):
            if caps.rows is not None and len(kept) == caps.rows:
                break  # the rest of the batch was tokenised in vain
            problem = _problem(row, section.max_length)
            if problem is not None:
                lost[int(i)] = Rejected(split, problem[0], pool[i].where, problem[1])
            elif isinstance(row, Encoded):
                if caps.tokens is not None and tokens + len(row.input_ids) > caps.tokens:
                    full = "max_tokens"
                    break
                kept[int(i)] = row
                tokens += len(row.input_ids)
            seen += 1
    why = f"{caps.rows or 0:,} rows are drawn" if full == "max_samples" else f"{caps.tokens or 0:,} tokens are drawn"
    undrawn = [Rejected(split, full, pool[i].where, why) for i in sorted(order[seen:].tolist())]
    rejected = [lost[i] for i in sorted(lost)] + undrawn
    return _rows([kept[i] for i in sorted(kept)]), sorted(kept), rejected


def _problem(row: Encoded | str, max_length: int) -> tuple[str, str] | None:
    """(rule, why) of a row that cannot be used now that it is tokens."""
    if isinstance(row, str):
        return "malformed", row
    if len(row.input_ids) > max_length:
        return "over_long", f"{len(row.input_ids):,} tokens, max_length is {max_length:,}"
    return None if row.response.any() else ("empty_response", "a single token: nothing to predict")


def _rows(encoded: list[Encoded]) -> Rows:
    lengths = [len(e.input_ids) for e in encoded]
    return Rows(np.concatenate([np.zeros(0, np.int32), *(e.input_ids for e in encoded)]).astype(np.int32),
                np.concatenate([np.zeros(0, np.uint8), *(e.response for e in encoded)]).astype(np.uint8),
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _record(making: _Making, place: Place, unit: UnitRows, stem: str, train: Rows, held_out: Rows) -> Unit:
    epochs = unit.settings.epochs or making.recipe.mixture.epochs
    chosen = budget_indices(len(train), epochs, making.recipe.seed, unit.name)
    return Unit(
        name=unit.name, source=unit.source, format=unit.format, file=f"{stem}.safetensors", sha256="", rows=len(train),
        epochs=epochs if place == "units" else 0.0, samples=len(chosen), tokens=int(train.lengths[chosen].sum()),
        response_tokens=int(train.response_lengths[chosen].sum()), held_out_rows=len(held_out),
        held_out_tokens=int(held_out.lengths.sum()), held_out_response_tokens=int(held_out.response_lengths.sum()))


def _shortage(making: _Making, place: Place, unit: UnitRows, record: Unit) -> str:
    """Why a unit is left out whole, or ''."""
    least = making.recipe.mixture.min_samples
    if place != "units":
        return "" if record.held_out_rows else "no usable row"
    if record.rows < least:
        return f"{record.rows} training rows, min_samples is {least}"
    return "" if record.samples else f"{record.rows} rows x {record.epochs:g} epochs is less than one sample"


def _count(unit: str, rejected: Sequence[Rejected]) -> list[Exclusion]:
    """Rejected rows counted by rule and side, with the first as the example."""
    groups: dict[tuple[str, str], list[Rejected]] = {}
    for r in rejected:
        groups.setdefault((r.rule, r.split), []).append(r)
    return [Exclusion.model_validate({"unit": unit, "rule": rule, "split": split, "rows": len(some),
                                      "example": f"{some[0].where}: {some[0].why}" if some[0].where else some[0].why})
            for (rule, split), some in groups.items()]


def _sorted(excluded: list[Exclusion]) -> list[Exclusion]:
    return sorted(excluded, key=lambda e: (e.unit, RULES.index(e.rule), e.split != "train"))


# ---- the folder ------------------------------------------------------------------------------------------------------


def _finished(out: Path, made_from: dict[str, str]) -> Mixture | None:
    """The mixture as it lies there, if it was made from just this and every file is whole."""
    try:
        mixture = Mixture.load(out / "mixture.json")
        whole = mixture.made_from == made_from and all(
            file_digest(out / u.file) == u.sha256 for u in (*mixture.units, *mixture.transfer, *mixture.retention))
    except (CorruptedError, OSError):  # not yet, or damaged: made again
        return None
    return mixture if whole else None


def _sweep(out: Path, stems: set[str]) -> None:
    """Remove files of units that the mixture no longer has, so that the folder is what mixture.json says."""
    for place in PLACES:
        for path in (*(out / place).glob("*.safetensors"), *(out / place).glob("*.json")):
            if f"{place}/{path.stem}" not in stems:
                path.unlink(missing_ok=True)


def _look_back(out: Path, units: list[Unit], tokenizer: Any) -> tuple[int, list[dict[str, str]]]:
    """Training rows that repeat another, and a few rows as the loss sees them: decoded from the tokens, by the mask."""
    shown = set(np.linspace(0, len(units) - 1, min(EXAMPLES, len(units))).round().astype(int).tolist())
    seen: set[bytes] = set()
    total, examples = 0, []
    for number, unit in enumerate(units):
        rows = load_unit(out / unit.file, "train")
        total += len(rows)
        seen.update(hashlib.sha256(ids.tobytes() + mask.tobytes()).digest()[:16] for ids, mask in
                    (rows.row(i) for i in range(len(rows))))
        if number in shown:
            ids, mask = rows.row(0)
            examples.append({"unit": unit.name, "prompt": _short(tokenizer.decode(ids[: int(mask.argmax())].tolist())),
                             "response": _short(tokenizer.decode(ids[mask == 1].tolist()))})
    return total - len(seen), examples


def _short(text: str) -> str:
    half = EXAMPLE_CHARACTERS // 2
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[: half - 2]} … {text[-half + 2 :]}"
