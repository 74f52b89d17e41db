"""Parts that do not train: presets of every family, patterns, names in files, adapters, and merges that carry them over."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from anabranch.artifacts import MergeManifest, Unit
from anabranch.branch_folder import check_weights, dress
from anabranch.branches import train_hash
from anabranch.engine.checkpoint import Checkpoint, checkpoint_hash
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import BranchFailed, ModelError, ProvenanceError, RecipeError
from anabranch.families import (
    FAMILIES,
    LANGUAGE,
    PRESETS,
    adapter_arguments,
    describe_frozen,
    frozen_names,
    frozen_parts,
    frozen_tensors,
    saved_names,
    saved_tensors,
    skeleton,
)
from anabranch.forecast import forecast
from anabranch.gradients import unit_key
from anabranch.model import load_model, select_trainable
from anabranch.recipe import Model, Recipe, load_recipe
from anabranch.run import open_run, run_stages
from conftest import write_recipe
from vision_models import write_vision_model

NEEDS = {"aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 64,
                                          "num_attention_heads": 4, "num_hidden_layers": 2}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaVA with an output head of its own in three shards, and a tied Qwen2.5-VL in bfloat16."""
    home = tmp_path_factory.mktemp("freeze")
    return {"llava": write_vision_model(home / "llava", "llava", shards=3),
            "qwen": write_vision_model(home / "qwen", "qwen2_5_vl", tied=True, dtype="bfloat16")}


def section(folder: Path, *freeze: str, **more: Any) -> Model:
    return Model(path=str(folder), freeze=list(freeze), **more)


def matched(model: Any, patterns: tuple[str, ...]) -> set[str]:
    return {n for n, _ in model.named_parameters() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}


# ---- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_presets_of_a_family_are_its_model(family):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**NEEDS.get(family, {})))
    parts = [matched(model, FAMILIES[family][preset]) for preset in PRESETS]
    assert all(parts), "a preset matches nothing"
    names = {n for n, _ in model.named_parameters()}
    assert set().union(*parts) == names and sum(map(len, parts)) == len(names)
    inside = sum(p.numel() for n, p in model.named_parameters() if n in parts[PRESETS.index(LANGUAGE)])
    assert inside == max(sum(p.numel() for n, p in model.named_parameters() if n in part) for part in parts)
    assert model.get_input_embeddings().weight is next(
        p for n, p in model.named_parameters() if n in parts[2] and p is model.get_input_embeddings().weight)


def test_what_is_frozen_is_told_before_it_is_used(folders):
    model = skeleton(folders["qwen"], False)
    asked = section(folders["qwen"], "vision tower", "model.visual.merger.mlp.?.weight")
    lines = describe_frozen(model, asked)
    assert lines[0].startswith("freeze: vision tower (qwen2_5_vl: model.visual.patch_embed.*, model.visual.blocks.*): "
                               "25 tensors, ")
    assert lines[1] == "freeze: model.visual.merger.mlp.?.weight: 2 tensors, 20,480 parameters"
    names = dict(model.named_parameters())
    left = sum(p.numel() for n, p in names.items() if n not in frozen_names(model, asked))
    assert f"{left:,} of {sum(p.numel() for p in names.values()):,} parameters are not frozen" in lines[-1]
    assert describe_frozen(model, section(folders["qwen"])) == []
    assert frozen_parts(model, asked)[1].names == ("model.visual.merger.mlp.0.weight", "model.visual.merger.mlp.2.weight")


def test_a_tied_head_is_its_embedding(folders):
    model = load_model(folders["qwen"])
    asked = section(folders["qwen"], "lm_head.weight")
    assert frozen_names(model, asked) == {"model.language_model.embed_tokens.weight"}
    assert any("lm_head.weight (tied to model.language_model.embed_tokens.weight)" in line
               for line in describe_frozen(model, asked))


def test_freeze_is_taken_from_what_trains(folders):
    model = load_model(folders["llava"])
    chosen = select_trainable(model, section(folders["llava"], "vision tower", "projector", trainable=["*.weight"]))
    assert set(chosen) == {n for n, _ in model.named_parameters()
                           if n.endswith(".weight") and n.startswith(("model.language_model.", "lm_head."))}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(chosen)


@pytest.mark.parametrize(("which", "freeze", "words"), [
    ("llava", ["vision_tower.*"], ["names in the model's files", "vision_tower.embeddings.class_embedding is "
                                   "model.vision_tower.embeddings.class_embedding there", "Write `model.vision_tower.*`"]),
    ("qwen", ["visual.blocks.*"], ["names in the model's files", "Write `model.visual.blocks.*`"]),
    ("qwen", ["Vision-Tower"], ["Did you mean `vision tower`?"]),
    ("qwen", ["model.visual.merger"], ["It is a module of 5 parameters: write `model.visual.merger.*`."]),
    ("qwen", ["model.visul.merger.*"], ["Did you mean `model.visual.merger.*`"]),
    ("llava", ["zzz", "vision tower", "qqq*"], ["`zzz` matches no parameter", "`qqq*` matches no parameter",
                                                "model.multi_modal_projector.linear_1.*"]),
    ("llava", ["vision tower", "projector", "language model"], ["nothing would train"]),
    ("llava", ["*"], ["nothing would train"]),
])
def test_entries_that_cannot_be(which, freeze, words, folders):
    with pytest.raises(ModelError) as told:
        frozen_parts(skeleton(folders[which], False), section(folders[which], *freeze))
    assert str(told.value).startswith("model.freeze:")
    assert all(word in str(told.value) for word in words), told.value


def test_a_family_without_presets_takes_patterns(tiny_base):
    model = skeleton(tiny_base, False)
    with pytest.raises(ModelError, match=r"`projector` is a part of .*, and this is a language model \(`qwen2`\)") as told:
        frozen_parts(model, section(tiny_base, "projector"))
    embedding = model.get_input_embeddings().weight.numel()
    assert f"model.embed_tokens.* {embedding:,} parameters" in str(told.value) and "model.layers.*" in str(told.value)
    part, = frozen_parts(model, section(tiny_base, "model.embed_tokens.*"))
    assert part.entries == embedding


def test_nothing_left_of_a_pattern_and_a_part(folders):
    with pytest.raises(ModelError, match="vision tower leave no parameter to train"):
        select_trainable(load_model(folders["llava"]), section(folders["llava"], "vision tower",
                                                               trainable=["model.vision_tower.*"]))


# ---- names in files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["llava", "qwen"])
def test_saved_names_are_those_in_the_files(which, folders):
    model = load_model(folders[which])
    there = set(Checkpoint.open(folders[which]).tensors)
    names = saved_names(model)
    assert set(names) == {n for n, _ in model.named_parameters()}
    assert {n for files in names.values() for n in files} - there == ({"lm_head.weight"} if which == "qwen" else set())
    for live, files in names.items():
        assert any(f in there for f in files) and all(f.split(".")[-2:] == live.split(".")[-2:] for f in files if f in there)
        held = Checkpoint.open(folders[which]).read(next(f for f in files if f in there))
        assert held.float().equal(dict(model.named_parameters())[live])
    assert saved_names(skeleton(folders[which], False)) == names
    everything, repeated = saved_tensors(model)
    assert everything - repeated == there and repeated == ({"lm_head.weight"} if which == "qwen" else set())


def renamed(source: Path, to: Path, name: Any) -> Path:
    """A copy with other names of tensors, in one file."""
    to.mkdir()
    tensors = {}
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif "index" not in path.name:
            (to / path.name).write_bytes(path.read_bytes())
    save_file({name(n): t for n, t in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def test_frozen_tensors_go_by_the_files_own_names(folders, tmp_path):
    llava, qwen = folders["llava"], folders["qwen"]
    assert frozen_tensors(llava, section(llava, "vision tower", "projector")) == {
        n for n in Checkpoint.open(llava).tensors if n.startswith(("vision_tower.", "multi_modal_projector."))}
    assert frozen_tensors(qwen, section(qwen, "projector")) == {
        n for n in Checkpoint.open(qwen).tensors if n.startswith("visual.merger.")}
    # as transformers 4.52 .. wrote them: like the names in memory
    live = renamed(qwen, tmp_path / "live", lambda n: "model." + n if n.startswith("visual") else
                   n.replace("model.", "model.language_model.", 1))
    assert {n.rsplit(".", 3)[0] for n in frozen_tensors(live, section(live, "projector"))} >= {"model.visual"}
    # and as transformers 4 wrote LLaVA's tower: with a prefix that 5 takes away on loading, and puts back on saving
    old = renamed(llava, tmp_path / "old", lambda n: n.replace("vision_tower.", "vision_tower.vision_model."))
    found = frozen_tensors(old, section(old, "vision tower"))
    assert found == {n for n in Checkpoint.open(old).tensors if n.startswith("vision_tower.vision_model.")} and found


def test_trainable_leaves_the_rest_frozen_and_adapters_freeze_nothing(folders):
    llava = folders["llava"]
    there = set(Checkpoint.open(llava).tensors)
    assert frozen_tensors(llava, section(llava)) == frozen_tensors(llava, section(llava, lora={"r": 2})) == set()
    assert frozen_tensors(llava, section(llava, trainable=["model.language_model.*"])) == {
        n for n in there if not n.startswith("language_model.model.")}
    both = frozen_tensors(llava, section(llava, "projector", trainable=["model.*"]))
    assert both == {n for n in there if n.startswith("multi_modal_projector") or "lm_head" in n}


def test_hashes_hold_freeze_only_where_it_is_said():
    def recipe(**model: Any) -> Recipe:
        return Recipe.model_validate({"model": {"path": "x"} | model, "mixture": {"sources": [{"path": "y"}]}})

    unit = Unit.model_validate({n: 1 for n, f in Unit.model_fields.items() if f.is_required() and f.annotation in (int, float)}
                               | {n: "u" for n, f in Unit.model_fields.items() if f.is_required() and f.annotation is str})
    for key in (train_hash, lambda r: unit_key(unit, "base", r)):
        assert key(recipe()) == key(recipe(freeze=[]))
        assert len({key(recipe(**m)) for m in ({}, {"freeze": ["projector"]}, {"freeze": ["vision tower"]},
                                               {"trainable": ["model.visual.*"]})}) == 4


def test_a_base_is_known_by_its_processor_too_where_it_sees(folders, tiny_base, tmp_path):
    """Other means of pixels are another model: sketches, branches and scores of the old one are not its own."""
    for source, told in ((folders["qwen"], True), (tiny_base, False)):
        folder = shutil.copytree(source, tmp_path / source.name)
        before, path = checkpoint_hash(folder), folder / "preprocessor_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
        assert (checkpoint_hash(folder) != before) == told


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_sit_on_nothing_that_is_frozen(folders):
    from peft import LoraConfig, get_peft_model

    for freeze, inside in ((("vision tower", "projector"), "language_model"), (("language model",), "v")):
        model = load_model(folders["qwen"])
        asked = section(folders["qwen"], *freeze, lora={"r": 2, "exclude_modules": ["o_proj"]})
        arguments = adapter_arguments(model, asked)
        wanted = {n.removesuffix(".weight") for n in select_trainable(model, asked)}
        adapted = {n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in get_peft_model(
            model, LoraConfig(target_modules="all-linear", **arguments)).named_parameters() if ".lora_A" in n}
        assert adapted == {n for n in wanted if not n.endswith("o_proj")} and any(inside in n for n in adapted)
    assert adapter_arguments(model, section(folders["qwen"], lora={"r": 2})) == {"r": 2}


@pytest.mark.parametrize(("lora", "word"), [
    ({"bias": "all"}, "`bias: all`"), ({"modules_to_save": ["merger"]}, "`modules_to_save: merger`"),
    ({"modules_to_save": ["visual.merger"]}, "`modules_to_save: visual.merger`"), ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ({"target_parameters": ["model.visual.merger.mlp.0.weight"]}, "`target_parameters`"),
    ({"trainable_token_indices": [0, 1]}, "`trainable_token_indices` would train model.language_model.embed_tokens.weight"),
    ({"trainable_token_indices": {"embed_tokens": [0]}}, "`trainable_token_indices`")])
def test_adapters_that_would_train_what_is_frozen(lora, word, folders):
    asked = section(folders["qwen"], "projector", "*.embed_tokens.*", lora={"r": 2} | lora)
    with pytest.raises(RecipeError, match=re.escape(word)):
        adapter_arguments(skeleton(folders["qwen"], False), asked)


def test_rows_of_tokens_train_beside_a_frozen_layer_of_that_number(folders):
    asked = section(folders["qwen"], "vision tower", "model.language_model.layers.0.*",
                    lora={"r": 2, "trainable_token_indices": [0, 1]})
    assert adapter_arguments(skeleton(folders["qwen"], False), asked)["trainable_token_indices"] == [0, 1]


@pytest.mark.parametrize(("which", "freeze"), [("qwen", "lm_head.weight"), ("llava", "lm_head.weight"),
                                               ("llava", "*.embed_tokens.*")])
def test_adapters_that_are_named_sit_on_no_frozen_embedding_or_head(which, freeze, folders):
    """Not only linear layers of the blocks: `target_modules` may name any."""
    from peft import LoraConfig, get_peft_model

    model = load_model(folders[which])
    asked = section(folders[which], freeze, lora={"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]})
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in get_peft_model(
        model, LoraConfig(**adapter_arguments(model, asked))).named_parameters() if ".lora_" in n}
    kept = {"q_proj"} if which == "qwen" else {"q_proj", "embed_tokens", "lm_head"} - {freeze.split(".")[-2]}
    assert adapted == kept


HALF = [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["language_model"]},
        {"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ".*embed_tokens"},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "target_parameters": ["embed_tokens.weight"]}]
WHOLE = [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"target_modules": "all-linear"},
         {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, {"trainable_token_indices": [0, 1]},
         {"trainable_token_indices": {"embed_tokens": [0, 1]}},
         {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
         {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]}]


def trained_and_saved(base: Path, lora: dict[str, Any], out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model whose adapters hold noise, and of what `_save_weights` would leave of it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(load_model(base), LoraConfig(**{"target_modules": "all-linear", "r": 2} | copy.deepcopy(lora)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        whole = model.merge_and_unload()
        whole.save_pretrained(out)
        dress(out, base, code=False)
        check_weights(out, base, whole, section(base))
        return trained, load_model(out)(input_ids=ids).logits


@pytest.mark.parametrize("lora", HALF)
def test_adapters_of_one_half_of_a_tied_pair(lora, folders, tmp_path):
    """Refused before anything trains: a branch's one tensor cannot be both, and peft's fold would be silently another model."""
    with pytest.raises(RecipeError, match=r"is tied: lm_head and model\.language_model\.embed_tokens are one tensor"):
        adapter_arguments(skeleton(folders["qwen"], False), section(folders["qwen"], lora=lora))
    assert adapter_arguments(skeleton(folders["llava"], False), section(folders["llava"], lora=lora)) == lora  # has a head
    try:
        trained, saved = trained_and_saved(folders["qwen"], lora, tmp_path / "branch")
    except BranchFailed as error:
        assert "input embedding" in str(error)
    else:
        assert (trained - saved).abs().max() > 0.1


@pytest.mark.parametrize("lora", WHOLE)
def test_adapters_that_leave_a_tied_pair_whole(lora, folders, tmp_path):
    before = copy.deepcopy(lora)
    arguments = adapter_arguments(skeleton(folders["qwen"], False), section(folders["qwen"], lora=lora))
    assert arguments == before
    trained, saved = trained_and_saved(folders["qwen"], arguments, tmp_path / "branch")
    torch.testing.assert_close(saved, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [{"target_parameters": ["lm_head.weight"]}, {"trainable_token_indices": {"lm_head": [0]}}])
def test_a_tied_head_by_its_own_name(lora, folders):
    """Neither gets as far as training: peft and trl raise on them."""
    with pytest.raises(RecipeError, match=r"would .* lm_head\. It is tied"):
        adapter_arguments(skeleton(folders["qwen"], False), section(folders["qwen"], lora=lora))


def test_a_run_and_its_dry_run_refuse_it_before_anything_else(tmp_path, tiny_base):
    path = write_recipe(tmp_path, tiny_base)
    recipe = load_recipe(path)
    lora = {"target_modules": ["q_proj", "lm_head"]}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": lora})})
    with pytest.raises(RecipeError, match=r"(?s)dry run: the recipe has problems.*target_modules.*It is tied: lm_head"):
        forecast(recipe)
    run = open_run(recipe, tell=lambda _: None)
    with pytest.raises((RecipeError, ModelError), match="It is tied: lm_head"):
        run_stages(run)
    assert not (tmp_path / "run" / "mixture").exists()


def test_the_recipe_does_not_change_under_peft(folders):
    from peft import LoraConfig, get_peft_model

    asked = section(folders["qwen"], lora={"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "r": 2})
    model, before = load_model(folders["qwen"]), asked.model_dump()
    get_peft_model(model, LoraConfig(**{"target_modules": "all-linear"} | adapter_arguments(model, asked)))
    assert asked.model_dump() == before


def test_adapters_that_no_layer_is_meant_by_say_so(folders):
    with pytest.raises(ModelError, match=r"target_modules: no linear layer .* q_proj"):
        select_trainable(skeleton(folders["llava"], False), section(folders["llava"], lora={"target_modules": ["nothing"]}))


# ---- merges ----------------------------------------------------------------------------------------------------------


def branch(base: Path, to: Path, frozen: set[str], seed: int, change: Any = None) -> Path:
    """The base in float32 with noise on what is not frozen."""
    to.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        tensors |= load_file(path)
    draw = torch.Generator().manual_seed(seed)
    moved = {n: t.float() + (0 if n in frozen else 1e-2 * torch.randn(t.shape, generator=draw)) for n, t in tensors.items()}
    if change is not None:
        change(moved)
    save_file(moved, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_bytes((base / "config.json").read_bytes())
    return to


def raw(folder: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                found[name] = (str(tensor.dtype), tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def merged(base: Path, branches: list[Path], frozen: set[str], out: Path, method: str = "token_weighted",
           **more: Any) -> MergeManifest:
    weights = [0.3, 0.3, 0.4] if len(branches) == 3 else [0.5, 0.5]
    return merge_checkpoints(method, base, branches, weights, out, made_from={}, frozen=frozen,
                             labels=[*(f"branch-{i}" for i in range(len(branches))), "base"], **more)


@pytest.fixture(scope="module", params=["llava", "qwen"])
def trained(request: pytest.FixtureRequest, folders: dict[str, Path],
            tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], set[str]]:
    base = folders[request.param]
    frozen = set(frozen_tensors(base, section(base, "vision tower", "projector")))
    home = tmp_path_factory.mktemp("branches")
    return base, [branch(base, home / str(i), frozen, i) for i in range(3)], frozen


@pytest.mark.parametrize("method", ["token_weighted", "ties", "dare_linear", "multislerp", "model_stock"])
def test_what_is_frozen_is_carried_over_byte_for_byte(method, trained, tmp_path):
    base, branches, frozen = trained
    manifest = merged(base, branches, frozen, tmp_path / "out", method)
    there, was = raw(tmp_path / "out"), raw(base)
    assert there.keys() == was.keys()
    assert all(there[n] == was[n] for n in frozen) and len(frozen) >= 30
    assert any(there[n] != was[n] for n in there.keys() - frozen)
    assert manifest.report == {"frozen": len(frozen)}
    for name in base.iterdir():
        if ("config" in name.name and name.name != "config.json") or name.suffix == ".jinja":
            assert (tmp_path / "out" / name.name).read_bytes() == name.read_bytes()
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert merged(base, branches, frozen, tmp_path / "out", method) == manifest


def test_displacements_are_of_the_whole_model(trained, tmp_path):
    """What is frozen did not move, so distances are those of the rest, and the trained tensors are merged as ever."""
    base, branches, frozen = trained
    with_, without = merged(base, branches, frozen, tmp_path / "a"), merged(base, branches, set(), tmp_path / "b")
    assert with_.displacement == pytest.approx(without.displacement, rel=1e-6)
    assert with_.branch_displacements == pytest.approx(without.branch_displacements, rel=1e-6)
    assert {n: h for n, h in with_.tensors.items() if n not in frozen} == {
        n: h for n, h in without.tensors.items() if n not in frozen}
    assert [i.hash for i in with_.inputs] == [i.hash for i in without.inputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_rounded_to_once(dtype, trained, tmp_path):
    base, branches, frozen = trained
    merged(base, branches, frozen, tmp_path / "out", dtype=dtype)
    origin, out = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    wanted = getattr(torch, dtype)
    assert all(out.read(n).dtype == wanted and out.read(n).equal(origin.read(n).float().to(wanted)) for n in frozen)


def test_a_branch_that_moved_what_is_frozen_is_refused_with_all_names(trained, tmp_path):
    base, branches, frozen = trained
    some = sorted(frozen)[:6]

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        for name in some:
            tensors[name].view(-1)[-1] += 1e-4

    other = branch(base, tmp_path / "moved", frozen, 7, nudge)
    with pytest.raises(ProvenanceError) as told:
        merged(base, [branches[0], other, other], frozen, tmp_path / "out")
    text = str(told.value)
    assert text.count("6 of") == 2 and "branch-1" in text and "branch-2" in text and "branch-0" not in text
    assert all(name in text for name in some[:4]) and "and 2 more" in text
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    merged(base, [branches[0], other], set(), tmp_path / "free")  # where nothing is frozen it is a branch like any other


def test_a_branch_saved_in_a_narrower_dtype_has_the_base_s_numbers(folders, tmp_path):
    """add-branch takes such branches (and says so), so a merge does too; the base's own numbers are what is kept."""
    base = folders["llava"]
    frozen = set(frozen_tensors(base, section(base, "vision tower")))

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {n: t.bfloat16() for n, t in tensors.items()}

    folder = branch(base, tmp_path / "narrow", frozen, 1, narrow)
    merge_checkpoints("token_weighted", base, [folder], [1.0], tmp_path / "out", made_from={}, frozen=frozen)
    assert all(raw(tmp_path / "out")[n] == raw(base)[n] for n in frozen)


def test_a_base_that_a_narrow_dtype_cannot_hold(folders, tmp_path):
    base = renamed(folders["llava"], tmp_path / "base", lambda n: n)
    tensors = load_file(base / "model.safetensors")
    name = "vision_tower.post_layernorm.weight"
    tensors[name][0] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    one = branch(base, tmp_path / "one", {name}, 0)
    with pytest.raises(RecipeError, match="float16"):
        merge_checkpoints("token_weighted", base, [one], [1.0], tmp_path / "out", made_from={}, frozen={name}, dtype="float16")


def test_a_config_merge_carries_processor_and_image_files(folders, tmp_path):
    from anabranch.engine.merging import merge

    base = folders["llava"]
    other = branch(base, tmp_path / "other", set(), 3)
    merge({"merge_method": "task_arithmetic", "base_model": str(base), "dtype": "float32",
           "models": [{"model": str(other), "parameters": {"weight": 0.5}}]}, tmp_path / "out", warn=None)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
