"""Merges of single files of tensors, whatever they are tensors of: `anabranch tensors`.

    merge_method, models: [{model: FILE, parameters}], base_model: FILE, parameters, dtype, out_dtype, dialect

The config of the peer's mergekit-pytorch, as it is (merge specification, 7.6). Names are all that lines tensors up: there
are no layers (a gradient takes its first value), no embeddings, no tied heads. A name that is not in every file, the base
among them, is an error; or left out (`intersection`); or made of the files that have it (`union`), where what the base
alone has is carried over. Parameters are looked up as in every merge: beside the model, then at the top, then the default.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from anabranch.artifacts import MergeManifest, write_atomically
from anabranch.engine.blocks import MERGED
from anabranch.engine.checkpoint import ITEM_SIZES, PICKLES, Checkpoint
from anabranch.engine.config import Entry, MergeConfig
from anabranch.engine.dialect import SHOWN, ConfigReader
from anabranch.engine.fetch import convert_file, quantisation
from anabranch.engine.merging import already_there, forecast_lines, hash_of, input_hashes, place_for, text_of, write
from anabranch.engine.output import MANIFEST, OutputFolder
from anabranch.engine.parameters import shown
from anabranch.engine.plan import DTYPES, lay_out, natural
from anabranch.engine.prepare import CONFIG, Options, Prepared, converted_weights
from anabranch.engine.reference import Reference, local
from anabranch.engine.requirements import Roles, roles_of, stretches
from anabranch.engine.sidecars import sidecar_problems
from anabranch.engine.stream import Merge, Progress, Settings
from anabranch.engine.values import Findings, Values
from anabranch.engine.wanted import COPY, Input, Source, Wanted
from anabranch.errors import AnabranchError, CorruptedError, ModelError, OutputError, RecipeError
from anabranch.merge import METHODS, fitting
from anabranch.recipe import read_yaml

Missing = Literal["error", "intersection", "union"]
# What the engine's config may say, and files without a layout cannot.
OF_MODELS = ("slices", "modules", "layer_slices", "tokenizer", "tokenizer_source", "chat_template", "name")
ONE_FILE = ".safetensors"


def merge_tensors(
    config: Path | str | Mapping[str, Any],
    out: Path | str,
    *,
    missing: Missing = "error",
    options: Options | None = None,
    settings: Settings | None = None,
    allow_unknown_keys: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = warnings.warn,
) -> MergeManifest:
    """`anabranch tensors CONFIG OUT`: merge files of tensors by name.

    Args:
        config: a YAML file, or what would stand in one.
        out: a folder to make, or a file NAME.safetensors, whose manifest is then NAME.safetensors.manifest.json.
        missing: what becomes of a name that some files lack.
        options: seed, shard size, whether pickles are read (tensors only, converted once into the user's cache).
    Raises:
        AnabranchError: everything that is wrong with config and files, in one message, before a byte is written; else as
            `merge_config`.
    """
    options = options or Options()
    prepared, recorded = _prepared(config, missing, options, allow_unknown_keys, _is_file(out))
    if warn is not None:
        for warning in prepared.warnings:
            warn(warning)
    place = _place(out, prepared.merge)
    if (finished := _there(place, prepared.merge, recorded)) is not None:
        if _folder(place) != place and (_folder(place) / MANIFEST).is_file():
            shutil.rmtree(_folder(place), ignore_errors=True)  # left over from a kill after the file was taken out
        if warn is not None:
            warn(f"{place} holds this very merge already; nothing was done")
        return finished
    folder = _folder(place)
    if folder != place:
        _forget_another(folder, prepared.merge, recorded)
    if folder == place or not (folder / MANIFEST).is_file():
        output = OutputFolder(folder, prepared.merge.plan, prepared.files)
        made = write(prepared.merge, output, settings or Settings(), recorded, progress)
        if folder == place:
            return made
    return _taken_out(folder, place)


def forecast_tensors(
    config: Path | str | Mapping[str, Any],
    out: Path | str,
    *,
    missing: Missing = "error",
    options: Options | None = None,
    settings: Settings | None = None,
    allow_unknown_keys: bool = False,
    warn: Callable[[str], None] | None = warnings.warn,
) -> list[str]:
    """The lines of a dry run. Arguments and errors as `merge_tensors`."""
    prepared, recorded = _prepared(config, missing, options or Options(), allow_unknown_keys, _is_file(out))
    if warn is not None:
        for warning in prepared.warnings:
            warn(warning)
    place = _place(out, prepared.merge)
    there = _there(place, prepared.merge, recorded) is not None
    return forecast_lines(prepared, settings or Settings(), place) + (
        [f"{place} holds this merge already; nothing would be done"] if there else [])


# -------------------------------------------------------------------------------------------------------------- reading


class _Reader(ConfigReader):
    """A merge config whose models are files."""

    def config(self, value: Any, source: str) -> MergeConfig | None:
        if isinstance(value, dict):
            self.problems += [f"{key}: files of tensors have no layers and no tokenizer. Leave it out, or merge whole models "
                              "(`anabranch merge`)" for key in OF_MODELS if key in value]
            value = {k: v for k, v in value.items() if k not in OF_MODELS}
        return super().config(value, source)

    def reference(self, value: Any, where: str) -> Reference | None:
        if not isinstance(value, str) or not value.strip():
            self.problems.append(f"{where}: got {shown(value)}, wanted the path of a file")
            return None
        found = local(value.strip(), self.folders)
        if found is None:
            self.problems.append(f"{where}: '{value}': there is no such file. Paths count from the working folder, then "
                                 "from the config's.")
        elif os.path.isdir(found):
            self.problems.append(f"{where}: '{value}' is a folder, wanted a file of tensors. Whole models are merged by "
                                 "`anabranch merge`.")
        else:
            return Reference(found, said=value.strip())
        return None


def _read(config: Path | str | Mapping[str, Any], text: str, allow_unknown_keys: bool) -> MergeConfig:
    home = [] if isinstance(config, Mapping) else [Path(config).resolve().parent]
    source = "tensors config" if isinstance(config, Mapping) else f"tensors config {config}"
    reader = _Reader((Path.cwd(), *home), allow_unknown_keys)
    try:
        read = reader.config(read_yaml(text), source)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    if read is None or reader.problems:
        more = len(reader.problems) - SHOWN
        raise RecipeError.of(f"{source}:", [*reader.problems[:SHOWN], *([f".. and {more} more"] if more > 0 else [])])
    return read


def _opened(config: MergeConfig, allow_pickle: bool) -> list[Checkpoint]:
    opened, problems = [], list[AnabranchError]()
    for model in config.models:
        path = Path(model.path)
        try:
            if path.suffix in PICKLES and not allow_pickle:
                raise ModelError(f"{model}: a pickle, and loading one can run any program. Where you trust it, --allow-pickle "
                                 "reads it (tensors only).")
            if path.suffix in PICKLES:
                path = convert_file(path, converted_weights())
            checkpoint = Checkpoint.of_file(path)
            if (how := quantisation(checkpoint)) is not None:
                raise ModelError(f"{model}: quantised ({how}), and sums of packed numbers have no meaning.")
            opened.append(checkpoint)
        except AnabranchError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ModelError.of("these files cannot be merged:", [str(problem) for problem in problems])
    return opened


# ------------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class _Found:
    """A tensor in one of the files."""

    entry: Entry
    source: Source
    shape: tuple[int, ...]
    dtype: str


class _Planner:
    """Which tensors there will be, and how each is made."""

    def __init__(self, config: MergeConfig, opened: Sequence[Checkpoint], missing: Missing) -> None:
        self.config, self.opened, self.missing = config, opened, missing
        self.method = METHODS[config.method]
        (self.stretch,) = stretches(config, config.modules[None])
        self.roles: Roles = roles_of(config, self.stretch)
        self.numbers = {model: i for i, model in enumerate(config.models)}
        self.findings = Findings(f"{config.source}: this cannot be merged:")
        self.values = Values(config, self.method, self.findings)

    def wanted(self) -> list[Wanted]:
        """Raises RecipeError, ShapeMismatch, ModelError: every problem, in one message."""
        models = [e.model for e in self.roles.branches] + ([self.roles.base] if self.roles.base is not None else [])
        names = {name for model in models for name in self.opened[self.numbers[model]].tensors}
        wanted = [w for name in sorted(names, key=natural) if (w := self._wanted(name)) is not None]
        self._fisher_problems(wanted)
        self.findings.stop()
        if not wanted:
            self.findings.problem("no tensor is in all files, so the result would be empty", kind="shape")
        self.findings.stop()
        return wanted

    def fisher(self) -> dict[int, Path]:
        if "fisher" not in self.method.inputs:
            return {}
        return {self.numbers[e.model]: Path(e.fisher) for e in self.roles.branches if e.fisher is not None}

    def _fisher_problems(self, wanted: Sequence[Wanted]) -> None:
        for problem in sidecar_problems(self.fisher(), wanted, [str(m) for m in self.config.models], self.opened):
            self.findings.problem(problem)

    def _find(self, name: str, entry: Entry) -> _Found | None:
        number = self.numbers[entry.model]
        info = self.opened[number].tensors.get(name)
        return _Found(entry, Source(number, name), info.shape, info.dtype) if info is not None else None

    def _wanted(self, name: str) -> Wanted | None:
        branches = [f for entry in self.roles.branches if (f := self._find(name, entry)) is not None]
        base = self._find(name, Entry(self.roles.base, {}, "base_model")) if self.roles.base is not None else None
        if not self._enough(name, branches, base):
            return None
        everyone = [*branches, *([base] if base is not None else [])]
        if any(f.dtype not in MERGED for f in everyone):
            return self._buffer(name, everyone)
        kept = self._of_one_shape(name, branches, base)
        if kept is None:
            return None
        return self._merged(name, kept, base)

    def _merged(self, name: str, branches: Sequence[_Found], base: _Found | None) -> Wanted | None:
        everyone = [*branches, *([base] if base is not None else [])]
        dtype = self.values.dtype([f.dtype for f in everyone])
        if len(branches) < max(self.method.branches[0], 1):
            if branches:
                self.findings.remark(f"`{self.method.name}` needs {self.method.branches[0]} models, and only {len(branches)} "
                                     f"{'has' if len(branches) == 1 else 'have'} it: carried over from "
                                     f"{(base or branches[0]).entry.model}", name)
            return _carried(name, base or branches[0], dtype)
        found = self.values.of([(f.entry, name) for f in branches], self.stretch.levels, name, 0.0, False)
        if found is None:
            return None
        weights, arguments = found
        method, arguments = fitting(self.method, arguments, everyone[0].shape, False)
        if method.name == "passthrough" and arguments.get("scale") == 1.0:
            return _carried(name, branches[0], dtype)
        return Wanted(name, everyone[0].shape, method.name, tuple(f.source for f in branches),
                      base.source if base is not None and method.takes_base else None,
                      weights if "weights" in method.inputs else None, tuple(sorted(arguments.items())), dtype)

    def _enough(self, name: str, branches: Sequence[_Found], base: _Found | None) -> bool:
        """Whether a tensor is to be made of the files that have it."""
        have = {f.entry.model for f in branches}
        lacking = [str(e.model) for e in self.roles.branches if e.model not in have]
        baseless = self.roles.base is not None and base is None
        if not (lacking or baseless):
            return True
        who = ", ".join([*lacking, *([f"{self.roles.base} (the base)"] if baseless else [])])
        lack = f"{who} {'lack' if ', ' in who else 'lacks'} it"
        if self.missing == "error":
            self.findings.problem(f"{lack}, and other files have it. --tensor-intersection leaves such tensors out, "
                                  "--tensor-union merges those that are there", name, kind="shape")
            return False
        if self.missing == "intersection":
            self.findings.remark(f"{lack}; left out", name)
            return False
        if baseless and self.method.needs_base:
            self.findings.problem(f"{lack}, so there is nothing to take the others' change from. --tensor-intersection leaves "
                                  "such tensors out", name, kind="shape")
            return False
        if not branches:
            self.findings.remark(f"carried over from the base {self.roles.base}, the only file that has it", name)
        elif self.config.method == "linear" and not self.values.normalizes(self.stretch.levels, name, 0.0):
            self.findings.remark(f"{lack}; without `normalize` it counts as zeros in the sum", name)
        elif len(branches) >= self.method.branches[0]:
            self.findings.remark(f"{lack}; merged over those that have it", name)
        return True

    def _buffer(self, name: str, everyone: Sequence[_Found]) -> Wanted | None:
        """What is not float32, float16 or bfloat16 is kept where all files have the same; the engine compares the bytes."""
        kinds = {(f.shape, f.dtype): f for f in everyone}
        odd = sorted({f.dtype for f in everyone if f.dtype not in ITEM_SIZES or f.dtype.startswith(("F64", "F8"))})
        if odd:
            self.findings.problem(f"{', '.join(odd)} cannot be merged. Save it in float32, bfloat16 or float16", name,
                                  kind="model")
        elif len(kinds) > 1:
            self.findings.problem("of " + ", of ".join(f"{dtype} {list(shape)} in {f.entry.model}"
                                                       for (shape, dtype), f in kinds.items())
                                  + "; only equal ones can be kept", name, kind="shape")
        else:
            return Wanted(name, everyone[0].shape, COPY, tuple(f.source for f in everyone), None, None, (), everyone[0].dtype)
        return None

    def _of_one_shape(self, name: str, branches: Sequence[_Found], base: _Found | None) -> list[_Found] | None:
        """The files whose tensor has the shape of the base's, or of the first; None after a problem."""
        reference, kept, fine = base or branches[0], list[_Found](), True
        for found in branches:
            if found.shape == reference.shape:
                kept.append(found)
            elif self.values.in_task_arithmetic and self.config.dialect == "mergekit":
                self.findings.remark(f"{found.entry.model} is left out: its shape is not the base's", name)
            else:
                fine = False
                self.findings.problem(f"tensor '{name}': {found.entry.model} has shape {list(found.shape)}, "
                                      f"{reference.entry.model} has {list(reference.shape)}", kind="shape")
        return kept if fine else None


def _carried(name: str, found: _Found, dtype: str) -> Wanted:
    """A tensor as it stands, or rounded to another dtype."""
    plain = found.dtype == dtype
    return Wanted(name, found.shape, COPY if plain else "passthrough", (found.source,), None, None,
                  () if plain else (("scale", 1.0),), dtype)


def _prepared(config: Path | str | Mapping[str, Any], missing: Missing, options: Options, allow_unknown_keys: bool,
              one_file: bool) -> tuple[Prepared, dict[str, Any]]:
    """The merge, checked, and the manifest's fields that say what was asked for."""
    text = text_of(config)
    read = _read(config, text, allow_unknown_keys)
    opened = _opened(read, options.allow_pickle)
    planner = _Planner(read, opened, missing)
    wanted, fisher = planner.wanted(), planner.fisher()
    plan = lay_out(wanted, 1 << 62 if one_file else options.max_shard_size)
    inputs = tuple(Input(str(model), Path(model.path).parent, local=False) for model in read.models)
    merge = Merge(inputs, tuple(opened), plan, options.seed, fisher={i: Checkpoint.of_file(p) for i, p in fisher.items()},
                  companions={i: (path,) for i, path in fisher.items()})
    files: dict[str, Path | bytes] = {CONFIG: text.encode()}
    if plan.index is not None:
        files[plan.index_file] = plan.index
    names = {spelling: name for name, spelling in DTYPES.items()}
    dtype = ", ".join(sorted({names.get(step.wanted.dtype, step.wanted.dtype) for step in plan.steps}))
    methods = sorted({step.wanted.method for step in plan.steps if step.merged})
    recorded = {"method": ", ".join(methods) or "copy", "verb": "tensors", "seed": options.seed, "dtype": dtype,
                "settings": {"config": text, "missing": missing}}
    return Prepared(merge, files, tuple(dict.fromkeys([*read.warnings, *planner.findings.remarks()])), dtype), recorded


# -------------------------------------------------------------------------------------------------------------- writing


def _is_file(out: Path | str) -> bool:
    return Path(out).suffix == ONE_FILE


def _place(out: Path | str, merge: Merge) -> Path:
    place = place_for(out)
    if used := [one.label for one, opened in zip(merge.inputs, merge.opened, strict=True)
                if place in (opened.folder.resolve(), *_files(opened))]:
        raise OutputError(f"{place} is, or holds, one of the files to be merged ({used[0]}). Choose another output.")
    return place


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    yield from {(checkpoint.folder / info.file).resolve() for info in checkpoint.tensors.values()}


def _folder(place: Path) -> Path:
    """Where a merge is made: a single file in a folder of its own, out of which it is taken at the end."""
    return place.with_name(f".{place.name}.made") if _is_file(place) else place


def _beside(place: Path) -> Path:
    """The manifest of a single file."""
    return place.with_name(f"{place.name}.{MANIFEST}")


def _there(place: Path, merge: Merge, recorded: Mapping[str, Any]) -> MergeManifest | None:
    """The manifest of what stands at `place`, if it is this very merge; None if the place is free. Raises OutputError."""
    finished = _file_there(place, recorded) if _is_file(place) else already_there(place, recorded, merge.plan)
    if finished is not None and (changed := _changed(finished, merge)):
        raise OutputError.of(f"{place} holds a merge of this config, but of other tensors. Choose another output, or remove "
                             "this one; nothing was changed.", changed)
    return finished


def _forget_another(folder: Path, merge: Merge, recorded: Mapping[str, Any]) -> None:
    """Remove what an earlier call finished there, and was killed before it took it out, where it is of something else."""
    try:
        made = MergeManifest.load(folder / MANIFEST)
    except CorruptedError:
        return
    if any(getattr(made, key) != value for key, value in recorded.items()) or _changed(made, merge):
        shutil.rmtree(folder)


def _changed(manifest: MergeManifest, merge: Merge) -> list[str]:
    found = {one.label: hashed for one, hashed in zip(merge.inputs, input_hashes(merge), strict=True)}
    return [f"input {one.label}: its tensors are not those that were merged" for one in manifest.inputs
            if found.get(one.label) != one.hash]


def _file_there(place: Path, recorded: Mapping[str, Any]) -> MergeManifest | None:
    if not os.path.lexists(place):
        return None
    remedy = "Choose another output, or, if it is not needed, remove it; nothing was changed."
    try:
        manifest = MergeManifest.load(_beside(place))
        there = Checkpoint.of_file(place)
    except (CorruptedError, OSError) as error:
        raise OutputError(f"{place} is already there, and no readable {_beside(place).name} says what it is. {remedy}"
                          ) from error
    if any(getattr(manifest, key) != value for key, value in recorded.items()) or (
            {name: hash_of(there, name) for name in there.tensors} != manifest.tensors):
        raise OutputError(f"{place} already holds another or a damaged merge. {remedy}")
    return manifest


def _taken_out(folder: Path, place: Path) -> MergeManifest:
    """The single weight file of a finished folder under its own name, with its manifest beside it."""
    manifest = MergeManifest.load(folder / MANIFEST)
    if os.path.lexists(place):
        raise OutputError(f"{place}: has appeared while this merge was made. The finished merge stays in {folder}: move one of "
                          "the two away, and run the same command again.")
    try:
        write_atomically(_beside(place), (folder / MANIFEST).read_bytes())
        os.replace(folder / f"model{ONE_FILE}", place)
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"{place}: cannot be written ({error.strerror}).") from error
    return manifest
