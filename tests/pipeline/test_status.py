"""What `anabranch status` says of a store, job by job, through the lease protocol's own files; and of a run folder."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from anabranch import cli_work
from anabranch.artifacts import Plan, PlanGroup, PlanUnit
from anabranch.errors import CorruptedError, RecipeError
from anabranch.status import Observer, folder_status
from anabranch.store import leases
from anabranch.store.artifacts import Beat, End, FileRef, Result, StoredBase, StoredRun
from anabranch.store.files import Store, open_store
from anabranch.store.leases import Lease, Watch
from anabranch.store.status import JobStatus, RunStatus, Sight, store_status

LEASE = 60.0


def stored_run(branches: int = 3, **changes: object) -> StoredRun:
    jobs: dict[str, list[str]] = {"gradients-0": [], "gradients-1": [], "plan": ["gradients-0", "gradients-1"]}
    jobs |= {f"branch-{k}": ["plan"] for k in range(branches)}
    jobs |= {"merge": [f"branch-{k}" for k in range(branches)], "evaluate-merged": ["merge"]}
    return StoredRun.model_validate({
        "recipe": {"train": {"num_train_epochs": 2}}, "base": StoredBase(hash="b"),
        "mixture": {"mixture/mixture.json": FileRef(sha256="0" * 64, size=1)}, "jobs": jobs, "lease_seconds": LEASE,
        "retries": 1, **changes})


def plan_of(tokens: list[int]) -> Plan:
    units = [PlanUnit(unit=f"u{k}", group=k, samples=1, tokens=n, sha256="0" * 64) for k, n in enumerate(tokens)]
    groups = [PlanGroup(group=k, units=1, samples=1, tokens=n, weight=n / sum(tokens)) for k, n in enumerate(tokens)]
    return Plan(method="merit", seed=0, units=units, groups=groups)


class Scene:
    """A store with a run, workers that use the lease protocol, and one observer with a clock of its own."""

    def __init__(self, folder: Path, run: StoredRun | None = None) -> None:
        self.folder, self.run = folder, run or stored_run()
        self.store: Store = open_store(folder / "store")
        self.store.create("run.json", self.run.model_dump_json().encode())
        self.sight, self.now = Sight(), 1000.0

    def look(self, after: float = 0.0) -> RunStatus:
        self.now += after
        return store_status(self.store, self.run, self.sight, self.now, "here")

    def job(self, name: str, after: float = 0.0) -> JobStatus:
        return next(j for j in self.look(after).jobs if j.job == name)

    def take(self, job: str, worker: str = "w1") -> Lease:
        taken = leases.take(self.store, self.run, job, worker, Watch(), now=0.0)
        assert isinstance(taken, Lease)
        return taken

    def beat(self, lease: Lease, count: int, **told: object) -> None:
        leases.renew(self.store, lease, Beat.model_validate({"count": count, **told}))

    def end(self, lease: Lease, reason: str, message: str = "") -> None:
        leases.let_go(self.store, lease, End.model_validate({"attempt": lease.attempt, "reason": reason, "message": message}))

    def finish(self, job: str, worker: str = "w1", lease: Lease | None = None, files: dict[str, bytes] | None = None) -> None:
        lease = lease or self.take(job, worker)
        refs = {}
        for name, data in (files or {"plan.json": b"{}"}).items():
            path = self.folder / "made"
            path.write_bytes(data)
            refs[name] = self.store.put(path)
        result = Result(job=job, run=self.run.hash, attempt=lease.attempt, worker=worker, files=refs)
        self.store.create(leases.result_file(job), result.model_dump_json().encode())
        self.end(lease, "done")

    def until_branches(self, tokens: list[int]) -> None:
        for job in ("gradients-0", "gradients-1"):
            self.finish(job)
        self.finish("plan", files={"plan.json": plan_of(tokens).model_dump_json().encode()})


@pytest.fixture()
def scene(tmp_path):
    return Scene(tmp_path)


def test_states_of_a_run_nobody_has_begun(scene):
    seen = scene.look()
    assert [j.state for j in seen.jobs] == ["free", "free", *["waiting"] * 6]
    assert scene.job("merge").waits_for == ["branch-0", "branch-1", "branch-2"]
    assert not seen.finished and seen.seconds_left is None and seen.workers == []
    assert "nobody is seen at work" in seen.lines()[-1]


def test_a_job_is_waited_for_until_every_need_is_done(scene):
    scene.finish("gradients-0", "w7")
    done = scene.job("gradients-0")
    assert (done.state, done.worker, done.attempt) == ("done", "w7", 0)
    assert (scene.job("plan").state, scene.job("plan").waits_for) == ("waiting", ["gradients-1"])
    scene.finish("gradients-1")
    assert scene.job("plan").state == "free"


def test_a_holder_s_figures_and_its_silence_are_only_known_from_a_second_look_on(scene):
    scene.until_branches([100, 100, 100])
    lease = scene.take("branch-1", "w2")
    held = scene.job("branch-1")
    assert (held.state, held.worker, held.attempt, held.silent, held.lost) == ("held", "w2", 0, None, False)
    scene.beat(lease, 1, doing="train", step=4, steps=10, tokens=80, tokens_per_second=8.0, seconds_left=15.0, loss=1.5)
    held = scene.job("branch-1", after=5)
    assert (held.silent, held.step, held.steps, held.tokens_per_second, held.loss) == (0.0, 4, 10, 8.0, 1.5)
    assert scene.job("branch-1", after=20).silent == 20.0
    line = next(text for text in scene.look().lines() if text.startswith("branch-1"))
    for part in ("held by w2", "train", "step 4 of 10", "8 tokens/s", "loss 1.500", "15 s left"):
        assert part in line


def test_a_holder_that_is_silent_for_longer_than_the_lease_is_called_lost_and_is_no_worker(scene):
    scene.until_branches([100, 100, 100])
    lease = scene.take("branch-0", "w2")
    scene.beat(lease, 1, step=1, steps=2, seconds_left=30.0)
    assert scene.look().workers == ["w2"]
    late = scene.look(after=LEASE + 1)
    job = next(j for j in late.jobs if j.job == "branch-0")
    assert job.state == "held" and job.lost and job.silent == LEASE + 1
    assert late.workers == [] and late.seconds_left is None and "lost, whoever asks next gets it" in "\n".join(late.lines())
    scene.beat(lease, 2, step=1, steps=2)  # it was only slow
    assert not scene.job("branch-0").lost


def test_a_first_look_calls_nobody_lost_however_old_the_beat(tmp_path):
    scene = Scene(tmp_path)
    scene.until_branches([1, 1, 1])
    scene.beat(scene.take("branch-0"), 1)
    scene.sight, scene.now = Sight(), 9e9  # another observer, years later by its clock
    assert scene.job("branch-0").silent is None and not scene.job("branch-0").lost
    seen = Scene.look(scene)
    assert seen.workers == ["w1"]


def test_failures_preemptions_and_losses_are_counted_and_too_many_failures_are_the_end(scene):
    scene.until_branches([1, 1, 1])
    scene.end(scene.take("branch-0"), "preempted")
    scene.end(scene.take("branch-0"), "lost")
    scene.end(scene.take("branch-0", "w3"), "failed", "Traceback\n  File x\nValueError: no such thing\n")
    job = scene.job("branch-0")
    assert (job.state, job.attempt, job.failures, job.preemptions, job.losses) == ("free", 2, 1, 1, 1)
    assert job.problem == "Traceback\n  File x\nValueError: no such thing" and job.worker == "w3"
    line = next(text for text in scene.look().lines() if text.startswith("branch-0"))
    assert "1 failure, 1 preemption, 1 holder lost: ValueError" in line
    scene.end(scene.take("branch-0"), "failed", "again")  # retries is 1
    seen = scene.look()
    assert scene.job("branch-0").state == "failed" and seen.blocked == ["branch-0", "merge", "evaluate-merged"]
    assert not seen.finished
    for k in (1, 2):
        scene.finish(f"branch-{k}")
    assert scene.look().finished, "nothing that is left can be done"
    assert "not of branch-0, merge, evaluate-merged" in "\n".join(scene.look().lines())


def test_a_job_that_was_given_up_shows_the_end_of_its_log_and_json_all_of_it(scene):
    scene.until_branches([1, 1, 1])
    log = "\n".join(f"line {n}" for n in range(40))
    for _ in range(2):
        scene.end(scene.take("branch-0"), "failed", log)
    told = scene.look().lines()
    at = next(i for i, line in enumerate(told) if line.startswith("branch-0"))
    assert told[at].endswith("2 failures: line 39")
    assert told[at + 1:at + 11] == [f"    line {n}" for n in range(30, 40)] and told[at + 11].startswith("branch-1")
    assert next(j["problem"] for j in json.loads(scene.look().as_json())["jobs"] if j["job"] == "branch-0") == log


ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31mred\u202egpj\u200b.exe\r\x08\x7f"


def test_what_other_machines_wrote_moves_no_cursor_and_hides_nothing(scene):
    """A stranger's beat or log would else clear the screen, or rewrite the lines of others."""
    scene.until_branches([1, 1, 1])
    scene.beat(scene.take("branch-1"), 1, doing=f"train{ESCAPES}")
    for _ in range(2):
        scene.end(scene.take("branch-0"), "failed", f"first\n\tsecond{ESCAPES}\nthird")
    seen = scene.look()
    shown = "\n".join(seen.lines())
    assert "held by w1, train[2J]0;title31mredgpj.exe" in shown and "\tsecond[2J]0;title31mredgpj.exe" in shown
    for text in (shown, seen.as_json()):
        assert not [c for c in text if c != "\n" and c != "\t" and unicodedata.category(c) in ("Cc", "Cf")]


def test_the_terminal_gets_no_control_characters(capsys):
    cli_work._tell(f"a{ESCAPES}\nb [red]")
    assert capsys.readouterr().out == "a[2J]0;title31mredgpj.exe\nb [red]\n"


@pytest.mark.parametrize("figure", ["tokens_per_second", "seconds_left", "loss"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_beat_has_finite_numbers_and_a_look_survives_others(scene, figure, number):
    """A trainer's 1e999 is infinity to Python, and was written into the store as null."""
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=figure):
            Beat.model_validate({"count": 1, figure: value})
    scene.until_branches([1, 1, 1])
    scene.take("branch-0")
    scene.store.replace("jobs/branch-0/beat-0000.json", f'{{"count": 1, "{figure}": {number}}}'.encode())
    assert scene.job("branch-0").state == "held"


def test_only_the_newest_attempt_holds_a_job(scene):
    scene.until_branches([1, 1, 1])
    scene.beat(scene.take("branch-0", "old"), 1, step=9, steps=9)
    watch = Watch()
    leases.take(scene.store, scene.run, "branch-0", "new", watch, now=0.0)
    assert isinstance(leases.take(scene.store, scene.run, "branch-0", "new", watch, now=LEASE), Lease)
    job = scene.job("branch-0")
    assert (job.state, job.worker, job.attempt, job.losses, job.step) == ("held", "new", 1, 1, 0)


def test_the_finish_by_hand(scene):
    """Branch 0 has 30 s left; 1 and 2 (600 and 200 tokens, two passes) at the mean of 10 tokens/s: 120 and 40 s."""
    scene.until_branches([500, 600, 200])
    scene.beat(scene.take("branch-0", "a"), 1, step=5, steps=10, tokens=500, tokens_per_second=10.0, seconds_left=30.0)
    one = scene.look()
    assert one.seconds_left == pytest.approx(30 + 120 + 40)
    assert one.unknown == ["merge", "evaluate-merged"]
    assert "at least 3 min" in "\n".join(one.lines()) and "not counted" in "\n".join(one.lines())
    scene.beat(scene.take("branch-2", "b"), 1, step=1, steps=10, tokens=40, tokens_per_second=10.0, seconds_left=36.0)
    assert scene.look().seconds_left == pytest.approx(30 + 120)  # a is free first, and takes branch-1


def test_uneven_speeds_are_averaged_and_a_done_branch_still_tells_its_own(scene):
    scene.until_branches([100, 100, 300])
    slow = scene.take("branch-0", "a")
    scene.beat(slow, 1, step=10, steps=10, tokens=200, tokens_per_second=5.0, seconds_left=0.0)
    scene.finish("branch-0", "a", slow)
    scene.beat(scene.take("branch-1", "b"), 1, step=5, steps=10, tokens=100, tokens_per_second=15.0, seconds_left=7.0)
    assert scene.look().seconds_left == pytest.approx(7 + 600 / 10)


def test_gradient_shards_are_judged_by_their_like(scene):
    """Shard 0 has done 3 of 4 steps and has 10 s left: a whole one takes 40 s. Of what follows nothing is known."""
    scene.beat(scene.take("gradients-0", "a"), 1, step=3, steps=4, seconds_left=10.0)
    seen = scene.look()
    assert seen.seconds_left == pytest.approx(50)
    assert seen.unknown == ["plan", "branch-0", "branch-1", "branch-2", "merge", "evaluate-merged"]


def test_a_plan_that_is_not_what_its_hash_says_is_not_believed(scene):
    scene.finish("gradients-0")
    scene.finish("gradients-1")
    scene.finish("plan", files={"plan.json": plan_of([500, 600, 200]).model_dump_json().encode()})
    objects = [p for p in (scene.folder / "store" / "objects").rglob("*") if p.is_file() and b"merit" in p.read_bytes()]
    objects[0].write_bytes(plan_of([5, 6, 2]).model_dump_json().encode())
    scene.beat(scene.take("branch-0", "a"), 1, step=5, steps=10, tokens_per_second=10.0, seconds_left=30.0)
    assert "branch-1" in scene.look().unknown


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"job": "merge"}', b"\xff\xfe" * 50, b"[" * 100_000])
def test_damaged_state_is_told_of_that_job_and_no_other(scene, damage):
    scene.until_branches([1, 1, 1])
    scene.store.create("jobs/branch-0/claim-0000.json", damage)
    scene.store.create(leases.result_file("branch-1"), damage)
    seen = scene.look()
    states = {j.job: j.state for j in seen.jobs}
    assert [states[job] for job in ("plan", "branch-0", "branch-1", "branch-2")] == ["done", "damaged", "damaged", "free"]
    assert all(j.problem for j in seen.jobs if j.state == "damaged")
    assert {"branch-0", "branch-1", "merge"} <= set(seen.blocked)


def test_a_result_of_another_run_is_no_result(scene):
    files = {"plan.json": FileRef(sha256="0" * 64, size=1)}
    stranger = Result(job="gradients-0", run="f" * 64, attempt=0, worker="w", files=files)
    scene.store.create(leases.result_file("gradients-0"), stranger.model_dump_json().encode())
    job = scene.job("gradients-0")
    assert job.state == "damaged" and "result of" in job.problem


def test_many_jobs_of_a_kind_are_told_in_one_line_but_not_those_with_something_to_say(tmp_path):
    scene = Scene(tmp_path, stored_run(branches=40))
    scene.until_branches([1] * 40)
    for k in range(20):
        scene.finish(f"branch-{k}")
    scene.end(scene.take("branch-20"), "preempted")
    lines = scene.look().lines()
    assert any(line.startswith("branch, 20 of 40") and line.endswith("done") for line in lines)
    assert any(line.startswith("branch-20") and "1 preemption" in line for line in lines)
    assert len(lines) < 15


def test_what_never_changes_is_asked_once(scene):
    scene.until_branches([1, 1, 1])
    for k in range(3):
        scene.finish(f"branch-{k}")
    scene.look()
    before = sum(scene.store.requests.values())
    scene.look()
    # one listing of results; of the one job that is open, its folder and whether there is a first claim
    assert sum(scene.store.requests.values()) - before == 3


def test_all_done_is_finished_and_json_says_all_of_it(scene):
    scene.until_branches([1, 1, 1])
    for job in ("branch-0", "branch-1", "branch-2", "merge", "evaluate-merged"):
        scene.finish(job)
    seen = scene.look()
    assert seen.finished and seen.seconds_left == 0.0 and seen.lines()[-1] == "finish     all is done"
    told = json.loads(seen.as_json())
    assert told["finished"] and told["run"] == scene.run.hash and {j["state"] for j in told["jobs"]} == {"done"}


def test_an_observer_of_a_store_and_of_what_is_none(scene, tmp_path):
    observer = Observer(str(tmp_path), str(tmp_path / "store"))
    assert observer.look().lines()[0].startswith(f"run {scene.run.hash[:12]} at ")
    with pytest.raises(RecipeError, match="no run here"):
        Observer("x", str(tmp_path / "elsewhere"))
    with pytest.raises(CorruptedError, match="not a run folder"):
        Observer(str(tmp_path / "elsewhere"), None).look()


def test_status_is_light():
    """It is asked again and again: no torch, no trainer."""
    code = "import sys, anabranch.status; sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- a run folder ----------------------------------------------------------------------------------------------------


@pytest.fixture()
def folder(tmp_path):
    """A run folder with a plan of three branches (100, 200, 300 tokens), two at a time, one pass."""
    (tmp_path / "gradients").mkdir()
    (tmp_path / "gradients" / "gradients.json").write_text("{}")
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": {"launch": {"max_parallel": 2}}}))
    plan_of([100, 200, 300]).save(tmp_path / "plan.json")
    return tmp_path


def tell(folder: Path, branch: int, **told: object) -> None:
    path = folder / "branches" / str(branch) / "progress.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(told))


def test_the_finish_of_a_run_folder_by_hand(folder):
    """Two at a time: 5 s left of branch 0, 12 s of branch 1, then 300 tokens at 10 tokens/s behind branch 0: 35 s."""
    assert folder_status(folder).seconds_left is None
    assert "not known: nothing is measured yet" in folder_status(folder).lines()[-1]
    tell(folder, 0, step=5, steps=10, tokens_per_second=10.0, seconds_left=5.0)
    tell(folder, 1, step=1, steps=10, tokens_per_second=10.0, seconds_left=12.0)
    seen = folder_status(folder)
    assert seen.seconds_left == pytest.approx(35) and seen.unknown == ["merge", "evaluate", "report"] and not seen.finished
    text = "\n".join(seen.lines())
    assert "step 5 of 10, 10 tokens/s, 5 s left" in text and "at least 35 s, with 2 branches at a time" in text


@pytest.mark.parametrize("told", ["", "{", "[]", "null", '{"step": "x"}', '{"steps": 5, "step": null}',
                                  '{"steps": 5, "step": 1, "seconds_left": NaN, "tokens_per_second": Infinity}'])
def test_progress_that_is_being_written_or_is_nonsense_does_no_harm(folder, told):
    path = folder / "branches" / "0" / "progress.json"
    path.parent.mkdir(parents=True)
    path.write_text(told)
    assert any(line.startswith("branch 0") for line in folder_status(folder).lines())


def test_a_recipe_that_is_none_is_refused(folder):
    for text in ("", "[]", '{"recipe": 5}'):
        (folder / "recipe.json").write_text(text)
        with pytest.raises(CorruptedError, match=r"recipe\.json"):
            folder_status(folder)


def test_a_partial_merge_copied_into_the_run_does_not_count(folder):
    from anabranch.artifacts import MergeManifest

    manifest = MergeManifest(method="linear", dtype="float32", parameters=1, files={}, missing=[2])
    manifest.save(folder / "merged" / "manifest.json")
    assert "merge      to do" in folder_status(folder).lines()
    manifest.model_copy(update={"missing": []}).save(folder / "merged" / "manifest.json")
    assert "merge      done" in folder_status(folder).lines()


def test_the_plan_s_digest_is_of_its_bytes(tmp_path):
    """What the store status trusts: an object's name is the SHA-256 of its bytes."""
    scene = Scene(tmp_path)
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert scene.store.put(path).sha256 == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("train", [5, {"num_train_epochs": "many"}, {"num_train_epochs": [1]}, {"num_train_epochs": -1}])
def test_passes_that_are_no_number_make_times_unknown_not_wrong(tmp_path, train):
    scene = Scene(tmp_path, stored_run(recipe={"train": train}))
    scene.until_branches([10, 10, 10])
    scene.beat(scene.take("branch-0"), 1, step=1, steps=2, tokens_per_second=5.0, seconds_left=1.0)
    assert {"branch-1", "branch-2"} <= set(scene.look().unknown)
