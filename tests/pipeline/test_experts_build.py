"""Dense models put side by side as experts: held to dense models and a token-by-token mixture, in transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from anabranch import cli_experts
from anabranch.errors import AnabranchError, ModelError, OutputError, RecipeError, ShapeMismatch
from anabranch.experts import build
from anabranch.experts.build import Options, build_experts, forecast_experts
from tiny_experts import HIDDEN, LAYERS, PROMPTS, WIDTH, SlowMixture, config_of, load, write_models

Models = tuple[Path, list[Path]]
IDS = torch.tensor([[3, 40, 77, 121, 9, 60, 210], [5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, list[Path]]:
    return write_models(tmp_path_factory.mktemp("llama"), tiny_base, "llama", 4)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, list[Path]]:
    return write_models(tmp_path_factory.mktemp("qwen2"), tiny_base, "qwen2", 3, dtype=torch.bfloat16, tied=True)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def router_rows(model: Any, layer: int) -> torch.Tensor:
    modules = dict(model.model.layers[layer].named_modules())
    return next(modules[n] for n in ("mlp.gate", "block_sparse_moe.router") if n in modules).weight


CASES = {
    "mixtral": ("llama", {}, "mixtral", None),
    "mistral": ("mistral", {}, "mixtral", None),
    "deepseek": ("llama", {"architecture": "DEEPSEEK"}, "granitemoeshared", None),
    "deepseek-shared": ("mistral", {}, "granitemoeshared", "plain"),
    "qwen2-shared": ("qwen2", {}, "qwen2_moe", "gated"),
    "qwen2-alone": ("qwen2", {}, "qwen2_moe", None),
    "qwen2-of-llama": ("llama", {"architecture": "qwen"}, "qwen2_moe", "gated"),
    "qwen3": ("qwen3", {}, "qwen3_moe", None),
}


@pytest.mark.parametrize("case", CASES)
def test_each_layout_loads_and_computes_the_mixture(case: str, tmp_path: Path, tiny_base: Path) -> None:
    kind, extra, model_type, shared = CASES[case]
    base, experts = write_models(tmp_path, tiny_base, kind, 4, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    config = config_of(base, experts[:3], **extra)
    if shared:  # FIX: it is neither the base nor one of the experts
        config["shared_experts"] = [{"source_model": str(experts[3]), "residual_scale": 0.5}]
        if shared == "gated":
            config["shared_experts"][0]["positive_prompts"] = PROMPTS[3]
    out = tmp_path / "deep" / "out"  # FIX: it need not exist, whatever the layout
    manifest = build_experts(config, out)
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type
    assert "auto_map" not in (out / "config.json").read_text()
    model, dense, others = load(out), load(base), [load(e) for e in experts]
    for layer in range(LAYERS):
        block = others[3].model.layers[layer].mlp
        with torch.no_grad():
            block.down_proj.weight *= 0.5
        gate = model.model.layers[layer].mlp.shared_expert_gate.weight if shared == "gated" else None
        dense.model.layers[layer].mlp = SlowMixture([o.model.layers[layer].mlp for o in others[:3]], router_rows(model, layer),
                                                    2, block if shared else None, gate)
    with torch.no_grad():
        ours, slow = model(input_ids=IDS).logits, dense(input_ids=IDS).logits
        torch.testing.assert_close(ours, slow, atol=2e-5, rtol=1e-4)
        generated = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, IDS.shape[1] + 4)
    one = 3 * HIDDEN * WIDTH * LAYERS
    total = sum(p.numel() for p in model.parameters())
    assert manifest.report["parameters"] == {"all": total, "active": total - one}


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_experts_that_are_all_the_base_compute_the_base(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    """Also through windows of attention, which the peer drops for Mixtral."""
    slides = {"use_sliding_window": True, "sliding_window": 3}
    window = {"mistral": {"sliding_window": 3}, "qwen2": slides | {"max_window_layers": 1},
              "qwen3": slides | {"max_window_layers": 0}}[kind]
    base, _ = write_models(tmp_path, tiny_base, kind, 0, tied=True, **window)
    config = config_of(base, [base, base], gate_mode="random")
    build_experts(config, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(input_ids=IDS).logits, load(base)(input_ids=IDS).logits)


def test_the_peers_dialect_drops_mistrals_window_and_says_so(tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path, tiny_base, "mistral", 2, sliding_window=3)
    said: list[str] = []
    build_experts(config_of(base, experts, gate_mode="random", dialect="mergekit"), tmp_path / "out", warn=said.append)
    assert json.loads((tmp_path / "out/config.json").read_text())["sliding_window"] is None
    assert any("3 tokens back" in text for text in said)


def test_names_shapes_and_scales_of_expert_tensors(llama: Models, tmp_path: Path) -> None:
    """C76; C75's second half: `down` alone is scaled."""
    base, experts = llama
    config = config_of(base, experts[:2], gate_mode="random", dtype="bfloat16")
    config["experts"][1]["residual_scale"] = 0.3
    build_experts(config, tmp_path / "out", max_shard_size="9KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found, dense = tensors_of(tmp_path / "out"), [tensors_of(e) for e in experts]
    original = tensors_of(base)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp."
        fused, down = found[at + "experts.gate_up_proj"], found[at + "experts.down_proj"]
        assert fused.shape == (2, 2 * WIDTH, HIDDEN) and down.shape == (2, HIDDEN, WIDTH)
        for e in range(2):
            assert fused[e, :WIDTH].equal(dense[e][at + "gate_proj.weight"].bfloat16())
            assert fused[e, WIDTH:].equal(dense[e][at + "up_proj.weight"].bfloat16())
            assert down[e].equal((dense[e][at + "down_proj.weight"] * (0.3 if e else 1.0)).bfloat16())
        assert found[at + "gate.weight"].shape == (2, HIDDEN)
    rest = {n for n in original if ".mlp." not in n}
    assert {n for n in found if ".mlp." not in n} == rest and all(found[n].equal(original[n].bfloat16()) for n in rest)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}


def test_noise_is_of_the_wanted_size_seeded_and_rounded_once(llama: Models, tmp_path: Path) -> None:
    base, experts = llama
    config = config_of(base, [experts[0], experts[0]], gate_mode="random")
    config["experts"][0]["noise_scale"] = config["experts"][1]["noise_scale"] = 0.5
    for name, seed, threads in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        build_experts(config, tmp_path / name, Options(seed=seed), threads=threads)
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert all(a[n].equal(b[n]) for n in a) and (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors").read_bytes()
    key, plain = "model.layers.0.mlp.experts.down_proj", tensors_of(experts[0])["model.layers.0.mlp.down_proj.weight"]
    noise = (a[key] - plain) / 0.5
    assert abs(float(noise.std()) - 1) < 0.1 and abs(float(noise.mean())) < 0.1
    assert not a[key][0].equal(a[key][1]) and not a[key].equal(c[key])


def test_lora_experts_and_base_are_folded(qwen2: Models, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, experts = qwen2
    adapters = []
    for number, of in enumerate((base, experts[0])):
        torch.manual_seed(number)
        model = peft.get_peft_model(load(of), peft.LoraConfig(r=2, init_lora_weights=False,
                                                              target_modules=["q_proj", "gate_proj", "down_proj"]))
        model.save_pretrained(tmp_path / f"adapter-{number}")
        adapters.append(model.merge_and_unload().state_dict())
    config = config_of(base, [experts[0], experts[1]], gate_mode="hidden", dtype="float32")
    config["base_model"] += f"+{tmp_path / 'adapter-0'}"
    config["experts"][0]["source_model"] += f"+{tmp_path / 'adapter-1'}"
    build_experts(config, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        torch.testing.assert_close(found[f"{at}self_attn.q_proj.weight"], adapters[0][f"{at}self_attn.q_proj.weight"])
        for which in ("gate", "up", "down"):
            torch.testing.assert_close(found[f"{at}mlp.experts.0.{which}_proj.weight"],
                                       adapters[1][f"{at}mlp.{which}_proj.weight"])


def test_files_are_carried_as_they_are(qwen2: Models, tmp_path: Path) -> None:
    """FIX: the peer saves the tokenizer with padding on the left and another pad token."""
    base, experts = qwen2
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump(config_of(base, experts)))
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    build_experts(tmp_path / "experts.yaml", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert (tmp_path / "out/mergekit_moe_config.yml").read_bytes() == (tmp_path / "experts.yaml").read_bytes()
    model = load(tmp_path / "out", torch.bfloat16)  # tied: no head in the files
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_again_does_nothing_and_a_changed_expert_is_seen(llama: Models, tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path, tiny_base, "llama", 2)
    config = config_of(base, experts)
    first = build_experts(config, tmp_path / "out")
    stamp = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert build_experts(config, tmp_path / "out") == first
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == stamp
    for file in experts[1].glob("*.safetensors"):
        (experts[0] / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OutputError):
        build_experts(config, tmp_path / "out")


def test_again_makes_no_router_first(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where what is there is of other settings, or nothing of ours."""
    base, experts = write_models(tmp_path, tiny_base, "llama", 2)
    (tmp_path / "texts.txt").write_text("one two three\n" * 3)
    options = Options(calibration=tmp_path / "texts.txt", steps=2)
    first = build_experts(config_of(base, experts), tmp_path / "out", options)

    def never(*_: Any) -> Any:
        raise AssertionError("routers are made again")

    monkeypatch.setattr(build, "_routed", never)
    assert build_experts(config_of(base, experts), tmp_path / "out", options) == first
    with pytest.raises(OutputError, match=r"there, .* wanted now"):
        build_experts(config_of(base, experts), tmp_path / "out", Options(calibration=tmp_path / "texts.txt", steps=3))
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(OutputError, match="no readable"):
        build_experts(config_of(base, experts), tmp_path / "out", options)
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(OutputError, match="something else"):
        build_experts(config_of(base, experts), tmp_path / "out", options)


def test_memory_for_routers_is_told_and_held_to(llama: Models, tmp_path: Path) -> None:
    base, experts = llama
    (tmp_path / "texts.txt").write_text("one two three\n" * 3)
    config, asked = config_of(base, experts), Options(calibration=tmp_path / "texts.txt")
    plan = build._plan(config, Options())
    layer = (4 * 3 * HIDDEN * WIDTH + 2 * HIDDEN + 4 * HIDDEN + HIDDEN * (2 * HIDDEN + 2 * HIDDEN // 2)) * 4
    assert build._router_bytes(plan) == layer + 2 * 4 * 4 * HIDDEN * WIDTH
    total, _ = build._parameters(plan)
    assert build._router_bytes(build._plan(config, asked)) == 4 * total + 2 * 4 * 4 * HIDDEN * WIDTH
    assert any("memory for routers" in text for text in forecast_experts(config, tmp_path / "out"))
    for options, words in ((Options(), "holds a layer"), (asked, "the whole mixture")):
        with pytest.raises(RecipeError, match=words):
            build_experts(config, tmp_path / "out", options, memory="1MB")
    for entry in config["experts"]:
        del entry["positive_prompts"]
    lines = forecast_experts(config | {"gate_mode": "random"}, tmp_path / "out")
    assert not any("memory for routers" in text for text in lines)


def test_an_adapter_of_attention_alone_makes_no_expert_and_that_is_told(llama: Models, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, experts = llama
    for name, targets in (("attention", ["q_proj", "v_proj"]), ("both", ["q_proj", "up_proj"])):
        peft.get_peft_model(load(base), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
                            ).save_pretrained(tmp_path / name)
    config = config_of(base, [experts[0], Path(f"{base}+{tmp_path}/attention"), Path(f"{base}+{tmp_path}/both"), experts[1]])
    said: list[str] = []
    forecast_experts(config, tmp_path / "out", warn=said.append)
    told = [text for text in said if "changes nothing in the feed-forward" in text]
    assert len(told) == 1 and told[0].startswith("experts[1]")


def test_windows_of_other_layouts(tmp_path: Path, tiny_base: Path) -> None:
    base, _ = write_models(tmp_path / "mistral", tiny_base, "mistral", 0, sliding_window=3)
    build_experts(config_of(base, [base, base], gate_mode="random", architecture="qwen"), tmp_path / "qwen")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "qwen")(input_ids=IDS).logits, load(base)(input_ids=IDS).logits)
    said: list[str] = []
    config = config_of(base, [base, base], gate_mode="random", architecture="deepseek")
    forecast_experts(config, tmp_path / "x", warn=said.append)
    assert any("sees 3 tokens back, and DeepSeek MoE's all of them" in text for text in said)
    mixed, _ = write_models(tmp_path / "mixed", tiny_base, "qwen3", 0, use_sliding_window=True, sliding_window=3,
                            max_window_layers=1)
    with pytest.raises(ModelError, match="one kind for all"):
        forecast_experts(config_of(mixed, [mixed, mixed], gate_mode="random"), tmp_path / "x")


@pytest.mark.parametrize(("kind", "architecture"), [("llama", "mixtral"), ("llama", "deepseek"), ("mistral", "qwen")])
def test_heads_of_their_own_size_and_scaled_positions(kind: str, architecture: str, tmp_path: Path, tiny_base: Path) -> None:
    """Neither is in a config by default: lost, the mixture would compute something else, or not load."""
    rope = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8}
    base, _ = write_models(tmp_path, tiny_base, kind, 0, head_dim=8, rope_parameters=rope)
    build_experts(config_of(base, [base, base], gate_mode="random", architecture=architecture), tmp_path / "out")
    model, dense = load(tmp_path / "out"), load(base)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, dense(input_ids=IDS).logits, atol=2e-6, rtol=1e-4)
        written = [one.generate(IDS[:1], max_new_tokens=12, do_sample=False, eos_token_id=None) for one in (model, dense)]
    assert written[0].equal(written[1])  # by way of the cache


def test_which_layout_is_taken_where_several_fit_is_told(llama: Models, tmp_path: Path) -> None:
    """Mixtral is taken in silence, as by the peer; else the first that fits."""
    base, experts = llama
    said: list[str] = []
    config = config_of(base, experts[:2], gate_mode="random")
    assert "Mixtral" in forecast_experts(config, tmp_path / "out", warn=said.append)[0] and not said
    config["shared_experts"] = [{"source_model": str(experts[2])}]
    assert "DeepSeek" in forecast_experts(config, tmp_path / "out", warn=said.append)[0]
    assert said == ["the models fit DeepSeek MoE, Qwen MoE; DeepSeek MoE is taken. Say which with `architecture`"]


BROKEN: dict[str, tuple[dict[str, Any], type[AnabranchError], str]] = {
    "gate mode": ({"gate_mode": "hiden"}, RecipeError, "hidden"),
    "too few": ({"experts_per_token": 4}, RecipeError, "each token is to pass 4 experts"),
    "none per token": ({"experts_per_token": 0}, RecipeError, "wanted a whole number from 1"),
    "unknown key": ({"expert_per_token": 1}, RecipeError, "experts_per_token"),
    "dtype": ({"dtype": "int8"}, RecipeError, "bfloat16"),
    "no prompts": ({"experts": [{"positive_prompts": []}, {}]}, RecipeError, "experts[0]: no positive_prompts"),
    "no prompts for averages": ({"gate_mode": "hidden_avg", "experts": [{"positive_prompts": None}, {}]}, RecipeError,
                                "no positive_prompts"),
    "same prompts": ({"experts": [{"positive_prompts": ["a"]}, {"positive_prompts": ["a"]}]}, RecipeError, "same prompts"),
    "all the same": ({"experts": [{"source_model": 1}, {"source_model": 1}]}, RecipeError, "not-useful-without-training"),
    "architecture": ({"architecture": "Mixtrel"}, RecipeError, "Mixtral"),
    "qwen3 of llama": ({"architecture": "qwen3"}, RecipeError, "holds qwen3"),
    "two shared": ({"shared_experts": [{"source_model": 3}, {"source_model": 4}]}, RecipeError, "there are 2"),
    "shared in mixtral": ({"architecture": "mixtral", "shared_experts": [{"source_model": 3}]}, RecipeError,
                          "no shared expert"),
    "deepseek's shared with prompts": ({"architecture": "deepseek", "shared_experts": [
        {"source_model": 3, "positive_prompts": ["x"]}]}, RecipeError, "takes no prompts"),
    "qwen's shared without": ({"architecture": "qwen", "shared_experts": [{"source_model": 3}]}, RecipeError,
                              "needs positive_prompts"),
    "no model": ({"base_model": "nowhere/at-all/x"}, ModelError, "no such folder"),
    "not a mapping": ({"experts": ["a"]}, RecipeError, "experts.0"),
    "negative noise": ({"experts": [{"noise_scale": -1}, {}]}, RecipeError, "noise_scale"),
    "not a number": ({"experts": [{"residual_scale": ".nan"}, {}]}, RecipeError, "residual_scale"),
    "an empty prompt": ({"experts": [{"positive_prompts": [""]}, {}]}, ModelError, "has no token"),
    "two plus": ({"base_model": "a+b+c"}, RecipeError, "more than one `+`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_is_refused_before_a_byte_is_written(case: str, llama: Models, tmp_path: Path) -> None:
    base, experts = llama
    changes, kind, words = BROKEN[case]
    config = config_of(base, experts[:2])
    entries = changes.get("experts", [{}, {}])
    for key in ("experts", "shared_experts"):
        for i, entry in enumerate(changes.get(key, [])):
            if isinstance(entry, dict):
                entry = entry | ({"source_model": str(experts[entry["source_model"] - 1])} if "source_model" in entry else {})
                if key == "experts":
                    config["experts"][i] |= entry
                else:
                    config.setdefault(key, []).append(entry)
    if any(not isinstance(e, dict) for e in entries):
        config["experts"] = entries
    config |= {k: v for k, v in changes.items() if k not in ("experts", "shared_experts")}
    with pytest.raises(kind) as raised:
        build_experts(config, tmp_path / "out")
    assert words in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_several_problems_are_one_message(llama: Models, tmp_path: Path) -> None:
    config = config_of(llama[0], [Path("x y"), Path("z")], experts_per_token=5)
    del config["experts"][0]["positive_prompts"]
    with pytest.raises(RecipeError) as raised:
        build_experts(config, tmp_path / "out")
    assert "pass 5 experts" in str(raised.value) and "no positive_prompts" in str(raised.value)


def test_models_that_do_not_fit_together(llama: Models, qwen2: Models, tmp_path: Path,
                                         tiny_base: Path) -> None:
    wide, _ = write_models(tmp_path / "wide", tiny_base, "llama", 0, intermediate_size=32)
    deep, _ = write_models(tmp_path / "deep", tiny_base, "llama", 0, num_hidden_layers=3)
    fat, _ = write_models(tmp_path / "fat", tiny_base, "llama", 0, hidden_size=32)
    with pytest.raises(ShapeMismatch) as raised:
        build_experts(config_of(llama[0], [llama[1][0], wide, deep, fat]), tmp_path / "out")
    assert all(words in str(raised.value) for words in ("32 wide", "3 layers", "wanted a hidden size of 16"))
    silent, other = write_models(tmp_path / "silent", tiny_base, "llama", 1)
    for folder, act in ((silent, None), (other[0], "gelu")):  # the class's own, silu; and another one
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "hidden_act"}
                                                       | ({"hidden_act": act} if act else {})))
    forecast_experts(config_of(llama[0], [llama[1][0], silent]), tmp_path / "out")
    with pytest.raises(ShapeMismatch, match="activation is gelu, the base's silu"):
        build_experts(config_of(llama[0], [llama[1][0], silent, other[0]]), tmp_path / "out")
    with pytest.raises(RecipeError, match="several kinds"):
        build_experts(config_of(llama[0], [llama[1][0], qwen2[1][0]]), tmp_path / "out")
    biased, _ = write_models(tmp_path / "biased", tiny_base, "llama", 0, mlp_bias=True)
    with pytest.raises(ModelError, match="has biases"):
        build_experts(config_of(llama[0], [llama[1][0], biased]), tmp_path / "out")
    attended, more = write_models(tmp_path / "attended", tiny_base, "llama", 2, attention_bias=True)
    assert "DeepSeek" in forecast_experts(config_of(attended, more), tmp_path / "out")[0]
    with pytest.raises(RecipeError, match="no biases"):
        build_experts(config_of(attended, more, architecture="mixtral"), tmp_path / "out")
    with pytest.raises(RecipeError, match="no bias on the output"):
        build_experts(config_of(attended, more, architecture="qwen moe"), tmp_path / "out")


def test_a_config_that_its_weights_belie(llama: Models, tmp_path: Path, tiny_base: Path) -> None:
    """In the base's feed-forward, which the result does not hold, but which reads the prompts."""
    odd, experts = write_models(tmp_path / "odd", tiny_base, "llama", 2)
    said = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(said | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match=r"by config\.json"):
        build_experts(config_of(odd, experts), tmp_path / "out")
    for value in (10**9, "many", -1, None):
        (odd / "config.json").write_text(json.dumps(said | {"num_hidden_layers": value}))
        with pytest.raises(ModelError, match="dense feed-forward"):
            build_experts(config_of(odd, experts), tmp_path / "out")
    (odd / "config.json").write_text(json.dumps(said | {"num_attention_heads": "four"}))
    with pytest.raises(ModelError, match="transformers"):
        build_experts(config_of(odd, experts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_of_one_layer_at_a_time(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading prompts and measuring routers never ask for a layer's tensors before those of the layer before are used."""
    from anabranch.experts import streamed

    asked: list[int] = []
    real = streamed._fill

    def noting(layer: Any, buffers: Any, *others: Any) -> None:
        real(layer, buffers, *others)
        asked.append(len(buffers))

    monkeypatch.setattr(streamed, "_fill", noting)
    base, experts = write_models(tmp_path / "dense", tiny_base, "llama", 2, num_hidden_layers=4)
    build_experts(config_of(base, experts), tmp_path / "out")
    assert len(asked) == 8 and len(set(asked[:4])) == 1 and len(set(asked[4:])) == 1  # the same buffers for every layer


def test_the_command(llama: Models, tmp_path: Path) -> None:
    config = tmp_path / "experts.yaml"
    config.write_text(yaml.safe_dump(config_of(*llama)))
    run = CliRunner().invoke(cli_experts.app, [str(config), str(tmp_path / "out"), "--dry-run"], catch_exceptions=False)
    assert "layout: Mixtral" in run.stdout and "writes:" in run.stdout and not (tmp_path / "out").exists()
    run = CliRunner().invoke(cli_experts.app, [str(config), str(tmp_path / "out")], catch_exceptions=False)
    assert run.exit_code == 0 and "mean entropy" in run.stdout and "of which a token passes" in run.stdout
    load(tmp_path / "out")
    run = CliRunner().invoke(cli_experts.app, [str(config), str(tmp_path / "other"), "--json"], catch_exceptions=False)
    assert json.loads(run.stdout.splitlines()[-1])["router"]["before"]["experts"] == 4
    run = CliRunner().invoke(cli_experts.app, [str(config), str(tmp_path / "x"), "--steps", "3", "--learning-rate", "0.1"])
    assert isinstance(run.exception, RecipeError) and "--steps, --learning-rate" in str(run.exception)
    (tmp_path / "few.txt").write_text("one two three\n")
    run = CliRunner().invoke(cli_experts.app, [str(config), str(tmp_path / "few"), "--steps", "3", "--calibrate",
                                               str(tmp_path / "few.txt")], catch_exceptions=False)
    assert "3 steps" in run.stdout and "on 1 texts, the same that it was trained on" in run.stdout
    (tmp_path / "bad.yaml").write_text("base_model: [1\n")
    run = CliRunner().invoke(cli_experts.app, ["build", str(tmp_path / "bad.yaml"), str(tmp_path / "x"), "--json"])
    assert run.exit_code == 2 and json.loads(run.stdout)["kind"] == "RecipeError"
