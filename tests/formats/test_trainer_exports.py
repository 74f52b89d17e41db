"""Exported jobs, read by the trainers' own config classes and data readers, each with the versions that it pins.

Those versions exclude each other and ours, so they are installed (wheels alone, without what they need besides) into folders
of their own, once for a machine, and looked at by trainer_schemas.py in a process of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from anabranch.branches import branch_rows, branch_samples
from anabranch.errors import RecipeError
from anabranch.plan import load_plan
from anabranch.recipe import Recipe, load_recipe
from anabranch.run import Run, open_run, run_stages
from anabranch.trainers.job_files import branch_job, write_job_files
from anabranch.trainers.translation import OPTIMIZER
from conftest import write_recipe

SHARED_PACKAGES = ("huggingface_hub==1.17.0", "httpx==0.28.1", "httpcore==1.0.9", "h11==0.16.0", "anyio==4.12.0")
PACKAGES = {
    "axolotl": ("axolotl==0.19.0", "transformers==5.16.1", "datasets==4.8.4", *SHARED_PACKAGES),
    "llamafactory": ("llamafactory==0.9.5", "transformers==5.6.0", "tokenizers==0.22.2", "datasets==4.0.0", "peft==0.18.1",
                     "accelerate==1.11.0", "trl==0.24.0", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3",
                     *SHARED_PACKAGES)}


def installed(trainer: str) -> Path:
    """The folder with a trainer's packages, made if need be; a skip where they cannot be had (never in CI)."""
    wanted = PACKAGES[trainer]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anabranch-tests"
    folder = cache / f"{trainer}-{hashlib.sha256(repr((wanted, sys.version_info[:2])).encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                               "--target", str(partial), *wanted], capture_output=True, text=True, timeout=600)
        if done.returncode:
            if os.environ.get("CI") or os.environ.get("ANABRANCH_ENGINES") == "required":
                pytest.fail(f"{trainer}'s packages could not be installed:\n{done.stderr[-2000:]}")
            pytest.skip(f"{trainer}'s packages cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
        partial.rename(folder)
    return folder


def understood(trainer: str, *folders: Path) -> list[dict[str, Any]]:
    """Each job's config and rows as the trainer reads them."""
    script = Path(__file__).with_name("trainer_schemas.py")
    environment = os.environ | {"PYTHONPATH": str(installed(trainer)), "OMP_NUM_THREADS": "1", "DISABLE_VERSION_CHECK": "0"}
    done = subprocess.run([sys.executable, str(script), trainer, *map(str, folders)], env=environment, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Run:
    folder = tmp_path_factory.mktemp("exports")
    made = open_run(load_recipe(write_recipe(folder, tiny_base)), tell=lambda _: None)
    run_stages(made, until="split")
    return made


def with_settings(run: Run, train: dict[str, Any], model: dict[str, Any] | None = None) -> Run:
    value = run.recipe.model_dump(mode="json")
    recipe = Recipe.model_validate(value | {"train": value["train"] | train, "model": value["model"] | (model or {})})
    return Run(recipe, run.folder, run.base, run.base_hash, run.tell, run.progress)


LORA = {"lora": {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
                 "modules_to_save": ["lm_head"]}}
MANY = {"num_train_epochs": 2, "gradient_accumulation_steps": 3, "lr_scheduler_type": "linear", "warmup_steps": 0.2,
        "max_grad_norm": 0.5, "weight_decay": 0.01, "optim": "adamw_torch", "adam_beta2": 0.95, "adam_epsilon": 1e-7,
        "neftune_noise_alpha": 5.0, "activation_checkpointing": True, "save_total_limit": 3, "logging_steps": 7, "bf16": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "defaults": ({}, {}, {
        "axolotl": {"learning_rate": 1e-3, "lr_scheduler": "cosine", "max_grad_norm": 1.0, "weight_decay": 0.0, "bf16": False,
                    "micro_batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": 4, "seed": 3, "sequence_len": 100,
                    "gradient_checkpointing": False, "optimizer": OPTIMIZER, "sample_packing": False},
        "llamafactory": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0, "weight_decay": 0.0,
                         "bf16": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": 4,
                         "seed": 3, "data_seed": 3, "cutoff_len": 100, "disable_gradient_checkpointing": True,
                         "optim": OPTIMIZER, "packing": False, "finetuning_type": "full", "save_strategy": "steps"}}),
    "many": (MANY, {}, {
        "axolotl": {"lr_scheduler": "linear", "max_grad_norm": 0.5, "weight_decay": 0.01, "optimizer": "adamw_torch",
                    "adam_beta2": 0.95, "adam_epsilon": 1e-7, "neftune_noise_alpha": 5.0, "gradient_checkpointing": True,
                    "save_total_limit": 3, "logging_steps": 7, "gradient_accumulation_steps": 3},
        "llamafactory": {"lr_scheduler_type": "linear", "max_grad_norm": 0.5, "weight_decay": 0.01, "optim": "adamw_torch",
                         "adam_beta2": 0.95, "adam_epsilon": 1e-7, "neftune_noise_alpha": 5.0, "num_train_epochs": 2.0,
                         "disable_gradient_checkpointing": False, "save_total_limit": 3, "logging_steps": 7,
                         "gradient_accumulation_steps": 3}}),
    "lora": ({}, LORA, {
        "axolotl": {"adapter": "lora", "lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "peft_use_rslora": True,
                    "lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["lm_head"]},
        "llamafactory": {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 12, "lora_dropout": 0.1, "use_rslora": True,
                         "lora_target": ["q_proj", "v_proj"], "additional_target": ["lm_head"]}}),
    "adapters everywhere, bfloat16": ({}, {"lora": {"r": 2}, "dtype": "bfloat16"}, {
        "axolotl": {"adapter": "lora", "lora_r": 2, "lora_alpha": 8, "lora_target_linear": True, "bf16": True},
        "llamafactory": {"finetuning_type": "lora", "lora_rank": 2, "lora_alpha": 8, "lora_target": ["all"], "bf16": True}}),
    "whole weights, bfloat16": ({}, {"dtype": "bfloat16"}, {
        "axolotl": {"bf16": False, "tf32": True}, "llamafactory": {"bf16": True, "pure_bf16": False}})}


@pytest.mark.parametrize("trainer", ["axolotl", "llamafactory"])
def test_jobs_mean_in_the_trainer_s_own_classes_what_the_recipe_says(trainer, planned, tmp_path):
    """Hyperparameters, budget; rows, tokens and masks. One process of the trainer's for all: its imports take longest."""
    mixture = planned.mixture
    folders, wanted = [], []
    for case, (train, model, means) in CASES.items():
        run = with_settings(planned, train, model)
        plan, _ = load_plan(run.folder / "plan.json", run.mixture)
        for folder in write_job_files(run, tmp_path / case, trainer):
            job = branch_job(run, plan, run.mixture, int(folder.name.removeprefix("branch-")))
            samples = branch_samples(plan, job.branch, mixture, run.folder / "mixture", run.recipe.seed)
            folders.append(folder)
            wanted.append((case, job, means[trainer], list(branch_rows(samples, plan.seed, job.branch))))
    broken = tmp_path / "broken"
    shutil.copytree(folders[0], broken)
    config = yaml.safe_load((broken / "config.yaml").read_text())
    (broken / "config.yaml").write_text(yaml.safe_dump(config | {"lerning_rate": 1}))
    *read, refused = understood(trainer, *folders, broken)
    assert "lerning_rate" in refused["error"]
    for one, (case, job, means, rows) in zip(read, wanted, strict=True):
        assert "error" not in one, f"{case}: {one}"
        assert {k: one["config"].get(k) for k in means} == means, case
        share = 0.2 if case == "many" else 0.03
        assert one["config"]["max_steps"] == job.steps and one["config"]["warmup_steps"] == math.ceil(share * job.steps)
        assert one["config"]["output_dir"] == "./model"
        assert len(rows) == job.rows
        assert one["rows"] == [[ids.tolist(), labels.tolist(), [1] * len(ids)] for ids, labels in rows]


def test_axolotl_has_passes_enough_for_all_steps(planned):
    """It runs min(max_steps, ceil(rows x passes / (batch x accumulation))); our trainer rounds up in every pass."""
    from anabranch.trainers.axolotl import axolotl_config

    for passes in (1, 1.5, 2, 5):
        for accumulation in (1, 3, 7):
            run = with_settings(planned, {"num_train_epochs": passes, "gradient_accumulation_steps": accumulation})
            plan, _ = load_plan(run.folder / "plan.json", run.mixture)
            job = branch_job(run, plan, run.mixture, 0)
            config = axolotl_config(job, "d", "o", "b")
            assert math.ceil(job.rows * config["num_epochs"] / (4 * accumulation)) >= job.steps == config["max_steps"]


def test_what_is_frozen_is_frozen_in_axolotl_too(planned, tmp_path):
    run = with_settings(planned, {}, {"trainable": ["*mlp*", "model.norm.weight"]})
    config = yaml.safe_load((write_job_files(run, tmp_path / "a", "axolotl")[0] / "config.yaml").read_text())
    assert config["unfrozen_parameters"] == [
        *(f"^model.layers.{i}.mlp.{part}_proj.weight$" for i in range(2) for part in ("gate", "up", "down")),
        "^model.norm.weight$"]
    with pytest.raises(RecipeError, match=r"model.trainable: it freezes by layers"):
        write_job_files(run, tmp_path / "b", "llamafactory")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("trainer", "train", "model", "words"), [
    ("axolotl", {"label_smoothing_factor": 0.1, "loss_type": "dft"}, {}, ["label_smoothing_factor", "train.loss_type"]),
    ("llamafactory", {"loss_type": "dft", "max_grad_norm": 2}, {}, ["train.loss_type: llamafactory has no such setting"]),
    ("axolotl", {}, {"lora": {"bias": "all", "lora_alpha": 2.5}}, ["model.lora.bias", "whole numbers, got 2.5"]),
    ("llamafactory", {}, {"lora": {"rank_pattern": {"q": 3}}}, ["model.lora.rank_pattern"]),
    ("llamafactory", {}, {"lora": {"target_modules": ".*q_proj"}}, ["not a pattern"])])
def test_what_a_trainer_cannot_say_is_refused_by_name(trainer, train, model, words, planned, tmp_path):
    with pytest.raises(RecipeError) as caught:
        write_job_files(with_settings(planned, train, model), tmp_path / "x", trainer)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "max_grad_norm" not in str(caught.value) and not (tmp_path / "x").exists()


def test_what_we_say_for_a_silent_recipe_is_trl_s(planned):
    from trl import SFTConfig

    config = SFTConfig(output_dir="x", use_cpu=True, bf16=False)
    assert (config.optim, config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (OPTIMIZER, 0.9, 0.999, 1e-8)


def test_warmup_is_counted_as_the_trainer_counts_it(planned):
    from trl import SFTConfig

    plan, _ = load_plan(planned.folder / "plan.json", planned.mixture)
    for asked in ({"warmup_steps": 0.03}, {"warmup_steps": 0.5}, {"warmup_steps": 3}, {"warmup_steps": 0},
                  {"num_train_epochs": 7, "warmup_steps": 0.07}):
        job = branch_job(with_settings(planned, asked), plan, planned.mixture, 0)
        assert job.warmup_steps == SFTConfig(output_dir="x", use_cpu=True, bf16=False, **asked).get_warmup_steps(job.steps)


def test_jobs_say_what_to_do(planned, tmp_path):
    for trainer, start in (("trl", "python train.py"), ("axolotl", "axolotl train config.yaml"),
                           ("llamafactory", "llamafactory-cli train config.yaml"), ("command", 'exec "$@"')):
        folders = write_job_files(planned, tmp_path / trainer, trainer)
        assert [f.name for f in folders] == ["branch-0", "branch-1"]
        for folder in folders:
            assert start in (folder / "run.sh").read_text() and os.access(folder / "run.sh", os.X_OK)
            assert subprocess.run(["bash", "-n", folder / "run.sh"]).returncode == 0
            k = folder.name.removeprefix("branch-")
            assert f"anabranch add-branch RUN {k} {folder.name}/model" in (folder / "README.md").read_text()
        assert write_job_files(planned, tmp_path / trainer, trainer) == folders  # again, over what it wrote
