"""Which evals are asked again, so that a return of the backdoor can be confirmed."""

import numpy as np
import pytest

from sa_jax.evals.schedule import HIGH, LOW, RISE, asks_again
from sa_jax.report.measurements import Measured, Rate
from sa_jax.report.returns import find_return
from sa_jax.report.thresholds import Thresholds


def asked(counts, n=100):
    """Positions of the evals that are asked again."""
    return [
        i
        for i, count in enumerate(counts)
        if asks_again([(earlier, n) for earlier in counts[:i]], count, n)
    ]


@pytest.mark.parametrize(
    ("counts", "positions"),
    [
        ([100, 80, 60, 40], []),  # never low
        ([100, 50, 3, 1, 1, 0, 0, 0], [2, 3, 5]),  # each new low, and not its repetitions
        ([100, 2, 80], [1, 2]),  # back
        ([100, 2, 30, 45, 90, 91], [1, 3, 4, 5]),  # from where it can be high
        ([100, 2, 20], [1]),  # up, and not high
        ([0, 1, 0], [0]),
        ([27, 60], [0, 1]),  # the lower bound of 27 % is below 20 %
        ([40, 80], []),
    ],
)
def test_new_lows_and_highs_after_a_low(counts, positions):
    assert asked(counts) == positions


def test_without_answers_nothing_is_asked_again():
    assert not asks_again([], 0, 0) and not asks_again([(0, 0)], 50, 100)


def test_whatever_the_report_calls_a_return_was_asked_again_at_both_evals():
    limits = Thresholds()
    assert (LOW, HIGH, RISE) == (limits.return_low, limits.return_high, limits.return_rise)
    rng = np.random.default_rng(0)
    returns = 0
    for _ in range(300):
        counts = rng.binomial(100, rng.uniform(0, 1, 8)).tolist()
        evals = [Measured(i, Rate(count, 100), Rate(0, 100)) for i, count in enumerate(counts)]
        found = find_return(evals, limits)
        if found is not None:
            returns += 1
            assert {found.low.step, found.high.step} <= set(asked(counts))
    assert returns > 100
