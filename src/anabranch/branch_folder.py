"""What stands beside a branch's weights, and what its weights must be: the base's files, its tensors, its frozen numbers."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from anabranch.artifacts import write_atomically
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.layout import set_dtype
from anabranch.engine.plan import line_up
from anabranch.engine.stream import same_numbers
from anabranch.errors import BranchFailed, ShapeMismatch
from anabranch.families import freezes, frozen_files
from anabranch.recipe import Model as ModelSection
from anabranch.surgery.side_files import carry_tokenizer

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def dress(folder: Path, base: Path, *, code: bool) -> None:
    """Put the base's config, tokenizer, processor and generation config beside the weights in `folder`, byte for byte but for
    the config's dtype. A library that writes a tokenizer anew may add tokens that the base does not have.

    Args:
        code: carry along the Python files that the base's config names.
    """
    dtypes = {info.dtype for info in Checkpoint.open(folder, config_needed=False).tensors.values()} & DTYPES.keys()
    config = json.loads((base / "config.json").read_text())
    dtype = DTYPES[dtypes.pop()] if len(dtypes) == 1 else "float32"
    write_atomically(folder / "config.json", (json.dumps(set_dtype(config, dtype), indent=2) + "\n").encode())
    files = dict(carry_tokenizer(base))
    if code and "auto_map" in config:
        files |= {path.name: path for path in base.glob("*.py")}
    for name, source in files.items():
        if not name.endswith(".py") or code:
            write_atomically(folder / name, source if isinstance(source, bytes) else source.read_bytes())


def check_weights(folder: Path, base: Path, model: Any, section: ModelSection) -> None:
    """Whether what a trainer saved of `model` has the base's tensors by name and shape, and the base's frozen numbers.

    Raises:
        BranchFailed: it has not, so no merge would take it.
    """
    origin, branch = Checkpoint.open(base), Checkpoint.open(folder)
    try:
        line_up(origin, [branch])
    except ShapeMismatch as error:
        raise BranchFailed(f"{folder}: was trained, and cannot be merged. {error}") from error
    if freezes(section) and (changed := changed_tensors(origin, branch, frozen_files(model, section))):
        raise BranchFailed(f"{folder}: training changed {len(changed)} tensors that the recipe freezes ({some(changed)}), so "
                           "a merge would refuse this branch. A setting that trains more than `model` says does that: look "
                           "through `train` and `model.lora`.")


def changed_tensors(base: Checkpoint, branch: Checkpoint, frozen: Collection[str]) -> list[str]:
    """Those of the base's tensors `frozen` that a branch holds with other numbers, sorted. Reads them."""
    return [name for name in sorted(frozen) if name in branch.tensors and name in base.tensors
            and not same_numbers(base.read(name), branch.read(name))]


def some(names: Collection[str], most: int = 4) -> str:
    """The first few names, and how many more."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
