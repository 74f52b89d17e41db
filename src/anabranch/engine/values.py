"""The numbers that a config gives a method for one tensor, and what is wrong or remarkable about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from anabranch.engine.config import Entry, MergeConfig, Parameters
from anabranch.engine.conventions import SHARES, TASK_ARITHMETIC, WEIGHT, Read, names_of, parameters_of, typed
from anabranch.engine.parameters import Setting, look_up
from anabranch.engine.plan import DTYPES
from anabranch.engine.requirements import stretches, weight_sums
from anabranch.errors import AnabranchError, ModelError, RecipeError, ShapeMismatch
from anabranch.merge import Argument, MergeMethod, arguments_for, check_arguments

SHOWN = 40
Kind = Literal["config", "model", "shape"]
NAMED = 3


@dataclass
class Findings:
    """Problems and remarks of a plan. The same text about many tensors becomes one line."""

    title: str
    _problems: dict[str, list[str]] = field(default_factory=dict)
    _remarks: dict[str, list[str]] = field(default_factory=dict)
    _kinds: set[Kind] = field(default_factory=set)

    def problem(self, text: str, tensor: str | None = None, *, kind: Kind = "config") -> None:
        self._kinds.add(kind)
        self._problems.setdefault(text, []).extend([tensor] if tensor else [])

    def remark(self, text: str, tensor: str | None = None) -> None:
        self._remarks.setdefault(text, []).extend([tensor] if tensor else [])

    def remarks(self) -> list[str]:
        return [_about(text, tensors) for text, tensors in self._remarks.items()]

    def stop(self) -> None:
        """Raise all problems so far as one error."""
        if not self._problems:
            return
        lines = [_about(text, tensors) for text, tensors in self._problems.items()]
        more = len(lines) - SHOWN
        kind: type[AnabranchError] = (ShapeMismatch if self._kinds == {"shape"} else ModelError if self._kinds == {"model"}
                                      else RecipeError)
        raise kind.of(self.title, [*lines[:SHOWN], *([f".. and {more} more like these"] if more > 0 else [])])


def _about(text: str, tensors: Sequence[str]) -> str:
    if not tensors:
        return text
    if len(tensors) == 1:
        return f"tensor '{tensors[0]}': {text}"
    shown = ", ".join(f"'{t}'" for t in tensors[:NAMED])
    return f"{len(tensors)} tensors ({shown}{', ..' if len(tensors) > NAMED else ''}): {text}"


class Values:
    """The settings of a config, for one method."""

    def __init__(self, config: MergeConfig, method: MergeMethod, findings: Findings) -> None:
        self.config, self.method, self.findings = config, method, findings
        self.reads = parameters_of(method, config.dialect)
        self.spelled = dict(zip(self.reads, names_of(method, config.dialect), strict=True))
        self.in_task_arithmetic = method.name in TASK_ARITHMETIC
        self._judged: dict[object, bool] = {}
        self._last = False

    def of(self, branches: Sequence[tuple[Entry, str]], levels: Sequence[Parameters], name: str, t: float,
           last: bool) -> tuple[tuple[float, ...] | None, dict[str, Argument]] | None:
        """Weights (None if the method takes none) and arguments for tensor `name` of the result at place `t`.

        `branches`: each model's entry, and what the tensor is called in it. `last`: it is used after the last layer.
        None: something is wrong, and said.
        """
        self._last = last and t == 0
        given: dict[str, Argument] = {}
        weights: tuple[float, ...] | None = None
        complete = True
        for parameter, read in self.reads.items():
            if read.scope == "merge":
                value = self._value(read, levels, name, t, None)
                complete &= value is not None
                if value is not None:
                    given[parameter] = value
                continue
            values = [self._value(read, (entry.parameters, *levels), inner, t, entry) for entry, inner in branches]
            numbers = tuple(float(v) for v in values if isinstance(v, (int, float)))
            if len(numbers) < len(branches):
                complete = False
            elif parameter == WEIGHT:
                weights = numbers
            else:
                given[parameter] = numbers[0] if len(set(numbers)) == 1 else numbers
        if not complete:
            return None
        if "weights" in self.method.inputs and weights is None:
            weights = (1 / len(branches),) * len(branches)  # karcher: every model counts the same
        arguments = arguments_for(self.method, given, len(branches))
        key = (weights, tuple(arguments.items()), len(branches))
        if key not in self._judged:
            self._judged[key] = self._judge([entry for entry, _ in branches], weights, arguments, name)
        if not self._judged[key]:
            return None
        if self.method.name in SHARES and weights is not None:
            weights = tuple(w / sum(weights) for w in weights)
        return weights, arguments

    def _value(self, read: Read, levels: Sequence[Parameters], tensor: str, t: float, entry: Entry | None) -> Argument | None:
        found = look_up(read.name, levels, tensor, t)
        if found is None:
            if read.default is None:
                who = f"{entry.where} ({entry.model}): " if entry else ""
                self.findings.problem(f"{who}`{self.spelled[read.name]}` is required, and no setting fits this tensor. End the "
                                      "list of choices with `- value: ..`, without a filter", tensor)
            return read.default
        value, setting = found
        if self._last and setting.at(tensor, 1.0) != value:
            self.findings.remark(f"{setting.where}: of a gradient, final norm and output head take the first value here, as "
                                 "they do in MergeKit. With `dialect: native` they take the last")
        try:
            return typed(read, self.method.name, self.config.dialect, value)
        except ValueError as error:
            self.findings.problem(f"{setting.where}: {error}, as a gradient comes to it", tensor)
            return None

    def _judge(self, entries: Sequence[Entry], weights: tuple[float, ...] | None, arguments: Mapping[str, Argument],
               name: str) -> bool:
        """Whether the method takes these numbers; said once for each set of them."""
        if weights is not None:
            problem, warning = weight_sums(self.method.name, bool(arguments.get("normalize")), weights)
            if warning:
                self.findings.remark(f"{self.method.name}: {warning}")
            if problem:
                self.findings.problem(f"{self.method.name}: {problem}", name)
                return False
        if "epsilon" in arguments and "density" in arguments and not self._leaves_room(entries, arguments, name):
            return False
        if self.method.name in SHARES and weights is not None:
            weights = tuple(w / sum(weights) for w in weights)
        try:
            check_arguments(self.method, arguments, weights, len(entries))
        except RecipeError as error:
            self.findings.problem(str(error), name)
            return False
        return True

    def _leaves_room(self, entries: Sequence[Entry], arguments: Mapping[str, Argument], name: str) -> bool:
        """della: probabilities to keep run from density - epsilon to density + epsilon, inside 0 to 1 (3.5)."""
        fine = True
        for i, entry in enumerate(entries):
            density, epsilon = (float(v[i] if isinstance(v, tuple) else v)
                                for v in (arguments["density"], arguments["epsilon"]))
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                self.findings.problem(
                    f"{entry.where} ({entry.model}): {self.method.name} keeps entries with a probability of density -+ "
                    f"epsilon, here {density:g} -+ {epsilon:g}, which leaves 0 to 1. Wanted: epsilon < "
                    f"{min(density, 1 - density):g}", name)
                fine = False
        return fine

    def normalizes(self, levels: Sequence[Parameters], name: str, t: float) -> bool:
        found = look_up("normalize", levels, name, t)
        return bool(found[0] if found else self.reads["normalize"].default)

    def dtype(self, inputs: Sequence[str]) -> str:
        """Of the result: out_dtype, else dtype, else what holds all inputs (FIX of 1.1, step 6)."""
        said = self.config.out_dtype or self.config.dtype
        if said is not None:
            return DTYPES[said]
        return inputs[0] if len(set(inputs)) == 1 else "F32"

    def settings(self) -> Iterator[Setting]:
        """Every setting that the method reads, wherever it stands."""
        levels: list[Mapping[str, Setting]] = [self.config.parameters]
        for part in self.config.modules.values():
            levels.append(part.parameters)
            for stretch in stretches(self.config, part):
                levels += [stretch.slice.parameters] if stretch.slice else []
                levels += [entry.parameters for entry in stretch.entries]
        for level in levels:
            yield from (setting for name, setting in level.items() if name in self.reads)

    def filters(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((f, s.where) for s in self.settings() for f in s.filters))
