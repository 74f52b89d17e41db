"""What mergeability leaves: metrics.json, predictor.json, predictions.json, suggestion.json.

A *task* is what a model was tuned on, and names the model: one model per task. A *score* is that of a model on a task's
rows, in (0, 1], higher is better: accuracy, or exp(-loss), the likelihood of a response token. A *normalised* score of a
merge is score(merged) / score(the task's own model), averaged over the merged tasks: 1 is "nothing lost".
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from anabranch.artifacts import Artifact, Part, digest

GAP = "fine_tuning_gap"
KNOTS = 65  # quantiles that stand for the training rows of an input


class MeasuredModel(Part):
    """One model and what is known of it alone. Scores are on its own task's rows; None where they were not measured."""

    task: str
    folder: str
    sha256: str = Field(description="of its weights")
    norm: float | None = Field(None, description="L2 norm of the task vector")
    single_score: float | None = Field(None, gt=0, le=1, description="the model's own score on its task")
    base_score: float | None = Field(None, ge=0, le=1, description="the base's score on the same rows")


class MeasuredPair(Part):
    """Metrics that could not be computed are left out, and `Metrics.left_out` says why."""

    task1: str
    task2: str
    metrics: dict[str, float]


class Metrics(Artifact):
    """metrics.json: every pair of models."""

    kind: Literal["mergeability_metrics"] = "mergeability_metrics"
    version: Literal[1] = 1
    base: str
    models: list[MeasuredModel]
    pairs: list[MeasuredPair] = Field(description="i < j in the order of `models`")
    left_out: dict[str, str] = Field(default_factory=dict,
                                     description="metric -> why it was not measured, of any pair or of some")
    excluded_tensors: dict[str, str] = Field(default_factory=dict, description="tensor -> why it is in no metric")
    settings: dict[str, float | int | str] = Field(description="everything that decides the figures but models and rows")
    seconds: dict[str, float] = Field(default_factory=dict, description="what took how long")

    @property
    def hash(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"seconds"}))


class Finite(Part):
    """No NaN and no infinity: they are no JSON."""

    model_config = ConfigDict(allow_inf_nan=False)


class InputColumn(Finite):
    """One input of our rule. `knots`: quantiles of the training rows, ascending."""

    name: str
    side: Literal["own", "partner", "pair"]
    knots: list[float]
    mean: float
    sd: float


class Reach(Finite):
    """What left-out pairs say of a rule where this many of a pair's two tasks were not in the table."""

    unseen: Literal[0, 1, 2]
    pairs: int = Field(description="left-out pairs behind this")
    half_width: float | None = Field(description="of the 90 % interval on the rule's own scale; None: too few pairs to say")
    error: float = Field(description="mean |measured - predicted| normalised score")
    error_of_mean: float = Field(description="the same of a guess that knows only the mean")


class OwnRule(Finite):
    """Our rule of one merge method (rule.py). Lists follow the columns of the design."""

    method: str
    penalty: float
    shrinkage: float | None = Field(description="None: no task effects")
    ceiling: float
    intercept: float
    mean: list[float]
    beta: list[float]
    suffers: dict[str, float] = Field(description="task -> what it loses whoever it is merged with, beyond what beta says")
    harms: dict[str, float] = Field(description="task -> what it costs others")
    reach: list[Reach]


class PublishedRule(Finite):
    """The paper's rule of one merge method; its score is put on the scale of normalised scores by a line."""

    method: str
    weights: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    slope: float
    intercept: float
    reach: list[Reach]


class Trial(Finite):
    """A rule on tasks that it never saw, everything in it (penalties, intervals) made from the other tasks alone."""

    method: str
    rule: str = Field(description="ours, ours without task effects, published, task effects alone, shuffled")
    unseen: Literal[0, 1, 2] = Field(description="0: pairs left out; 1: one task; 2: several tasks, pairs of two of them")
    folds: int
    r: float | None = Field(description="mean over folds of Pearson r within a fold; None where it is not defined")
    sd: float | None = Field(description="of those r over folds")
    coverage: float | None = Field(None, description="share of measured scores within the 90 % interval, of all pairs")
    width: float | None = Field(None, description="mean width of the intervals")
    naive_coverage: float | None = Field(None, description="of the interval that knows only the training scores")
    naive_width: float | None = None
    answered: float | None = Field(None, description="share of pairs for which the rule did not say `cannot say`")
    answered_coverage: float | None = Field(None, description="coverage of these")


class Predictor(Artifact):
    """predictor.json"""

    kind: Literal["mergeability_predictor"] = "mergeability_predictor"
    version: Literal[1] = 1
    rule: Literal["ours", "published"]
    level: float = Field(description="of the intervals")
    tasks: list[str] = Field(description="that it was fitted on")
    gaps: dict[str, float] = Field(description="task -> its fine-tuning gap, by which its model is recognised; empty: unknown")
    pairs: int
    dropped: int = Field(description="pairs of the table left out because a value was missing")
    columns: list[InputColumn]
    ours: list[OwnRule]
    published: list[PublishedRule]
    trials: list[Trial]
    sets: dict[str, float] = Field(default_factory=dict, description="how merges of more than two are predicted (sets.py)")
    settings: dict[str, int | float | str]

    @model_validator(mode="after")
    def _fits_together(self) -> Predictor:
        width = sum(2 if c.name == GAP else 1 for c in self.columns)
        for own in self.ours:
            if not len(own.beta) == len(own.mean) == width:
                raise ValueError(f"ours, {own.method}: {len(own.beta)} beta and {len(own.mean)} mean; the columns want {width} "
                                 "of both")
        for column in self.columns:
            if len(column.knots) != KNOTS or column.knots != sorted(column.knots):
                raise ValueError(f"columns, {column.name}: got {len(column.knots)} knots, wanted {KNOTS}, ascending")
        for paper in self.published:
            if not set(paper.weights) == set(paper.low) == set(paper.high):
                raise ValueError(f"published, {paper.method}: weights, low and high are of other metrics")
        return self


class Moved(Part):
    """What moved a prediction away from the middle of the table. `points`: hundredths of the normalised score.

    Those of all inputs add up to the whole way.
    """

    input: str
    points: float


class Prediction(Part):
    """One pair under one merge method. Without `score`, `cannot_say` says why."""

    task1: str
    task2: str
    method: str
    unseen: Literal[0, 1, 2] = Field(description="how many of the two tasks the predictor never saw")
    score: float | None
    low: float | None
    high: float | None
    kept: list[float] = Field(description="score(merge) / score(own model) of task1 and task2; empty with the published rule")
    moved: list[Moved]
    cannot_say: str = ""


class Predictions(Artifact):
    """predictions.json"""

    kind: Literal["mergeability_predictions"] = "mergeability_predictions"
    version: Literal[1] = 1
    rule: Literal["ours", "published"]
    level: float
    predictions: list[Prediction]
    said: list[str] = Field(description="what to know of the models that were asked about")


class SuggestedSet(Part):
    """Models to merge together. `score`: mean normalised score as predicted; `gain`: score times own model, less the base."""

    tasks: list[str]
    method: str
    score: float
    kept: dict[str, float]
    low: float | None = Field(None, description="of a pair: its interval, as `predict` has it")
    high: float | None = None
    gain: float | None = Field(description="mean over the tasks of predicted score - base score; None where these are unknown")


class Suggestion(Artifact):
    """suggestion.json"""

    kind: Literal["mergeability_suggestion"] = "mergeability_suggestion"
    version: Literal[1] = 1
    k: int
    searched: str = Field(description="all sets, or how they were searched")
    best: list[SuggestedSet] = Field(description="best first")
    methods: list[SuggestedSet] = Field(description="the best set of every method")
    said: list[str]
