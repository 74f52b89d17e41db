"""reproduction.json: the published study's figures, ours beside theirs; and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from scipy.stats import t as student

from anabranch.artifacts import Artifact, Part

MEAN = "mean"
Statistic = Literal["val_r", "val_r_fold_sd", "train_r", "val_rho", "agg_val_r", "n_selected", "change", "top5", "signs",
                    "coefficient_r", "set_r", "rank_r"]


class Figure(Part):
    """One figure, ours beside the published one. Correlations and shares; None is "not known"."""

    version: str
    experiment: str = Field(description="as upstream names it, or ours where upstream has none")
    words: str
    method: str = Field(description="a merge method, `mean` over them, or a metric")
    statistic: Statistic
    ours: float | None = Field(description="mean over seeds")
    ours_sd: float | None = Field(None, description="over seeds, ddof 1; None with one seed or without chance")
    seeds: int
    published: float | None = None
    published_sd: float | None = Field(None, description="over the published seeds, where there are several")
    published_seeds: int = 1


class Coefficient(Part):
    """Of one metric, over the folds (and ours over all seeds)."""

    version: str
    experiment: str
    method: str
    metric: str
    ours: float
    ours_sd: float = Field(description="over folds and seeds, ddof 0")
    frequency: float = Field(description="share of folds and seeds where it is not 0")
    published: float | None = None
    published_frequency: float | None = None


class Reproduction(Artifact):
    """reproduction.json."""

    kind: Literal["mergeability_reproduction"] = "mergeability_reproduction"
    version: Literal[1] = 1
    config: str
    target: Literal["raw", "normalised"]
    seeds: int
    pairs: dict[str, int] = Field(description="version of the paper -> complete pairs")
    figures: list[Figure]
    coefficients: list[Coefficient]
    notes: list[str]


# ---- as text ---------------------------------------------------------------------------------------------------------

_TITLES: dict[Statistic, str] = {
    "val_r": "mean over folds of r within the held-out task's pairs", "change": "change of that r",
    "train_r": "mean over folds of r on the training pairs", "val_rho": "mean over folds of Spearman's rho",
    "val_r_fold_sd": "sd of r over folds", "agg_val_r": "one r over all folds' scores end to end",
    "n_selected": "metrics with a coefficient", "set_r": "r of a set's score with its mean normalised score",
    "coefficient_r": "r of average coefficients"}
# Of these more is shown than r alone.
_DETAILED = ("loto_cv_l1_lambda1.0", "loto_cv_l1_lambda0.0", "loto_cv_no_leakage(MAIN)", "l2to_cv_l1_lambda1.0", "mlp",
             "loto_cv_greedy_selection", "loto_cv_reverse_greedy_selection")
_SHOWN: tuple[Statistic, ...] = ("val_r", "change")
_MAIN_ONLY: tuple[Statistic, ...] = ("train_r", "val_rho", "agg_val_r", "n_selected", "val_r_fold_sd")
LABEL = 57
EXACT = 0.005  # smaller differences need no excuse


def met(figure: Figure) -> bool | None:
    """Whether the published figure is where one more run of ours would be expected (95 %, Student's t); None: not known.

    Without several seeds of ours nothing is known of the spread, and only EXACT counts.
    """
    if figure.ours is None or figure.published is None:
        return None
    room = 0.0
    if figure.ours_sd is not None:
        runs = 1 / figure.seeds + 1 / figure.published_seeds
        both = figure.ours_sd if figure.published_sd is None else figure.published_sd
        spread = math.hypot(figure.ours_sd, both) / math.sqrt(2)
        room = float(student.ppf(0.975, figure.seeds - 1)) * spread * math.sqrt(runs)
    return abs(figure.ours - figure.published) <= max(room, EXACT)


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _cell(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.3f}".replace("-", "−")


def _block(title: str, figures: Sequence[Figure]) -> list[str]:
    """Three lines per experiment: ours, the published figure, the difference; a column per method."""
    if not figures:
        return []
    methods = list(dict.fromkeys(f.method for f in figures))
    width = max(11, *(len(m) + 1 for m in methods))
    lines = ["", title, " " * LABEL + "".join(m.rjust(width) for m in methods) + "  ± seed"]
    for words in dict.fromkeys(f.words for f in figures):
        by = {f.method: f for f in figures if f.words == words}
        last = list(by.values())[-1]
        seeds = f" ({last.seeds} seeds)" if last.seeds > 1 else ""
        cells = {"ours": [_cell(by[m].ours if m in by else None) for m in methods]}
        if any(f.published is not None for f in by.values()):
            cells["published"] = [_cell(by[m].published if m in by else None) for m in methods]
            cells["difference"] = [_cell(minus(by[m].ours, by[m].published) if m in by else None, True) for m in methods]
        for i, (name, values) in enumerate(cells.items()):
            spread = f"  {last.ours_sd:.3f}" if i == 0 and last.ours_sd is not None else ""
            label = (words + seeds)[: LABEL - 1] if i == 0 else ""
            line = label.ljust(LABEL) if i == 0 else name.rjust(LABEL - 1) + " "
            lines.append(line + "".join(v.rjust(width) for v in values) + spread)
    return lines


def reproduction_lines(found: Reproduction) -> list[str]:
    """All of it as tables, and in the end what was met."""
    lines = [f"config {found.config or '(none)'}, target: {found.target} score of the merge, {found.seeds} seeds"]
    if found.target == "normalised":
        lines.append("The published figures are of the raw score, whatever the paper names: a difference is no failure here.")
    for version, count in found.pairs.items():
        mine = [f for f in found.figures if f.version == version]
        for statistic in _SHOWN:
            lines += _block(f"{version}, {count} pairs: {_TITLES[statistic]}", [f for f in mine if f.statistic == statistic])
        for statistic in _MAIN_ONLY:
            lines += _block(f"{version}: {_TITLES[statistic]}", [f for f in mine if f.statistic == statistic
                                                                 and f.experiment in _DETAILED])
        lines += _block(f"{version}: fingerprints from the average coefficients, means over pairs of methods (published: from "
                        "the published coefficients)", [f for f in mine if f.statistic in ("top5", "signs")])
        for statistic in ("coefficient_r", "set_r"):
            lines += _block(f"{version}: {_TITLES[statistic]}", [f for f in mine if f.statistic == statistic])
    lines += _calibration_lines([f for f in found.figures if f.statistic == "rank_r"])
    lines += ["", "Met: the published figure lies where one more seed of ours would (95 %, Student's t; or within 0.005).",
              *_verdicts(found)]
    return lines + [f"note: {note}" for note in found.notes]


def _calibration_lines(figures: Sequence[Figure]) -> list[str]:
    if not figures:
        return []
    sizes = list(dict.fromkeys(f.words for f in figures))
    lines = ["", "rank correlation of a metric with its value from the most calibration rows; rows per task:",
             " " * 38 + "".join(words.split()[0].rjust(8) for words in sizes)]
    for metric in dict.fromkeys(f.method for f in figures):
        by = {f.words: f for f in figures if f.method == metric}
        lines.append(metric.ljust(38) + "".join(_cell(by[w].ours).rjust(8) for w in sizes))
    return lines


def _verdicts(found: Reproduction) -> list[str]:
    """A line per experiment that has published figures: its mean over methods, and how many methods are met."""
    lines = []
    groups = dict.fromkeys((f.version, f.words, f.statistic) for f in found.figures
                           if f.statistic in (*_SHOWN, "top5", "signs", "set_r")
                           or (f.statistic == "agg_val_r" and f.experiment.startswith("l2to")))
    for version, words, statistic in groups:
        mine = [f for f in found.figures if (f.version, f.words, f.statistic) == (version, words, statistic)
                and met(f) is not None]
        if not mine:
            continue
        whole = next((f for f in mine if f.method == MEAN), None)
        each = [f for f in mine if f.method != MEAN]
        count = f"{sum(bool(met(f)) for f in each)} of {len(each)} methods" if each else ""
        said = "met    " if (met(whole) if whole else all(met(f) for f in each)) else "not met"
        means = (f"ours {_cell(whole.ours)} ± {_cell(whole.ours_sd)}, published {_cell(whole.published)}"
                 f"{', ' if count else ''}" if whole else "")
        lines.append(f"  {said} {version} {words}: {means}{count}")
    return lines
