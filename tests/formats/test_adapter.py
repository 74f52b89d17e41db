"""LoRA adapters folded tensor by tensor, against PEFT's own merge_and_unload in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.engine.adapter import Adapter
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.merging import merge_config
from anabranch.errors import CorruptedError, ModelError
from tiny_checkpoints import write_adapter, write_checkpoint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
         "num_hidden_layers": 2, "attention_bias": True}
MOE = {k: v for k, v in LLAMA.items() if k != "attention_bias"} | {
    "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 1}
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": False}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}),
    "untied_gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32, "tie_word_embeddings": False}),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {
        "text_config": LLAMA | {"model_type": "llama"}, "image_token_id": 39,
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", MOE),
    "bert": ("BertForSequenceClassification", "BertConfig", {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40, "num_hidden_layers": 2}),
}
ATTENTION = ["q_proj", "v_proj"]
# name: (base, LoraConfig)
VARIETIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": [*ATTENTION, "down_proj"]}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "rank pattern": ("llama", {"target_modules": [*ATTENTION, "o_proj"], "rank_pattern": {"v_proj": 2, "layers.1.q_proj": 8}}),
    "alpha pattern": ("llama", {"target_modules": ATTENTION, "rank_pattern": {".*v_proj": 2}, "alpha_pattern": {
        "^model.layers.0.self_attn.q_proj": 3, r"layers\.\d+\.self_attn\.v_proj": 5}}),
    "every linear": ("llama", {"target_modules": "all-linear"}),
    "bias of its own": ("llama", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "all biases": ("llama", {"target_modules": ATTENTION, "bias": "all"}),
    "lora bias": ("llama", {"target_modules": ATTENTION, "lora_bias": True}),
    "modules to save": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
                                      "ensure_weight_tying": True}),
    "tied, some tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 1]}),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 39, 0]}),
    "some tokens by name": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2]}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d square": ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "conv1d and embedding": ("gpt2", {"target_modules": ["c_attn", "attn.c_proj", "wte"], "fan_in_fan_out": True}),
    "conv1d square, linear head": ("untied_gpt2", {"target_modules": ["attn.c_proj", "lm_head"]}),
    "renamed on load": ("llava", {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "modules_to_save": ["linear_1"]}),
    "vision convolution": ("llava", {"target_modules": ["patch_embedding", "out_proj"]}),
    "expert parameters": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": [
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "rank_pattern": {"mlp.experts.down_proj": 2}}),
    "classifier": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
}


def keys(folder: Path) -> list[str]:
    return sorted(load_file(folder / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model, config, arguments = BASES[name]
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("bases") / f"base-{name}"
            built = getattr(transformers, model)(getattr(transformers, config)(**arguments))
            for parameter in built.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            built.save_pretrained(made[name])
        return made[name]

    return get


def load(folder: Path, name: str) -> Any:
    return getattr(transformers, BASES[name][0]).from_pretrained(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, bases: Callable[[str], Path]) -> Callable[[str], tuple[Path, Path]]:
    """Folder of the base, folder of an adapter of that variety with random numbers in every trained tensor."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(variety: str) -> tuple[Path, Path]:
        if variety not in made:
            base, settings = VARIETIES[variety]
            model = peft.get_peft_model(load(bases(base), base), peft.LoraConfig(r=4, lora_alpha=6, **settings))
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            made[variety] = bases(base), tmp_path_factory.mktemp("adapter")
            model.save_pretrained(made[variety][1])
        return made[variety]

    return get


@pytest.fixture()
def copied(tmp_path: Path, adapters: Callable[[str], tuple[Path, Path]]) -> Callable[..., tuple[Path, Path]]:
    """An adapter to spoil: settings changed, and tensors passed through a function."""
    def get(variety: str, change: Callable[[dict[str, torch.Tensor]], Any] | None = None,
            **settings: Any) -> tuple[Path, Path]:
        base, folder = adapters(variety)
        copy = Path(shutil.copytree(folder, tmp_path / "adapter"))
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | settings))
        if change:
            tensors = load_file(copy / "adapter_model.safetensors")
            save_file(change(tensors), copy / "adapter_model.safetensors")
        return base, copy

    return get


def refusal(base: Path, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        Adapter.open(folder, Checkpoint.open(base))
    return str(caught.value)


@pytest.mark.parametrize("variety", VARIETIES)
def test_equals_peft(tmp_path, adapters, variety):
    base, folder = adapters(variety)
    model = peft.PeftModel.from_pretrained(load(base, VARIETIES[variety][0]), folder).merge_and_unload()
    model.save_pretrained(tmp_path)
    wanted, checkpoint = load_file(tmp_path / "model.safetensors"), Checkpoint.open(base)
    adapter = Adapter.open(folder, checkpoint)
    assert len(adapter.warnings) == (variety in ("tied embedding", "conv1d and embedding"))
    assert set(wanted) == set(checkpoint.tensors)
    changed = set()
    for name in checkpoint.tensors:
        ours = adapter.folded(name) if adapter.touches(name) else checkpoint.read(name)
        assert ours.shape == wanted[name].shape and (ours - wanted[name]).abs().max() <= 1e-6, name
        changed |= {name} if not wanted[name].equal(checkpoint.read(name)) else set()
    assert changed == set(adapter.names) and changed


def test_what_is_touched(adapters):
    base, folder = adapters("modules to save")
    adapter = Adapter.open(folder, Checkpoint.open(base))
    assert {n for n in adapter.names if "_proj" not in n} == {
        "model.embed_tokens.weight", "lm_head.weight"} | {n for n in adapter.base.tensors if "norm" in n}
    assert adapter.touches("model.layers.0.self_attn.q_proj.weight") and not adapter.touches("nothing")


@pytest.mark.parametrize("variety", ["embedding", "tied embedding", "modules to save", "some tokens", "expert parameters",
                                     "lora bias"])
def test_rows_are_those_of_the_whole(adapters, monkeypatch, variety):
    monkeypatch.setattr("anabranch.engine.adapter.CHUNK", 48)  # three rows of 16 at a time
    base, folder = adapters(variety)
    adapter, random = Adapter.open(folder, Checkpoint.open(base)), np.random.default_rng(0)
    for name in adapter.names:
        whole = adapter.folded(name)
        every = np.arange(len(whole))
        for indices in (every, every[::-1], every[:0], random.integers(0, len(whole), 30), np.array([len(whole) - 1, 0])):
            rows = adapter.rows(name, indices)
            assert rows.dtype == torch.float32 and rows.equal(whole[torch.from_numpy(indices.copy())]), name


def test_rows_far_apart_form_no_more_than_themselves(adapters, monkeypatch):
    base, folder = adapters("embedding")
    adapter = Adapter.open(folder, Checkpoint.open(base))
    asked: list[int] = []
    entries = Adapter.entries

    def counted(self: Adapter, name: str, start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return entries(self, name, start, stop)

    monkeypatch.setattr("anabranch.engine.adapter.CHUNK", 64)  # four rows
    monkeypatch.setattr(Adapter, "entries", counted)
    assert adapter.rows("model.embed_tokens.weight", np.array([39, 0, 17])).shape == (3, 16)
    assert asked == [16, 16, 16]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("variety", ["plain", "conv1d and embedding", "expert parameters", "some tokens", "lora bias",
                                     "vision convolution"])
def test_bits_do_not_depend_on_the_cut(adapters, monkeypatch, variety, threads):
    """With products of 48 numbers at a time, so that these small tensors have many pieces."""
    monkeypatch.setattr("anabranch.engine.adapter.CHUNK", 48)
    base, folder = adapters(variety)
    adapter = Adapter.open(folder, Checkpoint.open(base))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in adapter.names:
            whole, count = adapter.folded(name), adapter.base.tensors[name].shape[0]
            for step in (1, 3, 7):
                pieces = [adapter.folded(name, slice(i, i + step)) for i in range(0, count, step)]
                assert torch.cat(pieces).equal(whole), (name, step)
            for start, stop in ((0, 5), (7, 60), (whole.numel() - 9, whole.numel()), (4, 4)):
                assert adapter.entries(name, start, stop).equal(whole.flatten()[start:stop])
    finally:
        torch.set_num_threads(before)


def test_bits_of_a_large_matrix(tmp_path):
    """At the real size of the pieces, rows by ones and by hundreds, one thread and two."""
    torch.manual_seed(0)
    name, path = "model.layers.0.mlp.up_proj", "base_model.model.model.layers.0.mlp.up_proj"
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file({f"{name}.weight": torch.randn(1100, 515).bfloat16()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    factors = {f"{path}.lora_A.weight": torch.randn(33, 515), f"{path}.lora_B.weight": torch.randn(1100, 33)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 33, "lora_alpha": 7}))
    base = Checkpoint.open(tmp_path / "base")
    adapter = Adapter.open(tmp_path / "adapter", base)
    whole = adapter.folded(f"{name}.weight")
    exact = base.read(f"{name}.weight").double() + 7 / 33 * (
        factors[f"{path}.lora_B.weight"].double() @ factors[f"{path}.lora_A.weight"].double())
    assert (whole - exact).abs().max() < 1e-5
    before = torch.get_num_threads()
    try:
        for threads, step in ((1, 1), (2, 100), (2, 127)):
            torch.set_num_threads(threads)
            pieces = [adapter.folded(f"{name}.weight", slice(i, i + step)) for i in range(0, 1100, step)]
            assert torch.cat(pieces).equal(whole)
            indices = np.arange(1099, -1, -step)
            assert adapter.rows(f"{name}.weight", indices).equal(whole[torch.from_numpy(indices)])
    finally:
        torch.set_num_threads(before)


def test_half_precision_is_widened(tmp_path, adapters):
    base, folder = adapters("plain")
    half = Path(shutil.copytree(base, tmp_path / "half"))
    save_file({k: v.bfloat16() for k, v in load_file(half / "model.safetensors").items()}, half / "model.safetensors")
    adapter = Adapter.open(folder, Checkpoint.open(half))
    name = "model.layers.1.mlp.down_proj.weight"
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name[:-7]}.lora_{side}.weight"] for side in "AB")
    assert (adapter.folded(name) - (adapter.base.read(name).float() + 1.5 * b @ a)).abs().max() < 1e-6
    assert "base-llama" in adapter.warnings[0]


def test_a_stored_copy_of_a_tied_head_follows(tmp_path, adapters):
    base, folder = adapters("tied embedding")
    copy = Path(shutil.copytree(base, tmp_path / base.name))
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copy / "model.safetensors")
    adapter = Adapter.open(folder, Checkpoint.open(copy))
    assert adapter.folded("lm_head.weight").equal(adapter.folded("model.embed_tokens.weight"))


def test_another_base_is_a_warning(copied):
    base, folder = copied("plain", base_model_name_or_path="somebody/other-7B")
    (warning,) = Adapter.open(folder, Checkpoint.open(base)).warnings
    assert "somebody/other-7B" in warning and str(base) in warning
    for named in (None, "", "somebody/BASE-llama", str(base)):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        assert Adapter.open(folder, Checkpoint.open(base)).warnings == ()


@pytest.mark.parametrize("settings, wanted", [
    ({"peft_type": "LOHA"}, "'LOHA'"), ({"peft_type": None}, "peft_type"), ({"use_dora": True}, "DoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"), ({"init_lora_weights": "olora"}, "olora"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"), ({"alora_invocation_tokens": [1]}, "invocation"),
    ({"r": 0}, "`r` is 0"), ({"r": 8}, "rank 8"), ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
    ({"rank_pattern": {"q_proj": 0}}, "'q_proj' is 0"), ({"alpha_pattern": {"q_(": 1}}, "no regular expression"),
    ({"rank_pattern": [1]}, "wanted an object"), ({"lora_alpha": "x"}, "'x'"), ({"target_parameters": "a"}, "list of names")])
def test_refused_by_its_settings(copied, settings, wanted):
    assert wanted in refusal(*copied("plain", **settings))


def test_real_adapters_of_other_kinds(tmp_path, bases):
    for config, remedy in ((peft.LoHaConfig(r=2, target_modules=ATTENTION), "Fold it with PEFT once"),
                           (peft.LoraConfig(use_dora=True, target_modules=ATTENTION), "anabranch lora apply BASE ADAPTER")):
        peft.get_peft_model(load(bases("llama"), "llama"), config).save_pretrained(tmp_path / "adapter")
        assert remedy in refusal(bases("llama"), tmp_path / "adapter")
        shutil.rmtree(tmp_path / "adapter")


def test_every_problem_in_one_message(copied):
    base, folder = copied("plain", use_dora=True, init_lora_weights="corda", use_qalora=True)
    text = refusal(base, folder)
    assert text.count("\n  - ") == 3 and str(folder) in text and str(base) in text


def test_other_shapes_and_names(copied):
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.zeros(20, 4)
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.zeros(16, 4)
        tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 16)
        del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(41, 16)
        return tensors

    text = refusal(*copied("plain", spoil))
    assert "layers.7.self_attn.q_proj.weight'" in text and "(20, 4)" in text and "(16, 16)" in text
    assert "stands alone" in text and "(41, 16)" in text and "resized" in text and text.count("\n  - ") == 4


@pytest.mark.parametrize("given", [[3, 40, 0], [3, -1, 0], ["a", "b", "c"], None, [1, 2], 5])
def test_tokens_that_are_not_there(copied, given):
    assert "token" in refusal(*copied("some tokens", trainable_token_indices=given))


def test_one_expert(tmp_path):
    """A parameter of three dimensions with a single expert in it."""
    torch.manual_seed(0)
    weight, a, b = torch.randn(1, 6, 5), torch.randn(2, 5), torch.randn(6, 2)
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    save_file({"layers.0.experts.down_proj": weight}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    path = "base_model.model.layers.0.experts"
    save_file({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_parameters": ["experts.down_proj"]}))
    adapter = Adapter.open(tmp_path / "adapter", Checkpoint.open(tmp_path / "base"))
    assert torch.allclose(adapter.folded("layers.0.experts.down_proj"), weight + 3 * (b @ a))


def test_square_experts_that_nothing_tells(tmp_path):
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    save_file({"layers.0.experts.down_proj": torch.ones(3, 6, 6)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    path = "base_model.model.layers.0.experts"
    save_file({f"{path}.lora_A.weight": torch.ones(6, 6), f"{path}.lora_B.weight": torch.ones(6, 6)},
              tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_parameters": ["experts.down_proj"]}))
    assert "square" in refusal(tmp_path / "base", tmp_path / "adapter")


def test_a_head_where_the_base_has_none(tmp_path, bases):
    for i, settings in enumerate(({"target_modules": ["q_proj", "lm_head"]},
                                  {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
                                  {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
                                  {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]})):
        model = peft.get_peft_model(load(bases("tied"), "tied"), peft.LoraConfig(r=2, **settings))
        torch.nn.init.ones_(next(p for n, p in model.named_parameters() if "modules_to_save" in n or "lora_A" in n))
        model.save_pretrained(tmp_path / str(i))
        assert "tie_word_embeddings" in refusal(bases("tied"), tmp_path / str(i))


def test_a_quantised_base(tmp_path, adapters):
    base, folder = adapters("plain")
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert "before it was quantised" in refusal(copy, folder)


def test_damaged_files(copied):
    base, folder = copied("plain")
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:40])
    with pytest.raises(CorruptedError, match="damaged or cut short"):
        Adapter.open(folder, Checkpoint.open(base))
    weights.write_bytes(data)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(CorruptedError, match="JSON"):
        Adapter.open(folder, Checkpoint.open(base))
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refusal(base, folder)
    (folder / "adapter_config.json").write_text("{}")
    weights.rename(folder / "adapter_model.bin")
    assert "pickled" in refusal(base, folder)


@pytest.mark.parametrize("how", ["models", "slices", "layer_slices", "linear"])
def test_what_a_merge_takes_over_byte_for_byte_has_its_adapter_too(how, tmp_path):
    """A copy of the file's bytes would lose the adapter without a word."""
    model, adapter = write_checkpoint(tmp_path / "model", dtype=torch.float32), write_adapter(tmp_path / "adapter", layers=2)
    folded, source = f"{model}+{adapter}", {"model": f"{model}+{adapter}", "layer_range": [0, 2]}
    config = {"models": {"merge_method": "passthrough", "models": [{"model": folded}]},
              "slices": {"merge_method": "passthrough", "slices": [{"sources": [source]}]},
              "layer_slices": {"layer_slices": [{"model": folded, "start": 0, "end": 2}]},
              "linear": {"merge_method": "linear", "models": [{"model": folded, "parameters": {"weight": 1.0}}]}}[how]
    merge_config(config, tmp_path / "out")
    opened = Checkpoint.open(model)
    wanted = Adapter.open(adapter, opened)
    made = load_file(tmp_path / "out" / "model.safetensors")
    changed = [name for name in made if not made[name].equal(opened.read(name))]
    assert changed == sorted(wanted.names) and len(changed) == 2
    assert all(made[name].equal(wanted.folded(name)) for name in changed)
