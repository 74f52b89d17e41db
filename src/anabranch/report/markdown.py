"""The report for a terminal: the same story in Markdown, main numbers only."""

from __future__ import annotations

import re
import textwrap

from anabranch.artifacts import Comparison
from anabranch.report import pilot, tables
from anabranch.report.audit import counted
from anabranch.report.contents import PLACE_MEANING, PLACE_WORDS, Contents, clean, shorten
from anabranch.report.diagnostics import sections
from anabranch.report.tables import Table
from anabranch.report.verdict import of_comparison, verdict
from anabranch.scores import PLACES

WIDTH = 100
ROWS = 12


def markdown(contents: Contents) -> str:
    """The whole text, lines of about WIDTH characters. Same contents, same text."""
    said = verdict(contents)
    lines = [f"# Anabranch report: {_plain(contents.name)}", "", f"**{_sentence(said.headline)}**", ""]
    lines += [_bullet(_sentence(s)) for s in said.sentences]
    lines += ["", *(_bullet(f"{what}: {value} "
                            f"({words})") for what, value, words in map(_escaped, tables.key_numbers(contents)))]
    if undone := tables.not_done(contents):
        lines += ["", *(_bullet(line) for line in undone)]
    for title, parts in (("The mixture", _mixture(contents)), ("Conflict between units", _conflict(contents)),
                         ("The split", _groups(contents)), ("The pilot", _pilot(contents)), ("Training", _training(contents)),
                         ("Evaluation", _evaluation(contents)), ("Diagnostics", _diagnostics(contents)),
                         ("Other merge methods", _operators(contents)), ("Comparison of arms", _comparison(contents))):
        if parts:
            lines += ["", f"## {title}", "", *parts]
    return "\n".join(lines) + "\n"


def _escaped(triple: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(_plain(part) for part in triple)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*<>|]|\](?=\())", r"\\\1", clean(text))


def _sentence(text: str) -> str:
    """As `_plain`, but `code` stays code."""
    parts = clean(text).split("`")
    if len(parts) % 2 == 0:
        return _plain(text)
    return "".join(f"`{part}`" if i % 2 else _plain(part) for i, part in enumerate(parts))


def _bullet(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False,
                         break_on_hyphens=False)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _table(table: Table, columns: list[int] | None = None, rows: int = ROWS, name_width: int = 30) -> list[str]:
    """A padded table of the chosen columns; what is not shown is counted."""
    chosen = columns if columns is not None else list(range(len(table.headers)))
    body = table.rows[:rows] + ([table.total] if table.total else [])
    grid = [[_plain(shorten(row[c], name_width)) for c in chosen] for row in [table.headers, *body]]
    widths = [max(len(row[i]) for row in grid) for i in range(len(chosen))]
    words = [c < table.words for c in chosen]

    def line(row: list[str]) -> str:
        cells = (cell.ljust(w) if word else cell.rjust(w) for cell, w, word in zip(row, widths, words, strict=True))
        return "| " + " | ".join(cells) + " |"

    dashes = ("-" * (w + 2) if word else "-" * (w + 1) + ":" for w, word in zip(widths, words, strict=True))
    rule = "|" + "|".join(dashes) + "|"
    out = [f"**{_plain(table.caption)}**", "", line(grid[0]), rule, *map(line, grid[1:])]
    hidden = len(table.rows) - rows
    return [*out, *(["", f"... and {hidden:,} more: report.html has them all."] if hidden > 0 else []), ""]


def _mixture(contents: Contents) -> list[str]:
    mixture = contents.mixture
    table = tables.mixture_table(contents)
    shown = ["unit", "samples", "tokens", "held-out rows", "rows left out",
             *(["images", "image tokens"] if mixture.vision is not None else ["training rows"])]
    lines = _table(table, [i for i, header in enumerate(table.headers) if header in shown])
    lines += [_wrapped(f"A sample is a training row in one pass ({sum(u.rows for u in mixture.units):,} rows in all); tokens "
                       "and images are those of all samples."), ""]
    if mixture.vision is not None:
        lines += _table(tables.images_table(contents), [0, 1, 2, 4, 6, 7, 9])
    lines += (_table(tables.excluded_table(contents), [0, 1, 2, 4]) if mixture.excluded else ["No row was left "
                                                                                              "out.", ""])
    lines.append(_wrapped(f"{mixture.duplicates_in_train:,} training rows repeat another (kept); "
                          f"{mixture.duplicates_across:,} also stood among held-out rows (left out there)."))
    if mixture.audit:
        lines += ["", "One row of each unit by tokens (report.html shows its images and what is trained):", ""]
        lines += [_bullet(f"{_plain(shorten(row.unit, 30))}: {counted(row)}") for row in mixture.audit[:ROWS]]
        hidden = len(mixture.audit) - ROWS
        lines += [_bullet(f"and {hidden:,} more")] if hidden > 0 else []
    return lines


def _conflict(contents: Contents) -> list[str]:
    conflict = contents.conflict
    if conflict is None:
        return []
    shares = ", ".join(f"{v:.0%}" for v in conflict.explained[:5])
    lines = [_wrapped("Cosine of two units' mean gradients at the base: +1 they pull alike, -1 one undoes the other. "
                      f"Mean {tables.number(conflict.cosine_mean)}, lowest {tables.number(conflict.cosine_min)}, "
                      f"{conflict.negative_share:.0%} of pairs below 0. Share of the variance by axis: {shares}."), ""]
    lines += _table(tables.conflicting_table(contents), rows=6)
    lines += [*_table(tables.spectral_table(contents)), _wrapped(tables.G_VAR), ""]
    worst = ", ".join(_plain(shorten(u, 30)) for u in conflict.unreliable[:6])
    lines.append(_wrapped(f"Gradients whose two halves do not agree: {len(conflict.unreliable)} of "
                          f"{len(conflict.units)} units"
                          + (f" ({worst}{', ...' if len(conflict.unreliable) > 6 else ''})." if worst else ".")))
    return lines


def _groups(contents: Contents) -> list[str]:
    if contents.plan is None:
        return []
    return _table(tables.groups_table(contents), [0, 2, 3, 4, 5, 1], name_width=34)[:-1]


def _training(contents: Contents) -> list[str]:
    return _table(tables.branches_table(contents), [0, 2, 4, 5, 6])[:-1] if contents.branches else []


def _evaluation(contents: Contents) -> list[str]:
    lines: list[str] = []
    for place in tables.places_evaluated(contents):
        lines += [_wrapped(f"{PLACE_WORDS[place].capitalize()}: {PLACE_MEANING[place]}"), ""]
        lines += _table(tables.evaluation_table(contents, place))
    worst = tables.worst_table(contents)
    if worst is not None and worst.rows:
        lines += _table(worst)
    return lines[:-1]


def _diagnostics(contents: Contents) -> list[str]:
    lines: list[str] = []
    for s in sections(contents):
        judged = {"good": " (good)", "bad": " (BAD)", "none": ""}[s.verdict]
        lines += [f"### {s.name}{judged}", "", _wrapped(_sentence(s.finding + ".")), ""]
        lines += [_bullet(_sentence(t)) for t in s.said]
        if s.cost:
            predicted, measured = ([_plain(cell) for cell in row[1:]] for row in s.cost.rows)
            lines.append(_bullet(f"Cost: {measured[0]} forward passes and {measured[1]} s (predicted {predicted[0]} and "
                                 f"{predicted[1]} s)."))
        lines += ["", *_table(s.tables[0], rows=8)]
    return lines[:-1]


def _pilot(contents: Contents) -> list[str]:
    if (found := contents.pilot) is None:
        return []
    lines = [_wrapped(_sentence(pilot.advice(found) + ".")), "", *(_bullet(_sentence(t)) for t in found.said), ""]
    return [*lines, *_table(pilot.pilot_table(found), rows=40, name_width=34)][:-1]


def _operators(contents: Contents) -> list[str]:
    if (found := contents.operators) is None:
        return []
    lines = [*(_bullet(_sentence(t)) for t in found.verdict), ""]
    for place in PLACES:
        if any(place in r.places for r in found.results):
            lines += _table(tables.operators_table(found, place), [0, 1, 2, 3, 4, 6], rows=40)
    return lines[:-1]


def _comparison(contents: Contents) -> list[str]:
    if contents.comparison is None or not contents.comparison.summary:
        return []
    return _arms(contents.comparison)


def _arms(comparison: Comparison) -> list[str]:
    lines = _table(tables.arms_table(comparison), [0, 1, 2, 3, 4, 5], rows=40)
    lines += [_wrapped("Loss: nats per response token, mean over units, each with the same say. Won, tied and lost count units "
                       "against joint. p over seeds: one-sided signed-rank test that the arm beats joint; one seed gives none. "
                       "Share of joint's step: how far back joint_matched was pulled, 1 is joint and 0 the base."), ""]
    for place in PLACES:
        table = tables.place_table(comparison, place)
        if table.rows:
            lines += _table(table, [0, 1, 2, 4, 5, 6], rows=40)
    return lines[:-1]


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison's verdict and tables alone, as Markdown for a terminal."""
    said = of_comparison(comparison)
    sentences = [_bullet(_sentence(s)) for s in said.sentences]
    return "\n".join([f"**{_sentence(said.headline)}**", "", *sentences, "", *_arms(comparison)]) + "\n"
