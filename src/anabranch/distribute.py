"""A run through a store: send what workers need, have a launcher start them, bring home what they made.

The run folder stays what it was; everything that came home is checked, and the stages then find it done.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from anabranch import jobs
from anabranch.artifacts import (
    Artifact,
    BranchManifest,
    Conflict,
    Evaluation,
    Gradients,
    MergeManifest,
    Plan,
    digest,
    file_digest,
)
from anabranch.branches import branch_inputs, check_branch
from anabranch.engine.checkpoint import weight_files
from anabranch.errors import (
    AnabranchError,
    BranchFailed,
    CorruptedError,
    ModelError,
    OutputError,
    Preempted,
    ProvenanceError,
    RecipeError,
    describe_validation_error,
)
from anabranch.gradients import unit_key
from anabranch.launch.local import Job, run_jobs
from anabranch.perform import check_model, trusted_parts
from anabranch.plan import load_plan
from anabranch.recipe import Recipe
from anabranch.run import STAGES, Run, record_recipe, refuse_other_plan, run_stages, wanted_plan
from anabranch.store import leases
from anabranch.store.artifacts import FileRef, Files, Result, StoredBase, StoredRun
from anabranch.store.files import Store, fetch_all, open_store, put_all
from anabranch.worker import read_run

NOUNS: dict[str, type[Artifact]] = {"gradients.json": Gradients, "conflict.json": Conflict, "plan.json": Plan,
                                    "branch.json": BranchManifest, "manifest.json": MergeManifest}
NOUN_LIMIT = 2**28  # bytes of one of them
IN_A_STORE = ("run.json", "objects", "jobs", "results")
LAST = ("branch.json", "manifest.json", "gradients.json", "conflict.json")  # a stage counts as done once these are there


def store_url(recipe: Recipe) -> str:
    """Where the run's store is: as the recipe says, or in the run folder."""
    return recipe.launch.store or str(recipe.output / "store")


def goes_through_store(recipe: Recipe) -> bool:
    return recipe.launch.launcher != "local" or recipe.launch.store is not None


def check_launch(recipe: Recipe) -> None:
    """What the launcher would refuse, told before hours of work. Raises RecipeError, OutputError."""
    launch, address = recipe.launch, store_url(recipe)
    if address.startswith("memory:"):
        raise RecipeError("launch.store: memory:// is seen by this process alone, not by the workers. Give a folder, s3:// or "
                          "gs://.")
    if recipe.model.trust_remote_code:
        raise RecipeError("model.trust_remote_code: not through a store. A branch carries the model's code along, so workers "
                          "would run what another worker left. Train on this machine (launcher local, no launch.store), or "
                          "export job files.")
    open_store(address)
    _check_folder(address)
    if launch.launcher == "ray":
        from anabranch.launch.ray import check_ray

        check_ray(launch.ray)
    elif launch.launcher == "slurm":
        from anabranch.launch.slurm import check_slurm

        check_slurm(launch.slurm)
    elif launch.launcher == "export":
        from anabranch.launch.export import check_export

        check_export(store_url(recipe), launch.export)


def _check_folder(address: str) -> None:
    """A store is a folder of its own. Raises OutputError."""
    folder = Path(address.removeprefix("file://"))
    if ("://" in address and not address.startswith("file://")) or not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"launch.store: {address} is a file. Give a folder that is new, empty or this run's store.")
    strangers = [n for n in sorted(os.listdir(folder)) if n not in IN_A_STORE and not n.startswith((".", "probe-"))]
    if strangers:
        raise OutputError(f"launch.store: {address} holds other things ({', '.join(strangers[:3])}). Give a folder that is "
                          "new, empty or this run's store.")


def run_anywhere(run: Run, *, start: str | None = None, until: str = "report") -> None:
    """As `run.run_stages`; through a store where the recipe's `launch` says so.

    Raises:
        RecipeError: `start` with a store, whose results never change.
        BranchFailed: jobs that failed too often, named; finished work is kept.
    """
    if not goes_through_store(run.recipe) or STAGES.index(until) < STAGES.index("gradients"):
        run_stages(run, start=start, until=until)
        return
    if start is not None:
        raise RecipeError(f"--from {start}: results in a store never change. To make a stage anew, give `launch.store` another "
                          "place (finished work in the run folder that still fits is taken along).")
    check_launch(run.recipe)
    store = open_store(store_url(run.recipe))
    store.probe()
    run_stages(run, until="mixture")
    stored = send_run(run, store)
    wanted = jobs.jobs_until(stored, until, STAGES)
    watch = leases.Watch()

    def done(job: str) -> bool:
        return leases.result_of(store, stored, job, watch) is not None

    left = [job for job in wanted if not done(job)]
    run.tell(f"store: {store.url}: {len(wanted) - len(left)} of {len(wanted)} jobs done")
    failed: BranchFailed | None = None
    try:
        if left:
            _launch(run, store, stored, left, done)
    except Preempted:
        raise
    except BranchFailed as error:  # of a worker, perhaps, whose jobs others have done: the store tells
        failed = error
    except KeyboardInterrupt as stopped:
        run.tell(str(stopped) or "stopped; what workers had pushed is kept")
        raise
    finally:
        collect(run, store, stored, [job for job in wanted if done(job)])
    left = [job for job in wanted if not done(job)]
    if not left:
        if failed is not None:
            run.tell(f"all jobs are done, though not all went well: {failed}")
        run_stages(run, until=until)
    elif failed is not None:
        raise failed
    elif run.recipe.launch.launcher != "export":
        raise BranchFailed(f"{store.url}: {', '.join(left)} not done. `anabranch status {store.url}` says why; the same "
                           "command goes on.")


# ---- out ------------------------------------------------------------------------------------------------------------


def send_run(run: Run, store: Store) -> StoredRun:
    """Put run.json and what it names into the store, with results of what is done here already.

    Raises:
        ProvenanceError: the store holds another run.
    """
    mixture = run.mixture
    units = [file for place in (mixture.units, mixture.transfer, mixture.retention) for u in place for file in u.files]
    files = put_all(store, {f"mixture/{name}": run.folder / "mixture" / name for name in ["mixture.json", *units]},
                    told=lambda *told: run.progress("send", *told))
    launch = run.recipe.launch
    stored = StoredRun(recipe=run.recipe.model_dump(mode="json", exclude={"launch", "output"}), base=_send_base(run, store),
                       mixture=files, jobs=jobs.job_table(run.recipe, _groups(run), len(mixture.units)),
                       lease_seconds=launch.lease_seconds, retries=launch.retries,
                       made_from={"base": run.base_hash, "mixture": mixture.hash})
    jobs.check_run(stored, "what was to be sent")  # run.json is written once: one that workers refuse would stay
    if not store.create("run.json", stored.model_dump_json().encode()):
        stored = _same_run(store, stored)
    _send_finished(run, store, stored)
    return stored


def _groups(run: Run) -> int:
    split = run.recipe.split
    if (run.folder / "plan.json").exists():
        return len(load_plan(run.folder / "plan.json", run.mixture)[0].groups)
    return 1 if split.method == "joint" else split.groups


def _same_run(store: Store, stored: StoredRun) -> StoredRun:
    """The run that is there, if it is this one; how patient its workers are may differ."""
    there = read_run(store)
    same = {"lease_seconds": there.lease_seconds, "retries": there.retries}
    if there.hash == stored.model_copy(update=same).hash:
        return there
    changed = [f for f in ("recipe", "base", "mixture", "jobs") if getattr(there, f) != getattr(stored, f)]
    if "recipe" in changed:
        changed = [f"recipe.{key}" for key in sorted({*there.recipe, *stored.recipe})
                   if there.recipe.get(key) != stored.recipe.get(key)] + [c for c in changed if c != "recipe"]
    raise ProvenanceError(f"{store.url}: holds another run (other {', '.join(changed) or 'origin'}). A store is never "
                          "changed: give `launch.store` another place; what is finished in the run folder and still fits is "
                          "taken along.")


def _send_base(run: Run, store: Store) -> StoredBase:
    section = run.recipe.model
    if not Path(section.path).is_dir():
        return StoredBase(hash=run.base_hash, hub=section.path, revision=section.revision)
    _refuse_outside(run.base)
    found = {p.name: p for p in sorted(run.base.iterdir()) if p.is_file() and jobs.may_be_base(p.name)}
    return StoredBase(hash=run.base_hash, files=put_all(store, found, told=lambda *told: run.progress("send", *told)))


def _refuse_outside(base: Path) -> None:
    """Raises ModelError if workers cannot be given all of a base's weights."""
    lost = [path.name for path in weight_files(base) if not jobs.may_be_base(path.name)]
    if lost:
        raise ModelError.of(f"{base}: these weight files have names that cannot be sent through a store. Rename them (in the "
                            "index, too):", [repr(name) for name in lost])


def _send_finished(run: Run, store: Store, stored: StoredRun) -> None:
    """Stages that were done in the run folder, by hand perhaps, become results: a plan that was edited is the plan."""
    mixture, gradients, plan = run.mixture, run.folder / "gradients" / "gradients.json", run.folder / "plan.json"
    if not gradients.exists():
        return
    known = Gradients.load(gradients)
    keys = digest({u.name: unit_key(u, run.base_hash, run.recipe) for u in mixture.units})
    if known.made_from.get("settings") != keys:
        return
    shards = len(stored.jobs["plan"])
    for i in range(shards):
        mine = [f"gradients/{record.file}" for record in known.units[i::shards]]
        _send_result(run, store, stored, f"gradients-{i}", mine)
    if not plan.exists():
        return
    made, _ = load_plan(plan, mixture)
    refuse_other_plan(plan, made, wanted_plan(run, mixture))
    made.save(plan)  # with `groups` made anew after an edit: workers take the file as it is
    _send_result(run, store, stored, "plan", ["gradients/gradients.json", "conflict/conflict.json",
                                              "conflict/conflict.safetensors", "plan.json"])
    for group in made.groups:
        folder = run.branch(group.group)
        if (folder / "branch.json").exists():
            manifest = BranchManifest.load(folder / "branch.json")
            check_branch(manifest, branch_inputs(run.recipe, made, group.group, run.base_hash), folder)
            inside = [p.relative_to(run.folder).as_posix() for p in [folder / "branch.json", *(folder / "model").iterdir()]]
            hashed = {f"branches/{group.group}/model/{name}": FileRef(sha256=sha, size=(folder / "model" / name).stat().st_size)
                      for name, sha in manifest.files.items()}  # a moment ago
            _send_result(run, store, stored, f"branch-{group.group}", inside, hashed)


def _send_result(run: Run, store: Store, stored: StoredRun, job: str, paths: list[str],
                 known: Files | None = None) -> None:
    if leases.result_of(store, stored, job, leases.Watch()) is not None:
        return
    files = put_all(store, {path: run.folder / path for path in sorted(paths) if jobs.may_leave(job, path)}, known=known)
    result = Result(job=job, run=stored.hash, attempt=0, worker="run-folder", files=files)
    jobs.check_result(result)
    leases.publish(store, stored, result)


# ---- start ----------------------------------------------------------------------------------------------------------


def _launch(run: Run, store: Store, stored: StoredRun, left: list[str], done: Callable[[str], bool]) -> None:
    launch, root = run.recipe.launch, store.url
    trust = ["--trust"] if trusted_parts(run.recipe) else []
    logs = run.folder / "launch"

    def one(job: str, python: str = sys.executable) -> Job:
        return Job(job, [python, "-m", "anabranch", "work", root, "--only", job, *trust], logs / f"{job}.txt",
                   needs=tuple(need for need in stored.jobs[job] if need in left))

    tick = _ticker(run, store, stored, left)

    if launch.launcher == "local":
        workers = [Job(f"worker {i}", [sys.executable, "-m", "anabranch", "work", root, *trust], logs / f"worker-{i}.txt")
                   for i in range(launch.max_parallel)]
        run_jobs(workers, max_parallel=launch.max_parallel, threads=launch.threads, on_tick=tick)
    elif launch.launcher == "ray":
        from anabranch.launch.ray import run_jobs_ray

        run_jobs_ray([one(job, launch.ray.python or sys.executable) for job in left], launch.ray, retries=launch.retries,
                     on_tick=tick)
    elif launch.launcher == "slurm":
        from anabranch.launch.slurm import run_jobs_slurm

        run_jobs_slurm([one(job) for job in left], launch.slurm, logs, name=run.folder.name, done=done,
                       retries=launch.retries, on_tick=tick)
    else:
        from anabranch.launch.export import export_jobs

        for path in export_jobs(root, launch.export, logs, trust=bool(trust)):
            run.tell(f"export: {path}")
        run.tell(f"Start as many workers as you like, anywhere: anabranch work {root}{' --trust' if trust else ''}\n"
                 f"Watch them: anabranch status {root} --watch\nWhen all is done, run this command again: it brings the "
                 "results home and writes the report.")


def _ticker(run: Run, store: Store, stored: StoredRun, left: list[str]) -> Callable[[list[str], int], None]:
    """Progress in jobs; the store is asked every ten seconds, however often a launcher calls."""
    watch, seen = leases.Watch(), {"at": -10.0, "done": 0.0}

    def tick(names: list[str], _: int) -> None:
        if time.monotonic() - seen["at"] > 10.0:
            seen["done"] = len(leases.finished(store, stored, watch) & set(left))
            seen["at"] = time.monotonic()
        run.progress("jobs", ", ".join(names)[:60], int(seen["done"]), len(left))

    return tick


# ---- home -----------------------------------------------------------------------------------------------------------


def collect(run: Run, store: Store, stored: StoredRun, done: list[str]) -> None:
    """Bring results home into the run folder: each as a whole, checked, and a stage's own manifest last.

    Raises:
        BranchFailed: naming every result that cannot be taken; plan.json here is not the one that the workers followed.
    """
    problems, coming = [], run.folder / ".coming"
    for i, job in enumerate(done):
        run.progress("collect", job, i, len(done))
        result = leases.result_of(store, stored, job, leases.Watch())
        assert result is not None
        try:
            jobs.check_result(result)
            if not all(_is_here(run.folder / path, ref) for path, ref in result.files.items()):
                _bring(run, store, result, coming)
        except AnabranchError as error:
            problems.append(f"{job}: {error}")
        finally:
            shutil.rmtree(coming, ignore_errors=True)
    run.progress("collect", "", 1, 1)
    if problems:
        raise BranchFailed.of(f"{store.url}: results that cannot be taken (the others are in {run.folder}). To have a job done "
                              "again, remove results/JOB.json from the store and start a worker:", problems)
    if "plan" in done:
        record_recipe(run)


def _is_here(here: Path, ref: FileRef) -> bool:
    return here.is_file() and here.stat().st_size == ref.size and file_digest(here) == ref.sha256


def _bring(run: Run, store: Store, result: Result, coming: Path) -> None:
    """A result's files, first into a folder aside: what is refused never lies where a stage would look."""
    shutil.rmtree(coming, ignore_errors=True)  # of an earlier command that was killed
    for path in result.files:
        _check_noun(run, store, result, path)
    fetch_all(store, result.files, coming, keep=False,
              told=lambda path, done, count: run.progress("collect", f"{result.job} {path}", done, count))
    if result.job == "merge" or result.job.startswith("branch-"):
        check_model(coming / ("merged" if result.job == "merge" else f"branches/{jobs.branch_of(result.job)}/model"))
    for path in sorted(result.files, key=lambda p: (p.rsplit("/", 1)[-1] in LAST, p)):
        (run.folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(coming / path, run.folder / path)


def _check_noun(run: Run, store: Store, result: Result, path: str) -> None:
    here, ref = run.folder / path, result.files[path]
    noun = Evaluation if path.startswith("evaluation/") else NOUNS.get(path.rsplit("/", 1)[-1])
    if noun is not None and not path.startswith(f"branches/{jobs.branch_of(result.job)}/model/"):
        theirs = _parsed(noun, store.read_object(ref, NOUN_LIMIT), f"{path} of {result.worker}")
        if path == "plan.json" and here.exists() and Plan.load(here) != theirs:
            raise ProvenanceError(f"{here}: not the plan that the workers follow. Remove it to take theirs, or give "
                                  "`launch.store` another place to train by yours.")


def _parsed(noun: type[Artifact], data: bytes, where: str) -> Artifact:
    """A stranger's artifact, read before it may lie in the run folder: a later stage would stop at one that is none."""
    try:
        return noun.model_validate_json(data)
    except ValidationError as error:
        problems = describe_validation_error(error, noun)[:20]
        raise CorruptedError.of(f"{where}: not a valid {noun.__name__}:", problems) from error
