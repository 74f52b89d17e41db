"""Model folders as found in the wild: read lazily, refused clearly."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anabranch.engine.checkpoint import INDEX, WEIGHTS, Checkpoint, checkpoint_hash, weight_files
from anabranch.errors import AnabranchError, CorruptedError, ModelError

TENSORS = {"model.embed_tokens.weight": torch.arange(12.0).view(4, 3).bfloat16(), "a": torch.ones(5),
           "b": torch.tensor(7), "z": torch.zeros(2, 2, dtype=torch.float16)}


def single(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    folder.mkdir(parents=True)
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{i + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, folder / file, metadata={"format": "pt"})
        weight_map[name] = file
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def message(error: type[AnabranchError], folder: Path) -> str:
    with pytest.raises(error) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


@pytest.mark.parametrize("make", [single, sharded])
def test_shapes_dtypes_and_numbers(tmp_path, make):
    opened = Checkpoint.open(make(tmp_path / "m"))
    assert {n: (i.shape, i.dtype) for n, i in opened.tensors.items()} == {
        "model.embed_tokens.weight": ((4, 3), "BF16"), "a": ((5,), "F32"), "b": ((), "I64"), "z": ((2, 2), "F16")}
    for name, tensor in TENSORS.items():
        assert opened.read(name).equal(tensor) and opened.read(name).dtype == tensor.dtype


def test_tensors_stand_by_shard_then_name(tmp_path):
    assert list(Checkpoint.open(sharded(tmp_path / "s")).tensors) == list(TENSORS)
    assert list(Checkpoint.open(single(tmp_path / "m")).tensors) == sorted(TENSORS)


def test_opening_reads_headers_only(tmp_path):
    """A sparse 8 GB tensor: opened at once, on a machine that could not hold it."""
    folder = single(tmp_path / "m", {"x": torch.zeros(1)})
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)
    assert Checkpoint.open(folder).tensors["x"].shape == (2**31,)


def test_no_folder(tmp_path):
    assert str(tmp_path / "nowhere") in message(ModelError, tmp_path / "nowhere")


def test_no_weights_says_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    text = message(ModelError, tmp_path)
    assert "model folder without weights" in text and "README.md" in text and "ickle" not in text
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    text = message(ModelError, tmp_path)
    assert "pytorch_model.bin" in text and "Pickle files are refused" in text and "save_pretrained" in text
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "lora apply BASE ADAPTER" in message(ModelError, tmp_path)


def test_no_config(tmp_path):
    (single(tmp_path / "m") / "config.json").unlink()
    assert "no config.json" in message(ModelError, tmp_path / "m")
    (tmp_path / "m/config.json").write_text("{")
    assert "config.json" in message(CorruptedError, tmp_path / "m")


def test_two_models_in_one_folder(tmp_path):
    save_file(TENSORS, sharded(tmp_path / "m") / WEIGHTS)
    assert "both" in message(ModelError, tmp_path / "m")


def test_every_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "m")
    (folder / "model-00001-of-00004.safetensors").unlink()
    (folder / "model-00003-of-00004.safetensors").unlink()
    text = message(CorruptedError, folder)
    assert "model-00001-of-00004" in text and "model-00003-of-00004" in text and "00002" not in text


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_cut_short_is_named(tmp_path, keep):
    path = single(tmp_path / "m") / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    assert str(path) in message(CorruptedError, tmp_path / "m")


@pytest.mark.parametrize("at, byte", [(7, 0xFF), (8, ord("[")), (20, 0xFF)])
def test_a_damaged_header_is_named(tmp_path, at, byte):
    path = single(tmp_path / "m") / WEIGHTS
    data = bytearray(path.read_bytes())
    data[at] = byte
    path.write_bytes(data)
    assert str(path) in message(CorruptedError, tmp_path / "m")


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
                                   '{"weight_map": {"a": "../config.json"}}', '{"weight_map": {"a": "/etc/passwd"}}'])
def test_a_damaged_index(tmp_path, index):
    folder = sharded(tmp_path / "m")
    (folder / INDEX).write_text(index)
    assert INDEX in message(CorruptedError, folder)


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    folder = sharded(tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("a")
    (folder / INDEX).write_text(json.dumps(index))
    text = message(CorruptedError, folder)
    assert "'ghost'" in text and "'a'" in text
    shutil.copy(folder / "model-00001-of-00004.safetensors", folder / "model-00002-of-00004.safetensors")
    assert "model.embed_tokens.weight" in message(CorruptedError, folder)


def test_hash_is_of_weights_and_config_alone(tmp_path):
    folder = sharded(tmp_path / "m")
    before = checkpoint_hash(folder)
    (folder / "README.md").write_text("new")
    assert checkpoint_hash(shutil.copytree(folder, tmp_path / "copy")) == before
    (folder / "config.json").write_text('{"a": 1}')
    changed = checkpoint_hash(folder)
    assert changed != before
    path = weight_files(folder)[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len({before, changed, checkpoint_hash(folder)}) == 3


def test_weight_files_by_name(tmp_path):
    assert [p.name for p in weight_files(single(tmp_path / "m"))] == [WEIGHTS]
    assert [p.name for p in weight_files(sharded(tmp_path / "s"))] == [f"model-0000{i}-of-00004.safetensors"
                                                                       for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("config, tied", [({}, True), ({"tie_word_embeddings": False}, False),
                                          ({"text_config": {"tie_word_embeddings": False}}, False),
                                          ({"tie_word_embeddings": True, "text_config": {}}, True)])
def test_ties(tmp_path, config, tied):
    assert Checkpoint.open(single(tmp_path / "m", **config)).ties_embeddings is tied


def test_tied_copy(tmp_path):
    embedding = TENSORS["model.embed_tokens.weight"]
    same = single(tmp_path / "same", TENSORS | {"lm_head.weight": embedding.clone()})
    other = single(tmp_path / "other", TENSORS | {"lm_head.weight": embedding + 1})
    assert Checkpoint.open(same).tied_copy_of("lm_head.weight") == "model.embed_tokens.weight"
    assert Checkpoint.open(other).tied_copy_of("lm_head.weight") is None
