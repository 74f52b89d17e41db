"""What a recipe would do, before it does it: rows, tokens, images, steps, bytes, operations, hours, and every problem found."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import math
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anabranch.artifacts import Mixture
from anabranch.branches import train_settings
from anabranch.containers import SUFFIXES, ZIP
from anabranch.distribute import check_launch, goes_through_store, store_url
from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import AnabranchError, PlanError, RecipeError
from anabranch.families import adapter_arguments, describe_frozen, skeleton
from anabranch.jobs import job_table
from anabranch.left_out import Notes, column_lines, left_out_lines, unit_lines, warning_lines
from anabranch.mixture import build_mixture
from anabranch.mixture_summary import number_of
from anabranch.model import load_tokenizer, resolve_model, select_trainable
from anabranch.plan import load_plan
from anabranch.recipe import Recipe
from anabranch.rows import Rows, load_unit
from anabranch.run import STAGES, check_ahead, check_groups
from anabranch.sources import is_hub_id
from anabranch.training_cost import SHARE, ModelSize, device_lines, memory, operations, size_of
from anabranch.vision import Vision, load_vision

Progress = Callable[[str, str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """entries: numbers in its files. result: bytes of a merged model. size: None where transformers cannot build the model
    without its numbers."""

    entries: int
    result: int
    size: ModelSize | None

    @property
    def branch(self) -> int:
        """Bytes of a branch's float32 files."""
        return 4 * self.entries

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, and AdamW's two numbers for each that trains."""
        return self.branch + 8 * (self.size.trained if self.size is not None else self.entries)


@dataclass(frozen=True)
class Dry:
    """A mixture that was made and thrown away. size: bytes of its files. longest: tokens of its longest training row;
    pictured: at most of images in one."""

    mixture: Mixture
    notes: Notes
    size: int
    longest: int
    pictured: int

    @property
    def image_tokens(self) -> int:
        return sum(u.image_tokens for u in self.mixture.units)


def forecast(recipe: Recipe, *, start: str | None = None, until: str = STAGES[-1],
             progress: Progress = lambda *_: None) -> list[str]:
    """Lines for a person. A local base and local data are read, and told exactly; nothing is downloaded or kept.

    Args:
        start, until: as `run_stages` is given them: whether a plan that lies there already is to be kept.
    Raises:
        RecipeError: every problem found, in one message.
    """
    problems: list[str] = []
    for check in (check_ahead, *((check_launch,) if goes_through_store(recipe) else ())):
        _tried(problems, functools.partial(check, recipe))
    lines: list[str] = []
    dry, base = None, None
    if Path(recipe.model.path).is_dir() or Path(recipe.model.path).is_absolute():
        folder = _tried(problems, lambda: resolve_model(recipe.model))
        if folder is not None:
            base, lines = _tried(problems, lambda: _base(recipe, folder)) or (None, [])
            dry = _tried(problems, lambda: _dry_mixture(recipe, folder, progress))
        plan, split = recipe.output / "plan.json", STAGES.index("split")
        if dry is not None and plan.exists() and STAGES.index(until) >= split and STAGES.index(start or STAGES[-1]) > split:
            _tried(problems, lambda: load_plan(plan, dry.mixture))
    else:
        lines.append(f"model      {recipe.model.path}"
                     f"{'@' + recipe.model.revision if recipe.model.revision else ''}: from the Hub (safetensors and text "
                     "files only); its size, and exact token counts, are known once it is here")
    if missing := [path for path in _paths(recipe) if _missing(path) and not any(path in problem for problem in problems)]:
        problems.append("no such data: " + ", ".join(missing))
    if problems:
        raise RecipeError.of("dry run: the recipe has problems:", list(dict.fromkeys(problems)))
    return [*lines, *_mixture_lines(recipe, dry), *_stage_lines(recipe, dry, base)]


def _tried(problems: list[str], make: Callable[[], T]) -> T | None:
    """What is made; None where it cannot be, which is then among the problems."""
    try:
        return make()
    except AnabranchError as error:
        problems.append(str(error).replace("\n", "\n  "))
        return None


def _base(recipe: Recipe, folder: Path) -> tuple[Base, list[str]]:
    """Its sizes, and what is told of it: no weight is read. Raises ModelError of what cannot be frozen, among others."""
    infos = Checkpoint.open(folder).tensors
    entries = sum(i.numel for i in infos.values())
    model: Any = skeleton(folder, recipe.model.trust_remote_code)
    size = size_of(model, recipe.model) if model is not None else None
    lines = [f"model      {folder}: {entries:,} parameters"]
    if size is not None and len(size.parts) > 1:
        lines[0] += " (" + ", ".join(f"{part.name} {part.parameters:,}" for part in size.parts) + ")"
    if model is not None:
        select_trainable(model, recipe.model)
        adapter_arguments(model, recipe.model)
        lines += [f"freeze     {line.removeprefix('freeze: ')}" for line in describe_frozen(model, recipe.model)]
    width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(recipe.merge.dtype or "")
    return Base(entries, sum(i.numel * width if width else i.size for i in infos.values()), size), lines


def _paths(recipe: Recipe) -> list[str]:
    """Of the sources at all three places."""
    retention = recipe.evaluate.retention if isinstance(recipe.evaluate.retention, list) else []
    return [s.path for s in (*recipe.mixture.sources, *recipe.evaluate.transfer, *retention)]


def _missing(path: str) -> bool:
    here = Path(path).is_absolute() or path.endswith((*SUFFIXES, ZIP))
    return here and not (glob.glob(path) or Path(path).exists())


def _dry_mixture(recipe: Recipe, base: Path, progress: Progress) -> Dry | None:
    """The real mixture stage, into a folder that is thrown away; not for data that would be downloaded.

    The images of one unit lie there at a time: a mixture may have more of them than a temporary folder has room for.
    """
    if any(not Path(path).is_absolute() and is_hub_id(path) for path in _paths(recipe)):
        return None
    trust = recipe.model.trust_remote_code
    tokenizer, vision = load_tokenizer(base, trust_remote_code=trust), load_vision(base, trust_remote_code=trust)
    with _stopped_by_exception(), tempfile.TemporaryDirectory() as folder:
        out, sizes, notes = Path(folder), list[int](), Notes()

        def drop(images: Path) -> None:
            sizes.append(images.stat().st_size)
            images.unlink()

        mixture = build_mixture(recipe, tokenizer, out, vision=vision, base_hash="dry run",
                                progress=lambda *a: progress("mixture", *a), on_images=drop,
                                on_source=lambda source: progress("mixture", f"reading {source}", 0, 1), notes=notes)
        units = [load_unit(out / unit.file, "train") for unit in mixture.units]
        return Dry(mixture, notes, sum(sizes) + sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
                   max(int(rows.lengths.max()) for rows in units),
                   max((_most_of_images(rows, vision) for rows in units if rows.images is not None), default=0))


@contextlib.contextmanager
def _stopped_by_exception() -> Iterator[None]:
    """SIGTERM as Ctrl-C: an exception, so that a temporary folder of images does not stay behind."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _most_of_images(rows: Rows, vision: Vision | None) -> int:
    """Tokens of images in the row that has most: a row may have several."""
    ids = list(vision.image_ids) if vision is not None else []
    return int(np.add.reduceat(np.isin(rows.input_ids, ids), rows.offsets[:-1], dtype=np.int64).max())


def _mixture_lines(recipe: Recipe, dry: Dry | None) -> list[str]:
    if dry is None:
        return [f"mixture    {s.path}" + (f" ({s.config})" if s.config else "") + ": counted when it is read"
                for s in recipe.mixture.sources]
    mixture = dry.mixture
    shown = f" ({dry.image_tokens:,} of images)" if mixture.vision is not None else ""
    lines = [*warning_lines(mixture),
             f"mixture    {number_of(len(mixture.units), 'unit')}, {sum(u.samples for u in mixture.units):,} samples, "
             f"{mixture.tokens:,} tokens{shown}; {sum(u.held_out_rows for u in mixture.units):,} held-out rows; "
             f"{len(mixture.transfer)} transfer units, {len(mixture.retention)} retention units",
             *(f"           {line}" for line in unit_lines(mixture, dry.notes)), *_image_lines(mixture)]
    if mixture.vision is not None and mixture.chat_template == "plain" and recipe.mixture.chat_template == "auto":
        lines.append("           chat template: plain, as the base has none (chat_template.jinja beside its config)")
    lines += [f"columns    {line}" for line in column_lines(dry.notes)]
    return lines + [f"           {line}" for line in left_out_lines(mixture, dry.notes)]


def _image_lines(mixture: Mixture) -> list[str]:
    vision = mixture.vision
    if vision is None:
        return []
    line = (f"images     {vision.images:,} different ones, of {vision.smallest:,} to {vision.largest:,} tokens, "
            f"{vision.median:,} in the middle")
    if vision.max_pixels is None:
        return [line + "; mixture.images.max_pixels is not set, so that none is scaled down"]
    if vision.scaled_down and vision.image_tokens == vision.image_tokens_uncapped:
        return [line, f"           {vision.scaled_down:,} are scaled down to {vision.max_pixels:,} pixels, which spares no "
                      "token: this model brings images to sizes of its own"]
    saved = 1 - vision.image_tokens / vision.image_tokens_uncapped if vision.image_tokens_uncapped else 0.0
    return [line, f"           {vision.scaled_down:,} are scaled down to {vision.max_pixels:,} pixels: {vision.image_tokens:,} "
                  f"image tokens instead of {vision.image_tokens_uncapped:,}, {saved:.0%} fewer"]


def _stage_lines(recipe: Recipe, dry: Dry | None, base: Base | None) -> list[str]:
    split, settings = recipe.split, train_settings(recipe)
    count = 1 if split.method == "joint" else split.groups
    shares = _shares(recipe, count)
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    lines = [f"gradients  at most {recipe.gradients.calibration_samples} rows a unit, sketch {recipe.gradients.sketch}"
             + (f" of {recipe.gradients.size:,} numbers per half" if recipe.gradients.sketch == "fold" else "")
             + _gradient_work(recipe, dry, base),
             f"split      {split.method} into {count} groups, by the {split.matrix} matrix"]
    steps = ""
    if dry is not None:
        samples = sum(u.samples for u in dry.mixture.units) * settings["num_train_epochs"]
        least, most = (math.ceil(samples * share / batch) for share in (min(shares), max(shares)))
        steps = f", about {most:,} steps each" if least == most else f", about {least:,} to {most:,} steps"
        if split.method != "soup":
            _check_groups(dry, {f"split.groups ({split.method})": count})
    many = "1 branch" if count == 1 else f"{count} branches"
    lines.append(f"train      {many}, {recipe.launch.max_parallel} at a time, {batch} rows a step{steps}; "
                 f"learning rate {settings['learning_rate']}")
    if base is not None:
        lines += [*_work_lines(recipe, dry, base, shares), *_disk_lines(recipe, dry, base, count)]
    return [*lines, *_store_lines(recipe, dry, count, base), f"output     {recipe.output}",
            "Nothing was written. Without --dry-run the same command starts."]


def _check_groups(dry: Dry, arms: dict[str, int]) -> None:
    """As `check_groups`; where units may be missing because of what was left out, that is told with it."""
    try:
        check_groups(len(dry.mixture.units), arms)
    except PlanError as error:
        left_out = [*warning_lines(dry.mixture), *left_out_lines(dry.mixture, dry.notes, chosen=False)]
        told = "\n".join(["", "What was left out of the mixture:", *left_out]).replace("\n", "\n  ") if left_out else ""
        raise PlanError(f"{error}{told}") from error


def _shares(recipe: Recipe, count: int) -> list[float]:
    """Of the mixture's samples that each branch gets, about."""
    capacities = recipe.split.capacities
    if count == 1 or capacities is None:
        return [1 / count] * count
    return [c / sum(capacities) for c in capacities]


def _gradient_work(recipe: Recipe, dry: Dry | None, base: Base | None) -> str:
    if dry is None or base is None or base.size is None:
        return ""
    most = recipe.gradients.calibration_samples
    shares = [(u, min(1.0, most / u.samples)) for u in dry.mixture.units if u.samples]
    tokens, images = (sum(int(getattr(u, what) * share) for u, share in shares) for what in ("tokens", "image_tokens"))
    whole = dataclasses.replace(base.size, adapters=False)  # the sketch is of the weights that adapters would sit on
    return f"; {tokens:,} tokens, {operations(whole, tokens, images, recompute=False):.1e} operations"


def _work_lines(recipe: Recipe, dry: Dry | None, base: Base, shares: list[float]) -> list[str]:
    """Operations, memory and hours of the branches."""
    if dry is None or base.size is None:
        return []
    settings, bfloat16 = train_settings(recipe), recipe.model.dtype == "bfloat16"
    recompute = bool(settings["activation_checkpointing"] or settings.get("gradient_checkpointing"))
    epochs = settings["num_train_epochs"]
    work = operations(base.size, int(dry.mixture.tokens * epochs), int(dry.image_tokens * epochs), recompute=recompute)
    rows = settings["per_device_train_batch_size"]
    need = memory(base.size, rows=rows, row_tokens=dry.longest, row_image_tokens=dry.pictured, bfloat16=bfloat16,
                  recompute=recompute)
    half = f", bfloat16 copies {need.half / 1e9:,.2f}" if bfloat16 else ""
    lines = [f"work       {work:.2e} operations in all branches"
             + (", activations computed twice" if recompute else "")
             + ("; adapters train, which are not counted" if base.size.adapters else
                f"; {base.size.trained:,} parameters train"),
             f"memory     about {need.total / 1e9:,.2f} GB a branch: weights {need.weights / 1e9:,.2f}, gradients "
             f"{need.gradients / 1e9:,.2f}, AdamW {need.optimizer / 1e9:,.2f}{half}, activations {need.activations / 1e9:,.2f} "
             f"({rows} rows of up to {dry.longest:,} tokens at a time)"]
    hours = device_lines([work * share for share in shares], need.total, bfloat16=bfloat16)
    return [*lines, f"hours      of training, if {SHARE:.0%} of the dense peak is reached (an assumption):",
            *(f"           {line}" for line in hours)]


def _disk_lines(recipe: Recipe, dry: Dry | None, base: Base, count: int) -> list[str]:
    checkpoints = "" if recipe.model.lora else (f"up to {2 * base.checkpoint / 1e9:.2f} GB while a running branch replaces its "
                                                "checkpoint, ")
    rows = f"{dry.size / 1e9:.2f} GB of rows{' and images' if dry.mixture.vision else ''}, " if dry is not None else ""
    return [f"disk       {rows}{base.branch * count / 1e9:.2f} GB of branches (float32), {checkpoints}{base.result / 1e9:.2f} "
            "GB for the result"]


def _store_lines(recipe: Recipe, dry: Dry | None, groups: int, base: Base | None) -> list[str]:
    """What goes through the store, if the recipe has one."""
    if not goes_through_store(recipe):
        return []
    count = len(job_table(recipe, groups, len(dry.mixture.units) if dry else 10**9))
    rows = f"{dry.size / 1e6:,.1f} MB of rows" if dry is not None else "the rows"
    local = " and the base" if Path(recipe.model.path).is_dir() else ""
    size = (f"; {base.branch / 1e9:.2f} GB come back with a branch, {base.checkpoint / 1e9:.2f} GB go with a checkpoint"
            if base is not None else "")
    return [f"store      {store_url(recipe)}, launcher {recipe.launch.launcher}: {count} jobs; {rows}{local} go there{size}"]
