"""What is wrong with the arguments of `anabranch diagnose`, told before torch is imported: that alone takes seconds.

Nothing here imports torch, numpy or what imports them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from anabranch.errors import CorruptedError, RecipeError, closest

# In the order in which time is given: what judges the merge first.
NAMES = ("displacement", "generalization", "lmc", "map", "perturbation", "surface", "calibration", "curvature")


def parse_only(text: str | None) -> list[str] | None:
    """'lmc,displacement' -> names in the order of NAMES. Raises RecipeError naming every unknown one."""
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    problems = [f"`{name}`: no such diagnostic.{closest(name, NAMES)}" for name in names if name not in NAMES]
    if problems or not names:
        raise RecipeError.of("--only:", problems or ["wanted names, as in lmc,displacement"])
    return [name for name in NAMES if name in names]


def check_form(folder: Path | None, foreign: Mapping[str, str | Sequence[str] | None]) -> None:
    """A run folder, or models of one's own with rows.

    Args:
        foreign: --base, --branch, --merged, --joint, --data -> what was given.
    Raises:
        RecipeError: neither of the two forms, or no model beside the base.
        CorruptedError: the folder is no run.
    """
    given = [name for name, value in foreign.items() if value]
    if folder is not None:
        if given:
            raise RecipeError(f"a run folder knows its own models and rows: leave {', '.join(given)} out, or leave RUN out.")
        if not os.path.isfile(folder / "recipe.json"):
            raise CorruptedError(f"{folder}: not a run folder (recipe.json is missing). Give the folder that `anabranch run` "
                                 "made: the recipe's `output`.")
        return
    if missing := [name for name in ("--base", "--data") if not foreign[name]]:
        raise RecipeError(f"give a run folder, or {' and '.join(missing)} (with --branch, once per branch, and --merged): "
                          "anabranch diagnose --base B --branch X --branch Y --merged M --data held_out.jsonl")
    check_models(foreign["--branch"] or (), foreign["--merged"])


def check_models(branches: str | Sequence[str], merged: str | Sequence[str] | None) -> None:
    """Raises RecipeError where there is nothing to compare the base with."""
    if not branches and not merged:
        raise RecipeError("nothing to compare the base with. Give --branch (once per branch), --merged, or both.")
