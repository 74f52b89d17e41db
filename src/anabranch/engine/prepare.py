"""From a merge config to a merge that can run: models opened, tensors lined up, files that come along, every problem
found before the first byte is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.engine.adapter import Adapter
from anabranch.engine.assemble import Assembly, assemble
from anabranch.engine.blocks import MERGED, Buffers, Reader
from anabranch.engine.card import model_card
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.config import MergeConfig, Tokenizer, TokenRow
from anabranch.engine.fetch import resolve
from anabranch.engine.layout import Layout, cut_config, layout_of, set_dtype, set_tied, set_vocab_size
from anabranch.engine.output import CARD
from anabranch.engine.plan import DTYPES, lay_out
from anabranch.engine.reference import Reference
from anabranch.engine.stream import Merge
from anabranch.engine.wanted import Input, Source, Wanted
from anabranch.errors import AnabranchError, ModelError, RecipeError
from anabranch.merge.stack import CHUNK
from anabranch.surgery import chat_templates, side_files
from anabranch.surgery import tokenizer as tokenizers

CONFIG = "mergekit_config.yml"


@dataclass(frozen=True)
class Prepared:
    """A merge that has been checked, the files beside its weights, and what the user should be told."""

    merge: Merge
    files: dict[str, Path | bytes]
    warnings: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Options:
    """How a config is taken. `allow_pickle`: .bin weights are read too, written anew as safetensors in a cache."""

    seed: int = 0
    max_shard_size: int = 5 * 10**9
    allow_mixed: bool = False
    allow_pickle: bool = False


def prepare(config: MergeConfig, text: str, options: Options) -> Prepared:
    """Open everything that a config names and plan the merge. `text`: of the config, to be kept beside the result.

    Raises AnabranchError: what is wrong with models, adapters, tokenizers, or how they fit together.
    """
    inputs = _inputs([*config.models, *config.tokenizers_only], options)
    opened, adapters, warnings = _opened(config, inputs)
    count = len(config.models)
    layouts = [layout_of(checkpoint) for checkpoint in opened[:count]]
    donor = config.models.index(config.donor)
    template = chat_templates.choose_chat_template(config.chat_template, [c.folder for c in opened], [i.label for i in inputs])
    tokens = _tokens(config, opened, layouts, inputs, template.text if template else None)
    assembly = assemble(config, opened[:count], layouts, rows=tokens.size if tokens else None, allow_mixed=options.allow_mixed,
                        folded={Source(i, name) for i, adapter in adapters.items() for name in adapter.names})
    warnings += [*assembly.warnings, *(tokens.warnings if tokens else [])]
    readers = _readers(assembly.wanted, opened, adapters, tokens)
    plan = lay_out(assembly.wanted, options.max_shard_size, opened[donor].stem)
    merge = Merge(inputs, tuple(opened), plan, options.seed, readers,
                  {i: Checkpoint.of_file(path) for i, path in assembly.fisher.items()},
                  _companions(inputs, assembly, tokens is not None), _read_for_rows(assembly.wanted, opened, tokens))
    warnings += _turned_rows(config, assembly.wanted, tokens)
    if tokens is None:
        warnings += tokenizers.tokenizer_differences([c.folder for c in opened[:count]], [i.label for i in inputs[:count]],
                                                     donor)
        files = side_files.carry_tokenizer(opened[donor].folder, template.text if template else None)
        if template is not None:
            warnings += chat_templates.template_warnings(template.text, opened[donor].folder, inputs[donor].label)
    else:
        files = dict(tokens.files)
    if "auto_map" in opened[donor].config:  # the model's own code, copied and never run
        files |= {path.name: path for path in opened[donor].folder.glob("*.py")}
    dtype = config.out_dtype or config.dtype or _dtypes(assembly.wanted)
    made, remarks = _config_json(config, opened[donor], layouts[donor], assembly, tokens, dtype)
    files["config.json"] = (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()
    files[CONFIG] = text.encode()
    files[CARD] = model_card(config, text).encode()
    if merge.plan.index is not None:
        files[merge.plan.index_file] = merge.plan.index
    return Prepared(merge, dict(sorted(files.items())), tuple(dict.fromkeys([*warnings, *remarks])), dtype)


def _inputs(references: Sequence[Reference], options: Options) -> tuple[Input, ...]:
    """Every folder that the config names, downloaded where it is on the Hub. All that are missing are named at once."""
    problems = [problem for reference in references for problem in reference.problems]
    found = []
    for reference in references:
        if reference.problems:
            continue
        try:
            converted = converted_weights() if options.allow_pickle else None
            folder = resolve(reference.path, reference.revision, converted=converted)
            adapter = resolve(reference.adapter, reference.adapter_revision) if reference.adapter else None
            found.append(Input(str(reference), folder, adapter, os.path.isdir(reference.path)))
        except ModelError as error:
            hint = "" if "/" in reference.path else (" (If it is meant as a folder: paths count from the working folder, then "
                                                    "from the config's.)")
            problems.append(f"{error}{hint}")
    if problems:
        raise ModelError.of("these models cannot be found:", problems) if len(problems) > 1 else ModelError(problems[0])
    return tuple(found)


def converted_weights() -> Path:
    """Where pickled weights are kept once they are converted: the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anabranch" / "converted"


def _opened(config: MergeConfig, inputs: Sequence[Input]) -> tuple[list[Checkpoint], dict[int, Adapter], list[str]]:
    opened, adapters, warnings, problems = [], {}, [], []
    for number, (one, reference) in enumerate(zip(inputs, [*config.models, *config.tokenizers_only], strict=True)):
        try:
            checkpoint = Checkpoint.open(one.folder)
            if reference.architecture is not None:
                checkpoint = replace(checkpoint, config=checkpoint.config | {"architectures": [reference.architecture]})
            opened.append(checkpoint)
            if one.adapter is not None:
                adapters[number] = Adapter.open(one.adapter, checkpoint)
                warnings += [f"{one.label}: {warning}" for warning in adapters[number].warnings]
        except AnabranchError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ModelError.of("these models cannot be merged:", [str(error) for error in problems])
    return opened, adapters, warnings


def _tokens(config: MergeConfig, opened: Sequence[Checkpoint], layouts: Sequence[Layout], inputs: Sequence[Input],
            template: str | None) -> tokenizers.TokenizerPlan | None:
    """The merged tokenizer, where the config asks for one."""
    if config.tokenizer is None:
        return None
    references = [*config.models, *config.tokenizers_only]
    sizes = [_embedding_rows(checkpoint, layouts[i] if i < len(layouts) else layout_of(checkpoint), inputs[i].label)
             for i, checkpoint in enumerate(opened)]
    base = references.index(config.base) if config.base is not None else None
    return tokenizers.plan_tokenizer(_request(config.tokenizer, references), [c.folder for c in opened], sizes, base,
                                     [one.label for one in inputs], chat_template=template)


def _request(tokenizer: Tokenizer, references: Sequence[Reference]) -> tokenizers.TokenizerRequest:
    rules = {}
    for token, setting in tokenizer.tokens.items():
        source: Any = setting.source
        if isinstance(source, TokenRow):
            source = tokenizers.TokenRow(references.index(source.model), source.token, source.token_id)
        elif source == "zero":
            source = tokenizers.ZeroRow()
        rules[token] = tokenizers.TokenRule(source, setting.force)
    source = tokenizer.source
    return tokenizers.TokenizerRequest(references.index(source) if isinstance(source, Reference) else source, rules,
                                       tokenizer.pad_to_multiple_of)


def _embedding_rows(checkpoint: Checkpoint, layout: Layout, label: str) -> int:
    rows = {checkpoint.tensors[name].shape[0] for name, place in layout.places.items() if place.embedding}
    if len(rows) != 1:
        raise RecipeError(f"tokenizer: {label} has "
                          + (f"embeddings of {sorted(rows)} rows" if rows else "no tensor whose rows are tokens")
                          + ", so its rows cannot be moved. Leave `tokenizer` out, or mend the model.")
    return rows.pop()


# --- tensors that are not simply what a file holds ---


class AdapterReader:
    """A tensor with an adapter folded into it, formed in runs of fixed size so that no cut shows in the result."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        self.adapter, self.name = adapter, name

    def read(self, start: int, stop: int, into: Tensor) -> None:
        into.copy_(self.adapter.entries(self.name, start, stop))


class RowReader:
    """An embedding whose rows are put in the order of the merged tokenizer."""

    def __init__(self, row_map: tokenizers.RowMap, read: Callable[[int, np.ndarray], Tensor],
                 row_shape: tuple[int, ...]) -> None:
        self.row_map, self.read_rows, self.width = row_map, read, prod(row_shape)
        self._padding: Tensor | None = None

    def read(self, start: int, stop: int, into: Tensor) -> None:
        if self._padding is None and self.row_map.is_padded:
            self._padding = tokenizers.padding_row(self.row_map, self.read_rows)
        first, last = start // self.width, -(-stop // self.width)
        # A few thousand rows at a time: a block may span a whole embedding.
        step = max(1, CHUNK // self.width)
        for row in range(first, last, step):
            end = min(row + step, last)
            flat = tokenizers.rows(self.row_map, row, end, self.read_rows, self._padding).reshape(-1)
            low, high = max(start, row * self.width), min(stop, end * self.width)
            into[low - start : high - start].copy_(flat[low - row * self.width : high - row * self.width])


def _readers(wanted: Sequence[Wanted], opened: Sequence[Checkpoint], adapters: Mapping[int, Adapter],
             tokens: tokenizers.TokenizerPlan | None) -> dict[tuple[str, Source], Callable[[Buffers], Reader]]:
    readers: dict[tuple[str, Source], Callable[[Buffers], Reader]] = {}
    for tensor in wanted:
        for source in tensor.sources:
            if source.input in adapters and adapters[source.input].touches(source.name):
                readers[tensor.name, source] = partial(_adapter_reader, adapters[source.input], source.name)
        if tokens is not None and tensor.embedding:
            holders = {source.input: source.name for source in tensor.sources}
            # A token's row may be asked of a model that is in the merge for nothing else.
            others = {i for i in range(len(opened)) if i not in holders and tensor.sources[0].name in opened[i].tensors
                      and i in tokens.own}
            maps = tokens.row_maps(sorted(holders.keys() | others)).maps
            names = holders | dict.fromkeys(others, tensor.sources[0].name)
            read = partial(_rows, opened, adapters, names)
            for source in tensor.sources:
                shape = opened[source.input].tensors[source.name].shape[1:]
                readers[tensor.name, source] = partial(_row_reader, maps[source.input], read, shape)
    return readers


def _adapter_reader(adapter: Adapter, name: str, _: Buffers) -> Reader:
    return AdapterReader(adapter, name)


def _row_reader(row_map: tokenizers.RowMap, read: Callable[[int, np.ndarray], Tensor], shape: tuple[int, ...],
                _: Buffers) -> Reader:
    return RowReader(row_map, read, shape)


def _rows(opened: Sequence[Checkpoint], adapters: Mapping[int, Adapter], names: Mapping[int, str], number: int,
          indices: np.ndarray) -> Tensor:
    """Rows of an input's embedding, float32."""
    name = names[number]
    if number in adapters and adapters[number].touches(name):
        return adapters[number].rows(name, indices)
    return opened[number].read(name)[torch.from_numpy(indices)].float()


def _companions(inputs: Sequence[Input], assembly: Assembly, tokenizers_too: bool) -> dict[int, tuple[Path, ...]]:
    """Files beside an input's weights whose bytes decide those of the result."""
    found: dict[int, tuple[Path, ...]] = {}
    for i, one in enumerate(inputs):
        folders = [one.adapter] if one.adapter is not None else []
        paths = [folder / name for folder in folders for name in ("adapter_config.json", "adapter_model.safetensors")]
        if tokenizers_too:
            paths += [one.folder / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")]
        paths += [assembly.fisher[i]] if i in assembly.fisher else []
        found[i] = tuple(path for path in paths if path.is_file())
    return found


def _read_for_rows(wanted: Sequence[Wanted], opened: Sequence[Checkpoint],
                   tokens: tokenizers.TokenizerPlan | None) -> tuple[Source, ...]:
    """Embeddings of which single rows are read, besides those that are merged."""
    if tokens is None:
        return ()
    return tuple(Source(i, name) for tensor in wanted if tensor.embedding for name in [tensor.sources[0].name]
                 for i in range(len(opened)) if i in tokens.own and name in opened[i].tensors)


def _turned_rows(config: MergeConfig, wanted: Sequence[Wanted], tokens: tokenizers.TokenizerPlan | None) -> list[str]:
    """Methods that find one angle for a whole matrix scale also those rows that all inputs have from the same place."""
    if tokens is None or config.method not in ("slerp", "nuslerp", "multislerp", "karcher"):
        return []
    several = any(w.embedding and len({source.input for source in w.sources}) > 1 for w in wanted)
    count = int(tokens.owned.sum())
    if not (several and count):
        return []
    return [f"tokenizer: {count:,} rows of the embeddings come from one model alone, so all inputs of {config.method} hold the "
            "same numbers there. It turns the matrix as a whole, by one angle, and scales these rows too. `linear` or "
            "`task_arithmetic` leave them as they are (merge the embeddings with one of them, or `source: base`)."]


# --- files beside the weights ---


def _config_json(config: MergeConfig, donor: Checkpoint, layout: Layout, assembly: Assembly,
                 tokens: tokenizers.TokenizerPlan | None, dtype: str) -> tuple[dict[str, Any], list[str]]:
    made = dict(donor.config)
    warnings: list[str] = []
    if assembly.layers:
        made, warnings = cut_config(made, layout, assembly.layers)
    if tokens is not None:
        made = set_vocab_size(tokens.with_new_ids(made), tokens.size)
    if assembly.untied:
        made = set_tied(made, False)
    said = made.get("dtype", made.get("torch_dtype"))
    if dtype in DTYPES and (config.dtype or config.out_dtype or said not in (None, dtype)):
        made = set_dtype(made, dtype)
    return made, warnings


def _dtypes(wanted: Sequence[Wanted]) -> str:
    names = {spelling: name for name, spelling in DTYPES.items()}
    return ", ".join(sorted({names[w.dtype] for w in wanted if w.dtype in MERGED}))

