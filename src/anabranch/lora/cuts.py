"""Magnitudes above which entries are kept, over all modules of a merge of adapters: for methods that rank a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from anabranch.engine.blocks import MERGED
from anabranch.errors import RecipeError
from anabranch.lora.joining import Job, Place, Plan, dense_changes
from anabranch.merge import one_each
from anabranch.merge.select import largest, magnitudes
from anabranch.merge.stack import Block, ModelStack


@dataclass(frozen=True)
class _Changes:
    """One module's changes as a stack of one block, formed anew for every pass. The base of a change is zero."""

    job: Job
    place: Place

    @property
    def k(self) -> int:
        return len(self.job.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.stored

    @property
    def numel(self) -> int:
        return int(torch.Size(self.place.stored).numel())

    @property
    def has_base(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Block]:
        changes = dense_changes(self.job, self.place).flatten(1)
        yield Block(0, changes, torch.zeros(changes.shape[1]))


def find_cuts(job: Job, plans: Sequence[tuple[Place, Plan]]) -> list[float] | None:
    """For each adapter the int(density N)-th largest magnitude of its change; None for methods that need none.

    N: the numbers of the whole base, if there is one, of which those that no adapter changes are 0; else of all modules.
    Reads all factors twice or three times. Raises RecipeError for densities that differ between tensors.
    """
    source = job.values.method.cuts_from
    if source is None:
        return None
    k = len(job.sources)
    found = {tuple(one_each(plan.arguments[source], k)) for _, plan in plans}
    if len(found) > 1:
        raise RecipeError(f"{job.values.method.name} ranks all tensors together, and `{source}` is not the same for all of "
                          "them. Give it without filters and gradients.")
    stack = ModelStack([_Changes(job, place) for place, _ in plans])
    count = stack.numel
    if job.base is not None:
        count = sum(info.numel for info in job.base.tensors.values() if info.dtype in MERGED)
    with torch.no_grad():
        cuts = largest(stack, magnitudes, [[int(density * count)] for density in next(iter(found))])
    return [max(cut.value, 0.0) for (cut,) in cuts]  # -inf, where all are kept, is no magnitude
