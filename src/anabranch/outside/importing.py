"""Result files -> RUN/benchmarks.json and RUN/benchmarks.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from anabranch.artifacts import write_atomically
from anabranch.errors import RecipeError, closest
from anabranch.outside.artifacts import NOT_SAID, Benchmarks, Score
from anabranch.outside.choices import Choices, Problems
from anabranch.outside.commands import slug_of
from anabranch.outside.lmms_eval import read_lmms_eval
from anabranch.outside.subjects import Subjects, subjects_of
from anabranch.outside.suite import Program
from anabranch.outside.table import disagreements, markdown
from anabranch.outside.vlmevalkit import read_vlmevalkit

READERS: dict[Program, Callable[[str, Path, Choices, Problems], list[Score]]] = {
    "lmms-eval": read_lmms_eval, "VLMEvalKit": read_vlmevalkit}
OPTIONS: dict[Program, str] = {"lmms-eval": "--lmms-eval", "VLMEvalKit": "--vlmevalkit"}


def import_scores(run: Path, places: dict[Program, Sequence[str]], choices: Choices) -> Benchmarks:
    """Read what the programs left, and write RUN/benchmarks.json and RUN/benchmarks.md.

    A model's earlier scores by the same program are replaced; those of other models and of the other program stay.

    Args:
        run: a run folder, or a comparison's.
        places: program -> NAME=PATH of each model; PATH is a folder or one file. Names are never guessed.
    Raises:
        RecipeError: anything that cannot be read without a guess; every problem in one message.
        CorruptedError: no run folder there, or a damaged benchmarks.json.
    """
    subjects, problems = subjects_of(run), Problems()
    new = [score for program, texts in places.items() for name, place in _pairs(program, texts, subjects, problems)
           for score in READERS[program](name, place, choices, problems)]
    new = _once(new, problems)
    _check_subjects(new, subjects, problems)
    unused = sorted(set(choices.metrics) - {s.task for s in new})
    if unused and not problems.lines:
        problems.add(f"--metric: no result has {', '.join(unused)}.")
    path = run / "benchmarks.json"
    old = _earlier(path, subjects)
    fresh = {(s.model, s.program) for s in new}
    scores = sorted([*(s for s in old if (s.model, s.program) not in fresh), *new],
                    key=lambda s: (s.program, s.task, s.model))
    _check_evaluated(scores, problems)
    for line in disagreements(scores):
        problems.add(line)
    if not scores and not problems.lines:
        problems.add("nothing was imported: no score was found.")
    if problems.lines:
        raise RecipeError.of("benchmarks: the results cannot be taken as they are:", problems.lines)
    found = Benchmarks(made_from={"base": subjects.base_hash}, scores=scores)
    found.save(path)
    write_atomically(run / "benchmarks.md", markdown(scores, run.resolve().name).encode())
    return found


def _earlier(path: Path, subjects: Subjects) -> list[Score]:
    """Scores of earlier imports. Raises CorruptedError, and RecipeError for those of another base."""
    if not path.exists():
        return []
    found = Benchmarks.load(path)
    if found.made_from.get("base") != subjects.base_hash:
        raise RecipeError(f"{path}: its scores are of a run on another base, and cannot stand beside this one's. Move it away, "
                          "and import every model again.")
    return found.scores


def _pairs(program: Program, texts: Sequence[str], subjects: Subjects, problems: Problems) -> list[tuple[str, Path]]:
    pairs: dict[str, Path] = {}
    strangers = False
    for text in texts:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            problems.add(f"{OPTIONS[program]} {text}: wanted NAME=PATH, as in base=results/base.")
            strangers = True
        elif name in pairs:
            problems.add(f"{OPTIONS[program]}: `{name}` stands twice.")
        elif name not in subjects.models:
            problems.add(f"{OPTIONS[program]} {text}: no model of this run.{closest(name, list(subjects.models))}")
            strangers = True
        else:
            try:
                where = Path(os.path.abspath(os.path.expanduser(place)))  # VLMEvalKit's folders tell by their names
                where.exists()  # raises where the system cannot take the name
                pairs[name] = where
            except OSError as error:
                problems.add(f"{OPTIONS[program]} {name}={place[:200]}: {error.strerror}.")
    if strangers:
        problems.add(f"The run's models: {', '.join(subjects.models)}.")
    return list(pairs.items())


def _once(scores: list[Score], problems: Problems) -> list[Score]:
    """The same result found in two files is one; two results are a choice that is not ours."""
    kept: dict[tuple[str, str, str], Score] = {}
    for score in scores:
        first = kept.setdefault((score.program, score.model, score.task), score)
        if _measured(first) != _measured(score):
            how = "" if first.score != score.score else " (other questions, metric, judge or version)"
            problems.add(f"{score.model}: {score.program} `{score.task}` has two results: {first.score:g} in {first.file} and "
                         f"{score.score:g} in {score.file}{how}. Give the one file: "
                         f"{OPTIONS[score.program]} {score.model}=FILE.")
    return list(kept.values())


def _measured(score: Score) -> tuple[object, ...]:
    return score.score, score.metric, score.samples, score.judge, score.task_version


def _check_subjects(scores: list[Score], subjects: Subjects, problems: Problems) -> None:
    """A result that says it is of another of the run's models: by its path, or by the name that our own scripts give."""
    owner = {os.path.realpath(path): name for name, path in subjects.models.items()}
    slugs = {slug_of(name): name for name in subjects.models}
    for model, program, evaluated in sorted({(s.model, s.program, s.evaluated) for s in scores}):
        other = (owner.get(os.path.realpath(evaluated)) if os.path.isabs(evaluated) else
                 slugs.get(evaluated) if program == "VLMEvalKit" else None)
        if other is not None and other != model:
            problems.add(f"{OPTIONS[program]} {model}=..: these results are of `{evaluated}`, which is {other} of this run.")


def _check_evaluated(scores: list[Score], problems: Problems) -> None:
    """Two models of the run with the very same result files, or evaluated from one path."""
    seen: dict[object, str] = {}
    for program, model in sorted({(s.program, s.model) for s in scores}):
        own = [s for s in scores if (s.program, s.model) == (program, model)]
        # one small table may well be that of another model, too
        marks: list[object] = [(program, frozenset((s.task, s.sha256) for s in own), own[0].evaluated if len(own) == 1 else "")]
        if program == "lmms-eval" and own[0].evaluated != NOT_SAID:  # VLMEvalKit tells a name that the user gave
            marks.append((program, own[0].evaluated))
        for mark in marks:
            if (first := seen.setdefault(mark, model)) != model:
                problems.add(f"{program}: the results of {first} and of {model} are both of `{own[0].evaluated}`. Is one of "
                             "the paths the other's?")
