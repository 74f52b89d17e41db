"""`mergeability collect`: models, merges, scores and the table of a tiny mixture; stopped, resumed, extended, refused."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anabranch.artifacts import Mixture
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import AnabranchError, CorruptedError, MixtureError, OutputError, ProvenanceError, RecipeError
from anabranch.evaluate import score_unit
from anabranch.mergeability.artifacts import Metrics
from anabranch.mergeability.asked import ask, draw_sets, spread_pairs
from anabranch.mergeability.collect import Collection, collect, collect_forecast
from anabranch.mergeability.measure import measure
from anabranch.mergeability.models import set_aside
from anabranch.mergeability.outcomes import DEFAULT_METHODS, Journal, Scorer, choose_methods
from anabranch.mergeability.table import read_table
from anabranch.model import can_select, load_model, load_tokenizer
from anabranch.recipe import load_recipe
from anabranch.rows import Rows, load_unit
from conftest import write_recipe
from jobs_here import jobs_done_here

TASKS = ["copy", "first", "reverse"]
MADE = ("table.csv", "sets.csv", "collect.json", "outcomes.jsonl")
ASKED = {"tasks": TASKS, "sets": 1, "k": 3, "tell": lambda _: None}


def recipe_of(folder: Path, changes: dict[str, object] | None = None):
    return load_recipe(folder / "recipe.yaml", {"evaluate.generate_samples": 0, **(changes or {})})


@pytest.fixture(scope="module")
def collected(tmp_path_factory, tiny_base) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    write_recipe(folder, tiny_base)
    seen: list[tuple[int, int]] = []

    def progress(stage: str, what: str, done: int, total: int) -> None:
        table = folder / "run" / "mergeability" / "table.csv"
        if stage == "merge":
            seen.append((done, len(table.read_text().splitlines()) - 1 if table.exists() else 0))

    with jobs_done_here():
        collect(recipe_of(folder), **ASKED, progress=progress)
    (folder / "seen.json").write_text(json.dumps(seen))
    return folder


@pytest.fixture()
def copied(collected, tmp_path) -> Path:
    """The same with its models and metrics, and no merge."""
    folder = tmp_path / "again"
    shutil.copytree(collected, folder)
    for name in MADE:
        (folder / "run" / "mergeability" / name).unlink()
    return folder


def place(folder: Path) -> Path:
    return folder / "run" / "mergeability"


def made(folder: Path) -> dict[str, bytes]:
    return {name: (place(folder) / name).read_bytes() for name in MADE}


def test_the_table_has_every_pair_and_every_method(collected):
    table = read_table(place(collected) / "table.csv")
    assert [table.pair(i) for i in range(len(table))] == list(itertools.combinations(TASKS, 2))
    assert tuple(table.outcomes) == DEFAULT_METHODS and len(DEFAULT_METHODS) >= 5
    for scores in table.outcomes.values():
        assert np.all((scores > 0) & (scores <= 1))
    assert {"task_vector_cosine_similarity", "activation_l2_distance", "encoder_gradient_l2_distance",
            "fine_tuning_gap1", "fine_tuning_gap2"} <= set(table.metrics)
    assert all(np.isfinite(values).all() for values in table.metrics.values())
    side = Collection.load(place(collected) / "collect.json")
    assert {m.name: m.parameters for m in side.methods}["ties"] == {
        "density": 0.2, "scale": 0.3, "normalize": True, "rescale": False}
    assert {m.name: m.weights(2) for m in side.methods}["task_arithmetic"] == [1.0, 1.0]


def test_a_row_is_written_when_its_pair_is_done(collected):
    seen = json.loads((collected / "seen.json").read_text())
    assert len(seen) == 4 * len(DEFAULT_METHODS) + 1
    assert all(rows == min(done // len(DEFAULT_METHODS), 3) for done, rows in seen)


def test_nothing_temporary_stays(collected):
    assert sorted(p.name for p in place(collected).iterdir()) == [
        "calibration", "calibration.jsonl", "collect.json", "lock", "metrics.json", "mixture", "models", "outcomes.jsonl",
        "sets.csv", "table.csv", "train-0.log"]


def held_out_score(folder: Path, base: Path, weights: dict[str, torch.Tensor] | None, task: str) -> float:
    """exp(-loss) on the run's own held-out rows, by a model loaded here."""
    mixture = Mixture.load(folder / "run" / "mixture" / "mixture.json")
    rows = load_unit(folder / "run" / "mixture" / mixture.unit(task).file, "held_out")
    model = load_model(base)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    chosen = np.arange(len(rows))
    assert len(rows) <= 6  # all are scored
    return math.exp(-score_unit(model, load_tokenizer(base), rows, chosen, 4096, select=can_select(model), answers=None).loss)


def weights_of(folder: Path, task: str) -> dict[str, torch.Tensor]:
    model = next((place(folder) / "models").glob(f"{task}-*")) / "model"
    return {n: t for file in model.glob("*.safetensors") for n, t in load_file(file).items()}


def test_scores_are_of_the_base_the_own_model_and_the_merge(collected, tiny_base):
    table = read_table(place(collected) / "table.csv")
    one, two = (weights_of(collected, t) for t in ("copy", "first"))
    assert table.pair(0) == ("copy", "first")
    assert table.base[0, 0] == pytest.approx(held_out_score(collected, tiny_base, None, "copy"), rel=1e-5)
    assert table.single[0, 0] == pytest.approx(held_out_score(collected, tiny_base, one, "copy"), rel=1e-5)
    assert table.single[0, 1] == pytest.approx(held_out_score(collected, tiny_base, two, "first"), rel=1e-5)
    mean = {n: (one[n] + two[n]) / 2 for n in one}
    assert table.outcomes["linear"][0, 1] == pytest.approx(held_out_score(collected, tiny_base, mean, "first"), rel=1e-4)
    base = load_model(tiny_base).state_dict()
    added = {n: base[n] + 0.3 * (one[n] - base[n]) + 0.3 * (two[n] - base[n]) for n in one}
    assert table.outcomes["task_arithmetic"][0, 0] == pytest.approx(
        held_out_score(collected, tiny_base, added, "copy"), rel=1e-4)
    line = next(o for o in map(json.loads, (place(collected) / "outcomes.jsonl").open()) if o["model"] == "linear"
                and o["tasks"] == ["copy", "first"])
    moved = math.sqrt(sum(float(((mean[n] - base[n]).double() ** 2).sum()) for n in mean))
    assert line["displacement"] == pytest.approx(moved, rel=1e-4)


def test_inputs_outcomes_and_training_have_no_row_in_common(collected):
    def contents(rows: Rows) -> set[bytes]:
        return {rows.row(i)[0].tobytes() for i in range(len(rows))}

    mixture = Mixture.load(place(collected) / "mixture" / "mixture.json")
    whole = Mixture.load(collected / "run" / "mixture" / "mixture.json")
    for unit in mixture.units:
        trained = contents(load_unit(place(collected) / "mixture" / unit.file, "train"))
        held_out = contents(load_unit(place(collected) / "mixture" / unit.file, "held_out"))
        aside = contents(load_unit(place(collected) / "calibration" / Path(unit.file).name, "train"))
        assert len(aside) >= 2 and held_out and not (trained & aside or trained & held_out or aside & held_out)
        assert trained | aside == contents(load_unit(collected / "run" / "mixture" / whole.unit(unit.name).file, "train"))


def test_sets_are_in_the_layout_of_the_study(collected):
    lines = [line.split(",") for line in (place(collected) / "sets.csv").read_text().splitlines()]
    assert lines[0] == ["subset_id", "task1", "task2", "task3", "method", "score1", "score2", "score3"]
    assert [line[:5] for line in lines[1:]] == [["0", *TASKS, m] for m in DEFAULT_METHODS]
    assert all(0 < float(score) <= 1 for line in lines[1:] for score in line[5:])


def test_a_run_killed_twice_goes_on_and_ends_with_the_same_bytes(collected, copied, monkeypatch):
    real, done = Scorer._score, []

    def killed_at(count: int):
        def score(self, *given):
            if len(done) == count:
                with (place(copied) / "outcomes.jsonl").open("ab") as journal:
                    journal.write(b'{"key":"torn')
                raise KeyboardInterrupt
            done.append(given)
            return real(self, *given)
        return score

    for count in (0, 9):
        monkeypatch.setattr(Scorer, "_score", killed_at(count))
        with pytest.raises(KeyboardInterrupt):
            collect(recipe_of(copied), **ASKED)
    monkeypatch.setattr(Scorer, "_score", killed_at(99))
    collect(recipe_of(copied), **ASKED)
    assert len(done) == 1 + 3 + 4 * len(DEFAULT_METHODS)  # none twice
    assert made(copied) == made(collected)


def test_asking_for_more_goes_on_from_what_is_there(collected, copied):
    few = {"tasks": TASKS, "tell": lambda _: None}
    collect(recipe_of(copied), **few, methods=["linear"], pairs=1)
    table = read_table(place(copied) / "table.csv")
    assert len(table) == 1 and table.methods == ["linear"] and not (place(copied) / "sets.csv").exists()
    journal = (place(copied) / "outcomes.jsonl").read_bytes()
    collect(recipe_of(copied), **ASKED)
    assert (place(copied) / "outcomes.jsonl").read_bytes().startswith(journal)
    assert all(made(copied)[name] == made(collected)[name] for name in ("table.csv", "sets.csv", "collect.json"))


@pytest.mark.parametrize(("changes", "asked", "wrong"), [
    ({"train.learning_rate": 5e-4}, {}, "training settings"), ({"evaluate.max_samples": 3}, {}, "evaluation"),
    ({"merge.dtype": "bfloat16"}, {}, "merge"), ({}, {"calibration": 3}, "calibration"),
    ({"mixture.max_samples": 12}, {}, "rows of copy")])
def test_a_changed_recipe_is_refused_and_changes_nothing(collected, changes, asked, wrong):
    before = made(collected)
    with pytest.raises(ProvenanceError, match=f"another {wrong}.*Delete that folder"):
        collect(recipe_of(collected, changes), **ASKED, **asked)
    assert made(collected) == before and not (place(collected) / "checking").exists()
    mixture_again(collected)


def mixture_again(folder: Path) -> None:
    """The run's mixture as it was: it follows the recipe, whoever asks."""
    from anabranch.run import mixture_stage, open_run

    mixture_stage(open_run(recipe_of(folder), tell=lambda _: None))


def test_two_do_not_collect_in_one_folder(collected):
    with open(place(collected) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is collecting"):
            collect(recipe_of(collected), **ASKED)


def test_a_line_that_is_no_outcome_is_named(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    path.write_text('{"key": "a"}\n')
    with pytest.raises(CorruptedError, match="line 1"):
        Journal.open(path)


# ---- what is refused before anything is made --------------------------------------------------------------------------


def test_every_bad_method_is_told_at_once():
    with pytest.raises(RecipeError) as error:
        choose_methods(["linaer", "passthrough", "fisher", "tsv", "tsv_m", "linear"], [2])
    told = str(error.value)
    assert "`linaer`: no such merge method. Did you mean linear?" in told.replace("`linear`", "linear")
    assert "`passthrough`" in told and "wanted 1" in told and "Fisher information" in told and "`tsv_m` stands twice" in told
    assert "`linear`:" not in told
    with pytest.raises(RecipeError, match=r"t: slerp needs it"):
        choose_methods(["slerp"], [2])
    assert choose_methods(["nuslerp"], [2])
    with pytest.raises(RecipeError, match=r"nuslerp: got 3 branches beside the base, wanted 1 to 2"):
        choose_methods(["nuslerp"], [2, 3])
    assert choose_methods(["token_weighted"], [2])[0].weights(2) == [0.5, 0.5]


def test_tasks_pairs_and_sets_that_cannot_be(collected):
    mixture = Mixture.load(collected / "run" / "mixture" / "mixture.json")

    def refused(**changes: object) -> str:
        given = {"methods": ["linear"], "tasks": None, "pairs": None, "sets": 0, "k": 4, "calibration": 24, **changes}
        with pytest.raises(RecipeError) as error:
            ask(mixture, 0, **given)
        return str(error.value)

    assert "`cop` is no unit" in refused(tasks=["cop", "frist"]) and "`frist`" in refused(tasks=["cop", "frist"])
    assert "a pair needs two" in refused(tasks=["copy"]) and "0 tasks (none): a pair needs two" in refused(tasks=[])
    assert "wanted 1 to 10" in refused(pairs=11) and "wanted 1 to 10" in refused(pairs=0)
    assert "sets of 2 to 5" in refused(sets=3, k=6) and "only 5 sets of 4" in refused(sets=6)
    assert "at least 2 rows" in refused(calibration=1)


def test_a_mixture_of_one_unit_and_units_without_held_out_rows(tmp_path, tiny_base):
    write_recipe(tmp_path, tiny_base)
    with pytest.raises(RecipeError, match=r"1 task \(copy\): a pair needs two"):
        collect(recipe_of(tmp_path, {"mixture.sources": [{"path": "data/copy.jsonl"}]}), tell=lambda _: None)
    with pytest.raises(MixtureError) as error:
        collect(recipe_of(tmp_path, {"mixture.held_out": 0.0}), tell=lambda _: None)
    assert "copy: no held-out rows" in str(error.value) and "sorted: no held-out rows" in str(error.value)
    with pytest.raises(MixtureError, match=r"copy: 5 training rows.*wanted at least 8"):
        collect(recipe_of(tmp_path, {"mixture.max_samples": 5}), tell=lambda _: None)
    assert not (place(tmp_path) / "collect.json").exists() and not (place(tmp_path) / "models").exists()


def test_a_dry_run_tells_and_writes_nothing(tmp_path, tiny_base):
    write_recipe(tmp_path, tiny_base)
    lines = collect_forecast(recipe_of(tmp_path), sets=2, k=3)
    told = "\n".join(lines)
    assert "10 pairs and 2 sets of 3 by linear" in told and "72 merges" in told and "78 evaluations" in told
    assert not (tmp_path / "run").exists()
    with pytest.raises(AnabranchError, match="no such merge method"):
        collect_forecast(recipe_of(tmp_path), methods=["liner"])


# ---- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7, 8])
def test_the_first_pairs_touch_every_task_alike(count):
    pairs = spread_pairs(count, 1)
    assert sorted(pairs) == list(itertools.combinations(range(count), 2))
    for n in range(1, len(pairs) + 1):
        touched = np.bincount(np.array(pairs[:n]).ravel(), minlength=count)
        assert touched.max() - touched.min() <= (1 if count % 2 == 0 else 2)
    assert count < 7 or spread_pairs(count, 2) != pairs


def test_more_sets_begin_with_fewer():
    every = draw_sets(6, 3, 20, 0)
    assert len(set(every)) == 20 and all(len(set(s)) == 3 and s == tuple(sorted(s)) for s in every)
    assert draw_sets(6, 3, 5, 0) == every[:5] and draw_sets(6, 3, 0, 0) == []


def test_copies_of_a_calibration_row_are_not_trained_on():
    rows = Rows.of([([i % 6, 1], [0, 1]) for i in range(12)])
    aside, rest = set_aside(rows, 24, 0, "task")
    content = [int(rows.row(i)[0][0]) for i in range(12)]
    assert len(aside) == 3 and len({content[i] for i in aside}) == 3
    assert {content[i] for i in aside}.isdisjoint(content[i] for i in rest) and len(rest) == 6


def test_the_engine_tells_how_far_a_plain_average_went(tmp_path, tiny_base):
    for k in range(2):
        model = load_model(tiny_base)
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0.1 * (k + 1))
        model.save_pretrained(tmp_path / str(k))
    found = merge_checkpoints("linear", tiny_base, [tmp_path / "0", tmp_path / "1"], [1.0, 1.0], tmp_path / "out", made_from={})
    entries = load_model(tiny_base).get_input_embeddings().weight.numel()
    assert found.displacement == pytest.approx(0.15 * math.sqrt(entries), rel=1e-4)
    assert found.branch_displacements == pytest.approx([0.1 * math.sqrt(entries), 0.2 * math.sqrt(entries)], rel=1e-4)


def test_the_settings_of_the_study_are_of_methods_that_there_are():
    assert tuple(m.name for m in choose_methods(DEFAULT_METHODS, [2, 4])) == DEFAULT_METHODS


def test_the_calibration_rows_are_there_to_measure_by_again(collected, tiny_base, tmp_path):
    """So that a new model can be measured beside those of the table, and these are recognised."""
    known = Metrics.load(place(collected) / "metrics.json")
    again = measure(str(tiny_base), [f"{m.task}={collected / 'run' / m.folder}" for m in known.models],
                    [str(place(collected) / "calibration.jsonl")], tmp_path / "metrics.json", samples=24)
    assert [m.task for m in again.models] == [m.task for m in known.models]
    for one, other in zip(known.pairs, again.pairs, strict=True):
        assert other.metrics == pytest.approx(one.metrics, rel=1e-3, abs=1e-5)


def test_a_dry_run_refuses_what_the_run_would(collected):
    asked = {k: v for k, v in ASKED.items() if k != "tell"}
    assert any("evaluations are there" in line for line in collect_forecast(recipe_of(collected), **asked))
    with pytest.raises(ProvenanceError, match="another training settings"):
        collect_forecast(recipe_of(collected, {"train.learning_rate": 0.123}), **asked)
