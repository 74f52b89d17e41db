"""The pilot on a tiny base: killed and gone on with, one answer, nothing of the run itself touched, bad input refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from anabranch.artifacts import BranchManifest, Evaluation, Mixture, Pilot, Plan
from anabranch.cli_pilot import pilot as pilot_command
from anabranch.errors import PlanError, RecipeError
from anabranch.pilot import default_arms, parse_pilot_arms, parse_todo
from anabranch.pilot_budget import full_batch, pilot_batch, pilot_recipe
from anabranch.pilot_words import pilot_lines
from anabranch.recipe import load_recipe
from conftest import here, write_recipe

ONE = ("--set", "launch.threads=1")  # two threads of two processes spin against each other
ARMS = "joint,joint_matched,joint_batch:2,soup:2,merit:1"
OPTIONS = ("--methods", ARMS, "--share", 0.4, "--seeds", 1, *ONE)
SHARES = (0.1, 0.4)


@pytest.fixture(scope="module")
def piloted(tmp_path_factory, tiny_base) -> Path:
    """A pilot that was killed in the middle and started again."""
    folder = tmp_path_factory.mktemp("piloted")
    recipe = write_recipe(folder, tiny_base)
    command = [sys.executable, "-m", "anabranch", "pilot", str(recipe), *map(str, OPTIONS)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list(folder.glob("run/pilot/share-*/compare/*/seed-0/arm.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=120)[1]  # they see that nobody waits for them, and end
    assert not (folder / "run" / "pilot.json").exists()
    done = here("pilot", recipe, *OPTIONS)
    assert "1. How far" in done.stdout and done.stdout.index("1. How far") < done.stdout.index("2. Which arm")
    assert "Recommended: " in done.stdout and "Cost: " in done.stdout
    return folder


def result(folder: Path) -> Pilot:
    return Pilot.load(folder / "run" / "pilot.json")


def test_every_arm_saw_the_pilot_s_tokens_and_no_more(piloted):
    pilot = result(piloted)
    assert pilot.shares == list(SHARES)
    by_share = dict(zip(pilot.shares, pilot.tokens, strict=True))
    trained = [r for r in pilot.runs if r.arm != "base"]
    assert {(r.arm, r.share) for r in trained} == {(a.label, s) for a in parse_pilot_arms(ARMS)[1:] for s in SHARES}
    assert all(r.tokens == by_share[r.share] for r in trained)
    assert pilot.cost.predicted_tokens == pilot.cost.measured_tokens == 4 * sum(pilot.tokens)
    whole = Mixture.load(piloted / "run" / "mixture" / "mixture.json")
    assert pilot.full_tokens == whole.tokens
    for share, tokens in by_share.items():
        assert tokens == pytest.approx(share * whole.tokens, rel=0.25)


def test_every_arm_has_a_forecast_at_every_place(piloted):
    pilot = result(piloted)
    labels = {a.label for a in parse_pilot_arms(ARMS)}
    for place in ("held_out", "transfer", "retention"):
        rows = {f.arm: f for f in pilot.forecasts if f.place == place}
        assert rows.keys() == labels
        assert all(f.loss.low <= f.loss.value <= f.loss.high and len(f.points) == 2 for f in rows.values())
        assert rows["joint"].versus_joint.value == 0 == rows["base"].versus_base.value
        scores = [s.loss for s in getattr(Evaluation.load(piloted / "run" / next(
            r.evaluation for r in pilot.runs if r.arm == "merit:1" and r.share == 0.4)), place).values()]
        assert rows["merit:1"].points[-1].loss == pytest.approx(sum(scores) / len(scores))
    assert len(pilot.scores) == len(labels) and pilot.advice.lowest in pilot.advice.tied
    assert any("held-out" in line for line in pilot_lines(pilot))


def test_groups_are_the_full_run_s(piloted):
    """The same units together at every share, as `anabranch run` would put them."""
    plans = [Plan.load(piloted / f"run/pilot/share-{s}/compare/merit-1/seed-0/plan.json") for s in SHARES]
    groups = [{u.unit: u.group for u in p.units} for p in plans]
    assert groups[0] == groups[1]
    here("run", piloted / "recipe.yaml", "--until", "split")
    assert {u.unit: u.group for u in Plan.load(piloted / "run" / "plan.json").units} == groups[0]


def test_a_soup_s_branches_share_the_rows_evenly(piloted):
    """Ten rows of five units: dealt on from unit to unit, or the first branch would get all the odd ones."""
    soup = piloted / "run/pilot/share-0.1/compare/soup-2/seed-0/branches"
    sizes = [BranchManifest.load(soup / str(k) / "branch.json").samples_planned for k in (0, 1)]
    assert abs(sizes[0] - sizes[1]) <= 1 and min(sizes) > 0


def test_weights_are_gone_and_the_run_is_not_touched(piloted):
    run = piloted / "run"
    assert not list(run.glob("pilot/share-*/compare/**/*.safetensors"))
    assert not (run / "branches").exists() and not (run / "compare").exists() and not (run / "merged").exists()


def test_what_is_made_again_is_the_same(piloted):
    """Arms that are lost, joint's weights among them, give the same bytes; finished ones are not made again."""
    run = piloted / "run"
    before = json.loads((run / "pilot.json").read_text())
    kept = run / "pilot/share-0.4/compare/soup-2/seed-0/arm.json"
    when = kept.stat().st_mtime_ns
    for lost in ("share-0.1/compare/merit-1", "share-0.4/compare/joint_matched-merit-1"):
        (run / "pilot" / lost / "seed-0" / "arm.json").unlink()
    (run / "pilot.json").unlink()
    here("pilot", piloted / "recipe.yaml", *OPTIONS)
    after = json.loads((run / "pilot.json").read_text())
    before.pop("cost"), after.pop("cost")
    assert before == after and kept.stat().st_mtime_ns == when


def test_another_learning_rate_is_refused(piloted):
    refused = here("pilot", piloted / "recipe.yaml", *OPTIONS, "--set", "train.learning_rate=0.5", check=False)
    assert refused.returncode == 2 and "another train" in refused.stderr and "Traceback" not in refused.stderr


def test_dry_run_says_what_it_costs_and_writes_nothing(recipe_file, capsys):
    pilot_command(recipe_file, ARMS, 0.4, 1, True, None)
    told = capsys.readouterr().out
    assert "tokens of training" in told and "s of work" in told and "Nothing was written" in told
    assert not (recipe_file.parent / "run").exists()


@pytest.mark.parametrize(("methods", "share", "error", "words"), [
    (ARMS, 0.0, RecipeError, "--share 0"),
    (ARMS, 0.9, RecipeError, "at most 0.5"),
    ("merit:1,random:2", 0.4, RecipeError, "must have `joint`"),
    ("joint", 0.4, RecipeError, "at least one other arm"),
    ("joint,meritt:1", 0.4, RecipeError, "Did you mean `merit`"),
    ("joint,merit:4", 0.4, PlanError, "16 groups"),
    (ARMS, 0.03, RecipeError, r"smallest branch would see \d+ rows"),
])
def test_what_cannot_be_is_refused_before_anything_is_trained(recipe_file, methods, share, error, words):
    with pytest.raises(error, match=words):
        pilot_command(recipe_file, methods, share, 1, True, None)


def test_too_small_a_share_names_one_that_works(recipe_file):
    with pytest.raises(RecipeError) as refused:
        pilot_command(recipe_file, "joint,random:2", 0.02, 1, True, None)
    share = float(str(refused.value).split("`--share ")[1].split("`")[0])
    pilot_command(recipe_file, "joint,random:2", share, 1, True, None)  # it does


def test_default_arms_take_the_recipe_s_groups(recipe_file):
    arms = {a.label: a.number for a in parse_pilot_arms(default_arms(load_recipe(recipe_file)))}
    assert {"joint_batch:2", "random:2", "stratified:2", "merit:1", "soup:2", "joint_matched:merit:1"} < arms.keys()
    three = {a.label for a in parse_pilot_arms(default_arms(load_recipe(recipe_file, {"split.groups": 3})))}
    assert {"random:3", "merit:2"} < three
    assert [(a.label, s) for a, s in parse_todo("joint@0,joint_matched:merit:1@1")] == [
        ("joint", 0), ("joint_matched:merit:1", 1)]


def test_a_smaller_batch_keeps_the_steps(recipe_file):
    """64 rows a step in four accumulations: at 1/16 four rows in one, as many steps, and the warm-up as it was."""
    recipe = load_recipe(recipe_file, {"train.per_device_train_batch_size": 16, "train.gradient_accumulation_steps": 4,
                                       "train.warmup_steps": 20})
    assert full_batch(recipe) == 64 and pilot_batch(recipe, 1 / 16) == 4 and pilot_batch(recipe, 0.001) == 1
    small = pilot_recipe(recipe, 1 / 16).train
    assert (small["per_device_train_batch_size"], small["gradient_accumulation_steps"], small["warmup_steps"]) == (4, 1, 20)
    assert pilot_recipe(recipe, 1 / 128).train["warmup_steps"] == 10  # half the steps: the batch cannot be half a row
    half = pilot_recipe(recipe, 0.5).train
    assert half["per_device_train_batch_size"] * half["gradient_accumulation_steps"] == 32
    assert pilot_recipe(recipe, 0.5).evaluate.generate_samples == 0
