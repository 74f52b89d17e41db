"""Result files of lmms-eval.

Layout (EvolvingLMMs-Lab/lmms-eval: `lmms_eval/loggers/evaluation_tracker.py`, save_results_aggregated, and
`lmms_eval/evaluator.py`, evaluate and simple_evaluate): OUTPUT_PATH/MODEL_NAME_SANITIZED/DATE_results.json, one object with

    results            task -> {"alias": .., "METRIC,FILTER": value, "METRIC_stderr,FILTER": value}
    groups, group_subtasks, configs, versions (task -> version), n-shot, higher_is_better (task -> metric -> bool)
    n-samples          task -> {"original": .., "effective": ..}
    config             {"model": .., "model_args": .., "limit": ..}      git_hash, date, model_name, model_source
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from anabranch.outside.artifacts import NOT_SAID, Score
from anabranch.outside.choices import Choices, Problems, in_points
from anabranch.outside.reading import count, number, parse, read_plain, said
from anabranch.outside.suite import Metric, benchmark_of

MOST_BYTES = 256 * 2**20


def read_lmms_eval(model: str, place: Path, choices: Choices, problems: Problems) -> list[Score]:
    """Scores of one model.

    Args:
        model: of the run.
        place: a `.._results.json`, or a folder that has such files anywhere below it.
        problems: gets everything that cannot be read without a guess.
    """
    files = sorted(place.rglob("*_results.json")) if place.is_dir() else [place] if place.is_file() else []
    if not files:
        problems.add(f"{model}: {place}: no lmms-eval result there (..._results.json).")
    scores = [score for file in files for score in _read_file(model, file, place, choices, problems)]
    names = sorted({s.evaluated for s in scores})
    if len(names) > 1:
        problems.add(f"{model}: {place} holds results of several models: {', '.join(names)}. Give each its own folder or file.")
    return scores


def _read_file(model: str, file: Path, place: Path, choices: Choices, problems: Problems) -> list[Score]:
    try:
        data = read_plain(file, MOST_BYTES)
        content = parse(data)
        results = content["results"]
        if not isinstance(results, dict) or not all(isinstance(v, dict) for v in results.values()):
            raise ValueError("`results` is no mapping of tasks")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problems.add(f"{file}: not a result of lmms-eval ({type(error).__name__}: {error}).")
        return []
    groups = set(_mapping(content, "groups")) | {name for name, of in _mapping(content, "group_subtasks").items() if of}
    shared = {"program_version": _text(content.get("git_hash")), "evaluated": _evaluated(content),
              "file": said(file.relative_to(place) if place.is_dir() else file.name),
              "sha256": hashlib.sha256(data).hexdigest()}
    scores = []
    for task, values in sorted(results.items()):
        if task in choices.skip or (task in groups and task not in choices.metrics):
            continue
        if (score := _score(model, task, values, content, shared, choices, problems, str(file))) is not None:
            scores.append(score)
    return scores


def _score(model: str, task: str, values: dict[str, Any], content: dict[str, Any], shared: dict[str, Any], choices: Choices,
           problems: Problems, where: str) -> Score | None:
    numbers = {name: v for name, value in values.items() if "_stderr" not in name and (v := number(value)) is not None}
    known = benchmark_of("lmms-eval", task)
    metric = choices.metrics.get(task) or (known.lmms if known else None)
    name = _chosen(metric, numbers) if metric else None
    if metric is None or name is None:
        problems.unknown(where, task, sorted(numbers))
        return None
    points = in_points(numbers[name], metric, asked=task in choices.metrics,
                       relative=known is not None and known.relative)
    if isinstance(points, str):
        problems.add(f"{where}: `{task}`, `{said(name)}`: {points}. Say --metric '{task}={said(name)}' for points of 100, "
                     f"'{task}={said(name)}*100' for a share of 1, or --skip '{task}'.")
        return None
    if _mapping(_mapping(content, "higher_is_better"), task).get(name.split(",")[0]) is False:
        problems.add(f"{where}: `{task}`: lower is better for `{said(name)}`; it cannot stand in an average with the others. "
                     f"Say --skip '{task}'.")
        return None
    counts = _mapping(_mapping(content, "n-samples"), task)
    return Score(model=model, program="lmms-eval", task=task, metric=said(name), score=points,
                 samples=count(counts.get("effective")), samples_of=count(counts.get("original")),
                 task_version=_text(_mapping(content, "versions").get(task)), **shared)


def _chosen(metric: Metric, numbers: dict[str, float]) -> str | None:
    """The one entry of that metric: `METRIC,FILTER` in full, or of one filter only."""
    for wanted in metric.names:
        if wanted in numbers:
            return wanted
        found = [name for name in numbers if name.rpartition(",")[0] == wanted]
        if len(found) == 1:
            return found[0]
    return None


def _evaluated(content: dict[str, Any]) -> str:
    name = content.get("model_name") or _mapping(content, "config").get("model_args") or content.get("model_source")
    return said(name or "") or NOT_SAID


def _mapping(content: dict[str, Any], key: str) -> dict[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str | None:
    return None if value is None or isinstance(value, (dict, list)) else said(value, 100)
