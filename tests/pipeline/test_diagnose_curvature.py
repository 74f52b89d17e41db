"""Curvature of a real causal language model: second derivatives through attention, passes, axes from a run's units."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.artifacts import Gradients
from anabranch.diagnose import feed_curvature
from anabranch.diagnose.artifacts import Curvature
from anabranch.diagnose.feed_curvature import curvature_passes, measure_curvature, representatives
from anabranch.diagnose.subject import NotApplicable, Settings, Subject, live_model, make_probe
from anabranch.gradients import load_halves
from anabranch.recipe import load_recipe
from anabranch.rows import Rows
from anabranch.run import Run, open_run, run_stages
from conftest import TASKS, task_rows, write_recipe

SMALL = Settings(steps=5, top=3, rows=12, batch_rows=4)


def branches_of(base: Path, folder: Path, size: float) -> dict[str, Path]:
    """The base and two models beside it, in random directions of about `size` per entry."""
    folders = {"base": base}
    for k in range(2):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        rng = np.random.default_rng(k)
        for parameter in model.parameters():
            parameter.data += torch.from_numpy(size * rng.normal(size=parameter.shape).astype(np.float32))
        folders[f"branch-{k}"] = folder / f"branch-{k}"
        model.save_pretrained(folders[f"branch-{k}"])
    return folders


def rows_of(base: Path) -> dict[str, Rows]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    units = {}
    for task in list(TASKS)[:4]:
        pairs = []
        for row in task_rows(task, 6):
            prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids
            pairs.append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))
        units[task] = Rows.of(pairs)
    return units


def subject_with(folders: dict[str, Path], base: Path, settings: Settings = SMALL, trainable: str = "",
                 run: Run | None = None) -> Subject:
    live = live_model(folders, trainable=lambda m: [n for n, _ in m.named_parameters() if trainable in n])
    branches = [label for label in folders if label.startswith("branch")]
    return Subject(live, list(folders), branches, [0.7, 0.3][: len(branches)],
                   {"mixture": make_probe("mixture", rows_of(base), settings)}, {}, run)


@pytest.fixture(scope="module")
def folders(tiny_base, tmp_path_factory) -> dict[str, Path]:
    return branches_of(tiny_base, tmp_path_factory.mktemp("branches"), 0.01)


@pytest.fixture()
def subject(folders, tiny_base) -> Subject:
    return subject_with(folders, tiny_base)


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory, tiny_base) -> Run:
    """A run as far as its conflict axes; gradients kept whole."""
    path = write_recipe(tmp_path_factory.mktemp("run"), tiny_base)
    recipe = yaml.safe_load(path.read_text())
    recipe["gradients"]["sketch"] = "full"
    path.write_text(yaml.safe_dump(recipe))
    run = open_run(load_recipe(path), tell=lambda _: None)
    run_stages(run, until="conflict")
    return run


def test_eigenvalues_against_the_full_hessian_of_some_parameters(folders, tiny_base):
    """160 parameters (the norms' weights): the Hessian by torch.func, through transformers' own logits."""
    subject = subject_with({"base": folders["base"]}, tiny_base, trainable="norm")
    live, batches = subject.live, subject.probes["mixture"].batches
    names, shapes = live.trainable, [live.parameters[n].shape for n in live.trainable]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64, attn_implementation="eager").eval()
    flat = torch.cat([dict(model.named_parameters())[n].detach().reshape(-1) for n in names])
    assert len(flat) == 160

    def loss(theta: torch.Tensor) -> torch.Tensor:
        changed = {n: v.view(s) for n, v, s in zip(names, theta.split([s.numel() for s in shapes]), shapes, strict=True)}
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            logits = torch.func.functional_call(model, changed, kwargs={
                "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}).logits
            told = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            total, tokens = total - told[batch.response[:, 1:]].sum(), tokens + int(batch.response[:, 1:].sum())
        return total / tokens

    full = torch.autograd.functional.hessian(loss, flat)
    values = np.linalg.eigvalsh(full.numpy())
    found = measure_curvature(subject, replace(SMALL, steps=40))
    np.testing.assert_allclose(found.eigenvalues, values[::-1][:3], rtol=2e-4)
    assert found.ritz[0] == pytest.approx(values[0], abs=1e-3 * values[-1])
    assert found.hvp_difference < 0.05 and found.verdict == "none"
    assert found.alignment is None and found.gain is None


def test_passes_are_predicted(subject):
    predicted = curvature_passes(subject, SMALL)
    before = subject.live.passes
    measure_curvature(subject, SMALL)
    assert subject.live.passes - before == predicted
    # 5 steps, 1 check and 2 branches at 9, 2 differences at 6, of 3 batches; 12 rows one by one for 3 models
    assert predicted == (8 * 9 + 2 * 6) * 3 + 3 * 12


def test_what_it_leaves(subject):
    told = []
    subject.tell = lambda *a: told.append(a)
    found = measure_curvature(subject, SMALL)
    assert Curvature.model_validate_json(found.model_dump_json()) == found
    assert (found.rows, found.steps, found.hvp, len(found.eigenvalues), len(found.ritz)) == ("mixture", 5, "autodiff", 3, 5)
    assert found.eigenvalues == sorted(found.ritz)[::-1][:3]
    assert found.settings["rows"] == 12 and found.settings["batches"] == 3
    assert any("0.7" not in s and "No run folder" in s for s in found.said)
    assert {t[0] for t in told} == {"Lanczos", "check", "predicted gain", "measured gain"}


def test_same_subject_same_figures_and_the_base_is_back(subject):
    first = measure_curvature(subject, SMALL)
    for name, parameter in subject.live.parameters.items():
        assert torch.equal(parameter.detach(), subject.live.read("base", name)), name
        assert parameter.grad is None
    assert measure_curvature(subject, SMALL).hash == first.hash
    assert measure_curvature(subject, replace(SMALL, seed=1)).hash != first.hash


def test_gain_is_predicted_where_branches_are_near_and_not_where_they_are_far(folders, tiny_base, tmp_path):
    """The measured gain is checked against losses of folders that were saved by hand."""
    near = measure_curvature(subject_with(folders, tiny_base), SMALL).gain
    assert near is not None and near.rows == "mixture"
    assert near.quadratic == pytest.approx(near.measured, rel=0.1)
    assert near.low <= near.measured <= near.high
    far = measure_curvature(subject_with(branches_of(tiny_base, tmp_path, 0.3), tiny_base), SMALL)
    assert far.gain is not None and abs(far.gain.quadratic / far.gain.measured - 1) > 0.5
    assert any("do not agree" in s for s in far.said)
    mean = {n: 0.7 * a + 0.3 * b for (n, a), b in zip(
        load_file(folders["branch-0"] / "model.safetensors").items(),
        load_file(folders["branch-1"] / "model.safetensors").values(), strict=True)}
    mixed = tmp_path / "mixed"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(mixed)
    save_file(mean, mixed / "model.safetensors", {"format": "pt"})
    by_hand = []
    for folder in (folders["branch-0"], folders["branch-1"], mixed):
        subject = subject_with({"base": folder}, tiny_base)
        by_hand.append(subject.live.mean_loss(subject.probes["mixture"]))
    assert near.measured == pytest.approx(0.7 * by_hand[0] + 0.3 * by_hand[1] - by_hand[2], rel=1e-3, abs=1e-6)


def test_a_step_that_is_too_long_is_told(subject, monkeypatch):
    monkeypatch.setattr(feed_curvature, "RELATIVE_STEP", 0.5)
    found = measure_curvature(subject, SMALL)
    assert found.hvp_difference > 0.05 and found.verdict == "bad"
    assert any("do not trust" in s for s in found.said)


def test_logits_a_piece_at_a_time_have_second_derivatives_too(subject, monkeypatch):
    assert subject.live.select
    whole = measure_curvature(subject, SMALL)
    monkeypatch.setattr("anabranch.model.LOGITS_AT_ONCE", 400 * 3)
    pieces = measure_curvature(subject, SMALL)
    np.testing.assert_allclose(pieces.eigenvalues, whole.eigenvalues, rtol=1e-3)


def test_frozen_parameters_are_left_alone(folders, tiny_base):
    subject = subject_with(folders, tiny_base, trainable="layers.1")
    found = measure_curvature(subject, SMALL)
    free = measure_curvature(subject_with(folders, tiny_base), SMALL)
    assert found.eigenvalues[0] < free.eigenvalues[0]  # a principal submatrix
    assert all(p.requires_grad for p in subject.live.parameters.values())


def test_axes_are_lifted_from_the_units_gradients(folders, measured_run, tiny_base):
    subject = subject_with({"base": folders["base"]}, tiny_base, run=measured_run)
    names = representatives(measured_run, 4)
    assert len(set(names)) == 4
    probes = feed_curvature._calibration(subject, SMALL)
    gradients = Gradients.load(measured_run.folder / "gradients" / "gradients.json")
    for name, probe in zip(names, probes, strict=True):
        record = next(r for r in gradients.units if r.unit == name)
        a, b = load_halves(measured_run.folder / "gradients", record)
        stage = (record.tokens_a * a + record.tokens_b * b) / (record.tokens_a + record.tokens_b)
        ours = torch.cat([g.reshape(-1) for g in subject.live.gradient(probe).values()]).numpy()
        np.testing.assert_allclose(ours, stage, rtol=1e-3, atol=1e-5 * np.abs(stage).max())
    predicted, before = curvature_passes(subject, SMALL), subject.live.passes
    found = measure_curvature(subject, SMALL)
    assert subject.live.passes - before == predicted
    alignment = found.alignment
    assert alignment is not None and alignment.units == names
    assert np.shape(alignment.cosines) == (3, 3) and len(alignment.angles) == 3
    assert alignment.largest == np.max(alignment.cosines) <= np.cos(np.deg2rad(alignment.angles[0])) + 1e-9
    assert any("largest cosine" in s for s in found.said)


def test_representatives_stand_at_the_ends_of_the_axes(measured_run):
    from safetensors.numpy import load_file as load_arrays

    from anabranch.artifacts import Conflict

    units = Conflict.load(measured_run.folder / "conflict" / "conflict.json").units
    scores = load_arrays(measured_run.folder / "conflict" / "conflict.safetensors")["scores"]
    names = representatives(measured_run, 4)
    assert names[:2] == [units[scores[:, 0].argmax()], units[scores[:, 0].argmin()]]
    left = [i for i, u in enumerate(units) if u not in names[:2]]
    assert names[2] == units[max(left, key=lambda i: scores[i, 1])]
    assert len(representatives(measured_run, 50)) == len(units)


def test_attention_without_a_second_derivative_is_named(subject, monkeypatch):
    """The fused kernel that PyTorch takes by itself; also why the plain one is asked for."""
    monkeypatch.setattr(feed_curvature, "sdpa_kernel", lambda _: nullcontext())
    with pytest.raises(NotApplicable, match="second derivative"):
        measure_curvature(subject, SMALL)


def test_a_base_that_is_not_finite_is_named(subject):
    weights = subject.live.weights["base"]
    name = subject.live.trainable[-1]
    broken = {n: weights.read(n).clone() for n in subject.live.parameters}
    broken[name].view(-1)[0] = float("nan")
    weights._loaded = broken
    with pytest.raises(NotApplicable, match="NaN"):
        measure_curvature(subject, SMALL)


def test_what_cannot_be_measured_is_said(subject, monkeypatch):
    monkeypatch.setattr("anabranch.diagnose.curvature.lanczos_bytes", lambda *_: 10**15)
    with pytest.raises(NotApplicable, match="1000000 GB"):
        curvature_passes(subject, SMALL)
    monkeypatch.undo()
    subject.probes.clear()
    with pytest.raises(NotApplicable, match="held-out"):
        measure_curvature(subject, SMALL)
