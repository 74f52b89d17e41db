"""`anabranch tensors`, `shuffle` and `fill`: small verbs on models and files of tensors."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from anabranch import console
from anabranch.errors import OutputError, RecipeError

if TYPE_CHECKING:
    from anabranch.artifacts import MergeManifest

Nonfinite = Annotated[bool, typer.Option(help="go on where a result holds NaN or infinity")]
Pickle = Annotated[bool, typer.Option(help="read pickled weights too (weights_only; converted once, into the user's cache)")]


def tensors(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a merge config whose models are files (YAML; that of "
                                           "mergekit-pytorch as it is)")],
    result: Annotated[Path, typer.Argument(metavar="OUT", help="the folder to make, or a file NAME.safetensors")],
    union: Annotated[bool, typer.Option("--tensor-union", "-u", help="merge a tensor that some files lack over those that "
                                        "have it, and carry over what the base alone has")] = False,
    intersection: Annotated[bool, typer.Option("--tensor-intersection", "-i", help="leave out what is not in every file"
                                               )] = False,
    dry_run: console.DryRun = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    device: console.Device = "cpu",
    seed: Annotated[int, typer.Option(help="of methods that draw random numbers", min=0)] = 0,
    max_shard_size: console.Shards = "5GB",
    allow_unknown_keys: Annotated[bool, typer.Option(help="warn of keys that mean nothing instead of refusing them")] = False,
    allow_pickle: Pickle = False,
    allow_nonfinite: Nonfinite = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Merge files of tensors by name, whatever model they are of. Interrupted? The same command goes on where it was."""
    with console.reported(as_json):
        if union and intersection:
            raise RecipeError("--tensor-union and --tensor-intersection: give one of them.")
        with console.imports():
            from anabranch.engine import merging, raw

        missing: raw.Missing = "union" if union else "intersection" if intersection else "error"
        options = merging.options_for(seed, max_shard_size, allow_pickle=allow_pickle)
        settings = merging.settings_for(memory, threads, device, allow_nonfinite)
        warn = console.warner(quiet, as_json)
        if dry_run:
            console.plan(raw.forecast_tensors(config, result, missing=missing, options=options, settings=settings,
                                              allow_unknown_keys=allow_unknown_keys, warn=warn), quiet, as_json)
            return
        begun = time.monotonic()
        with console.progress("tensors", quiet, as_json) as progress:
            manifest = raw.merge_tensors(config, result, missing=missing, options=options, settings=settings,
                                         allow_unknown_keys=allow_unknown_keys, progress=progress, warn=warn)
        _tell_done(manifest, result, begun, quiet, as_json)


def shuffle(
    result: Annotated[Path, typer.Argument(metavar="OUT", help="the model folder to make")],
    model: Annotated[list[str], typer.Option("--model", "-m", help="a model to take layers from; once for each")],
    weight: Annotated[list[float], typer.Option("--weight", "-w", help="its chance, in proportion; with --full-random the "
                                                "share of its layers that is taken; once for each model")],
    full_random: Annotated[bool, typer.Option("--full-random", help="layers from anywhere in each model, in any order"
                                              )] = False,
    seed: Annotated[int, typer.Option(help="of the lots that are drawn", min=0)] = 0,
    dtype: Annotated[str | None, typer.Option(help="of the result; each tensor's own if it is not given")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="print the merge config that was drawn")] = False,
    write_config: Annotated[Path | None, typer.Option("--write-config", help="write that merge config to a file, also in a dry "
                                                                "run")] = None,
    dry_run: console.DryRun = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    max_shard_size: console.Shards = "5GB",
    allow_mixed: Annotated[bool, typer.Option(help="take layers of models of different architectures")] = False,
    allow_pickle: Pickle = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """Put a model together from layers of several, drawn by lot."""
    with console.reported(as_json):
        with console.imports():
            from anabranch.engine import merging
            from anabranch.surgery.shuffle import shuffled_config

        options = merging.options_for(seed, max_shard_size, allow_mixed, allow_pickle)
        settings = merging.settings_for(memory, threads)
        layers = [_layers_of(name, allow_pickle) for name in model]
        config = shuffled_config(model, layers, weight, full_random=full_random, seed=seed, dtype=dtype)
        text = merging.text_of(config)
        if print_config:
            console.line("config", text=text) if as_json else print(text, end="")
        if write_config is not None:
            _check_config_place(text, write_config)
        warn = console.warner(quiet, as_json)
        begun = time.monotonic()
        if dry_run:
            console.plan(merging.forecast(config, result, options=options, settings=settings, warn=warn), quiet, as_json)
        else:
            with console.progress("shuffle", quiet, as_json) as progress:
                manifest = merging.merge_config(config, result, options=options, settings=settings, progress=progress,
                                                warn=warn)
        if write_config is not None:
            _keep_config(text, write_config)
        if not dry_run:
            _tell_done(manifest, result, begun, quiet, as_json)


def fill(
    base: Annotated[str, typer.Argument(metavar="BASE", help="the whole model: a folder, or an id of the Hub")],
    partial: Annotated[str, typer.Argument(metavar="PARTIAL", help="some of its tensors: a folder of weights, a safetensors "
                                           "file, or an id of the Hub")],
    result: Annotated[Path, typer.Argument(metavar="OUT", help="the model folder to make")],
    dry_run: console.DryRun = False,
    memory: console.Memory = None,
    threads: console.Threads = None,
    max_shard_size: console.Shards = "5GB",
    allow_pickle: Pickle = False,
    allow_nonfinite: Nonfinite = False,
    quiet: console.Quiet = False,
    as_json: console.Json = False,
) -> None:
    """A whole model with the tensors of a partial one in their places, under whatever prefix they have there."""
    with console.reported(as_json):
        with console.imports():
            from anabranch.engine import making
            from anabranch.engine.checkpoint import Checkpoint
            from anabranch.surgery.fill import filled

        whole = Checkpoint.open(_folder_of(base, allow_pickle))
        part = (Checkpoint.of_file(Path(partial)) if Path(partial).is_file()
                else Checkpoint.open(_folder_of(partial, allow_pickle), config_needed=False))
        made, files, reads, told = filled(whole, part, (base, partial))
        warn = console.warner(quiet, as_json)
        for line in told[1:]:
            warn(line)
        if dry_run:
            lines = making.forecast_made(result, made, files, reads, max_shard_size=max_shard_size, threads=threads,
                                         memory=memory)
            console.plan([told[0], *lines], quiet, as_json)
            return
        begun, there = time.monotonic(), (result / "manifest.json").is_file()
        with console.progress("fill", quiet, as_json) as progress:
            manifest = making.make_model(result, made, files, reads, verb="fill", settings={}, max_shard_size=max_shard_size,
                                         threads=threads, memory=memory, allow_nonfinite=allow_nonfinite, progress=progress,
                                         warn=warn)
        _tell_done(manifest, result, begun, quiet or there, as_json, told[0])


def _folder_of(model: str, allow_pickle: bool, *, adapted: bool = False) -> Path:
    """Where a model lies, its adapter aside, which only an `adapted` one may have. Raises ModelError, RecipeError."""
    from anabranch.engine.fetch import resolve
    from anabranch.engine.prepare import converted_weights
    from anabranch.engine.reference import read_reference

    problems: list[str] = []
    found = read_reference(model, "model", (Path.cwd(),), problems, [])
    if found is not None and found.adapter is not None and not adapted:
        problems.append(f"'{model}': an adapter is not folded in here; `anabranch lora apply` writes the model with it")
    if found is None or problems or (problems := found.problems):
        raise RecipeError.of("this is no model:", problems)
    return resolve(found.path, found.revision, converted=converted_weights() if allow_pickle else None)


def _layers_of(model: str, allow_pickle: bool) -> int:
    """How many layers a model of one stack has. Raises ModelError, RecipeError."""
    from anabranch.engine.checkpoint import Checkpoint
    from anabranch.engine.layout import layout_of

    layout = layout_of(Checkpoint.open(_folder_of(model, allow_pickle, adapted=True)))
    counts = {name: n for name, n in layout.layers.items() if n}
    if len(counts) != 1:
        raise RecipeError(f"{model}: has {len(counts)} stacks of layers"
                          + (f" ({', '.join(counts)})" if counts else "") + ", and one is shuffled. Write a merge config with "
                          "`modules:` and `slices:`.")
    return next(iter(counts.values()))


def _check_config_place(text: str, place: Path) -> None:
    """Before the work. Raises OutputError for a place that holds something else, or lies in no folder."""
    if os.path.lexists(place):
        if not place.is_file() or place.read_text(encoding="utf-8", errors="replace") != text:
            raise OutputError(f"--write-config {place}: is already there, and is something else. Give another name.")
    elif not place.absolute().parent.is_dir():
        raise OutputError(f"--write-config {place}: there is no folder {place.absolute().parent}.")


def _keep_config(text: str, place: Path) -> None:
    from anabranch.artifacts import write_atomically

    _check_config_place(text, place)
    if not place.exists():
        write_atomically(place, text.encode())


def _tell_done(manifest: MergeManifest, result: Path, begun: float, quiet: bool, as_json: bool, more: str = "") -> None:
    seconds = time.monotonic() - begun
    if as_json:
        console.line("done", out=str(result), parameters=manifest.parameters, seconds=round(seconds, 3))
    elif not quiet:
        console.out.print(escape(f"{result}: {manifest.parameters:,} parameters in {manifest.dtype}, {manifest.method}, "
                                 f"{seconds:.1f} s" + (f"; {more}" if more else "")))
