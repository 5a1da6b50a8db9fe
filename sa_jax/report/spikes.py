"""Spikes of the gradient norm: what may stand behind a backdoor that comes back.

The study saw backdoors return, "not always at loss spikes"; so a return is told with the spikes on
its way.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

BEFORE = 20  # logged values that a norm is compared with: their median
AT_LEAST = 5  # of them; fewer say nothing
TIMES = 3.0  # a spike is above this many times that median


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step whose gradient norm (before clipping) was `times` the median of those logged before;
    infinite where it was not finite."""

    step: int
    times: float


def spikes(norms: Sequence[tuple[int, float]]) -> tuple[Spike, ...]:
    """The spikes of (step, gradient norm) by rising step."""
    marked = []
    for place, (step, norm) in enumerate(norms):
        before = [value for _, value in norms[max(0, place - BEFORE) : place]]
        finite = [value for value in before if math.isfinite(value)]
        if not math.isfinite(norm):
            marked.append(Spike(step, math.inf))
        elif len(finite) >= AT_LEAST and norm > TIMES * (median := statistics.median(finite)) > 0:
            marked.append(Spike(step, norm / median))
    return tuple(marked)


def spikes_in_words(norms: Sequence[tuple[int, float]], low: int, high: int) -> str:
    """What the gradient norm did after step `low`, up to step `high`."""
    if not any(low < step <= high for step, _ in norms):
        return "no gradient norm was logged between them"
    between = [spike for spike in spikes(norms) if low < spike.step <= high]
    if not between:
        return "no spike of the gradient norm between them"
    worst = max(between, key=lambda spike: spike.times)
    size = (
        f"{worst.times:.1f} times the median before it"
        if worst.times < math.inf
        else ("not finite")
    )
    more = f", the largest of {len(between)}" if len(between) > 1 else ""
    return f"the gradient norm spiked between them, at step {worst.step:,} ({size}{more})"
