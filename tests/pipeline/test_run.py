"""The whole pipeline on a real (tiny) checkpoint: what comes out, kill -9 in every stage, strangers refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import anabranch, here, write_recipe

# For every line `RECIPE STAGE N`, a process that runs the pipeline and kills itself, as kill -9 would, at the N-th word that
# the stage says of its progress; then a line with its exit code. Each is forked from one that has done nothing but import.
KILLER = """
import os, signal, sys
from pathlib import Path
from transformers import AutoTokenizer, Qwen2ForCausalLM
from anabranch.recipe import load_recipe
from anabranch.run import open_run, run_stages
def killed(recipe, stage, word):
    heard = 0
    def progress(said, what, done, total):
        nonlocal heard
        heard += said == stage
        if heard == int(word):
            os.kill(os.getpid(), signal.SIGKILL)
    run_stages(open_run(load_recipe(Path(recipe)), tell=lambda text: None, progress=progress))
for line in sys.stdin:
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.dup2(2, 1)
        try:
            killed(*line.split())
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture()
def kill_in(tmp_path):
    """(recipe, stage, word): the pipeline in a process that is killed there."""
    with open(tmp_path / "killed.txt", "w+") as log, subprocess.Popen(
            [sys.executable, "-c", KILLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as killer:

        def kill(recipe: Path, stage: str, word: int) -> None:
            print(recipe, stage, word, file=killer.stdin, flush=True)
            assert killer.stdout.readline() == f"{-signal.SIGKILL}\n", (stage, (tmp_path / "killed.txt").read_text())

        yield kill
        killer.kill()  # it has nothing to leave in order


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for part in ("mixture", "gradients", "conflict", "plan.json")
            for p in ([folder / part] if (folder / part).is_file() else sorted((folder / part).rglob("*")))
            if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base):
    """One uninterrupted run; tests copy it or only read it."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder, tiny_base)
    told = here("run", folder / "recipe.yaml").stdout
    return folder, told


def copied(finished, tmp_path: Path) -> Path:
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy" / "recipe.yaml"


def test_every_stage_says_what_it_did(finished):
    folder, told = finished
    for word in ("mixture:", "gradients:", "conflict:", "split:", "train:", "merge:", "evaluate:", "report:"):
        assert word in told
    assert "after one step (G_var)" in told and "times that of random groups" in told
    assert (folder / "run" / "report.html").stat().st_size > 10_000


def test_merged_model_is_the_token_weighted_mean_and_loads(finished, tiny_base):
    run = finished[0] / "run"
    plan = json.loads((run / "plan.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    tokens = [g["tokens"] for g in plan["groups"]]
    branches = [AutoModelForCausalLM.from_pretrained(run / "branches" / str(k) / "model") for k in range(2)]
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    moved = 0.0
    for name, got in merged.state_dict().items():
        wanted = sum(n / sum(tokens) * b.state_dict()[name].double() for n, b in zip(tokens, branches, strict=True))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)
        moved += float((got - base.state_dict()[name]).square().sum())
    assert moved > 0
    assert merged.config.tie_word_embeddings and AutoTokenizer.from_pretrained(run / "merged").chat_template
    assert not any("lm_head" in name for p in (run / "merged").glob("*.safetensors") for name in load_file(p))


def test_tokens_seen_are_the_plan_s(finished):
    run = finished[0] / "run"
    plan = json.loads((run / "plan.json").read_text())
    for group in plan["groups"]:
        branch = json.loads((run / "branches" / str(group["group"]) / "branch.json").read_text())
        assert branch["tokens_seen"] == branch["tokens_planned"] == group["tokens"]


def test_a_second_run_does_nothing_again(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    run = recipe.parent / "run"
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.rglob("*.safetensors")}
    here("run", recipe)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.rglob("*.safetensors")} == before


def test_killed_in_every_stage_loses_nothing(finished, kill_in, tmp_path):
    """kill -9 in each stage of one run, then the same command: the same bytes as a run that nobody killed."""
    recipe_file = copied(finished, tmp_path)
    run = recipe_file.parent / "run"
    shutil.rmtree(run)
    kill_in(recipe_file, "mixture", 3)
    kept = {p: p.stat().st_mtime_ns for p in (run / "mixture" / "units").glob("*.safetensors")}
    kill_in(recipe_file, "gradients", 3)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "tokenised units were made again"
    sketches = {p: p.stat().st_mtime_ns for p in (run / "gradients" / "units").glob("*.safetensors")}
    assert 1 <= len(sketches) < 5
    for stage, word in (("conflict", 2), ("merge", 3), ("evaluate", 5)):
        kill_in(recipe_file, stage, word)
        assert {p: p.stat().st_mtime_ns for p in sketches} == sketches, "sketches were made again"
    assert not (run / "merged.partial").exists() and (run / "merged").exists()
    anabranch("run", recipe_file)
    assert digests(run) == digests(finished[0] / "run")
    for name in ("base", "branch-0", "branch-1", "merged"):
        assert (run / "evaluation" / f"{name}.json").exists()


def test_killed_branch_goes_on_from_its_checkpoint(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    run = recipe.parent / "run"
    shutil.rmtree(run / "branches" / "0")
    marker = "checkpoint-*/complete.json"
    process = subprocess.Popen([sys.executable, "-m", "anabranch", "train-branch", str(run), "0"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((run / "branches" / "0" / "checkpoints").glob(marker)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    resumed = here("train-branch", run, 0)
    assert "steps" in resumed.stdout
    again = json.loads((run / "branches" / "0" / "branch.json").read_text())
    never = json.loads((finished[0] / "run" / "branches" / "0" / "branch.json").read_text())
    assert again["tokens_seen"] == never["tokens_seen"] and again["steps"] == never["steps"]
    for path in (finished[0] / "run" / "branches" / "0" / "model").glob("*.safetensors"):
        a, b = load_file(path), load_file(run / "branches" / "0" / "model" / path.name)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_launcher_killed_stops_its_branches(finished, tmp_path):
    """A branch whose launcher has died saves and ends: nobody would ever collect it, and a rerun wants its place."""
    recipe = copied(finished, tmp_path)
    text = yaml.safe_load(recipe.read_text())
    text["mixture"]["epochs"] = 40
    recipe.write_text(yaml.safe_dump(text))
    shutil.rmtree(recipe.parent / "run" / "branches")
    launcher = subprocess.Popen([sys.executable, "-m", "anabranch", "run", str(recipe), "--from", "split", "--until",
                                 "train"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    progress = recipe.parent / "run" / "branches" / "0" / "progress.json"
    deadline = time.monotonic() + 120
    while not progress.exists() and launcher.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = [p for p in psutil.Process(launcher.pid).children() if "train-branch" in " ".join(p.cmdline())]
    assert children
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert gone and not alive


def test_adding_a_unit_measures_only_that_unit(finished, tmp_path):
    from conftest import task_rows, write_rows

    recipe = copied(finished, tmp_path)
    run = recipe.parent / "run"
    before = {p.name: p.stat().st_mtime_ns for p in (run / "gradients" / "units").glob("*.safetensors")}
    write_rows(recipe.parent / "data" / "double.jsonl", task_rows("double", 24, offset=50))
    (recipe.parent / "transfer" / "double.jsonl").unlink()
    write_rows(recipe.parent / "transfer" / "other.jsonl", task_rows("double", 8))
    here("run", recipe, "--until", "conflict")
    after = {p.name: p.stat().st_mtime_ns for p in (run / "gradients" / "units").glob("*.safetensors")}
    assert len(after) == len(before) + 1 and {n: after[n] for n in before} == before
    grown = digests(run)
    shutil.rmtree(run / "conflict")
    here("run", recipe, "--until", "conflict")
    assert digests(run) == grown, "conflict from what was known differs from conflict anew"
    refused = here("run", recipe, check=False)
    assert refused.returncode == 2 and "--from split" in refused.stderr and "Traceback" not in refused.stderr


def test_shards_add_up_to_the_same_sketches(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    run = recipe.parent / "run"
    shutil.rmtree(run / "gradients")
    assert "missing" in here("gradients", recipe, "--shard", "1/2").stdout
    assert "missing" not in here("gradients", recipe, "--shard", "0/2").stdout
    assert digests(run) == digests(finished[0] / "run")


def test_hand_edited_plan(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    path = recipe.parent / "run" / "plan.json"
    shutil.rmtree(recipe.parent / "run" / "branches")
    plan = json.loads(path.read_text())
    moved = next(u for u in plan["units"] if sum(v["group"] == u["group"] for v in plan["units"]) > 1)
    moved["group"] = 1 - moved["group"]
    path.write_text(json.dumps(plan))
    told = here("run", recipe, "--until", "split").stdout
    assert "1 units moved by hand" in told
    after = json.loads(path.read_text())
    for k in range(2):
        assert after["groups"][k]["tokens"] == sum(u["tokens"] for u in after["units"] if u["group"] == k)
    plan["units"][0]["group"] = 7
    plan["units"][1]["unit"] = "nobody"
    path.write_text(json.dumps(plan))
    refused = here("run", recipe, "--until", "split", check=False)
    assert refused.returncode == 2 and "nobody" in refused.stderr


def test_strangers_are_refused(finished, tmp_path, tiny_base):
    recipe = copied(finished, tmp_path)
    run = recipe.parent / "run"
    shutil.rmtree(run / "merged")
    path = run / "branches" / "1" / "branch.json"
    branch = json.loads(path.read_text())
    branch["made_from"]["base"] = "0" * 64
    path.write_text(json.dumps(branch))
    refused = here("run", recipe, check=False)
    assert refused.returncode == 2 and "another base model" in refused.stderr and "Traceback" not in refused.stderr
    assert not (run / "merged").exists()


def test_corrupted_branch_shard_is_refused(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    run = recipe.parent / "run"
    shutil.rmtree(run / "merged")
    shard = next((run / "branches" / "0" / "model").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0xFF
    shard.write_bytes(data)
    refused = here("run", recipe, check=False)
    assert refused.returncode == 2 and shard.name in refused.stderr and not (run / "merged").exists()


def test_another_machine_needs_only_the_folder_and_the_same_base(finished, tmp_path, tiny_base):
    recipe = copied(finished, tmp_path)
    run = recipe.parent / "run"
    shutil.rmtree(run / "branches" / "1")
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    shutil.copytree(tiny_base, tmp_path / "base-here")
    here("train-branch", moved, 1, "--model", tmp_path / "base-here")
    config = json.loads((tmp_path / "base-here" / "config.json").read_text())
    (tmp_path / "base-here" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    refused = here("train-branch", moved, 1, "--model", tmp_path / "base-here", check=False)
    assert refused.returncode == 2 and "another base" in refused.stderr


def test_lora_branches_merge_as_whole_checkpoints(finished, tmp_path, tiny_base):
    recipe = copied(finished, tmp_path)
    text = yaml.safe_load(recipe.read_text())
    text["model"]["lora"] = {"r": 4, "lora_alpha": 8}
    text["train"]["learning_rate"] = 1e-2
    text["output"] = "lora"
    text["evaluate"]["branches"] = False
    recipe.write_text(yaml.safe_dump(text))
    here("run", recipe)
    merged = AutoModelForCausalLM.from_pretrained(recipe.parent / "lora" / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all("proj" in name for name in changed)


def test_status(finished, tmp_path):
    told = here("status", finished[0] / "run").stdout
    assert "branch 0" in told and "merged" in told
    refused = here("status", tmp_path, check=False)
    assert refused.returncode == 2 and "not a run folder" in refused.stderr


def test_sigterm_saves_a_checkpoint_that_is_resumed(finished, tmp_path):
    """What Ctrl-C in the launcher, a queue's time limit or a preemption sends."""
    recipe = copied(finished, tmp_path)
    text = yaml.safe_load(recipe.read_text())
    text["mixture"]["epochs"], text["train"]["save_steps"] = 30, 1000
    recipe.write_text(yaml.safe_dump(text))
    here("run", recipe, "--from", "split", "--until", "split")
    branch = recipe.parent / "run" / "branches" / "0"
    process = subprocess.Popen([sys.executable, "-m", "anabranch", "train-branch", str(recipe.parent / "run"), "0"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (branch / "progress.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    message = process.communicate()[1]
    assert process.returncode == 85 and "its checkpoint is kept" in message
    from anabranch.checkpoints import newest_checkpoint

    assert newest_checkpoint(branch / "checkpoints") is not None


def test_budgets_edited_in_the_plan_are_refused(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    path = recipe.parent / "run" / "plan.json"
    plan = json.loads(path.read_text())
    plan["units"][0]["tokens"] *= 2
    path.write_text(json.dumps(plan))
    refused = here("run", recipe, check=False)
    assert refused.returncode == 2 and "tokens, the mixture" in refused.stderr


def test_a_refused_recipe_does_not_reach_the_workers(finished, tmp_path):
    recipe = copied(finished, tmp_path)
    before = (recipe.parent / "run" / "recipe.json").read_bytes()
    refused = here("run", recipe, "--set", "split.groups=3", check=False)
    assert refused.returncode == 2 and (recipe.parent / "run" / "recipe.json").read_bytes() == before
