"""Gram matrices and the two ends of their spectrum, by BLAS and LAPACK with the interpreter's lock released.

    A [l, s]   a task vector's matrix, stood up so that the small side is the columns
    G [s, s]   A^T A, column-major, lower triangle: its eigenvalues are the squared singular values of A

LAPACK can compute the eigenvectors of the two ends alone. scipy's own wrappers of these routines hold the lock while they
run, so threads would wait for each other; the same routines stand behind `scipy.linalg.cython_blas` and `cython_lapack`,
where ctypes can call them. They are called only where scipy declares them exactly as is known here and they agree with numpy
on a small matrix. Elsewhere numpy does it all (`a.T @ a`, `np.linalg.eigh`, which release the lock too).

What the first way gains, on one core: a Gram matrix of 768 x 768 in 11 ms and its ends in 38, numpy's in 14 and 87. Of the
whole measure of 20 models of 22 million parameters 24 s of processor in place of 43, that is 1.8 times.

float64 throughout, one thread per call.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas, cython_lapack

from anabranch.mergeability.metrics import SPECTRUM

Floats = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
# LAPACK's blocks: of columns reduced together.
BLOCK = 32
# From this size on only the wanted eigenvectors are computed; below, all are, which is as fast.
SELECTIVE = 192
# The routines' arguments, all by reference: c char, i C int (32 bits), d double.
ARGUMENTS = {"dsyrk": "cciiddiddi", "dsytrd": "cididdddii", "dsterf": "iddi", "dstebz": "cciddiidddiidiidii",
             "dstein": "iddidiididiii", "dormtr": "ccciididdidii"}

_NAME = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)
_POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)


def _kinds(signature: str) -> str | None:
    """The arguments of a capsule's C signature, written as in ARGUMENTS; None where one is not known: an integer of another
    width would be read beyond its end."""
    found = re.fullmatch(r"void \((.*)\)", signature)
    types = {"char *": "c", "int *": "i", "double *": "d", "__pyx_t_5scipy_6linalg_11cython_blas_d *": "d",
             "__pyx_t_5scipy_6linalg_13cython_lapack_d *": "d"}
    kinds = [types.get(part.strip(), "?") for part in found[1].split(",")] if found else ["?"]
    return None if "?" in kinds else "".join(kinds)


def _routine(module: Any, name: str) -> Any:
    """The Fortran routine `name`; None where it is not declared as ARGUMENTS has it."""
    try:
        capsule = module.__pyx_capi__[name]
        said = _NAME(("PyCapsule_GetName", ctypes.pythonapi))(capsule)
        if _kinds(said.decode()) != ARGUMENTS[name]:
            return None
        return ctypes.CFUNCTYPE(None)(_POINTER(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, said))
    except (AttributeError, KeyError, ValueError):  # no such table, routine or capsule
        return None


@cache
def _routines() -> dict[str, Any]:
    """All of ARGUMENTS, or none: one alone is of no use."""
    found = {name: _routine(cython_blas if name == "dsyrk" else cython_lapack, name) for name in ARGUMENTS}
    return {} if None in found.values() else found


@cache
def native() -> bool:
    """Whether LAPACK is called directly: its routines are there, and right about a matrix of five columns."""
    if not _routines():
        return False
    x = np.sin(np.arange(35.0)).reshape(7, 5) + np.eye(7, 5)
    grams = [np.zeros((5, 5), order="F") for _ in range(2)]
    _add_gram(x, grams[0], rows=False)
    _add_gram(np.ascontiguousarray(x.T), grams[1], rows=True)
    values, vectors = np.linalg.eigh(x.T @ x)
    try:
        found = _selected(grams[0], 2, 3)
    except ArithmeticError:
        return False
    # of eigenvectors the sign is free
    turned = np.abs(np.hstack([found.low, found.top[:, ::-1]]).T @ vectors)
    return bool(np.allclose(np.tril(grams[1]), np.tril(x.T @ x), atol=1e-12) and np.allclose(found.values[::-1], values)
                and np.allclose(turned, np.eye(5), atol=1e-9))


def _call(name: str, *arguments: str | int | float | np.ndarray) -> int:
    """Fortran's calling convention: everything by reference. Returns `info`, which dsyrk has not: 0."""
    passed = [ctypes.c_char_p(a.encode()) if isinstance(a, str) else ctypes.byref(ctypes.c_int(a)) if isinstance(a, int)
              else ctypes.byref(ctypes.c_double(a)) if isinstance(a, float) else ctypes.c_void_p(a.ctypes.data)
              for a in arguments]
    info = ctypes.c_int(0)
    _routines()[name](*passed, *([ctypes.byref(info)] if name != "dsyrk" else []))
    return int(info.value)


def add_gram(x: Floats, into: Floats, *, rows: bool) -> None:
    """into += x x^T (`rows`) or x^T x; only the lower triangle can be relied on.

    Args:
        x: [r, c], row-major. into: [r, r] or [c, c], column-major.
    """
    r, c = x.shape
    assert x.flags.c_contiguous and into.flags.f_contiguous and len(into) == (r if rows else c)
    if native():
        _add_gram(x, into, rows)
    else:
        into += x @ x.T if rows else x.T @ x


def _add_gram(x: Floats, into: Floats, rows: bool) -> None:
    r, c = x.shape
    # To Fortran the row-major x is the column-major x^T [c, r].
    _call("dsyrk", "L", "T" if rows else "N", len(into), c if rows else r, 1.0, x, c, 1.0, into, len(into))


@dataclass(frozen=True)
class Ends:
    """What the metrics need of a spectrum. `values`: all eigenvalues, descending; `rank`: how many are surely not zero;
    `top` [s, k]: eigenvectors of the first of these, in their order; `low` [s, p]: of the last, ascending."""

    values: Floats
    rank: int
    top: Floats
    low: Floats

    @property
    def spectrum(self) -> Floats:
        """The leading singular values, descending: SPECTRUM of them, or as many as there are; zero from `rank` on."""
        found: Floats = np.sqrt(np.where(np.arange(len(self.values)) < self.rank, self.values, 0.0)[:SPECTRUM])
        return found


def ends(gram: Floats, first: int, last: int) -> Ends:
    """Eigenvalues of `gram` (lower triangle, overwritten), eigenvectors of the `first` and of the `last`.

    What float64 cannot tell from zero in a Gram matrix, below s times its relative spacing of the largest eigenvalue, are
    singular values below sqrt(s) x 1.5e-8 of the largest (s = 768: 4e-7). Where these are few, they are among the `last`, so
    that the matrix itself can decide about them; where they are many, as of an update of low rank, they are zero, and the
    `last` are those above them.
    """
    s = len(gram)
    if s < SELECTIVE or 2 * (first + last) > s or not native():
        values, vectors = np.linalg.eigh(gram)
        rank, lowest = _zeros(values, last - first)
        return Ends(values[::-1].copy(), rank, np.ascontiguousarray(vectors[:, ::-1][:, : min(first, rank)]),
                    np.ascontiguousarray(vectors[:, lowest : lowest + last]))
    return _selected(gram, first, last)


def _selected(gram: Floats, first: int, last: int) -> Ends:
    """`ends` by LAPACK, no other eigenvectors computed."""
    s = len(gram)
    d, e, tau, work = np.empty(s), np.empty(s - 1), np.empty(s - 1), np.empty(max(s * BLOCK, BLOCK * (first + last)))
    _check(_call("dsytrd", "L", s, gram, s, d, e, tau, work, work.size), "dsytrd")
    values = d.copy()
    _check(_call("dsterf", s, values, e.copy()), "dsterf")
    rank, lowest = _zeros(values, last - first)
    found = []
    for low, high in ((s - min(first, rank), s), (lowest, min(s, lowest + last))):
        vectors = _tridiagonal_vectors(d, e, low, high)
        _check(_call("dormtr", "L", "L", "N", s, high - low, gram, s, tau, vectors, s, work, work.size), "dormtr")
        found.append(np.ascontiguousarray(vectors))
    return Ends(values[::-1].copy(), rank, np.ascontiguousarray(found[0][:, ::-1]), found[1])


def _zeros(values: Floats, few: int) -> tuple[int, int]:
    """(how many of the eigenvalues, ascending, are surely not zero; where the last ones begin)."""
    rank = int((values > max(len(values) * EPS * values[-1], 0.0)).sum())
    return rank, 0 if len(values) - rank <= few else len(values) - rank


def _tridiagonal_vectors(d: Floats, e: Floats, low: int, high: int) -> Floats:
    """Eigenvectors [low, high) in ascending order of the tridiagonal matrix of diagonal d, off-diagonal e: [s, high - low],
    column-major. By bisection and inverse iteration; by the full solver where that does not converge."""
    s, count = len(d), high - low
    w, work = np.empty(s), np.empty(5 * s)
    block, split, whole, failed, found = (np.zeros(n, np.intc) for n in (s, s, 3 * s, s, 2))
    info = _call("dstebz", "I", "B", s, 0.0, 0.0, low + 1, high, 0.0, d, e, found[:1], found[1:], w, block, split, work, whole)
    vectors = np.empty((s, count), order="F")
    if info == 0 and found[0] == count:
        info = _call("dstein", s, d, e, count, w, block, split, vectors, s, work, whole, failed)
    if info != 0 or found[0] != count:
        return np.asfortranarray(np.linalg.eigh(np.diag(d) + np.diag(e, -1))[1][:, low:high])
    return np.asfortranarray(vectors[:, np.argsort(w[:count], kind="stable")])


def _check(info: int, routine: str) -> None:
    if info:
        raise ArithmeticError(f"LAPACK's {routine} returned {info}")
