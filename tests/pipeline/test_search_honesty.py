"""What a search must not do: mix journals of other searches, tell of one model and make another, let guard rows in, or claim
more than its rows say."""

from __future__ import annotations

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from search_models import MODELS, bits, make_models, make_rows, template, write

from anabranch.engine.merging import merge_config, settings_for
from anabranch.errors import CorruptedError, OutputError, RecipeError
from anabranch.rows import Rows
from anabranch.search.baselines import baselines
from anabranch.search.genome import genome_space
from anabranch.search.in_memory import Room, Workshop, absolute
from anabranch.search.journal import JOURNAL, Line, opened
from anabranch.search.rows import split
from anabranch.search.run import Job, _tell, forecast, prepare_search, search
from anabranch.search.score import Measured, Objective, difference
from anabranch.search.settings import GenomeSetting, TaskSetting, read_search
from anabranch.search.tasks import TaskScorer
from tiny_checkpoints import tensors_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    make_models(folder)
    make_rows(folder)
    return folder


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    """A search of ten candidates in each arm, without a model made."""
    path = write(tmp_path_factory.mktemp("done") / "space.yaml", template(models, budget=10))
    return path, search(path)


def lines_of(records):
    return [json.loads(line) for line in (records / JOURNAL).read_text().splitlines()[1:]]


def smaller(path, whole):
    """A budget within which another candidate is the best."""
    lines = lines_of(path.with_suffix(".search"))
    return next(n for n in range(1, 10) if min(x["score"] for x in lines if x["n"] < n) > whole.best.score)


# --- the best, and where it goes ---


def test_a_smaller_budget_tells_of_and_makes_the_same_candidate(models, done, tmp_path):
    path, whole = done
    budget = smaller(path, whole)
    shutil.copytree(path.with_suffix(".search"), tmp_path / "OUT.search")
    told = []
    for _ in range(2):  # the second time it is finished, while best_config.yaml is another's
        outcome = search(path, tmp_path / "OUT", overrides={"budget": budget}, progress=told.append)
        config = yaml.safe_load((tmp_path / "OUT.search" / "best_config.yaml").read_text())
        assert config["models"][0]["parameters"]["weight"] == outcome.best.parameters["w_one"]
        assert config["parameters"]["lambda"] == outcome.best.parameters["lam"]
        assert outcome.best.n < budget and outcome.best.score > whole.best.score
        merge_config(config, tmp_path / "again")
        assert all(torch.equal(t, tensors_of(tmp_path / "again")[n]) for n, t in tensors_of(tmp_path / "OUT").items())
        shutil.copy(path.with_suffix(".search") / "best_config.yaml", tmp_path / "OUT.search")
        shutil.rmtree(tmp_path / "OUT")
        shutil.rmtree(tmp_path / "again")
    assert not told


def test_what_stands_at_out_is_told_before_the_search(models, tmp_path):
    path = write(tmp_path / "space.yaml", template(models, budget=1))
    (tmp_path / "OUT").mkdir()
    search(write(tmp_path / "other.yaml", template(models, budget=1)), tmp_path / "OUT")  # an empty folder is free
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "mine.txt").write_text("mine")
    for call in (search, forecast):
        with pytest.raises(OutputError, match="no search made it"):
            call(path, tmp_path / "TAKEN")
    assert not (tmp_path / "TAKEN.search").exists()


def test_a_better_best_of_a_larger_budget_is_kept_and_told(models, done, tmp_path):
    path, whole = done
    budget = smaller(path, whole)
    shutil.copytree(path.with_suffix(".search"), tmp_path / "OUT.search")
    search(path, tmp_path / "OUT", overrides={"budget": budget})
    with pytest.raises(OutputError, match=r"(?s)the search is done.*best_config.yaml OTHER"):
        search(path, tmp_path / "OUT")
    config = yaml.safe_load((tmp_path / "OUT.search" / "best_config.yaml").read_text())
    assert config["models"][0]["parameters"]["weight"] == whole.best.parameters["w_one"]


# --- journals ---


def test_a_removed_journal_is_searched_anew(models, done, tmp_path):
    path, _ = done
    shutil.copytree(path.with_suffix(".search"), tmp_path / "OUT.search")
    (tmp_path / "OUT.search" / JOURNAL).unlink()
    seen = []
    outcome = search(path, tmp_path / "OUT", overrides={"budget": 2}, progress=seen.append)
    assert len(seen) == 4 and outcome.best.n < 2


def test_a_journal_without_candidates_is_no_other_search(tmp_path):
    with opened(tmp_path, {"settings": "a"}):
        pass
    with opened(tmp_path, {"settings": "b"}) as journal:
        journal.add(Line("search", 0, [0.5], 1.0, {"loss": 1.0}, {}, 0.1))
        journal.add(Line("search", 1, ["\ud800"], None, {}, {}, 0.1, "no \ud800 such"))
    with opened(tmp_path, {"settings": "b"}) as journal:
        assert [line.n for line in journal.lines] == [0, 1] and journal.lines[1].failed == "no \ud800 such"
    with pytest.raises(OutputError, match="settings"), opened(tmp_path, {"settings": "a"}):
        pass


@pytest.mark.parametrize("changed", [
    {"score": "low"}, {"score": None}, {"score": float("nan")}, {"objectives": {"loss": "x"}}, {"objectives": {}},
    {"objectives": 3}, {"units": [1]}, {"arm": "best"}, {"n": "0"}, {"n": True}, {"vector": {}}, {"seconds": None},
    {"failed": "no"}, {"more": 1}])
def test_a_line_that_no_search_wrote_is_refused(changed, tmp_path):
    with opened(tmp_path, {"settings": "a"}) as journal:
        journal.add(Line("search", 0, [0.5], 1.0, {"loss": 1.0}, {"u": 1.0}, 0.1))
    file = tmp_path / JOURNAL
    first, line = file.read_text().splitlines()
    file.write_text(first + "\n" + json.dumps(json.loads(line) | changed) + "\n")
    with pytest.raises(CorruptedError, match="not the journal"), opened(tmp_path, {"settings": "a"}):
        pass


def test_models_that_only_other_choices_name_are_watched(models, tmp_path):
    for m in MODELS:
        shutil.copytree(models / m, tmp_path / m)
    file = template(models, "linear", sampler="random", budget=1)
    file["parameters"] = {"w_one": {"low": 0, "high": 1}, "which": {"choices": [str(tmp_path / m) for m in MODELS]}}
    file["merge"]["models"] = [{"model": str(models / "base"), "parameters": {"weight": "$w_one"}},
                               {"model": "$which", "parameters": {"weight": 1}}]
    path = write(tmp_path / "space.yaml", file)
    before = prepare_search(path).identity
    assert prepare_search(path).identity == before
    for name in ("*.safetensors", "tokenizer.json"):
        os.utime(next((tmp_path / "three").glob(name)), ns=(1, 1))
        after = prepare_search(path).identity
        assert {key for key in after if after[key] != before[key]} == {"models"}, name
        before = after


def task_folder(folder, rows, **changed):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = folder / "tasks"
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        task = {"task": f"{name}_train", "dataset_path": "json", "dataset_kwargs": {
            "data_files": {"test": str(folder.parent / "rows.jsonl")}}, "test_split": "test", "output_type": "multiple_choice",
            "doc_to_text": "{{q}}", "doc_to_choice": ["red", "green"], "doc_to_target": "{{a}}",
            "metric_list": [{"metric": "acc"}]} | (changed if name == "b" else {})
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_guard_documents_ask_nothing_that_is_searched_here_or_in_another_task(tmp_path):
    """Eight questions, each twice under another id: no id decides a half."""
    words = [" ".join(p) for p in itertools.product(("one", "two"), ("red", "green"), ("x", "y"))]
    rows = [{"q": q, "a": i % 2, "id": i} for i, q in enumerate(words * 2)]
    folder = task_folder(tmp_path, rows, doc_to_text="Well, {{q}}")
    halves = TaskScorer([TaskSetting(name="a_train"), TaskSetting(name="b_train")], folder)._halves()
    asked = {half: {rows[i]["q"] for numbers in found.values() for i in numbers} for half, found in halves.items()}
    assert asked["searched"] and asked["guard"] and not asked["searched"] & asked["guard"]
    same = task_folder(tmp_path, [{"q": "one", "a": i % 2, "id": i} for i in range(6)])
    assert len(TaskScorer([TaskSetting(name="a_train")], same)._halves()["guard"]["a_train"]) == 3  # one question asks nothing
    twice = task_folder(tmp_path, [{"q": "one", "a": 0}] * 6)
    with pytest.raises(RecipeError, match="no half can be kept"):
        TaskScorer([TaskSetting(name="a_train")], twice)._halves()


def test_a_task_that_asks_or_counts_otherwise_is_another_search(tmp_path):
    rows = [{"q": f"one {i}", "a": i % 2} for i in range(6)]

    def identity():
        return TaskScorer([TaskSetting(name="b_train")], tmp_path / "tasks").identity

    task_folder(tmp_path, rows)
    first = identity()
    assert first == identity()
    for changed in ({"doc_to_text": "Q: {{q}}"}, {"doc_to_target": "{{1 - a}}"}, {"doc_to_choice": ["red", "blue"]}):
        task_folder(tmp_path, rows, **changed)
        assert identity() != first, changed
    task_folder(tmp_path, [*rows[:5], {"q": "one 5", "a": 0}])
    assert identity() != first


# --- candidates ---


def test_an_adapter_that_the_first_candidate_does_not_touch_is_folded_into_the_next(models, tmp_path):
    """On the first layer only; the first candidate takes its second layer from the model with the adapter."""
    shutil.copytree(models / "lora", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".layers.0." in n}, file, metadata={"format": "pt"})

    def config(layer):
        return {"merge_method": "passthrough", "dtype": "bfloat16", "slices": [
            {"sources": [{"model": f"{models / 'base'}+{tmp_path / 'lora'}", "layer_range": [layer, layer + 1]}]},
            {"sources": [{"model": str(models / "two"), "layer_range": [1, 2]}]}]}

    shop = Workshop((models,), settings_for(threads=1), Room(10**8))
    for layer in (1, 0):
        found = {}
        shop.merged(config(layer), lambda n, t: found.__setitem__(n, t.clone()))  # noqa: B023 - called at once
        merge_config(absolute(config(layer), (models,)), tmp_path / f"out{layer}")
        wanted = tensors_of(tmp_path / f"out{layer}")
        assert all(torch.equal(bits(found[n]), bits(wanted[n])) for n in wanted), layer


def test_genes_far_apart_and_filters_of_any_name():
    slerp = genome_space(GenomeSetting(models=["a", "b", "c"], merge_method="slerp"), 2)
    made = slerp.config([-2000.0, 3000.0, 0.0])["slices"][0]
    assert made["base_model"] == "b" and made["sources"][1]["model"] == "c" and made["parameters"]["t"] == 0.0
    assert slerp.config([1.0, 1.0, 0.0])["slices"][0]["parameters"]["t"] == 0.5
    filters = GenomeSetting(models=["a", "b"], merge_method="linear", filters=["rest", "(rest)"])
    names = [d.name for d in genome_space(filters, 2).dimensions]
    assert len(set(names)) == len(names) == 6


def test_whole_numbers_among_choices_stay_whole(tmp_path):
    file = template(tmp_path, sampler="tpe")
    file["parameters"]["w_one"] = {"choices": [1, 2.5, True, "x"]}
    assert [(type(c), c) for c in read_search(file).parameters["w_one"].choices] == [
        (int, 1), (float, 2.5), (bool, True), (str, "x")]


# --- intervals ---


@pytest.mark.parametrize("units", [5, 8, 20])
def test_intervals_hold_what_they_say(units):
    """95 % intervals over few units, of numbers whose true mean is known: plain quantiles hold 84 % of five."""
    draw = np.random.default_rng(units)
    names = [f"u{i}" for i in range(units)]
    objectives = [Objective("l", tuple((n, 1.0) for n in names), 1.0, True)]
    flat = Measured({n: np.zeros(1) for n in names}, {n: np.ones(1) for n in names}, {})
    held = []
    for _ in range(200):
        got = difference(objectives, Measured({n: draw.standard_normal(1) for n in names}, flat.counts, {}), flat)
        held.append(got.low <= 0 <= got.high)
    assert 0.88 <= np.mean(held) <= 0.995


def test_units_in_two_objectives_are_not_drawn_as_if_they_were_others():
    draw = np.random.default_rng(0)
    names = [f"u{i}" for i in range(12)]
    counts = {n: np.ones(6) for n in names}
    one, other = (Measured({n: draw.random(6) for n in names}, counts, {}) for _ in range(2))

    def drawn(first, second):
        return difference([Objective(o, tuple((n, 1.0) for n in found), 1.0, True)
                           for o, found in (("x", first), ("y", second))], one, other).drawn

    assert drawn(names, names[:6]) == drawn(names[:7], names[5:]) == "rows"
    assert drawn(names[:6], names[6:]) == drawn(names, names) == "units"
    twice = difference([Objective(o, tuple((n, 1.0) for n in names), 0.5, True) for o in "xy"], one, other)
    assert twice == difference([Objective("x", tuple((n, 1.0) for n in names), 1.0, True)], one, other)


# --- baselines ---


def test_a_branch_with_an_adapter_has_no_weight_of_the_run_and_what_torch_refuses_is_left_out(models, tmp_path, monkeypatch):
    run = {(models / m).resolve(): w for m, w in zip(MODELS, (0.5, 0.3, 0.2), strict=True)}
    config = {"merge_method": "linear", "models": [{"model": str(models / m), "parameters": {"weight": 1}} for m in MODELS]}
    made, missing = baselines(config, [models], None, run)
    assert [e["parameters"]["weight"] for e in made["token-weighted merge"]["models"]] == pytest.approx([0.5, 0.3, 0.2])
    config["models"][0]["model"] += f"+{models / 'lora'}"
    made, missing = baselines(config, [models], None, run)
    assert "token-weighted merge" in missing and "token-weighted merge" not in made
    plain = Job.measure

    def measure(job, config, half):
        if config == job.compared["base"]:
            raise RuntimeError("shapes cannot be multiplied")
        return plain(job, config, half)

    monkeypatch.setattr(Job, "measure", measure)
    outcome = search(write(tmp_path / "space.yaml", template(models, budget=1)))
    assert outcome.left_out["base"] == "shapes cannot be multiplied" and "base" not in [s.name for s in outcome.scores]


def test_the_worst_that_a_sampler_hears_is_a_failure_and_metrics_count_upwards(models, tmp_path):
    told = []

    class Sampler:
        def tell(self, score, objectives):
            told.append((score, list(objectives)))

    job = prepare_search(write(tmp_path / "space.yaml", template(models)))
    job.objectives = [Objective("a", (("count", 1.0),), 2.0, True), Objective("b", (("colour", 1.0),), 1.0, False)]
    _tell(job, Sampler(), Line("search", 0, [], None, {}, {}, 0.0, "no"))
    _tell(job, Sampler(), Line("search", 1, [], 3.0, {"a": 2.0, "b": 1.0}, {}, 0.0))
    assert told[0][0] > 1e5 and min(told[0][1]) > 1e5 and told[1] == (3.0, [2.0, -1.0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e6])
def test_a_score_that_is_none_fails_the_candidate(value, models, tmp_path, monkeypatch):
    job = prepare_search(write(tmp_path / "space.yaml", template(models)))

    class Model:
        tokenizer = None

        def become(self, config):
            return self

    job.model = Model()
    broken = Measured({n: np.full(2, value) for n in ("count", "colour")}, {n: np.ones(2) for n in ("count", "colour")}, {})
    monkeypatch.setattr(type(job.scorer), "measure", lambda *_: broken)
    with pytest.raises(RecipeError, match="no usable probabilities"):
        job.measure(job.first, "searched")


def test_a_guard_row_whose_prompt_another_unit_searches_is_left_out():
    """Unit b asks just what a keeps: half of it is searched there, so a may keep the other half only."""
    def rows_of(prompts):
        return Rows.of([([*p, 7, 8], [0, 0, 1, 1]) for p in prompts])

    def prompts(rows):
        return [tuple(rows.row(i)[0][:2].tolist()) for i in range(len(rows))]

    first = rows_of([(i, i + 1) for i in range(20)])
    kept = prompts(split({"a": first}, None).guard["a"])
    halves = split({"a": first, "b": rows_of(kept)}, None)
    searched = {p for rows in halves.searched.values() for p in prompts(rows)}
    guard = {p for rows in halves.guard.values() for p in prompts(rows)}
    assert not searched & guard and halves.dropped == 5 and len(prompts(halves.guard["a"])) == 5
