"""Files laid out as Qwen2.5-VL-3B-Instruct and Vision-FLAN are, without their 44 GB, for a dry run of vision_flan.yaml.

    python examples/vision/make_vision_flan_stand_in.py FOLDER [--rows-per-task 8] [--tasks 136]
    anabranch run FOLDER/vision_flan.yaml --dry-run

The base has the real config, tensor names, shapes, types and special tokens; its weights are holes in files that take no
space on disk (they read as zeros; nobody should train on them). The rows have Vision-FLAN's keys; pictures and texts are drawn.
Text is cut into tokens by a small tokenizer that is learned here, so that tokens of text are not the real model's; tokens of
images depend on sizes alone, and are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY, HEAD, KEY_VALUE_HEADS = 2048, 36, 11008, 151936, 128, 2
VISION_HIDDEN, VISION_LAYERS, VISION_INTERMEDIATE, PATCH, MERGE = 1280, 32, 3420, 14, 2
FIRST_SPECIAL = 151643
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")
SHARD_BYTES = 4 * 10**9
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SIZES = ((640, 480), (500, 375), (375, 500), (1024, 768), (224, 224), (640, 427), (1280, 960), (300, 300), (96, 96),
         (1600, 1067))
KINDS = ("object_classification", "visual_question_answering", "image_caption", "detailed_description", "color", "counting",
         "text_recognition", "sentiment_detection")
WORDS = ["a", "the", "image", "shows", "red", "green", "blue", "small", "large", "round", "object", "beside", "two", "three",
         "of", "people", "on", "table", "street", "sign", "in", "it"]


def config() -> dict[str, object]:
    """config.json of Qwen/Qwen2.5-VL-3B-Instruct."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
        "hidden_act": "silu", "hidden_size": HIDDEN, "initializer_range": 0.02, "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 128000, "max_window_layers": 70, "num_attention_heads": 16, "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_VALUE_HEADS, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False, "vocab_size": VOCABULARY,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": VISION_LAYERS, "hidden_act": "silu", "hidden_size": VISION_HIDDEN,
                          "intermediate_size": VISION_INTERMEDIATE, "num_heads": 16, "in_chans": 3, "out_hidden_size": HIDDEN,
                          "patch_size": PATCH, "spatial_merge_size": MERGE, "spatial_patch_size": PATCH, "window_size": 112,
                          "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}}


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the real files, 824 of them."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", (HIDDEN,)
        for name, width in (("q", HIDDEN), ("k", KEY_VALUE_HEADS * HEAD), ("v", KEY_VALUE_HEADS * HEAD)):
            yield f"{layer}.self_attn.{name}_proj.weight", (width, HIDDEN)
            yield f"{layer}.self_attn.{name}_proj.bias", (width,)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield from _gated(f"{layer}.mlp", HIDDEN, INTERMEDIATE, bias=False)
    yield "model.norm.weight", (HIDDEN,)
    yield "visual.patch_embed.proj.weight", (VISION_HIDDEN, 3, 2, PATCH, PATCH)
    for i in range(VISION_LAYERS):
        block = f"visual.blocks.{i}"
        for name in ("norm1", "norm2"):
            yield f"{block}.{name}.weight", (VISION_HIDDEN,)
        yield from _linear(f"{block}.attn.qkv", 3 * VISION_HIDDEN, VISION_HIDDEN)
        yield from _linear(f"{block}.attn.proj", VISION_HIDDEN, VISION_HIDDEN)
        yield from _gated(f"{block}.mlp", VISION_HIDDEN, VISION_INTERMEDIATE, bias=True)
    wide = VISION_HIDDEN * MERGE * MERGE
    yield "visual.merger.ln_q.weight", (VISION_HIDDEN,)
    yield from _linear("visual.merger.mlp.0", wide, wide)
    yield from _linear("visual.merger.mlp.2", HIDDEN, wide)


def _linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _gated(name: str, width: int, inner: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, out, into in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
        yield f"{name}.{part}_proj.weight", (out, into)
        if bias:
            yield f"{name}.{part}_proj.bias", (out,)


def write_base(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors():
        size = 2 * math.prod(shape)
        if filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write_holes(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config())
    write_json(folder / "generation_config.json", {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
                                                   "eos_token_id": [151645, 151643], "temperature": 0.1, "top_k": 1})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "min_pixels": 3136,
        "max_pixels": 12845056, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]})
    _write_tokenizer(folder, texts)


def _write_holes(path: Path, shard: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file with a true header and no data written after it. Returns the data's bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shard.items():
        stop = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + start)
    return start


def _write_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, show_progress=False,
                                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(learned.to_str())["model"]
    vocabulary = model["vocab"] | {f"<unused-{i}>": i for i in range(len(model["vocab"]), FIRST_SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=131072)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_rows(folder: Path, tasks: int, rows: int, seed: int) -> list[str]:
    """Annotations and pictures; returns the texts."""
    images = folder / "images_191task_1k"
    images.mkdir(parents=True)
    draw, annotations, texts = np.random.default_rng(seed), [], []
    for task in range(tasks):
        name = f"dataset_{task:03d}+{KINDS[task % len(KINDS)]}"
        for row in range(rows):
            picture = f"{name}_{row:05d}.jpg"
            _draw(draw, SIZES[int(draw.integers(len(SIZES)))]).save(images / picture, quality=85)
            question, answer = (" ".join(draw.choice(WORDS, size=int(draw.integers(least, most)))) for least, most in
                                ((20, 60), (1, 8) if task % 3 else (20, 80)))
            texts += [question, answer]
            annotations.append({"id": f"{name}_{row:05d}", "image": picture, "task_name": name, "conversations": [
                {"from": "human", "value": f"<image>\n{question} (row {row})"}, {"from": "gpt", "value": answer}]})
    write_json(folder / "annotation_191-task_1k.json", annotations)
    return texts


def _draw(draw: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, tuple(int(x) for x in draw.integers(256, size=3)))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = (int(draw.integers(side)) for side in size)
        pen.ellipse((x, y, x + size[0] // 4, y + size[1] // 4), fill=tuple(int(c) for c in draw.integers(256, size=3)))
    return image


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=136)
    parser.add_argument("--rows-per-task", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.folder.exists():
        parser.error(f"{given.folder} is there already")
    texts = write_rows(given.folder / "vision-flan", given.tasks, given.rows_per_task, given.seed)
    write_base(given.folder / "Qwen" / "Qwen2.5-VL-3B-Instruct", texts)
    recipe = Path(__file__).with_name("vision_flan.yaml")
    shutil.copy(recipe, given.folder / recipe.name)
    print(f"written. Now: anabranch run {given.folder / recipe.name} --dry-run")


if __name__ == "__main__":
    main()
