"""The hook for outside harnesses, on a task and rows made here."""

from __future__ import annotations

import json

import pytest
import yaml

from anabranch.errors import ModelError, RecipeError
from anabranch.harness import harness_scores, write_harness


@pytest.fixture()
def tasks(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "copy red", "a": 0}\n{"q": "copy blue", "a": 1}\n{"q": "copy red blue", "a": 0}\n')
    task = {"task": "choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["red", "blue"],
            "doc_to_target": "{{a}}", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choice.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "tasks"


def test_scores_a_model_folder_on_a_task_of_one_s_own(tasks, tiny_base, tmp_path):
    out = tmp_path / "harness.json"
    scores = write_harness(tiny_base, ["choice"], out, include_path=tasks)
    assert scores["choice"]["acc,none"] in [pytest.approx(k / 3) for k in range(4)]
    assert json.loads(out.read_text())["scores"] == scores


def test_unknown_task_and_missing_model(tasks, tiny_base, tmp_path):
    with pytest.raises(RecipeError, match="nonsense"):
        harness_scores(tiny_base, ["nonsense"], include_path=tasks)
    with pytest.raises(ModelError, match="no such model folder"):
        harness_scores(tmp_path / "none", ["choice"], include_path=tasks)
