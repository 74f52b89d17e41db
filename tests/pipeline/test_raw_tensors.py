"""`anabranch tensors`: files merged by name, against sums made by hand and against merges of whole models."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.artifacts import MergeManifest
from anabranch.engine import raw
from anabranch.engine.merging import merge_config, options_for, verify
from anabranch.engine.output import OutputFolder
from anabranch.engine.raw import forecast_tensors, merge_tensors
from anabranch.engine.stream import Settings
from anabranch.errors import AnabranchError, CorruptedError, ModelError, OutputError, RecipeError, ShapeMismatch
from anabranch.merge import METHODS
from tiny_checkpoints import tensors_of, write_checkpoint


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        save_file({"w": torch.randn(6, 5, generator=random), "v.0": torch.randn(7, generator=random).bfloat16(),
                   "count": torch.arange(3)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def numbers(name: str) -> dict[str, np.ndarray]:
    return {n: t.double().numpy() for n, t in load_file(f"{name}.safetensors").items()}


def listed(**weights: float | None) -> list[dict]:
    return [{"model": f"{m}.safetensors"} | ({} if w is None else {"parameters": {"weight": w}}) for m, w in weights.items()]


def config(method: str, models: list[dict], **more) -> dict:
    return {"merge_method": method, "models": models} | more


def assert_is(got: torch.Tensor, wanted: np.ndarray, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(got.double().numpy(), wanted, rtol=rtol, atol=1e-7)


def ties(base: np.ndarray, branches: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Trim, elect, merge disjointly, entry by entry (arXiv 2306.01708, section 3), weights normalised where they agree."""
    steps = []
    for branch, weight in zip(branches, weights, strict=True):
        step = branch - base
        kept = np.sort(np.abs(step).reshape(-1))[::-1][: int(density * step.size)]
        steps.append(np.where(np.abs(step) >= kept.min(), step, 0.0) * weight)
    out = np.array(base)
    for at in np.ndindex(base.shape):
        column = [step[at] for step in steps]
        sign = np.sign(sum(column)) or 1.0
        agreeing = [(c, w) for c, w in zip(column, weights, strict=True) if c != 0 and np.sign(c) == sign]
        if agreeing:
            out[at] += sum(c for c, _ in agreeing) / sum(w for _, w in agreeing)
    return out


# --------------------------------------------------------------------------------------------------------- what comes out


def test_c78_global_weights_and_defaults(here):
    """The peer needs `parameters` on every model, with every parameter in it."""
    merge_tensors(config("ties", listed(a=None, b=None), base_model="base.safetensors", dtype="float32",
                         parameters={"weight": 0.5, "density": 0.5}), "out")
    got, base, a, b = tensors_of(here / "out"), *(numbers(n) for n in ("base", "a", "b"))
    for name in ("w", "v.0"):
        assert_is(got[name], ties(base[name], [a[name], b[name]], [0.5, 0.5], 0.5))
    merge_tensors(config("task_arithmetic", listed(a=None, b=0.25), base_model="base.safetensors", parameters={"weight": 0.5},
                         dtype="float32"), "out2")  # density is left out, and is 1
    for name in ("w", "v.0"):
        assert_is(tensors_of(here / "out2")[name],
                  base[name] + 0.5 * (a[name] - base[name]) + 0.25 * (b[name] - base[name]))
    assert tensors_of(here / "out2")["count"].equal(torch.arange(3))


def test_c78_a_weight_of_zero(here):
    """To the peer it is missing."""
    merge_tensors(config("linear", listed(a=0, b=1), dtype="float32"), "out")
    assert_is(tensors_of(here / "out")["w"], numbers("b")["w"])


def test_parameters_by_name_of_the_tensor(here):
    merge_tensors(config("linear", listed(a=None, b=None), dtype="float32", parameters={
        "weight": [{"filter": "v.", "value": 1}, {"value": [3, 100]}], "normalize": False}), "out")
    got, a, b = tensors_of(here / "out"), numbers("a"), numbers("b")
    assert_is(got["v.0"], a["v.0"] + b["v.0"])
    assert_is(got["w"], 3 * a["w"] + 3 * b["w"])  # a gradient is taken at t = 0: there are no layers


def test_dtype_is_of_the_result(here):
    merge_tensors(config("linear", listed(a=1, b=1)), "own")
    merge_tensors(config("linear", listed(a=1, b=1), dtype="bfloat16"), "half")
    own, half, a, b = tensors_of(here / "own"), tensors_of(here / "half"), numbers("a"), numbers("b")
    assert (own["w"].dtype, own["v.0"].dtype, half["w"].dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert half["w"].equal(torch.from_numpy((a["w"] + b["w"]) / 2).float().bfloat16())
    assert own["v.0"].equal(torch.from_numpy((a["v.0"] + b["v.0"]) / 2).float().bfloat16())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_as_in_a_merge_of_models(tmp_path, monkeypatch, method):
    """The tensors of a first layer (depth 0, t 0) are those of the same merge of whole models."""
    record = METHODS[method]
    monkeypatch.chdir(tmp_path)
    names = ["a", "b"] if record.branches[1] > 1 else ["a"]
    for name in ("base", *names):
        write_checkpoint(tmp_path / name, dtype=torch.float32)
        os.link(tmp_path / name / "model.safetensors", tmp_path / f"{name}.safetensors")
        save_file({n: t.abs() for n, t in tensors_of(tmp_path / name).items()}, tmp_path / f"{name}.fisher.safetensors")
    given = {"merge_method": method, "parameters": {"weight": 0.5, "t": 0.3, "density": 0.5}}
    models = [{"model": name} | ({"fisher": f"{name}.fisher.safetensors"} if method == "fisher" else {}) for name in names]
    based = {"base_model": "base"} if record.takes_base else {}
    merge_config(given | based | {"models": models}, tmp_path / "whole", options=options_for(3))
    merge_tensors(given | {key: f"{value}.safetensors" for key, value in based.items()}
                  | {"models": [m | {"model": f"{m['model']}.safetensors"} for m in models]}, "out", options=options_for(3),
                  warn=None)
    whole, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert out.keys() == whole.keys()
    for name in [n for n in out if ".layers.0." in n]:
        if "draws" in record.inputs:  # keyed by the file's name instead of the folder's
            assert out[name].isfinite().all() and out[name].shape == whole[name].shape
        else:
            assert out[name].equal(whole[name]), name


def test_draws_follow_the_seed(here):
    asked = config("dare_linear", listed(a=1, b=1), base_model="base.safetensors", parameters={"density": 0.5}, dtype="float32")
    for seed, out in ((1, "x"), (1, "y"), (2, "z")):
        merge_tensors(asked, out, options=options_for(seed))
    x, y, z = (tensors_of(here / out)["w"] for out in "xyz")
    assert x.equal(y) and not x.equal(z)
    deltas = {round(float(d), 5) for d in (x - load_file("base.safetensors")["w"]).reshape(-1)}
    assert 0.0 in deltas  # something was dropped in both


# ----------------------------------------------------------------------------------------------- what some files lack


@pytest.fixture
def uneven(here):
    """only_a: in a alone; only_b: in b and base; only_base: in the base alone."""
    extra = {"base": {"only_base": torch.full((2,), 7.0), "only_b": torch.full((3,), 1.0)}, "a": {"only_a": torch.ones(4)},
             "b": {"only_b": torch.full((3,), 5.0)}}
    for name, more in extra.items():
        save_file(load_file(f"{name}.safetensors") | more, f"{name}.safetensors")
    return here


def test_missing_tensors_are_named(uneven):
    with pytest.raises(ShapeMismatch) as caught:
        merge_tensors(config("linear", listed(a=1, b=1)), "out")
    assert "'only_a': b.safetensors lacks it" in str(caught.value) and "'only_b': a.safetensors lacks it" in str(caught.value)
    with pytest.raises(ShapeMismatch, match=r"'only_base': a.safetensors, b.safetensors lack it"):
        merge_tensors(config("ties", listed(a=1, b=1), base_model="base.safetensors"), "out")


def test_intersection(uneven):
    told: list[str] = []
    merge_tensors(config("linear", listed(a=1, b=1), dtype="float32"), "out", missing="intersection", warn=told.append)
    assert tensors_of(uneven / "out").keys() == {"w", "v.0", "count"} and sum("left out" in line for line in told) == 2


def test_c78_union(uneven):
    """The peer ends in a KeyError."""
    told: list[str] = []
    merge_tensors(config("linear", listed(a=3, b=1), dtype="float32"), "out", missing="union", warn=told.append)
    got, a, b = tensors_of(uneven / "out"), numbers("a"), numbers("b")
    assert_is(got["w"], (3 * a["w"] + b["w"]) / 4)
    assert_is(got["only_a"], a["only_a"])
    assert_is(got["only_b"], b["only_b"])
    assert any("merged over those that have it" in line for line in told)


def test_c78_union_with_a_base(uneven):
    """Inputs that lack a tensor are left out of it; what the base alone has comes along."""
    save_file({k: v for k, v in load_file("a.safetensors").items() if k != "only_a"}, "a.safetensors")
    merge_tensors(config("task_arithmetic", listed(a=0.5, b=0.5), base_model="base.safetensors", dtype="float32"), "out",
                  missing="union", warn=None)
    got = tensors_of(uneven / "out")
    assert got["only_base"].equal(torch.full((2,), 7.0)) and got["only_b"].equal(torch.full((3,), 3.0))  # 1 + 0.5 (5 - 1)


def test_union_with_too_few_for_the_method_carries_the_base_and_says_so(uneven):
    told: list[str] = []
    save_file({k: v for k, v in load_file("a.safetensors").items() if k != "only_a"}, "a.safetensors")
    merge_tensors(config("model_stock", listed(a=None, b=None), base_model="base.safetensors", dtype="float32"), "out",
                  missing="union", warn=told.append)
    assert tensors_of(uneven / "out")["only_b"].equal(torch.full((3,), 1.0))  # the base's, not b's 5
    about = [line for line in told if "'only_b'" in line]
    assert len(about) == 1 and "needs 2 models, and only 1 has it: carried over from base.safetensors" in about[0]


def test_union_without_a_base_to_differ_from(uneven):
    with pytest.raises(ShapeMismatch, match=r"'only_a': b.safetensors, base.safetensors \(the base\) lack it, so there is"):
        merge_tensors(config("task_arithmetic", listed(a=0.5, b=0.5), base_model="base.safetensors"), "out", missing="union")


def test_union_without_normalising_counts_zeros(uneven):
    told: list[str] = []
    merge_tensors(config("linear", listed(a=0.5, b=0.5), parameters={"normalize": False}, dtype="float32"), "out",
                  missing="union", warn=told.append)
    assert tensors_of(uneven / "out")["only_b"].equal(torch.full((3,), 2.5))
    assert any("counts as zeros" in line for line in told)


def test_nothing_in_common(here):
    save_file({"other": torch.ones(1)}, "b.safetensors")
    with pytest.raises(ShapeMismatch, match="the result would be empty"):
        merge_tensors(config("linear", listed(a=1, b=1)), "out", missing="intersection", warn=None)


# ------------------------------------------------------------------------------------------------------ where it is put


def test_a_single_file(here):
    asked = config("linear", listed(a=1, b=1), dtype="float32")
    merge_tensors(asked, "out.safetensors", options=options_for(0, "1KB"))
    merge_tensors(asked, "folder")
    assert load_file("out.safetensors")["w"].equal(tensors_of(here / "folder")["w"])
    assert {p.name for p in here.iterdir()} == {"a.safetensors", "b.safetensors", "base.safetensors", "folder",
                                                "out.safetensors", "out.safetensors.manifest.json"}
    manifest = MergeManifest.load(here / "out.safetensors.manifest.json")
    assert manifest.verb == "tensors" and manifest.tensors == MergeManifest.load(here / "folder" / "manifest.json").tensors
    before, told = (here / "out.safetensors").stat().st_mtime_ns, list[str]()
    merge_tensors(asked, "out.safetensors", warn=told.append)
    assert (here / "out.safetensors").stat().st_mtime_ns == before and "nothing was done" in told[-1]
    with pytest.raises(OutputError, match="already holds another"):
        merge_tensors(config("linear", listed(a=1, b=2)), "out.safetensors")
    save_file(load_file("out.safetensors") | {"v.0": load_file("out.safetensors")["v.0"] + 1}, "out.safetensors")
    with pytest.raises(OutputError, match="another or a damaged merge"):
        merge_tensors(asked, "out.safetensors")
    save_file({"w": torch.zeros(6, 5)}, "mine.safetensors")
    with pytest.raises(OutputError, match=r"no readable mine.safetensors.manifest.json"):
        merge_tensors(asked, "mine.safetensors")


def test_a_single_file_after_a_kill(here, monkeypatch):
    """Between the finished merge and its place: the next call, of this merge or of another, does what it says."""
    def killed(*_):
        raise KeyboardInterrupt

    asked = config("linear", listed(a=1, b=1), dtype="float32")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(raw, "_taken_out", killed)
        merge_tensors(asked, "out.safetensors")
    assert not (here / "out.safetensors").exists()
    left = {p.name for p in here.iterdir()}
    forecast_tensors(config("linear", listed(a=1, b=3)), "out.safetensors")
    assert {p.name for p in here.iterdir()} == left  # a dry run takes nothing away
    merge_tensors(config("linear", listed(a=1, b=3), dtype="float32"), "out.safetensors")
    assert_is(load_file("out.safetensors")["w"], (numbers("a")["w"] + 3 * numbers("b")["w"]) / 4)


def test_a_file_that_appears_meanwhile_is_not_replaced(here, monkeypatch):
    asked, whole = config("linear", listed(a=1, b=1), dtype="float32"), raw.write

    def slow(*arguments):
        made = whole(*arguments)
        (here / "out.safetensors").write_text("mine")
        return made

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="has appeared"):
        patch.setattr(raw, "write", slow)
        merge_tensors(asked, "out.safetensors")
    assert (here / "out.safetensors").read_text() == "mine"
    (here / "out.safetensors").unlink()
    merge_tensors(asked, "out.safetensors")  # the finished merge is taken
    assert not (here / ".out.safetensors.made").exists()


def test_killed_after_a_single_file_was_taken_out(here, monkeypatch):
    asked = config("linear", listed(a=1, b=1), dtype="float32")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(raw.shutil, "rmtree", killed)
        merge_tensors(asked, "out.safetensors")
    assert (here / "out.safetensors").is_file() and (here / ".out.safetensors.made").is_dir()
    merge_tensors(asked, "out.safetensors", warn=None)
    assert not (here / ".out.safetensors.made").exists()


def test_goes_on_after_a_kill_whatever_else_appears_beside_its_inputs(here, monkeypatch):
    """In a folder such as /tmp files come and go; they are no reason to begin anew."""
    asked, whole, written = config("linear", listed(a=1, b=1), dtype="float32"), OutputFolder.finished, list[str]()

    def finished(folder, step, done):
        whole(folder, step, done)
        written.append(step.name)
        if len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutputFolder, "finished", finished)
        merge_tensors(asked, "out", settings=Settings(threads=1))
    Path("new.txt").write_text("beside the inputs")
    monkeypatch.setattr(OutputFolder, "finished", lambda f, step, done: whole(f, step, done) or written.append(step.name))
    merge_tensors(asked, "out", settings=Settings(threads=1))
    assert sorted(written) == ["count", "v.0", "w"]  # each once
    assert_is(tensors_of(here / "out")["w"], (numbers("a")["w"] + numbers("b")["w"]) / 2)


def test_a_folder_in_shards_that_can_be_verified(here):
    manifest = merge_tensors(config("linear", listed(a=1, b=1)), "out", options=options_for(0, "1KB"),
                             settings=Settings(threads=1))
    assert verify(here / "out") == [] and manifest.method == "linear"
    assert merge_tensors(config("linear", listed(a=1, b=1)), "out", options=options_for(0, "1KB"), warn=None) == manifest
    save_file({k: v + 1 for k, v in load_file("a.safetensors").items()}, "a.safetensors")
    with pytest.raises(OutputError, match="but of other tensors"):
        merge_tensors(config("linear", listed(a=1, b=1)), "out", options=options_for(0, "1KB"))
    with pytest.raises(OutputError, match="already holds another"):
        merge_tensors(config("linear", listed(a=1, b=1)), "out", options=options_for(0, "1KB"), missing="union")


def test_many_shards(here):
    merge_tensors(config("linear", listed(a=1, b=1)), "out", options=options_for(0, 100))
    index = json.loads((here / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"w", "v.0", "count"} and len(set(index["weight_map"].values())) > 1


def test_the_dry_run_writes_nothing(here):
    before = {p.name for p in here.iterdir()}
    lines = forecast_tensors(config("linear", listed(a=1, b=1)), "out.safetensors")
    assert {p.name for p in here.iterdir()} == before
    assert any(line.startswith("tensors: 3 (1 copied, 2 linear), 37 parameters") for line in lines)


def test_not_onto_its_own_input(here):
    for out, says in (("a.safetensors", "one of the files to be merged"), (".", "the folder that you are in")):
        with pytest.raises(OutputError, match=says):
            merge_tensors(config("linear", listed(a=1, b=1)), out)
    os.mkdir("sub")
    shutil.move("a.safetensors", "sub/a.safetensors")
    with pytest.raises(OutputError, match="one of the files to be merged"):
        merge_tensors(config("linear", [{"model": "sub/a.safetensors", "parameters": {"weight": 1}}]), "sub")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("asked", "says"), [
    (config("linear", listed(a=1, nothing=1)), "models[1].model: 'nothing.safetensors': there is no such file"),
    (config("linear", [{"model": "folder", "parameters": {"weight": 1}}]), "'folder' is a folder, wanted a file"),
    (config("linear", [{"model": {"path": "a"}, "parameters": {"weight": 1}}]), "wanted the path of a file"),
    (config("linear", listed(a=1, b=1), tokenizer_source="union"), "tokenizer_source: files of tensors have no layers"),
    (config("linear", listed(a=1), slices=[]), "slices: files of tensors"),
    (config("linear", listed(a=1, b=1), paramters={}), "unknown key `paramters`. Did you mean `parameters`?"),
    (config("linear", listed(a=None, b=1)), "linear needs `weight` for it"),
    (config("ties", listed(a=1)), "base_model: ties needs one"),
    (config("slerp", listed(a=None, b=None), base_model="base.safetensors", parameters={"t": 0.5}), "slerp merges 1 model"),
    (config("linear", listed(a=1) * 2), "is already models[0]"),
    (config("liner", listed(a=1)), "Did you mean `linear`?"),
    (config("linear", listed(a=1, b=1), dtype="int4"), "dtype: got 'int4'"),
])
def test_configs_that_are_refused(here, asked, says):
    os.mkdir("folder")
    with pytest.raises(RecipeError) as caught:
        merge_tensors(asked, "out")
    assert says in str(caught.value) and not (here / "out").exists()


def test_all_problems_in_one_message(here):
    with pytest.raises(RecipeError) as caught:
        merge_tensors(config("linear", [{"model": "x"}, {"model": "y", "paremeters": 1}], dtype=3), "out")
    assert str(caught.value).count("\n  - ") >= 4


def test_shapes_and_dtypes_that_differ(here):
    save_file({"w": torch.ones(5, 6), "v.0": torch.ones(7), "count": torch.arange(3).int(), "x": torch.ones(1)},
              "b.safetensors")
    save_file(load_file("a.safetensors") | {"x": torch.ones(1).double()}, "a.safetensors")
    with pytest.raises(AnabranchError) as caught:
        merge_tensors(config("linear", listed(a=1, b=1)), "out")
    for piece in ("'w': b.safetensors has shape [5, 6], a.safetensors has [6, 5]",
                  "'count': of I64 [3] in a.safetensors, of I32", "'x': F64 cannot be merged"):
        assert piece in str(caught.value)


def test_buffers_that_differ(here):
    save_file(load_file("b.safetensors") | {"count": torch.arange(3) + 1}, "b.safetensors")
    with pytest.raises(RecipeError, match=r"'count': b.safetensors has other numbers"):
        merge_tensors(config("linear", listed(a=1, b=1)), "out")
    assert not (here / "out").exists()


def test_a_file_left_out_for_its_shape_as_the_peer_does(here):
    save_file({"w": torch.ones(5, 6)}, "a.safetensors")
    save_file({"w": torch.full((6, 5), 3.0)}, "b.safetensors")
    save_file({"w": torch.ones(6, 5)}, "base.safetensors")
    told: list[str] = []
    merge_tensors(config("task_arithmetic", listed(a=1, b=1), base_model="base.safetensors"), "out", warn=told.append)
    assert tensors_of(here / "out")["w"].equal(torch.full((6, 5), 3.0))
    assert any("a.safetensors is left out: its shape" in line for line in told)


def test_damaged_files_and_numbers_that_are_none(here):
    Path("broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ??")
    Path("empty.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as caught:
        merge_tensors(config("linear", listed(broken=1, empty=1)), "out")
    assert "broken.safetensors" in str(caught.value) and "empty.safetensors" in str(caught.value)
    save_file({"w": torch.full((6, 5), float("nan"))}, "b.safetensors")
    save_file({"w": torch.ones(6, 5)}, "a.safetensors")
    with pytest.raises(CorruptedError, match=r"b.safetensors: 30 NaN"):
        merge_tensors(config("linear", listed(a=1, b=1)), "out")
    assert not list(here.glob("out*"))


def test_quantised_files(here):
    save_file({"w": torch.ones(6, 5).byte(), "w.absmax": torch.ones(6)}, "a.safetensors")
    with pytest.raises(ModelError, match=r"a.safetensors: quantised"):
        merge_tensors(config("linear", listed(a=1)), "out")


def test_pickles(here, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    torch.save(load_file("a.safetensors"), "a.pt")
    torch.save({"w": os.system}, "evil.bin")
    asked = config("linear", [{"model": "a.pt", "parameters": {"weight": 1}}, *listed(b=1)], dtype="float32")
    with pytest.raises(ModelError, match="--allow-pickle"):
        merge_tensors(asked, "out")
    for _ in range(2):  # the second from the cache
        merge_tensors(asked, "out", options=options_for(allow_pickle=True), warn=None)
    assert_is(tensors_of(here / "out")["w"], (numbers("a")["w"] + numbers("b")["w"]) / 2)
    assert len(list((here / "cache" / "anabranch" / "converted").iterdir())) == 1
    with pytest.raises(ModelError, match="holds more than tensors"):
        merge_tensors(config("linear", [{"model": "evil.bin", "parameters": {"weight": 1}}]), "out2",
                      options=options_for(allow_pickle=True))


def test_a_path_with_signs_of_the_grammar(here):
    shutil.copy("a.safetensors", "a+b@c.safetensors")
    merge_tensors(config("linear", [{"model": "a+b@c.safetensors", "parameters": {"weight": 1}}]), "out")
    assert tensors_of(here / "out")["w"].equal(load_file("a.safetensors")["w"])


def test_a_file_is_verified_by_the_manifest_beside_it(here):
    config = {"merge_method": "linear", "models": [{"model": "a.safetensors", "parameters": {"weight": 1.0}}]}
    merge_tensors(config, here / "one.safetensors")
    assert verify(here / "one.safetensors") == []
    tensors = load_file(here / "one.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1}, here / "one.safetensors")
    assert [name in line for line in verify(here / "one.safetensors")] == [True]
