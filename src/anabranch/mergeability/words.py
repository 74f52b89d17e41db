"""Predictors, predictions and suggestions in words, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anabranch.errors import RecipeError
from anabranch.mergeability.artifacts import Prediction, Predictions, Suggestion, Trial
from anabranch.mergeability.fitting import Fitted
from anabranch.mergeability.predict import has_gap

UNSEEN = {0: "pairs left out, both tasks seen in others",
          1: "one task left out at a time", 2: "several tasks left out at once; pairs of two of them"}


def listed(text: str | None, option: str = "--methods") -> list[str] | None:
    """'a,b' -> [a, b]; None for all. Raises RecipeError for an empty list."""
    if text is None:
        return None
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise RecipeError(f"{option}: no name given. Wanted one or more, with commas between them.")
    return list(dict.fromkeys(found))


def fit_lines(found: Fitted) -> list[str]:
    p = found.predictor
    lines = [f"{p.pairs} pairs of {len(p.tasks)} tasks, {len(p.ours or p.published)} merge methods"
             + (f"; {p.dropped} pairs with empty cells were left out" if p.dropped else "")]
    if p.rule == "ours" and not has_gap(p):
        lines.append("The table has no base scores, so the rule does not know how far tuning moved each task: the one input "
                     "that says most. Add base_score1 and base_score2, or give --base-scores.")
    if found.unknown:
        lines.append(f"Taken as metrics, though none of ours: {', '.join(found.unknown)}")
    for unseen in (1, 2, 0):
        lines += _trial_lines([t for t in p.trials if t.unseen == unseen], p.rule)
    if not p.trials:
        lines.append("Too few tasks to leave any out: what this predictor is worth is not known.")
    lines += _set_lines(p.sets)
    return lines


def _trial_lines(trials: Sequence[Trial], rule: str) -> list[str]:
    if not trials:
        return []
    methods = list(dict.fromkeys(t.method for t in trials))
    width = max(9, *(len(m) + 2 for m in methods))
    lines = ["", f"{UNSEEN[trials[0].unseen].capitalize()} ({trials[0].folds} folds): mean r within a fold",
             " " * 28 + "".join(m.rjust(width) for m in [*methods, "mean"])]
    for name in dict.fromkeys(t.rule for t in trials):
        lines.append(_row(name, [t.r for t in trials if t.rule == name], width))
    ours = [t for t in trials if t.rule == rule]
    lines.append(" 90 % intervals, points of normalised score")
    for words, field, scale in (("covered, % of pairs", "coverage", 100), ("mean width", "width", 100),
                                ("  knowing only the mean", "naive_width", 100), ("  covered, %", "naive_coverage", 100),
                                ("answered, % of pairs", "answered", 100), ("  of these covered, %", "answered_coverage", 100)):
        values = [getattr(t, field) for t in ours]
        lines.append(_row(words, [None if v is None else v * scale for v in values], width, 1))
    return lines


def _row(name: str, values: Sequence[float | None], width: int, digits: int = 3) -> str:
    known = [v for v in values if v is not None]
    mean = float(np.mean(known)) if len(known) == len(values) and known else None
    return f"  {name:26}" + "".join(("–" if v is None else f"{v:.{digits}f}").rjust(width) for v in [*values, mean])


def _set_lines(sets: dict[str, float]) -> list[str]:
    methods = [name[2:] for name in sets if name.startswith("r ")]
    if not methods:
        return [f"Too few of the measured sets could be predicted to judge by ({sets['not predicted']:.0f} rows could not): a "
                "task, a method or a metric of theirs is missing in the table."] if sets else []
    lines = ["", "Measured sets, from their pairs' predictions (tasks and pairs were in the fit; the sets were not):",
             " " * 28 + "        r    error   regret (of a random set), points"]
    lines += [f"  {m:26}{sets[f'r {m}']:9.3f}{100 * sets[f'error {m}']:9.1f}{100 * sets[f'regret {m}']:9.1f}"
              f" ({100 * sets[f'regret of random {m}']:.1f})" for m in methods]
    if sets["not predicted"]:
        lines.append(f"  not predicted, because a task, a method or a metric of theirs is missing in the table: "
                     f"{sets['not predicted']:.0f} merges")
    if "regret" in sets:
        lines.append(f"  choosing the method of each of {sets['sets']:.0f} sets: regret {100 * sets['regret']:.2f} points; at "
                     f"random {100 * sets['regret of random']:.2f}; always the one that is best on average "
                     f"{100 * sets['regret of the best method on average']:.2f}")
        lines.append(f"  choosing set and method: regret {100 * sets['regret of the best set']:.2f} points; at random "
                     f"{100 * sets['regret of a random set']:.2f}")
    return lines


def prediction_lines(found: Predictions) -> list[str]:
    """A line per pair; reasons for `cannot say` are numbered and stand below."""
    by_pair: dict[tuple[str, str], list[Prediction]] = {}
    for p in found.predictions:
        by_pair.setdefault((p.task1, p.task2), []).append(p)
    reasons: dict[str, int] = {}
    lines = [f"Normalised score of the merge, 1 = both tasks as good as with their own models, and its "
             f"{100 * found.level:.0f} % interval."]
    for (one, two), predictions in by_pair.items():
        lines.append(f"{one} + {two}")
        lines += [f"  {p.method:18}" + _said(p, reasons) for p in predictions]
    lines += [f"({number}) cannot say: {why}" for why, number in reasons.items()]
    answered = [p for p in found.predictions if p.score is not None]
    seen = {n: sum(1 for p in answered if p.unseen == n) for n in (0, 1, 2)}
    lines += found.said
    lines.append(f"{len(answered)} of {len(found.predictions)} answered; of these {seen[0]} with both tasks in the table, "
                 f"{seen[1]} with one, {seen[2]} with none.")
    return lines


def _said(p: Prediction, reasons: dict[str, int]) -> str:
    if p.score is None:
        return f"cannot say ({reasons.setdefault(p.cannot_say, len(reasons) + 1)})"
    kept = f"  ({p.task1} {p.kept[0]:.3f}, {p.task2} {p.kept[1]:.3f})" if p.kept else ""
    moved = "; ".join(f"{m.input} {m.points:+.1f}" for m in p.moved[:3])
    return f"{p.score:.3f} [{p.low:.3f} to {p.high:.3f}]{kept}" + (f"  moved by {moved} points" if moved else "")


def suggestion_lines(found: Suggestion) -> list[str]:
    lines = [f"Best sets of {found.k} ({found.searched}): mean normalised score as predicted"]
    for s in found.best:
        gain = "" if s.gain is None else f", {100 * s.gain:+.1f} points over the base"
        lines.append(f"  {s.score:.3f}  {s.method:18}{', '.join(s.tasks)}{gain}")
    lines.append("Best set of each method")
    lines += [f"  {s.score:.3f}  {s.method:18}{', '.join(s.tasks)}" for s in found.methods]
    return lines + found.said
