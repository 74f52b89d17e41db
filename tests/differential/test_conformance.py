"""Section 10 of the merge specification: the ids that no other test names, each end to end where it can be; and
docs/numerics.md, which lists all of them, held to the tests that it refers to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from anabranch.engine.merging import merge_config
from anabranch.engine.prepare import Options
from anabranch.errors import AnabranchError, ShapeMismatch
from anabranch.merge import METHODS
from tiny_checkpoints import WORDS, shapes, tensors_of, write_checkpoint

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "numerics.md"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
NORM = "model.norm.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"
MORE = (*WORDS, "<|tool|>")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """base, a, b and c beside each other, and the working folder there."""
    for name in ("base", "a", "b", "c"):
        write_checkpoint(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(**weights: Any) -> list[dict]:
    return [{"model": name, "parameters": {} if w is None else {"weight": w}} for name, w in weights.items()]


def merged(config: dict[str, Any], out: str = "out", **options: Any) -> dict[str, Tensor]:
    merge_config(config, out, options=Options(**options))
    return tensors_of(Path(out))


def written(out: str = "out") -> dict[str, Any]:
    return json.loads((Path(out) / "config.json").read_text())


# ------------------------------------------------------------------------------------------------ numbers and their dtypes


def test_c18_weights_and_inputs_are_not_rounded_to_the_compute_dtype(models):
    """0.6 in bfloat16 is 0.6015625: times 3 the peer writes 1.8046875, the nearest number to 1.8 is 1.796875."""
    write_checkpoint(models / "a", tensors={NORM: torch.full((8,), 3.0)}, dtype=torch.float32)
    out = merged({"merge_method": "linear", "models": listed(a=0.6), "dtype": "bfloat16", "parameters": {"normalize": False}})
    assert out[NORM].tolist() == [1.796875] * 8
    write_checkpoint(models / "b", tensors={NORM: torch.full((8,), 1.003)}, dtype=torch.float32)  # bfloat16: 1.0
    out = merged({"merge_method": "linear", "models": listed(b=4), "dtype": "bfloat16", "out_dtype": "float32",
                  "parameters": {"normalize": False}}, "wide")
    torch.testing.assert_close(out[NORM], torch.full((8,), 4.012))


def test_c33_mixed_dtypes(models):
    """karcher crashes on them in the peer; here every method promotes, and bfloat16 with float16 makes float32."""
    write_checkpoint(models / "wide", dtype=torch.float32)
    write_checkpoint(models / "half", dtype=torch.float16)
    for other, method in (("wide", "karcher"), ("half", "karcher"), ("wide", "multislerp")):
        out = merged({"merge_method": method, "models": listed(a=1, **{other: 1}) if method == "multislerp"
                      else listed(a=None, **{other: None})}, f"{other}-{method}")
        assert {t.dtype for t in out.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_c63_config_says_what_was_written(models, method):
    """Without `dtype` the donor's config says bfloat16, and one float32 input makes the result float32."""
    write_checkpoint(models / "wide", dtype=torch.float32)
    config = {"merge_method": method, "models": listed(a=1, wide=1)} | ({"base_model": "base"} if method == "ties" else {})
    assert {t.dtype for t in merged(config).values()} == {torch.float32}
    assert written()["torch_dtype"] == "float32"


def test_c40_c61_results_take_the_wider_dtype_and_no_wider(models):
    """The peer's task arithmetic narrows to the base's dtype, its arcee_fusion and ramplus_tl widen to float32."""
    for method in ("arcee_fusion", "ramplus_tl"):
        out = merged({"merge_method": method, "base_model": "base", "models": listed(a=None)}, method)
        assert {t.dtype for t in out.values()} == {torch.bfloat16}


def test_c24_the_base_wherever_it_is_listed(models):
    base, a = tensors_of(models / "base"), tensors_of(models / "a")
    for i, order in enumerate((("base", "a"), ("a", "base"))):
        for t, wanted in ((0, base), (1, a)):
            out = merged({"merge_method": "slerp", "base_model": "base", "models": listed(**dict.fromkeys(order)),
                          "parameters": {"t": t}}, f"{i}{t}")
            assert all(out[n].equal(wanted[n]) for n in wanted), (order, t)


@pytest.mark.parametrize("said", [
    "density: 1.5", "density: -0.1", "gamma: 1.2", "select_topk: 1.5", "epsilon: -1", "t: -0.1", "dtype: int64", "max_iter: 0"])
def test_numbers_out_of_range_are_refused(models, said):
    """The peer takes a share above 1 for all, and a negative threshold for none."""
    name, value = said.split(": ")
    method = {"density": "ties", "gamma": "breadcrumbs", "select_topk": "sce", "epsilon": "ram", "t": "nearswap",
              "max_iter": "karcher"}.get(name, "linear")
    weight = 1 if method in ("ties", "breadcrumbs", "linear") else None
    config: dict[str, Any] = {"merge_method": method, "models": listed(a=weight)}
    if method not in ("linear", "karcher"):
        config["base_model"] = "base"
    config |= {"dtype": value} if name == "dtype" else {"parameters": {name: float(value)}}
    with pytest.raises(AnabranchError, match=f"{name}: got {re.escape(value) if name != 'dtype' else ''}"):
        merged(config)


# ------------------------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"passthrough"}))
def test_c19_c20_rows_that_differ_are_refused_by_every_method(models, method):
    """The peer cuts, or crashes; here the message says how to say which row is which."""
    write_checkpoint(models / "more", words=MORE)
    one = METHODS[method].branches[1] == 1
    entries = [{"model": m, **({"fisher": f"{m}.safetensors"} if method == "fisher" else {}),
                "parameters": {"weight": 1} if "weights" in METHODS[method].inputs and method != "karcher" else {}}
               for m in (["more"] if one else ["a", "more"])]
    parameters = {"t": 0.5} if method in ("slerp", "nearswap") else {}
    config: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": parameters}
    if METHODS[method].needs_base:
        config["base_model"] = "base"
    with pytest.raises(AnabranchError, match=r"rows.*tokenizer: \{source: base\}"):
        merged(config)
    assert not list(models.glob("out*"))


def test_c21_columns_are_never_cut(models):
    write_checkpoint(models / "odd", tensors={name: torch.zeros(len(WORDS), 6) for name in EMBEDDINGS})
    with pytest.raises(ShapeMismatch, match="does not truncate"):
        merged({"merge_method": "linear", "models": listed(a=1, odd=1)})


def test_c28_rows_of_a_tensor_of_three_dimensions():
    x = torch.randn((2, 1, 3, 4), generator=torch.Generator().manual_seed(0))
    method = METHODS["nuslerp"].function
    for row_wise, dim in ((False, -1), (True, 0)):
        out = method(x, torch.ones(2), flatten=False, row_wise=row_wise)
        moved = x.double().movedim(dim if dim < 0 else 1, -1)
        c = torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=-1).unsqueeze(-1).clamp(-1, 1)
        factor = torch.where(c.abs() > 1 - 1e-6, 0.5, (c.acos() / 2).sin() / c.acos().sin())
        wanted = (factor * (moved[0] + moved[1])).movedim(-1, dim)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sorted(name for name in METHODS if METHODS[name].fits == "any"))
def test_c81_a_tensor_of_no_dimension(method):
    """Branches at 3 and a base at 1: whatever the method, a number comes back, and not the base's for a trimmed one."""
    record = METHODS[method]
    k = int(min(2, record.branches[1]))
    given = {"branches": torch.full((k,), 3.0), "base": torch.tensor(1.0), "weights": torch.full((k,), 1 / k), "depth": 1.0,
             "draws": torch.full((k,), 0.99), "fisher": torch.ones(k), "cuts": torch.full((k,), 100.0)}
    said = {"t": 0.5} if method in ("slerp", "nearswap") else {"density": 0.3} if any(
        p.name == "density" for p in record.parameters) else {}
    out = record.function(*(given[name] for name in record.inputs), **said)
    wanted = {"slerp": 2.0, "nearswap": 1.5, "interpolate": 2.0, "ramplus_tl": 3.0}.get(method, 3.0)
    assert out.shape == () and out.item() == pytest.approx(wanted)


# ----------------------------------------------------------------------------------------------- the same bytes, every time

PROGRAM = """
import sys, json
from pathlib import Path
from anabranch.engine.merging import merge_config
from anabranch.engine.prepare import Options
from anabranch.artifacts import MergeManifest
for i, config in enumerate(json.loads(sys.argv[2])):
    made = merge_config(config, Path(sys.argv[1]) / str(i), options=Options(seed=5))
    print(i, sorted(made.tensors.items()), sorted((n, h) for n, h in made.files.items() if n.startswith("tok")))
"""


def test_c44_c62_c65_one_result_under_any_hash_seed(models):
    """Random drops with a merged tokenizer and without a base to order its ids; and three inputs of the methods that the
    peer hands them to in the order of a hash set."""
    write_checkpoint(models / "x", words=(*WORDS, "<x1>", "<x2>"))
    write_checkpoint(models / "y", words=(*WORDS, "<y1>", "<x2>", "<y2>"))
    configs = [
        {"merge_method": "dare_ties", "base_model": "base", "models": listed(x=1, y=1), "parameters": {"density": 0.5},
         "tokenizer": {"source": "union"}},
        {"merge_method": "linear", "models": listed(y=1, x=1), "tokenizer": {"source": "union"}},
        *({"merge_method": m, "base_model": "base", "models": listed(a=None, b=None, c=None)} for m in ("sce", "ram")),
    ]
    said = [subprocess.run([sys.executable, "-c", PROGRAM, str(models / seed), json.dumps(configs)], capture_output=True,
                           text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")}).stdout
            for seed in ("1", "2")]
    assert said[0] == said[1] and said[0].count("\n") == len(configs)
    ids = json.loads((models / "1" / "1" / "tokenizer.json").read_text())["added_tokens"]
    assert {t["content"]: t["id"] for t in ids if t["id"] >= len(WORDS)} == {"<y1>": 8, "<x2>": 9, "<y2>": 10, "<x1>": 11}


def test_c44_the_seed_is_all_that_decides(models):
    config = {"merge_method": "della_linear", "base_model": "base", "models": listed(a=1, b=1), "parameters": {"density": 0.5}}
    first, again, other = (merged(config, f"o{i}", seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert all(first[n].equal(again[n]) for n in first) and any(not first[n].equal(other[n]) for n in first)
    swapped = merged(config | {"models": listed(b=1, a=1)}, "swapped")
    assert all(torch.allclose(first[n].float(), swapped[n].float(), rtol=2**-7, atol=1e-6) for n in first)  # same draws


# -------------------------------------------------------------------------------------------------------------- tokenizers


def test_c67_a_forced_row_is_the_result(models):
    write_checkpoint(models / "other")
    tokens = {"one": {"source": "other", "force": True}}
    for config in ({"merge_method": "linear", "models": listed(a=0.3, other=0.7)},
                   {"merge_method": "ties", "base_model": "base", "models": listed(a=1, other=1),
                    "parameters": {"density": 0.4}}):
        out = merged(config | {"tokenizer": {"source": "union", "tokens": tokens}}, config["merge_method"])
        source = tensors_of(models / "other")
        assert all(out[name][2].equal(source[name][2]) for name in EMBEDDINGS)
        assert not out[EMBEDDINGS[0]][3].equal(source[EMBEDDINGS[0]][3])


def test_c68_c69_default_rows(models):
    """A token of one model is that model's row; the base's row stands in for who lacks one; zeros where they are asked for."""
    write_checkpoint(models / "x", words=(*WORDS, "<x>"))
    out = merged({"merge_method": "task_arithmetic", "base_model": "base", "models": listed(a=1, x=0.5),
                  "tokenizer": {"source": "union", "tokens": {"<new>": {"source": {"kind": "zero"}}, "<x>": {}}}})
    states = {n: tensors_of(models / n) for n in ("base", "a", "x")}
    for name in EMBEDDINGS:
        assert out[name][8].equal(states["x"][name][8]) and out[name][9].tolist() == [0.0] * 8
        base, a, x = (states[m][name][2].double() for m in ("base", "a", "x"))
        assert torch.allclose(out[name][2].double(), base + (a - base) + 0.5 * (x - base), rtol=2**-7, atol=1e-5)


def test_c79_slerp_of_a_union_scales_rows_that_all_inputs_share(models):
    """Two unrelated matrices, so that there is an angle: the row of a token that one model has is multiplied by what slerp
    gives for identical rows, sin((1 - t) w) / sin w + sin(t w) / sin w with the angle of the whole matrices."""
    generator = torch.Generator().manual_seed(3)
    for name, words in (("one", WORDS), ("two", MORE)):
        write_checkpoint(models / name, words=words, dtype=torch.float32,
                         tensors={n: torch.randn((len(words), 8), generator=generator) for n in EMBEDDINGS})
    out = merged({"merge_method": "slerp", "base_model": "one", "models": listed(two=None), "parameters": {"t": 0.5},
                  "tokenizer": {"source": "union"}})
    for name in EMBEDDINGS:
        one, two = (tensors_of(models / m)[name].double() for m in ("one", "two"))
        one = torch.cat([one, two[8:]])
        angle = torch.acos((one * two).sum() / one.norm() / two.norm())
        factor = float(2 * torch.sin(angle / 2) / torch.sin(angle))
        assert factor > 1.15
        torch.testing.assert_close(out[name][8].double(), factor * two[8], rtol=1e-5, atol=1e-6)


def test_a_model_s_own_code_comes_along(models):
    """config.json's `auto_map` names it; without it the result cannot be loaded."""
    write_checkpoint(models / "own", config={"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    (models / "own" / "modeling_own.py").write_text("raise SystemExit  # never run")
    merged({"merge_method": "linear", "models": listed(own=1, a=1)}, "with")
    merged({"merge_method": "linear", "models": listed(a=1, own=1)}, "without")
    assert (models / "with" / "modeling_own.py").exists() and not (models / "without" / "modeling_own.py").exists()


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_ties_over_the_whole_model(models, density):
    """Ranks over all tensors at once, by one sort of them all."""
    config = {"merge_method": "ties_global", "base_model": "base", "models": listed(a=1, b=1), "out_dtype": "float32",
              "parameters": {"density": density}}
    out = merged(config)
    base, *branches = (tensors_of(models / name) for name in ("base", "a", "b"))
    cuts = []
    for branch in branches:
        sizes = torch.cat([(branch[n].float() - base[n].float()).abs().flatten() for n in base]).sort(descending=True).values
        count = int(density * len(sizes))
        cuts.append(float(sizes[count - 1]) if count else float("inf"))
    for name in base:
        wanted = METHODS["ties_global"].function(torch.stack([b[name].float() for b in branches]), base[name].float(),
                                                 torch.ones(2), torch.tensor(cuts), density=density)
        assert out[name].equal(wanted), name


def test_small_steps_in_sixteen_bits_are_told_of(models):
    told: list[str] = []
    merge_config({"merge_method": "nearswap", "base_model": "base", "models": listed(a=None), "parameters": {"t": 1e-4}}, "out",
                 warn=told.append)
    assert len(told) == 1 and "`out_dtype: float32` keeps them" in told[0]


def test_layouts_of_experts_are_not_converted(models):
    """A tensor per expert in one model, the fused one in the other: both names, each told of."""
    old, new = "model.layers.0.mlp.experts.0.w1.weight", "model.layers.0.mlp.experts.gate_up_proj"
    write_checkpoint(models / "old", tensors={old: torch.ones(2, 2)})
    write_checkpoint(models / "new", tensors={new: torch.ones(1, 2, 2)})
    told: list[str] = []
    merge_config({"merge_method": "linear", "models": listed(old=1, new=1)}, "out", warn=told.append)
    assert {old, new} <= tensors_of(Path("out")).keys() and len(told) == 2
    with pytest.raises(ShapeMismatch):
        merged({"dialect": "native", "merge_method": "linear", "models": listed(old=1, new=1)}, "native")


# --------------------------------------------------------------------------------------------------------------- the page


def test_c14_a_slice_without_its_base_gets_it(models):
    """Where the peer raises a KeyError."""
    config = {"merge_method": "task_arithmetic", "base_model": "base", "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": 0.5}}]}]}
    out, base, a = merged(config), tensors_of(models / "base"), tensors_of(models / "a")
    wanted = {n: base[n].double() + 0.5 * (a[n].double() - base[n].double()) for n in shapes(2, len(WORDS))}
    assert all(torch.allclose(out[n].double(), wanted[n], rtol=2**-8, atol=1e-6) for n in wanted)


def test_c73_a_file_of_several_merges_is_refused(models):
    (models / "family.yaml").write_text("\n---\n".join(
        yaml.safe_dump({"name": name, "merge_method": "linear", "models": listed(a=1)}) for name in ("linear", "second")))
    with pytest.raises(AnabranchError, match=r"holds 2 documents \(linear, second\).*are a family: `anabranch merge FILE OUT`"):
        merge_config(models / "family.yaml", models / "out")


def references(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"`(test_\w+)::(test_\w+)", text))


def test_the_page_names_tests_that_exist():
    there = {(path.stem, name) for path in (ROOT / "tests").rglob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)}
    named = references(PAGE.read_text())
    assert len(named) > 50 and named <= there, sorted(named - there)


def test_the_page_lists_every_id_once_with_a_test_or_a_reason():
    rows = re.findall(r"^\| (C\d\d) \| (kept|fixed|refused|not applicable|differs) \| (.+) \|$", PAGE.read_text(),
                      flags=re.MULTILINE)
    assert [row[0] for row in rows] == [f"C{i:02}" for i in range(1, 84)]
    for name, status, what in rows:
        assert status == "not applicable" or references(what), name
