"""Vision-language checkpoints of some 100,000 random parameters, laid out as their real repositories are, and small
image mixtures. Nothing here needs torchvision or num2words; processors that need them are still described by their files.

    write_vision_model(folder, "qwen2_5_vl", tied=True, shards=3, dtype="bfloat16", seed=1) -> folder
    read_processor(folder) -> the family's own processor (an image-only one where torchvision is missing)
    write_picture_units(folder, rows=20) -> sources for a recipe
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (235, 210, 40),
           "black": (15, 15, 15), "white": (245, 245, 245)}
SIZES = ((56, 56), (84, 56), (40, 100), (200, 150))  # width, height; not all are multiples of 28
PLACES = ("left", "right")
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# ---- chat templates, as the families publish them (Qwen's without its branches for video) -------------------------------

LLAVA = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
         "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
         "{% if message['role'] != 'assistant' %}"
         "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
         "{{'<|im_end|>'}}{% else %}{% generation %}"
         "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
         "{{'<|im_end|>'}}{% endgeneration %}{% endif %}{{ '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# llava-interleave-qwen as published: its markers leave the end of turn out, which a trainer must not accept.
LLAVA_PUBLISHED = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# llava-1.5 as published: no end of turn at all.
LLAVA_15_PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
QWEN = ("{% set image_count = namespace(value=0) %}{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
        "<|im_end|>\n{% else %}{% for content in message['content'] %}"
        "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
        "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
IDEFICS = ("{% for message in messages %}{{message['role'] | capitalize}}"
           "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
           "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
           "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
           "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
ROW_COL = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
LLAVA_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<pad>")
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
               "<|video_pad|>")


@dataclass(frozen=True)
class Family:
    """What a family's repository has. `special` are its added tokens in order; the row and column marks of Idefics3 are
    ordinary text for its tokenizer, those of SmolVLM are added tokens."""

    template: str
    special: tuple[str, ...]
    end: str  # of a turn
    placeholder: str
    pad: str = "<|endoftext|>"
    bos: str | None = None


KNOWN = {
    "llava": Family(LLAVA, LLAVA_TOKENS, "<|im_end|>", "<image>", "<pad>"),
    "llava_next": Family(LLAVA, LLAVA_TOKENS, "<|im_end|>", "<image>", "<pad>"),
    "qwen2_vl": Family(QWEN, ("<|endoftext|>", *QWEN_TOKENS), "<|im_end|>", "<|image_pad|>"),
    "qwen2_5_vl": Family(QWEN, ("<|endoftext|>", *QWEN_TOKENS), "<|im_end|>", "<|image_pad|>"),
    "idefics3": Family("<|begin_of_text|>" + IDEFICS,
                       ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<fake_token_around_image>",
                        "<image>", "<end_of_utterance>"), "<end_of_utterance>", "<image>", "<|finetune_right_pad_id|>",
                       "<|begin_of_text|>"),
    "smolvlm": Family("<|im_start|>" + IDEFICS,
                      ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>", *ROW_COL, "<fake_token_around_image>",
                       "<image>", "<end_of_utterance>"), "<end_of_utterance>", "<image>", "<|im_end|>", "<|im_start|>"),
}


# ---- tokenizer ---------------------------------------------------------------------------------------------------------


def make_tokenizer(family: str, template: str | None = None) -> Any:
    """Byte-level BPE with some merges (of two line ends too, which image frames contain) and the family's own tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    known = KNOWN[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = ["What colour is this? Answer in one word.", "Is it on the left or on the right?", "How many?", "user\n\n",
             "assistant\n\n", "You are a helpful assistant.", "User: Assistant: ", *COLOURS, *PLACES]
    tokenizer.train_from_iterator(words * 3, trainers.BpeTrainer(
        vocab_size=330, special_tokens=[], show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in known.special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=known.pad, eos_token=known.end, bos_token=known.bos,
        additional_special_tokens=list(known.special), model_max_length=8192)
    fast.chat_template = template or known.template
    return fast


# ---- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of a checkpoint: width (heads of 16) and layers of its text and vision parts alike, and side of an image or a tile."""

    hidden: int = 32
    layers: int = 2
    side: int = 56

    @property
    def heads(self) -> int:
        return self.hidden // 16

    @property
    def image_tokens(self) -> int:
        """Of one tile of Idefics3, whose patches of 14 pixels are joined 2 by 2."""
        return (self.side // 14) ** 2 // 4


TINY = Size()


def _text(tokenizer: Any, tied: bool, size: Size, **more: Any) -> dict[str, Any]:
    return {"vocab_size": len(tokenizer), "hidden_size": size.hidden, "intermediate_size": 2 * size.hidden,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.heads // 2,
            "max_position_embeddings": 8192, "tie_word_embeddings": tied, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id} | more


def _tower(size: Size, layers: int) -> dict[str, Any]:
    return {"hidden_size": size.hidden, "intermediate_size": 48 * size.hidden // 32, "num_hidden_layers": layers,
            "num_attention_heads": size.heads, "image_size": size.side, "patch_size": 14}


def _pinpoints(size: Size) -> list[list[int]]:
    return [[size.side, 2 * size.side], [2 * size.side, size.side], [2 * size.side, 2 * size.side]]


def _llava(tokenizer: Any, tied: bool, size: Size, next_: bool) -> Any:
    import transformers as t

    vision = {"model_type": "clip_vision_model", "projection_dim": 16} | _tower(size, size.layers + 1)
    common: dict[str, Any] = {
        "vision_config": vision, "text_config": {"model_type": "qwen2"} | _text(tokenizer, tied, size),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2, "tie_word_embeddings": tied}
    if next_:
        return t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(**common, image_grid_pinpoints=_pinpoints(size)))
    return t.LlavaForConditionalGeneration(t.LlavaConfig(**common))


def _qwen(tokenizer: Any, tied: bool, size: Size, newer: bool) -> Any:
    import transformers as t

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"))}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    text = _text(tokenizer, tied, size, rope_parameters=rope)
    common: dict[str, Any] = {"depth": size.layers, "num_heads": size.heads, "patch_size": 14}
    if newer:
        vision = common | {"hidden_size": size.hidden, "intermediate_size": 48 * size.hidden // 32, "window_size": 56,
                           "out_hidden_size": size.hidden, "fullatt_block_indexes": [size.layers - 1]}
        return t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids))
    vision = common | {"embed_dim": size.hidden, "hidden_size": size.hidden, "mlp_ratio": 2}
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids))


def _idefics(tokenizer: Any, tied: bool, size: Size, small: bool) -> Any:
    import transformers as t

    common = {"vision_config": _tower(size, size.layers),
              "text_config": {"model_type": "llama"} | _text(tokenizer, tied, size),
              "image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2, "tie_word_embeddings": tied,
              "pad_token_id": tokenizer.pad_token_id}
    if small:
        return t.SmolVLMForConditionalGeneration(t.SmolVLMConfig(**common))
    return t.Idefics3ForConditionalGeneration(t.Idefics3Config(**common))


MODELS: dict[str, Callable[[Any, bool, Size], Any]] = {
    "llava": lambda tokenizer, tied, size: _llava(tokenizer, tied, size, False),
    "llava_next": lambda tokenizer, tied, size: _llava(tokenizer, tied, size, True),
    "qwen2_vl": lambda tokenizer, tied, size: _qwen(tokenizer, tied, size, False),
    "qwen2_5_vl": lambda tokenizer, tied, size: _qwen(tokenizer, tied, size, True),
    "idefics3": lambda tokenizer, tied, size: _idefics(tokenizer, tied, size, False),
    "smolvlm": lambda tokenizer, tied, size: _idefics(tokenizer, tied, size, True),
}


def write_vision_model(folder: Path, family: str = "llava", *, tied: bool = False, shards: int = 1, dtype: str = "float32",
                       seed: int = 0, template: str | None = None, size: Size = TINY) -> Path:
    """A checkpoint of one of FAMILIES, weights drawn from `seed`.

    Args:
        shards: at least this many weight files (with an index) where it is above 1.
        template: another chat template than KNOWN[family].template.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer(family, template)
    torch.manual_seed(seed)
    model = MODELS[family](tokenizer, tied, size).to(getattr(torch, dtype))
    end = [tokenizer.convert_tokens_to_ids(KNOWN[family].end)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    weight = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=weight // shards if shards > 1 else "5GB")
    tokenizer.save_pretrained(folder)
    write_processor_files(folder, family, size)
    assert shards == 1 or len(list(folder.glob("*.safetensors"))) >= shards
    return folder


def write_processor_files(folder: Path, family: str, size: Size = TINY) -> None:
    """preprocessor_config.json, and processor_config.json where the family's repositories have one."""
    clip: dict[str, Any] = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
                            "resample": 3, "rescale_factor": 1 / 255}
    more: dict[str, Any] | None = None
    if family in ("llava", "llava_next"):
        name = "LlavaNext" if family == "llava_next" else "Llava"
        main = clip | CLIP | {
            "crop_size": {"height": size.side, "width": size.side}, "size": {"shortest_edge": size.side},
            "do_center_crop": True,
            "image_processor_type": "LlavaNextImageProcessor" if family == "llava_next" else "CLIPImageProcessor",
            "processor_class": f"{name}Processor"}
        if family == "llava_next":
            main |= {"image_grid_pinpoints": _pinpoints(size), "do_pad": True}
        more = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14,
                "processor_class": f"{name}Processor", "vision_feature_select_strategy": "default"}
    elif family in ("qwen2_vl", "qwen2_5_vl"):
        main = CLIP | {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
                       "image_processor_type": "Qwen2VLImageProcessor",
                       "processor_class": "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else "Qwen2VLProcessor"}
    else:
        name = "SmolVLM" if family == "smolvlm" else "Idefics3"
        main = clip | HALF | {"do_image_splitting": True, "do_pad": True, "resample": 1,
                              "size": {"longest_edge": 2 * size.side}, "max_image_size": {"longest_edge": size.side},
                              "image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor"}
        more = {"image_seq_len": size.image_tokens, "processor_class": f"{name}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(main, indent=2) + "\n")
    if more:
        (folder / "processor_config.json").write_text(json.dumps(more, indent=2) + "\n")


def read_processor(folder: Path) -> Any:
    """The family's own processor, without its part for videos where that cannot be built here. An expectation of tests,
    so it takes nothing from the package."""
    import transformers as t
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    main = json.loads((folder / "preprocessor_config.json").read_text())
    name = main["processor_class"]
    if name not in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "SmolVLMProcessor"):
        return t.AutoProcessor.from_pretrained(folder)
    pil = {"Qwen2VLImageProcessor": Qwen2VLImageProcessorPil, "SmolVLMImageProcessor": SmolVLMImageProcessorPil,
           "Idefics3ImageProcessor": Idefics3ImageProcessorPil}[main["image_processor_type"]]
    images = pil.from_pretrained(folder)
    if name == "SmolVLMProcessor":  # num2words and the video processor are for videos alone; Idefics3's reads images alike
        return t.Idefics3Processor(images, tokenizer, image_seq_len=json.loads(
            (folder / "processor_config.json").read_text())["image_seq_len"], chat_template=tokenizer.chat_template)
    parent = t.Qwen2_5_VLProcessor if name == "Qwen2_5_VLProcessor" else t.Qwen2VLProcessor

    class ImagesOnly(parent):  # type: ignore[misc, valid-type] - a class that is chosen above
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
            for kind in ("image", "video"):
                setattr(self, f"{kind}_token", f"<|{kind}_pad|>")
                setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
            t.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImagesOnly(images, tokenizer, tokenizer.chat_template)


# ---- pictures and mixtures ---------------------------------------------------------------------------------------------


def picture(colour: str, place: str = "left", size: tuple[int, int] = (56, 56), noise: int = 0) -> Image.Image:
    """A square of a colour on the left or on the right of a grey ground; `noise` sets some pixels apart."""
    width, height = size
    image = Image.new("RGB", size, (128, 128, 128))
    side, x = min(width, height) // 2, 2 if place == "left" else width - min(width, height) // 2 - 2
    ImageDraw.Draw(image).rectangle((x, height // 4, x + side, height // 4 + side), fill=COLOURS[colour])
    image.putpixel((noise % width, (noise // width) % height), (noise % 251, 7, 99))
    return image


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


@dataclass(frozen=True)
class Question:
    """One row to be: pictures, a prompt about them and its answer."""

    pictures: tuple[Image.Image, ...]
    prompt: str
    answer: str


def questions(task: str, count: int, seed: int = 0) -> list[Question]:
    """`colour`, `place`, `not_colour` (an opposite answer), `compare` (two pictures), `words` (no picture)."""
    draw = np.random.default_rng([seed, sum(task.encode())])
    rows = []
    for i in range(count):
        names = [str(draw.choice(list(COLOURS))) for _ in range(2)]
        place, size = str(draw.choice(PLACES)), SIZES[int(draw.integers(len(SIZES)))]
        first = picture(names[0], place, size, i + 1)
        if task == "words":
            rows.append(Question((), f"Number {i}: say {names[0]} twice.", f"{names[0]} {names[0]}"))
        elif task == "compare":
            second = picture(names[1], "left", SIZES[i % len(SIZES)], i + 500)
            rows.append(Question((first, second), "Is it the same colour?", "yes" if names[0] == names[1] else "no"))
        else:
            prompt = "Is it on the left or on the right?" if task == "place" else "What colour is this? Answer in one word."
            answer = {"colour": names[0], "place": place, "not_colour": f"Not {names[1]}."}[task]
            rows.append(Question((first,), prompt, answer))
    return rows


def write_llava(folder: Path, name: str, rows: Sequence[Question], *, images: str = "images") -> Path:
    """LLaVA JSON (one list) with PNG and JPEG files in `images` beside it; `image` is a list where a row has several."""
    (folder / images / name).mkdir(parents=True, exist_ok=True)
    out = []
    for i, row in enumerate(rows):
        paths = [f"{images}/{name}/{i}_{j}.{'jpg' if j + i % 3 == 2 else 'png'}" for j in range(len(row.pictures))]
        for path, image in zip(paths, row.pictures, strict=True):
            (folder / path).write_bytes(encoded(image, "JPEG" if path.endswith("jpg") else "PNG"))
        turns = [{"from": "human", "value": "<image>\n" * len(paths) + row.prompt}, {"from": "gpt", "value": row.answer}]
        one = {"image": paths[0] if len(paths) == 1 else paths} if paths else {}
        out.append({"id": f"{name}-{i}", **one, "conversations": turns})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(out, indent=1))
    return path


def write_parquet(folder: Path, name: str, rows: Sequence[Question]) -> Path:
    """`messages` with image parts and an `images` column of {bytes, path}, as datasets writes images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def messages(row: Question) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"type": "image", "text": None} for _ in row.pictures]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": row.prompt}]},
                {"role": "assistant", "content": [{"type": "text", "text": row.answer}]}]

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table({
        "messages": pa.array([messages(r) for r in rows], pa.list_(message)),
        "images": pa.array([[{"bytes": encoded(p), "path": None} for p in r.pictures] for r in rows], pa.list_(image))}), path)
    return path


def write_words(folder: Path, name: str, rows: Sequence[Question]) -> Path:
    """prompt and completion, no images."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.answer}) + "\n" for r in rows))
    return path


def write_picture_units(folder: Path, rows: int = 20, seed: int = 0) -> list[dict[str, str]]:
    """Five units under `folder`/data in three layouts (two LLaVA JSON, two Parquet, one of words alone); `sources` of a
    recipe that lies in `folder`."""
    data = folder / "data"
    write_llava(data, "colour", questions("colour", rows, seed))
    write_llava(data, "compare", questions("compare", rows, seed))
    write_parquet(data, "place", questions("place", rows, seed))
    write_parquet(data, "not_colour", questions("not_colour", rows, seed))
    write_words(data, "words", questions("words", rows, seed))
    return [{"path": "data/*.json"}, {"path": "data/*.parquet"}, {"path": "data/*.jsonl"}]
