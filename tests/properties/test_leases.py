"""The lease protocol under every order of events that hypothesis can think of: one result, no clock, nobody locked out."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CorruptedError
from anabranch.store import leases
from anabranch.store.artifacts import Beat, Checkpoint, End, FileRef, Result, StoredBase, StoredRun
from anabranch.store.leases import Done, GivenUp, Held, Lease, Watch

REF = FileRef(sha256="0" * 64, size=1)


class Table:
    """A store in memory. `stale`: listings as they were when that many writes fewer had been made."""

    def __init__(self, stale: int = 0) -> None:
        self.files: dict[str, bytes] = {}
        self.order: list[str] = []
        self.stale = stale

    def create(self, name: str, data: bytes) -> bool:
        if name in self.files:
            return False
        self.files[name] = data
        self.order.append(name)
        return True

    def replace(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def read(self, name: str, limit: int = 0) -> bytes | None:
        return self.files.get(name)

    def names(self, folder: str) -> list[str]:
        seen = self.order[: max(0, len(self.order) - self.stale)]
        return sorted(n.removeprefix(folder + "/") for n in seen if n.startswith(folder + "/"))


def stored_run(retries: int = 3, lease_seconds: float = 60.0) -> StoredRun:
    return StoredRun(recipe={}, base=StoredBase(hash="b"), mixture={"mixture/mixture.json": REF},
                     jobs={"plan": [], "branch-0": ["plan"], "branch-1": ["plan"], "merge": ["branch-0", "branch-1"]},
                     lease_seconds=lease_seconds, retries=retries)


def result(run: StoredRun, lease: Lease, worker: str, content: bytes = b"same") -> Result:
    ref = FileRef(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    return Result(job=lease.job, run=run.hash, attempt=lease.attempt, worker=worker, files={"plan.json": ref})


def test_a_second_worker_waits_then_takes_over_a_silent_one_by_its_own_clock():
    store, run, mine, theirs = Table(), stored_run(), Watch(), Watch()
    first = leases.take(store, run, "plan", "a", mine, now=1e9)  # its clock is elsewhere: nobody may compare it
    assert first == Lease("plan", 0)
    assert leases.renew(store, first, Beat(count=0))
    assert isinstance(leases.take(store, run, "plan", "b", theirs, now=5.0), Held)
    assert leases.renew(store, first, Beat(count=1))
    assert leases.take(store, run, "plan", "b", theirs, now=64.0).silent == 0.0
    held = leases.take(store, run, "plan", "b", theirs, now=123.9)
    assert isinstance(held, Held) and held.silent == pytest.approx(59.9)
    assert leases.take(store, run, "plan", "b", theirs, now=124.0) == Lease("plan", 1)
    assert not leases.renew(store, first, Beat(count=2))  # the first, come back, is told
    assert leases.end_of(store, "plan", 0, Watch()).reason == "lost"


def test_a_holder_that_never_sent_a_beat_is_given_the_same_time():
    store, run, watch = Table(), stored_run(), Watch()
    leases.take(store, run, "plan", "a", Watch(), now=0.0)
    assert isinstance(leases.take(store, run, "plan", "b", watch, now=0.0), Held)
    assert isinstance(leases.take(store, run, "plan", "b", watch, now=59.0), Held)
    assert leases.take(store, run, "plan", "b", watch, now=60.0) == Lease("plan", 1)


def test_the_first_result_stands_and_other_bytes_are_kept_beside_it():
    store, run = Table(), stored_run()
    a, b, c = Lease("plan", 0), Lease("plan", 1), Lease("plan", 2)
    assert leases.publish(store, run, result(run, a, "a")).worker == "a"
    assert leases.publish(store, run, result(run, b, "b")).worker == "a"
    assert not any("rival" in name for name in store.files)
    assert leases.publish(store, run, result(run, c, "c", b"other")).worker == "a"
    assert "jobs/plan/rival-0002.json" in store.files


def test_a_result_copied_from_another_run_or_job_is_refused():
    store, run, other = Table(), stored_run(), stored_run(retries=4)
    store.create("results/plan.json", result(other, Lease("plan", 0), "a").model_dump_json().encode())
    with pytest.raises(CorruptedError, match="of run"):
        leases.take(store, run, "plan", "b", Watch(), 0.0)
    store.create("results/merge.json", result(run, Lease("plan", 0), "a").model_dump_json().encode())
    with pytest.raises(CorruptedError, match="result of plan"):
        leases.take(store, run, "merge", "b", Watch(), 0.0)


@pytest.mark.parametrize(("reason", "given_up_after"), [("failed", 4), ("lost", 40), ("preempted", None)])
def test_failures_end_a_job_losses_slowly_preemptions_never(reason, given_up_after):
    store, run = Table(), stored_run(retries=3)
    for attempt in range(60):
        outcome = leases.take(store, run, "plan", "a", Watch(), 0.0)
        if isinstance(outcome, GivenUp):
            assert attempt == given_up_after
            assert outcome.why == f"{reason} {attempt - 1}"
            return
        leases.let_go(store, outcome, End(attempt=outcome.attempt, reason=reason, message=f"{reason} {attempt}"))
    assert given_up_after is None


def test_a_job_that_gets_further_each_time_is_not_given_up():
    store, run = Table(), stored_run(retries=1)
    for attempt in range(12):
        lease = leases.take(store, run, "branch-0", "a", Watch(), 0.0)
        assert isinstance(lease, Lease)
        if attempt < 9:
            checkpoint = Checkpoint(job="branch-0", attempt=attempt, step=10 * attempt, files={"branches/0/x.json": REF})
            store.create(leases.checkpoint_file("branch-0", attempt, 10 * attempt), checkpoint.model_dump_json().encode())
        leases.let_go(store, lease, End(attempt=attempt, reason="failed", message="boom"))
        if attempt == 9:  # two failures since step 80 was reached (attempt 8's own, and this one)
            break
    assert isinstance(leases.take(store, run, "branch-0", "a", Watch(), 0.0), GivenUp)


def test_needs_come_first():
    run, done = stored_run(), {"plan"}
    assert leases.ready(run, run.jobs, done.__contains__) == ["branch-0", "branch-1"]
    assert leases.ready(run, run.jobs, lambda job: False) == ["plan"]


EVENTS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["take", "beat", "finish", "fail", "die", "wait"]),
                            st.floats(0.0, 40.0)), max_size=80)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, stale=st.integers(0, 5), skew=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4))
def test_any_order_of_events(events, stale, skew):
    """Four workers, clocks millions of seconds apart, listings that are behind. Each time a lease is given while another
    worker believes to hold the job, that holder had been silent for lease_seconds or had said its end."""
    store, run = Table(stale), stored_run(retries=1000)
    watches, held, now, spoke = [Watch() for _ in range(4)], {}, 0.0, {}
    standing = None
    for worker, event, seconds in events:
        now += seconds
        lease = held.get(worker)
        if event == "take" and lease is None:
            outcome = leases.take(store, run, "plan", f"w{worker}", watches[worker], now + skew[worker])
            if isinstance(outcome, Lease):
                assert standing is None, "a job that is done was given out again"
                for other, theirs in held.items():
                    assert outcome.attempt > theirs.attempt
                    assert now - spoke[other] >= run.lease_seconds - 1e-6, "a live holder lost its job"
                held[worker], spoke[worker] = outcome, now
            elif isinstance(outcome, Done):
                assert outcome.result == standing
        elif lease is None:
            continue
        elif event == "beat":
            if not leases.renew(store, lease, Beat(count=int(now * 1e6))):
                del held[worker]
            else:
                spoke[worker] = now
        elif event == "finish":
            published = leases.publish(store, run, result(run, lease, f"w{worker}", f"{worker}".encode()))
            assert standing in (None, published), "a result was replaced"
            standing = published
            leases.let_go(store, lease, End(attempt=lease.attempt, reason="done"))
            del held[worker]
        elif event in ("fail", "die"):
            if event == "fail":
                leases.let_go(store, lease, End(attempt=lease.attempt, reason="failed"))
            del held[worker]
    # nobody is locked out: a newcomer that looks twice, a lease apart, gets the job or its result
    watch = Watch()
    for _ in range(3):
        outcome = leases.take(store, run, "plan", "late", watch, now)
        now += run.lease_seconds
    assert isinstance(outcome, Done if standing else Lease | Held)
    if standing is None:
        assert any("late" in store.files[name].decode() for name in store.files if "claim" in name)
