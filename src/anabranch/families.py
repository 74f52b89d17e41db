"""Parts of a model that do not train: presets by model family, patterns, and what they are called in files.

A pattern (* and ?) goes over parameter names as a loaded model has them (`model.visual.blocks.0..`), which are not always those
in its files (`visual.blocks.0..`): transformers renames on loading, and back on saving. `saved_names` asks transformers itself.

A preset stands for a family's patterns. Its patterns are told before they are used, and every family of the table below is
built and checked in tests/pipeline/test_freeze.py: each preset matches, none overlap, together they are the model.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.engine.checkpoint import Checkpoint
from anabranch.errors import ModelError, RecipeError
from anabranch.recipe import Model as ModelSection
from anabranch.vision import model_class

Patterns = Mapping[str, tuple[str, ...]]

VISION, PROJECTOR, LANGUAGE = PRESETS = ("vision tower", "projector", "language model")
HEAD = "lm_head.*"


def _parts(vision: Iterable[str], projector: Iterable[str], language: Iterable[str]) -> Patterns:
    return {VISION: tuple(vision), PROJECTOR: tuple(projector), LANGUAGE: tuple(language)}


_TEXT = ("model.language_model.*", HEAD)
_VISUAL = ("model.visual.patch_embed.*", "model.visual.pos_embed.*", "model.visual.blocks.*")
_LLAVA = _parts(["model.vision_tower.*"], ["model.multi_modal_projector.*", "model.image_newline"], _TEXT)
_QWEN = _parts(_VISUAL, ["model.visual.merger.*", "model.visual.deepstack_merger_list.*"], _TEXT)
_GLM = _parts([*_VISUAL, "model.visual.embeddings.*", "model.visual.post_conv_layernorm.*", "model.visual.post_layernorm.*"],
              ["model.visual.downsample.*", "model.visual.merger.*"], _TEXT)
_IDEFICS = _parts(["model.vision_model.*"], ["model.connector.*"], ["model.text_model.*", HEAD])

# model_type of config.json -> its parts
FAMILIES: dict[str, Patterns] = {
    **dict.fromkeys(("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "paligemma", "gemma3",
                     "internvl", "mistral3", "aya_vision", "cohere2_vision", "got_ocr2", "lfm2_vl", "aria"), _LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _QWEN),
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v"), _GLM),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _IDEFICS),
    "mllama": _parts(["model.vision_model.*"], ["model.multi_modal_projector.*"], _TEXT),
    "llama4": _parts(["vision_model.*"], ["multi_modal_projector.*"], ["language_model.*"]),
    "video_llava": _parts(["model.image_tower.*", "model.video_tower.*"], ["model.multi_modal_projector.*"], _TEXT),
    "deepseek_vl": _parts(["model.vision_model.*"], ["model.aligner.*"], _TEXT),
    "lighton_ocr": _parts(["model.vision_encoder.*"], ["model.vision_projection.*"], _TEXT),
}


@dataclass(frozen=True)
class FrozenPart:
    """What one entry of `model.freeze` holds still: its patterns, the parameters that they match, and their numbers."""

    entry: str
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    entries: int


def frozen_parts(model: Any, section: ModelSection) -> list[FrozenPart]:
    """What `model.freeze` holds still in a loaded model (or one without its numbers), entry by entry.

    Tied parameters are one: under whichever name they are matched, they are listed under the name that comes first.

    Raises:
        ModelError: a preset of a family without presets; a pattern that matches nothing; nothing is left to train. All problems
            in one message.
    """
    if not section.freeze:
        return []
    names, sizes = _canonical(model), {n: p.numel() for n, p in model.named_parameters()}
    presets = FAMILIES.get(_family(model), {})
    parts, problems = [], []
    for entry in section.freeze:
        if entry in PRESETS and not presets:
            problems.append(_no_preset(model, entry))
            continue
        patterns = presets.get(entry, (entry,))
        found = dict.fromkeys(names[n] for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns))
        if not found:
            problems.append(_no_match(model, entry, list(names)))
        parts.append(FrozenPart(entry, tuple(p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in names)),
                                tuple(found), sum(sizes[n] for n in found)))
    if not problems and {n for part in parts for n in part.names} >= sizes.keys():
        problems.append("together they are the whole model, so nothing would train. Leave the part out that shall learn")
    if problems:
        raise ModelError.of("model.freeze:", problems)
    return parts


def frozen_names(model: Any, section: ModelSection) -> set[str]:
    """Names (as `named_parameters` has them) of what `model.freeze` holds still. Raises as `frozen_parts`."""
    return {name for part in frozen_parts(model, section) for name in part.names}


def describe_frozen(model: Any, section: ModelSection) -> list[str]:
    """Lines that say what `model.freeze` holds still, and what is left: for people, before it is used. Raises ModelError."""
    parts = frozen_parts(model, section)
    if not parts:
        return []
    still, sizes = {n for part in parts for n in part.names}, {n: p.numel() for n, p in model.named_parameters()}
    lines = []
    for part in parts:
        meant = f" ({_family(model)}: {', '.join(part.patterns)})" if part.entry in PRESETS else ""
        lines.append(f"freeze: {part.entry}{meant}: {len(part.names)} tensor{'s' if len(part.names) > 1 else ''}, "
                     f"{part.entries:,} parameters")
    tied = sorted(f"{n} (tied to {c})" for n, c in _canonical(model).items() if n != c and c in still)
    left, whole = sum(size for n, size in sizes.items() if n not in still), sum(sizes.values())
    return [*lines, *([f"freeze: so also {', '.join(tied)}"] if tied else []),
            f"freeze: {len(sizes) - len(still)} of {len(sizes)} tensors, {left:,} of {whole:,} parameters are not frozen "
            f"({left / whole:.0%})"]


def _family(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _canonical(model: Any) -> dict[str, str]:
    """Every name of a parameter, tied ones too -> the name under which `named_parameters` lists it."""
    first = {id(p): n for n, p in model.named_parameters()}
    return {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}


# ---- words -----------------------------------------------------------------------------------------------------------

MOST_PARTS = 16  # lines of a model's parts


def parts_of(model: Any) -> list[str]:
    """A model's parts with their sizes: 'model.visual.blocks.*  629,678,080 parameters', largest first."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        words: list[str] = []
        for word in name.split(".")[:-1][:3]:
            if word.isdecimal():
                break
            words.append(word)
        prefix = ".".join([*words, "*"]) if words else name
        sizes[prefix] = sizes.get(prefix, 0) + parameter.numel()
    listed = sorted(sizes.items(), key=lambda one: -one[1])
    return [f"{prefix} {size:,} parameters" for prefix, size in listed[:MOST_PARTS]] + (
        [f".. and {len(listed) - MOST_PARTS} smaller ones"] if len(listed) > MOST_PARTS else [])


def _no_preset(model: Any, entry: str) -> str:
    family = _family(model)
    if not hasattr(model.config, "vision_config"):
        return (f"`{entry}` is a part of vision-language models, and this is a language model (`{family}`). Give patterns over "
                f"parameter names. Its parts: {'; '.join(parts_of(model))}")
    return (f"`{entry}` stands for a part of a vision-language model, and there is no table for models of type `{family}`. "
            f"Give patterns over parameter names instead. Its parts: {'; '.join(parts_of(model))}")


def _no_match(model: Any, entry: str, names: list[str]) -> str:
    """Why an entry matches nothing: a misspelled preset, a module instead of a pattern, a name as in the files, a typo."""
    said = f"`{entry}` matches no parameter."
    plain = re.sub(r"[_\-\s]+", " ", entry).strip().casefold()
    if not set(entry) & set("*?.") and (near := difflib.get_close_matches(plain, PRESETS, n=1, cutoff=0.75)):
        return f"{said} Did you mean `{near[0]}`?"
    if inside := [n for n in names if n.startswith(entry.rstrip(".") + ".")]:
        return f"{said} It is a module of {len(inside)} parameters: write `{entry.rstrip('.')}.*`."
    in_files = {file: live for live, files in saved_names(model).items() for file in files}
    if matched := [file for file in in_files if fnmatch.fnmatchcase(file, entry) or file.startswith(entry + ".")]:
        return (f"{said} It matches names in the model's files, which are others once it is loaded: {matched[0]} is "
                f"{in_files[matched[0]]} there. Write `{_renamed(entry, matched[0], in_files[matched[0]])}`.")
    above = Counter(".".join(n.split(".")[:i]) + ".*" for n in names for i in range(1, n.count(".") + 1))
    prefixes = sorted({prefix for prefix, count in above.items() if count < 0.9 * len(names)} | set(names))
    near = difflib.get_close_matches(entry, prefixes, n=3, cutoff=0.6)
    return (f"{said} Did you mean {', '.join(f'`{n}`' for n in near)}?" if near else
            f"{said} Its parts: {'; '.join(parts_of(model))}")


def _renamed(entry: str, file: str, live: str) -> str:
    """A pattern over names in files as one over live names: with the part exchanged by which the two names differ."""
    common = 0
    while common < min(len(file), len(live)) and file[-1 - common] == live[-1 - common]:
        common += 1
    before, now = file[: len(file) - common], live[: len(live) - common]
    return now + entry[len(before):] if entry.startswith(before) else f"{now}*"


# ---- names in files --------------------------------------------------------------------------------------------------


def saved_names(model: Any) -> dict[str, tuple[str, ...]]:
    """Parameter of a loaded model -> its names in files, as transformers saves it: one, or several (a tied head under its own
    name too; fused experts as one tensor each). Reads no number. An empty tuple where transformers cannot tell."""
    state, saved = _saved_state(model)
    files: dict[int, list[str]] = {}
    for name, tensor in saved.items():
        files.setdefault(id(tensor), []).append(name)
    found = {}
    for name, _ in model.named_parameters():
        same = files.get(id(state[name]))
        found[name] = tuple(same if same is not None else _converted(model, name, state[name]))
    return found


def saved_tensors(model: Any) -> tuple[set[str], set[str]]:
    """(all names under which transformers saves a loaded model, those of them that repeat a tied tensor and may be missing)."""
    state, saved = _saved_state(model, tied=False)
    repeats = {id(state[n]) for n in getattr(model, "all_tied_weights_keys", None) or {} if n in state}
    ignored = {n for n in saved for p in getattr(model, "_keys_to_ignore_on_save", None) or [] if re.search(p, n)}
    return set(saved) - ignored, {n for n, t in saved.items() if id(t) in repeats}


def _saved_state(model: Any, *, tied: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's state under its own names and under those in files, with tensors that hold no numbers: the same object where
    it is the same tensor (`tied`: also under several of its own names)."""
    from transformers.core_model_loading import revert_weight_conversion

    stand_ins: dict[int, torch.Tensor] = {}
    state = {name: stand_ins.setdefault(id(tensor) if tied else -len(stand_ins) - 1, torch.empty_like(tensor, device="meta"))
             for name, tensor in model.state_dict(keep_vars=True).items()}
    return state, revert_weight_conversion(model, dict(state))


def _converted(model: Any, name: str, stand_in: torch.Tensor) -> list[str]:
    """Names of the pieces that one parameter is saved as; none where it is saved as a piece of another."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return list(revert_weight_conversion(model, {name: stand_in}))
    except Exception:  # it cannot be converted by itself: transformers raises whatever the conversion does
        return []


def frozen_tensors(base: Path, section: ModelSection) -> frozenset[str]:
    """Tensors of a base's files that training under the recipe's `model` section may not change: those of parameters that
    `freeze` names or that `trainable` leaves out. Adapters alone freeze nothing here: what they do not sit on is theirs.

    Reads no weights, but where transformers cannot build the model without them.

    Raises:
        ModelError: as `frozen_parts`; or it cannot be told under which names the frozen parameters are saved.
    """
    if not freezes(section):
        return frozenset()
    model = skeleton(base, section.trust_remote_code)
    if model is None:
        from anabranch.model import load_model  # which asks us what is frozen

        model = load_model(base, "float32", trust_remote_code=section.trust_remote_code)
    there = set(Checkpoint.open(base).tensors)
    for names in _namings(model, base):
        if all(set(files) & there for files in names.values()):
            return frozenset(frozen_files(model, section, names) & there)
    raise ModelError(f"model folder {base}: its tensors are named otherwise than transformers saves them, so it cannot be told "
                     "which of them `model.freeze` holds still. Write it anew once, and give that folder: "
                     "AutoModelForImageTextToText.from_pretrained(OLD).save_pretrained(NEW), and its processor likewise.")


def frozen_files(model: Any, section: ModelSection, names: Mapping[str, tuple[str, ...]] | None = None) -> set[str]:
    """Names in files of what does not train, less what something that trains is saved in too. `names`: as `saved_names`."""
    names, still = names or saved_names(model), not_trained(model, section)
    moving = {file for name, files in names.items() if name not in still for file in files}
    return {file for name in still for file in names[name]} - moving


def _namings(model: Any, base: Path) -> Iterable[dict[str, tuple[str, ...]]]:
    """Names in files: as transformers saves a new model; as in memory; as it saves what it loads from these very files."""
    yield saved_names(model)
    yield {name: (name,) for name, _ in model.named_parameters()}
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield saved_names(type(model).from_pretrained(str(base), device_map="meta"))
    except Exception:  # whatever it raises: there is no third way
        return


def freezes(section: ModelSection) -> bool:
    """Whether a recipe's `model` section holds parameters still by name."""
    return bool(section.freeze) or (section.lora is None and section.trainable != ["*"])


def not_trained(model: Any, section: ModelSection) -> set[str]:
    """Parameters that `freeze` names or `trainable` leaves out. Raises as `frozen_parts`."""
    still = frozen_names(model, section)
    if section.lora is None:
        still |= {n for n, _ in model.named_parameters() if not any(fnmatch.fnmatchcase(n, p) for p in section.trainable)}
    return still


def skeleton(base: Path, trust: bool) -> Any:
    """The model's modules without its numbers; None where transformers cannot build it."""
    from transformers import AutoConfig

    kind = model_class(base)
    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=trust)
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=trust)
    except Exception:  # an architecture that it does not know, or whose making needs numbers
        return None


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapter_arguments(model: Any, section: ModelSection) -> dict[str, Any]:
    """`model.lora` for peft.LoraConfig, with the frozen layers kept out of it (`exclude_modules`).

    Raises:
        RecipeError: adapters that would train what `model.freeze` holds still, or half of a tied pair.
        ModelError: as `frozen_parts`.
    """
    lora = copy.deepcopy(dict(section.lora or {}))  # peft writes into the lists that it is given
    canonical = _canonical(model)
    problems = []
    if section.freeze:
        still = frozen_names(model, section)
        problems = _frozen_problems(model, lora, {n for n, c in canonical.items() if c in still})
        lora |= _kept_out(model, lora, {n for n, c in canonical.items() if c in still})
    problems += _tied_problems(model, lora, canonical)
    if problems:
        raise RecipeError.of("recipe: model.lora does not fit the model:", problems)
    return lora


def _kept_out(model: Any, lora: Mapping[str, Any], still: set[str]) -> dict[str, Any]:
    """`exclude_modules` with the layers of frozen parameters."""
    # every kind of layer that `target_modules` may name; a tied head goes by its own name there
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)}
    frozen = sorted(n for n in layers if f"{n}.weight" in still)
    if not frozen:
        return {}
    own = lora.get("exclude_modules")
    asked = [own] if isinstance(own, str) else [rf"(?:.*\.)?{re.escape(n)}" for n in own or []]
    return {"exclude_modules": "|".join([*asked, *map(re.escape, frozen)])}


def _tied_problems(model: Any, lora: Mapping[str, Any], canonical: Mapping[str, str]) -> list[str]:
    """Adapters that would part the head from the embedding that it is tied to: both are one tensor in the branch's files."""
    counts = Counter(canonical.values())
    tied = sorted({n.rpartition(".")[0] for n, c in canonical.items() if counts[c] > 1})
    if not tied:
        return []
    remedy = (f"It is tied: {' and '.join(tied)} are one tensor, so that no branch can hold what trains in one of them alone. "
              "Take it out, or train that tensor whole: `modules_to_save: [embed_tokens]` with `ensure_weight_tying: true`")
    problems = [f"`modules_to_save: {name}` would train {held[0]}. {remedy}"
                for name in (lora.get("modules_to_save") or [] if not lora.get("ensure_weight_tying") else [])
                if (held := [n for n in tied if any(end.endswith(name) for end in (n, *_modules_above(n)))])]
    problems += [f"`target_parameters: {p}` would put an adapter on {held[0]}. {remedy}"
                 for p in lora.get("target_parameters") or [] if (held := [n for n in tied if _names([p], f"{n}.weight")])]
    rows = lora.get("trainable_token_indices")  # peft trains the embedding's own in both
    named = rows if isinstance(rows, dict) else ()
    inner = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), "")
    problems += [f"`trainable_token_indices: {p}` would train {held[0]}. {remedy}"
                 for p in named if (held := [n for n in tied if n != inner and _names([p], n)])]
    targets = lora.get("target_modules") or "all-linear"
    if targets == "all-linear":  # which leaves head and embedding out
        return problems
    some = lora.get("layers_to_transform") is not None  # then an end of a name means modules of these layers alone
    adapted = [n for n in tied if (n in targets if some else _names(targets, n)) and
               not _names(lora.get("exclude_modules") or [], n)]
    return problems + ([f"`target_modules` would put an adapter on {adapted[0]}. {remedy}"] if adapted else [])


def _names(patterns: str | Iterable[str], module: str) -> bool:
    """Whether peft takes the module to be meant: by a pattern for the whole name, or by the end of the name."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == p or module.endswith(f".{p}") for p in patterns)


def _frozen_problems(model: Any, lora: Mapping[str, Any], still: set[str]) -> list[str]:
    """What would train frozen parameters beside the low-rank factors; `still`: under all their names, tied ones too."""
    problems = []
    if lora.get("bias", "none") == "all" and any(n.endswith(".bias") for n in still):
        problems.append("`bias: all` trains the frozen parts' biases too. Say `lora_only` or `none`")
    for name in lora.get("modules_to_save") or []:  # peft takes every module whose name ends so
        if held := sorted(n for n in still if any(end.endswith(name) for end in _modules_above(n))):
            problems.append(f"`modules_to_save: {name}` would train {held[0]}, which is frozen")
    embedding = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), "embed_tokens")
    rows = lora.get("trainable_token_indices") or []
    for key, named in (("target_parameters", lora.get("target_parameters") or []),
                       ("trainable_token_indices", list(rows) if isinstance(rows, dict) else [embedding])):
        if lora.get(key) and (held := sorted(n for n in still for w in named if f".{w}." in f".{n}.")):
            problems.append(f"`{key}` would train {held[0]}, which is frozen")
    return problems


def _modules_above(name: str) -> list[str]:
    """The modules that a parameter lies in, innermost first."""
    words = name.split(".")
    return [".".join(words[:i]) for i in range(len(words) - 1, 0, -1)]
