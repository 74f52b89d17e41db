"""Checkpoints of Llama's shape and any size, made on the spot: a base and branches a little way from it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# parameters, roughly -> (hidden, layers, intermediate, heads, key/value heads, vocabulary)
SIZES = {"0.1b": (768, 12, 2048, 12, 4, 32000), "0.3b": (1024, 20, 2816, 16, 4, 32000),
         "1.1b": (2048, 22, 5632, 32, 4, 32000), "3b": (3072, 26, 8192, 24, 8, 32000)}
SHARD = 2 * 10**9


def build(folder: Path, size: str, branches: int, seed: int = 0) -> tuple[Path, list[Path]]:
    """`folder`/base and `folder`/branch-i in bfloat16; what is there already is kept."""
    paths = [folder / "base", *(folder / f"branch-{i}" for i in range(branches))]
    for i, path in enumerate(paths):
        if not (path / "config.json").exists():
            _write(path, size, seed, i)
    return paths[0], paths[1:]


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    hidden, layers, inner, heads, kv, vocabulary = SIZES[size]
    narrow = hidden // heads * kv
    layer = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
             "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden),
             "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
             "post_attention_layernorm": (hidden,)}
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    out |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in layer.items()}
    return out | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _write(path: Path, size: str, seed: int, number: int) -> None:
    """The base's numbers are N(0, 0.02^2); a branch adds N(0, 0.001^2)."""
    path.mkdir(parents=True, exist_ok=True)
    hidden, layers, inner, heads, kv, vocabulary = SIZES[size]
    ours, theirs = (torch.Generator().manual_seed(seed + n) for n in (0, 1000 + number))
    shard: dict[str, torch.Tensor] = {}
    shards, filled = [], 0
    everything = shapes(size)
    for name, shape in everything.items():
        tensor = torch.randn(shape, generator=ours).mul_(0.02)
        if number:
            tensor += torch.randn(shape, generator=theirs).mul_(0.001)
        shard[name] = tensor.bfloat16()
        filled += shard[name].nbytes
        if filled > SHARD or name == "lm_head.weight":
            shards.append(dict.fromkeys(shard))
            save_file(shard, path / f"part-{len(shards)}", metadata={"format": "pt"})
            shard, filled = {}, 0
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"part-{i + 1}").rename(path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}))
