"""Curvature of a loss without its Hessian: products with it, its largest eigenvalues, and what lies along them.

    d   parameters      H   Hessian [d, d] at theta0, never formed      m   Lanczos steps      k   eigenvectors kept
    u_l, lambda_l   l-th eigenvector (unit length) and eigenvalue, largest first
    tau_b   task vector of branch b: branch - theta0      w   branch weights, positive, sum 1

Everything here works on callables and flat vectors; `feed_curvature` makes them from a model and rows.
Merge-readiness diagnostic of MERIT, arXiv 2606.01717 ("Hessian alignment") and its theorem 3.1. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from anabranch.diagnose.artifacts import Alignment
from anabranch.errors import ShapeMismatch
from anabranch.rows import generator
from anabranch.theory import merging_gain

Product = Callable[[Tensor], Tensor]  # v [d] -> H v [d]
Floats = NDArray[np.float64]

RANDOM_DRAWS = 10_000  # of the null distribution behind z
RESAMPLES = 2_000  # of the bootstrap
# A beta below so many roundings of the largest entry of the tridiagonal is no new direction: the Krylov space is used up.
BREAKDOWN = 100.0
CHUNK = 2**20  # entries of each vector that are widened to float64 at a time


def random_direction(entries: int, seed: int, *names: str) -> Float[Tensor, " d"]:
    """A direction drawn evenly from the unit sphere in R^d, float64, decided by the seed and the names."""
    drawn = torch.from_numpy(generator(seed, *names).standard_normal(entries))
    return drawn / torch.linalg.vector_norm(drawn)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |ours|; 0 where both are zero, infinite where only `ours` is."""
    apart, length = _norm(ours - theirs), _norm(ours)
    return apart / length if length else (float("inf") if apart else 0.0)


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _lengths(rows: Float[Tensor, "r d"]) -> Float[Tensor, "r 1"]:
    """Added up in float64: a float32 sum of millions of squares is off in the fourth digit."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)


def _gram(a: Tensor, b: Tensor) -> Floats:
    """Inner products of the rows of two matrices [.., d], added up in float64 without a copy of either."""
    total = torch.zeros((len(a), len(b)), dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(CHUNK, dim=1), b.split(CHUNK, dim=1), strict=True):
        total += left.double() @ right.double().T
    return total.cpu().numpy()


def _dot(a: Tensor, b: Tensor) -> float:
    return float(_gram(a[None], b[None])[0, 0])


# ---- products with the Hessian ---------------------------------------------------------------------------------------


def double_backward(losses: Callable[[], Iterable[Tensor]], parameters: Sequence[Tensor]) -> Product:
    """v -> H v by differentiating the gradient (Pearlmutter 1994): exact to the rounding of the arithmetic.

    Args:
        losses: gives, each time anew, scalars that add up to the loss (one per micro-batch, already divided by what the
            mean is over); their graphs are freed one by one, so one micro-batch's graph is in memory at a time.
        parameters: leaves that require gradients; v is their entries end to end.
    A micro-batch costs 9 forward passes: forward 1, backward 2, and the backward through both of them 6.
    """
    sizes = [p.numel() for p in parameters]

    def product(vector: Tensor) -> Tensor:
        _check_length(vector, sum(sizes))
        pieces = [v.view_as(p) for v, p in zip(vector.split(sizes), parameters, strict=True)]
        total = torch.zeros_like(vector)
        for loss in losses():
            first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            bent = [(g, v) for g, v in zip(first, pieces, strict=True) if g.requires_grad]  # the others do not depend on theta
            if bent:
                second = torch.autograd.grad([g for g, _ in bent], parameters, grad_outputs=[v for _, v in bent],
                                             materialize_grads=True)
                total += torch.cat([s.reshape(-1) for s in second])
        return total

    return product


def central_differences(gradient: Callable[[Tensor], Tensor], step: float) -> Product:
    """v -> |v| (grad L(theta0 + e v/|v|) - grad L(theta0 - e v/|v|)) / 2e, with e = `step`, a distance in R^d.

    Args:
        gradient: gradient of the loss at theta0 + its argument, both [d].
        step: e > 0. The error is e^2/6 times the third derivative of the gradient along v, plus rounding / e: too long a
            step is wrong along strongly curved directions, too short a one along flat ones.
    6 forward passes for each micro-batch. The paper does this with e = 0.1 and does not say what 0.1 is measured in; as a
    distance that is right for some model sizes only (`feed_curvature.RELATIVE_STEP`).
    """

    def product(vector: Tensor) -> Tensor:
        length = _norm(vector)
        if length == 0:
            return torch.zeros_like(vector)
        unit = vector / length
        return (gradient(unit * step) - gradient(unit * -step)) * (length / (2 * step))

    return product


def _check_length(vector: Tensor, entries: int) -> None:
    if vector.shape != (entries,):
        raise ShapeMismatch(f"Hessian-vector product: got a vector of shape {tuple(vector.shape)}, wanted ({entries},), one "
                            "entry for each parameter.")


# ---- eigenvalues -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spectrum:
    """`values` float64 [k], largest first; `vectors` [k, d] of unit length; `residuals` float64 [k], bounds on
    |H u - lambda u|, so an eigenvalue of H lies that near each value; `ritz` float64 [m], ascending.

    A bound is |beta_m s_m| (s_m the last entry of the tridiagonal's eigenvector), never below one rounding of the largest
    Ritz value: in exact arithmetic it falls to nothing, in float32 the product itself is not that sharp.
    """

    values: Floats
    vectors: Float[Tensor, "k d"]
    residuals: Floats
    ritz: Floats

    @property
    def steps(self) -> int:
        return len(self.ritz)


def lanczos_bytes(entries: int, steps: int, top: int, itemsize: int = 4) -> int:
    """Peak memory of `lanczos`, bytes: the m basis vectors, k eigenvectors and four working vectors.

    What `product` needs for itself comes on top.
    """
    return (min(steps, entries) + min(top, steps, entries) + 4) * entries * itemsize


def lanczos(product: Product, start: Float[Tensor, " d"], steps: int, top: int,
            tell: Callable[[int, int], None] = lambda *_: None) -> Spectrum:
    """The largest eigenvalues of a symmetric H by m Lanczos steps with full reorthogonalisation.

    Each new vector is orthogonalised twice against all before it ("twice is enough", Parlett 1998, section 6.9), so no
    eigenvalue comes back as a ghost copy of another. Vectors keep the dtype of `start` (float32 for a model); the
    tridiagonal matrix is float64. Ends early where the Krylov space is used up: with fewer distinct eigenvalues than
    steps. An eigenvalue of multiplicity two is found once, with one of its vectors.

    Args:
        start: any vector that is not zero; random, so that it misses no eigenvector.
        steps: m >= 1, cut to d.    top: k >= 1, cut to the steps taken.    tell: (steps done, steps).
    Memory: `lanczos_bytes`.
    """
    entries, steps = len(start), min(steps, len(start))
    basis = torch.empty((steps, entries), dtype=start.dtype, device=start.device)
    basis[0] = start / _norm(start)
    diagonal, beside, largest = [], [], 0.0
    for j in range(steps):
        tell(j, steps)
        new = product(basis[j])
        diagonal.append(_dot(basis[j], new))
        for _ in range(2):
            new = new - basis[: j + 1].T @ (basis[: j + 1] @ new)
        beside.append(_norm(new))
        largest = max(largest, abs(diagonal[-1]), beside[-1])
        if beside[-1] <= BREAKDOWN * torch.finfo(start.dtype).eps * largest:
            beside[-1] = 0.0  # what is left is rounding
            break
        if j + 1 < steps:
            basis[j + 1] = new / beside[-1]
    tell(steps, steps)
    taken = len(diagonal)
    ritz, mixing = eigh_tridiagonal(np.array(diagonal), np.array(beside[:-1]))
    order = np.arange(taken)[::-1][: min(top, taken)]
    vectors = torch.from_numpy(np.ascontiguousarray(mixing[:, order].T)).to(basis) @ basis[:taken]
    vectors /= _lengths(vectors)
    rounding = torch.finfo(start.dtype).eps * np.abs(ritz).max()
    return Spectrum(ritz[order], vectors, np.maximum(np.abs(beside[-1] * mixing[-1, order]), rounding), ritz)


# ---- conflict axes against eigenvectors ------------------------------------------------------------------------------


def conflict_axes(gradients: Float[Tensor, "r d"], count: int) -> Float[Tensor, "a d"]:
    """Unit vectors along the top conflict directions of R units' gradients, in R^d.

    Column-centred PCA of the cosine matrix C = G G^T of the normalised gradients G (MERIT step 2) has its l-th axis a_l in
    R^R, and scores a unit with sum_t a_lt <g, g_t> up to a constant: with <g, G^T a_l>. So G^T a_l is the direction in
    parameter space that the score is measured along, exactly; that is what "lifted" means here.

    Args:
        gradients: R >= 2 rows, none zero.
        count: axes wanted. R units have R - 1 at most; axes without variance are left out.
    """
    unit = gradients / _lengths(gradients)
    cosine = _gram(unit, unit)
    _, spread, axes = np.linalg.svd(cosine - cosine.mean(axis=0))
    kept = min(count, len(unit) - 1, int((spread > 1e-6 * max(spread[0], 1e-30)).sum()))
    lifted = torch.from_numpy(axes[:kept].copy()).to(unit) @ unit
    return lifted / _lengths(lifted)


def align(axes: Float[Tensor, "a d"], eigenvectors: Float[Tensor, "k d"], units: list[str], seed: int) -> Alignment:
    """Absolute cosines, principal angles between the spans, and how far from chance the largest cosine is.

    z = (largest - mean) / standard deviation, both of `random_largest`: the largest absolute cosine of as many random
    directions with the same eigenvectors. It grows like sqrt(d) at a given cosine, so it compares axes with directions drawn
    blindly, not models of different size; the paper does not define its z beyond "against Gaussian vectors".
    """
    cosines = np.abs(_gram(axes, eigenvectors))
    null = random_largest(len(axes), len(eigenvectors), axes.shape[1], seed)
    largest, mean, std = float(cosines.max()), float(null.mean()), float(null.std())
    return Alignment(units=units, cosines=cosines.tolist(), largest=largest,
                     angles=principal_angles(axes, eigenvectors).tolist(), random_mean=mean, random_std=std,
                     z=(largest - mean) / std if std else 0.0)


def principal_angles(a: Float[Tensor, "a d"], b: Float[Tensor, "b d"]) -> Floats:
    """Angles between the spans of two sets of rows, degrees, ascending, [min(rank a, rank b)] (Bjorck and Golub 1973).

    From inner products alone, so that no float64 copy of a vector is needed; that leaves angles below 1e-5 degrees to
    rounding, which eigenvectors in float32 do anyway.
    """
    cosines = np.linalg.svd(_whitening(_gram(a, a)) @ _gram(a, b) @ _whitening(_gram(b, b)).T, compute_uv=False)
    angles: Floats = np.rad2deg(np.arccos(np.clip(cosines, 0.0, 1.0)))
    return np.sort(angles)


def _whitening(gram: Floats) -> Floats:
    """W with W gram W^T = I on the span; directions that are rounding are left out."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-10 * values[-1]
    return (vectors[:, kept] / np.sqrt(values[kept])).T


def random_largest(directions: int, eigenvectors: int, entries: int, seed: int, draws: int = RANDOM_DRAWS) -> Floats:
    """Draws of the largest |cosine| between `directions` random Gaussian vectors in R^d and k orthonormal ones, [draws].

    Exact and without a vector of length d: in a basis that begins with the k eigenvectors a Gaussian vector's first k
    entries are independent N(0, 1), and the squares of its other d - k entries add up to a chi-squared variable.
    """
    random = generator(seed, "random directions", directions, eigenvectors, entries)
    along = random.standard_normal((draws, directions, eigenvectors))
    rest = random.chisquare(entries - eigenvectors, (draws, directions)) if entries > eigenvectors else 0.0
    lengths = np.sqrt((along**2).sum(axis=2) + rest)
    largest: Floats = (np.abs(along).max(axis=2) / lengths).max(axis=1)
    return largest


# ---- merging gain ----------------------------------------------------------------------------------------------------


def quadratic_gain(product: Product, task_vectors: Callable[[int], Tensor], weights: Sequence[float],
                   tell: Callable[[int, int], None] = lambda *_: None) -> float:
    """1/2 sum_b w_b (tau_b - tau_bar)^T H (tau_b - tau_bar) by one product for each branch: theorem 3.1 with the whole H.

    Args:
        task_vectors: b -> tau_b [d], asked for twice each: one of them and their mean are in memory at a time.
        weights: w, sum 1.
    Negative where H curves downwards along the branches' differences; theorem 3.1 has H >= 0.
    """
    mean = sum((task_vectors(b) * w for b, w in enumerate(weights)), torch.tensor(0.0))
    gain = 0.0
    for b, weight in enumerate(weights):
        tell(b, len(weights))
        apart = task_vectors(b) - mean
        gain += weight * _dot(apart, product(apart)) / 2
    tell(len(weights), len(weights))
    return gain


def top_gain(spectrum: Spectrum, task_vectors: Callable[[int], Tensor], weights: Sequence[float]) -> float:
    """1/2 sum_l lambda_l Var_w(u_l^T tau) over the top eigenvectors alone."""
    along = [[_dot(u, tau) for u in spectrum.vectors] for tau in map(task_vectors, range(len(weights)))]
    return merging_gain(np.diag(spectrum.values), along, weights)


def measured_gain(branches: Float[np.ndarray, "b n 2"], merged: Float[np.ndarray, "n 2"], weights: Sequence[float],
                  seed: int) -> tuple[float, float, float]:
    """sum_b w_b L(branch b) - L(merged), and its 95 % percentile interval from resampling batches.

    Args:
        branches, merged: (sum of nats, response tokens) of each batch, the same batches for all; L is the ratio of their sums.
    Every model is resampled with the same batches, so what makes a batch hard cancels.
    """
    saved = np.tensordot(np.asarray(weights), branches[:, :, 0], axes=1) - merged[:, 0]
    tokens = merged[:, 1]
    picks = generator(seed, "bootstrap", "merging gain").integers(0, len(saved), (RESAMPLES, len(saved)))
    low, high = np.quantile(saved[picks].sum(axis=1) / tokens[picks].sum(axis=1), [0.025, 0.975])
    return float(saved.sum() / tokens.sum()), float(low), float(high)
