"""What search files say: both grammars, their refusals, and the peer's genome decoded by a second, slow reading of it."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from search_models import MODELS, make_models, template

from anabranch.engine.dialect import config_of
from anabranch.engine.merging import settings_for
from anabranch.errors import RecipeError
from anabranch.search.genome import decode, genome_space
from anabranch.search.in_memory import Room, Workshop
from anabranch.search.run import space_of
from anabranch.search.settings import BENCHMARKS, GenomeSetting, read_search
from anabranch.search.space import Dimension
from tiny_checkpoints import tensors_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    make_models(folder, layers=4)
    return folder


# --- the peer's genome ---


def slow(genome, flat, layers):
    """The specification once more, gene by gene from the flat array, without numpy's shapes. -> {layer group: [(model,
    {filter: {gene: value}})]}, or for slerp {group: (base, other, t)}"""
    names = {"linear": ["weight"], "task_arithmetic": ["weight"], "slerp": ["t"]}.get(genome["merge_method"],
                                                                                   ["weight", "density"])
    sets = [*genome.get("filters", []), None]
    groups = 1 if genome.get("layer_granularity", 0) == 0 else layers // genome["layer_granularity"]
    at, found = iter(flat), {}
    for g in range(groups):
        found[g] = []
        for model in genome["models"]:
            by_filter = {}
            for f in sets:
                values = {}
                for gene in names:
                    x = next(at)
                    if gene == "weight" and not genome.get("allow_negative_weights"):
                        x = -x if x < 0 else x
                    if gene == "density":
                        x = 1.0 if abs(x) > 1 else abs(x)
                    values[gene] = x
                by_filter[f] = values
            found[g].append((model, by_filter))
    if genome["merge_method"] == "slerp":
        for g, entries in found.items():
            ranked = sorted(entries, key=lambda e: -e[1][None]["t"])[:2]
            a, b = (e[1][None]["t"] for e in ranked)
            found[g] = (ranked[0][0], ranked[1][0], math.exp(b) / (math.exp(a) + math.exp(b)))
    return found


GENOMES = [
    {"merge_method": "linear"},
    {"merge_method": "linear", "layer_granularity": 2, "filters": ["mlp", "self_attn"]},
    {"merge_method": "task_arithmetic", "base_model": "base", "allow_negative_weights": True},
    {"merge_method": "ties", "base_model": "base", "layer_granularity": 1},
    {"merge_method": "dare_ties", "base_model": "base", "layer_granularity": 4, "filters": ["mlp"]},
    {"merge_method": "slerp", "layer_granularity": 2},
]


@pytest.mark.parametrize("genome", GENOMES, ids=lambda g: f"{g['merge_method']}-{g.get('layer_granularity', 0)}")
def test_genotype_decodes_as_specified(genome, models):
    rng = np.random.default_rng(3)
    genome = genome | {"models": list(MODELS)}
    space = genome_space(GenomeSetting(**genome), 4)
    flat = (rng.standard_normal(len(space.dimensions)) * 1.5).tolist()
    config = space.config(space.vector(flat))
    wanted = slow(genome, flat, 4)
    size = genome.get("layer_granularity", 0) or 4
    assert config["dtype"] == "bfloat16" and len(config["slices"]) == len(wanted)
    for g, entries in wanted.items():
        made = config["slices"][g]
        assert all(s["layer_range"] == [g * size, (g + 1) * size] for s in made["sources"])
        if genome["merge_method"] == "slerp":
            base, other, t = entries
            assert [s["model"] for s in made["sources"]] == [base, other] and made["base_model"] == base
            assert made["parameters"]["t"] == pytest.approx(t, rel=1e-12)
            continue
        assert [s["model"] for s in made["sources"]] == [model for model, _ in entries]
        for source, (_, by_filter) in zip(made["sources"], entries, strict=True):
            for gene in next(iter(by_filter.values())):
                said = source["parameters"][gene]
                for f, values in by_filter.items():
                    got = said if not isinstance(said, list) else next(c["value"] for c in said if c.get("filter") == f)
                    assert got == values[gene], (g, f, gene)
    if genome["merge_method"] != "slerp":
        normalize = config["parameters"]["normalize"]
        assert normalize is (genome["merge_method"] in ("ties", "dare_ties", "linear"))
    config_of(config, folders=[models])  # the engine takes it


def test_smooth_is_a_gradient_over_groups(models):
    genome = GenomeSetting(models=list(MODELS), merge_method="ties", base_model="base", layer_granularity=1, smooth=True)
    genes = np.arange(4 * 3 * 1 * 2, dtype=float).reshape(4, 3, 1, 2) / 10
    config = decode(genome, genes, 4)
    assert "slices" not in config
    assert config["models"][1]["parameters"] == {"weight": [0.2, 0.8, 1.4, 2.0], "density": [0.3, 0.9, 1.0, 1.0]}
    config_of(config, folders=[models])


def test_a_genome_merges_as_a_dense_sum_over_groups_and_filters(models):
    """linear with groups and filters, by hand from the tensors."""
    genome = GenomeSetting(models=[str(models / m) for m in MODELS], merge_method="linear", layer_granularity=2,
                           filters=["mlp"], base_model=str(models / "base"))
    genes = np.random.default_rng(0).random((2, 3, 2, 1)) + 0.1
    workshop = Workshop((models,), settings_for(threads=1), Room(10**8))
    found = {}
    workshop.merged(decode(genome, genes, 4), lambda name, t: found.__setitem__(name, t.clone()))
    state = [tensors_of(models / m) for m in MODELS]
    assert found.keys() == state[0].keys()
    for name, tensor in found.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        group = int(layer[1]) // 2 if layer else (1 if name in ("model.norm.weight", "lm_head.weight") else 0)
        w = [genes[group, m, 0 if "mlp" in name else 1, 0] for m in range(3)]
        wanted = sum(float(wi) * s[name].double() for wi, s in zip(w, state, strict=True)) / sum(w)
        assert torch.allclose(tensor.double(), wanted, rtol=2**-8, atol=1e-6), name


def test_a_start_is_the_even_merge_or_drawn():
    even = genome_space(GenomeSetting(models=["a", "b"], merge_method="ties", base_model="c"), 4)
    assert even.start == [0.5, 1.0, 0.5, 1.0]
    drawn = genome_space(even.genome, 4, seed=1)
    assert drawn.start == genome_space(even.genome, 4, seed=1).start != genome_space(even.genome, 4, seed=2).start
    assert all(0 <= v <= 1 for v in drawn.start)


def peer(**changed):
    return {"genome": {"models": list(MODELS), "merge_method": "linear"}, "tasks": [{"name": "mine"}]} | changed


@pytest.mark.parametrize(("genome", "words"), [
    ({"merge_method": "ties"}, "needs `base_model`"),
    ({"merge_method": "slerp", "filters": ["mlp"]}, "slerp takes no filters"),
    ({"merge_method": "slerp", "smooth": True, "layer_granularity": 2}, "slerp takes no smooth"),
    ({"merge_method": "slerp", "base_model": "base"}, "third model"),
    ({"merge_method": "slerp", "models": ["one"]}, "two of the models"),
    ({"merge_method": "della", "base_model": "base"}, "merge_method"),
    ({"models": ["one", "one"]}, "stands twice"),
    ({"layer_granularit": 2}, "layer_granularity"),
])
def test_genomes_that_cannot_be(genome, words):
    with pytest.raises(RecipeError, match=words):
        read_search(peer(genome={"models": list(MODELS), "merge_method": "linear"} | genome))


def test_granularity_must_divide_the_depth(models):
    settings = read_search(peer(genome={"models": list(MODELS), "merge_method": "linear", "layer_granularity": 3}))
    with pytest.raises(RecipeError, match=r"does not divide the 4 layers.*1, 2, 4"):
        space_of(settings, [models])


def test_benchmarks_are_refused_unless_asked_for():
    for prefix in BENCHMARKS:
        with pytest.raises(RecipeError, match="--allow-benchmark-tasks"):
            read_search(peer(tasks=[f"{prefix}x"]))
        read_search(peer(tasks=[f"{prefix}x_train"]))
        assert read_search(peer(tasks=[f"{prefix}x"]), allow_benchmarks=True).tasks[0].metric == "acc,none"


# --- our own ---


def test_a_template_is_filled_and_nothing_else(tmp_path):
    file = template(tmp_path)
    file["merge"]["chat_template"] = "$$ {{ messages }} costs $5 and more"
    space = space_of(read_search(file), [tmp_path])
    config = space.config([0.1, 0.2, 0.3, 1.5, 0.7])
    assert [m["parameters"] for m in config["models"]] == [{"weight": w, "density": 0.7} for w in (0.1, 0.2, 0.3)]
    assert config["parameters"] == {"lambda": 1.5} and config["chat_template"] == "$ {{ messages }} costs $5 and more"
    assert file["merge"]["models"][0]["parameters"]["weight"] == "$w_one"  # the template is as it was


def test_places_on_scales():
    log = Dimension("x", 0.1, 10, log=True)
    assert [log.of_unit(z) for z in (0, 0.5, 1)] == pytest.approx([0.1, 1.0, 10.0])
    whole = Dimension("n", 1, 4, whole=True)
    counts = [whole.of_unit((i + 0.5) / 4000) for i in range(4000)]
    assert {n: counts.count(n) for n in set(counts)} == {1: 1000, 2: 1000, 3: 1000, 4: 1000}
    assert [Dimension("c", choices=("a", "b", "c")).of_unit(z) for z in (0, 0.34, 1)] == ["a", "b", "c"]
    assert log.of_unit(-3) == pytest.approx(0.1)
    for d in (Dimension("s", 2, 6, start=3), Dimension("s", 1, 100, log=True, start=3),
              Dimension("s", 1, 9, whole=True, start=3)):
        assert d.of_unit(d.start_unit) == pytest.approx(3)


@pytest.mark.parametrize(("changed", "words"), [
    ({"parameters": {"w": {"low": 1, "high": 0}}}, "not below"),
    ({"parameters": {"w": {"low": 0, "high": 1, "log": True}}}, "above 0"),
    ({"parameters": {"w": {"low": 0, "high": 1, "choices": [1, 2]}}}, "goes alone"),
    ({"parameters": {"w": {"low": 0}}}, "`low` and `high`"),
    ({"parameters": {"w": {"low": 0, "high": 1.5, "type": "int"}}}, "whole numbers"),
    ({"parameters": {"w": {"low": 0, "hihg": 1}}}, "Did you mean `high`"),
    ({"parameters": {"w": {"choices": ["a", "b"]}}}, "cma moves along numbers"),
    ({"parameters": {"2w": {"low": 0, "high": 1}}}, "is no name"),
    ({"data": None}, "nothing says what is good"),
    ({"sampler": "cmaes"}, "sampler"),
    ({"budget": 0}, "budget"),
    ({"limit": 5}, "limit: of tasks"),
    ({"data": {"sources": [{"path": " "}]}}, "empty path"),
    ({"random_init": True}, "of a genome"),
    ({"merge": None}, "`merge:` with `parameters:`"),
    ({"objectives": [{"name": "a", "units": ["x"], "tasks": ["y"]}]}, "one of them"),
    ({"objectives": [{"name": "a", "tasks": ["y"]}]}, "not among `tasks`"),
    ({"token_weights": [-1, 2, 0]}, "from 0 on"),
])
def test_files_that_cannot_be(changed, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        read_search(template(tmp_path) | changed)


def test_names_without_parameters_and_parameters_without_place(tmp_path):
    file = template(tmp_path)
    file["parameters"]["w_on"] = file["parameters"].pop("w_one")
    with pytest.raises(RecipeError, match=r"(?s)`\$w_one`.*Did you mean `w_on`.*w_on: `\$w_on` stands nowhere"):
        space_of(read_search(file), [tmp_path])


def test_both_grammars_say_what_is_missing(tmp_path):
    with pytest.raises(RecipeError, match="mergekit-evolve"):
        read_search({"data": {"sources": [{"path": "x"}]}})
    with pytest.raises(RecipeError, match="cannot be read"):
        read_search(tmp_path / "none.yaml")
    said = read_search(peer(limit=10, num_fewshot=1, shuffle=True, random_init=True, apply_chat_template=False))
    assert said.tasks[0].weight == 1 and said.limit == 10 and not said.apply_chat_template
