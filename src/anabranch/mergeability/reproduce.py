"""The published study run again on its own tables, ours beside the published figures (arXiv:2601.22285).

A folder of published tables:

    pairs.csv             a table of pairs (table.py) of one configuration
    published_loto.csv    what was published: version,config,experiment,method and the statistics
    published_coefs.csv   average coefficients: version,config,experiment,method,metric,coef_mean,coef_std,nonzero_freq
    subsets5.csv          merges of sets: task1..taskk,method,nacc_avg,published_score
    calibration.csv       metrics by number of calibration rows: n_calibration,task1,task2,<metric>..

The first is wanted, the others are taken where they are. No published figure stands in the code: all come from the files.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from anabranch.errors import RecipeError
from anabranch.mergeability import published as rule
from anabranch.mergeability import published_arms as arms
from anabranch.mergeability.metrics import METRICS, PUBLISHED
from anabranch.mergeability.reproduction import MEAN, Coefficient, Figure, Reproduction, Statistic, minus, reproduction_lines
from anabranch.mergeability.table import Table, read_table

__all__ = ["reproduce", "reproduction_lines"]

METHODS = {"v6": ("weight_avg", "arithmetic", "tsv", "ties", "dare"), "v1": ("weight_avg", "arithmetic", "tsv", "isotropic")}
MAIN = {"v6": "loto_cv_l1_lambda1.0", "v1": "loto_cv_no_leakage(MAIN)"}
TWICE = "right_subspace_overlap"  # the mean of its two variants: a 29th column in v1's L1 runs and in the networks'
CATEGORIES = {"grad_based": "gradient", "activation": "activation", "subspace": "subspace", "task_vector": "task_vector",
              "eff_rank": "effective_rank"}
SLOW_SEEDS = 3  # of selections and networks
CALIBRATED = 10  # rows per task behind the metrics of pairs.csv

_COLUMN: dict[Statistic, str] = {"val_r": "val_r_mean", "val_r_fold_sd": "val_r_std", "train_r": "train_r_mean",
                                 "val_rho": "val_rho_mean", "agg_val_r": "agg_val_r", "n_selected": "n_selected_mean"}


# ---- the published side ----------------------------------------------------------------------------------------------


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _records(path: Path, columns: Sequence[str], config: str) -> list[dict[str, str]]:
    """Rows of one configuration; none where the file is not there."""
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if lost := [c for c in columns if c not in (reader.fieldnames or [])]:
                raise RecipeError(f"{path}: no column {', '.join(lost)}. Got {', '.join(reader.fieldnames or [])}.")
            return [row for row in reader if row.get("config", config) == config]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(f"{path}: cannot be read ({error}).") from error


def _first_config(path: Path) -> str:
    """Of a table that was read already; empty where it has no such column."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        return next((row.get("config") or "" for row in csv.DictReader(file)), "")


@dataclass(frozen=True)
class _Published:
    """Figures by (version, experiment, method), and coefficients by metric."""

    figures: dict[tuple[str, str, str], dict[str, str]]
    coefficients: dict[tuple[str, str, str], dict[str, tuple[float, float | None]]]

    def versions(self) -> set[str]:
        return {version for version, _, _ in self.figures}

    def value(self, version: str, experiment: str, method: str, column: str) -> float | None:
        """`mean` is over the version's methods, if all are known."""
        if method == MEAN:
            each = [self.value(version, experiment, m, column) for m in METHODS[version]]
            known = [v for v in each if v is not None]
            return sum(known) / len(known) if len(known) == len(each) else None
        return _number(self.figures.get((version, experiment, method), {}).get(column))

    def matrix(self, version: str, experiment: str, metrics: Sequence[str]) -> np.ndarray | None:
        """Average coefficients [K, m], where all are known."""
        found = [self.coefficients.get((version, experiment, method), {}) for method in METHODS[version]]
        if not metrics or any(name not in one for one in found for name in metrics):
            return None
        return np.array([[one[name][0] for name in metrics] for one in found])


def _published(folder: Path, config: str) -> _Published:
    names = ("version", "config", "experiment", "method")
    figures = {(r["version"], r["experiment"], r["method"]): r
               for r in _records(folder / "published_loto.csv", (*names, *_COLUMN.values()), config)}
    coefficients: dict[tuple[str, str, str], dict[str, tuple[float, float | None]]] = {}
    for r in _records(folder / "published_coefs.csv", (*names, "metric", "coef_mean", "nonzero_freq"), config):
        if (value := _number(r["coef_mean"])) is not None:
            at = coefficients.setdefault((r["version"], r["experiment"], r["method"]), {})
            at[r["metric"]] = value, _number(r["nonzero_freq"])
    return _Published(figures, coefficients)


# ---- the experiments -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """What an experiment runs on."""

    study: rule.Study
    folds: rule.Folds
    found: rule.Moments

    @classmethod
    def of(cls, study: rule.Study, folds: rule.Folds | None = None) -> _Bench:
        folds = folds or rule.leave_one_task_out(study)
        return cls(study, folds, rule.moments(study, folds))


_Run = Callable[[_Bench, Sequence[int]], tuple[np.ndarray | None, np.ndarray | None]]  # coefficients, or else scores


@dataclass(frozen=True)
class _Arm:
    """An experiment: its upstream name, ours, its columns, how it runs, on how many seeds at most, and its folds."""

    name: str
    words: str
    metrics: Sequence[str]
    run: _Run
    seeds: int | None = None
    pairwise: bool = False


def _linear(how: rule.Descent) -> _Run:
    return lambda b, seeds: (rule.fit(b.study, b.folds, how, seeds, b.found), None)


def _selection(forward: bool, tell: Callable[[str], None]) -> _Run:
    return lambda b, seeds: (arms.select(b.study, b.folds, b.found, seeds, forward=forward, tell=tell), None)


def _network(b: _Bench, seeds: Sequence[int]) -> tuple[None, np.ndarray]:
    return None, arms.network(b.study, b.folds, b.found, seeds)


def _category(name: str, metrics: Iterable[str]) -> list[str]:
    return [m for m in metrics if (m == TWICE and name == "subspace") or (m in METRICS and METRICS[m].category == name)]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _but(name: str, metrics: Sequence[str]) -> list[str]:
    """All but a category."""
    gone = set(_category(name, metrics))
    return [m for m in metrics if m not in gone]


def _squared(b: _Bench, seeds: Sequence[int]) -> tuple[np.ndarray, None]:
    return arms.squared_error(b.study, b.folds, b.found, seeds), None


def _columns(table: Table) -> list[str]:
    """The published metrics that the table has."""
    return [m for m in (*PUBLISHED, TWICE) if m in table.metrics]


def _arms(version: str, table: Table, tell: Callable[[str], None]) -> list[_Arm]:
    wide = _columns(table)
    narrow = [m for m in wide if m != TWICE]
    plain = replace(rule.V6, penalty=0.0)
    backward = _Arm("loto_cv_reverse_greedy_selection", "backward elimination", narrow if version == "v6" else wide,
                    _selection(False, tell), SLOW_SEEDS)
    if version == "v6":
        return [
            _Arm(MAIN["v6"], "L1, penalty 1", narrow, _linear(rule.V6)),
            _Arm("loto_cv_l1_lambda0.0", "no L1", narrow, _linear(plain)),
            _Arm("least_squares", "least squares (= optimum of no L1)", narrow,
                 lambda b, _: (rule.least_squares(b.study, b.folds, b.found), None), 1),
            _Arm("lasso", "lasso, nested (L1 well posed)", narrow,
                 lambda b, _: (arms.lasso(b.study, b.folds, b.found), None), 1),
            _Arm("loto_cv_mse", "squared error, no intercept, Σw = 1", narrow, _squared),
            _Arm("mlp", "network, epoch by held-out error (leaks)", wide, _network, SLOW_SEEDS),
            backward,
            *(_Arm(f"l1_loto_cv_no_{name}", f"L1 without {_plain(category)}", _but(category, narrow), _linear(rule.V6))
              for name, category in CATEGORIES.items()),
        ]
    return [
        _Arm(MAIN["v1"], "main: Σw = 1, no L1", narrow, _linear(rule.V1)),
        *(_Arm(f"loto_cv_l1_lambda{size}", f"L1, penalty {size}", wide, _linear(replace(rule.V6, penalty=size)))
          for size in (0.1, 0.3, 0.5, 1.0, 1.5)),
        _Arm("loto_cv_greedy_selection", "forward selection", wide, _selection(True, tell), SLOW_SEEDS),
        backward,
        _Arm("loto_cv_mse", "squared error, no intercept, Σw = 1", wide, _squared),
        *(_Arm(f"loto_cv_no_{name}", f"Σw = 1 without {_plain(category)}", _but(category, wide), _linear(rule.V1))
          for name, category in CATEGORIES.items()),
        *(_Arm(f"loto_cv_{name}_only", f"Σw = 1, {_plain(category)} alone", _category(category, wide), _linear(rule.V1))
          for name, category in CATEGORIES.items()),
        _Arm("l2to_cv_l1_lambda1.0", "L1, both tasks unseen, one pooled r", wide, _linear(rule.V6), pairwise=True),
    ]


# ---- running them ----------------------------------------------------------------------------------------------------


@dataclass
class _Report:
    """What has been found so far."""

    published: _Published
    figures: list[Figure] = field(default_factory=list)
    coefficients: list[Coefficient] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, version: str, experiment: str, words: str, statistic: Statistic, methods: Sequence[str], values: np.ndarray,
            published: Sequence[float | None]) -> None:
        """A figure per method, from values [methods, seeds]."""
        for method, each, other in zip(methods, values, published, strict=True):
            known = each[np.isfinite(each)]
            self.figures.append(Figure(
                version=version, experiment=experiment, words=words, method=method, statistic=statistic,
                ours=float(known.mean()) if len(known) else None, published=other,
                ours_sd=float(known.std(ddof=1)) if len(known) > 1 else None, seeds=values.shape[1]))

    def find(self, version: str, experiment: str, statistic: Statistic) -> dict[str, Figure]:
        return {f.method: f for f in self.figures
                if (f.version, f.experiment, f.statistic) == (version, experiment, statistic)}


def reproduce(folder: Path, *, seeds: int = 10, normalised: bool = False, tell: Callable[[str], None] = lambda _: None,
              progress: Callable[[str, int, int], None] = lambda *_: None, config: str | None = None) -> Reproduction:
    """Every experiment of the study on the tables of `folder`; about a minute and a half on one core with ten seeds.

    Args:
        seeds: initial draws per experiment; the slow ones use fewer (`Figure.seeds` says how many).
        normalised: fit score(merge) / score(own model), the target the paper names; the published figures are of the raw score.
        config: which rows, where pairs.csv holds several configurations.

    Raises:
        RecipeError: a file is missing or unreadable, or holds too little.
    """
    if seeds < 1:
        raise RecipeError(f"seeds: got {seeds}, wanted at least 1.")
    path = Path(folder) / "pairs.csv"
    table = read_table(path, config=config)
    config = config or _first_config(path)
    found = _published(Path(folder), config)
    report = _Report(found)
    if not found.figures:
        report.notes.append(f"no published figures of config `{config}` in {Path(folder) / 'published_loto.csv'}: ours stand "
                            "alone")
    versions = [v for v in METHODS if set(METHODS[v]) <= set(table.outcomes) and (v == "v6" or v in found.versions())]
    if not versions:
        raise RecipeError(f"{path}: the study's merges are {', '.join(METHODS['v6'])}; in the table: "
                          f"{', '.join(table.methods) or 'none'}. Nothing to run it on.")
    plan = [(v, arm) for v in versions for arm in _arms(v, table, tell)]
    pairs: dict[str, int] = {}
    main: dict[str, tuple[rule.Study, np.ndarray]] = {}
    for done, (version, arm) in enumerate(plan):
        progress(f"{version}: {arm.words}", done, len(plan))
        whole = rule.study(table, METHODS[version], _columns(table), normalised=normalised)
        study = whole.without(set(whole.metrics) - set(arm.metrics))  # the same pairs in every experiment
        w = _experiment(version, arm, study, range(min(seeds, arm.seeds or seeds)), report)
        pairs.setdefault(version, len(study.y))
        if w is not None and arm.name == MAIN[version]:
            main[version] = study, w
    progress("done", len(plan), len(plan))
    for version in versions:
        _changes(version, report)
        _fingerprints(version, *main[version], report)
    if "v6" in main:
        _sets(Path(folder), config, table, *main["v6"], report)
    _calibration(Path(folder), config, table, report)
    return Reproduction(config=config, target="normalised" if normalised else "raw", seeds=seeds, pairs=pairs,
                        figures=report.figures, coefficients=report.coefficients, notes=report.notes)


def _experiment(version: str, arm: _Arm, study: rule.Study, seeds: range, report: _Report) -> np.ndarray | None:
    """Run one, note its figures; returns its coefficients [F, K, S, m]."""
    bench = _Bench.of(study, rule.leave_pair_out(study) if arm.pairwise else None)
    w, scores = arm.run(bench, list(seeds))
    judged = rule.judge(study, bench.folds, rule.predict(bench.found, w) if w is not None else _known(scores))
    statistics: dict[Statistic, np.ndarray] = {"agg_val_r": judged.aggregate_r, "train_r": rule.mean_r(judged.train_r)}
    if not arm.pairwise:
        r = rule.mean_r(judged.val_r)
        statistics = {"val_r": r, **statistics, "val_rho": rule.mean_r(judged.val_rho),
                      "val_r_fold_sd": np.sqrt(np.maximum(rule.mean_r(judged.val_r**2) - r**2, 0.0))}
    if w is not None:
        statistics["n_selected"] = (w != 0).sum(-1).mean(0)
    methods = (*study.methods, MEAN)
    for statistic, values in statistics.items():
        values = np.concatenate([values, values.mean(0, keepdims=True)])
        others = [report.published.value(version, arm.name, m, _COLUMN[statistic]) for m in methods]
        report.add(version, arm.name, arm.words, statistic, methods, values, others)
    if w is not None and arm.name == MAIN[version]:
        _coefficients(version, arm.name, study, w, report)
        _seeded(version, arm.name, report)
    for column, ours in (("n_pairs", len(study.y)), ("n_metrics", len(study.metrics))):
        theirs = report.published.value(version, arm.name, study.methods[0], column)
        if theirs is not None and int(theirs) != ours:
            report.notes.append(f"{version} {arm.words}: {ours} {column[2:]} here, {int(theirs)} in the published run")
    return w


def _known(scores: np.ndarray | None) -> np.ndarray:
    assert scores is not None, "an arm gives coefficients or scores"
    return scores


def _coefficients(version: str, experiment: str, study: rule.Study, w: np.ndarray, report: _Report) -> None:
    for k, method in enumerate(study.methods):
        theirs = report.published.coefficients.get((version, experiment, method), {})
        for i, metric in enumerate(study.metrics):
            each = w[:, k, :, i]
            value, frequency = theirs.get(metric, (None, None))
            report.coefficients.append(Coefficient(
                version=version, experiment=experiment, method=method, metric=metric, ours=float(each.mean()),
                ours_sd=float(each.std()), frequency=float((each != 0).mean()), published=value, published_frequency=frequency))


def _seeded(version: str, main: str, report: _Report) -> None:
    """The published runs over several seeds, beside ours of the main run."""
    names = sorted({e for v, e, _ in report.published.figures if v == version and "_seed" in e})
    for method, figure in report.find(version, main, "val_r").items():
        each = [v for e in names if (v := report.published.value(version, e, method, "val_r_mean")) is not None]
        if each:
            report.figures.append(figure.model_copy(update={
                "experiment": "l1_lambda1.0_seeds", "words": f"L1, penalty 1; the paper's {len(each)} seeds",
                "published": float(np.mean(each)), "published_seeds": len(each),
                "published_sd": float(np.std(each, ddof=1)) if len(each) > 1 else None}))


def _changes(version: str, report: _Report) -> None:
    """What leaving a category out changes."""
    main = report.find(version, MAIN[version], "val_r")
    prefix = "l1_loto_cv_no_" if version == "v6" else "loto_cv_no_"
    for name, category in CATEGORIES.items():
        for method, figure in report.find(version, prefix + name, "val_r").items():
            whole = main[method]
            report.figures.append(figure.model_copy(update={
                "statistic": "change", "words": f"change without {_plain(category)}", "ours": minus(figure.ours, whole.ours),
                "ours_sd": math.hypot(figure.ours_sd, whole.ours_sd or 0.0) if figure.ours_sd is not None else None,
                "published": minus(figure.published, whole.published)}))


def _fingerprints(version: str, study: rule.Study, w: np.ndarray, report: _Report) -> None:
    """Overlap of the leading metrics and agreement of signs: from the published coefficients, and from ours."""
    theirs = report.published.matrix(version, MAIN[version], study.metrics)
    ours = w.mean(axis=0).transpose(1, 0, 2)
    measures: tuple[tuple[Statistic, str, Callable[[np.ndarray], float]], ...] = (
        ("top5", f"common among the {rule.TOP} leading metrics", rule.top_overlap),
        ("signs", "equal signs", rule.sign_agreement))
    for statistic, words, measure in measures:
        report.add(version, MAIN[version], words, statistic, [MEAN], np.array([[measure(c) for c in ours]]),
                   [None if theirs is None else measure(theirs)])
    if theirs is not None:
        r = np.array([rule.correlations(ours[:, k], theirs[k]) for k in range(len(study.methods))])
        report.add(version, MAIN[version], "our coefficients with the published ones", "coefficient_r", study.methods, r,
                   [None] * len(r))


def _sets(folder: Path, config: str, table: Table, study: rule.Study, w: np.ndarray, report: _Report) -> None:
    """Scores of sets: mean score of their pairs; r with the mean normalised accuracy of the merged set."""
    path = folder / "subsets5.csv"
    rows = _records(path, ("task1", "task2", "method", "nacc_avg", "published_score"), config)
    members = [c for c in rows[0] if c.startswith("task") and c[4:].isdigit()] if rows else []
    place = {task: i for i, task in enumerate(table.tasks)}
    if unknown := sorted({row[c] for row in rows for c in members} - set(place)):
        report.notes.append(f"{path.name}: left out, for tasks that pairs.csv does not have: {', '.join(unknown)}")
        return
    x = np.stack([table.metrics[m] for m in study.metrics], axis=1)
    low, span = np.nanmin(x, axis=0), np.nanmax(x, axis=0) - np.nanmin(x, axis=0)
    scaled = rule.scaled(x, low[None], np.where(span > 0, span, 1.0)[None])[0]
    ways = (("raw metrics (as published)", np.nan_to_num(x)), ("metrics scaled to [-1, 1]", np.nan_to_num(scaled)))
    theirs = report.published.matrix("v6", MAIN["v6"], study.metrics)
    makers = {"our": w.mean(axis=0)} | ({} if theirs is None else {"published": theirs[:, None]})
    alike = []
    for k, method in enumerate(study.methods):
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        tasks = np.array([[place[row[c]] for c in members] for row in mine])
        truth, given = (np.array([_number(row[c]) for row in mine], float) for c in ("nacc_avg", "published_score"))
        told = _known_r(given, truth)
        for maker, coefficients in makers.items():
            for words, values in ways:
                scores = [rule.set_scores(tasks, table.first, table.second, values @ one) for one in coefficients[k]]
                raw = values is ways[0][1]
                report.add("v6", "sets", f"{maker} coefficients, {words}", "set_r", [method],
                           np.array([[_known_r(s, truth) for s in scores]]), [told if raw else None])
                if maker == "published" and raw:
                    alike.append(_known_r(scores[0], given))
    if alike:
        report.notes.append("sets: a missing metric counts as 0, as upstream. The published scores and scores made of the "
                            f"published coefficients correlate at {min(alike):.3f} to {max(alike):.3f} (the same run: 1)")


def _known_r(a: np.ndarray, b: np.ndarray) -> float:
    """r over the places where both are known; NaN where there are too few."""
    known = np.isfinite(a) & np.isfinite(b)
    return float(rule.correlations(a[known], b[known])) if known.sum() >= rule.LEAST_ROWS else math.nan


def _calibration(folder: Path, config: str, table: Table, report: _Report) -> None:
    """Rank correlation of a metric from few calibration rows with the same from the most."""
    path = folder / "calibration.csv"
    rows = _records(path, ("n_calibration", "task1", "task2"), config)
    if not rows:
        return
    names = [c for c in rows[0] if c in METRICS]
    sizes = sorted({int(row["n_calibration"]) for row in rows})
    values: dict[int, dict[frozenset[str], list[float]]] = {n: {} for n in sizes}
    for row in rows:
        pair = frozenset((row["task1"], row["task2"]))
        values[int(row["n_calibration"])][pair] = [math.nan if (v := _number(row[c])) is None else v for c in names]
    pairs = [frozenset(table.pair(i)) for i in range(len(table))]
    blank = [math.nan] * len(names)
    columns = {n: np.array([values[n].get(pair, blank) for pair in pairs]) for n in sizes}
    columns.setdefault(CALIBRATED, np.stack([table.metrics.get(c, np.full(len(table), np.nan)) for c in names], axis=1))
    for n in sorted(columns):
        if n != sizes[-1]:
            rho = np.array([[rule.rank_correlation(columns[n][:, i], columns[sizes[-1]][:, i])] for i in range(len(names))])
            report.add("v6", f"calibration_{n}", f"{n} calibration rows per task", "rank_r", names, rho, [None] * len(names))
