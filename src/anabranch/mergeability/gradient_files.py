"""Gradients on disk, and the inner products of many of them in bounded memory.

    n  models      P  numbers of a gradient with respect to the parameters      m  a calibration row

One safetensors file per model:
    offsets     int64 [rows+1]   where each row's numbers begin in `inputs`
    loss        float64 [2]      mean loss per item, and items
    parameters  float32 [P]      every parameter's gradient, flattened, in the order of the module's named_parameters
    inputs      float32 [..]     rows' gradients with respect to their inputs, flattened, one after the other
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import CorruptedError, OutputError
from anabranch.mergeability.observation import Gradients

BLOCK = 1 << 22  # numbers held at a time, over all models: 50 MB as float32 and float64
DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.int64): "I64"}


def save_gradients(path: Path, found: Gradients) -> None:
    """Write one model's file whole or not at all, a parameter at a time. Raises OutputError."""
    inputs = found.inputs if found.inputs is not None else []
    offsets = np.concatenate([[0], np.cumsum([row.numel() for row in inputs])]).astype(np.int64)
    parts: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "offsets": (offsets.dtype, offsets.shape), "loss": (np.dtype(np.float64), (2,)),
        "parameters": (np.dtype(np.float32), (sum(g.numel() for g in found.parameters.values()),)),
        "inputs": (np.dtype(np.float32), (int(offsets[-1]),))}
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in parts.items():
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + dtype.itemsize * shape[0]]}
        at += dtype.itemsize * shape[0]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(offsets.tobytes() + np.array([found.loss, found.items], np.float64).tobytes())
            for gradient in (*found.parameters.values(), *inputs):
                file.write(gradient.detach().to("cpu", torch.float32).contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write a gradient of {at:,} bytes to {path.parent}: {error.strerror or error}. Free space, "
                          "choose another output, or measure without gradients (--only); finished models are kept.") from error


def is_whole(path: Path) -> bool:
    """Whether a gradient file is there and not cut short."""
    try:
        return path.exists() and {"parameters", "inputs", "offsets", "loss"} <= Checkpoint.of_file(path).tensors.keys()
    except CorruptedError:  # written by a machine that lost power: made again
        return False


def parameter_products(paths: Sequence[Path]) -> Float[np.ndarray, "n n"]:
    """Inner products of the models' parameter gradients, float64. Raises CorruptedError."""
    files = [Checkpoint.of_file(path) for path in paths]
    size, step = files[0].tensors["parameters"].numel, max(1, BLOCK // len(files))
    total = np.zeros((len(files), len(files)))
    block = np.empty((len(files), min(step, size)), np.float32)
    for start in range(0, size, step):
        piece = np.ascontiguousarray(block[:, : min(step, size - start)])
        for row, file in zip(piece, files, strict=True):
            file.read_bytes("parameters", 4 * start, row)
        total += _products(piece)
    return total


def input_products(paths: Sequence[Path]) -> Float[np.ndarray, "n n"]:
    """Inner products of the models' concatenated input gradients, float64: row m of one with row m of the other.

    Shorter rows count as filled up with zeros, and models with fewer rows as having rows of zeros.
    """
    files = [Checkpoint.of_file(path) for path in paths]
    offsets = [file.read("offsets").numpy() for file in files]
    total = np.zeros((len(files), len(files)))
    for m in range(max(len(o) - 1 for o in offsets)):
        spans = [(int(o[m]), int(o[m + 1])) if m + 1 < len(o) else (0, 0) for o in offsets]
        width, step = max(stop - start for start, stop in spans), max(1, BLOCK // len(files))
        for begin in range(0, width, step):
            piece = np.zeros((len(files), min(step, width - begin)), np.float32)
            for row, file, (start, stop) in zip(piece, files, spans, strict=True):
                there = min(stop - start - begin, len(row))
                if there > 0:
                    file.read_bytes("inputs", 4 * (start + begin), row[:there])
            total += _products(piece)
    return total


def _products(piece: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "n n"]:
    wide = torch.from_numpy(piece).double()
    return (wide @ wide.T).numpy()
