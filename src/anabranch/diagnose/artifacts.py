"""What diagnostics leave: diagnostics/NAME.json, one picture NAME.png beside each.

Losses are means over response tokens, nats. Models are called base, branch-0 .. branch-(K-1), merged and joint. `hash`
leaves `cost` out: it is the one thing here that depends on the clock.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from anabranch.artifacts import Artifact, Part, digest

Verdict = Literal["good", "bad", "none"]


class Cost(Part):
    """A pass is one forward pass over one batch of rows; a backward pass counts as two."""

    predicted_passes: float
    predicted_seconds: float
    measured_passes: float
    measured_seconds: float


class Diagnostic(Artifact):
    """made_from: model -> hash of its weights, `rows` -> hash of the rows, `settings` -> hash."""

    settings: dict[str, float | int | str | list[float] | list[int] | list[str]] = Field(
        description="everything that decides the figures, besides models and rows; `seed` is among it")
    verdict: Verdict = Field(description="`none`: this diagnostic describes and does not judge, or could not tell")
    said: list[str] = Field(description="sentences: what the figures say and what they do not")
    cost: Cost | None = None

    @property
    def hash(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"cost"}))


# ---- connectivity ----------------------------------------------------------------------------------------------------


class Segment(Part):
    """Loss along (1 - a) start + a end."""

    start: str
    end: str
    rows: str = Field(description="mixture (held-out rows of all units), or group-0 .. (those of a group)")
    alphas: list[float]
    losses: list[float]
    barrier: float = Field(description="max_a [L(a) - ((1-a) L(0) + a L(1))], >= 0")
    at: float = Field(description="the a of the barrier")
    low: float = Field(description="interval over blocks of rows of the gap at that a; those of all segments on these rows "
                                   "hold at once in 95 %")
    high: float


class LinearModeConnectivity(Diagnostic):
    """lmc.json"""

    kind: Literal["lmc"] = "lmc"
    version: Literal[1] = 1
    blocks: dict[str, int] = Field(description="rows -> random blocks of 8 rows behind the intervals")
    segments: list[Segment]


# ---- displacement ----------------------------------------------------------------------------------------------------


class ModelDisplacement(Part):
    model: str
    norm: float = Field(description="L2 norm of model - base")
    relative: float = Field(description="norm / L2 norm of the base")
    by_layer: dict[str, float] = Field(description="layer (its number, or the top module's name) -> L2 norm there")
    by_type: dict[str, float] = Field(description="attention, mlp, norm, embedding, head, other -> L2 norm there")


class ContractionCheck(Part):
    """Eq. 11 with weights: sum_k w_k |tau_k|^2 = |tau_bar|^2 + sum_k w_k |tau_k - tau_bar|^2, each side summed on its own."""

    branches: float
    merged: float = Field(description="|tau_bar|^2 of the weighted mean of the branches")
    spread: float
    error: float = Field(description="|branches - merged - spread| / branches")
    merged_from_file: float | None = Field(description="|merged - base|^2 of the merged model itself")
    is_average: bool | None = Field(description="whether the merged model is that mean, to its rounding")


class Displacement(Diagnostic):
    """displacement.json"""

    kind: Literal["displacement"] = "displacement"
    version: Literal[1] = 1
    base_norm: float
    parameters: int
    models: list[ModelDisplacement]
    labels: list[str] = Field(description="rows of `cosines`")
    cosines: list[list[float]] = Field(description="between task vectors")
    weights: list[float] = Field(description="of the branches in the merge, sum 1")
    contraction: ContractionCheck | None
    joint_over_merged: float | None = Field(description="|joint - base| / |merged - base|; the paper: 2.43 to 2.92")


# ---- surface ---------------------------------------------------------------------------------------------------------


class Mark(Part):
    model: str
    x: float
    y: float
    off: float = Field(description="distance of the model from the plane, same unit as x and y")
    loss: float = Field(description="of the model itself, not of its foot on the plane")


class LossSurface(Diagnostic):
    """surface.json: loss over the plane through three models; x and y are L2 distances in parameter space."""

    kind: Literal["surface"] = "surface"
    version: Literal[1] = 1
    corners: list[str] = Field(description="three models; the first is the origin, the second lies on the x axis")
    rows: str
    x: list[float]
    y: list[float]
    losses: list[list[float]] = Field(description="[len(y)][len(x)]")
    marks: list[Mark]


class FittedModel(Part):
    model: str
    epochs: float | None = Field(description="passes over the mixture that it was trained for; null: not known")
    training: float | None = Field(description="loss on a draw of the mixture's training rows")
    held_out: float = Field(description="loss on held-out rows, means over tokens")
    training_low: float | None = Field(description="95 % intervals over blocks of rows")
    training_high: float | None
    held_out_low: float
    held_out_high: float
    versus_base: float | None = Field(None, description="held-out loss minus the base's; null for the base")
    versus_base_low: float | None = Field(None, description="95 % interval, paired over blocks of rows: far narrower than that "
                                                            "of either loss")
    versus_base_high: float | None = None


class Generalization(Diagnostic):
    """generalization.json: training loss against held-out loss."""

    kind: Literal["generalization"] = "generalization"
    version: Literal[1] = 1
    models: list[FittedModel]


# ---- perturbation ----------------------------------------------------------------------------------------------------


class PerturbationCurve(Part):
    model: str
    noise: Literal["isotropic", "filter"]
    sigmas: list[float] = Field(description="isotropic: standard deviation of every entry; filter: noise norm / row norm")
    loss: float = Field(description="without noise")
    increases: list[list[float]] = Field(description="loss with noise - loss, [draws][sigmas]; same draws for every model")
    area: float = Field(description="under the mean curve from 0 to the largest sigma, trapezoids, nats x sigma")
    area_error: float = Field(description="standard error over draws")


class Perturbation(Diagnostic):
    """perturbation.json"""

    kind: Literal["perturbation"] = "perturbation"
    version: Literal[1] = 1
    curves: list[PerturbationCurve]


# ---- curvature -------------------------------------------------------------------------------------------------------


class Alignment(Part):
    """Conflict axes against top Hessian eigenvectors, both in parameter space."""

    units: list[str] = Field(description="the representative units")
    cosines: list[list[float]] = Field(description="absolute, [axes][eigenvectors]")
    largest: float
    angles: list[float] = Field(description="principal angles between the two spans, degrees, ascending")
    random_mean: float = Field(description="mean largest absolute cosine of Gaussian directions")
    random_std: float
    z: float = Field(description="(largest - random_mean) / random_std")


class MergingGain(Part):
    """What the merge gains on the mean loss of its branches (thm 3.1): predicted by curvature at the base, and measured."""

    rows: str
    quadratic: float = Field(description="1/2 sum_k w_k (tau_k - tau_bar)^T H (tau_k - tau_bar), by Hessian-vector products")
    top: float = Field(description="1/2 sum_l lambda_l Var_w(u_l^T tau) over the top eigenvectors alone")
    measured: float = Field(description="sum_k w_k L(branch_k) - L(mean of the branches)")
    low: float = Field(description="95 % interval of `measured` over rows")
    high: float


class Curvature(Diagnostic):
    """curvature.json: the Hessian of the mean loss at the base."""

    kind: Literal["curvature"] = "curvature"
    version: Literal[1] = 1
    rows: str
    eigenvalues: list[float] = Field(description="largest first, of the Lanczos tridiagonal")
    residuals: list[float] = Field(description="|H u - lambda u| of each, as Lanczos bounds it")
    ritz: list[float] = Field(description="all Ritz values, ascending: the ends of the spectrum and a sketch of its middle")
    steps: int
    hvp: Literal["autodiff", "central_difference"]
    hvp_difference: float = Field(description="|H v by the one - H v by the other| / |H v| on a random v")
    alignment: Alignment | None
    gain: MergingGain | None


# ---- calibration -----------------------------------------------------------------------------------------------------


class UnitCalibration(Part):
    unit: str
    rows: int = Field(description="calibration rows it has")
    sizes: list[int] = Field(description="n, ascending; the last is the reference")
    cosines: list[float] = Field(description="of the n-example gradient with the reference's; the last is 1")
    reliability: list[float] = Field(description="by n: cosine of two disjoint halves, stepped up to n (Spearman-Brown)")
    needed: int | None = Field(description="examples for the wanted reliability; null: no signal at all")


class Calibration(Diagnostic):
    """calibration.json"""

    kind: Literal["calibration"] = "calibration"
    version: Literal[1] = 1
    wanted: float = Field(description="the reliability that `needed` is for")
    units: list[UnitCalibration]
    sizes: list[int] = Field(description="n of the means below")
    mean_cosine: list[float] = Field(description="over units that have so many rows")
    mean_reliability: list[float]


# ---- map -------------------------------------------------------------------------------------------------------------


class MapPoint(Part):
    name: str
    role: Literal["unit", "branch", "merged"]
    group: int | None
    pca: tuple[float, float]
    tsne: tuple[float, float] | None = Field(description="null where there are too few units for t-SNE")


class GradientMap(Diagnostic):
    """map.json: units by their gradients; branches and the merged model by their task vectors, reversed in sign."""

    kind: Literal["map"] = "map"
    version: Literal[1] = 1
    points: list[MapPoint]
    explained: list[float] = Field(description="share of the variance of the two axes")
    linkage: list[tuple[int, int, float, int]] = Field(
        description="average linkage on 1 - cosine over the units (scipy's format), rows of `points` in order")
    cophenetic: float = Field(description="correlation of the dendrogram's distances with 1 - cosine, in [-1, 1]")
    silhouette: float | None = Field(description="of the groups on 1 - cosine, in [-1, 1]; null: fewer than 2 groups")
    no_direction: tuple[float, float] | None = Field(
        None, description="place on the PCA map of what has cosine 0 with every unit; null: not measured")


KINDS: dict[str, type[Diagnostic]] = {
    "lmc": LinearModeConnectivity, "displacement": Displacement, "surface": LossSurface, "generalization": Generalization,
    "perturbation": Perturbation, "curvature": Curvature, "calibration": Calibration, "map": GradientMap}
