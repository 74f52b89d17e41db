"""What a module does with given batches: the mean activation of a layer, and the gradients of a loss. For any module.

    D  width of the layer's output      items  what a loss is the mean over: images, response tokens

A vision model is measured with three lines of one's own:

    activation_mean(encoder, encoder.blocks[-1], images)
    def loss(batch):
        x = batch["pixels"].requires_grad_()
        return Loss(cross_entropy(head(encoder(x)), batch["label"], reduction="sum"), len(x), x)
    gradients(encoder, loss, batches)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from anabranch.diagnose.subject import NotApplicable

B = TypeVar("B")


def middle_mean(output: Float[Tensor, "rows *middle D"], _batch: Any) -> Float[Tensor, "rows D"]:
    """Mean over everything between the first dimension and the last, in float64."""
    return output.double().flatten(1, -2).mean(1) if output.dim() > 2 else output.double()


def activation_mean(module: nn.Module, layer: nn.Module, batches: Iterable[B], *, run: Callable[[B], object] | None = None,
                    pool: Callable[[Tensor, B], Tensor] = middle_mean) -> Float[np.ndarray, " D"]:
    """Mean over rows of what `layer` puts out, float64: the vector behind the activation metrics (arXiv:2601.22285).

    Every row counts the same, however the rows are cut into batches. Put the module into evaluation mode first.

    Args:
        layer: the paper's is the last residual block. A tuple counts by its first entry.
        run: what is done with a batch; None: `module(batch)`.
        pool: (output of the layer, batch) -> one vector per row [rows, D]; the default is the mean over all dimensions
            between the first and the last. Give your own for padding, or where rows are not the first dimension.
    Raises:
        NotApplicable: no batch; the layer does not run just once per batch; what it puts out is no tensor.
    """
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    total, rows = torch.zeros(()), 0
    try:
        for batch in batches:
            seen.clear()
            with torch.no_grad():
                (run or module)(batch)
            if len(seen) != 1:
                raise NotApplicable(f"the layer ({type(layer).__name__}) runs {len(seen)} times in a forward pass, wanted once")
            output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            if not isinstance(output, Tensor):
                raise NotApplicable(f"the layer ({type(layer).__name__}) puts out {type(output).__name__}, wanted a tensor")
            vectors = pool(output, batch).double()
            total, rows = total.to(vectors) + vectors.sum(0), rows + len(vectors)
    finally:
        handle.remove()
    if not rows:
        raise NotApplicable("no batch was given")
    return (total / rows).cpu().numpy()


class Loss(NamedTuple):
    """A batch's loss, summed over its items; how many those are; and the tensor [rows, ..] that input gradients are of."""

    total: Tensor
    items: int
    inputs: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Gradients of the mean loss per item over all batches.

    Attributes:
        loss: that mean. items: how many.
        parameters: name -> gradient; zeros where a parameter had no part in the loss.
        inputs: one tensor per row, in the order of the batches; None where `Loss.inputs` was not given.
    """

    loss: float
    items: int
    parameters: dict[str, Tensor]
    inputs: list[Tensor] | None


def gradients(module: nn.Module, loss: Callable[[B], Loss], batches: Iterable[B]) -> Gradients:
    """Gradients of the mean loss per item with respect to the module's trainable parameters and to its inputs.

    A parameter that several places share (tied embeddings) counts once. The result does not depend on how rows are cut
    into batches, up to rounding. The paper's code sums batch means and divides by rows, which weighs the rows of a short
    last batch up (ten rows in batches of eight: fourfold), and takes the loss of a random head; here the loss is the
    caller's own, and this is the gradient of just its mean. Clears the module's `.grad`.

    Raises:
        NotApplicable: no item in any batch.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad(set_to_none=True)
    total, items, rows, whole = 0.0, 0, [], True
    for batch in batches:
        got = loss(batch)
        if got.inputs is not None:
            if got.inputs.is_leaf:
                got.inputs.grad = None  # of an earlier pass over the same batch
            else:
                got.inputs.retain_grad()
        got.total.backward()
        total, items = total + float(got.total.detach().double()), items + got.items
        if got.inputs is not None and got.inputs.grad is not None:
            rows += list(got.inputs.grad.detach().float().cpu())
        else:
            whole = False
    if not items:
        raise NotApplicable("no item to take a loss on")
    with torch.no_grad():
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad.div_(items) for name, p in trainable.items()}
        rows = [row / items for row in rows]
    module.zero_grad(set_to_none=True)
    return Gradients(total / items, items, found, rows if whole else None)
