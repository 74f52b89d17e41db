"""A vision-language model's processor: what an image becomes as text, as tokens and as the tensors that the model takes.

    w, h  sides of an image in pixels

A processor replaces each placeholder of the chat template by a text that depends on the image's size alone (that is what
inference servers rely on as well): so many image tokens, in some families with a frame around them. That text is put into
the conversation *before* it is tokenised, so tokens, and the places of responses among them, are those of the processor
itself; `check` holds one row of each unit to it. Pixels are made when a batch is made.

Without torchvision a processor that brings a video processor cannot be built; images need none, so it is built without.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.artifacts import digest
from anabranch.errors import ModelError, RecipeError
from anabranch.images import open_image
from anabranch.rows import StoredImage, image_hash, read_image

TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
PROBES = ((336, 336), (64, 200), (500, 90), (641, 479), (28, 28))
CACHE_BYTES = 2**28  # of pixel tensors: evaluations and diagnostics see the same batches again and again


def is_vision_language(folder: Path) -> bool:
    """Whether a model folder's config.json is of a model that takes images and text and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told by whoever loads the model
        return False
    if not isinstance(config, dict):
        return False
    classes = {name for names in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
               for name in ([names] if isinstance(names, str) else names)}
    named = config.get("architectures") or []
    if not named:  # AutoModel needs none
        return str(config.get("model_type")) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and "vision_config" in config
    fitting = isinstance(named, list) and any(isinstance(name, str) and name in classes for name in named)
    return fitting and ("vision_config" in config or not _language_model(config))


def _language_model(config: dict[str, Any]) -> bool:
    """Some classes serve text alone and text with images; a config without a vision part is of the first kind."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(config.get("model_type")) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def model_class(folder: Path) -> Any:
    """transformers' class for a model folder: for image and text to text where it is such a model, else for causal language."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if is_vision_language(folder) else AutoModelForCausalLM


def load_vision(folder: Path, *, trust_remote_code: bool = False) -> Vision | None:
    """The processor of a model folder, checked to be one; None where the model is a language model.

    Raises:
        ModelError: a vision-language model whose processor is missing, or is none, or does not tell what an image becomes.
    """
    if not is_vision_language(folder):
        return None
    processor = _processor(folder, trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"model folder {folder}: its processor, {type(processor).__name__}, has no image processor beside its "
                         f"tokenizer. {REMEDY}")
    placeholder = str(getattr(processor, "image_token", None) or "")
    ids = tokenizer.encode(placeholder, add_special_tokens=False) if placeholder else []
    if len(ids) != 1:
        raise ModelError(f"model folder {folder}: its tokenizer writes the placeholder of an image, {placeholder!r}, as "
                         f"{len(ids)} tokens, wanted one. Add it to the tokenizer as a special token, as in training.")
    if tokenizer.pad_token is None:  # rows with unequal images are padded on the way to their pixels; the text is thrown away
        tokenizer.pad_token = tokenizer.eos_token or placeholder
    vision = Vision(processor, placeholder, int(ids[0]))
    try:
        vision.text_of(448, 336)
    except Exception as error:  # whatever a processor raises on an empty picture, it cannot be used
        raise ModelError(f"model folder {folder}: its processor, {type(processor).__name__}, does not tell what an image "
                         f"becomes ({type(error).__name__}: {str(error)[:200]}).") from error
    return vision


REMEDY = ("A vision-language model needs preprocessor_config.json or processor_config.json beside its tokenizer: copy them "
          "from the model's repository, or write them with AutoProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER).")


def _processor(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ModelError(f"model folder {folder}: a vision-language model without a processor. {REMEDY}")
    try:
        with _quiet():
            processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # it raises what its parts raise
        if "orchvision" not in str(error) and "_extra_content" not in str(error):
            raise ModelError(f"model folder {folder}: the processor does not load ({type(error).__name__}: "
                             f"{str(error)[:300]}). {REMEDY}") from error
        processor = _without_video(folder, trust_remote_code, error)
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"model folder {folder}: AutoProcessor gives a {type(processor).__name__}, which is no processor: the "
                         f"model would be trained as if there were no images. {REMEDY} (`processor_class` in them must be one "
                         "that this transformers knows.)")
    return processor


def _quiet() -> Any:
    """transformers tells at length that it takes image processors that work without torchvision."""
    import contextlib

    from transformers.utils import logging

    @contextlib.contextmanager
    def quiet() -> Any:
        before = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(before)

    return quiet()


def _without_video(folder: Path, trust_remote_code: bool, reason: Exception) -> Any:
    """The folder's processor, with image processor and tokenizer only. Raises ModelError."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            kind = PROCESSOR_MAPPING[type(config)]
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            image_processor = AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            own, _ = kind.get_processor_dict(str(folder))
            taken = inspect.signature(kind.__init__).parameters
            own = {k: v for k, v in own.items() if not isinstance(v, dict) and k in taken}
            template = own.pop("chat_template", None) or tokenizer.chat_template
            processor = _image_only(kind)(image_processor, tokenizer, chat_template=template, **own)
    except Exception as error:  # as above; the first reason is the one to mend
        raise ModelError(f"model folder {folder}: the processor does not load ({str(reason).strip()[:200]}), nor without its "
                         f"video part ({type(error).__name__}: {str(error)[:200]}). Install torchvision.") from error
    return processor


def _image_only(kind: type) -> Any:
    """A processor class whose only parts are the image processor and the tokenizer.

    The parts of a processor are those that its __init__ names; what the class's own __init__ hands on beyond them is dropped.
    SmolVLM's wants num2words, with which it spells the number of a video's frames.
    """
    module = sys.modules[kind.__module__]

    class ImageOnly(kind):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **own: Any) -> None:
            spelling = getattr(module, "num2words", str)
            if spelling is None:
                module.num2words = str  # type: ignore[attr-defined] # asked for by its __init__ alone, put back at once
            try:
                super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **own)
            finally:
                if spelling is None:
                    module.num2words = None  # type: ignore[attr-defined] # as above

    ImageOnly.__name__ = ImageOnly.__qualname__ = kind.__name__
    return ImageOnly


@dataclass
class Vision:
    """What images become. `placeholder` is what the chat template writes for one, `placeholder_id` its token."""

    processor: Any
    placeholder: str
    placeholder_id: int
    _texts: dict[tuple[int, int], str] = field(default_factory=dict)
    _alike: dict[str, str] = field(default_factory=dict)  # of a hundred thousand sizes: few texts, of a kilobyte and more each
    _counts: dict[str, int] = field(default_factory=dict)
    _pixels: OrderedDict[tuple[Any, ...], dict[str, Tensor]] = field(default_factory=OrderedDict)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def chat_template(self) -> str | None:
        """The processor's, or the tokenizer's."""
        own = getattr(self.processor, "chat_template", None)
        own = own.get("default") if isinstance(own, dict) else own
        return own or self.tokenizer.chat_template

    @functools.cached_property
    def hash(self) -> str:
        """Of what decides how an image becomes tokens and numbers: the processor's own settings."""
        return digest([type(self.processor).__name__, self.placeholder, _settings(self.processor.image_processor),
                       {k: v for k, v in sorted(vars(self.processor).items()) if isinstance(v, (int, float, str, bool))
                        and k not in ("chat_template", "name_or_path")}])

    @property
    def image_ids(self) -> frozenset[int]:
        """Tokens that stand for an image's, a video's or a sound's content: no row's text may hold one."""
        named = (*self.processor.image_token_ids, *self.processor.video_token_ids, *self.processor.audio_token_ids)
        known = [i for i in named if isinstance(i, int)]
        content = getattr(self.tokenizer, "image_token_id", None)  # Gemma: the placeholder begins what it becomes
        return frozenset([self.placeholder_id, *known, *([content] if isinstance(content, int) else [])])

    @property
    def factor(self) -> int:
        """Pixels: sides are rounded to multiples of it before the model sees them; 1 where a family does otherwise."""
        image = self.processor.image_processor
        patch, merge = getattr(image, "patch_size", None), getattr(image, "merge_size", None)
        return patch * merge if isinstance(patch, int) and isinstance(merge, int) else 1

    @property
    def _own_cap(self) -> int | None:
        """The pixels at which a family that rounds sides scales down by itself."""
        size = getattr(self.processor.image_processor, "size", None) or {}
        own = size.get("longest_edge") if self.factor > 1 else None
        return own if isinstance(own, int) else None

    def check_cap(self, max_pixels: int) -> None:
        """Raises RecipeError for a cap below what the processor scales small images up to."""
        least = (getattr(self.processor.image_processor, "size", None) or {}).get("shortest_edge") if self.factor > 1 else None
        if isinstance(least, int) and max_pixels < 4 * least:
            raise RecipeError(f"mixture.images.max_pixels: {max_pixels:,}, and this model's processor scales images up to at "
                              f"least {least:,} pixels, so a cap near that changes pictures and spares little. Wanted "
                              f"four times as many ({4 * least:,}) or more, or null.")

    def text_of(self, width: int, height: int) -> str:
        """What stands in the conversation for an image of this size."""
        if (width, height) not in self._texts:
            text = (self.placeholder * self._foretold(width, height) if self._foretells else self._found_out(width, height))
            self._texts[width, height] = self._alike.setdefault(text, text)
        return self._texts[width, height]

    def _found_out(self, width: int, height: int) -> str:
        """By preparing an image of this size."""
        from PIL import Image

        kwargs = self.processor._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs)["images_kwargs"]
        _, texts = self.processor._process_images([[Image.new("RGB", (width, height))]], **kwargs)
        return str(texts[0])

    def _foretold(self, width: int, height: int) -> int:
        """As the processor tells inference servers, which want no image for it."""
        return int(self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0])

    @functools.cached_property
    def _foretells(self) -> bool:
        """Whether what it tells is what it does, for images of some shapes: preparing one large image takes seconds."""
        try:
            return all(self.placeholder * self._foretold(*size) == self._found_out(*size) for size in PROBES)
        except Exception:  # a processor that does not tell, or tells of otherwise
            return False

    def tokens(self, width: int, height: int) -> int:
        """How many tokens stand for an image of this size, its frame included."""
        text = self.text_of(width, height)
        if text not in self._counts:
            self._counts[text] = len(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        return self._counts[text]

    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens stand for the content of an image of this size (width, height), its frame left aside."""
        ids = self.tokenizer.encode(self.text_of(*size), add_special_tokens=False, verbose=False)
        return sum(token in self.image_ids for token in ids)

    def capped(self, width: int, height: int, max_pixels: int) -> tuple[int, int] | None:
        """The size that an image is scaled to under a cap; None: it fits.

        Where a family rounds sides to a factor, it is the size that its own processor takes with this `max_pixels` (and
        rounding is counted: 784 x 784 is a cap of 784 image tokens for Qwen2-VL); elsewhere the largest of the same shape.
        """
        factor, own = self.factor, self._own_cap
        if own is not None and own <= max_pixels:
            return None  # the processor scales it down further, and once is enough
        if round(height / factor) * factor * round(width / factor) * factor <= max_pixels:  # 0 for a strip, as there: it fits
            return None
        shrink = math.sqrt(width * height / max_pixels)
        fitted = [max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)]
        return fitted[0], fitted[1]

    def check(self, text: str, images: Sequence[Any], input_ids: np.ndarray) -> None:
        """Hold a row to the processor itself. Raises ModelError.

        Args:
            text: the conversation with placeholders.      images: PIL, in their order.
            input_ids: int [n], what we made of it.
        """
        with _quiet():
            theirs = self.processor(text=[text], images=[list(images)], add_special_tokens=False)["input_ids"][0]
        if [int(t) for t in theirs] != [int(t) for t in input_ids]:
            count = f"{len(images)} images" if len(images) > 1 else "one image"
            raise ModelError(f"{type(self.processor).__name__} makes other tokens of a row with {count} than follow from the "
                             f"text that it gives for each alone: {len(theirs)} against {len(input_ids)}. With it, rows "
                             f"with {count} cannot be trained on here: leave them out.")

    def inputs(self, images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """What the model's forward takes beside tokens, for rows of PIL images; rows without any are skipped."""
        shown = [list(row) for row in images if row]
        if not shown:
            return {}
        texts = [self.placeholder * len(row) for row in shown]
        with _quiet():  # else a batch of many images is said to be longer than the model takes
            made = self.processor(text=texts, images=shown, return_tensors="pt", padding=True)
        return {name: value for name, value in made.items() if name not in TEXT_INPUTS and isinstance(value, Tensor)}

    def stored_inputs(self, images: Sequence[Sequence[StoredImage]]) -> dict[str, Tensor]:
        """As `inputs`, of stored images; the last ones are kept in memory."""
        shown = [row for row in images if row]
        if not shown:
            return {}
        key = tuple(tuple(image_hash(image) for image in row) for row in shown)  # a file may be made again under its name
        if key not in self._pixels:
            self._pixels[key] = self.inputs([[open_image(read_image(image)) for image in row] for row in shown])
            while len(self._pixels) > 1 and _bytes(self._pixels) > CACHE_BYTES:
                self._pixels.popitem(last=False)
        self._pixels.move_to_end(key)
        return self._pixels[key]

    def token_types(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """0 for text and 1 for images [B, S], under the name by which this model wants it; nothing where it does not."""
        wanted = [n for n in ("mm_token_type_ids", "token_type_ids") if n in _forward_names(model.forward.__func__)]
        if not wanted or not self.processor.return_mm_token_type_ids:
            return {}
        types = self.processor.create_mm_token_type_ids(input_ids.tolist())
        return {wanted[0]: torch.tensor(types, dtype=torch.int64, device=input_ids.device)}


def _bytes(cache: OrderedDict[tuple[Any, ...], dict[str, Tensor]]) -> int:
    return sum(tensor.nbytes for made in cache.values() for tensor in made.values())


@functools.cache
def _forward_names(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _settings(image_processor: Any) -> Any:
    """An image processor's settings without names of classes and files, which differ by what is installed."""
    kind = type(image_processor).__name__.removesuffix("Fast").removesuffix("Pil")
    plain = json.loads(json.dumps(image_processor.to_dict(), default=str, sort_keys=True))
    return [kind, {k: v for k, v in plain.items() if not k.endswith(("_type", "_class", "_path")) and not k.startswith("_")}]
