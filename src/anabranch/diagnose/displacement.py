"""How far models moved from the base, where, and in which directions. Pure: sums over tensors, one tensor at a time.

    M  models      tau_m = model_m - base, a task vector
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from anabranch.diagnose.artifacts import ContractionCheck

Floats = NDArray[np.float64]
BLOCK = 1 << 20  # numbers of every model that stand in float64 at a time

# Part of a parameter's name -> what kind of module it belongs to; the first that fits.
# Norms are told by the module that holds the tensor (DBRX keeps attention in `norm_attn_norm`), and what is within a layer
# before the head: `output` is the head's name in some models and a projection's in others.
KINDS = (("norm", r"norm[^.]*(\.[^.]*)?$|(^|[._])ln(\d|_[^.]*)?\.[^.]*$"), ("attention", r"attn|[Aa]ttention"),
         ("mlp", r"mlp|ffn|feed_?forward|experts|(^|[._])moe\b|\bfc\d"),
         ("head", r"(^|\.)(lm_head|embed_out|output_layer)\.|^(model\.|transformer\.)?(output|head)\."),
         ("embedding", r"embed|\bwte\b|\bwpe\b"))


def layer_of(name: str) -> str:
    """The language model's layer by number ('0', '1', ..), or for parameters outside of it the module they belong to; of what
    looks at images or listens, whose layers have numbers of their own, all layers together."""
    found = re.search(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.", f".{name}")
    if found is None:
        return name.rsplit(".", 1)[0]
    stack = f".{name}"[1 : found.start()]
    return stack if re.search("vision|visual|image|audio", stack) else found[1]


def kind_of(name: str) -> str:
    """attention, mlp, norm, embedding, head or other, by the parameter's name."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


@dataclass
class Moments:
    """Gram matrices of the task vectors, summed tensor by tensor in float64.

    `gram` [M, M]: over everything; `layers`, `kinds`: squared norms [M] by layer and by kind of module; with branches and
    weights also the terms of the contraction, each from its own differences rather than from the Gram matrix. `rounding`:
    relative spacing of numbers in the merged model's dtype; `is_mean`: it is the branches' mean, rounded, at every entry.
    """

    models: int
    branches: Sequence[int] = ()
    weights: Sequence[float] = ()
    rounding: float = 0.0
    gram: Floats = field(init=False)
    base: float = 0.0
    parameters: int = 0
    layers: dict[str, Floats] = field(default_factory=dict)
    kinds: dict[str, Floats] = field(default_factory=dict)
    mean_square: float = 0.0
    spread: float = 0.0
    is_mean: bool = True

    def __post_init__(self) -> None:
        self.gram = np.zeros((self.models, self.models))

    def add(self, name: str, base: Float[Tensor, " n"], models: Sequence[Float[Tensor, " n"]], merged: int | None) -> None:
        """One tensor: the base's and every model's numbers, flat. `merged`: which model is the merged one."""
        self.parameters += base.numel()
        squares = np.zeros(self.models)
        for start in range(0, base.numel(), BLOCK):
            origin = base[start : start + BLOCK].double()
            moved = torch.stack([m[start : start + BLOCK].double() - origin for m in models]).numpy()
            self.base += float(origin @ origin)
            self.gram += moved @ moved.T
            squares += np.einsum("mn,mn->m", moved, moved)
            if self.branches:
                own = moved[list(self.branches)]
                mean = np.asarray(self.weights) @ own
                self.mean_square += float(mean @ mean)
                self.spread += float(np.asarray(self.weights) @ np.square(own - mean).sum(axis=1))
                if merged is not None:
                    # half a spacing of its dtype, and a few of float32 of the terms, in which the sum was formed
                    terms = np.abs(origin.numpy()) + np.abs(own).max(axis=0)
                    limit = 0.51 * self.rounding * np.abs(mean + origin.numpy()) + 4e-7 * terms
                    self.is_mean &= bool((np.abs(moved[merged] - mean) <= limit).all())
        self.layers[layer_of(name)] = self.layers.get(layer_of(name), np.zeros(self.models)) + squares
        self.kinds[kind_of(name)] = self.kinds.get(kind_of(name), np.zeros(self.models)) + squares

    @property
    def norms(self) -> Floats:
        """[M], L2 norms of the task vectors."""
        found: Floats = np.sqrt(np.diag(self.gram))
        return found

    @property
    def cosines(self) -> Floats:
        """[M, M]; 0 against a model that did not move."""
        norms = np.where(self.norms > 0, self.norms, 1.0)
        found: Floats = np.clip(self.gram / np.outer(norms, norms), -1.0, 1.0)
        return found

    def contraction(self, merged: int | None) -> ContractionCheck:
        """Eq. 11 (arXiv 2606.01717) with the merge's weights in place of 1/K, which holds for any weights of sum 1."""
        squares = np.diag(self.gram)
        branches = float(np.asarray(self.weights) @ squares[list(self.branches)])
        error = abs(branches - self.mean_square - self.spread) / branches if branches else 0.0
        return ContractionCheck(branches=branches, merged=self.mean_square, spread=self.spread, error=error,
                                merged_from_file=None if merged is None else float(squares[merged]),
                                is_average=None if merged is None else self.is_mean)
