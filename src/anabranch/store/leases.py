"""Who works on what: leases made of atomic creates, without a clock that two machines share.

A worker takes a job by creating `claim-n`, n one more than the highest claim there: the store lets one create succeed.
While it works it replaces `beat-n` with another content every lease_seconds / 4. Whoever wants the job looks at that
beat; if it has not changed for lease_seconds *by the looker's own monotonic clock, since the looker first saw it*, the
holder counts as dead and `claim-(n+1)` may be created. No time of day is read or compared, so clocks may be hours
apart; only their rates must agree.

Safety rests on the creates alone. A holder that was taken for dead and comes back, or a store that shows old beats,
costs work done twice, never a result lost or doubled: `results/JOB.json` is created once, and a second finisher compares.

    claim-n ..> beat-n, beat-n, beat-n ..> results/JOB, end-n (done | preempted | failed)
                        silence ..........> claim-(n+1) by another; end-n (lost) is written by the one who took over
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from anabranch.errors import CorruptedError, describe_validation_error
from anabranch.store.artifacts import STATE_LIMIT, Beat, Checkpoint, Claim, End, Result, StoredRun

LOOKS = 48  # of one waiting worker at what others hold, in lease_seconds
AT_ONCE = 8
LOST_IN_VAIN = 10  # losses without a new checkpoint weigh a tenth of a failure: machines vanish, and some jobs kill theirs
ATTEMPTS = 10_000  # of one job; more were not made by workers, and would have to be looked through
SHOWN = 20  # problems of one file
CHECKPOINT = re.compile(r"checkpoint-([0-9]{4,6})-([0-9]{8})\.json")

State = TypeVar("State", bound=BaseModel)


class StateStore(Protocol):
    """What the protocol asks of a store (store/files.py; a table in memory in the simulation)."""

    def create(self, name: str, data: bytes) -> bool: ...
    def replace(self, name: str, data: bytes) -> None: ...
    def read(self, name: str, limit: int = STATE_LIMIT) -> bytes | None: ...
    def names(self, folder: str) -> list[str]: ...


@dataclass(frozen=True)
class Lease:
    """The right to work on a job, as long as beats are sent."""

    job: str
    attempt: int


@dataclass(frozen=True)
class Done:
    result: Result


@dataclass(frozen=True)
class Held:
    """Another works on it; `silent` seconds have passed since its beat was seen to change."""

    attempt: int
    silent: float
    beat: Beat | None


@dataclass(frozen=True)
class GivenUp:
    """It failed too often; `why` is the last failure's message."""

    failures: int
    why: str


Outcome = Lease | Done | Held | GivenUp


@dataclass
class Watch:
    """One observer's memory of beats and of what never changes. Not shared between machines."""

    beats: dict[str, tuple[int, bytes | None, float]] = field(default_factory=dict)  # job -> attempt, beat, seen since
    ends: dict[tuple[str, int], End] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    next_look: dict[str, float] = field(default_factory=dict)  # at a job that another holds


def parse(kind: type[State], data: bytes, where: str) -> State:
    """A state file's content. Raises CorruptedError, also for what JSON's readers disagree about: a key twice, NaN."""
    try:
        parsed = kind.model_validate_json(data)
        json.loads(data, object_pairs_hook=_each_once, parse_constant=_no_number)
        return parsed
    except (ValueError, RecursionError) as error:
        problems = describe_validation_error(error, kind) if isinstance(error, ValidationError) else [str(error)]
        raise CorruptedError.of(f"{where}: not a valid {kind.__name__}; it was damaged, or written by another program:",
                                problems[:SHOWN]) from error


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")


def file_of(job: str, kind: str, attempt: int) -> str:
    """Name of a state file inside the store."""
    return f"jobs/{job}/{kind}-{attempt:04d}.json"


def result_file(job: str) -> str:
    return f"results/{job}.json"


def finished(store: StateStore, run: StoredRun, watch: Watch) -> set[str]:
    """The jobs whose results are listed; one request, and one more for each that is new. A listing may be behind."""
    listed = {name.removesuffix(".json") for name in store.names("results")}
    return {job for job in run.jobs if job in watch.results or (job in listed and result_of(store, run, job, watch))}


def result_of(store: StateStore, run: StoredRun, job: str, watch: Watch) -> Result | None:
    """The result that stands, or None. Raises CorruptedError if it is of another job or run."""
    if job in watch.results:
        return watch.results[job]
    where = result_file(job)
    data = store.read(where)
    if data is None:
        return None
    result = parse(Result, data, where)
    if result.job != job or result.run != run.hash:
        raise CorruptedError(f"{where}: it says it is the result of {result.job} of run {result.run[:12]}, wanted {job} of run "
                             f"{run.hash[:12]}. Somebody copied it there; remove it to have the job done again.")
    watch.results[job] = result
    return result


def latest_attempt(store: StateStore, job: str, watch: Watch) -> int:
    """The highest claim, or -1. A listing may be old: it is where the search begins, not where it ends."""
    known = watch.beats.get(job, (-1, None, 0.0))[0]
    for name in store.names(f"jobs/{job}"):
        if match := re.fullmatch(r"claim-([0-9]{4,6})\.json", name):
            known = max(known, int(match.group(1)))
    while known < ATTEMPTS and store.read(file_of(job, "claim", known + 1)) is not None:
        known += 1
    if known >= ATTEMPTS:
        raise CorruptedError(f"{file_of(job, 'claim', known)}: no job is tried {ATTEMPTS:,} times. Somebody put it there; "
                             "remove it, and its like.")
    return known


def take(store: StateStore, run: StoredRun, job: str, worker: str, watch: Watch, now: float) -> Outcome:
    """Try to get a job whose needs are done.

    Args:
        now: this machine's monotonic clock, seconds.
    Raises:
        CorruptedError: a state file that does not fit.
        OutputError: the store does not answer.
    """
    known = watch.beats.get(job)
    if known is not None and job not in watch.results:  # most looks find a holder that lives: one request tells
        held = look_at(store, job, known[0], watch, now)
        if held.silent < run.lease_seconds / 2:
            return held
    if (result := result_of(store, run, job, watch)) is not None:
        return Done(result)
    attempt = latest_attempt(store, job, watch)
    if attempt >= 0 and end_of(store, job, attempt, watch) is None:
        held = look_at(store, job, attempt, watch, now)
        if held.silent < run.lease_seconds:
            return held
        lost = End(attempt=attempt, reason="lost", message=f"silent for {held.silent:.0f} s as seen by {worker}")
        store.create(file_of(job, "end", attempt), lost.model_dump_json().encode())
    if (given_up := judge_failures(store, run, job, attempt, watch)) is not None:
        return given_up
    claim = Claim(job=job, attempt=attempt + 1, worker=worker, token=secrets.token_hex(16))
    if store.create(file_of(job, "claim", attempt + 1), claim.model_dump_json().encode()):
        watch.beats.pop(job, None)
        return Lease(job, attempt + 1)
    watch.beats[job] = (attempt + 1, None, now)
    return Held(attempt + 1, 0.0, None)


def end_of(store: StateStore, job: str, attempt: int, watch: Watch) -> End | None:
    """How an attempt ended, or None while it has not."""
    if (job, attempt) not in watch.ends:
        where = file_of(job, "end", attempt)
        if (data := store.read(where)) is None:
            return None
        end = parse(End, data, where)
        if end.attempt != attempt:
            raise CorruptedError(f"{where}: it says it is the end of attempt {end.attempt}. Remove it.")
        watch.ends[job, attempt] = end
    return watch.ends[job, attempt]


def look_at(store: StateStore, job: str, attempt: int, watch: Watch, now: float) -> Held:
    where = file_of(job, "beat", attempt)
    data, beat = None, None
    with contextlib.suppress(CorruptedError):  # that it changes is what counts; its figures are for people
        data = store.read(where)
        beat = parse(Beat, data, where) if data is not None else None
    before = watch.beats.get(job)
    if before is None or before[:2] != (attempt, data):
        watch.beats[job] = (attempt, data, now)
    return Held(attempt, now - watch.beats[job][2], beat)


def hopeless(store: StateStore, run: StoredRun, job: str, watch: Watch) -> GivenUp | None:
    """Whether a job that nobody holds was given up. Raises as `take`."""
    attempt = latest_attempt(store, job, watch)
    if attempt >= 0 and end_of(store, job, attempt, watch) is None:
        return None
    return judge_failures(store, run, job, attempt, watch)


def judge_failures(store: StateStore, run: StoredRun, job: str, attempt: int, watch: Watch) -> GivenUp | None:
    """Failures since the job last came further than ever; a loss weighs a tenth of one, a preemption nothing."""
    furthest: dict[int, int] = {}
    if attempt >= run.retries:
        for number, step in checkpoints(store, job):
            furthest[number] = max(step, furthest.get(number, -1))
    best, weight, why = -1, 0.0, ""
    for number in range(attempt + 1):
        end = end_of(store, job, number, watch)
        if furthest.get(number, -1) > best:
            best, weight = furthest[number], 0.0
        if end is not None and end.reason in ("failed", "lost"):
            weight += 1.0 if end.reason == "failed" else 1.0 / LOST_IN_VAIN
            why = end.message
    return GivenUp(round(weight), why) if weight >= run.retries + 1 - 1e-9 else None


def checkpoints(store: StateStore, job: str) -> list[tuple[int, int]]:
    """(attempt, step) of every checkpoint that is listed, furthest first."""
    found = [(int(m.group(1)), int(m.group(2))) for n in store.names(f"jobs/{job}") if (m := CHECKPOINT.fullmatch(n))]
    return sorted(found, key=lambda c: (c[1], c[0]), reverse=True)


def checkpoint_file(job: str, attempt: int, step: int) -> str:
    return f"jobs/{job}/checkpoint-{attempt:04d}-{step:08d}.json"


def read_checkpoint(store: StateStore, job: str, attempt: int, step: int) -> Checkpoint | None:
    """Raises CorruptedError if it says it is another's."""
    where = checkpoint_file(job, attempt, step)
    if (data := store.read(where)) is None:
        return None
    checkpoint = parse(Checkpoint, data, where)
    if (checkpoint.job, checkpoint.attempt, checkpoint.step) != (job, attempt, step):
        raise CorruptedError(f"{where}: it says it is step {checkpoint.step} of {checkpoint.job}, attempt "
                             f"{checkpoint.attempt}.")
    return checkpoint


def renew(store: StateStore, lease: Lease, beat: Beat) -> bool:
    """Say that the holder lives. False: another has taken the job over; stop, what is done is kept by checkpoints."""
    store.replace(file_of(lease.job, "beat", lease.attempt), beat.model_dump_json().encode())
    return store.read(file_of(lease.job, "claim", lease.attempt + 1)) is None


def let_go(store: StateStore, lease: Lease, end: End) -> None:
    """Say how an attempt ended; if another has already said that it was lost, that stands."""
    store.create(file_of(lease.job, "end", lease.attempt), end.model_dump_json().encode())


def publish(store: StateStore, run: StoredRun, result: Result) -> Result:
    """Make a result the job's; the one that stands is returned (another's, if it came first).

    If both were made with the same bytes nothing more happens; if not, ours is kept beside it as `rival-n`, and the
    caller says so: training that is not deterministic gives two good branches of which only one may be merged.
    """
    name = result_file(result.job)
    if store.create(name, result.model_dump_json().encode()):
        return result
    standing = result_of(store, run, result.job, Watch())
    if standing is None:
        raise CorruptedError(f"{name}: created, and not to be read. The store loses files, or shows old listings for reads.")
    if standing.content != result.content:
        store.create(file_of(result.job, "rival", result.attempt), result.model_dump_json().encode())
    return standing


def take_any(store: StateStore, run: StoredRun, ready: Sequence[str], worker: str, watch: Watch, now: float,
             draws: random.Random) -> tuple[Lease | None, dict[str, GivenUp]]:
    """Try the jobs of `ready` in their order until one is to be had; and which of those tried were given up.

    Hundreds of idle workers over some dozen held jobs must not load the store (benchmarks/lease_simulation.py): jobs that
    nobody has claimed yet are tried first (one listing tells), only AT_ONCE held ones are looked at in a call, and each the
    more rarely, the more there are. `draws` spreads looks in time; it decides nothing.
    """
    given_up: dict[str, GivenUp] = {}
    if sum(job not in watch.beats for job in ready) > AT_ONCE:
        claimed = set(store.names("jobs"))
        ready = sorted(ready, key=claimed.__contains__)
    held = 0
    for job in ready:
        if held == AT_ONCE:
            break
        if now < watch.next_look.get(job, now):
            continue
        outcome = take(store, run, job, worker, watch, now)
        if isinstance(outcome, Lease):
            return outcome, given_up
        if isinstance(outcome, GivenUp):
            given_up[job] = outcome
        if isinstance(outcome, Held):
            held += 1
            interval = run.lease_seconds / LOOKS * max(LOOKS / AT_ONCE, len(ready))
            watch.next_look[job] = now + interval * draws.uniform(0.5, 1.5)
    return None, given_up


def ready(run: StoredRun, jobs: Iterable[str], done: Callable[[str], bool]) -> list[str]:
    """Those of `jobs` that are not done and whose needs are."""
    return [job for job in jobs if not done(job) and all(done(need) for need in run.jobs[job])]
