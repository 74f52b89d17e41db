"""A tiny base and mixture that every pipeline test may copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

SHARED = Path(__file__).parents[2] / "shared"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
            "{% endgeneration %}{{ '\n' }}{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endif %}"
            "{% endfor %}")
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "cat", "dog", "bird", "fish", "up", "down",
         "left", "right", "first", "last", "yes", "no"]
TASKS: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda w: w, "reverse": lambda w: w[::-1], "first": lambda w: w[:1], "last": lambda w: w[-1:],
    "sorted": sorted, "double": lambda w: w + w}


def task_rows(task: str, count: int, offset: int = 0) -> list[dict[str, str]]:
    rows = []
    for i in range(offset, offset + count):
        words = [WORDS[(i * 7 + j * (3 + len(task)) + i // 5) % len(WORDS)] for j in range(2 + i % 3)]
        rows.append({"prompt": f"{task} {i} " + " ".join(words), "completion": " ".join(TASKS[task](words))})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-type model of some 20,000 random parameters in two shards, tied, with tokenizer and generation config."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [r["prompt"] + " " + r["completion"] for t in TASKS for r in task_rows(t, 30)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   model_max_length=128)
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        pad_token_id=fast.pad_token_id, eos_token_id=fast.eos_token_id))
    model.generation_config = GenerationConfig(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id)
    model.save_pretrained(folder, max_shard_size="60KB")
    fast.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def write_recipe(folder: Path, base: Path) -> Path:
    """Five units, one transfer unit, K = 2, a few steps; returns the recipe's path."""
    for task in list(TASKS)[:-1]:
        write_rows(folder / "data" / f"{task}.jsonl", task_rows(task, 24))
    write_rows(folder / "transfer" / "double.jsonl", task_rows("double", 8))
    recipe = {
        "model": {"path": str(base)},
        "mixture": {"sources": [{"path": "data/*.jsonl"}], "held_out": 0.2, "max_length": 100},
        "gradients": {"calibration_samples": 12, "size": 512},
        "split": {"method": "merit", "groups": 2},
        "train": {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 4},
        "evaluate": {"transfer": [{"path": "transfer/*.jsonl"}], "generate_samples": 2, "max_samples": 6},
        "output": "run", "seed": 3}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture()
def recipe_file(tmp_path: Path, tiny_base: Path) -> Path:
    return write_recipe(tmp_path, tiny_base)


def anabranch(*arguments: object, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "anabranch", *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, **options)  # type: ignore[call-overload] - passed on as given
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def here(*arguments: object, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As `anabranch`, but in the tests' own process, the jobs that it would start included: without seconds of imports each.

    What is no AnabranchError comes out of it as it is: nothing here makes a traceback of it.
    """
    from contextlib import chdir, redirect_stderr, redirect_stdout
    from io import StringIO
    from unittest import mock

    from anabranch import pilot
    from jobs_here import call, jobs_done_here, run_here

    command, out, err = [sys.executable, "-m", "anabranch", *map(str, arguments)], StringIO(), StringIO()
    with (jobs_done_here(), mock.patch.object(pilot, "run_jobs", run_here), chdir(cwd or "."), redirect_stdout(out),
          redirect_stderr(err)):
        code = call(command)
    if check and code:
        raise AssertionError(f"exit {code}\n{out.getvalue()}\n{err.getvalue()}")
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
