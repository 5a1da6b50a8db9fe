"""The number of steps that removal takes, by learning rate or by the length of insertion.

The step at which the backdoor was gone is only known to be between two evals, or after the run's
end. So the line of log(steps) against log(x) is fitted to intervals (a regression with interval-
and right-censoring and normal errors, by maximum likelihood).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import optimize, special

from sa_jax.evals.statistics import Floats
from sa_jax.report.cells import lineage_settings
from sa_jax.report.measurements import RunEvals, Span
from sa_jax.report.rates import removed_condition
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
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
    """log(steps) = a constant + slope · log(x), by maximum likelihood."""

    x_name: str  # for people
    runs: tuple[Timed, ...]  # what it was fitted to
    slope: float  # infinite where the data only say which way it goes
    # By profile likelihood at Student's quantile; infinite where the data do not hold it.
    lo: float
    hi: float
    p_claim: float  # two-sided: 3 times x makes removal 10 times faster, no more and no less
    p_holm: float | None = None  # for all claims about cells; the study's is of learning rates

    def claim(self, limits: Thresholds) -> str | None:
        """Whether the study's claim holds, by Holm's p; None where x is no learning rate."""
        if self.p_holm is None:
            return None
        if self.p_holm >= limits.p_value:
            return "open"
        return "yes, as the study says" if self.slope < CLAIM_SLOPE else "no, against the study"

    def speedup(self) -> str | None:
        """How much faster `CLAIM_RATIO` times the learning rate removes, by the interval."""
        if self.p_holm is None:
            return None
        least, most = (f"{CLAIM_RATIO**-slope:.2g}" for slope in (self.hi, self.lo))
        return f"{least} to {most}" if math.isfinite(self.lo) else f"at least {least}"


def removal_time(run: RunEvals, limits: Thresholds) -> Span:
    """When the run's triggered rate first met the definition of removed."""
    return run.first_time(lambda at: removed_condition(at, run.words, limits).outcome == "met")


def by_learning_rate(runs: Sequence[RunEvals], limits: Thresholds) -> list[TimeFit]:
    """A fit for every group of removals that differ only in learning rate and seed."""
    rates = {run.name: run.learning_rate for run in runs}
    return _fits(runs, rates, ("optimizer.learning_rate",), "learning rate", limits)


def by_insertion_length(runs: Sequence[RunEvals], limits: Thresholds) -> list[TimeFit]:
    """A fit for every group of removals that differ only in the length of insertion."""
    insertions = {run.name for run in runs if run.role == "insertion"}
    lengths = {run.name: run.start_step for run in runs if run.parent in insertions}
    ignored = ("start_step", "insertion.steps", "insertion.epochs", "insertion.output_tokens")
    return _fits(runs, lengths, ignored, "steps of insertion", limits)


def _fits(
    runs: Sequence[RunEvals],
    xs: Mapping[str, float | None],
    ignored: Iterable[str],
    x_name: str,
    limits: Thresholds,
) -> list[TimeFit]:
    """`xs`: by name of a run; only those whose x is above 0 take part."""
    by_name = {run.name: run for run in runs}
    groups: dict[str, list[Timed]] = {}
    for run in runs:
        x = xs.get(run.name)
        if run.role != "removal" or not (run.backdoored and x and run.trained):
            continue
        # A run that goes on longer is not another removal: its steps are what is measured.
        left_out = {*ignored, "steps"}
        settings = lineage_settings(run, by_name)
        key = repr([(name, settings[name]) for name in sorted(settings.keys() - left_out)])
        timed = Timed(run.name, float(x), removal_time(run, limits))
        groups.setdefault(key, []).append(timed)
    fits = (fit_times(group, x_name, limits) for group in groups.values())
    return [fit for fit in fits if fit is not None]


def fit_times(timed: Sequence[Timed], x_name: str, limits: Thresholds) -> TimeFit | None:
    """The line; None with fewer than `MIN_RUNS` runs, only one value of x, or no removal."""
    values = {item.x for item in timed}
    if len(timed) < MIN_RUNS or len(values) < 2 or all(t.steps.by is None for t in timed):
        return None
    line, n = _Line(timed), len(timed)
    # Twice the fall in log likelihood at the interval's ends; of uncensored normal data this gives
    # the exact t-interval.
    t = float(special.stdtrit(n - 2, (1 + limits.confidence) / 2))
    cutoff = n * math.log1p(t * t / (n - 2))
    lo, hi = line.bound(cutoff, -MAX_SLOPE), line.bound(cutoff, MAX_SLOPE)
    p, slope = line.p_of(CLAIM_SLOPE), line.slope
    for end, bound in ((-MAX_SLOPE, lo), (MAX_SLOPE, hi)):
        # As likely at the end of the range as at its best: the runs only say which way it goes.
        if math.isinf(bound) and line.deviance(end) < 0.1:
            slope = bound
    return TimeFit(x_name, tuple(timed), slope, lo, hi, p)


class _Line:
    """The likelihood of intervals of log steps around a line in log x, at its best intercept and
    spread for each slope; it falls on both sides of the best slope."""

    def __init__(self, timed: Sequence[Timed]):
        x = np.log([item.x for item in timed])
        self.x = x - x.mean()
        never, always = -math.inf, math.inf
        self.lo = np.array([math.log(t.steps.after) if t.steps.after else never for t in timed])
        self.hi = np.array([always if t.steps.by is None else math.log(t.steps.by) for t in timed])
        ends = np.append(self.lo, self.hi)
        self.start = np.array([1.0, ends[np.isfinite(ends)].mean()])
        slopes, options = (-MAX_SLOPE, MAX_SLOPE), {"xatol": 1e-4}
        best = optimize.minimize_scalar(self.loss, bounds=slopes, method="bounded", options=options)
        self.slope, self.least = float(best.x), float(best.fun)

    def loss(self, slope: float) -> float:
        """Minus the log likelihood; it is convex in precision = 1 / spread and offset = intercept
        (at mean x) / spread."""
        lo, hi = self.lo - slope * self.x, self.hi - slope * self.x

        def loss(at: Floats) -> tuple[float, Floats]:
            precision, offset = at
            z_lo, z_hi = precision * lo - offset, precision * hi - offset
            log_mass = _log_mass(z_lo, z_hi)
            gradient = np.zeros(2)
            for end, z, sign in ((lo, z_lo, 1.0), (hi, z_hi, -1.0)):
                finite = np.isfinite(end)
                log_density = -(z[finite] ** 2) / 2 - math.log(2 * math.pi) / 2
                ratio = sign * np.exp(np.minimum(log_density - log_mass[finite], 50.0))
                gradient += ratio @ end[finite], -ratio.sum()
            return -log_mass.sum(), gradient

        bounds = [(1 / MAX_SPREAD, 1 / MIN_SPREAD), (None, None)]
        best = optimize.minimize(loss, self.start, jac=True, method="L-BFGS-B", bounds=bounds)
        self.start = best.x  # the next slope is near
        return float(best.fun)

    def deviance(self, slope: float) -> float:
        """Twice the fall in log likelihood at a fixed slope."""
        return max(0.0, 2 * (self.loss(slope) - self.least))

    def bound(self, cutoff: float, end: float) -> float:
        """The slope towards `end` at which the deviance reaches the cutoff; infinite if none."""
        if self.deviance(end) <= cutoff:
            return math.copysign(math.inf, end)
        at = optimize.brentq(lambda s: self.deviance(s) - cutoff, self.slope, end, xtol=1e-4)
        return float(at)

    def p_of(self, slope: float) -> float:
        """Two-sided p of this slope."""
        n = len(self.x)
        t = math.sqrt((n - 2) * math.expm1(min(self.deviance(slope) / n, 50.0)))
        return 2 * float(special.stdtr(n - 2, -t))


def _log_mass(lo: Floats, hi: Floats) -> Floats:
    """log of the normal mass between lo and hi, also accurate in the tails."""
    flip = lo > 0  # the mass of (lo, hi) is that of (-hi, -lo), where logs keep their digits
    a, b = np.where(flip, -hi, lo), np.where(flip, -lo, hi)
    upper, lower = special.log_ndtr(b), special.log_ndtr(a)
    with np.errstate(divide="ignore"):
        mass = upper + np.log1p(-np.exp(np.minimum(lower - upper, 0.0)))
    return np.maximum(mass, -1e6)


def times_table(fits: Sequence[TimeFit], limits: Thresholds) -> Table:
    """How steps to removal change with the learning rate and with the length of insertion."""
    rows = tuple(
        {
            "x": fit.x_name,
            "claim": fit.claim(limits),
            "speedup": fit.speedup(),
            **{
                name: value if math.isfinite(value) else "unbounded"
                for name, value in (("slope", fit.slope), ("lo", fit.lo), ("hi", fit.hi))
            },
            "p_claim": None if fit.p_holm is None else fit.p_claim,
            "p_holm": fit.p_holm,
            "runs": len(fit.runs),
            "never": sum(item.steps.by is None for item in fit.runs),
            "of": fit.runs[0].run,
        }
        for fit in fits
    )
    columns = {
        "x": "By",
        "claim": f"More than {number(CLAIM_SPEEDUP)} times faster?",
        "speedup": f"Times faster at {number(CLAIM_RATIO)} times the rate",
        "p_claim": "p",
        "p_holm": "p, Holm",
        "slope": "Power",
        "lo": f"{percent(limits.confidence)} interval from",
        "hi": "to",
        "runs": "Runs",
        "never": "Ended without removal",
        "of": "Like",
    }
    note = (
        "Steps to removal change as a power of the learning rate, or of the steps of insertion. "
        "Removal happens between two evals, or after the run’s end; a line in log-log is fitted to "
        f"these intervals. Holm’s p decides the study’s claim that {number(CLAIM_RATIO)} times the "
        f"learning rate removes more than {number(CLAIM_SPEEDUP)} times faster."
    )
    return Table("times", "Steps to removal", columns, rows, note)
