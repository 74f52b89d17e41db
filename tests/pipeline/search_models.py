"""Four tiny models, rows and search files, for the tests of `anabranch search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiny_checkpoints import WORDS, write_adapter, write_checkpoint

MODELS = ("one", "two", "three")
TOKENS = ["<unk>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def make_models(folder: Path, *, layers: int = 2, moved: float = 0.1) -> None:
    """base and three models a step away from it, bfloat16, with a token for each byte; an adapter."""
    for name in ("base", *MODELS):
        write_checkpoint(folder / name, layers=layers, moved=moved if name != "base" else 0.0, words=TOKENS)
        bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
        bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bytewise.decoder = decoders.ByteLevel()
        bytewise.add_special_tokens(TOKENS[:2])
        bytewise.save(str(folder / name / "tokenizer.json"))
    write_adapter(folder / "lora", layers=layers)


def make_rows(folder: Path, rows: int = 12) -> None:
    """Two units of `rows` different prompts."""
    words = WORDS[2:]
    for unit, step in (("count", 1), ("colour", 3)):
        lines = [{"prompt": " ".join(words[(i // 6 ** j + step * j) % 6] for j in range(3)),
                  "completion": " ".join(words[(i + step * j) % 6] for j in range(2))} for i in range(rows)]
        (folder / f"{unit}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def template(folder: Path, method: str = "ties", **changed: Any) -> dict[str, Any]:
    """A native search: three weights, lambda, density."""
    density = {"density": "$rho"} if method != "linear" else {}
    merge: dict[str, Any] = {
        "merge_method": method, "dtype": "bfloat16",
        "models": [{"model": str(folder / m), "parameters": {"weight": f"$w_{m}", **density}} for m in MODELS]}
    parameters: dict[str, Any] = {f"w_{m}": {"low": 0, "high": 1} for m in MODELS}
    if method != "linear":
        merge |= {"base_model": str(folder / "base"), "parameters": {"lambda": "$lam"}}
        parameters |= {"lam": {"low": 0.2, "high": 2, "log": True}, "rho": {"low": 0.2, "high": 1}}
    return {"parameters": parameters, "merge": merge, "budget": 6, "seed": 1, "population": 4,
            "data": {"sources": [{"path": str(folder / "*.jsonl")}]}} | changed


def write(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
