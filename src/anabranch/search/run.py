"""A search from its file to its verdict.

    OUT.search/ (or SPACE.search/ beside the file)
      journal.jsonl          every candidate as it is scored; the same command goes on from it
      best_config.yaml       the best so far: `anabranch merge best_config.yaml OUT` makes it
      results.json           outcome.SearchOutcome, written at the end
      progress.png, pareto.png
    OUT/                     the best, merged; without OUT only on request, in OUT.search/final_model
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from anabranch.artifacts import Mixture, digest, write_atomically
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.dialect import config_of
from anabranch.engine.fetch import resolve
from anabranch.engine.layout import layout_of
from anabranch.engine.merging import merge_config, place_for, settings_for
from anabranch.errors import AnabranchError, CorruptedError, OutputError, RecipeError
from anabranch.model import can_select, keep_buffers, load_tokenizer
from anabranch.search import journal as journals
from anabranch.search.baselines import UNIFORM, baselines
from anabranch.search.genome import genome_space
from anabranch.search.identity import identity_of
from anabranch.search.in_memory import SCRATCH, LoadedMerge, Needs, Room, Workshop, absolute, load_merge, needs_of
from anabranch.search.journal import ARMS, Journal, Line
from anabranch.search.outcome import (
    Evaluated,
    GuardScore,
    SearchOutcome,
    best_of,
    best_so_far,
    guard_score,
    pareto,
    verdict,
)
from anabranch.search.rows import Halves, mixture_folder, read_halves, run_weights
from anabranch.search.samplers import WORST, RandomSampler, Sampler, sampler_for
from anabranch.search.score import Measured, Objective, Score, Scorer, difference, objectives_of, score_of, usual_batch
from anabranch.search.settings import GenomeSetting, SearchSettings, read_search
from anabranch.search.space import Space, template_space
from anabranch.search.tasks import TaskScorer
from anabranch.templates import tokenizer_hash
from anabranch.vision import load_vision

BEST, RESULTS = "best_config.yaml", "results.json"
FAILURES = (AnabranchError, RuntimeError, ValueError, ArithmeticError)  # of a candidate; RuntimeError: of torch, in the model
FRONT = 12  # of the Pareto front that are scored on the guard rows


@dataclass(frozen=True)
class Progress:
    """`done` of `total` candidates, both arms; `best` so far; candidates a minute of this call, without what was in the
    journal."""

    done: int
    total: int
    arm: str
    score: float | None
    best: float | None
    per_minute: float
    seconds_left: float
    failed: str | None = None


Tell = Callable[[Progress], None]
Say = Callable[[str], None]


def search(space: Path | str | Mapping[str, Any], out: Path | str | None = None, *, save_final_model: bool = False,
           allow_benchmarks: bool = False, memory: str | None = None, threads: int | None = None, device: str = "cpu",
           overrides: Mapping[str, Any] | None = None, progress: Tell | None = None, say: Say = lambda _: None
           ) -> SearchOutcome:
    """`anabranch search SPACE [OUT]`: find the merge with the best score, and hold it against baselines on rows never searched.

    Args:
        space: a search file (settings.SearchSettings), or what would stand in one.
        out: the model folder to make of the best; None: none is made, unless `save_final_model`.
        overrides: sampler, budget, seed, population, sigma from the command line.
        say: told what the user should know besides progress.
    Raises:
        AnabranchError: what is wrong with file, models, rows or an earlier journal, before a candidate is merged; no candidate
            could be merged.
    """
    job = prepare_search(space, out, allow_benchmarks=allow_benchmarks, memory=memory, threads=threads, device=device,
                         overrides=overrides, say=say)
    records = records_for(space, out)
    final = place_for(out) if out is not None else records / "final_model" if save_final_model else None
    _check_free(final, records)
    with _folder(records), journals.opened(records, job.identity) as journal:
        for left in records.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)  # of a killed search, and as large as a model
        outcome = _finished(job, journal, records)
        if outcome is None:
            outcome = _searched(job, journal, records, progress, say)
        best = next(line for line in journal.of(outcome.best.arm) if line.n == outcome.best.n)
        _write_best(job, best.vector, records)  # a search of a larger budget may have left another there
        if final is not None:
            _merge_best(job, final, records)
    return outcome


def _check_free(final: Path | None, records: Path) -> None:
    """Raises OutputError where the best could not be put at the end. A model that a search of these records made may stand
    there: it is the best still, or is told of then."""
    if final is not None and os.path.lexists(final) and not (records / RESULTS).is_file() and not (
            final.is_dir() and not any(final.iterdir())):
        raise OutputError(f"{final} is already there, and no search made it. Choose another OUT, or remove it if nothing in it "
                          "is needed; nothing was changed.")


def _merge_best(job: Job, final: Path, records: Path) -> None:
    try:
        merge_config(records / BEST, final, settings=job.workshop.settings)
    except OutputError as error:
        raise OutputError(f"the search is done, and its best could not be put at {final}: {error} What was found is kept in "
                          f"{records}: `anabranch merge {records / BEST} OTHER` makes the model elsewhere, and the same "
                          f"command makes it here once {final} is free.") from error


def _finished(job: Job, journal: Journal, records: Path) -> SearchOutcome | None:
    """The results that are there, if they are of this very search and of all of its candidates."""
    budget = job.settings.budget
    if any(len(journal.of(arm)) < budget for arm in (ARMS if job.settings.sampler != "random" else ARMS[:1])):
        return None
    with suppress(CorruptedError):
        outcome = SearchOutcome.load(records / RESULTS)
        if outcome.made_from == job.made_from and outcome.budget == budget:
            return outcome
    return None


def _searched(job: Job, journal: Journal, records: Path, progress: Tell | None, say: Say) -> SearchOutcome:
    with job.loaded(records):
        if not journal.lines:  # what is wrong with every candidate is told at once, and not as so many failures
            job.measure(job.first, "searched")
        spent = _search(job, journal, records, progress)
        outcome = _judge(job, journal, say)
    _draw(outcome, journal, job, records)
    outcome.save(records / RESULTS)
    if spent:
        say(f"{spent[0]} candidates in {spent[1]:.0f} s, {60 * spent[0] / max(spent[1], 1e-9):.1f} a minute")
    return outcome


@dataclass
class Job:
    """A search that has been checked: everything but the model is there."""

    settings: SearchSettings
    space: Space
    first: dict[str, Any]
    workshop: Workshop
    needs: Needs
    halves: Halves
    objectives: list[Objective]
    scorer: Scorer
    compared: dict[str, dict[str, Any]]
    missing: dict[str, str]
    identity: dict[str, str]
    model: LoadedMerge | None = None

    @property
    def made_from(self) -> dict[str, str]:
        return self.identity | {"baselines": digest(self.compared)}

    @contextmanager
    def loaded(self, scratch: Path) -> Iterator[LoadedMerge]:
        """The model of the first candidate, to be turned into the others."""
        dtype = self.settings.data.dtype if self.settings.data else "float32"
        self.model = load_merge(self.workshop, self.first, dtype, scratch)
        self.scorer.select = can_select(self.model.model)
        try:
            yield self.model
        finally:
            self.model = None

    def measure(self, config: Mapping[str, Any], half: Any) -> Measured:
        """Merge in memory and score. Raises AnabranchError."""
        assert self.model is not None
        model = self.model.become(config)
        found = self.scorer.measure(model, self.model.tokenizer, half)
        score = score_of(self.objectives, found).score
        if not abs(score) < WORST:
            raise RecipeError(f"its score is {score}: the merged model gives no usable probabilities")
        return found


def prepare_search(space: Path | str | Mapping[str, Any], out: Path | str | None = None, *, allow_benchmarks: bool = False,
                   memory: str | None = None, threads: int | None = None, device: str = "cpu",
                   overrides: Mapping[str, Any] | None = None, say: Say = lambda _: None) -> Job:
    """Read and check all that a search needs; nothing is written. Arguments and errors as `search`."""
    settings = read_search(space, allow_benchmarks=allow_benchmarks, overrides=overrides)
    home = Path(space).resolve().parent if isinstance(space, (str, Path)) else Path.cwd()
    folders = (Path.cwd(), home)
    made = space_of(settings, folders)
    first = made.config(made.first)
    engine = settings_for(memory, threads, device)
    workshop = Workshop(folders, replace(engine, fused=True), Room(0))
    merge = workshop.planned(first)
    dtype = settings.data.dtype if settings.data else "float32"
    needs = needs_of(merge, dtype, engine.memory)
    workshop.room.left = needs.kept
    for warning in workshop.warnings:
        say(f"warning: {warning}")
    donor = merge.opened[config_of(first, folders=folders).models.index(config_of(first, folders=folders).donor)].folder
    halves, run = _rows(settings, donor, home, say)
    objectives = objectives_of(settings, sorted(halves.searched))
    if settings.sampler == "nsga2" and len(objectives) < 2:
        raise RecipeError("sampler nsga2 is for several objectives, and there is one. Give `objectives`, or `sampler: tpe`.")
    tasks = _tasks(settings, home)
    scorer = Scorer(objectives, {"searched": halves.searched, "guard": halves.guard},
                    (settings.data and settings.data.batch_tokens) or usual_batch(), False, tasks)
    compared, missing = baselines(first, folders, settings.token_weights, run)
    identity = identity_of(settings, made, merge, workshop, halves, tasks)
    sampler_for(settings, made, len(objectives))  # is its library there?
    return Job(settings, made, first, workshop, needs, halves, objectives, scorer, compared, missing, identity)


def _rows(settings: SearchSettings, donor: Path, home: Path, say: Say) -> tuple[Halves, dict[Path, float]]:
    """Both halves, and the weights of the branches of the run that they are of."""
    if settings.data is None:
        return Halves({}, {}, 0, ()), {}
    tokenizer = load_tokenizer(donor)
    halves, run = read_halves(settings.data, tokenizer, home, load_vision(donor)), {}
    for told in halves.told:
        say(told)
    if (said := settings.data.mixture) is not None:
        mixture = mixture_folder(said, home)
        run = run_weights(mixture)
        made_by = Mixture.load(mixture / "mixture.json").made_from.get("tokenizer")
        if made_by is not None and getattr(tokenizer, "is_fast", False) and made_by != tokenizer_hash(tokenizer):
            say(f"warning: the rows of {said} were made by another tokenizer than that of {donor}: their tokens may mean "
                "others there")
    return halves, run


def space_of(settings: SearchSettings, folders: Sequence[Path]) -> Space:
    """Raises RecipeError; ModelError where the genome's first model is not to be had, as its depth is needed."""
    if settings.genome is None:
        return template_space(settings.parameters or {}, settings.merge or {})
    depth = _depth(settings.genome, folders)
    return genome_space(settings.genome, depth, settings.seed if settings.random_init else None)


def _depth(genome: GenomeSetting, folders: Sequence[Path]) -> int:
    entries = [{"model": model} for model in genome.models]
    config = config_of({"merge_method": "karcher", "models": entries}, source="genome.models",
                       folders=folders)
    reference = config.models[0]
    layers = layout_of(Checkpoint.open(resolve(reference.path, reference.revision))).layers
    counts = [n for n in layers.values() if n]
    if len(counts) != 1:
        raise RecipeError(f"genome: {reference} has {len(counts)} stacks of layers, and a genome is of models with one. Write "
                          "a `merge:` template with `modules`.")
    return counts[0]


def _tasks(settings: SearchSettings, home: Path) -> TaskScorer | None:
    if not settings.tasks:
        return None
    place = None
    if settings.task_path is not None:
        place = next((p for p in (Path.cwd() / settings.task_path, home / settings.task_path) if p.is_dir()), None)
        if place is None:
            raise RecipeError(f"task_path: {settings.task_path}: no such folder.")
    return TaskScorer(settings.tasks, place, settings.limit, settings.num_fewshot, settings.shuffle, settings.batch_size,
                      settings.apply_chat_template, settings.fewshot_as_multiturn)


def records_for(space: Path | str | Mapping[str, Any], out: Path | str | None) -> Path:
    """The folder of journal, results and pictures."""
    if out is not None:
        place = place_for(out)
        return place.with_name(place.name + ".search")
    if isinstance(space, Mapping):
        return Path.cwd() / "search"
    return Path(space).resolve().with_suffix(".search")


@contextmanager
def _folder(records: Path) -> Iterator[None]:
    try:
        records.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(f"{records}: cannot be written ({error.strerror or error}). Free space or choose another OUT; the "
                          "journal is kept.") from error


# --- candidates ---


def _search(job: Job, journal: Journal, records: Path, progress: Tell | None) -> tuple[int, float] | None:
    """Ask, merge, score and tell until both arms have their budget. (Candidates, seconds) of this call."""
    keep_buffers()
    arms: dict[str, Sampler] = {"search": sampler_for(job.settings, job.space, len(job.objectives))}
    if job.settings.sampler != "random":
        arms["random"] = RandomSampler(job.space, job.settings.seed)
    done = {arm: _replayed(job, sampler, journal.of(arm), arm) for arm, sampler in arms.items()}
    budget = job.settings.budget
    within = [line for line in journal.lines if line.n < budget]
    best = best_of(within)
    if best is not None:
        _write_best(job, best.vector, records)
    begun, count = time.monotonic(), 0
    total = budget * len(arms)
    while open_arms := [arm for arm in arms if done[arm] < budget]:
        arm = min(open_arms, key=lambda name: done[name])  # in turn, so that both are told of at any time
        line = _candidate(job, arm, done[arm], arms[arm].ask())
        journal.add(line)
        within.append(line)
        _tell(job, arms[arm], line)
        done[arm], count = done[arm] + 1, count + 1
        best = best_of(within)
        if best is line:
            _write_best(job, line.vector, records)
        if progress is not None:
            rate = count / max(time.monotonic() - begun, 1e-9)
            progress(Progress(sum(done.values()), total, arm, line.score, best.score if best else None, 60 * rate,
                              (total - sum(done.values())) / rate, line.failed))
    return (count, time.monotonic() - begun) if count else None


def _candidate(job: Job, arm: str, n: int, vector: list[Any]) -> Line:
    begun = time.monotonic()
    try:
        score: Score | None = score_of(job.objectives, job.measure(job.space.config(vector), "searched"))
        failed = None
    except OutputError:
        raise  # of the disk, not of the candidate
    except FAILURES as error:
        score, failed = None, str(error).strip()[:500]
    seconds = round(time.monotonic() - begun, 3)
    if score is None:
        return Line(arm, n, vector, None, {}, {}, seconds, failed)
    return Line(arm, n, vector, score.score, score.objectives, score.units, seconds)


def _tell(job: Job, sampler: Sampler, line: Line) -> None:
    if line.score is None:
        sampler.tell(WORST, [WORST] * len(job.objectives))
    else:
        sampler.tell(line.score, [(1 if o.lower else -1) * line.objectives[o.name] for o in job.objectives])


def _replayed(job: Job, sampler: Sampler, lines: Sequence[Line], arm: str) -> int:
    """Bring a sampler to where the journal left it."""
    for n, line in enumerate(lines):
        if n >= job.settings.budget:
            break
        asked = sampler.ask()
        if line.n != n or asked != line.vector:
            raise CorruptedError(f"journal: candidate {n} of {arm} is {line.vector}, and this search would have asked for "
                                 f"{asked}. It was written by other versions of the libraries, or changed. Choose another OUT.")
        _tell(job, sampler, line)
    return min(len(lines), job.settings.budget)


def _write_best(job: Job, vector: Sequence[Any], records: Path) -> None:
    config = absolute(job.space.config(vector), job.workshop.folders)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
    if not (records / BEST).is_file() or (records / BEST).read_bytes() != text:
        write_atomically(records / BEST, text)


# --- the verdict ---


def _judge(job: Job, journal: Journal, say: Say) -> SearchOutcome:
    """Score the best, random search's best, the front and the baselines on both halves."""
    budget = job.settings.budget
    arms = {arm: [line for line in journal.of(arm) if line.n < budget] for arm in ("search", "random")}
    best = best_of([*arms["search"], *arms["random"]])
    failed = _failures([*arms["search"], *arms["random"]])
    if best is None:
        raise RecipeError.of("no candidate could be merged and scored:", [f"{n} x {why}" for why, n in failed.items()])
    other = best_of(arms["random"]) if job.settings.sampler != "random" else None
    configs = {"best": job.space.config(best.vector)}
    if other is not None and other is not best:
        configs["best of random search"] = job.space.config(other.vector)
    elif other is best and (own := best_of(arms["search"])) is not None:
        configs[f"best of {job.settings.sampler}"] = job.space.config(own.vector)
    configs |= job.compared
    found, left_out = {}, dict(job.missing)
    for name, config in configs.items():
        try:
            found[name] = job.measure(config, "searched"), job.measure(config, "guard")
        except OutputError:
            raise
        except FAILURES as error:
            if name == "best":
                raise
            left_out[name] = str(error).splitlines()[0] if len(str(error)) > 300 else str(error)
    scores = _scores(job, found)
    front = pareto([*arms["search"], *arms["random"]], job.objectives)
    front_guard = [score_of(job.objectives, job.measure(job.space.config(line.vector), "guard")).objectives
                   for line in front[:FRONT]]
    by_name = {score.name: score for score in scores}
    overfit = {}
    if UNIFORM in by_name:
        gains = {half: getattr(by_name[UNIFORM], half) - getattr(scores[0], half) for half in ("searched", "guard")}
        overfit = gains | {"gap": gains["searched"] - gains["guard"]}
    for name, why in left_out.items():
        say(f"not compared with {name}: {why}")
    evaluated = _evaluated(job, best)
    return SearchOutcome(
        made_from=job.made_from, sampler=job.settings.sampler, seed=job.settings.seed, budget=budget,
        dimensions=[d.words for d in job.space.dimensions],
        objectives={o.name: "lower" if o.lower else "higher" for o in job.objectives},
        searched_rows=sum(map(len, job.halves.searched.values())), guard_rows=sum(map(len, job.halves.guard.values())),
        best=evaluated, random_best=_evaluated(job, other) if other is not None else None,
        curve={arm: best_so_far(lines) for arm, lines in arms.items() if lines}, failed=failed,
        front=[_evaluated(job, line) for line in front], front_guard=front_guard, scores=scores, left_out=left_out,
        overfit=overfit, verdict=verdict(scores, evaluated, overfit, len(job.objectives) > 1))


def _scores(job: Job, found: Mapping[str, tuple[Measured, Measured]]) -> list[GuardScore]:
    best = found["best"][1]
    return [guard_score(name, score_of(job.objectives, searched).score, score_of(job.objectives, guard),
                        None if name == "best" else difference(job.objectives, best, guard))
            for name, (searched, guard) in found.items()]


def _evaluated(job: Job, line: Line) -> Evaluated:
    assert line.score is not None
    names = [d.name for d in job.space.dimensions]
    arm: Any = line.arm
    return Evaluated(arm=arm, n=line.n, parameters=dict(zip(names, line.vector, strict=True)), score=line.score,
                     objectives=line.objectives)


def _failures(lines: Sequence[Line]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in lines:
        if line.failed is not None:
            found[line.failed] = found.get(line.failed, 0) + 1
    return found


def _draw(outcome: SearchOutcome, journal: Journal, job: Job, records: Path) -> None:
    from anabranch.report.mergeability_figures import save_picture
    from anabranch.search.figures import pareto_picture, progress_picture

    save_picture(progress_picture(outcome, journal.lines), records / "progress.png")
    if len(job.objectives) > 1:
        save_picture(pareto_picture(outcome, journal.lines), records / "pareto.png")


# --- before it begins ---


def forecast(space: Path | str | Mapping[str, Any], out: Path | str | None = None, **given: Any) -> list[str]:
    """`--dry-run`: the space, memory, rows, and what a candidate takes, measured on one. Arguments and errors as `search`."""
    job = prepare_search(space, out, **given)
    records = records_for(space, out)
    _check_free(place_for(out) if out is not None else None, records)
    scratch = next(p for p in records.parents if p.is_dir())
    begun = time.monotonic()
    with job.loaded(scratch) as model:
        loading = time.monotonic() - begun
        line = _candidate(job, "search", 0, job.space.first)  # reads the inputs
        begun = time.monotonic()
        _candidate(job, "search", 0, job.space.first)
        seconds = time.monotonic() - begun
        direct = model.direct
    arms = 1 if job.settings.sampler == "random" else 2
    total = job.settings.budget * arms
    return [
        f"space: {len(job.space.dimensions)} dimensions", *(f"  {d.words}" for d in job.space.dimensions),
        f"objectives: {', '.join(f'{o.name} (' + ('lower' if o.lower else 'higher') + ' is better)' for o in job.objectives)}",
        f"rows: {sum(map(len, job.halves.searched.values()))} searched, {sum(map(len, job.halves.guard.values()))} kept for "
        f"the end, {len(job.halves.searched)} units" if job.halves.searched else "rows: of tasks",
        f"memory: {job.needs.words}",
        *([] if direct else ["the architecture is stored under other names than transformers': each candidate goes through a "
                             "folder, which is slower"]),
        f"the first candidate: {'failed: ' + str(line.failed) if line.failed else f'score {line.score:.4f}'}",
        f"time: {loading:.1f} s to load, {seconds:.2f} s for a candidate ({60 / seconds:.1f} a minute), {total} candidates "
        f"({job.settings.budget} of {job.settings.sampler}{', as many of random search' if arms == 2 else ''}): about "
        f"{loading + total * seconds:.0f} s, and {2 * len(job.compared)} more scores at the end",
        f"baselines: {', '.join(job.compared)}" + "".join(f"; not {name}: {why}" for name, why in job.missing.items()),
        f"writes: {records} (journal, {BEST}, {RESULTS}, pictures)" + (f"; {out} (the best, merged)" if out else "")]
