"""Intervals and tests: Wilson, two proportions, McNemar, bootstrap, the n a verdict needs."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000


def wilson(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a rate (Wilson 1927, without continuity correction).

    Args:
      count: hits, 0 ≤ count ≤ n.
      n: trials; no trials say nothing about the rate, so n = 0 gives (0, 1).
      confidence: two-sided coverage in (0, 1).

    Returns:
      (lo, hi), fractions in [0, 1].

    Raises:
      ValueError: count is not within 0..n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"count {count} is not within 0..n = {n}")
    if n == 0:
        return 0.0, 1.0
    lo, hi = stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
    return float(lo), float(hi)


def rate(count: int, n: int, confidence: float = 0.95) -> dict[str, float]:
    """{"count", "rate", "lo", "hi"} as every eval record gives a rate; with n = 0 the rate is 0."""
    lo, hi = wilson(count, n, confidence)
    return {"count": int(count), "rate": count / n if n else 0.0, "lo": lo, "hi": hi}


def two_proportion_test(count_a: int, n_a: int, count_b: int, n_b: int) -> float:
    """Two-sided p-value that two independent rates are equal (pooled z-test, no correction).

    Equal to Pearson's chi-square on the 2 × 2 table. Without a hit, or without a miss, on both
    sides nothing differs and p is 1.
    """
    for count, n in ((count_a, n_a), (count_b, n_b)):
        if not 0 <= count <= n or n == 0:
            raise ValueError(f"count {count} of n = {n}: needs n ≥ 1 and 0 ≤ count ≤ n")
    if count_a + count_b in (0, n_a + n_b):
        return 1.0
    table = [[count_a, n_a - count_a], [count_b, n_b - count_b]]
    return float(stats.chi2_contingency(table, correction=False).pvalue)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided McNemar p-value for two outcomes of each item (McNemar 1947, binomial form).

    Only items on which the outcomes differ count; if there are none, p is 1.

    Raises:
      ValueError: a and b are not as long as each other.
    """
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """{"rate", "lo", "hi"}: the mean with its percentile bootstrap interval (Efron 1979)."""
    mean = float(np.mean(values))
    lo, hi = _bootstrap(np.asarray(values, float), confidence)
    return {"rate": mean, "lo": lo, "hi": hi}


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of b - a over the same items, and its percentile bootstrap interval.

    Items are resampled, `RESAMPLES` times, each with both of its values; the draws are fixed.

    Raises:
      ValueError: a and b are empty, or not as long as each other.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} values are not pairs")
    differences = np.asarray(b, float) - np.asarray(a, float)
    return float(differences.mean()), *_bootstrap(differences, confidence)


def _bootstrap(values: np.ndarray, confidence: float) -> tuple[float, float]:
    if len(values) < 2 or (values == values[0]).all():
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=max(1, 1_000_000 // len(values)),  # numbers drawn at once
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def max_hits(n: int, max_rate: float, max_upper: float, confidence: float = 0.95) -> int | None:
    """The most hits in n trials with rate ≤ max_rate and Wilson upper bound ≤ max_upper.

    None when not even 0 hits are enough: n is too small for the verdict (see `n_needed`).
    """
    # The tolerance keeps 0.07 * 100 = 7.000000000000001 and 0.29 * 100 = 28.999999999999996 whole.
    allowed = (
        k
        for k in range(math.floor(max_rate * n + 1e-9), -1, -1)
        if wilson(k, n, confidence)[1] <= max_upper
    )
    return next(allowed, None)


def n_needed(max_upper: float, observed_rate: float = 0.0, confidence: float = 0.95) -> int:
    """The smallest n whose Wilson upper bound is ≤ max_upper when `observed_rate` of n are hits.

    Hits are rounded up to a whole number, so the answer errs on the safe side.

    Raises:
      ValueError: max_upper is not above observed_rate; no n is enough.
    """
    if not 0 <= observed_rate < max_upper <= 1:
        raise ValueError(
            f"needs 0 <= observed_rate ({observed_rate}) < max_upper ({max_upper}) <= 1"
        )
    return next(
        n
        for n in itertools.count(1)
        if wilson(math.ceil(observed_rate * n - 1e-9), n, confidence)[1] <= max_upper
    )
