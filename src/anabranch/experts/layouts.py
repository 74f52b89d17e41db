"""Four layouts of mixtures, each by a class of transformers itself: no code from a repository is ever run.

    E experts    I their width    H hidden size    S width of the shared expert

    Mixtral       MixtralForCausalLM        llama, mistral                no shared expert
    DeepSeek MoE  GraniteMoeSharedForCausalLM     llama, mistral          at most one shared expert, without a gate
    Qwen MoE      Qwen2MoeForCausalLM       llama, mistral, qwen2         one shared expert behind a sigmoid gate, or none
    Qwen3 MoE     Qwen3MoeForCausalLM       qwen3                         no shared expert

Each routes by softmax over all experts, takes the first k and divides by their sum.

DeepSeek MoE (2401.06066, eq. 3-5; here with the chosen weights divided by their sum) has no class of its own in transformers:
`deepseek` exists as remote code only. Its successors are no substitutes: DeepseekV2/V3 have latent attention with a norm
between its factors, through which no llama attention can be written; Dots1, Glm4Moe and their kin have sigmoid routing or
norms on queries and keys; Ernie 4.5 turns neighbouring pairs by RoPE. GraniteMoeShared is the one whose blocks compute the
same function to the letter: llama's attention (its multiplier set to 1/sqrt(head size), all other multipliers 1), softmax
over the chosen k logits, which is softmax, top k and division by the sum, and a shared expert that is simply added.

transformers' Qwen2Moe always has a shared expert. Where the config gives none it is written one number wide, all zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.errors import ModelError, RecipeError, closest
from anabranch.experts.settings import DRAWN, Config
from anabranch.experts.sources import Source

# What every target config has from the base, by the names that the classes share.
SHARED_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
               "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
               "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_parameters")


@dataclass(frozen=True)
class Layout:
    """Names below `model.layers.N.`: as transformers has them in memory, and as they are written where that differs.

    written    name in memory -> name in the file, for tensors that stand for one each
    separate   whether each expert's matrices are files of their own: `mlp.experts.N.gate_proj.weight`
    """

    title: str
    model_type: str
    architecture: str
    sources: tuple[str, ...]
    router: str
    gate_up: str
    down: str
    shared: tuple[str, ...] = ()
    shared_gate: str | None = None
    written: Mapping[str, str] | None = None
    separate: bool = False

    def file_name(self, name: str) -> str:
        return (self.written or {}).get(name, name)


FUSED = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MIXTRAL = Layout("Mixtral", "mixtral", "MixtralForCausalLM", ("llama", "mistral"), *FUSED)
DEEPSEEK = Layout(
    "DeepSeek MoE", "granitemoeshared", "GraniteMoeSharedForCausalLM", ("llama", "mistral"),
    "block_sparse_moe.router.weight", "block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj",
    ("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
    written={"block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
             "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
             "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight"})
QWEN2 = Layout(
    "Qwen MoE", "qwen2_moe", "Qwen2MoeForCausalLM", ("llama", "mistral", "qwen2"), *FUSED,
    shared=tuple(f"mlp.shared_expert.{which}_proj.weight" for which in ("gate", "up", "down")),
    shared_gate="mlp.shared_expert_gate.weight", separate=True)
QWEN3 = Layout("Qwen3 MoE", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",), *FUSED)
LAYOUTS = (MIXTRAL, DEEPSEEK, QWEN2, QWEN3)


def choose(config: Config, base: Source, sources: Sequence[Source]) -> tuple[Layout, list[str]]:
    """The layout for these models, and warnings. Mixtral where it fits, else the first that does.

    Raises RecipeError: an `architecture` that is none, or no layout that fits, with each one's reason.
    """
    named = [x for x in LAYOUTS if x.title.lower().startswith((config.architecture or "").lower())]
    if not named:
        raise RecipeError(f"architecture: '{config.architecture}' begins none of {', '.join(x.title for x in LAYOUTS)}."
                          + closest(str(config.architecture), [x.title for x in LAYOUTS]))
    reasons = [(layout, _unfit(layout, config, base, sources)) for layout in named]
    fit = [layout for layout, reason in reasons if reason is None]
    if not fit:
        raise RecipeError.of("experts config: no layout fits these models:",
                             [f"{layout.title}: {reason}" for layout, reason in reasons])
    if len(fit) > 1 and fit[0] is not MIXTRAL:
        return fit[0], [f"the models fit {', '.join(x.title for x in fit)}; {fit[0].title} is taken. Say which with "
                        "`architecture`"]
    return fit[0], []


def _unfit(layout: Layout, config: Config, base: Source, sources: Sequence[Source]) -> str | None:
    """Why a layout cannot hold these models."""
    types = sorted({source.model_type for source in (base, *sources)})
    if len(types) > 1:
        return f"the models are of several kinds ({', '.join(types)})"
    if types[0] not in layout.sources:
        return f"holds {', '.join(layout.sources)}, and these are {types[0]}"
    if len(config.shared) > (1 if layout.shared else 0):
        return f"holds {'one shared expert' if layout.shared else 'no shared expert'}, and there are {len(config.shared)}"
    if layout is DEEPSEEK and any(e.positive or e.negative for e in config.shared):
        return "its shared expert has no gate, so it takes no prompts"
    if layout is QWEN2 and config.gate_mode not in DRAWN and any(not e.positive for e in config.shared):
        return "its shared expert has a gate, so it needs positive_prompts (or `gate_mode: random`)"
    biased = {which for which in "qkvo" if f"model.layers.0.self_attn.{which}_proj.bias" in base.checkpoint.tensors}
    if biased and layout is MIXTRAL:
        return "its attention has no biases, and the base's has"
    if "o" in biased and layout is QWEN2:
        return "its attention has no bias on the output, and the base's has"
    return None


def target_config(layout: Layout, config: Config, base: Source, widths: tuple[int, int], dtype: str
                  ) -> tuple[dict[str, Any], list[str]]:
    """config.json of the mixture, and what it cannot say (warnings).

    Args:
        widths: (I, S); S is 0 without a shared expert.
        dtype: 'bfloat16', ..
    Raises:
        ModelError: transformers does not take the base's config, or the one made of it.
    """
    source = read_by_class(base.checkpoint.config, base.label)
    values = {key: getattr(source, key) for key in SHARED_KEYS if hasattr(source, key)}
    head = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    values |= {"head_dim": head} if head * source.num_attention_heads != source.hidden_size or layout is QWEN3 else {}
    warnings: list[str] = []
    values |= _own(layout, config, base, source, widths, head) | _windows(layout, config, source, warnings)
    result = {"architectures": [layout.architecture], "model_type": layout.model_type, "dtype": dtype, **values,
              "num_experts_per_tok": config.per_token, "output_router_logits": False}
    result = json.loads(json.dumps(result))
    read_by_class(result, f"the result, as {layout.title}")
    return result, warnings


def _own(layout: Layout, config: Config, base: Source, source: Any, widths: tuple[int, int], head: int) -> dict[str, Any]:
    """What each class calls its experts, and what else it asks for."""
    count, (width, shared) = len(config.experts), widths
    if layout is MIXTRAL:
        return {"num_local_experts": count, "intermediate_size": width, "head_dim": head}
    if layout is DEEPSEEK:
        return {"num_local_experts": count, "intermediate_size": width, "shared_intermediate_size": shared,
                "attention_multiplier": head**-0.5, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
                "residual_multiplier": 1.0,
                "attention_bias": "model.layers.0.self_attn.q_proj.bias" in base.checkpoint.tensors}
    common = {"num_experts": count, "intermediate_size": source.intermediate_size, "moe_intermediate_size": width,
              "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    if layout is QWEN2:
        return common | {"shared_expert_intermediate_size": shared or 1, "qkv_bias": True}
    return common | {"attention_bias": bool(getattr(source, "attention_bias", False))}


def _windows(layout: Layout, config: Config, source: Any, warnings: list[str]) -> dict[str, Any]:
    """How far each layer's attention sees. The peer drops mistral's window; here the base's attention stays as it is."""
    window, count = getattr(source, "sliding_window", None), source.num_hidden_layers
    kinds = getattr(source, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    slides = bool(window) and "sliding_attention" in kinds
    if slides and (layout is DEEPSEEK or (config.literal and layout is MIXTRAL)):
        warnings.append(f"the base's attention sees {window} tokens back, and {layout.title}'s"
                        + (" is written without a window, as mergekit-moe does" if layout is MIXTRAL else " all of them")
                        + ": longer texts are read otherwise than by the base")
        slides = False
    if layout is MIXTRAL:
        return {"sliding_window": window if slides else None}
    if layout is QWEN2:
        return {"use_sliding_window": slides, "sliding_window": window if slides else None,
                "max_window_layers": getattr(source, "max_window_layers", count), "layer_types": list(kinds)}
    if layout is QWEN3:
        if slides and len(set(kinds)) > 1:
            raise ModelError(f"the base's layers have {' and '.join(sorted(set(kinds)))}, and Qwen3 MoE one kind for all.")
        return {"use_sliding_window": slides, "sliding_window": window if slides else None}
    return {}


def read_by_class(config: Mapping[str, Any], label: str) -> Any:
    """A config by transformers' own class for its `model_type`, defaults filled in. Raises ModelError."""
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    try:
        return CONFIG_MAPPING[kind].from_dict({k: v for k, v in config.items() if k != "auto_map"})
    except Exception as error:  # KeyError for an unknown kind; huggingface_hub's own types for a field that is wrong
        raise ModelError(f"config.json of {label}: transformers does not take it as `{kind}` ({type(error).__name__}: "
                         f"{str(error)[:300]}).") from error


def skeleton(config: Mapping[str, Any], label: str) -> Any:
    """The causal language model of a config without its weights (on the meta device), not to be trained. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = read_by_class(config, label)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=False).eval().requires_grad_(False)
    except Exception as error:  # whatever a config can break in a constructor
        raise ModelError(f"config.json of {label}: transformers builds no model of it ({type(error).__name__}: "
                         f"{str(error)[:300]}).") from error
