"""What the demo says of its own figures: why the merge stands where it stands, what to try, what the sheet's marks mean."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from anabranch.artifacts import (
    ArmRun,
    ArmSummary,
    BranchManifest,
    Comparison,
    Evaluation,
    MergeManifest,
    Plan,
    PlanGroup,
    PlanUnit,
    UnitScore,
)
from anabranch.compare import verdict
from anabranch.demo.meaning import losses_of, next_steps, reasons
from anabranch.demo.sheet import GAP, HEAD, MARK, RIGHT, WRONG, _mark, draw_sheet, questions
from anabranch.demo.story import pairs_line
from anabranch.diagnose.artifacts import LinearModeConnectivity, Segment

UNITS = {"a_plain": 0, "a_capitals": 1, "b_plain": 2, "b_capitals": 3}
PAIRS = [("a_plain", "a_capitals"), ("b_plain", "b_capitals")]


def arm(name: str, loss: float) -> ArmSummary:
    return ArmSummary(arm=name, place="held_out", loss=loss, loss_low=None, loss_high=None, loss_by_seed=[loss],
                      token_loss=loss, exact_match=None, f1=None, versus_joint=None, wins=0, ties=0, losses=0, wilcoxon_p=None)


def comparison(joint: float = 0.3, pulled: float = 0.44) -> Comparison:
    runs = [ArmRun(arm="joint", seed=0, tokens=4000, displacement=9.0, branches=1, evaluation="x.json", alpha=None)]
    return Comparison(seeds=[0], runs=runs, verdict=[], summary=[
        arm("joint", joint), arm("joint_matched:merit:2", pulled), arm("merit:2", 0.5)])


def evaluation(run: Path, name: str, losses: list[float]) -> None:
    Evaluation(model=name, transfer={}, retention={}, held_out={
        unit: UnitScore(loss=loss, tokens=10, rows=30) for unit, loss in zip(UNITS, losses, strict=True)},
        ).save(run / "evaluation" / f"{name}.json")


def branch(number: int, steps: int) -> BranchManifest:
    return BranchManifest(branch=number, group_units=[], steps=steps, samples_planned=1, tokens_planned=1000, tokens_seen=1000,
                          final_loss=None, losses=[], files={}, software={})


def finished(run: Path, own: float = 0.2, merged: tuple[float, ...] = (0.4, 0.6, 0.45, 0.55),
             line: tuple[float, ...] = (0.5, 0.48, 0.49)) -> Path:
    """A run of four branches; the base has 0.5 on every unit, a branch `own` on its own unit and 2.0 on the others."""
    Plan(method="merit", seed=0, units=[PlanUnit(unit=u, group=g, samples=1, tokens=1, sha256="0") for u, g in UNITS.items()],
         groups=[PlanGroup(group=g, units=1, samples=1, tokens=1, weight=0.25) for g in range(4)]).save(run / "plan.json")
    MergeManifest(method="token_weighted", weights=[0.25] * 4, dtype="float32", parameters=9, displacement=2.0,
                  branch_displacements=[4.0] * 4, files={}).save(run / "merged" / "manifest.json")
    evaluation(run, "base", [0.5] * 4)
    evaluation(run, "merged", list(merged))
    for g in range(4):
        evaluation(run, f"branch-{g}", [own if i == g else 2.0 for i in range(4)])
        branch(g, 75).save(run / "branches" / str(g) / "branch.json")
    branch(0, 300).save(run / "compare" / "joint" / "seed-0" / "branches" / "0" / "branch.json")
    segment = Segment(start="base", end="merged", rows="mixture", alphas=[0.0, 0.5, 1.0], losses=list(line), barrier=0.0,
                      at=0.0, low=0.0, high=0.0)
    LinearModeConnectivity(settings={}, verdict="good", said=[], blocks={}, segments=[segment],
                           ).save(run / "diagnostics" / "lmc.json")
    return run


def test_the_figures_are_those_of_the_run_by_hand(tmp_path):
    run = finished(tmp_path)
    found = losses_of(run, comparison())
    assert found is not None and found.pulled == 0.44 and found.joint == 0.3
    assert (found.base, found.merged, found.own) == pytest.approx((0.5, 0.5, 0.2))
    told = reasons(run, comparison(), PAIRS)
    assert len(told) == 6
    assert "average of 4 branches" in told[0] and "0.25 to 0.25" in told[0]
    assert "their average 2.00: 75% of their mean squared step cancels" in told[0]  # 1 - 2²/4²
    assert told[1].startswith("2 of 2 pairs that disagree were parted")
    assert told[2].startswith("Joint training took 300 steps one after the other, a branch 75")
    assert "from the base's 0.500 to 0.200, the merged model to 0.500, joint training to 0.300" in told[3]
    assert told[3].endswith("So the branches have learned, and averaging gives it back.")
    assert told[4].endswith("mean over 4 units (0.000): 2 got better, 2 worse.")
    assert told[5].endswith("of its lead of 0.200 over the merge, 0.140 is the length of its step, 0.060 its direction.")


def test_what_to_try_is_what_the_figures_speak_for(tmp_path):
    """A longer step only where the line from base to merged falls to its end; more passes only where branches did not learn."""
    recipe = Path("recipe.yaml")
    lost = next_steps(finished(tmp_path / "lost"), comparison(), recipe, 2)
    assert lost[0].startswith("Not a longer step the same way") and "lowest at 0.5 of it (0.4800;" in lost[0]
    assert "merit:1" in lost[1] and "--merge-methods" in lost[2]
    falling = next_steps(finished(tmp_path / "falling", line=(0.5, 0.49, 0.48)), comparison(), recipe, 2)
    assert falling[0].startswith("A longer step the same way") and "(0.500 to 0.480)" in falling[0]
    lazy = finished(tmp_path / "lazy", own=0.5)
    assert next_steps(lazy, comparison(), recipe, 2) == [
        "More passes: the branches themselves have not learned their units (`mixture.epochs`, now 2)."]
    assert "have not learned" in reasons(lazy, comparison(), PAIRS)[3]
    won = finished(tmp_path / "won", merged=(0.2, 0.2, 0.2, 0.2))
    assert next_steps(won, comparison(), recipe, 2) == []
    assert not any("gives" in line or "lead of" in line or "level" in line for line in reasons(won, comparison(), PAIRS))


def test_sentences_whose_figures_are_missing_are_left_out(tmp_path):
    run = finished(tmp_path)
    for path in (run / "diagnostics" / "lmc.json", run / "compare" / "joint" / "seed-0" / "branches" / "0" / "branch.json",
                 run / "evaluation" / "branch-3.json"):
        path.unlink()
    bare = comparison().model_copy(update={"summary": [arm("merit:2", 0.5)], "runs": []})
    told = " ".join(reasons(run, bare, [("elsewhere", "nowhere")]))
    assert "average of 4 branches" in told and "level" in told
    assert not any(word in told for word in ("300 steps", "parted", "joint", "own branch"))
    assert next_steps(run, bare, Path("r.yaml"), 2) == []
    (run / "evaluation" / "base.json").unlink()
    assert losses_of(run, bare) is None and next_steps(run, bare, Path("r.yaml"), 2) == []


def test_pairs_are_not_said_to_want_the_impossible():
    said = pairs_line(10)
    assert said.startswith("10 pairs") and "one model can learn both" in said and "opposite" not in said


def test_right_and_wrong_differ_in_shape_and_the_sheet_says_what_they_mean():
    shapes = []
    for right in (True, False):
        image = Image.new("RGB", (MARK, 18), (255, 255, 255))
        _mark(ImageDraw.Draw(image), 0, 0, right)
        shapes.append((np.asarray(image) != 255).any(2))
    assert all(shape.sum() > 15 for shape in shapes) and (shapes[0] != shapes[1]).mean() > 0.05
    asked = [replace(q, answers={"one": q.wanted, "two": q.wanted}) for q in questions(0)[:2]]
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet(asked))))
    head, body = sheet[: HEAD + GAP], sheet[HEAD + GAP:]
    assert (head == RIGHT).all(2).any() and (head == WRONG).all(2).any()
    assert (body == RIGHT).all(2).any() and not (body == WRONG).all(2).any()


def test_one_seed_is_said_once_for_all_places():
    rows = [arm(name, loss).model_copy(update={"place": place}) for place in ("held_out", "transfer", "retention")
            for name, loss in (("merit:2", 0.48), ("random:4", 0.56))]
    told = [line for line in verdict(rows, [], [0]) if "groups were split" in line]
    assert len(told) == 1 and told[0].count("a spread of 0.080") == 3
    assert told[0].endswith("One seed: whether that is noise is not known.")
