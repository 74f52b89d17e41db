"""Does a search find a better merge than no search, on rows that it never saw? How fast, and does a kill change it?

    python benchmarks/search.py --run RUN --work DIR                    a space of 12 parameters over a run's branches
    python benchmarks/search.py --run RUN --work DIR --budget 100 --stride 1

RUN is a finished run whose branches lie in RUN/branches/K/model; WORK keeps journals, so that the command goes on after a
kill. The space: the weight of each of 4 branches' task vectors, apart for mlp, attention and the rest (task arithmetic), 0 to
1 each, which holds the uniform and the token-weighted merge. Scored on the run's held-out rows: half of each unit's are
searched, the others judge at the end. Random search gets as many candidates.

    kill      the same search begun anew, SIGKILL after some candidates, run again: its journal against the whole one's
    apart     what of a candidate's time is its merge in memory, what its score; and what a merge on disk would take
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from anabranch.artifacts import Mixture
from anabranch.engine.merging import merge_config
from anabranch.model import load_model
from anabranch.search.in_memory import absolute
from anabranch.search.journal import JOURNAL
from anabranch.search.outcome import SearchOutcome
from anabranch.search.run import prepare_search
from machine import RESULTS, record

PARTS = ("mlp", "self_attn", "rest")


def base_of(run: Path) -> str:
    return str(json.loads((run / "recipe.json").read_text())["recipe"]["model"]["path"])


def space(run: Path, budget: int, stride: int, sampler: str, seed: int) -> dict[str, Any]:
    """Weights by branch and part. `stride`: every n-th unit, by name."""
    branches = sorted((p for p in (run / "branches").iterdir() if (p / "model").is_dir()), key=lambda p: int(p.name))
    units = sorted(u.name for u in Mixture.load(run / "mixture" / "mixture.json").units if u.held_out_rows > 1)[::stride]
    start = 1 / len(branches)
    return {
        "parameters": {f"w{p.name}_{part}": {"low": 0, "high": 1, "start": start} for p in branches for part in PARTS},
        "merge": {
            "merge_method": "task_arithmetic", "base_model": base_of(run), "dtype": "float32",
            "models": [{"model": str(p / "model"), "parameters": {"weight": [
                *({"filter": part, "value": f"$w{p.name}_{part}"} for part in PARTS[:-1]),
                {"value": f"$w{p.name}_{PARTS[-1]}"}]}} for p in branches]},
        "data": {"mixture": str(run), "units": units}, "sampler": sampler, "budget": budget, "seed": seed}


def run_search(file: Path, out: Path, *, kill_after: int | None = None) -> float:
    """Seconds of the command, in a process of its own; SIGKILL once the journal has `kill_after` candidates."""
    begun = time.monotonic()
    code = "import sys; from anabranch.search.run import search; search(sys.argv[1], sys.argv[2], say=print)"
    process = subprocess.Popen([sys.executable, "-c", code, str(file), str(out)])
    journal = out.with_name(out.name + ".search") / JOURNAL
    while process.poll() is None:
        if kill_after is not None and journal.is_file() and journal.read_bytes().count(b"\n") > kill_after:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    if process.returncode and kill_after is None:
        sys.exit(f"the search ended with {process.returncode}")
    return time.monotonic() - begun


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out.with_name(out.name + ".search") / JOURNAL).read_text().splitlines()[1:]]


def killed(file: Path, work: Path, whole: Path, candidates: int) -> dict[str, Any]:
    """Begin anew, kill, go on; what differs from the whole search's journal (seconds aside)."""
    out = work / "killed"
    for old in (out, out.with_name("killed.search")):
        shutil.rmtree(old, ignore_errors=True)
    short = work / "killed.yaml"
    short.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"budget": candidates}, sort_keys=False))
    run_search(short, out, kill_after=candidates)
    before = len(lines(out))
    run_search(short, out)
    plain = [[{k: v for k, v in line.items() if k != "seconds"} for line in found] for found in (lines(out), lines(whole))]
    wanted = [line for line in plain[1] if line["n"] < candidates]
    return {"candidates_at_kill": before, "candidates": len(plain[0]), "same_lines": plain[0] == wanted}


def timed(file: Path, work: Path, count: int) -> dict[str, list[float]]:
    """Seconds of `count` candidates, turn about: into the loaded model, scored, and written and loaded from a folder."""
    job = prepare_search(file)
    folder = work / "candidate"
    found: dict[str, list[float]] = {"in_memory": [], "score": [], "through_files": []}
    with job.loaded(work) as loaded:
        for n in range(count + 1):
            vector = [(0.1 + 0.1 * n + 0.05 * i) % 1 for i in range(len(job.space.dimensions))]
            shutil.rmtree(folder, ignore_errors=True)
            at = [time.monotonic()]
            model = loaded.become(job.space.config(vector))
            at.append(time.monotonic())
            job.scorer.measure(model, loaded.tokenizer, "searched")
            at.append(time.monotonic())
            merge_config(absolute(job.space.config(vector), job.workshop.folders), folder)
            load_model(folder)
            at.append(time.monotonic())
            if n:  # the first reads the inputs
                for name, begun, end in zip(found, at, at[1:], strict=False):
                    found[name].append(end - begun)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def table(outcome: SearchOutcome, figures: dict[str, Any]) -> str:
    rows = ["| model | searched rows | guard rows | the best minus it, guard rows | 95 % interval |", "|---|---|---|---|---|"]
    for s in outcome.scores:
        gap = "" if s.difference is None else f"{s.difference:+.4f}"
        interval = "" if s.low is None or s.high is None else f"{s.low:+.4f} to {s.high:+.4f}"
        name = s.name if not s.name.startswith("model ") else "branch " + Path(s.name).parent.name
        rows.append(f"| {name} | {s.searched:.4f} | {s.guard:.4f} | {gap} | {interval} |")
    apart = figures["median_seconds"]
    said = [text for text in outcome.verdict if "model /" not in text]
    return "\n".join([
        "# Search over a run's branches", "",
        f"{len(outcome.dimensions)} parameters, {outcome.sampler}, {outcome.budget} candidates and as many of random search; "
        f"{outcome.searched_rows} rows searched, {outcome.guard_rows} kept for the end. Loss in nats, mean over units.", "",
        *rows, "", *said, "",
        "cma begins at the uniform merge; random search draws each weight from 0 to 1.", "",
        f"A candidate takes {figures['seconds_per_candidate']:.2f} s (median; {figures['per_minute']:.1f} a minute): merging "
        f"it into the loaded model {apart['in_memory']:.3f} s, scoring it {apart['score']:.2f} s. Merging it on disk and "
        f"loading that would take {apart['through_files']:.2f} s. Killed after {figures['kill']['candidates_at_kill']} "
        f"candidates and run again: the same lines: {figures['kill']['same_lines']}.", "",
        "Made by `python benchmarks/search.py`; raw figures in search.json.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--stride", type=int, default=3, help="every n-th unit")
    parser.add_argument("--sampler", default="cma")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-at", type=int, default=5, help="candidates of either arm in the killed search")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    file, out = given.work / "space.yaml", given.work / "best"
    file.write_text(yaml.safe_dump(space(given.run.resolve(), given.budget, given.stride, given.sampler, given.seed),
                                   sort_keys=False))
    seconds = run_search(file, out)
    outcome = SearchOutcome.load(out.with_name("best.search") / "results.json")
    each = [line["seconds"] for line in lines(out)]
    apart = timed(file, given.work, 5)
    middle = statistics.median(each)
    figures = {
        "seconds_per_candidate": middle, "per_minute": 60 / middle,
        "median_seconds": {name: statistics.median(values) for name, values in apart.items()},
        "seconds_of_this_call": round(seconds, 1), "kill": killed(file, given.work, out, given.kill_at),
        "candidates_seconds": each, "apart_seconds": apart, "settings": {"stride": given.stride, "seed": given.seed},
        "outcome": outcome.model_dump(mode="json", exclude={"made_from"})}
    text = json.dumps(figures).replace(str(given.run.resolve()), "RUN").replace(
        base_of(given.run), "BASE")
    record("search", json.loads(text))
    (RESULTS / "search.md").write_text(table(outcome, figures))


if __name__ == "__main__":
    main()
