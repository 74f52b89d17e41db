"""Layers, embeddings and heads found by name alone, on models that transformers writes; and config.json after a cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anabranch.engine.checkpoint import Checkpoint, TensorInfo
from anabranch.engine.layout import (
    Layout,
    cut_config,
    layout_from,
    layout_of,
    name_in,
    set_dtype,
    set_tied,
    set_vocab_size,
)

transformers = pytest.importorskip("transformers")

WIDTH: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
PLAIN: dict[str, Any] = WIDTH | {"vocab_size": 40}
DECODER: dict[str, Any] = PLAIN | {"num_key_value_heads": 1, "max_position_embeddings": 32, "num_hidden_layers": 4}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
BOTH: dict[str, Any] = {"d_model": 16, "vocab_size": 60, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 3, "decoder_layers": 3}
PICTURE: dict[str, Any] = WIDTH | {"num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
TOKENS = {"input_ids": torch.arange(1, 7)[None]}
SEQ2SEQ = TOKENS | {"decoder_input_ids": torch.arange(1, 5)[None]}

# name: (class, config class, its arguments, inputs of a forward pass)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, torch.Tensor]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, TOKENS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER | {
        "tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4}, TOKENS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"tie_word_embeddings": True, "head_dim": 8}, TOKENS),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER, TOKENS),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | {
        "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}, TOKENS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_embd": 16, "n_layer": 4, "n_head": 2, "vocab_size": 40, "n_positions": 32}, TOKENS),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", {
        "hidden_size": 16, "num_layers": 4, "num_heads": 2, "vocab_size": 40, "max_position_embeddings": 32,
        "attention_types": [[["global", "local"], 2]]}, TOKENS),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN | {"num_hidden_layers": 4}, TOKENS),
    "opt": ("OPTForCausalLM", "OPTConfig", {
        "hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "vocab_size": 40, "num_hidden_layers": 4,
        "word_embed_proj_dim": 16, "max_position_embeddings": 32}, TOKENS),
    "mamba": ("MambaForCausalLM", "MambaConfig", {
        "hidden_size": 16, "vocab_size": 40, "num_hidden_layers": 4, "state_size": 4}, TOKENS),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", DECODER | {"layer_types": ["conv", "full_attention"] * 2}, TOKENS),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {
        "num_local_experts": 2, "num_experts_per_tok": 1}, TOKENS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", DECODER | {
        "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "mlp_only_layers": [1, 3]}, TOKENS),
    "bert": ("BertForMaskedLM", "BertConfig", PLAIN | {"num_hidden_layers": 4, "max_position_embeddings": 40}, TOKENS),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", PLAIN | {
        "num_hidden_layers": 4, "max_position_embeddings": 32}, TOKENS),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2,
        "vocab_size": 40, "decoder_start_token_id": 0}, SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", BOTH | {
        "max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1},
        {"input_features": torch.randn(1, 4, 16), "decoder_input_ids": torch.arange(1, 5)[None]}),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": DECODER | {"model_type": "llama"}, "image_token_id": 39,
        "vision_config": PICTURE | {"model_type": "clip_vision_model"}}, TOKENS),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {
        "text_config": DECODER | MROPE,
        "vision_config": {"depth": 3, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}}, TOKENS),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {
        "text_config": DECODER | MROPE, "vision_config": {
            "depth": 4, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "fullatt_block_indexes": [1, 3]}}, TOKENS),
}
# What transformers itself says: the layers of each stack, by the end of their prefix; and the embeddings' rows.
STACKS = {"t5": {"encoder.block": 3, "decoder.block": 3}, "whisper": {"encoder.layers": 3, "decoder.layers": 3},
          "llava": {"vision_tower.encoder.layers": 3, "language_model.model.layers": 4},
          "qwen2_vl": {"visual.blocks": 3, "model.layers": 4}, "qwen2_5_vl": {"visual.blocks": 4, "model.layers": 4}}
POST = {"llama": {"lm_head.weight", "model.norm.weight"}, "qwen2": {"model.norm.weight"}, "qwen3": {"model.norm.weight"},
        "mistral": {"lm_head.weight", "model.norm.weight"}, "gemma3": {"model.norm.weight"},
        "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"}, "lfm2": {"model.embedding_norm.weight"},
        "gpt_neo": {"transformer.ln_f.weight", "transformer.ln_f.bias"}, "mamba": {"backbone.norm_f.weight"},
        "neox": {"embed_out.weight", "gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"},
        "opt": {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"},
        "mixtral": {"lm_head.weight", "model.norm.weight"}, "qwen3_moe": {"lm_head.weight", "model.norm.weight"},
        "bert": {"cls.predictions.bias", "cls.predictions.transform.LayerNorm.bias",
                 "cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.dense.bias",
                 "cls.predictions.transform.dense.weight"},
        "roberta": {f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")},
        "t5": {"decoder.final_layer_norm.weight"},
        "whisper": {"model.decoder.layer_norm.weight", "model.decoder.layer_norm.bias"},
        "llava": {"language_model.lm_head.weight", "language_model.model.norm.weight"},
        "qwen2_vl": {"lm_head.weight", "model.norm.weight"}, "qwen2_5_vl": {"lm_head.weight", "model.norm.weight"}}
EMBEDDINGS = {"gpt2": {"transformer.wte.weight"}, "gpt_neo": {"transformer.wte.weight"}, "t5": {"shared.weight"},
              "neox": {"gpt_neox.embed_in.weight", "embed_out.weight"}, "opt": {"model.decoder.embed_tokens.weight"},
              "mamba": {"backbone.embeddings.weight"}, "whisper": {"model.decoder.embed_tokens.weight"},
              "bert": {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"},
              "roberta": {"roberta.embeddings.word_embeddings.weight"},
              "llava": {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            model, config, arguments, _ = MODELS[name]
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(name)
            getattr(transformers, model)(getattr(transformers, config)(**arguments)).save_pretrained(folder)
            made[name] = Checkpoint.open(folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_places(opened, name):
    checkpoint = opened(name)
    layout = layout_of(checkpoint)
    assert list(layout.places) == list(checkpoint.tensors) and not layout.warnings
    for tensor, place in layout.places.items():
        assert (place.layer is not None) == (place.part == "layer")
        assert name_in(place.template, -1 if place.layer is None else place.layer) == tensor
    if name in STACKS:
        assert layout.layers == STACKS[name] | {"default": 0} or \
            {m.removeprefix("model."): n for m, n in layout.layers.items()} == STACKS[name] | {"default": 0}
        assert {p.module for p in layout.places.values() if p.part != "layer"} == {"default"}
    else:
        assert layout.layers == {"default": 4}
    for module, path in layout.count_keys.items():
        value: Any = checkpoint.config
        for key in path or ():
            value = value[key]
        assert (path is None) == (layout.layers[module] == 0) and (path is None or value == layout.layers[module])
    assert len([p for p in layout.count_keys.values() if p]) == len(set(layout.count_keys.values()) - {None})
    assert {t for t, p in layout.places.items() if p.part == "post"} == POST[name]
    heads = {t for t in POST[name] if t == "lm_head.weight"}
    assert {t for t, p in layout.places.items() if p.embedding} == EMBEDDINGS.get(
        name, {"model.embed_tokens.weight"} | heads)


def sliced(checkpoint: Checkpoint, layout: Layout, kept: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    result = {}
    for tensor, place in layout.places.items():
        for i, layer in enumerate(kept.get(place.module, [])):
            if place.layer == layer:
                result[name_in(place.template, i)] = checkpoint.read(tensor).clone()
        if place.layer is None or place.module not in kept:
            result[tensor] = checkpoint.read(tensor).clone()
    return result


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_loads_and_runs(tmp_path, opened, name):
    """Layers dropped, repeated and moved in every module; layer 0 stays, since T5 keeps its position bias there."""
    checkpoint = opened(name)
    layout = layout_of(checkpoint)
    kept = {m: [0, 2, 1, 1, *range(3, n)][: n + 1] for m, n in layout.layers.items() if n}
    config, warnings = cut_config(checkpoint.config, layout, kept)
    save_file(sliced(checkpoint, layout, kept), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {m: len(k) for m, k in kept.items()} == {m: n for m, n in layout_of(Checkpoint.open(tmp_path)).layers.items() if n}
    model, info = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        out = model(**MODELS[name][3])
    assert torch.isfinite(out.logits).all()
    assert not warnings or name == "qwen2"


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "whisper", "qwen2_5_vl"])
def test_all_layers_kept_is_no_change(opened, name):
    checkpoint = opened(name)
    layout = layout_of(checkpoint)
    every = {m: list(range(n)) for m, n in layout.layers.items()}
    assert cut_config(checkpoint.config, layout, every) == (checkpoint.config, [])


def test_kinds_of_layers_move_with_them(opened):
    gemma, moe, vision = (opened(n) for n in ("gemma3", "qwen3_moe", "qwen2_5_vl"))
    config, _ = cut_config(gemma.config, layout_of(gemma), {"default": [1, 0, 3]})
    assert config["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    config, _ = cut_config(moe.config, layout_of(moe), {"default": [0, 3, 3, 2, 1]})
    assert config["mlp_only_layers"] == [1, 2, 4] and config["num_hidden_layers"] == 5
    layout = layout_of(vision)
    module = next(m for m in layout.layers if "visual" in m)
    config, _ = cut_config(vision.config, layout, {module: [1, 2, 3]})
    assert config["vision_config"]["fullatt_block_indexes"] == [0, 2] and config["vision_config"]["depth"] == 3
    assert config["text_config"] == vision.config["text_config"]


def test_one_side_of_an_encoder_decoder(opened):
    t5, whisper = opened("t5"), opened("whisper")
    config, _ = cut_config(t5.config, layout_of(t5), {"decoder.block": [0, 1]})
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 2)
    older = whisper.config | {"num_hidden_layers": 3}  # transformers 4 wrote it too: the encoder's
    layout = layout_from(whisper.tensors, older)
    config, _ = cut_config(older, layout, {"model.decoder.layers": [0]})
    assert (config["encoder_layers"], config["decoder_layers"], config["num_hidden_layers"]) == (3, 1, 3)
    config, _ = cut_config(older, layout, {"model.encoder.layers": [0]})
    assert (config["encoder_layers"], config["decoder_layers"], config["num_hidden_layers"]) == (1, 3, 1)


def made(names: dict[str, tuple[int, ...]], **config: Any) -> Layout:
    return layout_from({n: TensorInfo(s, "F32", "f") for n, s in names.items()}, config)


def stack(prefix: str, numbers: Any, inner: str = "attn.q.weight") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{i}.{inner}": (4, 4) for i in numbers}


def test_numbers_right_of_the_first_belong_to_the_layer():
    layout = made({f"model.layers.{i}.mlp.experts.{e}.w1.weight": (4, 4) for i in range(2) for e in range(8)},
                  num_hidden_layers=2)
    assert layout.layers == {"default": 2}
    assert layout.places["model.layers.1.mlp.experts.7.w1.weight"].template == "model.layers.{layer}.mlp.experts.7.w1.weight"


def test_diffusion_transformer():
    layout = made({"x_embedder.weight": (4, 4), "norm_out.linear.weight": (8, 4), "proj_out.weight": (4, 4),
                   **stack("transformer_blocks", range(3)), **stack("single_transformer_blocks", range(5))},
                  num_layers=3, num_single_layers=5)
    assert layout.layers == {"single_transformer_blocks": 5, "transformer_blocks": 3, "default": 0}
    assert layout.count_keys["single_transformer_blocks"] == ("num_single_layers",)
    assert layout.count_keys["transformer_blocks"] == ("num_layers",)
    assert [layout.places[n].part for n in ("x_embedder.weight", "norm_out.linear.weight", "proj_out.weight")] == [
        "pre", "post", "post"]
    equal = made({**stack("transformer_blocks", range(3)), **stack("single_transformer_blocks", range(3))},
                 num_layers=3, num_single_layers=3)
    assert equal.count_keys == {"single_transformer_blocks": ("num_single_layers",), "transformer_blocks": ("num_layers",)}


def test_a_name_that_begins_with_a_number():
    layout = made({"0.auto_model.embeddings.word_embeddings.weight": (9, 4), "1.linear.weight": (4, 4),
                   **stack("0.auto_model.encoder.layer", range(3))}, num_hidden_layers=3, vocab_size=9)
    assert layout.layers == {"default": 3} and layout.prefixes == {"default": "0.auto_model.encoder.layer"}
    layout = made({f"{i}.attn.weight": (4, 4) for i in range(3)}, num_layers=3)
    assert layout.layers == {"default": 3} and layout.places["2.attn.weight"].template == "{layer}.attn.weight"


def test_a_sequential_is_no_stack():
    layout = made({**stack("model.layers", range(3)), "mm_projector.0.weight": (4, 4), "mm_projector.2.weight": (4, 4)},
                  num_hidden_layers=3)
    assert layout.layers == {"default": 3} and layout.places["mm_projector.2.weight"].part == "pre"


def test_no_layers_at_all():
    layout = made({"a": (3,), "b.weight": (2, 2)})
    assert layout.layers == {"default": 0} and {p.part for p in layout.places.values()} == {"pre"}


def test_dropped_layers_keep_their_numbers_and_are_told():
    layout = made(stack("model.layers", [0, 1, 3]), num_hidden_layers=4)
    assert layout.layers == {"default": 4} and layout.places["model.layers.3.attn.q.weight"].layer == 3
    (warning,) = layout.warnings
    assert "layer 2" in warning and "num_hidden_layers" in warning


def test_prediction_layers_after_the_last_are_heads():
    layout = made(stack("model.layers", range(4)), num_hidden_layers=3, num_nextn_predict_layers=1)
    extra = layout.places["model.layers.3.attn.q.weight"]
    assert layout.layers == {"default": 3} and extra.part == "post" and extra.layer is None
    assert name_in(extra.template, 3) == "model.layers.3.attn.q.weight"
    assert name_in(extra.template, 7) == "model.layers.7.attn.q.weight"
    layout = made({**stack("model.layers", range(3)), **stack("mtp.layers", range(1)),
                   **stack("mtp.layers.0.mlp.experts", range(3))}, num_hidden_layers=3)
    assert layout.layers == {"default": 3} and layout.places["mtp.layers.0.mlp.experts.2.attn.q.weight"].part == "post"


def test_embeddings_by_name_and_rows():
    names = {"model.embed_tokens.weight": (40, 8), "model.embed_positions.weight": (40, 8), "lm_head.weight": (40, 8),
             "lm_head.bias": (40,), "token_type_embeddings.weight": (2, 8), "score.weight": (2, 8), "shared.weight": (7, 8)}
    assert {n for n, p in made(names, vocab_size=40).places.items() if p.embedding} == {
        "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    assert {n for n, p in made(names, text_config={"vocab_size": 40}).places.items() if p.embedding} == {
        "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    padded = made(names, vocab_size=39)
    assert [n for n, p in padded.places.items() if p.embedding] == ["model.embed_tokens.weight"] and not padded.warnings
    few = made(names, vocab_size=41)
    assert few.places["model.embed_tokens.weight"].embedding and "40 rows" in few.warnings[0] and "41" in few.warnings[0]


CUTS = [
    ({"ffn_multipliers": [1, 2, 3, 4]}, {"ffn_multipliers": [4, 1]}, "ffn_multipliers"),
    ({"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [0, 1]}, None),
    ({"cross_attention_layers": [0, 2]}, {"cross_attention_layers": [1]}, None),
    ({"hybrid_override_pattern": "M*-M"}, {"hybrid_override_pattern": "MM"}, None),
    ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}, None),
    ({"rope_scaling": {"short_factor": [1, 2, 3, 4]}}, {"rope_scaling": {"short_factor": [1, 2, 3, 4]}}, None),
    ({"first_k_dense_replace": 1}, {"first_k_dense_replace": 1}, "first_k_dense_replace"),
    ({"max_window_layers": 1, "use_sliding_window": False}, {"max_window_layers": 1}, None),
    ({"max_window_layers": 28, "use_sliding_window": True}, {"max_window_layers": 26}, None),
    ({"sliding_window_pattern": 2}, {"sliding_window_pattern": 2}, "sliding_window_pattern"),
    ({"sliding_window_pattern": 3, "layer_types": list("aaba")}, {"layer_types": ["a", "a"]}, None),
    ({"layer_types": list("abc")}, {"layer_types": list("abc")}, "layer_types"),
]


@pytest.mark.parametrize("extra, wanted, warned", CUTS, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
def test_what_else_config_says_of_layers(extra, wanted, warned):
    """Layers 3 and 0 of four are kept, in that order."""
    config = {"num_hidden_layers": 4, **extra}
    layout = made(stack("model.layers", range(4)), **config)
    result, warnings = cut_config(config, layout, {"default": [3, 0]})
    assert {k: result[k] for k in wanted} == wanted and result["num_hidden_layers"] == 2
    assert config == {"num_hidden_layers": 4, **extra}
    assert len(warnings) == (warned is not None) and all(f"`{warned}" in w for w in warnings)


def test_a_count_that_config_does_not_name():
    layout = made(stack("down_blocks", range(3)))
    result, warnings = cut_config({"a": 1}, layout, {"default": [0]})
    assert result == {"a": 1} and "`default`" in warnings[0]
    result, warnings = cut_config({"layers_block_type": list("abc")}, layout, {"default": [2, 0]})
    assert result == {"layers_block_type": ["c", "a"]} and not warnings


def test_vocabulary_ties_and_dtype():
    config = {"vocab_size": 5, "dtype": "float32", "text_config": {"vocab_size": 5, "dtype": "float32",
              "tie_word_embeddings": True}, "vision_config": {"vocab_size": 9, "torch_dtype": "float32"}}
    assert set_vocab_size(config, 7)["text_config"]["vocab_size"] == set_vocab_size(config, 7)["vocab_size"] == 7
    assert set_vocab_size(config, 7)["vision_config"]["vocab_size"] == 9
    assert set_vocab_size({"text_config": {"vocab_size": 5}}, 7) == {"text_config": {"vocab_size": 7}}
    assert set_vocab_size({}, 7) == {"vocab_size": 7}
    tied = set_tied(config, False)
    assert tied["tie_word_embeddings"] is False and tied["text_config"]["tie_word_embeddings"] is False
    assert "tie_word_embeddings" not in tied["vision_config"]
    half = set_dtype(config, "bfloat16")
    assert half["dtype"] == half["text_config"]["dtype"] == half["vision_config"]["torch_dtype"] == "bfloat16"
    assert "torch_dtype" not in half and set_dtype({}, "float16") == {"torch_dtype": "float16"}
    assert config["dtype"] == "float32"


def test_mergekit_names(tmp_path: Path):
    """Golden models of the peer: one module, whatever the prefix."""
    golden = Path(__file__).parents[2].parent / "shared" / "data" / "merge_golden" / "models"
    if not golden.is_dir():
        pytest.skip("shared/data/merge_golden is not there")
    for folder in sorted(golden.iterdir()):
        layout = layout_of(Checkpoint.open(folder))
        assert set(layout.layers) == {"default"} and layout.count_keys["default"] == ("num_hidden_layers",)
