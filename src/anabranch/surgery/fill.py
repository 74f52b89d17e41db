"""A whole model with the tensors of a partial one in their places: a vision-language model with a merged language model.

    BASE     every tensor and file of the result, but for the tensors that PARTIAL has
    PARTIAL  a folder of weights or a safetensors file: some of BASE's tensors, all of them behind one prefix that only one
             of the two has (`language_model.`, say)

The prefix is the one under which most of PARTIAL's names are BASE's. The peer (fill_missing_params; merge specification,
7.8) takes the first part of a name only, drops without a word what it cannot place, and writes tensors of other shapes
with a warning: here those are errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import Checkpoint, TensorInfo
from anabranch.engine.fetch import quantisation
from anabranch.engine.making import Made, Read, copied
from anabranch.errors import ModelError, ShapeMismatch
from anabranch.surgery.side_files import carry_tokenizer

SHOWN = 20
# Names of PARTIAL that are looked for in BASE to find the prefix.
SAMPLES = 16


def filled(base: Checkpoint, partial: Checkpoint, labels: tuple[str, str]) -> tuple[list[Made], dict[str, Path | bytes],
                                                                                  list[Read], list[str]]:
    """(the tensors, the files beside them, what is read, what the user should know). Reads no weight.

    A tensor of PARTIAL is rounded to the dtype that BASE has there.
    Raises:
        ShapeMismatch: PARTIAL's names are not BASE's under any prefix, or shapes or kinds differ; all in one message.
        ModelError: packed weights.
    """
    for checkpoint, label in zip((base, partial), labels, strict=True):
        if (how := quantisation(checkpoint)) is not None:
            raise ModelError(f"{label}: quantised ({how}). Load it dequantised, and save that.")
    places = placed(base.tensors, partial.tensors, labels)
    _check(base, partial, places, labels)
    made = [copied(partial, places[name], as_name=name, dtype=base.tensors[name].dtype) if name in places
            else copied(base, name) for name in base.tensors]
    files: dict[str, Path | bytes] = dict(carry_tokenizer(base.folder)) | {"config.json": base.folder / "config.json"}
    if "auto_map" in base.config:  # the model's own code, copied and never run
        files |= {path.name: path for path in base.folder.glob("*.py")}
    rounded = [name for name, theirs in places.items() if partial.tensors[theirs].dtype != base.tensors[name].dtype]
    told = [f"{len(places)} of {len(base.tensors)} tensors come from {labels[1]}, the others from {labels[0]}"]
    if rounded:
        told.append(f"{len(rounded)} tensors of {labels[1]} are rounded to the dtype that {labels[0]} has there, such as "
                    f"'{rounded[0]}' to {base.tensors[rounded[0]].dtype}")
    reads = [Read(labels[0], base, [name for name in base.tensors if name not in places]), Read(labels[1], partial)]
    return made, files, reads, told


def placed(base: Mapping[str, TensorInfo], partial: Mapping[str, TensorInfo], labels: tuple[str, str]) -> dict[str, str]:
    """Name in BASE -> name in PARTIAL. Raises ShapeMismatch where a name of PARTIAL has no place, or could have two."""
    most, best, plain = 0, list[dict[str, str]](), False
    for number, candidate in enumerate(_candidates(base, partial)):  # thousands, for a name such as `weight`
        count = sum(name in base for name in candidate)
        if count > most:
            most, best, plain = count, [candidate], number == 0
        elif count == most and count:
            best.append(candidate)
    if not most and (lost := _strangers(base, partial)):
        raise _no_place(lost, len(partial), labels)
    if not most:
        raise ShapeMismatch(f"{labels[1]}: none of its {len(partial)} tensors is one of {labels[0]}, with or without a prefix "
                            f"(such as '{next(iter(partial), '')}' beside '{next(iter(base), '')}').")
    if len(best) > 1 and not plain:  # two towers with the same names: the shapes tell
        fitting = [c for c in best if all(base[n].shape == partial[theirs].shape for n, theirs in c.items() if n in base)]
        best = fitting or best
        if len(best) > 1:
            raise ShapeMismatch.of(f"{labels[1]} could be one of several parts of {labels[0]}, and its names do not say which. "
                                   "Rename its tensors; the first could be:", _cut([next(iter(c)) for c in best]))
    if lost := [theirs for name, theirs in best[0].items() if name not in base]:
        raise _no_place(lost, len(partial), labels)
    return best[0]


def _no_place(lost: list[str], count: int, labels: tuple[str, str]) -> Exception:
    return ShapeMismatch.of(f"{labels[1]} holds tensors that {labels[0]} has no place for, so it is no part of it "
                            f"({count - len(lost)} others have one). Take them out, or give the model that has them:",
                            _cut([f"tensor '{name}'" for name in lost]))


def _strangers(base: Iterable[str], partial: Iterable[str]) -> list[str]:
    """Names of PARTIAL without a place in BASE, under the prefix of PARTIAL's by which most have one; none if none has."""
    names, theirs = set(base), list(partial)
    ends = {t: [t[i + 1 :] for i, letter in enumerate(t) if letter == "."] for t in theirs}
    counts = Counter(t.removesuffix(end) for t in theirs for end in ends[t] if end in names)
    if not counts:
        return []
    prefix = max(sorted(counts), key=lambda p: counts[p])
    return [t for t in theirs if not (t.startswith(prefix) and t.removeprefix(prefix) in names)]


def _candidates(base: Iterable[str], partial: Iterable[str]) -> Iterator[dict[str, str]]:
    """Ways to place PARTIAL's names, as they are first; a prefix must fit one of a few of them."""
    names, theirs = list(base), list(partial)
    yield {name: name for name in theirs}
    samples = theirs[:: max(1, len(theirs) // SAMPLES)]
    for prefix in sorted({n.removesuffix(t) for t in samples for n in names if n.endswith(f".{t}")}):
        yield {prefix + name: name for name in theirs}
    for prefix in sorted({t.removesuffix(n) for t in samples for n in names if t.endswith(f".{n}")}):
        if all(name.startswith(prefix) for name in theirs):
            yield {name.removeprefix(prefix): name for name in theirs}


def _check(base: Checkpoint, partial: Checkpoint, places: Mapping[str, str], labels: tuple[str, str]) -> None:
    problems = []
    for name, theirs in places.items():
        wanted, got = base.tensors[name], partial.tensors[theirs]
        if wanted.shape != got.shape:
            problems.append(f"tensor '{name}': {labels[1]} has shape {list(got.shape)}, {labels[0]} has {list(wanted.shape)}")
        elif wanted.dtype != got.dtype and not (wanted.dtype in MERGED and got.dtype in MERGED):
            problems.append(f"tensor '{name}': {labels[1]} has {got.dtype}, {labels[0]} has {wanted.dtype}")
    if problems:
        raise ShapeMismatch.of(f"{labels[1]} does not fit into {labels[0]}; nothing is truncated or padded:", _cut(problems))


def _cut(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN
    return [*problems[:SHOWN], *([f".. and {more} more like these"] if more > 0 else [])]
