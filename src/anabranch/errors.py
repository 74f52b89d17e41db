"""What can go wrong, and whose turn it is.

    AnabranchError            the user must change something: one message, exit code 2, no traceback
    ├── RecipeError           the recipe (or another file a person wrote) says something that cannot be
    ├── MixtureError          the data: missing, unreadable, or no usable row
    ├── ModelError            the base: no weights, no tokenizer, no chat template
    ├── PlanError             a partition that cannot be made, or a plan that no longer fits its mixture
    ├── ProvenanceError       a file made from another base, plan or mixture than the one at hand
    ├── CorruptedError        a file that is damaged or incomplete
    ├── ShapeMismatch         checkpoints whose tensors do not line up
    ├── BranchFailed          a training process that ended without its manifest
    │   └── Preempted         .. because it was told to stop: it saved, and goes on when it is started again
    └── OutputError           the result cannot be written (disk full, not permitted, already there)

Anything else that escapes is a bug of ours and keeps its traceback.
A message names what, where, got, wanted and what to do; several problems come as one message.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


class AnabranchError(Exception):
    """A problem that the user can mend. `str(error)` is the whole message."""

    @classmethod
    def of(cls, title: str, problems: Sequence[str]) -> AnabranchError:
        """One message from several problems, one line each."""
        return cls(title + "\n" + "\n".join(f"  - {p}" for p in problems))


class RecipeError(AnabranchError):
    pass


class MixtureError(AnabranchError):
    pass


class ModelError(AnabranchError):
    pass


class PlanError(AnabranchError):
    pass


class ProvenanceError(AnabranchError):
    pass


class CorruptedError(AnabranchError):
    pass


class ShapeMismatch(AnabranchError):
    pass


class BranchFailed(AnabranchError):
    pass


class Preempted(BranchFailed):
    pass


class OutputError(AnabranchError):
    pass


def printable(text: str) -> str:
    """Text of somebody else's for a terminal: less the control and format characters (Unicode Cc, Cf, Cs), which could move its
    cursor, or colour or hide what stands beside them. Newline and tab stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def closest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' or the list of what is known, for the end of a message."""
    known = sorted(set(known))
    lower = {one.casefold(): one for one in known}
    match = [lower[m] for m in difflib.get_close_matches(name.casefold(), lower, n=1, cutoff=0.5)]
    return f" Did you mean `{match[0]}`?" if match else f" Known: {', '.join(known)}."


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem that pydantic found, as 'where: got, wanted', with the closest name for an unknown key."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            lines.append(f"{where}: unknown key `{key}`.{closest(key, _keys_at(model, problem['loc'][:-1]))}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: required, and not given.")
        else:
            got = repr(problem.get("input"))
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {got[:120]})")
    return lines


def _keys_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The field names that pydantic accepts at `path` below `model`."""
    here: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        field = getattr(here, "model_fields", {}).get(part)
        if field is None:  # a tag that pydantic adds for unions: not a level of the document
            continue
        here = _model_in(field.annotation) or here
    return list(getattr(here, "model_fields", {}))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _model_in(inner)) is not None:
            return found
    return None
