"""`anabranch work`, `train-branch`, `status`, `export`, `add-branch`: the commands of machines that share a run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from anabranch.errors import RecipeError, printable

out = Console(soft_wrap=True, highlight=False, emoji=False)

Root = Annotated[str, typer.Argument(metavar="RUN", help="the run folder, or the address of its store, as s3://bucket/run")]
BaseFolder = Annotated[Path | None, typer.Option("--model", help="where the base lies on this machine")]
Trust = Annotated[bool, typer.Option("--trust", help="run what the recipe brings: a trainer's command, a model's own code")]
Cache = Annotated[Path | None, typer.Option(help="where downloads are kept and work is done; default: $ANABRANCH_CACHE, or "
                                                 "~/.cache/anabranch")]


Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value over the recipe's; repeatable")]


def _tell(text: str) -> None:
    out.print(escape(printable(text)))  # workers elsewhere wrote some of it


def store_of(root: str) -> str | None:
    """The address of a store, if this is one or a run folder that has one; None for a plain run folder."""
    if "://" in root:
        return root
    folder = Path(root)
    if (folder / "run.json").is_file():
        return str(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no run folder: told by who opens it
        launch = json.loads((folder / "recipe.json").read_text())["recipe"]["launch"]
        if launch["store"] is not None or launch["launcher"] != "local":
            return str(launch["store"] or folder / "store")
    return None


def work(
    root: Root,
    only: Annotated[str | None, typer.Option(help="this job alone, as `anabranch status` calls it: branch-2")] = None,
    model: BaseFolder = None,
    trust: Trust = False,
    cache: Cache = None,
) -> None:
    """Take whatever is free of a run's jobs until all is done. Start as many as you like, anywhere.

    Exit code 85: it was asked to stop (SIGTERM, SIGINT, SIGUSR1, SIGUSR2), and saved; start it again.
    """
    from anabranch.worker import work as begin

    address = store_of(root)
    if address is None:
        raise RecipeError(f"{root}: no store here. `anabranch run recipe.yaml` makes one where the recipe's `launch` has a "
                          "`store` or another `launcher` than local; or train one branch with `anabranch train-branch`.")
    raise typer.Exit(begin(address, only=only, model=model, trust=trust, cache=cache, tell=_tell))


def perform(folder: Path, job: str, model: Annotated[Path | None, typer.Option()] = None,
            trust: Annotated[bool, typer.Option("--trust")] = False) -> None:
    """One job in a worker's workspace, in this process."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process, one GPU: the trainer refuses to see several
    from anabranch.perform import main

    main(folder, job, model, trust)


def train_branch(
    root: Root,
    branch: Annotated[int, typer.Argument(help="0 .. K-1", metavar="K", min=0)],
    model: BaseFolder = None,
    trust: Trust = False,
    cache: Cache = None,
) -> None:
    """Train one branch: in a run folder that this machine sees, or pulled from a store and pushed back.

    Goes on from its newest checkpoint, whoever made it.
    """
    if (address := store_of(root)) is not None:
        from anabranch.worker import work as begin

        raise typer.Exit(begin(address, only=f"branch-{branch}", model=model, trust=trust, cache=cache, tell=_tell))
    # One process, one GPU: the trainer refuses to see several. The launcher gives each branch its own.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    from anabranch.run import reopen_run, train_one

    manifest = train_one(reopen_run(Path(root), model=model, tell=_tell), branch)
    _tell(f"branch {branch}: {manifest.steps} steps, {manifest.tokens_seen:,} tokens seen")


def status(
    root: Root,
    watch: Annotated[bool, typer.Option("--watch", help="again and again, until all is done")] = False,
    every: Annotated[float, typer.Option(help="seconds between looks", min=0.2)] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a look")] = False,
) -> None:
    """What is done, who holds what, how fast, how long still, what failed."""
    from anabranch.status import Observer

    observer = Observer(root, store_of(root))
    while True:
        seen = observer.look()
        _show(seen, as_json, clear=watch and out.is_terminal)
        if not watch or seen.finished:
            return
        time.sleep(every)


def _show(seen: Any, as_json: bool, clear: bool) -> None:
    if as_json:
        print(printable(seen.as_json()), flush=True)
        return
    if clear:
        out.clear()
    for line in seen.lines():
        _tell(line)


def export(
    recipe: Annotated[Path, typer.Argument(help="the recipe (YAML)")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to write the job files")],
    trainer: Annotated[str, typer.Option(help="trl, axolotl, llamafactory or command")] = "trl",
    benchmarks: Annotated[str | None, typer.Option(
        metavar="PROGRAM", help="instead: scripts that score a run's models with lmms-eval or vlmevalkit; RECIPE may be "
                                "the run's folder")] = None,
    overrides: Overrides = None,
) -> None:
    """Job files for another trainer: per branch its rows, a config and a script. Measures and splits first if need be.

    With --benchmarks: scripts that score the run's models with an outside program.
    """
    if benchmarks is not None:
        from anabranch.cli_outside import export_benchmarks

        export_benchmarks(recipe, folder, benchmarks, overrides, _tell)
        return
    from anabranch.cli import _recipe
    from anabranch.run import open_run, run_stages
    from anabranch.trainers.job_files import TRAINERS, write_job_files

    if trainer not in TRAINERS:
        from anabranch.errors import closest

        raise RecipeError(f"--trainer {trainer}: no such trainer.{closest(trainer, TRAINERS)}")
    run = open_run(_recipe(recipe, overrides), tell=_tell)
    run_stages(run, until="split")
    for path in write_job_files(run, folder, trainer):
        _tell(f"written: {path}")


def add_branch(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the run folder")],
    branch: Annotated[int, typer.Argument(help="0 .. K-1", metavar="K", min=0)],
    checkpoint: Annotated[Path, typer.Argument(metavar="MODEL", help="the model folder that another trainer left")],
) -> None:
    """Take in a branch that was trained elsewhere, after checking that it can be one."""
    from anabranch.run import reopen_run
    from anabranch.trainers.returned import accept_branch

    manifest = accept_branch(reopen_run(folder, tell=_tell), branch, checkpoint)
    _tell(f"branch {branch}: taken from {checkpoint}, {len(manifest.files)} weight files")
