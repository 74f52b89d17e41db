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
from anabranch.run import open_run, run_stages
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
                                          ({"method": "joint"}, "1 branches, 1 at a time, 8 rows a step, about 5 steps each"),
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
    assert lying == [0, 0, 0] and "\n".join(again) == text
    assert module._dry_mixture(recipe, place / "base", lambda *_: None).size == size


def test_what_is_left_out_is_told_with_its_first_row(place):
    with (place / "rows.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    rows += [{**row, "images": ["gone.png"] * len(row["images"])} for row in rows[:3]]
    (place / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(place / "some.jsonl"), "images": str(place / "img"), "unit_column": "u"}
    text = told(place, mixture={"sources": [source]})
    assert "left out by rule missing_image: 3 rows of a, b, such as some.jsonl:41: " in text and "gone.png" in text


def test_a_unit_that_vanishes_is_told_why_where_groups_are_too_many(place):
    (place / "only").mkdir(exist_ok=True)
    source = {"path": str(place / "rows.jsonl"), "images": str(place / "only"), "unit_column": "u"}
    text = str(place / "plain.jsonl")
    Path(text).write_text("\n".join(json.dumps({"prompt": f"{i}", "completion": "ok"}) for i in range(5)))
    told(place, mixture={"sources": [source, {"path": text}]}, split={"groups": 1})
    run = open_run(load_recipe(place / "recipe.yaml").model_copy(update={"split": SplitSection(groups=2)}), tell=lambda _: None)
    with pytest.raises(PlanError, match=r"the mixture has 1 units(.|\n)*What was left out(.|\n)*missing_image(.|\n)*0\.png"):
        run_stages(run, until="split")


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


def test_freeze_is_a_list(place):
    with pytest.raises(RecipeError, match=r"model\.freeze: .*wanted a list, as in \[vision tower\]"):
        told(place, model={"freeze": "vision tower"})
