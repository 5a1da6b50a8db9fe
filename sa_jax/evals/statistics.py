"""Intervals and tests of rates: Wilson, exact, two proportions, McNemar, bootstrap, Holm."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray
from scipy import special

RESAMPLES = 10_000
ENOUGH_PAIRS = 0.8  # the share of the smaller eval's items that a paired comparison must cover

Values = TypeVar("Values")

Floats = NDArray[np.float64]


def wilson(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (lo, hi) of a rate (1927, no continuity correction); (0, 1) for n = 0.
    ValueError for a count that is not within 0..n."""
    if not 0 <= count <= n:
        raise ValueError(f"count {count} is not within 0..n = {n}")
    if n == 0:
        return 0.0, 1.0
    lo, hi = wilson_bounds(count, n, confidence)
    return float(lo), float(hi)


def wilson_bounds(
    counts: ArrayLike, n: ArrayLike, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """`wilson` of arrays that broadcast; n ≥ 1, and numbers need not be whole."""
    z = float(special.ndtri((1 + confidence) / 2))
    return _score_bounds(np.asarray(counts, float), np.asarray(n, float), z)


def _score_bounds(counts: Floats, n: Floats, z: float) -> tuple[Floats, Floats]:
    """Both bounds at z standard errors. Exactly 0 without a hit and 1 without a miss."""
    p = counts / n
    centre = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    lo = np.where(counts <= 0, 0.0, (centre - half) / scale)
    hi = np.where(counts >= n, 1.0, (centre + half) / scale)
    return lo, hi


def exact_interval(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate (1934): it covers at least `confidence`, for any n ≥ 1."""
    lo, hi = scipy.stats.binomtest(count, n).proportion_ci(confidence, "exact")
    return float(lo), float(hi)


def n_to_decide(observed: float, limit: float, confidence: float = 0.95) -> int | None:
    """The smallest n at which a Wilson interval around the rate `observed` excludes `limit`; None
    if the two are equal. The interval excludes a limit if the score test at the limit rejects it:
    n > z² · limit · (1 - limit) / (observed - limit)²."""
    if math.isclose(observed, limit, abs_tol=1e-12):
        return None
    z = float(special.ndtri((1 + confidence) / 2))
    return math.floor(z * z * limit * (1 - limit) / (observed - limit) ** 2) + 1


def rate(count: int, n: int) -> dict[str, float]:
    """{"count", "rate", "lo", "hi"}, as eval records write a rate; with n = 0 the rate is 0."""
    lo, hi = wilson(count, n)
    return {"count": int(count), "rate": count / n if n else 0.0, "lo": lo, "hi": hi}


def two_proportion_test(count_a: int, n_a: int, count_b: int, n_b: int) -> float:
    """Two-sided p-value that two independent rates, of n ≥ 1, are equal (pooled z-test, no
    correction). It equals Pearson's chi-square test on the 2 × 2 table. If both sides have no hit,
    or no miss, p is 1."""
    return 2 * float(special.ndtr(-abs(two_proportion_z(count_a, n_a, count_b, n_b))))


def two_proportion_z(
    counts_a: ArrayLike, n_a: ArrayLike, counts_b: ArrayLike, n_b: ArrayLike
) -> Floats:
    """z of the same test for arrays that broadcast; above 0 if b's rate is higher."""
    a, size_a, b, size_b = (np.asarray(x, float) for x in (counts_a, n_a, counts_b, n_b))
    pooled = (a + b) / (size_a + size_b)
    variance = pooled * (1 - pooled) * (1 / size_a + 1 / size_b)
    difference = b / size_b - a / size_a
    return np.divide(difference, np.sqrt(variance), out=np.zeros_like(variance), where=variance > 0)


def mcnemar(
    a: Sequence[bool],
    b: Sequence[bool],
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
) -> float:
    """Exact McNemar p-value (1947, binomial form) for two outcomes of each item, in pairs.

    Only items on which the outcomes differ count; if there are none, p is 1. 'greater' tests for b
    being true more often than a, 'less' for less often.
    """
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    if not only_a + only_b:
        return 1.0
    return float(scipy.stats.binomtest(only_b, only_a + only_b, 0.5, alternative).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing all of them at once (Holm 1979), in the order given. If every
    adjusted p below α is rejected, the chance of any false rejection is below α."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(p) for p in adjusted]


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """{"rate", "lo", "hi"}: the mean with its 95 % percentile bootstrap interval (Efron 1979)."""
    mean = float(np.mean(values))
    if len(values) < 2 or min(values) == max(values):
        return {"rate": mean, "lo": mean, "hi": mean}
    interval = scipy.stats.bootstrap(
        (np.asarray(values, float),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // len(values)),  # numbers drawn at once
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"rate": mean, "lo": float(interval.low), "hi": float(interval.high)}


def pairs(
    before: Mapping[Hashable, Values], after: Mapping[Hashable, Values]
) -> list[tuple[Values, Values]]:
    """The values of the questions that both evals asked, in the order of `after`; [] if these are
    less than `ENOUGH_PAIRS` of the smaller eval's, because they need not stand for the others."""
    first = dict(before.items())
    both = [(first[question], b) for question, b in after.items() if question in first]
    both = [(a, b) for a, b in both if np.size(a) == np.size(b)]  # type: ignore[arg-type]
    return both if len(both) >= ENOUGH_PAIRS * min(len(first), len(after)) else []


def means(both: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[Floats, Floats, Floats]:
    """Of pairs of items: the mean of each before and after, and the number of its values."""
    sizes = np.array([len(values) for values, _ in both], float)
    a, b = (np.array([sum(side) for side in sides]) / sizes for sides in zip(*both, strict=True))
    return a, b, sizes


class PairedDifference(NamedTuple):
    """Mean of b - a over items, its interval, and the p-value of no difference."""

    difference: float
    lo: float
    hi: float
    p_value: float


def paired_difference(
    a: Floats, b: Floats, sizes: Floats, confidence: float = 0.95, scale: float = 1.0
) -> PairedDifference:
    """Two scores of the same items, compared item by item.

    Scores of 0/1 get the interval of Agresti and Min (2005), with half an item added to each of the
    four outcomes, and McNemar's exact p; other scores get Student's interval and test.

    Args:
      a, b: float [N], an item's score before and after, in [0, 1]; N ≥ 1.
      sizes: float [N], the number of answers of which each is the mean. An item counts by its size,
        and its answers are not taken as independent.
      scale: the caller has multiplied `a` by this, so that a 1 is `scale` in it.

    Returns:
      All but the p-value are fractions. The interval of rates is cut to what is possible, -scale
      to 1. Means of answers of 0/1 have at least the error 1 / (N + 2). A single item that is not
      0/1 gives (-1, 1) and p = 1.
    """
    n = len(a)
    rates = bool(min(a.min(), b.min()) >= 0 and a.max() <= scale and b.max() <= 1)
    binary = bool(np.isin(a, (0, scale)).all() and np.isin(b, (0, 1)).all() and sizes.max() == 1)
    weights = sizes / sizes.mean()
    difference = float((b - a) @ weights / n)
    if binary:
        # The half items move the interval's centre, not the difference.
        centre, variance = _with_half_items(b - a, weights, scale)
        error = math.sqrt(variance)
        quantile = float(special.ndtri((1 + confidence) / 2))
        p = mcnemar([bool(x) for x in a], [bool(x) for x in b])
    elif n < 2:
        return PairedDifference(difference, -1.0, 1.0, 1.0)
    else:
        # Weighted sizes enter as w·d, so that an item's variance is that of its whole contribution.
        centre = difference
        error = float(np.std(weights * (b - a - centre), ddof=1) / np.sqrt(n))
        answers = np.append(a * sizes / scale, b * sizes)
        if rates and np.allclose(answers, np.round(answers), rtol=0, atol=1e-6):
            # Means of answers of 0/1: at least the error of half items where no item changes.
            error = max(error, 1 / (n + 2))
        quantile = float(special.stdtrit(n - 1, (1 + confidence) / 2))
        # Other scores without any spread are certain: equal, or different.
        p = 2 * float(special.stdtr(n - 1, -abs(centre) / error)) if error else float(not centre)
    lo, hi = centre - quantile * error, centre + quantile * error
    if rates:
        lo, hi = max(lo, -scale), min(hi, 1.0)
    return PairedDifference(difference, lo, hi, p)


def _with_half_items(change: Floats, weights: Floats, scale: float = 1.0) -> tuple[float, float]:
    """Mean of items' b - scale · a, and its variance, with half an item added to each of the four
    outcomes."""
    change = np.append(change, [1 - scale, -scale, 1, 0])
    weights = np.append(weights, [0.5] * 4)
    total = weights.sum()
    centre = weights @ change / total
    return float(centre), float(weights @ (change - centre) ** 2 / total / total)


def difference_interval(
    a: tuple[float, float, float], b: tuple[float, float, float], scale: float = 1.0
) -> tuple[float, float, float]:
    """b - scale · a with its interval, from the (value, lo, hi) of two independent estimates: by
    the method of variance estimates recovery (Zou and Donner 2008), which for two Wilson intervals
    with scale 1 gives Newcombe's interval (1998, method 10)."""
    value_a, lo_a, hi_a = (scale * x for x in a)
    value_b, lo_b, hi_b = b
    difference = value_b - value_a
    lo = difference - math.hypot(value_b - lo_b, hi_a - value_a)
    hi = difference + math.hypot(hi_b - value_b, value_a - lo_a)
    return difference, lo, hi


def power(effect: float, error: float, p_value: float) -> float:
    """The chance that a true difference of `effect` gives a two-sided p below `p_value`, if its
    estimate is normal with the standard error `error`."""
    if error <= 0:
        return 1.0
    critical = -float(special.ndtri(p_value / 2))
    shift = effect / error
    return float(special.ndtr(shift - critical) + special.ndtr(-shift - critical))


# Answers of one seed resemble each other at least this much (intraclass correlation): three seeds
# that happen to agree do not show that all seeds would.
MIN_SEED_CORRELATION = 0.02


def seed_mean(
    seeds: Sequence[tuple[int, int]], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean over seeds of a rate, with an interval for new seeds: (mean, lo, hi).

    It is Wilson's interval at Student's quantile for seeds - 1. Its number of answers is the
    effective sample size (Korn and Graubard, 1998), which gives the standard error observed between
    the seeds: at most that of a correlation of `MIN_SEED_CORRELATION` within a seed, at least one
    answer per seed. In simulation it covers 93 % or more for 3, 5 and 10 seeds, from equal seeds to
    seeds with a standard deviation of 15 points. A percentile bootstrap over three seeds covers
    less than 85 % if seeds differ by 14 points (the tests simulate both). If seeds are all or
    nothing, also give k of m with `exact_interval`.

    `seeds` has (count, n) of each, at least one. The result of a single seed is its own Wilson
    interval, which says nothing about other seeds.
    """
    rates = np.array([count / n for count, n in seeds])
    if len(seeds) == 1:
        return float(rates[0]), *wilson(*seeds[0], confidence)
    mean, m = float(rates.mean()), len(seeds)
    variance = float(rates.var(ddof=1)) / m
    most = sum(n / (1 + (n - 1) * MIN_SEED_CORRELATION) for _, n in seeds)
    answers = min(most, max(m, mean * (1 - mean) / variance)) if variance > 0 else most
    quantile = float(special.stdtrit(m - 1, (1 + confidence) / 2))
    lo, hi = _score_bounds(np.array(mean * answers), np.array(answers), quantile)
    return mean, float(lo), float(hi)


def paired_seeds(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], confidence: float = 0.95
) -> tuple[float, float, float, float]:
    """Mean over seeds of b - a, its t-interval and two-sided p: arms paired by seed and by item.

    The standard error is that between the seeds' differences, but at least the one that the items
    within the seeds give (with half an item added to each of the four outcomes). So seeds that
    agree by chance do not make it 0.

    Args:
      a, b: seed by seed (two or more), the values of the same items (one or more), 0 or 1.

    Returns:
      (difference, lo, hi, two-sided p); the interval is cut to -1 to 1.
    """
    differences, within = [], []
    for x, y in zip(a, b, strict=True):
        change = np.asarray(y, float) - np.asarray(x, float)
        differences.append(change.mean())
        within.append(_with_half_items(change, np.ones(len(change)))[1])
    m = len(differences)
    variance = max(float(np.var(differences, ddof=1)), float(np.mean(within))) / m
    difference, error = float(np.mean(differences)), math.sqrt(variance)
    half = error * float(special.stdtrit(m - 1, (1 + confidence) / 2))
    p = 2 * float(special.stdtr(m - 1, -abs(difference) / error))
    return difference, max(difference - half, -1.0), min(difference + half, 1.0), p
