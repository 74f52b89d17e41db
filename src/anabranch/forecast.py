"""What a recipe would do, before it does it: rows, tokens, steps, bytes, operations, and every problem found."""

from __future__ import annotations

import glob
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from anabranch.artifacts import Mixture
from anabranch.branches import train_settings
from anabranch.distribute import check_launch, goes_through_store, store_url
from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import AnabranchError, RecipeError
from anabranch.jobs import job_table
from anabranch.mixture import build_mixture
from anabranch.model import load_tokenizer, resolve_model
from anabranch.recipe import Recipe, Source
from anabranch.run import check_ahead, check_groups
from anabranch.sources import SUFFIXES

Progress = Callable[[str, str, int, int], None]


def forecast(recipe: Recipe, *, progress: Progress = lambda *_: None) -> list[str]:
    """Lines for a person. A local base and local data are read, and told exactly; nothing is downloaded or kept.

    Raises:
        RecipeError: every problem found, in one message.
    """
    problems: list[str] = []
    for check in (check_ahead, _check_sources, *((check_launch,) if goes_through_store(recipe) else ())):
        try:
            check(recipe)
        except AnabranchError as error:
            problems.append(str(error))
    lines, mixture, entries = [], None, 0
    if Path(recipe.model.path).is_dir() or Path(recipe.model.path).is_absolute():
        try:
            base = resolve_model(recipe.model)
            infos = Checkpoint.open(base).tensors
            entries = sum(math.prod(i.shape) for i in infos.values())
            lines.append(f"model      {base}: {entries:,} parameters")
            if not problems:
                mixture = _dry_mixture(recipe, base, progress)
        except AnabranchError as error:
            problems.append(str(error))
    else:
        lines.append(f"model      {recipe.model.path}"
                     f"{'@' + recipe.model.revision if recipe.model.revision else ''}: from the Hub (safetensors and text "
                     "files only); its size, and exact token counts, are known once it is here")
    if problems:
        raise RecipeError.of("dry run: the recipe has problems:", problems)
    return lines + _mixture_lines(recipe, mixture) + _stage_lines(recipe, mixture, entries)


def _sources(recipe: Recipe) -> list[Source]:
    """Of all three places."""
    retention = recipe.evaluate.retention if isinstance(recipe.evaluate.retention, list) else []
    return [*recipe.mixture.sources, *recipe.evaluate.transfer, *retention]


def _check_sources(recipe: Recipe) -> None:
    local = [s.path for s in _sources(recipe) if Path(s.path).is_absolute() or s.path.endswith(SUFFIXES)]
    missing = [path for path in local if not (glob.glob(path) or Path(path).exists())]
    if missing:
        raise RecipeError("no such data: " + ", ".join(missing))


def _dry_mixture(recipe: Recipe, base: Path, progress: Progress) -> Mixture | None:
    """The real mixture stage, into a folder that is thrown away; not for data that would be downloaded."""
    if not all(Path(s.path).is_absolute() for s in _sources(recipe)):
        return None
    tokenizer = load_tokenizer(base, trust_remote_code=recipe.model.trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        return build_mixture(recipe, tokenizer, Path(folder), base_hash="dry run",
                             progress=lambda *a: progress("mixture", *a))


def _mixture_lines(recipe: Recipe, mixture: Mixture | None) -> list[str]:
    if mixture is None:
        return [f"mixture    {s.path}" + (f" ({s.config})" if s.config else "") + ": counted when it is read"
                for s in recipe.mixture.sources]
    lines = [f"mixture    {len(mixture.units)} units, {sum(u.samples for u in mixture.units):,} samples, "
             f"{mixture.tokens:,} tokens; {sum(u.held_out_rows for u in mixture.units):,} held-out rows; "
             f"{len(mixture.transfer)} transfer units, {len(mixture.retention)} retention units"]
    rules: dict[str, int] = {}
    for e in mixture.excluded:
        rules[e.rule] = rules.get(e.rule, 0) + e.rows
    units = {rule: sorted({e.unit for e in mixture.excluded if e.rule == rule}) for rule in rules}
    return lines + [f"           left out by rule {rule}: {rows:,} rows of {', '.join(units[rule][:4])}"
                    + (f" and {len(units[rule]) - 4} more units" if len(units[rule]) > 4 else "")
                    for rule, rows in sorted(rules.items())]


def _stage_lines(recipe: Recipe, mixture: Mixture | None, entries: int) -> list[str]:
    split, settings = recipe.split, train_settings(recipe)
    count = 1 if split.method == "joint" else split.groups
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    lines = [f"gradients  at most {recipe.gradients.calibration_samples} rows a unit, sketch {recipe.gradients.sketch}"
             + (f" of {recipe.gradients.size:,} numbers per half" if recipe.gradients.sketch == "fold" else ""),
             f"split      {split.method} into {count} groups, by the {split.matrix} matrix"]
    steps = ""
    if mixture is not None:
        samples = sum(u.samples for u in mixture.units) * settings["num_train_epochs"]
        steps = f", about {math.ceil(samples / count / batch):,} steps each"
        if split.method != "soup":
            check_groups(len(mixture.units), {f"split.groups ({split.method})": count})
    lines.append(f"train      {count} branches, {recipe.launch.max_parallel} at a time, {batch} rows a step{steps}; "
                 f"learning rate {settings['learning_rate']}")
    if entries:
        size = entries * 4 / 1e9
        work = f"; {6 * entries * mixture.tokens * settings['num_train_epochs']:.1e} operations" if mixture else ""
        checkpoints = "" if recipe.model.lora else (f"up to {size * 6:.2f} GB while a running branch replaces its "
                                                    "checkpoint, ")
        lines.append(f"disk       {size * count:.2f} GB of branches (float32), {checkpoints}{size:.2f} GB or less for the "
                     f"result{work}")
    return [*lines, *_store_lines(recipe, mixture, count, entries), f"output     {recipe.output}",
            "Nothing was written. Without --dry-run the same command starts."]


def _store_lines(recipe: Recipe, mixture: Mixture | None, groups: int, entries: int) -> list[str]:
    """What goes through the store, if the recipe has one; sizes are of rows as they are stored, and of float32 weights."""
    if not goes_through_store(recipe):
        return []
    count = len(job_table(recipe, groups, len(mixture.units) if mixture else 10**9))
    rows = f"{mixture.tokens * 5 / 1e6:,.1f} MB of rows" if mixture is not None else "the rows"
    base = " and the base" if Path(recipe.model.path).is_dir() else ""
    size = f"; {entries * 4 / 1e9:.2f} GB come back with a branch, three times that go with a checkpoint" if entries else ""
    return [f"store      {store_url(recipe)}, launcher {recipe.launch.launcher}: {count} jobs; {rows}{base} go there{size}"]
