"""How far the units' gradients disagree: inner products -> cosines, axes, spectrum.

    T       units                        a_t, b_t   mean gradients of unit t's two calibration halves (sketches), [m]
    n_a,t   response tokens of a half    g_t        (n_a a_t + n_b b_t) / (n_a + n_b), the unit's mean gradient
    gram    <g_i, g_j>, [T, T]           C          gram_ij / (|g_i| |g_j|), the cosine matrix

Source: MERIT, arXiv 2606.01717, steps 1 and 2 and appendix F. Pure: arrays in, arrays out, no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh

from anabranch.artifacts import SpectralTest
from anabranch.errors import MixtureError, PlanError

Floats = NDArray[np.float64]
Rows = Sequence[NDArray[np.float32]] | NDArray[np.float32]
Matrix = Literal["cosine", "corrected", "gram"]

# Inner products are exact sums of integers (see `inner_products`), so these set their precision, never their order.
BLOCK = 2**16  # columns that share one scale per row
CHUNK = 2**13  # columns widened to float64 at a time: T x 64 KiB of working memory
NORM_BITS = 26  # rows are scaled to a norm below 2^26, so products stay below 2^53
# Scores are rounded to the first axis' spread x 2^-40: two units with the same gradient then get the same score, and
# the rule for ties (by name) meets real ties, not the last bit of an eigensolver.
SCORE_BITS = 40
KEPT_AXES = 8
LISTED_PAIRS = 10


@dataclass(frozen=True, eq=False)
class InnerProducts:
    """All that the conflict stage needs to know of T gradients; rows in the order of `units`.

    `hashes` identify the sketches, `tokens` int64 [T, 2] are (n_a, n_b); `gram` float64 [T, T];
    `half_products` <a_t, b_t>, `norms_a`, `norms_b` float64 [T].
    """

    units: tuple[str, ...]
    hashes: tuple[str, ...]
    tokens: NDArray[np.int64]
    gram: Floats
    half_products: Floats
    norms_a: Floats
    norms_b: Floats

    @property
    def norms(self) -> Floats:
        """|g_t|, [T]."""
        return np.sqrt(np.diag(self.gram))


@dataclass(frozen=True)
class NormConcentration:
    """Spread of the gradients' lengths; `std` is the population's, `cv` = std / mean."""

    mean: float
    std: float
    cv: float
    max_over_min: float


@dataclass(frozen=True, eq=False)
class ConflictResult:
    """What `artifacts.Conflict` holds, and its tensors, before anything is hashed or written."""

    units: tuple[str, ...]
    matrix: Matrix
    cosine: Floats
    corrected: Floats
    gram: Floats
    scores: Floats
    explained: list[float]
    norms: list[float]
    norm_cv: float
    norm_max_over_min: float
    reliability: list[float]
    unreliable: list[str]
    cosine_mean: float
    cosine_min: float
    negative_share: float
    most_conflicting: list[tuple[str, str, float]]
    spectral_tests: list[SpectralTest]


def inner_products(
    units: Sequence[str],
    hashes: Sequence[str],
    rows_a: Rows,
    rows_b: Rows,
    tokens_a: Sequence[int],
    tokens_b: Sequence[int],
    previous: InnerProducts | None = None,
) -> InnerProducts:
    """Inner products of T units' mean gradients from their half sketches.

    In blocks of 2^16 columns each row is scaled by a power of two to a norm in (2^25, 2^26] and rounded to integers.
    By Cauchy-Schwarz every partial sum of a product of two such rows stays below 2^53, so float64 adds them without
    any rounding: a pair's product is the same number in whatever batch, thread count or BLAS kernel it is computed.
    That is why `previous` changes the cost, O(T m_new) multiplications instead of O(T^2), and no byte of the result.
    The price is a rounding error of about 2^-18 of a row's length before the product, 1e-8 in a cosine.

    Args:
        units: T names, no two the same.
        hashes: T digests of the sketch files; a row of `previous` is used again if name, hash and tokens agree.
        rows_a, rows_b: T rows of m float32 each: arrays [T, m], or sequences of arrays or memory maps [m].
        tokens_a, tokens_b: response tokens behind each half, >= 1.
        previous: an earlier result over any set of units.
    Raises:
        MixtureError: one message with every unit whose sketch is not finite, is zero, has another length than the
            first, or has a half without tokens; also for repeated names or lists of different lengths.
    """
    tokens = _checked_tokens(units, hashes, rows_a, rows_b, tokens_a, tokens_b)
    count, size = len(units), len(rows_a[0])
    share_a = tokens[:, 0] / tokens.sum(axis=1)
    share_b = tokens[:, 1] / tokens.sum(axis=1)
    known = _known_rows(units, hashes, tokens, previous)
    new = np.array([i for i in range(count) if i not in known], dtype=np.int64)
    fresh = np.zeros((len(new), count))
    halves = np.zeros((count, 3))  # <a,b>, <a,a>, <b,b>
    alive = np.zeros(count, dtype=bool)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        exponents = np.zeros(count, dtype=np.int64)
        for i in range(count):
            a = np.asarray(rows_a[i][start:stop], dtype=np.float64)
            b = np.asarray(rows_b[i][start:stop], dtype=np.float64)
            halves[i] += _half_products(a, b)
            mean = share_a[i] * a + share_b[i] * b
            alive[i] = alive[i] or mean.any()
            exponents[i] = _exponent(_dot(mean, mean))
        if not len(new) or not np.isfinite(halves).all():
            continue
        whole = np.zeros_like(fresh)
        for left in range(start, stop, CHUNK):
            integers = _integers(rows_a, rows_b, share_a, share_b, exponents, slice(left, min(left + CHUNK, stop)))
            # one array on both sides lets numpy do half the work (syrk)
            whole += integers @ integers.T if len(new) == count else integers[new] @ integers.T
        fresh += np.ldexp(whole, -(exponents[new][:, None] + exponents[None, :]))
    _refuse_unusable(units, np.isnan(halves[:, 0]), ~alive)
    gram = np.zeros((count, count))
    gram[new] = fresh
    gram[:, new] = fresh.T
    if previous is not None and known:
        here, there = list(known), list(known.values())
        gram[np.ix_(here, here)] = previous.gram[np.ix_(there, there)]
    return InnerProducts(tuple(units), tuple(hashes), tokens, gram, halves[:, 0], np.sqrt(halves[:, 1]),
                         np.sqrt(halves[:, 2]))


def _checked_tokens(
    units: Sequence[str],
    hashes: Sequence[str],
    rows_a: Rows,
    rows_b: Rows,
    tokens_a: Sequence[int],
    tokens_b: Sequence[int],
) -> NDArray[np.int64]:
    """(n_a, n_b) as int64 [T, 2], once the shapes fit. Raises MixtureError."""
    lengths = {"hashes": len(hashes), "rows_a": len(rows_a), "rows_b": len(rows_b), "tokens_a": len(tokens_a),
               "tokens_b": len(tokens_b)}
    problems = [f"{name}: {n} given for {len(units)} units" for name, n in lengths.items() if n != len(units)]
    if not units:
        problems.append("no unit given, wanted at least one")
    if len(set(units)) < len(units):
        problems.append("units of one name: " + ", ".join(sorted({u for u in units if list(units).count(u) > 1})))
    if not problems:
        size = len(rows_a[0])
        for i, unit in enumerate(units):
            if (len(rows_a[i]), len(rows_b[i])) != (size, size) or size == 0:
                problems.append(f"{unit}: sketch halves of {len(rows_a[i])} and {len(rows_b[i])} numbers, "
                                f"wanted {size or 'at least 1'} each")
            if min(tokens_a[i], tokens_b[i]) < 1:
                problems.append(f"{unit}: {tokens_a[i]} and {tokens_b[i]} response tokens in its halves, "
                                "wanted >= 1 each")
    if problems:
        raise MixtureError.of("conflict: the gradients do not fit together. Make them again with one setting:",
                              problems)
    return np.array([tokens_a, tokens_b], dtype=np.int64).T


def _known_rows(
    units: Sequence[str], hashes: Sequence[str], tokens: NDArray[np.int64], previous: InnerProducts | None
) -> dict[int, int]:
    """Row here -> row in `previous`, for units whose sketches and tokens are the same."""
    if previous is None:
        return {}
    keys = zip(previous.units, previous.hashes, map(tuple, previous.tokens.tolist()), strict=True)
    places = {key: place for place, key in enumerate(keys)}
    here = zip(units, hashes, map(tuple, tokens.tolist()), strict=True)
    return {i: places[key] for i, key in enumerate(here) if key in places}


def _dot(a: Floats, b: Floats) -> float:
    """<a,b> on one thread: BLAS wakes all of its threads for each of these short sums, slow on a busy machine."""
    return float(np.einsum("i,i->", a, b))


def _exponent(squared_norm: float) -> int:
    """e such that |row| 2^e lies in (2^25, 2^26]; 0 for a row of zeros or one that is not finite.

    The nudge keeps rows whose norm is a power of two (one-hot ones, say) on one side whatever the order of summation.
    """
    squared = squared_norm * (1 + 2.0**-30)
    if squared == 0 or not math.isfinite(squared):
        return 0
    return NORM_BITS + (-math.frexp(squared)[1]) // 2


def _half_products(a: Floats, b: Floats) -> tuple[float, float, float]:
    """<a,b>, <a,a>, <b,b> of one block, by the same exact sums of integers; nan where a number is not finite."""
    squared_a, squared_b = _dot(a, a), _dot(b, b)
    if not (math.isfinite(squared_a) and math.isfinite(squared_b)):
        return math.nan, math.nan, math.nan
    e, f = _exponent(squared_a), _exponent(squared_b)
    whole_a, whole_b = np.rint(a * 2.0**e), np.rint(b * 2.0**f)
    return (math.ldexp(_dot(whole_a, whole_b), -e - f), math.ldexp(_dot(whole_a, whole_a), -2 * e),
            math.ldexp(_dot(whole_b, whole_b), -2 * f))


def _integers(
    rows_a: Rows,
    rows_b: Rows,
    share_a: Floats,
    share_b: Floats,
    exponents: NDArray[np.int64],
    columns: slice,
) -> Floats:
    """rint(g_t 2^e_t) over some columns, float64 [T, columns]."""
    out = np.empty((len(exponents), columns.stop - columns.start))
    for i, exponent in enumerate(exponents):
        # scaling by a power of two commutes with rounding: the same numbers as scaling g_t itself
        a = np.asarray(rows_a[i][columns], dtype=np.float64) * math.ldexp(share_a[i], int(exponent))
        b = np.asarray(rows_b[i][columns], dtype=np.float64) * math.ldexp(share_b[i], int(exponent))
        np.rint(a + b, out=out[i])
    return out


def _refuse_unusable(units: Sequence[str], broken: NDArray[np.bool_], zero: NDArray[np.bool_]) -> None:
    """Raises MixtureError naming each unit whose gradient is not finite or is zero: it has no direction."""
    problems = [f"{units[i]}: its gradient sketch holds numbers that are not finite"
                for i in np.flatnonzero(broken).tolist()]
    problems += [f"{units[i]}: its mean gradient is zero, so it has no direction"
                 for i in np.flatnonzero(zero & ~broken).tolist()]
    if problems:
        raise MixtureError.of("conflict: units without a usable gradient. Take them out of the mixture, or look at "
                              "their rows and at `model.trainable`:", problems)


def cosine_matrix(products: InnerProducts) -> Floats:
    """C_ij = <g_i,g_j> / (|g_i| |g_j|), float64 [T, T] in [-1, 1], diagonal exactly 1 (arXiv 2606.01717, step 1)."""
    return _normalised(products.gram, products.norms**2)


def corrected_cosine_matrix(products: InnerProducts) -> Floats:
    """Cosines without the shrinkage by calibration noise, float64 [T, T] in [-1, 1], diagonal exactly 1.

    Few examples make |g_t| too long (noise adds its variance) and so every cosine too small. Off the diagonal
    <g_i,g_j> is unbiased already; |g_t|^2 is replaced by <a_t,b_t>, whose halves have independent noise.
    Units with <a_t,b_t> <= 0 (`unreliable_units`) keep their plain norm. Clipped to [-1, 1]. Our extension.
    """
    plain = products.norms**2
    return _normalised(products.gram, np.where(products.half_products > 0, products.half_products, plain))


def _normalised(gram: Floats, squared_norms: Floats) -> Floats:
    """gram_ij / sqrt(n_i n_j), clipped to [-1, 1], with ones on the diagonal."""
    length = np.sqrt(squared_norms)
    cosine = np.clip(gram / length[:, None] / length[None, :], -1.0, 1.0)
    # the two divisions round in another order on either side of the diagonal
    cosine = np.triu(cosine, 1)
    return cosine + cosine.T + np.eye(len(gram))


def reliability(products: InnerProducts) -> Floats:
    """How far a unit's mean gradient would agree with that of another calibration set of its size, float64 [T] <= 1.

    The cosine r of the halves, stepped up to both halves together by Spearman-Brown, 2r / (1 + r). For r <= 0 that
    formula means nothing and runs to minus infinity: r itself is returned. 0 where a half is zero.
    """
    lengths = products.norms_a * products.norms_b
    split = np.divide(products.half_products, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    split = np.clip(split, -1.0, 1.0)
    return np.where(split > 0, 2 * split / (1 + np.maximum(split, 0)), split)


def unreliable_units(products: InnerProducts) -> list[str]:
    """Names of the units whose halves do not agree at all, <a_t,b_t> <= 0: they need more calibration samples."""
    return [unit for unit, product in zip(products.units, products.half_products, strict=True) if product <= 0]


def norm_concentration(norms: ArrayLike) -> NormConcentration:
    """Mean, spread and range of T > 0 positive lengths; where cv is small, cosine and raw-gradient axes agree."""
    values = np.asarray(norms, dtype=np.float64)
    mean, std = float(values.mean()), float(values.std())
    return NormConcentration(mean, std, std / mean, float(values.max() / values.min()))


def principal_axes(matrix: ArrayLike, r: int) -> tuple[Floats, list[float]]:
    """Column-centred PCA of a [T, T] matrix whose rows are observations (arXiv 2606.01717, step 2).

    Returns:
        scores float64 [T, min(r, T-1)], and the share of variance of each of the T-1 axes, largest first
        (zeros if the rows are all the same). Sign: the entry of largest size is positive, the first such on a tie.
    Axes of equal variance are free to rotate: their scores are fixed by the eigensolver, not by the data.
    """
    values = np.asarray(matrix, dtype=np.float64)
    centred = values - values.mean(axis=0)
    return _coordinates(centred @ centred.T, r)


def raw_gradient_axes(gram: ArrayLike, r: int) -> tuple[Floats, list[float]]:
    """PCA of the gradients themselves, from their Gram matrix K = G G^T centred on both sides (the paper's ablation).

    Returns as `principal_axes`; scores are in the gradients' own unit.
    """
    return _coordinates(centred_gram(gram), r)


def centred_gram(gram: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Inner products of g_t - gbar, float64 [T, T], gbar the mean under `weights` (default: every unit the same)."""
    values = np.asarray(gram, dtype=np.float64)
    share = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    to_mean = values @ share
    centred = values - to_mean[:, None] - to_mean[None, :] + share @ to_mean
    symmetric: Floats = (centred + centred.T) / 2
    return symmetric


def _coordinates(gram: Floats, r: int) -> tuple[Floats, list[float]]:
    """Principal coordinates (U sqrt(mu)) and shares from a centred Gram matrix U diag(mu) U^T of rank <= T-1."""
    most = len(gram) - 1
    if most < 1:
        return np.zeros((len(gram), 0)), []
    variances, vectors = eigh(gram, driver="evd", check_finite=False)
    variances = np.clip(variances[::-1][:most], 0.0, None)
    total = float(variances.sum())
    kept = min(r, most)
    if total == 0:
        return np.zeros((len(gram), kept)), [0.0] * most
    scores = vectors[:, ::-1][:, :kept] * np.sqrt(variances[:kept])
    step = 2.0 ** (math.frexp(math.sqrt(variances[0]))[1] - SCORE_BITS)
    scores = np.rint(scores / step) * step
    peaks = scores[np.abs(scores).argmax(axis=0), np.arange(kept)]
    return scores * np.where(peaks < 0, -1.0, 1.0) + 0.0, [float(v) / total for v in variances]  # + 0.0: no -0


def spectral_tests(gram: ArrayLike, max_axes: int = 3) -> list[SpectralTest]:
    """How far will the branches drift apart? F.10 against F.11 for K = 2, 4, .. groups of T units.

    Not a forecast of which arm gives the better model: under one common Hessian every balanced split merges into the
    same weights, and a larger G_var means worse branches. Which arm wins has to be measured.

    Setting: one gradient step of size eta from one start, equal budgets, K = 2^r groups of T/K units, Hessian I
    (pass M = G H G^T for another H), eta = 1. M below is `gram` centred over units, as in the paper's covariance;
    a balanced sign vector cannot tell the two apart. Branch k moves by -eta gbar_k, so by the merging identity F.1

        G_var = eta^2/2 (1/K) sum_k |gbar_k - gbar|^2 = eta^2/(2T) tr(M P),    P = sum_k 1_k 1_k^T / |k|,

    P the projection on the vectors that are constant on every group.

    Random balanced split: a random group of n = T/K units has E[1_k^T M 1_k] = tr(M) (n/T)(T-n)/(T-1), as 1^T M 1 = 0;
    put in:  E[G_var] = eta^2/2 (K-1)/(T(T-1)) tr(M).  K = 2 is F.10.

    Split along the top r axes: give unit t the signs s_l(t) = sign(v_l(t)), l = 1..r, and let its group be its signs.
    The Walsh functions w_S = prod_{l in S} s_l, S a subset of {1..r}, are constant on groups; if the groups are equally
    large then the 2^r vectors w_S / sqrt(T) are orthonormal, so they are a basis of P's range:

        G_var = eta^2/(2T^2) sum_{S not empty} w_S^T M w_S  >=  eta^2/(2T^2) sum_{l<=r} s_l^T M s_l
                                                            >=  eta^2/(2T^2) sum_{l<=r} mu_l |v_l|_1^2,

    dropping products of two and more signs (M >= 0), then all but the l-th term of
    s_l^T M s_l = sum_j mu_j (v_j^T s_l)^2, with v_l^T s_l = |v_l|_1. r = 1 is F.11; r > 1 is our extension, not the
    paper's. For r = 1 it is enough that s_1 / sqrt(T) lies in P's range, so the bound holds for a lopsided sign split
    too (branches weighted by units); for r > 1 the s_l have to be orthogonal, else the figure is an estimate.

    Args:
        gram: [T, T] inner products; its calibration noise counts as conflict here.
        max_axes: r goes from 1 to this, as long as 2^r <= T.
    Returns:
        one SpectralTest per r. `ratio` = pca_bound / random_gain, 0 where no gradient differs from another.
    """
    centred = centred_gram(gram)
    units = len(centred)
    axes = min(max_axes, units.bit_length() - 1)
    if axes < 1:
        return []
    variances, vectors = eigh(centred, subset_by_index=[units - axes, units - 1], driver="evr", check_finite=False)
    terms = np.clip(variances[::-1], 0.0, None) * np.abs(vectors[:, ::-1]).sum(axis=0) ** 2
    trace = max(float(np.trace(centred)), 0.0)
    tests = []
    for r in range(1, axes + 1):
        random_gain = (2**r - 1) * trace / (2 * units * (units - 1))
        bound = float(terms[:r].sum()) / (2 * units**2)
        ratio = bound / random_gain if random_gain > 0 else 0.0
        tests.append(SpectralTest(axes=r, random_gain=random_gain, pca_bound=bound, ratio=ratio,
                                  above_random=ratio > 1))
    return tests


def drift_in_words(test: SpectralTest) -> str:
    """One sentence for a reader: what the spectral test tells, and what it does not."""
    split = f"{2**test.axes} groups along the top {'axis' if test.axes == 1 else f'{test.axes} axes'}"
    if test.above_random:
        tells = (f"{split}: after one step the branches' spread (G_var) is at least {test.ratio:.2f} times that of "
                 "random groups")
    else:
        tells = (f"{split}: nothing says that the branches drift further apart than those of random groups (G_var at "
                 f"least {test.ratio:.2f} times theirs)")
    return tells + "; which arm gives the better model is another question, and has to be measured."


def partition_gain(gram: ArrayLike, groups: ArrayLike, weights: ArrayLike) -> float:
    """G_var of an actual plan after one gradient step of size 1 (Hessian I); compare `SpectralTest.random_gain`.

    Exact, by F.1 with branch weights N_k / N:  1/2 sum_k (N_k/N) |gbar_k - gbar|^2, gbar_k the mean of the group's
    gradients weighted by budget. 0 for a soup (every group -1: each branch sees every unit) and for one group.

    Args:
        gram: [T, T] inner products of gradients.
        groups: int [T], 0 .. K-1, or all -1.
        weights: [T] positive budgets (tokens).
    Raises:
        PlanError: lengths differ, a weight is not positive, or only some groups are -1.
    """
    group, weight = np.asarray(groups), np.asarray(weights, dtype=np.float64)
    count = len(np.asarray(gram))
    if group.shape != (count,) or weight.shape != (count,) or not (weight > 0).all():
        raise PlanError(f"partition gain: {group.size} groups and {weight.size} budgets for {count} units; wanted one "
                        "group and one positive budget per unit. Make the plan again from this mixture.")
    if (group < 0).all():
        return 0.0
    if (group < 0).any():
        raise PlanError("partition gain: some units have no group and others do; give every unit a group, or none.")
    share = weight / weight.sum()
    member = (group[None, :] == np.unique(group)[:, None]) * share
    moved = np.einsum("kt,tu,ku->k", member, centred_gram(gram, share), member, optimize=True)
    return max(0.0, float((moved / member.sum(axis=1)).sum()) / 2)


def most_conflicting(units: Sequence[str], cosine: Floats, count: int = LISTED_PAIRS) -> list[tuple[str, str, float]]:
    """The `count` pairs of units with the smallest cosine, smallest first, ties by name; names sorted in a pair."""
    i, j = np.triu_indices(len(units), 1)
    if not len(i):
        return []
    count = min(count, len(i))
    limit = np.partition(cosine[i, j], count - 1)[count - 1]
    near = np.flatnonzero(cosine[i, j] <= limit)
    pairs = [(*sorted((units[i[p]], units[j[p]])), float(cosine[i[p], j[p]])) for p in near]
    return [(a, b, c) for a, b, c in sorted(pairs, key=lambda p: (p[2], p[0], p[1]))[:count]]


def analyse(products: InnerProducts, matrix: Matrix) -> ConflictResult:
    """Everything that the conflict stage tells of T units, rows in the order of `products.units` (give them sorted).

    Args:
        products: from `inner_products`.
        matrix: what the axes come from: 'cosine' (the paper), 'corrected' for noise, or 'gram' (raw gradients).
    Returns:
        a ConflictResult; `scores` [T, min(8, T-1)]. Its cosine figures are of the plain matrix over pairs i < j,
        and 0 where there is no pair.
    """
    cosine, corrected = cosine_matrix(products), corrected_cosine_matrix(products)
    if matrix == "gram":
        scores, explained = raw_gradient_axes(products.gram, KEPT_AXES)
    else:
        scores, explained = principal_axes(cosine if matrix == "cosine" else corrected, KEPT_AXES)
    pairs = cosine[np.triu_indices(len(cosine), 1)]
    concentration = norm_concentration(products.norms)
    return ConflictResult(
        units=products.units,
        matrix=matrix,
        cosine=cosine,
        corrected=corrected,
        gram=products.gram,
        scores=scores,
        explained=explained,
        norms=products.norms.tolist(),
        norm_cv=concentration.cv,
        norm_max_over_min=concentration.max_over_min,
        reliability=reliability(products).tolist(),
        unreliable=unreliable_units(products),
        cosine_mean=float(pairs.mean()) if pairs.size else 0.0,
        cosine_min=float(pairs.min()) if pairs.size else 0.0,
        negative_share=float((pairs < 0).mean()) if pairs.size else 0.0,
        most_conflicting=most_conflicting(products.units, cosine),
        spectral_tests=spectral_tests(products.gram),
    )
