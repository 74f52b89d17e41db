"""The maths against what MergeKit wrote, tensor by tensor: no dialect and no engine in between."""

import itertools
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
                    read[name] |= {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118 - no mapping
        return read[name]

    return model


def at_the_cut(sizes, ranges):
    """[k, *shape] twice: what every choice keeps, and what it may keep or not, since it ties with the first or the last."""
    kept, tied = torch.zeros_like(sizes, dtype=torch.bool), torch.zeros_like(sizes, dtype=torch.bool)
    for i, (size, (first, end)) in enumerate(zip(sizes, ranges, strict=True)):
        order = size.flatten().sort(descending=True).values
        rank = torch.empty(size.numel(), dtype=torch.long)
        rank[size.flatten().argsort(descending=True)] = torch.arange(size.numel())
        kept[i] = ((rank >= first) & (rank < end)).reshape(size.shape)
        for cut in (first, end):
            if 0 < cut < len(order) and order[cut - 1] <= order[cut] * (1 + 1e-6):
                tied[i] |= (size - order[cut]).abs() <= 1e-6 * order[cut]
    return kept, tied


def some_choice_gives(wanted, name, stack, base, weights, given):
    """Where `wanted` is the merge for one of the ways to keep or drop the entries that tie."""
    n, deltas = base.numel(), stack - base
    if name == "sce":  # the choice moves the branches' energies by a little, so a tied entry is only left out
        sizes = deltas.double().var(0, correction=0).unsqueeze(0)
        varying = int((sizes > 1e-16).sum())
        end = int(varying * given["select_topk"]) if given["select_topk"] < 1 else n
        return at_the_cut(sizes, [(0, end)])[1][0]
    target = [max(1, int(rho * n)) for rho in given["density"]]
    top = [min(int(g * n), n - t) for g, t in zip(given.get("gamma", [0] * len(target)), target, strict=True)]
    kept, tied = at_the_cut(deltas.abs(), [(g, g + t) for g, t in zip(top, target, strict=True)])
    elect = METHODS["task_arithmetic" if name == "breadcrumbs" else "ties"].function
    normalize = given.get("normalize", name == "ties")
    fits = torch.zeros_like(base, dtype=torch.bool)
    for choice in itertools.product([False, True], repeat=len(deltas)):
        chosen = torch.where(tied, torch.tensor(choice).reshape(-1, *[1] * base.ndim), kept)
        step = elect(deltas * chosen, torch.zeros_like(base), weights, normalize=normalize, scale=given.get("scale", 1.0))
        fits |= close(base + step, wanted)
    return fits & tied.any(0)


def close(out, wanted):
    return (out - wanted).abs() <= 1e-6 + 1e-5 * wanted.abs()


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
        for key in expected.keys():  # noqa: SIM118 - no mapping
            stack = torch.stack([models(b)[key] for b in branches])
            inputs = {"branches": stack, "weights": weights, "draws": torch.full_like(stack, 0.5),
                      "base": models(base)[key] if base else None}
            out = METHODS[name].function(*(inputs[i] for i in METHODS[name].inputs), **given)
            wanted = expected.get_tensor(key)
            if case in ERASED_BY_THE_PEER and int(given["gamma"][0] * out.numel()) == 0:
                assert wanted.equal(inputs["base"]) and not out.equal(wanted), key
                continue
            fits = close(out, wanted)
            if name in TRIMS:
                fits |= some_choice_gives(wanted, name, stack, inputs["base"], weights, given)
            worst = float((out - wanted).abs().max())
            assert bool(fits.all()), f"{key}: {int((~fits).sum())} of {fits.numel()} entries are off, the worst by {worst:.3g}"
            compared += 1
    assert compared >= 9
