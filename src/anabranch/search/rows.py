"""Rows that candidates are scored on, in two halves: one is searched, the other only told about at the end.

A row's half is decided by the hash of its prompt (of the whole row, for plain text): in each unit the lower half of the
hashes is searched. A guard row whose prompt is also among the searched rows of another unit is left out.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.artifacts import Mixture, digest
from anabranch.errors import CorruptedError, RecipeError
from anabranch.mixture import held_out_rows
from anabranch.mixture_summary import exclusion_lines
from anabranch.plan import load_plan
from anabranch.recipe import EvaluateSection, MixtureSection, Recipe, Source
from anabranch.recipe import Model as ModelSection
from anabranch.rows import Rows, load_unit
from anabranch.search.settings import DataSetting
from anabranch.vision import Vision


@dataclass(frozen=True)
class Halves:
    """Unit -> its rows. `dropped`: guard rows left out, as their prompts are searched elsewhere. `told`: for the user."""

    searched: Mapping[str, Rows]
    guard: Mapping[str, Rows]
    dropped: int
    told: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Of every token and mark, both halves."""
        return digest([[name, _rows_hash(self.searched[name]), _rows_hash(self.guard[name])] for name in sorted(self.searched)])


def read_halves(data: DataSetting, tokenizer: Any, folder: Path, vision: Vision | None = None) -> Halves:
    """All rows that a search file asks for, split.

    Args:
        tokenizer: of the merged model; tokens of a mixture are taken as they are.
        folder: of the search file, from which relative paths count after the working folder.
    Raises:
        RecipeError: no unit, patterns that fit none, no unit that can be split, a unit twice.
        MixtureError, CorruptedError: sources or mixtures that cannot be read.
    """
    units: dict[str, Rows] = {}
    told: list[str] = []
    if data.mixture is not None:
        units |= mixture_rows(mixture_folder(data.mixture, folder), data.places)
    if data.sources:
        read, lines = _source_rows(data, tokenizer, folder, vision)
        if twice := sorted(units.keys() & read.keys()):
            raise RecipeError(f"data: {', '.join(twice[:5])}: in the mixture and in `sources`. Set another `unit` there.")
        units |= read
        told += lines
    chosen = {name: rows for name, rows in sorted(units.items()) if any(fnmatch.fnmatchcase(name, p) for p in data.units)}
    idle = [p for p in data.units if not any(fnmatch.fnmatchcase(name, p) for name in units)]
    if idle:
        raise RecipeError(f"data.units: no unit fits {', '.join(idle)}. There are {', '.join(sorted(units)[:12])}"
                          f"{', ..' if len(units) > 12 else ''}.")
    return split(chosen, data.max_rows, told)


def split(units: Mapping[str, Rows], max_rows: int | None, told: Sequence[str] = ()) -> Halves:
    """Units that cannot be split are left out, and told. Raises RecipeError where none is left."""
    keys = {name: [_key(*rows.row(i), rows.pictures(i)) for i in range(len(rows))] for name, rows in units.items()}
    searched, guard, out = {}, {}, []
    for name in units:
        if len(set(keys[name])) < 2:
            out.append(f"left out: {name}: fewer than two different prompts, so no half can be kept from the search")
        else:
            searched[name], guard[name] = _sides(keys[name], max_rows)
    seen = {keys[name][i] for name, rows in searched.items() for i in rows}
    kept = {name: [i for i in rows if keys[name][i] not in seen] for name, rows in guard.items()}
    out += [f"left out: {name}: every prompt kept from the search stands among searched rows of other units"
            for name, rows in kept.items() if not rows]
    names = [name for name, rows in kept.items() if rows]
    if not names:
        raise RecipeError.of("data: no unit can be split into rows to search and rows to keep. Give more rows.", out[:12])
    return Halves({name: units[name].take(np.sort(np.array(searched[name]))) for name in names},
                  {name: units[name].take(np.sort(np.array(kept[name]))) for name in names},
                  sum(len(guard[name]) - len(kept[name]) for name in guard), (*told, *out))


def _sides(keys: Sequence[bytes], max_rows: int | None) -> tuple[list[int], list[int]]:
    """Numbers of the rows of either half: the lower hashes are searched. Equal prompts stay together, both halves get some."""
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    border = keys[order[(len(keys) + 1) // 2 - 1]]
    if border == keys[order[-1]]:
        border = max(key for key in keys if key < border)
    lower, upper = [i for i in order if keys[i] <= border], [i for i in order if keys[i] > border]
    return (lower, upper) if max_rows is None else (lower[: (max_rows + 1) // 2], upper[: max_rows // 2])


def _key(ids: np.ndarray, response: np.ndarray, pictures: bytes) -> bytes:
    """Equal for rows of equal prompt and images."""
    first = int(np.flatnonzero(response)[0]) if response.any() else len(ids)
    return hashlib.sha256(ids[: first if first > 1 else len(ids)].astype(np.int32).tobytes() + pictures).digest()


def _rows_hash(rows: Rows) -> str:
    whole = hashlib.sha256()
    for part in (rows.input_ids, rows.response, rows.offsets):
        whole.update(np.ascontiguousarray(part).tobytes())
    whole.update(rows.hash_of_images())
    return whole.hexdigest()


def mixture_folder(said: str, folder: Path) -> Path:
    """The mixture folder of a run, or itself. Raises RecipeError."""
    tried = [base / said for base in (Path.cwd(), folder)]
    for place in tried:
        for found in (place / "mixture", place):
            if (found / "mixture.json").is_file():
                return found.resolve()
    raise RecipeError(f"data.mixture: {said}: neither a run folder with mixture/mixture.json nor a mixture folder. Looked in "
                      f"{' and '.join(dict.fromkeys(str(p) for p in tried))}.")


def mixture_rows(folder: Path, places: Sequence[str]) -> dict[str, Rows]:
    """Held-out rows by unit; a retention unit that is called like another gets `retention/` before its name.

    Raises CorruptedError, and RecipeError where there is no row at all.
    """
    mixture = Mixture.load(folder / "mixture.json")
    found: dict[str, Rows] = {}
    for place in places:
        units = {"held_out": mixture.units, "transfer": mixture.transfer, "retention": mixture.retention}[place]
        for unit in units:
            if not (folder / unit.file).resolve().is_relative_to(folder.resolve()):
                raise CorruptedError(f"{folder / 'mixture.json'}: unit {unit.name!r} names a file outside of its folder.")
            rows = load_unit(folder / unit.file, "held_out")
            if len(rows):
                found[f"{place}/{unit.name}" if unit.name in found else unit.name] = rows
    if not found:
        raise RecipeError(f"data.mixture: {folder} has no held-out row at {', '.join(places)}.")
    return found


def _source_rows(data: DataSetting, tokenizer: Any, folder: Path,
                 vision: Vision | None) -> tuple[dict[str, Rows], list[str]]:
    sources = [_placed(source, folder) for source in data.sources]
    held = data.max_rows * 4 if data.max_rows else None  # enough to find different prompts among
    recipe = Recipe(model=ModelSection(path="."), output=Path.cwd() / "searched", evaluate=EvaluateSection(transfer=sources),
                    mixture=MixtureSection(sources=sources, max_length=data.max_length, max_held_out=held,
                                           chat_template=data.chat_template))
    rows, excluded = held_out_rows(recipe, tokenizer, vision=vision)
    return rows, [f"left out: {line}" for line in exclusion_lines([e for e in excluded if e.rule != "max_samples"])]


def _placed(source: Source, folder: Path) -> Source:
    beside = folder / source.path
    here = Path(source.path).exists() or not (beside.exists() or any(c in source.path for c in "*?["))
    return source if here else source.model_copy(update={"path": str(beside)})


def run_weights(mixture: Path) -> dict[Path, float]:
    """Model folders of the branches of the run that a mixture belongs to -> their weights w_k; empty where there is no plan."""
    run = mixture.parent
    if not (run / "plan.json").is_file():
        return {}
    plan, _ = load_plan(run / "plan.json", Mixture.load(mixture / "mixture.json"))
    return {(run / "branches" / str(group.group) / "model").resolve(): group.weight for group in plan.groups}
