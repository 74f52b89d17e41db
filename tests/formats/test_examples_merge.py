"""Every config of examples/merge runs as it stands, on tiny checkpoints under the names that it uses."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import anabranch.merge as maths
from anabranch import cli
from tiny_checkpoints import WORDS, tensors_of, write_adapter, write_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples" / "merge"
FILES = sorted(EXAMPLES.glob("*.yaml"))
LAYERS = 28
BASE, INSTRUCT, CODER = "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct"
TOOLS = "my-org/chat-with-tools"
TOOL_WORDS = ("<unk>", "<eos>", "two", "one", "<|tool|>", "three", "four", "red", "green")
TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all models and adapters that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    for name in (BASE, INSTRUCT, CODER):
        write_checkpoint(folder / name, layers=LAYERS)
    write_checkpoint(folder / TOOLS, layers=LAYERS, words=TOOL_WORDS, template=TEMPLATE)
    for name in ("math", "code"):
        write_adapter(folder / "adapters" / name, layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def merged(place):
    """Example's name -> its result; made once."""
    made: dict[str, Path] = {}

    def get(name: str, *options: str) -> Path:
        key = "-".join([name, *options])
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                done = CliRunner().invoke(cli.app, ["merge", str(EXAMPLES / f"{name}.yaml"), key, *options])
            assert done.exit_code == 0, done.output
            made[key] = place / key
        return made[key]

    return get


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_runs_and_loads(path, merged):
    out = merged(path.stem)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = PreTrainedTokenizerFast.from_pretrained(out)("one two red", return_tensors="pt").input_ids
    assert ids.shape == (1, 3) and bool(torch.isfinite(model(ids).logits).all())
    assert (out / "mergekit_config.yml").read_text() == path.read_text()


def test_there_is_one_of_each_kind():
    methods = {yaml.safe_load(path.read_text())["merge_method"] for path in FILES}
    assert methods >= {"linear", "ties", "slerp", "passthrough", "dare_ties", "task_arithmetic", "tsv_m"} and len(FILES) >= 8


def test_linear_is_the_weighted_mean(merged, place):
    a, b, out = tensors_of(place / INSTRUCT), tensors_of(place / CODER), tensors_of(merged("linear"))
    wanted = {n: (0.75 * a[n].double() + 0.25 * b[n].double()) for n in a}
    assert all(torch.allclose(out[n].double(), wanted[n], rtol=2**-8, atol=1e-6) for n in a)


def test_ties_trims_by_a_gradient(merged, place):
    base, a, b = (tensors_of(place / m) for m in (BASE, INSTRUCT, CODER))
    out = tensors_of(merged("ties"))
    for layer, density in ((0, 0.3), (27, 0.6)):
        branches = torch.stack([a[Q.format(layer)], b[Q.format(layer)]]).float()
        exact = maths.METHODS["ties"].function(branches, base[Q.format(layer)].float(), torch.tensor([1.0, 0.5]),
                                               density=[0.6, density])
        assert out[Q.format(layer)].equal(exact.bfloat16()), layer


def test_slerp_goes_from_one_model_to_the_other(merged, place):
    a, b, out = tensors_of(place / INSTRUCT), tensors_of(place / CODER), tensors_of(merged("slerp-gradients"))
    up = "model.layers.{}.mlp.up_proj.weight"
    assert out[Q.format(0)].equal(a[Q.format(0)]) and out[Q.format(27)].equal(b[Q.format(27)])
    assert out[up.format(0)].equal(b[up.format(0)]) and out[up.format(27)].equal(a[up.format(27)])


def test_layers_stand_twice(merged, place):
    source, out = tensors_of(place / INSTRUCT), tensors_of(merged("frankenmerge"))
    config = json.loads((merged("frankenmerge") / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 40
    assert out[Q.format(19)].equal(source[Q.format(19)]) and out[Q.format(20)].equal(source[Q.format(8)])


def test_the_seed_decides(merged):
    first, again, other = (tensors_of(merged("dare-ties", *more)) for more in ((), ("--seed", "0"), ("--seed", "7")))
    assert all(first[n].equal(again[n]) for n in first) and any(not first[n].equal(other[n]) for n in first)


def test_adapters_are_folded_in(merged, place):
    from safetensors.torch import load_file

    base, out = tensors_of(place / BASE), tensors_of(merged("lora"))
    wanted = base[Q.format(3)].double()
    for name, weight in (("math", 0.7), ("code", 0.5)):
        factors = load_file(place / "adapters" / name / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.model.layers.3.self_attn.q_proj.lora_{s}.weight"].double() for s in "AB")
        wanted = wanted + weight * 2 * b @ a
    assert torch.allclose(out[Q.format(3)].double(), wanted, rtol=2**-8, atol=1e-5)
    untouched = "model.layers.3.mlp.up_proj.weight"
    assert out[untouched].equal(base[untouched])


def test_tokens_keep_their_rows(merged, place):
    """'one' and 'two' have other ids in one model; the tool token's row is that model's own."""
    out = merged("tokenizer-union")
    ids = PreTrainedTokenizerFast.from_pretrained(out).get_vocab()
    assert [ids[w] for w in WORDS] == list(range(len(WORDS))) and ids["<|tool|>"] == len(WORDS)
    rows = tensors_of(out)["model.embed_tokens.weight"].double()
    assert len(rows) == 64 == json.loads((out / "config.json").read_text())["vocab_size"]
    base, instruct, tools = (tensors_of(place / m)["model.embed_tokens.weight"].double() for m in (BASE, INSTRUCT, TOOLS))
    wanted = 0.2 * base[2] + 0.4 * instruct[2] + 0.4 * tools[3]
    assert torch.allclose(rows[2], wanted, rtol=2**-8, atol=1e-6) and rows[8].equal(tools[4])
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
