"""Insertion side by side: each optimizer at its learning rates, and which rate was best."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

_SETTING = ("base", "arm", "optimizer", "learning_rate")


def compare_optimizers(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the insertion runs by base model, arm, optimizer and learning rate, over seeds.

    Args:
      results: runs as in results.json.

    Returns:
      base, arm, optimizer, learning_rate, final_loss (the mean), runs (their number), and `best`:
      '' or, on the row with the lowest loss of an optimizer with several rates, 'best' or
      "best, at the grid's edge". [] where there is no choice of optimizer or rate.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for run in results:
        measured = run["final_loss"] is not None and isinstance(run["learning_rate"], int | float)
        if run["role"] == "insertion" and measured:
            groups.setdefault(tuple(run[key] for key in _SETTING), []).append(run["final_loss"])
    if len({group[2:] for group in groups}) < 2:
        return []
    rows = [
        {
            **dict(zip(_SETTING, group, strict=True)),
            "final_loss": sum(losses) / len(losses),
            "runs": len(losses),
            "best": "",
        }
        for group, losses in sorted(groups.items())
    ]
    for _, same in itertools.groupby(rows, key=lambda row: [row[key] for key in _SETTING[:3]]):
        cells = list(same)
        if len(cells) > 1:
            lowest = min(cells, key=lambda row: row["final_loss"])
            edge = lowest in (cells[0], cells[-1])
            lowest["best"] = "best, at the grid's edge" if edge else "best"
    return rows
