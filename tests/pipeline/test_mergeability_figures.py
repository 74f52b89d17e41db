"""Mergeability's pictures: any shape is drawn, inside the sheet, with inert names, the same bytes each time."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from anabranch.errors import OutputError
from anabranch.report.canvas import WIDTH, Sheet
from anabranch.report.figures import DARK, LIGHT, settings
from anabranch.report.mergeability_figures import (
    Agreement,
    Picture,
    agreement_picture,
    fingerprint_picture,
    picture_svg,
    save_picture,
    task_picture,
)

EVIL = '<script>alert("1")</script> $z^$ \u202e\x1b[31m'


def agreement(method: str = "ties", n: int = 185, missing: int = 0, bounds: bool = True, seed: int = 0) -> Agreement:
    draw = np.random.default_rng(seed)
    y = draw.uniform(0.4, 1.02, n)
    p = y + 0.05 * draw.normal(size=n)
    p[:missing] = np.nan
    half = np.full(n, 0.06 if bounds else np.nan)
    return Agreement(method, y, p, p - half, p + half, [f"a{i}, b{i}" for i in range(n)])


def square(tasks: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    values = draw.uniform(0.5, 1.0, (tasks, tasks))
    values = (values + values.T) / 2
    np.fill_diagonal(values, np.nan)
    return values


def tasks(count: int, panels: int = 2) -> Picture:
    return task_picture([f"a task with a long name, number {i}" for i in range(count)],
                        [(f"method {p}", square(count, p)) for p in range(panels)])


PICTURES = {
    "one pair": lambda: agreement_picture([agreement(n=1)]),
    "one method": lambda: agreement_picture([agreement()]),
    "no intervals": lambda: agreement_picture([agreement(bounds=False)] * 2),
    "seven methods": lambda: agreement_picture([agreement(f"method {i}", 741, i, seed=i) for i in range(7)]),
    "nothing predicted": lambda: agreement_picture([agreement(missing=185)]),
    "all the same": lambda: agreement_picture([Agreement("m", *(np.full(5, 0.9) for _ in range(4)))]),
    "evil method": lambda: agreement_picture([agreement(EVIL)]),
    "28 metrics": lambda: fingerprint_picture([f"metric_{i}_" + "x" * 40 for i in range(28)], ["a", "b"],
                                              np.random.default_rng(0).normal(size=(28, 2))),
    "60 metrics, 12 methods": lambda: fingerprint_picture(
        [f"m{i}" for i in range(60)], [f"a long method {i}" for i in range(12)],
        np.random.default_rng(0).normal(size=(60, 12)), by_method=True),
    "zero coefficients": lambda: fingerprint_picture(["a"], ["b"], np.zeros((1, 1))),
    "no coefficients": lambda: fingerprint_picture([], [], np.zeros((0, 0))),
    "evil metric": lambda: fingerprint_picture([EVIL], [EVIL], np.ones((1, 1))),
    "4 tasks": lambda: tasks(4, 3),
    "20 tasks": lambda: tasks(20, 5),
    "40 tasks": lambda: tasks(40),
    "2 tasks": lambda: tasks(2, 1),
    "no scores": lambda: task_picture(["a", "b"], [("m", np.full((2, 2), np.nan))]),
    "evil task": lambda: task_picture([EVIL, "b"], [(EVIL, square(2))]),
}


def drawn(picture: Picture) -> Figure:
    figure = Figure(figsize=(WIDTH / 72, picture.height / 72), dpi=72)
    FigureCanvasAgg(figure)
    picture.draw(Sheet(figure, LIGHT, picture.height))
    return figure


@pytest.mark.parametrize("name", PICTURES)
def test_nothing_is_cut_off(name):
    picture = PICTURES[name]()
    with settings():
        figure = drawn(picture)
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        box = figure.get_tightbbox(canvas.get_renderer())
    slack = 3 / 72
    assert box.x0 >= -slack and box.y0 >= -slack
    assert box.x1 <= WIDTH / 72 + slack and box.y1 <= picture.height / 72 + slack


@pytest.mark.parametrize("name", ["evil method", "evil metric", "evil task"])
def test_names_are_inert(name):
    text = picture_svg(PICTURES[name](), "x")
    assert "<script" not in text and "\u202e" not in text and "\x1b" not in text
    assert "script" in text


@pytest.mark.parametrize("name", ["one method", "28 metrics", "4 tasks"])
def test_same_arrays_same_bytes(name, tmp_path):
    for file in ("a.png", "b.png"):
        save_picture(PICTURES[name](), tmp_path / file)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert picture_svg(PICTURES[name](), "x") == picture_svg(PICTURES[name](), "x")


def test_light_and_dark_differ(tmp_path):
    for theme in (LIGHT, DARK):
        save_picture(PICTURES["one pair"](), tmp_path / f"{theme.paper[1:]}.png", theme)
    one, other = (file.read_bytes() for file in tmp_path.iterdir())
    assert one != other


def test_the_finding_counts_the_intervals():
    known = Agreement("m", np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.5, 0.5, 0.7, np.nan]),
                      np.array([0.4, 0.4, 0.65, np.nan]), np.array([0.6, 0.55, np.nan, np.nan]))
    assert known.held.tolist() == [True, False, False, False] and known.bounded.tolist() == [True, True, False, False]
    assert "50% of 2 intervals" in agreement_picture([known]).finding
    with settings():
        figure = drawn(agreement_picture([known]))
    title = figure.axes[0].get_title(loc="left")
    r = np.corrcoef([0.5, 0.6, 0.7], [0.5, 0.5, 0.7])[0, 1]
    assert "3 pairs" in title and f"r = {r:.2f}" in title


def test_fingerprints_frame_the_five_largest():
    w = np.array([[0.1], [-0.9], [0.3], [-0.4], [0.5], [0.0], [0.05]])
    with settings():
        axes = drawn(fingerprint_picture([f"m{i}" for i in range(7)], ["a"], w)).axes[0]
    framed = sorted(round(p.get_y() + 0.45) for p in axes.patches if isinstance(p, Rectangle))
    assert framed == [0, 1, 2, 3, 4]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown[:, 0], np.where(np.abs(w[:, 0] / 0.9) < 0.005, 0, w[:, 0] / 0.9))
    assert axes.images[0].get_clim() == (-1, 1)  # symmetric


def test_tasks_stand_in_the_order_of_their_means():
    values = np.array([[np.nan, 0.5, 0.6], [0.5, np.nan, 0.9], [0.6, 0.9, np.nan]])
    with settings():
        axes = drawn(task_picture(["low", "mid", "high"], [("m", values)])).axes[0]
        plain = drawn(task_picture(["low", "mid", "high"], [("m", values)], ordered=False)).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["high", "mid", "low"]
    assert [t.get_text() for t in plain.get_yticklabels()] == ["low", "mid", "high"]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, values[np.ix_([2, 1, 0], [2, 1, 0])])
    low, high = axes.images[0].get_clim()
    assert 0.5 <= low < high <= 0.9


def test_where_it_cannot_write_it_says_so(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match=r"folder\.png"):
        save_picture(PICTURES["zero coefficients"](), tmp_path / "folder.png")
