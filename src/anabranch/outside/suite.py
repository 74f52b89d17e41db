"""The paper's eight benchmarks under both programs' names, where each puts the main metric, and the paper's own table.

Suite: arXiv:2606.01717, A.1.2. Names and layouts were read in the programs' sources: lmms-eval's `lmms_eval/tasks/*/*.yaml`
(`metric_list`) and the aggregation functions in the `utils.py` beside them, which say whether a value is a share of 1 or
points of 100; VLMEvalKit's `vlmeval/dataset/image_mcq.py`, `image_vqa.py` and `vlmeval/dataset/utils/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Program = Literal["lmms-eval", "VLMEvalKit"]
PROGRAMS: tuple[Program, ...] = ("lmms-eval", "VLMEvalKit")


@dataclass(frozen=True)
class Metric:
    """A program's metric: `names` in order of preference, and what makes points of 100 of it."""

    names: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Benchmark:
    """One column of the table.

    lmms_tasks: lmms-eval's tasks for it, the one that is exported first (the others differ in the prompt).
    dataset, dataset_class: of VLMEvalKit's config. kind: the ending of its result file. judged_file: that file's name carries
    the judge's. relative: in percent of a reference's score, so that it may be above 100. needs_judge: by a language model, for
    which the programs want a key (OPENAI_API_KEY).
    """

    name: str
    category: str
    lmms_tasks: tuple[str, ...]
    lmms: Metric
    dataset: str
    dataset_class: str
    kind: Literal["acc", "score"]
    vlmevalkit: Metric
    judged_file: bool = False
    relative: bool = False
    needs_judge: tuple[Program, ...] = ()


# SEED-Bench: the image part. The paper does not say which part it means; its figure for LLaVA-1.5-7B (65.9, Table 3) is near
# that model's published image score (66.1), not near the one over images and videos (58.6).
PAPER: tuple[Benchmark, ...] = (
    Benchmark("SeedBench", "General MCQA", ("seedbench",), Metric(("seed_image",), 100),
              "SEEDBench_IMG", "ImageMCQDataset", "acc", Metric(("split=none|Overall", "Overall"), 100)),
    Benchmark("MMBench", "General MCQA", ("mmbench_en_dev",), Metric(("gpt_eval_score",)),
              "MMBench_DEV_EN", "ImageMCQDataset", "acc", Metric(("split=dev|Overall", "split=none|Overall", "Overall"), 100),
              needs_judge=("lmms-eval",)),
    Benchmark("LLaVA-W", "User Preference & Fluency", ("llava_in_the_wild",), Metric(("gpt_eval_llava_all",)),
              "LLaVABench", "LLaVABench", "score", Metric(("split=overall|Relative Score (main)",)), relative=True,
              needs_judge=PROGRAMS),
    Benchmark("MMVet", "User Preference & Fluency", ("mmvet",), Metric(("gpt_eval_score", "llm_as_judge_eval")),
              "MMVet", "MMVet", "score", Metric(("Category=Overall|acc",)), judged_file=True, needs_judge=PROGRAMS),
    Benchmark("TextVQA", "Text-Rich VQA", ("textvqa_val",), Metric(("exact_match",), 100),
              "TextVQA_VAL", "ImageVQADataset", "acc", Metric(("Overall",))),
    Benchmark("AI2D", "Text-Rich VQA", ("ai2d",), Metric(("exact_match",), 100),
              "AI2D_TEST", "ImageMCQDataset", "acc", Metric(("split=test|Overall", "split=none|Overall", "Overall"), 100)),
    Benchmark("MathVista", "Image Reasoning",
              ("mathvista_testmini_format", "mathvista_testmini_solution", "mathvista_testmini_cot", "mathvista_testmini"),
              Metric(("gpt_eval_score", "llm_as_judge_eval")),
              "MathVista_MINI", "MathVista", "score", Metric(("Task&Skill=Overall|acc",)), judged_file=True,
              needs_judge=PROGRAMS),
    Benchmark("MMMU", "Image Reasoning", ("mmmu_val",), Metric(("mmmu_acc",), 100),
              "MMMU_DEV_VAL", "MMMUDataset", "acc", Metric(("split=validation|Overall",), 100)),
)

# arXiv:2606.01717, Table 2 (Qwen2.5-VL-3B, 136 Vision-FLAN tasks; 3 runs, joint 1 epoch and 3D 5 runs); columns as in PAPER.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "base": (66.8, 79.7, 53.2, 34.0, 61.2, 63.8, 29.6, 41.2),
    "joint, 0.5 epochs": (67.4, 79.4, 40.2, 33.1, 67.2, 60.9, 31.4, 41.6),
    "joint, 1 epoch": (69.2, 80.5, 41.9, 36.4, 68.0, 62.6, 34.2, 41.9),
    "joint, 2 epochs": (70.0, 81.4, 42.8, 37.6, 63.4, 62.5, 36.5, 43.0),
    "random, 8 groups": (69.5, 79.9, 42.2, 35.0, 73.7, 61.7, 33.5, 40.5),
    "MERIT-1D": (71.0, 80.0, 43.1, 35.0, 72.4, 62.1, 36.5, 41.4),
    "MERIT-2D": (70.8, 78.4, 47.4, 36.6, 74.1, 61.5, 36.0, 40.7),
    "MERIT-3D": (70.5, 80.1, 52.0, 37.7, 75.2, 62.5, 35.4, 42.7),
}


def benchmark_of(program: Program, task: str) -> Benchmark | None:
    """The benchmark that a program's task or dataset is, if it is one of the paper's."""
    for known in PAPER:
        if task in (known.lmms_tasks if program == "lmms-eval" else (known.dataset,)):
            return known
    return None
