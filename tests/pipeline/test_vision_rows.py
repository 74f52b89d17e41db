"""Rows with images into the mixture: every format and every container; nothing kept in memory."""

from __future__ import annotations

import base64
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from vision_sources import (
    BINARY,
    COLOURS,
    build,
    colours,
    left_out,
    lines,
    noise,
    parquet,
    picture,
    put,
    put_colours,
    questions,
    recipe,
    texts,
    uri,
    write,
    zip_of,
)

from anabranch.errors import MixtureError
from anabranch.mixture import build_mixture
from anabranch.pictures import SEEN, Pictures
from anabranch.recipe import Source
from anabranch.rows import load_unit, read_image
from anabranch.sources import locate, read_source
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


# ---- formats ----------------------------------------------------------------------------------------------------------


SEEN_AS = "<|vision_start|><|image_pad|><|vision_end|>"


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 3, contents, strict=False)]


def spoken(*values: str) -> list[dict[str, str]]:
    return [{"from": who, "value": v} for who, v in zip(("human", "gpt") * 3, values, strict=False)]


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


# row -> what stands before the answer 'ok' (# for an image), the images
FORMATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "parts and a column": ({"messages": turns([{"type": "image"}, text("a")], "ok"), "images": ["img/red.png"]}, "#a", "red"),
    "parts behind the text": (
        {
            "messages": turns([text("a"), {"type": "image"}, text("b"), {"type": "image"}], "ok"),
            "images": ["img/red.png", "img/blue.png"],
        },
        "a#b#",
        "red blue",
    ),
    "a part with image": ({"messages": turns([{"type": "image", "image": "img/red.png"}, text("a")], "ok")}, "#a", "red"),
    "a part with path": ({"messages": turns([{"type": "image", "path": "img/red.png"}, text("a")], "ok")}, "#a", "red"),
    "a part with url": ({"messages": turns([{"type": "image", "url": uri("red")}, text("a")], "ok")}, "#a", "red"),
    "image_url": (
        {"messages": turns([text("a"), {"type": "image_url", "image_url": {"url": uri("blue")}}], "ok")},
        "a#",
        "blue",
    ),
    "image_url as text": (
        {"messages": turns([text("a"), {"type": "image_url", "image_url": "img/blue.png"}], "ok")},
        "a#",
        "blue",
    ),
    "parts with and without": (
        {
            "messages": turns(
                [{"type": "image"}, {"type": "image", "path": "img/red.png"}, text("a"), {"type": "image"}], "ok"
            ),
            "images": ["img/blue.png", "img/green.png"],
        },
        "##a#",
        "blue red green",
    ),
    "parts with numbers": (
        {
            "messages": turns([text("a"), {"type": "image", "index": 1}, {"type": "image", "index": 0}], "ok"),
            "images": ["img/blue.png", "img/green.png"],
        },
        "a##",
        "green blue",
    ),
    "empty fields": (
        {
            "messages": turns([{"type": "image", "text": None, "path": None, "url": ""}, text("a")], "ok"),
            "images": [{"bytes": None, "path": "img/red.png"}],
        },
        "#a",
        "red",
    ),
    "<image> beside parts is text": (
        {"messages": turns([text("<image>"), {"type": "image"}], "ok"), "image": "img/red.png"},
        "<image>#",
        "red",
    ),
    "a string and a marker": ({"messages": turns("say <image> now", "ok"), "images": ["img/red.png"]}, "say # now", "red"),
    "a string and no marker": ({"messages": turns("a", "ok"), "images": ["img/red.png", "img/blue.png"]}, "##a", "red blue"),
    "a system turn first": (
        {"messages": [{"role": "system", "content": "be kind"}, *turns("a", "ok")], "image": "img/red.png"},
        "#a",
        "red",
    ),
    "llava": ({"id": 1, "image": "img/red.png", "conversations": spoken("<image>\na", "ok")}, "#a", "red"),
    "llava, several": (
        {"image": ["img/red.png", "img/blue.png"], "conversations": spoken("<image>a<image>", "ok")},
        "#a#",
        "red blue",
    ),
    "llava, a later turn": (
        {"image": ["img/red.png", "img/blue.png"], "conversations": spoken("<image>a", "no", "b<image>", "ok")},
        "b#",
        "red blue",
    ),
    "prompt and completion": ({"prompt": "see <image>", "completion": "ok", "image": "img/red.png"}, "see #", "red"),
    "prompt, no marker": ({"prompt": "a", "completion": "ok", "image": "img/red.png"}, "#a", "red"),
    "trl": (
        {
            "prompt": turns([{"type": "image"}, text("a")]),
            "completion": [{"role": "assistant", "content": "ok"}],
            "images": ["img/red.png"],
        },
        "#a",
        "red",
    ),
    "alpaca": ({"instruction": "i", "input": "<image>", "output": "ok", "images": ["img/red.png"]}, "i\n#", "red"),
    "alpaca, no marker": ({"instruction": "i", "input": "n", "output": "ok", "image": "img/red.png"}, "#i\n\nn", "red"),
    "an image alone": ({"prompt": "<image>", "completion": "ok", "image": "img/red.png"}, "#", "red"),
    "a data URI": ({"prompt": "a", "completion": "ok", "image": uri("green")}, "#a", "green"),
    "one image twice": (
        {"prompt": "<image>a<image>", "completion": "ok", "images": ["img/red.png", "./img/../img/red.png"]},
        "#a#",
        "red red",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, qwen, name):
    row, prompt, images = FORMATS[name]
    put_colours(tmp_path)
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [row] * 2)})
    [unit] = mixture.units
    assert colours(tmp_path / "out", unit) == [images.split()] * 2
    [said, _] = texts(qwen, tmp_path / "out", unit)
    assert f"<|im_start|>user\n{prompt.replace('#', SEEN_AS)}<|im_end|>\n<|im_start|>assistant\nok<|im_end|>" in said
    assert mixture.excluded == []


@pytest.mark.parametrize("name", ["llava", "prompt and completion", "a string and no marker", "parts behind the text"])
def test_a_model_whose_placeholder_is_the_marker(tmp_path, llava, name):
    row, _, images = FORMATS[name]
    put_colours(tmp_path)
    mixture = build(tmp_path, llava, {"path": write(tmp_path / "u.jsonl", [row] * 2)})
    assert colours(tmp_path / "out", mixture.units[0]) == [images.split()] * 2
    found = load_unit(tmp_path / "out" / mixture.units[0].file, "train")
    ids, mask = found.row(0)
    assert (ids == llava.placeholder_id).sum() == 16 * len(images.split()) and not mask[ids == llava.placeholder_id].any()


def test_text_alone_among_images(tmp_path, qwen):
    put_colours(tmp_path)
    shown = {"prompt": "a", "completion": "ok", "image": "img/red.png", "images": None}
    bare = [
        {"prompt": p, "completion": "ok"} | more
        for p, more in (
            ("b", {"image": None}),
            ("c", {"images": []}),
            ("d", {"image": ""}),
            ("e", {}),
            ("f", {"images": [None]}),
            ("g", {"image": {"bytes": None, "path": None}}),
            ("<image> h", {}),
        )
    ]
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [shown, *bare])})
    [unit] = mixture.units
    assert colours(tmp_path / "out", unit) == [["red"], *[[]] * 6] and (unit.rows, unit.images, unit.image_tokens) == (7, 1, 4)
    [lost] = mixture.excluded  # a misspelt column must not train on questions without their pictures
    assert (lost.rule, lost.rows) == ("malformed", 1)
    assert lost.example == ("u.jsonl:8: 1 <image> in its text, and no image in the row. Its images are looked for in "
                            "`images` or `image`; another name goes under `columns`, as in columns: {image: its name in the "
                            "file}")


def test_a_mixture_of_text_for_a_vision_language_model_has_no_trace_of_images(tmp_path, qwen):
    mixture = build(
        tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [{"prompt": f"a{i}", "completion": "b"} for i in range(4)])}
    )
    assert mixture.vision is None and mixture.audit == [] and mixture.units[0].images_file is None
    assert load_unit(tmp_path / "out" / mixture.units[0].file, "train").images is None
    assert not (tmp_path / "out" / SEEN).exists() and not list((tmp_path / "out").rglob("*.images.safetensors"))


LIKE_AN_IMAGE: dict[str, Any] = {
    "a path": "colour/0.PNG",
    "a URL": "https://example.org/a.jpeg?size=2",
    "a data URI": uri("red"),
    "a list": ["a.png", "b.webp"],
    "bytes": picture("red"),
    "bytes of a JPEG": picture("red", form="JPEG"),
    "as Hugging Face writes them": {"bytes": picture("red", form="WEBP"), "path": None},
    "the path alone": {"bytes": None, "path": "a.tiff"},
    "a list of them": [{"bytes": picture("red", form="GIF"), "path": None}],
}


def source_with(path: Path, column: str, value: Any) -> Path:
    """Five rows with this column; Parquet where JSON cannot hold it."""
    rows = [{"prompt": f"{i}", "completion": "ok", column: value} for i in range(5)]
    if "bytes" not in str(type(value)) and "b'" not in str(value):
        return write(path.with_suffix(".jsonl"), rows)
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("name", LIKE_AN_IMAGE)
def test_an_image_in_a_column_of_another_name_does_not_train_as_text(tmp_path, qwen, name):
    """The data's word for it must be mapped; the rows of other units are fine, and a glob goes on without this one."""
    source_with(tmp_path / "data" / "u", "picture", LIKE_AN_IMAGE[name])
    write(tmp_path / "data" / "w.jsonl", [{"prompt": f"{i}", "completion": "ok"} for i in range(4)])
    mixture = build(tmp_path, qwen, {"path": tmp_path / "data"})
    assert [u.name for u in mixture.units] == ["w"]
    lost = next(e for e in mixture.excluded if e.rule == "malformed")
    assert (lost.unit, lost.rows) == ("u", 5)
    assert "`picture` holds what looks like an image" in lost.example and "columns: {images: picture}" in lost.example


@pytest.mark.parametrize("name", ["bytes", "as Hugging Face writes them", "a data URI"])
def test_the_column_that_is_named_is_read(tmp_path, qwen, name):
    path = source_with(tmp_path / "u", "picture", LIKE_AN_IMAGE[name])
    mixture = build(tmp_path, qwen, {"path": path, "columns": {"images": "picture"}})
    assert (mixture.units[0].rows, mixture.units[0].images, mixture.excluded) == (5, 5, [])


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", "000123"),
        ("source", "web.archive"),
        ("n", 7),
        ("note", "draw\na.png"),
        ("essay", "x" * 2000 + ".png"),
        ("tags", []),
        ("tags", ["a.png", "b"]),
        ("audio", {"bytes": b"RIFF....WAVEfmt ", "path": "a.wav"}),
        ("blob", b"\x00\x01 no image"),
        ("input", "a.png"),
    ],
)
def test_other_columns_are_let_be(tmp_path, qwen, column, value):
    mixture = build(tmp_path, qwen, {"path": source_with(tmp_path / "u", column, value)})
    assert mixture.units[0].rows == 5 and mixture.excluded == []


def test_other_columns_of_a_row_that_shows_its_image_are_let_be(tmp_path, qwen):
    """Data often has the path of the original, or a thumbnail, beside the image. So with rows of no image where the recipe
    says in which column images are; units of that name; and plain text, which shows none."""
    put_colours(tmp_path)
    shown = [{"prompt": f"{i}", "completion": "ok", "image": "img/red.png", "url": "http://x.org/a.png"} for i in range(3)]
    bare = [{"prompt": f"{i}", "completion": "ok", "image": None, "url": "http://x.org/a.png"} for i in range(3)]
    sources = [
        {"path": write(tmp_path / "shown.jsonl", shown)},
        {"path": write(tmp_path / "bare.jsonl", bare), "columns": {"image": "image"}},
        {"path": write(tmp_path / "n.jsonl", [{"prompt": "a", "completion": "b", "file": "a.png"}] * 3), "unit_column": "file"},
        {"path": write(tmp_path / "text.jsonl", [{"text": "a b", "url": "a.png"}] * 3), "format": "text"},
    ]
    mixture = build(tmp_path, qwen, *sources)
    assert {u.name: u.rows for u in mixture.units} == {"a.png": 3, "bare": 3, "shown": 3, "text": 3} and not mixture.excluded


def test_a_language_model_does_not_care(tmp_path, llava):
    path = write(tmp_path / "u.jsonl", [{"prompt": f"{i}", "completion": "ok", "picture": "a.png"} for i in range(3)])
    mixture = build_mixture(recipe(tmp_path, {"path": path}, chat_template="plain"), llava.tokenizer, tmp_path / "out",
                            base_hash="b")
    assert mixture.units[0].rows == 3 and mixture.excluded == []


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "more places": (
        {"prompt": "<image><image>", "completion": "c", "image": "img/red.png"},
        "2 places for images in its messages, and 1 image",
    ),
    "more images": (
        {"prompt": "<image>", "completion": "c", "images": ["img/red.png"] * 3},
        "1 place for images in its messages, and 3 images",
    ),
    "parts and no image": (
        {"messages": turns([{"type": "image"}, text("a")], "c")},
        "1 place for images in its messages, and 0 images",
    ),
    "an image in an answer": ({"messages": turns("a", [{"type": "image", "path": "img/red.png"}])}, "assistant turn"),
    "a marker in an answer": ({"prompt": "a", "completion": "<image>", "image": "img/red.png"}, "assistant turn"),
    "both columns": (
        {"prompt": "a", "completion": "c", "image": "img/red.png", "images": ["img/red.png"]},
        "in one of the two",
    ),
    "a hole": ({"prompt": "a", "completion": "c", "images": ["img/red.png", None]}, "place 2 of 2"),
    "a number": ({"prompt": "a", "completion": "c", "image": 7}, "an image is int"),
    "named twice": ({"messages": turns([{"type": "image", "path": "img/red.png", "url": "img/red.png"}], "c")}, "2 times"),
    "beyond the column": (
        {"messages": turns([{"type": "image", "index": 1}], "c"), "images": ["img/red.png"]},
        "shows image 1",
    ),
    "a video": ({"messages": turns([{"type": "video", "path": "a.mp4"}, text("a")], "c")}, "no text"),
    "the stand-in itself": ({"prompt": "\ufffc a", "completion": "c", "image": "img/red.png"}, "U+FFFC"),
    "the stand-in, no image": ({"prompt": "\ufffc a", "completion": "c"}, "image"),
    "the model's placeholder": ({"prompt": "a <|image_pad|>", "completion": "c"}, "<|image_pad|>"),
    "the placeholder in an answer": (
        {"prompt": "<image>", "completion": "<|image_pad|>", "image": "img/red.png"},
        "<|image_pad|>",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tmp_path, qwen, name):
    row, word = MALFORMED[name]
    put_colours(tmp_path)
    good = {"prompt": "a", "completion": "c", "image": "img/blue.png"}
    path = write(tmp_path / "u.jsonl", [good, {"messages": None} | row if "messages" not in row else row, good])
    form = "messages" if "messages" in row else "prompt_completion"
    if form == "messages":
        path = write(tmp_path / "u.jsonl", [{"messages": turns("x", "y")}, row, {"messages": turns("x", "y")}])
    mixture = build(tmp_path, qwen, {"path": path, "format": form})
    example = left_out(mixture)["malformed"]
    assert "u.jsonl:2: " in example and word in example and mixture.units[0].rows == 2


def test_plain_text_rows_show_no_images(tmp_path, qwen):
    put_colours(tmp_path)
    path = write(tmp_path / "u.jsonl", [{"text": "a b"}, {"text": "a <image>", "image": "img/red.png"}, {"text": "c d"}])
    mixture = build(tmp_path, qwen, {"path": path, "format": "text"})
    assert "no user turn to show it in" in left_out(mixture)["malformed"] and mixture.units[0].rows == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "image": "img/red.png"},
        {"prompt": "a", "completion": "b", "images": [{"bytes": None, "path": "no.png"}]},
        {"messages": turns([{"type": "image", "path": "x.png"}], "b")},
    ],
)
def test_a_language_model_takes_no_images(tmp_path, qwen, row):
    path = write(tmp_path / "u.jsonl", [row | {"n": i} for i in range(4)])
    with pytest.raises(MixtureError, match=r"u\.jsonl:1: shows an image, and the base is a language model.*`model\.path`"):
        build_mixture(recipe(tmp_path, {"path": path}), qwen.tokenizer, tmp_path / "out", base_hash="b")


def test_rows_without_images_of_a_data_set_that_could_have_some_suit_a_language_model(tmp_path, llava):
    from test_mixture import texts as plain

    tokenizer = llava.tokenizer
    path = write(
        tmp_path / "u.jsonl",
        [{"prompt": f"\ufffc<image> {i}", "completion": "b", "image": None, "images": []} for i in range(3)],
    )
    mixture = build_mixture(recipe(tmp_path, {"path": path}, chat_template="plain"), tokenizer, tmp_path / "out", base_hash="b")
    assert plain(tokenizer, tmp_path / "out", mixture.units[0]) == [f"\ufffc<image> {i}\nb<|im_end|>" for i in range(3)]


# ---- containers -------------------------------------------------------------------------------------------------------


WANTED = [[list(COLOURS)[i % 4]] for i in range(6)]


def in_folder(tmp_path: Path) -> dict[str, Any]:
    put_colours(tmp_path / "data")
    return {"path": write(tmp_path / "data" / "u.jsonl", questions(6, lambda c: {"image": f"img/{c}.png"}))}


def in_csv(tmp_path: Path) -> dict[str, Any]:
    put_colours(tmp_path / "data")
    lines = ["prompt,completion,image", *(f"<image> {i},ok,img/{c[0]}.png" for i, c in enumerate(WANTED))]
    (tmp_path / "data" / "u.csv").write_text("\n".join(lines))
    return {"path": tmp_path / "data" / "u.csv"}


def image_folder(tmp_path: Path) -> dict[str, Any]:
    """As Hugging Face's imagefolder: metadata.jsonl beside the images; `path` is the folder."""
    put(tmp_path / "data", **{f"{c}_png": picture(c) for c in COLOURS})
    write(
        tmp_path / "data" / "metadata.jsonl",
        [{"file_name": f"{c[0]}.png", "question": f"<image> {i}", "answer": "ok"} for i, c in enumerate(WANTED)],
    )
    return {"path": tmp_path / "data", "columns": {"image": "file_name", "prompt": "question", "completion": "answer"}}


def elsewhere(tmp_path: Path) -> dict[str, Any]:
    put_colours(tmp_path / "pictures")
    return {
        "path": write(tmp_path / "rows" / "u.jsonl", questions(6, lambda c: {"image": f"img/{c}.png"})),
        "images": tmp_path / "pictures",
    }


def absolute(tmp_path: Path) -> dict[str, Any]:
    """An absolute path is as good as any where it leads into the root."""
    put_colours(tmp_path / "pictures")
    return {
        "path": write(
            tmp_path / "rows" / "u.jsonl", questions(6, lambda c: {"image": str(tmp_path / "pictures" / "img" / f"{c}.png")})
        ),
        "images": tmp_path / "pictures",
    }


def zipped_images(tmp_path: Path) -> dict[str, Any]:
    return {
        "path": write(tmp_path / "u.jsonl", questions(6, lambda c: {"image": f"img/{c}.png"})),
        "images": zip_of(tmp_path / "pictures.zip", **{f"img__{c}_png": picture(c) for c in COLOURS}),
    }


def all_in_a_zip(suffix: str, top: str = "") -> Any:
    def make(tmp_path: Path) -> dict[str, Any]:
        rows = questions(6, lambda c: {"image": f"img/{c}.png"})
        data = {"jsonl": lines(rows), "json": json.dumps(rows).encode(), "parquet": parquet(rows)}[suffix]
        return {
            "path": zip_of(
                tmp_path / "u.zip",
                **{f"{top}rows_{suffix}": data},
                **{f"{top}img__x__notes_json": b"[]"},
                **{f"__MACOSX__rows_{suffix}": b"\0"},
                **{f"{top}img__{c}_png": picture(c) for c in COLOURS},
            )
        }

    return make


def parquet_bytes(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "u.parquet").write_bytes(
        parquet(questions(6, lambda c: {"image": {"bytes": picture(c), "path": "/gone/x.png"}}), image=BINARY)
    )
    return {"path": tmp_path / "u.parquet"}


def parquet_lists(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "u.parquet").write_bytes(
        parquet(questions(6, lambda c: {"images": [{"bytes": picture(c), "path": None}]}), images=pyarrow.list_(BINARY))
    )
    return {"path": tmp_path / "u.parquet"}


def parquet_raw(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "u.parquet").write_bytes(parquet(questions(6, lambda c: {"picture": picture(c)}), picture=pyarrow.binary()))
    return {"path": tmp_path / "u.parquet", "columns": {"image": "picture"}}


def parquet_paths(tmp_path: Path) -> dict[str, Any]:
    put_colours(tmp_path)
    (tmp_path / "u.parquet").write_bytes(
        parquet(questions(6, lambda c: {"images": [f"img/{c}.png"]}), images=pyarrow.list_(pyarrow.string()))
    )
    return {"path": tmp_path / "u.parquet"}


CONTAINERS = {
    "folder": in_folder,
    "csv": in_csv,
    "imagefolder": image_folder,
    "elsewhere": elsewhere,
    "absolute": absolute,
    "zipped images": zipped_images,
    "zip, jsonl": all_in_a_zip("jsonl"),
    "zip, parquet": all_in_a_zip("parquet"),
    "zip, a folder in it": all_in_a_zip("json", "top__"),
    "parquet, bytes": parquet_bytes,
    "parquet, lists": parquet_lists,
    "parquet, raw bytes": parquet_raw,
    "parquet, paths": parquet_paths,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(tmp_path, qwen, name):
    mixture = build(tmp_path, qwen, CONTAINERS[name](tmp_path) | {"unit": "u"})
    [unit] = mixture.units
    assert colours(tmp_path / "out", unit) == WANTED and mixture.excluded == []
    assert [t.split("<|vision_end|>")[1].split("<|im_end|>")[0] for t in texts(qwen, tmp_path / "out", unit)] == [
        f" {i}" for i in range(6)
    ]
    # each of the four images once, whichever way it came
    assert len(np.unique(load_unit(tmp_path / "out" / unit.file, "train").images.numbers)) == 4
    assert unit.images_file == unit.file.replace(".safetensors", ".images.safetensors")


def test_a_zip_s_unit_is_called_after_it_and_several_files_after_themselves(tmp_path, qwen):
    rows = questions(4, lambda c: {"image": f"img/{c}.png"})
    files = {f"img__{c}_png": picture(c) for c in COLOURS}
    zip_of(tmp_path / "flan.zip", rows_jsonl=lines(rows), **files)
    zip_of(tmp_path / "two.zip", a_jsonl=lines(rows), b_jsonl=lines(rows), **files)
    mixture = build(tmp_path, qwen, {"path": tmp_path / "flan.zip"}, {"path": tmp_path / "two.zip"})
    assert [u.name for u in mixture.units] == ["a", "b", "flan"]


def test_vision_flan(tmp_path, qwen):
    """One list for all tasks; `task_name` names the unit."""
    put_colours(tmp_path / "images")
    rows = [
        {
            "id": f"t{i % 3}_{i}",
            "image": f"img/{list(COLOURS)[i % 4]}.png",
            "task_name": f"Task {i % 3}+qa",
            "conversations": spoken(f"Which colour?\n<image>{i}", "red"),
        }
        for i in range(12)
    ]
    (tmp_path / "annotation.json").write_text(json.dumps(rows))
    mixture = build(
        tmp_path, qwen, {"path": tmp_path / "annotation.json", "images": tmp_path / "images", "unit_column": "task_name"}
    )
    assert [(u.name, u.rows, u.images) for u in mixture.units] == [(f"Task {i}+qa", 4, 4) for i in range(3)]
    assert [a.unit for a in mixture.audit] == [u.name for u in mixture.units]


def test_a_hub_data_set_is_not_decoded(tmp_path, qwen, monkeypatch):
    import datasets

    rows = questions(
        6, lambda c: {"images": [{"bytes": noise(30, 30, len(c), "JPEG") if c == "red" else picture(c), "path": None}]}
    )
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(rows, features=features))
    first = build(tmp_path, qwen, {"path": "org/pictures"})
    [unit] = first.units
    kept = load_unit(tmp_path / "out" / unit.file, "train")
    assert read_image(kept.images_of([0])[0][0]) == rows[0]["images"][0]["bytes"]  # a JPEG stays the JPEG it was
    assert build(tmp_path, qwen, {"path": "org/pictures"}, out="again").made_from == first.made_from


def test_paths_in_a_hub_data_set_need_a_folder(tmp_path, qwen, monkeypatch):
    import datasets

    put_colours(tmp_path / "mine")
    rows = questions(6, lambda c: {"image": f"img/{c}.png" if c != "red" else "/etc/hostname"})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(rows))
    with pytest.raises(MixtureError, match=r"missing_image: .*set the source's `images`"):
        build(tmp_path, qwen, {"path": "org/pictures"})
    with pytest.raises(MixtureError, match=r"outside of .*mine: pictures:1: /etc/hostname; pictures:5"):
        build(tmp_path, qwen, {"path": "org/pictures", "images": tmp_path / "mine"})


# ---- memory -----------------------------------------------------------------------------------------------------------


def test_embedded_images_do_not_stay_in_memory(tmp_path, qwen):
    draw = np.random.default_rng(0)
    blobs = [draw.bytes(500_000) for _ in range(80)]
    rows = [{"prompt": f"{i}", "completion": "ok", "image": {"bytes": blobs[i % 80], "path": None}} for i in range(100)]
    (tmp_path / "u.parquet").write_bytes(parquet(rows, image=BINARY))
    write(
        tmp_path / "v.jsonl",
        [
            {"prompt": f"{i}", "completion": "ok", "image": "data:image/png;base64," + base64.b64encode(b).decode()}
            for i, b in enumerate(blobs)
        ],
    )
    del rows
    source = Source(path=str(tmp_path))
    pictures = Pictures(tmp_path, None)
    tracemalloc.start()
    units, _ = read_source(
        locate(str(tmp_path), source, "train", tmp_path),
        source,
        "s",
        form="auto",
        split_of=lambda _: "train",
        pictures=pictures,
    )
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25e6 and now < 5e6, (now, peak)
    assert [len(units[n].train) for n in "uv"] == [100, 80]
    assert os.fstat(pictures._spool.fileno()).st_size == 40_000_000  # each once
    assert all(
        pictures.read(row.images[0]) == blobs[i % 80] for i, row in enumerate(units["u"].train[::7] and units["u"].train[:9])
    )
    pictures.close()
