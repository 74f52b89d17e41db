"""Feeds calibration size and gradient map: both need the run behind the models, its units and their rows.

Gradients are sketched as the gradients stage sketches them (same projection, same seed, same parameters, same draw of
rows), so what is measured here can be set beside what that stage left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file
from torch import nn

from anabranch.artifacts import Conflict, Gradients, Unit
from anabranch.diagnose import gradient_map
from anabranch.diagnose.artifacts import Calibration, GradientMap, MapPoint, UnitCalibration
from anabranch.diagnose.calibration import calibrate, mean_curves, nested_cosine, usable_sizes
from anabranch.diagnose.subject import BASE, MERGED, Live, NotApplicable, Settings, Subject
from anabranch.errors import CorruptedError, ProvenanceError
from anabranch.gradients import Sketch, half_gradient, load_halves
from anabranch.recipe import GradientSection
from anabranch.report.diagnostics import PAPER_CALIBRATION
from anabranch.rows import Rows, generator, load_unit
from anabranch.run import Run

MOST_UNITS = 12  # measured for calibration size; more are drawn from by seed
FEWEST_SIZES = 3
KEPT_NUMBERS = 2**28  # of gradients held at once, 1 GB; a sketch that would need more gives way to a fold
TOLD_SIZES = (50, 100, 200, 400)  # of the paper's, set beside ours in words


def _run_of(subject: Subject) -> Run:
    if subject.run is None:
        raise NotApplicable("wants a run folder: checkpoints alone do not tell the mixture's units and their training rows")
    return subject.run


def _selected(live: Live) -> dict[str, nn.Parameter]:
    """The parameters that gradients are measured on, in the model's order, as the gradients stage has them."""
    return {name: p for name, p in live.parameters.items() if name in set(live.trainable)}


@contextmanager
def _only(live: Live, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """While open, nothing but `chosen` gets a gradient: others' would be kept, and fill memory."""
    before = {name: p.requires_grad for name, p in live.parameters.items()}
    try:
        for name, parameter in live.parameters.items():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for name, parameter in live.parameters.items():
            parameter.requires_grad_(before[name])


# ---- calibration size -----------------------------------------------------------------------------------------------


class _Curve(NamedTuple):
    """A unit whose curve is measured: its training rows in the order in which they are added."""

    unit: Unit
    rows: Rows
    order: np.ndarray
    sizes: list[int]

    def pieces(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each size, the rows that it adds to the one half and to the other."""
        return [(np.sort(self.order[start:end][start % 2 :: 2]), np.sort(self.order[start:end][1 - start % 2 :: 2]))
                for start, end in pairwise([0, *self.sizes])]


def _curves(subject: Subject, settings: Settings) -> tuple[list[_Curve], int]:
    """What is measured, and how many units could be. The order of rows is the gradients stage's draw.

    Raises NotApplicable.
    """
    run = _run_of(subject)
    fit = {u.name: usable_sizes(settings.sizes, u.rows) for u in run.mixture.units}
    able = [u for u in run.mixture.units if len(fit[u.name]) >= FEWEST_SIZES]
    if not able:
        most = max(u.rows for u in run.mixture.units)
        raise NotApplicable(f"no unit has training rows for {FEWEST_SIZES} of the sizes {', '.join(map(str, settings.sizes))}; "
                            f"the largest has {most}")
    drawn = generator(settings.seed, "calibration units").permutation(len(able))[:MOST_UNITS]
    curves = []
    for unit in (able[i] for i in np.sort(drawn)):
        rows = load_unit(run.folder / "mixture" / unit.file, "train")
        order = generator(run.recipe.seed, "calibration", unit.name).permutation(len(rows))
        curves.append(_Curve(unit, rows, order, fit[unit.name]))
    return curves, len(able)


def _section(run: Run, parameters: Mapping[str, nn.Parameter], sizes: int) -> GradientSection:
    """The run's own sketch, unless two sums per size would not fit into memory."""
    section = run.recipe.gradients
    entries = sum(p.numel() for p in parameters.values())
    numbers = {"fold": section.size, "stride": entries // section.stride, "full": entries}[section.sketch]
    return section if 2 * sizes * numbers <= KEPT_NUMBERS else section.model_copy(update={"sketch": "fold"})


def calibration_passes(subject: Subject, settings: Settings) -> float:
    """Forward and backward over each unit's largest size: every row is seen once, however many sizes there are.

    Batches are cut by tokens here, not by rows; they count as the `batch_rows` rows that a pass is elsewhere.
    """
    curves, _ = _curves(subject, settings)
    return sum(_passes(curve.sizes[-1], settings) for curve in curves)


def _passes(rows: int, settings: Settings) -> float:
    return 3.0 * rows / settings.batch_rows


def measure_calibration(subject: Subject, settings: Settings) -> Calibration:
    """Per unit: how far its gradient at the base moves with the number of examples, and how much of it is signal.

    Raises:
        NotApplicable: no run folder, or no unit with rows enough for three sizes.
    """
    run, live = _run_of(subject), subject.live
    curves, able = _curves(subject, settings)
    live.put({BASE: 1.0})
    parameters = _selected(live)
    section = _section(run, parameters, max(len(c.sizes) for c in curves))
    sketch = Sketch(parameters, section, run.recipe.seed)
    units = []
    with _only(live, parameters):
        for i, curve in enumerate(curves):
            subject.tell(f"gradients of {curve.unit.name}", i, len(curves))
            first, second = _sums(curve, live, parameters, sketch, run)
            live.passes += _passes(curve.sizes[-1], settings)
            units.append(calibrate(curve.unit.name, curve.unit.rows, curve.sizes, first, second, settings.wanted_reliability))
    subject.tell("", len(curves), len(curves))
    sizes, cosines, reliabilities = mean_curves(units)
    return Calibration(
        settings={"seed": settings.seed, "row_seed": run.recipe.seed, "sizes": list(settings.sizes), "sketch": section.sketch,
                  "size": sketch.size, "most_units": MOST_UNITS},
        verdict="none", said=_calibration_said(units, able, settings, run), wanted=settings.wanted_reliability, units=units,
        sizes=sizes, mean_cosine=cosines, mean_reliability=reliabilities)


def _sums(curve: _Curve, live: Live, parameters: dict[str, nn.Parameter], sketch: Sketch,
          run: Run) -> tuple[Float[np.ndarray, "S m"], Float[np.ndarray, "S m"]]:
    """Sums of response-token gradients over both halves of the first n rows, for every size n; float32."""
    section, narrow = run.recipe.gradients, run.recipe.model.dtype == "bfloat16"
    sums = np.zeros((2, len(curve.sizes), sketch.size), dtype=np.float32)
    for i, piece in enumerate(curve.pieces()):
        for half, rows in enumerate(piece):
            if i:
                sums[half, i] = sums[half, i - 1]
            if len(rows):
                mean, tokens = half_gradient(live.model, curve.rows, rows, parameters, sketch, section.batch_tokens,
                                             select=live.select, autocast=narrow)
                sums[half, i] += mean * np.float32(tokens)
    return sums[0], sums[1]


def _calibration_said(units: Sequence[UnitCalibration], able: int, settings: Settings, run: Run) -> list[str]:
    sizes, cosines, reliabilities = mean_curves(units)
    whole = len(run.mixture.units)
    lines = [f"{len(units)} of {whole} units measured" + (f", drawn by seed {settings.seed}" if len(units) < able else "")
             + (f"; {whole - able} have too few rows for {FEWEST_SIZES} sizes" if able < whole else "") + "."]
    own = [n for n in sizes if n <= run.recipe.gradients.calibration_samples]
    if own:
        i = sizes.index(own[-1])
        cosine = f", mean cosine with the largest n {cosines[i]:.2f}" if cosines[i] < 1 else ""
        lines.append(f"At n = {sizes[i]}, the largest size within this run's calibration_samples "
                     f"({run.recipe.gradients.calibration_samples}): mean reliability {reliabilities[i]:.2f}{cosine}.")
    counts = [u.needed for u in units]
    known = sorted(n for n in counts if n is not None)
    if known:
        reached = sum(n <= u.sizes[-1] for u, n in zip(units, counts, strict=True) if n is not None)
        lines.append(f"A reliability of {settings.wanted_reliability:g} takes {int(np.median(known)):,} examples in the median "
                     f"({known[0]:,} to {known[-1]:,}); {reached} of {len(units)} units reach it with the rows measured, for "
                     "the others the number is a forecast.")
    if none := [u.unit for u in units if u.needed is None]:
        lines.append(f"No signal at all (the halves do not agree): {', '.join(none)}.")
    lines.append(_shared_rows_line(units))
    lines.append(_paper_line(units))
    return lines


def _paper_line(units: Sequence[UnitCalibration]) -> str:
    """The paper's cosines are with 1000 examples; units that have fewer are set beside them by their reliability."""
    ratios = [np.inf if (last := u.reliability[-1]) <= 0 else u.sizes[-1] * (1 / last - 1) for u in units]
    told = ", ".join(f"n = {n} {np.mean([nested_cosine(n, 1000, r) for r in ratios]):.2f} ({PAPER_CALIBRATION[n]:.2f})"
                     for n in TOLD_SIZES)
    return f"Cosines with 1000 examples that these reliabilities stand for (the paper's, measured): {told}."


def _shared_rows_line(units: Sequence[UnitCalibration]) -> str:
    """What the paper's cosine owes to rows that prefix and reference share, where there is most to say: about half of N."""
    unit = max(units, key=lambda u: (u.sizes[-1], u.unit))
    n, reference = unit.sizes[(len(unit.sizes) - 1) // 2], unit.sizes[-1]
    i = unit.sizes.index(n)
    line = (f"Cosines with the largest n flatter: both gradients share rows. Noise alone gives sqrt(n/N), "
            f"{nested_cosine(n, reference, np.inf):.2f} for {n} of {reference}; {unit.unit} has {unit.cosines[i]:.2f} there")
    if (last := unit.reliability[-1]) > 0:
        ratio = reference * (1 / last - 1)
        line += f", and its reliability at {reference} foretells {nested_cosine(n, reference, ratio):.2f}"
    return line + "."


# ---- the map --------------------------------------------------------------------------------------------------------


class _Units(NamedTuple):
    """What the earlier stages left of T units.

    `similarity` [T, T] is the matrix that the axes come from (the cosine where that is the Gram matrix); `lengths` [T]
    are what a product with each unit is divided by to stand beside it.
    """

    conflict: Conflict
    gradients: Gradients
    similarity: np.ndarray
    gram: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray


def _units_of(run: Run) -> _Units:
    try:
        conflict = Conflict.load(run.folder / "conflict" / "conflict.json")
        gradients = Gradients.load(run.folder / "gradients" / "gradients.json")
    except CorruptedError as error:
        if (run.folder / "conflict" / "conflict.json").exists() and (run.folder / "gradients" / "gradients.json").exists():
            raise
        raise NotApplicable("wants the run's measured conflict: `anabranch run recipe.yaml --until conflict`") from error
    if conflict.units != [r.unit for r in gradients.units] or conflict.made_from.get("gradients") != gradients.hash:
        raise ProvenanceError(f"{run.folder / 'conflict'}: measured on other gradients than {run.folder / 'gradients'} holds. "
                              "Run `anabranch run recipe.yaml --until conflict`.")
    if len(conflict.units) < 3:
        raise NotApplicable(f"the mixture has {len(conflict.units)} units; a map wants three at least")
    tensors = load_file(run.folder / "conflict" / "conflict.safetensors")
    squares = np.diag(tensors["gram"])
    if conflict.matrix == "corrected":
        squares = np.where(tensors["half_products"] > 0, tensors["half_products"], squares)
    return _Units(conflict, gradients, tensors["corrected" if conflict.matrix == "corrected" else "cosine"], tensors["gram"],
                  tensors["scores"][:, :2], np.sqrt(squares))


def map_passes(subject: Subject, settings: Settings) -> float:
    """None: gradients and models are there. Raises NotApplicable without a run."""
    _run_of(subject)
    return 0.0


def measure_map(subject: Subject, settings: Settings) -> GradientMap:
    """Units by the conflict stage's own axes and by t-SNE; branches and the merged model among them by their task vectors.

    Raises:
        NotApplicable: no run folder, no measured conflict, fewer than three units.
        ProvenanceError: conflict and gradients there are of different mixtures.
    """
    run = _run_of(subject)
    units = _units_of(run)
    models = [label for label in subject.labels if label in subject.branches or label == MERGED]
    vectors = _task_vectors(subject, run, units, models)
    rows, mutual = _rows(run, units, vectors)
    matrix, groups = units.conflict.matrix, _groups(subject, units)
    if matrix == "gram":
        # a task vector has no length that compares with a gradient's: it is given the units' root mean square
        length = np.sqrt(np.mean(np.diag(units.gram)))
        products = np.vstack([rows * units.lengths * length, np.zeros(len(groups))])
        placed = gradient_map.project_products(units.gram, units.scores, products)
        further, nowhere = placed[:-1], placed[-1]
    else:
        further = gradient_map.project_rows(units.similarity, units.scores, rows)
        nowhere = gradient_map.no_direction(units.similarity, units.scores)
    places = np.vstack([units.scores, further])
    together = np.block([[units.similarity, rows.T], [rows, mutual]])
    embedded = gradient_map.tsne(together, places)
    tree = gradient_map.dendrogram(units.similarity)
    found = gradient_map.silhouette(units.similarity, groups)
    points = [MapPoint(name=name, role=role, group=group, pca=(float(places[i, 0]), float(places[i, 1])),
                       tsne=None if embedded is None else (float(embedded[i, 0]), float(embedded[i, 1])))
              for i, (name, role, group) in enumerate(_named(subject, units, groups, models))]
    return GradientMap(
        settings={"seed": run.recipe.seed, "matrix": matrix, "sketch": units.gradients.sketch, "size": units.gradients.size,
                  "perplexity": gradient_map.perplexity_for(len(together))},
        verdict="none", said=_map_said(subject, units, groups, found, tree, models, rows, nowhere), points=points,
        explained=units.conflict.explained[:2], linkage=tree.linkage, cophenetic=tree.cophenetic, silhouette=found,
        no_direction=(float(nowhere[0]), float(nowhere[1])))


def _task_vectors(subject: Subject, run: Run, units: _Units, models: Sequence[str]) -> Float[np.ndarray, "E m"]:
    """Sketches of theta_0 - theta, by the projection that the units' gradients went through."""
    parameters = _selected(subject.live)
    entries = sum(p.numel() for p in parameters.values())
    sketch = Sketch(parameters, run.recipe.gradients, run.recipe.seed)
    made_with = (units.gradients.sketch, units.gradients.size, units.gradients.parameters, units.gradients.seed)
    if made_with != (sketch.kind, sketch.size, entries, run.recipe.seed):
        raise ProvenanceError(f"{run.folder / 'gradients'}: sketched with other settings or other parameters than the recipe "
                              "names now. Run `anabranch run recipe.yaml --until conflict`.")
    found = np.zeros((len(models), sketch.size), dtype=np.float32)
    for i, label in enumerate(models):
        subject.tell(f"task vector of {label}", i, len(models))
        sketch.total.zero_()
        for name, parameter in parameters.items():
            sketch.add(name, (subject.live.read(BASE, name) - subject.live.read(label, name)).to(parameter.device))
        found[i] = sketch.total.cpu().numpy()
    return found


def _rows(run: Run, units: _Units, vectors: np.ndarray) -> tuple[Float[np.ndarray, "E T"], Float[np.ndarray, "E E"]]:
    """Similarity of each further point with each unit, and with each other; 0 for a model that did not move."""
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide**2).sum(axis=1, keepdims=True))
    wide = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    rows = np.zeros((len(vectors), len(units.gradients.units)))
    for j, record in enumerate(units.gradients.units):
        a, b = load_halves(run.folder / "gradients", record)
        share = record.tokens_a / (record.tokens_a + record.tokens_b)
        rows[:, j] = wide @ (share * a.astype(np.float64) + (1 - share) * b) / units.lengths[j]
    mutual = np.clip(wide @ wide.T, -1.0, 1.0)
    np.fill_diagonal(mutual, 1.0)
    return np.clip(rows, -1.0, 1.0), mutual


def _groups(subject: Subject, units: _Units) -> list[int | None]:
    planned = {u.unit: u.group for u in subject.plan.units} if subject.plan is not None else {}
    return [planned.get(name) for name in units.conflict.units]


def _named(subject: Subject, units: _Units, groups: Sequence[int | None],
           models: Sequence[str]) -> Iterator[tuple[str, str, int | None]]:
    """(name, role, group) of every point, units first."""
    soup = all(g is None for g in groups)
    for name, group in zip(units.conflict.units, groups, strict=True):
        yield name, "unit", group
    for label in models:
        is_branch = label in subject.branches
        yield label, "branch" if is_branch else "merged", subject.branches.index(label) if is_branch and not soup else None


def _map_said(subject: Subject, units: _Units, groups: Sequence[int | None], found: float | None, tree: gradient_map.Tree,
              models: Sequence[str], rows: np.ndarray, nowhere: np.ndarray) -> list[str]:
    lines = [f"The map's two axes hold {sum(units.conflict.explained[:2]):.0%} of the variance of the {units.conflict.matrix} "
             f"matrix; the dendrogram's distances correlate with 1 - cosine at {tree.cophenetic:.2f}."]
    if found is not None:
        word = "the groups are clusters of their own" if found > 0.25 else (
            "the groups are slices of one cloud, not clusters" if found > -0.05 else "many units lie nearer to another group")
        lines.append(f"Silhouette of the groups {found:+.2f}: {word}.")
        if pair := gradient_map.together_and_apart(units.similarity, groups):
            lines.append(f"Mean cosine of two units of one group {pair[0]:+.3f}, of different groups {pair[1]:+.3f}.")
    run = _run_of(subject)
    sources = {u.name: u.source for u in run.mixture.units}
    if pair := gradient_map.together_and_apart(units.similarity, [sources.get(n) for n in units.conflict.units]):
        lines.append(f"Mean cosine of two units of one source {pair[0]:+.3f}, of different sources {pair[1]:+.3f}: sources "
                     f"{'lie together' if pair[0] > pair[1] else 'do not lie together'}.")
    return lines + _models_said(subject, units, groups, models, rows, nowhere)


def _models_said(subject: Subject, units: _Units, groups: Sequence[int | None], models: Sequence[str], rows: np.ndarray,
                 nowhere: np.ndarray) -> list[str]:
    """Which units the models went with, by their cosines: where they lie on the map says little while those are small."""
    lines = []
    home = {k: models.index(label) for k, label in enumerate(subject.branches) if label in models and k in groups}
    if home and len(set(groups)) > 1:
        nearest = gradient_map.nearest_groups(rows, groups)
        lines.append(f"{sum(nearest[i] == k for k, i in home.items())} of {len(home)} branches have a larger mean cosine with "
                     "their own group's units than with any other group's.")
        each = [(float(rows[i][[g == k for g in groups]].mean()), float(rows[i][[g != k for g in groups]].mean()))
                for k, i in home.items()]
        lines.append(f"Mean cosine of a branch's step (reversed) with its own units' gradients "
                     f"{np.mean([a for a, _ in each]):+.3f}, with the others' {np.mean([b for _, b in each]):+.3f}.")
    if MERGED in models:
        mine = rows[models.index(MERGED)]
        lines.append(f"The merged model's step, reversed, has a mean cosine of {mine.mean():+.3f} with the units' gradients at "
                     f"the base, and a negative one with {int((mine < 0).sum())} of {len(mine)}.")
    spread = float(np.sqrt((units.scores**2).sum(axis=1).mean()))
    if models and spread > 0:
        away = float(np.linalg.norm(nowhere)) / spread
        lines.append(f"The models' cosines with the units lie between {rows.min():+.3f} and {rows.max():+.3f}. What has cosine "
                     f"0 with every unit lies {away:.2f} times the units' spread from their centre, at the mark \"no direction "
                     "in common\": models of small cosines lie near that mark whatever they learned, and their place among "
                     "the units says little, in t-SNE too.")
    return lines
