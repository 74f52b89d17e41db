"""How often is the pilot right? Its forecast against the measured comparison, whatever comes out.

    python benchmarks/pilot_record.py --only quadratics [--problems 200]
    python benchmarks/pilot_record.py --only demo --output runs/pilot-demo
    python benchmarks/pilot_record.py --only p3 --cells runs/regimes --output runs/pilot-p3

quadratics: random mixtures of quadratic losses, one common Hessian or one per unit, trained by SGD or Adam with gradient
noise; seconds. demo: the mixture of `anabranch demo`, pilot and comparison. p3: every cell of p3_regimes that has a
compare.json; its mixture, gradients and conflict are copied, and the pilot runs beside it.

Told per form of extrapolation: share of pairs of arms whose order by place is right, apart for pairs whose measured
difference is clear (95 % interval over units and seeds) and for those within noise; how often the recommended arm is the
best and what it costs if not (regret: its measured score minus the best one's, a score being the mean over places); how
often intervals hold the measured difference to joint. Each part replaces its own section of results/pilot_record.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.artifacts import Comparison, Evaluation, Pilot
from anabranch.compare import parse_arms, run_comparison
from anabranch.conflict import principal_axes
from anabranch.demo import make_demo
from anabranch.demo.story import ARMS as DEMO_ARMS
from anabranch.errors import RecipeError
from anabranch.outlook import BASE, DEFAULT_FORM, FORMS, TREND, Observation, advise, forecast
from anabranch.partition import partition
from anabranch.pilot import SHARE, parse_pilot_arms, run_pilot
from anabranch.pilot_budget import BATCH_POWER, shares_up_to
from anabranch.recipe import load_recipe
from anabranch.rows import generator
from anabranch.run import open_run
from anabranch.scores import PLACES
from machine import RESULTS, machine

BATCH, STEPS = 16, 640  # of the quadratics, full
Losses = dict[tuple[str, str], np.ndarray]  # (arm, place) -> measured losses [seeds, units]
ARMS = ("joint", "joint_batch:4", "joint_matched:merit:2", "soup:2", "random:4", "stratified:4", "merit:2")


# ---- scoring ---------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One mixture: what the pilot saw, and what the full budget gave."""

    name: str
    observations: list[Observation]
    full_tokens: int
    measured: Losses

    @cached_property
    def clear(self) -> set[tuple[str, str, str]]:
        """Pairs of arms, and places, whose measured difference is clear: 95 % interval over units and seeds."""
        found = set()
        for place in self.places:
            seeds, units = self.measured[self.arms[0], place].shape
            random = generator(0, "record", self.name, place)
            by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), 500) / seeds
            by_unit = random.multinomial(units, np.full(units, 1 / units), 500) / units
            for a, b in combinations(self.arms, 2):
                draws = np.einsum("su,bs,bu->b", self.measured[a, place] - self.measured[b, place], by_seed, by_unit)
                low, high = np.quantile(draws, [0.025, 0.975])
                if low > 0 or high < 0:
                    found.add((a, b, place))
        return found

    @property
    def arms(self) -> list[str]:
        return sorted({a for a, _ in self.measured if a != BASE})

    @property
    def places(self) -> list[str]:
        return [p for p in PLACES if (self.arms[0], p) in self.measured]


def judge(case: Case, form: str, trend: float = TREND) -> dict[str, Any]:
    """One case under one form."""
    outlook = forecast(case.observations, case.full_tokens, 0, form=form, trend=trend)
    clear, noise, held, width, errors, changes = [], [], [], [], [], []
    for place in case.places:
        for a, b in combinations(case.arms, 2):
            gap = float(case.measured[a, place].mean() - case.measured[b, place].mean())
            (clear if (a, b, place) in case.clear else noise).append(outlook.difference(a, b, place).value * gap > 0)
        for arm in case.arms:
            for other in ("joint", BASE):
                if arm == other:
                    continue
                span = outlook.difference(arm, other, place)
                truth = float(case.measured[arm, place].mean() - case.measured[other, place].mean())
                if other == "joint":
                    held.append(span.low <= truth <= span.high)
                    width.append(span.high - span.low)
                    errors.append(abs(span.value - truth))
                    changes.append(abs(truth))
    score = {a: float(np.mean([case.measured[a, p].mean() for p in case.places])) for a in case.arms}
    advice = advise(outlook)
    best = min(score, key=lambda a: score[a])
    return {"clear": clear, "noise": noise, "held": held, "width": width, "errors": errors, "changes": changes,
            "recommended": advice.arm, "first": advice.best, "tied": list(advice.tied), "best": best,
            "regret": score[advice.arm] - score[best], "regret_first": score[advice.best] - score[best],
            "regret_joint": score["joint"] - score[best], 
            "regret_tied": score[advice.tied[0]] - score[best], "best_among_tied": best in advice.tied,
            "spread": max(score.values()) - min(score.values())}


def summary(judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over cases; shares of pairs are pooled."""
    def pooled(key: str) -> list[float]:
        return [x for j in judged for x in j[key]]

    def share(values: Sequence[float]) -> float | None:
        return round(float(np.mean(values)), 3) if len(values) else None

    return {"cases": len(judged), "pairs_clear": len(pooled("clear")), "hit_rate_clear": share(pooled("clear")),
            "pairs_within_noise": len(pooled("noise")), "hit_rate_within_noise": share(pooled("noise")),
            "interval_coverage": share(pooled("held")), "interval_width": share(pooled("width")),
            "mean_error": share(pooled("errors")), "mean_difference_to_joint": share(pooled("changes")),
            "recommended_is_best": share([j["recommended"] == j["best"] for j in judged]),
            "lowest_forecast_is_best": share([j["first"] == j["best"] for j in judged]),
            "best_is_among_tied": share([j["best_among_tied"] for j in judged]),
            "tied_arms": share([len(j["tied"]) for j in judged]), "arms": len(ARMS),
            "regret": share([j["regret"] for j in judged]), "regret_of_lowest_forecast": share(
                [j["regret_first"] for j in judged]),
            "regret_of_simplest_tied": share([j["regret_tied"] for j in judged]),
            "regret_of_joint": share([j["regret_joint"] for j in judged]), "spread_of_arms": share(
                [j["spread"] for j in judged])}


def write(section: str, figures: dict[str, Any]) -> None:
    """Replace one section of results/pilot_record.json."""
    path = RESULTS / "pilot_record.json"
    known = json.loads(path.read_text()) if path.exists() else {"benchmark": "pilot_record"}
    known["machine"] = machine()
    known[section] = figures
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")


def tell(title: str, figures: dict[str, Any]) -> None:
    print(title)
    for form, row in figures.items():
        print(f"  {form:12} " + "  ".join(f"{k} {v}" for k, v in row.items()))


# ---- quadratics ------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Units with losses 1/2 (x - c)^T H (x - c) + floor; the first `trained` are the mixture."""

    hessians: np.ndarray  # [U, d, d]
    centres: np.ndarray  # [U, d]
    places: np.ndarray  # [U], index into PLACES
    start: np.ndarray
    rate: float
    noise: float
    adam: bool
    steps: int

    @property
    def trained(self) -> int:
        return int((self.places == 0).sum())

    def losses(self, x: np.ndarray) -> np.ndarray:
        away = x - self.centres
        return np.einsum("ud,ude,ue->u", away, self.hessians, away) / 2


def draw_problem(random: np.random.Generator, equal: bool, *, units: int = 16, size: int = 16) -> Problem:
    """16 trained units with clustered optima, 5 transfer units, 5 retention units whose optimum is the start."""
    count = units + 10
    places = np.array([0] * units + [1] * 5 + [2] * 5)
    spectrum = 10.0 ** -np.linspace(0, random.uniform(1, 2.5), size)
    turns = [np.linalg.qr(random.normal(size=(size, size)))[0] for _ in range(count)]
    own = np.array([10.0 ** random.normal(0, 0.3, size) for _ in range(count)])
    one = turns[0] * spectrum @ turns[0].T
    hessians = np.array([one if equal else t * (spectrum * w) @ t.T for t, w in zip(turns, own, strict=True)])
    clusters = random.normal(size=(4, size)) * random.uniform(0.2, 1.5)
    shared = random.normal(size=size) * random.uniform(0.3, 2)
    centres = shared + clusters[random.integers(0, 4, count)] + random.normal(size=(count, size)) * random.uniform(0.1, 0.8)
    centres[places == 1] *= random.uniform(0.2, 1)
    centres[places == 2] = random.normal(size=((places == 2).sum(), size)) * 0.1
    adam = bool(random.integers(2))
    steepest = max(float(np.linalg.eigvalsh(h)[-1]) for h in hessians[:units])
    rate = random.choice([0.01, 0.03, 0.1]) if adam else random.choice([0.03, 0.1, 0.3, 1.0]) / steepest
    return Problem(hessians, centres, places, np.zeros(size), float(rate), float(10 ** random.uniform(-1.5, 0.3)), adam, STEPS)


def train(problem: Problem, members: np.ndarray, steps: int, batch: int, random: np.random.Generator) -> np.ndarray:
    """Cosine schedule with 3 % warm-up; a step sees `batch` samples of shuffled units, each with gradient noise."""
    x, first, second = problem.start.copy(), np.zeros_like(problem.start), np.zeros_like(problem.start)
    order = np.concatenate([random.permutation(members) for _ in range(-(-steps * batch // len(members)))])
    order = order[: steps * batch].reshape(steps, batch)
    share = np.zeros((steps, len(problem.centres)))
    np.add.at(share, (np.arange(steps)[:, None], order), 1 / batch)
    noise = random.normal(size=(steps, x.size)) * problem.noise / np.sqrt(batch)
    offset = share @ np.einsum("ude,ue->ud", problem.hessians, problem.centres) - noise
    matrices = np.tensordot(share, problem.hessians, 1)
    warm = max(1, round(0.03 * steps))
    for step in range(steps):
        gradient = matrices[step] @ x - offset[step]
        rate = problem.rate * ((step + 1) / warm if step < warm else (1 + np.cos(np.pi * (step - warm) / (steps - warm))) / 2)
        if problem.adam:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            gradient = (first / (1 - 0.9 ** (step + 1))) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        x -= rate * gradient
    return x


def arm_losses(problem: Problem, steps: int, batch: int, seed: int, name: tuple[str | int, ...]) -> dict[str, np.ndarray]:
    """Every arm at the same number of samples: joint takes `steps` steps of `batch` samples."""
    everyone = np.arange(problem.trained)
    away = problem.start - problem.centres[: problem.trained]
    gradients = np.einsum("ude,ue->ud", problem.hessians[: problem.trained], away)
    cosine = gradients @ gradients.T / np.outer(*[np.linalg.norm(gradients, axis=1)] * 2)
    scores = principal_axes(cosine, 3)[0]
    names = [f"u{i:02}" for i in everyone]
    found = {}
    for arm in ARMS:
        method = arm.partition(":")[0]
        random = generator(seed, "record", *name, arm, steps, batch)
        if method == "joint":
            found[arm] = train(problem, everyone, steps, batch, random)
        elif method == "joint_batch":
            found[arm] = train(problem, everyone, max(1, steps // 4), 4 * batch, random)
        elif method == "soup":
            found[arm] = np.mean([train(problem, everyone, steps // 2, batch, random) for _ in range(2)], axis=0)
        elif method != "joint_matched":
            groups = partition(method, names, [1] * len(names), scores, cosine, 4, seed)
            found[arm] = sum((groups == k).mean() * train(problem, np.flatnonzero(groups == k), max(
                1, round(steps * (groups == k).mean())), batch, random) for k in range(4))
    alpha = np.linalg.norm(found["merit:2"] - problem.start) / np.linalg.norm(found["joint"] - problem.start)
    found["joint_matched:merit:2"] = problem.start + alpha * (found["joint"] - problem.start)
    return {arm: problem.losses(x) for arm, x in found.items()}


def quadratic_case(equal: bool, number: int, shares: Sequence[float], exponent: float) -> Case:
    name = ("equal" if equal else "unequal", number)
    problem = draw_problem(generator(0, "record", *name), equal)
    seeds = (0, 1)
    observations, measured = [], {}
    base = problem.losses(problem.start)
    whole = [arm_losses(problem, problem.steps, BATCH, s, name) for s in seeds]
    for p, place in enumerate(PLACES):
        mine = np.flatnonzero(problem.places == p)
        measured[BASE, place] = base[None, mine]
        observations += [Observation(BASE, place, f"u{u:02}", 0, 0, float(base[u])) for u in mine]
        for arm in ARMS:
            measured[arm, place] = np.array([w[arm][mine] for w in whole])
    for share in shares:
        batch = max(1, round(BATCH * share**exponent))
        steps = round(problem.steps * BATCH * share / batch)
        for seed in seeds:
            for arm, losses in arm_losses(problem, steps, batch, seed, name).items():
                observations += [Observation(arm, PLACES[problem.places[u]], f"u{u:02}", seed, steps * batch, float(x))
                                 for u, x in enumerate(losses)]
    return Case("/".join(map(str, name)), observations, problem.steps * BATCH, measured)


def quadratics(problems: int) -> None:
    """Also the contest behind the pilot's defaults: how the batch shrinks, which form extrapolates, how wide intervals are."""
    begun = time.monotonic()
    figures: dict[str, Any] = {"problems": problems, "seeds": 2, "shares": shares_up_to(1 / BATCH), "full_steps": STEPS,
                               "full_batch": BATCH}
    for power in (1.0, 0.5, 0.0):
        for equal in (True, False):
            cases = [quadratic_case(equal, i, figures["shares"], power) for i in range(problems)]
            title = f"{'equal' if equal else 'unequal'} Hessians, batch x share^{power:g}"
            figures[title] = {form: summary([judge(c, form) for c in cases]) for form in FORMS}
            if power == BATCH_POWER:
                figures[title] |= {f"persistence, trend {t:g}": summary(
                    [judge(c, "persistence", t) for c in cases]) for t in (0.0, 0.5, 2.0)}
            tell(title, figures[title])
    figures["seconds"] = round(time.monotonic() - begun)
    write("quadratics", figures)


# ---- demo and p3 -----------------------------------------------------------------------------------------------------


def case_of(name: str, run: Path, compared: Path) -> Case:
    """A pilot (RUN/pilot.json and its evaluations) against a comparison's folder: the arms that both have."""
    pilot, comparison = Pilot.load(run / "pilot.json"), Comparison.load(compared / "compare.json")
    tokens = dict(zip(pilot.shares, pilot.tokens, strict=True))
    measured_runs = {r.arm for r in comparison.runs}
    observations = []
    for one in pilot.runs:
        if one.arm in measured_runs:
            seen = Evaluation.load(run / one.evaluation)
            budget = 0 if one.arm == BASE else tokens[one.share]
            observations += [Observation(one.arm, place, unit, one.seed, budget, score.loss)
                             for place in PLACES for unit, score in getattr(seen, place).items()]
    found: dict[tuple[str, str], list[list[float]]] = {}
    for one in comparison.runs:
        if any(o.arm == one.arm for o in observations):
            seen = Evaluation.load(compared / one.evaluation)
            for place in PLACES:
                if scores := getattr(seen, place):
                    found.setdefault((one.arm, place), []).append([scores[u].loss for u in sorted(scores)])
    return Case(name, observations, pilot.full_tokens, {key: np.array(rows) for key, rows in found.items()})


def told(case: Case, run: Path) -> dict[str, Any]:
    """One real case: what was forecast, what was measured, arm by arm."""
    pilot, judged = Pilot.load(run / "pilot.json"), judge(case, DEFAULT_FORM)
    view = forecast(case.observations, case.full_tokens, 0)
    print(f"{case.name}: recommended {judged['recommended']}, lowest forecast {judged['first']}, best {judged['best']}, "
          f"regret {judged['regret']:.3f}, of the lowest forecast {judged['regret_first']:.3f}, "
          f"of joint {judged['regret_joint']:.3f}")
    rows = [{"arm": a, "place": p, "forecast": view.difference(a, "joint", p)._asdict(),
             "measured": float(case.measured[a, p].mean() - case.measured["joint", p].mean())}
            for p in case.places for a in [BASE, *case.arms]]
    return {"shares": pilot.shares, "batches": pilot.batches, "steps": pilot.steps, "full_steps": pilot.full_steps,
            "pilot_seeds": len(pilot.seeds), "cost": pilot.cost.model_dump() if pilot.cost else None,
            "said": pilot.said, "forms": {form: summary([judge(case, form)]) for form in FORMS},
            **{k: judged[k] for k in ("recommended", "first", "best", "tied", "regret", "regret_first", "regret_joint")},
            "loss minus joint": rows}


def demo(output: Path) -> None:
    """`anabranch demo`'s mixture: its own comparison, and a pilot of the same arms in the same run folder."""
    recipe = load_recipe(make_demo(output))
    run = open_run(recipe, tell=lambda _: None)
    run_comparison(run, parse_arms(DEMO_ARMS), range(1))
    run_pilot(run, parse_pilot_arms(DEMO_ARMS))
    write("demo", told(case_of("demo", run.folder, run.folder), run.folder))


def p3(cells: Path, output: Path, share: float, seeds: int) -> None:
    """Each finished cell of p3_regimes: a pilot from its mixture, gradients and conflict, against its comparison."""
    figures, cases = {}, []
    for compared in sorted(cells.glob("*/run/compare.json")):
        name, done = compared.parents[1].name, Comparison.load(compared)
        if not any(r.arm == "merit:2" for r in done.runs):
            continue  # cells of joint alone
        folder = output / name
        if not folder.exists():
            for part in ("mixture", "gradients", "conflict"):
                shutil.copytree(compared.parent / part, folder / "run" / part)
        recipe = load_recipe(compared.parents[1] / "recipe.yaml", {"output": str(folder.resolve() / "run")})
        run = open_run(recipe, tell=lambda _: None)
        try:
            run_pilot(run, parse_pilot_arms(",".join(ARMS)), seeds, share)
        except RecipeError as error:  # a cell too short for this share
            figures[name] = {"refused": str(error)}
            continue
        cases.append(case_of(name, run.folder, compared.parent))
        figures[name] = told(cases[-1], run.folder)
    figures["all cells"] = {form: summary([judge(c, form) for c in cases]) for form in FORMS}
    tell("p3", figures["all cells"])
    write("p3", figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("quadratics", "demo", "p3"), required=True)
    parser.add_argument("--problems", type=int, default=100, help="of each kind of quadratics")
    parser.add_argument("--cells", type=Path, default=Path("runs/regimes"), help="where p3_regimes wrote")
    parser.add_argument("--output", type=Path, default=Path("runs/pilot"))
    parser.add_argument("--share", type=float, default=SHARE, help="of p3")
    parser.add_argument("--seeds", type=int, default=1, help="of p3")
    args = parser.parse_args()
    if args.only == "quadratics":
        quadratics(args.problems)
    elif args.only == "demo":
        demo(args.output)
    else:
        p3(args.cells, args.output, args.share, args.seeds)


if __name__ == "__main__":
    main()
