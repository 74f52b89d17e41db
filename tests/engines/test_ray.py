"""Jobs on a real Ray: a head and two worker nodes on this machine, which this starts and stops (some 60 s in all)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in import needs_engine, stand_in

from anabranch.errors import BranchFailed, RecipeError
from anabranch.launch.local import Job
from anabranch.launch.ray import run_jobs_ray
from anabranch.recipe import RaySection

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
try:
    from ray.cluster_utils import Cluster
except ImportError:
    needs_engine("Ray is not installed: pip install 'anabranch[ray]'")

DRIVER = """
import json, sys
from pathlib import Path
from anabranch.launch.local import Job
from anabranch.launch.ray import run_jobs_ray
from anabranch.recipe import RaySection
address, *jobs = json.loads(sys.argv[1])
run_jobs_ray([Job(n, c, Path(log), tuple(needs)) for n, c, log, needs in jobs], RaySection(address=address), retries=0)
"""


def node(**options: Any) -> dict[str, Any]:
    return {"include_dashboard": False, "object_store_memory": 100 * 2**20} | options


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    running = Cluster(initialize_head=True, head_node_args=node(num_cpus=0))
    try:
        yield running
    finally:
        running.shutdown()


@pytest.fixture()
def cluster(head: Any) -> Any:
    """Two nodes of a core each; one that a test lost is replaced for the next."""
    while len(head.worker_nodes) < 2:
        head.add_node(**node(num_cpus=1))
    return head


def shell(folder: Path, name: str, text: str, needs: tuple[str, ...] = ()) -> Job:
    """A job that runs a line of shell in the folder, and leaves NAME.done if that ends well."""
    command = ["sh", "-c", f"cd '{folder}'; {text} && date +%s.%N > {name}.done"]
    return Job(name, command, folder / "logs" / f"{name}.txt", needs)


def counting(folder: Path, name: str, tenths: int) -> Job:
    return Job(name, stand_in(folder, name, tenths), folder / "logs" / f"{name}.txt")


def driver(address: str, jobs: list[Job]) -> subprocess.Popen[str]:
    """A process of its own, as `anabranch run` is one."""
    described = json.dumps([address, *([j.name, j.command, str(j.log), j.needs] for j in jobs)])
    return subprocess.Popen([sys.executable, "-c", DRIVER, described], stderr=subprocess.PIPE, text=True)


def eventually(happens: Callable[[], object], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def attempts(folder: Path, name: str) -> list[dict[str, int]]:
    text = (folder / f"{name}.attempts").read_text()
    return [dict(zip(("from", "pid", "parent"), map(int, found), strict=True))
            for found in re.findall(r"from (\d+) pid (\d+) parent (\d+)", text)]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_order_retries_and_one_failure_stops_only_what_needs_it(cluster, tmp_path):
    once_more = "echo x >> {0}; test $(wc -l < {0}) -gt {1}"
    shards = [shell(tmp_path, f"gradients-{i}", "sleep 0.3") for i in range(3)]
    jobs = [shell(tmp_path, "merge", "true", ("branch-0", "branch-1")),
            shell(tmp_path, "plan", "test $(ls gradients-*.done | wc -l) = 3", tuple(job.name for job in shards)),
            shell(tmp_path, "branch-0", f"{{ {once_more.format('preempted', 2)} || exit 85; }}", ("plan",)),
            shell(tmp_path, "branch-1", "echo x >> crashed; echo out of luck >&2; exit 3", ("plan",)),
            shell(tmp_path, "branch-2", "echo x >> hopeless; echo your turn >&2; exit 2", ("plan",)),
            shell(tmp_path, "branch-3", f"{{ {once_more.format('unlucky', 1)} || exit 7; }}", ("plan",)),
            shell(tmp_path, "evaluate-branch-0", "test -e branch-0.done", ("branch-0",)),
            Job("stray", ["/no/such/python"], tmp_path / "logs" / "stray.txt"), *shards]
    seen: list[tuple[list[str], int]] = []
    with pytest.raises(BranchFailed) as error:
        run_jobs_ray(jobs, RaySection(address=cluster.address), retries=1, on_tick=lambda r, f: seen.append((r, f)))
    done = {path.stem for path in tmp_path.glob("*.done")}
    assert done == {"gradients-0", "gradients-1", "gradients-2", "plan", "branch-0", "branch-3", "evaluate-branch-0"}
    counts = {name: len((tmp_path / name).read_text().split()) for name in ("preempted", "crashed", "hopeless", "unlucky")}
    assert counts == {"preempted": 3, "crashed": 2, "hopeless": 1, "unlucky": 2}  # retries=1: 85 is free, 2 is final
    text = str(error.value)
    assert "4 of 11 jobs failed" in text and "merge: not started, it needs branch-1" in text
    assert "branch-1: exit code 3 (2 times)" in text and "out of luck" in text
    assert "branch-2: exit code 2 on" in text and "your turn" in text
    assert "stray: exit code 127" in text and "/no/such/python: No such file" in text and "launch.ray.python" in text
    assert seen[-1] == ([], 7)
    assert (tmp_path / "logs" / "branch-1.txt").read_text().count("exit code 3") == 2


def test_trouble_of_a_node_is_tried_again_on_another(cluster, tmp_path):
    """A node is known by its raylet, the parent of the process that starts commands."""
    body = "ps -o ppid= -p $PPID >> nodes-{0}; test $(wc -l < nodes-{0}) -gt 1 || exit 75"
    jobs = [shell(tmp_path, f"branch-{i}", f"{{ {body.format(i)}; }}", (f"branch-{i - 1}",) if i else ()) for i in range(3)]
    jobs.append(shell(tmp_path, "merge", "echo x >> lasting; echo no disk; exit 75", ("branch-2",)))
    with pytest.raises(BranchFailed) as error:
        run_jobs_ray(jobs, RaySection(address=cluster.address), retries=2)
    for i in range(3):  # one after another, so that the other node has room
        nodes = (tmp_path / f"nodes-{i}").read_text().split()
        assert len(nodes) == 2 and nodes[0] != nodes[1]
    assert (tmp_path / "lasting").read_text().count("x") == 3  # though there are but two nodes to avoid
    assert "merge: exit code 75 (3 times)" in str(error.value) and "no disk" in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_the_launcher_has_the_commands_save(cluster, tmp_path, number):
    process = driver(cluster.address, [counting(tmp_path, f"branch-{i}", 600) for i in range(2)])
    eventually(lambda: all((tmp_path / f"branch-{i}.attempts").exists() for i in range(2)))
    time.sleep(0.5)
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert "KeyboardInterrupt" in errors.splitlines()[-1]
    for i in range(2):
        assert int((tmp_path / f"branch-{i}.saved").read_text()) > 0
        assert not alive(attempts(tmp_path, f"branch-{i}")[0]["pid"])


def test_a_launcher_that_is_killed_leaves_no_command_behind(cluster, tmp_path):
    process = driver(cluster.address, [counting(tmp_path, "branch-0", 600)])
    eventually((tmp_path / "branch-0.attempts").exists)
    process.kill()
    process.communicate()
    eventually(lambda: not alive(attempts(tmp_path, "branch-0")[0]["pid"]))  # told, and given no time to save


def test_room_that_a_cluster_may_still_grow_is_waited_for_and_every_job_has_a_gpu_of_its_own(cluster, tmp_path, caplog):
    late: list[Any] = []

    def grow(running: list[str], finished: int) -> None:
        if not late:
            assert not finished
            late.append(cluster.add_node(**node(num_cpus=2, num_gpus=2, resources={"big": 2})))

    both = "until test -e gpu-0 -a -e gpu-1; do sleep 0.1; done"
    jobs = [shell(tmp_path, f"branch-{i}", f"echo $CUDA_VISIBLE_DEVICES > gpu-{i}; {both}") for i in range(2)]
    try:
        run_jobs_ray(jobs, RaySection(address=cluster.address, num_gpus=1, resources={"big": 1}), retries=0, on_tick=grow)
    finally:
        for grown in late:
            cluster.remove_node(grown)
    assert "no node can hold a job: it asks CPU 1, GPU 1, big 1" in caplog.text
    assert {(tmp_path / f"gpu-{i}").read_text().strip() for i in range(2)} == {"0", "1"}
    assert all((tmp_path / f"branch-{i}.done").exists() for i in range(2))


def test_a_lost_node_costs_nothing_but_the_time(cluster, tmp_path):
    """The node's processes are killed without a word; both jobs end on the one that is left, though retries are 0."""
    jobs = [counting(tmp_path, f"branch-{i}", 30) for i in range(2)]
    process = driver(cluster.address, jobs)
    eventually(lambda: all((tmp_path / f"branch-{i}.attempts").exists() for i in range(2)))
    raylet = parent_of(attempts(tmp_path, "branch-0")[0]["parent"])
    lost = next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet)
    cluster.remove_node(lost, allow_graceful=False)
    assert process.wait(60) == 0, process.stderr.read()
    assert all((tmp_path / f"branch-{i}.done").exists() for i in range(2))
    assert len(attempts(tmp_path, "branch-0")) == 2 and len(attempts(tmp_path, "branch-1")) == 1
    assert not alive(attempts(tmp_path, "branch-0")[0]["pid"])  # no command goes on beside the one that replaced it


def test_a_ray_of_our_own_reports_to_nobody_and_goes_away(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    job = shell(tmp_path, "plan", "echo usage $RAY_USAGE_STATS_ENABLED parent $PPID; ps -eo args")
    run_jobs_ray([job], RaySection(address=None), retries=0)
    said = job.log.read_text()
    assert "usage 0 " in said
    # Ray starts a process of this name in any case; without its front end it serves no page
    assert all("--disable-frontend" in line for line in said.splitlines() if "dashboard/dashboard.py" in line)
    import ray

    assert not ray.is_initialized()
    eventually(lambda: not alive(int(said.split("parent ")[1].split()[0])))


def test_what_our_own_ray_can_never_run_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"it asks CPU 1, GPU 1000; the most that a node has is CPU \d+, GPU \d+"):
        run_jobs_ray([shell(tmp_path, "plan", "true")], RaySection(address=None, num_gpus=1000), retries=0)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no.such.host.invalid:6379", "ray://127.0.0.1:1", "nonsense",
                                     "127.0.0.1:99999"])
def test_no_cluster_there_is_one_message_at_once(tmp_path, address):
    begun = time.monotonic()
    with pytest.raises(RecipeError, match=rf"ray\.address: {re.escape(address)}: cannot be used(.|\n)*ray start --head"):
        run_jobs_ray([shell(tmp_path, "plan", "true")], RaySection(address=address), retries=0)
    assert time.monotonic() - begun < 15


def test_no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"pip install 'anabranch\[ray\]'"):
        run_jobs_ray([], RaySection(), retries=0)
