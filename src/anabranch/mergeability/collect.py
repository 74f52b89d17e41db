"""`anabranch mergeability collect`: a table of one's own models, from which a predictor can be fitted.

One model per task (unit) of the recipe's mixture, from the recipe's base; every pair merged by every method through the
engine; every merge scored on the held-out rows of its two tasks. What is not done is done, one pair at a time:

    RUN/mergeability/collect.json     methods and settings behind the table: what a later call is held to
    RUN/mergeability/models/TASK-../model  what was tuned
    RUN/mergeability/calibration.jsonl    the calibration rows, for `measure --data`
    RUN/mergeability/metrics.json     the predictor's inputs, measured on calibration rows that nothing else sees
    RUN/mergeability/outcomes.jsonl   one line per scored model (outcomes.py)
    RUN/mergeability/table.csv        one row per finished pair, written anew after each
    RUN/mergeability/sets.csv         the same for sets of k models, where they were asked for

In table.csv `single_score` and `base_score` are of held-out rows, as the outcomes are: they make outcomes comparable, and are
no inputs. What the inputs know of the two, they know from calibration rows (the metrics `fine_tuning_gap1` and `2`).
"""

from __future__ import annotations

import csv
import fcntl
import io
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from anabranch.artifacts import Artifact, BranchManifest, Mixture, Part, digest, write_atomically
from anabranch.branches import train_hash
from anabranch.errors import OutputError, ProvenanceError
from anabranch.evaluate import evaluation_inputs
from anabranch.mergeability.artifacts import Metrics
from anabranch.mergeability.asked import CALIBRATION, Asked, K, ask
from anabranch.mergeability.calibration_rows import token_lines
from anabranch.mergeability.collect_cost import cost_lines
from anabranch.mergeability.data import rows_hash
from anabranch.mergeability.measure import measure
from anabranch.mergeability.models import calibration_rows, folder_of, model_folder, stem, task_mixture, train_models
from anabranch.mergeability.outcomes import BASE, DEFAULT_METHODS, SINGLE, Journal, Method, Outcome, Scorer, choose_methods
from anabranch.mergeability.table import Table, write_table
from anabranch.mixture import build_mixture
from anabranch.model import keep_buffers, load_tokenizer, resolve_model
from anabranch.recipe import Recipe
from anabranch.run import Progress, Run, check_ahead, mixture_stage, open_run, record_recipe
from anabranch.vision import load_vision


class CollectedTask(Part):
    task: str
    rows: int = Field(description="training rows, without those for calibration")
    held_out_rows: int
    sha256: str = Field(description="of its training and held-out rows")


class Collection(Artifact):
    """collect.json. made_from: base, train, evaluation, calibration, merge."""

    kind: Literal["mergeability_collection"] = "mergeability_collection"
    version: Literal[1] = 1
    tasks: list[CollectedTask]
    methods: list[Method]
    score: str = "exp(-mean loss per response token) on held-out rows; single_score and base_score likewise"
    calibration: int = Field(description="rows per task, at most a quarter of its training rows: inputs of a predictor")
    seed: int = Field(description="of rows, training, DARE's draws, and of the order of pairs and sets")


def collect(recipe: Recipe, *, methods: Sequence[str] = DEFAULT_METHODS, tasks: Sequence[str] | None = None,
            pairs: int | None = None, sets: int = 0, k: int = K, calibration: int = CALIBRATION,
            tell: Callable[[str], None] = print, progress: Progress = lambda *_: None) -> Path:
    """Train, merge, score; returns table.csv. Resumable; a later call may ask for more tasks, methods, pairs or sets.

    Args:
        methods: registry names of merge methods, each with its settings of `outcomes.PUBLISHED` or its defaults.
        tasks: units of the mixture; None: all.
        pairs: how many pairs, spread evenly over the tasks; None: all. More of them later go on from these.
        sets: how many sets of `k` tasks to merge besides, drawn by seed.
        calibration: training rows per task that are kept for the inputs of a predictor.
    Raises:
        RecipeError, MixtureError: all that is wrong with what is asked, before anything is trained.
        ProvenanceError: RUN/mergeability was made from another base, data or settings.
        BranchFailed: naming the tasks whose training failed.
    """
    check_ahead(recipe)
    choose_methods(methods, [2, k] if sets else [2])
    run = open_run(recipe, tell=tell, progress=progress)
    with _only_one(folder_of(run)):
        mixture = mixture_stage(run)
        asked = ask(mixture, recipe.seed, methods, tasks, pairs, sets, k, calibration)
        _refuse_other(run, mixture, asked)
        reduced = task_mixture(run, mixture, asked.tasks, calibration)
        record_recipe(run)
        collection = describe(run, reduced, asked)
        collection.save(folder_of(run) / "collect.json")
        keep_buffers()
        models = train_models(run, reduced)
        run.tell(f"train: {len(models)} models, {sum(m.tokens_seen for m in models.values()):,} tokens seen")
        metrics = measure_pairs(run, reduced, models)
        scorer = Scorer(run, reduced, models, Journal.open(folder_of(run) / "outcomes.jsonl"))
        _score_all(scorer, asked, metrics)
    return folder_of(run) / "table.csv"


def collect_forecast(recipe: Recipe, *, methods: Sequence[str] = DEFAULT_METHODS, tasks: Sequence[str] | None = None,
                     pairs: int | None = None, sets: int = 0, k: int = K, calibration: int = CALIBRATION,
                     progress: Progress = lambda *_: None) -> list[str]:
    """Lines for a person; arguments and errors as `collect`. The mixture is made in a folder that is thrown away."""
    check_ahead(recipe)
    choose_methods(methods, [2, k] if sets else [2])
    keep_buffers()
    run = Run(recipe, recipe.output, resolve_model(recipe.model), "dry run", lambda _: None, progress)
    tokenizer = load_tokenizer(run.base, trust_remote_code=recipe.model.trust_remote_code)
    vision = load_vision(run.base, trust_remote_code=recipe.model.trust_remote_code)
    with tempfile.TemporaryDirectory() as name:
        here = replace(run, folder=Path(name))
        mixture = build_mixture(recipe, tokenizer, here.folder / "mixture", vision=vision, base_hash="dry run",
                                progress=lambda *a: progress("mixture", *a))
        asked = ask(mixture, recipe.seed, methods, tasks, pairs, sets, k, calibration)
        reduced = task_mixture(here, mixture, asked.tasks, calibration)
        lines = cost_lines(recipe, run.base, mixture, reduced, folder_of(here) / "mixture", asked)
    lines += _begun(run, asked)
    return [*lines, f"output     {folder_of(run)}",
            "Nothing was written. Without --dry-run the same command starts."]


def _begun(run: Run, asked: Asked) -> list[str]:
    """What an earlier call left. Raises ProvenanceError where its settings were others; rows and base are not looked at."""
    folder = folder_of(run)
    if not (folder / "collect.json").exists():
        return []
    known = Collection.load(folder / "collect.json").made_from
    if changed := [k for k, v in _settings(run, asked.calibration).items() if known.get(k) != v]:
        raise _another(folder, changed)
    journal = folder / "outcomes.jsonl"
    finished = journal.read_bytes().count(b"\n") if journal.exists() else 0
    return [f"done       {finished:,} evaluations are there, and are not made again (they are counted above)"]


def describe(run: Run, mixture: Mixture, asked: Asked) -> Collection:
    """What stands behind the table. `mixture` is without the calibration rows."""
    units = [mixture.unit(t) for t in asked.tasks]
    return Collection(
        tasks=[CollectedTask(task=u.name, rows=u.rows, held_out_rows=u.held_out_rows, sha256=u.sha256) for u in units],
        methods=asked.methods, calibration=asked.calibration, seed=run.recipe.seed, made_from=_inputs(run, asked.calibration))


def _inputs(run: Run, calibration: int) -> dict[str, str]:
    recipe = run.recipe
    evaluation = evaluation_inputs(recipe, run.mixture, "any")
    return {"base": run.base_hash, "evaluation": evaluation["settings"], **_settings(run, calibration)}


def _settings(run: Run, calibration: int) -> dict[str, str]:
    recipe = run.recipe
    return {"training settings": train_hash(recipe), "calibration": digest([calibration, recipe.seed]),
            "merge": digest(recipe.merge.dtype)}


def _refuse_other(run: Run, mixture: Mixture, asked: Asked) -> None:
    """Raises ProvenanceError where what lies in RUN/mergeability is not what the recipe now asks for."""
    path = folder_of(run) / "collect.json"
    if not path.exists():
        return
    known = Collection.load(path)
    changed = [k for k, v in _inputs(run, asked.calibration).items() if known.made_from.get(k) != v]
    if not changed:
        with _scratch(folder_of(run)) as scratch:
            there = {t.task: t.sha256 for t in known.tasks}
            again = [t for t in asked.tasks if t in there]
            units = task_mixture(run, mixture, again, asked.calibration, out=scratch).units if again else []
            changed = [f"rows of {u.name}" for u in units if there[u.name] != u.sha256]
    if changed:
        raise _another(folder_of(run), changed)


def _another(folder: Path, changed: Sequence[str]) -> ProvenanceError:
    return ProvenanceError(
        f"{folder}: this table was begun with another {', another '.join(changed)} than the recipe now asks for. Delete that "
        "folder to collect anew, give the recipe another `output`, or take the change back.")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    place = folder / "checking"
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{folder}: another process is collecting here. Wait for it, or stop it.") from error
        yield


def measure_pairs(run: Run, mixture: Mixture, models: Mapping[str, BranchManifest]) -> Metrics:
    """metrics.json of every pair, on the calibration rows; as it is, if it was made from these models and rows."""
    path, rows = folder_of(run) / "metrics.json", calibration_rows(run, mixture)
    lines = "".join(f"{line}\n" for line in token_lines(rows, folder_of(run)))
    write_atomically(folder_of(run) / "calibration.jsonl", lines.encode())
    made_from = {"models": digest({t: m.files for t, m in models.items()}), "base": run.base_hash,
                 "rows": digest({t: rows_hash(r) for t, r in rows.items()})}
    if path.exists() and (known := Metrics.load(path)).made_from == made_from:
        return known
    names = {stem(u): u.name for u in mixture.units}  # a task may be called what a model given on a command line may not
    folders = {s: model_folder(run, mixture.unit(t)) / "model" for s, t in names.items()}
    found = measure(str(run.base), [f"{s}={folder}" for s, folder in folders.items()], {s: rows[t] for s, t in names.items()},
                    path, samples=max(map(len, rows.values())), seed=run.recipe.seed, tell=run.tell,
                    progress=lambda *a: run.progress("measure", *a))
    found = found.model_copy(update={
        "made_from": made_from, "base": run.recipe.model.path,
        "models": [m.model_copy(update={"task": names[m.task], "folder": str(folders[m.task].relative_to(run.folder))})
                   for m in found.models],
        "pairs": [p.model_copy(update={"task1": names[p.task1], "task2": names[p.task2]}) for p in found.pairs]})
    found.save(path)
    run.tell(f"measure: {len(found.pairs[0].metrics)} metrics of {len(found.pairs)} pairs, on the calibration rows of "
             f"{len(rows)} tasks -> {path}")
    return found


# ---- scores and tables ----------------------------------------------------------------------------------------------


def _score_all(scorer: Scorer, asked: Asked, metrics: Metrics) -> None:
    """Base and single models, then pair by pair, then sets; the tables after each."""
    run, methods = scorer.run, asked.methods
    scorer.outcome(BASE, asked.tasks)
    for done, task in enumerate(asked.tasks):
        run.progress("score", f"the model of {task}", done, len(asked.tasks))
        scorer.outcome(SINGLE, [task])
    total = (len(asked.pairs) + len(asked.sets)) * len(methods)
    done = 0
    for members in [*asked.pairs, *asked.sets]:
        merged = [asked.tasks[i] for i in members]
        fresh = [m for m in methods if scorer.known(m, merged) is None]
        for method in fresh:
            run.progress("merge", f"{' + '.join(merged)}, {method.name}", done + methods.index(method), total)
            scorer.outcome(method, merged)
        done += len(methods)
        if fresh and done <= len(asked.pairs) * len(methods):
            write_pairs(scorer, asked, metrics)
        elif fresh:
            write_sets(scorer, asked)
    write_pairs(scorer, asked, metrics)
    write_sets(scorer, asked)
    shutil.rmtree(folder_of(run) / "merging", ignore_errors=True)
    run.progress("merge", "", total, total)
    whole = _finished(scorer, asked, list(itertools.combinations(range(len(asked.tasks)), 2)))
    more = f" ({len(whole)} in the table, with those of earlier calls)" if len(whole) > len(asked.pairs) else ""
    run.tell(f"collect: {len(asked.pairs)} pairs{more}"
             + (f", {len(asked.sets)} sets of {len(asked.sets[0])}" if asked.sets else "")
             + f" by {', '.join(m.name for m in methods)} -> {folder_of(run) / 'table.csv'}")


def _finished(scorer: Scorer, asked: Asked, groups: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[Outcome]]]:
    """Of these groups of tasks those that every method has merged, with the outcome of each method."""
    found = []
    for group in groups:
        outcomes = [scorer.known(m, [asked.tasks[i] for i in group]) for m in asked.methods]
        whole = [o for o in outcomes if o is not None]
        if len(whole) == len(outcomes):
            found.append((group, whole))
    return found


def write_pairs(scorer: Scorer, asked: Asked, metrics: Metrics) -> None:
    """table.csv: every finished pair of the asked tasks, in their order."""
    measured = {(p.task1, p.task2): p.metrics for p in metrics.pairs}
    names = dict.fromkeys(name for p in metrics.pairs for name in p.metrics)
    rows = _finished(scorer, asked, list(itertools.combinations(range(len(asked.tasks)), 2)))
    base = np.array(_numbers(scorer.outcome(BASE, asked.tasks)))
    single = np.array([_numbers(scorer.outcome(SINGLE, [t]))[0] for t in asked.tasks])
    places = np.array([group for group, _ in rows], int).reshape(len(rows), 2)
    outcomes = {m.name: np.array([_numbers(found[n]) for _, found in rows]).reshape(len(rows), 2)
                for n, m in enumerate(asked.methods)}
    columns = {name: np.array([measured[asked.tasks[i], asked.tasks[j]].get(name, math.nan) for i, j in places])
               for name in names}
    table = Table(asked.tasks, places[:, 0], places[:, 1], columns, single[places], base[places], outcomes)
    write_table(folder_of(scorer.run) / "table.csv", table)


def _numbers(outcome: Outcome) -> list[float]:
    return [math.nan if s is None else s for s in outcome.scores]


def write_sets(scorer: Scorer, asked: Asked) -> None:
    """sets.csv: subset_id, task1 .., method, score1 ..: a row per set and method."""
    if not asked.sets:
        return
    k = len(asked.sets[0])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subset_id", *(f"task{i + 1}" for i in range(k)), "method", *(f"score{i + 1}" for i in range(k))])
    for number, (group, outcomes) in enumerate(_finished(scorer, asked, asked.sets)):
        for outcome in outcomes:
            cells = ["" if s is None else f"{s:.12g}" for s in outcome.scores]
            writer.writerow([number, *(asked.tasks[i] for i in group), outcome.model, *cells])
    write_atomically(folder_of(scorer.run) / "sets.csv", text.getvalue().encode())
