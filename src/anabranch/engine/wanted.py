"""What a merge shall write, before any byte has its place: the nouns between the dialects and the engine."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from anabranch.merge import Argument

COPY = ""


@dataclass(frozen=True)
class Input:
    """A model that a merge reads: its folder, and the LoRA adapter to fold into it, if one is named.

    `label` is how messages and the model card call it: what the config says, never a path of this machine's cache.
    `local`: the config names a folder, not a repository of the Hub.
    """

    label: str
    folder: Path
    adapter: Path | None = None
    local: bool = True


@dataclass(frozen=True)
class Source:
    """Tensor `name` of input number `input`."""

    input: int
    name: str


@dataclass(frozen=True)
class Wanted:
    """One tensor of the result, and how it is made.

    method      a registered merge method, or COPY: the bytes of `branches[0]`, which all other sources must equal; or, where
                there is a `base`, the base's, which the branches must have the numbers of (`frozen`)
    weights     one per branch, for methods that take them
    arguments   the method's parameters, complete, sorted by name
    depth       of its layer: 0 the first, 1 the last; embeddings 0, final norm and head 1
    embedding   its rows are tokens: a tokenizer plan applies to it
    dtype       of the result, in safetensors' spelling
    """

    name: str
    shape: tuple[int, ...]
    method: str
    branches: tuple[Source, ...]
    base: Source | None
    weights: tuple[float, ...] | None
    arguments: tuple[tuple[str, Argument], ...]
    dtype: str
    depth: float = 0.0
    embedding: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def frozen(self) -> bool:
        """Carried over from the base, and the same in every branch."""
        return self.method == COPY and self.base is not None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Branches, then the base."""
        return self.branches + ((self.base,) if self.base else ())
