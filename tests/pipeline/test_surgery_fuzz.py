"""A thousand broken requests for the verbs that change models: one message or a whole result, never a traceback or a half.

Each begins as a request that works and is damaged by chance: a key lost, misspelt or moved, a value of another kind, a path
that leads elsewhere, an option that is none. What works is also run as it stands, so that the damage is what refuses.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tests.tiny_checkpoints import write_adapter, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from anabranch import cli
from anabranch.engine.merging import verify_files
from built_commands import commands_built_once

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e308, float("nan"), float("inf"), 10**30, "", " ", "linear", "ties", "nonsense",
    "../../../etc/passwd", "a\x00b", "x" * 400, "/", ".", "m/a", "m/none", "m/a+m/lora", "m/a+b+c", "a@b@c", "0.5", "1e-3",
    "bfloat16", "int64", "*", "é", "🜂", [], {}, [[]], [1, 2, 3], [0.0, 1.0], ["m/a"], {"value": 1}, {"model": "m/a"},
    {"": ""}, [{"model": "m/a"}], {"a": {"b": {"c": {"d": 1}}}}, "{{ 1 }}", "!!python/object:os.system", "model.safetensors",
    "f/a.safetensors", "m/a/config.json", "1GB", "$x", ["$x"], {"low": 1, "high": 0}, -(2**63), 3.0000001, "null", "~", "~root"]


OPTIONS = ["--dry-run", "--rank", "--energy", "--threads", "--max-shard-size", "--zzz", "--seed", "-k", "-a", "-s", "-i", "-e",
           "--save-module", "--embed-lora", "--sv-epsilon", "-w", "--full-random", "--byte-match", "--magikarp", "--memory",
           "--text", "--compare", "--budget", "--json", "-u", "--parameters"]


@dataclass(frozen=True)
class Verb:
    """A command: its arguments, in which CONFIG is the file; and the documents of that file."""

    name: str
    arguments: tuple[str, ...]
    documents: tuple[dict[str, Any], ...] = ()
    cases: int = 100


PAIR = [{"model": "m/a", "parameters": {"weight": 0.4}}, {"model": "m/b", "parameters": {"weight": 0.6}}]
PROMPTS = [{"source_model": "m/a", "positive_prompts": ["one two"]}, {"source_model": "m/b", "positive_prompts": ["red green"]}]
DATA = {"sources": [{"path": "rows.jsonl", "format": "prompt_completion"}]}

VERBS = [
    Verb("family", ("merge", "CONFIG", "OUT"), (
        {"name": "first", "merge_method": "linear", "models": PAIR},
        {"merge_method": "ties", "base_model": "m/base", "parameters": {"density": 0.5},
         "models": [{"model": "first", "parameters": {"weight": 1}}, {"model": "m/b", "parameters": {"weight": 1}}]}), 130),
    Verb("layer_slices", ("merge", "CONFIG", "OUT"), (
        {"layer_slices": [{"model": "m/a", "start": 0, "end": 2}, {"model": "m/b", "start": 1, "end": 2, "scale": 0.5}]},), 80),
    Verb("tensors", ("tensors", "CONFIG", "OUT"), (
        {"merge_method": "task_arithmetic", "base_model": "f/base.safetensors", "parameters": {"weight": 0.5},
         "dtype": "float32",
         "models": [{"model": "f/a.safetensors"}, {"model": "f/b.safetensors", "parameters": {"weight": 1.0}}]},), 120),
    Verb("shuffle", ("shuffle", "OUT", "-m", "m/a", "-m", "m/b", "-w", "1", "-w", "2", "--seed", "3"), (), 80),
    Verb("fill", ("fill", "m/base", "m/part", "OUT"), (), 60),
    Verb("lora extract", ("lora", "extract", "m/a", "m/base", "OUT", "--rank", "2"), (), 90),
    Verb("lora apply", ("lora", "apply", "m/base", "m/lora", "OUT"), (), 60),
    Verb("lora merge", ("lora", "merge", "CONFIG", "OUT"), (
        {"merge_method": "task_arithmetic", "rank": 2, "models": [{"model": "m/lora", "parameters": {"weight": 0.5}},
                                                                  {"model": "m/lora2", "parameters": {"weight": 0.5}}]},), 120),
    Verb("experts", ("experts", "CONFIG", "OUT"), (
        {"base_model": "m/a", "gate_mode": "cheap_embed", "architecture": "qwen", "dtype": "float32", "experts_per_token": 1,
         "experts": PROMPTS, "shared_experts": [{"source_model": "m/base", "positive_prompts": ["three"]}]},), 120),
    Verb("vocabulary", ("vocabulary", "m/a", "m/donor", "OUT", "-k", "2"), (), 80),
    Verb("search", ("search", "CONFIG", "OUT"), (
        {"parameters": {"x": {"low": 0.0, "high": 1.0}}, "budget": 1, "sampler": "random", "data": DATA,
         "merge": {"merge_method": "linear", "models": [{"model": "m/a", "parameters": {"weight": "$x"}},
                                                        {"model": "m/b", "parameters": {"weight": 1}}]}},), 80),
    Verb("genome", ("search", "CONFIG"), (
        {"genome": {"models": ["m/a", "m/b"], "merge_method": "task_arithmetic", "base_model": "m/base",
                    "layer_granularity": 1}, "budget": 1, "sampler": "random", "data": DATA},), 60),
]


def byte_model(folder: Path, merges: Sequence[tuple[str, str]] = (), tensors: dict[str, Any] | None = None) -> None:
    """A tiny Qwen2 with the kind of tokenizer that transformers builds for one: bytes, and what is merged of them."""
    words = ["<unk>", "<eos>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    write_checkpoint(folder, words=words, dtype=torch.float32, tensors=tensors)
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Models, adapters, files and rows that the requests name."""
    home = tmp_path_factory.mktemp("fuzz")
    for name in ("base", "a", "b"):
        byte_model(home / "m" / name)
    byte_model(home / "m" / "donor", [("o", "n"), ("on", "e")])
    byte_model(home / "m" / "part", tensors={"model.norm.weight": None})
    write_adapter(home / "m" / "lora", layers=2)
    write_adapter(home / "m" / "lora2", layers=2, rank=3)
    (home / "f").mkdir()
    for i, name in enumerate(("base", "a", "b")):
        save_file({"x": torch.full((3, 2), float(i)), "y": torch.arange(4.0) * i}, home / "f" / f"{name}.safetensors")
    (home / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"one {i}", "completion": "two"}) + "\n"
                                             for i in range(8)))
    return home


def call(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what was said) of a command. Anything but an exit is a bug, shown with its traceback."""
    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["anabranch", *arguments]), contextlib.redirect_stdout(said), \
            contextlib.redirect_stderr(said), warnings.catch_warnings(), commands_built_once():
        warnings.simplefilter("ignore")
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
            return (code if isinstance(code, int) else 0 if code is None else 1), said.getvalue()
        except BaseException:
            return -1, said.getvalue() + traceback.format_exc()
    return 0, said.getvalue()


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(p for key, item in inner for p in paths(item, (*here, key)))]


def damaged(documents: tuple[dict[str, Any], ...], chance: random.Random) -> list[Any]:
    """The documents with one to three things wrong."""
    changed: list[Any] = copy.deepcopy(list(documents))
    for _ in range(chance.choice([1, 1, 2, 3])):
        places = [path for path in paths(changed) if path]
        if not places:
            break
        *above, last = chance.choice(places)
        home: Any = changed
        for key in above:
            home = home[key]
        kind = chance.choice(["value", "value", "value", "lose", "twice", "name", "add", "wrap"])
        if kind == "lose":
            del home[last]
        elif kind == "twice" and isinstance(home, list):
            home.append(copy.deepcopy(home[last]))
        elif kind == "name" and isinstance(home, dict):
            home[chance.choice([f"{last}s", str(last)[:-1], str(last).upper(), "", 7, None, True])] = home.pop(last)
        elif kind == "add" and isinstance(home, dict):
            home[chance.choice(["models", "weight", "base_model", "name", "parameters", "slices", "dtype", "zzz"])] = \
                copy.deepcopy(chance.choice(VALUES))
        elif kind == "wrap":
            home[last] = chance.choice([[home[last]], {"value": home[last]}, str(home[last])])
        else:
            home[last] = copy.deepcopy(chance.choice(VALUES))
    return changed


def written(documents: list[Any], chance: random.Random, damage: bool) -> bytes:
    text = yaml.safe_dump_all(documents, allow_unicode=True, sort_keys=False).encode("utf-8", "replace")
    if damage and chance.random() < 0.08:
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice([b"", b"\xff\xfe", b"\x00", b": [", b"- *x\n", b"!!python/name:os.system ",
                                          b"{" * 3000])
    return text


def options_damaged(arguments: list[str], chance: random.Random) -> list[str]:
    """One argument lost, repeated, swapped for something else, or an option added."""
    changed = list(arguments)
    kind = chance.choice(["lose", "value", "value", "value", "add", "add", "swap"])
    first = 2 if changed[0] == "lora" else 1
    at = chance.randrange(first, len(changed))
    plain = [str(v) for v in VALUES if isinstance(v, (str, int, float)) and "\x00" not in str(v)]
    if kind == "lose":
        del changed[at]
    elif kind == "value" and changed[at] != "OUT":
        changed[at] = chance.choice(plain)
    elif kind == "swap":
        other = chance.randrange(first, len(changed))
        changed[at], changed[other] = changed[other], changed[at]
    else:
        changed += [chance.choice(OPTIONS), *([chance.choice(plain)] if chance.random() < 0.7 else [])]
    return changed


def everything(home: Path) -> set[str]:
    return {p.relative_to(home).as_posix() for p in home.rglob("*")}


@pytest.mark.parametrize("verb", VERBS, ids=lambda v: v.name)
def test_broken_requests_end_in_a_message_or_a_whole_result(verb, material, monkeypatch):
    monkeypatch.chdir(material)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = refuse_all(verb, material, options_damaged)
    assert refused >= verb.cases // 4


def refuse_all(verb: Verb, home: Path, options: Callable[[list[str], random.Random], list[str]]) -> int:
    refused = 0
    for case in range(verb.cases + 1):
        chance = random.Random(f"{verb.name} {case}")
        whole = case == 0  # the request as it is: it must work, or the others would show nothing
        documents = list(verb.documents) if whole else damaged(verb.documents, chance)
        arguments = list(verb.arguments)
        if not whole and (not verb.documents or chance.random() < 0.15):
            arguments = options(arguments, chance)
        (home / "c.yaml").write_bytes(written(documents, chance, not whole))
        before = everything(home)
        arguments = ["c.yaml" if a == "CONFIG" else "out" if a == "OUT" else a for a in arguments]
        code, said = call(arguments)
        added = everything(home) - before
        text = (home / "c.yaml").read_text(errors="replace")
        shown = f"case {case} of {verb.name}: {arguments}\n{text}\n{said}\n{sorted(added)[:20]}"
        assert code in ((0, 1) if whole else (0, 1, 2)), shown
        assert "Traceback" not in said, shown
        if code == 2:
            refused += 1
            assert said.strip(), shown
            assert not added, shown
        for manifest in [p for p in home.rglob("manifest.json") if p.relative_to(home).as_posix() in added]:
            assert verify_files(manifest.parent) == [], shown
        assert not [name for name in added if ".partial" in name], shown
        for name in sorted(added, reverse=True):
            path = home / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return refused
