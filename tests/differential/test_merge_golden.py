"""Every case of what MergeKit writes, against what ours writes from the same config; the exceptions are listed with why."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.engine.merging import merge_config, verify
from anabranch.errors import AnabranchError

GOLDEN = Path(__file__).parents[2].parent / "shared" / "data" / "merge_golden"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="shared/data/merge_golden is not beside the repository")
CASES = sorted(p.name for p in (GOLDEN / "cases").iterdir()) if GOLDEN.exists() else []
REFUSED = {"bad-embedding-sizes": "tokenizer"}  # the peer cuts the larger vocabulary; ours names the remedy


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def among_models(monkeypatch):
    monkeypatch.chdir(GOLDEN / "models")


@pytest.mark.parametrize("case", [c for c in CASES if c not in REFUSED])
def test_case(case, tmp_path, among_models):
    folder = GOLDEN / "cases" / case
    merge_config(folder / "config.yaml", tmp_path / "out")
    got, wanted = tensors_of(tmp_path / "out"), load_file(folder / "expected.safetensors")
    assert got.keys() == wanted.keys()
    if (folder / "expected_tokenizer.json").exists():
        wanted = _in_our_order(folder, tmp_path / "out", wanted)
    for name in wanted:
        assert (got[name].dtype, got[name].shape) == (wanted[name].dtype, wanted[name].shape), name
    if case in ("linear-bf16", "linear-out-bf16"):
        return _in_bfloat16(case, got, wanted)
    close = {name: torch.isclose(got[name], wanted[name], rtol=1e-5, atol=1e-6) for name in wanted}
    for name, same in close.items():
        if not bool(same.all()):
            assert case in EXPLAINED, (name, int((~same).sum()))
            excused = EXPLAINED[case](name, got[name], wanted[name])
            assert not bool((~same & ~excused).any()), (name, int((~same & ~excused).sum()))


def _in_our_order(folder: Path, out: Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The peer gives new tokens ids in an order that changes with each run; rows are compared token by token."""
    ids = []
    for path in (out / "tokenizer.json", folder / "expected_tokenizer.json"):
        tokenizer = json.loads(path.read_text())
        ids.append(tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]})
    ours, theirs = ids
    assert ours.keys() == theirs.keys()
    moved = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved[name] = wanted[name].clone()
        for token, number in ours.items():
            moved[name][number] = wanted[name][theirs[token]]
    return wanted | moved


# --- documented differences: which entries of a tensor may differ, and nothing else ---


def _deltas(name: str, *models: str) -> torch.Tensor:
    base = tensors_of(GOLDEN / "models" / "llama-base")[name].float()
    return torch.stack([tensors_of(GOLDEN / "models" / m)[name].float() - base for m in models])


def _at_a_cut(sizes: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Entries that are as large as the count-th largest one, where not all such entries fit: the peer's choice among them
    is that of an unstable sort, ours the first in the tensor."""
    flat = sizes.flatten()
    excused = torch.zeros_like(flat, dtype=torch.bool)
    ordered = flat.sort(descending=True).values
    for count in counts:
        if 0 < count < len(flat) and ordered[count - 1] == ordered[count]:
            excused |= flat == ordered[count - 1]
    return excused.reshape(sizes.shape)


def trimmed(models: list[str], densities: list[float]):
    def excused(name: str, *_: torch.Tensor) -> torch.Tensor:
        sizes = _deltas(name, *models).abs()
        return torch.stack([_at_a_cut(size, [int(rho * size.numel())])
                            for size, rho in zip(sizes, densities, strict=True)]).any(0)
    return excused


def banded(density: float, gamma: float):
    """The peer also erases the whole task vector of a tensor with fewer than 1 / gamma entries."""
    def excused(name: str, got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        n, base = got.numel(), tensors_of(GOLDEN / "models" / "llama-base")[name].float()
        if int(gamma * n) == 0:
            assert wanted.equal(base) and not got.equal(base)
            return torch.ones_like(got, dtype=torch.bool)
        target, top = int(density * n), int(gamma * n)
        top = min(top, n - target)
        sizes = _deltas(name, *THREE).abs()
        return torch.stack([_at_a_cut(size, [top, top + target]) for size in sizes]).any(0)
    return excused


def chosen_by_variance(share: float):
    def excused(name: str, *_: torch.Tensor) -> torch.Tensor:
        variance = _deltas(name, *THREE).var(0, unbiased=False)
        count = int(int((variance != 0).sum()) * share)
        cut = variance.flatten().sort(descending=True).values[count - 1]
        near = torch.isclose(variance, cut, rtol=1e-5, atol=0)  # float32 variances that agree but for rounding
        return near & (near.sum() > 1)
    return excused


def in_slices(name: str, *_: torch.Tensor) -> torch.Tensor:
    """Layers 0 and 1, and embeddings, at density 0.6; layers 2 and 3, final norm and head at 0.4."""
    later = name.startswith(("model.layers.2.", "model.layers.3.", "model.norm", "lm_head"))
    return trimmed(["llama-math", "llama-code"], [0.4, 0.4] if later else [0.6, 0.6])(name)


def moved_rows(name: str, got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Rows of two vocabularies put in the base's order: what is known of all three is the same row number here."""
    if name not in ("model.embed_tokens.weight", "lm_head.weight"):
        return trimmed(["llama-tok-x", "llama-tok-y"], [0.5, 0.5])(name)
    base = tensors_of(GOLDEN / "models" / "llama-base")[name].float()
    excused = torch.zeros_like(got, dtype=torch.bool)
    for model in ("llama-tok-x", "llama-tok-y"):
        delta = tensors_of(GOLDEN / "models" / model)[name].float()[: len(base)] - base
        excused |= _at_a_cut(delta.abs(), [int(0.5 * delta.numel())])
    return excused


THREE = ["llama-math", "llama-code", "llama-chat"]
EXPLAINED = {
    "ties": trimmed(THREE, [0.5, 0.3, 0.7]), "ties-int8": trimmed(THREE, [0.5] * 3),
    "ties-unnormalised": trimmed(THREE, [0.2] * 3), "slices-ties": in_slices, "tokenizer-base": moved_rows,
    "breadcrumbs": banded(0.9, 0.01), "breadcrumbs_ties": banded(0.7, 0.05), "sce": chosen_by_variance(0.3)}


def _in_bfloat16(case: str, got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    weights = {"llama-math": 0.5, "llama-code": 0.3, "llama-chat": 0.2}
    states = {name: tensors_of(GOLDEN / "models" / name) for name in weights}
    ours = theirs = 0.0
    for name in got:
        exact = sum(w * states[m][name].double() for m, w in weights.items())
        # Steps of the largest term: where terms cancel, the peer's error is as large as theirs.
        largest = torch.stack([exact.abs(), *((w * states[m][name].double()).abs() for m, w in weights.items())]).amax(0)
        step = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-30))) - 7)
        assert bool(((got[name].double() - wanted[name].double()).abs() <= 2 * step + 1e-9).all()), name
        ours += float((got[name].double() - exact).abs().sum())
        theirs += float((wanted[name].double() - exact).abs().sum())
    assert ours <= theirs if case == "linear-out-bf16" else ours < 0.9 * theirs


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused(case, tmp_path, among_models):
    with pytest.raises(AnabranchError, match=REFUSED[case]):
        merge_config(GOLDEN / "cases" / case / "config.yaml", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["linear", "qwen-tied-ties", "passthrough-frankenmerge", "slices-ties", "tokenizer-union",
                                  "tokenizer-model-pad"])
def test_result_loads_and_config_agrees(case, tmp_path, among_models):
    folder = GOLDEN / "cases" / case
    merge_config(folder / "config.yaml", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("a b c", return_tensors="pt").input_ids
    assert bool(torch.isfinite(model(ids).logits).all())
    expected = json.loads((folder / "expected.json").read_text())["config"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {k: config[k] for k in ("num_hidden_layers", "vocab_size", "tie_word_embeddings")} == {
        k: expected[k] for k in ("num_hidden_layers", "vocab_size", "tie_word_embeddings")}
    assert config.get("dtype") == expected["dtype"]
    assert verify(tmp_path / "out") == []
