"""`anabranch search`: argv -> one public call -> what a person, or a program, wants to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from anabranch import console

if TYPE_CHECKING:
    from anabranch.search.outcome import SearchOutcome
    from anabranch.search.run import Progress


def search(
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="a search file (YAML): `parameters:` and a `merge:` config in "
                                          "which $names stand, or mergekit-evolve's `genome:`; and what is good: `data:` or "
                                          "`tasks:`")],
    result: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="the model folder to make of the best; records go to "
                                                  "OUT.search (without OUT: to SPACE.search beside the file)")] = None,
    sampler: Annotated[str | None, typer.Option(help="cma, tpe, nsga2 or random, in place of the file's")] = None,
    budget: Annotated[int | None, typer.Option(help="candidates of the sampler; random search gets as many", min=1)] = None,
    population: Annotated[int | None, typer.Option(help="of cma and nsga2", min=4)] = None,
    sigma: Annotated[float | None, typer.Option(help="cma's first step, as a share of the range")] = None,
    seed: Annotated[int | None, typer.Option(help="of the sampler", min=0)] = None,
    save_final_model: Annotated[bool, typer.Option("--save-final-model", help="without OUT: merge the best into "
                                                   "SPACE.search/final_model")] = False,
    allow_benchmark_tasks: Annotated[bool, typer.Option(help="search on the rows of well-known benchmarks")] = False,
    dry_run: console.DryRun = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    device: console.Device = "cpu",
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Find the merge with the best measured score, and hold it against baselines on rows that were never searched on.

    Every candidate is journalled: interrupted, the same command goes on where it was; a larger --budget goes on further.
    """
    with console.reported(as_json):
        with console.imports():
            from anabranch.search import run

        given: dict[str, Any] = {
            "allow_benchmarks": allow_benchmark_tasks, "memory": memory, "threads": threads, "device": device,
            "say": _sayer(quiet, as_json),
            "overrides": {"sampler": sampler, "budget": budget, "population": population, "sigma": sigma, "seed": seed}}
        if dry_run:
            console.plan(run.forecast(space, result, **given), quiet, as_json)
            return
        with _progress(quiet, as_json) as progress:
            outcome = run.search(space, result, save_final_model=save_final_model, progress=progress, **given)
        _tell(outcome, run.records_for(space, result), result, quiet, as_json)


def _sayer(quiet: bool, as_json: bool) -> Callable[[str], None]:
    warn = console.warner(quiet, as_json)

    def say(text: str) -> None:
        if text.startswith("warning: "):
            warn(text.removeprefix("warning: "))
        elif as_json:
            console.line("note", message=text)
        elif not quiet:
            console.err.print(text, markup=False)

    return say


@contextmanager
def _progress(quiet: bool, as_json: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar on a terminal; elsewhere a line at each new best and every ten seconds; JSON for each candidate."""
    if quiet and not as_json:
        yield None
        return
    if not as_json and console.err.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        with Bar(TextColumn("search"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
                 TimeRemainingColumn(), console=console.err, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda p: bar.update(task, completed=p.done, total=p.total, description=_words(p))
        return
    yield _lines(as_json)


def _lines(as_json: bool) -> Callable[[Progress], None]:
    told, best = 0.0, None

    def tell(p: Progress) -> None:
        nonlocal told, best
        if as_json:
            console.line("progress", done=p.done, total=p.total, arm=p.arm, score=p.score, best=p.best, failed=p.failed,
                         per_minute=round(p.per_minute, 1), seconds_left=round(p.seconds_left, 1))
        elif p.best != best or time.monotonic() - told > 10 or p.done == p.total:
            told, best = time.monotonic(), p.best
            console.err.print(f"search {p.done} of {p.total}: {_words(p)}, {p.seconds_left:.0f} s left", markup=False)

    return tell


def _words(p: Progress) -> str:
    return ("no candidate scored yet" if p.best is None else f"best {p.best:.4f}") + f", {p.per_minute:.1f} a minute"


def _tell(outcome: SearchOutcome, records: Path, result: Path | None, quiet: bool, as_json: bool) -> None:
    if as_json:
        console.line("done", records=str(records), out=str(result) if result else None, best=outcome.best.model_dump(),
                     scores=[{"name": s.name, "searched": s.searched, "guard": s.guard, "difference": s.difference}
                             for s in outcome.scores], verdict=outcome.verdict)
        return
    if quiet:
        return
    width = max(len(s.name) for s in outcome.scores)
    console.out.print(f"{'':<{width}}  searched     guard   the best minus it, guard rows", markup=False)
    for s in outcome.scores:
        gap = "" if s.difference is None else f"{s.difference:+.4f}"
        gap += "" if s.low is None or s.high is None else f"  [{s.low:+.4f}, {s.high:+.4f}]"
        console.out.print(f"{s.name:<{width}}  {s.searched:8.4f}  {s.guard:8.4f}   {gap}".rstrip(), markup=False)
    console.out.print("best: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                           for k, v in outcome.best.parameters.items()), markup=False)
    for text in outcome.verdict:
        console.out.print(escape(text))
    console.out.print(escape(f"{records}: best_config.yaml, results.json, journal.jsonl, pictures"
                             + (f"; {result}: the best, merged" if result else "")))
