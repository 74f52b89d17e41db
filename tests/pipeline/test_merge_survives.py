"""Merges that are killed, starved, cut, flipped and raced: the right bytes or a clear message, and nothing left over."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from merge_jobs import Jobs, files_of, tensors_of, write_checkpoint

from anabranch.engine import checkpoint, merging, stream
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.merging import merge_config, verify, verify_files
from anabranch.engine.output import JOURNAL, MANIFEST
from anabranch.engine.prepare import Options
from anabranch.engine.stream import Progress, Settings
from anabranch.errors import AnabranchError, CorruptedError, OutputError, RecipeError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "vocab_size": 1000}
MODELS = ("base", "a", "b", "c")
COMMAND = os.environ | {"PYTHONPATH": str(Path(merging.__file__).parents[2])}  # run from another folder


def tensors_for(seed: int, layers: int, hidden: int, rows: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A llama's names; number 0 is the base, the others are it and a little noise. Heavy-tailed, with exact zeros."""
    def numbers(*shape: int) -> torch.Tensor:
        start = torch.randn(shape, generator=base) * 0.05
        if not seed:
            return start.to(dtype)
        step = torch.randn(shape, generator=own) * 0.004
        return (start + step * (torch.rand(shape, generator=own) > 0.1)).to(dtype)

    base, own = torch.Generator().manual_seed(77), torch.Generator().manual_seed(seed)
    made = {"model.embed_tokens.weight": numbers(rows, hidden), "model.norm.weight": numbers(hidden),
            "lm_head.weight": numbers(rows, hidden)}
    for i in range(layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            made[f"model.layers.{i}.{name}.weight"] = numbers(hidden, hidden)
        made[f"model.layers.{i}.input_layernorm.weight"] = numbers(hidden)
    return made


def make_family(folder: Path, layers: int, hidden: int, rows: int, dtype: torch.dtype = torch.float32) -> Path:
    """base, a, b, c in several files each, and the same models cut otherwise under `cut/`."""
    config = CONFIG | {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": rows}
    for seed, (model, shards) in enumerate(zip(MODELS, (3, 2, 1, 4), strict=True)):
        tensors = tensors_for(seed, layers, hidden, rows, dtype)
        write_checkpoint(folder / model, tensors, config, shards)
        write_checkpoint(folder / "cut" / model, tensors, config, 5 - shards, backwards=True)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Four models of 31 MB each in float32."""
    return make_family(tmp_path_factory.mktemp("large"), layers=8, hidden=448, rows=1400)


@pytest.fixture(scope="module")
def small_models(tmp_path_factory) -> Path:
    """Four models of 0.7 MB each: more than one block, little more."""
    return make_family(tmp_path_factory.mktemp("small"), layers=2, hidden=96, rows=1000)


@pytest.fixture
def small(tmp_path, small_models) -> Path:
    """A copy to be harmed; merges go beside it."""
    for model in MODELS:
        shutil.copytree(small_models / model, tmp_path / model)
    return tmp_path


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    running = Jobs(tmp_path_factory.mktemp("logs"))
    yield running
    running.close()


def config_of(folder: Path, method: str, models: tuple[str, ...] = ("a", "b", "c"), base: str | None = "base",
              parameters: dict[str, Any] | None = None, per_model: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A MergeKit config, with a weight for each model that keeps its number whatever the order."""
    weights = {"a": 0.5, "b": 0.3, "c": 0.4}
    one = {m: {"weight": weights[m], **(per_model or {})} for m in models}
    listed = [{"model": str(folder / m), **({"parameters": one[m]} if per_model is not None else {})} for m in models]
    return {"merge_method": method, "models": listed, **({"base_model": str(folder / base)} if base else {}),
            **({"parameters": parameters} if parameters else {}), **more}


def write_config(folder: Path, config: dict[str, Any], name: str = "config.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / name


TIES: dict[str, Any] = {"per_model": {"density": 0.4}}


# --- kills ---


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_kill_9_at_random_moments(method, large, tmp_path, jobs):
    """Six moments each, from before the folder exists to the rename; then the same command, and the very same files."""
    config = write_config(tmp_path, config_of(large, method, per_model={"density": 0.4}, out_dtype="bfloat16"))
    command = ("merge", config, "out", "--threads", "2", "--max-shard-size", "6MB", "-q")
    times = []
    for _ in range(2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        begun = time.monotonic()
        assert jobs.run(*command, folder=str(tmp_path)).code == 0
        times.append(time.monotonic() - begun)
    lasted = min(times)
    wanted = files_of(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in wanted) == 3
    moments, killed, midway = random.Random(f"kill {method}"), 0, 0
    for i in range(6):
        shutil.rmtree(tmp_path / "out")
        running = jobs.begin(*command, folder=str(tmp_path))
        time.sleep(lasted * (i + moments.random()) / 6)
        os.kill(running[0], signal.SIGKILL)  # it is not waited for yet, so the number is still its own
        ended = jobs.end(running)
        killed += ended.code == -signal.SIGKILL
        lasted *= 1 if ended.code else 0.8  # it was faster this time
        journal = tmp_path / "out.partial" / JOURNAL
        midway += journal.exists() and len(journal.read_text().splitlines()) > 1
        assert not (tmp_path / "out").exists() or files_of(tmp_path / "out") == wanted
        again = jobs.run(*command, folder=str(tmp_path))
        assert (again.code, again.text) == (0, "")
        assert files_of(tmp_path / "out") == wanted
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out"]
    assert killed >= 4 and midway >= 1, (killed, midway)


def test_kill_9_before_every_call_that_touches_the_disk(tmp_path_factory, tmp_path, jobs):
    """Each mkdir, write, flush, rename and unlink of a merge in turn is the one that no longer happens."""
    models = make_family(tmp_path_factory.mktemp("smallest"), layers=1, hidden=16, rows=40)
    config = write_config(tmp_path, config_of(models, "dare_ties", per_model={"density": 0.5}))
    command = ("merge", config, "out", "--threads", "1", "--max-shard-size", "6KB", "-q")
    counted = jobs.run(*command, folder=str(tmp_path), crash_at=0)
    assert counted.code == 0 and 30 < counted.calls < 80
    wanted = files_of(tmp_path / "out")
    for call in range(1, counted.calls + 1):
        shutil.rmtree(tmp_path / "out")
        assert jobs.run(*command, folder=str(tmp_path), crash_at=call).code == -signal.SIGKILL, call
        again = jobs.run(*command, folder=str(tmp_path))
        assert (again.code, again.text) == (0, ""), call
        assert files_of(tmp_path / "out") == wanted, call
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out"], call


def test_killed_again_and_again(small_models, tmp_path, jobs):
    """A machine that dies over and over gets there in the end: each call leaves more than it found."""
    config = write_config(tmp_path, config_of(small_models, "ties", per_model={"density": 0.5}))
    command = ("merge", config, "out", "--threads", "1", "--max-shard-size", "300KB", "-q")
    assert jobs.run("merge", config, "whole", *command[3:], folder=str(tmp_path)).code == 0
    lengths = []
    while (ended := jobs.run(*command, folder=str(tmp_path), crash_at=24)).code == -signal.SIGKILL:
        lengths.append(len((tmp_path / "out.partial" / JOURNAL).read_text().splitlines()))
        assert lengths == sorted(lengths) and len(lengths) < 30
        if len(lengths) > 2 and lengths[-1] == lengths[-3]:  # only the end is left, and it is longer than 24 calls
            ended = jobs.run(*command, folder=str(tmp_path))
            break
    assert ended.code == 0 and len(lengths) > 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def begun(pid: int, moment: str) -> bool:
    """Has it begun to import torch ("import"), or to write ("partial", in its working folder)?"""
    with contextlib.suppress(OSError):
        if moment == "import":
            return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
        return Path(f"/proc/{pid}/cwd/out.partial/{JOURNAL}").exists()
    return False


@pytest.mark.parametrize("signal_, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop(signal_, code, large, tmp_path, jobs):
    """The command itself, while it imports and while it writes: a line, the code that shells expect, and it goes on later."""
    config = write_config(tmp_path, config_of(large, "ties", per_model={"density": 0.4}))
    command = [sys.executable, "-m", "anabranch", "merge", str(config), "out", "--threads", "2"]
    stopped = False
    for moment in ("import", *["partial"] * 4):
        # a suite that a shell runs in the background ignores SIGINT, and so would what it starts
        running = subprocess.Popen(command, cwd=tmp_path, env=COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, preexec_fn=lambda: signal.signal(signal_, signal.SIG_DFL))
        until = time.monotonic() + 60
        while time.monotonic() < until and running.poll() is None and not begun(running.pid, moment):
            time.sleep(0.005)
        running.send_signal(signal_)
        _, err = running.communicate(timeout=60)
        assert "Traceback" not in err, err
        if running.returncode == 0:
            shutil.rmtree(tmp_path / "out")
            continue  # it had finished
        if running.returncode == -signal_:  # it was still importing, where a stop simply ends it
            assert not err
            continue
        stopped = True
        assert running.returncode == code, (running.returncode, err)
        assert "same command goes on" in err
        assert not (tmp_path / "out").exists()
        if moment == "partial":
            break
    assert stopped
    done = jobs.run(*command[3:], folder=str(tmp_path))
    assert done.code == 0, done.text
    assert verify_files(tmp_path / "out") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out"]


# --- one config, one result ---

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"base": None, "per_model": {}}, "task_arithmetic": {"per_model": {}}, "ties": {"per_model": {"density": 0.4}},
    "ties_global": {"per_model": {"density": 0.4}}, "dare_linear": {"per_model": {"density": 0.4}},
    "dare_ties": {"per_model": {"density": 0.4}}, "della": {"per_model": {"density": 0.4, "epsilon": 0.1}},
    "breadcrumbs": {"per_model": {"density": 0.6, "gamma": 0.05}}, "sce": {"parameters": {"select_topk": 0.3}},
    "ram": {}, "ramplus_tl": {}, "model_stock": {}, "karcher": {"base": None}, "multislerp": {"per_model": {}},
    "slerp": {"models": ("a",), "parameters": {"t": [0.2, 0.7]}},
    "nuslerp": {"models": ("a", "b"), "base": None, "per_model": {}},
    "nearswap": {"models": ("a",), "parameters": {"t": 0.002}}, "arcee_fusion": {"models": ("a",)},
    "passthrough": {"models": ("a",), "base": None, "parameters": {"scale": 0.7}}, "tsv_m": {}, "iso_c": {},
}
# Sums of as many terms as there are models: the result may move by the last bit when they are added in another order.
REORDERED = ("linear", "task_arithmetic", "ties", "ties_global", "dare_linear", "dare_ties", "della", "breadcrumbs", "sce",
             "ram", "ramplus_tl", "model_stock", "karcher", "multislerp", "iso_c")


def merged(config: dict[str, Any], out: Path, **settings: Any) -> dict[str, bytes]:
    """The weights and config.json of a merge, run twice where it must be stopped midway."""
    stop_at = settings.pop("stop_at", None)

    def stop(now: Progress) -> None:
        if now.tensors >= stop_at:
            raise KeyboardInterrupt

    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            merge_config(config, out, settings=Settings(**settings), progress=stop)
        assert not out.exists()
    merge_config(config, out, settings=Settings(**settings))
    found = {n: data for n, data in files_of(out).items() if n.endswith(".safetensors") or n == "config.json"}
    shutil.rmtree(out)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_changes_speed_changes_no_byte(method, small_models, tmp_path):
    """One hash: one worker and two, plenty of memory and as little as there can be, fused kernels and the plain form,
    inputs in other files, stopped and gone on."""
    config = config_of(small_models, method, **METHODS[method]) | {"out_dtype": "bfloat16"}
    wanted = merged(config, tmp_path / "out", threads=1)
    least = least_memory(config, tmp_path / "out")
    assert merged(config, tmp_path / "out", threads=2, memory=least) == wanted
    assert merged(config, tmp_path / "out", threads=2, fused=True) == wanted
    elsewhere = config_of(small_models / "cut", method, **METHODS[method]) | {"out_dtype": "bfloat16"}
    assert merged(elsewhere, tmp_path / "out", threads=2, fused=False, stop_at=4) == wanted


def least_memory(config: dict[str, Any], out: Path) -> int:
    """What the refusal of too little memory says is enough; a hundredth more, since the process breathes."""
    try:
        merge_config(config, out, settings=Settings(threads=1, memory=1))
    except RecipeError as error:
        named = re.search(r"Give --memory ([\d,]+)MB or more", str(error))
        assert named, error
        return int(float(named[1].replace(",", "")) * 1.01e6)
    raise AssertionError("a merge in one byte")


@pytest.mark.parametrize("method", REORDERED)
def test_order_of_the_models(method, small_models, tmp_path):
    """Symmetric methods forget in which order the models stand, but for the last bit of a sum."""
    there, back = (config_of(small_models, method, **(METHODS[method] | {"models": order}))
                   for order in (("a", "b", "c"), ("c", "a", "b")))
    merge_config(there, tmp_path / "there")
    merge_config(back, tmp_path / "back")
    one, other = tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back")
    base = tensors_of(small_models / "base")
    assert one.keys() == other.keys()
    differing = 0
    for name in one:
        close = torch.isclose(one[name], other[name], rtol=2**-21, atol=2**-21 * float(base[name].abs().max()))
        differing += int((~close).sum())
    # Where an order decides, entries that are equal but for the last bit may trade places: an election, a cut of variances.
    allowed = {"sce": 20, "ties": 2, "ties_global": 2, "dare_ties": 2, "della": 2}.get(method, 0)
    assert differing <= allowed


def test_seed_draws_anew(small_models, tmp_path):
    config = config_of(small_models, "dare_ties", per_model={"density": 0.4})
    results = []
    for number, seed in enumerate((0, 0, 1)):
        merge_config(config, tmp_path / str(number), options=Options(seed))
        results.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert results[0] == results[1] != results[2]


# --- inputs that are damaged ---


def refused(jobs: Jobs, folder: Path, config: dict[str, Any], *flags: str, **harm: Any) -> str:
    """The command's one message: exit code 2, no traceback, nothing left over."""
    before = sorted(p.name for p in folder.iterdir())
    ended = jobs.run("merge", write_config(folder, config), "out", "-q", *flags, folder=str(folder), **harm)
    assert ended.code == 2 and ended.clean, ended
    assert sorted(p.name for p in folder.iterdir()) == sorted({*before, "config.yaml"})
    return ended.text


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def header_size(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_shard(share, small, jobs):
    shard = shards(small / "b")[0]
    os.truncate(shard, int(shard.stat().st_size * share))
    assert str(shard) in refused(jobs, small, config_of(small, "ties", **TIES))


def test_shard_cut_while_it_is_read(small, monkeypatch):
    """The header was sound, and then the end of the file went away."""
    shard = shards(small / "b")[0]
    prepared = stream.stream

    def cut(*arguments: Any, **more: Any) -> Any:
        os.truncate(shard, shard.stat().st_size - 100)
        return prepared(*arguments, **more)

    monkeypatch.setattr(merging, "stream", cut)
    with pytest.raises(CorruptedError, match=re.escape(str(shard))):
        merge_config(config_of(small, "ties", **TIES), small / "out")
    assert not (small / "out").exists() and not (small / "out.partial").exists()


def test_flipped_bits_in_headers(small):
    """Any bit of a shard's header: a message of ours, or what was flipped says nothing (the metadata) or another dtype of
    the same size, which is a different model and nobody's fault."""
    config, random_ = config_of(small, "linear", base=None, per_model={}), random.Random("header bits")
    merge_config(config, small / "whole")
    wanted = tensors_of(small / "whole")
    shard = shards(small / "a")[0]
    sound, size, refusals = shard.read_bytes(), header_size(shards(small / "a")[0]), 0
    for _ in range(60):
        flip(shard, random_.randrange(size), random_.randrange(8))
        try:
            merge_config(config, small / "out")
            assert {n: t.tolist() for n, t in tensors_of(small / "out").items()} == {n: t.tolist() for n, t in wanted.items()}
            shutil.rmtree(small / "out")
        except AnabranchError as error:
            refusals += 1
            assert str(small / "a") in str(error) or "model" in str(error)
        assert not (small / "out").exists() and not (small / "out.partial").exists()
        shard.write_bytes(sound)
    assert refusals > 40


def test_flipped_bit_in_a_model_that_we_merged(small, jobs):
    """The folder's own manifest tells: whichever way the tensor is read, and from any place in it."""
    first = config_of(small, "linear", models=("a", "b"), base=None, per_model={})
    merge_config(first, small / "merged", options=Options(max_shard_size=300_000))
    config = config_of(small, "ties", models=("c",), **TIES)
    config["models"].append({"model": str(small / "merged"), "parameters": {"weight": 0.5, "density": 0.5}})
    merge_config(config, small / "sound")
    shutil.rmtree(small / "sound")
    for shard, at in zip(shards(small / "merged"), (-1, -2000, None), strict=False):
        place = header_size(shard) if at is None else shard.stat().st_size + at
        flip(shard, place, 3)
        text = refused(jobs, small, config)
        assert str(shard) in text and "manifest.json" in text and "tensor '" in text
        flip(shard, place, 3)
    merge_config(config, small / "sound")
    # A manifest of somebody else, or one that cannot be read, vouches for nothing.
    flip(shards(small / "merged")[0], -1)
    for text in ("{}", "not json", json.dumps({"name": "an app", "icons": []})):
        (small / "merged" / MANIFEST).write_text(text)
        merge_config(config, small / "unvouched")
        shutil.rmtree(small / "unvouched")


def test_flipped_bit_in_an_input_with_a_tokenizer_or_an_adapter_is_found_at_the_end(small, monkeypatch):
    """Tensors that are not read as they stand are held to the manifest too."""
    merge_config(config_of(small, "linear", models=("a", "b"), base=None, per_model={}), small / "merged")
    monkeypatch.setattr(stream._Job, "_begin_input_hashes", lambda self, stack: {})
    shard = shards(small / "merged")[0]
    flip(shard, shard.stat().st_size - 5)
    config = {"merge_method": "passthrough", "models": [{"model": str(small / "merged")}]}
    with pytest.raises(CorruptedError, match="other bytes than its merge wrote"):
        merge_config(config, small / "out")
    assert not (small / "out").exists() and not (small / "out.partial").exists()


BAD = "model.layers.1.mlp.up_proj.weight"


def spoil(folder: Path, value: float) -> None:
    tensors = tensors_of(folder)
    tensors[BAD][3, 5] = value
    shutil.rmtree(folder)
    write_checkpoint(folder, tensors, CONFIG | {"num_hidden_layers": 2, "hidden_size": 96})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_not_a_number_never_disappears(method, value, small):
    """Whatever a method ranks, trims or outvotes: tensor and model are named, with fused kernels and without."""
    spoil(small / "a", value)
    config = config_of(small, method, **METHODS[method])
    for fused in (False, True):
        with pytest.raises(CorruptedError) as caught:
            merge_config(config, small / "out", settings=Settings(fused=fused))
        text = str(caught.value)
        assert BAD in text and re.search(re.escape(f"{small / 'a'}: ") + "(1 NaN and 0|0 NaN and 1) infinite", text)
        assert not (small / "out").exists() and not (small / "out.partial").exists()
    results = []
    for fused in (False, True):  # where it is allowed, all else is as it should be, the same in both ways
        try:
            merge_config(config, small / "out", settings=Settings(fused=fused, allow_nonfinite=True))
            got = tensors_of(small / "out")
            assert not bool(got[BAD].isfinite().all())
            assert all(bool(t.isfinite().all()) for n, t in got.items() if n != BAD) or method == "ties_global"
            results.append(files_of(small / "out"))
            shutil.rmtree(small / "out")
        except CorruptedError as error:
            assert method in ("sce", "arcee_fusion", "tsv_m", "iso_c") and "cannot go on with these" in str(error)
            results.append({})
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_not_a_number_on_the_command_line(method, small, jobs):
    spoil(small / "a", float("nan"))
    config = config_of(small, method, **METHODS[method])
    text = refused(jobs, small, config)
    assert BAD in text and str(small / "a") in text and "--allow-nonfinite" in text
    ended = jobs.run("merge", small / "config.yaml", "out", "-q", "--allow-nonfinite", folder=str(small))
    assert ended.code == 0, ended.text
    assert verify(small / "out") == []


def test_missing_shard(small, jobs):
    shard = shards(small / "c")[2]
    shard.unlink()
    assert shard.name in refused(jobs, small, config_of(small, "ties", **TIES))


@pytest.mark.parametrize("harm", ["another shard", "a file that is not there", "a path", "a stranger", "one too few"])
def test_wrong_index(harm, small, jobs):
    index = small / "c/model.safetensors.index.json"
    said = json.loads(index.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    if harm == "another shard":
        said["weight_map"][name] = next(s.name for s in shards(small / "c") if s.name != said["weight_map"][name])
    elif harm == "a file that is not there":
        said["weight_map"][name] = "model-00009-of-00009.safetensors"
    elif harm == "a path":
        said["weight_map"][name] = "../a/" + shards(small / "a")[0].name
    elif harm == "a stranger":
        said["weight_map"]["model.layers.9.mlp.up_proj.weight"] = said["weight_map"][name]
    else:
        del said["weight_map"][name]
    index.write_text(json.dumps(said))
    text = refused(jobs, small, config_of(small, "ties", **TIES))
    assert "index" in text and str(small / "c") in text


def test_index_that_is_no_json(small, jobs):
    index = small / "c/model.safetensors.index.json"
    index.write_text(index.read_text()[:-20])
    assert str(index) in refused(jobs, small, config_of(small, "ties", **TIES))


def test_unreadable_input(small, jobs):
    shard = shards(small / "b")[0]
    shard.chmod(0)
    assert str(shard) in refused(jobs, small, config_of(small, "ties", **TIES), powerless=True)


# --- outputs that cannot be ---


def test_no_permission_to_write(small, jobs):
    (small / "locked").mkdir()
    config = write_config(small, config_of(small, "ties", **TIES))
    (small / "locked").chmod(0o500)
    ended = jobs.run("merge", config, "locked/out", "-q", folder=str(small), powerless=True)
    assert ended.code == 2 and ended.clean, ended
    assert "cannot write" in ended.text and "locked/out" in ended.text
    assert not list((small / "locked").iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "manifest.json", ".hidden"])
def test_out_holds_other_things(name, small, jobs):
    (small / "out").mkdir()
    (small / "out" / name).write_text("dear")
    text = refused(jobs, small, config_of(small, "ties", **TIES))
    assert "already there" in text and "nothing was changed" in text
    assert files_of(small / "out") == {name: b"dear"}


@pytest.mark.parametrize("kind", ["file", "dangling link", "link to a folder"])
def test_out_is_no_folder(kind, small, jobs):
    if kind == "file":
        (small / "out").write_text("dear")
    elif kind == "dangling link":
        (small / "out").symlink_to(small / "nowhere")
    else:
        (small / "full").mkdir()
        (small / "full/notes.txt").write_text("dear")
        (small / "out").symlink_to(small / "full")
    refused(jobs, small, config_of(small, "ties", **TIES))
    if kind == "file":
        assert (small / "out").read_text() == "dear"


def test_out_is_one_of_the_inputs(small, jobs):
    before = files_of(small / "a")
    config = config_of(small, "ties", **TIES)
    ended = jobs.run("merge", write_config(small, config), "a", "-q", folder=str(small))
    assert ended.code == 2 and ended.clean, ended
    assert files_of(small / "a") == before and not (small / "a.partial").exists()


def test_full_disk(small, jobs):
    """A file system of 1.3 MB: refused before the start; filled by another while the merge runs: a message, what is
    written stays and is used, and nothing looks whole."""
    disk = small / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "none", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        config = write_config(small, config_of(small, "ties", **TIES))
        (disk / "ballast").write_bytes(bytes(800_000))
        ended = jobs.run("merge", config, "disk/out", "-q", folder=str(small))
        assert ended.code == 2 and ended.clean and "too little space" in ended.text, ended
        assert [p.name for p in disk.iterdir()] == ["ballast"]
        (disk / "ballast").unlink()
        # Files of the full size that hold no bytes yet fool nobody: another takes the space after the check.
        ended = jobs.run("merge", config, "disk/out", "-q", folder=str(small), ballast=str(disk / "ballast"))
        assert ended.code == 2 and ended.clean and "the disk is full" in ended.text, ended
        assert not (disk / "out").exists()
        (disk / "ballast").unlink()
        assert jobs.run("merge", config, "disk/out", "-q", folder=str(small)).code == 0
        assert verify(disk / "out") == [] and [p.name for p in disk.iterdir()] == ["out"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_files_that_may_not_grow(small, jobs):
    config = write_config(small, config_of(small, "ties", **TIES))
    ended = jobs.run("merge", config, "out", "-q", folder=str(small), largest_file=200_000)
    assert ended.code == 2 and ended.clean and "cannot write the merged model" in ended.text, ended
    assert not (small / "out").exists()
    assert jobs.run("merge", config, "out", "-q", folder=str(small)).code == 0
    assert not (small / "out.partial").exists() and verify_files(small / "out") == []


# --- at the same time ---


def test_workers_that_open_one_file_at_once(small, monkeypatch):
    """Each reads its own tensor right: none is left with the number of a file that another has closed."""
    opened = Checkpoint.open(small / "a")
    wanted, read = tensors_of(small / "a"), os.preadv

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            made = function(*arguments, **more)
            time.sleep(0.03)
            return made
        return call

    monkeypatch.setattr(checkpoint, "open", slowly(open), raising=False)
    monkeypatch.setattr(os, "preadv", lambda *arguments: (time.sleep(0.1), read(*arguments))[1])
    found: dict[str, bool] = {}

    def work(name: str) -> None:
        into = np.empty(wanted[name].shape, np.float32)
        opened.read_bytes(name, 0, into)
        found[name] = bool((into == wanted[name].numpy()).all())

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(wanted, True)


def test_two_at_once(large, tmp_path, jobs):
    """One does it, the other says that it is being done; the result is whole and nothing else is there."""
    config = write_config(tmp_path, config_of(large, "ties", per_model={"density": 0.4}))
    both = [jobs.begin("merge", config, "out", "-q", folder=str(tmp_path)) for _ in range(2)]
    ended = [jobs.end(one) for one in both]
    assert sorted(e.code for e in ended) == [0, 2], ended
    text = next(e.text for e in ended if e.code)
    assert "another merge" in text and all(e.clean for e in ended)
    assert verify_files(tmp_path / "out") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "out"]
    assert jobs.run("merge", config, "out", "-q", folder=str(tmp_path)).code == 0


def test_the_other_one_is_done_between_our_look_and_our_lock(small, monkeypatch):
    """The narrow case: the folder was free when we looked, and is whole when we begin."""
    config = config_of(small, "ties", **TIES)
    look = merging.already_there

    def slow(*arguments: Any) -> Any:
        found = look(*arguments)
        monkeypatch.setattr(merging, "already_there", look)
        merge_config(config, small / "out")
        return found

    monkeypatch.setattr(merging, "already_there", slow)
    with pytest.raises(OutputError, match="another merge has just finished"):
        merge_config(config, small / "out")
    assert verify_files(small / "out") == [] and not (small / "out.partial").exists()
