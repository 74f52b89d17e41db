"""Matrices as few directions: truncated singular value decompositions, ranks under a budget, joint bases of factors.

    m, n   rows and columns          r   directions kept          k   pairs of factors
    A = U S V^T      kept energy of r directions = sum of the first r s_i^2 / ||A||_F^2

Pure functions; float32 in and out, small systems in float64. Randomness comes in as a generator.
Randomised block Krylov iteration: arXiv 1504.05477, algorithm 2; it keeps more than the power iterations of arXiv 0909.4061
for as many products, and most so where the spectrum is flat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 20  # entries widened to float64 at once
POWER = 4
# Directions below this share of the largest singular value are rounding of float32 data.
ROUNDING = 1e-7
FIRST = 32  # directions tried first where the wanted share of energy tells the rank
ENERGY_ROUNDING = 1e-6


@dataclass(frozen=True)
class LowRank:
    """left * values @ right, the best approximation of a matrix by its strongest directions, or nearly so.

    left     [m, r], orthonormal columns         values   [r], descending, above 0
    right    [r, n], orthonormal rows            energy   ||A||_F^2 of the whole matrix
    whole    all directions that the matrix has are here
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float
    whole: bool = False

    @property
    def kept(self) -> float:
        """Share of the energy that is here, in [0, 1]; 1 for a matrix of zeros."""
        return kept_share(self.values, self.energy)


def kept_share(values: Tensor, energy: float) -> float:
    return min(1.0, float(values.double().square().sum()) / energy) if energy > 0 else 1.0


def energy_of(a: Float[Tensor, "m n"]) -> float:
    """||A||_F^2, summed in float64."""
    rows = max(1, CHUNK // max(1, a.shape[1]))
    return sum(float(a[i : i + rows].double().square().sum()) for i in range(0, a.shape[0], rows))


def low_rank(a: Float[Tensor, "m n"], noise: np.random.Generator, *, count: int | None = None,
             share: float | None = None) -> LowRank:
    """The strongest directions of a matrix.

    Args:
        a: float32, finite.
        noise: where the test matrix of the randomised way is drawn from.
        count: most directions wanted; None for all.
        share: fewest directions that keep this share of the energy, in (0, 1], instead of `count` or below it.
    Returns:
        At most `count` directions. Exact (float64 eigenvectors of the smaller Gram matrix) where a seventh of all
        directions or more are wanted; else found in a random subspace, which keeps slightly less than the best of that rank
        and says how much. With `share` and no `count` the share is always reached.
    """
    most = min(a.shape)
    count = most if count is None else min(count, most)
    energy = energy_of(a)
    if energy == 0 or count == 0:
        return LowRank(a.new_zeros(a.shape[0], 0), a.new_zeros(0), a.new_zeros(0, a.shape[1]), energy, energy == 0)
    tried = count if share is None else min(count, FIRST)
    while True:
        exact = is_exact(tried, most)
        found = _exact(a, energy, count) if exact else _randomised(a, energy, tried, noise)
        if exact or tried >= count or (share is not None and found.kept >= share):
            return found if share is None else first(found, rank_for(found.values, energy, share))
        tried = min(count, tried * 2)


def block_width(count: int) -> int:
    """Columns of the random block from which `count` directions are looked for, in a subspace POWER + 1 times as wide."""
    return max(8, count)


def is_exact(count: int, most: int) -> bool:
    """Whether `count` of `most` directions come from the whole Gram matrix: a wide subspace would cost as much."""
    return 4 * (POWER + 1) * block_width(count) >= 3 * most


def first(found: LowRank, rank: int) -> LowRank:
    """The strongest `rank` of the directions found."""
    whole = found.whole and rank >= len(found.values)
    return LowRank(found.left[:, :rank], found.values[:rank], found.right[:rank], found.energy, whole)


def _exact(a: Tensor, energy: float, count: int) -> LowRank:
    if a.shape[0] > a.shape[1]:
        turned = _exact(a.T, energy, count)
        return LowRank(turned.right.T.contiguous(), turned.values, turned.left.T.contiguous(), energy, turned.whole)
    gram = torch.zeros(a.shape[0], a.shape[0], dtype=torch.float64, device=a.device)
    columns = max(1, CHUNK // a.shape[0])
    for start in range(0, a.shape[1], columns):
        part = a[:, start : start + columns].double()
        gram.addmm_(part, part.T)
    u = torch.linalg.eigh(gram)[1].flip(1)[:, :count].float()
    del gram
    # Projected anew: lengths from eigenvalues of the Gram matrix lose half of the digits, and U U^T A is A itself.
    right = u.T @ a
    values = right.double().norm(dim=1)
    order = torch.argsort(values, descending=True, stable=True)
    order = order[values[order] > ROUNDING * float(values.max())]
    right = right[order]
    right /= values[order].float()[:, None]
    return LowRank(u[:, order].contiguous(), values[order].float(), right, energy, count >= a.shape[0])


def _randomised(a: Tensor, energy: float, count: int, noise: np.random.Generator) -> LowRank:
    """Block Krylov: the span of [A T, (A A^T) A T, .., (A A^T)^q A T], of which the best `count` directions are taken."""
    test = torch.from_numpy(noise.standard_normal((a.shape[1], block_width(count)), dtype=np.float32)).to(a.device)
    blocks = [torch.linalg.qr(a @ test)[0]]
    for _ in range(POWER):
        blocks.append(torch.linalg.qr(a @ (a.T @ blocks[-1]))[0])
    q = torch.linalg.qr(torch.cat(blocks, 1))[0]
    del blocks
    small = q.T @ a
    v, r = torch.linalg.qr(small.T)
    u, values, wt = torch.linalg.svd(r.T.double(), full_matrices=False)
    found = min(count, int((values > ROUNDING * float(values[0])).sum()))
    whole = found < count  # the subspace holds more than the matrix has
    return LowRank(q @ u[:, :found].float(), values[:found].float(), wt[:found].float() @ v.T, energy, whole)


def product_difference(b: Float[Tensor, "m r"], a: Float[Tensor, "r n"], c: Float[Tensor, "m q"], d: Float[Tensor, "q n"],
                       ) -> float:
    """||B A - C D||_F^2, r = q, in float64, with neither product formed: what rounding the factors of one to another costs.

    (B - C) A + C (A - D) is one product X Y, whose squared length is the sum over the entries of X^T X times Y Y^T.
    """
    return product_length(torch.cat([b.double() - c.double(), c.double()], 1),
                          torch.cat([a.double(), a.double() - d.double()], 0))


def product_length(b: Float[Tensor, "m r"], a: Float[Tensor, "r n"]) -> float:
    """||B A||_F^2 in float64, from the Gram matrices of the factors."""
    b, a = b.double(), a.double()
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


# -------------------------------------------------------------------------------------------------------------- ranks


def rank_for(values: Float[Tensor, " r"], energy: float, share: float) -> int:
    """Fewest directions whose squared singular values reach `share` of `energy`; all of them where they do not."""
    # A share counts as reached where only the rounding of float32 data is missing.
    wanted = share * energy * (1 - ENERGY_ROUNDING)
    return min(len(values), int((values.double().square().cumsum(0) < wanted).sum()) + 1)


def ranks_for_budget(spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks of all matrices that together keep the most energy within a number of parameters.

    Directions of all matrices are taken by s^2 per parameter, strongest first, until the next one does not fit any more.
    For matrices of one size these are the largest singular values of the model. The result is the best of its own cost.

    Args:
        spectra: singular values of each matrix, descending.
        costs: parameters of one direction of it: rows plus columns.
        budget: parameters in all.
    """
    names = sorted(spectra)
    gain = np.concatenate([spectra[n].double().square().numpy() / costs[n] for n in names] or [np.zeros(0)])
    owner = np.concatenate([np.full(len(spectra[n]), i) for i, n in enumerate(names)] or [np.zeros(0, int)]).astype(int)
    order = np.argsort(-gain, kind="stable")
    price = np.asarray([costs[n] for n in names], dtype=np.int64)[owner[order]] if names else np.zeros(0, np.int64)
    taken = owner[order][np.cumsum(price) <= budget]
    ranks = np.bincount(taken, minlength=len(names))
    return {name: int(rank) for name, rank in zip(names, ranks, strict=True)}


# ------------------------------------------------------------------------------------------------- the joint core space


def joint_bases(lefts: Sequence[Float[Tensor, "m r"]], rights: Sequence[Float[Tensor, "r n"]],
                ) -> tuple[Float[Tensor, "m p"], Float[Tensor, "q n"], Float[Tensor, "k p q"]]:
    """Bases in which every product of a pair of factors is a small matrix, without loss. Ranks may differ.

        U = left singular vectors of [B_1 .. B_k],   V = right ones of [A_1; ..; A_k],   M_i = U^T B_i A_i V

    so that B_i A_i = U M_i V^T, with p, q <= sum of ranks. Core Space: arXiv 2509.17786, sec. 3.
    Everything comes back in float64.
    """
    u, left_parts = _basis([b.double() for b in lefts])
    v, right_parts = _basis([a.double().T for a in rights])
    cores = torch.stack([b @ a.T for b, a in zip(left_parts, right_parts, strict=True)])
    return u, v.T, cores


def _basis(parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal columns that span all parts [m, r_i], strongest first, and the parts in them [p, r_i]."""
    q, r = torch.linalg.qr(torch.cat(list(parts), 1))
    u, _, _ = torch.linalg.svd(r, full_matrices=False)
    coordinates = u.T @ r
    return q @ u, list(coordinates.split([part.shape[1] for part in parts], 1))


def shared_bases(cores: Float[Tensor, "k p q"], rank: int) -> tuple[Float[Tensor, "p r"], Float[Tensor, "r q"]]:
    """The `rank` directions on each side in which the core matrices have most of their energy together.

    Compress-then-Merge: arXiv 2606.03723; coordinates in these bases are rank x rank, and so is what comes of them.
    """
    left = torch.linalg.svd(torch.cat(list(cores), 1), full_matrices=False)[0][:, :rank]
    right = torch.linalg.svd(torch.cat(list(cores), 0), full_matrices=False)[2][:rank]
    return left, right
