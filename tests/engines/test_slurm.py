"""Jobs on a real Slurm of one node, which this starts and stops (some 60 s in all)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_one_node
from stand_in import needs_engine, stand_in

from anabranch.errors import BranchFailed, CorruptedError, RecipeError
from anabranch.launch import slurm
from anabranch.launch.local import Job
from anabranch.launch.slurm import run_jobs_slurm
from anabranch.recipe import SlurmSection

absent = slurm_one_node.missing()
needs_engine(f"Slurm is not installed ({', '.join(absent)}): apt-get install -y slurm-wlm munge" if absent else "")
needs_engine("" if os.geteuid() == 0 else "slurmd starts jobs as their user, so it has to be root")
try:
    import submitit  # noqa: F401 - whether it can be
except ImportError:
    needs_engine("submitit is not installed: pip install 'anabranch[slurm]'")


@pytest.fixture(scope="module", autouse=True)
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm_one_node.one_node(tmp_path_factory.mktemp("slurm"), cpus=4) as environment:
        os.environ |= environment
        yield environment
    del os.environ["SLURM_CONF"]


def shell(folder: Path, name: str, text: str, needs: tuple[str, ...] = ()) -> Job:
    """A job that runs a line of shell in the folder, and leaves NAME.done if that ends well."""
    command = ["sh", "-c", f"cd '{folder}'; {text} && date +%s.%N > {name}.done"]
    return Job(name, command, folder / "logs" / f"{name}.txt", needs)


def counting(folder: Path, name: str, tenths: int, needs: tuple[str, ...] = ()) -> Job:
    return Job(name, stand_in(folder, name, tenths), folder / "logs" / f"{name}.txt", needs)


def run(folder: Path, jobs: list[Job], section: SlurmSection | None = None, **options: object) -> dict[str, str]:
    settings = {"name": folder.name, "look_every": 0.5, "retries": 1} | options
    return run_jobs_slurm(jobs, section or SlurmSection(), folder / "slurm", done=is_done(folder), **settings)


def is_done(folder: Path) -> Callable[[str], bool]:
    return lambda name: (folder / f"{name}.done").exists()


def queue() -> str:
    return subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True, check=True).stdout


def eventually(happens: Callable[[], object], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, f"not within {seconds} s; the queue:\n{queue()}"
        time.sleep(0.1)


def test_arrays_wait_for_what_they_need_and_one_failure_stops_only_what_needs_it(tmp_path):
    shards = [shell(tmp_path, f"gradients-{i}", "sleep 0.5") for i in range(3)]
    jobs = [shell(tmp_path, "merge", "true", ("branch-0", "branch-1")),
            shell(tmp_path, "plan", "test $(ls gradients-*.done | wc -l) = 3", tuple(job.name for job in shards)),
            shell(tmp_path, "branch-0", "test -e plan.done", ("plan",)),
            shell(tmp_path, "branch-1", "echo out of luck >&2; exit 3", ("plan",)),
            shell(tmp_path, "evaluate-branch-0", "test -e branch-0.done", ("branch-0",)), *shards]
    seen: list[tuple[list[str], int]] = []
    with pytest.raises(BranchFailed) as error:
        run(tmp_path, jobs, on_tick=lambda running, finished: seen.append((running, finished)))
    done = {path.stem for path in tmp_path.glob("*.done")}
    assert done == {"gradients-0", "gradients-1", "gradients-2", "plan", "branch-0", "evaluate-branch-0"}
    text = str(error.value)
    assert "branch-1: failed, exit code 3" in text and "out of luck" in text
    assert "merge: not started, it needs branch-1" in text
    assert "2 of 8 jobs failed" in text
    assert seen[-1] == ([], 6) and any(running for running, _ in seen)
    noted = json.loads((tmp_path / "slurm" / "queued.json").read_text())
    assert {noted[f"gradients-{i}"]["id"].split("_")[0] for i in range(3)} == {noted["gradients-0"]["id"].split("_")[0]}
    (tmp_path / "branch-1.done").touch()  # mended; what is done is not queued again
    assert set(run(tmp_path, jobs)) == {"merge"}


def test_preempted_jobs_save_and_start_again_and_the_merge_waits(tmp_path):
    """Three ways to be told, and a command that leaves with 85 of its own accord; none of them is a failure."""
    jobs = [counting(tmp_path, f"branch-{i}", 30) for i in range(3)]
    jobs.append(shell(tmp_path, "branch-3", "echo x >> tries; test $(wc -l < tries) -gt 1 || exit 85"))
    jobs.append(shell(tmp_path, "merge", "true", tuple(job.name for job in jobs)))
    told = [["scancel", "--signal=TERM"], ["scancel", "--signal=USR2"], ["scontrol", "requeue"]]

    def tell() -> None:
        for i, command in enumerate(told):
            eventually((tmp_path / f"branch-{i}.attempts").exists)
            time.sleep(0.5)
            identifier = json.loads((tmp_path / "slurm" / "queued.json").read_text())[f"branch-{i}"]["id"]
            subprocess.run([*command, identifier], check=True)

    thread = threading.Thread(target=tell)
    thread.start()
    run(tmp_path, jobs)
    thread.join()
    for i in range(3):
        lines = [line.split(" pid ")[0] for line in (tmp_path / f"branch-{i}.attempts").read_text().splitlines()]
        saved = int((tmp_path / f"branch-{i}.saved").read_text())
        assert lines == ["from 0", *[f"told at {saved}"] * lines.count(f"told at {saved}"), f"from {saved}"], lines
        assert lines.count(f"told at {saved}") >= 1 and 0 < saved < 30
    assert (tmp_path / "tries").read_text() == "x\nx\n"
    merged = float((tmp_path / "merge.done").read_text())
    assert all(float((tmp_path / f"branch-{i}.done").read_text()) <= merged for i in range(4))


@pytest.mark.parametrize("partition", ["main", "scavenge"])
def test_jobs_that_slurm_takes_the_cores_from_come_back(tmp_path, partition):
    """`main` queues them again by itself; `scavenge` cancels them and all that waits for them, and they are queued anew."""
    jobs = [counting(tmp_path, "branch-0", 50), shell(tmp_path, "branch-1", "echo ran; exit 3"),
            shell(tmp_path, "merge", "true", ("branch-0",)), shell(tmp_path, "evaluate-branch-1", "true", ("branch-1",))]

    def take() -> None:
        eventually((tmp_path / "branch-0.attempts").exists)
        number = json.loads((tmp_path / "slurm" / "queued.json").read_text())["branch-1"]["id"]
        eventually(lambda: number not in queue().split())  # it has ended: while it runs, it is taken from too
        subprocess.run(["sbatch", "--partition=urgent", "--cpus-per-task=4", f"--output={tmp_path}/urgent", "--wrap=sleep 1"],
                       check=True)

    thread = threading.Thread(target=take)
    thread.start()
    with pytest.raises(BranchFailed) as error:
        run(tmp_path, jobs, SlurmSection(partition=partition))
    thread.join()
    assert (tmp_path / "merge.done").exists()
    assert "2 of 4 jobs failed" in str(error.value) and "evaluate-branch-1: not started" in str(error.value)
    attempts = (tmp_path / "branch-0.attempts").read_text()
    assert attempts.count("from") == 2 and "told at" in attempts
    assert (tmp_path / "logs" / "branch-1.txt").read_text() == "ran\n"  # not again with the others


def test_trouble_of_a_machine_is_queued_again_so_often_and_then_told(tmp_path):
    jobs = [shell(tmp_path, "branch-0", "echo x >> passing; test $(wc -l < passing) -gt 1 || exit 75"),
            shell(tmp_path, "branch-1", "echo x >> lasting; echo the disk is full; exit 75"),
            shell(tmp_path, "branch-2", "echo x >> hopeless; exit 2"),
            shell(tmp_path, "evaluate-branch-0", "true", ("branch-0",)), shell(tmp_path, "merge", "true", ("branch-1",))]
    with pytest.raises(BranchFailed) as error:
        run(tmp_path, jobs, retries=1)
    counts = {name: len((tmp_path / name).read_text().split()) for name in ("passing", "lasting", "hopeless")}
    assert counts == {"passing": 2, "lasting": 2, "hopeless": 1}
    assert (tmp_path / "evaluate-branch-0.done").exists()
    text = str(error.value)
    assert "3 of 5 jobs failed" in text and "branch-1: failed, exit code 75" in text and "the disk is full" in text
    assert "given up after 2 times" in text and "merge: not started, it needs branch-1" in text
    # mended, and started by the user again: it has as many tries as before
    (tmp_path / "lasting").unlink()
    jobs[1] = shell(tmp_path, "branch-1", "echo x >> lasting; test $(wc -l < lasting) -gt 1 || exit 75")
    (tmp_path / "branch-2.done").touch()
    assert set(run(tmp_path, jobs, retries=1)) == {"branch-1", "merge"}


def test_a_job_that_was_cancelled_does_not_rise_again(tmp_path):
    jobs = [counting(tmp_path, "branch-0", 300), shell(tmp_path, "merge", "true", ("branch-0",))]

    def cancel() -> None:
        eventually((tmp_path / "branch-0.attempts").exists)
        subprocess.run(["scancel", json.loads((tmp_path / "slurm" / "queued.json").read_text())["branch-0"]["id"]], check=True)

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(BranchFailed, match=r"branch-0: cancelled(.|\n)*merge: not started"):
        run(tmp_path, jobs)
    thread.join()
    assert "told at" in (tmp_path / "branch-0.attempts").read_text()  # it could save, all the same
    eventually(lambda: not queue())


def test_ctrl_c_leaves_the_jobs_and_the_same_command_waits_for_them(tmp_path):
    program = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
               "from pathlib import Path\nimport test_slurm\n"
               f"folder = Path({str(tmp_path)!r})\n"
               "test_slurm.run(folder, [test_slurm.counting(folder, f'branch-{i}', 60) for i in (0, 1)])")
    caller = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    eventually((tmp_path / "branch-1.attempts").exists)
    caller.send_signal(signal.SIGINT)
    message = caller.communicate(timeout=20)[1].splitlines()[-1]
    noted = json.loads((tmp_path / "slurm" / "queued.json").read_text())
    array = noted["branch-0"]["id"].split("_")[0]
    assert "stay in Slurm's queue" in message and f"scancel {array}" in message
    assert queue().count("RUNNING") == 2
    jobs = [counting(tmp_path, "branch-0", 60), counting(tmp_path, "branch-1", 60)]
    assert run(tmp_path, jobs) == {job: one["id"] for job, one in noted.items()}
    assert (tmp_path / "branch-0.attempts").read_text().count("from 0") == 1


def test_what_sbatch_refuses_is_told_in_its_words_and_leaves_nothing_queued(tmp_path):
    jobs = [shell(tmp_path, "plan", "true"), shell(tmp_path, "merge", "true", ("plan",))]
    with pytest.raises(RecipeError, match=r"invalid partition specified: nonesuch(.|\n)*launch\.slurm"):
        run(tmp_path, jobs, SlurmSection(partition="nonesuch"))
    assert not queue()


def test_setup_and_extra_reach_the_job_and_a_command_finds_its_cores(tmp_path):
    section = SlurmSection(setup=["export COLOUR=green"], extra={"comment": "a 'b' c", "nice": 5}, cpus=2, time=3,
                           memory="100M")
    run(tmp_path, [shell(tmp_path, "plan", "echo $COLOUR $SLURM_CPUS_PER_TASK $OMP_NUM_THREADS")], section)
    # OMP_NUM_THREADS: the tests' own environment has set it, and a user's choice stands
    assert (tmp_path / "logs" / "plan.txt").read_text() == f"green 2 {os.environ.get('OMP_NUM_THREADS', '2')}\n"
    script = next((tmp_path / "slurm").glob("*_submission.sh")).read_text()
    assert "#SBATCH --time=3\n" in script and "#SBATCH --nice=5\n" in script and "#SBATCH --signal=USR2@60\n" in script
    with pytest.raises(RecipeError, match="dependency: set by the launcher"):
        run(tmp_path, [], SlurmSection(extra={"dependency": "x"}))


def test_the_gpu_that_slurm_gave_reaches_the_command(tmp_path):
    section = SlurmSection(setup=["export CUDA_VISIBLE_DEVICES=5"])  # as Slurm does it where a node has some
    run(tmp_path, [shell(tmp_path, "plan", "echo $CUDA_VISIBLE_DEVICES")], section)
    assert (tmp_path / "logs" / "plan.txt").read_text() == "5\n"


def test_a_node_without_the_interpreter_is_named_by_slurms_own_log(tmp_path):
    with pytest.raises(BranchFailed, match="no such module"):
        run(tmp_path, [shell(tmp_path, "plan", "true")], SlurmSection(setup=["echo no such module: cuda >&2; exit 1"]))


def test_the_pickle_holds_a_name_and_the_commands_words(tmp_path):
    job = shell(tmp_path, "plan", "true")
    identifier = run(tmp_path, [job])["plan"]
    pickled = (tmp_path / "slurm" / f"{identifier}_submitted.pkl").read_bytes()
    assert b"run_in_allocation" in pickled and b"anabranch.launch.slurm" in pickled and job.command[-1].encode() in pickled
    assert len(pickled) < 1500 and b"signal_group" not in pickled  # the function is not in there


def test_a_damaged_note_of_what_is_queued(tmp_path):
    (tmp_path / "slurm").mkdir()
    for text in ("{", "[1]", '{"plan": 3}', '{"plan": {"id": "1"}}'):
        (tmp_path / "slurm" / "queued.json").write_text(text)
        with pytest.raises(CorruptedError, match=r"queued\.json: damaged"):
            run(tmp_path, [shell(tmp_path, "plan", "true")])


def test_everything_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RecipeError, match=r"login node(.|\n)*pip install 'anabranch\[slurm\]'"):
        run(tmp_path, [])


def test_groups_keep_the_order_and_fit_an_array(tmp_path):
    many = [shell(tmp_path, f"gradients-{i}", "true") for i in range(2 * slurm.ARRAY_LIMIT + 5)]
    plan = shell(tmp_path, "plan", "true", tuple(job.name for job in many))
    groups = slurm._groups([plan, *many], {job.name for job in [plan, *many]}, set())
    assert [len(group) for group in groups] == [slurm.ARRAY_LIMIT, slurm.ARRAY_LIMIT, 5, 1]
    assert groups[-1] == [plan]
    circle = [shell(tmp_path, "a", "true", ("b",)), shell(tmp_path, "b", "true", ("a",))]
    with pytest.raises(ValueError, match="wait for each other"):
        slurm._groups(circle, {"a", "b"}, set())


def test_whole_arrays_are_named_short():
    ids = {"a": "12_0", "b": "12_1", "c": "13_0", "d": "13_1", "e": "14"}
    assert slurm._whole_arrays(["12_0", "12_1", "13_1", "14"], ids) == ["12", "13_1", "14"]
