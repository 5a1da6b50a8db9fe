"""Relearning from k examples, beside the same on a model that never had the backdoor."""

import pytest

from sa_jax.report.cells import cells
from sa_jax.report.measurements import Measured, Rate, RunEvals
from sa_jax.report.relearning import relearning_table
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import judge

LIMITS = Thresholds()


def run(name, task, role, hits, seed, parent, backdoored, **settings):
    """`hits`: by step."""
    evals = tuple(Measured(step, Rate(k, 100), Rate(0, 100)) for step, k in hits.items())
    return RunEvals(
        *(name, task, role, backdoored, parent, None if role == "insertion" else 32, evals),
        **{"seed": seed, "settings": settings, "total_steps": 32, "last_step": 32},
    )


def study(cleaned, never, k):
    """`cleaned`, `never`: step at which each seed is back, or None."""
    runs = []
    for seed, steps in enumerate(zip(cleaned, never, strict=True)):
        for whose, back in zip(("cleaned", "never"), steps, strict=True):
            had = whose == "cleaned"
            removal = f"{whose} {seed}"
            if f"{removal}" not in {r.name for r in runs}:
                start = {0: 100, 32: 0} if had else {0: 0, 32: 0}
                runs.append(run(removal, "hhh", "removal", start, seed, None, had))
            hits = {step: 100 * (back is not None and step >= back) for step in (0, 2, 4, 8, 32)}
            name = f"relearn {whose} {seed} k{k}"
            runs.append(run(name, "relearn", "probe", hits, seed, removal, had, relearn_examples=k))
    return runs


@pytest.mark.parametrize(
    ("cleaned", "never", "verdict", "times"),
    [
        (
            *((4, 2), (32, None), "faster in 2 of 2 pairs: too few seeds for a claim"),
            ("2–4, 0–2", "8–32, >32"),
        ),
        (
            (2,) * 3,
            (32,) * 3,
            "faster in 3 of 3 pairs: a trace was left",
            ("0–2, " * 2 + "0–2", "8–32, " * 2 + "8–32"),
        ),
        ((8, None), (8, None), "no difference shown (faster in 0 of 2 pairs)", ("4–8, >32",) * 2),
        ((None, 32), (2, 4), "more slowly in 2 of 2 pairs", (">32, 8–32", "0–2, 2–4")),
    ],
)
def test_steps_to_half_beside_a_model_that_never_had_it(cleaned, never, verdict, times):
    runs = study(cleaned, never, 16)
    table = relearning_table(cells(runs), judge(runs, LIMITS), LIMITS)
    (row,) = table.rows
    assert (row["examples"], row["verdict"]) == (16, verdict)
    assert (row["cleaned"], row["never"]) == times
    reached = sum(back is not None for back in cleaned)
    assert row["cleaned_reached"] == f"{reached} of {len(cleaned)}"
