"""The comparison: the same tokens for every arm, honest baselines, resumable, and a verdict that can go either way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from anabranch.artifacts import ArmSummary, Comparison, MergeManifest
from anabranch.compare import parse_arms, verdict
from anabranch.errors import RecipeError
from anabranch.scores import paired_interval, wilcoxon_better
from conftest import TASKS, anabranch, here, task_rows, write_rows

ARMS = "base,joint,joint_matched,joint_batch:2,soup:2,merit:1"


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_base) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    for task in TASKS:
        write_rows(folder / "data" / f"{task}.jsonl", task_rows(task, 24))
    recipe = {
        "model": {"path": str(tiny_base)}, "mixture": {"sources": [{"path": "data/*.jsonl"}], "held_out": 0.2},
        "gradients": {"calibration_samples": 10, "size": 256}, "launch": {"max_parallel": 2, "threads": 1},
        "train": {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "save_strategy": "no"},
        "evaluate": {"generate_samples": 2, "max_samples": 4}, "output": "run"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = here("compare", folder / "recipe.yaml", "--methods", ARMS, "--seeds", 1)
    assert "merit:1" in done.stdout and "Every arm" in done.stdout
    return folder


def comparison(folder: Path) -> Comparison:
    return Comparison.load(folder / "run" / "compare.json")


def test_every_arm_sees_the_mixture_s_tokens(compared):
    runs = {r.arm: r for r in comparison(compared).runs}
    mixture = json.loads((compared / "run" / "mixture" / "mixture.json").read_text())
    total = sum(u["tokens"] for u in mixture["units"])
    assert {a: r.tokens for a, r in runs.items() if a != "base"} == {a: total for a in runs if a != "base"}
    assert runs["base"].tokens == 0 and runs["soup:2"].branches == 2


def test_joint_matched_stands_at_the_merge_s_distance_from_the_base(compared):
    runs = {r.arm: r for r in comparison(compared).runs}
    matched = runs["joint_matched:merit:1"]
    assert matched.alpha == pytest.approx(runs["merit:1"].displacement / runs["joint"].displacement)
    assert matched.displacement == pytest.approx(runs["merit:1"].displacement, rel=1e-4)


def test_joint_batch_takes_fewer_steps(compared):
    def steps(arm: str) -> int:
        return json.loads((compared / "run/compare" / arm / "seed-0/branches/0/branch.json").read_text())["steps"]

    assert steps("joint-batch-2".replace("-batch", "_batch")) == -(-steps("joint") // 2)


def test_merging_moves_less_than_its_branches(compared):
    manifest = MergeManifest.load(compared / "run/compare/merit-1/seed-0/merged/manifest.json")
    mean = sum(w * d**2 for w, d in zip(manifest.weights, manifest.branch_displacements, strict=True))
    assert 0 < manifest.displacement**2 <= mean  # eq. (11): the rest is the branches' spread


def test_only_what_is_missing_is_made_again(compared):
    run = compared / "run"
    before = {p: p.stat().st_mtime_ns for p in run.glob("compare/*/seed-0/arm.json")}
    gone = run / "compare/soup-2/seed-0/arm.json"
    gone.unlink()
    # Here as a user runs it, and the arm as a process of its own.
    anabranch("compare", compared / "recipe.yaml", "--methods", ARMS, "--seeds", 1)
    after = {p: p.stat().st_mtime_ns for p in run.glob("compare/*/seed-0/arm.json")}
    assert after.keys() == before.keys() and {p for p in after if after[p] != before[p]} == {gone}


def test_another_learning_rate_is_another_comparison(compared):
    refused = here("compare", compared / "recipe.yaml", "--methods", ARMS, "--seeds", 1, "--set",
                   "train.learning_rate=0.5", check=False)
    assert refused.returncode == 2 and "another train" in refused.stderr and "Traceback" not in refused.stderr


def row(arm: str, place: str, loss: float, seeds: tuple[float, ...] = ()) -> ArmSummary:
    return ArmSummary(arm=arm, place=place, loss=loss, loss_low=loss - 0.01, loss_high=loss + 0.01,
                      loss_by_seed=list(seeds or (loss,)), token_loss=loss, exact_match=None, f1=None,
                      versus_joint=loss - 2.0, wins=0, ties=0, losses=0, wilcoxon_p=None)


def test_verdict_says_when_splitting_is_not_what_helped():
    table = [row(arm, place, loss) for place in ("held_out", "transfer", "retention")
             for arm, loss in (("joint", 2.0), ("joint_matched:merit:2", 1.5), ("merit:2", 1.7))]
    text = " ".join(verdict(table, [], [0]))
    assert "Not worth splitting on this evidence: joint_matched:merit:2" in text
    assert "merit:2: better than joint in all 3 places" in text


def test_verdict_says_when_a_merge_wins():
    table = [row(arm, place, loss) for place in ("held_out", "transfer", "retention")
             for arm, loss in (("joint", 2.0), ("joint_matched:merit:2", 1.9), ("merit:2", 1.7))]
    text = " ".join(verdict(table, [], [0]))
    assert "Not worth" not in text and "merit:2 is best" in text


def test_verdict_weighs_the_way_of_splitting_against_the_seeds():
    arms = [("merit:2", 1.50, (1.4, 1.6)), ("random:4", 1.55, (1.45, 1.65)), ("stratified:4", 1.52, (1.42, 1.62))]
    text = " ".join(verdict([row(a, "held_out", loss, seeds) for a, loss, seeds in arms], [], [0, 1]))
    assert "a spread of 0.050, no more than another seed" in text
    far = [("merit:2", 1.0, (0.99, 1.01)), ("random:4", 1.5, (1.49, 1.51))]
    text = " ".join(verdict([row(a, "held_out", loss, seeds) for a, loss, seeds in far], [], [0, 1]))
    assert "a spread of 0.500, more than another seed" in text


def test_arms():
    arms = {a.label: a for a in parse_arms("base,joint,merit:3,joint_matched,soup:2")}
    assert arms["merit:3"].number == 8 and arms["joint_matched:merit:3"].reference == "merit:3"
    with pytest.raises(RecipeError, match="joint_matched"):
        parse_arms("joint_matched,merit:1")


def test_wilcoxon_and_intervals_by_hand():
    assert wilcoxon_better([-1.0] * 5) == pytest.approx(0.03125)  # the paper's p for five seeds of five
    assert wilcoxon_better([-0.1, -0.2, -0.3]) == pytest.approx(0.125)
    assert wilcoxon_better([0.0, 0.0]) is None and wilcoxon_better([-1.0]) is None
    assert paired_interval([0.1] * 4, "held_out") is None
    low, high = paired_interval([0.5] * 9, "held_out")
    assert low == high == pytest.approx(0.5)


def test_headline_does_not_credit_the_split_with_what_chance_does_too():
    from anabranch.report.verdict import of_comparison

    def told(random: float) -> str:
        losses = {"joint": (2.0, 2.0, 2.0), "merit:2": (1.7, 1.5, 1.7), "random:4": (random, 1.6, random)}
        summary = [row(arm, place, loss) for arm, by_place in losses.items()
                   for place, loss in zip(("held_out", "transfer", "retention"), by_place, strict=True)]
        return of_comparison(Comparison(seeds=[0], runs=[], summary=summary, verdict=verdict(summary, [], [0]))).headline

    assert "not shown to be worth a conflict-aware split" in told(1.69)
    assert "orth it on these figures" in told(2.1)
