import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import contingency_tables, multitest, proportion
from statsmodels.stats.power import NormalIndPower

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


@pytest.mark.parametrize(("limit", "expected"), [(0.10, 35), (0.05, 73)])
def test_items_without_a_hit_that_decide_are_the_fewest(limit, expected):
    n = st.n_to_decide(0.0, limit)
    assert n == expected
    assert st.wilson(0, n)[1] <= limit < st.wilson(0, n - 1)[1]


# ---- Against scipy and statsmodels.


def test_wilson_of_arrays_equals_scipy():
    counts = np.arange(0, 54)
    lo, hi = st.wilson_bounds(counts, 53, 0.9)
    for k in counts:
        expected = stats.binomtest(int(k), 53).proportion_ci(0.9, method="wilson")
        assert (lo[k], hi[k]) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_mcnemar_equals_scipy(alternative):
    for n, only_b in ((1, 0), (1, 1), (9, 2), (10, 5), (60, 60), (200, 75)):
        a, b = [False] * only_b + [True] * (n - only_b), [True] * only_b + [False] * (n - only_b)
        expected = stats.binomtest(only_b, n, 0.5, alternative).pvalue
        assert st.mcnemar(a, b, alternative) == pytest.approx(expected, rel=1e-10)


def test_exact_interval_equals_statsmodels():
    for count, n in ((0, 3), (3, 3), (2, 5), (5, 5), (37, 100)):
        expected = proportion.proportion_confint(count, n, 0.05, method="beta")
        expected = [0.0 if math.isnan(x) else x for x in expected]
        assert st.exact_interval(count, n) == pytest.approx(expected, abs=1e-10)
    assert st.exact_interval(0, 3)[1] == pytest.approx(1 - 0.025 ** (1 / 3))


def test_exact_interval_covers_what_it_says():
    """Exactly, by summing the binomial: no rate and no n is covered less than 95 %."""
    for n in (1, 3, 5, 10):
        bounds = [st.exact_interval(k, n) for k in range(n + 1)]
        for rate in np.linspace(0.01, 0.99, 99):
            masses = stats.binom.pmf(range(n + 1), n, rate)
            covered = sum(m for m, (lo, hi) in zip(masses, bounds, strict=True) if lo <= rate <= hi)
            assert covered >= 0.95


def test_holm_equals_statsmodels():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        p = rng.uniform(0, 0.2, size) ** 2
        expected = multitest.multipletests(p, method="holm")[1]
        assert st.holm(p.tolist()) == pytest.approx(expected, rel=1e-12)
    assert st.holm([]) == []
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_mcnemar_equals_statsmodels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 40)) < rng.random((2, 1))
        table = [[np.sum(x & y) for y in (b, ~b)] for x in (a, ~a)]
        expected = contingency_tables.mcnemar(table, exact=True).pvalue
        assert st.mcnemar(a, b) == pytest.approx(min(1.0, expected), rel=1e-9)


def test_mcnemar_one_sided():
    a, b = [False] * 5 + [True], [True] * 5 + [False]
    assert st.mcnemar(a, b, "greater") == pytest.approx(7 / 64)
    assert st.mcnemar(a, b, "less") == pytest.approx(63 / 64)


def test_z_of_arrays_equals_statsmodels():
    a, b = np.array([0, 3, 50, 100]), np.array([0, 60, 50, 100])
    for i in range(4):
        z = st.two_proportion_z(a, 100, b, 120)[i]
        expected = 0.0
        if 0 < a[i] + b[i]:
            expected = proportion.proportions_ztest([b[i], a[i]], [120, 100])[0]
        assert z == pytest.approx(expected, abs=1e-12)


def test_n_to_decide_is_the_smallest():
    for observed, limit in ((0.03, 0.05), (0.5, 0.55), (0.0, 0.1), (1.0, 0.95), (0.02, 0.01)):
        n = st.n_to_decide(observed, limit)
        for trials, excluded in ((n, True), (n - 1, False)):
            lo, hi = st.wilson_bounds(observed * trials, trials)
            assert (not lo <= limit <= hi) == excluded, (observed, limit, n)
    assert st.n_to_decide(0.05, 0.05) is None


def test_difference_of_two_wilson_intervals_is_newcombes():
    # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10.
    for (a, n_a, b, n_b), expected in (
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
    ):
        one, other = ((k / n, *st.wilson(k, n)) for k, n in ((b, n_b), (a, n_a)))
        difference, lo, hi = st.difference_interval(one, other)
        assert difference == pytest.approx(a / n_a - b / n_b)
        assert (lo, hi) == pytest.approx(expected, abs=5e-5)


def test_power_equals_statsmodels():
    expected = NormalIndPower().power(0.05 / 0.4, 293, 0.01, ratio=0)  # one sample
    error = 0.4 / math.sqrt(293)
    assert st.power(0.05, error, 0.01) == pytest.approx(expected, rel=1e-9)
    assert st.power(0.0, error, 0.01) == pytest.approx(0.01)
    assert st.power(0.05, 0, 0.01) == 1.0


# ---- Means over seeds.


def beta_rates(rng, mean, concentration, runs, seeds):
    if math.isinf(concentration):
        return np.full((runs, seeds), mean)
    return rng.beta(mean * concentration, (1 - mean) * concentration, size=(runs, seeds))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_seed_interval_covers(seeds):
    """At least 93 %, for seeds that differ from not at all to a standard deviation of 15 points."""
    rng = np.random.default_rng(seeds)
    for mean in (0.02, 0.1, 0.3, 0.5, 0.9):
        for concentration in (10, 30, 100, math.inf):
            rates = beta_rates(rng, mean, concentration, 1000, seeds)
            counts = rng.binomial(100, rates)
            covered = 0
            for row in counts:
                _, lo, hi = st.seed_mean([(int(count), 100) for count in row])
                covered += lo <= mean <= hi
            assert covered / 1000 >= 0.93, (mean, concentration)


def test_a_percentile_bootstrap_over_few_seeds_would_not_cover():
    """Why `seed_mean` is not one."""
    rng = np.random.default_rng(0)
    counts = rng.binomial(100, beta_rates(rng, 0.3, 10, 1000, 3)) / 100
    draws = rng.integers(3, size=(500, 3))
    means = counts[:, draws].mean(2)
    lo, hi = np.quantile(means, (0.025, 0.975), axis=1)
    assert ((lo <= 0.3) & (0.3 <= hi)).mean() < 0.85


def test_the_seed_interval_by_hand():
    # Rates .1 .2 .3: mean .2, standard error .1 / √3, so .2 · .8 / se² = 48 effective answers.
    mean, lo, hi = st.seed_mean([(10, 100), (20, 100), (30, 100)])
    assert mean == pytest.approx(0.2)
    t = stats.t.ppf(0.975, 2)
    assert (lo, hi) == pytest.approx(_wilson_by_hand(0.2 * 48, 48, t), abs=1e-12)
    # Seeds alike: 3 seeds of 100 answers, each worth 100 / (1 + 99 · 0.02).
    n = 300 / (1 + 99 * 0.02)
    assert st.seed_mean([(0, 100)] * 3)[1:] == pytest.approx((0, t * t / (n + t * t)))
    assert st.seed_mean([(4, 100)]) == (0.04, *st.wilson(4, 100))  # one seed: its answers alone


@pytest.mark.parametrize("seeds", [3, 5])
def test_paired_seeds_cover_and_hold_their_level(seeds):
    rng = np.random.default_rng(seeds)
    covered = rejected = 0
    for _ in range(1000):
        shared = rng.normal(0, 0.1, seeds)  # what both arms get from a seed
        rates = np.clip([0.3 + shared, 0.3 + shared + rng.normal(0, 0.05, seeds)], 0, 1)
        said = rng.random((2, seeds, 100)) < rates[:, :, None]
        a, b = ([row.tolist() for row in arm] for arm in said)
        difference, lo, hi, p = st.paired_seeds(a, b)
        covered += lo <= 0 <= hi
        rejected += p < 0.05
        assert difference == pytest.approx((said[1] - 1.0 * said[0]).mean())
        assert (p < 0.05) == (not lo <= 0 <= hi)
    assert covered / 1000 >= 0.93 and rejected / 1000 <= 0.07


def test_paired_seeds_that_all_agree_are_not_certain():
    a, b = [[0] * 100] * 3, [[1] * 100] * 3
    difference, lo, hi, p = st.paired_seeds(a, b)
    assert difference == 1 and 0.9 < lo < hi and 0 < p < 0.001
