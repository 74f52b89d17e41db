"""Folders, the Hub, pickles and quantised weights: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anabranch.engine import fetch
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.fetch import convert, quantisation, resolve
from anabranch.errors import AnabranchError, CorruptedError, ModelError

STATE = {"model.embed_tokens.weight": torch.arange(12.0).view(4, 3).bfloat16(), "b": torch.tensor(7), "h": torch.ones(2).half(),
         "mask": torch.tensor([True, False]), "empty": torch.zeros(0, 3)}


class Code:
    """Runs when unpickled without care."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(*arguments: Any, error: type[AnabranchError] = ModelError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        resolve(*arguments, **options)
    return str(caught.value)


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A hub of one repository, me/pickled and me/safe; the calls that were made."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        from fnmatch import fnmatch

        calls.append({"repository": repository, **options})
        folder = model(tmp_path / "hub" / repository)
        files = {"me/safe": ["model.safetensors", "consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin",
                             "tokenizer.json", "chat_template.jinja", "run.py"],
                 "me/pickled": ["pytorch_model.bin", "training_args.bin"]}[repository]
        for file in files:
            wanted = any(fnmatch(file, p) for p in options["allow_patterns"])
            if wanted and not any(fnmatch(file, p) for p in options["ignore_patterns"]):
                (folder / file).parent.mkdir(exist_ok=True)
                torch.save(STATE, folder / file)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_itself(tmp_path):
    assert resolve(model(tmp_path / "a b+c@d")) == tmp_path / "a b+c@d"
    assert resolve(str(tmp_path / "a b+c@d")) == tmp_path / "a b+c@d"
    assert "no revision" in refusal(tmp_path / "a b+c@d", "main")


@pytest.mark.parametrize("reference", ["/no/such", "./no", "../no/such", "a/b/c", "~/models/x", "C:\\models\\x", ""])
def test_what_is_no_hub_id_is_not_looked_up(hub, monkeypatch, tmp_path, reference):
    monkeypatch.chdir(tmp_path)
    if reference:
        assert f"model {reference}: no such folder" in refusal(reference)
    assert hub == []


def test_only_weights_and_text_come_from_the_hub(hub, tmp_path):
    folder = resolve("me/safe", "v1", tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == ["chat_template.jinja", "config.json", "model.safetensors",
                                                        "tokenizer.json"]
    assert [(c["repository"], c["revision"], c["cache_dir"]) for c in hub] == [("me/safe", "v1", tmp_path / "cache")]


def test_pickles_of_the_hub_only_where_allowed(hub, tmp_path):
    assert "no weights in safetensors" in refusal("me/pickled")
    assert not list((tmp_path / "hub").rglob("*.bin"))
    folder = resolve("me/pickled", converted=tmp_path / "made")
    assert Checkpoint.open(folder).tensors.keys() == STATE.keys()
    assert [p.name for p in (tmp_path / "hub").rglob("*.bin")] == ["pytorch_model.bin"]
    assert resolve("me/safe", converted=tmp_path / "made") == tmp_path / "hub" / "me/safe"


def test_offline_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refusal("nobody/nothing", "abc")
    assert "'nobody/nothing' at revision 'abc'" in text and "folder" in text and "Traceback" not in text
    assert "HF_HUB_OFFLINE" in text or "go online" in text


@pytest.mark.parametrize("kind, wanted", [("GatedRepoError", "agree to its terms"), ("RepositoryNotFoundError", "private"),
                                          ("RevisionNotFoundError", "branch, tag"), ("Unheard", "Check the name")])
def test_what_the_hub_says(monkeypatch, kind, wanted):
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise type(kind, (Exception,), {})("404 somewhere\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    text = refusal("me/it")
    assert wanted in text and "404 somewhere" in text and "\n" not in text


def equal(folder: Path, state: dict[str, torch.Tensor]) -> bool:
    opened = Checkpoint.open(folder)
    return opened.tensors.keys() == state.keys() and all(
        opened.read(n).equal(t) and opened.read(n).dtype == t.dtype for n, t in state.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_become_safetensors(tmp_path, zipped):
    tied = torch.randn(4, 3)
    state = STATE | {"a": tied, "tied": tied, "turned": torch.arange(6.0).view(2, 3).T, "part": torch.arange(9.0)[2:5]}
    folder = model(tmp_path / "m", a=1)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "tokenizer.json").write_text("{}")
    assert resolve(folder) == folder  # refused when it is opened, in the words of Checkpoint
    with pytest.raises(ModelError, match="Pickle files are refused"):
        Checkpoint.open(resolve(folder))
    made = resolve(folder, converted=tmp_path / "made")
    assert equal(made, state) and sorted(p.name for p in made.iterdir()) == ["config.json", "model.safetensors",
                                                                             "tokenizer.json"]
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert resolve(folder, converted=tmp_path / "made") == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before and len(list((tmp_path / "made").iterdir())) == 1
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert equal(resolve(folder, converted=tmp_path / "made"), {"a": torch.zeros(1)})


def test_code_and_further_templates_go_along_and_do_not_run(tmp_path):
    """Without the module that `auto_map` names the result could not be loaded."""
    folder = model(tmp_path / "m", auto_map={"AutoConfig": "configuration_m.MConfig"})
    torch.save(STATE, folder / "pytorch_model.bin")
    beside = {"configuration_m.py": "raise SystemExit('code ran')", "additional_chat_templates/tools.jinja": "{{ x }}",
              "training_args.bin": "", "extra/notes.txt": ""}
    for name, text in beside.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    made = convert(folder, tmp_path / "made")
    for name in ("configuration_m.py", "additional_chat_templates/tools.jinja"):
        assert (made / name).read_text() == beside[name]
    assert sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()) == [
        "additional_chat_templates/tools.jinja", "config.json", "configuration_m.py", "model.safetensors"]


def test_two_conversions_at_once(tmp_path, monkeypatch):
    """One begins, and while it writes another begins and is done: the first takes what the other made."""
    folder, into, write = model(tmp_path / "m"), tmp_path / "made", fetch._write
    torch.save(STATE, folder / "pytorch_model.bin")
    others: list[tuple[Path, int]] = []

    def slow(path: Path, tensors: Any) -> None:
        monkeypatch.setattr(fetch, "_write", write)
        other = convert(folder, into)
        others.append((other, other.stat().st_ino))
        write(path, tensors)

    monkeypatch.setattr(fetch, "_write", slow)
    made = convert(folder, into)
    assert others == [(made, made.stat().st_ino)] and equal(made, STATE)
    assert list(into.iterdir()) == [made]


def test_a_kept_conversion_follows_the_files_beside_the_weights(tmp_path):
    folder = model(tmp_path / "m", a=1)
    torch.save(STATE, folder / "pytorch_model.bin")
    first = convert(folder, tmp_path / "made")
    model(folder, a=234)
    second = convert(folder, tmp_path / "made")
    assert [json.loads((made / "config.json").read_text()) for made in (first, second)] == [{"a": 1}, {"a": 234}]


def test_sharded_pickles(tmp_path):
    folder = model(tmp_path / "m")
    files = {"pytorch_model-00001-of-00002.bin": ["b", "h"], "pytorch_model-00002-of-00002.bin": ["mask", "empty"]}
    for file, names in files.items():
        torch.save({n: STATE[n] for n in names}, folder / file)
    index = {"weight_map": {n: f for f, names in files.items() for n in names}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(STATE, folder / "pytorch_model-left-over.bin")
    made = resolve(folder, converted=tmp_path / "made")
    assert equal(made, {n: STATE[n] for names in files.values() for n in names})
    assert (made / "model.safetensors.index.json").is_file()
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert "00002-of-00002" in refusal(folder, converted=tmp_path / "again", error=CorruptedError)


@pytest.mark.parametrize("value, wanted", [
    ({"a": Code()}, "would run code"), ({"a": torch.ones(1), "epoch": 3}, "epoch"), ([torch.ones(1)], "top level"),
    ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64")])
def test_pickles_of_anything_else(tmp_path, value, wanted):
    folder = model(tmp_path / "m")
    torch.save(value, folder / "pytorch_model.bin")
    assert wanted in refusal(folder, converted=tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_damaged_pickle(tmp_path):
    folder = model(tmp_path / "m")
    torch.save({"a": torch.ones(1000)}, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    for spoiled in (b"", b"hello", data[: len(data) // 2]):
        (folder / "pytorch_model.bin").write_bytes(spoiled)
        assert "pytorch_model.bin" in refusal(folder, converted=tmp_path / "made")


def test_a_conversion_that_was_killed_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    folder = model(tmp_path / "m")
    torch.save(STATE, folder / "pytorch_model.bin")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "_write", full)
    assert "No space left" in refusal(folder, converted=tmp_path / "made", error=AnabranchError)
    assert list((tmp_path / "made").iterdir()) == []


PACKED: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
     {"q.weight": torch.zeros(4, 1, dtype=torch.uint8), "q.weight.absmax": torch.zeros(1)}, "bitsandbytes 4-bit nf4"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}},
     {"q.qweight": torch.zeros(4, 1, dtype=torch.int32), "q.scales": torch.zeros(1)}, "gptq 4-bit"),
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
     {"q.weight": torch.zeros(4).to(torch.float8_e4m3fn), "q.weight_scale_inv": torch.zeros(1)}, "fp8 e4m3"),
    ({}, {"q.weight": torch.zeros(4).to(torch.float8_e5m2)}, "F8_E5M2, such as 'q.weight'"),
    ({}, {"q.weight": torch.zeros(4, 1, dtype=torch.uint8), "q.weight.absmax": torch.zeros(1)}, "U8"),
    ({}, {"q_blocks": torch.zeros(4, dtype=torch.uint8), "q_scales": torch.zeros(1, dtype=torch.uint8)}, "2 tensors of U8"),
    ({}, {"q.weight": torch.zeros(4, 4, dtype=torch.int8), "q.SCB": torch.zeros(4)}, "I8"),
]


@pytest.mark.parametrize("config, tensors, wanted", PACKED, ids=[p[2] for p in PACKED])
def test_quantised_weights_are_named(tmp_path, config, tensors, wanted):
    save_file(tensors, model(tmp_path, **config) / "model.safetensors")
    assert wanted in (quantisation(Checkpoint.open(tmp_path)) or "")


def test_plain_weights_and_buffers_are_not_quantised(tmp_path):
    save_file({"h.0.attn.bias": torch.ones(1, 4, dtype=torch.uint8), "position_ids": torch.arange(4), "w": torch.ones(2)},
              model(tmp_path) / "model.safetensors")
    assert quantisation(Checkpoint.open(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"load_in_8bit": True}}))
    assert quantisation(Checkpoint.open(tmp_path)) == "quantised 8-bit by config.json's `quantization_config`"


def test_reading_needs_neither_transformers_nor_peft():
    code = ("import sys, anabranch.engine.fetch, anabranch.engine.adapter, anabranch.engine.layout\n"
            "print(sorted({'transformers', 'peft', 'huggingface_hub', 'tokenizers'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
