"""`anabranch merge`, `verify` and `methods`: argv -> one public call -> what a person, or a program, wants to read."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from anabranch.errors import AnabranchError, RecipeError

if TYPE_CHECKING:
    from anabranch.artifacts import MergeManifest

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

Memory = Annotated[str | None, typer.Option(help="most memory that the process may take for itself, such as 512MB (libraries "
                                                 "and files that are mapped do not count); by default half of what is there")]
Threads = Annotated[int | None, typer.Option(help="workers; by default one per core, at most 8", min=1, max=256)]
Device = Annotated[str, typer.Option(help="where the sums are formed: cpu, cuda, cuda:1")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but errors")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object per line: warning, plan, progress, done, error")]


def merge(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a merge config (YAML): MergeKit's as it is, or `dialect: "
                                           "native`; or a run folder, whose branches are merged as its recipe says")],
    result: Annotated[Path, typer.Argument(metavar="OUT", help="the model folder to make")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, every problem; write nothing")] = False,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="of methods that draw random numbers", min=0)] = 0,
    max_shard_size: Annotated[str, typer.Option(help="largest weight file")] = "5GB",
    partial: Annotated[bool, typer.Option("--partial", help="of a run: merge the branches that are there, with weights raised "
                                                            "to sum to one")] = False,
    allow_unknown_keys: Annotated[bool, typer.Option(help="warn of keys that mean nothing instead of refusing them")] = False,
    allow_mixed: Annotated[bool, typer.Option(help="merge models of different architectures")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="read .bin weights too (weights_only; converted once, into the user's "
                                                    "cache)")] = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="go on where a result holds NaN or infinity")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge the checkpoints that a config names, or a run's branches. Interrupted? The same command goes on where it was."""
    with _reported(as_json):
        if config.is_dir():
            _only_for_configs({"--seed": seed != 0, "--max-shard-size": max_shard_size != "5GB", "--allow-mixed": allow_mixed,
                               "--allow-unknown-keys": allow_unknown_keys, "--allow-pickle": allow_pickle})
            _merge_run(config, result, partial, dry_run, (memory, threads, device, allow_nonfinite), quiet, as_json)
            return
        if partial:
            raise RecipeError(f"--partial merges those branches of a run that are there: give the run folder, not {config}.")
        with _imports():
            from anabranch.engine import merging

        options = merging.options_for(seed, max_shard_size, allow_mixed, allow_pickle)
        settings = merging.settings_for(memory, threads, device, allow_nonfinite)

        def warn(text: str) -> None:
            if as_json:
                _line("warning", message=text)
            elif not quiet:
                err.print(f"warning: {text}", style="yellow", markup=False)

        if dry_run:
            lines = merging.forecast(config, result, options=options, settings=settings,
                                     allow_unknown_keys=allow_unknown_keys, warn=warn)
            for line in lines:
                if as_json:
                    _line("plan", message=line)
                elif not quiet:
                    out.print(escape(line))
            return
        begun = time.monotonic()
        with _progress("merge", quiet, as_json) as progress:
            manifest = merging.merge_config(config, result, options=options, settings=settings,
                                            allow_unknown_keys=allow_unknown_keys, progress=progress, warn=warn)
        _tell_done(manifest, result, time.monotonic() - begun, quiet, as_json)


def _tell_done(manifest: MergeManifest, result: Path, seconds: float, quiet: bool, as_json: bool) -> None:
    if as_json:
        _line("done", out=str(result), parameters=manifest.parameters, seconds=round(seconds, 3),
              **({"missing": manifest.missing} if manifest.missing else {}))
    elif not quiet:
        out.print(escape(f"{result}: {manifest.parameters:,} parameters in {manifest.dtype}, {manifest.method}, {seconds:.1f} s"
                         + ("; PARTIAL, see above" if manifest.missing else "")))


def _only_for_configs(given: dict[str, bool]) -> None:
    """Raises RecipeError for options that a run's recipe decides."""
    if said := [option for option, is_given in given.items() if is_given]:
        raise RecipeError(f"{', '.join(said)}: for merge configs. The branches of a run are merged as its recipe says (its "
                          "`merge` section): leave it out, or write a merge config.")


def _merge_run(folder: Path, result: Path, partial: bool, dry_run: bool, settings: tuple[str | None, int | None, str, bool],
               quiet: bool, as_json: bool) -> None:
    """`anabranch merge RUN OUT`."""
    with _imports():
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
            _line("warning" if loud else "plan", message=line)
        elif loud:  # also where --quiet is said: it is no merge of the run
            err.print(line, style="bold yellow", markup=False)
        elif not quiet:
            out.print(escape(line))
    if dry_run:
        checked_inputs(run, present)
        return
    begun = time.monotonic()
    with _progress("merge", quiet, as_json) as progress:
        manifest = merge_present(run, result, partial=partial, settings=settings_for(*settings), progress=progress)
    _tell_done(manifest, result, time.monotonic() - begun, quiet, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="a merged model folder")],
    files_only: Annotated[bool, typer.Option(help="hold the files to the manifest, and compute nothing again")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="read .bin inputs, as the merge did")] = False,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Are these the bytes that its manifest promises, and does the merge give them again? Exit code 1 if not.

    The models must still be where they were: paths in the config count from the working folder, and from where they did
    when the merge was run.
    """
    with _reported(as_json):
        with _imports():
            from anabranch.engine import merging

        with _progress("verify", quiet, as_json) as progress:
            problems = merging.verify(folder, files_only=files_only, allow_pickle=allow_pickle, progress=progress,
                                      settings=merging.settings_for(memory, threads, device, allow_nonfinite=True))
        for problem in problems:
            _line("problem", message=problem) if as_json else err.print(problem, style="red", markup=False)
        if problems:
            raise typer.Exit(1)
        if as_json:
            _line("done", out=str(folder))
        elif not quiet:
            out.print(escape(f"{folder}: as its manifest says" + ("" if files_only else "; computed again, the same bytes")))


def methods(name: Annotated[str | None, typer.Argument(help="one of them, in full")] = None) -> None:
    """The merge methods: what there is; or one of them: formula, parameters, what it needs, source."""
    from anabranch.merge import METHODS, method_named
    from anabranch.merge.reference import in_full, one_line

    if name is not None:
        out.print(escape(in_full(method_named(name))))
        return
    width = max(map(len, METHODS))
    for method in sorted(METHODS.values(), key=lambda m: m.name):
        out.print(escape(f"{method.name:<{width}}  {one_line(method)}"))
    out.print("\nOne of them in full: anabranch methods NAME")


def _line(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}, ensure_ascii=False), flush=True)


@contextmanager
def _imports() -> Iterator[None]:
    """Importing torch makes half a million objects that live to the end; having the collector look at them again and
    again, also on the way out, takes a quarter of a small merge's time."""
    gc.disable()
    # A stop raised inside an import leaves libraries half imported, and some swallow it: until then it simply ends.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.freeze()
        gc.enable()


@contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """With --json an error is a line like all others; the exit code is the same. SIGTERM stops as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except AnabranchError as error:
        if not as_json:
            raise
        _line("error", kind=type(error).__name__, message=str(error))
        raise typer.Exit(2) from error


@contextmanager
def _progress(what: str, quiet: bool, as_json: bool) -> Iterator[Callable[[Any], None] | None]:
    """Bytes, rate and time left: a bar on a terminal, elsewhere a line every ten seconds, or JSON once a second."""
    if as_json or (not quiet and not err.is_terminal):
        yield _lines(what, as_json)
        return
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with Progress(TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                  console=err, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda now: bar.update(task, completed=now.done, total=now.total)


def _lines(what: str, as_json: bool) -> Callable[[Any], None]:
    begun = told = time.monotonic()
    first: int | None = None

    def tell(now: Any) -> None:
        nonlocal told, first
        first = now.done if first is None else first
        moment = time.monotonic()
        if (moment - told < (1 if as_json else 10) and now.done < now.total) or moment == told:
            return
        told = moment
        rate = (now.done - first) / max(moment - begun, 1e-9)
        left = (now.total - now.done) / rate if rate else None
        if as_json:
            _line("progress", done=now.done, total=now.total, tensors=now.tensors, bytes_per_second=round(rate),
                  seconds_left=None if left is None else round(left, 1))
        elif moment - begun > 10:
            left_text = "" if left is None else f", {left:.0f} s left"
            print(f"{what} {now.done / 1e6:,.0f} of {now.total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s{left_text}",
                  file=sys.stderr, flush=True)

    return tell

