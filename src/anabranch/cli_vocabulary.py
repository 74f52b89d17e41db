"""`anabranch vocabulary`: argv -> one public call -> what a person, or a program, wants to read."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from anabranch import console
from anabranch.errors import RecipeError

if TYPE_CHECKING:
    from anabranch.transplant.matrix import Settings
    from anabranch.transplant.moving import Scored
    from anabranch.transplant.text_loss import Loss

WHERE = "no, yes, embed (the input embedding), lm_head (the head)"


def vocabulary(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="the model: a folder or a Hub id")],
    donor: Annotated[str, typer.Argument(metavar="DONOR", help="whose tokenizer it gets: a model, or for some methods a "
                                                               "tokenizer alone")],
    result: Annotated[Path | None, typer.Argument(metavar="OUT", help="the model folder to make; none with --compare")] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="shared tokens that make up a new one (omp, common_interpolation, stb)",
                                   min=1)] = 64,
    cosine: Annotated[bool, typer.Option("--cosine-similarity/--no-cosine-similarity", "-c/-nc",
                                         help="neighbours by cosine instead of distance")] = False,
    method: Annotated[str, typer.Option("--approximation-method", "-a", "--method",
                                        help="how rows of unshared tokens are made: omp, common_interpolation, subword, mean, "
                                             "zero, randn, john_hewitt, landmark_pca, stb, procrustes, ridge, focus, composed; "
                                             "or `all`, as --compare")] = "composed",
    weight_scheme: Annotated[str, typer.Option("--weight-scheme", "-w", help="of common_interpolation: distance_proportional, "
                                                                             "barycentric, least_squares")
                             ] = "distance_proportional",
    subword_method: Annotated[str, typer.Option("--subword-method", "-s",
                                                help="of subword: mean, sum, weighted_mean, first_last")] = "mean",
    batch_size: Annotated[int, typer.Option(help="tokens at once; 0 or less: all")] = 512,
    prefix_match: Annotated[str, typer.Option("--prefix-match", "-pm", help="a token without a match takes the row of its "
                                                                            f"longest prefix: {WHERE}")] = "no",
    byte_match: Annotated[str, typer.Option("--byte-match", "-bm", help=f"tokens of one byte match '<0xHH>': {WHERE}")] = "no",
    magikarp: Annotated[bool, typer.Option("--magikarp/--no-magikarp", help="find badly trained tokens: the model's are no "
                                                                            "matches, the donor's become zero")] = False,
    noise: Annotated[float, typer.Option("--new-vocab-noise", "-nvn", help="spread of noise added to made rows")] = 0.0,
    scale: Annotated[float, typer.Option("--new-vocab-scale", "-nvs", help="factor of made rows")] = 1.0,
    seed: Annotated[int, typer.Option(help="of what is drawn", min=0)] = 0,
    text: Annotated[Path | None, typer.Option(help="held-out text (.txt, .jsonl, .parquet): loss per byte before and after")
                    ] = None,
    column: Annotated[str | None, typer.Option(help="of --text: which column, or several as A+B")] = None,
    max_bytes: Annotated[int, typer.Option(help="of --text: most bytes that are scored", min=1)] = 200_000,
    compare: Annotated[bool, typer.Option("--compare", help="every method on --text, ranked; writes no model")] = False,
    dry_run: console.DryRun = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    max_shard_size: console.Shards = "5GB",
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Give MODEL the tokenizer of DONOR: shared tokens keep their rows, all others are made."""
    with console.reported(as_json):
        compare = compare or method == "all"
        _check(result, text, column, compare, dry_run)
        with console.imports():
            from anabranch.transplant import moving
            from anabranch.transplant.matrix import Settings

        chosen: dict[str, Any] = {  # words that Settings checks
            "method": "composed" if method == "all" else method, "weight_scheme": weight_scheme,
            "subword_method": subword_method, "prefix_match": prefix_match, "byte_match": byte_match}
        settings = Settings(k=k, cosine=cosine, batch_size=batch_size, magikarp=magikarp, noise=noise, scale=scale, seed=seed,
                            **chosen)
        warn = console.warner(quiet, as_json)
        if compare:
            assert text is not None
            _compare(model, donor, text, column, max_bytes, settings, quiet, as_json)
            return
        assert result is not None
        texts = None if text is None else _texts(text, column)
        if dry_run:
            console.plan(moving.forecast_transplant(model, donor, result, settings, max_shard_size=max_shard_size,
                                                    threads=threads, memory=memory, warn=warn), quiet, as_json)
            return
        begun = time.monotonic()
        with console.progress("vocabulary", quiet, as_json) as progress:
            manifest, transplant = moving.transplant_vocabulary(
                model, donor, result, settings, max_shard_size=max_shard_size, threads=threads, memory=memory, warn=warn,
                progress=progress)
        measured = None if texts is None else moving.losses(model, donor, texts, settings, most=max_bytes)
        _tell_done(result, manifest.parameters, moving.count_lines(transplant.report), transplant.report, measured,
                   time.monotonic() - begun, quiet, as_json)


def _check(result: Path | None, text: Path | None, column: str | None, compare: bool, dry_run: bool) -> None:
    """Raises RecipeError for options that do not go together."""
    problems = []
    if compare and text is None:
        problems.append("--compare ranks methods by their loss: give held-out text with --text")
    if compare and result is not None:
        problems.append(f"--compare writes no model: leave {result} out, and make it with the method that you choose")
    if compare and dry_run:
        problems.append("--compare writes nothing, so that there is nothing to forecast: leave --dry-run out")
    if column is not None and text is None:
        problems.append("--column names a column of held-out text: give that with --text")
    if not compare and result is None:
        problems.append("OUT is missing: the model folder to make")
    if problems:
        raise RecipeError.of("vocabulary: this cannot be:", problems)


def _texts(path: Path, column: str | None) -> list[str]:
    from anabranch.transplant.text_loss import read_texts

    return read_texts(path, column)


def _compare(model: str, donor: str, text: Path, column: str | None, max_bytes: int, settings: Settings, quiet: bool,
             as_json: bool) -> None:
    from anabranch.transplant.moving import compare_methods

    def tell(name: str) -> None:
        if not quiet and not as_json:
            console.err.print(f"tried {name}", markup=False)

    before, ranked = compare_methods(model, donor, _texts(text, column), settings, most=max_bytes,
                                     warn=console.warner(quiet, as_json), tell=tell)
    if as_json:
        console.line("done", before=dataclasses.asdict(before), methods=[_fields(one) for one in ranked])
        return
    width = max(len(one.name) for one in ranked)
    console.out.print(escape(f"{'as it is':<{width}}  {before.nats_per_byte:.4f} nats/byte, {before.bytes:,} bytes in "
                             f"{before.tokens:,} tokens"))
    for one in ranked:
        console.out.print(escape(f"{one.name:<{width}}  " + (
            f"not tried: {one.skipped}" if one.loss is None else
            f"{one.loss.nats_per_byte:.4f} ({one.loss.nats_per_byte - before.nats_per_byte:+.4f})")))


def _fields(one: Scored) -> dict[str, Any]:
    return {"name": one.name, "loss": None if one.loss is None else dataclasses.asdict(one.loss), "report": one.report,
            **({"skipped": one.skipped} if one.skipped else {})}


def _tell_done(result: Path, parameters: int, lines: list[str], report: dict[str, Any], measured: tuple[Loss, Loss] | None,
               seconds: float, quiet: bool, as_json: bool) -> None:
    if as_json:
        told = {} if measured is None else {"before": dataclasses.asdict(measured[0]), "after": dataclasses.asdict(measured[1])}
        console.line("done", out=str(result), parameters=parameters, seconds=round(seconds, 3), report=report, **told)
        return
    if quiet:
        return
    for line in lines:
        console.out.print(escape(line))
    if measured is not None:
        before, after = measured
        console.out.print(escape(
            f"loss: {before.nats_per_byte:.4f} nats/byte before, {after.nats_per_byte:.4f} after "
            f"({after.nats_per_byte - before.nats_per_byte:+.4f}), over {before.bytes:,} bytes in {before.tokens:,} tokens "
            f"before and {after.tokens:,} after" + (f"; the new tokenizer changes {after.changed:.0%} of the windows "
                                                    "on their way through" if after.changed else "")))
    console.out.print(escape(f"{result}: {parameters:,} parameters, {seconds:.1f} s"))
