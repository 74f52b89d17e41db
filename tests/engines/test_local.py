"""Commands on this machine: order, failures, being told to stop, a GPU each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import stand_in

from anabranch import attempt, cli_work, perform, processes
from anabranch.errors import BranchFailed
from anabranch.launch import export, local, slurm
from anabranch.launch.local import Job, run_jobs
from anabranch.recipe import ExportSection
from anabranch.trainers import command

DRIVER = """
import sys
from pathlib import Path
from anabranch.launch.local import Job, run_jobs
folder = Path(sys.argv[1])
run_jobs([Job("branch-0", sys.argv[2:], folder / "branch-0.txt")])
"""
STUBBORN = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "told").touch())
(folder / "pid").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


def shell(folder: Path, name: str, text: str, needs: tuple[str, ...] = ()) -> Job:
    command = ["sh", "-c", f"cd '{folder}'; {text} && date +%s.%N > {name}.done"]
    return Job(name, command, folder / "logs" / f"{name}.txt", needs)


def launcher(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(folder), *command], stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or (not path.read_text() and path.name == "pid"):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_starts_when_its_needs_ended_well_and_one_whose_need_failed_is_named(tmp_path):
    jobs = [shell(tmp_path, "merge", "true", ("branch-0", "branch-1")),
            shell(tmp_path, "evaluate-merged", "true", ("merge",)),
            shell(tmp_path, "evaluate-branch-0", "test -e branch-0.done", ("branch-0", "done long ago")),
            shell(tmp_path, "branch-1", "sleep 0.5; echo out of luck; exit 3"),
            shell(tmp_path, "branch-0", "sleep 0.5")]
    seen: list[tuple[list[str], int]] = []
    with pytest.raises(BranchFailed) as error:
        run_jobs(jobs, max_parallel=3, threads=1, on_tick=lambda running, finished: seen.append((running, finished)))
    assert {path.stem for path in tmp_path.glob("*.done")} == {"branch-0", "evaluate-branch-0"}
    text = str(error.value)
    assert "3 of 5 jobs failed" in text and "branch-1: exit code 3" in text and "out of luck" in text
    assert "merge: not started, it needs branch-1" in text and "evaluate-merged: not started, it needs merge" in text
    assert max(len(running) for running, _ in seen) == 2  # what waits takes no place


def test_the_end_of_a_log_is_short_and_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    with pytest.raises(BranchFailed) as error:
        run_jobs([shell(tmp_path, "plan", "seq 100000; echo key $SOME_API_KEY; exit 1")], threads=1)
    assert "key ***" in str(error.value) and "hunter2" not in str(error.value) and len(str(error.value)) < 2000


def test_ctrl_c_lets_a_job_save(tmp_path):
    process = launcher(tmp_path, *stand_in(tmp_path, "branch-0", 600))
    wait_for(tmp_path / "branch-0.attempts")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert int((tmp_path / "branch-0.saved").read_text()) > 0


def test_a_second_ctrl_c_waits_no_longer(tmp_path):
    process = launcher(tmp_path, sys.executable, "-c", STUBBORN, str(tmp_path))
    wait_for(tmp_path / "pid")
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path / "told")
    time.sleep(2.5)
    assert process.poll() is None  # it still has most of its three minutes
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=10)[1]
    assert "Ctrl-C again ends them at once" in said
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_job_that_does_not_end_is_killed_after_the_grace(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", STUBBORN, str(tmp_path)], start_new_session=True)
    wait_for(tmp_path / "pid")
    local._stop([process], grace=0.5)
    assert process.returncode == -signal.SIGKILL and (tmp_path / "told").exists()


def test_whoever_waits_for_another_waits_longer():
    """Else a worker is killed while it pushes what its child has just saved."""
    assert command.GRACE < attempt.GRACE < processes.LEAVE_SECONDS - 60
    assert slurm.WARNING_SECONDS >= processes.LEAVE_SECONDS
    pod = export.kubernetes_job("s3://bucket/run", ExportSection(kind="kubernetes", image="i"), [])["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= processes.LEAVE_SECONDS


def test_a_group_that_has_ended_can_be_signalled(tmp_path):
    process = subprocess.Popen(["true"], start_new_session=True)
    process.wait()
    processes.signal_group(process, signal.SIGTERM)


def test_a_process_ends_with_its_parent(tmp_path):
    inner = f"import os, time\nfrom anabranch.processes import end_with_parent\nend_with_parent()\n" \
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    parent = subprocess.Popen([sys.executable, "-c", outer])
    wait_for(tmp_path / "pid")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_worker_of_this_machine_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    # what a slot has, its children have: `anabranch work` starts its own with the environment it was given
    jobs = [shell(tmp_path, f"worker-{i}", f"sh -c 'echo $CUDA_VISIBLE_DEVICES' > gpu-{i}; sleep 0.7") for i in range(2)]
    run_jobs(jobs, max_parallel=2, threads=1)
    assert [(tmp_path / f"gpu-{i}").read_text() for i in range(2)] == ["3\n", "GPU-7\n"]


@pytest.mark.parametrize(("given", "seen"), [("GPU-7", "GPU-7"), ("5", "5"), ("", ""), (None, "0")])
def test_a_workers_child_keeps_the_gpu_that_it_was_given(tmp_path, monkeypatch, given, seen):
    known = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    monkeypatch.setattr(os, "environ", known if given is None else known | {"CUDA_VISIBLE_DEVICES": given})
    found = []
    monkeypatch.setattr(perform, "main", lambda *_: found.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    cli_work.perform(tmp_path, "branch-0")
    assert found == [seen]
