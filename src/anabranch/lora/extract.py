"""A fine-tune as a LoRA adapter of its base: `anabranch lora extract`.

    D = W_finetuned - W_base, float32        B A: the best of its rank, alpha / r = 1

Only what changed is taken: matrices as factors, biases of those as they are (`bias: all`), norms and whatever else has no
low-rank form whole, as `modules_to_save`. Embeddings and the output head are saved whole, or decomposed with `embed_lora`.

Where this differs from mergekit-extract-lora (merge specification, 7.4): the difference is formed in float32, not in the
stored dtype; what did not change is left out; a convolution is [out, rest]; GPT-2's Conv1D is decomposed; a bias is never
saved where PEFT passes over it; tied embeddings stay tied; modules are named in full where a short name would catch others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.artifacts import MergeManifest
from anabranch.engine.adapter import EMBEDDING, HEAD
from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.fetch import quantisation, resolve
from anabranch.engine.making import ADAPTER, Made, Read, copied, make_model
from anabranch.engine.merging import place_for
from anabranch.engine.plan import DTYPES
from anabranch.engine.stream import Progress
from anabranch.errors import ModelError, RecipeError, ShapeMismatch, closest
from anabranch.lora.factors import Choice, Found, Matrix, factors_folder, find, rounded, side_by_side, spelled
from anabranch.lora.modules import DECOMPOSED, Module, modules_of, short_names
from anabranch.lora.output import adapter_files, config_of, done_already, drop, dropped_if_refused, factor_tensors, key_of
from anabranch.merge.low_rank import LowRank, low_rank
from anabranch.rows import generator
from anabranch.surgery.side_files import carry_tokenizer

VERB = "lora extract"
CHUNK = 1 << 20  # numbers of a difference formed at once
SHOWN = 12


@dataclass(frozen=True)
class Wish:
    """What to take of a fine-tune.

    choice            how many directions of each matrix
    include, exclude  regular expressions, searched in the names of modules: some `include` must fit if any is given, and no
                      `exclude` may
    save_modules      modules saved whole, by name or by the last part of it
    embed_lora        decompose embeddings and the output head too
    distribute_scale  share singular values between both factors; else A has them all, and B's columns have length 1
    skip_undecomposable   leave out what has no low-rank form, instead of saving it whole
    dtype             of the factors, as safetensors spells it; None: as the fine-tune stores its matrices
    """

    choice: Choice
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save_modules: tuple[str, ...] = ()
    embed_lora: bool = False
    distribute_scale: bool = True
    skip_undecomposable: bool = False
    dtype: str | None = None

    def names(self, module: Module) -> bool:
        return module.path in self.save_modules or module.leaf in self.save_modules


@dataclass
class _Parts:
    """Which module goes which way. `left_out`: changed tensors that the adapter does not hold, with the reason."""

    decomposed: list[Module] = field(default_factory=list)
    saved: list[Module] = field(default_factory=list)
    biases: list[tuple[str, str]] = field(default_factory=list)  # module path, the checkpoint's tensor
    left_out: dict[str, str] = field(default_factory=dict)


def extract(
    finetuned: Path | str,
    base: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    save_modules: Sequence[str] = (),
    embed_lora: bool = False,
    distribute_scale: bool = True,
    sv_epsilon: float = 0.0,
    skip_undecomposable: bool = False,
    dtype: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    memory: str | int | None = None,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> MergeManifest:
    """Write the adapter folder `out`: PEFT loads it, and with the base it gives the fine-tune.

    Args:
        finetuned, base: model folders, or ids on the Hub.
        rank: most directions of each matrix; 128 where neither `energy` nor `budget` is given.
        energy: keep this share of each matrix's squared change, in (0, 1].
        budget: parameters of all factors together, spent where they keep most.
        sv_epsilon: singular values not above it are left out.
        dtype: 'float32', 'bfloat16' or 'float16', of the factors; None: as the fine-tune stores its matrices.
        threads, memory: workers, and bytes for the process; neither changes a byte of the result.
        warn: told each thing that the user should know.
        The others: see `Wish`.
    Returns:
        The manifest; its `report` has, for every matrix, rank, kept energy and the relative error of the rounded factors.
    Raises:
        RecipeError: numbers or patterns that choose nothing. ModelError: models that cannot be compared, quantised ones,
        equal ones. ShapeMismatch: tensors of other shapes. OutputError: `out` holds something else, or cannot be written.
    """
    wish = wish_of(rank, energy, budget, include, exclude, save_modules, embed_lora, distribute_scale, sv_epsilon,
                   skip_undecomposable, dtype)
    place, say = place_for(out), warn or (lambda _: None)
    inputs, settings = _opened(finetuned, base), _settings(wish)
    if (there := done_already(place, VERB, settings, inputs, seed)) is not None:
        say(f"{place} holds this very adapter already; nothing was done")
        return there
    tuned, origin = inputs[0].checkpoint, inputs[1].checkpoint
    modules = modules_of(tuned, say)
    parts = _sorted_out(tuned, origin, modules, wish, say)
    folder = factors_folder(place)
    with dropped_if_refused(folder):
        found = find(folder, key_of(VERB, settings, inputs, seed), [_matrix(m, tuned, origin, seed) for m in parts.decomposed],
                     wish.choice, threads=threads, memory=memory, progress=progress)
        _check_something(found, parts, tuned, origin)
    if tied_embedding := [p for p in found if tuned.ties_embeddings and by_kind(parts, p) == "embedding"]:
        say(f"{tied_embedding[0]} is the output head as well: PEFT ties the two factors when it loads the adapter (and says "
            "that lm_head's are missing), but its merge_and_unload adds the change twice. `anabranch lora apply` adds it once")
    by_path = {m.path: m for m in parts.decomposed}
    stored = {path: wish.dtype or tuned.tensors[by_path[path].tensors["weight"]].dtype for path in found}
    errors = _errors(found, by_path, tuned, origin, wish, stored, threads, memory)
    report = _report(found, errors, stored, parts, tuned)
    _say_left_out(parts, say)
    made = [factor_tensors(one, _base_key(by_path[path]), stored[path], wish.distribute_scale,
                           by_path[path].kind == "embedding", _outer(by_path[path], tuned)) for path, one in found.items()]
    made += [copied(tuned, name, as_name=f"base_model.model.{m.path}.{leaf}") for m in parts.saved
             for leaf, name in m.tensors.items()]
    made += [copied(tuned, name, as_name=f"base_model.model.{path}.{'base_layer.' if path in found else ''}bias")
             for path, name in parts.biases]
    made += _tied_copies(parts, modules, tuned)
    config = _config(found, parts, modules, by_path, tuned, str(base))
    files = dict(carry_tokenizer(tuned.folder)) | adapter_files(config, report, str(base), VERB, [str(finetuned)])
    files.pop("generation_config.json", None)
    manifest = make_model(place, made, files, inputs, verb=VERB, settings=settings, seed=seed, report=report["all"],
                          stem=ADAPTER, threads=threads, memory=memory)
    drop(folder)
    return manifest


def forecast(finetuned: Path | str, base: Path | str, out: Path | str, *, rank: int | None = None, energy: float | None = None,
             budget: int | None = None, include: Sequence[str] = (), exclude: Sequence[str] = (),
             save_modules: Sequence[str] = (), embed_lora: bool = False, distribute_scale: bool = True, sv_epsilon: float = 0.0,
             skip_undecomposable: bool = False, dtype: str | None = None, seed: int = 0, threads: int | None = None,
             memory: str | int | None = None, warn: Callable[[str], None] | None = None) -> list[str]:
    """What `extract` would do, in lines; raises as it does, and writes nothing. Compares tensors that are saved whole, but
    not the matrices: those that did not change are counted as well."""
    wish = wish_of(rank, energy, budget, include, exclude, save_modules, embed_lora, distribute_scale, sv_epsilon,
                   skip_undecomposable, dtype)
    place, say = place_for(out), warn or (lambda _: None)
    inputs = _opened(finetuned, base)
    tuned, origin = inputs[0].checkpoint, inputs[1].checkpoint
    parts = _sorted_out(tuned, origin, modules_of(tuned, say), wish, say)
    _say_left_out(parts, say)
    matrices = [_matrix(m, tuned, origin, seed) for m in parts.decomposed]
    largest = max((m.need(wish.choice.rank) for m in matrices), default=0)
    there = done_already(place, VERB, _settings(wish), inputs, seed) is not None
    saved = [name for m in parts.saved for name in m.tensors.values()] + [name for _, name in parts.biases]
    most = sum(min(wish.choice.rank or min(m.shape), *m.shape) * sum(m.shape) for m in matrices)
    return [*(f"input: {one.label} ({len(one.checkpoint.tensors)} tensors, {one.checkpoint.size / 1e6:,.1f} MB, "
              f"{one.checkpoint.folder})" for one in inputs),
            f"decomposed: {len(matrices)} matrices, at most {min(most, wish.choice.budget or most):,} parameters",
            f"saved whole: {len(saved)} tensors, {sum(tuned.tensors[name].numel for name in saved):,} parameters",
            f"memory: the largest matrix needs {largest / 1e6:,.0f} MB beside the program",
            *([f"{place} holds this already"] if there else [])]


def wish_of(rank: int | None, energy: float | None, budget: int | None, include: Sequence[str], exclude: Sequence[str],
            save_modules: Sequence[str], embed_lora: bool, distribute_scale: bool, sv_epsilon: float,
            skip_undecomposable: bool, dtype: str | None) -> Wish:
    """Raises RecipeError for numbers that choose nothing."""
    choice = Choice(rank if rank is not None or energy is not None or budget is not None else 128, energy, budget, sv_epsilon)
    choice.check()
    return Wish(choice, tuple(include), tuple(exclude), tuple(save_modules), embed_lora, distribute_scale, skip_undecomposable,
                _dtype(dtype))


# --- what there is ---


def _dtype(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        raise RecipeError(f"dtype: `{name}` is none that an adapter is stored in.{closest(name, DTYPES)}")
    return None if name is None else DTYPES[name]


def _opened(finetuned: Path | str, base: Path | str) -> list[Read]:
    inputs = []
    for said in (finetuned, base):
        checkpoint = Checkpoint.open(resolve(said))
        if packed := quantisation(checkpoint):
            raise ModelError(f"{said}: its weights are quantised ({packed}), and a difference of packed numbers has no "
                             "meaning. Give the model as it was before it was quantised.")
        inputs.append(Read(str(said), checkpoint))
    return inputs


def _settings(wish: Wish) -> dict[str, Any]:
    c = wish.choice
    return {"rank": c.rank, "energy": c.energy, "budget": c.budget, "sv_epsilon": c.least, "include": list(wish.include),
            "exclude": list(wish.exclude), "save_modules": list(wish.save_modules), "embed_lora": wish.embed_lora,
            "distribute_scale": wish.distribute_scale, "skip_undecomposable": wish.skip_undecomposable, "dtype": wish.dtype}


def _sorted_out(tuned: Checkpoint, origin: Checkpoint, modules: Sequence[Module], wish: Wish,
                warn: Callable[[str], None]) -> _Parts:
    """Which module is decomposed, saved or left. Compares bytes; matrices that are compared later anyway are not read."""
    selected = _selection(wish, modules)
    resized = _check_tensors(tuned, origin, modules, warn)
    embed_lora = wish.embed_lora and not resized
    if wish.embed_lora and resized:
        warn("the two models have vocabularies of different size, so embeddings and output head are saved whole")
    if tuned.ties_embeddings != origin.ties_embeddings:
        raise ModelError(f"{tuned.folder} {'ties' if tuned.ties_embeddings else 'does not tie'} its output head to its input "
                         f"embedding, and {origin.folder} does the other. Save the base as the fine-tune is "
                         "(`tie_word_embeddings`) first; an adapter cannot change that.")
    parts = _Parts()
    containers = tuple(f"{m.path}." for m in modules if m.inner and wish.names(m))
    for module in modules:
        excluded = any(re.search(p, module.path) for p in wish.exclude)
        named = wish.names(module) or module.path.startswith(containers)
        if module.inner and not named:
            continue  # `_check_owned` sees to its tensors
        if named or (module.head and not (embed_lora and _can_be_tied(module, tuned, warn)) and not excluded):
            whole = module.inner or module.path.startswith(containers)  # PEFT asks for all that is inside
            if whole or any(_differs(tuned, origin, name) for name in module.tensors.values()):
                parts.saved.append(module)
        elif not selected(module.path):
            parts.left_out |= {n: "not selected" for n in module.tensors.values() if _differs(tuned, origin, n)}
        elif module.kind in DECOMPOSED and _has_factors(module, tuned):
            parts.decomposed.append(module)
            if "bias" in module.tensors and _differs(tuned, origin, module.tensors["bias"]):
                parts.biases.append((module.path, module.tensors["bias"]))
        elif changed := [n for n in module.tensors.values() if _differs(tuned, origin, n)]:
            if wish.skip_undecomposable:
                parts.left_out |= dict.fromkeys(changed, "has no low-rank form")
            else:
                parts.saved.append(module)
    _drop_tied_head(parts, modules, tuned)
    _check_owned(parts, tuned, origin, modules, wish, selected)
    return parts


def _selection(wish: Wish, modules: Sequence[Module]) -> Callable[[str], bool]:
    """Raises RecipeError for patterns that are none, and for names of no module."""
    problems = []
    for option, patterns in (("--include-regex", wish.include), ("--exclude-regex", wish.exclude)):
        for pattern in patterns:
            try:
                if not any(re.search(pattern, m.path) for m in modules):
                    problems.append(f"{option} {pattern!r}: fits no module. Their names look like {modules[-1].path}")
            except (re.error, RecursionError, OverflowError) as error:
                problems.append(f"{option} {pattern!r}: is no regular expression ({error})")
    names = {m.path for m in modules} | {m.leaf for m in modules}
    problems += [f"--save-module {name}: there is no such module.{closest(name, names)}"
                 for name in wish.save_modules if name not in names]
    if problems:
        raise RecipeError.of("what to extract:", problems)
    return lambda path: ((not wish.include or any(re.search(p, path) for p in wish.include))
                         and not any(re.search(p, path) for p in wish.exclude))


def _check_tensors(tuned: Checkpoint, origin: Checkpoint, modules: Sequence[Module], warn: Callable[[str], None]) -> bool:
    """Whether the vocabulary was resized. Raises ShapeMismatch for all else that does not line up."""
    ends = {name for m in modules if m.head for name in m.tensors.values()}
    alone = sorted(tuned.tensors.keys() ^ origin.tensors.keys())
    problems = [f"tensor '{name}': not in the {'base' if name in tuned.tensors else 'fine-tune'}" for name in alone
                if not _is_tied_copy(name, tuned, origin)]
    resized = []
    for name in sorted(tuned.tensors.keys() & origin.tensors.keys()):
        one, other = tuned.tensors[name], origin.tensors[name]
        if one.shape != other.shape and name in ends and one.shape[1:] == other.shape[1:]:
            resized.append(f"{other.shape[0]:,} to {one.shape[0]:,} rows of '{name}'")
        elif one.shape != other.shape:
            problems.append(f"tensor '{name}': {one.shape} in the fine-tune, {other.shape} in the base")
        elif (one.dtype in MERGED) != (other.dtype in MERGED):
            problems.append(f"tensor '{name}': {one.dtype} in the fine-tune, {other.dtype} in the base")
    if problems:
        more = [f".. and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ShapeMismatch.of(f"{tuned.folder} is no fine-tune of {origin.folder}:", problems[:SHOWN] + more)
    if resized:
        warn(f"the fine-tune changed the size of its vocabulary ({'; '.join(resized)}): before PEFT loads the adapter, the "
             "base needs `model.resize_token_embeddings(..)`")
    return bool(resized)


def _is_tied_copy(name: str, tuned: Checkpoint, origin: Checkpoint) -> bool:
    """An output head that one of the two stores though it is tied."""
    holder = tuned if name in tuned.tensors else origin
    return bool(holder.ties_embeddings and HEAD.search(name) and holder.tied_copy_of(name) is not None)


def _differs(tuned: Checkpoint, origin: Checkpoint, name: str) -> bool:
    if name not in origin.tensors:
        return False  # a stored copy of the tied embedding, which speaks for itself
    one, other = tuned.read(name), origin.read(name)
    if one.shape != other.shape:
        return True
    rows = max(1, CHUNK // max(1, one[:1].numel())) if one.ndim else 1
    if one.ndim == 0 or one.dtype != other.dtype:
        return not torch.equal(one.float(), other.float())
    return any(not torch.equal(one[i : i + rows], other[i : i + rows]) for i in range(0, one.shape[0], rows))


def _can_be_tied(module: Module, tuned: Checkpoint, warn: Callable[[str], None]) -> bool:
    """Whether PEFT gives the factors of an input embedding to the head that is tied to it: it goes by the name."""
    weight = module.tensors.get("weight", "")
    if not (tuned.ties_embeddings and module.kind == "embedding" and EMBEDDING.search(weight)) or module.leaf == "embed_tokens":
        return True
    warn(f"{module.path} is the output head as well, and PEFT would change the embedding alone: it is saved whole")
    return False


def _tied_heads(modules: Sequence[Module], tuned: Checkpoint) -> list[str]:
    """Paths of the output heads that are the input embedding: PEFT's `ensure_weight_tying` gives them the same change."""
    if not tuned.ties_embeddings:
        return []
    return [m.path for m in modules if m.head and m.kind == "linear"
            and ("weight" not in m.tensors or tuned.tied_copy_of(m.tensors["weight"]) is not None)]


def _has_factors(module: Module, tuned: Checkpoint) -> bool:
    """Whether its numbers are of a kind that a difference has; a tied head that is not stored is the embedding's."""
    weight = module.tensors.get("weight")
    return weight is None or tuned.tensors[weight].dtype in MERGED


def _drop_tied_head(parts: _Parts, modules: Sequence[Module], tuned: Checkpoint) -> None:
    tied = _tied_heads(modules, tuned)
    parts.saved[:] = [m for m in parts.saved if m.path not in tied]
    parts.decomposed[:] = [m for m in parts.decomposed if m.path not in tied]


def _check_owned(parts: _Parts, tuned: Checkpoint, origin: Checkpoint, modules: Sequence[Module], wish: Wish,
                 selected: Callable[[str], bool]) -> None:
    """Raises ModelError for changed tensors that PEFT has no name for: parameters that are no module's own."""
    saved = {m.path for m in parts.saved}
    owned = {name for m in modules if not m.inner or m.path in saved for name in m.tensors.values()}
    loose = [name for name, info in tuned.tensors.items() if name not in owned and info.dtype in MERGED
             and not _is_tied_copy(name, tuned, origin) and _differs(tuned, origin, name)]
    parts.left_out |= {name: "not selected" for name in loose if not selected(name.rpartition(".")[0])}
    loose = [name for name in loose if name not in parts.left_out]
    if loose and wish.skip_undecomposable:
        parts.left_out |= dict.fromkeys(loose, "has no low-rank form")
    elif loose:
        more = [f".. and {len(loose) - SHOWN} more"] if len(loose) > SHOWN else []
        raise ModelError.of(
            f"{tuned.folder}: these tensors changed, and are no module's weight or bias in the model as transformers builds it "
            "(it fuses them when it loads, or they are parameters of a module with others inside), so no low-rank adapter can "
            "hold their change. --skip-undecomposable leaves them out, --save-module saves the module around them whole:",
            [f"'{n}'" for n in loose[:SHOWN]] + more)


def _check_something(found: Mapping[str, Found], parts: _Parts, tuned: Checkpoint, origin: Checkpoint) -> None:
    if found:
        return
    if parts.saved or parts.biases:
        raise ModelError(f"no selected matrix of {tuned.folder} differs from {origin.folder}, only "
                         f"{', '.join([m.path for m in parts.saved] + [p for p, _ in parts.biases])[:200]}: PEFT loads no LoRA "
                         "without a matrix. Copy these tensors instead (`anabranch merge` with `passthrough`).")
    raise ModelError(f"nothing to extract: no selected matrix of {tuned.folder} differs from {origin.folder}."
                     + (f" {len(parts.left_out)} tensors that do were left out." if parts.left_out else ""))


# --- one matrix ---


def _matrix(module: Module, tuned: Checkpoint, origin: Checkpoint, seed: int) -> Matrix:
    name = module.tensors["weight"]
    shape = _shape(module, tuned)

    def compute(count: int | None, share: float | None) -> LowRank:
        return low_rank(_difference(module, tuned, origin), generator(seed, "lora extract", name), count=count, share=share)

    return Matrix(module.path, shape, compute, 4 * shape[0] * shape[1])


def _shape(module: Module, tuned: Checkpoint) -> tuple[int, int]:
    """Rows and columns of B A: [out, in]."""
    rows, *rest = tuned.tensors[module.tensors["weight"]].shape
    columns = int(torch.Size(rest).numel())
    return (columns, rows) if module.kind in ("conv1d", "embedding") else (rows, columns)


def _difference(module: Module, tuned: Checkpoint, origin: Checkpoint) -> Tensor:
    """W_finetuned - W_base in float32, as B A is: [out, in]. No copy beside it but of a few rows."""
    name = module.tensors["weight"]
    one, other = tuned.read(name).flatten(1), origin.read(name).flatten(1)
    d = torch.empty(one.shape, dtype=torch.float32)
    rows = max(1, CHUNK // max(1, one.shape[1]))
    for i in range(0, len(d), rows):
        torch.sub(one[i : i + rows].float(), other[i : i + rows].float(), out=d[i : i + rows])
    return d.T if module.kind in ("conv1d", "embedding") else d


def _errors(found: Mapping[str, Found], by_path: Mapping[str, Module], tuned: Checkpoint, origin: Checkpoint, wish: Wish,
            stored: Mapping[str, str], threads: int | None, memory: str | int | None) -> dict[str, tuple[float, float]]:
    """||D - B A||^2 / ||D||^2 of each matrix, of the factors as they are stored; and the share of their rounding alone."""
    def job(path: str, one: Found) -> Callable[[], tuple[str, tuple[float, float]]]:
        def measured() -> tuple[str, tuple[float, float]]:
            b, a = (t.to(MERGED[stored[path]]).float() for t in one.factors(wish.distribute_scale))
            d = _difference(by_path[path], tuned, origin)
            rows, missing = max(1, CHUNK // max(1, d.shape[1])), 0.0
            for i in range(0, d.shape[0], rows):
                missing += float((d[i : i + rows] - b[i : i + rows] @ a).double().square().sum())
            return path, (missing / one.energy, one.rounding(stored[path], wish.distribute_scale) / one.energy)

        return measured

    jobs = [(4 * one.shape[0] * one.shape[1] + 44 * one.rank * sum(one.shape) + 16 * CHUNK, job(path, one))
            for path, one in found.items()]
    return dict(side_by_side(jobs, threads, memory))


# --- what is told, and written ---


def _tied_copies(parts: _Parts, modules: Sequence[Module], tuned: Checkpoint) -> list[Made]:
    """The embedding once more as the output head, where both are one and it is saved whole: PEFT asks for it."""
    if not tuned.ties_embeddings:
        return []
    saved = next((m for m in parts.saved if m.kind == "embedding"), None)
    return [copied(tuned, saved.tensors["weight"], as_name=f"base_model.model.{path}.weight")
            for path in _tied_heads(modules, tuned)] if saved is not None else []


def _report(found: Mapping[str, Found], errors: Mapping[str, tuple[float, float]], stored: Mapping[str, str], parts: _Parts,
            tuned: Checkpoint) -> dict[str, Any]:
    """'matrices': per matrix; 'all': over all of them, with what is saved whole and what is left out."""
    energy = sum(one.energy for one in found.values())
    lost, rounding = (sum(one.energy * errors[path][i] for path, one in found.items()) for i in (0, 1))
    saved = [name for m in parts.saved for name in m.tensors.values()] + [name for _, name in parts.biases]
    return {
        "matrices": {path: {"shape": list(one.shape), "rank": one.rank, "kept_energy": round(one.kept, 6),
                            "relative_error": rounded(errors[path][0] ** 0.5), "change": float(f"{one.energy ** 0.5:.6g}")}
                     for path, one in found.items()},
        "all": {"matrices": len(found), "parameters": sum(one.rank * sum(one.shape) for one in found.values()),
                "ranks": [min(one.rank for one in found.values()), max(one.rank for one in found.values())],
                "kept_energy": round(sum(one.energy * one.kept for one in found.values()) / energy, 6),
                "relative_error": rounded((lost / energy) ** 0.5), "factors": spelled(stored[p] for p in found),
                "rounding": rounded((rounding / energy) ** 0.5),
                "saved_whole": sorted(saved), "saved_parameters": sum(tuned.tensors[n].numel for n in saved),
                "left_out": dict(sorted(parts.left_out.items()))}}


def _say_left_out(parts: _Parts, warn: Callable[[str], None]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in parts.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        warn(f"{len(names)} tensors changed and are not in the adapter ({reason}): {', '.join(names[:3])}"
             + (", .." if len(names) > 3 else ""))


def by_kind(parts: _Parts, path: str) -> str:
    return next(m.kind for m in parts.decomposed if m.path == path)


def _base_key(module: Module) -> str:
    return f"base_model.model.{module.path}"


def _outer(module: Module, tuned: Checkpoint) -> tuple[int, ...]:
    """Dimensions of A after its first: those of the weight."""
    return tuple(tuned.tensors[module.tensors["weight"]].shape[1:]) if module.kind == "conv" else ()


def _config(found: Mapping[str, Found], parts: _Parts, modules: Sequence[Module], by_path: Mapping[str, Module],
            tuned: Checkpoint, base: str) -> dict[str, Any]:
    targets = short_names(list(found), [m.path for m in modules])
    embeddings = [m for m in modules if m.kind == "embedding"]
    containers = tuple(f"{m.path}." for m in parts.saved if m.inner)
    tied = tuned.ties_embeddings and any(m in parts.saved or m.path in found for m in embeddings)
    return config_of({path: one.rank for path, one in found.items()}, targets, base=base,
                     task="CAUSAL_LM" if "CausalLM" in str(tuned.config.get("architectures")) else None,
                     saved=[m.path for m in parts.saved if not m.path.startswith(containers)], bias=bool(parts.biases),
                     tied=tied,
                     transposed=any(by_path[path].kind == "conv1d" for path in found))
