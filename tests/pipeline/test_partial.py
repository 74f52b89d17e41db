"""`anabranch merge RUN OUT [--partial]`: what is there of a run's branches; and capacities on their way into a plan."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from anabranch.artifacts import BranchManifest, MergeManifest, Plan, file_digest
from anabranch.branches import branch_inputs
from anabranch.errors import CorruptedError, OutputError, PlanError, ProvenanceError, RecipeError
from anabranch.forecast import forecast
from anabranch.partial import merge_present, present_branches, present_lines
from anabranch.plan import load_plan
from anabranch.recipe import load_recipe
from anabranch.run import Run, merge_branches, merge_stage, open_run, run_stages, wanted_plan
from conftest import anabranch, here, write_recipe


def make_branch(run: Run, plan: Plan, k: int) -> None:
    """A trained branch as far as a merge can see: the base plus a step of its own, and its manifest."""
    model = run.branch(k) / "model"
    shutil.copytree(run.base, model)
    draw = torch.Generator().manual_seed(k)
    for path in model.glob("*.safetensors"):
        moved = {name: t + 0.1 * torch.randn(t.shape, generator=draw) for name, t in load_file(path).items()}
        save_file(moved, path, {"format": "pt"})
    BranchManifest(branch=k, group_units=[], steps=1, samples_planned=1, tokens_planned=1, tokens_seen=1, final_loss=None,
                   losses=[], files={p.name: file_digest(p) for p in sorted(model.glob("*.safetensors"))}, software={},
                   made_from=branch_inputs(run.recipe, plan, k, run.base_hash)).save(run.branch(k) / "branch.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_base):
    """A run of three branches, capacities 1 : 3 : 1, all trained; nothing merged."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, tiny_base)
    text = yaml.safe_load(recipe.read_text())
    text["split"] = {"method": "merit", "groups": 3, "capacities": [1, 3, 1]}
    recipe.write_text(yaml.safe_dump(text))
    run = open_run(load_recipe(recipe), tell=lambda _: None)
    run_stages(run, until="split")
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    for k in range(3):
        make_branch(run, plan, k)
    return run


@pytest.fixture()
def run(whole, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(whole.folder, tmp_path / "run")
    return open_run(whole.recipe.model_copy(update={"output": tmp_path / "run"}), tell=lambda _: None)


def plan_of(run: Run) -> Plan:
    return Plan.load(run.folder / "plan.json")


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_all_branches_give_the_run_s_own_merge_byte_for_byte(run, tmp_path):
    manifest = merge_present(run, tmp_path / "out")
    assert manifest.missing == []
    merge_stage(run)
    assert bytes_in(tmp_path / "out") == bytes_in(run.folder / "merged")
    assert merge_present(run, tmp_path / "again", partial=True) == manifest  # nothing is missing: --partial says nothing


def test_missing_branches_are_refused_without_partial_and_named(run, tmp_path):
    shutil.rmtree(run.branch(1))
    with pytest.raises(ProvenanceError, match=r"branch 1 of 3 is not trained.*train-branch .* 1.*--partial"):
        merge_present(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_partial_is_the_token_weighted_mean_of_what_is_there(run, tmp_path):
    shutil.rmtree(run.branch(1))
    manifest = merge_present(run, tmp_path / "out", partial=True)
    tokens = {g.group: g.tokens for g in plan_of(run).groups}
    assert manifest.missing == [1] and set(manifest.made_from) == {"base", "plan", "branch-0", "branch-2"}
    wanted = [tokens[k] / (tokens[0] + tokens[2]) for k in (0, 2)]
    assert manifest.weights == pytest.approx(wanted, rel=1e-12) and sum(manifest.weights) == pytest.approx(1, abs=1e-12)
    branches = [weights_in(run.branch(k) / "model") for k in (0, 2)]
    for name, got in weights_in(tmp_path / "out").items():
        mean = sum(w * b[name].double() for w, b in zip(wanted, branches, strict=True))
        torch.testing.assert_close(got.double(), mean, rtol=1e-6, atol=1e-7)


def test_the_full_merge_goes_on_as_ever_after_a_partial_one(run, whole, tmp_path):
    shutil.move(run.branch(1), tmp_path / "late")
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file()}
    merge_present(run, tmp_path / "partial", partial=True)
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file()} == before, "the run folder was touched"
    shutil.move(tmp_path / "late", run.branch(1))
    manifest = merge_stage(run)
    assert manifest.missing == [] and len(manifest.weights) == 3
    merge_branches(whole, plan_of(whole), [whole.branch(k) for k in range(3)], tmp_path / "never-partial")
    assert bytes_in(run.folder / "merged") == bytes_in(tmp_path / "never-partial")


def test_a_partial_merge_is_never_taken_for_the_full_one(run, tmp_path):
    shutil.move(run.branch(1), tmp_path / "late")
    with pytest.raises(OutputError, match="where the run's own merge goes"):
        merge_present(run, run.folder / "merged", partial=True)
    (tmp_path / "alias").symlink_to(run.folder)
    with pytest.raises(OutputError, match="where the run's own merge goes"):
        merge_present(run, tmp_path / "alias" / "merged", partial=True)
    merge_present(run, tmp_path / "partial", partial=True)
    shutil.move(tmp_path / "late", run.branch(1))
    shutil.copytree(tmp_path / "partial", run.folder / "merged")  # by hand
    with pytest.raises(OutputError, match=r"missing: \[1\] there, \[\] wanted now"):
        merge_stage(run)
    with pytest.raises(OutputError, match=r"missing: \[1\] there"):
        merge_present(run, tmp_path / "partial")


def test_no_branch_at_all_and_no_plan_are_refused(run, tmp_path):
    shutil.rmtree(run.folder / "branches")
    with pytest.raises(ProvenanceError, match="none of the 3 branches is trained"):
        merge_present(run, tmp_path / "out", partial=True)
    (run.folder / "plan.json").unlink()
    with pytest.raises(ProvenanceError, match=r"no plan\.json"):
        merge_present(run, tmp_path / "out", partial=True)


def test_a_branch_that_is_there_but_not_of_this_run_is_refused_not_left_out(run, tmp_path):
    shutil.rmtree(run.branch(1))
    path = run.branch(2) / "branch.json"
    strange = json.loads(path.read_text())
    strange["made_from"]["plan"] = "0" * 64
    path.write_text(json.dumps(strange))
    with pytest.raises(ProvenanceError, match="another plan"):
        merge_present(run, tmp_path / "out", partial=True)
    shard = next((run.branch(0) / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CorruptedError) as caught:  # branch 0 comes first; branch 2 stands in the same message
        merge_present(run, tmp_path / "out", partial=True)
    assert shard.name in str(caught.value) and "another plan" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_told(run, tmp_path):
    shutil.rmtree(run.branch(0))
    shutil.rmtree(run.branch(2))
    present = present_branches(run, tmp_path / "out", partial=True)
    tokens = {g.group: g.tokens for g in plan_of(run).groups}
    share = (tokens[0] + tokens[2]) / sum(tokens.values())
    loud, *rest = present_lines(present)
    assert loud.startswith("PARTIAL MERGE: branches 0, 2 are not in it") and f"{share:.1%} of the tokens" in loud
    assert rest == [f"branch 1   weight 1.0000 instead of {1 - share:.4f}"]


def test_branches_that_are_done_in_the_store_are_brought_home_first(run, tmp_path):
    from anabranch.distribute import send_run
    from anabranch.partial import bring_finished
    from anabranch.store.files import open_store

    launch = run.recipe.launch.model_copy(update={"store": str(tmp_path / "store")})
    shared = replace(run, recipe=run.recipe.model_copy(update={"launch": launch}))
    bring_finished(shared)  # no run there yet: nothing to bring
    before = bytes_in(run.branch(1) / "model")
    store = open_store(tmp_path / "store")
    shutil.move(run.branch(2), tmp_path / "late")
    send_run(shared, store)  # takes along what is finished: the plan, branches 0 and 1
    shutil.rmtree(run.folder / "branches")
    bring_finished(shared)
    assert present_branches(shared, tmp_path / "out", partial=True).missing == [2]
    assert bytes_in(run.branch(1) / "model").items() >= {n: b for n, b in before.items() if n.endswith(".safetensors")}.items()
    assert merge_present(shared, tmp_path / "out", partial=True).missing == [2]


def test_the_command(run, tmp_path):
    shutil.rmtree(run.branch(2))
    dry = here("merge", run.folder, tmp_path / "out", "--partial", "--dry-run")
    assert "PARTIAL MERGE: branch 2" in dry.stderr and not (tmp_path / "out").exists()
    done = anabranch("merge", run.folder, tmp_path / "out", "--partial", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events if e["event"] in ("warning", "done")] == ["warning", "done"]
    assert events[-1]["missing"] == [2] and MergeManifest.load(tmp_path / "out" / "manifest.json").missing == [2]


@pytest.mark.parametrize(("arguments", "said"), [
    (["{run}", "--seed", "3"], "--seed"), (["{lacking}"], "none of the 3"), (["{run}", "--allow-mixed"], "--allow-mixed"),
    (["{config}", "--partial"], "give the run folder"), (["{empty}"], "not a run folder")])
def test_options_that_do_not_fit_are_refused(whole, tmp_path, arguments, said):
    (tmp_path / "merge.yaml").write_text("merge_method: linear\n")
    (tmp_path / "empty").mkdir()
    shutil.copytree(whole.folder, tmp_path / "lacking", ignore=shutil.ignore_patterns("branches"))
    places = {"run": whole.folder, "config": tmp_path / "merge.yaml"} | {n: tmp_path / n for n in ("lacking", "empty")}
    first, *rest = [a.format(**places) for a in arguments]
    refused = here("merge", first, tmp_path / "out", *rest, check=False)
    assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr


# ---- capacities ------------------------------------------------------------------------------------------------------


def test_the_plan_follows_the_capacities(whole):
    groups = plan_of(whole).groups
    samples = {u.name: u.samples for u in whole.mixture.units}
    wanted = [sum(samples.values()) * share / 5 for share in (1, 3, 1)]
    assert all(abs(g.samples - t) <= max(samples.values()) for g, t in zip(groups, wanted, strict=True))
    assert groups[1].samples > 2 * groups[0].samples
    assert [g.weight for g in groups] == [g.tokens / whole.mixture.tokens for g in groups]


def test_a_plan_knows_its_capacities_but_not_their_unit(whole):
    def plan(**split) -> Plan:
        changed = whole.recipe.split.model_copy(update=split)
        other = open_run(whole.recipe.model_copy(update={"split": changed}), tell=lambda _: None)
        return wanted_plan(other, whole.mixture)

    assert plan(capacities=[0.1, 0.3, 0.1]).hash == plan_of(whole).hash
    assert plan(capacities=[5, 5, 5]).hash == plan(capacities=None).hash != plan_of(whole).hash
    with pytest.raises(PlanError, match="2 given for 3 groups"):
        plan(capacities=[1, 2])


def test_a_changed_capacity_is_another_plan(run):
    changed = run.recipe.split.model_copy(update={"capacities": [1, 1, 3]})
    other = open_run(run.recipe.model_copy(update={"split": changed}), tell=lambda _: None)
    with pytest.raises(ProvenanceError, match="made from another split"):
        run_stages(other, until="split")


def test_bad_capacities_are_told_before_anything_is_done(recipe_file):
    bad = load_recipe(recipe_file, {"split.capacities": [1, 0]})
    with pytest.raises(RecipeError, match="group 1: got 0"):
        forecast(bad)
    with pytest.raises(PlanError, match="group 1: got 0"):
        run_stages(open_run(bad, tell=lambda _: None), until="split")
    assert not (recipe_file.parent / "run" / "mixture").exists()
