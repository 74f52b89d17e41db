"""Measure gradient conflict in an instruction mixture, split it, train branches that never talk, merge once, and say
whether it paid. The public surface, in pipeline order."""

from __future__ import annotations

import importlib
from typing import Any

# name -> module; imported on first use, so that `import anabranch` and `anabranch --help` stay quick
_PUBLIC = {
    "load_recipe": "recipe", "open_run": "run", "reopen_run": "run", "run_stages": "run",
    "build_mixture": "mixture", "measure_gradients": "gradients",
    "inner_products": "conflict", "analyse": "conflict", "partition": "partition", "make_plan": "plan",
    "train_branch": "branches", "merge_checkpoints": "engine.merging", "evaluate_model": "evaluate",
    "harness_scores": "harness", "parse_arms": "compare", "run_comparison": "compare",
    "markdown_report": "report", "write_report": "report", "AnabranchError": "errors"}

__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'anabranch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anabranch.{_PUBLIC[name]}"), name)
