"""A config that takes each layer of a model from one of several, by lot.

    in place      layer i of the result is layer i of a model drawn with the weights as chances; neighbours of one model
                  become one slice
    full random   of each model int(weight * its layers) layers, each drawn from all of its layers, then all shuffled

The peer's mergekit-layershuffle (merge specification, 7.8), which cannot run any more, drew full random layers from the
first int(weight * layers) only, and from a generator that no seed reached. Here the seed decides, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anabranch.errors import RecipeError, ShapeMismatch
from anabranch.rows import generator

MOST = 10_000  # layers that full random takes; far beyond what any model has


def shuffled_config(models: Sequence[str], layers: Sequence[int], weights: Sequence[float], *, full_random: bool = False,
                    seed: int = 0, dtype: str | None = None) -> dict[str, Any]:
    """A `passthrough` config of slices.

    Args:
        models: k names, as a config says them.
        layers: k numbers of layers.
        weights: k numbers >= 0. In place: chances, in proportion. Full random: the share of each model's layers.
    Raises:
        RecipeError: not one weight for each model, a weight that is none, or none above zero; no layer at all, or too many.
        ShapeMismatch: models of different depth, in place.
    """
    _check(models, weights)
    if full_random and math.fsum(min(weight, MOST) * count for weight, count in zip(weights, layers, strict=True)) > MOST:
        raise RecipeError(f"shuffle: with these weights more than {MOST:,} layers would be taken. With --full-random a weight "
                          "is the share of a model's layers: 0.5 takes half as many as it has.")
    draw = generator(seed, "shuffle", "full" if full_random else "in place")
    if full_random:
        picked = [(k, int(layer)) for k, (count, weight) in enumerate(zip(layers, weights, strict=True))
                  for layer in draw.integers(0, count, size=int(count * weight))]
        picked = [picked[i] for i in draw.permutation(len(picked))]
        if not picked:
            raise RecipeError("shuffle: with these weights no layer is taken of any model. With --full-random a weight is the "
                              "share of a model's layers: 0.5 takes half as many as it has.")
    else:
        if len(set(layers)) > 1:
            raise ShapeMismatch("shuffle: layer i of the result is layer i of one of the models, so they must have as many "
                                "layers; " + ", ".join(f"{m} has {n}" for m, n in zip(models, layers, strict=True))
                                + ". --full-random takes layers from anywhere.")
        shares = [weight / max(weights) for weight in weights]
        chances = [share / math.fsum(shares) for share in shares]
        picked = [(int(draw.choice(len(models), p=chances)), layer) for layer in range(layers[0])]
    slices = [{"sources": [{"model": models[k], "layer_range": [start, stop]}]} for k, start, stop in _joined(picked)]
    return {"merge_method": "passthrough", "slices": slices, **({"dtype": dtype} if dtype is not None else {})}


def _check(models: Sequence[str], weights: Sequence[float]) -> None:
    problems = [] if models else ["no model is given: -m MODEL, once for each"]
    if len(models) != len(weights):
        problems.append(f"{len(models)} models (-m) and {len(weights)} weights (-w), wanted one weight for each model")
    problems += [f"weight {weight}: wanted a number from 0 on" for weight in weights
                 if not (math.isfinite(weight) and weight >= 0)]
    if not problems and not any(weights):
        problems.append("all weights are 0, and one must be more")
    if problems:
        raise RecipeError.of("shuffle:", problems)


def _joined(picked: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Runs of layers that follow each other in one model: (model, first, after the last)."""
    runs: list[tuple[int, int, int]] = []
    for k, layer in picked:
        if runs and runs[-1][0] == k and runs[-1][2] == layer:
            runs[-1] = (k, runs[-1][1], layer + 1)
        else:
            runs.append((k, layer, layer + 1))
    return runs
