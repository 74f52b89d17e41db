"""The whole pipeline on the embedded mixture: what `make demo` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from anabranch.artifacts import Conflict
from anabranch.compare import parse_arms, run_comparison
from anabranch.demo import CONFLICTING_PAIRS, make_demo
from anabranch.recipe import load_recipe
from anabranch.report import comparison_markdown, write_report
from anabranch.run import open_run, run_stages

ARMS = "base,joint,joint_matched,joint_batch:4,soup:4,random:4,stratified:4,merit:2"
Progress = Callable[[str, str, int, int], None]


def tell_story(folder: Path, *, seeds: int, tell: Callable[[str], None], progress: Progress) -> Path:
    """Make the mixture and a base, run every stage, compare the arms, write the report. Resumable; returns the page."""
    tell("1. A mixture of small tasks, some of which want opposite answers to the same prompt, and a tiny base model.")
    recipe_path = make_demo(folder, progress=lambda *a: progress("demo", *a))
    tell(f"   {recipe_path}: the recipe. The rest is what `anabranch run` and `anabranch compare` do with it.\n")
    tell("2. Measure the conflict, split, train the branches, merge once, evaluate.")
    run = open_run(load_recipe(recipe_path), tell=lambda text: tell(f"   {text}"), progress=progress)
    run_stages(run)
    tell("   " + planted_line(run.folder, CONFLICTING_PAIRS) + "\n")
    tell("3. Did it pay? Every arm on the same tokens.\n")
    comparison = run_comparison(run, parse_arms(ARMS), range(seeds))
    tell(comparison_markdown(comparison))
    page = write_report(run.folder)
    tell(f"\nThe report, with its pictures: {page}")
    return page


def planted_line(run: Path, pairs: Sequence[tuple[str, str]]) -> str:
    """Whether the measured conflict finds the pairs that the generator planted."""
    conflict = Conflict.load(run / "conflict" / "conflict.json")
    cosine = load_file(run / "conflict" / "conflict.safetensors")["cosine"]
    place = {name: i for i, name in enumerate(conflict.units)}
    planted = [cosine[place[a], place[b]] for a, b in pairs]
    everything = cosine[np.triu_indices(len(cosine), 1)]
    lower = float(np.mean([np.mean(p < everything) for p in planted]))
    return (f"Planted conflicts: {len(planted)} pairs, mean cosine {np.mean(planted):.2f} against {everything.mean():.2f} "
            f"over all pairs; a planted pair conflicts more than {lower:.0%} of all pairs.")
