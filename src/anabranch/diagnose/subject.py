"""What is diagnosed: models by label, rows to judge them on, and one model in memory that becomes any of them.

No checkpoint is written for a point between models: the one live model's parameters are replaced in place, tensor by
tensor, by the merge engine's own maths. Memory: one model in float32, and CHUNK numbers of each model that is mixed
(`perturbation` holds its noise besides, one model more). Where transformers joins tensors when it loads, as for mixtures of
experts, every model is held in memory.

A pass is one forward pass over one batch; a backward pass counts as two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from anabranch.artifacts import Plan, digest
from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import ModelError, ShapeMismatch
from anabranch.families import saved_names
from anabranch.merge.averaging import linear
from anabranch.model import Batch, can_select, check_vocabulary, device, load_model, padded, response_losses
from anabranch.rows import Rows, generator
from anabranch.run import Run

CHUNK = 1 << 24  # numbers of one tensor that are mixed at a time
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tensors of old checkpoints that are no parameters.
BUFFERS = ("inv_freq", "attn.bias", "masked_bias", "position_ids")
# Keys of a config that do not change what a forward pass in evaluation mode computes.
NEUTRAL = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache",
           "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "hidden_dropout",
           "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "max_position_embeddings", "id2label", "label2id",
           "problem_type", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
           "max_window_layers", "task_specific_params", "pretraining_tp", "_attn_implementation_autoset"}
BASE, MERGED, JOINT, MIXTURE, TRAINING = "base", "merged", "joint", "mixture", "training"


class NotApplicable(Exception):
    """A diagnostic lacks what it needs; the message says what. Not an error: the others go on."""


@dataclass(frozen=True)
class Settings:
    """What decides the figures. `rows`: most rows of a probe; `batch_rows`: rows of a batch, and of a block."""

    points: int = 21
    seed: int = 0
    rows: int = 256
    batch_rows: int = 8
    grid: int = 15
    draws: int = 5
    sigmas_isotropic: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.05)
    sigmas_filter: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    steps: int = 50
    top: int = 10
    axes: int = 3
    representatives: int = 4
    sizes: tuple[int, ...] = (25, 50, 100, 150, 200, 300, 400, 500, 700, 1000)
    wanted_reliability: float = 0.9


@dataclass(frozen=True)
class Probe:
    """Rows that a loss is taken on.

    `batches` are what goes through the model together: rows of like length, so that little is padding. `blocks` says of
    each batch to which block of rows each of its rows belongs; blocks are drawn at random, so they are exchangeable and
    are what intervals resample. Without it each batch is a block.
    """

    name: str
    batches: tuple[Batch, ...]
    hash: str
    blocks: tuple[np.ndarray, ...] = ()

    @property
    def rows(self) -> int:
        return sum(len(batch.rows) for batch in self.batches)

    @property
    def block_count(self) -> int:
        return 1 + max(int(b.max()) for b in self.blocks) if self.blocks else len(self.batches)


def make_probe(name: str, units: Mapping[str, Rows], settings: Settings) -> Probe:
    """At most `settings.rows` rows, as evenly from the units as they allow, drawn and ordered by seed and unit name."""
    kept: dict[str, np.ndarray] = {u: generator(settings.seed, "probe", name, u).permutation(len(r)) for u, r in units.items()}
    while sum(map(len, kept.values())) > settings.rows and max(map(len, kept.values())) > 1:
        longest = max(map(len, kept.values()))
        kept = {u: order[: max(1, longest - 1)] for u, order in kept.items()}
    if sum(map(len, kept.values())) > settings.rows:  # more units than rows: one row of some of them
        order = generator(settings.seed, "probe", name).permutation(len(kept))[: settings.rows]
        kept = {u: kept[u] for u in np.array(list(kept))[np.sort(order)].tolist()}
    rows = Rows.joined([units[u].take(order) for u, order in kept.items()])
    block = generator(settings.seed, "probe blocks", name).permutation(len(rows)) // settings.batch_rows
    by_length = np.argsort(rows.lengths, kind="stable")
    chosen = [by_length[i : i + settings.batch_rows] for i in range(0, len(rows), settings.batch_rows)]
    images = rows.hash_of_images() if rows.images is not None else b""
    content = hashlib.sha256(rows.input_ids.tobytes() + rows.response.tobytes() + rows.offsets.tobytes() + images).hexdigest()
    return Probe(name, tuple(padded(rows, c, device()) for c in chosen), digest([content, settings.batch_rows, settings.seed]),
                 tuple(block[c] for c in chosen))


class Weights:
    """A model's tensors by the live model's own parameter names, float32, read when asked for.

    Straight from the files, under those names or under the ones that transformers gives them there (`model.visual.*` is
    `visual.*` in files of Qwen2-VL). Where it joins tensors when it loads (mixtures of experts), or the files are older than
    its names, the model is loaded once and kept in memory: slower, and always right.

    Args:
        saved: parameter -> its names in files (families.saved_names); {}: the same.
    """

    def __init__(self, label: str, folder: Path, shapes: Mapping[str, torch.Size], *,
                 saved: Mapping[str, tuple[str, ...]] | None = None, trust_remote_code: bool = False) -> None:
        self.label, self.folder = label, folder
        self._files = Checkpoint.open(folder)
        self._loaded: dict[str, Tensor] = {}
        self._saved = saved or {}
        self._names = {n: self._in_files(n) for n in shapes}
        if strange := sorted({self._files.tensors[f].dtype for f in self._names.values() if f in self._files.tensors}
                             - FLOATS.keys()):
            raise ModelError(f"{folder}: its weights are stored as {', '.join(strange)}: quantised models have no numbers to "
                             "compare. Give the model as it was before, or dequantised.")
        if not self._is_direct(shapes):
            model = load_model(folder, "float32", trust_remote_code=trust_remote_code).cpu()
            self._loaded = {n: p.detach() for n, p in model.named_parameters()}
            self._check(shapes)

    def _in_files(self, name: str) -> str:
        """What a parameter is called in these files: as in memory, or as transformers saves it."""
        if name in self._files.tensors:
            return name
        return next((n for n in self._saved.get(name, ()) if n in self._files.tensors), name)

    def _is_direct(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Every parameter under a name of its own, and nothing else, but for an output head that repeats an embedding."""
        found, names = self._files.tensors, self._names
        if not all(names[n] in found and found[names[n]].shape == tuple(s) for n, s in shapes.items()):
            return False
        others = [n for n in found if n not in names.values() and not n.endswith(BUFFERS)]
        return len(set(names.values())) == len(names) and all(self._files.tied_copy_of(n) for n in others)

    @property
    def rounding(self) -> float:
        """Relative spacing of numbers in the coarsest float dtype of its files."""
        return max(torch.finfo(FLOATS[i.dtype]).eps for i in self._files.tensors.values() if i.dtype in FLOATS)

    def _check(self, shapes: Mapping[str, torch.Size]) -> None:
        problems = [f"parameter '{n}': the base has {tuple(shapes[n]) if n in shapes else 'none'}, {self.label} "
                    f"{tuple(self._loaded[n].shape) if n in self._loaded else 'none'}"
                    for n in sorted(shapes.keys() | self._loaded.keys())
                    if n not in shapes or n not in self._loaded or self._loaded[n].shape != shapes[n]]
        if problems:
            more = [f".. and {len(problems) - 8} more"] if len(problems) > 8 else []
            raise ShapeMismatch.of(
                f"{self.folder}: its parameters do not line up with the base's, so nothing lies between them. Give models "
                "trained from this base (of adapters: merge them into it first; resized vocabularies: `anabranch merge` "
                "with a `tokenizer` section):", problems[:8] + more)

    def read(self, name: str) -> Tensor:
        """Parameter `name`, in its stored dtype, on the CPU: a view, do not change it."""
        return self._loaded[name] if self._loaded else self._files.read(self._names[name])


@dataclass
class Live:
    """One model in memory, in evaluation mode and float32, whose parameters are replaced in place."""

    model: Any
    weights: dict[str, Weights]
    trainable: tuple[str, ...]
    passes: float = 0.0
    parameters: dict[str, nn.Parameter] = field(init=False)
    select: bool = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = dict(self.model.named_parameters())
        self.select = can_select(self.model)

    def read(self, label: str, name: str) -> Tensor:
        """float32 CPU copy of a model's parameter."""
        return self.weights[label].read(name).to(torch.float32, copy=True)

    @torch.no_grad()
    def put(self, mix: Mapping[str, float]) -> None:
        """parameters = sum over labels of coefficient x model, by the engine's `linear` without normalisation, float32."""
        terms = {label: c for label, c in mix.items() if c != 0.0}
        shares = torch.tensor(list(terms.values()), dtype=torch.float64)
        for name, parameter in self.parameters.items():
            sources = [self.weights[label].read(name).reshape(-1) for label in terms]
            target = parameter.data.reshape(-1)
            for start in range(0, target.numel(), CHUNK):
                pieces = [s[start : start + CHUNK].float() for s in sources]
                whole = len(pieces) == 1 and float(shares[0]) == 1.0
                target[start : start + CHUNK].copy_(
                    pieces[0] if whole else linear(torch.stack(pieces), shares.float(), normalize=False))

    @torch.no_grad()
    def losses(self, probe: Probe) -> Float[np.ndarray, "blocks 2"]:
        """(sum of nats over response tokens, number of response tokens) of each block of rows, float64."""
        found = np.zeros((probe.block_count, 2))
        for i, batch in enumerate(probe.batches):
            losses, _ = response_losses(self.model, batch, select=self.select)
            row = batch.response[:, 1:].nonzero()[:, 0].cpu().numpy()  # the row of each response token, in their order
            block = probe.blocks[i][row] if probe.blocks else np.full(len(row), i)
            if not torch.isfinite(losses).all():
                raise NotApplicable("the loss of a model, or of a point between models, is not finite on these rows")
            np.add.at(found, block, np.stack([losses.double().cpu().numpy(), np.ones(len(row))], axis=1))
            self.passes += 1
        return found

    def mean_loss(self, probe: Probe) -> float:
        """Nats per response token."""
        total, tokens = self.losses(probe).sum(0)
        return float(total / tokens)

    def gradient(self, probe: Probe) -> dict[str, Tensor]:
        """Gradient of the mean loss with respect to the trainable parameters; 3 passes a batch."""
        wanted = [self.parameters[n] for n in self.trainable]
        for parameter in wanted:
            parameter.requires_grad_(True)
        tokens = sum(int(b.response[:, 1:].sum()) for b in probe.batches)
        total = [torch.zeros_like(p) for p in wanted]
        for batch in probe.batches:
            losses, _ = response_losses(self.model, batch, select=self.select)
            for sum_, piece in zip(total, torch.autograd.grad(losses.sum() / tokens, wanted), strict=True):
                sum_.add_(piece)
            self.passes += 3
        return dict(zip(self.trainable, total, strict=True))


def joined_probe(name: str, parts: Sequence[Probe]) -> Probe:
    """All batches and blocks of several probes, in their order."""
    before = np.concatenate([[0], np.cumsum([p.block_count for p in parts])])
    blocks = tuple(block + int(start) for p, start in zip(parts, before, strict=False) for block in p.blocks)
    return Probe(name, tuple(b for p in parts for b in p.batches), digest([p.hash for p in parts]), blocks)


@dataclass
class Subject:
    """Models, rows and a live model. `labels`: base, branch-0 .., merged, joint, as far as they are there."""

    live: Live
    labels: list[str]
    branches: list[str]
    weights: list[float]
    probes: dict[str, Probe]
    hashes: dict[str, str]
    run: Run | None = None
    plan: Plan | None = None
    epochs: dict[str, float] = field(default_factory=dict)
    tell: Callable[[str, int, int], None] = lambda *_: None


def live_model(folders: Mapping[str, Path], *, trainable: Callable[[Any], Sequence[str]],
               trust_remote_code: bool = False) -> Live:
    """The base in memory, and every model's files behind it.

    Args:
        folders: label -> model folder; `base` first.
        trainable: names of the parameters that training may have moved, of a loaded model.
    Raises:
        ModelError, ShapeMismatch.
    """
    _check_configs(folders, trust_remote_code=trust_remote_code)
    model = load_model(folders[BASE], "float32", trust_remote_code=trust_remote_code)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    weights, problems, saved = {}, [], saved_names(model)
    for label, folder in folders.items():
        try:
            weights[label] = Weights(label, folder, shapes, saved=saved, trust_remote_code=trust_remote_code)
        except (ModelError, ShapeMismatch) as error:
            problems.append(f"{label}: {error}")
    if problems:
        raise ModelError.of("these models cannot be compared:", problems)
    return Live(model, weights, tuple(trainable(model)))


def _check_configs(folders: Mapping[str, Path], *, trust_remote_code: bool) -> None:
    """All models run under the base's config, so none may have another. Raises ShapeMismatch naming every difference."""
    from transformers import AutoConfig

    def config_of(folder: Path) -> dict[str, Any]:
        try:
            found = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever transformers raises, the file is the cause
            raise ModelError(f"{folder / 'config.json'}: transformers cannot read it ({str(error)[:200]}).") from error
        return dict(_telling(found.to_dict()))

    base, problems = config_of(folders[BASE]), []
    for label, folder in folders.items():
        other = config_of(folder)
        problems += [f"{label}: {key} is {other.get(key)!r}, the base's is {base.get(key)!r}"
                     for key in sorted(base.keys() | other.keys()) if base.get(key) != other.get(key)]
    if problems:
        raise ShapeMismatch.of("config.json: these models do not compute the same function of their weights, so nothing lies "
                               "between them. Give models trained from this base:", problems[:12])


def _telling(config: Any) -> Any:
    """A config without what does not change a forward pass, also of its parts (`text_config`)."""
    return {k: _telling(v) for k, v in config.items() if k not in NEUTRAL} if isinstance(config, dict) else config


def check_finite(live: Live) -> None:
    """Raises ModelError naming every model that holds NaN or infinity: no verdict on it would mean anything."""
    problems = []
    for label, weights in live.weights.items():
        bad = [name for name in live.parameters if not torch.isfinite(weights.read(name)).all()]
        if bad:
            problems.append(f"{label} ({weights.folder}): {len(bad)} parameters, '{bad[0]}' the first")
    if problems:
        raise ModelError.of("models with NaN or infinity in their weights; make or fetch them again:", problems)


def check_probes(probes: Mapping[str, Probe], model: Any) -> None:
    """Raises ModelError where a token has no embedding."""
    for probe in probes.values():
        for batch in probe.batches:
            check_vocabulary(int(batch.input_ids.max()), model)
