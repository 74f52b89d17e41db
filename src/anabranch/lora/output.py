"""An adapter folder as PEFT reads it: names, configuration, card, report; and whether it is there already."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch import __version__
from anabranch.artifacts import MergeManifest, digest, file_digest
from anabranch.engine.adapter import CONFIG
from anabranch.engine.making import Made, Read
from anabranch.engine.merging import already_there, hash_of
from anabranch.errors import CorruptedError, ModelError, OutputError, RecipeError
from anabranch.lora.factors import Found

REPORT = "lora_report.json"


def factor_tensors(found: Found, key: str, dtype: str, distribute: bool, embedding: bool, outer: tuple[int, ...] = ()) -> Made:
    """The two factors of a module by PEFT's names. `outer`: dimensions of a convolution's weight after the first."""
    rows, columns = found.shape
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    a_name, b_name = (f"{key}.{end}" for end in ends)
    a_shape = (found.rank, *outer) if outer else (found.rank, columns)
    b_shape = (rows, found.rank, *([1] * (len(outer) - 1)))

    def make() -> dict[str, Tensor]:
        b, a = found.factors(distribute)
        return {a_name: a.reshape(a_shape), b_name: b.reshape(b_shape)}

    return Made({a_name: (a_shape, dtype), b_name: (b_shape, dtype)}, make, 12 * found.rank * (rows + columns))


def config_of(ranks: Mapping[str, int], targets: Sequence[str], *, base: str | None, task: str | None,
              saved: Sequence[str] = (), bias: bool = False, tied: bool = False, transposed: bool = False) -> dict[str, Any]:
    """adapter_config.json, in which alpha / r is 1 for every module.

    `r` and `lora_alpha` are the rank that most modules have (the larger of two equals); the others stand in the patterns.
    """
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))
    others = {path: rank for path, rank in sorted(ranks.items()) if rank != r}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "inference_mode": True, "r": r,
        "lora_alpha": r, "lora_dropout": 0.0, "target_modules": list(targets), "rank_pattern": others,
        "alpha_pattern": dict(others), "modules_to_save": sorted(saved) or None, "bias": "all" if bias else "none",
        "fan_in_fan_out": transposed, "use_rslora": False, "use_dora": False, "init_lora_weights": True}
    return config | ({"ensure_weight_tying": True} if tied else {})


def adapter_files(config: Mapping[str, Any], report: Mapping[str, Any], base: str | None, verb: str,
                  made_from: Sequence[str]) -> dict[str, bytes | Path]:
    """Everything beside the weights: configuration, report, card."""
    name = base if base is not None and not os.path.isdir(base) else None
    head = ["---", *([f"base_model: {name}"] if name else []), "library_name: peft", "---", ""]
    all_ = report["all"]
    text = [*head, f"A LoRA adapter made by `anabranch {verb}` {__version__} from {', '.join(made_from)}.", "",
            f"{all_['matrices']} matrices, {all_['parameters']:,} parameters, {kept_or_wrong(all_)}. Per matrix: {REPORT}.", ""]
    return {CONFIG: _json(config), REPORT: _json(report), "README.md": "\n".join(text).encode()}


def kept_or_wrong(all_: Mapping[str, Any]) -> str:
    """What an adapter is worth: the energy that it keeps; or, of PEFT's average, how far it is from the weighted sum."""
    if "wrong" in all_:
        return f"{all_['wrong']:.0%} of the weighted sum's length away from it"
    return f"{all_['kept_energy']:.2%} of the energy kept"


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- once, and only once ---


def key_of(verb: str, settings: Mapping[str, Any], inputs: Sequence[Read], seed: int) -> dict[str, Any]:
    """What decides the factors: what was asked for, and the files read, told by size and time."""
    files = [one.checkpoint.folder / name for one in inputs
             for name in sorted({info.file for info in one.checkpoint.tensors.values()})]
    files += [path for one in inputs for path in one.companions]
    return {"verb": verb, "settings": dict(settings), "seed": seed, "version": __version__,
            "files": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]}


def done_already(place: Path, verb: str, settings: Mapping[str, Any], inputs: Sequence[Read],
                 seed: int) -> MergeManifest | None:
    """The manifest of a folder that was made of these inputs in this way; None if the place is free.

    Asked before the factors are found: with them comes the layout that `make_model` compares. Raises OutputError for a
    folder that holds something else.
    """
    if any(place == one.checkpoint.folder.resolve() for one in inputs):
        raise OutputError(f"{place} is one of the inputs. Choose another output folder.")
    if not place.is_dir() and os.path.lexists(place):
        raise OutputError(f"{place} is a file. Choose another output folder.")
    wanted = json.loads(json.dumps({"verb": verb, "settings": dict(settings), "seed": seed}))
    manifest = already_there(place, wanted)
    if manifest is None:
        return None
    hashes = {one.label: one.hash for one in manifest.inputs}
    for one in inputs:
        table = {name: hash_of(one.checkpoint, name) or "" for name in one.names or one.checkpoint.tensors}
        table |= {f"file {path.name}": file_digest(path) for path in one.companions}
        if hashes.get(one.label) != digest(table):
            raise OutputError(f"{place} was made with these settings, but of another {one.label}. Choose another output "
                              "folder, or remove this one; nothing was changed.")
    return manifest


@contextmanager
def dropped_if_refused(folder: Path) -> Iterator[None]:
    """Factors that nobody can use, since what they are for is refused, go; after a kill or a full disk they stay."""
    try:
        yield
    except (RecipeError, ModelError, CorruptedError):
        drop(folder)
        raise


def drop(folder: Path) -> None:
    """Remove the factors of a finished adapter."""
    shutil.rmtree(folder, ignore_errors=True)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished adapter folder. Raises CorruptedError."""
    try:
        value = json.loads((folder / REPORT).read_text())
        value["all"]["matrices"], value["matrices"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptedError(f"{folder / REPORT}: cannot be read ({error}).") from error
    return dict(value)
