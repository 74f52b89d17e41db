"""`anabranch lora apply`: held to PEFT's merge_and_unload in float32. Merge specification, 2.3."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anabranch import cli_lora
from anabranch.errors import AnabranchError, CorruptedError, ModelError, OutputError, RecipeError
from anabranch.lora.apply import apply, forecast

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
         "num_hidden_layers": 2, "attention_bias": True, "tie_word_embeddings": False}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
VARIETIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm", "lm_head"]}),
    "rslora": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "bias": "lora_only"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora of an embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
    "dora of a Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, dict[str, torch.Tensor]]]:
    """(base, adapter, PEFT's merged tensors) of a variety; the base's files hold float32."""
    folder = tmp_path_factory.mktemp("apply")
    torch.manual_seed(0)
    models = {"llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
              "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))}
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name, max_shard_size="30KB")
        (folder / name / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    done: dict[str, tuple[Path, Path, dict[str, torch.Tensor]]] = {}

    def get(variety: str) -> tuple[Path, Path, dict[str, torch.Tensor]]:
        if variety not in done:
            base, settings = VARIETIES[variety]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                wrapped = peft.get_peft_model(copy.deepcopy(models[base]), peft.LoraConfig(r=3, lora_alpha=5, **settings))
                torch.manual_seed(1)
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        torch.nn.init.normal_(parameter, std=0.3)
                wrapped.save_pretrained(folder / variety)
                merged = {n: t.clone() for n, t in wrapped.merge_and_unload().state_dict().items()}
            done[variety] = folder / base, folder / variety, merged
        return done[variety]

    return get


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("variety", sorted(VARIETIES))
def test_it_is_pefts_merge(variety: str, made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, wanted = made(variety)
    apply(base, adapter, tmp_path / "out")
    got, before = tensors(tmp_path / "out"), tensors(base)
    assert got.keys() == before.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-6, rtol=2e-6)
    assert sum(not torch.equal(got[n], before[n]) for n in got) >= 2  # and it did something
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"model_max_length": 7}'


def test_a_bfloat16_base_is_rounded_once(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("plain")
    low = tmp_path / "low"
    low.mkdir()
    config = json.loads((base / "config.json").read_text())
    (low / "config.json").write_text(json.dumps(config))
    state = {n: t.to(torch.bfloat16) for n, t in tensors(base).items()}
    save_file(state, low / "model.safetensors")
    apply(low, adapter, tmp_path / "out")
    apply(low, adapter, tmp_path / "wide", dtype="float32")
    factors = load_file(adapter / "adapter_model.safetensors")
    at = "model.layers.0.mlp.down_proj"
    a, b = (factors[f"base_model.model.{at}.lora_{s}.weight"].double() for s in "AB")
    exact = state[f"{at}.weight"].double() + 5 / 3 * (b @ a)
    got = tensors(tmp_path / "out")[f"{at}.weight"]
    assert got.dtype == torch.bfloat16 and int((got != exact.float().to(torch.bfloat16)).sum()) <= 1
    torch.testing.assert_close(tensors(tmp_path / "wide")[f"{at}.weight"], exact.float(), atol=1e-6, rtol=1e-6)
    written = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert written["dtype" if "dtype" in config else "torch_dtype"] == "float32"


def test_an_adapters_own_tokenizer_goes_with_it(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("plain")
    own = tmp_path / "own"
    own.mkdir()
    for file in adapter.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    (own / "tokenizer_config.json").write_text('{"model_max_length": 9}')
    apply(base, own, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"model_max_length": 9}'


def test_refused_by_name(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("plain")
    packed = tmp_path / "packed"
    packed.mkdir()
    for file in base.iterdir():
        (packed / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(ModelError, match=r"quantised \(awq 4-bit"):
        apply(packed, adapter, tmp_path / "out")
    with pytest.raises(ModelError):
        apply(made("dora of a Conv1D")[0], adapter, tmp_path / "out")
    with pytest.raises(RecipeError, match="none that a model is stored in"):
        apply(base, adapter, tmp_path / "out", dtype="int8")
    with pytest.raises(OutputError):
        apply(base, adapter, adapter)
    assert not (tmp_path / "out").exists()


def test_a_dora_without_its_magnitudes(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("dora")
    short = tmp_path / "short"
    short.mkdir()
    (short / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    state = {n: t for n, t in load_file(adapter / "adapter_model.safetensors").items()
             if not ("magnitude" in n and "layers.0.mlp.down_proj" in n)}
    save_file(state, short / "adapter_model.safetensors")
    with pytest.raises(CorruptedError, match="no magnitudes"):
        apply(base, short, tmp_path / "out")


# --- the commands ---


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli_lora.app, [str(a) for a in args])


def test_the_commands(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, wanted = made("plain")
    done = run("apply", base, adapter, tmp_path / "tuned")
    assert done.exit_code == 0 and "parameters in float32" in done.output
    done = run("extract", tmp_path / "tuned", base, tmp_path / "again", "--max-rank", "3", "--threads", "1")
    assert done.exit_code == 0 and "energy kept" in done.output and "matrix" in done.output, done.output
    told = run("extract", tmp_path / "tuned", base, tmp_path / "again", "--rank", "3", "--json", "--quiet")
    lines = [json.loads(line) for line in told.output.splitlines() if line.startswith("{")]
    assert lines[-1]["event"] == "done" and lines[-1]["ranks"] == [3, 3] and lines[-1]["kept_energy"] > 0.999
    (tmp_path / "merge.yaml").write_text(
        f"merge_method: task_arithmetic\nmodels:\n  - model: {tmp_path / 'again'}\n    parameters: {{weight: 1.0}}\n"
        f"base_model: {base}\n")
    done = run("merge", tmp_path / "merge.yaml", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    done = run("apply", base, tmp_path / "merged", tmp_path / "last", "--quiet")
    assert done.exit_code == 0 and done.output == ""
    for name, tensor in tensors(tmp_path / "last").items():  # round and round
        torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=0)


def test_a_finished_folder_is_told_as_such(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("plain")
    (tmp_path / "merge.yaml").write_text(f"merge_method: task_arithmetic\nmodels:\n  - model: {tmp_path / 'e'}\n"
                                         f"    parameters: {{weight: 1.0}}\nbase_model: {base}\n")
    for command in (("apply", base, adapter, tmp_path / "t"),
                    ("extract", tmp_path / "t", base, tmp_path / "e", "--rank", "3", "-i", "q_proj"),
                    ("merge", tmp_path / "merge.yaml", tmp_path / "m")):
        once, twice = (" ".join(run(*command).output.split()) for _ in range(2))
        assert "already" not in once and " parameters" in once
        assert "already; nothing was done" in twice and " parameters" not in twice
        if command[0] == "extract":  # `-i` chooses what is decomposed
            assert "saved whole: lm_head.weight (1 tensors" in once and "-e leaves modules out" in once


def test_advice_stands_once(made: Callable[..., Any], tmp_path: Path) -> None:
    _, adapter, _ = made("plain")
    config = transformers.LlamaConfig(**LLAMA | {"hidden_size": 16})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError) as caught:
        apply(tmp_path / "other", adapter, tmp_path / "out")
    said = str(caught.value)
    assert said.count("Give the base it was trained on") == 1 and said.count("has shape") == 6 + 4, said  # saved whole, factors


@pytest.mark.parametrize("both", [True, False])
def test_what_is_said_of_a_tied_embedding_is_what_peft_does(both: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=both))
        for name, parameter in wrapped.named_parameters():
            if "model.embed_tokens.lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        wrapped.save_pretrained(tmp_path / "a")
        factors = load_file(tmp_path / "a" / "adapter_model.safetensors")  # as `extract` writes them: the head's are the same
        save_file({n: t for n, t in factors.items() if "lm_head" not in n}, tmp_path / "a" / "adapter_model.safetensors")
        ids, said = torch.tensor([[1, 5, 9]]), list[str]()
        unmerged = wrapped.eval()(ids).logits.detach()
        folded = wrapped.merge_and_unload()(ids).logits.detach()
    apply(tmp_path / "base", tmp_path / "a", tmp_path / "out", warn=said.append)
    got = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits.detach()
    same = [torch.allclose(got, other, atol=1e-4) for other in (unmerged, folded)]
    assert same == [both, not both]
    told = next(text for text in said if "output head" in text)
    assert ("adds it twice" in told) == both and ("in the embedding alone" in told) == (not both)


def test_what_the_factors_dtype_costs_is_told(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("plain")
    apply(base, adapter, tmp_path / "tuned")
    low = run("extract", tmp_path / "tuned", base, tmp_path / "low", "--dtype", "bfloat16", "--rank", "3")
    assert "factors in bfloat16, whose rounding alone is 0.00" in " ".join(low.output.split())
    wide = run("extract", tmp_path / "tuned", base, tmp_path / "wide", "--rank", "3")
    assert "factors in float32;" in " ".join(wide.output.split()) and "rounding" not in wide.output
    (tmp_path / "merge.yaml").write_text(f"merge_method: peft_linear\nmodels:\n  - model: {tmp_path / 'wide'}\n"
                                         f"    parameters: {{weight: 1.0}}\nbase_model: {base}\n")
    merged = run("merge", tmp_path / "merge.yaml", tmp_path / "merged")
    assert merged.exit_code == 0 and "0% of the weighted sum's length away" in " ".join(merged.output.split())
    assert "100.00%" not in merged.output and "kept;" not in merged.output


def test_dry_runs_write_nothing(made: Callable[..., Any], tmp_path: Path) -> None:
    base, adapter, _ = made("plain")
    (tmp_path / "merge.yaml").write_text(
        f"merge_method: ties\nmodels:\n  - model: {adapter}\n    parameters: {{weight: 1.0}}\nbase_model: {base}\n")
    before = sorted(tmp_path.iterdir())
    for command in (("apply", base, adapter), ("merge", tmp_path / "merge.yaml")):
        done = run(*command, tmp_path / "out", "--dry-run")
        assert done.exit_code == 0 and "input:" in done.output
    assert sorted(tmp_path.iterdir()) == before
    assert any("tensors:" in line for line in forecast(base, adapter, tmp_path / "out"))
    with pytest.raises(AnabranchError):
        forecast(base, tmp_path / "none", tmp_path / "out")


def test_errors_as_json(tmp_path: Path) -> None:
    done = run("apply", tmp_path / "none", tmp_path / "no", tmp_path / "out", "--json")
    assert done.exit_code == 2
    assert json.loads(done.output.splitlines()[-1])["kind"] == "ModelError"
