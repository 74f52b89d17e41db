"""Router rows against transformers' own hidden states; routing measured against counting by hand; calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from anabranch.errors import ModelError, RecipeError
from anabranch.experts import balance, build, routers
from anabranch.experts.build import Options, build_experts
from anabranch.experts.calibrate import _split, calibrate
from anabranch.experts.routers import degenerate
from anabranch.experts.settings import read_config
from anabranch.experts.texts import read_texts
from tiny_experts import HIDDEN, LAYERS, PROMPTS, config_of, load, write_models

Models = tuple[Path, list[Path]]
MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "mlp_input")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, list[Path]]:
    return write_models(tmp_path_factory.mktemp("models"), tiny_base, "llama", 4)


def rows_of(folder: Path) -> list[torch.Tensor]:
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    return [tensors[f"model.layers.{i}.mlp.gate.weight"] for i in range(LAYERS)]


def padded_left(texts: list[str], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    width = max(map(len, rows))
    pad = tokenizer.eos_token_id
    return (torch.tensor([[pad] * (width - len(r)) + r for r in rows]),
            torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]))


@contextmanager
def watched(model: Any) -> Iterator[list[torch.Tensor]]:
    """What each layer's feed-forward is given for one text: [T, H] by layer."""
    inputs: list[torch.Tensor] = []
    hooks = [layer.mlp.register_forward_hook(lambda _m, i, _o: inputs.append(i[0][0])) for layer in model.model.layers]
    yield inputs
    for hook in hooks:
        hook.remove()


def slow_h(base: Path, mode: str, texts: list[str], dtype: torch.dtype, literal: bool = False) -> list[torch.Tensor]:
    """h of every layer by transformers itself; prompts one by one where padding must not count."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), load(base, dtype)
    if mode == "cheap_embed":
        total = sum(model.model.embed_tokens.weight[i].float() for t in texts
                    for i in tokenizer(t, add_special_tokens=False)["input_ids"])
        return [total / total.norm()] * LAYERS
    if literal:
        ids, mask = padded_left(texts, tokenizer)
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
        return [(s.sum(1) / s.shape[1] if mode == "hidden_avg" else s[:, -1]).mean(0) for s in states]
    of_prompts, given = [], []
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with watched(model) as inputs:
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
        of_prompts.append([s[0].mean(0) if mode == "hidden_avg" else s[0, -1] for s in states])
        given.append(inputs)
    if mode == "mlp_input":
        return [torch.cat([one[layer] for one in given]).mean(0) for layer in range(LAYERS)]
    return [torch.stack([one[layer] for one in of_prompts]).mean(0) for layer in range(LAYERS)]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_router_rows_are_those_of_hidden_states(mode: str, models: Models, tmp_path: Path) -> None:
    """C75: unit norm; negative prompts subtracted; padding left out of averages (prompts have unequal lengths)."""
    base, experts = models
    config = config_of(base, experts, gate_mode=mode)
    config["experts"][1]["negative_prompts"] = ["first last", "two three four five"]
    build_experts(config, tmp_path / "out")
    sides = [slow_h(base, mode, list(p), torch.float32) for p in PROMPTS]
    minus = slow_h(base, mode, config["experts"][1]["negative_prompts"], torch.float32)
    for layer, rows in enumerate(rows_of(tmp_path / "out")):
        h = torch.stack([side[layer] - (minus[layer] if e == 1 else 0) for e, side in enumerate(sides)])
        h = h - h.mean(0) if mode == "mlp_input" else h
        torch.testing.assert_close(rows, h / h.norm(dim=1, keepdim=True), atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))


def test_a_prompt_begins_with_bos_once_and_is_padded_with_it(models: Models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS[1]]
    width = max(map(len, plain))
    assert len({len(row) for row in plain}) == 2
    for bos, pad in (("<pad>", tokenizer.pad_token_id), (None, tokenizer.eos_token_id)):
        tokenizer.bos_token = bos
        begin = [tokenizer.bos_token_id] if bos else []
        found = routers.tokenized(PROMPTS[1], tokenizer, "experts[1]")
        assert found.ids.tolist() == [[pad] * (width - len(row)) + begin + row for row in plain]
        assert found.mask.sum(1).tolist() == [len(begin + row) for row in plain]


@pytest.mark.parametrize("mode", ["hidden", "mlp_input"])
@torch.no_grad()
def test_the_gate_of_a_shared_expert_is_of_its_own_prompts(mode: str, models: Models, tmp_path: Path) -> None:
    """Centred, it is measured from the mean of the experts, to which it does not belong."""
    base, experts = models
    config = config_of(base, experts[:3], gate_mode=mode)
    config["shared_experts"] = [{"source_model": str(experts[3]), "positive_prompts": PROMPTS[3]}]
    build_experts(config, tmp_path / "out")
    tensors = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    sides = [slow_h(base, mode, list(p), torch.float32) for p in PROMPTS]
    for layer in range(LAYERS):
        h = torch.stack([side[layer] for side in sides])
        h = h - h[:3].mean(0) if mode == "mlp_input" else h
        wanted = h / h.norm(dim=1, keepdim=True)
        found = [tensors[f"model.layers.{layer}.mlp.{name}.weight"] for name in ("gate", "shared_expert_gate")]
        torch.testing.assert_close(torch.cat(found), wanted, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
@torch.no_grad()
def test_the_peers_dialect_counts_padding_and_computes_in_bfloat16(mode: str, models: Models,
                                                                  tmp_path: Path) -> None:
    base, experts = models
    config = config_of(base, experts, gate_mode=mode)
    build_experts(config, tmp_path / "native")
    build_experts(config | {"dialect": "mergekit"}, tmp_path / "literal")
    for layer, rows in enumerate(rows_of(tmp_path / "literal")):
        h = torch.stack([slow_h(base, mode, list(p), torch.bfloat16, literal=True)[layer] for p in PROMPTS])
        wanted = (h / h.norm(dim=1, keepdim=True)).float()
        torch.testing.assert_close(rows, wanted, atol=0.01, rtol=0.02)
        assert rows.equal(rows.bfloat16().float())
        if mode == "hidden_avg":
            assert not torch.allclose(rows, rows_of(tmp_path / "native")[layer], atol=0.02)


def test_random_modes_need_no_prompts(models: Models, tmp_path: Path) -> None:
    """FIX: the peer asks `uniform_random` for prompts that it does not use. C75: neither has unit norm."""
    base, experts = models
    for mode in ("random", "uniform_random"):
        config = config_of(base, experts, gate_mode=mode)
        for entry in config["experts"]:
            del entry["positive_prompts"]
        manifest = build_experts(config, tmp_path / mode)
        assert "router" not in manifest.report
    drawn, uniform = (torch.stack(rows_of(tmp_path / mode)) for mode in ("random", "uniform_random"))
    assert 0.8 < float(drawn.std()) < 1.2
    assert float(uniform.abs().max()) <= HIDDEN**-0.5 and float(uniform.std()) > 0.8 * HIDDEN**-0.5 / math.sqrt(3)


def test_rows_that_hardly_differ_are_told(models: Models, tmp_path: Path) -> None:
    assert degenerate({0: torch.eye(3, 8)}) == []
    assert degenerate({0: torch.tensor([[1.0, 0.0], [0.99, 0.1]]), 1: torch.eye(2)})
    base, experts = models
    config, said = config_of(base, experts[:3]), []
    config["experts"][1]["positive_prompts"] = [*PROMPTS[0]]
    config["experts"][1]["negative_prompts"] = []
    build_experts(config, tmp_path / "out", warn=said.append)
    assert any("nearly dependent" in text for text in said) and any("power of two" in text for text in said)


@torch.no_grad()
def test_the_report_counts_what_the_model_chooses(models: Models, tmp_path: Path) -> None:
    """Measured one layer at a time before anything is written; counted here in the written model, token by token."""
    base, experts = models
    report = build_experts(config_of(base, experts, dtype="bfloat16"), tmp_path / "out").report["router"]["before"]
    model, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(base)
    counts, own, tokens = [[0] * 4 for _ in range(LAYERS)], [[0] * 4 for _ in range(LAYERS)], [0] * 4
    for e, prompts in enumerate(PROMPTS):
        for text in prompts:
            ids = tokenizer(text)["input_ids"]
            tokens[e] += len(ids)
            with watched(model) as inputs:
                model(input_ids=torch.tensor([ids]))
            for layer, given in enumerate(inputs):
                for token in given:
                    scores = [float(row @ token) for row in model.model.layers[layer].mlp.gate.weight]
                    for chosen in sorted(range(4), key=lambda i: -scores[i])[:2]:
                        counts[layer][chosen] += 1
                        own[layer][e] += chosen == e
    assert report["tokens"] == sum(tokens) and report["experts"] == 4 and report["per_token"] == 2
    for layer, one in enumerate(report["layers"]):
        shares = [n / (2 * sum(tokens)) for n in counts[layer]]
        assert one["shares"] == pytest.approx(shares, abs=1e-4)
        assert one["entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(4), abs=1e-3)
        assert one["max_load"] == pytest.approx(4 * max(shares), abs=1e-3)
        assert one["own"] == pytest.approx(sum(own[layer][e] / tokens[e] for e in range(4)) / 4, abs=1e-3)


def test_rows_of_centred_prompts_are_no_false_alarm(models: Models, tmp_path: Path) -> None:
    """Centred, one row always follows from the others; what counts is how dependent the rest is."""
    centred = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 0.9, 0.0], [-0.5, -0.9, 0.0]])
    assert degenerate({0: centred}) and degenerate({0: centred}, centred=True) == []
    assert degenerate({0: torch.tensor([[1.0, 0.0], [-1.0, 0.0]])}, centred=True) == []
    flat = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.01, 0.0], [-1.0, -0.01, 0.0]])
    told = degenerate({0: flat}, centred=True)
    assert told and "mlp_input" not in told[0] and "mlp_input" in degenerate({0: flat})[0]
    base, experts = models
    said: list[str] = []
    build_experts(config_of(base, experts[:2], gate_mode="mlp_input"), tmp_path / "out", warn=said.append)
    assert said == []


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "mlp_input"])
def test_prompts_in_pieces_give_the_same_rows(mode: str, models: Models, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models
    build_experts(config_of(base, experts, gate_mode=mode), tmp_path / "whole")
    seen: list[int] = []
    real = routers.run_layers
    monkeypatch.setattr(routers, "AT_ONCE", 1)
    monkeypatch.setattr(routers, "run_layers", lambda *a, **k: (seen.extend(len(b.ids) for b in a[2]), real(*a, **k))[1])
    build_experts(config_of(base, experts, gate_mode=mode), tmp_path / "pieces")
    assert seen == [1] * sum(map(len, PROMPTS))
    for one, other in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "pieces"), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_routing_is_measured_in_groups_of_texts_that_fit(models: Models, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = models
    whole = build_experts(config_of(base, experts), tmp_path / "whole").report["router"]
    runs: list[int] = []
    real = build.run_layers
    monkeypatch.setattr(build, "STATES", 1)
    monkeypatch.setattr(build, "run_layers", lambda *a, **k: (runs.append(len(a[2])), real(*a, **k))[1])
    assert build_experts(config_of(base, experts), tmp_path / "groups").report["router"] == whole
    assert runs == [1] * sum(map(len, PROMPTS))


def test_texts_that_are_cut_are_told(models: Models, tmp_path: Path) -> None:
    base, experts = models
    (tmp_path / "long.txt").write_text("one two three " * 300 + "\nshort\n")
    config, said = config_of(base, experts, gate_mode="random"), []
    report = build_experts(config, tmp_path / "out", Options(prompts=tmp_path / "long.txt"), warn=said.append).report
    assert any("1 of 2 texts are longer than 512 tokens" in text for text in said)
    assert 512 < report["router"]["before"]["tokens"] < 530


def test_balance_at_its_ends() -> None:
    even, one = balance.Tally(4, 0), balance.Tally(4, 0)
    even.add(0, None, torch.arange(4).repeat(5)[:, None])
    one.add(0, None, torch.zeros(20, 1, dtype=torch.int64))
    assert even.report()["mean"] == {"entropy": 1.0, "max_load": 1.0}
    assert one.report()["mean"] == {"entropy": 0.0, "max_load": 4.0}
    assert balance.entropy(torch.tensor([1.0])) == 1.0


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{p} {i} {q}"}) + "\n" for i in range(6) for pair in PROMPTS for p in pair
                            for q in ("yes", "no")))
    return path


@pytest.mark.parametrize("chosen", [1, 2])
def test_calibration_trains_router_rows_alone(chosen: int, models: Models, texts: Path, tmp_path: Path) -> None:
    base, experts = models
    config = config_of(base, experts, experts_per_token=chosen)
    build_experts(config, tmp_path / "plain")
    options = Options(calibration=texts, steps=25, prompts=texts)
    report = build_experts(config, tmp_path / "out", options).report
    assert chosen == 1 or report["calibration"]["loss_after"] < report["calibration"]["loss_before"]
    assert set(report["router"]) == {"before", "after"} and report["router"]["after"] != report["router"]["before"]
    before, after = (load(tmp_path / name).state_dict() for name in ("plain", "out"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"model.layers.{i}.mlp.gate.weight" for i in range(LAYERS)}
    build_experts(config, tmp_path / "again", options, threads=1)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    ids = AutoTokenizer.from_pretrained(base)(PROMPTS[1][0], return_tensors="pt")["input_ids"]
    losses = [load(tmp_path / name)(input_ids=ids, labels=ids).loss.item() for name in ("plain", "out")]
    assert chosen == 1 or losses[1] < losses[0]  # with one expert, what is trained is not what is run
    kept = [AutoTokenizer.from_pretrained(base)(t)["input_ids"] for t in read_texts(texts, "--prompts")][7::8]
    nats = [sum(load(tmp_path / name)(input_ids=torch.tensor([t]), labels=torch.tensor([t])).loss.item() * (len(t) - 1)
                for t in kept) / sum(len(t) - 1 for t in kept) for name in ("plain", "out")]
    assert [report["calibration"][key] for key in ("loss_before", "loss_after")] == pytest.approx(nats, abs=2e-4)


@torch.no_grad()
def routing_of(model: Any, texts: list[list[int]]) -> dict[str, float]:
    tally = balance.Tally(4, 0)
    hooks = [layer.mlp.gate.register_forward_hook(lambda _m, _i, out, n=n: tally.add(n, None, out[2]))
             for n, layer in enumerate(model.model.layers)]
    for ids in texts:
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    mean: dict[str, float] = tally.report()["mean"]
    return mean


def test_calibration_spreads_tokens_if_asked(models: Models, texts: Path, tmp_path: Path) -> None:
    base, experts = models
    build_experts(config_of(base, experts, gate_mode="uniform_random", experts_per_token=1), tmp_path / "out")
    model, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(t)["input_ids"] for t in read_texts(texts, "--prompts")][:24]
    with torch.no_grad(), watched(model) as seen:
        model(input_ids=torch.tensor([ids[0]]))
        for layer, given in zip(model.model.layers, seen, strict=True):  # one expert draws all
            layer.mlp.gate.weight[0] = given.mean(0) * 0.3
    start = [layer.mlp.gate.weight.clone() for layer in model.model.layers]
    before, after = routing_of(model, ids), {}
    for balanced in (0.0, 10.0):
        with torch.no_grad():
            for layer, weight in zip(model.model.layers, start, strict=True):
                layer.mlp.gate.weight.copy_(weight)
        calibrate(model, ids, 30, balance=balanced)
        after[balanced] = routing_of(model, ids)
    assert after[10.0]["entropy"] > max(before["entropy"], after[0.0]["entropy"]) + 0.05
    assert after[10.0]["max_load"] < min(before["max_load"], after[0.0]["max_load"]) - 0.2
    assert model.model.layers[0].mlp.gate.top_k == 1


def test_what_is_measured_after_a_calibration_is_what_is_written(models: Models, texts: Path, tmp_path: Path) -> None:
    """Rows are trained in float32 and written in bfloat16: the loss told is that of the rounded ones."""
    base, experts = models
    build_experts(config_of(base, experts, dtype="bfloat16"), tmp_path / "out")
    model, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(t)["input_ids"] for t in read_texts(texts, "--prompts")]
    rows, told = calibrate(model, ids, 3, rounded=torch.bfloat16)
    assert all(row.equal(row.bfloat16().float()) for row in rows.values())
    assert all(model.model.layers[i].mlp.gate.weight.equal(row) for i, row in rows.items())
    report = build_experts(config_of(base, experts, dtype="bfloat16"), tmp_path / "trained",
                           Options(calibration=texts, steps=3)).report["calibration"]
    assert report["loss_after"] == told["loss_after"] and report["held_out"] and report["measured"] == 10
    assert all(t.equal(rows[i].bfloat16()) for i, t in enumerate(rows_of(tmp_path / "trained")))


def test_held_out_is_said_of_texts_that_were_held_out_alone(models: Models, tmp_path: Path) -> None:
    build_experts(config_of(*models), tmp_path / "out")
    model = load(tmp_path / "out")

    def held_out(texts: list[list[int]]) -> tuple[int, bool]:
        told = calibrate(model, texts, 1)[1]
        return told["measured"], told["held_out"]

    assert held_out([[i, i + 1, i + 2] for i in range(15)]) == (15, False)
    assert held_out([[i, i + 1, i + 2] for i in range(16)]) == (2, True)
    assert held_out([[5, 6, 7]] * 20) == (20, False)  # all the same: none can be kept out
    kept, trained, apart = _split([[i % 8, 1] for i in range(40)] + [[9, 9]])
    assert apart and [7, 1] in kept and [7, 1] not in trained and len(trained) == 36


def test_calibrations_that_cannot_be(models: Models, texts: Path, tmp_path: Path) -> None:
    base, experts = models
    for rate, weight in ((math.nan, 0.0), (1e38, 0.0), (0.1, math.inf), (-1.0, 0.0)):
        with pytest.raises(RecipeError, match="wanted a number from 0"):
            build_experts(config_of(base, experts), tmp_path / "out",
                          Options(calibration=texts, learning_rate=rate, balance=weight))
    few, small = write_models(tmp_path / "few", Path(base), "llama", 2, vocab_size=50)
    config = config_of(few, small, gate_mode="random")
    for entry in config["experts"]:
        del entry["positive_prompts"]
    with pytest.raises(ModelError, match="has no embedding"):
        build_experts(config, tmp_path / "out", Options(calibration=texts))
    assert not (tmp_path / "out").exists()


def test_texts_that_cannot_be_used(models: Models, tmp_path: Path) -> None:
    base, experts = models
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"words": 1}\nnot json\n"b"\n{"prompt": "c", "completion": "d"}\n')
    with pytest.raises(RecipeError) as raised:
        read_texts(rows, "--prompts")
    assert "row 2" in str(raised.value) and "row 3" in str(raised.value)
    rows.write_text('{"text": "a"}\n\n"b"\n{"prompt": "c", "completion": "d"}\n{"messages": [{"role": "u", "content": "e"}]}\n')
    assert read_texts(rows, "--prompts") == ["a", "b", "cd", "e"]
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "lines.txt", "--prompts") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n")
    for path in (tmp_path / "empty.txt", tmp_path / "none.txt"):
        with pytest.raises(RecipeError, match=r"--calibrate|--prompts"):
            build_experts(config_of(base, experts), tmp_path / "out", Options(calibration=path))
    assert not (tmp_path / "out").exists()


def test_a_prompt_with_a_token_that_the_base_does_not_have(models: Models, tmp_path: Path, tiny_base: Path) -> None:
    few, _ = write_models(tmp_path / "few", tiny_base, "llama", 0, vocab_size=50)
    for mode in ("hidden", "cheap_embed"):
        with pytest.raises(ModelError, match="has no embedding"):
            build_experts(config_of(few, models[1], gate_mode=mode), tmp_path / "out")


def test_a_completion_is_read_or_asked_for(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in (
        {"prompt": "a ", "completion": "b"}, {"prompt": said[0], "completion": said[1]}, {"prompt": "a"}, {"content": "c"})))
    assert read_texts(rows, "--calibrate") == ["a b", "a\nb", "a", "c"]
    rows.write_text('{"prompt": "a", "completion": ["b"]}\n{"prompt": "a", "response": "b"}\n')
    with pytest.raises(RecipeError) as caught:
        read_texts(rows, "--calibrate")
    assert "row 1: wanted a string, or an object with text, content, messages, or prompt + completion" in str(caught.value)
    assert "row 2: has `prompt` and `response`" in str(caught.value)


def test_equal_experts_and_a_random_router_are_let_be_with_a_warning(models: Models, tmp_path: Path) -> None:
    config = {"base_model": "m", "experts": [{"source_model": str(tmp_path)}] * 2, "gate_mode": "random"}
    config["base_model"] = str(tmp_path)
    assert any("computes what that model does" in text for text in read_config(config).warnings)
    assert not read_config(config, untrained=True).warnings
