"""A diagnostic's picture: inline SVG for the page, PNG beside the artifact. Same artifact, same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from anabranch.artifacts import write_atomically
from anabranch.diagnose.artifacts import (
    Calibration,
    Curvature,
    Diagnostic,
    Displacement,
    Generalization,
    GradientMap,
    LinearModeConnectivity,
    LossSurface,
    Perturbation,
)
from anabranch.report import gradient_figures as gradients
from anabranch.report import model_figures as models
from anabranch.report.canvas import WIDTH, Sheet, fit
from anabranch.report.diagnostics import finding
from anabranch.report.displacement_figures import displacement_height, draw_displacement
from anabranch.report.figures import LIGHT, Theme, settings, svg

PIXELS = 1350  # across: 9 inches at 150 dots per inch
TITLE = 13.5


class Drawing(NamedTuple):
    """Height in CSS pixels at width WIDTH, and what draws on a sheet of that size."""

    height: Callable[[Any], float]
    draw: Callable[[Sheet, Any], None]


DRAWINGS: dict[type[Diagnostic], Drawing] = {
    LinearModeConnectivity: Drawing(models.lmc_height, models.draw_lmc),
    Displacement: Drawing(displacement_height, draw_displacement),
    LossSurface: Drawing(models.surface_height, models.draw_surface),
    Generalization: Drawing(models.generalization_height, models.draw_generalization),
    Perturbation: Drawing(models.perturbation_height, models.draw_perturbation),
    Curvature: Drawing(gradients.curvature_height, gradients.draw_curvature),
    Calibration: Drawing(gradients.calibration_height, gradients.draw_calibration),
    GradientMap: Drawing(gradients.map_height, gradients.draw_map),
}


def picture_svg(diagnostic: Diagnostic, name: str) -> str:
    """An inline `<svg>` in the page's colours, light and dark; `name` keeps its ids apart from other figures'."""
    drawing = DRAWINGS[type(diagnostic)]
    height = drawing.height(diagnostic)

    def onto(figure: Figure, theme: Theme) -> None:
        drawing.draw(Sheet(figure, theme, height), diagnostic)

    return svg(name, finding(diagnostic), onto, (WIDTH, height))


def draw_picture(diagnostic: Diagnostic, path: Path, theme: Theme = LIGHT) -> None:
    """Write one PNG, 1350 pixels wide (9 inches at 150 dpi), with the finding as its title. Same artifact, same bytes.

    Raises:
        OutputError: `path` cannot be written.
    """
    drawing = DRAWINGS[type(diagnostic)]
    title = fit(finding(diagnostic), WIDTH - 28, TITLE)
    head = 22 + 19 * (title.count("\n") + 1)
    height = drawing.height(diagnostic)
    with settings():
        figure = Figure(figsize=(WIDTH / 72, (height + head) / 72), dpi=PIXELS / WIDTH * 72, facecolor=theme.paper)
        FigureCanvasAgg(figure)
        figure.text(14 / WIDTH, 1 - 14 / (height + head), title, va="top", fontsize=TITLE, color=theme.ink)
        drawing.draw(Sheet(figure, theme, height, head), diagnostic)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"dpi": (150, 150)})
    write_atomically(path, file.getvalue())
