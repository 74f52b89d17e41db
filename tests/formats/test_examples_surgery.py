"""Every file of examples/surgery runs as it stands, on tiny checkpoints under the names that it uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from anabranch import cli
from anabranch.engine.merging import verify_files
from tiny_checkpoints import tensors_of, write_adapter, write_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples" / "surgery"
LAYERS = 28
MODELS = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Coder-1.5B-Instruct")
COMMANDS = {"family": ("merge",), "lora-merge": ("lora", "merge"), "experts": ("experts",), "search": ("search",),
            "tensors": ("tensors",), "layer-slices": ("merge",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    words = ["<unk>", "<eos>", *sorted(ByteLevel.alphabet())]
    for name in MODELS:
        write_checkpoint(folder / name, layers=LAYERS, words=words)
        tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
        tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
        tokenizer.add_special_tokens(["<eos>"])
        tokenizer.save(str(folder / name / "tokenizer.json"))
    for rank, name in ((2, "math"), (3, "code")):
        write_adapter(folder / "adapters" / name, layers=LAYERS, rank=rank)
    for i, name in enumerate(("base", "first", "second")):
        save_file({"x": torch.full((3,), float(i)), "only.y": torch.full((2, 2), 2.0 * i)}, folder / f"{name}.safetensors")
    rows = "".join(json.dumps({"prompt": f"{i} and {i}", "completion": f" is {2 * i}"}) + "\n" for i in range(12))
    (folder / "held_out.jsonl").write_text(rows)
    return folder


def run(place: Path, name: str, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = CliRunner().invoke(cli.app, [*COMMANDS[name], str(EXAMPLES / f"{name}.yaml"), f"{name}-out", *more])
    assert done.exit_code == 0, done.output
    assert verify_files(place / f"{name}-out") == []
    return place / f"{name}-out"


def loads(folder: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert bool(torch.isfinite(model(torch.tensor([[2, 3, 4]])).logits).all())
    return model


def test_all_of_them_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(COMMANDS)


def test_family(place):
    out = run(place, "family")
    instruct, maths = tensors_of(place / MODELS[1]), tensors_of(place / MODELS[2])
    between = run_one(place, yaml.safe_load_all((EXAMPLES / "family.yaml").read_text()))
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.allclose(between[name].float(), (instruct[name].float() + maths[name].float()) / 2, rtol=2**-7, atol=1e-3)
    loads(out)
    assert not (place / "family-out.intermediates").exists()


def run_one(place: Path, documents: object) -> dict[str, torch.Tensor]:
    """The first document alone."""
    first = dict(next(iter(documents)))  # type: ignore[call-overload]  # a generator of mappings
    del first["name"]
    (place / "first.yaml").write_text(yaml.safe_dump(first))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert CliRunner().invoke(cli.app, ["merge", "first.yaml", "between"]).exit_code == 0
    return tensors_of(place / "between")


def test_lora_merge(place):
    out = run(place, "lora-merge")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] <= 8
    file = load_file(out / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in file) == LAYERS


def test_experts(place):
    model = loads(run(place, "experts"))
    assert model.config.model_type == "qwen2_moe" and model.config.num_experts == 2


def test_search(place):
    loads(run(place, "search", "--budget", "2"))
    assert (place / "search-out.search" / "best_config.yaml").is_file()


def test_tensors(place):
    file = load_file(run(place, "tensors") / "model.safetensors")
    assert file["x"].tolist() == [2.5] * 3 and file["only.y"].tolist() == [[5.0] * 2] * 2  # 0 + 0.5 * 1 + 1 * 2


def test_layer_slices(place):
    out = tensors_of(run(place, "layer-slices"))
    coder, name = tensors_of(place / MODELS[3]), "model.layers.{}.mlp.{}_proj.weight"
    assert torch.equal(out[name.format(20, "up")], coder[name.format(12, "up")])
    wanted = coder[name.format(12, "down")].float() * 0.9
    assert torch.allclose(out[name.format(20, "down")].float(), wanted, rtol=2**-7)
    assert max(int(n.split(".")[2]) for n in out if n.startswith("model.layers.")) == 35
