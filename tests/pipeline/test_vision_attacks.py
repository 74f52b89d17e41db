"""Rows, files and checkpoints that were made to break the mixture of images, and what is easily mistaken for unchanged."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vision_sources import (
    build,
    colours,
    encoded_as,
    left_out,
    noise,
    picture,
    picture_of_noise,
    put,
    put_colours,
    questions,
    texts,
    write,
    zip_of,
)

from anabranch import mixture as stage
from anabranch.artifacts import digest
from anabranch.errors import MixtureError, ModelError
from anabranch.images import open_image
from anabranch.pictures import SEEN, Pictures
from anabranch.rows import load_unit
from anabranch.templates import choose_template, encode_rows
from anabranch.vision import is_vision_language, load_vision
from vision_models import FAMILIES, LLAVA_PUBLISHED, write_vision_model

OK = {"prompt": "<image> x", "completion": "ok", "image": "img/red.png"}
LONG_AGO = (1_700_000_000, 1_700_000_000)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_vision(write_vision_model(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_vision(write_vision_model(tmp_path_factory.mktemp("llava"), "llava"))


# ---- labels -----------------------------------------------------------------------------------------------------------


def trained(tokenizer: Any, messages: list[tuple[str, str]], vision: Any = None, template: str = "auto") -> str:
    chosen = choose_template(template, tokenizer, vision)
    (row,) = encode_rows(chosen, tokenizer, [[{"role": r, "content": c} for r, c in messages]])
    assert not isinstance(row, str), row
    return str(tokenizer.decode(row.input_ids[row.response == 1]))


def test_an_answer_that_ends_in_a_special_token_still_learns_to_end_its_turn(tmp_path):
    """As the markers of LLaVA's template leave the end of turn out, the answer's own token must not be taken for it."""
    vision = load_vision(write_vision_model(tmp_path, "llava", template=LLAVA_PUBLISHED))
    said = trained(vision.tokenizer, [("user", "a"), ("assistant", "b<|endoftext|>")], vision)
    assert said == "b<|endoftext|><|im_end|>"
    said = trained(vision.tokenizer, [("user", "a"), ("assistant", "<|im_end|>")], vision)
    assert said == "<|im_end|><|im_end|>"


NEXT_TURN = ("{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% for c in m['content'] %}"
             "{% if c['type'] == 'image' %}<image>{% elif m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}"
             "{% endgeneration %}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}<|endoftext|>")


def test_a_token_that_begins_the_next_turn_is_not_the_end_of_this_one(tmp_path):
    """Markers without the end, and what stands behind is <|im_start|> between turns and <|endoftext|> at last."""
    vision = load_vision(write_vision_model(tmp_path, "llava", template=NEXT_TURN))
    assert trained(vision.tokenizer, [("user", "a"), ("assistant", "b")], vision) == "b<|endoftext|>"
    with pytest.raises(MixtureError, match="end-of-turn"):
        trained(vision.tokenizer, [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")], vision)


TIGHT = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
         "{% elif m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}<end_of_utterance>{% endgeneration %}"
         "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}")


def test_a_token_of_an_image_s_frame_and_of_an_answer_at_once_is_not_trained(tmp_path):
    """Idefics3's frames end in a line break, and this tokenizer has a token of two."""
    vision = load_vision(write_vision_model(tmp_path, "idefics3", template=TIGHT))
    tokenizer = vision.tokenizer
    assert len(tokenizer.encode("\n\n", add_special_tokens=False)) == 1
    messages = [{"role": r, "content": c} for r, c in (("user", "a\ufffc"), ("assistant", "\n<|end_of_text|>b"),
                                                       ("user", "\ufffc\ufffc"), ("assistant", "c"))]
    (row,) = encode_rows(choose_template("auto", tokenizer, vision), tokenizer, [messages], [["<image><image>\n"] * 3])
    assert not isinstance(row, str)
    assert tokenizer.decode(row.input_ids[row.response == 1]) == "<|end_of_text|>b<end_of_utterance>c<end_of_utterance>"
    assert [tokenizer.decode(row.input_ids[a:b]) for a, b in row.shown] == ["<image><image>\n\n", *["<image><image>\n"] * 2]


@pytest.mark.parametrize(
    ("text", "seen"),
    [("What is\n<image>\nthis?", "<image>\nWhat is\nthis?"), ("<image>\nWhat?", "<image>\nWhat?"),
     ("What?\n<image>", "<image>\nWhat?"), ("<image>\n<image>\nWhat?", "<image>\n<image>\nWhat?"),
     ("a\n\n<image>\n\nb", "<image>\na\n\n\nb")],
)
def test_one_line_break_is_the_marker_s_and_words_are_not_glued(tmp_path, llava, text, seen):
    put_colours(tmp_path)
    images = ["img/red.png"] * text.count("<image>")
    mixture = build(tmp_path, llava, {"path": write(tmp_path / "u.jsonl", [OK | {"prompt": text, "image": images}] * 2)})
    assert f"<|im_start|>user\n{seen}<|im_end|>" in texts(llava, tmp_path / "out", mixture.units[0])[0]


def test_the_character_that_stands_for_images_is_named_where_no_image_is_shown(tmp_path, qwen):
    put_colours(tmp_path)
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [OK, OK, {"prompt": "a \ufffc", "completion": "b"}])})
    assert "U+FFFC" in left_out(mixture)["malformed"]


# ---- rows and files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_zip", [False, True])
@pytest.mark.parametrize("name", ["\udcff.png", "\ud800.png", "a\0b.png", "A" * 300_000, "img/" * 2000 + "x"])
def test_names_that_no_file_can_have(tmp_path, qwen, name, in_zip):
    put_colours(tmp_path)
    more = {"images": str(zip_of(tmp_path / "i.zip", img__red_png=picture("red")))} if in_zip else {}
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [OK, OK, OK | {"image": name}])} | more)
    why = left_out(mixture)["missing_image"]
    assert len(why) < 400 and why.startswith("u.jsonl:3: ") and str(tmp_path) not in why


def test_a_name_on_disk_that_is_no_text(tmp_path, qwen):
    put_colours(tmp_path)
    try:
        (tmp_path / "img" / os.fsdecode(b"\xff.png")).write_bytes(picture("red"))
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    (tmp_path / "img" / "link.png").symlink_to(os.fsdecode(b"\xff.png"))
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [OK, OK, OK | {"image": "img/link.png"}])})
    assert "is no text" in left_out(mixture)["missing_image"]


@pytest.mark.parametrize("form", ["jsonl", "json"])
@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "1" * 5000])
def test_json_that_python_cannot_read(tmp_path, qwen, form, value):
    put_colours(tmp_path)
    row = f'{{"prompt": "a", "completion": "b", "x": {value}}}'
    path = tmp_path / f"u.{form}"
    path.write_text(row if form == "jsonl" else f"[{row}]")
    with pytest.raises(MixtureError, match=r"u\.json.*not JSON"):
        build(tmp_path, qwen, {"path": path})


def test_lists_in_lists_in_lists(tmp_path, qwen):
    put_colours(tmp_path)
    deep = "[" * 600 + "]" * 600
    path = tmp_path / "u.jsonl"
    write(path, [OK, OK])
    with path.open("a") as file:
        file.write(f'{{"prompt": "a", "completion": "b", "image": {deep}}}\n')
        file.write(f'{{"prompt": "c", "completion": "d", "x": {deep}}}\n')
    mixture = build(tmp_path, qwen, {"path": path})
    assert "an image is list" in left_out(mixture)["malformed"] and mixture.units[0].rows == 3


@pytest.mark.parametrize("what", ["name", "version"])
@pytest.mark.parametrize("of", ["images", "rows"])
def test_a_zip_that_only_looks_like_one(tmp_path, qwen, what, of):
    put_colours(tmp_path)
    rows = write(tmp_path / "u.jsonl", [OK, OK])
    inside = {"img__red_png": picture("red")} if of == "images" else {"u_jsonl": rows.read_bytes()}
    path = zip_of(tmp_path / "x.zip", **inside)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2")
    if what == "name":  # said to be UTF-8
        data[at + 8 : at + 10], data[at + 46] = b"\0\x08", 0xFF
    else:
        data[at + 6 : at + 8] = b"\x63\0"
    path.write_bytes(data)
    with pytest.raises(MixtureError, match=r"x\.zip: not a readable zip"):
        build(tmp_path, qwen, {"path": rows, "images": str(path)} if of == "images" else {"path": path})


def test_no_folder_of_this_machine_stands_in_the_table(tmp_path, qwen):
    path = zip_of(tmp_path / "i.zip", img__red_png=picture("red"), img__cut_png=picture("red"))
    data = bytearray(path.read_bytes())
    data[data.index(b"img/cut.png") + 15] ^= 0xFF
    path.write_bytes(data)
    rows = [OK, OK, OK | {"image": "img/gone.png"}, OK | {"image": "img/cut.png"}]
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", rows), "images": str(path)})
    found = left_out(mixture)
    assert "i.zip has no member" in found["missing_image"] and "in i.zip" in found["broken_image"]
    assert str(tmp_path) not in (tmp_path / "out" / "mixture.json").read_text()


@pytest.mark.parametrize("sides", [(1, 30_000), (30_000, 1), (1, 201)])
def test_a_strip_that_processors_would_blow_up_is_left_out(tmp_path, llava, sides):
    """LLaVA's scales the short side to 336: a strip of 30 kB would be gigabytes."""
    put_colours(tmp_path)
    Image.new("RGB", sides).save(tmp_path / "img" / "strip.png")
    Image.new("RGB", (1, 200)).save(tmp_path / "img" / "edge.png")
    rows = [OK, OK | {"image": "img/edge.png"}, OK | {"image": "img/strip.png"}]
    mixture = build(tmp_path, llava, {"path": write(tmp_path / "u.jsonl", rows)})
    assert "aspect ratio" in left_out(mixture)["broken_image"] and mixture.units[0].rows == 2


# ---- warnings ---------------------------------------------------------------------------------------------------------


def test_odd_files_say_nothing_between_the_lines_of_progress(capfd):
    odd = encoded_as(picture_of_noise(30, 20), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    seen_through = encoded_as(picture_of_noise(12, 10).quantize(16), "PNG", transparency=b"\1\2\3")
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(open_image, [odd, seen_through] * 100))
    assert not caught and warnings.filters == before and capfd.readouterr() == ("", "")


def test_many_images_are_no_text_that_is_too_long(tmp_path, qwen, caplog, monkeypatch):
    monkeypatch.setattr(qwen.tokenizer, "model_max_length", 5)
    monkeypatch.setattr(qwen.tokenizer, "deprecation_warnings", {})
    put_colours(tmp_path)
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [OK, OK])})
    qwen.stored_inputs(load_unit(tmp_path / "out" / mixture.units[0].file, "train").images_of([0, 1]))
    assert "longer than" not in caplog.text


# ---- what changed, and what did not -------------------------------------------------------------------------------------


def again(tmp_path: Path, vision: Any, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
          **options: Any) -> tuple[Any, set[str]]:
    """The mixture, and the units that were made anew."""
    encoded: set[str] = set()
    encode = stage._Making.encode
    with monkeypatch.context() as patch:
        patch.setattr(stage._Making, "encode", lambda self, rows, unit: (encoded.add(unit), encode(self, rows, unit))[1])
        return build(tmp_path, vision, source, **options), encoded


@pytest.mark.parametrize("link", ["of an image", "of its folder", "of the root", "of the rows' folder"])
def test_a_link_that_leads_elsewhere_is_noticed(tmp_path, qwen, monkeypatch, link):
    for version, colour in (("v1", "red"), ("v2", "blue")):
        put(tmp_path, **{f"all__{version}__img__red_png": picture(colour)})
        write(tmp_path / "all" / version / "u.jsonl", [OK, OK])
    rows = write(tmp_path / "all" / "u.jsonl", [OK | {"image": "img/red.png"}] * 2)
    at, first, second, source = {
        "of an image": (tmp_path / "all/img/red.png", "../v1/img/red.png", "../v2/img/red.png", {"path": rows}),
        "of its folder": (tmp_path / "all/img", "v1/img", "v2/img", {"path": rows}),
        "of the root": (tmp_path / "now", "all/v1", "all/v2", {"path": rows, "images": str(tmp_path / "now")}),
        "of the rows' folder": (tmp_path / "now", "all/v1", "all/v2", {"path": tmp_path / "now" / "u.jsonl"}),
    }[link]
    at.parent.mkdir(exist_ok=True)
    at.symlink_to(first)
    one, _ = again(tmp_path, qwen, source, monkeypatch)
    assert colours(tmp_path / "out", one.units[0]) == [["red"]] * 2
    at.unlink()
    at.symlink_to(second)
    two, encoded = again(tmp_path, qwen, source, monkeypatch)
    assert colours(tmp_path / "out", two.units[0]) == [["blue"]] * 2 and encoded == {"u"}
    assert again(tmp_path, qwen, source, monkeypatch)[1] == set()


@pytest.mark.parametrize("how", ["copied over", "moved over"])
def test_another_image_of_the_same_size_and_time_is_noticed(tmp_path, qwen, monkeypatch, how):
    """As `cp -p` and unpacking write them."""
    place, other = tmp_path / "img" / "red.png", tmp_path / "other.png"
    put(tmp_path, img__red_png=picture("red"), other_png=picture("blue"))
    assert place.stat().st_size == other.stat().st_size
    for path in (place, other):
        os.utime(path, LONG_AGO)
    source = {"path": write(tmp_path / "u.jsonl", [OK, OK])}
    again(tmp_path, qwen, source, monkeypatch)
    (shutil.copy2 if how == "copied over" else shutil.move)(str(other), str(place))
    assert place.stat().st_mtime == LONG_AGO[1]
    two, encoded = again(tmp_path, qwen, source, monkeypatch)
    assert colours(tmp_path / "out", two.units[0]) == [["blue"]] * 2 and encoded == {"u"}


def test_units_of_text_are_not_made_again_for_another_cap(tmp_path, qwen, monkeypatch):
    put(tmp_path, img__red_png=picture("red", 280, 280))
    write(tmp_path / "shown.jsonl", [OK, OK])
    write(tmp_path / "told.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    source = {"path": tmp_path / "*.jsonl"}
    one, encoded = again(tmp_path, qwen, source, monkeypatch, images={"max_pixels": 112 * 112})
    assert encoded == {"shown", "told"}
    two, encoded = again(tmp_path, qwen, source, monkeypatch, images={"max_pixels": 140 * 140})
    assert encoded == {"shown"} and one.unit("told") == two.unit("told")
    assert one.unit("shown").image_tokens == 2 * 16 and two.unit("shown").image_tokens == 2 * 25


POISON: dict[str, Any] = {
    "a hash that is none": {"files": {"img/red.png": [1, 1, 1, 1, "xyz"]}},
    "too few numbers": {"files": {"img/red.png": [1]}},
    "no list": {"files": {"img/red.png": None}},
    "sides of petapixels": {"sizes": {"00" * 32: [2**40, 2**40]}},
    "sides below nothing": {"sizes": {"00" * 32: [-5, 3]}},
    "one side": {"sizes": {"00" * 32: [3]}},
    "another rule": {"sizes": {"00" * 32: ["own_rule", "why"]}},
    "labels that are none": {"used": {"k": [1]}},
    "files of another kind": {"files": [1]},
}


@pytest.mark.parametrize("name", POISON)
def test_what_was_seen_is_held_to_its_form(tmp_path, qwen, name):
    put_colours(tmp_path)
    for path in (tmp_path / "img").iterdir():
        os.utime(path, LONG_AGO)
    source = {"path": write(tmp_path / "u.jsonl", questions(4, lambda c: {"image": f"img/{c}.png"}))}
    first = build(tmp_path, qwen, source)
    seen = tmp_path / "out" / SEEN
    content = json.loads(seen.read_text())
    content.pop("checksum")
    assert Pictures(tmp_path / "run", tmp_path / "out").sizes
    content |= POISON[name]
    seen.write_text(json.dumps(content | {"checksum": digest(content)}))
    empty = Pictures(tmp_path / "run", tmp_path / "out")
    assert (empty.sizes, empty._files, empty._used) == ({}, {}, {})
    assert build(tmp_path, qwen, source) == first


def test_pixels_in_memory_are_told_by_their_content(tmp_path, qwen):
    """A unit's file may be made again under its name while a model is loaded."""
    made = []
    for colour in ("red", "blue"):
        put(tmp_path, img__red_png=picture(colour))
        mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [OK, OK])})
        images = load_unit(tmp_path / "out" / mixture.units[0].file, "train").images_of([0])
        made.append(qwen.stored_inputs(images)["pixel_values"])
    assert made[0].shape == made[1].shape and not (made[0] == made[1]).all()


# ---- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_processor_foretells_is_what_it_does(tmp_path, family):
    """Sizes at random, beyond those that it is tried with; equal texts are kept once."""
    vision = load_vision(write_vision_model(tmp_path, family))
    draw = np.random.default_rng(7)
    sizes = [tuple(int(s) for s in np.exp(draw.uniform(np.log(5), np.log(900), 2))) for _ in range(40)]
    sizes = [s for s in sizes if max(s) < 199 * min(s)]
    assert vision._foretells == (family not in ("idefics3", "smolvlm"))
    for size in sizes:
        assert vision.text_of(*size) == vision._found_out(*size), size
        assert vision.tokens(*size) == len(vision.tokenizer.encode(vision.text_of(*size), add_special_tokens=False))
    assert len({id(t) for t in vision._texts.values()}) == len(set(vision._texts.values()))


def test_the_cap_is_that_of_qwen_s_own_smart_resize(qwen):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    draw = np.random.default_rng(3)
    for trial in range(4000):
        width, height = (int(2**x) for x in draw.uniform(2, 13, 2))
        cap = [784 * 784, 50_176, 200_000, 12_845_056][trial % 4]
        if trial % 100 != 1 and max(width, height) > 100 * min(width, height):
            continue  # scaled down in steps of 28 it may become a strip that the processor refuses
        if trial % 100 == 1:  # below half a factor on one side: it is scaled up, not down
            width, height = 2000 + trial // 50, 12 + trial // 100 % 2
        wanted = smart_resize(height, width, 28, 3136, cap)
        stored = qwen.capped(width, height, cap) or (width, height)
        assert smart_resize(stored[1], stored[0], 28, 3136, 12_845_056) == wanted, (width, height, cap)


@pytest.mark.parametrize(
    ("config", "is_one"),
    [({"architectures": None, "model_type": "qwen2_5_vl", "vision_config": {}}, True),
     ({"model_type": "llava", "vision_config": {}}, True),
     ({"model_type": "qwen2_5_vl_text"}, False),
     ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, True),
     ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, False),
     ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vision_config": {}}, False),
     ({"architectures": [{"a": 1}], "model_type": "llama"}, False),
     ({"architectures": "LlavaForConditionalGeneration", "model_type": "x"}, False),
     ({"model_type": ["llava"], "vision_config": {}}, False),
     ({}, False), ([], False)],
)
def test_which_models_see(tmp_path, config, is_one):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_vision_language(tmp_path) is is_one


def test_code_in_a_model_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    """transformers asks at the keyboard where it is not told: also when a processor is loaded without its video part."""
    folder = write_vision_model(tmp_path, "qwen2_5_vl")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "EvilImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModelError):
        load_vision(folder)
    assert not (tmp_path / "ran").exists()


def test_another_image_processor_of_the_same_settings_is_another_hash(qwen):
    from types import SimpleNamespace

    from anabranch.vision import Vision

    class Other(type(qwen.processor.image_processor)):  # type: ignore[misc] - of an instance
        pass

    other = SimpleNamespace(image_processor=Other(**{"size": qwen.processor.image_processor.size}))
    assert Vision(other, "x", 1).hash != Vision(SimpleNamespace(image_processor=type(qwen.processor.image_processor)(
        size=qwen.processor.image_processor.size)), "x", 1).hash


def test_two_thousand_rows(tmp_path, qwen):
    """Thrice the rows take no more than some thrice the time, and again is quick."""
    import time

    put(tmp_path, **{f"img__{i}_png": noise(30 + i % 40, 40, i) for i in range(200)})
    took = []
    for count in (600, 1800):
        rows = [{"prompt": f"<image>{i}", "completion": "ok", "image": f"img/{i % 200}.png"} for i in range(count)]
        source = {"path": write(tmp_path / f"{count}.jsonl", rows)}
        start = time.perf_counter()
        first = build(tmp_path, qwen, source, out=str(count))
        took.append(time.perf_counter() - start)
        start = time.perf_counter()
        assert build(tmp_path, qwen, source, out=str(count)) == first
        assert time.perf_counter() - start < took[-1]
    assert took[1] < 8 * took[0] + 1


def test_a_row_that_its_own_processor_writes_otherwise_is_refused(qwen):
    text, image = f"a{qwen.placeholder}b", Image.new("RGB", (56, 56))
    ids = np.array(qwen.tokenizer.encode(text.replace(qwen.placeholder, qwen.text_of(56, 56)), add_special_tokens=False))
    qwen.check(text, [image], ids)
    with pytest.raises(ModelError, match="other tokens"):
        qwen.check(text, [image], ids[:-1])


def test_another_processor_makes_units_with_images_again(tmp_path, qwen, monkeypatch):
    put_colours(tmp_path)
    source = {"path": write(tmp_path / "u.jsonl", [OK, OK])}
    again(tmp_path, qwen, source, monkeypatch)
    monkeypatch.setitem(vars(qwen), "hash", "of other settings")
    assert again(tmp_path, qwen, source, monkeypatch)[1] == {"u"}


def test_tokens_that_stand_for_images_are_refused_in_text_beside_an_image_too(tmp_path, qwen, monkeypatch):
    """As Gemma's, whose placeholder is another token than its images become."""
    put_colours(tmp_path)
    strange = "<|vision_pad|>"
    ids = frozenset([qwen.placeholder_id, qwen.tokenizer.convert_tokens_to_ids(strange)])
    monkeypatch.setattr(type(qwen), "image_ids", property(lambda self: ids))
    mixture = build(tmp_path, qwen, {"path": write(tmp_path / "u.jsonl", [OK, OK, OK | {"prompt": f"<image> {strange}"}])})
    assert strange in left_out(mixture)["malformed"]
