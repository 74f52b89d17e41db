"""Scores from an outside harness: lm-evaluation-harness as a library, on a model folder or on a run's models.

Tasks are the harness's own or YAML files of the user's (`include_path`); with `include_path` only those are indexed,
which takes a hundredth of a second instead of twenty.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anabranch.artifacts import write_atomically
from anabranch.errors import ModelError, RecipeError
from anabranch.model import device, load_model, load_tokenizer


def harness_scores(model: Path, tasks: list[str], *, include_path: Path | None = None, limit: int | None = None,
                   batch_size: int = 8) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as lm-eval names them.

    Args:
        limit: rows per task; None takes all.
    Raises:
        RecipeError: lm-eval is not installed, or knows no such task, or cannot get its data.
        ModelError: the folder does not load.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError("the harness is not installed: pip install 'anabranch[lm-eval]'.") from error
    if not model.is_dir():
        raise ModelError(f"{model}: no such model folder.")
    wrapped = HFLM(pretrained=load_model(model), tokenizer=load_tokenizer(model), batch_size=batch_size,
                   device=str(device()))
    manager = TaskManager(include_path=str(include_path) if include_path else None,
                          include_defaults=include_path is None)
    try:
        found: Any = simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit,
                                     bootstrap_iters=0, log_samples=False)
    except (KeyError, ValueError, ConnectionError, FileNotFoundError) as error:
        raise RecipeError(f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {str(error)[:300]}. Check the "
                          "task's name, --include-path, and that its data is here.") from error
    return {task: {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
            for task, metrics in found["results"].items()}


def write_harness(model: Path, tasks: list[str], out: Path, *, include_path: Path | None = None,
                  limit: int | None = None) -> dict[str, dict[str, float]]:
    """Score and write JSON: {model, tasks, limit, scores}."""
    scores = harness_scores(model, tasks, include_path=include_path, limit=limit)
    content = {"model": str(model), "tasks": tasks, "limit": limit, "scores": scores}
    write_atomically(out, (json.dumps(content, indent=1) + "\n").encode())
    return scores
