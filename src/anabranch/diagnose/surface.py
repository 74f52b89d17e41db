"""The plane through three models: coordinates, and the mixes of the models that stand at its points. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Plane:
    """The plane through three models: 0 is the origin, 1 lies at (`one`, 0), 2 at `two`; L2 distances."""

    one: float
    two: tuple[float, float]

    @classmethod
    def through(cls, gram: Floats) -> Plane:
        """From inner products [2, 2] of model 1 - model 0 and model 2 - model 0.

        Raises:
            ValueError: the three models lie on one line (to a part in a million), or two of them are the same.
        """
        one, other = float(np.sqrt(gram[0, 0])), float(gram[1, 1])
        along = float(gram[0, 1]) / one if one else 0.0
        height = other - along**2
        if one == 0 or height <= 1e-12 * max(other, one**2):
            raise ValueError("three models on one line, or two that are the same, span no plane")
        return cls(one, (along, float(np.sqrt(height))))

    def mix(self, x: float, y: float) -> tuple[float, float, float]:
        """Coefficients of models 0, 1, 2 at (x, y); they sum to 1 and may be negative."""
        c = y / self.two[1]
        b = (x - c * self.two[0]) / self.one
        return 1 - b - c, b, c

    def place(self, products: Floats, square: float) -> tuple[float, float, float]:
        """(x, y, distance from the plane) of a model, from its inner products [2] with models 1 and 2 and its squared
        length, all of differences to model 0."""
        x = float(products[0]) / self.one
        y = (float(products[1]) - x * self.two[0]) / self.two[1]
        return x, y, float(np.sqrt(max(0.0, square - x**2 - y**2)))

    def grid(self, points: int, marks: list[tuple[float, float]], margin: float = 0.2) -> tuple[Floats, Floats]:
        """x and y of a grid of `points` steps along the longer side, with a margin around the corners and the marks."""
        places = np.array([(0.0, 0.0), (self.one, 0.0), self.two, *marks])
        low, high = places.min(axis=0), places.max(axis=0)
        wide = float((high - low).max()) * margin
        low, high = low - wide, high + wide
        step = float((high - low).max()) / (points - 1)
        counts = np.maximum(2, np.round((high - low) / step).astype(int) + 1)
        return np.linspace(low[0], high[0], counts[0]), np.linspace(low[1], high[1], counts[1])
