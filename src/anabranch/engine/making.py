"""A model folder whose tensors are computed one group at a time by functions: what surgery writes with.

A merge knows its inputs block by block (`stream`). Surgery changes shapes and names, so that here whoever asks says what
each group of tensors is and gives a function that makes it; the engine runs these, rounds once, checks, journals, hashes,
and lets the folder appear when it is whole, as for a merge: a kill costs at most the groups then in work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch import __version__
from anabranch.artifacts import MergeInput, MergeManifest, digest, file_digest
from anabranch.engine.blocks import MERGED, begin_hash
from anabranch.engine.checkpoint import ITEM_SIZES, Checkpoint
from anabranch.engine.memory import Budget, occupied
from anabranch.engine.merging import already_there, hash_of, place_for
from anabranch.engine.output import CARD, Done, OutputFolder, existing_parent, vouched_for
from anabranch.engine.plan import DTYPES, OutputPlan, Step, lay_out, parse_size
from anabranch.engine.stream import Progress, finite
from anabranch.engine.wanted import COPY, Wanted
from anabranch.errors import CorruptedError, OutputError, RecipeError, ShapeMismatch

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
         "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
ADAPTER = "adapter_model"
SLACK = 64 * 10**6


@dataclass(frozen=True)
class Made:
    """Tensors of the result that are computed together.

    tensors   name -> (shape, dtype in safetensors' spelling)
    make      () -> name -> tensor on the CPU, of that shape, in any floating dtype for a floating one; it is rounded once.
              Called once, by one of several threads, each of which computes on one core; it must give the same numbers
              whenever it is called.
    need      bytes that it takes at its peak beside the tensors that it gives, counted as float32
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    make: Callable[[], Mapping[str, Tensor]]
    need: int = 0

    @property
    def held(self) -> int:
        """Bytes that a worker takes for it."""
        return self.need + sum(prod(shape) * (4 + ITEM_SIZES[dtype]) for shape, dtype in self.tensors.values())


@dataclass(frozen=True)
class Read:
    """An input, whose bytes decide those of the result.

    label       as messages and the manifest call it: what the user wrote
    checkpoint  opened
    names       its tensors that matter; None for all
    companions  files beside the weights that matter too: an adapter's, a tokenizer's
    """

    label: str
    checkpoint: Checkpoint
    names: Sequence[str] | None = None
    companions: Sequence[Path] = ()


def copied(checkpoint: Checkpoint, name: str, *, as_name: str | None = None, dtype: str | None = None) -> Made:
    """One tensor as it stands; or rounded to another floating dtype, where it is floating itself."""
    info = checkpoint.tensors[name]
    wanted = dtype if dtype is not None and info.dtype in MERGED else info.dtype
    to = as_name or name
    return Made({to: (info.shape, wanted)}, lambda: {to: checkpoint.read(name)})


def make_model(
    out: Path | str,
    made: Sequence[Made],
    files: Mapping[str, bytes | Path],
    inputs: Sequence[Read],
    *,
    verb: str,
    settings: Mapping[str, Any],
    seed: int = 0,
    report: Mapping[str, Any] | None = None,
    max_shard_size: str | int = "5GB",
    stem: str = "model",
    threads: int | None = None,
    memory: str | int | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> MergeManifest:
    """Make the folder `out`. Where it holds just this already, nothing is done; after a kill, the same call goes on.

    Args:
        made: the tensors, in any order; their names decide where they stand.
        files: everything beside the weights: name -> bytes, or a file to copy. The shards' index is added.
        inputs: what was read, hashed into the manifest.
        verb: the command: 'lora extract'.
        settings: what was asked for (JSON): all that decides the bytes beside the inputs.
        seed: of what is drawn.
        report: figures for the manifest (JSON). They must follow from inputs and settings alone.
        stem: of the weight files' names; 'adapter_model' is never cut into several.
        threads: workers, by default one per core, at most 8.
        memory: bytes, or '2GB': groups that do not fit side by side take turns. By default half of what is there.
        allow_nonfinite: write NaN and infinity instead of refusing.
        progress: called again and again with what is done.
        warn: told where nothing had to be done.
    Raises:
        CorruptedError: an input that does not hold what its own manifest says; a result that is not finite.
        OutputError: no space, no permission, `out` holds something else, or another process is writing it.
        RecipeError: a size, a limit or a number of threads that is none.
    """
    place = place_for(out)
    plan = _laid_out(made, max_shard_size, stem)
    carried = dict(files) | ({plan.index_file: plan.index} if plan.index is not None else {})
    said = json.loads(json.dumps({"verb": verb, "settings": dict(settings), "seed": seed, "report": dict(report or {}),
                                  "method": verb, "dtype": _dtypes(plan)}))  # as it will be read again: tuples are lists
    _not_onto_an_input(place, inputs)
    if (finished := already_there(place, said, plan)) is not None:
        _same_inputs(finished, inputs, carried, place)
        if warn is not None:
            warn(f"{place} holds this very result already; nothing was done")
        return finished
    folder = OutputFolder(place, plan, dict(sorted(carried.items())))
    begun = _fingerprint(inputs)
    key = digest([said, [shard.header.hex() for shard in plan.shards], begun, __version__, allow_nonfinite])
    workers, room = _room(made, threads, memory)
    with folder.opened(key):
        try:
            done = _all_made(folder, made, workers, room, allow_nonfinite, progress)
            read = [MergeInput(label=one.label, hash=hashed) for one, hashed in zip(inputs, _hashes(inputs), strict=True)]
            if (changed := _changed_since(begun, inputs)) is not None:
                raise CorruptedError(f"{changed} was changed while it was read, so that the result may be of the old and of "
                                     "the new. Run the same command again when nothing writes there.")
        except (CorruptedError, RecipeError, ShapeMismatch) as error:
            if not isinstance(error.__cause__, OSError):
                folder.abandon()
            raise
        return folder.publish(lambda hashed: MergeManifest(
            **said, inputs=read, parameters=plan.parameters, tensors={step.name: done[step.name].hash for step in plan.steps},
            files=hashed, software={"anabranch": __version__, "torch": torch.__version__}))


def forecast_made(out: Path | str, made: Sequence[Made], files: Mapping[str, bytes | Path], inputs: Sequence[Read], *,
                  max_shard_size: str | int = "5GB", stem: str = "model", threads: int | None = None,
                  memory: str | int | None = None) -> list[str]:
    """What `make_model` would read, make and write, in lines. Raises as it does."""
    place, plan = place_for(out), _laid_out(made, max_shard_size, stem)
    _not_onto_an_input(place, inputs)
    workers, room = _room(made, threads, memory)
    size = OutputFolder(place, plan, files).size
    free = shutil.disk_usage(existing_parent(place)).free
    side_by_side = sum(sorted((one.held for one in made), reverse=True)[:workers])
    return [
        *(f"input: {one.label} ({len(one.checkpoint.tensors)} tensors, {one.checkpoint.size / 1e6:,.1f} MB, "
          f"{one.checkpoint.folder})" for one in inputs),
        f"tensors: {len(plan.steps)}, {plan.parameters:,} parameters, {_dtypes(plan)}",
        f"writes: {size / 1e6:,.1f} MB in {len(plan.shards)} weight file{'s' if len(plan.shards) != 1 else ''} and "
        f"{len(files)} others; {free / 1e6:,.0f} MB are free in {existing_parent(place)}",
        f"memory: at most {(occupied() + SLACK + min(room, side_by_side)) / 1e6:,.0f} MB, {workers} "
        f"thread{'s' if workers != 1 else ''}",
        *([f"{place} holds a result already: the command does nothing if it is this very one, and refuses if it is not"]
          if place.is_dir() and any(place.iterdir()) else []),
        *([] if size <= free else [f"problem: the disk has {size - free:,} bytes too little"])]


# --- laying out ---


def _laid_out(made: Sequence[Made], max_shard_size: str | int, stem: str) -> OutputPlan:
    wanted: dict[str, Wanted] = {}
    for one in made:
        for name, (shape, dtype) in one.tensors.items():
            if name in wanted:
                raise AssertionError(f"tensor '{name}' is made twice")
            wanted[name] = Wanted(name, tuple(shape), COPY, (), None, None, (), dtype)
    limit = parse_size(max_shard_size, "--max-shard-size")
    return lay_out(list(wanted.values()), 1 << 62 if stem == ADAPTER else limit, stem)


def _dtypes(plan: OutputPlan) -> str:
    names = {spelling: name for name, spelling in DTYPES.items()}
    return ", ".join(sorted({names.get(step.wanted.dtype, step.wanted.dtype) for step in plan.steps
                             if step.wanted.dtype in MERGED}))


def _room(made: Sequence[Made], threads: int | None, memory: str | int | None) -> tuple[int, int]:
    """(workers, bytes for them). Raises RecipeError where the largest group alone does not fit."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise RecipeError(f"threads: got {threads!r}, wanted a whole number from 1 on")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit = parse_size(memory, "--memory") if memory is not None else half
    largest = max(made, key=lambda one: one.held, default=None)
    taken = occupied() + SLACK
    if largest is not None and limit - taken < largest.held:
        if memory is not None:
            raise RecipeError(f"--memory {limit / 1e6:,.0f}MB is too little: the program itself takes {taken / 1e6:,.0f} MB "
                              f"and tensor '{next(iter(largest.tensors))}' {largest.held / 1e6:,.0f} MB. Give --memory "
                              f"{(taken + largest.held) / 1e6 + 1:,.0f}MB or more.")
        return 1, largest.held  # more than half of the memory: let it try
    return threads or min(8, cores), max(limit - taken, 0)


# --- inputs ---


def _not_onto_an_input(place: Path, inputs: Sequence[Read]) -> None:
    for one in inputs:
        if place == one.checkpoint.folder.resolve() or place in (path.parent.resolve() for path in one.companions):
            raise OutputError(f"{place} is one of the inputs ({one.label}). Choose another output folder.")


def _fingerprint(inputs: Sequence[Read]) -> list[list[Any]]:
    """Tells changed inputs for the journal, without reading them."""
    files = [one.checkpoint.folder / file for one in inputs
             for file in sorted({info.file for info in one.checkpoint.tensors.values()})]
    files += [path for one in inputs for path in one.companions]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _changed_since(begun: Sequence[Sequence[Any]], inputs: Sequence[Read]) -> str | None:
    """A file that is not as it was when the work began."""
    try:
        now = _fingerprint(inputs)
    except OSError as error:
        return str(error.filename)
    return next((str(old[0]) for old, new in zip(begun, now, strict=True) if old != new), None)


def _hashes(inputs: Sequence[Read]) -> Iterator[str]:
    """For each input a hash over the tensors and files that matter. Raises CorruptedError as for a merge."""
    for one in inputs:
        table = {f"file {path.name}": file_digest(path) for path in one.companions}
        vouched = vouched_for(one.checkpoint.folder)
        for name in sorted(one.names if one.names is not None else one.checkpoint.tensors):
            found = hash_of(one.checkpoint, name) or ""
            if vouched.get(name, found) != found:
                raise CorruptedError(
                    f"{one.checkpoint.folder / one.checkpoint.tensors[name].file}: tensor '{name}' has other bytes than the "
                    "folder's own manifest.json says. Make or fetch this model again; if it was changed on purpose, delete "
                    "its manifest.json.")
            table[name] = found
        yield digest(table)


def _same_inputs(manifest: MergeManifest, inputs: Sequence[Read], carried: Mapping[str, bytes | Path], place: Path) -> None:
    """Raises OutputError where what is there was made of other tensors, or other files would stand beside them now."""
    there = [(one.label, one.hash) for one in manifest.inputs]
    now = [(one.label, hashed) for one, hashed in zip(inputs, _hashes(inputs), strict=True)]
    changed = [f"input {label}: its tensors or files are not those that it was made of"
               for label, hashed in now if (label, hashed) not in there]
    files = {name: _digest_of(source) for name, source in carried.items() if name != CARD}
    changed += [f"{name}: would be another file now, since an input's files or config.json have changed"
                for name in sorted(files.keys() | manifest.files.keys()) if files.get(name) != manifest.files.get(name)]
    if changed or len(there) != len(now):
        raise OutputError.of(f"{place} was made with these settings, but of other inputs. Choose another output folder, or "
                             "remove this one; nothing was changed.", changed)


def _digest_of(source: bytes | Path) -> str:
    return file_digest(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()


# --- making ---


def _all_made(folder: OutputFolder, made: Sequence[Made], workers: int, room: int, allow_nonfinite: bool,
              progress: Callable[[Progress], None] | None) -> dict[str, Done]:
    steps = {step.name: step for step in folder.plan.steps}
    order = {name: number for number, name in enumerate(steps)}
    left = sorted((one for one in made if not all(name in folder.done for name in one.tensors)),
                  key=lambda one: min((order[name] for name in one.tensors), default=0))
    sizes = {name: step.stop - step.start for name, step in steps.items()}
    total, finished = sum(sizes.values()), sum(sizes[name] for name in folder.done)
    threads, budget = torch.get_num_threads(), Budget(room)
    pool = ThreadPoolExecutor(workers)
    running: set[Future[list[tuple[Step, Done]]]] = set()
    try:
        waiting = iter(left)
        while True:
            while len(running) < workers and (one := next(waiting, None)) is not None:
                running.add(pool.submit(_one_made, folder, one, steps, budget, room, allow_nonfinite))
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                for step, done in future.result():
                    with folder.writing():
                        folder.finished(step, done)
                    finished += sizes[step.name]
            if progress is not None:
                progress(Progress(finished, total, len(folder.done)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
    return folder.done


def _one_made(folder: OutputFolder, one: Made, steps: Mapping[str, Step], budget: Budget, room: int,
              allow_nonfinite: bool) -> list[tuple[Step, Done]]:
    torch.set_num_threads(1)  # of this thread; sums must not depend on how many there are
    need = min(one.held, room)
    budget.acquire(need)
    try:
        with torch.no_grad():
            tensors = one.make()
        if tensors.keys() != one.tensors.keys():
            raise AssertionError(f"made {sorted(tensors)}, planned {sorted(one.tensors)}")
        return [(steps[name], _written(folder, steps[name], tensor, allow_nonfinite)) for name, tensor in tensors.items()]
    finally:
        budget.release(need)


def _written(folder: OutputFolder, step: Step, tensor: Tensor, allow_nonfinite: bool) -> Done:
    shape, dtype = step.wanted.shape, step.wanted.dtype
    floating = dtype in MERGED
    if tuple(tensor.shape) != shape or (
            dtype in TORCH and tensor.is_floating_point() != TORCH[dtype].is_floating_point):
        raise AssertionError(f"tensor '{step.name}': made {tensor.dtype} {tuple(tensor.shape)}, planned {dtype} {shape}")
    rounded = tensor.detach().to("cpu", TORCH[dtype]).contiguous() if dtype in TORCH else tensor.contiguous()
    if floating and not allow_nonfinite and not finite(rounded):
        whole = bool(torch.isfinite(tensor).all())
        raise CorruptedError(f"tensor '{step.name}': " + (
            f"its numbers are too large for {dtype}. Write the result in bfloat16 or float32." if whole else
            "the result holds NaN or infinity. An input that diverged must be trained or fetched again."))
    data = rounded.reshape(-1).view(torch.uint8).numpy() if rounded.numel() else torch.empty(0, dtype=torch.uint8).numpy()
    hasher = begin_hash(dtype, shape)
    hasher.update(data)
    with folder.writing():
        folder.write(step, 0, data)
    return Done(hasher.hexdigest(), {}, [])
