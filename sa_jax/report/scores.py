"""Every score that any eval wrote of a run: before, after, and the difference on the same items."""

from collections.abc import Mapping
from typing import Any

from sa_jax import text
from sa_jax.report.capability import capability_changes
from sa_jax.report.eval_records import AGAIN_EVAL, EvalRecord, scores_of
from sa_jax.report.measurements import Eval
from sa_jax.report.run_folders import RunFolder
from sa_jax.report.thresholds import Thresholds

_PARTS = ("rate", "lo", "hi", "n", "count")
_OF_A_DIFFERENCE = ("difference", "lo", "hi", "p_value", "n", "paired", "power")


def score_rows(
    run: RunFolder, parent: RunFolder | None, limits: Thresholds
) -> list[dict[str, Any]]:
    """A row a score, evals in the order they come.

    `after` is the last step after 0 that has the eval; `before` is step 0, else the parent's step
    that the run started from. Where both have it, `difference` holds after - before with its
    interval, paired where items are kept.
    """
    before, after = first_evals(run, parent), last_evals(run)
    rows = []
    for name in dict.fromkeys([*after, *before]):
        if name == AGAIN_EVAL:  # of other steps; the verdict says what it confirms
            continue
        rows += _rows(before.get(name), after.get(name), limits)
    for record in run.more_evals:
        rows += _rows(None, record, limits)
    return rows


def first_evals(run: RunFolder, parent: RunFolder | None) -> dict[str, EvalRecord]:
    """By name, the evals of what the run started from: its own at step 0 where there are any, else
    its parent's."""
    start = run.start.get("step")
    inherited = parent.evals.get(start, {}) if parent is not None and start is not None else {}
    return {**inherited, **run.evals.get(0, {})}


def last_evals(run: RunFolder) -> dict[str, EvalRecord]:
    """By name, the last eval after step 0."""
    last: dict[str, EvalRecord] = {}
    for step, evals in run.evals.items():
        if step > 0:
            last |= evals
    return last


def _rows(
    before: EvalRecord | None, after: EvalRecord | None, limits: Thresholds
) -> list[dict[str, Any]]:
    newest = after or before
    assert newest is not None
    sides = [
        Eval(record.step, capabilities={record.name: scores_of(record)}) if record else None
        for record in (before, after)
    ]
    changes = {change.score: change for change in capability_changes(sides[0], sides[1], limits)}
    rows = []
    for score, values in newest.scores.items():
        change = changes.get(score)
        rows.append(
            {
                "eval": text.one_line(newest.name),
                "title": text.one_line(newest.title),
                "kind": text.one_line(newest.kind),
                "score": text.one_line(score),
                "score_title": text.one_line(values.get("title", score)),
                "headline": score == newest.headline,
                "step": newest.step if after else None,
                "before": _values(before, score),
                "after": _values(after, score),
                "floor": values.get("floor"),
                "difference": change and {key: getattr(change, key) for key in _OF_A_DIFFERENCE},
                "source": text.one_line(newest.source),
            }
        )
    return rows


def _values(record: EvalRecord | None, score: str) -> dict[str, Any] | None:
    values: Mapping[str, Any] | None = record.scores.get(score) if record else None
    if not values or not values["n"]:
        return None
    return {key: values[key] for key in _PARTS if key in values}
