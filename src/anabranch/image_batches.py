"""Rows with images as a trainer's batches: TRL would tokenise conversations anew, ours are tokenised already.

The dataset holds tokens, labels and the row's number; images are decoded and prepared when a batch is made, in the loader's
worker processes where the recipe asks for some (`train.dataloader_num_workers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.images import open_image
from anabranch.rows import StoredImage, read_image
from anabranch.vision import Vision

ROW = "row"


@dataclass(frozen=True)
class ImageBatches:
    """A collator: examples {input_ids, labels, row} -> what the model's forward takes, padded on the right.

    images  of every row of the dataset, in its order     like    an object of the model's class, without its weights
    A batch without any image has tokens alone, as for a language model.
    """

    vision: Vision
    images: Sequence[tuple[StoredImage, ...]]
    like: Any
    pad_token: int
    multiple: int | None = None

    @classmethod
    def of(cls, vision: Vision, images: Sequence[tuple[StoredImage, ...]], model: Any, multiple: int | None) -> ImageBatches:
        """For a loaded model. `multiple`: batches are padded to multiples of so many tokens."""
        tokenizer = vision.tokenizer
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        if pad in vision.image_ids:
            pad = 0
        return cls(vision, images, object.__new__(type(model)), int(pad), multiple)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(e["input_ids"]) for e in examples)
        if self.multiple:
            width = -(-width // self.multiple) * self.multiple
        ids = torch.full((len(examples), width), self.pad_token, dtype=torch.int64)
        labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[i, :length] = torch.as_tensor(example["input_ids"])
            labels[i, :length] = torch.as_tensor(example["labels"])
            attention[i, :length] = 1
        batch = {"input_ids": ids, "labels": labels, "attention_mask": attention}
        shown = [self.images[int(e[ROW])] for e in examples]
        if not any(shown):
            return batch
        pictures = [[open_image(read_image(image)) for image in row] for row in shown]
        return batch | self.vision.inputs(pictures) | self.vision.token_types(self.like, ids)
