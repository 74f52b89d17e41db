"""Did it pay? The answer in words, computed from the evaluations and from nothing else.

Differences are loss minus loss, in nats per response token, so negative is better. A unit counts as won or lost only
beyond TIE; a place counts as better or worse only if the mean difference over units is beyond TIE too and, where there
are enough units for one, its 95 % bootstrap interval leaves zero out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.artifacts import ArmSummary, Comparison, Evaluation
from anabranch.report.contents import PLACE_WORDS, Contents, clean
from anabranch.scores import PLACES, TIE, paired_interval

Tone = Literal["good", "bad", "mixed", "unknown"]
Word = Literal["better", "worse", "no clear difference"]
COMPARE = "anabranch compare recipe.yaml"
WORSE_THAN_BASE = "Not worth it: the merged model is worse than the base on the mixture's own held-out rows"


@dataclass(frozen=True)
class Difference:
    """One model against another at one place, over the units both were scored on."""

    place: str
    by_unit: dict[str, float]
    mean: float
    low: float | None
    high: float | None

    @property
    def wins(self) -> int:
        return sum(d < -TIE for d in self.by_unit.values())

    @property
    def losses(self) -> int:
        return sum(d > TIE for d in self.by_unit.values())

    @property
    def ties(self) -> int:
        return len(self.by_unit) - self.wins - self.losses

    @property
    def word(self) -> Word:
        return _word(self.mean, self.low, self.high)

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The units that got worse, worst first."""
        worse = [(u, d) for u, d in self.by_unit.items() if d > TIE]
        return sorted(worse, key=lambda pair: (-pair[1], pair[0]))[:count]


@dataclass(frozen=True)
class Verdict:
    headline: str
    tone: Tone
    sentences: list[str]


def _word(mean: float, low: float | None, high: float | None) -> Word:
    if mean < -TIE and (high is None or high < 0):
        return "better"
    if mean > TIE and (low is None or low > 0):
        return "worse"
    return "no clear difference"


def difference(model: Evaluation, other: Evaluation, place: str) -> Difference | None:
    """`model` minus `other`, with a paired bootstrap over units; None if they share no unit at that place."""
    ours, theirs = getattr(model, place), getattr(other, place)
    units = sorted(set(ours) & set(theirs))
    if not units:
        return None
    values = np.array([ours[u].loss - theirs[u].loss for u in units])
    low, high = paired_interval(values.tolist(), place) or (None, None)
    return Difference(place, dict(zip(units, values.tolist(), strict=True)), float(values.mean()), low, high)


def differences(model: Evaluation, other: Evaluation) -> list[Difference]:
    """At every place that both were scored on, in the order of PLACES."""
    return [d for place in PLACES if (d := difference(model, other, place))]


def signed(value: float) -> str:
    """A difference with its sign, three decimals, and a true minus."""
    text = f"{value:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text.replace("-", "−")


def places(words: Sequence[str]) -> str:
    """'held-out rows, transfer and retention'"""
    named = [PLACE_WORDS[w] for w in words]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]


def verdict(contents: Contents) -> Verdict:
    """The comparison's answer if there is one, else what the run's own evaluations allow to say."""
    if contents.comparison is not None and len({s.arm for s in contents.comparison.summary} - {"base"}) > 1:
        return of_comparison(contents.comparison)  # one arm alone is no comparison
    base, merged = contents.evaluations.get("base"), contents.evaluations.get("merged")
    joint = contents.evaluations.get("joint")
    if merged is None or base is None:
        missing = [name for name, there in (("base", base), ("merged model", merged)) if there is None]
        return Verdict("No verdict yet", "unknown", [
            f"Not evaluated yet: the {' and the '.join(missing)}. `anabranch run recipe.yaml` finishes the run; what "
            "is done is kept."])
    against_base = differences(merged, base)
    if joint is None:
        return _against_base(against_base)
    return _against_joint(differences(merged, joint), against_base)


def _sentences(found: Sequence[Difference], other: str) -> list[str]:
    lines = []
    for d in found:
        known = d.low is not None and d.high is not None
        interval = f", 95 % interval {signed(d.low or 0.0)} to {signed(d.high or 0.0)}" if known else ""
        preposition = "to" if d.word == "no clear difference" else "than"
        lines.append(f"{PLACE_WORDS[d.place].capitalize()}: {d.word} {preposition} {other} "
                     f"({signed(d.mean)} nats per token{interval}); of {len(d.by_unit)} "
                     f"unit{'' if len(d.by_unit) == 1 else 's'} {d.wins} won, {d.ties} tied, {d.losses} lost.")
    return lines


def _against_base(found: Sequence[Difference]) -> Verdict:
    word = {d.place: d.word for d in found}
    lost = [d.place for d in found if d.word == "worse" and d.place != "held_out"]
    sentences = [*_sentences(found, "the base"),
                 "Nothing was measured against joint training (one model trained on everything), so these figures "
                 f"cannot say whether splitting helped. `{COMPARE}` measures that."]
    if not found:
        return Verdict("No verdict: the base and the merged model were not scored on the same units", "unknown",
                       sentences)
    if word.get("held_out") == "worse":
        return Verdict(WORSE_THAN_BASE, "bad", sentences)
    if word.get("held_out") == "no clear difference":
        return Verdict("Not worth it so far: the merged model does not beat its base on the mixture's held-out rows",
                       "bad", sentences)
    if "held_out" not in word:
        return Verdict("Not known whether it paid: no held-out rows were scored", "unknown", sentences)
    if lost:
        return Verdict(f"It learned the mixture at a price: worse than the base on {places(lost)}. "
                       "Whether splitting paid is not known", "mixed", sentences)
    return Verdict("It learned the mixture. Whether splitting paid is not known: joint training was not measured",
                   "unknown", sentences)


def _against_joint(found: Sequence[Difference], against_base: Sequence[Difference]) -> Verdict:
    sentences = [*_sentences(found, "joint training"), *_sentences(against_base, "the base"),
                 "A merged model stays closer to the base than joint training does, and that alone changes these "
                 f"figures. Whether the split or the shorter step helped is not shown here: `{COMPARE}` sets it "
                 "against joint training pulled back to the same distance (joint_matched) and with a larger batch "
                 "(joint_batch)."]
    if not found:
        return Verdict("No verdict: joint training and the merged model were not scored on the same units", "unknown",
                       sentences)
    headline, tone = _weigh({d.place: d.word for d in found}, "joint training")
    if any(d.place == "held_out" and d.word == "worse" for d in against_base):
        headline, tone = WORSE_THAN_BASE, "bad"
    return Verdict(headline, tone, sentences)


def _weigh(word: Mapping[str, Word], other: str) -> tuple[str, Tone]:
    better = [p for p, w in word.items() if w == "better"]
    worse = [p for p, w in word.items() if w == "worse"]
    if better and worse:
        return f"A trade: better than {other} on {places(better)}, worse on {places(worse)}", "mixed"
    if better:
        rest = "" if len(better) == len(word) else ", and no worse elsewhere"
        return f"Worth it on these figures: better than {other} on {places(better)}{rest}", "good"
    if worse:
        return f"Not worth it: worse than {other} on {places(worse)}, and better nowhere", "bad"
    return f"Not worth it: no clear difference to {other} anywhere", "bad"


def of_comparison(comparison: Comparison) -> Verdict:
    """Is there a merit arm that no other arm, the base included, matches at every place? If so: does it beat joint?"""
    table: dict[str, dict[str, ArmSummary]] = {}
    for row in comparison.summary:
        table.setdefault(row.arm, {})[row.place] = row
    told = [clean(s) for s in comparison.verdict]
    ours = [arm for arm in table if arm.split(":")[0] == "merit" and "held_out" in table[arm]]
    if not ours:
        return Verdict("No verdict on MERIT: no merit arm was compared", "unknown", told)
    rivals = [arm for arm in table if arm not in ours]
    as_good = {arm: [r for r in rivals if _no_worse(table[r], table[arm])] for arm in ours}
    left = [arm for arm in ours if not as_good[arm]]
    if not left:
        return Verdict(_matched(as_good, len({row.place for row in comparison.summary})), "bad", told)
    if "joint" not in table:
        return Verdict("Not known whether splitting paid: joint training is not among the arms", "unknown", told)
    best = min(left, key=lambda arm: (table[arm]["held_out"].loss, arm))
    words: dict[str, Word] = {}
    for place in PLACES:
        mine, joint = table[best].get(place), table["joint"].get(place)
        if mine and joint:
            low, high = ((None if end is None else end - joint.loss) for end in (mine.loss_low, mine.loss_high))
            words[place] = _word(mine.loss - joint.loss, low, high)
    headline, tone = _weigh(words, "joint training")
    if tone == "good" and (also := _also_better(table, best, words)):
        names = ", ".join(f"`{clean(arm)}`" for arm in also)
        headline = (f"Worth merging on these figures, but not shown to be worth a conflict-aware split: "
                    f"{headline.split(': ', 1)[-1]}; so are {names}")
        return Verdict(f"`{clean(best)}`: {headline[0].lower()}{headline[1:]}", "mixed", told)
    missing = [c for c in ("joint_matched", "joint_batch") if not any(arm.split(":")[0] == c for arm in table)]
    if missing:
        told = [*told, f"Not among the arms: {', '.join(missing)}. Without them nobody knows whether the split or the "
                       "short step helped."]
    return Verdict(f"`{clean(best)}`: {headline[0].lower()}{headline[1:]}", tone, told)


def _also_better(table: Mapping[str, Mapping[str, ArmSummary]], best: str, words: Mapping[str, Word]) -> list[str]:
    """Arms that know nothing of the conflict and are better than joint wherever the best merit arm is."""
    blind = [arm for arm in table if arm.split(":")[0] in ("random", "stratified", "soup", "joint_matched", "joint_batch")]
    won = [place for place, word in words.items() if word == "better"]
    return [arm for arm in blind if all(
        place in table[arm] and table[arm][place].loss < table["joint"][place].loss - TIE for place in won)]


def _matched(as_good: Mapping[str, Sequence[str]], count: int) -> str:
    """The headline when every merit arm has a rival that is no worse anywhere; names those that match them all."""
    rivals = list(dict.fromkeys(r for found in as_good.values() for r in found))
    of_all = [r for r in rivals if all(r in found for found in as_good.values())]
    names = ", ".join(f"`{clean(r)}`" for r in of_all or rivals)
    where = {1: "at the one place measured", 2: "at both places measured"}.get(count, "at all three places")
    who = f"`{clean(next(iter(as_good)))}`" if len(as_good) == 1 else "every MERIT arm"
    return f"Not worth it here: {who} is matched or beaten {where}, by {names}"


def _no_worse(rival: Mapping[str, ArmSummary], ours: Mapping[str, ArmSummary]) -> bool:
    """At every place both were scored on, the rival's loss is lower than ours or within TIE of it."""
    both = [p for p in PLACES if p in rival and p in ours]
    return bool(both) and all(rival[p].loss <= ours[p].loss + TIE for p in both)
