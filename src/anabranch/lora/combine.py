"""Adapters in, one adapter out: `anabranch lora merge`.

Each module's changes are merged in the space that the method asks for (`spaces`), and the result is cut to the rank that is
wanted, with the energy that is lost told for each. What the adapters save whole is merged as any tensor is.

`peft_linear` is what PEFT's `add_weighted_adapter(.., combination_type="linear")` does: B and A averaged by themselves, so
that B A has every B_i A_j. It is measured against the exact sum, and the difference is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.artifacts import MergeManifest
from anabranch.engine.adapter import CONFIG, EMBEDDING, HEAD
from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.making import ADAPTER, Made, Read, make_model
from anabranch.engine.merging import place_for
from anabranch.engine.plan import DTYPES
from anabranch.engine.stream import Progress
from anabranch.errors import ModelError, RecipeError
from anabranch.lora import spaces
from anabranch.lora.config import CAT, PEFT_LINEAR, read_adapter_merge
from anabranch.lora.cuts import find_cuts
from anabranch.lora.factors import Choice, Found, Matrix, factors_folder, find, rounded, spelled
from anabranch.lora.joining import Job, Place, Plan, call_of, dense_changes, factors_of, in_base_as, opened, plan_of, plan_whole
from anabranch.lora.output import adapter_files, config_of, done_already, drop, dropped_if_refused, factor_tensors, key_of
from anabranch.lora.sources import FOLD, Source
from anabranch.merge.consensus import divisor_of
from anabranch.merge.low_rank import (
    ROUNDING,
    LowRank,
    first,
    joint_bases,
    low_rank,
    product_difference,
    product_length,
    rank_for,
)
from anabranch.rows import generator

VERB = "lora merge"
NOTHING = "the merged adapter changes nothing: every matrix comes to zero. Are the weights right?"


def merge_adapters(
    config: Path | str | Mapping[str, Any],
    out: Path | str,
    *,
    seed: int = 0,
    threads: int | None = None,
    memory: str | int | None = None,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> MergeManifest:
    """Write the adapter folder `out`, which PEFT loads and `anabranch lora apply` folds.

    Args:
        config: a YAML file, or a mapping of what would stand in one; see `anabranch.lora.config`.
        seed: of methods that draw, and of random subspaces.
        threads, memory: workers, and bytes for the process; neither changes a byte of the result.
        warn: told what the user should know.
    Returns:
        The manifest; its `report` has rank and lost energy over all matrices, lora_report.json in the folder of each.
    Raises:
        RecipeError: a config that asks for what cannot be. ModelError: adapters that cannot be merged, by name.
        ShapeMismatch: adapters of different models. OutputError: `out` holds something else, or cannot be written.
    """
    say, place = warn or (lambda _: None), place_for(out)
    asked = read_adapter_merge(config)
    for text in asked.merge.warnings:
        if "base_model" not in text:
            say(text)
    job = opened(asked, seed, say)
    dtype = _dtype(job)
    settings = _settings(job, dtype)
    inputs = _inputs(job)
    if (there := done_already(place, VERB, settings, inputs, seed)) is not None:
        say(f"{place} holds this very adapter already; nothing was done")
        return there
    plans = {path: plan_of(job, one) for path, one in job.places.items()}
    saved = _whole(job, dtype)
    job.findings.stop()
    for text in job.findings.remarks():
        say(text)
    if (cuts := find_cuts(job, [(one, plans[path]) for path, one in job.places.items()])) is not None:
        if saved:
            raise RecipeError(f"{asked.method} ranks all tensors together, and these adapters save some whole. Merge the "
                              "models.")
        plans = {path: replace(plan, cuts=tuple(cuts)) for path, plan in plans.items()}
    folder = factors_folder(place)
    if asked.method in (CAT, PEFT_LINEAR):
        made, ranks, report = _by_factors(job, plans, dtype, say)
    else:
        matrices = [_matrix(job, place_, plans[path]) for path, place_ in job.places.items()]
        with dropped_if_refused(folder):
            found = find(folder, key_of(VERB, settings, inputs, seed), matrices, asked.choice, threads=threads, memory=memory,
                         progress=progress)
            if not found:
                raise ModelError(NOTHING)
        made = [factor_tensors(one, _key(path), dtype, True, job.places[path].pair.embedding, job.places[path].pair.outer)
                for path, one in found.items()]
        ranks = {path: one.rank for path, one in found.items()}
        report = _report(found, {path: plan.space for path, plan in plans.items()}, dtype)
        _say_lost(report, job, say)
    whole = _as_peft_names(saved, ranks)
    files = adapter_files(_config(job, ranks, bool(whole)), report, _base_name(job), VERB, [s.label for s in job.sources])
    manifest = make_model(place, [*made, *whole], files, inputs, verb=VERB, settings=settings, seed=seed, report=report["all"],
                          stem=ADAPTER, threads=threads, memory=memory)
    drop(folder)
    return manifest


def forecast(config: Path | str | Mapping[str, Any], out: Path | str, *, seed: int = 0, threads: int | None = None,
             memory: str | int | None = None, warn: Callable[[str], None] | None = None) -> list[str]:
    """What `merge_adapters` would do, in lines; raises as it does, and writes nothing."""
    place = place_for(out)
    asked = read_adapter_merge(config)
    job = opened(asked, seed, warn or (lambda _: None))
    plans = {path: plan_of(job, one) for path, one in job.places.items()}
    dtype = _dtype(job)
    whole = _whole(job, dtype)
    job.findings.stop()
    inputs = _inputs(job)
    there = done_already(place, VERB, _settings(job, dtype), inputs, seed) is not None
    by_space: dict[str, int] = {}
    for plan in plans.values():
        by_space[plan.space] = by_space.get(plan.space, 0) + 1
    largest = max((_matrix(job, p, plans[path]).need(asked.choice.rank) for path, p in job.places.items()), default=0)
    return [*(f"input: {one.label} ({len(one.checkpoint.tensors)} tensors, {one.checkpoint.size / 1e6:,.1f} MB, "
              f"{one.checkpoint.folder})" for one in inputs),
            f"modules: {len(plans)}, by {asked.method}: " + ", ".join(f"{count} {space}" for space, count in by_space.items()),
            f"saved whole: {len(whole)} tensors",
            f"memory: the largest module needs {largest / 1e6:,.0f} MB beside the program",
            *([f"{place} holds this already"] if there else [])]


def _dtype(job: Job) -> str:
    """Of the result's factors: what the config says, else the adapters' own where they agree, else float32."""
    said = job.config.merge.dtype
    if said is not None:
        return DTYPES[said]
    kinds = {s.file.tensors[pair.a].dtype for s in job.sources for pair in s.pairs.values()}
    kind = next(iter(kinds))
    return kind if len(kinds) == 1 and kind in MERGED else "F32"


def _settings(job: Job, dtype: str) -> dict[str, Any]:
    choice = job.config.choice
    return {"method": job.config.method, "config": job.config.text, "rank": choice.rank, "energy": choice.energy,
            "budget": choice.budget, "space": job.config.space, "dtype": dtype}


def _inputs(job: Job) -> list[Read]:
    inputs = [Read(s.label, s.file, companions=(s.folder / CONFIG,)) for s in job.sources]
    if job.base is not None and job.config.base is not None:
        names = [p.weight for p in job.places.values() if p.weight in job.base.tensors]
        names += [n for s in job.sources for n in s.whole if n in job.base.tensors]
        inputs.append(Read(str(job.config.base), job.base, sorted(set(names))))
    return inputs


# --- one module ---


def _matrix(job: Job, place: Place, plan: Plan) -> Matrix:
    rows, columns = place.pair.shape
    together = sum(s.pairs[place.path].rank for s in job.sources if place.path in s.pairs)
    k = len(job.sources)

    def compute(count: int | None, share: float | None) -> LowRank:
        try:
            if plan.space == "dense":
                # Without a rank: as many directions as any linear merge has.
                most = count if count is not None or share is not None else min(rows, columns, together)
                noise = generator(job.seed, VERB, place.weight)
                return low_rank(_dense(job, place, plan), noise, count=most, share=share)
            return _from_core(job, place, plan, count, share)
        except ValueError as error:
            raise RecipeError(f"'{place.path}': {plan.method.name}: {error}") from error

    if plan.space == "dense":
        return Matrix(place.path, (rows, columns), compute, 4 * rows * columns * (3 * k + 8))
    return Matrix(place.path, (rows, columns), compute, 24 * together * (rows + columns) + 64 * (k + 2) * together**2)


def _dense(job: Job, place: Place, plan: Plan) -> Tensor:
    """The merged change [out, in], float32, formed as the model stores it. The base is zero where the method lets it be."""
    base = torch.zeros(place.stored)
    if plan.kind == "weights":
        assert job.base is not None
        base = job.base.read(place.weight).float().reshape(place.stored)
    branches = dense_changes(job, place).add_(base)
    merged = call_of(job, plan, place, core=False)(branches, base)
    del branches
    change = (merged - base if plan.kind == "weights" else merged).flatten(1)
    return change.T.contiguous() if place.turned else change


def _from_core(job: Job, place: Place, plan: Plan, count: int | None, share: float | None) -> LowRank:
    """The merged change by its strongest directions, exactly, without forming it."""
    factors = factors_of(job, place)
    live = [i for i, w in enumerate(plan.weights) if w != 0]
    if plan.method.name in spaces.SHARING:
        # Directions that only adapters of weight 0 have would count as some of the matrix, which the method shares out.
        factors = [f if i in live else (f[0][:, :0], f[1][:0], f[2]) for i, f in enumerate(factors)]
    u, vt, cores = joint_bases([b for b, _, _ in factors], [a for _, a, _ in factors])
    cores = cores * torch.tensor([scale for _, _, scale in factors], dtype=torch.float64)[:, None, None]
    ranks = [factors[i][0].shape[1] for i in live] or [0]
    size, arguments = spaces.padded(plan.method, plan.arguments, place.pair.shape, ranks, len(live)) if any(ranks) else (0, {})
    inner = Plan(plan.method, arguments or plan.arguments, plan.weights, plan.space, plan.kind)
    call = call_of(job, inner, place, core=True)
    if plan.space == "compressed":
        assert job.config.choice.rank is not None
        merged = spaces.compressed(call, cores, job.config.choice.rank)
    else:
        merged = spaces.without_zeros(spaces.in_core(call, spaces.with_zeros(cores, size)), cores.shape[1:])
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    # What is left of changes that cancel each other is rounding, and no direction.
    scale = min(1.0, abs(float(str(plan.arguments.get("scale", 1.0)))))
    lengths = [scale * min(1.0, abs(plan.weights[i])) * float(cores[i].norm()) for i in live]
    rounding = ROUNDING * max([*lengths, *values[:1].tolist()], default=0.0)
    values = values[values > rounding]
    has, energy = len(values), float(values.square().sum())
    most = has if count is None else min(has, count)
    found = LowRank((u @ left[:, :most]).float(), values[:most].float(), (right[:most] @ vt).float(), energy, most == has)
    if share is None:
        return found
    return first(found, rank_for(found.values, energy, share))


# --- by factors: cat, and PEFT's way ---


def _by_factors(job: Job, plans: Mapping[str, Plan], dtype: str, warn: Callable[[str], None],
                ) -> tuple[list[Made], dict[str, int], dict[str, Any]]:
    """cat: B = [B_1 .. B_k], A = [w_1 s_1 A_1; ..]: the exact weighted sum. peft_linear: averages of B and of A."""
    made, ranks, matrices = [], {}, {}
    wrong = total = 0.0
    linear = job.config.method == PEFT_LINEAR
    told = "wrong" if linear else "relative_error"
    uneven = []
    for path, place in job.places.items():
        factors = _weighted(job, place, plans[path])
        if not factors:
            continue
        if linear and len({b.shape[1] for b, _, _ in factors}) > 1:
            uneven.append(path)
            continue
        b, a = (part.to(MERGED[dtype]).float() for part in (_averaged if linear else _side_by_side)(factors))
        exact = _side_by_side(factors)
        missing, size = _apart((b, a), exact) if linear else (product_difference(*exact, b, a), product_length(*exact))
        wrong, total, ranks[path] = wrong + missing, total + size, b.shape[1]
        matrices[path] = {"shape": list(place.pair.shape), "rank": ranks[path], "space": job.config.method,
                          told: rounded(math.sqrt(missing / size) if size else 0.0)}
        made.append(_given(job, place, dtype, ranks[path]))
    if uneven:
        raise RecipeError(f"peft_linear: adds factors of one rank, and {len(uneven)} modules have several "
                          f"({', '.join(uneven[:3])}). Use task_arithmetic, which merges any ranks exactly.")
    if not ranks:
        raise ModelError(NOTHING)
    parameters = sum(rank * sum(job.places[path].pair.shape) for path, rank in ranks.items())
    report: dict[str, Any] = {
        "matrices": matrices, "all": {"matrices": len(ranks), "parameters": parameters,
                                      "ranks": [min(ranks.values()), max(ranks.values())], "factors": spelled([dtype])}}
    share = math.sqrt(wrong / total) if total else 0.0
    report["all"] |= {told: rounded(share)} | ({} if linear else {"kept_energy": 1.0})
    if linear:
        warn(f"peft_linear averages A and B by themselves, so its product has B_i A_j of every two adapters: it is {share:.0%} "
             "of the weighted sum's length away from it. task_arithmetic merges the same adapters exactly")
    return made, ranks, report


def _given(job: Job, place: Place, dtype: str, rank: int) -> Made:
    """The factors of one module, formed when they are written."""
    ends = ("lora_embedding_A", "lora_embedding_B") if place.pair.embedding else ("lora_A.weight", "lora_B.weight")
    names = [f"{_key(place.path)}.{end}" for end in ends]
    rows, columns = place.pair.shape
    shapes = [(rank, *(place.pair.outer or (columns,))), (rows, rank, *([1] * (len(place.pair.outer) - 1)))]
    plan = plan_of(job, place)

    def make() -> dict[str, Tensor]:
        factors = _weighted(job, place, plan)
        b, a = _side_by_side(factors) if job.config.method == CAT else _averaged(factors)
        return {names[0]: a.reshape(shapes[0]), names[1]: b.reshape(shapes[1])}

    return Made({name: (shape, dtype) for name, shape in zip(names, shapes, strict=True)}, make, 16 * rank * (rows + columns))


def _weighted(job: Job, place: Place, plan: Plan) -> list[tuple[Tensor, Tensor, float]]:
    """(B, A, scale times weight) of the adapters that change the module; `normalize` and `scale` as task_arithmetic's."""
    factor = float(str(plan.arguments["scale"])) / (divisor_of(plan.weights) if plan.arguments["normalize"] else 1.0)
    return [(b, a, scale * w * factor) for (b, a, scale), w in zip(factors_of(job, place), plan.weights, strict=True)
            if b.shape[1] and w * factor != 0]


def _side_by_side(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    return torch.cat([b for b, _, _ in factors], 1), torch.cat([a * w for _, a, w in factors], 0)


def _averaged(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """PEFT's: B = sum sqrt|w_i| B_i, A = sum sign(w_i) sqrt|w_i| A_i."""
    b = torch.stack([b * math.sqrt(abs(w)) for b, _, w in factors]).sum(0)
    a = torch.stack([a * math.copysign(math.sqrt(abs(w)), w) for _, a, w in factors]).sum(0)
    return b, a


def _apart(given: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """||given - exact||^2 and ||exact||^2 of products of factors, in the joint core space."""
    _, _, (one, other) = joint_bases([given[0], exact[0]], [given[1], exact[1]])
    return float((one - other).square().sum()), float(other.square().sum())


# --- what the adapters save whole ---


def _whole(job: Job, dtype: str) -> dict[str, Made]:
    names = sorted({name for s in job.sources for name in s.whole})
    made = {}
    for name in names:
        if name.removesuffix(".weight") in job.places:
            job.findings.problem("one adapter saves it whole, and another has factors of it: PEFT takes one or the other. "
                                 f"{FOLD}", name)
            continue
        having = [s for s in job.sources if name in s.whole]
        in_base = _named_in_base(name, job.base)
        shapes = {s.file.tensors[s.whole[name]].shape for s in having}
        if in_base is not None and job.base is not None:
            shapes.add(job.base.tensors[in_base].shape)
        if len(shapes) > 1:
            job.findings.problem(f"saved whole in several shapes: {', '.join(map(str, sorted(shapes)))}", name, kind="shape")
            continue
        stored = having[0].file.tensors[having[0].whole[name]].dtype
        shape = next(iter(shapes))
        if in_base is None and not (len(having) == len(job.sources) and _equal(having, name)):
            job.findings.problem("adapters save it whole, each its own: give `base_model:`, from which their changes are "
                                 "merged",
                                 name)
            continue
        own = stored in MERGED and job.config.merge.dtype is None
        made[name] = _whole_made(job, name, in_base, shape, stored if own else dtype)
    return made


def _as_peft_names(saved: Mapping[str, Made], ranks: Mapping[str, int]) -> list[Made]:
    """The same by PEFT's names, which depend on the result: a bias of a module that has factors is its `base_layer`'s."""
    def named(name: str, one: Made) -> Made:
        path, _, leaf = name.rpartition(".")
        key = f"{_key(path)}.base_layer.{leaf}" if path in ranks else _key(name)
        return Made({key: one.tensors[name]}, lambda: {key: one.make()[name]}, one.need)

    return [named(name, one) for name, one in saved.items()]


def _equal(sources: Sequence[Source], name: str) -> bool:
    first, *others = [s.file.read(s.whole[name]) for s in sources]
    return all(torch.equal(first, other) for other in others)


def _named_in_base(name: str, base: Checkpoint | None) -> str | None:
    if base is None:
        return None
    path, _, leaf = name.rpartition(".")
    if name in base.tensors:
        return name
    if HEAD.search(name) and base.ties_embeddings:  # the head that an adapter saves beside the embedding it is tied to
        return next((n for n in base.tensors if EMBEDDING.search(n)), None)
    return in_base_as(path, base) if leaf == "weight" else None


def _whole_made(job: Job, name: str, in_base: str | None, shape: tuple[int, ...], dtype: str) -> Made:
    embedding = bool(EMBEDDING.search(name) or HEAD.search(name))
    place = Place(name, in_base or name, next(iter(job.places.values())).pair, False, shape, embedding, 0.0, 0.0, False)
    plan = plan_whole(job, place)

    def make() -> dict[str, Tensor]:
        if in_base is None or job.base is None:
            return {name: job.sources[0].file.read(job.sources[0].whole[name])}
        base = job.base.read(in_base).float()
        branches = torch.stack([s.file.read(s.whole[name]).float() if name in s.whole else base for s in job.sources])
        return {name: call_of(job, plan, place, core=False)(branches, base)}

    return Made({name: (shape, dtype)}, make, 4 * math.prod(shape) * (3 * len(job.sources) + 8))


# --- what is told, and written ---


def _key(path: str) -> str:
    return f"base_model.model.{path}"


def _base_name(job: Job) -> str | None:
    if job.config.base is not None:
        return job.config.base.path
    named = [s.config.get("base_model_name_or_path") for s in job.sources]
    return next((str(name) for name in named if name), None)


def _report(found: Mapping[str, Found], where: Mapping[str, str], dtype: str) -> dict[str, Any]:
    """Per matrix and over all. The relative error is that of the factors as they are stored, against the whole merge."""
    energy = sum(one.energy for one in found.values())
    rounding = {path: one.rounding(dtype) for path, one in found.items()}
    lost = {path: one.lost + rounding[path] for path, one in found.items()}
    return {
        "matrices": {path: {"shape": list(one.shape), "space": where[path], "rank": one.rank,
                            "kept_energy": round(one.kept, 6), "relative_error": rounded((lost[path] / one.energy) ** 0.5),
                            "change": float(f"{one.energy ** 0.5:.6g}")}
                     for path, one in found.items()},
        "all": {"matrices": len(found), "parameters": sum(one.rank * sum(one.shape) for one in found.values()),
                "ranks": [min(one.rank for one in found.values()), max(one.rank for one in found.values())],
                "spaces": sorted({where[path] for path in found}),
                "kept_energy": round(sum(one.energy * one.kept for one in found.values()) / energy, 6),
                "relative_error": rounded((sum(lost.values()) / energy) ** 0.5), "factors": spelled([dtype]),
                "rounding": rounded((sum(rounding.values()) / energy) ** 0.5)}}


def _say_lost(report: Mapping[str, Any], job: Job, warn: Callable[[str], None]) -> None:
    lost = 1 - report["all"]["kept_energy"]
    if lost > 1e-4:
        worst = min(report["matrices"], key=lambda path: report["matrices"][path]["kept_energy"])
        why = ("" if job.config.choice != Choice() else ". The merge has full rank and is cut to the sum of the adapters' "
                                                        "ranks; `rank:` or `energy:` says otherwise")
        warn(f"cut to its rank the merge loses {lost:.2%} of its energy, most in {worst} "
             f"({1 - report['matrices'][worst]['kept_energy']:.2%}){why}")


def _config(job: Job, ranks: Mapping[str, int], saves: bool) -> dict[str, Any]:
    configs = [s.config for s in job.sources]
    given = [c.get("target_modules") for c in configs]
    same = all(g == given[0] for g in given) and len({frozenset(s.pairs) for s in job.sources}) == 1
    targets = given[0] if same and given[0] and len(ranks) == len(job.places) else sorted(ranks)
    saved = sorted({m for c in configs for m in c.get("modules_to_save") or ()})
    config = config_of(ranks, targets if isinstance(targets, list) else [], base=_base_name(job),
                       task=next((c["task_type"] for c in configs if c.get("task_type")), None), saved=saved if saves else (),
                       bias=any((c.get("bias") or "none") != "none" for c in configs),
                       tied=any(bool(c.get("ensure_weight_tying")) for c in configs),
                       transposed=any(bool(c.get("fan_in_fan_out")) for c in configs))
    return config | ({"target_modules": targets} if isinstance(targets, str) else {})
