"""benchmarks.json: what other programs measured on a run's models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from anabranch.artifacts import Artifact, Part
from anabranch.outside.suite import Program

NOT_SAID = "not said"
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Score(Part):
    """One model on one benchmark."""

    model: str = Field(description="of the run: base, branch-K, merged, or an arm of its comparison: merit-3/seed-0")
    program: Program
    task: str = Field(description="lmms-eval's task, or VLMEvalKit's dataset")
    metric: str = Field(description="as the program names it; of a table `row|column`, as its status.json does")
    score: Finite = Field(ge=0, description="points of 100; relative scores (LLaVA-W) may be above")
    samples: int | None = Field(None, ge=1, description="questions asked, where the program says it")
    samples_of: int | None = Field(None, ge=1, description="questions of the whole benchmark, where the program says it")
    judge: str | None = Field(None, description="the language model that judged, where the file's name says it")
    task_version: str | None = None
    program_version: str | None = Field(None, description="its commit or run id, where it says one")
    evaluated: str = Field(description="what the program says it evaluated, or `not said`")
    file: str = Field(description="that the score was read from, relative to the folder that was given")
    sha256: str = Field(description="of that file")


class Benchmarks(Artifact):
    """Sorted by program, task, model. made_from: base."""

    kind: Literal["benchmarks"] = "benchmarks"
    version: Literal[1] = 1
    scores: list[Score]
