"""Every statistic over runs: cells over seeds, tests corrected by family, and their tables."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sa_jax.evals.statistics import holm
from sa_jax.report import seeds, steps_to_removal
from sa_jax.report.cells import Results, cells, labelled
from sa_jax.report.judgement import Judged
from sa_jax.report.measurements import RunEvals
from sa_jax.report.published import published_table
from sa_jax.report.relearning import relearning_table
from sa_jax.report.robustness import Checkpoint, checkpoints, policies_table, robustness_table
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds


@dataclasses.dataclass(frozen=True)
class Study:
    """The statistics of all runs together."""

    cells: tuple[seeds.CellResult, ...]
    tables: tuple[Table, ...]  # some without rows
    pareto: Mapping[str, Sequence[Checkpoint]]  # inserted run -> its checkpoints under removal
    capability: str  # title of the capability that most of these have


def study_of(
    runs: Sequence[RunEvals], judged: Judged, results: Results, limits: Thresholds
) -> Study:
    """Every statistic over runs. Adds `p_holm` to each difference of a headline score in `results`
    (by name, as in results.json)."""
    grouped = labelled(cells(runs), results)
    over = tuple(seeds.over_seeds(cell, judged, limits) for cell in grouped)
    # Without a second seed there are no claims about cells.
    several = over if any(len(cell.replicates) > 1 for cell in grouped) else ()
    eval_name, score, capability = _capability(runs)
    pareto = checkpoints(runs, eval_name, score) if eval_name else {}
    by_rate = steps_to_removal.by_learning_rate(runs, limits)
    compared, fits = corrected(seeds.compare_arms(several, limits), by_rate)
    fits += steps_to_removal.by_insertion_length(runs, limits)
    correct_run_changes(list(results.values()))
    tables = (
        seeds.cells_table(several),
        seeds.comparisons_table(compared, limits),
        steps_to_removal.times_table(fits, limits),
        relearning_table(grouped, judged, limits),
        robustness_table(pareto, capability, limits),
        policies_table([run for run in runs if run.role == "removal" and run.backdoored]),
        published_table(several, results, limits),
    )
    return Study(over, tables, pareto, capability)


def corrected(
    compared: Sequence[seeds.Comparison], by_rate: Sequence[steps_to_removal.TimeFit]
) -> tuple[list[seeds.Comparison], list[steps_to_removal.TimeFit]]:
    """Adds Holm's p over all claims about cells: each comparison, and the study's claim about
    learning rates."""
    adjusted = iter(holm([row.p_value for row in compared] + [fit.p_claim for fit in by_rate]))
    return (
        [dataclasses.replace(row, p_holm=next(adjusted)) for row in compared],
        [dataclasses.replace(fit, p_holm=next(adjusted)) for fit in by_rate],
    )


def correct_run_changes(results: Sequence[Mapping[str, Any]]) -> None:
    """Adds Holm's p to each run's change of a headline score: these are a separate family. Other
    scores explain a headline score, and decide nothing: they are not tested."""
    changes = [
        row["difference"]
        for result in results
        for row in result["scores"]
        if row["headline"] and row["difference"] and not row["source"]
    ]
    for change, p in zip(changes, holm([c["p_value"] for c in changes]), strict=True):
        change["p_holm"] = p


def _capability(runs: Sequence[RunEvals]) -> tuple[str, str, str]:
    """(eval, score, title) of the headline score that most evals of removals have; '' for none."""
    counts: Counter[tuple[str, str, str]] = Counter(
        (name, key, score.title)
        for run in runs
        if run.role == "removal"
        for point in run.measured
        for name, scores in point.capabilities.items()
        for key, score in scores.items()
        if score.headline
    )
    # Of equals MATH-500, which the study took.
    return max(counts, key=lambda key: (counts[key], key[0] == "math500"), default=("", "", ""))
