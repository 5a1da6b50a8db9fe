"""Plots as lists of marks: the page's inline SVG, and the same plot as SVG and PNG files.

templates/plot.css has all styles. Its colours are CSS variables of the page, so plots follow light
and dark mode; files are light. Short marks keep a page of 200 runs small.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from sa_jax.files import atomic_write

TEMPLATES = Path(__file__).with_name("templates")
MAX_PIXELS = 5_000_000  # of a PNG
_LABEL_GAP = 15  # pixels between the middles of two labels that do not touch
_MIDDLE = 3.7  # pixels from a text's middle down to its base line

Point = tuple[float, float]


class Mark(NamedTuple):
    """A path, or a text at one point. `css`: its classes in plot.css; the first is its kind."""

    css: str
    points: Sequence[Point]  # pixels, y downwards
    words: str = ""


@dataclasses.dataclass
class Plot:
    """Marks on a sheet of `width` by `height` pixels; `label` is the text for a screen reader."""

    label: str
    width: float
    height: float
    marks: list[Mark] = dataclasses.field(default_factory=list)

    def path(self, css: str, points: Iterable[Point]) -> None:
        self.marks.append(Mark(css, list(points)))

    def text(self, css: str, x: float, y: float, words: str) -> None:
        """A text at a base line; x is its start, with class 'm' its middle, with 'e' its end."""
        self.marks.append(Mark(css, [(x, y)], words))

    def place(self, other: "Plot", left: float, top: float) -> None:
        """Adds another plot's marks, with its corner at a point of this one."""
        for mark in other.marks:
            moved = [(x + left, y + top) for x, y in mark.points]
            self.marks.append(mark._replace(points=moved))

    def svg(self) -> Markup:
        """The SVG for a page that includes plot.css."""
        marks = "".join(map(_svg, self.marks))
        box = f'viewBox="0 0 {_short(self.width)} {_short(self.height)}"'
        title = f"<title>{escape(self.label)}</title>"
        return Markup(f'<svg class="plot" {box} role="img">{title}{marks}</svg>')

    def save(self, folder: Path, name: str) -> None:
        """NAME.svg and NAME.png, for a light page; the same plot gives the same bytes."""
        size = f'xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}"'
        style = f'<style>{_light_css()}</style><rect width="100%" height="100%" fill="#fff"/>'
        svg = str(self.svg()).replace("<svg ", f"<svg {size} ", 1)
        atomic_write(folder / f"{name}.svg", svg.replace("<title>", f"{style}<title>", 1))
        scale = min(2.0, math.sqrt(MAX_PIXELS / (self.width * self.height)))
        figure = Figure(figsize=(self.width / 72, self.height / 72), dpi=72 * scale)
        pixels = Affine2D().scale(scale, -scale).translate(0, round(self.height * scale))
        for mark in self.marks:
            figure.add_artist(_artist(mark)).set_transform(pixels)
        with (folder / f"{name}.png").open("wb") as file:
            figure.savefig(file, facecolor="white", metadata={"Software": None})


class Axes:
    """A part of a plot with axes: x from 0 to x_max, y over its range."""

    def __init__(
        self, plot: Plot, box: Sequence[float], x_max: float, y_range: tuple[float, float] = (0, 1)
    ) -> None:
        """`box`: left, top, right and bottom pixel."""
        self.plot = plot
        self.left, self.top, self.right, self.bottom = box
        self.x_max = max(1.0, x_max)
        self.y_low, self.y_high = y_range

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.x_max

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return self.bottom - (self.bottom - self.top) * share

    def places(self, points: Iterable[Point]) -> list[Point]:
        return [(self.x(x), self.y(y)) for x, y in points]

    def grid(self, most: int, percent: bool = False) -> None:
        """Lines at round values of y, at most `most` + 1 of them."""
        for value in ticks(self.y_low, self.y_high, most):
            self.plot.path("g", [(self.left, self.y(value)), (self.right, self.y(value))])
            words = f"{100 * value:.0f}%" if percent else f"{value:g}"
            self.plot.text("t e", self.left - 7, self.y(value) + _MIDDLE, words)

    def steps(self, name: str) -> None:
        """The x axis; its ticks have labels only if it has a name."""
        self.plot.path("x", [(self.left, self.bottom), (self.right, self.bottom)])
        for value in ticks(0, self.x_max, 4):
            if value == int(value):
                x = self.x(value)
                self.plot.path("x", [(x, self.bottom), (x, self.bottom + 3)])
                if name:
                    self.plot.text("t m", x, self.bottom + 16, f"{value:,.0f}")
        if name:
            self.plot.text("t m", (self.left + self.right) / 2, self.bottom + 31, name)

    def line(self, css: str, points: Sequence[Point], dots: bool = False, thin: bool = False):
        """A line of class `css`; a single point is a dot."""
        if points:
            self.plot.path(f"{'h' if thin else 'l'} {css}", self.places(points))
        if dots or len(points) == 1:
            self.dots(css, points, thin)

    def dots(self, css: str, points: Sequence[Point], thin: bool = False) -> None:
        self.plot.path(f"{'d' if thin else 'o'} {css}", self.places(points))

    def band(self, css: str, points: Sequence[tuple[float, float, float]]) -> None:
        """From the lower to the upper bound, of (x, lower, upper)."""
        if len(points) == 1:  # a band needs two points
            (x, low, high), *_ = points
            self.plot.path(f"w {css}", self.places([(x, low), (x, high)]))
        else:
            upper = [(x, high) for x, _, high in points]
            lower = [(x, low) for x, low, _ in reversed(points)]
            self.plot.path(f"b {css}", self.places(upper + lower))

    def end_labels(self, ends: Sequence[tuple[float, float, str, str]]) -> None:
        """Labels (value, x, words, css) at the end of each line, moved apart if they overlap."""
        ends = sorted(ends)
        heights: list[float] = []
        for value, *_ in ends:
            y = self.y(value)
            heights.append(min(y, heights[-1] - _LABEL_GAP) if heights else y)
        overshoot = max(0.0, self.top - heights[-1]) if heights else 0.0
        for (_, x, words, css), height in zip(ends, heights, strict=True):
            self.plot.text(f"n {css}", self.x(x) + 8, height + overshoot + _MIDDLE, words)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round values from low to high (1, 2, 2.5 or 5 times a power of ten)."""
    locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1)
    slack = 1e-9 * (high - low)
    values = map(float, locator.tick_values(low, high))
    return [round(value, 10) for value in values if low - slack <= value <= high + slack]


def _svg(mark: Mark) -> str:
    places = [f"{_short(x)} {_short(y)}" for x, y in mark.points]
    if mark.words:
        x, y = places[0].split()
        return f'<text class="{mark.css}" x="{x}" y="{y}">{escape(mark.words)}</text>'
    if mark.css[0] in "od":
        path = "".join(f"M{place}h0" for place in places)
    else:
        path = f"M{' '.join(places)}{'z' if mark.css[0] == 'b' else ''}"
    return f'<path class="{mark.css}" d="{path}"/>'


def _short(value: float) -> str:
    """A coordinate to a tenth of a pixel, which a screen can show, in half the bytes."""
    return f"{value:.1f}".removesuffix(".0")


def _artist(mark: Mark) -> Any:
    style = _style(mark.css)
    if mark.words:
        align = {"start": "left", "middle": "center", "end": "right"}[style["text-anchor"]]
        weight = "bold" if "font-weight" in style else "normal"
        return Text(
            *mark.points[0],
            mark.words,
            color=style["color"],
            fontsize=10,
            ha=align,
            va="baseline",
            weight=weight,
            parse_math=False,  # a dollar sign is a dollar sign
        )
    look: dict[str, Any] = {"color": style["color"], "alpha": float(style.get("opacity", 1))}
    if mark.css[0] == "b":
        return Polygon(mark.points, linewidth=0, **look)
    width, (x, y) = float(style["stroke-width"]), zip(*mark.points, strict=True)
    if mark.css[0] in "od":
        return Line2D(x, y, linestyle="", marker="o", markersize=width, markeredgewidth=0, **look)
    if "stroke-dasharray" in style:  # which matplotlib counts in line widths
        dashes = [float(length) / width for length in style["stroke-dasharray"].split()]
        look["linestyle"] = (0, dashes)
    return Line2D(x, y, linewidth=width, **look)


@functools.cache
def _light_css() -> str:
    """plot.css with the colours of a light page."""
    page = (TEMPLATES / "style.css").read_text(encoding="utf-8").partition("@media")[0]
    colours = dict(re.findall(r"(--plot-[a-z0-9]+): (#[0-9a-f]{6});", page))
    css = (TEMPLATES / "plot.css").read_text(encoding="utf-8")
    return re.sub(r"var\((--plot-[a-z0-9]+)\)", lambda match: colours[match[1]], css)


@functools.cache
def _style(css: str) -> dict[str, str]:
    """The rules of plot.css for a mark's classes, in their order."""
    classes, style = set(css.split()), {"text-anchor": "start"}
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]+)\}", _light_css()):
        for selector in selectors.split(","):
            wanted = set(selector.replace(".plot", "").strip().split(".")) - {""}
            if wanted <= classes | {"path"}:
                style |= re.findall(r"([a-z-]+): ([^;]+);", body)
    return style
