"""What the user said about metrics: `TASK=METRIC`, `TASK=METRIC*100`, and tasks to leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anabranch.errors import RecipeError
from anabranch.outside.reading import said
from anabranch.outside.suite import Metric


@dataclass(frozen=True)
class Choices:
    """metrics: task -> its metric, over the table of known ones. skip: tasks that are not imported."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()


@dataclass
class Problems:
    """Collected while files are read, told in one message."""

    told: list[str] = field(default_factory=list)
    metrics: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (task, what was found) -> where

    @property
    def lines(self) -> list[str]:
        """All of them, none twice: a task that is unknown in many files is one."""
        asked = []
        for (task, found), places in self.metrics.items():
            where = places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
            asked.append(f"{where}: `{task}`: which metric counts? Found: {found}. Say --metric '{task}=NAME' or "
                         f"--skip '{task}'.")
        how = ["--metric 'TASK=NAME' is for points of 100, 'TASK=NAME*100' for a share of 1."] if asked else []
        return [*self.told, *asked, *how]

    def add(self, text: str) -> None:
        if text not in self.told:
            self.told.append(text)

    def unknown(self, where: str, task: str, found: Sequence[str]) -> None:
        """A task that the table does not know, or whose metric is not where the table says."""
        task, shown = said(task, 100), ", ".join(f"`{said(name, 100)}`" for name in found[:8])
        shown += f" and {len(found) - 8} more" if len(found) > 8 else ""
        places = self.metrics.setdefault((task, shown or "no number"), [])
        if where not in places:
            places.append(where)


def read_choices(metrics: Sequence[str], skip: Sequence[str]) -> Choices:
    """From the command line. Raises RecipeError naming every problem."""
    read, problems = {}, []
    for text in metrics:
        task, equals, name = text.partition("=")
        name, star, factor = name.rpartition("*") if name.endswith("*100") else (name, "", "")
        if not (task and equals and name):
            problems.append(f"--metric {text}: wanted TASK=METRIC (points of 100) or TASK=METRIC*100 (a share of 1), as in "
                            "mmstar=average*100.")
        elif task in read:
            problems.append(f"--metric: `{task}` stands twice.")
        else:
            read[task] = Metric((name,), 100.0 if star and factor else 1.0)
    if both := sorted(set(read) & set(skip)):
        problems.append(f"--metric and --skip both name {', '.join(both)}.")
    if problems:
        raise RecipeError.of("the choice of metrics:", problems)
    return Choices(read, frozenset(skip))


def in_points(value: float, metric: Metric, asked: bool, relative: bool = False) -> float | str:
    """A value as points of 100, or what is wrong with it.

    Args:
        asked: the user named the metric and its scale; then the scale is not doubted.
        relative: more than 100 points are possible.
    """
    if value < 0:
        return f"{value:g} is negative"
    if metric.scale == 100 and value > 1:
        return f"{value:g} is no share of 1, as this metric was in the version whose sources were read"
    if metric.scale == 1 and 0 < value <= 1 and not asked:
        return f"{value:g} looks like a share of 1; this metric was in points of 100 in the version whose sources were read"
    if value * metric.scale > 100 and not relative:
        return f"{value:g} is more than 100 points, and cannot stand in an average of points of 100"
    return value * metric.scale
