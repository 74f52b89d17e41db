"""docs/mergeability.md lists the metrics as they are registered."""

from __future__ import annotations

from pathlib import Path

from anabranch.mergeability.metrics import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "mergeability.md").read_text()


def test_every_metric_and_its_formula():
    told = [line for line in PAGE.split("## The metrics")[1].splitlines() if line.startswith("| `")]
    bar = "\\|"
    assert told == [f"| `{name}` | {metric.formula.replace('|', bar)} |" for name, metric in METRICS.items()]
