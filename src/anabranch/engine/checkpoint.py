"""A model folder in the Hugging Face layout, read one tensor at a time.

    config.json
    model.safetensors                           one file, or
    model.safetensors.index.json + shards       `weight_map`: tensor name -> shard
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor

from anabranch.artifacts import digest, file_digest
from anabranch.errors import CorruptedError, ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What the weights of a model are called: by transformers, and by diffusers.
STEMS = ("model", "diffusion_pytorch_model")
ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
              "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says about a tensor. `dtype` in safetensors' spelling: F32, BF16, I64, ..

    `offset`: of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes; 0 for a dtype that is not known."""
        return self.numel * ITEM_SIZES.get(self.dtype, 0)


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder. `tensors` stand in the order of the shards, then by name; no weight has been read yet."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    _files: dict[str, Any] = field(repr=False, compare=False)
    _descriptors: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, config_needed: bool = True) -> Checkpoint:
        """Read config.json and the headers of all weight files.

        Without a config.json, and if none is needed, `config` is empty.

        Raises:
            ModelError: no such folder, no config.json, no weights in safetensors.
            CorruptedError: a file that is damaged, cut short, or missing though the index names it.
        """
        files = weight_files(folder, config_needed=config_needed)
        config = _read_json(folder / "config.json") if config_needed or (folder / "config.json").is_file() else {}
        opened = {path.name: _open_weights(path) for path in files}
        tensors: dict[str, TensorInfo] = {}
        problems = []
        for file in opened:
            for name, info in sorted(_header_of(folder / file).items()):
                if name in tensors:
                    problems.append(f"tensor '{name}' stands in {tensors[name].file} and in {file}")
                tensors[name] = info
        index = folder / f"{_stem(folder)}.safetensors.index.json"
        if index.exists():
            problems += _index_problems(_weight_map(index), tensors)
        if problems:
            raise CorruptedError.of(f"{folder}: the weight files and their index do not agree. Fetch the model again:",
                                    problems)
        return cls(folder, config, tensors, opened)

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """A safetensors file that stands alone, without a config: a sidecar. Raises CorruptedError."""
        opened = _open_weights(path)  # first: it says what is wrong with a damaged file
        return cls(path.parent, {}, _header_of(path), {path.name: opened})

    def read(self, name: str) -> Tensor:
        """One tensor, as it stands in the file: a view of the mapped file, so copy it before changing it.

        Raises CorruptedError if it cannot be read.
        """
        file = self.tensors[name].file
        try:
            return self._files[file].get_tensor(name)
        except Exception as error:  # safetensors raises its own type, the operating system another
            raise CorruptedError(f"{self.folder / file}: tensor '{name}' cannot be read ({error}). "
                                 "Fetch or make this checkpoint again.") from error

    def read_bytes(self, name: str, start: int, into: np.ndarray) -> None:
        """Bytes of tensor `name` from byte `start` on, into an array: as many as it holds.

        Into memory that is used again and again: fresh pages cost more than the copy. Any thread may call it.
        Raises CorruptedError if they cannot be read.
        """
        info = self.tensors[name]
        file = self._descriptors.get(info.file)
        if file is None:  # another thread may be here too; one file stays, the other is closed before anybody reads it
            try:
                opened = open(self.folder / info.file, "rb", buffering=0)  # noqa: SIM115 - kept open
            except OSError as error:
                raise CorruptedError(f"{self.folder / info.file}: cannot be opened ({error.strerror}).") from error
            file = self._descriptors.setdefault(info.file, opened)
        handle, at, left = file.fileno(), info.offset + start, into.view(np.uint8).data
        while left:
            try:
                got = os.preadv(handle, [left], at)
            except OSError as error:
                raise CorruptedError(f"{self.folder / info.file}: tensor '{name}' cannot be read ({error}).") from error
            if not got:
                raise CorruptedError(f"{self.folder / info.file}: ends within tensor '{name}'; it was cut while it was read. "
                                     "Fetch or make this checkpoint again.")
            left, at = left[got:], at + got

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size for info in self.tensors.values())

    @property
    def stem(self) -> str:
        """What its weight files are called: 'model', or 'diffusion_pytorch_model'."""
        return _stem(self.folder)

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output head shares the input embedding's weights, as config.json says.

        Where it is silent they are tied: transformers 4 wrote the key only when it was false.
        """
        inner = self.config.get("text_config")
        default = inner.get("tie_word_embeddings", True) if isinstance(inner, dict) else True
        return bool(self.config.get("tie_word_embeddings", default))

    def tied_copy_of(self, name: str) -> str | None:
        """The embedding that output head `name` repeats number for number, if there is one."""
        head = self.tensors[name]
        for other, info in self.tensors.items():
            embedding = "emb" in other or "wte" in other
            alike = (info.shape, info.dtype) == (head.shape, head.dtype)
            if embedding and alike and self.read(other).equal(self.read(name)):
                return other
        return None


def weight_files(folder: Path, *, config_needed: bool = True) -> list[Path]:
    """The safetensors files that make up the model, by name; the index is not among them.

    Raises:
        ModelError: no such folder, no config.json, no weights in safetensors, or both a single file and an index.
        CorruptedError: the index is damaged, or names a shard that is not there.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder {folder}: not there. Give the folder that holds config.json and "
                         f"{WEIGHTS} (or its shards and their index).")
    weights, index_file = f"{_stem(folder)}.safetensors", folder / f"{_stem(folder)}.safetensors.index.json"
    single, index = (folder / weights).is_file(), index_file.is_file()
    if single and index:
        raise ModelError(f"model folder {folder}: holds both {weights} and {index_file.name}, and it is not clear which is the "
                         "model. Delete the one that is left over.")
    if not (single or index):
        raise ModelError(_no_weights(folder))
    if config_needed and not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder}: no config.json beside the weights, so nothing can load it. "
                         "Copy it from where the weights came from.")
    if single:
        return [folder / weights]
    shards = sorted(set(_weight_map(index_file).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CorruptedError.of(f"model folder {folder}: {index_file.name} names {len(shards)} shards and {len(missing)} of "
                                "them are not there. Fetch these files again:", missing)
    return [folder / shard for shard in shards]


def _stem(folder: Path) -> str:
    """What the folder's weight files are called."""
    return next((stem for stem in STEMS if any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))),
                STEMS[0])


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 (hex) over name and SHA-256 of each weight file and of config.json, sorted by name; of a vision-language model
    (a config with a `vision_config`) also of its processor's files, which decide what numbers it sees of an image.

    This is the hash by which a base is known in every artifact. Reads every byte once. Raises as `weight_files`.
    """
    files = [*weight_files(folder), config := folder / "config.json"]
    if b'"vision_config"' in config.read_bytes():
        files += [folder / name for name in PROCESSOR if (folder / name).is_file()]
    return digest(sorted([path.name, file_digest(path)] for path in files))


def _open_weights(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # SafetensorError for a bad header or size, OSError for a bad disk
        raise CorruptedError(f"{path}: damaged or cut short ({error}; the file has {path.stat().st_size:,} bytes). "
                             "Fetch or make this file again.") from error


def _header_of(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that safetensors has opened, and so has found sound."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: TensorInfo(tuple(entry["shape"]), entry["dtype"], path.name, 8 + size + entry["data_offsets"][0])
            for name, entry in header.items() if name != "__metadata__"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptedError(f"{path}: cannot be read as JSON ({error}). Fetch this file again.") from error
    if not isinstance(value, dict):
        raise CorruptedError(f"{path}: holds {type(value).__name__}, wanted an object. Fetch this file again.")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """`weight_map` of the index. A shard must be a plain file name: an index may not point out of its folder."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptedError(f"{index}: has no `weight_map`. Fetch this file again.")
    strange = sorted({str(f) for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f})
    if strange:
        raise CorruptedError.of(f"{index}: these are no names of files beside it:", strange)
    return weight_map


def _index_problems(weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
    problems = []
    for name in sorted(weight_map.keys() | tensors.keys()):
        said, found = weight_map.get(name), tensors[name].file if name in tensors else None
        if said != found:
            problems.append(f"tensor '{name}': the index says {said or 'nothing'}, it stands in {found or 'no file'}")
    return problems


def _no_weights(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(names[:12]) + (f", and {len(names) - 12} more" if len(names) > 12 else "")
    message = f"model folder without weights: {folder} has no {WEIGHTS} and no {INDEX}. It holds: {shown or 'nothing'}."
    if "adapter_config.json" in names:
        return message + (" This is an adapter, not a model: write BASE+ADAPTER in a merge, fold it in for good "
                          "(`anabranch lora apply BASE ADAPTER FOLDER`), or merge adapters with each other (`anabranch lora "
                          "merge`).")
    if any(name.endswith(PICKLES) for name in names):
        return message + (" Pickle files are refused, since loading one can run any program. Where you trust them, "
                          "`anabranch merge --allow-pickle` reads them (tensors only), or convert them once: "
                          "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)`.")
    return message + " Give the folder of a model saved with `save_pretrained`."
