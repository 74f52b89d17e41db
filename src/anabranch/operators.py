"""Other merge methods on the same branches: what part of a merged model's worth is the way it was merged?

The branches are the recipe's own split's (RUN/branches; trained first where they are not). Each method merges them by
the plan's weights and with its own defaults into RUN/merge_methods/METHOD/, and is scored at the three places
(RUN/merge_methods/METHOD.json), against token_weighted, unit by unit. The base and the branches themselves stand beside
them. Resumable: a merge and an evaluation that are there are not made again.

Source of the comparison: MERIT, arXiv:2606.01717 (its 7B branches under five methods). Where we differ: losses in place
of benchmark scores, three places kept apart, and every method gets the plan's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anabranch.artifacts import (
    BranchManifest,
    Evaluation,
    MergeManifest,
    Mixture,
    OperatorPlace,
    OperatorResult,
    Operators,
    Plan,
    UnitScore,
    digest,
)
from anabranch.errors import RecipeError, closest
from anabranch.evaluate import evaluation_inputs
from anabranch.merge import METHODS, MergeMethod
from anabranch.model import keep_buffers
from anabranch.plan import load_plan
from anabranch.run import Run, evaluate_folder, merge_branches, run_stages
from anabranch.scores import PLACES, TIE, Place, macro_loss, mean_answer, paired_interval, token_loss

REFERENCE = "token_weighted"
# The paper's word -> the registry's. TSV is the compression; its merge, which the paper means, is TSV-Merge.
ALIASES = {"tsv": "tsv_m"}
# What a method may ask for that a run's branches do not bring.
NOT_IN_A_RUN = {
    "fisher": "the Fisher information of every branch, which a run does not measure",
    "depth": "the place of each layer, which only a merge config tells",
}
# Averages of 8 benchmarks on the paper's 7B branches; higher is better.
PAPER = {"token_weighted": 55.5, "ties": 50.4, "tsv_m": 46.1, "iso_cts": 45.4, "star": 41.0}
# Their papers add the task vectors up where others average them.
ADD_UP = ("task_arithmetic", "tsv_m", "iso_c", "iso_cts")
WORDS = {"held_out": "held-out rows", "transfer": "transfer", "retention": "retention"}

Scores = dict[str, UnitScore]


def parse_methods(text: str, branches: int) -> list[str]:
    """'ties,tsv' -> registry names, token_weighted first (what the others are held against), nothing twice.

    Raises:
        RecipeError: every name that is unknown, stands twice or cannot merge the branches of a run, in one message.
    """
    names, problems = [], []
    if branches < 2:
        problems.append("the recipe's split makes one branch, so there is nothing to merge. Set split.groups to 2 or more")
    labels = [part.strip() for part in text.split(",") if part.strip()]
    if not labels:
        problems.append(f"no method given. Wanted names as in {','.join(PAPER)}")
    for label in labels:
        name = ALIASES.get(label, label)
        if name not in METHODS:
            problems.append(f"`{label}`: no such merge method.{closest(label, [*METHODS, *ALIASES])}")
        elif name in names:
            problems.append(f"`{label}` stands twice" + (f": it is {name}." if label != name else "."))
        elif branches > 1 and (reason := _why_not(METHODS[name], branches)):
            problems.append(f"`{label}`: {reason}")
        names.append(name)
    if problems:
        raise RecipeError.of("--merge-methods:", problems)
    return [REFERENCE, *(name for name in names if name != REFERENCE)]


def _why_not(method: MergeMethod, branches: int) -> str:
    """Why a run's branches cannot be merged by this method; '' where they can."""
    if missing := [reason for name, reason in NOT_IN_A_RUN.items() if name in method.inputs]:
        return f"needs {' and '.join(missing)}. Merge them with a config: `anabranch merge config.yaml OUT`."
    if not method.branches[0] <= branches <= method.branches[1]:
        return f"merges at most {method.branches[1]:g} beside the base, and the recipe's split makes {branches} branches."
    if required := [p.name for p in method.parameters if p.default is None]:
        return f"has no default for {', '.join(required)}. Merge with a config: `anabranch merge config.yaml OUT`."
    return ""


@dataclass(frozen=True)
class _Scored:
    """A model, where it lies and what it scored."""

    name: str
    evaluation: Evaluation
    displacement: float
    arguments: dict[str, float | int | bool | str | list[float]] | None = None
    folder: str | None = None
    bytes: int = 0


def compare_operators(run: Run, text: str) -> Operators:
    """Train what is not trained, merge by every method, score, and write merge_methods.json.

    Raises:
        RecipeError: before anything is trained, with every method that cannot be.
        ProvenanceError, CorruptedError: branches of another run, or damaged ones.
        OutputError: a method's folder holds a merge of other branches.
    """
    split = run.recipe.split
    methods = parse_methods(text, 1 if split.method == "joint" else split.groups)
    run_stages(run, until="train")
    keep_buffers()
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    manifests = [_merge(run, plan, name, i, len(methods)) for i, name in enumerate(methods)]
    scored = _references(run, mixture, plan, manifests[0])
    for manifest in manifests:
        name = manifest.method
        folder = run.folder / "merge_methods" / name
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        evaluation = evaluate_folder(run, mixture, folder, name, manifest.model_hash, folder.with_name(f"{name}.json"))
        scored.append(_Scored(name, evaluation, manifest.displacement or 0.0, dict(manifest.arguments),
                              str(folder.relative_to(run.folder)), size))
    results = summarise(scored)
    made_from = manifests[0].made_from | {
        "evaluation": digest(evaluation_inputs(run.recipe, mixture, "any")),
        "methods": digest({m.method: m.model_hash for m in manifests})}
    operators = Operators(weights=[g.weight for g in plan.groups], results=results, made_from=made_from,
                          verdict=verdict(results))
    operators.save(run.folder / "merge_methods.json")
    return operators


def _merge(run: Run, plan: Plan, method: str, done: int, total: int) -> MergeManifest:
    run.progress("merge methods", method, done, total)
    section = run.recipe.merge.model_copy(update={"method": method})
    as_asked = replace(run, recipe=run.recipe.model_copy(update={"merge": section}))
    return merge_branches(as_asked, plan, [run.branch(g.group) for g in plan.groups], run.folder / "merge_methods" / method)


def _references(run: Run, mixture: Mixture, plan: Plan, merged: MergeManifest) -> list[_Scored]:
    """The base, and the branches' own mean unless the recipe leaves branches unevaluated. They share the run's files."""
    place = run.folder / "evaluation"
    base = evaluate_folder(run, mixture, run.base, "base", run.base_hash, place / "base.json")
    found = [_Scored("base", base, 0.0)]
    if run.recipe.evaluate.branches:
        weights = [g.weight for g in plan.groups]
        each = []
        for group in plan.groups:
            manifest = BranchManifest.load(run.branch(group.group) / "branch.json")
            label = f"branch-{group.group}"
            each.append(evaluate_folder(run, mixture, run.branch(group.group) / "model", label, digest(manifest.files),
                                        place / f"{label}.json"))
        distance = sum(w * d for w, d in zip(weights, merged.branch_displacements, strict=True))
        found.append(_Scored("branches", mean_evaluation(each, weights), distance))
    return found


def mean_evaluation(evaluations: Sequence[Evaluation], weights: Sequence[float]) -> Evaluation:
    """What the branches score themselves: unit by unit, the mean by weight. What the average gains on it is G_var (thm 3.1)."""
    places = {place: {unit: _mean_score([getattr(e, place)[unit] for e in evaluations], weights)
                      for unit in getattr(evaluations[0], place)} for place in PLACES}
    return Evaluation(model="branches", held_out=places["held_out"], transfer=places["transfer"],
                      retention=places["retention"])


def _mean_score(scores: Sequence[UnitScore], weights: Sequence[float]) -> UnitScore:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return math.fsum(w * v for w, v in zip(weights, known, strict=True)) if len(known) == len(values) else None

    first = scores[0]
    return UnitScore(loss=math.fsum(w * s.loss for w, s in zip(weights, scores, strict=True)), tokens=first.tokens,
                     rows=first.rows, exact_match=mean([s.exact_match for s in scores]), f1=mean([s.f1 for s in scores]),
                     answers=first.answers)


# ---- the table ------------------------------------------------------------------------------------------------------


def summarise(scored: Sequence[_Scored]) -> list[OperatorResult]:
    """Every model at every place that it was scored on, against token_weighted."""
    reference = next(s.evaluation for s in scored if s.name == REFERENCE)
    results = []
    for one in scored:
        places: dict[Place, OperatorPlace] = {}
        for place in PLACES:
            if scores := getattr(one.evaluation, place):
                places[place] = _place(place, scores, None if one.name == REFERENCE else getattr(reference, place))
        results.append(OperatorResult(name=one.name, arguments=one.arguments, displacement=one.displacement,
                                      folder=one.folder, bytes=one.bytes, places=places))
    return results


def _place(place: Place, scores: Scores, reference: Scores | None) -> OperatorPlace:
    difference, low, high, counts = None, None, None, (0, 0, 0)
    if reference is not None:
        gaps = np.array([scores[u].loss - reference[u].loss for u in sorted(reference)])
        difference = float(gaps.mean())
        low, high = paired_interval(gaps.tolist(), place) or (None, None)
        counts = (int((gaps < -TIE).sum()), int((np.abs(gaps) <= TIE).sum()), int((gaps > TIE).sum()))
    return OperatorPlace(
        loss=macro_loss(scores) or 0.0, token_loss=token_loss(scores) or 0.0, exact_match=mean_answer(scores, "exact_match"),
        f1=mean_answer(scores, "f1"), difference=difference, low=low, high=high, wins=counts[0], ties=counts[1],
        losses=counts[2])


def verdict(results: Sequence[OperatorResult]) -> list[str]:
    """What the figures say, in sentences, and what they do not."""
    by_name = {r.name: r for r in results}
    methods = [r for r in results if r.arguments is not None]
    lines = []
    for place in PLACES:
        if all(place in r.places for r in methods):
            lines.append(_place_line(place, methods, by_name))
    lines += _order_lines(methods)
    lines.append(_distance_line(methods))
    if added := [r.name for r in methods if r.name in ADD_UP]:
        lines.append(f"As published, {', '.join(added)} would take every task vector in full (weights of one, so about as many "
                     "times the step as there are branches); here every method gets the plan's weights, which sum to one.")
    lines.append("What this does not show: any method at parameters chosen for it (all are at their defaults); another seed's "
                 "branches (intervals are over units); loss is not a chat's quality.")
    return lines


def _place_line(place: Place, methods: Sequence[OperatorResult], by_name: Mapping[str, OperatorResult]) -> str:
    ranked = sorted(methods, key=lambda r: (r.places[place].loss, r.name))
    line = f"On {WORDS[place]}, {ranked[0].name} is best (loss {ranked[0].places[place].loss:.3f})"
    better = [_against(r, place) for r in methods if _word(r.places[place]) == "better"]
    worse = [_against(r, place) for r in methods if _word(r.places[place]) == "worse"]
    unclear = [r.name for r in methods if r.name != REFERENCE and _word(r.places[place]) == "unclear"]
    for word, names in (("better than", better), ("worse than", worse)):
        if names:
            line += f"; {word} {REFERENCE}: {', '.join(names)}"
    if unclear:
        line += f"; no clear difference to it: {', '.join(unclear)}"
    base = by_name["base"].places[place].loss
    under = [r.name for r in ranked if r.places[place].loss > base + TIE]
    if under:
        line += f"; worse than the untrained base ({base:.3f}): {', '.join(under)}"
    return line + "."


def _against(result: OperatorResult, place: Place) -> str:
    row = result.places[place]
    interval = " (too few units for an interval)" if row.low is None or row.high is None else (
        f" [{row.low:+.3f} to {row.high:+.3f}]")
    return f"{result.name} by {abs(row.difference or 0.0):.3f}{interval}"


def _word(row: OperatorPlace) -> str:
    """Beyond the tie margin, and with an interval (where there is one) on one side of zero."""
    if row.difference is None:
        return "reference"
    if row.difference < -TIE and (row.high is None or row.high < 0):
        return "better"
    return "worse" if row.difference > TIE and (row.low is None or row.low > 0) else "unclear"


def _order_lines(methods: Sequence[OperatorResult]) -> list[str]:
    """The paper's order of the methods that both have, and ours."""
    both = [r for r in methods if r.name in PAPER]
    if len(both) < 2:
        return []
    theirs = sorted((r.name for r in both), key=lambda name: -PAPER[name])
    lines = [f"The paper's order on its 7B branches (benchmark averages): "
             f"{', '.join(f'{name} {PAPER[name]}' for name in theirs)}."]
    for place in PLACES:
        if all(place in r.places for r in both):
            ours = sorted((r.name for r in both), key=lambda name: next(r for r in both if r.name == name).places[place].loss)
            same = "the same order" if ours == theirs else (
                f"another order, {'with' if ours[0] == theirs[0] else 'without'} {theirs[0]} in front")
            losses = ", ".join(f"{n} {next(r for r in both if r.name == n).places[place].loss:.3f}" for n in ours)
            lines.append(f"Ours on {WORDS[place]}, by loss: {losses}: {same}.")
    return lines


def _distance_line(methods: Sequence[OperatorResult]) -> str:
    ranked = sorted(methods, key=lambda r: r.displacement)
    return (f"Their distances from the base differ as well, {', '.join(f'{r.name} {r.displacement:.2f}' for r in ranked)}: a "
            "shorter step alone changes these figures.")


def operators_markdown(operators: Operators) -> str:
    """Verdict and one table per place, for a terminal."""
    lines = [f"- {line}" for line in operators.verdict]
    for place in PLACES:
        rows = [_row(r, r.places[place]) for r in operators.results if place in r.places]
        if rows:
            base = next(r for r in operators.results if r.name == "base").places[place]
            units = base.wins + base.ties + base.losses
            lines += ["", f"**{WORDS[place].capitalize()} ({units} unit{'' if units == 1 else 's'})**", "", *_table(rows)]
    size = sum(r.bytes for r in operators.results)
    kept = [r for r in operators.results if r.folder]
    lines += ["", f"{len(kept)} merged models are kept in merge_methods/, {size / 1e6:,.1f} MB; no later stage needs them."]
    return "\n".join(lines) + "\n"


HEADERS = ["method", "loss", "against token_weighted", "95 % interval", "won / tied / lost", "token-weighted", "exact match",
           "F1", "distance from base"]


def _row(result: OperatorResult, row: OperatorPlace) -> list[str]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    against = "–" if row.difference is None else f"{row.difference:+.3f}"
    interval = "–" if row.low is None or row.high is None else f"{row.low:+.3f} to {row.high:+.3f}"
    counts = "–" if row.difference is None else f"{row.wins} / {row.ties} / {row.losses}"
    return [result.name, number(row.loss), against, interval, counts, number(row.token_loss), number(row.exact_match),
            number(row.f1), f"{result.displacement:.2f}"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(HEADERS, *rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                               enumerate(zip(row, widths, strict=True))) + " |" for row in [HEADERS, *rows]]
    dashes = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return [lines[0], dashes, *lines[1:]]
