"""Predictors, predictions and suggestions in words, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anabranch.errors import RecipeError
from anabranch.mergeability.artifacts import Prediction, Predictions, Predictor, Suggestion, Trial
from anabranch.mergeability.fitting import Fitted
from anabranch.mergeability.predict import has_gap

MOST = 20
WEAK = 0.3
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
    return [*lines, *_verdict(p)]


def _verdict(p: Predictor) -> list[str]:
    """What the figures say, in sentences."""
    ours = [t for t in p.trials if t.rule == p.rule]
    lines = []
    for unseen, who in ((1, "With one of its two models new"), (2, "With both models new")):
        of = [t for t in ours if t.unseen == unseen]
        wide = [t.method for t in of if t.width is None or t.naive_width is None or t.width > 0.95 * t.naive_width]
        weak = [t.method for t in of if t.r is None or t.r < WEAK]
        if not of:
            lines.append(f"{who}: not known, for the table has too few tasks to leave out.")
            continue
        good = [t.method for t in of if t.method not in {*wide, *weak}]
        text = f"{who}, the table orders pairs and narrows their scores for {', '.join(good) or 'no method'}"
        text += f"; the intervals say little more than the mean for {', '.join(wide)}" if wide else ""
        text += f"; the order is hardly told (r below {WEAK}) for {', '.join(weak)}" if weak else ""
        lines.append(text + ".")
    return ["", *lines, "r: 1 is the right order and spacing, 0 none. Task effects: what a model's other merges tell of it. "
            "Shuffled: the scores dealt anew, so no r is to be found. Published: the rule of arXiv:2601.22285."]


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
    """Pairs by their best predicted score. Few of them in full, a line per method; of many the best method of the first MOST.

    Reasons for `cannot say` are numbered and stand below.
    """
    by_pair: dict[tuple[str, str], list[Prediction]] = {}
    for p in found.predictions:
        by_pair.setdefault((p.task1, p.task2), []).append(p)
    ranked = sorted(by_pair.values(), key=lambda of: -max(_score(p) for p in of))
    reasons: dict[str, int] = {}
    lines = ["Normalised score of the merge (1: both tasks as good as with their own models) and its "
             f"{100 * found.level:.0f} % interval; in brackets what each task keeps. Best first."]
    if len(found.predictions) <= MOST:
        for of in ranked:
            lines.append(f"{of[0].task1} + {of[0].task2}")
            lines += [f"  {p.method:18}" + _said(p, reasons) for p in of]
    else:
        for of in ranked[:MOST]:
            best = max(of, key=_score)
            lines.append(f"{best.task1} + {best.task2}: {best.method} " + _said(best, reasons))
        if len(ranked) > MOST:
            lines.append(f"and {len(ranked) - MOST} more pairs; every method of every pair is in the file")
    for p in found.predictions:
        if p.cannot_say:
            reasons.setdefault(p.cannot_say, len(reasons) + 1)
    shown = list(reasons.items())[:6]
    lines += [f"({number}) cannot say: {why}" for why, number in shown]
    if len(reasons) > len(shown):
        lines.append(f"and {len(reasons) - len(shown)} more reasons, in the file")
    if any("is missing" in why for why in reasons):
        lines.append("What is missing is measured by `measure --data` with rows that have responses; or fit on a table without "
                     "it.")
    answered = [p for p in found.predictions if p.score is not None]
    seen = {n: sum(1 for p in answered if p.unseen == n) for n in (0, 1, 2)}
    lines += found.said
    lines.append(f"{len(answered)} of {len(found.predictions)} answered; of these {seen[0]} with both models in the table, "
                 f"{seen[1]} with one, {seen[2]} with none.")
    return lines


def _score(p: Prediction) -> float:
    return -1.0 if p.score is None else p.score


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
        interval = "" if s.low is None or s.high is None else f"[{s.low:.3f} to {s.high:.3f}] "
        lines.append(f"  {s.score:.3f}  {interval}{s.method:18}{', '.join(s.tasks)}{gain}")
    lines.append("Best set of each method")
    lines += [f"  {s.score:.3f}  {s.method:18}{', '.join(s.tasks)}" for s in found.methods]
    return lines + found.said
