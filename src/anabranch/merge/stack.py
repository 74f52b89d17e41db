"""One tensor of every input, block by block: what a method sees of a tensor that need not fit into memory.

    k   branches          n   entries of a block, or [rows, columns], or the whole shape

Blocks come in order, and begin at multiples of CHUNK entries ("entry" blocks) or of a row ("row" blocks). A sum that
must not depend on how a tensor was cut is formed by `Total`: float32 sums over runs of RUN entries, which are then added
in float64, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 16
RUN = 1 << 10


@dataclass(frozen=True)
class Block:
    """A part of one tensor, of every input. All float32; none may be changed.

    start      flat index of its first entry in the tensor
    branches   [k, n]; base [n] or None; draws, fisher [k, n] or None
    """

    start: int
    branches: Tensor
    base: Tensor | None
    draws: Tensor | None = None
    fisher: Tensor | None = None


Blockwise = Callable[[Block], Tensor]


class Stack(Protocol):
    """One tensor of every input. Each iteration is one pass over it; the last pass applies the method."""

    @property
    def k(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def numel(self) -> int: ...

    @property
    def has_base(self) -> bool: ...

    def __iter__(self) -> Iterator[Block]: ...


@dataclass(frozen=True)
class WholeStack:
    """A stack in memory, of one block: how a streamed method is called on tensors."""

    branches: Tensor
    base: Tensor | None = None
    draws: Tensor | None = None
    fisher: Tensor | None = None
    kind: str = "entry"

    @property
    def k(self) -> int:
        return self.branches.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.branches.shape[1:])

    @property
    def numel(self) -> int:
        return self.branches[0].numel()

    @property
    def has_base(self) -> bool:
        return self.base is not None

    def __iter__(self) -> Iterator[Block]:
        def cut(tensor: Tensor | None, lead: int) -> Tensor | None:
            if tensor is None or self.kind == "tensor":
                return tensor
            columns = (self.shape or (1,))[-1]
            inner = (-1,) if self.kind == "entry" else (tensor[0].numel() // max(columns, 1) if lead
                                                        else tensor.numel() // max(columns, 1), columns)
            return tensor.reshape(*tensor.shape[:lead], *inner)

        branches = cut(self.branches, 1)
        assert branches is not None
        yield Block(0, branches, cut(self.base, 0), cut(self.draws, 1), cut(self.fisher, 1))

    def apply(self, blockwise: Blockwise) -> Tensor:
        """The merged tensor [*shape]."""
        (block,) = self
        return blockwise(block).reshape(self.shape)


@dataclass(frozen=True)
class ModelStack:
    """The tensors of a model one after the other, as if they were one: for ranks over all of them."""

    stacks: Sequence[Stack]

    @property
    def k(self) -> int:
        return self.stacks[0].k

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.numel,)

    @property
    def numel(self) -> int:
        return sum(stack.numel for stack in self.stacks)

    @property
    def has_base(self) -> bool:
        return self.stacks[0].has_base

    def __iter__(self) -> Iterator[Block]:
        before = 0
        for stack in self.stacks:
            for block in stack:
                yield replace(block, start=before + block.start)
            before += stack.numel


class Total:
    """A running sum over the last dimension of the blocks of a pass, float64 [*lead].

    Runs of RUN entries are summed in float32 by halving (entry j and entry j + RUN / 2, then j and j + RUN / 4, ..), a last
    run that is shorter as if zeros followed, and the runs are added in float64, in order. So the result does not depend on
    how a tensor was cut, as long as every block but the last holds whole runs.
    """

    def __init__(self) -> None:
        self.value: Any = 0.0

    def add(self, x: Float[Tensor, "*lead n"]) -> None:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % RUN)).unflatten(-1, (-1, RUN))
        while x.shape[-1] > 1:
            half = x.shape[-1] // 2
            x = x[..., :half] + x[..., half:]
        sums = x[..., 0].double().cpu().numpy()
        if sums.shape[-1]:
            sums[..., 0] += np.asarray(self.value)
            self.value = torch.from_numpy(np.asarray(np.add.accumulate(sums, axis=-1)[..., -1]).copy())
        elif isinstance(self.value, float):
            self.value = torch.zeros(sums.shape[:-1], dtype=torch.float64)


def gram(stack: Stack, *, offset: bool) -> Float[Tensor, " n n"]:
    """Inner products of the flattened branches, float64 [k, k]; of branches minus base where `offset`.

    Without `offset`, and with a base, the base is the last row and column: [k + 1, k + 1]. Products are summed in
    float32 over runs of 1,024 entries, and those sums in float64.
    """
    n = stack.k + (stack.has_base and not offset)
    total = torch.zeros(n, n, dtype=torch.float64)
    for block in stack:
        rows = block.branches.flatten(1)
        if offset:
            assert block.base is not None
            rows = rows - block.base.reshape(1, -1)
        elif block.base is not None:
            rows = torch.cat([rows, block.base.reshape(1, -1)])
        for start in range(0, rows.shape[1], CHUNK):
            # A fresh copy: the library's products may differ in the last digit with a row's alignment in memory.
            total += _products(rows[:, start : start + CHUNK].clone(memory_format=torch.contiguous_format)).cpu()
    return total


def _products(rows: Tensor) -> Tensor:
    """Gram matrix of rows [n, m], m <= CHUNK, float64 [n, n]."""
    whole = rows.shape[1] // RUN * RUN
    total = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    if whole:
        runs = rows[:, :whole].unflatten(1, (-1, RUN)).transpose(0, 1)
        total = torch.bmm(runs, runs.transpose(1, 2)).double().sum(0)
    if whole < rows.shape[1]:
        tail = rows[:, whole:]
        total = total + (tail @ tail.T).double()
    return total
