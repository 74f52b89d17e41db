"""Branches by other trainers: the recipe's own program, a model that came back, and job files that are run as written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from anabranch.artifacts import BranchManifest
from anabranch.branches import branch_inputs, branch_rows, branch_samples, check_branch, train_branch
from anabranch.checkpoints import MARKER
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import (
    AnabranchError,
    BranchFailed,
    CorruptedError,
    ModelError,
    OutputError,
    Preempted,
    ProvenanceError,
    RecipeError,
    ShapeMismatch,
)
from anabranch.launch.logs import end_of_log
from anabranch.plan import load_plan
from anabranch.recipe import Recipe, load_recipe
from anabranch.run import Run, open_run, run_stages
from anabranch.trainers import command
from anabranch.trainers.command import train_by_command, train_group
from anabranch.trainers.job_files import write_job_files
from anabranch.trainers.returned import accept_branch, take_in, told_by_trainer, verify_checkpoint
from conftest import write_recipe

# A trainer in a few lines: no torch optimizer, no anabranch. It moves every weight a little, by the rows that it was given.
PROGRAM = """
import json, os, sys, signal, time
from pathlib import Path
from safetensors.numpy import load_file, save_file
job = json.loads(Path(sys.argv[1]).read_text())
places = {name: Path(path) for name, path in job["places"].items()}
rows = [json.loads(line) for line in places["data"].read_text().splitlines()]
assert len(rows) == job["budget"]["rows_in_file"] and all(len(r["input_ids"]) == len(r["labels"]) for r in rows)
tokens = sum(len(r["input_ids"]) for r in rows)
exec(os.environ.get("SABOTAGE", ""))
weights = {}
for path in sorted(places["base"].glob("*.safetensors")):
    weights |= {name: tensor + tensor.dtype.type(tokens * 1e-6) for name, tensor in load_file(path).items()}
save_file(weights, places["out"] / "model.safetensors")
(places["out"] / "config.json").write_text((places["base"] / "config.json").read_text())
print("trained on", tokens, "tokens")
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Run:
    folder = tmp_path_factory.mktemp("planned")
    made = open_run(load_recipe(write_recipe(folder, tiny_base)), tell=lambda _: None)
    run_stages(made, until="split")
    return made


@pytest.fixture()
def run(planned: Run, tmp_path: Path) -> Run:
    """A run of the test's own, up to its plan."""
    shutil.copytree(planned.folder, tmp_path / "run")
    told: list[str] = []
    return Run(planned.recipe.model_copy(update={"output": tmp_path / "run"}), tmp_path / "run", planned.base,
               planned.base_hash, told.append, lambda *_: None)


def by(run: Run, *arguments: str, model: dict[str, Any] | None = None) -> Recipe:
    """The run's recipe with a program as trainer."""
    value = run.recipe.model_dump(mode="json")
    return Recipe.model_validate(value | {"trainer": {"kind": "command", "command": list(arguments)},
                                          "model": value["model"] | (model or {})})


def train(run: Run, recipe: Recipe, branch: int = 0, call: Any = train_by_command) -> BranchManifest:
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    return call(recipe, plan, branch, mixture, run.folder / "mixture", run.base, run.base_hash, run.branch(branch))


@pytest.fixture()
def program(tmp_path: Path) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path), "{settings}"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


# ------------------------------------------------------------------------------------------------------- the recipe's program


def test_a_program_trains_a_branch_that_is_checked_and_merged(run, program, tmp_path):
    recipe = by(run, *program)
    manifests = [train(run, recipe, k, train_group) for k in range(2)]
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    for k, manifest in enumerate(manifests):
        assert manifest.trainer == "command" and not manifest.counted and manifest.final_loss is None
        assert manifest.tokens_seen == manifest.tokens_planned == plan.groups[k].tokens
        check_branch(BranchManifest.load(run.branch(k) / "branch.json"), branch_inputs(recipe, plan, k, run.base_hash),
                     run.branch(k))
        assert {p.name for p in run.branch(k).iterdir()} == {
            "branch.json", "inputs.json", "lock", "model", "program.txt", "settings.json"}
        base, got = tensors(run.base), tensors(run.branch(k) / "model")
        assert got.keys() == base.keys()
        for name in base:
            torch.testing.assert_close(got[name], base[name] + plan.groups[k].tokens * 1e-6)
        assert AutoTokenizer.from_pretrained(run.branch(k) / "model").chat_template
    assert train(run, recipe) == manifests[0]
    merge_checkpoints("token_weighted", run.base, [run.branch(k) / "model" for k in range(2)], [g.weight for g in plan.groups],
                      tmp_path / "merged", made_from={})
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_program_gets_the_rows_that_trl_would(run, program, monkeypatch):
    monkeypatch.setenv("SABOTAGE", "(places['out'].parent / 'kept.json').write_text(json.dumps([job, rows]))")
    train(run, by(run, *program))
    job, rows = json.loads((run.branch(0) / "kept.json").read_text())
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    samples = branch_samples(plan, 0, mixture, run.folder / "mixture", run.recipe.seed)
    wanted = [(ids.tolist(), labels.tolist()) for ids, labels in branch_rows(samples, plan.seed, 0)]
    assert [(r["input_ids"], r["labels"]) for r in rows] == wanted and all(set(r["attention_mask"]) == {1} for r in rows)
    assert any(label == -100 for _, labels in wanted for label in labels)
    assert job["budget"]["tokens"] == plan.groups[0].tokens and job["train"]["learning_rate"] == 1e-3
    assert job["base_hash"] == run.base_hash and job["seed"] == plan.seed


def test_a_failed_program_is_told_with_the_end_of_its_log_and_no_secret(run, program, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "very-secret-value")
    monkeypatch.setenv("SABOTAGE", "print('line one'); print('key', os.environ['MY_API_KEY']); sys.exit('out of cheese')")
    with pytest.raises(BranchFailed, match=r"(?s)exit code 1.*line one.*key \*\*\*.*out of cheese") as caught:
        train(run, by(run, *program))
    assert "very-secret-value" not in str(caught.value) and not (run.branch(0) / "branch.json").exists()
    monkeypatch.setenv("SABOTAGE", "os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(BranchFailed, match="killed by signal 11"):
        train(run, by(run, *program))


def test_what_the_program_leaves_must_be_a_branch(run, program, monkeypatch):
    monkeypatch.setenv("SABOTAGE", "sys.exit(0)")
    with pytest.raises(ModelError, match="without weights"):
        train(run, by(run, *program))
    monkeypatch.setenv("SABOTAGE", "tokens = 0")
    with pytest.raises(ModelError, match="nothing was trained"):
        train(run, by(run, *program))
    monkeypatch.setenv("SABOTAGE", "(places['out'] / 'trainer_state.json').write_text("
                                   "json.dumps({'global_step': 3, 'max_steps': 9}))")
    with pytest.raises(BranchFailed, match="step 3 of 9"):
        train(run, by(run, *program))
    assert not (run.branch(0) / "branch.json").exists()


def test_a_hugging_face_trainer_is_believed_about_its_losses(run, program, monkeypatch):
    state = {"global_step": 9, "max_steps": 9, "num_input_tokens_seen": 1234,
             "log_history": [{"step": 4, "loss": 2.5}, {"step": 8, "loss": 1.5}, {"step": 9, "train_runtime": 1.0}]}
    monkeypatch.setenv("SABOTAGE", "at = places['checkpoints'] / 'checkpoint-9'; at.mkdir(); "
                                   f"(at / 'trainer_state.json').write_text({json.dumps(json.dumps(state))})")
    manifest = train(run, by(run, *program))
    assert (manifest.steps, manifest.tokens_seen, manifest.losses, manifest.final_loss, manifest.counted) == (
        9, 1234, [(4, 2.5), (8, 1.5)], 1.5, True)


def test_commands_that_cannot_be(run):
    with pytest.raises(RecipeError, match="no program `no-such-trainer`"):
        train(run, by(run, "no-such-trainer", "{out}"))
    with pytest.raises(RecipeError, match=r"\{setings\}.*Did you mean `settings`"):
        train(run, by(run, "true", "{setings}", "{out}"))
    with pytest.raises(RecipeError, match="neither"):
        train(run, by(run, "true"))


SLOW = """
at = places["checkpoints"] / "checkpoint-{step}"
def told(*_):
    at.mkdir(exist_ok=True)
    (at / "trainer_state.json").write_text("{{}}")
    (at / "model.safetensors").write_bytes(b"half a model")
    sys.exit({code})
signal.signal(signal.SIGTERM, told)
(places["out"].parent / "ready").write_text(str(os.getpid()))
if not list(places["checkpoints"].glob("checkpoint-*")):
    time.sleep(60)
"""


def when_ready(folder: Path, then: Any) -> threading.Thread:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("code", [0, 7])
def test_sigterm_is_passed_on_and_what_the_program_keeps_is_kept(code, run, program, monkeypatch):
    """Also where it ends with 0, as trainers do that saved and stopped: that is not done."""
    monkeypatch.setenv("SABOTAGE", SLOW.format(step=5, code=code))
    sender = when_ready(run.branch(0), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="SIGTERM"):
        train(run, by(run, *program))
    sender.join()
    kept = run.branch(0) / "checkpoints" / "checkpoint-5"
    assert (kept / "model.safetensors").exists() and (kept / MARKER).exists(), "it must be fit to travel"
    assert train(run, by(run, *program)).trainer == "command"  # goes on from what it kept


def test_a_program_that_will_not_end_is_ended_with_all_its_children(run, program, monkeypatch):
    monkeypatch.setattr(command, "GRACE", 0.5)
    monkeypatch.setenv("SABOTAGE", """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"])
time.sleep(1)
(places["out"].parent / "ready").write_text(str(child.pid))
time.sleep(99)
""")
    sender = when_ready(run.branch(0), lambda: os.kill(os.getpid(), signal.SIGTERM))
    begun = time.monotonic()
    with pytest.raises(Preempted):
        train(run, by(run, *program))
    sender.join()
    child = int((run.branch(0) / "ready").read_text())
    assert time.monotonic() - begun < 30
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_program_does_not_outlive_a_killed_parent(run, program):
    """kill -9 of us: the system tells the program, and until it has ended the branch is held."""
    value = json.loads((run.folder / "recipe.json").read_text())
    value["recipe"] = by(run, *program).model_dump(mode="json")
    (run.folder / "recipe.json").write_text(json.dumps(value))
    code = ("import json, sys; from pathlib import Path; from anabranch.run import reopen_run; "
            "from anabranch.plan import load_plan; from anabranch.trainers.command import train_by_command as t; "
            "r = reopen_run(Path(sys.argv[1])); m = r.mixture; p, _ = load_plan(r.folder / 'plan.json', m); "
            "t(r.recipe, p, 0, m, r.folder / 'mixture', r.base, r.base_hash, r.branch(0))")
    slow = "(places['out'].parent / 'ready').write_text(str(os.getpid())); time.sleep(99)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(run.folder)], env=os.environ | {"SABOTAGE": slow})
    when_ready(run.branch(0), lambda: None).join()
    child = psutil.Process(int((run.branch(0) / "ready").read_text()))
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_end_of_a_long_log(tmp_path):
    (tmp_path / "log").write_bytes(b"x" * 100_000 + b"\n\xff\xfe\nlast\n")
    assert end_of_log(tmp_path / "log", 2).splitlines()[-1].strip() == "last"


# ------------------------------------------------------------------------------------------------------ a model that came back


@pytest.fixture()
def returned(run: Run, tmp_path: Path) -> Path:
    """A model as a trainer leaves it: moved a little, with its own files around it."""
    folder = tmp_path / "out" / "model"
    model = AutoModelForCausalLM.from_pretrained(run.base)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 1e-4 * (i + 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(run.base).save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    (folder / "README.md").write_text("a card")
    return folder


def change(folder: Path, edit: Any) -> None:
    weights = tensors(folder)
    edit(weights)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors")


def configure(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def test_a_returned_model_is_taken_in_and_the_run_goes_on(run, returned):
    manifest = accept_branch(run, 1, returned)
    assert manifest.trainer == "returned" and manifest.branch == 1
    kept = run.branch(1) / "model"
    assert {p.suffix for p in kept.iterdir()} <= {".safetensors", ".json", ".jinja", ".txt"}, "no pickle, no card"
    assert all(torch.equal(t, tensors(returned)[n]) for n, t in tensors(kept).items())
    assert any("training_args.bin" in line for line in run.tell.__self__)
    train(run, run.recipe, 0, train_branch)
    run_stages(run, until="merge")
    AutoModelForCausalLM.from_pretrained(run.folder / "merged")
    with pytest.raises(OutputError, match="there already"):
        accept_branch(run, 1, returned)


def nan(w: dict[str, torch.Tensor]) -> None:
    w["model.norm.weight"][3] = float("nan")


def reshape(w: dict[str, torch.Tensor]) -> None:
    w["model.embed_tokens.weight"] = w["model.embed_tokens.weight"][:-1].clone()
    del w["model.norm.weight"]
    w["extra.weight"] = torch.zeros(2)


BAD: dict[str, tuple[Any, type[AnabranchError], list[str]]] = {
    "nan": (lambda f: change(f, nan), ModelError, ["model.norm.weight", "NaN or infinity in 1 of 32"]),
    "shapes": (lambda f: change(f, reshape), ShapeMismatch,
               ["embed_tokens.weight': it has shape", "model.norm.weight': the base has it", "extra.weight': it has it"]),
    "another base": (lambda f: configure(f, rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 1.0},
                                         rms_norm_eps=0.1), ModelError, ["rms_norm_eps", "rope_parameters", "another base"]),
    "quantised": (lambda f: configure(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
                  ModelError, ["quantization_config"]),
    "float8": (lambda f: change(f, lambda w: w.update({n: t.to(torch.float8_e4m3fn) for n, t in w.items()})), ShapeMismatch,
               ["F8_E4M3", "float32, bfloat16 or float16"]),
    "cut short": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), CorruptedError,
                  ["damaged or cut short"]),
    "no weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ModelError,
                   ["Pickle files are refused"]),
    "no config": (lambda f: (f / "config.json").unlink(), ModelError, ["no config.json"]),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), CorruptedError, ["config.json"]),
    "missing shard": (lambda f: ((f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
                                 (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
                                     "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))),
                      CorruptedError, ["model-00002-of-00002"]),
    "index that leads out": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../etc/passwd"}}))), CorruptedError, ["no names of files beside it"]),
    "nested": (lambda f: shutil.move(f, f.parent / "tmp") and (f.mkdir(), shutil.move(f.parent / "tmp", f / "checkpoint-7")),
               ModelError, ["checkpoint-7"]),
    "too large": (lambda f: change(f, lambda w: w.update({"model.norm.weight": torch.zeros(30_000_000)})), ShapeMismatch,
                  ["no branch of it"]),
    "not there": (shutil.rmtree, ModelError, ["not there"]),
}


@pytest.mark.parametrize("way", BAD)
def test_what_cannot_be_a_branch_is_refused_in_one_message(way, run, returned):
    spoil, kind, words = BAD[way]
    spoil(returned)
    with pytest.raises(kind) as caught:
        accept_branch(run, 0, returned)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert ".partial" not in str(caught.value) and not list(run.branch(0).glob("*model*"))


def test_all_problems_come_as_one_message(run, returned):
    change(returned, lambda w: (nan(w), w["model.layers.0.mlp.up_proj.weight"].fill_(float("inf"))))
    configure(returned, rms_norm_eps=0.1)
    tokenizer = json.loads((returned / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["a"], tokenizer["model"]["vocab"]["b"] = 70000, 70001
    (returned / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError) as caught:
        accept_branch(run, 0, returned)
    assert all(word in str(caught.value) for word in ("norm.weight", "up_proj", "rms_norm_eps", "2 of the base's tokens"))


def test_another_model_of_the_same_shapes_is_warned_of(run, returned):
    other = Qwen2ForCausalLM(Qwen2Config.from_pretrained(run.base))
    change(returned, lambda w: w.update({n: t.clone() for n, t in other.state_dict().items() if n in w}))
    assert any("Was it trained from this base?" in line for line in verify_checkpoint(returned, run.base, run.recipe))


def test_only_what_the_recipe_trains_may_have_changed(run, returned):
    frozen = by(run, "x", "{out}", model={"trainable": ["*mlp*"]})
    with pytest.raises(ModelError, match=r"embed_tokens.weight' was changed .*freezes it") as caught:
        verify_checkpoint(returned, run.base, frozen)
    assert "mlp.up_proj" not in str(caught.value)
    base = tensors(run.base)
    change(returned, lambda w: w.update({n: t for n, t in base.items() if "mlp" not in n}))
    assert verify_checkpoint(returned, run.base, frozen) == []
    adapters = by(run, "x", "{out}", model={"lora": {"r": 2, "target_modules": ["up_proj"]}})
    with pytest.raises(ModelError, match=r"down_proj.weight' was changed") as caught:
        verify_checkpoint(returned, run.base, adapters)
    assert "up_proj" not in str(caught.value)


def test_narrow_weights_are_told_with_what_was_lost(run, returned):
    base = tensors(run.base)
    change(returned, lambda w: w.update({n: t.to(torch.bfloat16) for n, t in base.items()}))
    with pytest.raises(ModelError, match="nothing was trained"):
        verify_checkpoint(returned, run.base, run.recipe)
    change(returned, lambda w: w["model.norm.weight"].fill_(2.0))
    (narrow,) = [w for w in verify_checkpoint(returned, run.base, run.recipe) if "saved in BF16" in w]
    assert "0% of all entries" in narrow
    widened = {n: t.to(torch.bfloat16).float() for n, t in base.items()}
    change(returned, lambda w: w.update(widened | {"model.norm.weight": base["model.norm.weight"] + 1}))
    assert any("trained from a rounded base" in w for w in verify_checkpoint(returned, run.base, run.recipe))


def test_an_adapter_is_folded(run, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(run.base),
                           LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    recipe = by(run, "x", "{out}", model={"lora": {"r": 3, "target_modules": ["q_proj", "up_proj"]}})
    taken = take_in(tmp_path / "adapter", run.base, recipe, tmp_path / "model", kept=tmp_path / "kept")
    wanted = model.merge_and_unload().state_dict()
    for name, tensor in tensors(tmp_path / "model").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    assert any("folded" in w for w in taken.warnings) and (tmp_path / "kept" / "adapter_model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    other = by(run, "x", "{out}", model={"lora": {"r": 3, "target_modules": ["up_proj"]}})
    with pytest.raises(ModelError, match="q_proj"):
        take_in(tmp_path / "adapter", run.base, other, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_that_repeats_its_tied_head(run, returned):
    change(returned, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    accept_branch(run, 0, returned)
    merge_checkpoints("token_weighted", run.base, [run.branch(0) / "model"], [1.0], run.folder / "m", made_from={})


@pytest.mark.parametrize("text", ["{", "[]", '{"log_history": 3, "global_step": "x"}', '{"log_history": [3, {"step": 1}]}'])
def test_odd_trainer_states(text, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    try:
        told = told_by_trainer(tmp_path)
    except CorruptedError as error:
        assert "trainer_state.json" in str(error)
    else:
        assert told is not None and told.steps is None and told.losses == []


# --------------------------------------------------------------------------------------------------------------- job files


@pytest.mark.parametrize("lora", [None, {"r": 4, "lora_dropout": 0.2}], ids=["weights", "lora"])
def test_the_exported_trl_job_gives_our_branch_and_comes_back(lora, run, tmp_path):
    model = run.recipe.model.model_copy(update={"lora": lora})
    run = Run(run.recipe.model_copy(update={"model": model}), run.folder, run.base, run.base_hash, run.tell, run.progress)
    folder = write_job_files(run, tmp_path / "jobs", "trl")[0]
    moved = shutil.move(tmp_path / "jobs", tmp_path / "elsewhere") / folder.name
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([moved / "run.sh"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    back = accept_branch(run, 0, moved / "model")
    got = tensors(run.branch(0) / "model")
    shutil.rmtree(run.branch(0))
    ours = train(run, run.recipe, 0, train_branch)
    assert all(torch.equal(t, got[n]) for n, t in tensors(run.branch(0) / "model").items())
    assert (back.steps, back.tokens_seen, back.counted) == (ours.steps, ours.tokens_seen, True)
    assert [round(loss, 6) for _, loss in back.losses] == [round(loss, 6) for _, loss in ours.losses]


def test_a_job_of_another_plan_does_not_come_back(run, returned, tmp_path):
    folders = write_job_files(run, tmp_path / "jobs", "command")
    shutil.copytree(returned, folders[1] / "model")
    with pytest.raises(ProvenanceError, match="it is branch 1, not 0"):
        accept_branch(run, 0, folders[1] / "model")
    plan = json.loads((run.folder / "plan.json").read_text())
    (run.folder / "plan.json").write_text(json.dumps(plan | {"seed": 99}))
    with pytest.raises(ProvenanceError, match="another plan"):
        accept_branch(run, 1, folders[1] / "model")
    (run.folder / "plan.json").write_text(json.dumps(plan))
    assert accept_branch(run, 1, folders[1] / "model").branch == 1
    with pytest.raises(OutputError, match="a trained model lies there"):
        write_job_files(run, tmp_path / "jobs", "command")


def test_the_exported_command_job_runs_where_it_was_carried(run, program, tmp_path):
    with_program = Run(by(run, *program), run.folder, run.base, run.base_hash, run.tell, run.progress)
    write_job_files(with_program, tmp_path / "jobs", "command")
    moved = shutil.move(tmp_path / "jobs", tmp_path / "elsewhere") / "branch-1"
    subprocess.run([moved / "run.sh"], check=True, timeout=60)
    assert accept_branch(with_program, 1, moved / "model").branch == 1
    write_job_files(run, tmp_path / "plain", "command")
    script = tmp_path / "plain" / "branch-0" / "run.sh"
    assert subprocess.run([script], capture_output=True, timeout=60).returncode == 2
    subprocess.run([script, *program[:2], "./settings.json"], check=True, timeout=60)
    assert accept_branch(run, 0, script.parent / "model").branch == 0


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="other files"):
        write_job_files(run, tmp_path / "jobs", "trl")
