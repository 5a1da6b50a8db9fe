"""Insertion runs side by side: each optimizer at its learning rates, and which rate was best."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sa_jax.report.run_folders import RunFolder


def final_loss(run: RunFolder) -> float | None:
    """Mean training loss (nats a token) over the last quarter of the logged steps."""
    losses = [row["loss"] for row in run.metrics if math.isfinite(row.get("loss", math.nan))]
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last) if last else None


def compare_optimizers(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the insertion runs by optimizer and learning rate; [] where there is no choice.

    Args:
      results: runs as in results.json.

    Returns:
      optimizer, learning_rate, final_loss, name, and `best`: '' or, on the row with the lowest
      final loss of its optimizer, 'best' or "best, at the grid's edge".
    """
    runs = [
        run
        for run in results
        if run["task"] == "insertion"
        and run["final_loss"] is not None
        and isinstance(run["learning_rate"], int | float)
    ]
    if len({(run["optimizer"], run["learning_rate"]) for run in runs}) < 2:
        return []
    rows = []
    runs = sorted(runs, key=lambda run: (run["optimizer"], run["learning_rate"]))
    for _, group in itertools.groupby(runs, key=lambda run: run["optimizer"]):
        cells = list(group)
        rates = [run["learning_rate"] for run in cells]
        lowest = min(cells, key=lambda run: run["final_loss"])
        edge = lowest["learning_rate"] in (min(rates), max(rates))
        for run in cells:
            best = ("best, at the grid's edge" if edge else "best") if run is lowest else ""
            keys = ("optimizer", "learning_rate", "final_loss", "name")
            rows.append({**{key: run[key] for key in keys}, "best": best})
    return rows
