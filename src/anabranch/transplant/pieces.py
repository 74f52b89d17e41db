"""A tokenizer that takes a piece of text as it stands: nothing in front, nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anabranch.surgery.vocabulary import Vocabulary
from anabranch.transplant.matching import Key, Keys, greedy_pieces

# Normalisers that put something in front of a text, or take its spaces away.
FRAMING = ("Prepend", "Strip")


def bare_tokenizer(vocabulary: Vocabulary) -> Any:
    """A `tokenizers.Tokenizer` without word-start marks in front of a text, special tokens, truncation and padding."""
    from tokenizers import Tokenizer

    content = {**vocabulary.content, "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps({**content, **{stage: _bare(content.get(stage)) for stage in
                                                        ("normalizer", "pre_tokenizer")}}, ensure_ascii=False))


def whole_tokenizer(vocabulary: Vocabulary) -> Any:
    """The `tokenizers.Tokenizer` as the model's users have it, without truncation and padding."""
    from tokenizers import Tokenizer

    content = {**vocabulary.content, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False))


PROBES = ("Hello world, it's 12345 of them.", "naïve café — «où» \U0001f642 日本語", "def f(x):\n\t return  x+1\n\n",
          " DON'T  stop 3.14%")


def loads_otherwise(folder: Path, vocabulary: Vocabulary) -> str | None:
    """How transformers' AutoTokenizer reads this folder, where that is not what its tokenizer.json says; else None.

    transformers 5 builds the tokenizer of some model types (qwen2 among them) from a class of its own, whatever the folder's
    tokenizer_config.json names, and keeps only vocabulary and merges of tokenizer.json.
    """
    from transformers import AutoTokenizer

    wanted = whole_tokenizer(vocabulary)
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        differ = [text for text in PROBES if loaded(text, add_special_tokens=False)["input_ids"]
                  != wanted.encode(text, add_special_tokens=False).ids]
    except Exception as error:  # whatever stands in its way, in its own words
        return f"AutoTokenizer cannot load it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if not differ:
        return None
    return f"AutoTokenizer loads it as {type(loaded).__name__}, which cuts {len(differ)} of {len(PROBES)} samples otherwise"


def _bare(stage: Any) -> Any:
    if not isinstance(stage, dict) or stage.get("type") in FRAMING:
        return None
    out = dict(stage)
    for members in ("normalizers", "pretokenizers"):
        if isinstance(out.get(members), list):
            out[members] = [kept for one in out[members] if (kept := _bare(one)) is not None]
    if out.get("type") == "ByteLevel":
        out["add_prefix_space"] = False
    if out.get("type") == "Metaspace":
        out["prepend_scheme"] = "never"
        out.pop("add_prefix_space", None)
    return out


def written(keys: Keys, vocabulary: Vocabulary, number: int) -> bytes:
    """What a token writes; where that is not known, its spelling: '##ing' goes on a word, all others begin one."""
    text = keys.text(number)
    if text is not None:
        return text
    token = vocabulary.tokens[number]
    return (token[2:] if token.startswith("##") else f" {token}").encode()


def own_pieces(model: Vocabulary, keys: Keys, rows: int, texts: Sequence[bytes]) -> list[list[int]]:
    """Each text as the model's tokenizer cuts it. Bytes that are no text by themselves: token by token, longest first."""
    tokenizer = bare_tokenizer(model)
    usable = {key: number for key, number in keys.ids.items() if number < rows}
    found = []
    for text in texts:
        try:
            ids = tokenizer.encode(text.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            ids = greedy_pieces(text, usable)
        found.append([number for number in ids if number < rows])
    return found


def splitter(usable: dict[Key, int], texts: Callable[[int], bytes],
             own: dict[int, int]) -> Callable[[Sequence[int], bool], list[list[int]]]:
    """Cuts donor tokens into the longest of the model's tokens, if wanted without the token itself (`own`: donor id -> row)."""
    def split(numbers: Sequence[int], apart: bool) -> list[list[int]]:
        return [greedy_pieces(texts(n), usable, without=own.get(n) if apart else None) for n in numbers]

    return split
