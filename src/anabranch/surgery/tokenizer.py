"""One tokenizer for a merge, and which row of which input each of its tokens gets.

    plan_tokenizer        the merged tokenizer: the base's, another input's, or the union of all
    TokenizerPlan         its files, its size, and row maps for the embeddings (`embedding_rows`)
    carry_tokenizer       the donor's tokenizer as it is, for merges that leave tokenizers alone
    tokenizer_differences what such a merge should tell the user

Ids are fixed by listing order: the base keeps its ids, then come the other inputs' new tokens, input by input, by
ascending id there, then tokens that only the config names. MergeKit visits a hash map here, and each run of it gives
other ids (merge specification, 5.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.errors import ModelError, PlanError
from anabranch.surgery.chat_templates import missing_tokens
from anabranch.surgery.embedding_rows import PADDING as PADDING
from anabranch.surgery.embedding_rows import ZERO, Chosen, RowMaps, row_maps
from anabranch.surgery.embedding_rows import RowMap as RowMap
from anabranch.surgery.embedding_rows import padding_row as padding_row
from anabranch.surgery.embedding_rows import rows as rows
from anabranch.surgery.side_files import GENERATION, carried, generation_config, is_processor, new_ids_in
from anabranch.surgery.side_files import carry_tokenizer as carry_tokenizer
from anabranch.surgery.side_files import ids_in as ids_in
from anabranch.surgery.vocabulary import (
    ADDED,
    LISTED,
    NAMED,
    SETTINGS,
    SPECIAL_MAP,
    TOKENIZER,
    Vocabulary,
    added_list,
    files_digest,
    read_vocabulary,
    some,
    token_text,
)
from anabranch.surgery.vocabulary import tokenizer_differences as tokenizer_differences

PLAIN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class TokenRow:
    """A row of one input: that of `token` in its own tokenizer, or number `token_id`; with neither, that of the same
    token."""

    input: int
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class ZeroRow:
    """A row of zeros."""


@dataclass(frozen=True)
class TokenRule:
    """What the config says about one token. No `source`: the usual rule. `force`: the row replaces every input's own."""

    source: TokenRow | ZeroRow | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerRequest:
    """The `tokenizer:` block of a config. `source` is an input's number, or a word."""

    source: Literal["union", "base"] | int = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class TokenizerPlan:
    """The merged tokenizer.

    size         rows of the merged embeddings, padding included: the config's new vocabulary size
    tokens       rows before padding: the highest id + 1
    own          for each input, int64 [size]: its own row for each token, -1 where it has none
    files        the tokenizer's files and generation_config.json, by name
    special_ids  ids that the donor's config.json and generation_config.json mention -> ids of the same tokens in the
                 merged tokenizer; those that it lacks are left out
    warnings     for the user, once
    """

    size: int
    tokens: int
    own: dict[int, np.ndarray]
    base: int | None
    chosen: Chosen
    forced: np.ndarray
    files: dict[str, bytes | Path]
    special_ids: dict[int, int]
    role_ids: dict[str, int]
    labels: tuple[str, ...]
    warnings: tuple[str, ...]

    def row_maps(self, inputs: Sequence[int]) -> RowMaps:
        """Row maps for a tensor that these inputs hold: default rows are taken from them alone.

        Raises:
            PlanError: the config takes a token's row from an input that is not among them.
        """
        outside = sorted({int(i) for i in self.chosen.input if i != ZERO} - set(inputs))
        if outside:
            raise PlanError(f"tokenizer.tokens: rows are to be taken from {', '.join(self.labels[i] for i in outside)}, "
                            "which has no such tensor in this part of the merge. Name one of "
                            f"{', '.join(self.labels[i] for i in inputs)}.")
        return row_maps({i: self.own[i] for i in sorted(set(inputs))}, base=self.base, chosen=self.chosen,
                        forced=self.forced)

    @property
    def rows_of(self) -> dict[int, RowMap]:
        """Row maps for a tensor that all inputs hold."""
        return self.row_maps(list(self.own)).maps

    @property
    def owned(self) -> np.ndarray:
        """bool [size]: rows that all inputs have from the same place, for a tensor that all inputs hold."""
        return self.row_maps(list(self.own)).owned

    def with_new_ids(self, config: dict[str, Any]) -> dict[str, Any]:
        """The donor's config.json (or a part of it) with token ids of the merged tokenizer, nested configs too.

        An id without a successor becomes that of the merged tokenizer's own token for the role, or null.
        """
        return new_ids_in(config, self.special_ids, self.role_ids)[0]


def plan_tokenizer(request: TokenizerRequest, folders: Sequence[Path], vocab_sizes: Sequence[int], base: int | None,
                   labels: Sequence[str], *, chat_template: str | None = None) -> TokenizerPlan:
    """The merged tokenizer and its row maps.

    Args:
        folders, vocab_sizes, labels: of every input, in listing order; a vocabulary size is the rows of its embedding.
        base: the base among them. Without one, the first input takes its place wherever ids and files are concerned.
        chat_template: a template to write instead of the one that comes with the tokenizer.

    Raises:
        PlanError: a request that cannot be met. ModelError, CorruptedError: a tokenizer that cannot be read.
    """
    _check_request(request, labels)
    warnings: list[str] = []
    donor = 0 if base is None else base
    inputs = _vocabularies(request, folders, labels, donor, warnings)
    _warn_inputs(inputs, vocab_sizes, labels, donor, warnings)
    origin = request.source if isinstance(request.source, int) else donor
    merged = inputs[origin]
    if not isinstance(request.source, int):
        merged = _stripped(merged, vocab_sizes[donor], labels[donor])
    if request.source == "union":
        merged = _united(merged, inputs, vocab_sizes, labels, donor, warnings)
    merged = _with_plain(merged, [t for t in request.tokens if t not in merged.ids])
    changed = merged.ids != inputs[origin].ids or merged.added != inputs[origin].added
    if changed:
        merged = _settled(merged)

    tokens = max(merged.ids.values(), default=-1) + 1
    multiple = request.pad_to_multiple_of or 1
    size = -(-tokens // multiple) * multiple
    own = {i: _own_rows(merged, v, vocab_sizes[i], size) for i, v in enumerate(inputs)}
    chosen, forced = _chosen(request, merged, inputs, vocab_sizes, labels, size)
    _warn_rows(merged, own, chosen, vocab_sizes[donor], size, labels[donor], warnings)

    if chat_template is not None:
        warnings += missing_tokens(chat_template, merged.ids, labels[origin])
    files = _files(merged, changed, folders[origin], chat_template, warnings)
    if origin != donor:
        files = {name: file for name, file in files.items() if not is_processor(name)}
        files |= {name: file for name, file in carry_tokenizer(folders[donor]).items() if is_processor(name)}
    special = {number: merged.ids[token] for number in ids_in(folders[donor])
               if (token := inputs[donor].tokens.get(number)) in merged.ids}
    settings = merged.settings
    roles = {key.removesuffix("_token"): merged.ids[token_text(settings[key])] for key in NAMED
             if settings.get(key) and token_text(settings[key]) in merged.ids}
    generation, lost = generation_config(folders[donor], special, roles)
    files.pop(GENERATION, None)
    if generation is not None:
        files[GENERATION] = generation
    if lost:
        warnings.append(f"{labels[donor]}: config.json or {GENERATION} names ids whose tokens the merged tokenizer lacks "
                        f"({'; '.join(lost)}).")
    return TokenizerPlan(size, tokens, own, base, chosen, forced, dict(sorted(files.items())), special, roles, tuple(labels),
                         tuple(warnings))


# ---- the inputs ------------------------------------------------------------------------------------------------------


def _check_request(request: TokenizerRequest, labels: Sequence[str]) -> None:
    problems = []
    numbers = [r.source.input for r in request.tokens.values() if isinstance(r.source, TokenRow)]
    if isinstance(request.source, int):
        numbers.append(request.source)
    if any(not 0 <= n < len(labels) for n in numbers):
        problems.append(f"an input number outside 0 .. {len(labels) - 1}")
    if request.pad_to_multiple_of is not None and request.pad_to_multiple_of < 1:
        problems.append(f"pad_to_multiple_of: got {request.pad_to_multiple_of}, wanted 1 or more")
    for token, rule in request.tokens.items():
        if not token:
            problems.append("tokens: an empty token")
        if isinstance(rule.source, TokenRow) and None not in (rule.source.token, rule.source.token_id):
            problems.append(f"tokens.{token}: both `token` and `token_id` are given; give one")
    if problems:
        raise PlanError.of("tokenizer: this cannot be done:", problems)


def _vocabularies(request: TokenizerRequest, folders: Sequence[Path], labels: Sequence[str], donor: int,
                  warnings: list[str]) -> list[Vocabulary]:
    """Every input's; an input that has no tokenizer at all is taken to have the donor's."""
    needed_whole = [donor, request.source] if isinstance(request.source, int) else [donor]
    read: dict[str, Vocabulary | None] = {}
    for number in dict.fromkeys([*needed_whole, *range(len(folders))]):
        key = files_digest(folders[number])
        if key not in read:
            v = read_vocabulary(folders[number], labels[number])
            read[key] = v if v is None or number in needed_whole else v.without_files()
    found = [read[files_digest(folder)] for folder in folders]
    for needed in needed_whole:
        if found[needed] is None:
            raise ModelError(f"{labels[needed]}: no tokenizer ({TOKENIZER}) in this model's folder, and the merge is to "
                             "take it from there. Copy its tokenizer files into the folder, or choose another "
                             "`tokenizer: {source: ..}`.")
    without = [label for label, v in zip(labels, found, strict=True) if v is None]
    if without:
        warnings.append(f"{', '.join(without)}: no tokenizer in the folder, so its ids are taken to be those of "
                        f"{labels[donor]}.")
    known = found[donor]
    assert known is not None
    return [known if v is None else v for v in found]


def _warn_inputs(inputs: Sequence[Vocabulary], vocab_sizes: Sequence[int], labels: Sequence[str], donor: int,
                 warnings: list[str]) -> None:
    """Tokens without a row in the very model they come with (the peer fails on them with a KeyError), and tokenizers
    that spell their tokens in another way."""
    for v, rows_there, label in zip(inputs, vocab_sizes, labels, strict=True):
        beyond = [token for token, number in v.ids.items() if number >= rows_there]
        if beyond:
            warnings.append(f"{label}: {len(beyond)} token(s) of its tokenizer have ids beyond the {rows_there} rows of "
                            f"its embedding ({some(beyond)}), and are treated as tokens that it does not have.")
        if v.kind != inputs[donor].kind:
            warnings.append(f"{label}: its tokenizer is {v.kind}, that of {labels[donor]} {inputs[donor].kind}. They spell the "
                            "same word as different tokens, so few rows of these models stand for the same thing.")


# ---- the merged vocabulary -------------------------------------------------------------------------------------------


def _stripped(v: Vocabulary, rows_there: int, label: str) -> Vocabulary:
    """Without the tokens that have no row: entries, merges that name or make them, special tokens, padding."""
    gone = {token for token, number in v.ids.items() if number >= rows_there}
    if not gone:
        return v
    model = dict(v.content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows_there]
    else:
        model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in gone}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [(m, m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
        model["merges"] = [m for m, (a, b) in pairs if not gone & {a, b, a + b[prefix:]}]
    content = {**v.content, "model": model}
    if (content.get("padding") or {}).get("pad_token") in gone:
        content["padding"] = None
    needed = {model.get("unk_token"), *_post_processor_tokens(content.get("post_processor"))} & gone
    if needed:
        raise PlanError(f"{label}: its tokenizer puts {some(sorted(map(str, needed)))} into every text, and the model has "
                        f"only {rows_there} rows, none for it. Give the model a tokenizer that fits it.")
    return replace(v, ids={t: i for t, i in v.ids.items() if t not in gone},
                   added={t: f for t, f in v.added.items() if t not in gone}, content=content)


def _post_processor_tokens(part: Any) -> set[str]:
    """The tokens that a post-processor inserts (TemplateProcessing, BertProcessing, RobertaProcessing, Sequence)."""
    if not isinstance(part, dict):
        return set()
    tokens = {part[key][0] for key in ("sep", "cls") if isinstance(part.get(key), list)}
    special = part.get("special_tokens")
    tokens |= set(special) if isinstance(special, dict) else set()
    return tokens.union(*(_post_processor_tokens(p) for p in part.get("processors") or ()))


def _united(merged: Vocabulary, inputs: Sequence[Vocabulary], vocab_sizes: Sequence[int], labels: Sequence[str],
            donor: int, warnings: list[str]) -> Vocabulary:
    """With every other input's tokens: input by input in listing order, by ascending id there.

    As in the peer, a subword of another model becomes an added token: matched as it is spelled, before the base's own
    pieces, and no merge comes with it.
    """
    ids, added = dict(merged.ids), dict(merged.added)
    number = max(ids.values(), default=-1) + 1
    subwords: list[str] = []
    differ: dict[str, list[str]] = {}
    first_label = dict.fromkeys(added, labels[donor])
    for v, rows_there, label in zip(inputs, vocab_sizes, labels, strict=True):
        if v is inputs[donor]:
            continue
        for token, there in v.ids.items():
            if there >= rows_there or not token:
                continue
            flags = v.added.get(token)
            if token not in ids:
                ids[token], number = number, number + 1
                added[token] = flags or PLAIN_FLAGS
                first_label[token] = label
                if flags is None:
                    subwords.append(token)
            elif flags and token not in added:
                added[token] = flags
                first_label[token] = label
            elif flags and flags != added[token]:
                differ.setdefault(f"{label} and {first_label[token]}", []).append(token)
    for pair, tokens in differ.items():
        warnings.append(f"{pair} do not agree on the settings (special, normalized, strip) of {some(tokens)}: those of "
                        "the latter hold.")
    if subwords:
        warnings.append(f"tokenizer union: {len(subwords)} entries of other vocabularies, no added tokens there "
                        f"({some(subwords)}), become added tokens of {labels[donor]}'s tokenizer. They match wherever their "
                        "spelling stands in a text, even inside a word, and no merges come with them: a union joins chat "
                        "tokens well and vocabularies badly. If the result writes or reads garbled text, take `tokenizer: "
                        "{source: base}`.")
    return replace(merged, ids=ids, added=added)


def _with_plain(merged: Vocabulary, new: Sequence[str]) -> Vocabulary:
    """With tokens that only the config names."""
    first = max(merged.ids.values(), default=-1) + 1
    return replace(merged, ids={**merged.ids, **{t: first + i for i, t in enumerate(new)}},
                   added={**merged.added, **dict.fromkeys(new, PLAIN_FLAGS)})


def _settled(merged: Vocabulary) -> Vocabulary:
    """With tokenizer.json rewritten, and checked: loaded, it gives each token just the id that is planned.

    The library numbers added tokens itself, from the size of the model's vocabulary on. Where that vocabulary has
    gaps this gives other ids, or even the same id twice, so there the new tokens enter the vocabulary too.
    """
    from tokenizers import Tokenizer

    content = {**merged.content, "added_tokens": added_list(merged.added, merged.ids)}
    in_model = dict(content["model"])
    if isinstance(in_model["vocab"], dict):
        in_model["vocab"] = {**in_model["vocab"], **{t: merged.ids[t] for t in merged.added}}
    error: object = "other ids than planned"
    for model in (content["model"], in_model):
        content = {**content, "model": model}
        written = _json(content)  # not the library's own spelling, which rounds a Unigram's scores
        try:
            tokenizer = Tokenizer.from_str(written)
        except Exception as failure:  # the library raises plain Exception for whatever it cannot read
            error = failure
            continue
        if tokenizer.get_vocab() == merged.ids:
            return replace(merged, content=content, files={**merged.files, TOKENIZER: _bytes(written)})
    raise PlanError(f"tokenizer: the merged tokenizer cannot be written in a form that loads with the planned ids ({error}). "
                    "Use `tokenizer: {source: base}`, or give the base's tokenizer ids without gaps.")


# ---- rows ------------------------------------------------------------------------------------------------------------


def _own_rows(merged: Vocabulary, v: Vocabulary, rows_there: int, size: int) -> np.ndarray:
    own = np.full(size, -1, dtype=np.int64)
    found = np.fromiter((v.ids.get(token, -1) for token in merged.ids), dtype=np.int64, count=len(merged.ids))
    own[np.fromiter(merged.ids.values(), dtype=np.int64, count=len(merged.ids))] = found
    own[own >= rows_there] = -1
    return own


def _chosen(request: TokenizerRequest, merged: Vocabulary, inputs: Sequence[Vocabulary], vocab_sizes: Sequence[int],
            labels: Sequence[str], size: int) -> tuple[Chosen, np.ndarray]:
    """The rows that the config chooses, and which tokens it forces."""
    forced = np.zeros(size, dtype=bool)
    picked: dict[int, tuple[int, int]] = {}
    problems = []
    for token, rule in request.tokens.items():
        number = merged.ids[token]
        forced[number] = rule.force
        if isinstance(rule.source, ZeroRow):
            picked[number] = (ZERO, 0)
        elif rule.source is not None:
            of, label = rule.source.input, labels[rule.source.input]
            wanted = token if rule.source.token is None else rule.source.token
            row = inputs[of].ids.get(wanted) if rule.source.token_id is None else rule.source.token_id
            if row is None:
                problems.append(f"{token}: its row is to be that of {wanted!r} in {label}, whose tokenizer has no such token")
            elif not 0 <= row < vocab_sizes[of]:
                problems.append(f"{token}: its row is to be number {row} of {label}, which has {vocab_sizes[of]} rows")
            else:
                picked[number] = (of, row)
    if problems:
        raise PlanError.of("tokenizer.tokens: rows that do not exist (name another model, `kind: model_token` with a token "
                           "that the model has, or `kind: zero`):", problems)
    places = np.array(sorted(picked), dtype=np.int64)
    pairs = np.array([picked[int(p)] for p in places], dtype=np.int64).reshape(-1, 2)
    return Chosen(places, pairs[:, 0], pairs[:, 1]), forced


def _warn_rows(merged: Vocabulary, own: dict[int, np.ndarray], chosen: Chosen, donor_rows: int, size: int, label: str,
               warnings: list[str]) -> None:
    held = np.stack(list(own.values())).max(0) >= 0
    held[chosen.token] = True
    nobody = [token for token, number in merged.ids.items() if not held[number]]
    if nobody:
        warnings.append(f"{len(nobody)} token(s) of the merged tokenizer have a row in no input ({some(nobody)}): they get "
                        "the mean of all other rows. `tokenizer.tokens` can give them a row.")
    if size < donor_rows:
        multiple = next((m for m in (512, 256, 128, 64, 32, 16, 8) if donor_rows % m == 0), donor_rows)
        fits = -(-size // multiple) * multiple == donor_rows
        remedy = f" `pad_to_multiple_of: {multiple}` keeps the size." if fits else ""
        warnings.append(f"{label} has {donor_rows} embedding rows and the merged tokenizer {size} tokens: rows without a "
                        f"token are dropped and vocab_size shrinks to {size}.{remedy}")


# ---- files -----------------------------------------------------------------------------------------------------------


def _files(merged: Vocabulary, changed: bool, origin: Path, chat_template: str | None,
           warnings: list[str]) -> dict[str, bytes | Path]:
    """The tokenizer's files by name: the origin's own, byte for byte, where nothing changes."""
    rewritten = _settings_files(merged, warnings) if changed else {}
    if not (origin / TOKENIZER).is_file():
        rewritten = rewritten or merged.files
    files, left_out = carried(origin, chat_template, rewritten=rewritten, outdated=changed)
    if left_out:
        warnings.append(f"{', '.join(left_out)}: not written, since they no longer say the same as the merged {TOKENIZER}.")
    return files


def _settings_files(merged: Vocabulary, warnings: list[str]) -> dict[str, bytes]:
    """tokenizer_config.json and its older companions, in agreement with the merged vocabulary."""
    files = dict(merged.files)
    dropped: set[str] = set()
    for name in (SETTINGS, SPECIAL_MAP):
        if name in files:
            settings = json.loads(files[name])
            for key in list(settings):
                if key in NAMED and settings[key] and token_text(settings[key]) not in merged.ids:
                    dropped.add(token_text(settings.pop(key)))
                elif key in LISTED and isinstance(settings[key], list):
                    dropped.update(token_text(t) for t in settings[key] if token_text(t) not in merged.ids)
                    settings[key] = [t for t in settings[key] if token_text(t) in merged.ids]
            if "added_tokens_decoder" in settings:
                settings["added_tokens_decoder"] = {str(t.pop("id")): t for t in added_list(merged.added, merged.ids)}
            files[name] = _bytes(_json(settings, indent=2))
    if ADDED in files:
        in_model = merged.content["model"]["vocab"]
        plain = set(in_model) if isinstance(in_model, dict) else {piece for piece, _ in in_model}
        files[ADDED] = _bytes(_json({t["content"]: t["id"] for t in added_list(merged.added, merged.ids)
                                         if t["content"] not in plain}, indent=2))
    if dropped:
        warnings.append(f"tokenizer: {some(sorted(dropped))} named as special tokens, but without a row: no longer named.")
    return files


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _bytes(content: str) -> bytes:
    return (content + "\n").encode()
