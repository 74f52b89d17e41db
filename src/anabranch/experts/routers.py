"""Router rows: what each expert is chosen by, in every layer.

    R rows: experts, then shared experts with a gate    H hidden size    g_e = h_e / max(||h_e||, 1e-8), h_e = h+ - h-

    hidden, hidden_last   h of prompts: hidden state at the last position, entering the layer, averaged over prompts
    hidden_avg            the same, averaged over the tokens of each prompt, padding left out, then over prompts
    cheap_embed           sum of the embedding rows of all tokens of all prompts, of norm one; the same for every layer
    random                standard normal, no norm set
    uniform_random        U(-1/sqrt H, 1/sqrt H), no norm set
    mlp_input             ours: what the router will really be given, i.e. the normed input of the feed-forward, averaged over
                          all tokens; centred over the experts, so that what all prompts have in common does not count

The first six are mergekit-moe's. A prompt is `bos + text`, no other special tokens; an expert's prompts are one batch, padded
on the left. Computed in float32; `literal` is the peer's letter: bfloat16, and hidden_avg counts padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ModelError
from anabranch.experts.settings import Config, Expert
from anabranch.experts.streamed import Read, Tokens, run_layers
from anabranch.rows import generator

FLOOR = 1e-8
DEGENERATE = 5.0
MLP_INPUT = "mlp"
AT_ONCE = 4096


def drawn_rows(mode: str, rows: int, layers: int, hidden: int, seed: int) -> dict[int, Tensor]:
    """`random` and `uniform_random`: layer -> float32 [R, H], from the seed and the layer's number alone."""
    found = {}
    for layer in range(layers):
        stream = generator(seed, "router", layer)
        values = (stream.standard_normal((rows, hidden), dtype="float32") if mode == "random"
                  else stream.uniform(-hidden**-0.5, hidden**-0.5, (rows, hidden)).astype("float32"))
        found[layer] = torch.from_numpy(values)
    return found


def prompt_rows(config: Config, gated: Sequence[Expert], model: Any, read: Read, tokenizer: Any, layers: int, *,
                threads: int = 1) -> dict[int, Tensor]:
    """Router rows of the modes that read prompts: layer -> float32 [R, H].

    Args:
        gated: experts with a row, in their order.
        model, read: the base, see `streamed.run_layers`.
    Raises:
        ModelError: a prompt without a token.
    """
    sides = [(e, texts) for e in gated for texts in (e.positive, e.negative) if texts]
    batches = [tokenized(texts, tokenizer, e.where) for e, texts in sides]
    if config.gate_mode == "cheap_embed":
        means = [{layer: row for layer in range(layers)} for row in _embedded(batches, read)]
    else:
        means = _hidden(config, batches, model, read, threads)
    found, rows = {}, iter(means)
    signed = [(next(rows), next(rows) if e.negative else None) for e in gated]
    for layer in range(layers):
        h = torch.stack([plus[layer] if minus is None else plus[layer] - minus[layer] for plus, minus in signed])
        if config.gate_mode == "mlp_input" and len(gated) > 1:
            h = h - h[: len(config.experts)].mean(0)
        found[layer] = (h / h.norm(dim=-1, keepdim=True).clamp(min=FLOOR)).float()
    return found


def tokenized(texts: Sequence[str], tokenizer: Any, where: str) -> Tokens:
    """`bos + text` of each, padded on the left. Raises ModelError where a prompt has no token."""
    bos = tokenizer.bos_token or ""
    rows = [tokenizer(bos + text, add_special_tokens=False)["input_ids"] for text in texts]
    if not all(rows):
        empty = next(text for text, row in zip(texts, rows, strict=True) if not row)
        raise ModelError(f"{where}: the prompt {empty!r} has no token in the base's tokenizer")
    pad = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, rows))
    return Tokens(torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
                  torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]))


def _embedded(batches: Sequence[Tokens], read: Read) -> list[Tensor]:
    """For each batch the sum over its tokens of embedding rows, of norm one: float32 [H]."""
    table = read("model.embed_tokens.weight")
    highest = max(int(batch.ids.max()) for batch in batches)
    if highest >= table.shape[0]:
        raise ModelError(f"token {highest} has no embedding: the base has {table.shape[0]}, its tokenizer more.")
    sums = [table[batch.ids[batch.mask.bool()]].float().sum(0) for batch in batches]
    return [total / total.norm().clamp(min=FLOOR) for total in sums]


def _hidden(config: Config, batches: Sequence[Tokens], model: Any, read: Read, threads: int) -> list[dict[int, Tensor]]:
    """For each batch: layer -> [H]."""
    literal = config.literal
    pieces = [(i, piece) for i, batch in enumerate(batches) for piece in ([batch] if literal else _pieces(batch))]
    sums: list[dict[int, Tensor]] = [{} for _ in pieces]

    def watch(layer: int, i: int, state: Tensor, seen: Any) -> None:
        mask = pieces[i][1].mask.to(state.dtype)[..., None]
        if config.gate_mode == "mlp_input":
            sums[i][layer] = (seen[MLP_INPUT][0].reshape(state.shape) * mask).sum((0, 1))
            return
        if config.gate_mode != "hidden_avg":
            of_prompts = state[:, -1]
        elif literal:
            of_prompts = state.sum(1) / state.shape[1]
        else:
            of_prompts = (state * mask).sum(1) / mask.sum(1)
        sums[i][layer] = of_prompts.sum(0)

    run_layers(model, read, [piece for _, piece in pieces], watch, dtype=torch.bfloat16 if literal else torch.float32,
               watched=(MLP_INPUT,) if config.gate_mode == "mlp_input" else (), threads=threads)
    found: list[dict[int, Tensor]] = [{} for _ in batches]
    for (i, _), one in zip(pieces, sums, strict=True):
        found[i] = {layer: found[i][layer] + part if layer in found[i] else part for layer, part in one.items()}
    counts = [int(batch.mask.sum()) if config.gate_mode == "mlp_input" else len(batch.ids) for batch in batches]
    return [{layer: total / count for layer, total in one.items()} for one, count in zip(found, counts, strict=True)]


def _pieces(batch: Tokens) -> list[Tokens]:
    """Prompts in groups of at most AT_ONCE tokens: what a feed-forward gives is several times as wide as its input."""
    rows = max(1, AT_ONCE // batch.ids.shape[1])
    return [Tokens(ids, mask) for ids, mask in zip(batch.ids.split(rows), batch.mask.split(rows), strict=True)]


def degenerate(rows: dict[int, Tensor], *, centred: bool = False) -> list[str]:
    """A warning where rows are nearly dependent: the condition number of a layer's [R, H] is above 5.

    `centred`: rows of `mlp_input`, one of which always follows from the others; that least singular value does not count.
    """
    worst = {layer: _condition(matrix, -2 if centred else -1) for layer, matrix in rows.items() if len(matrix) > 1}
    high = {layer: number for layer, number in worst.items() if not number <= DEGENERATE}
    if not high:
        return []
    layer, number = max(high.items(), key=lambda item: item[1])
    return [f"the router rows of {len(high)} of {len(rows)} layers are nearly dependent (condition number up to {number:.1f}, "
            f"in layer {layer}; {DEGENERATE:g} is much): experts are hardly told apart there. More telling prompts, negative "
            "prompts, " + ("" if centred else "`gate_mode: mlp_input` ") + "or a calibration help"]


def _condition(matrix: Tensor, least: int) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float(values[0] / values[least])
