"""Small verbs: layers by lot, layer slices with scale, a partial model in its place."""

from __future__ import annotations

import collections
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anabranch import cli, cli_surgery
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.making import make_model
from anabranch.engine.merging import merge_config, options_for, verify
from anabranch.errors import AnabranchError, ModelError, OutputError, RecipeError, ShapeMismatch
from anabranch.surgery.fill import filled
from anabranch.surgery.shuffle import shuffled_config
from tiny_checkpoints import tensors_of, write_adapter, write_checkpoint

app = typer.Typer()
for verb in ("tensors", "shuffle", "fill"):
    app.command(verb)(getattr(cli_surgery, verb))


def run(*arguments: object) -> str:
    """What a command prints. An error of ours is raised, anything else too."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_checkpoint(tmp_path / name, layers=4)
    return tmp_path


def layer(tensors: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    at = f"model.layers.{i}."
    return {n.removeprefix(at): t for n, t in tensors.items() if n.startswith(at)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(t.equal(other[n]) for n, t in one.items())


# ----------------------------------------------------------------------------------------------------- layers by lot


def picked(config: dict) -> list[tuple[str, int]]:
    """The layers of a config, one by one."""
    return [(source["model"], i) for s in config["slices"] for source in s["sources"] for i in range(*source["layer_range"])]


def test_in_place_every_layer_keeps_its_number():
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(200):
        config = shuffled_config(["x", "y"], [30, 30], [1, 3], seed=seed)
        assert [i for _, i in picked(config)] == list(range(30))
        models = [s["sources"][0]["model"] for s in config["slices"]]
        assert all(one != other for one, other in itertools.pairwise(models))  # runs are joined
        counts.update(model for model, _ in picked(config))
    assert counts["y"] / 6000 == pytest.approx(0.75, abs=0.03)  # 5 standard errors


def test_full_random_draws_from_all_layers():
    """The peer draws them from the first int(weight * layers) only."""
    seen: collections.Counter[tuple[str, int]] = collections.Counter()
    for seed in range(300):
        config = shuffled_config(["x", "y"], [10, 20], [0.5, 0.29], full_random=True, seed=seed)
        layers = picked(config)
        assert collections.Counter(m for m, _ in layers) == {"x": 5, "y": int(20 * 0.29)}
        seen.update(layers)
    assert {i for m, i in seen if m == "x"} == set(range(10)) and {i for m, i in seen if m == "y"} == set(range(20))
    assert min(seen[("x", i)] for i in range(10)) > 100  # 150 are expected, 12 a standard deviation


def test_the_seed_decides_and_nothing_else():
    one, again, other = (shuffled_config(["x", "y"], [40, 40], [1, 1], seed=s) for s in (1, 1, 2))
    assert one == again != other
    for weights in ([2, 2], [1e308, 1e308]):  # chances are in proportion
        assert picked(shuffled_config(["x", "y"], [40, 40], weights, seed=1)) == picked(one)


@pytest.mark.parametrize(("models", "layers", "weights", "full", "kind", "says"), [
    (["x", "y"], [2, 2], [1], False, RecipeError, "2 models (-m) and 1 weights (-w)"),
    ([], [], [], False, RecipeError, "no model is given"),
    (["x", "y"], [2, 2], [0, 0], False, RecipeError, "all weights are 0"),
    (["x", "y"], [2, 2], [-1, float("nan")], False, RecipeError, "weight -1"),
    (["x", "y"], [2, 2], [0.3, 0.3], True, RecipeError, "no layer is taken"),
    (["x", "y"], [2, 2], [1e308, 1e308], True, RecipeError, "more than 10,000 layers"),
    (["x", "y"], [2, 2], [5001, 0], True, RecipeError, "more than 10,000 layers"),
    (["x", "y"], [2, 3], [1, 1], False, ShapeMismatch, "x has 2, y has 3"),
])
def test_lots_that_cannot_be_drawn(models, layers, weights, full, kind, says):
    with pytest.raises(kind) as caught:
        shuffled_config(models, layers, weights, full_random=full)
    assert says in str(caught.value)


@pytest.mark.parametrize("full", [False, True])
def test_the_command_gives_those_layers(here, full):
    """Its config is printed, can be kept, and gives the same bytes as a merge config."""
    options = ["-m", "a", "-m", "b", "-w", "0.6", "-w", "0.8", "--seed", "5", *(["--full-random"] if full else [])]
    printed = run("shuffle", "out", *options, "--print-config", "--write-config", "drawn.yaml")
    config = yaml.safe_load(Path("drawn.yaml").read_text())
    assert Path("drawn.yaml").read_text() in printed
    assert config == shuffled_config(["a", "b"], [4, 4], [0.6, 0.8], full_random=full, seed=5)
    models, out = {m: tensors_of(here / m) for m in "ab"}, tensors_of(here / "out")
    layers = picked(config)
    assert {m for m, _ in layers} == {"a", "b"}
    assert json.loads((here / "out" / "config.json").read_text())["num_hidden_layers"] == len(layers)
    for i, (model, source) in enumerate(layers):
        assert same(layer(out, i), layer(models[model], source)), i
    assert out["model.embed_tokens.weight"].equal(models[layers[0][0]]["model.embed_tokens.weight"])
    assert out["lm_head.weight"].equal(models[layers[-1][0]]["lm_head.weight"])
    merge_config(Path("drawn.yaml"), here / "again", options=options_for(5))
    assert (here / "again" / "model.safetensors").read_bytes() == (here / "out" / "model.safetensors").read_bytes()
    assert verify(here / "out") == []


def test_a_dry_run_keeps_the_config_alone(here):
    text = run("shuffle", "out", "-m", "a", "-m", "b", "-w", "1", "-w", "1", "--dry-run", "--write-config", "drawn.yaml")
    assert "tensors: 51 (51 copied)" in text and {p.name for p in here.iterdir()} == {"a", "b", "c", "drawn.yaml"}
    with pytest.raises(OutputError, match="is something else"):
        run("shuffle", "out", "-m", "a", "-m", "c", "-w", "1", "-w", "1", "--dry-run", "--write-config", "drawn.yaml")
    for place, says in (("drawn.yaml", "is something else"), ("none/drawn.yaml", "there is no folder")):
        with pytest.raises(OutputError, match=says):  # before the work
            run("shuffle", "out", "-m", "a", "-m", "c", "-w", "1", "-w", "1", "--write-config", place)
    assert {p.name for p in here.iterdir()} == {"a", "b", "c", "drawn.yaml"}


def test_a_shuffled_dtype_and_an_adapter(here):
    write_adapter(here / "lora", layers=4)
    run("shuffle", "out", "-m", "a+lora", "-w", "1", "--dtype", "float32")
    out, plain = tensors_of(here / "out"), tensors_of(here / "a")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert out[name].dtype == torch.float32 and not torch.allclose(out[name], plain[name].float())
    with pytest.raises(AnabranchError, match="int9"):
        run("shuffle", "out2", "-m", "a", "-w", "1", "--dtype", "int9")
    with pytest.raises(RecipeError, match="this is no model"):
        run("shuffle", "out2", "-m", "./nowhere", "-w", "1")


# ------------------------------------------------------------------------------------------------------- layer slices


def test_layer_slices_and_the_two_sources(here):
    """The peer never reads the sources, and cannot run at all."""
    (here / "slices.yaml").write_text(yaml.safe_dump({
        "layer_slices": [{"model": "a", "start": 0, "end": 3, "scale": 0.5}, {"model": "b", "start": 1, "end": 4}],
        "embedding_source": "c", "lm_head_source": "a"}))
    merge_config(here / "slices.yaml", here / "out")
    out, a, b, c = (tensors_of(here / m) for m in ("out", "a", "b", "c"))
    for i in range(3):
        wanted = layer(a, i)
        wanted["mlp.down_proj.weight"] = (wanted["mlp.down_proj.weight"].float() * 0.5).bfloat16()
        assert same(layer(out, i), wanted) and same(layer(out, 3 + i), layer(b, 1 + i))
    assert out["model.embed_tokens.weight"].equal(c["model.embed_tokens.weight"])
    assert out["model.norm.weight"].equal(a["model.norm.weight"]) and out["lm_head.weight"].equal(a["lm_head.weight"])
    assert len(layer(out, 5)) == len(layer(a, 0)) and not layer(out, 6)
    made = json.loads((here / "out" / "config.json").read_text())
    assert made["num_hidden_layers"] == 6 and len(made["layer_types"]) == 6
    assert (here / "out" / "tokenizer.json").read_bytes() == (here / "c" / "tokenizer.json").read_bytes()
    assert verify(here / "out") == []


def test_layer_slices_without_sources_take_the_outermost(here):
    merge_config({"layer_slices": [{"model": "a", "start": 2, "end": 4}, {"model": "b", "start": 0, "end": 1, "scale": 2}],
                  "dtype": "float32", "name": "stack"}, here / "out")
    out, a, b = (tensors_of(here / m) for m in ("out", "a", "b"))
    assert out["model.embed_tokens.weight"].equal(a["model.embed_tokens.weight"].float())
    assert out["lm_head.weight"].equal(b["lm_head.weight"].float())
    assert layer(out, 2)["mlp.down_proj.weight"].equal(2 * layer(b, 0)["mlp.down_proj.weight"].float())
    assert layer(out, 2)["mlp.up_proj.weight"].equal(layer(b, 0)["mlp.up_proj.weight"].float())


def test_layer_slices_load_in_transformers(here):
    from transformers import AutoModelForCausalLM

    merge_config({"layer_slices": [{"model": "a", "start": 0, "end": 4, "scale": 0.0}, {"model": "b", "start": 3, "end": 4}]},
                 here / "out")
    model, info = AutoModelForCausalLM.from_pretrained(here / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model(torch.tensor([[2, 3, 4]])).logits.shape == (1, 3, 8) and len(model.model.layers) == 5


@pytest.mark.parametrize(("config", "says"), [
    ({"layer_slices": []}, ["layer_slices: got none"]),
    ({"layer_slices": "a"}, ["layer_slices: got 'a', wanted a list"]),
    ({"layer_slices": [{"model": "a", "start": 2, "end": 2}]}, ["layer_slices[0]: start 2, end 2 hold no layer"]),
    ({"layer_slices": [{"model": "a", "start": -1, "end": 2.5}]},
     ["layer_slices[0].start: got -1", "layer_slices[0].end: got 2.5"]),
    ({"layer_slices": [{"start": 0, "ends": 2}, "b"]},
     ["layer_slices[0].model: required", "unknown key `ends`. Did you mean `end`?", "layer_slices[1]: got 'b', wanted a"]),
    ({"layer_slices": [{"model": "a", "start": 0, "end": 9}]},
     ["layer_slices[0]: layer_range [0, 9] of a, which has 4 layers"]),
    ({"layer_slices": [{"model": "a", "start": 0, "end": 2, "scale": [1, 2]}]}, ["scale: got a list of 2, wanted a number"]),
    ({"layer_slices": [{"model": "a", "start": 0, "end": 2}], "merge_method": "linear"}, ["`layer_slices` is always"]),
    ({"layer_slices": [{"model": "a", "start": 0, "end": 2}], "slices": [], "embeding_source": "b"},
     ["unknown key `slices`", "unknown key `embeding_source`. Did you mean `embedding_source`?"]),
    ({"layer_slices": [{"model": "a", "start": 0, "end": 2}], "lm_head_source": 3}, ["lm_head_source: got 3"]),
])
def test_layer_slices_that_are_refused(here, config, says):
    with pytest.raises(RecipeError) as caught:
        merge_config(config, here / "out")
    for piece in says:
        assert piece in str(caught.value)
    assert not (here / "out").exists()


# ----------------------------------------------------------------------------------------------------- a partial model


def fill(base: str, partial: str, out: str = "out", **more) -> tuple[dict[str, torch.Tensor], list[str]]:
    part = Checkpoint.of_file(Path(partial)) if Path(partial).is_file() else Checkpoint.open(Path(partial), config_needed=False)
    made, files, reads, told = filled(Checkpoint.open(Path(base)), part, (base, partial))
    make_model(out, made, files, reads, verb="fill", settings={}, **more)
    return tensors_of(Path(out)), told


def write_part(place: Path, tensors: dict[str, torch.Tensor]) -> Path:
    place.mkdir()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture
def whole(here):
    """A model of two towers, one deep under a prefix of two parts, in bfloat16 and several shards."""
    text = {n.replace("model.", "model.language_model."): t for n, t in tensors_of(here / "a").items()}
    save_file(text | {"model.vision.weight": torch.ones(3, 4), "model.steps": torch.arange(5)},
              here / "a" / "model.safetensors", metadata={"format": "pt"})
    return here


def test_a_part_under_its_prefix(whole):
    """A prefix of two parts, where the peer knows one, and the language model has its own `model.`."""
    part = {n.removeprefix("model."): t + 1 for n, t in tensors_of(whole / "b").items() if n != "lm_head.weight"}
    write_part(whole / "part", part)
    out, told = fill("a", "part", max_shard_size="1KB")
    before = tensors_of(whole / "a")
    assert out.keys() == before.keys() and len(list((whole / "out").glob("*.safetensors"))) > 1
    for name, tensor in out.items():
        theirs = part.get(name.removeprefix("model.language_model."))
        assert tensor.equal(before[name] if theirs is None else theirs), name
    assert told[0] == f"{len(part)} of {len(before)} tensors come from part, the others from a"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (whole / "out" / name).read_bytes() == (whole / "a" / name).read_bytes()
    assert verify(whole / "out", files_only=True) == []


def test_a_part_with_a_prefix_of_its_own(here):
    """The other way round: the part's names go deeper than the model's."""
    part = {f"wrapped.{n}": t + 1 for n, t in tensors_of(here / "b").items() if "layers.2" in n}
    save_file(part, "part.safetensors")
    out, _ = fill("a", "part.safetensors")
    before = tensors_of(here / "a")
    assert all(t.equal(part.get(f"wrapped.{n}", before[n])) for n, t in out.items())


def test_a_tensor_with_and_without_a_prefix_is_not_dropped(here):
    """Both could go to one place, and one would be lost."""
    found = {n: t for n, t in tensors_of(here / "b").items() if "layers.2" in n}
    name, tensor = next(iter(found.items()))
    save_file({name: tensor + 1, **{f"wrapped.{n}": t for n, t in found.items()}}, "part.safetensors")
    with pytest.raises(ShapeMismatch, match=f"(?s)has no place for.*'wrapped.{name}'"):
        fill("a", "part.safetensors")


def test_one_stranger_under_a_prefix_of_the_parts_own_is_named(here):
    found = {f"wrapped.{n}": t for n, t in tensors_of(here / "b").items() if "layers.2" in n}
    for stranger in ("foreign", "wrapped.foreign"):
        save_file(found | {stranger: torch.ones(1)}, "part.safetensors")
        with pytest.raises(ShapeMismatch, match=f"(?s)\\({len(found)} others have one\\).*'{stranger}'") as caught:
            fill("a", "part.safetensors")
        assert str(caught.value).count("tensor '") == 1


def test_names_as_they_are_come_first(here):
    save_file({"norm": torch.zeros(2), "inner.norm": torch.ones(2)}, here / "a" / "model.safetensors")
    save_file({"norm": torch.full((2,), 5.0)}, "part.safetensors")
    out, _ = fill("a", "part.safetensors")
    assert out["norm"].equal(torch.full((2,), 5.0)) and out["inner.norm"].equal(torch.ones(2))


def test_two_places_are_told_apart_by_shape_or_refused(here):
    save_file({"text.w": torch.zeros(2), "image.w": torch.zeros(3)}, here / "a" / "model.safetensors")
    save_file({"w": torch.ones(3)}, "part.safetensors")
    out, _ = fill("a", "part.safetensors")
    assert out["image.w"].equal(torch.ones(3)) and out["text.w"].equal(torch.zeros(2))
    save_file({"text.w": torch.zeros(3), "image.w": torch.zeros(3)}, here / "b" / "model.safetensors")
    with pytest.raises(ShapeMismatch, match="could be one of several parts"):
        fill("b", "part.safetensors", "out2")


def test_rounded_to_the_dtype_of_the_base(here):
    part = {n: t.float() + 1e-3 for n, t in tensors_of(here / "b").items() if "layers.1" in n}
    save_file(part, "part.safetensors")
    out, told = fill("a", "part.safetensors")
    assert all(out[n].equal(t.bfloat16()) for n, t in part.items())
    assert "13 tensors" not in told[1] and f"{len(part)} tensors of part.safetensors are rounded" in told[1]


@pytest.mark.parametrize(("part", "says"), [
    ({"model.norm.weight": torch.ones(9)}, "'model.norm.weight': part.safetensors has shape [9], a has [8]"),
    ({"model.norm.weight": torch.ones(8).int()}, "'model.norm.weight': part.safetensors has I32, a has BF16"),
    ({"model.norm.weight": torch.ones(8), "model.extra": torch.ones(1)}, "tensor 'model.extra'"),
    ({"quite": torch.ones(1), "another": torch.ones(2)}, "none of its 2 tensors is one of a"),
])
def test_parts_that_do_not_fit(here, part, says):
    """Where the peer warns of a size, writes the other tensor, and drops what has no place."""
    save_file(part, "part.safetensors")
    with pytest.raises(ShapeMismatch) as caught:
        run("fill", "a", "part.safetensors", "out")
    assert says in str(caught.value) and not list(here.glob("out*"))


def test_a_models_own_code_comes_along(here):
    (here / "a" / "modeling_own.py").write_text("raise SystemExit\n")
    save_file({n: t for n, t in tensors_of(here / "b").items() if "layers.2" in n}, "part.safetensors")
    fill("a", "part.safetensors")
    assert not (here / "out" / "modeling_own.py").exists()
    shutil.rmtree(here / "out")
    config = json.loads((here / "a" / "config.json").read_text())
    (here / "a" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Own"}}))
    fill("a", "part.safetensors")
    assert (here / "out" / "modeling_own.py").read_text() == "raise SystemExit\n"


def test_all_mismatches_in_one_message(here):
    part = {n: torch.ones(1) for n in tensors_of(here / "a") if "norm" in n}
    save_file(part, "part.safetensors")
    with pytest.raises(ShapeMismatch) as caught:
        fill("a", "part.safetensors")
    assert str(caught.value).count("has shape [1]") == len(part) == 9


def test_the_command(whole):
    tensors = tensors_of(whole / "b")
    write_part(whole / "part", {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"})
    before = {p.name for p in whole.iterdir()}
    lines = run("fill", "a", "part", "out", "--dry-run").splitlines()
    assert lines[0].startswith("50 of 53 tensors come from part") and {p.name for p in whole.iterdir()} == before
    text = run("fill", "a", "part", "out", "--json")
    assert json.loads(text.splitlines()[-1])["event"] == "done" and len(tensors_of(whole / "out")) == 53
    with pytest.raises(OutputError, match="one of the inputs"):
        run("fill", "a", "part", "part")
    shutil.rmtree("part")
    write_part(whole / "part", {"layers.0.input_layernorm.weight": torch.full((8,), 3.0)})
    with pytest.raises(OutputError, match="but of other inputs"):
        run("fill", "a", "part", "out")


def test_models_that_cannot_be_filled(here):
    (here / "empty").mkdir()
    for base, partial, kind in (("nowhere/x/y", "a", AnabranchError), ("a", "empty", ModelError), ("a+b", "c", AnabranchError)):
        with pytest.raises(kind):
            run("fill", base, partial, "out")
    save_file({"w": torch.ones(2, 2).byte(), "w.absmax": torch.ones(2)}, "packed.safetensors")
    with pytest.raises(ModelError, match="quantised"):
        run("fill", "a", "packed.safetensors", "out")
    assert not os.path.exists("out")


# ------------------------------------------------------------------------------------------------- raw tensors, the command


def test_the_tensors_command(here):
    for name in "ab":
        save_file({"w": torch.full((2, 2), float(ord(name))), name: torch.ones(1)}, f"{name}.safetensors")
    Path("t.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "parameters": {"weight": 1}, "models": [
        {"model": "a.safetensors"}, {"model": "b.safetensors"}]}))
    with pytest.raises(ShapeMismatch, match="--tensor-union"):
        run("tensors", "t.yaml", "out")
    with pytest.raises(RecipeError, match="give one of them"):
        run("tensors", "t.yaml", "out", "-u", "-i")
    assert "would" not in run("tensors", "t.yaml", "out", "-u", "--dry-run") and not Path("out").exists()
    run("tensors", "t.yaml", "out", "-u")
    run("tensors", "t.yaml", "small.safetensors", "--tensor-intersection", "--quiet")
    assert tensors_of(Path("out")).keys() == {"w", "a", "b"} and load_file("small.safetensors").keys() == {"w"}
    assert load_file("small.safetensors")["w"].equal(torch.full((2, 2), 97.5))


def test_a_finished_fill_says_that_nothing_was_done(tmp_path):
    whole, part = write_checkpoint(tmp_path / "whole"), write_checkpoint(tmp_path / "part", tensors={"model.norm.weight": None})
    first, again = (CliRunner().invoke(cli.app, ["fill", str(whole), str(part), str(tmp_path / "out")]) for _ in range(2))
    assert first.exit_code == again.exit_code == 0
    assert "nothing was done" not in first.output and "nothing was done" in again.output
