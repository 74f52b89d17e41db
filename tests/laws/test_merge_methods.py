"""Laws that every registered merge method keeps, and what each of them computes."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

import anabranch.merge
from anabranch.errors import RecipeError
from anabranch.merge import METHODS, arguments_for, merge_method, method_named
from anabranch.merge.averaging import interpolate, token_weighted
from anabranch.merge.displacement import BLOCK, squared_distance

SHAPES = [(7,), (), (5, 3), (2, 3, 4), (0,)]
PURE = {"__future__", "collections.abc", "dataclasses", "inspect", "math", "typing", "numpy", "torch", "jaxtyping",
        "anabranch.errors", "anabranch.merge"}


def inputs(k: int = 3, shape: tuple[int, ...] = (5, 3), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    branches = base + 0.1 * torch.randn((k, *shape), generator=generator)
    weights = torch.rand(k, generator=generator) + 0.1
    return {"branches": branches, "base": base, "weights": weights / weights.sum()}


def call(name: str, given: dict[str, torch.Tensor], **arguments: float) -> torch.Tensor:
    method = METHODS[name]
    return method.function(*(given[i] for i in method.inputs), **arguments)


every_method = pytest.mark.parametrize("name", sorted(METHODS))


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_hold_and_result_is_float32_and_finite(name, shape):
    checked = jaxtyped(typechecker=beartype)(METHODS[name].function)
    given = inputs(shape=shape)
    out = checked(*(given[i] for i in METHODS[name].inputs))
    assert out.shape == shape and out.dtype == torch.float32 and bool(torch.isfinite(out).all())


@every_method
def test_annotations_refuse_a_wrong_shape(name):
    checked = jaxtyped(typechecker=beartype)(METHODS[name].function)
    given = inputs() | {"weights": torch.tensor([0.5, 0.5])}
    with pytest.raises(Exception, match="weights"):
        checked(*(given[i] for i in METHODS[name].inputs))


@every_method
def test_nothing_is_changed_and_the_same_inputs_give_the_same_bytes(name):
    given = inputs()
    before = {key: value.clone() for key, value in given.items()}
    state = torch.random.get_rng_state()
    first, second = call(name, given), call(name, given)
    assert first.equal(second)
    assert all(given[key].equal(before[key]) for key in given)
    assert torch.random.get_rng_state().equal(state)
    assert all(first.data_ptr() != value.data_ptr() for value in given.values())


@every_method
def test_branches_that_did_not_move_give_the_base_to_the_bit(name):
    given = inputs()
    given["branches"] = given["base"].expand(3, *given["base"].shape).contiguous()
    assert call(name, given).equal(given["base"])


@every_method
def test_a_branch_of_weight_zero_has_no_say(name):
    given = inputs(k=2)
    stranger = given | {"branches": torch.cat([given["branches"], torch.full((1, 5, 3), 1e6)]),
                        "weights": torch.cat([given["weights"], torch.zeros(1)])}
    assert call(name, stranger).equal(call(name, given))


@every_method
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 6), order=st.randoms(use_true_random=False))
def test_order_of_the_branches_moves_the_last_digit_at_most(name, seed, k, order):
    given = inputs(k=k, seed=seed)
    permutation = list(range(k))
    order.shuffle(permutation)
    other = given | {"branches": given["branches"][permutation], "weights": given["weights"][permutation]}
    torch.testing.assert_close(call(name, other), call(name, given), rtol=3e-7, atol=3e-8)


@every_method
def test_where_a_number_stands_does_not_change_it(name):
    """Vector units take most of a tensor and a scalar loop its tail: the two must round alike."""
    given = inputs(shape=(4099,))
    whole = call(name, given)
    for start, stop in [(1, 4099), (4090, 4099), (17, 40), (4098, 4099)]:
        part = {"branches": given["branches"][:, start:stop], "base": given["base"][start:stop],
                "weights": given["weights"]}
        assert call(name, part).equal(whole[start:stop])


@every_method
@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0], [0.0, 0.0]])
def test_weights_that_are_no_average_are_refused(name, weights):
    with pytest.raises(ValueError, match="weights"):
        call(name, inputs(k=2) | {"weights": torch.tensor(weights)})


@every_method
def test_the_docstring_has_a_source_and_an_example_that_runs(name):
    function = METHODS[name].function
    text = function.__doc__ or ""
    assert "Differs from the reference:" in text and METHODS[name].reference
    tests = doctest.DocTestFinder().find(function, name, globs={**vars(importlib.import_module(function.__module__))})
    examples = [t for t in tests if t.examples]
    assert examples and all(doctest.DocTestRunner().run(t).failed == 0 for t in examples)


def test_token_weighted_is_the_weighted_sum():
    """Hand-made numbers, and float64 on random ones: half a digit of the result, a few of the (small) step."""
    base = torch.tensor([1.0, 1.0])
    out = token_weighted(torch.tensor([[2.0, 4.0], [6.0, -8.0]]), base, torch.tensor([0.25, 0.75]))
    assert out.tolist() == [0.25 * 2 + 0.75 * 6, 0.25 * 4 - 0.75 * 8]
    given = inputs(k=4, shape=(10_000,))
    oracle = (given["weights"].double()[:, None] * given["branches"].double()).sum(0) / given["weights"].double().sum()
    error = (token_weighted(**given).double() - oracle).abs()
    moved = (given["weights"][:, None] * (given["branches"] - given["base"]).abs()).sum(0)
    assert bool((error <= 2**-24 * (oracle.abs() + 8 * moved)).all())


def test_interpolate_moves_by_alpha():
    given = inputs(k=1)
    given["weights"] = torch.ones(1)
    for alpha in (0.0, 0.37, 1.0, 1.8):
        ratio = squared_distance(interpolate(**given, alpha=alpha), given["base"]) / squared_distance(
            given["branches"][0], given["base"])
        assert ratio == pytest.approx(alpha**2, rel=1e-5)
    assert interpolate(**given, alpha=0.0).equal(given["base"])
    several = inputs(k=3)
    assert interpolate(**several, alpha=1.0).equal(token_weighted(**several))
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha"):
            interpolate(**given, alpha=wrong)


def test_squared_distance_is_exact_where_float32_is_not():
    """A sum of 3 blocks and a bit: 1 + n x 2^-30 loses every small term in float32."""
    n = 3 * BLOCK + 5
    moved = torch.full((n,), 2.0**-15)
    moved[0] = 1.0
    assert squared_distance(moved, torch.zeros(n)) == 1.0 + (n - 1) * 2.0**-30
    assert squared_distance(torch.zeros(()), torch.tensor(3.0)) == 9.0
    assert squared_distance(torch.zeros(0), torch.zeros(0)) == 0.0


def test_unknown_names_are_refused_with_the_closest():
    with pytest.raises(RecipeError, match="Did you mean `token_weighted`"):
        method_named("token_weigthed")
    with pytest.raises(RecipeError) as caught:
        arguments_for(method_named("interpolate"), {"alfa": 0.3, "alpha": "half"})
    assert "alfa" in str(caught.value) and "Did you mean `alpha`" in str(caught.value) and "'half'" in str(caught.value)
    with pytest.raises(RecipeError, match="wanted float"):
        arguments_for(method_named("interpolate"), {"alpha": True})
    with pytest.raises(RecipeError, match="has no such parameter"):
        arguments_for(method_named("token_weighted"), {"alpha": 1.0})
    assert arguments_for(method_named("interpolate"), {"alpha": 1}) == {"alpha": 1.0}


def test_a_signature_the_engine_cannot_call_is_refused():
    def unknown_input(models: torch.Tensor) -> torch.Tensor:
        return models

    def no_default(branches: torch.Tensor, *, alpha: float) -> torch.Tensor:
        return branches

    def base_unsaid(branches: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return base

    for function in (unknown_input, no_default, base_unsaid):
        with pytest.raises(TypeError):
            merge_method("never_registered", needs_base=False, reference="none")(function)
    with pytest.raises(TypeError, match="twice"):
        merge_method("interpolate", needs_base=True, reference="none")(interpolate)
    assert "never_registered" not in METHODS


def test_the_maths_knows_no_file():
    """Nothing under merge/ imports what could read, write, log or launch."""
    folder = Path(anabranch.merge.__file__).parent
    modules = [m.name for m in pkgutil.iter_modules([str(folder)])]
    assert modules
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                assert name in PURE or name.startswith("anabranch.merge."), f"{path.name} imports {name}"
            assert not (isinstance(node, ast.Name) and node.id in ("open", "print")), f"{path.name} does I/O"
