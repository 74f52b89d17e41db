"""Measure gradient conflict in an instruction mixture, split it, train branches that never talk, merge once, and say
whether it paid. The public surface, in pipeline order."""

from __future__ import annotations

import importlib
import types
from typing import Any

# name -> module; imported on first use, so that `import anabranch` and `anabranch --help` stay quick
_PUBLIC = {
    "load_recipe": "recipe", "open_run": "run", "reopen_run": "run", "run_stages": "run",
    "build_mixture": "mixture", "measure_gradients": "gradients",
    "inner_products": "conflict", "analyse": "conflict", "partition": "partition", "make_plan": "plan",
    "train_branch": "branches", "merge_checkpoints": "engine.merging", "verify": "engine.merging",
    "merge_family": "engine.family", "merge_tensors": "engine.raw", "merge_adapters": "lora.combine",
    "build_experts": "experts.build", "match_experts": "experts.match", "transplant_vocabulary": "transplant.moving",
    "evaluate_model": "evaluate",
    "harness_scores": "harness", "parse_arms": "compare", "run_comparison": "compare",
    "compare_operators": "operators", "run_pilot": "pilot",
    "subject_of_run": "diagnose.run", "subject_of_models": "diagnose.run", "run_diagnostics": "diagnose.run",
    "measure": "mergeability.measure", "fit_table": "mergeability.fitting", "predict_file": "mergeability.fitting",
    "suggest_file": "mergeability.fitting", "collect": "mergeability.collect",
    "markdown_report": "report", "write_report": "report", "AnabranchError": "errors"}

__all__ = sorted([*_PUBLIC, "merge"])
__version__ = "0.1.0"


class MergeModule(types.ModuleType):
    """`anabranch.merge` is the maths of merging (`anabranch.merge.ties(branches, base, weights)`) and, called, the merge of
    a config (`anabranch.merge("config.yaml", "OUT")`): arguments, result and errors as `anabranch.engine.merging.merge`.
    """

    def __call__(self, config: Any, out: Any, **options: Any) -> Any:
        return importlib.import_module("anabranch.engine.merging").merge(config, out, **options)


def __getattr__(name: str) -> Any:
    if name == "merge":
        return importlib.import_module("anabranch.merge")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'anabranch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anabranch.{_PUBLIC[name]}"), name)
