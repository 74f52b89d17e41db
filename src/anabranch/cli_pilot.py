"""`anabranch pilot`: argv -> one public call -> what a person wants to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pilot(
    recipe: Annotated[Path, typer.Argument(help="the recipe (YAML); `anabranch init` writes one")],
    methods: Annotated[str | None, typer.Option(
        help="arms, as in joint,joint_matched,random:4,merit:2; default: seven, with the recipe's number of groups")] = None,
    share: Annotated[float, typer.Option(help="larger budget, of the full one's tokens; the other is a quarter of it")] = 0.06,
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 .. n-1")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and what it costs; train nothing")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value over the recipe's; repeatable")] = None,
) -> None:
    """Every arm on a few per cent of the tokens: split, do not, or train jointly and pull back? With its uncertainty."""
    from anabranch.cli import _progress, _recipe, _tell

    loaded = _recipe(recipe, overrides)
    from anabranch.pilot import default_arms, dry_pilot, parse_pilot_arms, run_pilot
    from anabranch.pilot_budget import shares_up_to
    from anabranch.pilot_words import pilot_lines
    from anabranch.run import open_run

    arms = parse_pilot_arms(default_arms(loaded) if methods is None else methods)
    shares_up_to(share)
    if dry_run:
        for line in dry_pilot(loaded, arms, seeds, share, _progress()):
            _tell(line)
        return
    opened = open_run(loaded, tell=_tell, progress=_progress())
    found = run_pilot(opened, arms, seeds, share)
    for line in pilot_lines(found):
        _tell(line)
    _tell(f"written: {opened.folder / 'pilot.json'}")


def pilot_arms(folder: Path, shares: str, todo: str) -> None:
    """Some arms of a pilot, in this process."""
    from anabranch.cli import _tell
    from anabranch.pilot import parse_todo, work

    work(folder, [float(s) for s in shares.split(",")], parse_todo(todo), _tell)
