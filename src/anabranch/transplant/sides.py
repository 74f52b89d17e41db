"""The two models of a transplant as they lie in their folders: tokenizer, embedding, head, and what config.json says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.fetch import quantisation, resolve
from anabranch.engine.layout import OUTPUT, layout_of
from anabranch.engine.reference import Reference, read_reference
from anabranch.errors import ModelError, RecipeError
from anabranch.surgery.side_files import GENERATION
from anabranch.surgery.vocabulary import NAMED, Vocabulary, parse_object, read_vocabulary
from anabranch.transplant.matching import Keys, keys_of, roles_of

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Side:
    """A model, or its tokenizer alone.

    label       as the user wrote it
    checkpoint  None for a folder without weights
    embedding, head, bias   names of its tensors; no head where it is tied to the embedding, or there is none
    tied        whether the head is the embedding
    dropped     a head that only repeats a tied embedding
    """

    label: str
    folder: Path
    checkpoint: Checkpoint | None
    vocabulary: Vocabulary
    keys: Keys
    embedding: str | None = None
    head: str | None = None
    bias: str | None = None
    tied: bool = True
    dropped: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        if self.checkpoint is not None:
            return self.checkpoint.config
        path = self.folder / "config.json"
        return parse_object(path.read_bytes(), path) if path.is_file() else {}

    def read(self, name: str) -> Tensor:
        assert self.checkpoint is not None
        return self.checkpoint.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        assert self.checkpoint is not None
        return self.checkpoint.tensors[name].shape

    def matrix(self, head: bool) -> str | None:
        """The tensor that is its embedding, or its head; None without weights."""
        return self.head if head and self.head is not None else self.embedding


def open_side(said: str, what: str, *, weights_needed: bool) -> Side:
    """A model by folder or Hub id.

    Args:
        what: 'MODEL' or 'DONOR', for messages.
        weights_needed: else a folder with a tokenizer alone will do.
    Raises:
        RecipeError: no reference. ModelError: nothing there, no tokenizer, an adapter, quantised weights, or embeddings that
        cannot be told. CorruptedError: damaged files.
    """
    problems: list[str] = []
    warnings: list[str] = []
    reference: Reference | None = read_reference(said, what, [Path.cwd()], problems, warnings)
    if reference is not None:
        problems += [f"{what}: {problem}" for problem in reference.problems]
        if reference.adapter is not None:
            problems.append(f"{what}: '{said}' names an adapter. Fold it first (`anabranch lora apply BASE ADAPTER OUT`), and "
                            "give the result")
    if problems or reference is None:
        raise RecipeError.of("vocabulary: models that cannot be opened:", problems)
    folder = resolve(reference.path, reference.revision)
    vocabulary = read_vocabulary(folder, what)
    if vocabulary is None:
        raise ModelError(f"{what} {said}: no tokenizer (tokenizer.json) in {folder}. Copy its tokenizer files there.")
    side = Side(said, folder, None, vocabulary, keys_of(vocabulary))
    if not weights_needed and not any(folder.glob("*.safetensors")):
        return side
    return _with_weights(side, what)


def _with_weights(side: Side, what: str) -> Side:
    checkpoint = Checkpoint.open(side.folder)
    if (packed := quantisation(checkpoint)) is not None:
        raise ModelError(f"{what} {side.label}: its weights are packed ({packed}), and rows of them cannot be made. Give the "
                         "model in bfloat16, float16 or float32.")
    places = layout_of(checkpoint).places
    counting = {name: checkpoint.tensors[name].shape for name, place in places.items() if place.embedding}
    inputs = [n for n, shape in counting.items() if len(shape) == 2 and places[n].part == "pre"]
    heads = [n for n, shape in counting.items() if len(shape) == 2 and places[n].part == "post"]
    if len(inputs) == 1 and not heads:  # a head as padded as the embedding, with more rows than config.json says
        heads = [n for n, place in places.items() if place.layer is None and n.endswith(".weight")
                 and OUTPUT.match(n.split(".")[-2]) and checkpoint.tensors[n].shape == counting[inputs[0]]]
    if len(inputs) != 1 or len(heads) > 1:
        raise ModelError(f"{what} {side.label}: wanted one input embedding and at most one head, found "
                         f"{_listed(inputs)} and {_listed(heads)}. A vocabulary is moved in models of one text tower; take "
                         "its language model out first.")
    if not heads and (lost := [n for n, place in places.items() if place.layer is None and n.split(".")[-2:-1] == ["lm_head"]
                               and n.endswith(".weight")]):
        raise ModelError(f"{what} {side.label}: {lost[0]} has {checkpoint.tensors[lost[0]].shape[0]} rows, and "
                         f"{inputs[0]} has {counting[inputs[0]][0]}: which of its rows are which tokens cannot be told. Save "
                         "the model anew with transformers.")
    biases = [n for n, shape in counting.items() if len(shape) == 1]
    odd = [n for n in [*inputs, *heads, *biases] if checkpoint.tensors[n].dtype not in FLOATS]
    if odd:
        raise ModelError(f"{what} {side.label}: {', '.join(odd)} is {checkpoint.tensors[odd[0]].dtype}, wanted one of "
                         f"{', '.join(FLOATS)}.")
    head = heads[0] if heads else None
    if head is not None and counting.get(head, checkpoint.tensors[head].shape)[0] < counting[inputs[0]][0]:
        least = max(side.vocabulary.ids.values(), default=-1) + 1
        if checkpoint.tensors[head].shape[0] < least:
            raise ModelError(f"{what} {side.label}: {head} has {checkpoint.tensors[head].shape[0]} rows, and the tokenizer has "
                             f"ids up to {least - 1}, which {inputs[0]} has rows for. Save the model anew with transformers.")
    dropped: tuple[str, ...] = ()
    if head is not None and checkpoint.ties_embeddings and checkpoint.read(head).equal(checkpoint.read(inputs[0])):
        dropped = (head,)
        head = None
    return Side(side.label, side.folder, checkpoint, side.vocabulary, side.keys, inputs[0], head,
                biases[0] if biases else None, head is None, dropped)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# ----------------------------------------------------------------------------------------------------------- special tokens

ROLES = tuple(name.removesuffix("_token") for name in NAMED)


def special_ids(donor: Side, generation: bool) -> dict[str, Any]:
    """`eos_token_id` and the like as the donor has them: of its generation config, its config, its tokenizer, in this order
    (the first only where `generation`)."""
    path = donor.folder / GENERATION
    said = [parse_object(path.read_bytes(), path)] if generation and path.is_file() else []
    config = donor.config
    inner = config.get("text_config")
    said += [config, *([inner] if isinstance(inner, dict) else [])]
    roles = {role: donor.vocabulary.ids[token] for role, token in roles_of(donor.vocabulary).items()}
    found = {}
    for role in ROLES:
        key = f"{role}_token_id"
        given = [part[key] for part in said if part.get(key) is not None]
        if given or role in roles:
            found[key] = given[0] if given else roles[role]
    return found


def with_donor_ids(config: dict[str, Any], mapped: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """A config whose ids were mapped token by token, with the donor's own for the roles: wherever such a key stood, and at the
    top. Roles that the donor has not, become null."""
    out = dict(mapped)
    for key, value in config.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _replaced(value, out[key], ids)
    return _replaced(config, out, ids) | {key: value for key, value in ids.items() if value is not None and _main(key, config)}


def _main(key: str, config: dict[str, Any]) -> bool:
    return key in ("bos_token_id", "eos_token_id", "pad_token_id") or key in config


def _replaced(before: dict[str, Any], after: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    roles = {f"{role}_token_id" for role in ROLES}
    return {key: ids.get(key) if key in roles and key in before else value for key, value in after.items()}


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
