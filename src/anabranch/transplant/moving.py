"""`anabranch vocabulary MODEL DONOR OUT`: the model, with the donor's tokenizer.

    embedding, head    made row by row (`matrix`), in float32, rounded once to the model's dtype
    all other tensors  copied
    config.json        the model's, with the donor's vocabulary size and special tokens; generation_config.json likewise
    tokenizer          the donor's files as they are, chat template included
    processor          the model's

Loss in nats per byte before and after tells what it costs (`text_loss`): the rows are put into the loaded model as they would
be written, so that any number of methods can be compared without writing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.artifacts import MergeManifest
from anabranch.engine.layout import set_tied, set_vocab_size
from anabranch.engine.making import TORCH, Made, Read, copied, forecast_made, make_model
from anabranch.engine.stream import Progress
from anabranch.errors import ModelError, RecipeError
from anabranch.model import load_model
from anabranch.rows import generator
from anabranch.surgery.side_files import GENERATION, carried, carry_tokenizer, is_processor, new_ids_in, template_in
from anabranch.surgery.vocabulary import TOKENIZER, files_digest, parse_object, some
from anabranch.transplant.approximations import CHUNK
from anabranch.transplant.matching import BYTE, EXACT, PREFIX, Key, match, roles_of, usable_keys
from anabranch.transplant.matrix import METHODS, Settings, Task, applies, check_anchors, task_for, transplanted
from anabranch.transplant.pieces import bare_tokenizer, loads_otherwise, own_pieces, splitter, whole_tokenizer, written
from anabranch.transplant.sides import Side, json_bytes, open_side, special_ids, with_donor_ids
from anabranch.transplant.text_loss import Loss, Window, loss_of, window_size, windows
from anabranch.transplant.trained import badly_trained, is_reserved

VERB = "vocabulary"
FEW = 0.25
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Transplant:
    """What will be done: two models, settings, and a task for each matrix ('embed', and 'lm_head' of an untied model)."""

    model: Side
    donor: Side
    settings: Settings
    rows: int
    tasks: dict[str, Task]
    usable: dict[Key, int]
    report: dict[str, Any]
    warnings: list[str]
    notes: list[str] = field(default_factory=list)

    def matrix_names(self) -> dict[str, str]:
        """'embed', 'lm_head' -> the tensor's name."""
        assert self.model.embedding is not None
        return {"embed": self.model.embedding, **({"lm_head": self.model.head} if self.model.head is not None else {})}


def plan_transplant(model: Side, donor: Side, settings: Settings) -> Transplant:
    """Match the tokens and see that all can be made.

    Raises:
        RecipeError: settings that cannot be, or that these models cannot meet. ModelError: a donor without embeddings where the
        method needs them.
    """
    settings.check()
    if METHODS[settings.method].donor and donor.embedding is None:
        raise ModelError(f"DONOR {donor.label}: no weights there, and `{settings.method}` makes rows from its embeddings. "
                         f"Give the donor's model, or a method that needs none: "
                         f"{', '.join(n for n, m in METHODS.items() if not m.donor)}.")
    ids = max(donor.vocabulary.ids.values(), default=-1) + 1
    said = donor.config.get("vocab_size")
    donor_rows = donor.shape(donor.embedding)[0] if donor.embedding is not None else None
    rows = max(ids, donor_rows or 0, said if isinstance(said, int) and donor_rows is None else 0)
    assert model.embedding is not None
    own_rows = model.shape(model.embedding)[0]
    bad_own, bad_donor = np.zeros(own_rows, dtype=bool), np.zeros(rows, dtype=bool)
    if settings.magikarp:
        bad_own = np.logical_or(*_indicators(model, own_rows))
    if settings.magikarp and donor.embedding is not None:
        both = np.logical_and(*_indicators(donor, donor.shape(donor.embedding)[0]))
        tokens = np.isin(np.arange(len(both)), list(donor.vocabulary.ids.values()))
        bad_donor[: len(both)] = both & tokens
    usable = usable_keys(model.keys, own_rows, bad_own)
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    for which in ("embed", *(("lm_head",) if model.head is not None else ())):
        head = which == "lm_head"
        matches = match(model.keys, donor.keys, usable, rows, byte=applies(settings.byte_match, head),
                        prefix=applies(settings.prefix_match, head))
        source = donor.matrix(head)
        there = donor.shape(source)[0] if source is not None else None
        tasks[which] = task_for(matches, bad_donor, there, settings.method, head)
        if (problem := check_anchors(tasks[which], settings)) is not None:
            problems.append(problem)
    if problems:
        raise RecipeError.of("vocabulary: this cannot be:", list(dict.fromkeys(problems)))
    report = {"rows": rows, "tokens": len(donor.vocabulary.ids), **{which: task.counts() for which, task in tasks.items()},
              "tied": model.head is None, **({"model_badly_trained": int(bad_own.sum())} if settings.magikarp else {})}
    transplant = Transplant(model, donor, settings, rows, tasks, usable, report, [])
    transplant.warnings.extend(_warnings(transplant))
    return transplant


def _indicators(side: Side, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of its embedding and of its head were hardly trained."""
    assert side.embedding is not None
    tokens, reserved = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
    for number in side.keys.of:
        if number < rows:
            tokens[number] = True
            reserved[number] = is_reserved(side.keys.text(number))
    head = None if side.head is None else side.read(side.head)[:rows]
    if head is not None and len(head) < rows:  # the embedding alone is padded
        head = torch.cat([head, head.new_zeros(rows - len(head), head.shape[1])])
    return badly_trained(side.read(side.embedding), head, tokens, reserved)


def _warnings(transplant: Transplant) -> list[str]:
    model, donor, task = transplant.model, transplant.donor, transplant.tasks["embed"]
    found = []
    exact = len(task.matches.of(EXACT))
    if exact < FEW * max(len(donor.vocabulary.ids), 1):
        found.append(f"only {exact:,} of the donor's {len(donor.vocabulary.ids):,} tokens are tokens of the model: most rows "
                     "will be estimates, and the model should be trained on before it is used")
    for side, name in ((model, "MODEL"), (donor, "DONOR")):
        if side.keys.spelling == "plain":
            found.append(f"{name}: its tokenizer ({side.vocabulary.kind}) writes neither bytes nor word marks, so its tokens "
                         "are matched as they are spelled")
    if transplant.settings.byte_match == "no":
        more = match(model.keys, donor.keys, transplant.usable, transplant.rows, byte=True)
        if count := len(more.of(BYTE)):
            found.append(f"{count} tokens of one byte are byte-fallback tokens on the other side, and are not taken for the "
                         "same: `--byte-match yes` takes them")
    if len(task.without):
        found.append(f"{len(task.without)} tokens of the donor's tokenizer have no row in its embedding: their rows are zero")
    missing = [role for role, token in roles_of(donor.vocabulary).items()
               if task.matches.row[donor.vocabulary.ids[token]] < 0]
    if missing:
        found.append(f"the donor's {some(missing)} token has no counterpart in the model, and its row is an estimate")
    if template_in(model.folder) is not None and template_in(donor.folder) is None:
        found.append("the model has a chat template and the donor none: the result has none, since the model's is written "
                     "for its own tokens")
    if model.head is not None and model.checkpoint is not None and model.checkpoint.ties_embeddings:
        found.append(f"MODEL: config.json ties head and embedding, and {model.head} differs from {model.embedding}: taken as "
                     "untied")
    return found


# --------------------------------------------------------------------------------------------------------------- the matrices


def matrix_of(transplant: Transplant, which: str) -> Tensor:
    """The embedding ('embed') or head ('lm_head') for the donor's tokenizer, float32 [rows, width]."""
    model, donor, task = transplant.model, transplant.donor, transplant.tasks[which]
    name, source = transplant.matrix_names()[which], donor.matrix(task.head)
    matrix = model.read(name)
    rows, texts = len(matrix), _texts(donor)
    own = {int(n): int(task.matches.row[n]) for n in task.matches.of(EXACT)}
    drawn = generator(transplant.settings.seed, VERB, name)

    def pieces(numbers: Sequence[int], _: bool) -> list[list[int]]:
        return own_pieces(model.vocabulary, model.keys, rows, [texts(n) for n in numbers])

    def normal(count: int, width: int) -> Tensor:
        return torch.from_numpy(drawn.standard_normal((count, width), dtype=np.float32))

    return transplanted(matrix, donor.read(source) if source is not None else None, task, transplant.settings, pieces,
                        splitter(transplant.usable, texts, own), normal, transplant.notes)


def _texts(donor: Side) -> Callable[[int], bytes]:
    return lambda number: written(donor.keys, donor.vocabulary, number)


def bias_of(transplant: Transplant) -> Tensor:
    """The head's bias: copied where a token is matched, elsewhere the mean of these; float32 [rows]."""
    assert transplant.model.bias is not None
    bias, task = transplant.model.read(transplant.model.bias).float(), next(reversed(transplant.tasks.values()))
    copied_from = task.matches.of(EXACT, BYTE, PREFIX)
    values = bias[torch.from_numpy(task.matches.row[copied_from])]
    out = torch.full((transplant.rows,), float(values.double().mean()) if len(values) else 0.0)
    out[torch.from_numpy(copied_from)] = values
    return out


def made_of(transplant: Transplant) -> list[Made]:
    """The result's tensors: matrices made, all others copied."""
    model = transplant.model
    checkpoint = model.checkpoint
    assert checkpoint is not None
    changed: dict[str, Made] = {}
    for which, name in transplant.matrix_names().items():
        info = checkpoint.tensors[name]
        changed[name] = Made({name: ((transplant.rows, *info.shape[1:]), info.dtype)},
                             partial(_matrix, transplant, which, name), _need(transplant, which))
    if (bias := model.bias) is not None:
        changed[bias] = Made({bias: ((transplant.rows,), checkpoint.tensors[bias].dtype)}, lambda: {bias: bias_of(transplant)})
    return [changed.get(name) or copied(checkpoint, name) for name in checkpoint.tensors if name not in model.dropped]


def _matrix(transplant: Transplant, which: str, name: str) -> dict[str, Tensor]:
    return {name: matrix_of(transplant, which)}


def _need(transplant: Transplant, which: str) -> int:
    """Bytes at the peak of making a matrix, roughly and not too few."""
    task, settings = transplant.tasks[which], transplant.settings
    own = transplant.model.shape(transplant.matrix_names()[which])
    source = transplant.donor.matrix(task.head)
    width = transplant.donor.shape(source)[1] if source is not None else 0
    wanted, anchors = len(task.wanted), len(task.anchors)
    batch = min(settings.batch_size if settings.batch_size > 0 else wanted, wanted)
    method = METHODS[settings.method]
    at_once = batch * (3 * anchors + (settings.k * (width + own[1]) * 2 if method.k else 0))
    columns = width + (3 * own[1] if settings.method == "composed" else 0)
    whole = (wanted + anchors) * (width + own[1]) * (1 if method.k else 2 if settings.method == "composed" else 6)
    return 4 * (at_once + whole + 8 * max(columns, own[1]) ** 2 + 6 * CHUNK * columns)


def files_of(transplant: Transplant) -> dict[str, bytes | Path]:
    """Everything beside the weights."""
    model, donor = transplant.model, transplant.donor
    rewritten = {} if (donor.folder / TOKENIZER).is_file() else donor.vocabulary.files
    files = {name: file for name, file in carried(donor.folder, rewritten=rewritten)[0].items()
             if name != GENERATION and not is_processor(name)}
    files |= {name: file for name, file in carry_tokenizer(model.folder).items() if is_processor(name)}
    if "auto_map" in model.config:  # the model's own code, copied and never run
        files |= {path.name: path for path in model.folder.glob("*.py")}
    task = transplant.tasks["embed"]
    new_ids = {int(task.matches.row[n]): int(n) for n in reversed(task.matches.of(EXACT))}
    roles = {role: donor.vocabulary.ids[token] for role, token in roles_of(donor.vocabulary).items()}
    config, lost = new_ids_in(model.config, new_ids, roles)
    config = set_vocab_size(with_donor_ids(model.config, config, special_ids(donor, generation=False)), transplant.rows)
    files["config.json"] = json_bytes(config if model.head is None else set_tied(config, False))
    path = model.folder / GENERATION
    if path.is_file():
        before = parse_object(path.read_bytes(), path)
        after, also = new_ids_in(before, new_ids, roles)
        lost += also
        files[GENERATION] = json_bytes(with_donor_ids(before, after, special_ids(donor, generation=True)))
    keys = {f"{role}_token_id" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    if told := [line for line in dict.fromkeys(lost) if line.split()[0] not in keys]:
        transplant.warnings.append(f"config.json or {GENERATION} names tokens that the donor has not: {'; '.join(told)}")
    return dict(sorted(files.items()))


# ------------------------------------------------------------------------------------------------------------------ the folder


def transplant_vocabulary(model: str, donor: str, out: Path, settings: Settings | None = None, *, max_shard_size: str = "5GB",
                          threads: int | None = None, memory: str | None = None, warn: Warn | None = None,
                          progress: Callable[[Progress], None] | None = None) -> tuple[MergeManifest, Transplant]:
    """Write the model with the donor's tokenizer.

    Args:
        model, donor: folders or Hub ids (`NAME@REVISION`). The donor may be a tokenizer without weights where the method needs
            none of them (METHODS).
        settings: method and matching; by default `Settings()`.
        max_shard_size, threads, memory, progress: as `make_model`.
        warn: told what the user should know.
    Raises:
        RecipeError, ModelError, CorruptedError, OutputError.
    """
    transplant = opened(model, donor, settings or Settings())
    donor_side, files = transplant.donor, files_of(transplant)
    _tell(transplant.warnings, warn)
    manifest = make_model(out, made_of(transplant), files, _inputs(transplant), verb=VERB, settings=_said(transplant),
                          seed=transplant.settings.seed, report=transplant.report, max_shard_size=max_shard_size,
                          threads=threads, memory=memory, progress=progress, warn=warn)
    _tell(list(dict.fromkeys(transplant.notes)), warn)
    if warn is not None and (how := loads_otherwise(out, donor_side.vocabulary)) is not None:
        known = loads_otherwise(donor_side.folder, donor_side.vocabulary)
        warn(f"{out}: {how}" + (", as it does the donor itself" if known == how else "") + f". The tokenizer of "
             f"{TOKENIZER}, for which the rows are, loads with `transformers.PreTrainedTokenizerFast.from_pretrained(OUT)`")
    return manifest, transplant


def forecast_transplant(model: str, donor: str, out: Path, settings: Settings | None = None, *, max_shard_size: str = "5GB",
                        threads: int | None = None, memory: str | None = None, warn: Warn | None = None) -> list[str]:
    """What `transplant_vocabulary` would do, in lines."""
    transplant = opened(model, donor, settings or Settings())
    files = files_of(transplant)
    _tell(transplant.warnings, warn)
    return [*count_lines(transplant.report), *forecast_made(out, made_of(transplant), files, _inputs(transplant),
                                                            max_shard_size=max_shard_size, threads=threads, memory=memory)]


def opened(model: str, donor: str, settings: Settings) -> Transplant:
    """Both models opened and the plan made. Raises as `plan_transplant` and `open_side`."""
    settings.check()
    return plan_transplant(open_side(model, "MODEL", weights_needed=True), open_side(donor, "DONOR", weights_needed=False),
                           settings)


def count_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    words = {"exact": "the model's own row", "byte": "its byte token's", "prefix": "a prefix's", "approximated": "made",
             "zeroed_badly_trained": "zero, badly trained", "zeroed_no_donor_row": "zero, no donor row", "no_token": "no token"}
    lines = []
    for which in ("embed", "lm_head"):
        if which in report:
            counts = report[which]
            said = ", ".join(f"{counts[key]:,} {text}" for key, text in words.items() if counts[key] or key == "exact")
            tied = " (and head, tied)" if report["tied"] else ""
            lines.append(f"{which}{tied}: {report['rows']:,} rows: {said}; {counts['anchors']:,} anchors")
    if "model_badly_trained" in report:
        lines.append(f"{report['model_badly_trained']:,} rows of the model are badly trained, and are no matches")
    return lines


def _said(transplant: Transplant) -> dict[str, Any]:
    """Settings that decide the bytes, the donor's tokenizer among them."""
    return {**transplant.settings.said(), "donor_tokenizer": files_digest(transplant.donor.folder),
            "model_tokenizer": files_digest(transplant.model.folder)}


def _inputs(transplant: Transplant) -> list[Read]:
    model, donor = transplant.model, transplant.donor
    assert model.checkpoint is not None
    found = [Read(model.label, model.checkpoint)]
    if donor.checkpoint is not None:
        found.append(Read(donor.label, donor.checkpoint, [n for n in (donor.embedding, donor.head) if n is not None]))
    return found


def _tell(lines: Sequence[str], warn: Warn | None) -> None:
    for text in lines:
        if warn is not None:
            warn(text)


# ------------------------------------------------------------------------------------------------------------------------ loss


@dataclass(frozen=True)
class Scored:
    """A way of making rows, and what the model then makes of the text. `skipped`: why it could not be tried."""

    name: str
    loss: Loss | None
    report: dict[str, Any]
    skipped: str = ""


class Bench:
    """The model in memory, float32, to be tried with one set of rows after the other."""

    def __init__(self, model: Side, texts: Sequence[str], most: int) -> None:
        """Loads it. Raises ModelError where it does not load, RecipeError where the text has no window of two words."""
        self.side = model
        self.windows: list[Window] = windows(texts, window_size(model.config), most)
        if not self.windows:
            raise RecipeError("--text: no two words in a row of it fit into the model's context. Give a longer text.")
        self.model = load_model(model.folder)
        self.tokenizer = whole_tokenizer(model.vocabulary), bare_tokenizer(model.vocabulary)

    def before(self) -> Loss:
        """Of the model as it is, with its own tokenizer."""
        return loss_of(self.model, *self.tokenizer, self.windows)

    def after(self, transplant: Transplant) -> Loss:
        """Of the model with these rows, rounded as they would be written. The model keeps them."""
        checkpoint = transplant.model.checkpoint
        assert checkpoint is not None
        rounded = {which: matrix_of(transplant, which).to(TORCH[checkpoint.tensors[name].dtype]).float()
                   for which, name in transplant.matrix_names().items()}
        bias = None if transplant.model.bias is None else bias_of(transplant)
        put_rows(self.model, rounded["embed"], rounded.get("lm_head"), bias)
        donor = transplant.donor.vocabulary
        return loss_of(self.model, whole_tokenizer(donor), bare_tokenizer(donor), self.windows)


def put_rows(model: Any, embedding: Tensor, head: Tensor | None, bias: Tensor | None) -> None:
    """Give a loaded causal language model another embedding and head (None: the embedding, where the head is tied)."""
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if inner is None or outer is None:
        raise ModelError(f"{type(model).__name__}: has no input embedding and head that could be replaced, so that no loss can "
                         "be taken of it. Leave --text out.")
    where = inner.weight.device
    inner.weight = nn.Parameter(embedding.to(where), requires_grad=False)
    inner.num_embeddings, inner.padding_idx = len(embedding), None
    outer.weight = inner.weight if head is None else nn.Parameter(head.to(where), requires_grad=False)
    outer.out_features = len(embedding)
    if bias is not None and getattr(outer, "bias", None) is not None:
        outer.bias = nn.Parameter(bias.to(where), requires_grad=False)
    model.config.get_text_config().vocab_size = len(embedding)


def variants(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Every method, and every form that the peer's options give it."""
    for name in METHODS:
        if name == "common_interpolation":
            for scheme in ("distance_proportional", "barycentric", "least_squares"):
                yield f"{name} {scheme}", replace(settings, method=name, weight_scheme=scheme)
            yield f"{name} cosine", replace(settings, method=name, cosine=True, weight_scheme="distance_proportional")
        elif name == "subword":
            for pooling in ("mean", "sum", "weighted_mean", "first_last"):
                yield f"{name} {pooling}", replace(settings, method=name, subword_method=pooling)
        else:
            yield name, replace(settings, method=name)


def compare_methods(model: str, donor: str, texts: Sequence[str], settings: Settings | None = None, *, most: int = 200_000,
                    warn: Warn | None = None, tell: Callable[[str], None] | None = None) -> tuple[Loss, list[Scored]]:
    """Every method on the same text: the model's loss as it is, and after each, best first; those that cannot be tried last.

    Nothing is written. Raises as `transplant_vocabulary`, and as `Bench`.
    """
    settings = settings or Settings()
    settings.check()
    sides = open_side(model, "MODEL", weights_needed=True), open_side(donor, "DONOR", weights_needed=False)
    bench = Bench(sides[0], texts, most)
    before = bench.before()
    told: dict[str, None] = {}
    found = []
    for name, one in variants(settings):
        try:
            transplant = plan_transplant(*sides, one)
            scored = Scored(name, bench.after(transplant), transplant.report)
            told |= dict.fromkeys([*transplant.warnings, *transplant.notes])
        except (ModelError, RecipeError) as error:
            scored = Scored(name, None, {}, " ".join(str(error).split()))
        found.append(scored)
        if tell is not None:
            tell(name)
    _tell(list(told), warn)
    return before, sorted(found, key=lambda one: (one.loss is None, one.loss.nats_per_byte if one.loss else 0.0))


def losses(model: str, donor: str, texts: Sequence[str], settings: Settings, *, most: int = 200_000) -> tuple[Loss, Loss]:
    """(before, after) of one transplant."""
    transplant = opened(model, donor, settings)
    bench = Bench(transplant.model, texts, most)
    return bench.before(), bench.after(transplant)
