"""`anabranch lora extract`: held to PEFT, which loads what it writes, and to numpy's dense SVD. Merge specification, 7.4."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.errors import AnabranchError, ModelError, OutputError, RecipeError, ShapeMismatch
from anabranch.lora.apply import apply
from anabranch.lora.extract import extract, forecast
from anabranch.lora.factors import factors_folder

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
         "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": False, "attention_bias": True}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4}),
}
Pair = tuple[Path, Path]


def load(name: str, folder: Path) -> Any:
    return getattr(transformers, MODELS[name][0]).from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """(fine-tune, base) of an architecture in bfloat16, the fine-tune in shards; `moved`: which tensors changed."""
    made: dict[tuple[str, str], Pair] = {}

    def get(name: str, moved: str = "") -> Pair:
        if (name, moved) not in made:
            kind, config, settings = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).to(torch.bfloat16)
            folder = tmp_path_factory.mktemp("models")
            model.save_pretrained(folder / "base")
            with torch.no_grad():
                for one, parameter in model.named_parameters():
                    if moved in one:
                        parameter += 0.01 * torch.randn(parameter.shape)
            model.save_pretrained(folder / "tuned", max_shard_size="20KB")
            made[name, moved] = folder / "tuned", folder / "base"
        return made[name, moved]

    return get


def with_peft(name: str, base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load(name, base), adapter)


def outputs(name: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        if name == "clip":
            return model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).last_hidden_state
        return model(torch.arange(20)[None]).logits


def delta(adapter: Path, path: str) -> np.ndarray:
    state = load_file(adapter / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{path}.lora_{side}.weight"].flatten(1).float().numpy() for side in "AB")
    return b @ a


def difference(pair: Pair, tensor: str) -> np.ndarray:
    tuned = {k: v for p in sorted(pair[0].glob("*.safetensors")) for k, v in load_file(p).items()}
    return (tuned[tensor].float() - load_file(pair[1] / "model.safetensors")[tensor].float()).numpy().astype(float)


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "clip"])
def test_peft_loads_it_and_gives_the_fine_tune(name: str, embed: bool, pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """C74, with biases, norms, embeddings, tied heads, GPT-2's Conv1D and a convolution."""
    tuned, base = pairs(name)
    save = ["embeddings"] if name == "clip" else []  # a class embedding of its own, and modules inside
    extract(tuned, base, tmp_path / "a", rank=64, embed_lora=embed, dtype="float32", save_modules=save)
    wanted = outputs(name, load(name, tuned))
    assert float((wanted - outputs(name, load(name, base))).abs().max()) > 1e-2
    model = with_peft(name, base, tmp_path / "a")
    torch.testing.assert_close(outputs(name, model), wanted, atol=3e-6, rtol=0)
    if not (embed and name == "tied"):  # PEFT adds the factors of a tied embedding twice
        torch.testing.assert_close(outputs(name, model.merge_and_unload()), wanted, atol=3e-6, rtol=0)


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_applied_at_full_rank_it_is_the_fine_tune_to_the_bit(name: str, embed: bool, pairs: Callable[..., Pair],
                                                             tmp_path: Path) -> None:
    tuned, base = pairs(name)
    extract(tuned, base, tmp_path / "a", rank=64, embed_lora=embed, dtype="float32")
    apply(base, tmp_path / "a", tmp_path / "out")
    wanted = {k: v for p in tuned.glob("*.safetensors") for k, v in load_file(p).items()}
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == wanted.keys()
    differing = {k for k in wanted if not torch.equal(got[k], wanted[k])}
    for name_ in differing:  # where float32 falls on the other side of a rounding: one unit in the last place
        apart = (got[name_].float() - wanted[name_].float()).abs() / wanted[name_].float().abs().clamp(min=1e-6)
        assert float(apart.max()) <= 2**-7
    assert sum(int((got[k] != wanted[k]).sum()) for k in wanted) <= 1e-3 * sum(v.numel() for v in wanted.values())


def test_factors_in_the_stored_dtype_stay_within_a_rounding(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    tuned, base = pairs("llama")
    manifest = extract(tuned, base, tmp_path / "a", rank=64)
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert 0 < manifest.report["relative_error"] < 2**-7  # two rounded factors
    apply(base, tmp_path / "a", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for file in tuned.glob("*.safetensors"):
        for name, wanted in load_file(file).items():
            apart = (got[name].float() - wanted.float()).abs()
            assert bool((apart <= 2**-7 * wanted.float().abs() + 2e-4).all()), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rank", [64, 4])
def test_the_error_that_is_told_is_that_of_the_factors_as_stored(rank: int, dtype: str, pairs: Callable[..., Pair],
                                                                 tmp_path: Path) -> None:
    """With the loss of rank, and with rounding, which is told by itself as well."""
    pair = pairs("llama")
    manifest = extract(*pair, tmp_path / "a", rank=rank, dtype=dtype, include=["proj"])
    told = json.loads((tmp_path / "a" / "lora_report.json").read_text())
    wrong = total = alone = 0.0
    for path, one in told["matrices"].items():
        d = difference(pair, f"{path}.weight")
        u, s, vt = np.linalg.svd(d, full_matrices=False)
        missing = float(((d - delta(tmp_path / "a", path).astype(float)) ** 2).sum())
        assert one["relative_error"] == pytest.approx((missing / (s**2).sum()) ** 0.5, rel=1e-2, abs=5e-7)
        alone += float((((u[:, :rank] * s[:rank]) @ vt[:rank] - delta(tmp_path / "a", path)) ** 2).sum())
        wrong, total = wrong + missing, total + float((s**2).sum())
    report = manifest.report
    assert report["factors"] == dtype
    assert report["relative_error"] == pytest.approx((wrong / total) ** 0.5, rel=1e-3, abs=5e-7)
    assert report["rounding"] == pytest.approx((alone / total) ** 0.5, rel=1e-2, abs=5e-7)
    assert (report["rounding"] > 1e-4) == (dtype != "float32")
    if dtype == "bfloat16":  # and PEFT reads what it says
        with_peft("llama", pair[1], tmp_path / "a")


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_it_is_the_best_of_its_rank(path: str, pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """C74, and the report: kept energy and relative error against a dense SVD in float64."""
    pair = pairs("llama")
    extract(*pair, tmp_path / "a", rank=5, dtype="float32", include=["proj"])
    d = difference(pair, f"{path}.weight")
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    np.testing.assert_allclose(delta(tmp_path / "a", path), (u[:, :5] * s[:5]) @ vt[:5], atol=2e-7)
    told = json.loads((tmp_path / "a" / "lora_report.json").read_text())["matrices"][path]
    assert told["rank"] == 5
    assert told["kept_energy"] == pytest.approx((s[:5] ** 2).sum() / (s**2).sum(), abs=2e-6)
    assert told["relative_error"] == pytest.approx(np.sqrt((s[5:] ** 2).sum() / (s**2).sum()), rel=1e-3)


def test_alpha_over_r_is_one_in_every_module(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    extract(*pairs("llama"), tmp_path / "a", energy=0.8)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"] != {}
    model = with_peft("llama", pairs("llama")[1], tmp_path / "a")
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {1.0}


def test_energy_and_budget_choose_the_ranks(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs("llama")
    extract(*pair, tmp_path / "e", energy=0.9, include=["proj"])
    report = json.loads((tmp_path / "e" / "lora_report.json").read_text())["matrices"]
    spectra = {path: np.linalg.svd(difference(pair, f"{path}.weight"), compute_uv=False) for path in report}
    for path, s in spectra.items():
        assert report[path]["rank"] == int(((s**2).cumsum() < 0.9 * (s**2).sum()).sum()) + 1
    manifest = extract(*pair, tmp_path / "b", budget=4000, include=["proj"])
    assert 3800 <= manifest.report["parameters"] <= 4000
    chosen = json.loads((tmp_path / "b" / "lora_report.json").read_text())["matrices"]
    gain = {path: s**2 / sum(report[path]["shape"]) for path, s in spectra.items()}
    weakest = min(gain[path][one["rank"] - 1] for path, one in chosen.items())
    assert all(gain[p][chosen[p]["rank"] if p in chosen else 0] <= weakest * (1 + 1e-5) for p in spectra)


def test_a_budget_that_one_matrix_takes_looks_further_there(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """At first a few directions of each are found; what is kept of them for the next look is not taken for its result."""
    tuned, base = pairs("llama")
    folder, name = tmp_path / "tuned", "model.layers.0.mlp.up_proj"
    folder.mkdir()
    (folder / "config.json").write_bytes((tuned / "config.json").read_bytes())
    state = {k: v for p in tuned.glob("*.safetensors") for k, v in load_file(p).items()}
    torch.manual_seed(3)
    state[f"{name}.weight"] = torch.randn(48, 32).to(torch.bfloat16)
    save_file(state, folder / "model.safetensors")
    manifest = extract(folder, base, tmp_path / "a", budget=2000, include=["proj"], dtype="float32")
    assert manifest.report["parameters"] == 2000 and manifest.report["ranks"] == [25, 25]
    d = difference((folder, base), f"{name}.weight")
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    np.testing.assert_allclose(delta(tmp_path / "a", name), (u[:, :25] * s[:25]) @ vt[:25], atol=1e-4)


def test_only_what_changed_is_taken(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """FIX of 7.4: modules without a difference; norms and embeddings only where they changed."""
    pair = pairs("llama", "layers.0.mlp")
    extract(*pair, tmp_path / "a", rank=4)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    at = "base_model.model.model.layers.0.mlp."
    assert {k.split(".lora_")[0] for k in keys} == {f"{at}{n}_proj" for n in ("gate", "up", "down")}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none"
    model = with_peft("llama", pair[1], tmp_path / "a")  # and PEFT wraps those three alone
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == 3
    assert all("layers.0" in t for t in config["target_modules"])


def test_a_bias_alone_is_saved_where_peft_reads_it(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """FIX of 7.4: the peer writes `lora_B.bias`, and PEFT passes over it."""
    tuned, base = pairs("llama", "self_attn")
    extract(tuned, base, tmp_path / "a", rank=32, dtype="float32")
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert not any("lora_B.bias" in k for k in keys) and any(k.endswith("q_proj.base_layer.bias") for k in keys)
    got, wanted = outputs("llama", with_peft("llama", base, tmp_path / "a")), outputs("llama", load("llama", tuned))
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


def test_the_difference_is_formed_in_float32(tmp_path: Path, pairs: Callable[..., Pair]) -> None:
    """FIX of 7.4: in bfloat16 a difference of neighbours is right, and one of numbers far apart is rounded."""
    _, base = pairs("llama", "layers.0.mlp")
    state = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((base / "config.json").read_bytes())
    change = torch.zeros_like(state[name])
    change[0, 0] = 1.0
    state[name] = (state[name].float() + change.float()).to(torch.bfloat16)
    save_file(state, tuned / "model.safetensors")
    exact = difference((tuned, base), name)
    rounded = (state[name] - load_file(base / "model.safetensors")[name]).float().numpy()
    assert np.abs(exact - rounded).max() > 1e-4  # what the peer would have had
    extract(tuned, base, tmp_path / "a", rank=64, dtype="float32")
    np.testing.assert_allclose(delta(tmp_path / "a", "model.layers.0.mlp.up_proj"), exact, atol=1e-6)


def test_a_convolution_is_out_by_rest(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs("clip")
    with pytest.raises(ModelError, match=r"'embeddings\.class_embedding'"):
        extract(*pair, tmp_path / "a", rank=3)
    extract(*pair, tmp_path / "a", rank=3, dtype="float32", skip_undecomposable=True)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "patch_embedding" in config["target_modules"]
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    [name] = [k for k in state if k.endswith("patch_embedding.lora_A.weight")]
    assert state[name].shape == (3, 3, 4, 4)
    weight = next(k for k in load_file(pair[1] / "model.safetensors") if k.endswith("patch_embedding.weight"))
    d = difference(pair, weight).reshape(16, -1)
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    np.testing.assert_allclose(delta(tmp_path / "a", path), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-6)


@pytest.mark.parametrize("distribute", [True, False])
def test_singular_values_are_shared_or_all_in_a(distribute: bool, pairs: Callable[..., Pair], tmp_path: Path) -> None:
    extract(*pairs("llama"), tmp_path / "a", rank=4, dtype="float32", distribute_scale=distribute)
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"] for side in "AB")
    lengths = b.norm(dim=0)
    torch.testing.assert_close(lengths, a.norm(dim=1) if distribute else torch.ones(4), rtol=1e-4, atol=1e-5)


def test_patterns_names_and_what_is_left_out(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    said: list[str] = []
    manifest = extract(*pairs("llama"), tmp_path / "a", rank=4, include=[r"layers\.1"], exclude=["q_proj"],
                       save_modules=["down_proj"], skip_undecomposable=True, warn=said.append)
    keys = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    at = "base_model.model.model.layers.1."
    assert f"{at}mlp.down_proj.weight" in keys and f"{at}mlp.up_proj.lora_A.weight" in keys
    assert not any("q_proj" in k or "norm" in k for k in keys)
    assert {k for k in keys if "layers.0" in k} == {"base_model.model.model.layers.0.mlp.down_proj.weight"}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(manifest.report["saved_whole"])
    left = manifest.report["left_out"]
    assert left["model.layers.1.input_layernorm.weight"] == "has no low-rank form"
    assert left["model.layers.1.self_attn.q_proj.weight"] == "not selected"
    assert any("not in the adapter" in text for text in said)


def test_singular_values_not_above_epsilon_go_and_so_do_matrices(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs("llama")
    s = {p: np.linalg.svd(difference(pair, f"model.layers.0.mlp.{p}_proj.weight"), compute_uv=False) for p in ("up", "down")}
    epsilon = float(s["up"][3] + s["up"][4]) / 2
    extract(*pair, tmp_path / "a", rank=64, sv_epsilon=epsilon, include=["layers.0.mlp"])
    told = json.loads((tmp_path / "a" / "lora_report.json").read_text())["matrices"]
    assert told["model.layers.0.mlp.up_proj"]["rank"] == 4
    assert told["model.layers.0.mlp.down_proj"]["rank"] == int((s["down"] > epsilon).sum())
    with pytest.raises(ModelError, match="nothing to extract"):
        extract(*pair, tmp_path / "b", rank=4, sv_epsilon=1e9, include=["mlp"], exclude=["embed", "head"])


def test_a_vocabulary_that_grew(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """KEEP of 7.4: different sizes force the embeddings to be saved whole; PEFT loads them into a resized base."""
    _, base = pairs("llama")
    model = load("llama", base)
    model.resize_token_embeddings(70)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.01
    model.save_pretrained(tmp_path / "tuned")
    said: list[str] = []
    extract(tmp_path / "tuned", base, tmp_path / "a", rank=4, embed_lora=True, dtype="float32", warn=said.append)
    assert any("resize_token_embeddings" in text for text in said) and any("saved whole" in text for text in said)
    start = load("llama", base)
    start.resize_token_embeddings(70)
    loaded = peft.PeftModel.from_pretrained(start, tmp_path / "a")
    torch.testing.assert_close(outputs("llama", loaded), outputs("llama", model), atol=2e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_equal_models_have_nothing_to_extract(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """FIX of 7.4: the peer crashes on an empty maximum."""
    _, base = pairs("llama")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="nothing to extract"):
        extract(copy, base, tmp_path / "a", rank=4)
    tuned, base = pairs("llama", "norm")
    with pytest.raises(ModelError, match="PEFT loads no LoRA without a matrix"):
        extract(tuned, base, tmp_path / "a", rank=4)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("given, words", [
    ({"energy": 1.5, "rank": 0}, ["energy: got 1.5", "rank: got 0"]),
    ({"energy": 0.5, "budget": 100}, ["energy and budget"]),
    ({"budget": 3}, ["less than one direction"]),
    ({"include": ["("], "exclude": ["nothing_like_it"], "save_modules": ["up_prj"]},
     ["no regular expression", "fits no module", "Did you mean `up_proj`"]),
    ({"dtype": "float8"}, ["none that an adapter is stored in"]),
    ({"memory": "1MB"}, ["too little"]),
    ({"threads": 0}, ["threads"]),
])
def test_what_chooses_nothing_is_said_at_once(given: dict[str, Any], words: list[str], pairs: Callable[..., Pair],
                                             tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        extract(*pairs("llama"), tmp_path / "a", **given)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "a").exists()


def test_models_that_do_not_belong_together(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    tuned, base = pairs("llama")
    with pytest.raises(ShapeMismatch, match="is no fine-tune of"):
        extract(pairs("gpt2")[0], base, tmp_path / "a", rank=4)
    with pytest.raises(ModelError, match="no such folder"):
        extract(tmp_path / "none", base, tmp_path / "a", rank=4)
    packed = tmp_path / "packed"
    packed.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="gptq"):
        extract(tuned, packed, tmp_path / "a", rank=4)
    with pytest.raises(OutputError, match="one of the inputs"):
        extract(tuned, base, base, rank=4)


def test_done_is_done_and_another_wish_needs_another_place(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair, out = pairs("llama"), tmp_path / "a"
    first = extract(*pair, out, rank=4)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    assert extract(*pair, out, rank=4).tensors == first.tensors
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    with pytest.raises(OutputError):
        extract(*pair, out, rank=5)
    assert not factors_folder(out).exists() and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_threads_and_a_stop_half_way_change_no_byte(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs("llama")
    extract(*pair, tmp_path / "one", rank=4, threads=1)
    extract(*pair, tmp_path / "two", rank=4, threads=2)

    class Stop(Exception):
        pass

    def stop(now: Any) -> None:
        if now.tensors == 5:
            raise Stop

    with pytest.raises(Stop):
        extract(*pair, tmp_path / "three", rank=4, threads=1, progress=stop)
    kept = {p.name: p.stat().st_mtime_ns for p in factors_folder(tmp_path / "three").glob("*.safetensors")}
    assert len(kept) >= 5 and not (tmp_path / "three").exists()
    extract(*pair, tmp_path / "three", rank=4, threads=1)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two", "three")]
    assert files[0] == files[1] == files[2]


SLOW = """
import sys, time
import anabranch.lora.extract as work
plain = work.low_rank
def slow(*given, **named):
    time.sleep(0.2)
    return plain(*given, **named)
work.low_rank = slow
work.extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=4, threads=1)
"""


def test_killed_it_goes_on_where_it_was(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """SIGKILL: no handler runs. What was found stays as it is, and the result has the same bytes."""
    tuned, base = pairs("llama")
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(tuned), str(base), str(out)])
    try:
        until = time.monotonic() + 240
        while len(list(factors_folder(out).glob("*.safetensors"))) < 3:
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in factors_folder(out).glob("*.safetensors")}
    assert 3 <= len(kept) < 14 and not out.exists()
    seen: dict[str, int] = {}

    def note(now: Any) -> None:
        seen.update({p.name: p.stat().st_mtime_ns for p in factors_folder(out).glob("*.safetensors")})

    extract(tuned, base, out, rank=4, threads=1, progress=note)
    assert all(seen[name] == stamp for name, stamp in kept.items()) and len(seen) == 14
    extract(tuned, base, tmp_path / "whole", rank=4, threads=1)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert not factors_folder(out).exists()


def test_factors_that_a_kill_cut_short_are_found_again_and_strange_folders_stay(pairs: Callable[..., Pair],
                                                                                tmp_path: Path) -> None:
    pair, out = pairs("llama"), tmp_path / "out"
    factors_folder(out).mkdir()  # killed before the key was written

    class Stop(Exception):
        pass

    def stop(now: Any) -> None:
        if now.tensors == 5:
            raise Stop

    with pytest.raises(Stop):
        extract(*pair, out, rank=4, threads=1, progress=stop)
    for i, file in enumerate(sorted(factors_folder(out).glob("*.safetensors"))):
        file.write_bytes(file.read_bytes()[: -7 if i % 2 else 4])
    extract(*pair, out, rank=4)
    extract(*pair, tmp_path / "whole", rank=4)
    assert all((out / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "whole").iterdir())
    other = factors_folder(tmp_path / "other")
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="none of ours"):
        extract(*pair, tmp_path / "other", rank=4)
    assert (other / "mine.txt").read_text() == "mine"


def test_numbers_that_have_no_difference_are_saved_whole(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    folders = []
    for i, source in enumerate(pairs("llama", "layers.0.mlp")):
        folder = tmp_path / source.name
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        state = {k: v for p in source.glob("*.safetensors") for k, v in load_file(p).items()}
        name = "model.layers.1.mlp.up_proj.weight"
        state[name] = state[name].double() + i
        save_file(state, folder / "model.safetensors")
        folders.append(folder)
    manifest = extract(*folders, tmp_path / "a", rank=4)
    assert manifest.report["saved_whole"] == ["model.layers.1.mlp.up_proj.weight"] and manifest.report["matrices"] == 3


def test_a_dry_run_writes_nothing(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    lines = forecast(*pairs("llama"), tmp_path / "a", rank=4)
    assert any("decomposed: 14 matrices" in line for line in lines) and not list(tmp_path.iterdir())
    with pytest.raises(AnabranchError):
        forecast(*pairs("llama"), tmp_path / "a", energy=7.0)


def test_extracted_adapters_of_a_tied_model_merge(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """Embedding and head are saved whole, and both, as PEFT asks; what comes of a merge loads as well."""
    from anabranch.lora.combine import merge_adapters

    models = []
    for i, moved in enumerate(("", "layers.0")):
        tuned, base = pairs("tied", moved)
        extract(tuned, base, tmp_path / f"a{i}", rank=64, dtype="float32")
        models.append({"model": str(tmp_path / f"a{i}"), "parameters": {"weight": 0.5}})
    merge_adapters({"merge_method": "task_arithmetic", "models": models, "base_model": str(base), "dtype": "float32"},
                   tmp_path / "m")
    got = with_peft("tied", base, tmp_path / "m").merge_and_unload().state_dict()
    states = [load("tied", pairs("tied", moved)[0]).state_dict() for moved in ("", "layers.0")]
    origin = load("tied", base).state_dict()
    for name, start in origin.items():
        wanted = start + 0.5 * (states[0][name] - start) + 0.5 * (states[1][name] - start)
        torch.testing.assert_close(got[name], wanted, atol=2e-6, rtol=0)


def test_a_tied_head_that_is_stored_as_well_is_the_embedding(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    folders = []
    for source in pairs("tied"):
        folder = tmp_path / source.name
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        state = {k: v for p in source.glob("*.safetensors") for k, v in load_file(p).items()}
        save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
        folders.append(folder)
    extract(*folders, tmp_path / "a", rank=4)
    extract(*pairs("tied"), tmp_path / "b", rank=4)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in "ab"]
    assert configs[0]["modules_to_save"] == configs[1]["modules_to_save"]


def test_an_architecture_that_transformers_does_not_know(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """Matrices, embeddings and norms are told by names and shapes, and the user is told so. No code of the model runs."""
    said: list[str] = []
    folders = []
    for source in pairs("llama"):
        folder = tmp_path / source.name
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mystery", "architectures": ["MysteryForCausalLM"],
                   "auto_map": {"AutoModelForCausalLM": "modeling_mystery.MysteryForCausalLM"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_mystery.py").write_text("raise SystemExit('it ran')")
        folders.append(folder)
    extract(*folders, tmp_path / "a", rank=4, warn=said.append)
    extract(*pairs("llama"), tmp_path / "b", rank=4)
    assert any("told by names and shapes" in text for text in said)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
