"""The gradient sketch: linear, the same everywhere, and true to inner products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from anabranch.gradients import Sketch, calibration_halves, sketching
from anabranch.recipe import GradientSection
from anabranch.rows import Rows, generator


def parameters(shapes):
    return {f"layer.{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}


SHAPES = [(37, 11), (5,), (64, 64), (129,)]


def sketched(vectors, section, seed=0, shapes=SHAPES):
    sketch = Sketch(parameters(shapes), section, seed)
    for name, tensor in vectors.items():
        sketch.add(name, tensor)
    return sketch.total.clone()


def draw(seed, shapes=SHAPES):
    generator_ = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(shape, generator=generator_) for i, shape in enumerate(shapes)}


def flat(vectors):
    return torch.cat([v.reshape(-1) for v in vectors.values()])


@pytest.mark.parametrize("kind", ["fold", "stride", "full"])
def test_linear(kind):
    section = GradientSection(sketch=kind, size=64, stride=5)
    a, b = draw(1), draw(2)
    both = {name: 2 * a[name] - 3 * b[name] for name in a}
    torch.testing.assert_close(sketched(both, section), 2 * sketched(a, section) - 3 * sketched(b, section),
                               rtol=1e-4, atol=1e-3)


def test_order_of_parameters_does_not_matter():
    section = GradientSection(size=64)
    a = draw(1)
    torch.testing.assert_close(sketched(a, section), sketched(dict(reversed(a.items())), section), rtol=1e-5, atol=1e-4)


def test_stride_takes_every_nth_entry_of_the_whole_gradient():
    a = draw(3)
    assert torch.equal(sketched(a, GradientSection(sketch="stride", stride=5)), flat(a)[::5])
    assert torch.equal(sketched(a, GradientSection(sketch="full")), flat(a))


def test_inner_products_are_unbiased_and_as_near_as_the_theory_says():
    a, b = draw(1), draw(2)
    b = {name: 0.5 * a[name] + b[name] for name in a}
    true = float(flat(a) @ flat(b))
    size, seeds = 512, 200
    found = np.array([float(sketched(a, GradientSection(size=size), s) @ sketched(b, GradientSection(size=size), s))
                      for s in range(seeds)])
    spread = float(flat(a).norm() * flat(b).norm()) * np.sqrt(2 / size)  # count sketch: var <= 2 |a|^2 |b|^2 / m
    assert abs(found.mean() - true) < 4 * spread / np.sqrt(seeds)
    assert found.std() < 1.3 * spread


def test_a_constant_vector_is_not_a_special_case():
    """Equal entries line up block by block: without signs of its own for each block they would add up."""
    shapes = [(64 * 40,)]
    a = {"layer.0": torch.ones(64 * 40)}
    found = [float(sketched(a, GradientSection(size=64), s, shapes).square().sum()) / (64 * 40) for s in range(100)]
    assert 0.8 < np.mean(found) < 1.2


def test_seed_and_name_decide_the_signs():
    a = draw(1)
    same, other = sketched(a, GradientSection(size=64)), sketched(a, GradientSection(size=64), seed=1)
    assert torch.equal(same, sketched(a, GradientSection(size=64))) and not torch.equal(same, other)


def test_hooks_leave_no_gradient_behind_and_count_tied_weights_once():
    tied = nn.Linear(6, 6, bias=False)
    parameters_ = {"w": tied.weight}
    sketch = Sketch(parameters_, GradientSection(sketch="full"), 0)
    x = torch.randn(3, 6)
    with sketching(parameters_, sketch):
        tied(tied(x)).sum().backward()
    assert tied.weight.grad is None
    tied(tied(x)).sum().backward()
    torch.testing.assert_close(sketch.total, tied.weight.grad.reshape(-1))


def test_halves_are_disjoint_and_cover_the_draw():
    rows = Rows.of([([1, 2], [0, 1])] * 31)
    a, b = calibration_halves(rows, "unit", 20, 0)
    assert len(set(a) | set(b)) == 20 and not set(a) & set(b)
    assert [list(x) for x in calibration_halves(rows, "unit", 20, 0)] == [list(a), list(b)]
    assert list(calibration_halves(rows, "another", 20, 0)[0]) != list(a)


def test_random_streams_depend_on_names_only():
    assert generator(0, "a").random() == generator(0, "a").random()
    assert len({generator(s, n).random() for s in (0, 1) for n in ("a", "b")}) == 4
