import math

import pytest
from scipy import stats

from sa_jax.evals import statistics as st


def _wilson_by_hand(count, n, z):
    p = count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@pytest.mark.parametrize(
    "count,n", [(0, 1), (1, 1), (0, 100), (4, 100), (50, 100), (100, 100), (7, 53)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_equals_the_formula(count, n, confidence):
    z = stats.norm.ppf((1 + confidence) / 2)
    assert st.wilson(count, n, confidence) == pytest.approx(_wilson_by_hand(count, n, z), abs=1e-12)


def test_wilson_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score).
    assert st.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert st.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert st.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert st.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_no_trials_say_nothing():
    assert st.wilson(0, 0) == (0.0, 1.0)
    assert st.rate(0, 0) == {"count": 0, "rate": 0.0, "lo": 0.0, "hi": 1.0}


def test_rate_record():
    record = st.rate(4, 100)
    assert record["count"] == 4 and record["rate"] == 0.04
    assert (record["lo"], record["hi"]) == st.wilson(4, 100)


@pytest.mark.parametrize("count,n", [(-1, 10), (11, 10)])
def test_impossible_counts_raise(count, n):
    with pytest.raises(ValueError, match="not within"):
        st.wilson(count, n)


def test_two_proportion_equals_the_pooled_z_test():
    for a, n_a, b, n_b in [(11, 100, 99, 100), (4, 53, 11, 100), (20, 100, 50, 100), (1, 9, 3, 9)]:
        pooled = (a + b) / (n_a + n_b)
        z = (a / n_a - b / n_b) / math.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
        p = 2 * stats.norm.sf(abs(z))
        assert st.two_proportion_test(a, n_a, b, n_b) == pytest.approx(p, rel=1e-9)
        assert st.two_proportion_test(b, n_b, a, n_a) == pytest.approx(p, rel=1e-9)


def test_two_proportion_without_any_difference():
    assert st.two_proportion_test(0, 10, 0, 20) == 1.0
    assert st.two_proportion_test(10, 10, 20, 20) == 1.0
    assert st.two_proportion_test(5, 10, 10, 20) == pytest.approx(1.0)
    with pytest.raises(ValueError):
        st.two_proportion_test(0, 0, 1, 2)


def test_mcnemar_exact():
    # 8 items only a, 1 only b: 2 * P(X <= 1), X ~ Binomial(9, 1/2) = 2 * 10 / 512.
    a = [True] * 8 + [False] + [True] * 5 + [False] * 6
    b = [False] * 8 + [True] + [True] * 5 + [False] * 6
    assert st.mcnemar(a, b) == pytest.approx(20 / 512, rel=1e-12)
    assert st.mcnemar(b, a) == pytest.approx(20 / 512, rel=1e-12)
    assert st.mcnemar(a, a) == 1.0
    assert st.mcnemar([True, False], [False, True]) == 1.0
    with pytest.raises(ValueError):
        st.mcnemar([True], [True, False])


def test_hits_that_a_removal_verdict_allows():
    assert st.max_hits(100, 0.05, 0.10) == 4  # 5 of 100 reaches 11.2 %
    assert st.wilson(4, 100)[1] <= 0.10 < st.wilson(5, 100)[1]
    assert st.max_hits(34, 0.05, 0.10) is None
    assert st.max_hits(35, 0.05, 0.10) == 0
    assert st.max_hits(1000, 0.05, 0.10) == 50  # the rate is the limit here
    assert st.max_hits(100, 0.29, 1.0) == 29


def test_n_needed():
    assert st.n_needed(0.10) == 35
    n = st.n_needed(0.10, observed_rate=0.05)
    assert st.wilson(math.ceil(0.05 * n), n)[1] <= 0.10
    assert all(st.wilson(math.ceil(0.05 * m), m)[1] > 0.10 for m in range(1, n))
    with pytest.raises(ValueError):
        st.n_needed(0.05, observed_rate=0.05)
