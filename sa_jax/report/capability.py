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
    """Every score that both have, in the order of `after`.

    If the items are kept and the evals share enough of them (`statistics.pairs`), the difference is
    paired over the items of both, with the interval of Agresti and Min (2005) and McNemar's exact p
    for scores of 0/1, and a t-interval and t-test for others. If not, the two scores are taken as
    independent, with the two-proportion test for scores of 0/1.
    """
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
        n = len(items)
        weights = sizes / sizes.sum()
        rates = float(a @ weights), float(b @ weights)
        difference, lo, hi, p = paired_difference(a, b, sizes, limits.confidence)
        lost = bool(paired_difference(kept * a, b, sizes, limits.confidence, scale=kept).hi < 0)
    else:
        n = min(before.n, after.n)
        rates = before.rate, after.rate
        start, end = (_at_confidence(score, limits) for score in (before, after))
        difference, lo, hi = difference_interval(start, end)
        error = (hi - lo) / (2 * z)
        p = 2 * float(special.ndtr(-abs(difference) / error)) if error > 0 else 1.0
        hits = _hits(before), _hits(after)
        if hits[0] is not None and hits[1] is not None:
            # The error of a 95 % interval would make a small p smaller still.
            p = two_proportion_test(hits[0], before.n, hits[1], after.n)
        lost = difference_interval(start, end, kept)[2] < 0
    paired = bool(items)
    seen = p < limits.p_value
    power_of_eval = None if seen else _power((hi - lo) / (2 * z), n, paired, limits)
    return CapabilityChange(
        score=key,
        title=after.title,
        headline=after.headline,
        n=n,
        before=rates[0],
        after=rates[1],
        difference=difference,
        lo=lo,
        hi=hi,
        p_value=p,
        paired=paired,
        power=power_of_eval,
        lost=lost,
    )


def _hits(score: Score) -> int | None:
    """The hits of a score of 0/1, whose recorded interval is Wilson's; None for another score."""
    if not 0 <= score.rate <= 1:
        return None
    hits = round(score.rate * score.n)
    recorded = (score.rate, score.lo, score.hi)
    exact = (hits / score.n, *wilson(hits, score.n))
    return hits if np.allclose(recorded, exact, rtol=0, atol=1e-9) else None


def _at_confidence(score: Score, limits: Thresholds) -> tuple[float, float, float]:
    """(rate, lo, hi) at the report's confidence; a record has the interval of 95 %."""
    if (hits := _hits(score)) is not None:
        return score.rate, *wilson(hits, score.n, limits.confidence)
    stretch = float(special.ndtri((1 + limits.confidence) / 2) / special.ndtri(0.975))
    lo, hi = (score.rate + stretch * (bound - score.rate) for bound in (score.lo, score.hi))
    return score.rate, lo, hi


def _power(error: float, n: int, paired: bool, limits: Thresholds) -> float:
    """The power to detect `SMALL_FALL` with this standard error. For paired items: a fall changes
    more items than changed now, which adds to the variance, and the exact test needs one item more
    than a normal test."""
    if not paired:
        return power(SMALL_FALL, error, limits.p_value)
    error = float(np.hypot(error, np.sqrt(SMALL_FALL * (1 - SMALL_FALL) / n)))
    return power(max(0.0, SMALL_FALL - 1 / n), error, limits.p_value)
