"""A table of pairs: metrics, the models' own scores, and what merges scored. One CSV row per unordered pair of tasks.

    task1,task2                            what the two models were tuned on
    <metric>                               any other column of numbers
    single_score1,single_score2            the task's own model on its task, in (0, 1]
    base_score1,base_score2                the base on the same rows, in [0, 1]
    <method>_score1,<method>_score2        the merge of the two by that method, on task1 and on task2, in [0, 1]

Published tables say `_acc` where we say `_score`: read as the same. An empty cell is a missing value.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.artifacts import write_atomically
from anabranch.errors import RecipeError, closest
from anabranch.mergeability.artifacts import Metrics
from anabranch.mergeability.metrics import METRICS

KEYS = ("task1", "task2")
SIDES = ("1", "2")
SUFFIXES = ("_score", "_acc")
SINGLE, BASE = "single", "base"
MOST_PROBLEMS = 12
LARGEST = 1e100  # its square is still a number
SAME = 3  # so many cells of one column are told one by one


@dataclass(frozen=True)
class Table:
    """n pairs of T tasks; NaN is a missing value.

    Attributes:
        tasks: names, in order of first appearance.
        first, second: (n,) indices into `tasks`, first != second, each unordered pair once.
        metrics: name -> (n,).
        single, base: (n, 2), scores of the tasks' own models and of the base.
        outcomes: merge method -> (n, 2), scores of the merge on both tasks.
    """

    tasks: list[str]
    first: np.ndarray
    second: np.ndarray
    metrics: dict[str, np.ndarray]
    single: np.ndarray
    base: np.ndarray
    outcomes: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def methods(self) -> list[str]:
        return list(self.outcomes)

    def raw(self, method: str) -> np.ndarray:
        """(n,) mean score of the merge on its two tasks."""
        return np.asarray(self.outcomes[method].mean(axis=1))

    def normalised(self, method: str) -> np.ndarray:
        """(n,) mean over the two tasks of score(merge) / score(the task's own model)."""
        return np.asarray(self.kept(method).mean(axis=1))

    def kept(self, method: str) -> np.ndarray:
        """(n, 2) of either task: score(merge) / score(the task's own model). Above 1 where merging helped."""
        return np.asarray(self.outcomes[method] / self.single)

    def take(self, rows: np.ndarray) -> Table:
        """Some pairs (indices or a mask); the list of tasks stays whole, so indices keep their meaning."""
        return replace(self, first=self.first[rows], second=self.second[rows], single=self.single[rows], base=self.base[rows],
                       metrics={k: v[rows] for k, v in self.metrics.items()},
                       outcomes={k: v[rows] for k, v in self.outcomes.items()})

    def touches(self, tasks: Sequence[int]) -> np.ndarray:
        """(n,) how many of a pair's two tasks are among these: 0, 1 or 2."""
        return np.asarray(np.isin(self.first, tasks).astype(int) + np.isin(self.second, tasks).astype(int))

    def by_task(self, values: np.ndarray) -> np.ndarray:
        """(T,) of (n, 2): a task's value from whichever row has it; NaN where none has."""
        found = np.full(len(self.tasks), math.nan)
        for side, tasks in enumerate((self.first, self.second)):
            known = ~np.isnan(values[:, side])
            found[tasks[known]] = values[known, side]
        return found

    def pair(self, i: int | np.integer[Any]) -> tuple[str, str]:
        return self.tasks[self.first[i]], self.tasks[self.second[i]]


def read_table(path: Path | str, *, base_scores: str | None = None, config: str | None = None) -> Table:
    """A CSV table.

    Args:
        base_scores: `FILE:COLUMN`, where the table has no base_score columns: a CSV with a column `task` and one of scores.
        config: which rows, where a column `config` tells several tables apart.

    Raises:
        RecipeError: the file is not there or no such table; every problem in one message.
    """
    path = Path(path)
    header, rows = _csv(path)
    problems = _header_problems(path, header)
    if problems:
        raise RecipeError.of(f"{path}: not a table of pairs.", problems)
    rows = _one_config(path, header, rows, config)
    at = {name: i for i, name in enumerate(header)}
    numbers = {name: _column(name, at[name], rows, problems) for name in header if name not in (*KEYS, "config")}
    tasks, first, second = _pairs([row[1] for row in rows], at, problems)
    scores, metrics = _split(numbers)
    if base_scores:
        if BASE in scores and not np.isnan(scores[BASE]).all():
            problems.append("has base scores of its own, and others were given with --base-scores: which?")
        scores[BASE] = _base_scores(base_scores, tasks, first, second, problems)
    table = _table(tasks, first, second, metrics, scores)
    problems += _score_problems(table, [line for line, _ in rows])
    if problems:
        shown = problems[:MOST_PROBLEMS]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise RecipeError.of(f"{path}:", shown + more)
    return table


def write_table(path: Path, table: Table) -> None:
    """Twelve significant digits; missing values are empty cells. Written whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns: dict[str, np.ndarray] = dict(table.metrics)
    for name, values in [(SINGLE, table.single), (BASE, table.base), *table.outcomes.items()]:
        columns |= {f"{name}_score{side}": values[:, k] for k, side in enumerate(SIDES)}
    writer.writerow([*KEYS, *columns])
    for i in range(len(table)):
        writer.writerow([*table.pair(i), *(_cell(values[i]) for values in columns.values())])
    write_atomically(path, text.getvalue().encode())


def table_of_metrics(found: Metrics) -> Table:
    """A table without outcomes, from metrics.json.

    Raises:
        RecipeError: it has no pair, or one of a model that it does not know.
    """
    tasks = [m.task for m in found.models]
    lost = sorted({t for p in found.pairs for t in (p.task1, p.task2)} - set(tasks))
    if lost or not found.pairs:
        raise RecipeError(f"the metrics have pairs of models that they do not list: {', '.join(lost)}." if lost else
                          "the metrics hold no pair: at least two models are wanted.")
    seen = Counter(frozenset((p.task1, p.task2)) for p in found.pairs)
    twice = [" and ".join(sorted(pair)) for pair, count in seen.items() if count > 1 or len(pair) < 2]
    if twice or len(set(tasks)) < len(tasks):
        raise RecipeError("the metrics hold a model or a pair twice, or a pair of a model with itself"
                          + (f": {twice[0]}" if twice else "") + ". Measure again, each model once.")
    place = {task: i for i, task in enumerate(tasks)}
    names = list(dict.fromkeys(name for pair in found.pairs for name in pair.metrics))
    known = {m.task: (_nan(m.single_score), _nan(m.base_score)) for m in found.models}
    both = np.array([[known[p.task1], known[p.task2]] for p in found.pairs], float).reshape(len(found.pairs), 2, 2)
    first, second = ([place[task] for task in side] for side in zip(*((p.task1, p.task2) for p in found.pairs), strict=True))
    metrics = {n: np.array([_nan(p.metrics.get(n)) for p in found.pairs]) for n in names}
    return Table(tasks, np.array(first), np.array(second), metrics, both[:, :, 0], both[:, :, 1])


@dataclass(frozen=True)
class MeasuredSet:
    """A merge of k models and its scores on their tasks."""

    tasks: tuple[str, ...]
    method: str
    scores: tuple[float, ...]


def read_sets(path: Path | str) -> list[MeasuredSet]:
    """A CSV of merges of more than two: task1 .. taskK, method, score1 .. scoreK (published: acc1 .. accK).

    Raises:
        RecipeError: no such table; every problem in one message.
    """
    path = Path(path)
    header, rows = _csv(path)
    k = sum(1 for n in header if n.startswith("task") and n[4:].isdigit())
    names = [f"task{i + 1}" for i in range(k)]
    stem = "acc" if "acc1" in header else "score"
    scores = [f"{stem}{i + 1}" for i in range(k)]
    problems = [f"no column `{n}`.{closest(n, header)}" for n in [*names, "method", *scores] if n not in header]
    if k < 2 or problems:
        raise RecipeError.of(f"{path}: not a table of sets.", problems or ["columns task1, task2 .. are wanted"])
    numbers = np.stack([_column(n, header.index(n), rows, problems) for n in scores], axis=1)
    for i, j in np.argwhere(np.isnan(numbers) | (numbers < 0) | (numbers > 1)):
        problems.append(f"line {rows[i][0]}, `{scores[j]}`: wanted a score from 0 to 1")
    if problems:
        raise RecipeError.of(f"{path}:", problems[:MOST_PROBLEMS])
    at = [header.index(n) for n in names]
    return [MeasuredSet(tuple(row[a].strip() for a in at), row[header.index("method")].strip(), tuple(map(float, numbers[i])))
            for i, (_, row) in enumerate(rows)]


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.12g}"


def _csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and (line number, cells) of every row that is not blank."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Wanted a CSV table of pairs, as "
                          "`anabranch mergeability collect` writes.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path}: not a CSV table ({error}).") from error
    ragged = [f"line {line}: {len(row)} cells, the header has {len(header)}" for line, row in rows if len(row) != len(header)]
    if ragged:
        raise RecipeError.of(f"{path}: lines of another length than the header.", ragged[:MOST_PROBLEMS])
    return header, rows


def _header_problems(path: Path, header: Sequence[str]) -> list[str]:
    if not header:
        return ["the file is empty. Wanted a header with task1 and task2"]
    if len(header) == 1 and ";" in header[0]:
        return ["its cells are separated by semicolons; commas are wanted"]
    missing = [key for key in KEYS if key not in header]
    problems = [f"no column `{key}`" + (f".{closest(key, header)}" if len(header) < 13 else ", which names a task")
                for key in missing]
    problems += [f"column {i + 1} has no name" for i, name in enumerate(header) if not name]
    problems += [f"column `{name}` stands twice" for name in sorted({n for n in header if n and header.count(n) > 1})]
    for name in dict.fromkeys(header):
        stem, side = _score_column(name)
        if stem and (other := name[:-1] + ("2" if side == "1" else "1")) not in header:
            problems.append(f"column `{name}` without `{other}`: a merge is scored on both of its tasks")
        if stem and (older := f"{stem}_acc{side}") != name and older in header:
            problems.append(f"columns `{name}` and `{older}` are the same by two names")
        if name and f"{name}1" in header and f"{name}2" in header:
            problems.append(f"column `{name}` beside `{name}1` and `{name}2`: a value is the pair's or either task's, not both")
    return problems


def _one_config(path: Path, header: Sequence[str], rows: list[tuple[int, list[str]]],
                wanted: str | None) -> list[tuple[int, list[str]]]:
    if "config" not in header:
        if wanted:
            raise RecipeError(f"{path}: has no column `config`, and {wanted} was asked for.")
        return rows
    at = list(header).index("config")
    found = list(dict.fromkeys(row[at] for _, row in rows))
    if wanted is None and len(found) > 1:
        raise RecipeError(f"{path}: rows of {len(found)} configs ({', '.join(found)}). Say which with --config.")
    if wanted is not None and wanted not in found:
        raise RecipeError(f"{path}: no rows of config `{wanted}`.{closest(wanted, found)}")
    return [row for row in rows if wanted is None or row[1][at] == wanted]


def _column(name: str, at: int, rows: Sequence[tuple[int, list[str]]], problems: list[str]) -> np.ndarray:
    values, wrong = np.full(len(rows), math.nan), []
    for i, (line, row) in enumerate(rows):
        if text := row[at].strip():
            try:
                values[i] = float(text)
            except ValueError:
                wrong.append(f"line {line}, `{name}`: got `{text}`, wanted a number or an empty cell")
                continue
            if not abs(values[i]) < LARGEST:
                wrong.append(f"line {line}, `{name}`: got {text}, wanted a finite number below {LARGEST:g} or an empty cell")
    if len(wrong) > SAME:
        wrong = [*wrong[:1], f"and so in {len(wrong) - 1} more lines of `{name}`"]
    problems += wrong
    return values


def _pairs(rows: Sequence[Sequence[str]], at: Mapping[str, int],
           problems: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    names = [(row[at["task1"]].strip(), row[at["task2"]].strip()) for row in rows]
    seen: dict[frozenset[str], int] = {}
    for one, two in names:
        if not one or not two:
            problems.append(f"a pair without a name: `{one}`, `{two}`")
        elif one == two:
            problems.append(f"`{one}` with itself: a pair has two tasks")
        seen[frozenset((one, two))] = seen.get(frozenset((one, two)), 0) + 1
    problems += [f"the pair {' and '.join(sorted(pair))} stands {n} times" for pair, n in seen.items() if n > 1]
    tasks = list(dict.fromkeys(name for pair in names for name in pair))
    if len(rows) < 1:
        problems.append("no pairs: at least one row is wanted")
    place = {task: i for i, task in enumerate(tasks)}
    return tasks, np.array([place[a] for a, _ in names], int), np.array([place[b] for _, b in names], int)


def _score_column(name: str) -> tuple[str, str]:
    """('ties', '1') of ties_score1 and of ties_acc1; ('', '') of a metric, of which one is called cross_task_score."""
    for suffix in SUFFIXES:
        if name not in METRICS and name[-1:] in SIDES and name[:-1].endswith(suffix) and name[: -1 - len(suffix)]:
            return name[: -1 - len(suffix)], name[-1]
    return "", ""


def _split(numbers: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Score columns as (n, 2) by what was scored; the other columns are metrics."""
    scores: dict[str, np.ndarray] = {}
    metrics = {}
    for name, values in numbers.items():
        stem, side = _score_column(name)
        if stem:
            both = scores.setdefault(stem, np.full((len(values), 2), math.nan))
            both[:, SIDES.index(side)] = values
        else:
            metrics[name] = values
    return scores, metrics


def _table(tasks: list[str], first: np.ndarray, second: np.ndarray, metrics: dict[str, np.ndarray],
           scores: Mapping[str, np.ndarray]) -> Table:
    missing = np.full((len(first), 2), math.nan)
    return Table(tasks, first, second, metrics, scores.get(SINGLE, missing), scores.get(BASE, missing),
                 {k: v for k, v in scores.items() if k not in (SINGLE, BASE)})


def _score_problems(table: Table, lines: Sequence[int]) -> list[str]:
    problems = []
    for name, values in [(SINGLE, table.single), (BASE, table.base), *table.outcomes.items()]:
        low = 0.0 if name != SINGLE else np.nextafter(0, 1)
        for i, k in np.argwhere((values < low) | (values > 1)):
            problems.append(f"line {lines[i]}: {name}_score{k + 1} is {values[i, k]:g}, wanted "
                            f"{'above 0' if low else '0'} to 1 (accuracy, or exp(-loss))")
    for name, values in [(SINGLE, table.single), (BASE, table.base)]:
        for t, task in enumerate(table.tasks):
            own = np.concatenate([values[table.first == t, 0], values[table.second == t, 1]])
            own = own[~np.isnan(own)]
            if len(own) and own.max() - own.min() > 1e-6:
                problems.append(f"{name} score of {task} is {own.min():g} in one row and {own.max():g} in another: one model, "
                                "one score")
    return problems


def _base_scores(spec: str, tasks: Sequence[str], first: np.ndarray, second: np.ndarray, problems: list[str]) -> np.ndarray:
    missing = np.full((len(first), 2), math.nan)
    name, colon, column = spec.rpartition(":")
    if not colon:
        problems.append(f"base scores: got `{spec}`, wanted FILE:COLUMN, as in tasks.csv:base_score")
        return missing
    header, rows = _csv(Path(name))
    lost = [f"{name}: no column `{c}`.{closest(c, header)}" for c in ("task", column) if c not in header]
    if lost:
        problems.extend(lost)
        return missing
    scores = _column(column, header.index(column), rows, problems)
    named = [row[header.index("task")].strip() for _, row in rows]
    if twice := sorted({t for t in named if named.count(t) > 1}):
        problems.append(f"{name}: more than one row of {', '.join(twice)}")
    known = dict(zip(named, scores.tolist(), strict=True))
    if unknown := [t for t in tasks if math.isnan(known.get(t, math.nan))]:
        problems.append(f"{name}: no {column} for {', '.join(unknown)}")
    each = np.array([known.get(t, math.nan) for t in tasks])
    return np.stack([each[first], each[second]], axis=1)
