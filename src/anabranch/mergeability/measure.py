"""Every pair of models -> metrics.json.

    BASE + n models, rows of each task   ->   weights (no rows), activations, gradients, scores   ->   pairs

While it is under way, what is known of single models lies in a hidden folder beside the output, `.NAME.journal`; a later
call goes on from there, and only with what was made from the same models, rows and settings. It is removed at the end.
Gradients are its bulk: 8 bytes per parameter and model (of each model, and of the base on the same rows, in float32).
"""

from __future__ import annotations

import fcntl
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from anabranch.artifacts import digest
from anabranch.diagnose.subject import BASE, Live, live_model
from anabranch.engine.checkpoint import Checkpoint, checkpoint_hash
from anabranch.engine.fetch import resolve
from anabranch.engine.memory import occupied
from anabranch.engine.output import existing_parent
from anabranch.errors import AnabranchError, OutputError, RecipeError, closest
from anabranch.mergeability.artifacts import MeasuredModel, MeasuredPair, Metrics
from anabranch.mergeability.calibration_rows import data_files, named, read_calibration
from anabranch.mergeability.data import (
    ACTIVATIONS,
    BATCH_TOKENS,
    GRADIENTS,
    PARTS,
    SCORES,
    DataMetrics,
    data_metrics,
    language_gradients,
    rows_hash,
)
from anabranch.mergeability.metrics import METRICS
from anabranch.mergeability.weights import WeightMetrics, weight_cost, weight_metrics
from anabranch.model import batches, keep_buffers, resolve_model, response_losses
from anabranch.recipe import Model as ModelSection
from anabranch.rows import Rows

WEIGHTS = "weights"
ALL = (WEIGHTS, *PARTS)
LABELLED = (GRADIENTS, SCORES)
Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass
class Job:
    """What is measured, found to be in order: `labels` task -> the model as it was given; `parts` of ALL."""

    base_text: str
    output: Path
    parts: tuple[str, ...]
    labels: dict[str, str]
    settings: dict[str, float | int | str]
    base: Path = Path()  # until it is found
    folders: dict[str, Path] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        return self.output.with_name(f".{self.output.name}.journal")

    @property
    def data_parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS if part in self.parts)

    @property
    def calibration_hash(self) -> str:
        return digest({task: rows_hash(rows) for task, rows in self.rows.items()})


def measure(base: str, models: Sequence[str], data: Sequence[str] | Mapping[str, Rows], output: Path, *,
            only: Collection[str] | None = None, samples: int = 10, seed: int = 0, max_length: int = 1024,
            tell: Tell = lambda _: None, progress: Progress = lambda *_: None) -> Metrics:
    """Measure every pair of models and write `output`.

    A pair's activation metrics are means over the rows of all tasks given, as published, so they change with the company
    that the two are measured in. Models that are to be compared with those of a table (for a prediction) are measured in
    one call with the table's models, on the same rows, `samples` and `seed`.

    Args:
        base: folder or Hub id of the model that all were trained from.
        models: 'PATH' or 'NAME=PATH', folders or Hub ids; the name, by default the folder's, is the task's.
        data: 'NAME=FILE', or 'FILE' whose rows carry a field `task`. Without any, only weights are measured. Not the rows that
            merges will be scored on: see `calibration_rows`. Or the rows of every task, tokenised, all of which are taken.
        only: of weights, activations, gradients, scores; None: all that the data allow.
        samples: calibration rows of each task.
    Returns:
        What was written. `Metrics.left_out` tells what was not measured, of all pairs or of some, and why.
    Raises:
        AnabranchError: every problem with the arguments, models and rows in one message, before anything is measured.
    """
    keep_buffers()
    job = _prepare(base, models, data, output, only, samples, seed, max_length, tell)
    with _journal(job, tell):
        if ACTIVATIONS in job.parts:
            tell(_company(len(job.folders)))
        hashes = _hashes(job, tell, progress)
        seconds: dict[str, float] = {}
        weights, rows = None, DataMetrics({})
        if WEIGHTS in job.parts:
            weights = weight_metrics(job.base, job.folders, journal=job.journal / "weights.jsonl", hashes=hashes, tell=tell,
                                     progress=progress)
            seconds[WEIGHTS] = weights.seconds
        if job.data_parts:
            rows = data_metrics(job.base, job.folders, job.rows, job.journal / "rows", parts=job.data_parts, hashes=hashes,
                                tell=tell, progress=progress)
            seconds |= rows.seconds
        found = _result(job, hashes, weights, rows, seconds)
        found.save(job.output)
        shutil.rmtree(job.journal, ignore_errors=True)  # while it is held: the next run's must not be taken for it
    return found


def _company(tasks: int) -> str:
    return f"activations are means over the rows of all {tasks} tasks: measure models to be compared in one go"


def _result(job: Job, hashes: Mapping[str, str], weights: WeightMetrics | None, rows: DataMetrics,
            seconds: dict[str, float]) -> Metrics:
    of_weights = weights.pairs if weights is not None else {}
    pairs = []
    for pair in itertools.combinations(job.folders, 2):
        values = {**of_weights.get(pair, {}), **rows.pairs.get(pair, {})}
        pairs.append(MeasuredPair(task1=pair[0], task2=pair[1], metrics={
            name: values[name] for name in METRICS if name in values and math.isfinite(values[name])}))
    reasons = _reasons(job, rows) | (weights.left_out if weights is not None else {})
    models = [MeasuredModel(
        task=task, folder=text, sha256=hashes[task], norm=weights.norms[task] if weights is not None else None,
        single_score=rows.single.get(task), base_score=rows.base.get(task)) for task, text in job.labels.items()]
    made_from = {"base": hashes[BASE]} | ({"rows": job.calibration_hash} if job.data_parts else {})
    return Metrics(
        base=job.base_text, models=models, pairs=pairs, made_from=made_from, settings=job.settings, seconds=seconds,
        left_out=_left_out(pairs, reasons),
        excluded_tensors=weights.excluded if weights is not None else {})


def _left_out(pairs: Sequence[MeasuredPair], reasons: Mapping[str, str]) -> dict[str, str]:
    """Metric -> why it is missing; where only some pairs lack it, in how many."""
    found = {}
    for name in METRICS:
        if lacking := sum(name not in pair.metrics for pair in pairs):
            why = reasons.get(name, "not defined for these models")
            found[name] = why if lacking == len(pairs) else f"in {lacking} of {len(pairs)} pairs: {why}"
    return found


def _reasons(job: Job, rows: DataMetrics) -> dict[str, str]:
    """Metric -> why it could not be measured, as far as its part tells."""
    found = {}
    for name, metric in METRICS.items():
        part = _part_of(name, metric.category, metric.needs)
        kind = f"{name.split('_')[0]} {part}" if metric.category == "gradient" else part
        if (why := job.unmeasured.get(part) or rows.left_out.get(kind)) is not None:
            found[name] = why
    return found


def _part_of(name: str, category: str, needs: str) -> str:
    if needs == "weights":
        return WEIGHTS
    if category == "gradient" or needs == "gradients":
        return GRADIENTS
    return ACTIVATIONS if needs == "rows" else SCORES


# ---- before anything is measured --------------------------------------------------------------------------------------


def _prepare(base: str, models: Sequence[str], data: Sequence[str] | Mapping[str, Rows], output: Path,
             only: Collection[str] | None, samples: int, seed: int, max_length: int, tell: Tell) -> Job:
    """Raises RecipeError with every problem found; nothing has been written then."""
    labels, problems = _labels(models)
    parts, unmeasured, more = _parts(only, bool(data))
    problems += more + _output_problems(output)
    if samples < 1:
        problems.append(f"samples is {samples}: wanted 1 or more calibration rows of each task.")
    job = Job(base, output, parts, labels, {"parts": " ".join(parts)}, unmeasured=unmeasured)
    if job.data_parts:
        job.settings |= {"samples": samples, "seed": seed, "max_length": max_length, "batch_tokens": BATCH_TOKENS,
                         "dtype": "float32"}
    opened, ready = _find(job, problems)
    if opened is not None:
        problems += _unlike(job, opened)
    problems += _input_problems(job, [] if isinstance(data, Mapping) else data)
    if isinstance(data, Mapping):
        job.rows = {task: data[task] for task in labels} if job.data_parts else {}
    elif job.data_parts and data and samples >= 1 and ready:
        try:
            job.rows = read_calibration(data, list(labels), job.base, samples=samples, seed=seed, max_length=max_length,
                                        labels=any(part in parts for part in LABELLED), tell=tell)
        except AnabranchError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError.of("these models cannot be measured:", problems)
    return job


def _labels(models: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Task -> model as given, and what is wrong with that."""
    labels: dict[str, str] = {}
    problems = []
    for entry in models:
        name, path = named(entry)
        name = Path(path).expanduser().absolute().name if name is None else name
        if not name:
            problems.append(f"--model {entry}: no name before the `=`.")
        elif name == BASE:
            problems.append(f"--model {entry}: the name `{BASE}` is the base's own. Give another: NAME=PATH.")
        elif name in labels:
            problems.append(f"--model {entry}: the name {name!r} is taken by {labels[name]}. Give each its own: NAME=PATH.")
        else:
            labels[name] = path
    if len(models) < 2:
        problems.append(f"{len(models) or 'no'} model{'s' if not models else ''} given, and pairs are measured: give --model "
                        "twice or more.")
    return labels, problems


def _parts(only: Collection[str] | None, data: bool) -> tuple[tuple[str, ...], dict[str, str], list[str]]:
    """What is measured; why the rest is not; what is wrong with the wish."""
    wanted = set(ALL if data else (WEIGHTS,)) if only is None else set(only)
    problems = [f"--only {name}: no such part.{closest(name, ALL)}" for name in sorted(wanted - set(ALL))]
    if only is not None and not wanted:
        problems.append(f"--only names nothing. Known: {', '.join(ALL)}.")
    needy = [part for part in PARTS if part in wanted]
    if needy and not data:
        problems.append(f"--only {','.join(needy)}: wants calibration rows; give --data.")
    why = "not asked for (--only)" if only is not None else "wants calibration rows (--data)"
    return tuple(p for p in ALL if p in wanted), {p: why for p in ALL if p not in wanted}, problems


def _output_problems(output: Path) -> list[str]:
    if output.is_dir():
        return [f"--output {output}: is a folder; give the name of a file, such as {output / 'metrics.json'}."]
    parent = existing_parent(output)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return [f"--output {output}: {parent} cannot be written to. Give another place."]
    return []


def _input_problems(job: Job, data: Sequence[str]) -> list[str]:
    """An output that would take the place of what is read."""
    output = job.output.resolve()
    if output in {path.resolve() for path in data_files(data)}:
        return [f"--output {job.output}: is a file of --data, and would be overwritten. Give another name."]
    folders = {"--base": job.base} if job.base != Path() else {}
    for what, folder in (folders | {f"--model {task}": folder for task, folder in job.folders.items()}).items():
        # the files of a model fetched from the Hub are links
        if output.parent == folder.resolve() or output in {path.resolve() for path in folder.iterdir() if path.is_file()}:
            return [f"--output {job.output}: lies among the files of {what}, {folder}. Give another place."]
    return []


def _find(job: Job, problems: list[str]) -> tuple[Checkpoint | None, bool]:
    """Resolve base and models into the job. (the base, if it opens; whether it can also be used as what is measured wants)"""
    base, ready = None, False
    try:
        job.base = resolve(job.base_text).absolute()
        base = Checkpoint.open(job.base)
        if job.data_parts:
            resolve_model(ModelSection(path=str(job.base)))  # rows want a tokenizer
        ready = True
    except AnabranchError as error:
        problems.append(f"--base {job.base_text}: {error}")
    for task, path in job.labels.items():
        try:
            job.folders[task] = resolve(Path(path).expanduser() if Path(path).expanduser().is_dir() else path)
            Checkpoint.open(job.folders[task])
        except AnabranchError as error:
            job.folders.pop(task, None)
            problems.append(f"--model {task}: {error}")
    return base, ready


def _unlike(job: Job, opened: Checkpoint) -> list[str]:
    """Models of another architecture than the base's, by config.json; the tensors are compared where they are read."""
    base, problems = opened.config.get("model_type"), []
    for task, folder in job.folders.items():
        other = Checkpoint.open(folder).config.get("model_type")
        if other != base:
            problems.append(f"--model {task}: {folder} is of the architecture {other!r}, the base of {base!r}; only models "
                            "trained from the base can be measured.")
    return problems


def _hashes(job: Job, tell: Tell, progress: Progress) -> dict[str, str]:
    folders, found = {BASE: job.base, **job.folders}, {}
    for i, (label, folder) in enumerate(folders.items()):
        progress(f"hash of {label}", i, len(folders))
        found[label] = checkpoint_hash(folder)
    progress("hashes", len(folders), len(folders))
    for one, other in itertools.combinations(found, 2) if WEIGHTS not in job.parts else ():  # else told by `weights`
        if found[one] == found[other]:
            tell(f"{one} and {other} are the same model ({folders[one]}, {folders[other]})")
    return found


@contextmanager
def _journal(job: Job, tell: Tell) -> Iterator[None]:
    """The hidden folder, held against a second measurement into the same output. Empty, it does not stay behind."""
    handle = _locked(job)
    try:
        _check_space(job)
        yield
    except AnabranchError:
        if kept := [path for path in job.journal.rglob("*") if path.is_file()]:
            size = sum(path.stat().st_size for path in kept)
            tell(f"What is measured of single models is kept for the next call ({size:,} bytes in {job.journal}); delete that "
                 "folder if you give up.")
        raise
    finally:
        for folder in sorted((p for p in job.journal.rglob("*") if p.is_dir()), reverse=True):
            with suppress(OSError):  # not empty: what is measured is kept
                folder.rmdir()
        with suppress(OSError):  # likewise
            job.journal.rmdir()
        os.close(handle)  # the last thing: from here on the folder is another's


def _locked(job: Job) -> int:
    """A handle that holds the journal's folder, made if it is not there. The lock goes with the process."""
    while True:
        try:
            job.journal.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--output {job.output}: cannot write beside it ({error.strerror}). Give another "
                              "place.") from error
        try:
            handle = os.open(job.journal, os.O_RDONLY)
        except FileNotFoundError:  # removed in between, by the run that held it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise OutputError(f"--output {job.output}: another process is measuring into it. Wait for it, or give another "
                              "place.") from error
        except OSError:
            pass  # a file system without locks: go on unprotected, as merges do
        with suppress(FileNotFoundError):  # another process has removed it: made anew
            if os.path.samestat(os.fstat(handle), os.stat(job.journal)):
                return handle
        os.close(handle)  # the folder was removed before it could be held


def _gradient_bytes(job: Job) -> int:
    """Of all gradient files, the inputs' aside: of each model, and of the base, on each task's rows."""
    entries = sum(info.numel for info in Checkpoint.open(job.base).tensors.values())
    return 8 * entries * len(job.folders) if GRADIENTS in job.parts else 0


def _check_space(job: Job) -> None:
    kept = sum(path.stat().st_size for path in job.journal.glob("rows/gradient-*"))
    needed, free = _gradient_bytes(job) - kept, shutil.disk_usage(existing_parent(job.output)).free
    if needed > free:
        raise OutputError(f"gradients on {len(job.folders)} tasks take {needed:,} bytes beside {job.output} until they are "
                          f"compared, and {free:,} are free there. Free space, choose another output, or leave gradients out "
                          "(--only weights,activations,scores).")


# ---- the forecast -----------------------------------------------------------------------------------------------------


def measure_forecast(base: str, models: Sequence[str], data: Sequence[str], output: Path, *,
                     only: Collection[str] | None = None, samples: int = 10, seed: int = 0, max_length: int = 1024,
                     tell: Tell = lambda _: None) -> list[str]:
    """What `measure` would do and cost, in lines for a person; every problem that it would find. Nothing is written.

    Seconds of passes are those of one forward and one backward pass over real rows, on this machine, timed here.
    """
    keep_buffers()
    job = _prepare(base, models, data, output, only, samples, seed, max_length, tell)
    count = len(job.folders)
    lines = [f"models      {count} and the base: {count * (count - 1) // 2} pairs"]
    if WEIGHTS in job.parts:
        lines += [f"weights     {line}" for line in weight_cost(job.base, job.folders).lines()]
    if job.data_parts:
        lines += _row_lines(job)
    lines += [f"{part:<11} left out: {why}" for part, why in job.unmeasured.items()]
    return [*lines, f"output      {job.output}", "Nothing was written. Without --dry-run the same command starts."]


def _row_lines(job: Job) -> list[str]:
    live = live_model({BASE: job.base, **job.folders}, trainable=lambda model: [n for n, _ in model.named_parameters()])
    every = Rows.joined(list(job.rows.values()))
    lines = [f"rows        {len(every):,} of {len(job.rows)} tasks, {int(every.lengths.sum()):,} tokens, "
             f"{int(every.response_lengths.sum()):,} of responses"]
    forward, backward = _probe(live, every, GRADIENTS in job.parts)
    entries, models = sum(p.numel() for p in live.parameters.values()), len(job.folders)
    spill = _gradient_bytes(job)
    if ACTIVATIONS in job.parts:
        lines.append(f"            {_company(models)}")
    if ACTIVATIONS in job.parts or SCORES in job.parts:
        passes, rows = models + 1, len(every)
        lines.append(f"forward     {passes} models x {rows:,} rows: {passes * rows:,} row passes, about "
                     f"{passes * int(every.lengths.sum()) * forward:,.0f} s")
    if GRADIENTS in job.parts:
        lines.append(f"backward    {models} models, each on its own rows, and the base: {2 * len(every):,} row passes, about "
                     f"{2 * int(every.lengths.sum()) * backward:,.0f} s; {spill:,} bytes beside the output until then (8 per "
                     "parameter and model)")
    held = entries * 4 * (2 if GRADIENTS in job.parts else 1)
    lines.append(f"memory      about {(held + occupied() - entries * 4) / 1e9:,.1f} GB and the activations of {BATCH_TOKENS:,} "
                 "tokens")
    return lines


def _probe(live: Live, rows: Rows, backward: bool) -> tuple[float, float]:
    """Seconds per token of a forward pass, and of forward and backward together, over a few of the rows."""
    few = rows.take(np.argsort(rows.lengths, kind="stable")[len(rows) // 2 : len(rows) // 2 + 4])
    tokens, times = int(few.lengths.sum()), []
    live.put({BASE: 1.0})
    for _ in range(2):
        begun = time.monotonic()
        with torch.no_grad():
            for batch in batches(few, np.arange(len(few)), BATCH_TOKENS, next(iter(live.parameters.values())).device):
                response_losses(live.model, batch, select=live.select)
        times.append(time.monotonic() - begun)
    if not backward:
        return min(times) / tokens, 0.0
    begun = time.monotonic()
    language_gradients(live, few)
    return min(times) / tokens, (time.monotonic() - begun) / tokens
