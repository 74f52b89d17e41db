"""What goes out to a store and what comes home: bases with odd files, models that lead elsewhere, workers that end badly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from anabranch import distribute, jobs, perform
from anabranch.artifacts import BranchManifest, MergeManifest
from anabranch.branches import check_branch
from anabranch.errors import BranchFailed, CorruptedError, ModelError, RecipeError
from anabranch.forecast import forecast
from anabranch.recipe import Recipe, load_recipe
from anabranch.run import Run, open_run, run_stages
from anabranch.store import leases
from anabranch.store.artifacts import FileRef, Result, StoredRun
from anabranch.store.files import Store, open_store
from anabranch.trainers.returned import accept_branch
from anabranch.worker import read_run
from conftest import anabranch, write_recipe

INDEX = "model.safetensors.index.json"


def a_run(folder: Path, base: Path, **launch: Any) -> Run:
    """A run whose mixture is made, with a store."""
    recipe = load_recipe(write_recipe(folder, base), {"launch.store": str(folder / "store"), **launch})
    run = open_run(recipe, tell=lambda _: None)
    run_stages(run, until="mixture")
    return run


# ---- out ------------------------------------------------------------------------------------------------------------------


def test_a_base_is_sent_without_what_workers_would_refuse(tmp_path: Path, tiny_base: Path) -> None:
    """A run.json that workers refuse can never be mended: it is written once."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for name in ("._config.json", "tokenizer: copy.json", "adapter_config.json", "modeling.py", "weights.bin", "gpj\u202e.json",
                 ".hidden.txt", "what?.txt"):
        (base / name).write_text("{}")
    run = a_run(tmp_path, base)
    store = open_store(tmp_path / "store")
    stored = distribute.send_run(run, store)
    assert set(stored.base.files) == {path.name for path in tiny_base.iterdir()}
    assert read_run(store) == stored


def test_weights_that_cannot_be_sent_are_named_before_anything_is_there(tmp_path: Path, tiny_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    index = json.loads((base / INDEX).read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (base / shard).rename(base / "part:1.safetensors")
    index["weight_map"] = {name: "part:1.safetensors" if file == shard else file for name, file in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    run = a_run(tmp_path, base)
    with pytest.raises(ModelError, match=r"part:1\.safetensors"):
        distribute.send_run(run, open_store(tmp_path / "store"))
    assert not (tmp_path / "store" / "run.json").exists()


def test_a_run_that_workers_would_refuse_is_not_made(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, tiny_base)
    monkeypatch.setattr(jobs, "LARGEST", 10)
    with pytest.raises(CorruptedError, match="more than 10"):
        distribute.send_run(run, open_store(tmp_path / "store"))
    assert not (tmp_path / "store" / "run.json").exists()


def test_a_model_s_own_code_and_a_store_in_memory_are_refused_before_anything_is_done(recipe_file: Path) -> None:
    def recipe(**overrides: Any) -> Recipe:
        return load_recipe(recipe_file, overrides)

    for overrides, said in (({"model.trust_remote_code": True, "launch.launcher": "export"}, "trust_remote_code"),
                            ({"launch.store": "memory://here/run"}, "memory://")):
        for call in (distribute.check_launch, forecast):
            with pytest.raises(RecipeError, match=said):
                call(recipe(**overrides))
    distribute.check_launch(recipe(**{"launch.launcher": "export"}))
    forecast(recipe(**{"model.trust_remote_code": True}))  # no store, no stranger


@pytest.mark.parametrize(("path", "may"), [
    ("model.safetensors", True), ("deep/er/state.json", True), ("x.py", False), ("rng.pt", False), ("a:b.json", False),
    ("../x.json", False), ("/x.json", False), (".x.json", False), ("é.json", False), ("x.json\n", False), ("", False),
    ("x", False), ("é/x.json", False), ("a" * 201 + ".json", False),
])
def test_what_may_travel(path: str, may: bool) -> None:
    assert jobs.may_travel(path) is may


# ---- home -----------------------------------------------------------------------------------------------------------------


class Home:
    """A run whose store has a plan, and results that are planted."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.run = a_run(folder, base)
        self.store: Store = open_store(folder / "store", cache=folder / "cache")
        self.stored: StoredRun = distribute.send_run(self.run, self.store)
        self.made, self.base = folder / "made", base

    def model(self, at: str) -> Path:
        """A model folder that may merge."""
        folder = self.made / at
        folder.mkdir(parents=True)
        tensors = {name: t + 0.01 for path in sorted(self.base.glob("*.safetensors")) for name, t in load_file(path).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        shutil.copyfile(self.base / "config.json", folder / "config.json")
        return folder

    def branch(self, k: int) -> Path:
        return self.model(f"branches/{k}/model")

    def tell_branch(self, k: int, **changes: Any) -> None:
        at = self.made / f"branches/{k}"
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (at / "model").glob("*.safetensors")}
        value = {"kind": "branch", "branch": k, "group_units": [], "steps": 1, "samples_planned": 1, "tokens_planned": 1,
                 "tokens_seen": 1, "final_loss": None, "losses": [], "files": files, "software": {}, **changes}
        (at / "branch.json").write_text(json.dumps(value))

    def publish(self, job: str) -> Result:
        files = {p.relative_to(self.made).as_posix(): self.store.put(p) for p in self.made.rglob("*") if p.is_file()}
        mine = {path: ref for path, ref in files.items() if jobs.may_leave(job, path)}
        result = Result(job=job, run=self.stored.hash, attempt=0, worker="w", files=mine)
        assert self.store.create(leases.result_file(job), result.model_dump_json().encode())
        return result

    def collect(self, job: str) -> None:
        distribute.collect(self.run, self.store, self.stored, [job])

    def space(self, job: str) -> Path:
        """A worker's workspace, with what was made."""
        space = self.made.parent / "space"
        shutil.copytree(self.made, space)
        (space / "run.json").write_text(self.stored.model_dump_json())
        shutil.copytree(self.run.folder / "mixture", space / "mixture")
        return space


@pytest.fixture()
def home(tmp_path: Path, tiny_base: Path) -> Home:
    return Home(tmp_path, tiny_base)


def lead_out(model: Path) -> None:
    """An index whose weights are those of another folder: what a library that follows it would load."""
    (model / "model.safetensors").rename(model.parents[1] / "elsewhere.safetensors")
    names = load_file(model.parents[1] / "elsewhere.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../../elsewhere.safetensors")}))


def name_kernels(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))


def swap(model: Path) -> None:
    """Other weights than branch.json tells."""
    save_file({name: t * 2 for name, t in load_file(model / "model.safetensors").items()}, model / "model.safetensors",
              {"format": "pt"})


def test_a_true_branch_comes_home_whole_and_only_once(home: Home) -> None:
    home.branch(0)
    home.tell_branch(0)
    home.publish("branch-0")
    home.collect("branch-0")
    there = home.run.folder / "branches/0"
    assert (there / "branch.json").is_file() and (there / "model/model.safetensors").is_file()
    assert not (home.run.folder / ".coming").exists()
    moved = dict(home.store.requests)
    home.collect("branch-0")
    assert home.store.requests.get("read", 0) - moved.get("read", 0) == 1, "of what is there only the result is read"
    (there / "model/config.json").write_text("{}")  # damaged: it comes again
    home.collect("branch-0")
    assert (there / "model/config.json").read_bytes() == (home.base / "config.json").read_bytes()


@pytest.mark.parametrize(("spoil", "said"), [(lead_out, "no names of files beside it"), (name_kernels, "kernels"),
                                             (swap, "not the model of the manifest")])
def test_a_stranger_s_branch_is_refused_at_home_and_by_workers(home: Home, spoil: Any, said: str) -> None:
    model = home.branch(0)
    home.tell_branch(0)
    spoil(model)
    home.publish("branch-0")
    with pytest.raises(BranchFailed, match=said) as told:
        home.collect("branch-0")
    assert "results/JOB.json" in str(told.value)
    assert not (home.run.folder / "branches").exists() and not (home.run.folder / ".coming").exists()
    space = home.space("evaluate-branch-0")
    with pytest.raises(CorruptedError, match=said):
        perform.perform(space, "evaluate-branch-0", tell=lambda _: None)
    assert not (space / "evaluation").exists()


def test_a_damaged_branch_says_what_to_do_where_there_is_a_store(home: Home) -> None:
    """Deleting the folder alone brings the same bytes home again."""
    home.branch(1)
    home.tell_branch(1, files={"model.safetensors": "0" * 64})
    folder = home.made / "branches/1"
    with pytest.raises(CorruptedError, match=r"remove results/branch-1\.json from the store"):
        check_branch(BranchManifest.load(folder / "branch.json"), {}, folder)


def test_a_branch_cannot_pass_with_a_merge_s_manifest(home: Home) -> None:
    model = home.branch(0)
    home.tell_branch(0)
    swap(model)
    names = {name: "0" for name in load_file(model / "model.safetensors")}
    MergeManifest(method="linear", dtype="float32", parameters=1, tensors=names, files={}).save(model / "manifest.json")
    with pytest.raises(CorruptedError, match="not the model of the manifest"):
        perform.check_model(model)


def test_a_merged_model_is_held_to_its_manifest(home: Home) -> None:
    model = home.model("merged")
    config = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    tensors = {name: "0" for name in load_file(model / "model.safetensors")}
    good = MergeManifest(method="linear", dtype="float32", parameters=1, tensors=tensors, files={"config.json": config})
    good.save(model / "manifest.json")
    perform.check_model(model)
    passwd = Path("/etc/passwd")
    for changes in ({"tensors": tensors | {"more": "0"}}, {"files": {"config.json": "0" * 64}},
                    {"files": {"gone.json": "0" * 64}},
                    {"files": {str(passwd): hashlib.sha256(passwd.read_bytes()).hexdigest()}}):
        good.model_copy(update=changes).save(model / "manifest.json")
        with pytest.raises(CorruptedError, match="not the model of the manifest"):
            perform.check_model(model)


def test_branches_are_not_merged_if_their_config_names_kernels(home: Home) -> None:
    for k in range(2):
        name_kernels(home.branch(k))
        home.tell_branch(k)
    with pytest.raises(CorruptedError, match="kernels"):
        perform.perform(home.space("merge"), "merge", model=home.base, tell=lambda _: None)


def test_a_base_out_of_the_store_is_loaded_only_if_its_config_is_harmless(tmp_path: Path, tiny_base: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    name_kernels(base)
    home = Home(tmp_path, base)
    home.made.mkdir()
    with pytest.raises(CorruptedError, match="kernels"):
        perform.perform(home.space("gradients-0"), "gradients-0", model=base, tell=lambda _: None)


# ---- judged by what is left -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_done", [True, False])
def test_a_worker_that_ends_badly_counts_by_what_is_left(home: Home, monkeypatch: pytest.MonkeyPatch, all_done: bool) -> None:
    """The machine of one worker breaks; others finish everything, or do not."""
    home.branch(0)
    home.tell_branch(0)
    told: list[str] = []
    run = Run(home.run.recipe, home.run.folder, home.run.base, home.run.base_hash, told.append, lambda *_: None)
    finished, staged = set(), []

    def launch(*_: Any) -> None:
        finished.update(home.stored.jobs if all_done else ["gradients-0"])
        raise BranchFailed("worker 1: exit code 2")

    monkeypatch.setattr(distribute, "_launch", launch)
    monkeypatch.setattr(distribute, "collect", lambda *_: None)
    monkeypatch.setattr(distribute, "run_stages", lambda _, until, **__: staged.append(until))
    monkeypatch.setattr(leases, "result_of", lambda store, run, job, watch: object() if job in finished else None)
    if all_done:
        distribute.run_anywhere(run)
        assert staged[-1] == "report" and any("worker 1: exit code 2" in line for line in told)
    else:
        with pytest.raises(BranchFailed, match="worker 1: exit code 2"):
            distribute.run_anywhere(run)
        assert "report" not in staged


def test_the_hashes_of_a_branch_that_was_checked_are_not_taken_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of gigabytes: check_branch has just read them."""
    run_stages(home.run, until="split")
    accept_branch(home.run, 0, home.branch(0))
    put: dict[str, FileRef | None] = {}
    really = Store.put
    monkeypatch.setattr(Store, "put", lambda self, file, ref=None: put.update({str(file): ref}) or really(self, file, ref))
    distribute.send_run(home.run, home.store)
    weights = home.run.folder / "branches/0/model/model.safetensors"
    known = put[str(weights)]
    assert known is not None and known.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert put[str(home.run.folder / "plan.json")] is None


@pytest.mark.parametrize("what", ["a file", "a base", "a URL with a slash too few"])
def test_a_place_that_is_no_store_is_refused_before_anything_is_written(what, tmp_path, tiny_base):
    recipe = write_recipe(tmp_path, tiny_base)
    place = {"a file": tmp_path / "recipe.yaml", "a base": tiny_base, "a URL with a slash too few": "s3:/runs/x"}[what]
    before = sorted(os.listdir(tiny_base))
    done = anabranch("run", recipe, "--launcher", "export", "--store", place, check=False)
    words = {"a file": "is a file", "a base": "holds other things", "a URL with a slash too few": "a slash too few"}[what]
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert sorted(os.listdir(tiny_base)) == before and not (tmp_path / "run" / "mixture").exists()


def test_there_are_no_more_shards_than_units(tmp_path, tiny_base):
    recipe = load_recipe(write_recipe(tmp_path, tiny_base), {"launch.gradient_shards": 9})
    table = jobs.job_table(recipe, 2, 5)
    assert table["plan"] == [f"gradients-{i}" for i in range(5)] and table["merge"] == ["branch-0", "branch-1"]
