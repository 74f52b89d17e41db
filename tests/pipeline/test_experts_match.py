"""Experts of one mixture put in the order of another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anabranch import cli_experts
from anabranch.engine.merging import merge_config
from anabranch.errors import AnabranchError, ModelError, ShapeMismatch
from anabranch.experts.build import build_experts
from anabranch.experts.match import assignment, match_experts
from tiny_experts import LAYERS, config_of, load, write_models

ORDERS = {0: [2, 0, 3, 1], 1: [1, 3, 2, 0]}
PERMUTED = (".experts.", ".mlp.gate.weight", "input_linear", "output_linear", "router.layer")
IDS = torch.tensor([[3, 40, 77, 121, 9, 60, 210]])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def permuted(folder: Path, into: Path, nudge: float = 0.0) -> Path:
    """A copy with expert e of layer l where ORDERS[l] says, written by hand; and its numbers moved a little."""
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "manifest.json"))
    tensors, found = tensors_of(folder), {}
    torch.manual_seed(9)
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        if ".experts." in name and name.endswith("_proj.weight"):
            head, _, rest = name.partition(".experts.")
            expert, _, rest = rest.partition(".")
            tensor = tensors[f"{head}.experts.{ORDERS[layer][int(expert)]}.{rest}"]
        elif "shared" not in name and any(part in name for part in PERMUTED):
            tensor = tensor[ORDERS[layer]]
        found[name] = (tensor + nudge * torch.randn_like(tensor)).contiguous()
    save_file(found, into / "model.safetensors", metadata={"format": "pt"})
    return into


KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "mistral": {"architecture": "deepseek"}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_copy_is_put_back_exactly(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    """Fused tensors, per-expert tensors, and GraniteMoe's names; a permutation changes no function."""
    base, experts = write_models(tmp_path / "dense", tiny_base, kind, 4, dtype=torch.bfloat16)
    build_experts(config_of(base, experts, **KINDS[kind]), tmp_path / "a")
    other = permuted(tmp_path / "a", tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(load(other)(input_ids=IDS).logits, load(tmp_path / "a")(input_ids=IDS).logits)
    manifest, report, _ = match_experts(str(tmp_path / "a"), str(other), tmp_path / "out")
    assert manifest is not None
    for layer, one in enumerate(report["layers"]):
        assert [ORDERS[layer][i] for i in one["order"]] == [0, 1, 2, 3]
        assert one["similarity_after"] == pytest.approx(1, abs=1e-6)
    wanted, found = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "out")
    assert wanted.keys() == found.keys() and all(wanted[n].equal(found[n]) for n in wanted)
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "a/config.json").read_bytes()
    load(tmp_path / "out", torch.bfloat16)


def test_matched_mixtures_merge_to_what_lies_between_them(tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path / "dense", tiny_base, "llama", 4)
    build_experts(config_of(base, experts), tmp_path / "a")
    other = permuted(tmp_path / "a", tmp_path / "b", nudge=0.002)
    match_experts(str(tmp_path / "a"), str(other), tmp_path / "matched")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "matched")(input_ids=IDS).logits, load(other)(input_ids=IDS).logits)
    config = tmp_path / "merge.yaml"
    for name in ("matched", "b"):
        config.write_text(json.dumps({"merge_method": "linear", "models": [
            {"model": str(tmp_path / folder), "parameters": {"weight": 0.5}} for folder in ("a", name)]}))
        merge_config(config, tmp_path / f"merged-{name}")
    with torch.no_grad():
        logits = {name: load(tmp_path / name)(input_ids=IDS).logits for name in ("a", "merged-matched", "merged-b")}
    near, far = (float((logits[name] - logits["a"]).abs().mean()) for name in ("merged-matched", "merged-b"))
    assert near < far / 5


def test_the_assignment_is_the_best_one() -> None:
    """Greedy choice would take 0.9 and be left with 0.1."""
    import numpy as np

    assert assignment(np.array([[0.8, 0.9], [0.1, 0.8]])) == [0, 1]


def test_what_cannot_be_matched(tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path / "dense", tiny_base, "llama", 4)
    build_experts(config_of(base, experts), tmp_path / "four")
    build_experts(config_of(base, experts[:2]), tmp_path / "two")
    build_experts(config_of(base, experts, architecture="qwen"), tmp_path / "qwen")
    grouped = permuted(tmp_path / "four", tmp_path / "grouped")
    config = json.loads((grouped / "config.json").read_text())
    (grouped / "config.json").write_text(json.dumps(config | {"n_group": 2}))
    cases: list[tuple[Path, type[AnabranchError], str]] = [
        (base, ModelError, "has no experts"), (tmp_path / "two", ShapeMismatch, "4 experts, and 2"),
        (tmp_path / "qwen", ShapeMismatch, "not in both"), (grouped, ModelError, "groups of experts"),
        (tmp_path / "nowhere", ModelError, "no such folder")]
    for other, kind, words in cases:
        with pytest.raises(kind, match=words):
            match_experts(str(tmp_path / "four"), str(other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewritten(folder: Path, into: Path, change: Any) -> Path:
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "manifest.json"))
    tensors = tensors_of(folder)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("name", ["mlp.e_score_correction_bias", "mlp.expert_bias", "mlp.gate.e_score_correction_bias",
                                  "mlp.router.bias"])
def test_what_is_added_to_scores_moves_with_its_expert(name: str, tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path / "dense", tiny_base, "llama", 4)
    build_experts(config_of(base, experts), tmp_path / "plain")
    at = [f"model.layers.{layer}.{name}" for layer in range(LAYERS)]
    first = rewritten(tmp_path / "plain", tmp_path / "a", lambda t: t.update({n: torch.arange(4.0) for n in at}))
    shuffled = permuted(tmp_path / "plain", tmp_path / "shuffled")
    other = rewritten(shuffled, tmp_path / "b", lambda t: t.update(
        {n: torch.arange(4.0)[ORDERS[layer]] for layer, n in enumerate(at)}))
    match_experts(str(first), str(other), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert all(found[n].equal(torch.arange(4.0)) for n in at)


def test_tensors_that_may_count_experts_are_not_left_behind(tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path / "dense", tiny_base, "llama", 4)
    build_experts(config_of(base, experts), tmp_path / "a")
    for number, (name, shape) in enumerate((("mlp.moe_statics.e_score_correction_bias", (1, 4)), ("mlp.scale_of_each", (4,)))):
        odd = rewritten(tmp_path / "a", tmp_path / f"odd{number}", lambda t, n=name, s=shape: t.update(
            {f"model.layers.0.{n}": torch.zeros(s)}))
        with pytest.raises(ModelError, match=r"is not known|were not found"):
            match_experts(str(odd), str(odd), tmp_path / "out")
    bare = rewritten(tmp_path / "a", tmp_path / "bare", lambda t: t.update(
        {"model.layers.0.mlp.expert_bias": t.pop("model.layers.0.mlp.gate.weight")[:, 0]}))
    with pytest.raises(ModelError, match="a router with a row for each"):
        match_experts(str(bare), str(bare), tmp_path / "out")
    harmless = rewritten(tmp_path / "a", tmp_path / "harmless", lambda t: t.update(
        {"model.layers.0.mlp.norm.weight": torch.zeros(16), "model.layers.0.self_attn.sinks": torch.zeros(4)}))
    assert match_experts(str(harmless), str(harmless), tmp_path / "out", dry_run=True)[2]


def test_experts_that_are_not_alike_or_not_finite(tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path / "dense", tiny_base, "qwen2", 3)
    build_experts(config_of(base, experts), tmp_path / "a")
    at = "model.layers.1.mlp.experts.2."
    lacking = rewritten(tmp_path / "a", tmp_path / "lacking", lambda t: t.pop(at + "up_proj.weight"))
    wide = rewritten(tmp_path / "a", tmp_path / "wide", lambda t: t.update(
        {at + "up_proj.weight": torch.zeros(30, 16), at + "gate_proj.weight": torch.zeros(30, 16)}))
    broken = rewritten(tmp_path / "a", tmp_path / "broken", lambda t: t[at + "up_proj.weight"].fill_(float("nan")))
    for folder, words in ((lacking, "not all the same tensors"), (wide, "not all the same tensors"), (broken, "NaN or inf")):
        with pytest.raises(ModelError, match=words):
            match_experts(str(folder), str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, tiny_base: Path) -> None:
    base, experts = write_models(tmp_path / "dense", tiny_base, "llama", 4)
    build_experts(config_of(base, experts), tmp_path / "a")
    other = permuted(tmp_path / "a", tmp_path / "b")
    arguments = ["match", str(tmp_path / "a"), str(other), str(tmp_path / "out")]
    run = CliRunner().invoke(cli_experts.app, [*arguments, "--dry-run"], catch_exceptions=False)
    assert "4 experts moved" in run.stdout and "writes:" in run.stdout and not (tmp_path / "out").exists()
    run = CliRunner().invoke(cli_experts.app, arguments, catch_exceptions=False)
    assert run.exit_code == 0 and "the same function" in run.stdout
    assert len(json.loads((tmp_path / "out/manifest.json").read_text())["report"]["layers"]) == LAYERS
