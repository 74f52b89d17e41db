"""A merge config once it is validated: what `dialect` reads it into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from anabranch.engine.conventions import Dialect
from anabranch.engine.parameters import Setting
from anabranch.engine.reference import Reference

Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Entry:
    """A model of a list. `layers`: [start, stop) in a slice, None for a whole model. `fisher`: its sidecar file."""

    model: Reference
    parameters: Parameters
    where: str
    layers: tuple[int, int] | None = None
    fisher: str | None = None


@dataclass(frozen=True)
class Slice:
    """Layers of the result, one after another, each merged from the same offset into every entry's range."""

    entries: tuple[Entry, ...]
    base: Reference | None
    parameters: Parameters
    where: str


@dataclass(frozen=True)
class Part:
    """What a module of the result is made of: whole models, or slices."""

    models: tuple[Entry, ...]
    slices: tuple[Slice, ...]
    parameters: Parameters
    where: str

    @property
    def lists(self) -> list[tuple[Entry, ...]]:
        return [self.models] if self.models else [s.entries for s in self.slices]


@dataclass(frozen=True)
class TokenRow:
    """The row of a token in a model: the same token's, that of `token`, or number `token_id`."""

    model: Reference
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenSetting:
    """`source` None: the usual rule; "zero": a row of zeros."""

    source: TokenRow | Literal["zero"] | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    source: Literal["union", "base"] | Reference = "union"
    tokens: Mapping[str, TokenSetting] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class MergeConfig:
    """A validated config. `modules` has one entry named None for configs with `models` or `slices` at the top.

    dtype, out_dtype   'bfloat16', 'float16', 'float32' or None
    chat_template      'auto', a bundled name, Jinja text, or None
    warnings           what the config says without effect, and the like; for the user, once
    """

    method: str
    dialect: Dialect
    modules: Mapping[str | None, Part]
    base: Reference | None
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    name: str | None
    source: str
    warnings: tuple[str, ...]

    @property
    def models(self) -> tuple[Reference, ...]:
        """The models whose weights are read, as the inputs of the merge are numbered: listing order, bases last."""
        listed = [e.model for part in self.modules.values() for entries in part.lists for e in entries]
        bases = [s.base for part in self.modules.values() for s in part.slices if s.base]
        return tuple(dict.fromkeys([*listed, *bases, *([self.base] if self.base else [])]))

    @property
    def tokenizers_only(self) -> tuple[Reference, ...]:
        """Models that nothing but the tokenizer block names."""
        if self.tokenizer is None:
            return ()
        named = [self.tokenizer.source] if isinstance(self.tokenizer.source, Reference) else []
        named += [t.source.model for t in self.tokenizer.tokens.values() if isinstance(t.source, TokenRow)]
        return tuple(r for r in dict.fromkeys(named) if r not in self.models)

    @property
    def donor(self) -> Reference:
        """Whose config.json, tokenizer and side files the result gets: the base, else the model listed first."""
        return self.base or self.models[0]
