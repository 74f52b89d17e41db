"""Tiny dense models of four kinds that differ in their feed-forwards, for tests of mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

HIDDEN, WIDTH, LAYERS = 16, 24, 2
KINDS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config,
                                            "qwen3": Qwen3Config}
PROMPTS = [["copy one two three", "red"], ["sorted blue green first last yes", "up down"], ["double cat"],
           ["reverse four five six left", "no"]]


def write_models(root: Path, tokens: Path, kind: str, count: int = 3, *, dtype: torch.dtype = torch.float32, tied: bool = False,
                 shard: str = "12KB", **settings: Any) -> tuple[Path, list[Path]]:
    """(base, experts): random weights, in shards. The experts have the base's shapes and other numbers throughout."""
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    shape = {"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": tied,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    extra = {"qwen3": {"head_dim": 8}, "mistral": {"sliding_window": None}}.get(kind, {})
    folders = []
    for number in range(count + 1):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(KINDS[kind](**(shape | extra | settings)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        folder = root / (f"expert-{number}" if number else "base")
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1:]


def config_of(base: Path, experts: list[Path], **others: Any) -> dict[str, Any]:
    entries = [{"source_model": str(e), "positive_prompts": PROMPTS[i]} for i, e in enumerate(experts)]
    return {"base_model": str(base), "experts": entries, "gate_mode": "hidden", **others}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model by transformers itself; every tensor must find its place."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


class SlowMixture(torch.nn.Module):
    """The formula, token by token, around dense feed-forwards: softmax, the first k, divided by their sum."""

    def __init__(self, mlps: list[Any], rows: torch.Tensor, chosen: int, shared: Any = None,
                 gate: torch.Tensor | None = None) -> None:
        super().__init__()
        self.mlps, self.rows, self.chosen, self.shared, self.gate = mlps, rows, chosen, shared, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for place in [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1])]:
            token = x[place]
            p = torch.softmax(self.rows @ token, 0)
            best = sorted(range(len(p)), key=lambda e: -float(p[e]))[: self.chosen]
            out[place] = sum((p[e] / sum(p[i] for i in best)) * self.mlps[e](token) for e in best)
            if self.shared is not None:
                weight = 1.0 if self.gate is None else torch.sigmoid(self.gate @ token)
                out[place] += weight * self.shared(token)
        return out
