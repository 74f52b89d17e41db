"""The report's tables as plain strings; the page and the terminal set them each in its own way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.artifacts import ArmRun, ArmSummary, Comparison, Exclusion, OperatorResult, Operators, Unit
from anabranch.report.contents import PLACE_WORDS, Contents
from anabranch.report.verdict import difference, signed
from anabranch.scores import PLACES, Place, macro_loss, mean_answer, token_loss
from anabranch.stale import REMEDY

RULES = {
    "empty_response": "empty response", "empty_prompt": "empty prompt", "over_long": "longer than max_length",
    "malformed": "malformed row", "duplicate_held_out": "also in training rows", "max_samples": "over max_samples",
    "max_tokens": "over max_tokens", "too_few_samples": "too few rows in the unit", "missing_image": "image missing",
    "broken_image": "image broken", "huge_image": "image too large to open", "animated_image": "image animated",
}
NONE = "–"
G_VAR = ("G_var is the branches' spread: half their mean squared distance from their average after one gradient step of size "
         "1. Along the axes it is at least as large as shown (equation F.11, a lower bound); of a random split, it is what is "
         "expected (F.10). It says how far branches drift apart, not which arm wins: that has to be measured.")
HINTS = {
    "samples": "training rows times passes", "p over seeds": "one-sided signed-rank test over seeds that the arm beats joint",
    "token-weighted": "mean over response tokens: large units have the larger say",
    "share of joint's step": "how far back joint was pulled: 1 is joint, 0 the base",
    "won / tied / lost": "units with a lower, an equal and a higher loss",
}


@dataclass(frozen=True)
class Table:
    """`rows` hold raw text (not escaped); the first `words` columns are text, the rest numbers."""

    caption: str
    headers: list[str]
    rows: list[list[str]]
    words: int = 1
    total: list[str] | None = None


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def _interval(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{signed(low)} to {signed(high)}"


def mixture_table(contents: Contents) -> Table:
    """One row per unit of the mixture, and what they sum to."""
    mixture, left_out = contents.mixture, _rows_left_out(contents.mixture.excluded)
    units, pictured = mixture.units, mixture.vision is not None

    def row(unit: Unit) -> list[str]:
        images = [f"{unit.images:,}", f"{unit.image_tokens:,}"] if pictured else []
        return [unit.name, unit.format, f"{unit.rows:,}", f"{unit.epochs:g}", f"{unit.samples:,}", f"{unit.tokens:,}",
                f"{unit.response_tokens:,}", *images, f"{unit.held_out_rows:,}", f"{left_out.get(unit.name, 0):,}"]

    images = [f"{sum(u.images for u in units):,}", f"{sum(u.image_tokens for u in units):,}"] if pictured else []
    total = [f"all {len(units)} units", "", f"{sum(u.rows for u in units):,}", "", f"{sum(u.samples for u in units):,}",
             f"{mixture.tokens:,}", f"{sum(u.response_tokens for u in units):,}", *images,
             f"{sum(u.held_out_rows for u in units):,}", f"{sum(left_out.get(u.name, 0) for u in units):,}"]
    return Table("Units of the mixture", ["unit", "format", "training rows", "passes", "samples", "tokens", "response tokens",
                                          *(["images", "image tokens"] if pictured else []), "held-out rows", "rows left out"],
                 [row(u) for u in units], 2, total)


def images_table(contents: Contents) -> Table:
    """What the images cost in tokens, and the pixel cap's part in it."""
    vision, mixture = contents.mixture.vision, contents.mixture
    assert vision is not None
    spared = vision.image_tokens_uncapped - vision.image_tokens
    cap = NONE if vision.max_pixels is None else f"{vision.max_pixels:,} pixels"
    row = [cap, f"{vision.images:,}", f"{vision.scaled_down:,}", f"{vision.smallest:,}", f"{vision.median:,}",
           f"{vision.largest:,}", f"{vision.image_tokens:,}", f"{vision.image_tokens / max(1, mixture.tokens):.1%}",
           f"{vision.image_tokens_uncapped:,}", f"{spared / max(1, vision.image_tokens_uncapped):.1%}"]
    return Table("Images of the training rows", [
        "pixel cap", "images, each once", "scaled down", "tokens of one, fewest", "median", "most", "image tokens",
        "of all tokens", "without the cap", "spared by it"], [row])


def other_units_table(contents: Contents) -> Table:
    """Units that are only evaluated on."""
    rows = [[u.name, kind, f"{u.held_out_rows:,}", f"{u.held_out_tokens:,}"]
            for kind, units in (("transfer", contents.mixture.transfer), ("retention", contents.mixture.retention))
            for u in units]
    return Table("Units that nobody trains on", ["unit", "used for", "rows", "tokens"], rows, 2)


def _rows_left_out(excluded: Sequence[Exclusion]) -> dict[str, int]:
    count: dict[str, int] = {}
    for e in excluded:
        count[e.unit] = count.get(e.unit, 0) + e.rows
    return count


def excluded_table(contents: Contents) -> Table:
    """Everything left out, by unit and rule."""
    excluded = contents.mixture.excluded
    rows = [[e.unit, RULES[e.rule], e.split.replace("_", "-"), e.example, f"{e.rows:,}"] for e in excluded]
    total = ["all", "", "", "", f"{sum(e.rows for e in excluded):,}"]
    return Table("Left out by rule", ["unit", "rule", "rows of", "first such row", "rows"], rows, 4, total)


def conflicting_table(contents: Contents) -> Table:
    assert contents.conflict is not None
    rows = [[a, b, number(c)] for a, b, c in contents.conflict.most_conflicting]
    return Table("Most opposed pairs", ["unit", "unit", "cosine"], rows, 2)


def spectral_table(contents: Contents) -> Table:
    assert contents.conflict is not None
    rows = [[f"{t.axes} → {2 ** t.axes} groups", f"{t.random_gain:.3g}", f"{t.pca_bound:.3g}", f"{t.ratio:.2f}",
             "yes" if t.above_random else "not assured"] for t in contents.conflict.spectral_tests]
    return Table("Spectral test (G_var): how far branches drift apart",
                 ["axes", "random split", "along the axes", "ratio", "farther than random?"], rows)


def typical_units(contents: Contents, group: int, count: int = 3) -> list[str]:
    """The group's units with the highest mean similarity to the rest of their group, best first."""
    if contents.conflict is None:
        return []
    groups, units = contents.groups, contents.conflict.units
    members = [i for i, u in enumerate(units) if groups.get(u) == group]
    if len(members) < 2:
        return [units[i] for i in members]
    block = contents.matrix[np.ix_(members, members)]
    mean = (block.sum(axis=1) - np.diag(block)) / (len(members) - 1)
    return [units[members[i]] for i in np.argsort(-mean, kind="stable")[:count]]


def groups_table(contents: Contents) -> Table:
    assert contents.plan is not None
    rows = [[f"group {g.group}", ", ".join(typical_units(contents, g.group)) or NONE, f"{g.units:,}", f"{g.samples:,}",
             f"{g.tokens:,}", number(g.weight)] for g in contents.plan.groups]
    headers = ["group", "most typical units", "units", "samples", "tokens", "weight in the merge"]
    return Table("Groups", headers, rows, 2)


def branches_table(contents: Contents) -> Table:
    rows = []
    for k, b in contents.branches.items():
        moved = contents.merge.branch_displacements if contents.merge else []
        rows.append([f"branch {k}", f"{len(b.group_units):,}", f"{b.steps:,}", f"{b.tokens_planned:,}",
                     f"{b.tokens_seen:,}", number(b.final_loss), number(moved[k] if k < len(moved) else None, 2)])
    return Table("Branches", ["branch", "units", "steps", "tokens planned", "tokens seen", "last training loss",
                              "distance from base"], rows)


def evaluation_table(contents: Contents, place: str) -> Table:
    """Every evaluated model at one place, against the base."""
    base, rows = contents.evaluations.get("base"), []
    for name in contents.models:
        evaluation = contents.evaluations[name]
        scores = getattr(evaluation, place)
        against = difference(evaluation, base, place) if base is not None and name != "base" else None
        rows.append([name, number(macro_loss(scores)), number(token_loss(scores)),
                     signed(against.mean) if against else NONE,
                     _interval(against.low, against.high) if against else NONE,
                     f"{against.wins} / {against.ties} / {against.losses}" if against else NONE,
                     number(mean_answer(scores, "exact_match")), number(mean_answer(scores, "f1"))])
    units = max((len(getattr(e, place)) for e in contents.evaluations.values()), default=0)
    scored = max((sum(s.rows for s in getattr(e, place).values()) for e in contents.evaluations.values()), default=0)
    return Table(f"{PLACE_WORDS[place].capitalize()} ({units} unit{'' if units == 1 else 's'}, {scored:,} rows)",
                 ["model", "loss", "token-weighted", "against base", "95 % interval", "won / tied / lost",
                  "exact match", "F1"], rows)



def places_evaluated(contents: Contents) -> list[str]:
    return [p for p in PLACES if any(getattr(e, p) for e in contents.evaluations.values())]


def worst_table(contents: Contents, count: int = 6) -> Table | None:
    """Units where the merged model lost most against the base, over all places."""
    base, merged = contents.evaluations.get("base"), contents.evaluations.get("merged")
    if base is None or merged is None:
        return None
    rows, cut = [], []
    for place in PLACES:
        if (d := difference(merged, base, place)) is None:
            continue
        if d.losses > count:
            cut.append(f"the first {count} of {d.losses} on {PLACE_WORDS[place]}")
        for unit, value in d.worst(count):
            before, after = getattr(base, place)[unit].loss, getattr(merged, place)[unit].loss
            rows.append([unit, PLACE_WORDS[place], number(before), number(after), signed(value)])
    headers = ["unit", "place", "base", "merged", "difference"]
    shown = f" ({', '.join(cut)})" if cut else ""
    return Table(f"Units that got worse than the base, worst first at each place{shown}", headers, rows, 2)


def unit_table(contents: Contents) -> Table | None:
    """Every unit: base and merged."""
    base, merged = contents.evaluations.get("base"), contents.evaluations.get("merged")
    if base is None or merged is None:
        return None
    groups = contents.groups
    rows = []
    for place in PLACES:
        d = difference(merged, base, place)
        for unit, value in (d.by_unit.items() if d else ()):
            group = groups.get(unit) if place == "held_out" else None
            before, after = getattr(base, place)[unit].loss, getattr(merged, place)[unit].loss
            rows.append([unit, PLACE_WORDS[place], NONE if group is None else str(group), number(before), number(after),
                         signed(value)])
    return Table("Every unit", ["unit", "place", "group", "base", "merged", "difference"], rows, 3)


def arms_table(comparison: Comparison) -> Table:
    """One row per arm: its loss at the three places and what it cost."""
    cell: dict[tuple[str, str], ArmSummary] = {(s.arm, s.place): s for s in comparison.summary}
    rows = []
    for arm in dict.fromkeys([*(s.arm for s in comparison.summary), *(r.arm for r in comparison.runs)]):
        runs = [r for r in comparison.runs if r.arm == arm]
        losses = [number(cell[arm, place].loss) if (arm, place) in cell else NONE for place in PLACES]
        rows.append([arm, *losses, number(_mean(runs, "displacement"), 2), number(_mean(runs, "alpha"), 2),
                     f"{_mean(runs, 'tokens') or 0:,.0f}", f"{max((r.branches for r in runs), default=0)}"])
    return Table(f"Every arm, mean over {_seeds(comparison)}",
                 ["arm", "held-out", "transfer", "retention", "distance from base", "share of joint's step",
                  "training tokens", "branches"], rows)


def _mean(runs: Sequence[ArmRun], name: str) -> float | None:
    values = [v for r in runs if (v := getattr(r, name)) is not None]
    return float(np.mean(values)) if values else None


def _seeds(comparison: Comparison) -> str:
    return f"{len(comparison.seeds)} seed{'' if len(comparison.seeds) == 1 else 's'}"


def _span(row: ArmSummary) -> str:
    """Of the difference to joint; the artifact holds it added to joint's loss."""
    if row.loss_low is None or row.loss_high is None or row.versus_joint is None or row.arm == "joint":
        return NONE
    joint = row.loss - row.versus_joint
    return _interval(row.loss_low - joint, row.loss_high - joint)


def place_table(comparison: Comparison, place: str) -> Table:
    """One place in full: intervals, units won, seeds."""

    def row(s: ArmSummary) -> list[str]:
        against = s.versus_joint is not None and s.arm != "joint"
        return [s.arm, number(s.loss), _span(s), number(s.token_loss),
                signed(s.versus_joint) if against and s.versus_joint is not None else NONE,
                f"{s.wins} / {s.ties} / {s.losses}" if against else NONE,
                NONE if s.wilcoxon_p is None else f"{s.wilcoxon_p:.3f}",
                ", ".join(number(v) for v in s.loss_by_seed), number(s.exact_match), number(s.f1)]

    headers = ["arm", "loss", "95 % against joint", "token-weighted", "against joint", "won / tied / lost", "p over seeds",
               "loss by seed", "exact match", "F1"]
    rows = [s for s in comparison.summary if s.place == place]
    units = max((s.wins + s.ties + s.losses for s in rows), default=0)
    caption = PLACE_WORDS[place].capitalize() + (f" ({units} unit{'' if units == 1 else 's'})" if units else "")
    return Table(caption, headers, [row(s) for s in rows])


def operators_table(operators: Operators, place: Place) -> Table:
    """Other merge methods on the same branches at one place, lowest loss first; base and branches beside them."""

    def row(r: OperatorResult) -> list[str]:
        p = r.places[place]
        return [r.name, number(p.loss), NONE if p.difference is None else signed(p.difference), _interval(p.low, p.high),
                NONE if p.difference is None else f"{p.wins} / {p.ties} / {p.losses}", number(p.token_loss),
                number(r.displacement, 2), number(p.exact_match), number(p.f1)]

    there = sorted((r for r in operators.results if place in r.places), key=lambda r: r.places[place].loss)
    return Table(PLACE_WORDS[place].capitalize(),
                 ["method", "loss", "against token_weighted", "95 % interval", "won / tied / lost", "token-weighted",
                  "distance from base", "exact match", "F1"], [row(r) for r in there])


def not_done(contents: Contents) -> list[str]:
    """One line per stage that has left nothing, or not all, yet. A comparison folder trains its arms elsewhere."""
    lines = []
    if contents.outdated:
        lines.append("Left out, as made of another mixture, gradients, conflict, plan, base, branch or merged model "
                     f"than this folder now holds: {', '.join(contents.outdated)}. "
                     + (REMEDY if contents.stale else "The same command makes them anew."))
    if contents.comparison is not None and contents.plan is None:
        return lines if contents.conflict else [*lines, "Conflict: not measured yet."]
    if contents.conflict is None:
        lines.append("Conflict: not measured yet.")
    if contents.plan is None:
        lines.append("Split: no plan yet.")
    elif missing := [str(g.group) for g in contents.plan.groups if g.group not in contents.branches]:
        lines.append(f"Branches: {len(contents.branches)} of {len(contents.plan.groups)} trained; "
                     f"missing: {', '.join(missing)}.")
    if contents.merge is None:
        lines.append("Merge: not done yet.")
    missing = [name for name in ("base", "merged") if name not in contents.evaluations]
    if missing:
        lines.append(f"Evaluation: not scored yet: {', '.join(missing)}.")
    return lines


def key_numbers(contents: Contents) -> list[tuple[str, str, str]]:
    """(what, figure, in plain words), only what is known."""
    mixture, conflict = contents.mixture, contents.conflict
    out = [("mixture", f"{len(mixture.units):,} units", f"{mixture.tokens:,} training tokens, "
            f"{sum(u.held_out_rows for u in mixture.units):,} held-out rows")]
    if mixture.vision is not None:
        share = mixture.vision.image_tokens / max(1, mixture.tokens)
        out.append(("images", f"{share:.0%} of tokens", f"{mixture.vision.images:,} images, {mixture.vision.median:,} tokens "
                    "each in the median"))
    if conflict is not None:
        out.append(("conflict", f"{conflict.negative_share:.0%} of pairs",
                    "pull against each other (cosine below 0); "
                    f"mean {number(conflict.cosine_mean)}, lowest {number(conflict.cosine_min)}"))
    if contents.plan is not None:
        weights = [g.weight for g in contents.plan.groups]
        out.append(("split", f"{len(weights)} group{'' if len(weights) == 1 else 's'}",
                    f"method {contents.plan.method}, "
                    f"weights {min(weights, default=0):.3f} to {max(weights, default=0):.3f}"))
    if contents.merge is not None:
        moved = contents.merge.branch_displacements
        branches = f"branches {min(moved):.2f} to {max(moved):.2f}; " if moved else ""
        out.append(("step of the merge", number(contents.merge.displacement, 2),
                    f"distance from the base; {branches}{contents.merge.method}"))
    base, merged = contents.evaluations.get("base"), contents.evaluations.get("merged")
    if base and merged:
        for place in places_evaluated(contents):
            if d := difference(merged, base, place):
                before, after = macro_loss(getattr(base, place)), macro_loss(getattr(merged, place))
                out.append((PLACE_WORDS[place], signed(d.mean),
                            f"loss {number(before)} → {number(after)}, base → merged"))
    if contents.diagnostics:
        count = Counter(d.verdict for d in contents.diagnostics.values())
        out.append(("diagnostics", f"{count['good']} good, {count['bad']} bad",
                    f"{count['none']} describe and do not judge"))
    if contents.pilot is not None:
        a = contents.pilot.advice
        out.append(("pilot", a.action.replace("_", " "), f"recommended: {a.arm}" + ("" if a.known else ", not for certain")))
    if contents.comparison is not None:
        arms = {s.arm for s in contents.comparison.summary}
        out.append(("comparison", f"{len(arms)} arms", f"{_seeds(contents.comparison)}, equal token budget"))
    return out
