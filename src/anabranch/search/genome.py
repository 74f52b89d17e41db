"""The peer's genome (mergekit-evolve): an array of genes, and the merge config that it stands for.

    G   groups of `layer_granularity` layers (one, if that is 0)      n   models
    F   filters + 1; the last set is for tensors that no filter fits  P   genes of a set: [weight], [weight, density], or [t]

A genotype is [G, n, F, P], flattened row by row. Merge specification, 7.7. Where we differ: a base_model beside linear's
models is listed with weight 0 (the peer leaves it without one, and fails); a base that a slice does not list is left to the
engine, which adds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.errors import RecipeError
from anabranch.rows import generator
from anabranch.search.settings import GenomeSetting
from anabranch.search.space import Dimension, Value, Vector

GENES = {"linear": ("weight",), "task_arithmetic": ("weight",), "ties": ("weight", "density"),
         "dare_ties": ("weight", "density"), "slerp": ("t",)}
NORMALIZED = ("ties", "dare_ties", "linear")


@dataclass(frozen=True)
class GenomeSpace:
    """`layers`: of the models. `seed`: of a random beginning; None begins at the uniform merge."""

    genome: GenomeSetting
    layers: int
    seed: int | None = None

    @property
    def bounded(self) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[G, n, F, P]"""
        size = self.genome.layer_granularity
        return (self.layers // size if size else 1, len(self.genome.models), len(self.genome.filters or []) + 1,
                len(GENES[self.genome.merge_method]))

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Where random search and optuna draw genes: from 0 to 1, weights from -1 if they may be negative."""
        genes = GENES[self.genome.merge_method]
        rest = "rest"
        while rest in (self.genome.filters or []):  # names of dimensions must differ
            rest = f"({rest})"
        sets = [*(self.genome.filters or []), rest]
        found = []
        for g, m, f, p in np.ndindex(self.shape):
            low = -1.0 if self.genome.allow_negative_weights and genes[p] == "weight" else 0.0
            place = "/".join([*([f"group {g}"] if self.shape[0] > 1 else []), f"model {m}",
                              *([sets[f]] if len(sets) > 1 else []), genes[p]])
            found.append(Dimension(place, low, 1.0))
        return tuple(found)

    @property
    def start(self) -> list[float]:
        if self.seed is not None:
            return generator(self.seed, "search", "genome").random(math.prod(self.shape)).tolist()
        genes = np.ones(self.shape)
        genes[..., 0] = 1 / len(self.genome.models)
        return genes.reshape(-1).tolist()

    @property
    def first(self) -> Vector:
        return self.vector(self.start)

    def vector(self, z: Sequence[float]) -> Vector:
        return [float(value) for value in z]

    def config(self, vector: Sequence[Value]) -> dict[str, Any]:
        return decode(self.genome, np.array(vector, dtype=np.float64).reshape(self.shape), self.layers)


def genome_space(genome: GenomeSetting, layers: int, seed: int | None = None) -> GenomeSpace:
    """Raises RecipeError where the granularity does not divide the depth."""
    if genome.layer_granularity and layers % genome.layer_granularity:
        divisors = [str(d) for d in range(1, layers + 1) if layers % d == 0]
        raise RecipeError(f"genome.layer_granularity: {genome.layer_granularity} does not divide the {layers} layers of the "
                          f"models. Wanted one of {', '.join(divisors)}, or 0 for one group.")
    return GenomeSpace(genome, layers, seed)


def decode(genome: GenomeSetting, genes: np.ndarray, layers: int) -> dict[str, Any]:
    """The merge config of a genotype, float [G, n, F, P]."""
    method = genome.merge_method
    normalize = genome.normalize if genome.normalize is not None else method in NORMALIZED
    config: dict[str, Any] = {"merge_method": method}
    if genome.base_model is not None:
        config["base_model"] = genome.base_model
    if genome.tokenizer_source is not None:
        config["tokenizer_source"] = genome.tokenizer_source
    config |= {"dtype": "bfloat16"}
    if method != "slerp":
        config["parameters"] = {"normalize": normalize, **({"int8_mask": True} if method != "linear" else {})}
    if genome.smooth:
        config["models"] = _models(genome, genes)
        return config
    size = genome.layer_granularity or layers
    ranges = [[g * size, (g + 1) * size] for g in range(len(genes))]
    make = _slerp_slice if method == "slerp" else _slice
    config["slices"] = [make(genome, genes[g], span) for g, span in enumerate(ranges)]
    return config


def _value(genome: GenomeSetting, gene: str, x: float) -> float:
    if gene == "density":
        return min(abs(float(x)), 1.0)
    return float(x) if genome.allow_negative_weights else abs(float(x))


def _settings(genome: GenomeSetting, genes: np.ndarray) -> dict[str, Any]:
    """Parameters of a model from its genes, [groups, F, P]: gradients, where there are several groups."""
    found: dict[str, Any] = {}
    for p, gene in enumerate(GENES[genome.merge_method]):
        values = [[_value(genome, gene, x) for x in genes[:, f, p]] for f in range(genes.shape[1])]
        shown = [v if len(v) > 1 else v[0] for v in values]
        if genome.filters:
            found[gene] = [*({"filter": name, "value": v} for name, v in zip(genome.filters, shown, strict=False)),
                           {"value": shown[-1]}]
        else:
            found[gene] = shown[0]
    return found


def _beside(genome: GenomeSetting) -> bool:
    """Whether linear has a base_model that is none of its models."""
    return genome.merge_method == "linear" and genome.base_model is not None and genome.base_model not in genome.models


def _models(genome: GenomeSetting, genes: np.ndarray) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [{"model": model, "parameters": _settings(genome, genes[:, m])}
                                    for m, model in enumerate(genome.models)]
    return listed + ([{"model": genome.base_model, "parameters": {"weight": 0.0}}] if _beside(genome) else [])


def _slice(genome: GenomeSetting, genes: np.ndarray, span: list[int]) -> dict[str, Any]:
    return {"sources": [one | {"layer_range": list(span)} for one in _models(genome, genes[None])]}


def _slerp_slice(genome: GenomeSetting, genes: np.ndarray, span: list[int]) -> dict[str, Any]:
    """The two models with the largest genes; the larger is the base, t the other's softmax share (of equal genes the one
    listed first counts as larger)."""
    x = genes[:, 0, 0]
    first, second = np.argsort(-x, kind="stable")[:2]
    share = math.exp(float(x[second] - x[first]))  # at most 1: never too large, however far apart the genes are
    t = share / (1 + share)
    return {"sources": [{"model": genome.models[i], "layer_range": list(span)} for i in (first, second)],
            "base_model": genome.models[first], "parameters": {"t": t}}
