"""A few steps on plain text that train router rows and nothing else.

    L = L_next + c * L_balance        L_balance = mean over layers of E * sum_e f_e P_e

    L_next   mean next-token loss (nats)      f_e  share of choices that fall on e      P_e  mean router probability of e

Adam on the router matrices in float32, everything else frozen, seeded draws of texts. The balance term is that of Switch
Transformer (2101.03961, eq. 4-6); training the router alone after experts were put together is what BTX's follow-ups do
(2403.07816 trains all; 2604.18473 a light router).

With one expert per token the chosen weight is p / p = 1 whatever the router says, so that its loss has no gradient: while
it is calibrated such a router mixes two experts, and what it learns to weigh more it will choose alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import ModelError, RecipeError
from anabranch.experts.balance import choices_of, routers_of
from anabranch.rows import generator

TEXTS_PER_STEP = 8
LEARNING_RATE = 0.01
BALANCE = 0.01


def calibrate(model: Any, texts: Sequence[Sequence[int]], steps: int, *, seed: int = 0, learning_rate: float = LEARNING_RATE,
              balance: float = BALANCE, rounded: torch.dtype = torch.float32) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Train the routers of a loaded model in place.

    Args:
        model: of float32; see `balance.routers_of`.
        texts: token ids of each, two or more.
        steps: of TEXTS_PER_STEP texts.
        balance: c.
        rounded: what the rows will be written in; they are rounded to it once they are trained.
    Returns:
        layer -> router rows, float32 [E, H]; and the mean next-token loss before and after, as the model is run, of
        `measured` texts. `held_out`: these, every eighth and at most 32, were kept out of training, copies of them too.
        Where there are fewer than 16 texts, or no others than these, it is false: all are trained on, and all measured.
    Raises:
        RecipeError: nothing to train on, a rate or a weight that is no such number, or a loss that is not finite.
        ModelError: a token without an embedding.
    """
    _check_numbers(learning_rate, balance)
    routers = routers_of(model)
    if not routers or not any(len(text) > 1 for text in texts):
        raise RecipeError("calibration: " + ("no text of two tokens or more" if routers else "the model has no routers"))
    usable = [list(text) for text in texts if len(text) > 1]
    highest, known = max(map(max, usable)), model.get_input_embeddings().weight.shape[0]
    if highest >= known:
        raise ModelError(f"calibration: token {highest} has no embedding: the model has {known}, its tokenizer more.")
    kept, trained, held_out = _split(usable)
    before = _mean_loss(model, routers, kept)
    model.requires_grad_(False)
    weights = [router.weight.requires_grad_(True) for router in routers.values()]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    order = _drawn(len(trained), steps, seed)
    with _mixing(routers.values()), torch.enable_grad():
        for step, chosen in enumerate(order):
            next_token, uneven = _losses(model, routers, [trained[i] for i in chosen])
            optimizer.zero_grad()
            (next_token + balance * uneven).backward()
            optimizer.step()
            if not np.isfinite(next_token.item()):
                raise RecipeError(f"calibration: the loss of step {step + 1} is not finite. Try a smaller learning rate.")
    for weight in weights:
        weight.requires_grad_(False).copy_(weight.detach().to(rounded))
    return {layer: router.weight.detach().clone() for layer, router in routers.items()}, {
        "loss_before": round(before, 4), "loss_after": round(_mean_loss(model, routers, kept), 4),
        "measured": len(kept), "held_out": held_out}


def _check_numbers(learning_rate: float, balance: float) -> None:
    problems = [f"{name}: got {value}, wanted a number from 0 to {most:g}" for name, value, most in
                (("learning rate", learning_rate, 10.0), ("balance", balance, 1e6)) if not 0 <= value <= most]
    if problems:
        raise RecipeError.of("calibration:", problems)


def _split(usable: list[list[int]]) -> tuple[list[list[int]], list[list[int]], bool]:
    """(measured, trained on, whether the two have no text in common)."""
    kept = usable[7::8][:32]
    held = {tuple(text) for text in kept}
    trained = [text for text in usable if tuple(text) not in held]
    return (kept, trained, True) if len(usable) >= 16 and trained else (usable, usable, False)


@torch.no_grad()
def _mean_loss(model: Any, routers: dict[int, Any], texts: Sequence[Sequence[int]]) -> float:
    """Next-token loss over texts, each counting by its tokens."""
    total = sum(float(_losses(model, routers, [text])[0]) * (len(text) - 1) for text in texts)
    return total / sum(len(text) - 1 for text in texts)


def _drawn(count: int, steps: int, seed: int) -> list[list[int]]:
    """Texts of each step: pass after pass over all, each in a new order."""
    per_step = min(TEXTS_PER_STEP, count)
    passes = range(-(-steps * per_step // count))
    flat = [int(i) for one in passes for i in generator(seed, "calibrate", one).permutation(count)]
    return [flat[i * per_step : (i + 1) * per_step] for i in range(steps)]


@contextmanager
def _mixing(routers: Any) -> Iterator[None]:
    """Let routers that choose one expert choose two."""
    before = [(router, router.top_k) for router in routers]
    try:
        for router, chosen in before:
            router.top_k = min(max(2, chosen), router.weight.shape[0])
        yield
    finally:
        for router, chosen in before:
            router.top_k = chosen


def _losses(model: Any, routers: dict[int, Any], texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(next-token loss, imbalance) of one batch, padded on the right."""
    width = max(map(len, texts))
    device = next(model.parameters()).device
    ids = torch.tensor([list(t) + [0] * (width - len(t)) for t in texts], device=device)
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=device)
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [router.register_forward_hook(lambda _m, _i, out: seen.append((out[0], choices_of(out))))
             for router in routers.values()]
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    next_token = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
    real = mask.flatten().bool()
    uneven = [_imbalance(scores.reshape(len(real), -1)[real], choices[real]) for scores, choices in seen]
    return next_token, torch.stack(uneven).mean()


def _imbalance(scores: Tensor, choices: Tensor) -> Tensor:
    """E * sum_e f_e P_e of one layer: 1 where all is even, up to E."""
    experts = scores.shape[-1]
    shares = torch.bincount(choices.flatten(), minlength=experts).to(scores.dtype) / choices.numel()
    return experts * (shares * torch.softmax(scores.float(), -1).mean(0)).sum()
