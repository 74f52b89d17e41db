"""What a rule is worth on tasks left out; files in and out of fit, predict and suggest, as functions and as commands."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anabranch import cli
from anabranch.artifacts import file_digest
from anabranch.errors import AnabranchError, CorruptedError, OutputError, RecipeError
from anabranch.mergeability import fitting, trial, words
from anabranch.mergeability.artifacts import (
    MeasuredModel,
    MeasuredPair,
    Metrics,
    Predictions,
    Predictor,
    Suggestion,
    Trial,
)
from anabranch.mergeability.fitting import Fitted, fit_table, predict_file, read_predictor, suggest_file
from anabranch.mergeability.predict import complete, estimates, make_predictor, predict
from anabranch.mergeability.rule import conformal
from anabranch.mergeability.table import Table, read_table, write_table
from anabranch.mergeability.trial import LeftOutPairs, one_left_out, pairs_left_out, several_left_out, trials
from built_commands import commands_built_once
from conftest import anabranch
from planted_pairs import planted, renamed

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "mergeability"
needs_data = pytest.mark.skipif(not SHARED.exists(), reason="shared/data/mergeability is not beside the repository")
STUDY = ["weight_avg", "arithmetic", "tsv", "ties", "dare"]
DISTANCE = "activation_l2_distance"


# ---- tasks left out --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Table:
    return planted(10, effects=0.1, distance=DISTANCE)


@pytest.fixture(scope="module")
def judged(table: Table) -> tuple[list[Trial], dict[str, LeftOutPairs]]:
    return trials(table, ["ties"], draws=3)


def of(judged: tuple[list[Trial], dict[str, LeftOutPairs]], rule: str, unseen: int) -> Trial:
    return next(t for t in judged[0] if (t.rule, t.unseen) == (rule, unseen))


def test_folds_hold_tasks_out(table):
    for t, fold in enumerate(one_left_out(table)):
        touched = table.touches([t])
        assert np.array_equal(fold.train, touched == 0) and np.array_equal(fold.test, touched == 1) and fold.unseen == 1
    draws = several_left_out(table, 6)
    for fold in draws:
        out = np.union1d(table.first[fold.test], table.second[fold.test])
        assert len(out) == 3 and fold.test.sum() == 3 and fold.unseen == 2
        assert np.array_equal(fold.train, table.touches(out.tolist()) == 0)
    assert len({fold.test.tobytes() for fold in draws}) > 3
    assert all(np.array_equal(a.test, b.test) for a, b in zip(draws, several_left_out(table, 3), strict=False))
    assert any(not np.array_equal(a.test, b.test) for a, b in zip(draws, several_left_out(table, 6, seed=1), strict=True))
    assert several_left_out(planted(20), 1)[0].test.sum() == 15  # six of twenty tasks


def test_nothing_of_a_task_left_out_is_learnt_from(table, monkeypatch):
    """Every rule that is fitted in a trial, controls too, sees no pair that is to be predicted, and no unseen task."""
    asked: list[tuple[Table, int]] = []

    def spy(train: Table, methods: list[str], *rest: object, cases: tuple[int, ...] = (), **options: object) -> Predictor:
        asked.append((train, cases[0] if cases else 0))
        return made

    made = make_predictor(table, ["ties"])
    monkeypatch.setattr(trial, "make_predictor", spy)
    trials(table, ["ties"], draws=2)
    folds = [*one_left_out(table), *several_left_out(table, 2)]
    folds += pairs_left_out(table)
    each = {0: 4, 1: 4, 2: 3}  # ours, effects alone (not where several tasks are left out), published, shuffled
    assert len(asked) == sum(each[f.unseen] for f in folds)
    place = 0
    for fold in folds:
        tested = [{int(a), int(b)} for a, b in zip(table.first[fold.test], table.second[fold.test], strict=True)]
        out = {0: lambda *_: set(), 1: set.intersection, 2: set.union}[fold.unseen](*tested)
        held = {frozenset(table.pair(i)) for i in np.flatnonzero(fold.test)}
        for train, case in asked[place:place + each[fold.unseen]]:
            assert train.touches(list(out)).max() == 0 and case in (0, fold.unseen) and len(train) == fold.train.sum()
            assert not held & {frozenset(train.pair(i)) for i in range(len(train))}
        plain, dealt = asked[place][0], asked[place + each[fold.unseen] - 1][0]
        assert np.array_equal(plain.outcomes["ties"], table.outcomes["ties"][fold.train])
        kept, anew, every = plain.kept("ties"), dealt.kept("ties"), table.kept("ties")
        assert not np.allclose(kept, anew) and all((np.abs(every - row).max(axis=1) < 1e-9).any() for row in anew)
        place += each[fold.unseen]


def test_what_a_planted_law_is_worth(judged):
    for unseen in (1, 2):
        ours, shuffled = of(judged, "ours", unseen), of(judged, "shuffled", unseen)
        assert ours.r is not None and ours.r > 0.85 and ours.folds == {1: 10, 2: 3}[unseen]
        assert shuffled.r is not None and (abs(shuffled.r) < 0.4 if unseen == 1 else shuffled.r < 0.6)
        assert ours.coverage is not None and 0.8 <= ours.coverage <= 1
    ours, alone = of(judged, "ours", 1), of(judged, "task effects alone", 1)
    without, published = of(judged, "ours without task effects", 1), of(judged, "published", 1)
    assert alone.r is not None and alone.r < ours.r and without.r is not None and without.r <= ours.r
    assert published.r is not None and published.r < ours.r and published.coverage is None
    assert of(judged, "ours without task effects", 2).r == of(judged, "ours", 2).r  # unseen tasks have none
    assert not any(t.rule == "task effects alone" and t.unseen == 2 for t in judged[0])
    assert {t.rule for t in judged[0] if t.answered is not None} == {"ours"}


def test_figures_of_a_trial_from_its_pairs(table, judged):
    """r within folds, coverage, widths and the naive interval, formed again from what each fold left."""
    pairs, found = judged[1]["ties"], of(judged, "ours", 1)
    y = table.normalised("ties")
    r, naive, widths, place = [], [], [], 0
    for fold in one_left_out(table):
        rows = slice(place, place + int(fold.test.sum()))
        assert np.array_equal(pairs.measured[rows], y[fold.test])
        r.append(np.corrcoef(pairs.predicted[rows], y[fold.test])[0, 1])
        learnt = y[fold.train]
        half = conformal(np.abs(learnt - learnt.mean()))
        naive += list(np.abs(y[fold.test] - learnt.mean()) <= half)
        widths.append(2 * half)
        place = rows.stop
    assert place == len(pairs.measured) == 2 * len(table)
    inside = (pairs.low <= pairs.measured) & (pairs.measured <= pairs.high)
    assert found.r == pytest.approx(np.mean(r)) and found.sd == pytest.approx(np.std(r))
    assert found.coverage == pytest.approx(inside.mean()) and found.width == pytest.approx((pairs.high - pairs.low).mean())
    assert found.naive_coverage == pytest.approx(np.mean(naive)) and found.naive_width == pytest.approx(np.mean(widths))
    assert found.answered == pytest.approx(pairs.said.mean())
    assert found.answered_coverage == pytest.approx(inside[pairs.said].mean())
    fold = one_left_out(table)[4]
    again = estimates(make_predictor(table.take(fold.train), ["ties"], cases=(1,)), table.take(fold.test))[0]
    assert np.array_equal(pairs.predicted[36:45], again.score) and np.array_equal(pairs.low[36:45], again.low)


def test_tables_too_small_for_a_trial():
    assert trials(planted(5).take(np.arange(9)), ["ties"], draws=2) == ([], {})
    spread = planted(13)
    # Without task 1 a star is left, where no two tasks can be left out: that fold is none.
    star = spread.take((spread.first == 0) | ((spread.first == 1) & (spread.second <= 7)))
    assert make_predictor(star, ["ties"]).pairs == 18 and not [t for t in trials(star, ["ties"], draws=2)[0] if t.unseen]


def test_constant_scores_have_no_correlation():
    table = planted(7)
    same = replace(table, outcomes={"ties": table.single.copy()})
    found, _ = trials(same, ["ties"], draws=0, controls=False)
    assert [(t.unseen, t.r, t.answered) for t in found] == [(1, None, 0.0), (0, None, 0.0)]


def test_pairs_left_out_are_each_predicted_once_and_their_tasks_were_seen(table):
    folds = pairs_left_out(table)
    assert np.array_equal(sum(f.test.astype(int) for f in folds), np.ones(len(table)))
    assert all(np.array_equal(f.train, ~f.test) and f.unseen == 0 for f in folds)
    turned = table.take(np.arange(len(table))[::-1])
    assert [{frozenset(table.pair(i)) for i in np.flatnonzero(f.test)} for f in folds] == [
        {frozenset(turned.pair(i)) for i in np.flatnonzero(f.test)} for f in pairs_left_out(turned)]


# ---- fit -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """table.csv and sets.csv of eight tasks, gaps.csv with holes, and a predictor of the first."""
    folder = tmp_path_factory.mktemp("fitting")
    table = planted(8, methods=("ties", "linear"), distance=DISTANCE, effects=0.1)
    table.metrics["right_subspace_overlap"] = table.metrics["noise1"] ** 2
    write_table(folder / "table.csv", table)
    holes = replace(table, metrics={k: v.copy() for k, v in table.metrics.items()})
    holes.metrics[DISTANCE][[3, 9]] = math.nan
    write_table(folder / "gaps.csv", holes)
    lines = ["task1,task2,task3,method,score1,score2,score3"]
    lines += [f"{table.tasks[i]},{table.tasks[i + 1]},{table.tasks[i + 2]},{m},0.{5 + i % 3},0.6,0.5{i}"
              for i in range(5) for m in ("ties", "linear")]
    (folder / "sets.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def fitted(place: Path) -> Fitted:
    return fit_table(place / "table.csv", draws=1, sets=place / "sets.csv", output=place / "predictor.json")


@pytest.fixture(scope="module")
def metrics(place: Path) -> Path:
    """metrics.json of the same pairs, six of eight tasks under other names."""
    table = read_table(place / "table.csv")
    names = [*table.tasks[:2], *(f"new{i}" for i in range(6))]
    own = {t: (float(table.single[i, s]), float(table.base[i, s])) for i in range(len(table))
           for s, t in enumerate((table.first[i], table.second[i]))}
    found = Metrics(base="base", settings={}, models=[
        MeasuredModel(task=n, folder=n, sha256="0", single_score=own[t][0], base_score=own[t][1]) for t, n in enumerate(names)],
        pairs=[MeasuredPair(task1=names[table.first[i]], task2=names[table.second[i]],
                            metrics={k: float(v[i]) for k, v in table.metrics.items()}) for i in range(len(table))])
    found.save(place / "metrics.json")
    return place / "metrics.json"


def test_what_fit_leaves(place, fitted):
    found = Predictor.load(place / "predictor.json")
    assert found == fitted.predictor and found.rule == "ours" and found.pairs == 28 and len(found.tasks) == 8
    assert sorted(p.name for p in place.glob("predictor*")) == [
        "predictor-coefficients.png", "predictor-measured.png", "predictor-tasks.png", "predictor.json"]
    assert sorted(p.name for p in fitted.figures) == sorted(p.name for p in place.glob("predictor-*"))
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in fitted.figures)
    assert found.made_from == {"table": file_digest(place / "table.csv"), "sets": file_digest(place / "sets.csv")}
    assert {t.rule for t in found.trials if t.unseen == 1} == {
        "ours", "ours without task effects", "task effects alone", "shuffled", "published"}
    assert [o.method for o in found.ours] == ["ties", "linear"] and {"r ties", "regret", "error linear"} <= found.sets.keys()
    assert fitted.unknown == ["noise1", "noise2"]
    assert "right_subspace_overlap" not in {c.name for c in found.columns}  # redundant: in no published fit either
    assert found.settings == {"seed": 0, "draws": 1}


def test_same_inputs_same_bytes(place, fitted, tmp_path):
    again = fit_table(place / "table.csv", draws=1, sets=place / "sets.csv", output=tmp_path / "deep" / "predictor.json")
    assert (tmp_path / "deep" / "predictor.json").read_bytes() == (place / "predictor.json").read_bytes()
    for one, two in zip(sorted(fitted.figures), sorted(again.figures), strict=True):
        assert one.name == two.name and one.read_bytes() == two.read_bytes()


def test_a_predictor_from_a_file_says_the_same(place, fitted):
    table = read_table(place / "table.csv")
    assert predict(Predictor.load(place / "predictor.json"), table) == predict(fitted.predictor, table)
    names, coefficients = fitting.fingerprint(fitted.predictor)
    assert names == [DISTANCE, "fine_tuning_gap", "noise"]
    for values in coefficients.values():  # more of it, a worse merge
        assert values[0] < 0 and values[1] < 0 and abs(values[2]) < 0.3 * abs(values[1])
    square = fitting.square(fitted.table, "linear")
    assert np.array_equal(square, square.T, equal_nan=True) and np.isnan(np.diag(square)).all()
    assert square[2, 5] == pytest.approx(table.normalised("linear")[(table.first == 2) & (table.second == 5)][0])


def without_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fit is worth is not asked: most of its time."""
    monkeypatch.setattr(fitting, "trials", lambda *_, **__: ([], {}))


def test_pairs_with_empty_cells(place, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="2 of 28 pairs lack values"):
        fit_table(place / "gaps.csv", draws=0, output=tmp_path / "p.json")
    assert not list(tmp_path.iterdir())
    without_trials(monkeypatch)
    found = fit_table(place / "gaps.csv", "ours", ["linear"], draws=0, drop_missing=True, output=tmp_path / "p.json")
    assert (found.predictor.dropped, found.predictor.pairs) == (2, 26)
    assert [o.method for o in found.predictor.ours] == ["linear"]
    assert words.fit_lines(found)[0] == "26 pairs of 8 tasks, 1 merge methods; 2 pairs with empty cells were left out"


def test_base_scores_from_another_file_and_none_at_all(place, tmp_path, monkeypatch):
    table = read_table(place / "table.csv")
    blind = replace(table, base=np.full_like(table.base, math.nan), outcomes={"ties": table.outcomes["ties"]})
    write_table(tmp_path / "blind.csv", blind)
    own = {table.tasks[t]: table.base[i, s] for i in range(len(table)) for s, t in enumerate((table.first[i], table.second[i]))}
    (tmp_path / "base.csv").write_text("task,zero\n" + "".join(f"{t},{v:.12g}\n" for t, v in own.items()))
    without = fit_table(tmp_path / "blind.csv", draws=0, output=tmp_path / "without.json")
    assert any("no base scores" in line for line in words.fit_lines(without))
    without_trials(monkeypatch)
    spec = f"{tmp_path / 'base.csv'}:zero"
    given = fit_table(tmp_path / "blind.csv", draws=0, base_scores=spec, output=tmp_path / "given.json")
    assert not any("no base scores" in line for line in words.fit_lines(given))
    assert given.predictor.made_from["base_scores"] == file_digest(tmp_path / "base.csv")
    whole = make_predictor(read_table(place / "table.csv"), ["ties"])
    assert len(given.predictor.columns) == len(whole.columns) - 1 == len(without.predictor.columns) + 2
    beta = {o.method: o.beta for o in given.predictor.ours}["ties"]
    columns = fitting.regressors(given.predictor)
    assert sum(b for b, n in zip(beta, columns, strict=True) if n == "fine_tuning_gap") > 0.2


def test_tables_of_few_tasks(tmp_path):
    for tasks in (2, 4):
        write_table(tmp_path / "few.csv", planted(tasks))
        with pytest.raises(RecipeError, match=f"of {tasks} tasks: not enough"):
            fit_table(tmp_path / "few.csv", output=tmp_path / "out" / "p.json")
    write_table(tmp_path / "few.csv", planted(5))
    found = fit_table(tmp_path / "few.csv", output=tmp_path / "p.json")
    assert found.predictor.trials == [] and sorted(p.name for p in found.figures) == ["p-coefficients.png", "p-tasks.png"]
    assert any("what this predictor is worth is not known" in line for line in words.fit_lines(found))


@pytest.mark.parametrize(("options", "said"), [
    ({"rule": "our"}, "Did you mean `ours`?"),
    ({"methods": ["ties", "line"]}, "`line`: no such columns. Did you mean `linear`?"),
    ({"sets": "gone.csv"}, "gone.csv: cannot be read"),
    ({"sets": "table.csv"}, "table.csv: not a table of sets"),
    ({"sets": "sets.csv", "rule": "published"}, "--sets"),
    ({"config": "b16"}, "no column `config`"),
    ({"base_scores": "table.csv:zero"}, "of its own"),
    ({"path": "gone.csv"}, "gone.csv: cannot be read"),
    ({"path": "sets.csv"}, "`task3`: got `task02`"),
    ({"path": "gaps.csv"}, "--drop-missing"),
])
def test_a_bad_fit_leaves_nothing(place, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    options = {k: Path(v) if k in ("sets", "path") else v for k, v in options.items()}
    with pytest.raises(RecipeError) as error:
        fit_table(**({"path": Path("table.csv")} | options), output=tmp_path / "deep" / "predictor.json")
    assert said in str(error.value), str(error.value)
    assert not list(tmp_path.iterdir()) and sorted(place.iterdir()) == before


def test_outputs_that_cannot_be_written(place, fitted, metrics, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("here")
    ready = (place / "predictor.json", metrics)
    commands: list[Callable[[Path], object]] = [
        lambda output: fit_table(place / "table.csv", output=output),
        lambda output: predict_file(*ready, None, None, None, output),
        lambda output: suggest_file(*ready, 3, None, None, None, output)]
    begun = []
    monkeypatch.setattr(fitting, "make_predictor", lambda *a, **k: begun.append(a))
    for command in commands:
        with pytest.raises(OutputError, match="is a folder"):
            command(tmp_path)
        with pytest.raises(OutputError, match="nothing can be written"):
            command(tmp_path / "file" / "deep" / "out.json")
    assert not begun and [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "here"


def test_a_fit_that_breaks_off_leaves_no_predictor(place, tmp_path, monkeypatch):
    """Not while tasks are left out; where only a picture cannot be written, what was learnt is kept, whole."""
    (tmp_path / "p-tasks.png").mkdir()
    with pytest.raises(OutputError, match=r"p-tasks\.png"):
        fit_table(place / "table.csv", methods=["ties"], draws=0, output=tmp_path / "p.json")
    assert Predictor.load(tmp_path / "p.json").trials
    for path in tmp_path.iterdir():
        (path.rmdir if path.is_dir() else path.unlink)()
    monkeypatch.setattr(fitting, "trials", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fit_table(place / "table.csv", output=tmp_path / "predictor.json")
    assert not list(tmp_path.iterdir())


# ---- predict and suggest ---------------------------------------------------------------------------------------------


def test_predictions_of_metrics(place, fitted, metrics, tmp_path):
    found = predict_file(place / "predictor.json", metrics, None, None, None, tmp_path / "predictions.json")
    assert found == Predictions.load(tmp_path / "predictions.json") and len(found.predictions) == 56
    assert found.made_from == {"predictor": file_digest(place / "predictor.json"), "metrics": file_digest(metrics)}
    assert {p.unseen for p in found.predictions} == {0, 1, 2} and found.level == 0.9
    table = read_table(place / "table.csv")
    wanted = estimates(fitted.predictor, renamed(table, [*table.tasks[:2], *(f"new{i}" for i in range(6))]))[0]
    for i, p in enumerate(found.predictions[::2]):
        assert p.method == "ties" and (p.score is None) == bool(wanted.why_not[i])
        assert p.score is None or p.score == pytest.approx(wanted.score[i], abs=1e-12)
    lines = words.prediction_lines(found)
    answered = sum(p.score is not None for p in found.predictions)
    assert lines[-1].startswith(f"{answered} of 56 answered")
    scores = [max(p.score or -1.0 for p in found.predictions[i:i + 2]) for i in range(0, 56, 2)]
    told = [float(re.search(r": \S+ (\d\.\d+) \[", line)[1]) for line in lines[1:21]]
    assert told == [pytest.approx(s, abs=6e-4) for s in sorted(scores)[::-1][:20]] and lines[21].startswith("and 8 more pairs")
    few = found.model_copy(update={"predictions": found.predictions[:6]})
    assert [line for line in words.prediction_lines(few) if line.startswith("task0")] == [
        f"{p.task1} + {p.task2}" for p in sorted(few.predictions[::2], key=lambda p: -max(
            q.score or -1.0 for q in few.predictions if (q.task1, q.task2) == (p.task1, p.task2)))]


def test_outcomes_of_a_query_are_not_looked_at(place, fitted, tmp_path):
    table = read_table(place / "table.csv")
    altered = replace(table, outcomes={"ties": 1 - table.outcomes["ties"], "other": table.outcomes["linear"]})
    write_table(tmp_path / "altered.csv", altered)
    write_table(tmp_path / "bare.csv", replace(table, outcomes={}))
    asked = [predict_file(place / "predictor.json", path, ["ties"], None, None, tmp_path / "out.json").predictions
             for path in (place / "table.csv", tmp_path / "altered.csv", tmp_path / "bare.csv")]
    assert asked[0] == asked[1] == asked[2] and {p.method for p in asked[0]} == {"ties"}


def test_reasons_are_numbered_once(place, fitted, tmp_path):
    predictions = predict_file(place / "predictor.json", place / "gaps.csv", None, None, None, tmp_path / "out.json")
    text = "\n".join(words.prediction_lines(predictions))
    assert text.count(f"(1) cannot say: {DISTANCE} is missing") == 1 and "measured by `measure --data`" in text
    assert "52 of 56 answered; of these 52 with both models in the table, 0 with one, 0 with none." in text
    silent = [p for p in predictions.predictions if p.cannot_say]
    text = "\n".join(words.prediction_lines(predictions.model_copy(update={"predictions": silent})))
    assert len(silent) == 4 and text.count("cannot say (1)") == 4 and text.count("(1) cannot say:") == 1


def test_suggestions_of_metrics(place, fitted, metrics, tmp_path):
    found = suggest_file(place / "predictor.json", metrics, 2, ["linear"], None, None, tmp_path / "suggestion.json")
    assert found == Suggestion.load(tmp_path / "suggestion.json") and {s.method for s in found.best} == {"linear"}
    said = predict_file(place / "predictor.json", metrics, ["linear"], None, None, tmp_path / "p.json").predictions
    best = max((p for p in said if p.score is not None), key=lambda p: p.score or 0.0)
    assert found.best[0].tasks == [best.task1, best.task2] and found.best[0].score == pytest.approx(best.score)
    assert set(found.made_from) == {"predictor", "metrics"}
    lines = words.suggestion_lines(found)
    assert lines[0].startswith("Best sets of 2 (all 28 sets)") and f"{best.task1}, {best.task2}" in lines[1]


@pytest.mark.parametrize(("files", "how", "error", "said"), [
    (("metrics.json", "predictor.json"), {}, RecipeError, "metrics.json holds metrics; wanted a predictor"),
    (("predictor.json", "predictor.json"), {}, RecipeError, "predictor.json is a predictor; wanted the metrics"),
    (("table.csv", "metrics.json"), {}, CorruptedError, "table.csv: not a valid Predictor"),
    (("gone.json", "metrics.json"), {}, RecipeError, "gone.json: no such file. Wanted predictor.json"),
    (("predictor.json", "gone.json"), {}, RecipeError, "gone.json: no such file. Wanted metrics.json"),
    (("predictor.json", "gone.csv"), {}, RecipeError, "gone.csv: cannot be read"),
    (("predictor.json", "sets.csv"), {}, RecipeError, "`task3`: got `task02`"),
    (("predictor.json", "list.json"), {}, RecipeError, "list.json: neither metrics.json"),
    (("list.json", "metrics.json"), {}, CorruptedError, "not a valid Predictor"),
    (("predictor.json", "metrics.json"), {"methods": ["tie"]}, RecipeError, "Did you mean `ties`?"),
    (("predictor.json", "metrics.json"), {"base": "table.csv:x"}, RecipeError, "for CSV tables"),
    (("predictor.json", "metrics.json"), {"config": "b16"}, RecipeError, "for CSV tables"),
    (("predictor.json", "table.csv"), {"config": "b16"}, RecipeError, "no column `config`"),
])
def test_wrong_files_in_wrong_places(place, fitted, metrics, tmp_path, monkeypatch, files, how, error, said):
    (place / "list.json").write_text("[1, 2]")
    monkeypatch.chdir(place)
    rest = (how.get("methods"), how.get("base"), how.get("config"), tmp_path / "deep" / "out.json")
    for ask in (lambda *a: predict_file(*a), lambda one, two, *a: suggest_file(one, two, 3, *a)):
        with pytest.raises(error) as raised:
            ask(Path(files[0]), Path(files[1]), *rest)
        assert isinstance(raised.value, AnabranchError) and said in str(raised.value), str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_published_rule_from_file_to_file(place, metrics, tmp_path):
    found = fit_table(place / "table.csv", "published", ["ties"], draws=0, output=tmp_path / "p.json")
    assert found.predictor.rule == "published" and {t.rule for t in found.predictor.trials} == {"published"}
    assert list(fitting.fingerprint(found.predictor)[1]) == ["ties"] and words.fit_lines(found)
    said = predict_file(tmp_path / "p.json", metrics, None, None, None, tmp_path / "out.json")
    assert said.rule == "published" and any(p.score is not None for p in said.predictions)
    assert words.prediction_lines(said)[-1].count("answered") == 1
    with pytest.raises(RecipeError, match="--rule ours"):
        suggest_file(tmp_path / "p.json", metrics, 3, None, None, None, tmp_path / "s.json")
    assert read_predictor(tmp_path / "p.json", ["ties"]).published[0].method == "ties"


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture()
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`anabranch mergeability ...` in this process: exit code, what it said, what it complained of."""
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anabranch", "mergeability", *map(str, arguments)])
        code: object = 0
        try:
            with commands_built_once():
                cli.main()
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return int(str(code or 0)), said.out, said.err
    return call


def test_three_commands(place, metrics, tmp_path, command):
    p, out = tmp_path / "predictor.json", tmp_path / "out.json"
    table, sets = place / "table.csv", place / "sets.csv"
    code, said, _ = command("fit", table, "--methods", "ties,", "--draws", 0, "--sets", sets, "-o", p)
    assert code == 0 and "28 pairs of 8 tasks, 1 merge methods" in said and "noise1, noise2" in said
    row = re.search(r"^  ours +(\S+) +(\S+)$", said, re.M)
    assert row and float(row[1]) == pytest.approx(Predictor.load(p).trials[0].r, abs=6e-4) and "Measured sets" in said
    assert all(f"predictor-{name}.png" in said for name in ("coefficients", "measured", "tasks"))
    code, said, _ = command("predict", p, metrics, "-o", out)
    assert code == 0 and "Best first" in said and "28 answered" in said and f"written: {out}" in said
    code, said, _ = command("suggest", p, metrics, "--k", 3, "-o", out)
    assert code == 0 and "Best sets of 3 (all 56 sets)" in said and Suggestion.load(out).k == 3


def test_commands_complain_in_one_message(place, fitted, metrics, tmp_path, command):
    p, t = place / "predictor.json", place / "table.csv"
    for arguments, words_ in [
            (("fit", tmp_path / "gone.csv"), "RecipeError: "), (("fit", t, "--rule", "best"), "--rule: got `best`"),
            (("fit", t, "--methods", " , "), "--methods: no name given"), (("fit", t, "--methods", "linen"), "`linear`"),
            (("fit", place / "gaps.csv"), "--drop-missing"), (("fit", t, "--draws", "-1"), "--draws"),
            (("fit", t, "-o", tmp_path), "is a folder"), (("fit", t, "-o", t / "x.json"), "nothing can be written"),
            (("predict", metrics, p), "The predictor comes first"), (("predict", p, p), "is a predictor"),
            (("suggest", p, metrics, "--k", 99), "--k 99: wanted 2 to 8"), (("suggest", p, metrics), "--k"),
            (("suggest", p, metrics, "--k", 3, "--methods", "tsv"), "knows no such merge method")]:
        output = () if "-o" in arguments else ("-o", tmp_path / "deep" / "out.json")
        code, _, complaint = command(*arguments, *output)
        assert code == 2 and words_ in complaint and "Traceback" not in complaint, (arguments, complaint)
    assert not list(tmp_path.iterdir())


def test_a_command_in_a_process_of_its_own(place, fitted, tmp_path, command):
    table, two = place / "table.csv", tmp_path / "two.json"
    done = anabranch("mergeability", "predict", place / "predictor.json", table, "-o", tmp_path / "out.json")
    assert "Best first" in done.stdout and json.loads((tmp_path / "out.json").read_text())["rule"] == "ours"
    code, _, complaint = command("predict", table, table, "-o", two)
    assert code == 2 and "Traceback" not in complaint and not two.exists()


# ---- the study's own table -------------------------------------------------------------------------------------------


def study(config: str | None = None, folder: Path = SHARED) -> Table:
    found = read_table(folder / "pairs.csv", base_scores=f"{SHARED / 'tasks.csv'}:sgd_acc_b16", config=config)
    found.metrics.pop(fitting.REDUNDANT)
    table, methods, dropped = complete(found, STUDY, drop_missing=True)
    assert (len(table), methods, dropped) == (185, STUDY, 5)  # as published
    return table


@needs_data
def test_on_the_study_what_tasks_never_seen_are_predicted_like():
    found, pairs = trials(study(), STUDY, draws=0, controls=False)
    assert [(t.method, t.rule, t.unseen, t.folds) for t in found] == [(m, "ours", *n) for n in ((1, 20), (0, 5)) for m in STUDY]
    found = found[:5]
    assert np.mean([t.r for t in found]) >= 0.80
    assert 0.85 <= np.mean([t.coverage for t in found]) <= 0.95
    assert all(t.width < t.naive_width and 0.8 < t.answered <= 1 for t in found)
    assert all(len(p.measured) == 2 * 185 for p in pairs.values())


@needs_data
def test_on_the_study_several_tasks_left_out_at_once(monkeypatch):
    monkeypatch.setattr(trial, "one_left_out", lambda table: [])
    monkeypatch.setattr(trial, "pairs_left_out", lambda table: [])
    found, pairs = trials(study(), ["ties"], draws=1)
    assert [(t.rule, t.unseen, t.folds) for t in found] == [
        (rule, 2, 1) for rule in ("ours", "ours without task effects", "published", "shuffled")]
    assert found[0].r == found[1].r and found[0].coverage is not None and not pairs


@needs_data
def test_another_config_is_read_alike(tmp_path):
    """A second backbone's table brings no more than another name."""
    text = (SHARED / "pairs.csv").read_text()
    (tmp_path / "pairs.csv").write_text(text.replace("b16_adamw,", "b32_adamw,"))
    one, two = study("b16_adamw"), study("b32_adamw", tmp_path)
    assert make_predictor(one, ["tsv"], cases=(1,)) == make_predictor(two, ["tsv"], cases=(1,))
    with pytest.raises(RecipeError, match="Did you mean `b32_adamw`"):
        study("b16_adamw", tmp_path)
    head, *rows = text.splitlines()
    (tmp_path / "pairs.csv").write_text("\n".join([head, *rows, *(r.replace("b16_adamw,", "b32_adamw,") for r in rows)]) + "\n")
    assert np.array_equal(study("b32_adamw", tmp_path).single, one.single)
    with pytest.raises(RecipeError, match="rows of 2 configs"):
        study(None, tmp_path)


# ---- what may not be mistaken ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["fit", "predict", "suggest", "sets"])
def test_no_command_replaces_what_it_reads(place, metrics, tmp_path, what, command):
    files = {}
    for name, source in (("table.csv", place / "table.csv"), ("p.json", place / "predictor.json"), ("m.json", metrics)):
        files[name] = tmp_path / name
        files[name].write_bytes(source.read_bytes())
    files["sets.csv"] = tmp_path / "sets.csv"
    files["sets.csv"].write_text("task1,task2,method,score1,score2\n")
    arguments, output = {
        "fit": (("fit", files["table.csv"]), "table.csv"), "predict": (("predict", files["p.json"], files["m.json"]), "m.json"),
        "suggest": (("suggest", files["p.json"], files["m.json"], "--k", 3), "p.json"),
        "sets": (("fit", files["table.csv"], "--sets", files["sets.csv"]), "sets.csv")}[what]
    before = {name: path.read_bytes() for name, path in files.items()}
    code, _, complaint = command(*arguments, "-o", tmp_path / "." / output)
    assert code == 2 and "would replace" in complaint
    assert before == {name: path.read_bytes() for name, path in files.items()}


def test_another_model_of_the_same_name_is_not_taken_for_the_one_that_was_seen(table, tmp_path):
    predictor = make_predictor(table, ["ties"])
    assert {p.unseen for p in predict(predictor, table)} == {0}
    base = table.base.copy()
    base[table.first == 2, 0] += 0.01
    base[table.second == 2, 1] += 0.01
    other = replace(table, base=base)
    found = predict(predictor, other)
    assert {p.unseen for p in found if table.tasks[2] in (p.task1, p.task2)} == {1}
    assert {p.unseen for p in found if table.tasks[2] not in (p.task1, p.task2)} == {0}
    named = [replace(other, tasks=["new" if t == table.tasks[2] else t for t in table.tasks]), other]
    assert np.array_equal(*(estimates(predictor, t)[0].score for t in named))  # nor does it get that one's effects
    assert [table.tasks[2] in line for line in fitting._renamed(predictor, other)] == [True]
    assert not fitting._renamed(predictor, table)


def test_what_moved_a_prediction_adds_up(table):
    predictor = make_predictor(table, ["ties"])
    e, own = estimates(predictor, table)[0], predictor.ours[0]
    middle = own.ceiling - math.exp(own.intercept)
    assert np.allclose(sum(e.parts.values()), e.score - middle, atol=1e-12)


def test_own_models_that_did_not_learn_are_refused_by_name(table):
    single = table.single.copy()
    single[table.first == 3, 0] = single[table.second == 3, 1] = 1e-4
    with pytest.raises(RecipeError, match=f"more than 3 times .* on {table.tasks[3]}. That model did not learn"):
        complete(replace(table, single=single), None, drop_missing=False)


@pytest.mark.parametrize("spoil", [
    lambda v: v["ours"][0]["beta"].pop(), lambda v: v["columns"].clear(), lambda v: v["columns"][0]["knots"].pop(),
    lambda v: v["columns"][0]["knots"].reverse(), lambda v: v["ours"][0].update(ceiling=math.inf)])
def test_a_predictor_that_does_not_fit_together_is_refused(fitted, place, tmp_path, spoil):
    value = json.loads((place / "predictor.json").read_text())
    spoil(value)
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(CorruptedError, match="not a valid Predictor"):
        read_predictor(tmp_path / "p.json")


def test_json_nested_without_end_is_refused(tmp_path):
    (tmp_path / "p.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(CorruptedError, match="nested without end"):
        read_predictor(tmp_path / "p.json")
