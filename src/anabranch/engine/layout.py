"""Which tensors of a checkpoint are layers, embeddings and heads, and what config.json says about them.

There is no table of architectures. All is read from tensor names and config.json:

    stack    tensors PREFIX.0.a.b, PREFIX.1.a.b, ..: a number between dots, and below it modules, not only weights
             (`mlp.0.weight`, `mlp.2.weight` is a Sequential, no stack). It counts as a stack if config.json holds its
             count, or if its numbers are 0 .. n-1 with n > 1. The first such number in a name is the layer; numbers
             further right (experts, blocks of a stage) belong to the layer.
    module   MergeKit's convention: one stack, and everything is in module `default`; several, and each is a module
             with the name PREFIX, while loose tensors are in `default`.
    part     `layer`: of a stack. `post`: loose, and used after the last layer of the model: a final norm or a head.
             `pre`: any other loose tensor. What feeds another stack (a vision tower's own final norm, a projector, the
             norm after an encoder) is `pre`. MergeKit calls norms and heads of inferred models `pre` as well: a defect.
    embedding  its first dimension counts tokens of the vocabulary: a loose tensor with the name of an input embedding
             or an output head (weight or bias) and with as many rows as config.json's `vocab_size`. Positions, token
             types and per-label heads fail one of the two. `embed_tokens`, `wte` and `word_embeddings` are taken for one
             with any number of rows: more than `vocab_size` is padding, fewer gets a warning.
    extra    multi-token-prediction layers (`num_nextn_predict_layers`, or under `mtp.`) are heads: `post`. Those that
             are numbered on after the last layer move with it (`{after+0}` in the template).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from anabranch.engine.checkpoint import Checkpoint, TensorInfo

DEFAULT = "default"
LAYER = "{layer}"

# What a part of a name says about where it belongs in a model of several stacks.
ROLES = {
    "vision": r"vision|visual|image|vit|patch|pixel|video",
    "audio": r"audio|speech|sound|acoustic|codec",
    "text": r"text|language|llm|lm|thinker",
    "encoder": r"encoder|enc",
    "decoder": r"decoder|dec",
    "single": r"single",
    "refiner": r"refiner",
    "between": r"perceiver|resampler|qformer|connector|projector|merger|deepstack",
    "talker": r"talker|predictor|mtp",
}
# A count of something else than of all layers, though its name ends like one.
NOT_A_COUNT = {"nextn", "kv", "shared", "mem", "dense", "window", "moe", "expert", "experts", "predict", "global", "local",
               "linear", "max", "min", "sparse", "frozen", "drop", "start", "end", "every", "freq", "attn", "mlp"}
# Parts of a model with tokens of their own, which are none of the tokenizer's.
OTHER_TOKENS = {"vision", "audio", "between"}
INPUT = re.compile(r"(?!.*(position|type|patch|segment|time|rel_|class))(.*embed.*|wte|shared)$")
SURE_INPUT = re.compile(r"(embed_tokens|wte|word_embeddings?|tok_embeddings|token_embeddings?)$")
OUTPUT = re.compile(r"(.*lm_head|head|embed_out|output|proj_out|vocab_projector|output_projection|decoder|predictions)$")
HEAD = re.compile(r"((.*_)?heads?|score|classifier.*|.*classification.*|cls|(.*_)?pooler|qa_outputs|embed_out|output|"
                  r"output_projection|(proj|norm|conv|ln)_out|final.*|vocab_(transform|layer_norm|projector)|.*_predictions|"
                  r"logit_scale|logit_bias|final_logits_bias|(text|visual)_projection|embedding_norm|ln_f|norm_f|mtp)$")
NORM = re.compile(r"(.*_)?((layer|rms|batch|group)?_?norm|ln|ln_post|ln_final)$", re.IGNORECASE)
EMBEDDING_LIKE = re.compile(r"(.*embed.*|wte|wpe|.*position.*|.*patch.*)", re.IGNORECASE)

# Lists of one entry per layer, and lists of layer numbers, where the name and the length leave a doubt.
PER_LAYER = {"layer_types", "layers_block_type", "block_types", "no_rope_layers", "attention_layers", "mlp_layer_types",
             "sliding_window_list", "hybrid_override_pattern", "block_configs"}
LAYER_NUMBERS = {"mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices",
                 "hybrid_layer_ids", "fullatt_block_indexes", "deepstack_visual_indexes"}
NEVER_PER_LAYER = re.compile(r"(architectures|.*token_ids?|.*_mean|.*_std|depths|.*sizes?_list|mrope_section|keys_to_ignore.*|"
                             r"auto_map|bad_words.*|languages?|labels?)$")
NUMBERS_NAME = re.compile(r".*(layers|blocks|_idx|_idxs|_indices|_indexes|_ids)$")
# Layer i is special if (i - offset) % period == 0: true only while layers keep their places.
PERIODS = {"sliding_window_pattern", "global_attn_every_n_layers", "attn_layer_period", "expert_layer_period",
           "full_attention_interval", "interleave_moe_layer_step", "no_rope_layer_interval", "decoder_sparse_step",
           "moe_layer_freq", "cross_attn_every_n_layers", "moe_every_n_layers"}
# The first k layers differ from the others.
FIRST = ("max_window_layers", "first_k_dense_replace")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands. `template`: its name with `{layer}` for the layer's number, see `name_in`."""

    module: str
    layer: int | None
    template: str
    part: Literal["pre", "layer", "post"]
    embedding: bool = False


@dataclass(frozen=True)
class Layout:
    """Every tensor's place, in the checkpoint's order.

    layers      module -> number of layers; `default` has 0 where it holds loose tensors only
    prefixes    module -> the text before the layer's number, for modules with layers
    count_keys  module -> where config.json holds the count, as a path of keys; None where it does not
    """

    places: dict[str, Place]
    layers: dict[str, int]
    prefixes: dict[str, str]
    count_keys: dict[str, tuple[str, ...] | None]
    warnings: tuple[str, ...] = ()


def name_in(template: str, layer: int) -> str:
    """The name of a tensor in layer number `layer`; of a loose tensor, in a module that has `layer` layers.

    A loose tensor's name is its template, but for layers that are numbered on after the last one (`{after+0}`).
    """
    return re.sub(r"\{(?:layer|after\+(\d+))\}", lambda m: str(layer + int(m[1] or 0)), template)


# ---------------------------------------------------------------------------------------------------- reading a layout


def layout_of(checkpoint: Checkpoint) -> Layout:
    """Find the layers, embeddings and heads of a checkpoint; reads no weight. Never raises: what is odd is a warning."""
    return layout_from(checkpoint.tensors, checkpoint.config)


def layout_from(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Layout:
    """`layout_of` from names and shapes."""
    stacks = _stacks(tensors, config)
    modules = {prefix: DEFAULT if len(stacks) == 1 else prefix for prefix in stacks}
    warnings = [w for stack in stacks.values() for w in stack.warnings]
    vocabularies = vocab_sizes(config)
    places = {}
    for name, info in tensors.items():
        stack, number, template = _split(name, stacks)
        if stack is not None and number < stack.count:
            places[name] = Place(modules[stack.prefix], number, template, "layer")
            continue
        if stack is not None:  # numbered on after the last layer
            places[name] = Place(DEFAULT, None, template.replace(LAYER, f"{{after+{number - stack.count}}}", 1), "post")
            continue
        rows, warning = _token_rows(name, info, vocabularies, len(stacks) > 1)
        warnings += warning
        post = rows == "output" or _is_post(name, stacks)
        places[name] = Place(DEFAULT, None, name, "post" if post else "pre", rows is not None)
    layers = {modules[prefix]: stack.count for prefix, stack in stacks.items()}
    if any(p.module == DEFAULT for p in places.values()):
        layers.setdefault(DEFAULT, 0)
    return Layout(places, layers, {m: p for p, m in modules.items()},
                  {m: stacks[p].key for p, m in modules.items()} | ({} if DEFAULT in modules.values() else {DEFAULT: None}
                                                                    if DEFAULT in layers else {}),
                  tuple(warnings))


@dataclass
class _Stack:
    prefix: str
    numbers: set[int] = field(default_factory=set)
    deep: bool = False
    count: int = 0
    key: tuple[str, ...] | None = None
    warnings: list[str] = field(default_factory=list)


def _cuts(name: str) -> Iterator[tuple[str, int, str]]:
    """(text before, number, text after) for every number between dots, from the left."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal() and part.isascii():
            yield ".".join(parts[:i]), int(part), ".".join(parts[i + 1:])


def _split(name: str, stacks: Mapping[str, _Stack]) -> tuple[_Stack | None, int, str]:
    for prefix, number, rest in _cuts(name):
        if prefix in stacks:
            return stacks[prefix], number, ".".join(filter(None, [prefix, LAYER, rest]))
    return None, 0, name


def _stacks(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, _Stack]:
    """The stacks by prefix, sorted. Where the first number of a name makes none, the next one is tried."""
    found: dict[str, _Stack] = {}
    refused: set[str] = set()
    while True:
        candidates: dict[str, _Stack] = {}
        for name in tensors:
            for prefix, number, rest in _cuts(name):
                if prefix in refused:
                    continue
                stack = candidates.setdefault(prefix, _Stack(prefix))
                stack.numbers.add(number)
                stack.deep |= "." in rest
                break
        keys = _count_keys(list(candidates.values()), config)
        bad = {prefix for prefix, stack in candidates.items() if not _settle(stack, keys[prefix], config)}
        found = {prefix: candidates[prefix] for prefix in sorted(candidates) if prefix not in bad}
        # inside a numbered extra (mtp.layers.0.mlp.experts.7) no stack begins
        if not bad - refused:
            return {p: s for p, s in found.items() if "talker" not in _roles(p) or "mtp" not in _words(p)}
        refused |= bad


def _settle(stack: _Stack, key: tuple[str, ...] | None, config: Mapping[str, Any]) -> bool:
    """Whether these numbers are layers; sets the count and its key."""
    stack.count, stack.key = max(stack.numbers) + 1, key
    if "mtp" in _words(stack.prefix):
        return True  # taken out at the end, so that nothing inside it is looked at
    if not stack.deep:
        return False
    if key is None:  # names that begin with a number are a Sequential's (sentence-transformers), unless config counts them
        return stack.numbers == set(range(stack.count)) and stack.count > 1 and stack.prefix != ""
    said = _at(config, key)
    extra = _at(config, (*key[:-1], "num_nextn_predict_layers"))
    if said < stack.count and isinstance(extra, int) and said + extra >= stack.count:
        stack.count = said
    missing = sorted(set(range(said)) - stack.numbers)
    if missing:
        stack.warnings.append(f"{'.'.join(key)} in config.json says {said} layers; of '{stack.prefix}' there are no "
                              f"tensors of layer {_some(missing)}. The others keep their numbers.")
        stack.count = max(stack.count, said)
    return True


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


# ------------------------------------------------------------------------------------------------- counts in config.json


def _words(text: str) -> list[str]:
    return [w for w in re.split(r"[._\W\d]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", text).lower()) if w]


def _roles(text: str) -> set[str]:
    return {role for role, pattern in ROLES.items() if any(re.fullmatch(pattern, w) for w in _words(text))}


def _ints(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _ints(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key), value


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _counts(config: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """Keys of config.json that may hold a number of layers: `num_hidden_layers`, `n_layer`, `depth`, `encoder_layers` .."""
    return {path: n for path, n in _ints(config) if n > 0
            and (words := _words(path[-1])) and words[-1] in ("layer", "layers", "block", "blocks", "depth")
            and not NOT_A_COUNT & set(words)}


def _fit(prefix: str, path: tuple[str, ...]) -> tuple[int, ...]:
    """How well a count fits a stack, by the words of their names; larger is better, first number < 0: it does not."""
    stack, key = _roles(prefix), _roles(".".join(path))
    if not stack & {"vision", "audio", "between", "encoder", "single", "refiner", "talker"}:
        stack = stack | {"text"}  # the model's own layers, or the decoder
    if "text" in stack and key == {"text", "decoder"}:
        key = {"text"}
    if key & stack & {"vision", "audio"}:
        key = key - {"encoder"}  # audio_config.encoder_layers of audio_tower.layers
    aside = bool(stack & {"vision", "audio", "between", "talker"}) and not key & stack
    wrong = len(key - stack) + aside
    usual = ["num_hidden_layers", "num_layers", "n_layers", "n_layer"]
    rank = usual.index(path[-1]) if path[-1] in usual else len(usual)
    return -wrong, len(key & stack), -rank, -len(path)


def _count_keys(stacks: Sequence[_Stack], config: Mapping[str, Any]) -> dict[str, tuple[str, ...] | None]:
    """The key that holds each stack's count. One key can serve one stack only, the one that it fits best."""
    keys: dict[str, tuple[str, ...] | None] = {s.prefix: None for s in stacks}
    counts = _counts(config)
    offers = []
    deep = [stack for stack in stacks if stack.deep]
    for stack in deep:
        highest = max(stack.numbers) + 1
        for path, said in counts.items():
            fit = _fit(stack.prefix, path)
            extra = _at(config, (*path[:-1], "num_nextn_predict_layers"))
            extra = extra if isinstance(extra, int) else 0
            equal = said <= highest <= said + extra
            if equal and (fit[0] == 0 or len(deep) == 1):
                offers.append((fit, len(stack.numbers), stack.prefix, path))
    for _, _, prefix, path in sorted(offers, key=lambda o: (o[0], o[1], -len(o[2]), o[2], o[3]), reverse=True):
        if keys[prefix] is None and path not in keys.values():
            keys[prefix] = path
    return keys


# ------------------------------------------------------------------------------------------------ embeddings and heads


def vocab_sizes(config: Mapping[str, Any]) -> set[int]:
    """Every size of a text vocabulary that config.json names, also in `text_config` and the like."""
    return {n for path, n in _ints(config)
            if path[-1].startswith("vocab_size") and not _roles(".".join(path[:-1])) & OTHER_TOKENS}


def _token_rows(
    name: str, info: TensorInfo, vocabularies: set[int], several: bool
) -> tuple[Literal["input", "output"] | None, list[str]]:
    """Whether the first dimension counts tokens, and on which side of the model; what is odd about it."""
    *path, last = name.split(".")
    owner = path[-1] if path else ""
    if last not in ("weight", "bias") or len(info.shape) not in (1, 2) or _roles(name) & OTHER_TOKENS:
        return None, []
    if len(info.shape) == 2 and last == "weight" and INPUT.match(owner):
        if info.shape[0] in vocabularies:
            return "input", []
        few = bool(vocabularies) and info.shape[0] < min(vocabularies)  # more is padding, or extra special tokens
        if SURE_INPUT.match(owner) and not (few and several):  # fewer may be the tokens of another part (proteins)
            return "input", [f"tensor '{name}' has {info.shape[0]} rows, fewer than config.json's `vocab_size` of "
                             f"{min(vocabularies)}: the model cannot be loaded as it is"] if few else []
    return ("output" if OUTPUT.match(owner) and info.shape[0] in vocabularies else None), []


def _is_post(name: str, stacks: Mapping[str, _Stack]) -> bool:
    path = name.split(".")
    path = path[:-1] if path[-1] in ("weight", "bias") and len(path) > 1 else path
    if len(stacks) > 1 and _feeds(".".join(path), stacks):
        return False
    if any(HEAD.match(part) for part in path):
        return True
    return bool(NORM.match(path[-1])) and not any(EMBEDDING_LIKE.match(part) for part in path)


def _feeds(name: str, stacks: Mapping[str, _Stack]) -> bool:
    """Whether a loose tensor belongs to something that feeds another stack: an encoder, a tower, a projector."""
    feeding = {"vision", "audio", "between", "encoder"}
    roles = _roles(name)
    if "decoder" in roles or not roles & feeding:
        return False
    return any(not _roles(prefix) & feeding or "decoder" in _roles(prefix) for prefix in stacks)


# --------------------------------------------------------------------------------------------------- editing config.json


def cut_config(
    config: Mapping[str, Any], layout: Layout, kept: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Any], list[str]]:
    """config.json for a model whose layers are taken from other places, and what cannot be carried over (warnings).

    Args:
        kept: module -> for every layer of the result, the number that it had. Modules left out stay as they are.

    The count is set. Beside it (in the same part of the config): a list or string with one entry per layer is cut and
    reordered; a list of layer numbers is renumbered; `max_window_layers` and `first_k_dense_replace` count the kept
    layers below them. A list is one per layer if its name says so or if it is just as long as the layers were (token
    ids, image means and the like excepted); where only the length speaks, it is cut and a warning says so.
    """
    result = copy.deepcopy(dict(config))
    warnings: list[str] = []
    for module, layers in kept.items():
        key, old = layout.count_keys.get(module), layout.layers[module]
        if list(layers) == list(range(old)):
            continue
        warnings += _first_alone(layout, module, layers)
        # some configs (Nemotron-H) have no count, only a list of one entry per layer
        home = _at(result, key[:-1]) if key else next((p for p in _parts(result) if _lists_layers(p, old)), None)
        if home is None:
            warnings.append(f"config.json names no count of the {old} layers of module `{module}`: the number of its "
                            f"layers, now {len(layers)}, is not written anywhere")
            continue
        prefix = layout.prefixes[module]
        if key is not None:
            taken = [other for name, other in layout.count_keys.items() if other is not None and name != module]
            for name in [name for name in home if _counts_too((*key[:-1], name), key, home, old, prefix, taken)]:
                home[name] = len(layers)
        foreign = [_roles(other) - _roles(prefix) for m, other in layout.prefixes.items() if m != module]
        for name in list(home):
            if not any(_roles(name) & roles for roles in foreign):
                home[name] = _cut_value(name, home, layers, old, warnings)
        if "attention_types" in home and "attention_layers" in home:  # GPT-Neo says it twice
            home["attention_types"] = [[home["attention_layers"], 1]]
    return result, warnings


def _first_alone(layout: Layout, module: str, layers: Sequence[int]) -> list[str]:
    """T5 has its position bias in layer 0 of a stack, ModernBERT has no norm there: code that asks for a layer's number, of
    which no config tells."""
    holders: dict[str, set[int]] = {}
    for place in layout.places.values():
        if place.module == module and place.layer is not None:
            holders.setdefault(place.template, set()).add(place.layer)
    old = layout.layers[module]
    odd = [t for t, at in sorted(holders.items()) if old > 1 and at in ({0}, set(range(1, old)))]
    if not odd or (layers[0] == 0 and 0 not in layers[1:]):
        return []
    return [f"layer 0 of module `{module}` has other tensors than the layers after it ({', '.join(odd[:3])}"
            f"{', ..' if len(odd) > 3 else ''}), and it does not stand first, and only there, any more: the result will "
            "probably not load. Begin the first slice with layer 0, and repeat it nowhere"]


def _lists_layers(part: Mapping[str, Any], old: int) -> bool:
    return any(isinstance(part.get(name), list | str) and len(part[name]) == old for name in PER_LAYER)


def _counts_too(path: tuple[str, ...], key: tuple[str, ...], home: Mapping[str, Any], old: int, prefix: str,
                taken: Sequence[tuple[str, ...]]) -> bool:
    """Whether `path` holds the count that `key` holds: itself, or another spelling (`num_hidden_layers` beside
    `encoder_layers`, which transformers defines as the encoder's)."""
    if path == key:
        return True
    alone = path not in taken and path[-1] in {p[-1] for p in _counts(home)} and home[path[-1]] == old
    spelling = path[-1] in ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
    return alone and spelling and ("encoder" in _roles(prefix) or not any(t[:-1] == key[:-1] for t in taken))


def _cut_value(name: str, home: Mapping[str, Any], layers: Sequence[int], old: int, warnings: list[str]) -> Any:
    """One value of the config for the kept layers; unchanged where it says nothing about layers."""
    value = home[name]
    if name in FIRST and isinstance(value, int) and not isinstance(value, bool):
        return _first_layers(name, home, layers, old, warnings)
    if name in PERIODS and isinstance(value, int) and value > 1 and "layer_types" not in home:
        if any(i % value != layer % value for i, layer in enumerate(layers)):
            warnings.append(f"`{name}: {value}` gives every layer its kind by its number, and some kept layers have moved: "
                            "they will run as another kind than they were trained as. Move layers by multiples of it")
        return value
    if name == "hybrid_override_pattern" and isinstance(value, str) and len(value) == old:
        return "".join(value[i] for i in layers)
    if not isinstance(value, list) or NEVER_PER_LAYER.match(name):
        return value
    if _numbers_layers(name, value, old):
        return [i for i, layer in enumerate(layers) if layer in value]
    if len(value) != old:
        if name in PER_LAYER and value:
            warnings.append(f"`{name}` has {len(value)} entries for {old} layers, and was left as it is")
        return value
    if name not in PER_LAYER and not re.search(r"layer|block|type|pattern|window|interval|per_", name):
        warnings.append(f"`{name}` has as many entries as there were layers ({old}); taken for one per layer, and cut")
    return [copy.deepcopy(value[i]) for i in layers]


def _numbers_layers(name: str, value: list[Any], old: int) -> bool:
    """Whether a list holds numbers of layers, rather than an entry for each."""
    numbers = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < old for v in value)
    if not numbers or name in PER_LAYER:
        return False
    return name in LAYER_NUMBERS or (len(value) != old and bool(NUMBERS_NAME.match(name)) and value == sorted(set(value)))


def _first_layers(name: str, home: Mapping[str, Any], layers: Sequence[int], old: int, warnings: list[str]) -> int:
    """How many of the kept layers come from the first `home[name]`. They must still stand first."""
    below = [layer < home[name] for layer in layers]
    off = name == "max_window_layers" and ("layer_types" in home or not home.get("use_sliding_window", True))
    if not off and below != sorted(below, reverse=True):
        warnings.append(f"`{name}: {home[name]}` sets the first layers apart, and kept ones no longer stand first: some "
                        "will run as another kind than they were trained as")
    return sum(below) + max(0, home[name] - old)


def set_vocab_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """config.json with another size of the vocabulary, wherever the present one stands (also in `text_config`)."""
    result = copy.deepcopy(dict(config))
    nested = [(path, n) for path, n in _ints(result)
              if path[-1] == "vocab_size" and not _roles(".".join(path[:-1])) & OTHER_TOKENS]
    main = min(nested, key=lambda p: (len(p[0]), "text" not in _roles(".".join(p[0]))), default=None)
    if main is None:
        return result | {"vocab_size": size}
    for path, n in nested:
        if n == main[1]:
            _at(result, path[:-1])[path[-1]] = size
    return result


def set_tied(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """config.json with `tie_word_embeddings` said outright: at the top, and below where it is said there."""
    result = copy.deepcopy(dict(config))
    for part in _parts(result):
        if part is result or ("tie_word_embeddings" in part):
            part["tie_word_embeddings"] = tied
    return result


def set_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with `dtype` ('bfloat16', ..) wherever one stands, under the name that it has there.

    transformers 5 writes `dtype`, 4 wrote `torch_dtype`; both read the latter, which is set where there is neither.
    """
    result = copy.deepcopy(dict(config))
    for part in _parts(result):
        for key in ("dtype", "torch_dtype"):
            if key in part and isinstance(part[key], str | None):
                part[key] = dtype
    if not {"dtype", "torch_dtype"} & result.keys():
        result["torch_dtype"] = dtype
    return result


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)
