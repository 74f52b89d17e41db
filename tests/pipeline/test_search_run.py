"""A search from its file to its verdict; killed, taken up, failing, with several objectives, on tasks."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from search_models import MODELS, make_models, make_rows, template, write
from typer.testing import CliRunner

from anabranch.engine.merging import merge_config
from anabranch.errors import CorruptedError, MixtureError, OutputError, RecipeError
from anabranch.model import load_model, load_tokenizer
from anabranch.rows import Rows, save_unit
from anabranch.search.journal import JOURNAL, Line
from anabranch.search.outcome import Evaluated, GuardScore, SearchOutcome, pareto, verdict
from anabranch.search.rows import read_halves, run_weights, split
from anabranch.search.run import forecast, records_for, search
from anabranch.search.samplers import CmaSampler, RandomSampler, sampler_for
from anabranch.search.score import Measured, Objective, difference, score_of
from anabranch.search.settings import DataSetting, read_search
from anabranch.search.space import template_space
from tiny_checkpoints import tensors_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    make_models(folder)
    make_rows(folder)
    return folder


def journal(records):
    return [json.loads(line) for line in (records / JOURNAL).read_text().splitlines()]


def candidates(records):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in journal(records)]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted search with a model made of its best."""
    folder = tmp_path_factory.mktemp("whole")
    path = write(folder / "space.yaml", template(models))
    out = folder / "OUT"
    seen = []
    outcome = search(path, out, progress=seen.append)
    return path, out, outcome, seen


# --- what comes of it ---


def test_everything_is_there_and_says_the_same(whole, models):
    _, out, outcome, seen = whole
    records = out.with_name("OUT.search")
    lines = journal(records)[1:]
    assert sorted((line["arm"], line["n"]) for line in lines) == [(a, n) for a in ("random", "search") for n in range(6)]
    assert [p.done for p in seen] == list(range(1, 13)) and seen[-1].total == 12
    assert SearchOutcome.load(records / "results.json") == outcome
    lowest = min(lines, key=lambda line: line["score"])
    assert outcome.best.score == lowest["score"] and list(outcome.best.parameters.values()) == lowest["vector"]
    assert outcome.random_best.score == min(line["score"] for line in lines if line["arm"] == "random")
    assert (records / "progress.png").read_bytes()[:4] == b"\x89PNG" and not (records / "pareto.png").exists()
    names = [s.name for s in outcome.scores]
    assert names[0] == "best" and {"uniform merge", "base", *(f"model {models / m}" for m in MODELS)} <= set(names)
    assert "token-weighted merge" in outcome.left_out and outcome.searched_rows == outcome.guard_rows == 12


def test_the_best_config_is_a_merge_config_and_makes_the_model(whole, tmp_path):
    _, out, outcome, _ = whole
    config = yaml.safe_load((out.with_name("OUT.search") / "best_config.yaml").read_text())
    assert config["models"][0]["parameters"]["weight"] == outcome.best.parameters["w_one"]
    merge_config(config, tmp_path / "again")
    one, other = tensors_of(out), tensors_of(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def slow_losses(folder, rows):
    """Mean loss over response tokens, row by row, without batches."""
    model = load_model(folder)
    total, count = 0.0, 0
    for i in range(len(rows)):
        ids, mask = rows.row(i)
        with torch.no_grad():
            logs = model(torch.tensor([ids.tolist()])).logits[0].double().log_softmax(-1)
        for at in range(1, len(ids)):
            if mask[at]:
                total, count = total - float(logs[at - 1, ids[at]]), count + 1
    return total / count


def test_scores_are_those_of_the_models_on_disk(whole, models, tmp_path):
    """The best, the uniform merge, a model and the base: merged to disk, loaded by transformers, scored one row at a time."""
    path, out, outcome, _ = whole
    halves = read_halves(read_search(path).data, load_tokenizer(models / "base"), models)
    even = {"merge_method": "linear", "dtype": "bfloat16", "models": [{"model": str(models / m), "parameters": {"weight": 1}}
                                                                      for m in MODELS]}
    merge_config(even, tmp_path / "even")
    by_name = {s.name: s for s in outcome.scores}
    for name, folder in (("best", out), ("uniform merge", tmp_path / "even"), ("base", models / "base"),
                         (f"model {models / 'two'}", models / "two")):
        for half, got in (("searched", by_name[name].searched), ("guard", by_name[name].guard)):
            rows = getattr(halves, half)
            assert got == pytest.approx(np.mean([slow_losses(folder, rows[u]) for u in rows]), rel=1e-4), (name, half)
    assert by_name["best"].searched == pytest.approx(outcome.best.score, rel=1e-6)
    gain = outcome.overfit
    assert gain["searched"] == pytest.approx(by_name["uniform merge"].searched - by_name["best"].searched)
    assert gain["gap"] == pytest.approx(gain["searched"] - gain["guard"])


# --- killed, gone on, refused ---


def test_killed_and_run_again_it_asks_the_same(whole, models, tmp_path):
    path, out, outcome, _ = whole
    copy = tmp_path / "space.yaml"
    copy.write_bytes(path.read_bytes())
    code = "import sys; from anabranch.search.run import search; search(sys.argv[1], sys.argv[2])"
    process = subprocess.Popen([sys.executable, "-c", code, copy, tmp_path / "OUT"], stderr=subprocess.DEVNULL)
    file = tmp_path / "OUT.search" / JOURNAL
    begun = time.monotonic()
    while time.monotonic() - begun < 120 and process.poll() is None:
        if file.is_file() and file.read_bytes().count(b"\n") >= 6:
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(journal(tmp_path / "OUT.search")) - 1
    assert 5 <= done < 12 and not (tmp_path / "OUT").exists()
    with open(file, "a") as handle:  # a line that the kill cut
        handle.write('{"arm": "search", "n": 99, "vec')
    (tmp_path / "OUT.search" / ".search-killed").mkdir()
    again = search(copy, tmp_path / "OUT")
    assert not list((tmp_path / "OUT.search").glob(".search-*"))
    assert candidates(tmp_path / "OUT.search") == candidates(out.with_name("OUT.search"))
    assert again == outcome
    assert all(torch.equal(t, tensors_of(out)[n]) for n, t in tensors_of(tmp_path / "OUT").items())


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cma", "random"])
def test_a_sampler_told_what_the_journal_holds_goes_on_as_if_never_stopped(sampler, tmp_path):
    file = template(tmp_path, budget=40) | {"sampler": sampler}
    space = template_space(read_search(file).parameters, file["merge"])
    settings = read_search(file)

    def worth(vector):
        value = sum((v - 0.3) ** 2 for v in vector)
        return value, [value, sum(vector)]

    one = sampler_for(settings, space, 2)
    asked = []
    for _ in range(40):
        asked.append(one.ask())
        one.tell(*worth(asked[-1]))
        np.random.seed(0)  # somebody else's business
    for stop in (1, 7, 23):
        other = sampler_for(settings, space, 2)
        for vector in asked[:stop]:
            assert other.ask() == vector
            other.tell(*worth(json.loads(json.dumps(vector))))
        rest = []
        for _ in range(40 - stop):
            rest.append(other.ask())
            other.tell(*worth(rest[-1]))
        assert rest == asked[stop:]
    if sampler != "random":
        assert asked != [RandomSampler(space, 1).ask() for _ in range(40)]
        assert min(worth(v)[0] for v in asked[20:]) < min(worth(v)[0] for v in asked[:6])


def test_cma_converges_restarts_and_leaves_numpys_generator_alone(tmp_path):
    file = {"parameters": {"w": {"low": 0, "high": 1}}, "merge": {"x": "$w"}, "tasks": ["t"]}
    space = template_space(read_search(file).parameters, file["merge"])
    sampler = CmaSampler(space, 0, 1 / 6, None)
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    best = 9.0
    for _ in range(700):
        (w,) = sampler.ask()
        assert 0 <= w <= 1
        best = min(best, (w - 0.77) ** 2)
        sampler.tell((w - 0.77) ** 2, [])
    assert len(sampler.asked) == sampler.population * 2**sampler.restarts  # twice as many after each
    assert best < 1e-8 and sampler.restarts > 0 and np.array_equal(np.random.get_state()[1], state)


def test_a_finished_search_does_nothing_again(whole, monkeypatch):
    path, out, outcome, _ = whole
    monkeypatch.setattr("anabranch.search.run.load_merge", None)
    assert search(path, out) == outcome


def test_a_larger_budget_goes_on(whole, tmp_path):
    path, out, _, _ = whole
    folder = tmp_path / "OUT.search"
    folder.mkdir()
    (folder / JOURNAL).write_bytes((out.with_name("OUT.search") / JOURNAL).read_bytes())
    seen = []
    outcome = search(path, tmp_path / "OUT", overrides={"budget": 7}, progress=seen.append)
    assert len(seen) == 2 and outcome.budget == 7
    lines = candidates(folder)
    assert lines[:13] == candidates(out.with_name("OUT.search")) and len(lines) == 15


def test_journals_of_other_searches_are_refused_and_left_alone(whole, models, tmp_path):
    path, out, _, _ = whole
    folder = tmp_path / "OUT.search"
    folder.mkdir()
    file = folder / JOURNAL
    good = (out.with_name("OUT.search") / JOURNAL).read_text()
    file.write_text(good)
    with pytest.raises(OutputError, match=r"another search(?s:.*)settings"):
        search(path, tmp_path / "OUT", overrides={"seed": 9})
    lines = good.splitlines()
    line = json.loads(lines[1])
    line["vector"][0] += 0.1
    file.write_text("\n".join([lines[0], json.dumps(line), *lines[2:]]) + "\n")
    with pytest.raises(CorruptedError, match="would have asked"):
        search(path, tmp_path / "OUT")
    file.write_text("[]\n")
    with pytest.raises(CorruptedError, match="not the journal"):
        search(path, tmp_path / "OUT")
    assert file.read_text() == "[]\n" and not (tmp_path / "OUT").exists()


def test_a_candidate_that_cannot_be_merged_is_the_worst(models, tmp_path):
    """della wants epsilon < min(density, 1 - density)."""
    file = template(models, "della", budget=5)
    for m in file["merge"]["models"]:
        m["parameters"] |= {"epsilon": "$eps"}
    file["parameters"]["rho"] = {"low": 0.3, "high": 0.7}
    file["parameters"]["eps"] = {"low": 0.2, "high": 0.9, "start": 0.25}
    outcome = search(write(tmp_path / "space.yaml", file))
    lines = journal(tmp_path / "space.search")[1:]
    failed = [line for line in lines if line["failed"]]
    assert 0 < len(failed) < len(lines) and all(line["score"] is None for line in failed)
    assert sum(outcome.failed.values()) == len(failed) and "epsilon" in next(iter(outcome.failed))
    assert outcome.best.parameters["eps"] < 0.7


def test_a_start_that_cannot_be_merged_is_told_before_anything_is_written(models, tmp_path):
    file = template(models)
    file["merge"]["models"][1]["model"] = "none/such/folder"
    with pytest.raises(Exception, match="none/such/folder"):
        search(write(tmp_path / "space.yaml", file), tmp_path / "OUT")
    file = template(models)
    file["merge"]["parameters"]["lamda"] = 1
    with pytest.raises(RecipeError, match="lamda"):
        search(write(tmp_path / "space.yaml", file), tmp_path / "OUT")
    with pytest.raises(MixtureError, match="no such file"):
        search(write(tmp_path / "space.yaml", template(models, data={"sources": [{"path": "none.jsonl"}]})), tmp_path / "OUT")
    assert [p.name for p in tmp_path.iterdir()] == ["space.yaml"]


# --- objectives and other grammars ---


def test_several_objectives_categories_and_a_front(models, tmp_path):
    file = template(models, sampler="nsga2", budget=6, token_weights=[1, 2, 1], objectives=[
        {"name": "words", "units": ["count"], "weight": 2}, {"name": "colours", "units": ["col*"]}])
    file["merge"]["merge_method"] = "$how"
    file["parameters"]["how"] = {"choices": ["ties", "dare_ties"]}
    outcome = search(write(tmp_path / "space.yaml", file), save_final_model=True)
    lines = [line for line in journal(tmp_path / "space.search")[1:]]
    assert {line["vector"][-1] for line in lines} == {"ties", "dare_ties"}
    for line in lines:
        assert line["score"] == pytest.approx(2 * line["units"]["count"] + line["units"]["colour"])
    points = [(line["objectives"]["words"], line["objectives"]["colours"]) for line in lines]
    front = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert {(e.objectives["words"], e.objectives["colours"]) for e in outcome.front} == front
    assert (tmp_path / "space.search" / "pareto.png").stat().st_size > 5000 and len(outcome.front_guard) == len(front)
    assert (tmp_path / "space.search" / "final_model" / "manifest.json").is_file()
    assert "token-weighted merge" in [s.name for s in outcome.scores]


def test_the_peers_genome_on_tasks_of_ones_own(models, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{a} {b}", "a": i % 2}) + "\n"
                            for i, (a, b) in enumerate(itertools.product(("one", "two", "three", "four"),
                                                                         ("red", "green", "two")))))
    task = {"task": "choice_train", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["red", "green"],
            "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(yaml.safe_dump(task))
    file = {"genome": {"models": [str(models / m) for m in MODELS], "merge_method": "dare_ties", "layer_granularity": 1,
                       "base_model": str(models / "base"), "filters": ["mlp"], "normalize": False},
            "tasks": [{"name": "choice_train", "weight": 2.0}], "limit": 10, "task_path": "tasks", "budget": 2}
    outcome = search(write(tmp_path / "space.yaml", file))
    assert len(outcome.dimensions) == 2 * 3 * 2 * 2 and outcome.objectives == {"choice_train": "higher"}
    for line in journal(tmp_path / "space.search")[1:]:
        assert line["score"] == -line["objectives"]["choice_train"] and line["units"]["choice_train"] * 5 == pytest.approx(
            round(line["units"]["choice_train"] * 5)), "five documents are searched"
        assert line["objectives"]["choice_train"] == 2 * line["units"]["choice_train"]
    with pytest.raises(RecipeError, match="no metric 'f1,none'"):
        search(write(tmp_path / "other.yaml", file | {"tasks": [{"name": "choice_train", "metric": "f1,none"}]}))


# --- rows and figures ---


def rows_of(prompts):
    return Rows.of([([*p, 7, 8], [0] * len(p) + [1, 1]) for p in prompts])


def test_halves_share_no_prompt_and_lose_none():
    many = rows_of([(a, b) for a in range(5) for b in range(5)] * 2)
    halves = split({"a": many, "b": rows_of([(a, 3) for a in range(5)] + [(9, 9), (9, 8)])}, None)
    prompts = {half: {name: [tuple(rows.row(i)[0][:2]) for i in range(len(rows))] for name, rows in found.items()}
               for half, found in (("searched", halves.searched), ("guard", halves.guard))}
    assert len(prompts["searched"]["a"]) + len(prompts["guard"]["a"]) == 50 and 20 <= len(prompts["guard"]["a"]) <= 30
    searched = {p for rows in prompts["searched"].values() for p in rows}
    assert not searched & {p for rows in prompts["guard"].values() for p in rows}
    total = sum(len(r) for half in prompts.values() for r in half.values())
    assert total + halves.dropped == 57
    shuffled = many.take(np.random.default_rng(0).permutation(50))
    again = split({"a": shuffled}, None)
    assert {tuple(again.guard["a"].row(i)[0]) for i in range(len(again.guard["a"]))} == {
        tuple(split({"a": many}, None).guard["a"].row(i)[0]) for i in range(len(again.guard["a"]))}
    few = split({"a": many}, 6)
    assert len(few.searched["a"]) == len(few.guard["a"]) == 3
    with pytest.raises(RecipeError, match=r"(?s)no unit can be split.*a: fewer than two different prompts"):
        split({"a": rows_of([(1, 2)] * 5)}, None)
    left = split({"one": rows_of([(1, 2)] * 5), "a": many}, None)
    assert list(left.searched) == list(left.guard) == ["a"] and "left out: one: fewer" in left.told[0]
    plain = Rows.of([([1, i, 3], [0, 1, 1]) for i in range(10)])  # text: all but the first token counts
    assert len(split({"t": plain}, None).guard["t"]) == 5


def test_rows_and_weights_of_a_run(tmp_path, models):
    from anabranch.artifacts import Mixture, Unit
    from anabranch.plan import make_plan

    run = tmp_path / "run"
    (run / "mixture" / "units").mkdir(parents=True)
    units = []
    for name, tokens in (("a", 30), ("b", 10)):
        held = rows_of([(i, 2) for i in range(6)] if name == "a" else [(i, 3) for i in range(6)])
        sha = save_unit(run / "mixture" / "units" / f"{name}.safetensors", held, held)
        units.append(Unit(name=name, source=name, format="x", file=f"units/{name}.safetensors", sha256=sha, rows=6, epochs=1,
                          samples=6, tokens=tokens, response_tokens=5, held_out_rows=6, held_out_tokens=6,
                          held_out_response_tokens=6))
    mixture = Mixture(units=units, transfer=[], retention=[], excluded=[], duplicates_in_train=0, duplicates_across=0,
                      max_length=9, chat_template="plain", examples=[])
    mixture.save(run / "mixture" / "mixture.json")
    make_plan("merit", {"a": 1, "b": 0}, 2, mixture, 0, {}).save(run / "plan.json")
    for said in ("run", "run/mixture"):
        halves = read_halves(DataSetting(mixture=said), None, tmp_path)
        assert sorted(halves.searched) == ["a", "b"] and len(halves.guard["a"]) == 3
    assert run_weights(run / "mixture") == {run / "branches/0/model": 0.25, run / "branches/1/model": 0.75}
    for k, name in enumerate(("one", "two")):
        (run / "branches" / str(k)).mkdir(parents=True)
        (run / "branches" / str(k) / "model").symlink_to(models / name)
    with pytest.raises(RecipeError, match="no unit fits c"):
        read_halves(DataSetting(mixture="run", units=["c*"]), None, tmp_path)
    with pytest.raises(RecipeError, match="neither a run folder"):
        read_halves(DataSetting(mixture="nothing"), None, tmp_path)


def test_the_interval_is_that_of_rows_drawn_again():
    """Against a plain loop over resamples."""
    draw = np.random.default_rng(1)
    objectives = [Objective("l", (("a", 1.0), ("b", 1.0)), 1.0, True), Objective("t", (("c", 2.0),), 0.5, False)]

    def measured(shift):
        counts = {"a": draw.integers(1, 5, 8).astype(float), "b": draw.integers(1, 5, 5).astype(float), "c": np.ones(9)}
        return counts, {n: (draw.random(len(c)) + shift) * c for n, c in counts.items()}

    counts, sums = measured(1.0)
    other = {n: s + draw.random(len(s)) * 0.2 for n, s in sums.items()}
    got = difference(objectives, Measured(sums, counts, {}), Measured(other, counts, {}))

    def total(s, picks):
        v = {n: s[n][picks[n]].sum() / counts[n][picks[n]].sum() for n in s}
        return (v["a"] + v["b"]) / 2 - 0.5 * 2 * v["c"]

    everything = {n: np.arange(len(c)) for n, c in counts.items()}
    assert got.value == pytest.approx(total(sums, everything) - total(other, everything))
    drawn = [total(sums, p) - total(other, p) for p in
             ({n: draw.integers(0, len(c), len(c)) for n, c in counts.items()} for _ in range(20000))]
    tail = 0.000954  # of the normal distribution beyond 2.7764 (Student, 4 degrees) times sqrt(5/4): five rows are the fewest
    assert [got.low, got.high] == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), abs=0.03)
    assert score_of(objectives, Measured(sums, counts, {})).objectives["t"] == pytest.approx(2 * sums["c"].mean())


def test_units_are_drawn_again_where_there_are_enough_and_too_few_rows_give_no_interval():
    draw = np.random.default_rng(2)
    names = [f"u{i}" for i in range(9)]
    counts = {n: draw.integers(1, 5, 2).astype(float) for n in names}
    one, other = ({n: draw.random(2) * c + shift for n, c in counts.items()} for shift in (0.0, 0.1))
    for by_tokens in (False, True):
        whole = [Objective("l", tuple((n, 1.0) for n in names), 1.0, True, by_tokens)]
        got = difference(whole, Measured(one, counts, {}), Measured(other, counts, {}))

        def total(s, picked, by_tokens=by_tokens):
            if by_tokens:
                return sum(s[n].sum() for n in picked) / sum(counts[n].sum() for n in picked)
            return np.mean([s[n].sum() / counts[n].sum() for n in picked])

        drawn = [total(one, p) - total(other, p) for p in (draw.choice(names, 9) for _ in range(10000))]
        tail = 0.00722  # beyond 2.3060 (Student, 8 degrees) times sqrt(9/8)
        assert [got.low, got.high] == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), abs=0.03) and got.drawn == "units"
    few = difference([Objective("l", (("u0", 1.0),), 1.0, True)], Measured(one, counts, {}), Measured(other, counts, {}))
    assert few.low is None and few.value != 0


def test_the_verdict_says_what_the_intervals_allow():
    def one(name, guard, *gap):
        return GuardScore(name=name, searched=1, guard=guard, objectives={}, units={}, difference=gap[0] if gap else None,
                          low=gap[1] if gap else None, high=gap[2] if gap else None)

    best = Evaluated(arm="random", n=1, parameters={}, score=1, objectives={})
    scores = [one("best", 1.0), one("a", 1.2, -0.2, -0.3, -0.1), one("b", 0.9, 0.1, 0.05, 0.2), one("c", 1.0, 0.0, -0.1, 0.1),
              one("d", 1.1, -0.1, None, None)]
    said = "\n".join(verdict(scores, best, {"searched": 0.5, "guard": 0.2, "gap": 0.3}, False))
    for words in ("better than a by 0.2000", "WORSE than b by 0.1000", "cannot be told from c",
                  "better than d by 0.1000; no interval", "b has the lowest score (0.9000",
                  "the difference, +0.3000, is over-fitting to the searched rows, or chance", "found by random search"):
        assert words in said, words
    assert "no sign of over-fitting" in "".join(verdict(scores[:2], best, {"searched": 0.2, "guard": 0.3, "gap": -0.1}, False))


def test_the_front_holds_what_nothing_dominates():
    objectives = [Objective("x", (), 1, True), Objective("y", (), 1, False)]
    points = [(1, 1), (2, 2), (2, 2), (3, 1), (0.5, 0.5), (2, 1)]
    lines = [Line("search", n, [], 1.0, {"x": x, "y": y}, {}, 0) for n, (x, y) in enumerate(points)]
    assert [line.n for line in pareto([*lines, Line("search", 9, [], None, {}, {}, 0, "no")], objectives)] == [4, 0, 1]


# --- the command ---


def test_the_command_tells_and_writes_nothing_when_asked_not_to(models, whole, tmp_path):
    import typer

    from anabranch.cli_search import search as command

    app = typer.Typer()
    app.command()(command)
    path = write(tmp_path / "space.yaml", template(models, budget=2))
    done = CliRunner().invoke(app, [str(path), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "5 dimensions" in done.output and "a minute" in done.output and "all kept in memory" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["space.yaml"]
    done = CliRunner().invoke(app, [str(path), "--json"])
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [e["event"] for e in events].count("progress") == 4 and events[-1]["event"] == "done"
    assert events[-1]["scores"][0]["name"] == "best"
    done = CliRunner().invoke(app, [str(path), "--quiet"])
    assert done.exit_code == 0 and done.output == ""
    done = CliRunner().invoke(app, [str(path), "--json", "--sampler", "cme"])
    assert done.exit_code == 2 and json.loads(done.stdout.splitlines()[-1])["event"] == "error"
    assert records_for(path, None) == tmp_path / "space.search" and isinstance(forecast(path), list)
    assert Path(whole[1]).is_dir()
