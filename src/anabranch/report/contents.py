"""What a run folder (or a comparison folder) holds so far; the report is made from this and from nothing else."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from anabranch.artifacts import (
    BranchManifest,
    Comparison,
    Conflict,
    Evaluation,
    Gradients,
    MergeManifest,
    Mixture,
    Operators,
    Pilot,
    Plan,
    digest,
    file_digest,
)
from anabranch.diagnose.artifacts import KINDS, Diagnostic
from anabranch.errors import CorruptedError, OutputError
from anabranch.stale import made, stale

A = TypeVar("A", Gradients, Conflict, Plan, MergeManifest, Comparison, Pilot, Operators)
PLACE_WORDS = {"held_out": "held-out rows", "transfer": "transfer", "retention": "retention"}
PLACE_MEANING = {
    "held_out": "rows of the mixture's own units that no stage trained or calibrated on: was the mixture learned?",
    "transfer": "units that nobody trained on: does it carry over?",
    "retention": "plain text that the base could model before: was anything forgotten?",
}
_BIDI = {"\u202a", "\u202b", "\u202c", "\u202d", "\u202e", "\u2066", "\u2067", "\u2068", "\u2069", "\u200e", "\u200f"}


@dataclass(frozen=True)
class Contents:
    """The artifacts of one folder. What is None or empty has not been made yet.

    T units, R axes: `tensors` has cosine, corrected, gram [T, T] and scores [T, R], rows in `conflict.units` order.
    `diagnostics`: by kind; `outdated`: what is there and was made of another mixture, measured conflict, plan or model
    than the folder now holds, and is not shown: kinds of diagnostics, `pilot`, `merge_methods`, and what `stale` finds.
    """

    name: str
    mixture: Mixture
    conflict: Conflict | None
    tensors: dict[str, np.ndarray]
    plan: Plan | None
    branches: dict[int, BranchManifest]
    merge: MergeManifest | None
    evaluations: dict[str, Evaluation]
    comparison: Comparison | None
    diagnostics: dict[str, Diagnostic] = field(default_factory=dict)
    outdated: list[str] = field(default_factory=list)
    stale: bool = False
    pilot: Pilot | None = None
    operators: Operators | None = None
    folder: Path = Path()  # where these lie: images are too large to be read before it is known which are shown

    @property
    def groups(self) -> dict[str, int | None]:
        """unit -> its group; None in a soup. Empty without a plan."""
        return {u.unit: u.group for u in self.plan.units} if self.plan else {}

    @property
    def matrix(self) -> np.ndarray:
        """The similarity [T, T] that the pictures show, finite: what the axes come from (cosine if that is `gram`)."""
        assert self.conflict is not None
        name = "corrected" if self.conflict.matrix == "corrected" else "cosine"
        matrix = np.nan_to_num(self.tensors[name].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        return np.clip((matrix + matrix.T) / 2, -1.0, 1.0)

    @property
    def models(self) -> list[str]:
        """The evaluated models: base, branches by number, merged, then the rest by name."""

        def place(name: str) -> tuple[int, int, str]:
            number = name.removeprefix("branch-")
            if name.startswith("branch-") and number.isdigit():
                return 1, int(number), name
            return {"base": 0, "merged": 2}.get(name, 3), 0, name

        return sorted(self.evaluations, key=place)


def read_contents(run: Path) -> Contents:
    """Everything the folder has so far.

    Raises:
        OutputError: no mixture there, so this is no run folder (or the run has not begun).
        CorruptedError: an artifact that is there and damaged.
    """
    run = run.resolve()
    if not (run / "mixture" / "mixture.json").is_file():
        raise OutputError(f"{run}: no mixture/mixture.json there, so there is nothing to report. Give the folder named "
                          "by `output` in the recipe; `anabranch run recipe.yaml` makes it.")
    conflict = _maybe(Conflict, run / "conflict" / "conflict.json")
    mixture, gradients = Mixture.load(run / "mixture" / "mixture.json"), _maybe(Gradients, run / "gradients" / "gradients.json")
    plan, branches, merge, evaluations = made(run)
    here = _hashes(mixture, gradients, conflict, plan, list(branches.values()), merge)
    diagnostics, outdated = _diagnostics(run / "diagnostics", here)
    pilot, operators = _maybe(Pilot, run / "pilot.json"), _maybe(Operators, run / "merge_methods.json")
    if pilot is not None and pilot.made_from.get("mixture", mixture.hash) != mixture.hash:
        pilot, outdated = None, [*outdated, "pilot"]
    if operators is not None and plan is not None and operators.made_from.get("plan", plan.hash) != plan.hash:
        operators, outdated = None, [*outdated, "merge_methods"]
    old = stale(mixture, plan, branches, merge, evaluations)
    if "plan" in old:  # what was measured of its branches, on the rows of then
        outdated, diagnostics = sorted({*outdated, *diagnostics, *(["merge_methods"] if operators else [])}), {}
        operators = None
    return Contents(
        name=run.name,
        mixture=mixture,
        conflict=conflict,
        tensors=_tensors(run / "conflict" / "conflict.safetensors", conflict) if conflict else {},
        plan=None if "plan" in old else plan,
        branches={k: b for k, b in branches.items() if f"branch-{k}" not in old},
        merge=None if "merged" in old else merge,
        evaluations={label: e for label, e in evaluations.items() if f"evaluation of {label}" not in old},
        comparison=_comparison(run, mixture),
        diagnostics=diagnostics,
        outdated=[*old, *outdated],
        stale=bool(old),
        pilot=pilot,
        operators=operators,
        folder=run,
    )


def _hashes(mixture: Mixture, gradients: Gradients | None, conflict: Conflict | None, plan: Plan | None,
            branches: list[BranchManifest], merge: MergeManifest | None) -> dict[str, str]:
    """What the folder now holds, by the names that diagnostics give it in `made_from`."""
    found = {f"branch-{b.branch}": digest(b.files) for b in branches}
    found |= {name: artifact.hash for name, artifact in (("gradients", gradients), ("conflict", conflict), ("plan", plan))
              if artifact is not None}
    found |= {"base": mixture.made_from["base"]} if "base" in mixture.made_from else {}
    return found | ({"merged": merge.model_hash} if merge else {})


def _diagnostics(folder: Path, here: dict[str, str]) -> tuple[dict[str, Diagnostic], list[str]]:
    """What is there by kind, without what was made of something else than is `here`; and the kinds of that.

    What only one side has cannot be compared, and is no reason to leave a diagnostic out.
    """
    found = {kind: cls.load(folder / f"{kind}.json") for kind, cls in KINDS.items() if (folder / f"{kind}.json").is_file()}
    old = [kind for kind, d in found.items() if any(d.made_from.get(name, known) != known for name, known in here.items())]
    return {kind: d for kind, d in found.items() if kind not in old}, old


def _rows_hash(mixture: Mixture) -> str:
    return digest({u.name: u.sha256 for u in mixture.units})


def _comparison(run: Path, mixture: Mixture) -> Comparison | None:
    """The comparison, unless it was made on another mixture than the folder now holds: its verdict would be of that."""
    found, here = _maybe(Comparison, run / "compare.json"), _rows_hash(mixture)
    return found if found is not None and found.made_from.get("mixture", here) == here else None


def _maybe(kind: type[A], path: Path) -> A | None:
    return kind.load(path) if path.is_file() else None


def _tensors(path: Path, conflict: Conflict) -> dict[str, np.ndarray]:
    remedy = "Delete the conflict folder and run again."
    try:
        found = file_digest(path)
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptedError(f"{path}: cannot be read ({error}). {remedy}") from error
    if found != conflict.tensors_sha256:
        raise CorruptedError(f"{path}: SHA-256 is {found[:12]}, conflict.json says {conflict.tensors_sha256[:12]}. "
                             f"{remedy}")
    units = len(conflict.units)
    wanted = {"cosine": (units, units), "corrected": (units, units)}
    problems = [f"{name}: got {tensors[name].shape if name in tensors else 'nothing'}, wanted {shape}"
                for name, shape in wanted.items() if name not in tensors or tensors[name].shape != shape]
    scores = tensors.get("scores")
    if scores is None or scores.ndim != 2 or len(scores) != units:
        problems.append(f"scores: got {None if scores is None else scores.shape}, wanted ({units}, R)")
    if problems:
        raise CorruptedError.of(f"{path}: tensors do not fit conflict.json. {remedy}", problems)
    return tensors


def clean(text: str) -> str:
    """A name from data as one printable line: control, surrogate and direction-changing characters become U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _BIDI else c for c in text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters, cut in the middle: names of units often differ at both ends."""
    text = clean(text)
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail:]
