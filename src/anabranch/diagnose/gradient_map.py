"""Where units, branches and the merged model lie by their gradients. Pure.

    T   units      E   further points (branches, merged model)      C   similarity of the units, [T, T], unit diagonal
    x   a further point's row: its similarity with every unit, [T], on the scale of a row of C

A branch stands here by its task vector reversed in sign, theta_0 - theta_k: under gradient descent that is a sum of
gradients, so its cosine with a unit's gradient means what the cosine of two units means. Adam's normalisation and many
steps turn it away from the gradients at the base, so these cosines are smaller than those among units. A row of
small cosines is mostly minus the column means, so its place on the map is near `no_direction`'s and not at the origin:
which units a model went with is told by its cosines (`nearest_groups`), not by its place.

Source: MERIT, arXiv:2606.01717, gradient map (t-SNE and PCA of unit gradients). Where we differ: PCA is the conflict
stage's own, further points are projected on its axes afterwards; the dendrogram is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import squareform
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

Floats = NDArray[np.float64]
FEWEST_FOR_TSNE = 8  # neighbourhoods of fewer points are all of them
EXACT_UP_TO = 2000  # points; beyond, t-SNE takes Barnes and Hut's approximation


class Tree(NamedTuple):
    """`linkage` as scipy writes it: (cluster, cluster, distance, units); `cophenetic` in [-1, 1]."""

    linkage: list[tuple[int, int, float, int]]
    cophenetic: float


def project_rows(matrix: ArrayLike, scores: ArrayLike, rows: ArrayLike) -> Floats:
    """Further rows of C on the axes of its column-centred PCA, float64 [E, r].

    With C - mean = U S V^T the units' scores are Z = U S, so V = (C - mean)^T Z / S^2, and a row's place is
    (x - mean) V, mean being the column means over the units alone: a unit's own row lands on its own score.

    Args:
        matrix: [T, T]. scores: [T, r], Z. rows: [E, T].
    """
    values, z, x = (np.asarray(v, dtype=np.float64) for v in (matrix, scores, rows))
    mean = values.mean(axis=0)
    return (x - mean) @ (values - mean).T @ z / _squares(z)


def project_products(gram: ArrayLike, scores: ArrayLike, rows: ArrayLike) -> Floats:
    """Further points on the axes of raw-gradient PCA, from their inner products with the units, float64 [E, r].

    The Gram matrix is centred on both sides, so a further point is too: <x - gbar, g_j - gbar>.

    Args:
        gram: [T, T] inner products. scores: [T, r]. rows: [E, T] inner products of the points with the units.
    """
    values, z, x = (np.asarray(v, dtype=np.float64) for v in (gram, scores, rows))
    centred = x - x.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
    return centred @ z / _squares(z)


def no_direction(matrix: ArrayLike, scores: ArrayLike) -> Floats:
    """Where `project_rows` puts a point that has cosine 0 with every unit, float64 [r]: -mean V, seldom the origin."""
    values = np.asarray(matrix, dtype=np.float64)
    found: Floats = project_rows(values, scores, np.zeros((1, len(values))))[0]
    return found


def nearest_groups(rows: ArrayLike, groups: Sequence[int | None]) -> list[int | None]:
    """For every further point the group with whose units it has the largest mean cosine, [E].

    None where that is not one group: without two groups, or with equal means (a model that did not move).

    Args:
        rows: [E, T] cosines with the units. groups: [T].
    """
    values, there = np.asarray(rows, dtype=np.float64), sorted({g for g in groups if g is not None})
    if len(there) < 2:
        return [None] * len(values)
    means = np.stack([values[:, [x == g for x in groups]].mean(axis=1) for g in there], axis=1)
    best = means.max(axis=1, keepdims=True)
    return [there[int(np.argmax(row))] if alone else None
            for row, alone in zip(means, (means == best).sum(axis=1) == 1, strict=True)]


def _squares(scores: Floats) -> Floats:
    """S^2 per axis; 1 where an axis holds nothing, so that everything lies at 0 there."""
    squares = (scores**2).sum(axis=0)
    return np.where(squares > 0, squares, 1.0)


def chord(similarity: ArrayLike) -> Floats:
    """Euclidean distance of unit vectors with these cosines, sqrt(2 (1 - c)), symmetric with a zero diagonal."""
    values = np.asarray(similarity, dtype=np.float64)
    distance = np.sqrt(np.clip(2 - (values + values.T), 0.0, None))
    np.fill_diagonal(distance, 0.0)
    return distance


def perplexity_for(points: int) -> float:
    """30, t-SNE's usual one, or a third of the other points where that is less."""
    return float(min(30.0, max(2.0, (points - 1) / 3)))


def tsne(similarity: ArrayLike, start: ArrayLike) -> Floats | None:
    """t-SNE in two dimensions of points with these cosines, float64 [n, 2]; None for fewer than 8 points.

    The distance is that of the normalised gradients (`chord`), which t-SNE squares. It starts from `start` scaled as
    scikit-learn scales its PCA start, and draws nothing: the same input gives the same map, on one thread and one kind of
    processor (t-SNE blows up differences in the last digit).

    Args:
        similarity: [n, n]. start: [n, 2], the PCA map.
    """
    from threadpoolctl import threadpool_limits

    values, begin = np.asarray(similarity, dtype=np.float64), np.asarray(start, dtype=np.float64)
    spread = float(begin[:, 0].std())
    if len(values) < FEWEST_FOR_TSNE or spread == 0:
        return None
    estimator = TSNE(2, perplexity=perplexity_for(len(values)), metric="precomputed", init=begin / spread * 1e-4,
                     random_state=0, method="exact" if len(values) <= EXACT_UP_TO else "barnes_hut", n_jobs=1)
    with threadpool_limits(limits=1):  # sums per thread would make the result depend on the machine
        found = estimator.fit_transform(chord(values))
    return np.asarray(found, dtype=np.float64)


def dendrogram(similarity: ArrayLike) -> Tree:
    """Average linkage (UPGMA) on 1 - cosine of T >= 2 units.

    `cophenetic` is the correlation of the heights at which units join with their 1 - cosine: near 1 the tree tells the
    truth about the matrix. 1 where all distances are the same (nothing to be wrong about).
    """
    values = np.asarray(similarity, dtype=np.float64)
    distance = np.clip(1 - (values + values.T) / 2, 0.0, None)
    np.fill_diagonal(distance, 0.0)
    flat = squareform(distance, checks=False)
    joined = linkage(flat, "average")
    heights = cophenet(joined)
    flat_tree = min(float(np.ptp(flat)), float(np.ptp(heights))) <= 1e-12
    fit = float(np.ptp(flat) <= 1e-12) if flat_tree else float(np.corrcoef(flat, heights)[0, 1])
    return Tree([(int(a), int(b), float(h), int(n)) for a, b, h, n in joined], fit)


def silhouette(similarity: ArrayLike, groups: Sequence[int | None]) -> float | None:
    """Mean silhouette of the groups on 1 - cosine, in [-1, 1]: near 0 they are no clusters.

    None where a unit has no group (a soup), for one group, and where every unit is a group of its own.
    """
    labels = [g for g in groups if g is not None]
    if len(labels) < len(groups) or not 2 <= len(set(labels)) < len(labels):
        return None
    values = np.asarray(similarity, dtype=np.float64)
    distance = np.clip(1 - (values + values.T) / 2, 0.0, None)
    np.fill_diagonal(distance, 0.0)
    return float(silhouette_score(distance, labels, metric="precomputed"))


def together_and_apart(similarity: ArrayLike, labels: Sequence[object]) -> tuple[float, float] | None:
    """Mean similarity of pairs with the same label, and of pairs with different ones; None where either has no pair."""
    values = np.asarray(similarity, dtype=np.float64)
    same = np.array([[a == b for b in labels] for a in labels])
    upper = np.triu(np.ones_like(same), 1)
    if not (same & upper).any() or not (~same & upper).any():
        return None
    return float(values[same & upper].mean()), float(values[~same & upper].mean())
