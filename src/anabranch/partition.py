"""Units -> K groups: MERIT's recursive halving and the baselines it is measured against.

    T   units        s_t   samples of unit t, W their sum        K   groups, any integer from 1 to T
    scores [T, R]    place of each unit on the conflict axes      cosine [T, T]

Source: MERIT, arXiv 2606.01717, step 3 and its baselines. Pure. Every method sees the units sorted by name and breaks
ties by name, so the order of the input changes nothing; chance comes from (seed, "partition", method) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anabranch.errors import PlanError, closest
from anabranch.rows import generator

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Units:
    """What a partitioner may look at, sorted by name; samples int64 [T] >= 1, scores [T, R], cosine [T, T]."""

    names: tuple[str, ...]
    samples: NDArray[np.int64]
    scores: Floats
    cosine: Floats

    def __len__(self) -> int:
        return len(self.names)


def partition(
    method: str,
    names: Sequence[str],
    samples: Sequence[int],
    scores: ArrayLike,
    cosine: ArrayLike,
    groups: int,
    seed: int,
) -> Groups:
    """The group of each unit, int64 [T] with values 0 .. K-1 (all -1 for `soup`), in the order of `names`.

    Args:
        method: a key of PARTITIONERS.
        names: T names, no two the same.
        samples: s_t >= 1, what a branch trains on.
        scores: [T, R] from `conflict`; R >= 1 unless T = 1.
        cosine: [T, T], plain or corrected.
        groups: K >= 1; `joint` makes one group and `soup` none, whatever K is.
        seed: for `random` and `kmeans`.
    Returns:
        groups that are never empty. |W_k - W/K| <= max_t s_t for `merit`, `random` and `stratified`.
    Raises:
        PlanError: every problem with the input in one message; K > T; too few distinct units for `kmeans`.
    """
    if method not in PARTITIONERS:
        raise PlanError(f"split.method: unknown method `{method}`.{closest(method, PARTITIONERS)}")
    score_table, cosines = np.asarray(scores, dtype=np.float64), np.asarray(cosine, dtype=np.float64)
    _check(method, names, samples, score_table, cosines, groups)
    order = sorted(range(len(names)), key=lambda i: names[i])
    units = Units(tuple(names[i] for i in order), np.array([samples[i] for i in order], dtype=np.int64),
                  score_table[order], cosines[np.ix_(order, order)])
    result = np.empty(len(names), dtype=np.int64)
    result[order] = PARTITIONERS[method](units, groups, seed)
    return result


def _check(method: str, names: Sequence[str], samples: Sequence[int], scores: Floats, cosine: Floats,
           groups: int) -> None:
    """Raises PlanError with all that is wrong."""
    count = len(names)
    problems = []
    if count == 0:
        problems.append("no units: wanted at least one")
    if len(set(names)) < count:
        problems.append("units of one name: " + ", ".join(sorted({n for n in names if list(names).count(n) > 1})))
    if len(samples) != count:
        problems.append(f"samples: {len(samples)} given for {count} units")
    bad = [f"{name} ({s})" for name, s in zip(names, samples, strict=False) if s < 1 or s != int(s)]
    if bad:
        problems.append(f"samples: wanted whole numbers >= 1, got {', '.join(bad)}")
    if scores.ndim != 2 or len(scores) != count or (scores.shape[1] == 0 and count > 1):
        problems.append(f"scores: got shape {scores.shape}, wanted ({count}, axes) with at least one axis")
    if cosine.shape != (count, count):
        problems.append(f"cosine: got shape {cosine.shape}, wanted ({count}, {count})")
    if not (np.isfinite(scores).all() and np.isfinite(cosine).all()):
        problems.append("scores or cosine hold numbers that are not finite: run the conflict stage again")
    if groups < 1:
        problems.append(f"split.groups: got {groups}, wanted >= 1")
    if groups > count and method not in ("joint", "soup"):
        problems.append(f"split.groups: got {groups} for {count} units; a unit is never cut in two, so lower "
                        f"`split.groups` to {count} or less, or cut the sources into more units (`unit_column`)")
    if problems:
        raise PlanError.of(f"no `{method}` partition can be made:", problems)


def merit(units: Units, groups: int, seed: int) -> Groups:
    """Recursive halving at the sample-weighted median of axis 1, then 2, .. (arXiv 2606.01717, step 3).

    Level l cuts along axis l (axes are used again from the first if there are more levels). K groups are cut into
    ceil(K/2) and floor(K/2), with samples in that proportion, so K = 2^r is the paper's method and any other K works:
    our extension, as are ties by unit name. Group numbers: the low end of an axis comes first. `seed` has no say.
    """
    axes = units.scores.shape[1]
    return _halve(units, groups, lambda level: units.scores[:, level % axes] if axes else np.zeros(len(units)))


def random(units: Units, groups: int, seed: int) -> Groups:
    """Groups by chance, balanced in samples by the same cuts along one shuffled order."""
    place = generator(seed, "partition", "random").permutation(len(units)).astype(np.float64)
    return _halve(units, groups, lambda level: place)


def _halve(units: Units, groups: int, key: Callable[[int], Floats]) -> Groups:
    """Cut in two along key(0), each part along key(1), .. until every part is one group.

    Balance |W_k - W/K| <= m, m = max_t s_t, for any keys. A part of k groups and weight P has the excess E = P - kW/K;
    say it is sound if |E| <= m. Both parts of a sound one are sound if the left one's excess lies in an interval of
    length 2m - |E| >= m; cuts are at most m apart, so one lies there and `_cut` takes such a cut. Only if that would
    leave a side with fewer units than groups is the cut forced: then one side consists of single units that are
    already heavier than their share, so W/K < m and they are within m; the other side is light, and stays light under
    proportional cuts, and a group cannot be lighter than 0, which is within W/K < m.
    """
    result = np.zeros(len(units), dtype=np.int64)
    total, heaviest = int(units.samples.sum()), int(units.samples.max())

    def divide(part: NDArray[np.int64], count: int, first: int, level: int) -> None:
        if count == 1:
            result[part] = first
            return
        part = part[np.argsort(key(level)[part], kind="stable")]  # part is in name order where keys tie
        left = (count + 1) // 2
        cut = _cut(units.samples[part], left, count, total, heaviest, groups)
        divide(np.sort(part[:cut]), left, first, level + 1)
        divide(np.sort(part[cut:]), count - left, first + left, level + 1)

    divide(np.arange(len(units)), groups, 0, 0)
    return result


def _cut(samples: NDArray[np.int64], left: int, count: int, total: int, heaviest: int, groups: int) -> int:
    """How many of the ordered units go to the first `left` of `count` groups.

    Nearest to their proportion of the part, the earlier on a tie; among cuts that leave each side at least one unit per
    group and, where there are such, both sides within `heaviest` of their share of the whole. Whole numbers throughout.
    """
    cuts = np.arange(left, len(samples) - (count - left) + 1)
    weight = np.cumsum(samples)[cuts - 1]
    part = int(samples.sum())
    excess_left = weight * groups - left * total
    excess_right = (part - weight) * groups - (count - left) * total
    sound = np.maximum(np.abs(excess_left), np.abs(excess_right)) <= heaviest * groups
    allowed = np.flatnonzero(sound) if sound.any() else np.arange(len(cuts))
    distance = np.abs(weight * count - part * left)
    return int(cuts[allowed[np.argmin(distance[allowed])]])


def stratified(units: Units, groups: int, seed: int) -> Groups:
    """Each group a miniature of the mixture along the conflict axes: MERIT's opposite (ours). `seed` has no say.

    Recursive halving by number of units, along axis 1, 2, .., down to leaves of K neighbours (the last may have fewer);
    each leaf is dealt out, one unit per group, its heaviest to the group that is lightest so far.
    Balance: if the groups' weights differ by at most m = max_t s_t, then adding to each, in the opposite order, one
    weight from 0 to m changes a difference in [0, m] by one in [0, m]: they still differ by at most m.
    """
    result = np.zeros(len(units), dtype=np.int64)
    weight = np.zeros(groups, dtype=np.int64)
    for leaf in _leaves(units, np.arange(len(units)), groups, 0):
        heaviest_first = leaf[np.argsort(-units.samples[leaf], kind="stable")]
        lightest_first = np.argsort(weight, kind="stable")[: len(leaf)]
        result[heaviest_first] = lightest_first
        weight[lightest_first] += units.samples[heaviest_first]
    return result


def _leaves(units: Units, part: NDArray[np.int64], size: int, level: int) -> list[NDArray[np.int64]]:
    """Neighbours on the axes in leaves of `size` units, all but the last full; units of a leaf in name order."""
    if len(part) <= size:
        return [part]
    ordered = part[np.argsort(units.scores[part, level % units.scores.shape[1]], kind="stable")]
    leaves = -(-len(part) // size)
    cut = (leaves + 1) // 2 * size
    return (_leaves(units, np.sort(ordered[:cut]), size, level + 1)
            + _leaves(units, np.sort(ordered[cut:]), size, level + 1))


def conflict_greedy(units: Units, groups: int, seed: int) -> Groups:
    """Grow groups from conflicting seeds (the paper's 'conflict-induced' baseline). Not balanced; `seed` has no say.

    The seeds are the pair with the smallest cosine, then, for K > 2, each time the unit with the smallest mean cosine
    to the seeds. Every other unit, in the order of names, joins the group where the mean cosine over all pairs that
    share a group falls least (or rises most). The paper leaves open for K > 2 and how the mean is taken: pooled pairs
    are our choice, because a mean per group lets the largest group take everyone.
    """
    seeds = _conflicting_seeds(units.cosine, groups)
    result = np.full(len(units), -1, dtype=np.int64)
    result[seeds] = np.arange(groups)
    to_group = units.cosine[:, seeds].copy()  # [T, K], sum of cosines to the members
    members = np.ones(groups)
    shared, pairs = 0.0, 0.0
    for unit in np.flatnonzero(result < 0):
        mean_after = (shared + to_group[unit]) / (pairs + members)
        group = int(np.argmax(mean_after))
        shared, pairs = shared + float(to_group[unit, group]), pairs + float(members[group])
        result[unit] = group
        members[group] += 1
        to_group[:, group] += units.cosine[:, unit]
    return result


def _conflicting_seeds(cosine: Floats, count: int) -> list[int]:
    """`count` units far from each other, the most conflicting pair first; ties by position (= name)."""
    if count == 1:
        return [0]
    first, second = np.triu_indices(len(cosine), 1)
    least = int(np.argmin(cosine[first, second]))
    seeds = [int(first[least]), int(second[least])]
    while len(seeds) < count:
        mean = cosine[:, seeds].mean(axis=1)
        mean[seeds] = np.inf
        seeds.append(int(np.argmin(mean)))
    return seeds


def kmeans(units: Units, groups: int, seed: int) -> Groups:
    """scikit-learn's K-means (10 starts) on the scores that `merit` would use, ceil(log2 K) axes. Not balanced.

    Groups are numbered by their first member's name. Raises PlanError if fewer than K places are distinct.
    """
    if groups == 1:
        return np.zeros(len(units), dtype=np.int64)
    from sklearn.cluster import KMeans  # a second to import, and only this method needs it
    from threadpoolctl import threadpool_limits

    points = units.scores[:, : max(1, (groups - 1).bit_length())]
    distinct = len(np.unique(points, axis=0))
    labels = np.zeros(len(units), dtype=np.int64)
    if distinct >= groups:
        start = int(generator(seed, "partition", "kmeans").integers(2**31 - 1))
        with threadpool_limits(limits=1):  # sums per thread would make the result depend on the machine
            labels = KMeans(groups, n_init=10, random_state=start).fit_predict(points).astype(np.int64)
    found, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    if len(found) < groups:
        raise PlanError(f"no `kmeans` partition can be made: {distinct} distinct places of {len(units)} units on the "
                        f"first {points.shape[1]} conflict axes, wanted {groups} clusters. Lower `split.groups` to "
                        f"{len(found) if distinct >= groups else distinct}, or use another `split.method`.")
    return np.argsort(np.argsort(first))[labels].astype(np.int64)


def joint(units: Units, groups: int, seed: int) -> Groups:
    """One group of everything: ordinary training."""
    return np.zeros(len(units), dtype=np.int64)


def soup(units: Units, groups: int, seed: int) -> Groups:
    """No groups: each of K branches sees the whole mixture, in its own order. Every unit gets -1."""
    return np.full(len(units), -1, dtype=np.int64)


PARTITIONERS: dict[str, Callable[[Units, int, int], Groups]] = {
    "merit": merit,
    "random": random,
    "stratified": stratified,
    "conflict_greedy": conflict_greedy,
    "kmeans": kmeans,
    "joint": joint,
    "soup": soup,
}
