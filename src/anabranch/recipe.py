"""The recipe: one YAML, validated.

`load_recipe` names every problem it finds in one message. Sections stand in the order of the pipeline.
Paths in a recipe are relative to the recipe's own folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from anabranch.artifacts import Grown
from anabranch.errors import RecipeError, closest, describe_validation_error

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Format = Literal["auto", "prompt_completion", "alpaca", "messages", "sharegpt", "text"]
# What the trainer is told by the pipeline, so that branches agree; a recipe may not set them.
OWNED_BY_PIPELINE = ("output_dir", "seed", "data_seed", "max_steps", "max_length", "report_to", "do_train", "do_eval",
                     "resume_from_checkpoint", "packing", "dataset_text_field", "assistant_only_loss",
                     "completion_only_loss", "eval_strategy", "enable_jit_checkpoint",
                     "include_num_input_tokens_seen", "dataset_kwargs",
                     "remove_unused_columns", "save_only_model", "push_to_hub")


def read_yaml(text: str) -> Any:
    """A YAML value as recipes read it: safe types only, no key twice, 2e-5 a number. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # a SafeLoader underneath
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a date in month 13; brackets without end
        raise yaml.YAMLError(str(error)) from error


def read_documents(text: str) -> list[Any]:
    """Every document of a YAML text, each as `read_yaml` reads it; an empty one is None. Raises yaml.YAMLError."""
    try:
        return list(yaml.load_all(text, Loader=_UniqueKeys))
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section, Grown):
    """The base: every branch starts from it."""

    later = ("freeze",)

    path: str = Field(description="Hub id or folder")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute precision; master weights are fp32")
    trainable: list[str] = Field(["*"], min_length=1, description="patterns over parameter names; the rest is frozen")
    freeze: list[str] = Field([], description="does not train, whatever `trainable` says: patterns, or vision tower, "
                                              "projector, language model (shown for the model's family before they are used)")
    lora: dict[str, Any] | None = Field(None, description="peft.LoraConfig arguments; null trains the weights themselves")
    trust_remote_code: bool = False


    @field_validator("freeze", "trainable", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"wanted a list, as in [{value}]")
        return value

    @model_validator(mode="after")
    def _one_subset(self) -> Model:
        if self.lora is not None and self.trainable != ["*"]:
            raise ValueError("`trainable` says which weights train, `lora` says which get adapters (its "
                             "`target_modules`): give one of them")
        return self


class Source(Section, Grown):
    """Where rows come from: a Hub dataset id, a file or a glob (.json .jsonl .parquet .csv, .gz and .zst of them;
    .zip with such files and images in it)."""

    later = ("images",)

    path: str
    unit: str | None = Field(None, description="name of the unit; default: the file's or the dataset's name")
    unit_column: str | None = Field(None, description="a column whose values name the units")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Format = "auto"
    columns: dict[str, str] = Field({}, description="our name -> the file's: {prompt: question, completion: answer}")
    images: str | None = Field(None, description="folder or .zip that image paths start from; null: where the rows are")
    held_out: Fraction | str | None = Field(None, description="a fraction of the rows, or a path (Hub: a split)")
    max_samples: int | None = Field(None, ge=1, description="training rows per unit, drawn by seed")
    max_tokens: int | None = Field(None, ge=1, description="training tokens per unit and pass")
    epochs: float | None = Field(None, gt=0, description="passes over the unit; may be fractional")

    @model_validator(mode="after")
    def _one_name(self) -> Source:
        if self.unit and self.unit_column:
            raise ValueError("give `unit` or `unit_column`, not both")
        return self


class ImageSection(Section):
    """What the images of a mixture may be."""

    max_pixels: int | None = Field(None, ge=784, description="larger images are scaled down to it: a number, or 784x784 as in "
                                                             "MERIT; null: as large as the model's processor takes them")

    @field_validator("max_pixels", mode="before")
    @classmethod
    def _a_product(cls, value: Any) -> Any:
        if isinstance(value, str) and (sides := re.fullmatch(r"(\d{1,6}) ?[xX×] ?(\d{1,6})", value)):
            area = int(sides[1]) * int(sides[2])
            if area < 784:
                raise ValueError(f"{area:,} pixels; at least 784 (28x28) are wanted")
            return area
        if value is not None and type(value) is not int:
            raise ValueError("wanted a number of pixels, WIDTHxHEIGHT as in 784x784, or null")
        if value is not None and value < 784:
            meant = f"; sides are written {value}x{value}, which is {value * value:,}" if value >= 28 else ""
            raise ValueError(f"a number is an area (width times height), and at least 784 (28x28) is wanted{meant}")
        return value


class MixtureSection(Section, Grown):
    later = ("images",)

    sources: list[Source] = Field(min_length=1)
    held_out: Fraction = Field(0.1, description="fraction of each unit kept from training, by hash of the prompt")
    max_samples: int | None = Field(None, ge=1, description="default of the sources")
    max_tokens: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0)
    max_length: int = Field(1024, ge=8, description="longer rows are left out, and named")
    max_held_out: int | None = Field(None, ge=1, description="held-out rows per unit, drawn by seed")
    min_samples: int = Field(2, ge=2, description="units with fewer training rows are left out, and named")
    chat_template: str = Field("auto", description="auto, tokenizer, plain, or a .jinja file")
    images: ImageSection = ImageSection()


class GradientSection(Section):
    calibration_samples: int = Field(200, ge=2, description="training rows per unit behind its gradient")
    sketch: Literal["fold", "stride", "full"] = "fold"
    size: int = Field(2**16, ge=16, description="numbers of a fold sketch, per half and unit")
    stride: int = Field(5, ge=1, description="stride sketch: every n-th entry (the paper: 5)")
    batch_tokens: int = Field(8192, ge=1, description="padded tokens of a batch")


class SplitSection(Section):
    method: Literal["merit", "random", "stratified", "conflict_greedy", "kmeans", "joint", "soup"] = "merit"
    groups: int = Field(4, ge=1, description="K, any integer")
    matrix: Literal["cosine", "corrected", "gram"] = "cosine"
    capacities: list[float] | None = Field(None, description="relative speed (or token budget) of the worker of each group; "
                                                             "null: all equal")


class MergeSection(Section):
    method: str = "token_weighted"
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="of the result; null: the base's")
    max_shard_size: str = "5GB"


class EvaluateSection(Section):
    max_samples: int = Field(100, ge=1, description="held-out rows per unit that are scored")
    short_answer_tokens: int = Field(16, ge=0, description="references up to this long are also answered greedily")
    generate_samples: int = Field(8, ge=0, description="rows per unit that are answered; 0: none")
    branches: bool = True
    batch_tokens: int = Field(16384, ge=1)
    transfer: list[Source] = Field([], description="units that nobody trains on")
    retention: list[Source] | Literal["held_out_prompts", "none"] = Field(
        "held_out_prompts", description="plain text that the base could model before")


class RaySection(Section):
    address: str | None = Field("auto", description="of the cluster's head; null starts a Ray of its own on this machine")
    num_cpus: float = Field(1.0, ge=0, description="of each job")
    num_gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = Field({}, description="custom resources of each job")
    python: str | None = Field(None, description="the interpreter on the nodes; null: the one that launches")


class SlurmSection(Section):
    partition: str | None = None
    time: int | None = Field(None, ge=1, description="minutes of a job; it saves and is queued again when they are over")
    cpus: int = Field(1, ge=1, description="of each job")
    gpus: int = Field(0, ge=0)
    memory: str | None = Field(None, description="as in 32GB")
    parallel: int | None = Field(None, ge=1, description="jobs of an array at a time; null: as many as Slurm starts")
    setup: list[str] = Field([], description="shell lines before each job: module load cuda")
    extra: dict[str, str | int] = Field({}, description="further sbatch options by their own names: {account: abc}")


class ExportSection(Section):
    kind: Literal["shell", "kubernetes"] = "shell"
    workers: int = Field(4, ge=1, description="scripts, or pods at a time")
    image: str | None = Field(None, description="kubernetes: a container image that has anabranch in it")
    gpus: int = Field(0, ge=0, description="kubernetes: of each pod")
    cpus: int = Field(2, ge=1)
    memory: str = "16Gi"
    secret: str | None = Field(None, description="kubernetes: name of a Secret whose keys become environment variables")


class LaunchSection(Section):
    launcher: Literal["local", "ray", "slurm", "export"] = "local"
    store: str | None = Field(None, description="folder or URL (s3://bucket/run, gs://..) that all workers see; null: "
                                                "the run folder itself (local), OUTPUT/store (ray, slurm, export)")
    max_parallel: int = Field(1, ge=1, description="jobs at the same time on this machine (local)")
    threads: int | None = Field(None, ge=1, description="CPU threads per job; null: cores / max_parallel")
    gradient_shards: int = Field(1, ge=1, description="jobs that the gradient stage is cut into")
    lease_seconds: float = Field(120.0, gt=0, le=86400, description="a worker that is silent for so long has lost its job")
    retries: int = Field(3, ge=0, le=1000, description="failures of a job before it is given up; preemptions are free")

    @field_validator("store")
    @classmethod
    def _is_a_place(cls, store: str | None) -> str | None:
        if store is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//)", store):
            raise ValueError("looks like a URL with a slash too few: wanted s3://bucket/run, or a folder")
        return store

    ray: RaySection = RaySection()
    slurm: SlurmSection = SlurmSection()
    export: ExportSection = ExportSection()


class TrainerSection(Section):
    """Who trains a branch."""

    kind: Literal["trl", "command"] = "trl"
    command: list[str] = Field([], description="program, arguments; {base} {data} {out} {settings} {checkpoints} are filled in")

    @model_validator(mode="after")
    def _fits(self) -> TrainerSection:
        if (self.kind == "command") != bool(self.command):
            raise ValueError("`command` (a list: program, then arguments) goes with `kind: command`, and only with it")
        return self


class Recipe(Section):
    model: Model
    mixture: MixtureSection
    gradients: GradientSection = GradientSection()
    split: SplitSection = SplitSection()
    train: dict[str, Any] = Field({}, description="arguments of trl.SFTConfig, by their own names")
    merge: MergeSection = MergeSection()
    evaluate: EvaluateSection = EvaluateSection()
    launch: LaunchSection = LaunchSection()
    trainer: TrainerSection = TrainerSection()
    output: Path = Path("run")
    seed: int = 0

    @field_validator("train")
    @classmethod
    def _not_ours(cls, train: dict[str, Any]) -> dict[str, Any]:
        taken = [key for key in train if key in OWNED_BY_PIPELINE]
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by the pipeline so that every branch agrees; take them out "
                             "(length and epochs per unit are under `mixture`, the seed is `seed`)")
        return train


MERGE_TAG = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice in one mapping."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    said: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value if key_node.tag == MERGE_TAG else loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a list or a mapping cannot be a key", key_node.start_mark)
        if key in said:
            raise yaml.constructor.ConstructorError(None, None, f"key `{key}` stands twice", key_node.start_mark)
        said.add(key)
    loader.flatten_mapping(node)  # `<<: *other`: what stands here itself comes later, and wins
    return {loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value}


# YAML 1.1 takes 2e-5 for text, as it has no point; people mean the number
_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789"))
_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe; paths come back absolute where they exist beside the recipe.

    Args:
        path: the YAML file.
        overrides: dotted key -> value, as from `--set split.groups=8`.
    Raises:
        RecipeError: every problem found, in one message.
    """
    try:
        value = read_yaml(path.read_text())
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error.strerror}). "
                          "`anabranch init recipe.yaml` writes one to start from.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"recipe {path}: the file holds {type(value).__name__}, wanted a mapping with at least "
                          "`model:` and `mixture:`.")
    for dotted, new in (overrides or {}).items():
        here = value
        *parents, last = dotted.split(".")
        for part in parents:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise RecipeError(f"--set {dotted}: `{part}` is not a section of the recipe.")
        here[last] = new
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise RecipeError.of(f"recipe {path}:", describe_validation_error(error, Recipe)) from error
    return _anchored(recipe, path.resolve().parent)


def _anchored(recipe: Recipe, folder: Path) -> Recipe:
    """Relative local paths made absolute; what does not exist locally is left (a Hub id, or an error later)."""

    def local(text: str) -> str:
        if text.startswith(("hf://", "s3://", "gs://")) or Path(text).is_absolute():
            return text
        candidate = folder / text
        looks_local = text.startswith(("./", "../", "~")) or any(c in text for c in "*?[") or candidate.exists()
        return str(Path(text).expanduser() if text.startswith("~") else candidate) if looks_local else text

    def source(s: Source) -> Source:
        held_out = local(s.held_out) if isinstance(s.held_out, str) else s.held_out
        images = local(s.images) if s.images is not None else None
        return s.model_copy(update={"path": local(s.path), "held_out": held_out, "images": images})

    evaluate = recipe.evaluate
    retention = evaluate.retention
    return recipe.model_copy(update={
        "model": recipe.model.model_copy(update={"path": local(recipe.model.path)}),
        "mixture": recipe.mixture.model_copy(update={
            "sources": [source(s) for s in recipe.mixture.sources],
            "chat_template": (local(recipe.mixture.chat_template) if recipe.mixture.chat_template.endswith(".jinja")
                              else recipe.mixture.chat_template)}),
        "evaluate": evaluate.model_copy(update={
            "transfer": [source(s) for s in evaluate.transfer],
            "retention": [source(s) for s in retention] if isinstance(retention, list) else retention}),
        "output": Path(os.path.normpath(folder / recipe.output.expanduser())),
        "launch": recipe.launch.model_copy(update={"store": _anchored_store(recipe.launch.store, folder)}),
    })


def _anchored_store(store: str | None, folder: Path) -> str | None:
    return store if store is None or "://" in store else os.path.normpath(folder / Path(store).expanduser())


def check_train_arguments(train: dict[str, Any], known: set[str]) -> None:
    """Names under `train:` against the trainer's own. Raises RecipeError with every unknown one."""
    problems = [f"train.{key}: the trainer has no such argument.{closest(key, known - set(OWNED_BY_PIPELINE))}"
                for key in train if key not in known]
    if problems:
        raise RecipeError.of("recipe:", [p if len(p) < 400 else p.split(" Known:")[0] for p in problems])
