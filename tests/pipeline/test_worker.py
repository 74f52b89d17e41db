"""What a worker does when a job or a machine fails, a lease is lost, a checkpoint is bad. The children are stand-ins."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch import attempt, perform, pushing, worker
from anabranch.artifacts import Mixture, Plan, PlanGroup, PlanUnit, Unit
from anabranch.checkpoints import mark_complete
from anabranch.errors import BranchFailed, OutputError, RecipeError
from anabranch.exit_codes import TRY_AGAIN
from anabranch.launch.logs import redacted
from anabranch.recipe import Recipe
from anabranch.store import leases
from anabranch.store.artifacts import Checkpoint, FileRef, StoredBase, StoredRun
from anabranch.store.files import Store, open_store
from anabranch.worker import Worker, work

RECIPE: dict[str, Any] = {"model": {"path": "somebody/model"}, "mixture": {"sources": [{"path": "rows.jsonl"}]}}
# Stands for `python -m anabranch perform SPACE JOB ..`: leaves files, then does what the test says.
CHILD = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
space, job = Path(sys.argv[4]), sys.argv[5]
notes = Path({notes!r})
with open(notes / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[3:]) + "\\n")
for path, text in json.loads((notes / "files.json").read_text()).get(job, dict()).items():
    (space / path).parent.mkdir(parents=True, exist_ok=True)
    (space / path).write_text(text)
exec((notes / "act.py").read_text())
"""


class Place:
    """A store with a run of two gradient jobs and two branches, whose children do as `act` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.notes, self.told = folder, folder / "notes", [""][:0]
        self.notes.mkdir()
        self.store: Store = open_store(folder / "store", cache=folder / "cache", patience=2.0)
        script = folder / "python"
        script.write_text(CHILD.format(python=sys.executable, notes=str(self.notes)))
        script.chmod(0o755)
        monkeypatch.setattr(attempt.sys, "executable", str(script))
        monkeypatch.setattr(worker, "BACKOFF", (0.0, 0.0, 0.0))
        self.leave()
        self.act("")

    def act(self, code: str) -> None:
        (self.notes / "act.py").write_text(code)

    def leave(self, **changes: dict[str, str]) -> None:
        """What the children leave, by job."""
        plan = Plan(
            method="merit",
            seed=0,
            units=[PlanUnit(unit=f"u{i}", group=i, samples=1, tokens=1, sha256=self.sha) for i in (0, 1)],
            groups=[PlanGroup(group=i, units=1, samples=1, tokens=1, weight=0.5) for i in (0, 1)],
        )
        files = {f"gradients-{i}": {f"gradients/units/{i:016x}.safetensors": str(i)} for i in (0, 1)}
        files["plan"] = {
            "gradients/gradients.json": "{}",
            "conflict/conflict.json": "{}",
            "conflict/conflict.safetensors": "",
            "plan.json": plan.model_dump_json(),
        }
        files |= {f"branch-{k}": {f"branches/{k}/branch.json": "{}", f"branches/{k}/model/config.json": "{}"} for k in (0, 1)}
        files |= {"merge": {"merged/manifest.json": "{}", "merged/config.json": "{}"}}
        files |= {f"evaluate-{label}": {f"evaluation/{label}.json": "{}"} for label in ("base", "merged")}
        (self.notes / "files.json").write_text(json.dumps(files | changes))

    @property
    def sha(self) -> str:
        return self.put(b"rows").sha256

    def put(self, data: bytes) -> FileRef:
        path = self.folder / "to-put"
        path.write_bytes(data)
        return self.store.put(path)

    def make(self, recipe: dict[str, Any] | None = None, retries: int = 1, lease_seconds: float = 6.0) -> StoredRun:
        unit = {
            "source": "s",
            "format": "text",
            "sha256": self.sha,
            "rows": 1,
            "epochs": 1,
            "samples": 1,
            "tokens": 1,
            "response_tokens": 1,
            "held_out_rows": 0,
            "held_out_tokens": 0,
            "held_out_response_tokens": 0,
        }
        refs = {}
        units = []
        for i in (0, 1):
            refs[f"mixture/units/u{i}.safetensors"] = self.put(b"rows")
            units.append(Unit.model_validate(unit | {"name": f"u{i}", "file": f"units/u{i}.safetensors"}))
        mixture = Mixture(
            units=units,
            transfer=[],
            retention=[],
            excluded=[],
            duplicates_in_train=0,
            duplicates_across=0,
            max_length=8,
            chat_template="plain",
            examples=[],
        )
        refs["mixture/mixture.json"] = self.put(mixture.model_dump_json().encode())
        jobs: dict[str, list[str]] = {
            "gradients-0": [],
            "gradients-1": [],
            "plan": ["gradients-0", "gradients-1"],
            "branch-0": ["plan"],
            "branch-1": ["plan"],
            "merge": ["branch-0", "branch-1"],
            "evaluate-base": [],
            "evaluate-merged": ["merge"],
        }
        run = StoredRun(
            recipe=Recipe.model_validate(recipe or RECIPE).model_dump(mode="json", exclude={"launch", "output"}),
            base=StoredBase(hash="b", hub="somebody/model"),
            mixture=refs,
            jobs=jobs,
            lease_seconds=lease_seconds,
            retries=retries,
        )
        assert self.store.create("run.json", run.model_dump_json().encode())
        return run

    def work(self, **options: Any) -> int:
        return work(self.folder / "store", cache=self.folder / "cache", tell=self.told.append, **options)

    def worker(self, run: StoredRun, tell: Callable[[str], None] | None = None) -> Worker:
        (self.folder / "space").mkdir(exist_ok=True)
        return Worker(self.store, run, None, False, tell or self.told.append, "me", self.folder / "space")

    def calls(self) -> list[list[str]]:
        path = self.notes / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ends(self, job: str) -> list[tuple[str, str]]:
        found = [leases.end_of(self.store, job, n, leases.Watch()) for n in range(20)]
        return [(end.reason, end.message) for end in found if end is not None]


@pytest.fixture()
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_all_jobs_are_done_in_their_order(place: Place) -> None:
    run = place.make()
    assert place.work() == 0
    done = [call[2] for call in place.calls()]
    assert sorted(done) == sorted(run.jobs) and all(
        done.index(need) < done.index(job) for job in run.jobs for need in run.jobs[job]
    )
    assert place.work() == 0 and len(place.calls()) == len(run.jobs)  # nothing twice
    assert all(reason == "done" for job in run.jobs for reason, _ in place.ends(job))
    left = [p for p in (place.folder / "cache" / "work").rglob("*") if p.is_file()]
    assert left == []


# ---- trust ----------------------------------------------------------------------------------------------------------------

TRUSTED = {
    "command": ({"trainer": {"kind": "command", "command": ["evil", "{out}"]}}, "evil {out}"),
    "code": ({"model": {"path": "somebody/model", "trust_remote_code": True}}, "trust_remote_code"),
    "path": ({"train": {"deepspeed": "evil/settings.json"}}, "train.deepspeed"),
    "file": ({"train": {"deepspeed": "evil.json"}}, "train.deepspeed"),
    "settings": ({"train": {"model_init_kwargs": {"device_map": "auto"}}}, "train.model_init_kwargs"),
    "list": ({"train": {"fsdp": ["full_shard", "evil/x"]}}, "train.fsdp"),
    "lora": ({"model": {"path": "somebody/model", "lora": {"corda_config": {"cache_file": "x"}}}}, "model.lora.corda_config"),
}


@pytest.mark.parametrize("what", TRUSTED)
def test_nothing_of_the_recipe_runs_without_trust(place: Place, what: str) -> None:
    change, named = TRUSTED[what]
    place.make(RECIPE | change)
    with pytest.raises(RecipeError, match="--trust") as told:
        place.work()
    assert named in str(told.value) and place.calls() == [] and not (place.folder / "cache").exists()
    with pytest.raises(RecipeError, match="--trust"):  # and not by the child alone, either
        perform.perform(_space(place), "gradients-0")


def _space(place: Place) -> Path:
    space = place.folder / "by-hand"
    space.mkdir()
    (space / "run.json").write_bytes(place.store.read("run.json") or b"")
    return space


def test_what_is_trusted_is_passed_on(place: Place) -> None:
    place.make(RECIPE | TRUSTED["command"][0])
    assert place.work(only="gradients-0", trust=True) == 0
    assert [call[2:] for call in place.calls()] == [["gradients-0", "--trust"]]


def test_plain_settings_need_no_trust() -> None:
    plain = RECIPE | {
        "train": {"learning_rate": 1e-3, "optim": "adamw_torch"},
        "model": {"path": "m", "lora": {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}},
    }
    assert perform.trusted_parts(Recipe.model_validate(plain)) == []


def test_a_job_that_there_is_not(place: Place) -> None:
    place.make()
    with pytest.raises(RecipeError, match=r"branch-7: the run has no such job.*branch-1"):
        place.work(only="branch-7")


# ---- failures -------------------------------------------------------------------------------------------------------------


def test_a_job_that_always_fails_is_given_up_with_its_last_words(place: Place) -> None:
    place.make(retries=1)
    place.act("if job == 'gradients-1': print('x' * 50_000); print('the rows are', 'nonsense'); sys.exit(3)")
    with pytest.raises(BranchFailed) as told:
        place.work()
    message = str(told.value)
    assert "gradients-1: failed 2 times" in message and "exit code 3" in message and "the rows are nonsense" in message
    assert "launch.store" in message and "Traceback" not in message
    ends = place.ends("gradients-1")
    assert [reason for reason, _ in ends] == ["failed", "failed"] and all(len(text) < 8000 for _, text in ends)
    assert [reason for reason, _ in place.ends("gradients-0")] == ["done"]  # others' work goes on
    assert [reason for reason, _ in place.ends("evaluate-base")] == ["done"]
    assert place.store.read("results/gradients-1.json") is None


def test_a_child_that_was_killed_says_so(place: Place) -> None:
    place.make(retries=0)
    place.act("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(BranchFailed, match="killed by signal 9"):
        place.work(only="gradients-0")


def test_a_machine_without_room_is_not_the_job_s_fault(place: Place) -> None:
    place.make(retries=0)
    place.act(f"print('No space left on device'); sys.exit({TRY_AGAIN})")
    assert place.work() == TRY_AGAIN
    assert "3 jobs in a row failed on this machine" in place.told[-1] and "No space left" in place.told[-1]
    ends = [end for job in ("gradients-0", "gradients-1", "evaluate-base") for end in place.ends(job)]
    assert [reason for reason, _ in ends] == ["preempted"] * 3
    place.act("")
    assert place.work() == 0  # another machine: nothing was held against the jobs


def test_an_error_of_the_disk_in_the_worker_itself_is_the_machine_s(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run, full = place.make(retries=0), OSError(errno.ENOSPC, "No space left on device", "/cache/work")
    monkeypatch.setattr(worker, "pull", lambda *_: (_ for _ in ()).throw(full))
    it = place.worker(run)
    lease = leases.take(place.store, run, "gradients-0", "me", it.watch, 0.0)
    assert isinstance(lease, leases.Lease)
    worker._do(it, lease)
    ((reason, message),) = place.ends("gradients-0")
    assert reason == "preempted" and "No space left on device" in message and "ANABRANCH_CACHE" in message


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), OutputError("cannot write x")]
)
def test_the_child_tells_trouble_of_its_machine_by_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(perform, "perform", fail)
    with pytest.raises(SystemExit) as ended:
        perform.main(tmp_path, "plan", None, False)
    assert ended.value.code == TRY_AGAIN


def test_a_job_that_failed_here_is_left_to_others_for_a_while(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BACKOFF", (100.0, 1000.0))
    run = place.make(retries=5)
    place.act("sys.exit(1)")
    it = place.worker(run)
    for wanted in (100.0, 1000.0, 1000.0):
        it.not_before.clear()
        lease, _ = worker._take_any(it, ["gradients-0"], set())
        assert lease is not None
        worker._do(it, lease)
        assert it.not_before["gradients-0"] - time.monotonic() == pytest.approx(wanted, abs=10)
        assert worker._take_any(it, ["gradients-0"], set()) == (None, {})
    other = place.worker(run)
    assert worker._take_any(other, ["gradients-0"], set())[0] is not None  # another need not wait


def test_three_jobs_that_fail_in_a_row_stop_the_worker(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BACKOFF", (100.0,))
    place.make(retries=9)
    place.act("print('CUDA is broken here'); sys.exit(1)")
    assert place.work() == TRY_AGAIN
    assert "3 jobs in a row failed on this machine" in place.told[-1] and "others may go on" in place.told[-1]
    assert "CUDA is broken here" in place.told[-1]
    assert {call[2] for call in place.calls()} == {"gradients-0", "gradients-1", "evaluate-base"}


# ---- being stopped --------------------------------------------------------------------------------------------------------


def test_a_lost_lease_stops_the_child(place: Place) -> None:
    run = place.make(lease_seconds=0.4)
    place.act("""
def told(*_):
    (notes / "told").write_text("TERM")
    sys.exit(85)
signal.signal(signal.SIGTERM, told)
(notes / "begun").write_text("")
time.sleep(60)
""")
    it = place.worker(run)
    lease = leases.take(place.store, run, "gradients-0", "me", it.watch, 0.0)
    assert lease == leases.Lease("gradients-0", 0)

    def take_over() -> None:
        while not (place.notes / "begun").exists():
            time.sleep(0.02)
        place.store.create("jobs/gradients-0/claim-0001.json", b"{}")

    thief = threading.Thread(target=take_over)
    thief.start()
    begun = time.monotonic()
    worker._do(it, lease)
    thief.join()
    assert (place.notes / "told").read_text() == "TERM" and time.monotonic() - begun < 20
    assert any("lost" in line for line in place.told) and place.ends("gradients-0") == []
    assert place.store.read("results/gradients-0.json") is None and not it.failed_here


def test_a_worker_that_is_told_to_stop_lets_go(place: Place) -> None:
    run = place.make()
    place.act("(notes / 'begun').write_text(''); signal.signal(signal.SIGTERM, lambda *_: sys.exit(85)); time.sleep(60)")
    it = place.worker(run)

    def stop() -> None:
        while not (place.notes / "begun").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        it.stop.set()

    threading.Thread(target=stop).start()
    assert worker._until_done(it, ["gradients-0"]) == perform.PREEMPTED
    assert [reason for reason, _ in place.ends("gradients-0")] == ["preempted"]
    assert it.failed_here == {} and it.not_before == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "null",
        '"x"',
        "{",
        "[" * 100_000,
        '{"step": -1}',
        '{"tokens": 12.5}',
        '{"loss": NaN, "step": 3}',
        '{"step": 1e400}',
        '{"seconds_left": -Infinity}',
        '{"step": ' + "9" * 5000 + "}",
        '{"step": "../../x", "tokens": [1]}',
        '{"tokens_per_second": -3}',
    ],
)
def test_beats_go_on_whatever_a_trainer_tells(place: Place, text: str) -> None:
    """A beat that cannot be made would let the lease lapse while the work goes on."""
    beats = attempt.Beats(place.worker(place.make()), leases.Lease("branch-0", 0))
    beats.progress = place.folder / "progress.json"
    beats.progress.write_text(text)
    assert leases.parse(leases.Beat, beats._beat(7).model_dump_json().encode(), "beat").count == 7


def test_what_a_trainer_tells_is_in_the_beat(place: Place) -> None:
    beats = attempt.Beats(place.worker(place.make()), leases.Lease("branch-0", 0))
    beats.progress = place.folder / "progress.json"
    beats.progress.write_text('{"step": 3, "steps": 9, "tokens": 900, "loss": 2.5, "other": "x"}')
    beat = beats._beat(0)
    assert (beat.step, beat.steps, beat.tokens, beat.loss) == (3, 9, 900, 2.5)


# ---- secrets --------------------------------------------------------------------------------------------------------------


def test_the_end_of_a_failed_log_has_no_secrets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123-wandb-4567")
    monkeypatch.setenv("MY_PASSWORD", "correct horse")
    place.make(retries=0)
    place.act("print('uses', os.environ['WANDB_API_KEY'], 'and', os.environ['MY_PASSWORD']); sys.exit(1)")
    with pytest.raises(BranchFailed) as told:
        place.work(only="gradients-0")
    ((_, message),) = place.ends("gradients-0")
    for text in (message, str(told.value), *place.told, (place.folder / "store/jobs/gradients-0/end-0000.json").read_text()):
        assert "0123-wandb-4567" not in text and "correct horse" not in text
    assert "uses *** and ***" in message


def test_trouble_of_the_machine_is_told_without_secrets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    run = place.make()
    place.act(f"print('full', os.environ['HF_TOKEN']); sys.exit({TRY_AGAIN})")
    it = place.worker(run)
    lease, _ = worker._take_any(it, ["gradients-0"], set())
    worker._do(it, lease)
    ((reason, message),) = place.ends("gradients-0")
    assert reason == "preempted" and "full ***" in message and "hf_abcdefgh" not in message


def test_what_counts_as_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL")):
            monkeypatch.delenv(name)
    for name, value in {
        "A_TOKEN": "abcdef",
        "A_SECRET_KEY": "abcdefghi",
        "PIN_PASSWORD": "12345",
        "HOME_SWEET": "plainvalue",
        "PEM_KEY": "-----BEGIN\nline-of-key\nok\n",
        "tokenizers_parallelism": "false",
    }.items():
        monkeypatch.setenv(name, value)
    assert redacted("abcdefghi abcdef 12345 plainvalue false") == "*** *** 12345 plainvalue false"  # the longer first
    assert redacted("line-of-key ok -----BEGIN") == "*** ok ***"
    assert redacted("") == ""


# ---- checkpoints ----------------------------------------------------------------------------------------------------------


def push(place: Place, run: StoredRun, attempt: int, step: int, shared: str = "") -> Checkpoint:
    """A whole checkpoint of branch-0 in the store."""
    folder = place.folder / f"local-{attempt}-{step}" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(shared or f"weights {attempt} {step}")
    (folder / "optimizer.safetensors").write_text(f"state {attempt} {step}")
    (folder / "trainer_state.json").write_text("{}")
    mark_complete(folder, {"base": "b"})
    mine = place.store.below("jobs/branch-0")
    files = {f"branches/0/checkpoints/checkpoint-{step}/{p.name}": mine.put(p) for p in sorted(folder.iterdir())}
    checkpoint = Checkpoint(job="branch-0", attempt=attempt, step=step, files=files)
    assert place.store.create(leases.checkpoint_file("branch-0", attempt, step), checkpoint.model_dump_json().encode())
    return checkpoint


def there(place: Place, ref: FileRef) -> Path:
    return place.folder / "store/jobs/branch-0/objects" / ref.sha256[:2] / ref.sha256


def spoil(place: Place, how: str, checkpoint: Checkpoint) -> None:
    at = f"branches/0/checkpoints/checkpoint-{checkpoint.step}/"
    name = leases.checkpoint_file("branch-0", checkpoint.attempt, checkpoint.step)
    if how == "bytes":
        there(place, checkpoint.files[at + "model.safetensors"]).write_text("weights 1 9")
    elif how == "gone":
        there(place, checkpoint.files[at + "optimizer.safetensors"]).unlink()
    elif how == "not json":
        place.store.replace(name, b"\x80\x04.")
    else:
        files = {
            "pickle": checkpoint.files | {at + "optimizer.pt": place.put(b"\x80\x04.")},
            "without a marker": {k: v for k, v in checkpoint.files.items() if not k.endswith("complete.json")},
            "half": {k: v for k, v in checkpoint.files.items() if "optimizer" not in k},
            "another marker": checkpoint.files | {at + "complete.json": place.put(b'{"inputs": {}, "files": {}}')},
        }[how]
        place.store.replace(name, checkpoint.model_copy(update={"files": files}).model_dump_json().encode())


@pytest.mark.parametrize("how", ["bytes", "gone", "not json", "pickle", "without a marker", "half", "another marker"])
def test_of_a_damaged_newer_checkpoint_the_next_is_taken(place: Place, how: str) -> None:
    run = place.make()
    push(place, run, 0, 4)
    spoil(place, how, push(place, run, 1, 8))
    space = place.folder / "space" / "run"
    attempt._resume(place.worker(run), "branch-0", space)
    assert [p.name for p in (space / "branches/0/checkpoints").iterdir()] == ["checkpoint-4"]
    assert (space / "branches/0/checkpoints/checkpoint-4/model.safetensors").read_text() == "weights 0 4"
    passed, taken = place.told
    assert "checkpoint 8 of attempt 1 is passed over" in passed and taken == "branch-0: goes on from step 4 of attempt 0"


def test_pruning_keeps_the_newest_and_touches_nothing_of_others(place: Place) -> None:
    """Random states and frozen shards are the same in several branches, and a branch's last weights are its result's."""
    run = place.make()
    shared = place.put(b"the branch itself")
    made = {step: push(place, run, 0, step, shared="the branch itself" if step == 2 else "") for step in (1, 2, 3, 4)}
    pushing.prune(place.worker(run), "branch-0")
    assert [step for _, step in leases.checkpoints(place.store, "branch-0")] == [4, 3]
    mine = place.store.below("jobs/branch-0")
    at = "branches/0/checkpoints/checkpoint-{}/{}"
    gone = [made[step].files[at.format(step, "model.safetensors")] for step in (1, 2)]
    assert not any(mine.has(ref) for ref in gone) and gone[1] == shared and place.store.has(shared)
    assert all(mine.has(ref) for step in (3, 4) for ref in made[step].files.values())
    pushing.prune(place.worker(run), "branch-0", keep=0)
    assert leases.checkpoints(place.store, "branch-0") == [] and place.store.has(shared)
    assert not any(mine.has(ref) for one in made.values() for ref in one.files.values())


def test_a_stranger_s_unreadable_checkpoint_stops_neither_push_nor_prune(place: Place) -> None:
    run = place.make()
    it = place.worker(run)
    push(place, run, 0, 1)
    place.store.replace(leases.checkpoint_file("branch-0", 0, 1), b"not json")
    at = place.folder / "space" / "branches" / "0"
    folder = at / "checkpoints" / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("w")
    mark_complete(folder, {"base": "b"})
    it.folder.mkdir(parents=True, exist_ok=True)
    pusher = pushing.Pusher(it, leases.Lease("branch-0", 1), at)
    pusher.tried = pusher.pushed = -1
    for _ in range(3):
        pusher._push_newest()
    assert pusher.pushed == 5 and not place.told
    assert (1, 5) in leases.checkpoints(place.store, "branch-0")


def test_a_checkpoint_that_cannot_be_pushed_is_not_tried_without_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    it = place.worker(place.make())
    at = place.folder / "space" / "branches" / "0"
    folder = at / "checkpoints" / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("w")
    mark_complete(folder, {"base": "b"})
    it.folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(type(place.store), "put", lambda *_: (_ for _ in ()).throw(OutputError("the store is full")))
    pusher = pushing.Pusher(it, leases.Lease("branch-0", 0), at)
    pusher.tried = pusher.pushed = -1
    for _ in range(5):
        pusher._push_newest()
    assert len(place.told) == 1 and "the store is full" in place.told[0]

