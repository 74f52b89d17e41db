"""The branches of a plan as folders that another trainer runs, anywhere (`anabranch export recipe.yaml DIR --trainer X`).

    DIR/README.md          what to do
    DIR/branch-K/          job.json (what it is a branch of), run.sh, README.md, and

        trl                data.parquet    config.json  train.py
        axolotl            data.parquet    config.yaml
        llamafactory       data/           config.yaml
        command            data.jsonl      settings.json

Each trains on the very rows, tokens and masks of our own branch, for as many steps; `model/` is where it leaves its model.
"""

from __future__ import annotations

import json
import shlex
import shutil
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from anabranch.artifacts import Mixture, Plan, write_atomically
from anabranch.branches import (
    branch_inputs,
    branch_rows,
    branch_samples,
    branch_steps,
    check_train_section,
    planned_budget,
    train_settings,
    trainer_arguments,
)
from anabranch.errors import ModelError, OutputError
from anabranch.families import adapter_arguments, freezes, skeleton
from anabranch.model import select_trainable
from anabranch.plan import load_plan
from anabranch.recipe import Model as ModelSection
from anabranch.trainers.axolotl import axolotl_config
from anabranch.trainers.command import PLACE, check_command, job_settings, refuse_images, write_rows
from anabranch.trainers.llamafactory import llamafactory_config
from anabranch.trainers.translation import BranchJob
from anabranch.vision import model_class

if TYPE_CHECKING:
    from anabranch.run import Run

TRAINERS = ("trl", "axolotl", "llamafactory", "command")
START = {"trl": "python train.py", "axolotl": "axolotl train config.yaml", "llamafactory": "llamafactory-cli train config.yaml"}
NOTES = {
    "trl": ["`train.py` needs torch, transformers, trl, datasets (peft for LoRA), and is the branch as Anabranch trains it.",
            "`BASE_MODEL=/path/to/base ./run.sh` takes the base from somewhere else."],
    "axolotl": ["Written for axolotl 0.19. Whole weights train in float32: axolotl's `bf16: true` would keep the weights "
                "themselves in bfloat16, and most small steps would be rounded away.",
                "A single warmup step becomes two there.",
                "`base_model` in config.yaml says where the base is; change it if it lies elsewhere."],
    "llamafactory": ["Written for LLaMA-Factory 0.9.5. Under `bf16: true` it rounds the base to bfloat16 when it loads it.",
                     "`model_name_or_path` in config.yaml says where the base is; change it if it lies elsewhere."],
    "command": ["settings.json says all that a program needs: base, rows, hyperparameters, budget, where to leave the model.",
                "Weights in float32, safetensors; or a LoRA adapter, which is folded when it is taken in."]}


def write_job_files(run: Run, out: Path, trainer: str) -> list[Path]:
    """Write one folder for each branch of the run's plan; returns them.

    Args:
        trainer: one of TRAINERS.
    Raises:
        OutputError: `out` has other files in it.
        RecipeError: a setting that this trainer does not have, or rows with images (nothing is written then).
        PlanError, ProvenanceError, CorruptedError: no plan, or not of this mixture.
    """
    mixture = run.mixture
    plan, _ = load_plan(run.folder / "plan.json", mixture)
    check_train_section(run.recipe)
    refuse_images(mixture, f"export --trainer {trainer}")
    if run.recipe.trainer.kind == "command":
        check_command(run.recipe)
    if out.exists() and (not out.is_dir() or {p.name.split("-")[0] for p in out.iterdir()} - {"README.md", "branch"}):
        raise OutputError(f"{out}: has other files in it. Give a new or an empty folder.")
    jobs = [branch_job(run, plan, mixture, group.group) for group in plan.groups]
    configs = [_config(job, trainer) for job in jobs]  # before anything is written: it may refuse
    folders = []
    for job, config in zip(jobs, configs, strict=True):
        folder = out / f"branch-{job.branch}"
        if (folder / "model").exists():
            raise OutputError(f"{folder / 'model'}: a trained model lies there. Take it in (anabranch add-branch {run.folder} "
                              f"{job.branch} {folder / 'model'}) or move it away first.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write_branch(run, plan, mixture, job, config, trainer, folder)
        folders.append(folder)
    write_atomically(out / "README.md", _readme(run, jobs, trainer, out).encode())
    return folders


def branch_job(run: Run, plan: Plan, mixture: Mixture, branch: int) -> BranchJob:
    """What a trainer is told of a branch."""
    recipe = run.recipe
    samples = branch_samples(plan, branch, mixture, run.folder / "mixture", recipe.seed)
    rows = sum(len(chosen) for _, _, chosen in samples)
    local = Path(recipe.model.path).is_dir()
    return BranchJob(
        branch=branch, base=str(run.base.absolute()) if local else recipe.model.path,
        revision=None if local else recipe.model.revision, seed=plan.seed, rows=rows,
        tokens=planned_budget(recipe, samples)[1], steps=branch_steps(recipe, rows), max_length=recipe.mixture.max_length,
        settings=train_settings(recipe), model=_section(run), trainable=_trainable(run),
        made_from=branch_inputs(recipe, plan, branch, run.base_hash))


def _section(run: Run) -> ModelSection:
    """The recipe's `model`; adapters say themselves which frozen layers they keep off."""
    section = run.recipe.model
    if section.lora is None or not section.freeze:
        return section
    return section.model_copy(update={"lora": adapter_arguments(_modules(run), section), "freeze": []})


def _trainable(run: Run) -> tuple[str, ...] | None:
    """Names of the parameters that train, where that is not all."""
    section = run.recipe.model
    if section.lora is not None or not freezes(section):
        return None
    return tuple(select_trainable(_modules(run), section))


def _modules(run: Run) -> Any:
    model = skeleton(run.base, run.recipe.model.trust_remote_code)
    if model is None:
        raise ModelError(f"{run.base}: transformers cannot build this architecture without its weights, so `model.trainable` "
                         "and `model.freeze` cannot be turned into names.")
    return model


def _config(job: BranchJob, trainer: str) -> dict[str, Any]:
    if trainer == "axolotl":
        return axolotl_config(job, "./data.parquet", "./model", job.base)
    if trainer == "llamafactory":
        return llamafactory_config(job, "./data", "./model", job.base)
    return {}


def _write_branch(run: Run, plan: Plan, mixture: Mixture, job: BranchJob, config: dict[str, Any], trainer: str,
                  folder: Path) -> None:
    samples = branch_samples(plan, job.branch, mixture, run.folder / "mixture", run.recipe.seed)
    rows = list(branch_rows(samples, plan.seed, job.branch))
    start = START.get(trainer, "")
    if trainer == "trl":
        config = {"base": job.base, "class": model_class(run.base).__name__, "revision": job.revision,
                  "trust_remote_code": job.model.trust_remote_code,
                  "trainable": list(job.trainable or ("*",)), "lora": job.model.lora,
                  # two: its own trainer removes the old one before anybody knows that the new one is whole
                  "arguments": trainer_arguments(run.recipe, plan.seed) | {"save_total_limit": 2}}
        write_atomically(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())
        source = resources.files("anabranch.trainers").joinpath("trl_job.py").read_text(encoding="utf-8")
        write_atomically(folder / "train.py", source.encode())
        _dataset(rows, masks=False).to_parquet(str(folder / "data.parquet"))
    elif trainer == "command":
        start = _command(run, plan, job, samples, folder, rows)
    else:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
        write_atomically(folder / "config.yaml", text.encode())
        _write_rows(rows, trainer, folder)
    about = {"kind": "exported_branch", "version": 1, "branch": job.branch, "trainer": trainer, "made_from": job.made_from,
             "rows": job.rows, "tokens": job.tokens, "steps": job.steps}
    write_atomically(folder / "job.json", (json.dumps(about, indent=1) + "\n").encode())
    script = f'#!/usr/bin/env bash\n# Branch {job.branch}, {job.steps} steps. Run it again to go on.\nset -euo pipefail\n' \
             f'cd "$(dirname "${{BASH_SOURCE[0]}}")"\n{start}\n'
    write_atomically(folder / "run.sh", script.encode())
    (folder / "run.sh").chmod(0o755)
    write_atomically(folder / "README.md", _branch_readme(run, job, trainer, folder).encode())


def _dataset(rows: list[tuple[np.ndarray, np.ndarray]], *, masks: bool) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()  # a bar for each file says nothing
    columns = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    return Dataset.from_dict(columns | ({"attention_mask": [np.ones_like(ids) for ids, _ in rows]} if masks else {}))


def _write_rows(rows: list[tuple[np.ndarray, np.ndarray]], trainer: str, folder: Path) -> None:
    """axolotl reads a parquet file, LLaMA-Factory what `save_to_disk` of a DatasetDict wrote."""
    data = _dataset(rows, masks=True)
    if trainer == "axolotl":
        data.to_parquet(str(folder / "data.parquet"))
        return
    from datasets import DatasetDict

    DatasetDict({"train": data}).save_to_disk(str(folder / "data"))


def _command(run: Run, plan: Plan, job: BranchJob, samples: Any, folder: Path, rows: Any) -> str:
    """data.jsonl, settings.json, and the line that starts the recipe's program, or the one that is given to run.sh."""
    places = {"base": Path(job.base), "data": folder / "data.jsonl", "settings": folder / "settings.json",
              "checkpoints": folder / "checkpoints", "out": folder / "model"}
    settings = job_settings(run.recipe, plan, job.branch, samples, run.base_hash, places)
    # a folder may be carried elsewhere: what lies in it is named from there
    settings["places"] = {name: job.base if name == "base" else f"./{path.name}" for name, path in places.items()}
    write_rows(folder / "data.jsonl", rows)
    write_atomically(folder / "settings.json", (json.dumps(settings, indent=1) + "\n").encode())
    make = "mkdir -p model checkpoints\n"
    if run.recipe.trainer.kind == "command":
        command = run.recipe.trainer.command
        return make + shlex.join(PLACE.sub(lambda found: str(settings["places"][found[1]]), part) for part in command)
    named = " ".join(f"{name.upper()}={shlex.quote(place)}" for name, place in settings["places"].items())
    return f'{make}[ $# -gt 0 ] || {{ echo "usage: run.sh PROGRAM [ARGUMENTS]" >&2; exit 2; }}\n{named} exec "$@"'


def _branch_readme(run: Run, job: BranchJob, trainer: str, folder: Path) -> str:
    start = "./run.sh PROGRAM [ARGUMENTS]" if trainer == "command" and run.recipe.trainer.kind != "command" else "./run.sh"
    notes = "\n".join(f"- {note}" for note in NOTES[trainer])
    return f"""# Branch {job.branch} for {trainer}

{job.rows:,} rows a pass; {job.tokens:,} tokens over all passes; {job.steps:,} optimizer steps of {job.batch} x \
{job.accumulation} rows.

```
{start}
anabranch add-branch RUN {job.branch} {folder.name}/model
```

The second command takes the model in, where RUN is the run folder ({run.folder.name}); it is checked first: names and shapes
of its tensors, its tokens, finite numbers, and that only what the recipe trains was changed.

{notes}
- Steps are counted for one device. On G devices divide the accumulation (or the batch) by G, so that their product stays.
- Rows are tokenised already, with a mask of where the loss is taken: do not have them templated, packed or cut again.
"""


def _readme(run: Run, jobs: list[BranchJob], trainer: str, out: Path) -> str:
    lines = "\n".join(f"| branch-{job.branch} | {job.rows:,} | {job.tokens:,} | {job.steps:,} |" for job in jobs)
    return f"""# {len(jobs)} branches for {trainer}

They need nothing of each other: run each folder's `run.sh` wherever there is a machine for it, then bring the models back to
the run and merge:

```
anabranch add-branch RUN K {out.name}/branch-K/model       # for each K
anabranch run recipe.yaml                        # goes on with the merge
```

| folder | rows | tokens | steps |
| --- | --- | --- | --- |
{lines}

Every folder's README.md says more.
"""
