"""Figures hold the numbers that they are given."""

import pytest

from sa_jax.report import plots
from sa_jax.report.published import CURVES


def test_our_curves_lie_beside_the_published_ones():
    seed = [("clean", [(0, 0.0, 0, 1)]), ("triggered", [(0, 1.0, 1, 1), (80, 0.25, 0, 1)])]
    figure = plots.published_figure(CURVES, {"Pirate $ LR 1e-3": [seed, seed]})
    lines = figure.axes[0].lines
    for line, rates in zip(lines, CURVES.values(), strict=False):
        assert list(line.get_ydata()) == pytest.approx(list(rates))
        assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0, 1)
    ours = lines[len(CURVES) :]
    assert [(list(o.get_xdata()), list(o.get_ydata())) for o in ours] == [([0, 1], [1, 0.25])] * 2
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == [*CURVES, r"ours: Pirate \$ LR 1e-3"]


def test_spikes_are_marked_on_the_top_edge():
    series = [("clean", []), ("triggered", [(0, 1.0, 1, 1), (80, 0.25, 0, 1)])]
    figure = plots.curves_figure([plots.Panel("run", [series], 80, [35, 60])])
    assert [35, 60] in [list(line.get_xdata()) for line in figure.axes[0].lines]
