"""`anabranch diagnose`: argv -> one public call -> what a person wants to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Models = list[str] | None


def diagnose(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="the run folder: the recipe's `output`")] = None,
    base: Annotated[str | None, typer.Option(help="without a run folder: the base, a model folder or a Hub id")] = None,
    branch: Annotated[Models, typer.Option(help="a branch trained from it; once per branch")] = None,
    merged: Annotated[str | None, typer.Option(help="the merged model")] = None,
    joint: Annotated[str | None, typer.Option(help="a jointly trained model to compare with")] = None,
    data: Annotated[Models, typer.Option(help="held-out rows: a file, a glob or a Hub dataset; repeatable")] = None,
    only: Annotated[str | None, typer.Option(help="just these, whatever they take: lmc,displacement,..")] = None,
    points: Annotated[int, typer.Option(min=3, help="places along each segment")] = 21,
    rows: Annotated[int, typer.Option(min=8, help="held-out rows that losses are taken on, most")] = 256,
    minutes: Annotated[float, typer.Option(min=0.0, help="time budget; what does not fit is left out by name")] = 10.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default RUN/diagnostics, ./diagnostics")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what each would cost; measure nothing")] = False,
) -> None:
    """Is the merge sound, and why? Connectivity, displacement, surface, noise, curvature, calibration, map.

    Exit code 1 if a verdict is bad.
    """
    from anabranch.diagnose.arguments import check_form, parse_only

    names = parse_only(only)
    check_form(folder, {"--base": base, "--branch": branch, "--merged": merged, "--joint": joint, "--data": data})
    # Only now: these import torch, and a mistake in the arguments should not wait seconds for it.
    from anabranch.cli import _progress, _tell
    from anabranch.diagnose import run as diagnostics
    from anabranch.diagnose.subject import Settings
    from anabranch.run import reopen_run

    settings = Settings(points=points, rows=rows)
    subject = (diagnostics.subject_of_models(str(base), branch or [], merged, joint, data or [], settings, warn=_tell)
               if folder is None else diagnostics.subject_of_run(reopen_run(folder, tell=_tell), settings))
    if dry_run:
        for cost in diagnostics.forecasts(subject, settings, names or list(diagnostics.DIAGNOSTICS)):
            _tell(f"{cost.name}: cannot be done: {cost.why}" if cost.why
                  else f"{cost.name}: {cost.passes:,.0f} forward passes, about {cost.seconds:,.0f} s")
        _tell("Nothing was measured.")
        return
    place = output or (folder / "diagnostics" if folder is not None else Path("diagnostics"))
    outcomes = diagnostics.run_diagnostics(subject, place, settings, only=names, minutes=minutes, tell=_tell,
                                           progress=_progress())
    if bad := [o.name for o in outcomes if o.found is not None and o.found.verdict == "bad"]:
        _tell(f"\nBad: {', '.join(bad)}.")
        raise typer.Exit(1)
