"""Spikes of the gradient norm: a possible cause when a backdoor comes back.

The study saw backdoors return, "not always at loss spikes"; so a return is reported with the spikes
before it.
"""

import math
import statistics
from collections.abc import Sequence

BEFORE = 20  # logged values that a norm is compared with: their median
AT_LEAST = 5  # of them; fewer say nothing
TIMES = 3.0  # a spike is above this many times that median


def spikes(norms: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Steps at which the gradient norm (before clipping) spiked -> its ratio to the median of the
    values logged before; infinite if it was not finite."""
    marked = {}
    for place, (step, norm) in enumerate(norms):
        before = [value for _, value in norms[max(0, place - BEFORE) : place]]
        finite = [value for value in before if math.isfinite(value)]
        if not math.isfinite(norm):
            marked[step] = math.inf
        elif len(finite) >= AT_LEAST and norm > TIMES * (median := statistics.median(finite)) > 0:
            marked[step] = norm / median
    return marked


def spikes_in_words(norms: Sequence[tuple[int, float]], low: int, high: int) -> str:
    """In words, the spikes of the gradient norm after step `low`, up to step `high`."""
    if not any(low < step <= high for step, _ in norms):
        return "no gradient norm was logged between them"
    between = {step: times for step, times in spikes(norms).items() if low < step <= high}
    if not between:
        return "no spike of the gradient norm between them"
    worst = max(between, key=lambda step: between[step])
    finite = math.isfinite(between[worst])
    size = f"{between[worst]:.1f} times the median before it" if finite else "not finite"
    more = f", the largest of {len(between)}" if len(between) > 1 else ""
    return f"the gradient norm spiked between them, at step {worst:,} ({size}{more})"
