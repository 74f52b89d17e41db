"""The demo's base: a tokenizer and a Qwen2-type model of 280,000 parameters, prepared on the spot.

    B  rows of a batch      S  padded length      n  positions that the loss is taken on

Preparation is plain text first (stories in the words of the tasks), then instructions among the text: every family of
the mixture *without the mixture's rows and without a cue that can be trusted*, answered now as one of its tasks wants
and now as another, and the transfer tasks as they should be. So, like a real instruction-tuned base, it knows a little
of everything, has something to lose (text, transfer), and is torn between the two sides of each conflict.

The loop here prepares a base; branches are trained elsewhere, by the user's trainer.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from anabranch.demo import tasks
from anabranch.errors import OutputError
from anabranch.rows import generator

VOCABULARY = 800
BASE_STEPS = 1800
TEXT_SHARE = 0.2  # of the steps: text alone
BATCH = 32
TRANSFER_SHARE = 1 / 3  # of the base's instructions
POOL = 16  # batches that are sorted by length together, so that each has little padding
PEAK_RATE = 4e-3
PREFERENCE = 0.3  # how often the base's instructions take a family's first task, over an even draw

TEMPLATE = """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>
' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '
' }}{% else %}{{ '<|' + m['role'] + '|>
' + m['content'] + '
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% endif %}"""
PAD, EOS = "<|pad|>", "<|eos|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True)
class Sample:
    """One row of the base's own training. Tokens from `start` on count in the loss."""

    tokens: list[int]
    start: int


AnySample = TypeVar("AnySample", bound=Sample)

def train_tokenizer(texts: list[str], *, template: str = TEMPLATE, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY entries; digits stand alone. Same texts, same tokenizer.

    Args:
        template: the chat template.
        special: tokens beside the roles' that text never holds.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, EOS, *ROLES, *special], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, chat_template=template,
                                   additional_special_tokens=[*ROLES, *special], model_max_length=256)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """An untrained model with random weights from `seed`; torch's own random state is left as it was."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
        initializer_range=0.06)  # the default of 0.02 is for wide models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "demo", "weights").integers(2**31)))
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    return model


def instruction_rows(seed: int, count: int, taken: set[str]) -> list[tasks.Row]:
    """Rows of the base's instruction phase; none has an input in `taken`.

    Two thirds are of the mixture's families: the cue is missing or a random one, and the answer follows a random task
    of the family, the first one rather more often. One third are of the transfer tasks, as they should be.
    """
    rng = generator(seed, "demo", "base")
    torn, sound = list(tasks.siblings().values()), [[task] for task in tasks.TRANSFER.values()]
    rows: list[tasks.Row] = []
    while len(rows) < count:
        kind = sound if rng.random() < TRANSFER_SHARE else torn
        family = kind[rng.integers(len(kind))]
        task = family[0 if rng.random() < PREFERENCE else rng.integers(len(family))]
        fields, wording = task.family.draw(rng), int(rng.integers(len(task.family.wordings)))
        if tasks.key(task.family, fields) in taken:
            continue
        cue = task.cue if len(family) == 1 else ["", *(t.cue for t in family)][rng.integers(len(family) + 1)]
        rows.append(tasks.row(task, fields, wording, cue=cue))
    return rows


def _samples(tokenizer: PreTrainedTokenizerFast, rows: list[tasks.Row]) -> list[Sample]:
    """Rows through the chat template; the loss counts the answer and its end."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0p"}, {"role": "assistant", "content": "\0c"}], tokenize=False)
    before, after = str(rendered).split("\0c")
    after = after[: after.index(EOS) + len(EOS)]
    heads = tokenizer([before.replace("\0p", r["prompt"]) for r in rows])["input_ids"]
    tails = tokenizer([r["completion"] + after for r in rows])["input_ids"]
    return [Sample(head + tail, len(head)) for head, tail in zip(heads, tails, strict=True)]


def batched(samples: list[AnySample], rng: np.random.Generator) -> Iterator[list[AnySample]]:
    """Every sample once, in batches of similar length."""
    for start in range(0, len(samples), BATCH * POOL):
        pool = sorted(samples[start: start + BATCH * POOL], key=lambda s: len(s.tokens))
        batches = [pool[i: i + BATCH] for i in range(0, len(pool), BATCH)]
        for i in rng.permutation(len(batches)):
            yield batches[i]


def _loss(model: Qwen2ForCausalLM, batch: list[Sample]) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the tokens that count. Right padding needs no mask: attention is causal."""
    width = max(len(s.tokens) for s in batch)
    ids = torch.full((len(batch), width), 0)
    counts = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, sample in enumerate(batch):
        ids[i, : len(sample.tokens)] = torch.tensor(sample.tokens)
        counts[i, max(sample.start, 1): len(sample.tokens)] = True
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, S, width of the model]
    logits = model.lm_head(hidden[:, :-1][counts[:, 1:]])  # [n, V]
    return F.cross_entropy(logits, ids[:, 1:][counts[:, 1:]])


def warmed(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up over 5 % of the steps, then a cosine to nothing; in (0, 1]."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _curriculum(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, taken: set[str],
                stories: list[str]) -> Iterator[list[Sample]]:
    """Batches of the whole preparation.

    First text alone, a quarter of it stories and the rest songs; then instructions, with one story to seven of them.
    """
    end, rng = [tokenizer.eos_token_id], generator(seed, "demo", "order")
    first = round(steps * TEXT_SHARE) * BATCH
    later = steps * BATCH - first
    told, answered = first // 4, later * 7 // 8
    texts = stories[: told + later - answered] + tasks.songs(seed, first - told)
    text = [Sample(t + end, 0) for t in tokenizer(texts)["input_ids"]]
    begin = text[:told] + text[told + later - answered:]
    rest = _samples(tokenizer, instruction_rows(seed, answered, taken)) + text[told: told + later - answered]
    for phase in (begin, rest):
        yield from batched([phase[i] for i in rng.permutation(len(phase))], rng)


def _step(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, batch: list[Sample], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    _loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def prepare_base(folder: Path, *, seed: int, taken: set[str], held_out_text: set[str], steps: int = BASE_STEPS,
                 progress: Callable[[str, int, int], None] | None = None) -> None:
    """Train the tokenizer and the model, and leave both in `folder` (which appears only when all is done).

    On one thread, whatever torch is set to: sums are taken in one order, so a machine repeats its bytes, and a model this
    small gains little from more.

    Args:
        folder: where the model goes, in the usual layout.
        seed: of the weights, the rows and their order.
        taken: keys (tasks.key) of inputs that the base must not see: the mixture's, training and held-out.
        held_out_text: stories that it must not see.
        steps: of BATCH rows; BASE_STEPS takes about 50 s on one core, fewer make a poorer base.
        progress: called with ("base", done, all).
    """
    wanted = steps * BATCH // 2 + len(held_out_text)  # more than the curriculum takes
    stories = [s for s in tasks.stories(seed, "base", wanted) if s not in held_out_text]
    tokenizer = train_tokenizer(stories[:1000] + tasks.vocabulary_text(seed))
    model = new_model(tokenizer, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for step, batch in enumerate(_curriculum(tokenizer, seed, steps, taken, stories)):
            _step(model, optimizer, batch, PEAK_RATE * warmed(step, steps))
            if progress is not None:
                progress("base", step + 1, steps)
    finally:
        torch.set_num_threads(threads)
    save_base(model.eval(), tokenizer, folder)


def save_base(model: PreTrainedModel, beside: Any, folder: Path) -> None:
    """A model and its tokenizer or processor; under a temporary name first, so that a folder called `folder` is whole."""
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        logging.disable_progress_bar()  # its bar would stand between the lines of ours
        model.save_pretrained(temporary)
        beside.save_pretrained(temporary)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:  # a full disk is the one or the other
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"cannot write {folder}: {error}. Free space or give another folder, then run the same "
                          "command again: finished parts are kept.") from error
