"""What models do with rows: activations, gradients and scores of language models, and the pair metrics made of them.

    n  models      T  tasks, one model each      D  width of the residual stream      P  trainable parameters

Every model reads the same calibration rows of all tasks (one forward pass each, no labels needed): the mean output of its
last residual block, before the final norm, over the tokens of a row and then over rows; and, where rows have responses, its
loss on every task. Then each model takes the gradient of the mean loss per response token on its own task's rows, which is
the loss that it was trained on and the one behind its score; with respect to all its parameters (the output head among them,
tied weights once), and to its input embeddings.

Where we differ from arXiv:2601.22285 (its code, as far as it could be read): the real loss in place of a random head drawn
anew for every metric; the mean over tokens in place of a sum of batch means over the number of rows, which weighs a short
last batch up; head included, because a language model tunes it; one vector and one gradient per model, not per pair; inner
products accumulated in float64. Input gradients are compared as there, row m of one task with row m of the other, filled up
with zeros; rows of different tasks have nothing to do with each other, so the direction says little, and the distance is
mostly the two lengths.

Calibration rows should not be those that merges are scored on (`calibration_rows`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from anabranch.artifacts import digest, write_atomically
from anabranch.diagnose.subject import BASE, Live, NotApplicable, live_model
from anabranch.engine.checkpoint import checkpoint_hash
from anabranch.errors import ModelError
from anabranch.mergeability.gradient_files import input_products, is_whole, parameter_products, save_gradients
from anabranch.mergeability.metrics import activation_metrics, cosine, gradient_metrics
from anabranch.mergeability.observation import Gradients, Loss, activation_mean, gradients
from anabranch.model import Batch, batches, check_vocabulary, model_inputs, response_losses
from anabranch.rows import Rows

ACTIVATIONS, GRADIENTS, SCORES = "activations", "gradients", "scores"
PARTS = (ACTIVATIONS, GRADIENTS, SCORES)
BATCH_TOKENS = 4096  # padded tokens of a batch; decides rounding, and the memory of a backward pass
MAKING = 1  # raised when the same inputs would give other numbers, so that what a journal holds is made again


@dataclass
class DataMetrics:
    """What was measured on rows.

    Attributes:
        pairs: (task, task) in the order of the models -> metric -> value.
        single, base: task -> exp(-mean loss per response token) of its own model, of the base.
        cross: model (or 'base') -> task -> the same of that model on that task's rows.
        left_out: 'activations' or 'input gradients' -> why they are missing.
        seconds: what took how long.
    """

    pairs: dict[tuple[str, str], dict[str, float]]
    single: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    cross: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Rows of all tasks, end to end in the order of the tasks' names, so that the order of models has no say.

    `task[i]`: index in `names` of row i's task.
    """

    names: list[str]
    rows: Rows
    task: np.ndarray

    @classmethod
    def of(cls, rows: Mapping[str, Rows]) -> Calibration:
        names = sorted(rows)
        whose = np.repeat(np.arange(len(names)), [len(rows[n]) for n in names])
        return cls(names, Rows.joined([rows[n] for n in names]), whose)

    def own(self, name: str) -> np.ndarray:
        """Numbers of a task's rows."""
        return np.flatnonzero(self.task == self.names.index(name))


def rows_hash(rows: Rows) -> str:
    """SHA-256 (hex) of tokens, response masks and images."""
    tokens = b"".join(a.tobytes() for a in (rows.input_ids, rows.response, rows.offsets))
    return hashlib.sha256(tokens + rows.hash_of_images()).hexdigest()


def data_metrics(base: Path, models: Mapping[str, Path], calibration: Mapping[str, Rows], journal: Path, *,
                 parts: Sequence[str] = PARTS, hashes: Mapping[str, str] | None = None, batch_tokens: int = BATCH_TOKENS,
                 tell: Callable[[str], None] = lambda _: None,
                 progress: Callable[[str, int, int], None] = lambda *_: None) -> DataMetrics:
    """Measure every model once, then every pair.

    Args:
        models: task -> folder of the model tuned on it; all trained from `base`.
        calibration: task -> its rows, for each of these tasks; with responses, unless `parts` is ('activations',).
        journal: folder for what is measured of each model; what lies there from the same model, rows and settings is
            used. Holds 8 P bytes per model for gradients, its own and the base's; whoever calls removes it.
        parts: of PARTS.
        hashes: label ('base' and tasks) -> hash of its weights, where already known.
    Raises:
        ModelError, ShapeMismatch: models that do not load, do not line up, or whose losses are not finite.
        OutputError: the journal cannot be written.
    """
    folders = {BASE: base, **models}
    keys = dict(hashes) if hashes is not None else {label: checkpoint_hash(path) for label, path in folders.items()}
    live = live_model(folders, trainable=lambda model: [n for n, _ in model.named_parameters()])
    reading = Reading(live, Calibration.of(calibration), keys, journal, batch_tokens, progress)
    journal.mkdir(parents=True, exist_ok=True)
    found = DataMetrics({pair: {} for pair in itertools.combinations(models, 2)})
    if ACTIVATIONS in parts or SCORES in parts:
        begun = time.monotonic()
        _forward_metrics(reading, list(models), parts, found)
        found.seconds["forward passes"] = round(time.monotonic() - begun, 2)
    if GRADIENTS in parts:
        begun = time.monotonic()
        _gradient_metrics(reading, list(models), found)
        found.seconds[GRADIENTS] = round(time.monotonic() - begun, 2)
    for part, why in found.left_out.items():
        tell(f"left out: {part}: {why}")
    return found


# ---- one model -------------------------------------------------------------------------------------------------------


def last_block(model: nn.Module) -> nn.Module:
    """The last of a language model's residual blocks: of the list of modules that holds most of the parameters.

    Where a model looks at images too, the blocks of its tower may be the larger ones: looked for is in the smallest part that
    holds both the token embedding and a list. Hidden states as models return them would not do: the last of them stands
    behind the final norm in most families.

    Raises:
        NotApplicable: the model has no list of blocks.
    """
    lists = _lists(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for part in reversed(list(model.modules())):  # a part stands behind what it lies in
        if any(module is embedding for module in part.modules()) and (inner := _lists(part)):
            lists = inner
            break
    if not lists:
        raise NotApplicable(f"{type(model).__name__} has no list of blocks (torch.nn.ModuleList), so which output is that of "
                            "its last residual block is not known")
    # the first of the largest: a list of experts, or of a block's parts, stands inside a block and is smaller
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))[-1]


def _lists(module: nn.Module) -> list[nn.ModuleList]:
    return [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]


def token_mean(output: Tensor, batch: Batch) -> Float[Tensor, "B D"]:
    """Mean over each row's own tokens, without the padding, in float64."""
    if output.dim() != 3 or output.shape[:2] != batch.attention_mask.shape:
        raise NotApplicable(f"its last block puts out {list(output.shape)} for tokens {list(batch.attention_mask.shape)}, "
                            "wanted one vector per token")
    mask = batch.attention_mask.to(torch.float64)[..., None]
    return (output.double() * mask).sum(1) / mask.sum(1)


@dataclass(frozen=True)
class Passed:
    """What one model's forward passes gave: `mean` [D] or None, `losses` [T, 2] (sum of nats, response tokens)."""

    mean: Float[np.ndarray, " D"] | None
    losses: Float[np.ndarray, "T 2"]

    def scores(self) -> Float[np.ndarray, " T"]:
        return np.exp(-self.losses[:, 0] / self.losses[:, 1])


@dataclass
class Reading:
    """One live model that becomes each of the models, the rows, and the folder that keeps what was found."""

    live: Live
    calibration: Calibration
    hashes: Mapping[str, str]
    journal: Path
    batch_tokens: int
    progress: Callable[[str, int, int], None]

    def key(self, label: str, *more: Any) -> str:
        about = [MAKING, self.hashes[label], self.batch_tokens, torch.__version__, self.where.type, *more]
        return digest(about)[:40]

    @property
    def where(self) -> torch.device:
        return next(iter(self.live.parameters.values())).device

    def batches(self, chosen: np.ndarray) -> Iterator[Batch]:
        return batches(self.calibration.rows, chosen, self.batch_tokens, self.where)

    def passed(self, label: str, layer: nn.Module | None, losses: bool) -> Passed:
        """A model's forward passes over all rows, from the journal where it has them. Raises ModelError, NotApplicable."""
        key = self.key(label, "forward", rows_hash(self.calibration.rows), self.calibration.names, layer is not None, losses)
        path = self.journal / f"forward-{key}.safetensors"
        try:
            known = load_file(path)
            return Passed(known.get("mean"), known["losses"])
        except Exception:  # not there yet, or damaged: safetensors has types of its own for that
            found = self._pass(label, layer, losses)
        tensors = {"losses": found.losses} | ({} if found.mean is None else {"mean": found.mean})
        write_atomically(path, save(tensors))
        return found

    def _pass(self, label: str, layer: nn.Module | None, losses: bool) -> Passed:
        self.live.put({label: 1.0})
        model, sums = self.live.model, np.zeros((len(self.calibration.names), 2))

        def run(batch: Batch) -> None:
            if not losses:
                check_vocabulary(int(batch.input_ids.max()), model)
                getattr(model, "base_model", model)(**model_inputs(model, batch), use_cache=False)
                return
            nats, _ = response_losses(model, batch, select=self.live.select)
            row = batch.response[:, 1:].nonzero()[:, 0].cpu().numpy()  # the row of each response token
            np.add.at(sums, self.calibration.task[batch.rows[row]],
                      np.stack([nats.double().cpu().numpy(), np.ones(len(row))], axis=1))

        every, mean = np.arange(len(self.calibration.rows)), None
        if layer is not None:
            mean = activation_mean(model, layer, self.batches(every), run=run, pool=token_mean)
        else:
            with torch.no_grad():
                for batch in self.batches(every):
                    run(batch)
        if not (np.isfinite(sums).all() and (mean is None or np.isfinite(mean).all())):
            raise self._not_finite(label, "its loss or its activations")
        return Passed(mean, sums)

    def gradient(self, label: str, task: str) -> Path:
        """The file of a model's gradients on a task's rows, made if it is not there. Raises ModelError, OutputError."""
        own = self.calibration.rows.take(self.calibration.own(task))
        path = self.journal / f"gradient-{self.key(label, 'gradient', rows_hash(own))}.safetensors"
        if not is_whole(path):
            self.live.put({label: 1.0})
            found = language_gradients(self.live, own, self.batch_tokens)
            products = [float(g.double().square().sum()) for g in found.parameters.values()]
            if not (math.isfinite(found.loss) and np.isfinite(products).all()):
                raise self._not_finite(label, "its loss or its gradient")
            save_gradients(path, found)
        return path

    def _not_finite(self, label: str, what: str) -> ModelError:
        return ModelError(f"{label} ({self.live.weights[label].folder}): {what} on the calibration rows is not finite. Its "
                          "weights may hold NaN: make or fetch it again.")


def language_gradients(live: Live, rows: Rows, batch_tokens: int = BATCH_TOKENS) -> Gradients:
    """Gradients of the mean loss per response token over these rows, at the live model's present weights.

    `inputs`: of the output of the embedding layer, [tokens of the row, D], in the order of the rows; None where the model
    embeds its tokens otherwise than by one call of its embedding layer. `items` are response tokens.
    """
    embedded: list[Tensor] = []
    order: list[int] = []
    where = next(iter(live.parameters.values())).device

    def loss(batch: Batch) -> Loss:
        embedded.clear()
        order.extend(batch.rows.tolist())
        nats, _ = response_losses(live.model, batch, select=live.select)
        alone = len(embedded) == 1 and embedded[0].shape[:2] == batch.input_ids.shape
        return Loss(nats.sum(), nats.numel(), embedded[0] if alone else None)

    handle = live.model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    try:
        found = gradients(live.model, loss, batches(rows, np.arange(len(rows)), batch_tokens, where))
    finally:
        handle.remove()
    if found.inputs is None:
        return found
    by_row = dict(zip(order, found.inputs, strict=True))
    trimmed = [by_row[i][: int(length)].contiguous() for i, length in enumerate(rows.lengths)]
    return Gradients(found.loss, found.items, found.parameters, trimmed)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _forward_metrics(reading: Reading, tasks: list[str], parts: Sequence[str], found: DataMetrics) -> None:
    """Activations and scores. The base is read too: as the origin of shifts, and for how far tuning came."""
    layer, losses = None, SCORES in parts
    if ACTIVATIONS in parts:
        try:
            layer = last_block(reading.live.model)
        except NotApplicable as error:
            found.left_out[ACTIVATIONS] = str(error)
    passed: dict[str, Passed] = {}
    labels = [BASE, *tasks]
    for i, label in enumerate(labels if layer is not None or losses else []):
        reading.progress(f"forward passes of {label}", i, len(labels))
        try:
            passed[label] = reading.passed(label, layer, losses)
        except NotApplicable as error:  # told by the first model: all are of one architecture
            found.left_out[ACTIVATIONS], layer = str(error), None
            if not losses:
                break
            passed[label] = reading.passed(label, None, losses)
    reading.progress("forward passes", len(labels), len(labels))
    if layer is not None:
        for one, other in found.pairs:
            found.pairs[one, other] |= _activation_pair(passed[BASE].mean, passed[one].mean, passed[other].mean)
    if losses:
        _score_pairs(reading.calibration.names, passed, tasks, found)


def _activation_pair(base: Any, one: Any, other: Any) -> dict[str, float]:
    """The four published metrics of the mean vectors, and how the two moved from the base's: cosine and ratio."""
    shifts = activation_metrics(one - base, other - base)
    return activation_metrics(one, other) | {
        f"activation_shift_{kind}": value for kind in ("cosine_similarity", "magnitude_ratio")
        for name, value in shifts.items() if name.endswith(kind)}


def _score_pairs(names: list[str], passed: Mapping[str, Passed], tasks: list[str], found: DataMetrics) -> None:
    nats = {label: dict(zip(names, (p.losses[:, 0] / p.losses[:, 1]).tolist(), strict=True)) for label, p in passed.items()}
    found.cross = {label: {task: math.exp(-value) for task, value in of.items()} for label, of in nats.items()}
    found.single = {task: found.cross[task][task] for task in tasks}
    found.base = {task: found.cross[BASE][task] for task in tasks}
    gap = {task: 1 - found.base[task] / found.single[task] for task in tasks}
    for one, other in found.pairs:
        found.pairs[one, other] |= {
            "cross_task_score1": math.exp(nats[BASE][one] - nats[other][one]),
            "cross_task_score2": math.exp(nats[BASE][other] - nats[one][other]),
            "fine_tuning_gap1": gap[one], "fine_tuning_gap2": gap[other]}


def _gradient_metrics(reading: Reading, tasks: list[str], found: DataMetrics) -> None:
    files, at_base = [], []
    for i, task in enumerate(tasks):
        reading.progress(f"gradients of {task}", i, len(tasks))
        files.append(reading.gradient(task, task))
        at_base.append(reading.gradient(BASE, task))
    reading.progress("gradients", len(tasks), len(tasks))
    kinds: dict[Literal["encoder", "input"], np.ndarray] = {
        "encoder": parameter_products(files), "input": input_products(files)}
    if not kinds["input"].any():
        del kinds["input"]
        found.left_out["input gradients"] = "this model embeds its tokens otherwise than by one call of its embedding layer"
    for kind, gram in kinds.items():
        for (i, one), (j, other) in itertools.combinations(enumerate(tasks), 2):
            found.pairs[one, other] |= gradient_metrics(kind, float(gram[i, i]), float(gram[j, j]), float(gram[i, j]))
    before = parameter_products(at_base)
    for (i, one), (j, other) in itertools.combinations(enumerate(tasks), 2):
        found.pairs[one, other]["base_gradient_cosine_similarity"] = cosine(
            float(before[i, i]), float(before[j, j]), float(before[i, j]))
