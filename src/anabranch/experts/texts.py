"""Texts for measuring and calibrating routers: a .txt file of one text a line, or .jsonl / .json rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import RecipeError

FIELDS = ("text", "prompt", "content")
LONGEST = 512


def read_texts(path: Path, option: str) -> list[str]:
    """The texts of a file, empty ones left out.

    A row of JSON is a string, or an object with `text`, `prompt` (and `completion`, joined to it), or `messages`.
    Raises RecipeError: unreadable, a row that is none of these, or no text at all; all problems in one message.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{option} {path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{option} {path}: not text in UTF-8 ({error}).") from error
    if path.suffix not in (".json", ".jsonl"):
        texts = content.splitlines()
    else:
        problems: list[str] = []
        texts = []
        for number, row in _rows(content, path, problems):
            if (text := _text_of(row)) is None:
                problems.append(f"row {number}: wanted a string, or an object with {', '.join(FIELDS)} or messages")
            else:
                texts.append(text)
        if problems:
            shown = problems[:20] + ([f".. and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise RecipeError.of(f"{option} {path}:", shown)
    found = [text for text in texts if text.strip()]
    if not found:
        raise RecipeError(f"{option} {path}: holds no text.")
    return found


def _rows(content: str, path: Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".json":
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            problems.append(f"not valid JSON: {error}")
            return
        yield from enumerate(rows if isinstance(rows, list) else [rows], 1)
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                problems.append(f"row {number}: not valid JSON ({error})")


def _text_of(row: Any) -> str | None:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return None
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "\n".join(m["content"] for m in messages)
    text = next((row[key] for key in FIELDS if isinstance(row.get(key), str)), None)
    answer = row.get("completion")
    return text + answer if text is not None and isinstance(answer, str) else text


def token_ids(texts: Sequence[str], tokenizer: Any, what: str, warnings: list[str]) -> list[list[int]]:
    """Ids of each text as the tokenizer gives them, cut to LONGEST; texts without a token left out.

    `warnings` gets a line, about `what`, where texts were cut.
    """
    found = [ids for text in texts if (ids := tokenizer(text)["input_ids"])]
    if long := sum(len(ids) > LONGEST for ids in found):
        warnings.append(f"{what}: {long} of {len(found)} texts are longer than {LONGEST} tokens; routing is measured and "
                        "trained on so many of each")
    return [ids[:LONGEST] for ids in found]
