"""A checkpoint that another trainer returned: may it be a branch of this base?

It must have the base's tensors (names, shapes), finite numbers, the base's tokens and architecture; something must have
been trained, and nothing that the recipe freezes. Nothing of it is unpickled or run, and only its weights are taken:
config.json, tokenizer and templates of the branch are the base's own, so that a merge and an evaluation see one model.
A LoRA adapter is folded into the base (engine/adapter.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from anabranch.artifacts import BranchManifest, Mixture, Plan, file_digest, write_atomically
from anabranch.branch_folder import dress
from anabranch.branches import branch_samples, branch_steps, held_branch, planned_budget
from anabranch.checkpoints import checkpoints_in
from anabranch.engine.adapter import CONFIG as ADAPTER_CONFIG
from anabranch.engine.adapter import WEIGHTS as ADAPTER_WEIGHTS
from anabranch.engine.adapter import Adapter
from anabranch.engine.checkpoint import PICKLES, STEMS, Checkpoint, weight_files
from anabranch.engine.plan import line_up
from anabranch.errors import (
    AnabranchError,
    BranchFailed,
    CorruptedError,
    ModelError,
    OutputError,
    ProvenanceError,
    ShapeMismatch,
)
from anabranch.families import freezes, frozen_tensors, saved_names, skeleton
from anabranch.model import select_trainable
from anabranch.recipe import Recipe

if TYPE_CHECKING:
    from anabranch.run import Run

NARROW = {"F16": torch.float16, "BF16": torch.bfloat16}
JSON_LIMIT = 2**28  # bytes: tokenizer.json of a vocabulary of a million stays below
SHARD = 5 * 10**9  # bytes of a file of a folded adapter
FAR = 0.5  # |branch - base| / |base| that a fine-tuning hardly reaches
SHOWN = 8
# Settings of a config that change no number that the model computes from tokens.
NEUTRAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map",
           "pad_token_id", "bos_token_id", "eos_token_id", "output_attentions", "output_hidden_states", "return_dict",
           "id2label", "label2id", "_attn_implementation", "_attn_implementation_autoset", "axolotl_config_path",
           "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "is_decoder"}


@dataclass(frozen=True)
class Told:
    """What a trainer said of its work; None where it said nothing."""

    steps: int | None = None
    max_steps: int | None = None
    tokens: int | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Taken:
    """A checkpoint that was taken in. `files`: weight file -> SHA-256; `warnings`: sentences."""

    files: dict[str, str]
    warnings: list[str]


def accept_branch(run: Run, branch: int, folder: Path) -> BranchManifest:
    """Take in branch `branch` of a run from the model folder `folder` (`anabranch add-branch RUN K MODEL`).

    Beside an exported job's `job.json` it is also checked that the job was of this plan, data and settings.

    Raises:
        OutputError: the run has this branch already.
        ProvenanceError: it was trained from another job than the run's.
        ModelError, CorruptedError, ShapeMismatch: it cannot be this branch (`verify_checkpoint`).
        BranchFailed: its trainer stopped before its last step; or there is no such branch.
    """
    from anabranch.plan import load_plan

    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    out = run.branch(branch)
    if (out / "branch.json").exists():
        raise OutputError(f"{out}: branch {branch} is there already. Move that folder away first, if this one shall take its "
                          "place.")
    with held_branch(run.recipe, plan, branch, run.base_hash, out) as (_, hold):
        _check_job(folder, branch, hold.inputs)
        told = told_by_trainer(folder)
        taken = take_in(folder, run.base, run.recipe, out / "model", kept=out / "adapter")
        hold.stop.check()
        for warning in taken.warnings:
            run.tell(f"branch {branch}: {warning}")
        manifest = record_branch(run.recipe, plan, branch, mixture, run.folder / "mixture", hold.inputs, taken.files,
                                 told or Told(), "returned", {}, out)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of a training of ours that it makes needless
        return manifest


def _check_job(folder: Path, branch: int, inputs: dict[str, str]) -> None:
    """job.json of an exported job, where the model folder still stands beside it."""
    path = folder.resolve().parent / "job.json"
    if not path.is_file():
        return
    told = _json(path)
    words = {"base": "another base", "plan": "another plan", "data": "other training rows", "train": "other training settings"}
    said = told.get("made_from")
    problems = [f"it was exported for {words.get(key, key)}" for key, value in inputs.items()
                if not isinstance(said, dict) or said.get(key) != value]
    if told.get("branch") != branch:
        problems.insert(0, f"it is branch {told.get('branch')}, not {branch}")
    if problems:
        raise ProvenanceError.of(f"{folder}: not the branch of this run that it should be (see {path}). Export the jobs "
                                 "again, or give the folder that belongs to this run:", problems)


def record_branch(recipe: Recipe, plan: Plan, branch: int, mixture: Mixture, mixture_folder: Path, inputs: dict[str, str],
                  files: dict[str, str], told: Told, trainer: str, software: dict[str, str], out: Path) -> BranchManifest:
    """Write branch.json of a branch that TRL did not train. Raises BranchFailed if its trainer says that it is not done."""
    if told.steps is not None and told.max_steps is not None and told.steps < told.max_steps:
        raise BranchFailed(f"branch {branch}: its trainer stopped at step {told.steps} of {told.max_steps} "
                           "(trainer_state.json). Train it to its last step; a checkpoint from before would weigh in the "
                           "merge as if it had been.")
    samples = branch_samples(plan, branch, mixture, mixture_folder, recipe.seed)
    rows, tokens = planned_budget(recipe, samples)
    steps = branch_steps(recipe, sum(len(chosen) for _, _, chosen in samples))
    manifest = BranchManifest(
        branch=branch, group_units=[name for name, _, _ in samples], steps=steps if told.steps is None else told.steps,
        samples_planned=rows, tokens_planned=tokens, tokens_seen=tokens if told.tokens is None else told.tokens,
        final_loss=told.losses[-1][1] if told.losses else None, losses=told.losses, files=files, made_from=inputs,
        software=software, trainer=trainer, counted=told.steps is not None and told.tokens is not None)
    manifest.save(out / "branch.json")
    return manifest


def told_by_trainer(*folders: Path) -> Told | None:
    """From trainer_state.json of the Hugging Face trainers, in the first folder that has one, or in its newest checkpoint."""
    for folder in folders:
        for place in (folder, *checkpoints_in(folder)):
            if (place / "trainer_state.json").is_file():
                return _told(_json(place / "trainer_state.json"))
    return None


def _told(state: dict[str, Any]) -> Told:
    def whole(key: str) -> int | None:
        value = state.get(key)
        return value if isinstance(value, int) and 0 < value < 2**53 else None

    history = state.get("log_history")
    losses = [(e["step"], float(e["loss"])) for e in (history if isinstance(history, list) else [])
              if isinstance(e, dict) and isinstance(e.get("step"), int) and isinstance(e.get("loss"), int | float)
              and abs(e["loss"]) < 1e300]  # neither NaN nor infinite, nor a whole number that no float can hold
    return Told(whole("global_step"), whole("max_steps"), whole("num_input_tokens_seen"), losses)


def _json(path: Path) -> dict[str, Any]:
    """Raises CorruptedError."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than {JSON_LIMIT:,}")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"holds {type(value).__name__}, wanted an object")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptedError(f"{path}: cannot be read as JSON ({error}).") from error


# -------------------------------------------------------------------------------------------------------------- taking in


def take_in(folder: Path, base: Path, recipe: Recipe, into: Path, *, kept: Path | None = None) -> Taken:
    """Verify a returned checkpoint and put its weights, with the base's config and tokenizer, into the model folder `into`.

    Args:
        kept: where an adapter that was folded is kept too.
    Raises:
        ModelError, CorruptedError, ShapeMismatch: as `verify_checkpoint`.
    """
    partial = into.with_name(into.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    warnings = []
    try:
        if (folder / ADAPTER_CONFIG).is_file() and not any(folder.glob("model*.safetensors")):
            warnings += _fold(folder, base, partial)
        else:
            _copy_weights(folder, base, partial)
        warnings += verify_checkpoint(partial, base, recipe, said=folder)
        (partial / "tokenizer.json").unlink(missing_ok=True)
        dress(partial, base, code=recipe.model.trust_remote_code)
    except AnabranchError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise type(error)(str(error).replace(str(partial), str(folder))) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if kept is not None and (folder / ADAPTER_CONFIG).is_file():
        kept.mkdir(parents=True, exist_ok=True)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, kept / name)
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        warnings.append(f"{', '.join(pickles)} of {folder} left behind: pickles are neither loaded nor copied")
    shutil.rmtree(into, ignore_errors=True)
    os.replace(partial, into)
    return Taken({p.name: file_digest(p) for p in sorted(into.glob("*.safetensors"))}, warnings)


def _copy_weights(folder: Path, base: Path, partial: Path) -> None:
    """The weight files that the index names, config.json and the tokenizer, as they are: only copies are looked at, so that
    what was verified is what is kept. Bounded by what the base is."""
    beside = [name for stem in STEMS for name in (f"{stem}.safetensors.index.json", "config.json", "tokenizer.json")
              if (folder / name).is_file()]
    for name in beside:
        _json(folder / name)
    try:
        files = weight_files(folder)
    except ModelError as error:
        nested = sorted(p.parent.name for p in folder.glob("*/config.json")) if folder.is_dir() else []
        raise ModelError(f"{error}{' A model stands below it in ' + ', '.join(nested[:5]) + '.' if nested else ''}") from error
    size, most = sum(p.stat().st_size for p in files), 2**26 + 4 * sum(p.stat().st_size for p in weight_files(base))
    if size > most:
        raise ShapeMismatch(f"{folder}: {size:,} bytes of weights, and the base has {most // 4:,}: this is no branch of it.")
    partial.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, partial / path.name)
    for name in beside:
        shutil.copyfile(folder / name, partial / name)


def _fold(folder: Path, base: Path, partial: Path) -> list[str]:
    """A LoRA adapter folded into the base: a whole float32 checkpoint. What its user should know."""
    origin = Checkpoint.open(base)
    adapter = Adapter.open(folder, origin)
    partial.mkdir(parents=True)
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in origin.tensors.items():
        if groups[-1] and size + 4 * info.numel > SHARD:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 4 * info.numel
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: adapter.folded(name) if adapter.touches(name) else _widened(origin.read(name)) for name in names},
                  partial / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(4 * i.numel for i in origin.tensors.values())}, "weight_map": weight_map}
        write_atomically(partial / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
    shutil.copyfile(base / "config.json", partial / "config.json")
    if (folder / "tokenizer.json").is_file():
        _json(folder / "tokenizer.json")
        shutil.copyfile(folder / "tokenizer.json", partial / "tokenizer.json")
    return ["a LoRA adapter, folded into the base in float32", *adapter.warnings]


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.clone()


# -------------------------------------------------------------------------------------------------------------- verifying


def verify_checkpoint(folder: Path, base: Path, recipe: Recipe, *, said: Path | None = None) -> list[str]:
    """Whether a model folder can be a branch trained from `base` under the recipe's `model` section.

    Args:
        said: the folder's name in messages, where `folder` is a copy of it.
    Returns:
        sentences that its user should read: a narrow dtype, weights far from the base's.
    Raises:
        ModelError, CorruptedError: not a whole model in safetensors, or one of another architecture; or any of: other
            tokens, NaN or infinity, nothing changed, frozen parameters changed. All problems in one message.
        ShapeMismatch: tensors that are missing, extra or of other shapes, and those problems that can be told then.
    """
    said = said or folder
    origin, candidate = Checkpoint.open(base), Checkpoint.open(folder)
    problems = [*_config_problems(candidate, origin, recipe.model.trust_remote_code), *_token_problems(folder, base)]
    try:
        names = line_up(origin, [candidate])
    except AnabranchError as error:
        first, *lines = str(error).splitlines()
        lines = _cut([line.removeprefix("  - ") for line in lines])
        if not isinstance(error, ShapeMismatch):  # its first line says what to do
            lines.insert(0, first)
        problems += [line.replace(f"branch 0 ({folder})", "it").replace(str(folder), str(said)) for line in lines]
        raise ShapeMismatch.of(f"{said}: cannot be a branch of {base}:", problems) from error
    seen = _look(origin, candidate, names)
    allowed = _may_change(base, recipe, names)
    problems += _value_problems(seen, allowed)
    if problems:
        raise ModelError.of(f"{said}: cannot be a branch of {base}:", problems)
    unchecked = allowed is None and (recipe.model.lora is not None or freezes(recipe.model))
    return [*_warnings(seen, candidate), *(
        ["which parameters may change could not be found out for this architecture, so that was not checked"] if unchecked
        else [])]


@dataclass
class _Seen:
    """What a pass over all tensors found."""

    odd: list[str] = field(default_factory=list)
    changed: dict[str, float] = field(default_factory=dict)  # tensor -> share of entries that differ from the base
    rounded: list[str] = field(default_factory=list)  # changed by nothing but a rounding of the base to bfloat16 or float16
    delta: float = 0.0  # squared length of the change of all matrices
    norm: float = 0.0  # and of the base's matrices


def _look(origin: Checkpoint, candidate: Checkpoint, names: list[str]) -> _Seen:
    seen = _Seen()
    for name in names:
        here, there = candidate.read(name), origin.read(name)
        if not here.is_floating_point():
            continue  # line_up has found such buffers equal
        if not bool(torch.isfinite(here).all()):
            seen.odd.append(f"tensor '{name}' holds NaN or infinity in {int((~torch.isfinite(here)).sum()):,} of "
                            f"{here.numel():,} entries")
            continue
        matrix = there.dim() > 1  # norms' weights are near one in any model
        seen.norm += float(there.double().square().sum()) if matrix else 0.0
        if here.numel() == 0 or here.equal(there.to(here.dtype)):
            continue
        if any(here.equal(there.to(narrow).to(here.dtype)) for narrow in NARROW.values()):
            seen.rounded.append(name)
            continue
        seen.changed[name] = float((here != there.to(here.dtype)).double().mean())
        seen.delta += float((here.double() - there.double()).square().sum()) if matrix else 0.0
    return seen


def _value_problems(seen: _Seen, allowed: set[str] | None) -> Iterator[str]:
    yield from _cut(seen.odd)
    if not seen.odd and not seen.changed:
        rounded = f" ({len(seen.rounded)} tensors are the base's, rounded to a narrower dtype)" if seen.rounded else ""
        yield f"nothing was trained: every tensor is the base's{rounded}. Was the right folder given?"
    if allowed is not None:
        yield from _cut([f"tensor '{name}' was changed ({share:.0%} of its entries); the recipe's `model` section freezes it"
                         for name, share in seen.changed.items() if name not in allowed])


def _warnings(seen: _Seen, candidate: Checkpoint) -> Iterator[str]:
    narrow = sorted({i.dtype for i in candidate.tensors.values()} & NARROW.keys())
    if narrow:
        share = sum(s * candidate.tensors[n].numel for n, s in seen.changed.items()) / sum(
            i.numel for i in candidate.tensors.values())
        yield (f"saved in {', '.join(narrow)}: {share:.0%} of all entries differ from the base, the rest of what was learned "
               "was rounded away. Save float32 weights where you can")
    if seen.rounded:
        yield (f"{len(seen.rounded)} tensors are the base's rounded to a narrower dtype (such as {seen.rounded[0]}): it was "
               "trained from a rounded base")
    if seen.norm and (far := math.sqrt(seen.delta / seen.norm)) > FAR:
        yield (f"its matrices are {far:.2f} times the base's own length away from it; a fine-tuning seldom goes that far. Was "
               "it trained from this base?")


def _config_problems(candidate: Checkpoint, origin: Checkpoint, trust: bool) -> list[str]:
    """Settings that make another model of the same tensors; both as transformers understands them, where it does."""
    if "quantization_config" in candidate.config:
        return ["config.json has a `quantization_config`: packed weights cannot be merged. Save it dequantised"]
    here, there = (_understood(c, trust) for c in (candidate, origin))
    both = here is not None and there is not None
    here, there = _telling(here if both else candidate.config), _telling(there if both else origin.config)
    keys = here.keys() | there.keys() if both else here.keys() & there.keys()
    return _cut([f"config.json: `{key}` is {json.dumps(here.get(key))[:80]}, the base has {json.dumps(there.get(key))[:80]}: "
                 "another base" for key in sorted(keys) if here.get(key) != there.get(key)])


def _telling(config: Any) -> Any:
    """A config without what changes no number, also of its parts (`text_config`)."""
    return {k: _telling(v) for k, v in config.items() if k not in NEUTRAL} if isinstance(config, dict) else config


def _understood(checkpoint: Checkpoint, trust: bool) -> dict[str, Any] | None:
    """config.json with all defaults, as transformers reads it; None where it cannot."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=trust)
        return json.loads(json.dumps(config.to_dict(), default=str))
    except Exception:  # an architecture of its own, or a config of no known one: compared as it stands
        return None


def _token_problems(folder: Path, base: Path) -> list[str]:
    """Tokens of the base by number, where both have a tokenizer.json. Further tokens are no matter: rows are tokenised by the
    base's, and some tokenizers add their own special tokens whenever they are saved."""
    if not ((folder / "tokenizer.json").is_file() and (base / "tokenizer.json").is_file()):
        return []
    here, there = (_tokens(_json(place / "tokenizer.json")) for place in (folder, base))
    differ = sorted(t for t in there if here.get(t) != there[t])
    if not differ:
        return []
    return [f"tokenizer.json: {len(differ):,} of the base's tokens have another number or none (such as "
            f"{', '.join(repr(t) for t in differ[:3])}): the model was trained on other tokens"]


def _tokens(tokenizer: dict[str, Any]) -> dict[str, int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [token, score]
        found = {str(entry[0]): i for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    else:
        found = {str(t): i for t, i in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    added = tokenizer.get("added_tokens")
    return found | {str(a["content"]): a["id"] for a in (added if isinstance(added, list) else [])
                    if isinstance(a, dict) and {"content", "id"} <= a.keys()}


def _may_change(base: Path, recipe: Recipe, names: list[str]) -> set[str] | None:
    """Tensors that training under the recipe's `model` section may change; None: all, or not to be found out."""
    section = recipe.model
    held = frozen_tensors(base, section)
    if section.lora is None:
        return set(names) - held if freezes(section) else None
    touched = _touched(base, recipe, names)
    return touched - held if touched is not None else set(names) - held if held else None


def _touched(base: Path, recipe: Recipe, names: list[str]) -> set[str] | None:
    """Tensors that adapters sit on, or that are saved whole beside them; None where that cannot be found out."""
    section, lora = recipe.model, recipe.model.lora or {}
    if lora.get("target_parameters") or lora.get("trainable_token_indices"):
        return None
    model = skeleton(base, section.trust_remote_code)
    if model is None:
        return None
    saved = saved_names(model)
    chosen = {file for name in select_trainable(model, section) for file in ({name} & set(names) or saved[name])}
    if not chosen <= set(names):
        return None  # transformers has other names for them in memory than in the file
    whole = lora.get("modules_to_save") or []
    return chosen | {n for n in names if set(n.split(".")) & set(whole)} | {
        n for n in names if n.endswith(".bias") and lora.get("bias", "none") != "none"}


def _cut(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN
    return [*problems[:SHOWN], f".. and {more} more like these"] if more > 0 else problems
