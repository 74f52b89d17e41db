"""Side roads of image runs: mergeability, adapters and branches from elsewhere, what is there of a run, a kill, a store.

One trained run of a LLaVA type: adapters beside a frozen tower, a tied head, a base in bfloat16 and two files. What is checked
against is transformers, PEFT and torch on the files themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

import anabranch
from anabranch.distribute import run_anywhere
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import AnabranchError, MixtureError, ModelError, ShapeMismatch
from anabranch.lora.apply import apply
from anabranch.lora.extract import extract
from anabranch.mergeability.calibration_rows import read_calibration
from anabranch.mergeability.collect import measure_pairs
from anabranch.mergeability.data import last_block, rows_hash
from anabranch.mergeability.measure import measure
from anabranch.mergeability.models import calibration_rows, folder_of, model_folder, task_mixture
from anabranch.partial import merge_present
from anabranch.plan import load_plan
from anabranch.recipe import load_recipe
from anabranch.rows import read_image
from anabranch.run import Run, open_run, reopen_run, run_stages
from anabranch.trainers.command import train_group
from anabranch.trainers.returned import accept_branch
from anabranch.worker import work
from jobs_here import jobs_done_here
from vision_models import (
    FAMILIES,
    MODELS,
    TINY,
    make_tokenizer,
    questions,
    read_processor,
    write_llava,
    write_picture_units,
    write_vision_model,
)

EYES = ("vision_tower.", "multi_modal_projector.")
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five units in two groups, both branches trained."""
    home = tmp_path_factory.mktemp("paths")
    base = write_vision_model(home / "base", "llava", tied=True, shards=2, dtype="bfloat16", seed=5)
    recipe = {"model": {"path": str(base), "freeze": ["vision tower", "projector"], "lora": {"r": 2, "lora_alpha": 4}},
              "mixture": {"sources": write_picture_units(home, rows=12), "held_out": 0.25, "max_length": 400},
              "gradients": {"calibration_samples": 6, "size": 256}, "split": {"method": "random", "groups": 2},
              "train": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2},
              "evaluate": {"generate_samples": 1, "max_samples": 2, "retention": "none"}, "launch": {"threads": 1},
              "output": "run", "seed": 3}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = open_run(load_recipe(home / "recipe.yaml"), tell=lambda _: None)
    with jobs_done_here():
        run_stages(run, until="train")
    return run


@pytest.fixture()
def run(done: Run, tmp_path: Path) -> Run:
    """A copy whose branch 0 is missing."""
    shutil.copytree(done.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "branches" / "0")
    return replace(reopen_run(tmp_path / "run"), tell=lambda _: None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
    return found


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- mergeability ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_is_the_language_model_s_also_beside_a_larger_tower(family):
    """LLaVA's towers here have a layer more than its language model."""
    model = MODELS[family](make_tokenizer(family), False, TINY)
    (name,) = [n for n, module in model.named_modules() if module is last_block(model)]
    assert name in ("model.language_model.layers.1", "model.text_model.layers.1")


def mean_activation(folder: Path, processor: Any, rows: list[tuple[Any, str, str]]) -> torch.Tensor:
    """Of the last language block, over tokens and then rows, one row at a time, by transformers alone."""
    model, seen = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), []
    model.model.language_model.layers[-1].register_forward_hook(lambda _m, _i, out: seen.append(
        (out[0] if isinstance(out, tuple) else out)[0].double().mean(0)))
    for image, prompt, answer in rows:
        text = processor.apply_chat_template([
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]}])
        with torch.no_grad():
            model(**processor(text=[text], images=[image], return_tensors="pt"))
    return torch.stack(seen).mean(0)


def test_activations_are_those_of_models_that_see_the_images(done, tmp_path):
    """Also where nothing but activations is asked for, which takes no loss and so another way through the model."""
    asked = {task: questions(task, 4, seed=31) for task in ("colour", "place")}
    data = [f"{task}={write_llava(tmp_path, task, rows, images=task)}" for task, rows in asked.items()]
    models = {task: done.branch(k) / "model" for k, task in enumerate(asked)}
    found = [measure(str(done.base), [f"{t}={m}" for t, m in models.items()], data, tmp_path / f"{i}.json", only=only)
             for i, only in enumerate([{"activations"}, {"activations", "scores"}])]
    processor = read_processor(done.base)
    shown = [(open_jpeg_or_png(tmp_path / task / task, i), q.prompt, q.answer)
             for task, rows in asked.items() for i, q in enumerate(rows)]
    one, other = (mean_activation(models[task], processor, shown) for task in asked)
    for metrics in found:
        got = metrics.pairs[0].metrics
        assert got["activation_l2_distance"] == pytest.approx(float((one - other).norm()), rel=1e-3)
        assert got["activation_dot_product"] == pytest.approx(float(one @ other), rel=1e-4)


def open_jpeg_or_png(folder: Path, number: int) -> Any:
    from PIL import Image

    return Image.open(next(folder.glob(f"{number}_0.*"))).convert("RGB")


def test_calibration_rows_of_a_table_are_read_again_with_their_images(done, tmp_path):
    """RUN/mergeability/calibration.jsonl is what a new model is measured on beside the table's: `measure --data` takes it."""
    shutil.copytree(done.folder / "mixture", tmp_path / "mixture")
    here = replace(done, folder=tmp_path)
    reduced = task_mixture(here, here.mixture, ["colour", "compare", "words"], 2)
    for k, unit in enumerate(reduced.units):
        shutil.copytree(done.branch(k % 2) / "model", model_folder(here, unit) / "model")
    trained: dict[str, Any] = {u.name: SimpleNamespace(files={}) for u in reduced.units}
    measure_pairs(here, reduced, trained)
    path, kept = folder_of(here) / "calibration.jsonl", calibration_rows(here, reduced)
    again = read_calibration([str(path)], list(kept), done.base, samples=9, seed=0)
    for task, rows in kept.items():
        shown, stored = (r.images_of(range(len(r))) for r in (again[task], rows))
        assert [[read_image(i) for i in row] for row in shown] == [[read_image(i) for i in row] for row in stored]
        assert rows_hash(again[task]) == rows_hash(rows) and np.array_equal(again[task].input_ids, rows.input_ids)
        assert [len(row) for row in shown] == [{"colour": 1, "compare": 2, "words": 0}[task]] * len(rows)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = lines[0]["images"][0]
    outside = f"../mixture/units/{Path(first[0]).name}"
    assert (path.parent / outside).is_file()
    for images, why in (([[outside, first[1]]], "in the folder of the rows"), ([[first[0], 999]], "unreadable"),
                        ([["gone.safetensors", 0]], "no such file"), (None, "hold 16 of images, and its 0 images are 0"),
                        ([first, first], "hold 16 of images, and its 2 images are 32"), (5, "wanted .file, number."),
                        ([[first[0], -1]], "wanted .file, number.")):
        path.write_text("\n".join(json.dumps(line) for line in [lines[0] | {"images": images}, *lines[1:]]))
        with pytest.raises(MixtureError, match=f"calibration.jsonl:1: .*{why}"):
            read_calibration([str(path)], list(kept), done.base, samples=9, seed=0)


# ---- adapters and branches from elsewhere ------------------------------------------------------------------------------


def write_adapter(base: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """An adapter as PEFT saves it, of random factors; what PEFT makes of base and adapter."""
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32),
                           LoraConfig(r=2, lora_alpha=4, **settings))
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=draw) * 0.05
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder.with_name("whole"))
    return tensors(folder.with_name("whole"))


def test_an_adapter_trained_elsewhere_becomes_the_branch_that_peft_makes_of_it(run, tmp_path):
    whole = write_adapter(run.base, tmp_path / "adapter", target_modules=LANGUAGE)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert all(name.startswith("base_model.model.model.language_model.layers.") for name in file.keys())  # noqa: SIM118 - as above
    accept_branch(run, 0, tmp_path / "adapter")
    ours, base = tensors(run.branch(0) / "model"), tensors(run.base)
    assert largest(ours, whole) == 0.0
    moved = [n for n in base if not ours[n].equal(base[n].float())]
    assert len(moved) == 6 and all(n.startswith("language_model.") for n in moved)
    assert (run.branch(0) / "model" / "processor_config.json").read_bytes() == (run.base / "processor_config.json").read_bytes()


@pytest.mark.parametrize(("settings", "said"), [
    ({"target_modules": ["q_proj"]}, r"'vision_tower\..*q_proj.weight' was changed"),  # by the end of a name: the tower's, too
    ({"target_modules": LANGUAGE, "modules_to_save": ["multi_modal_projector"]}, r"'multi_modal_projector\..*' was changed"),
    ({"target_modules": LANGUAGE, "bias": "all"}, r"'vision_tower\..*bias' was changed|'multi_modal_projector\.")])
def test_an_adapter_that_touches_what_is_frozen_is_refused_and_leaves_nothing(run, tmp_path, settings, said):
    write_adapter(run.base, tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=said):
        accept_branch(run, 0, tmp_path / "adapter")
    assert not [p for p in run.branch(0).rglob("*") if p.suffix in (".safetensors", ".partial") or p.name == "branch.json"]


def returned(done: Run, folder: Path, kind: str) -> Path:
    """Branch 0 as another program may have saved it."""
    model = done.branch(0) / "model"
    own = tensors(model)
    if kind == "sharded":  # and without any file of a processor
        AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).save_pretrained(folder, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
        return folder
    head = {"language_model.lm_head.weight": own["language_model.model.embed_tokens.weight"].clone()}
    changed = {"head": own | head, "narrow": {n: t.bfloat16() if n.startswith(EYES) else t for n, t in own.items()},
               "extra": own | {"vision_tower.more.weight": torch.ones(2)},
               "other head": own | {n: t + 1 for n, t in head.items()},
               "eyes": {n: t + 1e-3 if n.startswith(EYES) else t for n, t in own.items()}}[kind]
    folder.mkdir()
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    shutil.copyfile(model / "config.json", folder / "config.json")
    return folder


@pytest.mark.parametrize("kind", ["sharded", "head", "narrow"])
def test_a_branch_saved_in_another_way_merges_to_the_same_numbers(done, run, tmp_path, kind):
    accept_branch(run, 0, returned(done, tmp_path / "back", kind))
    for name, of in (("ours", done), ("theirs", run)):
        merge_present(of, tmp_path / name)
    assert largest(tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")) == 0.0
    side = {n: d for n, d in files_in(tmp_path / "theirs").items() if n.endswith(("processor_config.json", ".jinja"))}
    assert len(side) == 2 + 1 and all(d == (done.base / n).read_bytes() for n, d in side.items())


@pytest.mark.parametrize(("kind", "error", "said"), [
    ("extra", ShapeMismatch, "'vision_tower.more.weight': it has it"), ("other head", ShapeMismatch, "lm_head.weight"),
    ("eyes", ModelError, "freezes it")])
def test_a_branch_that_cannot_be_one_is_refused(done, run, tmp_path, kind, error, said):
    with pytest.raises(error, match=said):
        accept_branch(run, 0, returned(done, tmp_path / "back", kind))
    assert not (run.branch(0) / "branch.json").exists() and not list(run.branch(0).glob("model*"))


def test_frozen_eyes_rounded_by_another_trainer_come_out_of_the_merge_as_the_base_has_them(tmp_path):
    """A base in float32, trained elsewhere in bfloat16: its eyes are the base's rounded, which is no training."""
    base = write_vision_model(tmp_path / "base", "qwen2_5_vl", seed=2)
    own = tensors(base)
    eyes = [n for n in own if n.startswith("visual.")]
    for k in range(2):
        shutil.copytree(base, tmp_path / f"{k}")
        save_file({n: t.bfloat16().float() + (0.0 if n in eyes else 0.1 * (k + 1)) for n, t in own.items()},
                  tmp_path / f"{k}" / "model.safetensors", {"format": "pt"})
    merge_checkpoints("token_weighted", base, [tmp_path / "0", tmp_path / "1"], [0.25, 0.75], tmp_path / "out", made_from={},
                      frozen=frozenset(eyes))
    out = tensors(tmp_path / "out")
    assert all(out[n].equal(own[n]) for n in eyes) and any(not own[n].equal(own[n].bfloat16().float()) for n in eyes)
    assert all(torch.allclose(out[n], own[n].bfloat16().float() + 0.175, atol=1e-6) for n in own if n not in eyes)


# ---- of a run: a part, a kill, a store ---------------------------------------------------------------------------------


def test_a_partial_merge_is_the_branch_that_is_there_and_the_base_s_eyes(run, tmp_path):
    with pytest.raises(AnabranchError, match="branch 0 of 2 is not trained"):
        merge_present(run, tmp_path / "out")
    assert merge_present(run, tmp_path / "out", partial=True).missing == [0] and anabranch.verify(tmp_path / "out") == []
    out, base, there = (tensors(f) for f in (tmp_path / "out", run.base, run.branch(1) / "model"))
    assert out.keys() == base.keys() and all(out[n].equal(there[n].to(base[n].dtype)) for n in out)
    assert all(out[n].equal(base[n]) for n in out if n.startswith(EYES))


def train(run: Run) -> None:
    plan, _ = load_plan(run.folder / "plan.json", run.mixture)
    train_group(run.recipe, plan, 0, run.mixture, run.folder / "mixture", run.base, run.base_hash, run.branch(0))


def test_killed_in_the_middle_and_started_again_it_is_the_same_branch(done, run):
    child = os.fork()
    if child == 0:  # a process of its own, which has imported everything; it never comes back from here
        try:
            from trl import SFTTrainer

            step, seen = SFTTrainer.training_step, []

            def counted(*args: Any, **named: Any) -> Any:
                seen.append(1)
                if len(seen) == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(*args, **named)

            SFTTrainer.training_step = counted
            train(run)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert (run.branch(0) / "checkpoints" / "checkpoint-2").is_dir() and not (run.branch(0) / "branch.json").exists()
    train(run)
    here, there = files_in(run.branch(0)), files_in(done.branch(0))
    same = [n for n in there if n.startswith(("model/", "adapter/")) or n == "branch.json"]
    assert len(same) > 8 and all(here[n] == there[n] for n in same) and not [n for n in here if "checkpoint" in n]


def test_sets_in_an_adapter_s_settings_are_written_in_order(done):
    """PEFT writes them as the process's hashes have it: the same branch would have other bytes next time."""
    targets = json.loads((done.branch(0) / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 5 and targets == sorted(targets)


def test_a_worker_with_an_empty_cache_trains_the_same_branch(done, run, tmp_path):
    """Images, processor and chat template reach it through the store alone: the base is away while it works."""
    launch = run.recipe.launch.model_copy(update={"launcher": "export", "store": str(tmp_path / "store")})
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    model = run.recipe.model.model_copy(update={"path": str(base)})
    away = open_run(run.recipe.model_copy(update={"launch": launch, "model": model}), tell=lambda _: None)
    assert away.base_hash == done.base_hash
    run_anywhere(away)
    base.rename(tmp_path / "away")
    assert work((tmp_path / "store").as_uri(), only="branch-0", cache=tmp_path / "cache", tell=lambda _: None) == 0
    (tmp_path / "away").rename(base)
    run_anywhere(away)
    here, there = (files_in(r.branch(0) / "model") for r in (away, done))
    assert here == there and {"processor_config.json", "preprocessor_config.json", "chat_template.jinja"} <= here.keys()


# ---- checkpoints from anywhere -----------------------------------------------------------------------------------------


def test_models_with_a_tower_in_another_dtype_and_other_files_merge_to_the_mean(done, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(done.branch(0) / "model", dtype=torch.bfloat16)
    model.model.vision_tower.float()
    model.save_pretrained(tmp_path / "x", max_shard_size="40KB")
    one, other = tensors(tmp_path / "x"), tensors(done.branch(1) / "model")
    assert {t.dtype for n, t in one.items()} == {torch.float32, torch.bfloat16}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "dtype": "float32", "models": [
        {"model": str(tmp_path / "x"), "parameters": {"weight": 0.25}},
        {"model": str(done.branch(1) / "model"), "parameters": {"weight": 0.75}}]}))
    for path in done.base.glob("*.json*"):
        if "index" not in path.name and path.name != "config.json":
            shutil.copyfile(path, tmp_path / "x" / path.name)
    anabranch.merge(tmp_path / "merge.yaml", tmp_path / "out")
    mean = {n: 0.25 * one[n].double() + 0.75 * other[n].double() for n in one}
    assert largest(tensors(tmp_path / "out"), mean) < 1e-6
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == (done.base / "processor_config.json").read_bytes()


def test_an_adapter_taken_out_of_a_branch_gives_it_back(done, tmp_path):
    extract(done.branch(0) / "model", done.base, tmp_path / "adapter", rank=64, dtype="float32")
    apply(done.base, tmp_path / "adapter", tmp_path / "whole", dtype="float32")
    assert largest(tensors(tmp_path / "whole"), tensors(done.branch(0) / "model")) < 1e-6
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not [n for n in file.keys() if "vision_tower" in n or "projector" in n]  # noqa: SIM118 - as above
