"""`anabranch lora merge`: held to the dense merge of base plus adapter, to PEFT's combinations, and to `anabranch merge`."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from anabranch import cli_lora
from anabranch.engine.merging import merge
from anabranch.errors import AnabranchError, ModelError, OutputError, RecipeError, ShapeMismatch
from anabranch.lora import spaces
from anabranch.lora.apply import apply
from anabranch.lora.combine import forecast, merge_adapters
from anabranch.lora.config import read_adapter_merge
from anabranch.lora.factors import factors_folder
from anabranch.merge import METHODS, MergeMethod, arguments_for, fitting

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SETTINGS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
            "num_hidden_layers": 2, "tie_word_embeddings": False}
# Unequal ranks, scales and modules.
ADAPTERS = [{"r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "k_proj"]},
            {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj", "v_proj"], "use_rslora": True},
            {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens"]}]
WEIGHTS = (0.5, 0.3, 0.4)
GIVEN = {"t": 0.3, "density": 0.6}
NOT_HERE = {"fisher"}


class Bench:
    """A base, adapters with random factors, and what PEFT says their models are."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.base = folder / "base"
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(self.base)
        self.model, self.adapters, self.dense = model, [], []
        for i, settings in enumerate(ADAPTERS):
            self.adapters.append(self.adapter(folder / f"adapter-{i}", i, **settings))
            self.dense.append(self.folded(self.adapters[-1]))
        self.weights = {n: t.clone() for n, t in model.state_dict().items()}

    def adapter(self, folder: Path, seed: int, **settings: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(copy.deepcopy(self.model), peft.LoraConfig(**settings))
            torch.manual_seed(seed + 1)
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.2)
            wrapped.save_pretrained(folder)
        return folder

    def folded(self, adapter: Path) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(copy.deepcopy(self.model), adapter).merge_and_unload()
        return {n: t.clone() for n, t in model.state_dict().items()}

    def changed(self, adapter: Path, tensor: str) -> np.ndarray:
        return (self.folded(adapter)[tensor] - self.weights[tensor]).numpy().astype(float)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def parameters(method: MergeMethod) -> set[str]:
    weighted = "weights" in method.inputs and method.name != "karcher"
    return {p.name for p in method.parameters} | ({"weight"} if weighted else set())


def config_for(method: MergeMethod, bench: Bench, **more: Any) -> dict[str, Any]:
    k = 1 if method.branches[1] == 1 else 2 if method.name == "nuslerp" else 3
    known = parameters(method)
    models = [{"model": str(bench.adapters[i]), "parameters": {n: v for n, v in (("weight", WEIGHTS[i]),) if n in known}}
              for i in range(k)]
    given = {n: v for n, v in GIVEN.items() if n in known} | ({"density": 0.1} if method.cuts_from else {})
    return {"merge_method": method.name, "dialect": "native", "models": models, "parameters": given} | more


def dense_by_function(method: MergeMethod, bench: Bench, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The method's own function on PEFT's whole models."""
    k = len(config["models"])
    cuts = torch.zeros(k)
    if method.cuts_from:  # ranked over the whole model, as the method says
        for i in range(k):
            every = torch.cat([(bench.dense[i][n] - w).abs().flatten() for n, w in bench.weights.items()])
            cuts[i] = every.sort(descending=True).values[int(config["parameters"]["density"] * len(every)) - 1]
    weights = [m["parameters"].get("weight", 1 / k) for m in config["models"]]
    if method.name in ("token_weighted", "interpolate"):
        weights = [w / sum(weights) for w in weights]
    merged = {}
    for name, base in bench.weights.items():
        branches = torch.stack([bench.dense[i][name] for i in range(k)])
        if bool((branches == base).all()):
            merged[name] = base
            continue
        arguments = arguments_for(method, config["parameters"], k)
        one, given = fitting(method, arguments, base.shape, name in ("model.embed_tokens.weight", "lm_head.weight"))
        layer = name.split(".")[2]
        inputs = {"branches": branches, "base": base, "weights": torch.tensor(weights), "cuts": cuts,
                  "depth": float(layer) if layer.isdigit() else 0.0}  # two layers: 0 and 1
        merged[name] = one.function(*(inputs[i] for i in one.inputs), **given)
    return merged


WITHOUT_DRAWS = sorted(n for n, m in METHODS.items() if n not in NOT_HERE and "draws" not in m.inputs)


@pytest.mark.parametrize("name", WITHOUT_DRAWS)
def test_at_full_rank_it_is_the_dense_merge(name: str, bench: Bench, tmp_path: Path) -> None:
    method = METHODS[name]
    config = config_for(method, bench)
    merge_adapters(config | {"rank": 64, "base_model": str(bench.base)}, tmp_path / "a")
    got, wanted = bench.folded(tmp_path / "a"), dense_by_function(method, bench, config)
    moved = max(float((wanted[n] - bench.weights[n]).abs().max()) for n in wanted)
    assert moved > 1e-2
    for tensor in wanted:
        # An entry whose magnitude ties with the threshold may fall on either side of it.
        apart = (got[tensor] - wanted[tensor]).abs()
        assert int((apart > 1e-5).sum()) <= (1 if name in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce") else 0), tensor


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if "draws" in m.inputs))
def test_with_a_base_it_draws_as_the_merge_of_models_does(name: str, bench: Bench, tmp_path: Path) -> None:
    """dare and della: the same entries are dropped as by `anabranch merge` of BASE+ADAPTER."""
    config = config_for(METHODS[name], bench, base_model=str(bench.base))
    merge_adapters(config | {"rank": 64}, tmp_path / "a", seed=3)
    apply(bench.base, tmp_path / "a", tmp_path / "model")
    whole = copy.deepcopy(config)
    for one in whole["models"]:
        one["model"] = f"{bench.base}+{one['model']}"
    merge(whole, tmp_path / "wanted", seed=3, warn=None)
    got, wanted = load_file(tmp_path / "model" / "model.safetensors"), load_file(tmp_path / "wanted" / "model.safetensors")
    for tensor in wanted:
        torch.testing.assert_close(got[tensor], wanted[tensor], atol=1e-5, rtol=0)
    merge_adapters(config | {"rank": 64}, tmp_path / "b", seed=4)
    files = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert files[0] != files[1]


def test_without_a_base_the_same(bench: Bench, tmp_path: Path) -> None:
    for name in ("task_arithmetic", "tsv_m", "ties"):
        config = config_for(METHODS[name], bench, rank=64)
        merge_adapters(config, tmp_path / name)
        merge_adapters(config | {"base_model": str(bench.base)}, tmp_path / f"{name}-base")
        one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in (name, f"{name}-base"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- the two laws that sort the methods ---


def laws(method: MergeMethod, arguments: dict[str, Any]) -> tuple[float, float]:
    """How far a method is from `d(base + x) = d(x)` and from `d(R x S) = R d(x) S`, relative."""
    rng = np.random.default_rng(0)
    k = 1 if method.branches[1] == 1 else 2 if method.name == "nuslerp" else 3
    base = torch.from_numpy(rng.normal(size=(12, 9))).float()
    changes = torch.from_numpy(0.1 * rng.normal(size=(k, 12, 3)) @ rng.normal(size=(k, 3, 9))).float()
    r, s = (torch.from_numpy(np.linalg.qr(rng.normal(size=(n, n)))[0]) for n in (12, 9))
    inputs = {"weights": torch.tensor(WEIGHTS[:k]), "depth": 0.5, "cuts": torch.full((k,), 0.05),
              "draws": torch.from_numpy(rng.random((k, 12, 9))).float()}
    if method.name in ("token_weighted", "interpolate"):
        inputs["weights"] = inputs["weights"] / inputs["weights"].sum()

    def run(branches: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
        every = inputs | {"branches": branches, "base": origin}
        return method.function(*(every[i] for i in method.inputs), **arguments).double()

    def turned(x: torch.Tensor) -> torch.Tensor:
        return r @ x.double() @ s.T

    plain = run(changes, torch.zeros_like(base))
    shifted = run(base + changes, base) - base
    rotated = run(turned(changes).float(), torch.zeros_like(base))
    return float((shifted - plain).norm() / plain.norm()), float((rotated - turned(plain)).norm() / plain.norm())


@pytest.mark.parametrize("name", sorted(set(METHODS) - NOT_HERE))
def test_every_method_is_of_the_kind_that_it_is_said_to_be(name: str) -> None:
    method = METHODS[name]
    arguments = arguments_for(method, {n: v for n, v in GIVEN.items() if n in parameters(method)}, None)
    shift, rotation = laws(method, arguments)
    kind = spaces.kind_of(method, arguments, WEIGHTS)
    if kind == "weights":
        assert shift > 1e-3
    else:
        assert shift < 1e-4
    if kind == "turning":
        assert rotation < 1e-5
    elif kind == "entrywise" and name not in ("ram", "ramplus_tl"):  # theirs shows where an entry is exactly 0
        assert rotation > 1e-3


@pytest.mark.parametrize("name, given", [("nuslerp", {"flatten": False}), ("model_stock", {"filter_wise": True}),
                                         ("nuslerp", {"flatten": False, "row_wise": True})])
def test_by_rows_they_are_entrywise(name: str, given: dict[str, Any]) -> None:
    arguments = arguments_for(METHODS[name], given, None)
    assert spaces.kind_of(METHODS[name], arguments, WEIGHTS) == "entrywise" and laws(METHODS[name], arguments)[1] > 1e-3


@pytest.mark.parametrize("name", ["tsv_m", "iso_cts"])
def test_core_matrices_are_padded_until_nothing_is_cut_that_dense_keeps(name: str, tmp_path: Path, bench: Bench) -> None:
    """One adapter of rank 6 among five of rank 1: p / k is less than 6, min(m, n) / k is not."""
    adapters = [bench.adapter(tmp_path / f"r{i}", i, r=r, lora_alpha=r, target_modules=["q_proj"])
                for i, r in enumerate((6, 1, 1, 1, 1))]
    tensor = "model.layers.0.self_attn.q_proj.weight"
    for given in ({}, {"common_share": 0.3}) if name == "iso_cts" else ({},):
        out = tmp_path / f"out{len(given)}"
        models = [{"model": str(a)} for a in adapters]
        merge_adapters({"merge_method": name, "models": models, "parameters": given, "rank": 64}, out)
        changes = torch.from_numpy(np.stack([bench.changed(a, tensor) for a in adapters])).float()
        wanted = METHODS[name].function(changes, torch.zeros(32, 32), torch.ones(5), **given)
        np.testing.assert_allclose(bench.changed(out, tensor), wanted.numpy(), atol=1e-5)


def test_core_matrices_share_out_what_the_whole_matrix_shares_out() -> None:
    """Iso-CTS, own and common directions counted as the method counts them: on the padded core as on the matrix."""
    def shared(r: int, share: float, k: int, ranks: tuple[int, ...]) -> tuple[int, int]:
        own = min(round((r - int(r * share)) / k), r // k)
        return min(own, max(ranks)), min(r - own * k, sum(ranks))

    for least, k, share in itertools.product(range(4, 64), (1, 2, 3, 5), np.linspace(0, 1, 23)):
        for ranks in ((1,) * k, (4,) * k, (6, *[1] * (k - 1)), (16,) * k):
            ranks = tuple(min(r, least) for r in ranks)
            size, given = spaces.padded(METHODS["iso_cts"], {"common_share": float(share)}, (least, 70), ranks, k)
            core = max(size, min(least, sum(ranks)))
            assert core == size
            assert shared(core, given["common_share"], k, ranks) == shared(least, share, k, ranks), (least, k, share, ranks)


def test_an_adapter_of_weight_zero_leaves_the_others_theirs(tmp_path: Path, bench: Bench) -> None:
    """Its directions are none that TSV-M and Iso-CTS may share out; nor do they stand in the result of any method."""
    adapters = [bench.adapter(tmp_path / f"r{i}", i, r=r, lora_alpha=r, target_modules=["k_proj"])
                for i, r in enumerate((6, 3, 4, 1))]
    tensor = "model.layers.0.self_attn.k_proj.weight"
    changes = torch.from_numpy(np.stack([bench.changed(a, tensor) for a in adapters])).float()
    weights = (0.0, 0.38, 0.38, 0.34)
    models = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, weights, strict=True)]
    for i, (name, given) in enumerate([("iso_cts", {"common_share": 0.07}), ("iso_cts", {"common_share": 0.5}), ("tsv_m", {}),
                                       ("star", {}), ("multislerp", {})]):
        out = tmp_path / f"out{i}"
        merge_adapters({"merge_method": name, "dialect": "native", "models": models, "parameters": given, "rank": 64}, out)
        method = METHODS[name]
        every = {"branches": changes, "base": torch.zeros(16, 32), "weights": torch.tensor(weights)}
        wanted = method.function(*(every[n] for n in method.inputs), **arguments_for(method, given, None))
        np.testing.assert_allclose(bench.changed(out, tensor), wanted.numpy(), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["task_arithmetic", "tsv_m", "iso_c", "star", "model_stock", "multislerp"])
def test_the_same_adapter_twice_has_its_rank_once(name: str, bench: Bench, tmp_path: Path) -> None:
    twin = edited(bench.adapters[0], tmp_path / "twin")
    known = parameters(METHODS[name])
    models = [{"model": str(a), "parameters": {"weight": 0.5} if "weight" in known else {}} for a in (bench.adapters[0], twin)]
    manifest = merge_adapters({"merge_method": name, "models": models}, tmp_path / "a")
    assert manifest.report["ranks"][1] <= 4
    if name == "task_arithmetic":
        for tensor, wanted in bench.folded(bench.adapters[0]).items():
            torch.testing.assert_close(bench.folded(tmp_path / "a")[tensor], wanted, atol=1e-5, rtol=0)


def test_changes_that_cancel_leave_nothing_and_no_rounding(bench: Bench, tmp_path: Path) -> None:
    twin = edited(bench.adapters[0], tmp_path / "twin")
    models = [{"model": str(a), "parameters": {"weight": w}} for a, w in ((bench.adapters[0], 1.0), (twin, -1.0))]
    with pytest.raises(ModelError, match="changes nothing"):
        merge_adapters({"merge_method": "task_arithmetic", "models": models}, tmp_path / "a")
    models = [m | {"parameters": {"weight": 0.0}} for m in models]
    for name in ("task_arithmetic", "cat", "peft_linear"):
        with pytest.raises(ModelError, match="changes nothing"):
            merge_adapters({"merge_method": name, "models": models}, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not factors_folder(tmp_path / "a").exists()
    small = [m | {"parameters": {"weight": 1e-9}} for m in models]  # small is not nothing
    assert merge_adapters({"merge_method": "task_arithmetic", "models": small}, tmp_path / "a").report["ranks"] == [4, 4]


# --- ranks and what they lose ---


def test_a_rank_keeps_the_best_and_tells_what_is_lost(bench: Bench, tmp_path: Path) -> None:
    said: list[str] = []
    config = config_for(METHODS["task_arithmetic"], bench, rank=3)
    manifest = merge_adapters(config, tmp_path / "a", warn=said.append)
    report = json.loads((tmp_path / "a" / "lora_report.json").read_text())["matrices"]
    for path, told in report.items():
        tensor = f"{path}.weight"
        whole = sum(w * (d[tensor] - bench.weights[tensor]).double() for w, d in zip(WEIGHTS, bench.dense, strict=True))
        u, s, vt = np.linalg.svd(whole.numpy(), full_matrices=False)
        np.testing.assert_allclose(bench.changed(tmp_path / "a", tensor), (u[:, :3] * s[:3]) @ vt[:3], atol=2e-6)
        assert told["kept_energy"] == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), abs=1e-5)
        assert told["rank"] == min(3, int((s > 1e-5 * s[0]).sum()))
    assert 0 < manifest.report["kept_energy"] < 1 and any("loses" in text for text in said)


def test_energy_and_budget(bench: Bench, tmp_path: Path) -> None:
    config = config_for(METHODS["task_arithmetic"], bench)
    merge_adapters(config | {"energy": 0.9}, tmp_path / "e")
    report = json.loads((tmp_path / "e" / "lora_report.json").read_text())["matrices"]
    assert all(one["kept_energy"] >= 0.9 - 1e-6 for one in report.values()) and len({r["rank"] for r in report.values()}) > 1
    manifest = merge_adapters(config | {"budget": 2000}, tmp_path / "b")
    assert 1800 <= manifest.report["parameters"] <= 2000


def test_an_entrywise_merge_in_core_space_is_another_one_and_keeps_its_rank(bench: Bench, tmp_path: Path) -> None:
    config = config_for(METHODS["ties"], bench)
    core = merge_adapters(config | {"space": "core"}, tmp_path / "core")
    said: list[str] = []
    dense = merge_adapters(config, tmp_path / "dense", warn=said.append)
    assert core.report["spaces"] == ["core"] and core.report["kept_energy"] == 1 and core.report["ranks"][1] <= 9
    assert dense.report["spaces"] == ["dense"] and dense.report["kept_energy"] < 0.999 and any("full rank" in t for t in said)
    tensor = "model.layers.0.self_attn.q_proj.weight"
    ours = bench.changed(tmp_path / "core", tensor)
    wanted = dense_by_function(METHODS["ties"], bench, config)[tensor] - bench.weights[tensor]
    assert np.abs(ours - wanted.numpy()).max() > 1e-2
    # and it is TIES on the entries of the core matrices: Core Space with numpy
    factors = []
    for i, (adapter, settings) in enumerate(zip(bench.adapters, ADAPTERS, strict=True)):
        state = load_file(adapter / "adapter_model.safetensors")
        a, b = (state[f"base_model.model.{tensor.removesuffix('.weight')}.lora_{s}.weight"].numpy().astype(float) for s in "AB")
        root = np.sqrt(settings["r"]) if i == 1 else settings["r"]
        factors.append((b, a, settings["lora_alpha"] / root))
    u = np.linalg.svd(np.concatenate([b for b, _, _ in factors], 1), full_matrices=False)[0]
    vt = np.linalg.svd(np.concatenate([a for _, a, _ in factors], 0), full_matrices=False)[2]
    cores = torch.from_numpy(np.stack([s * (u.T @ b) @ (a @ vt.T) for b, a, s in factors])).float()
    one = METHODS["ties"].function(cores, torch.zeros_like(cores[0]), torch.tensor(WEIGHTS), density=GIVEN["density"])
    np.testing.assert_allclose(ours, u @ one.numpy() @ vt, atol=2e-5)


def test_compressed_merges_in_shared_directions_of_the_rank(bench: Bench, tmp_path: Path) -> None:
    for name in ("task_arithmetic", "ties"):
        config = config_for(METHODS[name], bench, space="compressed", rank=3)
        manifest = merge_adapters(config, tmp_path / name)
        assert manifest.report["ranks"][1] <= 3
        tensor = "model.layers.1.mlp.down_proj.weight"
        changes = np.stack([(d[tensor] - bench.weights[tensor]).numpy().astype(float) for d in bench.dense])
        u = np.linalg.svd(np.concatenate(list(changes), 1), full_matrices=False)[0][:, :3]
        vt = np.linalg.svd(np.concatenate(list(changes), 0), full_matrices=False)[2][:3]
        small = torch.from_numpy(u.T @ changes @ vt.T).float()
        if name == "task_arithmetic":  # which does not see the signs of the bases
            merged = METHODS[name].function(small, torch.zeros(3, 3), torch.tensor(WEIGHTS)).numpy()
            np.testing.assert_allclose(bench.changed(tmp_path / name, tensor), u @ merged @ vt, atol=2e-5)


# --- PEFT's combinations ---


def combined(bench: Bench, adapters: list[Path], weights: list[float], kind: str,
             rank: int | None = None) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(bench.model), adapters[0], adapter_name="0")
        for i, adapter in enumerate(adapters[1:], 1):
            model.load_adapter(adapter, adapter_name=str(i))
        model.add_weighted_adapter([str(i) for i in range(len(adapters))], weights, "new", combination_type=kind, svd_rank=rank)
        model.set_adapter("new")
        return dict(model.merge_and_unload(adapter_names=["new"]).state_dict())


def test_peft_linear_is_pefts_and_says_what_it_gets_wrong(bench: Bench, tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    adapters = [bench.adapter(tmp_path / f"s{i}", i + 7, **settings) for i in range(3)]
    weights = [0.5, -0.3, 0.4]
    models = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, weights, strict=True)]
    said: list[str] = []
    manifest = merge_adapters({"merge_method": "peft_linear", "models": models}, tmp_path / "a", warn=said.append)
    wanted = combined(bench, adapters, weights, "linear")
    got = bench.folded(tmp_path / "a")
    exact = {n: sum(w * torch.from_numpy(bench.changed(a, n)) for a, w in zip(adapters, weights, strict=True))
             for n in wanted if "q_proj" in n or "up_proj" in n}
    wrong = total = 0.0
    for tensor in wanted:
        torch.testing.assert_close(got[tensor], wanted[tensor], atol=1e-6, rtol=0)
        if tensor in exact:
            wrong += float((got[tensor] - bench.weights[tensor] - exact[tensor]).double().square().sum())
            total += float(exact[tensor].square().sum())
    assert manifest.report["wrong"] == pytest.approx((wrong / total) ** 0.5, rel=1e-3) and manifest.report["wrong"] > 0.3
    assert any(f"{manifest.report['wrong']:.0%}" in text for text in said)
    assert "kept_energy" not in manifest.report  # nothing is kept of anything
    assert f"{manifest.report['wrong']:.0%} of the weighted sum's length away" in (tmp_path / "a" / "README.md").read_text()


def test_cat_is_exact_and_so_is_pefts(bench: Bench, tmp_path: Path) -> None:
    models = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(bench.adapters[:2], WEIGHTS, strict=False)]
    manifest = merge_adapters({"merge_method": "cat", "models": models}, tmp_path / "a")
    got, wanted = bench.folded(tmp_path / "a"), combined(bench, bench.adapters[:2], list(WEIGHTS[:2]), "cat")
    for tensor in wanted:
        torch.testing.assert_close(got[tensor], wanted[tensor], atol=1e-6, rtol=0)
    assert manifest.report["ranks"] == [2, 6]


@pytest.mark.parametrize("given, factor", [({"normalize": True}, 1 / 0.8), ({"scale": 0.5}, 0.5)])
@pytest.mark.parametrize("name", ["cat", "peft_linear"])
def test_by_factors_numbers_of_the_whole_merge_count_too(name: str, given: dict[str, Any], factor: float, bench: Bench,
                                                        tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    adapters = [bench.adapter(tmp_path / f"s{i}", i + 7, **settings) for i in range(2)]
    for out, numbers, weights in (("a", given, (0.5, 0.3)), ("b", {}, (0.5 * factor, 0.3 * factor))):
        models = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, weights, strict=True)]
        merge_adapters({"merge_method": name, "dialect": "native", "models": models, "parameters": numbers}, tmp_path / out)
    tensor = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(bench.changed(tmp_path / "a", tensor), bench.changed(tmp_path / "b", tensor), atol=1e-6)


@pytest.mark.parametrize("name", ["task_arithmetic", "cat", "peft_linear"])
def test_the_error_that_is_told_is_that_of_the_factors_as_stored(name: str, bench: Bench, tmp_path: Path) -> None:
    """Measured against PEFT's own reading of the file: the rank's loss and bfloat16's together."""
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    adapters = [bench.adapter(tmp_path / f"s{i}", i + 7, **settings) for i in range(2)]
    models = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, (0.6, 0.5), strict=True)]
    for rank in (8, 3) if name == "task_arithmetic" else (0,):
        config = {"merge_method": name, "models": models, "dtype": "bfloat16"} | ({"rank": rank} if rank else {})
        report = merge_adapters(config, tmp_path / f"a{rank}").report
        wrong = total = 0.0
        for tensor in bench.weights:
            if "q_proj" in tensor or "down_proj" in tensor:
                exact = 0.6 * bench.changed(adapters[0], tensor) + 0.5 * bench.changed(adapters[1], tensor)
                wrong += float(((bench.changed(tmp_path / f"a{rank}", tensor) - exact) ** 2).sum())
                total += float((exact**2).sum())
        told = report["wrong" if name == "peft_linear" else "relative_error"]
        assert told == pytest.approx((wrong / total) ** 0.5, rel=2e-3) and told > 1e-3 and report["factors"] == "bfloat16"
        if name == "task_arithmetic":
            exact_again = merge_adapters(config | {"dtype": "float32"}, tmp_path / f"f{rank}").report
            assert exact_again["rounding"] < 1e-6 and (rank == 3 or exact_again["relative_error"] < 1e-6)
            assert 1e-3 < report["rounding"] < 5e-3 and (rank == 8) == (told == pytest.approx(report["rounding"], rel=1e-2))


def test_at_equal_rank_a_linear_merge_is_pefts_svd(bench: Bench, tmp_path: Path) -> None:
    config = config_for(METHODS["task_arithmetic"], bench, rank=4)
    config["models"] = config["models"][:2]
    merge_adapters(config, tmp_path / "a")
    got, wanted = bench.folded(tmp_path / "a"), combined(bench, bench.adapters[:2], list(WEIGHTS[:2]), "svd", 4)
    for tensor in wanted:
        torch.testing.assert_close(got[tensor], wanted[tensor], atol=2e-6, rtol=0)


# --- what adapters save whole, and other shapes ---


def test_what_is_saved_whole_is_merged_from_the_base(bench: Bench, tmp_path: Path) -> None:
    saving = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}
    adapters = [bench.adapter(tmp_path / "s0", 1, **saving), bench.adapters[0]]
    models = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, (0.5, 0.25), strict=True)]
    config = {"merge_method": "task_arithmetic", "models": models}
    with pytest.raises(RecipeError, match="give `base_model:`"):
        merge_adapters(config, tmp_path / "none")
    merge_adapters(config | {"base_model": str(bench.base)}, tmp_path / "a")
    got = bench.folded(tmp_path / "a")
    first, second = bench.folded(adapters[0]), bench.folded(adapters[1])
    for tensor, base in bench.weights.items():
        torch.testing.assert_close(got[tensor], base + 0.5 * (first[tensor] - base) + 0.25 * (second[tensor] - base), atol=2e-6,
                                   rtol=0)


class Biased(Bench):
    """With biases in its attention, tied or not."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.base, self.model = folder / "base", transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SETTINGS, attention_bias=True))
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        self.model.save_pretrained(self.base)
        self.weights = {n: t.clone() for n, t in self.model.state_dict().items()}


ODD = {"r": 3, "lora_alpha": 5}
MIXED: dict[str, list[dict[str, Any]]] = {
    # a bias that one saves outside, and that belongs into `base_layer` where the other's factors are
    "biases": [ODD | {"bias": "all", "target_modules": ["q_proj"]}, ODD | {"bias": "lora_only", "target_modules": ["k_proj"]}],
    "patterns": [ODD | {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"k_proj": 7},
                        "target_modules": ["q_proj", "k_proj", "down_proj"]},
                 ODD | {"use_rslora": True, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9},
                        "target_modules": "all-linear"}],
    "layers": [ODD | {"target_modules": ["q_proj"], "layers_to_transform": [1]},
               ODD | {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}],
    "head": [ODD | {"target_modules": ["lm_head"]}, ODD | {"target_modules": ["embed_tokens", "lm_head"]}],
}


@pytest.mark.parametrize("method", ["task_arithmetic", "cat"])
@pytest.mark.parametrize("case", sorted(MIXED))
def test_peft_reads_the_merge_of_adapters_of_different_make(case: str, method: str, tmp_path: Path) -> None:
    bench = Biased(tmp_path)
    adapters = [bench.adapter(tmp_path / f"m{i}", i, **settings) for i, settings in enumerate(MIXED[case])]
    models = [{"model": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, (0.7, 0.4), strict=True)]
    merge_adapters({"merge_method": method, "models": models, "base_model": str(bench.base)}, tmp_path / "a")
    apply(bench.base, tmp_path / "a", tmp_path / "out")
    got, one, other = bench.folded(tmp_path / "a"), *(bench.folded(a) for a in adapters)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for tensor, base in bench.weights.items():
        wanted = base + 0.7 * (one[tensor] - base) + 0.4 * (other[tensor] - base)
        torch.testing.assert_close(got[tensor], wanted, atol=2e-6, rtol=0)
        torch.testing.assert_close(ours[tensor], wanted, atol=2e-6, rtol=0)


def test_saved_whole_by_one_and_factors_of_another_are_refused(tmp_path: Path) -> None:
    """PEFT would read the saved module and pass over the factors."""
    bench = Biased(tmp_path)
    makes = [ODD | {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}, ODD | {"target_modules": ["k_proj"]}]
    adapters = [bench.adapter(tmp_path / f"m{i}", i, **settings) for i, settings in enumerate(makes)]
    models = [{"model": str(a), "parameters": {"weight": 0.5}} for a in adapters]
    with pytest.raises(RecipeError, match="PEFT takes one or the other"):
        merge_adapters({"merge_method": "task_arithmetic", "models": models, "base_model": str(bench.base)}, tmp_path / "a")
    with pytest.raises(RecipeError, match="is a model with an adapter"):
        merge_adapters({"merge_method": "slerp", "models": models, "base_model": f"{bench.base}+{adapters[0]}"}, tmp_path / "a")


def test_a_gpt2_in_its_own_orientation(tmp_path: Path) -> None:
    """TIES ranks entries of the weight as it is stored, [in, out]; DARE draws for them."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32,
                                                                 bos_token_id=1, eos_token_id=1))
    model.save_pretrained(tmp_path / "base")
    bench = Bench.__new__(Bench)
    bench.model, bench.weights = model, {n: t.clone() for n, t in model.state_dict().items()}
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    adapters = [bench.adapter(tmp_path / f"g{i}", i, **settings) for i in range(2)]
    models = [{"model": str(a), "parameters": {"weight": 1.0, "density": 0.5}} for a in adapters]
    config = {"merge_method": "dare_ties", "models": models, "base_model": str(tmp_path / "base"), "rank": 16}
    merge_adapters(config, tmp_path / "a")
    apply(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    whole = {k: v for k, v in config.items() if k != "rank"} | {"models": [m | {"model": f"{tmp_path / 'base'}+{m['model']}"}
                                                                        for m in models]}
    merge(whole, tmp_path / "wanted", warn=None)
    got, wanted = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "wanted"))
    assert all(float((got[n] - wanted[n]).abs().max()) < 1e-5 for n in wanted)


# --- what is refused, and what is kept ---


def edited(source: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("changes, words", [
    ({"use_dora": True}, "DoRA"), ({"peft_type": "LOHA"}, "LOHA"), ({"lora_bias": True}, "lora_bias"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"), ({"init_lora_weights": "pissa"}, "pissa"),
    ({"r": 9}, "not of rank 9"), ({"r": "x"}, "`r` is 'x'"), ({"rank_pattern": {"(": 3}}, "no regular expression"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
])
def test_what_is_no_plain_lora_is_refused_by_name(changes: dict[str, Any], words: str, bench: Bench, tmp_path: Path) -> None:
    odd = edited(bench.adapters[0], tmp_path / "odd", **changes)
    config = {"merge_method": "task_arithmetic",
              "models": [{"model": str(a), "parameters": {"weight": 1}} for a in (odd, bench.adapters[1])]}
    with pytest.raises(ModelError) as caught:
        merge_adapters(config, tmp_path / "a")
    assert words in str(caught.value) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("change, words", [
    ({"merge_method": "tise"}, ["Did you mean `ties`"]),
    ({"merge_method": None}, ["merge_method: required"]),
    ({"merge_method": "fisher"}, ["not for adapters"]),
    ({"merge_method": "ties_global", "space": "core"}, ["ranks the entries of whole matrices"]),
    ({"rank": 0, "energy": 2}, ["rank: got 0", "energy: got 2"]),
    ({"rank": "many", "space": "cor"}, ["rank: got 'many'", "space: got 'cor'"]),
    ({"energy": 0.5, "budget": 100}, ["energy and budget"]),
    ({"space": "compressed"}, ["Give `rank:`"]),
    ({"merge_method": "cat", "rank": 3}, ["cat has its own rank"]),
    ({"tokenizer": {"source": "union"}, "ranks": 3}, ["`tokenizer`", "unknown key `ranks`", "Did you mean `rank`"]),
    ({"models": []}, ["none is"]),
    ({"merge_method": "linear", "parameters": {"normalize": False}}, ["give `base_model:`"]),
    ({"merge_method": "karcher", "space": "core"}, ["on whole matrices only"]),
])
def test_every_problem_of_a_config_in_one_message(change: dict[str, Any], words: list[str], bench: Bench,
                                                 tmp_path: Path) -> None:
    method = METHODS[change["merge_method"]] if change.get("merge_method") in METHODS else METHODS["task_arithmetic"]
    config = config_for(method if method.name not in NOT_HERE else METHODS["task_arithmetic"], bench)
    with pytest.raises(RecipeError) as caught:
        merge_adapters(config | change, tmp_path / "a")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "a").exists() and not factors_folder(tmp_path / "a").exists()


def test_two_adapters_cannot_be_slerped_and_one_can(bench: Bench, tmp_path: Path) -> None:
    models = [{"model": str(a)} for a in bench.adapters[:2]]
    config = {"merge_method": "slerp", "base_model": str(bench.base), "models": models, "parameters": {"t": 0.5}}
    with pytest.raises(RecipeError, match=r"here are 2 adapters. List one; for several use nuslerp") as caught:
        merge_adapters(config, tmp_path / "a")
    assert "of-the-adapters" not in str(caught.value) and len(str(caught.value).splitlines()) == 2
    assert merge_adapters(config | {"models": models[:1]}, tmp_path / "a").report["matrices"]
    for name in ("nuslerp", "multislerp"):
        entries = [one | {"parameters": {"weight": 0.5}} for one in models]
        assert merge_adapters({"merge_method": name, "models": entries}, tmp_path / name).report["matrices"]


def test_several_documents_are_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("merge_method: ties\n---\nmerge_method: cat\n")
    with pytest.raises(RecipeError, match=r"holds several documents.*wanted one"):
        merge_adapters(tmp_path / "two.yaml", tmp_path / "a")


def test_the_table_does_not_say_that_equals_lose_less() -> None:
    one = {"shape": [4, 4], "rank": 2, "kept_energy": 1.0, "relative_error": 0.0}
    rows = {f"m{i:02}": dict(one) for i in range(14)}
    assert "2 more, which lose nothing either" in cli_lora._table(rows)[-1]
    rows["m00"]["kept_energy"] = 0.5
    assert "2 more, which lose no more" in cli_lora._table(rows)[-1]


def test_adapters_of_other_models(bench: Bench, tmp_path: Path) -> None:
    other = tmp_path / "other"
    edited(bench.adapters[0], other)
    state = {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in load_file(other / "adapter_model.safetensors").items()}
    save_file(state, other / "adapter_model.safetensors")
    models = [{"model": str(a), "parameters": {"weight": 1}} for a in (other, bench.adapters[1])]
    with pytest.raises(ShapeMismatch, match="different models"):
        merge_adapters({"merge_method": "task_arithmetic", "models": models}, tmp_path / "a")
    with pytest.raises(ModelError, match="no such folder"):
        missing = [{"model": str(tmp_path / "x"), "parameters": {"weight": 1}}]
        merge_adapters({"merge_method": "task_arithmetic", "models": missing}, tmp_path / "a")
    (other / "adapter_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(AnabranchError, match="damaged or cut short"):
        merge_adapters({"merge_method": "task_arithmetic", "models": models}, tmp_path / "a")


def test_the_result_has_the_adapters_dtype_where_they_agree(bench: Bench, tmp_path: Path) -> None:
    low = []
    for i, adapter in enumerate(bench.adapters[:2]):
        low.append(edited(adapter, tmp_path / f"low{i}"))
        state = {k: v.to(torch.bfloat16) for k, v in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(state, low[i] / "adapter_model.safetensors")
    for out, folders, dtype in (("a", low, torch.bfloat16), ("b", [low[0], bench.adapters[1]], torch.float32)):
        models = [{"model": str(f), "parameters": {"weight": 0.5}} for f in folders]
        merge_adapters({"merge_method": "task_arithmetic", "models": models}, tmp_path / out)
        assert {t.dtype for t in load_file(tmp_path / out / "adapter_model.safetensors").values()} == {dtype}


def test_a_file_gradients_and_filters_as_in_a_merge(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    models = [{"model": str(bench.adapters[0]), "parameters": {"weight": [1.0, 0.0]}},
              {"model": str(bench.adapters[1]), "parameters": {"weight": [{"filter": "q_proj", "value": 2}, {"value": 0}]}}]
    path.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "models": models, "dtype": "bfloat16"}))
    merge_adapters(path, tmp_path / "a")
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    changes = [{n: d[n] - bench.weights[n] for n in d} for d in bench.dense]
    for layer, weight in ((0, 1.0), (1, 0.0)):
        tensor = f"model.layers.{layer}.self_attn.q_proj.weight"
        wanted = weight * changes[0][tensor] + 2 * changes[1][tensor]
        assert np.abs(bench.changed(tmp_path / "a", tensor) - wanted.numpy()).max() < 0.02 * float(wanted.abs().max())
    # what weighs nothing is not in the result
    assert not any("layers.1.mlp" in k for k in state) and any("layers.0.mlp" in k for k in state)


def test_done_is_done_and_threads_change_nothing(bench: Bench, tmp_path: Path) -> None:
    config = config_for(METHODS["ties"], bench, rank=4)
    merge_adapters(config, tmp_path / "a", threads=1)
    merge_adapters(config, tmp_path / "b", threads=2)
    a, b = ((tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    stamp = a.stat().st_mtime_ns
    merge_adapters(config, tmp_path / "a")
    assert a.stat().st_mtime_ns == stamp
    with pytest.raises(OutputError):
        merge_adapters(config | {"rank": 5}, tmp_path / "a")
    assert any("modules:" in line for line in forecast(config, tmp_path / "c")) and not (tmp_path / "c").exists()


@pytest.mark.parametrize("check", [lambda c: c["r"] == c["lora_alpha"], lambda c: c["task_type"] is None])
def test_peft_finds_every_factor(check: Callable[[dict[str, Any]], bool], bench: Bench, tmp_path: Path) -> None:
    merge_adapters(config_for(METHODS["task_arithmetic"], bench), tmp_path / "a")
    assert check(json.loads((tmp_path / "a" / "adapter_config.json").read_text()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(copy.deepcopy(bench.model), tmp_path / "a")
    assert not [w for w in told if "missing" in str(w.message)]


def test_factors_of_a_killed_merge_are_not_taken_for_those_of_other_scales(bench: Bench, tmp_path: Path) -> None:
    """The adapter's config decides the factors too: `lora_alpha` changes between a stop and the next call."""
    adapter = edited(bench.adapters[0], tmp_path / "one")
    config = {"merge_method": "task_arithmetic", "models": [{"model": str(adapter), "parameters": {"weight": 1.0}}]}

    class Stop(Exception):
        pass

    def stop(now: Any) -> None:
        if now.tensors == 3:
            raise Stop

    with pytest.raises(Stop):
        merge_adapters(config, tmp_path / "out", threads=1, progress=stop)
    assert len(list(factors_folder(tmp_path / "out").glob("*.safetensors"))) >= 3
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 50}))
    merge_adapters(config, tmp_path / "out", threads=1)
    tensor = "model.layers.0.self_attn.q_proj.weight"
    got, before = bench.changed(tmp_path / "out", tensor), bench.changed(bench.adapters[0], tensor)
    np.testing.assert_allclose(got, 10 * before, atol=1e-5)
    assert not factors_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["tsvm", ["ties"], None])
def test_a_method_that_is_none_is_the_only_problem_told(method: Any, tmp_path: Path) -> None:
    """Not what the method needs that it is read as until then."""
    with pytest.raises(RecipeError, match="merge_method") as caught:
        read_adapter_merge({"merge_method": method, "models": [{"model": "a"}, {"model": "b"}]})
    assert "task_arithmetic" not in str(caught.value)
