"""What README and the examples say is true of the code beside them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import anabranch
from anabranch import cli
from anabranch.artifacts import MergeManifest
from anabranch.compare import parse_arms
from anabranch.engine.dialect import read_config
from anabranch.errors import RecipeError
from anabranch.recipe import load_recipe
from tiny_checkpoints import write_checkpoint

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
    recipes = []
    for block in (text for kind, text in BLOCKS if kind == "yaml" and "mixture:" in text):
        (tmp_path / "recipe.yaml").write_text(block)
        recipes.append(load_recipe(tmp_path / "recipe.yaml"))
    assert [(r.split.groups, r.model.freeze, r.mixture.images.max_pixels) for r in recipes] == [
        (4, [], None), (8, ["vision tower", "projector"], 784 * 784)]


def test_every_command_in_readme_exists_and_takes_these_options():
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = [line.split("#")[0].split() for _, text in BLOCKS for line in text.splitlines() if line.startswith("anabranch ")]
    assert len(lines) >= 6
    for _, name, *arguments in lines:
        command = commands[name]
        while hasattr(command, "commands"):  # a group of commands
            named = arguments[0] in command.commands  # `experts CONFIG OUT` is `experts build CONFIG OUT`
            command = command.commands[arguments.pop(0) if named else {"experts": "build"}[name]]
        options = {o for p in command.params for o in p.opts}
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


def test_figures_of_the_regimes_are_those_of_their_record():
    record = json.loads((ROOT / "benchmarks" / "results" / "p3_regimes.json").read_text())
    means = {(f"{s['learning_rate']:g}, {s['epochs']:g}", s["place"].replace("_", "-"), s["part"]): s["mean"]
             for s in record["shares"]}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| 0.000")]
    assert len(rows) == len({key[:2] for key in means})
    for cell, place, *told in rows:
        assert told == [f"{means[cell, place, part]:+.3f}" for part in ("merit:2 - joint", "near", "merging", "split")]


def test_figures_of_mergeability_are_those_of_their_record():
    tables = json.loads((ROOT / "benchmarks" / "results" / "mergeability_study.json").read_text())["tables"]

    def mean(table, rule, unseen, field="r"):
        found = [t[field] for t in table["trials"] if (t["rule"], t["unseen"]) == (rule, unseen)]
        assert len(found) == len(table["methods"])
        return sum(found) / len(found)

    def both(table, field, digits, scale=1.0, rule="ours"):
        return ", ".join(f"{scale * mean(table, rule, u, field):{digits}}" for u in (1, 2))

    section = README.split("## Which models merge well?")[1].split("\n## ")[0]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(told) == 12
    for column, table in enumerate((tables["vision"], tables["language"]), start=1):
        r = [table["sets"][f"r {m}"] for m in table["methods"]]
        regret = [100 * sum(table["sets"][f"{what} {m}"] for m in table["methods"]) / len(r)
                  for what in ("regret", "regret of random")]
        widths = ", ".join(f"{100 * mean(table, 'ours', u, 'width'):.1f} ({100 * mean(table, 'ours', u, 'naive_width'):.1f})"
                           for u in (1, 2))
        assert [row[column] for row in told] == [
            *(f"{mean(table, rule, 1):.2f}"
              for rule in ("ours", "ours without task effects", "published", "task effects alone")),
            *(f"{mean(table, rule, 2):.2f}" for rule in ("ours", "published")),
            both(table, "r", "+.2f", rule="shuffled"), both(table, "coverage", ".0%"),
            widths, both(table, "answered", ".0%"), f"{min(r):.2f} to {max(r):.2f}", f"{regret[0]:.1f} ({regret[1]:.1f})"]


# ------------------------------------------------------------------------------------------------------------- merging


MERGES = [text for kind, text in BLOCKS if kind == "yaml" and "merge_method:" in text]
REFUSED = re.search(r"```\nRecipeError: merge config config.yaml:\n(.*?)```", README, re.S)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Every model that README's merge configs name, tiny, and the working folder there."""
    for text in MERGES:
        for model in read_config(text).models:
            if not (tmp_path / model.path).exists():
                write_checkpoint(tmp_path / model.path)
    monkeypatch.chdir(tmp_path)
    # The limit is of the whole process, and this one has run other tests.
    monkeypatch.setattr("anabranch.engine.memory.occupied", lambda: 200 * 10**6)
    return tmp_path


@pytest.mark.parametrize("text", MERGES)
def test_merge_configs_of_readme_run(text, models):
    (models / "config.yaml").write_text(text)
    lines = [line.split("#")[0].split() for _, block in BLOCKS for line in block.splitlines()
             if re.match(r"anabranch (merge|verify|methods)\b", line) and "cuda" not in line
             and not line.startswith("anabranch merge run ")  # of a run's branches: tests/pipeline/test_partial.py
             and "family.yaml" not in line]  # tests/formats/test_examples_surgery.py
    assert len(lines) >= 6
    for number, (_, *arguments) in enumerate(lines):
        if arguments[0] == "merge":
            out = f"OUT{number}"
            arguments = [out if a == "OUT" else a for a in arguments]
        elif arguments[0] == "verify":
            arguments = ["verify", out]
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, (arguments, done.output)
    hashes = [MergeManifest.load(path).tensors for path in sorted(models.glob("OUT*/manifest.json"))]
    assert len(hashes) >= 2 and all(h == hashes[0] for h in hashes)


def test_the_python_of_readme_runs(models):
    (models / "config.yaml").write_text(MERGES[0])
    (block,) = [text for kind, text in BLOCKS if kind == "python"]
    names: dict = {}
    with pytest.warns(UserWarning, match="gradient"):
        exec(block, names)
    assert names["manifest"].method == "ties" and names["merged"].tolist() == [3.0, 0.0, 0.0, 3.0]


def test_the_message_of_readme_is_what_is_said():
    """README's config with the three mistakes that its message shows."""
    assert REFUSED is not None
    text = MERGES[0].replace("parameters: {weight: 1.0, density: 0.6}", "density: 0.6\n    parameters: {weight: 1.0}")
    text = text.replace("dtype: bfloat16", "paramaters: {lambda: 1.0}\ndtype: bf16")
    with pytest.raises(RecipeError) as caught:
        read_config(text, source="merge config config.yaml")
    assert str(caught.value) == "merge config config.yaml:\n" + REFUSED[1].rstrip("\n")


def test_options_and_methods_that_readme_names_exist():
    options = {o for command in typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
               for p in command.params for o in p.opts}
    peer = {"--random-seed", "--out-shard-size", "--cuda", "--allow-crimes"}
    section = README.split("## Merge any checkpoints")[1].split("\n## ")[0]
    assert set(re.findall(r"--[a-z][a-z-]+", section)) - peer <= options
    linked = re.findall(r"\]\(((?:docs|examples)[^)#]*)\)", README)
    assert len(linked) >= 6 and all((ROOT / target).exists() for target in linked)


def test_the_figures_of_runs_anywhere_are_those_of_the_records():
    chaos = json.loads((ROOT / "benchmarks/results/chaos.json").read_text())
    requests, faults = sum(chaos["server"]["requests"].values()), sum(chaos["server"]["faults"].values())
    flat = " ".join(README.split())
    assert f"killed {chaos['kills']} times" in flat and f"failed {faults:,} of {requests:,} requests" in flat
    assert all(chaos["same_bytes_as_quiet_run"].values()) and set(chaos["objects"]) == {"good", "bytes"}
    assert chaos["store"]["results"] == chaos["store"]["jobs"] and not chaos["store"]["rivals"]
    anywhere = json.loads((ROOT / "benchmarks/results/anywhere.json").read_text())
    assert set(anywhere["engines"]) == {"local", "s3", "ray", "slurm"}
    assert not any(anywhere["differs_from_the_first_in"].values())


# ------------------------------------------------------------------------------------------------------------- surgery


def _record(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def surgery_rows() -> list[str]:
    """README's table of what the other verbs brought, made of the benchmarks' records."""
    arms = {a["arm"]: a for a in _record("experts")["p3"]["arms"]}
    mixture = min((a for a in arms.values() if a["arm"].startswith("experts")), key=lambda a: a["loss"])
    branch = min(a["loss"] for a in arms.values() if a["arm"].startswith("branch"))
    merges = {(r["merge"], r["rank"]): r["loss"] for r in _record("lora_merge_loss")["rows"]}
    adapter = min(loss for (name, _), loss in merges.items() if name.startswith("adapter"))
    outcome = _record("search")["outcome"]
    scores = {s["name"]: s["guard"] for s in outcome["scores"]}
    model = min(loss for name, loss in scores.items() if name.startswith("model"))
    even = "task_arithmetic {'weight': 0.25} core"
    return [
        f"| experts: the best of {sum(a.startswith('experts') for a in arms)} mixtures, {mixture['active'] / 1e6:.2f}M "
        f"parameters active | {arms['base']['loss']:.3f} | {branch:.3f} | {arms['token-weighted merge']['loss']:.3f} "
        f"| {mixture['loss']:.3f} |",
        f"| search: {outcome['budget']} candidates of CMA-ES over {len(outcome['dimensions'])} weights, rows never searched "
        f"(random search: {scores['best of random search']:.3f}) | {scores['base']:.3f} | {model:.3f} "
        f"| {scores['token-weighted merge']:.3f} | {scores['best']:.3f} |",
        f"| adapters of rank 16, merged evenly and cut to rank 16 (PEFT's `svd` {merges['PEFT svd', 16]:.3f}, its `linear` "
        f"{merges['PEFT linear', 16]:.3f}) | {merges['base', 0]:.3f} | {adapter:.3f} | {merges[even, 64]:.3f} "
        f"| {merges[even, 16]:.3f} |"]


def vocabulary_words() -> str:
    donors = _record("vocabulary")["donors"]
    ranked = {name: {one["name"]: one["nats_per_byte"] for one in donor["ranked"]} for name, donor in donors.items()}
    assert all(donor["ranked"][0]["name"] == "composed" for donor in donors.values())
    before = donors["bpe-8192"]["before"]["nats_per_byte"]
    told = "; ".join(f"{name} {r['composed']:.2f} ({r['omp']:.2f})" for name, r in ranked.items())
    return (f"Another tokenizer raised the loss from {before:.2f} nats per byte, with `composed` (and MergeKit's default, "
            f"`omp`), to: {told}.")


def test_the_figures_of_surgery_are_those_of_the_records():
    for row in surgery_rows():
        assert row in README
    flat = " ".join(README.split())
    assert vocabulary_words() in flat
    (even,) = [s for s in _record("search")["outcome"]["scores"] if s["name"] == "token-weighted merge"]
    assert f"by {-even['difference']:.3f} (95 % interval {-even['high']:.3f} to {-even['low']:.3f})" in flat
    merges = {(r["merge"], r["rank"]): r["loss"] for r in _record("lora_merge_loss")["rows"]}
    exact, cut = (merges["task_arithmetic {'weight': 0.25} core", rank] for rank in (64, 16))
    assert f"to a quarter of its rank cost {cut - exact:.3f}" in flat
    (cost,) = [r for r in _record("lora_extract_cost")["rows"] if r["wish"] == "--rank 64"]
    assert f"took {cost['wall_s']:.0f} s on one thread and {cost['peak_anonymous_mb']} MB" in flat and cost["threads"] == 1
    (tsv,) = [r for r in _record("lora_merge_cost")["rows"] if r["method"] == "tsv_m" and r["shape"] == [5632, 2048]]
    ours, dense = tsv["ours"], tsv["dense"]
    assert f"{ours['seconds']:.2f} s and {ours['peak_mb']} MB a matrix of 5632 x 2048" in flat
    assert f"takes {dense['seconds']:.0f} s and {dense['peak_mb']} MB" in flat


def test_the_python_names_of_the_guide_to_surgery_resolve():
    names = re.findall(r"`anabranch\.([\w.]+)`", (ROOT / "docs" / "surgery.md").read_text().split("## From Python")[1])
    assert len(names) >= 10
    for name in names:
        module, _, attribute = f"anabranch.{name}".rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute)), name
