"""Rows for tokens that a model does not have, from those that it shares with a donor. Pure: tensors in, tensors out.

    t  tokens wanted     n  shared tokens (anchors)     a  donor's width     b  model's width     k  anchors per token

    targets [t, a]   donor rows of the wanted tokens
    donor   [n, a]   donor rows of the anchors: X
    model   [n, b]   the model's rows of the same anchors: Y

All float32, and every function gives float32 [t, b]. Systems of k or a or b unknowns are solved in float64 and rounded once.
Each is deterministic on one thread; results do not depend on `batch` beyond the last bits.

Sources: orthogonal matching pursuit, Goddard & Fernandes Neto, arXiv 2506.06607; its algorithm, Pati et al. 1993. Weighted
neighbours and least squares as in MergeKit's tokensurgeon (merge specification, 7.5). `sparse_similarity`: FOCUS, Dobler & de
Melo, arXiv 2305.14481, with the donor's own embeddings for its auxiliary ones. `john_hewitt`: Hewitt 2021, "Initializing New
Word Embeddings for Pretrained Language Models". `landmark_pca`, `procrustes`: Schoenemann 1966. `ridge` and `composed`: least
squares with a penalty chosen by generalised cross-validation (Golub, Heath & Wahba 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["distance_proportional", "barycentric", "least_squares"]
Pooling = Literal["mean", "sum", "weighted_mean", "first_last"]

# A new atom whose part outside the span of those chosen before is smaller than this share of it is taken to lie inside.
DEPENDENT = 1e-5
# A residual below this share of its target is nothing: the target is reproduced.
REPRODUCED = 1e-6
FLOOR = 1e-6
FALLBACK_SPREAD = 0.02
CHUNK = 8192
PENALTIES = [10.0 ** (step / 2) for step in range(-16, 3)]  # shares of the largest eigenvalue


# ---------------------------------------------------------------------------------------------- orthogonal matching pursuit


def omp(targets: Tensor, donor: Tensor, model: Tensor, k: int, *, batch: int = 512) -> Tensor:
    """Each target as a combination of k anchors in the donor's space; the same combination of the model's rows."""
    return _in_batches(lambda part: _combined(*pursuit(part, donor, k), model), targets, batch, model.shape[1])


def pursuit(targets: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit for many targets at once: (atom numbers int64 [t, k], coefficients float32 [t, k]).

    In each step a target takes the unused atom with the largest |residual . atom| (atoms are not normalised), and its
    residual is what lies outside the span of all that it took. Atoms are made orthogonal twice each, which keeps them so to
    rounding (Giraud et al. 2005); the peer does it once, and anew every 256 steps. A target that is reproduced, or an atom
    inside the span, gets coefficient 0 from there on: the peer would divide rounding by rounding.

    `k` in 1 .. number of atoms.
    """
    count, width = targets.shape
    chosen = torch.zeros(count, k, dtype=torch.int64)
    axes = targets.new_zeros(count, k, width)
    triangle = torch.eye(k).repeat(count, 1, 1)
    residual, size = targets.clone(), targets.norm(dim=1)
    live = size > 0
    for step in range(k):
        scores = (residual @ atoms.T).abs_()
        scores.scatter_(1, chosen[:, :step], -1.0)
        chosen[:, step] = pick = scores.argmax(1)
        rest = atoms[pick]
        whole = rest.norm(dim=1)
        before = axes[:, :step]
        for _ in range(2):
            overlap = torch.einsum("tja,ta->tj", before, rest)
            rest = rest - torch.einsum("tja,tj->ta", before, overlap)
            triangle[:, :step, step] += overlap
        length = rest.norm(dim=1)
        new = live & (length > DEPENDENT * whole)
        axis = torch.where(new[:, None], rest / length.clamp_min(1e-30)[:, None], 0.0)
        triangle[:, step, step] = torch.where(new, length, 1.0)
        axes[:, step] = axis
        residual = residual - (residual * axis).sum(1, keepdim=True) * axis
        live = live & (residual.norm(dim=1) > REPRODUCED * size)
    along = torch.einsum("tja,ta->tj", axes, targets)
    return chosen, torch.linalg.solve_triangular(triangle, along[:, :, None], upper=True)[:, :, 0]


def _combined(chosen: Tensor, coefficients: Tensor, model: Tensor) -> Tensor:
    return torch.einsum("tk,tkb->tb", coefficients, model[chosen])


def _in_batches(function: Callable[[Tensor], Tensor], targets: Tensor, batch: int, width: int) -> Tensor:
    if not len(targets):
        return targets.new_zeros(0, width)
    return torch.cat([function(part) for part in targets.split(batch if batch > 0 else len(targets))])


# ------------------------------------------------------------------------------------------------------- nearest neighbours


def interpolation(targets: Tensor, donor: Tensor, model: Tensor, k: int, *, scheme: Scheme = "distance_proportional",
                  cosine: bool = False, batch: int = 512) -> Tensor:
    """A combination of the k nearest anchors, by Euclidean distance, or by 1 - cosine.

        distance_proportional   1 / max(distance, 1e-6), or the cosine itself; divided by max(sum, 1e-6)
        barycentric             w of the smallest norm with P^T w closest to v, sum w = 1, as the least-squares solution of
                                [[P P^T, 1], [1^T, 0]] [w; l] = [P v; 1]
        least_squares           w of the smallest norm with the least ||P^T w - v||
    """
    def part_of(part: Tensor) -> Tensor:
        chosen, near = _nearest(part, donor, k, cosine)
        if scheme == "distance_proportional":
            raw = near if cosine else 1 / near.clamp_min(FLOOR)
            return _combined(chosen, raw / raw.sum(1, keepdim=True).clamp_min(FLOOR), model)
        points, wanted = donor[chosen].double(), part.double()[:, :, None]
        if scheme == "least_squares":
            weights = _solved(points.mT, wanted)
        else:
            square = torch.ones(len(part), k + 1, k + 1, dtype=torch.float64)
            square[:, :k, :k] = points @ points.mT
            square[:, k, k] = 0
            right = torch.cat([points @ wanted, torch.ones(len(part), 1, 1, dtype=torch.float64)], 1)
            weights = _solved(square, right)[:, :k]
        return _combined(chosen, weights[:, :, 0].float(), model)

    return _in_batches(part_of, targets, batch, model.shape[1])


def _nearest(targets: Tensor, donor: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """The k nearest anchors of each target, nearest first, and their distances, or cosines."""
    if cosine:
        norms = targets.norm(dim=1)[:, None] * donor.norm(dim=1)[None]
        found = (targets @ donor.T / norms.clamp_min(FLOOR)).topk(k, dim=1)
        return found.indices, found.values
    squares = donor.square().sum(1)[None] - 2 * (targets @ donor.T)
    chosen = squares.topk(k, dim=1, largest=False).indices
    return chosen, (donor[chosen] - targets[:, None]).norm(dim=2)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Least-squares solutions of the smallest norm, also for matrices without full rank."""
    return torch.linalg.lstsq(matrix, right, driver="gelsd").solution


def sparse_similarity(targets: Tensor, donor: Tensor, model: Tensor, *, batch: int = 512) -> Tensor:
    """Sparsemax of the cosines with all anchors as weights: they are >= 0, sum to 1, and most are 0 (FOCUS)."""
    def part_of(part: Tensor) -> Tensor:
        norms = part.norm(dim=1)[:, None] * donor.norm(dim=1)[None]
        return sparsemax(part @ donor.T / norms.clamp_min(FLOOR)) @ model

    return _in_batches(part_of, targets, batch, model.shape[1])


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the simplex closest to each row (Martins & Astudillo, arXiv 1602.02068, algorithm 1)."""
    ordered = scores.sort(dim=1, descending=True).values
    sums = ordered.cumsum(1)
    place = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype)
    support = (1 + place * ordered > sums).sum(1, keepdim=True)
    threshold = (sums.gather(1, support - 1) - 1) / support
    return (scores - threshold).clamp_min(0)


# ----------------------------------------------------------------------------------------------------- one map for all tokens


def landmark_pca(targets: Tensor, donor: Tensor, model: Tensor) -> Tensor:
    """The principal axes of both spaces, turned onto each other: (v - mean X) Va R Vb^T + mean Y, q = min(a, b) axes each.

    R turns the anchors' coordinates Xp = Xc Va closest to Yp = Yc Vb: R = U W^T of the SVD U S W^T of Xp^T Yp. The peer's
    PCA is a randomised one; this is exact.
    """
    x, y, middle, centre = _centred(donor, model)
    q = min(x.shape[1], y.shape[1])
    ours, theirs = _axes(x, q), _axes(y, q)
    u, _, wt = torch.linalg.svd((x @ ours).T @ (y @ theirs))
    return ((targets.double() - middle) @ ours @ (u @ wt) @ theirs.T + centre).float()


def procrustes(targets: Tensor, donor: Tensor, model: Tensor) -> Tensor:
    """The rotation (or, between unequal widths, partial isometry) and one scale that bring X closest to Y, both centred."""
    x, y, middle, centre = _centred(donor, model)
    u, s, wt = torch.linalg.svd(x.T @ y, full_matrices=False)
    turned = x @ (u @ wt)
    scale = s.sum() / turned.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return ((targets.double() - middle) @ (u @ wt) * scale + centre).float()


def ridge(targets: Tensor, donor: Tensor, model: Tensor) -> Tensor:
    """The linear map of least squared error from X to Y, both centred, with a penalty chosen by cross-validation."""
    x, y, middle, centre = _centred(donor, model)
    return ((targets.double() - middle) @ ridge_map(x, y) + centre).float()


def ridge_map(x: Tensor, y: Tensor) -> Tensor:
    """argmin ||x W - y||^2 + p ||W||^2, float64 [a, b]; p is the one of PENALTIES (times the largest eigenvalue of x^T x) with
    the least n ||x W - y||^2 / (n - degrees of freedom - 1)^2. x and y are centred, float64 [n, a] and [n, b]."""
    return _ridge_of(x.T @ x, x.T @ y, y.square().sum(), len(x))


def _ridge_of(gram: Tensor, cross: Tensor, total: Tensor, count: int) -> Tensor:
    """`ridge_map` from x^T x, x^T y, ||y||^2 and n."""
    values, axes = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    along = axes.T @ cross
    energy = along.square().sum(1)
    best, lowest = PENALTIES[-1], float("inf")
    for share in PENALTIES:
        damped = values + share * values[-1] + torch.finfo(torch.float64).tiny
        error = total - (energy * (2 / damped - values / damped.square())).sum()
        free = count - 1 - (values / damped).sum()
        score = float(error.clamp_min(0) / free.square()) if free > 0.5 else float("inf")
        if score < lowest:
            best, lowest = share, score
    damped = values + best * values[-1] + torch.finfo(torch.float64).tiny
    return axes @ (along / damped[:, None])


def sparse_token_basis(targets: Tensor, donor: Tensor, model: Tensor, k: int) -> Tensor:
    """A basis of min(a, b) vectors that both spaces share, each a combination of k anchors; coordinates carry over.

    The directions are the leading eigenvectors of the covariance of the narrower space's anchors (of the model's, where both
    are as wide); OMP writes each as k centred anchors, and the same coefficients of the anchors as they stand give the basis
    in either space. This is the peer's intention; its own code fails on every call.
    """
    x, y, middle, centre = _centred(donor, model)
    narrow = y if y.shape[1] <= x.shape[1] else x
    directions = _axes(narrow, narrow.shape[1]).T.float().contiguous()
    chosen, weights = pursuit(directions, narrow.float(), k)
    donor_basis = torch.einsum("dk,dka->da", weights, donor[chosen]).double()
    model_basis = torch.einsum("dk,dkb->db", weights, model[chosen]).double()
    coordinates = _solved(donor_basis.T, (targets.double() - middle).T).T
    return (coordinates @ model_basis + centre).float()


def _centred(donor: Tensor, model: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = donor.double(), model.double()
    return x - x.mean(0), y - y.mean(0), x.mean(0), y.mean(0)


def _axes(centred: Tensor, count: int) -> Tensor:
    """The leading eigenvectors of the covariance as columns, float64 [width, count]; of each, the largest entry is positive."""
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :count]
    return axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


# -------------------------------------------------------------------------------------------------------------------- pieces


def pooled(matrix: Tensor, pieces: Sequence[Sequence[int]], how: Pooling, *, head: bool) -> Tensor:
    """Rows made of the model's rows of a text's pieces; without pieces, zero.

    `weighted_mean` weighs the last piece of n with n and the first with 1 in an embedding, the other way round in a head;
    `first_last` takes the last piece's row there, and the first's here. What follows a token is read from its end; what
    predicts it, predicts its beginning. (The peer says so of both, and does the reverse in `weighted_mean`.)
    """
    weights = [_weights(len(parts), how, head) for parts in pieces]
    return _weighted(matrix, pieces, weights)


def _weights(count: int, how: Pooling, head: bool) -> list[float]:
    if how == "sum":
        return [1.0] * count
    if how == "mean":
        return [1.0 / max(count, 1)] * count
    if how == "first_last":
        taken = 0 if head else count - 1
        return [float(i == taken) for i in range(count)]
    total = count * (count + 1) / 2
    return [(count - i if head else i + 1) / total for i in range(count)]


def _weighted(matrix: Tensor, pieces: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Tensor:
    out = torch.zeros(len(pieces), matrix.shape[1])
    owner = torch.tensor([i for i, parts in enumerate(pieces) for _ in parts], dtype=torch.int64)
    if len(owner):
        rows = matrix[torch.tensor([p for parts in pieces for p in parts], dtype=torch.int64)].float()
        scale = torch.tensor([w for ws in weights for w in ws], dtype=torch.float32)
        out.index_add_(0, owner, rows * scale[:, None])
    return out


def composed(targets: Tensor | None, pieces: Sequence[Sequence[int]], donor: Tensor | None,
             anchor_pieces: Sequence[Sequence[int]], model: Tensor, matrix: Tensor) -> Tensor:
    """The mean of a token's pieces, and what shared tokens teach about how a token differs from it.

    Shared tokens are taken apart as if the model did not have them (`anchor_pieces`, each without the token itself), and a
    ridge regression learns row - mean of the pieces from [donor row, mean of the pieces, first piece, last piece]; what it
    says of the wanted tokens is added to the mean of theirs. Where it learns little, its penalty is high and the result is
    close to the mean of the pieces. Without donor rows it learns from the pieces alone. Anchors of fewer than two pieces
    teach nothing.

    Args:
        targets, donor: donor rows of the wanted tokens and of the anchors, or None for both.
        pieces, anchor_pieces: numbers of rows of `matrix`, the model's whole embedding.
        model: the model's rows of the anchors.
    """
    start = pooled(matrix, pieces, "mean", head=False)
    taught = [i for i, parts in enumerate(anchor_pieces) if len(parts) > 1]
    if len(taught) < 3:
        return start

    def known(numbers: list[int]) -> tuple[Tensor, Tensor]:
        rows, parts = torch.tensor(numbers), [anchor_pieces[i] for i in numbers]
        return (_features(None if donor is None else donor[rows], parts, matrix),
                model[rows].double() - pooled(matrix, parts, "mean", head=False).double())

    # A part at a time: all features in float64 would be several times both models' matrices.
    chunks = [taught[i:i + CHUNK] for i in range(0, len(taught), CHUNK)]
    means = [(x.sum(0), y.sum(0)) for x, y in map(known, chunks)]
    middle, centre = (torch.stack(sums).sum(0) / len(taught) for sums in zip(*means, strict=True))
    gram, cross = middle.new_zeros(len(middle), len(middle)), middle.new_zeros(len(middle), len(centre))
    total = middle.new_zeros(())
    for x, y in map(known, chunks):
        x, y = x - middle, y - centre
        gram, cross, total = gram.addmm_(x.T, x), cross.addmm_(x.T, y), total + y.square().sum()
    spread = (gram.diagonal() / len(taught)).sqrt().clamp_min(1e-12)
    learnt = _ridge_of(gram / spread / spread[:, None], cross / spread[:, None], total, len(taught))
    for first in range(0, len(pieces), CHUNK):
        part = slice(first, first + CHUNK)
        wanted = _features(None if targets is None else targets[part], pieces[part], matrix)
        start[part] = ((wanted - middle) / spread @ learnt + centre + start[part].double()).float()
    return start


def _features(donor: Tensor | None, pieces: Sequence[Sequence[int]], matrix: Tensor) -> Tensor:
    parts = [pooled(matrix, pieces, "mean", head=False), pooled(matrix, pieces, "first_last", head=True),
             pooled(matrix, pieces, "first_last", head=False)]
    return torch.cat([*([donor] if donor is not None else []), *parts], 1).double()


# --------------------------------------------------------------------------------------------------- without looking at tokens


def mean_row(matrix: Tensor, count: int) -> Tensor:
    """The mean of the model's rows, for each of `count` tokens."""
    return _mean(matrix).float().expand(count, -1).clone()


def _mean(matrix: Tensor) -> Tensor:
    """float64 [b], a part of the rows at a time: a vocabulary in float64 can be larger than the memory."""
    return torch.stack([part.double().sum(0) for part in matrix.split(CHUNK)]).sum(0) / len(matrix)


def random_around(matrix: Tensor, normal: Tensor) -> tuple[Tensor, bool]:
    """N(mean, covariance) of the model's rows, made of `normal` [t, b], independent N(0, 1); and whether it could be.

    The covariance has divisor n. Where it is not positive definite in float32 (fewer rows than columns, or a column that is
    the sum of others) the result is 0.02 N(0, 1): the peer's intention, whose code fails there.
    """
    middle = _mean(matrix).float()
    scatter = torch.zeros(matrix.shape[1], matrix.shape[1])
    for part in matrix.split(CHUNK):
        centred = part.float() - middle
        scatter += centred.T @ centred
    factor, failed = torch.linalg.cholesky_ex(scatter / len(matrix))
    if int(failed) or len(matrix) <= matrix.shape[1]:
        return FALLBACK_SPREAD * normal, False
    return middle + normal @ factor.T, True
