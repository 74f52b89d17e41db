"""The nouns of a store: what stands in the shared folder of a run.

    ROOT/run.json                       StoredRun: written once, never changed
    ROOT/objects/ab/abcdef..            bytes, named by their SHA-256
    ROOT/jobs/JOB/claim-0003.json       Claim: the fourth worker that took the job (created, never changed)
    ROOT/jobs/JOB/beat-0003.json        Beat: "still here", replaced by that worker alone
    ROOT/jobs/JOB/end-0003.json         End: it let go, and why (created)
    ROOT/jobs/JOB/checkpoint-0003-00000040.json   Checkpoint: what the next worker goes on from (created)
    ROOT/results/JOB.json               Result: the job is done (created: the first wins); one listing tells all that is done
    ROOT/jobs/JOB/rival-0003.json       Result of a worker that came second with other bytes (created)

Everything here may come from a stranger's machine: sizes are bounded before reading, names are matched before use.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from anabranch.artifacts import Artifact, Part, digest

STATE_LIMIT = 8 * 2**20  # bytes of a state file; a run of 10,000 units names some 2 MB of files
JOB_NAME = re.compile(r"(gradients|branch)-(0|[1-9][0-9]{0,5})|plan|merge|evaluate-(base|merged|branch-(0|[1-9][0-9]{0,5}))")


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("wanted 64 hexadecimal digits (a SHA-256)")
    return text


def check_relative(path: str) -> str:
    """A plain relative path of a file inside a run folder, or ValueError."""
    parts = path.split("/")
    if not 0 < len(path) <= 400 or any(p in ("", ".", "..") or len(p) > 200 for p in parts):
        raise ValueError("wanted a plain path inside the run folder (no `..`, no leading `/`)")
    if re.search(r"[\x00-\x1f\x7f\\:*?\"<>|]", path) or parts[-1].startswith(".") or any(p.startswith("~") for p in parts):
        raise ValueError("wanted a plain path inside the run folder (no control characters, no hidden file)")
    return path


def check_job(name: str) -> str:
    """The name of a job, or ValueError."""
    if not JOB_NAME.fullmatch(name):
        raise ValueError("wanted a job's name: gradients-N, plan, branch-N, merge, evaluate-base, -merged or -branch-N")
    return name


Sha256 = Annotated[str, AfterValidator(_sha256)]
RelativePath = Annotated[str, AfterValidator(check_relative)]
JobName = Annotated[str, AfterValidator(check_job)]
WorkerName = Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9._-]+$")]


class FileRef(Part):
    """Bytes in `objects/`."""

    sha256: Sha256
    size: int = Field(ge=0, le=2**50, description="bytes")


Files = dict[RelativePath, FileRef]  # path inside a run folder -> its bytes


class StoredBase(Part):
    """The base: by its name on the Hub, or, where it was a folder, as files."""

    hash: str = Field(description="checkpoint_hash of the base; a worker refuses another")
    hub: str | None = None
    revision: str | None = None
    files: Files = Field({}, description="names inside the model folder")


class StoredRun(Artifact):
    """run.json: what every worker goes by. Its hash is the run's identity; there is no second version of it."""

    kind: Literal["stored_run"] = "stored_run"
    version: Literal[1] = 1
    recipe: dict[str, Any] = Field(description="the recipe as understood, less its `launch` and `output`")
    base: StoredBase
    mixture: Files = Field(description="mixture/mixture.json and mixture/units/*")
    jobs: dict[JobName, list[JobName]] = Field(description="every job and the jobs whose results it needs")
    lease_seconds: float = Field(gt=0, le=86400, description="a holder that is silent for so long has lost its job")
    retries: int = Field(ge=0, le=1000, description="failures of a job (not preemptions) before it is given up")


class Claim(Part):
    job: JobName
    attempt: int = Field(ge=0, lt=10**6)
    worker: WorkerName
    token: str = Field(min_length=16, max_length=64, description="random: tells one's own claim after an answer was lost")


class Beat(Part):
    """What a holder says while it works. Only that it changes is used to judge whether the holder lives: no clock is read."""

    count: int = Field(ge=0)
    doing: str = Field("", max_length=200, description="pull, train, push, ..")
    step: int = Field(0, ge=0)
    steps: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    tokens_per_second: float = Field(0.0, ge=0, allow_inf_nan=False)
    seconds_left: float | None = Field(None, ge=0, allow_inf_nan=False)
    loss: float | None = Field(None, allow_inf_nan=False)  # 1e999 is read as infinity, and would be written as null
    cores: int = Field(0, ge=0)


class End(Part):
    attempt: int = Field(ge=0, lt=10**6)
    reason: Literal["done", "preempted", "failed", "lost"]
    message: str = Field("", max_length=8000, description="for people: the end of the log of what failed")


class Checkpoint(Part):
    job: JobName
    attempt: int = Field(ge=0, lt=10**6)
    step: int = Field(ge=0, lt=10**8)
    files: Files = Field(description="paths inside the run folder")


class Result(Part):
    """A job's outputs. Two workers may finish the same job; the first result stands, and `content` tells whether they agree."""

    job: JobName
    run: Sha256 = Field(description="hash of run.json")
    attempt: int = Field(ge=0, lt=10**6)
    worker: WorkerName
    files: Files = Field(description="paths inside the run folder, below what this job may write")

    @property
    def content(self) -> str:
        """Hash of what was made, whoever made it."""
        return digest({path: ref.sha256 for path, ref in self.files.items()})
