"""Which inputs hold a tensor of the result, and what is done where not all of them do.

Rules (merge specification, 1.2, 4.1, 4.7), told to the user each time:

    only the base has it        it is copied: nobody changed it
    the base lacks it           an error; a buffer that every loader computes (`rotary_emb.inv_freq`) is left out
    some branches lack it       mergekit: merged over those that have it; native: an error. Without `normalize`, linear
                                would give a fraction of the tensor: an error in both
    an output head that a tied model leaves to its embedding      that embedding stands in, and the result is untied. If
                                all models are tied and hold only copies of their embeddings, no head is written
    rows of embeddings differ   an error, unless the config says how to merge the tokenizers
    another shape               an error; in mergekit's task arithmetic family that model is left out of that tensor
    integers, booleans          copied; the engine checks that they are equal
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from anabranch.engine.checkpoint import Checkpoint, TensorInfo
from anabranch.engine.config import Entry, MergeConfig
from anabranch.engine.layout import Layout
from anabranch.engine.reference import Reference
from anabranch.engine.requirements import Roles, Stretch
from anabranch.engine.values import Findings, Values
from anabranch.engine.wanted import Source

# Buffers of fixed numbers that old checkpoints saved and that every loader makes anew.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.masked_bias|\.position_ids)$")


@dataclass(frozen=True)
class Cast:
    """Who takes part in a stretch. `starts`: the first layer of each, the base first. `length`: how many layers."""

    stretch: Stretch
    roles: Roles
    starts: dict[Reference, int]
    length: int


@dataclass(frozen=True)
class Spot:
    """A tensor of the result before it has sources. `layer`: its offset in the stretch, None for a loose tensor."""

    name: str
    template: str
    module: str
    cast: Cast
    part: Literal["pre", "layer", "post"]
    layer: int | None
    t: float
    depth: float


@dataclass(frozen=True)
class Found:
    """A tensor of one input that stands for a spot. `name`: what filters see; a tied head's source has another."""

    entry: Entry
    source: Source
    name: str
    info: TensorInfo


@dataclass
class Index:
    """The tensors of one input by module, and by layer or part: template -> name."""

    layers: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    loose: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, layout: Layout) -> Index:
        index = cls()
        for name, place in layout.places.items():
            table = (index.loose.setdefault((place.module, place.part), {}) if place.layer is None
                     else index.layers.setdefault((place.module, place.layer), {}))
            table[place.template] = name
            if place.embedding:
                index.embeddings.add(name)
        return index


@dataclass
class Holders:
    """The inputs, by number, and what was found out about them. `untied`: a head was given to a tied model."""

    config: MergeConfig
    inputs: Sequence[Checkpoint]
    index: Sequence[Index]
    numbers: Mapping[Reference, int]
    values: Values
    findings: Findings
    untied: bool = False

    def find(self, spot: Spot) -> tuple[Found | None, list[Found]] | None:
        """(the base's tensor, the branches') of those that have it; None if no tensor is to be written here."""
        heads = self._heads(spot)
        if heads is None:
            return None
        roles = spot.cast.roles
        branches = [f for entry in roles.branches if (f := self._found(spot, entry, heads)) is not None]
        base = self._found(spot, Entry(roles.base, {}, "base_model"), heads) if roles.base is not None else None
        return base, branches

    def _found(self, spot: Spot, entry: Entry, heads: Mapping[int, str]) -> Found | None:
        i = self.numbers[entry.model]
        if spot.layer is None:
            table = self.index[i].loose.get((spot.module, spot.part), {})
        else:
            table = self.index[i].layers.get((spot.module, spot.cast.starts[entry.model] + spot.layer), {})
        name = table.get(spot.template)
        if name is not None:
            return Found(entry, Source(i, name), name, self.inputs[i].tensors[name])
        if i in heads:
            return Found(entry, Source(i, heads[i]), spot.name, self.inputs[i].tensors[heads[i]])
        return None

    # ---- tied output heads

    def _heads(self, spot: Spot) -> dict[int, str] | None:
        """For an output head: inputs that leave it to their embedding -> that embedding. None: write no head."""
        if spot.part != "post" or not spot.name.endswith(".weight"):
            return {}
        used = [self.numbers[model] for model in spot.cast.starts]
        asked = {*used, self.numbers[self.config.donor]}
        holders = [i for i in used if spot.template in self.index[i].embeddings]
        tied = [i for i in asked if self.inputs[i].ties_embeddings]
        if not holders or not tied:
            return {}
        if len(tied) == len(asked) and all(self.inputs[i].tied_copy_of(spot.template) for i in holders):
            self.findings.remark("all models tie the output head to the embedding; the copies of it that some of them "
                                 "hold are left out", spot.name)
            return None
        self.untied = True
        self.findings.remark("an output head of its own is written, as not all models tie it to the embedding, and "
                             "config.json's `tie_word_embeddings` becomes false. Models without one take part with "
                             "their embedding", spot.name)
        width = self.inputs[holders[0]].tensors[spot.template].shape[1:]
        stand_ins = {i: self._embedding(i, width) for i in used if i in tied and i not in holders}
        return {i: name for i, name in stand_ins.items() if name is not None}

    def _embedding(self, i: int, width: tuple[int, ...]) -> str | None:
        """The input embedding of an input, whose rows are `width` wide."""
        names = [name for (_, part), table in self.index[i].loose.items() if part == "pre" for name in table.values()
                 if name in self.index[i].embeddings and self.inputs[i].tensors[name].shape[1:] == width]
        return names[0] if names else None

    # ---- where not all have it, or not in one shape

    def enough(self, spot: Spot, base: Found | None, branches: Sequence[Found]) -> bool:
        """Whether a tensor can be made of those that have it."""
        roles = spot.cast.roles
        have = {f.entry.model for f in branches}
        lacking = ", ".join(str(e.model) for e in roles.branches if e.model not in have)
        if roles.base is not None and base is None:
            return self._without_base(spot, roles.base, branches)
        if not lacking:
            return True
        if base is not None and not branches:
            self.findings.remark(f"copied from the base {roles.base}, the only model that has it", spot.name)
        elif COMPUTED.search(spot.name):
            self.findings.remark(f"{lacking} lacks a buffer that others have; merged over those", spot.name)
        elif self.config.dialect == "native":
            self.findings.problem(f"{lacking} lacks it, and other models have it. Give models with the same tensors "
                                  "(`dialect: mergekit` merges over those that have it)", spot.name, kind="shape")
            return False
        elif self.config.method == "linear" and not self.values.normalizes(spot.cast.stretch.levels, spot.name, spot.t):
            self.findings.problem(f"{lacking} lacks it, and without `normalize` the sum over the others would be a "
                                  "fraction of it. Set `normalize: true`, or give models with the same tensors",
                                  spot.name, kind="shape")
            return False
        else:
            self.findings.remark(f"{lacking} lacks it; merged over those that have it", spot.name)
        return True

    def _without_base(self, spot: Spot, base: Reference, branches: Sequence[Found]) -> bool:
        if COMPUTED.search(spot.name):
            self.findings.remark(f"left out: {base}, the base, has no such buffer, and every loader computes it", spot.name)
        else:
            self.findings.problem(f"{', '.join(str(f.entry.model) for f in branches)} has it and the base {base} has not, "
                                  "so there is nothing to take its change from. Use the base that the model was trained "
                                  "from", spot.name, kind="shape")
        return False

    def same_shape(self, spot: Spot, base: Found | None, branches: Sequence[Found], *, embedding: bool,
                   any_rows: bool) -> list[Found] | None:
        """The branches that have the shape of the base, or of the first; None after a problem.

        `any_rows`: a tokenizer plan gives every input the same rows.
        """
        reference = base or branches[0]
        kept, fine = [], True
        for found in branches:
            got, wanted = found.info.shape, reference.info.shape
            same_rows = embedding and len(got) == len(wanted) and got[1:] == wanted[1:]
            if got == wanted or (same_rows and any_rows):
                kept.append(found)
                continue
            if self.values.in_task_arithmetic and self.config.dialect == "mergekit" and not embedding:
                self.findings.remark(f"{found.entry.model} is left out: its shape is not the base's", spot.name)
                continue
            fine = False
            if same_rows:
                self.findings.problem(
                    f"tensor '{spot.name}': {found.entry.model} has {got[0]} rows, {reference.entry.model} has {wanted[0]}. "
                    "Rows are tokens, and the tokenizers say which is which. Add `tokenizer: {source: base}` to the "
                    "config (or `union`, to keep the tokens of all models).", kind="shape")
            else:
                self.findings.problem(
                    f"tensor '{spot.name}': {found.entry.model} has shape {got}, {reference.entry.model} has {wanted}. "
                    "All inputs must have one shape; Anabranch does not truncate.", kind="shape")
        return kept if fine else None

    def same_buffer(self, spot: Spot, everyone: Sequence[Found]) -> bool:
        """Whether tensors of integers or booleans could be equal; that they are is for the engine to see."""
        kinds = {(f.info.shape, f.info.dtype): f for f in everyone}
        if len(kinds) == 1:
            return True
        self.findings.problem("a buffer of " + ", of ".join(f"{dtype} {list(shape)} in {f.entry.model}"
                                                            for (shape, dtype), f in kinds.items())
                              + "; only equal ones can be kept", spot.name, kind="shape")
        return False
