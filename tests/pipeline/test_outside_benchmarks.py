"""Results of lmms-eval and VLMEvalKit, read from small files in the programs' own layouts, and the scripts that make them.

Layouts, read in the programs' sources (never copied):
- lmms-eval, `lmms_eval/loggers/evaluation_tracker.py` (file name and outer keys) and `lmms_eval/evaluator.py` (inner ones);
  metrics and their scales in `lmms_eval/tasks/<task>/*.yaml` and `utils.py`;
- VLMEvalKit, `run.py` (folders), `vlmeval/dataset/utils/multiple_choice.py` report_acc, `utils/llavabench.py`,
  `utils/mmvet.py`, `utils/mathvista.py`, `image_vqa.py` (tables).
"""

import json
import os
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from anabranch.artifacts import Plan, PlanGroup, PlanUnit
from anabranch.cli_outside import benchmarks, export_benchmarks
from anabranch.errors import CorruptedError, ModelError, RecipeError
from anabranch.outside.artifacts import Benchmarks
from anabranch.outside.choices import Choices, read_choices
from anabranch.outside.commands import write_commands
from anabranch.outside.importing import import_scores
from anabranch.outside.subjects import subjects_of
from anabranch.outside.suite import PAPER, PUBLISHED
from anabranch.outside.table import tables

# our column -> (lmms-eval task, metric, value as it stands in the file); in points it is 10 times the place of the column
LMMS = {"SeedBench": ("seedbench", "seed_image,none", 0.1), "MMBench": ("mmbench_en_dev", "gpt_eval_score,none", 20.0),
        "LLaVA-W": ("llava_in_the_wild", "gpt_eval_llava_all,none", 30.0), "MMVet": ("mmvet", "gpt_eval_score,none", 40.0),
        "TextVQA": ("textvqa_val", "exact_match,none", 0.5), "AI2D": ("ai2d", "exact_match,flexible-extract", 0.6),
        "MathVista": ("mathvista_testmini_format", "gpt_eval_score,none", 70.0), "MMMU": ("mmmu_val", "mmmu_acc,none", 0.8)}
AVERAGE = 45.0  # of 10 .. 80


def lmms_file(folder, name, shift=0.0, only=(), drop=(), **changes):
    """A result as lmms-eval writes it; `shift` in points."""
    results, counts = {}, {}
    for column, (task, metric, value) in LMMS.items():
        if (only and column not in only) or column in drop:
            continue
        scale = 100 if value < 1 else 1
        stderr = metric.replace(",", "_stderr,")
        results[task] = {"alias": task, metric: value + shift / scale, stderr: 0.01 if scale == 100 else "N/A",
                         "submission,none": None}
        counts[task] = {"original": 1000, "effective": 1000}
    content = {"results": results, "group_subtasks": {task: [] for task in results}, "configs": {}, "n-samples": counts,
               "versions": dict.fromkeys(results, "Yaml"), "n-shot": dict.fromkeys(results, 0),
               "higher_is_better": {t: {"exact_match": True} for t in results},
               "config": {"model": "qwen2_5_vl", "model_args": f"pretrained=/models/{name}", "limit": None},
               "git_hash": "1a2b3c4", "date": "20260102_030405", "model_source": "qwen2_5_vl", "model_name": f"/models/{name}"}
    content.update(changes)
    path = folder / f"__models__{name}" / "20260102_030405_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def vlm_folder(work, name, shift=0.0, run="T20260102_G1a2b3c4d"):
    """Results as VLMEvalKit writes them: tables in the run's folder, links to them in the model's. Columns' points as LMMS."""
    folder = work / name / run
    folder.mkdir(parents=True)
    share, points = lambda p: repr((p + shift) / 100), lambda p: repr(p + shift)
    tables = {"SEEDBench_IMG_acc.csv": f'"split","Overall","Instance Identity"\n"none","{share(10)}","0.9"\n',
              "MMBench_DEV_EN_acc.csv": f'"split","Overall","AR"\n"dev","{share(20)}","0.9"\n',
              "LLaVABench_score.csv": '"split","Relative Score (main)","VLM Score","GPT4 Score"\n'
                                      f'"overall","{points(30)}","1.0","2.0"\n"conv","99","1.0","2.0"\n',
              "MMVet_gpt-4-turbo_score.csv": f'"Category","tot","acc"\n"rec","187","99"\n"Overall","218","{points(40)}"\n',
              "MMVet_gpt-4-turbo_score_fine.csv": '"Category","tot","acc"\n"Overall","218","99"\n',
              "TextVQA_VAL_acc.csv": f'"Overall"\n"{points(50)}"\n',
              "AI2D_TEST_acc.csv": f'"split","Overall"\n"none","{share(60)}"\n',
              "MathVista_MINI_gpt-4o-mini_score.csv": '"Task&Skill","tot","prefetch","hit","prefetch_rate","acc"\n'
                                                      f'"Overall","1000","1","2","3","{points(70)}"\n"scientific","122","1","2","3","9"\n',
              "MMMU_DEV_VAL_acc.csv": f'"split","Overall"\n"dev","0.99"\n"validation","{share(80)}"\n'}
    for rest, text in tables.items():
        (folder / f"{name}_{rest}").write_text(text)
        os.symlink(folder / f"{name}_{rest}", work / name / f"{name}_{rest}")
    (folder / f"{name}_MMMU_DEV_VAL.xlsx").write_bytes(b"predictions")
    (folder / "status.json").write_text("{}")
    return work / name


@pytest.fixture
def run(tmp_path):
    """A run's folder with a comparison in it: as much of both as names models."""
    folder = tmp_path / "my run; touch x"  # a name that a shell would not leave alone
    base = tmp_path / "base model"
    recipe = {"recipe": {"mixture": {"images": {"max_pixels": 784 * 784}}}, "base": str(base), "base_hash": "b" * 64}
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    Plan(method="merit", seed=0, units=[PlanUnit(unit=f"u{g}", group=g, samples=1, tokens=1, sha256="0") for g in (0, 1)],
         groups=[PlanGroup(group=g, units=1, samples=1, tokens=1, weight=0.5) for g in (0, 1)]).save(folder / "plan.json")
    models = [base, folder / "merged", *(folder / "branches" / k / "model" for k in "01"),
              *(folder / "compare" / arm / f"seed-{s}" / "merged" for arm, s in (("joint", 0), ("merit-3", 0), ("merit-3", 1)))]
    for model in models:
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return folder


def test_the_models_of_a_run_have_names(run):
    subjects = subjects_of(run)
    assert list(subjects.models) == ["base", "joint/seed-0", "merit-3/seed-0", "merit-3/seed-1", "branch-0", "branch-1",
                                     "merged"]
    assert all((path / "config.json").is_file() for path in subjects.models.values())
    with pytest.raises(CorruptedError, match="not a run folder"):
        subjects_of(run.parent)


def test_the_papers_table_is_the_papers():
    """Averages as the paper prints them: Table 2 of arXiv:2606.01717, and the spec's headline results."""
    printed = {"base": 53.7, "joint, 0.5 epochs": 52.7, "joint, 1 epoch": 54.3, "joint, 2 epochs": 54.7,
               "random, 8 groups": 54.5, "MERIT-1D": 55.2, "MERIT-2D": 55.7, "MERIT-3D": 57.0}
    assert printed.keys() == PUBLISHED.keys()
    for name, values in PUBLISHED.items():
        assert len(values) == len(PAPER) == 8
        assert abs(sum(values) / 8 - printed[name]) <= 0.0501, name


def test_both_programs_read_the_same_points(run, tmp_path):
    """Shares of 1 and points of 100, filters, splits, judges and skills: every column comes out as 10 times its place."""
    vlm_folder(tmp_path / "vlm", "base")
    lmms_file(tmp_path / "lmms" / "base", "base")
    found = import_scores(run, {"lmms-eval": [f"base={tmp_path / 'lmms' / 'base'}"],
                                "VLMEvalKit": [f"base={tmp_path / 'vlm' / 'base'}"]}, Choices())
    assert len(found.scores) == 16
    for table in tables(found.scores):
        assert [name for _, name in table.columns] == [b.name for b in PAPER]
        (row,) = table.rows
        assert [row.scores[task] for task, _ in table.columns] == pytest.approx([10.0 * i for i in range(1, 9)])
        assert row.average == pytest.approx(AVERAGE) and not row.missing and not table.absent
    judged = {s.task: (s.judge, s.samples) for s in found.scores if s.judge}
    assert judged == {"MMVet": ("gpt-4-turbo", 218), "MathVista_MINI": ("gpt-4o-mini", 1000)}
    assert {s.program_version for s in found.scores} == {"1a2b3c4", "T20260102_G1a2b3c4d"}
    assert Benchmarks.load(run / "benchmarks.json") == found
    text = (run / "benchmarks.md").read_text()
    assert text.count("| base | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 60.0 | 70.0 | 80.0 | **45.0** |") == 2
    assert "| **54.7** | +1.0 | +0.3 |" in text  # joint, 2 epochs: its eight columns give 54.65
    assert "| MERIT-3D | 70.5 | 80.1 | 52.0 | 37.7 | 75.2 | 62.5 | 35.4 | 42.7 | **57.0** | +3.3 | +2.7 |" in text


def test_differences_seeds_and_what_is_missing(run, tmp_path):
    """joint is 2 points above base, merit-3's seeds 3 and 5; the merged model lacks two benchmarks, so no average has them."""
    shifts = {"base": 0, "joint/seed-0": 2, "merit-3/seed-0": 3, "merit-3/seed-1": 5}
    for name, shift in shifts.items():
        lmms_file(tmp_path / name, name.replace("/", "-"), shift)
    pairs = [f"{name}={tmp_path / name}" for name in shifts]
    table = tables(import_scores(run, {"lmms-eval": pairs}, Choices()).scores)[0]
    assert [(r.arm, r.seeds, round(r.average, 6)) for r in table.rows] == [("base", 1, 45.0), ("joint", 1, 47.0),
                                                                           ("merit-3", 2, 49.0)]
    assert table.rows[2].deviation == pytest.approx(2**0.5)  # of 48 and 50
    assert "| merit-3 (2 seeds) |" in (text := (run / "benchmarks.md").read_text())
    assert re.search(r"\| merit-3 \(2 seeds\) .*\*\*49\.0\*\* ± 1\.4 \| \+4\.0 \| \+2\.0 \|", text)

    lmms_file(tmp_path / "merged", "merged", 1, drop=("MMMU", "AI2D"))
    table = tables(import_scores(run, {"lmms-eval": [f"merged={tmp_path / 'merged'}"]}, Choices()).scores)[0]
    assert len(table.columns) == 8 and table.shared == tuple(LMMS[c][0] for c in LMMS if c not in ("MMMU", "AI2D"))
    (merged,) = [r for r in table.rows if r.arm == "merged"]
    assert merged.missing == ("ai2d", "mmmu_val") and merged.average == pytest.approx((10 + 20 + 30 + 40 + 50 + 70) / 6 + 1)
    text = (run / "benchmarks.md").read_text()
    assert "over 6 of 8 benchmarks" in text and "merged has no AI2D, MMMU" in text


def test_an_average_of_seven_is_not_called_the_papers(run, tmp_path):
    lmms_file(tmp_path / "base", "base", drop=("MMVet",))
    import_scores(run, {"lmms-eval": [f"base={tmp_path / 'base'}"]}, Choices())
    text = (run / "benchmarks.md").read_text()
    assert "Of the paper's eight there is no MMVet" in text and "Published" not in text


def test_a_new_import_replaces_that_model_alone(run, tmp_path):
    for name, shift in (("base", 0), ("merged", 1)):
        lmms_file(tmp_path / name, name, shift)
    import_scores(run, {"lmms-eval": [f"{n}={tmp_path / n}" for n in ("base", "merged")]}, Choices())
    lmms_file(tmp_path / "merged", "merged", 7)
    found = import_scores(run, {"lmms-eval": [f"merged={tmp_path / 'merged'}"]}, Choices())
    assert {(s.model, round(s.score, 6)) for s in found.scores if s.task == "mmvet"} == {("base", 40.0), ("merged", 47.0)}


BROKEN = {
    "no such model": (lambda t: [f"mergd={t}"], "did you mean `?merged"),
    "no name": (lambda t: [str(t)], "wanted NAME=PATH"),
    "nothing there": (lambda t: [f"base={t / 'empty'}"], "no lmms-eval result there"),
    "no JSON": (lambda t: [(t / "x_results.json").write_text("{")] and [f"base={t}"], "not a result of lmms-eval"),
    "unknown task": (lambda t: [f"base={lmms_file(t, 'a', results={'mmstar': {'average,none': 0.5, 'coarse,none': 0.4}})}"],
                     r"`mmstar`: which metric counts\? Found: `average,none`, `coarse,none`.*--skip 'mmstar'"),
    "the judge failed": (lambda t: [f"base={lmms_file(t, 'a', results={'mmvet': {'gpt_eval_score,none': None}})}"],
                         "`mmvet`: which metric counts. Found: no number"),
    "two filters": (lambda t: [f"base={lmms_file(t, 'a', results={'ai2d': {'exact_match,a': .5, 'exact_match,b': .6}})}"],
                    "which metric counts"),
    "a share became points": (lambda t: [f"base={lmms_file(t, 'a', results={'mmmu_val': {'mmmu_acc,none': 41.9}})}"],
                              "41.9 is no share of 1"),
    "points became a share": (lambda t: [f"base={lmms_file(t, 'a', results={'mmvet': {'gpt_eval_score,none': 0.419}})}"],
                              "0.419 looks like a share of 1"),
    "lower is better": (lambda t: [f"base={lmms_file(t, 'a', higher_is_better={'ai2d': {'exact_match': False}})}"],
                        "lower is better"),
    "two models in one folder": (lambda t: [lmms_file(t, "a"), lmms_file(t, "b")] and [f"base={t}"],
                                 "results of several models"),
    "one model under two names": (lambda t: [f"base={lmms_file(t, 'a')}", f"merged={lmms_file(t, 'a')}"],
                                  "both of `/models/a`"),
    "not alike": (lambda t: [f"base={lmms_file(t / 'x', 'a')}",
                             f"merged={lmms_file(t / 'y', 'b', **{'n-samples': {'mmvet': {'effective': 8}}})}"],
                  "not measured alike, number of questions"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_nothing_is_guessed(run, tmp_path, case):
    pairs, message = BROKEN[case]
    with pytest.raises(RecipeError, match=f"(?is){message}"):
        import_scores(run, {"lmms-eval": pairs(tmp_path)}, Choices())
    assert not (run / "benchmarks.json").exists() and not (run / "benchmarks.md").exists()


def test_a_problem_of_many_files_is_told_once(run, tmp_path):
    results = {"mmstar": {"average,none": 0.5}, "mme": {"score,none": 3.0}}
    pairs = [f"{name}={lmms_file(tmp_path / name, name, results=results)}" for name in ("base", "merged", "branch-0")]
    with pytest.raises(RecipeError, match="which metric counts") as error:
        import_scores(run, {"lmms-eval": pairs}, Choices())
    told = str(error.value)
    assert told.count("`mmstar`") == told.count("`mme`") == 1 and told.count("and 2 more: ") == 2
    assert told.count("'TASK=NAME*100' for a share of 1") == 1 and "nothing was imported" not in told
    with pytest.raises(RecipeError, match="Did you mean") as error:
        import_scores(run, {"lmms-eval": [f"mergd={tmp_path}", f"bse={tmp_path}", "foo"]}, Choices())
    assert str(error.value).count("The run's models: base, joint/seed-0") == str(error.value).count("branch-1, merged.") == 1


def test_a_file_that_does_not_say_its_model_is_told_as_such(run, tmp_path):
    path = lmms_file(tmp_path, "a", model_name="", model_source="", config={})
    import_scores(run, {"lmms-eval": [f"base={path}"]}, Choices())
    text = (run / "benchmarks.md").read_text()
    assert "- base: its results do not say which model was evaluated." in text and "not said" not in text


def test_two_results_of_one_task_are_a_choice_of_the_users(run, tmp_path):
    first = lmms_file(tmp_path, "a")
    second = first.with_name("20260203_000000_results.json")
    second.write_text(first.read_text().replace("40.0", "41.0"))
    with pytest.raises(RecipeError, match=r"`mmvet` has two results: 40 in .*0102.* and 41 in .*0203.*--lmms-eval base=FILE"):
        import_scores(run, {"lmms-eval": [f"base={tmp_path}"]}, Choices())
    assert len(import_scores(run, {"lmms-eval": [f"base={second}"]}, Choices()).scores) == 8


def test_metrics_that_the_user_names(run, tmp_path):
    results = {"mmstar": {"average,none": 0.55}, "mme": {"mme_perception_score,none": 1400.0},
               "ai2d": {"exact_match,none": 0.6}}
    path = lmms_file(tmp_path, "a", results=results)
    choices = read_choices(["mmstar=average*100"], ["mme"])
    found = import_scores(run, {"lmms-eval": [f"base={path}"]}, choices)
    assert {s.task: round(s.score, 6) for s in found.scores} == {"ai2d": 60.0, "mmstar": 55.0}
    with pytest.raises(RecipeError, match="no result has pope"):
        import_scores(run, {"lmms-eval": [f"base={path}"]}, read_choices(["mmstar=average*100", "pope=acc"], ["mme"]))
    for wrong in (["mmstar"], ["=x"], ["a=b", "a=c"]):
        with pytest.raises(RecipeError, match="--metric"):
            read_choices(wrong, [])


def test_groups_of_lmms_eval_are_not_tasks(run, tmp_path):
    """mathvista_testmini is a group of three tasks; its own row has no number."""
    results = {"mathvista_testmini": {" ": " ", "alias": "mathvista_testmini"},
               "mathvista_testmini_format": {"alias": " - format", "llm_as_judge_eval,none": 33.0}}
    path = lmms_file(tmp_path, "a", results=results, group_subtasks={"mathvista_testmini": ["mathvista_testmini_format"]})
    found = import_scores(run, {"lmms-eval": [f"base={path}"]}, Choices())
    assert [(s.task, s.score) for s in found.scores] == [("mathvista_testmini_format", 33.0)]


def test_vlmevalkit_folders(run, tmp_path):
    """The model's folder, one run of it, one file; JSON tables; a folder under another name; two judges; datasets whose name
    begins like another's; a table that a later version fills otherwise."""
    top = vlm_folder(tmp_path / "vlm", "mine")
    for place in (top, top / "T20260102_G1a2b3c4d"):
        assert len(import_scores(run, {"VLMEvalKit": [f"base={place}"]}, Choices()).scores) == 8
    (only,) = import_scores(run, {"VLMEvalKit": [f"base={top / 'mine_TextVQA_VAL_acc.csv'}"]}, Choices()).scores
    assert only.score == 50.0

    as_json = tmp_path / "json" / "mine"
    as_json.mkdir(parents=True)
    rows = [{"split": "dev", "Overall": 0.9}, {"split": "validation", "Overall": 0.42}]
    (as_json / "mine_MMMU_DEV_VAL_acc.json").write_text(json.dumps(rows))
    (only,) = import_scores(run, {"VLMEvalKit": [f"base={as_json}"]}, Choices()).scores
    assert only.score == pytest.approx(42.0)

    (as_json / "mine_MMBench_DEV_EN_V11_acc.csv").write_text('"split","Overall"\n"dev","0.7"\n')
    with pytest.raises(RecipeError, match=r"`MMBench_DEV_EN_V11`: which metric counts\? Found: `split=dev\|Overall`"):
        import_scores(run, {"VLMEvalKit": [f"base={as_json}"]}, Choices())
    named = read_choices(["MMBench_DEV_EN_V11=split=dev|Overall*100"], [])
    assert len(import_scores(run, {"VLMEvalKit": [f"base={as_json}"]}, named).scores) == 2

    (as_json / "mine_MMMU_DEV_VAL_acc.json").write_text('[{"split": "validation", "Overall": 42.0}]')
    with pytest.raises(RecipeError, match="42 is no share of 1"):
        import_scores(run, {"VLMEvalKit": [f"base={as_json}"]}, named)

    renamed = tmp_path / "elsewhere"
    top.rename(renamed)
    with pytest.raises(RecipeError, match="named as VLMEvalKit named it"):
        import_scores(run, {"VLMEvalKit": [f"base={renamed}"]}, Choices())

    judges = tmp_path / "judges" / "mine"
    judges.mkdir(parents=True)
    for judge in ("gpt-4-turbo", "gpt-4o"):
        (judges / f"mine_MMVet_{judge}_score.csv").write_text('"Category","tot","acc"\n"Overall","218","40.0"\n')
    with pytest.raises(RecipeError, match="several judges: gpt-4-turbo, gpt-4o"):
        import_scores(run, {"VLMEvalKit": [f"base={judges}"]}, Choices())


def test_hostile_text_stays_text(run, tmp_path):
    """Names in result files are other people's: no Markdown of theirs, no control character, no traceback."""
    path = lmms_file(tmp_path, "a", model_name="</td><script>\x1b[31m|x|", versions={"ai2d": "`|"})
    import_scores(run, {"lmms-eval": [f"base={path}"]}, Choices())
    text = (run / "benchmarks.md").read_text()
    assert "<script>" not in text.replace("\\<", "") and "\x1b" not in text and "\\|x\\|" in text


def test_the_verb(run, tmp_path):
    app = typer.Typer()
    app.command()(benchmarks)
    lmms_file(tmp_path / "r", "base")
    done = CliRunner().invoke(app, [str(run), "--lmms-eval", f"base={tmp_path / 'r'}"])
    assert done.exit_code == 0 and "**45.0**" in done.output
    assert CliRunner().invoke(app, [str(run)]).output == done.output == (run / "benchmarks.md").read_text()
    assert "no benchmarks.json yet" in str(CliRunner().invoke(app, [str(tmp_path)]).exception)
    assert "--metric and --skip go with" in str(CliRunner().invoke(app, [str(run), "--skip", "a"]).exception)


# ---- hostile and broken files ----------------------------------------------------------------------------------------


def lmms_text(tmp_path, text):
    """A file of exactly this text (or these bytes)."""
    path = tmp_path / "x_results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def mmvet(value='"gpt_eval_score,none": 40.0', rest=""):
    return '{"results": {"mmvet": {' + value + "}}" + rest + "}"


@pytest.mark.parametrize("text, message", [
    (mmvet('"gpt_eval_score,none": 40, "gpt_eval_score,none": 90'), "`gpt_eval_score,none` stands twice"),
    (mmvet(rest=', "results": {"mmvet": {"gpt_eval_score,none": 90}}'), "`results` stands twice"),
    (mmvet('"gpt_eval_score,none": 1' + "0" * 400), "Found: no number"),
    (mmvet('"gpt_eval_score,none": NaN'), "Found: no number"),
    (mmvet('"gpt_eval_score,none": "40.0"'), "Found: no number"),
    (mmvet('"gpt_eval_score,none": 4000'), "4000 is more than 100 points"),
    ("[" * 100_000, "not a result"), (b"\xff\xfe\x00", "not a result"), ("[]", "not a result")])
def test_broken_lmms_files_are_one_message(run, tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        import_scores(run, {"lmms-eval": [f"base={lmms_text(tmp_path, text)}"]}, Choices())


@pytest.mark.parametrize("text, message", [
    ('"Category","acc","acc"\n"Overall","30","40"\n', "column's name stands twice"),
    ('"Category","tot","acc"\n"Overall","218","40","41"\n', "more cells"),
    ('"Category","acc"\n"Overall","4_0"\n', "which metric"),
    ('"Category","acc"\n"Overall","inf"\n', "which metric"),
    ('"Category","acc"\n"Overall","140"\n', "more than 100 points"),
    ('"Category","acc"\n"Overall","40\n', "not a table"),
    ('"Category","acc"\n"Overall","40"\n'.encode("utf-16"), "not a table")])
def test_broken_tables_are_one_message(run, tmp_path, text, message):
    file = tmp_path / "m" / "m_MMVet_gpt-4-turbo_score.csv"
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=message):
        import_scores(run, {"VLMEvalKit": [f"base={file.parent}"]}, Choices())


def test_what_is_no_count_is_left_out(run, tmp_path):
    """Negative and absurd numbers of questions; a byte order mark; names that are no Unicode; relative scores above 100."""
    table = tmp_path / "m" / "m_MMVet_gpt-4-turbo_score.csv"
    table.parent.mkdir()
    for count, wanted in (("-5", None), ("1e300", None), ("218", 218)):
        table.write_text(f'\ufeff"Category","tot","acc"\n"Overall","{count}","40"\n')
        (score,) = import_scores(run, {"VLMEvalKit": [f"base={table.parent}"]}, Choices()).scores
        assert score.samples == wanted
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.mkdir()
    lmms_text(odd, "\ufeff" + mmvet(
        rest=', "model_name": "\\ud800", "n-samples": {"mmvet": {"effective": 1' + "0" * 400 + "}}"))
    found = import_scores(run, {"lmms-eval": [f"base={tmp_path}"]}, Choices())
    assert [s.samples for s in found.scores if s.program == "lmms-eval"] == [None] and Benchmarks.load(run / "benchmarks.json")
    path = lmms_file(tmp_path / "w", "w", results={"llava_in_the_wild": {"gpt_eval_llava_all,none": 104.2}})
    assert import_scores(run, {"lmms-eval": [f"merged={path}"]}, Choices()).scores


def test_places_that_cannot_be_read(run, tmp_path):
    os.mkfifo(tmp_path / "a_results.json")
    for place, message in ((tmp_path, "no plain file"), ("~nobody-of-that-name/x", "no lmms-eval result"),
                           ("a" * 5000, "name too long")):
        with pytest.raises(RecipeError, match=message):
            import_scores(run, {"lmms-eval": [f"base={place}"]}, Choices())


def test_a_file_larger_than_any_result_is_not_read(run, tmp_path):
    (tmp_path / "m").mkdir()
    for program, path in (("lmms-eval", tmp_path / "x_results.json"), ("VLMEvalKit", tmp_path / "m" / "m_MMVet_x_score.csv")):
        path.touch()
        os.truncate(path, 10**9)  # a hole
        with pytest.raises(RecipeError, match="1,000,000,000 bytes, more than"):
            import_scores(run, {program: [f"base={path}"]}, Choices())


def test_names_of_metrics_are_no_markdown(run, tmp_path):
    path = lmms_text(tmp_path, mmvet('"gpt_eval_score,x\\n\\n# Ours <script>": 40'))
    import_scores(run, {"lmms-eval": [f"base={path}"]}, Choices())
    text = (run / "benchmarks.md").read_text()
    assert "\n# Ours" not in text and "`gpt_eval_score,x # Ours <script>`" in text


def test_a_folder_may_be_named_from_inside(run, tmp_path, monkeypatch):
    monkeypatch.chdir(vlm_folder(tmp_path, "mine"))
    for place in (".", "T20260102_G1a2b3c4d", "mine_TextVQA_VAL_acc.csv"):
        assert import_scores(run, {"VLMEvalKit": [f"base={place}"]}, Choices()).scores


def test_results_of_another_model_are_noticed(run, tmp_path):
    """One file under two names in two imports; a file that says it is another model's, by path or by our scripts' name."""
    lmms_file(tmp_path / "b", "b")
    import_scores(run, {"lmms-eval": [f"base={tmp_path / 'b'}"]}, Choices())
    with pytest.raises(RecipeError, match="both of `/models/b`"):
        import_scores(run, {"lmms-eval": [f"merged={tmp_path / 'b'}"]}, Choices())
    lmms_file(tmp_path / "c", "c", model_name=str(run / "merged"))
    with pytest.raises(RecipeError, match="which is merged of this run"):
        import_scores(run, {"lmms-eval": [f"base={tmp_path / 'c'}"]}, Choices())
    vlm_folder(tmp_path, "joint.seed-0")
    with pytest.raises(RecipeError, match="which is joint/seed-0 of this run"):
        import_scores(run, {"VLMEvalKit": [f"base={tmp_path / 'joint.seed-0'}"]}, Choices())


def test_two_models_may_have_one_small_table(run, tmp_path):
    """TextVQA's table is one number: two models that have it are no mistake; two with all eight tables are."""
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_TextVQA_VAL_acc.csv").write_text('"Overall"\n"50.0"\n')
    places = {"VLMEvalKit": [f"base={tmp_path / 'a'}", f"merged={tmp_path / 'c'}"]}
    assert len(import_scores(run, places, Choices()).scores) == 2
    for name in ("d", "e"):
        vlm_folder(tmp_path, name)
    with pytest.raises(RecipeError, match="results of base and of merged"):
        import_scores(run, {"VLMEvalKit": [f"base={tmp_path / 'd'}", f"merged={tmp_path / 'e'}"]}, Choices())


def test_scores_of_another_base_do_not_mix(run, tmp_path):
    lmms_file(tmp_path / "b", "b")
    import_scores(run, {"lmms-eval": [f"base={tmp_path / 'b'}"]}, Choices())
    recipe = run / "recipe.json"
    recipe.write_text(recipe.read_text().replace("b" * 64, "c" * 64))
    with pytest.raises(RecipeError, match="run on another base"):
        import_scores(run, {"lmms-eval": [f"merged={lmms_file(tmp_path / 'm', 'm')}"]}, Choices())


def test_the_same_score_of_fewer_questions_is_another_result(run, tmp_path):
    first = lmms_file(tmp_path, "a")
    first.with_name("20260203_000000_results.json").write_text(first.read_text().replace("1000", "8"))
    with pytest.raises(RecipeError, match=r"two results.*other questions"):
        import_scores(run, {"lmms-eval": [f"base={tmp_path}"]}, Choices())


@pytest.mark.parametrize("why", ["a part of the questions", "Beside the paper's eight", "Not every model has MMMU",
                                 "several tasks of"])
def test_the_papers_table_stands_only_beside_its_own_eight(run, tmp_path, why):
    """An average over other benchmarks, or over a part of them, has no figure of the paper's beside it."""
    path = lmms_file(tmp_path / "b", "b")
    content, pairs = json.loads(path.read_text()), [f"base={path}"]
    import_scores(run, {"lmms-eval": pairs}, Choices())
    assert "### Not measured here: the paper's own figures\n" in (run / "benchmarks.md").read_text()
    if "part" in why:
        content["n-samples"]["mmvet"]["effective"] = 8
    elif "Beside" in why:
        content["results"]["MMVet"] = {"acc,none": 50.0}  # not the paper's, whatever its name
    elif "several" in why:
        content["results"]["mathvista_testmini_cot"] = {"gpt_eval_score,none": 30.0}
    else:
        pairs.append(f"merged={lmms_file(tmp_path / 'm', 'm', drop=('MMMU',))}")
    path.write_text(json.dumps(content))
    import_scores(run, {"lmms-eval": pairs}, read_choices(["MMVet=acc"] if "Beside" in why else [], []))
    text = (run / "benchmarks.md").read_text()
    assert why in text and "the average is not the paper's." in text and "arXiv" not in text


# ---- the commands ----------------------------------------------------------------------------------------------------


def run_script(path, folder, **settings):
    """The script with stand-ins for the programs, each of which writes down what it was called with."""
    tools = folder / "tools"
    tools.mkdir()
    calls = folder / "calls"
    for name in ("python3", "torchrun", "anabranch"):
        (tools / name).write_text(f"""#!/bin/bash\n{{ printf '%s\\0' {name} "$@"; echo; }} >> {shlex.quote(str(calls))}\n""")
        (tools / name).chmod(0o755)
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, cwd=folder,
                          env={"PATH": f"{tools}:{os.environ['PATH']}", **settings})
    return done, [line.split("\0") for line in os.fsdecode(calls.read_bytes()).split("\0\n")[:-1]] if calls.exists() else []


@pytest.mark.parametrize("program", ["lmms-eval", "vlmevalkit"])
def test_scripts_are_shell_and_quote_what_they_are_given(run, tmp_path, program):
    told = []
    export_benchmarks(run, tmp_path / "jobs $(touch y)", program, None, told.append)
    (script,) = (tmp_path / "jobs $(touch y)").glob("*.sh")
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert any(str(script) in line for line in told)
    done, calls = run_script(script, tmp_path, VLMEVALKIT=str(tmp_path), GPUS="2", OPENAI_API_KEY="k")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("x")) + list(tmp_path.rglob("y"))  # nothing in a name was run
    names = list(subjects_of(run).models)
    option = {"lmms-eval": "--lmms-eval", "vlmevalkit": "--vlmevalkit"}[program]
    tool, *arguments = calls[-1]
    assert tool == "anabranch" and arguments[:2] == ["benchmarks", str(run)] and arguments[2::2] == [option] * len(names)
    assert [pair.partition("=")[0] for pair in arguments[3::2]] == names
    assert "OPENAI_API_KEY is not set" not in done.stderr


@pytest.mark.parametrize("program", ["lmms-eval", "VLMEvalKit"])
def test_without_a_judge_only_what_needs_none_is_measured_and_it_is_said(run, tmp_path, program):
    """What a judge would have to score is left for a start with the key, and does not count as measured."""
    script = write_commands(subjects_of(run), tmp_path / "jobs", program)[-1]
    judged = {b.name for b in PAPER if program in b.needs_judge}
    done, calls = run_script(script, tmp_path, VLMEVALKIT=str(tmp_path))
    assert done.returncode == 0 and re.search(r"OPENAI_API_KEY is not set: [^;]*are left out now", done.stderr)
    assert all(name in done.stderr for name in judged)
    if program == "VLMEvalKit":
        data = json.loads((tmp_path / "jobs" / "vlmevalkit.here.json").read_text())["data"]
        assert set(data) == {b.dataset for b in PAPER if b.name not in judged}
        return
    wanted = {b.lmms_tasks[0] for b in PAPER if b.name not in judged}
    assert all(set(dict(pairwise(call))["--tasks"].split(",")) == wanted for call in calls[:-1])
    for name in subjects_of(run).models:  # those have results now; the others are run with the key
        lmms_file(tmp_path / "jobs" / "lmms-eval" / name.replace("/", ".") / "plain", name.replace("/", "."))
    (tmp_path / "again").mkdir()
    done, calls = run_script(script, tmp_path / "again", OPENAI_API_KEY="k")
    assert len(calls) == len(subjects_of(run).models) + 1
    others = {b.lmms_tasks[0] for b in PAPER} - wanted
    assert all(set(dict(pairwise(call))["--tasks"].split(",")) == others for call in calls[:-1])


@pytest.mark.parametrize("program", ["lmms-eval", "VLMEvalKit"])
@pytest.mark.parametrize("told", ["ROOT", "RUN and BASE", "from inside"])
def test_scripts_run_where_everything_was_copied_to(run, tmp_path, program, told):
    """The folder that holds run and base is moved; so is that of the scripts, into one that a shell or JSON would trip on."""
    write_commands(subjects_of(run), tmp_path / "jobs", program)
    there = tmp_path / "there $(touch z)"
    there.mkdir()
    for name in (run.name, "base model"):
        (tmp_path / name).rename(there / name)
    jobs = (tmp_path / "jobs").rename(there / 'jo"b\\s & @HERE@')
    (script,) = jobs.glob("*.sh")
    place = f"../{there.name}" if told == "from inside" else str(there)
    settings = {"ROOT": place} if told == "ROOT" else {"RUN": f"{place}/{run.name}", "BASE": f"{place}/base model"}
    (tmp_path / "here").mkdir()
    done, calls = run_script(script, tmp_path / "here", VLMEVALKIT=str(tmp_path), OPENAI_API_KEY="k", **settings)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("z")) and (calls[-1][2] == str(there / run.name) or told == "from inside")
    assert Path(tmp_path / "here" / calls[-1][2]).resolve() == (there / run.name).resolve()
    models = {"base": there / "base model", "merged": there / run.name / "merged"}
    if program == "lmms-eval":
        used = {call[call.index("--model_args") + 1].split(",")[0] for call in calls[:-1]}
        found = {Path(text.removeprefix("pretrained=")).resolve() for text in used}
        assert {path.resolve() for path in models.values()} <= found and len(found) == len(used)
    else:
        config = json.loads(Path(calls[0][calls[0].index("--config") + 1]).read_text())
        for name, path in models.items():
            assert Path(config["model"][name]["model_path"]).resolve() == path.resolve()
    assert all(str(jobs) in pair for pair in calls[-1] if "=" in pair)


@pytest.mark.parametrize("program", ["lmms-eval", "VLMEvalKit"])
def test_what_a_script_is_told_by_its_environment_is_written_beside_it(run, tmp_path, program):
    how, *_, script = write_commands(subjects_of(run), tmp_path / "jobs", program)
    assert how.suffix == ".md" and how.stem == script.stem
    for name in ("ROOT", "RUN", "BASE", "GPUS", "OPENAI_API_KEY"):
        assert f"`{name}`" in how.read_text() and f"${{{name}:-" in script.read_text()
    folders = [word for word in shlex.split(script.read_text(), comments=True) if str(tmp_path) in word]
    assert folders == [f"ROOT={tmp_path}"]  # the only place of this machine


def test_a_folder_that_the_programs_would_misread_is_refused_where_the_script_runs(run, tmp_path):
    (tmp_path / "jobs").mkdir()
    lmms = write_commands(subjects_of(run), tmp_path / "jobs", "lmms-eval")[-1]
    done, calls = run_script(lmms, tmp_path, RUN=str(run), BASE="/data/a,b")
    assert done.returncode == 1 and "neither , nor =" in done.stderr and not calls
    write_commands(subjects_of(run), tmp_path / "jobs", "VLMEvalKit")
    moved = (tmp_path / "jobs").rename(tmp_path / "Omni")
    (tmp_path / "x").mkdir()
    done, calls = run_script(moved / "vlmevalkit.sh", tmp_path / "x", VLMEVALKIT=str(tmp_path))
    assert done.returncode == 1 and "would take omni in" in done.stderr and not calls


def test_the_lmms_eval_script_runs_every_model(run, tmp_path):
    script = write_commands(subjects_of(run), tmp_path / "jobs", "lmms-eval")[-1]
    _, calls = run_script(script, tmp_path, OPENAI_API_KEY="k")
    subjects = subjects_of(run)
    assert len(calls) == 2 * len(subjects.models) + 1
    for i, (name, path) in enumerate(subjects.models.items()):
        tasks = []
        for call, kind in zip(calls[2 * i: 2 * i + 2], ("plain", "judged"), strict=True):
            said = dict(pairwise(call))
            assert said["--model"] == "qwen2_5_vl"
            assert said["--model_args"] == f"pretrained={path},max_pixels=614656,min_pixels=200704"
            assert said["--output_path"] == str(tmp_path / "jobs" / "lmms-eval" / name.replace("/", ".") / kind)
            tasks += said["--tasks"].split(",")
        assert sorted(tasks) == sorted(b.lmms_tasks[0] for b in PAPER)
    # what that call would leave, comes back through the script's own last line
    for name, path in subjects.models.items():
        lmms_file(tmp_path / "jobs" / "lmms-eval" / name.replace("/", "."), name.replace("/", "."), model_name=str(path))
    places = [pair for pair in calls[-1] if "=" in pair]
    assert len(import_scores(run, {"lmms-eval": places}, Choices()).scores) == 8 * len(subjects.models)


def test_the_vlmevalkit_config(run, tmp_path):
    *_, script = write_commands(subjects_of(run), tmp_path / "jobs", "VLMEvalKit")
    done, calls = run_script(script, tmp_path, VLMEVALKIT=str(tmp_path), OPENAI_API_KEY="k")
    config = tmp_path / "jobs" / "vlmevalkit.here.json"
    content = json.loads(config.read_text())
    assert set(content) == {"model", "data"} and set(content["data"]) == {b.dataset for b in PAPER}
    assert all({"class", "dataset"} == set(entry) for entry in content["data"].values())
    assert done.returncode == 0 and calls[0][:3] == ["torchrun", "--nproc-per-node", "1"]
    assert calls[0][calls[0].index("--config") + 1] == str(config)
    for name, path in subjects_of(run).models.items():
        entry = content["model"][name.replace("/", ".")]
        link = Path(entry["model_path"])
        # Qwen2VLChat loads Qwen2.5-VL only where the path says so; the script has made the link
        assert entry["class"] == "Qwen2VLChat" and "2.5" in link.name and link.resolve() == path.resolve()
        assert (entry["max_pixels"], entry["min_pixels"]) == (614656, 200704)
    work = calls[0][calls[0].index("--work-dir") + 1]
    for shift, name in enumerate(subjects_of(run).models):
        vlm_folder(Path(work), name.replace("/", "."), shift)
    found = import_scores(run, {"VLMEvalKit": [p for p in calls[-1] if "=" in p]}, Choices())
    assert len(found.scores) == 8 * len(subjects_of(run).models)


def test_a_model_that_is_not_there_yet(run, tmp_path):
    *_, script = write_commands(subjects_of(run), tmp_path / "jobs", "lmms-eval")
    (run / "merged" / "config.json").unlink()
    done, calls = run_script(script, tmp_path, OPENAI_API_KEY="k")
    assert done.returncode == 1 and "merged: no model at" in done.stderr and all(call[0] == "python3" for call in calls)


def test_what_cannot_be_exported(run, tmp_path):
    base = subjects_of(run).models["base"]
    with pytest.raises(RecipeError, match=r"no such program.*Did you mean.*lmms-eval"):
        export_benchmarks(run, tmp_path / "jobs", "lmms_eval", None, print)
    (base / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ModelError, match=r"model of type `llava` is not known here.*--benchmarks lmms-eval takes any family"):
        write_commands(subjects_of(run), tmp_path / "jobs", "VLMEvalKit")
    *_, script = write_commands(subjects_of(run), tmp_path / "jobs", "lmms-eval")
    assert "--model llava_hf" in script.read_text() and "takes no cap on pixels" in script.read_text()
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match="does not say which model it is"):
        write_commands(subjects_of(run), tmp_path / "jobs", "lmms-eval")
    odd = run.rename(run.parent / "a,b")
    (base / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(RecipeError, match="may hold neither"):
        write_commands(subjects_of(odd), tmp_path / "jobs", "lmms-eval")
    with pytest.raises(RecipeError, match="has not begun"):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(f"model: {{path: {json.dumps(str(base))}}}\nmixture: {{sources: [{{path: x.jsonl}}]}}\noutput: nil\n")
        export_benchmarks(recipe, tmp_path / "jobs", "lmms-eval", None, print)


def test_the_script_can_be_started_again(run, tmp_path):
    """What has a result is not run again: a second result of the same model could not be imported."""
    *_, script = write_commands(subjects_of(run), tmp_path / "jobs", "lmms-eval")
    lmms_file(tmp_path / "jobs" / "lmms-eval" / "base" / "plain", "base")
    done, calls = run_script(script, tmp_path)
    assert "base: measured before" in done.stdout and len(calls) == len(subjects_of(run).models)
    assert not any(str(tmp_path / "jobs" / "lmms-eval" / "base") in call for call in calls)


@pytest.mark.parametrize("program", ["lmms-eval", "VLMEvalKit"])
def test_names_of_folders_are_never_commands(run, tmp_path, program):
    """An arm's folder with a line break and a command, and a run whose path is not UTF-8."""
    (run / "compare" / "arm\ntouch x #$(touch x)'\"" / "seed-0" / "merged").mkdir(parents=True)
    run = run.rename(Path(os.fsdecode(os.fsencode(run.parent) + b"/\xff run")))
    for config in [*run.glob("**/merged"), *run.glob("branches/*/model")]:
        (config / "config.json").write_text("{}")
    script = write_commands(subjects_of(run), tmp_path / "jobs", program)[-1]
    done, _ = run_script(script, tmp_path, VLMEVALKIT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("x")) and b"\xff run" in script.read_bytes()


def test_folders_that_vlmevalkit_would_take_for_another_family(run, tmp_path):
    """Qwen2VLChat looks for `omni` and `2.5` in the whole path."""
    base = subjects_of(run).models["base"]
    with pytest.raises(RecipeError, match="`omni`"):
        write_commands(subjects_of(run), tmp_path / "Domnica", "VLMEvalKit")
    write_commands(subjects_of(run), tmp_path / "Domnica", "lmms-eval")
    write_commands(subjects_of(run), tmp_path / "v2.5", "VLMEvalKit")
    (base / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(RecipeError, match=r"`2\.5`"):
        write_commands(subjects_of(run), tmp_path / "v2.5", "VLMEvalKit")


@pytest.mark.parametrize("family, template, kind", [
    ("smolvlm", "<|im_start|>", "SmolVLM2"), ("idefics3", "<|im_start|>", "SmolVLM"),
    ("idefics3", "<|begin_of_text|>", "IDEFICS2")])
def test_smolvlm_has_its_own_prompt(run, tmp_path, family, template, kind):
    base = subjects_of(run).models["base"]
    (base / "config.json").write_text(json.dumps({"model_type": family}))
    (base / "chat_template.jinja").write_text(template + "{% for message in messages %}")
    _, *configs, _ = write_commands(subjects_of(run), tmp_path / "jobs", "VLMEvalKit")
    assert len(configs) == 2
    assert {entry["class"] for config in configs for entry in json.loads(config.read_text())["model"].values()} == {kind}
