"""The store: one winner per create, whole files or none, nothing outside the root, and what it does when the storage fails."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import gcs_server
import s3_server
from anabranch.errors import AnabranchError, CorruptedError, OutputError, Preempted
from anabranch.store import cache, files
from anabranch.store import folder as folder_of_files
from anabranch.store.artifacts import FileRef
from anabranch.store.bucket import Verdict, judge, plain
from anabranch.store.files import Store, fetch_all, open_store, put_all
from s3_server import Faults, Server

MIB = 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    with s3_server.start() as running, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in running.env.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def quiet(server: Server) -> Iterator[Server]:
    """The server, without faults before and after."""
    server.middleware.set(Faults())
    yield server
    server.middleware.set(Faults())


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[gcs_server.State]:
    pytest.importorskip("gcsfs", reason="the gcs extra is not installed")
    with gcs_server.start() as (environment, state):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield state


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store of one kind."""
    if request.param == "s3":
        request.getfixturevalue("quiet")
    if request.param == "gs":
        request.getfixturevalue("google")
    return {"local": str(tmp_path / "store"), "file": f"file://{tmp_path}/store",
            "memory": f"memory://{tmp_path.name}/store", "s3": f"s3://runs/{tmp_path.name}/store",
            "gs": f"gs://runs/{tmp_path.name}/store"}[request.param]


every_store = pytest.mark.parametrize("url", ["local", "file", "memory", "s3", "gs"], indirect=True)


def opened(url: str, tmp_path: Path, patience: float = 8.0) -> Store:
    return open_store(url, cache=tmp_path / "cache", patience=patience)


def some_file(path: Path, size: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


# What a store does

@every_store
def test_state(url: str, tmp_path: Path) -> None:
    store = opened(url, tmp_path)
    store.probe()
    assert store.names("jobs/plan") == [] and store.read("jobs/plan/claim-0000.json") is None
    assert store.create("jobs/plan/claim-0000.json", b"first")
    assert not store.create("jobs/plan/claim-0000.json", b"second")
    assert store.read("jobs/plan/claim-0000.json") == b"first"
    store.replace("jobs/plan/beat-0000.json", b"1")
    store.replace("jobs/plan/beat-0000.json", b"22")
    assert store.create("jobs/plan/empty", b"") and store.read("jobs/plan/empty") == b""
    assert opened(url, tmp_path).read("jobs/plan/beat-0000.json") == b"22"
    assert store.names("jobs/plan") == ["beat-0000.json", "claim-0000.json", "empty"] and store.names("jobs") == ["plan"]
    assert store.requests["create"] == 5 and store.requests["replace"] == 2 and store.moved["received"] == len(b"first")


@every_store
def test_of_many_creates_one_succeeds(url: str, tmp_path: Path) -> None:
    stores = [opened(url, tmp_path) for _ in range(3)]
    with ThreadPoolExecutor(12) as pool:
        for n in range(8):
            answers = list(pool.map(lambda i, n=n: stores[i % 3].create(f"jobs/x/{n}", b"from %d" % i), range(12)))
            assert sum(answers) == 1
            assert stores[0].read(f"jobs/x/{n}") == b"from %d" % answers.index(True)


@every_store
@pytest.mark.parametrize("size", [0, 1000, 3 * MIB])
def test_objects(url: str, tmp_path: Path, size: int) -> None:
    store, file = opened(url, tmp_path), some_file(tmp_path / "in" / "model", size)
    absent = FileRef(sha256="0" * 64, size=size)
    assert not store.has(absent)
    ref = store.put(file)
    assert ref.size == size and store.has(ref) and not store.has(FileRef(sha256=ref.sha256, size=size + 1))
    sent = store.moved["sent"]
    assert store.put(file) == store.put(file, ref) == ref and store.moved["sent"] == sent
    to = tmp_path / "out" / "deep" / "model"
    store.get(ref, to)
    store.get(ref, to)  # over what is there
    assert to.read_bytes() == file.read_bytes() and os.listdir(to.parent) == ["model"]
    with pytest.raises(CorruptedError, match=r"objects/00/0{64}: there is no such object"):
        store.get(absent, to)


@every_store
def test_a_large_state_file_is_refused_unread(url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = opened(url, tmp_path)
    store.create("jobs/plan/result.json", bytes(2 * MIB))
    out = request.getfixturevalue("server").counts()["bytes"]["out"] if url.startswith("s3") else 0
    with pytest.raises(CorruptedError, match=r"jobs/plan/result.json: .*1,000 "):
        store.read("jobs/plan/result.json", limit=1000)
    if url.startswith("s3"):
        assert request.getfixturevalue("server").counts()["bytes"]["out"] - out <= 1001
    assert store.read("jobs/plan/result.json", limit=2 * MIB) == bytes(2 * MIB)


def test_large_files_are_linked_and_small_ones_copied(tmp_path: Path) -> None:
    store = opened(str(tmp_path / "store"), tmp_path)
    large, small = some_file(tmp_path / "large", MIB), some_file(tmp_path / "small", MIB - 1)
    for file, links in ((large, 3), (small, 1)):  # the file, the object, the copy
        ref = store.put(file)
        store.get(ref, tmp_path / "out" / file.name)
        assert file.stat().st_nlink == links
    with open(small, "ab") as log:
        log.write(b"a line more")  # which hurts neither the object nor the copy
    store.get(ref, tmp_path / "again")
    assert not (tmp_path / "cache").exists()  # it was near: nothing was kept twice


# Downloads

def test_a_private_file_becomes_a_readable_object(tmp_path: Path) -> None:
    store, file = opened(str(tmp_path / "store"), tmp_path), some_file(tmp_path / "f", 2 * MIB)
    file.chmod(0o600)
    ref = store.put(file)
    kept = tmp_path / "store" / "objects" / ref.sha256[:2]
    assert (kept / ref.sha256).stat().st_mode & 0o444 == kept.stat().st_mode & 0o444
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_download_goes_on_where_it_broke_off(quiet: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", MIB)
    store, file = opened("s3://runs/resume", tmp_path), some_file(tmp_path / "f", 12 * MIB)
    ref = store.put(file)
    store.patience = 0.0  # only now: the requests' own time-out follows the patience that the store was opened with
    whole = store._backend.read_range
    monkeypatch.setattr(store._backend, "read_range", lambda name, start, end: whole(name, start, end - 7 * (start >= 8 * MIB)))
    with pytest.raises(OutputError, match=r"did not answer for 0 s.*1048569 of 1048576 bytes came"):
        store.get(ref, tmp_path / "out")
    monkeypatch.setattr(store._backend, "read_range", whole)
    store.patience = 8.0
    assert not (tmp_path / "out").exists() and store.moved["received"] == 8 * MIB
    store.get(ref, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()
    assert store.moved["received"] == 12 * MIB  # no byte came twice


@pytest.mark.parametrize("part", ["wrong beginning", "wrong and whole", "too long"])
def test_a_wrong_part_is_fetched_again(quiet: Server, tmp_path: Path, part: str) -> None:
    store, file = opened("s3://runs/parts", tmp_path), some_file(tmp_path / "f", 3 * MIB)
    ref = store.put(file)
    size = {"wrong beginning": MIB, "wrong and whole": 3 * MIB, "too long": 4 * MIB}[part]
    some_file(tmp_path / "cache" / "objects" / ref.sha256[:2] / f"{ref.sha256}.part", size, seed=1)
    store.get(ref, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()


def test_a_damaged_cache_entry_is_fetched_again(quiet: Server, tmp_path: Path) -> None:
    store, file = opened("s3://runs/cache", tmp_path), some_file(tmp_path / "f", 2 * MIB)
    ref = store.put(file)
    store.get(ref, tmp_path / "first")
    before = sum(quiet.counts()["requests"].values())
    store.get(ref, tmp_path / "second")
    assert sum(quiet.counts()["requests"].values()) == before  # the cache asks nothing
    with open(tmp_path / "second", "r+b") as linked:
        linked.write(b"somebody writes in place")
    store.get(ref, tmp_path / "third")
    assert (tmp_path / "third").read_bytes() == file.read_bytes()


@every_store
def test_a_damaged_object_is_named(url: str, tmp_path: Path) -> None:
    store, file = opened(url, tmp_path), some_file(tmp_path / "f", 2 * MIB)
    ref = store.put(file)
    name = f"objects/{ref.sha256[:2]}/{ref.sha256}"
    for damage, why in ((b"x" * ref.size, "another SHA-256"), (b"short", "5 bytes, wanted 2,097,152")):
        store.replace(name, damage)
        with pytest.raises(CorruptedError, match=f"{name}: damaged: .*{why}"):
            store.get(ref, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    store.put(file)  # a wrong size is mended; it was the short one
    store.get(ref, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()


def test_several_workers_of_a_machine_download_once(quiet: Server, tmp_path: Path) -> None:
    ref = opened("s3://runs/many", tmp_path).put(some_file(tmp_path / "f", 4 * MIB))
    stores = [opened("s3://runs/many", tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: stores[i].get(ref, tmp_path / f"out-{i}"), range(4)))
    assert sum(store.moved["received"] for store in stores) == ref.size
    assert len({(tmp_path / f"out-{i}").read_bytes() for i in range(4)}) == 1
    assert os.listdir(tmp_path / "cache" / "objects" / ref.sha256[:2]) == [ref.sha256]


# A store that fails

def test_it_gets_through_faults(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of all requests go wrong, in five ways; nothing is lost, doubled or half there."""
    monkeypatch.setattr(files, "_PAUSE", (0.01, 0.05))
    monkeypatch.setattr(files, "CHUNK", MIB)
    server.middleware.injected.clear()
    server.middleware.set(Faults(seed=7, rate=0.33, slow=0.4))
    ours, theirs = (opened("s3://runs/faults", tmp_path, patience=1.2) for _ in range(2))
    for store in (ours, theirs):
        store.patience = 60.0  # the requests' own time-out stays 0.3 s
    try:
        with ThreadPoolExecutor(2) as pool:
            for n in range(6):
                name = f"jobs/branch-{n % 3}/claim-{n:04d}.json"
                first, second = pool.submit(ours.create, name, b"ours"), pool.submit(theirs.create, name, b"theirs")
                assert first.result() != second.result()
                assert theirs.read(name) == (b"ours" if first.result() else b"theirs")
                ours.replace("jobs/branch-0/beat-0000.json", b"%d" % n)
                assert theirs.read("jobs/branch-0/beat-0000.json") == b"%d" % n
                assert set(ours.names(f"jobs/branch-{n % 3}")) <= {f"claim-{i:04d}.json" for i in range(6)} | {"beat-0000.json"}
        file = some_file(tmp_path / "f", 5 * MIB)
        ref = ours.put(file)
        theirs.get(ref, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == file.read_bytes()
    finally:
        server.middleware.set(Faults())
    faults = server.counts()["faults"]
    assert sum(faults.values()) >= 15 and {"before", "after", "slow", "cut"} <= set(faults)


def test_a_listing_may_be_old_and_a_read_is_not(quiet: Server, tmp_path: Path) -> None:
    store = opened("s3://runs/stale", tmp_path)
    store.create("jobs/x/claim-0000", b"")
    assert store.names("jobs/x") == ["claim-0000"]
    store.create("jobs/x/claim-0001", b"")
    quiet.middleware.set(Faults(rate=1.0, kinds=("stale",)))
    assert store.names("jobs/x") == ["claim-0000"] and store.read("jobs/x/claim-0001") == b""


def test_a_create_whose_answer_was_lost_is_ours(quiet: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PAUSE", (0.01, 0.05))
    store = opened("s3://runs/lost", tmp_path)
    for seed in range(6):
        quiet.middleware.set(Faults(seed=seed, rate=0.5, kinds=("after",)))
        assert store.create(f"claim-{seed}", b"token %d" % seed)
        assert not store.create(f"claim-{seed}", b"another")
    assert quiet.counts()["faults"]["after"] >= 3


def test_google_repeats_a_create_by_itself(google: gcs_server.State, tmp_path: Path) -> None:
    store = opened("gs://runs/lost", tmp_path)
    google.lose_answers = True
    for n in range(3):
        assert store.create(f"claim-{n}", b"token %d" % n)
        assert not store.create(f"claim-{n}", b"another")
    assert google.requests > store.requests["create"]


def test_a_large_upload_gets_through_faults(quiet: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.store import bucket
    monkeypatch.setattr(bucket, "_PART", 5 * MIB)  # the least that S3 takes
    monkeypatch.setattr(files, "_PAUSE", (0.01, 0.05))
    store, file = opened("s3://runs/multipart", tmp_path, patience=60), some_file(tmp_path / "f", 21 * MIB)
    quiet.middleware.set(Faults(seed=3, rate=0.25, kinds=("before", "after")))
    parts = quiet.counts()["requests"].get("PART", 0)
    ref = store.put(file)
    quiet.middleware.set(Faults())
    assert quiet.counts()["requests"]["PART"] - parts >= 5
    store.get(ref, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()


def test_patience_ends(quiet: Server, tmp_path: Path) -> None:
    store = opened("s3://runs/patience", tmp_path)
    assert store.read("a") is None  # the first request loads botocore
    store.patience = 1.0
    quiet.middleware.set(Faults(rate=1.0, kinds=("before",)))
    began = time.monotonic()
    with pytest.raises(OutputError, match=r"the store s3://runs/patience did not answer for 1 s: read a: .*run the") as told:
        store.read("a")
    assert 1.0 <= time.monotonic() - began < 20 and store.requests["read"] >= 4
    assert quiet.env["AWS_SECRET_ACCESS_KEY"] not in str(told.value)


def test_nobody_listens(quiet: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match=r"did not answer for \d s: create a: Could not connect"):
        opened("s3://runs/x", tmp_path, patience=0.3).create("a", b"")


def test_what_waiting_does_not_mend_is_told_at_once(quiet: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened("s3://nothing-here/run", tmp_path)
    for request in (lambda: store.read("a"), lambda: store.names("jobs"), lambda: store.create("a", b""),
                    lambda: store.put(some_file(tmp_path / "f", 10))):
        with pytest.raises(OutputError, match="there is no such bucket"):
            request()
    assert store.requests == {"read": 1, "list": 1, "create": 1, "stat": 1}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = opened("s3://runs/x", tmp_path)
    with pytest.raises(OutputError, match=r"not permitted.*credentials"):
        store.create("a", b"")
    assert store.requests == {"create": 1}


def test_a_store_without_atomic_create_is_found_out(quiet: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = quiet.middleware.app

    def ignores_conditions(environ: Any, start_response: Any) -> Any:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return honest(environ, start_response)

    monkeypatch.setattr(quiet.middleware, "app", ignores_conditions)
    store = opened("s3://runs/old-server", tmp_path)
    with pytest.raises(OutputError, match="creates the same name twice"):
        store.probe()
    assert store.names("probe") == []


class FakeBotoError(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """As gcsfs has it."""

    def __init__(self, code: int) -> None:
        self.code = code


def caused(by: Exception) -> OSError:
    """As s3fs wraps what botocore raised."""
    error = OSError(errno.EINVAL, "wrapped")
    error.__cause__ = by
    return error


@pytest.mark.parametrize(("error", "verdict"), [
    (caused(FakeBotoError(503, "SlowDown")), Verdict.TRANSIENT), (caused(FakeBotoError(429, "TooMany")), Verdict.TRANSIENT),
    (caused(FakeBotoError(409, "ConditionalRequestConflict")), Verdict.TRANSIENT),
    (caused(FakeBotoError(400, "RequestTimeout")), Verdict.TRANSIENT), (caused(FakeBotoError(400, "Odd")), Verdict.OTHER),
    (caused(FakeBotoError(412, "PreconditionFailed")), Verdict.EXISTS), (caused(FakeBotoError(404, "404")), Verdict.ABSENT),
    (caused(FakeBotoError(404, "NoSuchBucket")), Verdict.NO_BUCKET),
    (caused(FakeBotoError(403, "AccessDenied")), Verdict.DENIED),
    (caused(FakeBotoError(501, "NotImplemented")), Verdict.LACKING), (HttpError(503), Verdict.TRANSIENT),
    (HttpError(401), Verdict.DENIED), (OSError("Forbidden: https://x"), Verdict.DENIED), (TimeoutError(), Verdict.TRANSIENT),
    (ConnectionResetError(), Verdict.TRANSIENT),
    (OSError(errno.ESTALE, "stale"), Verdict.TRANSIENT), (OSError(errno.EIO, "io"), Verdict.TRANSIENT),
    (OSError(errno.ENOSPC, "full"), Verdict.FULL), (FileExistsError(), Verdict.EXISTS), (ValueError("a bug"), Verdict.OTHER),
])
def test_what_an_error_means(error: Exception, verdict: Verdict) -> None:
    assert judge(error) is verdict


def test_messages_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t/value")
    text = plain(ValueError("signed\nwith s3cr3t/value at https://h/b?X-Amz-Credential=AKIA&X-Amz-Signature=1"))
    assert text == "signed with *** at https://h/b"


# This machine's troubles

def failing(function: Callable[..., Any], times: int, number: int) -> Callable[..., Any]:
    """`function`, which first fails some times with an errno."""
    left = [times]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    return wrapped


def test_a_stale_handle_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(str(tmp_path / "store"), tmp_path)
    store.create("a", b"x")
    monkeypatch.setattr(os, "open", failing(os.open, 2, errno.ESTALE))
    assert store.read("a") == b"x" and store.requests["read"] == 3


def test_nfs_says_exists_of_our_own_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, link = opened(str(tmp_path / "store"), tmp_path), os.link

    def answer_lost(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", answer_lost)
    assert store.create("a", b"ours")


def test_a_link_whose_answer_was_an_error_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft-mounted NFS may give up on a request that the server carries out."""
    store, link, left = opened(str(tmp_path / "store"), tmp_path), os.link, [1, 1]

    def answer_lost(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        if left.pop():
            raise OSError(errno.EIO, "soft mount gave up")

    monkeypatch.setattr(os, "link", answer_lost)
    assert store.create("a", b"ours") and store.requests["create"] == 2
    monkeypatch.setattr(os, "link", failing(link, 1, errno.EIO))
    assert not store.create("a", b"theirs") and store.requests["create"] == 4


def test_no_hard_links_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(os.link, 9, errno.EPERM))
    with pytest.raises(OutputError, match="no hard links"):
        opened(str(tmp_path / "store"), tmp_path).probe()
    assert os.listdir(tmp_path / "store") == []


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = opened(str(tmp_path / "store"), tmp_path), some_file(tmp_path / "f", 1000)
    for request in (lambda: store.create("a", b"x"), lambda: store.replace("a", b"x"), lambda: store.put(file)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync, 1, errno.ENOSPC))
            with pytest.raises(OutputError, match="no space left"):
                request()
        assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert store.create("a", b"x")


def test_a_download_asks_for_its_room_first(quiet: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened("s3://runs/room", tmp_path)
    ref = store.put(some_file(tmp_path / "f", 2 * MIB))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
        gets = quiet.counts()["requests"].get("GET", 0)
        with pytest.raises(OutputError, match=r"2,097,152 bytes are needed and 5 are free.*ANABRANCH_CACHE"):
            store.get(ref, tmp_path / "out")
        assert quiet.counts()["requests"].get("GET", 0) == gets
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, 1, errno.ENOSPC))
        with pytest.raises(OutputError, match="ANABRANCH_CACHE"):
            store.get(ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store.get(ref, tmp_path / "out")


def test_a_copy_from_a_near_store_asks_for_its_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, out = opened(str(tmp_path / "store"), tmp_path), tmp_path / "out"
    ref = store.put(some_file(tmp_path / "f", 1000))  # small: copied
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(OutputError, match="1,000 bytes are needed and 5 are free"):
        store.get(ref, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_an_object_is_read_only_and_is_linked_only_where_no_other_may_write_it(tmp_path: Path, umask: int) -> None:
    """With umask 002, as a group that shares a store has it, the group could change a linked file after its hash was taken."""
    before = os.umask(umask)
    try:
        store, file, out = opened(str(tmp_path / "store"), tmp_path), some_file(tmp_path / "f", 2 * MIB), tmp_path / "out"
        ref, small = store.put(file), store.put(some_file(tmp_path / "small", 10))
        kept, kept_small = (tmp_path / "store" / "objects" / one.sha256[:2] / one.sha256 for one in (ref, small))
        assert os.path.samefile(kept, file) is (umask == 0o022)
        assert kept_small.stat().st_mode & 0o777 == 0o444 and not kept.stat().st_mode & 0o022
        store.get(ref, out)
        assert os.path.samefile(kept, out)  # ours alone to write
        kept.chmod(0o664)  # as an older version, or another program, left it
        store.get(ref, out)
        assert not os.path.samefile(kept, out) and out.read_bytes() == file.read_bytes()
    finally:
        os.umask(before)


# Many files

def many_files(folder: Path, count: int) -> dict[str, Path]:
    return {f"mixture/units/{i:04d}.safetensors": some_file(folder / f"{i}", 50 + i, i) for i in range(count)}


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
def test_many_files_go_and_come(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", MIB)  # the last one is fetched in ranges, alone
    store, sent = opened(url, tmp_path), many_files(tmp_path / "in", 40) | {"big": some_file(tmp_path / "big", 3 * MIB)}
    refs, told = put_all(store, sent), []
    assert list(refs) == list(sent) and all(store.has(ref) for ref in refs.values())
    known = {path: FileRef(sha256="0" * 64, size=ref.size) for path, ref in refs.items()}
    assert put_all(opened(f"memory://{tmp_path.name}/known", tmp_path), sent, known=known) == known  # not hashed again
    fetch_all(store, refs, tmp_path / "out", told=lambda *one: told.append(one))
    assert {path: (tmp_path / "out" / path).read_bytes() for path in sent} == {p: f.read_bytes() for p, f in sent.items()}
    assert [done for _, done, count in told] == list(range(1, 42)) and {one[0] for one in told} == set(sent)
    (tmp_path / "out" / "big").write_bytes(b"mine")
    fetch_all(store, refs, tmp_path / "out")
    assert (tmp_path / "out" / "big").read_bytes() == b"mine"  # what is there stays


def test_files_are_brought_eight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each barrier opens for eight at once: one at a time would wait for ever."""
    store = opened(f"memory://{tmp_path.name}", tmp_path)
    refs, together = put_all(store, many_files(tmp_path / "in", 24)), threading.Barrier(8)
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda *a, **b: (together.wait(20), get(*a, **b)))
    fetch_all(store, refs, tmp_path / "out")
    assert len(list((tmp_path / "out" / "mixture" / "units").iterdir())) == 24


def test_failures_are_told_together_and_end_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, begun = opened(f"memory://{tmp_path.name}", tmp_path), []
    refs = put_all(store, many_files(tmp_path / "in", 200))
    for path in list(refs)[:2]:
        store.remove_object(refs[path])
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, ref, to, **more: (begun.append(ref), time.sleep(0.01), get(self, ref, to)))
    with pytest.raises(CorruptedError) as told:
        fetch_all(store, refs, tmp_path / "out")
    assert str(told.value).count("there is no such object") == 2 and len(begun) < 100
    with pytest.raises(CorruptedError, match="there is no such object") as told:
        fetch_all(store, dict(list(refs.items())[1:]), tmp_path / "other")
    assert "\n" not in str(told.value)


def test_a_stop_is_heard_between_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stop, begun = opened(f"memory://{tmp_path.name}", tmp_path), threading.Event(), []
    refs = put_all(store, many_files(tmp_path / "in", 100))
    get = Store.get

    def one(self: Store, ref: FileRef, to: Path, **more: Any) -> None:
        begun.append(ref)
        stop.set() if len(begun) == 20 else time.sleep(0.01)
        get(self, ref, to, **more)

    monkeypatch.setattr(Store, "get", one)
    with pytest.raises(Preempted, match="asked to stop"):
        fetch_all(store, refs, tmp_path / "out", stop=stop)
    assert 20 <= len(begun) < 40
    with pytest.raises(Preempted, match="asked to stop"):
        put_all(store, many_files(tmp_path / "in", 3), stop=stop)


# The cache stays small

def test_what_is_needed_once_does_not_stay_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK", MIB)
    store = opened(f"memory://{tmp_path.name}", tmp_path)
    ref, small = store.put(some_file(tmp_path / "f", 3 * MIB)), store.put(some_file(tmp_path / "small", 10))
    whole = store._backend.read_range
    monkeypatch.setattr(store._backend, "read_range", lambda *asked: whole(*asked) if asked[1] < MIB else 1 / 0)
    with pytest.raises(OutputError):
        store.get(ref, tmp_path / "out", keep=False)
    monkeypatch.setattr(store._backend, "read_range", whole)
    before = store.moved["received"]
    store.get(ref, tmp_path / "out", keep=False)
    assert store.moved["received"] - before == 2 * MIB  # it went on where it broke off
    assert (tmp_path / "out").read_bytes() == (tmp_path / "f").read_bytes()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    store.get(small, tmp_path / "small out", keep=False)  # costs nothing to keep
    store.get(ref, tmp_path / "kept")
    store.get(ref, tmp_path / "out", keep=False)  # as another job wants it
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 2


def test_what_nobody_used_for_a_month_leaves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, refs = opened(f"memory://{tmp_path.name}", tmp_path), []
    for i, size in enumerate((10, 2 * MIB)):
        refs.append(store.put(some_file(tmp_path / f"f{i}", size)))
        store.get(refs[-1], tmp_path / f"out{i}")
    part = tmp_path / "cache" / "objects" / "ab" / f"ab{'0' * 62}.part"
    some_file(part, 5)
    now = time.time()
    for days, left in ((29, 3), (31, 1)):
        monkeypatch.setattr(time, "time", lambda days=days: now + days * 86400)
        cache.sweep.cache_clear()
        store.get(refs[0], tmp_path / "again") if days == 29 else cache.sweep(tmp_path / "cache")
        assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == left
    assert (tmp_path / "cache" / "objects" / refs[1].sha256[:2] / refs[1].sha256).exists()  # somebody has a link to it


def test_a_file_that_changes_while_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = opened(f"memory://{tmp_path.name}", tmp_path), some_file(tmp_path / "f", 1000)
    upload = store._backend.upload

    def disturbed(source: Path, name: str) -> int:
        some_file(file, 1000, seed=9)
        return upload(source, name)

    ref = store.put(some_file(tmp_path / "other", 10))
    monkeypatch.setattr(store._backend, "upload", disturbed)
    with pytest.raises(OutputError, match="changed while it was stored"):
        store.put(file)
    assert [name for folder in store.names("objects") for name in store.names(f"objects/{folder}")] == [ref.sha256]
    with pytest.raises(OutputError, match="has 1,000 bytes, and 999 were announced"):
        store.put(file, FileRef(sha256="1" * 64, size=999))
    with pytest.raises(OutputError, match="cannot be stored: No such file"):
        store.put(tmp_path / "none")


def test_what_a_killed_worker_left_is_hidden_and_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = opened(str(tmp_path / "store"), tmp_path), some_file(tmp_path / "f", 1000)
    ref = store.put(file)
    folder = tmp_path / "store" / "objects" / ref.sha256[:2]
    (folder / ref.sha256).unlink()
    left = some_file(folder / f".{ref.sha256}.00.partial", 10)
    assert store.names(f"objects/{ref.sha256[:2]}") == [] and not store.has(ref)
    store.put(file)
    assert left.exists() and store.names(f"objects/{ref.sha256[:2]}") == [ref.sha256]
    monkeypatch.setattr(folder_of_files, "_STALE", -1.0)
    (folder / ref.sha256).unlink()
    store.put(file)
    assert os.listdir(folder) == [ref.sha256]


def test_rights_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(str(tmp_path / "store"), tmp_path)
    store.create("a", b"x")
    for request in (lambda: store.read("a"), lambda: store.create("b", b""), lambda: store.names("jobs")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing(os.open, 1, errno.EACCES))
            with pytest.raises(OutputError, match=r"not permitted.*rights"):
                request()


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    some_file(tmp_path / "store", 3)
    for request in (lambda s: s.create("a", b""), lambda s: s.read("a"), lambda s: s.names("jobs")):
        with pytest.raises(AnabranchError, match="store"):
            request(opened(str(tmp_path / "store"), tmp_path))


# The server as a program

def test_the_server_as_a_program(tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    log = tmp_path / "faults.jsonl"
    program = subprocess.Popen([sys.executable, s3_server.__file__, "--faults", "5:0.4", "--slow", "0.01", "--log", str(log)],
                               stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        lines = [program.stdout.readline() for _ in range(7)]
        environment = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines if line.startswith("export "))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(files, "_PAUSE", (0.01, 0.05))
            store = opened("s3://runs/program", tmp_path)
            assert all(store.create(f"a-{i}", b"%d" % i) for i in range(10))
        with urllib.request.urlopen(environment["AWS_ENDPOINT_URL"] + "/_faults") as answer:
            counts = json.load(answer)
        assert counts["requests"]["CREATE"] == store.requests["create"] >= 10
        assert sum(counts["faults"].values()) == len(log.read_text().splitlines()) > 0
    finally:
        program.terminate()
        program.wait(10)
