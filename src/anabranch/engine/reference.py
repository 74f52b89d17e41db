"""How a config names a model: `PATH[@REVISION][+ADAPTER[@REVISION]]`, or the object with the same parts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.engine.parameters import shown
from anabranch.errors import closest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Reference:
    """A model that a config names. Two are equal if they are the same model, however they are spelled.

    path            an absolute folder if there is one of that name here, else what the config says: a hub id
    revision        of the hub's repository
    adapter         a LoRA adapter to fold in, like `path`
    architecture    stands in for config.json's `architectures`
    said            what the config says; for messages and the model card
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = field(default=None, compare=False)
    said: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.said

    @property
    def problems(self) -> list[str]:
        """Why this cannot be opened: neither a folder here nor what could be an id on the hub."""
        named = [(part, what) for part, what in ((self.path, "model"), (self.adapter, "adapter")) if part is not None]
        return [f"{what} '{part}': there is no such folder, and it is no id of the hub (OWNER/NAME). Paths count from the "
                "working folder, then from the config's." for part, what in named
                if not os.path.isdir(part) and not HUB_ID.fullmatch(part)]


def read_reference(value: Any, where: str, folders: Sequence[Path], problems: list[str],
                   warnings: list[str]) -> Reference | None:
    """A reference from YAML. `folders`: where relative paths are looked for, first match wins."""
    before = len(problems)
    if isinstance(value, str) and value.strip():
        found = _from_text(value.strip(), where, folders, problems, warnings)
    elif isinstance(value, dict):
        found = _from_object(value, where, folders, problems)
    else:
        problems.append(f"{where}: got {shown(value)}, wanted the name of a model"
                        + (", in quotes" if isinstance(value, (int, float)) else ""))
        return None
    return found if len(problems) == before else None


def local(path: str, folders: Sequence[Path]) -> str | None:
    """The absolute path of an existing file or folder of this name."""
    try:
        candidates = [Path(path).expanduser()] if path.startswith("~") else [folder / path for folder in folders]
        return next((os.path.realpath(c) for c in candidates if c.exists()), None)
    except (OSError, ValueError, RuntimeError):  # too long for a name, a zero byte, an unknown ~user
        return None


def _from_text(text: str, where: str, folders: Sequence[Path], problems: list[str],
               warnings: list[str]) -> Reference | None:
    if (whole := local(text, folders)) is not None:
        if "+" in text or "@" in text:
            warnings.append(f"{where}: '{text}' is a folder here, and is taken as a whole; the part after `+` or `@` is not "
                            "an adapter or a revision")
        return Reference(whole, said=text)
    first, *rest = text.split("+")
    if len(rest) > 1:
        problems.append(f"{where}: '{text}' has more than one `+`, wanted PATH[@REVISION][+ADAPTER[@REVISION]]. A path that "
                        "has a `+` itself is written `model: {model: {path: ..}, lora: {path: ..}}`.")
        return None
    path, revision = _part(first, where, folders, problems)
    adapter, adapter_revision = _part(rest[0], where, folders, problems) if rest else (None, None)
    return Reference(path, revision, adapter, adapter_revision, said=text)


def _part(text: str, where: str, folders: Sequence[Path], problems: list[str]) -> tuple[str, str | None]:
    if (whole := local(text, folders)) is not None:
        return whole, None
    path, *rest = text.split("@")
    if len(rest) > 1:
        problems.append(f"{where}: '{text}' has more than one `@`, wanted PATH@REVISION")
    if not path or (rest and not rest[0]):
        problems.append(f"{where}: '{text}' has an empty {'revision' if path else 'path'}, wanted PATH@REVISION")
    return local(path, folders) or path, rest[0] if rest else None


def _from_object(value: dict, where: str, folders: Sequence[Path], problems: list[str]) -> Reference | None:
    if "path" in value and "model" not in value:
        problems.append(f"{where}: a model as an object has `model:` and `lora:` below it. Write "
                        "`model: {model: {path: .., revision: ..}}`.")
        return None
    known = ("model", "lora", "override_architecture")
    problems += [f"{where}: unknown key `{key}`.{closest(str(key), known)}" for key in value if key not in known]
    if "model" not in value:
        problems.append(f"{where}.model: required, and not given.")
        return None
    path, revision = _object_part(value["model"], f"{where}.model", folders, problems)
    adapter, adapter_revision = ((None, None) if value.get("lora") is None
                                 else _object_part(value["lora"], f"{where}.lora", folders, problems))
    architecture = value.get("override_architecture")
    if architecture is not None and not isinstance(architecture, str):
        problems.append(f"{where}.override_architecture: got {shown(architecture)}, wanted the name of a class")
        architecture = None
    said = "+".join("@".join(filter(None, pair)) for pair in (_words(value["model"]), _words(value.get("lora"))) if pair)
    return Reference(path or "", revision, adapter, adapter_revision, architecture, said)


def _object_part(value: Any, where: str, folders: Sequence[Path],
                 problems: list[str]) -> tuple[str | None, str | None]:
    if isinstance(value, str) and value.strip():
        return _part(value.strip(), where, folders, problems)
    if not isinstance(value, dict):
        problems.append(f"{where}: got {shown(value)}, wanted `path:` with an optional `revision:`")
        return None, None
    problems += [f"{where}: unknown key `{key}`.{closest(str(key), ('path', 'revision'))}"
                 for key in value if key not in ("path", "revision")]
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not path.strip():
        problems.append(f"{where}.path: got {shown(path)}, wanted the name of a model")
        return None, None
    if revision is not None and not isinstance(revision, str):
        problems.append(f"{where}.revision: got {shown(revision)}, wanted text, in quotes")
        revision = None
    return local(path.strip(), folders) or path.strip(), revision


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(value[key]) for key in ("path", "revision") if value.get(key)] if isinstance(value, dict) else []
