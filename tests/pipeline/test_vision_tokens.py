"""Tokens of rows with images against the family's own processor, where a tokenizer or a processor is out of the ordinary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from anabranch.errors import ModelError
from anabranch.mixture import build_mixture
from anabranch.model import load_tokenizer
from anabranch.recipe import load_recipe
from anabranch.sources import IMAGE
from anabranch.templates import choose_template, encode_rows
from anabranch.vision import load_vision
from vision_models import HALF, make_tokenizer, picture, write_vision_model


def mixture_of(base: Path, rows: list[dict], home: Path):
    """The mixture of rows that show 0.png, 1.png, .."""
    (home / "img").mkdir()
    for i, colour in enumerate(("red", "blue", "green")):
        picture(colour, size=(112, 56), noise=i + 1).save(home / "img" / f"{i}.png")
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "recipe.yaml").write_text(json.dumps({
        "model": {"path": str(base)}, "evaluate": {"retention": "none"}, "output": "run",
        "mixture": {"held_out": 0, "sources": [{"path": "rows.jsonl", "images": "img"}]}}))
    return build_mixture(load_recipe(home / "recipe.yaml"), load_tokenizer(base), home / "mixture", vision=load_vision(base),
                         base_hash="x")


def row(text: str, *images: int) -> dict:
    return {"messages": [{"role": "user", "content": "<image>" * len(images) + text}, {"role": "assistant", "content": "red"}],
            "images": [f"{i}.png" for i in images]}


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("written", [False, True])
def test_a_beginning_that_only_the_tokenizer_writes(written, image, tmp_path):
    """Llama's tokenizers put <s> before all text, and LLaVA's templates leave that to them: so does the processor's own
    `apply_chat_template`, unlike a tokenizer's."""
    folder = write_vision_model(tmp_path / "base", "llava")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)])
    if written:
        template = folder / "chat_template.jinja"
        template.write_text("{{ bos_token }}" + template.read_text())
    tokenizer.save_pretrained(folder)
    if written:
        (folder / "chat_template.jinja").write_text(template.read_text())
    shown = [{"type": "image", "image": picture("red")}] * image
    theirs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": [*shown, {"type": "text", "text": "What?"}]}], add_generation_prompt=True, tokenize=True,
        return_dict=True)["input_ids"][0]
    vision = load_vision(folder)
    template = choose_template("auto", vision.tokenizer, vision)
    row = [{"role": "user", "content": IMAGE * image + "What?"}, {"role": "assistant", "content": "red"}]
    made = encode_rows(template, vision.tokenizer, [row], [[vision.text_of(56, 56)] * image])[0]
    prompt = made.input_ids[: int(np.flatnonzero(made.response)[0])].tolist()
    assert prompt == list(theirs) and prompt.count(start) == 1 and prompt[0] == start
    assert vision.tokenizer.decode(made.input_ids[made.response == 1]).strip() == "red<|im_end|>"


def test_a_text_that_names_the_token_of_a_video(tmp_path):
    """It would be looked for among the videos, of which there are none."""
    base = write_vision_model(tmp_path / "base", "qwen2_5_vl")
    mixture = mixture_of(base, [row(f"What {i}?" + " <|video_pad|>" * (i == 3), i % 3) for i in range(12)], tmp_path)
    assert [(e.rule, e.rows) for e in mixture.excluded] == [("malformed", 1)] and mixture.units[0].rows == 11
    assert "<|video_pad|>" in mixture.excluded[0].example


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_a_tokenizer_without_a_pad_token(family, tmp_path):
    base = write_vision_model(tmp_path / "base", family)
    rows = [[picture("red")], [picture("red"), picture("blue")]]
    wanted = load_vision(base).inputs(rows)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert settings.pop("pad_token")
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    assert load_tokenizer(base).pad_token is None
    got = load_vision(base).inputs(rows)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def write_onevision(folder: Path) -> Path:
    """A family in which an image alone in its row becomes other tokens than one of several."""
    tokenizer, sides = make_tokenizer("llava"), [[56, 112], [112, 56], [112, 112]]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = {"model_type": "siglip_vision_model", "intermediate_size": 48, "image_size": 56, "patch_size": 14}
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer), "intermediate_size": 64, "num_key_value_heads": 1}
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
        vision_config=tower | shape, text_config=text | shape,
        image_token_id=image, image_token_index=image, vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=sides, vision_aspect_ratio="anyres_max_9")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(HALF | {
        "image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": 56, "width": 56}, "image_grid_pinpoints": sides, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_pad": True, "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255}))
    (folder / "processor_config.json").write_text(json.dumps({
        "processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>",
        "num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}))
    return folder


def test_tokens_that_depend_on_how_many_images_a_row_shows(tmp_path):
    base = write_onevision(tmp_path / "base")
    (tmp_path / "one").mkdir(), (tmp_path / "more").mkdir()
    assert mixture_of(base, [row(f"What {i}?", i % 3) for i in range(12)], tmp_path / "one").units[0].rows == 12
    with pytest.raises(ModelError, match="other tokens of a row with 2 images"):  # though the first rows show one
        mixture_of(base, [row(f"What {i}?", *([0] if i < 6 else [1, 2])) for i in range(12)], tmp_path / "more")


def test_a_template_that_writes_the_beginning_in_some_rows_only(tmp_path):
    folder = write_vision_model(tmp_path / "base", "llava")
    template = folder / "chat_template.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + template.read_text())
    vision = load_vision(folder)
    tokenizer = vision.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", start)])
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    chosen = choose_template("auto", tokenizer, vision)
    for made in encode_rows(chosen, tokenizer, [said, [{"role": "system", "content": "Be brief."}, *said]], [[], []]):
        ids = made.input_ids.tolist()
        assert ids[0] == start and ids.count(start) == 1
