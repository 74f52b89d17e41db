"""A real Slurm of one node in a folder of its own: munged, slurmctld and slurmd on free ports, for tests and scripts.

    python tests/engines/slurm_one_node.py start DIR [CPUS]      prints the `export` line that a shell needs
    python tests/engines/slurm_one_node.py stop DIR

It wants the programs of Debian's `slurm-wlm` and `munge` (`apt-get install -y slurm-wlm munge`), and nothing of their
set-up: key, sockets, logs and pid files lie in DIR, so several can stand side by side and a Slurm of the machine is
left alone. Accounting is off: there is no `sacct`, as on many small clusters. Jobs of the partition `urgent` take cores
from those of `main` (which get 20 s and go back into the queue) and of `scavenge` (which are cancelled).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
# config_overrides: CPUs is taken as given here, also where the machine has fewer.
# cred_expire: a requeued job waits for so long before it starts again (Slurm's default is 120 s, its least 5).
CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=3
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
KillWait=10
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=scavenge Nodes={host} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs that are not installed; daemons live in /usr/sbin, which is not on every path."""
    return [name for name in PROGRAMS if not _program(name)]


def start(folder: Path, *, cpus: int = 2, patience: float = 60.0) -> dict[str, str]:
    """Start it and wait for an idle node; returns the environment variables that its clients need."""
    folder = folder.absolute()
    for part in ("state", "spool", "log"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # munged refuses a folder that others may write
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=socket.gethostname().split(".")[0], user=getpass.getuser(), cpus=cpus,
                                controller_port=_free_port(), node_port=_free_port()))
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    environment = {"SLURM_CONF": str(conf)}
    full = os.environ | environment | {"LC_ALL": "C"}
    _run([_program("munged"), "--force", "--socket", folder / "munge.socket", "--key-file", key, "--pid-file",
          folder / "munged.pid", "--log-file", folder / "log/munged.log", "--seed-file", folder / "munge.seed"], full)
    _run([_program("slurmctld")], full)
    _run([_program("slurmd")], full)
    deadline = time.monotonic() + patience
    while "idle" not in (seen := _answer(["sinfo", "-h", "-o", "%T"], full)):
        if time.monotonic() > deadline:
            logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in sorted((folder / "log").glob("*.log")))
            stop(folder)
            raise RuntimeError(f"no idle node after {patience:.0f} s (sinfo: {seen!r}); the logs:\n{logs}")
        time.sleep(0.3)
    return environment


def stop(folder: Path) -> None:
    """End its jobs and its daemons, by their pid files."""
    conf = folder.absolute() / "slurm.conf"
    if conf.exists():
        full = os.environ | {"SLURM_CONF": str(conf)}
        if _pid(folder / "ctld.pid"):
            subprocess.run(["scancel", "--quiet", "--user", getpass.getuser()], env=full, check=False, timeout=30)
            deadline = time.monotonic() + 15
            while _answer(["squeue", "-h"], full) and time.monotonic() < deadline:
                time.sleep(0.3)
    for name in ("d.pid", "ctld.pid", "munged.pid"):
        _end(_pid(folder / name))


@contextlib.contextmanager
def one_node(folder: Path, *, cpus: int = 2) -> Iterator[dict[str, str]]:
    """A Slurm for the length of a `with`."""
    try:
        yield start(folder, cpus=cpus)
    finally:
        stop(folder)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _run(command: list[object], environment: dict[str, str]) -> None:
    done = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def _answer(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pid(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _end(pid: int | None) -> None:
    """SIGTERM, then SIGKILL after ten seconds; the pid is that of a daemon of this folder."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        while pid and time.monotonic() < deadline:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            time.sleep(0.2)


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3) or arguments[0] not in ("start", "stop"):
        print(__doc__)
        return 2
    folder = Path(arguments[1])
    if arguments[0] == "stop":
        stop(folder)
        return 0
    if lacking := missing():
        print(f"missing: {', '.join(lacking)}. Install them: apt-get install -y slurm-wlm munge", file=sys.stderr)
        return 2
    for name, value in start(folder, cpus=int(arguments[2]) if len(arguments) == 3 else 2).items():
        print(f"export {name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
