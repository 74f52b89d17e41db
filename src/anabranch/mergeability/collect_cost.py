"""What `collect` would train, merge and score, and what it would cost: for --dry-run. Speed is tried on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import anabranch.merge as maths
from anabranch.artifacts import Mixture
from anabranch.branches import train_settings
from anabranch.engine.checkpoint import Checkpoint
from anabranch.mergeability.asked import Asked
from anabranch.model import load_model
from anabranch.pilot_budget import full_batch, try_speed
from anabranch.recipe import Recipe

START = 10.0  # seconds in which a training process imports what it needs
SAVED = 3  # a merge and its saving take about so many loads
PROBE = (256, 512)  # the matrix whose decomposition is timed


def cost_lines(recipe: Recipe, base: Path, mixture: Mixture, reduced: Mixture, rows: Path, asked: Asked) -> list[str]:
    """What a person wants to know before it begins.

    Args:
        mixture, reduced: with the rows that are set aside for calibration, and without.
        rows: folder of the reduced one.
    """
    load_model(base, trust_remote_code=recipe.model.trust_remote_code)  # the first load also imports the architecture
    count, speed = len(asked.tasks), try_speed(recipe, base, reduced, rows, [full_batch(recipe)])
    units = reduced.units
    batch, passes = full_batch(recipe), float(train_settings(recipe)["num_train_epochs"])
    steps = sum(math.ceil(u.samples * passes / batch) for u in units)
    aside = sum(mixture.unit(u.name).rows - u.rows for u in units)
    held_out = sum(min(u.held_out_rows, recipe.evaluate.max_samples) for u in units)
    shapes = [info.shape for info in Checkpoint.open(base).tensors.values()]
    size = 4 * sum(map(math.prod, shapes))
    decompose = _decomposition(shapes)

    merges = [(len(g), m) for g in [*asked.pairs, *asked.sets] for m in asked.methods]
    spectral = {m.name: maths.METHODS[m.name].block_for(maths.arguments_for(maths.METHODS[m.name], m.parameters)) == "tensor"
                for m in asked.methods}
    train = steps * speed.step[batch] + count * (speed.load) + START
    merge = sum(SAVED * speed.load + (k + 1) * decompose * spectral[m.name] for k, m in merges)
    each = speed.evaluation / count
    score = speed.evaluation + count * (speed.load + each) + sum(speed.load + k * each for k, _ in merges)
    row = speed.evaluation / max(held_out, 1)
    measure = count * (decompose + ((count + 1) * row + 3 * row) * aside / count)
    sets = f" and {len(asked.sets)} sets of {len(asked.sets[0])}" if asked.sets else ""
    return [
        f"tasks      {count}: {sum(u.rows for u in units):,} training rows, {aside:,} set aside for calibration (copies "
        f"of them among these), {held_out:,} held out",
        f"train      {count} models, {recipe.launch.max_parallel} at a time: {steps:,} steps of {batch} rows; about "
        f"{train / recipe.launch.max_parallel:,.0f} s",
        f"measure    every pair of the {count} models; about {measure:,.0f} s",
        f"merge      {len(asked.pairs)} pairs{sets} by {', '.join(m.name for m in asked.methods)}: {len(merges):,} merges; "
        f"about {merge:,.0f} s",
        f"evaluate   the base, {count} models, {len(merges):,} merges: {count + len(merges) + 1:,} evaluations; about "
        f"{score:,.0f} s",
        f"           in all about {train / recipe.launch.max_parallel + measure + merge + score:,.0f} s",
        f"disk       {count * size / 1e9:.2f} GB of models (float32) that stay, as much again while gradients are measured, "
        f"{size / 1e9:.2f} GB for the merge at hand, which is removed once it is scored"]


def _decomposition(shapes: Sequence[Sequence[int]]) -> float:
    """Seconds to decompose all matrices of a model, by the time that one small matrix takes; m n min(m, n) operations."""
    matrix = torch.randn(PROBE, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        torch.linalg.svd(matrix, full_matrices=False)
        times.append(time.perf_counter() - begun)
    work = sum(s[0] * s[1] * min(s) for s in shapes if len(s) == 2)
    return min(times) * work / (PROBE[0] * PROBE[1] * min(PROBE))
