"""Activations, gradients and scores against references written by hand; for any module, and for language models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.diagnose.subject import NotApplicable, live_model
from anabranch.errors import MixtureError
from anabranch.mergeability import data
from anabranch.mergeability.calibration_rows import read_calibration
from anabranch.mergeability.data import data_metrics, language_gradients
from anabranch.mergeability.gradient_files import input_products, parameter_products, save_gradients
from anabranch.mergeability.observation import Gradients, Loss, activation_mean, gradients
from conftest import task_rows, write_rows

TASKS = ("copy", "reverse", "first")


# ---- any module ------------------------------------------------------------------------------------------------------


class Vision(nn.Module):
    """Pixels -> patches -> two blocks -> mean: a tower in miniature. One parameter has no part in anything."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + torch.tanh(block(tokens))
        return tokens.mean(1)


@pytest.fixture()
def vision():
    torch.manual_seed(1)
    encoder, head = Vision().eval(), nn.Linear(6, 4)
    return encoder, head, torch.randn(10, 3, 8, 8), torch.arange(10) % 4


def test_activation_mean_of_any_layer(vision):
    encoder, _, images, _ = vision
    tokens = encoder.patches(images).flatten(2).transpose(1, 2)
    wanted = torch.stack([block for block in encoder.blocks[0](tokens).double().mean(1)]).mean(0)
    for size in (1, 3, 10):
        found = activation_mean(encoder, encoder.blocks[0], images.split(size))
        assert np.allclose(found, wanted.detach(), atol=1e-7), size
    first = activation_mean(encoder, encoder.blocks[0], [images], pool=lambda output, _: output[:, 0])
    assert np.allclose(first, encoder.blocks[0](tokens)[:, 0].mean(0).detach(), atol=1e-6)


def test_a_layer_that_runs_twice_or_never_is_refused(vision):
    encoder, _, images, _ = vision
    twice = nn.Sequential(encoder.patches, nn.Tanh())
    with pytest.raises(NotApplicable, match="0 times"):
        activation_mean(twice, encoder.blocks[0], [images])
    with pytest.raises(NotApplicable, match="2 times"):
        activation_mean(encoder, encoder.patches, [images], run=lambda x: (encoder(x), encoder(x)))
    with pytest.raises(NotApplicable, match="no batch"):
        activation_mean(encoder, encoder.patches, [])


def test_gradients_are_those_of_the_mean_over_all_images_however_they_are_cut(vision):
    encoder, head, images, classes = vision
    x = images.clone().requires_grad_()
    wanted = torch.autograd.grad(cross_entropy(head(encoder(x)), classes), [x, *encoder.patches.parameters()])

    def loss(batch):
        pixels, labels = batch
        return Loss(cross_entropy(head(encoder(pixels)), labels, reduction="sum"), len(labels), pixels)

    for size in (8, 10, 1):  # the paper's own cut, 8 and 2, among them
        leaves = [part.clone().requires_grad_() for part in images.split(size)]
        batches = list(zip(leaves, classes.split(size), strict=True))
        gradients(encoder, loss, batches)  # nothing of an earlier call is added
        found = gradients(encoder, loss, batches)
        assert found.items == 10 and found.inputs is not None
        assert torch.allclose(torch.stack(found.inputs), wanted[0], atol=1e-7)
        assert torch.allclose(found.parameters["patches.weight"], wanted[1], atol=1e-6)
        assert torch.equal(found.parameters["idle"], torch.zeros(3))
        assert all(p.grad is None for p in encoder.parameters())
    with pytest.raises(NotApplicable, match="no item"):
        gradients(encoder, loss, [])


def test_inner_products_of_gradient_files_in_blocks(tmp_path, monkeypatch):
    torch.manual_seed(0)
    lengths = [(3, 5, 1), (4, 2), (7,)]
    many = [Gradients(1.0, 2, {"a": torch.randn(11, 3), "b": torch.randn(5)}, [torch.randn(n, 2) for n in rows])
            for rows in lengths]
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, one in zip(paths, many, strict=True):
        save_gradients(path, one)
    flat = [torch.cat([g.flatten() for g in one.parameters.values()]).double() for one in many]
    wide = torch.zeros(3, 3, 7, 2, dtype=torch.float64)  # model, row, token, width: shorter ones filled up with zeros
    for i, one in enumerate(many):
        for m, row in enumerate(one.inputs or []):
            wide[i, m, : len(row)] = row
    for block in (1 << 22, 12, 3):
        monkeypatch.setattr("anabranch.mergeability.gradient_files.BLOCK", block)
        assert np.allclose(parameter_products(paths), torch.stack(flat) @ torch.stack(flat).T, rtol=1e-12)
        assert np.allclose(input_products(paths), wide.flatten(1) @ wide.flatten(1).T, rtol=1e-12)


# ---- language models -------------------------------------------------------------------------------------------------


def make_model(base, folder, spread, dtype=torch.float32):
    """A step away from the base, in shards, as another dtype."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rng = torch.Generator().manual_seed(sum(folder.name.encode()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * spread)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("models")
    return {t: make_model(tiny_base, folder / t, 0.02, torch.bfloat16 if t == "first" else torch.float32) for t in TASKS}


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("rows")
    files = [f"{t}={write_rows(folder / f'{t}.jsonl', task_rows(t, 12))}" for t in TASKS]
    return read_calibration(files, TASKS, tiny_base, samples=4, seed=0)


def reference(folder, rows):
    """(loss, parameter gradients, input gradients by row, activation means by row), one row at a time, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens, inputs, activations = torch.zeros(()), 0, [], []
    model.model.layers[-1].register_forward_hook(
        lambda _m, _i, out: activations.append((out[0] if isinstance(out, tuple) else out)[0].double().mean(0).detach()))
    for i in range(len(rows)):
        ids, mask = rows.row(i)
        ids, keep = torch.from_numpy(ids).long(), torch.from_numpy(mask).bool()
        embedded = model.get_input_embeddings()(ids[None])
        embedded.retain_grad()
        logits = model(inputs_embeds=embedded).logits[0, :-1].float()
        total = total + cross_entropy(logits, torch.where(keep[1:], ids[1:], -100), reduction="sum", ignore_index=-100)
        tokens += int(keep[1:].sum())
        inputs.append(embedded)
    (total / tokens).backward()
    return (float(total.detach()) / tokens, {n: p.grad for n, p in model.named_parameters()}, [e.grad[0] for e in inputs],
            torch.stack(activations))


def test_gradients_of_the_real_loss_and_whatever_the_batches(models, rows, tiny_base):
    live = live_model({"base": tiny_base, **models}, trainable=lambda m: [n for n, _ in m.named_parameters()])
    live.put({"reverse": 1.0})
    loss, wanted, inputs, _ = reference(models["reverse"], rows["reverse"])
    for batch_tokens in (1, 100, 4096):
        found = language_gradients(live, rows["reverse"], batch_tokens)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.items == int(rows["reverse"].response_lengths.sum())
        assert found.parameters.keys() == wanted.keys() and "lm_head.weight" not in wanted  # tied: once
        for name, gradient in found.parameters.items():
            assert torch.allclose(gradient, wanted[name], atol=1e-6 + 1e-4 * float(wanted[name].abs().max())), name
        assert found.inputs is not None
        for got, want in zip(found.inputs, inputs, strict=True):
            assert got.shape == want.shape and torch.allclose(got, want, atol=1e-7, rtol=1e-3)


@pytest.fixture(scope="module")
def references(models, rows, tiny_base):
    """label -> task -> reference"""
    return {label: {t: reference(folder, rows[t]) for t in TASKS} for label, folder in {"base": tiny_base, **models}.items()}


@pytest.mark.parametrize("batch_tokens", [60, 4096])
def test_every_figure_of_a_pair(models, rows, tiny_base, tmp_path, references, batch_tokens):
    found = data_metrics(tiny_base, models, rows, tmp_path, batch_tokens=batch_tokens)
    assert list(found.pairs) == [("copy", "reverse"), ("copy", "first"), ("reverse", "first")] and not found.left_out
    for label, of in found.cross.items():
        for task, score in of.items():
            assert score == pytest.approx(np.exp(-references[label][task][0]), rel=1e-5)
    assert found.single == {t: found.cross[t][t] for t in TASKS} and found.base == {t: found.cross["base"][t] for t in TASKS}

    mean = {label: torch.cat([of[t][3] for t in TASKS]).mean(0) for label, of in references.items()}
    whole = {t: torch.cat([g.flatten() for g in references[t][t][1].values()]).double() for t in TASKS}
    width = max(len(g) for t in TASKS for g in references[t][t][2])
    wide = {t: torch.stack([nn.functional.pad(g, (0, 0, 0, width - len(g))) for g in references[t][t][2]]).double().flatten()
            for t in TASKS}
    for (one, other), got in found.pairs.items():
        for kind, a, b in (("activation", mean[one], mean[other]), ("encoder_gradient", whole[one], whole[other]),
                           ("input_gradient", wide[one], wide[other])):
            assert got[f"{kind}_cosine_similarity"] == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-3, abs=1e-5)
            assert got[f"{kind}_l2_distance"] == pytest.approx(float((a - b).norm()), rel=1e-3)
            assert got[f"{kind}_dot_product"] == pytest.approx(float(a @ b), rel=1e-3, abs=1e-6)
        shift = [mean[t] - mean["base"] for t in (one, other)]
        assert got["activation_shift_cosine_similarity"] == pytest.approx(
            float(torch.cosine_similarity(*shift, dim=0)), rel=1e-3)
        loss = {(m, t): references[m][t][0] for m in ("base", one, other) for t in (one, other)}
        assert got["cross_task_score1"] == pytest.approx(np.exp(loss["base", one] - loss[other, one]), rel=1e-4)
        assert got["cross_task_score2"] == pytest.approx(np.exp(loss["base", other] - loss[one, other]), rel=1e-4)
        gaps = [1 - np.exp(loss[t, t] - loss["base", t]) for t in (one, other)]
        assert [got["fine_tuning_gap1"], got["fine_tuning_gap2"]] == pytest.approx(gaps, rel=1e-3, abs=1e-6)
        before = [torch.cat([g.flatten() for g in references["base"][t][1].values()]).double() for t in (one, other)]
        assert got["base_gradient_cosine_similarity"] == pytest.approx(
            float(torch.cosine_similarity(*before, dim=0)), rel=1e-3, abs=1e-5)


def test_without_a_known_block_activations_are_left_out_and_the_rest_is_not(models, rows, tiny_base, tmp_path, monkeypatch):
    def none(model):
        raise NotApplicable("no block here")

    monkeypatch.setattr(data, "last_block", none)
    found = data_metrics(tiny_base, models, rows, tmp_path)
    assert found.left_out == {"activations": "no block here"}
    metrics = found.pairs["copy", "first"]
    assert not [m for m in metrics if m.startswith("activation")]
    assert {"encoder_gradient_l2_distance", "cross_task_score1"} <= metrics.keys()


# ---- calibration rows ------------------------------------------------------------------------------------------------


def test_rows_by_name_by_field_and_in_any_format(tiny_base, tmp_path):
    copied = task_rows("copy", 8)
    chats = [{"task": "reverse", "messages": [{"role": "user", "content": r["prompt"]},
                                              {"role": "assistant", "content": r["completion"]}]}
             for r in task_rows("reverse", 8)]
    one, two = write_rows(tmp_path / "a.jsonl", copied), write_rows(tmp_path / "b.jsonl", chats)
    told = []
    found = read_calibration([str(two), f"copy={one}"], ["copy", "reverse"], tiny_base, samples=3, seed=1, tell=told.append)
    assert list(found) == ["copy", "reverse"] and [len(r) for r in found.values()] == [3, 3] and not told
    again = read_calibration([f"copy={one}", str(two)], ["reverse", "copy"], tiny_base, samples=3, seed=1)
    for task, some in again.items():
        assert np.array_equal(some.input_ids, found[task].input_ids)
    other = read_calibration([f"copy={one}", str(two)], ["reverse", "copy"], tiny_base, samples=3, seed=2)
    assert not all(np.array_equal(some.input_ids, found[t].input_ids) for t, some in other.items())
    text = AutoTokenizer.from_pretrained(tiny_base).decode(found["copy"].row(0)[0])
    assert text.startswith("<|user|>copy") and "<eos>" in text
    read_calibration([f"copy={one}", str(two)], ["reverse", "copy"], tiny_base, samples=20, seed=2, tell=told.append)
    assert told == ["reverse: 8 calibration rows, of 20 asked for", "copy: 8 calibration rows, of 20 asked for"]


def test_rows_that_are_tokens_already_are_drawn_and_taken_as_they_are(tiny_base, tmp_path, rows):
    lines = [{"task": t, "input_ids": ids.tolist(), "response": mask.tolist()} for t in TASKS
             for ids, mask in map(rows[t].row, range(len(rows[t])))]
    file = write_rows(tmp_path / "tokens.jsonl", lines)
    found = read_calibration([str(file)], TASKS, tiny_base, samples=4, seed=0)
    for task in TASKS:
        assert np.array_equal(found[task].input_ids, rows[task].input_ids)
        assert np.array_equal(found[task].response, rows[task].response)
    assert [len(r) for r in read_calibration([str(file)], TASKS, tiny_base, samples=2, seed=0).values()] == [2, 2, 2]
    lines[3]["response"] = [0] * len(lines[3]["response"])
    with pytest.raises(MixtureError, match=r"tokens.jsonl:4: wanted"):
        read_calibration([str(write_rows(file, lines))], TASKS, tiny_base, samples=4, seed=0)


def test_tokens_of_a_thousand_digits_and_rows_without_end(tiny_base, tmp_path):
    for number in (10**21, 2**31, -1):
        row = {"task": "copy", "input_ids": [1, number], "response": [0, 1]}
        with pytest.raises(MixtureError, match=r"big.jsonl:1: wanted .* token numbers from 0 to 2,147,483,647"):
            read_calibration([str(write_rows(tmp_path / "big.jsonl", [row]))], ["copy"], tiny_base, samples=4, seed=0)
    deep, whole = "[" * 200_000 + "]" * 200_000, '{"prompt": "a", "completion": "b"}'
    tokens = '{"input_ids": [1, 2], "response": [0, 1]}'
    for name, text in (("a.jsonl", f'{{"prompt": {deep}}}'), ("b.jsonl", f'{whole}\n{{"prompt": {deep}}}'),
                       ("c.json", f"[{whole}, {deep}]"), ("d.jsonl", f'{tokens}\n{{"input_ids": {deep}}}')):
        (tmp_path / name).write_text(text)
        with pytest.raises(MixtureError, match=rf"{name}.*nested too deep"):
            read_calibration([f"copy={tmp_path / name}"], ["copy"], tiny_base, samples=4, seed=0)
