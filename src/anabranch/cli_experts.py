"""`anabranch experts`: argv -> one public call -> what a person, or a program, wants to read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from anabranch import console
from anabranch.errors import RecipeError

if TYPE_CHECKING:
    from anabranch.artifacts import MergeManifest

BUILD = "build"
MANIFEST = "manifest.json"


class _BuildByDefault(TyperGroup):
    """`experts CONFIG OUT` is `experts build CONFIG OUT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [BUILD, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(name="experts", cls=_BuildByDefault, no_args_is_help=True, rich_markup_mode=None,
                  help="Dense models to a mixture of experts: `anabranch experts CONFIG OUT`.")

Seed = Annotated[int, typer.Option(help="of noise, random routers and the order of texts", min=0)]
Prompts = Annotated[Path | None, typer.Option(help="texts on which routing is measured (.txt, .jsonl), in place of the "
                                                   "config's")]
Text = Annotated[Path | None, typer.Option("--calibrate", help="texts on which router rows, and nothing else, are trained: "
                                                               ".txt, or .jsonl with text, content, messages, or prompt + "
                                                               "completion (joined)")]
Steps = Annotated[int | None, typer.Option(help="of calibration, 8 texts each; 30 if not given", min=1, max=100_000)]
Rate = Annotated[float | None, typer.Option(help="of calibration; 0.01 if not given", min=0.0)]
Balance = Annotated[float | None, typer.Option(help="of calibration: weight of spreading tokens evenly; 0.01 if not given",
                                               min=0.0)]
Pickle = Annotated[bool, typer.Option(help="read .bin weights too (weights_only)")]


@app.command(BUILD)
def build(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a config of mergekit-moe's (YAML)")],
    result: Annotated[Path, typer.Argument(metavar="OUT", help="the model folder to make")],
    dry_run: console.DryRun = False,
    prompts: Prompts = None,
    calibrate: Text = None,
    steps: Steps = None,
    learning_rate: Rate = None,
    balance: Balance = None,
    seed: Seed = 0,
    untrained: Annotated[bool, typer.Option("--i-understand-this-is-not-useful-without-training",
                                            help="make experts that are all one model")] = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    max_shard_size: console.Shards = "5GB",
    allow_pickle: Pickle = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="go on where a result holds NaN or infinity")] = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Put dense models side by side as experts. Interrupted? The same command goes on where it was."""
    with console.reported(as_json):
        with console.imports():
            from anabranch.experts import build as building

        asked = {"steps": steps, "learning_rate": learning_rate, "balance": balance}
        given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        if given and calibrate is None:
            raise RecipeError(f"{', '.join('--' + key.replace('_', '-') for key in given)}: of a calibration, and none is "
                              "asked for. Give --calibrate TEXTS too.")
        options = building.Options(seed=seed, prompts=prompts, calibration=calibrate, untrained=untrained,
                                   allow_pickle=allow_pickle, **given)
        warn = console.warner(quiet, as_json)
        if dry_run:
            console.plan(building.forecast_experts(config, result, options, max_shard_size=max_shard_size, threads=threads,
                                                   memory=memory, warn=warn), quiet, as_json)
            return
        begun, there = time.monotonic(), (result / MANIFEST).is_file()
        with console.progress("experts", quiet, as_json) as progress:
            manifest = building.build_experts(config, result, options, max_shard_size=max_shard_size, threads=threads,
                                              memory=memory, allow_nonfinite=allow_nonfinite, warn=warn, progress=progress)
        _tell_built(manifest, result, time.monotonic() - begun, quiet or there, as_json)  # a warning said that it is there


def _tell_built(manifest: MergeManifest, result: Path, seconds: float, quiet: bool, as_json: bool) -> None:
    from anabranch.experts.balance import words

    report = manifest.report
    if as_json:
        console.line("done", out=str(result), seconds=round(seconds, 3), **report)
        return
    if quiet:
        return
    for when, routing in report.get("router", {}).items():
        for text in words(f"router, {when} calibration" if "calibration" in report else "router", routing):
            console.out.print(escape(text))
    if "calibration" in report:
        said = report["calibration"]
        console.out.print(f"calibration: {said['steps']} steps, next-token loss {said['loss_before']} -> {said['loss_after']} "
                          f"on {said['measured']} texts" + (" kept out of it" if said["held_out"] else
                                                            ", the same that it was trained on"))
    total, active = (report["parameters"][key] for key in ("all", "active"))
    console.out.print(escape(f"{result}: {report['layout']}, {total:,} parameters, of which a token passes {active:,}, in "
                             f"{manifest.dtype}, {seconds:.1f} s"))


@app.command()
def match(
    reference: Annotated[str, typer.Argument(metavar="A", help="a mixture of experts: the order that is wanted")],
    model: Annotated[str, typer.Argument(metavar="B", help="another one, of the same kind")],
    result: Annotated[Path, typer.Argument(metavar="OUT", help="the folder for B with its experts in the order of A's")],
    dry_run: console.DryRun = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    max_shard_size: console.Shards = "5GB",
    allow_pickle: Pickle = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Before `anabranch merge` of two mixtures: each expert beside the one it is most like, router rows with them."""
    with console.reported(as_json):
        with console.imports():
            from anabranch.experts.match import match_experts

        if result.is_file():
            raise RecipeError(f"{result} is a file; OUT is the folder to make.")
        with console.progress("match", quiet, as_json) as progress:
            manifest, report, lines = match_experts(reference, model, result, dry_run=dry_run, allow_pickle=allow_pickle,
                                                    max_shard_size=max_shard_size, threads=threads, memory=memory,
                                                    progress=progress)
        told = [f"{one['layer']}: {one['moved']} experts moved, mean similarity {one['similarity_before']:.4f} -> "
                f"{one['similarity_after']:.4f}, order {' '.join(map(str, one['order']))}" for one in report["layers"]]
        if manifest is None:
            console.plan([*told, *lines], quiet, as_json)
        elif as_json:
            console.line("done", out=str(result), **report)
        elif not quiet:
            for text in [*told, f"{result}: the same function, experts in the order of {reference}"]:
                console.out.print(escape(text))
