"""Which search a journal is of: its settings, and all that decides what a candidate is worth."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress

from anabranch import __version__
from anabranch.artifacts import digest
from anabranch.engine.stream import Merge
from anabranch.errors import AnabranchError
from anabranch.search.in_memory import Workshop
from anabranch.search.rows import Halves
from anabranch.search.settings import SearchSettings
from anabranch.search.space import Space
from anabranch.search.tasks import TaskScorer

READ = (".safetensors", ".json", ".model", ".jinja", ".txt")  # of a model folder: weights, settings, tokenizers, templates


def identity_of(settings: SearchSettings, space: Space, first: Merge, workshop: Workshop, halves: Halves,
                tasks: TaskScorer | None) -> dict[str, str]:
    """What must be the same for a journal to be gone on with. The budget may grow."""
    merges = [first, *_chosen(space, workshop)]
    given = settings.model_dump(mode="json", exclude={"budget", "token_weights"})
    libraries = {"cma": "cma", "tpe": "optuna", "nsga2": "optuna"}
    version = importlib.metadata.version(libraries[settings.sampler]) if settings.sampler in libraries else ""
    paths = {path for merge in merges for one in merge.inputs for folder in (one.folder, one.adapter) if folder is not None
             for path in folder.iterdir() if path.suffix in READ}
    paths |= {one.folder / info.file for merge in merges for one in merge.fisher.values() for info in one.tensors.values()}
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]
    return {"settings": digest([given, [d.words for d in space.dimensions]]), "models": digest(files), "rows": halves.hash,
            "tasks": digest(tasks.identity if tasks else None), "software": digest([__version__, settings.sampler, version])}


def _chosen(space: Space, workshop: Workshop) -> list[Merge]:
    """Merges that differ from the first in one of the `choices`: each may name models and files of its own."""
    found = []
    for at, dimension in enumerate(space.dimensions):
        for choice in dimension.choices:
            vector = [choice if i == at else value for i, value in enumerate(space.first)]
            with suppress(AnabranchError):  # what cannot be merged like that is told of as a failed candidate
                found.append(workshop.planned(space.config(vector)))
    return found
