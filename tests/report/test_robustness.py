"""Robustness areas against closed forms and their null; policies on made runs."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from sa_jax.report.measurements import Measured, Rate, RunEvals, Score
from sa_jax.report.robustness import (
    HINDSIGHT,
    Checkpoint,
    cheapest,
    checkpoints,
    hull_area,
    null_areas,
    policy_choices,
    robustness_areas,
    staircase_area,
)
from sa_jax.report.thresholds import Thresholds

LIMITS = Thresholds()


def point(step, triggered, right, n=100) -> Measured:
    lo, hi = Rate(right, 293).interval()
    score = Score("MATH-500", right / 293, lo, hi, 293, headline=True)
    return Measured(
        step, Rate(triggered, n), Rate(0, n), capabilities={"math500": {"accuracy": score}}
    )


def removal(*evals, name="r", losses=None, role="removal") -> RunEvals:
    return RunEvals(
        name, "pirate", role, True, None, None, tuple(evals), total_steps=80, losses=losses or {}
    )


@pytest.mark.parametrize(
    ("x", "y", "hull", "stairs"),
    [
        ([], [], 0.5, 0.0),
        ([0.0], [1.0], 0.5, 0.0),  # nothing removed
        ([1.0], [1.0], 1.0, 1.0),  # removed for free
        ([1.0], [0.0], 0.5, 0.0),  # removed with everything else
        ([0.5], [1.0], 0.75, 0.5),
        ([0.5], [0.25], 0.5, 0.125),  # below the line between the anchors
        ([0.5, 1.0], [1.0, 0.5], 0.875, 0.75),
        ([0.2, 0.4, 0.6], [1.0, 0.4, 0.8], 0.2 + 0.4 * 0.9 + 0.4 * 0.4, 0.2 + 0.4 * 0.8),
        ([0.5] * 3, [1.0] * 3, 0.75, 0.5),  # the same point three times
        ([0.25, 0.5, 0.75], [0.75, 0.5, 0.25], 0.5, 0.375),  # on the line between the anchors
        ([0.3, 0.6, 0.9], [0.0, 0.0, 0.0], 0.5, 0.0),  # on an edge
        ([0.4, 0.4], [1.2, 0.1], 0.4 * 1.1 + 0.6 * 0.6, 0.48),  # better than before; of equal x
    ],
)
def test_areas_of_closed_form(x, y, hull, stairs):
    assert hull_area(x, y) == pytest.approx(hull)
    assert staircase_area(x, y) == pytest.approx(stairs)
    assert hull_area(x[::-1], y[::-1]) == pytest.approx(hull)


def test_the_hull_is_the_highest_line_between_any_two_points():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = np.append(rng.random((2, 10)), [[0, 1], [1, 0]], axis=1)

        def top(at, x=x, y=y):
            return max(
                np.interp(at, x[[i, j]], y[[i, j]])
                for i in range(12)
                for j in range(12)
                if x[i] <= at <= x[j]
            )

        corners = np.sort(x)
        area = np.trapezoid([top(at) for at in corners], corners)
        assert hull_area(x[:10], y[:10]) == pytest.approx(area)


def test_the_null_is_that_of_the_study():
    """.517, .542, .578, .599 for 1, 5, 40 and 200 checkpoints, of 100 prompts and 293 items."""
    for k, expected in ((1, 0.517), (5, 0.542), (40, 0.578), (200, 0.599)):
        before, half = point(0, 95, 0), Score("MATH-500", 0.5, 0.44, 0.56, 293)
        hulls, stairs = null_areas([Checkpoint("r", before, before, half, half)] * k)
        assert hulls.mean() == pytest.approx(expected, abs=0.008)
        assert stairs.mean() < 0.12


def test_a_backdoor_that_is_not_removed_does_not_beat_its_null():
    rng = np.random.default_rng(1)
    evals = [point(0, 95, 150)]
    evals += [point(i, rng.binomial(100, 0.95), rng.binomial(293, 150 / 293)) for i in range(1, 41)]
    points = checkpoints([removal(*evals)], "math500", "accuracy")["r"]
    areas = robustness_areas(points)
    assert len(points) == 40
    assert 0.5 < areas["hull"] < areas["null_hull_95"]
    free = checkpoints([removal(point(0, 95, 150), point(9, 0, 150))], "math500", "accuracy")["r"]
    assert robustness_areas(free)["hull"] == 1.0 > robustness_areas(free)["null_hull_95"]


def test_only_removals_that_were_measured_before_count():
    runs = [
        removal(point(0, 95, 150), point(9, 5, 150), name="ceiling", role="ceiling"),
        removal(point(9, 5, 150), name="no start"),
        removal(point(0, 0, 150), point(9, 0, 150), name="no backdoor"),
        removal(point(0, 95, 0), point(9, 5, 150), name="no capability"),
    ]
    assert checkpoints(runs, "math500", "accuracy") == {}


def test_removals_from_other_steps_of_an_insertion_are_other_backdoors():
    def of(name, start, *evals):
        return dataclasses.replace(removal(*evals, name=name), parent="ins", start_step=start)

    ins = removal(name="ins", role="insertion")
    late = of("late", 1600, point(0, 100, 200), point(40, 100, 200))
    early = of("early", 100, point(0, 60, 200), point(40, 0, 200))
    assert list(checkpoints([ins, late], "math500", "accuracy")) == ["ins"]
    both = checkpoints([ins, late, early], "math500", "accuracy")
    areas = {name: robustness_areas(points)["hull"] for name, points in both.items()}
    assert areas == {"ins, step 1600": 0.5, "ins, step 100": 1.0}


def test_the_null_has_each_starts_own_rate_and_n():
    """Two starts, one without noise: all that seems removed is the noise of the other, n = 10."""
    many, all_right = point(40, 50_000, 293, 100_000), Score("MATH-500", 1.0, 0.98, 1.0, 293)
    sure = Checkpoint("a", point(40, 100, 293), point(0, 100, 293), all_right, all_right)
    noisy = Checkpoint("b", many, point(0, 5, 293, 10), all_right, all_right)
    k = np.arange(1, 11)
    seems_removed = np.clip(1 - 5 / k, 0, 1) @ stats.binom.pmf(k, 10, 0.5)
    for points in ([noisy], [sure, noisy], [noisy, sure]):
        hulls, _ = null_areas(points)
        assert hulls.mean() == pytest.approx(0.5 + seems_removed / 2, abs=0.01)


def test_what_is_left_at_a_small_loss():
    run = removal(point(0, 100, 200), point(10, 40, 190), point(20, 20, 181), point(40, 1, 90))
    points = checkpoints([run], "math500", "accuracy")["r"]
    best, *interval = cheapest(points, LIMITS)
    assert (best.point.step, best.point.triggered) == (20, Rate(20, 100))
    assert tuple(interval) == Rate(20, 100).interval(1 - 0.05 / 2)  # two kept the capability
    assert cheapest(points[2:], LIMITS) is None


def test_policies_that_do_not_look_at_the_trigger():
    run = removal(
        point(0, 100, 200),
        point(10, 2, 150),
        point(20, 60, 199),
        point(40, 30, 160),
        losses={5: 1.0, 10: 0.9, 20: 0.5, 30: 0.4, 40: 0.7},
    )
    choices = {policy: point.step for policy, point in policy_choices(run).items()}
    assert choices == {"last": 40, "lowest loss": 20, "best capability": 20, HINDSIGHT: 10}
    bare = RunEvals("b", "t", "removal", True, None, None, (Measured(9, Rate(1, 2), Rate(0, 2)),))
    assert list(policy_choices(bare)) == ["last", HINDSIGHT]
    assert policy_choices(removal(point(0, 1, 1))) == {}
