"""HTML that is safe by construction: text is escaped unless it is already Markup, and Markup comes from here only."""

from __future__ import annotations

import html

from anabranch.report.contents import clean
from anabranch.report.tables import HINTS, Table


class Markup(str):
    """HTML source, not to be escaped again."""


VOID = ("meta", "br", "img")


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """`<name ...>children</name>`; `cls` stands for class, `_` in an attribute's name for `-`."""
    head = "".join(f' {key.replace("cls", "class").replace("_", "-")}="{html.escape(clean(value), quote=True)}"'
                   for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{head}>")
    return Markup(f"<{name}{head}>{''.join(map(text, children))}</{name}>")


def text(child: str) -> Markup:
    """Escaped, unless it is Markup already; a per cent sign stays with its number."""
    if isinstance(child, Markup):
        return child
    return Markup(html.escape(clean(child), quote=False).replace(" %", "&nbsp;%"))


def code(sentence: str) -> Markup:
    """Text whose `...` parts are set as code."""
    parts = sentence.split("`")
    if len(parts) % 2 == 0:  # an odd backtick is a backtick
        return text(sentence)
    return Markup("".join(tag("code", part) if i % 2 else text(part) for i, part in enumerate(parts)))


def html_table(table: Table, tall: bool = False, marks: dict[str, str] | None = None) -> Markup:
    """A table in a box of its own that scrolls sideways (`tall`: down, too, and says so).

    Args:
        marks: first cell -> swatch's class.
    """

    def cells(row: list[str]) -> list[Markup]:
        out = []
        for i, value in enumerate(row):
            inner = text(value)
            if i == 0 and marks and value in marks:
                inner = Markup(tag("i", cls=f"swatch {marks[value]}") + text(value))
            if i < table.words:  # a short name stays on one line
                inner = tag("span", inner, cls="keep" if len(value) <= 18 else "may-break")
            where = {"scope": "row"} if i == 0 else {}
            out.append(tag("th" if i == 0 else "td", inner, cls="w" if i < table.words else "n", **where))
        return out

    kinds = ["w" if i < table.words else "n" for i in range(len(table.headers))]
    head = tag("tr", *(tag("th", h, cls=kind, scope="col", **({"title": HINTS[h]} if h in HINTS else {}))
                       for h, kind in zip(table.headers, kinds, strict=True)))
    body = tag("tbody", *(tag("tr", *cells(row)) for row in table.rows))
    foot = [tag("tfoot", tag("tr", *cells(table.total)))] if table.total else []
    hint = [tag("span", f"{len(table.rows):,} rows: scroll for all", cls="hint")] if tall else []
    grid = tag("table", tag("caption", tag("span", table.caption, *hint)), tag("thead", head), body, *foot)
    box = "scroll tall" if tall else "scroll"
    return tag("div", grid, cls=box, tabindex="0", role="region", aria_label=table.caption)


