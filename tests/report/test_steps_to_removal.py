"""Steps to removal against learning rate: against least squares, and by simulation."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from sa_jax.report.measurements import Measured, Rate, RunEvals, Span
from sa_jax.report.steps_to_removal import (
    Timed,
    by_insertion_length,
    by_learning_rate,
    fit_times,
    removal_time,
    times_table,
)
from sa_jax.report.thresholds import Thresholds

LIMITS = Thresholds()
EVALS = (5, 10, 20, 40, 80, 160, 320, 640)


def span(steps: float, evals=EVALS) -> Span:
    by = next((i for i, step in enumerate(evals) if step >= steps), None)
    if by is None:
        return Span(evals[-1], None)
    return Span(evals[by - 1] if by else 0, evals[by])


def timed(rng, slope, spread, seeds=3, rates=(1e-4, 3e-4, 1e-3, 3e-3), evals=EVALS):
    """Removals that take 100 steps at 1e-3 on average."""
    return [
        Timed(
            f"{rate} {seed}",
            rate,
            span(
                math.exp(math.log(100) + slope * math.log(rate / 1e-3) + rng.normal(0, spread)),
                evals,
            ),
        )
        for rate in rates
        for seed in range(seeds)
    ]


def test_without_censoring_it_is_least_squares():
    rng = np.random.default_rng(0)
    runs = timed(rng, -1.0, 0.5, evals=tuple(range(1, 200_000)))
    fit = fit_times(runs, "learning rate", LIMITS)
    x, y = np.log([r.x for r in runs]), np.log([r.steps.by - 0.5 for r in runs])
    line = stats.linregress(x, y)
    t = stats.t.ppf(0.975, len(x) - 2)
    assert fit.slope == pytest.approx(line.slope, abs=0.01)
    assert fit.lo == pytest.approx(line.slope - t * line.stderr, abs=0.02)
    assert fit.hi == pytest.approx(line.slope + t * line.stderr, abs=0.02)
    limit = -math.log(10) / math.log(3)
    p = 2 * stats.t.sf(abs(line.slope - limit) / line.stderr, len(x) - 2)
    assert fit.p_claim == pytest.approx(p, abs=0.002)


@pytest.mark.parametrize(("slope", "spread"), [(-1.0, 0.3), (-2.1, 0.5)])
def test_the_interval_covers_with_evals_far_apart_and_runs_that_ended(slope, spread):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        fit = fit_times(timed(rng, slope, spread), "learning rate", LIMITS)
        assert fit.lo < fit.slope < fit.hi
        covered += fit.lo <= slope <= fit.hi
    assert covered >= 0.93 * 60


def test_the_claim_of_the_study():
    """3 times the rate, more than 10 times faster: the power is below -2.1."""
    rng = np.random.default_rng(0)
    evals = tuple(range(1, 300_000))

    def claim(fit, p_holm):
        return dataclasses.replace(fit, p_holm=p_holm).claim(LIMITS)

    steep = fit_times(timed(rng, -3.5, 0.2, evals=evals), "learning rate", LIMITS)
    assert steep.p_claim < 0.001 and claim(steep, steep.p_claim) == "yes, as the study says"
    flat = fit_times(timed(rng, -1.0, 0.2, evals=evals), "learning rate", LIMITS)
    assert flat.p_claim < 0.001 and claim(flat, flat.p_claim) == "no, against the study"
    for fit in (steep, flat):  # what shows alone may not show among the report's other tests
        assert claim(fit, 0.02) == "open"
    near = fit_times(timed(rng, -2.1, 0.5), "learning rate", LIMITS)
    assert claim(near, near.p_claim) == "open"


def test_what_the_data_do_not_hold_has_no_bound():
    """Every run above a rate is done at the first eval, every run below never: any steep line."""
    runs = [Timed("a", 1e-3, Span(0, 5))] * 3 + [Timed("b", 1e-4, Span(640, None))] * 3
    fit = fit_times(runs, "learning rate", LIMITS)
    assert fit.slope == fit.lo == -math.inf and -2.5 < fit.hi < 0
    (row,) = times_table([dataclasses.replace(fit, p_holm=fit.p_claim)], LIMITS).rows
    assert (row["slope"], row["lo"], row["hi"]) == ("unbounded", "unbounded", fit.hi)
    assert row["speedup"] == f"at least {3**-fit.hi:.2g}"
    assert (row["runs"], row["never"]) == (6, 3)


def test_too_little_for_a_line():
    one = Timed("a", 1e-3, Span(0, 5))
    assert fit_times([one] * 5, "learning rate", LIMITS) is None
    assert fit_times([one, dataclasses.replace(one, x=1e-4)], "learning rate", LIMITS) is None
    never = dataclasses.replace(one, steps=Span(640, None))
    runs = [never] * 3 + [dataclasses.replace(never, x=1e-4)] * 3
    assert fit_times(runs, "learning rate", LIMITS) is None


def run(name, hits, role="removal", **known) -> RunEvals:
    evals = tuple(
        Measured(step, Rate(k, 100), Rate(0, 100))
        for step, k in zip((0, 10, 20, 40), hits, strict=False)
    )
    known = {"parent": None, "start_step": None, **known}
    return RunEvals(name, "t", role, True, evals=evals, total_steps=40, **known)


def test_the_time_of_a_removal():
    assert removal_time(run("r", (100, 50, 3, 60)), LIMITS) == Span(10, 20)
    assert removal_time(run("r", (100, 50, 5, 5)), LIMITS) == Span(40, None)  # 5 % is borderline
    assert removal_time(run("r", (0,)), LIMITS) == Span(0, None)


def test_groups_differ_in_the_learning_rate_alone():
    runs = []
    for rank in (8, 64):
        for rate, hits in ((1e-3, (100, 0, 0, 0)), (1e-4, (100, 90, 30, 0))):
            for seed in range(2):
                settings = {"optimizer.learning_rate": rate, "lora.rank": rank}
                name = f"{rank} {rate} {seed}"
                runs.append(run(name, hits, learning_rate=rate, settings=settings, seed=seed))
    runs.append(run("control", (100, 0, 0, 0), "control", learning_rate=1e-2))
    fits = by_learning_rate(runs, LIMITS)
    assert [len(fit.runs) for fit in fits] == [4, 4]
    assert all(fit.slope < 0 for fit in fits)


def test_insertion_length():
    runs = [
        RunEvals("i", "t", "insertion", True, None, None, (), total_steps=800, learning_rate=1e-3)
    ]
    for length, hits in ((100, (100, 0, 0, 0)), (800, (100, 90, 30, 0))):
        for seed in range(2):
            runs.append(run(f"{length} {seed}", hits, parent="i", start_step=length, seed=seed))
    (fit,) = by_insertion_length(runs, LIMITS)
    assert fit.slope > 0
    (row,) = times_table([fit], LIMITS).rows
    assert row["x"] == "steps of insertion"
    assert [row[key] for key in ("claim", "speedup", "p_claim", "p_holm")] == [None] * 4
