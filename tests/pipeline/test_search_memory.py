"""Candidates in memory are what `anabranch merge` writes, bit for bit, and what transformers loads from there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from search_models import MODELS, bits, make_models

from anabranch.engine.merging import merge_config, settings_for
from anabranch.errors import ModelError, RecipeError
from anabranch.model import load_model
from anabranch.search.in_memory import Room, Workshop, absolute, load_merge, needs_of, size_of
from tiny_checkpoints import WORDS, tensors_of, write_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    make_models(folder, layers=3)
    write_checkpoint(folder / "other_words", layers=3, words=(*WORDS, "blue"))
    return folder


def workshop(models, room=10**8):
    return Workshop((models,), settings_for(threads=1), Room(room))


def entry(model, **parameters):
    return {"model": model, "parameters": parameters}


GRADED = [{"filter": "mlp", "value": [0.2, 0.9]}, {"filter": "self_attn", "value": 0.7}, {"value": [1, 0.3, 0.5]}]
CONFIGS = {
    "linear": {"merge_method": "linear", "models": [entry(m, weight=w) for m, w in zip(MODELS, (0.2, 0.5, 0.9), strict=True)],
               "dtype": "bfloat16"},
    "gradients": {"merge_method": "ties", "base_model": "base", "dtype": "bfloat16", "parameters": {"lambda": 1.3},
                  "models": [entry(m, weight=GRADED, density=[0.3, 0.8]) for m in MODELS]},
    "draws": {"merge_method": "dare_ties", "base_model": "base", "dtype": "bfloat16",
              "models": [entry(m, weight=0.4, density=0.6) for m in MODELS]},
    "float32": {"merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32",
                "models": [entry(m, weight=0.4) for m in MODELS]},
    "whole model ranks": {"merge_method": "ties_global", "dialect": "native", "base_model": "base", "dtype": "bfloat16",
                          "models": [entry(m, weight=0.4, density=0.4) for m in MODELS]},
    "matrices": {"merge_method": "tsv_m", "dialect": "native", "base_model": "base", "dtype": "bfloat16",
                 "models": [entry(m) | {} for m in MODELS]},
    "slices": {"merge_method": "linear", "dtype": "bfloat16", "slices": [
        {"sources": [entry("one", weight=0.3) | {"layer_range": [0, 2]}, entry("two", weight=0.6) | {"layer_range": [0, 2]}]},
        {"sources": [entry("three", weight=1) | {"layer_range": [1, 3]}]}]},
    "adapter": {"merge_method": "linear", "dtype": "bfloat16",
                "models": [entry("base+lora", weight=0.3), entry("two", weight=0.6)]},
    "tokenizer": {"merge_method": "linear", "dtype": "bfloat16", "tokenizer": {"source": "union"},
                  "models": [entry("one", weight=0.3), entry("other_words", weight=0.6)]},
}


@pytest.mark.parametrize("room", [10**8, 3000, 0], ids=["kept", "some kept", "streamed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_as_on_disk(name, room, models, tmp_path):
    config = dict(CONFIGS[name])
    if name == "matrices":
        config["models"] = [{"model": m} for m in MODELS]
    merge_config(absolute(config, (models,)), tmp_path / "out")
    wanted = tensors_of(tmp_path / "out")
    shop = workshop(models, room)
    for _ in range(2):  # the second time from what is kept
        found = {}
        shop.merged(config, lambda n, t: found.__setitem__(n, t.clone()))  # noqa: B023 - called at once
        assert found.keys() == wanted.keys()
        for tensor in wanted:
            assert found[tensor].dtype == wanted[tensor].dtype, tensor
            assert torch.equal(bits(found[tensor]), bits(wanted[tensor])), tensor
    assert shop.room.taken <= room and (shop.room.taken > 0) == (room > 0)


@pytest.mark.parametrize("name", ["gradients", "slices", "adapter", "tokenizer"])
def test_the_loaded_model_is_the_one_that_transformers_loads(name, models, tmp_path):
    config = CONFIGS[name]
    changed = json.loads(json.dumps(config).replace("0.3", "0.8"))
    loaded = load_merge(workshop(models), config, "float32", tmp_path)
    assert loaded.direct and not list(tmp_path.iterdir())
    for one in (changed, config):
        model = loaded.become(one)
        merge_config(absolute(one, (models,)), tmp_path / "out")
        wanted = load_model(tmp_path / "out")
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(model.state_dict().values(), wanted.state_dict().values(),
                                                              strict=True))
        ids = torch.tensor([[2, 3, 4, 5]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, wanted(ids).logits)
        (tmp_path / "out").rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")


def test_inputs_are_read_once(models, monkeypatch):
    from anabranch.engine.checkpoint import Checkpoint

    reads = []
    plain = Checkpoint.read_bytes
    monkeypatch.setattr(Checkpoint, "read_bytes", lambda self, name, start, into: (reads.append((self.folder.name, name)),
                                                                                  plain(self, name, start, into))[1])
    shop = workshop(models)
    for weight in (0.1, 0.2, 0.3):
        shop.merged(CONFIGS["draws"] | {"models": [entry(m, weight=weight, density=0.5) for m in MODELS]}, lambda *_: None)
    assert len(reads) == len(set(reads)) == 4 * len(tensors_of(models / "base"))


def test_tied_heads_in_shards_of_an_architecture_with_its_own_names(tiny_base, tmp_path):
    """transformers' own saving: tied head, two shards."""
    for i in range(2):
        (tmp_path / f"m{i}").mkdir()
        for path in tiny_base.iterdir():
            (tmp_path / f"m{i}" / path.name).write_bytes(path.read_bytes())
        for path in (tmp_path / f"m{i}").glob("*.safetensors"):
            save_file({n: t + 0.01 * (i + 1) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    config = {"merge_method": "linear", "models": [entry(str(tmp_path / f"m{i}"), weight=1) for i in range(2)],
              "parameters": {"normalize": True}}
    (tmp_path / "scratch").mkdir()
    loaded = load_merge(workshop(tmp_path), config, "float32", tmp_path / "scratch")
    assert loaded.direct
    model = loaded.become(config)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    base = load_model(tiny_base)
    for (name, a), b in zip(model.state_dict().items(), base.state_dict().values(), strict=True):
        assert torch.allclose(a, b + 0.015, atol=1e-6), name


def test_an_architecture_stored_under_other_names_goes_through_files(models, tmp_path, monkeypatch):
    """Mixtral's experts stand apart in its files and together in transformers."""
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    for i in range(2):
        torch.manual_seed(i)
        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=32))
        model.save_pretrained(tmp_path / f"m{i}")
        PreTrainedTokenizerFast.from_pretrained(models / "base").save_pretrained(tmp_path / f"m{i}")
    config = {"merge_method": "linear", "models": [entry(str(tmp_path / f"m{i}"), weight=0.5) for i in range(2)]}
    (tmp_path / "scratch").mkdir()
    loaded = load_merge(workshop(tmp_path), config, "float32", tmp_path / "scratch")
    other = {"merge_method": "linear", "models": [entry(str(tmp_path / f"m{i}"), weight=i + 1) for i in range(2)]}
    found = loaded.become(other)
    merge_config(other, tmp_path / "out")
    wanted = load_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True))
    assert not loaded.direct and not list((tmp_path / "scratch").iterdir())


def test_a_candidate_of_another_shape_is_refused(models, tmp_path):
    loaded = load_merge(workshop(models), CONFIGS["linear"], "float32", tmp_path)
    with pytest.raises(ModelError, match="first candidate"):
        loaded.become(CONFIGS["slices"])
    shorter = {"merge_method": "passthrough", "dtype": "bfloat16",
               "slices": [{"sources": [{"model": "one", "layer_range": [0, 2]}]}]}
    with pytest.raises(ModelError, match="not in this one"):
        loaded.become(shorter)


def test_memory_is_known_before(models):
    merge = workshop(models).planned(CONFIGS["draws"])
    size = sum(t.numel() * 2 for m in (*MODELS, "base") for t in tensors_of(models / m).values())
    assert size_of(merge) == size
    needs = needs_of(merge, "float32", 10**10)
    assert needs.model == size // 2 and needs.kept == size and "all kept" in needs.words  # four of 2 bytes; one of 4
    assert needs_of(merge, "bfloat16", 10**10).model == size // 4
    with pytest.raises(RecipeError, match=r"--memory 100MB is too little.*bfloat16"):
        needs_of(merge, "float32", 10**8)
