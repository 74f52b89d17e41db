"""Every family of vision-language models against its own processor and its own forward pass, one row at a time.

The expectation is transformers alone: the family's processor on the whole conversation, and the plain model on what it gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from anabranch.errors import MixtureError, ModelError
from anabranch.evaluate import score_unit
from anabranch.model import batches, can_select, load_model, padded, response_losses, vision_of
from anabranch.recipe import EvaluateSection
from anabranch.rows import RowImages, Rows, images_file, load_unit, save_images, save_unit
from anabranch.sources import IMAGE
from anabranch.templates import Encoded, choose_template, encode_rows
from anabranch.vision import Vision, load_vision
from vision_models import (
    FAMILIES,
    KNOWN,
    LLAVA_15_PUBLISHED,
    LLAVA_PUBLISHED,
    encoded,
    picture,
    read_processor,
    write_vision_model,
)

SIZES = [(56, 56), (84, 56), (28, 28), (100, 40), (40, 120), (57, 83), (300, 200), (15, 200)]


class Row(NamedTuple):
    """A conversation as we hold it, and the same one as transformers wants it."""

    ours: list[dict[str, str]]
    theirs: list[dict[str, Any]]
    images: list[Image.Image]
    answers: list[str]


def row(*turns: tuple[str, str], images: tuple[Image.Image, ...] = (), system: str = "") -> Row:
    """Of (prompt, answer) turns; IMAGE in a prompt stands for an image."""
    ours: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for prompt, answer in turns:
        ours += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    theirs = []
    for message in ours:
        parts: list[dict[str, str]] = []
        for i, text in enumerate(message["content"].split(IMAGE)):
            parts += ([{"type": "image"}] if i else []) + ([{"type": "text", "text": text}] if text else [])
        theirs.append({"role": message["role"], "content": parts})
    return Row(ours, theirs, list(images), [a for _, a in turns])


ONE, TWO = picture("red", "left", (56, 56), 3), picture("blue", "right", (84, 112), 9)
WIDE = picture("green", "left", (200, 70), 5)
ROWS = [
    row((f"{IMAGE}What colour is this?", "red"), images=(ONE,)),
    row(("Say yes.", "yes, surely"), system="Be brief."),
    row((f"{IMAGE}{IMAGE}Is it the same colour?\n\nAnswer.", "no"), images=(TWO, WIDE)),
    row((f"{IMAGE}\nWhere?", "on the left"), ("And what colour?", "green"), images=(WIDE,)),
    row((f"{IMAGE}What?", "blue"), (f"{IMAGE}And this?", "red\n\nor so"), images=(TWO, ONE)),
]


class Made(NamedTuple):
    """A family's checkpoint, its own processor, and our rows of it."""

    family: str
    folder: Path
    processor: Any
    vision: Vision
    encodings: list[Encoded]
    rows: Rows


def encode(vision: Vision, rows: list[Row]) -> list[Encoded]:
    template = choose_template("auto", vision.tokenizer, vision)
    shown = [[vision.text_of(*image.size) for image in r.images] for r in rows]
    out = encode_rows(template, vision.tokenizer, [r.ours for r in rows], shown)
    assert not [o for o in out if isinstance(o, str)], out
    return out  # type: ignore[return-value] - none is a string, as has just been seen


def stored(path: Path, encodings: list[Encoded], rows: list[Row]) -> Rows:
    """The rows as the mixture stage leaves them, read again."""
    files = [encoded(image) for r in rows for image in r.images]
    hashes = save_images(images_file(path), [len(f) for f in files], lambda i: files[i])
    made = Rows.of([(e.input_ids.tolist(), e.response.tolist()) for e in encodings])
    offsets = np.concatenate([[0], np.cumsum([len(r.images) for r in rows])]).astype(np.int64)
    images = RowImages((images_file(path),), np.zeros(len(files), np.int32), np.arange(len(files), dtype=np.int32), offsets)
    save_unit(path, Rows(made.input_ids, made.response, made.offsets, images), Rows.of([]), hashes)
    return load_unit(path, "train")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    family = request.param
    folder = write_vision_model(tmp_path_factory.mktemp(family), family, seed=1)
    vision = load_vision(folder)
    assert vision is not None
    encodings = encode(vision, ROWS)
    return Made(family, folder, read_processor(folder), vision, encodings, stored(folder / "unit.safetensors", encodings, ROWS))


@pytest.fixture(scope="module")
def model(made: Made) -> Any:
    return load_model(made.folder)


def theirs(made: Made, r: Row) -> dict[str, torch.Tensor]:
    """The family's own inputs for a whole conversation."""
    text = made.processor.tokenizer.apply_chat_template(r.theirs, tokenize=False)
    return dict(made.processor(text=[text], images=[r.images] if r.images else None, add_special_tokens=False,
                               return_tensors="pt"))


def ids_of(made: Made, r: Row) -> list[int]:
    return [int(t) for t in theirs(made, r)["input_ids"][0]]


# ---- tokens ------------------------------------------------------------------------------------------------------------


def test_conversations_become_the_tokens_of_the_familys_own_processor(made):
    for r, e in zip(ROWS, made.encodings, strict=True):
        assert e.input_ids.tolist() == ids_of(made, r)


@pytest.mark.parametrize("size", SIZES)
def test_an_image_of_any_size_takes_as_many_tokens_as_the_processor_says(made, size):
    image = Image.new("RGB", size, (9, 120, 200))
    r = row((f"{IMAGE}What?", "red"), images=(image,))
    without = made.processor.tokenizer.apply_chat_template(r.theirs, tokenize=False).replace(KNOWN[made.family].placeholder, "")
    rest = len(made.processor.tokenizer(without, add_special_tokens=False)["input_ids"])
    assert made.vision.tokens(*size) == len(ids_of(made, r)) - rest
    (e,) = encode(made.vision, [r])
    assert e.input_ids.tolist() == ids_of(made, r) and e.shown[0][1] - e.shown[0][0] == made.vision.tokens(*size)


def test_what_is_trained_is_the_answers_and_their_ends_and_nothing_of_an_image(made):
    """Label audit: no prompt, image, frame or padding token; every end of turn."""
    tokenizer, known = made.processor.tokenizer, KNOWN[made.family]
    never = {tokenizer.convert_tokens_to_ids(t) for t in known.special if t != known.end}
    for r, e in zip(ROWS, made.encodings, strict=True):
        trained = e.input_ids[e.response == 1].tolist()
        assert not never & set(trained)
        assert trained.count(tokenizer.convert_tokens_to_ids(known.end)) == len(r.answers)
        said = [part.strip() for part in tokenizer.decode(trained).split(known.end)]
        assert said == [*r.answers, ""]
        frames = [i for a, b in e.shown for i in range(a, b)]
        assert len(e.shown) == len(r.images) and not e.response[frames].any()


def test_padding_is_never_trained(made):
    batch = padded(made.rows, np.arange(len(ROWS)), torch.device("cpu"))
    assert int(batch.response[batch.attention_mask == 0].sum()) == 0
    assert int(batch.response.sum()) == sum(int(e.response.sum()) for e in made.encodings)
    assert [len(images) for images in batch.images] == [len(r.images) for r in ROWS]


def test_a_row_whose_text_holds_the_placeholder_is_refused_and_a_frames_plain_words_are_not(made):
    template = choose_template("auto", made.vision.tokenizer, made.vision)
    word = KNOWN[made.family].placeholder
    held, plain = encode_rows(template, made.vision.tokenizer, [row((f"What does {word} mean?", "an image")).ours,
                                                               row(("A row_1_col_1 and a global-img", "yes")).ours])
    assert isinstance(held, str) and word in held
    assert isinstance(plain, Encoded)


# ---- losses ------------------------------------------------------------------------------------------------------------


def alone(made: Made, model: Any, number: int) -> torch.Tensor:
    """Losses of a row's response tokens, by the plain model on its own processor's tensors."""
    inputs, e = theirs(made, ROWS[number]), made.encodings[number]
    with torch.no_grad():
        logits = model(**inputs).logits[0].float()
    where = np.flatnonzero(e.response)
    return torch.nn.functional.cross_entropy(logits[where - 1], torch.tensor(e.input_ids[where], dtype=torch.int64),
                                             reduction="none")


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 1, 0], [1], [2, 2, 3]])
def test_a_mixed_batch_has_the_losses_of_each_row_alone(made, model, order):
    batch = padded(made.rows, np.array(order), torch.device("cpu"))
    wanted = torch.cat([alone(made, model, i) for i in order])
    for select in {False, can_select(model)}:
        with torch.no_grad():
            losses, _ = response_losses(model, batch, select=select)
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)


def test_the_loss_depends_on_the_image(made, model):
    """The test above could pass with images that the model does not see."""
    turned = ROWS[0]._replace(images=[ONE.transpose(Image.Transpose.ROTATE_180)])
    rows = stored(made.folder / "other.safetensors", encode(made.vision, [turned]), [turned])
    with torch.no_grad():
        here = response_losses(model, padded(made.rows, np.array([0]), torch.device("cpu")), select=False)[0]
        there = response_losses(model, padded(rows, np.array([0]), torch.device("cpu")), select=False)[0]
    assert here.shape == there.shape and not torch.allclose(here, there, rtol=0, atol=1e-6)


def test_gradients_reach_the_vision_tower_and_the_language_model(made, model):
    batch = padded(made.rows, np.array([0, 1]), torch.device("cpu"))
    model.zero_grad()
    response_losses(model, batch, select=can_select(model))[0].sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    model.zero_grad(set_to_none=True)
    assert any(word in name for name in moved for word in ("visual", "vision"))
    assert any("language_model" in name or "text_model" in name for name in moved)


# ---- generation --------------------------------------------------------------------------------------------------------


def test_answers_about_images_are_those_of_each_row_alone(made, model, monkeypatch):
    """Evaluation's batch of prompts, padded on the left, generates what the plain model does row by row."""
    short = [0, 1, 2]
    plain, written = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **k: written.append((k, plain(**k))) or written[-1][1])
    settings = EvaluateSection(generate_samples=len(short), short_answer_tokens=24)
    score = score_unit(model, made.vision.tokenizer, made.rows, np.array(short), 10_000, select=False, answers=settings)
    assert score.answers == len(short) and score.rows == len(short)
    (asked, out), = written
    for i, whole in zip(short, out.tolist(), strict=True):
        r = ROWS[i]
        text = made.processor.tokenizer.apply_chat_template(r.theirs[:-1], tokenize=False, add_generation_prompt=True)
        inputs = made.processor(text=[text], images=[r.images] if r.images else None, add_special_tokens=False,
                                return_tensors="pt")
        with torch.no_grad():
            one = plain(**inputs, do_sample=False, max_new_tokens=asked["max_new_tokens"], eos_token_id=asked["eos_token_id"],
                        pad_token_id=asked["pad_token_id"])[0, inputs["input_ids"].shape[1]:].tolist()
        assert len(one) > 1 and whole[asked["input_ids"].shape[1]:][: len(one)] == one


# ---- what cannot be used -----------------------------------------------------------------------------------------------


def test_vision_of_a_loaded_model_is_its_processor(made, model):
    vision = vision_of(model)
    assert vision is not None and vision.hash == made.vision.hash and vision.placeholder == KNOWN[made.family].placeholder


def test_a_processor_that_silently_becomes_a_tokenizer_is_refused(tmp_path):
    """AutoProcessor returns the tokenizer for a class that it does not know; trained so, images would be words."""
    from transformers import AutoProcessor, ProcessorMixin

    folder = write_vision_model(tmp_path, "llava")
    for name in ("preprocessor_config.json", "processor_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"processor_class": "LlavaSomethingProcessor"}))
    assert not isinstance(AutoProcessor.from_pretrained(folder), ProcessorMixin)
    with pytest.raises(ModelError, match=r"no processor"):
        load_vision(folder)


def test_a_missing_processor_is_said_and_how_to_get_one(tmp_path):
    folder = write_vision_model(tmp_path, "qwen2_5_vl")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"without a processor.*preprocessor_config\.json"):
        load_vision(folder)


def test_a_template_that_never_ends_a_turn_is_refused_by_name(tmp_path):
    """LLaVA 1.5's, as published."""
    vision = load_vision(write_vision_model(tmp_path, "llava", template=LLAVA_15_PUBLISHED))
    assert vision is not None
    with pytest.raises(MixtureError, match="end-of-turn"):
        encode(vision, ROWS[:1])


def test_an_end_of_turn_right_behind_a_template_s_markers_is_trained(tmp_path):
    """LLaVA interleave's, as published: {% endgeneration %} stands before the end of the turn."""
    vision = load_vision(write_vision_model(tmp_path, "llava", template=LLAVA_PUBLISHED))
    assert vision is not None
    e, two = encode(vision, [ROWS[0], ROWS[3]])
    assert vision.tokenizer.decode(e.input_ids[e.response == 1]) == "red<|im_end|>"
    said = vision.tokenizer.decode(two.input_ids[two.response == 1])
    assert said.replace(" on", "on", 1).replace(" green", "green") == "on the left<|im_end|>green<|im_end|>"


def test_length_buckets_keep_images_with_their_rows(made):
    wanted, seen = {0: [0], 1: [], 2: [1, 2], 3: [3], 4: [4, 5]}, {}
    for batch in batches(made.rows, np.arange(len(ROWS)), 150, torch.device("cpu")):
        seen |= {int(number): images for number, images in zip(batch.rows, batch.images, strict=True)}
    assert {i: [image.number for image in images] for i, images in seen.items()} == wanted
