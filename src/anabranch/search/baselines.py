"""What a searched merge must beat: the uniform merge, the token-weighted one, each model alone, the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.engine.config import MergeConfig
from anabranch.engine.dialect import config_of
from anabranch.errors import RecipeError

UNIFORM, TOKENS, BASE = "uniform merge", "token-weighted merge", "base"
SHARED = ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template")


def baselines(first: Mapping[str, Any], folders: Sequence[Path], weights: Sequence[float] | None,
              run: Mapping[Path, float]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Merge configs by name, and why some cannot be had. All are linear, of whole models, in the dtype and with the tokenizer
    of the first candidate.

    Args:
        first: the config of the first candidate.
        weights: of the models in the order of the config, without its base.
        run: model folder -> weight, of the run whose rows are scored.
    Raises:
        RecipeError: another number of `weights` than models.
    """
    config = config_of(dict(first), source="merge config of the search", folders=folders)
    models = listed(config)
    names = {reference.said: reference for reference in models}
    shared = {key: first[key] for key in SHARED if key in first}
    said = spelled(first)

    def linear(wanted: Mapping[str, float]) -> dict[str, Any]:
        entries = [{"model": said[name], "parameters": {"weight": weight}} for name, weight in wanted.items()]
        found: dict[str, Any] = {"merge_method": "linear", "models": entries, "parameters": {"normalize": True}, **shared}
        if config.base is not None:  # lends config.json, tokenizer and side files, and nothing else
            if config.base.said not in wanted:
                entries.append({"model": said[config.base.said], "parameters": {"weight": 0.0}})
            found["base_model"] = said[config.base.said]
        return found

    made = {UNIFORM: linear(dict.fromkeys(names, 1 / len(names)))}
    missing = {}
    if weights is not None and len(weights) != len(names):
        raise RecipeError(f"token_weights: {len(weights)} numbers for {len(names)} models ({', '.join(names)}), wanted one "
                          "each.")
    found = (dict(zip(names, weights, strict=True)) if weights is not None else
             {name: run[Path(reference.path)] for name, reference in names.items()
              if Path(reference.path) in run and reference.adapter is None})  # with an adapter it is another model
    if len(found) == len(names) and sum(found.values()) > 0:
        made[TOKENS] = linear({name: weight / sum(found.values()) for name, weight in found.items()})
    else:
        missing[TOKENS] = ("the tokens that each model was trained on are not known: the models are not all branches of the "
                           "run of `data.mixture`. Give `token_weights`.")
    made |= {f"model {name}": linear({name: 1.0}) for name in names}
    if config.base is not None and config.base not in models:
        made[BASE] = linear({config.base.said: 1.0})
    elif config.base is None:
        missing[BASE] = "the config names no `base_model`"
    return made, missing


def listed(config: MergeConfig) -> list[Any]:
    """The models that are merged, in listing order, without the base unless it is all there is."""
    every = list(dict.fromkeys(e.model for part in config.modules.values() for entries in part.lists for e in entries))
    others = [model for model in every if model != config.base]
    return others or every


def spelled(value: Any) -> dict[str, Any]:
    """What a config calls a model in messages -> how it stands in it (text, or the object form)."""
    from anabranch.engine.reference import read_reference

    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("model", "base_model") and isinstance(inner, (str, Mapping)):
                reference = read_reference(inner, key, (), [], [])
                if reference is not None:
                    found.setdefault(reference.said, inner)
            else:
                found |= {name: v for name, v in spelled(inner).items() if name not in found}
    elif isinstance(value, list):
        for inner in value:
            found |= {name: v for name, v in spelled(inner).items() if name not in found}
    return found
