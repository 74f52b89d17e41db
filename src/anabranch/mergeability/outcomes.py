"""What models and merges score on held-out rows: a journal of one line per finished evaluation.

    RUN/mergeability/outcomes.jsonl      appended to and flushed; a line that a kill has torn is dropped and made again
    RUN/mergeability/merging/            the merge at hand: made by the engine, scored, removed

A score is exp(-mean loss per response token), in (0, 1]: the (geometric mean) likelihood of a response token. Each line has
a key: the hash of all that decides its figures (weights, method and its parameters, rows, how they are evaluated).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import anabranch.merge as maths
from anabranch.artifacts import BranchManifest, Evaluation, Mixture, Part, canonical, digest
from anabranch.engine.merging import merge_checkpoints
from anabranch.errors import CorruptedError, OutputError, RecipeError, closest
from anabranch.evaluate import evaluate_model, evaluation_inputs
from anabranch.families import frozen_tensors
from anabranch.mergeability.models import folder_of, model_folder
from anabranch.operators import ALIASES, NOT_IN_A_RUN
from anabranch.run import Run

BASE, SINGLE = "base", "single"
# As the study ran them (arXiv:2601.22285; its TSV, DARE and Iso need no number for two models). Weights are 1 for each model:
# task arithmetic adds 0.3 of every task vector, `linear` and DARE divide by their number. Others run with their defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "linear": {}, "task_arithmetic": {"scale": 0.3}, "tsv_m": {}, "ties": {"density": 0.2, "scale": 0.3},
    "dare_linear": {"density": 0.1, "normalize": True}, "iso_c": {}}
DEFAULT_METHODS = tuple(PUBLISHED)


class Method(Part):
    """A merge method with everything that is fixed about it; `weight` is that of each of k models."""

    name: str
    parameters: dict[str, Any]
    shares: bool

    def weights(self, k: int) -> list[float]:
        return [1 / k if self.shares else 1.0] * k


class Outcome(Part):
    """A line of the journal: one model, scored on the tasks that it was made from."""

    key: str
    model: str  # BASE, SINGLE or the name of a merge method
    tasks: list[str]
    scores: list[float | None]
    exact_match: list[float | None]
    displacement: float | None = None


def choose_methods(names: Sequence[str], sizes: Sequence[int]) -> list[Method]:
    """Registry methods with their settings, in the order asked.

    Args:
        sizes: how many models they must merge: 2 for pairs, k for sets.
    Raises:
        RecipeError: every name that is unknown, stands twice, or cannot merge so many models.
    """
    found: list[Method] = []
    problems = [] if names else [f"no method given. Wanted names as in {','.join(DEFAULT_METHODS)}"]
    for asked in names:
        name = ALIASES.get(asked, asked)
        if name not in maths.METHODS:
            problems.append(f"`{asked}`: no such merge method.{closest(asked, [*maths.METHODS, *ALIASES])}")
        elif any(m.name == name for m in found):
            problems.append(f"`{asked}` stands twice" + (f": it is {name}" if asked != name else ""))
        else:
            try:
                found.append(_settled(name, sizes))
            except RecipeError as error:
                problems.append(f"`{asked}`: {error}")
    if problems:
        raise RecipeError.of("--methods:", problems)
    return found


def _settled(name: str, sizes: Sequence[int]) -> Method:
    method = maths.METHODS[name]
    if missing := [reason for given, reason in NOT_IN_A_RUN.items() if given in method.inputs]:
        raise RecipeError(f"needs {' and '.join(missing)}.")
    arguments = maths.arguments_for(method, PUBLISHED.get(name, {}))
    shares = False
    for k in sizes:
        try:
            maths.check_arguments(method, arguments, [1.0] * k, k)
        except RecipeError:  # some want shares that sum to one; what else is wrong, these show as well
            maths.check_arguments(method, arguments, [1 / k] * k, k)
            shares = True
    parameters = {n: list(v) if isinstance(v, tuple) else v for n, v in arguments.items()}
    return Method(name=name, parameters=parameters, shares=shares)


@dataclass
class Journal:
    """The outcomes that are known, by key. One process writes it."""

    path: Path
    known: dict[str, Outcome] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Raises CorruptedError for a line that is whole and no outcome."""
        journal = cls(path)
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                outcome = Outcome.model_validate_json(line)
            except ValidationError as error:
                raise CorruptedError(f"{path}, line {number}: no outcome of a merge. Delete the line: that merge is then made "
                                     "and scored again.") from error
            journal.known[outcome.key] = outcome
        if len(whole) < len(data):
            os.truncate(path, len(whole))  # torn by a kill
        return journal

    def add(self, outcome: Outcome) -> Outcome:
        try:
            with open(self.path, "ab") as file:
                file.write(canonical(outcome.model_dump(mode="json")) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}. Free space, then run the same command "
                              "again: finished work is kept.") from error
        self.known[outcome.key] = outcome
        return outcome


@dataclass(frozen=True)
class Scorer:
    """Makes and scores models of some tasks; what the journal knows is not made again."""

    run: Run
    mixture: Mixture
    models: Mapping[str, BranchManifest]
    journal: Journal

    def outcome(self, model: str | Method, tasks: Sequence[str]) -> Outcome:
        """The base, a task's own model, or a merge of the tasks' models: scored on these tasks."""
        return self.journal.known.get(self.key(model, tasks)) or self._make(model, tasks)

    def known(self, model: str | Method, tasks: Sequence[str]) -> Outcome | None:
        return self.journal.known.get(self.key(model, tasks))

    def key(self, model: str | Method, tasks: Sequence[str]) -> str:
        """Of all that decides the figures."""
        made: dict[str, Any] = {"base": self.run.base_hash, "evaluation": evaluation_inputs(
            self.run.recipe, self._only(tasks), "any")}
        if model != BASE:
            made["models"] = [digest(self.models[t].files) for t in tasks]
        if isinstance(model, Method):
            recipe = self.run.recipe
            made |= {"method": model.model_dump(mode="json"), "seed": recipe.seed, "dtype": recipe.merge.dtype}
        return digest(made)

    def _only(self, tasks: Sequence[str]) -> Mixture:
        return self.mixture.model_copy(update={"units": [self.mixture.unit(t) for t in tasks]})

    def _make(self, model: str | Method, tasks: Sequence[str]) -> Outcome:
        key = self.key(model, tasks)
        if model == BASE:
            return self._score(key, BASE, self.run.base, tasks, None)
        folders = [model_folder(self.run, self.mixture.unit(t)) / "model" for t in tasks]
        if isinstance(model, str):
            return self._score(key, SINGLE, folders[0], tasks, None)
        place = folder_of(self.run) / "merging"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        section = self.run.recipe.merge
        manifest = merge_checkpoints(
            model.name, self.run.base, folders, model.weights(len(tasks)), place / "model", dtype=section.dtype,
            max_shard_size=section.max_shard_size, parameters=model.parameters, seed=self.run.recipe.seed,
            frozen=frozen_tensors(self.run.base, self.run.recipe.model),
            made_from={"base": self.run.base_hash} | {f"model of {t}": digest(self.models[t].files) for t in tasks})
        outcome = self._score(key, model.name, place / "model", tasks, manifest.displacement)
        shutil.rmtree(place, ignore_errors=True)
        return outcome

    def _score(self, key: str, label: str, folder: Path, tasks: Sequence[str], displacement: float | None) -> Outcome:
        scratch = folder_of(self.run) / "merging" / "evaluation.json"
        found = evaluate_model(self.run.recipe, self._only(tasks), folder_of(self.run) / "mixture", folder, label, key, scratch)
        scores = [_score(found, t) for t in tasks]
        return self.journal.add(Outcome(key=key, model=label, tasks=list(tasks), scores=scores, displacement=displacement,
                                        exact_match=[found.held_out[t].exact_match for t in tasks]))


def _score(evaluation: Evaluation, task: str) -> float | None:
    """exp(-loss); None, a missing value, where the model gives no number."""
    loss = evaluation.held_out[task].loss
    return math.exp(-loss) if not math.isnan(loss) else None
