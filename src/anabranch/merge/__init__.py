"""The maths of merging: pure functions on tensors, and the list of them.

    k   branches          *shape   of one tensor          compute dtype: float32, given and returned

A method takes what it names: `branches` [k, *shape], `base` [*shape], `weights` [k]; then, keyword only, its own
parameters (float, int, bool or str, each with a default). It reads no file, moves nothing between devices, draws no
global randomness and changes no input. What it cannot compute with it refuses with ValueError. The engine widens
before it and rounds once after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from anabranch.errors import RecipeError, closest
from anabranch.merge.displacement import squared_distance as squared_distance

Argument = float | int | bool | str
INPUTS = ("branches", "base", "weights")
Method = TypeVar("Method", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Parameter:
    """One of a method's own parameters."""

    name: str
    type: type
    default: Argument


@dataclass(frozen=True)
class MergeMethod:
    """What the signature of a method says, for the engine that calls it.

    `inputs` are those of `branches`, `base` and `weights` that it takes, in its own order.
    """

    name: str
    function: Callable[..., Tensor]
    needs_base: bool
    reference: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]


METHODS: dict[str, MergeMethod] = {}


def merge_method(name: str, *, needs_base: bool, reference: str) -> Callable[[Method], Method]:
    """Register a method under `name`; the function comes back unchanged.

    Raises TypeError, when the module is imported, for a signature that the engine could not call.
    """

    def register(function: Method) -> Method:
        if name in METHODS:
            raise TypeError(f"merge method `{name}` is registered twice")
        inputs, parameters = [], []
        for p in inspect.signature(function, eval_str=True).parameters.values():
            if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in INPUTS:
                inputs.append(p.name)
            elif p.kind is p.KEYWORD_ONLY and p.annotation in (float, int, bool, str) and p.default is not p.empty:
                parameters.append(Parameter(p.name, p.annotation, p.default))
            else:
                raise TypeError(f"merge method `{name}`: `{p}` is neither one of {', '.join(INPUTS)} "
                                "nor a keyword-only float, int, bool or str with a default")
        if needs_base != ("base" in inputs):
            raise TypeError(f"merge method `{name}`: needs_base={needs_base}, but its inputs are {', '.join(inputs)}")
        METHODS[name] = MergeMethod(name, function, needs_base, reference, tuple(inputs), tuple(parameters))
        return function

    return register


def method_named(name: str) -> MergeMethod:
    """Raises RecipeError with the closest known name."""
    if name not in METHODS:
        raise RecipeError(f"merge.method: `{name}` is no merge method.{closest(name, METHODS)}")
    return METHODS[name]


def arguments_for(method: MergeMethod, given: Mapping[str, Any]) -> dict[str, Argument]:
    """`given` checked against the method's parameters and completed with their defaults, sorted by name.

    An int is taken where a float is wanted. Raises RecipeError with every problem.
    """
    known = {p.name: p for p in method.parameters}
    problems = []
    for name, value in given.items():
        if name not in known:
            problems.append(f"{name}: {method.name} has no such parameter."
                            + (closest(name, known) if known else " It has none."))
        elif not (type(value) is known[name].type or (known[name].type is float and type(value) is int)):
            problems.append(f"{name}: got {value!r}, wanted {known[name].type.__name__}")
    if problems:
        raise RecipeError.of(f"parameters of merge method {method.name}:", problems)
    return {name: known[name].type(given.get(name, known[name].default)) for name in sorted(known)}


from anabranch.merge import averaging  # noqa: E402, F401 - registers its methods; it needs the decorator above
