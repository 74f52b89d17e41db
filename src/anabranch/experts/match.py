"""Two mixtures with the same experts in another order: put one in the order of the other, so that they can be merged.

    s_ab = <W_a, W_b> / (||W_a|| ||W_b||), W_e all matrices of expert e of one layer      pi = argmax sum_a s_{a, pi(a)}

The assignment is found exactly (Hungarian algorithm), layer by layer. Router rows (and biases of the choice) move with their
experts, so the model computes the same function as before. Neurons within an expert stay where they are.

Per-expert files (`experts.3.w1.weight`, `experts.3.gate_proj.weight`) and fused ones (`experts.gate_up_proj`, GraniteMoe's
`input_linear`) are both read; the two models must have the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.artifacts import MergeManifest
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.fetch import quantisation, resolve
from anabranch.engine.making import Made, Read, copied, forecast_made, make_model
from anabranch.engine.prepare import converted_weights
from anabranch.engine.stream import Progress
from anabranch.errors import ModelError, ShapeMismatch
from anabranch.surgery.side_files import carry_tokenizer

LAYER = r"(?P<at>.+?\.(?P<layer>\d+)\.)"
SEPARATE = re.compile(LAYER + r"(?P<block>.*?)experts\.(?P<expert>\d+)\.(?P<rest>.+)$")
FUSED = re.compile(LAYER + r"(?P<block>.*?)(?:experts\.[^.]+|input_linear\.weight|output_linear\.weight)$")
# .. and what is added to each expert's score beside it: `mlp.expert_bias`, `mlp.e_score_correction_bias`
ROUTER = re.compile(LAYER + r"(?P<block>.*?)(?:(?:gate|router|router\.layer)\.(?:weight|bias|e_score_correction_bias)"
                    r"|e_score_correction_bias|expert_bias)$")
SHARED = re.compile(r"shared_(?:experts?|mlp)")
CHUNK = 1 << 22


@dataclass(frozen=True)
class Block:
    """The experts of one layer: by name, what stands for all of them in one tensor, and what for each in its own.

    stacked    names whose first dimension counts experts; routers are among them
    weighed    those of them that are weights of experts
    separate   expert -> rest of the name -> name
    """

    count: int
    stacked: tuple[str, ...]
    weighed: tuple[str, ...]
    separate: Mapping[int, Mapping[str, str]]

    def parts(self, checkpoint: Checkpoint, expert: int) -> list[tuple[str, Callable[[], Tensor]]]:
        """An expert's matrices, flattened, by what they are."""
        found: list[tuple[str, Callable[[], Tensor]]] = [
            (name, partial(_one_of, checkpoint, name, expert)) for name in self.weighed]
        return found + [(rest, partial(_one_of, checkpoint, name, None))
                        for rest, name in sorted(self.separate.get(expert, {}).items())]


def _one_of(checkpoint: Checkpoint, name: str, expert: int | None) -> Tensor:
    whole = checkpoint.read(name)
    return (whole if expert is None else whole[expert]).reshape(-1)


def _in_order(checkpoint: Checkpoint, name: str, order: Tensor) -> dict[str, Tensor]:
    return {name: checkpoint.read(name)[order]}


def blocks_of(checkpoint: Checkpoint, label: str) -> dict[str, Block]:
    """The experts of each layer, by the start of their names ('model.layers.3.').

    Raises ModelError: there are none; experts whose numbers have gaps, or that have not all the same tensors; tensors beside
    them that may count experts and are not known to; or a router that chooses by groups of experts.
    """
    separate: dict[str, dict[int, dict[str, str]]] = {}
    fused: dict[str, list[str]] = {}
    routers: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        if SHARED.search(name):
            continue
        if found := SEPARATE.match(name):
            separate.setdefault(found["at"], {}).setdefault(int(found["expert"]), {})[found["rest"]] = name
        elif found := FUSED.match(name):
            fused.setdefault(found["at"], []).append(name)
        elif found := ROUTER.match(name):
            routers.setdefault(found["at"], []).append(name)
    blocks: dict[str, Block] = {}
    problems = []
    for at in sorted(separate.keys() | fused.keys()):
        own = separate.get(at, {})
        counts = {checkpoint.tensors[name].shape[0] for name in (*fused.get(at, ()), *routers.get(at, ()))} | (
            {len(own)} if own else set())
        routed = any(name.endswith("weight") for name in routers.get(at, ()))
        if len(counts) != 1 or (own and sorted(own) != list(range(len(own)))) or not routed:
            problems.append(f"{at}*: experts, and a router with a row for each, were not found (counts: {sorted(counts)})")
            continue
        shapes = [{rest: checkpoint.tensors[name].shape for rest, name in names.items()} for names in own.values()]
        if any(one != shapes[0] for one in shapes):
            problems.append(f"{at}*: its experts have not all the same tensors, of the same shapes")
            continue
        blocks[at] = Block(counts.pop(), (*fused.get(at, ()), *routers[at]), tuple(sorted(fused.get(at, ()))), own)
        problems += _unknown(checkpoint, at, blocks[at])
    if not blocks and not problems:
        problems.append("has no experts: no tensor is named like `..layers.0.mlp.experts..`")
    if int(checkpoint.config.get("n_group") or 1) > 1:
        problems.append(f"its router chooses among {checkpoint.config['n_group']} groups of experts, so that experts cannot "
                        "change places freely")
    if problems:
        raise ModelError.of(f"model {label}:", problems[:20])
    return dict(sorted(blocks.items(), key=lambda item: [int(n) for n in re.findall(r"\d+", item[0])]))


def _unknown(checkpoint: Checkpoint, at: str, block: Block) -> list[str]:
    """Tensors beside the experts with a dimension that may count them, which would have to move with them."""
    known = {*block.stacked, *(name for names in block.separate.values() for name in names.values())}
    beside = {found["block"] for name in known if (found := SEPARATE.match(name) or FUSED.match(name)) and found["block"]}
    return [f"tensor '{name}' {list(info.shape)}: may have a number for each of the {block.count} experts, and is not known"
            for name, info in checkpoint.tensors.items() if name not in known and not SHARED.search(name)
            and name.startswith(tuple(at + one for one in beside)) and block.count in info.shape]


def similarities(first: tuple[Checkpoint, Block], second: tuple[Checkpoint, Block]) -> np.ndarray:
    """Cosines of all weights of each expert of the one with each of the other: float64 [E, E]."""
    count = first[1].count
    product, own, other = np.zeros((count, count)), np.zeros(count), np.zeros(count)
    parts = [[one[1].parts(one[0], e) for e in range(count)] for one in (first, second)]
    for which in range(len(parts[0][0])):
        left, right = ([one[which][1]() for one in side] for side in parts)
        for start in range(0, len(left[0]), max(1, CHUNK // count)):
            stop = start + max(1, CHUNK // count)
            a, b = (torch.stack([x[start:stop].double() for x in side]) for side in (left, right))
            product += (a @ b.T).numpy()
            own += (a * a).sum(1).numpy()
            other += (b * b).sum(1).numpy()
    return product / np.maximum(np.sqrt(np.outer(own, other)), 1e-300)


def assignment(similarity: np.ndarray) -> list[int]:
    """For each expert of the first model, which of the second is its like: the permutation of greatest total similarity."""
    from scipy.optimize import linear_sum_assignment

    return [int(i) for i in linear_sum_assignment(similarity, maximize=True)[1]]


def match_experts(reference: str, model: str, out: Path | str, *, dry_run: bool = False, allow_pickle: bool = False,
                  max_shard_size: str | int = "5GB", threads: int | None = None, memory: str | int | None = None,
                  progress: Callable[[Progress], None] | None = None) -> tuple[MergeManifest | None, dict[str, Any], list[str]]:
    """Write `model` with its experts in the order of `reference`'s.

    Returns:
        the manifest (None for a dry run); per layer the permutation and the mean similarity before and after; the lines of a
        dry run.
    Raises:
        ModelError, ShapeMismatch: not both mixtures of experts with the same layers, numbers and shapes of them; see
            `blocks_of`; or numbers that are not finite.
    """
    opened = [_open(one, allow_pickle) for one in (reference, model)]
    blocks = [blocks_of(checkpoint, label) for checkpoint, label in zip(opened, (reference, model), strict=True)]
    _check_alike(opened, blocks, (reference, model))
    orders, report = {}, []
    for at in blocks[0]:
        similarity = similarities((opened[0], blocks[0][at]), (opened[1], blocks[1][at]))
        if not np.isfinite(similarity).all():
            raise ModelError(f"{at}*: experts hold NaN or infinity in {reference} or {model}, so they cannot be compared.")
        orders[at] = order = assignment(similarity)
        report.append({"layer": at.rstrip("."), "order": order, "moved": sum(i != e for i, e in enumerate(order)),
                       "similarity_before": round(float(np.trace(similarity)) / len(order), 6),
                       "similarity_after": round(float(similarity[np.arange(len(order)), order].mean()), 6)})
    made = list(_reordered(opened[1], blocks[1], orders))
    files = carry_tokenizer(opened[1].folder) | {"config.json": opened[1].folder / "config.json"}
    inputs = [Read(f"reference: {reference}", opened[0]), Read(f"model: {model}", opened[1])]
    figures = {"layers": report}
    if dry_run:
        return None, figures, forecast_made(out, made, files, inputs, max_shard_size=max_shard_size, threads=threads,
                                            memory=memory)
    manifest = make_model(out, made, files, inputs, verb="experts match", settings={}, report=figures,
                          max_shard_size=max_shard_size, threads=threads, memory=memory, allow_nonfinite=True,
                          progress=progress)
    return manifest, figures, []


def _open(reference: str, allow_pickle: bool) -> Checkpoint:
    checkpoint = Checkpoint.open(resolve(reference, converted=converted_weights() if allow_pickle else None))
    if (packed := quantisation(checkpoint)) is not None:
        raise ModelError(f"model {reference}: its weights are quantised ({packed}). Give the model as it was before.")
    return checkpoint


def _check_alike(opened: Sequence[Checkpoint], blocks: Sequence[Mapping[str, Block]], labels: Sequence[str]) -> None:
    problems = [f"{at}*: experts in only one of them" for at in sorted(blocks[0].keys() ^ blocks[1].keys())]
    for at in blocks[0].keys() & blocks[1].keys():
        one, other = blocks[0][at], blocks[1][at]
        if one.count != other.count:
            problems.append(f"{at}*: {one.count} experts, and {other.count}")
            continue
        names = set(one.stacked) | {n for e in one.separate.values() for n in e.values()}
        odd = names ^ (set(other.stacked) | {n for e in other.separate.values() for n in e.values()})
        odd |= {n for n in names - odd if opened[0].tensors[n].shape != opened[1].tensors[n].shape}
        problems += [f"tensor '{min(odd)}': not in both, or of another shape ({len(odd)} like this)"] if odd else []
    if problems:
        raise ShapeMismatch.of(f"{labels[0]} and {labels[1]} are not two mixtures of the same kind:", sorted(problems)[:20])


def _reordered(checkpoint: Checkpoint, blocks: Mapping[str, Block], orders: Mapping[str, Sequence[int]]) -> list[Made]:
    """Every tensor of the model: those of experts from where the order says, all others as they are."""
    made, done = [], set()
    for at, block in blocks.items():
        order = torch.tensor(orders[at])
        for name in block.stacked:
            info = checkpoint.tensors[name]
            made.append(Made({name: (info.shape, info.dtype)},
                             partial(_in_order, checkpoint, name, order)))
            done.add(name)
        for expert, names in block.separate.items():
            for rest, name in names.items():
                made.append(copied(checkpoint, block.separate[int(order[expert])][rest], as_name=name))
                done.add(name)
    return made + [copied(checkpoint, name) for name in checkpoint.tensors if name not in done]
