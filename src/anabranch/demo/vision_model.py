"""The picture demo's base: a LLaVA-type model of 370,000 parameters, with its tokenizer and processor, made on the spot.

    B  pictures or rows of a batch      S  padded length      n  positions that the loss is taken on      C  cells of a picture

As of its big sisters, the vision tower is prepared first and by itself: from each patch of a picture it learns to tell what
stands there, in which colour and where. It then stays as it is, and projector and language model learn together: first text
and descriptions of pictures, then instructions among them, by the rule of model.py: every family of the mixture *without the
mixture's rows and without a cue that can be trusted*, answered now as one of its tasks wants and now as the other, and the
transfer tasks as they should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from anabranch.demo import picture_tasks, tasks
from anabranch.demo.model import EOS, Sample, batched, save_base, train_tokenizer, warmed
from anabranch.demo.pictures import CELL, DIGITS, GRID, PAINT, SHAPES, SIDE, drawn, marks_of, scene
from anabranch.rows import generator

IMAGE = "<image>"
IMAGE_TOKENS = GRID * GRID  # a patch is a cell
TOWER_STEPS, BASE_STEPS = 400, 2200
TOWER_BATCH, BATCH = 64, 32
FIRST_SHARE = 0.25  # of the steps: text and descriptions alone
LATER_TEXT, LATER_DESCRIPTIONS = 0.1, 0.12  # of the rows behind that
TRANSFER_SHARE = 1 / 3  # of the instructions
PREFERENCE = 0.3  # how often they take a family's first task, over an even draw
TOWER_RATE, PEAK_RATE = 2e-3, 3e-3
MARKS, COLOURS = ["nothing", *SHAPES, *DIGITS], ["nothing", *PAINT]

# Content comes as text, or as a list of parts: {type: image}, {type: text, text: ..}
TEMPLATE = """{%- macro said(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}{{ '<image>
' if part['type'] == 'image' else part['text'] }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- for m in messages -%}{{ '<|' + m['role'] + '|>
' }}{%- if m['role'] == 'assistant' -%}{%- generation -%}{{ said(m['content']) + eos_token }}{%- endgeneration -%}
{%- else -%}{{ said(m['content']) }}{%- endif -%}{{ '
' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>
' }}{%- endif -%}"""


@dataclass(frozen=True)
class Seen(Sample):
    """A row of the base's own training; `picture` (written) is None where it shows none."""

    picture: str | None = None


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """An untrained model with random weights from `seed`; torch's own random state is left as it was."""
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06)  # the default of 0.02 is for wide models
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                              projection_dim=64, image_size=SIDE, patch_size=CELL, initializer_range=0.06)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
                         image_seq_length=IMAGE_TOKENS, vision_feature_layer=-1, tie_word_embeddings=True, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "demo", "picture weights").integers(2**31)))
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    return model


def new_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """What a user's program loads: pictures are taken as they are if they have SIDE pixels a side, else scaled."""
    sides = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(size=sides, crop_size=sides, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(pictures, tokenizer, patch_size=CELL, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, chat_template=TEMPLATE, image_token=IMAGE)


def pixels(pictures: list[str]) -> torch.Tensor:
    """Written pictures as the processor gives them, float32 [B, 3, SIDE, SIDE] in [-1, 1]; faster, as nothing is scaled."""
    numbers = np.stack([np.asarray(drawn(p)) for p in pictures]).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(numbers)).float() / 127.5 - 1


# ---- the vision tower ------------------------------------------------------------------------------------------------


def _prepare_tower(tower: nn.Module, seed: int, steps: int, progress: Callable[[str, int, int], None] | None) -> None:
    """Patches learn to tell, to a linear layer that is then dropped, what is there, its colour and the cell itself."""
    rng, cells = generator(seed, "demo", "tower"), GRID * GRID
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        head = nn.Linear(64, len(MARKS) + len(COLOURS) + cells)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TOWER_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(steps):
        pictures = [scene(rng) for _ in range(TOWER_BATCH)]
        seen = head(tower(pixels(pictures)).last_hidden_state[:, 1:]).flatten(0, 1)  # [B*C, ..]; the first is the class token
        what, colour, cell = seen.split([len(MARKS), len(COLOURS), cells], dim=1)
        marks, colours = _labels(pictures)
        loss = (F.cross_entropy(what, marks) + F.cross_entropy(colour, colours)
                + F.cross_entropy(cell, torch.arange(cells).repeat(TOWER_BATCH)))
        _update(loss, optimizer, parameters, TOWER_RATE * warmed(step, steps))
        if progress is not None:
            progress("vision tower", step + 1, steps)


def _labels(pictures: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the mark and of the colour in each cell, [B*C]."""
    what = torch.zeros((len(pictures), GRID * GRID), dtype=torch.long)
    colour = torch.zeros_like(what)
    for i, picture in enumerate(pictures):
        for mark in marks_of(picture):
            cell = mark.row * GRID + mark.column
            what[i, cell], colour[i, cell] = MARKS.index(mark.what), COLOURS.index(mark.colour)
    return what.flatten(), colour.flatten()


# ---- rows ------------------------------------------------------------------------------------------------------------


def instruction_rows(seed: int, count: int, taken: set[str]) -> list[tasks.Row]:
    """Rows of the base's instruction phase; none has an input in `taken`.

    Two thirds are of the mixture's families: the cue is missing or a random one, and the answer follows a random task of the
    family, the first one rather more often. One third are of the transfer tasks, as they should be.
    """
    rng = generator(seed, "demo", "picture base")
    torn, sound = list(picture_tasks.siblings().values()), [[task] for task in picture_tasks.TRANSFER.values()]
    rows: list[tasks.Row] = []
    while len(rows) < count:
        kind = sound if rng.random() < TRANSFER_SHARE else torn
        family = kind[rng.integers(len(kind))]
        task = family[0 if rng.random() < PREFERENCE else rng.integers(len(family))]
        fields, wording = task.family.draw(rng), int(rng.integers(len(task.family.wordings)))
        if tasks.key(task.family, fields) in taken:
            continue
        cue = task.cue if len(family) == 1 else ["", *(t.cue for t in family)][rng.integers(len(family) + 1)]
        rows.append(picture_tasks.row(task, fields, wording, cue=cue))
    return rows


def description_rows(seed: int, count: int, taken: set[str]) -> list[tasks.Row]:
    """All that is in a picture, told in reading order; none has an input in `taken`."""
    rng = generator(seed, "demo", "descriptions")
    families = [f[0].family for name, f in picture_tasks.siblings().items() if name.startswith(picture_tasks.SEEN)]
    rows: list[tasks.Row] = []
    while len(rows) < count:
        family = families[rng.integers(len(families))]
        fields = family.draw(rng)
        if tasks.key(family, fields) not in taken:
            rows.append({"prompt": "describe it", "completion": picture_tasks.describe(fields["picture"]),
                         "picture": fields["picture"]})
    return rows


def samples(tokenizer: PreTrainedTokenizerFast, rows: list[tasks.Row]) -> list[Seen]:
    """Rows as the chat template writes them, images expanded; the loss counts the answer and its end."""
    rendered = str(tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0p"}, {"role": "assistant", "content": "\0c"}], tokenize=False, chat_template=TEMPLATE))
    before, after = rendered.split("\0c")
    after = after[: after.index(EOS) + len(EOS)]
    shown = IMAGE * IMAGE_TOKENS + "\n"
    heads = tokenizer([before.replace("\0p", (shown if "picture" in r else "") + r["prompt"]) for r in rows])["input_ids"]
    tails = tokenizer([r["completion"] + after for r in rows])["input_ids"]
    return [Seen(head + tail, len(head), r.get("picture")) for head, tail, r in zip(heads, tails, rows, strict=True)]


def _curriculum(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, taken: set[str],
                stories: list[str]) -> Iterator[list[Seen]]:
    """Batches of the whole preparation: text and descriptions, then instructions among them."""
    end, rng = [tokenizer.eos_token_id], generator(seed, "demo", "picture order")
    first = round(steps * FIRST_SHARE) * BATCH
    later = steps * BATCH - first
    told, described = round(later * LATER_TEXT), round(later * LATER_DESCRIPTIONS)
    texts = stories[: first // 8 + told] + tasks.songs(seed, first // 2 - first // 8)
    text = [Seen(t + end, 0) for t in tokenizer(texts)["input_ids"]]
    descriptions = samples(tokenizer, description_rows(seed, first - first // 2 + described, taken))
    begin = text[told:] + descriptions[described:]
    rest = text[:told] + descriptions[:described] + samples(
        tokenizer, instruction_rows(seed, later - told - described, taken))
    for phase in (begin, rest):
        yield from batched([phase[i] for i in rng.permutation(len(phase))], rng)


# ---- training --------------------------------------------------------------------------------------------------------


def batch_loss(model: LlavaForConditionalGeneration, batch: list[Seen]) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the tokens that count. Right padding needs no mask: attention is causal."""
    width = max(len(s.tokens) for s in batch)
    ids = torch.full((len(batch), width), 0)
    counts = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, sample in enumerate(batch):
        ids[i, : len(sample.tokens)] = torch.tensor(sample.tokens)
        counts[i, max(sample.start, 1): len(sample.tokens)] = True
    shown = [s.picture for s in batch if s.picture is not None]
    hidden = model.model(input_ids=ids, pixel_values=pixels(shown) if shown else None, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][counts[:, 1:]])  # [n, V]
    return F.cross_entropy(logits, ids[:, 1:][counts[:, 1:]])


def _update(loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def prepare_base(folder: Path, *, seed: int, taken: set[str], held_out_text: set[str], steps: int = BASE_STEPS,
                 tower_steps: int = TOWER_STEPS, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Train tokenizer, vision tower, projector and language model, and leave all with a processor in `folder`, at the end.

    On one thread, whatever torch is set to, as model.prepare_base.

    Args:
        folder: where the model goes, in the usual layout.
        seed: of the weights, the rows and their order.
        taken: keys (tasks.key) of inputs that the base must not see: the mixture's, training and held-out.
        held_out_text: stories that it must not see.
        steps: of BATCH rows, behind the tower's: BASE_STEPS takes about 100 s on one core, fewer make a poorer base.
        tower_steps: of TOWER_BATCH pictures; 15 s.
        progress: called with ("vision tower" or "base", done, all).
    """
    wanted = steps * BATCH // 6 + len(held_out_text)  # more than the curriculum takes
    stories = [s for s in tasks.stories(seed, "picture base", wanted + 1000) if s not in held_out_text]
    tokenizer = train_tokenizer(stories[:1000] + picture_tasks.vocabulary_text(seed), template=TEMPLATE, special=[IMAGE])
    model = new_model(tokenizer, seed).train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tower = model.model.vision_tower
        _prepare_tower(tower, seed, tower_steps, progress)
        tower.requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        for step, batch in enumerate(_curriculum(tokenizer, seed, steps, taken, stories)):
            _update(batch_loss(model, batch), optimizer, parameters, PEAK_RATE * warmed(step, steps))
            if progress is not None:
                progress("base", step + 1, steps)
    finally:
        torch.set_num_threads(threads)
    save_base(model.eval(), new_processor(tokenizer), folder)
