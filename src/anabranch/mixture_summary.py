"""What a person is shown of a mixture: examples, one audited row of each unit with images, and what its images cost."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from anabranch.artifacts import AuditPart, AuditRow, Exclusion, Mixture, MixtureVision, Part, Unit
from anabranch.recipe import Source
from anabranch.rows import Rows, StoredImage, images_file, load_unit
from anabranch.templates import Encoded
from anabranch.unit_images import image_hashes, run_lengths
from anabranch.vision import Vision

EXAMPLES, EXAMPLE_CHARACTERS = 8, 300
UNWANTED = ("malformed", "missing_image", "broken_image", "huge_image", "animated_image")
BY_CHOICE = ("max_samples", "max_tokens")
AUDIT_CHARACTERS = 2000  # of a stretch of an audited row


class UnitImages(Part):
    """What the images of a unit came to; kept beside its file, as its rows do not tell."""

    scaled: list[int] = Field(description="numbers of the stored images that were scaled down")
    runs: dict[int, int] = Field(description="tokens of an image -> how many images of training rows have so many")
    tokens_uncapped: int = Field(description="image tokens of one budget, had nothing been scaled down")
    audit: AuditRow | None


def look_back(out: Path, units: list[Unit], tokenizer: Any, vision: Vision | None) -> tuple[int, list[dict[str, str]]]:
    """Training rows that repeat another, and a few rows as the loss sees them: decoded from the tokens, by the mask."""
    shown = set(np.linspace(0, len(units) - 1, min(EXAMPLES, len(units))).round().astype(int).tolist())
    seen: set[bytes] = set()
    total, examples = 0, []
    for number, unit in enumerate(units):
        rows = load_unit(out / unit.file, "train")
        total += len(rows)
        images = _hashes_by_row(out / unit.file, rows)
        seen.update(hashlib.sha256(ids.tobytes() + mask.tobytes() + images[i]).digest()[:16] for i, (ids, mask) in
                    enumerate(rows.row(i) for i in range(len(rows))))
        if number in shown:
            ids, mask = rows.row(0)
            prompt = ids[: int(mask.argmax())]
            if vision is not None:  # one placeholder for each image, not a thousand
                same = np.isin(prompt[1:], np.array(sorted(vision.image_ids))) & (prompt[1:] == prompt[:-1])
                prompt = prompt[np.concatenate([[True], ~same])[: len(prompt)]]
            examples.append({"unit": unit.name, "prompt": _short(tokenizer.decode(prompt.tolist())),
                             "response": _short(tokenizer.decode(ids[mask == 1].tolist()))})
    return total - len(seen), examples


def _hashes_by_row(unit_file: Path, rows: Rows) -> list[bytes]:
    """SHA-256 of the images of each row, end to end."""
    if rows.images is None:
        return [b""] * len(rows)
    hashes, images = image_hashes(unit_file), rows.images
    return [hashes[images.numbers[int(a) : int(b)]].tobytes() for a, b in itertools.pairwise(images.offsets)]


def _short(text: str, characters: int = EXAMPLE_CHARACTERS) -> str:
    half = characters // 2
    return text if len(text) <= characters else f"{text[: half - 2]} … {text[-half + 2 :]}"


def audit_row(tokenizer: Any, unit: str, where: str, file: Path, out: Path, shown: Sequence[StoredImage], row: Encoded,
              placeholder: str) -> AuditRow:
    """A row in stretches: prompt, image, trained. `file`: the unit's, in the mixture folder `out`."""
    kinds = np.where(row.response == 1, 1, 0)
    for number, (start, stop) in enumerate(row.shown):
        kinds[start:stop] = 2 + number  # two images side by side are two
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        kind = int(kinds[start])
        text = placeholder if kind > 1 else _short(tokenizer.decode(row.input_ids[start:stop].tolist()), AUDIT_CHARACTERS)
        parts.append(AuditPart(kind="image" if kind > 1 else "trained" if kind else "prompt", text=text, tokens=stop - start))
    return AuditRow(unit=unit, where=where, images_file=images_file(file).relative_to(out).as_posix(),
                    images=[image.number for image in shown], parts=parts)


def summary(out: Path, units: Sequence[tuple[Unit, UnitImages]], vision: Vision, max_pixels: int | None) -> MixtureVision:
    """How images became tokens, over all units; distinct images are told by their content."""
    distinct: set[bytes] = set()
    scaled: set[bytes] = set()
    for unit, images in units:
        rows = load_unit(out / unit.file, "train")
        hashes = image_hashes(out / unit.file)
        used = np.unique(rows.images.numbers) if rows.images is not None else np.zeros(0, np.int32)
        distinct.update(hashes[i].tobytes() for i in used)
        scaled.update(hashes[i].tobytes() for i in set(images.scaled) & set(used.tolist()))
    least, middle, most = run_lengths(Counter(images.runs) for _, images in units)
    return MixtureVision(
        placeholder=vision.placeholder, max_pixels=max_pixels, images=len(distinct), scaled_down=len(scaled),
        image_tokens=sum(unit.image_tokens for unit, _ in units),
        image_tokens_uncapped=sum(images.tokens_uncapped for _, images in units), smallest=least, median=middle, largest=most)


# ---- in words ----------------------------------------------------------------------------------------------------------


def number_of(count: int, what: str = "row") -> str:
    """'1 row', '2,000 rows'."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def shortage(end: Exclusion) -> str:
    """Why a unit is left out whole: in an artifact's words, less what those count badly."""
    if not end.rows:
        return "no row is usable"
    return end.example.replace("1 training rows", "1 training row") if end.rows == 1 else end.example


def lost_whole(excluded: Sequence[Exclusion]) -> dict[str, str]:
    """Units without a usable row, where nobody chose to leave the rows out -> how many, by which rules, and the first."""
    lost: dict[tuple[str, str], list[Exclusion]] = {}
    for e in excluded:
        if e.rule != "too_few_samples":
            lost.setdefault((e.unit, e.split), []).append(e)
    gone = {}
    for end in excluded:
        rows = lost.get((end.unit, end.split), [])
        unwanted = [e for e in rows if e.rule in UNWANTED]
        if end.rule == "too_few_samples" and not end.rows and unwanted and not any(e.rule in BY_CHOICE for e in rows):
            total = sum(e.rows for e in rows)
            rules = ", ".join(f"{e.rows:,} of {number_of(total)} {e.rule}" for e in rows)
            gone[end.unit] = f"{rules}, such as {unwanted[0].example}"
    return gone


def nothing_usable(source: Source, lost: Sequence[Exclusion]) -> str:
    """Of a source without a usable row: how it lost them, and what to do. '' where some are of a kind that data may well have
    (empty, too long, not drawn): then it may go."""
    if not lost or any(e.rule not in UNWANTED for e in lost):
        return ""
    total = sum(e.rows for e in lost)
    rules = [rule for rule in UNWANTED if any(e.rule == rule for e in lost)]
    told = [f"{sum(e.rows for e in lost if e.rule == rule):,} {rule}: {next(e.example for e in lost if e.rule == rule)}"
            for rule in rules]
    start = f"in its `images`, {source.images}" if source.images is not None else "where the rows lie"
    remedies = {"missing_image": f"If the paths do not start {start}: set `images` to the folder or .zip where they do.",
                "malformed": "Look at its `format` and `columns`."}
    remedy = " ".join(dict.fromkeys(remedies.get(rule, "Mend the images.") for rule in rules))
    return f"none of its {number_of(total)} is usable, {'; '.join(told)}. {remedy} Or take the source out of the recipe."


def exclusion_lines(excluded: Sequence[Exclusion]) -> list[str]:
    """One line per rule, unit and side: how many rows, and the first of them."""
    return [f"{e.unit} ({e.split}): the whole unit, {e.rule}: {shortage(e)}" if e.rule == "too_few_samples" else
            f"{e.unit} ({e.split}): {number_of(e.rows)}, {e.rule}: {e.example}" for e in excluded]


def unwanted_lines(mixture: Mixture, most: int = 5) -> list[str]:
    """What is wrong with rows that nobody chose to leave out: units that are gone whole, then a line for each rule and unit;
    the first few."""
    gone = lost_whole(mixture.excluded)
    lines = [f"unit {unit}, whole: {why}" for unit, why in gone.items()]
    lines += exclusion_lines([e for e in mixture.excluded if e.rule in UNWANTED and e.unit not in gone])
    more = [f".. and {len(lines) - most} more (mixture/mixture.json, under `excluded`)"] if len(lines) > most else []
    return lines[:most] + more


def image_line(vision: MixtureVision) -> str:
    """How many images there are, the tokens that they cost, and what the pixel cap saves."""
    spared = vision.image_tokens_uncapped - vision.image_tokens
    each = (f"{vision.smallest:,}" if vision.smallest == vision.largest
            else f"{vision.smallest:,} to {vision.largest:,} (median {vision.median:,})")
    capped = ""
    if vision.scaled_down:
        spares = f"{spared:,} tokens" if spared else "no token: this model brings images to sizes of its own"
        capped = f"; {vision.scaled_down:,} scaled down to {vision.max_pixels:,} pixels, which spares {spares}"
    return f"images: {vision.images:,} of {each} tokens each, {vision.image_tokens:,} tokens of one budget{capped}"
