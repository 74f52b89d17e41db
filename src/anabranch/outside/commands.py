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
HERE = "@HERE@"  # in VLMEvalKit's configs: the folder that they lie in
LEAST_PIXELS = 256 * 28 * 28  # lmms-eval's default lower bound for Qwen2-VL


def program_named(name: str) -> Program:
    """From the command line. Raises RecipeError."""
    if name not in NAMES:
        raise RecipeError(f"--benchmarks {name}: no such program.{closest(name, NAMES)} There are: {', '.join(NAMES)}.")
    return NAMES[name]


def write_commands(subjects: Subjects, folder: Path, program: Program) -> list[Path]:
    """A script (and VLMEvalKit's configs) for the paper's eight benchmarks on every model of the run, the import at its end.

    The folder may be copied to another machine: the script says where run and base lie in ROOT, RUN and BASE, which its
    environment may set, and finds its own folder itself.

    Args:
        subjects: models that are not there yet are asked for when the script runs.
        folder: made; files of ours in it are replaced.
    Returns:
        What was written: how to start it, the configs, the script.
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
        path, text, configs = out / "lmms-eval.sh", _lmms_script(subjects, family), {}
    else:
        path, configs = out / "vlmevalkit.sh", _vlmevalkit_configs(subjects, out, family)
        text = _vlmevalkit_script(subjects, family)
    how = out / f"{path.stem}.md"
    write_atomically(how, os.fsencode(_how(program, path.name, subjects)))
    for name, content in configs.items():
        write_atomically(out / name, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(path, os.fsencode(text))  # a path of the file system's own bytes stays what it is
    path.chmod(0o755)
    return [how, *(out / name for name in configs), path]


def _root(subjects: Subjects) -> tuple[str, str, str]:
    """The folder that run and base have in common ('' for /), and both below it."""
    run, base = str(subjects.run.absolute()), str(subjects.models["base"].absolute())
    common = os.path.commonpath([run, base])
    return common.rstrip("/"), os.path.relpath(run, common), os.path.relpath(base, common)


def _how(program: Program, script: str, subjects: Subjects) -> str:
    root, run, base = _root(subjects)
    judged = ", ".join(b.name for b in PAPER if program in b.needs_judge)
    return f"""# {program}

`{script}` scores {len(subjects.models)} models on {len(PAPER)} benchmarks, and reads the results back into the run.

On another machine it is told where things lie, by its environment; this folder itself may lie anywhere:

| variable | what | where it is not set |
|---|---|---|
| `ROOT` | the folder that holds both run and base | `{said(root) or '/'}` |
| `RUN` | the run | `ROOT/{said(run)}` |
| `BASE` | the base model | `ROOT/{said(base)}` |
| `GPUS` | how many | 1 |
| `OPENAI_API_KEY` | of the judge, for {judged} | these are left out, and run when it is started again with the key |

    ROOT=/data/project bash {script}

What is done is kept. The last command wants `anabranch` there; it can also be run later, where RUN lies.
"""


def _family(base: Path) -> str:
    try:
        family = json.loads((base / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{base}: config.json does not say which model it is ({type(error).__name__}: {error}).") from error
    return str(family)


def slug_of(model: str) -> str:
    """A run's model as a file name: merit-3/seed-0 -> merit-3.seed-0."""
    return model.replace("/", ".")


LMMS_FUNCTIONS = """\
case "$RUN$BASE" in *[,=]*)
  echo "RUN and BASE may hold neither , nor =: lmms-eval takes a model's path in a list" >&2
  exit 1 ;; esac

# A model that has a result is not run again: delete its folder to have it measured anew.
measure() {{  # name, folder of the results, tasks, arguments
  if find "$2" -name '*_results.json' 2>/dev/null | grep -q .; then echo "$1: measured before"; return; fi
  python3 -m accelerate.commands.launch --num_processes "$GPUS" -m lmms_eval \\
    --model {kind} --model_args "$4" --tasks "$3" --batch_size 1 --output_path "$2"
}}

score() {{  # name, folder of the model, of the results, further arguments
  has_model "$1" "$2"
  measure "$1" "$OUT/lmms-eval/$3/plain" {plain} "pretrained=$2$4"
  if [ -n "${{OPENAI_API_KEY:-}}" ]; then
    measure "$1, judged" "$OUT/lmms-eval/$3/judged" {judged} "pretrained=$2$4"
  fi
}}
"""


def _lmms_script(subjects: Subjects, family: str) -> str:
    kind = LMMS_MODELS.get(family, LMMS_GENERAL)
    plain, judged = (",".join(b.lmms_tasks[0] for b in PAPER if ("lmms-eval" in b.needs_judge) is with_judge)
                     for with_judge in (False, True))
    lines = _head("lmms-eval", "pip install lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval)", subjects)
    lines.append(LMMS_FUNCTIONS.format(kind=shlex.quote(kind), plain=shlex.quote(plain), judged=shlex.quote(judged)))
    if subjects.max_pixels is not None and family not in QWEN:
        lines += [f"# lmms-eval's `{kind}` takes no cap on pixels: images are as large as the processor takes them.", ""]
    for name, path in subjects.models.items():
        words = shlex.quote(name), _at(subjects, name), shlex.quote(slug_of(name))
        lines.append(f"score {' '.join(words)} {shlex.quote(_lmms_cap(path, family, subjects.max_pixels))}")
    pairs = [f'--lmms-eval {shlex.quote(f"{name}=")}"$OUT"/lmms-eval/{shlex.quote(slug_of(name))}' for name in subjects.models]
    return "\n".join([*lines, "", *_import(pairs)])


def _lmms_cap(path: Path, family: str, max_pixels: int | None) -> str:
    """What follows the model's path in lmms-eval's list of arguments."""
    where = str(path.absolute())
    if set(where) & set(",="):
        raise RecipeError(f"{where}: lmms-eval takes a model's path in a list of `name=value,name=value`, so it may hold "
                          "neither `,` nor `=`. Move the run, or link to it under another name.")
    if max_pixels is None or family not in QWEN:
        return ""
    return f",max_pixels={max_pixels},min_pixels={min(LEAST_PIXELS, max_pixels)}"


def _vlmevalkit_configs(subjects: Subjects, out: Path, family: str) -> dict[str, Any]:
    """File name -> config, whose paths start at HERE, which the script replaces: with a judge, and without."""
    if family not in VLMEVALKIT_CLASSES:
        raise ModelError(f"VLMEvalKit: which of its classes loads a model of type `{family}` is not known here (known: "
                         f"{', '.join(VLMEVALKIT_CLASSES)}); --benchmarks lmms-eval takes any family.")
    if found := [text for text in MISLEADING.get(family, ()) if text in str(out).lower()]:
        raise RecipeError(f"{out}: VLMEvalKit tells Qwen's models by the whole path, and would take `{found[0]}` in it for "
                          f"another family than {family}. Export into a folder without it.")
    kind = _class_of(family, subjects.models["base"])
    models: dict[str, Any] = {}
    for name in subjects.models:
        entry: dict[str, Any] = {"class": kind, "model_path": f"{HERE}/{_link(family, name)}"}
        if family in QWEN:
            entry["use_custom_prompt"] = False  # as VLMEvalKit's own entry for Qwen2.5-VL-3B-Instruct
            if subjects.max_pixels is not None:
                entry |= {"max_pixels": subjects.max_pixels, "min_pixels": min(LEAST_PIXELS, subjects.max_pixels)}
        models[slug_of(name)] = entry
    data = {b.dataset: {"class": b.dataset_class, "dataset": b.dataset} for b in PAPER}
    plain = {b.dataset: data[b.dataset] for b in PAPER if "VLMEvalKit" not in b.needs_judge}
    return {"vlmevalkit.json": {"model": models, "data": data}, "vlmevalkit-no-judge.json": {"model": models, "data": plain}}


def _link(family: str, name: str) -> str:
    return f"models/{QWEN.get(family, family)}-{slug_of(name)}"


def _class_of(family: str, base: Path) -> str:
    """The first SmolVLM is an Idefics3 by its type, with another prompt (`<|im_start|>`), for which VLMEvalKit has a class."""
    templates = [base / name for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")]
    if family == "idefics3" and any("<|im_start|>" in p.read_text(errors="replace") for p in templates if p.is_file()):
        return "SmolVLM"
    return VLMEVALKIT_CLASSES[family]


def _vlmevalkit_script(subjects: Subjects, family: str) -> str:
    lines = _head("VLMEvalKit", "git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit", subjects)
    lines += [': "${VLMEVALKIT:?say where the clone of VLMEvalKit lies: VLMEVALKIT=/path/to/VLMEvalKit}"', ""]
    for text in MISLEADING.get(family, ()):
        lines += [f'case "${{OUT,,}}" in *{text}*) echo "VLMEvalKit would take {text} in $OUT for another family: move it" >&2',
                  "  exit 1 ;; esac"]
    lines += ["# Qwen2VLChat tells Qwen2.5-VL from Qwen2-VL by its path: the links say which it is.", 'mkdir -p "$OUT"/models']
    for name in subjects.models:
        link = f'"$OUT"/{shlex.quote(_link(family, name))}'
        lines += [f"has_model {shlex.quote(name)} {_at(subjects, name)}", f"ln -sfn {_at(subjects, name)} {link}"]
    lines += ["", "# the config with this folder's path in it",
              'if [ -n "${OPENAI_API_KEY:-}" ]; then config=vlmevalkit.json; else config=vlmevalkit-no-judge.json; fi',
              'case "$OUT" in *[[:cntrl:]]*) echo "no control characters in this folder\'s path, please" >&2; exit 1 ;; esac',
              r"here=${OUT//\\/\\\\}", r"here=${here//\"/\\\"}", 'text=$(cat "$OUT/$config")',
              f'printf \'%s\\n\' "${{text//{HERE}/"$here"}}" > "$OUT"/vlmevalkit.here.json', "",
              '(cd "$VLMEVALKIT" && torchrun --nproc-per-node "$GPUS" run.py \\',
              '    --config "$OUT"/vlmevalkit.here.json --work-dir "$OUT"/vlmevalkit --reuse)', ""]
    pairs = [f'--vlmevalkit {shlex.quote(f"{name}=")}"$OUT"/vlmevalkit/{shlex.quote(slug_of(name))}'
             for name in subjects.models]
    return "\n".join([*lines, *_import(pairs)])


def _head(program: Program, install: str, subjects: Subjects) -> list[str]:
    judged = ", ".join(b.name for b in PAPER if program in b.needs_judge)
    root, run, base = _root(subjects)
    return ["#!/usr/bin/env bash",
            f"# {len(PAPER)} benchmarks of arXiv:2606.01717 (A.1.2) on {len(subjects.models)} models, by {program}.",
            f"# Wants: {install}; GPUs; and for {judged} a judge: OPENAI_API_KEY.",
            "# A model that is not there stops it; what is done is kept.",
            "# On another machine: ROOT=/folder/that/holds/run/and/base, or RUN=.. and BASE=..; this folder may lie anywhere.",
            "set -euo pipefail",
            f'[ -n "${{ROOT:-}}" ] || ROOT={shlex.quote(root)}',
            f'[ -n "${{RUN:-}}" ] || RUN="$ROOT"/{shlex.quote(run)}',
            f'[ -n "${{BASE:-}}" ] || BASE="$ROOT"/{shlex.quote(base)}',
            'case "$RUN" in /*) ;; *) RUN="$PWD/$RUN" ;; esac', 'case "$BASE" in /*) ;; *) BASE="$PWD/$BASE" ;; esac',
            'OUT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"', 'GPUS="${GPUS:-1}"',
            'has_model() { [ -f "$2/config.json" ] || { echo "$1: no model at $2 (is the run done?)" >&2; exit 1; }; }',
            f'[ -n "${{OPENAI_API_KEY:-}}" ] || echo "OPENAI_API_KEY is not set: {judged} need a judge and are left out now; '
            'start this again with the key, and they are added" >&2', ""]


def _at(subjects: Subjects, name: str) -> str:
    """A model's folder, as a word of the script."""
    if name == "base":
        return '"$BASE"'
    return f'"$RUN"/{shlex.quote(os.path.relpath(subjects.models[name].absolute(), subjects.run.absolute()))}'


def _import(pairs: list[str]) -> list[str]:
    command = ['anabranch benchmarks "$RUN"', *pairs]
    return ["# ---- the results into RUN/benchmarks.json and RUN/benchmarks.md", " \\\n    ".join(command), ""]
