"""How rows of new tokens are made, held to slow implementations in numpy that share no code with ours."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from anabranch.transplant import approximations as ways
from anabranch.transplant.trained import badly_trained, is_reserved

T, N, A, B = 7, 40, 9, 6


@pytest.fixture(scope="module")
def spaces():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((N, A)) + 0.7
    y = x @ rng.standard_normal((A, B)) * 0.3 + 0.2 * rng.standard_normal((N, B)) - 1
    return rng.standard_normal((T, A)) + 0.5, x, y


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float32) for a in arrays]


def close(found, wanted, tolerance=2e-5):
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ orthogonal matching pursuit


def slow_pursuit(target, atoms, k):
    """Textbook: a least-squares solution of all chosen atoms in every step."""
    chosen, weights, residual = [], np.zeros(0), target.copy()
    for _ in range(k):
        free = [j for j in range(len(atoms)) if j not in chosen]
        chosen.append(max(free, key=lambda j: abs(residual @ atoms[j])))
        weights = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        residual = target - atoms[chosen].T @ weights
    return chosen, weights


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("batch", [0, 2, 512])
def test_omp_is_the_textbook_algorithm(spaces, k, batch):
    v, x, y = spaces
    wanted = []
    for target in v:
        chosen, weights = slow_pursuit(target, x, k)
        wanted.append(weights @ y[chosen])
    close(ways.omp(*tensors(v, x, y), k, batch=batch), wanted, 1e-4)


def test_omp_with_k_of_the_rank_reproduces_targets_in_the_span():
    """C77."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 4)) @ rng.standard_normal((4, A))
    y = x @ rng.standard_normal((A, B))
    targets = rng.standard_normal((5, 30)) @ x
    # the map is linear on the span, so that the right row is known
    wanted = targets @ np.linalg.lstsq(x, y, rcond=None)[0]
    for k in (4, 9):  # more atoms than dimensions: the further ones add nothing, and nothing blows up
        close(ways.omp(*tensors(targets, x, y), k), wanted, 1e-3)


def test_omp_stops_where_a_target_is_reproduced_and_keeps_axes_orthogonal():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(30, 20, generator=generator)
    _, weights = ways.pursuit(3 * atoms[:1] + 100 * atoms[1:2], atoms, 12)
    assert int((weights != 0).sum()) < 12  # rounding is not pursued
    alike = torch.randn(1, 64, generator=generator) + 1e-3 * torch.randn(100, 64, generator=generator)
    targets = torch.randn(5, 64, generator=generator)
    chosen, weights = ways.pursuit(targets, alike, 40)
    for target, which, found in zip(targets.double(), chosen, weights.double(), strict=True):
        span = alike[which].double().T
        best = torch.linalg.lstsq(span, target[:, None], driver="gelsd").solution[:, 0]
        assert (span @ found - target).norm() <= (span @ best - target).norm() + 1e-2 * target.norm()


def test_omp_of_an_anchor_and_of_zero():
    x = np.diag([3.0, 2.0, 1.0])
    chosen, weights = ways.pursuit(*tensors(np.array([[0, 2.0, 0], [0, 0, 0]]), x), 3)
    assert chosen[0, 0] == 1
    assert torch.equal(weights, torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    assert sorted(chosen[0].tolist()) == [0, 1, 2]  # none twice


# ---------------------------------------------------------------------------------------------------------------- neighbours


def slow_interpolation(target, x, y, k, scheme, cosine):
    if cosine:
        likeness = np.array([target @ row / (np.linalg.norm(target) * np.linalg.norm(row)) for row in x])
        near = np.argsort(-likeness)[:k]
        raw = likeness[near]
    else:
        distance = np.array([np.sqrt(((target - row) ** 2).sum()) for row in x])
        near = np.argsort(distance)[:k]
        raw = 1 / np.maximum(distance[near], 1e-6)
    p = x[near]
    if scheme == "distance_proportional":
        weights = raw / max(raw.sum(), 1e-6)
    elif scheme == "least_squares":
        weights = np.linalg.pinv(p.T) @ target
    else:
        square = np.block([[p @ p.T, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
        weights = (np.linalg.pinv(square) @ np.append(p @ target, 1))[:k]
    return weights @ y[near]


@pytest.mark.parametrize("scheme", ["distance_proportional", "barycentric", "least_squares"])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_interpolation(spaces, scheme, cosine, k):
    v, x, y = spaces
    wanted = [slow_interpolation(t, x, y, k, scheme, cosine) for t in v]
    close(ways.interpolation(*tensors(v, x, y), k, scheme=scheme, cosine=cosine, batch=3), wanted, 3e-4)


def test_barycentric_weights_sum_to_one(spaces):
    v, x, _ = spaces
    ones = np.ones((N, 2))
    close(ways.interpolation(*tensors(v, x, ones), 5, scheme="barycentric"), np.ones((T, 2)))


def test_sparsemax_is_the_nearest_point_of_the_simplex(spaces):
    v, x, y = spaces
    cosines = np.array([[t @ row / np.linalg.norm(t) / np.linalg.norm(row) for row in x] for t in v])
    wanted = []
    for row in cosines:
        low, high = row.min() - 1, row.max()
        for _ in range(200):  # bisection for the threshold at which what is above sums to one
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
        wanted.append(np.maximum(row - low, 0))
    assert (np.array(wanted) == 0).any()
    close(ways.sparsemax(torch.tensor(cosines, dtype=torch.float32)), wanted)
    close(ways.sparse_similarity(*tensors(v, x, y), batch=2), np.array(wanted) @ y, 1e-4)


# ------------------------------------------------------------------------------------------------------------------ one map


def test_procrustes_is_scipys(spaces):
    v, x, _ = spaces
    y = np.random.default_rng(1).standard_normal((N, A)) + x
    xc, yc = x - x.mean(0), y - y.mean(0)
    turn, total = scipy.linalg.orthogonal_procrustes(xc, yc)
    wanted = (v - x.mean(0)) @ turn * total / (xc**2).sum() + y.mean(0)
    close(ways.procrustes(*tensors(v, x, y)), wanted)


@pytest.mark.parametrize("widths", [(A, B), (B, A), (A, A)])
def test_landmark_pca_turns_principal_axes(widths):
    rng = np.random.default_rng(5)
    x, y = (rng.standard_normal((N, w)) * np.arange(1, w + 1) + 1 for w in widths)
    v, q = rng.standard_normal((T, widths[0])), min(widths)
    va, vb = (np.linalg.svd(m - m.mean(0))[2][:q].T for m in (x, y))
    turn, _ = scipy.linalg.orthogonal_procrustes((x - x.mean(0)) @ va, (y - y.mean(0)) @ vb)
    close(ways.landmark_pca(*tensors(v, x, y)), (v - x.mean(0)) @ va @ turn @ vb.T + y.mean(0), 1e-4)


def test_landmark_pca_undoes_a_rotation():
    rng = np.random.default_rng(6)
    x, v = rng.standard_normal((N, A)), rng.standard_normal((T, A))
    turn = np.linalg.qr(rng.standard_normal((A, A)))[0]
    close(ways.landmark_pca(*tensors(v, x, x @ turn + 2)), v @ turn + 2, 1e-4)
    close(ways.procrustes(*tensors(v, x, 3 * x @ turn + 2)), 3 * v @ turn + 2, 1e-4)


def slow_ridge(x, y):
    """Every penalty tried with an explicit hat matrix."""
    largest, best = np.linalg.eigvalsh(x.T @ x)[-1], None
    for step in range(-16, 3):
        inverse = np.linalg.inv(x.T @ x + 10 ** (step / 2) * largest * np.eye(x.shape[1]))
        hat, w = x @ inverse @ x.T, inverse @ x.T @ y
        score = len(x) * ((y - x @ w) ** 2).sum() / (len(x) - 1 - np.trace(hat)) ** 2
        if best is None or score < best[0]:
            best = score, w
    return best[1]


@pytest.mark.parametrize("noise", [0.0, 0.3, 30.0])
def test_ridge_chooses_its_penalty_by_cross_validation(spaces, noise):
    v, x, y = spaces
    y = y + noise * np.random.default_rng(2).standard_normal(y.shape)
    wanted = (v - x.mean(0)) @ slow_ridge(x - x.mean(0), y - y.mean(0)) + y.mean(0)
    close(ways.ridge(*tensors(v, x, y)), wanted, 1e-4)


def test_ridge_with_fewer_anchors_than_columns_is_finite():
    rng = np.random.default_rng(1)
    assert torch.isfinite(ways.ridge(*tensors(rng.standard_normal((T, A)), rng.standard_normal((4, A)),
                                              rng.standard_normal((4, B))))).all()


@pytest.mark.parametrize("widths", [(A, B), (B, A), (A, A)])
def test_sparse_token_basis(widths):
    """The peer's own fails on every call; this is what it set out to do."""
    rng = np.random.default_rng(8)
    x, y = (rng.standard_normal((N, w)) * np.arange(1, w + 1) + 1 for w in widths)
    v, k = rng.standard_normal((T, widths[0])), 4
    narrow = y if widths[1] <= widths[0] else x
    centred = narrow - narrow.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    basis = [slow_pursuit(vectors[:, i], centred, k) for i in np.argsort(-values)]
    donor_basis = np.array([w @ x[c] for c, w in basis])
    model_basis = np.array([w @ y[c] for c, w in basis])
    coordinates = np.linalg.lstsq(donor_basis.T, (v - x.mean(0)).T, rcond=None)[0].T
    close(ways.sparse_token_basis(*tensors(v, x, y), k), coordinates @ model_basis + y.mean(0), 1e-3)


# -------------------------------------------------------------------------------------------------------------------- pieces

MATRIX = np.arange(1, 13, dtype=np.float64).reshape(4, 3) ** 2


@pytest.mark.parametrize(("how", "head", "weights"), [
    ("mean", False, [1 / 3, 1 / 3, 1 / 3]), ("mean", True, [1 / 3, 1 / 3, 1 / 3]), ("sum", False, [1, 1, 1]),
    # as stated, not as the peer does it: the last piece weighs most in an embedding, the first in a head
    ("weighted_mean", False, [1 / 6, 2 / 6, 3 / 6]), ("weighted_mean", True, [3 / 6, 2 / 6, 1 / 6]),
    ("first_last", False, [0, 0, 1]), ("first_last", True, [1, 0, 0])])
def test_pooling(how, head, weights):
    found = ways.pooled(*tensors(MATRIX), [[2, 0, 3], [1], []], how, head=head)
    close(found, [np.array(weights) @ MATRIX[[2, 0, 3]], MATRIX[1], np.zeros(3)])


@pytest.mark.parametrize("chunk", [8192, 16])
def test_composed_learns_how_pieces_make_a_row(monkeypatch, chunk):
    """Rows that are a linear function of pieces and donor row are found exactly; anchors of one piece teach nothing."""
    monkeypatch.setattr(ways, "CHUNK", chunk)
    rng = np.random.default_rng(9)
    matrix = rng.standard_normal((30, B))
    pieces = [list(rng.integers(0, 30, rng.integers(2, 5))) for _ in range(80)]
    donor = rng.standard_normal((81, 3))
    features = np.array([np.concatenate([d, matrix[p].mean(0), matrix[p[0]], matrix[p[-1]]])
                         for d, p in zip(donor, pieces, strict=False)])
    rows = features @ rng.standard_normal((features.shape[1], B)) + 2
    known = slice(0, 70)
    middle, spread = features[known].mean(0), features[known].std(0)
    mean = np.array([matrix[p].mean(0) for p in pieces])
    rest = rows[:80] - mean
    learnt = slow_ridge((features[known] - middle) / spread, rest[known] - rest[known].mean(0))
    wanted = mean[70:] + (features[70:] - middle) / spread @ learnt + rest[known].mean(0)
    odd = [*pieces[known], [4]], np.vstack([rows[known], np.full(B, 1e6)])
    found = ways.composed(*tensors(donor[70:80]), pieces[70:], *tensors(np.vstack([donor[known], donor[80:]])), odd[0],
                          *tensors(odd[1], matrix))
    close(found, wanted, 1e-3)
    np.testing.assert_allclose(wanted, rows[70:], atol=1e-2)
    without = ways.composed(None, pieces[70:], None, pieces[known], *tensors(rows[known], matrix))
    assert np.abs(without.numpy() - rows[70:]).max() > 0.1  # it knows no donor rows
    few = ways.composed(None, [[1, 2]], None, [[3]], *tensors(rows[:1], matrix))
    close(few, [matrix[[1, 2]].mean(0)])  # nothing to learn from: the mean of the pieces


# ------------------------------------------------------------------------------------------------------------- without tokens


def test_rows_without_tokens():
    rng = np.random.default_rng(4)
    matrix, normal = rng.standard_normal((50, B)) * 3 + 1, rng.standard_normal((T, B))
    close(ways.mean_row(*tensors(matrix), 2), [matrix.mean(0)] * 2)
    found, whole = ways.random_around(*tensors(matrix, normal))
    assert whole
    close(found, matrix.mean(0) + normal @ np.linalg.cholesky(np.cov(matrix.T, bias=True)).T, 1e-4)


def test_john_hewitt_falls_back_where_the_covariance_is_not_positive_definite():
    """The peer fails there."""
    rng = np.random.default_rng(4)
    normal = rng.standard_normal((T, B))
    twin = rng.standard_normal((50, B))
    twin[:, 1] = twin[:, 0]
    for matrix in (rng.standard_normal((3, B)), twin):
        found, whole = ways.random_around(*tensors(matrix, normal))
        assert not whole
        close(found, 0.02 * normal)


# --------------------------------------------------------------------------------------------------------- badly trained tokens


def test_badly_trained_tokens():
    rng = np.random.default_rng(0)
    rows = 300
    embedding, head = (rng.standard_normal((rows, 16)).astype(np.float32) for _ in range(2))
    tokens, reserved = np.ones(rows, bool), np.zeros(rows, bool)
    tokens[290:] = False
    reserved[5] = True
    untrained = rng.standard_normal(16).astype(np.float32)
    embedding[290:], head[290:] = untrained, untrained + 1
    embedding[5], head[5] = untrained, untrained + 1
    embedding[7], head[7] = untrained * 1.01, untrained * 1.01 + 1  # like the unused in both
    embedding[9] *= 1e-4  # hardly moved
    bad_embedding, bad_head = badly_trained(torch.tensor(embedding), torch.tensor(head), tokens, reserved)
    assert {5, 7, 9, *range(290, 300)} <= set(np.flatnonzero(bad_embedding))
    assert {5, 7, *range(290, 300)} <= set(np.flatnonzero(bad_head))
    assert not bad_head[9]
    assert bad_embedding[:290].sum() <= 3 + 3 + 3  # the 1 % tails, and those planted

    tied, again = badly_trained(torch.tensor(embedding), None, tokens, reserved)
    assert (tied == again).all()
    assert not tied[9]  # a small norm says nothing where the matrix is the head as well
    assert tied[7]


def test_without_unused_rows_only_the_norm_tells():
    rng = np.random.default_rng(0)
    embedding = torch.tensor(rng.standard_normal((200, 8)), dtype=torch.float32)
    tokens, none = np.ones(200, bool), np.zeros(200, bool)
    assert not badly_trained(embedding, None, tokens, none)[0].any()
    assert badly_trained(embedding, embedding, tokens, none)[0].sum() == 2
    embedding[3] = 0
    assert badly_trained(embedding, None, tokens, none)[0][3]


def test_reserved_names():
    assert is_reserved(b"<|reserved_special_token_7|>")
    assert is_reserved(b"[unused_token3]")
    assert not is_reserved(b" reserved")
    assert not is_reserved(None)
