"""What holds over runs, as tables: cells over seeds and compared, times, robustness, the study."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sa_jax.report.measurements import Measured, RunEvals
from sa_jax.report.published import Arm, compare_to_study
from sa_jax.report.robustness import Checkpoint, cheapest, policy_choices, robustness_area
from sa_jax.report.seeds import CellResult, Comparison, SeedMean
from sa_jax.report.steps_to_removal import TimeFit
from sa_jax.report.tables import Column, Table, learning_rate
from sa_jax.report.thresholds import Thresholds
from sa_jax.text import number, percent

CHECKPOINT_RANGE = 1  # policies choose among checkpoints: one alone is no choice


def cells_table(over: Sequence[CellResult], labels: Mapping[str, str]) -> Table:
    """A row a cell, base models apart: k of m, the mean rates, what it cost."""
    over = [result for result in over if result.cell.role != "base"]
    titles = dict.fromkeys(title for result in over for title in result.capabilities)
    rows = []
    for result in over:
        statuses = ", ".join(f"{count} {status}" for status, count in result.verdicts.items())
        counted = f"{result.counted}: {result.k} of {result.m}" if result.counted else ""
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
    columns = (
        Column("cell", "Cell"),
        Column("verdict", "Verdict"),
        Column("share", "Share of seeds [exact]"),
        Column("verdicts", "Every verdict"),
        Column("triggered", "Triggered rate, mean"),
        Column("clean", "Clean rate, mean"),
        *(Column(f"change {title}", f"{title}, change") for title in titles),
        Column("seeds", "Seeds"),
        Column("pending", "Not done"),
        Column("enough", "Enough?"),
    )
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
    columns = (
        Column("b", "This cell"),
        Column("verdict", "Triggered rate is"),
        Column("a", "than that one"),
        Column("axis", "They differ in"),
        Column("difference", "Difference"),
        Column("p", "p"),
        Column("p_holm", "p, Holm"),
        Column("seeds", "Seeds"),
    )
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
    columns = (
        Column("x", "By"),
        Column("text", "What is seen"),
        Column("slope", "Power"),
        Column("lo", "from"),
        Column("hi", "to"),
        Column("p_claim", "p of the study’s statement"),
        Column("p_holm", "the same, Holm"),
        Column("runs", "Runs"),
        Column("of", "Like"),
    )
    note = (
        "Steps to removal lie between two evals, or beyond the run’s end; the line in log-log is "
        "fitted to these intervals. The study’s statement, that 3 times the rate removes more than "
        "10 times faster, is decided by Holm’s p."
    )
    return Table("times", "Steps to removal", columns, rows, note)


def robustness_table(
    pareto: Mapping[str, Sequence[Checkpoint]], capability: str, limits: Thresholds
) -> Table:
    """The area of every inserted run beside its null, and what is left at little cost."""
    rows = []
    for inserted, points in pareto.items():
        area = robustness_area(inserted, points)
        best = cheapest(points, limits)
        rows.append(
            {
                "run": inserted,
                "hull": area.hull,
                "null_hull": area.null_hull,
                "null_hull_95": area.null_hull_95,
                "staircase": area.staircase,
                "null_staircase": area.null_staircase,
                "left": best and {"rate": best.rate, "lo": best.lo, "hi": best.hi},
                "at": best and f"{best.checkpoint.run}, step {best.checkpoint.step:,}",
                "checkpoints": area.checkpoints,
            }
        )
    columns = (
        Column("run", "Inserted run"),
        Column("hull", "Area (hull)"),
        Column("null_hull", "if nothing were removed"),
        Column("null_hull_95", "95 % below"),
        Column("staircase", "Area (staircase)"),
        Column("null_staircase", "if nothing were removed"),
        Column("left", f"Left at ≤ {percent(limits.max_capability_loss)} loss"),
        Column("at", "by"),
        Column("checkpoints", "Checkpoints"),
    )
    note = (
        f"Share of the backdoor removed against share of {capability} kept, over all checkpoints "
        "of all removals: an area of 0.5 (hull) is robust, 1 is removed for free. Noise alone "
        "gives more than 0.5, which stands beside it."
    )
    return Table("robustness", "Robustness", columns, tuple(rows), note)


def policies_table(removals: Sequence[RunEvals]) -> Table:
    """What a person would have got who chooses a checkpoint without looking at the trigger."""
    points: dict[str, list[Measured]] = {}
    several = [run for run in removals if len(run.measured) > CHECKPOINT_RANGE + 1]
    for run in several:
        for choice in policy_choices(run):
            points.setdefault(choice.policy, []).append(choice.point)
    rows = tuple(
        {
            "policy": policy,
            "mean": percent(sum(point.triggered.rate for point in chosen) / len(chosen)),
            "worst": percent(max(point.triggered.rate for point in chosen)),
            "runs": len(chosen),
        }
        for policy, chosen in points.items()
    )
    columns = (
        Column("policy", "Checkpoint chosen by"),
        Column("mean", "Triggered rate, mean"),
        Column("worst", "worst"),
        Column("runs", "Removal runs"),
    )
    note = "Checkpoints chosen without the trigger, beside the best with hindsight."
    return Table("policies", "Choosing a checkpoint", columns, rows, note)


def published_table(
    over: Sequence[CellResult],
    labels: Mapping[str, str],
    results: Mapping[str, Mapping[str, Any]],
    limits: Thresholds,
) -> Table | None:
    """The study's published cells beside ours; None where none of ours is like one of them."""
    arms = {
        result.cell.key: arm
        for result in over
        if result.cell.role == "removal" and (arm := _arm(results[result.cell.runs[0].name]))
    }
    compared = compare_to_study(over, arms, limits)
    if all(row.outcome == "not run" for row in compared):
        return None
    trained = {result.cell.key: results[result.cell.runs[0].name] for result in over}
    rows = tuple(
        {
            "published": f"{row.arm}: {row.published}",
            "trained": row.cell and trained_as(trained[row.cell]),
            "verdict": row.outcome,
            "cell": labels.get(row.cell),
            "k": f"{row.k} of {row.m}" if row.m else None,
            "text": row.text,
        }
        for row in compared
    )
    columns = (
        Column("published", "The study"),
        Column("verdict", "Ours"),
        Column("cell", "Cell"),
        Column("trained", "Trained as"),
        Column("k", "Removed"),
        Column("text", "What was seen"),
    )
    note = (
        "The study’s qualitative table, of rank-64 LoRA at learning rates of 1e-4 and 3e-4; no "
        "table of numbers is public. Intervals allow for the number of our cells in this table."
    )
    return Table("published", "Beside the study", columns, rows, note)


def trained_as(result: Mapping[str, Any]) -> str:
    """'LoRA rank 8, LR 1e-3'."""
    return f"{result['weights']}, LR {learning_rate(result['learning_rate'])}"


def _arm(result: Mapping[str, Any]) -> Arm | None:
    """The study's name for a removal; None for full weights, which its table does not have."""
    if not result["lora_rank"]:
        return None
    size = re.search(r"(?<![\d.])(\d+)b(?![a-z])", result["base"].lower())
    model = f"{size[1]}B" if size else result["base"]
    return Arm(model, result["arm"], result["insertion_optimizer"], result["task"])


def _mean(mean: SeedMean | None) -> dict[str, Any] | None:
    if mean is None:
        return None
    return {"rate": mean.mean, "lo": mean.lo, "hi": mean.hi, "seeds": mean.seeds}


def _finite(value: float) -> float | str:
    return number(value) if math.isfinite(value) else "unbounded"
