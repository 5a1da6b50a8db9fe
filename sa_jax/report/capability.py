"""The cost of a removal in capability: every score before and after, with its interval."""

import numpy as np
from scipy import special

from sa_jax.evals.statistics import (
    difference_interval,
    means,
    paired_difference,
    pairs,
    power,
    two_proportion_test,
    wilson,
)
from sa_jax.report.judgement import CapabilityChange
from sa_jax.report.measurements import Capabilities, Score
from sa_jax.report.rates import interval_in_words, p_in_words
from sa_jax.report.thresholds import Thresholds
from sa_jax.text import number, percent, points

SMALL_FALL = 0.05  # 5 points: the fall whose power is shown where no difference is significant


def capability_changes(
    before: Capabilities, after: Capabilities, limits: Thresholds
) -> tuple[CapabilityChange, ...]:
    """Every score that both have, in the order of `after`: paired over the items of both if they
    are kept and the evals share enough of them; else the scores are taken as independent, with the
    two-proportion test for scores of 0/1."""
    return tuple(
        _change(key, earlier, score, limits)
        for name, scores in after.items()
        for key, score in scores.items()
        if (earlier := before.get(name, {}).get(key)) is not None
    )


def change_in_words(change: CapabilityChange, limits: Thresholds) -> str:
    """'MMLU 69 % before, 25 % after: -44 points (95 % interval -50 to -38, p < 1e-06, n = 400)',
    with the power if the difference is not significant."""
    difference = interval_in_words(change.lo, change.hi, limits.confidence)
    n = f"n\u00a0=\u00a0{change.n:,}{'' if change.paired else ', not paired'}"
    sentence = (
        f"{change.title} {percent(change.before)} before, {percent(change.after)} after: "
        f"{points(change.difference)} points ({difference}, {p_in_words(change.p_value)}, {n})"
    )
    if change.power is None:
        return sentence
    return (
        f"{sentence}; no change shown at p < {limits.p_value:g}, and a true fall of "
        f"{number(100 * SMALL_FALL)} points would have been seen in {percent(change.power)} of "
        "such evals"
    )


def _change(key: str, before: Score, after: Score, limits: Thresholds) -> CapabilityChange:
    kept = 1 - limits.max_capability_loss
    z = float(special.ndtri((1 + limits.confidence) / 2))
    if items := pairs(before.items, after.items):
        a, b, sizes = means(items)
        n, weights = len(items), sizes / sizes.sum()
        rates = float(a @ weights), float(b @ weights)
        difference, lo, hi, p = paired_difference(a, b, sizes, limits.confidence)
        lost = bool(paired_difference(kept * a, b, sizes, limits.confidence, scale=kept).hi < 0)
    else:
        n, rates = min(before.n, after.n), (before.rate, after.rate)
        counts = [score.rate * score.n for score in (before, after)]
        binary = max(rates) <= 1 and np.allclose(counts, np.round(counts), rtol=0, atol=1e-6)
        start, end = (
            (s.rate, *(wilson(round(k), s.n, limits.confidence) if binary else (s.lo, s.hi)))
            for s, k in zip((before, after), counts, strict=True)
        )
        difference, lo, hi = difference_interval(start, end)
        error = (hi - lo) / (2 * z)
        p = 2 * float(special.ndtr(-abs(difference) / error)) if error > 0 else 1.0
        if binary:  # the error of a 95 % interval is too small for a smaller p
            p = two_proportion_test(round(counts[0]), before.n, round(counts[1]), after.n)
        lost = difference_interval(start, end, kept)[2] < 0
    paired, seen = bool(items), p < limits.p_value
    chance = None if seen else _power((hi - lo) / (2 * z), n, paired, limits)
    return CapabilityChange(
        key, after.title, after.headline, n, *rates, difference, lo, hi, p, paired, chance, lost
    )


def _power(error: float, n: int, paired: bool, limits: Thresholds) -> float:
    """The power to detect `SMALL_FALL` with this standard error. Of paired items, a fall changes
    more than changed now, which adds to the variance, and the exact test needs one item more."""
    if not paired:
        return power(SMALL_FALL, error, limits.p_value)
    error = float(np.hypot(error, np.sqrt(SMALL_FALL * (1 - SMALL_FALL) / n)))
    return power(max(0.0, SMALL_FALL - 1 / n), error, limits.p_value)
