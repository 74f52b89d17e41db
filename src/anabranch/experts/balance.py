"""How a router spreads tokens over experts.

    E experts    k chosen per token    s_e share of the choices that fall on e, summing to 1

    shares        s_e, per layer
    entropy       -sum s_e ln s_e / ln E: 1 where all experts are used alike, 0 where one takes all
    max_load      E * max s_e: 1 where all are used alike; E / k where the same k take all
    own           for texts of expert e: the share of tokens that are sent to e, first or among the k; k / E by chance

Choices are those that transformers' own router makes for real tokens; there is no padding.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROUTERS = ("mlp.gate", "block_sparse_moe.router")  # of the classes in `layouts`


@dataclass
class Tally:
    """Choices seen so far: layer -> int64 [texts' owners + 1, E]; the last row is of texts without an owner."""

    experts: int
    owners: int
    counts: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)
    chosen: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, layer: int, owner: int | None, choices: Tensor) -> None:
        """`choices`: expert numbers [T, k]."""
        row = self.owners if owner is None else owner
        counted = torch.bincount(choices.reshape(-1), minlength=self.experts)
        with self._lock:
            self.chosen = choices.shape[-1]
            table = self.counts.setdefault(layer, torch.zeros(self.owners + 1, self.experts, dtype=torch.int64))
            table[row] += counted
            self.tokens.setdefault(layer, torch.zeros(self.owners + 1, dtype=torch.int64))[row] += choices.shape[0]

    def report(self) -> dict[str, Any]:
        """As JSON: per layer, and means over layers."""
        layers: list[dict[str, Any]] = []
        for layer in sorted(self.counts):
            table, tokens = self.counts[layer], self.tokens[layer]
            shares = table.sum(0).double() / table.sum()
            own = [float(table[e, e] / tokens[e]) for e in range(min(self.owners, self.experts)) if tokens[e]]
            layers.append({"layer": layer, "shares": [round(float(s), 4) for s in shares],
                           "entropy": round(entropy(shares), 4), "max_load": round(float(shares.max()) * self.experts, 4),
                           **({"own": round(sum(own) / len(own), 4)} if own else {})})
        if not layers:
            return {}
        keys = [key for key in ("entropy", "max_load", "own") if key in layers[0]]
        return {"tokens": int(next(iter(self.tokens.values())).sum()), "experts": self.experts, "per_token": self.chosen,
                "mean": {key: round(sum(one[key] for one in layers) / len(layers), 4) for key in keys}, "layers": layers}


def entropy(shares: Tensor) -> float:
    """Of shares [E] that sum to one, as a part of ln E; in [0, 1]. 1 for a single expert."""
    if len(shares) < 2:
        return 1.0
    used = shares[shares > 0]
    return max(0.0, float(-(used * used.log()).sum())) / math.log(len(shares))


def choices_of(output: Any) -> Tensor:
    """The expert numbers [T, k] in what a router of transformers gives."""
    for part in output if isinstance(output, tuple) else (output,):
        if isinstance(part, Tensor) and not part.is_floating_point():
            return part.reshape(-1, part.shape[-1])
    raise TypeError("a router that gives no choices")


def routers_of(model: Any) -> dict[int, Any]:
    """The router modules of a loaded model: layer -> module. Empty for a dense model."""
    found = {}
    for number, layer in enumerate(getattr(getattr(model, "model", model), "layers", [])):
        modules = dict(layer.named_modules())
        for name in ROUTERS:
            if name in modules and hasattr(modules[name], "weight"):
                found[number] = modules[name]
                break
    return found


def words(label: str, report: Mapping[str, Any]) -> list[str]:
    """A report for a person."""
    if not report:
        return []
    mean = report["mean"]
    own = f", own expert {mean['own']:.2f}" if "own" in mean else ""
    lines = [f"{label}: {report['tokens']:,} tokens, {report['per_token']} of {report['experts']} experts; mean entropy "
             f"{mean['entropy']:.2f}, max load {mean['max_load']:.2f}{own}"]
    return lines + [f"  layer {one['layer']}: " + " ".join(f"{share:.2f}" for share in one["shares"])
                    + f"  entropy {one['entropy']:.2f}, max load {one['max_load']:.2f}"
                    + (f", own {one['own']:.2f}" if "own" in one else "") for one in report["layers"]]
