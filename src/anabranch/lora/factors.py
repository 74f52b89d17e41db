"""Many matrices cut to few directions each, one at a time, with what is found kept on disk.

    OUT.factors/              beside the result, until it is whole
      key.json                what is computed here; a folder with another key is begun anew
      0007.safetensors        left, values, right of matrix number 7, float32; or nothing but its energy, 0: no change

A kill costs the matrices then in work. Ranks are chosen when all are there, so a budget can weigh them against each other.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from anabranch.artifacts import write_atomically
from anabranch.engine.blocks import MERGED
from anabranch.engine.memory import Budget, occupied
from anabranch.engine.plan import parse_size
from anabranch.engine.stream import Progress
from anabranch.errors import CorruptedError, OutputError, RecipeError
from anabranch.merge.low_rank import (
    POWER,
    LowRank,
    block_width,
    is_exact,
    kept_share,
    product_difference,
    rank_for,
    ranks_for_budget,
)

KEY = "key.json"
# Beside the largest matrix's own needs, where nothing else is said: smaller ones may run beside it.
BESIDE = 256 * 10**6
SLACK = 64 * 10**6
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """How many directions are kept: one of these, or all (none given). `rank` also bounds the others.

    rank     of every matrix            energy   share of every matrix's energy, in (0, 1]
    budget   parameters of all factors together                 least   singular values not above it are left out
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None
    least: float = 0.0

    def check(self) -> None:
        """Raises RecipeError for numbers that choose nothing."""
        problems = []
        if self.energy is not None and self.budget is not None:
            problems.append("energy and budget both say how many directions to keep. Give one of them.")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            problems.append(f"rank: got {self.rank!r}, wanted a whole number from 1 on")
        if self.energy is not None and not 0 < self.energy <= 1:
            problems.append(f"energy: got {self.energy!r}, wanted a share in (0, 1]")
        if self.budget is not None and (type(self.budget) is not int or self.budget < 1):
            problems.append(f"budget: got {self.budget!r}, wanted a whole number of parameters from 1 on")
        if not self.least >= 0:
            problems.append(f"sv-epsilon: got {self.least!r}, wanted a number from 0 on")
        if problems:
            raise RecipeError.of("the rank of an adapter:", problems)


@dataclass(frozen=True)
class Matrix:
    """A matrix to be found.

    shape     (rows, columns)
    compute   (count, share) -> its strongest directions, as `low_rank` takes these; deterministic, called by any thread
    held      bytes that it takes beside what comes of it
    """

    name: str
    shape: tuple[int, int]
    compute: Callable[[int | None, float | None], LowRank]
    held: int

    def need(self, count: int | None) -> int:
        """Bytes at its peak: the matrix, and either float64 Gram matrix and eigenvectors or the random subspace."""
        most = min(self.shape)
        wanted = most if count is None else min(count, most)
        subspace = 40 * (POWER + 1) * block_width(wanted) * sum(self.shape) // 2
        work = 40 * most * most if is_exact(wanted, most) else subspace
        return self.held + work + 16 * 10**6


@dataclass(frozen=True)
class Found:
    """What is known of a matrix, and the `rank` of it that is kept. The directions themselves lie in `file`."""

    name: str
    shape: tuple[int, int]
    file: Path = field(compare=False)
    values: Tensor = field(repr=False, compare=False)
    energy: float
    whole: bool
    rank: int = 0

    @property
    def kept(self) -> float:
        return kept_share(self.values[: self.rank], self.energy)

    @property
    def lost(self) -> float:
        """Energy that is not kept: of the directions that were found and are cut, where these are all that there are."""
        return float(self.values[self.rank:].double().square().sum()) if self.whole else self.energy * (1 - self.kept)

    def factors(self, distribute: bool = True) -> tuple[Tensor, Tensor]:
        """(B [rows, rank], A [rank, columns]), float32, B A the matrix; the singular values shared evenly, or all in A."""
        left, values, right = self.directions()
        roots = values.sqrt()
        return (left * roots, roots[:, None] * right) if distribute else (left, values[:, None] * right)

    def rounding(self, dtype: str, distribute: bool = True) -> float:
        """||B A - B' A'||_F^2 where B' and A' are the factors as `dtype` (safetensors' spelling) stores them."""
        b, a = self.factors(distribute)
        return product_difference(b, a, b.to(MERGED[dtype]), a.to(MERGED[dtype]))

    def directions(self) -> tuple[Tensor, Tensor, Tensor]:
        try:
            with safe_open(self.file, framework="pt") as file:
                return (file.get_slice("left")[:, : self.rank].contiguous(), file.get_tensor("values")[: self.rank],
                        file.get_slice("right")[: self.rank].contiguous())
        except Exception as error:  # safetensors raises its own type, the operating system another
            raise CorruptedError(f"{self.file}: cannot be read ({error}). Remove {self.file.parent} and begin "
                                 "again.") from error


def spelled(dtypes: Iterable[str]) -> str:
    """'bfloat16' of 'BF16'; several with a comma."""
    return ", ".join(sorted(str(MERGED[one]).removeprefix("torch.") for one in set(dtypes)))


def rounded(value: float) -> float:
    """Four digits: what a report tells of an error."""
    return float(f"{value:.4g}")


def factors_folder(out: Path) -> Path:
    return out.with_name(out.name + ".factors")


def find(folder: Path, key: Any, matrices: Sequence[Matrix], choice: Choice, *, threads: int | None = None,
         memory: str | int | None = None, progress: Callable[[Progress], None] | None = None) -> dict[str, Found]:
    """Compute every matrix's directions, and choose ranks; matrices without any energy are left out.

    Args:
        folder: where they are kept; what a killed call left there is taken up.
        key: tells what is computed (JSON): all that decides it.
    Raises:
        RecipeError: not enough memory for the largest matrix, or a budget that is less than one direction.
        OutputError: the folder cannot be written, or is none of ours.
    """
    with _writing(folder):
        _begin(folder, json.loads(json.dumps(key)))
    order = sorted(range(len(matrices)), key=lambda i: -matrices[i].need(choice.rank))
    limits = {m.name: choice.rank for m in matrices}
    if choice.budget is not None:
        limits |= _first_limits(matrices, choice)
    total, done, finished = sum(m.shape[0] * m.shape[1] * 4 for m in matrices), 0, 0
    found: dict[str, Found] = {}
    open_ = [(i, matrices[i]) for i in order]
    while open_:
        jobs = [(m.need(limits[m.name]), _job(folder / f"{i:04}.safetensors", m, limits[m.name], choice)) for i, m in open_]
        for one in side_by_side(jobs, threads, memory):
            if one.name not in found:
                done, finished = done + one.shape[0] * one.shape[1] * 4, finished + 1
            found[one.name] = one
            if progress is not None:
                progress(Progress(done, total, finished))
        ranks = _ranks(found, choice)
        # A budget may want more of a matrix than was looked for: look further there, and weigh all again.
        short = {n for n, rank in ranks.items() if choice.budget is not None and not found[n].whole
                 and rank >= len(found[n].values) and limits[n] != choice.rank}
        open_ = [(i, m) for i, m in enumerate(matrices) if m.name in short]
        limits |= {m.name: _doubled(limits[m.name], m, choice) for _, m in open_}
    return {m.name: _with_rank(found[m.name], ranks[m.name]) for m in matrices if ranks.get(m.name)}


def side_by_side(jobs: Sequence[tuple[int, Callable[[], T]]], threads: int | None, memory: str | int | None) -> Iterator[T]:
    """Results of jobs (bytes needed, function), as they end. Each computes on one core, so its bits do not depend on how
    many run. Raises RecipeError where the largest does not fit into `memory`."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise RecipeError(f"threads: got {threads!r}, wanted a whole number from 1 on")
    largest = max((need for need, _ in jobs), default=0)
    room = largest + BESIDE
    if memory is not None:
        taken = occupied() + SLACK
        room = parse_size(memory, "--memory") - taken
        if room < largest:
            raise RecipeError(f"--memory {memory} is too little: the program itself takes {taken / 1e6:,.0f} MB and the "
                              f"largest matrix {largest / 1e6:,.0f} MB. Give --memory {(taken + largest) / 1e6 + 1:,.0f}MB or "
                              "more.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers, budget = threads or min(8, cores), Budget(room)

    def run(need: int, job: Callable[[], T]) -> T:
        torch.set_num_threads(1)
        budget.acquire(need)
        try:
            with torch.no_grad():
                return job()
        finally:
            budget.release(need)

    before, pool = torch.get_num_threads(), ThreadPoolExecutor(workers)
    running: set[Future[T]] = set()
    try:
        left = iter(jobs)
        while True:
            while len(running) < workers and (one := next(left, None)) is not None:
                running.add(pool.submit(run, *one))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


# --- one matrix ---


def _job(file: Path, matrix: Matrix, limit: int | None, choice: Choice) -> Callable[[], Found]:
    def job() -> Found:
        known = _read(file, matrix, limit, choice)
        if known is not None:
            return known
        found = matrix.compute(limit, choice.energy)
        if not bool(torch.isfinite(found.values).all()) or found.energy != found.energy:
            raise CorruptedError(f"'{matrix.name}': a NaN or an infinity in an input: such a matrix has no directions. Find "
                                 "which input has it, and make or fetch that one again.")
        with _writing(file.parent):
            partial = file.with_suffix(".partial")
            save_file({"left": found.left.contiguous(), "values": found.values.contiguous(), "right": found.right.contiguous()},
                      partial, {"energy": repr(found.energy), "whole": str(found.whole), "limit": str(limit)})
            os.replace(partial, file)
        return Found(matrix.name, matrix.shape, file, found.values.clone(), found.energy, found.whole)

    return job


def _read(file: Path, matrix: Matrix, limit: int | None, choice: Choice) -> Found | None:
    """What an earlier call found, if it looked as far."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata()
            values = opened.get_tensor("values").clone()
    except Exception:  # cut short by a kill or a full disk: computed again
        return None
    if said.get("limit") != str(limit):
        return None
    return Found(matrix.name, matrix.shape, file, values, float(said["energy"]), said["whole"] == "True")


def _with_rank(found: Found, rank: int) -> Found:
    return Found(found.name, found.shape, found.file, found.values, found.energy, found.whole, rank)


# --- ranks ---


def _ranks(found: Mapping[str, Found], choice: Choice) -> dict[str, int]:
    values = {name: one.values[one.values > choice.least] for name, one in found.items()}
    if choice.budget is not None:
        costs = {name: sum(one.shape) for name, one in found.items()}
        ranks = ranks_for_budget(values, costs, choice.budget)
        if not any(ranks.values()) and any(len(v) for v in values.values()):
            raise RecipeError(f"budget: {choice.budget:,} parameters are less than one direction of a matrix takes "
                              f"({min(costs.values()):,}). Give more.")
        return ranks
    if choice.energy is not None:
        return {name: min(len(values[name]), rank_for(one.values, one.energy, choice.energy)) if one.energy > 0 else 0
                for name, one in found.items()}
    return {name: len(v) for name, v in values.items()}


def _first_limits(matrices: Sequence[Matrix], choice: Choice) -> dict[str, int | None]:
    """Twice the rank that a budget gives each of equals."""
    assert choice.budget is not None
    even = max(8, 2 * choice.budget // max(1, sum(sum(m.shape) for m in matrices)))
    return {m.name: min(even, choice.rank or even, min(m.shape)) for m in matrices}


def _doubled(limit: int | None, matrix: Matrix, choice: Choice) -> int | None:
    further = 2 * (limit or 1)
    if further >= min(matrix.shape) and choice.rank is None:
        return None
    return min(further, choice.rank or further)


# --- the folder ---


def _begin(folder: Path, key: Any) -> None:
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):  # empty: killed before the key
        try:
            same = json.loads((folder / KEY).read_text()) == key
        except (OSError, ValueError) as error:
            raise OutputError(f"{folder} is already there, and is none of ours. Move it, or choose another output folder."
                              ) from error
        if same:
            return
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / KEY, json.dumps(key).encode())


class _writing:
    """Problems with the disk as OutputError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        disk = "No space left" in str(error) or "os error" in str(error).lower()
        if isinstance(error, OSError) or (error is not None and disk):
            raise OutputError(f"{self.folder} cannot be written ({getattr(error, 'strerror', None) or error}). It holds the "
                              "factors until the adapter is whole. Free space, or choose another output folder, and run the "
                              "same command again.") from error
