"""`compare --merge-methods`: one set of branches, several merges, each scored as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from anabranch import cli
from anabranch.artifacts import Evaluation, MergeManifest, Operators, UnitScore
from anabranch.errors import OutputError, RecipeError
from anabranch.operators import compare_operators, mean_evaluation, operators_markdown, parse_methods, summarise, verdict
from anabranch.recipe import load_recipe
from anabranch.run import open_run
from conftest import here, write_recipe

ISSUE = "token_weighted,ties,star,tsv,iso_cts"


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_base) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("operators")
    recipe = write_recipe(folder, tiny_base)
    return folder, here("compare", recipe, "--merge-methods", ISSUE).stdout


def compared(folder: Path, methods: str, changes: dict[str, object] | None = None) -> Operators:
    return compare_operators(open_run(load_recipe(folder / "recipe.yaml", changes), tell=lambda _: None), methods)


def operators(folder: Path) -> Operators:
    return Operators.load(folder / "run" / "merge_methods.json")


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_command_of_the_issue_trains_merges_and_tells(merged):
    folder, told = merged
    found = operators(folder)
    assert [r.name for r in found.results] == ["base", "branches", "token_weighted", "ties", "star", "tsv_m", "iso_cts"]
    assert len(list((folder / "run" / "branches").glob("*/branch.json"))) == 2
    assert {r.name for r in found.results if r.folder} == {"token_weighted", "ties", "star", "tsv_m", "iso_cts"}
    assert "**Held-out rows (5 units)**" in told and "| tsv_m " in told and "The paper's order" in told
    assert next(r for r in found.results if r.name == "ties").arguments == {
        "density": 1.0, "normalize": True, "rescale": False, "scale": 1.0}


def test_each_is_a_merge_of_these_branches_by_the_plan_s_weights(merged):
    folder, _ = merged
    run, found = folder / "run", operators(folder)
    plan = json.loads((run / "plan.json").read_text())
    assert found.weights == [g["weight"] for g in plan["groups"]] and sum(found.weights) == pytest.approx(1)
    base = weights(Path(json.loads((run / "recipe.json").read_text())["base"]))
    branches = [weights(run / "branches" / str(k) / "model") for k in range(2)]
    mean = weights(run / "merge_methods" / "token_weighted")
    for name, tensor in mean.items():
        wanted = sum(w * b[name].astype(np.float64) for w, b in zip(found.weights, branches, strict=True))
        np.testing.assert_allclose(tensor, wanted, atol=1e-6)
    for result in found.results:
        if result.folder:
            moved = np.sqrt(sum(float(((t.astype(np.float64) - base[n]) ** 2).sum())
                                for n, t in weights(run / result.folder).items()))
            assert result.displacement == pytest.approx(moved, rel=1e-4)
            assert result.bytes == sum(p.stat().st_size for p in (run / result.folder).glob("*.safetensors"))
            assert MergeManifest.load(run / result.folder / "manifest.json").method == result.name


def test_figures_are_those_of_the_evaluations(merged):
    folder, _ = merged
    run, found = folder / "run", {r.name: r for r in operators(folder).results}
    score = {n: Evaluation.load(run / "merge_methods" / f"{n}.json") for n in ("token_weighted", "star")}
    gaps = [score["star"].held_out[u].loss - s.loss for u, s in score["token_weighted"].held_out.items()]
    row = found["star"].places["held_out"]
    assert row.difference == pytest.approx(np.mean(gaps)) and row.low <= row.difference <= row.high
    assert row.wins + row.ties + row.losses == len(gaps) == 5
    assert found["token_weighted"].places["held_out"].difference is None
    of_branches = [Evaluation.load(run / "evaluation" / f"branch-{k}.json").transfer["double"].loss for k in range(2)]
    assert found["branches"].places["transfer"].loss == pytest.approx(np.dot(operators(folder).weights, of_branches))


def test_only_what_is_missing_is_made_again(merged):
    folder, told = merged
    place = folder / "run" / "merge_methods"
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    wanted = (folder / "run" / "merge_methods.json").read_bytes()
    (place / "ties.json").unlink()
    (folder / "run" / "merge_methods.json").unlink()
    again = operators_markdown(compared(folder, ISSUE))
    after = {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()}
    assert {p for p in after if after[p] != before.get(p)} == {place / "ties.json"} and after.keys() == before.keys()
    assert (folder / "run" / "merge_methods.json").read_bytes() == wanted
    assert again.strip() in told


def test_another_evaluation_is_made_anew_and_a_strange_merge_is_refused(merged):
    folder, _ = merged
    place, file = folder / "run" / "merge_methods", folder / "run" / "merge_methods.json"
    kept = {p: p.read_bytes() for p in [*place.glob("*.json"), file, *(folder / "run" / "evaluation").glob("*.json")]}
    merges = {p: p.stat().st_mtime_ns for p in place.glob("*/manifest.json")}
    compared(folder, "ties", {"evaluate.max_samples": 3})
    assert (place / "ties.json").read_bytes() != kept[place / "ties.json"]
    assert {p: p.stat().st_mtime_ns for p in place.glob("*/manifest.json")} == merges
    with pytest.raises(OutputError, match="merge_methods/token_weighted already holds another"):
        compared(folder, "ties", {"merge.dtype": "float16"})
    for path, content in kept.items():
        path.write_bytes(content)


def test_every_problem_in_one_message_before_any_training(recipe_file):
    asked = "token_weigthed,fisher,layer_scaled,slerp,tsv,tsv_m,ties"
    refused = CliRunner().invoke(cli.app, ["compare", str(recipe_file), "--merge-methods", asked])
    assert isinstance(refused.exception, RecipeError)
    told = " ".join(str(refused.exception).split())
    for words in ("Did you mean `token_weighted`?", "`fisher`: needs the Fisher information", "`layer_scaled`: needs the place",
                  "`slerp`: merges at most 1 beside the base, and the recipe's split makes 2", "`tsv_m` stands twice"):
        assert words in told
    assert "ties" not in told
    assert not (recipe_file.parent / "run" / "mixture").exists()


def test_it_is_no_comparison_of_arms(recipe_file):
    for other in (["--methods", "joint"], ["--seeds", "2"]):
        refused = CliRunner().invoke(cli.app, ["compare", str(recipe_file), "--merge-methods", "ties", *other])
        assert isinstance(refused.exception, RecipeError) and "merges one set of branches" in str(refused.exception)


def test_names():
    assert parse_methods("star, tsv", 4) == ["token_weighted", "star", "tsv_m"]
    assert parse_methods("token_weighted", 2) == ["token_weighted"]
    with pytest.raises(RecipeError, match="nothing to merge"):
        parse_methods("ties", 1)
    with pytest.raises(RecipeError, match="no method given"):
        parse_methods(" ,", 4)


def evaluation(losses: dict[str, float]) -> Evaluation:
    return Evaluation(model="x", transfer={}, retention={},
                      held_out={u: UnitScore(loss=v, tokens=10, rows=2, f1=v / 10) for u, v in losses.items()})


def test_branches_are_averaged_by_weight():
    mean = mean_evaluation([evaluation({"a": 1.0, "b": 2.0}), evaluation({"a": 3.0, "b": 6.0})], [0.25, 0.75])
    assert {u: s.loss for u, s in mean.held_out.items()} == {"a": 2.5, "b": 5.0}
    assert mean.held_out["a"].f1 == pytest.approx(0.25) and mean.held_out["a"].exact_match is None


def told(**losses: float) -> list[str]:
    from anabranch.operators import _Scored

    units = [f"u{i}" for i in range(6)]
    scored = [_Scored("base", evaluation(dict.fromkeys(units, 2.0)), 0.0)]
    scored += [_Scored(n, evaluation(dict.fromkeys(units, v)), 1.0, {}, n) for n, v in losses.items()]
    return verdict(summarise(scored))


def test_verdict_can_go_either_way():
    papers = " ".join(told(token_weighted=1.0, ties=1.1, tsv_m=1.2, iso_cts=1.3, star=2.5))
    assert "token_weighted is best (loss 1.000)" in papers and "1.300, star 2.500: the same order" in papers
    assert "worse than the untrained base (2.000): star." in papers
    other = " ".join(told(token_weighted=1.0, ties=0.5, star=1.005))
    assert "ties is best" in other and "better than token_weighted: ties by 0.500 [-0.500 to -0.500]" in other
    assert "no clear difference to it: star" in other and "another order, without token_weighted in front" in other
