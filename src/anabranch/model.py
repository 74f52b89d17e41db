"""The base model: where it lies, how it loads, which parameters train, and its loss on response tokens.

    B  rows of a batch      S  padded length      n  response tokens of the batch      V  vocabulary

Gradients, branches and evaluation all take the loss defined here: the sum of negative log-likelihoods (nats)
over response tokens, divided where a mean is wanted by the number of those tokens (what the trainer minimises).

A vision-language model is loaded as one, and its rows' images are decoded and prepared when the loss of their batch is taken.
"""

from __future__ import annotations

import ctypes
import fnmatch
import gc
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anabranch.engine.fetch import resolve
from anabranch.errors import ModelError
from anabranch.families import frozen_names, saved_tensors
from anabranch.recipe import Model as ModelSection
from anabranch.rows import Rows, StoredImage
from anabranch.vision import Vision, load_vision, model_class

LOGITS_AT_ONCE = 2**28  # numbers; 1 GB in float32


def keep_buffers() -> None:
    """Tell glibc to keep freed memory. Training reallocates the same sizes every step, and fresh pages are slow."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 2_000_000_000)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2_147_483_647)  # M_TRIM_THRESHOLD
        except OSError:  # another C library: nothing to tune
            return


def resolve_model(section: ModelSection) -> Path:
    """The folder of the base: as given, or downloaded from the Hub (safetensors and text files only).

    Raises:
        ModelError: no such folder and not to be had from the Hub; or a folder without weights, config or tokenizer.
    """
    folder = Path(section.path)
    if not folder.is_dir():
        try:
            folder = resolve(section.path, section.revision)
        except ModelError as error:
            raise ModelError(f"model.path: {error}") from error
    missing = [name for name, found in (
        ("config.json", (folder / "config.json").is_file()),
        ("weights (*.safetensors)", any(folder.glob("*.safetensors"))),
        ("tokenizer (tokenizer.json or tokenizer_config.json)",
         any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json"))),
    ) if not found]
    if missing:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        hint = (f" It has {', '.join(pickles)}: pickled weights are refused, because loading them can run code; "
                "convert them with save_pretrained.") if pickles else ""
        raise ModelError(f"model folder {folder}: no {', no '.join(missing)}. Wanted a folder as save_pretrained "
                         f"writes it.{hint}")
    return folder


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"model folder {folder}: the tokenizer does not load ({str(error)[:300]}).") from error


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: Path, dtype: str = "float32", *, trust_remote_code: bool = False) -> Any:
    """A causal or a vision-language model in evaluation mode (no dropout) on the first accelerator, or the CPU.

    Raises:
        ModelError: the weights do not fit the config, or the architecture wants code of its own.
    """
    from transformers.utils import logging

    # transformers' own loading bars would stand between the lines of ours
    logging.disable_progress_bar()
    kind = model_class(folder)
    try:
        model = kind.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        sort = "vision-language" if "ImageText" in kind.__name__ else "causal language"
        raise ModelError(f"model folder {folder}: does not load as a {sort} model "
                         f"({type(error).__name__}: {str(error)[:300]}).") from error
    model.anabranch_origin = (folder, trust_remote_code)
    return model.to(device()).eval()


def vision_of(model: Any) -> Vision | None:
    """The processor of a model that `load_model` loaded, read when it is first asked for; None: a language model.

    Raises:
        ModelError: a vision-language model without a usable processor.
    """
    if not hasattr(model, "anabranch_vision"):
        folder, trust = getattr(model, "anabranch_origin", (None, False))
        model.anabranch_vision = load_vision(folder, trust_remote_code=trust) if folder is not None else None
    vision: Vision | None = model.anabranch_vision
    return vision


def select_trainable(model: Any, section: ModelSection) -> dict[str, nn.Parameter]:
    """Freeze what does not train and return the rest by name, in the model's order.

    With LoRA and no pattern of its own, the conflict is measured on what the adapters sit on: the weights of the
    linear layers, without the output head. What `freeze` names is taken away from either.

    Raises:
        ModelError: no parameter matches, a part to freeze is not there, or nothing is left.
    """
    frozen = frozen_names(model, section)
    names = [name for name, _ in model.named_parameters()]
    if section.lora is not None and section.trainable == ["*"]:
        head = model.get_output_embeddings()
        targets = section.lora.get("target_modules", "all-linear")
        wanted = {f"{name}.weight" for name, module in model.named_modules()
                  if isinstance(module, nn.Linear) and module is not head and _is_target(name, targets)}
    else:
        wanted = {n for n in names if any(fnmatch.fnmatchcase(n, p) for p in section.trainable)}
        idle = [p for p in section.trainable if not any(fnmatch.fnmatchcase(n, p) for n in names)]
        if idle:
            raise ModelError(f"model.trainable: no parameter matches {', '.join(idle)}. Names look like "
                             f"{', '.join(names[:3])}, .., {names[-1]}; patterns use * and ?.")
    wanted -= frozen
    if not wanted and frozen:
        raise ModelError(f"model.freeze: {', '.join(section.freeze)} leave no parameter to train.")
    if not wanted:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError("model.lora.target_modules: no linear layer of this model is meant, so no adapter would train. Leave "
                         f"it out (all linear layers), or name some of: {', '.join(linear)}")
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            chosen[name] = parameter
    return chosen


def _is_target(name: str, targets: str | list[str]) -> bool:
    """Whether peft would put an adapter on a linear layer: all of them, by a pattern, or by the end of the name."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def check_saved_names(model: Any, folder: Path) -> None:
    """Branches are saved by transformers; their tensors must have the names that the base's files have.

    Raises:
        ModelError: they would not (old checkpoints without a prefix, or with buffers that are no longer saved); told
            before anything is trained, because a merge of such branches would be refused.
    """
    with_names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            with_names |= set(file.keys())
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    loaded = set(model.state_dict())
    if with_names - tied == loaded - tied:
        return
    foretold, repeats = saved_tensors(model)
    if foretold - repeats <= with_names <= foretold:
        return
    with tempfile.TemporaryDirectory() as scratch:  # transformers renames some on saving: only saving tells
        model.save_pretrained(scratch)
        saved = set()
        for path in Path(scratch).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                saved |= set(file.keys())
    if saved - tied != with_names - tied:
        strange = sorted((saved ^ with_names) - tied)
        raise ModelError(f"model folder {folder}: its tensors are named otherwise than transformers saves them "
                         f"({', '.join(strange[:4])}{', ..' if len(strange) > 4 else ''}), so no trained branch could be "
                         "merged with it. Write it anew once, and give that folder: "
                         f"{type(model).__name__}.from_pretrained(OLD).save_pretrained(NEW), and the tokenizer likewise.")


def release_memory() -> None:
    """Give an accelerator's cached memory back: branches train in processes of their own on the same device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest. `rows` are their numbers in the unit."""

    rows: np.ndarray
    input_ids: Int[Tensor, "B S"]
    attention_mask: Int[Tensor, "B S"]
    response: Bool[Tensor, "B S"]
    images: tuple[tuple[StoredImage, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int(self.attention_mask.sum())


def batches(rows: Rows, indices: np.ndarray, batch_tokens: int, where: torch.device) -> Iterator[Batch]:
    """Length-bucketed batches of at most `batch_tokens` padded tokens (one row may exceed it), shortest first.

    Sorting by length costs no accuracy (the sum does not depend on the order) and saves most of the padding.
    """
    order = indices[np.argsort(rows.lengths[indices], kind="stable")]
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end - start + 1) * int(rows.lengths[order[end]]) <= batch_tokens:
            end += 1
        yield padded(rows, order[start:end], where)
        start = end


def padded(rows: Rows, chosen: np.ndarray, where: torch.device) -> Batch:
    """The rows with these numbers as one batch."""
    width = int(rows.lengths[chosen].max())
    ids = np.zeros((len(chosen), width), dtype=np.int64)
    attention = np.zeros_like(ids)
    response = np.zeros(ids.shape, dtype=bool)
    for i, row in enumerate(chosen):
        tokens, mask = rows.row(int(row))
        ids[i, : len(tokens)] = tokens
        attention[i, : len(tokens)] = 1
        response[i, : len(tokens)] = mask
    response[:, 0] = False  # nothing predicts a row's first token
    return Batch(chosen, torch.from_numpy(ids).to(where), torch.from_numpy(attention).to(where),
                 torch.from_numpy(response).to(where), tuple(rows.images_of(chosen)) if rows.images is not None else ())


def model_inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What the model's forward takes for a batch: tokens and mask, and what its images become.

    Raises:
        ModelError: rows with images, and a language model.
        CorruptedError: an image that is not the one the unit was made with.
    """
    tokens = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return tokens | image_inputs(model, batch.input_ids, batch.images)


def image_inputs(model: Any, input_ids: Int[Tensor, "B S"], images: Sequence[Sequence[StoredImage]]) -> dict[str, Tensor]:
    """What a forward pass takes beside tokens and mask, on the model's device; nothing for rows without images.

    Raises as `model_inputs`.
    """
    if not any(images):
        return {}
    vision = vision_of(model)
    if vision is None:
        raise ModelError("these rows show images, and the model is a language model. Give the vision-language model that "
                         "they were prepared for.")
    where, floats = input_ids.device, next(p.dtype for p in model.parameters() if p.is_floating_point())
    made = vision.stored_inputs(images)
    return {name: value.to(where, floats if value.is_floating_point() else value.dtype) for name, value in made.items()} | \
        vision.token_types(model, input_ids)


def check_vocabulary(highest: int, model: Any) -> None:
    """Raises ModelError if a token has no embedding: some tokenizers have more entries than their model."""
    entries = model.get_input_embeddings().num_embeddings
    if highest >= entries:
        raise ModelError(f"token {highest} has no embedding: the model has {entries} (0 .. {entries - 1}), its tokenizer "
                         "more. A row holds a special token that this model was never given. Take such rows out, or "
                         "resize the model's embeddings and save it.")


def response_losses(model: Any, batch: Batch, *, select: bool) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Negative log-likelihood (nats) of every response token, and the greedy token at its place.

    Args:
        select: multiply by the output head only where the loss is taken (see `can_select`): with short responses
            that spares most of a forward pass for a model with a large vocabulary.
    """
    check_vocabulary(int(batch.input_ids.max()), model)
    inputs = model_inputs(model, batch)
    targets = batch.input_ids[:, 1:][batch.response[:, 1:]]
    if select:
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        return _head_losses(model.get_output_embeddings(), hidden[:, :-1][batch.response[:, 1:]], targets)
    else:
        logits = model(**inputs, use_cache=False).logits
        logits = logits[:, :-1][batch.response[:, 1:]]
    logits = logits.float()
    return nn.functional.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1)


def _head_losses(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and greedy tokens, a piece at a time: logits of a whole batch can be larger than the model."""
    piece = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(targets) <= piece:
        return _piece_losses(head, hidden, targets)
    parts = [checkpoint(_piece_losses, head, h, t, use_reentrant=False)
             for h, t in zip(hidden.split(piece), targets.split(piece), strict=True)]
    return torch.cat([losses for losses, _ in parts]), torch.cat([greedy for _, greedy in parts])


def _piece_losses(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return nn.functional.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1)


def _image_tokens(config: Any) -> list[int]:
    """Tokens that a model replaces by an image, which it would look for."""
    named = [getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")]
    return [token for token in named if isinstance(token, int)]


@torch.no_grad()
def can_select(model: Any) -> bool:
    """Whether head(last hidden state) are this model's logits. Some scale or cap them afterwards: then we do not."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(model, "base_model"):
        return False
    where = next(model.parameters()).device
    ids = (torch.arange(6, device=where) * 7 % model.config.get_text_config().vocab_size)[None]
    ids = ids.where(~torch.isin(ids, torch.tensor(_image_tokens(model.config), device=where)), 1)
    hidden = model.base_model(input_ids=ids, use_cache=False)
    if not hasattr(hidden, "last_hidden_state"):
        return False
    ours, its = head(hidden.last_hidden_state).float(), model(input_ids=ids, use_cache=False).logits.float()
    return ours.shape == its.shape and bool(torch.allclose(ours, its, rtol=1e-3, atol=1e-3))
