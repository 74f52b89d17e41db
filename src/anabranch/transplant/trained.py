"""Tokens that were hardly seen in training, told from their rows alone. Pure.

The indicators are those of "Fishing for Magikarp" (Land & Bartolo, arXiv 2405.05417) with the limits of MergeKit's
tokensurgeon: a small input embedding, where the head is a matrix of its own; and likeness to rows that no token has.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SMALLEST, LIKEST = 0.01, 0.99
LEAST_COSINE = 0.5
CHUNK = 8192
RESERVED = (b"unused_token", b"reserved_special_token")


def badly_trained(embedding: Tensor, head: Tensor | None, tokens: np.ndarray,
                  reserved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of the embedding, and which of the head, were hardly trained: two bool [rows].

        unused      no token has the id, or its text says that it is reserved
        embedding   unused; or, where there is a head, a norm below the 1 % quantile; or like the unused
        head        unused; or like the unused. Without a head, as the embedding
        like        a cosine to the mean row of the unused above max(0.5, its 99 % quantile); where nothing is unused, never

    Quantiles are over the rows of tokens. A row of zeros counts as unused.

    Args:
        embedding, head: [rows, width]; None for a tied head.
        tokens: bool [rows], whether a token has this id.
        reserved: bool [rows], whether a token's text says that it is unused.
    """
    norms = _norms(embedding).numpy()
    unused = ~tokens | reserved | (norms == 0)
    bad = unused | _like_unused(embedding, unused, tokens)
    if head is None:
        return bad, bad
    if tokens.any():
        bad = bad | (norms < np.quantile(norms[tokens], SMALLEST))
    return bad, unused | _like_unused(head, unused, tokens)


def _like_unused(matrix: Tensor, unused: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    if not unused.any() or not tokens.any():
        return np.zeros(len(unused), dtype=bool)
    mean = matrix[torch.from_numpy(unused)].float().mean(0)
    norms = _norms(matrix) * mean.norm()
    if float(mean.norm()) == 0:
        return np.zeros(len(unused), dtype=bool)
    along = torch.cat([part.float() @ mean for part in matrix.split(CHUNK)])
    cosines = torch.where(norms > 0, along / norms.clamp_min(1e-30), 0.0).numpy()
    return cosines > max(LEAST_COSINE, float(np.quantile(cosines[tokens], LIKEST)))


def _norms(matrix: Tensor) -> Tensor:
    return torch.cat([part.float().norm(dim=1) for part in matrix.split(CHUNK)])


def is_reserved(text: bytes | None) -> bool:
    """Whether a token's text says that nothing was trained on it."""
    return text is not None and any(word in text for word in RESERVED)
