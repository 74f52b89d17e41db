"""What does another tokenizer cost a model? Every method of `anabranch vocabulary`, in nats per byte of held-out text.

    python benchmarks/vocabulary.py --model shared/models/p3-base --data shared/data/p3 --work DIR      about 25 minutes, once

A small model with a byte-level BPE of 4,096 tokens is given tokenizers of 2,048 and 8,192 tokens (byte-level BPE) and of 4,096
(Unigram in the manner of sentencepiece, with byte fallback), all trained on the spot on the training text, together with donor
models of 2 layers and width 128 whose embeddings the methods map from. Each is compared on held-out text of the mixture, and
the model is moved there and back again. What is made is kept in DIR.

Scored text: test rows of the datasets; nothing is trained or chosen on them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from anabranch.model import keep_buffers
from anabranch.transplant.matrix import Settings
from anabranch.transplant.moving import compare_methods, losses, transplant_vocabulary
from machine import RESULTS, record
from p3 import TRANSFER

TOKENIZERS = {"bpe-2048": 2048, "bpe-8192": 8192, "unigram-4096": 4096}
SPECIAL = ["<|pad|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
LENGTH, ROWS, RATE = 256, 16, 3e-3
SMALL = ("Small: a model of 2.4 million parameters with tied embeddings of width 192; donors of about a million, trained for "
         "minutes on 1.2 million tokens, so that their embeddings are poor, and methods that map from them stand worse here "
         "than between models that were trained in earnest. One seed, one text; nothing is trained after the move.")


def texts(data: Path, side: str, most: int) -> list[str]:
    """Prompt and completion of rows of the mixture's datasets, the same number of characters of each dataset."""
    folders = [p for p in sorted(data.iterdir()) if p.is_dir() and p.name not in TRANSFER]
    found = []
    for folder in folders:
        rows, held = pq.read_table(folder / f"{side}.parquet").to_pylist(), 0
        for i in np.random.default_rng(0).permutation(len(rows)):
            if held > most / len(folders):
                break
            found.append(f"{rows[i]['prompt']} {rows[i]['completion']}")
            held += len(found[-1])
    return [found[i] for i in np.random.default_rng(1).permutation(len(found))]


def train_tokenizer(folder: Path, size: int, unigram: bool, sample: list[str]) -> None:
    """A tokenizer's files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if unigram:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
        trainer: Any = trainers.UnigramTrainer(vocab_size=size - 256, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>",
                                               show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sample, trainer)
    if unigram:  # the trainer knows no byte tokens
        content = json.loads(tokenizer.to_str())
        low = min(score for _, score in content["model"]["vocab"]) - 5
        content["model"]["vocab"] += [[f"<0x{b:02X}>", low] for b in range(256)]
        content["model"]["byte_fallback"] = True
        tokenizer = Tokenizer.from_str(json.dumps(content))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token="<|pad|>",
                            extra_special_tokens=SPECIAL[2:]).save_pretrained(folder)


def train_donor(folder: Path, sample: list[str], tokens: int) -> dict[str, float]:
    """A model of 2 layers and width 128, trained on so many tokens of the sample; written beside its tokenizer."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|eos|>")
    stream = [i for e in tokenizer.encode_batch(sample) for i in [*e.ids, end]]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=end, pad_token_id=tokenizer.token_to_id("<|pad|>")))
    steps = tokens // (LENGTH * ROWS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1, pct_start=0.05)
    begun, last = time.monotonic(), math.nan
    for step, batch in zip(range(steps), _batches(stream), strict=False):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        last = float(loss.detach())
        if step % 50 == 0:
            print(folder.name, step, steps, round(last, 3), f"{time.monotonic() - begun:.0f} s", flush=True)
    model.save_pretrained(folder)
    return {"tokens": steps * LENGTH * ROWS, "last_loss_per_token": round(last, 3), "seconds": round(time.monotonic() - begun)}


def _batches(stream: list[int]) -> Iterator[torch.Tensor]:
    rows = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    epoch = 0
    while True:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        yield from (rows[part] for part in order.split(ROWS) if len(part) == ROWS)
        epoch += 1


def donor(work: Path, name: str, data: Path, tokens: int) -> tuple[Path, dict[str, float]]:
    """A donor's folder, made where it is not there, and what its training was."""
    folder = work / name
    if not (folder / "donor.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(folder, TOKENIZERS[name], name.startswith("unigram"), texts(data, "train", 6_000_000))
        trained = train_donor(folder, texts(data, "train", 6_000_000), tokens)
        (folder / "donor.json").write_text(json.dumps(trained))
    return folder, json.loads((folder / "donor.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_200_000, help="that each donor is trained on")
    parser.add_argument("--bytes", type=int, default=100_000, help="of held-out text that is scored")
    parser.add_argument("--only", choices=list(TOKENIZERS), help="make this donor, and stop")
    args = parser.parse_args()
    keep_buffers()
    if args.only:
        print(donor(args.work, args.only, args.data, args.tokens))
        return
    held_out = texts(args.data, "test", 4 * args.bytes)
    figures: dict[str, Any] = {"model": args.model.name, "small": SMALL, "donors": {}}
    for name in TOKENIZERS:
        folder, trained = donor(args.work, name, args.data, args.tokens)
        print(name, trained, flush=True)
        figures["donors"][name] = {"trained": trained, **moved(args.model, folder, held_out, args.bytes),
                                   "round_trip": there_and_back(args.model, folder, args.work / f"{name}-moved", held_out,
                                                                args.bytes)}
    record("vocabulary", figures)
    (RESULTS / "vocabulary.md").write_text(page(figures))


def moved(model: Path, donor_folder: Path, held_out: list[str], size: int) -> dict[str, Any]:
    """Every method's loss on the same text."""
    begun = time.monotonic()
    before, ranked = compare_methods(str(model), str(donor_folder), held_out, most=size,
                                     tell=lambda name: print(name, flush=True))
    return {"before": asdict(before), "seconds": round(time.monotonic() - begun), "counts": ranked[0].report["embed"],
            "ranked": [{"name": one.name, "nats_per_byte": round(one.loss.nats_per_byte, 4)} if one.loss is not None else
                       {"name": one.name, "skipped": one.skipped} for one in ranked]}


def there_and_back(model: Path, donor_folder: Path, moved_to: Path, held_out: list[str], size: int) -> dict[str, float]:
    """The model moved to the donor's tokenizer by sub-words, and from there back to its own; loss of each."""
    settings = Settings(method="subword")
    transplant_vocabulary(str(model), str(donor_folder), moved_to, settings)
    there, back = losses(str(moved_to), str(model), held_out, settings, most=size)
    return {"there": round(there.nats_per_byte, 4), "back": round(back.nats_per_byte, 4)}


def page(figures: dict[str, Any]) -> str:
    """The figures for a reader."""
    lines = ["# What another tokenizer costs", "", SMALL, "",
             "Nats per byte of held-out text, lower is better, and how much more than the model as it is. `k` is 64.", ""]
    for name, one in figures["donors"].items():
        before, counts = one["before"], one["counts"]
        lines += [f"## {name}", "",
                  f"As it is: {before['nats_per_byte']:.4f} over {before['bytes']:,} bytes. {counts['exact']:,} tokens are the "
                  f"model's own, {counts['approximated']:,} are made. Donor: "
                  f"{one['trained']['last_loss_per_token']} nats per token after {one['trained']['tokens']:,} tokens.", "",
                  "| method | nats per byte | |", "|---|---|---|"]
        lines += [f"| {row['name']} | {row['nats_per_byte']:.4f} | {row['nats_per_byte'] - before['nats_per_byte']:+.4f} |"
                  if "nats_per_byte" in row else f"| {row['name']} | not tried | {row['skipped']} |" for row in one["ranked"]]
        trip = one["round_trip"]
        lines += ["", f"There by sub-words {trip['there']:.4f}, and back again {trip['back']:.4f}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
