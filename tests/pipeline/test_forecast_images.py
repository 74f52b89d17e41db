"""What --dry-run says of a mixture with images on a tiny model, against sums written out by hand."""

import json
import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from anabranch import forecast as module
from anabranch.errors import PlanError, RecipeError
from anabranch.families import skeleton
from anabranch.forecast import forecast
from anabranch.model import load_tokenizer
from anabranch.recipe import SplitSection, load_recipe
from anabranch.run import mixture_stage, open_run, run_stages
from anabranch.training_cost import memory, size_of
from anabranch.vision import load_vision
from vision_models import write_vision_model

IMAGE_TOKENS = 16  # of a 56-pixel LLaVA with patches of 14, whatever the picture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny LLaVA, and 40 rows that show one picture or three."""
    folder = tmp_path_factory.mktemp("forecast")
    write_vision_model(folder / "base", "llava")
    (folder / "img").mkdir()
    for i in range(4):
        Image.new("RGB", (60, 50), (60 * i, 9, 9)).save(folder / "img" / f"{i}.png")
        os.utime(folder / "img" / f"{i}.png", (1e9, 1e9))  # what was written a moment ago is not remembered
    rows = [{"messages": [{"role": "user", "content": "<image>" * (3 if i == 7 else 1) + f" which {i}"},
                          {"role": "assistant", "content": "red"}],
             "images": ["0.png", "1.png", "2.png"] if i == 7 else [f"{i % 4}.png"], "u": "ab"[i % 2]} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def told(place, **changes):
    recipe = {"model": {"path": str(place / "base"), "freeze": ["vision tower", "projector"]},
              "mixture": {"held_out": 0, "sources": [{"path": str(place / "rows.jsonl"), "images": str(place / "img"),
                                                      "unit_column": "u"}]},
              "evaluate": {"retention": "none"}, "split": {"groups": 2}, "output": str(place / "out")}
    for section, value in changes.items():
        recipe[section] = {**recipe[section], **value} if isinstance(recipe.get(section), dict) else value
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return "\n".join(forecast(load_recipe(place / "recipe.yaml")))


def number(text, pattern):
    return float(re.search(pattern, text)[1].replace(",", ""))


def parts(place):
    """Parameters of tower, projector and language model, counted by name."""
    counts = [0, 0, 0]
    for name, p in skeleton(place / "base", False).named_parameters():
        counts[0 if "vision_tower" in name else 1 if "projector" in name else 2] += p.numel()
    return counts


def test_operations_of_a_frozen_tower(place):
    text = told(place)
    tower, projector, language = parts(place)
    tokens, images = number(text, r"samples, ([\d,]+) tokens"), number(text, r"\(([\d,]+) of images")
    assert images == IMAGE_TOKENS * 42
    work = 6 * language * tokens + 2 * (tower + projector) * images
    assert f"work       {work:.2e} operations in all branches; {language:,} parameters train" in text
    assert f"tokens, {work:.1e} operations" in text  # the gradients of every row are the same passes
    assert "freeze     vision tower (llava: model.vision_tower.*)" in text


def test_adapters(place):
    """No weight of the model trains, so none is said to; the sketch still takes the gradients of weights."""
    text = told(place, model={"lora": {"r": 4}})
    tower, projector, language = parts(place)
    tokens, images = number(text, r"samples, ([\d,]+) tokens"), number(text, r"\(([\d,]+) of images")
    frozen = 2 * (tower + projector) * images
    assert f"{4 * language * tokens + frozen:.2e} operations in all branches; adapters train" in text
    assert "parameters train" not in text and f"tokens, {6 * language * tokens + frozen:.1e} operations" in text


@pytest.mark.parametrize("split, steps", [({"method": "merit"}, "2 branches, 1 at a time, 8 rows a step, about 3 steps each"),
                                          ({"method": "soup"}, "2 branches, 1 at a time, 8 rows a step, about 3 steps each"),
                                          ({"method": "joint"}, "1 branch, 1 at a time, 8 rows a step, about 5 steps each"),
                                          ({"capacities": [3, 1]}, "8 rows a step, about 2 to 4 steps;")])
def test_steps(place, split, steps):
    """40 rows: halves, or 30 and 10 by capacity."""
    assert steps in told(place, split=split)


def test_hours_of_unequal_branches(place, monkeypatch):
    monkeypatch.setattr(module, "device_lines", lambda work, *_, **__: [repr(sum(work)), repr([w / sum(work) for w in work])])
    assert "[0.75, 0.25]" in told(place, split={"capacities": [3, 1]})


def test_a_row_of_several_images_is_what_memory_must_hold(place, monkeypatch):
    seen = {}
    monkeypatch.setattr(module, "memory", lambda *a, **k: seen.update(k) or memory(*a, **k))
    told(place)
    assert seen["row_image_tokens"] == 3 * IMAGE_TOKENS
    size = size_of(skeleton(place / "base", False), load_recipe(place / "recipe.yaml").model)
    one, three = (memory(size, rows=1, row_tokens=60, row_image_tokens=IMAGE_TOKENS * k, bfloat16=False, recompute=False).total
                  for k in (1, 3))
    assert three > one


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, "SIGTERM"])
def test_a_dry_run_that_is_stopped_leaves_nothing(place, tmp_path, monkeypatch, stop):
    """Its folder may hold gigabytes of images."""
    def half_done(recipe, tokenizer, out: Path, **_):
        (out / "images").write_bytes(b"half")
        assert list(tmp_path.iterdir())
        if stop != "SIGTERM":
            raise stop
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(module, "build_mixture", half_done)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a test that fails must not end the suite
    try:
        with pytest.raises((SystemExit, RuntimeError, KeyboardInterrupt)) as ended:
            told(place)
        assert stop != "SIGTERM" or ended.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("tmp")] and not (place / "out").exists()


def test_the_images_of_one_unit_lie_there_at_a_time(place, tmp_path, monkeypatch):
    """Of a mixture's gigabytes; the size that is told is that of all of them."""
    text = told(place)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe, lying, base = load_recipe(place / "recipe.yaml"), [], place / "base"
    kept = module.build_mixture(recipe, load_tokenizer(base), tmp_path / "kept", vision=load_vision(base), base_hash="dry run")
    assert len(list(tmp_path.rglob("*.images.safetensors"))) == len(kept.units) == 2
    size = sum(path.stat().st_size for path in (tmp_path / "kept").rglob("*") if path.is_file())
    shutil.rmtree(tmp_path / "kept")
    again = forecast(recipe, progress=lambda *_: lying.append(len(list(tmp_path.rglob("*.images.safetensors")))))
    assert lying == [0, 0, 0, 0] and "\n".join(again) == text
    assert module._dry_mixture(recipe, place / "base", lambda *_: None).size == size


def test_what_is_left_out_is_told_with_its_first_row(place):
    with (place / "rows.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    rows += [{**row, "images": ["gone.png"] * len(row["images"])} for row in rows[:3]]
    (place / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(place / "some.jsonl"), "images": str(place / "img"), "unit_column": "u"}
    text = told(place, mixture={"sources": [source]})
    assert "left out by rule missing_image: 3 rows of a, b\n" in text
    assert "  a: 2 rows, such as some.jsonl:41: " in text and "  b: 1 row, such as some.jsonl:42: " in text


GONE = "unit b is left out whole: 5 of 5 rows missing_image, such as lost.jsonl:6: img/none5.png: No such file or directory"


@pytest.fixture
def lost(place):
    """Five usable rows of unit a, and five of unit b whose images are not there."""
    path = place / "lost.jsonl"
    rows = [{"prompt": f"<image>{i}", "completion": "ok", "u": "ab"[i // 5], "id": i, "source": "x",
             "image": f"{i % 4}.png" if i < 5 else f"none{i}.png"} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(path), "images": str(place / "img"), "unit_column": "u"}


def test_a_unit_that_vanishes_is_warned_of_before_the_totals(place, lost):
    text = told(place, mixture={"sources": [lost]}, split={"groups": 1}).splitlines()
    warned, total = (next(i for i, line in enumerate(text) if line.startswith(word)) for word in ("warning: ", "mixture "))
    assert text[warned] == f"warning: {GONE}" and warned < total and "too few rows" not in "\n".join(text)


def test_a_unit_that_vanishes_is_told_why_where_groups_are_too_many(place, lost):
    with pytest.raises(PlanError, match=r"the mixture has 1 unit:(.|\n)*What was left out(.|\n)*" + GONE):
        told(place, mixture={"sources": [lost]})
    run = open_run(load_recipe(place / "recipe.yaml").model_copy(update={"split": SplitSection(groups=2)}), tell=lambda _: None)
    with pytest.raises(PlanError, match=r"the mixture has 1 unit:(.|\n)*What was left out(.|\n)*missing_image(.|\n)*none5"):
        run_stages(run, until="split")


def test_the_run_tells_of_a_unit_that_vanishes(place, lost, tmp_path):
    told(place, mixture={"sources": [lost]}, split={"groups": 1}, output=str(tmp_path / "out"))
    said: list[str] = []
    mixture_stage(open_run(load_recipe(place / "recipe.yaml"), tell=said.append))
    [line] = [line for line in said if "unit b" in line]
    assert "whole: 5 of 5 rows missing_image, such as " in line and "lost.jsonl:6: " in line


def test_a_table_by_unit_with_its_format(place, lost):
    """Also units that are gone; a source's own columns that nobody reads are named."""
    text = told(place, mixture={"sources": [lost]}, split={"groups": 1}).splitlines()
    start = next(i for i, line in enumerate(text) if re.fullmatch(" +unit +format +rows +tokens +images +left out", line))
    gone, kept = (line.split() for line in text[start + 1:start + 3])
    assert gone == ["b", "prompt_completion", "0", "0", "0", "5"]
    assert kept[:3] == ["a", "prompt_completion", "5"] and kept[4:] == ["5", "0"]
    assert int(kept[3]) == number("\n".join(text), r"samples, ([\d,]+) tokens")
    assert "columns    lost.jsonl: columns not used: id, source" in text


def test_a_table_of_many_units_is_cut(place):
    path = place / "many.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": "ok", "u": f"unit {i % 23:02}"}) for i in range(46)))
    text = told(place, mixture={"sources": [{"path": str(path), "unit_column": "u"}]})
    assert "unit 19" in text and "unit 20" not in text and "           and 3 more units\n" in text
    assert re.search(r"unit +format +rows +tokens +left out\n", text) and "columns not used" not in text


def test_every_reason_has_its_row(place):
    """Numbers and names differ in one and the same reason; no reason hides behind a commoner one."""
    shown = [*(f"gone_{c}.png" for c in "abcde"), "http://x.org/a.png", 7, 3.5, {"a": 1}, "0.png", "1.png"]
    rows = [{"prompt": f"<image>{i}", "completion": "ok", "image": image} for i, image in enumerate(shown)]
    rows += [{"prompt": "<image>" * n, "completion": "ok", "image": "0.png"} for n in (3, 4)]
    (place / "why.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(place / "why.jsonl"), "images": str(place / "img")}
    text = told(place, mixture={"sources": [source]}, split={"groups": 1})
    block = text[text.index("left out by rule missing_image: 6 rows of why\n"):].splitlines()
    assert block[1].strip() == "why: 5 rows, such as why.jsonl:1: img/gone_a.png: No such file or directory"
    assert block[2].strip() == "why: 1 row, such as why.jsonl:6: not downloaded: http://x.org/a.png"
    bad = text[text.index("left out by rule malformed: 5 rows of why\n"):].splitlines()
    assert bad[1].strip() == "why: 2 rows, such as why.jsonl:12: 3 places for images in its messages, and 1 image"
    assert ["why.jsonl:7: " in bad[2], "why.jsonl:8: " in bad[3], "why.jsonl:9: " in bad[4]] == [True] * 3


def test_reasons_beyond_six_are_counted(place):
    rows = [{"prompt": "<image>", "completion": "ok", "u": "abcdefgh"[i // 3], "image": "0.png" if i % 3 else "no.png"}
            for i in range(24)]
    (place / "eight.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(place / "eight.jsonl"), "images": str(place / "img"), "unit_column": "u"}
    text = told(place, mixture={"sources": [source]})
    assert "left out by rule missing_image: 8 rows of a, b, c, d and 4 more units\n" in text
    assert "f: 1 row, such as" in text and "g: 1 row" not in text and "and 2 more reasons\n" in text
    rows = [row for row in rows if row["u"] in "abcde"]
    (place / "eight.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "5 rows of a, b, c, d and 1 more unit\n" in told(place, mixture={"sources": [source]})


def test_too_few_rows_are_worded(place):
    rows = [{"prompt": f"{i}", "completion": "" if u in "nN" else "ok", "u": u.lower()} for i, u in enumerate("nnNompp")]
    (place / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = told(place, mixture={"sources": [{"path": str(place / "few.jsonl"), "unit_column": "u"}]}, split={"groups": 1})
    assert ("left out whole, as too few rows are usable: m (1 training row, min_samples is 2), n (no row is usable), "
            "o (1 training row, min_samples is 2)\n") in text and " 0 rows" not in text


def test_every_problem_comes_in_one_message(place, tmp_path):
    """The recipe's, those of places, those of files, and those of rows."""
    (tmp_path / "a.zip").write_bytes(b"no zip")
    (tmp_path / "b.zip").write_bytes(b"nor this")
    sources = [{"path": str(tmp_path / "*.parquet")}, {"path": str(tmp_path / "*.zip"), "images": str(tmp_path / "nowhere")},
               {"path": str(place / "rows.jsonl"), "unit_column": "u"}, {"path": "lacking.jsonl"}]
    with pytest.raises(RecipeError) as caught:
        told(place, mixture={"sources": sources}, train={"learning_rat": 1}, model={"freeze": ["the tower"]})
    said = str(caught.value)
    assert said.count("no such") == 2  # the trainer's argument, and one of a file
    for word in ("freeze", "the tower", "Did you mean `learning_rate`?",
                 "mixture.sources[0]: ", "*.parquet: no file matches", "nowhere is neither",
                 "a.zip: not a readable zip", "b.zip: not a readable zip", "lacking.jsonl: no such file",
                 "mixture.sources[2] (rows.jsonl): none of its 40 rows is usable, 40 missing_image: rows.jsonl:1: 0.png"):
        assert word in said, word


def test_what_would_be_downloaded_does_not_hide_what_is_missing(place):
    with pytest.raises(RecipeError, match=r"no such data: .*lacking\.jsonl"):
        told(place, mixture={"sources": [{"path": "org/pictures"}, {"path": str(place / "lacking.jsonl")}]})


def test_a_long_unit_tells_of_its_rows(place):
    path, said = place / "long.jsonl", []
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": "ok"}) for i in range(600)))
    told(place, mixture={"sources": [{"path": str(path)}]}, split={"groups": 1})
    forecast(load_recipe(place / "recipe.yaml"), progress=lambda *a: said.append(a))
    assert said == [("mixture", what, 0, 1) for what in ("reading long.jsonl", "long", "long (row 256 of 600)",
                                                         "long (row 512 of 600)")] + [("mixture", "", 1, 1)]


def test_a_trainable_pattern_that_matches_nothing_is_found(place):
    with pytest.raises(RecipeError, match=r"model\.trainable: no parameter matches nothing\*"):
        told(place, model={"freeze": [], "trainable": ["nothing*"]})


def test_a_cap_that_spares_nothing_says_so(place):
    text = told(place, mixture={"images": {"max_pixels": "40x40"}})
    assert "are scaled down to 1,600 pixels, which spares no token: this model brings images to sizes of its own" in text


@pytest.mark.parametrize("cap", ["784x", "abc", [784, 784], True])
def test_what_a_cap_may_be(place, cap):
    with pytest.raises(RecipeError, match=r"max_pixels: .*wanted a number of pixels, WIDTHxHEIGHT as in 784x784, or null"):
        told(place, mixture={"images": {"max_pixels": cap}})


@pytest.mark.parametrize(("cap", "word"), [
    (64, r"a number is an area .*at least 784 \(28x28\) is wanted; sides are written 64x64, which is 4,096"),
    (9, r"at least 784 \(28x28\) is wanted \(got 9\)"), ("20x20", r"400 pixels; at least 784 \(28x28\) are wanted")])
def test_a_cap_too_small_is_told_for_what_it_is(place, cap, word):
    with pytest.raises(RecipeError, match=word):
        told(place, mixture={"images": {"max_pixels": cap}})
    assert "samples" in told(place, mixture={"images": {"max_pixels": 784}})


def test_freeze_is_a_list(place):
    with pytest.raises(RecipeError, match=r"model\.freeze: .*wanted a list, as in \[vision tower\]"):
        told(place, model={"freeze": "vision tower"})
