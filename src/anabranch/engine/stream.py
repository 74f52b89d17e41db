"""A merge, tensor by tensor and block by block, into a folder that appears only when it is whole.

    for step in plan:                         order fixed by the plan; several workers take the next step each
        for block in step:                    every input's numbers, float32, in reused buffers
            out = method(block)               float32; sums and ranks over the whole tensor are found in earlier passes
            write round(out)                  output dtype, checked finite, at the place that the plan gave it

The kernel reads ahead and writes behind, and one worker computes while another waits for it. Nothing depends on how
many workers there are, on how large a block is, or on what was written before a kill.
"""

from __future__ import annotations

import queue
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import anabranch.merge as maths
from anabranch.engine.blocks import MERGED, STORED, Buffers, PlainReader, Reader, TensorStack, Uniform, begin_hash
from anabranch.engine.checkpoint import ITEM_SIZES, Checkpoint
from anabranch.engine.memory import Budget, MemoryPlan, kind_of, plan_memory
from anabranch.engine.output import MANIFEST, Done, OutputFolder, vouched_for
from anabranch.engine.plan import OutputPlan, Step
from anabranch.engine.wanted import Input, Source
from anabranch.errors import AnabranchError, CorruptedError, OutputError, RecipeError
from anabranch.merge.select import largest, magnitudes
from anabranch.merge.stack import CHUNK, Block, Blockwise, ModelStack

# Numbers looked at together for NaN and infinity.
FINITE = 1 << 20
# Bytes of a result from which on the fused kernels are worth half a second for loading them.
FUSED_FROM = 100 * 10**6


@dataclass(frozen=True)
class Merge:
    """Everything that decides the bytes of the result.

    readers    (tensor of the result, source) -> how to read it, where that is not simply what its file holds: an adapter
               folded in, rows moved
    fisher     number of an input -> the checkpoint that holds its Fisher information
    companions number of an input -> files beside its weights whose bytes decide those of the result
    read_also  tensors of which something is read without being merged
    """

    inputs: tuple[Input, ...]
    opened: tuple[Checkpoint, ...]
    plan: OutputPlan
    seed: int = 0
    readers: Mapping[tuple[str, Source], Callable[[Buffers], Reader]] = field(default_factory=dict)
    fisher: Mapping[int, Checkpoint] = field(default_factory=dict)
    companions: Mapping[int, tuple[Path, ...]] = field(default_factory=dict)
    read_also: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What changes speed and memory, never a byte. `memory`: bytes, of the whole process, anonymous; `fused`: whether to use
    the fused kernels, None for merges that are large enough to pay for loading them."""

    threads: int = 2
    memory: int = 2 * 10**9
    device: str = "cpu"
    displacements: bool = False
    allow_nonfinite: bool = False
    fused: bool | None = None


@dataclass(frozen=True)
class Progress:
    """Bytes of the result, done and in all; and tensors finished."""

    done: int
    total: int
    tensors: int


def stream(merge: Merge, output: OutputFolder | None, settings: Settings,
           progress: Callable[[Progress], None] | None = None) -> dict[str, Done]:
    """Compute every step, and write it where there is an `output`, which must be open. Tensor -> Done, in plan order.

    Raises CorruptedError for an input that is damaged or holds a NaN or an infinity, RecipeError for a memory limit that
    is too small, or for a result that is not finite though its inputs are.
    """
    finished = dict(output.done) if output is not None else {}
    steps = [step for step in merge.plan.steps if step.name not in finished]
    job = _Job(merge, output, settings, memory_for(merge, steps, settings), finished)
    _allow_open_files(merge)
    total = sum(step.stop - step.start for step in merge.plan.steps)
    done = total - sum(step.stop - step.start for step in steps)
    threads = torch.get_num_threads()
    try:
        job.find_cuts()
        for step, result in _worked(job, steps):
            if isinstance(result, int):
                done += result
            else:
                finished[step.name] = result
                if output is not None:
                    with output.writing():
                        output.finished(step, result)
            if progress is not None:
                progress(Progress(done, total, len(finished)))
    except OutputError:
        if output is None:
            raise
        with output.writing():  # a worker told the sizes before those that ended earlier were counted here: told again
            raise
    finally:
        torch.set_num_threads(threads)
    return {step.name: finished[step.name] for step in merge.plan.steps}


def memory_for(merge: Merge, steps: Sequence[Step], settings: Settings) -> MemoryPlan:
    """The memory plan of some of a merge's steps. Raises RecipeError where the limit is too small."""
    size = sum(step.stop - step.start for step in merge.plan.steps)
    fused = size >= FUSED_FROM if settings.fused is None else settings.fused
    return plan_memory(steps, settings.memory, settings.threads, fused and settings.device == "cpu")


def _allow_open_files(merge: Merge) -> None:
    """All weight files of all inputs stay open. Many systems allow 1,024 where more may be had for the asking."""
    wanted = 64 + len(merge.plan.shards) + sum(len({t.file for t in c.tensors.values()}) for c in merge.opened)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


def check_device(device: str) -> None:
    """Raises RecipeError for a device that torch does not have here."""
    try:
        if torch.ones(1, device=device).item() != 1:
            raise RuntimeError("it does not hold numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"--device {device}: torch cannot use it here ({reason}). Wanted cpu, or cuda where there is one."
                          ) from error


def check_input(merge: Merge, vouched: Sequence[Mapping[str, str]], source: Source, found: str) -> None:
    """Raises CorruptedError where an input's own manifest has another hash of a tensor than was `found`."""
    if vouched[source.input].get(source.name, found) != found:
        checkpoint = merge.opened[source.input]
        raise CorruptedError(
            f"{checkpoint.folder / checkpoint.tensors[source.name].file}: tensor '{source.name}' has other bytes than its "
            f"merge wrote, says {checkpoint.folder / MANIFEST}. Make or fetch this model again; if it was changed on "
            f"purpose, delete its {MANIFEST}.")


def branch_keys(inputs: Sequence[Input]) -> list[str]:
    """The name under which each input draws random numbers: the shortest end of its path (or of its id on the Hub) that
    tells it from the others, so that it does not matter where the models lie together, or how their paths are spelled."""
    parts = [one.folder.resolve().parts if one.local else tuple(one.label.split("/")) for one in inputs]
    adapters = [f"+{one.adapter.name}" if one.adapter is not None else "" for one in inputs]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-depth:]) + adapter for p, adapter in zip(parts, adapters, strict=True)]
        if len(set(names)) == len(names):
            return names
    return [one.label for one in inputs]


def _worked(job: _Job, steps: Sequence[Step]) -> Iterator[tuple[Step, int | Done]]:
    """(step, bytes of it newly done) and (step, Done), as the workers tell them. Their first error is raised here."""
    told: queue.SimpleQueue[tuple[Step | None, Any]] = queue.SimpleQueue()
    left, lock = iter(steps), threading.Lock()

    def work() -> None:
        torch.set_num_threads(1)  # of this thread; sums must not depend on how many there are
        buffers = Buffers()
        try:
            while not job.stopped:
                with lock:
                    step = next(left, None)
                if step is None:
                    break
                told.put((step, job.merged(step, buffers, told)))
        except _Stopped:
            pass
        except BaseException as error:  # it is raised again below, in the thread that waits
            job.stopped = True
            told.put((None, error))
        told.put((None, None))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(job.settings.threads, len(steps))))]
    running, failed = len(workers), None
    try:
        for worker in workers:
            worker.start()
        while running:
            step, result = told.get()
            if step is not None and failed is None:
                yield step, result
            elif step is None and result is None:
                running -= 1
            elif step is None:
                failed = failed or result
        if failed is not None:
            raise failed
    finally:
        job.stopped = True
        for worker in [w for w in workers if w.ident is not None]:
            worker.join()  # a thread that still computes when the interpreter ends takes the process down with it


class NotFrozen(Exception):
    """A branch has other numbers than the base in a tensor that its recipe freezes; the message says which."""


class _Stopped(Exception):
    """Another worker failed, or the caller gave up."""


@dataclass
class _Job:
    """A merge being computed."""

    merge: Merge
    output: OutputFolder | None
    settings: Settings
    memory: MemoryPlan
    finished: dict[str, Done]
    stopped: bool = False
    cuts: dict[Any, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = branch_keys(self.merge.inputs)
        self.budget = Budget(self.memory.room)
        self.lock = threading.Lock()
        self.fused = self.memory.fused
        self.hashed = {key for done in self.finished.values() for key in done.inputs}
        self.vouched = [vouched_for(checkpoint.folder) for checkpoint in self.merge.opened]

    def merged(self, step: Step, buffers: Buffers, told: queue.SimpleQueue) -> Done:
        """Compute and write one tensor."""
        need = self.memory.needs[step.name]
        self.budget.acquire(need)
        try:
            done = (self._merged if step.merged else self._copied)(step, buffers, told)
            for key, found in done.inputs.items():
                number, name = key.split(" ", 1)
                check_input(self.merge, self.vouched, Source(int(number), name), found)
            return done
        except ValueError as error:  # numbers that cannot be ranked, a matrix that cannot be decomposed
            for block in self._stack(step, buffers):
                if not (finite(block.branches) and (block.base is None or finite(block.base))):
                    raise self._not_finite(step, block) from error
            raise RecipeError(f"tensor '{step.name}': {step.wanted.method}: {error}") from error
        finally:
            if kind_of(step) == "tensor":
                buffers.drop()
            self.budget.release(need)

    def _merged(self, step: Step, buffers: Buffers, told: queue.SimpleQueue) -> Done:
        stack = self._stack(step, buffers)
        method, arguments = maths.method_named(step.wanted.method), dict(step.wanted.arguments)
        inputs = self._inputs(step, method)
        squares = _Squares(len(step.wanted.branches)) if self.settings.displacements else None
        hasher, size = begin_hash(step.wanted.dtype, step.wanted.shape), ITEM_SIZES[step.wanted.dtype]
        with torch.no_grad():
            if method.streamed is not None:
                blockwise = method.streamed(stack, *(inputs[name] for name in method.inputs if name in inputs), **arguments)
            else:
                def blockwise(block: Block) -> Tensor:
                    of_block = inputs | {"branches": block.branches, "base": block.base, "draws": block.draws,
                                         "fisher": block.fisher}
                    return method.function(*(of_block[name] for name in method.inputs), **arguments)

            hashes = self._begin_input_hashes(stack)
            # A method's function may have a fused form, which gives the same bits or says that they are not finite.
            fast = fused_form(blockwise, stack) if squares is None and step.wanted.dtype in STORED else None
            for start, stop in stack.ranges():
                rounded = buffers.take("rounded", stop - start, MERGED[step.wanted.dtype])
                if fast is None:
                    self._plain(step, stack, blockwise, start, stop, rounded, squares)
                elif not fast(start, *stack.stored(start, stop), numbers(rounded)):
                    self._plain(step, stack, blockwise, start, stop, rounded, None)
                self._put(step, start * size, rounded.view(torch.uint8).numpy(), hasher, told)
        return Done(hasher.hexdigest(), {key: reader.hasher.hexdigest() for key, reader in hashes.items()},
                    squares.values if squares is not None else [])

    def _plain(self, step: Step, stack: TensorStack, blockwise: Blockwise, start: int, stop: int, rounded: Tensor,
               squares: _Squares | None) -> None:
        """One block, as the method defines it, rounded and checked."""
        block = stack.block(start, stop)
        exact = blockwise(block).reshape(-1)
        if (exact.numel(), exact.dtype) != (stop - start, torch.float32):
            raise TypeError(f"{step.wanted.method} gave {exact.dtype} {exact.numel()} numbers for {stop - start}")
        rounded.copy_(exact)
        if not self.settings.allow_nonfinite and not finite(rounded):
            raise self._not_finite(step, block)
        if squares is not None:
            squares.add(exact, block)

    def _copied(self, step: Step, buffers: Buffers, told: queue.SimpleQueue) -> Done:
        """The bytes of the first source, after comparing them with all others'; of the base, for what is frozen."""
        wanted = step.wanted
        sources = (wanted.base, *wanted.branches) if wanted.base is not None else wanted.branches
        readers = [PlainReader(self.merge.opened[s.input], s.name, buffers, f"raw-{i}", f"{s.input} {s.name}")
                   for i, s in enumerate(sources)]
        hasher, size = begin_hash(step.wanted.dtype, step.wanted.shape), ITEM_SIZES[step.wanted.dtype]
        stack = TensorStack(step.wanted.shape, readers, None, (), "entry", self.memory.entries, buffers)
        hashes = self._begin_input_hashes(stack)
        for start, stop in stack.ranges():
            first, *others = [reader.read_raw(start, stop) for reader in readers]
            for source, reader, other in zip(sources[1:], readers[1:], others, strict=True):
                if wanted.frozen and not same_numbers(as_stored(first, readers[0]), as_stored(other, reader)):
                    raise NotFrozen(f"tensor '{step.name}' of {self._label(source)}")
                if not wanted.frozen and not other.equal(first):
                    raise RecipeError(f"tensor '{step.name}': {self._label(source)} has other numbers in it than "
                                      f"{self._label(sources[0])}; a buffer of {wanted.dtype} can only be "
                                      "kept where all are equal.")
            if readers[0].dtype != wanted.dtype:
                first = self._narrowed(step, as_stored(first, readers[0]))
            self._put(step, start * size, first.numpy(), hasher, told)
        return Done(hasher.hexdigest(), {key: reader.hasher.hexdigest() for key, reader in hashes.items()}, [])

    def _narrowed(self, step: Step, numbers: Tensor) -> Tensor:
        """Frozen numbers in the result's dtype, as bytes."""
        rounded = numbers.float().to(MERGED[step.wanted.dtype])
        if not self.settings.allow_nonfinite and finite(numbers) and not finite(rounded):
            raise RecipeError(f"tensor '{step.name}': the base holds numbers that {step.wanted.dtype} cannot hold. Write the "
                              "result in bfloat16 or float32 (`merge.dtype`).")
        return rounded.view(torch.uint8)

    def _put(self, step: Step, at: int, data: np.ndarray, hasher: Any, told: queue.SimpleQueue) -> None:
        hasher.update(data)
        if self.output is not None:
            with self.output.writing():
                self.output.write(step, at, data)
        told.put((step, len(data)))
        if self.stopped:
            raise _Stopped

    def _stack(self, step: Step, buffers: Buffers) -> TensorStack:
        wanted = step.wanted
        method = maths.method_named(wanted.method)
        draw = None
        if "draws" in method.inputs:
            draw = Uniform(self.merge.seed, [self.keys[s.input] for s in wanted.branches], wanted.name)
        fisher: list[Reader] = []
        if "fisher" in method.inputs:
            fisher = [PlainReader(self.merge.fisher[s.input], s.name, buffers, f"raw-fisher-{i}")
                      for i, s in enumerate(wanted.branches)]
        base = (self._reader(step, wanted.base, buffers, "raw-base")
                if wanted.base and (method.takes_base or self.settings.displacements) else None)
        branches = [self._reader(step, s, buffers, f"raw-{i}") for i, s in enumerate(wanted.branches)]
        return TensorStack(wanted.shape, branches, base, fisher, kind_of(step), self.memory.entries, buffers, draw,
                           self.settings.device, self.fused)

    def _reader(self, step: Step, source: Source, buffers: Buffers, place: str) -> Reader:
        special = self.merge.readers.get((step.name, source))
        if special is not None:
            return special(buffers)
        return PlainReader(self.merge.opened[source.input], source.name, buffers, place, f"{source.input} {source.name}")

    def _inputs(self, step: Step, method: maths.MergeMethod) -> dict[str, Any]:
        """What does not change from block to block."""
        inputs: dict[str, Any] = {"depth": step.wanted.depth}
        if "weights" in method.inputs:
            inputs["weights"] = torch.tensor(step.wanted.weights, dtype=torch.float32, device=self.settings.device)
        if method.cuts_from is not None:
            inputs["cuts"] = torch.tensor(self.cuts[_cut_key(step)], dtype=torch.float32, device=self.settings.device)
        return inputs

    def find_cuts(self) -> None:
        """For methods that rank over the whole model: a pass over all their tensors, before the first is merged."""
        together: dict[Any, list[Step]] = {}
        for step in self.merge.plan.steps:
            if step.merged and maths.method_named(step.wanted.method).cuts_from is not None:
                together.setdefault(_cut_key(step), []).append(step)
        for key, steps in together.items():
            *_, densities = key
            torch.set_num_threads(1)
            buffers = Buffers()
            stack = ModelStack([self._stack(step, buffers) for step in steps])
            with torch.no_grad():
                found = largest(stack, magnitudes, [[int(density * stack.numel)] for density in densities])
            self.cuts[key] = [max(cut.value, 0.0) for (cut,) in found]  # -inf, where all are kept, is no magnitude

    def _begin_input_hashes(self, stack: TensorStack) -> dict[str, PlainReader]:
        """Have the readers of a stack hash what they read from now on, for tensors that no step has hashed yet."""
        begun: dict[str, PlainReader] = {}
        with self.lock:
            for reader in [*stack.branches, *([stack.base] if stack.base else [])]:
                if isinstance(reader, PlainReader) and reader.key is not None and reader.key not in self.hashed:
                    self.hashed.add(reader.key)
                    info = reader.checkpoint.tensors[reader.name]
                    reader.hasher = begin_hash(info.dtype, info.shape)
                    begun[reader.key] = reader
        return begun

    def _label(self, source: Source) -> str:
        return self.merge.inputs[source.input].label

    def _not_finite(self, step: Step, block: Block) -> AnabranchError:
        rows = [*zip(step.wanted.branches, block.branches, strict=True)]
        if step.wanted.base is not None and block.base is not None:
            rows.append((step.wanted.base, block.base))
        lines = [f"{self._label(source)}: {int(row.isnan().sum())} NaN and {int(row.isinf().sum())} infinite of "
                 f"{row.numel()} numbers read together" for source, row in rows if not bool(torch.isfinite(row).all())]
        if lines:
            way_on = (f"{step.wanted.method} puts numbers in order or decomposes them, and cannot go on with these."
                      if self.settings.allow_nonfinite else "(`--allow-nonfinite` merges them as they are.)")
            return CorruptedError.of(
                f"tensor '{step.name}' cannot be merged:",
                [*lines, "A branch that diverged must be trained again (a smaller learning rate helps); a damaged file must "
                         f"be fetched again. {way_on}"])
        return RecipeError(f"tensor '{step.name}': all inputs are finite, but {step.wanted.method} gives numbers that "
                           f"{step.wanted.dtype} cannot hold. Write the result in bfloat16 or float32 (`out_dtype`; in a "
                           "recipe `merge.dtype`).")


def _cut_key(step: Step) -> Any:
    method = maths.method_named(step.wanted.method)
    density: Any = dict(step.wanted.arguments)[str(method.cuts_from)]  # a kept share: one number, or one per branch
    densities = maths.one_each(density, len(step.wanted.branches))
    return (step.wanted.method, tuple(s.input for s in step.wanted.branches),
            step.wanted.base.input if step.wanted.base else None, tuple(densities))


@dataclass
class _Squares:
    """Squared distances from the base: the result's, then each branch's. Added chunk by chunk, so that no cut shows."""

    values: list[float]

    def __init__(self, k: int) -> None:
        self.values = [0.0] * (1 + k)

    def add(self, merged: Tensor, block: Block) -> None:
        assert block.base is not None
        base = block.base.reshape(-1)
        for i, row in enumerate([merged, *block.branches.reshape(len(block.branches), -1)]):
            for start in range(0, len(base), CHUNK):
                self.values[i] += maths.squared_distance(row[start : start + CHUNK], base[start : start + CHUNK])


def fused_form(blockwise: Blockwise, stack: TensorStack) -> Callable[..., bool] | None:
    """(start, x, base, out) -> whether all is finite; None where the method, or what it reads, has none."""
    if not stack.fusible:
        return None
    draw, by_keys = stack.draw, getattr(blockwise, "fused_by_keys", None)
    if draw is not None and by_keys is not None:
        return lambda *given: by_keys(*given, draw.keys)
    return getattr(blockwise, "fused", None)


def numbers(rounded: Tensor) -> np.ndarray:
    """As the fused kernels write them."""
    return rounded.view(torch.int16).numpy().view(np.uint16) if rounded.dtype == torch.bfloat16 else rounded.numpy()


NARROW = (torch.bfloat16, torch.float16)


def as_stored(raw: Tensor, reader: PlainReader) -> Tensor:
    """Bytes as the numbers that they are; as bytes, where they are none that is merged."""
    return raw.view(MERGED[reader.dtype]) if reader.dtype in MERGED else raw


def same_numbers(base: Tensor, branch: Tensor) -> bool:
    """Whether a branch has the base's numbers, as float32; or the base's rounded to bfloat16 or float16, by a trainer that
    loaded or saved it so: that is no training."""
    if base.dtype == branch.dtype and base.equal(branch):
        return True
    if not (base.is_floating_point() and branch.is_floating_point()):
        return False
    wide, found = base.float(), branch.float()
    return wide.equal(found) or any(wide.to(narrow).float().equal(found) for narrow in NARROW)


def finite(rounded: Tensor) -> bool:
    """No NaN and no infinity. The sum tells in one pass; only where it is not finite itself must each number be looked at.

    Piece by piece: summing in another dtype makes a copy of all that is summed."""
    return all(bool(torch.isfinite(piece.sum(dtype=torch.float32))) or bool(torch.isfinite(piece).all())
               for piece in rounded.reshape(-1).split(FINITE))
