"""A look at a store: what each job of a run is at, who holds it, how fast, and when all of it will be done.

Nothing is written and nothing is claimed. One look tells what the files say; whether a holder lives is only known after a
second look, as no clock of another machine is read (leases.py). Workers that hold no job leave no trace, and are not seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from anabranch.artifacts import Part, Plan
from anabranch.errors import AnabranchError, CorruptedError, printable
from anabranch.finish import Finish, Work, duration, finish_words, predict_finish
from anabranch.store import leases
from anabranch.store.artifacts import Beat, Claim, End, StoredRun
from anabranch.store.leases import StateStore, Watch

State = Literal["waiting", "free", "held", "done", "failed", "damaged"]
READERS = 8  # jobs looked at at the same time: a look at a bucket is mostly waiting
LOG_LINES = 10  # of the last failure of a job that was given up
Shown = Annotated[str, AfterValidator(printable)]  # other machines wrote it, and a terminal will show it
SHOWN = 4  # jobs of a kind that are in the same plain state are told one by one up to here


class JobStatus(Part):
    """One job as the store shows it. Figures of work are the latest that its holder, present or last, told."""

    job: str
    state: State
    waits_for: list[str] = Field([], description="jobs that must be done before it can be taken")
    worker: Shown | None = Field(None, description="the holder, present or last")
    attempt: int | None = Field(None, description="from 0; null: nobody ever took it")
    doing: Shown = ""
    step: int = 0
    steps: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    loss: float | None = None
    silent: float | None = Field(None, description="seconds since its beat was seen to change; null before a second look")
    lost: bool = Field(False, description="silent for longer than the lease: whoever asks next gets the job")
    failures: int = 0
    preemptions: int = 0
    losses: int = Field(0, description="attempts whose holder vanished")
    problem: Shown = Field("", description="the last failure, with the end of its log; of a damaged state file, what is wrong "
                                           "with it")


class RunStatus(Part):
    """A look at a store."""

    where: str
    run: str = Field(description="hash of run.json")
    jobs: list[JobStatus]
    workers: list[str] = Field(description="that hold a job and have not been silent for longer than the lease")
    seconds_left: float | None = Field(description="until all is done that can be; a lower bound where `unknown` names jobs; "
                                                   "null: not known")
    unknown: list[str] = Field(description="jobs of which no time is known, not in `seconds_left`")
    blocked: list[str] = Field(description="jobs that will not be done: they, or what they need, have failed")

    @property
    def finished(self) -> bool:
        """Nothing more will happen without somebody's doing: all is done, or all that is left has failed."""
        return all(j.state == "done" or j.job in self.blocked for j in self.jobs)

    def as_json(self) -> str:
        return json.dumps({**self.model_dump(mode="json"), "finished": self.finished}, ensure_ascii=False)

    def lines(self) -> list[str]:
        """For people."""
        count = Counter(j.state for j in self.jobs)
        said = ", ".join(f"{count[state]} {state}" for state in ("done", "held", "free", "waiting", "failed", "damaged")
                         if count[state])
        lines = [f"run {self.run[:12]} at {self.where}: {len(self.jobs)} jobs: {said}"]
        plain = Counter((_kind(j.job), j.state) for j in self.jobs if _is_plain(j))
        told = set()
        for job in self.jobs:
            group = (_kind(job.job), job.state)
            if not _is_plain(job) or plain[group] <= SHOWN:
                lines += [f"{job.job:<20} {_words(job)}", *_log_end(job)]
            elif group not in told:
                told.add(group)
                of_kind = sum(_kind(j.job) == group[0] for j in self.jobs)
                lines.append(f"{group[0] + ', ' + str(plain[group]) + ' of ' + str(of_kind):<20} {job.state}")
        if count["done"] == len(self.jobs):
            return [*lines, "finish     all is done"]
        finish = Finish(self.seconds_left, tuple(self.unknown), tuple(self.blocked))
        seen = {0: "", 1: "the one worker that holds a job"}.get(len(self.workers), f"the {len(self.workers)} workers at work")
        lines += finish_words(finish, seen)
        if any(j.state == "held" and j.silent is None for j in self.jobs):
            lines.append("           (whether a holder lives shows at a second look: --watch)")
        return lines


def _kind(job: str) -> str:
    return job.rstrip("0123456789").rstrip("-")


def _is_plain(job: JobStatus) -> bool:
    """Nothing but its state is worth telling."""
    return job.state in ("done", "free", "waiting") and not (job.failures or job.preemptions or job.losses)


def _words(job: JobStatus) -> str:
    parts: list[str] = [job.state]
    if job.state == "waiting":
        parts = [f"waiting for {', '.join(job.waits_for[:4])}" + (" .." if len(job.waits_for) > 4 else "")]
    elif job.worker and job.state in ("held", "done"):
        parts = [f"{job.state} by {job.worker}" + (f", attempt {job.attempt + 1}" if job.attempt else "")]
    if job.state == "held":
        parts += [job.doing] if job.doing else []
        parts += [f"step {job.step:,} of {job.steps:,}"] if job.steps else []
        parts += [f"{job.tokens_per_second:,.0f} tokens/s"] if job.tokens_per_second else []
        parts += [f"loss {job.loss:.3f}"] if job.loss is not None else []
        parts += [f"{duration(job.seconds_left)} left"] if job.seconds_left is not None else []
        parts += [f"silent for {duration(job.silent or 0.0)}: lost, whoever asks next gets it"] if job.lost else []
    for number, one, many in ((job.failures, "failure", "failures"), (job.preemptions, "preemption", "preemptions"),
                              (job.losses, "holder lost", "holders lost")):
        parts += [f"{number} {one if number == 1 else many}"] if number else []
    told = job.problem.splitlines()[0][:400] if job.state == "damaged" and job.problem else _last_line(job.problem)
    return ", ".join(parts) + (f": {told}" if told else "")


def _log_end(job: JobStatus) -> list[str]:
    """More of what went wrong, where somebody must mend it."""
    lines = [line.rstrip()[:200] for line in job.problem.splitlines() if line.strip()]
    return [f"    {line}" for line in lines[-LOG_LINES:]] if job.state in ("failed", "damaged") and len(lines) > 1 else []


@dataclass
class Sight:
    """What an observer keeps between looks: what never changes is read once, and beats are held against the last look's."""

    watch: Watch = field(default_factory=Watch)
    claims: dict[tuple[str, int], Claim] = field(default_factory=dict)
    last_beats: dict[str, Beat | None] = field(default_factory=dict)  # of done jobs
    tokens: dict[str, float] = field(default_factory=dict)  # branch-k -> tokens that it will see


def store_status(store: StateStore, run: StoredRun, sight: Sight, now: float, where: str = "") -> RunStatus:
    """One look at every job of a run.

    Args:
        store: a store/files.py Store.
        sight: the same one at every look.
        now: this machine's monotonic clock, seconds.
    Raises:
        OutputError: the store does not answer.
    """
    done, damaged = _finished(store, run, sight)
    with ThreadPoolExecutor(READERS) as readers:
        jobs = list(readers.map(lambda job: _look(store, run, job, sight, now, done, damaged), run.jobs))
    _read_plan(store, run, sight)
    works = _works(run, jobs, sight)
    workers = sorted({j.worker for j in jobs if j.state == "held" and j.worker and not j.lost})
    finish = predict_finish(works, len(workers))
    return RunStatus(where=where, run=run.hash, jobs=jobs, workers=workers, seconds_left=finish.seconds,
                     unknown=list(finish.unknown), blocked=list(finish.blocked))


def _finished(store: StateStore, run: StoredRun, sight: Sight) -> tuple[set[str], dict[str, str]]:
    """The jobs that are done, and those whose result cannot be taken, with why."""
    try:
        return leases.finished(store, run, sight.watch), {}
    except CorruptedError:
        done, damaged = set(), {}
        for job in run.jobs:
            try:
                done |= {job} if leases.result_of(store, run, job, sight.watch) is not None else set()
            except CorruptedError as error:
                damaged[job] = str(error)
        return done, damaged


def _look(store: StateStore, run: StoredRun, job: str, sight: Sight, now: float, done: set[str],
          damaged: dict[str, str]) -> JobStatus:
    """One job. One that waits for others costs no request: nobody can have taken it."""
    if job in damaged:
        return JobStatus(job=job, state="damaged", problem=damaged[job])
    try:
        if job in done:
            return _done(store, job, sight)
        if lacking := [need for need in run.jobs[job] if need not in done]:
            return JobStatus(job=job, state="waiting", waits_for=lacking)
        return _open(store, run, job, sight, now)
    except CorruptedError as error:
        return JobStatus(job=job, state="damaged", problem=str(error))


def _open(store: StateStore, run: StoredRun, job: str, sight: Sight, now: float) -> JobStatus:
    """A job that is not done and needs nothing: free, held or failed."""
    before = sight.watch.beats.get(job)
    attempt = leases.latest_attempt(store, job, sight.watch)
    if attempt < 0:
        return JobStatus(job=job, state="free")
    counts = _ends(store, job, attempt, sight.watch)
    claim, end = _claim(store, job, attempt, sight), leases.end_of(store, job, attempt, sight.watch)
    if end is not None and end.reason == "done" and leases.result_of(store, run, job, sight.watch) is not None:
        return _done(store, job, sight)  # since the results were listed
    held = leases.look_at(store, job, attempt, sight.watch, now)
    told: dict[str, Any] = {"job": job, "worker": claim.worker, "attempt": attempt, **counts, **_figures(held.beat)}
    if end is None:
        known = before is not None and before[0] == attempt  # else this is the first look at this holder
        return JobStatus(**told, state="held", silent=held.silent if known else None,
                         lost=known and held.silent >= run.lease_seconds)
    given_up = leases.judge_failures(store, run, job, attempt, sight.watch)
    failed = end.reason == "failed" or given_up is not None
    return JobStatus(**told, state="free" if given_up is None else "failed", problem=end.message.strip() if failed else "")


def _done(store: StateStore, job: str, sight: Sight) -> JobStatus:
    result = sight.watch.results[job]
    if job not in sight.last_beats:
        data = store.read(leases.file_of(job, "beat", result.attempt))
        sight.last_beats[job] = None
        with contextlib.suppress(CorruptedError):  # it is done: what its last beat was is a figure, no more
            sight.last_beats[job] = leases.parse(Beat, data, job) if data is not None else None
    return JobStatus(job=job, state="done", worker=result.worker, attempt=result.attempt,
                     **_figures(sight.last_beats[job]) | {"seconds_left": 0.0, "doing": ""})


def _figures(beat: Beat | None) -> dict[str, Any]:
    names = ("doing", "step", "steps", "tokens", "tokens_per_second", "seconds_left", "loss")
    told = {name: getattr(beat, name) for name in names} if beat is not None else {}
    return {name: value for name, value in told.items() if not isinstance(value, float) or math.isfinite(value)}


def _claim(store: StateStore, job: str, attempt: int, sight: Sight) -> Claim:
    if (job, attempt) not in sight.claims:
        where = leases.file_of(job, "claim", attempt)
        data = store.read(where)
        if data is None:
            raise CorruptedError(f"{where}: listed, and not there.")
        claim = leases.parse(Claim, data, where)
        if (claim.job, claim.attempt) != (job, attempt):
            raise CorruptedError(f"{where}: it says it is attempt {claim.attempt} of {claim.job}. Somebody copied it there.")
        sight.claims[job, attempt] = claim
    return sight.claims[job, attempt]


def _ends(store: StateStore, job: str, attempt: int, watch: Watch) -> dict[str, int]:
    """How earlier attempts ended. One that was superseded without an end was lost."""
    ends: list[End | None] = [leases.end_of(store, job, n, watch) for n in range(attempt + 1)]
    reasons = Counter(end.reason if end is not None else "lost" for end in ends[:-1])
    reasons.update([ends[-1].reason] if ends[-1] is not None else [])
    return {"failures": reasons["failed"], "preemptions": reasons["preempted"], "losses": reasons["lost"]}


def _last_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _read_plan(store: StateStore, run: StoredRun, sight: Sight) -> None:
    """How many tokens each branch will see, once there is a plan: what is not begun is judged by it."""
    result = sight.watch.results.get("plan")
    ref = result.files.get("plan.json") if result is not None else None
    if sight.tokens or ref is None:
        return
    with contextlib.suppress(AnabranchError, ValueError):  # no plan that can be read: less is known, and that is said
        data = store.read(f"objects/{ref.sha256[:2]}/{ref.sha256}")
        if data is not None and hashlib.sha256(data).hexdigest() == ref.sha256:
            sight.tokens = branch_tokens(Plan.model_validate_json(data), run.recipe)


def branch_tokens(plan: Plan, recipe: dict[str, Any]) -> dict[str, float]:
    """branch-k -> tokens that its training sees, all passes; {} if the recipe does not say it in a number."""
    train = recipe.get("train") or {}
    passes = train.get("num_train_epochs", 1) if isinstance(train, dict) else None
    if not isinstance(passes, int | float) or not 0 < passes < math.inf:
        return {}
    return {f"branch-{g.group}": g.tokens * passes for g in plan.groups}


def _works(run: StoredRun, jobs: Sequence[JobStatus], sight: Sight) -> list[Work]:
    whole = _whole_times(jobs, sight.tokens)
    return [Work(j.job, tuple(run.jobs[j.job]), done=j.state == "done", running=j.state == "held" and not j.lost,
                 seconds=_time_left(j, whole.get(j.job)), never=j.state in ("failed", "damaged")) for j in jobs]


def _time_left(job: JobStatus, whole: float | None) -> float | None:
    """Of a job that was begun, as its holder told; of another, all of it. A lost or preempted one goes on from a checkpoint,
    so what was left at its last word is a little too short."""
    if job.state == "held" or (job.seconds_left is not None and job.seconds_left > 0):
        return job.seconds_left
    return whole


def _whole_times(jobs: Sequence[JobStatus], tokens: dict[str, float]) -> dict[str, float]:
    """Seconds of a whole job, by what is measured of its like: for branches tokens / mean speed, else the mean of the
    projected times. Nothing for kinds of which nothing is measured."""
    speeds = [j.tokens_per_second for j in jobs if _kind(j.job) == "branch" and j.tokens_per_second > 0]
    speed = sum(speeds) / len(speeds) if speeds else 0.0
    times: dict[str, list[float]] = {}
    for j in jobs:
        if j.state == "held" and j.seconds_left is not None and 0 < j.step < j.steps:
            times.setdefault(_kind(j.job), []).append(j.seconds_left * j.steps / (j.steps - j.step))
    whole = {}
    for j in jobs:
        kind = _kind(j.job)
        if kind == "branch" and speed and j.job in tokens:
            whole[j.job] = tokens[j.job] / speed
        elif kind in times and kind != "branch":
            whole[j.job] = sum(times[kind]) / len(times[kind])
    return whole
