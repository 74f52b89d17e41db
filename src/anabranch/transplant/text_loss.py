"""What a model makes of a text: nats per byte, which means the same under any tokenizer.

A text is cut into windows between words, the same for every tokenizer, of as many bytes as the model's context has tokens (a
token writes at least one byte). In each window the first word is context and is not scored; the rest is tokenised by itself,
so that the scored tokens write exactly the scored bytes. Nothing depends on a begin-of-text token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.errors import MixtureError
from anabranch.model import batches, can_select, response_losses
from anabranch.rows import Rows

CUT = re.compile(r"(?<=\S) (?=\S)")
LONGEST = 2048
BATCH_TOKENS = 8192
PAIRS = (("text",), ("content",), ("prompt", "completion"), ("instruction", "output"))


@dataclass(frozen=True)
class Window:
    """`given`: the first word. `scored`: the rest, from the space on."""

    given: str
    scored: str


@dataclass(frozen=True)
class Loss:
    """nats_per_byte over `bytes` scored bytes, which are `tokens` tokens. `changed`: share of windows that the tokenizer does
    not give back as they were, whose loss is not that of the same bytes."""

    nats_per_byte: float
    bytes: int
    tokens: int
    changed: float = 0.0


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """The texts of a .txt (one text), .jsonl or .parquet file (one a row).

    `column`: one column, or several joined with '+' (a space between them). By default `text`, `content`, `prompt+completion`
    or `instruction+output`, the first that is there.

    Raises:
        MixtureError: not there, not readable, of another kind, no such column, no text in it.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            records: list[Any] = parquet.read_table(path).to_pylist()
        elif path.suffix in (".jsonl", ".json"):
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        elif path.suffix in (".txt", ".md"):
            return _some_text([path.read_text(encoding="utf-8")], path)
        else:
            raise MixtureError(f"--text {path}: wanted a .txt, .jsonl or .parquet file.")
    except MixtureError:
        raise
    except Exception as error:  # the system, JSON and pyarrow each have their own
        words = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise MixtureError(f"--text {path}: cannot be read ({words}).") from error
    if not all(isinstance(record, dict) for record in records):
        raise MixtureError(f"--text {path}: wanted one object per line, such as {{\"text\": \"..\"}}.")
    there = sorted({key for record in records for key, value in record.items() if isinstance(value, str)})
    columns = tuple(column.split("+")) if column else next((pair for pair in PAIRS if set(pair) <= set(there)), None)
    if columns is None or not set(columns) <= set(there):
        raise MixtureError(f"--text {path}: " + (f"no column `{column}` of text." if column else "which column is the text?") +
                           f" It has {', '.join(there) or 'no column of text'}: name one with --column, or several as A+B.")
    return _some_text([" ".join(str(record.get(name) or "") for name in columns) for record in records], path)


def _some_text(texts: list[str], path: Path) -> list[str]:
    found = [text for text in texts if text.strip()]
    if not found:
        raise MixtureError(f"--text {path}: holds no text.")
    return found


def windows(texts: Sequence[str], size: int, most: int) -> list[Window]:
    """Windows of at most `size` bytes; evenly spaced ones where all together are longer than `most` bytes.

    A window without a second word, or with a word longer than itself, is left out.
    """
    found = [window for text in texts for window in _windows_of(text, size)]
    total = sum(len(w.scored.encode()) for w in found)
    if total <= most:
        return found
    count = max(1, int(len(found) * most / total))
    return [found[int(i)] for i in np.linspace(0, len(found) - 1, count).round()]


def _windows_of(text: str, size: int) -> list[Window]:
    cuts = [0, *(m.start() for m in CUT.finditer(text)), len(text)]
    lengths = [len(text[a:b].encode()) for a, b in pairwise(cuts)]
    found, first = [], 0
    while first < len(lengths):
        last, held = first, 0
        while last < len(lengths) and held + lengths[last] <= size:
            held += lengths[last]
            last += 1
        if last - first > 1:
            found.append(Window(text[cuts[first]:cuts[first + 1]], text[cuts[first + 1]:cuts[last]]))
        first = max(last, first + 1)
    return found


def window_size(config: dict[str, Any]) -> int:
    """Bytes of a window: the context's length in tokens, at most LONGEST."""
    nested = config.get("text_config")
    inner = nested if isinstance(nested, dict) else config
    said = [inner.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")]
    return min([LONGEST, *(int(n) for n in said if isinstance(n, int) and n > 0)])


def loss_of(model: Any, tokenizer: Any, bare: Any, chosen: Sequence[Window]) -> Loss:
    """Loss of the scored bytes of these windows.

    Args:
        tokenizer: gives each window's first word its ids, with what it puts in front of a text (a `tokenizers.Tokenizer`).
        bare: the same, but puts nothing in front and behind (`pieces.bare_tokenizer`): for the scored part.
    """
    given = tokenizer.encode_batch([w.given for w in chosen], add_special_tokens=True)
    scored = bare.encode_batch([w.scored for w in chosen], add_special_tokens=False)
    rows = Rows.of([(_start(g) + s.ids, [0] * len(_start(g)) + [1] * len(s.ids))
                    for g, s in zip(given, scored, strict=True)])
    total = 0.0
    with torch.no_grad():
        select = can_select(model)
        for batch in batches(rows, np.arange(len(rows)), BATCH_TOKENS, next(model.parameters()).device):
            total += float(response_losses(model, batch, select=select)[0].double().sum())
    size = sum(len(w.scored.encode()) for w in chosen)
    changed = sum(not _same(bare.decode(s.ids, skip_special_tokens=False), w.scored)
                  for s, w in zip(scored, chosen, strict=True))
    return Loss(total / max(size, 1), size, int(rows.response.sum()), changed / max(len(chosen), 1))


def _start(encoding: Any) -> list[int]:
    """Ids of a beginning: less what the tokenizer puts behind a text."""
    last = max((i for i, word in enumerate(encoding.special_tokens_mask) if not word), default=len(encoding.ids) - 1)
    return list(encoding.ids[: last + 1])


def _same(one: str, other: str) -> bool:
    """Decoders may drop the space in front."""
    return one.removeprefix(" ") == other.removeprefix(" ")
