"""What a run consists of when its stages are shared out: jobs, what each needs, reads and may leave.

    gradients-0 .. gradients-(S-1)  ->  plan  ->  branch-0 .. branch-(K-1)  ->  merge  ->  evaluate-merged
                                                                branch-k  ->  evaluate-branch-k        evaluate-base

A job is done in a folder that looks like a run folder (run.py), holding only what the job reads. So a worker that
trains branch 2 never sees the rows of another group.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

from anabranch.artifacts import Mixture, Plan
from anabranch.errors import CorruptedError
from anabranch.recipe import Recipe
from anabranch.store.artifacts import Checkpoint, Files, Result, StoredRun, check_relative

# No adapter_config.json beside whole weights: transformers would load whatever model that file names instead.
BRANCH_FILES = r"branches/{k}/(branch\.json|model/(?!adapter_)[^/]+|adapter/[^/]+)"
LEAVES = {"gradients": r"gradients/units/[0-9a-f]{{16}}\.safetensors",
          "plan": r"gradients/gradients\.json|conflict/[^/]+|plan\.json",
          "branch": BRANCH_FILES, "merge": r"merged/(?!adapter_)[^/]+", "evaluate": r"evaluation/{label}\.json"}
# Without these a result is none, whatever else is in it.
MUST_LEAVE = {"gradients": (), "plan": ("gradients/gradients.json", "conflict/conflict.json", "conflict/conflict.safetensors",
                                        "plan.json"),
              "branch": ("branches/{k}/branch.json", "branches/{k}/model/config.json"),
              "merge": ("merged/manifest.json", "merged/config.json"), "evaluate": ("evaluation/{label}.json",)}
CHECKPOINT_FILES = r"branches/{k}/checkpoints/checkpoint-{step}/[\x20-\x7e]+"
MARKER = "complete.json"  # of a whole checkpoint (checkpoints.py)
MIXTURE_FILES = re.compile(r"mixture/(mixture\.json|(units|transfer|retention)/[\x20-\x7e]+\.safetensors)")
HARMLESS = re.compile(r"[\x20-\x7e]+\.(safetensors|json|txt|model|jinja|tiktoken|md)")  # a file that holds no program
BASE_FILE = re.compile(r".+\.(safetensors|json|txt|model|jinja|tiktoken)")
LARGEST = 2**44  # bytes of one file that a worker will fetch: 16 TiB


def job_table(recipe: Recipe, groups: int, units: int) -> dict[str, list[str]]:
    """Every job of a run and the jobs that it needs, in the order of the pipeline. `groups`: K."""
    return _table(min(recipe.launch.gradient_shards, units), groups, recipe.evaluate.branches)


def _table(shard_count: int, groups: int, each: bool) -> dict[str, list[str]]:
    shards = [f"gradients-{i}" for i in range(shard_count)]
    branches = [f"branch-{k}" for k in range(groups)]
    jobs: dict[str, list[str]] = {shard: [] for shard in shards}
    jobs["plan"] = shards
    jobs |= {branch: ["plan"] for branch in branches}
    jobs["merge"] = branches
    jobs["evaluate-base"] = []
    if each:
        jobs |= {f"evaluate-{branch}": [branch] for branch in branches}
    jobs["evaluate-merged"] = ["merge"]
    return jobs


def all_needs(run: StoredRun, job: str) -> list[str]:
    """Direct needs, and theirs: the plan behind a branch behind a merge."""
    found: dict[str, None] = {}
    for need in run.jobs[job]:
        found |= dict.fromkeys([*all_needs(run, need), need])
    return list(found)


def stage_of(job: str) -> str:
    """The stage of run.STAGES that a job belongs to."""
    kind = job.split("-")[0]
    return {"gradients": "gradients", "plan": "split", "branch": "train", "merge": "merge", "evaluate": "evaluate"}[kind]


def jobs_until(run: StoredRun, stage: str, stages: tuple[str, ...]) -> list[str]:
    """The jobs of the stages up to `stage`."""
    return [job for job in run.jobs if stages.index(stage_of(job)) <= stages.index(stage)]


def branch_of(job: str) -> int | None:
    """k of branch-k and evaluate-branch-k."""
    match = re.fullmatch(r"(?:evaluate-)?branch-(\d+)", job)
    return int(match.group(1)) if match else None


def needs_base(job: str) -> bool:
    return job.startswith(("gradients-", "branch-", "merge", "evaluate-base"))


def may_travel(path: str) -> bool:
    """May a file of a result or a checkpoint go to another machine? By its name alone: a plain relative path (from the run
    folder or from a folder below it) in printable ASCII, of a kind that is neither a pickle nor a program."""
    try:
        check_relative(path)
    except ValueError:
        return False
    return path.isascii() and path.isprintable() and HARMLESS.fullmatch(path.rsplit("/", 1)[-1]) is not None


def may_be_base(name: str) -> bool:
    """May a file of this name in a base's folder be sent to workers? No adapter, no program, nothing hidden or misleading."""
    try:
        check_relative(name)
    except ValueError:
        return False
    return "/" not in name and is_plain(name) and not name.startswith("adapter_") and BASE_FILE.fullmatch(name) is not None


def may_leave(job: str, path: str) -> bool:
    """Is this a file that the job makes? Nothing else is taken from its result."""
    kind = job.split("-")[0]
    pattern = LEAVES[kind].format(k=branch_of(job), label=re.escape(job.removeprefix("evaluate-")))
    return re.fullmatch(pattern, path) is not None and may_travel(path)


def check_run(run: StoredRun, where: str) -> None:
    """Whether run.json is one that `job_table` and `distribute.send_run` could have made: no other jobs, no other needs (so no
    ring of them), no file that could be a program or lead elsewhere. Raises CorruptedError, all problems in one message."""
    names = list(run.jobs)
    shards, groups = (sum(name.startswith(kind) for name in names) for kind in ("gradients-", "branch-"))
    table = _table(shards, groups, True)
    problems = [f"job {name}: a run of {shards} gradient jobs and {groups} branches has no such job" for name in names
                if name not in table]
    problems += [f"job {name}: missing" for name in table if name not in run.jobs and not name.startswith("evaluate-")]
    problems += [f"job {name}: it needs {', '.join(run.jobs[name][:5]) or 'nothing'}, wanted {', '.join(table[name][:5])}"
                 for name in names if name in table and run.jobs[name] != table[name]]
    if not problems and (names != [name for name in table if name in run.jobs] or not shards or not groups):
        problems.append("its jobs are not in the order of the pipeline, or there are none")
    problems += [f"mixture: {path!r} is no file of a mixture" for path in run.mixture if not MIXTURE_FILES.fullmatch(path)]
    problems += ["mixture: no mixture/mixture.json"] if "mixture/mixture.json" not in run.mixture else []
    problems += [f"base: {path!r} is no file of a model folder that a worker may fetch" for path in run.base.files
                 if not may_be_base(path)]
    problems += [f"{path}: {ref.size:,} bytes, more than {LARGEST:,}" for path, ref in (run.mixture | run.base.files).items()
                 if ref.size > LARGEST]
    if problems:
        raise CorruptedError.of(f"{where}: run.json: no run of this version of anabranch. It was damaged, or made by somebody "
                                "who means no good; give the run another `launch.store`:", problems[:20])


def is_plain(name: str) -> bool:
    """No character that hides or turns what stands beside it, and none that becomes a `.` or `/` in another spelling."""
    apart = set("./\\:")
    return not any(unicodedata.category(c)[0] == "C" or (c not in apart and apart & set(unicodedata.normalize("NFKC", c)))
                   for c in name)


def check_mixture(mixture: Mixture, run: StoredRun) -> None:
    """Every unit once, and every file one that run.json lists. Raises CorruptedError."""
    units = [u for place in (mixture.units, mixture.transfer, mixture.retention) for u in place]
    problems = [f"{file!r} of unit {u.name!r} is not in run.json" for u in units for file in u.files
                if f"mixture/{file}" not in run.mixture]
    problems += [f"unit {u.name!r}: run.json has another file for it" for u in units
                 if f"mixture/{u.file}" in run.mixture and run.mixture[f"mixture/{u.file}"].sha256 != u.sha256]
    for what, all_of_them in (("name", [u.name for u in mixture.units]), ("file", [f for u in units for f in u.files])):
        seen = Counter(all_of_them)
        problems += [f"{what} {one!r} stands {count} times" for one, count in seen.items() if count > 1]
    if problems or not mixture.units:
        raise CorruptedError.of("mixture/mixture.json: does not belong to this run.json:",
                                problems[:20] or ["it has no unit"])


def check_result(result: Result) -> None:
    """Raises CorruptedError naming every file that this job has no business with, or that is missing."""
    strange = [path for path in result.files if not may_leave(result.job, path)]
    large = [path for path, ref in result.files.items() if ref.size > LARGEST]
    problems = [f"{path}: {result.job} does not make such a file" for path in strange[:20]]
    problems += [f"{path}: {result.files[path].size:,} bytes, more than {LARGEST:,}" for path in large[:20]]
    kind, label = result.job.split("-")[0], result.job.removeprefix("evaluate-")
    wanted = [path.format(k=branch_of(result.job), label=label) for path in MUST_LEAVE[kind]]
    problems += [f"{path}: missing" for path in wanted if path not in result.files]
    if not result.files:
        problems.append("no file at all")
    if problems:
        raise CorruptedError.of(f"results/{result.job}.json (by {result.worker}): refused. Remove it to have the job done "
                                "again:", problems)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Raises CorruptedError if it holds a file that is not of this very checkpoint, or that could be a pickle."""
    pattern = CHECKPOINT_FILES.format(k=branch_of(checkpoint.job), step=checkpoint.step)
    strange = [f"{path}: no file of this checkpoint, or of a kind that is not taken" for path, ref in checkpoint.files.items()
               if not re.fullmatch(pattern, path) or ref.size > LARGEST or not may_travel(path)]
    folders = {above for path in checkpoint.files for above in _above(path)}
    strange += [f"{path}: a file and a folder" for path in checkpoint.files if path in folders]
    if not any(path.count("/") == 4 and path.endswith(f"/{MARKER}") for path in checkpoint.files):
        strange.append(f"{MARKER}: missing, so it is not whole")
    if strange:
        raise CorruptedError.of(f"checkpoint {checkpoint.step} of {checkpoint.job} (attempt {checkpoint.attempt}): refused:",
                                strange[:20])


def _above(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def reads(job: str, run: StoredRun, results: Mapping[str, Result], mixture: Mixture, plan: Plan | None) -> Files:
    """The files that a job reads, less the base.

    Args:
        results: of the jobs that it needs, and of those that they need.
        mixture: the run's, which says which file holds which unit.
        plan: for branches, whose units alone are read.
    """
    about = {"mixture/mixture.json": run.mixture["mixture/mixture.json"]}
    kind, k = job.split("-")[0], branch_of(job)
    if kind == "gradients":
        shards = sum(1 for name in run.jobs if name.startswith("gradients-"))
        return about | _units(run, [f for u in mixture.units[int(job.split("-")[1]) :: shards] for f in u.files])
    if kind == "plan":
        return about | {path: ref for need in run.jobs["plan"] for path, ref in results[need].files.items()}
    if kind == "branch":
        assert plan is not None
        files = {u.name: u.files for u in mixture.units}
        mine = [f for u in plan.units if u.group in (k, None) for f in files.get(u.unit, [])]
        return about | {"plan.json": results["plan"].files["plan.json"]} | _units(run, mine)
    branches = {path: ref for need in run.jobs["merge"] if kind == "merge" for path, ref in results[need].files.items()}
    if kind == "merge":
        return about | {"plan.json": results["plan"].files["plan.json"]} | branches
    model = {path: ref for need in run.jobs[job] for path, ref in results[need].files.items()}
    places = [f for place in (mixture.units, mixture.transfer, mixture.retention) for u in place for f in u.files]
    return about | _units(run, places) | model


def _units(run: StoredRun, files: list[str]) -> Files:
    missing = [f for f in files if f"mixture/{f}" not in run.mixture]
    if missing:
        raise CorruptedError(f"run.json: mixture.json names {', '.join(missing[:3])}, which run.json does not list.")
    return {f"mixture/{f}": run.mixture[f"mixture/{f}"] for f in files}
