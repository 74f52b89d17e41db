"""Calibration size and gradient map on a run: against gradients taken row by row, and models whose place is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from anabranch.artifacts import Conflict, Gradients, Plan
from anabranch.diagnose.feed_gradients import calibration_passes, map_passes, measure_calibration, measure_map
from anabranch.diagnose.gradient_map import project_products, project_rows
from anabranch.diagnose.subject import NotApplicable, Settings, Subject, live_model
from anabranch.errors import ProvenanceError
from anabranch.gradients import Sketch, calibration_halves, half_gradient, load_halves
from anabranch.model import batches, load_model, response_losses, select_trainable
from anabranch.recipe import load_recipe
from anabranch.rows import generator, load_unit
from anabranch.run import Run, open_run, run_stages
from conftest import write_recipe

SETTINGS = Settings(sizes=(4, 9, 12, 16, 1000), batch_rows=8)
STEP = 0.5


def full_gradient(run: Run, unit_name: str) -> dict[str, np.ndarray]:
    """The unit's mean gradient as the gradients stage takes it, parameter by parameter."""
    model = load_model(run.base)
    parameters = select_trainable(model, run.recipe.model)
    sketch = Sketch(parameters, run.recipe.gradients.model_copy(update={"sketch": "full"}), 0)
    unit = run.mixture.unit(unit_name)
    rows = load_unit(run.folder / "mixture" / unit.file, "train")
    halves = calibration_halves(rows, unit_name, run.recipe.gradients.calibration_samples, run.recipe.seed)
    found = [half_gradient(model, rows, half, parameters, sketch, 4096, select=True) for half in halves]
    flat = sum(g * tokens for g, tokens in found) / sum(tokens for _, tokens in found)
    cuts = np.cumsum([p.numel() for p in parameters.values()])[:-1]
    return {n: piece.reshape(p.shape) for (n, p), piece in zip(parameters.items(), np.split(flat, cuts), strict=True)}


def stepped(run: Run, gradient: dict[str, np.ndarray], out: Path) -> Path:
    """A model folder: the base after one step of gradient descent."""
    model = load_model(run.base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= STEP * torch.from_numpy(gradient[name])
    model.save_pretrained(out)
    return out


def subject_of(run: Run, folders: dict[str, Path]) -> Subject:
    live = live_model({"base": run.base, **folders}, trainable=lambda m: list(select_trainable(m, run.recipe.model)))
    branches = [name for name in folders if name.startswith("branch")]
    return Subject(live, ["base", *folders], branches, [1 / len(branches)] * len(branches), {}, {}, run,
                   Plan.load(run.folder / "plan.json"))


@pytest.fixture(scope="module", params=[("fold", "cosine"), ("stride", "corrected"), ("full", "gram")], ids="-".join)
def subject(request, tmp_path_factory, tiny_base) -> Subject:
    """branch-k took one step along the gradient of unit k alone; `merged` along the sum of both."""
    sketch, matrix = request.param
    folder = tmp_path_factory.mktemp("mapped")
    recipe = load_recipe(write_recipe(folder, tiny_base), {"gradients.sketch": sketch, "split.matrix": matrix})
    run = open_run(recipe, tell=lambda _: None)
    run_stages(run, until="split")
    first, second = (full_gradient(run, u.name) for u in run.mixture.units[:2])
    both = {n: first[n] + second[n] for n in first}
    return subject_of(run, {name: stepped(run, g, folder / name)
                            for name, g in (("branch-0", first), ("branch-1", second), ("merged", both))})


def left(run: Run) -> dict[str, np.ndarray]:
    return load_file(run.folder / "conflict" / "conflict.safetensors")


def test_a_step_along_a_unit_s_gradient_lies_where_the_unit_does(subject):
    found, tensors = measure_map(subject, SETTINGS), left(subject.run)
    places = {p.name: np.array(p.pca) for p in found.points}
    scores, gram = tensors["scores"][:, :2], tensors["gram"]
    length, matrix = np.sqrt(np.diag(gram)), found.settings["matrix"]
    for k in range(2):
        if matrix == "cosine":
            wanted = scores[k]
        elif matrix == "gram":
            wanted = project_products(gram, scores, gram[[k]] / length[k] * np.sqrt(np.mean(length**2)))[0]
        else:
            other = np.where(tensors["half_products"] > 0, np.sqrt(np.abs(tensors["half_products"])), length)
            wanted = project_rows(tensors["corrected"], scores, np.clip(gram[[k]] / length[k] / other, -1, 1))[0]
        np.testing.assert_allclose(places[f"branch-{k}"], wanted, atol=2e-3 * np.abs(scores).max())
    np.testing.assert_allclose([places[p.name] for p in found.points if p.role == "unit"], scores)
    assert [p.role for p in found.points] == ["unit"] * 5 + ["branch"] * 2 + ["merged"]
    assert found.cost is None and map_passes(subject, SETTINGS) == 0 and all(p.tsne is not None for p in found.points)


def test_the_map_tells_the_same_twice(subject):
    assert measure_map(subject, SETTINGS).hash == measure_map(subject, SETTINGS).hash


def test_cosines_of_the_merged_model_are_those_of_the_gradients_sum(subject):
    """Sketching is linear, so <g_0 + g_1, g_j> follows from the units' own inner products."""
    found, tensors = measure_map(subject, SETTINGS), left(subject.run)
    gram = tensors["gram"]
    total = np.sqrt(gram[0, 0] + gram[1, 1] + 2 * gram[0, 1])
    cosines = (gram[0] + gram[1]) / total / np.sqrt(np.diag(gram))
    if found.settings["matrix"] == "cosine":
        place = project_rows(tensors["cosine"], tensors["scores"][:, :2], cosines[None])[0]
        np.testing.assert_allclose(next(p.pca for p in found.points if p.role == "merged"), place, atol=2e-3)
        assert f"a mean cosine of {cosines.mean():+.3f}" in " ".join(found.said)
        assert f"a negative one with {(cosines < 0).sum()} of 5." in " ".join(found.said)
    assert found.verdict == "none" and found.explained == Conflict.load(
        subject.run.folder / "conflict" / "conflict.json").explained[:2]


def sketches(run: Run) -> np.ndarray:
    """Each unit's mean gradient as the run's sketch has it, of length 1, [T, m]."""
    record = Gradients.load(run.folder / "gradients" / "gradients.json")
    halves = [load_halves(run.folder / "gradients", r) for r in record.units]
    found = np.array([(r.tokens_a * a.astype(float) + r.tokens_b * b) / (r.tokens_a + r.tokens_b)
                      for r, (a, b) in zip(record.units, halves, strict=True)])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_branches_of_small_cosine_are_their_own_group_s_and_lie_by_the_mark(subject, monkeypatch):
    """Cosine 0.05 with the units of the own group, 0 with all others: what a trained branch looks like on real runs."""
    units = sketches(subject.run)
    group = np.array([u.group for u in subject.plan.units])
    draw = generator(0, "noise").normal(size=(2, units.shape[1]))
    noise = draw - draw @ np.linalg.pinv(units) @ units  # at right angles to every unit
    wanted = 0.05 * (group == np.arange(2)[:, None])
    vectors = wanted @ np.linalg.pinv(units).T
    length = np.sqrt(1 - (vectors**2).sum(1, keepdims=True))
    vectors = vectors + length * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    monkeypatch.setattr("anabranch.diagnose.feed_gradients._task_vectors", lambda *_: vectors.astype(np.float32))
    alone = replace(subject, labels=["base", "branch-0", "branch-1"])
    found = measure_map(alone, SETTINGS)
    said = " ".join(found.said)
    assert "2 of 2 branches have a larger mean cosine with their own group's units than with any other group's." in said
    places = {p.name: np.array(p.pca) for p in found.points}
    scores = np.array([p.pca for p in found.points if p.role == "unit"])
    spread = np.sqrt((scores**2).sum(1).mean())
    mark = np.array(found.no_direction)
    assert f"lies {np.linalg.norm(mark) / spread:.2f} times the units' spread from their centre" in said
    if found.settings["matrix"] == "cosine":
        assert "lie between +0.000 and +0.050" in said.replace("-0.000", "+0.000")
        for k in range(2):  # projecting a row shortens it
            assert np.linalg.norm(places[f"branch-{k}"] - mark) < 0.05 * np.sqrt((group == k).sum()) + 1e-4
    vectors[[0, 1]] = vectors[[1, 0]]
    assert "0 of 2 branches have a larger mean cosine" in " ".join(measure_map(alone, SETTINGS).said)


def test_units_alone_where_there_is_no_model(subject):
    bare = subject_of(subject.run, {"branch-0": subject.run.base})
    found = measure_map(replace(bare, labels=["base"], branches=[]), SETTINGS)
    assert {p.role for p in found.points} == {"unit"} and {p.tsne for p in found.points} == {None}
    still = measure_map(replace(bare, plan=None), SETTINGS)  # a branch that did not move has no direction
    assert still.silhouette is None and all(np.isfinite(p.pca).all() for p in still.points)


def test_the_map_refuses_another_sketch(subject):
    section = subject.run.recipe.gradients.model_copy(update={"size": 64, "stride": 3, "sketch": "stride"})
    run = replace(subject.run, recipe=subject.run.recipe.model_copy(update={"gradients": section}))
    with pytest.raises(ProvenanceError, match="--until conflict"):
        measure_map(replace(subject, run=run), SETTINGS)


def row_gradients(run: Run, unit_name: str) -> np.ndarray:
    """Summed response-token gradient of every training row in the order of the draw, float64 [rows, d]."""
    model = load_model(run.base)
    unit = run.mixture.unit(unit_name)
    rows = load_unit(run.folder / "mixture" / unit.file, "train")
    found = []
    for i in generator(run.recipe.seed, "calibration", unit_name).permutation(len(rows)):
        (batch,) = batches(rows, np.array([i]), 4096, torch.device("cpu"))
        losses, _ = response_losses(model, batch, select=False)
        pieces = torch.autograd.grad(losses.sum(), list(model.parameters()))
        found.append(np.concatenate([p.double().reshape(-1).numpy() for p in pieces]))
    return np.array(found)


def test_calibration_is_that_of_gradients_taken_row_by_row(subject):
    subject.live.put({"merged": 1.0})  # whatever was measured before
    before = {n: p.requires_grad for n, p in subject.live.parameters.items()}
    passes = subject.live.passes
    found = measure_calibration(subject, SETTINGS)
    assert subject.live.passes - passes == pytest.approx(calibration_passes(subject, SETTINGS)) == 3 * 5 * 16 / 8
    assert {n: p.requires_grad for n, p in subject.live.parameters.items()} == before
    assert all(p.grad is None for p in subject.live.parameters.values())
    assert [u.unit for u in found.units] == [u.name for u in subject.run.mixture.units]
    sketch, unit = found.settings["sketch"], found.units[2]
    each = row_gradients(subject.run, unit.unit)[:, :: subject.run.recipe.gradients.stride if sketch == "stride" else 1]
    loose = 4 / np.sqrt(512) if sketch == "fold" else 1e-4
    whole = each[:16].sum(0)
    for n, cosine, reliability in zip(unit.sizes, unit.cosines, unit.reliability, strict=True):
        part, a, b = each[:n].sum(0), each[:n:2].sum(0), each[1:n:2].sum(0)
        assert cosine == pytest.approx(part @ whole / np.linalg.norm(part) / np.linalg.norm(whole), abs=loose)
        r = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        if n % 2 == 0 and r > 0:
            assert reliability == pytest.approx(2 * r / (1 + r), abs=loose)
    assert unit.sizes == [4, 9, 12, 16] and unit.cosines[-1] == 1


def test_at_its_own_size_reliability_is_the_conflict_stage_s(subject):
    """calibration_samples is 12: the same rows, the same halves, the same sketch."""
    found = measure_calibration(subject, SETTINGS)
    conflict = Conflict.load(subject.run.folder / "conflict" / "conflict.json")
    ours = [u.reliability[u.sizes.index(12)] for u in found.units]
    np.testing.assert_allclose(ours, conflict.reliability, atol=1e-5)
    assert any("this run's calibration_samples (12)" in line for line in found.said)


def test_a_sketch_too_large_to_keep_gives_way_to_a_fold(subject, monkeypatch):
    monkeypatch.setattr("anabranch.diagnose.feed_gradients.KEPT_NUMBERS", 2 * 4 * 512)
    found = measure_calibration(subject, SETTINGS)
    assert (found.settings["sketch"], found.settings["size"]) == ("fold", 512)


def test_a_draw_of_the_units_where_there_are_many(subject, monkeypatch):
    monkeypatch.setattr("anabranch.diagnose.feed_gradients.MOST_UNITS", 2)
    drawn = {tuple(u.unit for u in measure_calibration(subject, replace(SETTINGS, seed=s)).units) for s in (0, 0, 1, 2, 3)}
    assert len(drawn) > 1 and all(len(names) == 2 for names in drawn)
    found = measure_calibration(subject, SETTINGS)
    assert found.said[0] == "2 of 5 units measured, drawn by seed 0."
    assert calibration_passes(subject, SETTINGS) == 3 * 2 * 16 / 8


def test_what_cannot_be_measured_is_said(subject):
    without = replace(subject, run=None)
    for measure in (measure_map, measure_calibration, calibration_passes):
        with pytest.raises(NotApplicable, match="run folder"):
            measure(without, SETTINGS)
    with pytest.raises(NotApplicable, match="no unit has training rows for 3 of the sizes 4, 9, 1000; the largest has"):
        measure_calibration(subject, Settings(sizes=(4, 9, 1000)))
