"""argv -> one public call -> one artifact -> what a person wants to read; no logic.

Exit codes: 0 done; 1 done and the verdict is bad; 2 the user must change something (one message, no traceback); 130 stopped
by Ctrl-C, 143 by SIGTERM; 85 it was asked to stop and saved: start it again; 75 a worker's machine or its store had trouble:
start it again later, or elsewhere. Anything else is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from anabranch import (
    cli_diagnose,
    cli_experts,
    cli_lora,
    cli_merge,
    cli_mergeability,
    cli_outside,
    cli_pilot,
    cli_search,
    cli_surgery,
    cli_vocabulary,
    cli_work,
    exit_codes,
)
from anabranch.errors import AnabranchError, OutputError, Preempted, RecipeError, printable

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Measure gradient conflict in an instruction mixture, split it, train branches that never talk, merge once, "
         "and say whether it paid.")
out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

RecipeFile = Annotated[Path, typer.Argument(help="the recipe (YAML); `anabranch init` writes one")]
RunFolder = Annotated[Path, typer.Argument(help="the run folder: the recipe's `output`")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value over the recipe's; repeatable")]


def main() -> None:
    """The `anabranch` command."""
    try:
        app()
    except Preempted as error:
        err.print(printable(str(error)), markup=False)
        sys.exit(exit_codes.PREEMPTED)
    except AnabranchError as error:
        err.print(printable(f"{type(error).__name__}: {error}"), style="red", markup=False)
        sys.exit(exit_codes.MUST_ACT)
    except SystemExit as ended:  # typer turns Ctrl-C into this
        if ended.code in (130, 143):
            err.print("stopped; finished work is kept. The same command goes on from here.")
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise  # the others are not the user's to mend
        err.print(f"OutputError: {error.strerror}: {error.filename or 'while writing'}. Free space, mend the permissions or "
                  "give another place, then run the same command again: finished work is kept.", style="red", markup=False)
        sys.exit(exit_codes.MUST_ACT)


def _tell(text: str) -> None:
    out.print(escape(printable(text)))


def _progress() -> Callable[[str, str, int, int], None]:
    """One line that moves on a terminal; elsewhere a plain line every ten seconds."""
    state: dict[str, Any] = {"stage": None, "begun": 0.0, "first": 0, "told": 0.0}

    def tell(stage: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != state["stage"] or done < state["first"]:
            state.update(stage=stage, begun=now, first=done, told=now)
        left = ""
        if done > state["first"]:
            seconds = (now - state["begun"]) * (total - done) / (done - state["first"])
            left = f", {seconds / 60:.1f} min left" if seconds > 90 else f", {seconds:.0f} s left"
        share = f"{done / total:.0%}" if total else "0%"
        line = f"{stage} {share}{left if done < total else ''} {what}"
        if err.is_terminal:
            print(f"\r\x1b[2K{line[: err.width - 1]}" if done < total else "\r\x1b[2K", end="", file=sys.stderr, flush=True)
        elif now - state["told"] > 10 and done < total:
            state["told"] = now
            print(line, file=sys.stderr, flush=True)

    return tell


def _recipe(path: Path, overrides: list[str] | None) -> Any:
    import yaml

    from anabranch.recipe import load_recipe, read_yaml

    changes = {}
    for text in overrides or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(f"--set {text}: wanted section.key=value, as in --set split.groups=8.")
        try:
            changes[key] = read_yaml(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {text}: the value is not valid YAML ({getattr(error, 'problem', error)}).") from error
    return load_recipe(path, changes)


def _stage(name: str | None, option: str) -> str | None:
    from anabranch.errors import closest
    from anabranch.run import STAGES

    if name is not None and name not in STAGES:
        raise RecipeError(f"{option} {name}: no such stage.{closest(name, STAGES)} They run in the order "
                          f"{', '.join(STAGES)}.")
    return name


for command in (cli_merge.merge, cli_merge.verify, cli_merge.methods, cli_vocabulary.vocabulary, cli_search.search,
                cli_surgery.tensors, cli_surgery.shuffle, cli_surgery.fill, cli_diagnose.diagnose, cli_pilot.pilot,
                cli_work.work, cli_work.status, cli_work.export, cli_outside.benchmarks):
    app.command()(command)
app.command("train-branch")(cli_work.train_branch)
app.command("add-branch")(cli_work.add_branch)
app.command(hidden=True)(cli_work.perform)
app.command("pilot-arms", hidden=True)(cli_pilot.pilot_arms)
app.add_typer(cli_lora.app, name="lora")
app.add_typer(cli_experts.app)
app.add_typer(cli_mergeability.app)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="where to write it")] = Path("recipe.yaml")) -> None:
    """Write a commented recipe."""
    from anabranch.artifacts import write_atomically

    if path.exists():
        raise OutputError(f"{path} is there already. Give another name, or remove it.")
    write_atomically(path, resources.files("anabranch").joinpath("recipe_template.yaml").read_bytes())
    _tell(f"{path} written. Say where your data lies under `mixture.sources`, then: anabranch run {path} --dry-run")


@app.command()
def run(
    recipe: RecipeFile,
    start: Annotated[str | None, typer.Option("--from", help="make this stage and all after it anew")] = None,
    until: Annotated[str, typer.Option(help="stop after this stage")] = "report",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and every problem; do nothing")] = False,
    overrides: Overrides = None,
    launcher: Annotated[str | None, typer.Option(help="local, ray, slurm or export; default: the recipe's `launch`")] = None,
    store: Annotated[str | None, typer.Option(help="folder or URL that all workers see, as s3://bucket/run")] = None,
) -> None:
    """Every stage that is not done: mixture, gradients, conflict, split, train, merge, evaluate, report."""
    place = None if store is None else store if ":" in store.split("/")[0] else str(Path(store).absolute())
    given = {"launch.launcher": launcher, "launch.store": place}
    loaded = _recipe(recipe, [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value)])
    first, last = _stage(start, "--from"), _stage(until, "--until") or "report"
    if dry_run:
        from anabranch.forecast import forecast

        for line in forecast(loaded, start=first, until=last, progress=_progress()):
            _tell(line)
        return
    from anabranch.distribute import run_anywhere
    from anabranch.run import open_run

    run_anywhere(open_run(loaded, tell=_tell, progress=_progress()), start=first, until=last)


@app.command()
def gradients(
    recipe: RecipeFile,
    shard: Annotated[str, typer.Option(help="i/n: this machine sketches units i, i+n, .. (i from 0)")] = "0/1",
    overrides: Overrides = None,
) -> None:
    """Measure gradient sketches, perhaps a share of them; the last shard to end completes the stage."""
    part, slash, whole = shard.partition("/")
    if not (slash and part.isdigit() and whole.isdigit() and 0 <= int(part) < int(whole)):
        raise RecipeError(f"--shard {shard}: wanted i/n with 0 <= i < n, as in --shard 0/4.")
    loaded = _recipe(recipe, overrides)
    from anabranch.run import gradient_stage, mixture_stage, open_run

    opened = open_run(loaded, tell=_tell, progress=_progress())
    mixture_stage(opened)
    if gradient_stage(opened, (int(part), int(whole))) is None:
        _tell(f"gradients: shard {shard} is done; units of other shards are missing.")


@app.command()
def report(folder: RunFolder) -> None:
    """Print the report and write RUN/report.html."""
    from rich.markdown import Markdown

    from anabranch.report import markdown_report, write_report

    text, path = markdown_report(folder), write_report(folder)
    if out.is_terminal:
        out.print(Markdown(text), soft_wrap=False)
    else:
        print(text)
    _tell(f"\nThe whole report, with its pictures: {path}")


@app.command()
def compare(
    recipe: RecipeFile,
    methods: Annotated[str | None, typer.Option(
        help="arms, as in joint,random:4,merit:2; a number is K, for merit the axes (merit:2 makes 4 groups)")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="of arms: seeds 0 .. n-1; 3 where it is not said")] = None,
    merge_methods: Annotated[str | None, typer.Option(
        help="instead of arms: merge methods on the branches of the recipe's own split, as in ties,star,tsv")] = None,
    overrides: Overrides = None,
) -> None:
    """Every arm on the same token budget, at three places, over seeds: did the split pay?"""
    if merge_methods is not None and not (methods is None and seeds is None):
        raise RecipeError("--merge-methods merges one set of branches, the recipe's own split under its own seed, in several "
                          "ways; --methods and --seeds train others. Give them in two commands.")
    loaded = _recipe(recipe, overrides)
    from anabranch.run import open_run

    if merge_methods is not None:
        from anabranch.operators import compare_operators, operators_markdown

        print(operators_markdown(compare_operators(open_run(loaded, tell=_tell, progress=_progress()), merge_methods)))
        return
    from anabranch.compare import DEFAULT, parse_arms, run_comparison
    from anabranch.report import comparison_markdown, write_report

    arms = parse_arms(DEFAULT if methods is None else methods)
    opened = open_run(loaded, tell=_tell, progress=_progress())
    comparison = run_comparison(opened, arms, range(3 if seeds is None else seeds))
    print(comparison_markdown(comparison))
    _tell(f"\nThe whole report, with its pictures: {write_report(opened.folder)}")


@app.command("compare-arm", hidden=True)
def compare_arm(folder: Path, arm: str, seed: int) -> None:
    """One arm of a comparison, in this process."""
    from anabranch.compare import Arm, parse_arms, run_arm
    from anabranch.run import reopen_run

    name, _, reference = arm.partition(":")
    parsed = Arm(arm, name, 1, reference) if name == "joint_matched" else parse_arms(arm)[0]
    run_arm(reopen_run(folder, tell=_tell), parsed, seed)


@app.command()
def harness(
    model: Annotated[Path, typer.Argument(help="a model folder: RUN/merged, say")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated")],
    include_path: Annotated[Path | None, typer.Option(help="a folder of task YAML files of your own")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows per task")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file")] = Path("harness.json"),
) -> None:
    """Score a model folder with lm-evaluation-harness."""
    from anabranch.harness import write_harness

    names = [t for t in tasks.split(",") if t]
    for task, metrics in write_harness(model, names, output, include_path=include_path, limit=limit).items():
        _tell(f"{task}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
    _tell(f"written: {output}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="where to make it")] = Path("demo-run"),
    seeds: Annotated[int, typer.Option(min=1, help="seeds of the comparison")] = 1,
    vision: Annotated[bool, typer.Option("--vision", help="of pictures: small tasks about shapes, and a tiny LLaVA")] = False,
) -> None:
    """The whole story on an embedded mixture and model, in minutes on two cores."""
    from anabranch.demo.story import tell_picture_story, tell_story

    (tell_picture_story if vision else tell_story)(folder, seeds=seeds, tell=_tell, progress=_progress())
