"""Merges as callers ask for them: checkpoints of a run, or a config; and what a finished one can be held to."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
import yaml

import anabranch.merge as maths
from anabranch import __version__
from anabranch.artifacts import MergeInput, MergeManifest, digest, file_digest
from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.config import MergeConfig
from anabranch.engine.dialect import load_config, read_config
from anabranch.engine.layout import layout_of, set_dtype
from anabranch.engine.output import CARD, MANIFEST, Done, OutputFolder, existing_parent, tensor_hash, vouched_for
from anabranch.engine.plan import DTYPES, OutputPlan, Step, lay_out, line_up, parse_size
from anabranch.engine.prepare import Options, Prepared, prepare
from anabranch.engine.stream import (
    Merge,
    NotFrozen,
    Progress,
    Settings,
    check_device,
    check_input,
    memory_for,
    same_numbers,
    stream,
)
from anabranch.engine.wanted import COPY, Input, Source, Wanted
from anabranch.errors import AnabranchError, CorruptedError, ModelError, OutputError, ProvenanceError, RecipeError, closest
from anabranch.surgery.side_files import carry_tokenizer


def merge_checkpoints(
    method: str,
    base: Path,
    branches: list[Path],
    weights: list[float],
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    parameters: dict[str, Any] | None = None,
    seed: int = 0,
    made_from: dict[str, str],
    labels: Sequence[str] | None = None,
    missing: Sequence[int] = (),
    frozen: Collection[str] = (),
    settings: Settings | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> MergeManifest:
    """Merge `branches` with `weights` into the model folder `out`, computing in float32 and rounding once.

    The result holds the base's tensors, its tokenizer and config files, and a manifest; AutoModelForCausalLM loads it.
    Integer and boolean buffers are copied. The same inputs give the same bytes, also after a kill and another call.
    Where `out` already holds just this merge, its manifest is returned and nothing is done.

    Args:
        method: a registered merge method.
        base: the model folder that all branches started from.
        branches: k model folders, in the plan's order.
        weights: k numbers; token_weighted wants w_k = N_k / sum N_j, in [0, 1] and summing to one.
        out: the folder to make.
        dtype: of the result: 'float32', 'bfloat16', 'float16', or None for each tensor's own in the base.
        max_shard_size: '5GB' (10^9), '2GiB' (2^30).
        parameters: the method's own, by name.
        seed: of methods that draw random numbers.
        made_from: name of an input -> its hash, for the manifest; checking them is the caller's.
        labels: how messages and the manifest call the branches and, last, the base; None: by their paths.
        missing: branches of the plan that are not among `branches`, for the manifest.
        frozen: tensors that no branch may have trained: carried over from the base whatever the method is, byte for byte
            (rounded once to `dtype` where that is another), after comparing every branch's numbers with the base's.
        settings: threads, memory, device.
        progress: called again and again with what is done.
    Raises:
        RecipeError: unknown method, parameter, dtype or size; weights that the method refuses; a dtype too narrow.
        ModelError, CorruptedError: an input that is not there or damaged, or that holds a NaN or an infinity.
        ShapeMismatch: inputs whose tensors do not line up, all of them in one message.
        ProvenanceError: a branch has other numbers than the base in a frozen tensor; all branches and tensors are named.
        OutputError: no space, no permission, `out` holds something else, or another merge is writing it.
    """
    record, out = maths.method_named(method), place_for(out)
    arguments = maths.arguments_for(record, parameters or {}, len(branches))
    _check_request(record, arguments, branches, weights, dtype)
    limit = parse_size(max_shard_size)
    origin = Checkpoint.open(base)
    wanted = {"method": method, "arguments": _jsonable(arguments), "weights": weights, "made_from": made_from, "seed": seed,
              "dtype": dtype or dtypes_of(origin), "missing": list(missing)}
    if (finished := already_there(out, wanted)) is not None:
        return finished
    opened = (*(Checkpoint.open(branch) for branch in branches), origin)
    names = line_up(origin, opened[:-1])
    embeddings = {name for name, place in layout_of(origin).places.items() if place.embedding}
    still = set(frozen)
    tensors = [_carried(len(branches), origin, name, dtype) if name in still and origin.tensors[name].dtype in MERGED else
               _wanted(record, arguments, weights, origin, name, dtype, name in embeddings) for name in names]
    places = [*branches, base]
    inputs = tuple(Input(label, place) for label, place in zip(labels or map(str, places), places, strict=True))
    merge = Merge(inputs, opened, lay_out(tensors, limit, origin.stem), seed)
    folder = OutputFolder(out, merge.plan, carried_files(origin, merge.plan, dtype))
    settings = replace(settings or Settings(threads=min(4, os.cpu_count() or 1)), displacements=True)
    try:
        return write(merge, folder, settings, wanted | ({"report": {"frozen": len(still)}} if still else {}), progress)
    except NotFrozen as error:
        raise _not_frozen(origin, opened[:-1], [one.label for one in inputs], sorted(still & set(names))) from error


def _carried(k: int, base: Checkpoint, name: str, dtype: str | None) -> Wanted:
    """A frozen tensor: the base's, compared with all branches'."""
    info = base.tensors[name]
    return Wanted(name, info.shape, COPY, tuple(Source(i, name) for i in range(k)), Source(k, name), None, (),
                  DTYPES[dtype] if dtype else info.dtype)


def _not_frozen(base: Checkpoint, branches: Sequence[Checkpoint], labels: Sequence[str],
                frozen: Sequence[str]) -> AnabranchError:
    """Names every branch and tensor."""
    problems = []
    for label, branch in zip(labels, branches, strict=False):
        if changed := [name for name in frozen if not same_numbers(base.read(name), branch.read(name))]:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            problems.append(f"{label} ({branch.folder}): {len(changed)} of {len(frozen)} tensors: "
                            f"{', '.join(changed[:4])}{more}")
    return ProvenanceError.of(
        "these branches were trained where the recipe freezes (`model.freeze`, `model.trainable`): their numbers are not the "
        "base's:", [*problems, "Train them again (`--from train`), or have the part that changed train: take it out of "
                               "`model.freeze` in the recipe of a new run."])


def merge(
    config: Path | str | Mapping[str, Any],
    out: Path | str,
    *,
    seed: int = 0,
    max_shard_size: str | int = "5GB",
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    allow_unknown_keys: bool = False,
    allow_mixed: bool = False,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = warnings.warn,
) -> MergeManifest:
    """`anabranch.merge(config, out)`: what `anabranch merge CONFIG OUT` does, with the same options.

    Args:
        config: a YAML file in MergeKit's grammar, or a mapping of what would stand in one.
        out: the model folder to make.
        progress: called again and again with what is done.
        warn: told each thing that the user should know; None for silence.
    Raises:
        AnabranchError: as `merge_config`.
    """
    return merge_config(config, out, options=options_for(seed, max_shard_size, allow_mixed, allow_pickle),
                        settings=settings_for(memory, threads, device, allow_nonfinite),
                        allow_unknown_keys=allow_unknown_keys, progress=progress, warn=warn)


def options_for(seed: int = 0, max_shard_size: str | int = "5GB", allow_mixed: bool = False,
                allow_pickle: bool = False) -> Options:
    """Options as people write them: '5GB', or bytes. Raises RecipeError."""
    if type(seed) is not int or seed < 0:
        raise RecipeError(f"seed: got {seed!r}, wanted a whole number from 0 on")
    return Options(seed, parse_size(max_shard_size, "--max-shard-size"), allow_mixed, allow_pickle)


def settings_for(memory: str | int | None = None, threads: int | None = None, device: str = "cpu",
                 allow_nonfinite: bool = False) -> Settings:
    """Settings as people write them: '512MB'; by default half of the memory and one worker per core, at most 8.

    Raises RecipeError.
    """
    check_device(device)
    if threads is not None and (type(threads) is not int or threads < 1):
        raise RecipeError(f"threads: got {threads!r}, wanted a whole number from 1 on")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return Settings(threads or min(8, cores), parse_size(memory, "--memory") if memory is not None else half, device,
                    allow_nonfinite=allow_nonfinite)


def merge_config(
    config: Path | str | Mapping[str, Any],
    out: Path | str,
    *,
    options: Options | None = None,
    settings: Settings | None = None,
    allow_unknown_keys: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> MergeManifest:
    """`anabranch merge CONFIG OUT`: merge what a config names into the model folder `out`.

    Args:
        config: a YAML file in MergeKit's grammar, or what would stand in one.
        out: the folder to make. If it holds this very merge, nothing is done; after a kill, the same call goes on.
        options: what decides the bytes beside the config: seed, shard size, which models are accepted.
        settings: threads, memory, device.
        warn: told each thing that the user should know; none is an error.
    Raises:
        AnabranchError: everything that is wrong with config and models, in one message, before a byte is written; an input
            that is damaged or holds a NaN; no space; `out` holds something else.
    """
    out, text, options = place_for(out), text_of(config), options or Options()
    prepared = prepare(parsed(config, text, allow_unknown_keys), text, options)
    if warn is not None:
        for warning in prepared.warnings:
            warn(warning)
    recorded = recorded_of(prepared, text, options)
    if used := [one.label for one in prepared.merge.inputs if out in (one.folder.resolve(), one.adapter)]:
        raise OutputError(f"{out} is one of the models to be merged ({used[0]}). Choose another output folder.")
    if (finished := already_there(out, recorded, prepared.merge.plan)) is not None:
        _check_inputs_unchanged(prepared.merge, finished, out)
        if warn is not None:
            warn(f"{out} holds this very merge already; nothing was done")
        return finished
    folder = OutputFolder(out, prepared.merge.plan, prepared.files)
    home = Path(config).parent if isinstance(config, (str, Path)) else Path()
    return write(prepared.merge, folder, settings or Settings(),
                 recorded | {"found_from": [os.path.relpath(place, out) for place in (Path.cwd(), home.resolve())]}, progress)


def forecast(
    config: Path | str | Mapping[str, Any],
    out: Path | str,
    *,
    options: Options | None = None,
    settings: Settings | None = None,
    allow_unknown_keys: bool = False,
    warn: Callable[[str], None] | None = None,
) -> list[str]:
    """`anabranch merge --dry-run`: what would be read, done and written, in lines. Arguments and errors as `merge_config`."""
    text, out, options = text_of(config), place_for(out), options or Options()
    prepared = prepare(parsed(config, text, allow_unknown_keys), text, options)
    if warn is not None:
        for warning in prepared.warnings:
            warn(warning)
    there = []
    if already_there(out, recorded_of(prepared, text, options), prepared.merge.plan) is not None:
        there = [f"{out} holds this merge already; nothing would be done"]
    return forecast_lines(prepared, settings or Settings(), out) + there


def verify(folder: Path | str, *, files_only: bool = False, allow_pickle: bool = False, settings: Settings | None = None,
           progress: Callable[[Progress], None] | None = None) -> list[str]:
    """`anabranch verify OUT`: what is wrong with a merged folder; nothing, if the list is empty.

    Its files and tensors are held to the hashes of the manifest; then, for a folder made from a config, the merge is
    computed once more from the same inputs, written nowhere, and its hashes are compared. Raises AnabranchError where the
    inputs can no longer be had.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ModelError(f"{folder}: not there. Give the folder that a merge, or another command, has made.")
    if not manifest_of(folder).is_file():
        raise ModelError(f"{folder}: has no {MANIFEST}, so there is nothing to hold it to: Anabranch did not make it, or the "
                         "manifest was removed.")
    problems = verify_files(folder)
    if problems or files_only or not is_repeatable(folder):
        return problems
    manifest = MergeManifest.load(folder / MANIFEST)
    assert manifest.config is not None  # it is repeatable
    places = tuple((folder / place).resolve() for place in manifest.found_from)
    config = read_config(manifest.config, source=str(folder / MANIFEST), folders=(Path.cwd(), *places), allow_unknown_keys=True)
    _check_places(config, manifest)
    options = options_for(manifest.seed, allow_mixed=True, allow_pickle=allow_pickle)
    merge = prepare(config, manifest.config, options).merge
    done = stream(merge, None, replace(settings or Settings(), allow_nonfinite=True), progress)
    return _changed_inputs(merge, manifest, done) + [
        f"tensor '{name}': computed again it has other bytes" for name in sorted(done.keys() | manifest.tensors.keys())
        if name not in done or done[name].hash != manifest.tensors.get(name)]


def is_repeatable(folder: Path | str) -> bool:
    """Whether a folder keeps the config that it was merged from, so that `verify` can compute it once more."""
    manifest = MergeManifest.load(manifest_of(Path(folder)))
    return manifest.config is not None and manifest.verb is None and not Path(folder).is_file()


def _check_places(config: MergeConfig, manifest: MergeManifest) -> None:
    """A model that was a folder is never looked for on the Hub. Raises ModelError."""
    local = {one.label for one in manifest.inputs if one.local}
    lost = [str(reference) for reference in config.models if str(reference) in local and not os.path.isdir(reference.path)]
    if lost and "family" in manifest.made_from:
        raise ModelError.of("these are other merges of the same file, which went when it was done: run the merge again with "
                            "`--intermediates DIR`, which keeps them, or hold the files alone to the manifest "
                            "(`--files-only`):", lost)
    if lost:
        raise ModelError.of("these models were folders when they were merged, and are not there. Run it from the folder where "
                            "the merge was run, put them back, or hold the files alone to the manifest (`--files-only`):", lost)


def place_for(out: Path | str) -> Path:
    """The folder to make, as an absolute path. Raises OutputError for one that cannot be made in one step."""
    if Path(out).is_symlink() and not Path(out).exists():
        raise OutputError(f"{out} is a link to nothing. Remove it, or choose another output folder.")
    place = Path(out).resolve()
    if place == Path.cwd():
        raise OutputError(f"{out} is the folder that you are in. A result appears by renaming a finished folder: give the name "
                          "of a new one.")
    if os.path.ismount(place):
        raise OutputError(f"{out} is the root of a file system. A result appears by renaming a finished folder: give the name "
                          "of a new one in it.")
    return place


def text_of(config: Path | str | Mapping[str, Any]) -> str:
    """The YAML of a config, to keep beside the result."""
    if isinstance(config, Mapping):
        try:
            return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise RecipeError(f"merge config: {error}. Give text, numbers, lists and mappings only (`str(path)` for a path)."
                              ) from error
    try:
        return Path(config).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"merge config {config}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"merge config {config}: not text in UTF-8 ({error}).") from error


def parsed(config: Path | str | Mapping[str, Any], text: str, allow_unknown_keys: bool) -> MergeConfig:
    """The config, validated. Relative paths count from the working folder, then from the config's own."""
    if isinstance(config, (Path, str)):
        return load_config(Path(config), allow_unknown_keys=allow_unknown_keys)
    return read_config(text, allow_unknown_keys=allow_unknown_keys)


def recorded_of(prepared: Prepared, text: str, options: Options) -> dict[str, Any]:
    """The fields of a manifest that say what was asked for."""
    methods = sorted({step.wanted.method for step in prepared.merge.plan.steps if step.merged})
    return {"method": ", ".join(methods) or "copy", "config": text, "seed": options.seed, "dtype": prepared.dtype}


def _check_inputs_unchanged(merge: Merge, manifest: MergeManifest, out: Path) -> None:
    if changed := _changed_inputs(merge, manifest, None):
        raise OutputError.of(f"{out} holds a merge of this config, but of other weights. Choose another output folder, or "
                             "remove this one; nothing was changed.", changed)


def _changed_inputs(merge: Merge, manifest: MergeManifest, done: Mapping[str, Done] | None) -> list[str]:
    found = {one.label: hashed for one, hashed in zip(merge.inputs, input_hashes(merge, done), strict=True)}
    return [f"input {one.label}: its tensors are not those that were merged" for one in manifest.inputs
            if found.get(one.label) != one.hash]


def forecast_lines(prepared: Prepared, settings: Settings, out: Path) -> list[str]:
    """What would be read, done and written, for people."""
    merge, plan = prepared.merge, prepared.merge.plan
    memory = memory_for(merge, plan.steps, settings)
    methods: dict[str, int] = {}
    for step in plan.steps:
        methods[step.wanted.method or "copied"] = methods.get(step.wanted.method or "copied", 0) + 1
    used = {source for step in plan.steps for source in step.wanted.sources}
    read = sum(merge.opened[source.input].tensors[source.name].size for source in used)
    folder = OutputFolder(out, plan, prepared.files)
    free = shutil.disk_usage(existing_parent(out)).free
    counts = ", ".join(f"{count} {name}" for name, count in sorted(methods.items()))
    return [
        *(f"input: {one.label} ({len(checkpoint.tensors)} tensors, {checkpoint.size / 1e6:,.1f} MB, {checkpoint.folder})"
          for one, checkpoint in zip(merge.inputs, merge.opened, strict=True)),
        f"tensors: {len(plan.steps)} ({counts}), {plan.parameters:,} parameters, {prepared.dtype}",
        f"reads: {read / 1e6:,.1f} MB, some of it again where a method needs sums or ranks over a whole tensor",
        f"writes: {folder.size / 1e6:,.1f} MB in {len(plan.shards)} weight file{'s' if len(plan.shards) != 1 else ''} and "
        f"{len(prepared.files)} others; {free / 1e6:,.0f} MB are free in {existing_parent(out)}",
        f"memory: at most {memory.peak / 1e6:,.0f} MB of {settings.memory / 1e6:,.0f} MB allowed, {settings.threads} "
        f"thread{'s' if settings.threads != 1 else ''} on {settings.device}",
        *([] if folder.size <= free else [f"problem: the disk has {folder.size - free:,} bytes too little"])]


def write(merge: Merge, folder: OutputFolder, settings: Settings, recorded: Mapping[str, Any],
          progress: Callable[[Progress], None] | None = None) -> MergeManifest:
    """Stream a merge into its folder and publish it. `recorded` are the manifest's fields that say what was asked for."""
    key = digest([recorded, [shard.header.hex() for shard in merge.plan.shards], _fingerprint(merge), __version__,
                  settings.device.split(":")[0], settings.allow_nonfinite])
    memory_for(merge, merge.plan.steps, settings)  # a limit too small costs no finished work
    with folder.opened(key):
        try:
            done = stream(merge, folder, settings, progress)
            read = input_hashes(merge, done)
        except OutputError:
            raise
        except AnabranchError as error:
            # Config or inputs are at fault, and mended ones will not fit what is written; a read that failed may succeed.
            if not isinstance(error.__cause__, OSError):
                folder.abandon()
            raise
        except NotFrozen:
            folder.abandon()
            raise
        return folder.publish(lambda files: _manifest(merge, done, read, recorded, files))


def verify_files(folder: Path) -> list[str]:
    """What is wrong with a merged folder, by its manifest: files missing or changed, tensors changed, weights added."""
    if folder.is_file():  # of `anabranch tensors`, its manifest beside it
        return _verify_file(folder)
    try:
        manifest = MergeManifest.load(folder / MANIFEST)
    except CorruptedError as error:
        return [str(error)]
    problems = []
    for name, wanted in manifest.files.items():
        if not (folder / name).is_file():
            problems.append(f"{folder / name}: missing")
        elif (got := file_digest(folder / name)) != wanted:
            problems.append(f"{folder / name}: changed since the merge (SHA-256 {got[:12]}, wanted {wanted[:12]})")
    adapter = folder / "adapter_model.safetensors"
    try:
        checkpoint = Checkpoint.of_file(adapter) if adapter.is_file() else Checkpoint.open(folder, config_needed=False)
    except AnabranchError as error:
        return [*problems, str(error)]
    for name in sorted(manifest.tensors.keys() | checkpoint.tensors.keys()):
        if name not in checkpoint.tensors:
            problems.append(f"tensor '{name}': missing")
        elif name not in manifest.tensors:
            problems.append(f"tensor '{name}' of {checkpoint.tensors[name].file}: not made by the merge")
        elif hash_of(checkpoint, name) != manifest.tensors[name]:
            problems.append(f"tensor '{name}' of {folder / checkpoint.tensors[name].file}: changed since the merge")
    ours = {info.file for info in checkpoint.tensors.values()} | manifest.files.keys() | {MANIFEST, CARD}
    added = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return problems + [f"{folder / name}: not made by the merge" for name in added
                       if name not in ours and not any(part.startswith(".") for part in name.split("/"))]


def manifest_of(place: Path) -> Path:
    """Where the manifest of a result stands: in the folder, or beside a file."""
    return place.with_name(f"{place.name}.{MANIFEST}") if place.is_file() else place / MANIFEST


def _verify_file(file: Path) -> list[str]:
    try:
        manifest, checkpoint = MergeManifest.load(manifest_of(file)), Checkpoint.of_file(file)
    except AnabranchError as error:
        return [str(error)]
    return [f"tensor '{name}' of {file}: missing, added or changed since the merge"
            for name in sorted(manifest.tensors.keys() | checkpoint.tensors.keys())
            if name not in checkpoint.tensors or hash_of(checkpoint, name) != manifest.tensors.get(name)]


def hash_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Hash of dtype, shape and bytes of a tensor, as a manifest records it."""
    info = checkpoint.tensors[name]
    wanted = Wanted(name, info.shape, COPY, (), None, None, (), info.dtype)
    return tensor_hash(checkpoint.folder / info.file, Step(wanted, 0, info.offset, info.offset + info.size))


def _wanted(method: maths.MergeMethod, arguments: Mapping[str, maths.Argument], weights: Sequence[float],
            base: Checkpoint, name: str, dtype: str | None, embedding: bool) -> Wanted:
    info, k = base.tensors[name], len(weights)
    sources, origin = tuple(Source(i, name) for i in range(k)), Source(k, name)
    if info.dtype not in MERGED:
        return Wanted(name, info.shape, COPY, (origin, *sources), None, None, (), info.dtype)
    fitting, given = maths.fitting(method, arguments, info.shape, embedding)
    # A method that takes no base has it too: the merge's distance from it is told.
    return Wanted(name, info.shape, fitting.name, sources, origin,
                  tuple(weights) if "weights" in fitting.inputs else None, tuple(given.items()),
                  DTYPES[dtype] if dtype else info.dtype, embedding=embedding)


def _check_request(method: maths.MergeMethod, arguments: Mapping[str, maths.Argument], branches: Sequence[Path],
                   weights: Sequence[float], dtype: str | None) -> None:
    """Raises RecipeError. The method itself judges weights and arguments, on tensors of one number, before any read."""
    if not branches:
        raise RecipeError("merge: no branch was given, wanted at least one.")
    if len(weights) != len(branches):
        raise RecipeError(f"merge: got {len(weights)} weights for {len(branches)} branches, wanted one each.")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"merge.dtype: `{dtype}` cannot be written.{closest(dtype, DTYPES)}")
    if "fisher" in method.inputs or "depth" in method.inputs:
        raise RecipeError(f"merge.method: {method.name} needs more than the branches of a run hold. Merge them with a config: "
                          "`anabranch merge config.yaml OUT`.")
    maths.check_arguments(method, arguments, weights, len(branches))


def _jsonable(arguments: Mapping[str, maths.Argument]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def dtypes_of(checkpoint: Checkpoint) -> str:
    names = {spelling: name for name, spelling in DTYPES.items()}
    return ", ".join(sorted({names[info.dtype] for info in checkpoint.tensors.values() if info.dtype in names}))


def _fingerprint(merge: Merge) -> list[list[Any]]:
    """Tells changed inputs for the journal, without reading them. Never part of an artifact."""
    folders = [*(one.folder for one, opened in zip(merge.inputs, merge.opened, strict=True) if opened.config),
               *(one.adapter for one in merge.inputs if one.adapter)]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    # A file that stands alone: what lies around it is nobody's business here.
    alone = [opened for opened in merge.opened if not opened.config]
    files += sorted({opened.folder / info.file for opened in alone for info in opened.tensors.values()})
    files += [path for paths in merge.companions.values() for path in paths]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _manifest(merge: Merge, done: Mapping[str, Done], read: Sequence[str], recorded: Mapping[str, Any],
              files: dict[str, str]) -> MergeManifest:
    squares = [result.squares for result in done.values() if result.squares]
    moved = [sqrt(sum(column)) for column in zip(*squares, strict=True)]
    return MergeManifest(
        **{**recorded, "made_from": dict(sorted(recorded.get("made_from", {}).items()))},
        parameters=merge.plan.parameters,
        displacement=moved[0] if moved else None,
        branch_displacements=moved[1:],
        inputs=[MergeInput(label=one.label, hash=hashed, local=one.local)
                for one, hashed in zip(merge.inputs, read, strict=True)],
        tensors={name: result.hash for name, result in done.items()},
        files=files,
        software={"anabranch": __version__, "torch": torch.__version__})


def input_hashes(merge: Merge, done: Mapping[str, Done] | None = None) -> list[str]:
    """For each input a hash over the tensors that the merge reads of it. What `done` does not tell is read here.

    Raises CorruptedError for a tensor that is not what its folder's own manifest says.
    """
    known = {key: value for result in (done or {}).values() for key, value in result.inputs.items()}
    used = sorted({source for step in merge.plan.steps for source in step.wanted.sources} | set(merge.read_also),
                  key=lambda source: (source.input, source.name))
    vouched = [vouched_for(checkpoint.folder) for checkpoint in merge.opened]
    tables: list[dict[str, str]] = [{f"file {path.name}": file_digest(path) for path in merge.companions.get(i, ())}
                                    for i in range(len(merge.inputs))]
    for source in used:
        found = known.get(f"{source.input} {source.name}") or hash_of(merge.opened[source.input], source.name) or ""
        check_input(merge, vouched, source, found)
        tables[source.input][source.name] = found
    return [digest(table) for table in tables]


# --- the output folder ---


def already_there(out: Path, wanted: Mapping[str, Any], plan: OutputPlan | None = None) -> MergeManifest | None:
    """The manifest in `out`, if that is this very merge; None if `out` is free. Raises OutputError otherwise."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    of_a_run = " (in a run: `--from merge`)" if "made_from" in wanted else ""
    remedy = f"Choose another output folder, or, if nothing in it is needed, remove this one{of_a_run}; nothing was changed."
    try:
        manifest = MergeManifest.load(out / MANIFEST)
    except CorruptedError as error:
        raise OutputError(f"{out} is already there, and no readable {MANIFEST} says what it is. {remedy}") from error
    differing = ["it was made from another config (mergekit_config.yml in it)" if key == "config" else line
                 for key, value in wanted.items() for line in _differences(key, getattr(manifest, key), value)]
    if plan is not None and {p.name for p in out.glob("*.safetensors")} != {shard.file for shard in plan.shards}:
        differing.append("its weights are cut into files of another size")
    if problems := differing or verify_files(out):
        what = "merge" if manifest.verb is None else "result"
        raise OutputError.of(f"{out} already holds another or a damaged {what}. {remedy}", problems)
    return manifest


def _differences(key: str, there: Any, wanted: Any) -> list[str]:
    """What is not as wanted, of settings each by itself."""
    if isinstance(there, dict) and isinstance(wanted, Mapping):
        inside = "" if key == "settings" else f"{key}."
        return [line for name in sorted({*there, *wanted})
                for line in _differences(f"{inside}{name}", there.get(name), wanted.get(name))]
    return [] if there == wanted else [f"{key}: {_short(there)} there, {_short(wanted)} wanted now"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " .."


def carried_files(base: Checkpoint, plan: OutputPlan, dtype: str | None) -> dict[str, Path | bytes]:
    """What the base brings along: name in the result -> its file, or new bytes. Its card and training state are not among
    it: they describe another model."""
    files: dict[str, Path | bytes] = dict(carry_tokenizer(base.folder))
    if "auto_map" in base.config:
        files |= {path.name: path for path in base.folder.glob("*.py")}
    config = set_dtype(base.config, dtype) if dtype else base.config
    files["config.json"] = (base.folder / "config.json" if config == base.config
                            else (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    if plan.index is not None:
        files[plan.index_file] = plan.index
    return dict(sorted(files.items()))
