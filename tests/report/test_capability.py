"""Capability before against after: paired and not, against scipy and by simulation."""

import numpy as np
import pytest
from scipy import stats

from sa_jax.evals.statistics import difference_interval, mcnemar, two_proportion_test
from sa_jax.report.capability import capability_changes, change_in_words
from sa_jax.report.measurements import Capabilities, Measured, Rate, Score
from sa_jax.report.rates import fall
from sa_jax.report.thresholds import Thresholds

LIMITS = Thresholds()


def of_items(values, keep=True) -> Capabilities:
    """An eval of these values: item by item one number, or several."""
    rows = {i: tuple(np.atleast_1d(value)) for i, value in enumerate(values)}
    flat = np.concatenate([np.atleast_1d(value) for value in values]).astype(float)
    lo, hi = Rate(round(flat.sum()), len(flat)).interval()
    score = Score("MMLU", float(flat.mean()), lo, hi, len(flat), True, items=rows if keep else {})
    return {"mmlu": {"accuracy": score}}


def change(before, after, keep=True):
    (row,) = capability_changes(of_items(before, keep), of_items(after, keep), LIMITS)
    return row


def answers(lost, gained, right=90, n=100):
    """0/1 before and after: `lost` of the `right` go wrong, `gained` of the others come right."""
    before = [int(i < right) for i in range(n)]
    after = [int(lost <= i < right or right <= i < right + gained) for i in range(n)]
    return before, after


def test_answers_to_the_same_items_are_paired():
    before, after = answers(10, 0)
    paired, apart = change(before, after), change(before, after, keep=False)
    assert paired.paired and paired.difference == pytest.approx(-0.10)
    assert paired.p_value == mcnemar(before, after) == pytest.approx(2 / 2**10)
    assert not apart.paired and apart.p_value > 0.01  # 90 % and 80 % of 100: p = .05
    assert paired.hi < 0 and (paired.hi - paired.lo) < (apart.hi - apart.lo)
    assert paired.power is None and 0 < apart.power < 1


def test_only_items_that_both_were_asked():
    before, after = answers(10, 0)
    first, second = of_items(before), of_items(after[:40])
    (row,) = capability_changes(first, second, LIMITS)
    assert (row.n, row.before, row.after) == pytest.approx((40, 1.0, 0.75))


def asked(questions, right) -> Capabilities:
    """An eval of these questions, keyed as `read_scores` does; its score is 1 in `right`."""
    values = [float(question in right) for question in questions]
    lo, hi = Rate(int(sum(values)), len(values)).interval()
    questions = list(questions)
    items = {
        (f"q{q}", questions[:i].count(q)): (float(q in right),) for i, q in enumerate(questions)
    }
    score = Score("MMLU", float(np.mean(values)), lo, hi, len(values), True, items=items)
    return {"mmlu": {"accuracy": score}}


def test_a_question_is_found_at_another_position():
    before, after = asked(range(500), range(1, 500)), asked(range(0, 500, 5), ())
    (row,) = capability_changes(before, after, LIMITS)
    assert (row.paired, row.n, row.before, row.after, row.lost) == (True, 100, 0.99, 0.0, True)
    # A question that stands twice counts twice.
    twice = [*range(10), 0]
    (row,) = capability_changes(asked(twice, range(9)), asked(twice, range(5)), LIMITS)
    assert (row.paired, row.n, row.difference) == (True, 11, pytest.approx(-4 / 11))


@pytest.mark.parametrize(("shared", "paired", "n"), [(80, True, 80), (79, False, 100)])
def test_few_shared_questions_are_not_paired(shared, paired, n):
    before = asked(range(100), range(90))
    after = asked(range(100 - shared, 200 - shared), range(100 - shared, 100))
    (row,) = capability_changes(before, after, LIMITS)
    assert (row.paired, row.n) == (paired, n)
    if not paired:
        newcombe = difference_interval(
            (0.9, *Rate(90, 100).interval()), (0.79, *Rate(79, 100).interval())
        )
        assert (row.difference, row.lo, row.hi) == pytest.approx(newcombe)
        assert "n\u00a0=\u00a0100, not paired)" in change_in_words(row, LIMITS)


def test_a_fall_is_paired_by_question_or_not_at_all():
    def measured(questions, said):
        hits = {(f"q{q}", 0): q in said for q in questions}
        return Measured(0, Rate(sum(hits.values()), len(hits)), Rate(0, 100), said=hits)

    before = measured(range(100), range(100))
    assert fall(before, measured(range(0, 100, 2), ())) == 2 * 0.5**50
    other = measured(range(99, 199), ())
    assert fall(before, other) == two_proportion_test(100, 100, 0, 100) < 1e-40


def test_the_interval_of_agresti_and_min():
    # Half an item for each outcome: of 102, 10.5 lost and 0.5 gained.
    row = change(*answers(10, 0))
    mean = -10 / 102
    error = np.sqrt((11 / 102 - mean**2) / 102)
    z = stats.norm.ppf(0.975)
    assert (row.lo, row.hi) == pytest.approx((mean - z * error, mean + z * error))


def test_numbers_are_compared_by_students_t():
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 50))
    row = change(before, after)
    result = stats.ttest_rel(after, before)
    interval = result.confidence_interval()
    assert row.p_value == pytest.approx(result.pvalue)
    assert (row.lo, row.hi) == pytest.approx((interval.low, interval.high))


def test_an_item_of_several_answers_is_drawn_whole():
    before = [(1, 1, 1)] * 20 + [(1,)] * 20
    after = [(0, 0, 0)] * 5 + [(1, 1, 1)] * 15 + [(1,)] * 20
    row = change(before, after)
    assert row.difference == pytest.approx(-15 / 80)
    assert row.n == 40 and row.hi - row.lo > 0.25  # not as if 80 answers were independent


def test_graded_answers_that_do_not_change_are_not_certain():
    """Each item of three answers falls as a whole, in one of 50 items."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        row = change(
            [(1, 1, 1)] * 20, [(0, 0, 0) if x else (1, 1, 1) for x in rng.random(20) < 0.02]
        )
        covered += row.lo <= -0.02 <= row.hi
    assert covered >= 0.95 * 400
    few = change([(1, 1, 1)] * 2, [(0, 0, 0)] * 2)
    assert few.p_value > LIMITS.p_value and not few.lost  # two of two
    many = change([(1, 1, 1)] * 20, [(0, 0, 0)] * 20)
    assert many.p_value < 1e-9 and many.lost


@pytest.mark.parametrize("keep", [True, False])
def test_the_interval_covers_and_lost_is_rarely_wrong(keep):
    rng = np.random.default_rng(0)
    covered = lost = lost_at_limit = 0
    for _ in range(400):
        ability = rng.random(200)
        before, after = (rng.random((2, 200)) < ability).astype(int)
        row = change(before, after, keep)
        covered += row.lo <= 0 <= row.hi
        lost += row.lost
        worse = (rng.random(200) < 0.9 * ability).astype(int)  # exactly the loss that is allowed
        lost_at_limit += change(before, worse, keep).lost
    assert covered >= 0.93 * 400
    assert lost <= 2 and lost_at_limit <= 0.04 * 400


@pytest.mark.parametrize("n", [8, 20, 50])
def test_without_pairs_p_holds_its_level(n):
    """Exactly, by the binomials of two evals of one rate; by an interval's error 7.7 % at n = 8."""

    def of_count(k):
        lo, hi = Rate(k, n).interval()
        return {"mmlu": {"accuracy": Score("MMLU", k / n, lo, hi, n, True)}}

    p = [
        [capability_changes(of_count(a), of_count(b), LIMITS)[0].p_value for b in range(n + 1)]
        for a in range(n + 1)
    ]
    for rate in (0.1, 0.3, 0.5, 0.9):
        mass = stats.binom.pmf(np.arange(n + 1), n, rate)
        assert np.outer(mass, mass)[np.array(p) < 0.01].sum() <= 0.0125


def test_without_pairs_the_interval_has_the_confidence_that_is_printed():
    before, after = answers(10, 0)
    limits = Thresholds(confidence=0.99)
    (row,) = capability_changes(of_items(before, False), of_items(after, False), limits)
    wide = ((k / 100, *Rate(k, 100).interval(0.99)) for k in (90, 80))
    assert (row.difference, row.lo, row.hi) == pytest.approx(difference_interval(*wide))


def test_without_pairs_graded_and_negative_scores_keep_their_recorded_intervals():
    """Stretched to the report's confidence; a count of a negative score is no error."""

    def of(rate, half):
        return {"own": {"score": Score("own", rate, rate - half, rate + half, 100, True)}}

    z = stats.norm.ppf([0.975, 0.995])
    for before, after in ((0.5, 0.6), (0.5, -0.5)):
        for confidence, stretch in ((0.95, 1), (0.99, z[1] / z[0])):
            limits = Thresholds(confidence=confidence)
            (row,) = capability_changes(of(before, 0.02), of(after, 0.02), limits)
            half = stretch * 0.02 * 2**0.5
            assert (row.lo, row.hi) == pytest.approx((after - before - half, after - before + half))
            error = 0.02 / z[0] * 2**0.5
            expected = 2 * stats.norm.sf(abs(after - before) / error)
            assert row.p_value == pytest.approx(expected, rel=1e-6)


def test_the_least_error_is_that_of_answers_of_0_and_1():
    """Scores such as probabilities may hardly differ between items, and have no half items."""
    rng = np.random.default_rng(0)
    a, b = (mean + 5e-4 * rng.normal(size=200) for mean in (0.1, 0.102))
    row = change([(x,) for x in a], [(x,) for x in b])
    assert row.p_value == pytest.approx(stats.ttest_rel(b, a).pvalue)


def test_lost_and_power_in_words():
    row = change(*answers(30, 0))
    assert row.lost and row.power is None
    assert change_in_words(row, LIMITS).startswith("MMLU 90\u00a0% before, 60\u00a0% after: -30")
    assert change_in_words(row, LIMITS).endswith("p\u00a0<\u00a01e-06, n\u00a0=\u00a0100)")
    same = change(*answers(2, 2))
    assert not same.lost and same.difference == 0
    assert "no change shown at p < 0.01, and a true fall of 5 points would have been seen in" in (
        change_in_words(same, LIMITS)
    )


def test_power_is_that_of_a_simulation():
    """400 items, 7.5 points change each way: how often is a fall of 5 points significant?"""
    rng = np.random.default_rng(0)
    powers, seen = [], 0
    for _ in range(150):
        u = rng.random(400)
        before = (np.arange(400) % 4 > 0).astype(int)
        down, up = 0.10, 0.30
        after = np.where(before == 1, u > down, u < up).astype(int)
        powers.append(change(before, after).power)
        p_down = (down * 0.75 + 0.05) / 0.75
        fallen = np.where(before == 1, u > p_down, u < up).astype(int)
        seen += change(before, fallen).p_value < LIMITS.p_value
    typical = np.median([power for power in powers if power is not None])
    assert typical == pytest.approx(seen / 150, abs=0.12)


def test_nothing_to_compare():
    assert capability_changes({}, of_items([1, 0]), LIMITS) == ()
    assert capability_changes({"other": {}}, of_items([1, 0]), LIMITS) == ()
