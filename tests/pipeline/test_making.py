"""Folders whose tensors functions compute: rounded once, checked, resumed after a kill, refused where they are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.engine import making
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.making import Made, Read, copied, forecast_made, make_model
from anabranch.engine.merging import verify
from anabranch.errors import CorruptedError, OutputError, RecipeError


@pytest.fixture
def origin(tmp_path):
    folder = tmp_path / "origin"
    folder.mkdir()
    torch.manual_seed(0)
    save_file({"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16), "n": torch.arange(4)},
              folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def doubled(checkpoint):
    return Made({"a": ((3, 4), "BF16"), "c": ((), "F32")},
                lambda: {"a": checkpoint.read("a").double() * 2, "c": checkpoint.read("a").sum()})


def make(out, origin, made=None, **more):
    made = made or [doubled(origin), copied(origin, "b", as_name="z", dtype="F32"), copied(origin, "n", dtype="F32")]
    return make_model(out, made, {"config.json": b"{}"}, [Read("origin", origin)],
                      **({"verb": "test", "settings": {"sizes": (1, 2)}, "threads": 2} | more))


def test_tensors_are_rounded_once_and_whole_numbers_kept(tmp_path, origin):
    manifest = make(tmp_path / "out", origin)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made["a"].equal((origin.read("a").double() * 2).to(torch.bfloat16))
    assert made["c"].shape == () and made["z"].equal(origin.read("b").float()) and made["n"].equal(torch.arange(4))
    assert manifest.verb == "test" and manifest.inputs[0].label == "origin" and verify(tmp_path / "out") == []


def test_the_same_again_is_nothing_and_something_else_is_refused(tmp_path, origin):
    out = tmp_path / "out"
    first = make(out, origin)
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert make(out, origin).hash == first.hash and (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="sizes"):
        make(out, origin, settings={"sizes": [1, 3]})
    tensors = load_file(origin.folder / "model.safetensors")
    save_file(tensors | {"a": tensors["a"] + 1}, origin.folder / "model.safetensors")
    with pytest.raises(OutputError, match="other inputs"):
        make(out, Checkpoint.open(origin.folder))
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_two_inputs_of_one_name_and_a_changed_file_beside_the_weights(tmp_path, origin):
    inputs = [Read("origin", origin, ["a"]), Read("origin", origin, ["b"])]
    made = [copied(origin, "n")]
    files = {"config.json": origin.folder / "config.json", "README.md": b"one"}

    def again(files):
        return make_model(tmp_path / "out", made, files, inputs, verb="test", settings={})

    first = again(files)
    assert again(files).hash == first.hash
    assert again(files | {"README.md": b"two"}).hash == first.hash  # for people, who may change it
    with pytest.raises(OutputError, match=r"(?s)other inputs.*tokenizer.json"):
        again(files | {"tokenizer.json": b"{}"})
    (origin.folder / "config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(OutputError, match=r"(?s)other inputs.*config.json: would be another file"):
        again(files)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_an_input_that_is_changed_while_it_is_read(tmp_path, origin):
    def make_and_spoil():
        tensors = load_file(origin.folder / "model.safetensors")
        result = origin.read("a").clone()
        save_file(tensors | {"a": tensors["a"] + 1}, origin.folder / "model.safetensors")
        return {"a": result}

    with pytest.raises(CorruptedError, match="changed while it was read"):
        make(tmp_path / "out", origin, [Made({"a": ((3, 4), "F32")}, make_and_spoil)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["origin"]


def test_only_what_matters_of_an_input_decides(tmp_path, origin):
    """Tensors that are not read may change; a file beside the weights that matters may not."""
    side = tmp_path / "side" / "adapter_config.json"
    side.parent.mkdir()
    side.write_text("{}")

    def again(out="out"):
        checkpoint = Checkpoint.open(origin.folder)
        return make_model(tmp_path / out, [copied(checkpoint, "n")], {}, [Read("origin", checkpoint, ["n"], [side])],
                          verb="test", settings={})

    first = again()
    tensors = load_file(origin.folder / "model.safetensors")
    save_file(tensors | {"a": tensors["a"] + 1}, origin.folder / "model.safetensors")
    assert again().hash == first.hash
    side.write_text('{"r": 2}')
    with pytest.raises(OutputError, match="other inputs"):
        again()
    with pytest.raises(OutputError, match="one of the inputs"):
        again("side")


def test_an_input_that_is_not_what_its_own_manifest_says(tmp_path, origin):
    make(tmp_path / "first", origin)
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    save_file(tensors | {"z": tensors["z"] + 1}, tmp_path / "first" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "first")
    with pytest.raises(CorruptedError, match=r"tensor 'z' has other bytes than the folder's own manifest.json says"):
        make_model(tmp_path / "out", [copied(checkpoint, "n")], {}, [Read("first", checkpoint)], verb="test", settings={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "origin"]


def test_what_was_allowed_before_a_kill_is_not_taken_over_when_it_is_not(tmp_path, origin):
    def killed():
        raise KeyboardInterrupt

    made = [Made({"x": ((2,), "F32")}, lambda: {"x": torch.full((2,), float("nan"))}), Made({"y": ((2,), "F32")}, killed)]
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", origin, made, threads=1, allow_nonfinite=True)
    with pytest.raises(CorruptedError, match="'x'"):
        make(tmp_path / "out", origin, [made[0], Made({"y": ((2,), "F32")}, lambda: {"y": torch.ones(2)})], threads=1)


def test_an_adapter_is_one_file(tmp_path, origin):
    make(tmp_path / "out", origin, max_shard_size=40, stem="adapter_model")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_groups_that_do_not_fit_side_by_side_take_turns(tmp_path, origin, monkeypatch):
    at_once, most = [0], [0]

    def make_one(name):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        at_once[0] -= 1
        return {name: torch.ones(2)}

    made = [Made({f"t.{i}": ((2,), "F32")}, lambda i=i: make_one(f"t.{i}"), need=1000) for i in range(6)]
    for room, together in ((3000, 2), (1500, 1)):
        monkeypatch.setattr(making, "_room", lambda *_, room=room: (4, room))
        most[0] = 0
        make(tmp_path / str(room), origin, made)
        assert most[0] == together


def test_progress_counts_bytes_once(tmp_path, origin):
    told = []
    make(tmp_path / "out", origin, progress=told.append)
    assert [(p.done, p.total) for p in told][-1] == (24 + 4 + 20 + 32,) * 2 and told[-1].tensors == 4
    assert sorted(p.done for p in told) == [p.done for p in told]


def test_threads_shards_and_order_do_not_show(tmp_path, origin):
    made = [copied(origin, "n"), copied(origin, "b"), doubled(origin)]
    make(tmp_path / "one", origin, made, threads=1)
    make(tmp_path / "two", origin, made[::-1], threads=8)
    make(tmp_path / "three", origin, made, max_shard_size=40)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert a == b and len(list((tmp_path / "three").glob("*.safetensors"))) > 1
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"a", "b", "c", "n"}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert all(Checkpoint.open(tmp_path / "three").read(name).equal(tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("value", "dtype", "words"),
                         [(float("nan"), "F32", "NaN or infinity"), (1e6, "F16", "too large for F16")])
def test_what_is_not_finite_leaves_nothing(tmp_path, origin, value, dtype, words):
    bad = [Made({"x": ((2,), dtype)}, lambda: {"x": torch.full((2,), value)})]
    with pytest.raises(CorruptedError, match=words):
        make(tmp_path / "out", origin, bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["origin"]
    make(tmp_path / "out", origin, bad, allow_nonfinite=True)


def test_an_input_and_a_limit_too_small_are_refused_before_anything(tmp_path, origin):
    with pytest.raises(OutputError, match="one of the inputs"):
        make(origin.folder, origin)
    with pytest.raises(RecipeError, match="too little"):
        make(tmp_path / "out", origin, memory="1MB")
    with pytest.raises(RecipeError, match="max-shard-size"):
        make(tmp_path / "out", origin, max_shard_size="much")
    lines = forecast_made(tmp_path / "out", [doubled(origin)], {}, [Read("origin", origin)])
    assert any("13 parameters" in line for line in lines) and not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["origin"]


KILLED = """
import sys, time
from pathlib import Path
import torch
from anabranch.engine.making import Made, Read, make_model
from anabranch.engine.checkpoint import Checkpoint
out, origin, told, slow = Path(sys.argv[1]), Checkpoint.open(Path(sys.argv[2])), Path(sys.argv[3]), sys.argv[4] == "slow"
def make(i):
    with open(told, "a") as file:
        file.write(f"{i}\\n")
    if slow and i >= 3:
        time.sleep(60)
    return {f"t.{i}": torch.full((100,), float(i))}
made = [Made({f"t.{i}": ((100,), "F32")}, lambda i=i: make(i)) for i in range(6)]
make_model(out, made, {}, [Read("origin", origin)], verb="test", settings={}, threads=1)
"""


def test_after_a_kill_only_what_is_missing_is_made(tmp_path, origin):
    out, told = tmp_path / "out", tmp_path / "told"
    arguments = [sys.executable, "-c", KILLED, str(out), str(origin.folder), str(told)]
    source = str(Path(__file__).parents[2] / "src")
    child = subprocess.Popen([*arguments, "slow"], env=os.environ | {"PYTHONPATH": source})
    for _ in range(600):
        if told.exists() and "3" in told.read_text().split():
            break
        time.sleep(0.1)
    child.kill()
    child.wait()
    assert not out.exists()
    told.unlink()
    subprocess.run([*arguments, "fast"], check=True, env=os.environ | {"PYTHONPATH": source})
    assert told.read_text().split() == ["3", "4", "5"]
    tensors = load_file(out / "model.safetensors")
    assert all(tensors[f"t.{i}"].eq(i).all() for i in range(6)) and verify(out) == []


def test_a_finished_result_is_told_of_once_and_only_then(tmp_path, origin):
    told = []
    make(tmp_path / "out", origin, warn=told.append)
    assert told == []
    make(tmp_path / "out", origin, warn=told.append)
    assert len(told) == 1 and "nothing was done" in told[0]
