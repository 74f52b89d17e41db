"""Curvature at the base, of a live model on rows: feeds `curvature`.

H is the Hessian of the mean loss over the response tokens of held-out rows of the mixture (the probe "mixture", which every
subject has, and which no branch was trained on), over the trainable parameters end to end in the model's order. Products
with it are many, so they see ROWS rows of the probe, in batches spread evenly over it (and so over the groups). Everything
here is about that one function: the eigenvectors, the predicted and the measured gain.

Which of the two products drives Lanczos: double backward. It costs 9 passes a batch against 6 of a central difference, and
is exact to rounding, where no step of a central difference in float32 is right along flat and curved directions alike. The
other one is the check.

Memory beside the model: `curvature.lanczos_bytes` (50 + 10 + 4 vectors of d float32: 0.6 GB for 2.4 million parameters,
26 GB for 100 million), and activations of one batch. Where full gradients of four units did not fit, the Lanczos basis would
fit even less; so axes are always lifted with full gradients, never from the sketch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anabranch.artifacts import Conflict
from anabranch.diagnose import curvature
from anabranch.diagnose.artifacts import Alignment, Curvature, MergingGain, Verdict
from anabranch.diagnose.subject import BASE, MIXTURE, Live, NotApplicable, Probe, Settings, Subject
from anabranch.gradients import calibration_halves
from anabranch.model import Batch, padded, response_losses
from anabranch.rows import Rows, load_unit
from anabranch.run import Run

ROWS = 64
# Step of the central differences / norm of the base's trainable parameters: rounding asks for a step in proportion to the
# weights. On the P3 base (norm 169) this is 0.8 % off along a random direction (rounding) and 0.03 % along the first
# eigenvector (truncation). The paper's 0.1, taken as a distance, is 6e-4 of that norm, and 10 % off along the gradient;
# Lanczos driven by it found a largest eigenvalue 16 % too small.
RELATIVE_STEP = 2e-5
TRUSTED = 0.05  # largest difference between the two products
CONVERGED = 0.05  # residual / eigenvalue
AUTODIFF_PASSES, DIFFERENCE_PASSES, GRADIENT_PASSES = 9, 6, 3


def curvature_passes(subject: Subject, settings: Settings) -> float:
    """Forward passes that `measure_curvature` takes, if Lanczos does not end early."""
    probe = _rows(subject, settings)
    count, branches = len(probe.batches), len(subject.branches) if len(subject.branches) > 1 else 0
    steps = min(settings.steps, _entries(subject.live))
    products = (steps + 1 + branches) * AUTODIFF_PASSES + 2 * DIFFERENCE_PASSES
    calibration = sum(len(p.batches) for p in _calibration(subject, settings))
    measured = (branches + 1) * probe.rows if branches else 0
    return float(products * count + GRADIENT_PASSES * calibration + measured)


def measure_curvature(subject: Subject, settings: Settings) -> Curvature:
    """Eigenvalues and eigenvectors at the base, conflict axes against them, merging gain predicted and measured.

    The live model stands at the base afterwards. Raises NotApplicable.
    """
    probe, live = _rows(subject, settings), subject.live
    live.put({BASE: 1.0})
    with _trainable_only(live):
        exact, step = _autodiff(live, probe), RELATIVE_STEP * _base_norm(live)
        spectrum = curvature.lanczos(exact, _direction(live, settings, "lanczos"), settings.steps, settings.top,
                                     lambda done, total: subject.tell("Lanczos", done, total))
        numeric = curvature.central_differences(lambda shift: _gradient_at(live, probe, shift), step)
        subject.tell("check", 0, 2)
        random = _direction(live, settings, "check")
        expected = exact(random)
        difference = curvature.relative_difference(expected, numeric(random))
        first = spectrum.vectors[0]
        along_first = curvature.relative_difference(first * float(spectrum.values[0]), numeric(first))
        live.put({BASE: 1.0})
        alignment = _alignment(subject, settings, spectrum)
        gain = _gain(subject, settings, probe, exact, spectrum) if len(subject.branches) > 1 else None
    live.put({BASE: 1.0})
    verdict: Verdict = "bad" if not difference <= TRUSTED else "none"
    return Curvature(
        settings={"seed": settings.seed, "steps": settings.steps, "top": settings.top, "rows": probe.rows,
                  "batches": len(probe.batches), "difference_step": step, "axes": settings.axes,
                  "representatives": settings.representatives, "random_draws": curvature.RANDOM_DRAWS,
                  "resamples": curvature.RESAMPLES},
        verdict=verdict, said=_said(spectrum, difference, along_first, alignment, gain, subject), rows=probe.name,
        eigenvalues=spectrum.values.tolist(), residuals=spectrum.residuals.tolist(), ritz=spectrum.ritz.tolist(),
        steps=spectrum.steps, hvp="autodiff", hvp_difference=difference, alignment=alignment, gain=gain)


# ---- the loss as a function of a flat vector -------------------------------------------------------------------------


def _rows(subject: Subject, settings: Settings) -> Probe:
    """About ROWS rows of the held-out probe, in whole batches. Raises NotApplicable."""
    if MIXTURE not in subject.probes:
        raise NotApplicable("no held-out rows to take the loss on")
    entries = _entries(subject.live)
    wanted = curvature.lanczos_bytes(entries, settings.steps, settings.top)
    where = next(iter(subject.live.parameters.values())).device
    there = (torch.cuda.mem_get_info(where)[0] if where.type == "cuda"
             else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if wanted > there:
        raise NotApplicable(f"{settings.steps} Lanczos vectors of {entries:,} parameters take {wanted / 1e9:.0f} GB, and there "
                            f"are {there / 1e9:.0f} GB")
    probe = subject.probes[MIXTURE]
    count = min(len(probe.batches), max(1, ROWS // settings.batch_rows))
    return Probe(probe.name, tuple(probe.batches[i * len(probe.batches) // count] for i in range(count)), probe.hash)


def _entries(live: Live) -> int:
    return sum(live.parameters[n].numel() for n in live.trainable)


@contextmanager
def _trainable_only(live: Live) -> Iterator[None]:
    """Frozen parameters take no part in any backward pass."""
    before = {n: p.requires_grad for n, p in live.parameters.items()}
    for name, parameter in live.parameters.items():
        parameter.requires_grad_(name in live.trainable)
    try:
        yield
    finally:
        for name, parameter in live.parameters.items():
            parameter.requires_grad_(before[name])


def _flat(pieces: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in pieces])


def _direction(live: Live, settings: Settings, name: str) -> Tensor:
    like = live.parameters[live.trainable[0]]
    return curvature.random_direction(_entries(live), settings.seed, "curvature", name).to(like.device, like.dtype)


def _base_norm(live: Live) -> float:
    return float(np.sqrt(sum(float(live.read(BASE, n).double().square().sum()) for n in live.trainable)))


def _autodiff(live: Live, probe: Probe) -> curvature.Product:
    """H v where the live model stands."""
    tokens = sum(int(b.response[:, 1:].sum()) for b in probe.batches)

    def losses() -> Iterator[Tensor]:
        for batch in probe.batches:
            yield response_losses(live.model, batch, select=live.select)[0].sum() / tokens
            live.passes += AUTODIFF_PASSES

    inner = curvature.double_backward(losses, [live.parameters[n] for n in live.trainable])

    def product(vector: Tensor) -> Tensor:
        # of PyTorch's attention kernels only the plain one has a second derivative
        try:
            with sdpa_kernel(SDPBackend.MATH):
                found = inner(vector)
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            raise NotApplicable(f"this model has a kernel without a second derivative ({str(error)[:120]})") from error
        if not torch.isfinite(found).all():
            raise NotApplicable("the Hessian at the base is not finite: its weights may hold NaN")
        return found

    return product


def _gradient_at(live: Live, probe: Probe, shift: Tensor) -> Tensor:
    """Gradient of the mean loss at base + shift; leaves the live model there."""
    start = 0
    for name in live.trainable:
        parameter = live.parameters[name]
        piece = shift[start : start + parameter.numel()].view_as(parameter)
        parameter.data.copy_(live.read(BASE, name).to(parameter.device) + piece)
        start += parameter.numel()
    return _flat(live.gradient(probe).values())


# ---- conflict axes ---------------------------------------------------------------------------------------------------


def representatives(run: Run, count: int) -> list[str]:
    """Units at the ends of the conflict axes: the largest and the smallest score on axis 1, then on axis 2, and so on.

    Each unit once; ties go to the name that comes first. The paper takes 4 units and does not say which. Four have three
    conflict directions, which is how many it compares.
    """
    folder = run.folder / "conflict"
    units = Conflict.load(folder / "conflict.json").units
    scores = load_file(folder / "conflict.safetensors")["scores"]
    chosen: list[str] = []
    for axis in scores.T:
        for order in (np.argsort(-axis, kind="stable"), np.argsort(axis, kind="stable")):
            chosen.append(next((units[i] for i in order if units[i] not in chosen), ""))
    return [name for name in chosen if name][:count]


def _calibration(subject: Subject, settings: Settings) -> list[Probe]:
    """Calibration rows of the representatives, those the gradient stage measured, a probe for each; [] without a run."""
    run = subject.run
    if run is None or not (run.folder / "conflict" / "conflict.json").exists():
        return []
    mixture, section = run.mixture, run.recipe.gradients
    where = next(iter(subject.live.parameters.values())).device
    units = {unit.name: unit for unit in mixture.units}
    probes = []
    for name in (n for n in representatives(run, settings.representatives) if n in units):
        rows = load_unit(run.folder / "mixture" / units[name].file, "train")
        drawn = np.concatenate(calibration_halves(rows, name, section.calibration_samples, run.recipe.seed))
        probes.append(Probe(name, tuple(_by_length(rows, drawn, settings.batch_rows, where)), units[name].sha256))
    return probes if len(probes) > 1 else []


def _by_length(rows: Rows, chosen: np.ndarray, batch_rows: int, where: torch.device) -> Iterator[Batch]:
    """Batches as large as the probe's, so that a pass costs about as much."""
    order = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
    for start in range(0, len(order), batch_rows):
        yield padded(rows, order[start : start + batch_rows], where)


def _alignment(subject: Subject, settings: Settings, spectrum: curvature.Spectrum) -> Alignment | None:
    """In float32 throughout, also where the gradient stage runs under bf16 autocast."""
    found = []
    probes = _calibration(subject, settings)
    for i, probe in enumerate(probes):
        subject.tell(f"gradient of {probe.name}", i, len(probes))
        gradient = _flat(subject.live.gradient(probe).values())
        if float(gradient.abs().max()) > 0:
            found.append((probe.name, gradient))
    if len(found) < 2:
        return None
    axes = curvature.conflict_axes(torch.stack([g for _, g in found]), settings.axes)
    return curvature.align(axes, spectrum.vectors, [n for n, _ in found], settings.seed) if len(axes) else None


# ---- merging gain ----------------------------------------------------------------------------------------------------


def _gain(subject: Subject, settings: Settings, probe: Probe, product: curvature.Product,
          spectrum: curvature.Spectrum) -> MergingGain:
    live, labels, weights = subject.live, subject.branches, subject.weights
    where = next(iter(live.parameters.values())).device

    def task_vector(b: int) -> Tensor:
        return _flat(live.read(labels[b], n) - live.read(BASE, n) for n in live.trainable).to(where)

    quadratic = curvature.quadratic_gain(product, task_vector, weights,
                                         lambda *a: subject.tell("predicted gain", *a))
    top = curvature.top_gain(spectrum, task_vector, weights)
    single = Probe(probe.name, tuple(_single_rows(probe.batches)), probe.hash)
    found = []
    for i, mix in enumerate([*({label: 1.0} for label in labels), dict(zip(labels, weights, strict=True))]):
        subject.tell("measured gain", i, len(labels) + 1)
        live.put(mix)
        found.append(live.losses(single))
    measured, low, high = curvature.measured_gain(np.stack(found[:-1]), found[-1], weights, settings.seed)
    return MergingGain(rows=probe.name, quadratic=quadratic, top=top, measured=measured, low=low, high=high)


def _single_rows(given: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of one row each: there are too few whole batches to resample, and rows are as exchangeable."""
    for batch in given:
        for i, row in enumerate(batch.rows):
            width = int(batch.attention_mask[i].sum())
            ids, mask, response = (t[i : i + 1, :width] for t in (batch.input_ids, batch.attention_mask, batch.response))
            yield Batch(np.array([row]), ids, mask, response, batch.images[i : i + 1])


# ---- words -----------------------------------------------------------------------------------------------------------


def _said(spectrum: curvature.Spectrum, difference: float, along_first: float, alignment: Alignment | None,
          gain: MergingGain | None, subject: Subject) -> list[str]:
    sharp = int((spectrum.residuals <= CONVERGED * np.abs(spectrum.values)).sum())
    said = [f"The largest eigenvalue of the Hessian at the base is {spectrum.values[0]:.4g} (right to "
            f"{spectrum.residuals[0]:.1g}), the smallest Ritz value {spectrum.ritz[0]:.4g}; {sharp} of the "
            f"{len(spectrum.values)} eigenvectors have converged (residual within {CONVERGED:.0%} of the eigenvalue)."]
    said.append("Hessian-vector products by automatic differentiation and by central differences differ by "
                f"{difference:.2%} on a random direction and by {along_first:.2%} along the first eigenvector.")
    if not difference <= TRUSTED:
        said.append(f"That is more than {TRUSTED:.0%}: do not trust the figures of this diagnostic.")
    if spectrum.ritz[0] < 0:
        said.append("The Hessian has negative eigenvalues too: the base is no minimum of this loss, and theorem 3.1, which "
                    "supposes H >= 0, holds only as far as the branches stay out of those directions.")
    if gain is not None:
        said += _gain_said(gain)
    if alignment is not None:
        said.append(f"The largest cosine of a conflict axis with a top eigenvector is {alignment.largest:.2f} (random "
                    f"directions {alignment.random_mean:.2g}, z {alignment.z:,.0f}), the leading angle between the spans "
                    f"{alignment.angles[0]:.1f} degrees. A large z says that conflicts do not lie in blindly drawn "
                    "directions, not that they are special among gradients; it grows with the root of the model's size.")
    elif subject.run is None:
        said.append("No run folder, so there are no units and no conflict axes to compare with the eigenvectors.")
    return said


def _gain_said(gain: MergingGain) -> list[str]:
    share = f", {gain.top / gain.quadratic:.0%} of it along the top eigenvectors" if gain.quadratic > 0 else ""
    first = (f"Merging gain on the mean loss of the branches: {gain.quadratic:.4g} nats predicted by the curvature at the base"
             f"{share}; {gain.measured:.4g} measured (95 % interval {gain.low:.4g} to {gain.high:.4g}).")
    if gain.low <= gain.quadratic <= gain.high:
        return [first + " Prediction and measurement agree."]
    return [first + " They do not agree: over the way the branches went the loss is not the quadratic that it is at the base."]
