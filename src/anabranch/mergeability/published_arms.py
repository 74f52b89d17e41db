"""What the paper sets beside its rule: squared error, a small network, greedy selections; and the lasso, which it does not.

Shapes as in published.py: n pairs, m metrics, K methods, F folds, S seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lasso_path

from anabranch.mergeability.published import EPS, V1, Descent, Folds, Moments, Study, descend, starts, training_r
from anabranch.rows import generator

# Of training r. Forward selection goes on while a metric brings as much, backward elimination while one can be spared for as
# little. The forward runs are said to stop at 0.01, but then choose 6 or 7 metrics; at 0.001 they choose 11, as published.
LEAST_GAIN = MOST_COST = 0.001
HIDDEN, DROPOUT, DECAY, NETWORK_RATE, EPOCHS, LEAK = 8, 0.4, 1e-3, 1e-3, 300, 0.01
PENALTIES = np.geomspace(1.0, 1e-3, 16)  # of the lasso, as shares of the smallest that leaves no metric


# ---- squared error ---------------------------------------------------------------------------------------------------


def squared_error(s: Study, folds: Folds, found: Moments, seeds: Sequence[int], how: Descent = V1) -> np.ndarray:
    """The paper's arm "MSE", [F, K, S, m]: no intercept, w divided by its sum before every step, stopped by the error on the
    held-out rows. The last two are what makes it fail: least squares itself is as good as the paper's rule."""
    def quadratic(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        share = rows / rows.sum(1, keepdims=True)
        x = found.inputs * share[:, :, None]
        return x.transpose(0, 2, 1) @ found.inputs, s.y.T @ x, share @ s.y**2

    start = starts(s, len(folds.names), seeds, how.spread)
    f, k, n, m = start.shape
    (gram, cross, _), (gram_held, cross_held, level) = quadratic(folds.train), quadratic(folds.held)
    cross, cross_held, level = (np.repeat(v, n, axis=1) for v in (cross, cross_held, level))
    w, result = start.reshape(f, k * n, m), np.zeros((f, k * n, m))
    mean, square = np.zeros_like(w), np.zeros_like(w)
    best, since, live = np.full((f, k * n), np.inf), np.zeros((f, k * n), int), np.ones((f, k * n), bool)
    for t in range(1, how.most + 1):
        w = w / (w.sum(-1, keepdims=True) + EPS)
        error = ((w @ gram_held) * w - 2 * w * cross_held).sum(-1) + level
        better = error < best - how.tolerance
        best, since = np.where(better, error, best), np.where(better, 0, since + 1)
        ended = live & ((since >= how.patience) | (t == how.most))
        result[ended] = w[ended]
        live &= ~ended
        if not live.any():
            break
        slope = 2 * (w @ gram - cross)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        w = w - how.rate * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + EPS)
    return result.reshape(f, k, n, m)


# ---- selections ------------------------------------------------------------------------------------------------------


def select(s: Study, folds: Folds, found: Moments, seeds: Sequence[int], *, forward: bool, how: Descent = V1,
           tell: Callable[[str], None] = lambda _: None) -> np.ndarray:
    """Greedy selection by training r, each candidate refitted from a new draw; the chosen set is fitted once more.

    Forward: add the metric that brings most until it brings less than LEAST_GAIN. Backward: drop the metric that costs least
    until every one costs more than MOST_COST. In float32: a thousand descents at once, and half the time.

    Returns:
        w [F, K, S, m], 0 for what was not chosen.
    """
    gram, cross = found.gram.astype(np.float32), found.cross.astype(np.float32)
    name = "forward" if forward else "backward"
    chosen = []
    for seed in seeds:
        tell(f"{name} selection, seed {seed}")
        chosen.append(_select(found, gram, cross, (seed, "published selection", name), forward, how))
    return np.stack(chosen, axis=2)


def _select(found: Moments, gram: np.ndarray, cross: np.ndarray, names: tuple[int, str, str], forward: bool,
            how: Descent) -> np.ndarray:
    """For one seed, w [F, K, m]."""
    f, k, m = cross.shape

    def fitted(sets: np.ndarray, stage: int | str) -> tuple[np.ndarray, np.ndarray]:
        """w [F, K, C, m] and training r [F, K, C] of candidate sets [F, K, C, m]."""
        c = sets.shape[2]
        start = how.spread * generator(*names, stage).normal(size=(f, k * c, m)).astype(np.float32)
        w = descend(gram, np.repeat(cross, c, axis=1), start, how, sets.reshape(f, k * c, m))[0].astype(np.float64)
        r = training_r(replace(found, cross=np.repeat(found.cross, c, axis=1)), w)
        return w.reshape(sets.shape), r.reshape(sets.shape[:-1])

    chosen = np.full((f, k, m), not forward)
    reached = np.zeros((f, k)) if forward else fitted(chosen[:, :, None], "all")[1][..., 0]
    growing = np.ones((f, k), bool)
    for step in range(m if forward else m - 1):
        candidates = chosen[:, :, None] ^ np.eye(m, dtype=bool)  # every one metric turned over
        r = np.where(chosen ^ (not forward), -np.inf, fitted(candidates, step)[1])
        pick = r.argmax(-1)
        top = np.take_along_axis(r, pick[..., None], -1)[..., 0]
        growing &= (top - reached >= LEAST_GAIN) if forward else (reached - top <= MOST_COST)
        if not growing.any():
            break
        chosen = np.where(growing[..., None], chosen ^ (np.arange(m) == pick[..., None]), chosen)
        reached = np.where(growing, top, reached)
    return fitted(chosen[:, :, None], "chosen")[0][:, :, 0]


# ---- the lasso -------------------------------------------------------------------------------------------------------


def lasso(s: Study, folds: Folds, found: Moments) -> np.ndarray:
    """The well-posed relative of the rule, [F, K, 1, m]: least squares + |w|_1, with an intercept.

    The penalty is chosen by squared error on tasks held out of the training rows, one after the other; the fold's own
    held-out rows are not looked at.
    """
    w = np.zeros((len(folds.names), len(s.methods), 1, len(s.metrics)))
    for f, learnt in enumerate(folds.train):
        x, first, second = found.inputs[f][learnt], s.first[learnt], s.second[learnt]
        inner = [~((first == t) | (second == t)) for t in np.union1d(first, second)]
        inner = [rows for rows in inner if rows.sum() > 1]
        for k in range(len(s.methods)):
            y = s.y[learnt, k]
            error = sum(((y[~rows, None] - _path(x[rows], y[rows], x[~rows])) ** 2).sum(0) for rows in inner)
            w[f, k, 0] = _coefficients(x, y)[0][:, int(np.argmin(error))]
    return w


def _coefficients(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients [m, penalties] on centred data, and the means."""
    mean, level = x.mean(0), y.mean()
    x, y = x - mean, y - level
    largest = max(float(np.abs(x.T @ y).max()) / len(y), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # collinear metrics: the path is off by less than folds differ
        _, coefficients, _ = lasso_path(x, y, alphas=PENALTIES * largest, precompute=True, max_iter=500, tol=1e-3)
    return coefficients, mean, level


def _path(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Predictions [rows, penalties] for other rows."""
    coefficients, mean, level = _coefficients(x, y)
    return (new - mean) @ coefficients + level


# ---- the network -----------------------------------------------------------------------------------------------------


def network(s: Study, folds: Folds, found: Moments, seeds: Sequence[int]) -> np.ndarray:
    """The paper's MLP: m -> 8 -> 1, targets scaled to [-1, 1]; scores of all rows, [F, K, S, n].

    As published, the epoch is the one with the least error on the held-out rows: what it scores there is not honest.
    """
    f, k, n, m = len(folds.names), len(s.methods), len(seeds), len(s.metrics)
    low, width = ranges_of_targets(s, folds)
    y = np.repeat(((2 * (s.y - low[:, None]) / width[:, None]) - 1).transpose(0, 2, 1), n, axis=1)[:, :, :, None]
    x, nets = found.inputs, k * n
    stream = generator(seeds[0], "published network", len(seeds))
    bound, bound2 = m**-0.5, HIDDEN**-0.5
    weights = [stream.uniform(-bound, bound, (f, nets, m, HIDDEN)), stream.uniform(-bound, bound, (f, nets, 1, HIDDEN)),
               stream.uniform(-bound2, bound2, (f, nets, HIDDEN, 1)), stream.uniform(-bound2, bound2, (f, nets, 1, 1))]
    moving = [(np.zeros_like(v), np.zeros_like(v)) for v in weights]
    rows, x = folds.train[:, None, :, None] / folds.train.sum(1)[:, None, None, None], x[:, None]
    held = folds.held[:, None, :, None] / folds.held.sum(1)[:, None, None, None]
    best, result = np.full((f, nets), np.inf), np.zeros((f, nets, len(s.y)))
    for epoch in range(1, EPOCHS + 1):
        before = x @ weights[0] + weights[1]
        kept = (stream.random(before.shape, dtype=np.float32) >= DROPOUT) / (1 - DROPOUT)
        slope = np.where(before > 0, 1.0, LEAK) * kept
        after = before * slope
        error = 2 * rows * (after @ weights[2] + weights[3] - y)
        back = (error @ weights[2].transpose(0, 1, 3, 2)) * slope
        slopes = [x.transpose(0, 1, 3, 2) @ back, back.sum(2, keepdims=True), after.transpose(0, 1, 3, 2) @ error,
                  error.sum(2, keepdims=True)]
        for i, g in enumerate(slopes):
            mean, square = moving[i]
            g = g + DECAY * weights[i]
            moving[i] = mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
            weights[i] = weights[i] - NETWORK_RATE * (mean / (1 - 0.9**epoch)) / (np.sqrt(square / (1 - 0.999**epoch)) + EPS)
        before = x @ weights[0] + weights[1]
        score = np.where(before > 0, before, LEAK * before) @ weights[2] + weights[3]
        loss = (held * (score - y) ** 2).sum((2, 3))
        result = np.where((loss < best)[..., None], score[..., 0], result)
        best = np.minimum(best, loss)
    return result.reshape(f, k, n, -1)


def ranges_of_targets(s: Study, folds: Folds) -> tuple[np.ndarray, np.ndarray]:
    """Minima and ranges of the targets over training rows, [F, K]."""
    low = np.where(folds.train[:, :, None], s.y, np.inf).min(1)
    width = np.where(folds.train[:, :, None], s.y, -np.inf).max(1) - low
    return low, np.where(width > 0, width, 1.0)
