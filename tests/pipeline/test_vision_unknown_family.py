"""A family that nobody here knows (Video-LLaMA 3): its processor lies in its folder, its parts are named by patterns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from anabranch.errors import ModelError
from anabranch.families import FAMILIES
from anabranch.model import load_model, vision_of
from anabranch.recipe import load_recipe
from anabranch.run import open_run, run_stages
from jobs_here import jobs_done_here
from vision_models import KNOWN, make_tokenizer, picture, write_picture_units


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GenerationConfig, VideoLlama3Config, VideoLlama3ForConditionalGeneration

    here = tmp_path_factory.mktemp("unknown")
    tokenizer = make_tokenizer("qwen2_vl", None)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    config = VideoLlama3Config(
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None,
                     "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "patch_size": 14},
        image_token_id=ids["image"], video_token_id=ids["video"], tie_word_embeddings=True)
    torch.manual_seed(0)
    model = VideoLlama3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=tokenizer.pad_token_id,
                                               eos_token_id=tokenizer.convert_tokens_to_ids(KNOWN["qwen2_vl"].end))
    model.save_pretrained(here / "base", max_shard_size="100KB")
    tokenizer.save_pretrained(here / "base")
    (here / "base" / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "VideoLlama3ImageProcessor", "processor_class": "VideoLlama3Processor", "patch_size": 14,
        "merge_size": 2, "temporal_patch_size": 1, "min_pixels": 3136, "max_pixels": 50176}))
    return here


def recipe(folder: Path, freeze: list[str]) -> Any:
    content = {"model": {"path": str(folder / "base"), "freeze": freeze}, "mixture": {
        "sources": write_picture_units(folder, rows=12), "max_length": 400}, "split": {"groups": 2},
        "gradients": {"size": 1024}, "train": {"learning_rate": 1e-3, "per_device_train_batch_size": 8},
        "evaluate": {"branches": False}, "output": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return load_recipe(folder / "recipe.yaml")


def test_it_has_no_presets(folder):
    assert "video_llama_3" not in FAMILIES
    with pytest.raises(ModelError, match=r"vision tower.*video_llama_3.*model\.vision_model"):
        run_stages(open_run(recipe(folder, ["vision tower"]), tell=lambda text: None), until="gradients")


def test_patterns_take_it_through_every_stage(folder):
    told: list[str] = []
    with jobs_done_here():
        run_stages(open_run(recipe(folder, ["model.vision_model.*", "model.projector.*"]), tell=told.append))
    assert any(line.startswith("freeze: model.projector.*") for line in told)
    base, merged = ({n: t for p in sorted(where.glob("*.safetensors")) for n, t in load_file(p).items()}
                    for where in (folder / "base", folder / "run" / "merged"))
    assert base.keys() == merged.keys()
    moved = {n for n in base if not torch.equal(base[n], merged[n])}
    assert moved and not any("vision_model" in n or "projector" in n for n in moved)
    model = load_model(folder / "run" / "merged")
    vision = vision_of(model)
    assert vision is not None
    text = vision.processor.apply_chat_template([{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "what colour?"}]}], add_generation_prompt=True, tokenize=False)
    inputs = vision.processor(text=[text], images=[[picture("red")]], return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=3)
    assert written.shape[1] > inputs["input_ids"].shape[1]
