"""Axes, tree and map against cases that can be worked out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster

from anabranch.conflict import centred_gram, principal_axes, raw_gradient_axes
from anabranch.diagnose.gradient_map import (
    chord,
    dendrogram,
    nearest_groups,
    no_direction,
    perplexity_for,
    project_products,
    project_rows,
    silhouette,
    together_and_apart,
    tsne,
)
from anabranch.rows import generator


def gradients(count: int = 24, groups: int = 3, noise: float = 0.3) -> tuple[np.ndarray, list[int]]:
    draw = generator(0, "map", count, groups)
    centres, labels = np.eye(groups, 40), [i % groups for i in range(count)]
    return centres[labels] + noise * draw.normal(size=(count, 40)) / np.sqrt(40), labels


def cosines(g: np.ndarray) -> np.ndarray:
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    return unit @ unit.T


def test_a_unit_s_own_row_lands_on_its_own_score():
    g, _ = gradients()
    matrix = cosines(g)
    scores, _ = principal_axes(matrix, 2)
    np.testing.assert_allclose(project_rows(matrix, scores, matrix), scores, atol=1e-9)
    gram = g @ g.T
    raw, _ = raw_gradient_axes(gram, 2)
    np.testing.assert_allclose(project_products(gram, raw, gram), raw, atol=1e-9)


def test_further_points_lie_where_pca_of_everything_but_them_puts_them():
    g, _ = gradients()
    further = generator(1, "further").normal(size=(3, 40))
    gram = g @ g.T
    scores, _ = raw_gradient_axes(gram, 2)
    _, _, axes = np.linalg.svd(g - g.mean(0), full_matrices=False)
    wanted = (further - g.mean(0)) @ axes[:2].T
    wanted *= np.sign(((g - g.mean(0)) @ axes[:2].T * scores).sum(0))
    np.testing.assert_allclose(project_products(gram, scores, further @ g.T), wanted, atol=1e-8)


def test_the_centroid_s_row_is_the_origin_and_an_empty_axis_is_zero():
    g, _ = gradients()
    matrix = cosines(g)
    scores, _ = principal_axes(matrix, 2)
    np.testing.assert_allclose(project_rows(matrix, scores, matrix.mean(0, keepdims=True)), 0, atol=1e-9)
    assert centred_gram(g @ g.T).shape == (24, 24)
    assert not project_rows(np.ones((4, 4)), np.zeros((4, 2)), np.ones((1, 4))).any()


def test_small_cosines_lie_by_the_mark_and_their_group_is_told_by_the_cosines():
    """Half of the units are of one group; models of cosine 0.05 with their own group's units and 0 with the others'."""
    g, _ = gradients()
    labels = [0, 1, 0, 2] * 6
    matrix = cosines(np.eye(3, 40)[labels] + g * 0.3)
    scores, _ = principal_axes(matrix, 2)
    mark, spread = no_direction(matrix, scores), np.sqrt((scores**2).sum(1).mean())
    _, _, axes = np.linalg.svd(matrix - matrix.mean(0))
    np.testing.assert_allclose(np.abs(mark), np.abs(matrix.mean(0) @ axes[:2].T), atol=1e-9)
    assert np.linalg.norm(mark) > 0.3 * spread  # and not at the units' centre
    rows = np.array([[0.05 * (group == k) for group in labels] for k in range(3)])
    places = project_rows(matrix, scores, rows)
    assert np.linalg.norm(places - mark, axis=1).max() < 0.1 * spread  # whatever they learned
    centres = np.array([scores[[group == k for group in labels]].mean(0) for k in range(3)])
    assert [int(np.argmax(centres @ place)) for place in places] != [0, 1, 2]  # by its place the first is another group's
    assert nearest_groups(rows, labels) == [0, 1, 2]


def test_the_nearest_group_by_hand():
    rows = [[0.0, 0.1, 0.04], [-0.3, 0.0, -0.2], [0.0, 0.0, 0.0]]  # means 0.05 and 0.04; -0.15 and -0.2; a model at rest
    assert nearest_groups(rows, [0, 0, 7]) == [0, 0, None]
    assert nearest_groups([[0.0, 0.1, 0.06]], [0, 0, 7]) == [7]
    assert nearest_groups(rows, [1, 1, 1]) == nearest_groups(rows, [None] * 3) == [None] * 3
    assert nearest_groups(np.zeros((0, 3)), [0, 1, 1]) == []


def test_the_tree_s_top_branches_are_the_planted_groups():
    g, labels = gradients()
    tree = dendrogram(cosines(g))
    cut = fcluster(np.array(tree.linkage, dtype=float), 3, "maxclust")
    assert len({(a, b) for a, b in zip(cut, labels, strict=True)}) == 3
    assert tree.cophenetic > 0.9 and len(tree.linkage) == 23 and tree.linkage[-1][3] == 24


def test_the_tree_by_hand():
    matrix = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, 0.2], [0.0, 0.2, 1.0]])
    tree = dendrogram(matrix)
    assert tree.linkage == [(0, 1, pytest.approx(0.2), 2), (2, 3, pytest.approx(0.9), 3)]  # (1.0 + 0.8) / 2
    assert tree.cophenetic == pytest.approx(np.corrcoef([0.2, 1.0, 0.8], [0.2, 0.9, 0.9])[0, 1])
    assert dendrogram(np.eye(3)).cophenetic == 1 and dendrogram(np.eye(2)).cophenetic == 1


def test_silhouette_tells_clusters_from_slices():
    g, labels = gradients()
    matrix = cosines(g)
    assert silhouette(matrix, labels) > 0.6
    assert silhouette(matrix, [i // 8 for i in range(24)]) < 0.05
    by_hand = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.3], [0.1, 0.3, 1.0]])
    # a = 0.1 for both of the pair, b = 0.9 and 0.7; a unit alone in its group counts 0
    assert silhouette(by_hand, [0, 0, 1]) == pytest.approx((0.8 / 0.9 + 0.6 / 0.7 + 0) / 3)


@pytest.mark.parametrize("groups", [[0, 0, 0], [None, None, None], [0, 1, 2], [0, None, 1]])
def test_no_silhouette_without_groups_to_compare(groups):
    assert silhouette(np.eye(3), groups) is None


def test_neighbours_stay_neighbours_and_the_map_is_the_same_again():
    g, labels = gradients(30)
    matrix = cosines(g)
    scores, _ = principal_axes(matrix, 2)
    found = tsne(matrix, scores)
    distance = np.linalg.norm(found[:, None] - found[None], axis=2) + np.diag([np.inf] * 30)
    assert [labels[i] for i in distance.argmin(1)] == labels
    assert tsne(matrix, scores).tobytes() == found.tobytes()


def test_no_map_of_a_few_points():
    assert tsne(np.eye(7), np.arange(14.0).reshape(7, 2)) is None
    assert tsne(np.eye(9), np.zeros((9, 2))) is None
    assert perplexity_for(500) == 30 and perplexity_for(8) < 7


def test_chord_is_the_distance_of_unit_vectors():
    g, _ = gradients()
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    np.testing.assert_allclose(chord(cosines(g)), np.linalg.norm(unit[:, None] - unit[None], axis=2), atol=1e-7)


def test_together_and_apart():
    matrix = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, 0.2], [0.0, 0.2, 1.0]])
    assert together_and_apart(matrix, ["a", "a", "b"]) == pytest.approx((0.8, 0.1))
    assert together_and_apart(matrix, ["a", "a", "a"]) is None and together_and_apart(matrix, ["a", "b", "c"]) is None
