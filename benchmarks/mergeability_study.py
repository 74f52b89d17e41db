"""How far can merge success be predicted, and do the vision study's findings hold elsewhere? Figures of tables side by side.

    python benchmarks/mergeability_study.py vision=pairs.csv,tasks.csv:sgd_acc_b16,subsets5.csv language=table.csv,,sets.csv

Each table: NAME=TABLE,BASE_SCORES,SETS; the last two may be empty. Writes results/mergeability_study.json: for every table what
`anabranch mergeability fit` prints (tasks left out, controls, sets), and what arXiv:2601.22285's own data show:

    additive        share of the variance of normalised scores that task identity alone explains (R2 of a_i + a_j)
    best            share of pairs for which each method is best
    likeness        correlation of pair scores between methods
    partner         mean over left-out tasks of r with: minus the partner's gap; the partner's mean over its other merges
    level           rank correlation of each metric with the score, by method
    interaction     r of what task effects leave of a metric with what they leave of the score: what only the pair can tell
    inputs          mean r of our rule on tasks left out, and on several left out, with only some of its inputs
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from anabranch.mergeability.fitting import REDUNDANT
from anabranch.mergeability.metrics import METRICS
from anabranch.mergeability.predict import complete, make_predictor
from anabranch.mergeability.rule import GAP, inputs_of
from anabranch.mergeability.sets import pair_scores, set_trials
from anabranch.mergeability.table import Table, read_sets, read_table
from anabranch.mergeability.trial import trials
from machine import RESULTS, machine

# The study's five, and what the merge engine calls its analogues. Isotropic merging was not in its second version.
LEFT_OUT = ("isotropic",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="NAME=TABLE,BASE_SCORES,SETS")
    parser.add_argument("--draws", type=int, default=60, help="times that several tasks are left out")
    parser.add_argument("--output", type=Path, default=RESULTS / "mergeability_study.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "tables": {}}
    for text in arguments.tables:
        name, _, rest = text.partition("=")
        table, base, sets = [*rest.split(","), "", ""][:3]
        begun = time.monotonic()
        found["tables"][name] = study(Path(table), base or None, Path(sets) if sets else None, arguments.draws)
        found["tables"][name]["seconds"] = round(time.monotonic() - begun, 1)
        show(name, found["tables"][name])
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def study(path: Path, base: str | None, sets: Path | None, draws: int) -> dict[str, Any]:
    whole = read_table(path, base_scores=base)
    whole.metrics.pop(REDUNDANT, None)
    table, methods, dropped = complete(whole, [m for m in whole.methods if m not in LEFT_OUT], drop_missing=True)
    predictor = make_predictor(table, methods)
    judged, _ = trials(table, methods, draws=draws)
    found = {"pairs": len(table), "tasks": len(table.tasks), "dropped": dropped, "methods": methods,
             "mean": {m: float(table.normalised(m).mean()) for m in methods},
             "additive": {m: additive(table, table.normalised(m)) for m in methods},
             "best": best(table, methods), "likeness": likeness(table, methods), "partner": partner(table, methods),
             "level": level(table, methods),
             "interaction": interaction(table, methods), "trials": [t.model_dump() for t in judged],
             "inputs": by_inputs(table, methods, draws)}
    if sets is not None:
        found["sets"] = dict(set_trials(pair_scores(predictor, whole), read_sets(sets)))
    return found


def effects(table: Table, y: np.ndarray) -> np.ndarray:
    """(T + 1,) least squares of y = c + a_i + a_j; of least norm."""
    x = np.concatenate([np.ones((len(table), 1)), membership(table)], axis=1)
    return np.linalg.lstsq(x, y, rcond=None)[0]


def membership(table: Table) -> np.ndarray:
    x = np.zeros((len(table), len(table.tasks)))
    x[np.arange(len(table)), table.first] = 1
    x[np.arange(len(table)), table.second] = 1
    return x


def additive(table: Table, y: np.ndarray) -> float:
    a = effects(table, y)
    left = y - a[0] - membership(table) @ a[1:]
    return float(1 - left.var() / y.var())


def best(table: Table, methods: list[str]) -> dict[str, float]:
    scores = np.stack([table.normalised(m) for m in methods])
    return {m: float((scores.argmax(axis=0) == k).mean()) for k, m in enumerate(methods)}


def likeness(table: Table, methods: list[str]) -> dict[str, float]:
    scores = [table.normalised(m) for m in methods]
    return {f"{a}, {b}": float(np.corrcoef(scores[i], scores[j])[0, 1])
            for i, a in enumerate(methods) for j, b in enumerate(methods) if i < j}


def partner(table: Table, methods: list[str]) -> dict[str, dict[str, float]]:
    gaps = table.by_task(inputs_of(table)[GAP])
    found: dict[str, dict[str, float]] = {}
    for m in methods:
        y = table.normalised(m)
        by_gap, by_mean = [], []
        for h in range(len(table.tasks)):
            held = table.touches([h]) == 1
            other = np.where(table.first[held] == h, table.second[held], table.first[held])
            a = effects(table.take(~held), y[~held])[1:]
            if held.sum() >= 3:
                by_gap.append(np.corrcoef(-gaps[other], y[held])[0, 1])
                by_mean.append(np.corrcoef(a[other], y[held])[0, 1])
        found[m] = {"gap": float(np.mean(by_gap)), "other merges": float(np.mean(by_mean))}
    return found


def metrics_of(table: Table) -> dict[str, np.ndarray]:
    """Of the pair; of what belongs to either task the mean."""
    return {name: v if v.ndim == 1 else v.mean(axis=1) for name, v in inputs_of(table).items()}


def level(table: Table, methods: list[str]) -> dict[str, dict[str, float]]:
    return {name: {m: float(spearmanr(v, table.normalised(m))[0]) for m in methods}
            for name, v in metrics_of(table).items() if np.ptp(v) > 0}


def interaction(table: Table, methods: list[str]) -> dict[str, dict[str, float]]:
    def left(values: np.ndarray) -> np.ndarray:
        a = effects(table, values)
        return values - a[0] - membership(table) @ a[1:]

    scores = {m: left(table.normalised(m)) for m in methods}
    found = {}
    for name, values in metrics_of(table).items():
        own = left(values)
        if own.std() > 1e-6 * max(values.std(), 1e-12):
            found[name] = {m: float(np.corrcoef(own, scores[m])[0, 1]) for m in methods}
    return found


def by_inputs(table: Table, methods: list[str], draws: int) -> dict[str, dict[str, float]]:
    """Mean r over methods, with one and with several tasks left out. Task effects are in: they need no input."""
    def without(names: set[str], gap: bool) -> Table:
        metrics = {k: v for k, v in table.metrics.items() if k not in names and k[:-1] not in names}
        return replace(table, metrics=metrics, base=table.base if gap else np.full_like(table.base, np.nan))

    known = set(table.metrics)
    gaps = {n for n in known if n.startswith(GAP)}
    of: Mapping[str, set[str]] = {c: {n for n in known if n in METRICS and METRICS[n].category == c}
                                  for c in ("task_vector", "effective_rank", "subspace", "activation", "gradient")}
    weights = of["task_vector"] | of["effective_rank"] | of["subspace"] | {
        n for n in known if n in METRICS and METRICS[n].needs == "weights"}
    arms = {"everything": without(set(), True), "gap alone": without(known - gaps, True),
            "gap and activations": without(known - gaps - of["activation"], True),
            "all but the gap": without(gaps, False), "weights alone": without(known - weights, False),
            **{f"without {c}": without(names, True) for c, names in of.items()}}
    found = {}
    for name, arm in arms.items():
        judged, _ = trials(arm, methods, draws=draws // 2, controls=False)
        found[name] = {str(u): float(np.mean([t.r for t in judged if t.unseen == u and t.r is not None])) for u in (1, 2)}
        bare = [t for t in judged if t.unseen == 1]
        found[name]["coverage"] = float(np.mean([t.coverage for t in bare if t.coverage is not None]))
    return found


def show(name: str, found: Mapping[str, Any]) -> None:
    methods = found["methods"]
    print(f"\n{name}: {found['pairs']} pairs of {found['tasks']} tasks, {found['seconds']} s")
    print(f"{'':28}" + "".join(f"{m:>16}" for m in methods))
    rows = {"mean normalised score": found["mean"], "additive (R2)": found["additive"], "best of all, share": found["best"],
            "r with minus partner's gap": {m: found["partner"][m]["gap"] for m in methods},
            "r with its other merges": {m: found["partner"][m]["other merges"] for m in methods}}
    for unseen in (1, 2):
        for rule in dict.fromkeys(t["rule"] for t in found["trials"] if t["unseen"] == unseen):
            rows[f"{unseen} out: {rule}"] = {t["method"]: t["r"] for t in found["trials"]
                                            if (t["rule"], t["unseen"]) == (rule, unseen)}
        for field in ("coverage", "width", "naive_width", "answered", "answered_coverage"):
            rows[f"{unseen} out: {field}"] = {t["method"]: t[field] for t in found["trials"]
                                             if (t["rule"], t["unseen"]) == ("ours", unseen)}
    for words, values in rows.items():
        print(f"{words:28}" + "".join("–".rjust(16) if values.get(m) is None else f"{values[m]:16.3f}" for m in methods))
    for words, values in found["inputs"].items():
        print(f"inputs: {words:24} one left out {values['1']:.3f}, several {values['2']:.3f}, "
              f"coverage {values['coverage']:.3f}")
    pairwise = sorted(found["interaction"].items(), key=lambda item: -float(np.mean(np.abs(list(item[1].values())))))
    for words, values in pairwise[:5]:
        print(f"interaction: {words:40}" + " ".join(f"{m} {values[m]:+.2f}" for m in methods))
    likeness = sorted(found["likeness"].items(), key=lambda item: -item[1])
    print("most alike: " + "; ".join(f"{pair} {r:.3f}" for pair, r in likeness[:3]))
    for words, value in found.get("sets", {}).items():
        print(f"sets: {words:40} {value:.3f}")


if __name__ == "__main__":
    main()
