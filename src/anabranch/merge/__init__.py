"""The maths of merging: pure functions on tensors, and the list of them.

    k   branches          *shape   of one tensor          compute dtype: float32, given and returned

A method takes what it names of INPUTS; then, keyword only, its own parameters. It reads no file, moves nothing between
devices, draws no global randomness and changes no input. What it cannot compute with it refuses with ValueError. The
engine widens before it and rounds once after it.

A method called on whole tensors is its own definition. So that the engine can run it on tensors that do not fit into
memory, it says in its registration what a block must hold: single entries (`block="entry"`: the result at an entry
depends on the inputs at that entry alone), whole rows (`"row"`, last dimension) or the whole tensor (`"tensor"`). A
method whose result also depends on sums or ranks over the whole tensor registers a second function with `streams`:
given a `Stack` (the same inputs, readable block by block as often as it likes) it returns the function to apply to
each block. `test_laws` holds the two to each other bit for bit.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

import anabranch
from anabranch.errors import RecipeError, closest
from anabranch.merge.displacement import squared_distance as squared_distance

Argument = float | int | bool | str | tuple[float, ...]
# One number for all branches, or one for each.
PerBranch = float | Sequence[float]
BlockKind = Literal["entry", "row", "tensor"]
# What the engine can hand to a method, by the name of its argument.
INPUTS = {
    "branches": "[k, *shape]: the tensor of every branch",
    "base": "[*shape]: the base's tensor; None where a method can do without and none is given",
    "weights": "[k]: one number per branch",
    "draws": "[k, *shape]: uniform in [0, 1), keyed by seed, branch, tensor and position; a merge of checkpoints makes them",
    "fisher": "[k, *shape]: diagonal Fisher information of every branch, >= 0, from its sidecar file",
    "cuts": "[k]: a magnitude per branch, over all tensors of the model",
    "depth": "place of the tensor's layer in the model: 0 the first, 1 the last; embeddings 0, norm and head 1",
}
Method = TypeVar("Method", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Parameter:
    """One of a method's own parameters. `default` is None where a value must be given."""

    name: str
    type: type
    default: Argument | None
    per_branch: bool


@dataclass(frozen=True)
class MergeMethod:
    """What the signature and the registration of a method say, for the engine that calls it.

    `inputs` are those of INPUTS that it takes, in its own order; `branches` are the least and the most branches that it
    merges. `fits` is "matrix" for a method that is defined on two dimensions only: other tensors, and embeddings, go
    through the method named `otherwise`. `cuts_from` names the parameter (a kept share per branch) from which the
    engine finds `cuts` in a pass over all tensors before the first is merged.
    """

    name: str
    function: Callable[..., Tensor]
    needs_base: bool
    reference: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    branches: tuple[int, float]
    block: BlockKind | Callable[[Mapping[str, Argument]], BlockKind]
    fits: Literal["any", "matrix"]
    otherwise: str | None
    cuts_from: str | None
    streamed: Callable[..., Any] | None = None

    @property
    def takes_base(self) -> bool:
        return "base" in self.inputs

    def block_for(self, arguments: Mapping[str, Argument]) -> BlockKind:
        """What a block must hold under these arguments."""
        return self.block(arguments) if callable(self.block) else self.block


METHODS: dict[str, MergeMethod] = {}


def merge_method(
    name: str,
    *,
    needs_base: bool,
    reference: str,
    branches: tuple[int, float] = (1, math.inf),
    block: BlockKind | Callable[[Mapping[str, Argument]], BlockKind] = "entry",
    fits: Literal["any", "matrix"] = "any",
    otherwise: str | None = None,
    cuts_from: str | None = None,
) -> Callable[[Method], Method]:
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
            elif p.kind is p.KEYWORD_ONLY and p.annotation in (float, int, bool, str, PerBranch):
                several = p.annotation == PerBranch
                parameters.append(Parameter(p.name, float if several else p.annotation,
                                            None if p.default is p.empty else p.default, several))
            else:
                raise TypeError(f"merge method `{name}`: `{p}` is neither one of {', '.join(INPUTS)} "
                                "nor a keyword-only float, int, bool, str or PerBranch")
        if needs_base and "base" not in inputs:
            raise TypeError(f"merge method `{name}`: needs_base={needs_base}, but its inputs are {', '.join(inputs)}")
        METHODS[name] = MergeMethod(name, function, needs_base, reference, tuple(inputs), tuple(parameters), branches,
                                    block, fits, otherwise, cuts_from)
        return function

    return register


def streams(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register how method `name` runs block by block: `(stack, *inputs but branches and base, **parameters)` ->
    a function from a `Block` to the merged block."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        METHODS[name] = replace(METHODS[name], streamed=function)
        return function

    return register


def method_named(name: str) -> MergeMethod:
    """Raises RecipeError with the closest known name."""
    if name not in METHODS:
        raise RecipeError(f"merge.method: `{name}` is no merge method.{closest(name, METHODS)}")
    return METHODS[name]


def arguments_for(method: MergeMethod, given: Mapping[str, Any], k: int | None = None) -> dict[str, Argument]:
    """`given` checked against the method's parameters and completed with their defaults, sorted by name.

    An int is taken where a float is wanted. A parameter that each branch may have its own value of takes one number or
    a list of `k`. Raises RecipeError with every problem.
    """
    known = {p.name: p for p in method.parameters}
    problems = [f"{name}: {method.name} has no such parameter." + (closest(name, known) if known else " It has none.")
                for name in given if name not in known]
    arguments = {}
    for name in sorted(known):
        if name not in given and known[name].default is None:
            problems.append(f"{name}: {method.name} needs it, and has no default for it")
            continue
        value = given.get(name, known[name].default)
        try:
            arguments[name] = _argument(known[name], value, k)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise RecipeError.of(f"parameters of merge method {method.name}:", problems)
    return arguments


def _argument(parameter: Parameter, value: Any, k: int | None) -> Argument:
    if parameter.per_branch and isinstance(value, (list, tuple)):
        if k is not None and len(value) != k:
            raise ValueError(f"got {len(value)} numbers for {k} branches, wanted one number or one for each")
        several: Sequence[Any] = value
        if not all(type(v) in (int, float) for v in several):
            raise ValueError(f"got {value!r}, wanted numbers")
        return tuple(float(v) for v in several)
    if type(value) is parameter.type or (parameter.type is float and type(value) is int):
        kind: Any = parameter.type
        return kind(value)
    raise ValueError(f"got {value!r}, wanted {parameter.type.__name__}"
                     + (" or a list of them" if parameter.per_branch else ""))


def one_each(value: PerBranch, k: int) -> list[float]:
    """`value` for each of `k` branches. Raises ValueError where a list has another length."""
    if isinstance(value, (int, float)):
        return [float(value)] * k
    if len(value) != k:
        raise ValueError(f"got {len(value)} numbers for {k} branches, wanted one number or one for each")
    return [float(v) for v in value]


def fitting(method: MergeMethod, arguments: Mapping[str, Argument], shape: Sequence[int],
            embedding: bool) -> tuple[MergeMethod, dict[str, Argument]]:
    """The method for a tensor, and its arguments: `method`, or what stands in where it is for matrices only.

    The stand-in takes those of the arguments that it has itself, and its own defaults for the rest.
    """
    if method.fits == "any" or (len(shape) == 2 and not embedding):
        return method, dict(arguments)
    assert method.otherwise is not None
    other = METHODS[method.otherwise]
    known = {p.name for p in other.parameters}
    return other, arguments_for(other, {name: value for name, value in arguments.items() if name in known})


def check_arguments(method: MergeMethod, arguments: Mapping[str, Argument], weights: Sequence[float] | None, k: int) -> None:
    """Let the method itself judge weights and arguments, on tensors of a few numbers.

    Raises RecipeError for a number of branches that it does not merge, and with what it says.
    """
    least, most = method.branches
    if not least <= k <= most:
        wanted = f"{least}" if least == most else f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise RecipeError(f"merge method {method.name}: got {k} branches beside the base, wanted {wanted}.")
    inputs: dict[str, Any] = {
        "branches": torch.ones(k, 2, 2), "base": torch.zeros(2, 2), "draws": torch.zeros(k, 2, 2), "depth": 0.0,
        "fisher": torch.ones(k, 2, 2), "cuts": torch.zeros(k), "weights": torch.tensor(weights or [1.0] * k)}
    try:
        with torch.no_grad():
            method.function(*(inputs[name] for name in method.inputs), **arguments)
    except ValueError as error:
        raise RecipeError(f"merge method {method.name}: {error}") from error


# Registers the methods of each family; they need the decorator above.
from anabranch.merge import (  # noqa: E402 - they need the decorator
    averaging,  # noqa: F401 - registers its methods
    importance,  # noqa: F401 - registers its methods
    random_drops,  # noqa: F401 - registers its methods
    spectral,  # noqa: F401 - registers its methods
    spherical,  # noqa: F401 - registers its methods
    task_vectors,  # noqa: F401 - registers its methods
)

# `anabranch.merge(config, out)` merges checkpoints; what it calls is the engine's, and imported when it is called.
sys.modules[__name__].__class__ = anabranch.MergeModule


def __getattr__(name: str) -> Callable[..., Tensor]:
    """Every method by its name: `anabranch.merge.ties`."""
    if name in METHODS:
        return METHODS[name].function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
