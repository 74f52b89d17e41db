"""An adapter folded into its base for good: `anabranch lora apply`. Exact, float32, one tensor in memory, rounded once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anabranch.artifacts import MergeManifest
from anabranch.engine.adapter import CONFIG, MAGNITUDE, WEIGHTS, Adapter
from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.fetch import quantisation, resolve
from anabranch.engine.layout import set_dtype
from anabranch.engine.making import Made, Read, copied, forecast_made, make_model
from anabranch.engine.merging import place_for
from anabranch.engine.plan import DTYPES
from anabranch.engine.stream import Progress
from anabranch.errors import CorruptedError, ModelError, RecipeError, closest
from anabranch.surgery.side_files import GENERATION, carry_tokenizer

VERB = "lora apply"


@dataclass(frozen=True)
class Magnitudes:
    """DoRA: arXiv 2402.09353, eq. 5. W' = m (W + s B A) / ||W + s B A||, the norm and m of each output of the layer.

    keys   tensor of the base -> (the magnitudes' key in the adapter's file, whether outputs are columns)
    """

    keys: dict[str, tuple[str, bool]]
    read: Callable[[str], Tensor]

    def scaled(self, name: str, weight: Tensor) -> Tensor:
        """`weight` [out, ..] (or [in, out]) float32, with the length of each output's weights set to its magnitude."""
        key, columns = self.keys[name]
        flat = weight.flatten(1)
        m = self.read(key).float().flatten()
        lengths = torch.linalg.norm(flat, dim=0 if columns else 1)
        scale = m / lengths
        scaled: Tensor = flat * (scale if columns else scale[:, None])
        return scaled.reshape(weight.shape)


def apply(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    threads: int | None = None,
    memory: str | int | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> MergeManifest:
    """Write the model folder `out`: the base with the adapter folded in. It needs no PEFT to be loaded.

    LoRA, rsLoRA, DoRA, embeddings, convolutions, expert parameters, trained biases and tokens, `modules_to_save`: as
    PEFT's `merge_and_unload`, in float32 whatever the base is stored in. The tokenizer is the adapter's, if it brings one.

    Args:
        base, adapter: folders, or ids on the Hub.
        dtype: of the result: 'float32', 'bfloat16', 'float16'; None: each tensor's own in the base.
        warn: told what the user should know.
    Raises:
        ModelError: what cannot be folded, by name: a quantised base, an adapter that is no fixed change of weights.
        CorruptedError, OutputError, RecipeError: as `make_model`.
    """
    say, place = warn or (lambda _: None), place_for(out)
    made, files, inputs, settings = _planned(base, adapter, dtype, say)
    return make_model(place, made, files, inputs, verb=VERB, settings=settings, max_shard_size=max_shard_size,
                      threads=threads, memory=memory, allow_nonfinite=allow_nonfinite, progress=progress, warn=warn)


def forecast(base: Path | str, adapter: Path | str, out: Path | str, *, dtype: str | None = None,
             max_shard_size: str | int = "5GB", threads: int | None = None, memory: str | int | None = None,
             warn: Callable[[str], None] | None = None) -> list[str]:
    """What `apply` would do, in lines; raises as it does, and writes nothing."""
    made, files, inputs, _ = _planned(base, adapter, dtype, warn or (lambda _: None))
    return forecast_made(out, made, files, inputs, max_shard_size=max_shard_size, threads=threads, memory=memory)


def _planned(base: Path | str, adapter: Path | str, dtype: str | None, warn: Callable[[str], None],
             ) -> tuple[list[Made], dict[str, bytes | Path], list[Read], dict[str, str | None]]:
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"dtype: `{dtype}` is none that a model is stored in.{closest(dtype, DTYPES)}")
    checkpoint, folder = Checkpoint.open(resolve(base)), resolve(adapter)
    if packed := quantisation(checkpoint):
        raise ModelError(f"{base}: its weights are quantised ({packed}), and a sum with packed weights has no meaning. Give "
                         "the base as it was before it was quantised.")
    try:
        opened, magnitudes = _opened(folder, checkpoint)
    except ModelError as error:
        raise ModelError(advice_once(str(error))) from error
    for text in opened.warnings:
        warn(text)
    stored = DTYPES[dtype] if dtype else None
    made = [_folded(opened, magnitudes, name, stored) if opened.touches(name) else copied(checkpoint, name, dtype=stored)
            for name in checkpoint.tensors]
    files: dict[str, bytes | Path] = dict(carry_tokenizer(checkpoint.folder))
    if own := {name: file for name, file in carry_tokenizer(folder).items() if name != GENERATION}:
        files |= own
    if "auto_map" in checkpoint.config:  # the model's own code, copied and never run
        files |= {path.name: path for path in checkpoint.folder.glob("*.py")}
    config = set_dtype(checkpoint.config, dtype) if dtype else checkpoint.config
    files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    inputs = [Read(str(base), checkpoint),
              Read(str(adapter), Checkpoint.of_file(folder / WEIGHTS), companions=(folder / CONFIG,))]
    return made, files, inputs, {"dtype": dtype}


def advice_once(message: str) -> str:
    """A list of problems in which what several of them end with stands once, after them."""
    title, *lines = message.splitlines()
    ends = [[line[m.end():] for m in re.finditer(r"[:.] (?=\S)", line)] for line in lines]
    counts = Counter(end for some in ends for end in some)
    advice = dict[str, None]()
    for i, some in enumerate(ends):
        if (end := next((e for e in some if counts[e] > 1), None)) is not None:
            lines[i] = lines[i].removesuffix(end).rstrip(" :.")
            advice[end[0].upper() + end[1:]] = None
    return "\n".join([title, *lines, *advice])


def _folded(adapter: Adapter, magnitudes: Magnitudes | None, name: str, dtype: str | None) -> Made:
    info = adapter.base.tensors[name]

    def make() -> dict[str, Tensor]:
        weight = adapter.folded(name)
        return {name: magnitudes.scaled(name, weight) if magnitudes is not None and name in magnitudes.keys else weight}

    own = dtype if dtype is not None and info.dtype in MERGED else info.dtype
    extra = 4 * info.numel if magnitudes is not None else 0
    return Made({name: (info.shape, own)}, make, extra + (1 << 20))


def _opened(folder: Path, base: Checkpoint) -> tuple[Adapter, Magnitudes | None]:
    """The adapter; and its magnitudes where it is a DoRA."""
    try:
        dora = bool(json.loads((folder / CONFIG).read_text()).get("use_dora"))
    except (OSError, ValueError, AttributeError, RecursionError):
        dora = False  # opening it says what is wrong
    if not dora:
        return Adapter.open(folder, base), None
    plain = Adapter.open(folder, base, but_magnitudes=True)
    file = Checkpoint.of_file(folder / WEIGHTS)
    keys, problems = {}, []
    for name in plain.names:
        if (factors := plain.factor_keys(name)) is None:
            continue
        module = factors[0].partition(".lora_")[0]
        key = next((k for k in file.tensors if k.startswith(f"{module}.{MAGNITUDE}")), None)
        shape = base.tensors[name].shape
        outputs = shape[-1] if factors[1] else shape[0]
        if key is None:
            problems.append(f"'{name}' has factors, and no magnitudes ({module}.{MAGNITUDE})")
        elif file.tensors[key].numel != outputs:
            problems.append(f"'{key}' has {file.tensors[key].numel} numbers, and '{name}' {outputs} outputs")
        else:
            keys[name] = (key, factors[1])
    if problems:
        raise CorruptedError.of(f"adapter {folder}: is a DoRA, and its magnitudes do not fit:", problems[:20])
    return plain, Magnitudes(keys, file.read)
