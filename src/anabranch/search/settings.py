"""What a search file says, in one of two grammars, validated whole.

    native      parameters: {w: {low: 0, high: 1}}  +  merge: a merge config in which `$w` stands
    the peer's  genome: {models, merge_method, ..}, tasks, limit, ..        (mergekit-evolve's file, as it is)

Both take `data`, `objectives`, `sampler`, `budget`, `seed`, `population`, `sigma`, `token_weights` besides. Merge
specification, section 7.7.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from anabranch.errors import RecipeError
from anabranch.recipe import Source
from anabranch.settings_file import Strict, read_settings

OF_TASKS = {"limit", "num_fewshot", "shuffle", "apply_chat_template", "fewshot_as_multiturn", "task_path", "batch_size"}
NAME = re.compile(r"[A-Za-z_]\w*")
# Well-known benchmarks, whose rows a search would fit itself to; the peer refuses the same beginnings of names.
BENCHMARKS = ("mmlu", "hendrycks", "agieval", "gsm8k", "hellaswag", "winogrande", "arc_", "ai2_arc", "truthfulqa", "bigbench",
              "piqa", "openbookqa", "leaderboard")


class ParameterSetting(Strict):
    """One dimension: a float or whole number from `low` to `high` (both possible), or one of `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="steps are factors, not differences")
    type: Literal["float", "int"] = "float"
    start: float | None = Field(None, description="where cma begins; the middle if not given")
    choices: list[bool | int | float | str] | None = Field(None, min_length=2)

    @model_validator(mode="after")
    def _one_kind(self) -> ParameterSetting:
        if self.choices is not None:
            if self.model_fields_set - {"choices"}:
                raise ValueError("`choices` goes alone, without `low`, `high`, `log`, `type` or `start`")
            return self
        if self.low is None or self.high is None:
            raise ValueError("wanted `low` and `high`, or `choices`")
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError("`log` wants `low` above 0")
        if self.type == "int" and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError("`type: int` wants whole numbers as `low` and `high`")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"start {self.start:g} is not between low and high")
        return self


class GenomeSetting(Strict):
    """The peer's `genome`. Models as in a merge config: text, or the object form."""

    models: list[str | dict[str, Any]] = Field(min_length=1)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: str | dict[str, Any] | None = None
    tokenizer_source: str | dict[str, Any] | None = None
    layer_granularity: int = Field(0, ge=0, description="layers of a group; 0: one group. Must divide the depth")
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[str] | None = None
    smooth: bool = False

    @model_validator(mode="after")
    def _fits(self) -> GenomeSetting:
        names = [str(model) for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models: {next(n for n in names if names.count(n) > 1)} stands twice")
        if self.merge_method in ("ties", "dare_ties", "task_arithmetic") and self.base_model is None:
            raise ValueError(f"merge_method {self.merge_method} needs `base_model`")
        if self.filters and (len(set(self.filters)) < len(self.filters) or not all(f.strip() for f in self.filters)):
            raise ValueError("filters: wanted pieces of tensor names, none empty, none twice")
        if self.merge_method == "slerp":
            if len(self.models) < 2:
                raise ValueError("slerp interpolates between two of the models, and one is given")
            if said := [name for name in ("filters", "smooth") if getattr(self, name)]:
                raise ValueError(f"slerp takes no {' and no '.join(said)}")
            if self.base_model is not None and self.base_model not in self.models:
                raise ValueError("with slerp, a `base_model` that is not among `models` would be a third model of every slice "
                                 "(the peer fails there): list it, or leave it out")
        return self


class TaskSetting(Strict):
    """A task of lm-eval: the metric is maximised."""

    name: str
    weight: float = 1.0
    metric: str = "acc,none"

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class ObjectiveSetting(Strict):
    """A part of the score: the mean loss of some units, or some of the tasks."""

    name: str
    units: list[str] | None = Field(None, min_length=1, description="names or patterns with * and ?")
    tasks: list[str] | None = Field(None, min_length=1, description="names of `tasks`")
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _one_kind(self) -> ObjectiveSetting:
        if (self.units is None) == (self.tasks is None):
            raise ValueError("give `units` or `tasks`, one of them")
        return self


class DataSetting(Strict):
    """Rows whose loss is the score. Half of them, by hash, are never searched on."""

    mixture: str | None = Field(None, description="the folder of a run, or its mixture folder")
    places: list[Literal["held_out", "transfer", "retention"]] = Field(["held_out"], min_length=1,
                                                                       description="of a mixture: which of its rows")
    sources: list[Source] = Field([], description="as in a recipe")
    units: list[str] = Field(["*"], min_length=1, description="names or patterns: only these units")
    max_rows: int | None = Field(None, ge=2, description="of a unit, both halves together")
    max_length: int = Field(1024, ge=8, description="of `sources`: longer rows are left out")
    chat_template: str = Field("auto", description="of `sources`: auto, tokenizer, plain, or a .jinja file")
    weighting: Literal["units", "tokens"] = Field("units", description="mean over units, or over response tokens")
    batch_tokens: int | None = Field(None, ge=1, description="padded tokens of a batch; by default 16,384, on a CPU 2,048, as "
                                                             "long batches are padded more")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="the loaded model's; merges are rounded as on disk")

    @model_validator(mode="after")
    def _some(self) -> DataSetting:
        if self.mixture is None and not self.sources:
            raise ValueError("wanted `mixture` (the folder of a run), `sources` as in a recipe, or both")
        if any(not source.path.strip() for source in self.sources) or (self.mixture is not None and not self.mixture.strip()):
            raise ValueError("an empty path")
        return self


class SearchSettings(Strict):
    """The whole file."""

    parameters: dict[str, ParameterSetting] | None = Field(None, min_length=1)
    merge: dict[str, Any] | None = None
    genome: GenomeSetting | None = None
    tasks: list[TaskSetting] = Field([], description="of lm-eval")
    limit: int | None = Field(None, ge=2, description="rows of a task, both halves together")
    num_fewshot: int | None = Field(None, ge=0)
    shuffle: bool = Field(False, description="draw the rows of `limit` instead of taking the first")
    random_init: bool = Field(False, description="of a genome: begin at random instead of the uniform merge")
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True
    task_path: str | None = Field(None, description="a folder with tasks of one's own (lm-eval's --include_path)")
    batch_size: int = Field(8, ge=1, description="of tasks")
    data: DataSetting | None = None
    objectives: list[ObjectiveSetting] | None = Field(None, min_length=1)
    sampler: Literal["cma", "tpe", "nsga2", "random"] = "cma"
    budget: int = Field(100, ge=1, description="candidates of the sampler; random search gets as many")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    population: int | None = Field(None, ge=4, description="of cma and nsga2")
    sigma: float = Field(1 / 6, gt=0, description="cma's first step, as a share of the range")
    token_weights: list[float] | None = Field(None, description="of the models as listed, without the base, for the "
                                              "token-weighted baseline; by default read from the run of `data.mixture`")

    @field_validator("parameters")
    @classmethod
    def _names(cls, value: dict[str, ParameterSetting] | None) -> dict[str, ParameterSetting] | None:
        if odd := [name for name in value or {} if not NAME.fullmatch(name)]:
            raise ValueError(f"{odd[0]!r} is no name: letters, digits and _, no digit first")
        return value

    @field_validator("token_weights")
    @classmethod
    def _positive(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not (all(w >= 0 for w in value) and sum(value) > 0):
            raise ValueError("wanted weights from 0 on, one of them above")
        return value

    @model_validator(mode="after")
    def _whole(self) -> SearchSettings:
        if (self.genome is None) == (self.merge is None):
            raise ValueError("wanted `merge:` with `parameters:` (a template), or `genome:` (mergekit-evolve's grammar)")
        if (self.merge is None) != (self.parameters is None):
            raise ValueError("`parameters:` and `merge:` go together")
        if not self.tasks and self.data is None:
            raise ValueError("nothing says what is good: give `data:` (held-out loss) or `tasks:` (of lm-eval)")
        if not self.tasks and (idle := sorted(self.model_fields_set & OF_TASKS)):
            raise ValueError(f"{', '.join(idle)}: of tasks, and there are none")
        if self.random_init and self.genome is None:
            raise ValueError("random_init: of a genome; a template's parameters have `start`")
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("tasks: one stands twice")
        for objective in self.objectives or []:
            if objective.units is not None and self.data is None:
                raise ValueError(f"objective {objective.name!r} is of units, and there is no `data:`")
            if unknown := [name for name in objective.tasks or [] if name not in names]:
                raise ValueError(f"objective {objective.name!r}: {unknown[0]!r} is not among `tasks`")
        labels = [objective.name for objective in self.objectives or []]
        if len(set(labels)) < len(labels):
            raise ValueError("objectives: two of one name")
        if any(p.choices is not None for p in (self.parameters or {}).values()) and self.sampler == "cma":
            raise ValueError("cma moves along numbers, and a parameter has `choices`: set `sampler: tpe`, nsga2 or random")
        return self


def read_search(path: Path | str | Mapping[str, Any], *, allow_benchmarks: bool = False,
                overrides: Mapping[str, Any] | None = None) -> SearchSettings:
    """The settings of a search file.

    Args:
        allow_benchmarks: tasks with the names of well-known benchmarks are taken.
        overrides: settings given on the command line.
    Raises:
        RecipeError: every problem found, in one message.
    """
    settings, _ = read_settings(path, SearchSettings, "search config")
    if given := {key: value for key, value in (overrides or {}).items() if value is not None}:
        settings, _ = read_settings(settings.model_dump(exclude_unset=True) | given, SearchSettings, "search config")
    known = [t.name for t in settings.tasks if t.name.startswith(BENCHMARKS) and not t.name.endswith("_train")]
    if known and not allow_benchmarks:
        raise RecipeError(f"tasks: {', '.join(known)} {'is a benchmark' if len(known) == 1 else 'are benchmarks'} that models "
                          "are compared by, and a search over its rows makes the figure worthless for that. Search on other "
                          "rows (`data:`, or a task named .._train), or say --allow-benchmark-tasks.")
    return settings
