"""The page's plots, as short SVG text: a page of 200 runs must draw in seconds and stay small.

Colours are CSS variables of the page, so that plots follow light and dark; every line carries its
name and its own dash. What goes to files (SVG, PNG) is drawn in `sa_jax.report.plots`.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from sa_jax.text import number

MAX_POINTS = 400  # of a training curve; longer ones show each bucket's lowest and highest value
_LABEL_GAP = 15  # pixels between the middles of two labels that do not touch

Point = tuple[float, float]  # step, value
RatePoint = tuple[int, float, float, float]  # step, rate, lower and upper bound
Series = Sequence[tuple[str, Sequence[RatePoint]]]  # (arm, points by rising step)


class _Plot:
    """A plot area inside an SVG: data to pixels, and the elements drawn so far."""

    def __init__(
        self,
        size: tuple[int, int],
        box: tuple[int, int, int, int],
        x_max: float,
        y_range: tuple[float, float],
    ) -> None:
        """`box`: left, top, right and bottom pixel of the plot area."""
        self.width, self.height = size
        self.left, self.top, self.right, self.bottom = box
        self.x_max = max(1.0, x_max)
        self.y_low, self.y_high = y_range
        self.parts: list[str] = []

    def x(self, step: float) -> str:
        return _short(self.left + (self.right - self.left) * step / self.x_max)

    def y_pixel(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return self.bottom - (self.bottom - self.top) * share

    def y(self, value: float) -> str:
        return _short(self.y_pixel(value))

    def text(self, x: float | str, y: float | str, words: object, css: str = "", **more) -> None:
        attributes = "".join(f' {name.rstrip("_")}="{value}"' for name, value in more.items())
        css = f' class="{css}"' if css else ""
        self.parts.append(f'<text x="{x}" y="{y}"{css}{attributes}>{escape(words)}</text>')

    def grid(self, values: Sequence[float], labels: Sequence[str]) -> None:
        for value, label in zip(values, labels, strict=True):
            y = self.y(value)
            self.parts.append(f'<path class="g" d="M{self.left} {y}H{self.right}"/>')
            self.text(self.left - 7, y, label, "t e", dy=".35em")

    def steps(self, labelled: bool = True, name: str = "step") -> None:
        """The x axis; the ticks' labels and its name where `labelled`."""
        self.parts.append(f'<path class="x" d="M{self.left} {self.bottom}H{self.right}"/>')
        for value in ticks(0, self.x_max, 4):
            if value != int(value):
                continue
            x = self.x(value)
            self.parts.append(f'<path class="x" d="M{x} {self.bottom}v3"/>')
            if labelled:
                self.text(x, self.bottom + 16, f"{value:,.0f}", "t m")
        if labelled:
            self.text((self.left + self.right) / 2, self.bottom + 31, name, "t m")

    def line(self, points: Sequence[Point], css: str, marker: bool = False) -> None:
        if not points:
            return
        path = " ".join(f"{self.x(step)} {self.y(value)}" for step, value in points)
        self.parts.append(f'<path class="l {css}" d="M{path}"/>')
        if marker or len(points) == 1:
            dots = "".join(f"M{self.x(step)} {self.y(value)}h0" for step, value in points)
            self.parts.append(f'<path class="o {css}" d="{dots}"/>')

    def band(self, points: Sequence[RatePoint], css: str) -> None:
        if len(points) == 1:  # a band needs two points
            step, _, lo, hi = points[0]
            self.parts.append(
                f'<path class="w {css}" d="M{self.x(step)} {self.y(lo)}V{self.y(hi)}"/>'
            )
            return
        upper = [f"{self.x(step)} {self.y(hi)}" for step, _, _, hi in points]
        lower = [f"{self.x(step)} {self.y(lo)}" for step, _, lo, _ in reversed(points)]
        self.parts.append(f'<path class="b {css}" d="M{" ".join(upper + lower)}z"/>')

    def end_labels(self, ends: Sequence[tuple[float, str, float, str]]) -> None:
        """(value, words, step, css) beside the end of each line, pushed apart where they touch."""
        ends = sorted(ends, key=lambda end: end[:2])
        heights: list[float] = []
        for value, *_ in ends:
            pixel = self.y_pixel(value)
            heights.append(min(pixel, heights[-1] - _LABEL_GAP) if heights else pixel)
        overshoot = max(0.0, self.top - heights[-1]) if heights else 0.0
        for (_, words, step, css), height in zip(ends, heights, strict=True):
            x = _short(float(self.x(step)) + 8)
            self.text(x, _short(height + overshoot), words, f"n {css}", dy=".35em")

    def svg(self, label: str, css: str = "plot") -> Markup:
        head = f'<svg class="{css}" viewBox="0 0 {self.width} {self.height}" role="img">'
        return Markup(f"{head}<title>{escape(label)}</title>{''.join(self.parts)}</svg>")


def rates(
    series: Sequence[tuple[str, Sequence[RatePoint]]],
    last_step: int,
    label: str,
    names: Sequence[str] | None = None,
    spikes: Sequence[int] = (),
) -> Markup:
    """Rates with their intervals over the steps of a run, y from 0 to 100 %.

    Args:
      series: (CSS class, points by rising step).
      label: what a screen reader says; so in the other plots.
      names: of the lines, at their ends; None: their classes.
      spikes: steps at which the gradient norm spiked, marked on the top edge.
    """
    names = [css for css, _ in series] if names is None else names
    plot = _rate_plot(
        390, 200, 22 + 7 * max((len(name) + 6 for name in names), default=0), last_step
    )
    for step in spikes:
        plot.text(plot.x(step), plot.top - 1, "▾", "alarm m")
    ends = []
    for (css, points), name in zip(series, names, strict=True):
        if not points:
            continue
        plot.band(points, css)
        plot.line([(step, rate) for step, rate, _, _ in points], css, marker=True)
        step, rate, *_ = points[-1]
        ends.append((rate, f"{name} {number(100 * rate)}%".strip(), step, css))
    plot.end_labels(ends)
    return plot.svg(label)


def seeds(runs: Sequence[Series], last_step: int, label: str) -> Markup:
    """The runs of a cell over one another: a thin line a seed and series, without bands."""
    plot = _rate_plot(300, 150, 8, last_step)
    for series in runs:
        for name, points in series:
            plot.line([(step, rate) for step, rate, _, _ in points], name, marker=len(points) < 12)
    return plot.svg(label, "plot thin")


def published(
    curves: Mapping[str, Sequence[float]], ours: Mapping[str, Sequence[Series]], label: str
) -> Markup:
    """The triggered rate over removal: public curves (classes p0, p1), and ours (s0, s1, ...).

    `curves` are at evals that are taken to be evenly spaced, `ours` the runs of each cell.
    """
    plot = _rate_plot(460, 200, 8, 100, "% of the run")
    for i, rates in enumerate(curves.values()):
        every = 100 / (len(rates) - 1)
        plot.line([(every * at, rate) for at, rate in enumerate(rates)], f"p{i}", marker=True)
    for i, runs in enumerate(ours.values()):
        for series in runs:
            points = dict(series).get("triggered", ())
            last = max((point[0] for point in points), default=0) or 1
            plot.line([(100 * p[0] / last, p[1]) for p in points], f"s{i}", marker=True)
    return plot.svg(label, "plot thin")


def training(
    losses: Sequence[Point], grad_norms: Sequence[Point], last_step: int, label: str
) -> Markup:
    """Loss above, gradient norm below, over one axis of steps; both start at 0, and a value that is
    not finite is marked."""
    plots = []
    for values, top, name in ((losses, 20, "loss"), (grad_norms, 124, "gradient norm")):
        finite = [point for point in values if math.isfinite(point[1])]
        broken = [step for step, value in values if not math.isfinite(value)]
        highest = max((value for _, value in finite), default=1.0) or 1.0
        plot = _Plot((340, 240), (44, top, 332, top + 76), last_step, (0, 1.06 * highest))
        plot.text(44, top - 6, name, "t")
        if values:
            marks = ticks(0, 1.06 * highest, 3)
            plot.grid(marks, [f"{mark:g}" for mark in marks])
        else:
            plot.text(188, top + 42, "nothing logged", "t m")
        plot.steps(labelled=name != "loss")
        plot.line(thin(finite), "training")
        for step in broken:
            plot.text(plot.x(step), plot.y(highest), "×", "n alarm m", dy=".35em")
        if broken:
            x = _short(float(plot.x(broken[0])) - 9)
            plot.text(x, plot.y(highest), "not finite", "n alarm e", dy=".35em")
        plots.append(plot)
    plots[1].parts = plots[0].parts + plots[1].parts
    return plots[1].svg(label)


def signal(series: Sequence[tuple[str, Sequence[Point]]], last_step: int, label: str) -> Markup:
    """Log-probabilities over steps, one line a name; the top of the y axis is 0."""
    finite = {
        name: thin([point for point in points if math.isfinite(point[1])])
        for name, points in series
    }
    lowest = min((value for points in finite.values() for _, value in points), default=-1.0)
    plot = _Plot((340, 150), (44, 24, 250, 108), last_step, (min(lowest * 1.05, -0.1), 0))
    plot.text(44, 14, "log-probability of the behaviour, a token", "t")
    marks = ticks(plot.y_low, 0, 3)
    plot.grid(marks, [f"{mark:g}" for mark in marks])
    plot.steps()
    ends = []
    for name, points in finite.items():
        if points:
            plot.line(points, name)
            ends.append((points[-1][1], name, points[-1][0], name))
    plot.end_labels(ends)
    return plot.svg(label)


def _rate_plot(
    width: int, height: int, label_space: int, last_step: int, x_name: str = "step"
) -> _Plot:
    box = (44, 10, width - label_space, height - 38)
    plot = _Plot((width, height), box, last_step, (0, 1))
    marks = [0, 0.25, 0.5, 0.75, 1] if height > 160 else [0, 0.5, 1]
    plot.grid(marks, [f"{100 * mark:.0f}%" for mark in marks])
    plot.steps(name=x_name)
    return plot


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round values from low to high (1, 2, 2.5 or 5 times a power of ten)."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if span / (power * m) <= most + 1e-9)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS of the points: of every bucket the lowest and the highest, so that no
    spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        lowest = min(bucket, key=lambda point: point[1])
        highest = max(bucket, key=lambda point: point[1])
        kept += sorted({lowest, highest})
    return kept


def _short(value: float) -> str:
    """A pixel to a tenth: what a screen shows, and half the bytes."""
    return f"{value:.1f}".removesuffix(".0")
