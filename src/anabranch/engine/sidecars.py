"""Fisher information beside a model: one safetensors file, with a tensor of the same name and shape for each that is merged.

Its numbers are mean squared gradients: float32, float16 or bfloat16, finite and >= 0. Names, shapes and dtypes are checked
here; the numbers when they are read, by the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.wanted import Wanted

SHOWN = 3


def sidecar_problems(files: Mapping[int, Path], wanted: Sequence[Wanted], labels: Sequence[str],
                     inputs: Sequence[Checkpoint]) -> list[str]:
    """Why these files (by input) cannot serve the Fisher-weighted tensors among `wanted`; reads their headers."""
    problems = []
    for i, path in files.items():
        who = f"{path} (fisher of {labels[i]})"
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
                dtypes = {name: str(one.get_dtype()) for name, one in slices.items()}
        except Exception as error:  # safetensors raises its own type, the operating system another
            problems.append(f"{who}: cannot be read ({error})")
            continue
        names = [s.name for w in wanted if w.method == "fisher" for s in w.branches if s.input == i]
        lacking = [n for n in names if n not in shapes]
        if lacking:
            problems.append(f"{who}: has no {_some(lacking)}, which the model has")
        other = [n for n in names if n in shapes and shapes[n] != inputs[i].tensors[n].shape]
        if other:
            problems.append(f"{who}: another shape than the model's has {_some(other)}")
        unread = [n for n in names if n in shapes and dtypes[n] not in MERGED]
        if unread:
            problems.append(f"{who}: holds {', '.join(sorted({dtypes[n] for n in unread}))} in {_some(unread)}; wanted mean "
                            f"squared gradients, finite numbers >= 0, as {', '.join(MERGED)}. Save the file in one of these")
    return problems


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
