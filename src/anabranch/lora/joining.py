"""A merge of adapters, opened: its sources, the modules they change, and how each of these is merged."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.engine.adapter import EMBEDDING, HEAD
from anabranch.engine.blocks import Uniform
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.fetch import resolve
from anabranch.engine.layout import layout_of
from anabranch.engine.parameters import place_of
from anabranch.engine.stream import branch_keys
from anabranch.engine.values import Findings, Values
from anabranch.engine.wanted import Input
from anabranch.errors import ModelError, ShapeMismatch
from anabranch.lora import spaces
from anabranch.lora.config import AdapterMerge
from anabranch.lora.modules import bare
from anabranch.lora.sources import Pair, Source, open_source, shapes_together
from anabranch.merge import MergeMethod, fitting, method_named


@dataclass(frozen=True)
class Place:
    """A module of the result.

    weight     the name of its tensor in a model; `depth` of its layer as methods take it
    pair       of some adapter that has it: for its shape
    turned     the model stores it [in, out]
    stored     its shape there
    """

    path: str
    weight: str
    pair: Pair
    turned: bool
    stored: tuple[int, ...]
    embedding: bool
    t: float
    depth: float
    last: bool


@dataclass(frozen=True)
class Job:
    """An opened merge."""

    config: AdapterMerge
    sources: tuple[Source, ...]
    base: Checkpoint | None
    places: dict[str, Place]
    values: Values
    findings: Findings
    keys: list[str]
    seed: int


def opened(asked: AdapterMerge, seed: int, warn: Callable[[str], None]) -> Job:
    problems, sources = [], []
    for reference in asked.adapters:
        if reference.adapter is not None:
            problems.append(f"{reference}: names a model with an adapter. List the adapter alone; the model is `base_model`.")
            continue
        try:
            sources.append(open_source(resolve(reference.path, reference.revision), str(reference)))
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise ModelError.of("these adapters cannot be merged:", problems) if len(problems) > 1 else ModelError(problems[0])
    base = Checkpoint.open(resolve(asked.base.path, asked.base.revision)) if asked.base is not None else None
    pairs, mismatches = shapes_together(sources)
    places = _places(pairs, sources, base, mismatches)
    if mismatches:
        more = [f".. and {len(mismatches) - 12} more"] if len(mismatches) > 12 else []
        raise ShapeMismatch.of("these adapters do not belong together:", mismatches[:12] + more)
    bases = {str(s.config.get("base_model_name_or_path")) for s in sources if s.config.get("base_model_name_or_path")}
    if len(bases) > 1:
        warn(f"the adapters name different bases ({', '.join(sorted(bases))}): merged, they fit neither as they did")
    method = method_named(asked.merge.method)
    findings = Findings("the numbers of this merge:")
    return Job(asked, tuple(sources), base, places, Values(asked.merge, method, findings), findings,
                _draw_keys(sources, base, asked), seed)


def _draw_keys(sources: Sequence[Source], base: Checkpoint | None, asked: AdapterMerge) -> list[str]:
    """As `anabranch merge` names BASE+ADAPTER, so that both draw the same numbers; else by the adapters alone."""
    if base is None or asked.base is None:
        return branch_keys([Input(s.label, s.folder) for s in sources])
    local = os.path.isdir(asked.base.path)
    inputs = [Input(f"{asked.base}+{s.label}", base.folder, s.folder, local) for s in sources]
    return branch_keys([*inputs, Input(str(asked.base), base.folder, None, local)])[:-1]


def _places(pairs: Mapping[str, Pair], sources: Sequence[Source], base: Checkpoint | None,
            problems: list[str]) -> dict[str, Place]:
    layout = layout_of(base) if base is not None else None
    numbers = {path: int(m[1]) for path in pairs if (m := re.search(r"\.(\d+)\.", path))}
    layers = max(layout.layers.values(), default=0) if layout is not None else max(numbers.values(), default=-1) + 1
    turned_in_file = any(bool(s.config.get("fan_in_fan_out")) for s in sources)
    places = {}
    for path, pair in sorted(pairs.items()):
        weight = f"{path}.weight"
        rows, columns = pair.shape
        embedding = bool(pair.embedding or EMBEDDING.search(weight) or HEAD.search(weight))
        turned = pair.embedding or (turned_in_file and not pair.outer and not HEAD.search(weight))
        stored = (columns, rows) if turned else (rows, *(pair.outer or (columns,)))
        if base is not None:
            known = in_base_as(path, base)
            if known is None and not (HEAD.search(weight) and base.ties_embeddings):
                problems.append(f"'{path}': the base {base.folder} has no such tensor")
            elif known is not None:
                weight, there = known, base.tensors[known].shape
                if rows != columns and not pair.outer:
                    turned = there == (columns, rows)
                stored = (columns, rows) if turned else (rows, *(pair.outer or (columns,)))
                embedding = layout.places[known].embedding if layout is not None else embedding
                if there != stored:
                    problems.append(f"'{path}': changes a weight of {stored}, and '{known}' of the base is {there}")
        number = numbers.get(path)
        t = place_of(number, layers) if number is not None else 0.0
        depth = t if number is not None else (1.0 if HEAD.search(weight) else 0.0)
        places[path] = Place(path, weight, pair, turned, stored, embedding, t, depth, number is None and depth == 1.0)
    return places


def in_base_as(path: str, base: Checkpoint) -> str | None:
    if f"{path}.weight" in base.tensors:
        return f"{path}.weight"
    alike = [name for name in base.tensors if bare(name) == bare(f"{path}.weight")]
    return alike[0] if len(alike) == 1 else None


# --- how a module is merged ---


@dataclass(frozen=True)
class Plan:
    """How a module is merged. `space`: core, dense or compressed; `kind`: see `spaces`; `call`: the method, ready."""

    method: MergeMethod
    arguments: dict[str, Any]
    weights: tuple[float, ...]
    space: str
    kind: str
    cuts: tuple[float, ...] = ()


def plan_of(job: Job, place: Place) -> Plan:
    entries = [(entry, place.weight) for entry in job.config.merge.modules[None].models]
    found = job.values.of(entries, (job.config.merge.parameters,), place.weight, place.t, place.last)
    method = job.values.method
    if found is None:  # said in `findings`
        return Plan(method, {}, (), "core", "turning")
    weights, arguments = found
    one, given = fitting(method, arguments, place.stored, place.embedding)
    w = weights or (1.0,) * len(entries)
    kind = spaces.kind_of(one, given, weights)
    wanted = job.config.space
    space = ("core" if kind == "turning" else "dense") if wanted == "auto" else wanted
    if one.cuts_from is not None and space != "dense":
        job.findings.problem(f"space: {one.name} ranks the entries of whole matrices. Leave `space` out", place.weight)
    if kind == "weights" and space != "dense":
        job.findings.problem(f"space: {one.name} depends on the base's own weights, so it can be computed on whole matrices "
                             "only. Leave `space` out, or write `space: dense`", place.weight)
    if kind == "weights" and (job.base is None or place.weight not in job.base.tensors):
        job.findings.problem(f"{one.name}{' with these numbers' if one.name in ('linear', 'passthrough') else ''} depends on "
                             "the base's own weights: give `base_model:`, or use task_arithmetic", place.weight)
    return Plan(one, given, w, space, kind)


def call_of(job: Job, plan: Plan, place: Place, core: bool) -> spaces.Call:
    inputs = {"weights": torch.tensor(plan.weights, dtype=torch.float32), "depth": place.depth,
              "cuts": torch.tensor(plan.cuts, dtype=torch.float32)}

    def draws(shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        numbers = torch.empty(len(job.sources), count)
        Uniform(job.seed, job.keys, f"{place.weight} core" if core else place.weight)(0, count, numbers)
        return numbers.reshape(len(job.sources), *shape)

    return spaces.call_of(plan.method, plan.arguments, inputs, draws)


def factors_of(job: Job, place: Place) -> list[tuple[Tensor, Tensor, float]]:
    """(B, A, scale) of every adapter; of rank 0 where it leaves the module alone."""
    rows, columns = place.pair.shape
    return [(*s.factors(place.path), s.pairs[place.path].scale) if place.path in s.pairs
            else (torch.zeros(rows, 0), torch.zeros(0, columns), 1.0) for s in job.sources]


def dense_changes(job: Job, place: Place) -> Tensor:
    """The change that each adapter makes, float32 [k, *stored]."""
    changes = torch.empty(len(job.sources), *place.stored)
    for i, (b, a, scale) in enumerate(factors_of(job, place)):
        change = (b @ a) * scale
        changes[i] = (change.T if place.turned else change).reshape(place.stored)
    return changes


def plan_whole(job: Job, place: Place) -> Plan:
    entries = [(entry, place.weight) for entry in job.config.merge.modules[None].models]
    found = job.values.of(entries, (job.config.merge.parameters,), place.weight, place.t, place.last)
    if found is None:
        return Plan(job.values.method, {}, (), "dense", "entrywise")
    weights, arguments = found
    one, given = fitting(job.values.method, arguments, place.stored, place.embedding)
    return Plan(one, given, weights or (1.0,) * len(entries), "dense", "weights")
