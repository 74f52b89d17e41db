"""Scores into the paper's table: one per program, averages over benchmarks that every model has. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from statistics import fmean, stdev

from anabranch.outside.artifacts import NOT_SAID, Score
from anabranch.outside.subjects import arm_of
from anabranch.outside.suite import PAPER, PROGRAMS, PUBLISHED, Program, benchmark_of


@dataclass(frozen=True)
class Row:
    """One arm. `scores`: column -> mean over its seeds; `average`: over the table's `shared` columns, of each seed's average.

    deviation: sample standard deviation of the seeds' averages; None for fewer than two seeds that have them all.
    """

    arm: str
    seeds: int
    scores: dict[str, float]
    average: float | None
    deviation: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """columns: (task, heading). shared: the columns that every model has. Points of 100."""

    program: Program
    columns: tuple[tuple[str, str], ...]
    shared: tuple[str, ...]
    rows: tuple[Row, ...]

    def average(self, arm: str) -> float | None:
        return next((row.average for row in self.rows if row.arm == arm), None)

    @property
    def absent(self) -> tuple[str, ...]:
        """Benchmarks of the paper's eight that no model has."""
        have = {known.name for task, _ in self.columns if (known := benchmark_of(self.program, task)) is not None}
        return tuple(b.name for b in PAPER if b.name not in have)


def tables(scores: Sequence[Score]) -> list[Table]:
    """One table per program that has scores; nothing is compared across programs, whose prompts and judges differ."""
    return [_table(program, [s for s in scores if s.program == program]) for program in PROGRAMS
            if any(s.program == program for s in scores)]


def disagreements(scores: Sequence[Score]) -> list[str]:
    """Where models were not measured alike: their scores may not stand in one column."""
    problems = []
    for program, task in sorted({(s.program, s.task) for s in scores}):
        column = [s for s in scores if (s.program, s.task) == (program, task)]
        for what, values in (("metric", {s.model: s.metric for s in column}), ("judge", {s.model: s.judge for s in column}),
                             ("number of questions", {s.model: s.samples for s in column}),
                             ("version of the task", {s.model: s.task_version for s in column})):
            if len(set(values.values())) > 1:
                shown = ", ".join(f"{model} {value}" for model, value in values.items())
                problems.append(f"{program} `{task}`: the models were not measured alike, {what}: {shown}. Measure them again "
                                f"with one setting, or leave it out with --skip '{task}'.")
    return problems


def _table(program: Program, scores: list[Score]) -> Table:
    models = sorted({s.model for s in scores}, key=_place_of)
    tasks = sorted({s.task for s in scores}, key=lambda task: _place_in_suite(program, task))
    of = {(s.model, s.task): s.score for s in scores}
    shared = tuple(task for task in tasks if all((model, task) in of for model in models))
    rows = []
    for arm in dict.fromkeys(arm_of(model) for model in models):
        seeds = [model for model in models if arm_of(model) == arm]
        have = [task for task in tasks if all((seed, task) in of for seed in seeds)]
        averages = [fmean(of[seed, task] for task in shared) for seed in seeds] if shared else []
        rows.append(Row(arm, len(seeds), {task: fmean(of[seed, task] for seed in seeds) for task in have},
                        fmean(averages) if averages else None, stdev(averages) if len(averages) > 1 else None,
                        tuple(task for task in tasks if task not in have)))
    return Table(program, tuple((task, _heading(program, task, tasks)) for task in tasks), shared, tuple(rows))


def _heading(program: Program, task: str, tasks: Sequence[str]) -> str:
    known = benchmark_of(program, task)
    alone = known is not None and sum(benchmark_of(program, t) is known for t in tasks) == 1
    return known.name if known is not None and alone else task


def _place_of(model: str) -> tuple[int, str, int]:
    """base, joint arms, other arms, the run's own branches and merge; seeds and branches by number."""
    arm = arm_of(model)
    kinds = ("base", "joint")
    place = kinds.index(arm) if arm in kinds else 2 if "/seed-" in model else 3 if arm.startswith("branch-") else 4
    number = model.rpartition("-")[2]
    return place, arm if place != 3 else "", int(number) if number.isdigit() else 0


def _place_in_suite(program: Program, task: str) -> tuple[int, str]:
    known = benchmark_of(program, task)
    return (PAPER.index(known) if known is not None else len(PAPER)), task


def markdown(scores: Sequence[Score], run: str) -> str:
    """The tables and what stands behind them. Same scores, same text."""
    lines = [f"# Benchmarks of {_plain(run)}", ""]
    for table in tables(scores):
        own = [s for s in scores if s.program == table.program]
        lines += [f"## {table.program}", "", *_grid(table), "", *_notes(table, own)]
        if not _why_not_the_papers(table, own):
            lines += ["", "### Not measured here: the paper's own figures", "",
                      "Published (arXiv:2606.01717, Table 2; Qwen2.5-VL-3B, 136 Vision-FLAN tasks; its judges, prompts and "
                      "programs are not stated there, so that only differences within one table can be compared):", "",
                      *_published()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _grid(table: Table) -> list[str]:
    base, joint = table.average("base"), table.average("joint")
    extra = ["average", *(["against base"] if base is not None else []), *(["against joint"] if joint is not None else [])]
    lines = ["| model | " + " | ".join(_plain(name) for _, name in table.columns) + " | " + " | ".join(extra) + " |",
             "|---|" + "---:|" * (len(table.columns) + len(extra))]
    for row in table.rows:
        name = row.arm + (f" ({row.seeds} seeds)" if row.seeds > 1 else "")
        cells = [_points(row.scores[task]) if task in row.scores else "–" for task, _ in table.columns]
        spread = f" ± {_points(row.deviation)}" if row.deviation is not None else ""
        cells.append("–" if row.average is None else f"**{_points(row.average)}**{spread}")
        for reference, itself in ((base, "base"), (joint, "joint")):
            if reference is not None:
                cells.append("" if row.arm == itself or row.average is None else _points(row.average - reference, "+"))
        lines.append(f"| {_plain(name)} | " + " | ".join(cells) + " |")
    return lines


def _notes(table: Table, scores: list[Score]) -> list[str]:
    names = dict(table.columns)
    over = ", ".join(_plain(names[task]) for task in table.shared) or "none has every model"
    lines = [f"Points of 100. The average is over {len(table.shared)} of {len(table.columns)} benchmarks: {over}."]
    lines += [f"- {_plain(row.arm)} has no {', '.join(_plain(names[t]) for t in row.missing)}: left out of the average of all."
              for row in table.rows if row.missing]
    lines += [f"- {why}: the average is not the paper's." for why in _why_not_the_papers(table, scores)]
    for task, name in table.columns:
        column = [s for s in scores if s.task == task]
        one = column[0]
        asked = (f"{one.samples:,}" + (f" of {one.samples_of:,}" if one.samples_of and one.samples_of != one.samples else "")
                 + " questions" if one.samples else "")
        said = ", ".join(x for x in (f"`{one.metric}`" if "`" not in one.metric else _plain(one.metric), asked,
                                     f"judged by {_plain(one.judge)}" if one.judge else "",
                                     f"task version {_plain(one.task_version)}" if one.task_version else "") if x)
        lines.append(f"- {_plain(name)}: {_plain(task)}, {said}.")
    versions = sorted({s.program_version for s in scores if s.program_version})
    if versions:
        lines.append(f"- {table.program}: {', '.join(map(_plain, versions))}.")
    for model in dict.fromkeys(s.model for s in sorted(scores, key=lambda s: _place_of(s.model))):
        evaluated = next(s.evaluated for s in scores if s.model == model)
        lines.append(f"- {_plain(model)}: " + ("its results do not say which model was evaluated." if evaluated == NOT_SAID else
                                               f"evaluated as {_plain(evaluated)}."))
    return lines


def _why_not_the_papers(table: Table, scores: Sequence[Score]) -> list[str]:
    """What keeps a table's averages from being over the paper's eight benchmarks, once each and whole."""
    of = {task: benchmark_of(table.program, task) for task, _ in table.columns}
    have = [b.name for task, b in of.items() if b is not None]
    left_out = [b.name for task, b in of.items() if b is not None and task not in table.shared]
    part = [_plain(name) for task, name in table.columns
            if any(s.task == task and s.samples and s.samples_of and s.samples < s.samples_of for s in scores)]
    more = [_plain(name) for task, name in table.columns if of[task] is None and task in table.shared]
    twice = sorted({name for name in have if have.count(name) > 1})
    return [f"{what}{', '.join(names)}" for what, names in (
        ("Of the paper's eight there is no ", table.absent), ("Not every model has ", left_out),
        ("Only a part of the questions was asked of ", part), ("Beside the paper's eight there is ", more),
        ("There are several tasks of ", twice)) if names]


def _published() -> list[str]:
    base, joint = (fmean(PUBLISHED[name]) for name in ("base", "joint, 1 epoch"))
    lines = ["| model | " + " | ".join(b.name for b in PAPER) + " | average | against base | against joint |",
             "|---|" + "---:|" * (len(PAPER) + 3)]
    for name, values in PUBLISHED.items():
        mean = fmean(values)
        lines.append(f"| {name} | " + " | ".join(_points(v) for v in values)
                     + f" | **{_points(mean)}** | {_points(mean - base, '+')} | {_points(mean - joint, '+')} |")
    return lines


def _points(value: float, sign: str = "") -> str:
    """One decimal, halves away from zero, as people round."""
    return f"{Decimal(f'{value:.6f}').quantize(Decimal('0.1'), ROUND_HALF_UP):{sign}}"


def _plain(text: str) -> str:
    """One line that Markdown shows as it is."""
    return "".join("\\" + c if c in "\\`*_<>|[]&~" else c if c.isprintable() else " " for c in text)
