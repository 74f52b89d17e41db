"""Merges small enough to check by hand: the worked examples of the specification, and what each method refuses."""

import math

import pytest
import torch
from merge_inputs import call, inputs

from anabranch.merge import METHODS
from anabranch.merge.averaging import interpolate, token_weighted
from anabranch.merge.consensus import agreeing
from anabranch.merge.displacement import squared_distance
from anabranch.merge.sparsify import cut_at, kept_count, rank_probabilities

A, B = [[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 3.0]]
THREE = [[3.0, 1.0, 0.0, 2.0], [-1.0, -1.0, 0.0, 4.0], [-1.0, 0.0, 0.0, -1.0]]
R2 = math.sqrt(0.5)


def merged(name, branches, base=None, weights=None, draws=None, **arguments):
    """The method on lists; base 0 and weights 1 where not given, a base only where the method asks for one."""
    method, stack = METHODS[name], torch.tensor(branches)
    given = {"branches": stack, "weights": torch.ones(len(stack)) if weights is None else torch.tensor(weights),
             "base": torch.tensor(base) if base is not None else torch.zeros_like(stack[0]) if method.needs_base else None,
             "draws": torch.tensor(draws) if draws is not None else None}
    return method.function(*(given[i] for i in method.inputs), **arguments)


# id of the specification's conformance list, method, branches, base, weights, arguments, result
EXAMPLES = [
    ("C17", "linear", [[1.0, 2.0], [3.0, 8.0]], None, [3.0, 2.0], {}, [1.8, 4.4]),
    ("C17", "linear", [[1.0, 2.0], [3.0, 8.0]], None, [0.6, 0.4], {}, [1.8, 4.4]),
    ("C17", "linear", [[1.0, 2.0], [3.0, 8.0]], None, [3.0, 2.0], {"normalize": False}, [9.0, 22.0]),
    ("C23", "slerp", [[1.0, 0.02]], [1.0, 0.0], None, {"t": 0.5}, [1.0, 0.01]),
    ("C23", "slerp", [[0.0, 2.0]], [0.0, 0.0], None, {"t": 0.5}, [0.0, 1.41421]),
    ("C23", "slerp", [[-1.0, -2.0]], [1.0, 2.0], None, {"t": 0.5}, [0.0, 0.0]),
    ("4.3", "slerp", [[1.0, 0.0]], [1e-9, 0.0], None, {"t": 0.5}, [0.707107, 0.0]),
    ("4.3", "slerp", [[0.06, 0.0]], [0.02, 0.0], None, {"t": 0.5}, [0.04, 0.0]),
    ("C24", "slerp", [[0.0, 2.0]], [3.0, 1.0], None, {"t": 0.0}, [3.0, 1.0]),
    ("C24", "slerp", [[0.0, 2.0]], [3.0, 1.0], None, {"t": 1.0}, [0.0, 2.0]),
    ("C26", "nuslerp", [A, B], None, None, {}, [[0.520082, 0.520082], [0.0, 2.600411]]),
    ("C26", "nuslerp", [A, B], None, None, {"flatten": False}, [[R2, R2], [0.0, 2.5]]),
    ("C26", "nuslerp", [A, B], None, None, {"flatten": False, "row_wise": True}, [[R2, 0.506541], [0.0, 2.532704]]),
    ("C27", "nuslerp", [[1.0, 0.0], [0.0, 2.0]], None, [-0.5, 0.5], {}, [R2, 2 * R2]),
    ("C82", "nuslerp", [[1.0, 3.0], [-1.0, -3.0]], None, [0.9, 0.1], {}, [0.8, 2.4]),
    ("C82", "nuslerp", [[[1.0, 3.0]], [[-1.0, -3.0]]], None, [0.9, 0.1], {"flatten": False}, [[0.8, 2.4]]),
    ("4.4", "nuslerp", [[5.0, 1.0]], [1.0, 1.0], [0.3], {}, [5.0, 1.0]),
    ("C29", "multislerp", [[1.0, 0.0], [0.0, 2.0]], None, None, {}, [1.06066, 1.06066]),
    ("C29", "multislerp", [[1.0, 0.0], [0.0, 2.0]], None, None, {"normalize": False}, [2.12132, 2.12132]),
    ("C30", "multislerp", [[1.0, 4.0]], [7.0, 7.0], [0.1], {}, [1.0, 4.0]),
    ("C31", "multislerp", [[1.0, 4.0]] * 3, [1.0, 4.0], None, {}, [1.0, 4.0]),
    ("4.5", "multislerp", [[1.0, 2.0], [-2.0, -4.0]], None, None, {"normalize": False}, [-1.0, -2.0]),
    ("C32", "karcher", [[1.0, 0.0], [0.0, 2.0]], None, [0.5, 0.5], {}, [1.06066, 1.06066]),
    ("C32", "karcher", [[3.0, 4.0], [0.0, 0.0]], None, [0.5, 0.5], {}, [1.5, 2.0]),
    ("C32", "karcher", [[3.0, 4.0], [-3.0, -4.0]], None, [0.5, 0.5], {}, [3.0, 4.0]),
    ("4.6", "karcher", [[0.0, 0.0], [0.0, 0.0]], None, [0.5, 0.5], {}, [0.0, 0.0]),
    ("C34", "ties", THREE, None, None, {}, [3.0, 1.0, 0.0, 3.0]),
    ("C34", "ties", THREE, None, None, {"normalize": False}, [3.0, 1.0, 0.0, 6.0]),
    ("C34", "task_arithmetic", THREE, None, None, {}, [1.0, 0.0, 0.0, 5.0]),
    ("C39", "task_arithmetic", THREE, None, None, {"normalize": True}, [1 / 3, 0.0, 0.0, 5 / 3]),
    ("C39", "task_arithmetic", THREE[:2], None, [1.0, -1.0], {"normalize": True}, [4.0, 2.0, 0.0, -2.0]),
    ("C40", "task_arithmetic", THREE, None, None, {"scale": 2.0}, [2.0, 0.0, 0.0, 10.0]),
    ("C40", "ties", THREE, None, None, {"scale": 2.0}, [6.0, 2.0, 0.0, 6.0]),
    ("4.7b", "ties", [[2.0], [-1.0], [3.0]], None, [1.0, -1.0, 1.0], {}, [6.0]),
    ("4.7b", "ties", [[2.0], [-1.0]], None, [1.0, -1.0], {}, [3.0]),
    ("C35", "ties", [[1.0, 0.0], [-1.0, 0.0]], None, None, {}, [1.0, 0.0]),
    ("C36", "ties", [[5.0] * 10], None, None, {"density": 0.3}, [5.0] * 3 + [0.0] * 7),
    ("C37", "ties", [[1.0, 3.0, 2.0]], None, None, {"density": 0.1}, [0.0, 3.0, 0.0]),
    ("C37", "ties", [[1.0, 3.0, 2.0]], [9.0, 9.0, 9.0], None, {"density": 0.0}, [9.0, 9.0, 9.0]),
    ("C38", "ties", [[4.0, 3.0, 2.0, 1.0]], None, None, {"density": 0.5, "rescale": True}, [5.714286, 4.285714, 0.0, 0.0]),
    ("3.4", "breadcrumbs", [[1.0, 5.0, 3.0, 2.0]], None, None, {"density": 0.5, "gamma": 0.25}, [0.0, 0.0, 3.0, 2.0]),
    ("C46", "breadcrumbs", [[1.0, 5.0, 3.0, 2.0]], None, None, {"density": 0.5, "gamma": 0.0}, [0.0, 5.0, 3.0, 0.0]),
    ("C47", "breadcrumbs", [[1.0, 5.0, 3.0, 2.0]], None, None, {"density": 1.0, "gamma": 0.25}, [1.0, 5.0, 3.0, 2.0]),
    ("C53", "sce", [[1.0, -2.0]], [0.5, 0.5], None, {}, [1.0, -2.0]),
    ("C53", "sce", [[1.0, -2.0]], [0.5, 0.5], None, {"select_topk": 0.5}, [0.5, 0.5]),
    ("C54", "sce", [[1.0, -2.0], [1.0, -2.0]], [1.0, -2.0], None, {"select_topk": 0.5}, [1.0, -2.0]),
    ("C55", "sce", [[1e-4, 0.0], [3e-4, 0.0]], None, None, {"floor": 1e-6}, [2e-4, 0.0]),
    ("C55", "sce", [[1e-4, 0.0], [3e-4, 0.0]], None, None, {}, [2.8e-4, 0.0]),
    ("C56", "ram", [[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]], None, None, {}, [1.0, 2.0, 0.0]),
    ("C56", "ramplus_tl", [[1.0, 1.0, 0.0], [0.0, 3.0, 0.0]], None, None, {}, [1.02, 2.0, 0.0]),
    ("C56", "ram", [[1.0, 1e-5], [0.0, 0.0]], None, None, {"epsilon": 1e-4}, [1.0, 0.0]),
    ("C57", "model_stock", [[1.0, 0.0], [0.0, 1.0]], None, None, {}, [0.0, 0.0]),
    ("C57", "model_stock", [[1.0, 0.0], [1.0, 0.0]], None, None, {}, [1.0, 0.0]),
    ("C57", "model_stock", [[1e-4, 0.0], [1e-4, 0.0]], None, None, {}, [1e-4, 0.0]),
    ("C57", "model_stock", [[1e-4, 0.0], [1e-4, 0.0]], None, None, {"floor": 1e-6}, [1.980198e-6, 0.0]),
    ("C58", "model_stock", [[1.5, 0.5], [-0.5, 0.5]], [0.5, 0.5], None, {"clamp": False}, [0.5, 0.5]),
    ("4.14", "model_stock", [[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]]], None, None, {"filter_wise": True},
     [[0.0, 0.0], [2.0, 0.0]]),
    ("C60", "nearswap", [[1.0, 2.0, 5.0]], [1.0, 1.9, 4.0], None, {"t": 0.1}, [1.0, 2.0, 4.1]),
    ("4.15", "nearswap", [[1.0, 2.0, 5.0]], [1.0, 1.9, 4.0], None, {"t": 0.0}, [1.0, 1.9, 4.0]),
    ("C61", "arcee_fusion", [[1.0, 2.0, 3.0, 9.0]], [1.0, 2.0, 3.0, 4.0], None, {}, [1.0, 2.0, 3.0, 9.0]),
    ("C61", "arcee_fusion", [[1.0, 2.0]], [1.0, 2.0], None, {}, [1.0, 2.0]),
    ("4.18", "passthrough", [[1.0, 2.0]], None, None, {"scale": 0.0}, [0.0, 0.0]),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e[0]}-{e[1]}")
def test_the_specification_s_numbers(example):
    _, name, branches, base, weights, arguments, wanted = example
    torch.testing.assert_close(merged(name, branches, base, weights, **arguments), torch.tensor(wanted), rtol=2e-6, atol=1e-6
                               if max(map(abs, torch.tensor(wanted).flatten().tolist())) > 1e-3 else 1e-9)


def test_breadcrumbs_of_a_thousand_entries():
    """C45, C47: magnitudes 1..1000 in a drawn order, so that ranks are known."""
    size = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).float() + 1
    sign = torch.where(torch.rand(1000, generator=torch.Generator().manual_seed(2)) < 0.5, -1.0, 1.0)
    for density, gamma, lowest, highest in [
        (0.5, 0.01, 491, 990), (0.995, 0.01, 1, 995), (0.5, 0.0, 501, 1000), (0.1, 1.0, 1, 100)
    ]:
        out = merged("breadcrumbs", [(size * sign).tolist()], density=density, gamma=gamma)
        assert out.equal(torch.where((size >= lowest) & (size <= highest), size * sign, 0.0)), (density, gamma)


def test_counts_truncate_the_binary_product():
    """C80 and C37."""
    assert (kept_count(0.29, 100), kept_count(0.57, 100), kept_count(0.001, 10), kept_count(0.0, 10), kept_count(2.0, 10)) == (
        28, 56, 1, 0, 10)
    d = torch.arange(1.0, 101.0)
    assert int((merged("ties", [d.tolist()], density=0.29) != 0).sum()) == 28


def test_a_tensor_of_no_dimension_is_never_erased():
    """C81: whatever the draw and the density."""
    for name in ("ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"):
        assert merged(name, [3.0], draws=[0.999], density=0.2).equal(torch.tensor(3.0)), name
    assert METHODS["ties_global"].function(torch.tensor([3.0]), torch.tensor(0.0), torch.ones(1), torch.tensor([9.0]),
                                           density=0.2).item() == 3.0


def test_della_ranks_rows():
    """C48, C50: linear in the rank, the largest most likely, a 1-D tensor one row, a row of one entry the density."""
    p = rank_probabilities(torch.tensor([[0.1, -3.0, 2.0], [5.0, 5.0, 0.0]]), 0.5, 0.2)
    torch.testing.assert_close(p, torch.tensor([[0.3, 0.7, 0.5], [0.7, 0.5, 0.3]]))
    assert rank_probabilities(torch.randn(5, 1), 0.3, 0.1).equal(torch.full((5, 1), 0.3))
    out = merged("della_linear", [[[1.0, 2.0], [4.0, 3.0]]], draws=[[[0.4, 0.5], [0.5, 0.4]]], density=0.5, epsilon=0.2)
    torch.testing.assert_close(out, torch.tensor([[0.0, 2.0], [4.0, 0.0]]) / 0.7)
    flat = merged("della_linear", [[1.0, 2.0, 3.0]], draws=[[0.45, 0.45, 0.45]], density=0.5, epsilon=0.2, rescale="none")
    assert flat.tolist() == [0.0, 2.0, 3.0]


def test_sign_election_leaves_out_zeros_and_gives_ties_to_plus():
    """C35 and the example of 3.6."""
    steps = torch.tensor([[3.0, 1.0, 0.0, 0.0], [-1.0, -1.0, 0.0, -2.0], [-1.0, 0.0, 0.0, 0.0]])
    assert agreeing(steps).tolist() == [[True, True, False, False], [False, False, False, True], [False] * 4]


def test_global_cuts_keep_what_equals_them():
    out = METHODS["ties_global"].function(torch.tensor([[1.0, -2.0, 3.0]]), torch.zeros(3), torch.ones(1), torch.tensor([2.0]))
    assert out.tolist() == [0.0, -2.0, 3.0]
    third = float(torch.tensor(0.3))
    assert cut_at(third).value < third and cut_at(0.0).value < 0


def test_energy_counts_on_what_is_selected():
    """sce by hand: variances 4, 0.25, 0 -> one of two varying entries; energies 9 and 1 there."""
    out = merged("sce", [[3.0, 1.0, 1.0], [-1.0, 2.0, 1.0]], select_topk=0.5)
    torch.testing.assert_close(out, torch.tensor([3.0, 0.0, 0.0]))
    out = merged("sce", [[3.0, 1.0, 1.0], [1.0, 2.0, 1.0]], select_topk=0.5)
    torch.testing.assert_close(out, torch.tensor([0.9 * 3 + 0.1 * 1, 0.0, 0.0]))


def test_layer_scaling_grows_with_depth():
    for depth, wanted in [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)]:
        given = {"branches": torch.tensor([[5.0]]), "base": torch.tensor([1.0]), "weights": torch.ones(1), "depth": depth}
        out = call("layer_scaled", given, alpha=0.25, beta=0.5)
        assert out.item() == 1.0 + wanted * 0.25 * 4


def test_fisher_falls_back_to_the_mean():
    branches = torch.tensor([[1.0, 1.0, 7.0], [3.0, 5.0, 7.0]])
    out = METHODS["fisher"].function(branches, torch.tensor([1.0, 3.0]), torch.tensor([[3.0, 0.0, 1e-30], [1.0, 0.0, 1e-38]]))
    assert out.tolist() == [2.0, 4.0, 7.0]


def test_token_weighted_is_the_weighted_sum():
    """Hand-made numbers, and float64 on random ones: half a digit of the result, a few of the (small) step."""
    base = torch.tensor([1.0, 1.0])
    out = token_weighted(torch.tensor([[2.0, 4.0], [6.0, -8.0]]), base, torch.tensor([0.25, 0.75]))
    assert out.tolist() == [0.25 * 2 + 0.75 * 6, 0.25 * 4 - 0.75 * 8]
    given = {key: inputs("token_weighted", (10_000,), 4)[key] for key in ("branches", "base", "weights")}
    oracle = (given["weights"].double()[:, None] * given["branches"].double()).sum(0) / given["weights"].double().sum()
    error = (token_weighted(**given).double() - oracle).abs()
    moved = (given["weights"][:, None] * (given["branches"] - given["base"]).abs()).sum(0)
    assert bool((error <= 2**-24 * (oracle.abs() + 8 * moved)).all())


def test_interpolate_moves_by_alpha():
    given = {key: inputs("interpolate", k=1)[key] for key in ("branches", "base")} | {"weights": torch.ones(1)}
    for alpha in (0.0, 0.37, 1.0, 1.8):
        ratio = squared_distance(interpolate(**given, alpha=alpha), given["base"]) / squared_distance(
            given["branches"][0], given["base"])
        assert ratio == pytest.approx(alpha**2, rel=1e-5)
    assert interpolate(**given, alpha=0.0).equal(given["base"])
    several = {key: inputs("interpolate")[key] for key in ("branches", "base", "weights")}
    assert interpolate(**several, alpha=1.0).equal(token_weighted(**several))


NAN, INF = float("nan"), float("inf")
REFUSED = [
    *(("token_weighted", {}, {"weights": w}, "weights")
      for w in ([0.5, 0.6, 0.1], [1.5, -0.5, 0.0], [NAN, 1.0, 0.0], [0.0] * 3)),
    *(("interpolate", {"alpha": a}, {}, "alpha") for a in (-0.1, NAN, INF)),
    ("interpolate", {}, {"weights": [0.5, 0.6, 0.1]}, "weights"),
    ("linear", {}, {"weights": [0.7, -0.7, 0.0]}, "sum to"),
    ("linear", {}, {"weights": [INF, 1.0, 1.0]}, "finite"),
    ("passthrough", {"scale": NAN}, {}, "scale"),
    ("passthrough", {"scale": [1.0, 2.0]}, {}, "2 numbers for 1"),
    ("fisher", {}, {"weights": [0.5, -0.1, 0.6]}, "weights"),
    ("fisher", {}, {"fisher": -1.0}, "Fisher information"),
    ("fisher", {}, {"fisher": NAN}, "Fisher information"),
    ("fisher", {}, {"weights": [0.0] * 3}, "not all 0"),
    ("slerp", {"t": NAN}, {}, "t: got"),
    ("nearswap", {"t": INF}, {}, "t: got"),
    ("karcher", {"max_iter": -1}, {}, "max_iter"),
    ("karcher", {"tol": 0.0}, {}, "tol"),
    ("karcher", {}, {"weights": [-0.1, 0.6, 0.5]}, "weights"),
    ("multislerp", {}, {"weights": [1.0, -1.0, 0.0]}, "sum to"),
    ("multislerp", {"eps": -1.0}, {}, "eps"),
    ("task_arithmetic", {"scale": NAN}, {}, "scale"),
    ("ties", {"scale": INF}, {}, "scale"),
    ("ties", {"density": -0.1}, {}, "density"),
    ("ties", {"density": NAN}, {}, "density"),
    ("ties", {"density": [0.5]}, {}, "1 numbers"),
    ("ties", {}, {"weights": [NAN, 1.0, 1.0]}, "weights"),
    ("ties_global", {}, {"cuts": -1.0}, "cuts"),
    ("ties_global", {}, {"cuts": NAN}, "cuts"),
    ("breadcrumbs", {"gamma": 1.5}, {}, "gamma"),
    ("breadcrumbs_ties", {"gamma": NAN}, {}, "gamma"),
    ("dare_linear", {"rescale": "l2"}, {}, "'inverse_density', 'l1', 'none'"),
    ("dare_ties", {"scale": NAN}, {}, "scale"),
    ("della", {"rescale": "inverse_density"}, {}, "inverse_probability"),
    ("della", {"density": 0.9, "epsilon": 0.15}, {}, "epsilon"),
    ("della_linear", {"density": 0.1, "epsilon": 0.15}, {}, "epsilon"),
    ("della", {"epsilon": -0.1}, {}, "epsilon"),
    ("sce", {"select_topk": -1.0}, {}, "select_topk"),
    ("ram", {"epsilon": -1.0}, {}, "epsilon"),
    ("ramplus_tl", {"r": NAN}, {}, "r: got"),
    ("ramplus_tl", {"alpha": -0.1}, {}, "alpha"),
    ("model_stock", {"floor": 0.0}, {}, "floor"),
    ("layer_scaled", {"beta": INF}, {}, "beta"),
    ("iso_cts", {"common_share": 1.1}, {}, "common_share"),
    ("star", {"energy": 0.0}, {}, "energy"),
    ("tsv_m", {"scale": NAN}, {}, "scale"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: f"{c[0]}-{c[3]}")
def test_what_cannot_be_is_refused(case):
    name, arguments, changed, message = case
    given = inputs(name)
    for key, value in changed.items():
        given[key] = torch.tensor(value) if isinstance(value, list) else torch.full_like(given[key], value)
    with pytest.raises(ValueError, match=message):
        call(name, given, **arguments)


@pytest.mark.parametrize("name", ["slerp", "nearswap", "arcee_fusion", "passthrough", "nuslerp", "model_stock"])
def test_a_number_of_branches_that_has_no_meaning_is_refused(name):
    most = METHODS[name].branches[1]
    k = int(most) + 1 if most < INF else 1
    stack = torch.randn(k, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="branches"):
        given = {"branches": stack, "base": torch.zeros(4), "weights": torch.ones(k)}
        call(name, given)


def test_directions_that_cancel_are_refused_for_three_and_not_for_two():
    around = [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]]
    with pytest.raises(ValueError, match=r"3 models .* cancel .*\(0.3333, 0.3333, 0.3333\).*`weight` with a `filter`.*linear"):
        merged("multislerp", around)


def test_directions_count_as_cancelled_up_to_rounding():
    """Three of 5,000 entries whose weighted directions sum to zero but for float32."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 5000, generator=generator, dtype=torch.float64)
        a, b = a / a.norm(), b / b.norm()
        branches = torch.stack([2 * a, b, -1.7 * (a + b)]).float()
        with pytest.raises(ValueError, match="cancel"):
            METHODS["multislerp"].function(branches, torch.tensor([1.0, 1.0, float((a + b).norm())]))


def test_karcher_is_not_pulled_by_what_stands_opposite():
    """There is no direction to an antipode; what rounding says it is would turn the mean by 0.3 rad."""
    out = merged("karcher", [[1.0, 0.0], [-1.0, 1e-3]], weights=[0.9, 0.1])
    assert out[0].item() == pytest.approx(1, abs=1e-6) and abs(out[1].item()) < 2e-4


def test_slerp_at_one_is_the_branch_to_the_bit():
    branch = torch.tensor([[1000.0, 1e-4]])  # 1 + (1e-4 - 1) is another number in float32
    assert METHODS["slerp"].function(branch, torch.tensor([1000.0, 1.0]), t=1.0).equal(branch[0])
    for far in (0.2, 10.0):  # on the straight line, on the arc
        given = inputs("slerp", (10_000,))
        given["branches"] = given["base"] + far * (given["branches"] - given["base"])
        assert call("slerp", given, t=1.0).equal(given["branches"][0])
        assert call("slerp", given, t=0.0).equal(given["base"])


def test_branches_that_agree_vary_nowhere():
    """sce: the variance of equal numbers is 0 whatever their mean rounds to, so nothing is selected."""
    given = inputs("sce", (1000,))
    given["branches"] = given["branches"][:1].expand(3, 1000).contiguous()
    assert call("sce", given, select_topk=0.9).equal(given["base"])


def test_a_global_density_of_zero_drops_the_branch():
    given = inputs("ties_global", k=2)
    given["cuts"] = torch.zeros(2)
    alone = {key: value[1:] if key in ("branches", "weights", "cuts") else value for key, value in given.items()}
    assert call("ties_global", given, density=[0.0, 1.0]).equal(call("ties_global", alone, density=1.0))
    ones, scalars = torch.ones(2), torch.tensor([3.0, 7.0])
    given = {"branches": scalars, "base": torch.tensor(1.0), "weights": ones, "cuts": 0 * ones}
    assert call("ties_global", given, density=[0.0, 1.0]).item() == 7.0


def test_a_nan_among_ranked_numbers_is_refused():
    for name in ("sce", "arcee_fusion"):
        given = inputs(name, (6,))
        given["branches"][0, 2] = NAN
        with pytest.raises(ValueError, match=r"a NaN among .*: an input holds a NaN or an infinity"):
            call(name, given)


def test_fisher_information_below_zero_is_refused():
    given = inputs("fisher", (6,))
    for wrong in (-1e-9, NAN, INF):
        given["fisher"][0, 2] = wrong
        with pytest.raises(ValueError, match=r"Fisher information of model 1 of 3 .* mean of squared gradients"):
            call("fisher", given)
