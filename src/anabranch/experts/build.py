"""From a config to a mixture of experts in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anabranch.artifacts import MergeManifest
from anabranch.engine.checkpoint import ITEM_SIZES
from anabranch.engine.making import TORCH, Read, forecast_made, make_model
from anabranch.engine.memory import occupied
from anabranch.engine.merging import place_for
from anabranch.engine.output import MANIFEST
from anabranch.engine.plan import DTYPES, parse_size
from anabranch.engine.stream import Progress
from anabranch.errors import CorruptedError, ModelError, OutputError, RecipeError
from anabranch.experts import balance, layouts, routers, tensors
from anabranch.experts.calibrate import BALANCE, LEARNING_RATE, calibrate
from anabranch.experts.settings import Config, read_config
from anabranch.experts.sources import MATRICES, MLP, Source, matrix, open_sources
from anabranch.experts.streamed import Tokens, run_layers
from anabranch.experts.texts import read_texts, token_ids
from anabranch.model import load_tokenizer
from anabranch.surgery.side_files import GENERATION, carry_tokenizer

VERB = "experts"
COPY = "mergekit_moe_config.yml"
STATES = 1 << 30
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line adds to a config.

    prompts      texts on which routers are measured, in place of the config's prompts
    calibration  texts on which they are trained; `steps` of 8 texts
    """

    seed: int = 0
    prompts: Path | None = None
    calibration: Path | None = None
    steps: int = 30
    learning_rate: float = LEARNING_RATE
    balance: float = BALANCE
    untrained: bool = False
    allow_pickle: bool = False


@dataclass
class _Plan:
    config: Config
    mixture: tensors.Mixture
    options: Options
    warnings: list[str]

    @property
    def gated(self) -> list[tensors.Member]:
        """Whoever has a router row."""
        shared = self.mixture.shared if self.mixture.layout.shared_gate else ()
        return [*self.mixture.experts, *shared]


def build_experts(config: Path | str | Mapping[str, Any], out: Path | str, options: Options | None = None, *,
                  max_shard_size: str | int = "5GB", threads: int | None = None, memory: str | int | None = None,
                  allow_nonfinite: bool = False, warn: Warn = lambda _: None,
                  progress: Callable[[Progress], None] | None = None) -> MergeManifest:
    """Put the experts of a config side by side in `out`; measure the router, and calibrate it where that is asked for.

    The manifest's `report` has `layout`, `router` (before, and after a calibration; see `balance`) and `parameters`: all of
    them, and those that one token passes.

    Raises:
        RecipeError, ModelError, ShapeMismatch, CorruptedError: config, models and texts, or routers that need more memory
            than there is; before anything is written.
        OutputError: see `making.make_model`.
    """
    options = options or Options()
    plan = _plan(config, options)
    finished = _report_there(out)
    for text in plan.warnings:
        warn(text)
    if finished is None:
        _check_memory(plan, memory)
    report, more = _routed(plan, threads or _cores()) if finished is None else (finished, [])
    for text in more:
        warn(text)
    return make_model(out, list(plan.mixture.made()), _files(plan), _inputs(plan), verb=VERB, settings=_settings(plan),
                      seed=options.seed, report=report, max_shard_size=max_shard_size, threads=threads, memory=memory,
                      allow_nonfinite=allow_nonfinite, progress=progress, warn=warn)


def forecast_experts(config: Path | str | Mapping[str, Any], out: Path | str, options: Options | None = None, *,
                     max_shard_size: str | int = "5GB", threads: int | None = None, memory: str | int | None = None,
                     warn: Warn = lambda _: None) -> list[str]:
    """The lines of a dry run. Raises as `build_experts`, but for what only the weights themselves would tell."""
    plan = _plan(config, options or Options())
    for text in plan.warnings:
        warn(text)
    total, active = _parameters(plan)
    mixture = plan.mixture
    return [f"layout: {mixture.layout.title} ({mixture.layout.architecture}), {len(mixture.experts)} experts, "
            f"{plan.config.per_token} per token" + (f", {len(mixture.shared)} shared" if mixture.shared else ""),
            f"router: {plan.config.gate_mode}"
            + (f", then {plan.options.steps} steps of calibration" if plan.options.calibration else ""),
            f"parameters: {total:,}; a token passes {active:,}",
            *([f"memory for routers: {need / 1e6:,.0f} MB of weights in float32, and the texts' hidden states, before anything "
               "is written"] if (need := _router_bytes(plan)) else []),
            *forecast_made(out, list(mixture.made()), _files(plan), _inputs(plan), max_shard_size=max_shard_size,
                           threads=threads, memory=memory)]


# --- planning ---


def _plan(config: Path | str | Mapping[str, Any], options: Options) -> _Plan:
    read = read_config(config, untrained=options.untrained)
    for path, option in ((options.prompts, "--prompts"), (options.calibration, "--calibrate")):
        if path is not None:
            read_texts(path, option)
    sources, warnings = open_sources(read.models, allow_pickle=options.allow_pickle)
    base = sources[read.base]
    members = [tensors.Member(e, sources[e.model], f"expert {i}") for i, e in enumerate(read.experts)]
    shared = [tensors.Member(e, sources[e.model], f"shared {i}") for i, e in enumerate(read.shared)]
    layout, chosen = layouts.choose(read, base, [m.source for m in (*members, *shared)])
    tensors.check_shapes(base, [*members, *shared])
    dtype = read.dtype or _dtype(base)
    widths = (members[0].source.shape(matrix(0, "gate"))[0], shared[0].source.shape(matrix(0, "gate"))[0] if shared else 0)
    written, said = layouts.target_config(layout, read, base, widths, dtype)
    mixture = tensors.Mixture(layout, base, members, shared, written, DTYPES[dtype], options.seed, {})
    tensors.check_fits(mixture)
    idle = tensors.idle_adapters([*members, *shared])
    return _Plan(read, mixture, options, [*read.warnings, *warnings, *chosen, *said, *idle])


def _dtype(base: Source) -> str:
    """The base's, as its config says; where it says none, as its weights are."""
    config = base.checkpoint.config
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    names = {spelling: name for name, spelling in DTYPES.items()}
    found = said if said in DTYPES else names.get(base.checkpoint.tensors[matrix(0, "gate")].dtype)
    if found is None:
        raise ModelError(f"base_model ({base.label}): is neither float32, bfloat16 nor float16. Say `dtype` in the config.")
    return found


def _cores() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _report_there(out: Path | str) -> dict[str, Any] | None:
    """The report of what `out` holds; None where it is free. Whatever is there, `make_model` writes nothing more to it: it
    says that all is done, or what is other. So no router is made first."""
    place = place_for(out)
    if not place.is_dir() or not any(place.iterdir()):
        return None
    if not (place / MANIFEST).is_file():
        raise OutputError(f"{place} is there already, and holds something else than a result of this command. Choose another "
                          "output folder, or remove it.")
    try:
        return MergeManifest.load(place / MANIFEST).report
    except CorruptedError:  # `make_model` says so
        return {}


def _router_bytes(plan: _Plan) -> int:
    """Bytes of weights in memory while routers are made, measured and trained; 0 where none are read for it.

    A layer at a time, in float32, and what of it is stacked, as it will be written; for a calibration all of the mixture.
    """
    mixture, options = plan.mixture, plan.options
    written = {name: torch.Size(shape).numel() for made in mixture.made() for name, (shape, _) in made.tensors.items()}
    layer = sum(size for name, size in written.items() if name.startswith("model.layers.0."))
    experts = len(mixture.experts) * mixture.width * mixture.base.shape(matrix(0, "down"))[0]
    if options.calibration is not None:
        return 4 * sum(written.values()) + 2 * ITEM_SIZES[mixture.dtype] * experts
    if options.prompts is not None or any(m.expert.positive for m in mixture.experts):
        return 4 * layer + 2 * ITEM_SIZES[mixture.dtype] * experts
    return 0


def _check_memory(plan: _Plan, memory: str | int | None) -> None:
    """Raises RecipeError where routers need more than `memory`, or, where that is not given, than the machine has."""
    need, taken = _router_bytes(plan), occupied()
    most = (parse_size(memory, "--memory") if memory is not None
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if need and taken + need > most:
        what = ("the calibration holds the whole mixture in float32" if plan.options.calibration is not None
                else "measuring the router holds a layer of the mixture in float32")
        raise RecipeError(f"{what}: {need / 1e6:,.0f} MB beside the {taken / 1e6:,.0f} MB of the program, and "
                          + (f"--memory is {memory}" if memory is not None else f"the machine has {most / 1e6:,.0f} MB")
                          + ". Give more memory" + (", or leave out --calibrate." if plan.options.calibration is not None
                                                    else ", or set `gate_mode: random` and give no prompts."))


def _files(plan: _Plan) -> dict[str, bytes | Path]:
    """The base's tokenizer as it is, padding side and all; the peer leaves its own settings in it."""
    files = carry_tokenizer(plan.mixture.base.checkpoint.folder)
    files["config.json"] = (json.dumps(plan.mixture.config, indent=2, ensure_ascii=False) + "\n").encode()
    files[COPY] = plan.config.text.encode()
    return files


def _inputs(plan: _Plan) -> list[Read]:
    mixture, seen = plan.mixture, set()
    options, base = plan.options, plan.mixture.base
    whole = (plan.config.prompted or options.calibration is not None or options.prompts is not None
             or any(member.expert.positive for member in mixture.experts))
    tokenizer = [path for name, path in carry_tokenizer(base.checkpoint.folder).items()
                 if whole and isinstance(path, Path) and name != GENERATION]
    names = None if whole else [name for name in base.checkpoint.tensors if MLP not in name]
    found = [Read(f"base_model: {base.label}", base.checkpoint, names, (*base.companions, *tokenizer))]
    for member in (*mixture.experts, *mixture.shared):
        one = member.source
        if one.label not in seen:
            seen.add(one.label)
            names = [matrix(layer, w) for layer in range(one.layers) for w in MATRICES]
            found.append(Read(f"expert: {one.label}", one.checkpoint, names, one.companions))
    return found


def _settings(plan: _Plan) -> dict[str, Any]:
    """All that decides the bytes; of files of texts their hash."""
    config, options = plan.config, plan.options
    texts = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in
             (("prompts", options.prompts), ("calibration", options.calibration)) if path is not None}
    return {"config": config.text, "layout": plan.mixture.layout.title, "dtype": plan.mixture.dtype, **texts,
            **({"steps": options.steps, "learning_rate": options.learning_rate, "balance": options.balance}
               if options.calibration else {})}


def _parameters(plan: _Plan) -> tuple[int, int]:
    """(all, those that one token passes: all but the experts it is not sent to)."""
    one = sum(plan.mixture.experts[0].source.checkpoint.tensors[matrix(layer, w)].numel
              for layer in range(plan.mixture.layers) for w in MATRICES)
    total = sum(torch.Size(shape).numel() for made in plan.mixture.made() for shape, _ in made.tensors.values())
    return total, total - one * (len(plan.mixture.experts) - plan.config.per_token)


# --- routers ---


def _routed(plan: _Plan, threads: int) -> tuple[dict[str, Any], list[str]]:
    """Give the mixture its router rows; the report and warnings. Nothing is written."""
    config, mixture, options = plan.config, plan.mixture, plan.options
    total, active = _parameters(plan)
    report: dict[str, Any] = {"layout": mixture.layout.title, "parameters": {"all": total, "active": active}}
    needs = config.prompted or options.prompts or options.calibration
    tokenizer = load_tokenizer(mixture.base.checkpoint.folder) if needs else None
    hidden = mixture.base.shape(matrix(0, "down"))[0]
    if config.prompted:
        dense = None if config.gate_mode == "cheap_embed" else layouts.skeleton(mixture.base.checkpoint.config,
                                                                                mixture.base.label)
        mixture.rows = routers.prompt_rows(config, [m.expert for m in plan.gated], dense, mixture.base.read, tokenizer,
                                           mixture.layers, threads=threads)
    else:
        mixture.rows = routers.drawn_rows(config.gate_mode, len(plan.gated), mixture.layers, hidden, options.seed)
    warnings = routers.degenerate(mixture.rows, centred=config.gate_mode == "mlp_input")
    texts = _measured_texts(plan, tokenizer, warnings)
    if texts:
        report["router"] = {"before": _measured(plan, texts, threads)}
    if options.calibration is not None:
        report["calibration"] = {"steps": options.steps, **_calibrated(plan, tokenizer, warnings)}
        if texts:
            report["router"]["after"] = _measured(plan, texts, threads)
    return report, warnings


def _measured_texts(plan: _Plan, tokenizer: Any, warnings: list[str]) -> list[tuple[int | None, list[int]]]:
    """(whose text it is, token ids) of what routers are measured on."""
    if plan.options.prompts is not None:
        given = read_texts(plan.options.prompts, "--prompts")
        return [(None, ids) for ids in token_ids(given, tokenizer, f"--prompts {plan.options.prompts}", warnings)]
    if not any(m.expert.positive for m in plan.mixture.experts):
        return []
    tokenizer = tokenizer or load_tokenizer(plan.mixture.base.checkpoint.folder)
    return [(e, ids) for e, member in enumerate(plan.mixture.experts)
            for ids in token_ids(member.expert.positive, tokenizer, f"{member.expert.where}.positive_prompts", warnings)]


def _measured(plan: _Plan, texts: Sequence[tuple[int | None, list[int]]], threads: int) -> dict[str, Any]:
    """Routing of the planned mixture, one layer in memory at a time; numbers as they will be written."""
    mixture = plan.mixture
    model = layouts.skeleton(mixture.config, f"the result, as {mixture.layout.title}")
    made, rounded = mixture.in_memory(), TORCH[mixture.dtype]
    owners = len(mixture.experts) if plan.options.prompts is None else 0
    tally = balance.Tally(len(mixture.experts), owners)
    router = mixture.layout.router.removesuffix(".weight")
    for some in _side_by_side(texts, mixture.base.shape(matrix(0, "down"))[0]):
        batches = [Tokens(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)) for _, ids in some]

        def watch(layer: int, i: int, _: torch.Tensor, seen: Any, owned: Sequence[tuple[int | None, list[int]]] = some) -> None:
            tally.add(layer, owned[i][0], balance.choices_of(seen[router][1]))

        run_layers(model, lambda name: made[name]().to(rounded), batches, watch, watched=(router,), threads=threads)
    return tally.report()


def _side_by_side(texts: Sequence[tuple[int | None, list[int]]], hidden: int
                  ) -> list[list[tuple[int | None, list[int]]]]:
    """Texts in groups whose hidden states fit in STATES bytes: they stay in memory from layer to layer."""
    groups: list[list[tuple[int | None, list[int]]]] = []
    room = 0
    for one in texts:
        size = 4 * hidden * len(one[1])
        if size > room:
            groups.append([])
            room = STATES
        groups[-1].append(one)
        room -= size
    return groups


def _calibrated(plan: _Plan, tokenizer: Any, warnings: list[str]) -> dict[str, Any]:
    """Train the router rows of the planned mixture, all of it in memory as float32. Gives the loss before and after."""
    mixture, options = plan.mixture, plan.options
    path = options.calibration or Path()
    ids = token_ids(read_texts(path, "--calibrate"), tokenizer, f"--calibrate {path}", warnings)
    model = in_memory(mixture)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums must not depend on how many cores there are
    try:
        rows, losses = calibrate(model, ids, options.steps, seed=options.seed, learning_rate=options.learning_rate,
                                 balance=options.balance, rounded=TORCH[mixture.dtype])
    finally:
        torch.set_num_threads(threads)
    old = mixture.rows
    mixture.rows = {layer: torch.cat([rows[layer], old[layer][len(mixture.experts) :]]) for layer in rows}
    return losses


def in_memory(mixture: tensors.Mixture) -> Any:
    """The planned mixture as a model of transformers, float32, its numbers rounded as they will be written."""
    model = layouts.skeleton(mixture.config, f"the result, as {mixture.layout.title}")
    rounded = TORCH[mixture.dtype]
    known = model.state_dict().keys()
    model.load_state_dict({name: make().to(rounded).float() for name, make in mixture.in_memory().items() if name in known},
                          assign=True, strict=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.tie_weights()
    return model


