"""Cells as a page shows them: with a label that tells each from the others, and their verdicts."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sa_jax import text
from sa_jax.report.cells import Cell, differing
from sa_jax.report.judgement import NO_BACKDOOR
from sa_jax.report.tables import learning_rate

# What names a cell among others: key of a run's result, how it reads there.
_NAMES = ("base", "arm", "insertion_optimizer", "optimizer", "learning_rate", "weights")


@dataclasses.dataclass(frozen=True)
class CellGroup:
    """The runs of a cell, for a page."""

    key: str
    label: str  # what tells it from the others
    words: str  # its verdicts, counted
    names: tuple[str, ...]  # of its runs


def cell_groups(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> list[CellGroup]:
    """The cells with a label each; `results` by name of run."""
    labels = _labels(cells, results)
    groups = []
    for cell, label in zip(cells, labels, strict=True):
        names = tuple(run.name for run in cell.runs)
        statuses = Counter(results[name]["verdict"]["status"] for name in names)
        words = ", ".join(f"{count} of {len(names)} {status}" for status, count in statuses.items())
        groups.append(CellGroup(cell.key, label, words, names))
    return groups


def _labels(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    labels = [_title(cell, results) for cell in cells]
    by_title: dict[str, list[int]] = {}
    for i, title in enumerate(labels):
        by_title.setdefault(title, []).append(i)
    for title, members in by_title.items():
        parts: dict[int, list[str]] = {i: [title] for i in members}
        for key in _NAMES:
            values = {i: {_named(key, results[run.name]) for run in cells[i].runs} for i in members}
            if len({*map(frozenset, values.values())}) > 1:
                for i, alike in values.items():
                    if len(alike) == 1 and not alike <= {*parts[i]}:  # more: varies with the seed
                        parts[i] += alike
        # Cells that this does not tell apart differ in a setting: name it.
        for i in members:
            twins = [cells[j] for j in members if parts[j] == parts[i]]
            extra = [
                f"{name} {str(cells[i].settings.get(name))[:20]}" for name in differing(twins)[:3]
            ]
            labels[i] = " · ".join([*parts[i], *extra])
    return [text.one_line(label) for label in labels]


def _title(cell: Cell, results: Mapping[str, Mapping[str, Any]]) -> str:
    statuses = {results[run.name]["verdict"]["status"] for run in cell.runs}
    return f"{cell.title}, no backdoor" if statuses == {NO_BACKDOOR} else cell.title


def _named(key: str, result: Mapping[str, Any]) -> str:
    value = result[key]
    if key == "insertion_optimizer" and result["role"] != "insertion":
        return "no insertion" if value == "none" else f"inserted by {value}"
    return f"LR {learning_rate(value)}" if key == "learning_rate" else str(value)
