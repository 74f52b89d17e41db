"""What the report says and draws of a pilot: every arm's forecast against joint training, with what it was made from."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from anabranch.artifacts import Interval, Pilot, PilotForecast
from anabranch.report.canvas import WIDTH, Look, Sheet, look, whiskers
from anabranch.report.contents import PLACE_WORDS, shorten
from anabranch.report.figures import Theme, svg, tip
from anabranch.report.tables import NONE, Table, number
from anabranch.report.verdict import signed
from anabranch.scores import PLACES

ROW = 30.0
ADVICE = {"split": "split and merge", "joint": "do not split: train jointly", "pull_back": "train jointly and pull back"}


def advice(pilot: Pilot) -> str:
    """The recommendation in a line, with what could not be told from it."""
    a = pilot.advice
    alpha = "" if a.alpha is None else f", keeping {a.alpha:.0%} of its step"
    others = [f"`{arm}`" for arm in a.tied if arm != a.arm]
    known = "" if a.known or not others else f"; not told apart from {', '.join(others)}"
    return f"Recommended: {ADVICE[a.action]} (`{a.arm}`{alpha}){known}"


def pilot_places(pilot: Pilot) -> list[str]:
    return [p for p in PLACES if any(f.place == p for f in pilot.forecasts)]


def arms_in_order(pilot: Pilot) -> list[str]:
    """Lowest forecast score first; arms without one (the base) last."""
    score = {s.arm: s.versus_joint.value for s in pilot.scores}
    arms = list(dict.fromkeys([*score, *(f.arm for f in pilot.forecasts)]))
    return sorted(arms, key=lambda arm: (arm not in score, score.get(arm, 0.0)))


def pilot_table(pilot: Pilot) -> Table:
    """Forecast difference to joint by arm and place; negative is better."""
    cell: dict[tuple[str, str], Interval] = {(f.arm, f.place): f.versus_joint for f in pilot.forecasts}
    score = {s.arm: s.versus_joint for s in pilot.scores}
    places = pilot_places(pilot)
    rows = [[arm, *(_figure(cell.get((arm, p)), arm) for p in places), _figure(score.get(arm), arm)]
            for arm in arms_in_order(pilot)]
    return Table("Forecast for the full budget: loss minus joint's, nats per response token (95 % interval)",
                 ["arm", *(PLACE_WORDS[p] for p in places), "mean of the places"], rows)


def _figure(found: Interval | None, arm: str) -> str:
    if found is None:
        return NONE
    return "0" if arm == "joint" else f"{signed(found.value)} ({signed(found.low)} to {signed(found.high)})"


def drift_table(pilot: Pilot) -> Table:
    """The other question: how far branches drift apart."""
    rows = [[f"{d.axes} → {2**d.axes} groups", number(d.ratio.value, 2), f"{d.ratio.low:.2f} to {d.ratio.high:.2f}"]
            for d in pilot.drift]
    return Table("How far branches drift apart, against a random split (not which arm wins)",
                 ["axes", "ratio, at least", "95 % interval"], rows)


def pilot_cost(pilot: Pilot) -> Table | None:
    if (c := pilot.cost) is None:
        return None
    return Table("Cost of the pilot: predicted before, measured after", ["", "training tokens", "seconds"], [
        ["predicted", f"{c.predicted_tokens:,}", f"{c.predicted_seconds:,.0f}"],
        ["measured", f"{c.measured_tokens:,}", f"{c.measured_seconds:,.0f}"]])


def pilot_svg(pilot: Pilot) -> str:
    """Forest plot as an inline `<svg>`: a panel per place and one for their mean, a row per arm."""
    height = 34 + ROW * len(arms_in_order(pilot)) + 86
    best = pilot.advice.arm
    alt = f"Forecast loss of {len(arms_in_order(pilot))} arms against joint training by place; recommended: {best}."
    return svg("pilot", alt, lambda figure, theme: draw_pilot(Sheet(figure, theme, height), pilot), (WIDTH, height))


def draw_pilot(sheet: Sheet, pilot: Pilot) -> None:
    """Filled: forecast with its interval. Hollow: what the pilot measured, the larger the larger its budget."""
    arms, places = arms_in_order(pilot), pilot_places(pilot)
    panels = [*places, *(["mean"] if pilot.scores else [])]
    labels = 20 + 6.4 * max((len(shorten(a, 24)) for a in arms), default=4)
    width = (WIDTH - labels - 14 - 16 * (len(panels) - 1)) / max(1, len(panels))
    row = {arm: len(arms) - 1 - i for i, arm in enumerate(arms)}
    for i, panel in enumerate(panels):
        axes = sheet.axes(labels + i * (width + 16), 34, width, ROW * len(arms),
                          "mean of the places" if panel == "mean" else PLACE_WORDS[panel], "x")
        if panel == "mean":
            for s in pilot.scores:
                _interval(axes, sheet.theme, s.arm, s.versus_joint, row[s.arm])
        for f in pilot.forecasts:
            if f.place == panel:
                _forecast(axes, sheet.theme, f, row[f.arm])
        _frame(axes, sheet.theme, pilot, arms if i == 0 else [""] * len(arms))
    hollow = Line2D([], [], linestyle="", marker="o", markersize=5, markerfacecolor="none", color=sheet.theme.soft)
    filled = Line2D([], [], marker="o", markersize=7, color=sheet.theme.soft, linewidth=1.8)
    shares = ", ".join(f"{s:.2%}".replace(".00%", "%") for s in pilot.shares)
    top = 34 + ROW * len(arms) + 32
    sheet.words(labels, top, "loss minus joint's, nats per response token (left of 0: better than joint)", WIDTH - labels)
    sheet.legend(labels, top + 24, WIDTH - labels - 14, [
        (filled, "forecast, 95 % interval"), (hollow, f"measured at {shares} of the tokens, small to large")])


def _frame(axes: Axes, theme: Theme, pilot: Pilot, names: list[str]) -> None:
    axes.axvline(0, color=theme.soft, linewidth=1)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(range(len(names)), [shorten(a, 24) for a in reversed(names)])
    axes.tick_params(axis="y", length=0, labelcolor=theme.ink)
    for label in axes.get_yticklabels():
        if label.get_text() == shorten(pilot.advice.arm, 24):
            label.set_fontweight("bold")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.margins(x=0.08)


def _arm(theme: Theme, arm: str) -> Look:
    if arm.split(":")[0] == "merit":
        return look(theme, "merged")
    if arm.startswith("joint_"):
        return look(theme, "joint")._replace(marker="P")
    if arm in ("joint", "base"):
        return look(theme, arm)
    return look(theme, "merged")._replace(colour=theme.groups[2], marker="^")


def _interval(axes: Axes, theme: Theme, arm: str, found: Interval, y: float) -> None:
    here = _arm(theme, arm)
    whiskers(axes, found.value, y, found.low, found.high, here.colour, upright=False, width=1.8)
    (mark,) = axes.plot(found.value, y, here.marker, color=here.colour, markersize=7)
    tip(mark, f"{arm}: {signed(found.value)} ({signed(found.low)} to {signed(found.high)})")


def _forecast(axes: Axes, theme: Theme, forecast: PilotForecast, y: float) -> None:
    _interval(axes, theme, forecast.arm, forecast.versus_joint, y - 0.1)
    here = _arm(theme, forecast.arm)
    for i, point in enumerate(forecast.points):
        (mark,) = axes.plot(point.versus_joint, y + 0.22, here.marker, color=here.colour, markerfacecolor="none",
                            markersize=3.2 + 1.6 * i, markeredgewidth=0.9)
        tip(mark, f"{forecast.arm} at {point.share:.2%} of the tokens: {signed(point.versus_joint)}")
