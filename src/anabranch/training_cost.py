"""What training takes, by arithmetic: operations, memory and hours of a branch on a device. Pure.

    N   parameters of a part of the model       P   positions that the part is applied to: tokens, image tokens or patches

A part costs 2 N P operations forward, 2 N P for the gradients of its weights where they train, and 2 N P to pass gradients on
where it, or a part before it, trains (the usual 6 N per token of a language model, arXiv:2001.08361, sec. 2.1, by its terms);
recomputing activations adds a forward pass where gradients pass. Attention's products of activations, and moving data, are
left out: both are among the reasons why a device reaches a share of its peak only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.families import FAMILIES, LANGUAGE, PROJECTOR, VISION, not_trained
from anabranch.recipe import Model as ModelSection

SHARE = 0.4  # of a device's peak: assumed, and told
ORDER = (VISION, PROJECTOR, LANGUAGE)


@dataclass(frozen=True)
class Device:
    """memory: bytes of 10^9. bfloat16, float32: dense peak, 10^12 operations a second, of the makers' data sheets; a device
    without bfloat16 units has none."""

    name: str
    memory: int
    bfloat16: float | None
    float32: float


DEVICES = (Device("H200 141 GB", 141, 989, 67), Device("H100 80 GB", 80, 989, 67), Device("A100 80 GB", 80, 312, 19.5),
           Device("A100 40 GB", 40, 312, 19.5), Device("L40S 48 GB", 48, 362, 91.6), Device("RTX 4090 24 GB", 24, 165, 82.6),
           Device("V100 32 GB", 32, None, 15.7))


@dataclass(frozen=True)
class PartSize:
    """One part of a model. trained: of its parameters, those whose weights get gradients."""

    name: str
    parameters: int
    trained: int


@dataclass(frozen=True)
class ModelSize:
    """parts: in the order that data passes them. patches: that the vision tower sees per image token. layers, hidden, inner,
    key_value: of the language model, for its activations; vision_hidden, vision_inner: of each of the tower's vision_layers."""

    parts: tuple[PartSize, ...]
    patches: int
    layers: int
    hidden: int
    inner: int
    key_value: int
    vision_hidden: int
    vision_inner: int
    vision_layers: int
    adapters: bool

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)


def size_of(model: Any, section: ModelSection) -> ModelSize:
    """Of a model without its numbers (`families.skeleton`). A family whose parts are not known is taken for a language model.

    Raises:
        ModelError: a part to freeze is not there, or nothing is left to train.
    """
    still = not_trained(model, section)
    patterns = FAMILIES.get(str(getattr(model.config, "model_type", "")), {})
    counts = {name: [0, 0] for name in ORDER}
    for name, parameter in model.named_parameters():
        part = next((p for p in (VISION, PROJECTOR) for x in patterns.get(p, ()) if fnmatch.fnmatchcase(name, x)), LANGUAGE)
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.numel() * (name not in still)
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
    head = int(getattr(text, "head_dim", None) or hidden // heads)
    wide = _number(vision, "embed_dim", "hidden_size")  # where a tower has both, hidden_size is what its merger writes
    return ModelSize(
        tuple(PartSize(name, *counts[name]) for name in ORDER if counts[name][0]), patches_of(model.config),
        int(text.num_hidden_layers), hidden, int(getattr(text, "intermediate_size", 4 * hidden)),
        int(getattr(text, "num_key_value_heads", None) or heads) * head, wide,
        _number(vision, "intermediate_size") or int(wide * (getattr(vision, "mlp_ratio", None) or 4)),
        _number(vision, "depth", "num_hidden_layers"), section.lora is not None)


def patches_of(config: Any) -> int:
    """Patches of the vision tower that become one image token: Qwen2-VL merges squares of them, Idefics3 shuffles them."""
    vision = getattr(config, "vision_config", None)
    tokens = getattr(config, "mm_tokens_per_image", None)
    if vision is not None and tokens:  # Gemma 3 pools them to so many, whatever the image
        return max(1, (int(vision.image_size) // int(vision.patch_size)) ** 2 // int(tokens))
    for name in ("spatial_merge_size", "scale_factor", "downsample_factor"):  # patches along a side
        if merge := getattr(vision, name, None) or getattr(config, name, None):
            return int(merge) ** 2
    for name in ("downsample_ratio", "pixel_shuffle_ratio"):  # its inverse
        if share := getattr(vision, name, None) or getattr(config, name, None):
            return round(1 / float(share)) ** 2
    return 1


def _number(config: Any, *names: str) -> int:
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def operations(size: ModelSize, tokens: int, image_tokens: int, *, recompute: bool, train: bool = True) -> float:
    """Of a pass over so many tokens, `image_tokens` of them of images.

    Args:
        recompute: activations are computed again in the backward pass.
        train: False for a forward pass alone.
    """
    positions = {VISION: image_tokens * size.patches, PROJECTOR: image_tokens, LANGUAGE: tokens}
    total, passing = 0.0, False
    for part in size.parts:
        passing = passing or part.trained > 0
        per_parameter = 2.0
        if train and passing:
            weights = 0.0 if size.adapters else part.trained / part.parameters
            per_parameter += 2 * weights + 2 + (2 if recompute else 0)
        total += per_parameter * part.parameters * positions[part.name]
    return total


@dataclass(frozen=True)
class Memory:
    """Bytes that one branch takes on its device, roughly. half: copies of the weights in the compute type."""

    weights: float
    gradients: float
    optimizer: float
    half: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.half + self.activations


def memory(size: ModelSize, *, rows: int, row_tokens: int, row_image_tokens: int, bfloat16: bool, recompute: bool) -> Memory:
    """Of training in float32 with AdamW, the passes in bfloat16 if asked.

    Args:
        rows: of one pass (per_device_train_batch_size). row_tokens: of the longest row. row_image_tokens: at most, of it.

    A layer keeps 8 hidden-sized numbers (2 of them and the residual in float32), its keys and values and 4 inner ones per
    position; with `recompute` every layer keeps its input, and one layer at a time the rest. Logits are not counted: TRL takes
    the loss piece by piece. A tower in which nothing trains keeps one layer's.
    """
    width = 2 if bfloat16 else 4
    inside = 3 * size.hidden * 4 + (5 * size.hidden + 2 * size.key_value + 4 * size.inner) * width
    kept = size.layers * size.hidden * 4 + inside if recompute else size.layers * inside
    tower = (8 * size.vision_hidden + 4 * size.vision_inner) * width  # of a patch in one layer: all there is where it is frozen
    if any(part.name == VISION and part.trained for part in size.parts):
        tower = size.vision_layers * size.vision_hidden * 4 + tower if recompute else size.vision_layers * tower
    trained = 0 if size.adapters else size.trained
    return Memory(4.0 * size.parameters, 4.0 * trained, 8.0 * trained, 2.0 * trained if bfloat16 else 0.0,
                  float(rows * (row_tokens * kept + row_image_tokens * size.patches * tower)))


def hours(device: Device, work: float, *, bfloat16: bool) -> float:
    """Hours of so many operations, at the assumed share of the peak; in float32 where a device has no bfloat16."""
    peak = device.bfloat16 if bfloat16 and device.bfloat16 is not None else device.float32
    return work / (SHARE * peak * 1e12) / 3600


def device_lines(work: Sequence[float], need: float, *, bfloat16: bool) -> list[str]:
    """What each device would take; one line where even the slowest is done in a minute.

    Args:
        work: operations of every branch. need: bytes of one.
    """
    if max(hours(d, sum(work), bfloat16=bfloat16) for d in DEVICES) * 60 < 1 and need <= min(d.memory for d in DEVICES) * 1e9:
        return [f"less than a minute for all branches on any of {', '.join(d.name for d in DEVICES)}"]
    lines = []
    for device in DEVICES:
        one, every = (hours(device, w, bfloat16=bfloat16) for w in (max(work), sum(work)))
        fits = "" if need <= device.memory * 1e9 else f"; does not fit on one: {need / 1e9:,.1f} GB"
        plain = " in float32, as it has no bfloat16" if bfloat16 and device.bfloat16 is None else ""
        lines.append(f"{device.name:<15} {_time(one)} a branch, {_time(every)} for all one after the other{plain}{fits}")
    return lines


def _time(hours: float) -> str:
    return f"{hours * 3600:.0f} s" if hours < 1 / 30 else f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h"
