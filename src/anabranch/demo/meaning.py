"""Why a demo's merge stands where it stands, and what the run's own figures say is worth trying next.

Every figure is read from the run's artifacts. A sentence is left out where its figures are missing or say otherwise.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anabranch.artifacts import BranchManifest, Comparison, Evaluation, MergeManifest, Plan
from anabranch.diagnose.artifacts import LinearModeConnectivity
from anabranch.report.verdict import difference, signed
from anabranch.scores import TIE, macro_loss


@dataclass(frozen=True)
class Losses:
    """On the held-out rows, means over units, nats per response token.

    own: each unit with the branch that was trained on it. joint, pulled: of the comparison, where it has them; pulled:
    joint_matched of this run's split, at the merge's distance from the base.
    """

    base: float
    merged: float
    own: float | None
    joint: float | None
    pulled: float | None


def reasons(run: Path, comparison: Comparison, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Sentences on why the merge scores as it does, from what lies in the run's folder.

    Args:
        pairs: the units that the generator made to disagree.
    """
    losses = losses_of(run, comparison)
    merge, plan = MergeManifest.load(run / "merged" / "manifest.json"), Plan.load(run / "plan.json")
    found = [_averaging(merge), _pairs(plan, pairs), *_steps(run)]
    if losses is not None:
        found += [_branches(losses), _gains_and_losses(run), _length(losses, comparison)]
    return [sentence for sentence in found if sentence]


def next_steps(run: Path, comparison: Comparison, recipe: Path, epochs: float) -> list[str]:
    """What to try, each only where a figure of this run speaks for it; what a figure speaks against is said too."""
    losses, plan = losses_of(run, comparison), Plan.load(run / "plan.json")
    if losses is None or losses.own is None or _beats_joint(losses):
        return []
    if losses.own > losses.base - TIE:
        return [f"More passes: the branches themselves have not learned their units (`mixture.epochs`, now {epochs:g})."]
    if losses.merged <= losses.own + TIE:
        return []
    found = [_longer(run)]
    if len(plan.groups) > 2:
        found.append("Open, and soon measured: fewer branches, each with a larger weight: "
                     f"`anabranch compare {shlex.quote(str(recipe))} --methods base,joint,random:2,merit:1`.")
    found.append("Open as well: other merges of the same branches, without training: "
                 f"`anabranch compare {shlex.quote(str(recipe))} --merge-methods ties,star,tsv`.")
    return [sentence for sentence in found if sentence]


def losses_of(run: Path, comparison: Comparison) -> Losses | None:
    """None where base or merged model were not scored on held-out rows."""
    base, merged = (_evaluation(run, name) for name in ("base", "merged"))
    if base is None or merged is None or not base.held_out or not merged.held_out:
        return None
    branches = {g.group: _evaluation(run, f"branch-{g.group}") for g in Plan.load(run / "plan.json").groups}
    own = [scores.held_out[u.unit].loss for u in Plan.load(run / "plan.json").units
           if u.group is not None and (scores := branches.get(u.group)) is not None and u.unit in scores.held_out]
    arms = {s.arm: s.loss for s in comparison.summary if s.place == "held_out"}
    pulled = [loss for arm, loss in arms.items() if arm.startswith("joint_matched:")]
    return Losses(macro_loss(base.held_out) or 0.0, macro_loss(merged.held_out) or 0.0,
                  float(np.mean(own)) if len(own) == len(base.held_out) else None, arms.get("joint"),
                  pulled[0] if len(pulled) == 1 else None)


def _evaluation(run: Path, name: str) -> Evaluation | None:
    path = run / "evaluation" / f"{name}.json"
    return Evaluation.load(path) if path.is_file() else None


def _beats_joint(losses: Losses) -> bool:
    return losses.joint is not None and losses.merged < losses.joint - TIE


def _averaging(merge: MergeManifest) -> str:
    squares = float(np.dot(merge.weights, np.square(merge.branch_displacements))) if merge.branch_displacements else 0.0
    if merge.method != "token_weighted" or len(merge.weights) < 2 or not squares or merge.displacement is None:
        return ""
    moved = merge.branch_displacements
    return (f"The merge is an average of {len(merge.weights)} branches: what one of them alone has learned enters with its "
            f"weight only, {min(merge.weights):.2f} to {max(merge.weights):.2f}. The branches moved {min(moved):.2f} to "
            f"{max(moved):.2f} from the base, their average {merge.displacement:.2f}: "
            f"{1 - merge.displacement**2 / squares:.0%} of their mean squared step cancels.")


def _pairs(plan: Plan, pairs: Sequence[tuple[str, str]]) -> str:
    group = {u.unit: u.group for u in plan.units}
    there = [(a, b) for a, b in pairs if group.get(a) is not None and group.get(b) is not None]
    apart = sum(group[a] != group[b] for a, b in there)
    return (f"{apart} of {len(there)} pairs that disagree were parted: one branch learned the one answer, another the other, "
            "and none had to tell them apart." if apart else "")


def _steps(run: Path) -> list[str]:
    """Joint training's steps against a branch's, where both were counted."""
    joint = run / "compare" / "joint" / "seed-0" / "branches" / "0" / "branch.json"
    branches = [BranchManifest.load(path) for path in sorted((run / "branches").glob("*/branch.json"))]
    if not joint.is_file() or not branches or not all(b.counted for b in branches):
        return []
    whole, steps = BranchManifest.load(joint), [b.steps for b in branches]
    each = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
    if whole.steps <= max(steps):
        return []
    return [f"Joint training took {whole.steps} steps one after the other, a branch {each}; the tokens are the same in all "
            f"({whole.tokens_seen:,} and {sum(b.tokens_seen for b in branches):,})."]


def _branches(losses: Losses) -> str:
    if losses.own is None:
        return ""
    joint = "" if losses.joint is None else f", joint training to {losses.joint:.3f}"
    told = (f"Held-out loss, mean over units: each unit's own branch brings it from the base's {losses.base:.3f} to "
            f"{losses.own:.3f}, the merged model to {losses.merged:.3f}{joint}.")
    if losses.own > losses.base - TIE:
        return told + " So the branches themselves have not learned."
    if losses.merged > losses.own + TIE:
        what = "it" if losses.merged >= losses.base - TIE else "a part of it"
        told += f" So the branches have learned, and averaging gives {what} back."
    return told


def _gains_and_losses(run: Path) -> str:
    base, merged = _evaluation(run, "base"), _evaluation(run, "merged")
    found = None if base is None or merged is None else difference(merged, base, "held_out")
    if found is None or abs(found.mean) > TIE or not (found.wins and found.losses):
        return ""
    return (f"That merged model and base are level is a mean over {len(found.by_unit)} units ({signed(found.mean)}): "
            f"{found.wins} got better, {found.losses} worse.")


def _length(losses: Losses, comparison: Comparison) -> str:
    """How much of joint's lead is the length of its step; the merge's own arm is the one that joint was pulled back to."""
    if losses.joint is None or losses.pulled is None or not losses.joint < losses.pulled < losses.merged:
        return ""
    moved = {r.arm: r.displacement for r in comparison.runs}
    far = f" (moved {moved['joint']:.2f})" if "joint" in moved else ""
    return (f"Joint training{far}, pulled back to the merge's distance from the base (`joint_matched`), scores "
            f"{losses.pulled:.3f}: of its lead of {losses.merged - losses.joint:.3f} over the merge, "
            f"{losses.pulled - losses.joint:.3f} is the length of its step, {losses.merged - losses.pulled:.3f} its direction.")


def _longer(run: Path) -> str:
    """Whether going on beyond the merge promises anything: where the line from base to merged is lowest."""
    path = run / "diagnostics" / "lmc.json"
    segments = LinearModeConnectivity.load(path).segments if path.is_file() else []
    line = next((s for s in segments if (s.start, s.end, s.rows) == ("base", "merged", "mixture")), None)
    if line is None:
        return ""
    best = int(np.argmin(line.losses))
    if best == len(line.losses) - 1:
        return ("A longer step the same way: on the line from the base to the merged model the loss falls to its end "
                f"({line.losses[0]:.3f} to {line.losses[-1]:.3f}). `anabranch merge config.yaml OUT` with task_arithmetic and "
                "weights of more than one in all makes it.")
    return (f"Not a longer step the same way: on the line from the base to the merged model the loss is lowest at "
            f"{line.alphas[best]:.1f} of it ({line.losses[best]:.4f}; at the merged model {line.losses[-1]:.4f}).")
