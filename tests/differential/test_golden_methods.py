"""The maths against what MergeKit wrote, tensor by tensor: no dialect and no engine in between."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from anabranch.merge import METHODS

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "merge_golden"
THREE = ("llama-math", "llama-code", "llama-chat")
# case -> method, branches, base, and what MergeKit's defaults and rulings are called here
CASES = {
    "linear": ("linear", THREE, None, {}),
    "linear-unnormalised": ("linear", THREE, None, {"normalize": False}),
    "qwen-tied-linear": ("linear", ("qwen-a", "qwen-b"), None, {}),
    "slerp": ("slerp", ("llama-code",), "llama-math", {}),
    "nuslerp": ("nuslerp", THREE[:2], None, {}),
    "nuslerp-base-rowwise": ("nuslerp", THREE[:2], "llama-base", {"flatten": False, "row_wise": True}),
    "multislerp": ("multislerp", THREE, None, {}),
    "multislerp-base": ("multislerp", THREE, "llama-base", {}),
    "karcher": ("karcher", THREE, None, {}),
    "task_arithmetic": ("task_arithmetic", THREE, "llama-base", {}),
    "task_arithmetic-normalized-lambda": ("task_arithmetic", THREE, "llama-base", {}),
    "ties": ("ties", THREE, "llama-base", {}),
    "ties-int8": ("ties", THREE, "llama-base", {}),
    "ties-unnormalised": ("ties", THREE, "llama-base", {"normalize": False}),
    "qwen-tied-ties": ("ties", ("qwen-a", "qwen-b"), "qwen-base", {}),
    "dare_linear-dense": ("dare_linear", THREE, "llama-base", {"rescale": "l1"}),
    "dare_ties-dense": ("dare_ties", THREE, "llama-base", {"rescale": "l1"}),
    "breadcrumbs": ("breadcrumbs", THREE, "llama-base", {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", THREE, "llama-base", {}),
    "sce": ("sce", THREE, "llama-base", {"floor": 1e-6}),
    "sce-all": ("sce", THREE, "llama-base", {"floor": 1e-6}),
    "ram": ("ram", THREE, "llama-base", {}),
    "ramplus_tl": ("ramplus_tl", THREE, "llama-base", {}),
    "model_stock": ("model_stock", THREE, "llama-base", {"floor": 1e-6, "clamp": False}),
    "model_stock-filter-wise": ("model_stock", THREE, "llama-base", {"filter_wise": True, "floor": 1e-6, "clamp": False}),
    "nearswap": ("nearswap", THREE[:1], "llama-base", {}),
    "arcee_fusion": ("arcee_fusion", THREE[:1], "llama-base", {}),
}
# MergeKit erases the task vectors of tensors so small that none of their largest entries goes (ruling FIX, spec 3.4).
ERASED_BY_THE_PEER = {"breadcrumbs", "breadcrumbs_ties"}
# Of entries that are equally large the peer keeps arbitrary ones (spec 3.2), and these models' steps are coarse.
TRIMS = {"ties", "breadcrumbs", "breadcrumbs_ties", "sce"}
NAMES = {"lambda": "scale", "nuslerp_row_wise": "row_wise", "nuslerp_flatten": "flatten"}

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the shared golden cases are not beside this checkout")


@pytest.fixture(scope="module")
def models():
    read: dict[str, dict[str, torch.Tensor]] = {}

    def model(name: str) -> dict[str, torch.Tensor]:
        if name not in read:
            read[name] = {}
            for file in sorted((GOLDEN / "models" / name).glob("*.safetensors")):
                with safe_open(file, "pt") as handle:
                    read[name] |= {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118
        return read[name]

    return model


def at_the_cut(name, stack, base, given):
    """Where an entry ties with the last that is kept, of some branch, so that either choice is right."""
    deltas = stack - base
    if name == "sce":
        sizes = deltas.double().var(0, correction=0).unsqueeze(0)
        counts = [[int(int((sizes > 1e-16).sum()) * given["select_topk"])]] if given["select_topk"] < 1 else [[]]
    else:
        sizes, n = deltas.abs(), base.numel()
        kept = [max(1, int(rho * n)) for rho in given["density"]]
        top = [int(g * n) for g in given.get("gamma", [0] * len(kept))]
        counts = [[t, t + k] for t, k in zip(top, kept, strict=True)]
    tied = torch.zeros_like(base, dtype=torch.bool)
    for size, wanted in zip(sizes, counts, strict=True):
        order = size.flatten().sort(descending=True).values
        for count in wanted:
            if 0 < count < len(order) and 0 < order[count - 1] <= order[count] * (1 + 1e-6):
                tied |= (size - order[count]).abs() <= 1e-6 * order[count]
    return tied


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_tensor_is_what_the_peer_wrote(case, models):
    name, branches, base, arguments = CASES[case]
    config = yaml.safe_load((GOLDEN / "cases" / case / "config.yaml").read_text())
    own = {m["model"]: m.get("parameters", {}) for m in config["models"]}
    assert config["dtype"] == "float32" and config["merge_method"] == name
    given = {NAMES.get(key, key): value for key, value in config.get("parameters", {}).items()} | arguments
    given |= {key: [float(own[b][key]) for b in branches] for key in ("density", "gamma") if key in own.get(branches[0], {})}
    given.pop("int8_mask", None)
    weights = torch.tensor([float(own.get(b, {}).get("weight", 1 / len(branches))) for b in branches])
    compared = 0
    with safe_open(GOLDEN / "cases" / case / "expected.safetensors", "pt") as expected:
        for key in expected.keys():  # noqa: SIM118
            stack = torch.stack([models(b)[key] for b in branches])
            inputs = {"branches": stack, "weights": weights, "draws": torch.full_like(stack, 0.5),
                      "base": models(base)[key] if base else None}
            out = METHODS[name].function(*(inputs[i] for i in METHODS[name].inputs), **given)
            wanted = expected.get_tensor(key)
            if case in ERASED_BY_THE_PEER and int(given["gamma"][0] * out.numel()) == 0:
                assert wanted.equal(inputs["base"]) and not out.equal(wanted), key
                continue
            open_to_choice = at_the_cut(name, stack, inputs["base"], given) if name in TRIMS else torch.zeros_like(out).bool()
            # Two entries of a norm's 32 may tie for one place; of thousands a twentieth.
            assert float(open_to_choice.float().mean()) < max(0.05, 8 / out.numel()), key
            far = (out - wanted).abs() > 1e-6 + 1e-5 * wanted.abs()
            assert not bool((far & ~open_to_choice).any()), (
                f"{key}: {int((far & ~open_to_choice).sum())} of {far.numel()} entries are off, the worst by "
                f"{float((out - wanted).abs().max()):.3g}")
            compared += 1
    assert compared >= 9
