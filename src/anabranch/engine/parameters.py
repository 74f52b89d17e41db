"""Settings of a merge config: numbers, gradients over the layers, choices by tensor name; and which of them holds where.

    0.5                                        a number
    [0, 1, 5]                                  a gradient: linear between evenly spaced points, from t = 0 to t = 1
    [{filter: mlp, value: 0.2}, {value: 1}]    by tensor: the first whose filter is part of the tensor's name
    {filter: mlp, value: [0, 1]}               the same, with one entry

    t   place in a slice: 0 its first layer, 1 its last
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Gradient = tuple[float, ...]
EVERYTHING = "*"


@dataclass(frozen=True)
class Choice:
    """A value for some tensors. `filter` is a plain piece of their names, no pattern; None: every tensor."""

    value: float | str | Gradient
    filter: str | None = None

    def fits(self, tensor: str) -> bool:
        return self.filter is None or self.filter == EVERYTHING or self.filter in tensor

    def at(self, t: float) -> float | str:
        return interpolated(self.value, t) if isinstance(self.value, tuple) else self.value


@dataclass(frozen=True)
class Setting:
    """What a config says about one parameter in one place, `where`. Without filters it is one choice."""

    where: str
    choices: tuple[Choice, ...]

    def at(self, tensor: str, t: float) -> float | str | None:
        """The value for a tensor at place `t`; None where no filter fits. Merge specification, 2.4."""
        return next((choice.at(t) for choice in self.choices if choice.fits(tensor)), None)

    @property
    def values(self) -> list[float | str]:
        """Every number or word that stands in it."""
        return [v for c in self.choices for v in (c.value if isinstance(c.value, tuple) else (c.value,))]

    @property
    def filters(self) -> list[str]:
        return [c.filter for c in self.choices if c.filter is not None and c.filter != EVERYTHING]


def interpolated(points: Sequence[float], t: float) -> float:
    """Linear between evenly spaced points; t in [0, 1]. Example: interpolated((0, 1, 5), 0.75) is 3.0."""
    s = t * (len(points) - 1)
    low = int(s)
    high = min(len(points) - 1, low + 1)
    f = s - low
    return (1 - f) * points[low] + f * points[high]


def place_of(layer: int, layers: int) -> float:
    """t of layer number `layer` of a slice of `layers`; a single layer is the last (merge specification, 2.6)."""
    return layer / (layers - 1) if layers > 1 else 1.0


def look_up(name: str, levels: Sequence[Mapping[str, Setting]], tensor: str, t: float) -> tuple[float | str, Setting] | None:
    """The first value that is set for this tensor, and where it stands; None where none is. First level first."""
    for level in levels:
        if (setting := level.get(name)) is not None and (value := setting.at(tensor, t)) is not None:
            return value, setting
    return None


# -------------------------------------------------------------------------------------------------------- reading them


def read_setting(value: Any, where: str, problems: list[str], warnings: list[str], *,
                 words: bool = False) -> Setting | None:
    """A setting from YAML; what is wrong with it goes to `problems`, and None comes back.

    `words`: a single word is a value too (`rescale: inverse_density`).
    """
    before = len(problems)
    choices: tuple[Choice, ...]
    if words and isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]*", value):
        choices = (Choice(value),)
    elif isinstance(value, dict):
        choices = tuple(_choices([value], [where], problems, warnings))
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        choices = tuple(_choices(value, [f"{where}[{i}]" for i in range(len(value))],
                                problems, warnings))
    else:
        found = _number_or_gradient(value, where, problems)
        choices = () if found is None else (Choice(found),)
    return Setting(where, choices) if len(problems) == before else None


def _choices(entries: Sequence[Any], places: Sequence[str], problems: list[str],
             warnings: list[str]) -> Iterator[Choice]:
    open_from = None
    for entry, where in zip(entries, places, strict=True):
        if not isinstance(entry, dict):
            problems.append(f"{where}: got {shown(entry)} among choices, wanted `value:` with an optional `filter:`")
            continue
        problems += [f"{where}: unknown key `{key}`. Known: filter, value." for key in entry if key not in ("filter", "value")]
        filter_ = entry.get("filter")
        if filter_ is not None and not isinstance(filter_, str):
            problems.append(f"{where}.filter: got {shown(filter_)}, wanted a piece of a tensor's name, in quotes")
            filter_ = None
        if open_from is not None:
            warnings.append(f"{where}: never reached, since {open_from} before it fits every tensor")
        if filter_ in (None, EVERYTHING):
            open_from = where
        if "value" not in entry:
            problems.append(f"{where}: `value` is required, and not given.")
        elif (found := _number_or_gradient(entry["value"], f"{where}.value", problems)) is not None:
            yield Choice(found, filter_)


def _number_or_gradient(value: Any, where: str, problems: list[str]) -> float | Gradient | None:
    if not isinstance(value, list):
        return _number(value, where, problems)
    if not value:
        problems.append(f"{where}: an empty list, wanted at least one number")
        return None
    numbers = [_number(v, f"{where}[{i}]", problems) for i, v in enumerate(value)]
    return tuple(n for n in numbers if n is not None)


def _number(value: Any, where: str, problems: list[str]) -> float | None:
    """true is 1, "0.5" is 0.5, as the peer reads them (conformance C08)."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        number = None
    if number is not None and math.isfinite(number):
        return number
    problems.append(f"{where}: got {shown(value)}, wanted a {'' if number is None else 'finite '}number"
                    + ("" if isinstance(value, (int, float, str)) else ", or a list of numbers"))
    return None


def shown(value: Any) -> str:
    """A value from YAML for a message: short, and never an error of its own."""
    if value is None:
        return "nothing"
    if isinstance(value, (list, dict)):
        return f"a list of {len(value)}" if isinstance(value, list) else f"a mapping of {', '.join(map(str, value))[:60]}"
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number too large"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
