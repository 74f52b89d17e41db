"""The tokenizer of a model folder: which token has which id, as transformers would load it.

    tokenizer.json            vocabulary, merges, added tokens; the ids of added tokens there are a remark, not a rule
    tokenizer_config.json     `added_tokens_decoder` and named tokens (`eos_token`, ..) that may add further ones
    special_tokens_map.json, added_tokens.json     older spellings of the same, read where the decoder is missing

Ids come from the `tokenizers` library, after the tokens that transformers (5.23, `TokenizersBackend.__init__`) adds on
loading: whoever trained the model saw those ids.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from anabranch.artifacts import digest, file_digest
from anabranch.errors import AnabranchError, CorruptedError, ModelError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
# Vocabularies in other forms. They say the same as tokenizer.json, and no longer do once that is changed.
OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm",
               "target.spm", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "qwen.tiktoken")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens and ids, with what is needed to write it again.

    ids      token -> id, by ascending id
    added    added tokens (matched before the model's own pieces): token -> flags, by ascending id
    kind     how it spells its tokens: 'BPE, byte-level', 'Unigram', 'WordPiece', ..
    content  tokenizer.json as it is loaded, its added tokens complete
    files    the files it was read from, by name (no chat templates)
    """

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    kind: str
    content: dict[str, Any]
    files: dict[str, bytes]

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.files[SETTINGS]) if SETTINGS in self.files else {}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """id -> token."""
        return {number: token for token, number in self.ids.items()}

    def without_files(self) -> Vocabulary:
        """Tokens, ids and flags only: a tenth of the memory."""
        return replace(self, content={}, files={})


def has_tokenizer(folder: Path) -> bool:
    return (folder / TOKENIZER).is_file() or any((folder / name).is_file() for name in OTHER_FORMS)


def read_vocabulary(folder: Path, label: str) -> Vocabulary | None:
    """The tokenizer of a model folder; None where it has none at all.

    Raises:
        CorruptedError: a damaged file. ModelError: a tokenizer that has no tokenizer.json and cannot be converted.
    """
    if not has_tokenizer(folder):
        return None
    names = (TOKENIZER, SETTINGS, SPECIAL_MAP, ADDED)
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if TOKENIZER not in files:
        files = _converted(folder, label)
    return _load(files, folder, label)


def files_digest(folder: Path) -> str:
    """Equal digests: equal tokenizers. Models of one family mostly share theirs, and one reading serves them all."""
    names = (TOKENIZER, SETTINGS, SPECIAL_MAP, ADDED, *OTHER_FORMS)
    return digest([[name, file_digest(folder / name)] for name in names if (folder / name).is_file()])


def _load(files: dict[str, bytes], folder: Path, label: str) -> Vocabulary:
    from tokenizers import Tokenizer

    parsed = {name: parse_object(data, folder / name) for name, data in files.items()}
    try:
        tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
        tokenizer.add_tokens(_tokens_to_add(tokenizer, parsed))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        words = " ".join(str(error).split())[:200]
        raise CorruptedError(f"{folder / TOKENIZER}: the tokenizer of {label} cannot be loaded ({words}). Fetch the "
                             "tokenizer's files again.") from error
    ids: dict[str, int] = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
    added = {token.content: {flag: getattr(token, flag) for flag in FLAGS}
             for _, token in sorted(tokenizer.get_added_tokens_decoder().items())}
    content = {**parsed[TOKENIZER], "added_tokens": added_list(added, ids)}
    return Vocabulary(ids, added, _kind(content), content, files)


def _kind(content: dict[str, Any]) -> str:
    model = content["model"]
    guess = "Unigram" if isinstance(model["vocab"], list) else "BPE" if "merges" in model else "WordPiece"
    byte_level = "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    return str(model.get("type", guess)) + (", byte-level" if byte_level else "")


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object, or CorruptedError."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CorruptedError(f"{path}: cannot be read as JSON ({error}). Fetch this file again.") from error
    if not isinstance(value, dict):
        raise CorruptedError(f"{path}: holds {type(value).__name__}, wanted an object. Fetch this file again.")
    return value


def added_list(added: dict[str, dict[str, Any]], ids: dict[str, int]) -> list[dict[str, Any]]:
    """`added_tokens` of tokenizer.json, by ascending id."""
    return [{"id": ids[token], "content": token, **added[token]} for token in sorted(added, key=lambda t: ids[t])]


def _tokens_to_add(tokenizer: Any, parsed: dict[str, dict[str, Any]]) -> list[Any]:
    """What transformers adds to the tokenizer of tokenizer.json when it loads a folder, in its order."""
    from tokenizers import AddedToken

    settings = dict(parsed.get(SETTINGS, {}))
    if "added_tokens_decoder" in settings:
        by_id = sorted((int(number), token) for number, token in (settings["added_tokens_decoder"] or {}).items())
        add = [AddedToken(t["content"], **{f: bool(t[f]) for f in FLAGS if f in t}) for _, t in by_id]
    else:
        settings |= {key: value for key, value in parsed.get(SPECIAL_MAP, {}).items() if value}
        special = set(special_texts(settings))
        by_id = sorted((number, token) for token, number in parsed.get(ADDED, {}).items())
        add = [AddedToken(t, special=t in special, normalized=t not in special) for _, t in by_id]
    known = {token.content for token in [*add, *tokenizer.get_added_tokens_decoder().values()]}
    return add + [AddedToken(t, special=True, normalized=False) for t in special_texts(settings) if t not in known]


def special_texts(settings: dict[str, Any]) -> list[str]:
    """The special tokens that tokenizer_config.json (or special_tokens_map.json) names, without repetition."""
    own = [key for key in settings if key.endswith("_token") and key not in NAMED]
    values = [settings.get(key) for key in (*NAMED, *own)]
    for listed in (settings.get(key) or () for key in LISTED):
        values += listed.values() if isinstance(listed, dict) else listed
    return list(dict.fromkeys(token_text(value) for value in values if isinstance(value, str | dict) and value))


def token_text(token: Any) -> str:
    """A token's text: settings spell it as a string, or as an object with flags."""
    return token["content"] if isinstance(token, dict) else token


def _converted(folder: Path, label: str) -> dict[str, bytes]:
    """The files of a fast tokenizer, where transformers can make one of a sentencepiece model or a word list.

    Raises ModelError.
    """
    found = [name for name in OTHER_FORMS if (folder / name).is_file()]
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise AnabranchError("it has no fast form")
        with tempfile.TemporaryDirectory() as temporary:
            tokenizer.save_pretrained(temporary)
            names = (TOKENIZER, SETTINGS, SPECIAL_MAP, ADDED)
            return {n: (Path(temporary) / n).read_bytes() for n in names if (Path(temporary) / n).is_file()}
    except Exception as error:  # whatever is wrong with a tokenizer or missing on this machine, in its library's words
        words = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{label}: its tokenizer has no {TOKENIZER}, only {', '.join(found)}, and transformers cannot convert it "
            f"({type(error).__name__}: {words}). Convert it once where that works (it may need `pip install "
            "sentencepiece protobuf`): `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`.") from error


def tokenizer_differences(folders: Sequence[Path], labels: Sequence[str], base: int | None = None) -> list[str]:
    """Warnings for a merge that takes vocabularies to be the same: inputs whose ids mean other tokens than the base's
    (without a base, the first input's).

    Inputs without a tokenizer.json are passed over: such a merge does not need it. Raises CorruptedError.
    """
    reference = 0 if base is None else base
    if not (folders[reference] / TOKENIZER).is_file():
        return []
    told_of = {files_digest(folders[reference]): ""}
    first = read_vocabulary(folders[reference], labels[reference])
    assert first is not None
    first = first.without_files()
    out = []
    for folder, label in zip(folders, labels, strict=True):
        if not (folder / TOKENIZER).is_file():
            continue
        key = files_digest(folder)
        if key not in told_of:
            v = read_vocabulary(folder, label)
            assert v is not None
            told_of[key] = _difference(v, first, labels[reference])
        if told_of[key]:
            out.append(f"{label}: {told_of[key]}")
    return out


def _difference(v: Vocabulary, first: Vocabulary, reference: str) -> str:
    """What sets it apart from `first`, the tokenizer of `reference`; '' where ids mean the same."""
    if v.ids == first.ids:
        return ""
    moved = [f"{t!r} is {first.ids[t]} there and {i} here" for t, i in v.ids.items() if first.ids.get(t, i) != i]
    clash = [f"{i} is {first.tokens[i]!r} there and {t!r} here" for t, i in v.ids.items()
             if t not in first.ids and i in first.tokens and first.tokens[i] not in v.ids]
    extra = [t for t, i in v.ids.items() if t not in first.ids and i not in first.tokens]
    lacks = [t for t, i in first.ids.items() if t not in v.ids and i not in v.tokens]
    told = [f"{len(x)} {what} ({some(x, 3)})" for x, what in
            ((moved, "tokens with other ids"), (clash, "ids with other tokens"), (extra, "tokens more"),
             (lacks, "tokens less")) if x]
    mixed = ("Rows are merged by number, so rows of different tokens mix" if moved or clash else
             "The rows of these tokens have no counterpart")
    return (f"its tokenizer is not that of {reference}: {'; '.join(told)}. {mixed}. Add `tokenizer: {{source: union}}` "
            "(or base) to the config.")


def some(names: Sequence[str], shown: int = 6) -> str:
    """The first few of them, for a message."""
    rest = f", and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
