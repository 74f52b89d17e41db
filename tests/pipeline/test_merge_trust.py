"""What a hostile reading of the merge engine found, each as it was found: other people's files, inputs that change between
two runs, and errors that were no errors of ours to show."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import anabranch
from anabranch.artifacts import MergeManifest
from anabranch.engine.merging import merge_config, options_for, verify
from anabranch.engine.output import MANIFEST
from anabranch.engine.stream import Settings, branch_keys
from anabranch.engine.wanted import Input
from anabranch.errors import ModelError, OutputError, RecipeError, ShapeMismatch

NAMES = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(3) for part in ("up", "down")]


def model(folder: Path, seed: int, names: list[str] = NAMES) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    save_file({name: torch.randn(8, 8, generator=generator) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        model(tmp_path / name, seed)
    (tmp_path / "linear.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": [
        {"model": m, "parameters": {"weight": 0.5}} for m in ("a", "b")]}))
    return tmp_path


def interrupted(config: Path | dict, out: Path, at: int = 3, **more) -> None:
    def stop(now) -> None:
        if now.tensors == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_config(config, out, progress=stop, **more)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)


def lora(folder: Path, alpha: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["up_proj"], "bias": "none"}))
    if (folder / "adapter_model.safetensors").exists():
        return  # only what is said of it changes; the file keeps its date
    generator = torch.Generator().manual_seed(7)
    save_file({f"base_model.model.model.layers.{i}.mlp.up_proj.lora_{side}.weight":
               torch.randn((2, 8) if side == "A" else (8, 2), generator=generator) for i in range(3) for side in "AB"},
              folder / "adapter_model.safetensors")


# --- files that are not ours ---


@pytest.mark.parametrize("name", ["out.converted", "out.partial"])
def test_nothing_of_others_is_removed(here, name):
    (here / name / "sub").mkdir(parents=True)
    (here / name / "sub" / "thesis.txt").write_text("years")
    (here / name / MANIFEST).write_text('{"name": "a web extension"}')
    try:
        merge_config(here / "linear.yaml", here / "out", options=options_for(allow_pickle=True))
    except OutputError as error:
        assert "no merge put there" in str(error)
    assert (here / name / "sub" / "thesis.txt").read_text() == "years"


def test_the_working_folder_and_links_to_nothing_are_no_place_for_a_result(here):
    (here / "empty").mkdir()
    (here / "link").symlink_to(here / "nowhere")
    os.chdir(here / "empty")
    for out in (".", here / "link"):
        with pytest.raises(OutputError, match=r"folder|link"):
            merge_config(here / "linear.yaml", out)
    os.chdir(here)
    (here / "place").symlink_to(here / "empty")
    merge_config(here / "linear.yaml", here / "place")
    assert verify(here / "empty") == []


# --- inputs that change between two calls ---


def test_an_adapter_that_changed_is_not_mixed_with_the_old_one(here):
    lora(here / "lora", 8)
    config = {"merge_method": "linear", "models": [{"model": "a+lora", "parameters": {"weight": 0.5}},
                                                   {"model": "b", "parameters": {"weight": 0.5}}]}
    interrupted(config, here / "out", 5)
    lora(here / "lora", 80)
    merge_config(config, here / "out")
    merge_config(config, here / "fresh")
    assert same(here / "out", here / "fresh")
    lora(here / "lora", 8)
    with pytest.raises(OutputError, match="other weights"):
        merge_config(config, here / "out")
    assert any("a+lora" in problem for problem in verify(here / "out"))


def test_settings_that_decide_what_is_accepted_begin_anew(here):
    bad = tensors(here / "a") | {NAMES[0]: torch.full((8, 8), float("nan"))}
    save_file(bad, here / "a" / "model.safetensors")
    interrupted(here / "linear.yaml", here / "out", 6, settings=Settings(allow_nonfinite=True, threads=1))
    with pytest.raises(Exception, match="NaN"):
        merge_config(here / "linear.yaml", here / "out")
    assert not (here / "out").exists()


def test_fisher_information_belongs_to_the_inputs(here):
    config = {"merge_method": "fisher", "models": []}
    for name in ("a", "b"):
        save_file({n: torch.rand(8, 8) for n in NAMES}, here / f"{name}.fisher.safetensors")
        config["models"].append({"model": name, "fisher": f"{name}.fisher.safetensors", "parameters": {"weight": 0.5}})
    merge_config(config, here / "out")
    assert verify(here / "out") == []
    save_file({n: torch.rand(8, 8) for n in NAMES}, here / "a.fisher.safetensors")
    with pytest.raises(OutputError, match="input a"):
        merge_config(config, here / "out")
    save_file({n: -torch.ones(8, 8) for n in NAMES}, here / "a.fisher.safetensors")
    with pytest.raises(RecipeError, match=r"layers\.\d\.mlp.*fisher"):
        merge_config(config, here / "other")


# --- results that nothing would load ---


def test_layers_of_models_of_different_sizes_are_not_stacked(here):
    wide = here / "wide"
    wide.mkdir()
    save_file({n: torch.ones(12, 12) for n in NAMES}, wide / "model.safetensors")
    shutil.copy(here / "a" / "config.json", wide)
    config = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]},
                                                        {"sources": [{"model": "wide", "layer_range": [2, 3]}]}]}
    with pytest.raises(ShapeMismatch, match=r"\(12, 12\).*different sizes"):
        merge_config(config, here / "out")
    config["slices"][1]["sources"][0]["model"] = "b"
    merge_config(config, here / "out")


def test_a_result_is_not_written_over_a_model_or_cut_anew(here):
    with pytest.raises(OutputError, match="one of the models"):
        merge_config(here / "linear.yaml", here / "a")
    told = []
    for _ in range(2):
        merge_config(here / "linear.yaml", here / "out", warn=told.append)
    assert [text for text in told if "nothing was done" in text] == told[-1:]
    with pytest.raises(OutputError, match="another size"):
        merge_config(here / "linear.yaml", here / "out", options=options_for(max_shard_size=600))
    (here / "out" / "README.md").write_text("my own words")
    assert verify(here / "out") == []


def test_words_that_were_meant(here):
    """And words that are no file's name (a failing seed of the fuzz run)."""
    with pytest.raises((RecipeError, ModelError)):
        merge_config({"merge_method": "passthrough", "models": [{"model": "a"}], "tokenizer_source": "a" * 5000}, here / "out")
    with pytest.raises(RecipeError, match="Did you mean `union`"):
        merge_config({"merge_method": "passthrough", "models": [{"model": "a"}], "tokenizer_source": "unoin"}, here / "out")
    with pytest.raises(RecipeError, match="Did you mean `bfloat16`"):
        merge_config({"merge_method": "passthrough", "models": [{"model": "a"}], "dtype": "BFloat16"}, here / "out")


# --- verify ---


def test_verify_finds_models_beside_the_config_and_never_asks_the_hub(here, monkeypatch):
    project = here / "project"
    project.mkdir()
    shutil.copytree(here / "a", project / "ma")
    (project / "c.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": "ma"}]}))
    merge_config(project / "c.yaml", here / "out")
    assert verify(here / "out") == []
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert verify(here / "out") == []
    shutil.rmtree(project / "ma")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a folder's name was looked for on the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    with pytest.raises(ModelError, match="ma"):
        verify(here / "out")


def test_verify_sees_files_that_were_added(here):
    merge_config(here / "linear.yaml", here / "out")
    for name in ("chat_template.jinja", "modeling_evil.py", "pytorch_model.bin"):
        (here / "out" / name).write_text("{{ evil }}")
    problems = verify(here / "out")
    assert len(problems) == 3 and all("not made by the merge" in problem for problem in problems)


# --- draws, handles, Python ---


def test_draws_do_not_depend_on_how_a_path_is_spelled(tmp_path):
    def keys(*folders: Path) -> list[str]:
        return branch_keys([Input(str(folder), folder) for folder in folders])

    assert keys(tmp_path / "r1/final", tmp_path / "r2/final") == ["r1/final", "r2/final"]
    assert keys(tmp_path / "x/../r1/final", tmp_path / "r2/final") == ["r1/final", "r2/final"]
    assert keys(tmp_path / "r1/final", tmp_path / "r2/other") == ["final", "other"]


def test_many_weight_files_under_a_low_limit(here):
    import resource

    for name in ("a", "b"):
        weights = tensors(here / name)
        (here / name / "model.safetensors").unlink()
        index = {n: f"model-{i:05d}-of-00006.safetensors" for i, n in enumerate(weights, 1)}
        for n, file in index.items():
            save_file({n: weights[n]}, here / name / file)
        (here / name / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 12, before[1]))
    try:
        merge_config(here / "linear.yaml", here / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert verify(here / "out") == []


def test_from_python(here):
    with pytest.warns(UserWarning, match="weight"):
        manifest = anabranch.merge({"merge_method": "passthrough", "models": [{"model": "a", "parameters": {"weight": 1}}]},
                                   "out", threads=1, memory="8GB")  # the worker of the tests counts too
    assert MergeManifest.load(here / "out" / MANIFEST) == manifest and same(here / "out", here / "a")
    with pytest.raises(RecipeError, match="str"):
        anabranch.merge({"merge_method": "passthrough", "models": [{"model": here / "a"}]}, "other")
    assert torch.equal(anabranch.merge.linear(torch.ones(2, 3), torch.tensor([0.5, 0.5])), torch.ones(3))
