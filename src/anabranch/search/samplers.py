"""Where to look next: CMA-ES, Optuna's TPE and NSGA-II, random search.

A sampler is asked for a vector and told what it was worth, again and again. Its state is that sequence: the same seed,
told the same, asks the same, so a killed search is taken up by asking and telling again what the journal holds.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from anabranch.errors import RecipeError
from anabranch.rows import generator
from anabranch.search.settings import SearchSettings
from anabranch.search.space import Dimension, Space, Vector, plain

# What a candidate that cannot be merged or scored is worth: worse than any other, and finite, as samplers add and subtract.
WORST = 1e6
LEAST_STEP = 1e-3


class Sampler(Protocol):
    def ask(self) -> Vector: ...

    def tell(self, score: float, objectives: Sequence[float]) -> None:
        """What the vector asked for last was worth, lower is better: as one number, and by objective."""


def sampler_for(settings: SearchSettings, space: Space, objectives: int) -> Sampler:
    """Raises RecipeError where cma or optuna is not installed."""
    if settings.sampler == "random":
        return RandomSampler(space, settings.seed)
    if settings.sampler == "cma":
        return CmaSampler(space, settings.seed, settings.sigma, settings.population)
    return OptunaSampler(space, settings.seed, settings.sampler, settings.population, objectives)


class RandomSampler:
    """Independent draws, even over each dimension's range on its scale."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed, self.asked = space, seed, 0

    def ask(self) -> Vector:
        z = generator(self.seed, "search", "random", self.asked).random(len(self.space.dimensions))
        self.asked += 1
        return plain([d.of_unit(value) for d, value in zip(self.space.dimensions, z, strict=True)])

    def tell(self, score: float, objectives: Sequence[float]) -> None:
        """Nothing is learnt."""


class CmaSampler:
    """CMA-ES, a population at a time; when it has converged it begins anew from the start with twice the population
    (IPOP: Auger and Hansen 2005)."""

    def __init__(self, space: Space, seed: int, sigma: float, population: int | None) -> None:
        try:
            cma: Any = importlib.import_module("cma")
        except ImportError as error:
            raise RecipeError("cma is not installed: pip install 'anabranch[search]', or `sampler: random`.") from error
        self.cma, self.space, self.seed, self.sigma = cma, space, seed, sigma
        # numpy's own generator belongs to others (lm-eval seeds it): cma gets a state of its own, put in place around calls
        self.numbers = np.random.RandomState(generator(seed, "search", "cma").integers(2**32)).get_state()
        self.population = population or 4 + int(3 * math.log(len(space.start)))
        self.restarts = 0
        self.queue: list[Any] = []
        self.asked: list[Any] = []
        self.told: list[float] = []
        self._begin()

    def ask(self) -> Vector:
        if not self.queue:
            with self._own_numbers():
                if self.strategy.stop():
                    self.restarts += 1
                    self._begin()
                self.queue = list(self.strategy.ask())
            self.asked, self.told = list(self.queue), []
        return plain(self.space.vector([float(v) for v in self._full(self.queue.pop(0))]))

    def tell(self, score: float, objectives: Sequence[float]) -> None:
        self.told.append(score)
        if len(self.told) == len(self.asked):
            with self._own_numbers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of flat fitness, where all candidates of a population failed
                self.strategy.tell(self.asked, self.told)

    def _begin(self) -> None:
        start = [min(max(v, LEAST_STEP), 1 - LEAST_STEP) if self.space.bounded else v for v in self.space.start]
        options: dict[str, Any] = {
            "seed": np.nan, "popsize": self.population * 2**self.restarts, "verbose": -9, "verb_log": 0, "verb_disp": 0,
            "signals_filename": None}
        if self.space.bounded:
            options["bounds"] = [0.0, 1.0]
        self.single = len(start) == 1  # which cma does not take: a second dimension without effect stands beside it
        with self._own_numbers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.strategy = self.cma.CMAEvolutionStrategy(start + [0.5] * self.single, self.sigma, options)

    def _full(self, z: Any) -> Any:
        return z[:1] if self.single else z

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        others = np.random.get_state()
        np.random.set_state(self.numbers)
        try:
            yield
        finally:
            self.numbers = np.random.get_state()
            np.random.set_state(others)


class OptunaSampler:
    """TPE on the score, or NSGA-II on the objectives."""

    def __init__(self, space: Space, seed: int, kind: str, population: int | None, objectives: int) -> None:
        try:
            optuna: Any = importlib.import_module("optuna")
        except ImportError as error:
            raise RecipeError("optuna is not installed: pip install 'anabranch[search]', or `sampler: cma`.") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("optuna").propagate = False
        self.space, self.several = space, kind == "nsga2"
        seed = int(generator(seed, "search", kind).integers(2**31))
        made: Any = (optuna.samplers.NSGAIISampler(seed=seed, **({"population_size": population} if population else {}))
                     if self.several else optuna.samplers.TPESampler(seed=seed))
        self.study = optuna.create_study(sampler=made, directions=["minimize"] * (objectives if self.several else 1))
        self.distributions = {str(i): _distribution(optuna, d) for i, d in enumerate(space.dimensions)}
        self.trial: Any = None

    def ask(self) -> Vector:
        self.trial = self.study.ask(self.distributions)
        return plain([self.trial.params[str(i)] for i in range(len(self.distributions))])

    def tell(self, score: float, objectives: Sequence[float]) -> None:
        self.study.tell(self.trial, list(objectives) if self.several else score)


def _distribution(optuna: Any, d: Dimension) -> Any:
    if d.choices:
        return optuna.distributions.CategoricalDistribution(d.choices)
    if d.whole:
        return optuna.distributions.IntDistribution(int(d.low), int(d.high), log=d.log)
    return optuna.distributions.FloatDistribution(d.low, d.high, log=d.log)
