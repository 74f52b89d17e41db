"""Trainer tokens/s against a bare PyTorch loop on the same rows in the same order, interleaved in one process.

    python benchmarks/trainer_cost.py --data P3 --model P3_BASE

Both do AdamW on float32 weights, clip at 1.0, the same batch and padding. The bare loop multiplies by the output head
only where the loss is taken.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from anabranch import branches
from anabranch.mixture import build_mixture
from anabranch.model import batches, can_select, device, keep_buffers, load_model, load_tokenizer, response_losses
from anabranch.plan import make_plan
from anabranch.recipe import load_recipe
from anabranch.rows import Rows
from machine import peak_mb, record
from p3 import write_recipe


def bare_loop(model_folder: Path, samples: list, batch_size: int) -> tuple[float, int]:
    """(seconds, tokens) of one pass, rows in the order that the branch would shuffle them."""
    model = load_model(model_folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    everything = Rows.of([(rows.row(int(i))[0].tolist(), rows.row(int(i))[1].tolist())
                          for _, rows, chosen in samples for i in chosen])
    order = np.random.default_rng(0).permutation(len(everything))
    select, tokens, start = can_select(model), 0, time.perf_counter()
    for first in range(0, len(order), batch_size):
        for batch in batches(everything, order[first : first + batch_size], 10**9, device()):
            losses, _ = response_losses(model, batch, select=select)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += batch.tokens
    return time.perf_counter() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    keep_buffers()
    runs: dict[str, list[float]] = {"bare": [], "trainer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = load_recipe(write_recipe(
            folder / "recipe.yaml", args.data.resolve(), args.model.resolve(), folder / "run",
            mixture={"max_samples": 3}, evaluate={"retention": "none", "transfer": []},
            train={"train_sampling_strategy": "random"}))
        mixture = build_mixture(recipe, load_tokenizer(args.model), folder / "mixture", base_hash="benchmark")
        plan = make_plan("joint", {u.name: 0 for u in mixture.units}, 1, mixture, 0, {})
        samples = branches.branch_samples(plan, 0, mixture, folder / "mixture", 0)
        for round_ in range(args.rounds + 1):  # the first round warms up
            seconds, tokens = bare_loop(args.model, samples, 16)
            out = folder / "branch"
            shutil.rmtree(out, ignore_errors=True)
            took: list[float] = []
            original = branches._watch

            def timed(path: Path, original=original, took=took):  # the trainer's own loop, without its construction
                callback = original(path)
                callback.on_train_begin = lambda *a, **k: took.append(-time.perf_counter())
                callback.on_train_end = lambda *a, **k: took.append(time.perf_counter())
                return callback

            branches._watch = timed
            manifest = branches.train_branch(recipe, plan, 0, mixture, folder / "mixture", args.model, "benchmark", out)
            branches._watch = original
            assert manifest.tokens_seen == tokens, (manifest.tokens_seen, tokens)
            if round_:
                runs["bare"].append(tokens / seconds)
                runs["trainer"].append(tokens / sum(took))
    ratios = [b / t for b, t in zip(runs["bare"], runs["trainer"], strict=True)]
    record("trainer_cost", {"tokens_per_second": runs, "bare_over_trainer": ratios, "median": float(np.median(ratios)),
                            "tokens": tokens, "peak_mb": peak_mb()})


if __name__ == "__main__":
    main()
