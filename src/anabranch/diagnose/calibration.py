r"""How many examples does a unit's mean gradient need? Pure.

    S   sizes n_1 < .. < n_S; the last is the reference N        m   numbers of a gradient (or of its sketch)
    g_i = mu + e_i   the gradient of example i, the e_i independent of each other with covariance Sigma
    kappa = tr(Sigma) / |mu|^2   examples at which noise and signal are equally long; the smaller, the better

Two answers, and they are not the same:

- **The paper's** (MERIT, arXiv:2606.01717, calibration size): the cosine of the n-example gradient with the N-example
  one, N the largest n. Prefix and reference share n examples, so it is high even without any signal: in expectation
  about sqrt((1 + kappa/N) / (1 + kappa/n)), which is sqrt(n/N) for pure noise (0.45 for 200 of 1000). It says how far
  the gradient still moves when examples are added up to N, not how far it is from mu.
- **Reliability** (ours): the cosine to be expected with the gradient of *other* n examples of the same unit,
  rho(n) = n / (n + kappa) = n |mu|^2 / (n |mu|^2 + tr Sigma). From two disjoint halves a, b of the prefix, with n_a and
  n_b examples:  cos(a, b) = 1 / sqrt((1 + kappa/n_a) (1 + kappa/n_b)),  solved for kappa. With equal halves this is
  Spearman and Brown's 2 r / (1 + r), 1910; halves of an odd n differ by one.

How many examples a reliability rho* takes is rho(n) = rho* solved for n:  n = kappa rho* / (1 - rho*). It is an estimate
from N examples, and a forecast where it exceeds N. The cosine with mu itself is sqrt(rho(n)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anabranch.diagnose.artifacts import UnitCalibration

Floats = NDArray[np.float64]


def halves_of(n: int) -> tuple[int, int]:
    """Examples in the two halves of the first n, when they alternate from the first on."""
    return (n + 1) // 2, n // 2


def usable_sizes(sizes: Sequence[int], rows: int) -> list[int]:
    """The sizes that a unit of so many rows has, ascending; 2 at least, as a half needs an example."""
    return sorted({n for n in sizes if 2 <= n <= rows})


def cosine(a: ArrayLike, b: ArrayLike) -> float:
    """In [-1, 1], float64; 0 where one is zero."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    length = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / length)) if length > 0 else 0.0


def noise_ratio(correlation: float, first: int, second: int) -> float:
    """kappa from the cosine of the gradients of two disjoint sets of `first` and `second` examples; inf where it is <= 0.

    The positive root of (1 + kappa/n_a) (1 + kappa/n_b) = 1 / r^2.
    """
    if correlation <= 0:
        return math.inf
    both, product = first + second, first * second
    return (math.sqrt(both * both + 4 * product * (1 / correlation**2 - 1)) - both) / 2


def reliability(n: float, ratio: float) -> float:
    """rho(n) = n / (n + kappa), in [0, 1]."""
    return 0.0 if math.isinf(ratio) else n / (n + ratio)


def examples_needed(ratio: float, wanted: float) -> int | None:
    """The least n with rho(n) >= wanted; None where kappa is infinite: no signal at all.

    Args:
        wanted: in (0, 1).
    """
    if math.isinf(ratio):
        return None
    # the last digit of a division must not ask for one example more
    return max(1, math.ceil(ratio * wanted / (1 - wanted) * (1 - 1e-9)))


def nested_cosine(n: int, reference: int, ratio: float) -> float:
    """What the paper's cosine is expected to be, n <= N; sqrt(n/N) for pure noise. See the module's docstring."""
    if math.isinf(ratio):
        return math.sqrt(n / reference)
    return math.sqrt((1 + ratio / reference) / (1 + ratio / n))


def calibrate(unit: str, rows: int, sizes: Sequence[int], first: ArrayLike, second: ArrayLike,
              wanted: float) -> UnitCalibration:
    """One unit's curve.

    Args:
        rows: calibration rows it has.
        sizes: S sizes, ascending.
        first, second: [S, m]: for each size, the sum of gradients over the one and the other half of the first n examples
            (`halves_of`). Sums, not means: an example with more tokens counts for more, as in the unit's mean gradient.
        wanted: the reliability that `needed` is for, in (0, 1).
    Returns:
        `reliability` is that of n, from the halves of n; where they do not agree at all (cosine <= 0) that cosine itself,
        as in the conflict stage. `needed` comes from the largest n.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    whole = a + b
    told, ratio = [], math.inf
    for i, n in enumerate(sizes):
        agreement = cosine(a[i], b[i])
        ratio = noise_ratio(agreement, *halves_of(n))
        told.append(reliability(n, ratio) if agreement > 0 else agreement)
    cosines = [cosine(whole[i], whole[-1]) for i in range(len(sizes) - 1)] + [1.0]
    return UnitCalibration(unit=unit, rows=rows, sizes=list(sizes), cosines=cosines, reliability=told,
                           needed=examples_needed(ratio, wanted))


def mean_curves(units: Sequence[UnitCalibration]) -> tuple[list[int], list[float], list[float]]:
    """(sizes, mean cosine, mean reliability) over the units that have so many rows.

    A unit's own reference is left out of the mean cosine at that size (it is 1 by definition, and would lift the curve
    where smaller units end), unless every unit ends there.
    """
    sizes = sorted({n for u in units for n in u.sizes})
    cosines, reliabilities = [], []
    for n in sizes:
        here = [(u, u.sizes.index(n)) for u in units if n in u.sizes]
        inside = [u.cosines[i] for u, i in here if i < len(u.sizes) - 1]
        cosines.append(float(np.mean(inside)) if inside else 1.0)
        reliabilities.append(float(np.mean([u.reliability[i] for u, i in here])))
    return sizes, cosines, reliabilities
