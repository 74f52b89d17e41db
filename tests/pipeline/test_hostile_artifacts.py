"""Artifacts by somebody who means no good: each is refused with one message, in time, and nothing is written elsewhere.

Cases are generated from seeds, so that they are the same on every run. A family is a generator that plants one artifact at a
time in a true run's store (or makes one), says which file must be named, and hands out the call that a command would make;
when it is asked for the next case it takes the artifact away again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from anabranch import attempt, distribute, jobs, worker
from anabranch import run as stages
from anabranch.artifacts import BranchManifest, Gradients, Plan
from anabranch.checkpoints import OPTIMIZER, RANDOM, load_tree, mark_complete, newest_checkpoint, save_tree
from anabranch.errors import AnabranchError, OutputError
from anabranch.exit_codes import TRY_AGAIN
from anabranch.gradients import load_halves
from anabranch.perform import perform
from anabranch.plan import load_plan
from anabranch.recipe import load_recipe
from anabranch.rows import load_unit
from anabranch.run import Run, open_run, run_stages
from anabranch.store import leases
from anabranch.store.artifacts import STATE_LIMIT, Beat, Checkpoint, Claim, End, FileRef, Result, StoredRun
from anabranch.store.files import Store, open_store
from anabranch.store.folder import Folder
from anabranch.store.status import Sight, _claim
from anabranch.trainers.returned import accept_branch, take_in
from conftest import write_recipe

SECRET = "hf_TheSecretOfThisMachine"
INSIDE = "what-stands-in-files-elsewhere"
SECONDS = 20.0  # for one refusal; none takes one on an idle machine
LEAST = {
    "run_json": 300,
    "names": 150,
    "results": 150,
    "states": 150,
    "objects": 80,
    "weights": 150,
    "branches": 60,
    "artifacts": 80,
}

Case = tuple[str, str, Callable[[], object], list[Path]]  # name, what must be named (a|b: either), the call, not to be made
Family = Iterator[Case]


@dataclass
class World:
    """A true run of two branches in a store, and what lies around it."""

    above: Path
    run: Run
    store: Store
    stored: StoredRun
    made: Path  # model folders that another trainer returned

    @property
    def root(self) -> Path:
        return self.above / "store"

    @property
    def space(self) -> Path:
        return self.above / "space" / "run"

    @property
    def canary(self) -> Path:
        return self.above / "canary"

    def worker(self, run: StoredRun | None = None, tell: Callable[[str], None] = lambda _: None) -> worker.Worker:
        shutil.rmtree(self.space.parent, ignore_errors=True)
        self.space.parent.mkdir()
        return worker.Worker(self.store, run or self.stored, None, False, tell, "someone", self.space.parent)

    def pull(self, job: str, run: StoredRun | None = None) -> None:
        """As a worker begins a job."""
        attempt.pull(self.worker(run), leases.Lease(job, 0), self.space)

    def work(self) -> None:
        """`anabranch work STORE`; trouble of the store ends it with a code and one message."""
        told: list[str] = []
        if worker.work(self.root, cache=self.above / "cache", tell=told.append) == TRY_AGAIN:
            raise OutputError(told[-1])

    def collect(self, job: str) -> None:
        """`anabranch run`, when its workers are done, into an empty run folder."""
        home = self.above / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        run = Run(self.run.recipe, home, self.run.base, self.run.base_hash, lambda _: None, lambda *_: None)
        distribute.collect(run, self.store, self.stored, [job])

    def performed(self, job: str) -> None:
        perform(self.space, job, model=self.run.base, tell=lambda _: None)

    def put(self, data: bytes) -> FileRef:
        """An object as the store would keep it: a hostile one may well have the hash that it says."""
        sha = hashlib.sha256(data).hexdigest()
        path = self.root / "objects" / sha[:2] / sha
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return FileRef(sha256=sha, size=len(data))

    def object(self, ref: FileRef) -> Path:
        return self.root / "objects" / ref.sha256[:2] / ref.sha256

    def result(self, job: str) -> dict[str, Any]:
        return json.loads((self.root / "results" / f"{job}.json").read_text())

    @contextlib.contextmanager
    def planted(self, path: Path, data: bytes | Callable[[Path], object]) -> Iterator[None]:
        """Something else at a path for a while."""
        aside = self.above / "aside" / f"{path.name}-{random.SystemRandom().randrange(2**60)}"
        aside.parent.mkdir(exist_ok=True)
        if path.exists():
            os.replace(path, aside)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(data) if isinstance(data, bytes) else data(path)
            yield
        finally:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            if aside.exists():
                os.replace(aside, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> World:
    above = tmp_path_factory.mktemp("world")
    for name, text in (
        ("passwd", f"root:{INSIDE}"),
        ("notes/secret.txt", INSIDE),
        ("link-target.json", json.dumps({"a": INSIDE})),
    ):
        (above / "canary" / name).parent.mkdir(parents=True, exist_ok=True)
        (above / "canary" / name).write_text(text)
    run = open_run(load_recipe(write_recipe(above / "mine", tiny_base)), tell=lambda _: None)
    run_stages(run, until="split")
    made = above / "made"
    for k in range(2):
        returned(made / f"good-{k}", tiny_base, lambda name, t, k=k: t + 0.01 * (k + 1))
        accept_branch(run, k, made / f"good-{k}")
    store = open_store(above / "store", cache=above / "cache", patience=1.5)
    return World(above, run, store, distribute.send_run(run, store), made)


def returned(
    folder: Path,
    base: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor | None],
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A model folder as another trainer leaves one: the base's tensors, changed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t for path in sorted(base.glob("*.safetensors")) for name, t in load_file(path).items()}
    changed = {name: change(name, t) for name, t in tensors.items()} | (extra or {})
    save_file({n: t.contiguous() for n, t in changed.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    shutil.copyfile(base / "config.json", folder / "config.json")
    return folder


# ---- judging --------------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> str:
    """Hash over names, kinds and bytes of all that is in a folder."""
    seen = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        seen.update(f"{path.relative_to(folder)} {path.lstat().st_mode} {path.lstat().st_mtime_ns}\n".encode())
        if path.is_file():
            seen.update(path.read_bytes())
    return seen.hexdigest()


def judged(world: World, case: Case) -> str:
    """'' if the artifact is refused as it should be, else what went wrong."""
    _, named, call, absent = case
    before, around = tree(world.canary), set(os.listdir(world.above)) | {"home", "space", "cache", "aside"}

    def too_long(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        call()
        return "accepted"
    except AnabranchError as error:
        message = str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    wrong = []
    if not message.strip() or "Traceback" in message:
        wrong.append(f"says {message[:200]!r}")
    if not any(word in message for word in named.split("|")):
        wrong.append(f"does not name {named}: {message[:300]!r}")
    if SECRET in message or INSIDE in message:
        wrong.append("tells a secret")
    if len(message) > 20_000:
        wrong.append(f"a message of {len(message):,} characters")
    if tree(world.canary) != before or set(os.listdir(world.above)) - around:
        wrong.append(f"writes elsewhere: {sorted(set(os.listdir(world.above)) - around)}")
    if left := [str(p) for p in absent if p.exists()]:
        wrong.append(f"leaves {left}")
    places = [world.above / name for name in ("home", "space", "cache", "store")]
    if left := [str(p) for place in places for p in place.rglob("*.partial")]:
        wrong.append(f"leaves {left[:3]}")
    return "; ".join(wrong)


# ---- material -------------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "../canary/passwd",
    "../../canary/passwd",
    "mixture/../../canary/x.json",
    "/etc/passwd",
    "//etc/passwd",
    "..",
    ".",
    "",
    "a//b.json",
    "./a.json",
    "a/./b.json",
    "C:\\canary.json",
    "C:canary.json",
    "\\\\host\\share\\a.json",
    "a\\..\\b.json",
    "mixture/units/a\x00.safetensors",
    "mixture/units/a\n.safetensors",
    "mixture/units/a\x7f.safetensors",
    "mixture/\uff0e\uff0e/canary.json",
    "mixture/units/\u2024\u2024/x.safetensors",
    "mixture/units/gpj\u202e.safetensors",
    "mixture/units/a\u200b.safetensors",
    "mixture/units/\u2100.safetensors",
    "mixture/units/.hidden.safetensors",
    ".bashrc",
    ".ssh/authorized_keys",
    "~/x.json",
    "~root/x.json",
    "a" * 201 + ".json",
    "/".join(["a"] * 250),
    "mixture/units/a?b.json",
    "mixture/units/a*.safetensors",
    "mixture/units/a|b.safetensors",
    "mixture/units/evil.pkl",
    "mixture/units/evil.py",
    "mixture/units/evil.pt",
    "mixture/units/evil.bin",
    "mixture/units/\U0001f600.safetensors",
    "\ufeffmixture/x.json",
]
GARBAGE = [
    b"",
    b"\x00" * 64,
    b"{",
    b"null",
    b"[]",
    b"true",
    b"1",
    b'"text"',
    b"{}",
    b"\xff\xfe\xff{}",
    b"\x80\x04\x95.",
    b"PK\x03\x04" + b"\x00" * 60,
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"NaN",
    b'{"job": NaN}',
    b"{" + b" " * 100 + b"}",
    "{\u201cjob\u201d: 1}".encode(),
    b'{"job": "\\ud800"}',
    b"1" * 5000,
]
WRONG = [None, True, -1, 2**70, 1.5, "x", [], {}, [[]], "0" * 64]


def edited(value: Any, path: str, new: Any) -> Any:
    """A copy with another value at a dotted path; `...` removes it."""
    copy = json.loads(json.dumps(value))
    *parents, last = path.split("/")
    here = copy
    for part in parents:
        here = here[int(part) if isinstance(here, list) else part]
    key = int(last) if isinstance(here, list) else last
    if new is ...:
        del here[key]
    else:
        here[key] = new
    return copy


def is_object(data: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(data), dict)
    return False


def spelled(value: Any) -> bytes:
    return json.dumps(value).encode()


def twice(data: bytes, key: str, value: str) -> bytes:
    """The object with a key that stands twice; readers disagree on which counts."""
    return data.rstrip()[:-1] + f', "{key}": {value}}}'.encode()


def damage(data: bytes, draw: random.Random, cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """Cut short, and with one bit the other way, where that says something else."""
    for _ in range(cuts):
        at = draw.randrange(len(data))
        yield f"cut at {at}", data[:at]
    true = json.loads(data)
    while flips:
        at = draw.randrange(8 * len(data))
        other = bytearray(data)
        other[at // 8] ^= 1 << at % 8
        with contextlib.suppress(ValueError, RecursionError):
            if json.loads(bytes(other)) == true:
                continue
        flips -= 1
        yield f"bit {at}", bytes(other)


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def bad_safetensors(good: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Files that are none, from a good one."""
    size = struct.unpack("<Q", good[:8])[0]
    header, body = json.loads(good[8 : 8 + size]), good[8 + size :]
    first = next(name for name in header if name != "__metadata__")
    entry = header[first]
    for length in (2**63, 2**64 - 1, 2**32, size + 1, size - 1, 0, 10**8 + 1, len(good)):
        yield f"header of {length} bytes", struct.pack("<Q", length) + good[8:]
    for n in (0, 4, 8, 8 + size // 2, 8 + size, len(good) - 1):
        yield f"{n} bytes of it", good[:n]
    yield "longer", good + b"\x00" * 8
    for text in (b"", b"[]", b"null", b"\x80\x04]", b"{" * 2000, b'{"a"', b"\xff" * 40):
        yield f"header {text[:6]!r}", safetensors(text, body)
    for offsets in ([0, len(body) + 8], [-8, 8], [8, 0], [0, 0], [2**63, 2**63 + 8], [1, 9], [0], [], "x", [0.0, 8.0], None):
        yield f"offsets {offsets}", safetensors(header | {first: entry | {"data_offsets": offsets}}, body)
    for shape in ([2**62, 4], [-1], [2**40], "x", [1.5], [[1]], None, [0]):
        yield f"shape {shape}", safetensors(header | {first: entry | {"shape": shape}}, body)
    for dtype in ("F8", "", "pickle", None, 5, "f32", "STR"):
        yield f"dtype {dtype}", safetensors(header | {first: entry | {"dtype": dtype}}, body)
    name = json.dumps(first).encode()
    doubled = (
        json.dumps(header).encode().rstrip()[:-1]
        + b", "
        + name
        + b": "
        + json.dumps(entry | {"data_offsets": [len(body), len(body) + 8]}).encode()
        + b"}"
    )
    yield "a tensor twice", safetensors(doubled, body + b"\x00" * 8)
    yield "overlapping", safetensors(header | {"overlap": entry}, body)
    yield "a hole", safetensors(header, b"\x00" * 8 + body)
    yield "a zip of torch", b"PK\x03\x04" + draw.randbytes(200)
    yield "a pickle", b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R."
    for _ in range(6):
        yield "noise", draw.randbytes(draw.randrange(1, 400))


# ---- families -------------------------------------------------------------------------------------------------------------


def run_json(world: World, draw: random.Random) -> Family:
    """run.json, as `anabranch work` meets it."""
    path = world.root / "run.json"
    good = path.read_bytes()
    value = json.loads(good)

    def case(name: str, data: bytes, named: str = "run.json") -> Family:
        with world.planted(path, data):
            yield name, named, world.work, []

    for name, data in damage(good, draw, 60, 110):  # some flips make another run, to which the results do not belong
        yield from case(name, data, "run.json|results/")
    for i, data in enumerate(GARBAGE):
        yield from case(f"garbage {i}", data)
    for place in ("", "base/", "recipe/", "recipe/model/", "recipe/mixture/", "recipe/split/", "recipe/trainer/"):
        yield from case(f"a key more in {place}", spelled(edited(value, f"{place}surprise", 1)))
    for field in ("recipe", "base", "mixture", "jobs", "lease_seconds", "retries"):
        yield from case(f"no {field}", spelled(edited(value, field, ...)))
        yield from case(f"{field} twice", twice(good, field, json.dumps(value[field])))
        for wrong in WRONG:
            if (field, wrong) not in (("lease_seconds", 1.5), ("retries", "0" * 64)) and (
                wrong is not True or field not in ("lease_seconds", "retries")
            ):  # those would be numbers, in a run of its own
                yield from case(f"{field} {wrong!r}", spelled(edited(value, field, wrong)))
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-0.5", "9" * 400):
        for field in ("lease_seconds", "retries"):
            yield from case(f"{field} {number}", spelled(edited(value, field, "@")).replace(b'"@"', number.encode()))
        data = spelled(edited(value, "recipe/seed", "@")).replace(b'"@"', number.encode())
        yield from case(f"seed {number[:9]}", data, "run.json" if len(number) < 400 else "results/")  # whole, so another run
    for depth in (250, 900, 5000, 100_000):
        nested = b'"@": ' + b"[" * depth + b"]" * depth
        yield from case(f"nested {depth}", spelled(edited(value, "recipe/train", {"@": "@"})).replace(b'"@": "@"', nested))
    for extra in (1, 4 * 2**20):
        yield from case(f"{extra} bytes too many", good + b" " * (STATE_LIMIT + extra - len(good)))
    for name in (
        "branch-9",
        "gradients-7",
        "evaluate-branch-5",
        "deploy",
        "branch-00",
        "branch--1",
        "plan\n",
        "branch-\u0661",
        "../plan",
        "evaluate-../x",
        "",
        "merge;id",
        "branch-0 ",
        "BRANCH-0",
        "branch-10000000",
        "evaluate-joint",
    ):
        yield from case(f"job {name!r}", spelled(edited(value, "jobs", value["jobs"] | {name: []})))
        yield from case(f"needs {name!r}", spelled(edited(value, "jobs/merge", ["branch-0", "branch-1", name])))
    names = list(value["jobs"])
    for _ in range(40):  # rings of needs, of any length
        ring = draw.sample(names, draw.randrange(1, len(names)))
        needs = value["jobs"] | {
            one: sorted({*value["jobs"][one], other}) for one, other in zip(ring, [*ring[1:], ring[0]], strict=True)
        }
        if needs != value["jobs"]:
            yield from case(f"ring {ring}", spelled(edited(value, "jobs", needs)))
    ladder = {f"gradients-{i}": [f"gradients-{j}" for j in range(i)] for i in range(60)}
    yield from case("a ladder of 2^60 ways", spelled(edited(value, "jobs", value["jobs"] | ladder)))
    for job in names:
        if not job.startswith("evaluate"):
            yield from case(f"no {job}", spelled(edited(value, f"jobs/{job}", ...)))
        if value["jobs"][job]:
            yield from case(f"{job} needs nothing", spelled(edited(value, f"jobs/{job}", [])))
    yield from case("the other way round", spelled(edited(value, "jobs", dict(reversed(value["jobs"].items())))))


def names(world: World, draw: random.Random) -> Family:
    """File names that lead elsewhere, hide, or are programs, wherever a file can be named; and links in the store."""
    ref = world.put(b"{}").model_dump()
    value = json.loads((world.root / "run.json").read_bytes())
    for name in BAD_NAMES:
        for place in ("mixture", "base/files"):
            with world.planted(
                world.root / "run.json",
                spelled(
                    edited(
                        value, f"{place}", (value["mixture"] if place == "mixture" else value["base"]["files"]) | {name: ref}
                    )
                ),
            ):
                yield f"{place} {name!r}", "run.json", world.work, []
        for job, next_job, prefix in (("plan", "branch-1", "conflict/"), ("branch-0", "merge", "branches/0/model/")):
            short = prefix + name.replace("mixture/units/", "") if not name.startswith(("/", "..")) else name
            result = world.result(job)
            result["files"] |= {short: ref}
            with world.planted(world.root / "results" / f"{job}.json", spelled(result)):
                yield f"{job} {short!r}", f"results/{job}.json", lambda n=next_job: world.pull(n), []
        short = "branches/0/checkpoints/checkpoint-4/" + name.replace("mixture/units/", "") if draw.random() < 0.7 else name
        yield from one_checkpoint(world, f"checkpoint {short!r}", lambda c, s=short: c["files"].update({s: ref}))
    for job in ("gradients-0", "plan", "branch-0", "branch-1"):
        for target in (
            world.canary / "passwd",
            world.canary / "link-target.json",
            Path("../../canary/link-target.json"),
            Path("gone"),
        ):
            with world.planted(world.root / "results" / f"{job}.json", lambda p, t=target: p.symlink_to(t)):
                yield f"{job} -> {target.name}", f"{job}.json", lambda j=job: world.collect(j), []
    for folder in ("results", "objects", "jobs"):
        with world.planted(world.root / folder, lambda p: p.symlink_to(world.canary)):
            yield f"{folder} -> canary", folder, world.work, []


def one_checkpoint(
    world: World, name: str, change: Callable[[dict[str, Any]], object] | bytes, objects: dict[str, bytes] | None = None
) -> Family:
    """A checkpoint of branch-0 at step 4 that is whole but for a change, as the next worker meets it."""
    at = world.above / "checkpoint-4"
    if not at.exists():
        (at / "checkpoint-4").mkdir(parents=True)
        save_tree(at / "checkpoint-4" / OPTIMIZER, {"optimizer": {"state": torch.ones(3)}})
        save_tree(at / "checkpoint-4" / RANDOM, {"python": random.Random(0).getstate()})
        (at / "checkpoint-4" / "trainer_state.json").write_text("{}")
        mark_complete(at / "checkpoint-4", {"base": "b"})
    files = {p.name: world.put(p.read_bytes()) for p in sorted((at / "checkpoint-4").iterdir())}
    files |= {name: world.put(data) for name, data in (objects or {}).items()}
    checkpoint = Checkpoint(
        job="branch-0",
        attempt=1,
        step=4,
        files={f"branches/0/checkpoints/checkpoint-4/{name}": ref for name, ref in files.items()},
    ).model_dump(mode="json")
    data = change if isinstance(change, bytes) else (change(checkpoint), spelled(checkpoint))[1]
    said: list[str] = []

    def resume() -> None:
        it = world.worker(tell=said.append)
        said.clear()
        attempt._resume(it, "branch-0", world.space)
        assert newest_checkpoint(world.space / "branches/0/checkpoints") is None
        if len(said) == 1 and "passed over" in said[0]:
            raise AnabranchError(said[0])

    with world.planted(world.root / leases.checkpoint_file("branch-0", 1, 4), data):
        yield name, "checkpoint", resume, [world.space / "branches"]


def results(world: World, draw: random.Random) -> Family:
    """Results, as the next job's worker and `anabranch run` meet them."""
    for job, next_job in (
        ("gradients-0", "plan"),
        ("plan", "branch-1"),
        ("branch-0", "merge"),
        ("branch-1", "evaluate-branch-1"),
    ):
        path, value = world.root / "results" / f"{job}.json", world.result(job)
        good = path.read_bytes()
        first = sorted(value["files"])[0]
        cases = [(f"garbage {i}", data) for i, data in enumerate(GARBAGE)]
        cases += [c for c in damage(good, draw, 8, 0)]
        cases += [
            (f"run {run[:6]}", spelled(edited(value, "run", run)))
            for run in ("0" * 64, "f" * 64, "x", "", value["run"].upper())
        ]
        cases += [
            (f"of {other}", spelled(edited(value, "job", other)))
            for other in ("merge", "plan" if job != "plan" else "merge", "branch-7", "../x", "gradients-1")
        ]
        for sha, size in (
            ("0" * 64, 10),
            (value["files"][first]["sha256"], 2**45),
            (value["files"][first]["sha256"], -1),
            (value["files"][first]["sha256"], 2**60),
            (value["files"][first]["sha256"], 1),
            ("zz", 1),
            (value["files"][first]["sha256"][:-1] + "\n", 1),
            (hashlib.sha256(b"").hexdigest(), 0),
            ("A" * 64, 1),
        ):
            cases.append(
                (
                    f"size {size} of {sha[:4]}",
                    spelled(edited(value, "files", value["files"] | {first: {"sha256": sha, "size": size}})),
                )
            )
        strays = [
            "merged/model.safetensors",
            "branches/1/branch.json" if job != "branch-1" else "branches/0/branch.json",
            "run.json",
            "base/config.json",
            "recipe.json",
            "mixture/mixture.json",
            f"{first}.py",
            f"{first}.bin",
            "log.txt",
            "branches/0/model/adapter_config.json",
            "branches/1/model/adapter_model.safetensors",
        ]
        cases += [
            (f"stray {stray}", spelled(edited(value, "files", value["files"] | {stray: value["files"][first]})))
            for stray in strays
        ]
        cases += [
            (f"no {need}", spelled(edited(value, "files", {k: v for k, v in value["files"].items() if k != need})))
            for need in value["files"]
            if need in ("plan.json", "branches/0/branch.json", "branches/1/branch.json")
        ]
        cases += [
            ("nothing", spelled(edited(value, "files", {}))),
            ("files twice", twice(good, "files", "{}")),
            ("job twice", twice(good, "job", '"merge"')),
            ("more", spelled(edited(value, "more", 1))),
            ("too large", good + b" " * STATE_LIMIT),
            ("attempt -1", spelled(edited(value, "attempt", -1))),
            ("attempt", spelled(edited(value, "attempt", 10**7))),
            ("worker", spelled(edited(value, "worker", "a\x1b[31m/../b"))),
        ]
        for i, (name, data) in enumerate(cases):
            sizes = "size" in name
            with world.planted(path, data):
                yield (
                    f"{job}: {name}",
                    f"results/{job}.json|objects/|jobs/{job}",
                    ((lambda n=next_job: world.pull(n)) if i % 2 and not sizes else lambda j=job: world.collect(j)),
                    ([world.space / first, world.above / "home" / first] if sizes else []),
                )


def states(world: World, draw: random.Random) -> Family:
    """Claims, beats, ends and checkpoints."""
    store, run, job = world.store, world.stored, "evaluate-base"
    made = {
        "claim": Claim(job=job, attempt=3, worker="w", token="t" * 16),
        "end": End(attempt=3, reason="failed"),
    }
    asked: dict[str, Callable[[], object]] = {
        "claim": lambda: _claim(store, job, 3, Sight()),
        "end": lambda: leases.take(store, run, job, "w", leases.Watch(), 0.0),
    }
    claim = world.root / f"jobs/{job}/claim-0003.json"
    with world.planted(claim, made["claim"].model_dump_json().encode()):
        for kind, good in made.items():
            value, data = good.model_dump(mode="json"), good.model_dump_json().encode()
            cases = [(f"garbage {i}", d) for i, d in enumerate(GARBAGE)]
            cases += [(n, d) for n, d in damage(data, draw, 12, 0)]
            cases += [
                (f"{key} {wrong!r}", spelled(edited(value, key, wrong)))
                for key in value
                for wrong in ([], {}, [1], "\x00" * 9000)
            ]
            cases += [
                ("more", spelled(value | {"more": 1})),
                ("too large", data + b" " * STATE_LIMIT),
                ("twice", twice(data, next(iter(value)), json.dumps(next(iter(value.values()))))),
            ]
            other = {
                "claim": [{"job": "plan"}, {"attempt": 2}, {"worker": "../x"}, {"token": "short"}, {"attempt": 10**6}],
                "end": [{"attempt": 2}, {"attempt": 4}, {"reason": "won"}, {"message": "x" * 9000}, {"attempt": 10**6}],
            }[kind]
            cases += [(str(change)[:40], spelled(value | change)) for change in other]
            cases += [
                (f"{number} in {key}", spelled(value | {key: "@"}).replace(b'"@"', number))
                for key in list(value)[-1:] + list(value)[:1]
                for number in (b"NaN", b"Infinity", b"-1e999")
                if kind != "claim"
            ]
            for name, data in cases:
                with world.planted(world.root / f"jobs/{job}/{kind}-0003.json", data):
                    yield f"{kind}: {name}", f"jobs/{job}/{kind}-0003.json", asked[kind], []
            for what, plant in (
                ("link", lambda p: p.symlink_to(world.canary / "link-target.json")),
                ("fifo", os.mkfifo),
                ("folder", lambda p: p.mkdir()),
                ("socket", bound),
            ):
                with world.planted(world.root / f"jobs/{job}/{kind}-0003.json", plant):
                    yield f"{kind}: a {what}", f"{kind}-0003.json|claim-0003.json", asked[kind], []
    for number in (10_000, 99_999, 999_999):
        with world.planted(world.root / f"jobs/{job}/claim-{number}.json", b"{}"):
            yield f"claim {number}", f"claim-{number}", lambda: leases.take(store, run, job, "w", leases.Watch(), 0.0), []
    for i, data in enumerate(GARBAGE):
        yield from one_checkpoint(world, f"checkpoint: garbage {i}", data)
    for name, change in {
        "of another step": {"step": 8},
        "of another job": {"job": "branch-1"},
        "of another attempt": {"attempt": 2},
        "empty": {"files": {}},
        "more": {"more": 1},
        "of a merge": {"job": "merge"},
        "step -1": {"step": -1},
        "step 1e9": {"step": 10**9},
    }.items():
        yield from one_checkpoint(world, f"checkpoint {name}", lambda c, change=change: c.update(change))
    at, ref = "branches/0/checkpoints/checkpoint-4/", world.put(b"\x80\x04.").model_dump()
    for name in (
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "x.pkl",
        "x.py",
        "x.so",
        "x.safetensors.pt",
        "scheduler.npy",
        "x",
    ):
        yield from one_checkpoint(world, f"checkpoint with {name}", lambda c, name=name: c["files"].update({at + name: ref}))
    for path in (
        "branches/1/checkpoints/checkpoint-4/a.json",
        "branches/0/checkpoints/checkpoint-8/a.json",
        "branches/0/branch.json",
        "branches/0/model/model.safetensors",
        "plan.json",
        "run.json",
        "base/config.json",
        "log.txt",
        at + "optimizer.safetensors/x.json",
        at + "deep/complete.json",
        at + "not-in-the-marker.json",
    ):
        yield from one_checkpoint(world, f"checkpoint with {path}", lambda c, path=path: c["files"].update({path: ref}))
    for name in ("complete.json", OPTIMIZER, RANDOM):
        yield from one_checkpoint(world, f"checkpoint without {name}", lambda c, name=name: c["files"].pop(at + name))
    for name, size in ((OPTIMIZER, 2**45), (OPTIMIZER, 1), (RANDOM, 2**60), (RANDOM, -1)):
        yield from one_checkpoint(
            world, f"checkpoint {name} of {size}", lambda c, name=name, size=size: c["files"][at + name].update(size=size)
        )
    for i, data in enumerate(
        [*GARBAGE, b'{"files": {"../../x": [1, "a"]}}', b'{"files": {"a": 1}}', b'{"files": []}', b'{"files": {"a": [[], []]}}']
    ):
        yield from one_checkpoint(world, f"marker {i}", lambda c: None, {"complete.json": data})
    for name in (OPTIMIZER, RANDOM):
        for data in (b"PK\x03\x04" + bytes(90), b"\x80\x02cposix\nsystem\n.", b""):
            yield from one_checkpoint(world, f"{data[:4]!r} as {name}", lambda c: None, {name: data})


def bound(path: Path) -> None:
    """A socket at a path, of any length."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def objects(world: World, draw: random.Random) -> Family:
    """Objects that are not what their name says, from a store near by and through the cache."""
    refs = [
        world.stored.mixture["mixture/mixture.json"],
        *(
            FileRef(**world.result(job)["files"][path])
            for job, path in (
                ("plan", "plan.json"),
                ("branch-0", "branches/0/branch.json"),
                ("branch-0", "branches/0/model/model.safetensors"),
                ("plan", "conflict/conflict.safetensors"),
                ("gradients-0", sorted(world.result("gradients-0")["files"])[0]),
            )
        ),
    ]
    to, near = world.above / "home" / "deep" / "file", Folder.is_near

    def get(ref: FileRef, is_near: bool) -> None:
        shutil.rmtree(world.above / "cache", ignore_errors=True)
        shutil.rmtree(world.above / "home", ignore_errors=True)
        Folder.is_near = near if is_near else lambda *_: False  # type: ignore[method-assign] - put back below
        try:
            world.store.get(ref, to)
        finally:
            Folder.is_near = near  # type: ignore[method-assign] - as it was

    for ref in refs:
        path = world.object(ref)
        data, other = path.read_bytes(), world.object(refs[0] if ref != refs[0] else refs[1]).read_bytes()
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        plants: dict[str, Any] = {
            "cut": data[: draw.randrange(len(data))],
            "empty": b"",
            "longer": data + b"x",
            "swapped": other,
            "a bit": bytes(flipped),
            "as long": draw.randbytes(len(data)),
            "link out": lambda p: p.symlink_to("/etc/passwd"),
            "link to a copy": lambda p, d=data: ((p.parent / "copy").write_bytes(d), p.symlink_to("copy")),
            "fifo": os.mkfifo,
            "folder": lambda p: p.mkdir(),
            "dangling": lambda p: p.symlink_to("nowhere"),
            "socket": bound,
        }
        for what, plant in plants.items():
            for is_near in (True, False):
                with world.planted(path, plant):
                    yield (
                        f"{ref.sha256[:4]} {what} {is_near}",
                        f"objects/{ref.sha256[:2]}",
                        lambda r=ref, n=is_near: get(r, n),
                        [to, world.above / "cache" / "objects" / ref.sha256[:2] / ref.sha256],
                    )
        (path.parent / "copy").unlink(missing_ok=True)
        with world.planted(path, lambda p: None):
            yield f"{ref.sha256[:4]} gone", f"objects/{ref.sha256[:2]}", lambda r=ref: get(r, True), [to]
        yield (
            f"{ref.sha256[:4]} changed",
            f"objects/{ref.sha256[:2]}",
            lambda r=ref: changed_between(world, r, lambda: get(r, True)),
            [to],
        )
        yield (
            f"{ref.sha256[:4]} changed on its way",
            f"objects/{ref.sha256[:2]}",
            (lambda r=ref: changed_between(world, r, lambda: get(r, False))),
            [to],
        )
        yield (
            f"{ref.sha256[:4]} read, changed",
            f"objects/{ref.sha256[:2]}",
            (lambda r=ref: changed_between(world, r, lambda: world.store.read_object(r))),
            [to],
        )


def changed_between(world: World, ref: FileRef, call: Callable[[], object]) -> None:
    """The object is another one once its size has been asked."""
    path, true = world.object(ref), Folder.size
    data = path.read_bytes()

    def size(self: Folder, name: str) -> int | None:
        found = true(self, name)
        path.unlink()
        path.write_bytes(bytes(len(data)))
        return found

    Folder.size = size  # type: ignore[method-assign] - put back below
    try:
        call()
    finally:
        Folder.size = true  # type: ignore[method-assign] - as it was
        path.unlink()
        path.write_bytes(data)


def weights(world: World, draw: random.Random) -> Family:
    """Safetensors that are none, in every place that holds one, with the hash that they are said to have."""
    mixture = world.run.mixture
    unit = world.run.folder / "mixture" / mixture.units[0].file
    at = world.above / "home" / "file.safetensors"
    at.parent.mkdir(exist_ok=True)

    def unit_file(data: bytes) -> None:
        at.parent.mkdir(exist_ok=True)
        at.write_bytes(data)
        load_unit(at, "train")

    def state(data: bytes) -> None:
        at.parent.mkdir(exist_ok=True)
        at.write_bytes(data)
        load_tree(at)

    for name, data in bad_safetensors(unit.read_bytes(), draw):
        yield f"unit: {name}", "file.safetensors", lambda d=data: unit_file(d), []
    good = load_file(unit)
    for name, change in {
        "wide ids": {"train.input_ids": good["train.input_ids"].long()},
        "float ids": {"train.input_ids": good["train.input_ids"].float()},
        "negative ids": {"train.input_ids": -1 - good["train.input_ids"]},
        "ids in two dimensions": {"train.input_ids": good["train.input_ids"][None]},
        "marks as long": {"train.response": good["train.response"].long()},
        "fewer marks": {"train.response": good["train.response"][:-1].clone()},
        "offsets too far": {"train.offsets": good["train.offsets"] + 1},
        "negative offsets": {"train.offsets": good["train.offsets"] - 1},
        "offsets back": {"train.offsets": good["train.offsets"].flip(0)},
        "no offsets": {"train.offsets": good["train.offsets"][:0].clone()},
        "offsets of int32": {"train.offsets": good["train.offsets"].int()},
        "huge offsets": {"train.offsets": good["train.offsets"] * 2**40},
        "one offset": {"train.offsets": good["train.offsets"][:1].clone()},
    }.items():
        yield f"unit: {name}", "file.safetensors", lambda c=change: unit_file(save(good | c)), []
    yield "unit: other names", "file.safetensors", lambda: unit_file(save({"a": torch.ones(2)})), []
    save_tree(at, {"optimizer": {"state": {0: torch.ones(3)}}})
    for name, data in bad_safetensors(at.read_bytes(), draw):
        yield f"state: {name}", "file.safetensors", lambda d=data: state(d), []
    for i, text in enumerate(
        [
            "",
            "{",
            "[" * 100_000,
            '{"tensor": "9"}',
            '{"tensor": 5}',
            '{"tensor": ["0"]}',
            '{"pickle": "x"}',
            "{}",
            '{"a": 1, "b": 2}',
            '{"dict": [[{"dict": []}, 1]]}',
            '{"dict": 5}',
            '{"dict": [[1]]}',
            '{"tuple": 5}',
            '{"array": null}',
            '{"dict": [[[1], 2]]}',
            '{"__reduce__": ["os.system", "id"]}',
            '{"tensor": "../../x"}',
            "1" * 5000,
            '{"dict": {"a": 1}}',
        ]
    ):
        yield f"state: tree {i}", "file.safetensors", lambda t=text: state(save({"0": torch.ones(3)}, {"tree": t})), []
    yield "state: no tree", "file.safetensors", lambda: state(save({"0": torch.ones(3)})), []
    yield (
        "state: a tree of bfloat16 arrays",
        "file.safetensors",
        lambda: state(save({"0": torch.ones(3).bfloat16()}, {"tree": '{"array": "0"}'})),
        [],
    )
    yield from sketches(world, draw)
    good_model = world.made / "good-0"
    for name, data in bad_safetensors((good_model / "model.safetensors").read_bytes(), draw):
        with world.planted(good_model / "model.safetensors", data):
            yield f"branch: {name}", "good-0|model.safetensors", lambda: taken(world, good_model), taken_places(world)


def taken(world: World, folder: Path) -> None:
    """`anabranch add-branch`, and a branch by the recipe's own program."""
    home = world.above / "home"
    shutil.rmtree(home, ignore_errors=True)
    take_in(folder, world.run.base, world.run.recipe, home / "model", kept=home / "adapter")


def taken_places(world: World) -> list[Path]:
    return [world.above / "home" / name for name in ("model", "adapter", "model.partial")]


def sketches(world: World, draw: random.Random) -> Family:
    """Gradient sketches in the workspace of the job that plans."""
    world.pull("plan")
    space = world.above / "plan-space"
    if not space.exists():
        shutil.copytree(world.space, space)
    path = sorted((space / "gradients" / "units").iterdir())[0]
    good = path.read_bytes()
    about = json.loads(good[8 : 8 + struct.unpack("<Q", good[:8])[0]])["__metadata__"]["anabranch"]
    halves = load_file(path)

    def plan() -> None:
        perform(space, "plan", tell=lambda _: None)

    def case(name: str, data: bytes) -> Family:
        with world.planted(path, data):
            yield f"sketch: {name}", "gradients/units|gradients/|unit|sketch|conflict", plan, [space / "plan.json"]
        for made in ("gradients/gradients.json", "conflict/conflict.json"):
            (space / made).unlink(missing_ok=True)

    for name, data in bad_safetensors(good, draw):
        yield from case(name, data)
    told = json.loads(about)
    for change in (
        {"key": "0" * 64},
        {"key": None},
        {"unit": 5, "key": ""},
        {"tokens_a": "x"},
        {"tokens_b": None},
        {"examples": []},
        {"parameters": "NaN"},
        {"tokens_a": 0},
        {"tokens_b": -5},
        {"tokens_a": 2**70},
    ):
        yield from case(f"says {change}", save(halves, {"anabranch": json.dumps(told | change)}))
    for key in ("key", "examples", "tokens_a", "parameters"):
        yield from case(f"without {key}", save(halves, {"anabranch": json.dumps({k: v for k, v in told.items() if k != key})}))
    yield from case("about: list", save(halves, {"anabranch": "[]"}))
    yield from case("about: none", save(halves))
    a, b = halves["half_a"], halves["half_b"]
    for name, change in {
        "NaN": {"half_a": torch.full_like(a, torch.nan)},
        "infinite": {"half_b": torch.full_like(b, torch.inf)},
        "zero": {"half_a": a * 0, "half_b": b * 0},
        "longer": {"half_a": torch.cat([a, a]), "half_b": torch.cat([b, b])},
        "unequal": {"half_a": a[:-1].clone()},
        "float64": {"half_a": a.double()},
        "int": {"half_b": b.int()},
        "a matrix": {"half_a": a[None], "half_b": b[None]},
        "bfloat16": {"half_a": a.bfloat16()},
        "one number": {"half_a": a[0].clone(), "half_b": b[0].clone()},
        "empty": {"half_a": a[:0].clone(), "half_b": b[:0].clone()},
    }.items():
        yield from case(name, save(halves | change, {"anabranch": about}))
    yield from case("one half", save({"half_a": a}, {"anabranch": about}))
    with world.planted(path, lambda p: None):
        yield "sketch: gone", "gradients/units", plan, [space / "plan.json"]


def branches(world: World, draw: random.Random) -> Family:
    """Returned models, and branches of other workers as a merge meets them."""
    base = world.run.base

    def fresh(name: str) -> Path:
        shutil.rmtree(world.made / "bad", ignore_errors=True)
        return world.made / "bad" / name

    def case(name: str, folder: Path) -> Case:
        return f"returned: {name}", folder.name, lambda f=folder: taken(world, f), taken_places(world)

    moved = lambda name, t: t + 0.01  # noqa: E731 - handed on as it is
    names = sorted({n for path in base.glob("*.safetensors") for n in load_file(path)})
    for name in draw.sample(names, 6):
        for what, change in {
            "NaN": lambda t: t.clone().fill_(torch.nan),
            "infinity": lambda t: t.clone().fill_(torch.inf),
            "missing": lambda t: None,
            "a row more": lambda t: torch.cat([t, t]),
            "flat": lambda t: t.reshape(1, -1),
            "ints": lambda t: t.int(),
        }.items():
            yield case(
                f"{name} {what}",
                returned(fresh("one"), base, lambda n, t, name=name, change=change: change(t) if n == name else t + 0.01),
            )
    for extra in ("model.extra.weight", "model.layers.99.mlp.up_proj.weight", "../evil", "lora_A.weight"):
        yield case(f"extra {extra}", returned(fresh("one"), base, moved, {extra: torch.ones(3)}))
    yield case("nothing trained", returned(fresh("one"), base, lambda n, t: t))
    yield case("rounded", returned(fresh("one"), base, lambda n, t: t.bfloat16().float()))
    good = json.loads((base / "config.json").read_text())
    for key, value in {
        "hidden_size": 64,
        "model_type": "llama",
        "num_hidden_layers": 3,
        "rms_norm_eps": 0.5,
        "quantization_config": {"bits": 4},
        "num_attention_heads": 4,
        "hidden_act": "relu",
        "vocab_size": 10,
    }.items():
        folder = returned(fresh("one"), base, moved)
        (folder / "config.json").write_text(json.dumps(good | {key: value}))
        yield case(f"config {key}", folder)
    for i, data in enumerate(GARBAGE):
        for file in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
            folder = returned(fresh("one"), base, moved)
            if file.endswith("index.json"):
                (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
            (folder / file).write_bytes(data)
            if file != "model.safetensors.index.json" and is_object(data):
                continue  # says nothing that is not the base's: such a file is not taken along in any case
            yield case(f"{file} garbage {i}", folder)
    for depth in (1200, 5000, 100_000):
        folder = returned(fresh("one"), base, moved)
        (folder / "config.json").write_text(json.dumps(good)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}")
        yield case(f"config nested {depth}", folder)
    for shards in (
        {"a": "../canary.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "gone.safetensors"},
        {},
        [],
        {"a": 5},
        {"a": None},
        {n: "model-00001.safetensors" for n in names[1:]},
        {"a": "sub/x.safetensors"},
        {"a": ".."},
    ):
        folder = returned(fresh("one"), base, moved)
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        yield case(f"index {shards}"[:60], folder)
    for pickle in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl"):
        folder = returned(fresh("one"), base, moved)
        (folder / "model.safetensors").unlink()
        (folder / pickle).write_bytes(b"\x80\x02cposix\nsystem\n.")
        yield case(pickle, folder)
    for what, plant in (
        ("link out", lambda p: p.symlink_to("/etc/passwd")),
        ("fifo", os.mkfifo),
        ("folder", lambda p: p.mkdir()),
        ("nothing", lambda p: None),
    ):
        for file in ("model.safetensors", "config.json"):
            folder = returned(fresh("one"), base, moved)
            (folder / file).unlink()
            plant(folder / file)
            yield case(f"{file} {what}", folder)
    yield from adapters(world, fresh, case)
    yield from told_badly(world, draw, fresh)
    yield from merges(world, draw)


def adapters(world: World, fresh: Callable[[str], Path], case: Callable[[str, Path], Case]) -> Family:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    good = {key.format("A"): torch.randn(2, 32), key.format("B"): torch.randn(32, 2)}
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    for change, tensors in (
        ({"use_dora": True}, good),
        ({"r": -1}, good),
        ({"r": "x"}, good),
        ({"lora_alpha": float("nan")}, good),
        ({"peft_type": "IA3"}, good),
        ({"peft_type": None}, good),
        ({"rank_pattern": 5}, good),
        ({"rank_pattern": {"(": 3}}, good),
        ({}, {}),
        ({}, {"x": torch.ones(2)}),
        ({"r": 0}, good),
        ({}, good | {key.format("A"): torch.randn(2, 99)}),
        ({}, {key.format("A"): good[key.format("A")]}),
        ({"r": 2**70}, good),
        ({}, good | {key.format("B"): torch.full((32, 2), torch.nan)}),
        ({}, {k.replace("layers.0", "layers.9"): v for k, v in good.items()}),
    ):
        folder = fresh("adapter")
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        yield case(f"adapter {change} {len(tensors)}", folder)
    for i, data in enumerate(GARBAGE):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            folder = fresh("adapter")
            folder.mkdir(parents=True)
            save_file(good, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(settings))
            (folder / file).write_bytes(data)
            yield case(f"{file} garbage {i}", folder)


def told_badly(world: World, draw: random.Random, fresh: Callable[[str], Path]) -> Family:
    """What lies beside a returned model: its trainer's words, and the job that it was trained from."""
    again = world.above / "again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(world.run.folder, again, ignore=shutil.ignore_patterns("branches"))
    run = Run(world.run.recipe, again, world.run.base, world.run.base_hash, lambda _: None, lambda *_: None)
    folder = returned(fresh("one"), run.base, lambda n, t: t + 0.01)
    made = [again / "branches" / "0" / name for name in ("branch.json", "model", "adapter")]

    def accept() -> None:
        accept_branch(run, 0, folder)

    for i, data in enumerate(GARBAGE):
        for path in (folder / "trainer_state.json", folder.parent / "job.json"):
            if path.name == "job.json" or not is_object(data):  # a trainer may say nothing
                with world.planted(path, data):
                    yield f"{path.name} garbage {i}", path.name, accept, made
    for value in (
        {"branch": 1},
        {"branch": 0, "made_from": []},
        {"branch": 0, "made_from": 5},
        {"branch": 0, "made_from": None},
        {"branch": 0, "made_from": {}},
        {"branch": 0, "made_from": {"base": "x", "plan": "y", "data": [], "train": {}}},
        {"branch": [[]]},
        {"made_from": "base"},
    ):
        with world.planted(folder.parent / "job.json", spelled(value)):
            yield f"job {value}", "job.json|one", accept, made
    for value in (
        {"global_step": 3, "max_steps": 9},
        {"global_step": 1, "max_steps": 2**52},
        {"global_step": 3, "max_steps": 9, "log_history": [{"step": 1, "loss": 10**400}, 5, {"step": "x", "loss": 1}]},
    ):
        with world.planted(folder / "trainer_state.json", spelled(value)):
            yield f"state {value}", "branch 0", accept, made[:1]


def merges(world: World, draw: random.Random) -> Family:
    """Branches whose result names true hashes, as the job that merges meets them."""
    world.pull("merge")
    space = world.above / "merge-space"
    if not space.exists():
        shutil.copytree(world.space, space)
    path = space / "branches/1/branch.json"
    good = json.loads(path.read_text())

    def merge() -> None:
        perform(space, "merge", model=world.run.base, tell=lambda _: None)

    def case(name: str, data: bytes, named: str = "branches/1") -> Family:
        with world.planted(path, data):
            yield f"merge: {name}", named, merge, [space / "merged"]
        shutil.rmtree(space / "merged.partial", ignore_errors=True)

    for key in ("base", "plan", "data", "train"):
        yield from case(f"another {key}", spelled(edited(good, f"made_from/{key}", "0" * 64)))
        yield from case(f"no {key}", spelled(edited(good, f"made_from/{key}", ...)))
    file = next(iter(good["files"]))
    outside = hashlib.sha256((world.canary / "passwd").read_bytes()).hexdigest()
    for files in (
        {},
        {file: "0" * 64},
        good["files"] | {"../../../../canary/passwd": outside},
        good["files"] | {str(world.canary / "passwd"): outside},
        good["files"] | {"gone.safetensors": "0" * 64},
        {"config.json": good["files"][file]},
        good["files"] | {"..": "x"},
        good["files"] | {"": "x"},
    ):
        yield from case(f"files {sorted(files)}"[:60], spelled(edited(good, "files", files)))
    for i, data in enumerate(GARBAGE):
        yield from case(f"garbage {i}", data)
    model = space / "branches/1/model/model.safetensors"
    for what, change in {
        "NaN": lambda t: t * torch.nan,
        "infinite": lambda t: t + torch.inf,
        "shape": lambda t: torch.cat([t, t]),
    }.items():
        tensors = load_file(model)
        name = draw.choice(sorted(tensors))
        data = save(tensors | {name: change(tensors[name])}, {"format": "pt"})
        with world.planted(model, data):
            sha = hashlib.sha256(data).hexdigest()
            yield from case(
                f"{what} in {name}", spelled(edited(good, "files", {"model.safetensors": sha})), "branch-1|branches/1|branch 1"
            )
    config = space / "branches/1/model/config.json"
    true = json.loads(config.read_text())
    label = "evaluate-branch-1"
    for change in (
        {"quantization_config": {"quant_method": "gptq"}},
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel:run"},
        {"text_config": {"attn_implementation": "a/b"}},
        {"base_model_name_or_path": "somebody/model"},
        {"layers": [{"experts_implementation": "a/b"}]},
    ):
        with world.planted(config, spelled(true | change)):
            yield (
                f"config {change}"[:60],
                "branches/1/model/config.json",
                lambda: perform(space, label, tell=lambda _: None),
                [space / "evaluation"],
            )
    for i, data in enumerate(GARBAGE):
        if not is_object(data):
            with world.planted(config, data):
                yield (
                    f"config garbage {i}",
                    "branches/1/model/config.json",
                    lambda: perform(space, label, tell=lambda _: None),
                    [space / "evaluation"],
                )


def artifacts(world: World, draw: random.Random) -> Family:
    """mixture.json, plan.json and gradients.json whose hashes are those that run.json and results say."""
    mixture = (world.run.folder / "mixture" / "mixture.json").read_bytes()
    value, run = json.loads(mixture), world.stored

    def with_mixture(data: bytes) -> Callable[[], object]:
        other = run.model_copy(update={"mixture": run.mixture | {"mixture/mixture.json": world.put(data)}})
        return lambda: world.pull("gradients-0", other)

    bad = [spelled(edited(value, "units/0/file", name)) for name in BAD_NAMES]
    bad += [*GARBAGE, *(mixture[: draw.randrange(len(mixture) - 2)] for _ in range(10))]
    bad += [
        spelled(edited(value, "units", value["units"] + value["units"][:1])),
        spelled(edited(value, "units", [])),
        spelled(edited(value, "units", [value["units"][0] | {"file": "../../../canary/passwd"}, *value["units"]])),
        spelled(edited(value, "units/1/file", value["units"][0]["file"])),
        spelled(edited(value, "units/0/sha256", "0" * 64)),
        spelled(edited(value, "transfer/0/file", "../plan.json")),
        spelled(edited(value, "surprise", 1)),
        spelled(edited(value, "version", 2)),
        *(
            spelled(edited(value, f"units/0/{key}", wrong))
            for key in ("rows", "tokens", "name", "file")
            for wrong in ([], None, {}, [[]])
        ),
    ]
    for i, data in enumerate(bad):
        yield f"mixture {i} {data[:20]!r}", "mixture.json", with_mixture(data), [world.space / "mixture/units"]
    yield from plans(world, draw)
    path = world.run.folder / "gradients" / "gradients.json"
    gradients, home = json.loads(path.read_text()), world.above / "gradients-home"
    if not home.exists():
        shutil.copytree(path.parent, home)
    outside = hashlib.sha256((world.canary / "passwd").read_bytes()).hexdigest()
    bad = [
        *GARBAGE,
        spelled(edited(gradients, "units/0/sha256", "0" * 64)),
        spelled(edited(gradients, "units/0/file", gradients["units"][1]["file"])),
        *(
            spelled(edited(gradients, "units/0", gradients["units"][0] | {"file": name, "sha256": outside}))
            for name in (
                "../../canary/passwd",
                "../canary/passwd",
                str(world.canary / "passwd"),
                "units/../../canary/passwd",
                "",
                "..",
                "units/x.pkl",
            )
        ),
    ]

    def halves() -> None:
        for record in Gradients.load(home / "gradients.json").units:
            load_halves(home, record)

    for i, data in enumerate(bad):
        with world.planted(home / "gradients.json", data):
            yield f"gradients {i}", "gradients.json|units/", halves, []


def plans(world: World, draw: random.Random) -> Family:
    good = world.result("plan")
    plan = json.loads((world.run.folder / "plan.json").read_text())
    bad = [
        *GARBAGE,
        spelled(edited(plan, "units", [])),
        spelled(edited(plan, "units", plan["units"] + plan["units"][:1])),
        spelled(edited(plan, "units", plan["units"][1:])),
        spelled(edited(plan, "units/0/unit", "stranger")),
        spelled(edited(plan, "units/0/unit", "../../x")),
        spelled(edited(plan, "surprise", 1)),
        *(spelled(edited(plan, "units/0/group", group)) for group in (-1, 7, 10**9, 2**70, None, "x", 1.5, [])),
        *(
            spelled(edited(plan, f"units/0/{key}", wrong))
            for key in ("samples", "tokens", "sha256")
            for wrong in (-1, 0, 2**70, "0" * 64, None, [])
        ),
        spelled(edited(plan, "units", [u | {"group": 0} for u in plan["units"]])),
        spelled(edited(plan, "units", [u | {"group": 1} for u in plan["units"]])),
    ]

    def follow(k: int) -> None:
        """What a worker does before it trains."""
        world.pull(f"branch-{k}")
        mixture = world.run.mixture
        made, _ = load_plan(world.space / "plan.json", mixture)
        if k >= len(made.groups):
            world.performed(f"branch-{k}")

    for i, data in enumerate(bad):
        result = edited(good, "files", good["files"] | {"plan.json": world.put(data).model_dump()})
        with world.planted(world.root / "results" / "plan.json", spelled(result)):
            yield f"plan {i} {data[:20]!r}", "plan.json|branch 1", lambda: follow(1), [world.space / "branches/1/branch.json"]
    (world.above / "home").mkdir(exist_ok=True)
    for i, data in enumerate(GARBAGE):  # brought home over a plan that is there

        def bring(data: bytes = data) -> None:
            here = world.above / "home"
            shutil.rmtree(here, ignore_errors=True)
            here.mkdir()
            shutil.copyfile(world.run.folder / "plan.json", here / "plan.json")
            run = Run(world.run.recipe, here, world.run.base, world.run.base_hash, lambda _: None, lambda *_: None)
            distribute.collect(run, world.store, world.stored, ["plan"])

        result = edited(good, "files", good["files"] | {"plan.json": world.put(data).model_dump()})
        with world.planted(world.root / "results" / "plan.json", spelled(result)):
            yield f"home: plan {i}", "plan", bring, []


# ---- tests ----------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[World, random.Random], Family]] = {
    "run_json": run_json,
    "names": names,
    "results": results,
    "states": states,
    "objects": objects,
    "weights": weights,
    "branches": branches,
    "artifacts": artifacts,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_artifact_is_refused(world: World, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)

    def start(*_: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(worker, "attend", start)
    monkeypatch.setattr(stages, "release_memory", lambda: None)  # looks through all of Python's memory, a hundred times here
    wrong, slowest, count = [], (0.0, ""), 0
    for case in FAMILIES[family](world, random.Random(f"{family} 7")):
        begun = time.monotonic()
        if found := judged(world, case):
            wrong.append(f"{case[0]}: {found}")
        slowest = max(slowest, (time.monotonic() - begun, case[0]))
        count += 1
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:60])
    assert slowest[0] < SECONDS, slowest
    assert count >= LEAST[family], count


def test_an_unreadable_beat_tells_nothing_and_ends_nobody(world: World) -> None:
    """Else one trainer that writes infinity into its progress would end every worker that waits."""
    store, run, job = world.store, world.stored, "evaluate-base"
    good = Beat(count=1).model_dump(mode="json")
    bad = [*(d for d in GARBAGE if d != b"{}"), spelled(good | {"more": 1}), spelled(good) + b" " * STATE_LIMIT]
    bad += [spelled(good | change) for change in ({"count": -1}, {"step": -5}, {"doing": "x" * 300}, {"loss": "NaN!"})]
    bad += [spelled(good | {"loss": "@"}).replace(b'"@"', number) for number in (b"NaN", b"Infinity", b"1e999")]
    plants = [*bad, lambda p: p.symlink_to(world.canary / "link-target.json"), os.mkfifo, lambda p: p.mkdir(), bound]
    claim = Claim(job=job, attempt=3, worker="w", token="t" * 16)
    with world.planted(world.root / f"jobs/{job}/claim-0003.json", claim.model_dump_json().encode()):
        for plant in plants:
            with world.planted(world.root / f"jobs/{job}/beat-0003.json", plant):
                watch = leases.Watch()
                held = leases.take(store, run, job, "w", watch, 0.0)
                assert isinstance(held, leases.Held) and held.beat is None, plant
                assert isinstance(leases.take(store, run, job, "w", watch, run.lease_seconds), leases.Lease), plant
                (world.root / f"jobs/{job}/claim-0004.json").unlink()
                (world.root / f"jobs/{job}/end-0003.json").unlink()


def test_there_are_more_than_a_thousand() -> None:
    """Each family's test holds it to its share."""
    assert set(LEAST) == set(FAMILIES) and sum(LEAST.values()) >= 1000


def test_what_was_not_touched_is_still_taken(world: World) -> None:
    """The same calls on the true artifacts: a family whose calls fail on everything would prove nothing."""
    for job in ("gradients-0", "plan", "branch-0", "branch-1", "merge", "evaluate-branch-1"):
        world.pull(job)
    for job in ("gradients-0", "plan", "branch-0", "branch-1"):
        world.collect(job)
    assert (world.above / "home/branches/1/model/model.safetensors").is_file()
    assert BranchManifest.load(world.above / "home/branches/1/branch.json").branch == 1
    world.pull("plan")
    perform(world.space, "plan", tell=lambda _: None)
    assert Plan.load(world.space / "plan.json").units == Plan.load(world.run.folder / "plan.json").units
    world.pull("merge")
    perform(world.space, "merge", model=world.run.base, tell=lambda _: None)
    assert (world.space / "merged/manifest.json").is_file()
    taken(world, world.made / "good-0")
    assert torch.isfinite(load_file(world.above / "home/model/model.safetensors")["model.norm.weight"]).all()
    jobs.check_result(Result.model_validate(world.result("branch-0")))
