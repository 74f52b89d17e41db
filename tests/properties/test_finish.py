"""The predicted finish: bounds that no schedule can beat, by hand, and what it says of what it does not know."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.finish import Finish, Work, duration, finish_words, predict_finish


@st.composite
def runs(draw: st.DrawFn) -> list[Work]:
    """Jobs in an order where each needs only earlier ones; times are whole, so that sums are exact."""
    works: list[Work] = []
    for i in range(draw(st.integers(1, 12))):
        needs = draw(st.sets(st.sampled_from([w.name for w in works]), max_size=3)) if works else set()
        ready = all(w.done for w in works if w.name in needs)
        state = draw(st.sampled_from(["done", "running", "not begun"])) if ready else "not begun"
        seconds = draw(st.integers(0, 50))
        works.append(Work(f"job-{i}", tuple(sorted(needs)), state == "done", state == "running", float(seconds)))
    return works


def longest_path(works: list[Work]) -> float:
    ends: dict[str, float] = {}
    for w in works:
        ends[w.name] = 0.0 if w.done else (w.seconds or 0.0) + max((ends[n] for n in w.needs), default=0.0)
    return max(ends.values())


@settings(max_examples=300, deadline=None)
@given(runs(), st.integers(1, 5))
def test_between_what_no_schedule_beats_and_one_after_the_other(works, workers):
    left = [w for w in works if not w.done]
    running = sum(w.running for w in left)
    total = sum(w.seconds for w in left)
    found = predict_finish(works, max(workers, running)).seconds
    assert found is not None
    assert max(longest_path(works), total / max(workers, running)) <= found + 1e-9
    assert found <= total + 1e-9
    if max(workers, running) == 1:
        assert found == total
    assert predict_finish(works, len(works) + 1).seconds == longest_path(works)  # a worker for each: the critical path


def test_by_hand():
    """gradients 10 -> plan 1 -> branches 30, 20, 10 by two workers -> merge 5."""
    works = [Work("gradients-0", (), running=True, seconds=10), Work("plan", ("gradients-0",), seconds=1),
             *(Work(f"branch-{k}", ("plan",), seconds=s) for k, s in enumerate((30.0, 20.0, 10.0))),
             Work("merge", ("branch-0", "branch-1", "branch-2"), seconds=5)]
    assert predict_finish(works, 2) == Finish(10 + 1 + 30 + 5)  # 30 beside 20 + 10
    assert predict_finish(works, 1) == Finish(10 + 1 + 60 + 5)


def test_what_is_not_known_is_named_and_the_rest_is_a_lower_bound():
    works = [Work("branch-0", (), running=True, seconds=7), Work("merge", ("branch-0",)), Work("evaluate-merged", ("merge",))]
    finish = predict_finish(works, 1)
    assert finish == Finish(7.0, ("merge", "evaluate-merged"))
    said = "\n".join(finish_words(finish, "the one worker"))
    assert "at least 7 s" in said and "not counted" in said and "merge, evaluate-merged" in said


def test_nothing_known_and_nobody_at_work_give_no_figure():
    assert predict_finish([Work("branch-0", (), running=True)], 1) == Finish(None, ("branch-0",))
    known = [Work("branch-0", (), seconds=9.0)]
    assert predict_finish(known, 0) == Finish(None)
    assert finish_words(Finish(None), "") == ["finish     not known: nobody is seen at work"]
    assert "of what is left nothing is measured" in finish_words(Finish(0.2, ("branch-0",)), "2 workers")[0]
    assert finish_words(Finish(None, ("branch-0",)), "2 workers") == ["finish     not known: nothing is measured yet"]


def test_failed_jobs_block_what_needs_them_and_only_that():
    works = [Work("branch-0", (), never=True), Work("branch-1", (), running=True, seconds=4.0),
             Work("merge", ("branch-0", "branch-1"), seconds=3.0), Work("evaluate-branch-1", ("branch-1",), seconds=2.0)]
    assert predict_finish(works, 1) == Finish(6.0, (), ("branch-0", "merge"))
    said = "\n".join(finish_words(predict_finish(works, 1), "1 worker"))
    assert "not of branch-0, merge" in said and "about 6 s" in said


def test_all_done_is_no_time():
    assert predict_finish([Work("plan", (), done=True)], 0) == Finish(0.0)


def test_a_circle_of_needs_ends():
    works = [Work("a", ("b",), seconds=1.0), Work("b", ("a",), seconds=1.0)]
    assert predict_finish(works, 1).seconds == 0.0


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5399, "90 min"), (5400, "1.5 h"),
                                               (48 * 3600, "2.0 days"), (10 * 86400, "10.0 days")])
def test_durations(seconds, said):
    assert duration(seconds) == said
