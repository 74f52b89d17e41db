"""Units, token counts, response masks: the data of every later stage. Only here does text become tokens.

    out/mixture.json                     written last
    out/units/NAME-HASH.safetensors      rows of a unit (rows.py); beside it .json: what it was made from
    out/transfer/  out/retention/        likewise, held-out rows only

The rules that leave rows out, in the order they apply; each row counts under the first that fits:

    malformed            no row of its format                       empty_prompt     no user turn says anything
    empty_response       an assistant turn without text             duplicate_held_out   a held-out row that is also a
    missing_image        no such file, or one to be downloaded                           training row, drawn or not
    broken_image         cut short, no image, another format        huge_image       more pixels than are decoded
    animated_image       several frames                             over_long        more tokens than max_length, never cut
    max_samples, max_tokens   not drawn                             too_few_samples  the whole unit

Rows are drawn by a seeded order of the unit's rows and tokenised until the cap is reached; those never looked at count
under the cap. A unit's file is made again only if its rows, the tokenizer, the template or its settings changed.

Rows with images (vision-language models): NAME-HASH.images.safetensors beside the unit's file holds the images of its rows,
each once; .images.json remembers which image files were seen (pictures.py). Images are decoded when their row is drawn.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.artifacts import AuditRow, Exclusion, Mixture, Unit, digest, write_atomically
from anabranch.errors import MixtureError, OutputError
from anabranch.left_out import Notes
from anabranch.material import MAKING, PLACES, Entry, Material, Place, count, locate_all, prompts_alone, read_all, settings_of
from anabranch.mixture_folder import finished, sweep, whole_unit
from anabranch.mixture_summary import UnitImages, audit_row, exclusion_lines, look_back, nothing_usable, summary
from anabranch.pictures import Pictures
from anabranch.recipe import Recipe
from anabranch.rows import Rows, budget_indices, generator, images_file, save_unit
from anabranch.sources import Rejected, Row, Split, UnitRows
from anabranch.templates import Encoded, Template, choose_template, encode_rows, render, tokenizer_hash
from anabranch.unit_images import Eye, Look, Stored, check_row, passing_folder, store
from anabranch.vision import Vision

Progress = Callable[[str, int, int], None]
RULES = ("malformed", "empty_prompt", "empty_response", "missing_image", "broken_image", "huge_image", "animated_image",
         "over_long", "duplicate_held_out", "max_samples", "max_tokens", "too_few_samples")
BATCH = 256  # rows that are tokenised at a time; has no say in the result


def build_mixture(recipe: Recipe, tokenizer: Any, out: Path, *, base_hash: str, vision: Vision | None = None,
                  progress: Progress | None = None, on_images: Callable[[Path], None] | None = None,
                  on_source: Callable[[str], None] = lambda _: None, notes: Notes | None = None) -> Mixture:
    """Read, check, tokenise and save the mixture; what is unchanged since the last time is not made again.

    Args:
        recipe: as `load_recipe` gives it (absolute paths).
        tokenizer: a fast tokenizer of transformers.
        out: the mixture folder; files in its units/, transfer/ and retention/ that this mixture has no use for go.
        base_hash: recorded in `made_from`; the tokens depend on the tokenizer only.
        vision: of a vision-language model; None: a language model, for which no row may show an image.
        progress: told (unit, done, total).
        on_images: told each file of images once its unit is saved; it may take the file away, as nothing here reads it again.
        on_source: told each source before it is read.
        notes: filled in with what the mixture does not keep, of units that are made now.
    Raises:
        MixtureError: every source that cannot be read, or of which every row is malformed or its image unusable, in one
            message; units of one name; a template that gives no response mask; images outside of their root, or for a
            language model; no unit left (with the table of what was left out).
        ModelError: a processor that makes other tokens of a row than were made here.
    """
    template = choose_template(recipe.mixture.chat_template, tokenizer, vision)
    entries, missing = locate_all(recipe)
    pictures = Pictures(recipe.output.parent, out) if vision is not None else None
    keys: list[str] | None = None
    try:
        if missing:  # what else is wrong is told with it
            read_all(recipe, entries, pictures, [e.where for e in entries], missing=missing, on_source=on_source)
        content = [[e.where, e.rows.digest(), e.held_out.digest() if e.held_out else None] for e in entries]
        named = [digest([*c, e.source.model_dump(mode="json")]) for c, e in zip(content, entries, strict=True)]
        mixture = _build(recipe, tokenizer, out, base_hash, template, entries, content, named, vision, pictures,
                         progress or (lambda *_: None), on_images, on_source, notes)
        keys = named
        return mixture
    finally:
        if pictures is not None:
            with contextlib.suppress(OutputError):  # it only spares work, and what stopped the build is what matters
                pictures.save(keys)
            pictures.close()


def _build(recipe: Recipe, tokenizer: Any, out: Path, base_hash: str, template: Template, entries: list[Entry],
           content: list[list[str | None]], keys: list[str], vision: Vision | None, pictures: Pictures | None,
           progress: Progress, on_images: Callable[[Path], None] | None, on_source: Callable[[str], None],
           notes: Notes | None) -> Mixture:
    """`content`: of each entry its place and the hashes of its rows; `keys`: its name for `pictures`."""
    material = None
    if pictures is not None and not all(pictures.knows(key) for key in keys):  # which images belong to them, the rows tell
        material = read_all(recipe, entries, pictures, keys, on_source=on_source)
    if pictures is not None:
        content = [c + ([images] if images else []) for c, key in zip(content, keys, strict=True)
                   for images in [pictures.digest(key)]]
    made_from = {"base": base_hash, "tokenizer": tokenizer_hash(tokenizer), "chat_template": template.hash,
                 "sources": digest(content), "settings": digest(settings_of(recipe))}
    if vision is not None:
        made_from["vision"] = vision.hash
    known = finished(out, made_from, pictures)
    if known is not None:
        return known
    material = material or read_all(recipe, entries, pictures, keys, on_source=on_source)
    if notes is not None:
        notes.read(material)
    if vision is not None and recipe.mixture.images.max_pixels is not None:
        vision.check_cap(recipe.mixture.images.max_pixels)
    eye = Eye(vision, pictures, recipe.mixture.images.max_pixels) if vision is not None and pictures is not None else None
    making = _Making(recipe, tokenizer, template, made_from, out,
                     frozenset(row.key for unit in material.units.values() for row in unit.train), eye, on_images, notes)
    built = _build_all(making, material, progress)
    _refuse_unusable(material, built)
    units, transfer, retention = ([b.unit for b in built[place] if b.unit] for place in PLACES)
    excluded = _sorted(material.stray + [e for place in built.values() for b in place for e in b.excluded])
    if not units:
        raise MixtureError.of("the mixture has no usable row. What was left out, and why:", exclusion_lines(excluded))
    repeated, examples = look_back(out, units, tokenizer, vision)
    shown = [(b.unit, b.images) for place in built.values() for b in place if b.unit and b.images]
    mixture = Mixture(
        units=units, transfer=transfer, retention=retention, excluded=excluded, duplicates_in_train=repeated,
        duplicates_across=sum(e.rows for e in excluded if e.rule == "duplicate_held_out"), examples=examples,
        max_length=recipe.mixture.max_length, chat_template=template.kind, made_from=made_from,
        vision=summary(out, shown, vision, recipe.mixture.images.max_pixels) if vision is not None and shown else None,
        audit=[b.images.audit for b in built["units"] if b.unit and b.images and b.images.audit])
    sweep(out, [u for place in (units, transfer, retention) for u in place], {b.stem for p in built.values() for b in p})
    mixture.save(out / "mixture.json")
    return mixture


def held_out_rows(recipe: Recipe, tokenizer: Any, *, vision: Vision | None = None,
                  folder: Path | None = None) -> tuple[dict[str, Rows], list[Exclusion]]:
    """The rows of `evaluate.transfer` alone, tokenised: unit -> its rows, and what was left out.

    Args:
        vision: of a vision-language model.
        folder: where the images of rows are stored, to be read from there; nothing else is written. None: in one that goes when
            the process ends.
    Raises:
        MixtureError: as `build_mixture`; no usable row at all.
    """
    template = choose_template(recipe.mixture.chat_template, tokenizer, vision)
    entries, missing = locate_all(recipe)
    entries = [e for e in entries if e.place == "transfer"]
    pictures = Pictures(recipe.output.parent, None) if vision is not None else None
    try:
        material = read_all(recipe, entries, pictures, [e.where for e in entries], missing=missing)
        eye = Eye(vision, pictures, recipe.mixture.images.max_pixels) if vision is not None and pictures is not None else None
        making = _Making(recipe, tokenizer, template, {}, folder or Path(), frozenset(), eye)
        rows, excluded = {}, list(material.stray)
        for number, (name, unit) in enumerate(sorted(material.transfer.items())):
            drawn = _draw(making, unit, "held_out")
            excluded += count(name, unit.rejected + drawn.rejected)
            if len(drawn.rows):
                rows[name] = _with_images_in(making, folder, f"{number}.safetensors", drawn)
    finally:
        if pictures is not None:
            pictures.close()
    if not rows:
        raise MixtureError.of("the data has no usable row. What was left out, and why:", exclusion_lines(_sorted(excluded)))
    return rows, _sorted(excluded)


def _with_images_in(making: _Making, folder: Path | None, file: str, drawn: _Drawn) -> Rows:
    """The rows, their images in `folder`."""
    if making.eye is None or not any(drawn.looks):
        return drawn.rows
    folder = folder or passing_folder()
    nothing = _rows([])
    stored = store(folder / file, making.eye, [], drawn.looks)
    rows = replace(drawn.rows, images=stored.held_out)
    save_unit(folder / file, nothing, rows, stored.hashes)
    return rows


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
    eye: Eye | None
    on_images: Callable[[Path], None] | None = None
    notes: Notes | None = None

    def encode(self, rows: Sequence[Row], unit: str) -> list[tuple[Encoded | str, list[Look]] | tuple[str, str]]:
        """Each row as tokens (or why the template refuses it) with its images; or the rule by which an image leaves it out."""
        looks = self.eye.look(rows) if self.eye is not None and any(r.images for r in rows) else [[] for _ in rows]
        good = [(row, each) for row, each in zip(rows, looks, strict=True) if isinstance(each, list)]
        texts = [self.eye.texts(each) for _, each in good] if self.eye is not None else None
        try:
            encoded = iter(encode_rows(self.template, self.tokenizer, [row.messages for row, _ in good], texts))
        except MixtureError as error:
            raise MixtureError(f"unit {unit!r}: {error}") from error
        return [(next(encoded), each) if isinstance(each, list) else each for each in looks]

    @cached_property
    def image_ids(self) -> np.ndarray:
        """Tokens that no text may hold, int64."""
        return np.array(sorted(self.eye.vision.image_ids if self.eye is not None else ()), np.int64)


@dataclass(frozen=True)
class _Drawn:
    """Rows of a split in source order, with their numbers there, their images, and what was left out."""

    rows: Rows
    kept: list[int]
    encoded: list[Encoded]
    looks: list[list[Look]]
    rejected: list[Rejected]


@dataclass(frozen=True)
class _Built:
    """A unit's record (None: left out whole), what was left out, and which held-out rows were kept."""

    name: str
    stem: str
    unit: Unit | None
    excluded: list[Exclusion]
    held_out: list[Row]
    images: UnitImages | None


@dataclass(frozen=True)
class _Caps:
    rows: int | None
    tokens: int | None


def _build_all(making: _Making, material: Material, progress: Progress) -> dict[str, list[_Built]]:
    prompts = making.recipe.evaluate.retention == "held_out_prompts"
    total = sum(len(material.at(p)) for p in PLACES) + prompts * len(material.units)
    done = 0
    built: dict[str, list[_Built]] = {"units": [], "transfer": [], "retention": []}

    def build(place: Place, unit: UnitRows) -> _Built:
        nonlocal done
        progress(unit.name, done, total)
        done += 1
        built[place].append(_build_unit(making, place, unit, lambda rows: progress(f"{unit.name} ({rows})", done - 1, total)))
        return built[place][-1]

    for _, unit in sorted(material.units.items()):
        made = build("units", unit)
        if prompts and unit.format != "text" and made.unit is not None and made.held_out:
            texts = prompts_alone(made.held_out)
            build("retention", UnitRows(unit.name, unit.source, "text", unit.settings, held_out=texts))
        else:
            done += prompts
    for place in ("transfer", "retention"):
        for _, unit in sorted(material.at(place).items()):
            build(place, unit)
    progress("", total, total)
    return built


def _refuse_unusable(material: Material, built: dict[str, list[_Built]]) -> None:
    """Raises MixtureError with every source of which no row was left, where nobody chose so."""
    made = {(place, b.name): b for place, units in built.items() for b in units}
    problems = []
    for entry, names in material.names:
        units = [made[entry.place, name] for name in names]
        lost = [e for b in units for e in b.excluded if e.split == ("train" if entry.place == "units" else "held_out")]
        if not any(b.unit for b in units) and not any(e.rows for e in lost if e.rule == "too_few_samples"):
            why = nothing_usable(entry.source, [e for e in lost if e.rule != "too_few_samples"])
            problems += [f"{entry.where} ({entry.label}): {why}"] if why else []
    if problems:
        raise MixtureError.of("the mixture cannot be made:", problems)


def _build_unit(making: _Making, place: Place, unit: UnitRows, tell: Callable[[str], None]) -> _Built:
    """From the cache if nothing changed, else tokenised and saved: the unit's file, then its record."""
    repeats = [Rejected("held_out", "duplicate_held_out", r.where, "also a training row") for r in unit.held_out
               if r.key in making.training]
    unit = replace(unit, held_out=[r for r in unit.held_out if r.key not in making.training],
                   rejected=unit.rejected + repeats)
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", unit.name).strip(".-")[:60] or "unit"
    stem = f"{place}/{slug}-{hashlib.sha256(unit.name.encode()).hexdigest()[:8]}"
    key = _unit_key(making, place, unit)
    cached = _cached(making, stem, key, unit)
    if cached is not None:
        return cached
    name = f"{unit.name} (retention)" if place == "retention" else unit.name
    train, held_out = _draw(making, unit, "train", tell), _draw(making, unit, "held_out", tell)
    if making.notes is not None:
        making.notes.leave_out(name, unit.rejected + train.rejected + held_out.rejected)
    excluded = count(name, unit.rejected + train.rejected + held_out.rejected)
    record = _record(making, place, unit, stem, train, held_out)
    shortage = _shortage(making, place, unit, record)
    kept, images = held_out.kept, None
    if shortage:
        left: dict[Split, int] = {"train": len(train.kept), "held_out": len(kept)}
        always = "train" if place == "units" else "held_out"  # the line that tells why, with or without rows
        excluded += [Exclusion(unit=name, rule="too_few_samples", rows=n, split=split, example=shortage)
                     for split, n in left.items() if n or split == always]
        kept = []
    else:
        sha256, images = _save(making, unit, making.out / f"{stem}.safetensors", train, held_out)
        record = record.model_copy(update={"sha256": sha256})
    built = _Built(unit.name, stem, None if shortage else record, excluded, [unit.held_out[i] for i in kept], images)
    content = {"key": key, "unit": built.unit.model_dump(mode="json") if built.unit else None,
               "excluded": [e.model_dump(mode="json") for e in built.excluded], "held_out": kept}
    if images is not None:
        content["images"] = images.model_dump(mode="json")
    write_atomically(making.out / f"{stem}.json", (json.dumps(content, ensure_ascii=False) + "\n").encode())
    return built


def _save(making: _Making, unit: UnitRows, path: Path, train: _Drawn, held_out: _Drawn) -> tuple[str, UnitImages | None]:
    """Write a unit's rows, after their images: (SHA-256 of the file, what its images came to)."""
    if making.eye is None or not any([*train.looks, *held_out.looks]):
        return save_unit(path, train.rows, held_out.rows), None
    stored = store(path, making.eye, train.looks, held_out.looks)
    rows = {"train": replace(train.rows, images=stored.train), "held_out": replace(held_out.rows, images=stored.held_out)}
    sha256 = save_unit(path, rows["train"], rows["held_out"], stored.hashes)
    audits = []
    sides: list[tuple[Split, _Drawn]] = [("train", train), ("held_out", held_out)]
    for split, drawn in sides:
        first = {len(looks): i for i, looks in reversed(list(enumerate(drawn.looks))) if looks}  # by number of images
        for number in sorted(first.values()):
            row, encoded = unit.side(split)[drawn.kept[number]], drawn.encoded[number]
            rendered = render(making.template, making.tokenizer, row.messages)
            shown = rows[split].images_of([number])[0]
            if isinstance(rendered, tuple):
                check_row(making.eye, rendered[0], shown, encoded.input_ids, unit.name)
            if number == min(first.values()):
                audits.append((split, audit_row(making.tokenizer, unit.name, row.where, path, making.out, shown, encoded,
                                                making.template.placeholder)))
    if making.on_images is not None:
        making.on_images(images_file(path))
    return sha256, _images_of(making, unit, train, stored, next((a for split, a in audits if split == "train"), None))


def _images_of(making: _Making, unit: UnitRows, train: _Drawn, stored: Stored, audit: AuditRow | None) -> UnitImages:
    epochs = unit.settings.epochs or making.recipe.mixture.epochs
    chosen = budget_indices(len(train.rows), epochs, making.recipe.seed, unit.name)
    assert making.eye is not None  # it looked at them
    uncapped = [sum(making.eye.uncapped(look) if look.scaled else stop - start
                    for look, (start, stop) in zip(looks, encoded.shown, strict=True))
                for looks, encoded in zip(train.looks, train.encoded, strict=True)]
    runs = Counter(stop - start for encoded in train.encoded for start, stop in encoded.shown)
    return UnitImages(scaled=stored.scaled, runs=dict(sorted(runs.items())),
                      tokens_uncapped=int(np.array(uncapped, np.int64)[chosen].sum()), audit=audit)


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
    seeing: list[Any] = [] if making.eye is None else [making.template.placeholder, making.image_ids.tolist()]
    if making.eye is not None and any(row.images for row in (*unit.train, *unit.held_out)):
        seeing = [making.eye.vision.hash, making.eye.max_pixels]
    return digest([MAKING, place, unit.name, unit.source, unit.format, rows.hexdigest(), digest(rejected), settings,
                   making.made_from["tokenizer"], making.made_from["chat_template"], *seeing])


def _cached(making: _Making, stem: str, key: str, unit: UnitRows) -> _Built | None:
    """The unit as it lies there, if it was made from just this and is whole."""
    out = making.out
    try:
        content = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        record = Unit.model_validate(content["unit"]) if content["unit"] else None
        if record is not None and not whole_unit(out, record, making.eye.pictures if making.eye is not None else None):
            return None
        return _Built(unit.name, stem, record, [Exclusion.model_validate(e) for e in content["excluded"]],
                      [unit.held_out[i] for i in content["held_out"]],
                      UnitImages.model_validate(content["images"]) if "images" in content else None)
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # never written, or not by us: made again
        return None


def _draw(making: _Making, unit: UnitRows, split: Split, tell: Callable[[str], None] = lambda _: None) -> _Drawn:
    """Tokenise rows in the order of the draw to the cap."""
    section, own, pool = making.recipe.mixture, unit.settings, unit.side(split)
    caps = (_Caps(own.max_samples or section.max_samples, own.max_tokens or section.max_tokens) if split == "train"
            else _Caps(section.max_held_out, None))
    order = np.arange(len(pool))
    if caps.rows or caps.tokens:
        stream = "max_samples" if split == "train" else "max_held_out"
        order = generator(making.recipe.seed, stream, unit.name).permutation(len(pool))
    kept: dict[int, tuple[Encoded, list[Look]]] = {}
    lost: dict[int, Rejected] = {}
    tokens, seen, full = 0, 0, ""
    while seen < len(order) and not full:
        if caps.rows is not None and len(kept) == caps.rows:
            full = "max_samples"
            break
        if seen:
            tell(f"row {seen:,} of {len(order):,}")
        wanted = BATCH if caps.rows is None else min(BATCH, max(16, caps.rows - len(kept)))
        batch = order[seen : seen + wanted]
        for i, made in zip(batch, making.encode([pool[i] for i in batch], unit.name), strict=True):
            if caps.rows is not None and len(kept) == caps.rows:
                break  # the rest of the batch was tokenised in vain
            problem = _problem(making, made)
            if problem is not None:
                lost[int(i)] = Rejected(split, problem[0], pool[i].where, problem[1])
            elif isinstance(made[0], Encoded) and isinstance(made[1], list):
                if caps.tokens is not None and tokens + len(made[0].input_ids) > caps.tokens:
                    full = "max_tokens"
                    break
                kept[int(i)] = made[0], made[1]
                tokens += len(made[0].input_ids)
            seen += 1
    why = f"{caps.rows or 0:,} rows are drawn" if full == "max_samples" else f"{caps.tokens or 0:,} tokens are drawn"
    undrawn = [Rejected(split, full, pool[i].where, why) for i in sorted(order[seen:].tolist())]
    numbers = sorted(kept)
    encoded, looks = [kept[i][0] for i in numbers], [kept[i][1] for i in numbers]
    return _Drawn(_rows(encoded), numbers, encoded, looks, [lost[i] for i in sorted(lost)] + undrawn)


def _problem(making: _Making, made: tuple[Encoded | str, list[Look]] | tuple[str, str]) -> tuple[str, str] | None:
    """(rule, why) of a row that cannot be used now that it is tokens."""
    row, looks = made
    if isinstance(looks, str):
        return str(row), looks
    if isinstance(row, str):
        return "malformed", row
    max_length = making.recipe.mixture.max_length
    if len(row.input_ids) > max_length:
        images = f" ({sum(b - a for a, b in row.shown):,} of images)" if row.shown else ""
        return "over_long", f"{len(row.input_ids):,} tokens{images}, max_length is {max_length:,}"
    if making.eye is not None:
        told = np.isin(row.input_ids, making.image_ids)
        for start, stop in row.shown:
            told[start:stop] = False
        if told.any():
            word = making.tokenizer.decode([int(row.input_ids[told.argmax()])])
            return "malformed", f"its text holds {word}, which stands for something else than text in this model"
    return None if row.response.any() else ("empty_response", "a single token: nothing to predict")


def _rows(encoded: list[Encoded]) -> Rows:
    lengths = [len(e.input_ids) for e in encoded]
    return Rows(np.concatenate([np.zeros(0, np.int32), *(e.input_ids for e in encoded)]).astype(np.int32),
                np.concatenate([np.zeros(0, np.uint8), *(e.response for e in encoded)]).astype(np.uint8),
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _record(making: _Making, place: Place, unit: UnitRows, stem: str, drawn: _Drawn, drawn_held_out: _Drawn) -> Unit:
    epochs = unit.settings.epochs or making.recipe.mixture.epochs
    train, held_out = drawn.rows, drawn_held_out.rows
    chosen = budget_indices(len(train), epochs, making.recipe.seed, unit.name)
    images = np.array([len(looks) for looks in drawn.looks], np.int64)
    image_tokens = np.array([sum(stop - start for start, stop in e.shown) for e in drawn.encoded], np.int64)
    held_out_images = sum(len(looks) for looks in drawn_held_out.looks)
    return Unit(
        name=unit.name, source=unit.source, format=unit.format, file=f"{stem}.safetensors", sha256="", rows=len(train),
        epochs=epochs if place == "units" else 0.0, samples=len(chosen), tokens=int(train.lengths[chosen].sum()),
        response_tokens=int(train.response_lengths[chosen].sum()), held_out_rows=len(held_out),
        held_out_tokens=int(held_out.lengths.sum()), held_out_response_tokens=int(held_out.response_lengths.sum()),
        images_file=f"{stem}.images.safetensors" if images.sum() or held_out_images else None, images=int(images[chosen].sum()),
        image_tokens=int(image_tokens[chosen].sum()), held_out_images=held_out_images)


def _shortage(making: _Making, place: Place, unit: UnitRows, record: Unit) -> str:
    """Why a unit is left out whole, or ''."""
    least = making.recipe.mixture.min_samples
    if place != "units":
        return "" if record.held_out_rows else "no usable row"
    if record.rows < least:
        return f"{record.rows} training rows, min_samples is {least}"
    return "" if record.samples else f"{record.rows} rows x {record.epochs:g} epochs is less than one sample"


def _sorted(excluded: list[Exclusion]) -> list[Exclusion]:
    return sorted(excluded, key=lambda e: (e.unit, RULES.index(e.rule), e.split != "train"))
