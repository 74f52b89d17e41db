"""Images that leave a row out, paths that lead out of the root, and what tells one row from another."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vision_sources import (
    animation,
    build,
    colours,
    left_out,
    lines,
    noise,
    picture,
    png,
    put,
    put_colours,
    questions,
    rotated,
    rules,
    texts,
    uri,
    write,
    zip_of,
)

from anabranch import mixture as stage
from anabranch.errors import MixtureError, RecipeError
from anabranch.images import open_image
from anabranch.mixture_summary import unwanted_lines
from anabranch.pictures import SEEN
from anabranch.rows import load_unit, read_image
from anabranch.vision import load_vision
from vision_models import write_vision_model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its images are as many tokens as they have squares of 28 pixels; the placeholder is <|image_pad|>."""
    return load_vision(write_vision_model(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """16 tokens an image; the placeholder is <image>."""
    return load_vision(write_vision_model(tmp_path_factory.mktemp("llava"), "llava"))


# ---- rules ------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_named_in_the_order_of_the_rules(tmp_path, qwen):
    put_colours(tmp_path)
    truncated = noise(200, 200, form="JPEG")[:3000]
    put(
        tmp_path,
        cut_jpg=truncated,
        page_png=b"<html>not found</html>",
        bomb_png=png(60_000, 60_000),
        moving_gif=animation("GIF"),
        thin_png=picture("red", 1, 300),
        empty_png=b"",
        long_png=noise(700, 700),
    )
    (tmp_path / "folder.png").mkdir()
    bad = {
        "gone": "img/gone.png",
        "web": "https://example.org/a.png",
        "folder": "folder.png",
        "cut": "cut.jpg",
        "page": "page.png",
        "bomb": "bomb.png",
        "moving": "moving.gif",
        "thin": "thin.png",
        "empty": "empty.png",
        "uri": "data:image/png;base64,@@@",
        "long": "long.png",
        "nul": "img/\0.png",
        "endless": "x" * 5000,
    }
    rows = [
        {"task": task, "prompt": "<image>", "completion": "ok", "image": image}
        for task, name in bad.items()
        for image in ("img/red.png", name, "img/blue.png")
    ]
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", rows), "unit_column": "task"}, max_length=512)
    found = {e.unit: (e.rule, e.example.split(": ", 1)[1]) for e in mixture.excluded}
    assert {k: rule for k, (rule, _) in found.items()} == {
        "gone": "missing_image",
        "web": "missing_image",
        "folder": "missing_image",
        "nul": "missing_image",
        "endless": "missing_image",
        "cut": "broken_image",
        "page": "broken_image",
        "empty": "broken_image",
        "uri": "broken_image",
        "thin": "broken_image",
        "bomb": "huge_image",
        "moving": "animated_image",
        "long": "over_long",
    }
    assert all(u.rows == 2 for u in mixture.units)
    for task, word in (
        ("web", "not downloaded: https://example.org/a.png"),
        ("cut", "cut.jpg: damaged or cut short"),
        ("long", "625 of images"),
        ("moving", "GIF with more than one frame"),
        ("thin", "aspect ratio"),
        ("gone", "img/gone.png: No such file"),
    ):
        assert word in found[task][1], found[task]
    order = [
        "malformed",
        "empty_prompt",
        "empty_response",
        "missing_image",
        "broken_image",
        "huge_image",
        "animated_image",
        "over_long",
    ]
    assert [r for r in stage.RULES if r in order] == order


def test_only_rows_that_are_drawn_are_decoded(tmp_path, qwen):
    """So a broken image in the rest of a large unit costs nothing, and is not named."""
    put(tmp_path, **{f"img__{i}_png": noise(30, 30, i) for i in range(40)})
    path = write(
        tmp_path / "u.jsonl", [{"prompt": f"<image>{i}", "completion": "ok", "image": f"img/{i}.png"} for i in range(40)]
    )
    first = build(tmp_path, qwen, {"path": path}, max_samples=5)
    used = json.loads((tmp_path / "out" / SEEN).read_text())["sizes"]
    assert first.units[0].rows == 5 and 5 <= len(used) <= 16


def test_a_huge_file_is_not_read(tmp_path, qwen):
    put_colours(tmp_path)
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**28 + 1)
    rows = questions(3, lambda c: {"image": f"img/{c}.png"})
    rows[1]["image"] = "sparse.png"
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", rows)})
    assert "268,435,457 bytes" in left_out(mixture)["huge_image"]


def test_a_pipe_is_no_image(tmp_path, qwen):
    put_colours(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    rows = questions(3, lambda c: {"image": f"img/{c}.png"})
    rows[1]["image"] = "pipe.png"
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", rows)})  # and does not wait for somebody to write
    assert "is no file" in left_out(mixture)["missing_image"]


def broken(tmp_path: Path, *good: int) -> list[dict[str, Any]]:
    """Twelve rows of units a and b, whose images are broken but for these."""
    put(tmp_path, whole_png=picture("red"), cut_png=picture("red")[:40])
    return [
        {"prompt": f"<image>{i}", "completion": "ok", "u": "ab"[i % 2], "image": "whole.png" if i in good else "cut.png"}
        for i in range(12)
    ]


def test_a_source_of_which_no_image_can_be_used_is_refused(tmp_path, qwen):
    """Found when its rows are drawn; every such source is named in one message, and nothing is called a mixture."""
    rows = broken(tmp_path)
    fine = write(tmp_path / "fine.jsonl", questions(4, lambda c: {"image": "whole.png"}))
    sources = [{"path": fine}, {"path": write(tmp_path / "u.jsonl", rows)}]
    evaluate = {"transfer": [{"path": str(write(tmp_path / "t.jsonl", [r | {"completion": "other"} for r in rows]))}]}
    with pytest.raises(MixtureError) as caught:
        build(tmp_path, qwen, *sources, evaluate=evaluate)
    said = str(caught.value).splitlines()
    assert len(said) == 3 and not (tmp_path / "out" / "mixture.json").exists()
    for line, where in zip(said[1:], ("mixture.sources[1] (u.jsonl)", "evaluate.transfer[0] (t.jsonl)"), strict=True):
        assert f"{where}: none of its 12 rows is usable, 12 broken_image: " in line and "cut.png" in line
    assert [u.name for u in build(tmp_path, qwen, sources[0]).units] == ["fine"]


@pytest.mark.parametrize(("good", "units"), [((0, 2), ["a"]), ((1, 3, 5), ["b"])])
def test_one_unit_of_a_source_may_go(tmp_path, qwen, good, units):
    """A mixture of thousands must be able to run with a bad one; what is gone comes first among what is told."""
    rows = broken(tmp_path, *good)
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", rows), "unit_column": "u"})
    assert [u.name for u in mixture.units] == units
    [gone] = {"a", "b"} - set(units)
    [first, *rest] = unwanted_lines(mixture)
    assert first.startswith(f"unit {gone}, whole: 6 of 6 rows broken_image, such as ") and not any(gone in r[:2] for r in rest)


def test_a_source_that_keeps_a_row_is_not_refused(tmp_path, qwen):
    """One row is too few for a unit, and that is a rule of its own; the source is not wrong altogether."""
    rows = broken(tmp_path, 3)
    fine = write(tmp_path / "fine.jsonl", questions(4, lambda c: {"image": "whole.png"}))
    mixture = build(tmp_path, qwen, {"path": fine}, {"path": write(tmp_path / "u.jsonl", rows)})
    assert [u.name for u in mixture.units] == ["fine"] and not any("whole" in line for line in unwanted_lines(mixture))


def test_the_remedy_of_a_wrong_root(tmp_path, qwen):
    put_colours(tmp_path / "photos")
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "u.jsonl", questions(4, lambda c: {"image": f"img/{c}.png"}))
    for images, start in (({}, "where the rows lie"), ({"images": tmp_path / "other"}, "in its `images`, .*other")):
        with pytest.raises(MixtureError, match=rf"none of its 4 rows is usable.*do not start {start}: set `images` to"):
            build(tmp_path, qwen, {"path": path} | images)
    assert build(tmp_path, qwen, {"path": path, "images": tmp_path / "photos"}).units[0].rows == 4


# ---- paths that lead out ----------------------------------------------------------------------------------------------


def secret(tmp_path: Path) -> Path:
    put_colours(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(picture("white"))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "inside.png").symlink_to("img/red.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "loop.png").symlink_to("loop.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "img/../../secret.png",
        "/etc/passwd",
        "link.png",
        "up/secret.png",
        "up/none.png",
        "../data2/x.png",
        "//etc/passwd",
        "./../secret.png",
        "/",
    ],
)
def test_no_path_leads_out_of_the_root(tmp_path, qwen, name):
    data = secret(tmp_path)
    (tmp_path / "data2").mkdir()
    rows = questions(5, lambda c: {"image": f"img/{c}.png"})
    for i in (1, 3):
        rows[i]["image"] = name
    with pytest.raises(MixtureError) as caught:
        build(tmp_path, qwen, {"path": write(data / "u.jsonl", rows)})
    said = str(caught.value)
    assert (
        f"2 rows name images outside of {data}: data/u.jsonl:2: {name}; data/u.jsonl:4: {name}." in said and "`images`" in said
    )
    assert not (tmp_path / "out" / "mixture.json").exists()


def test_links_and_dots_within_the_root_are_paths_like_others(tmp_path, qwen):
    data = secret(tmp_path)
    rows = questions(4, lambda c: {"image": f"img/{c}.png"})
    rows[1]["image"], rows[2]["image"], rows[3]["image"] = "inside.png", "img/.././inside.png", "loop.png"
    mixture = build(tmp_path, qwen, {"path": write(data / "u.jsonl", rows)})
    assert colours(tmp_path / "out", mixture.units[0]) == [["red"]] * 3
    assert "loop.png" in left_out(mixture)["missing_image"]


def test_the_remedy_works(tmp_path, qwen):
    data = secret(tmp_path)
    rows = [
        {"prompt": f"<image>{i}", "completion": "ok", "image": n}
        for i, n in enumerate(("data/link.png", "secret.png", "data/up/secret.png"))
    ]
    mixture = build(tmp_path, qwen, {"path": write(data / "u.jsonl", rows), "images": tmp_path})
    assert colours(tmp_path / "out", mixture.units[0]) == [["white"]] * 3


def test_a_root_that_is_none(tmp_path, qwen):
    path = write(tmp_path / "u.jsonl", questions(3, lambda c: {"image": "a.png"}))
    for name in ("nowhere", "u.jsonl"):
        with pytest.raises(MixtureError, match=f"images: .*{name} is neither a folder nor a .zip file"):
            build(tmp_path, qwen, {"path": path, "images": tmp_path / name})


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "img/../../x.png", "a/b/../../../x.png"])
def test_names_in_a_zip_stay_in_it(tmp_path, qwen, name):
    """Also where the zip holds a member of such a name; nothing is ever unpacked by name."""
    with zipfile.ZipFile(tmp_path / "u.zip", "w") as archive:
        for member, data in (("img/red.png", picture("red")), ("../x.png", picture("white")), ("/x.png", picture("white"))):
            archive.writestr(member, data)
        archive.writestr("u.jsonl", lines([{"prompt": "a", "completion": "b", "image": n} for n in ("img/red.png", name)]))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MixtureError, match=r"1 row names an image outside of .*u\.zip: u\.zip!u\.jsonl:2: "):
        build(tmp_path, qwen, {"path": tmp_path / "u.zip"})
    assert [p for p in sorted(tmp_path.rglob("*")) if p.suffix == ".png"] == [p for p in before if p.suffix == ".png"]


def zip_with(tmp_path: Path, bad: bytes, **options: Any) -> Path:
    path = tmp_path / "u.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("red.png", picture("red"))
        archive.writestr("blue.png", picture("blue"))
        archive.writestr("bad.png", bad)
        archive.writestr(
            "u.jsonl",
            lines([{"prompt": "a", "completion": "b", "image": n} for n in ("red.png", "bad.png", "blue.png", "no.png")]),
        )
    return path


def test_a_zip_bomb_is_told_by_what_it_claims(tmp_path, qwen):
    path = zip_with(tmp_path, b"\0" * (2**28 + 1))
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    mixture = build(tmp_path, qwen, {"path": path})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rules(mixture) == {"missing_image": 1, "huge_image": 1} and mixture.units[0].rows == 2 and peak < 2**25


def test_a_zip_bomb_that_claims_less_is_read_no_further(tmp_path, qwen):
    path = zip_with(tmp_path, b"\0" * 10**7)
    data = bytearray(path.read_bytes())
    for at in [i for i in range(len(data) - 4) if data[i : i + 4] == struct.pack("<I", 10**7)]:
        data[at : at + 4] = struct.pack("<I", 1000)
    path.write_bytes(data)
    mixture = build(tmp_path, qwen, {"path": path})
    assert rules(mixture) == {"missing_image": 1, "broken_image": 1}


def test_an_encrypted_or_damaged_member_is_broken(tmp_path, qwen):
    path = zip_with(tmp_path, noise(40, 40))
    data = bytearray(path.read_bytes())
    at = data.index(b"bad.png") + len("bad.png") + 50
    data[at : at + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert rules(build(tmp_path, qwen, {"path": path})) == {"missing_image": 1, "broken_image": 1}
    locked = bytearray(zip_with(tmp_path, noise(40, 40)).read_bytes())
    at = locked.rindex(b"bad.png") - 46 + 8
    locked[at] |= 1
    path.write_bytes(locked)
    mixture = build(tmp_path, qwen, {"path": path}, out="other")
    assert rules(mixture) == {"missing_image": 1, "broken_image": 1} and any("encrypted" in e.example for e in mixture.excluded)


@pytest.mark.parametrize(("content", "word"), [(b"no zip at all", "not a readable zip"), (None, "holds no file of rows")])
def test_a_zip_that_cannot_be_read(tmp_path, qwen, content, word):
    path = zip_of(tmp_path / "u.zip", a_png=picture("red")) if content is None else tmp_path / "u.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MixtureError, match=word):
        build(tmp_path, qwen, {"path": path})


# ---- hashes, sides, caps ----------------------------------------------------------------------------------------------


def test_the_same_question_about_another_picture_is_another_row(tmp_path, qwen):
    put(tmp_path, **{f"img__{i}_png": noise(30, 30, i) for i in range(60)}, copy_png=noise(30, 30, 0))
    data = [{"prompt": "<image>What?", "completion": f"{i}.{k}", "image": f"img/{i}.png"} for i in range(60) for k in range(3)]
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", data)}, held_out=0.3)
    [unit] = mixture.units
    sides = {}
    for split in ("train", "held_out"):
        for said in texts(qwen, tmp_path / "out", unit, split):
            sides.setdefault(said.split("assistant\n")[1].split(".")[0], set()).add(split)
    assert all(len(s) == 1 for s in sides.values()) and len(sides) == 60  # a picture and its question stay on one side
    assert 60 < unit.rows < 160 and unit.rows + unit.held_out_rows == 180
    assert unit.images == unit.rows and unit.held_out_images == unit.held_out_rows
    assert mixture.duplicates_in_train == 0  # though tokens are the same for rows of one answer


def test_repeated_rows_are_told_by_the_picture_s_bytes_not_its_name(tmp_path, qwen):
    put(tmp_path, a_png=noise(30, 30, 0), b_png=noise(30, 30, 0), c_png=noise(30, 30, 1))
    train = write(
        tmp_path / "u.jsonl", [{"prompt": "<image>x", "completion": "y", "image": n} for n in ("a.png", "b.png", "c.png")]
    )
    held_out = write(
        tmp_path / "h.jsonl",
        [{"prompt": "<image>x", "completion": "y", "image": n} for n in ("b.png",)]
        + [{"prompt": "<image>x", "completion": "y", "image": uri("red")}],
    )
    mixture = build(tmp_path, qwen, {"path": train, "held_out": str(held_out)})
    [unit] = mixture.units
    assert (mixture.duplicates_in_train, unit.held_out_rows) == (1, 1) and rules(mixture) == {"duplicate_held_out": 1}
    kept = load_unit(tmp_path / "out" / unit.file, "train")
    assert kept.images.numbers.tolist() == [0, 0, 1]


def test_figures_count_repeats_and_parts_of_epochs(tmp_path, qwen):
    put(tmp_path, a_png=noise(56, 56), b_png=noise(112, 56))  # 4 and 8 tokens
    data = [{"prompt": f"{i}", "completion": "ok", "images": [["a.png"], ["a.png", "b.png"], []][i % 3]} for i in range(6)]
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", data)}, epochs=2)
    [unit] = mixture.units
    assert (unit.samples, unit.images, unit.image_tokens) == (12, 12, 2 * 2 * (4 + 12))
    found = load_unit(tmp_path / "out" / unit.file, "train")
    assert int((found.input_ids == qwen.placeholder_id).sum()) * 2 == unit.image_tokens
    about = mixture.vision
    assert about is not None and (about.images, about.scaled_down, about.image_tokens, about.image_tokens_uncapped) == (
        2,
        0,
        64,
        64,
    )
    assert (about.smallest, about.median, about.largest, about.max_pixels) == (4, 4, 8, None)


SIZES = [
    (56, 56),
    (57, 113),
    (112, 112),
    (113, 111),
    (126, 126),
    (300, 40),
    (40, 300),
    (333, 251),
    (640, 480),
    (1000, 37),
    (29, 1200),
]


def test_a_cap_below_what_the_processor_scales_up_to(tmp_path, qwen):
    put(tmp_path, one_png=noise(120, 64, 1))
    row = {"prompt": "a", "completion": "ok", "image": "one.png"}
    source = {"path": write(tmp_path / "u.jsonl", [row] * 2)}
    with pytest.raises(RecipeError, match=r"max_pixels: 12,543, .* at least 3,136 pixels.*12,544"):
        build(tmp_path, qwen, source, images={"max_pixels": 12_543})
    assert build(tmp_path, qwen, source, images={"max_pixels": 12_544}).vision.scaled_down == 0


def test_the_cap_gives_the_pixels_of_qwen_s_own_max_pixels(tmp_path, qwen):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cap = 112 * 112
    for form in ("PNG", "JPEG"):
        put(tmp_path, **{f"{form}{i}_x": noise(*size, i, form) for i, size in enumerate(SIZES)})
        put(tmp_path, turned_x=rotated(6))
    names = [f"{form}{i}.x" for form in ("PNG", "JPEG") for i in range(len(SIZES))] + ["turned.x"]
    data = [{"prompt": f"{i}", "completion": "ok", "image": n} for i, n in enumerate(names)]
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", data)}, images={"max_pixels": cap})
    assert mixture.excluded == []
    found = load_unit(tmp_path / "out" / mixture.units[0].file, "train")
    capped = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": cap})
    free = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    kept = 0
    for name, [image], ids in zip(
        names, found.images_of(range(len(found))), (found.row(i)[0] for i in range(len(found))), strict=True
    ):
        original, stored = (tmp_path / name).read_bytes(), read_image(image)
        wanted, got = (p(images=[open_image(d)], return_tensors="np") for p, d in ((capped, original), (free, stored)))
        assert wanted["image_grid_thw"].tolist() == got["image_grid_thw"].tolist(), name
        np.testing.assert_array_equal(wanted["pixel_values"], got["pixel_values"], name)
        assert (ids == qwen.placeholder_id).sum() == wanted["image_grid_thw"].prod() // 4
        kept += stored == original
    fits = sum(round(w / 28) * round(h / 28) * 784 <= cap for w, h in SIZES)
    about = mixture.vision
    assert kept == 2 * fits + 1 and about is not None  # those keep their own bytes; the turned one too
    assert (about.images, about.scaled_down) == (2 * len(SIZES) + 1, 2 * (len(SIZES) - fits))
    uncapped = [
        free(images=[open_image((tmp_path / n).read_bytes())], return_tensors="np")["image_grid_thw"].prod() // 4 for n in names
    ]
    assert about.image_tokens_uncapped == sum(uncapped) > about.image_tokens == mixture.units[0].image_tokens


def test_other_families_keep_the_shape_under_the_cap(tmp_path, llava):
    put(tmp_path, a_png=noise(400, 100), b_png=noise(60, 60))
    data = [{"prompt": f"{n}", "completion": "ok", "image": n} for n in ("a.png", "b.png")]
    mixture = build(tmp_path, llava, {"path": write(tmp_path / "u.jsonl", data)}, images={"max_pixels": 10_000})
    found = load_unit(tmp_path / "out" / mixture.units[0].file, "train")
    sizes = [open_image(read_image(image)).size for [image] in found.images_of([0, 1])]
    assert sizes == [(200, 50), (60, 60)] and mixture.vision is not None and mixture.vision.scaled_down == 1
