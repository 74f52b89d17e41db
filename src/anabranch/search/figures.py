"""Pictures of a search: the score over candidates, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from anabranch.report.canvas import LEGEND_ROW, WIDTH, Sheet, cycle, legend_height
from anabranch.report.contents import clean, shorten
from anabranch.report.mergeability_figures import Picture
from anabranch.search.journal import Line
from anabranch.search.outcome import SearchOutcome

LEFT, RIGHT, TALL = 64.0, 14.0, 300.0
ARMS = ("search", "random")
HELD = 3  # baselines that are drawn as lines


def progress_picture(outcome: SearchOutcome, lines: Sequence[Line]) -> Picture:
    """Each candidate's score on the searched rows, the lowest so far of either arm, and the baselines' on the same rows."""
    names = {"search": outcome.sampler, "random": "random search"}
    compared = [s for s in outcome.scores[1:] if not s.name.startswith("best of")][:HELD]
    labels = [names[arm] for arm in ARMS if arm in outcome.curve] + [shorten(s.name, 40) for s in compared]
    whose = {"search": "The sampler's", "random": "Random search's"}[outcome.best.arm]
    finding = f"{whose} best, {outcome.best.score:.4f}, was found by candidate {outcome.best.n + 1} of {outcome.budget}"
    if outcome.random_best is not None and outcome.best.arm == "search":
        finding += f"; random search came to {outcome.random_best.score:.4f}"
    height = legend_height(labels, WIDTH) + TALL + 60

    def draw(sheet: Sheet) -> None:
        axes = sheet.axes(LEFT, legend_height(labels, WIDTH) + 14, WIDTH - LEFT - RIGHT, TALL, grid="y")
        entries = []
        for i, arm in enumerate(arm for arm in ARMS if arm in outcome.curve):
            colour, dash, mark = cycle(sheet.theme, i)
            points = [(line.n + 1, line.score) for line in lines
                      if line.arm == arm and line.score is not None and line.n < outcome.budget]
            axes.plot([x for x, _ in points], [y for _, y in points], linestyle="", marker=mark, markersize=3.2, color=colour,
                      alpha=0.45)
            curve = [(n + 1, v) for n, v in enumerate(outcome.curve[arm]) if v is not None]
            axes.step([x for x, _ in curve], [y for _, y in curve], where="post", color=colour, linestyle=dash, linewidth=1.8)
            entries.append((Line2D([], [], color=colour, linestyle=dash, marker=mark, markersize=5), names[arm]))
        for i, score in enumerate(compared):
            colour, dash, _ = cycle(sheet.theme, i + len(entries))
            axes.axhline(score.searched, color=colour, linestyle=dash, linewidth=1.1)
            entries.append((Line2D([], [], color=colour, linestyle=dash), shorten(clean(score.name), 40)))
        shown = sorted([line.score for line in lines if line.score is not None] + [s.searched for s in compared])
        low, high = shown[0], shown[min(len(shown) - 1, int(0.95 * len(shown)))]  # a few wild candidates may lie above
        room = max((high - low) * 0.08, 1e-6)
        axes.set_ylim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("candidates")
        axes.set_ylabel("score on searched rows, lower is better")
        sheet.legend(LEFT, 0, WIDTH - LEFT, entries)

    return Picture(finding, height, draw)


def pareto_picture(outcome: SearchOutcome, lines: Sequence[Line]) -> Picture:
    """Candidates by the first two objectives, and those that no other beats in all objectives."""
    (first, up), (second, right) = list(outcome.objectives.items())[:2]
    count = len(outcome.front)
    beaten = "is the only one that no other beats" if count == 1 else "are beaten by no other"
    finding = f"{count} of {sum(line.score is not None for line in lines)} candidates {beaten} in all objectives at once"
    labels = ["search", "random search", "no other is better in all"]

    def draw(sheet: Sheet) -> None:
        axes = sheet.axes(LEFT, LEGEND_ROW + 14, WIDTH - LEFT - RIGHT, TALL, grid="both")
        entries = []
        for i, arm in enumerate(ARMS):
            points = [line.objectives for line in lines if line.arm == arm and line.score is not None]
            colour, _, mark = cycle(sheet.theme, i)
            axes.plot([p[first] for p in points], [p[second] for p in points], linestyle="", marker=mark, markersize=4,
                      color=colour, alpha=0.5)
            entries.append((Line2D([], [], color=colour, linestyle="", marker=mark), labels[i]))
        front = sorted((e.objectives[first], e.objectives[second]) for e in outcome.front)
        axes.plot([x for x, _ in front], [y for _, y in front], linestyle=":", marker="o", markersize=7, markerfacecolor="none",
                  color=sheet.theme.ink, linewidth=1.2)
        entries.append((Line2D([], [], color=sheet.theme.ink, linestyle=":", marker="o", markerfacecolor="none"), labels[2]))
        axes.set_xlabel(f"{shorten(clean(first), 50)}, {up} is better")
        axes.set_ylabel(f"{shorten(clean(second), 40)}, {right} is better")
        sheet.legend(LEFT, 0, WIDTH - LEFT, entries)

    return Picture(finding, LEGEND_ROW + TALL + 64, draw)
