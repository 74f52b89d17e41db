"""Commands as tasks of a Ray cluster, each with the resources it asks for.

A plain task starts the command on whatever node has room, waits for it and brings back its exit code and the end of
what it said. Ray itself runs a task again when its node or its worker process is lost; the exit code decides the rest:

    0   done                        85  preempted: started again, as often as that takes
    2   its user must act: never    75  trouble of that machine or of the store: started again, `retries` times, on
        started again                   another node if one has room
                                    anything else: started again, `retries` times

Credentials are not sent along: commands see the environment that the nodes' own `ray start` was given.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import BranchFailed, RecipeError
from anabranch.exit_codes import MUST_ACT, PREEMPTED, TRY_AGAIN
from anabranch.launch.local import Job
from anabranch.launch.logs import indented
from anabranch.processes import LEAVE_SECONDS
from anabranch.recipe import RaySection

HOPELESS = {MUST_ACT, 126, 127}  # no such program on the node
OWN_STORE_BYTES = 100 * 2**20  # of the object store of a Ray of our own: what we pass is the end of a log


@dataclass
class _Course:
    """Where the jobs of one call stand."""

    waiting: list[Job]
    running: dict[Any, Job] = field(default_factory=dict)  # Ray's reference -> job
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)
    shunned: dict[str, list[str]] = field(default_factory=dict)  # job -> ids of the nodes on which it had trouble


def run_jobs_ray(jobs: Sequence[Job], section: RaySection, *, retries: int,
                 on_tick: Callable[[list[str], int], None] | None = None) -> None:
    """Run every job on the cluster, as soon as its `needs` ended well; others go on when one fails.

    What a command printed last is appended to its `log` here, when it ends. A need that is not among `jobs` counts as done.

    Args:
        retries: failures after which a job is given up. A lost node and a preemption (exit code 85) are free.
        on_tick: told (names of jobs that Ray has, jobs finished) about twice a second.
    Raises:
        RecipeError: no Ray, no cluster at that address, or one that cannot ever run these jobs.
        BranchFailed: naming every job that failed and what waited for it, with the end of its log.
        KeyboardInterrupt: after the commands were told to stop (SIGTERM: they save a checkpoint) and have ended. A second
            one meanwhile leaves at once; the commands are then told again by the end of Ray's own processes.
    """
    with _terminated_as_interrupted():
        _run_on_cluster(list(jobs), section, retries, on_tick)


def _run_on_cluster(jobs: list[Job], section: RaySection, retries: int,
                    on_tick: Callable[[list[str], int], None] | None) -> None:
    ray, ours = _connect(section)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # over Ray's own, which aborts the process
    try:
        _check_room(ray, section, ours)
        on_node = ray.remote(_node_function())
        options = {"num_cpus": section.num_cpus, "num_gpus": section.num_gpus, "resources": dict(section.resources),
                   "max_retries": -1}

        def start(job: Job, shunned: Sequence[str]) -> Any:
            return on_node.options(**options, **_shunning(shunned)).remote(job.command, LEAVE_SECONDS)

        course = _Course(list(jobs))
        try:
            _run(ray, course, start, retries, len(jobs), on_tick)
        except BaseException:
            _cancel(ray, course)
            raise
    finally:
        if ours:
            ray.shutdown()
    if course.failed:
        never = [f"{job.name}: not started, it needs {', '.join(need for need in job.needs if need not in course.finished)}"
                 for job in course.waiting]
        raise BranchFailed.of(f"{len(course.failed) + len(never)} of {len(jobs)} jobs failed; the others' work is kept. Mend "
                              "the cause and run the same command again:", [*course.failed.values(), *never])


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Meanwhile SIGTERM is as Ctrl-C; ray.init sets a handler of its own and leaves it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _connect(section: RaySection) -> tuple[Any, bool]:
    """The ray module, connected, and whether the connection (and perhaps the whole Ray) is ours to end."""
    check_ray(section)
    import ray

    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if section.address is None:
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a Ray of our own reports to nobody
            ray.init(address="local", include_dashboard=False, object_store_memory=OWN_STORE_BYTES, **quiet)
        else:
            ray.init(address=section.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _no_cluster(section.address, str(error).strip()[:600]) from None
    return ray, True


def check_ray(section: RaySection) -> None:
    """What can be known before anything is started. Raises RecipeError."""
    if importlib.util.find_spec("ray") is None:
        raise RecipeError("launcher: ray needs Ray, which is not installed: pip install 'anabranch[ray]'")
    if section.address is not None:
        _check_answers(section.address)


def _check_answers(address: str) -> None:
    """Ask the port first: ray.init waits for minutes where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, f"nothing answers there ({error})") from None


def _no_cluster(address: str | None, why: str) -> RecipeError:
    return RecipeError(
        f"launch.ray.address: {address or 'null'}: cannot be used: {why}\n"
        "  Start a cluster with `ray start --head` here and `ray start --address=HEAD:6379` on each node, all with the same "
        "Python and Ray as here, or write `address: null` for a Ray of anabranch's own on this machine.")


def _check_room(ray: Any, section: RaySection, ours: bool) -> None:
    """Refuse what our own Ray can never run; on a cluster only warn, for it may grow nodes when asked."""
    wanted = {"CPU": section.num_cpus, "GPU": section.num_gpus} | section.resources
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(key, 0.0) >= amount for key, amount in wanted.items()) for node in nodes):
        return
    best = {key: max([node.get(key, 0.0) for node in nodes], default=0.0) for key in wanted}
    message = ("launch.ray: no node can hold a job: it asks " + ", ".join(f"{k} {v:g}" for k, v in wanted.items())
               + "; the most that a node has is " + ", ".join(f"{k} {v:g}" for k, v in best.items()))
    if ours and section.address is None:
        raise RecipeError(f"{message}. Ask less (num_cpus, num_gpus, resources), or give the address of a larger cluster.")
    logging.getLogger("anabranch").warning("%s. Waiting for one that can.", message)


def _run(ray: Any, course: _Course, start: Callable[[Job, Sequence[str]], Any], retries: int, count: int,
         on_tick: Callable[[list[str], int], None] | None) -> None:
    names = {job.name for job in course.waiting}
    while True:
        now = time.monotonic()
        for job in list(course.waiting):
            if all(need in course.finished or need not in names for need in job.needs) \
                    and now >= course.not_before.get(job.name, 0.0):
                course.waiting.remove(job)
                course.running[start(job, course.shunned.get(job.name, []))] = job
        if not course.running and not any(job.name in course.not_before for job in course.waiting):
            return  # what waits now, waits for something that failed
        if course.running:
            for reference in ray.wait(list(course.running), num_returns=1, timeout=0.5)[0]:
                _ended(ray, course, reference, retries)
        else:
            time.sleep(0.5)
        if on_tick:
            on_tick([job.name for job in course.running.values()], len(course.finished))


def _shunning(nodes: Sequence[str]) -> dict[str, Any]:
    """Options of a task that goes to other nodes than these if one of them has room, and else to these."""
    if not nodes:
        return {}
    from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

    return {"scheduling_strategy": NodeLabelSchedulingStrategy({}, soft={"ray.io/node-id": NotIn(*nodes)})}


def _ended(ray: Any, course: _Course, reference: Any, retries: int) -> None:
    job = course.running.pop(reference)
    try:
        code, host, node, said = ray.get(reference)
    except ray.exceptions.RayError as error:
        code, host, node, said = -1, "?", "", f"Ray: {error}".encode()[-4000:]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        log.write(said.rstrip(b"\n") + f"\n[anabranch] {job.name} on {host}: exit code {code}\n".encode())
    if code == 0:
        course.finished.add(job.name)
        course.not_before.pop(job.name, None)
        return
    if code == PREEMPTED:
        course.preemptions[job.name] = tries = course.preemptions.get(job.name, 0) + 1
    else:
        course.failures[job.name] = tries = course.failures.get(job.name, 0) + 1
        if code == TRY_AGAIN:
            course.shunned.setdefault(job.name, []).append(node)
        if code in HOPELESS or tries > retries:
            often = f" ({tries} times)" if tries > 1 else ""
            course.failed[job.name] = (f"{job.name}: exit code {code}{often} on {host}; the end of {job.log}:\n"
                                       f"{indented(said)}")
            course.not_before.pop(job.name, None)
            return
    # the node that preempted it may have some seconds to live: do not hurry back to it
    course.not_before[job.name] = time.monotonic() + min(30.0, 2.0 ** (tries - 1))
    course.waiting.append(job)


def _cancel(ray: Any, course: _Course) -> None:
    """Have every command told to stop, and wait for them to have saved."""
    for reference in course.running:
        ray.cancel(reference)
    if course.running:
        ray.wait(list(course.running), num_returns=len(course.running), timeout=LEAVE_SECONDS + 10.0)


def _node_function() -> Callable[[list[str], float], tuple[int, str, str, bytes]]:
    """What Ray runs on a node. Made here, so that it travels whole: a node's Ray needs no anabranch, only the command does."""

    def on_node(command: list[str], save_seconds: float) -> tuple[int, str, str, bytes]:
        import os
        import signal
        import socket
        import subprocess
        import tempfile
        import time

        import ray

        place = socket.gethostname(), ray.get_runtime_context().get_node_id()
        # ray.cancel raises an interrupt by this handler, which is not there if `ray start` was put into the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
        environment = os.environ | {"ANABRANCH_LAUNCHER_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1",
                                    "TOKENIZERS_PARALLELISM": "false"}
        with tempfile.TemporaryFile() as output:
            try:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                           env=environment, start_new_session=True)
            except OSError as error:
                text = f"{command[0]}: {error.strerror}. `launch.ray.python` names the interpreter on the nodes."
                return 127, *place, text.encode()
            try:
                while process.poll() is None:
                    time.sleep(0.1)  # short, as an interrupt of Ray's only comes between two instructions
            except BaseException:  # the driver cancelled it, or Ray is shutting this worker down
                os.killpg(process.pid, signal.SIGTERM)
                deadline = time.monotonic() + save_seconds
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                raise
            output.seek(max(0, output.seek(0, 2) - 65536))
            return process.returncode, *place, output.read()

    return on_node
