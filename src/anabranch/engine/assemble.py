"""From a config and its opened models to the tensors of the result: which sources, which method, which numbers.

Output layer j of a slice reads layer `start + j` of each of its models. Loose tensors are merged from the models of a
module's first slice, and those behind the last layer (final norm, head) from the models of its last one. What is done
where inputs do not line up stands at the head of `holders`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import ITEM_SIZES, Checkpoint
from anabranch.engine.config import MergeConfig, Part
from anabranch.engine.fetch import quantisation
from anabranch.engine.holders import Cast, Found, Holders, Index, Spot
from anabranch.engine.layout import Layout, name_in
from anabranch.engine.parameters import place_of
from anabranch.engine.reference import Reference
from anabranch.engine.requirements import Stretch, roles_of, stretches
from anabranch.engine.sidecars import sidecar_problems
from anabranch.engine.values import Findings, Values
from anabranch.engine.wanted import COPY, Source, Wanted
from anabranch.errors import closest
from anabranch.merge import METHODS, fitting


@dataclass(frozen=True)
class Assembly:
    """The tensors of the result and what config.json must be told.

    wanted      one for each tensor; the order says nothing
    warnings    for the user, once; the config's own first
    donor       the input whose config.json and side files the result gets
    layers      module -> for every layer of the result the number that it has in the donor's config; only modules whose
                layers were moved, dropped or repeated
    untied      config.json must say `tie_word_embeddings: false`
    fisher      input -> its sidecar file
    """

    wanted: tuple[Wanted, ...]
    warnings: tuple[str, ...]
    donor: int
    layers: dict[str, tuple[int, ...]]
    untied: bool
    fisher: dict[int, Path]


def assemble(config: MergeConfig, inputs: Sequence[Checkpoint], layouts: Sequence[Layout], *, rows: int | None = None,
             allow_mixed: bool = False, folded: Collection[Source] = ()) -> Assembly:
    """Line up the tensors of all inputs and say how each tensor of the result is made.

    Args:
        inputs, layouts: of `config.models`, in that order.
        rows: of the merged embeddings, from the tokenizer plan; None: without one.
        allow_mixed: models of different architectures are warned of, not refused.
        folded: tensors that an adapter changes: never taken over byte for byte.
    Raises:
        RecipeError, ShapeMismatch, ModelError: every problem found, in one message. The class is that of the problems
            where all are of one kind, else RecipeError.
    """
    planner = _Planner(config, inputs, layouts, rows, frozenset(folded))
    planner.check_inputs(allow_mixed)
    planner.findings.stop()
    planner.settle_modules()
    planner.findings.stop()
    wanted = [w for spot in planner.spots() if (w := planner.wanted(spot)) is not None]
    planner.check_shapes(wanted)
    planner.remark(wanted)
    fisher = planner.fisher(wanted)
    planner.findings.stop()
    layers = planner.moved()
    return Assembly(tuple(wanted), (*config.warnings, *planner.findings.remarks()), planner.numbers[config.donor],
                    layers, planner.holders.untied, fisher)


class _Planner:
    """One call of `assemble`."""

    def __init__(self, config: MergeConfig, inputs: Sequence[Checkpoint], layouts: Sequence[Layout],
                 rows: int | None, folded: frozenset[Source]) -> None:
        self.config, self.inputs, self.layouts, self.rows, self.folded = config, inputs, layouts, rows, folded
        self.method = METHODS[config.method]
        self.numbers = {reference: i for i, reference in enumerate(config.models)}
        self.index = [Index.of(layout) for layout in layouts]
        self.findings = Findings(f"{config.source}: this cannot be merged:")
        self.values = Values(config, self.method, self.findings)
        self.holders = Holders(config, inputs, self.index, self.numbers, self.values, self.findings)
        self.parts: list[tuple[str, Part]] = []
        self.lengths: dict[str, int] = {}
        self.seen: set[str] = set()

    # ---- the inputs as they are

    def check_inputs(self, allow_mixed: bool) -> None:
        kinds = {}
        for label, checkpoint, layout in zip(self.config.models, self.inputs, self.layouts, strict=True):
            if (how := quantisation(checkpoint)) is not None:
                self.findings.problem(f"{label}: quantised ({how}), and sums of packed numbers have no meaning. Load the "
                                      "model dequantised, save that, and merge it.", kind="model")
            elif odd := {i.dtype for i in checkpoint.tensors.values() if i.dtype not in ITEM_SIZES or i.dtype == "F64"}:
                self.findings.problem(f"{label}: tensors of {', '.join(sorted(odd))} cannot be merged. Save the model in "
                                      "float32, bfloat16 or float16.", kind="model")
            for warning in layout.warnings:
                self.findings.remark(f"{label}: {warning}")
            if (kind := _architecture(label, checkpoint)) is not None:
                kinds[str(label)] = kind
        if len(set(kinds.values())) > 1:
            message = "models of different architectures: " + ", ".join(f"{label} is {k}" for label, k in kinds.items())
            if allow_mixed:
                self.findings.remark(message)
            else:
                self.findings.problem(f"{message}. A tensor of one name means different things in them. Merge models of "
                                      "one architecture (`override_architecture` renames one that is the same under "
                                      "another name).", kind="model")
        first, *others = self.config.models
        for label, layout in zip(others, self.layouts[1:], strict=True):
            if (how := _unlike(self.layouts[0], layout)) is not None:
                self.findings.problem(f"{label} has few names of tensors in common with {first}{how}", kind="shape")

    # ---- modules and their layers

    def settle_modules(self) -> None:
        """Which modules the result has, from which lists; every range checked against the layers there are."""
        there = list(dict.fromkeys(module for layout in self.layouts for module in layout.layers))
        named = self.config.modules
        if None in named:
            if named[None].slices and len(there) > 1:
                self.findings.problem(
                    f"slices: these models have {len(there)} modules ({self._sizes(there)}), and `slices` does not say which "
                    f"it takes apart. Write `modules: {{{there[0]}: {{slices: ..}}}}`, and `models:` for each that stays "
                    "whole.")
                return
            self.parts = [(module, named[None]) for module in there]
        else:
            for name in [str(n) for n in named if n not in there]:
                self.findings.problem(f"modules.{name}: these models have no such module.{closest(name, there)}")
            if missing := [module for module in there if module not in named]:
                self.findings.problem(f"modules: nothing is said about {self._sizes(missing)}, and the result would not have "
                                      f"{'it' if len(missing) == 1 else 'them'}. Add `{missing[0]}: {{models: ..}}`.")
            self.parts = [(str(n), part) for n, part in named.items() if n in there]
        for module, part in self.parts:
            self.lengths[module] = sum(self._length(module, s) for s in stretches(self.config, part))

    def _sizes(self, modules: Sequence[str]) -> str:
        count = {m: max(layout.layers.get(m, 0) for layout in self.layouts) for m in modules}
        return ", ".join(f"`{m}` ({n} layers)" if n else f"`{m}` (what is in no layer)" for m, n in count.items())

    def _layers_in(self, model: Reference, module: str) -> int | None:
        return self.layouts[self.numbers[model]].layers.get(module)

    def _length(self, module: str, stretch: Stretch) -> int:
        """Layers of a stretch. Ranges that a model does not have are problems."""
        if stretch.slice is None:
            models = [e.model for e in roles_of(self.config, stretch).branches] + ([stretch.base] if stretch.base else [])
            depths = {str(model): self._layers_in(model, module) for model in dict.fromkeys(models)}
            if len(set(depths.values())) > 1:
                self.findings.problem(
                    f"{stretch.where}: models of different depth cannot be merged whole; in module `{module}` "
                    + ", ".join(f"{m} has {'no' if n is None else n} layers" for m, n in depths.items())
                    + ". Take layers apart with `slices`.", kind="model")
            return max((n for n in depths.values() if n), default=0)
        first = stretch.entries[0].layers or (0, 0)
        wanted = [(e.where, e.model, e.layers or (0, 0)) for e in stretch.entries]
        if (stretch.base is not None and self.method.takes_base
                and stretch.base not in [e.model for e in stretch.entries]):
            wanted.append((f"{stretch.where}, base_model", stretch.base, first))
        for where, model, (start, stop) in wanted:
            has = self._layers_in(model, module) or 0
            if stop > has:
                self.findings.problem(f"{where}: layer_range [{start}, {stop}] of {model}, which has {has} layers"
                                      + (f" in module `{module}`" if module != "default" else "")
                                      + f". Wanted: an end of at most {has}.")
        return first[1] - first[0]

    def check_shapes(self, wanted: Sequence[Wanted]) -> None:
        """The result gets the donor's config.json, which says how large its tensors are: layers of a wider model, or a head
        of another vocabulary, make a folder that nothing loads."""
        donor = self.inputs[self.numbers[self.config.donor]]
        known: dict[str, set[tuple[int, ...]]] = {}
        for name, info in donor.tensors.items():
            known.setdefault(_numbered(name), set()).add(info.shape)
        for w in wanted:
            shapes = known.get(_numbered(w.name), {w.shape})
            cut = 1 if w.embedding and self.rows is not None else 0
            if w.shape[cut:] not in {shape[cut:] for shape in shapes}:
                self.findings.problem(
                    f"tensor '{w.name}' would have shape {w.shape}, and {self.config.donor}, whose config.json the result "
                    f"gets, has {' or '.join(map(str, sorted(shapes)))} there. "
                    + ("Rows are tokens: add `tokenizer: {source: base}` or `union`." if w.embedding else
                       "Layers of models of different sizes cannot be stacked."), kind="shape")

    def moved(self) -> dict[str, tuple[int, ...]]:
        """For each module the layers in the donor's numbers. A donor that is not in a slice lends the numbers there."""
        result = {}
        donor = self.config.donor
        for module, part in self.parts:
            has = self._layers_in(donor, module) or 0
            numbers: list[int] = []
            for stretch in stretches(self.config, part):
                if stretch.slice is None:
                    numbers += range(self.lengths[module])
                    continue
                entry = next((e for e in stretch.entries if e.model == donor), stretch.entries[0])
                start, stop = entry.layers or (0, 0)
                if stop > has:
                    self.findings.remark(f"{entry.where}: goes beyond the {has} layers of {donor}, whose config.json the "
                                         "result gets; a list in it with one entry per layer repeats its last one there")
                numbers += [min(n, max(has - 1, 0)) for n in range(start, stop)]
            if numbers != list(range(has)):
                result[module] = tuple(numbers)
        return result

    # ---- the tensors of the result

    def spots(self) -> Iterator[Spot]:
        native = self.config.dialect == "native"
        for module, part in self.parts:
            casts = [self._cast(module, stretch) for stretch in stretches(self.config, part)]
            yield from self._loose(module, casts[0], "pre", 0.0, 0.0)
            done = 0
            for cast in casts:
                for layer in range(cast.length):
                    tables = [self.index[self.numbers[model]].layers.get((module, start + layer), {})
                              for model, start in cast.starts.items()]
                    for template in dict.fromkeys(t for table in tables for t in table):
                        yield Spot(name_in(template, done + layer), template, module, cast, "layer", layer,
                                   place_of(layer, cast.length), place_of(done + layer, self.lengths[module]))
                done += cast.length
            yield from self._loose(module, casts[-1], "post", 1.0 if native else 0.0, 1.0)

    def _cast(self, module: str, stretch: Stretch) -> Cast:
        roles = roles_of(self.config, stretch)
        listed = {e.model: (e.layers or (0, 0))[0] for e in stretch.entries}
        first = stretch.entries[0].layers or (0, 0)
        models = ([roles.base] if roles.base is not None else []) + [e.model for e in roles.branches]
        return Cast(stretch, roles, {model: listed.get(model, first[0]) for model in models},
                    self.lengths[module] if stretch.slice is None else first[1] - first[0])

    def _loose(self, module: str, cast: Cast, part: Literal["pre", "post"], t: float, depth: float) -> Iterator[Spot]:
        tables = [self.index[self.numbers[model]].loose.get((module, part), {}) for model in cast.starts]
        for template in dict.fromkeys(t for table in tables for t in table):
            name = name_in(template, self._layers_before(template, module))
            yield Spot(name, template, module, cast, part, None, t, depth)

    def _layers_before(self, template: str, module: str) -> int:
        """Layers that the result has in the stack behind which an `{after+k}` tensor is numbered on."""
        for layout in self.layouts:
            for name, prefix in layout.prefixes.items():
                if template.startswith(f"{prefix}.{{after"):
                    return self.lengths.get(name, 0)
        return self.lengths.get(module, 0)

    # ---- one tensor

    def wanted(self, spot: Spot) -> Wanted | None:
        """How a tensor is made; None if it is left out, or cannot be made (and then a problem says why)."""
        if spot.name in self.seen:
            self.findings.problem("would stand twice in the result", spot.name, kind="model")
            return None
        self.seen.add(spot.name)
        found = self.holders.find(spot)
        if found is None:
            return None
        base, branches = found
        everyone = [base, *branches] if base is not None else branches
        plain = [f for f in everyone if f.info.dtype not in MERGED]
        if plain:
            if not self.holders.same_buffer(spot, everyone):
                return None
            first = everyone[0].info
            return Wanted(spot.name, first.shape, COPY, tuple(f.source for f in everyone), None, None, (), first.dtype,
                          spot.depth)
        if not self.holders.enough(spot, base, branches):
            return None
        embedding = any(f.source.name in self.index[f.source.input].embeddings for f in everyone)
        kept = self.holders.same_shape(spot, base, branches, embedding=embedding, any_rows=self.rows is not None)
        return None if kept is None else self._merged(spot, base, kept, embedding)

    def _merged(self, spot: Spot, base: Found | None, branches: Sequence[Found], embedding: bool) -> Wanted | None:
        everyone = [*branches, *([base] if base is not None else [])]
        dtype = self.values.dtype([f.info.dtype for f in everyone])
        shape = everyone[0].info.shape
        if embedding and self.rows is not None:
            shape = (self.rows, *shape[1:])
        if len(branches) < self.method.branches[0]:
            return self._copied(spot, base or branches[0], shape, dtype, embedding)
        found = self.values.of([(f.entry, f.name) for f in branches], spot.cast.stretch.levels, spot.name, spot.t,
                               spot.part == "post")
        if found is None:
            return None
        weights, arguments = found
        method, arguments = fitting(self.method, arguments, shape, embedding)
        if method.name == "passthrough" and arguments.get("scale") == 1.0:
            return self._copied(spot, branches[0], shape, dtype, embedding)
        return Wanted(spot.name, shape, method.name, tuple(f.source for f in branches),
                      base.source if base is not None and method.takes_base else None,
                      weights if "weights" in method.inputs else None, tuple(sorted(arguments.items())), dtype,
                      spot.depth, embedding)

    def _copied(self, spot: Spot, found: Found, shape: tuple[int, ...], dtype: str, embedding: bool) -> Wanted:
        """A float tensor taken over: byte for byte, unless its dtype or its rows change, or an adapter does."""
        plain = found.info.dtype == dtype and not (embedding and self.rows is not None) and found.source not in self.folded
        return Wanted(spot.name, shape, COPY if plain else "passthrough", (found.source,), None, None,
                      () if plain else (("scale", 1.0),), dtype, spot.depth, embedding)

    # ---- afterwards

    def remark(self, wanted: Sequence[Wanted]) -> None:
        """What only the tensors' names and dtypes can tell about the settings."""
        names = {w.name for w in wanted} | {s.name for w in wanted for s in w.sources}
        for piece, where in self.values.filters():
            if not any(piece in name for name in names):
                self.findings.remark(f"{where}: no tensor has `{piece}` in its name. A filter is a plain piece of a name, no "
                                     "pattern.")
        if any(w.method == "nearswap" and w.dtype in ("BF16", "F16") for w in wanted):
            self.findings.remark("nearswap: steps as small as `t` vanish where the result is rounded to 16 bits; "
                                 "`out_dtype: float32` keeps them")

    def fisher(self, wanted: Sequence[Wanted]) -> dict[int, Path]:
        if "fisher" not in self.method.inputs:
            return {}
        entries = [e for part in self.config.modules.values() for entries in part.lists for e in entries]
        files = {self.numbers[e.model]: Path(e.fisher) for e in entries if e.fisher is not None}
        if self.rows is not None:
            self.findings.problem("tokenizer: Fisher information has the rows of its own model's vocabulary, and cannot follow "
                                  "them into a merged one. Merge without `tokenizer`.")
        for problem in sidecar_problems(files, wanted, [str(model) for model in self.config.models], self.inputs):
            self.findings.problem(problem)
        return files


def _unlike(one: Layout, other: Layout) -> str | None:
    """Where two models share less than half of their tensors' names: what may be behind it."""
    mine, theirs = ({place.template for place in layout.places.values()} for layout in (one, other))
    if 2 * len(mine & theirs) >= min(len(mine), len(theirs)):
        return None
    for longer, shorter in ((mine, theirs), (theirs, mine)):
        ending = min(shorter, default="")
        for prefix in {name[: -len(ending)] for name in longer if ending and name.endswith(f".{ending}")}:
            if 2 * sum(prefix + name in longer for name in shorter) >= len(shorter):
                return (f": they differ by the prefix `{prefix}`. One was saved with its head and one without, or by another "
                        "library. Load one with the class of the other (the `architectures` of its config.json) and save it.")
    return ". Merge models of one architecture, saved by the same library."


def _numbered(name: str) -> str:
    """A tensor's name without the numbers in it, which count layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _architecture(label: Reference, checkpoint: Checkpoint) -> str | None:
    said = checkpoint.config.get("architectures")
    return label.architecture or (str(said[0]) if isinstance(said, list) and len(said) == 1 else None)
