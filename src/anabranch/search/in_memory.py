"""Merges straight into one loaded model: what `anabranch merge` would write, without writing it.

    inputs      their tensors are kept as they stand in the files (the first candidate reads them), as far as memory allows;
                what does not fit is read from its file each time
    merge       planned and computed by the engine itself, so filters, gradients, slices, adapters, tokenizers and draws are
                what they are on disk: the same bits, rounded to the dtype of the result
    model       one transformers model; each finished tensor is copied into its parameter, widened to the model's dtype

A tensor of the result is matched with a parameter by its name, and the match is held against a model folder that the engine
wrote. Where an architecture is stored under other names than transformers' own, each candidate goes through a folder.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.engine.assemble import assemble
from anabranch.engine.blocks import MERGED, Buffers, Reader
from anabranch.engine.checkpoint import PROCESSOR, Checkpoint
from anabranch.engine.config import MergeConfig
from anabranch.engine.dialect import config_of
from anabranch.engine.layout import Layout, layout_of
from anabranch.engine.memory import occupied
from anabranch.engine.merging import merge_config
from anabranch.engine.output import Done, OutputFolder
from anabranch.engine.plan import OutputPlan, Step, lay_out
from anabranch.engine.prepare import Options, prepare
from anabranch.engine.reference import local
from anabranch.engine.stream import Merge, Settings, stream
from anabranch.engine.wanted import Source
from anabranch.errors import ModelError, OutputError, RecipeError
from anabranch.families import saved_names
from anabranch.model import load_model, load_tokenizer, vision_of

# Beside inputs and model: activations and logits of a batch, blocks of the merge.
WORKING = 256 * 10**6
SCRATCH = ".search-"


# --- inputs that stay in memory ---


@dataclass
class Room:
    """Bytes that inputs may take. Threads share it."""

    left: int
    taken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, size: int) -> bool:
        with self.lock:
            if size > self.left:
                return False
            self.left -= size
            self.taken += size
            return True


@dataclass(frozen=True)
class Resident(Checkpoint):
    """A checkpoint whose tensors stay in memory once they are read, while there is room."""

    room: Room = field(default_factory=lambda: Room(0), repr=False, compare=False)
    held: dict[str, np.ndarray | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, room: Room) -> Resident:
        return cls(**{f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}, room=room)

    def read_bytes(self, name: str, start: int, into: np.ndarray) -> None:
        data = self._kept(name)
        if data is None:
            super().read_bytes(name, start, into)
        else:
            target = into.view(np.uint8).reshape(-1)
            target[:] = data[start : start + len(target)]

    def _kept(self, name: str) -> np.ndarray | None:
        if name not in self.held:
            size = self.tensors[name].size
            data = np.empty(size, np.uint8) if self.room.take(size) else None
            if data is not None:
                super().read_bytes(name, 0, data)
            self.held[name] = data  # two threads never read one input's tensor at a time: it belongs to one step
        return self.held[name]


class KeptReader:
    """What a slow reader (an adapter folded in, rows moved) gives, kept as float32 after the first pass."""

    def __init__(self, make: Callable[[Buffers], Reader], numel: int, room: Room) -> None:
        self.make, self.numel, self.room = make, numel, room
        self.data: Tensor | None = None
        self.asked = False

    def __call__(self, buffers: Buffers) -> Reader:
        if not self.asked:
            self.asked = True
            if self.room.take(4 * self.numel):
                data = torch.empty(self.numel)
                self.make(buffers).read(0, self.numel, data)
                self.data = data
        return _Held(self.data) if self.data is not None else self.make(buffers)


@dataclass
class _Held:
    data: Tensor

    def read(self, start: int, stop: int, into: Tensor) -> None:
        into.copy_(self.data[start:stop])


# --- the engine's merges, into memory ---


class _Receiver(OutputFolder):
    """Where the engine puts bytes: handed on tensor by tensor, nothing written."""

    def __init__(self, plan: OutputPlan, take: Callable[[str, Tensor], None]) -> None:
        super().__init__(Path(), plan, {})
        self.take = take
        self.open: dict[str, np.ndarray] = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def write(self, step: Step, at: int, data: np.ndarray) -> None:
        if step.name not in self.open:
            self.open[step.name] = np.empty(step.stop - step.start, np.uint8)
        self.open[step.name][at : at + data.nbytes] = data.reshape(-1).view(np.uint8)

    def finished(self, step: Step, done: Done) -> None:
        data = self.open.pop(step.name, np.empty(0, np.uint8))
        if step.wanted.dtype in MERGED:
            self.take(step.name, torch.from_numpy(data).view(MERGED[step.wanted.dtype]).reshape(step.wanted.shape))


@dataclass
class Workshop:
    """Plans and computes candidates. `config` mappings are those that `anabranch merge` takes; `folders` as there."""

    folders: tuple[Path, ...]
    settings: Settings
    room: Room
    options: Options = field(default_factory=Options)
    warnings: list[str] = field(default_factory=list)
    _resident: dict[Path, Resident] = field(default_factory=dict)
    _special: dict[Any, KeptReader] = field(default_factory=dict)
    _known: dict[Any, tuple[Merge, list[Layout]]] = field(default_factory=dict)

    def merged(self, mapping: Mapping[str, Any], take: Callable[[str, Tensor], None]) -> OutputPlan:
        """Compute a candidate; `take` is given each float tensor of the result, in the dtype that it has on disk.

        Raises AnabranchError: the config cannot be merged, as `anabranch merge` would say.
        """
        merge = self.planned(mapping)
        stream(merge, _Receiver(merge.plan, take), self.settings)
        return merge.plan

    def planned(self, mapping: Mapping[str, Any]) -> Merge:
        config = config_of(dict(mapping), source="merge config of the search", folders=self.folders)
        key = (config.models, config.base, config.tokenizer and repr(config.tokenizer), config.chat_template)
        if key in self._known:
            return self._again(config, *self._known[key])
        prepared = prepare(config, "", self.options)
        self.warnings += [w for w in prepared.warnings if w not in self.warnings]
        merge = self._resident_merge(prepared.merge, key)
        # a config that reads nothing through its adapter has no readers, and the next one may want them
        if not any(one.adapter for one in merge.inputs) and config.tokenizer is None:
            self._known[key] = merge, [layout_of(c) for c in merge.opened]
        return merge

    def _again(self, config: MergeConfig, merge: Merge, layouts: list[Layout]) -> Merge:
        """A further config of the same models, whose files need not be opened again."""
        assembly = assemble(config, merge.opened, layouts, allow_mixed=self.options.allow_mixed)
        plan = lay_out(assembly.wanted, self.options.max_shard_size, merge.plan.stem)
        return replace(merge, plan=plan, fisher={i: Checkpoint.of_file(path) for i, path in assembly.fisher.items()})

    def _resident_merge(self, merge: Merge, key: Any) -> Merge:
        opened = []
        for checkpoint in merge.opened:
            kept = self._resident.setdefault(checkpoint.folder.resolve(), Resident.of(checkpoint, self.room))
            opened.append(replace(kept, config=checkpoint.config))
        readers = {at: self._slow(make, merge, at, key) for at, make in merge.readers.items()}
        return replace(merge, opened=tuple(opened), readers=readers)

    def _slow(self, make: Callable[[Buffers], Reader], merge: Merge, at: tuple[str, Source], key: Any) -> KeptReader:
        name, source = at
        one = merge.inputs[source.input]
        wanted = next(step.wanted for step in merge.plan.steps if step.name == name)
        place = (key, name, one.folder, one.adapter, source.name)
        if place not in self._special:
            self._special[place] = KeptReader(make, wanted.numel, self.room)
        return self._special[place]


def size_of(merge: Merge) -> int:
    """Bytes of the inputs' tensors that a merge reads."""
    used = {(merge.opened[s.input].folder, s.name): merge.opened[s.input].tensors[s.name].size
            for step in merge.plan.steps for s in step.wanted.sources}
    return sum(used.values())


# --- into a loaded model ---


@dataclass(frozen=True)
class Needs:
    """Bytes: of the model as loaded, of inputs that could be kept, and what may be taken in all beside what is."""

    model: int
    inputs: int
    allowed: int

    @property
    def kept(self) -> int:
        """Of inputs that will be kept."""
        return max(0, min(self.inputs, self.allowed - self.model - WORKING))

    @property
    def words(self) -> str:
        rest = self.inputs - self.kept
        how = "all kept in memory" if not rest else (f"{self.kept / 1e6:,.0f} MB kept in memory, the rest read from its files "
                                                     "each time")
        return (f"model {self.model / 1e6:,.0f} MB, inputs {self.inputs / 1e6:,.0f} MB ({how}), allowed "
                f"{self.allowed / 1e6:,.0f} MB")


def needs_of(merge: Merge, dtype: str, memory: int) -> Needs:
    """Raises RecipeError where not even the model fits."""
    item = 2 if dtype == "bfloat16" else 4
    needs = Needs(merge.plan.parameters * item, size_of(merge), memory - occupied())
    if needs.allowed < needs.model + WORKING:
        cure = " or `data.dtype: bfloat16`, which halves the model" if item == 4 else ""
        raise RecipeError(f"--memory {memory / 1e6:,.0f}MB is too little: the loaded model takes {needs.model / 1e6:,.0f} MB, "
                          f"scoring some {WORKING / 1e6:,.0f} MB, and {occupied() / 1e6:,.0f} MB are taken. Give --memory "
                          f"{(needs.model + WORKING + occupied()) / 1e6 + 1:,.0f}MB or more{cure}.")
    return needs


@dataclass
class LoadedMerge:
    """One transformers model, and how candidates get into it. `direct`: without files."""

    workshop: Workshop
    model: Any
    tokenizer: Any
    dtype: str
    scratch: Path
    targets: dict[str, Tensor] | None

    @property
    def direct(self) -> bool:
        return self.targets is not None

    def become(self, mapping: Mapping[str, Any]) -> Any:
        """The model as `mapping` merges it. Raises AnabranchError, and ModelError where it has other tensors than the first
        candidate."""
        if self.targets is None:
            self.model = None  # its memory first
            self.model = _through_files(self.workshop, mapping, self.dtype, self.scratch)
            return self.model
        seen: set[str] = set()
        targets = self.targets

        def take(name: str, tensor: Tensor) -> None:
            target = targets.get(name)
            if target is None or target.shape != tensor.shape:
                raise ModelError(f"tensor '{name}' {tuple(tensor.shape)}: the first candidate had "
                                 f"{'none of that name' if target is None else tuple(target.shape)}. All candidates must be "
                                 "of one shape: the same layers, the same tokenizer.")
            with torch.no_grad():
                target.copy_(tensor)
            seen.add(name)

        self.workshop.merged(mapping, take)
        if missing := targets.keys() - seen:
            raise ModelError(f"{len(missing)} tensors of the first candidate are not in this one (such as "
                             f"'{min(missing)}'). All candidates must be of one shape.")
        return self.model


def load_merge(workshop: Workshop, mapping: Mapping[str, Any], dtype: str, scratch: Path) -> LoadedMerge:
    """The model of a first candidate, written once and loaded, and its tensors matched with the model's parameters.

    Args:
        dtype: of the loaded model.
        scratch: an existing folder with room for one model.
    """
    model, tokenizer = None, None
    with _temporary(scratch) as place:
        merge_config(_absolute(mapping, workshop), place / "first", options=workshop.options, settings=workshop.settings)
        tokenizer = load_tokenizer(place / "first")
        model = _loaded(place / "first", dtype)
    state = model.state_dict()
    in_files = {file: state[name] for name, files in saved_names(model).items() for file in files if name in state} | state
    targets: dict[str, Tensor] = {}
    fits = True

    def take(name: str, tensor: Tensor) -> None:
        nonlocal fits
        target = in_files.get(name)
        if target is None or target.shape != tensor.shape or not torch.equal(target.cpu(), tensor.to(target.dtype)):
            fits = False
        else:
            targets[name] = target

    workshop.merged(mapping, take)
    reached = {t.data_ptr() for t in targets.values()}
    fits = fits and all(t.data_ptr() in reached for t in state.values() if t.is_floating_point() and t.numel())
    return LoadedMerge(workshop, model, tokenizer, dtype, scratch, targets if fits else None)


def _through_files(workshop: Workshop, mapping: Mapping[str, Any], dtype: str, scratch: Path) -> Any:
    with _temporary(scratch) as place:
        merge_config(_absolute(mapping, workshop), place / "candidate", options=workshop.options, settings=workshop.settings)
        return _loaded(place / "candidate", dtype)


def _loaded(folder: Path, dtype: str) -> Any:
    """A model of a folder that is soon gone: its processor is read while it is there."""
    model = load_model(folder, dtype)
    if any((folder / name).is_file() for name in PROCESSOR):
        vision_of(model)
    return model


@contextmanager
def _temporary(scratch: Path) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=SCRATCH) as place:
            yield Path(place)
    except OSError as error:
        raise OutputError(f"{scratch}: a candidate cannot be written there ({error.strerror or error}).") from error


def _absolute(mapping: Mapping[str, Any], workshop: Workshop) -> dict[str, Any]:
    return absolute(mapping, workshop.folders)


def absolute(value: Any, folders: tuple[Path, ...]) -> Any:
    """A merge config that can stand in any folder: models that are folders here by their absolute paths."""
    def place(model: Any) -> Any:
        if isinstance(model, str):
            if (whole := local(model, folders)) is not None:
                return whole
            head, plus, adapter = model.partition("+")
            if plus:
                return f"{local(head, folders) or head}+{local(adapter, folders) or adapter}"
            return model
        if isinstance(model, Mapping):
            return {key: place(inner) if key in ("model", "lora", "path") else inner for key, inner in model.items()}
        return model

    def named(key: Any, inner: Any) -> bool:
        words = inner in ("union", "base") and key in ("source", "tokenizer_source")
        return key in ("model", "base_model", "source", "tokenizer_source", "fisher") and not words

    if isinstance(value, Mapping):
        return {key: place(inner) if named(key, inner) else absolute(inner, folders) for key, inner in value.items()}
    return [absolute(inner, folders) for inner in value] if isinstance(value, list) else value
