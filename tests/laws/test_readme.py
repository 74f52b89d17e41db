"""What README and the examples say is true of the code beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import anabranch
from anabranch import cli
from anabranch.compare import parse_arms
from anabranch.recipe import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def test_public_names_resolve():
    assert all(getattr(anabranch, name) is not None for name in anabranch.__all__)
    with pytest.raises(AttributeError):
        _ = anabranch.no_such_name
    for name in re.findall(r"`(?:anabranch\.)?(\w+)`", README.split("From Python:")[1].split("\n\n")[0]):
        assert name in anabranch.__all__


def test_the_recipe_in_readme_is_valid(tmp_path):
    (block,) = [text for kind, text in BLOCKS if kind == "yaml"]
    (tmp_path / "recipe.yaml").write_text(block)
    assert load_recipe(tmp_path / "recipe.yaml").split.groups == 4


def test_every_command_in_readme_exists_and_takes_these_options():
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = [line.split("#")[0].split() for _, text in BLOCKS for line in text.splitlines() if line.startswith("anabranch ")]
    assert len(lines) >= 6
    for _, name, *arguments in lines:
        options = {o for p in commands[name].params for o in p.opts}
        assert {a for a in arguments if a.startswith("--")} <= options, (name, arguments)
        if "--methods" in arguments:
            parse_arms(arguments[arguments.index("--methods") + 1])


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_pass_a_dry_run(path):
    done = CliRunner().invoke(cli.app, ["run", str(path), "--dry-run"])
    assert done.exit_code == 0 and "Nothing was written" in done.output


def test_figures_of_the_comparison_are_those_of_its_record():
    record = json.loads((ROOT / "benchmarks" / "results" / "p3_compare.json").read_text())
    losses = {(s["arm"], s["place"]): s["loss"] for s in record["summary"]}
    arms = {"base": "base", "joint": "joint", "joint, 4 times the batch": "joint_batch:4",
            "joint pulled back to merit:3's distance": "joint_matched:merit:3", "random, 4 groups": "random:4",
            "stratified, 4 groups": "stratified:4", "merit, 4 groups": "merit:2", "merit, 8 groups": "merit:3"}
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]
    told = {row[0]: row[1:4] for row in rows if row[0] in arms}
    assert told.keys() == arms.keys()
    for label, arm in arms.items():
        assert told[label] == [f"{losses[arm, place]:.3f}" for place in ("held_out", "transfer", "retention")]
