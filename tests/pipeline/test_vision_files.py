"""What lies in the mixture folder of rows with images: made once, made again where it is damaged, and shown."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from vision_sources import (
    COLOURS,
    build,
    noise,
    picture,
    put,
    put_colours,
    questions,
    recipe,
    rules,
    texts,
    write,
)

from anabranch import mixture as stage
from anabranch import pictures as store
from anabranch.artifacts import Mixture
from anabranch.errors import MixtureError
from anabranch.images import open_image
from anabranch.mixture import build_mixture, held_out_rows
from anabranch.pictures import SEEN
from anabranch.recipe import Recipe
from anabranch.rows import load_unit, read_image
from anabranch.vision import load_vision
from vision_models import write_vision_model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its images are as many tokens as they have squares of 28 pixels; the placeholder is <|image_pad|>."""
    return load_vision(write_vision_model(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl"))


# ---- files ------------------------------------------------------------------------------------------------------------


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SEEN
    }


def three_units(tmp_path: Path, sides: int = 60, **options: Any) -> Recipe:
    for name in "abc":
        put(tmp_path / name, **{f"{i}_png": noise(30 + 20 * i, sides, i + ord(name)) for i in range(6)})
        write(
            tmp_path / name / f"{name}.jsonl",
            [{"prompt": f"<image>{i}", "completion": "ok", "image": f"{i % 6}.png"} for i in range(12)],
        )
    for path in tmp_path.rglob("*.png"):
        os.utime(path, (1_700_000_000, 1_700_000_000))  # changed long ago
    return recipe(
        tmp_path,
        *({"path": tmp_path / n / f"{n}.jsonl"} for n in "abc"),
        held_out=0.3,
        evaluate={"retention": "held_out_prompts"},
        **options,
    )


def count_encodes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    units: set[str] = set()
    encode = stage._Making.encode
    monkeypatch.setattr(stage._Making, "encode", lambda self, batch, unit: (units.add(unit), encode(self, batch, unit))[1])
    return units


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    plain = hashlib.file_digest
    monkeypatch.setattr(store.hashlib, "file_digest", lambda file, kind: (hashed.append(str(file.name)), plain(file, kind))[1])
    return hashed


def test_killed_and_run_again_gives_the_same_bytes(tmp_path, qwen):
    wanted = three_units(tmp_path, sides=120, images={"max_pixels": 112 * 112})
    whole = build_mixture(wanted, qwen.tokenizer, tmp_path / "whole", base_hash="b", vision=qwen)

    def stop(unit: str, done: int, total: int) -> None:
        if unit == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_mixture(wanted, qwen.tokenizer, tmp_path / "out", base_hash="b", vision=qwen, progress=stop)
    assert build_mixture(wanted, qwen.tokenizer, tmp_path / "out", base_hash="b", vision=qwen) == whole
    assert whole.vision is not None and whole.vision.scaled_down
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not [p for p in (tmp_path / "out").rglob("*") if "tmp" in p.name]


def test_what_is_unchanged_is_neither_made_nor_read_again(tmp_path, qwen, monkeypatch):
    wanted, out = three_units(tmp_path), tmp_path / "out"
    first = build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen)
    encoded, hashed = count_encodes(monkeypatch), count_hashes(monkeypatch)

    def again() -> Mixture:
        encoded.clear()
        hashed.clear()
        return build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen)

    assert again() == first and not encoded and not [h for h in hashed if h.endswith(".png")]
    # another picture of the same name and size in bytes is another picture
    path = tmp_path / "b" / "3.png"
    before = path.read_bytes()
    path.write_bytes(before[:-20] + bytes([before[-20] ^ 1]) + before[-19:])  # in the end of the data: its checksum fails
    os.utime(path, (1_700_000_001, 1_700_000_001))
    second = again()
    assert encoded == {"b"} and [h for h in hashed if h.endswith(".png")] == [str(path)]
    assert second.made_from["sources"] != first.made_from["sources"] and second.unit("a") == first.unit("a")
    assert rules(second)["broken_image"] == 2
    # one that went missing, and came back
    path.unlink()
    assert rules(again())["missing_image"] == 2 and encoded == {"b"}
    path.write_bytes(before)
    assert again() == first and encoded == {"b"} and again() == first and not encoded


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_of_images_is_made_again(tmp_path, qwen, monkeypatch, damage):
    wanted, out = three_units(tmp_path), tmp_path / "out"
    first = build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen)
    path = out / str(first.unit("b").images_file)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage == "flip" else whole[:-1])
    if damage == "gone":
        path.unlink()
    encoded = count_encodes(monkeypatch)
    assert build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen) == first
    assert encoded == {"b"} and path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"null", b"\xff\xfe"])
def test_what_was_seen_is_no_more_than_a_help(tmp_path, qwen, content):
    wanted, out = three_units(tmp_path), tmp_path / "out"
    first = build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen)
    (out / SEEN).write_bytes(content)
    assert build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen) == first
    seen = json.loads((out / SEEN).read_text())
    assert len(seen["used"]) == 3
    # a changed hash in it does not fit its checksum
    label = next(iter(seen["files"]))
    seen["files"][label][2] = "0" * 64
    (out / SEEN).write_text(json.dumps(seen))
    assert build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen) == first


def test_an_image_that_changes_while_the_mixture_is_made_is_told(tmp_path, qwen):
    wanted = three_units(tmp_path)

    def change(unit: str, done: int, total: int) -> None:
        for path in (tmp_path / "b").glob("*.png"):
            path.write_bytes(picture("red"))

    with pytest.raises(MixtureError, match=r"image \d\.png: its bytes are not those"):
        build_mixture(wanted, qwen.tokenizer, tmp_path / "out", base_hash="b", vision=qwen, progress=change)
    assert build_mixture(wanted, qwen.tokenizer, tmp_path / "out", base_hash="b", vision=qwen).unit("b").rows > 0


def test_files_of_units_that_are_gone_go(tmp_path, qwen):
    wanted, out = three_units(tmp_path), tmp_path / "out"
    build_mixture(wanted, qwen.tokenizer, out, base_hash="b", vision=qwen)
    fewer = wanted.model_copy(update={"mixture": wanted.mixture.model_copy(update={"sources": wanted.mixture.sources[:2]})})
    mixture = build_mixture(fewer, qwen.tokenizer, out, base_hash="b", vision=qwen)
    files = {f for u in mixture.units for f in u.files}
    assert {p.relative_to(out).as_posix() for p in (out / "units").glob("*.safetensors")} == files and len(files) == 4


def test_retention_asks_each_prompt_once_and_without_its_picture(tmp_path, qwen):
    put(tmp_path, **{f"img__{i}_png": noise(30, 30, i) for i in range(40)})
    data = [{"prompt": "<image>What is this?", "completion": f"{i}", "image": f"img/{i}.png"} for i in range(40)]
    mixture = build(
        tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", data)}, held_out=0.4, evaluate={"retention": "held_out_prompts"}
    )
    [unit] = mixture.retention
    assert texts(qwen, tmp_path / "out", unit, "held_out") == ["What is this?"] and unit.images_file is None


def test_the_audited_row_is_the_first_with_an_image(tmp_path, qwen):
    put(tmp_path, a_png=noise(56, 84), b_png=noise(56, 56))
    data = [
        {"prompt": "no picture", "completion": "first"},
        {"prompt": "<image><image> two", "completion": "second", "images": ["a.png", "b.png"]},
        {"prompt": "<image>", "completion": "third", "image": "b.png"},
    ]
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", data)})
    [row] = mixture.audit
    assert (row.unit, row.where, row.images, row.images_file) == ("u", "u.jsonl:2", [0, 1], mixture.units[0].images_file)
    assert [(p.kind, p.tokens) for p in row.parts if p.kind == "image"] == [("image", 6), ("image", 4)]
    assert [p.text for p in row.parts if p.kind == "trained"] == ["second<|im_end|>"]
    whole = load_unit(tmp_path / "out" / mixture.units[0].file, "train").row(1)[0]
    assert sum(p.tokens for p in row.parts) == len(whole)


def test_held_out_rows_alone(tmp_path, qwen):
    put_colours(tmp_path)
    path = write(tmp_path / "u.jsonl", questions(6, lambda c: {"image": f"img/{c}.png"}))
    wanted = recipe(tmp_path, {"path": path}, evaluate={"transfer": [{"path": str(path)}]})
    rows, excluded = held_out_rows(wanted, qwen.tokenizer, vision=qwen, folder=tmp_path / "images")
    assert excluded == [] and [len(i) for i in rows["u"].images_of(range(6))] == [1] * 6
    assert open_image(read_image(rows["u"].images_of([2])[0][0])).getpixel((0, 0)) == COLOURS["blue"]
    passing, _ = held_out_rows(wanted, qwen.tokenizer, vision=qwen)
    image = passing["u"].images_of([2])[0][0]
    assert image.file.parent != tmp_path / "images" and open_image(read_image(image)).getpixel((0, 0)) == COLOURS["blue"]
