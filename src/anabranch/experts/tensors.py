"""The tensors of a mixture: experts scaled and stacked, all else from the base. One group per tensor, so that no more than one
layer's largest is in memory per worker.

    noise:     x + noise_scale * N(0, 1), of the seed, the expert's number and the tensor's name; in float32
    residual:  * residual_scale, for `down` alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from anabranch.engine.making import TORCH, Made
from anabranch.errors import ModelError, ShapeMismatch
from anabranch.experts.layouts import QWEN2, Layout, skeleton
from anabranch.experts.settings import Expert
from anabranch.experts.sources import MATRICES, MLP, Source, matrix
from anabranch.rows import generator

Rows = Mapping[int, Tensor]


@dataclass(frozen=True)
class Member:
    """An expert and its opened model. `number` sets its noise apart: 'expert 0', 'shared 0'."""

    expert: Expert
    source: Source
    number: str

    @property
    def plain(self) -> bool:
        """Whether its matrices stand in the result as they are."""
        return not self.expert.noise_scale and self.expert.residual_scale == 1.0

    def matrix(self, layer: int, which: str, seed: int) -> Tensor:
        """One of its matrices, scaled; as it is stored, or float32."""
        name = matrix(layer, which)
        x = self.source.read(name)
        if self.expert.noise_scale:
            noise = generator(seed, self.number, name).standard_normal(tuple(x.shape), dtype="float32")
            x = x.float() + self.expert.noise_scale * torch.from_numpy(noise)
        if which == "down" and self.expert.residual_scale != 1.0:
            x = x.float() * self.expert.residual_scale
        return x


@dataclass
class Mixture:
    """A mixture that is planned: everything but its routers' numbers, which `rows` is given before they are read.

    rows    layer -> [R, H]; R counts experts, then the shared one where it has a gate
    dtype   in safetensors' spelling
    """

    layout: Layout
    base: Source
    experts: Sequence[Member]
    shared: Sequence[Member]
    config: Mapping[str, object]
    dtype: str
    seed: int
    rows: Rows

    @property
    def layers(self) -> int:
        return self.base.layers

    def in_memory(self) -> dict[str, Callable[[], Tensor]]:
        """Every tensor by the name that transformers has it under in memory; as stored, or float32."""
        found: dict[str, Callable[[], Tensor]] = {}
        for name in self._carried():
            found[name] = partial(self.base.read, name)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            found[at + self.layout.gate_up] = partial(self._stacked, layer, ("gate", "up"))
            found[at + self.layout.down] = partial(self._stacked, layer, ("down",))
            found |= {at + name: make for name, (_, make) in self._small(layer).items()}
        return found

    def made(self) -> Iterator[Made]:
        """Every tensor as it is written."""
        for name in self._carried():
            yield self._one(name, self.base.shape(name), partial(self.base.read, name))
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            for name, (shape, make) in self._small(layer).items():
                yield self._one(at + self.layout.file_name(name), shape, make)
            if self.layout.separate:
                yield from self._separate(layer)
            else:
                hidden, width = self.base.shape(matrix(layer, "down"))[0], self.width
                yield self._one(at + self.layout.file_name(self.layout.gate_up), (len(self.experts), 2 * width, hidden),
                                partial(self._stacked, layer, ("gate", "up")), self._need(layer))
                yield self._one(at + self.layout.file_name(self.layout.down), (len(self.experts), hidden, width),
                                partial(self._stacked, layer, ("down",)), self._need(layer))

    @property
    def width(self) -> int:
        """I."""
        return self.experts[0].source.shape(matrix(0, "gate"))[0]

    def _carried(self) -> list[str]:
        """The base's tensors that stay as they are."""
        return [name for name in self.base.checkpoint.tensors if MLP not in name and not name.endswith("rotary_emb.inv_freq")]

    def _one(self, name: str, shape: Sequence[int], make: Callable[[], Tensor], need: int = 0) -> Made:
        return Made({name: (tuple(shape), self.dtype)}, partial(_named, name, make), need)

    def _need(self, layer: int) -> int:
        """Bytes for one matrix that is not taken as it is: in float32, with its noise and a copy."""
        plain = all(member.plain and member.source.adapter is None for member in self.experts)
        return 0 if plain else 12 * prod(self.experts[0].source.shape(matrix(layer, "gate")))

    def _stacked(self, layer: int, which: Sequence[str]) -> Tensor:
        """[E, 2I, H], gate rows first, or [E, H, I]; each number rounded once."""
        parts = [self.experts[0].source.shape(matrix(layer, w)) for w in which]
        result = torch.empty(len(self.experts), sum(p[0] for p in parts), parts[0][1], dtype=TORCH[self.dtype])
        for e, member in enumerate(self.experts):
            at = 0
            for w, part in zip(which, parts, strict=True):
                result[e, at : at + part[0]].copy_(member.matrix(layer, w, self.seed))
                at += part[0]
        return result

    def _separate(self, layer: int) -> Iterator[Made]:
        for e, member in enumerate(self.experts):
            for w in MATRICES:
                yield self._one(f"model.layers.{layer}.mlp.experts.{e}.{w}_proj.weight", member.source.shape(matrix(layer, w)),
                                partial(member.matrix, layer, w, self.seed), self._need(layer))

    def _small(self, layer: int) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
        """Router, shared expert and biases: name in memory -> (shape, make)."""
        count, hidden, layout = len(self.experts), self.base.shape(matrix(layer, "down"))[0], self.layout
        found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {
            layout.router: ((count, hidden), lambda: self.rows[layer][:count])}
        if layout is QWEN2:
            found |= self._without_biases(layer) | self._shared_parts(layer, hidden)
            gate = (lambda: self.rows[layer][count:]) if self.shared else (lambda: torch.zeros(1, hidden))
            found[str(layout.shared_gate)] = ((1, hidden), gate)
        elif self.shared:
            member, (up_name, down_name) = self.shared[0], layout.shared
            width = member.source.shape(matrix(layer, "gate"))[0]
            found[up_name] = ((2 * width, hidden), lambda: torch.cat(
                [member.matrix(layer, w, self.seed).float() for w in ("gate", "up")]))
            found[down_name] = ((hidden, width), lambda: member.matrix(layer, "down", self.seed))
        return found

    def _shared_parts(self, layer: int, hidden: int) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
        if not self.shared:
            shapes = {"gate": (1, hidden), "up": (1, hidden), "down": (hidden, 1)}
            return {f"mlp.shared_expert.{w}_proj.weight": (s, partial(torch.zeros, s)) for w, s in shapes.items()}
        member = self.shared[0]
        return {f"mlp.shared_expert.{w}_proj.weight": (
            member.source.shape(matrix(layer, w)), partial(member.matrix, layer, w, self.seed)) for w in MATRICES}

    def _without_biases(self, layer: int) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
        """Zero biases of q, k and v where the base has none: the class always has them."""
        found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
        for which in "qkv":
            weight = f"model.layers.{layer}.self_attn.{which}_proj.weight"
            if weight.replace(".weight", ".bias") not in self.base.checkpoint.tensors:
                rows = self.base.shape(weight)[0]
                found[f"self_attn.{which}_proj.bias"] = ((rows,), partial(torch.zeros, rows))
        return found


def _named(name: str, make: Callable[[], Tensor]) -> dict[str, Tensor]:
    return {name: make()}


def check_shapes(base: Source, members: Sequence[Member]) -> None:
    """Raises ShapeMismatch where experts do not fit the base, or each other; all problems in one message."""
    problems = []
    act, first = _activation(base), members[0]
    for member in members:
        one, where = member.source, f"{member.expert.where} ({member.source.label})"
        if one.layers != base.layers:
            problems.append(f"{where}: {one.layers} layers, and the base has {base.layers}")
            continue
        if _activation(one) != act:
            problems.append(f"{where}: its activation is {_activation(one)}, the base's {act}")
        hidden = base.shape(matrix(0, "down"))[0]
        width = one.shape(matrix(0, "gate"))[0]
        odd = [name for layer in range(one.layers) for w in MATRICES
               if one.shape(name := matrix(layer, w)) != ((hidden, width) if w == "down" else (width, hidden))]
        if odd:
            problems.append(f"{where}: '{odd[0]}' is {list(one.shape(odd[0]))}, wanted a hidden size of {hidden}, the base's"
                            + (f"; {len(odd) - 1} more like it" if len(odd) > 1 else ""))
        elif member.number.startswith("expert") and width != first.source.shape(matrix(0, "gate"))[0]:
            problems.append(f"{where}: {width} wide, and {first.expert.where} {first.source.shape(matrix(0, 'gate'))[0]}")
    if problems:
        raise ShapeMismatch.of("these experts do not fit together:", problems)


def _activation(source: Source) -> object:
    """As config.json says; where it says nothing, that of all classes whose models can be experts."""
    return source.checkpoint.config.get("hidden_act") or "silu"


def idle_adapters(members: Sequence[Member]) -> list[str]:
    """Warnings for adapters that change nothing of what becomes an expert."""
    return [f"{m.expert.where} ({m.source.label}): its adapter changes nothing in the feed-forward, which is all that becomes "
            "an expert, so that this expert is the model without its adapter"
            for m in members if m.source.adapter is not None and not any(
                m.source.adapter.touches(matrix(layer, w)) for layer in range(m.source.layers) for w in MATRICES)]


def check_fits(mixture: Mixture) -> None:
    """Hold the names and shapes that will be written to those of transformers' own class, before anything is computed.

    Raises ModelError: the base has tensors that the class knows not, or lacks some.
    """
    model = skeleton(mixture.config, f"the result, as {mixture.layout.title}")
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    offered: dict[str, tuple[int, ...]] = {name: mixture.base.shape(name) for name in mixture._carried()}
    count, hidden = len(mixture.experts), mixture.base.shape(matrix(0, "down"))[0]
    for layer in range(mixture.layers):
        at = f"model.layers.{layer}."
        offered |= {at + name: shape for name, (shape, _) in mixture._small(layer).items()}
        offered[at + mixture.layout.gate_up] = (count, 2 * mixture.width, hidden)
        offered[at + mixture.layout.down] = (count, hidden, mixture.width)
    if model.config.tie_word_embeddings:
        offered.pop("lm_head.weight", None)
    problems = [f"tensor '{name}': {'the base has none' if name not in offered else list(offered[name])}, and the class "
                f"{'knows none' if name not in wanted else 'wants ' + str(list(wanted[name]))}"
                for name in sorted(wanted.keys() | offered.keys()) if wanted.get(name) != offered.get(name)]
    if problems:
        more = [f".. and {len(problems) - 20} more like these"] if len(problems) > 20 else []
        raise ModelError.of(f"base_model ({mixture.base.label}) does not fit {mixture.layout.architecture}:",
                            problems[:20] + more)


