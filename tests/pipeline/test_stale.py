"""Rows that change after training: what was made of the old ones is not shown as made of the new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from anabranch.artifacts import Mixture, Plan
from anabranch.errors import PlanError, RecipeError
from anabranch.forecast import forecast
from anabranch.plan import misfits
from anabranch.recipe import load_recipe
from anabranch.report import write_report
from anabranch.report.contents import read_contents
from anabranch.run import open_run, reopen_run, run_stages, train_one
from anabranch.stale import made, stale
from anabranch.status import _stale, folder_status
from conftest import write_recipe
from jobs_here import jobs_done_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("stale")
    with jobs_done_here():
        run_stages(open_run(load_recipe(write_recipe(folder, tiny_base)), tell=lambda _: None))
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def found(run: Path) -> dict[str, str]:
    return stale(Mixture.load(run / "mixture" / "mixture.json"), *made(run))


def again(place: Path, **more: str) -> None:
    run_stages(open_run(load_recipe(place / "recipe.yaml"), tell=lambda _: None), **more)


def test_a_finished_run_is_not_stale(place):
    again(place)
    assert found(place / "run") == {} and not [line for line in folder_status(place / "run").lines() if "stale" in line]
    assert "Left out, as made of another" not in write_report(place / "run").with_suffix(".md").read_text()


def test_a_row_that_changed_is_told_before_gradients_and_in_status_and_report(place):
    source, run = place / "data" / "copy.jsonl", place / "run"
    before, gradients = source.read_text(), (run / "gradients" / "gradients.json").read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[0]["completion"] = "purple elephants"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PlanError, match=r"(?s)put them back .*--from split.*unit 'copy': .*of other rows"):
        again(place)
    assert (run / "gradients" / "gradients.json").read_bytes() == gradients  # hours, perhaps
    recipe = load_recipe(place / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"(?s)dry run: the recipe has problems.*unit 'copy': .*of other rows"):
        forecast(recipe)
    assert forecast(recipe, start="split") and forecast(recipe, until="conflict")  # neither keeps the plan
    told = found(run)
    models = ["branch-0", "branch-1", "merged"]
    assert set(told) == {"plan", *models, *(f"evaluation of {model}" for model in ["base", *models])}
    lines = [line for line in folder_status(run).lines() if line.startswith("stale")]
    assert len(lines) == 8 and "unit 'copy'" in lines[0]
    text = write_report(run).with_suffix(".md").read_text()
    contents = read_contents(run)
    assert not (contents.plan or contents.branches or contents.merge or contents.evaluations) and contents.conflict
    assert "Left out, as made of another" in text and "evaluation of merged" in text and "no plan yet" in text
    assert "`anabranch run recipe.yaml --from split`" in text

    source.write_text(before)  # as it was: all is shown again, and nothing trains anew
    marks = {p: p.stat().st_mtime_ns for p in (run / "branches").rglob("branch.json")}
    again(place)
    assert found(run) == {} and {p: p.stat().st_mtime_ns for p in marks} == marks


def test_another_row_is_no_matter_while_only_conflict_is_measured(place):
    (place / "data" / "copy.jsonl").open("a").write(json.dumps({"prompt": "say 1", "completion": "one two"}) + "\n")
    again(place, until="conflict")
    assert "plan" in found(place / "run")


def test_a_plan_that_was_edited_leaves_its_branches_behind(place):
    run = place / "run"
    plan = json.loads((run / "plan.json").read_text())
    first = plan["units"][0]
    first["group"] = 1 - first["group"]
    (run / "plan.json").write_text(json.dumps(plan))
    assert not misfits(Plan.load(run / "plan.json"), Mixture.load(run / "mixture" / "mixture.json"))
    told = found(run)
    assert told["branch-0"] == told["branch-1"] == "trained by another plan" and "plan" in told["merged"]
    assert "evaluation of merged" in told and "evaluation of base" not in told


def test_a_plan_edited_before_its_branches_were_trained_is_theirs(place):
    """Only `run` writes the groups anew that its units make; branches are trained by them before."""
    run = place / "run"
    plan = json.loads((run / "plan.json").read_text())
    moved = next(u for u in plan["units"] if sum(v["group"] == u["group"] for v in plan["units"]) > 1)
    moved["group"] = 1 - moved["group"]
    (run / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(run / "branches")
    for k in (0, 1):
        train_one(reopen_run(run, tell=lambda _: None), k)
    assert not {name for name in found(run) if name.startswith(("plan", "branch"))}
    again(place, until="split")
    assert not {name for name in found(run) if name.startswith(("plan", "branch"))}


@pytest.mark.parametrize("damaged", ["evaluation/base.json", "merged/manifest.json"])
def test_status_of_what_is_damaged(place, damaged):
    (place / "run" / damaged).write_text("{")
    [line] = [line for line in _stale(place / "run") if "stale" in line]
    assert "not known" in line and damaged.split("/")[-1] in line
