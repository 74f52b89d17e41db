"""`anabranch benchmarks`: results of lmms-eval and VLMEvalKit into a run's table. The commands to run: `anabranch export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from anabranch.errors import RecipeError

Pairs = Annotated[list[str] | None, typer.Option(
    "--lmms-eval", metavar="NAME=PATH", help="what lmms-eval left for the run's model NAME (base, branch-0, merged, "
                                             "merit-3/seed-0): a folder, or one .._results.json; repeatable")]
Folders = Annotated[list[str] | None, typer.Option(
    "--vlmevalkit", metavar="NAME=PATH", help="what VLMEvalKit left for it: WORK_DIR/MODEL; repeatable")]


def benchmarks(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a run, or of a comparison")],
    lmms_eval: Pairs = None,
    vlmevalkit: Folders = None,
    metric: Annotated[list[str] | None, typer.Option(
        metavar="TASK=METRIC", help="which metric of a task counts; TASK=METRIC*100 if it is a share of 1")] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="TASK", help="leave this task out; repeatable")] = None,
) -> None:
    """Read result files of lmms-eval and VLMEvalKit into RUN/benchmarks.json and benchmarks.md; without any, show the table."""
    from anabranch.outside.artifacts import Benchmarks
    from anabranch.outside.choices import read_choices
    from anabranch.outside.importing import import_scores
    from anabranch.outside.suite import Program
    from anabranch.outside.table import markdown

    places: dict[Program, Sequence[str]] = {"lmms-eval": lmms_eval or [], "VLMEvalKit": vlmevalkit or []}
    if any(places.values()):
        scores = import_scores(folder, places, read_choices(metric or [], skip or [])).scores
    elif metric or skip:
        raise RecipeError("--metric and --skip go with results to import: --lmms-eval NAME=PATH or --vlmevalkit NAME=PATH.")
    elif not (folder / "benchmarks.json").exists():
        raise RecipeError(f"{folder}: no benchmarks.json yet. `anabranch export {folder} DIR --benchmarks lmms-eval` writes "
                          "the commands that make the results; --lmms-eval NAME=PATH and --vlmevalkit NAME=PATH take them in.")
    else:
        scores = Benchmarks.load(folder / "benchmarks.json").scores
    print(markdown(scores, folder.resolve().name), end="")


def export_benchmarks(source: Path, folder: Path, program: str, overrides: list[str] | None,
                      tell: Callable[[str], None]) -> None:
    """`anabranch export RUN_OR_RECIPE DIR --benchmarks PROGRAM`."""
    from anabranch.outside.commands import program_named, write_commands
    from anabranch.outside.subjects import subjects_of

    chosen = program_named(program)
    if source.is_file():
        from anabranch.cli import _recipe

        run = _recipe(source, overrides).output
        if not (run / "recipe.json").exists():
            raise RecipeError(f"{source}: its run {run} has not begun, so that there is no model to measure. First: "
                              f"anabranch run {source} (or compare).")
    else:
        run = source
    subjects = subjects_of(run)
    for path in write_commands(subjects, folder, chosen):
        tell(f"written: {path}")
    tell(f"It runs {len(subjects.models)} models: {', '.join(subjects.models)}. Start it where the GPUs are; its last command "
         "is the import.")
