"""A language model run one layer at a time: the weights of one layer are in memory, and all texts pass it.

    B texts of a batch    T tokens, padded    H hidden size

transformers' own modules compute; only their weights come and go. Attention masks, positions and whatever else a layer is
given are recorded once per batch, by a pass in which every layer hands on what it got.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import ModelError

Read = Callable[[str], Tensor]
# layer, batch, its input [B, T, H], module within the layer -> (what it was given, what it gave)
Watch = Callable[[int, int, Tensor, Mapping[str, tuple[Tensor, Any]]], None]


@dataclass(frozen=True)
class Tokens:
    """A batch. `mask` is 1 for tokens and 0 for padding; int64 [B, T]."""

    ids: Tensor
    mask: Tensor


@torch.no_grad()
def run_layers(model: Any, read: Read, batches: Sequence[Tokens], watch: Watch, *, dtype: torch.dtype = torch.float32,
               watched: Sequence[str] = (), threads: int = 1) -> None:
    """Pass every batch through every layer.

    Args:
        model: from `layouts.skeleton`; it has no weights before and after.
        read: name of a tensor -> the tensor, on the CPU; called once per tensor. Anything that fits the module.
        watch: called for every layer and batch, layer by layer, from several threads.
        dtype: of the computation.
        watched: modules of a layer whose input and output `watch` is shown.
        threads: batches at once. Each is computed on one core, so that the numbers do not depend on it.
    Raises:
        ModelError: weights that are not those of the config, or a token without an embedding.
    """
    inner = model.model
    settings = inner.config
    inner.rotary_emb = type(inner.rotary_emb)(config=settings)
    rows = read("model.embed_tokens.weight")
    _check_ids(batches, rows.shape[0])
    states = [rows[batch.ids].to(dtype) for batch in batches]
    given = [_recorded(inner, state, batch.mask) for state, batch in zip(states, batches, strict=True)]
    pool = ThreadPoolExecutor(max(1, threads), initializer=torch.set_num_threads, initargs=(1,))
    before = torch.get_num_threads()
    buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    try:
        for number, layer in enumerate(inner.layers):
            _fill(layer, buffers, f"model.layers.{number}.", read, dtype)
            seen = _Seen(layer, watched)
            others = [one[number] for one in given]
            states = list(pool.map(partial(_pass, layer, seen, partial(watch, number)), range(len(states)), states, others))
            seen.end()
            layer.to("meta")
    finally:
        pool.shutdown()
        torch.set_num_threads(before)


def _fill(layer: Any, buffers: dict[tuple[str, tuple[int, ...]], Tensor], at: str, read: Read,
          dtype: torch.dtype) -> None:
    """Give a layer its weights, in memory that the layers before it had: freed and asked for anew it would pile up.

    Raises ModelError where the weights are not those that config.json promises.
    """
    state = {}
    for name, meta in layer.state_dict().items():
        key = (name, tuple(meta.shape))
        if key not in buffers:
            buffers[key] = torch.empty(meta.shape, dtype=dtype)
        try:
            found = read(at + name)
        except KeyError as error:
            raise ModelError(f"the model has no tensor {error}, and its class wants one.") from error
        if found.shape != meta.shape:
            raise ModelError(f"tensor '{at}{name}' is {list(found.shape)}, and by config.json {list(meta.shape)}.")
        state[name] = buffers[key].copy_(found)
    layer.load_state_dict(state, assign=True)


def _pass(layer: Any, seen: _Seen, watch: Callable[[int, Tensor, Mapping[str, tuple[Tensor, Any]]], None], batch: int,
          state: Tensor, others: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        seen.begin()
        result = layer(state, **others)
        watch(batch, state, seen.found())
        return result[0] if isinstance(result, tuple) else result


def _check_ids(batches: Sequence[Tokens], rows: int) -> None:
    highest = max((int(batch.ids.max()) for batch in batches if batch.ids.numel()), default=-1)
    if highest >= rows:
        raise ModelError(f"token {highest} has no embedding: the model has {rows}, its tokenizer more.")


def _recorded(inner: Any, embedded: Tensor, mask: Tensor) -> list[dict[str, Any]]:
    """What each layer is given beside the hidden states."""
    given: list[dict[str, Any]] = []
    layers, norm = list(inner.layers), inner.norm
    try:
        for layer in layers:
            def record(hidden: Tensor, **others: Any) -> Tensor:
                given.append({k: v for k, v in others.items() if k != "past_key_values"})
                return hidden

            layer.forward = record
        inner.norm = nn.Identity()
        whole = bool(mask.all())
        inner(inputs_embeds=embedded, attention_mask=None if whole else mask, use_cache=False)
    finally:
        inner.norm = norm
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return given


class _Seen:
    """Input and output of modules within a layer, for the batch of the present thread."""

    def __init__(self, layer: nn.Module, watched: Sequence[str]) -> None:
        self._of_thread = threading.local()
        modules = dict(layer.named_modules())
        self._hooks = [modules[name].register_forward_hook(self._keeper(name)) for name in watched if name in modules]

    def _keeper(self, name: str) -> Callable[[Any, Any, Any], None]:
        def keep(_: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            self._of_thread.found[name] = (inputs[0], output)

        return keep

    def begin(self) -> None:
        self._of_thread.found = {}

    def found(self) -> dict[str, tuple[Tensor, Any]]:
        return self._of_thread.found

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
