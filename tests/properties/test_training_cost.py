"""Operations, memory and hours of training against sums written out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from anabranch.errors import ModelError
from anabranch.families import skeleton
from anabranch.model import select_trainable
from anabranch.recipe import Model
from anabranch.training_cost import (
    DEVICES,
    SHARE,
    ModelSize,
    PartSize,
    device_lines,
    hours,
    memory,
    operations,
    patches_of,
    size_of,
)
from vision_models import Size, picture, read_processor, write_vision_model

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 100}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}


def on_meta(kind, name, **config):
    with torch.device("meta"):
        return kind.from_config(AutoConfig.for_model(name, **config))


@pytest.fixture(scope="module")
def models():
    return {
        "llava": on_meta(AutoModelForImageTextToText, "llava", text_config={"model_type": "llama", **TEXT},
                         vision_config={"model_type": "clip_vision_model", **VISION}),
        "qwen2_5_vl": on_meta(AutoModelForImageTextToText, "qwen2_5_vl", tie_word_embeddings=True, vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
            "spatial_merge_size": 2}, text_config={
                **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}),
        "idefics3": on_meta(AutoModelForImageTextToText, "idefics3", scale_factor=2, vision_config=VISION,
                            text_config={"model_type": "llama", **TEXT}),
        "qwen2": on_meta(AutoModelForCausalLM, "qwen2", **TEXT)}


POOLED = {  # patches that become a token, from each family's paper or processor: 448 px in 32 x 32 patches are 256 tokens, ..
    "llava": 1, "qwen2_vl": 4, "qwen2_5_vl": 4, "qwen3_vl": 4, "internvl": 4, "mistral3": 4, "aya_vision": 4, "gemma3": 16,
    "idefics3": 4, "smolvlm": 4, "llama4": 4, "paligemma": 1}


@pytest.mark.parametrize("family", POOLED)
def test_patches_of_a_token(family):
    published = {"vision_config": {"image_size": 896, "patch_size": 14}} if family == "gemma3" else {}
    assert patches_of(AutoConfig.for_model(family, **published)) == POOLED[family]


@pytest.mark.parametrize("freeze", [["vision tower", "projector"], []])
def test_activations_are_near_what_autograd_keeps(freeze, tmp_path):
    """Of a tower of eight layers: one is kept where it is frozen, all where it trains."""
    folder = write_vision_model(tmp_path / "base", "qwen2_5_vl", size=Size(hidden=64, layers=8, side=56))
    processor = read_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").train()
    batch = processor(text=["<|vision_start|><|image_pad|><|vision_end|>What?"], return_tensors="pt",
                      images=[[picture("red", size=(560, 560))]])
    section = Model(path=str(folder), freeze=freeze)
    chosen = select_trainable(model, section)
    assert any("visual" in name for name in chosen) == (not freeze)
    own, kept, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(model.base_model(**batch, use_cache=False).last_hidden_state)
    shown = int((batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum())
    told = memory(size_of(skeleton(folder, False), section), rows=1, row_tokens=batch["input_ids"].shape[1],
                  row_image_tokens=shown, bfloat16=False, recompute=False).activations
    assert 0.5 < told / sum(kept.values()) < 2


def sized(model, **section):
    return size_of(model, Model(path="x", **section))


def test_parts_are_the_model(models):
    for name, model in models.items():
        size = sized(model)
        assert size.parameters == size.trained == sum(p.numel() for p in model.parameters())
        assert [p.name for p in size.parts] == (["language model"] if name == "qwen2" else
                                                ["vision tower", "projector", "language model"]), name
    assert [sized(models[m]).patches for m in ("llava", "qwen2_5_vl", "idefics3", "qwen2")] == [1, 4, 4, 1]
    head = models["llava"].model.multi_modal_projector
    assert sized(models["llava"]).parts[1].parameters == sum(p.numel() for p in head.parameters())


def test_six_per_parameter_and_token(models):
    size = sized(models["qwen2"])
    assert operations(size, 10, 0, recompute=False) == 6 * size.parameters * 10
    assert operations(size, 10, 0, recompute=True) == 8 * size.parameters * 10
    assert operations(size, 10, 0, recompute=True, train=False) == 2 * size.parameters * 10


@given(tokens=st.integers(1, 10**9), share=st.floats(0, 1), recompute=st.booleans())
def test_what_each_frozen_part_costs(tokens, share, recompute):
    """t, p, l: tower, projector, language model, of 1000, 10 and 5000 parameters; images are a share of the tokens."""
    images, again = int(tokens * share), 2 * recompute

    def size(t, p, l):  # noqa: E741 - the letters of the parts
        return ModelSize((PartSize("vision tower", 1000, 1000 * t), PartSize("projector", 10, 10 * p),
                          PartSize("language model", 5000, 5000 * l)), 4, 1, 1, 1, 1, 1, 1, 1, False)

    def cost(per_tower, per_projector, per_language):
        return per_tower * 1000 * 4 * images + per_projector * 10 * images + per_language * 5000 * tokens

    for trained, wanted in {(1, 1, 1): (6 + again, 6 + again, 6 + again), (0, 0, 1): (2, 2, 6 + again),
                            (0, 1, 0): (2, 6 + again, 4 + again), (1, 0, 0): (6 + again, 4 + again, 4 + again)}.items():
        assert operations(size(*trained), tokens, images, recompute=recompute) == pytest.approx(cost(*wanted))


def test_freeze_and_patterns(models):
    """The recipe's words, and a pattern over names; the head is tied to the embedding and counted once."""
    model = models["qwen2_5_vl"]
    size = sized(model, freeze=["vision tower", "projector"])
    by_name = {p.name: p for p in size.parts}
    assert by_name["vision tower"].trained == by_name["projector"].trained == 0
    assert by_name["language model"].trained == by_name["language model"].parameters
    norms = sized(model, trainable=["*norm.weight"])
    assert 0 < norms.trained < size.trained
    with pytest.raises(ModelError, match="Did you mean `projector`"):
        sized(model, freeze=["projectr"])


def test_adapters_train_no_weight(models):
    size = sized(models["qwen2"], lora={"r": 4})
    assert operations(size, 10, 0, recompute=False) == 4 * size.parameters * 10
    need = memory(size, rows=1, row_tokens=8, row_image_tokens=0, bfloat16=True, recompute=False)
    assert need.gradients == need.optimizer == need.half == 0


def test_memory(models):
    size = sized(models["llava"], freeze=["vision tower", "projector"])
    need = memory(size, rows=2, row_tokens=100, row_image_tokens=4, bfloat16=True, recompute=False)
    assert (need.weights, need.gradients, need.optimizer, need.half) == (
        4 * size.parameters, 4 * size.trained, 8 * size.trained, 2 * size.trained)
    # a layer: 3 hidden-sized numbers in float32; 5 more, keys and values (2 heads of 8 each) and 4 inner ones in bfloat16
    layer = 3 * 32 * 4 + (5 * 32 + 2 * 16 + 4 * 48) * 2
    tower = 4 * (8 * 16 + 4 * 24) * 2
    assert need.activations == 2 * (100 * 2 * layer + tower)
    again = memory(size, rows=2, row_tokens=100, row_image_tokens=4, bfloat16=True, recompute=True)
    assert again.activations == 2 * (100 * (2 * 32 * 4 + layer) + tower) and again.total < need.total
    exact = memory(size, rows=2, row_tokens=100, row_image_tokens=4, bfloat16=False, recompute=False)
    assert exact.half == 0 and exact.activations > need.activations


def test_hours_and_devices():
    by_name = {d.name: d for d in DEVICES}
    a100, v100 = by_name["A100 80 GB"], by_name["V100 32 GB"]
    assert hours(a100, SHARE * 312e12 * 3600 * 5, bfloat16=True) == pytest.approx(5)
    assert hours(a100, SHARE * 19.5e12 * 3600, bfloat16=False) == pytest.approx(1)
    assert hours(v100, SHARE * 15.7e12 * 3600, bfloat16=True) == pytest.approx(1)  # it has no bfloat16
    lines = {line.split("  ")[0].strip(): line for line in device_lines([SHARE * 312e12 * 36000] * 3, 50e9, bfloat16=True)}
    assert lines["A100 80 GB"].endswith("10.0 h a branch, 30.0 h for all one after the other")
    assert len(device_lines([1e12], 1e9, bfloat16=True)) == 1 and len(device_lines([1e12], 1e12, bfloat16=True)) == len(DEVICES)
    assert lines["A100 40 GB"].endswith("does not fit on one: 50.0 GB") and "no bfloat16" in lines["V100 32 GB"]
