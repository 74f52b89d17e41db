"""examples/vision: the paper's recipe, the stand-in for its model and data, and a dry run of them checked by other sums."""

import importlib.util
import json
import math
import re
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from anabranch import cli
from anabranch.engine.checkpoint import Checkpoint
from anabranch.families import saved_names, skeleton
from anabranch.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision"
LANGUAGE, TOWER, PROJECTOR = 3_085_938_688, 631_975_680, 36_708_608
WHOLE = 3_754_622_976  # of Qwen/Qwen2.5-VL-3B-Instruct: its index gives 7,509,245,952 bytes in bfloat16
TASKS, ROWS, CAP, LEAST, MOST = 136, 2, 784 * 784, 3136, 12845056


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """What the script writes, with few rows."""
    spec = importlib.util.spec_from_file_location("stand_in", EXAMPLE / "make_vision_flan_stand_in.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("vision-flan")
    texts = script.write_rows(folder / "vision-flan", TASKS, ROWS, 0)
    script.write_base(folder / "Qwen" / "Qwen2.5-VL-3B-Instruct", texts)
    (folder / "vision_flan.yaml").write_text((EXAMPLE / "vision_flan.yaml").read_text())
    return folder


def dry_run(folder, *settings):
    begun = time.monotonic()
    done = CliRunner().invoke(cli.app, ["run", str(folder / "vision_flan.yaml"), "--dry-run",
                                        *(x for s in settings for x in ("--set", s))])
    assert time.monotonic() - begun < 60
    return done


@pytest.fixture(scope="module")
def told(stand_in):
    """With every row trained on, so that all can be counted here."""
    done = dry_run(stand_in, "mixture.held_out=0", "evaluate.retention=none")
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def number(text, pattern):
    found = re.search(pattern, text)
    assert found, (pattern, text)
    return float(found[1].replace(",", ""))


def side_tokens(width, height, most):
    """Image tokens as Qwen2-VL's report has them: sides rounded to 28, scaled so that the area fits (arXiv:2409.12191)."""
    h, w = (max(28, round(side / 28) * 28) for side in (height, width))
    if h * w > most:
        ratio = math.sqrt(height * width / most)
        h, w = (max(28, math.floor(side / ratio / 28) * 28) for side in (height, width))
    elif h * w < LEAST:
        ratio = math.sqrt(LEAST / (height * width))
        h, w = (math.ceil(side * ratio / 28) * 28 for side in (height, width))
    return h * w // 784


def test_the_recipe_is_the_papers():
    recipe = load_recipe(EXAMPLE / "vision_flan.yaml")
    assert recipe.model.freeze == ["vision tower", "projector"] and recipe.model.dtype == "bfloat16"
    assert recipe.mixture.images.max_pixels == CAP and recipe.gradients.calibration_samples == 200
    assert (recipe.split.method, recipe.split.groups) == ("merit", 2**3)
    wanted = {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "max_grad_norm": 1.0}
    assert wanted.items() <= recipe.train.items() and "num_train_epochs" not in recipe.train


def test_the_stand_in_has_the_real_models_tensors_and_takes_no_space(stand_in):
    """Names and shapes are what transformers saves of a model of that config; the vocabulary has its tokens where they are."""
    base = stand_in / "Qwen" / "Qwen2.5-VL-3B-Instruct"
    infos = Checkpoint.open(base).tensors
    assert len(infos) == 824 and sum(i.numel for i in infos.values()) == WHOLE == LANGUAGE + TOWER + PROJECTOR
    assert sum(i.size for i in infos.values()) == 7_509_245_952 == json.loads(
        (base / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    model = skeleton(base, False)
    names = saved_names(model)
    shapes = {file: tuple(p.shape) for name, p in model.named_parameters() for file in names[name] if file != "lm_head.weight"}
    assert shapes == {name: info.shape for name, info in infos.items()}
    weights = list(base.glob("*.safetensors"))
    assert len(weights) == 2 and sum(w.stat().st_blocks * 512 for w in weights) < 10**6
    tokens = {t["content"]: t["id"] for t in json.loads((base / "tokenizer.json").read_text())["added_tokens"]}
    assert (tokens["<|im_end|>"], tokens["<|vision_start|>"], tokens["<|image_pad|>"]) == (151645, 151652, 151655)


def test_units_images_and_what_the_cap_saves(stand_in, told):
    rows = json.loads((stand_in / "vision-flan" / "annotation_191-task_1k.json").read_text())
    assert {frozenset(r) for r in rows} == {frozenset({"id", "image", "task_name", "conversations"})}
    sizes = [Image.open(stand_in / "vision-flan" / "images_191task_1k" / r["image"]).size for r in rows]
    capped, free = (sum(side_tokens(*size, most) for size in sizes) for most in (CAP, MOST))
    assert capped < free
    assert number(told, r"mixture +([\d,]+) units") == TASKS
    assert number(told, r"units, ([\d,]+) samples") == TASKS * ROWS
    assert number(told, r"tokens \(([\d,]+) of images\)") == number(told, r": ([\d,]+) image tokens instead") == capped
    assert number(told, r"image tokens instead of ([\d,]+)") == free
    assert f"{1 - capped / free:.0%} fewer" in told
    assert number(told, r"([\d,]+) are scaled down to 614,656") == sum(
        side_tokens(*s, CAP) < side_tokens(*s, MOST) for s in sizes)


def test_operations_bytes_and_hours(told):
    tokens, images = number(told, r"samples, ([\d,]+) tokens"), number(told, r"tokens \(([\d,]+) of images\)")
    work = (6 + 2) * LANGUAGE * tokens + 2 * TOWER * 4 * images + 2 * PROJECTOR * images
    assert f"{work:.2e} operations in all branches, activations computed twice; {LANGUAGE:,} parameters train" in told
    weights, gradients, adam, half = 4 * WHOLE, 4 * LANGUAGE, 8 * LANGUAGE, 2 * LANGUAGE
    assert (f"weights {weights / 1e9:.2f}, gradients {gradients / 1e9:.2f}, AdamW {adam / 1e9:.2f}, "
            f"bfloat16 copies {half / 1e9:.2f}, activations ") in told
    total, kept = number(told, r"about ([\d.]+) GB a branch"), number(told, r"activations ([\d.]+) \(4 rows")
    assert total == pytest.approx((weights + gradients + adam + half) / 1e9 + kept, abs=0.02)
    longest = number(told, r"4 rows of up to ([\d,]+) tokens")
    assert 36 * 2048 * 4 * 4 * longest / 1e9 < kept < 3 * 36 * 2048 * 4 * 4 * longest / 1e9  # every layer's input, and some
    assert f"{8 * 4 * WHOLE / 1e9:.2f} GB of branches (float32), up to {2 * (4 * WHOLE + 8 * LANGUAGE) / 1e9:.2f} GB" in told
    assert f"{2 * WHOLE / 1e9:.2f} GB for the result" in told
    seconds = work / 8 / (0.4 * 989e12)
    assert re.search(rf"H100 80 GB +{seconds:.0f} s a branch, {8 * seconds:.0f} s for all one after the other\n", told)
    assert re.search(r"A100 40 GB .*does not fit on one", told) and re.search(r"V100 .*in float32, as it has no bfloat16", told)
    assert "if 40% of the dense peak is reached (an assumption)" in told
    assert f"about {math.ceil(TASKS * ROWS / 8 / 128)} steps each" in told


def test_the_presets_are_shown_with_what_they_freeze(told):
    assert f"385 tensors, {TOWER:,} parameters" in told and f"5 tensors, {PROJECTOR:,} parameters" in told
    assert f"{LANGUAGE:,} of {WHOLE:,} parameters are not frozen (82%)" in told


def test_problems_are_told_together_and_nothing_is_left(stand_in):
    before = sorted(p for p in stand_in.rglob("*"))
    done = dry_run(stand_in, "model.freeze=[vision towr, visual.*]", "split.groups=999", "train.learning_rat=1")
    said = " ".join(str(done.exception).split())
    assert done.exit_code != 0 and "Did you mean `vision tower`?" in said and "model.visual.*" in said
    assert "learning_rat" in said and sorted(p for p in stand_in.rglob("*")) == before
