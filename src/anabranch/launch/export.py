"""Files that start workers elsewhere: shell scripts for any machine or scheduler, a Job for Kubernetes.

A worker is `anabranch work ROOT`: it takes whatever is free until all is done, so nothing here needs to know who does
what. No file holds a secret: credentials come from each machine's environment, or from a Secret that is named only.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from anabranch.errors import OutputError, RecipeError
from anabranch.exit_codes import MUST_ACT, PREEMPTED, TRY_AGAIN
from anabranch.processes import LEAVE_SECONDS
from anabranch.recipe import ExportSection
from anabranch.store.files import open_store

FAILURES_PER_WORKER = 6  # of pods, before Kubernetes gives the Job up; preempted ones are not counted
PAUSES = (60, 600)  # seconds before a worker that had trouble is started again: the first time, and at most

SCRIPT = """#!/usr/bin/env bash
# Worker {number} of {workers}. Start it on any machine that reaches {place} and has anabranch installed.
# It works until the run is done. Told to stop (SIGTERM, SIGINT, SIGUSR1, SIGUSR2), it saves, leaves with code 85, and
# goes on when it is started again. Code {try_again}: this machine or the store had trouble, so it is started again later.
# Credentials are read from the environment; there are none in this file.
set -u
worker= stopped= heard= pause={first}
stop() {{ stopped=1 heard=1; [ -z "$worker" ] || kill -TERM "$worker" 2>/dev/null; }}
trap stop TERM INT USR1 USR2
while [ -z "$stopped" ]; do
  began=$SECONDS
  {command} &
  worker=$!
  [ -z "$stopped" ] || kill -TERM "$worker"
  while :; do heard=; wait "$worker"; code=$?; [ -n "$heard" ] || break; done  # a signal ends `wait`, not the worker
  worker=
  [ $((SECONDS - began)) -lt {longest} ] || pause={first}  # it had worked meanwhile
  case "$code" in
    {preempted}) next=5 ;;
    {try_again}) next=$pause pause=$((pause * 2 < {longest} ? pause * 2 : {longest}))
        echo "worker {number}: trouble of this machine or of the store; started again in $next s" >&2 ;;
    *) exit "$code" ;;
  esac
  [ -z "$stopped" ] || break
  sleep "$next" &
  worker=$!
  [ -z "$stopped" ] || kill -TERM "$worker"
  wait "$worker"  # as a child: a signal need not wait for the end of it
  worker=
done
exit {preempted}
"""

README = """# Workers for {root}

{what}
Any number may run at the same time, anywhere; each takes what is free. One that dies is replaced: what it held is free
again when its lease runs out, and goes on from its last checkpoint.

    anabranch status {quoted} --watch      # who holds what, speed, time left, failures

Exit codes of a worker: 0 all is done; 2 you must change something (its last lines say what); 75 its machine or the store
had trouble: start it again later, or elsewhere; 85 it was told to stop and saved: start it again; anything else is a
crash, and starting it again is safe.
{trust}
When all is done, run `anabranch run recipe.yaml` again where it was started: it brings the results home and reports.
"""


def export_jobs(root: str, section: ExportSection, out: Path, *, trust: bool = False) -> list[Path]:
    """Write what starts `section.workers` workers of the store at `root`.

    Args:
        out: the folder to write into; files of an earlier export are replaced, `worker-*.sh` of a larger one removed.
        trust: the recipe brings code (a trainer's command, a model's own), so workers get `--trust`.
    Returns:
        The files, README.md last.
    Raises:
        RecipeError: credentials inside the URL; for Kubernetes: no image, a store that pods cannot see, names or amounts
            that Kubernetes would refuse. All in one message.
        OutputError: the folder cannot be written.
    """
    check_export(root, section)
    if _is_folder(root):
        root = str(Path(root.removeprefix("file://")).absolute())
    words = ["anabranch", "work", root, *(["--trust"] if trust else [])]
    if section.kind == "shell":
        files = {f"worker-{i}.sh": SCRIPT.format(number=i + 1, workers=section.workers, place=_one_line(root),
                                                 command=shlex.join(words), preempted=PREEMPTED, try_again=TRY_AGAIN,
                                                 first=PAUSES[0], longest=PAUSES[1])
                 for i in range(section.workers)}
        what = ("Each `worker-*.sh` is one worker, and all are alike: start each once, where you like (ssh, tmux, a queue), or "
                "one many times.")
    else:
        files = {"job.yaml": yaml.safe_dump(kubernetes_job(root, section, words), sort_keys=False, width=120)}
        what = _kubernetes_words(root, section)
    files["README.md"] = README.format(
        root=_one_line(root), quoted=shlex.quote(root), what=what,
        trust="\nThe recipe brings code of its own; `--trust` lets workers run it. Read it first.\n" if trust else "")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("worker-*.sh"):
            old.unlink()
        for name, text in files.items():
            (out / name).write_text(text)
            if name.endswith(".sh"):
                (out / name).chmod(0o755)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}). Free the place or choose another `output`.") from None
    return [out / name for name in files]


def kubernetes_job(root: str, section: ExportSection, words: list[str]) -> dict[str, Any]:
    """A batch/v1 Job (Kubernetes 1.29 or later): one index per worker, each done when the run is.

    Preempted pods (exit code 85, or a disruption such as a drained spot node) are replaced and not counted. Exit code 2
    ends the Job, for the same would happen again. Exit code 75 (trouble of the node or of the store) and crashes count
    towards the backoff limit; Kubernetes waits 10 s before the next pod, then twice as long each time, up to six minutes.
    """
    resources = {"cpu": str(section.cpus), "memory": section.memory} | (
        {"nvidia.com/gpu": str(section.gpus)} if section.gpus else {})
    container: dict[str, Any] = {
        "name": "worker", "image": section.image, "command": words,
        "env": [{"name": "OMP_NUM_THREADS", "value": str(section.cpus)}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "resources": {"requests": resources, "limits": resources}}
    if section.secret:
        container["envFrom"] = [{"secretRef": {"name": section.secret}}]
    rules = [{"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [MUST_ACT]}},
             {"action": "Ignore", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [PREEMPTED]}},
             {"action": "Count", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [TRY_AGAIN]}},
             {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": int(LEAVE_SECONDS), "automountServiceAccountToken": False,
           "containers": [container]}
    name = job_name(root)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": {"app": "anabranch"}},
            "spec": {"completionMode": "Indexed", "completions": section.workers, "parallelism": section.workers,
                     "backoffLimit": FAILURES_PER_WORKER * section.workers, "podFailurePolicy": {"rules": rules},
                     "template": {"metadata": {"labels": {"app": "anabranch", "run": name}}, "spec": pod}}}


def job_name(root: str) -> str:
    """A DNS label from the last part of the address; short, as Kubernetes appends the index and five characters."""
    last = re.sub(r"[^a-z0-9]+", "-", root.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    return f"anabranch-{last}"[:45].rstrip("-")


def check_export(root: str, section: ExportSection) -> None:
    """What can be known before anything is written. Raises RecipeError."""
    problems = []
    try:
        open_store(root)
    except RecipeError as error:  # credentials in it, say, which would stand in every file
        problems.append(f"launch.store: {error}")
    if section.kind == "kubernetes":
        problems += _kubernetes_problems(root, section)
    if problems:
        raise RecipeError.of("Nothing was exported:", problems)


def _kubernetes_problems(root: str, section: ExportSection) -> list[str]:
    problems = []
    if _is_folder(root):
        problems.append("launch.store: a folder of this machine, which pods cannot see. Give a URL: s3://bucket/run or gs://..")
    if not section.image:
        problems.append("launch.export.image: wanted: a container image that has anabranch in it.")
    elif re.search(r"\s", section.image):
        problems.append(f"launch.export.image: {section.image!r}: an image's name has no spaces.")
    if section.secret is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", section.secret):
        problems.append("launch.export.secret: wanted: the name of a Secret (lower-case letters, digits, `-`, `.`), not its "
                        "contents. Make one with: kubectl create secret generic NAME --from-env-file=FILE")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?", section.memory):
        problems.append(f"launch.export.memory: {section.memory!r}: wanted an amount as Kubernetes writes it: 16Gi")
    return problems


def _kubernetes_words(root: str, section: ExportSection) -> str:
    name = job_name(root)
    secret = (f"\nThe pods read their environment from the Secret `{section.secret}`, which must be in their namespace:\n\n"
              f"    kubectl create secret generic {section.secret} --from-env-file=FILE      # lines as "
              "AWS_ACCESS_KEY_ID=..\n" if section.secret else "")
    return (f"`job.yaml` is an Indexed Job of {section.workers} workers for Kubernetes 1.29 or later:\n\n"
            f"    kubectl apply -f job.yaml\n    kubectl get pods -l run={name}\n    kubectl logs -l run={name} --tail 20\n"
            f"    kubectl delete job {name}      # the pods save, and end\n{secret}")


def _is_folder(root: str) -> bool:
    return "://" not in root or root.startswith("file://")


def _one_line(text: str) -> str:
    """For a comment: what a newline in a name would add to a script."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", text)
