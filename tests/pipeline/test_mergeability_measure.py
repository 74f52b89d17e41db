"""`measure`: every pair of a few real checkpoints, killed and resumed, and with input that is wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mergeability_rows import TASKS, make_model

from anabranch.errors import AnabranchError, ModelError, OutputError, RecipeError
from anabranch.mergeability import data as reading
from anabranch.mergeability.artifacts import Metrics
from anabranch.mergeability.measure import measure, measure_forecast
from anabranch.mergeability.metrics import METRICS
from conftest import task_rows, write_rows


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_base):
    """(base, models, data): three models in shards, one of them bfloat16; rows of each in one file."""
    folder = tmp_path_factory.mktemp("given")
    models = [str(make_model(tiny_base, folder / t, 0.02, torch.bfloat16 if t == "first" else torch.float32)) for t in TASKS]
    rows = [{"task": t, **row} for t in TASKS for row in task_rows(t, 12)]
    return str(tiny_base), models, [str(write_rows(folder / "rows.jsonl", rows))]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """A measurement that nothing disturbed."""
    return measure(*given, tmp_path_factory.mktemp("whole") / "metrics.json", samples=4)


def values(found: Metrics) -> dict:
    """Without what a clock says."""
    return found.model_dump(mode="json", exclude={"seconds"})


def test_everything_is_measured_and_nothing_is_left_behind(given, tmp_path):
    told, seen = [], []
    found = measure(*given, tmp_path / "new" / "metrics.json", samples=4, tell=told.append,
                    progress=lambda what, done, total: seen.append((what, done, total)))
    assert Metrics.load(tmp_path / "new" / "metrics.json") == found
    assert os.listdir(tmp_path / "new") == ["metrics.json"]
    assert [(p.task1, p.task2) for p in found.pairs] == [("copy", "reverse"), ("copy", "first"), ("reverse", "first")]
    for pair in found.pairs:
        assert pair.metrics.keys() == set(METRICS) and list(pair.metrics) == list(METRICS)
    assert not found.left_out
    assert "activations are means over the rows of all 3 tasks: measure models to be compared in one go" in told
    for model in found.models:
        assert model.norm and 0 < (model.single_score or 0) < 1 and 0 < (model.base_score or 0) < 1
    assert {what for what, done, total in seen} >= {"forward passes of base", "gradients of copy", "forward passes"}
    gaps = {m.task: 1 - m.base_score / m.single_score for m in found.models}
    assert found.pairs[1].metrics["fine_tuning_gap1"] == pytest.approx(gaps["copy"])
    assert found.pairs[1].metrics["fine_tuning_gap2"] == pytest.approx(gaps["first"])


def test_without_data_only_weights_are_measured_and_it_says_why(given, tmp_path, whole):
    found = measure(given[0], given[1], [], tmp_path / "metrics.json")
    wanted = {name for name, metric in METRICS.items() if metric.needs == "weights"}
    assert all(p.metrics.keys() == wanted for p in found.pairs) and found.left_out.keys() == METRICS.keys() - wanted
    assert set(found.left_out.values()) == {"wants calibration rows (--data)"}
    for pair, other in zip(found.pairs, whole.pairs, strict=True):
        assert all(pair.metrics[name] == other.metrics[name] for name in wanted)


def test_only_what_is_asked_for(given, tmp_path, whole):
    found = measure(*given, tmp_path / "metrics.json", only={"activations"}, samples=4)
    wanted = {name for name, m in METRICS.items() if m.needs == "rows"}
    assert all(p.metrics.keys() == wanted for p in found.pairs) and len(wanted) >= 4
    assert set(found.left_out.values()) == {"not asked for (--only)"} and found.models[0].norm is None
    for pair, other in zip(found.pairs, whole.pairs, strict=True):
        assert pair.metrics == pytest.approx({name: other.metrics[name] for name in wanted}, rel=1e-6)
    found = measure(*given, tmp_path / "scores.json", only=["scores"], samples=4)
    assert [m.single_score for m in found.models] == [m.single_score for m in whole.models]
    assert set(found.pairs[0].metrics) == {n for n, m in METRICS.items() if m.needs == "labels" and m.category == "extra"}


def test_unlabelled_rows_do_for_activations(given, tmp_path):
    rows = [{"task": t, "prompt": row["prompt"]} for t in TASKS for row in task_rows(t, 6)]
    file = str(write_rows(tmp_path / "prompts.jsonl", rows))
    found = measure(given[0], given[1], [file], tmp_path / "metrics.json", only={"weights", "activations"}, samples=4)
    assert {"activation_cosine_similarity", "task_vector_cosine_similarity"} <= found.pairs[0].metrics.keys()
    with pytest.raises(RecipeError, match=r"no responses.*--only weights,activations"):
        measure(given[0], given[1], [file], tmp_path / "other.json", samples=4)
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "prompts.jsonl"]


def test_the_order_of_models_changes_nothing_but_the_order(given, tmp_path, whole):
    found = measure(given[0], given[1][::-1], given[2], tmp_path / "metrics.json", samples=4)
    assert [m.task for m in found.models] == ["first", "reverse", "copy"]
    assert {m.task: m for m in found.models} == {m.task: m for m in whole.models}
    turned = {frozenset((p.task1, p.task2)): p.metrics for p in found.pairs}
    for pair in whole.pairs:
        other = turned[frozenset((pair.task1, pair.task2))]
        sides = {n: n[:-1] + {"1": "2", "2": "1"}[n[-1]] for n in other if n[-1] in "12"}  # what was task 1 is now task 2
        assert len(sides) == 6
        assert other == pytest.approx({n: pair.metrics[sides.get(n, n)] for n in other}, rel=1e-9, abs=1e-12)


class Stopped(BaseException):
    """As a signal would come."""


def stop_after(monkeypatch, calls: int) -> list[int]:
    """Gradients stop the program after so many models."""
    made: list[int] = []
    real = reading.language_gradients

    def gradients(*arguments):
        if len(made) == calls:
            raise Stopped
        made.append(1)
        return real(*arguments)

    monkeypatch.setattr(reading, "language_gradients", gradients)
    return made


def test_killed_and_resumed_gives_the_same_and_measures_no_model_twice(given, tmp_path, whole, monkeypatch):
    output = tmp_path / "metrics.json"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            measure(*given, output, samples=4)
    assert not output.exists()
    journal = tmp_path / ".metrics.json.journal"
    kept = sorted(journal.glob("rows/gradient-*"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-5])  # as a machine that lost power may leave it
    made = stop_after(monkeypatch, 9)
    found = measure(*given, output, samples=4)
    assert len(made) == 5  # the damaged one, and the four that were missing
    assert values(found) == values(whole) and found.hash == whole.hash
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize("samples", [4, 3])  # the same rows; other rows as well
def test_a_journal_of_other_models_or_rows_is_not_used(given, tmp_path, monkeypatch, samples):
    base, models, data = given
    changed = tmp_path / "models" / "copy"
    shutil.copytree(models[0], changed)
    output = tmp_path / "out" / "metrics.json"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            measure(base, [str(changed), *models[1:]], data, output, samples=4)
    file = next(changed.glob("*.safetensors"))
    tensors = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    found = measure(base, [str(changed), *models[1:]], data, output, samples=samples)
    fresh = measure(base, [str(changed), *models[1:]], data, tmp_path / "fresh.json", samples=samples)
    assert values(found) == values(fresh)


def test_the_forecast_counts_and_writes_nothing(given, tmp_path):
    lines = "\n".join(measure_forecast(*given, tmp_path / "metrics.json", samples=4))
    assert "3 and the base: 3 pairs" in lines and "4 models x 12 rows: 48 row passes" in lines
    assert "means over the rows of all 3 tasks" in lines and "(8 per parameter and model)" in lines
    assert ": 24 row passes" in lines and "bytes beside the output" in lines and not os.listdir(tmp_path)
    lines = "\n".join(measure_forecast(given[0], given[1], [], tmp_path / "metrics.json"))
    assert "gradients   left out: wants calibration rows (--data)" in lines and "row passes" not in lines


def test_metrics_that_some_pairs_lack_are_named_with_their_number(given, tmp_path):
    """Two models that each moved one matrix, another each: their pair has no matrix, their pairs with a third have."""
    base, models, _ = given
    for place, name in (("up", "model.layers.0.mlp.up_proj.weight"), ("down", "model.layers.0.mlp.down_proj.weight")):
        shutil.copytree(base, tmp_path / place)
        for file in (tmp_path / place).glob("*.safetensors"):
            save_file({n: t * (1.5 if n == name else 1) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    found = measure(base, [str(tmp_path / "up"), str(tmp_path / "down"), models[1]], [], tmp_path / "m.json", only={"weights"})
    lacking = {n for n in METRICS if n not in found.pairs[0].metrics and n in found.pairs[1].metrics}
    assert "right_subspace_overlap_top_k" in lacking
    assert found.left_out["right_subspace_overlap_top_k"] == (
        "in 1 of 3 pairs: there is no matrix that both models of a pair moved")
    assert all(found.left_out[n].startswith("in 1 of 3 pairs: ") for n in lacking)
    assert found.left_out["activation_dot_product"] == "not asked for (--only)"


def test_the_journal_goes_while_it_is_held(given, tmp_path, monkeypatch):
    """A second run that starts while the first one clears up must not have its folder taken away."""
    output, remove, seen = tmp_path / "metrics.json", shutil.rmtree, []

    def removing(folder, **options):
        handle = os.open(folder, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(folder)
        finally:
            os.close(handle)
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", removing)
    measure(given[0], given[1], [], output)
    assert seen == [tmp_path / ".metrics.json.journal"] and os.listdir(tmp_path) == ["metrics.json"]


def test_a_folder_that_was_removed_before_it_could_be_held_is_made_again(given, tmp_path, monkeypatch):
    lock, calls = fcntl.flock, []

    def late(handle, how):
        calls.append(handle)
        if len(calls) == 1:  # the run before lets go only now
            (tmp_path / ".metrics.json.journal").rmdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    measure(given[0], given[1], [], tmp_path / "metrics.json")
    assert len(calls) == 2 and os.listdir(tmp_path) == ["metrics.json"]


def test_a_file_system_without_locks_will_do(given, tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    measure(given[0], given[1], [], tmp_path / "metrics.json")
    assert os.listdir(tmp_path) == ["metrics.json"]


# ---- wrong input -----------------------------------------------------------------------------------------------------


def refused(folder: Path, *arguments, **options) -> str:
    """The message, and that nothing was written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(AnabranchError) as error:
        measure(*arguments, **options)
    assert sorted(folder.rglob("*")) == before
    return str(error.value)


def test_every_problem_comes_in_one_message(given, tmp_path, monkeypatch):
    base, models, _ = given
    (tmp_path / "metrics.json").mkdir()
    gpt = tmp_path / "gpt"
    shutil.copytree(models[1], gpt)
    (gpt / "config.json").write_text(json.dumps(json.loads((gpt / "config.json").read_text()) | {"model_type": "gpt2"}))
    said = refused(tmp_path, str(tmp_path / "no-base"), [models[0], f"copy={models[1]}", str(tmp_path / "gone")],
                   [str(tmp_path / "no-rows.jsonl")], tmp_path / "metrics.json", samples=0, only={"weights", "wieghts"})
    for part in ("--base", "no such folder", "the name 'copy' is taken", "--model gone", "is a folder", "samples is 0",
                 "wieghts: no such part. Did you mean `weights`"):
        assert part in said, part
    said = refused(tmp_path, base, [models[0], f"gpt={gpt}"], [], tmp_path / "x.json")
    assert "'gpt2', the base of 'qwen2'" in said
    monkeypatch.chdir(base)  # a base called `.` is one as well
    assert "'gpt2', the base of 'qwen2'" in refused(tmp_path, ".", [models[0], f"gpt={gpt}"], [], tmp_path / "x.json")


def test_an_output_that_is_an_input_is_refused(given, tmp_path, monkeypatch):
    base, models, data = given
    rows, model = tmp_path / "rows.jsonl", tmp_path / "copy"
    shutil.copy(data[0], rows)
    shutil.copytree(models[0], model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked.jsonl").symlink_to(rows)
    for entries, output, only in (([str(rows)], rows, None), (["rows.jsonl"], tmp_path / "copy" / ".." / "rows.jsonl", None),
                                  ([str(tmp_path / "*.jsonl")], Path("rows.jsonl"), None), ([str(tmp_path)], rows, {"weights"}),
                                  ([str(rows)], Path("linked.jsonl"), None), ([f"copy={rows}"], rows, {"weights"})):
        said = refused(tmp_path, base, [str(model), *models[1:]], entries, output, only=only)
        assert f"--output {output}: is a file of --data" in said, entries
    for name in ("config.json", "metrics.json"):
        said = refused(tmp_path, base, [str(model), *models[1:]], [], model / name)
        assert f"lies among the files of --model copy, {model}" in said
    monkeypatch.chdir(model)
    said = refused(tmp_path, ".", models[1:], [], Path("metrics.json"))
    assert "--output metrics.json: lies among the files of --base" in said
    hub = tmp_path / "snapshot"
    hub.mkdir()
    for file in model.iterdir():
        (hub / file.name).symlink_to(file)
    said = refused(tmp_path, base, [str(hub), *models[1:]], [], model / "config.json")
    assert "lies among the files of --model snapshot" in said
    measure(".", models[1:], [], tmp_path / "metrics.json")


def test_models_and_rows_must_match(given, tmp_path):
    base, models, data = given
    said = refused(tmp_path, base, models[:2], data, tmp_path / "m.json")
    assert "rows of the task 'first', and no model is called so" in said
    short = str(write_rows(tmp_path / "short.jsonl", task_rows("copy", 4)))
    said = refused(tmp_path, base, models, [f"copy={short}"], tmp_path / "m.json")
    assert "model 'reverse' has no calibration row" in said and "model 'first' has no calibration row" in said
    said = refused(tmp_path, base, models, [f"copi={short}"], tmp_path / "m.json")
    assert "no model is called 'copi'. Did you mean `copy`" in said
    said = refused(tmp_path, base, models, [short], tmp_path / "m.json")
    assert "no field `task`" in said and "NAME=FILE" in said
    said = refused(tmp_path, base, models, [f"copy={short}", f"copy={short}"], tmp_path / "m.json")
    assert "named 'copy'" in said and "evaluate.transfer" not in said
    empty = str(write_rows(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": ""}]))
    said = refused(tmp_path, base, models, [f"copy={empty}"], tmp_path / "m.json")
    assert "an assistant turn is empty" in said and "--only weights,activations" in said


@pytest.mark.parametrize(("models", "only", "wanted"), [
    (1, None, "pairs are measured: give --model twice"), (0, None, "no models given"),
    (2, {"scores"}, "--only scores: wants calibration rows"), (2, set(), "--only names nothing")])
def test_too_little_to_measure(given, tmp_path, models, only, wanted):
    assert wanted in refused(tmp_path, given[0], given[1][:models], [], tmp_path / "m.json", only=only)


def test_the_name_of_the_base_is_its_own(given, tmp_path):
    assert "the name `base`" in refused(tmp_path, given[0], [f"base={given[1][0]}", given[1][1]], [], tmp_path / "m.json")


def test_models_of_other_shapes_and_with_nan_are_refused(given, tmp_path):
    base, models, data = given
    for place, change in (("narrow", lambda t: t[:, :-1] if t.dim() == 2 else t), ("broken", lambda t: t * float("nan"))):
        folder = tmp_path / "models" / place
        shutil.copytree(models[0], folder)
        for file in folder.glob("*.safetensors"):
            save_file({n: change(t).contiguous() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    said = refused(tmp_path, base, [f"copy={tmp_path / 'models' / 'narrow'}", *models[1:]], data, tmp_path / "m.json")
    assert "narrow" in said or "copy" in said
    with pytest.raises(ModelError, match=r"copy .*not finite"):
        measure(base, [f"copy={tmp_path / 'models' / 'broken'}", *models[1:]], data, tmp_path / "m.json", only={"gradients"})


def test_an_output_that_cannot_be_written_is_told_first(given, tmp_path, monkeypatch):
    place = tmp_path / "locked"
    place.mkdir()
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(tmp_path, given[0], given[1], [], tmp_path / "file" / "m.json")
    with monkeypatch.context() as patch:  # as /proc says
        patch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError(2, "No such file or directory")))
        assert "cannot write beside it (No such file" in refused(tmp_path, given[0], given[1], [], tmp_path / "m.json")
    place.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(place, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert "cannot be written to" in refused(tmp_path, given[0], given[1], [], place / "m.json")


def test_no_room_for_gradients_is_told_before_the_first_of_them(given, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"gradients on 3 tasks take .* 1,000 are free"):
        measure(*given, tmp_path / "m.json", only={"gradients"})
    assert not os.listdir(tmp_path)
