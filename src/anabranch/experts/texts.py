"""Texts for measuring and calibrating routers: a .txt file of one text a line, or .jsonl / .json rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import RecipeError

FIELDS = ("text", "prompt", "content")
WANTED = "text, content, messages, or prompt + completion"
ANSWERS = ("response", "answer", "output", "chosen")  # what others call a completion
LONGEST = 512


def read_texts(path: Path, option: str) -> list[str]:
    """The texts of a file, empty ones left out.

    A row of JSON is a string, or an object with `text`, `content`, `messages`, or `prompt` and `completion`, which are
    joined (strings, or lists of messages). A prompt stands alone only where nothing looks like its completion.
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
                problems.append(f"row {number}: wanted a string, or an object with {WANTED}")
            elif (stray := _answer_elsewhere(row)) is not None:
                problems.append(f"row {number}: has `prompt` and `{stray}`; call what follows a prompt `completion`")
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
    if (said := _said(row.get("messages"))) is not None:
        return said
    if isinstance(row.get("prompt"), list):  # a conversation, and its next message
        before, after = _said(row["prompt"]), _said(row.get("completion", []))
        return None if before is None or after is None else "\n".join(part for part in (before, after) if part)
    key = next((key for key in FIELDS if isinstance(row.get(key), str)), None)
    if key is None:
        return None
    text, answer = row[key], row.get("completion")
    if key != "prompt" or answer is None:
        return str(text)
    return text + answer if isinstance(answer, str) else None


def _said(messages: Any) -> str | None:
    if isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        return "\n".join(m["content"] for m in messages)
    return None


def _answer_elsewhere(row: Any) -> str | None:
    """The key of a row with a prompt under which its completion seems to stand."""
    if not isinstance(row, dict) or "completion" in row or any(row.get(key) for key in ("messages", "text")):
        return None
    return next((key for key in ANSWERS if "prompt" in row and row.get(key)), None)


def token_ids(texts: Sequence[str], tokenizer: Any, what: str, warnings: list[str]) -> list[list[int]]:
    """Ids of each text as the tokenizer gives them, cut to LONGEST; texts without a token left out.

    `warnings` gets a line, about `what`, where texts were cut.
    """
    found = [ids for text in texts if (ids := tokenizer(text)["input_ids"])]
    if long := sum(len(ids) > LONGEST for ids in found):
        warnings.append(f"{what}: {long} of {len(found)} texts are longer than {LONGEST} tokens; routing is measured and "
                        "trained on so many of each")
    return [ids[:LONGEST] for ids in found]
