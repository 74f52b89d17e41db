"""`anabranch merge`, `verify` and `methods`: argv -> one public call -> what a person, or a program, wants to read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from anabranch import console
from anabranch.errors import RecipeError

if TYPE_CHECKING:
    from anabranch.artifacts import MergeManifest


def merge(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a merge config (YAML): MergeKit's as it is, or `dialect: "
                                           "native`; several in one file, which may use each other's results by name; or a run "
                                           "folder, whose branches are merged as its recipe says")],
    result: Annotated[Path, typer.Argument(metavar="OUT", help="the model folder to make; where all merges of a file have "
                                           "names, a folder with OUT/NAME for each")],
    dry_run: console.DryRun = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    device: console.Device = "cpu",
    seed: Annotated[int, typer.Option(help="of methods that draw random numbers", min=0)] = 0,
    max_shard_size: console.Shards = "5GB",
    partial: Annotated[bool, typer.Option("--partial", help="of a run: merge the branches that are there, with weights raised "
                                                            "to sum to one")] = False,
    intermediates: Annotated[Path | None, typer.Option("--intermediates", "-I", help="of a file of several merges: DIR/NAME "
                                                       "for each that has a name; what has not changed is not made again"
                                                       )] = None,
    keep_intermediates: Annotated[bool, typer.Option("--keep-intermediates", help="leave OUT.intermediates there")] = False,
    allow_unknown_keys: Annotated[bool, typer.Option(help="warn of keys that mean nothing instead of refusing them")] = False,
    allow_mixed: Annotated[bool, typer.Option(help="merge models of different architectures")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="read .bin weights too (weights_only; converted once, into the user's "
                                                    "cache)")] = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="go on where a result holds NaN or infinity")] = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Merge the checkpoints that a config names, or a run's branches. Interrupted? The same command goes on where it was."""
    with console.reported(as_json):
        if config.is_dir():
            _only_for_configs({"--seed": seed != 0, "--max-shard-size": max_shard_size != "5GB", "--allow-mixed": allow_mixed,
                               "--allow-unknown-keys": allow_unknown_keys, "--allow-pickle": allow_pickle,
                               "--intermediates": intermediates is not None, "--keep-intermediates": keep_intermediates})
            _merge_run(config, result, partial, dry_run, (memory, threads, device, allow_nonfinite), quiet, as_json)
            return
        if partial:
            raise RecipeError(f"--partial merges those branches of a run that are there: give the run folder, not {config}.")
        with console.imports():
            from anabranch.engine import family, merging

        options = merging.options_for(seed, max_shard_size, allow_mixed, allow_pickle)
        settings = merging.settings_for(memory, threads, device, allow_nonfinite)

        warn = console.warner(quiet, as_json)
        given: dict[str, Any] = {"options": options, "settings": settings, "warn": warn,
                                 "allow_unknown_keys": allow_unknown_keys}
        if family.is_family(config):
            given |= {"intermediates": intermediates, "keep_intermediates": keep_intermediates}
            _merge_family(config, result, given, dry_run, quiet, as_json)
            return
        if intermediates is not None or keep_intermediates:
            raise RecipeError(f"--intermediates and --keep-intermediates are for a file of several merges; {config} holds one.")
        if dry_run:
            console.plan(merging.forecast(config, result, **given), quiet, as_json)
            return
        begun = time.monotonic()
        with console.progress("merge", quiet, as_json) as progress:
            manifest = merging.merge_config(config, result, progress=progress, **given)
        _tell_done(manifest, result, time.monotonic() - begun, quiet, as_json)


def _merge_family(config: Path, result: Path, given: dict[str, Any], dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Several merges of one file."""
    from anabranch.engine import family

    if dry_run:
        console.plan(family.forecast_family(config, result, **given), quiet, as_json)
        return
    begun = time.monotonic()
    with console.progress("merge", quiet, as_json) as progress:
        results = family.merge_family(config, result, progress=progress, **given)
    if not quiet and not as_json:
        for one in [r for r in results if r.name is not None]:
            console.out.print(escape(f"{one.place}: {'made' if one.made else 'unchanged'}, {one.manifest.method}"))
    if results[-1].name is None or as_json:
        _tell_done(results[-1].manifest, result, time.monotonic() - begun, quiet, as_json)


def _tell_done(manifest: MergeManifest, result: Path, seconds: float, quiet: bool, as_json: bool) -> None:
    if as_json:
        console.line("done", out=str(result), parameters=manifest.parameters, seconds=round(seconds, 3),
              **({"missing": manifest.missing} if manifest.missing else {}))
    elif not quiet:
        console.out.print(escape(f"{result}: {manifest.parameters:,} parameters in {manifest.dtype}, {manifest.method}, "
                                 f"{seconds:.1f} s" + ("; PARTIAL, see above" if manifest.missing else "")))


def _only_for_configs(given: dict[str, bool]) -> None:
    """Raises RecipeError for options that a run's recipe decides."""
    if said := [option for option, is_given in given.items() if is_given]:
        raise RecipeError(f"{', '.join(said)}: for merge configs. The branches of a run are merged as its recipe says (its "
                          "`merge` section): leave it out, or write a merge config.")


def _merge_run(folder: Path, result: Path, partial: bool, dry_run: bool, settings: tuple[str | None, int | None, str, bool],
               quiet: bool, as_json: bool) -> None:
    """`anabranch merge RUN OUT`."""
    with console.imports():
        from anabranch.engine.merging import settings_for
        from anabranch.partial import bring_finished, checked_inputs, merge_present, present_branches, present_lines
        from anabranch.run import reopen_run

    run = reopen_run(folder)
    if not dry_run:  # which writes nothing, so that it tells of what the folder holds
        bring_finished(run)
    present = present_branches(run, result, partial=partial)
    for number, line in enumerate(present_lines(present)):
        loud = bool(present.missing) and number == 0
        if as_json:
            console.line("warning" if loud else "plan", message=line)
        elif loud:  # also where --quiet is said: it is no merge of the run
            console.err.print(line, style="bold yellow", markup=False)
        elif not quiet:
            console.out.print(escape(line))
    if dry_run:
        checked_inputs(run, present)
        return
    begun = time.monotonic()
    with console.progress("merge", quiet, as_json) as progress:
        manifest = merge_present(run, result, partial=partial, settings=settings_for(*settings), progress=progress)
    _tell_done(manifest, result, time.monotonic() - begun, quiet, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="a merged model folder")],
    files_only: Annotated[bool, typer.Option(help="hold the files to the manifest, and compute nothing again")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="read .bin inputs, as the merge did")] = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    device: console.Device = "cpu",
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Are these the bytes that its manifest promises, and does a merge of a config give them again? Exit code 1 if not.

    The models must still be where they were: paths in the config count from the working folder, and from where they did
    when the merge was run.
    """
    with console.reported(as_json):
        with console.imports():
            from anabranch.engine import merging

        with console.progress("verify", quiet, as_json) as progress:
            problems = merging.verify(folder, files_only=files_only, allow_pickle=allow_pickle, progress=progress,
                                      settings=merging.settings_for(memory, threads, device, allow_nonfinite=True))
        for problem in problems:
            console.line("problem", message=problem) if as_json else console.err.print(problem, style="red", markup=False)
        if problems:
            raise typer.Exit(1)
        if as_json:
            console.line("done", out=str(folder))
        elif not quiet:
            again = "" if files_only or not merging.is_repeatable(folder) else "; computed again, the same bytes"
            console.out.print(escape(f"{folder}: as its manifest says{again}"))


def methods(name: Annotated[str | None, typer.Argument(help="one of them, in full")] = None) -> None:
    """The merge methods: what there is; or one of them: formula, parameters, what it needs, source."""
    from anabranch.merge import METHODS, method_named
    from anabranch.merge.reference import in_full, one_line

    if name is not None:
        console.out.print(escape(in_full(method_named(name))))
        return
    width = max(map(len, METHODS))
    for method in sorted(METHODS.values(), key=lambda m: m.name):
        console.out.print(escape(f"{method.name:<{width}}  {one_line(method)}"))
    console.out.print("\nOne of them in full: anabranch methods NAME")
