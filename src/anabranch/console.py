"""What the commands share: two consoles, options that mean the same everywhere, progress, errors as JSON."""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from anabranch.errors import AnabranchError

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

Memory = Annotated[str | None, typer.Option(help="most memory that the process may take for itself, such as 512MB (libraries "
                                                 "and files that are mapped do not count); by default half of what is there")]
Threads = Annotated[int | None, typer.Option(help="workers; by default one per core, at most 8", min=1, max=256)]
Device = Annotated[str, typer.Option(help="where the sums are formed: cpu, cuda, cuda:1")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but errors")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object per line: warning, plan, progress, done, error")]
Shards = Annotated[str, typer.Option("--max-shard-size", help="largest weight file")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, every problem; write nothing")]


def line(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}, ensure_ascii=False), flush=True)


def warner(quiet: bool, as_json: bool) -> Callable[[str], None]:
    """How a command tells a warning."""
    def warn(text: str) -> None:
        if as_json:
            line("warning", message=text)
        elif not quiet:
            err.print(f"warning: {text}", style="yellow", markup=False)

    return warn


def plan(lines: Iterable[str], quiet: bool, as_json: bool) -> None:
    """The lines of a dry run."""
    for text in lines:
        if as_json:
            line("plan", message=text)
        elif not quiet:
            out.print(escape(text))


@contextmanager
def imports() -> Iterator[None]:
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
def reported(as_json: bool) -> Iterator[None]:
    """With --json an error is a line like all others; the exit code is the same. SIGTERM stops as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except AnabranchError as error:
        if not as_json:
            raise
        line("error", kind=type(error).__name__, message=str(error))
        raise typer.Exit(2) from error
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress(what: str, quiet: bool, as_json: bool) -> Iterator[Callable[[Any], None] | None]:
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
            line("progress", done=now.done, total=now.total, tensors=now.tensors, bytes_per_second=round(rate),
                  seconds_left=None if left is None else round(left, 1))
        elif moment - begun > 10:
            left_text = "" if left is None else f", {left:.0f} s left"
            print(f"{what} {now.done / 1e6:,.0f} of {now.total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s{left_text}",
                  file=sys.stderr, flush=True)

    return tell
