"""What a store refuses: URLs with secrets in them, names that lead out of it, links planted in it."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from anabranch.errors import CorruptedError, OutputError, RecipeError
from anabranch.store.files import Store, open_store

MIB = 2**20


def opened(url: str, tmp_path: Path) -> Store:
    return open_store(url, cache=tmp_path / "cache", patience=8.0)


def some_file(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(0).randbytes(size))
    return path


# URLs

@pytest.mark.parametrize("url", [
    "s3://KEY:SECRET@bucket/run", "s3://KEY@bucket/run", "s3://bucket/run?X-Amz-Signature=SECRET", "s3://bucket/run#SECRET",
    "s3://", "s3:///run", "s3://bucket/../SECRET", "s3://bucket//SECRET", "s3://Bucket_SECRET/run", "gs://u:SECRET@b/r",
    "ftp://SECRET@host/run", "https://host/SECRET", "file://SECRET/run", "s3://bucket/a::file://SECRET", "SECRET stuff://x", "s3://[SECRET/run",
    "s3://b\nSECRET/x",
])
def test_urls_that_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as told:
        open_store(url, cache=tmp_path)
    assert "SECRET" not in str(told.value) and "KEY" not in str(told.value) and "\n" not in str(told.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, url, extra in (("s3fs", "s3://b/r", "s3"), ("gcsfs", "gs://b/r", "gcs")):
        for name in (package, f"{package}.core"):
            monkeypatch.setitem(sys.modules, name, None)
        if "fsspec.registry" in sys.modules:  # where what was imported once stays known
            monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
        with pytest.raises(RecipeError, match=rf"pip install 'anabranch\[{extra}\]'"):
            open_store(url.replace("b/r", "bucket/run"), cache=tmp_path)


# Hostile names and links

HOSTILE = ["../x", "a/../../x", "/etc/x", "a//b", "", ".", "..", "a/./b", "a/.hidden", "~root/x", "a\x00b", "a\nb", "a\\b",
           "a/", "C:x", "a?versionId=1", "a" * 201, "/".join(["a"] * 300), "objects/../../x", "jobs/*/x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    for store in (opened(str(tmp_path / "store"), tmp_path), opened(f"memory://{tmp_path.name}", tmp_path)):
        for request in (lambda s: s.create(name, b"x"), lambda s: s.replace(name, b"x"), lambda s: s.read(name),
                        lambda s: s.names(name), lambda s: s.remove(name)):
            with pytest.raises(CorruptedError, match="not a name inside"):
                request(store)
    assert not (tmp_path / "store").exists() and not (tmp_path / "x").exists()


def test_no_generated_name_leaves_the_root(tmp_path: Path) -> None:
    draw, store = random.Random(11), opened(str(tmp_path / "in" / "store"), tmp_path)
    refused = 0
    for _ in range(500):
        name = "".join(draw.choice(["..", ".", "/", "a", "b", "é", "~", "\\", "\x00", " ", "//", "%2e%2e", "\u202e", "-"])
                       for _ in range(draw.randint(1, 7)))
        try:
            store.create(name, b"x")
        except (CorruptedError, OutputError):
            refused += 1
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["store"]
    assert 150 < refused < 500
    assert not any(part in ("..", ".") for path in (tmp_path / "in" / "store").rglob("*") for part in path.parts)


@pytest.mark.parametrize("plant", ["folder", "dangling", "above"])
def test_a_planted_link_is_not_followed(tmp_path: Path, plant: str) -> None:
    store, outside = opened(str(tmp_path / "store"), tmp_path), tmp_path / "outside"
    store.create("jobs/a/x", b"")
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (tmp_path / "store" / "jobs" / "b").symlink_to({"folder": outside, "dangling": tmp_path / "none", "above": ".."}[plant])
    for request in (lambda: store.create("jobs/b/new", b"x"), lambda: store.read("jobs/b/secret"),
                    lambda: store.names("jobs/b"), lambda: store.replace("jobs/b/secret", b"x")):
        with pytest.raises(CorruptedError, match="`b` is a symbolic link"):
            request()
    assert os.listdir(outside) == ["secret"] and (outside / "secret").read_text() == "secret"
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_a_link_or_no_file_is_refused(tmp_path: Path) -> None:
    store, secret = opened(str(tmp_path / "store"), tmp_path), some_file(tmp_path / "secret", 2 * MIB)
    ref = store.put(secret)
    kept = tmp_path / "store" / "objects" / ref.sha256[:2] / ref.sha256
    kept.unlink()
    kept.symlink_to(secret)
    for request in (lambda: store.get(ref, tmp_path / "out"), lambda: store.has(ref),
                    lambda: store.read(f"objects/{ref.sha256[:2]}/{ref.sha256}")):
        with pytest.raises(CorruptedError, match="a symbolic link"):
            request()
    kept.unlink()
    os.mkfifo(kept)  # reading one would wait for ever
    with pytest.raises(CorruptedError, match="not a plain file"):
        store.get(ref, tmp_path / "out")
    (tmp_path / "store" / "result.json").symlink_to(tmp_path / "secret")
    assert not store.create("result.json", b"x")  # the name is taken
    store.replace("result.json", b"x")  # the link, not what it names
    assert secret.stat().st_size == 2 * MIB and store.read("result.json") == b"x"


def test_links_of_the_one_who_asks_are_followed(tmp_path: Path) -> None:
    """The root, and a file to be stored, are the user's own words (a Hub cache is full of links)."""
    file, store = some_file(tmp_path / "blob", 2 * MIB), opened(str(tmp_path / "link"), tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = opened(str(tmp_path / "link"), tmp_path)
    (tmp_path / "snapshot").symlink_to(file)
    store.get(store.put(tmp_path / "snapshot"), tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes() and not (tmp_path / "out").is_symlink()
