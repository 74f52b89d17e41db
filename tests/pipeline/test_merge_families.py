"""Merges of every kind of Hugging Face model: the result loads without a word, and is the merge made by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from merge_jobs import tensors_of
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from anabranch.engine.card import model_card
from anabranch.engine.dialect import config_of
from anabranch.engine.merging import merge_config, verify
from anabranch.engine.prepare import Options

TEXT = {"input_ids": torch.arange(2, 14)[None]}
DECODER = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
           "max_position_embeddings": 64, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8, "projection_dim": 16}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model of a kind, and what to give it. `dtypes`: tensors whose name holds the key are stored so."""

    model: str
    config: Callable[[], Any]
    given: Callable[[PreTrainedModel], dict[str, Any]] = lambda _: TEXT
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    tied: bool = False


def text_config(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**(DECODER | more))


def encoder_config(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**(ENCODER | more))


def llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**DECODER),
        image_token_id=60, vision_feature_layer=-1)


def qwen_vl(kind: str) -> Callable[[], Any]:
    def make() -> Any:
        text = DECODER | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
        vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
                                  "temporal_patch_size": 2}
        vision |= ({"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2} if kind == "Qwen2VL" else
                   {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "window_size": 8,
                    "fullatt_block_indexes": [1]})
        return getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
            vision_end_token_id=63, tie_word_embeddings=False)
    return make


def seq2seq(_: PreTrainedModel) -> dict[str, Any]:
    return TEXT | {"decoder_input_ids": torch.arange(3, 9)[None]}


def audio(model: PreTrainedModel) -> dict[str, Any]:
    features = torch.linspace(-1, 1, 8 * 40).reshape(1, 8, 40).to(model.dtype)
    return {"input_features": features, "decoder_input_ids": torch.arange(3, 9)[None]}


def picture(model: PreTrainedModel) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[1, *[60] * 4, 5, 6]]),
            "pixel_values": torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16).to(model.dtype)}


def patches(model: PreTrainedModel) -> dict[str, Any]:
    """One picture of 4 x 4 patches, merged to 2 x 2 places in the text."""
    ids = torch.tensor([[1, 62, *[60] * 4, 63, 5]])
    return {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 16 * 96).reshape(16, 96).to(model.dtype),
            "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == 60).int()}


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAMILIES = {
    "llama": Family("LlamaForCausalLM", text_config("LlamaConfig")),
    "llama-mixed": Family("LlamaForCausalLM", text_config("LlamaConfig"),
                          dtypes=(("norm", FP32), ("lm_head", FP32), ("mlp", FP16))),
    "qwen2": Family("Qwen2ForCausalLM", text_config("Qwen2Config", tie_word_embeddings=True), tied=True),
    "qwen3": Family("Qwen3ForCausalLM", text_config("Qwen3Config", tie_word_embeddings=True, head_dim=8), tied=True),
    "gemma3": Family("Gemma3ForCausalLM", text_config(
        "Gemma3TextConfig", num_hidden_layers=4, head_dim=8, sliding_window=4, layer_types=[
            "sliding_attention", "full_attention", "sliding_attention", "full_attention"]), tied=True),
    "gpt2": Family("GPT2LMHeadModel", lambda: transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2), tied=True),
    "bert": Family("BertForMaskedLM", encoder_config("BertConfig"), tied=True),
    "bert-classifier": Family("BertForSequenceClassification", encoder_config("BertConfig")),
    "roberta": Family("RobertaForMaskedLM", encoder_config("RobertaConfig"), tied=True),
    "t5": Family("T5ForConditionalGeneration", lambda: transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0), seq2seq, tied=True),
    "whisper": Family("WhisperForConditionalGeneration", lambda: transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None), audio, tied=True),
    "llava": Family("LlavaForConditionalGeneration", llava, picture),
    "qwen2-vl": Family("Qwen2VLForConditionalGeneration", qwen_vl("Qwen2VL"), patches),
    "qwen2.5-vl": Family("Qwen2_5_VLForConditionalGeneration", qwen_vl("Qwen2_5_VL"), patches),
    "mixtral": Family("MixtralForCausalLM", text_config("MixtralConfig", num_local_experts=3, num_experts_per_tok=2)),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", text_config(
        "Qwen3MoeConfig", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8)),
    "mamba": Family("MambaForCausalLM", lambda: transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=2, conv_kernel=2), tied=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], list[Path]]:
    """Three models of a family, each in several files: the first, and two that moved a little from it."""
    made: dict[str, list[Path]] = {}

    def make(name: str) -> list[Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = [save(FAMILIES[name], folder / label, seed) for seed, label in enumerate(("base", "a", "b"))]
        return made[name]

    return make


def save(family: Family, folder: Path, seed: int) -> Path:
    torch.manual_seed(7)
    model = getattr(transformers, family.model)(family.config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Not the zeros and ones of a fresh model: a merge that mistook them for each other would pass.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
            parameter.add_(0.02 * seed * torch.randn(parameter.shape, generator=generator))
    model.to(BF16).save_pretrained(folder, max_shard_size=["6KB", "9KB", "5GB"][seed])
    for key, dtype in family.dtypes:
        for path in folder.glob("*.safetensors"):
            tensors = tensors_of_file(path)
            save_file({n: t.to(dtype) if key in n else t for n, t in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def loaded(family: Family, folder: Path) -> PreTrainedModel:
    """The model, loaded with nothing missing, left over or of another shape."""
    model, info = getattr(transformers, family.model).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def outputs(family: Family, model: PreTrainedModel) -> Tensor:
    model = model.float()
    with torch.no_grad():
        return model(**family.given(model)).logits


def by_hand(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    """The weighted mean in float64 of all floating tensors; others as they are in the first."""
    states = [tensors_of(folder) for folder in folders]
    return {name: (sum(w * s[name].double() for w, s in zip(weights, states, strict=True)) / sum(weights))  # type: ignore
            if tensor.is_floating_point() else tensor for name, tensor in states[0].items()}


def close_to(got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every number is the exact one rounded to the tensor's dtype (half a step, and float32's own error)."""
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
        room = eps / 2 * (1 + 2**-9) * exact[name].double().abs() + 3e-7 * bool(eps)
        assert bool(((tensor.double() - exact[name].double()).abs() <= room).all()), name


@pytest.mark.parametrize("name", FAMILIES)
def test_linear(name, models, tmp_path):
    """Loads clean, holds the mean made by hand, and answers as the mean made by hand."""
    family, (base, a, b) = FAMILIES[name], models(name)
    config = {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": w}}
                                                   for p, w in ((base, 0.5), (a, 0.3), (b, 0.4))]}
    warnings: list[str] = []
    merge_config(config, tmp_path / "out", options=Options(max_shard_size=8_000), warn=warnings.append)
    assert [w for w in warnings if "tokenizer" not in w] == []
    got, exact = tensors_of(tmp_path / "out"), by_hand([base, a, b], [0.5, 0.3, 0.4])
    close_to(got, exact)
    stored = tensors_of(base)
    assert all(got[n].dtype == stored[n].dtype for n in got)
    (tmp_path / "by-hand").mkdir()
    (tmp_path / "by-hand/config.json").write_bytes((base / "config.json").read_bytes())
    save_file({n: t.to(stored[n].dtype) for n, t in exact.items()}, tmp_path / "by-hand/model.safetensors",
              metadata={"format": "pt"})
    ours, theirs = (outputs(family, loaded(family, tmp_path / n)) for n in ("out", "by-hand"))
    assert bool(ours.isfinite().all())
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # a few roundings that fall the other way
    assert not torch.allclose(ours, outputs(family, loaded(family, base)), rtol=1e-3, atol=1e-4)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("llama-mixed",)])
def test_ties(name, models, tmp_path):
    """Trim, elect, mean, by hand in float64, one tensor at a time."""
    family, (base, a, b) = FAMILIES[name], models(name)
    config = {"merge_method": "ties", "base_model": str(base), "models": [
        {"model": str(p), "parameters": {"weight": w, "density": rho}} for p, w, rho in ((a, 0.7, 0.6), (b, 0.6, 1.0))]}
    merge_config(config, tmp_path / "out")
    start, *branches = (tensors_of(p) for p in (base, a, b))
    got = tensors_of(tmp_path / "out")
    unlike = sum(int((~torch.isclose(got[n].double(), ties_by_hand(
        start[n].double(), [s[n].double() for s in branches], [0.7, 0.6], [0.6, 1.0]), rtol=2**-8, atol=1e-6)).sum())
                 for n in got if got[n].is_floating_point())
    assert got.keys() == start.keys()
    assert unlike <= 0.002 * sum(t.numel() for t in got.values())  # entries that are equal at a cut or a zero sum
    assert bool(outputs(family, loaded(family, tmp_path / "out")).isfinite().all())


def ties_by_hand(base: Tensor, branches: list[Tensor], weights: list[float], densities: list[float]) -> Tensor:
    steps = []
    for branch, w, rho in zip(branches, weights, densities, strict=True):
        d = (branch - base).flatten()
        order = d.abs().sort(descending=True, stable=True).indices
        d[order[max(1, int(rho * d.numel())):]] = 0
        steps.append(w * d.reshape(base.shape))
    sign = torch.where(sum(steps) >= 0, 1.0, -1.0)  # type: ignore[call-overload]
    agree = [step.sign() == sign for step in steps]
    total = sum(torch.where(m, step, 0.0) for m, step in zip(agree, steps, strict=True))
    divisor = sum(m * w for m, w in zip(agree, weights, strict=True))
    return base + total / torch.where(divisor == 0, 1.0, divisor)  # type: ignore[arg-type,call-overload]


# --- slices ---


@pytest.mark.parametrize("name, layers", [
    ("llama", [(1, 2), (0, 2), (0, 1)]), ("gemma3", [(0, 3), (1, 2), (3, 4)]), ("qwen3-moe", [(0, 2), (1, 2)]),
    ("qwen3", [(0, 1)]), ("gpt2", [(0, 2), (0, 2)]), ("mixtral", [(1, 2), (0, 1)]), ("bert", [(0, 2), (0, 1)]),
    ("mamba", [(1, 2), (1, 2), (0, 1)])])
def test_slices(name, layers, models, tmp_path):
    """Layers dropped, repeated and put in another order: each holds what it should, and the result loads and runs."""
    family, (base, a, _) = FAMILIES[name], models(name)
    config = {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": str(base if i % 2 else a), "layer_range": list(pair)}]} for i, pair in enumerate(layers)]}
    merge_config(config, tmp_path / "out")
    model = loaded(family, tmp_path / "out")
    expected = [(base if i % 2 else a, layer) for i, pair in enumerate(layers) for layer in range(*pair)]
    got, prefix = tensors_of(tmp_path / "out"), {"gpt2": "transformer.h.", "bert": "bert.encoder.layer.",
                                                 "mamba": "backbone.layers."}.get(name, "model.layers.")
    seen = 0
    for place, (folder, layer) in enumerate(expected):
        for key, tensor in tensors_of(folder).items():
            if key.startswith(f"{prefix}{layer}."):
                seen += 1
                assert got[key.replace(f"{prefix}{layer}.", f"{prefix}{place}.", 1)].equal(tensor)
    assert seen == sum(key.startswith(prefix) for key in got)
    if name == "gemma3":
        types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        assert model.config.layer_types == [types[layer] for _, layer in expected]
    assert bool(outputs(family, model).isfinite().all())
    assert verify(tmp_path / "out") == []


def test_slices_of_several_models_merged(models, tmp_path):
    """Two slices, each a merge of two sources, with a base that no slice names."""
    family, (base, a, b) = FAMILIES["qwen3"], models("qwen3")
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "slices": [
        {"sources": [{"model": str(a), "layer_range": [0, 2], "parameters": {"weight": 1.0}},
                     {"model": str(b), "layer_range": [0, 2], "parameters": {"weight": 0.5}}]},
        {"sources": [{"model": str(b), "layer_range": [1, 2], "parameters": {"weight": 2.0}}]}]}
    merge_config(config, tmp_path / "out")
    zero, one, two = (tensors_of(p) for p in (base, a, b))
    got, key = tensors_of(tmp_path / "out"), "model.layers.{}.mlp.up_proj.weight"
    for place, parts in ((0, ((0, one, 1.0), (0, two, 0.5))), (1, ((1, one, 1.0), (1, two, 0.5))), (2, ((1, two, 2.0),))):
        source = parts[0][0]
        start = zero[key.format(source)].double()
        exact = start + sum(w * (s[key.format(i)].double() - start) for i, s, w in parts)
        close_to({"x": got[key.format(place)]}, {"x": exact})
    assert bool(outputs(family, loaded(family, tmp_path / "out")).isfinite().all())


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "whisper", "t5"])
def test_modules(name, models, tmp_path):
    """Models of several stacks: the layers of one are put together from two models, all else is one model's."""
    family, (base, a, _) = FAMILIES[name], models(name)
    from anabranch.engine.checkpoint import Checkpoint
    from anabranch.engine.layout import layout_of

    layout = layout_of(Checkpoint.open(base))
    stacks = [module for module, count in layout.layers.items() if count]
    text = next(m for m in stacks if "decoder" in m or "language" in m or "model.layers" in m or "text" in m)
    modules: dict[str, Any] = {m: {"models": [{"model": str(a)}]} for m in layout.layers if m != text}
    rows = [(base, 0), (a, 1), (base, 1)]
    modules[text] = {"slices": [{"sources": [{"model": str(p), "layer_range": [i, i + 1]}]} for p, i in rows]}
    merge_config({"merge_method": "passthrough", "modules": modules}, tmp_path / "out")
    model = loaded(family, tmp_path / "out")
    got, prefix = tensors_of(tmp_path / "out"), layout.prefixes[text]
    expected = {n: t for n, t in tensors_of(a).items() if not n.startswith(f"{prefix}.")}
    for place, (folder, layer) in enumerate(rows):
        expected |= {n.replace(f"{prefix}.{layer}.", f"{prefix}.{place}.", 1): t for n, t in tensors_of(folder).items()
                     if n.startswith(f"{prefix}.{layer}.")}
    assert got.keys() == expected.keys()
    assert all(got[n].equal(expected[n]) for n in got)
    assert bool(outputs(family, model).isfinite().all())


@pytest.mark.parametrize("ranges", [([1, 2], [0, 2]), ([0, 2], [0, 1]), ([0, 1], [1, 2])])
def test_a_first_layer_unlike_the_others(ranges, models, tmp_path):
    """T5 keeps the position bias of a whole stack in its layer 0: moved or repeated, the result would not load."""
    base = models("t5")[0]
    modules: dict[str, Any] = {m: {"models": [{"model": str(base)}]} for m in ("default", "encoder.block")}
    modules["decoder.block"] = {"slices": [{"sources": [{"model": str(base), "layer_range": r}]} for r in ranges]}
    warnings: list[str] = []
    merge_config({"merge_method": "passthrough", "modules": modules}, tmp_path / "out", warn=warnings.append)
    said = [w for w in warnings if "relative_attention_bias" in w]
    assert bool(said) == (ranges != ([0, 1], [1, 2]))


# --- what transformers does not load ---


def test_diffusers_folder(tmp_path):
    """A denoiser of diffusers: its own file names, a config with `_class_name`, convolutions and a scalar."""
    generator = torch.Generator().manual_seed(1)
    shapes = {f"transformer_blocks.{i}.{n}": s for i in range(3) for n, s in {
        "attn.to_q.weight": (16, 16), "attn.to_out.0.weight": (16, 16), "norm1.linear.bias": (16,)}.items()}
    shapes |= {"pos_embed.proj.weight": (16, 4, 2, 2), "proj_out.weight": (16, 16), "time_text_embed.scale": ()}
    start = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    folders = []
    for label, size in (("base", 0.0), ("a", 0.1), ("b", 0.2)):
        folder = tmp_path / label
        folder.mkdir()
        tensors = {n: (t + size * torch.randn(t.shape, generator=generator)).to(FP16) for n, t in start.items()}
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.30.0",
                                                        "num_layers": 3, "sample_size": 8}))
        folders.append(folder)
    config = {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 1}} for p in folders]}
    merge_config(config, tmp_path / "out", options=Options(max_shard_size=1_000))
    close_to(tensors_of(tmp_path / "out"), by_hand(folders, [1, 1, 1]))
    index = json.loads((tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert all((tmp_path / "out" / file).is_file() for file in index["weight_map"].values())
    assert json.loads((tmp_path / "out/config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    assert verify(tmp_path / "out") == []
    sliced = {"merge_method": "passthrough", "slices": [{"sources": [{"model": str(folders[0]), "layer_range": [0, 3]}]},
                                                        {"sources": [{"model": str(folders[1]), "layer_range": [2, 3]}]}]}
    merge_config(sliced, tmp_path / "longer")
    assert json.loads((tmp_path / "longer/config.json").read_text())["num_layers"] == 4


def test_integer_buffers(models, tmp_path):
    """BERT of old had `position_ids` among its weights: int64, copied, and refused where models differ in them."""
    family, folders = FAMILIES["bert"], models("bert")
    copies = []
    for folder in folders:
        tensors = tensors_of(folder) | {"bert.embeddings.position_ids": torch.arange(64)[None]}
        copy = tmp_path / folder.name
        copy.mkdir()
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        copies.append(copy)
    config = {"merge_method": "linear", "dtype": "float32",
              "models": [{"model": str(p), "parameters": {"weight": 0.5}} for p in copies]}
    merge_config(config, tmp_path / "out")
    got = tensors_of(tmp_path / "out")
    assert got["bert.embeddings.position_ids"].equal(torch.arange(64)[None])
    assert all(t.dtype == FP32 for n, t in got.items() if "position_ids" not in n)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert bool(outputs(family, model).isfinite().all())


# --- one result of every method in transformers ---

MORE: dict[str, dict[str, Any]] = {
    "slerp": {"parameters": {"t": 0.4}}, "nearswap": {"parameters": {"t": 0.01}}, "arcee_fusion": {},
    "passthrough": {"base": False, "parameters": {"scale": 0.9}}, "linear": {"base": False}, "karcher": {"base": False},
    "multislerp": {}, "nuslerp": {"base": False},
    "della": {"density": 0.5, "epsilon": 0.1}, "della_linear": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05}, "breadcrumbs_ties": {"density": 0.8, "gamma": 0.05}}
ONE = ("slerp", "nearswap", "arcee_fusion", "passthrough", "interpolate")


def method_names() -> list[str]:
    from anabranch.merge import METHODS

    return sorted(METHODS.keys() - {"fisher", "task_vector_mean"})


@pytest.mark.parametrize("method", method_names())
def test_a_result_of_every_method_runs(method, models, tmp_path):
    """Loaded, finite, near its parents and not one of them."""
    family, (base, a, b) = FAMILIES["qwen3"], models("qwen3")
    more = MORE.get(method, {})
    own: dict[str, Any] = {k: more[k] for k in ("density", "epsilon", "gamma") if k in more}
    if "dare" in method or method.startswith("ties"):
        own["density"] = 0.6
    from anabranch.merge import method_named

    if "weights" in method_named(method).inputs:
        own["weight"] = 0.5
    config: dict[str, Any] = {"merge_method": method, "models": [
        {"model": str(p), **({"parameters": own} if own else {})} for p in ((a,) if method in ONE else (a, b))]}
    if more.get("base", True):
        config["base_model"] = str(base)
    parameters = dict(more.get("parameters", {}))
    if method == "interpolate":
        parameters["alpha"] = 0.5
    if parameters:
        config["parameters"] = parameters
    merge_config(config, tmp_path / "out")
    got, states = tensors_of(tmp_path / "out"), [tensors_of(p) for p in (base, a, b)]
    ours = outputs(family, loaded(family, tmp_path / "out"))
    assert bool(ours.isfinite().all())
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(not got[name].equal(s[name]) for s in states)
    spread = max(float((s[name] - states[0][name]).float().norm()) for s in states)
    assert float((got[name] - states[0][name]).float().norm()) < 4 * spread
    assert verify(tmp_path / "out") == []


# --- adapters ---


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "modules_to_save", "embedding"])
def test_adapter_is_what_peft_folds_in(kind, models, tmp_path):
    """`model+adapter` in a config, alone and in a linear merge, against PEFT's own merge_and_unload."""
    from peft import LoraConfig, get_peft_model

    base, a, _ = models("llama")
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=FP32)
    more: dict[str, Any] = {
        "plain": {}, "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 20}},
        "modules_to_save": {"modules_to_save": ["lm_head"]}, "embedding": {}}[kind]
    targets = ["q_proj", "down_proj", *(["embed_tokens"] if kind == "embedding" else [])]
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **more))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload()
    reference = f"{base}+{tmp_path / 'adapter'}"
    merge_config({"merge_method": "passthrough", "models": [{"model": reference}], "dtype": "float32"}, tmp_path / "out")
    got = loaded(FAMILIES["llama"], tmp_path / "out")
    for (name, ours), theirs in zip(got.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(got(**TEXT).logits, expected(**TEXT).logits, rtol=1e-4, atol=1e-5)
    config = {"merge_method": "linear", "dtype": "float32", "models": [
        {"model": reference, "parameters": {"weight": 0.25}}, {"model": str(a), "parameters": {"weight": 0.75}}]}
    merge_config(config, tmp_path / "both")
    folded, other = expected.state_dict(), tensors_of(a)
    close_to(tensors_of(tmp_path / "both"), {n: 0.25 * folded[n].double() + 0.75 * t.double() for n, t in other.items()})
    assert verify(tmp_path / "both") == []


# --- tokenizers ---


def tokenizer_with(extra: list[str], special: list[str]) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(20)), *extra]
    tokenizer = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                                eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {{ eos_token }} {% endfor %}"
    return fast


@pytest.mark.parametrize("source", ["union", "base", "a", "padded"])
def test_tokenizers(source, tmp_path):
    """Two vocabularies: rows follow their tokens, and AutoTokenizer gives the same words back."""
    generator = random.Random(5)
    tokens = {"base": tokenizer_with(["only0"], ["<|im_start|>"]), "a": tokenizer_with(["only1", "both"], ["<|im_end|>"])}
    family = FAMILIES["qwen3"]
    for seed, (name, tokenizer) in enumerate(tokens.items()):
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            **(DECODER | {"vocab_size": len(tokenizer), "head_dim": 8, "tie_word_embeddings": True})))
        model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0, temperature=0.7, do_sample=True)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    said: dict[str, Any] = {"union": {"source": "union"}, "base": {"source": "base"}, "a": {"source": str(tmp_path / "a")},
                            "padded": {"source": "union", "pad_to_multiple_of": 16}}[source]
    config = {"merge_method": "linear", "tokenizer": said, "models": [
        {"model": str(tmp_path / n), "parameters": {"weight": 0.5}} for n in tokens]}
    if source == "base":
        config |= {"base_model": str(tmp_path / "base")}
        config["models"] = config["models"][1:]
        config["parameters"] = {"weight": 0.5}
    merge_config(config, tmp_path / "out")
    model = loaded(family, tmp_path / "out")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = model.get_input_embeddings().weight.detach()
    wanted = {"union": set(tokens["base"].get_vocab()) | set(tokens["a"].get_vocab()), "base": set(tokens["base"].get_vocab()),
              "a": set(tokens["a"].get_vocab())}.get(source)
    wanted = wanted or set(tokens["base"].get_vocab()) | set(tokens["a"].get_vocab())
    assert set(made.get_vocab()) == wanted
    assert len(rows) == model.config.vocab_size == (len(wanted) if source != "padded" else -(-len(wanted) // 16) * 16)
    states = {n: tensors_of(tmp_path / n)["model.embed_tokens.weight"].double() for n in tokens}
    for word, number in made.get_vocab().items():
        holders = [states[n][t.get_vocab()[word]] for n, t in tokens.items() if word in t.get_vocab()]
        torch.testing.assert_close(rows[number].double(), sum(holders) / len(holders), rtol=1e-6, atol=1e-7)
    words = " ".join(generator.choices([f"w{i}" for i in range(20)], k=12))
    ids = made(words, return_tensors="pt", return_token_type_ids=False)
    assert made.decode(ids.input_ids[0]) == words
    assert bool(model(**ids).logits.isfinite().all())
    assert made.chat_template == tokens["base"].chat_template and made.eos_token == "</s>"
    assert made.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1 </s> "
    assert model.generation_config.temperature == 0.7 and model.generation_config.eos_token_id == made.eos_token_id
    again = made.save_pretrained(tmp_path / "again") and transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == made.get_vocab()
    assert verify(tmp_path / "out") == []


def test_the_card_tells_models_of_one_name_apart_and_no_more_of_their_paths():
    names = [f"somewhere/private/run/branches/{k}/model" for k in (0, 1)]
    config = config_of({"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": 1.0}} for n in names]})
    card = model_card(config, "merge_method: linear")
    assert "- 0/model\n- 1/model\n" in card and "private" not in card
