"""Any config gives a plan or one error for the user, never a traceback: generated configs over tiny checkpoints.

`ANABRANCH_FUZZ=6000 pytest tests/properties/test_dialect_fuzz.py` runs more of them; a seed that fails is printed.
"""

import copy
import datetime
import json
import os
import random

import pytest
import torch
import yaml
from safetensors.torch import save_file

from anabranch.engine.assemble import assemble
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.dialect import read_config
from anabranch.engine.layout import layout_of
from anabranch.errors import AnabranchError, ModelError
from anabranch.merge import METHODS, arguments_for

CONFIGS = int(os.environ.get("ANABRANCH_FUZZ", "1500"))
CHUNKS = 10
METHOD_NAMES = sorted(METHODS)
ALIKE = ["base", "a", "b", "c"]
ODD = ["wide", "deep", "odd", "biased", "tied", "ids", "vision", "gpt", "packed", "half", "gone", "org/nowhere", "./gone+x",
       "a@main"]
PARAMETERS = ["weight", "density", "t", "normalize", "lambda", "scale", "gamma", "epsilon", "rescale", "int8_mask",
              "select_topk", "filter_wise", "max_iter", "tol", "eps", "normalize_weights", "nuslerp_flatten",
              "nuslerp_row_wise", "r", "alpha", "beta", "floor", "clamp", "energy", "common_share", "row_wise", "flatten"]
WEIRD = [None, True, False, 0, -1, 1, 2, 1e308, -1e308, float("nan"), float("inf"), 10**30, 0.5, "", "x", "0.5", "true",
         "base", "union", "1e400", [], {}, [[]], [None], [0, "x"], [1, 2, 3], {"value": 1}, {"filter": "mlp"},
         {"path": "a"}, {"model": "a"}, {"kind": "zero"}, [{"value": [0, 1]}, {"value": 2}], datetime.date(2024, 1, 1),
         b"\xff", "é" * 3, "\x7f", "a" * 5000, "a+b+c", {1: 2}, {None: None}, {"a": {"a": {"a": []}}}, "../..",
         "~nobody/x", "{{ template of a certain length }}"]


def tensors(layers=2, rows=8, tied=False):
    found = {"model.embed_tokens.weight": torch.zeros(rows, 4), "model.norm.weight": torch.zeros(4)}
    for i in range(layers):
        found |= {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(4, 4),
                  f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(8, 4)}
    return found if tied else found | {"lm_head.weight": torch.zeros(rows, 4)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, {path: opened checkpoint and its layout})."""
    folder = tmp_path_factory.mktemp("models").resolve()
    up = "model.layers.1.mlp.up_proj.weight"
    made = {name: (tensors(), {}) for name in ALIKE} | {
        "wide": (tensors(rows=10), {"vocab_size": 10}), "deep": (tensors(3), {"num_hidden_layers": 3}),
        "odd": (tensors() | {up: torch.zeros(6, 4)}, {}), "tied": (tensors(tied=True), {"tie_word_embeddings": True}),
        "biased": (tensors() | {"model.layers.0.mlp.up_proj.bias": torch.zeros(8)}, {}),
        "ids": (tensors() | {"model.position_ids": torch.arange(3), "model.scale": torch.tensor(1.0)}, {}),
        "vision": ({k.replace("model.layers", f"{s}.layers"): v for s in ("vision_tower", "text_model")
                    for k, v in tensors().items()},
                   {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 2}}),
        "gpt": (tensors(), {"architectures": ["GPT2LMHeadModel"]}), "packed": (tensors(), {"quantization_config": {"bits": 4}}),
        "half": ({k: v.half() for k, v in tensors().items()}, {})}
    opened = {}
    for name, (values, config) in made.items():
        (folder / name).mkdir()
        save_file(values, folder / name / "model.safetensors")
        said = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "vocab_size": 8, "tie_word_embeddings": False}
        (folder / name / "config.json").write_text(json.dumps(said | config))
        checkpoint = Checkpoint.open(folder / name)
        opened[str(folder / name)] = (checkpoint, layout_of(checkpoint))
    save_file(tensors(), folder / "fisher.safetensors")
    return folder, opened


def number(rng):
    return rng.choice([0, 0.1, 0.3, 0.5, 0.7, 1, 1.0, 2, -0.5, True, "0.5", round(rng.uniform(-2, 2), 3), rng.random(), 1e-5])


def setting(rng):
    kind = rng.random()
    if kind < 0.6:
        return number(rng)
    if kind < 0.8:
        return [number(rng) for _ in range(rng.randint(1, 4))]
    choices = [{"filter": rng.choice(["mlp", "self_attn", "lm_head", "*", "nothing"]),
                "value": setting(rng) if rng.random() < 0.1 else number(rng)} for _ in range(rng.randint(0, 2))]
    return [*choices, {"value": [number(rng), number(rng)]}] if rng.random() < 0.8 else choices


def model(rng):
    name = rng.choice(ALIKE) if rng.random() < 0.85 else rng.choice(ODD)
    return {"model": {"path": name}} if rng.random() < 0.05 else name


def parameters(rng, some):
    wanted = set(some) if rng.random() < 0.9 else set()
    if rng.random() < 0.3:
        wanted |= set(rng.sample(PARAMETERS, rng.randint(0, 3)))
    return {name: setting(rng) for name in sorted(wanted)}


def entries(rng, layers=None):
    names = rng.sample(ALIKE, rng.randint(1, 3)) if rng.random() < 0.8 else [model(rng) for _ in range(rng.randint(1, 4))]
    found = [{"model": name, "parameters": parameters(rng, ["weight"])} for name in names]
    for entry in found if rng.random() < 0.05 else []:
        entry["fisher"] = rng.choice(["fisher.safetensors", "fisher.safetensors", "gone.safetensors", "a"])
    for entry in found if layers else []:
        start = rng.choice([0, 0, 0, 1])
        entry["layer_range"] = [start, start + layers] if rng.random() < 0.95 else [rng.randint(-1, 3), rng.randint(-1, 5)]
    return found


def slices(rng):
    return [{"sources": entries(rng, rng.randint(1, 2)), **({"parameters": parameters(rng, [])} if rng.random() < 0.3 else {}),
             **({"base_model": model(rng)} if rng.random() < 0.1 else {})} for _ in range(rng.randint(1, 3))]


def config(rng):
    found = {"merge_method": rng.choice(METHOD_NAMES), "base_model": model(rng)}
    if rng.random() < 0.1 or found["merge_method"] in ("linear", "karcher", "passthrough", "fisher"):
        del found["base_model"]
    kind = rng.random()
    if kind < 0.6:
        found["models"] = entries(rng)
    elif kind < 0.85:
        found["slices"] = slices(rng)
    else:
        names = rng.choice([["default"], ["default", "text_model.layers", "vision_tower.layers"], ["decoder"]])
        found["modules"] = {n: {"models": entries(rng)} if rng.random() < 0.6 else {"slices": slices(rng)} for n in names}
    some = ["t"] if found["merge_method"] in ("slerp", "nearswap") else ["density"] if rng.random() < 0.3 else []
    found["parameters"] = parameters(rng, some)
    if rng.random() < 0.3:
        found["dialect"] = rng.choice(["native", "mergekit"])
    if rng.random() < 0.3:
        found[rng.choice(["dtype", "out_dtype"])] = rng.choice(["bfloat16", "float16", "float32", "torch.float32"])
    if rng.random() < 0.2:
        source = rng.choice(["a", {"kind": "model_token", "model": "b", "token_id": 1}, {"kind": "zero"}])
        found["tokenizer"] = {"source": rng.choice(["union", "base", "a", "elsewhere"]), "tokens": {"<x>": {"source": source}}}
    if rng.random() < 0.1:
        found["chat_template"] = rng.choice(["auto", "chatml", "no such thing"])
    return found


def nodes(value, path=()):
    """Every (container, key) below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from nodes(inner)


def mutate(rng, value):
    places = list(nodes(value))
    if not places:
        return
    where, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.35:
        where[key] = copy.deepcopy(rng.choice(WEIRD))
    elif kind < 0.5:
        del where[key]
    elif isinstance(where, list):
        where.insert(key, copy.deepcopy(where[key]))
    elif kind < 0.8:  # misspell
        text = str(key)
        at = rng.randrange(len(text) + 1)
        where[text[:at] + rng.choice("aeix_ ") + text[at + (rng.random() < 0.5):]] = where.pop(key)
    else:  # move a key to another level
        target = rng.choice([v for v, _ in places if isinstance(v, dict)] or [value])
        if target is not where and not any(w is target for w, _ in nodes(where.get(key))) and target is not where.get(key):
            target[key] = where.pop(key)


def spoiled(rng, text):
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at] = " " + lines[at]
    elif kind == 2:
        lines.insert(at, rng.choice(["---", "- x", "? [a]", "<<: *a", "a: &a [*a]", "\t", "!!python/none", "\x00", "{",
                                     "x: 1:30"]))
    elif kind == 3:
        lines[at] += rng.choice([":", " {", "'", '"', " #", " |", " &x", "]"])
    else:
        cut = rng.randrange(len(text))
        return text[:cut]
    return "\n".join(lines)


def run(seed, folder, opened):
    """'planned' or 'refused'; anything else is raised."""
    rng = random.Random(seed)
    value = config(rng)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])):
        mutate(rng, value)
    text = yaml.safe_dump(value, allow_unicode=True, sort_keys=False)
    if rng.random() < 0.1:
        text = spoiled(rng, text)
    try:
        read = read_config(text, folders=(folder,), allow_unknown_keys=rng.random() < 0.3)
        assert len(set(read.models + read.tokenizers_only)) == len(read.models) + len(read.tokenizers_only)
        gone = [m for m in read.models if m.path not in opened]
        if gone:
            raise ModelError(f"no such folder: {gone}")
        inputs, layouts = zip(*(opened[m.path] for m in read.models), strict=True)
        result = assemble(read, inputs, layouts, rows=12 if read.tokenizer else None, allow_mixed=rng.random() < 0.5)
    except AnabranchError as error:
        assert str(error).strip() and " object at 0x" not in str(error) and len(str(error)) < 40_000
        return "refused"
    assert_whole(read, inputs, result)
    return "planned"


def assert_whole(read, inputs, result):
    names = [w.name for w in result.wanted]
    assert names and len(set(names)) == len(names)
    assert all(isinstance(w, str) and w for w in result.warnings)
    for wanted in result.wanted:
        for source in wanted.sources:
            assert source.name in inputs[source.input].tensors
        if not wanted.method:
            continue
        method, k = METHODS[wanted.method], len(wanted.branches)
        assert method.branches[0] <= k <= method.branches[1]
        assert dict(wanted.arguments) == arguments_for(method, dict(wanted.arguments), k)
        assert (wanted.weights is not None) == ("weights" in method.inputs) and len(wanted.weights or wanted.branches) == k
        assert wanted.base is not None or not method.needs_base
        for source in wanted.sources:
            shape = inputs[source.input].tensors[source.name].shape
            assert shape == wanted.shape or (wanted.embedding and read.tokenizer and shape[1:] == wanted.shape[1:])


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_plan_or_one_error(world, chunk):
    outcomes = []
    for seed in range(chunk, CONFIGS, CHUNKS):
        try:
            outcomes.append(run(seed, *world))
        except Exception as error:
            raise AssertionError(f"seed {seed} gives {type(error).__name__}: {error}") from error
    assert outcomes.count("planned") > len(outcomes) / 10  # else it tries nothing but refusals
    assert outcomes.count("refused") > len(outcomes) / 10
