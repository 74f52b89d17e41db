"""What a pilot says, in words: question 1 (drift), question 2 (the arms), the recommendation, the cost. Pure."""

from __future__ import annotations

from anabranch.artifacts import Interval, Pilot, PilotAdvice, PilotDrift
from anabranch.outlook import Outlook
from anabranch.pilot_budget import LARGEST_SHARE
from anabranch.scores import PLACES, TIE

QUESTIONS = ("1. How far will the branches drift apart? (from the gradients; not which arm is better)",
             "2. Which arm gives the better model? (from the pilot's own training; forecast for the full budget)")


def drift_lines(drift: list[PilotDrift], norm_cv: Interval | None) -> list[str]:
    """Question 1, in words."""
    lines = []
    for one in drift:
        tells = "further apart than random groups" if one.ratio.low > 1 else "not shown to drift further than random groups"
        lines.append(f"{2 ** one.axes} groups: spread after one step at least {one.ratio.value:.2f} times that of random "
                     f"groups [{one.ratio.low:.2f}, {one.ratio.high:.2f}]: {tells}")
    if norm_cv is not None:
        lines.append(f"gradient norms: standard deviation / mean {norm_cv.value:.2f} [{norm_cv.low:.2f}, {norm_cv.high:.2f}]")
    return lines or ["too few units to tell"]


def sentences(view: Outlook, advice: PilotAdvice, share: float, seeds: int) -> list[str]:
    """The recommendation, what is not known and what would settle it, the best arm of each place, and what is not shown."""
    lines = [_recommendation(advice)]
    if advice.arm != advice.lowest:
        lines.append(f"{advice.lowest} has the lowest forecast, by less than {TIE} nats: a tie, and the simpler arm is taken.")
    if not advice.known:
        twice = min(2 * share, LARGEST_SHARE)
        lines.append(f"Not known from this pilot: the arms {', '.join(advice.tied)} cannot be told apart. What would settle "
                     f"it: a larger share (--share {twice:g}), more seeds (--seeds {2 * seeds}), or `anabranch compare "
                     f"recipe.yaml --methods {','.join(dict.fromkeys(['joint', *advice.tied]))}`.")
    arms = [a for a in view.arms if a != "base"]
    for place in view.places:
        best = min(arms, key=lambda a: view.difference(a, "base", place).value)
        gap = view.difference(best, "base", place)
        lines.append(f"{place.replace('_', '-')}: {best} has the lowest forecast, {gap.value:+.3f} from the base "
                     f"[{gap.low:+.3f}, {gap.high:+.3f}].")
    if all(view.difference(a, "base").value >= 0 for a in arms):
        lines.append("No arm is forecast to beat the base on the mean of the places.")
    lines.append("What this does not show: anything but loss; other learning rates; what more passes over the same rows do, "
                 "as a pilot's rows are seen fewer times; and the forecast has been wrong before (docs/log.md has its record).")
    return lines


def _recommendation(advice: PilotAdvice) -> str:
    method, _, number = advice.arm.partition(":")
    if advice.action == "pull_back":
        return (f"Recommended: train jointly and pull back, base + {advice.alpha or 0.0:.2f} (joint - base), as at the pilot's "
                f"largest budget ({advice.arm}).")
    if method == "joint":
        return "Recommended: do not split; train jointly (joint)."
    if method == "joint_batch":
        return (f"Recommended: do not split; train jointly with {number} times the batch and 1/{number} of the steps "
                f"({advice.arm}).")
    if method == "soup":
        return f"Recommended: {number} branches on the whole mixture in different orders, merged ({advice.arm})."
    groups = 2 ** int(number) if method == "merit" else int(number)
    return f"Recommended: split, {groups} groups by {method}, merged once ({advice.arm})."


def pilot_lines(pilot: Pilot) -> list[str]:
    """Question 2 as a table, the recommendation, and the cost."""
    places = [p for p in PLACES if any(f.place == p for f in pilot.forecasts)]
    width = max(len(s.arm) for s in pilot.scores)
    lines = ["", QUESTIONS[1], f"  {'loss minus joint, forecast [95 %]':{width}}"]
    lines.append("  " + " " * width + "".join(f"{p.replace('_', '-'):>28}" for p in places) + f"{'mean':>28}")
    for score in sorted(pilot.scores, key=lambda s: s.versus_joint.value):
        cells = [f.versus_joint for p in places for f in pilot.forecasts if (f.arm, f.place) == (score.arm, p)]
        lines.append(f"  {score.arm:{width}}" + "".join(
            f"{f'{c.value:+.3f} [{c.low:+.3f}, {c.high:+.3f}]':>28}" for c in [*cells, score.versus_joint]))
    lines += ["", *pilot.said]
    if pilot.cost is not None:
        lines.append(f"Cost: {pilot.cost.measured_tokens:,} tokens of training ({pilot.cost.predicted_tokens:,} predicted), "
                     f"{pilot.cost.measured_seconds:,.0f} s of work ({pilot.cost.predicted_seconds:,.0f} s predicted).")
    return lines
