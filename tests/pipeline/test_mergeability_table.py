"""Tables of pairs as files: what is read, what is refused, and that all problems come in one message."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anabranch.errors import OutputError, RecipeError
from anabranch.mergeability.artifacts import MeasuredModel, MeasuredPair, Metrics
from anabranch.mergeability.table import MeasuredSet, read_sets, read_table, table_of_metrics, write_table
from planted_pairs import planted

SCORES = "single_score1,single_score2,base_score1,base_score2,ties_score1,ties_score2"
GOOD = f"""task1,task2,distance,{SCORES}
a,b,1.5,0.8,0.9,0.4,0.5,0.7,0.72
a,c,,0.8,0.7,0.4,0.3,0.6,
b,c,-2e-3,0.9,0.7,0.5,0.3,0.9,0.35
"""


def written(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path, **how: str) -> list[str]:
    """The message's lines: its title, then the problems."""
    with pytest.raises(RecipeError) as error:
        read_table(path, **how)
    return str(error.value).splitlines()


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_what_a_table_says(tmp_path):
    table = read_table(written(tmp_path, GOOD))
    assert table.tasks == ["a", "b", "c"]
    assert [table.pair(i) for i in range(3)] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(table.metrics) == ["distance"] and table.methods == ["ties"]
    assert np.array_equal(table.metrics["distance"], [1.5, math.nan, -2e-3], equal_nan=True)
    assert table.single.tolist() == [[0.8, 0.9], [0.8, 0.7], [0.9, 0.7]]
    assert table.base.tolist() == [[0.4, 0.5], [0.4, 0.3], [0.5, 0.3]]
    assert np.allclose(table.kept("ties")[[0, 2]], [[0.875, 0.8], [1.0, 0.5]])
    assert np.allclose(table.normalised("ties")[[0, 2]], [0.8375, 0.75]) and np.isnan(table.normalised("ties")[1])
    assert np.allclose(table.raw("ties")[[0, 2]], [0.71, 0.625]) and np.isnan(table.raw("ties")[1])


def test_some_of_its_pairs(tmp_path):
    table = read_table(written(tmp_path, GOOD))
    assert table.touches([0]).tolist() == [1, 1, 0] and table.touches([1, 2]).tolist() == [1, 1, 2]
    part = table.take(table.touches([0]) == 0)
    assert (len(part), part.pair(0), part.tasks) == (1, ("b", "c"), ["a", "b", "c"])
    assert part.metrics["distance"].tolist() == [-2e-3] and part.normalised("ties").tolist() == pytest.approx([0.75])


def test_there_and_back(tmp_path):
    rng = np.random.default_rng(0)
    table = planted(7, methods=("ties", "linear"))
    wide = {f"m{i}": rng.standard_normal(len(table)) * 10.0 ** rng.integers(-30, 30, len(table)) for i in range(4)}
    wide["m0"][[2, 5]] = math.nan
    names = ['with "quotes"', "a, comma", "ünï", "line\nbreak", "1", "two words", "task1"]
    table = replace(table, metrics={**table.metrics, **wide}, tasks=names)
    table.outcomes["ties"][3, 1] = table.base[4, 0] = math.nan
    write_table(tmp_path / "new" / "table.csv", table)
    back = read_table(tmp_path / "new" / "table.csv")
    assert [back.pair(i) for i in range(len(back))] == [table.pair(i) for i in range(len(table))]
    pairs = [(table.single, back.single), (table.base, back.base)]
    pairs += [(table.metrics[m], back.metrics[m]) for m in table.metrics] + [(table.outcomes[m], back.outcomes[m])
                                                                            for m in table.outcomes]
    assert back.metrics.keys() == table.metrics.keys() and back.outcomes.keys() == table.outcomes.keys()
    for old, new in pairs:
        assert np.array_equal(np.isnan(old), np.isnan(new))
        known = ~np.isnan(old)
        assert np.all(np.abs(new - old)[known] <= 1e-11 * np.abs(old)[known])
    first = (tmp_path / "new" / "table.csv").read_bytes()
    write_table(tmp_path / "again.csv", back)
    assert (tmp_path / "again.csv").read_bytes() == first


def test_what_is_known_of_no_pair_is_missing(tmp_path):
    table = read_table(written(tmp_path, "task1,task2\na,b\n"))
    assert np.isnan(table.single).all() and np.isnan(table.base).all() and not table.metrics and not table.outcomes
    write_table(tmp_path / "out.csv", table)
    assert np.isnan(read_table(tmp_path / "out.csv").base).all()


def test_published_names_mark_of_order_and_blanks(tmp_path):
    ours = read_table(written(tmp_path, GOOD))
    text = "\ufeff" + GOOD.replace("_score", "_acc").replace("task1", " task1 ").replace("a,b", " a, b ") + "\n,,,,,,,,\n"
    theirs = read_table(written(tmp_path, text.replace("\n", "\r\n"), "published.csv"))
    assert theirs.tasks == ours.tasks and theirs.methods == ["ties"] and list(theirs.metrics) == ["distance"]
    assert np.array_equal(theirs.outcomes["ties"], ours.outcomes["ties"], equal_nan=True)
    assert np.array_equal(theirs.single, ours.single) and np.array_equal(theirs.base, ours.base)


def test_a_metric_whose_name_ends_like_a_score_is_a_metric(tmp_path):
    """cross_task_score1 of metrics.py: a ratio, which may lie above 1."""
    text = GOOD.replace(",distance,", ",cross_task_score1,cross_task_score2,").replace("1.5", "1.5,2").replace(
        "c,,", "c,,,").replace("-2e-3", "0.1,0.2")
    table = read_table(written(tmp_path, text))
    assert table.methods == ["ties"] and list(table.metrics) == ["cross_task_score1", "cross_task_score2"]
    assert table.metrics["cross_task_score2"][0] == 2.0


def test_one_config_of_several(tmp_path):
    lines = GOOD.splitlines()
    several = "\n".join([f"config,{lines[0]}", *(f"small,{row}" for row in lines[1:]),
                         *(f"large,{row.replace('0.8', '0.85')}" for row in lines[1:])])
    path = written(tmp_path, several)
    assert read_table(path, config="large").single[0, 0] == 0.85 and len(read_table(path, config="large")) == 3
    assert read_table(path, config="small").single[0, 0] == 0.8
    asked = refusal(path)[0]
    assert "small" in asked and "large" in asked and "--config" in asked
    assert "Did you mean `small`?" in refusal(path, config="smal")[0]
    assert "no column `config`" in refusal(written(tmp_path, GOOD), config="small")[0]
    one = read_table(written(tmp_path, "\n".join(several.splitlines()[:4])))
    assert len(one) == 3 and "config" not in one.metrics


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "said"), [
    ("", ["empty"]),
    ("\n\n", ["empty"]),
    ("task1,task2,distance\n", ["no pairs"]),
    ("task1,other\na,b\n", ["no column `task2`"]),
    ("Task1,task2\na,b\n", ["no column `task1`", "Did you mean"]),
    ("task1,task2,m,m\na,b,1,2\n", ["`m` stands twice"]),
    ("task1,task2,m,\na,b,1,\n", ["column 4 has no name"]),
    (",task1,task2\n0,a,b\n", ["column 1 has no name"]),
    ("task1,task2,m,m1,m2\na,b,1,2,3\n", ["`m` beside `m1` and `m2`"]),
    ("task1,task2,ties_score1\na,b,1\n", ["`ties_score1` without `ties_score2`"]),
    ("task1,task2,ties_acc2\na,b,1\n", ["`ties_acc2` without `ties_acc1`"]),
    ("task1,task2,ties_score1,ties_acc2\na,b,1,1\n", ["`ties_score1` without `ties_score2`", "`ties_acc2` without"]),
    ("task1,task2,ties_score1,ties_score2,ties_acc1,ties_acc2\na,b,1,1,0,0\n", ["`ties_score1` and `ties_acc1` are the same"]),
    ("task1,task2,m\na,b,1\na,c,1,2\na,d\n", ["line 3: 4 cells, the header has 3", "line 4: 2 cells, the header has 3"]),
    ("task1,task2\na,b\nc,d\na,b\n", ["a and b stands 2 times"]),
    ("task1,task2\na,b\nc,d\nb,a\n", ["a and b stands 2 times"]),
    ("task1,task2\na,b\nc,c\n", ["`c` with itself"]),
    ("task1,task2,m\na,,1\n", ["without a name"]),
    ("task1,task2,m\na,b,1\na,c,often\n", ["line 3, `m`: got `often`, wanted a number"]),
    ("task1,task2,m\na,b,nan\n", ["line 2, `m`", "finite"]),
    ("task1,task2,m\na,b,1e999\n", ["line 2, `m`", "finite"]),
    ("task1,task2,ties_score1,ties_score2\na,b,0.5,1.01\n", ["line 2: ties_score2 is 1.01, wanted 0 to 1"]),
    ("task1,task2,base_score1,base_score2\na,b,-0.1,0.5\n", ["line 2: base_score1 is -0.1, wanted 0 to 1"]),
    ("task1,task2,single_score1,single_score2\na,b,0,0.5\n", ["single_score1 is 0, wanted above 0 to 1"]),
    ("task1,task2,single_acc1,single_acc2\na,b,0.5,0.5\nc,a,0.5,0.6\n", ["single score of a is 0.5 in one row and 0.6"]),
    ("task1,task2,base_score1,base_score2\na,b,0.5,0.5\nc,b,0.5,0.6\n", ["base score of b is 0.5 in one row and 0.6"]),
])
def test_what_is_no_table(tmp_path, text, said):
    lines = refusal(path := written(tmp_path, text))
    assert str(path) in lines[0]
    for words in said:
        assert any(words in line for line in lines), (words, lines)


def test_a_base_that_scores_nothing_and_a_merge_that_forgets_all_are_fine(tmp_path):
    text = f"task1,task2,{SCORES}\na,b,1,1,0,0,0,1\n"
    assert read_table(written(tmp_path, text)).outcomes["ties"].tolist() == [[0.0, 1.0]]


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"task1,task2\na,\xff\xfe\n")
    for path, word in [(tmp_path / "binary.csv", "not a CSV"), (tmp_path / "gone.csv", "cannot be read"),
                       (tmp_path, "cannot be read")]:
        assert word in refusal(path)[0] and str(path) in refusal(path)[0]


def test_all_problems_in_one_message(tmp_path):
    text = f"""task1,task2,m,{SCORES}
a,b,what,0.8,0.9,0.4,0.5,0.7,1.72
c,c,1,0.8,0.8,0.4,0.4,0.6,0.6
b,a,1,0.9,0.7,0.5,0.4,0.9,0.35
"""
    lines = refusal(written(tmp_path, text), base_scores=f"{tmp_path / 'gone.csv'}x")
    for words in ("got `what`", "`c` with itself", "a and b stands 2 times", "ties_score2 is 1.72", "single score of a",
                  "FILE:COLUMN", "of its own"):
        assert sum(words in line for line in lines) == 1, (words, lines)


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path):
    rows = "".join(f"t{i},t{i},1\n" for i in range(30))
    lines = refusal(written(tmp_path, "task1,task2,m\n" + rows))
    assert len(lines) == 14 and lines[-1].strip() == "- and 18 more" and "t11" in lines[-2]


def test_a_column_of_words_is_told_once(tmp_path):
    rows = "".join(f"t{i},t{i + 1},word\n" for i in range(30))
    lines = refusal(written(tmp_path, "task1,task2,m\n" + rows))
    assert len(lines) == 3 and "line 2, `m`: got `word`" in lines[1] and "29 more lines of `m`" in lines[2]


# ---- base scores from another file -----------------------------------------------------------------------------------

BARE = "task1,task2,single_acc1,single_acc2\na,b,0.8,0.9\nc,a,0.7,0.8\n"


def test_base_scores_of_another_file(tmp_path):
    written(tmp_path, "task,order,zero_shot\nb,0,0.2\na,1,0.1\nunused,2,0.9\nc,3,0.3\n", "tasks.csv")
    table = read_table(written(tmp_path, BARE), base_scores=f"{tmp_path / 'tasks.csv'}:zero_shot")
    assert table.base.tolist() == [[0.1, 0.2], [0.3, 0.1]]
    empty = written(tmp_path, "task1,task2,base_score1,base_score2\na,b,,\nc,a,,\n", "empty.csv")
    assert read_table(empty, base_scores=f"{tmp_path / 'tasks.csv'}:zero_shot").base.tolist() == table.base.tolist()


@pytest.mark.parametrize(("spec", "said"), [
    ("{folder}/tasks.csv", "FILE:COLUMN"),
    ("{folder}/gone.csv:zero_shot", "cannot be read"),
    ("{folder}/tasks.csv:zero", "no column `zero`"),
    ("{folder}/other.csv:zero_shot", "no column `task`"),
    ("{folder}/some.csv:zero_shot", "no zero_shot for b, c"),
    ("{folder}/words.csv:zero_shot", "got `low`"),
    ("{folder}/twice.csv:zero_shot", "more than one row of a"),
    ("{folder}/large.csv:zero_shot", "base_score1 is 12, wanted 0 to 1"),
])
def test_base_scores_that_cannot_be_used(tmp_path, spec, said):
    tasks = "task,zero_shot\na,0.1\nb,0.2\nc,0.3\n"
    for name, text in {"tasks": tasks, "other": "name,zero_shot\na,1\n", "some": "task,zero_shot\na,0.1\nb,\n",
                       "words": tasks.replace("0.3", "low"), "twice": tasks + "a,0.4\n",
                       "large": tasks.replace("0.1", "12")}.items():
        written(tmp_path, text, f"{name}.csv")
    lines = refusal(written(tmp_path, BARE), base_scores=spec.format(folder=tmp_path))
    assert any(said in line for line in lines), lines


def test_base_scores_do_not_replace_those_of_the_table(tmp_path):
    written(tmp_path, "task,zero_shot\na,0.1\nb,0.2\nc,0.3\n", "tasks.csv")
    lines = refusal(written(tmp_path, GOOD), base_scores=f"{tmp_path / 'tasks.csv'}:zero_shot")
    assert any("of its own" in line for line in lines)


# ---- from metrics.json -----------------------------------------------------------------------------------------------


def measured(**models: tuple[float | None, float | None]) -> list[MeasuredModel]:
    return [MeasuredModel(task=task, folder=f"models/{task}", sha256="0" * 64, single_score=own, base_score=base)
            for task, (own, base) in models.items()]


def test_from_metrics():
    found = Metrics(base="b", models=measured(z=(0.9, 0.5), a=(0.8, None), m=(None, 0.2)), settings={}, pairs=[
        MeasuredPair(task1="z", task2="a", metrics={"distance": 1.0, "overlap": 0.5}),
        MeasuredPair(task1="z", task2="m", metrics={"overlap": 0.25}),
        MeasuredPair(task1="a", task2="m", metrics={"distance": 3.0, "late": 7.0})])
    table = table_of_metrics(found)
    assert table.tasks == ["z", "a", "m"] and [table.pair(i) for i in range(3)] == [("z", "a"), ("z", "m"), ("a", "m")]
    nan = math.nan
    for name, wanted in {"distance": [1, nan, 3], "overlap": [0.5, 0.25, nan], "late": [nan, nan, 7]}.items():
        assert np.array_equal(table.metrics[name], wanted, equal_nan=True), name
    assert np.array_equal(table.single, [[0.9, 0.8], [0.9, nan], [0.8, nan]], equal_nan=True)
    assert np.array_equal(table.base, [[0.5, nan], [0.5, 0.2], [nan, 0.2]], equal_nan=True)
    assert table.methods == []


def test_metrics_without_pairs_or_of_unknown_models():
    with pytest.raises(RecipeError, match="no pair"):
        table_of_metrics(Metrics(base="b", models=measured(a=(1, 1)), pairs=[], settings={}))
    with pytest.raises(RecipeError, match="ghost"):
        table_of_metrics(Metrics(base="b", models=measured(a=(1, 1), c=(1, 1)), settings={}, pairs=[
            MeasuredPair(task1="a", task2="ghost", metrics={})]))


# ---- sets ------------------------------------------------------------------------------------------------------------


def test_measured_sets(tmp_path):
    rows = "0,a,b,c,ties,0.5,0.25,1,0.1\n1, b ,c,d,linear,0,1,0.5,0.2\n"
    theirs = read_sets(written(tmp_path, "subset_id,task1,task2,task3,method,acc1,acc2,acc3,published_score\n" + rows))
    assert theirs == [MeasuredSet(("a", "b", "c"), "ties", (0.5, 0.25, 1.0)),
                      MeasuredSet(("b", "c", "d"), "linear", (0.0, 1.0, 0.5))]
    ours = read_sets(written(tmp_path, "id,task1,task2,task3,method,score1,score2,score3,more\n" + rows))
    assert ours == theirs


@pytest.mark.parametrize(("text", "said"), [
    ("task1,method,score1\na,ties,1\n", ["task1, task2"]),
    ("task1,task2,score1\na,b,1\n", ["`method`", "`score2`"]),
    ("task1,task3,method,score1,score2\na,b,ties,1,1\n", ["`task2`"]),
    ("task1,task2,method,score1,score2\na,b,ties,1,much\na,c,ties,2,-1\n", ["`much`", "line 3, `score1`", "line 3, `score2`"]),
    ("task1,task2,method,score1,score2\na,b,ties,1,\n", ["line 2, `score2`"]),
    ("", []),
])
def test_what_is_no_table_of_sets(tmp_path, text, said):
    with pytest.raises(RecipeError) as error:
        read_sets(written(tmp_path, text))
    assert all(words in str(error.value) for words in [*said, "table.csv"]), str(error.value)


def test_a_table_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write_table(tmp_path, planted(4))
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob("*.partial"))
