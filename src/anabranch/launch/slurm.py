"""Commands on a Slurm queue: arrays through submitit, dependencies by `needs`, back into the queue after a preemption.

On the node, `run_in_allocation` starts the command and passes every signal on as SIGTERM. A command that ends with
code 85 was preempted and is queued again under the same job id, so whatever depends on it goes on waiting; so is one
that ends with 75 (trouble of its machine or of the store), but only `retries` times. Nothing here asks `sacct`, which
many clusters do not have: a job is over when the caller's own check says so, and what is still on its way is read from
`squeue`.

submitit pickles `run_in_allocation` by its name, with the command's words as arguments, into `folder`, and reads that
pickle on the node. No other pickle is ever read, and none from a store: keep `folder` writable by yourself alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, BranchFailed, CorruptedError, OutputError, RecipeError
from anabranch.exit_codes import MUST_ACT, PREEMPTED, TRY_AGAIN
from anabranch.launch.local import Job
from anabranch.launch.logs import end_of_log
from anabranch.processes import LEAVE_SECONDS, signal_group
from anabranch.recipe import SlurmSection

# How long before the end of a job's `time` Slurm warns it: so long that a worker can save and push. It kills nobody; what
# ends a job that is preempted or cancelled is the site's own GraceTime and KillWait (30 s by default), often earlier.
WARNING_SECONDS = int(LEAVE_SECONDS)
ARRAY_LIMIT = 1000  # jobs of one array: Slurm's MaxArraySize is 1001 unless a site says otherwise
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
          "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "RESV_DEL_HOLD"}
TAKEN = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}  # ended through no fault of the job, and not queued again by Slurm itself
OURS = ("array", "dependency", "output", "error", "open-mode", "job-name", "requeue", "no-requeue", "kill-on-invalid-dep")
SETTLE_SECONDS = 60.0  # a shared disk may show a result so much later than the queue shows the end of its job
SILENCE_SECONDS = 900.0  # a controller that is restarted answers within minutes


@dataclass
class _Watched:
    """What is known of the jobs in the queue."""

    ids: dict[str, str]  # job -> Slurm's id of it
    states: dict[str, str] = field(default_factory=dict)
    over_since: dict[str, float] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # job -> the state it ended in


def run_jobs_slurm(jobs: Sequence[Job], section: SlurmSection, folder: Path, *, name: str, done: Callable[[str], bool],
                   retries: int, on_tick: Callable[[list[str], int], None] | None = None,
                   look_every: float = 10.0) -> dict[str, str]:
    """Queue every job that is not done, one array per set of `needs`, and wait for them.

    A job starts when all its `needs` ended well (`afterok`); a need that is not among `jobs` counts as done. A job whose
    need failed leaves the queue; everything else goes on. Jobs of an earlier call that still stand in the queue (they are
    noted in `folder`) are waited for, not queued twice.

    Args:
        folder: for submitit's scripts and logs; every node must see it, and every job's `log`.
        name: shown by `squeue`.
        done: whether a job's result is there; asked only of jobs that have left the queue.
        retries: of a job that ends with code 75, after which it counts as failed. A preemption (85) is free.
        on_tick: told (names of running jobs, jobs finished) at each look at the queue.
        look_every: seconds between two looks.
    Returns:
        Slurm's id of each job that was queued or found in the queue.
    Raises:
        RecipeError: no Slurm here, no submitit, or an option that sbatch refuses.
        BranchFailed: naming every job that failed and what waited for it, with the end of its log.
        OutputError: the queue did not answer for a quarter of an hour.
        KeyboardInterrupt: Ctrl-C; its text says that the jobs stay in the queue, and how to cancel them.
    """
    check_slurm(section)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    everything: dict[str, str] = {}
    failed: dict[str, str] = {}
    while todo := [job for job in jobs if job.name not in failed and not done(job.name)]:
        ids = _submit(todo, _found_in_queue(folder, name, todo), section, folder, name, retries)
        everything |= ids
        try:
            ended = _watch(ids, done, len(jobs) - len(todo) - len(failed), on_tick, look_every)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_left_in_queue(ids)) from None
        failed |= _for_good(jobs, ended)  # the rest was taken from us: queue it again
    if failed:
        raise _failure(jobs, failed, everything, folder)
    return everything


def check_slurm(section: SlurmSection) -> None:
    """What can be known before anything is queued. Raises RecipeError."""
    problems = []
    if lacking := [program for program in ("sbatch", "squeue", "srun") if not shutil.which(program)]:
        problems.append(f"Slurm's commands are not on this machine ({', '.join(lacking)} not found). Start this on a login "
                        "node of the cluster, or use `launcher: export`, which writes scripts.")
    try:
        import submitit  # noqa: F401 - asked for here so that the message names it with the rest
    except ImportError:
        problems.append("submitit is not installed: pip install 'anabranch[slurm]'")
    if taken := sorted(key for key in section.extra if key.replace("_", "-") in OURS):
        problems.append(f"launch.slurm.extra: {', '.join(taken)}: set by the launcher; take it out.")
    if problems:
        raise RecipeError.of("The jobs cannot be queued:", problems)


# ---- into the queue


def _submit(todo: list[Job], queued: Mapping[str, str], section: SlurmSection, folder: Path, name: str,
            retries: int) -> dict[str, str]:
    """Queue what is not there yet, needs before what needs them; returns the ids of all. On a refusal nothing stays."""
    ids, new = dict(queued), list[str]()
    try:
        for group in _groups([job for job in todo if job.name not in ids], {job.name for job in todo}, set(ids)):
            needed = [ids[need] for need in group[0].needs if need in ids]
            identifiers = _submit_array(group, needed, ids, section, folder, name, retries)
            ids |= identifiers
            new += identifiers.values()
            _note(folder, ids, todo)
    except BaseException:
        if new:
            subprocess.run(["scancel", *sorted({i.split("_")[0] for i in new})], check=False, capture_output=True)
        raise
    return ids


def _groups(jobs: list[Job], known: set[str], placed: set[str]) -> list[list[Job]]:
    """Jobs that wait for the same, together; in an order in which needs come first."""
    groups, left, placed = list[list[Job]](), list(jobs), set(placed)
    while left:
        ready: dict[tuple[str, ...], list[Job]] = {}
        for job in left:
            if all(need in placed or need not in known for need in job.needs):
                ready.setdefault(tuple(sorted(set(job.needs))), []).append(job)
        if not ready:
            raise ValueError(f"jobs that wait for each other: {', '.join(job.name for job in left)}")
        for same in ready.values():
            groups += [same[i:i + ARRAY_LIMIT] for i in range(0, len(same), ARRAY_LIMIT)]
            placed |= {job.name for job in same}
        left = [job for job in left if job.name not in placed]
    return groups


def _submit_array(group: list[Job], needed: list[str], ids: Mapping[str, str], section: SlurmSection, folder: Path,
                  name: str, retries: int) -> dict[str, str]:
    import submitit

    minutes = section.time
    save = WARNING_SECONDS if minutes is None else min(WARNING_SECONDS, minutes * 20)
    options: dict[str, Any] = {
        "job_name": name, "time": minutes, "partition": section.partition, "mem": section.memory,
        "cpus_per_task": section.cpus, "gpus_per_node": section.gpus or None, "setup": section.setup or None,
        "array_parallelism": section.parallel or len(group), "signal_delay_s": save, "stderr_to_stdout": True,
        "dependency": "afterok:" + ":".join(_whole_arrays(needed, ids)) if needed else None,
        # srun does not take over sbatch's --cpus-per-task since Slurm 22.05: without this a step has one core
        "srun_args": ["--cpus-per-task", str(section.cpus)],
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes"} | section.extra}
    try:
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**{key: value for key, value in options.items() if value is not None or key == "time"})
        with executor.batch():
            handles = [executor.submit(run_in_allocation, job.command, str(job.log.absolute()), save, section.cpus,
                                       str(folder), retries) for job in group]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise RecipeError(f"Slurm refused the jobs ({', '.join(job.name for job in group[:3])}, ..): {_words(error)}\n"
                          "  Look at `launch.slurm` in the recipe: partition, time, cpus, gpus, memory and extra are what "
                          "sbatch was given.") from None
    return {job.name: handle.job_id for job, handle in zip(group, handles, strict=True)}


def _whole_arrays(needed: Sequence[str], ids: Mapping[str, str]) -> list[str]:
    """12_0, 12_1, 13 -> 12, 13 where the array 12 has no third job: an array of 1000 would fill a line of sbatch."""
    members: dict[str, set[str]] = {}
    for one in ids.values():
        members.setdefault(one.split("_")[0], set()).add(one)
    whole = {array for array, all_of_it in members.items() if all_of_it <= set(needed)}
    return list(dict.fromkeys(one.split("_")[0] if one.split("_")[0] in whole else one for one in needed))


def _words(error: Exception) -> str:
    """sbatch's own complaint, out of submitit's account of it."""
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    return "; ".join(lines) or str(error).strip()[-500:]


def _note(folder: Path, ids: Mapping[str, str], jobs: Sequence[Job]) -> None:
    new = folder / "queued.json.new"
    new.write_text(json.dumps({job.name: {"id": ids[job.name], "command": job.command} for job in jobs if job.name in ids},
                              indent=1, sort_keys=True))
    os.replace(new, folder / "queued.json")


def _found_in_queue(folder: Path, name: str, jobs: Sequence[Job]) -> dict[str, str]:
    """Jobs that an earlier call queued, with the same command, and that are still there."""
    path = folder / "queued.json"
    if not path.exists():
        return {}
    try:
        noted = dict(json.loads(path.read_text()))
        ids = {job.name: str(noted[job.name]["id"]) for job in jobs
               if job.name in noted and noted[job.name]["command"] == job.command}
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptedError(f"{path}: damaged ({error}). See with `squeue --me` what is queued, cancel it, and remove the "
                             "file.") from None
    if not ids:
        return {}
    for _ in range(10):
        if (queue := _queue()) is not None:
            return {job: i for job, i in ids.items() if i in queue and queue[i][0] in ACTIVE and queue[i][1] == name}
        time.sleep(3)
    raise OutputError("squeue does not answer, so it cannot be told what is queued already. Try again when Slurm is back.")


# ---- while they run


def _watch(ids: Mapping[str, str], done: Callable[[str], bool], finished: int,
           on_tick: Callable[[list[str], int], None] | None, look_every: float) -> dict[str, str]:
    """Wait until none of these jobs is left in the queue; returns the state in which those without a result ended."""
    watched, answered = _Watched(dict(ids)), time.monotonic()
    while True:
        queue, now = _queue(), time.monotonic()
        if queue is not None:
            answered = now
            _look(watched, queue, done, now)
        elif now - answered > SILENCE_SECONDS:
            raise OutputError(f"squeue did not answer for {SILENCE_SECONDS / 60:.0f} minutes. The jobs are not lost: the same "
                              f"command goes on waiting for them ({_left_in_queue(ids)})")
        if on_tick:
            on_tick([job for job, state in watched.states.items() if state in ("RUNNING", "COMPLETING")],
                    finished + len(watched.finished))
        if len(watched.finished) + len(watched.failed) == len(ids):
            return watched.failed
        time.sleep(look_every)


def _look(watched: _Watched, queue: Mapping[str, tuple[str, str]], done: Callable[[str], bool], now: float) -> None:
    for job, identifier in watched.ids.items():
        if job in watched.finished or job in watched.failed:
            continue
        state = queue[identifier][0] if identifier in queue else ""
        if state in ACTIVE:
            watched.states[job] = state
            watched.over_since.pop(job, None)
            continue
        if state or watched.states.get(job) in ACTIVE:  # Slurm forgets a job some minutes after its end
            watched.states[job] = state or "GONE"
        since = watched.over_since.setdefault(job, now)
        if done(job):
            watched.finished.add(job)
            watched.states.pop(job, None)
        elif watched.states.get(job, "GONE") not in ("COMPLETED", "GONE") or now - since > SETTLE_SECONDS:
            watched.failed[job] = watched.states.pop(job, "GONE")


def _queue() -> dict[str, tuple[str, str]] | None:
    """id -> (state, name) of this user's jobs, those that ended minutes ago among them; None if Slurm does not answer."""
    try:
        answer = subprocess.run(["squeue", "--me", "-h", "-r", "-t", "all", "-o", "%i|%T|%j"], capture_output=True, text=True,
                                timeout=60, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    rows = [line.strip().split("|", 2) for line in answer.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def _left_in_queue(ids: Mapping[str, str]) -> str:
    arrays = sorted({i.split("_")[0] for i in ids.values()}, key=int)
    return (f"the {len(ids)} jobs stay in Slurm's queue and run on. See them: squeue --me. Wait for them again: the same "
            f"command. Cancel them: scancel {' '.join(arrays)}")


def _behind(name: str, failed: Mapping[str, str], by_name: Mapping[str, Job]) -> list[str]:
    """The failed needs because of which Slurm took a job out of the queue before it had begun."""
    return [need for need in by_name[name].needs if need in failed] if failed[name] == "CANCELLED" else []


def _for_good(jobs: Sequence[Job], ended: Mapping[str, str]) -> dict[str, str]:
    """Of the jobs that ended without a result: those that failed by themselves, and what needed one of them."""
    by_name = {job.name: job for job in jobs}
    lost = {name for name, state in ended.items() if state not in TAKEN and not _behind(name, ended, by_name)}
    while more := {name for name in ended if name not in lost and any(n in lost for n in _behind(name, ended, by_name))}:
        lost |= more
    return {name: ended[name] for name in ended if name in lost}


def _failure(jobs: Sequence[Job], failed: Mapping[str, str], ids: Mapping[str, str], folder: Path) -> AnabranchError:
    by_name = {job.name: job for job in jobs}
    lines, never = [], []
    for name, state in failed.items():
        if behind := _behind(name, failed, by_name):
            never.append(f"{name}: not started, it needs {', '.join(behind)}")
            continue
        how = {"GONE": "ended without a result", "COMPLETED": "ended without a result",
               "TIMEOUT": "its time was over before it was queued again; raise launch.slurm.time"}.get(state, state.lower())
        where = by_name[name].log
        end = end_of_log(where)
        if not end:  # it never came to start the command: a setup line, or no such interpreter on the node
            where = folder / f"{ids[name]}_0_log.out"
            end = end_of_log(where)
        lines.append(f"{name}: {how}{_exit_code(ids[name])} (Slurm job {ids[name]}); the end of {where}:\n{end}")
    return BranchFailed.of(f"{len(failed)} of {len(jobs)} jobs failed; the others' work is kept. Mend the cause and run the "
                           "same command again:", lines + never)


def _exit_code(identifier: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", identifier], capture_output=True, text=True, check=False).stdout
    codes = [word.removeprefix("ExitCode=").split(":") for word in shown.split() if word.startswith("ExitCode=")]
    if len(codes) != 1 or codes[0] == ["0", "0"]:
        return ""
    return f", exit code {codes[0][0]}" if codes[0][1] == "0" else f", signal {codes[0][1]}"


# ---- on the node


def run_in_allocation(command: list[str], log: str, save_seconds: float, cpus: int, folder: str, retries: int) -> None:
    """Run a command inside a Slurm job, pass signals on as SIGTERM, and go back into the queue when it was preempted.

    Slurm may signal every process of the job at once; the command therefore starts with USR1 and USR2 ignored (their
    default is death) and gets one SIGTERM more than it needs. If it has not ended when its `save_seconds` are nearly
    over, the job is queued again all the same: what it pushed until then is what the next attempt starts from.

    Raises:
        SystemExit: with the command's exit code, unless that is 0.
    """
    told = list[float]()
    running = list[subprocess.Popen[bytes]]()

    def tell(number: int, frame: object) -> None:
        told.append(time.monotonic())
        for process in running:
            signal_group(process, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, tell)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": str(cpus), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"} | os.environ | {
        "ANABRANCH_LAUNCHER_PID": str(os.getpid())}
    with open(log, "ab") as output:
        # preexec_fn: this process has one thread, and what is ignored at exec stays ignored
        running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                        env=environment, start_new_session=True, preexec_fn=_ignore_user_signals))
    if told:
        signal_group(running[0], signal.SIGTERM)
    code = None
    while code is None and not (told and time.monotonic() - told[0] > max(save_seconds - 10.0, save_seconds / 2)):
        try:
            code = running[0].wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
    if code == 0:
        return
    taken = code is None or code == PREEMPTED or (told and code != MUST_ACT)
    if (taken or (code == TRY_AGAIN and _may_try_again(Path(folder), Path(log), retries))) and not _queue_again():
        print("anabranch: Slurm is ending this job already (cancelled, or queued again by others): left to it", file=sys.stderr)
    sys.exit(PREEMPTED if code is None else code if code > 0 else 128 - code)


def _ignore_user_signals() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _may_try_again(folder: Path, log: Path, retries: int) -> bool:
    """Note one more trouble of this Slurm job, as a line of its own file; whether it may be queued again.

    Slurm itself holds a requeued job back for two minutes, by which time a disk or a store may have come back.
    """
    with open(folder / f"{_own_id()}_troubles.txt", "a+") as troubles:
        troubles.write(f"{socket.gethostname()}\n")
        troubles.seek(0)
        count = len(troubles.readlines())
    with open(log, "a") as output:
        output.write(f"[anabranch] {socket.gethostname()}: trouble of this machine or of the store (exit code {TRY_AGAIN}): "
                     + (f"queued again ({count} of {retries})\n" if count <= retries else f"given up after {count} times\n"))
    return count <= retries


def _own_id() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def _queue_again() -> bool:
    """Requeue the job this runs in, unless it is on its way out already: cancelled jobs must not rise again."""
    identifier = _own_id()
    for pause in (1.0, 3.0, 5.0):
        shown = subprocess.run(["squeue", "-h", "-j", identifier, "-o", "%T"], capture_output=True, text=True, check=False)
        if shown.returncode == 0:
            if shown.stdout.strip() != "RUNNING":
                return False
            again = subprocess.run(["scontrol", "requeue", identifier], capture_output=True, text=True, check=False)
            if again.returncode == 0:
                return True
            print(f"anabranch: {again.stderr.strip()}", file=sys.stderr)
        time.sleep(pause)
    return False
