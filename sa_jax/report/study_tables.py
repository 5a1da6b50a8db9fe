"""What holds over runs, as tables: cells over seeds and compared, times, robustness, the study."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sa_jax.report.seeds import CellResult, Comparison, SeedMean
from sa_jax.report.steps_to_removal import TimeFit
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
from sa_jax.text import number


def cells_table(over: Sequence[CellResult], labels: Mapping[str, str]) -> Table:
    """A row a cell, base models apart: k of m, the mean rates, what it cost."""
    over = [result for result in over if result.cell.role != "base"]
    titles = dict.fromkeys(title for result in over for title in result.capabilities)
    rows = []
    for result in over:
        statuses = ", ".join(f"{count} {status}" for status, count in result.verdicts.items())
        counted = (
            f"{result.counted}: {result.k} of {result.m}" if result.counted and result.m else ""
        )
        row: dict[str, Any] = {
            "cell": labels[result.cell.key],
            "verdict": counted or statuses,
            "share": {"rate": result.k / result.m, "lo": result.lo, "hi": result.hi}
            if result.counted and result.m
            else None,
            "verdicts": statuses,
            "triggered": _mean(result.triggered),
            "clean": _mean(result.clean),
            "seeds": result.m,
            "pending": result.pending,
            "enough": "yes" if result.enough else "too few seeds for a claim",
        }
        for title, change in result.capabilities.items():
            row[f"change {title}"] = {
                "difference": change.mean,
                "lo": change.lo,
                "hi": change.hi,
                "seeds": change.seeds,
            }
        rows.append(row)
    columns = {
        "cell": "Cell",
        "verdict": "Verdict",
        "share": "Share of seeds [exact]",
        "verdicts": "Every verdict",
        "triggered": "Triggered rate, mean",
        "clean": "Clean rate, mean",
        **{f"change {title}": f"{title}, change" for title in titles},
        "seeds": "Seeds",
        "pending": "Not done",
        "enough": "Enough?",
    }
    note = (
        "A cell is everything but the seed. Means are over seeds, with intervals for seeds that "
        "were not run; the share of seeds has its exact interval."
    )
    return Table("cells", "Over seeds", columns, tuple(rows), note)


def comparisons_table(
    compared: Sequence[Comparison],
    adjusted: Mapping[int, float],
    labels: Mapping[str, str],
    limits: Thresholds,
) -> Table:
    """Cells that differ in one axis, paired by seed and prompt; `adjusted`: see `one_family`."""
    rows = tuple(
        {
            "verdict": ("higher" if row.difference > 0 else "lower")
            if adjusted[id(row)] < limits.p_value
            else "no difference shown",
            "a": labels[row.a],
            "b": labels[row.b],
            "axis": row.axis,
            "difference": {"difference": row.difference, "lo": row.lo, "hi": row.hi},
            "p": row.p_value,
            "p_holm": adjusted[id(row)],
            "seeds": row.seeds,
        }
        for row in compared
    )
    columns = {
        "b": "This cell",
        "verdict": "Triggered rate is",
        "a": "than that one",
        "axis": "They differ in",
        "difference": "Difference",
        "p": "p",
        "p_holm": "p, Holm",
        "seeds": "Seeds",
    }
    note = (
        "Every two cells that differ in one axis alone, paired by seed and prompt. Holm corrects p "
        "for all tests of this report: these, the study's statement on learning rates, and every "
        "run's change of a headline score. Holm's p decides; the interval is of one comparison "
        "alone."
    )
    return Table("comparisons", "Cells compared", columns, rows, note)


def times_table(
    fits: Sequence[TimeFit], adjusted: Mapping[int, float], limits: Thresholds
) -> Table:
    """How steps to removal change with the learning rate and with the length of insertion."""
    rows = tuple(
        {
            "x": fit.x_name,
            "text": fit.text(limits, adjusted.get(id(fit))),
            "slope": _finite(fit.slope),
            "lo": _finite(fit.lo),
            "hi": _finite(fit.hi),
            "p_claim": fit.p_claim if id(fit) in adjusted else None,
            "p_holm": adjusted.get(id(fit)),
            "runs": len(fit.runs),
            "of": fit.runs[0].run,
        }
        for fit in fits
    )
    columns = {
        "x": "By",
        "text": "What is seen",
        "slope": "Power",
        "lo": "from",
        "hi": "to",
        "p_claim": "p of the study’s statement",
        "p_holm": "the same, Holm",
        "runs": "Runs",
        "of": "Like",
    }
    note = (
        "Steps to removal lie between two evals, or beyond the run’s end; the line in log-log is "
        "fitted to these intervals. The study’s statement, that 3 times the rate removes more than "
        "10 times faster, is decided by Holm’s p."
    )
    return Table("times", "Steps to removal", columns, rows, note)


def _mean(mean: SeedMean | None) -> dict[str, Any] | None:
    if mean is None:
        return None
    return {"rate": mean.mean, "lo": mean.lo, "hi": mean.hi, "seeds": mean.seeds}


def _finite(value: float) -> float | str:
    return number(value) if math.isfinite(value) else "unbounded"
