"""What people complain about in MergeKit (github.com/arcee-ai/mergekit/issues), tried here one by one.

Each test names the complaint in its docstring, with the issue's number where there is one; what is told of the peer is from
there or from its code as of version 0.1.4.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from anabranch.engine import merging
from anabranch.engine.merging import merge_config, verify
from anabranch.errors import AnabranchError
from tiny_checkpoints import WORDS, tensors_of, write_adapter, write_checkpoint

UP = "model.layers.{}.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
BF16 = torch.bfloat16
PACKAGE = str(Path(merging.__file__).parents[2])


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """base, a and b: four layers, bfloat16, one vocabulary. Configs name them from here."""
    for name in ("base", "a", "b"):
        write_checkpoint(tmp_path / name, layers=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entry(model: str, **parameters: Any) -> dict[str, Any]:
    return {"model": model, **({"parameters": parameters} if parameters else {})}


def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return entry(model, **parameters) | {"layer_range": [first, end]}


def merged(config: Mapping[str, Any], out: str = "out") -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the result, and what was said."""
    said: list[str] = []
    merge_config(config, out, warn=said.append)
    return tensors_of(Path(out)), said


def refused(config: Mapping[str, Any]) -> str:
    """The message; not a byte has been written, and every other file is as it was."""
    with pytest.raises(AnabranchError) as caught:
        merge_config(config, "out")
    assert not Path("out").exists() and not Path("out.partial").exists()
    return str(caught.value)


def config_of(folder: str = "out") -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


def runs(folder: str = "out") -> transformers.PreTrainedModel:
    """Loaded with nothing missing or left over; finite logits."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert bool(model(torch.arange(6)[None]).logits.isfinite().all())
    return model


def tokenizer_of(folder: str = "out") -> PreTrainedTokenizerFast:
    """As its files have it: AutoTokenizer adds a token of its own to every tokenizer that stands beside a Qwen 2."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def rewrite(folder: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> None:
    tensors = change(tensors_of(Path(folder)))
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config_of(folder) | config))


# --- what is listed, and what is done with it ---


def test_the_same_model_twice(models):
    """#214, "Wrong answer in the merged model weights": a model listed with weight 0.1 and again with 1.0 is merged once,
    with the first weight, and nothing is said."""
    text = refused({"merge_method": "linear", "models": [entry("a", weight=0.1), entry("a", weight=1.0)]})
    assert "models[1]" in text and "already models[0]" in text and "sum of the weights" in text


def test_layers_twice(models):
    """#85, "Some tensors share memory": the same layers in two slices cannot be saved without --clone-tensors."""
    got, _ = merged({"merge_method": "passthrough", "slices": [{"sources": [source("a", 0, 4)]}] * 2})
    assert all(got[UP.format(i)].equal(got[UP.format(i + 4)]) for i in range(4))
    assert runs().config.num_hidden_layers == 8


def test_the_base_need_not_be_listed_again(models):
    """#3 and #643, "BaseModel not in input tensors": ties and slerp over `slices` fail with a KeyError, after the downloads,
    where the base is named in `base_model` alone."""
    whole, _ = merged({"merge_method": "ties", "base_model": "base", "models": [entry("a", weight=1, density=0.5)]})
    sliced, _ = merged({"merge_method": "ties", "base_model": "base", "slices": [
        {"sources": [source("a", 0, 4, weight=1, density=0.5)]}]}, "sliced")
    assert all(whole[n].equal(sliced[n]) for n in whole)
    merged({"merge_method": "slerp", "base_model": "base", "parameters": {"t": 0.5}, "slices": [
        {"sources": [source("a", 0, 4)]}]}, "slerped")


def test_passthrough_with_a_base(models):
    """A `base_model` beside passthrough is one more model to the peer: "exactly one tensor" while the merge runs."""
    text = refused({"merge_method": "passthrough", "base_model": "base", "models": [entry("a")]})
    assert "remove `base_model`" in text


def test_layers_past_the_end(models):
    """#51 and #398: a layer_range past the last layer is "No rule to produce ..layers.32.." or "Tensor required but not
    present", which says neither what was asked for nor what there is."""
    text = refused({"merge_method": "passthrough", "slices": [
        {"sources": [source("a", 0, 4)]}, {"sources": [source("b", 2, 40)]}]})
    assert "slices[1].sources[0]" in text and "[2, 40]" in text and "has 4 layers" in text


@pytest.mark.parametrize("pair", [[0, 0], [3, 3], [3, 1], [-1, 2]])
def test_no_layers(models, pair):
    """#360, "Condense a models layers": [0, 0] is taken for layer 0, and a model without layers is written."""
    text = refused({"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": pair}]}]})
    assert str(pair) in text and "slices[0].sources[0]" in text


def test_errors_before_the_work(models):
    """#527, "This needs a better list of errors": `dare-ties` and models of different depth are found after 20 minutes of
    downloads. Here config errors come first, all of them at once, and no weight is read for the others."""
    text = refused({"merge_method": "dare-ties", "base_model": "nowhere/base", "dtype": "bf16", "models": [
        entry("nowhere/a", weight=1)]})
    assert "Did you mean `dare_ties`?" in text and "bf16" in text
    write_checkpoint(models / "deep", layers=5)
    for folder in ("a", "deep"):  # headers alone are left of the weights
        path = models / folder / "model.safetensors"
        with open(path, "r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start)
            file.write(b"\xff" * (path.stat().st_size - start))
    text = refused({"merge_method": "linear", "models": [entry("a", weight=1), entry("deep", weight=1)]})
    assert "a has 4 layers" in text and "deep has 5 layers" in text


def test_keys_that_nothing_reads(models):
    """Unknown keys are ignored at every level: `paramaters`, `wieght`, `density` beside `model`."""
    text = refused({"merge_method": "ties", "base_model": "base", "paramaters": {"normalize": True}, "models": [
        {"model": "a", "density": 0.5, "parameters": {"wieght": 1}}]})
    assert "`paramaters`. Did you mean `parameters`?" in text and "`wieght`. Did you mean `weight`?" in text
    assert "`density`: it is read under `parameters`" in text
    said: list[str] = []
    merge_config({"merge_method": "linear", "nmae": "x", "models": [entry("a", weight=1)]}, "out", allow_unknown_keys=True,
                 warn=said.append)
    assert any("nmae" in text for text in said)


def test_which_model_gives_config_and_tokenizer(models):
    """Without a base the peer takes config.json and tokenizer from a set's first element: another one on another day."""
    for name in ("a", "b"):
        rewrite(name, lambda t: t, told_by=name)
    for order in (("a", "b"), ("b", "a")):
        merged({"merge_method": "linear", "models": [entry(m, weight=1) for m in order]}, f"out-{order[0]}")
        assert config_of(f"out-{order[0]}")["told_by"] == order[0]


# --- numbers ---


def bf16_error(got: Tensor, exact: Tensor) -> Tensor:
    """Distance in steps of bfloat16 at the exact number."""
    return (got.double() - exact).abs() / torch.exp2(exact.abs().clamp_min(1e-30).log2().floor() - 7)


WEIGHTS = {"a": 0.6, "b": 0.3}


def peer_linear(x: dict[str, Tensor], _: Tensor) -> Tensor:
    """All in bfloat16, weights too (0.6 becomes 0.6015625)."""
    w = torch.tensor(list(WEIGHTS.values())).to(BF16)
    return (torch.stack([x["a"], x["b"]]) * w[:, None, None]).sum(0) / w.sum()


def peer_task_arithmetic(x: dict[str, Tensor], base: Tensor) -> Tensor:
    w = torch.tensor(list(WEIGHTS.values())).to(BF16)
    return base + (torch.stack([x["a"] - base, x["b"] - base]) * w[:, None, None]).sum(0)


def peer_ties(x: dict[str, Tensor], base: Tensor) -> Tensor:
    w = torch.tensor(list(WEIGHTS.values())).to(BF16)
    steps = torch.stack([x["a"] - base, x["b"] - base]) * w[:, None, None]
    sign = torch.where(steps.sum(0) >= 0, 1, -1)
    mask = steps.sign() == sign
    divisor = (mask * w[:, None, None]).sum(0)
    return base + (steps * mask).sum(0) / torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def exact_of(method: str, x: dict[str, Tensor], base: Tensor) -> Tensor:
    """Of the stored numbers, in float64."""
    a, b, base = x["a"].double(), x["b"].double(), base.double()
    w = list(WEIGHTS.values())
    if method == "linear":
        return (w[0] * a + w[1] * b) / sum(w)
    steps = [w[0] * (a - base), w[1] * (b - base)]
    if method == "task_arithmetic":
        return base + steps[0] + steps[1]
    up = steps[0] + steps[1] >= 0
    mask = [torch.where(up, s > 0, s < 0) for s in steps]
    divisor = mask[0] * w[0] + mask[1] * w[1]
    return base + (steps[0] * mask[0] + steps[1] * mask[1]) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_maths_in_bfloat16(models, method):
    """#316, "Mixed Precision Merging": with `dtype: bfloat16` the peer rounds models, weights and every step between to 8
    bits. Ours is the float64 result rounded once (at most half a step off); the peer's way is off by steps."""
    config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16",
                              "models": [entry(m, weight=w) for m, w in WEIGHTS.items()]}
    if method != "linear":
        config["base_model"] = "base"
    got, _ = merged(config)
    states = {m: tensors_of(Path(m)) for m in ("base", "a", "b")}
    peer = {"linear": peer_linear, "task_arithmetic": peer_task_arithmetic, "ties": peer_ties}[method]
    ours, theirs = [], []
    for i in range(4):
        x, base = {m: states[m][UP.format(i)] for m in ("a", "b")}, states["base"][UP.format(i)]
        exact = exact_of(method, x, base)
        ours.append(bf16_error(got[UP.format(i)], exact))
        theirs.append(bf16_error(peer(x, base), exact))
    # Half a step, and float32's own error where the result is far smaller than its terms.
    off = [float((torch.stack(distances) > 0.5 + 1e-3).double().mean()) for distances in (ours, theirs)]
    assert off[0] < 0.002 and off[1] > 0.05
    assert float(torch.stack(ours).mean()) < float(torch.stack(theirs).mean())


def test_fp16_beside_bf16(models):
    """#316: a merge of fp16 and bf16 models rounds one of them to the other first. Here each is read as it is."""
    write_checkpoint(models / "half", layers=4, dtype=torch.float16)
    got, _ = merged({"merge_method": "linear", "dtype": "bfloat16", "models": [
        entry("a", weight=0.5), entry("half", weight=0.5)]})
    a, half = tensors_of(Path("a")), tensors_of(Path("half"))
    exact = 0.5 * a[UP.format(1)].double() + 0.5 * half[UP.format(1)].double()
    assert float(bf16_error(got[UP.format(1)], exact).max()) <= 0.5


@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl", "task_arithmetic", "slerp"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_what_is_written(models, method, dtype):
    """#604, '"dtype" field in YAML config ignored, always resulting in F32'."""
    extra = {"parameters": {"t": 0.3}} if method == "slerp" else {}
    own = {"weight": 0.5} if method == "task_arithmetic" else {}
    got, _ = merged({"merge_method": method, "dtype": dtype, "base_model": "base", "models": [entry("a", **own)], **extra})
    assert {str(t.dtype) for t in got.values()} == {f"torch.{dtype}"}
    stated = config_of()
    assert dtype in (stated.get("dtype"), stated.get("torch_dtype"))


@pytest.mark.parametrize("share", [0.5, 0.01, 0.0])
def test_sce_keeps_every_shape(models, share):
    """sce writes tensors of shape (models, hidden) where nothing is selected: all norms, with two models; and then the
    result does not load."""
    got, _ = merged({"merge_method": "sce", "base_model": "base", "parameters": {"select_topk": share}, "models": [
        entry("a"), entry("b")]})
    base = tensors_of(Path("base"))
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in base.items()}
    assert (share > 0) or all(got[n].equal(base[n]) for n in base)
    runs()


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_of_small_tensors(models, method):
    """With the default gamma of 0.01 every tensor of fewer than 100 entries loses its whole task vector, silently; with
    gamma 0 every tensor of the model does."""
    base, a = tensors_of(Path("base")), tensors_of(Path("a"))
    for gamma in (0.01, 0.0):
        got, _ = merged({"merge_method": method, "base_model": "base", "models": [
            entry("a", weight=1, density=0.5, gamma=gamma)]}, f"out-{gamma}")
        assert base[NORM].numel() == 8
        moved = int((got[NORM] != base[NORM]).sum())
        assert moved == min(4, int((a[NORM] != base[NORM]).sum()))
        assert not got[UP.format(2)].equal(base[UP.format(2)])


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs", "della"])
def test_density_of_nothing(models, method):
    """Density 0, or so little that a small tensor keeps no entry, ends the peer's merge with an AssertionError at whichever
    tensor comes to it first."""
    base = tensors_of(Path("base"))
    extra = {"epsilon": 0.0} if method == "della" else {}
    config = {"merge_method": method, "base_model": "base", "models": [entry("a", weight=1, density=0, **extra)]}
    got, said = merged(config)
    assert all(got[n].equal(base[n]) for n in base) and any("density of 0" in text for text in said)
    if method == "ties":
        config["models"] = [entry("a", weight=1, density=0.01)]
        got, _ = merged(config, "little")
        assert int((got[NORM] != base[NORM]).sum()) == 1


# --- vocabularies and tokenizers ---


@pytest.mark.parametrize("method", ["linear", "dare_ties", "slerp", "model_stock"])
def test_other_vocabularies_are_never_cut(models, method):
    """#47, #139, #489, #614: "The size of tensor a (32000) must match the size of tensor b (120128)", or embeddings cut to
    the smaller one beside a config.json that still has the larger, so that loading fails."""
    write_checkpoint(models / "more", layers=4, words=[*WORDS, "extra", "<x>"])
    own = {} if method in ("slerp", "model_stock") else {"weight": 0.5}
    listed = ["more"] if method == "slerp" else ["more", "b"]
    config: dict[str, Any] = {"merge_method": method, "models": [entry(m, **own) for m in listed]}
    if method != "linear":
        config["base_model"] = "base"
    if method == "slerp":
        config["parameters"] = {"t": 0.5}
    text = refused(config)
    assert EMBEDDING in text and re.search(r"has \d+ rows, \w+ has \d+", text) and "tokenizer: {source: base}" in text
    got, _ = merged(config | {"tokenizer": {"source": "union"}})
    model, tokenizer = runs(), tokenizer_of()
    assert len(got[EMBEDDING]) == model.config.vocab_size == len(tokenizer) == 10
    assert tokenizer.decode(tokenizer("one extra two").input_ids) == "one extra two"


def test_a_token_of_one_model_keeps_its_row(models):
    """#47 and #342: after a union the whole model's output is garbled. Rows follow their tokens wherever the vocabularies
    put them, and a token that one model alone has keeps that model's row."""
    order = ["<unk>", "<eos>", "four", "three", "two", "one", "green", "red", "extra"]
    write_checkpoint(models / "other", layers=4, words=order, dtype=torch.float32)
    got, _ = merged({"merge_method": "linear", "dtype": "float32", "tokenizer": {"source": "union"}, "models": [
        entry("a", weight=0.5), entry("other", weight=0.5)]})
    ids = tokenizer_of().get_vocab()
    a, other = tensors_of(Path("a"))[EMBEDDING].double(), tensors_of(Path("other"))[EMBEDDING].double()
    for word, number in ids.items():
        rows = [m[words.index(word)] for m, words in ((a, list(WORDS)), (other, order)) if word in words]
        torch.testing.assert_close(got[EMBEDDING][number].double(), sum(rows) / len(rows), rtol=1e-6, atol=1e-7)


def test_padded_embeddings(models):
    """#425, "Qwen2.5 14B models are .. having their token vocabulary truncated": 152,064 rows for 151,665 tokens become
    151,665 once `tokenizer_source` is set, without a word. Here it is said, with what keeps the size."""
    for name in ("a", "b"):
        rewrite(name, lambda t: t | {n: torch.cat([t[n], t[n].new_zeros(8, 8)]) for n in (EMBEDDING, "lm_head.weight")},
                vocab_size=16)
    plain = {"merge_method": "linear", "models": [entry("a", weight=1), entry("b", weight=1)]}
    got, said = merged(plain, "plain")
    assert len(got[EMBEDDING]) == config_of("plain")["vocab_size"] == 16 and said == []
    got, said = merged(plain | {"tokenizer": {"source": "a"}}, "cut")
    assert len(got[EMBEDDING]) == config_of("cut")["vocab_size"] == 8
    assert any("rows without a token are dropped" in text and "pad_to_multiple_of: 16" in text for text in said)
    got, _ = merged(plain | {"tokenizer": {"source": "a", "pad_to_multiple_of": 16}}, "kept")
    assert len(got[EMBEDDING]) == config_of("kept")["vocab_size"] == 16
    runs("kept")


def test_tokens_beyond_the_embedding(models):
    """#428, "Broken tokenizer in Yi-34B merge": added tokens with ids at or above vocab_size get into the result, which
    then cannot be converted. No token of a merged tokenizer is without a row."""
    tokenizer = json.loads((models / "a/tokenizer.json").read_text())
    for i, word in enumerate(("<beyond>", "<beyond2>")):
        tokenizer["added_tokens"].append({"id": 8 + i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
                                          "normalized": False, "special": True})
    (models / "a/tokenizer.json").write_text(json.dumps(tokenizer))
    for chosen in ("union", "a"):
        got, _ = merged({"merge_method": "linear", "tokenizer": {"source": chosen}, "models": [
            entry("a", weight=1), entry("b", weight=1)]}, f"out-{chosen}")
        ids = tokenizer_of(f"out-{chosen}").get_vocab().values()
        assert max(ids) < len(got[EMBEDDING]) == config_of(f"out-{chosen}")["vocab_size"]


def test_a_union_has_one_order(models):
    """The ids that a union gives to new tokens change from run to run, whatever PYTHONHASHSEED is: two merges of one config
    are not the same model."""
    write_checkpoint(models / "more", layers=4, words=[*WORDS, *(f"new{i}" for i in range(40))])
    (models / "config.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "tokenizer_source": "union", "models": [
        entry("a", weight=1), entry("more", weight=1)]}))
    found = []
    for seed in ("1", "2"):
        done = subprocess.run([sys.executable, "-m", "anabranch", "merge", "config.yaml", f"out-{seed}", "-q"], text=True,
                              capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": PACKAGE})
        assert done.returncode == 0, done.stderr
        found.append({p.name: p.read_bytes() for p in sorted((models / f"out-{seed}").iterdir())})
    assert found[0] == found[1]
    ids = tokenizer_of("out-1").get_vocab()
    assert [ids[f"new{i}"] for i in range(40)] == list(range(8, 48))


# --- chat templates and the files beside the weights ---


@pytest.mark.parametrize("text", ["{% for m in messages %}{{ m.content }} without an end", "no template",
                                  "{{ messages[0 ].content }"])
def test_a_chat_template_is_checked_first(models, text):
    """A template that is none fails after the merge is done, or is swallowed; #527."""
    assert "chat_template" in refused({"merge_method": "linear", "chat_template": text, "models": [entry("a", weight=1)]})


@pytest.mark.parametrize("name", ["llama3", "chatml", "alpaca", "mistral", "exaone", "auto",
                                  "{{ bos_token }}{{ messages[0].content }}!"])
def test_a_chat_template_works_in_the_result(models, name):
    """#589, "Chat Template issue": merges with `chat_template: llama3` cannot be deployed for chat. The template stands where
    transformers finds it, and applies; tokens that it writes and the model lacks are told of."""
    write_checkpoint(models / "a", layers=4, template="{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    _, said = merged({"merge_method": "linear", "chat_template": name, "models": [entry("a", weight=1), entry("b", weight=1)]})
    tokenizer = AutoTokenizer.from_pretrained("out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "one two"}], tokenize=False, add_generation_prompt=True)
    assert "one two" in text
    markers = {"llama3": "<|eot_id|>", "chatml": "<|im_start|>"}
    assert name not in markers or (markers[name] in text and any(markers[name] in warning for warning in said))


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": {"source": "union"}}, {"chat_template": "chatml"}])
def test_generation_config_comes_along(models, tokenizer):
    """generation_config.json is lost as soon as a tokenizer is merged or a chat template set: the model no longer knows how
    it ends."""
    (models / "a/generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6, "do_sample": True}))
    merged({"merge_method": "linear", "models": [entry("a", weight=1), entry("b", weight=1)], **tokenizer})
    generation = runs().generation_config
    assert (generation.eos_token_id, generation.temperature, generation.do_sample) == (1, 0.6, True)


def test_code_of_the_model_comes_along(models):
    """#105, "the model failed to load due to missing files": modelling code of a model with `auto_map` is not copied."""
    rewrite("a", lambda t: t, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (models / "a/modeling_mine.py").write_text("class Mine: ...\n")
    merged({"merge_method": "linear", "models": [entry("a", weight=1), entry("b", weight=1)]})
    assert (models / "out/modeling_mine.py").read_text() == "class Mine: ...\n"


# --- heads, and tensors that some models lack ---


def tie(name: str) -> None:
    rewrite(name, lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, tie_word_embeddings=True)


def test_a_tied_head_is_not_written(models):
    """#390, "saves tied and ignored weights": a Gemma 2 of 9.24 billion parameters comes out with 10.2 billion. Also where
    an input holds a copy of its embedding as a head."""
    for name in ("base", "a", "b"):
        tie(name)
    rewrite("b", lambda t: t | {"lm_head.weight": t[EMBEDDING].clone()})
    got, said = merged({"merge_method": "ties", "base_model": "base", "models": [entry("a", weight=1), entry("b", weight=1)]})
    assert "lm_head.weight" not in got and config_of()["tie_word_embeddings"] is True
    assert any("lm_head.weight" in text and "left out" in text for text in said)
    model = runs()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_head_of_its_own_is_loaded(models):
    """#464: with one tied and one untied model a mixed head is written, beside a config that ties it: transformers then
    ignores it."""
    tie("base")
    got, said = merged({"merge_method": "task_arithmetic", "base_model": "base", "models": [entry("a", weight=0.5)]})
    base, a = tensors_of(Path("base")), tensors_of(Path("a"))
    exact = base[EMBEDDING].double() + 0.5 * (a["lm_head.weight"].double() - base[EMBEDDING].double())
    assert float(bf16_error(got["lm_head.weight"], exact).max()) <= 0.5
    assert config_of()["tie_word_embeddings"] is False and any("tie_word_embeddings" in text for text in said)
    assert runs().lm_head.weight.equal(got["lm_head.weight"])


def test_gemma_of_words_and_pictures(models):
    """#632, "Gemma 3 27B slerp merge comes out as 28.8B", and #537, "GEmma 3 - pass-merge errors": a tied head is written,
    and layers cannot be stacked. The whole model is slerped as a list of `models`; its text layers are stacked by module."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    for seed, name in enumerate(("g0", "g1")):
        torch.manual_seed(seed)
        text = Gemma3TextConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                                num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=kinds)
        vision = SiglipVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                    image_size=16, patch_size=8)
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
        Gemma3ForConditionalGeneration(config).save_pretrained(models / name)
    parents = tensors_of(Path("g0"))
    got, _ = merged({"merge_method": "slerp", "base_model": "g0", "parameters": {"t": 0.5}, "models": [entry("g1")]}, "slerped")
    assert got.keys() == parents.keys() and "lm_head.weight" not in got

    def loads(folder: str) -> Any:
        model, info = Gemma3ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert bool(model(torch.arange(2, 8)[None]).logits.isfinite().all())
        return model

    loads("slerped")
    stacks = sorted({n.split(".layers.")[0] + ".layers" for n in parents if ".layers." in n})
    words, pictures = (next(s for s in stacks if part in s) for part in ("language", "vision"))
    config = {"merge_method": "passthrough", "slices": [{"sources": [source("g0", 0, 3)]}, {"sources": [source("g1", 1, 3)]}]}
    text = refused(config)
    assert words in text and pictures in text and "modules" in text
    merged({"merge_method": "passthrough", "modules": {
        words: {"slices": config["slices"]}, pictures: {"models": [entry("g0")]},
        "default": {"models": [entry("g0")]}}}, "stacked")
    model = loads("stacked")
    assert model.config.text_config.num_hidden_layers == 5
    assert model.config.text_config.layer_types == [*kinds, *kinds[1:]]
    assert model.config.vision_config.num_hidden_layers == 2


def test_one_stack_is_one_module(models):
    """#544: Command A, a plain decoder, "has multiple modules, must use modules: config syntax to work with slices", since
    the peer takes it for several."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    torch.manual_seed(0)
    config = Cohere2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    Cohere2ForCausalLM(config).save_pretrained("command")
    before = AutoModelForCausalLM.from_pretrained("command").config.layer_types
    merged({"merge_method": "passthrough", "slices": [
        {"sources": [source("command", 0, 3)]}, {"sources": [source("command", 1, 4)]}]})
    model = runs()
    assert model.config.num_hidden_layers == 6 and model.config.layer_types == [*before[:3], *before[1:4]]


def test_tensors_that_the_base_lacks(models):
    """#446, "KeyError model[0] did not exist in tensor?": a bias that a fine-tune has and the base has not is a bare
    KeyError midway. Here it is found first, with all such tensors in one message."""
    names = [f"model.layers.{i}.self_attn.o_proj.bias" for i in range(2)]
    write_checkpoint(models / "biased", layers=4, tensors={name: torch.ones(8) for name in names})
    text = refused({"merge_method": "dare_linear", "base_model": "base", "models": [
        entry("a", weight=1, density=0.5), entry("biased", weight=1, density=0.5)]})
    assert "biased has it and the base base has not" in text and names[0] in text


def test_names_under_another_prefix(models):
    """#653, #284, #286, and huggingface/transformers#29184: one model was saved with its head and one without, so that all
    names differ by `model.`: a KeyError of a ModelReference. Here the message says by what they differ."""
    rewrite("b", lambda t: {n.removeprefix("model."): x for n, x in t.items() if n != "lm_head.weight"},
            architectures=["Qwen2Model"])
    config = {"merge_method": "ties", "base_model": "base", "models": [entry("a", weight=1), entry("b", weight=1)]}
    text = refused(config)
    assert "b is Qwen2Model" in text and "base is Qwen2ForCausalLM" in text
    rewrite("b", lambda t: t, architectures=["Qwen2ForCausalLM"])
    text = refused(config)
    assert "b has few names of tensors in common" in text and "differ by the prefix `model.`" in text
    text = refused({"merge_method": "linear", "models": [entry("b", weight=1), entry("a", weight=1)]})
    assert "a has few names of tensors in common with b" in text and "differ by the prefix `model.`" in text


# --- adapters ---


def test_adapters_need_no_cache(models):
    """#442, "Need to specify cache dir to merge adapters", and #124: several adapters on one base, by a task arithmetic
    method, and no model is instantiated or saved on the way."""
    for name in ("x", "y"):
        write_adapter(models / name, layers=4)
    before = sorted(p.name for p in models.iterdir())
    got, _ = merged({"merge_method": "task_arithmetic", "base_model": "base", "models": [
        entry("base+x", weight=0.5), entry("base+y", weight=0.25)]})
    assert sorted(p.name for p in models.iterdir()) == sorted([*before, "out"])
    base, name = tensors_of(Path("base")), "model.layers.3.self_attn.q_proj.weight"
    exact = base[name].double()
    for adapter, weight in (("x", 0.5), ("y", 0.25)):
        state = {n: t.double() for n, t in load_adapter(models / adapter).items()}
        at = "base_model.model.model.layers.3.self_attn.q_proj.lora_{}.weight"
        exact = exact + weight * (4 / 2) * (state[at.format("B")] @ state[at.format("A")])
    assert float(bf16_error(got[name], exact).max()) <= 0.51
    assert got[UP.format(0)].equal(base[UP.format(0)])
    assert verify(Path("out")) == []


def load_adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_a_plus_in_a_path(models):
    """A folder whose name holds `+` cannot be named: the peer takes what follows for an adapter."""
    shutil.copytree("a", "a+b")
    got, said = merged({"merge_method": "passthrough", "models": [entry("a+b")]})
    assert got[UP.format(0)].equal(tensors_of(Path("a"))[UP.format(0)])
    assert any("a+b" in text for text in said)


def test_numbers_of_issues_are_numbers():
    """The docstrings cite issues as `#123`, and no test of a complaint goes without a docstring."""
    for name, value in list(globals().items()):
        if name.startswith("test_") and callable(value):
            assert value.__doc__, name
            assert all(0 < int(number) < 800 for number in re.findall(r"(?<![\w])#(\d+)", value.__doc__)), name
