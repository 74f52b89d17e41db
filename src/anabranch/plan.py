"""Groups -> plan.json, the file that says who trains what, and what a person's edit of it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from anabranch.artifacts import Mixture, Plan, PlanGroup, PlanUnit, digest
from anabranch.errors import PlanError


def make_plan(method: str, groups: Mapping[str, int | None], count: int, mixture: Mixture, seed: int,
              made_from: Mapping[str, str]) -> Plan:
    """The plan of a partition.

    Args:
        groups: unit name -> group 0 .. count-1, or None for every unit (a soup).
        count: K.
    """
    units = [PlanUnit(unit=u.name, group=groups[u.name], samples=u.samples, tokens=u.tokens, sha256=u.sha256)
             for u in mixture.units]
    return Plan(method=method, seed=seed, units=units, groups=summarise_groups(units, count), made_from=dict(made_from))


def summarise_groups(units: list[PlanUnit], count: int) -> list[PlanGroup]:
    """Sizes and merge weights w_k = N_k / sum N_j (MERIT step 5). In a soup every branch has 1/K of everything.

    Raises:
        PlanError: a group without units, or only some units in no group.
    """
    total_samples, total = sum(u.samples for u in units), sum(u.tokens for u in units)
    if all(u.group is None for u in units):
        return [PlanGroup(group=k, units=len(units), samples=round(total_samples / count), tokens=round(total / count),
                          weight=1 / count) for k in range(count)]
    stray = [u.unit for u in units if u.group is None or not 0 <= u.group < count]
    if stray:
        raise PlanError(f"plan.json: {', '.join(map(repr, stray[:5]))}: `group` must be a number from 0 to {count - 1}.")
    members = [[u for u in units if u.group == k] for k in range(count)]
    empty = [str(k) for k, group in enumerate(members) if not group]
    if empty:
        raise PlanError(f"plan.json: no unit in group {', '.join(empty)}. Give it one, or split into fewer groups.")
    return [PlanGroup(group=k, units=len(group), samples=sum(u.samples for u in group),
                      tokens=sum(u.tokens for u in group), weight=sum(u.tokens for u in group) / total)
            for k, group in enumerate(members)]


def misfits(plan: Plan, mixture: Mixture) -> list[str]:
    """Where a plan's units are not the mixture's; [] where it fits."""
    here, there = {u.name for u in mixture.units}, [u.unit for u in plan.units]
    problems = [f"unit {name!r} stands twice" for name in sorted({n for n in there if there.count(n) > 1})]
    sizes = {u.name: (u.samples, u.tokens, u.sha256) for u in mixture.units}
    problems += [f"unit {u.unit!r}: the plan has {u.samples:,} samples and {u.tokens:,} tokens, the mixture "
                 f"{sizes[u.unit][0]:,} and {sizes[u.unit][1]:,}{'' if sizes[u.unit][2] == u.sha256 else ', of other rows'}"
                 for u in plan.units if u.unit in sizes and sizes[u.unit] != (u.samples, u.tokens, u.sha256)]
    problems += [f"unit {name!r} is not in the mixture" for name in sorted(set(there) - here)]
    return problems + [f"unit {name!r} of the mixture is in no group" for name in sorted(here - set(there))]


def load_plan(path: Path, mixture: Mixture) -> tuple[Plan, bool]:
    """The plan, and whether a person edited it since it was written (then `groups` is made anew from the units).

    Raises:
        PlanError: the plan's units are not the mixture's.
        CorruptedError: it is no plan.
    """
    plan = Plan.load(path)
    if problems := misfits(plan, mixture):
        raise PlanError.of(f"{path}: does not fit the mixture. If rows or images changed, put them back to go on with what is "
                           "trained, plan and train anew with `--from split`, or give another `output`, which keeps both; "
                           "if the plan was edited, mend it:", problems)
    if not plan.units or not plan.groups:
        raise PlanError(f"{path}: no units or no groups. Run with `--from split` to plan anew.")
    used = _as_used(plan, path)
    return used, used is not plan


def _as_used(plan: Plan, path: Path) -> Plan:
    """With the groups that its units make, which a person who moved units leaves behind. Raises PlanError."""
    highest = max((u.group for u in plan.units if u.group is not None), default=len(plan.groups) - 1)
    count = len(plan.groups) if plan.units[0].group is None else max(highest + 1, 1)
    if count > len(plan.units) and plan.units[0].group is not None:
        raise PlanError(f"{path}: `group` goes up to {highest}, and there are {len(plan.units)} units: every group needs one.")
    groups = summarise_groups(plan.units, count)
    return plan if groups == plan.groups else plan.model_copy(update={"groups": groups})


def plan_hash(plan: Plan) -> str:
    """Of the plan as branches are trained by it; of what lies there where it cannot be used."""
    try:
        return _as_used(plan, Path("plan.json")).hash if plan.units and plan.groups else plan.hash
    except PlanError:  # told where it is used
        return plan.hash


def plan_inputs(base_hash: str, mixture: Mixture, conflict_hash: str, split: Mapping[str, object],
                shares: Sequence[int] = ()) -> dict[str, str]:
    """What a plan is made from. `shares`: the groups' capacities in lowest whole numbers; equal ones leave no trace."""
    if len(set(shares)) > 1:
        split = {**split, "capacities": list(shares)}
    return {"base": base_hash, "mixture": digest({u.name: [u.sha256, u.samples, u.tokens] for u in mixture.units}),
            "conflict": conflict_hash, "split": digest(dict(split))}


