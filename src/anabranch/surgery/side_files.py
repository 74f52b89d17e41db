"""The files beside the weights that a merge carries along: tokenizer, chat templates, processor, generation config."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anabranch.surgery.vocabulary import ADDED, OTHER_FORMS, SETTINGS, SPECIAL_MAP, TOKENIZER, parse_object

GENERATION = "generation_config.json"
TEMPLATE, OLD_TEMPLATE, TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
# What turns images and sound into inputs. It belongs to the model, not to its tokenizer.
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json",
             "video_preprocessor_config.json")
# By pattern: further templates, tiktoken ranks, and the modules that `auto_map` names (copied, never run).
PATTERNS = (f"{TEMPLATES}/*.jinja", "*.tiktoken", "tokenization_*.py", "processing_*.py", "image_processing_*.py")
CARRIED = (TOKENIZER, SETTINGS, SPECIAL_MAP, ADDED, *OTHER_FORMS, TEMPLATE, OLD_TEMPLATE, *PROCESSOR, GENERATION)

ID_KEY = re.compile(r"(^|_)token_(id|ids|index)$")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")

NewId = Callable[[str, int], int | None]


def carry_tokenizer(folder: Path, chat_template: str | None = None) -> dict[str, bytes | Path]:
    """The donor's tokenizer, templates, processor and generation config, by name: as they are, for a merge that leaves
    tokenizers alone.

    Args:
        chat_template: takes the place of every template that the folder has; it is written as chat_template.jinja,
            which transformers reads before any other.
    """
    return carried(folder, chat_template)[0]


def carried(folder: Path, chat_template: str | None = None, *, rewritten: Mapping[str, bytes] | None = None,
            outdated: bool = False) -> tuple[dict[str, bytes | Path], list[str]]:
    """Files to write, and which of the folder's are left out: with `outdated`, the tokenizer's other forms, which
    `rewritten`, its new files, contradict."""
    names = {name for name in CARRIED if (folder / name).is_file()}
    names |= {path.relative_to(folder).as_posix() for pattern in PATTERNS for path in folder.glob(pattern)}
    left_out: set[str] = set()
    if outdated:
        left_out = {n for n in names if n in OTHER_FORMS or n.endswith(".tiktoken")}
        names -= left_out | {TOKENIZER, SETTINGS, SPECIAL_MAP, ADDED}
    files: dict[str, bytes | Path] = {name: folder / name for name in sorted(names)}
    files |= rewritten or {}
    if chat_template is not None and chat_template.strip() != (template_in(folder) or "").strip():
        files = {n: f for n, f in files.items() if n != OLD_TEMPLATE and not n.startswith(f"{TEMPLATES}/")}
        files[TEMPLATE] = chat_template.encode()
        if SETTINGS in files:
            settings = _read(files[SETTINGS])
            if settings.pop("chat_template", None) is not None:
                files[SETTINGS] = _text(settings)
    return dict(sorted(files.items())), sorted(left_out)


def template_in(folder: Path) -> str | None:
    """A model's own default chat template, wherever its generation of transformers wrote it; None where it has none."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    for name in (SETTINGS, OLD_TEMPLATE):
        if (folder / name).is_file():
            found = _read(folder / name).get("chat_template")
            if isinstance(found, list):
                found = next((t.get("template") for t in found if t.get("name") == "default"), None)
            if isinstance(found, str) and found:
                return found
    return None


def is_processor(name: str) -> bool:
    return name in PROCESSOR or (name.endswith(".py") and name.startswith(("processing_", "image_processing_")))


def generation_config(folder: Path, new_ids: Mapping[int, int], roles: Mapping[str, int]) -> tuple[bytes | Path | None,
                                                                                                 list[str]]:
    """generation_config.json with new ids (the file itself where none changes), and what had to go from it and from
    config.json: 'eos_token_id 5: now 3'."""
    lost: list[str] = []
    result: bytes | Path | None = None
    for name in ("config.json", GENERATION):
        if (folder / name).is_file():
            before = _read(folder / name)
            after, gone = new_ids_in(before, new_ids, roles)
            lost += [line for line in gone if line not in lost]
            if name == GENERATION:
                result = folder / name if after == before else _text(after)
    return result, lost


def ids_in(folder: Path) -> list[int]:
    """Token ids that config.json and generation_config.json mention, ascending."""
    found: set[int] = set()

    def collect(_: str, number: int) -> int:
        found.add(number)
        return number

    for name in ("config.json", GENERATION):
        if (folder / name).is_file():
            _mapped(_read(folder / name), collect)
    return sorted(found)


def new_ids_in(config: dict[str, Any], new_ids: Mapping[int, int],
               roles: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    """A config with token ids of another tokenizer, and what had no successor.

    `roles`: the ids of that tokenizer's own tokens, by role ('eos'), which stand in for an id without a successor.
    Where there is none either, the value becomes null, or leaves its list.
    """
    lost: dict[str, None] = {}

    def replaced(key: str, number: int) -> int | None:
        if number in new_ids:
            return new_ids[number]
        stand_in = roles.get(key.removesuffix("_token_id"))
        lost[f"{key} {number}: now {'none' if stand_in is None else stand_in}"] = None
        return stand_in

    return _mapped(config, replaced), list(lost)


def _mapped(config: Any, new: NewId, key: str = "") -> Any:
    """`config` with `new(key, id)` for every token id. Negative numbers are no ids: configs write -1 for none."""
    is_id_key = bool(ID_KEY.search(key)) or key in ID_LISTS
    if isinstance(config, dict):
        return {k: _mapped(v, new, k) for k, v in config.items()}
    if isinstance(config, list) and is_id_key:
        return _mapped_ids(config, new, key)
    if isinstance(config, list):
        return [_mapped(v, new) if isinstance(v, dict | list) else v for v in config]
    if is_id_key and isinstance(config, int) and not isinstance(config, bool) and config >= 0:
        return new(key, config)
    return config


def _mapped_ids(ids: list[Any], new: NewId, key: str) -> list[Any] | None:
    """A list of ids, or of sequences of ids: what has no successor leaves it, a sequence as a whole."""
    values: list[Any] = []
    for old in ids:
        value = [_mapped(i, new, key) for i in old] if isinstance(old, list) else _mapped(old, new, key)
        gone = None in value if isinstance(value, list) else value is None
        if not gone and (value == old or value not in values):
            values.append(value)
    return values or (None if ids else [])


def _read(source: bytes | Path) -> dict[str, Any]:
    if isinstance(source, Path):
        return parse_object(source.read_bytes(), source)
    return parse_object(source, Path(SETTINGS))


def _text(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
