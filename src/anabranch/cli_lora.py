"""`anabranch lora`: extract, merge, apply."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from anabranch import console

if TYPE_CHECKING:
    from anabranch.artifacts import MergeManifest

app = typer.Typer(no_args_is_help=True, help="Low-rank adapters: taken from a fine-tune, merged, folded into a base.")
Out = Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")]
Factors = Annotated[str | None, typer.Option("--dtype", help=(
    "of the factors: float32, bfloat16 or float16; if not said, as the fine-tune's matrices. Narrower ones are rounded, each "
    "product by some 0.3 % in bfloat16: the report tells. Only float32 gives a fine-tune back at full rank"))]
ROWS = 12
MANIFEST = "manifest.json"
SHOWN = 4  # names of what is saved whole
NARROW = 1e-5  # relative; more than float32 rounds by


@app.command()
def extract(
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="a model folder, or an id on the Hub")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="what it was fine-tuned from")],
    result: Out,
    rank: Annotated[int | None, typer.Option("--rank", "--max-rank", help="most directions of each matrix; 128 if nothing else "
                                             "is said", min=1)] = None,
    energy: Annotated[float | None, typer.Option(help="keep this share of each matrix's squared change, 0 to 1")] = None,
    budget: Annotated[int | None, typer.Option("--budget", "--parameters", help="parameters of all factors together, spent "
                                                                                "where they keep most", min=1)] = None,
    include: Annotated[list[str] | None, typer.Option("--include-regex", "-i", help="modules to decompose; regular "
                                                                                    "expressions. Embeddings and output "
                                                                                    "head that changed are saved whole "
                                                                                    "all the same: -e leaves them out")] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude-regex", "-e", help="modules to leave out, those that "
                                                                                    "would be saved whole too")] = None,
    save_module: Annotated[list[str] | None, typer.Option(help="a module to save whole, by name or its last part")] = None,
    embed_lora: Annotated[bool, typer.Option("--embed-lora/--no-embed-lora", help="decompose embeddings and output head, "
                                                                                  "instead of saving them whole")] = False,
    distribute_scale: Annotated[bool, typer.Option("--distribute-scale/--no-distribute-scale", help="singular values shared "
                                                                                                    "between both factors, or "
                                                                                                    "all in A")] = True,
    sv_epsilon: Annotated[float, typer.Option(help="leave out singular values not above this", min=0)] = 0.0,
    skip_undecomposable: Annotated[bool, typer.Option("--skip-undecomposable", help="leave out norms and the like, instead of "
                                                      "saving them whole")] = False,
    dtype: Factors = None,
    seed: Annotated[int, typer.Option(help="of the random subspaces", min=0)] = 0,
    threads: console.Threads = None,
    memory: console.Memory = None,
    dry_run: console.DryRun = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """The difference of two models as an adapter that PEFT loads. Interrupted? The same command goes on where it was."""
    with console.reported(as_json):
        with console.imports():
            from anabranch.lora import extract as work

        given: dict[str, Any] = {
            "rank": rank, "energy": energy, "budget": budget, "include": include or (), "exclude": exclude or (),
            "save_modules": save_module or (), "embed_lora": embed_lora, "distribute_scale": distribute_scale,
            "sv_epsilon": sv_epsilon, "skip_undecomposable": skip_undecomposable, "dtype": dtype, "seed": seed,
            "threads": threads, "memory": memory}
        warn = console.warner(quiet, as_json)
        if dry_run:
            console.plan(work.forecast(finetuned, base, result, warn=warn, **given), quiet, as_json)
            return
        begun, there = time.monotonic(), (result / MANIFEST).is_file()
        with console.progress("lora extract", quiet, as_json) as progress:
            manifest = work.extract(finetuned, base, result, progress=progress, warn=warn, **given)
        _tell(result, manifest, time.monotonic() - begun, quiet or there, as_json)


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a merge config whose models are adapters; with rank, energy "
                                                                  "or budget, and space")],
    result: Out,
    seed: Annotated[int, typer.Option(help="of methods that draw random numbers, and of random subspaces", min=0)] = 0,
    threads: console.Threads = None,
    memory: console.Memory = None,
    dry_run: console.DryRun = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Adapters in, one adapter out, with any merge method, exactly; ranks may differ."""
    with console.reported(as_json):
        with console.imports():
            from anabranch.lora import combine as work

        warn = console.warner(quiet, as_json)
        if dry_run:
            console.plan(work.forecast(config, result, seed=seed, threads=threads, memory=memory, warn=warn), quiet, as_json)
            return
        begun, there = time.monotonic(), (result / MANIFEST).is_file()
        with console.progress("lora merge", quiet, as_json) as progress:
            manifest = work.merge_adapters(config, result, seed=seed, threads=threads, memory=memory, progress=progress,
                                           warn=warn)
        _tell(result, manifest, time.monotonic() - begun, quiet or there, as_json)


@app.command()
def apply(
    base: Annotated[str, typer.Argument(metavar="BASE", help="a model folder, or an id on the Hub")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="an adapter that PEFT saved: LoRA, rsLoRA, DoRA")],
    result: Out,
    dtype: Dtype = None,
    max_shard_size: console.Shards = "5GB",
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="go on where a result holds NaN or "
                                                                            "infinity")] = False,
    threads: console.Threads = None,
    memory: console.Memory = None,
    dry_run: console.DryRun = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """An adapter folded into its base for good: exact, in float32, one tensor at a time, rounded once."""
    with console.reported(as_json):
        with console.imports():
            from anabranch.lora import apply as work

        warn = console.warner(quiet, as_json)
        if dry_run:
            console.plan(work.forecast(base, adapter, result, dtype=dtype, max_shard_size=max_shard_size, threads=threads,
                                       memory=memory, warn=warn), quiet, as_json)
            return
        begun, there = time.monotonic(), (result / MANIFEST).is_file()
        with console.progress("lora apply", quiet, as_json) as progress:
            manifest = work.apply(base, adapter, result, dtype=dtype, max_shard_size=max_shard_size, threads=threads,
                                  memory=memory, allow_nonfinite=allow_nonfinite, progress=progress, warn=warn)
        seconds = time.monotonic() - begun
        if as_json:
            console.line("done", out=str(result), parameters=manifest.parameters, seconds=round(seconds, 3))
        elif not (quiet or there):
            console.out.print(escape(f"{result}: {manifest.parameters:,} parameters in {manifest.dtype}, {seconds:.1f} s"))


def _tell(result: Path, manifest: MergeManifest, seconds: float, quiet: bool, as_json: bool) -> None:
    """What an adapter keeps: over all, and of the matrices that lose most."""
    from anabranch.lora.output import kept_or_wrong, read_report

    all_ = manifest.report
    if as_json:
        console.line("done", out=str(result), seconds=round(seconds, 3), **all_)
        return
    if quiet:
        return
    matrices = read_report(result)["matrices"]
    for text in _table(matrices):
        console.out.print(escape(text))
    low, high = all_["ranks"]
    saved = all_.get("saved_whole") or []
    console.out.print(escape(
        f"{result}: {all_['matrices']} matrices of rank {low if low == high else f'{low} to {high}'}, {all_['parameters']:,} "
        f"parameters; {kept_or_wrong(all_)}"
        + (f", relative error {all_['relative_error']:.3g}" if "relative_error" in all_ else "")
        + f"; factors in {all_['factors']}"
        + (f", whose rounding alone is {all_['rounding']:.2g} of the change" if all_.get("rounding", 0) > NARROW else "")
        + (f"; saved whole: {', '.join(saved[:SHOWN])}{', ..' if len(saved) > SHOWN else ''} ({len(saved)} tensors, "
           f"{all_['saved_parameters']:,} parameters; -e leaves modules out)" if saved else "")
        + f"; {seconds:.1f} s"))


def _table(matrices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The matrices that lose most, one a line."""
    kept = {path: one.get("kept_energy", 1 - one.get("wrong", 0.0)) for path, one in matrices.items()}
    worst = sorted(matrices, key=lambda path: (kept[path], path))[:ROWS]
    if not worst:
        return []
    width = max(map(len, [*worst, "matrix"]))
    last = "error" if {"relative_error", "wrong"} & matrices[worst[0]].keys() else "space"
    lines = [f"{'matrix':<{width}}  {'shape':>14}  {'rank':>5}  {'kept':>8}  {last:>8}"]
    for path in worst:
        one = matrices[path]
        shape = " x ".join(map(str, one["shape"]))
        error = one.get("relative_error", one.get("wrong"))
        lines.append(f"{path:<{width}}  {shape:>14}  {one['rank']:>5}  {_share(one):>8}  "
                     + (f"{error:>8.3g}" if error is not None else f"{one.get('space', ''):>8}"))
    if len(matrices) > len(worst):
        exact = all(kept[path] >= 1 and matrices[path].get("relative_error", 0) <= NARROW for path in matrices)
        how = "are no further away" if "wrong" in matrices[worst[0]] else "lose nothing either" if exact else "lose no more"
        lines.append(f".. and {len(matrices) - len(worst)} more, which {how} (lora_report.json)")
    return lines


def _share(one: Mapping[str, Any]) -> str:
    """Of PEFT's average no share of anything is kept."""
    return "" if "wrong" in one else f"{one.get('kept_energy', 1.0):.2%}"
