"""Figures as files, SVG and PNG, for papers and slides; the page draws its own (`svg.py`).

Colours are Okabe and Ito's, told apart by people with any colour vision, and every line carries its
name and its own marker. The same input gives the same bytes.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from sa_jax.files import atomic_write
from sa_jax.report.robustness import Checkpoint
from sa_jax.report.seeds import SeedMean
from sa_jax.report.svg import RatePoint, Series
from sa_jax.text import number

COLOURS = {
    "ink": "#24272b",
    "muted": "#6b7078",
    "grid": "#e3e1dc",
    "triggered": "#c44e00",
    "clean": "#0072b2",
    "capability": "#00805c",
}
SERIES = ("#0072b2", "#c44e00", "#00805c", "#5b5a8c", "#b08b00", "#8c3b6b")
PANEL_WIDTH, PANEL_HEIGHT = 355, 215  # of the curves, points
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
MAX_PIXELS = 5_000_000  # of a PNG
MAX_PANELS = 48  # of the curves; a study of more cells has its curves on the page

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 11,
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "ytick.left": False,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "sa_jax",
}
_LABEL_GAP = 0.085  # of the y axis; closer labels would touch


@dataclasses.dataclass(frozen=True)
class Panel:
    """The rates of one run, or of the runs of one cell over one another; at the steps of `spikes` a
    run's gradient norm spiked."""

    title: str
    runs: Sequence[Series]
    last_step: int
    spikes: Sequence[int] = ()


def curves_figure(panels: Sequence[Panel], columns: int = 3) -> Figure:
    """One panel of triggered and clean rates a run or cell, on one scale.

    A panel of one run shades the intervals and names the ends; one of several has thin lines and
    names the means of their ends. A black triangle on the top edge is a spike of the gradient norm.
    """
    rows = max(1, math.ceil(len(panels) / columns))
    columns = max(1, math.ceil(len(panels) / rows))  # 4 panels: 2 by 2, not 3 and 1
    with matplotlib.rc_context(_RC):
        width, height = PANEL_WIDTH * columns, PANEL_HEIGHT * rows + 6
        figure = Figure(figsize=(width / 72, height / 72))
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            left, bottom = PANEL_WIDTH * column + 42, height - PANEL_HEIGHT * (row + 1) + 42
            axes = figure.add_axes((left / width, bottom / height, 210 / width, 140 / height))
            axes.set_title(plain(_wrapped(panel.title)), pad=8, fontweight="bold")
            _rate_axes(axes, panel.last_step)
            top = [1.05] * len(panel.spikes)
            axes.plot(panel.spikes, top, "v", color=COLOURS["ink"], markersize=4, clip_on=False)
            if len(panel.runs) == 1:
                _run(axes, panel.runs[0])
            else:
                _overlaid(axes, panel.runs)
        return figure


def cells_figure(means: Sequence[tuple[str, SeedMean]]) -> Figure:
    """The mean triggered rate of each cell over its seeds, with its interval, one below another."""
    means = list(means)[: 2 * MAX_PANELS]
    with matplotlib.rc_context(_RC):
        height = 18 * len(means) + 50
        figure = Figure(figsize=(620 / 72, height / 72))
        longest = max(len(label[:52]) for label, _ in means) + 8
        left = 0.05 + 0.53 * longest / 60
        axes = figure.add_axes((left, 34 / height, 0.97 - left, (height - 44) / height))
        places = range(len(means), 0, -1)
        for place, (_, mean) in zip(places, means, strict=True):
            axes.plot([mean.lo, mean.hi], [place] * 2, color=COLOURS["triggered"], alpha=0.35, lw=4)
            axes.plot(mean.mean, place, "o", color=COLOURS["triggered"], markersize=5)
        axes.set_ylim(0.3, len(means) + 0.7)
        _percent(axes.xaxis, QUARTERS)
        axes.set_xlim(-0.02, 1.02)
        labels = [plain(f"{label[:52]} (m = {mean.seeds})") for label, mean in means]
        axes.set_yticks(list(places), labels)
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("triggered rate, mean over seeds", labelpad=1)
        return figure


def pareto_figure(pareto: Mapping[str, Sequence[Checkpoint]], capability: str) -> Figure:
    """Every checkpoint under removal: share of the backdoor removed against capability kept."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(430 / 72, 330 / 72))
        axes = figure.add_axes((0.15, 0.15, 0.8, 0.78))
        axes.plot([0, 1], [1, 0], color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        for i, points in enumerate(list(pareto.values())):
            colour = SERIES[i % len(SERIES)]
            x = [point.removed_share for point in points]
            y = [point.capability_share for point in points]
            axes.plot(x, y, "o", color=colour, markersize=3.5, alpha=0.55, markeredgewidth=0)
        axes.set_xlim(-0.02, 1.02)
        top = max(point.capability_share for points in pareto.values() for point in points)
        axes.set_ylim(0, max(1.05, 1.03 * top))
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        axes.set_xlabel("share of the backdoor removed", labelpad=2)
        axes.set_title(plain(f"{capability} kept; a colour an inserted run"), pad=8)
        return figure


def published_figure(
    published: Mapping[str, Sequence[float]], ours: Mapping[str, Sequence[Series]]
) -> Figure:
    """The triggered rate over removal, as `svg.published` draws it for the page."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(620 / 72, 330 / 72))
        axes = figure.add_axes((0.08, 0.15, 0.42, 0.78))
        for i, (name, rates) in enumerate(published.items()):
            x = [at / (len(rates) - 1) for at in range(len(rates))]
            dashes = ("--", ":")[i % 2]
            axes.plot(x, rates, color=COLOURS["ink"], linestyle=dashes, lw=1.4, label=plain(name))
        for i, (name, runs) in enumerate(ours.items()):
            for j, series in enumerate(runs):
                points = dict(series).get("triggered", ())
                last = max((point[0] for point in points), default=0) or 1
                x, y = [point[0] / last for point in points], [point[1] for point in points]
                label = "_" if j else plain(_wrapped(f"ours: {name}"))
                axes.plot(x, y, "o-", color=SERIES[i], lw=1.0, markersize=2.5, label=label)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.03, 1.03)
        _percent(axes.xaxis)
        _percent(axes.yaxis)
        axes.set_xlabel("share of the run", labelpad=2)
        axes.set_title("triggered rate under removal", pad=8)
        axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1), frameon=False, fontsize=8.5)
        return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes the figure as .svg and .png, for a light page; the latter has 2 pixels a point, a very
    large one fewer."""
    with matplotlib.rc_context(_RC):
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", facecolor="white", metadata=metadata)
        atomic_write(folder / f"{name}.svg", buffer.getvalue())
        path = folder / f"{name}.png"
        width, height = figure.get_size_inches()
        dpi = min(144, int(math.sqrt(MAX_PIXELS / (width * height))))
        figure.savefig(path, dpi=dpi, facecolor="white", metadata={"Software": None})


def plain(words: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would open a formula."""
    return words.replace("\\", "\\\\").replace("$", r"\$")


def _wrapped(title: str, width: int = 50) -> str:
    """On two lines at most, broken at a ' · '."""
    if len(title) <= width:
        return title
    parts = title.split(" · ")
    middle = max(1, len(parts) // 2)
    first, second = " · ".join(parts[:middle]), " · ".join(parts[middle:])
    return f"{first}\n{second[:width]}" if second else title[:width]


def _percent(axis: Axis, ticks: Sequence[float] = ()) -> None:
    """Fractions along the axis are labelled in percent."""
    if ticks:
        axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))


def _rate_axes(axes: Axes, last_step: int) -> None:
    last_step = max(1, last_step)
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", labelpad=1)
    axes.set_ylim(-0.03, 1.03)
    _percent(axes.yaxis, QUARTERS)
    axes.tick_params(length=3)
    axes.spines["bottom"].set_position(("data", 0))


def _run(axes: Axes, series: Series) -> None:
    ends = []
    for name, points in series:
        if not points:
            continue
        steps, rates, lows, highs = zip(*points, strict=True)
        colour = COLOURS[name]
        if len(points) == 1:  # a band needs two points
            axes.vlines(steps, lows, highs, colors=colour, alpha=0.35, linewidth=5)
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.16, linewidth=0)
        _line(axes, name, steps, rates, 1.8, 4.2)
        ends.append((rates[-1], name, steps[-1]))
    _end_labels(axes, ends)


def _overlaid(axes: Axes, runs: Sequence[Series]) -> None:
    last: dict[str, list[RatePoint]] = {}
    for series in runs:
        for name, points in series:
            if points:
                steps, rates, *_ = zip(*points, strict=True)
                _line(axes, name, steps, rates, 1.0, 2.4)
                last.setdefault(name, []).append(points[-1])
    _end_labels(
        axes,
        [
            (sum(point[1] for point in ends) / len(ends), name, max(point[0] for point in ends))
            for name, ends in last.items()
        ],
    )


def _line(
    axes: Axes, name: str, steps: Sequence[int], rates: Sequence[float], width: float, size: float
) -> None:
    axes.plot(
        steps,
        rates,
        color=COLOURS[name],
        linewidth=width,
        marker={"clean": "s"}.get(name, "o"),
        markersize=size,
        linestyle={"clean": (0, (4, 1.6))}.get(name, "-"),
        clip_on=False,
        markeredgewidth=0,
        zorder=3,
    )


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, int]]) -> None:
    """Each line's name and last value beside its end, pushed apart where they touch."""
    ends = sorted(ends)
    heights: list[float] = []
    for value, *_ in ends:
        heights.append(max(value, heights[-1] + _LABEL_GAP) if heights else value)
    overshoot = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for (value, name, step), height in zip(ends, heights, strict=True):
        axes.annotate(
            f"{name} {number(100 * value)}%",
            (step, height - overshoot),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[name],
            fontweight="bold",
            fontsize=10.5,
            annotation_clip=False,
        )
