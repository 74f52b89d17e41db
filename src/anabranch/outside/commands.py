"""Shell scripts that run lmms-eval and VLMEvalKit on a run's models, and then read the results back.

lmms-eval (`docs/getting-started/commands.md`; its models: `lmms_eval/models/simple/qwen2_5_vl.py` and
`models/chat/huggingface.py`): one call per model, each with its own --output_path. VLMEvalKit (`docs/en/ConfigSystem.md`): one
config file for all models. Its Qwen2VLChat (`vlmeval/vlm/qwen2_vl/model.py`) tells Qwen2.5-VL from Qwen2-VL by the text `2.5`
in the path (and Omni models by `omni`), so it gets links whose names say it.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from anabranch.artifacts import write_atomically
from anabranch.errors import ModelError, OutputError, RecipeError, closest
from anabranch.outside.reading import said
from anabranch.outside.subjects import Subjects
from anabranch.outside.suite import PAPER, Program

NAMES: dict[str, Program] = {"lmms-eval": "lmms-eval", "vlmevalkit": "VLMEvalKit"}
# model_type of config.json -> lmms-eval's model; the others go through its general one, which takes no cap on pixels
LMMS_MODELS = {"qwen2_5_vl": "qwen2_5_vl", "qwen2_vl": "qwen2_vl", "llava": "llava_hf", "llava_next": "llava_hf"}
LMMS_GENERAL = "huggingface"
QWEN = {"qwen2_vl": "qwen2-vl", "qwen2_5_vl": "qwen2.5-vl"}  # what VLMEvalKit finds in a path
MISLEADING = {"qwen2_vl": ("omni", "2.5", "2_5", "qwen25"), "qwen2_5_vl": ("omni",)}  # .. and would take for another family
VLMEVALKIT_CLASSES = {**dict.fromkeys(QWEN, "Qwen2VLChat"), "smolvlm": "SmolVLM2",
                      **dict.fromkeys(("idefics2", "idefics3"), "IDEFICS2")}
LEAST_PIXELS = 256 * 28 * 28  # lmms-eval's default lower bound for Qwen2-VL


def program_named(name: str) -> Program:
    """From the command line. Raises RecipeError."""
    if name not in NAMES:
        raise RecipeError(f"--benchmarks {name}: no such program.{closest(name, NAMES)} There are: {', '.join(NAMES)}.")
    return NAMES[name]


def write_commands(subjects: Subjects, folder: Path, program: Program) -> list[Path]:
    """A script (and VLMEvalKit's config) for the paper's eight benchmarks on every model of the run, the import at its end.

    Args:
        subjects: models that are not there yet are asked for when the script runs.
        folder: made; files of ours in it are replaced.
    Returns:
        What was written.
    Raises:
        ModelError: the base's config.json is missing, or of a family that the program cannot be told how to load.
        RecipeError: a path that the program's options cannot hold.
        OutputError: it cannot be written.
    """
    family = _family(subjects.models["base"])
    out = folder.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}).") from error
    if program == "lmms-eval":
        path, text = out / "lmms-eval.sh", _lmms_script(subjects, out, family)
        written = [path]
    else:
        path, config = out / "vlmevalkit.sh", out / "vlmevalkit.json"
        content, links = _vlmevalkit_config(subjects, out, family)
        text = _vlmevalkit_script(subjects, out, config, links)
        write_atomically(config, (json.dumps(content, indent=1) + "\n").encode())
        written = [config, path]
    write_atomically(path, os.fsencode(text))  # a path of the file system's own bytes stays what it is
    path.chmod(0o755)
    return written


def _family(base: Path) -> str:
    try:
        family = json.loads((base / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{base}: config.json does not say which model it is ({type(error).__name__}: {error}).") from error
    return str(family)


def slug_of(model: str) -> str:
    """A run's model as a file name: merit-3/seed-0 -> merit-3.seed-0."""
    return model.replace("/", ".")


def _lmms_script(subjects: Subjects, out: Path, family: str) -> str:
    kind, tasks = LMMS_MODELS.get(family, LMMS_GENERAL), ",".join(b.lmms_tasks[0] for b in PAPER)
    lines = _head("lmms-eval", "pip install lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval)", subjects)
    lines += ["# A model that has a result is not run again: delete its folder to have it measured anew.", ""]
    if subjects.max_pixels is not None and family not in QWEN:
        lines += [f"# lmms-eval's `{kind}` takes no cap on pixels: images are as large as the processor takes them.", ""]
    for name, path in subjects.models.items():
        arguments = _lmms_arguments(path, family, subjects.max_pixels)
        place = shlex.quote(str(_place(out, name)))
        lines += [f"# ---- {said(name)}", *_check(name, path),
                  f"if find {place} -name '*_results.json' 2>/dev/null | grep -q .; then",
                  f"  echo {shlex.quote(f'{name}: measured before')}; else",
                  'python3 -m accelerate.commands.launch --num_processes "$GPUS" -m lmms_eval \\',
                  f"    --model {shlex.quote(kind)} --model_args {shlex.quote(arguments)} \\",
                  f"    --tasks {shlex.quote(tasks)} --batch_size 1 --output_path {place}", "fi", ""]
    pairs = [f"--lmms-eval {shlex.quote(f'{name}={_place(out, name)}')}" for name in subjects.models]
    return "\n".join([*lines, *_import(subjects, pairs)])


def _place(out: Path, name: str) -> Path:
    return out / "lmms-eval" / slug_of(name)


def _lmms_arguments(path: Path, family: str, max_pixels: int | None) -> str:
    where = str(path.absolute())
    if set(where) & set(",="):
        raise RecipeError(f"{where}: lmms-eval takes a model's path in a list of `name=value,name=value`, so it may hold "
                          "neither `,` nor `=`. Move the run, or link to it under another name.")
    arguments = {"pretrained": where}
    if max_pixels is not None and family in QWEN:
        arguments |= {"max_pixels": str(max_pixels), "min_pixels": str(min(LEAST_PIXELS, max_pixels))}
    return ",".join(f"{key}={value}" for key, value in arguments.items())


def _vlmevalkit_config(subjects: Subjects, out: Path, family: str) -> tuple[dict[str, Any], dict[Path, Path]]:
    """The config, and the links that it points to: link -> model folder."""
    if family not in VLMEVALKIT_CLASSES:
        raise ModelError(f"VLMEvalKit: which of its classes loads a model of type `{family}` is not known here (known: "
                         f"{', '.join(VLMEVALKIT_CLASSES)}). Take --benchmarks lmms-eval, or export for a known family and "
                         "change `class` in its config.")
    if found := [text for text in MISLEADING.get(family, ()) if text in str(out).lower()]:
        raise RecipeError(f"{out}: VLMEvalKit tells Qwen's models by the whole path, and would take `{found[0]}` in it for "
                          f"another family than {family}. Export into a folder without it.")
    kind = _class_of(family, subjects.models["base"])
    models: dict[str, Any] = {}
    links: dict[Path, Path] = {}
    for name, path in subjects.models.items():
        link = out / "models" / f"{QWEN.get(family, family)}-{slug_of(name)}"
        links[link] = path.absolute()
        entry: dict[str, Any] = {"class": kind, "model_path": str(link)}
        if family in QWEN:
            entry["use_custom_prompt"] = False  # as VLMEvalKit's own entry for Qwen2.5-VL-3B-Instruct
            if subjects.max_pixels is not None:
                entry |= {"max_pixels": subjects.max_pixels, "min_pixels": min(LEAST_PIXELS, subjects.max_pixels)}
        models[slug_of(name)] = entry
    return {"model": models, "data": {b.dataset: {"class": b.dataset_class, "dataset": b.dataset} for b in PAPER}}, links


def _class_of(family: str, base: Path) -> str:
    """The first SmolVLM is an Idefics3 by its type, with another prompt (`<|im_start|>`), for which VLMEvalKit has a class."""
    templates = [base / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
    if family == "idefics3" and any("<|im_start|>" in p.read_text(errors="replace") for p in templates if p.is_file()):
        return "SmolVLM"
    return VLMEVALKIT_CLASSES[family]


def _vlmevalkit_script(subjects: Subjects, out: Path, config: Path, links: dict[Path, Path]) -> str:
    lines = _head("VLMEvalKit", "git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit", subjects)
    lines += [': "${VLMEVALKIT:?say where the clone of VLMEvalKit lies: VLMEVALKIT=/path/to/VLMEvalKit}"', "",
              "# Qwen2VLChat tells Qwen2.5-VL from Qwen2-VL by its path: the links say which it is.",
              f"mkdir -p {shlex.quote(str(out / 'models'))}"]
    for (name, path), link in zip(subjects.models.items(), links, strict=True):
        lines += [*_check(name, path), f"ln -sfn {shlex.quote(str(links[link]))} {shlex.quote(str(link))}"]
    work = out / "vlmevalkit"
    lines += ["", '(cd "$VLMEVALKIT" && torchrun --nproc-per-node "$GPUS" run.py \\',
              f"    --config {shlex.quote(str(config))} --work-dir {shlex.quote(str(work))} --reuse)", ""]
    pairs = [f"--vlmevalkit {shlex.quote(f'{name}={work / slug_of(name)}')}" for name in subjects.models]
    return "\n".join([*lines, *_import(subjects, pairs)])


def _head(program: Program, install: str, subjects: Subjects) -> list[str]:
    judged = ", ".join(b.name for b in PAPER if program in b.needs_judge)
    return ["#!/usr/bin/env bash",
            f"# {len(PAPER)} benchmarks of arXiv:2606.01717 (A.1.2) on {len(subjects.models)} models, by {program}.",
            f"# Wants: {install}; GPUs; and for {judged} a judge: OPENAI_API_KEY.",
            "# A model that is not there stops it; what is done is kept.", "set -euo pipefail", 'GPUS="${GPUS:-1}"',
            f'[ -n "${{OPENAI_API_KEY:-}}" ] || echo "OPENAI_API_KEY is not set: {judged} will have no score" >&2', ""]


def _check(name: str, path: Path) -> list[str]:
    where = shlex.quote(str(path.absolute() / "config.json"))
    missing = shlex.quote(f"{name}: no model at {path.absolute()} (is the run done?)")
    return [f"[ -f {where} ] || {{ echo {missing} >&2; exit 1; }}"]


def _import(subjects: Subjects, pairs: list[str]) -> list[str]:
    command = [f"anabranch benchmarks {shlex.quote(str(subjects.run.absolute()))}", *pairs]
    return ["# ---- the results into RUN/benchmarks.json and RUN/benchmarks.md", " \\\n    ".join(command), ""]
