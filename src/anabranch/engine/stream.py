"""A merge, one tensor at a time, into a folder that appears only when it is whole.

    for step in plan:                         order fixed by the plan
        stack = every branch's tensor         float32, one reused buffer
        out   = method(stack, base, weights)  float32
        write round(out)                      output dtype, checked finite

Everything is written in `OUT.partial` and that folder is renamed to `OUT` at the end. A journal in it says how many
tensors are safely on the disk, so a merge that was killed goes on there and gives the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import anabranch.merge as maths
from anabranch.artifacts import MergeManifest, digest, file_digest, write_atomically
from anabranch.engine.checkpoint import INDEX, PICKLES, Checkpoint, weight_files
from anabranch.engine.plan import DTYPES, ITEM_SIZES, MERGED, OutputPlan, Shard, Step, label, line_up, plan_output
from anabranch.errors import AnabranchError, CorruptedError, OutputError, RecipeError, closest

MANIFEST = "anabranch-merge.json"
JOURNAL = ".merge-journal.json"
# Bytes written between two entries of the journal: what a kill can cost. Each entry flushes the disk, so not too few.
JOURNAL_BYTES = 256 * 2**20
# What the base brings along. Its card, training state and pickles are not among it: they describe another model.
CARRIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*",
           "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*.jinja", "*processor_config.json")


@dataclass
class _Journal:
    """Tensors done, in the plan's order, and the sums over them; `squares`: merged, then each branch, against base."""

    plan: str
    done: int
    squares: list[float]

    def save(self, folder: Path) -> None:
        write_atomically(folder / JOURNAL, json.dumps(vars(self)).encode())


@dataclass
class _Job:
    """One merge, checked and planned. `_stack`, `_base`, `_rounded` are the buffers that every tensor reuses."""

    method: maths.MergeMethod
    arguments: dict[str, maths.Argument]
    weights: list[float]
    base: Checkpoint
    branches: list[Checkpoint]
    plan: OutputPlan
    carried: dict[str, Path | bytes]
    out: Path
    _stack: Tensor = field(init=False)
    _base: Tensor = field(init=False)
    _rounded: Tensor = field(init=False)

    def __post_init__(self) -> None:
        largest = max((step.numel for step in self.plan.steps if step.merged), default=0)
        self._stack = torch.empty(len(self.branches) * largest)
        self._base = torch.empty(largest)
        self._rounded = torch.empty(4 * largest, dtype=torch.uint8)

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def size(self) -> int:
        """Bytes of the whole result, its manifest aside."""
        return self.plan.size + sum(len(source) if isinstance(source, bytes) else source.stat().st_size
                                    for source in self.carried.values())

    def merged(self, step: Step) -> tuple[np.ndarray, list[float]]:
        """(the bytes of one tensor of the result, squared displacements of merged and of each branch)."""
        if not step.merged:
            return _bytes_of(self.base.read(step.name)), [0.0] * (1 + len(self.branches))
        stack = self._stack[: len(self.branches) * step.numel].view(len(self.branches), *step.shape)
        base = self._base[: step.numel].view(step.shape)
        base.copy_(self.base.read(step.name))
        for row, branch in zip(stack, self.branches, strict=True):
            row.copy_(branch.read(step.name))
        exact = _call(self.method, {"branches": stack, "base": base, "weights": torch.tensor(self.weights)},
                      self.arguments)
        if (exact.shape, exact.dtype) != (base.shape, base.dtype):
            raise TypeError(f"{self.method.name} gave {exact.dtype} {tuple(exact.shape)} for {tuple(base.shape)}")
        rounded = self._rounded[: step.numel * ITEM_SIZES[step.dtype]].view(MERGED[step.dtype]).view(step.shape)
        rounded.copy_(exact)
        if not bool(torch.isfinite(rounded).all()):
            raise self._not_finite(step, stack, base)
        return _bytes_of(rounded), [maths.squared_distance(t, base) for t in (exact, *stack)]

    def _not_finite(self, step: Step, stack: Tensor, base: Tensor) -> AnabranchError:
        inputs = {f"the base ({self.base.folder})": base} | {
            label(k, branch): row for k, (branch, row) in enumerate(zip(self.branches, stack, strict=True))}
        lines = [f"{who}: {int(row.isnan().sum())} NaN and {int(row.isinf().sum())} infinite of {row.numel()} numbers"
                 for who, row in inputs.items() if not bool(torch.isfinite(row).all())]
        if lines:
            return CorruptedError.of(f"tensor '{step.name}' cannot be merged:",
                                     [*lines, "A branch that diverged must be trained again (a smaller learning rate "
                                              "helps); a damaged file must be fetched again."])
        return RecipeError(f"tensor '{step.name}': all inputs are finite, but {self.method.name} gives numbers that "
                           f"{step.dtype} cannot hold. Set `merge.dtype` to bfloat16 or float32.")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns what the operating system says while writing into one message with the sizes in it."""
        try:
            yield
        except (OSError, OutputError) as error:
            raise OutputError(self.no_room(_reason(error))) from error

    def no_room(self, reason: str) -> str:
        present = sum(p.stat().st_size for p in self.partial.rglob("*") if p.is_file() and p.name != JOURNAL)
        free = shutil.disk_usage(_existing_parent(self.out)).free
        kept = (f" What is written so far ({present:,} bytes) stays in {self.partial} and will be used; delete that "
                "folder if you give up." if present else "")
        return (f"cannot write the merged model {self.out}: {reason}. It needs {self.size:,} bytes, of which "
                f"{max(0, self.size - present):,} are still to be written; {free:,} bytes are free there. Free space, "
                f"or change `output`, and run the same command again.{kept}")


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
    made_from: dict[str, str],
    progress: Callable[[int, int], None] | None = None,
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
        made_from: name of an input -> its hash, for the manifest; checking them is the caller's.
        progress: called with (tensors done, tensors in all) after each tensor.
    Raises:
        RecipeError: unknown method, parameter, dtype or size; weights that the method refuses; a dtype too narrow.
        ModelError, CorruptedError: an input that is not there or damaged, or that holds a NaN or an infinity.
        ShapeMismatch: inputs whose tensors do not line up, all of them in one message.
        OutputError: no space, no permission, `out` holds something else, or another merge is writing it.
    """
    record = maths.method_named(method)
    arguments = maths.arguments_for(record, parameters or {})
    _check_request(record, arguments, branches, weights, dtype)
    origin = Checkpoint.open(base)
    wanted = {"method": method, "arguments": arguments, "weights": weights, "made_from": made_from,
              "dtype": dtype or _dtypes(origin)}
    if (finished := _already_there(out, wanted)) is not None:
        return finished
    opened = [Checkpoint.open(branch) for branch in branches]
    plan = plan_output(origin, line_up(origin, opened), dtype, max_shard_size)
    job = _Job(record, arguments, weights, origin, opened, plan, _carried(origin, plan, dtype), out)
    key = digest([wanted, [shard.header.hex() for shard in plan.shards], _fingerprint([base, *branches])])
    with _locked(job):
        journal = _resumed(job, key)
        _check_space(job, journal)
        try:
            _stream(job, journal, progress)
        except OutputError:
            raise
        except AnabranchError:  # the inputs are at fault, and mended ones will not fit what is written
            shutil.rmtree(job.partial)
            raise
        return _finish(job, journal, wanted)


def verify_manifest(folder: Path) -> list[str]:
    """What is wrong with a merged folder, by its manifest: files missing, changed, or weights that were added."""
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
    added = {p.name for p in folder.glob("*.safetensors")} - manifest.files.keys()
    return problems + [f"{folder / name}: not made by the merge" for name in sorted(added)]


def _check_request(method: maths.MergeMethod, arguments: Mapping[str, maths.Argument], branches: Sequence[Path],
                   weights: Sequence[float], dtype: str | None) -> None:
    """Raises RecipeError. The method itself judges weights and arguments, on tensors of one number, before any read."""
    if not branches:
        raise RecipeError("merge: no branch was given, wanted at least one.")
    if len(weights) != len(branches):
        raise RecipeError(f"merge: got {len(weights)} weights for {len(branches)} branches, wanted one each.")
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"merge.dtype: `{dtype}` cannot be written.{closest(dtype, DTYPES)}")
    try:
        _call(method, {"branches": torch.zeros(len(branches), 1), "base": torch.zeros(1),
                       "weights": torch.tensor(weights, dtype=torch.float32)}, arguments)
    except ValueError as error:
        raise RecipeError(f"merge method {method.name}: {error}") from error


def _call(method: maths.MergeMethod, inputs: Mapping[str, Tensor], arguments: Mapping[str, maths.Argument]) -> Tensor:
    with torch.no_grad():
        return method.function(*(inputs[name] for name in method.inputs), **arguments)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _dtypes(base: Checkpoint) -> str:
    names = {spelling: name for name, spelling in DTYPES.items()}
    return ", ".join(sorted({names[info.dtype] for info in base.tensors.values() if info.dtype in names}))


def _fingerprint(folders: Sequence[Path]) -> list[list[Any]]:
    """Tells changed inputs for the journal, without reading them. Never part of an artifact."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for f in folders for path in weight_files(f)]


# --- the output folder ---


def _already_there(out: Path, wanted: Mapping[str, Any]) -> MergeManifest | None:
    """The manifest in `out`, if that is this very merge; None if `out` is free. Raises OutputError otherwise."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "Make it anew (`--from merge`), or choose another `output`; nothing was changed."
    try:
        manifest = MergeManifest.load(out / MANIFEST)
    except CorruptedError as error:
        raise OutputError(f"{out} is already there, and no readable {MANIFEST} says what it is. {remedy}") from error
    differing = [f"{key}: {getattr(manifest, key)!r} there, {value!r} wanted now"
                 for key, value in wanted.items() if getattr(manifest, key) != value]
    if problems := differing or verify_manifest(out):
        raise OutputError.of(f"{out} already holds another or a damaged merge. {remedy}", problems)
    return manifest


@contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """The temporary folder, made, and held against a second merge into it. The lock goes with the process."""
    handle = -1
    try:
        job.partial.mkdir(parents=True, exist_ok=True)
        handle = os.open(job.partial, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(f"another merge is writing {job.out}. Wait for it, or choose another `output`.") from error
    except OSError as error:
        if handle < 0:
            raise OutputError(job.no_room(_reason(error))) from error
        # A file system without locks: go on unprotected.
    try:
        if not job.partial.is_dir():
            raise OutputError(f"another merge has just finished {job.out}. Run the same command again.")
        yield
    finally:
        os.close(handle)


def _resumed(job: _Job, key: str) -> _Journal:
    """Where to go on: the journal of the temporary folder if it is of this plan and its files are there, else zero."""
    names = {path.name for path in job.partial.iterdir()}
    ours = JOURNAL in names or MANIFEST in names or all(name.startswith(f".{JOURNAL}") for name in names)
    if not ours:
        raise OutputError(f"{job.partial} is needed for writing, and holds files that no merge put there. Move them "
                          "away or choose another `output`.")
    try:
        found = _Journal(**json.loads((job.partial / JOURNAL).read_text()))
        if found.plan == key and _holds(job, found.done):
            return found
    except (OSError, ValueError, TypeError):
        pass  # no journal, or half a journal: begin again
    with job.writing():
        begun = _Journal(key, 0, [0.0] * (1 + len(job.branches)))
        begun.save(job.partial)  # first: it is what marks the folder as ours
        for path in [p for p in job.partial.iterdir() if p.name != JOURNAL]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return begun


def _holds(job: _Job, done: int) -> bool:
    """Whether the temporary folder has the bytes of the first `done` tensors."""
    for shard in job.plan.shards:
        here = shard.steps[:done]
        path = job.partial / shard.file
        if here and (not path.is_file() or path.stat().st_size < len(shard.header) + here[-1].stop):
            return False
        done -= len(here)
    return True


def _check_space(job: _Job, journal: _Journal) -> None:
    written = sum(step.stop - step.start for step in job.plan.steps[: journal.done])
    if job.size - written > shutil.disk_usage(job.partial).free:
        if journal.done == 0:
            shutil.rmtree(job.partial)  # it holds a journal and nothing else
        raise OutputError(job.no_room("the disk has too little space"))


def _stream(job: _Job, journal: _Journal, progress: Callable[[int, int], None] | None) -> None:
    total = len(job.plan.steps)
    first = unsaved = 0
    for shard in job.plan.shards:
        skip = min(len(shard.steps), max(0, journal.done - first))
        first += len(shard.steps)
        if skip == len(shard.steps) > 0:
            continue
        with job.writing():
            file = _opened(job.partial / shard.file, shard, skip)
        with file:
            for step in shard.steps[skip:]:
                data, squares = job.merged(step)
                journal.done += 1
                journal.squares = [a + b for a, b in zip(journal.squares, squares, strict=True)]
                unsaved += data.size
                with job.writing():
                    _write(file, data)
                    if unsaved >= JOURNAL_BYTES or journal.done == first:
                        os.fsync(file.fileno())  # data before the journal that vouches for it
                    if unsaved >= JOURNAL_BYTES:
                        journal.save(job.partial)
                        unsaved = 0
                if progress is not None:
                    progress(journal.done, total)


def _opened(path: Path, shard: Shard, skip: int) -> FileIO:
    """The shard's file, standing behind its first `skip` tensors; whatever a kill left after them is cut off."""
    file = open(path, "r+b" if skip else "wb", buffering=0)  # noqa: SIM115 - the caller's `with` closes it
    if skip:
        file.truncate(file.seek(len(shard.header) + shard.steps[skip - 1].stop))
    else:
        _write(file, np.frombuffer(shard.header, dtype=np.uint8))
    return file


def _write(file: FileIO, data: np.ndarray) -> None:
    """All of it: one system call may take less."""
    left = data.data
    while left:
        left = left[file.write(left):]


def _finish(job: _Job, journal: _Journal, wanted: Mapping[str, Any]) -> MergeManifest:
    """Side files, manifest, and the rename that makes the folder appear."""
    with job.writing():
        for name, source in job.carried.items():
            write_atomically(job.partial / name, source if isinstance(source, bytes) else source.read_bytes())
        expected = {shard.file for shard in job.plan.shards} | job.carried.keys()
        for path in [p for p in job.partial.rglob("*") if p.is_file()]:
            name = path.relative_to(job.partial).as_posix()
            if name not in expected and name != JOURNAL:
                path.unlink()  # left over from a kill
        manifest = MergeManifest(
            **{**wanted, "made_from": dict(sorted(wanted["made_from"].items()))},
            parameters=job.plan.parameters,
            displacement=sqrt(journal.squares[0]),
            branch_displacements=[sqrt(square) for square in journal.squares[1:]],
            files={name: file_digest(job.partial / name) for name in sorted(expected)},
        )
        manifest.save(job.partial / MANIFEST)
        (job.partial / JOURNAL).unlink()
        _flush_folder(job.partial)
        os.rename(job.partial, job.out)
        _flush_folder(job.out.parent)
    return manifest


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def _carried(base: Checkpoint, plan: OutputPlan, dtype: str | None) -> dict[str, Path | bytes]:
    """Name in the result -> the base's file, or new bytes."""
    patterns = [*CARRIED, *(["*.py"] if "auto_map" in base.config else [])]
    files: dict[str, Path | bytes] = {
        path.relative_to(base.folder).as_posix(): path
        for pattern in patterns for path in base.folder.glob(pattern)
        if path.is_file() and not path.name.endswith((*PICKLES, ".safetensors"))
    }
    config = _with_dtype(base.config, dtype) if dtype else base.config
    if dtype and not {"dtype", "torch_dtype"} & config.keys():
        config = config | {"dtype": dtype}
    files["config.json"] = (base.folder / "config.json" if config == base.config
                            else (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    if plan.index is not None:
        files[INDEX] = plan.index
    return dict(sorted(files.items()))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with every dtype of weights in it, also of its inner configs, set to `dtype`."""
    return {key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str)
            else _with_dtype(value, dtype) if isinstance(value, dict) else value
            for key, value in config.items()}


def _existing_parent(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.exists())


def _reason(error: Exception) -> str:
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError):
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return "the disk is full" if full else (cause.strerror or str(cause))
    return str(error)

