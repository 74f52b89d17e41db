"""Every plan and result: the project's nouns.

Each stage leaves one JSON artifact (and safetensors beside it) in the run folder. An artifact is strict
(an unknown key is an error), versioned, and canonical: no clock and no host name stands in it, so the same
inputs give the same bytes. `made_from` holds the hashes of what it came from; a stage whose artifact was
made from just the present inputs is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from anabranch.errors import CorruptedError, OutputError, describe_validation_error


def canonical(value: Any) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical spelling."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a reader sees the old file or the whole new one."""
    write_streamed(path, [data])


def write_streamed(path: Path, pieces: Iterable[bytes]) -> None:
    """As `write_atomically`, of pieces that are made one at a time. Raises OutputError; what `pieces` raises passes through."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # its folder may be a file
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"cannot write {path}: {error.strerror or error}. Free space or change `output`, "
                          "then run the same command again: finished work is kept.") from error


class Part(BaseModel):
    """A piece of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Grown(Part):
    """A part whose later fields are written only where they say something, so that what has none of it keeps its hash."""

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_silence(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].get_default():
                written.pop(name, None)
        return written


class Artifact(Part):
    """A JSON file of the run folder."""

    made_from: dict[str, str] = Field(default_factory=dict, description="name of an input -> its hash")

    def save(self, path: Path) -> None:
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        write_atomically(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises CorruptedError if the file is missing, is no JSON, or does not fit."""
        try:
            value = json.loads(path.read_text())
            return cls.model_validate(value)
        except OSError as error:
            raise CorruptedError(f"{path}: cannot be read ({error.strerror}).") from error
        except RecursionError as error:
            raise CorruptedError(f"{path}: not a valid {cls.__name__}: nested without end. Delete it to have it made "
                                 "again.") from error
        except ValueError as error:
            problems = (describe_validation_error(error, cls) if isinstance(error, ValidationError) else [str(error)])
            raise CorruptedError.of(f"{path}: not a valid {cls.__name__}. Mend it, or delete it to have it made again:",
                                    problems) from error

    @property
    def hash(self) -> str:
        return digest(self.model_dump(mode="json"))


class Exclusion(Part):
    """Rows (or a whole unit) left out by rule."""

    unit: str
    rule: Literal["empty_response", "empty_prompt", "over_long", "malformed", "duplicate_held_out", "max_samples",
                  "max_tokens", "too_few_samples", "missing_image", "broken_image", "huge_image", "animated_image"]
    rows: int
    split: Literal["train", "held_out"]
    example: str = Field("", description="where the first such row stands, and what is wrong with it")


class Unit(Grown):
    """One dataset of the mixture, tokenised."""

    later = ("images_file", "images", "image_tokens", "held_out_images")

    name: str
    source: str = Field(description="the path or hub id it came from, as the recipe says it")
    format: str
    file: str = Field(description="tokenised rows, relative to the mixture folder (rows.py)")
    sha256: str = Field(description="of that file")
    rows: int = Field(description="training rows kept")
    epochs: float = Field(description="passes over the rows in one budget; may be fractional")
    samples: int = Field(description="s_t: rows x epochs, what a branch trains on")
    tokens: int = Field(description="n_t: all tokens of those samples, prompts included")
    response_tokens: int = Field(description="tokens of those samples that the loss is taken on")
    held_out_rows: int
    held_out_tokens: int
    held_out_response_tokens: int
    images_file: str | None = Field(None, description="images of both splits, relative to the mixture folder")
    images: int = Field(0, description="images of one budget's samples, repeats counted")
    image_tokens: int = Field(0, description="those of `tokens` that stand for images")
    held_out_images: int = 0

    @property
    def files(self) -> list[str]:
        """What lies in the mixture folder of this unit."""
        return [self.file, *([self.images_file] if self.images_file else [])]


class AuditPart(Part):
    """A stretch of a row as the loss sees it."""

    kind: Literal["prompt", "image", "trained"]
    text: str = Field(description="decoded; of an image the placeholder")
    tokens: int


class AuditRow(Part):
    """The first training row with an image of a unit, for eyes."""

    unit: str
    where: str = Field(description="where the row stands")
    images_file: str
    images: list[int] = Field(description="numbers in that file, in the order of the parts of kind `image`")
    parts: list[AuditPart]


class MixtureVision(Part):
    """How images became tokens; all figures are of one budget."""

    placeholder: str = Field(description="what the chat template writes for an image")
    max_pixels: int | None
    images: int = Field(description="distinct ones of the training rows")
    scaled_down: int = Field(description="of these, larger than `max_pixels` for the model")
    image_tokens: int = Field(description="tokens that stand for images")
    image_tokens_uncapped: int = Field(description="had nothing been scaled down")
    smallest: int = Field(description="tokens of an image of a training row: least, middle and most")
    median: int
    largest: int


class Mixture(Artifact, Grown):
    """mixture/mixture.json: the units, what was left out, and how text became tokens."""

    later = ("vision", "audit")

    kind: Literal["mixture"] = "mixture"
    version: Literal[1] = 1
    units: list[Unit] = Field(description="sorted by name")
    transfer: list[Unit] = Field(description="never trained on: held-out rows only")
    retention: list[Unit] = Field(description="plain text: every token but the first counts")
    excluded: list[Exclusion]
    duplicates_in_train: int = Field(description="training rows that repeat another of the same mixture (kept)")
    duplicates_across: int = Field(description="training rows that also stand in held-out rows (left out of held-out)")
    max_length: int
    chat_template: str = Field(description="'tokenizer', 'plain' or 'custom'; its text is hashed in made_from")
    examples: list[dict[str, str]] = Field(description="one rendered row of some units, prompt and response, for eyes")
    vision: MixtureVision | None = Field(None, description="null: no row has an image")
    audit: list[AuditRow] = Field([], description="one row of each unit with images, sorted by unit")

    @property
    def tokens(self) -> int:
        return sum(u.tokens for u in self.units)

    @property
    def scored_rows(self) -> str:
        """Hash of the rows at all three places."""
        return digest([[u.name, u.sha256] for place in (self.units, self.transfer, self.retention) for u in place])

    def unit(self, name: str) -> Unit:
        return next(u for u in self.units if u.name == name)


class GradientRecord(Part):
    """One unit's gradient sketch."""

    unit: str
    file: str = Field(description="safetensors with `half_a` and `half_b`, relative to the gradients folder")
    sha256: str
    examples: int
    tokens_a: int = Field(description="response tokens behind half_a")
    tokens_b: int


class Gradients(Artifact):
    """gradients/gradients.json"""

    kind: Literal["gradients"] = "gradients"
    version: Literal[1] = 1
    sketch: Literal["fold", "stride", "full"]
    size: int = Field(description="numbers per half and unit")
    parameters: int = Field(description="d', entries of the trainable subset")
    seed: int
    calibration_samples: int
    units: list[GradientRecord]


class SpectralTest(Part):
    """F.10 and F.11 for K = 2^r groups, with H = I and eta = 1: how far branches drift apart, not which arm wins."""

    axes: int
    random_gain: float = Field(description="F.10: expected G_var of a random balanced split")
    pca_bound: float = Field(description="F.11: what a split along the top axes gains at least")
    ratio: float
    above_random: bool


class Conflict(Artifact):
    """conflict/conflict.json; matrices stand in conflict/conflict.safetensors.

    `cosine`, `corrected` [T, T]; `scores` [T, R] (top axes of column-centred PCA of the chosen matrix);
    `gram` [T, T] (inner products of mean gradients), all float64, rows in the order of `units`.
    """

    kind: Literal["conflict"] = "conflict"
    version: Literal[1] = 1
    units: list[str]
    matrix: Literal["cosine", "corrected", "gram"] = Field(description="the one the axes come from")
    explained: list[float] = Field(description="share of variance by axis, largest first")
    norms: list[float] = Field(description="length of each unit's mean gradient (of its sketch)")
    norm_cv: float = Field(description="standard deviation / mean of the norms; small: cosine and raw axes agree")
    norm_max_over_min: float
    reliability: list[float] = Field(description="split-half cosine stepped up to both halves (Spearman-Brown), <= 1")
    unreliable: list[str] = Field(description="units whose two halves do not agree at all (reliability <= 0)")
    cosine_mean: float
    cosine_min: float
    negative_share: float = Field(description="share of unit pairs with cosine < 0")
    most_conflicting: list[tuple[str, str, float]]
    spectral_tests: list[SpectralTest]
    tensors_sha256: str


class PlanUnit(Part):
    unit: str
    group: int | None = Field(description="0 .. K-1; null in a soup, where every branch sees every unit")
    samples: int
    tokens: int
    sha256: str


class PlanGroup(Part):
    group: int
    units: int
    samples: int
    tokens: int
    weight: float = Field(description="w_k = N_k / sum N_j; in [0, 1]")


class Plan(Artifact):
    """plan.json: who trains what. To change it by hand, edit `group` of a unit; `groups` is recomputed from that."""

    kind: Literal["plan"] = "plan"
    version: Literal[1] = 1
    method: str
    seed: int
    units: list[PlanUnit]
    groups: list[PlanGroup]


class BranchManifest(Artifact):
    """branches/K/branch.json, written last: a branch without it is not done.

    made_from: base, plan, data (hash of the group's unit files), train (hash of the trainer's settings).
    """

    kind: Literal["branch"] = "branch"
    version: Literal[1] = 1
    branch: int
    group_units: list[str]
    steps: int
    samples_planned: int
    tokens_planned: int
    tokens_seen: int = Field(description="non-padding tokens that went through the model")
    final_loss: float | None
    losses: list[tuple[int, float]] = Field(description="(optimizer step, mean training loss since the last entry)")
    files: dict[str, str] = Field(description="file of the model folder -> SHA-256")
    software: dict[str, str]
    trainer: str = Field("trl", description="who trained it: trl, command (the recipe's), or returned (`add-branch`)")
    counted: bool = Field(True, description="steps and tokens were counted in training; false: they are the plan's, as the "
                                            "trainer told nothing")


class MergeInput(Part):
    """A model that a merge read. `label` as the config calls it; `hash` over names and hashes of the tensors read, and of
    other files that decide the result (adapter, Fisher information, tokenizer)."""

    label: str
    hash: str
    local: bool = Field(True, description="it was a folder, not a repository of the Hub")


class MergeManifest(Artifact):
    """manifest.json in the merged folder. made_from: base, plan, branch-0 .. branch-(K-1), for a merge of a run."""

    kind: Literal["merge"] = "merge"
    version: Literal[2] = 2
    method: str
    arguments: dict[str, float | int | bool | str | list[float]] = Field(
        {}, description="the method's own parameters, with defaults")
    weights: list[float] = []
    missing: list[int] = Field([], description="branches of the plan that are not in it: a partial merge, whose weights sum "
                                               "to one over the others")
    config: str | None = Field(None, description="the text of the merge config, for `anabranch merge`")
    verb: str | None = Field(None, description="the command that made it, where it is no merge: 'lora extract'")
    settings: dict[str, Any] = Field({}, description="of that command: all that decides the bytes beside the inputs")
    report: dict[str, Any] = Field({}, description="figures of that command")
    found_from: list[str] = Field([], description="folders from which the config's relative paths were looked up, seen from "
                                                  "the merged folder")
    seed: int = 0
    dtype: str
    parameters: int
    displacement: float | None = Field(None, description="L2 norm of merged minus base over all parameters, before rounding")
    branch_displacements: list[float] = []
    inputs: list[MergeInput] = []
    tensors: dict[str, str] = Field({}, description="tensor -> XXH3-128 of dtype, shape and bytes")
    files: dict[str, str] = Field(description="file other than weights -> SHA-256")
    software: dict[str, str] = {}

    @property
    def model_hash(self) -> str:
        """Of the merged model: its tensors and its other files."""
        return digest([self.tensors, self.files])


class UnitScore(Part):
    loss: float = Field(description="mean over response tokens, nats")
    tokens: int
    rows: int
    exact_match: float | None = Field(None, description="share of short-answer rows whose greedy answer is the reference")
    f1: float | None = Field(None, description="token F1 of greedy answers on short-answer rows, in [0, 1]")
    answers: int = Field(0, description="short-answer rows scored")


class Evaluation(Artifact):
    """One model at the three places: held_out, transfer, retention. made_from: model, mixture, settings."""

    kind: Literal["evaluation"] = "evaluation"
    version: Literal[1] = 1
    model: str = Field(description="base, branch-0, .., merged, joint, ..")
    held_out: dict[str, UnitScore]
    transfer: dict[str, UnitScore]
    retention: dict[str, UnitScore]


class ArmRun(Artifact):
    """compare/ARM/seed-S/arm.json: one arm under one seed, written when its evaluation is there."""

    kind: Literal["arm"] = "arm"
    version: Literal[1] = 1
    arm: str
    seed: int
    tokens: int = Field(description="training tokens actually seen by all its branches")
    displacement: float
    branches: int
    alpha: float | None = Field(None, description="joint_matched: share of joint's step that is kept")
    evaluation: str = Field(description="file, relative to the comparison folder")


class ArmSummary(Part):
    arm: str
    place: Literal["held_out", "transfer", "retention"]
    loss: float = Field(description="macro mean over units, mean over seeds")
    loss_low: float | None = Field(description="joint's loss + 95 % interval (paired bootstrap over units) of the "
                                               "difference to joint; null without joint or with fewer than 5 units")
    loss_high: float | None
    loss_by_seed: list[float]
    token_loss: float = Field(description="token-weighted mean over units")
    exact_match: float | None
    f1: float | None
    versus_joint: float | None = Field(description="loss minus joint's; negative: better than joint")
    wins: int = Field(description="units where the arm's loss is lower than joint's by more than the tie margin")
    ties: int
    losses: int
    wilcoxon_p: float | None = Field(description="one-sided signed-rank over seeds, arm better than joint")


class Comparison(Artifact):
    """compare.json: the paper's table on the user's own mixture."""

    kind: Literal["comparison"] = "comparison"
    version: Literal[1] = 1
    seeds: list[int]
    runs: list[ArmRun]
    summary: list[ArmSummary]
    verdict: list[str] = Field(description="sentences; what the figures say and what they do not")


class OperatorPlace(Part):
    """One merged model at one place; losses are nats per response token, differences are against token_weighted."""

    loss: float = Field(description="macro mean over units")
    token_loss: float = Field(description="mean weighted by response tokens")
    exact_match: float | None
    f1: float | None
    difference: float | None = Field(description="loss minus token_weighted's; negative: better; null: it is token_weighted")
    low: float | None = Field(description="95 % interval of `difference` (paired bootstrap over units); null for fewer than 5")
    high: float | None
    wins: int = Field(description="units where its loss is lower than token_weighted's by more than the tie margin")
    ties: int
    losses: int


class OperatorResult(Part):
    """One way to merge the run's branches; or `base`, or `branches`: the branches' own scores, averaged by their weights."""

    name: str
    arguments: dict[str, float | int | bool | str | list[float]] | None = Field(
        description="the method's own parameters, all at their defaults; null for `base` and `branches`")
    displacement: float = Field(description="L2 norm of the model minus the base; of `branches`: their weighted mean")
    folder: str | None = Field(description="the merged model, relative to the run folder")
    bytes: int = Field(description="of its weights on disk")
    places: dict[Literal["held_out", "transfer", "retention"], OperatorPlace]


class Operators(Artifact):
    """merge_methods.json: other merge methods on the same branches. made_from: base, plan, branch-K, evaluation, methods."""

    kind: Literal["operators"] = "operators"
    version: Literal[1] = 1
    weights: list[float] = Field(description="of the branches, the plan's; every method gets the same, and they sum to one")
    results: list[OperatorResult] = Field(description="base, branches, then methods as they were asked for")
    verdict: list[str] = Field(description="sentences; what the figures say and what they do not")


class Interval(Part):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class PilotDrift(Part):
    """F.11 / F.10 for 2^axes groups (SpectralTest.ratio) with a jackknife interval over units: how far branches drift apart."""

    axes: int
    ratio: Interval


class PilotRun(Part):
    """One arm on a small budget under one seed."""

    arm: str
    share: float
    seed: int
    tokens: int = Field(description="training tokens actually seen")
    displacement: float
    alpha: float | None
    evaluation: str = Field(description="file, relative to the run folder")


class PilotPoint(Part):
    share: float
    tokens: int
    loss: float = Field(description="macro mean over units, mean over seeds, nats")
    versus_joint: float


class PilotForecast(Part):
    """One arm at one place: what the pilot measured, and what it forecasts for the full budget. Losses in nats."""

    arm: str
    place: Literal["held_out", "transfer", "retention"]
    points: list[PilotPoint] = Field(description="smallest budget first; for the base the same loss at each")
    loss: Interval
    versus_joint: Interval = Field(description="forecast loss minus joint's; negative: better than joint")
    versus_base: Interval


class PilotScore(Part):
    arm: str
    versus_joint: Interval = Field(description="mean over the places present of the forecast difference to joint")


class PilotAdvice(Part):
    """`split`: several branches and a merge; `joint`: one training; `pull_back`: base + alpha (joint - base)."""

    action: Literal["split", "joint", "pull_back"]
    arm: str
    alpha: float | None = Field(description="of `pull_back`, as at the largest pilot budget")
    lowest: str = Field(description="the arm with the lowest forecast score")
    tied: list[str] = Field(description="arms that this pilot cannot tell from `lowest`, itself included, simplest first")
    known: bool = Field(description="no other arm than the recommended one is tied")


class PilotCost(Part):
    """Seconds are of the arms' own work, over all processes, without starting them."""

    predicted_tokens: int
    predicted_seconds: float
    measured_tokens: int
    measured_seconds: float


class Pilot(Artifact):
    """pilot.json: every arm on small budgets, and what that says about the full one. `hash` leaves `cost` out."""

    kind: Literal["pilot"] = "pilot"
    version: Literal[1] = 1
    shares: list[float] = Field(description="of the full budget, ascending")
    tokens: list[int] = Field(description="training tokens of each share")
    batches: list[int] = Field(description="rows of a step at each share")
    steps: list[int] = Field(description="joint's optimizer steps at each share")
    seeds: list[int]
    full_tokens: int
    full_batch: int
    full_steps: int
    form: str = Field(description="how a pilot's losses become a forecast (outlook.FORMS)")
    trend: float = Field(description="largest weight of the trend in the intervals (outlook.TREND)")
    drift: list[PilotDrift] = Field(description="question 1: how far will the branches drift apart")
    norm_cv: Interval | None = Field(description="spread of the units' gradient norms; null: fewer than 3 units")
    runs: list[PilotRun]
    forecasts: list[PilotForecast] = Field(description="question 2: which arm gives the better model")
    scores: list[PilotScore]
    advice: PilotAdvice
    said: list[str] = Field(description="sentences; what the figures say and what they do not")
    cost: PilotCost | None = None

    @property
    def hash(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"cost"}))
