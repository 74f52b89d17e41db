"""Result files of VLMEvalKit.

Layout (open-compass/VLMEvalKit: `run.py`, main; `docs/en/ConfigSystem.md`; `vlmeval/smp/file.py`,
get_intermediate_file_path): WORK_DIR/MODEL/RUN_ID/MODEL_DATASET_*, RUN_ID as T20250101_G1a2b3c4d or T20250101-120000, with
links to the newest of them in WORK_DIR/MODEL. What counts are tables of metrics:

    MODEL_DATASET_acc.csv            multiple choice (`vlmeval/dataset/utils/multiple_choice.py`, report_acc: a row per split,
                                     `Overall` as a share of 1) and VQA (`image_vqa.py`: `Overall` in points)
    MODEL_DATASET_score.csv          LLaVABench (`utils/llavabench.py`: a row per split)
    MODEL_DATASET_JUDGE_score.csv    MMVet, MathVista (`utils/mmvet.py`, `utils/mathvista.py`: a row per skill, `tot`, `acc`)
    the same as .json (EVAL_FORMAT=json: a list of rows), and `_score.json`, `_rating.json` of others (an object)

A number of a table is named as the program's own status.json does (`vlmeval/smp/status_report.py`): `split=dev|Overall`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

from anabranch.outside.artifacts import Score
from anabranch.outside.choices import Choices, Problems, in_points
from anabranch.outside.reading import count, number, parse, read_plain, said
from anabranch.outside.suite import PAPER, Benchmark, Metric

RUN_ID = re.compile(r"T\d{8}(_G[0-9a-fA-F]+|-\d{6})")
ENDING = re.compile(r"_(acc|score|rating)\.(csv|json)$")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)  # float() also takes 4_0 and other scripts' digits
JUDGE = re.compile(r"[A-Za-z0-9.:@+-]+|exact_matching")
MOST_BYTES = 16 * 2**20
LONGEST_NAME = 1000  # of a number: longer ones are nobody's metric, and nested ones would grow without bound


class _Found(NamedTuple):
    file: Path
    dataset: str
    judge: str | None
    known: Benchmark | None


def read_vlmevalkit(model: str, place: Path, choices: Choices, problems: Problems) -> list[Score]:
    """Scores of one model.

    Args:
        model: of the run.
        place: WORK_DIR/MODEL under the name that VLMEvalKit gave it, one RUN_ID below it, or one file of metrics.
        problems: gets everything that cannot be read without a guess.
    """
    folder = place if place.is_dir() else place.parent
    theirs = folder.parent.name if RUN_ID.fullmatch(folder.name) else folder.name
    try:
        files = [place] if place.is_file() else _tables(place, theirs)
    except OSError as error:
        problems.add(f"{model}: {place}: cannot be read ({error.strerror}).")
        return []
    if not files or not all(f.name.startswith(f"{theirs}_") for f in files):
        problems.add(f"{model}: {place}: no VLMEvalKit result there. Wanted WORK_DIR/MODEL, named as VLMEvalKit named it, with "
                     f"files {theirs}_DATASET_acc.csv or .._score.csv in it.")
        return []
    found = [_found(file, theirs, choices) for file in files]
    scores = [score for f in found if f.dataset not in choices.skip
              if (score := _score(model, theirs, f, place, choices, problems)) is not None]
    for dataset in sorted({s.task for s in scores}):
        same = [s for s in scores if s.task == dataset]
        if len({s.judge for s in same}) > 1:
            problems.add(f"{model}: {place}: `{dataset}` was scored by several judges: "
                         f"{', '.join(sorted(s.judge or 'none named' for s in same))}. Give the one file.")
    return scores


def _tables(folder: Path, theirs: str) -> list[Path]:
    """Files of metrics in the model's folder; in its runs where it has none itself."""
    for places in ([folder], [p for p in sorted(folder.iterdir()) if p.is_dir() and RUN_ID.fullmatch(p.name)]):
        files = [f for p in places for f in sorted(p.iterdir())
                 if f.name.startswith(f"{theirs}_") and ENDING.search(f.name) and f.is_file()]
        if files:
            return files
    return []


def _found(file: Path, theirs: str, choices: Choices) -> _Found:
    """Which dataset a file is of. Its name is MODEL_DATASET or MODEL_DATASET_JUDGE, and all three may hold `_`."""
    ending = ENDING.search(file.name)
    rest = file.name[len(theirs) + 1: ending.start() if ending else None]
    for dataset in choices.metrics:
        if rest == dataset or (rest.startswith(f"{dataset}_") and JUDGE.fullmatch(rest[len(dataset) + 1:])):
            return _Found(file, dataset, rest[len(dataset) + 1:] or None, None)
    for known in PAPER:
        judge = rest[len(known.dataset) + 1:]
        if ending and ending[1] == known.kind and (
                rest == known.dataset or (known.judged_file and rest.startswith(f"{known.dataset}_")
                                          and JUDGE.fullmatch(judge))):
            return _Found(file, known.dataset, judge or None, known)
    return _Found(file, rest, None, None)


def _score(model: str, theirs: str, found: _Found, place: Path, choices: Choices, problems: Problems) -> Score | None:
    where, task = str(found.file), found.dataset
    try:
        data = read_plain(found.file, MOST_BYTES)
        numbers = _numbers(data, found.file.suffix)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        problems.add(f"{where}: not a table of metrics ({type(error).__name__}: {error}).")
        return None
    metric = choices.metrics.get(task) or (found.known.vlmevalkit if found.known else None)
    name = _chosen(metric, numbers) if metric else None
    if metric is None or name is None:
        problems.unknown(where, task, sorted(numbers))
        return None
    points = in_points(numbers[name], metric, asked=task in choices.metrics,
                       relative=found.known is not None and found.known.relative)
    if isinstance(points, str):
        problems.add(f"{where}: `{name}`: {points}. Say --metric '{task}={name}' for points of 100, '{task}={name}*100' for a "
                     f"share of 1, or --skip '{task}'.")
        return None
    total = numbers.get("|".join([*name.split("|")[:-1], "tot"]))
    runs = [part for part in found.file.resolve().parts if RUN_ID.fullmatch(part)]
    return Score(model=model, program="VLMEvalKit", task=task, metric=said(name), score=points,
                 samples=count(total), judge=found.judge,
                 program_version=runs[-1] if runs else None, evaluated=said(theirs),
                 file=said(found.file.relative_to(place) if place.is_dir() else found.file.name),
                 sha256=hashlib.sha256(data).hexdigest())


def _chosen(metric: Metric, numbers: dict[str, float]) -> str | None:
    for name in metric.names:
        if name in numbers:
            return name
    return None


def _numbers(data: bytes, suffix: str) -> dict[str, float]:
    """Every number of a table of metrics, by name. Raises ValueError, csv.Error."""
    if suffix == ".csv":
        table = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        if len(set(header := table.fieldnames or ())) < len(header):
            raise ValueError("a column's name stands twice")
        rows: Any = list(table)
        if any(None in row for row in rows):
            raise ValueError("a row has more cells than the table has columns")
    else:
        rows = parse(data)
    out: dict[str, set[float]] = {}
    _flatten(rows, "", out)
    return {name: min(values) for name, values in out.items() if len(values) == 1}  # two rows of one name say nothing


def _flatten(value: Any, prefix: str, out: dict[str, set[float]]) -> None:
    if len(prefix) > LONGEST_NAME:
        return
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        for row in value:
            words = {k: v.strip() for k, v in row.items() if isinstance(v, str) and _number(v) is None}
            dims = "|".join(f"{k}={v}" for k, v in words.items() if v)
            for column, cell in row.items():
                if (found := _number(cell)) is not None:
                    out.setdefault("|".join(x for x in (prefix, dims, str(column)) if x), set()).add(found)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _flatten(inner, f"{prefix}|{key}" if prefix else str(key), out)
    elif prefix and (found := _number(value)) is not None:
        out.setdefault(prefix, set()).add(found)


def _number(cell: Any) -> float | None:
    return number(float(cell)) if isinstance(cell, str) and NUMBER.fullmatch(cell.strip()) else number(cell)
