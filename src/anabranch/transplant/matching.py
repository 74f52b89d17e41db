"""Which token of one tokenizer is which of another's, by what it stands for rather than by how it is spelled.

    ('special', 'eos')       a role that the tokenizer names: bos matches bos, whatever its text
    ('text', b' hello')      the bytes that a token writes: byte-level 'Ġhello' and sentencepiece '▁hello' alike
    ('byte', 10)             a byte-fallback token such as '<0x0A>'
    ('spelling', '##ing')    as spelled, where a tokenizer writes neither bytes nor word marks (WordPiece, word lists)

MergeKit compares spellings (merge specification, 7.5), so that between a byte-level and a sentencepiece tokenizer no token with
a letter beyond ASCII matches, and byte-level 'é' (the byte 0xE9) matches the letter é, two bytes. Its word-start marks are
spaces here. What matches there otherwise, matches here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from anabranch.surgery.vocabulary import NAMED, SPECIAL_MAP, Vocabulary, token_text

Key = tuple[str, str | bytes | int]
Spelling = Literal["byte-level", "sentencepiece", "plain"]
Where = Literal["no", "yes", "embed", "lm_head"]

NOTHING, EXACT, BYTE, PREFIX, APPROXIMATED = range(5)
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>$")


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class Keys:
    """What each token of a tokenizer stands for.

    of        id -> its keys, the first that fits counts: its roles, then its text
    spelling  how the tokenizer writes text
    """

    of: dict[int, tuple[Key, ...]]
    spelling: Spelling

    @cached_property
    def ids(self) -> dict[Key, int]:
        """Key -> id. Of several tokens for one key the last counts."""
        return {key: number for number, keys in self.of.items() for key in keys}

    def text(self, number: int) -> bytes | None:
        """The bytes that a token writes; None where they are not known."""
        for kind, value in self.of.get(number, ()):
            if isinstance(value, bytes):
                return value
            if kind == "byte" and isinstance(value, int):
                return bytes([value])
        return None


def spelling_of(vocabulary: Vocabulary) -> Spelling:
    """How a tokenizer writes spaces and letters beyond ASCII."""
    if "byte-level" in vocabulary.kind:
        return "byte-level"
    stages = [vocabulary.content.get(stage) for stage in ("normalizer", "pre_tokenizer", "decoder")]
    said = json.dumps(stages, ensure_ascii=False)
    return "sentencepiece" if "Metaspace" in said or "\u2581" in said else "plain"


def roles_of(vocabulary: Vocabulary) -> dict[str, str]:
    """Role ('eos') -> token, of those that the tokenizer has."""
    said: dict[str, Any] = json.loads(vocabulary.files.get(SPECIAL_MAP, b"{}"))
    settings = vocabulary.settings
    found = {name.removesuffix("_token"): settings.get(name) or said.get(name) for name in NAMED}
    return {role: token_text(token) for role, token in found.items()
            if isinstance(token, str | dict) and token_text(token) in vocabulary.ids}


def keys_of(vocabulary: Vocabulary) -> Keys:
    """What each of a tokenizer's tokens stands for, by ascending id."""
    spelling = spelling_of(vocabulary)
    roles: dict[str, list[str]] = {}
    for role, token in roles_of(vocabulary).items():
        roles.setdefault(token, []).append(role)
    return Keys({number: (*(("special", role) for role in roles.get(token, ())),
                          _key(token, spelling, token in vocabulary.added))
                 for token, number in vocabulary.ids.items()}, spelling)


def _key(token: str, spelling: Spelling, added: bool) -> Key:
    if spelling == "sentencepiece" and (found := BYTE_TOKEN.match(token)):
        return "byte", int(found[1], 16)
    if added:
        return "text", token.encode()
    if spelling == "byte-level":
        known = all(c in ALPHABET for c in token)
        return "text", bytes(ALPHABET[c] for c in token) if known else token.encode()
    if spelling == "sentencepiece":
        return "text", token.replace("\u2581", " ").encode()
    return "spelling", token


@dataclass(frozen=True)
class Matches:
    """For each row of the result where it comes from.

    kind  uint8 [rows]: NOTHING (no token has this id), EXACT, BYTE, PREFIX, APPROXIMATED
    row   int64 [rows]: the model's row for the first three kinds, else -1
    """

    kind: np.ndarray
    row: np.ndarray

    def of(self, *kinds: int) -> np.ndarray:
        """Ids of these kinds, ascending."""
        return np.flatnonzero(np.isin(self.kind, kinds))


def match(model: Keys, donor: Keys, usable: Mapping[Key, int], rows: int, *, byte: bool = False,
          prefix: bool = False) -> Matches:
    """The model's token for each of the donor's.

    Args:
        usable: the model's keys and rows that may be matched (`usable_keys`).
        rows: of the result, more than the donor's highest id.
        byte: a token of one byte also matches the other side's byte-fallback token for it.
        prefix: a text without a match takes the row of its longest proper prefix that has one and is not all white space.
            Texts in UTF-8 are cut between characters. Special tokens have no prefixes.
    """
    kind, row = np.zeros(rows, dtype=np.uint8), np.full(rows, -1, dtype=np.int64)
    specials = {key for keys in donor.of.values() for key in keys if len(keys) > 1}
    for number, keys in donor.of.items():
        found = next((usable[key] for key in keys if key in usable), None)
        how = EXACT
        if found is None and byte:
            found, how = usable.get(_as_byte(keys[-1])), BYTE
        if found is None and prefix and keys[-1] not in specials:
            found = next((usable[p] for p in _prefixes(keys[-1]) if p in usable), None)
            how = PREFIX
        kind[number], row[number] = (APPROXIMATED, -1) if found is None else (how, found)
    return Matches(kind, row)


def usable_keys(keys: Keys, rows: int, left_out: np.ndarray | None = None) -> dict[Key, int]:
    """Keys whose token has a row, less those of tokens where `left_out` (bool [rows]) is true."""
    return {key: number for number, all_of in keys.of.items() for key in all_of
            if number < rows and not (left_out is not None and left_out[number])}


def _as_byte(key: Key) -> Key:
    """The other spelling of a token of one byte; a key that nothing has, for all others."""
    kind, value = key
    if kind == "byte" and isinstance(value, int):
        return "text", bytes([value])
    if kind == "text" and isinstance(value, bytes) and len(value) == 1:
        return "byte", value[0]
    return "none", ""


def _prefixes(key: Key) -> Iterator[Key]:
    """Proper prefixes, longest first, without those that are white space alone."""
    kind, value = key
    if isinstance(value, int) or kind not in ("text", "spelling"):
        return
    if isinstance(value, bytes):
        try:
            text: str | bytes = value.decode()
        except UnicodeDecodeError:
            text = value
    else:
        text = value
    for stop in range(len(text) - 1, 0, -1):
        part = text[:stop]
        if part.strip():
            yield kind, part.encode() if isinstance(part, str) and kind == "text" else part


def greedy_pieces(text: bytes, usable: Mapping[Key, int], *, without: int | None = None, longest: int = 64) -> list[int]:
    """Rows of the longest tokens that make up `text`, from its beginning on; bytes that no token writes are left out.

    Args:
        without: a row that may not be used: the token itself, to take it apart.
        longest: bytes of the longest token that is tried.
    """
    found, at = [], 0
    while at < len(text):
        for stop in range(min(len(text), at + longest), at, -1):
            row = usable.get(("text", text[at:stop]))
            if row is None and stop == at + 1:
                row = usable.get(("byte", text[at]))
            if row is not None and row != without:
                found.append(row)
                at = stop
                break
        else:
            at += 1
    return found
