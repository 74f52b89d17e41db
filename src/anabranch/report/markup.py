"""HTML that is safe by construction: text is escaped unless it is already Markup, and Markup comes from here only."""

from __future__ import annotations

import html

from anabranch.report.contents import clean
from anabranch.report.tables import Table


class Markup(str):
    """HTML source, not to be escaped again."""


VOID = ("meta", "br")


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """`<name ...>children</name>`; `cls` stands for class, `_` in an attribute's name for `-`."""
    head = "".join(f' {key.replace("cls", "class").replace("_", "-")}="{html.escape(clean(value), quote=True)}"'
                   for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{head}>")
    return Markup(f"<{name}{head}>{''.join(map(text, children))}</{name}>")


def text(child: str) -> Markup:
    return child if isinstance(child, Markup) else Markup(html.escape(clean(child), quote=False))


def code(sentence: str) -> Markup:
    """Text whose `...` parts are set as code."""
    parts = sentence.split("`")
    if len(parts) % 2 == 0:  # an odd backtick is a backtick
        return text(sentence)
    return Markup("".join(tag("code", part) if i % 2 else text(part) for i, part in enumerate(parts)))


def html_table(table: Table, tall: bool = False, marks: dict[str, str] | None = None) -> Markup:
    """A table in a box of its own that scrolls sideways (and, if `tall`, down). `marks`: first cell -> class of a swatch."""

    def cells(row: list[str]) -> list[Markup]:
        out = []
        for i, value in enumerate(row):
            swatch = [tag("i", cls=f"swatch {marks[value]}")] if i == 0 and marks and value in marks else []
            kind = "w" if i < table.words else "n"
            out.append(tag("th" if i == 0 else "td", *swatch, value, cls=kind, **({"scope": "row"} if i == 0 else {})))
        return out

    head = tag("tr", *(tag("th", h, cls="w" if i < table.words else "n", scope="col") for i, h in enumerate(table.headers)))
    body = tag("tbody", *(tag("tr", *cells(row)) for row in table.rows))
    foot = [tag("tfoot", tag("tr", *cells(table.total)))] if table.total else []
    grid = tag("table", tag("caption", table.caption), tag("thead", head), body, *foot)
    return tag("div", grid, cls="scroll tall" if tall else "scroll", tabindex="0", role="region", aria_label=table.caption)


