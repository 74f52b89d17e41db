"""The modules of a model as PEFT sees them: what kind each is, and which tensors of a checkpoint are its own.

The model is built without weights (on torch's `meta` device) by transformers; its code is transformers' own, never the
repository's. Where transformers does not know the architecture, names and shapes tell, and a warning says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from anabranch.engine.adapter import EMBEDDING, HEAD, WRAPPERS
from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import ModelError

Kind = Literal["linear", "conv1d", "conv", "embedding", "other"]
DECOMPOSED: tuple[Kind, ...] = ("linear", "conv1d", "conv", "embedding")


@dataclass(frozen=True)
class Module:
    """A module that has tensors of its own.

    path     its name in the model in memory, as PEFT takes it
    kind     linear: weight [out, in]; conv1d (GPT-2's): [in, out]; conv: [out, in, ..], one group; embedding: [tokens, width];
             other: norms and whatever has no low-rank form in PEFT
    tensors  'weight', 'bias', .. -> the checkpoint's name for it; none for a head that is tied and not stored
    head     the output head or an embedding: saved whole where nothing else is said
    inner    modules inside it: PEFT cannot save its own tensors without theirs
    """

    path: str
    kind: Kind
    tensors: Mapping[str, str]
    head: bool = False
    inner: bool = False

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]


def modules_of(checkpoint: Checkpoint, warn: Callable[[str], None]) -> list[Module]:
    """The modules of a checkpoint, in the model's order. Tensors that are in none of them belong to none that PEFT can name.

    Raises ModelError where transformers knows the architecture, and the checkpoint's tensors are not those of its model.
    """
    try:
        model = _built(checkpoint.config)
    except Exception as error:  # an unknown architecture raises half a dozen types, remote code another
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        warn(f"{checkpoint.folder}: transformers cannot build this architecture without the model's own code ({said}). What is "
             "a matrix, an embedding or a norm is told by names and shapes")
        return list(_by_names(checkpoint))
    found = list(_by_model(model, checkpoint))
    if not found:
        raise ModelError(f"{checkpoint.folder}: no tensor has the name of one in {type(model).__name__}, which config.json "
                         "names. Save the model with `save_pretrained` of today's transformers.")
    return found


def _built(config: Mapping[str, Any]) -> Any:
    import torch
    import transformers

    names = config.get("architectures") or []
    kind = getattr(transformers, str(names[0])) if names else transformers.AutoModelForCausalLM
    if "auto_map" in config and not hasattr(transformers, str(names[0] if names else "")):
        raise ValueError("it brings its own code")
    settings = transformers.AutoConfig.for_model(**json.loads(json.dumps(dict(config))))
    with torch.device("meta"):
        return kind._from_config(settings) if names else kind.from_config(settings)


def _by_model(model: Any, checkpoint: Checkpoint) -> Iterator[Module]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    alike: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        alike.setdefault(bare(name), []).append(name)

    def stored(name: str) -> str | None:
        if name in checkpoint.tensors:
            return name
        names = alike.get(bare(name), [])
        return names[0] if len(names) == 1 else None

    head = _head_of(model)
    for path, module in model.named_modules():
        own = {name: stored(f"{path}.{name}" if path else name) for name, _ in module.named_parameters(recurse=False)}
        tensors = {name: there for name, there in own.items() if there is not None}
        weight = tensors.get("weight")
        if not path or not (tensors or (module is head and "weight" in own)):
            continue
        kind: Kind = "other" if tensors else "linear"
        if weight is not None:
            fits = tuple(module.weight.shape[1:]) == checkpoint.tensors[weight].shape[1:]
            if fits and isinstance(module, nn.Embedding):
                kind = "embedding"
            elif fits and isinstance(module, nn.Linear):
                kind = "linear"
            elif fits and isinstance(module, Conv1D):
                kind = "conv1d"
            elif fits and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
                kind = "conv"
        yield Module(path, kind, tensors, module is head or kind == "embedding",
                     next(module.children(), None) is not None)


def _head_of(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # transformers' own word for a model that has no head
        return None


def _by_names(checkpoint: Checkpoint) -> Iterator[Module]:
    grouped: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        path, _, leaf = name.rpartition(".")
        grouped.setdefault(path, {})[leaf] = name
    for path, tensors in grouped.items():
        weight = tensors.get("weight")
        if not path:
            continue
        shape = checkpoint.tensors[weight].shape if weight else ()
        end = bool(weight and (EMBEDDING.search(weight) or HEAD.search(weight)))
        kind: Kind = "other"
        if len(shape) == 2:
            kind = "embedding" if weight and EMBEDDING.search(weight) else "linear"
        elif len(shape) in (4, 5) and shape[1] > 1:
            kind = "conv"
        yield Module(path, kind, tensors, end)


def bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def short_names(paths: list[str], all_paths: list[str]) -> list[str]:
    """`target_modules` for exactly these modules: last parts of names where every module so called is meant, else paths."""
    meant = set(paths)
    leaves: dict[str, bool] = {}
    for path in all_paths:
        leaf = path.rpartition(".")[2]
        leaves[leaf] = leaves.get(leaf, True) and path in meant
    return sorted({leaf if leaves.get(leaf := path.rpartition(".")[2], False) and not re.fullmatch(r"\d+", leaf) else path
                   for path in paths})
