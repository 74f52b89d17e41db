"""The models of a run that benchmarks can be run on: their names, and where they lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.artifacts import Plan
from anabranch.errors import CorruptedError


@dataclass(frozen=True)
class Subjects:
    """models: name -> folder, in the order of tables. Folders that are not there yet are named too."""

    run: Path
    base_hash: str
    max_pixels: int | None
    models: dict[str, Path]


def subjects_of(run: Path) -> Subjects:
    """base, branch-K and merged of a run folder, and ARM/seed-S of its comparison: those that are there or planned.

    Raises:
        CorruptedError: no run folder, or its recipe.json is damaged.
    """
    path = run / "recipe.json"
    try:
        content = json.loads(path.read_text())
        recipe: dict[str, Any] = content["recipe"]
        base, base_hash = Path(content["base"]), str(content["base_hash"])
        max_pixels = ((recipe.get("mixture") or {}).get("images") or {}).get("max_pixels")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptedError(f"{run}: not a run folder ({path.name} is missing or unreadable). Give the folder that "
                             "`anabranch run` or `anabranch compare` made: the recipe's `output`.") from error
    models = {"base": base}
    for arm in sorted((run / "compare").glob("*/seed-*/merged")):
        models[f"{arm.parent.parent.name}/{arm.parent.name}"] = arm.absolute()
    if (run / "plan.json").exists():
        for group in Plan.load(run / "plan.json").groups:
            models[f"branch-{group.group}"] = (run / "branches" / str(group.group) / "model").absolute()
    if (run / "plan.json").exists() or (run / "merged").exists():
        models["merged"] = (run / "merged").absolute()
    return Subjects(run, base_hash, max_pixels, models)


def arm_of(model: str) -> str:
    """What a table's row is called: the seeds of one arm share a row."""
    return model.rpartition("/seed-")[0] or model
