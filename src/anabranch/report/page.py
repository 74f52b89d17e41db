"""The report as one HTML file: nothing is fetched, no script runs, light and dark follow the reader's setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anabranch.artifacts import Comparison
from anabranch.report import audit, figures, pilot, tables
from anabranch.report.contents import PLACE_MEANING, PLACE_WORDS, Contents
from anabranch.report.diagnostic_figures import picture_svg
from anabranch.report.diagnostics import Section, sections
from anabranch.report.figures import Theme
from anabranch.report.markup import Markup, code, html_table, tag, text
from anabranch.report.verdict import difference, verdict
from anabranch.scores import PLACES, TIE

MARKS = {"good": "✓", "bad": "✗", "mixed": "±", "unknown": "?"}
JUDGED = {"good": "good", "bad": "bad", "none": "describes, does not judge"}
TALL = 30  # a table with more rows scrolls inside its box, and says so
# Even opened from an untrusted place, the file can load nothing and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def html_page(contents: Contents) -> str:
    """The whole file. Same contents, same text."""
    sections = [(key, title, body) for key, title, body in (
        ("mixture", "The mixture", _mixture(contents)),
        ("conflict", "Conflict between units", _conflict(contents)),
        ("groups", "The split", _groups(contents)),
        ("pilot", "The pilot", _pilot(contents)),
        ("training", "Training and merge", _training(contents)),
        ("evaluation", "Evaluation", _evaluation(contents)),
        ("diagnostics", "Diagnostics", _diagnostics(contents)),
        ("methods", "Other merge methods on the same branches", _operators(contents)),
        ("comparison", "Comparison of arms", _comparison(contents)),
    ) if body]
    links = tag("nav", *(tag("a", title, href=f"#{key}") for key, title, _ in sections), aria_label="Sections")
    undone = tables.not_done(contents)
    main = tag(
        "main",
        tag("header", tag("h1", f"Anabranch report: {contents.name}"), _verdict(contents), _tiles(contents),
            *([tag("ul", *(tag("li", line) for line in undone), cls="undone")] if undone else []), links),
        *(tag("section", tag("h2", title), *body, id=key) for key, title, body in sections),
        _footer(contents))
    title = f"{verdict(contents).headline.replace('`', '')} · {contents.name}"
    head = tag("head", tag("meta", charset="utf-8"),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
               Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
               tag("meta", name="color-scheme", content="light dark"), tag("title", title), _style())
    return "<!doctype html>\n" + tag("html", head, tag("body", main), lang="en") + "\n"


def _style() -> Markup:
    groups = "".join(f".g{i}{{background:var(--g{i})}}" for i in range(len(figures.LIGHT.groups)))
    sheet = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    light, dark = figures.css_variables(figures.LIGHT), figures.css_variables(figures.DARK)
    return Markup(f"<style>:root{{color-scheme:light dark;{light}}}\n"
                  f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{sheet}{groups}</style>")


def _verdict(contents: Contents) -> Markup:
    said = verdict(contents)
    headline = tag("h2", tag("span", MARKS[said.tone], cls="mark", aria_hidden="true"), code(said.headline))
    return tag("div", headline, tag("ul", *(tag("li", code(s)) for s in said.sentences)), cls=f"verdict {said.tone}")


def _tiles(contents: Contents) -> Markup:
    return tag("dl", *(tag("div", tag("dt", what), tag("dd", value, cls="figure"), tag("dd", words, cls="words"))
                       for what, value, words in tables.key_numbers(contents)), cls="tiles")


def _note(*sentences: str) -> Markup:
    return Markup("".join(tag("p", code(s), cls="note") for s in sentences))


def _lead(sentence: str) -> Markup:
    return tag("p", code(sentence), cls="lead")


def _more(summary: str, *children: Markup) -> Markup:
    return tag("details", tag("summary", summary), *children)


def _plot(name: str, alt: str, draw: Callable[[Axes, Theme], None], size: tuple[float, float],
          frame: tuple[float, float, float, float]) -> Markup:
    """A figure with one axes; `frame`: left, bottom, width, height as shares of the figure."""

    def onto(figure: Figure, theme: Theme) -> None:
        draw(figure.add_axes(frame), theme)

    return tag("div", Markup(figures.svg(name, alt, onto, size)), cls="plot")


def _pair(plot: Markup, title: str, *notes: Markup) -> Markup:
    return tag("div", plot, tag("div", tag("h3", title), *notes), cls="pair")


def _mixture(contents: Contents) -> list[Markup]:
    mixture = contents.mixture
    parts = [_lead("A unit is one dataset, or one task inside a dataset. A sample is one training row in one pass; "
                   "tokens count prompts and responses, but the loss is taken on response tokens only. Samples, tokens and "
                   "images are counted over all passes. Held-out rows are kept from every stage but evaluation."),
             html_table(tables.mixture_table(contents), tall=len(mixture.units) > TALL)]
    if mixture.transfer or mixture.retention:
        others = tables.other_units_table(contents)
        parts.append(html_table(others, tall=len(others.rows) > TALL))
    if mixture.excluded:
        excluded = tables.excluded_table(contents)
        parts.append(html_table(excluded, tall=len(excluded.rows) > TALL))
    else:
        parts.append(_note("No row was left out."))
    notes = [f"Rows longer than {mixture.max_length:,} tokens are left out, not cut. Chat template: "
             f"{mixture.chat_template}.",
             f"{mixture.duplicates_in_train:,} training rows repeat another training row (kept). "
             f"{mixture.duplicates_across:,} training rows also stood among held-out rows (those were left out of "
             "held-out)."]
    parts.append(tag("div", _note(*notes), cls="wide"))
    if mixture.vision is not None:
        parts += _images(contents)
    if mixture.examples:
        quotes = [tag("div", tag("p", tag("b", example.get("unit", "")), cls="note"),
                      *(_quote(f"{key}: {example[key]}") for key in sorted(example, reverse=True) if key != "unit"))
                  for example in mixture.examples[:6]]
        parts.append(_more("Rows as the model sees them", *quotes))
    return parts


def _images(contents: Contents) -> list[Markup]:
    vision = contents.mixture.vision
    assert vision is not None
    parts = [html_table(tables.images_table(contents)),
             _note(f"An image stands in a row as `{vision.placeholder}`, which becomes as many tokens as the model's processor "
                   "makes of its size. Images count in a row's tokens; the loss is never taken on them.")]
    if contents.mixture.audit:
        stored = "stored" if vision.max_pixels is None else "stored, after the pixel cap"
        lead = tag("p", "Only what is ", tag("mark", "marked"), " is trained; it must end with the end of the turn. Prompts "
                   f"and images are read. Pictures are small copies of what is {stored}.", cls="lead")
        cards = audit.audit_cards(contents)
        parts.append(tag("div", tag("h3", "One row of each unit, as the loss sees it"), lead, *cards, cls="wide"))
    return parts


def _quote(words: str) -> Markup:
    return tag("blockquote", Markup("\n".join(text(line) for line in words[:1500].splitlines())))


def _conflict(contents: Contents) -> list[Markup]:
    conflict = contents.conflict
    if conflict is None:
        return []
    parts = [_lead("At the base model, every unit pulls the weights in some direction: its mean gradient. The cosine "
                   "between two units' gradients is +1 if they pull alike, 0 if they have nothing to do with each "
                   "other and −1 if one undoes the other. Training on two opposed units at once makes them fight."),
             _heat_map(contents),
             html_table(tables.conflicting_table(contents), tall=len(conflict.most_conflicting) > TALL)]
    shares = ", ".join(f"{v:.0%}" for v in conflict.explained[:6])
    grouped = "coloured and shaped by group" if contents.plan else "one dot per unit"
    parts.append(_pair(
        _plot("map", f"Map of {len(conflict.units)} units on the first two conflict axes, {grouped}.",
              lambda axes, theme: figures.draw_map(axes, theme, contents), (440, 400), (0.13, 0.12, 0.85, 0.78)),
        "Map of the units",
        _note("The cosine matrix, seen from its two widest directions (principal component analysis, centred): units "
              "that conflict with the same others stand close together. Only the units farthest out are named; rest "
              "the pointer on a mark for its name.",
              "MERIT cuts this map at weighted medians: axis 1 first, then each half along axis 2, and so on. Groups "
              "that lie in separate corners were split along the conflict; mixed colours were not.")))
    parts.append(_pair(
        _plot("spectrum", f"Share of the variance by conflict axis: {shares}.",
              lambda axes, theme: figures.draw_spectrum(axes, theme, conflict), (440, 270), (0.11, 0.16, 0.87, 0.78)),
        "Spectrum",
        _note("How much of all differences between units lies along each axis. A tall first bar: one quarrel dominates "
              "and a cut along it separates much. A flat row: no single cut does."),
        html_table(tables.spectral_table(contents)),
        _note(tables.G_VAR)))
    parts.append(_reliability(contents))
    return parts


def _heat_map(contents: Contents) -> Markup:
    conflict = contents.conflict
    assert conflict is not None
    count = len(conflict.units)
    alt = (f"Heat map of {count} by {count} cosines, clustered. Mean {conflict.cosine_mean:.3f}, lowest "
           f"{conflict.cosine_min:.3f}, {conflict.negative_share:.0%} of pairs below zero.")
    picture = Markup(figures.svg("heat", alt, lambda figure, theme: figures.draw_heat_map(figure, theme, contents),
                                 figures.heat_size(count)))
    many = count > figures.LABELLED_UNITS
    order = [conflict.units[i] for i in figures.heat_order(contents.matrix)]
    groups = contents.groups
    listing = tag("ol", *(tag("li", *_swatch(groups.get(u)), u) for u in order), cls="order")
    which = "noise-corrected cosines" if conflict.matrix == "corrected" else "cosines"
    bars = " The bars beside rows and columns show each unit's group." if contents.plan else ""
    return tag("div", tag("div", picture, cls="plot square" if many else "plot scrolls"),
               tag("div", _note(f"Heat map of {which}: one row and one column per unit, like beside like "
                                "(average-linkage clustering on 1 − cosine). Blue: alike; orange: opposed; the colour "
                                f"scale is fixed from −1 to 1.{bars} Rest the pointer on the left bar for a unit's "
                                "name."),
                   _more("Units in the order of the rows", listing)), cls="wide")


def _swatch(group: int | None) -> list[Markup]:
    if group is None:
        return []
    return [tag("i", cls=f"swatch {_group_class(group)}", title=f"group {group}")]


def _group_class(group: int) -> str:
    return f"g{group % len(figures.LIGHT.groups)}"


def _reliability(contents: Contents) -> Markup:
    conflict = contents.conflict
    assert conflict is not None
    unreliable = ", ".join(conflict.unreliable[:12]) + (f" and {len(conflict.unreliable) - 12} more"
                                                        if len(conflict.unreliable) > 12 else "")
    said = (f"{len(conflict.unreliable)} of {len(conflict.units)} units cannot be trusted here: {unreliable}."
            if unreliable else "No unit falls to zero here.")
    return _pair(
        _plot("reliability", f"Split-half reliability of {len(conflict.units)} units, sorted; "
                             f"{len(conflict.unreliable)} at or below zero.",
              lambda axes, theme: figures.draw_reliability(axes, theme, conflict), (440, 270),
              (0.12, 0.16, 0.86, 0.78)),
        "Reliability of the gradients",
        _note("Every unit's gradient is measured on two separate halves of its calibration rows. Reliability is how "
              "well the halves agree (1: fully; 0 and below: not at all), stepped up to what both together are worth. "
              "Low: more calibration rows would help."),
        tag("p", said, cls="note"),
        _note(f"Lengths of the gradients: standard deviation / mean {conflict.norm_cv:.2f}, longest / shortest "
              f"{conflict.norm_max_over_min:.1f}. When these are small, axes from cosines and from raw gradients "
              "agree."))


def _groups(contents: Contents) -> list[Markup]:
    plan = contents.plan
    if plan is None:
        return []
    shared = plan.units and all(u.group is None for u in plan.units)
    meaning = ("A soup: every branch sees every unit, in its own order." if shared else
               "Every unit goes to exactly one group, with all its samples; groups are balanced in samples, not in "
               "units.")
    table = tables.groups_table(contents)
    marks = {f"group {g.group}": _group_class(g.group) for g in plan.groups}
    return [_lead(f"Method: {plan.method}. {meaning} One branch is trained per group; a branch's weight in the merge "
                  "is its share of the tokens."),
            _pair(_plot("groups", "Each group's share of units, samples and tokens; the figures are in the table.",
                        lambda axes, theme: figures.draw_composition(axes, theme, contents), (440, 150),
                        (0.13, 0.02, 0.86, 0.96)), "Shares",
                  _note("Equal bars of samples mean equal work for every branch. Tokens may differ: a branch with more "
                        "tokens has the larger say in the merge.")),
            html_table(table, tall=len(table.rows) > TALL, marks=marks),
            _note("Most typical: the units whose gradients are on average most like the rest of their group's.")]


def _training(contents: Contents) -> list[Markup]:
    if not contents.branches:
        return []
    marks = {f"branch {k}": _group_class(k) for k in contents.branches}
    notes = [_note("The loss that each branch saw on its own training rows, in nats per response token. Branches train "
                   "on different units, so their heights are not comparable, and a low training loss says nothing "
                   "about held-out rows.")]
    if (merge := contents.merge) is not None:
        weights = ", ".join(f"{w:.3f}" for w in merge.weights)
        notes.append(_note(f"Merge: {merge.method}, weights {weights}, stored as {merge.dtype}. The merged model lies "
                           f"{merge.displacement:.2f} from the base (L2 distance over all parameters): where branches "
                           "pull apart, averaging cancels, so it moves less than they do."))
    parts = []
    if any(b.losses for b in contents.branches.values()):
        parts.append(_pair(_plot("losses", f"Training loss of {len(contents.branches)} branches by optimizer step.",
                                 lambda axes, theme: figures.draw_losses(axes, theme, contents.branches), (440, 320),
                                 (0.13, 0.14, 0.85, 0.70)), "Training loss", *notes))
    else:
        parts.extend(notes)
    table = tables.branches_table(contents)
    parts.append(html_table(table, tall=len(table.rows) > TALL, marks=marks))
    return parts


def _evaluation(contents: Contents) -> list[Markup]:
    places = tables.places_evaluated(contents)
    if not places:
        return []
    meaning = [tag("li", tag("b", PLACE_WORDS[p]), f": {PLACE_MEANING[p]}") for p in places]
    parts = [_lead("Every model is scored at up to three places, because a model can learn the mixture and forget the "
                   "rest. Lower loss is better."), tag("ul", *meaning, cls="meaning"), *_differences(contents)]
    parts += [html_table(tables.evaluation_table(contents, place)) for place in places]
    parts.append(tag("div", _note(
        "Loss: nats per response token, mean over units, each with the same say; token-weighted: large units have the "
        "larger say. Exact match and F1 (word overlap), from 0 to 1, are over units with short answers.",
        "Against base: difference of the two losses, negative is better. The interval comes from drawing the units "
        f"again 2,000 times; it needs at least five units. A unit counts as won or lost beyond {TIE} nats, else as "
        "tied."), cls="wide"))
    points = figures.trade_points(contents)
    if len(points) > 1 and contents.comparison is None:
        parts.append(_trade(points, "models of this run", ""))
    worst, every = tables.worst_table(contents), tables.unit_table(contents)
    if worst is not None:
        none = tag("div", _note("No unit got worse than the base."), cls="wide")
        parts.append(html_table(worst) if worst.rows else none)
    if every is not None:
        parts.append(_more("Every unit, base and merged", html_table(every, tall=len(every.rows) > TALL)))
    return parts


def _differences(contents: Contents) -> list[Markup]:
    base, merged = contents.evaluations.get("base"), contents.evaluations.get("merged")
    if base is None or merged is None:
        return []
    found = [d for place in PLACES if (d := difference(merged, base, place))]
    if not found:
        return []
    height = 90 + 75 * len(found)
    alt = "Loss of the merged model minus the base's, by unit and place; the means are in the tables."
    return [_pair(_plot("differences", alt, lambda axes, theme: figures.draw_differences(axes, theme, found),
                        (440, height), (0.22, 50 / height, 0.76, 1 - 62 / height)),
                  "Merged model against base, unit by unit",
                  _note("One mark per unit: left of the line (round) its loss fell, right of it (triangle) it rose. "
                        "The diamond is the mean over units, the bar its 95 % interval."))]


def _trade(points: Sequence[figures.TradePoint], what: str, more: str) -> Markup:
    alt = (f"Held-out loss against retention loss, {what}: "
           + "; ".join(f"{p.name} {p.held_out:.3f}, {p.retention:.3f}" for p in points) + ".")
    return _pair(_plot("trade", alt, lambda axes, theme: figures.draw_trade(axes, theme, points), (440, 400),
                       (0.15, 0.12, 0.83, 0.85)), "Learning against keeping",
                 _note("Left: the mixture was learned better. Down: more of what the base could do was kept. Lower "
                       "left is better in both; of two points on a falling line neither beats the other." + more))


def _diagnostics(contents: Contents) -> list[Markup]:
    if not contents.diagnostics:
        return []
    return [_lead("What lies between the models and around them, and how well the gradients were measured. Losses are nats per "
                  "response token, on held-out rows unless said otherwise. A diagnostic that judges bears ✓ (good) or ✗ (bad); "
                  "the others describe."),
            *(tag("div", *_diagnostic(contents, s), cls="diagnostic") for s in sections(contents))]


def _diagnostic(contents: Contents, section: Section) -> list[Markup]:
    mark = MARKS.get(section.verdict)
    judged = [tag("span", mark, cls=f"mark {section.verdict}", title=JUDGED[section.verdict])] if mark else []
    picture = Markup(picture_svg(contents.diagnostics[section.key], f"diagnostic-{section.key}"))
    details = [html_table(t, tall=len(t.rows) > TALL) for t in section.tables]
    cost = [_more("Cost", html_table(section.cost))] if section.cost else []
    return [tag("h3", *judged, section.name, cls="finding"), tag("p", code(section.finding + "."), cls="lead"),
            tag("div", picture, cls="plot scrolls"), _note(section.meaning, *section.said), _more("Figures", *details), *cost]


def _pilot(contents: Contents) -> list[Markup]:
    found = contents.pilot
    if found is None:
        return []
    drift = [html_table(pilot.drift_table(found))] if found.drift else []
    cost = [_more("Cost", html_table(table))] if (table := pilot.pilot_cost(found)) else []
    return [_lead("Every arm was trained on a small share of the tokens; its loss on the full budget is forecast from that. "
                  "Joint training is the line at 0, left of it is better."),
            tag("p", code(pilot.advice(found) + ".")), tag("div", Markup(pilot.pilot_svg(found)), cls="plot scrolls"),
            _note(*found.said), html_table(pilot.pilot_table(found)), *drift, *cost]


def _operators(contents: Contents) -> list[Markup]:
    found = contents.operators
    if found is None:
        return []
    places = [p for p in PLACES if any(p in r.places for r in found.results)]
    return [_lead("The run's own branches, merged in other ways with the same weights and each method's defaults. Differences "
                  "are loss minus token_weighted's: negative is better. `branches` are the branches' own scores, averaged."),
            _note(*found.verdict), *(html_table(tables.operators_table(found, p)) for p in places)]


def _comparison(contents: Contents) -> list[Markup]:
    comparison = contents.comparison
    if comparison is None or not comparison.summary:
        return []
    points = figures.trade_points(contents)
    parts = [_lead("Every arm has the same token budget and starts from the same base. joint trains one model on "
                   "everything; joint_matched is joint pulled back to the merged model's distance from the base; "
                   "joint_batch:n has n times the batch and 1/n of the steps. A gain over joint that these two also "
                   "have comes from the shorter step, not from the split."),
             html_table(tables.arms_table(comparison))]
    if len(points) > 1:
        parts.append(_trade(points, "arms", " Thin crosses: 95 % intervals over units of the difference to joint. "
                                            "Faint marks: single seeds."))
    parts += [_arm_details(comparison, place) for place in PLACES if any(s.place == place for s in comparison.summary)]
    parts.append(tag("div", _note(
        "Interval: from a paired bootstrap over units of the difference to joint, laid around joint's loss. Won, tied "
        "and lost count units against joint. p over seeds: one-sided signed-rank test that the arm beats joint; with "
        "few seeds it cannot become small (three seeds: 0.125 at best)."), cls="wide"))
    return parts


def _arm_details(comparison: Comparison, place: str) -> Markup:
    return html_table(tables.place_table(comparison, place))


def _footer(contents: Contents) -> Markup:
    hashes = [f"mixture {contents.mixture.hash[:12]}"]
    hashes += [f"{name} {artifact.hash[:12]}" for name, artifact in (
        ("conflict", contents.conflict), ("plan", contents.plan), ("merge", contents.merge),
        ("comparison", contents.comparison)) if artifact is not None]
    software = sorted({f"{name} {version}" for b in contents.branches.values() for name, version in b.software.items()})
    lines = [tag("p", "Made by Anabranch from the artifacts of this folder: ", ", ".join(hashes), ".")]
    if software:
        lines.append(tag("p", "Trained with ", ", ".join(software), "."))
    lines.append(tag("p", "Method: Choi and Kim, Decentralized Instruction Tuning: Conflict-Aware Splitting and Weight "
                          "Merging, arXiv:2606.01717."))
    return tag("footer", *lines)
