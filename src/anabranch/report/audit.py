"""Rows with images as the loss sees them: small pictures in the page itself, and which tokens are trained.

Pictures are made anew from the unit's file of images, at most SIDE pixels a side and a few kilobytes each, so that the page
stays one file of bounded size whatever the mixture holds.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from anabranch.artifacts import AuditPart, AuditRow, Mixture
from anabranch.errors import CorruptedError
from anabranch.images import BadImage, open_image
from anabranch.report.contents import Contents
from anabranch.report.markup import Markup, tag, text
from anabranch.rows import StoredImage, read_image

SIDE = 160  # pixels
UNITS = 200
IMAGES = 4  # of one row, and fewer where there are many units
PICTURES = 300  # of all rows
LETTERS = 500  # of one part
PARTS = 40  # of one row: a long conversation has hundreds of turns
OPEN = 6  # cards that are seen without opening anything
KINDS = ("prompt", "image", "trained")


@dataclass(frozen=True)
class Thumbnail:
    """A small picture: its own file as a data URI, and the size of the stored image in pixels."""

    uri: str
    width: int
    height: int


def audit_cards(contents: Contents) -> list[Markup]:
    """One card per unit with images, the first OPEN of them in sight.

    Raises:
        CorruptedError: a file of images that is not the one of the mixture, or an audit that does not fit it.
    """
    rows = contents.mixture.audit[:UNITS]
    each = min(IMAGES, max(1, PICTURES // max(1, len(rows))))
    cards = [_card(row, _thumbnails(contents.folder, contents.mixture, row, each)) for row in rows]
    parts = [tag("div", *cards[:OPEN], cls="audit")]
    if cards[OPEN:]:
        rest = tag("div", *cards[OPEN:], cls="audit")
        parts.append(tag("details", tag("summary", f"{len(cards) - OPEN:,} more units"), rest))
    if len(contents.mixture.audit) > UNITS:
        parts.append(tag("p", f"The first {UNITS} of {len(contents.mixture.audit):,} units.", cls="note"))
    return parts


def counted(row: AuditRow) -> str:
    """The row's tokens by kind, in words."""
    count = {kind: sum(p.tokens for p in row.parts if p.kind == kind) for kind in KINDS}
    return ", ".join(f"{count[kind]:,} {kind}" for kind in KINDS)


def _card(row: AuditRow, pictures: list[Thumbnail | str]) -> Markup:
    more = len(row.images) - len(pictures)
    shown = [_picture(p, row.unit, i) for i, p in enumerate(pictures)]
    shown += [tag("p", f"and {more} more", cls="note")] if more > 0 else []
    head = tag("p", tag("b", row.unit), tag("span", f"{row.where} · tokens: {counted(row)}", cls="where"))
    return tag("article", tag("div", *shown, cls="pictures"), tag("div", head, tag("div", *_parts(row.parts), cls="row")))


def _picture(picture: Thumbnail | str, unit: str, place: int) -> Markup:
    if isinstance(picture, str):
        return tag("p", picture, cls="note")
    shown = tag("img", src=picture.uri, alt=f"Image {place + 1} of a training row of {unit}")
    return tag("figure", shown, tag("figcaption", f"{picture.width} × {picture.height}"))


def _parts(parts: list[AuditPart]) -> list[Markup]:
    """At most PARTS of them, the middle left out."""
    if len(parts) <= PARTS:
        return [_part(part) for part in parts]
    half = PARTS // 2
    left_out = tag("p", f"… {len(parts) - 2 * half:,} more parts …", cls="note")
    return [*map(_part, parts[:half]), left_out, *map(_part, parts[-half:])]


def _part(part: AuditPart) -> Markup:
    if part.kind == "image":
        return tag("span", f"image, {part.tokens:,} tokens" if part.tokens != 1 else "image, 1 token", cls="placeholder")
    name, title = ("mark", "trained") if part.kind == "trained" else ("span", "read, not trained")
    words = Markup("\n".join(map(text, _cut(part.text).split("\n"))))
    return tag(name, words, title=f"{title}: {part.tokens:,} tokens")


def _cut(words: str) -> str:
    """At most LETTERS of them, the middle left out."""
    if len(words) <= LETTERS:
        return words
    return f"{words[: LETTERS // 2]} … {len(words) - LETTERS:,} letters … {words[-LETTERS // 2:]}"


# ---- pictures ----------------------------------------------------------------------------------------------------------


def _thumbnails(run: Path, mixture: Mixture, row: AuditRow, most: int) -> list[Thumbnail | str]:
    """The row's first pictures, at most `most`; for one that cannot be shown, why."""
    path = _images_file(run, mixture, row)
    if not path.is_file():
        return [f"{row.images_file} is not in this folder, so its images are not shown."]
    found: list[Thumbnail | str] = []
    for number in row.images[:most]:
        try:
            found.append(_thumbnail(read_image(StoredImage(path, number))))
        except BadImage as error:
            found.append(f"not shown: {error}")
    return found


def _images_file(run: Path, mixture: Mixture, row: AuditRow) -> Path:
    """Where it lies; the file must be one of the mixture's own. Raises CorruptedError."""
    name = PurePosixPath(row.images_file)
    known = {u.images_file for units in (mixture.units, mixture.transfer, mixture.retention) for u in units}
    if row.images_file not in known or name.is_absolute() or ".." in name.parts or min(row.images, default=0) < 0:
        raise CorruptedError(f"{run / 'mixture' / 'mixture.json'}: the audit of unit {row.unit!r} shows images of "
                             f"{row.images_file!r}, no file of this mixture's images. Delete it to have it made again.")
    return run / "mixture" / name


def _thumbnail(data: bytes) -> Thumbnail:
    """PNG where there are few colours (text, drawings), else JPEG. Raises BadImage."""
    image = open_image(data)
    width, height = image.size
    image.thumbnail((SIDE, SIDE))
    kind, options = ("png", {"optimize": True}) if image.getcolors(64) else ("jpeg", {"quality": 80, "optimize": True})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    best = buffer.getvalue()
    return Thumbnail(f"data:image/{kind};base64,{base64.b64encode(best).decode()}", width, height)
