"""A space of merge configs: points, and the config that each stands for.

    z        [d] where cma moves; a native parameter's range is 0 to 1 there, a gene is itself
    vector   [d] what the journal holds: a native parameter's value, a gene
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from anabranch.errors import RecipeError, closest
from anabranch.search.settings import ParameterSetting

Value = float | int | str | bool
Vector = list[Value]


@dataclass(frozen=True)
class Dimension:
    """Of a space. `low` to `high`, or one of `choices`; `start` in the same terms."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    choices: tuple[Value, ...] = ()
    start: float | None = None

    def of_unit(self, z: float) -> Value:
        """The value at place `z`, 0 to 1; what lies outside counts as the nearer end. Whole numbers and choices have equal
        shares of the range (on its scale)."""
        z = min(max(float(z), 0.0), 1.0)
        if self.choices:
            return self.choices[min(int(z * len(self.choices)), len(self.choices) - 1)]
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        value = math.exp(math.log(low) + z * (math.log(high) - math.log(low))) if self.log else low + z * (high - low)
        if self.whole:
            return int(min(max(math.floor(value + 0.5), self.low), self.high))
        return min(max(value, self.low), self.high)

    @property
    def start_unit(self) -> float:
        if self.start is None:
            return 0.5
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        if self.log:
            return (math.log(self.start) - math.log(low)) / (math.log(high) - math.log(low))
        return (self.start - low) / (high - low)

    @property
    def words(self) -> str:
        if self.choices:
            return f"{self.name}: one of {', '.join(map(str, self.choices))}"
        return (f"{self.name}: {self.low:g} to {self.high:g}" + (", whole numbers" if self.whole else "")
                + (", logarithmic" if self.log else ""))


class Space(Protocol):
    """What samplers and the search know of a space. `bounded`: z stays in 0 to 1."""

    @property
    def dimensions(self) -> Sequence[Dimension]: ...

    @property
    def bounded(self) -> bool: ...

    @property
    def start(self) -> list[float]:
        """z where cma begins."""

    @property
    def first(self) -> Vector:
        """The vector there."""

    def vector(self, z: Sequence[float]) -> Vector: ...

    def config(self, vector: Sequence[Value]) -> dict[str, Any]:
        """The merge config of a vector."""


@dataclass(frozen=True)
class TemplateSpace:
    """Named parameters in a merge config."""

    dimensions: tuple[Dimension, ...]
    template: Mapping[str, Any]
    bounded: bool = field(default=True)

    @property
    def start(self) -> list[float]:
        return [d.start_unit for d in self.dimensions]

    @property
    def first(self) -> Vector:
        return self.vector(self.start)

    def vector(self, z: Sequence[float]) -> Vector:
        return [d.of_unit(value) for d, value in zip(self.dimensions, z, strict=True)]

    def config(self, vector: Sequence[Value]) -> dict[str, Any]:
        values = {d.name: value for d, value in zip(self.dimensions, vector, strict=True)}
        return filled(self.template, values)


def template_space(parameters: Mapping[str, ParameterSetting], template: Mapping[str, Any]) -> TemplateSpace:
    """Raises RecipeError for names in the template that no parameter has, and parameters that stand nowhere."""
    used = set(names_in(template))
    problems = [f"merge: `${name}` stands in it, and `parameters` has no `{name}`.{closest(name, parameters)}"
                for name in sorted(used - parameters.keys())]
    problems += [f"parameters.{name}: `${name}` stands nowhere in `merge`" for name in parameters if name not in used]
    if problems:
        raise RecipeError.of("search config:", problems)
    dimensions = []
    for name, p in parameters.items():
        if p.choices is not None:
            dimensions.append(Dimension(name, choices=tuple(p.choices)))
        else:
            assert p.low is not None and p.high is not None  # the settings were validated
            dimensions.append(Dimension(name, p.low, p.high, p.log, p.type == "int", start=p.start))
    return TemplateSpace(tuple(dimensions), copy.deepcopy(dict(template)))


def names_in(value: Any) -> list[str]:
    """Names behind `$` in a template; `$$` is a dollar sign."""
    if isinstance(value, str):
        return [value[1:]] if value.startswith("$") and not value.startswith("$$") and len(value) > 1 else []
    if isinstance(value, Mapping):
        return [name for inner in value.values() for name in names_in(inner)]
    return [name for inner in value for name in names_in(inner)] if isinstance(value, list) else []


def filled(value: Any, values: Mapping[str, Value]) -> Any:
    """A template with the values in it."""
    if isinstance(value, str):
        if value.startswith("$$"):
            return value[1:]
        return values[value[1:]] if value.startswith("$") and len(value) > 1 else value
    if isinstance(value, Mapping):
        return {key: filled(inner, values) for key, inner in value.items()}
    return [filled(inner, values) for inner in value] if isinstance(value, list) else value


def plain(vector: Sequence[Any]) -> Vector:
    """As JSON writes it: no numpy numbers."""
    return [v.item() if isinstance(v, np.generic) else v for v in vector]
