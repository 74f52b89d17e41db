"""One matrix, an embedding or a head, for another tokenizer: shared rows copied, all others made. Pure.

    rows  of the result     V, D  rows of the model's and the donor's matrix     a, b  donor's and model's width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import CorruptedError, RecipeError, closest
from anabranch.transplant import approximations as ways
from anabranch.transplant.approximations import Pooling, Scheme
from anabranch.transplant.matching import APPROXIMATED, BYTE, EXACT, PREFIX, Matches, Where

ROPE = ("mp_rope turns each anchor by a guessed rotary position before it is matched: embeddings carry no position, the peer's "
        "own code fails under today's transformers, and nothing shows that it helps. Use omp.")


@dataclass(frozen=True)
class Method:
    """How rows are made. `donor`: from the donor's embeddings. `k`: of how many anchors each. `anchors`: least number."""

    says: str
    donor: bool = True
    k: bool = False
    anchors: int = 1


METHODS = {
    "omp": Method("orthogonal matching pursuit: k shared tokens in the donor's space, combined alike in the model's", k=True),
    "common_interpolation": Method("the k nearest shared tokens, weighed (--weight-scheme, --cosine-similarity)", k=True),
    "subword": Method("the pieces of the model's own tokenizer, pooled (--subword-method)", donor=False, anchors=0),
    "mean": Method("the mean of the model's rows", donor=False, anchors=0),
    "zero": Method("zeros", donor=False, anchors=0),
    "randn": Method("independent N(0, 1)", donor=False, anchors=0),
    "john_hewitt": Method("drawn with the mean and covariance of the model's rows", donor=False, anchors=0),
    "landmark_pca": Method("principal axes of both spaces, rotated onto each other by the shared tokens", anchors=2),
    "stb": Method("coordinates in a basis of sparse combinations of shared tokens", k=True, anchors=2),
    "procrustes": Method("one rotation and one scale for all tokens, fitted to the shared ones", anchors=2),
    "ridge": Method("one linear map for all tokens, fitted to the shared ones with a cross-validated penalty", anchors=3),
    "focus": Method("sparsemax of the cosines with all shared tokens as weights (FOCUS)"),
    "composed": Method("the mean of the pieces, and a correction learnt on shared tokens taken apart",
                       donor=False, anchors=0),
}


@dataclass(frozen=True)
class Settings:
    """What decides the rows beside the two models. Names and defaults are the peer's, but for `seed`, and for
    `method`, which is omp there.

    method            one of METHODS
    k                 anchors per token (omp, common_interpolation, stb)
    cosine            neighbours by 1 - cosine instead of Euclidean distance
    weight_scheme     distance_proportional | barycentric | least_squares
    subword_method    mean | sum | weighted_mean | first_last
    batch_size        tokens at once; 0 or less: all. It decides memory and speed only
    prefix_match, byte_match   no | yes | embed | lm_head: in which matrix
    magikarp          leave out the model's badly trained tokens when matching, and zero the donor's
    noise, scale      of made rows: (row + noise N(0, 1)) scale
    seed              of everything drawn
    """

    method: str = "composed"
    k: int = 64
    cosine: bool = False
    weight_scheme: Scheme = "distance_proportional"
    subword_method: Pooling = "mean"
    batch_size: int = 512
    prefix_match: Where = "no"
    byte_match: Where = "no"
    magikarp: bool = False
    noise: float = 0.0
    scale: float = 1.0
    seed: int = 0

    def said(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """Raises RecipeError with all that cannot be."""
        problems = []
        if self.method == "mp_rope":
            problems.append(f"--approximation-method: {ROPE}")
        elif self.method not in METHODS:
            problems.append(f"--approximation-method: there is no `{self.method}`.{closest(self.method, METHODS)}")
        for option, value, known in (("--weight-scheme", self.weight_scheme, get_args(Scheme)),
                                     ("--subword-method", self.subword_method, get_args(Pooling)),
                                     ("--prefix-match", self.prefix_match, get_args(Where)),
                                     ("--byte-match", self.byte_match, get_args(Where))):
            if value not in known:
                problems.append(f"{option}: got '{value}', wanted one of {', '.join(known)}.{closest(value, known)}")
        if self.k < 1:
            problems.append(f"-k: got {self.k}, wanted 1 or more")
        if not (np.isfinite(self.noise) and self.noise >= 0):
            problems.append(f"--new-vocab-noise: got {self.noise}, wanted 0 or more")
        if not np.isfinite(self.scale):
            problems.append(f"--new-vocab-scale: got {self.scale}, wanted a number")
        if self.seed < 0:
            problems.append(f"--seed: got {self.seed}, wanted 0 or more")
        if problems:
            raise RecipeError.of("vocabulary: this cannot be:", problems)


def applies(where: Where, head: bool) -> bool:
    """Whether a setting holds for the head, or for the embedding. (The peer has the two the wrong way round.)"""
    return where == "yes" or where == ("lm_head" if head else "embed")


@dataclass(frozen=True)
class Task:
    """A matrix to be made.

    matches          where each row comes from
    zeroed           bool [rows]: tokens whose rows become zero, whatever they match
    anchors          donor ids of the shared tokens, int64 [n], ascending: exact matches with a row on both sides
    wanted           ids of the rows to be made, int64 [t], ascending
    without          ids that cannot be made since the donor has no row for them, int64; they become zero
    head             of the head rather than of the embedding
    """

    matches: Matches
    zeroed: np.ndarray
    anchors: np.ndarray
    wanted: np.ndarray
    without: np.ndarray
    head: bool

    def counts(self) -> dict[str, int]:
        """Figures for the report."""
        kept = ~self.zeroed
        number = {name: int((kept & (self.matches.kind == kind)).sum())
                  for name, kind in (("exact", EXACT), ("byte", BYTE), ("prefix", PREFIX))}
        return {**number, "approximated": len(self.wanted), "zeroed_badly_trained": int(self.zeroed.sum()),
                "zeroed_no_donor_row": len(self.without), "no_token": int((self.matches.kind == 0).sum()),
                "anchors": len(self.anchors)}


def task_for(matches: Matches, zeroed: np.ndarray, donor_rows: int | None, method: str, head: bool) -> Task:
    """What is to be done for a matrix. `donor_rows`: of the donor's matrix; None where it has none."""
    here = np.arange(len(matches.kind)) < (len(matches.kind) if donor_rows is None else donor_rows)
    anchors = np.flatnonzero((matches.kind == EXACT) & ~zeroed & here)
    open_ones = (matches.kind == APPROXIMATED) & ~zeroed
    if METHODS[method].donor:
        return Task(matches, zeroed, anchors, np.flatnonzero(open_ones & here), np.flatnonzero(open_ones & ~here), head)
    return Task(matches, zeroed, anchors, np.flatnonzero(open_ones), np.zeros(0, dtype=np.int64), head)


def check_anchors(task: Task, settings: Settings) -> str | None:
    """Why the method cannot make what is wanted, in words; None where it can."""
    method, found = METHODS[settings.method], len(task.anchors)
    if not len(task.wanted):
        return None
    if method.k and settings.k > found:
        return (f"-k {settings.k} is more than the {found} tokens that the two share: give -k {found} or less"
                if found else "the two share no token: `subword`, `composed` and `mean` need none")
    if found < method.anchors:
        return (f"`{settings.method}` needs {method.anchors} shared tokens, and there {'is' if found == 1 else 'are'} {found}: "
                "`subword`, `composed` and `mean` need none")
    return None


Pieces = Callable[[Sequence[int], bool], list[list[int]]]
Normal = Callable[[int, int], Tensor]


def transplanted(model: Tensor, donor: Tensor | None, task: Task, settings: Settings, pieces: Pieces, split: Pieces,
                 normal: Normal, notes: list[str]) -> Tensor:
    """The matrix for the donor's tokenizer, float32 [rows, b].

    Args:
        model: the model's matrix [V, b]. donor: the donor's [D, a], or None.
        pieces: (donor ids, False) -> for each the model's rows that its own tokenizer cuts the text into.
        split: (donor ids, whether each has to do without its own match) -> the longest tokens that make up the text.
        normal: (t, b) -> independent N(0, 1), the next ones at each call.
        notes: gets what the user should know.
    Raises:
        CorruptedError: rows that are needed hold NaN or infinity.
    """
    out = torch.zeros(len(task.matches.kind), model.shape[1])
    copied = task.matches.of(EXACT, BYTE, PREFIX)
    out[torch.from_numpy(copied)] = model[torch.from_numpy(task.matches.row[copied])].float()
    if len(task.wanted):
        rows = _made(model, donor, task, settings, pieces, split, normal, notes)
        if settings.noise:
            rows = rows + settings.noise * normal(*rows.shape)
        out[torch.from_numpy(task.wanted)] = rows * settings.scale
    out[torch.from_numpy(np.flatnonzero(task.zeroed))] = 0
    return out


def _made(model: Tensor, donor: Tensor | None, task: Task, settings: Settings, pieces: Pieces, split: Pieces, normal: Normal,
          notes: list[str]) -> Tensor:
    name, wanted = settings.method, torch.from_numpy(task.wanted)
    shape = len(wanted), model.shape[1]
    if name == "subword":
        return ways.pooled(model, pieces(task.wanted.tolist(), False), settings.subword_method, head=task.head)
    if name == "mean":
        return ways.mean_row(model, len(wanted))
    if name == "zero":
        return torch.zeros(shape)
    if name == "randn":
        return normal(*shape)
    if name == "john_hewitt":
        rows, whole = ways.random_around(model, normal(*shape))
        if not whole:
            notes.append("john_hewitt: the covariance of the model's rows is not positive definite, so that the new rows are "
                         "drawn from N(0, 0.02^2) instead")
        return rows
    anchors = torch.from_numpy(task.anchors)
    y = model[torch.from_numpy(task.matches.row[task.anchors])].float()
    x = None if donor is None else donor[anchors].float()
    targets = _targets(donor, wanted)
    for whose, tensor in (("the donor's", x), ("the donor's", targets), ("the model's", y)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise CorruptedError(f"{whose} {'head' if task.head else 'embedding'} holds NaN or infinity, and rows are made "
                                 "from it. A model that diverged must be trained or fetched again.")
    if name == "composed":
        if targets is None:
            x = None
            if donor is not None:
                notes.append("composed: some of the donor's tokens have no row in its "
                             f"{'head' if task.head else 'embedding'}, so that nothing is learnt from donor rows")
        return ways.composed(targets, split(task.wanted.tolist(), False), x, split(task.anchors.tolist(), True), y, model)
    assert x is not None and targets is not None  # the plan asked for the donor's embeddings
    if name == "omp":
        return ways.omp(targets, x, y, settings.k, batch=settings.batch_size)
    if name == "common_interpolation":
        return ways.interpolation(targets, x, y, settings.k, scheme=settings.weight_scheme, cosine=settings.cosine,
                                  batch=settings.batch_size)
    if name == "stb":
        return ways.sparse_token_basis(targets, x, y, settings.k)
    if name == "focus":
        return ways.sparse_similarity(targets, x, y, batch=settings.batch_size)
    return {"landmark_pca": ways.landmark_pca, "procrustes": ways.procrustes, "ridge": ways.ridge}[name](targets, x, y)


def _targets(donor: Tensor | None, wanted: Tensor) -> Tensor | None:
    """Donor rows of the wanted tokens; None where there are none, or not for all."""
    if donor is None or (len(wanted) and int(wanted.max()) >= len(donor)):
        return None
    return donor[wanted].float()
