"""The picture demo's material: a mixture with planted conflicts, a tiny vision-language base, and the recipe that joins them.

Each family of tasks (picture_tasks.py) comes in one of the layouts that people keep such data in:

    pictures/FAMILY/NUMBER.png                   of the families whose rows name their pictures
    llava/UNIT.json         count, colour        LLaVA: `image`, and <image> in the first of `conversations`
    flan.json               place, many          Vision-FLAN: the same, all units in one file, `task_name` tells which
    messages/UNIT.jsonl     read, end            `messages` whose content is in parts, a picture's with its path
    parquet/UNIT.parquet    list, tell           `prompt`, `completion`, `images` with the bytes
    zipped/UNIT.zip         into                 rows and pictures in one file
    text/UNIT.jsonl         kind                 no pictures at all
    transfer/UNIT.parquet, .jsonl                tasks that nobody trains on
    retention.jsonl                              plain text that the base can model
    base/                                        tokenizer, processor and model (vision_model.py)
    recipe.yaml                                  written last, for people to read and change

(held-out rows likewise, as UNIT.heldout.json and so on)
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anabranch.artifacts import write_atomically
from anabranch.demo import claim, tasks
from anabranch.demo.picture_tasks import (
    CONFLICTING_PAIRS,
    HELD_OUT_ROWS,
    RETENTION_ROWS,
    TASKS,
    TRANSFER,
    taken_inputs,
    transfer_rows,
    unit_rows,
)
from anabranch.demo.pictures import SIDE, png
from anabranch.demo.tasks import Row

__all__ = ["CONFLICTING_PAIRS", "make_picture_demo"]

PARTS = ("pictures", "llava", "flan.json", "messages", "parquet", "zipped", "text", "transfer", "retention.jsonl", "base",
         "recipe.yaml")
LAYOUTS = {"count": "llava", "colour": "llava", "place": "flan", "many": "flan", "read": "messages", "end": "messages",
           "list": "parquet", "tell": "parquet", "into": "zipped", "kind": "text"}
ENDINGS = {"llava": "json", "flan": "json", "messages": "jsonl", "parquet": "parquet", "zipped": "zip", "text": "jsonl"}
TELLS = {"llava": "LLaVA: an `image` path, and <image> in the text",
         "flan": "Vision-FLAN: all units in one file, a column names them",
         "messages": "messages in parts: a picture, then text", "parquet": "Parquet: an `images` column that holds the bytes",
         "zipped": "a zip of rows and pictures", "text": "no pictures: batches may mix"}

RECIPE = """\
# The picture demo: {units} small tasks, most of them about pictures, some of which ask the same but for one word and want
# another answer, and a LLaVA-type base of 370,000 parameters. `anabranch run recipe.yaml` does it all. Paths are relative to
# this file.

model:
  path: ./base                     # every branch starts from it; its processor is used as it is
  freeze: [vision tower, projector]   # as in MERIT: only the language model trains. What that is here is told before training

mixture:
  epochs: 2                        # passes over each unit
  max_length: 96                   # tokens, those of images included; longer rows would be left out and named (there are none)
  images:
    max_pixels: {side}x{side}              # larger ones would be scaled down (there are none); the paper: 784x784
  sources:                         # their held-out rows are never trained or calibrated on
{sources}

gradients:
  calibration_samples: 120         # all training rows of a unit

split:
  method: merit                    # random, stratified, conflict_greedy, kmeans, joint, soup
  groups: 4                        # K: as many branches

train:                             # arguments of trl.SFTConfig, by their own names
  learning_rate: 1.0e-3            # high, as the model is small: one of 3B parameters wants 1e-5 or so
  per_device_train_batch_size: 16
  lr_scheduler_type: cosine
  logging_steps: 5

evaluate:
  max_samples: {held_out}                  # all held-out rows of a unit
  transfer:                        # tasks that nobody trains on; the base can do them
    - path: ./transfer/*.parquet
    - path: ./transfer/*.jsonl
  retention:                       # plain text like the base's own
    - {{path: ./retention.jsonl, format: text}}

launch:
  max_parallel: 2                  # branches that train at the same time on this machine

output: run
seed: {seed}
"""


def make_picture_demo(folder: Path, *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
                      base_steps: int | None = None) -> Path:
    """Write pictures and rows, prepare the base, write the recipe. Finished parts are kept, so a second call goes on.

    Args:
        folder: made if missing.
        seed: of the rows, the base and the recipe.
        progress: called with (what is being made, done, all).
        base_steps: training steps of the base, and of its vision tower; None: as many as make a good one in two minutes.
    Returns:
        The recipe's path.
    Raises:
        OutputError: `folder` cannot be written, or holds another demo or files that are not a demo's.
    """
    claim(folder, {"vision": True, "seed": seed, "base_steps": base_steps}, PARTS)
    files = _files(seed)
    for i, (name, content) in enumerate(files.items()):
        if not (folder / name).exists():
            write_atomically(folder / name, content())
        if progress is not None:
            progress("pictures and rows", i + 1, len(files))
    if not (folder / "base").exists():
        from anabranch.demo.vision_model import BASE_STEPS, TOWER_STEPS, prepare_base  # imports torch: seconds

        prepare_base(folder / "base", seed=seed, taken=taken_inputs(seed), steps=base_steps or BASE_STEPS,
                     tower_steps=base_steps or TOWER_STEPS, held_out_text=set(_retained(seed)), progress=progress)
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        write_atomically(recipe, recipe_text(seed).encode())
    return recipe


def recipe_text(seed: int) -> str:
    """The demo's recipe, commented."""
    lines: list[str] = []
    for layout, tells in TELLS.items():
        lines.append(f"    # {tells}")
        if layout == "flan":
            lines.append("    - {path: ./flan.json, held_out: ./flan.heldout.json, unit_column: task_name, images: ./pictures}")
            continue
        ending, more = ENDINGS[layout], ", images: ./pictures" if layout in ("llava", "messages") else ""
        lines += [f"    - {{path: ./{layout}/{unit}.{ending}, held_out: ./{layout}/{unit}.heldout.{ending}{more}}}"
                  for unit in _units(layout)]
    return RECIPE.format(units=len(TASKS), sources="\n".join(lines), seed=seed, held_out=HELD_OUT_ROWS, side=SIDE)


def _units(layout: str) -> list[str]:
    """The units that come in a layout, in the order of their families."""
    return [unit for unit in TASKS if LAYOUTS[family_of(unit)] == layout]


def family_of(unit: str) -> str:
    return unit.split("_")[0]


def _retained(seed: int) -> list[str]:
    return tasks.stories(seed, "picture retention", RETENTION_ROWS)


def _files(seed: int) -> dict[str, Callable[[], bytes]]:
    """What to write where, and how its bytes are made."""
    files: dict[str, Callable[[], bytes]] = {}
    flan: list[list[Any]] = [[], []]
    for unit in TASKS:
        layout = LAYOUTS[family_of(unit)]
        splits = [_named(rows, family_of(unit), first) for rows, first in zip(unit_rows(unit, seed), (0, 10_000), strict=True)]
        if layout in ("llava", "flan", "messages"):
            files |= {f"pictures/{name}": _png(row) for rows in splits for name, row in rows}
        for rows, ending, together in zip(splits, ("", ".heldout"), flan, strict=True):
            if layout == "flan":
                together += _llava(rows, unit)
            else:
                files[f"{layout}/{unit}{ending}.{ENDINGS[layout]}"] = _writer(layout, unit, rows)
    files |= {f"flan{ending}.json": _json(rows) for rows, ending in zip(flan, ("", ".heldout"), strict=True)}
    for unit in TRANSFER:
        rows = _named(transfer_rows(unit, seed), unit, 0)
        layout = "parquet" if "picture" in rows[0][1] else "text"
        files[f"transfer/{unit}.{ENDINGS[layout]}"] = _writer(layout, unit, rows)
    return files | {"retention.jsonl": _lines({"text": text} for text in _retained(seed))}


NamedRows = list[tuple[str, Row]]  # a picture's path, and the row that shows it


def _named(rows: list[Row], family: str, first: int) -> NamedRows:
    """Rows of siblings show the same pictures, so they share files."""
    return [(f"{family}/{first + i:05}.png", row) for i, row in enumerate(rows)]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _writer(layout: str, unit: str, rows: NamedRows) -> Callable[[], bytes]:
    if layout == "llava":
        return _json(_llava(rows))
    if layout == "messages":
        return _lines({"messages": [{"role": "user", "content": [{"type": "image", "path": name},
                                                                 {"type": "text", "text": row["prompt"]}]},
                                    {"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]}]}
                      for name, row in rows)
    if layout == "parquet":
        return lambda: _parquet(rows)
    if layout == "zipped":
        return lambda: _zip(unit, rows)
    return _lines({"prompt": row["prompt"], "completion": row["completion"]} for _, row in rows)


def _llava(rows: NamedRows, task_name: str | None = None) -> list[dict[str, Any]]:
    named = {} if task_name is None else {"task_name": task_name}
    return [{"id": f"{task_name or ''}{i:05}", **named, "image": name,
             "conversations": [{"from": "human", "value": f"<image>\n{row['prompt']}"},
                               {"from": "gpt", "value": row["completion"]}]} for i, (name, row) in enumerate(rows)]


def _png(row: Row) -> Callable[[], bytes]:
    return lambda: png(row["picture"])


def _json(rows: list[dict[str, Any]]) -> Callable[[], bytes]:
    return lambda: (json.dumps(rows, indent=1) + "\n").encode()


def _lines(rows: Iterator[dict[str, Any]]) -> Callable[[], bytes]:
    return lambda: "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: NamedRows) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([
        {"prompt": row["prompt"], "completion": row["completion"], "images": [{"bytes": png(row["picture"]), "path": name}]}
        for name, row in rows])
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def _zip(unit: str, rows: NamedRows) -> bytes:
    """Rows as LLaVA's, and the pictures that they name. Stored, as PNG is packed already; no clock in the members' dates."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{unit}.json"), json.dumps(_llava(rows), indent=1) + "\n")
        for name, row in rows:
            archive.writestr(zipfile.ZipInfo(name), png(row["picture"]))
    return out.getvalue()
