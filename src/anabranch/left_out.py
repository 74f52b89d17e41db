"""What a dry run tells of a mixture beside its totals: units, columns without use, and what is left out, reason by reason."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size

from anabranch.artifacts import Exclusion, Mixture
from anabranch.errors import printable
from anabranch.material import PLACES, Material
from anabranch.mixture_summary import BY_CHOICE, lost_whole, number_of, shortage
from anabranch.sources import Rejected

MOST_UNITS, MOST_WARNINGS, MOST_REASONS, MOST_COLUMNS = 20, 20, 6, 12
NAME_CELLS = 40
# what differs from row to row in one and the same reason: names, paths, numbers
OWN = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[./\\]\S+|\d[\d,]*")


@dataclass
class Notes:
    """What a mixture does not keep, noted while it is made.

    formats: of each unit, also of those left out whole. unused: source -> columns that no format of it uses. reasons: rule ->
    (unit, kind of reason) -> how many rows, and the first.
    """

    formats: dict[str, str] = field(default_factory=dict)
    unused: dict[str, set[str]] = field(default_factory=dict)
    reasons: dict[str, dict[tuple[str, str], tuple[int, str]]] = field(default_factory=dict)

    def read(self, material: Material) -> None:
        self.formats |= {name: unit.format for name, unit in material.units.items()}
        for place in PLACES:
            for unit in material.at(place).values():
                self.unused.setdefault(unit.source, set()).update(unit.unused)

    def leave_out(self, unit: str, rejected: Sequence[Rejected]) -> None:
        for r in rejected:
            if r.rule not in BY_CHOICE:
                kinds = self.reasons.setdefault(r.rule, {})
                rows, first = kinds.get((unit, OWN.sub("·", r.why)), (0, f"{r.where}: {r.why}"))
                kinds[unit, OWN.sub("·", r.why)] = rows + 1, first


def warning_lines(mixture: Mixture) -> list[str]:
    """Units that are gone though nobody chose so."""
    gone = lost_whole(mixture.excluded)
    lines = [f"warning: unit {unit} is left out whole: {why}" for unit, why in gone.items()]
    return _first(lines, MOST_WARNINGS, "unit")


def unit_lines(mixture: Mixture, notes: Notes) -> list[str]:
    """A table: those left out whole first, then by name."""
    lost: dict[str, int] = {}
    for e in mixture.excluded:
        lost[e.unit] = lost.get(e.unit, 0) + e.rows
    images = mixture.vision is not None
    gone = sorted(notes.formats.keys() - {u.name for u in mixture.units})
    table = [[name, notes.formats[name], "0", "0", *(["0"] if images else []), f"{lost.get(name, 0):,}"] for name in gone]
    table += [[u.name, u.format, f"{u.rows:,}", f"{u.tokens:,}", *([f"{u.images:,}"] if images else []),
               f"{lost.get(u.name, 0):,}"] for u in mixture.units]
    head = ["unit", "format", "rows", "tokens", *(["images"] if images else []), "left out"]
    shown = [head] + [[_cut(name), *rest] for name, *rest in table[:MOST_UNITS]]
    wide = [max(cell_len(row[i]) for row in shown) for i in range(len(head))]
    lines = ["  ".join(" " * (w - cell_len(c)) + c if i > 1 else c + " " * (w - cell_len(c))
                       for i, (c, w) in enumerate(zip(row, wide, strict=True))) for row in shown]
    return lines + _more(len(table) - MOST_UNITS, "unit")


def _cut(name: str) -> str:
    name = " ".join(printable(name).split())
    return name if cell_len(name) <= NAME_CELLS else set_cell_size(name, NAME_CELLS - 1) + "…"


def column_lines(notes: Notes) -> list[str]:
    lines = []
    for source, columns in notes.unused.items():
        if columns:
            names = sorted(columns)
            more = f" and {len(names) - MOST_COLUMNS} more" if len(names) > MOST_COLUMNS else ""
            lines.append(f"{source}: columns not used: {', '.join(names[:MOST_COLUMNS])}{more}")
    return _first(lines, MOST_UNITS, "source")


def left_out_lines(mixture: Mixture, notes: Notes, *, chosen: bool = True) -> list[str]:
    """For each rule how many rows of which units, and one row for each unit and reason. `chosen`: also rows not drawn."""
    lines = []
    for rule in sorted({e.rule for e in mixture.excluded}):
        lost = [e for e in mixture.excluded if e.rule == rule]
        units = sorted({e.unit for e in lost})
        named = ", ".join(units[:4]) + (f" and {number_of(len(units) - 4, 'more unit')}" if len(units) > 4 else "")
        if rule == "too_few_samples":
            lines += _too_few(lost, lost_whole(mixture.excluded).keys())
            continue
        head = f"left out by rule {rule}: {number_of(sum(e.rows for e in lost))} of {named}"
        if rule in BY_CHOICE:
            lines += [head] * chosen
            continue
        reasons = _reasons(rule, lost, notes)
        if len(reasons) == 1:
            lines.append(f"{head}, such as {reasons[0][2]}")
        else:
            told = [f"  {unit}: {number_of(rows)}, such as {first}" for unit, rows, first in reasons]
            lines += [head, *_first(told, MOST_REASONS, "reason", "  ")]
    return lines


def _too_few(lost: Sequence[Exclusion], warned: Collection[str]) -> list[str]:
    """A line of the units that are left out whole, with why; without those that a warning tells of."""
    train = {e.unit for e in lost if e.split == "train"}
    told = [f"{e.unit} ({shortage(e)})" for e in lost if e.unit not in warned and (e.split == "train" or e.unit not in train)]
    more = "".join(f" {text}" for text in _more(len(told) - MOST_REASONS, "unit"))
    return [f"left out whole, as too few rows are usable: {', '.join(told[:MOST_REASONS])}{more}"] if told else []


def _reasons(rule: str, lost: Sequence[Exclusion], notes: Notes) -> list[tuple[str, int, str]]:
    """(unit, rows, the first of them): a reason of each kind first, then the same in other units; those of most rows first."""
    kinds = dict(notes.reasons.get(rule, {}))
    noted = {unit for unit, _ in kinds}
    kinds |= {(e.unit, ""): (e.rows, e.example) for e in lost if e.unit not in noted}
    ordered = sorted(kinds.items(), key=lambda item: (-item[1][0], item[0][0]))  # stable: then as met
    new: dict[str, tuple[str, str]] = {}
    for key, _ in ordered:
        new.setdefault(key[1], key)
    ordered.sort(key=lambda item: new[item[0][1]] != item[0])
    return [(unit, rows, first) for (unit, _), (rows, first) in ordered]


def _first(lines: list[str], most: int, what: str, before: str = "") -> list[str]:
    return lines[:most] + [before + text for text in _more(len(lines) - most, what)]


def _more(count: int, what: str) -> list[str]:
    return [f"and {number_of(count, f'more {what}')}"] if count > 0 else []
