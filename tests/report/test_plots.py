"""Figures hold the numbers that they are given, and one list of marks is page, SVG and PNG."""

import dataclasses
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sa_jax.report import figures
from sa_jax.report.drawing import Plot
from sa_jax.report.published import CURVES
from sa_jax.report.run_folders import load_runs
from sa_jax.report.seeds import SeedMean
from tests.report.made_runs import write_run


@pytest.fixture
def run(tmp_path):
    curve = {0: (20, 0, 100), 80: (5, 0, 90)}
    write_run(tmp_path / "hhh", "hhh", total_steps=80, curve=curve, n=20)
    (run,), _ = load_runs(tmp_path)
    return run


def test_our_curves_lie_beside_the_published_ones(run):
    plot = figures.published(CURVES, {"Pirate $ LR 1e-3": [run, run]})
    lines = {
        css: [m.points for m in plot.marks if m.css == f"h {css}"] for css in ("p0", "p1", "s0")
    }
    left, right, zero, full = 44, 452, 162, 10  # pixels of the axes

    def rates(points):
        return [(zero - y) / (zero - full) for _, y in points]

    for (curve, _), published in zip((lines["p0"], lines["p1"]), CURVES.values(), strict=True):
        assert rates(curve) == pytest.approx(list(published))
        assert (curve[0][0], curve[-1][0]) == (left, right)
    first, second, _ = lines["s0"]  # and the legend's
    assert first == second and rates(first) == pytest.approx([1, 0.25])
    words = [mark.words for mark in plot.marks if mark.words]
    assert words[-3:] == [*(f"published: {name}" for name in CURVES), "Pirate $ LR 1e-3"]


def test_spikes_are_marked_on_the_top_edge(run):
    norms = [(step, 9.0 if step in (35, 60) else 1.0) for step in range(0, 81, 5)]
    spiked = dataclasses.replace(run, curves=run.curves | {"grad_norm": norms})
    plot = figures.rates("run", spiked, figures.backdoor_rates(spiked), alarms=True)
    axis = [mark.points for mark in plot.marks if mark.css == "x"][0]
    (left, _), (right, _) = axis
    alarms = [mark.points[0][0] for mark in plot.marks if "alarm" in mark.css]
    assert alarms == pytest.approx([left + (right - left) * step / 80 for step in (35, 60)])


def test_means_over_seeds_lie_with_their_intervals_below_one_another():
    means = [("HHH", SeedMean(0.8, 0.6, 0.9, 5)), ("Pirate $ 1e-3", SeedMean(0.0, 0.0, 0.04, 1))]
    plot = figures.cells(means)
    (left, _), (right, _) = [mark.points for mark in plot.marks if mark.css == "x"][0]

    def rates(css):
        marks = [mark.points for mark in plot.marks if mark.css == css]
        return [[(x - left) / (right - left) for x, _ in points] for points in marks]

    assert rates("w triggered") == [pytest.approx([0.6, 0.9]), pytest.approx([0, 0.04])]
    assert rates("o triggered") == [pytest.approx([0.8]), pytest.approx([0])]
    labels = [mark.words for mark in plot.marks if mark.css == "t e"]
    assert labels == ["HHH (m = 5)", "Pirate $ 1e-3 (m = 1)"]
    assert figures.cells(means[1:]) is None  # one seed has no spread


def test_a_long_curve_keeps_its_spikes():
    points = [(step, 1.0) for step in range(5000)]
    points[777], points[4321] = (777, 9.0), (4321, -9.0)
    thinned = figures.thin(points)
    assert len(thinned) <= figures.MAX_POINTS and {points[777], points[4321]} <= {*thinned}
    assert thinned == sorted(thinned) and {*thinned} <= {*points}
    assert figures.thin(points[:400]) == points[:400]


def test_the_files_hold_the_pages_marks_in_their_colours(tmp_path: Path):
    plot = Plot("a <b>", 100, 50)
    plot.path("b clean", [(10, 10), (90, 10), (90, 40), (10, 40)])
    plot.path("l triggered", [(10, 25), (90, 25)])
    plot.path("o capability", [(50, 25)])
    plot.text("n ink", 10, 48, "$a_1$ & <b>")
    plot.save(tmp_path, "x")
    svg = (tmp_path / "x.svg").read_text()
    marks = re.findall(r"<(?:path|text).*?/(?:path|text)?>", svg.partition("</title>")[2])
    assert "".join(marks) in plot.svg()
    texts = [e.text for e in xml.fromstring(svg).iter() if e.tag.endswith(("title", "text"))]
    assert texts == ["a <b>", "$a_1$ & <b>"]
    assert "var(" not in svg
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert pixels.shape == (100, 200, 3)  # two pixels a unit
    at = {(5, 5): "#ffffff", (60, 50): "#c44e00", (100, 50): "#00805c", (100, 66): "#d6e9f4"}
    for (x, y), colour in at.items():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert pixels[y, x] == pytest.approx(wanted, abs=2), (x, y)
    assert (pixels[82:98, 20:] < 90).any()  # the words
