"""What a method asks of a config, as far as it can be judged before any model is opened."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from anabranch.engine.config import Entry, MergeConfig, Part, Slice
from anabranch.engine.conventions import (
    BASE_IS_A_BRANCH,
    TASK_ARITHMETIC,
    WEIGHT,
    Read,
    names_of,
    parameters_of,
    typed,
    why_inert,
)
from anabranch.engine.parameters import Setting
from anabranch.engine.reference import Reference
from anabranch.merge import METHODS, MergeMethod


@dataclass(frozen=True)
class Roles:
    """Who is merged with whom in one list of models. `base` is None where the method takes none, or none is given."""

    branches: tuple[Entry, ...]
    base: Reference | None
    where: str


@dataclass(frozen=True)
class Stretch:
    """One list of models of a config: all of a module, or a slice of it. `levels`: settings, nearest first."""

    entries: tuple[Entry, ...]
    base: Reference | None
    levels: tuple[Mapping[str, Setting], ...]
    slice: Slice | None
    where: str


def stretches(config: MergeConfig, part: Part) -> list[Stretch]:
    """The lists of a module in the order of its layers, each with its base and the levels of its settings (2.5)."""
    outer = (part.parameters, config.parameters)
    if part.models:
        return [Stretch(part.models, config.base, outer, None, f"{part.where}." * bool(part.where) + "models")]
    return [Stretch(s.entries, s.base or config.base, (s.parameters, *outer), s, s.where) for s in part.slices]


def roles_of(config: MergeConfig, stretch: Stretch) -> Roles:
    """Who is a branch and who is the base. Merge specification, 1.3.

    A method that takes a base never merges it as a branch. For the peer's linear, karcher and passthrough the base of
    whole models is one more branch, listed last; elsewhere it only lends its config.json and tokenizer.
    """
    method, base = METHODS[config.method], stretch.base
    listed = [e.model for e in stretch.entries]
    if method.takes_base:
        return Roles(tuple(e for e in stretch.entries if e.model != base), base, stretch.where)
    joins = config.dialect == "mergekit" and method.name in BASE_IS_A_BRANCH and stretch.slice is None
    extra = (Entry(base, {}, "base_model"),) if joins and base is not None and base not in listed else ()
    return Roles(stretch.entries + extra, None, stretch.where)


def check_method(config: MergeConfig, problems: list[str], warnings: list[str]) -> None:
    """Add what the method cannot work with to `problems`, and what it does not use to `warnings`."""
    method = METHODS[config.method]
    reads = parameters_of(method, config.dialect)
    lists = [(part, s) for part in config.modules.values() for s in stretches(config, part)]
    if method.needs_base and any(s.base is None for _, s in lists):
        first = next(iter(config.models))
        problems.append(f"base_model: {method.name} needs one, and none is given"
                        + (f". With `base_model: {first}`, t = 0 is that model." if method.name == "slerp" else "."))
    for _, stretch in lists:
        _check_duplicates(stretch, WEIGHT in reads, problems)
        roles = roles_of(config, stretch)
        if not (method.needs_base and stretch.base is None):
            _check_count(config, method, stretch, roles, problems)
        _check_required(config, method, reads, stretch, roles, problems)
        _check_base_entry(method, stretch, roles, warnings)
        _check_sidecars(method, stretch, roles, problems, warnings)
    _check_levels(config, method, reads, problems, warnings)
    if not method.takes_base and config.base is not None and not any(
            config.base in [e.model for e in roles_of(config, s).branches] for _, s in lists):
        warnings.append(f"base_model: {method.name} takes no base; {config.base} only lends its config.json and tokenizer")
    if config.tokenizer is not None and config.tokenizer.source == "base" and config.base is None:
        warnings.append(f"tokenizer.source: `base`, and there is no base_model; the model listed first, {config.donor}, takes "
                        "its place")


def _check_duplicates(stretch: Stretch, weighted: bool, problems: list[str]) -> None:
    seen: dict[Reference, Entry] = {}
    for entry in stretch.entries:
        if entry.model in seen:
            problems.append(f"{entry.where}: {entry.model} is already {seen[entry.model].where}. The peer drops the second "
                            "without a word. Keep one entry" + (", with the sum of the weights." if weighted else "."))
        seen.setdefault(entry.model, entry)


def _check_count(config: MergeConfig, method: MergeMethod, stretch: Stretch, roles: Roles, problems: list[str]) -> None:
    least, most = (2, 2) if method.name == "nuslerp" else method.branches  # one: where a tensor is in one of the two
    count = len({e.model for e in roles.branches})
    base = stretch.base
    if method.name == "nuslerp" and base in [e.model for e in stretch.entries]:
        problems.append(f"{stretch.where}: nuslerp subtracts the base from two other models, and {base} is base_model and in "
                        "the list as well. Remove `base_model` to merge the models themselves, or use slerp.")
        return
    if least <= count <= most:
        return
    beside = f" beside the base {base}" if method.takes_base and base is not None else ""
    wanted = f"{least}" if least == most else f"at least {least}" if math.isinf(most) else f"{least} to {most}"
    remedy = ""
    if any(e.where == "base_model" for e in roles.branches):
        remedy = f" In MergeKit's {method.name} a base_model is one more model: remove `base_model`."
    elif count == 2 and least == most == 1 and beside:
        remedy = f" {method.name} merges the base with one other: make one of the two `base_model`."
    elif count == 0 and beside:
        remedy = " The base is not merged with itself: list the model that it is to be merged with."
    elif method.name == "passthrough":
        remedy = " To put layers of several models together, give each a slice of its own."
    models = "model" if wanted == "1" else "models"
    problems.append(f"{stretch.where}: {method.name} merges {wanted} {models}{beside}, got {count}.{remedy}")


def _check_required(config: MergeConfig, method: MergeMethod, reads: Mapping[str, Read], stretch: Stretch, roles: Roles,
                    problems: list[str]) -> None:
    """Parameters without a default that no level sets. A filter that leaves a tensor out is found when planning."""
    spelled = dict(zip(reads, names_of(method, config.dialect), strict=True))
    for name, read in reads.items():
        if read.default is not None or any(name in level for level in stretch.levels):
            continue
        if read.scope == "merge":
            strayed = [e.where for e in stretch.entries if name in e.parameters]
            problems.append(f"{stretch.where}: {method.name} needs `{spelled[name]}`, and it is not set"
                            + (f" where it is read ({strayed[0]}.parameters is not)" if strayed else "")
                            + f". Write `parameters: {{{spelled[name]}: ..}}` at the top level.")
            continue
        for entry in roles.branches:
            if name in entry.parameters:
                continue
            problems.append(f"{entry.where} ({entry.model}): {method.name} needs `{spelled[name]}` for it, and it is not set. "
                            + (f"In MergeKit's {method.name} a base_model is one more model: list it with "
                               f"`{spelled[name]}: 0`, or remove `base_model`." if entry.where == "base_model"
                               else f"Write `parameters: {{{spelled[name]}: ..}}` below the model."))


def _check_base_entry(method: MergeMethod, stretch: Stretch, roles: Roles, warnings: list[str]) -> None:
    for entry in stretch.entries:
        if entry not in roles.branches and entry.parameters:
            names = ", ".join(f"`{s.where.rpartition('.')[2]}`" for s in entry.parameters.values())
            warnings.append(f"{entry.where}: {entry.model} is the base, and {names} of it has no effect under {method.name}")


def _check_sidecars(method: MergeMethod, stretch: Stretch, roles: Roles, problems: list[str], warnings: list[str]) -> None:
    wanted = "fisher" in method.inputs
    for entry in stretch.entries:
        if entry.fisher is not None and not (wanted and entry in roles.branches):
            warnings.append(f"{entry.where}.fisher: has no effect under {method.name}")
    problems += [f"{e.where} ({e.model}): {method.name} needs its Fisher information: `fisher: FILE.safetensors` beside "
                 "`model`, with a tensor of the same name and shape for each of the model's"
                 for e in roles.branches if wanted and e.fisher is None]


def _check_levels(config: MergeConfig, method: MergeMethod, reads: Mapping[str, Read], problems: list[str],
                  warnings: list[str]) -> None:
    """Every setting: whether its method reads it, there, and could take its numbers."""
    for settings, beside_model in _levels(config):
        for name, setting in settings.items():
            said = setting.where.rpartition(".")[2]
            if name not in reads:
                warnings.append(f"{setting.where}: has no effect under {method.name}{why_inert(said)}")
                continue
            if beside_model and reads[name].scope == "merge":
                message = (f"{setting.where}: {method.name} has one `{said}` for all models and never looks for it beside one, "
                           "so it has no effect. Move it to the `parameters` of the slice or of the top level.")
                (warnings if config.dialect == "mergekit" else problems).append(message)
                continue
            for value in dict.fromkeys(setting.values):
                try:
                    typed(reads[name], method.name, config.dialect, value)
                except ValueError as error:
                    problems.append(f"{setting.where}: {error}")
                    break
            _remark(method, name, setting, warnings)


def _levels(config: MergeConfig) -> Iterator[tuple[Mapping[str, Setting], bool]]:
    yield config.parameters, False
    for part in config.modules.values():
        yield part.parameters, False
        for stretch in stretches(config, part):
            if stretch.slice is not None:
                yield stretch.slice.parameters, False
            for entry in roles_of(config, stretch).branches:  # a base's own are told of elsewhere
                yield entry.parameters, True


def _remark(method: MergeMethod, name: str, setting: Setting, warnings: list[str]) -> None:
    if name == "t" and method.name == "slerp" and any(isinstance(v, float) and not 0 <= v <= 1 for v in setting.values):
        warnings.append(f"{setting.where}: outside 0 to 1 the result lies beyond the two models")
    if name == "density" and method.name in TASK_ARITHMETIC and 0.0 in setting.values:
        warnings.append(f"{setting.where}: a density of 0 drops all that the model changed")


def weight_sums(method: str, normalize: bool, weights: Sequence[float]) -> tuple[str | None, str | None]:
    """(problem, warning) with the weights of one tensor, or None."""
    total = sum(weights)
    if method in ("linear", "multislerp") and normalize and abs(total) < 1e-12:
        return "the weights sum to 0, and the sum is what they are divided by. Change them, or set `normalize: false`.", None
    if method in ("fisher", "token_weighted", "interpolate") and not total > 0:
        return f"the weights sum to {total:g}, wanted more than 0", None
    if method == "nuslerp" and abs(total) < 1e-6:
        return None, "the two weights sum to 0, and are taken as equal (t = 0.5)"
    elects = method.endswith("ties") or method in ("della", "ties_global")  # those divide entry by entry
    if normalize and method in TASK_ARITHMETIC and not elects and abs(total) < 1e-8:
        return None, "the weights sum to 0, and `normalize` divides by 1 instead"
    if normalize and min(weights, default=0) < 0:
        return None, ("a negative weight together with `normalize`: where the weights that are summed nearly cancel, the "
                      "quotient grows without bound or changes its sign")
    return None, None
