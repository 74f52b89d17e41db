"""`anabranch mergeability`: argv -> one public call -> what a person wants to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(name="mergeability", no_args_is_help=True,
                  help="Which models merge well, by which method, and how sure that is: known before merging.")

Listed = list[str] | None
Output = Annotated[Path, typer.Option("--output", "-o", help="the JSON file to write")]
Config = Annotated[str | None, typer.Option(help="rows of this `config`, where the table holds several")]
BaseScores = Annotated[str | None, typer.Option(help="FILE:COLUMN, a CSV with the base's score of each `task`, where the table "
                                                     "has no base_score columns")]
DropMissing = Annotated[bool, typer.Option("--drop-missing", help="leave out pairs with empty cells instead of refusing")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done and what it costs; do nothing")]
Seed = Annotated[int, typer.Option(min=0)]


@app.command()
def measure(
    base: Annotated[str, typer.Option(help="the base that every model was tuned from: a model folder or a Hub id")],
    model: Annotated[Listed, typer.Option(help="a tuned model, PATH or TASK=PATH; once per model")] = None,
    data: Annotated[Listed, typer.Option(help="calibration rows: a file whose rows carry `task`, or TASK=FILE")] = None,
    only: Annotated[str | None, typer.Option(help="some of weights,activations,gradients,scores")] = None,
    samples: Annotated[int, typer.Option(min=1, help="calibration rows per task, most")] = 10,
    seed: Seed = 0,
    dry_run: DryRun = False,
    output: Output = Path("metrics.json"),
) -> None:
    """Metrics of every pair of models: task vectors, subspaces, activations, gradients, scores. Goes on where it stopped."""
    from anabranch.cli import _progress, _tell
    from anabranch.mergeability import measure as measuring

    parts = None if only is None else {p.strip() for p in only.split(",") if p.strip()}
    report = _progress()
    asked: dict[str, Any] = {"only": parts, "samples": samples, "seed": seed}
    if dry_run:
        for line in measuring.measure_forecast(base, model or [], data or [], output, **asked):
            _tell(line)
        return
    found = measuring.measure(base, model or [], data or [], output, **asked, tell=_tell,
                              progress=lambda *a: report("measure", *a))
    names = {n for p in found.pairs for n in p.metrics}
    _tell(f"{len(found.models)} models, {len(found.pairs)} pairs, {len(names)} metrics.")
    for why in sorted(set(found.left_out.values())):
        _tell(f"not measured: {', '.join(sorted(n for n, w in found.left_out.items() if w == why))}: {why}")
    _tell(f"written: {output}")


@app.command()
def fit(
    table: Annotated[Path, typer.Argument(help="a CSV of pairs: metrics, own scores, scores of merges")],
    rule: Annotated[str, typer.Option(help="ours, or published: the rule of arXiv:2601.22285")] = "ours",
    methods: Annotated[str | None, typer.Option(help="some of the table's merge methods; default all")] = None,
    base_scores: BaseScores = None,
    config: Config = None,
    drop_missing: DropMissing = False,
    sets: Annotated[Path | None, typer.Option(help="a CSV of measured merges of more than two, to be predicted")] = None,
    draws: Annotated[int, typer.Option(min=0, help="times that 30 % of the tasks are left out at once")] = 20,
    seed: Seed = 0,
    output: Output = Path("predictor.json"),
) -> None:
    """A predictor from measured merges, and what it is worth on tasks that it never saw."""
    from anabranch.cli import _progress, _tell
    from anabranch.mergeability import words
    from anabranch.mergeability.fitting import fit_table

    report = _progress()
    found = fit_table(table, rule, words.listed(methods), base_scores=base_scores, config=config, drop_missing=drop_missing,
                      sets=sets, draws=draws, seed=seed, output=output, progress=lambda *a: report("fit", *a))
    for line in words.fit_lines(found):
        _tell(line)
    _tell(f"written: {output} and, beside it, {', '.join(p.name for p in found.figures)}")


@app.command()
def predict(
    predictor: Annotated[Path, typer.Argument(help="predictor.json, from `fit`")],
    metrics: Annotated[Path, typer.Argument(help="metrics.json, from `measure`; or a CSV table")],
    methods: Annotated[str | None, typer.Option(help="some of the predictor's merge methods; default all")] = None,
    base_scores: BaseScores = None,
    config: Config = None,
    output: Output = Path("predictions.json"),
) -> None:
    """Per pair and method: the normalised score of the merge, its 90 % interval and what moved it; or "cannot say", and why."""
    from anabranch.cli import _tell
    from anabranch.mergeability import words
    from anabranch.mergeability.fitting import predict_file

    for line in words.prediction_lines(predict_file(predictor, metrics, words.listed(methods), base_scores, config, output)):
        _tell(line)
    _tell(f"written: {output}")


@app.command()
def suggest(
    predictor: Annotated[Path, typer.Argument(help="predictor.json, from `fit`")],
    metrics: Annotated[Path, typer.Argument(help="metrics.json, from `measure`; or a CSV table")],
    k: Annotated[int, typer.Option("--k", help="how many models to merge together")],
    methods: Annotated[str | None, typer.Option(help="some of the predictor's merge methods; default all")] = None,
    base_scores: BaseScores = None,
    config: Config = None,
    output: Output = Path("suggestion.json"),
) -> None:
    """Which models to merge together, with which method."""
    from anabranch.cli import _tell
    from anabranch.mergeability import words
    from anabranch.mergeability.fitting import suggest_file

    for line in words.suggestion_lines(suggest_file(predictor, metrics, k, words.listed(methods), base_scores, config, output)):
        _tell(line)
    _tell(f"written: {output}")


@app.command()
def reproduce(
    folder: Annotated[Path, typer.Argument(help="the published tables: pairs.csv, published_loto.csv, published_coefs.csv ..")],
    seeds: Annotated[int, typer.Option(min=1, help="initial draws per experiment")] = 10,
    normalised: Annotated[bool, typer.Option("--normalised", help="fit the target that the paper names, not the one it "
                                                                  "computed")] = False,
    config: Config = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the figures as JSON too")] = None,
) -> None:
    """The protocol of arXiv:2601.22285 on its tables: our figures beside the published ones."""
    from anabranch.cli import _progress, _tell
    from anabranch.mergeability.reproduce import reproduce as run
    from anabranch.mergeability.reproduction import reproduction_lines

    report = _progress()
    found = run(folder, seeds=seeds, normalised=normalised, config=config, tell=_tell,
                progress=lambda *a: report("reproduce", *a))
    for line in reproduction_lines(found):
        _tell(line)
    if output is not None:
        found.save(output)
        _tell(f"written: {output}")


@app.command()
def collect(
    recipe: Annotated[Path, typer.Argument(help="the recipe (YAML): base, mixture, training; one model per unit is tuned")],
    methods: Annotated[str | None, typer.Option(help="merge methods; default: the six of the study, at its settings")] = None,
    tasks: Annotated[str | None, typer.Option(help="some units of the mixture; default all")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="how many pairs, spread evenly over the tasks; default all")] = None,
    sets: Annotated[int, typer.Option(min=0, help="merges of K models to measure besides")] = 0,
    k: Annotated[int, typer.Option("--k", min=2, help="models in such a merge")] = 4,
    dry_run: DryRun = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value over the recipe's; repeatable")] = None,
) -> None:
    """A table of your own models: tune one per task, merge every pair by every method, score. Goes on where it stopped."""
    from anabranch.cli import _progress, _recipe, _tell
    from anabranch.mergeability import collect as collecting
    from anabranch.mergeability import words
    from anabranch.mergeability.outcomes import DEFAULT_METHODS

    loaded = _recipe(recipe, overrides)
    asked: dict[str, Any] = {"methods": words.listed(methods) or DEFAULT_METHODS, "tasks": words.listed(tasks, "--tasks"),
                             "pairs": pairs, "sets": sets, "k": k}
    if dry_run:
        for line in collecting.collect_forecast(loaded, **asked, progress=_progress()):
            _tell(line)
        return
    written = collecting.collect(loaded, **asked, tell=_tell, progress=_progress())
    _tell(f"written: {written}. Next: anabranch mergeability fit {written}")
