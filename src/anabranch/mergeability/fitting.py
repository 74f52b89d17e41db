"""Files in, files out: table.csv -> predictor.json -> predictions.json, suggestion.json. All is done before any is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anabranch.artifacts import file_digest
from anabranch.errors import OutputError, RecipeError, closest
from anabranch.mergeability.artifacts import Metrics, Predictions, Predictor, Suggestion
from anabranch.mergeability.metrics import METRICS
from anabranch.mergeability.predict import RuleName, complete, make_predictor, predict, recognised, regressors
from anabranch.mergeability.sets import pair_scores, set_trials, suggest
from anabranch.mergeability.table import Table, read_sets, read_table, table_of_metrics
from anabranch.mergeability.trial import DRAWS, LeftOutPairs, trials

# A column of published tables that is the mean of two others, and is in no published fit.
REDUNDANT = "right_subspace_overlap"


@dataclass(frozen=True)
class Fitted:
    """`table`: its complete rows. `unknown`: columns that are no metric of ours, and were taken as metrics."""

    predictor: Predictor
    table: Table
    unknown: list[str]
    figures: list[Path]


def fit_table(path: Path, rule: str = "ours", methods: Sequence[str] | None = None, *, base_scores: str | None = None,
              config: str | None = None, drop_missing: bool = False, sets: Path | None = None, draws: int = DRAWS,
              seed: int = 0, output: Path, progress: Callable[[str, int, int], None] | None = None) -> Fitted:
    """Fit, judge on tasks left out, draw, write `output` and its figures.

    Args:
        path: a CSV as `table.read_table` takes it; `base_scores` and `config` are handed on.
        rule: `ours` or `published`.
        sets: measured merges of more than two models, to be predicted from the pairs.
        draws: times that several tasks are left out at once.

    Raises:
        RecipeError: the table, its missing cells, the number of its tasks, or what is asked of it; nothing is written.
        OutputError: `output` cannot be written.
    """
    name = _rule(rule)
    files = {"table": path, "sets": sets, "base_scores": Path(base_scores.rpartition(":")[0]) if base_scores else None}
    _check_output(output, [f for f in files.values() if f])
    if sets and name != "ours":
        raise RecipeError("--sets: sets are put together from what each task keeps, and the published rule scores pairs only. "
                          "Fit with --rule ours.")
    whole = read_table(path, base_scores=base_scores, config=config)
    whole.metrics.pop(REDUNDANT, None)
    table, chosen, dropped = complete(whole, methods, drop_missing=drop_missing)
    measured = read_sets(sets) if sets else []
    predictor = make_predictor(table, chosen, name, dropped=dropped, seed=seed)
    judged, left_out = trials(table, chosen, name, draws=draws, seed=seed, progress=progress)
    of_sets = set_trials(pair_scores(predictor, whole), measured) if measured else {}
    made_from = {what: file_digest(file) for what, file in files.items() if file}
    predictor = predictor.model_copy(update={"trials": judged, "sets": dict(of_sets), "made_from": made_from,
                                             "settings": {"seed": seed, "draws": draws}})
    predictor.save(output)
    figures = _draw(predictor, table, left_out, output)
    return Fitted(predictor, table, sorted(set(table.metrics) - set(METRICS)), figures)


def _rule(rule: str) -> RuleName:
    if rule == "ours":
        return "ours"
    if rule == "published":
        return "published"
    raise RecipeError(f"--rule: got `{rule}`.{closest(rule, ('ours', 'published'))}")


def _draw(predictor: Predictor, table: Table, left_out: Mapping[str, LeftOutPairs], output: Path) -> list[Path]:
    """OUTPUT-measured.png (where tasks were left out), OUTPUT-coefficients.png, OUTPUT-tasks.png."""
    from anabranch.report import mergeability_figures as figures

    names, coefficients = fingerprint(predictor)
    methods = list(coefficients)
    stacked = np.stack(list(coefficients.values()), axis=1)
    pictures = {"coefficients": figures.fingerprint_picture(names, methods, stacked, by_method=True),
                "tasks": figures.task_picture(table.tasks, [(m, square(table, m)) for m in methods])}
    if left_out:
        pictures["measured"] = figures.agreement_picture([
            figures.Agreement(m, p.measured, p.predicted, np.where(p.said, p.low, np.nan), np.where(p.said, p.high, np.nan))
            for m, p in left_out.items()])  # no bar: cannot say
    paths = []
    for name, picture in sorted(pictures.items()):
        paths.append(output.with_name(f"{output.stem}-{name}.png"))
        figures.save_picture(picture, paths[-1])
    return paths


def fingerprint(predictor: Predictor) -> tuple[list[str], dict[str, np.ndarray]]:
    """Inputs, and per method the sum of each input's coefficients, signed so that more of it means a better merge."""
    names = list(dict.fromkeys([c.name for c in predictor.columns] + [m for r in predictor.published for m in r.weights]))
    place = {name: k for k, name in enumerate(names)}
    found = {}
    for own in predictor.ours:
        found[own.method] = np.zeros(len(names))
        for name, beta in zip(regressors(predictor), own.beta, strict=True):
            found[own.method][place[name]] -= beta  # beta is of what is lost
    for paper in predictor.published:
        found[paper.method] = np.array([paper.weights[n] for n in names])
    return names, found


def square(table: Table, method: str) -> np.ndarray:
    """(T, T) measured normalised scores; NaN where a pair is not in the table."""
    found = np.full((len(table.tasks), len(table.tasks)), np.nan)
    found[table.first, table.second] = found[table.second, table.first] = table.normalised(method)
    return found


def _check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Before hours of work, not after."""
    if same := [str(f) for f in inputs if f.resolve() == output.resolve()]:
        raise OutputError(f"--output {output} would replace {same[0]}, which is read. Give another name.")
    if output.is_dir():
        raise OutputError(f"{output} is a folder; wanted the name of a JSON file. Give --output another.")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError(f"{output}: nothing can be written in {there}. Give --output another.")


def read_query(path: Path, base_scores: str | None = None, config: str | None = None) -> Table:
    """metrics.json, or a CSV table, whose outcomes (if any) are not looked at.

    Raises:
        RecipeError, CorruptedError: neither of the two.
    """
    if path.suffix.lower() == ".csv":
        return read_table(path, base_scores=base_scores, config=config)
    if base_scores or config:
        raise RecipeError("--base-scores and --config are for CSV tables; metrics.json has its own base scores.")
    if not path.is_file():
        raise RecipeError(f"{path}: no such file. Wanted metrics.json, from `anabranch mergeability measure`, or a CSV table.")
    kind = _kind(path)
    if kind not in ("mergeability_metrics", "mergeability_predictor"):
        raise RecipeError(f"{path}: neither metrics.json, from `anabranch mergeability measure`, nor a CSV table"
                          + (f" (it says that it is {kind})." if kind else "."))
    if kind == "mergeability_predictor":
        raise RecipeError(f"{path} is a predictor; wanted the metrics of models: `anabranch mergeability measure` makes them. "
                          "The predictor comes first, then the metrics.")
    return table_of_metrics(Metrics.load(path))


def read_predictor(path: Path, methods: Sequence[str] | None = None) -> Predictor:
    """Only some of its methods, if `methods` says so.

    Raises:
        RecipeError: a method that it does not have. CorruptedError: no predictor.
    """
    if _kind(path) == "mergeability_metrics":
        raise RecipeError(f"{path} holds metrics; wanted a predictor: `anabranch mergeability fit` makes one. The predictor "
                          "comes first, then the metrics.")
    if not path.is_file():
        raise RecipeError(f"{path}: no such file. Wanted predictor.json, from `anabranch mergeability fit`.")
    found = Predictor.load(path)
    if methods is None:
        return found
    known = [r.method for r in found.ours] + [r.method for r in found.published]
    if problems := [f"`{m}`.{closest(m, known)}" for m in methods if m not in known]:
        raise RecipeError.of(f"{path} knows no such merge method:", problems)
    return found.model_copy(update={"ours": [r for r in found.ours if r.method in methods],
                                    "published": [r for r in found.published if r.method in methods]})


def _kind(path: Path) -> str:
    """What a JSON file says it is; '' where it says nothing, or is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return ""
    return str(value.get("kind", "")) if isinstance(value, dict) else ""


def predict_file(predictor: Path, metrics: Path, methods: Sequence[str] | None, base_scores: str | None, config: str | None,
                 output: Path) -> Predictions:
    """Every pair under every method; writes `output`."""
    _check_output(output, [predictor, metrics])
    asked = read_predictor(predictor, methods)
    table = read_query(metrics, base_scores, config)
    found = Predictions(rule=asked.rule, level=asked.level, predictions=predict(asked, table), said=_renamed(asked, table),
                        made_from={"predictor": file_digest(predictor), "metrics": file_digest(metrics)})
    found.save(output)
    return found


def _renamed(predictor: Predictor, table: Table) -> list[str]:
    """Models that bear the name of one of the predictor's, and are not it."""
    other = [t for t, same in zip(table.tasks, recognised(predictor, table), strict=True) if t in predictor.tasks and not same]
    return [f"{', '.join(other)}: called as in the predictor's table, but tuned otherwise or measured on other rows (another "
            "fine-tuning gap), so taken as unseen."] if other else []


def suggest_file(predictor: Path, metrics: Path, k: int, methods: Sequence[str] | None, base_scores: str | None,
                 config: str | None, output: Path) -> Suggestion:
    """The best sets of k; writes `output`."""
    _check_output(output, [predictor, metrics])
    asked = read_predictor(predictor, methods)
    table = read_query(metrics, base_scores, config)
    found = suggest(asked, table, k)
    found = found.model_copy(update={
        "said": found.said + _renamed(asked, table),
        "made_from": {"predictor": file_digest(predictor), "metrics": file_digest(metrics)}})
    found.save(output)
    return found
