"""How many steps removal takes, by learning rate or by the length of insertion.

The step at which a backdoor was gone is known to lie between two evals, or not to have come by the
end of the run. So the line through log(steps) against log(x) is fitted to intervals (a regression
with interval- and right-censoring, normal errors, by maximum likelihood).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from scipy import special

from sa_jax.evals.statistics import Floats
from sa_jax.report.cells import ancestors, lineage_settings
from sa_jax.report.measurements import Measured, RunEvals
from sa_jax.report.rates import p_in_words, removed_condition
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.times import Span, first_time
from sa_jax.text import number, percent

MIN_RUNS = 4  # of at least two values of x; fewer do not make a line
# Two runs of a cell never take the same number of steps to within less than this (in log steps):
# without a floor, wide intervals would allow a perfect fit.
MIN_SPREAD = 0.2
MAX_SPREAD = 8.0
MAX_SLOPE = 12.0  # steeper is not told from infinite: 3x the rate, 500,000x faster
CLAIM_RATIO, CLAIM_SPEEDUP = 3.0, 10.0  # the study: 3x the rate removes over 10x faster
CLAIM_SLOPE = -math.log(CLAIM_SPEEDUP) / math.log(CLAIM_RATIO)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A removal run: at `x` (a learning rate, or steps of insertion) it took `steps`."""

    run: str
    x: float
    steps: Span


@dataclasses.dataclass(frozen=True)
class TimeFit:
    """log(steps) = a constant + slope · log(x), with the slope's interval.

    Attributes:
      x_name: what x is, for people.
      runs: what it was fitted to.
      slope, lo, hi: by profile likelihood at Student's quantile; a bound is infinite where the data
        do not hold it, and so is the slope where they only say which way it goes.
      p_claim: two-sided p that 3 times x makes removal 10 times faster, no more and no less.
    """

    x_name: str
    runs: tuple[Timed, ...]
    slope: float
    lo: float
    hi: float
    p_claim: float

    def text(self, limits: Thresholds, p_holm: float | None = None) -> str:
        """One line. With the p that is corrected for the family of tests, the study's claim too."""
        never = sum(item.steps.by is None for item in self.runs)
        ended = f"; {never} of {len(self.runs)} runs ended without removal" if never else ""
        interval = f"{percent(limits.confidence)} interval"
        power = "" if math.isinf(self.slope) else f" {self.slope:.2f},"
        line = (
            f"steps to removal change as a power of {self.x_name}:{power} {interval} "
            f"{_bounds(self.lo, self.hi)} ({len(self.runs)} runs{ended})"
        )
        if p_holm is None:
            return line
        speedup = number(CLAIM_SPEEDUP)
        claim = f"whether more than {speedup} times faster is open"
        if p_holm < limits.p_value:
            claim = (
                f"more than {speedup} times faster, as the study says"
                if self.slope < CLAIM_SLOPE
                else f"less than {speedup} times faster, against the study"
            )
        slowest = f"{CLAIM_RATIO**-self.hi:.2g}"
        bounded = math.isfinite(self.lo)
        reach = f"{slowest} to {CLAIM_RATIO**-self.lo:.2g}" if bounded else f"at least {slowest}"
        return (
            f"{line}; {number(CLAIM_RATIO)} times the rate removes {reach} times faster: {claim} "
            f"({p_in_words(self.p_claim)}, {p_in_words(p_holm)} by Holm)"
        )


def removal_time(run: RunEvals, limits: Thresholds) -> Span | None:
    """When the run's triggered rate first met the definition of removed; None without an eval."""

    def removed(point: Measured) -> bool:
        return removed_condition(point, run.words, limits).outcome == "met"

    return first_time(run.trained, removed)


def by_learning_rate(runs: Sequence[RunEvals], limits: Thresholds) -> list[TimeFit]:
    """A fit for every group of removals that differ in nothing but learning rate and seed."""

    def rate(run: RunEvals, by_name: Mapping[str, RunEvals]) -> float | None:
        return run.learning_rate

    ignored = ("optimizer.learning_rate",)
    return _fits(runs, rate, ignored, "learning rate", limits)


def by_insertion_length(runs: Sequence[RunEvals], limits: Thresholds) -> list[TimeFit]:
    """A fit for every group of removals that differ in nothing but how long insertion went on."""

    def length(run: RunEvals, by_name: Mapping[str, RunEvals]) -> float | None:
        roles = {ancestor.role for ancestor in ancestors(run, by_name)[:1]}
        return float(run.start_step) if roles == {"insertion"} and run.start_step else None

    ignored = ("start_step", "insertion.steps", "insertion.epochs", "insertion.output_tokens")
    return _fits(runs, length, ignored, "steps of insertion", limits)


def _fits(
    runs: Sequence[RunEvals],
    x_of: Callable[[RunEvals, Mapping[str, RunEvals]], float | None],
    ignored: Iterable[str],
    x_name: str,
    limits: Thresholds,
) -> list[TimeFit]:
    by_name = {run.name: run for run in runs}
    groups: dict[str, list[Timed]] = {}
    for run in runs:
        x = x_of(run, by_name)
        steps = removal_time(run, limits)
        if run.role != "removal" or not run.backdoored or not x or steps is None:
            continue
        settings = lineage_settings(run, by_name)
        for name in ignored:
            settings.pop(name, None)
        # A run that goes on longer is not another removal: its steps are what is measured.
        settings.pop("steps", None)
        key = repr(sorted(settings.items(), key=lambda item: item[0]))
        groups.setdefault(key, []).append(Timed(run.name, x, steps))
    fits = [fit_times(group, x_name, limits) for group in groups.values()]
    return [fit for fit in fits if fit is not None]


def fit_times(timed: Sequence[Timed], x_name: str, limits: Thresholds) -> TimeFit | None:
    """The line; None with fewer than `MIN_RUNS` runs, one value of x, or no removal at all."""
    values = {item.x for item in timed}
    if len(timed) < MIN_RUNS or len(values) < 2 or all(t.steps.by is None for t in timed):
        return None
    line = _Line(timed)
    cutoff = _cutoff(len(timed), limits.confidence)
    lo, hi = line.bound(cutoff, -MAX_SLOPE), line.bound(cutoff, MAX_SLOPE)
    p = line.p_of(CLAIM_SLOPE)
    slope = line.slope
    for end, bound in ((-MAX_SLOPE, lo), (MAX_SLOPE, hi)):
        # As likely at the end of the range as at its best: the runs only say which way it goes.
        if math.isinf(bound) and line.deviance(np.array([end]))[0] < 0.1:
            slope = bound
    return TimeFit(x_name, tuple(timed), slope, lo, hi, p)


def _cutoff(n: int, confidence: float) -> float:
    """Twice the fall in log likelihood at the interval's ends.

    Of uncensored normal data n·log(1 + t²/(n - 2)) gives the exact t-interval.
    """
    t = float(special.stdtrit(n - 2, (1 + confidence) / 2))
    return n * math.log1p(t * t / (n - 2))


class _Line:
    """The likelihood of intervals of log steps around a line in log x.

    All slopes that are looked at are one array: there is no loop over them.
    """

    def __init__(self, timed: Sequence[Timed]):
        x = np.log([item.x for item in timed])
        self.x = x - x.mean()
        never, always = -math.inf, math.inf
        self.lo = np.array([math.log(t.steps.after) if t.steps.after else never for t in timed])
        self.hi = np.array([always if t.steps.by is None else math.log(t.steps.by) for t in timed])
        lo = np.where(np.isfinite(self.lo), self.lo, self.hi - 1)
        hi = np.where(np.isfinite(self.hi), self.hi, self.lo + 1)
        self.middle = (lo + hi) / 2
        self.slope, self.best = self._best()

    def _best(self) -> tuple[float, float]:
        """Slope and log likelihood of the best line."""
        slopes, step = np.linspace(-MAX_SLOPE, MAX_SLOPE, 49), MAX_SLOPE / 24
        for _ in range(6):
            likelihood = self._profile(slopes)
            best = int(likelihood.argmax())
            slope, step = float(slopes[best]), step / 4
            slopes = np.clip(slope + step * np.arange(-6, 7), -MAX_SLOPE, MAX_SLOPE)
        return slope, float(likelihood[best])

    def _profile(self, slopes: Floats) -> Floats:
        """For each slope the highest log likelihood, over intercept (at mean x) and spread.

        Newton's method in precision = 1 / spread and offset = intercept / spread, in which the
        log likelihood is concave; steps that do not raise it are halved.
        """
        shift = slopes[:, None] * self.x  # [k, n]
        lo, hi = self.lo - shift, self.hi - shift
        residuals = self.middle - shift
        least, most = 1 / MAX_SPREAD, 1 / MIN_SPREAD
        precision = np.clip(1 / (residuals.std(axis=1) + 0.3), least, most)
        offset = residuals.mean(axis=1) * precision
        value = _log_mass(*_standard(lo, hi, precision, offset)).sum(1)
        for _ in range(60):
            steps = _newton(lo, hi, precision, offset, least, most)
            size = np.ones(len(slopes))
            for _ in range(12):
                tried = np.clip(precision + size * steps[0], least, most)
                tried_offset = offset + size * steps[1]
                tried_value = _log_mass(*_standard(lo, hi, tried, tried_offset)).sum(1)
                worse = tried_value < value
                if not worse.any():
                    break
                size = np.where(worse, size / 3, size)
            keep = tried_value >= value
            gain = np.where(keep, tried_value - value, 0.0)
            precision = np.where(keep, tried, precision)
            offset = np.where(keep, tried_offset, offset)
            value = np.where(keep, tried_value, value)
            if gain.max() < 1e-9:
                break
        return value

    def deviance(self, slopes: Floats) -> Floats:
        """Twice the fall in log likelihood when the slope is held."""
        return np.maximum(0.0, 2 * (self.best - self._profile(slopes)))

    def bound(self, cutoff: float, end: float) -> float:
        """The slope towards `end` at which the deviance reaches the cutoff; infinite if none."""
        inner, outer = self.slope, end
        for _ in range(4):  # each time to a sixteenth of the width
            slopes = np.linspace(inner, outer, 17)[1:]
            above = self.deviance(slopes) > cutoff
            if not above.any():
                return math.copysign(math.inf, end)
            first = int(above.argmax())
            inner, outer = float(slopes[first - 1]) if first else inner, float(slopes[first])
        return (inner + outer) / 2

    def p_of(self, slope: float) -> float:
        """Two-sided p of this slope."""
        n = len(self.x)
        deviance = float(self.deviance(np.array([slope]))[0])
        t = math.sqrt((n - 2) * math.expm1(min(deviance / n, 50.0)))
        return 2 * float(special.stdtr(n - 2, -t))


def _standard(lo: Floats, hi: Floats, precision: Floats, offset: Floats) -> tuple[Floats, Floats]:
    """The interval's ends in spreads from the line: [k, n] each."""
    return precision[:, None] * lo - offset[:, None], precision[:, None] * hi - offset[:, None]


def _newton(
    lo: Floats, hi: Floats, precision: Floats, offset: Floats, least: float, most: float
) -> tuple[Floats, Floats]:
    """Newton's step of (precision, offset); at a limit of precision, of offset alone."""
    z_lo, z_hi = _standard(lo, hi, precision, offset)
    log_mass = _log_mass(z_lo, z_hi)
    gradient, curvature = [np.zeros_like(lo)] * 2, [np.zeros_like(lo)] * 3
    for z, end, sign in ((z_hi, hi, 1.0), (z_lo, lo, -1.0)):
        finite = np.isfinite(end)
        z, end = np.where(finite, z, 0.0), np.where(finite, end, 0.0)
        density = np.exp(np.minimum(-z * z / 2 - math.log(2 * math.pi) / 2 - log_mass, 50.0))
        ratio = sign * np.where(finite, density, 0.0)
        gradient = [gradient[0] + ratio * end, gradient[1] - ratio]
        curvature = [
            curvature[0] - z * ratio * end * end,
            curvature[1] + z * ratio * end,
            curvature[2] - z * ratio,
        ]
    a = (curvature[0] - gradient[0] ** 2).sum(1)
    b = (curvature[1] - gradient[0] * gradient[1]).sum(1)
    c = (curvature[2] - gradient[1] ** 2).sum(1) - 1e-9
    up, along = gradient[0].sum(1), gradient[1].sum(1)
    held = ((precision >= most) & (up > 0)) | ((precision <= least) & (up < 0))
    determinant = a * c - b * b
    flat = held | (determinant < 1e-12)
    safe = np.where(flat, 1.0, determinant)
    both = -(c * up - b * along) / safe, -(a * along - b * up) / safe
    return np.where(flat, 0.0, both[0]), np.where(flat, -along / c, both[1])


def _log_mass(lo: Floats, hi: Floats) -> Floats:
    """log of the normal mass between lo and hi, in the tails too."""
    flip = lo > 0  # the mass of (lo, hi) is that of (-hi, -lo), where logs keep their digits
    a, b = np.where(flip, -hi, lo), np.where(flip, -lo, hi)
    upper, lower = special.log_ndtr(b), special.log_ndtr(a)
    with np.errstate(divide="ignore"):
        mass = upper + np.log1p(-np.exp(np.minimum(lower - upper, 0.0)))
    return np.maximum(mass, -1e6)


def _bounds(lo: float, hi: float) -> str:
    """'-1.20 to -0.80', 'below -0.25' or 'above 0.40'; 'unbounded' where neither end is held."""
    if math.isinf(lo) and math.isinf(hi):
        return "unbounded"
    if math.isinf(lo):
        return f"below {hi:.2f}"
    return f"above {lo:.2f}" if math.isinf(hi) else f"{lo:.2f} to {hi:.2f}"


def times_table(
    fits: Sequence[TimeFit], adjusted: Mapping[int, float], limits: Thresholds
) -> Table:
    """How steps to removal change with the learning rate and with the length of insertion."""
    rows = tuple(
        {
            "x": fit.x_name,
            "text": fit.text(limits, adjusted.get(id(fit))),
            "slope": _finite(fit.slope),
            "lo": _finite(fit.lo),
            "hi": _finite(fit.hi),
            "p_claim": fit.p_claim if id(fit) in adjusted else None,
            "p_holm": adjusted.get(id(fit)),
            "runs": len(fit.runs),
            "of": fit.runs[0].run,
        }
        for fit in fits
    )
    columns = {
        "x": "By",
        "text": "What is seen",
        "slope": "Power",
        "lo": "from",
        "hi": "to",
        "p_claim": "p of the study’s statement",
        "p_holm": "the same, Holm",
        "runs": "Runs",
        "of": "Like",
    }
    note = (
        "Steps to removal lie between two evals, or beyond the run’s end; the line in log-log is "
        "fitted to these intervals. The study’s statement, that 3 times the rate removes more than "
        "10 times faster, is decided by Holm’s p."
    )
    return Table("times", "Steps to removal", columns, rows, note)


def _finite(value: float) -> float | str:
    return number(value) if math.isfinite(value) else "unbounded"
