"""The whole pipeline on an embedded mixture: what `make demo` runs, and what `anabranch demo --vision` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from anabranch.artifacts import Comparison, Conflict, write_atomically
from anabranch.compare import Arm, arm_folder, parse_arms, run_comparison
from anabranch.demo import CONFLICTING_PAIRS, make_demo
from anabranch.demo.meaning import next_steps, reasons
from anabranch.recipe import load_recipe
from anabranch.report import comparison_markdown, write_report
from anabranch.run import Run, open_run, run_stages

ARMS = "base,joint,joint_matched,joint_batch:4,soup:4,random:4,stratified:4,merit:2"
PICTURE_ARMS = "base,joint,joint_matched,random:4,merit:2"
PICTURE_DIAGNOSTICS = ["displacement", "lmc"]
MINUTES, POINTS = 2.0, 11  # for them; places along each segment
Progress = Callable[[str, str, int, int], None]


def tell_story(folder: Path, *, seeds: int, tell: Callable[[str], None], progress: Progress) -> Path:
    """Make the mixture and a base, run every stage, compare the arms, write the report. Resumable; returns the page."""
    tell("1. A mixture of small tasks, and a tiny base model. " + pairs_line(len(CONFLICTING_PAIRS)))
    recipe_path = make_demo(folder, progress=lambda *a: progress("demo", *a))
    tell(f"   {recipe_path}: the recipe. The rest is what `anabranch run` and `anabranch compare` do with it.\n")
    tell("2. Measure the conflict, split, train the branches, merge once, evaluate.")
    run = open_run(load_recipe(recipe_path), tell=lambda text: tell(f"   {text}"), progress=progress)
    run_stages(run)
    tell("   " + planted_line(run.folder, CONFLICTING_PAIRS) + "\n")
    tell("3. Did it pay? Every arm on the same tokens.\n")
    comparison = run_comparison(run, parse_arms(ARMS), range(seeds))
    tell(comparison_markdown(comparison))
    _explain(run, comparison, CONFLICTING_PAIRS, recipe_path, "4", tell)
    page = write_report(run.folder)
    tell(f"\nThe report, with its pictures: {page}")
    return page


def tell_picture_story(folder: Path, *, seeds: int, tell: Callable[[str], None], progress: Progress,
                       base_steps: int | None = None, arms: str = PICTURE_ARMS) -> Path:
    """The same of pictures, then diagnostics and a sheet of pictures with the models' answers. Resumable; returns the page.

    Args:
        base_steps: as make_picture_demo.
        arms: of the comparison; `joint` must be one, as the sheet has its answers.
    """
    from anabranch.demo import vision
    from anabranch.diagnose.run import run_diagnostics, subject_of_run
    from anabranch.diagnose.subject import Settings

    tell("1. A mixture of questions about pictures, and a tiny vision-language base. "
         + pairs_line(len(vision.CONFLICTING_PAIRS)))
    recipe_path = vision.make_picture_demo(folder, progress=lambda *a: progress("demo", *a), base_steps=base_steps)
    tell(f"   {recipe_path}: the recipe. The rest is what `anabranch run`, `compare` and `diagnose` do with it.\n")
    tell("2. Measure the conflict, split, train the language model's branches, merge once, evaluate.")
    run = open_run(load_recipe(recipe_path), tell=lambda text: tell(f"   {text}"), progress=progress)
    run_stages(run)
    tell("   " + planted_line(run.folder, vision.CONFLICTING_PAIRS))
    tell("   " + fiercest_line(run.folder, vision.CONFLICTING_PAIRS) + "\n")
    tell("3. Did it pay? Every arm on the same tokens.\n")
    comparison = run_comparison(run, parse_arms(arms), range(seeds))
    tell(comparison_markdown(comparison))
    tell("\n4. Is the merge sound?\n")
    settings = Settings(points=POINTS)
    run_diagnostics(subject_of_run(run, settings), run.folder / "diagnostics", settings, only=PICTURE_DIAGNOSTICS,
                    minutes=MINUTES, tell=tell, progress=progress)
    _explain(run, comparison, vision.CONFLICTING_PAIRS, recipe_path, "5", tell)
    tell("\n6. Look at it.\n")
    sheet = _show(run, folder, tell)
    page = write_report(run.folder)
    tell(f"   Questions, pictures and answers, right ones with a tick and wrong ones with a cross: {sheet}\n"
         f"   The report, with its pictures: {page}")
    return page


def pairs_line(count: int) -> str:
    """What the planted pairs are: they disagree, and a model that reads the question can serve both."""
    return (f"{count} pairs of tasks ask the same but for one word, and never want the same answer. That word tells which is "
            "wanted, so one model can learn both; the base has met each question with and without it, answered either way.")


def _explain(run: Run, comparison: Comparison, pairs: Sequence[tuple[str, str]], recipe: Path, step: str,
             tell: Callable[[str], None]) -> None:
    """Why it came out so, and what to try next: sentences from the run's own figures."""
    why, further = reasons(run.folder, comparison, pairs), next_steps(run.folder, comparison, recipe, run.recipe.mixture.epochs)
    tell(f"\n{step}. Why it came out so, by this run's figures.\n")
    for line in why:
        tell(f"   - {line}")
    if further:
        tell("   What these figures say of what to try next:")
    for line in further:
        tell(f"   - {line}")


def _show(run: Run, folder: Path, tell: Callable[[str], None]) -> Path:
    """Make the sheet, and say in words what it shows; returns its path."""
    from anabranch.demo.sheet import answered, draw_sheet, losses_by_sight, questions, right_answers, rows_with_pictures

    joint = arm_folder(run, Arm("joint", "joint"), 0) / "merged"
    models = {"base": run.base, "joint": joint, "merged": run.folder / "merged"}
    asked = answered(questions(run.recipe.seed), models)
    path = folder / "pictures.png"
    write_atomically(path, draw_sheet(asked))
    units, rows = rows_with_pictures(run)
    tell(f"   Losses on the held-out rows of the {units} units with pictures ({rows:,} rows), mean over units; those of step 3 "
         f"are over all {len(run.mixture.units)} units.")
    for name, model in models.items():
        own, others = losses_by_sight(run, model)
        tell(f"   {name}: loss {own:.3f} with their own pictures, {others:.3f} with those of other rows: "
             f"{'it looks' if others > 1.1 * own else 'it hardly looks'}.")
    told = ", ".join(f"{name} {count}" for name, count in right_answers(asked).items())
    tell(f"   Of {len(asked)} questions on the sheet (the first held-out row of each task), answered in the very words: "
         f"{told}.")
    return path


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


def fiercest_line(run: Path, pairs: Sequence[tuple[str, str]]) -> str:
    """The most conflicting pairs, as many as were planted, and how many of them were."""
    ranked = ranked_pairs(run)[: len(pairs)]
    planted = {frozenset(pair) for pair in pairs}
    told = ", ".join(f"{a}/{b} {value:.2f}" for a, b, value in ranked[:3])
    found = sum(frozenset((a, b)) in planted for a, b, _ in ranked)
    return f"Of the {len(ranked)} most conflicting pairs {found} were planted; the first: {told}."


def ranked_pairs(run: Path) -> list[tuple[str, str, float]]:
    """Every two units and the cosine of their gradients, the most conflicting first."""
    conflict = Conflict.load(run / "conflict" / "conflict.json")
    cosine = load_file(run / "conflict" / "conflict.safetensors")["cosine"]
    pairs = [(a, b, float(cosine[i, j])) for (i, a), (j, b) in combinations(enumerate(conflict.units), 2)]
    return sorted(pairs, key=lambda pair: (pair[2], pair[:2]))
