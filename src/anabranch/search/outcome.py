"""What a search found, as an artifact, and what can be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from anabranch.artifacts import Artifact, Part
from anabranch.search.journal import Line
from anabranch.search.score import Difference, Objective


class Evaluated(Part):
    """A candidate as it was searched. `n`: its number in its arm."""

    arm: Literal["search", "random"]
    n: int
    parameters: dict[str, float | int | str | bool]
    score: float = Field(description="on the searched rows; lower is better (metrics of tasks count negative)")
    objectives: dict[str, float]


class GuardScore(Part):
    """A model on both halves. `difference`: the best candidate's score minus this one's on the guard rows (negative: the best
    is better), with a 95 % interval (paired bootstrap); null for the best itself. `drawn`: units were drawn again, or rows
    within each unit, where there are few units; null where neither could be."""

    name: str
    searched: float
    guard: float
    objectives: dict[str, float] = Field(description="on the guard rows, each in its own direction")
    units: dict[str, float] = Field(description="on the guard rows: loss, or a task's metric")
    difference: float | None
    low: float | None
    high: float | None
    drawn: Literal["units", "rows"] | None = None


class SearchOutcome(Artifact):
    """results.json. made_from: space, models, rows, sampler, .. as in the journal's first line."""

    kind: Literal["search"] = "search"
    version: Literal[1] = 1
    sampler: str
    seed: int
    budget: int = Field(description="candidates of the sampler, and of random search")
    dimensions: list[str]
    objectives: dict[str, Literal["lower", "higher"]]
    searched_rows: int
    guard_rows: int
    best: Evaluated
    random_best: Evaluated | None = Field(description="null where the sampler is random search itself")
    curve: dict[str, list[float | None]] = Field(description="arm -> lowest score so far, by candidate")
    failed: dict[str, int] = Field(description="candidates that could not be merged or scored, by reason")
    front: list[Evaluated] = Field(description="no other candidate is at least as good in all objectives; empty for one")
    front_guard: list[dict[str, float]] = Field(description="the front's objectives on the guard rows")
    scores: list[GuardScore] = Field(description="the best, then what it is held against")
    left_out: dict[str, str] = Field(description="baselines that could not be made, and why")
    overfit: dict[str, float] = Field(description="gain over the uniform merge on searched and on guard rows; their "
                                                  "difference, which is over-fitting and chance between the halves")
    verdict: list[str] = Field(description="sentences; what the figures say and what they do not")


def best_of(lines: Sequence[Line]) -> Line | None:
    """The first of the lowest scores."""
    scored = [line for line in lines if line.score is not None]
    return min(scored, key=lambda line: line.score if line.score is not None else 0.0) if scored else None


def best_so_far(lines: Sequence[Line]) -> list[float | None]:
    found: list[float | None] = []
    for line in lines:
        before = found[-1] if found else None
        both = [v for v in (before, line.score) if v is not None]
        found.append(min(both) if both else None)
    return found


def pareto(lines: Sequence[Line], objectives: Sequence[Objective]) -> list[Line]:
    """Lines that no other one dominates: at least as good everywhere, better somewhere. Sorted by the first objective; of
    equal ones the first stays."""
    scored = [line for line in lines if line.score is not None]
    if not scored or len(objectives) < 2:
        return []
    points = np.array([[(1 if o.lower else -1) * line.objectives[o.name] for o in objectives] for line in scored])
    front = []
    for i, point in enumerate(points):
        no_worse, better = (points <= point).all(1), (points < point).any(1)
        twin = (points[:i] == point).all(1).any()
        if not (no_worse & better).any() and not twin:
            front.append(i)
    return [scored[i] for i in sorted(front, key=lambda i: tuple(points[i]))]


def verdict(scores: Sequence[GuardScore], best: Evaluated, overfit: dict[str, float], several: bool) -> list[str]:
    """What the guard rows say."""
    said = []
    for one in scores[1:]:
        if one.difference is None:
            continue
        if one.low is None or one.high is None:
            word = "better than" if one.difference < 0 else "WORSE than" if one.difference > 0 else "level with"
            said.append(f"Guard rows: the best is {word} {one.name} by {abs(one.difference):.4f}; no interval, as rows are "
                        "too few or a metric is no mean over them.")
        elif one.high < 0:
            said.append(f"Guard rows: the best is better than {one.name} by {-one.difference:.4f} (95 % interval "
                        f"{-one.high:.4f} to {-one.low:.4f}).")
        elif one.low > 0:
            said.append(f"Guard rows: the best is WORSE than {one.name} by {one.difference:.4f} (95 % interval "
                        f"{one.low:.4f} to {one.high:.4f}).")
        else:
            said.append(f"Guard rows: the best cannot be told from {one.name} ({one.difference:+.4f}; 95 % interval "
                        f"{one.low:+.4f} to {one.high:+.4f}).")
    lowest = min(scores, key=lambda s: s.guard)
    if lowest.name != scores[0].name:
        said.append(f"On the guard rows {lowest.name} has the lowest score ({lowest.guard:.4f}; the best of the search "
                    f"{scores[0].guard:.4f}).")
    if overfit:
        gap = overfit["gap"]
        said.append(f"Gain over the uniform merge: {overfit['searched']:.4f} on searched rows, {overfit['guard']:.4f} on guard "
                    f"rows; the difference, {gap:+.4f}, is "
                    + ("over-fitting to the searched rows, or chance between the halves." if gap > 0 else
                       "no sign of over-fitting."))
    if best.arm == "random":
        said.append("The lowest searched score was found by random search, not by the sampler.")
    drawn = {score.drawn for score in scores[1:]} - {None}
    if "units" in drawn:
        said.append("Intervals are of a paired bootstrap over units, each with all its rows.")
    elif drawn:
        said.append("Intervals are of a paired bootstrap over rows within units: they say nothing of other units.")
    if several:
        said.append("They are of the score, not of the objectives one by one.")
    return said


def guard_score(name: str, searched: float, guard: Any, gap: Difference | None) -> GuardScore:
    """`guard`: a Score."""
    return GuardScore(name=name, searched=searched, guard=guard.score, objectives=guard.objectives, units=guard.units,
                      difference=None if gap is None else gap.value, low=None if gap is None else gap.low,
                      high=None if gap is None else gap.high, drawn=None if gap is None else gap.drawn)
