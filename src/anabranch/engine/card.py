"""The model card of a merged model: what a hub shows, and reads to find the models it came from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from anabranch.engine.config import MergeConfig
from anabranch.engine.reference import HUB_ID, Reference


def model_card(config: MergeConfig, text: str) -> str:
    """README.md: metadata of models that are on the Hub, the method, the models, the config as it was given."""
    metadata = {"base_model": [r.path for r in config.models if _on_hub(r)], "library_name": "transformers",
                "tags": ["merge", "anabranch", config.method]}
    head = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=True, allow_unicode=True)
    names = _named(config.models)
    models = [f"- {name}{' (base)' if r == config.base else ''}" for r, name in zip(config.models, names, strict=True)]
    fence = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([
        "---", head + "---", "", f"# {_title(config)}", "",
        f"A merge of {len(models)} model{'s' if len(models) != 1 else ''} by `{config.method}`, made with Anabranch. Computed "
        "in float32 and rounded once; `manifest.json` holds a hash of every tensor and of every input.", "",
        "## Models", "", *models, "", "## Config", "", f"{fence}yaml", text.rstrip("\n"), fence, ""])


def _title(config: MergeConfig) -> str:
    return config.name or "Merged model"


def _on_hub(reference: Reference) -> bool:
    return "/" in reference.path and HUB_ID.fullmatch(reference.path) is not None and not os.path.isdir(reference.path)


def _named(references: Sequence[Reference]) -> list[str]:
    """Hub ids as links; of a folder as many of its last parts as tell it from the others: where it lay is no one's business."""
    parts = [Path(r.path.replace(chr(92), "/")).parts for r in references]
    depth = next((d for d in range(1, max(map(len, parts), default=1) + 1)
                  if len({p[-d:] for p in parts}) == len(set(parts))), 1)
    names = []
    for reference, part in zip(references, parts, strict=True):
        adapter = f" + {Path(reference.adapter).name}" if reference.adapter else ""
        names.append(f"[{reference}](https://huggingface.co/{reference.path})" if _on_hub(reference)
                     else f"{'/'.join(part[-depth:])}{adapter}")
    return names


def _longest_run(text: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
