"""Rows that models are measured on: a few of each task, read as any other data and tokenised by the base's tokenizer.

Calibration rows should not be the rows on which merges are scored later: a predictor would then have seen, through the
metrics, what it is asked to foretell. Give training-side rows, or rows kept for this alone.

Rows that are tokens already (`input_ids` and `response`, 1 where the loss is taken) are taken as they are: what `collect` sets
aside. They must be of the base's own tokenizer. Their `images` are [file, number] each: a unit's file of images in the folder
of the rows, or below it, and the number of the image there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.artifacts import Exclusion
from anabranch.errors import AnabranchError, MixtureError, closest
from anabranch.images import BadImage, image_size
from anabranch.mixture import held_out_rows
from anabranch.mixture_summary import exclusion_lines
from anabranch.model import load_tokenizer
from anabranch.recipe import EvaluateSection, MixtureSection, Recipe, Source
from anabranch.recipe import Model as ModelSection
from anabranch.rows import RowImages, Rows, StoredImage, generator, read_image
from anabranch.sources import Located, detect_format, is_hub_id, locate, read_rows
from anabranch.vision import Vision, load_vision

TASK = "task"
TOKENS = {"input_ids", "response"}
MOST = 2**31 - 1  # the largest number of a token that rows hold
TOO_DEEP = ("a row's lists or objects are nested too deep to be read (a thousand levels or so). Rows hold text and turns of "
            "chats; mend the file or give another.")
NO_RESPONSES = ("Scores and gradients are of the loss on responses; without responses only `--only weights,activations` can be "
                "measured.")


def named(entry: str) -> tuple[str | None, str]:
    """'NAME=PATH' -> (NAME, PATH); a path alone, also one that holds '=', -> (None, path)."""
    name, equals, path = entry.partition("=")
    if not equals or "/" in name or Path(entry).exists():
        return None, entry
    return name.strip(), path


def data_files(data: Sequence[str]) -> list[Path]:
    """The files behind the entries; of what cannot be found, none."""
    found = []
    for _, path in map(named, data):
        if Path(path).exists() or not is_hub_id(path):  # nothing is fetched
            with suppress(MixtureError):  # reading them tells
                found += [file for _, file in locate(path, Source(path=path), "train", Path.cwd()).files]
    return found


def read_calibration(data: Sequence[str], tasks: Sequence[str], base: Path, *, samples: int, seed: int, labels: bool = True,
                     max_length: int = 1024, tell: Callable[[str], None] = lambda _: None) -> dict[str, Rows]:
    """`samples` rows of each task, drawn by seed and the task's name; in the order of `tasks`.

    Args:
        data: 'NAME=FILE', rows of task NAME; or 'FILE', whose rows say their task in a field `task`. Files, folders, globs
            and Hub datasets, in every format that a recipe's sources may have.
        labels: whether responses are needed. Without, rows that have a `prompt` or a `text` alone are read as plain text.
        max_length: tokens; longer rows are left out, and told.
    Raises:
        MixtureError: what cannot be read, has no usable row, no response, a task that no model has, or a model
            without rows; all in one message.
    """
    problems, sources, texts, rows = [], [], [], {}
    for entry in data:
        try:
            found, have = _locate(entry, tasks)
            if have >= TOKENS:
                for task, some in _tokenised(entry, found, samples, seed, max_length, tell, load_vision(base)).items():
                    if task in rows:
                        raise MixtureError(f"rows of {task!r} stand in another of the --data as well; give each task once.")
                    rows[task] = some
            else:
                sources.append(_source(entry, have, labels))
                texts.append(entry)
        except MixtureError as error:
            problems.append(f"--data {entry}: {error}")
        except RecursionError:
            problems.append(f"--data {entry}: {TOO_DEEP}")
    if problems:
        raise MixtureError.of("the calibration rows cannot be read:", problems)
    excluded: list[Exclusion] = []
    if sources:
        read, excluded = _read(sources, texts, base, samples, seed, max_length)
        problems += [f"rows of {task!r} stand in two of the --data; give each task once." for task in rows.keys() & read.keys()]
        rows |= read
    for line in exclusion_lines([e for e in excluded if e.rule != "max_samples"]):
        tell(f"left out: {line}")
    without = [task for task in tasks if task not in rows]
    problems += [f"rows of the task {task!r}, and no model is called so.{closest(task, tasks)}" for task in rows
                if task not in tasks]
    problems += [f"model {task!r} has no calibration row." for task in without]
    if problems:
        reasons = exclusion_lines([e for e in excluded if e.unit in without])
        raise MixtureError.of("models and calibration rows do not match:", problems + [f"left out: {r}" for r in reasons])
    for task in tasks:
        if len(rows[task]) < samples:
            tell(f"{task}: {len(rows[task])} calibration {'row' if len(rows[task]) == 1 else 'rows'}, of {samples} asked for")
    return {task: rows[task] for task in tasks}


def _read(sources: list[Source], texts: list[str], base: Path, samples: int, seed: int,
          max_length: int) -> tuple[dict[str, Rows], list[Exclusion]]:
    """Rows by task, and what was left out, as the mixture stage reads held-out rows. `texts`: the sources as given."""
    mixture = MixtureSection(sources=sources, max_length=max_length, max_held_out=samples)
    recipe = Recipe(model=ModelSection(path=str(base)), evaluate=EvaluateSection(transfer=sources), seed=seed, mixture=mixture,
                    output=Path.cwd() / "measured")
    try:
        return held_out_rows(recipe, load_tokenizer(base), vision=load_vision(base))
    except MixtureError as error:
        raise MixtureError(_in_our_words(str(error), texts)) from error
    except RecursionError as error:
        raise MixtureError(f"--data {', '.join(texts)}: {TOO_DEEP}") from error


def _locate(entry: str, tasks: Sequence[str]) -> tuple[Located, set[str]]:
    """Where an entry's rows lie, and their columns. Raises MixtureError."""
    name, path = named(entry)
    if name is not None and name not in tasks:
        raise MixtureError(f"no model is called {name!r}.{closest(name, tasks)}")
    found = locate(path, Source(path=path), "train", Path.cwd())
    have = _columns(found)
    if name is None and have and TASK not in have:
        raise MixtureError(f"its rows have no field `{TASK}` that says whose they are (found: {', '.join(sorted(have))}). Add "
                           "it, or give NAME=FILE with the name of a model.")
    return found, have


def _source(entry: str, have: set[str], labels: bool) -> Source:
    """An entry as a source, and as what its rows are read. Raises MixtureError where they have no responses."""
    name, path = named(entry)
    whose: dict[str, Any] = {"unit": name} if name is not None else {"unit_column": TASK}
    path = str(Path(path).resolve()) if Path(path).exists() else path
    try:
        detect_format(have, {}, "auto")
    except MixtureError as error:
        alone = next((column for column in ("text", "prompt") if column in have), None)
        if alone is None:
            raise
        if labels:
            raise MixtureError(f"its rows have no responses. {NO_RESPONSES} {error}") from error
        return Source(path=path, format="text", columns={} if alone == "text" else {"text": alone}, **whose)
    return Source(path=path, **whose)


def token_lines(rows: Mapping[str, Rows], folder: Path) -> Iterator[str]:
    """Rows of each task as lines of JSON that `read_calibration` takes from a file in `folder`, beside their images."""
    for task, of in rows.items():
        for i in range(len(of)):
            ids, mask = of.row(i)
            line = {"task": task, "input_ids": ids.tolist(), "response": mask.tolist()}
            shown = of.images.of(i) if of.images is not None else None
            images = {} if shown is None else {"images": [[str(s.file.relative_to(folder)), s.number] for s in shown]}
            yield json.dumps(line | images)


def _tokenised(entry: str, found: Located, samples: int, seed: int, max_length: int, tell: Callable[[str], None],
               vision: Vision | None) -> dict[str, Rows]:
    """Rows that are tokens already, drawn as the others are. Raises MixtureError naming the first that is not right."""
    name, _ = named(entry)
    pools: dict[str, list[tuple[list[int], list[int], tuple[StoredImage, ...] | None]]] = {}
    for where, folder, row in _raw(found):
        ids, mask, task = row.get("input_ids"), row.get("response"), name or row.get(TASK)
        if not (isinstance(task, str) and isinstance(ids, list) and isinstance(mask, list) and len(ids) == len(mask)
                and all(type(i) is int and 0 <= i <= MOST for i in ids) and all(m in (0, 1) for m in mask) and any(mask[1:])):
            raise MixtureError(f"{where}: wanted `input_ids` and `response`, two lists of one length: token numbers from 0 to "
                               f"{MOST:,}, and a 1 where the loss is taken, behind the first token"
                               f"{'' if name else f'; and a `{TASK}`'}.")
        try:
            pools.setdefault(task, []).append((ids, mask, _shown(row, folder, vision)))
        except (AnabranchError, BadImage, ValueError) as error:
            raise MixtureError(f"{where}: {error}") from error
    rows = {}
    for task, pool in pools.items():
        short = [row for row in pool if len(row[0]) <= max_length]
        if len(short) < len(pool):
            tell(f"left out: {task}: {len(pool) - len(short)} rows, over_long: max_length is {max_length:,}")
        if short:
            order = generator(seed, "max_held_out", task).permutation(len(short))[:samples]
            drawn = [short[i] for i in np.sort(order)]
            rows[task] = replace(Rows.of([row[:2] for row in drawn]), images=_row_images([row[2] for row in drawn]))
    return rows


def _shown(row: Mapping[str, Any], folder: Path | None, vision: Vision | None) -> tuple[StoredImage, ...] | None:
    """The images of a row of tokens; None where it says nothing of images. Raises ValueError where its tokens show others."""
    given = row.get("images")
    shown = []
    for one in given if isinstance(given, list) else [given] if given is not None else []:
        if not (isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and type(one[1]) is int and one[1] >= 0):
            raise ValueError(f"`images` holds {json.dumps(one, default=str)[:80]}: wanted [file, number] of each.")
        home = folder.resolve() if folder is not None else Path()
        file = (home / one[0]).resolve()
        if folder is None or not file.is_relative_to(home) or not file.is_file():
            raise ValueError(f"its images should lie in {one[0]!r}, in the folder of the rows, and there is no such file. "
                             "A table's rows belong together with the folder `calibration` beside them.")
        shown.append(StoredImage(file, one[1]))
    there = sum(token in vision.image_ids for token in row["input_ids"]) if vision is not None else 0
    wanted = sum(map(vision.image_tokens, (image_size(read_image(image)) for image in shown))) if vision is not None else 0
    if there != wanted or (shown and vision is None):
        raise ValueError(f"its tokens hold {there:,} of images, and its {len(shown)} images are {wanted:,} for this base.")
    return tuple(shown) if given is not None else None


def _row_images(shown: Sequence[tuple[StoredImage, ...] | None]) -> RowImages | None:
    if all(row is None for row in shown):
        return None
    every = [image for row in shown for image in row or ()]
    files = {file: i for i, file in enumerate(dict.fromkeys(image.file for image in every))}
    return RowImages(tuple(files), np.array([files[image.file] for image in every], np.int32),
                     np.array([image.number for image in every], np.int32),
                     np.concatenate([[0], np.cumsum([len(row or ()) for row in shown])]).astype(np.int64))


def _raw(found: Located) -> Iterator[tuple[str, Path | None, dict[str, Any]]]:
    """Where a row stands, the folder of its file, and the row."""
    if found.dataset is not None:
        yield from ((f"{found.name}:{i}", None, row) for i, row in enumerate(found.dataset, 1))
    for label, path in found.files:
        yield from ((f"{label}:{number}", path.parent, row) for number, row in read_rows(path))


def _columns(found: Located) -> set[str]:
    """Of the first row of each file."""
    if found.dataset is not None:
        return set(found.dataset.column_names)
    return {column for _, path in found.files for _, row in [next(read_rows(path), (0, {}))] for column in row}


def _in_our_words(message: str, data: Sequence[str]) -> str:
    """The message as one about --data: the reader speaks of a recipe's sections."""
    for i in reversed(range(len(data))):
        message = message.replace(f"evaluate.transfer[{i}]", f"--data {data[i]}")
    message = message.replace("the mixture cannot be read", "the calibration rows cannot be read")
    return message + (f"\n  - {NO_RESPONSES}" if "empty_response" in message else "")
