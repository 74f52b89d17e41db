"""A YAML file of settings for one command, read strictly: every problem in one message, with the closest names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from anabranch.errors import RecipeError, describe_validation_error
from anabranch.recipe import read_yaml

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A mapping in a settings file: unknown keys are errors that name the closest one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_settings(config: Path | str | Mapping[str, Any], model: type[Model], what: str) -> tuple[Model, str]:
    """The settings of a file, or of what would stand in one, and its text.

    Args:
        config: a YAML file, or a mapping.
        model: what it must hold.
        what: how messages call it: 'experts config'.
    Raises:
        RecipeError: not there, not text, not YAML, a key twice, or anything that `model` refuses; all in one message.
    """
    where = what if isinstance(config, Mapping) else f"{what} {config}"
    try:
        if isinstance(config, Mapping):
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            value = dict(config)
        else:
            text = Path(config).read_text(encoding="utf-8-sig")
            value = read_yaml(text)
    except OSError as error:
        raise RecipeError(f"{where}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not text in UTF-8 ({error}).") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: holds {type(value).__name__}, wanted a mapping with {_wanted(model)}.")
    try:
        return model.model_validate(value), text
    except ValidationError as error:
        raise RecipeError.of(f"{where}:", describe_validation_error(error, model)) from error


def _wanted(model: type[BaseModel]) -> str:
    needed = [f"`{field.alias or name}:`" for name, field in model.model_fields.items() if field.is_required()]
    return "at least " + " and ".join(needed or [f"`{name}:`" for name in list(model.model_fields)[:1]])
