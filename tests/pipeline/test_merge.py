"""The streaming merge on real, tiny Hugging Face checkpoints: right numbers, whole folders, clear refusals."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from anabranch.artifacts import MergeManifest
from anabranch.engine import output
from anabranch.engine.checkpoint import INDEX, WEIGHTS, checkpoint_hash
from anabranch.engine.merging import merge_checkpoints, verify_files
from anabranch.engine.output import JOURNAL, MANIFEST
from anabranch.engine.plan import parse_size
from anabranch.engine.stream import Progress, Settings
from anabranch.errors import CorruptedError, ModelError, OutputError, RecipeError, ShapeMismatch

P3_BASE = Path(__file__).parents[2].parent / "shared" / "models" / "p3-base"
WEIGHTS_OF_3 = [0.5, 0.3, 0.2]
MADE_FROM = {"base": "b" * 64, "plan": "p" * 64}


def tiny(seed: int, tied: bool = True, vocabulary: int = 64) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=tied))


def nudged(model: PreTrainedModel, seed: int, size: float = 0.02) -> PreTrainedModel:
    """A branch: the same model, every parameter moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def family(tmp_path):
    """(base, three branches) in bfloat16, tied; base in several shards, the branches cut otherwise."""
    return make_family(tmp_path)


def make_family(folder: Path, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, list[Path]]:
    sizes = ["4KB", "6KB", "5GB", "2KB"]
    paths = [folder / name for name in ("base", "branch-0", "branch-1", "branch-2")]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        model = tiny(0, tied)
        (nudged(model, i) if i else model).to(dtype).save_pretrained(path, max_shard_size=size)
    return paths[0], paths[1:]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """The folder's weights with some tensors changed, added or (None) taken away, as one file."""
    tensors = {k: v for k, v in (tensors_of(folder) | change).items() if v is not None}
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge(base: Path, branches: list[Path], out: Path, weights: list[float] | None = None, **more) -> MergeManifest:
    weights = weights or WEIGHTS_OF_3[: len(branches)]
    return merge_checkpoints(more.pop("method", "token_weighted"), base, branches, weights, out,
                             **({"made_from": MADE_FROM} | more))


def oracle(base: Path, branches: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """The weighted sum in float64."""
    states = [tensors_of(branch) for branch in branches]
    return {name: sum(w * s[name].double() for w, s in zip(weights, states, strict=True)) for name in tensors_of(base)}


# --- right numbers ---


@pytest.mark.parametrize("tied", [True, False])
def test_result_loads_and_gives_the_logits_of_the_hand_made_average(tmp_path, tied):
    weights = [0.5, 0.25, 0.25]  # exact in binary: a tie is a tie in every precision
    base, branches = make_family(tmp_path, tied)
    merge(base, branches, tmp_path / "out", weights, max_shard_size="5KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) is (not tied)
    by_hand = AutoModelForCausalLM.from_pretrained(base)
    state = {name: tensor.bfloat16() for name, tensor in oracle(base, branches, weights).items()}
    missing, unexpected = by_hand.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.dtype == torch.bfloat16
    ids = torch.arange(20)[None]
    assert merged(ids).logits.equal(by_hand(ids).logits)


def share_rounded_twice(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Share of bfloat16 numbers further from the exact one than half a step (and float32's own error)."""
    beyond = 0
    for name, tensor in got.items():
        half_step = torch.exp2(exact[name].abs().clamp_min(1e-30).log2().floor() - 8)
        beyond += int(((tensor.double() - exact[name]).abs() > half_step * (1 + 2**-10) + 2e-8).sum())
    return beyond / sum(t.numel() for t in got.values())


def test_rounded_once(tmp_path):
    base, branches = make_family(tmp_path)
    merge(base, branches, tmp_path / "out")
    exact, states = oracle(base, branches, WEIGHTS_OF_3), [tensors_of(branch) for branch in branches]
    careless = {n: sum(w * s[n] for w, s in zip(WEIGHTS_OF_3, states, strict=True)) for n in exact}
    assert share_rounded_twice(careless, exact) > 0.05
    assert share_rounded_twice(tensors_of(tmp_path / "out"), exact) == 0


def test_output_dtype_and_config(tmp_path, family):
    base, branches = family
    manifest = merge(base, branches, tmp_path / "out", dtype="float32")
    got, wanted = tensors_of(tmp_path / "out"), oracle(base, branches, WEIGHTS_OF_3)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert all(torch.allclose(got[n].double(), wanted[n], rtol=1e-6, atol=1e-8) for n in got)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32" == manifest.dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert merge(base, branches, tmp_path / "same").dtype == "bfloat16"
    assert (tmp_path / "same/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_branches_in_another_dtype_than_the_base(tmp_path):
    """Master weights are fp32: they come back in the base's bfloat16, not rounded before."""
    base, _ = make_family(tmp_path / "half")
    _, branches = make_family(tmp_path / "full", dtype=torch.float32)
    merge(base, branches, tmp_path / "out")
    got, wanted = tensors_of(tmp_path / "out"), oracle(base, branches, WEIGHTS_OF_3)
    assert all(tensor.dtype == torch.bfloat16 for tensor in got.values())
    early = oracle(base, make_family(tmp_path / "early")[1], WEIGHTS_OF_3)
    assert share_rounded_twice({n: t.bfloat16() for n, t in early.items()}, wanted) > 0.05
    assert share_rounded_twice(got, wanted) == 0


def test_identical_branches_are_a_fixed_point(tmp_path, family):
    base, branches = family
    merge(base, [branches[0]] * 3, tmp_path / "out", [1 / 3, 1 / 3, 1 / 3])
    got, wanted = tensors_of(tmp_path / "out"), tensors_of(branches[0])
    assert got.keys() == wanted.keys() and all(got[n].equal(wanted[n]) for n in got)


def test_weight_zero_has_no_say(tmp_path, family):
    base, branches = family
    merge(base, branches, tmp_path / "three", [0.5, 0.0, 0.5])
    merge(base, [branches[0], branches[2]], tmp_path / "two", [0.5, 0.5])
    assert (tmp_path / "three" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_order_of_the_branches(tmp_path, family):
    base, branches = family
    merge(base, branches, tmp_path / "ab", dtype="float32")
    merge(base, branches[::-1], tmp_path / "ba", WEIGHTS_OF_3[::-1], dtype="float32")
    one, other = tensors_of(tmp_path / "ab"), tensors_of(tmp_path / "ba")
    assert all(torch.allclose(one[n], other[n], rtol=3e-7, atol=1e-8) for n in one)


def test_shards_of_the_inputs_and_of_the_result_change_no_number(tmp_path):
    base, branches = make_family(tmp_path / "cut")
    whole = [tmp_path / "whole" / path.name for path in (base, *branches)]
    for path, target in zip((base, *branches), whole, strict=True):
        shutil.copytree(path, target)
        rewrite(target, {})
    assert len(list(base.glob("*.safetensors"))) > 1
    merge(base, branches, tmp_path / "a")
    merge(whole[0], whole[1:], tmp_path / "b")
    merge(base, branches, tmp_path / "c", max_shard_size="3KB")
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    assert all(a[n].equal(b[n]) and a[n].equal(c[n]) for n in a)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_displacement(tmp_path, family):
    base, branches = family
    manifest = merge(base, branches, tmp_path / "out")
    start, states = tensors_of(base), [tensors_of(branch) for branch in branches]
    average = oracle(base, branches, WEIGHTS_OF_3)

    def distance(state):
        return sum(float((state[n].double() - start[n].double()).square().sum()) for n in start) ** 0.5

    assert manifest.displacement == pytest.approx(distance(average), rel=1e-6)
    assert manifest.branch_displacements == pytest.approx([distance(s) for s in states], rel=1e-9)
    assert manifest.displacement < min(manifest.branch_displacements)
    assert manifest.parameters == sum(t.numel() for t in start.values())
    pulled = merge(base, branches, tmp_path / "pulled", method="interpolate", parameters={"alpha": 0.25})
    assert pulled.displacement == pytest.approx(0.25 * manifest.displacement, rel=1e-6)
    assert pulled.arguments == {"alpha": 0.25} and pulled.method == "interpolate"


# --- the folder ---


def test_files_are_laid_out_as_safetensors_lays_them_out(tmp_path, family):
    """The header we write before the numbers is, to the byte, the one that the library writes after them."""
    base, branches = family
    merge(base, branches, tmp_path / "out")
    save_file(load_file(tmp_path / "out" / WEIGHTS), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_index_and_shard_sizes(tmp_path, family):
    base, branches = family
    merge(base, branches, tmp_path / "out", max_shard_size="4KB")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = tensors_of(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        inside = load_file(path)
        assert sum(t.numel() * 2 for t in inside.values()) <= 4000 or len(inside) == 1
        assert all(index["weight_map"][name] == path.name for name in inside)


def test_what_is_carried_along_and_what_is_not(tmp_path, family):
    base, branches = family
    keep = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}",
            "vocab.json": b"{}", "merges.txt": b"a b", "chat_template.jinja": b"{{ x }}", "added_tokens.json": b"{}",
            "preprocessor_config.json": b"{}", "processor_config.json": b"{}", "tokenizer.model": b"\0\1",
            "additional_chat_templates/tool.jinja": b"{{ y }}"}
    leave = {"README.md": b"card", "training_args.bin": b"\x80", "optimizer.pt": b"\x80", "pytorch_model.bin": b"\x80",
             "tokenizer.pkl": b"\x80", "trainer_state.json": b"{}", "custom.py": b"1"}
    for name, data in (keep | leave).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(data)
    manifest = merge(base, branches, tmp_path / "out")
    files = files_of(tmp_path / "out")
    assert {name: files[name] for name in keep} == keep
    assert files.keys() == keep.keys() | {WEIGHTS, MANIFEST, "config.json", "generation_config.json"}
    assert manifest.files.keys() == files.keys() - {MANIFEST, WEIGHTS}
    assert not (tmp_path / "out.partial").exists()


def test_manifest_is_in_the_folder_and_finds_changes(tmp_path, family):
    base, branches = family
    manifest = merge(base, branches, tmp_path / "out", max_shard_size="4KB")
    assert MergeManifest.load(tmp_path / "out" / MANIFEST) == manifest
    assert manifest.made_from == MADE_FROM and manifest.weights == WEIGHTS_OF_3
    assert verify_files(tmp_path / "out") == []
    victim = next((tmp_path / "out").glob("model-00002*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    (tmp_path / "out/config.json").unlink()
    (tmp_path / "out/more.safetensors").write_bytes(b"")
    problems = verify_files(tmp_path / "out")
    assert len(problems) == 3
    assert all(any(name in p for p in problems) for name in (victim.name, "config.json", "more.safetensors"))
    (tmp_path / "out" / MANIFEST).write_text("{}")
    assert len(verify_files(tmp_path / "out")) == 1


def test_done_is_done_and_another_merge_is_refused(tmp_path, family):
    base, branches = family
    first = merge(base, branches, tmp_path / "out")
    stamp = (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns
    assert merge(base, branches, tmp_path / "out") == first
    assert (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns == stamp
    for change in ({"weights": [0.2, 0.3, 0.5]}, {"made_from": {"base": "other"}}, {"dtype": "float16"},
                   {"method": "interpolate"}):
        with pytest.raises(OutputError, match="another or a damaged"):
            merge(base, branches, tmp_path / "out", **change)
    (tmp_path / "out" / WEIGHTS).unlink()
    with pytest.raises(OutputError, match="without weights"):
        merge(base, branches, tmp_path / "out")


def test_what_others_put_there_is_left_alone(tmp_path, family):
    base, branches = family
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diary.txt").write_text("dear")
        with pytest.raises(OutputError, match=r"[Cc]hoose another"):
            merge(base, branches, tmp_path / "out")
        assert (tmp_path / name / "diary.txt").read_text() == "dear"
        shutil.rmtree(tmp_path / name)
    (tmp_path / "out").mkdir()
    merge(base, branches, tmp_path / "out")  # an empty folder is free


def test_a_second_merge_into_the_same_folder_waits_its_turn(tmp_path, family):
    base, branches = family
    seen = []

    def while_running(now: Progress) -> None:
        if now.tensors == 2 and not seen:
            with pytest.raises(OutputError, match="another merge") as caught:
                merge(base, branches, tmp_path / "out")
            seen.append(caught.value)

    merge(base, branches, tmp_path / "out", progress=while_running)
    assert len(seen) == 1 and verify_files(tmp_path / "out") == []


def test_progress_counts_every_byte_and_tensor(tmp_path, family):
    base, branches = family
    calls = []
    merge(base, branches, tmp_path / "out", progress=calls.append)
    size = sum(t.numel() * 2 for t in tensors_of(base).values())
    assert [c.done for c in calls] == sorted(c.done for c in calls)
    assert calls[-1] == Progress(size, size, len(tensors_of(base)))


# --- kills ---

SCRIPT = """
import os, signal, sys
from pathlib import Path
from anabranch.engine.merging import merge_checkpoints
here, victim = Path(sys.argv[1]), int(sys.argv[2])
def progress(now):
    if now.tensors == victim:
        os.kill(os.getpid(), signal.SIGKILL)
if victim == -1:  # at the last moment: the result is whole, and not renamed
    os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
merge_checkpoints("token_weighted", here / "base", [here / f"branch-{k}" for k in range(3)], [0.5, 0.3, 0.2],
                  here / "out", max_shard_size="5KB", made_from={"base": "b" * 64, "plan": "p" * 64}, progress=progress)
"""


def in_a_process(folder: Path, victim: int) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(victim)],
                          capture_output=True, text=True, timeout=120)


def test_killed_merges_go_on_and_give_the_same_bytes(tmp_path, family):
    base, branches = family
    merge(base, branches, tmp_path / "uninterrupted", max_shard_size="5KB")
    wanted = files_of(tmp_path / "uninterrupted")
    assert sum(name.endswith(".safetensors") for name in wanted) == 3
    for victim in (15, -1):  # in the second shard; at the very end
        killed = in_a_process(tmp_path, victim)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial/.tokenizer.json.123.partial").write_text("left over")
    finished = in_a_process(tmp_path, 99)
    assert finished.returncode == 0, finished.stderr
    assert files_of(tmp_path / "out") == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "branch-0", "branch-1", "branch-2", "out",
                                                          "uninterrupted"]


def interrupted(family, out: Path, at: int) -> None:
    """A merge that stops after `at` tensors without a chance to tidy up."""
    def stop(now: Progress) -> None:
        if now.tensors == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(*family, out, max_shard_size="5KB", progress=stop)


def tensors_at_start(family, out: Path, weights: list[float] | None = None) -> int:
    """Tensors that a merge found done when it was run (again)."""
    calls = []
    merge(*family, out, weights, max_shard_size="5KB", progress=calls.append)
    return calls[0].tensors


def test_a_resumed_merge_does_only_what_is_left(tmp_path, family):
    """Stopped after 9 tensors; one of them is harmed on the disk and is the only one of them that is made again."""
    interrupted(family, tmp_path / "out", 9)
    partial = tmp_path / "out.partial"
    lines = (partial / JOURNAL).read_text().splitlines()
    assert len(lines) == 1 + 9
    name = json.loads(lines[4])["name"]
    for path in partial.glob("*.safetensors"):
        header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        if name in header:
            data = bytearray(path.read_bytes())
            data[8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]] ^= 1
            path.write_bytes(data)
    (partial / JOURNAL).write_text("\n".join(lines) + '\n{"name": "cut in the mid')
    assert tensors_at_start(family, tmp_path / "out") == 8
    merge(*family, tmp_path / "uninterrupted", max_shard_size="5KB")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "uninterrupted")


@pytest.mark.parametrize("harm", ["journal", "shards", "branch", "weights"])
def test_a_journal_that_does_not_fit_is_not_followed(tmp_path, family, harm):
    base, branches = family
    interrupted(family, tmp_path / "out", 9)
    partial = tmp_path / "out.partial"
    weights = [0.2, 0.3, 0.5] if harm == "weights" else WEIGHTS_OF_3
    if harm == "journal":
        (partial / JOURNAL).write_text("{")
    elif harm == "shards":
        for path in partial.glob("*.safetensors"):
            path.unlink()
    elif harm == "branch":
        rewrite(branches[1], {"model.norm.weight": torch.full((16,), 3.0, dtype=torch.bfloat16)})
    assert tensors_at_start(family, tmp_path / "out", weights) == 0
    merge(base, branches, tmp_path / "fresh", weights, max_shard_size="5KB")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


# --- refusals ---


def refused(error, base, branches, out, **more) -> str:
    with pytest.raises(error) as caught:
        merge(base, branches, out, **more)
    assert not out.exists() and not (out.with_name(out.name + ".partial")).exists()
    return str(caught.value)


def test_every_mismatch_in_one_message(tmp_path, family):
    base, branches = family
    rewrite(branches[0], {"model.embed_tokens.weight": torch.zeros(60, 16, dtype=torch.bfloat16),
                          "model.norm.weight": torch.zeros(16, dtype=torch.int32)})
    rewrite(branches[2], {"model.layers.0.mlp.up_proj.weight": None, "stranger": torch.zeros(3)})
    text = refused(ShapeMismatch, base, branches, tmp_path / "out")
    assert (f"tensor 'model.embed_tokens.weight': branch 0 ({branches[0]}) has shape (60, 16), "
            "the base has (64, 16)") in text
    assert "'model.norm.weight'" in text and "I32" in text
    assert "'model.layers.0.mlp.up_proj.weight'" in text and "'stranger'" in text and str(branches[2]) in text
    assert "does not truncate" in text and str(branches[1]) not in text


def test_another_architecture_is_cut_to_a_readable_message(tmp_path, family):
    base, branches = family
    rewrite(branches[0], {f"extra.{i}": torch.zeros(1) for i in range(500)})
    text = refused(ShapeMismatch, base, branches, tmp_path / "out")
    assert "460 more" in text and len(text.splitlines()) < 50


@pytest.mark.parametrize("who", ["base", "branch"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_traced(tmp_path, family, who, value):
    base, branches = family
    folder = base if who == "base" else branches[1]
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = tensors_of(folder)[name].clone()
    tensor[3, 4] = value
    rewrite(folder, {name: tensor})
    text = refused(CorruptedError, base, branches, tmp_path / "out")
    assert name in text and str(folder) in text
    assert all(str(f) not in text for f in (base, *branches) if f != folder)


def test_a_dtype_too_narrow_is_told_from_a_broken_input(tmp_path):
    base, branches = make_family(tmp_path, dtype=torch.float32)
    for folder in (base, *branches):
        rewrite(folder, {"model.norm.weight": torch.full((16,), 1e6)})
    text = refused(RecipeError, base, branches, tmp_path / "out", dtype="float16")
    assert "model.norm.weight" in text and "merge.dtype" in text


def test_damaged_and_missing_shards_are_named(tmp_path, family):
    base, branches = family
    shard = sorted(branches[0].glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    assert str(shard) in refused(CorruptedError, base, branches, tmp_path / "out")
    shard.unlink()
    assert shard.name in refused(CorruptedError, base, branches, tmp_path / "out")


def test_a_branch_without_weights(tmp_path, family):
    base, branches = family
    for path in branches[2].glob("*.safetensors*"):
        path.unlink()
    assert "without weights" in refused(ModelError, base, branches, tmp_path / "out")


@pytest.mark.parametrize("change, wanted", [
    ({"method": "tokenweighted"}, "token_weighted"),
    ({"parameters": {"alpha": 1.0}}, "alpha"),
    ({"method": "interpolate", "parameters": {"alpha": -1.0}}, "alpha"),
    ({"weights": [0.5, 0.5]}, "2 weights for 3 branches"),
    ({"weights": [0.5, 0.3, 0.3]}, "sum to 1.1"),
    ({"weights": [0.5, float("nan"), 0.5]}, "nan"),
    ({"dtype": "bf16"}, "bfloat16"),
    ({"max_shard_size": "big"}, "max_shard_size"),
])
def test_a_request_that_cannot_be(tmp_path, family, change, wanted):
    assert wanted in refused(RecipeError, *family, tmp_path / "out", **change)


def test_no_branches(tmp_path, family):
    assert "no branch" in refused(RecipeError, family[0], [], tmp_path / "out", weights=[])


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("300kb", 300_000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "0GB", "-1GB", "5XB", "IB", "five GB"])
def test_sizes_refused(text):
    with pytest.raises(RecipeError):
        parse_size(text)


# --- tied heads, buffers, dtypes ---


def test_a_tied_head_that_only_some_hold_is_dropped(tmp_path, family):
    base, branches = family
    merge(base, branches, tmp_path / "plain")
    for folder in (base, branches[1]):
        rewrite(folder, {"lm_head.weight": tensors_of(folder)["model.embed_tokens.weight"].clone()})
        merge(base, branches, tmp_path / f"out-{folder.name}")
        got, wanted = tensors_of(tmp_path / f"out-{folder.name}"), tensors_of(tmp_path / "plain")
        assert got.keys() == wanted.keys() and all(got[n].equal(wanted[n]) for n in got)


def test_a_head_that_differs_is_never_dropped(tmp_path, family):
    base, branches = family
    rewrite(branches[1], {"lm_head.weight": tensors_of(branches[1])["model.embed_tokens.weight"] + 1})
    text = refused(ShapeMismatch, base, branches, tmp_path / "out")
    assert "lm_head.weight" in text and "differs" in text and str(branches[1]) in text


def test_an_untied_head_that_is_missing_is_an_error(tmp_path):
    base, branches = make_family(tmp_path, tied=False)
    rewrite(branches[0], {"lm_head.weight": None})
    assert "lm_head.weight" in refused(ShapeMismatch, base, branches, tmp_path / "out")


def test_buffers_are_copied_if_equal(tmp_path, family):
    base, branches = family
    buffers = {"steps": torch.tensor(7), "mask": torch.tensor([True, False, True]), "scale": torch.tensor(2.0)}
    for folder in (base, *branches):
        rewrite(folder, buffers)
    manifest = merge(base, branches, tmp_path / "out", dtype="float32")
    got = tensors_of(tmp_path / "out")
    assert all(got[n].equal(buffers[n]) and got[n].dtype == buffers[n].dtype for n in buffers)
    assert manifest.parameters == sum(t.numel() for t in got.values() if t.is_floating_point())
    rewrite(branches[0], {"steps": torch.tensor(8)})
    assert "'steps'" in refused(ShapeMismatch, base, branches, tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_float32_cannot_stand_for(tmp_path, family, dtype):
    base, branches = family
    rewrite(base, {"model.norm.weight": torch.ones(16).to(dtype)})
    assert "model.norm.weight" in refused(ModelError, base, branches, tmp_path / "out")


def test_quantised_models_are_refused(tmp_path, family):
    base, branches = family
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert "dequantised" in refused(ModelError, base, branches, tmp_path / "out")


# --- disk ---


def test_too_little_space_is_said_before_the_start(tmp_path, family, monkeypatch):
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    text = refused(OutputError, *family, tmp_path / "out")
    size = sum(t.numel() * 2 for t in tensors_of(family[0]).values())
    needed = int(text.split("It needs ")[1].split(" bytes")[0].replace(",", ""))
    assert size < needed < size + 10_000 and "1,000 bytes are free" in text and "output" in text
    assert "stays in" not in text


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path, family, monkeypatch):
    base, branches = family
    write, room = output._pwrite, [12000]

    def full(file, data, at):
        room[0] -= len(data)
        if room[0] < 0:
            write(file, data[: len(data) // 2], at)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, at)

    def late(folder, step, done):  # the worker is at the next tensor before this one is noted
        time.sleep(0.1)
        finished(folder, step, done)

    finished = output.OutputFolder.finished
    monkeypatch.setattr(output.OutputFolder, "finished", late)
    monkeypatch.setattr(output, "_pwrite", full)
    with pytest.raises(OutputError) as caught:
        merge(base, branches, tmp_path / "out", max_shard_size="5KB", settings=Settings(threads=1))
    text = str(caught.value)
    assert "the disk is full" in text and "bytes are free" in text and str(tmp_path / "out.partial") in text
    assert not (tmp_path / "out").exists()
    room[0] = 10**9
    assert tensors_at_start(family, tmp_path / "out") > 1
    merge(base, branches, tmp_path / "fresh", max_shard_size="5KB")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_the_operating_systems_own_limit(tmp_path, family):
    """A real failing write: no file may grow past 6 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot write the merged model"):
            merge(*family, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


def test_a_real_full_disk(tmp_path, family, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "none", small],
                                      capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(OutputError, match="too little space"):
            merge(*family, small / "out")
        monkeypatch.setattr(output.OutputFolder, "_check_space", lambda *_: None)
        with pytest.raises(OutputError, match="the disk is full"):
            merge(*family, small / "out")
        assert not (small / "out").exists()
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path, family):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot write"):
        merge(*family, tmp_path / "locked" / "out")


def test_a_file_where_the_folder_should_stand(tmp_path, family):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        merge(*family, tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write"):
        merge(*family, tmp_path / "file" / "out")


# --- memory, and a real model ---


def test_memory_is_a_few_tensors_and_not_a_shard(tmp_path):
    """48 tensors of 1 MB in one shard, two branches: anonymous memory grows by a handful of them."""
    base, branches = tmp_path / "base", [tmp_path / "branch-0", tmp_path / "branch-1"]
    for folder in (base, *branches):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({f"t{i:02d}": torch.randn(512, 1024).bfloat16() for i in range(48)}, folder / WEIGHTS,
                  metadata={"format": "pt"})

    def anonymous(*_: int) -> None:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        seen.append(int(line.split()[1]) * 1024)

    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    seen: list[int] = []
    anonymous()
    merge(base, branches, tmp_path / "out", [0.5, 0.5], progress=anonymous)
    # Two workers hold a block of 2^18 numbers each, 3 inputs as stored and in float32, the method's own: 2 x 13 MB, and
    # what the allocator keeps. The shard alone is 48 MB, three of them are read.
    assert max(seen) - seen[0] < 40 * 2**20


@pytest.mark.skipif(not P3_BASE.exists(), reason="shared/models/p3-base is not beside the repository")
def test_p3_base(tmp_path):
    branches = [tmp_path / f"branch-{k}" for k in range(4)]
    for k, path in enumerate(branches):
        nudged(AutoModelForCausalLM.from_pretrained(P3_BASE), k, 1e-3).save_pretrained(path, max_shard_size="3MB")
    weights = [0.4, 0.3, 0.2, 0.1]
    manifest = merge(P3_BASE, branches, tmp_path / "out", weights, made_from={"base": checkpoint_hash(P3_BASE)})
    assert manifest.parameters == 2_362_304 and verify_files(tmp_path / "out") == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    by_hand = AutoModelForCausalLM.from_pretrained(P3_BASE)
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in branches]
    by_hand.load_state_dict({n: sum(w * m[n].double() for w, m in zip(weights, models, strict=True)).float()
                             for n in by_hand.state_dict()})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(P3_BASE).chat_template
    ids = tokenizer("Is this review positive or negative?", return_tensors="pt").input_ids
    torch.testing.assert_close(merged(ids).logits, by_hand(ids).logits, rtol=1e-5, atol=1e-4)
