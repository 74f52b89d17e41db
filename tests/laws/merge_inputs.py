"""Inputs that every merge method can be called with, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.merge import METHODS
from anabranch.merge.stack import Block

# What a method needs said beyond its defaults, or what makes it do something at all.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3}, "nearswap": {"t": 0.02}, "ties": {"density": 0.4}, "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5}, "della": {"density": 0.5}, "della_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1}, "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "sce": {"select_topk": 0.5}, "ties_global": {"density": 0.5},
}
# Other ways through the same methods.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, ARGUMENTS.get(name, {})) for name in sorted(METHODS)),
    ("linear", {"normalize": False}), ("nuslerp", {"flatten": False}), ("nuslerp", {"flatten": False, "row_wise": True}),
    ("ties", {"density": [0.2, 1.0, 0.0], "rescale": True, "scale": 1.5}), ("ties", {"density": 0.3, "normalize": False}),
    ("task_arithmetic", {"normalize": True, "scale": 0.7}), ("dare_linear", {"density": 0.3, "rescale": "l1"}),
    ("dare_ties", {"density": [0.3, 0.5, 1.0], "rescale": "none", "normalize": True}),
    ("della", {"density": [0.3, 1.0, 0.0], "rescale": "l1", "epsilon": 0.1}),
    ("della_linear", {"density": 0.5, "rescale": "none"}),
    ("breadcrumbs", {"density": [0.6, 0.2, 1.0], "gamma": 0.3, "rescale": True, "normalize": True}),
    ("sce", {"select_topk": 1.0, "floor": 1e-6}), ("sce", {"select_topk": 0.0}),
    ("model_stock", {"filter_wise": True}), ("model_stock", {"clamp": False, "floor": 1e-6}),
    ("multislerp", {"normalize": False}),
]


def names_of(variant: tuple[str, dict[str, Any]]) -> str:
    return variant[0] + "".join(f"-{key}={value}" for key, value in variant[1].items())


def branches_for(name: str, k: int = 3) -> int:
    """`k`, or the nearest number of branches that the method merges."""
    least, most = METHODS[name].branches
    return int(max(least, min(most, k)))


def inputs(name: str, shape: tuple[int, ...] = (5, 3), k: int = 3, seed: int = 0) -> dict[str, Any]:
    """Every input of INPUTS, random: branches a tenth away from the base."""
    k = branches_for(name, k)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    branches = base + 0.1 * torch.randn((k, *shape), generator=generator)
    weights = torch.rand(k, generator=generator) + 0.1
    return {"branches": branches, "base": base, "weights": weights / weights.sum(),
            "draws": torch.rand((k, *shape), generator=generator),
            "fisher": torch.rand((k, *shape), generator=generator), "cuts": torch.full((k,), 0.07), "depth": 0.25}


def call(name: str, given: dict[str, Any], **arguments: Any) -> Tensor:
    method = METHODS[name]
    return method.function(*(given[i] for i in method.inputs), **(ARGUMENTS.get(name, {}) | arguments))


def per_branch(arguments: dict[str, Any], k: int) -> dict[str, Any]:
    return {key: value[:k] if isinstance(value, list) else value for key, value in arguments.items()}


@dataclass
class CutStack:
    """A stack that hands out blocks ending at `ends`, in buffers that the next block overwrites, as the engine does."""

    given: dict[str, Any]
    takes: Sequence[str]
    kind: str
    ends: list[int]

    @property
    def k(self) -> int:
        return len(self.given["branches"])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.given["branches"].shape[1:])

    @property
    def numel(self) -> int:
        return self.given["branches"][0].numel()

    @property
    def has_base(self) -> bool:
        return "base" in self.takes

    def __iter__(self) -> Iterator[Block]:
        columns = max((self.shape or (1,))[-1], 1)
        longest = max(b - a for a, b in zip([0, *self.ends], self.ends, strict=False))
        buffers = {name: torch.empty(self.given[name].numel() // self.numel * longest)
                   for name in ("branches", "base", "draws", "fisher") if name in self.takes}
        for start, stop in zip([0, *self.ends], self.ends, strict=False):
            parts = {}
            for name, buffer in buffers.items():
                lead = () if name == "base" else (self.k,)
                source = self.given[name].reshape(*lead, self.numel)[..., start:stop]
                inner = ((stop - start,) if self.kind == "entry" else
                         ((stop - start) // columns, columns) if self.kind == "row" else self.shape)
                part = buffer[: source.numel()].view(*lead, *inner)
                part.copy_(source.reshape(part.shape))
                parts[name] = part
            yield Block(start, parts["branches"], parts.get("base"), parts.get("draws"), parts.get("fisher"))
        for buffer in buffers.values():
            buffer.fill_(float("nan"))
