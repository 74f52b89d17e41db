"""Units -> K groups: MERIT's recursive halving and the baselines it is measured against.

    T   units        s_t   samples of unit t, W their sum        K   groups, any integer from 1 to T
    scores [T, R]    place of each unit on the conflict axes      cosine [T, T]
    c_k capacity of the worker that trains group k, C their sum   t_k = W c_k / C, its target; W/K where all are equal

Source: MERIT, arXiv 2606.01717, step 3 and its baselines. Pure. Every method sees the units sorted by name and breaks
ties by name, so the order of the input changes nothing; chance comes from (seed, "partition", method) alone.

Balance of `merit`, `random` and `stratified`, for every c, with m = max_t s_t:

    t_k - m - F_k <= W_k <= t_k + m        F_k = sum over j != k of max(0, m - t_j)

so |W_k - t_k| <= m wherever every target is at least m, and wherever all capacities are equal (if then t_k < m, no
W_k >= 0 is further below it). F_k is there because no group may be empty: each of ten groups gets one of ten equal units,
whatever its capacity. Then none of the units that went to groups too small for one is left for the large group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anabranch.errors import PlanError, closest
from anabranch.rows import generator

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]
Shares = tuple[int, ...]  # c_k in lowest whole numbers: (1, 1, 1) where all are equal
Whole = NDArray[Any]  # whole numbers that stay exact: int64, or Python's own where those would overflow

BALANCED = ("merit", "random", "stratified")  # the methods that heed capacities


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
    capacities: Sequence[float] | None = None,
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
        capacities: K numbers > 0, only their ratios count: group k gets about c_k / C of the samples. None: all equal.
    Returns:
        groups that are never empty; how far `merit`, `random` and `stratified` stay from t_k is said above.
    Raises:
        PlanError: every problem with the input in one message; K > T; too few distinct units for `kmeans`; unequal
            capacities for a method that does not balance its groups.
    """
    if method not in PARTITIONERS:
        raise PlanError(f"split.method: unknown method `{method}`.{closest(method, PARTITIONERS)}")
    score_table, cosines = np.asarray(scores, dtype=np.float64), np.asarray(cosine, dtype=np.float64)
    _check(method, names, samples, score_table, cosines, groups)
    order = sorted(range(len(names)), key=lambda i: names[i])
    units = Units(tuple(names[i] for i in order), np.array([samples[i] for i in order], dtype=np.int64),
                  score_table[order], cosines[np.ix_(order, order)])
    result = np.empty(len(names), dtype=np.int64)
    shares = whole_shares(method, capacities, groups)
    result[order] = PARTITIONERS[method](units, shares, seed)
    return result


def whole_shares(method: str, capacities: Sequence[float] | None, groups: int) -> Shares:
    """Capacities as the smallest whole numbers in their proportion: [1.5, 3] are (1, 2), and None is (1, 1, ..).

    A number counts as it is written: [0.1, 0.3] are (1, 3), whatever binary makes of them.

    Raises:
        PlanError: not one number > 0 for each group, all problems in one message; unequal ones for a method that does not
            balance its groups.
    """
    if capacities is None:
        return (1,) * groups
    problems = [f"group {k}: got {c}, wanted a number > 0" for k, c in enumerate(capacities)
                if not (math.isfinite(c) and c > 0)]
    if len(capacities) != groups:
        problems.append(f"{len(capacities)} given for {groups} {'group' if groups == 1 else 'groups'}: wanted one for each, "
                        "in the order of the groups")
    if problems:
        raise PlanError.of("split.capacities:", problems)
    exact = [Fraction(repr(float(c))) for c in capacities]
    scale = math.lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    shares = tuple(w // math.gcd(*whole) for w in whole)
    if max(shares) > 1 and method not in BALANCED:
        raise PlanError(f"split.capacities: `{method}` does not balance its groups, so it cannot fill them by capacity. Use "
                        f"{', '.join(f'`{name}`' for name in BALANCED)}, or leave `split.capacities` out.")
    return shares


def _exact(values: Sequence[int], largest: int) -> Whole:
    """An array whose products with numbers up to `largest` do not overflow: Python's own integers where int64 would."""
    return np.array(values, dtype=np.int64 if sum(values) * largest < 2**60 else object)


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


def merit(units: Units, shares: Shares, seed: int) -> Groups:
    """Recursive halving at the sample-weighted median of axis 1, then 2, .. (arXiv 2606.01717, step 3).

    Level l cuts along axis l (axes are used again from the first if there are more levels). K groups are cut into
    ceil(K/2) and floor(K/2), with samples in the proportion of their capacities, so K = 2^r and equal capacities are the
    paper's method. Any other K, capacities and ties by unit name are our extension. Group numbers: the low end of an axis
    comes first. `seed` has no say.
    """
    axes = units.scores.shape[1]
    return _halve(units, shares, lambda level: units.scores[:, level % axes] if axes else np.zeros(len(units)))


def random(units: Units, shares: Shares, seed: int) -> Groups:
    """Groups by chance, balanced in samples by the same cuts along one shuffled order."""
    place = generator(seed, "partition", "random").permutation(len(units)).astype(np.float64)
    return _halve(units, shares, lambda level: place)


def _halve(units: Units, shares: Shares, key: Callable[[int], Floats]) -> Groups:
    """Cut in two along key(0), each part along key(1), .. until every part is one group.

    Why the balance said at the top of this file holds, for any keys. For a part with the groups S let t_S be the sum of
    their targets, E = P - t_S the excess of its weight P, and F_S the sum of max(0, m - t_j) over j in S, F that of all
    groups; but set F to 0 if no target is above m, as a group cannot be lighter than 0. Say the part is sound if
    -(m + F - F_S) <= E <= m: the whole is (E = 0), and a group that is a sound part satisfies the bound.
      1. Some cut makes both parts of a sound one sound. They are if the left one's excess e lies between
         lo = max(E - m, F_L - F - m) <= 0 and hi = min(m, E + m + F - F_R), where hi >= 0; hi - lo >= m; e goes from
         -t_L <= hi to E + t_R >= lo, in steps of at most m. `_cut` takes such a cut if it leaves each side a unit per group.
      2. If none does, all of them leave too few units on one side, say the left. Then `_cut` gives that side one unit per
         group: of the cuts it may take this is nearest to the proportion of the part. So e > hi >= 0, and e is a sum of
         s_j - t_j over the left. Its groups are final: none is above m, and one lacks less than the others are over,
         t_k - s_k < sum of (s_j - t_j) over j != k, at most F_k. With all targets >= m this cannot be, as e <= 0. With
         targets on both sides of m, e <= F_L <= E + m + F - F_R, so that the right part is sound.
      3. With no target above m the right part may be too light, E < -m; its groups need only not be too heavy. The cut
         nearest to the proportion of such a part is within m/2 of it, so neither side has an excess above m/2. If it is not
         among those that `_cut` may take, one side is single units again, and the other is lighter still.
    """
    result = np.zeros(len(units), dtype=np.int64)
    total, heaviest, whole = int(units.samples.sum()), int(units.samples.max()), sum(shares)
    samples = _exact(units.samples.tolist(), whole)
    slack = [max(0, heaviest * whole - total * share) for share in shares]  # times C, as all excesses below
    if total * max(shares) <= heaviest * whole:
        slack = [0] * len(shares)

    def divide(part: NDArray[np.int64], first: int, last: int, level: int) -> None:
        if last - first == 1:
            result[part] = first
            return
        part = part[np.argsort(key(level)[part], kind="stable")]  # part is in name order where keys tie
        middle = first + (last - first + 1) // 2
        left, right = (sum(slack) - sum(slack[a:b]) for a, b in ((first, middle), (middle, last)))
        cut = _cut(samples[part], shares[first:middle], shares[middle:last], total, heaviest, whole, (left, right))
        divide(np.sort(part[:cut]), first, middle, level + 1)
        divide(np.sort(part[cut:]), middle, last, level + 1)

    divide(np.arange(len(units)), 0, len(shares), 0)
    return result


def _cut(samples: Whole, left: Shares, right: Shares, total: int, heaviest: int, whole: int, slack: tuple[int, int]) -> int:
    """How many of the ordered units go to the groups on the `left`, the others to those on the `right`.

    Nearest to their proportion of the part, the earlier on a tie; among cuts that leave each side at least one unit per
    group and, where there are such, both sides sound (see `_halve`; `slack` is C (F - F_S) of either side). Whole numbers
    throughout.
    """
    cuts = np.arange(len(left), len(samples) - len(right) + 1)
    weight, part = np.cumsum(samples)[cuts - 1], int(samples.sum())
    excess_left = weight * whole - sum(left) * total
    excess_right = (part - weight) * whole - sum(right) * total
    most = heaviest * whole
    sound = ((np.maximum(excess_left, excess_right) <= most)
             & (excess_left >= -most - slack[0]) & (excess_right >= -most - slack[1]))
    allowed = np.flatnonzero(sound) if sound.any() else np.arange(len(cuts))
    distance = np.abs(weight * (sum(left) + sum(right)) - part * sum(left))
    return int(cuts[allowed[np.argmin(distance[allowed])]])


def stratified(units: Units, shares: Shares, seed: int) -> Groups:
    """Each group a miniature of the mixture along the conflict axes: MERIT's opposite (ours). `seed` has no say.

    Recursive halving by number of units, along axis 1, 2, .., down to leaves of K neighbours (the last may have fewer);
    each leaf is dealt out, one unit per group, its heaviest to the group that is lightest so far.
    Balance: if the groups' weights differ by at most m = max_t s_t, then adding to each, in the opposite order, one
    weight from 0 to m changes a difference in [0, m] by one in [0, m]: they still differ by at most m.
    Groups of unequal capacity cannot take one unit each: `_deal` hands them out along the same leaves.
    """
    leaves = [leaf[np.argsort(-units.samples[leaf], kind="stable")]
              for leaf in _leaves(units, np.arange(len(units)), len(shares), 0)]
    if max(shares) > 1:
        return _deal(units, shares, np.concatenate(leaves))
    result = np.zeros(len(units), dtype=np.int64)
    weight = np.zeros(len(shares), dtype=np.int64)
    for heaviest_first in leaves:
        lightest_first = np.argsort(weight, kind="stable")[: len(heaviest_first)]
        result[heaviest_first] = lightest_first
        weight[lightest_first] += units.samples[heaviest_first]
    return result


def _deal(units: Units, shares: Shares, order: NDArray[np.int64]) -> Groups:
    """Units in this order, each to the group that is furthest behind its share of what has been dealt so far.

    Only groups with room for the unit under their target are asked; once a unit fits none, this and all later ones go where
    there is most room; and the last Z units go one each to the Z groups that have none, if there are so many.
    Balance, with r_k = t_k - W_k, whose sum is the weight not yet dealt: nobody is over (r < 0) while units fit. Later a
    group that is given one has r > 0 before it, as the sum is, so r > -m after; a single unit cannot be more than m over.
    If some r_k > m in the end, all that were given one after the first time it did not fit had r >= r_k before it, so r > 0
    after. So nobody is over but groups of one forced unit, by at most m - t_j each: as the sum is 0, r_k <= F_k.
    """
    result = np.empty(len(units), dtype=np.int64)
    whole, total = sum(shares), int(units.samples.sum())
    share = _exact(shares, total)
    weight, empty = np.zeros_like(share), np.ones(len(shares), dtype=bool)
    dealt, fitting = 0, True
    for position, unit in enumerate(order):
        size = int(units.samples[unit])
        dealt += size
        room = share * total - weight * whole  # C r_k
        fits = room >= size * whole
        fitting &= bool(fits.any())
        wanted, among = (share * dealt - weight * whole, fits) if fitting else (room, np.ones_like(empty))
        if len(order) - position == empty.sum():
            wanted, among = room, empty
        candidates = np.flatnonzero(among)
        group = int(candidates[np.argmax(wanted[candidates])])
        result[unit] = group
        weight[group] += size
        empty[group] = False
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


def conflict_greedy(units: Units, shares: Shares, seed: int) -> Groups:
    """Grow groups from conflicting seeds (the paper's 'conflict-induced' baseline). Not balanced; `seed` has no say.

    The seeds are the pair with the smallest cosine, then, for K > 2, each time the unit with the smallest mean cosine
    to the seeds. Every other unit, in the order of names, joins the group where the mean cosine over all pairs that
    share a group falls least (or rises most). The paper leaves open for K > 2 and how the mean is taken: pooled pairs
    are our choice, because a mean per group lets the largest group take everyone.
    """
    groups = len(shares)
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


def kmeans(units: Units, shares: Shares, seed: int) -> Groups:
    """scikit-learn's K-means (10 starts) on the scores that `merit` would use, ceil(log2 K) axes. Not balanced.

    Groups are numbered by their first member's name. Raises PlanError if fewer than K places are distinct.
    """
    groups = len(shares)
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


def joint(units: Units, shares: Shares, seed: int) -> Groups:
    """One group of everything: ordinary training."""
    return np.zeros(len(units), dtype=np.int64)


def soup(units: Units, shares: Shares, seed: int) -> Groups:
    """No groups: each of K branches sees the whole mixture, in its own order. Every unit gets -1."""
    return np.full(len(units), -1, dtype=np.int64)


PARTITIONERS: dict[str, Callable[[Units, Shares, int], Groups]] = {
    "merit": merit,
    "random": random,
    "stratified": stratified,
    "conflict_greedy": conflict_greedy,
    "kmeans": kmeans,
    "joint": joint,
    "soup": soup,
}
