"""Laws that every registered merge method keeps."""

import ast
import doctest
import importlib
import inspect
import math
import pkgutil
import random
from pathlib import Path

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from merge_inputs import ARGUMENTS, VARIANTS, CutStack, branches_for, call, inputs, names_of, per_branch

import anabranch.merge
from anabranch.errors import RecipeError
from anabranch.merge import INPUTS, METHODS, PerBranch, arguments_for, merge_method, method_named
from anabranch.merge.averaging import interpolate
from anabranch.merge.combination import Combination
from anabranch.merge.consensus import Consensus
from anabranch.merge.displacement import BLOCK, squared_distance
from anabranch.merge.stack import CHUNK, Block

SHAPES = [(7,), (), (5, 3), (3, 5), (4, 1), (1, 6), (2, 3, 4), (1, 3, 4), (2, 1, 3, 3), (1,), (0,), (0, 3), (3, 0)]
PURE = {"__future__", "collections.abc", "dataclasses", "inspect", "itertools", "math", "typing", "numba", "numpy", "torch",
        "jaxtyping", "anabranch.errors", "anabranch.merge"}
# Prints the page on the methods when it is run as a program.
PAGE = "reference.py"
WEIGHTED = [name for name in sorted(METHODS) if "weights" in METHODS[name].inputs and METHODS[name].branches[1] == math.inf]
SPECTRAL = {name for name in METHODS if METHODS[name].fits == "matrix"}

every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=names_of)


def fitting_shapes(name: str) -> list[tuple[int, ...]]:
    return [shape for shape in SHAPES if len(shape) == 2 or name not in SPECTRAL]


def test_every_method_of_the_contract_is_there():
    assert set(METHODS) == {
        "linear", "token_weighted", "interpolate", "passthrough", "fisher", "slerp", "nuslerp", "multislerp", "karcher",
        "task_arithmetic", "task_vector_mean", "layer_scaled", "ties", "ties_global", "dare_linear", "dare_ties", "della",
        "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus_tl", "model_stock", "nearswap",
        "arcee_fusion", "tsv_m", "iso_c", "iso_cts", "star"}


@every_variant
def test_shapes_hold_and_the_result_is_float32_and_finite(variant):
    name, arguments = variant
    checked = jaxtyped(typechecker=beartype)(METHODS[name].function)
    for shape in fitting_shapes(name):
        given = inputs(name, shape)
        out = checked(*(given[i] for i in METHODS[name].inputs), **per_branch(arguments, branches_for(name)))
        assert out.shape == shape and out.dtype == torch.float32 and bool(torch.isfinite(out).all()), shape


@every_method
def test_annotations_refuse_a_wrong_shape(name):
    checked = jaxtyped(typechecker=beartype)(METHODS[name].function)
    given = inputs(name)
    for other in set(METHODS[name].inputs) - {"branches", "depth"}:
        wrong = given | {other: given[other][..., :1].repeat_interleave(7, -1)}
        with pytest.raises(Exception, match=other):
            checked(*(wrong[i] for i in METHODS[name].inputs), **ARGUMENTS.get(name, {}))


@every_variant
def test_nothing_is_changed_and_the_same_inputs_give_the_same_bytes(variant):
    name, arguments = variant
    arguments = per_branch(arguments, branches_for(name))
    for shape in [(6, 4), (1, 1)]:
        given = inputs(name, shape)
        before = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
        state = torch.random.get_rng_state()
        first, second = call(name, given, **arguments), call(name, given, **arguments)
        assert first.equal(second)
        assert all(given[key].equal(value) for key, value in before.items())
        assert torch.random.get_rng_state().equal(state)
        assert all(first.untyped_storage().data_ptr() != given[key].untyped_storage().data_ptr() for key in before)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != ("linear", {"normalize": False})], ids=names_of)
def test_branches_that_did_not_move_give_the_base(variant):
    """To the bit where there is a base to start from; to a rounding where the branches are all there is."""
    name, arguments = variant
    given = inputs(name)
    given["branches"] = given["base"].expand(branches_for(name), 5, 3).contiguous()
    out = call(name, given, **per_branch(arguments, branches_for(name)))
    if METHODS[name].takes_base or name in ("fisher", "passthrough"):
        assert out.equal(given["base"])
    else:
        torch.testing.assert_close(out, given["base"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_branch_of_weight_zero_has_no_say(name):
    for place in (0, 1, 2):
        given = inputs(name, (6, 6), k=2)
        stranger = dict(given)
        for key, value in {"branches": 1e6, "draws": 0.0, "fisher": 1e6, "weights": 0.0, "cuts": 0.0}.items():
            rows = list(given[key])
            rows.insert(place, torch.full_like(rows[0], value))
            stranger[key] = torch.stack(rows)
        assert call(name, stranger).equal(call(name, given)), place


@every_variant
def test_order_of_the_branches_moves_the_last_digits_at_most(variant):
    name, arguments = variant
    for seed, permutation in enumerate([[2, 1, 0], [1, 2, 0], [1, 0, 2]]):
        order = [i for i in permutation if i < branches_for(name)]
        given = inputs(name, (9, 7), seed=seed)
        other = given | {key: given[key][order] for key in ("branches", "weights", "draws", "fisher", "cuts")}
        moved = {key: [value[i] for i in order] if isinstance(value, list) else value for key, value in arguments.items()}
        torch.testing.assert_close(call(name, other, **moved), call(name, given, **per_branch(arguments, len(order))),
                                   rtol=2e-6, atol=2e-6 if name in SPECTRAL else 3e-7)


def cuts_of(kind: str, shape: tuple[int, ...], draw: random.Random) -> list[int]:
    n = math.prod(shape)
    unit = {"entry": CHUNK, "row": shape[-1], "tensor": n}[kind]
    inner = [unit * i for i in range(1, -(-n // unit))]
    return [*sorted(draw.sample(inner, min(len(inner), draw.randint(0, 4)))), n]


@every_variant
def test_blocks_give_the_bits_of_the_whole(variant):
    """Whatever the cuts, and with buffers that are overwritten: the engine's way of calling is the definition's."""
    name, arguments = variant
    method = METHODS[name]
    complete = arguments_for(method, per_branch(arguments, branches_for(name)))
    kind = method.block_for(complete)
    draw = random.Random(name)
    shape = (3 * CHUNK + 1234,) if kind == "entry" else (700, 97) if kind == "row" else (12, 8)
    given = inputs(name, shape)
    whole = method.function(*(given[i] for i in method.inputs), **complete)
    ends = cuts_of(kind, shape, draw) if kind != "entry" else draw.choice(
        [[CHUNK, 3 * CHUNK, math.prod(shape)], [2 * CHUNK, math.prod(shape)], [CHUNK, 2 * CHUNK, 3 * CHUNK, math.prod(shape)]])
    stack = CutStack(given, method.inputs, kind, ends)
    if method.streamed is None:
        def blockwise(block: Block) -> torch.Tensor:
            of_block = given | {key: getattr(block, key) for key in ("branches", "base", "draws", "fisher")}
            return method.function(*(of_block[i] for i in method.inputs), **complete)
    else:
        rest = [i for i in method.inputs if i not in ("branches", "base", "draws", "fisher")]
        blockwise = method.streamed(stack, *(given[i] for i in rest), **complete)
    parts = [blockwise(block).reshape(-1).clone() for block in stack]
    assert torch.cat(parts).equal(whole.reshape(-1)), ends


@every_method
def test_the_streamed_version_takes_what_the_method_takes(name):
    method = METHODS[name]
    if method.streamed is None:
        assert name == "fisher" or name in SPECTRAL
        return
    wanted, got = inspect.signature(method.function).parameters, inspect.signature(method.streamed).parameters
    rest = [i for i in method.inputs if i not in ("branches", "base", "draws", "fisher")]
    keywords = {p.name: (p.default, p.annotation) for p in wanted.values() if p.kind is p.KEYWORD_ONLY}
    assert list(got) == ["stack", *rest, *keywords]
    assert {p.name: (p.default, p.annotation) for p in got.values() if p.kind is p.KEYWORD_ONLY} == keywords


@pytest.mark.parametrize("make", [
    lambda k: Combination((0.3, -0.7, 0.11)[:k], 0.37), lambda k: Combination((0.3, -0.7, 0.11)[:k], anchored=True),
    lambda k: Consensus(None, (1.0, 1.7, 1.0), (0.3, 0.5, -0.2), True, True, 0.9),
    lambda k: Consensus(None, (1.0, 1.7, 1.0), (0.3, 0.5, 0.2), False, True, 0.9)])
def test_where_a_number_stands_does_not_change_it(make):
    """Vector units take most of a tensor and a scalar loop its tail: the two must round alike."""
    given, merge = inputs("ties", (4099,)), make(3)
    whole = merge(Block(0, given["branches"], given["base"]))
    for start, stop in [(1, 4099), (4090, 4099), (17, 40), (4098, 4099)]:
        part = merge(Block(start, given["branches"][:, start:stop], given["base"][start:stop]))
        assert part.equal(whole[start:stop])


def test_an_input_of_coefficient_zero_is_not_looked_at():
    block = Block(0, torch.tensor([[float("nan")], [3.0]]), torch.tensor([float("inf")]))
    assert Combination((0.0, 2.0))(block).item() == 6.0
    assert Combination((0.0, 0.0))(block).item() == 0.0
    assert Combination((0.0, 2.0), anchored=True)(Block(0, block.branches, torch.ones(1))).item() == 5.0


def test_a_fused_multiply_add_is_told_apart():
    """Products are rounded before they are added: (1 + e)(1 - e) - 1 is 0, and -e^2 only when fused."""
    e = 2.0**-13
    block = Block(0, torch.tensor([[1.0], [1 + e]]), torch.zeros(1))
    for anchored in (False, True):
        assert Combination((-1.0, 1 - e), anchored=anchored)(block).item() == 0.0


@every_method
def test_the_docstring_has_a_source_and_an_example_that_runs(name):
    method = METHODS[name]
    text = inspect.getdoc(method.function) or ""
    assert "Differs from the reference:" in text and "Raises:" in text and method.reference
    described = text.split("Args:")[1].split("Raises:")[0]
    for word in [*method.inputs, *(p.name for p in method.parameters)]:
        assert f"\n    {word}: " in described, word
    tests = doctest.DocTestFinder().find(method.function, name,
                                         globs={**vars(importlib.import_module(method.function.__module__))})
    examples = [t for t in tests if t.examples]
    assert examples and all(doctest.DocTestRunner().run(t).failed == 0 for t in examples)


@every_method
def test_a_method_for_matrices_names_a_stand_in_for_the_rest(name):
    method = METHODS[name]
    if method.fits == "matrix":
        other = METHODS[method.otherwise]
        assert other.fits == "any" and other.inputs == method.inputs
        assert {p.name for p in other.parameters} <= {p.name for p in method.parameters}
        with pytest.raises(ValueError, match="wanted matrices"):
            call(name, inputs(name, (4,)))
    assert set(method.inputs) <= set(INPUTS)


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
    with pytest.raises(RecipeError, match="needs it"):
        arguments_for(method_named("slerp"), {})
    with pytest.raises(RecipeError, match="2 numbers for 3 branches"):
        arguments_for(method_named("ties"), {"density": [0.5, 0.5]}, 3)
    assert arguments_for(method_named("interpolate"), {"alpha": 1}) == {"alpha": 1.0}
    assert arguments_for(method_named("passthrough"), {"scale": [2]}, 1) == {"scale": (2.0,)}


def test_a_signature_the_engine_cannot_call_is_refused():
    def unknown_input(models: torch.Tensor) -> torch.Tensor:
        return models

    def strange_type(branches: torch.Tensor, *, alpha: dict) -> torch.Tensor:
        return branches

    def positional(branches: torch.Tensor, alpha: float) -> torch.Tensor:
        return branches

    def no_base(branches: torch.Tensor) -> torch.Tensor:
        return branches

    for function, needs_base in ((unknown_input, False), (strange_type, False), (positional, False), (no_base, True)):
        with pytest.raises(TypeError):
            merge_method("never_registered", needs_base=needs_base, reference="none")(function)
    with pytest.raises(TypeError, match="twice"):
        merge_method("interpolate", needs_base=True, reference="none")(interpolate)
    assert "never_registered" not in METHODS
    assert {p.name for p in METHODS["ties"].parameters if p.per_branch} == {"density"} and PerBranch


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
                package = path.name == "__init__.py" and name in ("sys", "anabranch")  # makes the module callable
                assert name in PURE or name.startswith("anabranch.merge.") or package, f"{path.name} imports {name}"
            does_io = isinstance(node, ast.Name) and node.id in ("open", "print")
            assert not does_io or path.name == PAGE, f"{path.name} does I/O"
