"""What is asked of `collect`, found to be possible: methods, tasks, pairs and sets, in the order in which they are made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.artifacts import Mixture
from anabranch.errors import RecipeError, closest
from anabranch.mergeability.outcomes import Method, choose_methods
from anabranch.rows import generator

CALIBRATION = 24  # rows set aside per task: what the published study needed for stable activations, and some more for scores
K = 4

Pair = tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """What is to be collected, checked: `tasks` in the mixture's order, `pairs` and `sets` of their places in it."""

    methods: list[Method]
    tasks: list[str]
    pairs: list[Pair]
    sets: list[tuple[int, ...]]
    calibration: int


def ask(mixture: Mixture, seed: int, methods: Sequence[str], tasks: Sequence[str] | None, pairs: int | None, sets: int,
        k: int, calibration: int) -> Asked:
    """Raises RecipeError with every problem."""
    names, problems = [u.name for u in mixture.units], []
    chosen = names if tasks is None else [n for n in names if n in set(tasks)]
    for name in dict.fromkeys(tasks or ()):
        if name not in names:
            problems.append(f"--tasks: `{name}` is no unit of the mixture.{closest(name, names)}")
    if len(chosen) < 2 and not problems:
        problems.append(f"{len(chosen)} task{'s' * (len(chosen) != 1)} ({', '.join(chosen) or 'none'}): a pair needs two. Give "
                        "the mixture more units (`unit_column`), or name more in --tasks")
    most = len(chosen) * (len(chosen) - 1) // 2
    if pairs is not None and not 1 <= pairs <= max(most, 1):
        problems.append(f"--pairs {pairs}: wanted 1 to {most}, the pairs of {len(chosen)} tasks")
    if sets < 0 or (sets and not 2 <= k <= len(chosen)):
        problems.append(f"--sets {sets} --k {k}: wanted sets of 2 to {len(chosen)} tasks, and no negative number of them")
    elif sets > math.comb(len(chosen), k):
        problems.append(f"--sets {sets}: {len(chosen)} tasks have only {math.comb(len(chosen), k)} sets of {k}")
    if calibration < 2:
        problems.append(f"--calibration {calibration}: wanted at least 2 rows per task")
    if problems:
        raise RecipeError.of("mergeability collect:", problems)
    order = spread_pairs(len(chosen), seed)
    return Asked(choose_methods(methods, [2, k] if sets else [2]), chosen, order[: len(order) if pairs is None else pairs],
                 draw_sets(len(chosen), k, sets, seed), calibration)


def spread_pairs(count: int, seed: int) -> list[Pair]:
    """All pairs i < j of `count` tasks as the rounds of a tournament: the first n of them touch every task about equally."""
    players: list[int | None] = [int(i) for i in generator(seed, "mergeability", "pairs").permutation(count)]
    if count % 2:
        players.append(None)  # whoever meets it rests
    rounds: list[Pair] = []
    for _ in range(len(players) - 1):
        for a, b in zip(players[: len(players) // 2], reversed(players), strict=False):
            if a is not None and b is not None:
                rounds.append((min(a, b), max(a, b)))
        players.insert(1, players.pop())
    return rounds


def draw_sets(count: int, k: int, sets: int, seed: int) -> list[tuple[int, ...]]:
    """Different sets of k of `count` tasks, each in order; more of them begin with fewer of them."""
    found: dict[tuple[int, ...], None] = {}
    for turn in itertools.count():
        if len(found) >= sets:
            break
        found.setdefault(tuple(sorted(generator(seed, "mergeability", "sets", turn).permutation(count)[:k].tolist())))
    return list(found)
