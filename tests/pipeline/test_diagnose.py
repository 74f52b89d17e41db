"""`anabranch diagnose` on a small trained run and on checkpoints from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.diagnose.arguments import parse_only
from anabranch.diagnose.artifacts import KINDS, Displacement, LinearModeConnectivity
from anabranch.diagnose.run import (
    DIAGNOSTICS,
    Forecast,
    forecasts,
    run_diagnostics,
    subject_of_models,
    subject_of_run,
)
from anabranch.diagnose.subject import Settings, Subject, make_probe
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import AnabranchError, RecipeError
from anabranch.rows import Rows
from anabranch.run import reopen_run
from conftest import anabranch, here, task_rows, write_recipe, write_rows

SMALL = Settings(points=5, rows=24, grid=4, draws=2, steps=6, top=3, sigmas_isotropic=(0.01, 0.05), sigmas_filter=(0.1, 0.3),
                 sizes=(4, 8, 12))
LOSS_ONLY = ["displacement", "generalization", "lmc", "perturbation", "surface"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_base) -> Path:
    """A trained run of two branches, with joint training beside it."""
    folder = tmp_path_factory.mktemp("diagnosed")
    recipe = write_recipe(folder, tiny_base)
    here("run", recipe, "--until", "merge")
    here("compare", recipe, "--methods", "base,joint", "--seeds", "1")
    return folder / "run"


@pytest.fixture()
def subject(run_folder) -> Subject:
    return subject_of_run(reopen_run(run_folder), SMALL)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_live_model_becomes_any_mix_of_the_models_and_nothing_is_written(subject, run_folder):
    before = files_in(run_folder)
    live = subject.live
    one, two, base = (AutoModelForCausalLM.from_pretrained(live.weights[label].folder, dtype=torch.float32).state_dict()
                      for label in ("branch-0", "branch-1", "base"))
    live.put({"branch-0": 0.3, "branch-1": 0.9, "base": -0.2})
    for name, parameter in live.parameters.items():
        wanted = 0.3 * one[name].double() + 0.9 * two[name].double() - 0.2 * base[name].double()
        assert torch.allclose(parameter.double(), wanted, atol=1e-6), name
    assert live.model.lm_head.weight.data_ptr() == live.model.model.embed_tokens.weight.data_ptr()  # still tied
    live.put({"base": 1.0})
    assert all(torch.equal(p, base[n]) for n, p in live.parameters.items())
    assert files_in(run_folder) == before


def test_the_curve_is_the_loss_of_saved_interpolations(subject, tmp_path):
    """Points of the line, saved by transformers and scored by its own loss, row by row."""
    found = run_diagnostics(subject, tmp_path / "out", SMALL, only=["lmc"], tell=lambda _: None)[0].found
    assert isinstance(found, LinearModeConnectivity)
    segment = next(s for s in found.segments if (s.start, s.end, s.rows) == ("branch-0", "branch-1", "mixture"))
    live = subject.live
    ends = [load_file(live.weights[label].folder / "model.safetensors") for label in ("branch-0", "branch-1")]
    model = AutoModelForCausalLM.from_pretrained(live.weights["base"].folder, dtype=torch.float32)
    for alpha, loss in zip(segment.alphas, segment.losses, strict=True):
        model.load_state_dict({n: (1 - alpha) * ends[0][n] + alpha * ends[1][n] for n in ends[0]}, strict=False)
        total, tokens = 0.0, 0
        for batch in subject.probes["mixture"].batches:
            for ids, mask, response in zip(batch.input_ids, batch.attention_mask, batch.response, strict=True):
                n = int(mask.sum())
                labels = torch.where(response[:n], ids[:n], -100)[None]
                with torch.no_grad():
                    mean = model(input_ids=ids[None, :n], labels=labels).loss
                count = int(response[1:n].sum())
                total, tokens = total + float(mean) * count, tokens + count
        assert loss == pytest.approx(total / tokens, abs=2e-5)


def test_every_diagnostic_leaves_json_and_a_picture_and_costs_what_was_said(subject, tmp_path, run_folder):
    before = files_in(run_folder)
    told: list[str] = []
    outcomes = run_diagnostics(subject, tmp_path / "out", SMALL, minutes=60, tell=told.append)
    assert [o.name for o in outcomes] == list(DIAGNOSTICS)
    for outcome in outcomes:
        assert outcome.found is not None, outcome.why
        path = tmp_path / "out" / f"{outcome.name}.json"
        loaded = KINDS[outcome.name].load(path)
        assert loaded == outcome.found and loaded.said and loaded.cost is not None
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        predicted, measured = loaded.cost.predicted_passes, loaded.cost.measured_passes
        near = 0.0 if outcome.name in ("lmc", "generalization", "perturbation", "displacement") else 0.15 * measured + 1
        assert abs(predicted - measured) <= near, (outcome.name, predicted, measured)
    assert files_in(run_folder) == before


def test_displacement_is_that_of_the_files(subject, run_folder, tmp_path):
    found = run_diagnostics(subject, tmp_path, SMALL, only=["displacement"], tell=lambda _: None)[0].found
    assert isinstance(found, Displacement)
    base = AutoModelForCausalLM.from_pretrained(subject.live.weights["base"].folder, dtype=torch.float32)
    origin = torch.cat([p.detach().flatten() for p in base.parameters()]).double()
    for model in found.models:
        other = AutoModelForCausalLM.from_pretrained(subject.live.weights[model.model].folder, dtype=torch.float32)
        moved = torch.cat([p.detach().flatten() for p in other.parameters()]).double() - origin
        assert model.norm == pytest.approx(float(moved.norm()), rel=1e-6)
    norms = {m.model: m.norm for m in found.models}
    assert found.joint_over_merged == pytest.approx(norms["joint"] / norms["merged"])
    assert found.contraction is not None and found.contraction.error < 1e-9 and found.contraction.is_average
    assert found.verdict == "none"  # an identity that holds is no merit


def test_what_is_there_is_not_measured_again_and_comes_out_the_same(run_folder, tmp_path):
    def measure() -> Subject:
        made = subject_of_run(reopen_run(run_folder), SMALL)
        run_diagnostics(made, tmp_path, SMALL, only=LOSS_ONLY, tell=lambda _: None)
        return made

    measure()
    first = files_in(tmp_path)
    again = measure()
    assert files_in(tmp_path) == first
    assert again.live.passes == 0  # not even the timing of a pass
    (tmp_path / "lmc.json").write_text("{")
    (tmp_path / "surface.png").unlink()
    measure()
    for name in LOSS_ONLY:
        left, right = json.loads(first[f"{name}.json"]), json.loads((tmp_path / f"{name}.json").read_bytes())
        left.pop("cost"), right.pop("cost")
        assert left == right, name
        assert (tmp_path / f"{name}.png").read_bytes() == first[f"{name}.png"], name


def test_other_settings_or_other_models_are_measured_again(run_folder, tmp_path):
    subject = subject_of_run(reopen_run(run_folder), SMALL)
    first = run_diagnostics(subject, tmp_path, SMALL, only=["generalization"], tell=lambda _: None)[0].found
    subject.hashes["merged"] = "another"
    assert run_diagnostics(subject, tmp_path, SMALL, only=["generalization"], tell=lambda _: None)[0].found != first
    more = Settings(**(SMALL.__dict__ | {"seed": 1}))
    other = subject_of_run(reopen_run(run_folder), more)
    assert run_diagnostics(other, tmp_path, more, only=["generalization"], tell=lambda _: None)[0].found != first


def test_what_does_not_fit_the_time_is_left_out_by_name(subject, tmp_path):
    told: list[str] = []
    outcomes = run_diagnostics(subject, tmp_path, SMALL, minutes=0.0, tell=told.append)
    done = {o.name for o in outcomes if o.found is not None}
    assert done <= {"displacement"}  # which costs no pass
    assert any("lmc: left out: would take" in line and "--only lmc" in line for line in told)
    costs: list[Forecast] = forecasts(subject, SMALL, ["lmc", "displacement"])
    batches = sum(len(p.batches) for n, p in subject.probes.items() if n.startswith("group-"))
    assert costs[0].passes == (5 * 3 + 5) * batches  # five segments, three inner points each; base, 2 branches, merged, joint
    assert costs[1].passes == 0


def test_probes_draw_evenly_and_whatever_the_order():
    units = {u: Rows.of([([1, i + 2], [0, 1]) for i in range(n)]) for u, n in (("a", 50), ("b", 3), ("c", 50))}
    probe = make_probe("p", units, Settings(rows=23, batch_rows=4))
    assert probe.rows == 23 and [len(b.rows) for b in probe.batches] == [4, 4, 4, 4, 4, 3]
    assert make_probe("p", units, Settings(rows=23, batch_rows=4)).hash == probe.hash
    assert make_probe("p", {"a": units["a"], "b": units["b"], "c": units["c"]}, Settings(rows=2, batch_rows=4)).rows == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_on_a_run(run_folder, tmp_path):
    done = anabranch("diagnose", run_folder, "--only", "displacement,generalization", "--rows", "24", "-o", tmp_path / "d",
                     check=False)
    assert done.returncode in (0, 1), done.stderr
    assert ("Bad:" in done.stdout) == (done.returncode == 1)
    assert {p.name for p in (tmp_path / "d").iterdir()} == {f"{n}.{e}" for n in ("displacement", "generalization")
                                                             for e in ("json", "png")}
    dry = here("diagnose", run_folder, "--dry-run", "-o", tmp_path / "dry")
    assert "lmc:" in dry.stdout and "Nothing was measured." in dry.stdout and not (tmp_path / "dry").exists()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tiny_base) -> Path:
    """Checkpoints that Anabranch did not make: two branches (one sharded, bf16), their mean, a wreck, and an untied one."""
    folder = tmp_path_factory.mktemp("foreign")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    start = {n: p.detach().clone() for n, p in base.named_parameters()}
    steps = {}
    for i, label in enumerate(("x", "y")):
        g = torch.Generator().manual_seed(i)
        steps[label] = {n: 0.01 * torch.randn(p.shape, generator=g) for n, p in start.items()}
    mixes = {"x": {"x": 1.0}, "y": {"y": 1.0}, "merged": {"x": 0.5, "y": 0.5}, "wreck": {"x": 300.0}}
    for label, mix in mixes.items():
        with torch.no_grad():
            for n, p in base.named_parameters():
                p.copy_(start[n] + sum(c * steps[s][n] for s, c in mix.items()))
        model = base.to(torch.bfloat16) if label == "y" else base
        model.save_pretrained(folder / label, max_shard_size="40KB" if label == "y" else "1GB")
        base = base.float()
        tokenizer.save_pretrained(folder / label)
    untied = shutil.copytree(folder / "x", folder / "untied")
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    write_rows(folder / "held_out.jsonl", task_rows("copy", 12) + task_rows("last", 12))
    write_rows(folder / "many.jsonl", task_rows("copy", 70))
    return folder


def test_checkpoints_from_anywhere(foreign, tiny_base, tmp_path):
    done = here("diagnose", "--base", tiny_base, "--branch", foreign / "x", "--branch", foreign / "y", "--merged",
                foreign / "merged", "--data", foreign / "held_out.jsonl", "--points", "5", "-o", tmp_path / "d",
                "--only", "displacement,lmc,generalization,map", check=False)
    assert done.returncode in (0, 1), done.stderr
    assert len(list((foreign / "y").glob("*.safetensors"))) > 1
    found = Displacement.load(tmp_path / "d" / "displacement.json")
    assert found.labels == ["branch-0", "branch-1", "merged"] and found.weights == [0.5, 0.5]
    assert found.contraction is not None and found.contraction.error < 1e-9
    segments = LinearModeConnectivity.load(tmp_path / "d" / "lmc.json").segments
    assert {(s.start, s.end) for s in segments} == {("branch-0", "branch-1"), ("branch-0", "merged"), ("branch-1", "merged"),
                                                    ("base", "merged")}
    assert "map: left out" in done.stdout and not (tmp_path / "d" / "map.json").exists()


def test_a_wrecked_merge_is_a_bad_verdict_and_exit_code_1(foreign, tiny_base, tmp_path):
    done = here("diagnose", "--base", tiny_base, "--branch", foreign / "x", "--branch", foreign / "y", "--merged",
                foreign / "wreck", "--data", foreign / "many.jsonl", "--only", "generalization,displacement",
                "-o", tmp_path / "d", check=False)
    assert done.returncode == 1 and "Bad: generalization." in done.stdout
    assert "is not that weighted mean" in done.stdout


@pytest.fixture()
def bad_arguments(foreign, tiny_base, tmp_path) -> dict[str, Path]:
    (tmp_path / "empty").mkdir()
    return {"BASE": tiny_base, "DATA": foreign / "held_out.jsonl", "MERGED": foreign / "merged", "UNTIED": foreign / "untied",
            "EMPTY": tmp_path / "empty"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["RUN", "--base", "BASE"], "leave --base out, or leave RUN out"),
    (["--base", "BASE"], "give a run folder, or --data"),
    ([], "give a run folder, or --base and --data"),
    (["--base", "BASE", "--data", "DATA"], "nothing to compare the base with"),
    (["RUN", "--only", "lmc,displacment"], "Did you mean `displacement`?"),
    (["RUN", "--only", ""], "wanted names"),
    (["EMPTY"], "not a run folder"),
])
def test_bad_arguments_are_one_message_and_exit_code_2_before_torch_is_imported(arguments, words, bad_arguments, run_folder,
                                                                                tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # a line for each module on stderr
    names = bad_arguments | {"RUN": run_folder}
    done = anabranch("diagnose", *(names.get(a, a) for a in arguments), check=False, cwd=tmp_path)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    told = "\n".join(line for line in lines if not line.startswith("import time:"))
    assert done.returncode == 2 and words in told, told
    assert "anabranch.cli_diagnose" in imported and not imported & {"torch", "numpy", "scipy", "transformers"}
    assert "Traceback" not in told and not list(tmp_path.glob("**/*.json"))


@pytest.mark.parametrize(("arguments", "words"), [
    (["--base", "nowhere/at/all", "--merged", "MERGED", "--data", "DATA"], "no such folder"),
    (["--base", "BASE", "--merged", "MERGED", "--data", "missing.jsonl"], "missing.jsonl"),
    (["--base", "BASE", "--merged", "UNTIED", "--data", "DATA"], "tie_word_embeddings"),
])
def test_bad_input_is_one_message_and_exit_code_2(arguments, words, bad_arguments, tmp_path):
    done = here("diagnose", *(bad_arguments.get(a, a) for a in arguments), check=False, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("**/*.json"))


def test_a_run_that_is_not_trained_says_what_to_do(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("branches", "merged", "compare*"))
    done = here("diagnose", tmp_path / "run", check=False)
    assert done.returncode == 2 and "branch 0, 1 is not there yet" in done.stderr


def test_names_are_put_in_order_and_unknown_ones_told_together():
    assert parse_only("lmc, displacement") == ["displacement", "lmc"] and parse_only(None) is None
    with pytest.raises(RecipeError) as told:
        parse_only("lcm,curvture")
    assert "lmc" in str(told.value) and "curvature" in str(told.value)


def test_weights_come_from_the_merged_models_manifest_where_it_names_these_branches(foreign, tiny_base, tmp_path):
    z = shutil.copytree(foreign / "merged", tmp_path / "z")
    merge_checkpoints("token_weighted", tiny_base, [foreign / "x", z], [0.75, 0.25], tmp_path / "m", made_from={})

    def weights(*branches: Path) -> list[float]:
        return subject_of_models(str(tiny_base), [str(b) for b in branches], str(tmp_path / "m"), None,
                                 [str(foreign / "held_out.jsonl")], SMALL).weights

    assert weights(foreign / "x", z) == [0.75, 0.25]
    assert weights(z, foreign / "x") == [0.25, 0.75]
    assert weights(foreign / "x", foreign / "y") == [0.5, 0.5]


def altered(model: Path, out: Path, config: dict[str, object] | None = None, **tensors: torch.Tensor) -> Path:
    """A copy of a model with other config values or other tensors."""
    shutil.copytree(model, out)
    told = json.loads((out / "config.json").read_text()) | (config or {})
    (out / "config.json").write_text(json.dumps(told))
    weights = load_file(out / "model.safetensors") | {n.replace("__", "."): t for n, t in tensors.items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def test_models_that_mean_something_else_by_their_weights_are_refused(foreign, tiny_base, tmp_path):
    rope = altered(foreign / "x", tmp_path / "rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})
    fp8 = altered(foreign / "x", tmp_path / "fp8", model__norm__weight=torch.ones(32).to(torch.float8_e4m3fn))
    nan = altered(foreign / "x", tmp_path / "nan", model__norm__weight=torch.full((32,), float("nan")))
    for model, words in ((rope, "rope_parameters"), (fp8, "quantised"), (nan, "NaN or infinity")):
        done = here("diagnose", "--base", tiny_base, "--branch", model, "--merged", foreign / "merged", "--data",
                    foreign / "held_out.jsonl", "--rows", "8", "-o", tmp_path / "d", check=False)
        assert done.returncode == 2 and words in done.stderr and "branch-0" in done.stderr, (words, done.stderr)
        assert not list((tmp_path / "d").glob("*.json"))


def test_a_merged_model_alone_is_compared_with_its_base(foreign, tiny_base, tmp_path):
    done = here("diagnose", "--base", tiny_base, "--merged", foreign / "merged", "--data", foreign / "held_out.jsonl",
                "--only", "displacement,lmc,surface", "--rows", "16", "--points", "3", "-o", tmp_path / "d")
    assert "a plane wants three models" in done.stdout
    assert "With 2 blocks of rows" in done.stdout  # too few to condemn or acquit


def test_weights_that_changed_and_models_of_another_run_are_refused(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    path = copy / "merged" / "model.safetensors"
    path = path if path.exists() else next((copy / "merged").glob("*.safetensors"))
    save_file({n: t * 1.5 for n, t in load_file(path).items()}, path, {"format": "pt"})
    done = here("diagnose", copy, "--only", "displacement", check=False)
    assert done.returncode == 2 and "changed since the merge" in done.stderr
    stranger = shutil.copytree(run_folder, tmp_path / "other")
    manifest = json.loads((stranger / "merged" / "manifest.json").read_text())
    manifest["made_from"]["branch-0"] = "0" * 64
    (stranger / "merged" / "manifest.json").write_text(json.dumps(manifest))
    done = here("diagnose", stranger, "--only", "displacement", check=False)
    assert done.returncode == 2 and "was merged from another branch-0" in done.stderr


def test_joint_training_of_another_budget_is_left_out(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    arm = copy / "compare" / "joint" / "seed-0" / "arm.json"
    told = json.loads(arm.read_text())
    told["made_from"]["train"] = "another"
    arm.write_text(json.dumps(told))
    done = here("diagnose", copy, "--only", "displacement")
    assert "left out: trained with another train" in done.stdout
    assert "joint" not in Displacement.load(copy / "diagnostics" / "displacement.json").labels


def test_only_what_reads_the_conflict_is_measured_again_when_it_changes(run_folder, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    names = ["displacement", "map"]
    run_diagnostics(subject_of_run(reopen_run(copy), SMALL), tmp_path / "d", SMALL, only=names, tell=lambda _: None)
    path = copy / "conflict" / "conflict.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_cv": 0.123}))
    told: list[str] = []
    run_diagnostics(subject_of_run(reopen_run(copy), SMALL), tmp_path / "d", SMALL, only=names, tell=told.append)
    assert any(t.startswith("displacement: as it was measured") for t in told)
    assert not any(t.startswith("map: as it was measured") for t in told)


def test_shapes_that_do_not_line_up_are_told_by_name(tiny_base, tmp_path, foreign):
    other = shutil.copytree(foreign / "x", tmp_path / "wide")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AnabranchError) as told:
        subject_of_models(str(tiny_base), [str(other)], None, None, [str(foreign / "held_out.jsonl")], SMALL)
    assert "branch-0" in str(told.value)
