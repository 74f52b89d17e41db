"""Checkpoints of a few thousand numbers under the names that a merge config uses, made without transformers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, MLP, HEADS, KV = 8, 16, 2, 1
WORDS = ("<unk>", "<eos>", "one", "two", "three", "four", "red", "green")


def shapes(layers: int, rows: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 with untied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN), "model.norm.weight": (HIDDEN,),
                                         "lm_head.weight": (rows, HIDDEN)}
    key = HIDDEN // HEADS * KV
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, size in (("q", HIDDEN), ("k", key), ("v", key)):
            found |= {f"{at}self_attn.{name}_proj.weight": (size, HIDDEN), f"{at}self_attn.{name}_proj.bias": (size,)}
        found |= {f"{at}self_attn.o_proj.weight": (HIDDEN, HIDDEN), f"{at}mlp.gate_proj.weight": (MLP, HIDDEN),
                  f"{at}mlp.up_proj.weight": (MLP, HIDDEN), f"{at}mlp.down_proj.weight": (HIDDEN, MLP),
                  f"{at}input_layernorm.weight": (HIDDEN,), f"{at}post_attention_layernorm.weight": (HIDDEN,)}
    return found


def numbers(name: str, shape: tuple[int, ...], whose: str, spread: float) -> Tensor:
    """Normal, and the same for the same tensor of the same model wherever it is asked for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{whose} {name}".encode()))) * spread


def write_checkpoint(folder: Path, *, layers: int = 2, words: Sequence[str] = WORDS, dtype: torch.dtype = torch.bfloat16,
                     tensors: Mapping[str, Tensor] | None = None, moved: float = 0.02, config: Mapping[str, Any] | None = None,
                     template: str | None = None) -> Path:
    """A Qwen2 that shares its first numbers with all others of this kind, a fine-tune's step away by its folder's name.

    Args:
        tensors: other tensors, or other numbers in these; None where a tensor shall be missing.
        words: of its tokenizer, one row each. moved: spread of the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: (1.0 if name.endswith("norm.weight") else 0.0) + numbers(name, shape, "base", 0.2)
             + numbers(name, shape, folder.name, moved) for name, shape in shapes(layers, len(words)).items()}
    state |= dict(tensors or {})
    save_file({name: (t.to(dtype) if t.is_floating_point() and not (tensors and name in tensors) else t).contiguous()
               for name, t in state.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})
    written = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": MLP,
               "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV, "vocab_size": len(words),
               "max_position_embeddings": 64, "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
               "layer_types": ["full_attention"] * layers, "eos_token_id": 1, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(written | dict(config or {})))
    write_tokenizer(folder, words, template)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str], template: str | None = None) -> None:
    """Words between spaces; those in <..> are added tokens, but for <unk>."""
    added = [{"id": i, "content": w, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, w in enumerate(words) if w.startswith("<") and w != "<unk>"]
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"}}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(words).index("<eos>")}))


def write_adapter(folder: Path, *, layers: int, rank: int = 2, alpha: int = 4) -> Path:
    """A LoRA adapter of every q_proj, as PEFT saves one."""
    folder.mkdir(parents=True, exist_ok=True)
    at = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    state = {at.format(i, side): numbers(f"{i}{side}", shape, folder.name, 0.3)
             for i in range(layers) for side, shape in (("A", (rank, HIDDEN)), ("B", (HIDDEN, rank)))}
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "bias": "none",
         "task_type": "CAUSAL_LM", "use_rslora": False, "fan_in_fan_out": False}))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
