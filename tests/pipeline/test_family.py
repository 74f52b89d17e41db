"""Several merges in one file: names where models are named, an order, and only what has changed made again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from anabranch.engine import family as families
from anabranch.engine.family import forecast_family, is_family, merge_family
from anabranch.engine.graph import documents_in, read_graph
from anabranch.engine.merging import merge_config, options_for, verify
from anabranch.errors import AnabranchError, CorruptedError, ModelError, OutputError, RecipeError, ShapeMismatch
from tiny_checkpoints import tensors_of, write_adapter, write_checkpoint

TEMPLATE = "{{ a + b + c }} at @ and @ {{ messages }}"
# A merge called like a method, one called like a word of the grammar, and a text with two `+` and two `@` (C73).
FAMILY = f"""
# what this family is for
name: linear
merge_method: linear
models:
- {{model: a, parameters: {{weight: 3}}}}
- {{model: b, parameters: {{weight: 1}}}}
dtype: float32
---
name: second
merge_method: task_arithmetic
base_model: base
models:
- {{model: linear, parameters: {{weight: 0.5}}}}
- {{model: c, parameters: {{weight: 1}}}}
dtype: float32
---
merge_method: linear
models:
- {{model: second, parameters: {{weight: 1}}}}
- {{model: {{model: {{path: linear}}}}, parameters: {{weight: 1}}}}
dtype: float32
chat_template: "{TEMPLATE}"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "base"):
        write_checkpoint(tmp_path / name)
    (tmp_path / "family.yaml").write_text(FAMILY)
    return tmp_path


def by_hand(here: Path, c: str = "c") -> dict[str, torch.Tensor]:
    """The whole family in float64, with the intermediate results rounded to float32 as they are stored."""
    a, b, third, base = ({n: t.double() for n, t in tensors_of(here / m).items()} for m in ("a", "b", c, "base"))
    linear = {n: ((3 * a[n] + b[n]) / 4).float().double() for n in a}
    second = {n: (base[n] + 0.5 * (linear[n] - base[n]) + (third[n] - base[n])).float().double() for n in a}
    return {n: (second[n] + linear[n]) / 2 for n in a}


def assert_close(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    got = tensors_of(folder)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=1e-6, atol=1e-7)


def write_family(here: Path, *documents: dict, name: str = "family.yaml") -> Path:
    (here / name).write_text("\n---\n".join(yaml.safe_dump(d) for d in documents))
    return here / name


def linear(*models: str, **more) -> dict:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **more}


def made_by(results) -> dict:
    return {r.name: r.made for r in results}


# --------------------------------------------------------------------------------------------------------------- results


def test_the_result_is_the_graph_computed_by_hand(here):
    """C73: a merge called `linear`, and a template with `+` and `@`, survive."""
    results = merge_family("family.yaml", "out")
    assert_close(here / "out", by_hand(here))
    assert (here / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert [(r.name, r.place, r.made) for r in results] == [(None, here / "out", True)]
    assert {p.name for p in here.iterdir()} == {"a", "b", "c", "base", "family.yaml", "out"}  # intermediates are gone


def test_each_merge_is_the_bytes_of_merging_it_alone(here):
    merge_family("family.yaml", "out", intermediates="kept")
    for (text, _), name in zip(documents_in(FAMILY), ("linear", "second", None), strict=True):
        (here / "kept" / "one.yaml").write_text(text)
        merge_config(here / "kept" / "one.yaml", here / "alone")
        place = here / "kept" / name if name else here / "out"
        for path in sorted(place.iterdir()):
            if path.name != "manifest.json":
                assert path.read_bytes() == (here / "alone" / path.name).read_bytes(), path
        shutil.rmtree(here / "alone")
    assert not verify(here / "out") and not verify(here / "kept" / "second")


def test_the_card_and_the_config_of_a_result_are_its_own_document(here):
    merge_family("family.yaml", "out", intermediates="kept")
    texts = [text for text, _ in documents_in(FAMILY)]
    assert (here / "kept" / "linear" / "mergekit_config.yml").read_text() == texts[0]
    assert "# what this family is for" in texts[0] and "second" not in texts[0]
    assert (here / "out" / "mergekit_config.yml").read_text() == texts[2]


def test_documents_in_any_order(here):
    documents = [value for _, value in documents_in(FAMILY)]
    write_family(here, *reversed(documents))
    assert [d.name for d in read_graph(Path("family.yaml").read_text()).documents] == ["linear", "second", None]
    merge_family("family.yaml", "out")
    assert_close(here / "out", by_hand(here))


def test_all_named_gives_a_folder_for_each(here):
    documents = [value for _, value in documents_in(FAMILY)]
    write_family(here, *documents[:2], documents[2] | {"name": "last"})
    results = merge_family("family.yaml", "out")
    assert [r.name for r in results] == ["linear", "second", "last"]
    assert {p.name for p in (here / "out").iterdir()} == {"linear", "second", "last"}
    assert_close(here / "out" / "last", by_hand(here))
    assert not any(made_by(merge_family("family.yaml", "out", warn=None)).values())


def test_a_merge_with_an_adapter(here):
    """NAME+ADAPTER, as text and as an object: the adapter is folded into the result of the name."""
    write_adapter(here / "lora", layers=2)
    merge_family(write_family(here, linear("a", "b", name="blend", dtype="float32"), linear("blend+lora", dtype="float32")),
                 "out", keep_intermediates=True)
    merge_family(write_family(here, linear("a", "b", name="blend", dtype="float32"),
                              linear(dtype="float32") | {"models": [{"model": {"model": "blend", "lora": "lora"},
                                                                     "parameters": {"weight": 1}}]}), "out2")
    blend, lora = tensors_of(here / "out.intermediates" / "blend"), load_file(here / "lora" / "adapter_model.safetensors")
    got, other = tensors_of(here / "out"), tensors_of(here / "out2")
    for layer in range(2):
        at, name = f"base_model.model.model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.self_attn.q_proj.weight"
        wanted = blend[name].double() + 2 * lora[f"{at}.lora_B.weight"].double() @ lora[f"{at}.lora_A.weight"].double()
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-6, atol=1e-6)
        assert got[name].equal(other[name]) and not got[name].equal(blend[name])


def test_a_name_as_the_source_of_a_tokenizer_and_of_a_base(here):
    write_checkpoint(here / "more", words=["<unk>", "<eos>", "one", "two", "three", "four", "red", "green", "blue"])
    union = linear("a", "more", name="wide", tokenizer={"source": "union"})
    last = {"merge_method": "task_arithmetic", "base_model": "wide", "tokenizer": {"source": "wide"},
            "models": [{"model": "a", "parameters": {"weight": 1}}]}
    merge_family(write_family(here, union, last), "out", warn=None)
    assert tensors_of(here / "out")["model.embed_tokens.weight"].shape[0] == 9


def test_tied_sharded_bfloat16_models_with_layer_slices(here):
    for name in ("t1", "t2"):
        write_checkpoint(here / name, layers=4, tensors={"lm_head.weight": None}, config={"tie_word_embeddings": True})
    blend = linear("t1", "t2", name="blend", dtype="bfloat16")
    stack = {"layer_slices": [{"model": "blend", "start": 0, "end": 3, "scale": 0.5}, {"model": "t2", "start": 2, "end": 4}]}
    results = merge_family(write_family(here, blend, stack), "out", intermediates="kept", options=options_for(0, "2KB"))
    assert all(len(list(r.place.glob("*.safetensors"))) > 1 for r in results)
    got, blended, other = tensors_of(here / "out"), tensors_of(here / "kept" / "blend"), tensors_of(here / "t2")
    assert json.loads((here / "out" / "config.json").read_text())["num_hidden_layers"] == 5 and "lm_head.weight" not in got
    name = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(got[name.format(1)], (blended[name.format(1)].float() * 0.5).bfloat16())
    assert torch.equal(got[name.format(4)], other[name.format(3)]) and torch.equal(got["model.norm.weight"],
                                                                                   other["model.norm.weight"])


# ---------------------------------------------------------------------------------------------------- what is made again


def test_nothing_is_done_twice(here):
    merge_family("family.yaml", "out")
    before = {p: p.stat().st_mtime_ns for p in (here / "out").iterdir()}
    told: list[str] = []
    assert made_by(merge_family("family.yaml", "out", warn=told.append)) == {None: False}
    assert {p: p.stat().st_mtime_ns for p in (here / "out").iterdir()} == before
    assert any("nothing was done" in line for line in told)


def test_a_changed_weight_redoes_what_rests_on_it(here):
    """The peer takes any folder with a model in it for the result."""
    merge_family("family.yaml", "out", intermediates="kept")
    size = (here / "c" / "model.safetensors").stat()
    write_checkpoint(here / "c", moved=0.5)
    os.utime(here / "c" / "model.safetensors", ns=(size.st_atime_ns, size.st_mtime_ns))  # same size, same time: other content
    assert (here / "c" / "model.safetensors").stat().st_size == size.st_size
    with pytest.raises(OutputError, match=r"out already holds another[^\n]*\n.*other weights"):
        merge_family("family.yaml", "out", intermediates="kept")
    results = merge_family("family.yaml", "out2", intermediates="kept")
    assert made_by(results) == {"linear": False, "second": True, None: True}
    assert_close(here / "out2", by_hand(here))


def test_a_changed_config_redoes_what_rests_on_it(here):
    merge_family("family.yaml", "out", intermediates="kept")
    Path("family.yaml").write_text(FAMILY.replace("weight: 0.5", "weight: 0.25"))
    assert made_by(merge_family("family.yaml", "out2", intermediates="kept")) == {"linear": False, "second": True, None: True}
    assert not any(made_by(merge_family("family.yaml", "out2", intermediates="kept", warn=None)).values())
    Path("family.yaml").write_text(FAMILY)
    assert made_by(merge_family("family.yaml", "out", intermediates="kept")) == {"linear": False, "second": True, None: False}


def test_options_that_decide_bytes_count_and_speed_does_not(here):
    merge_family("family.yaml", "out", intermediates="kept")
    assert not any(made_by(merge_family("family.yaml", "out", intermediates="kept", warn=None,
                                        settings=families.Settings(threads=1))).values())
    made = made_by(merge_family("family.yaml", "out2", intermediates="kept", options=options_for(seed=1)))
    assert all(made.values())


def test_a_changed_config_of_a_model_and_changed_fisher_information_count(here):
    for name in "ab":
        save_file({n: torch.rand_like(t) for n, t in tensors_of(here / name).items()}, here / f"{name}.fisher.safetensors")
    first = {"merge_method": "fisher", "name": "x", "models": [
        {"model": m, "fisher": f"{m}.fisher.safetensors", "parameters": {"weight": 1}} for m in "ab"]}
    write_family(here, first, linear("x", "c"))
    merge_family("family.yaml", "out", intermediates="kept")
    save_file({n: torch.rand_like(t) for n, t in tensors_of(here / "a").items()}, here / "a.fisher.safetensors")
    assert made_by(merge_family("family.yaml", "second", intermediates="kept")) == {"x": True, None: True}
    config = json.loads((here / "a" / "config.json").read_text())
    (here / "a" / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert made_by(merge_family("family.yaml", "third", intermediates="kept")) == {"x": True, None: True}
    assert json.loads((here / "third" / "config.json").read_text())["rope_theta"] == 5.0


def test_a_folder_with_a_plus_in_its_name_is_a_folder(here):
    """`x+c` could be the merge with an adapter; what is there comes first, as for every model."""
    shutil.copytree(here / "c", here / "x+c")
    write_family(here, linear("a", "b", name="x"), linear("x+c", "a"))
    merge_family("family.yaml", "out", warn=None)
    a, c = tensors_of(here / "a"), tensors_of(here / "c")
    assert_close(here / "out", {n: ((a[n].double() + c[n].double()) / 2).to(a[n].dtype).double() for n in a})


def test_a_damaged_intermediate_is_made_again(here):
    merge_family("family.yaml", "out", intermediates="kept")
    file = here / "kept" / "linear" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert made_by(merge_family("family.yaml", "out", intermediates="kept")) == {"linear": True, "second": False, None: False}
    assert not verify(here / "kept" / "linear", files_only=True)


def test_killed_between_two_merges(here, monkeypatch):
    """What is finished stays for the next call, though intermediates are not kept."""
    whole, calls = families.write, []

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(families, "write", second_fails)
    with pytest.raises(KeyboardInterrupt):
        merge_family("family.yaml", "out")
    assert (here / "out.intermediates" / "linear").is_dir() and not (here / "out").exists()
    calls.clear()
    monkeypatch.setattr(families, "write", lambda *a, **k: calls.append(1) or whole(*a, **k))
    merge_family("family.yaml", "out")
    assert len(calls) == 2 and not (here / "out.intermediates").exists()
    assert_close(here / "out", by_hand(here))


def test_what_nothing_uses_is_made_only_to_be_kept(here):
    write_family(here, linear("a", name="used"), linear("used", "c"), linear("b", name="idle"))
    told: list[str] = []
    merge_family("family.yaml", "out", warn=told.append)
    assert any("idle: nothing uses it" in line for line in told)
    results = merge_family("family.yaml", "out2", keep_intermediates=True, warn=told.append)
    assert made_by(results) == {"used": True, "idle": True, None: True} and results[-1].name is None
    assert {p.name for p in (here / "out2.intermediates").iterdir()} == {"used", "idle"}


def test_intermediates_of_others_are_left_alone(here):
    shutil.copytree(here / "a", here / "kept" / "linear")
    with pytest.raises(OutputError, match="kept/linear is already there, and no readable manifest"):
        merge_family("family.yaml", "out", intermediates="kept")
    shutil.rmtree(here / "kept" / "linear")
    merge_config({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}, here / "kept" / "linear")
    with pytest.raises(OutputError, match="kept/linear holds a merge that is no part of a family"):
        merge_family("family.yaml", "out", intermediates="kept")
    assert verify(here / "kept" / "linear") == [] and not (here / "out").exists() and not (here / "kept" / "second").exists()


def test_what_a_user_put_into_a_result_is_never_removed(here):
    """An outdated result is replaced only where it holds nothing but what a merge wrote, however deep and hidden."""
    write_family(here, linear("a", "b", name="x"), linear("x", "c"))
    merge_family("family.yaml", "out", intermediates="kept")
    for name in ("eval/log.txt", ".git/config", "model-mine.safetensors"):
        mine = here / "kept" / "x" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        write_family(here, linear("b", "a", name="x"), linear("x", "c"))
        with pytest.raises(OutputError, match=f"(?s)holds what no merge put there.*{name}"):
            merge_family("family.yaml", "other", intermediates="kept")
        assert mine.read_text() == "mine" and not (here / "other").exists()
        mine.unlink()
    (here / "kept" / "x.replaced").mkdir()
    merge_family("family.yaml", "other", intermediates="kept")  # empty folders are no files
    assert sorted(p.name for p in (here / "kept").iterdir()) == ["x", "x.replaced"]


def test_intermediates_with_files_of_the_user_stay(here):
    write_family(here, linear("a", "b", name="x"), linear("x", "c", name="y"), linear("x", "y"))
    merge_family("family.yaml", "out", keep_intermediates=True)
    (here / "out.intermediates" / "x" / ".notes").write_text("mine")
    shutil.rmtree(here / "out")
    merge_family("family.yaml", "out")
    assert [p.name for p in (here / "out.intermediates").iterdir()] == ["x"]
    assert (here / "out.intermediates" / "x" / ".notes").read_text() == "mine"


def test_a_folder_of_intermediates_that_is_a_link_stays(here):
    (here / "elsewhere").mkdir()
    (here / "out.intermediates").symlink_to(here / "elsewhere")
    write_family(here, linear("a", "b", name="x"), linear("x", "c"))
    merge_family("family.yaml", "out")
    assert (here / "out.intermediates").is_symlink() and not any((here / "elsewhere").iterdir())


def test_no_room_for_outlines(here, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(families.tempfile, "mkdtemp", full)
    with pytest.raises(OutputError, match=r"No space left on device.*TMPDIR"):
        merge_family("family.yaml", "out")


def test_a_link_is_used_and_not_replaced(here):
    write_family(here, linear("a", "b", name="x"), linear("x", "c"))
    merge_family("family.yaml", "out", intermediates="kept")
    shutil.move(here / "kept" / "x", here / "elsewhere")
    (here / "kept" / "x").symlink_to(here / "elsewhere")
    assert made_by(merge_family("family.yaml", "out", intermediates="kept", warn=None)) == {"x": False, None: False}
    write_family(here, linear("b", "a", name="x"), linear("x", "c"))
    with pytest.raises(OutputError, match="is a link"):
        merge_family("family.yaml", "other", intermediates="kept")
    assert (here / "kept" / "x").is_symlink() and (here / "elsewhere" / "model.safetensors").is_file()


def test_a_model_inside_a_result_is_not_removed_with_it(here):
    write_family(here, linear("a", "b", name="x"), linear("x", "c"))
    merge_family("family.yaml", "out", intermediates="kept")
    shutil.copytree(here / "c", here / "kept" / "x" / "inner")
    write_family(here, linear("b", "a", name="x"), linear("x", "kept/x/inner"))
    with pytest.raises(OutputError, match="these models would be replaced"):
        merge_family("family.yaml", "other", intermediates="kept")
    assert (here / "kept" / "x" / "inner" / "config.json").is_file()


def test_killed_while_an_outdated_result_is_removed(here, monkeypatch):
    """Nothing half removed has a result's name, and the next call clears it away."""
    def killed():
        raise KeyboardInterrupt

    write_family(here, linear("a", "b", name="x"), linear("x", "c"))
    for change, keep in (("other", True), ("third", False)):  # while it is replaced, and while it is removed at the end
        merge_family("family.yaml", "out", keep_intermediates=True)
        write_family(here, linear("b", "a", name="x", parameters={"normalize": change == "other"}), linear("x", "c"))
        shutil.rmtree(here / "out")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", lambda p, *_, **__: killed() if "replaced" in str(p) and Path(p).exists() else None)
            merge_family("family.yaml", "out", keep_intermediates=keep)
        root = here / "out.intermediates"
        assert [p.name for p in root.iterdir() if p.is_dir()] == [".x.anabranch-replaced"]
        shutil.rmtree(here / "out", ignore_errors=True)
        merge_family("family.yaml", "out", keep_intermediates=True)
        assert [p.name for p in root.iterdir()] == ["x"]
        shutil.rmtree(here / "out")


def test_what_another_call_made_meanwhile_is_not_made_again(here, monkeypatch):
    """Between a call's first look and its lock."""
    write_family(here, linear("a", "b", name="x"), linear("x", "c"))
    held = families._held

    def late(root, needed):
        with monkeypatch.context() as patch:
            patch.setattr(families, "_held", held)
            merge_family("family.yaml", "first", intermediates="kept")
        return held(root, needed)

    monkeypatch.setattr(families, "_held", late)
    assert made_by(merge_family("family.yaml", "second", intermediates="kept")) == {"x": False, None: True}


def test_a_folder_of_results_that_holds_something_else(here):
    write_family(here, linear("a", name="x"), linear("x", name="y"))
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds something else already: thesis.txt"):
        merge_family("family.yaml", "out")
    assert os.listdir("out") == ["thesis.txt"]


def test_a_model_is_never_replaced_by_a_result_of_its_name(here):
    shutil.copytree(here / "a", here / "models" / "a")
    write_family(here, linear("models/a", "b", name="a"), linear("a", "c"))
    with pytest.raises(OutputError, match="these models would be replaced"):
        merge_family("family.yaml", "out", intermediates="models")
    with pytest.raises(OutputError, match="is one of the models to be merged"):
        merge_family("family.yaml", "b")
    assert verify(merge_family("family.yaml", "out")[0].place, files_only=True) == []


def test_two_calls_into_one_folder(here):
    (here / "kept").mkdir()
    handle = os.open(here / "kept", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="another merge is working in"):
        merge_family("family.yaml", "out", intermediates="kept")
    os.close(handle)


# ------------------------------------------------------------------------------------------------------------ the dry run


def test_the_forecast_is_exact_before_an_intermediate_exists(here):
    told: list[str] = []
    lines = forecast_family("family.yaml", "out", warn=told.append)
    assert {p.name for p in here.iterdir()} == {"a", "b", "c", "base", "family.yaml"} and not told
    assert lines[0] == "graph: 3 merges, in this order: linear, second, OUT"
    assert f"second: task_arithmetic of linear, c, base; to be made in {here}/out.intermediates/second" in lines
    assert any(line.startswith("OUT: tensors: 27 (27 linear), 1,352 parameters, float32") for line in lines)
    assert not any("outlines" in line for line in lines)
    merge_family("family.yaml", "out", intermediates="kept")
    write_checkpoint(here / "c", moved=0.5)
    lines = forecast_family("family.yaml", "new", intermediates="kept")
    assert any(line.startswith("linear: linear of a, b; is there already") for line in lines)
    assert any("kept/second is of another config or other inputs, and is made again" in line for line in lines)
    assert not (here / "new").exists() and verify(here / "kept" / "second", files_only=True) == []


def test_the_disc_is_not_filled_by_planning(here, monkeypatch):
    """An outline holds headers and holes."""
    sizes: dict[str, int] = {}
    whole = families.write_outline

    def measured(folder, prepared):
        whole(folder, prepared)
        sizes["blocks"] = sum(p.stat().st_blocks * 512 for p in folder.glob("*.safetensors"))
        sizes["size"] = sum(p.stat().st_size for p in folder.glob("*.safetensors"))

    state = {"big.weight": torch.zeros(1 << 20)}
    for name in ("p", "q"):
        write_checkpoint(here / name, tensors=state)
    monkeypatch.setattr(families, "write_outline", measured)
    forecast_family(write_family(here, linear("p", "q", name="x", dtype="float32"), linear("x")), "out")
    assert sizes["size"] > 4 << 20 and sizes["blocks"] < 1 << 17


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("documents", "says"), [
    ([linear("y", name="x"), linear("x", name="y"), linear("x")], ["x needs y needs x: a circle"]),
    ([linear("x", name="x"), linear("a")], ["x needs x: a circle"]),
    ([linear("a", name="x"), linear("b", name="X"), linear("x")], ["`X` is document 1 already"]),
    ([linear("a"), linear("b")], ["documents 1, 2 have no `name:`"]),
    ([linear("a", name="../x"), linear("b", name="x/y"), linear("a", name=3), linear("a", name="x.partial"), linear("c")],
     ["document 1: name: got '../x'", "document 2: name: got 'x/y'", "document 3: name: got 3", "document 4: name: got"]),
    ([linear("a", name="blend"), linear("blendd", "Blend")],
     ["model 'blendd' is no merge of this file and no folder here. Did you mean `blend`?", "model 'Blend' is no merge"]),
    ([linear("a", name="blend"), linear("blend@main")], ["`blend` is a merge of this file, and has no revision"]),
    ([linear("a", name="blend"), linear("blend+x+y")], ["'blend+x+y': wanted NAME or NAME+ADAPTER"]),
    ([linear("a", name="blend"), linear("b+blend")], ["`blend` is a merge of this file, a whole model"]),
    # Every document's own errors, in one message.
    ([{"name": "x", "merge_method": "linaer", "models": [{"model": "a"}]}, {"name": "y", "merge_method": "slerp"},
      linear("x", typo=1)],
     ["merge `x`: merge_method: got 'linaer'. Did you mean `linear`?", "merge `y`: one of `models`",
      "document 3: unknown key `typo`"]),
    (["just text", linear("a")], ["document 1: the file holds 'just text'"]),
])
def test_refused_before_anything_is_opened(here, documents, says):
    with pytest.raises(RecipeError) as caught:
        merge_family(write_family(here, *documents), "out")
    for piece in says:
        assert piece in str(caught.value)
    assert {p.name for p in here.iterdir()} == {"a", "b", "c", "base", "family.yaml"}


def test_problems_of_all_models_in_one_message(here):
    """Models that are not there, ranges beyond a model, and what only shows once an intermediate's shape is known."""
    write_checkpoint(here / "deep", layers=3)
    shutil.copytree(here / "a", here / "broken")
    (here / "broken" / "model.safetensors").write_bytes(b"not")
    lost = linear("./nowhere", "a", name="lost")
    beyond = {"name": "beyond", "merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 9]}]}]}
    documents = [lost, beyond, linear("broken", name="cut"), linear("a", "b", name="fine"), linear("fine", "deep"),
                 linear("lost", name="rests-on-lost")]
    with pytest.raises(RecipeError) as caught:
        merge_family(write_family(here, *documents), "out")
    text = str(caught.value)
    for piece in ("merge `lost`: ", "nowhere", "merge `beyond`: ", "layer_range [0, 9]", "merge `cut`: ", "damaged or cut",
                  "document 5: ", "models of different depth", "fine has 2 layers, deep has 3 layers"):
        assert piece in text
    assert "rests-on-lost" not in text and not (here / "out").exists() and not (here / "out.intermediates").exists()


@pytest.mark.parametrize(("document", "kind"), [
    (linear("x", "wide"), ShapeMismatch), (linear("x", "./none"), ModelError), (linear("broken", "x"), CorruptedError)])
def test_one_problem_keeps_its_kind(here, document, kind):
    write_checkpoint(here / "wide", tensors={"model.norm.weight": torch.ones(9, dtype=torch.bfloat16)})
    shutil.copytree(here / "a", here / "broken")
    (here / "broken" / "model.safetensors").write_bytes(b"not")
    with pytest.raises(kind, match="document 2: "):
        merge_family(write_family(here, linear("a", name="x"), document), "out")
    assert not (here / "out.intermediates").exists()


@pytest.mark.parametrize(("out", "intermediates", "says"), [
    ("out", "out", "cannot be kept inside"), ("out", "out/deep", "cannot be kept inside"),
    ("kept/linear", "kept", "cannot be kept inside"), ("out", "family.yaml", "it is no folder"),
    ("a", None, "one of the models")])
def test_places_that_cannot_be(here, out, intermediates, says):
    with pytest.raises(OutputError, match=says):
        merge_family("family.yaml", out, intermediates=intermediates)


def test_intermediates_where_there_are_none(here):
    write_family(here, linear("a", name="x"), linear("x", name="y"))
    with pytest.raises(RecipeError, match="every merge of this file has a name"):
        merge_family("family.yaml", "out", intermediates="kept")


def test_a_name_and_a_folder_alike(here):
    write_family(here, linear("a", "b", name="c", dtype="float32"), linear("c", dtype="float32"))
    told: list[str] = []
    merge_family("family.yaml", "out", warn=told.append)
    assert any("`c` is a merge of this file and a folder here" in line for line in told)
    a, b = tensors_of(here / "a"), tensors_of(here / "b")
    assert_close(here / "out", {n: ((a[n].double() + b[n].double()) / 2).float().double() for n in a})


def test_not_finite_numbers_stop_the_merge_that_makes_them(here):
    bad = tensors_of(here / "c")
    bad["model.norm.weight"][0] = float("nan")
    save_file(bad, here / "c" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptedError, match=r"merge `second`: tensor 'model.norm.weight'"):
        merge_family("family.yaml", "out")
    assert not (here / "out").exists() and not list((here / "out.intermediates").glob("second*"))


@pytest.mark.parametrize("text", ["a: [", "- \n- &x [*x]\n---\nb", "\x00", "", "---\n---\n", "name: x\n---\n: :\n\t-"])
def test_texts_that_are_no_family(here, text):
    Path("family.yaml").write_text(text)
    if is_family("family.yaml"):
        with pytest.raises(RecipeError):
            merge_family("family.yaml", "out")
    else:
        with pytest.raises(AnabranchError):
            merge_config(Path("family.yaml"), here / "out")


def test_what_is_a_family():
    assert is_family([{}, {}]) and len(read_graph("---\n".join(yaml.safe_dump(linear("a", name=n)) for n in "xyz")).names) == 3


def test_one_document_is_the_merge_that_it_was(here):
    for text in (yaml.safe_dump(linear("a", "b")), yaml.safe_dump(linear("a", "b", name="title")) + "---\n"):
        Path("one.yaml").write_text(text)
        assert not is_family("one.yaml")
    assert is_family("family.yaml") and not is_family("nowhere.yaml")


def test_intermediates_never_go_into_a_model(here):
    before = sorted(p.name for p in (here / "a").iterdir())
    with pytest.raises(OutputError, match="is one of the models to be merged, or lies in one"):
        merge_family(here / "family.yaml", here / "out", intermediates=here / "a")
    assert sorted(p.name for p in (here / "a").iterdir()) == before and not (here / "out").exists()


def test_verify_says_where_the_intermediates_went(here):
    merge_family(here / "family.yaml", here / "out")
    with pytest.raises(ModelError, match=r"(?s)other merges of the same file, which went.*--files-only.*second"):
        verify(here / "out")
    assert verify(here / "out", files_only=True) == []
