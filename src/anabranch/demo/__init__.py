"""The demo's material: a mixture with planted conflicts, a tiny base, and the recipe that joins them.

    data/UNIT.jsonl  data/UNIT.heldout.jsonl    prompt/completion rows of each task of the mixture (tasks.py)
    transfer/UNIT.jsonl                         tasks that nobody trains on
    retention.jsonl                             plain text that the base can model
    base/                                       tokenizer and model (model.py)
    recipe.yaml                                 written last, for people to read and change
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from anabranch.artifacts import write_atomically
from anabranch.demo.tasks import (
    CONFLICTING_PAIRS,
    HELD_OUT_ROWS,
    RETENTION_ROWS,
    TASKS,
    TRANSFER,
    Row,
    stories,
    taken_inputs,
    transfer_rows,
    unit_rows,
)
from anabranch.errors import OutputError

__all__ = ["CONFLICTING_PAIRS", "make_demo"]

MARK = "demo.json"
PARTS = ("data", "transfer", "retention.jsonl", "base", "recipe.yaml")

RECIPE = """\
# The demo: {units} small tasks, some of which ask the same but for one word and want another answer, and a base of 280,000
# parameters. `anabranch run recipe.yaml` does it all. Paths are relative to this file; docs and defaults: `anabranch init`.

model:
  path: ./base                     # every branch starts from it

mixture:
  epochs: 2                        # passes over each unit
  max_length: 64                   # tokens; longer rows would be left out and named (there are none)
  sources:                         # one unit each; its held-out rows are never trained or calibrated on
{sources}

gradients:
  calibration_samples: 150         # all training rows of a unit

split:
  method: merit                    # random, stratified, conflict_greedy, kmeans, joint, soup
  groups: 4                        # K: as many branches

train:                             # arguments of trl.SFTConfig, by their own names
  learning_rate: 1.0e-3            # high, as the model is small: one of 1B parameters wants 1e-5 or so
  per_device_train_batch_size: 16
  lr_scheduler_type: cosine
  logging_steps: 5

evaluate:
  max_samples: {held_out}                  # all held-out rows of a unit
  transfer:                        # tasks that nobody trains on; the base can do them
    - path: ./transfer/*.jsonl
  retention:                       # plain text like the base's own
    - {{path: ./retention.jsonl, format: text}}

launch:
  max_parallel: 2                  # branches that train at the same time on this machine

output: run
seed: {seed}
"""


def make_demo(folder: Path, *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
              base_steps: int | None = None) -> Path:
    """Write the mixture, prepare the base, write the recipe. Finished parts are kept, so a second call goes on.

    Args:
        folder: made if missing.
        seed: of the rows, the base and the recipe.
        progress: called with (what is being made, done, all).
        base_steps: training steps of the base; None: as many as make a good one in about a minute.
    Returns:
        The recipe's path.
    Raises:
        OutputError: `folder` cannot be written, or holds another demo or files that are not a demo's.
    """
    claim(folder, {"seed": seed, "base_steps": base_steps}, PARTS)
    files = _rows_by_file(seed)
    for i, (name, rows) in enumerate(files.items()):
        if not (folder / name).exists():
            write_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in rows).encode())
        if progress is not None:
            progress("rows", i + 1, len(files))
    if not (folder / "base").exists():
        from anabranch.demo.model import BASE_STEPS, prepare_base  # imports torch: seconds

        prepare_base(folder / "base", seed=seed, taken=taken_inputs(seed), steps=base_steps or BASE_STEPS,
                     held_out_text={row["text"] for row in files["retention.jsonl"]}, progress=progress)
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        write_atomically(recipe, recipe_text(seed).encode())
    return recipe


def recipe_text(seed: int) -> str:
    """The demo's recipe, commented."""
    width = max(map(len, TASKS))
    sources = (f"    - {{path: ./data/{name}.jsonl, {' ' * (width - len(name))}held_out: ./data/{name}.heldout.jsonl}}"
               for name in sorted(TASKS))
    return RECIPE.format(units=len(TASKS), sources="\n".join(sources), seed=seed, held_out=HELD_OUT_ROWS)


def _rows_by_file(seed: int) -> dict[str, list[Row]]:
    files = {}
    for name in TASKS:
        files[f"data/{name}.jsonl"], files[f"data/{name}.heldout.jsonl"] = unit_rows(name, seed)
    for name in TRANSFER:
        files[f"transfer/{name}.jsonl"] = transfer_rows(name, seed)
    return files | {"retention.jsonl": [{"text": text} for text in stories(seed, "retention", RETENTION_ROWS)]}


def claim(folder: Path, wanted: dict[str, int | None], parts: Sequence[str]) -> None:
    """Mark the folder as this demo's, or refuse it: parts of two demos must not mix."""
    mark = folder / MARK
    if mark.exists():
        found = mark.read_text()
        if found != json.dumps(wanted) + "\n":
            raise OutputError(f"{folder}: holds a demo made with {found.strip()}, wanted {json.dumps(wanted)}. "
                              "Give another folder, or delete this one.")
        return
    if there := [name for name in parts if (folder / name).exists()]:
        raise OutputError(f"{folder}: has {', '.join(there)} already, and no {MARK}, so it is not a demo's folder. "
                          "Give an empty or new one.")
    write_atomically(mark, (json.dumps(wanted) + "\n").encode())
