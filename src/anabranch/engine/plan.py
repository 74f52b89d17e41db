"""What a merge will write, settled before the first number is read: which tensors, in which order, at which byte.

Files are filled by name, numbers in names counting as numbers, so that the way in which the inputs are cut into files
shows nowhere. Inside a file the widest dtypes come first, as safetensors itself lays files out, so that every tensor
starts at a multiple of its item size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import ITEM_SIZES, STEMS, Checkpoint
from anabranch.engine.wanted import COPY, Wanted
from anabranch.errors import ModelError, RecipeError, ShapeMismatch

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SHOWN = 40


@dataclass(frozen=True)
class Step:
    """One tensor of the result. `start` and `stop` count bytes from the beginning of file number `shard`."""

    wanted: Wanted
    shard: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return self.wanted.name

    @property
    def merged(self) -> bool:
        """False for what is copied."""
        return self.wanted.method != COPY


@dataclass(frozen=True)
class Shard:
    """One file of the result: its header to the byte, its tensors in the order in which they stand, its size."""

    file: str
    header: bytes
    steps: tuple[Step, ...]
    size: int


@dataclass(frozen=True)
class OutputPlan:
    shards: tuple[Shard, ...]
    stem: str = STEMS[0]

    @property
    def steps(self) -> list[Step]:
        return [step for shard in self.shards for step in shard.steps]

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(step.wanted.numel for step in self.steps if step.wanted.dtype in MERGED)

    @property
    def index_file(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    @property
    def index(self) -> bytes | None:
        """The file that names each tensor's shard; none for a single file."""
        if len(self.shards) == 1:
            return None
        value = {"metadata": {"total_parameters": self.parameters,
                              "total_size": sum(step.stop - step.start for step in self.steps)},
                 "weight_map": {step.name: shard.file for shard in self.shards for step in shard.steps}}
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def label(k: int, branch: Checkpoint) -> str:
    return f"branch {k} ({branch.folder})"


def line_up(base: Checkpoint, branches: Sequence[Checkpoint]) -> list[str]:
    """The tensors of the result, in the base's order, after checking that all inputs have the same ones.

    An output head that some inputs hold and others leave to the tied embedding is left out, if every config.json
    ties the two and each copy is equal to its embedding.

    Raises:
        ShapeMismatch: every tensor that is missing, extra, or differs in shape or kind, in one message; also integer
            and boolean buffers that are not equal in all inputs.
        ModelError: a dtype that cannot be merged.
    """
    if "quantization_config" in base.config:
        raise ModelError(f"model folder {base.folder}: config.json has a `quantization_config`. Packed weights "
                             "cannot be averaged; load it dequantised and save that.")
    odd = [f"tensor '{name}' of {checkpoint.folder} is {info.dtype}" for checkpoint in (base, *branches)
           for name, info in checkpoint.tensors.items() if info.dtype not in ITEM_SIZES or info.dtype.startswith(("F64", "F8"))]
    if odd:
        raise ModelError.of("these dtypes cannot be merged; save the models in float32, bfloat16 or float16:",
                                _cut(odd))
    dropped, problems = _tied_heads(base, branches)
    names = [name for name in base.tensors if name not in dropped]
    for k, branch in enumerate(branches):
        for name in names:
            problems += _tensor_problems(name, base, branch, label(k, branch))
        problems += [f"tensor '{name}': {label(k, branch)} has it, the base has not"
                     for name in branch.tensors if name not in base.tensors and name not in dropped]
    if problems:
        raise ShapeMismatch.of(
            f"checkpoints that do not line up with the base {base.folder}:",
            [*_cut(problems), "Anabranch does not truncate, pad or guess: every branch must be trained from this base, "
                              "with its vocabulary and its tensors. Train the branch again, or give the base it has."])
    return names


def _tied_heads(base: Checkpoint, branches: Sequence[Checkpoint]) -> tuple[set[str], list[str]]:
    """(heads to leave out, problems) among the output heads that only some inputs hold."""
    inputs = {"the base": base} | {label(k, branch): branch for k, branch in enumerate(branches)}
    heads = sorted({n for c in inputs.values() for n in c.tensors if n.split(".")[-2:] == ["lm_head", "weight"]})
    dropped, problems = set(), []
    for head in heads:
        holders = {who: c for who, c in inputs.items() if head in c.tensors}
        if len(holders) == len(inputs) or not all(c.ties_embeddings for c in inputs.values()):
            continue  # nothing to drop: an ordinary tensor, present or missing
        dropped.add(head)
        problems += [f"tensor '{head}': {who} has one that differs from its input embedding, though config.json ties "
                     "them (`tie_word_embeddings`), and other inputs have none" for who, c in holders.items()
                     if c.tied_copy_of(head) is None]
    return dropped, problems


def _tensor_problems(name: str, base: Checkpoint, branch: Checkpoint, who: str) -> list[str]:
    wanted, got = base.tensors[name], branch.tensors.get(name)
    if got is None:
        return [f"tensor '{name}': the base has it, {who} has not"]
    if got.shape != wanted.shape:
        return [f"tensor '{name}': {who} has shape {got.shape}, the base has {wanted.shape}"]
    if wanted.dtype in MERGED and got.dtype in MERGED:
        return []
    if got.dtype != wanted.dtype:
        return [f"tensor '{name}': {who} has dtype {got.dtype}, the base has {wanted.dtype}"]
    if not branch.read(name).equal(base.read(name)):
        return [f"tensor '{name}': a {wanted.dtype} buffer, and {who} has other numbers in it than the base; "
                "only equal ones can be kept"]
    return []


def _cut(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN
    return [*problems[:SHOWN], f".. and {more} more like these"] if more > 0 else problems


def lay_out(wanted: Sequence[Wanted], max_shard_size: int, stem: str = STEMS[0]) -> OutputPlan:
    """Give each tensor its file and place; files hold at most `max_shard_size` bytes of tensors, or one larger tensor.

    The order given does not matter. `stem` is what the files are called: 'model', or 'diffusion_pytorch_model'.
    """
    groups: list[list[Wanted]] = [[]]
    filled = 0
    for tensor in sorted(wanted, key=lambda t: natural(t.name)):
        size = tensor.numel * ITEM_SIZES[tensor.dtype]
        if groups[-1] and filled + size > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return OutputPlan(tuple(_shard(i, _file_name(stem, i, len(groups)), group) for i, group in enumerate(groups)), stem)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key: 'layers.2.' before 'layers.10.'."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _file_name(stem: str, i: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"


def _shard(number: int, file: str, group: list[Wanted]) -> Shard:
    placed = []
    end = 0
    for tensor in sorted(group, key=lambda t: (-ITEM_SIZES[t.dtype], t.name)):
        begin, end = end, end + tensor.numel * ITEM_SIZES[tensor.dtype]
        placed.append((tensor, begin, end))
    entries = {t.name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, stop]} for t, begin, stop in placed}
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    steps = tuple(Step(t, number, len(header) + begin, len(header) + stop) for t, begin, stop in placed)
    return Shard(file, header, steps, len(header) + end)


def parse_size(text: str | int, where: str = "merge.max_shard_size") -> int:
    """Bytes of '5GB' (10^9) or '2GiB' (2^30), or a number of bytes. Raises RecipeError that names `where` it stood."""
    if type(text) is int and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", str(text), flags=re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if size <= 0:
        raise RecipeError(f"{where}: got {text!r}, wanted a size above zero such as 5GB, 500MB or 2GiB")
    return size

