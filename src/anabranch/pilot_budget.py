"""A full recipe made small for a pilot: fewer rows, as many steps as that allows, and what it will cost.

    share s   of the full token budget      B   rows of a step, over all accumulation

Rows: every unit keeps its share, by systematic rounding in an order that comes from the unit names, so that small units
are not all rounded to none and the sum is the budget's. Units that get no row are still evaluated on.

Steps: B shrinks with the share (B s, at least 1 row), so that a pilot takes as many optimizer steps as the full run as long
as B s >= 1, and covers the learning-rate schedule. Fewer steps of the full batch would show the beginning of training only,
where joint training, which takes the most steps, leads whatever comes later; benchmarks/pilot_record has the figures of both.
The price: gradient noise of a smaller batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anabranch.artifacts import Mixture, Unit, digest
from anabranch.branches import train_settings
from anabranch.errors import RecipeError
from anabranch.evaluate import score_unit
from anabranch.model import batches, can_select, device, load_model, load_tokenizer, release_memory, response_losses
from anabranch.recipe import Recipe
from anabranch.rows import Rows, budget_indices, generator, load_unit

RUNGS = 2  # budgets, each four times the one before: the least that shows a trend, and far enough apart to show it
LARGEST_SHARE = 0.5
BATCH_POWER = 1.0  # B shrinks with share ** BATCH_POWER; 0 keeps the recipe's batch (what the record compares with)


def shares_up_to(share: float) -> list[float]:
    """s/4 and s. Raises RecipeError."""
    if not 0 < share <= LARGEST_SHARE:
        raise RecipeError(f"--share {share:g}: wanted more than 0 and at most {LARGEST_SHARE:g} of the full token budget. With "
                          "more than that, `anabranch compare` costs little more and has nothing to forecast.")
    return [share / 4**i for i in reversed(range(RUNGS))]


def full_batch(recipe: Recipe) -> int:
    """Rows of an optimizer step."""
    settings = train_settings(recipe)
    return int(settings["per_device_train_batch_size"]) * int(settings.get("gradient_accumulation_steps", 1))


def pilot_batch(recipe: Recipe, share: float) -> int:
    return max(1, round(full_batch(recipe) * share**BATCH_POWER))


def pilot_recipe(recipe: Recipe, share: float) -> Recipe:
    """The recipe with a smaller batch, a warm-up counted in steps made as much shorter as training is, and no generation."""
    settings, batch = train_settings(recipe), pilot_batch(recipe, share)
    accumulation = -(-batch // int(settings["per_device_train_batch_size"]))
    changes = {"per_device_train_batch_size": round(batch / accumulation), "gradient_accumulation_steps": accumulation}
    if settings["warmup_steps"] >= 1:  # below 1 it is a share of the steps
        changes["warmup_steps"] = max(1, round(settings["warmup_steps"] * share * full_batch(recipe) / batch))
    return recipe.model_copy(update={"train": recipe.train | changes,
                                     "evaluate": recipe.evaluate.model_copy(update={"generate_samples": 0})})


def rounded(samples: Sequence[int], names: Sequence[str], share: float, seed: int) -> list[int]:
    """Whole numbers n_t near share x s_t: each is the number below or above, and their sum differs from the sum by less than 1.

    Systematic sampling along the units in an order by (seed, name): E[n_t] = share s_t over seeds.
    """
    order = sorted(range(len(names)), key=lambda i: (generator(seed, "pilot", "order", names[i]).random(), names[i]))
    ends = np.floor(np.cumsum([share * samples[i] for i in order]) + generator(seed, "pilot", "offset").random())
    result = [0] * len(names)
    for i, count in zip(order, np.diff(ends, prepend=0.0), strict=True):
        result[i] = int(count)
    return result


def pilot_mixture(mixture: Mixture, rows_of: Sequence[np.ndarray], share: float, seed: int, files: str) -> Mixture:
    """The mixture with budgets of `share`; rows stay where they are.

    Args:
        rows_of: length in tokens and in response tokens of every training row, int64 [2, rows], by unit.
        seed: the recipe's; which rows make up a budget depends on it, and a larger budget's hold a smaller one's but for
            rounding.
        files: from the folder of the result to that of `mixture`.
    """
    counts = rounded([u.samples for u in mixture.units], [u.name for u in mixture.units], share, seed)
    units = []
    for unit, count, lengths in zip(mixture.units, counts, rows_of, strict=True):
        chosen = budget_indices(unit.rows, count / unit.rows, seed, unit.name)
        tokens, responses = lengths[:, chosen].sum(axis=1)
        units.append(unit.model_copy(update={"epochs": count / unit.rows, "samples": count, "tokens": int(tokens),
                                             "response_tokens": int(responses), "file": files + unit.file}))
    others = {place: [u.model_copy(update={"file": files + u.file}) for u in getattr(mixture, place)]
              for place in ("transfer", "retention")}
    return mixture.model_copy(update={"units": units, **others,
                                      "made_from": {"mixture": mixture.hash, "share": digest([share, seed])}})


def row_lengths(mixture: Mixture, folder: Path) -> list[np.ndarray]:
    """Tokens and response tokens of every training row, int64 [2, rows], by unit."""
    rows = (load_unit(folder / u.file, "train") for u in mixture.units)
    return [np.stack([r.lengths, r.response_lengths]) for r in rows]


@dataclass(frozen=True)
class Job:
    """What one arm trains at one share: rows that each branch sees, and rows of its step."""

    arm: str
    share: float
    branch_rows: tuple[float, ...]
    batch: int

    @property
    def steps(self) -> int:
        return sum(math.ceil(rows / self.batch) for rows in self.branch_rows)


def check_jobs(jobs: Sequence[Job], share: float, workable: float | None) -> None:
    """Every branch needs a whole batch. `workable`: the smallest --share that gives it. Raises RecipeError."""
    short = [f"{job.arm} at {job.share:.3g} of the tokens: its smallest branch would see {min(job.branch_rows):.0f} rows, less "
             f"than one step of {job.batch}" for job in jobs if min(job.branch_rows) < job.batch]
    if short:
        remedy = (f"`--share {workable:g}` works" if workable is not None else
                  f"no share up to {LARGEST_SHARE:g} works: this mixture is too small for a pilot of these arms, "
                  "`anabranch compare` trains them in full")
        raise RecipeError.of(f"--share {share:g} is too little for these arms. Take fewer arms or groups (--methods), or a "
                             f"larger share: {remedy}.", short)


@dataclass(frozen=True)
class Speed:
    """Seconds, tried on this machine."""

    load: float
    step: dict[int, float]  # rows of a step -> forward, backward and optimizer
    evaluation: float  # one model at all places

    def of(self, jobs: Sequence[Job], seeds: int, pulled_back: int) -> float:
        """Of all arms: training; loading for each branch; a merge and its saving, about three loads; evaluation."""
        train = sum(j.steps * self.step[j.batch] + len(j.branch_rows) * self.load for j in jobs)
        return seeds * (train + (len(jobs) + pulled_back) * (3 * self.load + self.evaluation)) + self.evaluation


def try_speed(recipe: Recipe, base: Path, mixture: Mixture, folder: Path, sizes: Sequence[int]) -> Speed:
    """One step of each size and the evaluation of a few units, timed; a model and its optimizer's state are in memory."""
    import torch

    begun = time.perf_counter()
    model = load_model(base, "float32", trust_remote_code=recipe.model.trust_remote_code)
    load = time.perf_counter() - begun
    units = _spread_units(mixture.units, 12)
    rows = Rows.joined([load_unit(folder / u.file, "train") for u in units])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    select = can_select(model)
    steps = {}
    for size in sorted(set(sizes)):
        times = []
        # every fourth row of all units: what a shuffled batch looks like; the first step also warms up
        for turn in range(4):
            picked = generator(0, "pilot", "speed", size, turn).integers(0, len(rows), size)
            begun = time.perf_counter()
            for batch in batches(rows, picked, 1 << 14, device()):
                response_losses(model, batch, select=select)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        steps[size] = float(np.mean(times[1:]))
    evaluation = _evaluation_seconds(recipe, base, mixture, folder, model, select)
    del model, optimizer
    release_memory()
    return Speed(load, steps, evaluation)


def _spread_units(units: Sequence[Unit], count: int) -> list[Unit]:
    return [units[i] for i in np.unique(np.linspace(0, len(units) - 1, count).round().astype(int))]


def _evaluation_seconds(recipe: Recipe, base: Path, mixture: Mixture, folder: Path, model: object, select: bool) -> float:
    """Seconds per row of some units, times all rows that are evaluated."""
    tokenizer = load_tokenizer(base, trust_remote_code=recipe.model.trust_remote_code)
    total = 0.0
    for units in (mixture.units, mixture.transfer, mixture.retention):
        seconds, tried = 0.0, 0
        wanted = sum(min(u.held_out_rows, recipe.evaluate.max_samples) for u in units)
        for unit in _spread_units(units, 6) if units else []:
            held_out = load_unit(folder / unit.file, "held_out")
            chosen = np.arange(min(len(held_out), recipe.evaluate.max_samples))
            if len(chosen):
                begun = time.perf_counter()
                score_unit(model, tokenizer, held_out, chosen, recipe.evaluate.batch_tokens, select=select, answers=None)
                seconds, tried = seconds + time.perf_counter() - begun, tried + len(chosen)
        total += seconds / tried * wanted if tried else 0.0
    return total
