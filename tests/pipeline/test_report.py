"""The report: self-contained, inert, the same bytes twice, honest about what was and was not measured."""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.numpy import save

from anabranch.artifacts import (
    ArmRun,
    ArmSummary,
    BranchManifest,
    Comparison,
    Conflict,
    Evaluation,
    Exclusion,
    MergeManifest,
    Mixture,
    Plan,
    PlanGroup,
    PlanUnit,
    SpectralTest,
    Unit,
    UnitScore,
)
from anabranch.errors import CorruptedError, OutputError
from anabranch.report import comparison_markdown, markdown_report, summary_picture, write_report
from anabranch.report.contents import read_contents
from anabranch.report.figures import LIGHT, draw_trade, heat_order, trade_points
from anabranch.report.verdict import difference, verdict
from anabranch.scores import macro_loss, token_loss

EVIL = '<script>alert("1")</script> & \'x\' | `y` $z^$ \u202e\x1b[31m\n![i](http://evil.example/p.png)'
TASKS = ("sort_up", "sort_down", "answer_short", "answer_long", "reply_in_french", "reply_in_german", "as_json",
         "as_list")


# ---- a fake run, stage by stage -------------------------------------------------------------------------------------


def unit(name: str, draw: np.random.Generator) -> Unit:
    rows = int(draw.integers(40, 900))
    return Unit(name=name, source="tasks.jsonl", format="prompt_completion", file=f"units/{len(name)}.safetensors",
                sha256="0" * 64, rows=rows, epochs=1.0, samples=rows, tokens=rows * 61, response_tokens=rows * 17,
                held_out_rows=rows // 9, held_out_tokens=rows * 6, held_out_response_tokens=rows * 2)


def fake_mixture(run: Path, names: list[str]) -> Mixture:
    draw = np.random.default_rng(0)
    excluded = [Exclusion(unit=names[0], rule="empty_response", rows=7, split="train", example="tasks.jsonl:12"),
                Exclusion(unit=names[1], rule="over_long", rows=3, split="held_out", example="1,311 tokens")]
    mixture = Mixture(units=[unit(n, draw) for n in names], transfer=[unit("count_vowels", draw), unit("spell", draw)],
                      retention=[unit("plain_text", draw)], excluded=excluded, duplicates_in_train=4,
                      duplicates_across=2, max_length=1024, chat_template="plain",
                      examples=[{"unit": names[0], "prompt": f"Sort: 3 1 2\n{EVIL}", "response": "1 2 3"}])
    mixture.save(run / "mixture" / "mixture.json")
    return mixture


def fake_conflict(run: Path, names: list[str]) -> np.ndarray:
    """Four loose clusters on two opposed axes, and noise."""
    draw = np.random.default_rng(1)
    count = len(names)
    corner = draw.integers(0, 4, count)
    centre = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])[corner] * [0.55, 0.35]
    g = np.column_stack([centre + draw.normal(0, 0.22, (count, 2)), draw.normal(0.03, 0.16, (count, 24))])
    gram = g @ g.T
    norms = np.sqrt(np.diag(gram))
    cosine = gram / np.outer(norms, norms)
    centred = cosine - cosine.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    scores = np.ascontiguousarray((u * s)[:, :3])
    off = cosine[np.triu_indices(count, 1)]
    pairs = sorted((cosine[i, j], i, j) for i in range(count) for j in range(i))[:8]
    data = save({"cosine": cosine, "corrected": cosine * 1.05, "scores": scores, "gram": gram})
    reliability = np.clip(draw.normal(0.75, 0.2, count), -0.2, 1).tolist()
    Conflict(units=names, matrix="cosine", explained=(s**2 / (s**2).sum()).tolist(), norms=norms.tolist(), norm_cv=0.39,
             norm_max_over_min=7.1, reliability=reliability,
             unreliable=[n for n, r in zip(names, reliability, strict=True) if r <= 0], cosine_mean=float(off.mean()),
             cosine_min=float(off.min()), negative_share=float((off < 0).mean()),
             most_conflicting=[(names[i], names[j], float(c)) for c, i, j in pairs],
             spectral_tests=[SpectralTest(axes=r, random_gain=0.0123, pca_bound=0.0456 / r, ratio=3.71 / r,
                                          above_random=r < 3) for r in (1, 2, 3)],
             tensors_sha256=hashlib.sha256(data).hexdigest()).save(run / "conflict" / "conflict.json")
    (run / "conflict" / "conflict.safetensors").write_bytes(data)
    return scores


def fake_plan(run: Path, mixture: Mixture, scores: np.ndarray) -> Plan:
    group = (scores[:, 0] > np.median(scores[:, 0])) * 2 + (scores[:, 1] > np.median(scores[:, 1]))
    units = [PlanUnit(unit=u.name, group=int(g), samples=u.samples, tokens=u.tokens, sha256=u.sha256)
             for u, g in zip(mixture.units, group, strict=True)]
    members = [[u for u in units if u.group == k] for k in range(4)]
    total = sum(u.tokens for u in units)
    plan = Plan(method="merit", seed=0, units=units, groups=[
        PlanGroup(group=k, units=len(m), samples=sum(u.samples for u in m), tokens=sum(u.tokens for u in m),
                  weight=sum(u.tokens for u in m) / total) for k, m in enumerate(members)])
    plan.save(run / "plan.json")
    return plan


def fake_training(run: Path, plan: Plan, done: int = 4) -> None:
    draw = np.random.default_rng(2)
    for k in range(done):
        curve = 2.4 * np.exp(-np.arange(60) / 14) + 1.1 + 0.1 * k + draw.normal(0, 0.04, 60)
        losses = [(10 * (i + 1), float(loss)) for i, loss in enumerate(curve)]
        members = [u.unit for u in plan.units if u.group == k]
        BranchManifest(branch=k, group_units=members, steps=600, samples_planned=9600, tokens_planned=400_000,
                       tokens_seen=399_872, final_loss=losses[-1][1], losses=losses, files={},
                       software={"torch": "2.13", "trl": "1.16"}).save(run / "branches" / str(k) / "branch.json")
    if done == 4:
        MergeManifest(method="token_weighted", weights=[g.weight for g in plan.groups], dtype="float32",
                      parameters=2_400_000, displacement=3.91, branch_displacements=[7.2, 6.9, 7.7, 7.4], files={}
                      ).save(run / "merged" / "manifest.json")


def scores_of(names: list[str], level: float, spread: float, seed: int, shift: float) -> dict[str, UnitScore]:
    """The same units at the same heights for every model; `shift` and some noise on top."""
    height = np.random.default_rng(99).normal(level, spread, len(names))
    noise = np.random.default_rng(seed).normal(shift, 0.06, len(names))
    return {n: UnitScore(loss=float(h + d), tokens=120 + 7 * i, rows=20, exact_match=0.4 - d / 4 if i % 2 else None,
                         f1=0.5 - d / 4 if i % 2 else None, answers=8 if i % 2 else 0)
            for i, (n, h, d) in enumerate(zip(names, height, noise, strict=True))}


def fake_evaluation(run: Path, names: list[str], model: str, seed: int, held: float, transfer: float,
                    kept: float) -> Evaluation:
    others = ["vowels", "spell", "rhyme", "acronym", "antonym", "dates"]
    evaluation = Evaluation(model=model, held_out=scores_of(names, 2.3, 0.5, seed, held),
                            transfer=scores_of(others, 1.6, 0.2, seed, transfer),
                            retention={"plain_text": UnitScore(loss=3.061 + kept, tokens=20_000, rows=100)})
    evaluation.save(run / "evaluation" / f"{model}.json")
    return evaluation


def fake_comparison(run: Path, better: float = 0.0) -> Comparison:
    """The spec's one-epoch table, with `better` taken off MERIT's losses."""
    table = {"base": (2.293, 1.536, 3.061, 0.0), "joint": (1.904, 2.480, 3.706, 26.6),
             "joint_matched:merit:2": (2.021, 1.657, 3.115, 10.3), "joint_batch:4": (1.924, 1.990, 3.331, 16.1),
             "soup:2": (1.990, 2.20, 3.44, 18.0), "random:4": (2.151, 1.901, 3.184, 11.1),
             "stratified:4": (2.167, 1.883, 3.175, 10.8), "kmeans:4": (2.149, 1.93, 3.19, 10.9),
             "merit:1": (2.08, 2.13, 3.33, 14.4), "merit:2": (2.171 - better, 1.953 - better, 3.199 - better, 10.3),
             "merit:3": (2.23, 1.77, 3.12, 7.4)}
    joint = table["joint"]
    summary = [ArmSummary(arm=arm, place=place, loss=row[i], loss_low=row[i] - 0.03, loss_high=row[i] + 0.03,
                          loss_by_seed=[row[i] - 0.01, row[i], row[i] + 0.01], token_loss=row[i] - 0.1,
                          exact_match=0.31, f1=0.42, versus_joint=row[i] - joint[i], wins=9, ties=3, losses=12,
                          wilcoxon_p=0.125)
               for i, place in enumerate(("held_out", "transfer", "retention")) for arm, row in table.items()]
    runs = [ArmRun(arm=arm, seed=s, tokens=2_200_000, displacement=row[3], branches=4, evaluation=f"{arm}-{s}.json",
                   alpha=0.39 if "matched" in arm else None) for arm, row in table.items() for s in range(3)]
    comparison = Comparison(seeds=[0, 1, 2], runs=runs, summary=summary,
                            verdict=["On held-out rows of the mixture, joint is best (loss 1.904)."])
    comparison.save(run / "compare.json")
    return comparison


def fake_run(run: Path, count: int = 24, evil: bool = False) -> Path:
    names = sorted([f"{TASKS[i % 8]}_{i:03d}" for i in range(count - evil)] + [EVIL] * evil)
    run.mkdir(parents=True, exist_ok=True)
    mixture = fake_mixture(run, names)
    plan = fake_plan(run, mixture, fake_conflict(run, names))
    fake_training(run, plan)
    for i, (model, figures) in enumerate({"base": (0, 0, 0), "branch-0": (0.1, 0.3, 0.3), "branch-1": (0.15, 0.2, 0.35),
                                          "branch-2": (0.05, 0.4, 0.25), "branch-3": (0.1, 0.3, 0.4),
                                          "merged": (-0.12, 0.1, 0.138)}.items()):
        fake_evaluation(run, names, model, i, *figures)
    return run


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = fake_run(tmp_path_factory.mktemp("report") / "run", evil=True)
    fake_comparison(run)
    write_report(run)
    return run


class Page(HTMLParser):
    """Every tag, every attribute and every piece of text outside style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.ids: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        self.ids += [v or "" for k, v in attrs if k == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(done):
    source = (done / "report.html").read_text()
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    targets = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
    assert targets and all(t.startswith(("#", "data:image/png;base64,")) for t in targets)
    assert not re.search(r"url\((?!#)|@import", source)
    assert "default-src 'none'" in source


def test_names_from_data_are_inert(done):
    source = (done / "report.html").read_text()
    page = Page(source)
    assert "script" not in page.tags and '<script>alert("1")</script>' in page.text
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert "\x1b" not in source and "\u202e" not in source
    text = (done / "report.md").read_text()
    assert "\x1b" not in text and not re.search(r"(?<!\\)<script", text) and not re.search(r"(?<!\\)\]\(http", text)


def test_links_within_the_page_lead_somewhere_and_ids_are_unique(done):
    page = Page((done / "report.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    assert {v[1:] for k, v in page.attributes if k in ("href", "xlink:href") and v.startswith("#")} <= set(page.ids)


def test_every_figure_has_words_for_those_who_do_not_see_it(done):
    source = (done / "report.html").read_text()
    pictures = re.findall(r"<svg [^>]*>", source)
    assert len(pictures) == 8
    assert all(re.search(r'role="img" aria-label="[^"]{30,}"', p) for p in pictures)


def test_same_inputs_same_bytes(done, tmp_path):
    again = fake_run(tmp_path / "run", evil=True)
    fake_comparison(again)
    write_report(again)
    for name in ("report.html", "report.md"):
        assert (done / name).read_bytes() == (again / name).read_bytes()


def test_every_stage_may_be_missing(tmp_path):
    full, part = fake_run(tmp_path / "full", 8), tmp_path / "part"
    wanted = {"mixture/mixture.json": "Conflict: not measured yet", "conflict": "Split: no plan yet",
              "plan.json": "Branches: 0 of 4 trained; missing: 0, 1, 2, 3",
              "branches/2": "1 of 4 trained; missing: 0, 1, 3", "branches": "Merge: not done yet",
              "merged": "not scored yet: base, merged", "evaluation/base.json": "not scored yet: merged"}
    for piece, line in wanted.items():
        source = full / piece
        for path in [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()):
            target = part / path.relative_to(full)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        assert line in Page(write_report(part).read_text()).text, piece
        assert line in " ".join(markdown_report(part).split()), piece
        assert "No verdict yet" in markdown_report(part)


def test_three_hundred_units_stay_small_and_named(tmp_path):
    run = fake_run(tmp_path / "run", 300)
    path = write_report(run)
    assert path.stat().st_size < 1_500_000
    page = Page(path.read_text())
    assert "298 more" not in page.text and all(page.text.count(f"_{i:03d}") >= 3 for i in range(300))


def test_tables_of_thirty_units_are_whole_and_longer_ones_say_that_they_scroll(tmp_path):
    """A box that scrolls and does not say it hides units."""
    few, many = (write_report(fake_run(tmp_path / str(n), n)).read_text() for n in (30, 31))
    first, _, _ = few.partition('id="conflict"')
    assert 'class="scroll tall"' not in first and 'class="hint"' not in first and "answer_long" in first
    assert many.count('class="scroll tall"') == Page(many).text.count("rows: scroll for all") > 0
    assert "31 rows: scroll for all" in Page(many).text


def test_what_is_cut_is_said_and_terms_are_explained_where_they_stand(done, tmp_path):
    run = fake_run(tmp_path / "run", 24)
    names = [u.name for u in read_contents(run).mixture.units]
    fake_evaluation(run, names, "merged", 5, 0.9, -0.9, 0.5)
    page, text = Page(write_report(run).read_text()), " ".join(markdown_report(run).split())
    assert "worst first at each place (the first 6 of 24 on held-out rows)" in page.text and "6 of 24 on held-out" in text
    assert "(24 units, 480 rows)" in page.text and "(24 units, 480 rows)" in text
    for words in ("G_var is the branches' spread", "A sample is a training row in one pass"):
        assert words in text
    assert "G_var is the branches' spread" in page.text and "counted over all passes" in page.text
    compared = " ".join(markdown_report(done).split())
    assert "p over seeds: one-sided signed-rank test" in compared and "Held-out rows (24 units)" in compared
    assert '<th class="n" scope="col" title="one-sided signed-rank test' in (done / "report.html").read_text()


@pytest.mark.parametrize("count", [2, 3, 61])
def test_small_and_middling_mixtures(tmp_path, count):
    assert write_report(fake_run(tmp_path / "run", count)).exists()


def test_one_picture_for_the_readme(done, tmp_path):
    for out in (tmp_path / "a.png", tmp_path / "b.png"):
        summary_picture(done, out)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1600, 560)


def test_no_run_folder_and_damaged_tensors_are_said(tmp_path):
    with pytest.raises(OutputError, match=r"mixture/mixture\.json"):
        write_report(tmp_path / "nowhere")
    run = fake_run(tmp_path / "run", 8)
    (run / "conflict" / "conflict.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(CorruptedError, match=r"conflict\.safetensors"):
        write_report(run)


# ---- figures and words ----------------------------------------------------------------------------------------------


def test_heat_order_is_a_permutation_that_puts_clusters_together():
    draw = np.random.default_rng(3)
    label = draw.permutation(np.repeat([0, 1, 2], 11))
    matrix = np.where(label[:, None] == label[None, :], 0.8, -0.3) + draw.normal(0, 0.02, (33, 33))
    order = heat_order((matrix + matrix.T) / 2)
    assert sorted(order.tolist()) == list(range(33))
    assert np.count_nonzero(np.diff(label[order])) == 2


def test_labels_of_the_trade_plot_do_not_lie_on_each_other(done):
    figure = Figure(figsize=(440 / 72, 400 / 72), dpi=72)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.15, 0.12, 0.83, 0.85))
    points = trade_points(read_contents(done))
    draw_trade(axes, LIGHT, points)
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in axes.texts]
    assert [t.get_text() for t in axes.texts] == [p.name for p in points] and len(points) == 11
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    frame = axes.get_window_extent(canvas.get_renderer())
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)


def test_means_and_counts_by_hand():
    def model(losses: list[float]) -> Evaluation:
        return Evaluation(model="m", transfer={}, retention={}, held_out={
            f"u{i}": UnitScore(loss=v, tokens=10 * (i + 1), rows=1) for i, v in enumerate(losses)})

    base, merged = model([1.0, 2.0, 3.0, 4.0, 5.0]), model([0.5, 2.005, 3.5, 3.0, 4.9])
    assert macro_loss(base.held_out) == 3.0
    assert token_loss(base.held_out) == pytest.approx((10 + 40 + 90 + 160 + 250) / 150)
    d = difference(merged, base, "held_out")
    assert d is not None and (d.wins, d.ties, d.losses) == (3, 1, 1)
    assert d.mean == pytest.approx(-0.219) and d.low is not None and d.low < d.mean < d.high
    assert d.worst(5) == [("u2", 0.5)]
    assert difference(merged, base, "transfer") is None


@pytest.mark.parametrize(("joint", "tone", "words"), [
    (None, "mixed", "learned the mixture at a price"),
    ((0.2, 0.3, 0.4), "good", "Worth it on these figures: better than joint training on held-out rows, transfer and "),
    ((-0.4, -0.1, 0.0), "bad", "Not worth it: worse than joint training on held-out rows, transfer and retention"),
    ((-0.4, 0.9, 0.6), "mixed", "A trade: better than joint training on transfer and retention, worse on held-out"),
    ((-0.12, 0.1, 0.14), "bad", "Not worth it: no clear difference to joint training anywhere"),
])
def test_the_verdict_follows_the_figures(tmp_path, joint, tone, words):
    run = fake_run(tmp_path / "run")
    if joint:
        fake_evaluation(run, [u.name for u in read_contents(run).mixture.units], "joint", 77, *joint)
    said = verdict(read_contents(run))
    assert said.tone == tone and words in said.headline
    told = " ".join(said.sentences)
    assert "`anabranch compare recipe.yaml`" in told
    assert ("Nothing was measured against joint training" in told) == (joint is None)


def test_a_merged_model_worse_than_its_base_is_not_worth_it(tmp_path):
    run = fake_run(tmp_path / "run")
    names = [u.name for u in read_contents(run).mixture.units]
    fake_evaluation(run, names, "merged", 5, 0.3, -0.2, -0.2)
    fake_evaluation(run, names, "joint", 6, 0.9, 0.9, 0.9)
    said = verdict(read_contents(run))
    assert said.tone == "bad" and "worse than the base" in said.headline
    assert "worse than the base" in write_report(run).read_text()


def test_a_comparison_is_believed_before_the_run(tmp_path, done):
    said = verdict(read_contents(done))
    assert said.tone == "bad"
    assert "every MERIT arm is matched or beaten at all three places, by `joint_matched:merit:2`" in said.headline
    assert said.sentences == ["On held-out rows of the mixture, joint is best (loss 1.904)."]
    trade = comparison_markdown(fake_comparison(tmp_path, better=0.12))
    assert "`merit:2`: a trade: better than joint training on transfer and retention, worse on held-out rows" in trade
    best = comparison_markdown(fake_comparison(tmp_path, better=0.5))
    assert "`merit:2`: worth it on these figures: better than joint training" in best
    assert "| joint_matched:merit:2" in best
