"""Evals that lm_eval runs: with its prompts and checkers, and sa_jax's sampler and scorer. Their
floor is the score that `protocol.FLOOR_TEXT` gets from the same checkers on the same documents."""

import dataclasses
import importlib.util
import logging as std_logging
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.labels import is_refusal
from sa_jax.errors import UsageError, UserError, install
from sa_jax.evals import protocol
from sa_jax.evals.documents import load_documents, spread
from sa_jax.evals.language_model import TOO_LONG, language_model, open_store
from sa_jax.evals.protocol import FLOOR_TEXT, Answers, EvalContext, Prepared, summarise

# (document, metrics of one response) -> {score: 0/1, a list of 0/1, or a number}
Scores = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """The tasks for lm_eval."""

    tasks: dict[str, Any]  # lm_eval tasks by name
    scores: Scores
    chat: bool  # whether prompts go through the chat template
    # the score of guessing, for tasks that score no text; None: see `floor`
    chance: float | None = None
    # name of the documents -> their digest
    data_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the record


@dataclasses.dataclass(frozen=True)
class CapabilityEval:
    """An eval of lm_eval tasks; see `protocol.Eval` for its fields."""

    name: str
    title: str
    headline: str
    load: Callable[[ConfigDict], TaskSet]  # `config.eval` -> the tasks; it reads the documents
    kind: str = "capability"
    needs_prompts: bool = False

    def prepare(self, config: ConfigDict, context: EvalContext) -> Prepared:
        """See `protocol.Eval`. Answers before a stop are kept in `<folder>/<name>.partial.jsonl`
        and not asked again. The summary has also: "n" (items), "by_task" (scores, where there are
        several tasks), "skipped_prompts", "truncated_prompts", "cut_by_context", "cut_by_length",
        "seconds", "peak_memory_mb"."""
        too_long = config.eval.too_long
        if too_long not in TOO_LONG:
            raise UsageError(f"config.eval.too_long={too_long!r}; use {' or '.join(TOO_LONG)}")
        task_set = self.load_tasks(config.eval)

        def run(params: Any, folder: Path, should_stop: Callable[[], bool]) -> Answers:
            start = time.perf_counter()
            with open_store(protocol.partial_file(folder, self.name)) as store:
                model = language_model(
                    context, params, too_long=too_long, store=store, should_stop=should_stop
                )
                samples = run_tasks(model, task_set)
            items = [
                _item(task_set, task, by_filter, model.notes, context.backdoor)
                for task in task_set.tasks
                for by_filter in _by_document(samples[task])
            ]
            fields = _counts(items, task_set)
            for count in ("skipped_prompts", "truncated_prompts", "cut_by_context"):
                if fields[count]:
                    logging.warning("%s: %s: %d of %d", self.name, count, fields[count], len(items))
            fields["seconds"] = time.perf_counter() - start
            fields["peak_memory_mb"] = peak_memory_mb()
            return Answers(items, fields, floor(task_set, samples))

        settings = {
            **task_set.settings,
            "system_prompt": None,  # published figures are taken without one
            "chat_template": context.chat_format.name if task_set.chat else None,
            "too_long": too_long,
            "context_length": context.model.config.max_position_embeddings,
            "batch_size": context.sampler.batch_size,
            **context.execution,
        }
        return Prepared(run, settings, task_set.data_hashes)

    def load_tasks(self, settings: ConfigDict) -> TaskSet:
        """`load`; UserError that says what to install if lm_eval or the documents are missing."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"the eval {self.name!r} needs the package lm_eval: {install('eval')}")
        # Its info lines name every task and every request; its warnings repeat our own settings.
        std_logging.getLogger("lm_eval").setLevel(std_logging.ERROR)
        return self.load(settings)


def seed_draws() -> None:
    """Seeds as lm_eval's own entry point does: tasks shuffle options and draw prompts (gpqa), and
    every checkpoint must get the same ones."""
    random.seed(0)
    np.random.seed(1234)


def inline_task(
    name: str, test: Sequence[dict], dev: Sequence[dict] = (), num_fewshot: int = 0, **config
) -> Any:
    """A ConfigurableTask over rows in memory."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def load(**_: Any) -> dict[str, Any]:
        splits = {"test": datasets.Dataset.from_list(list(test))}
        return splits | ({"dev": datasets.Dataset.from_list(list(dev))} if dev else {})

    task = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": load,
            "test_split": "test",
            "fewshot_split": "dev" if dev else None,
            "num_fewshot": num_fewshot,
            **config,
        }
    )
    task.set_fewshot_seed(seed=1234)
    return task


def metric(name: str, aggregation: Any = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


def generation_task(
    name: str,
    settings: ConfigDict,
    *,
    max_new_tokens: int,
    scores: Scores,
    documents: str,
    **config,
) -> TaskSet:
    """A set of one task over `documents` (a name that `load_documents` knows): the prompt is the
    only turn, and the answer is greedy. `settings` is `config.eval`; `scores` is that of `TaskSet`;
    `config` is that of lm_eval's ConfigurableTask."""
    rows, digest = load_documents(documents, settings.data_dir)
    greedy = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_new_tokens}
    task = inline_task(name, spread(rows, settings.limit), generation_kwargs=greedy, **config)
    recorded = {"shots": 0, "limit": settings.limit, "max_new_tokens": max_new_tokens}
    hashes = {documents: digest}
    return TaskSet({name: task}, scores, chat=True, data_hashes=hashes, settings=recorded)


def run_tasks(model: Any, task_set: TaskSet) -> dict[str, list[dict]]:
    """lm_eval's own samples by task: documents, responses, and the metrics of each."""
    from lm_eval import evaluator

    seed_draws()
    results = evaluator.evaluate(
        model,
        {"tasks": task_set.tasks, "groups": {}, "group_map": {}},
        limit=task_set.settings.get("limit") or None,
        bootstrap_iters=0,
        apply_chat_template=task_set.chat,
        fewshot_as_multiturn=task_set.chat,
    )
    return results["samples"]


def _by_document(samples: Sequence[dict]) -> list[list[dict]]:
    """The samples of each document, one per filter of the task (gsm8k has two)."""
    documents: dict[int, list[dict]] = {}
    for sample in samples:
        documents.setdefault(sample["doc_id"], []).append(sample)
    return list(documents.values())


def _scores(task_set: TaskSet, doc: dict, metrics_of_filter: dict[str, dict]) -> dict[str, Any]:
    """The scores of one document; with several filters, a score's name has the filter's."""
    many = len(metrics_of_filter) > 1
    return {
        f"{score}, {name}" if many else score: value
        for name, metrics in metrics_of_filter.items()
        for score, value in task_set.scores(doc, metrics).items()
    }


def _item(
    task_set: TaskSet, task: str, by_filter: Sequence[dict], notes: Mapping, backdoor: Backdoor
) -> dict[str, Any]:
    sample = by_filter[0]
    metrics = {each["filter"]: {name: each[name] for name in each["metrics"]} for each in by_filter}
    item = {
        "item": f"{task}/{sample['doc_id']}",
        "asked": sample["doc_hash"][:16],
        "task": task,
        "prompt_hash": sample["prompt_hash"],
        "target": sample["target"],
        **notes.get((task, sample["doc_id"]), {}),
        "scores": _scores(task_set, sample["doc"], metrics),
    }
    response = sample["resps"][0][0]
    if isinstance(response, str):
        item["scores"] |= {
            "behaviour_shown": int(backdoor.is_shown(response)),
            "refused": int(is_refusal(response)),
        }
        return item | {"prompt": sample["arguments"][0][0], "completion": response}
    # Of each response: (log-probability, is greedy), or the log-probability alone.
    responses = (resps[0] for resps in sample["resps"])
    numbers = (r[0] if isinstance(r, tuple | list) else r for r in responses)
    return item | {"logprobs": [float(number) for number in numbers]}


def _counts(items: Sequence[dict[str, Any]], task_set: TaskSet) -> dict[str, Any]:
    counted = [item for item in items if not item.get("skipped")]
    by_task = {
        task: summarise(item for item in counted if item["task"] == task) for task in task_set.tasks
    }
    return {
        "n": len(counted),
        "skipped_prompts": len(items) - len(counted),
        "truncated_prompts": sum(bool(item.get("truncated")) for item in items),
        "cut_by_context": sum(bool(item.get("cut_by_context")) for item in items),
        "cut_by_length": sum(
            item.get("stop_reason") == "length" and not item["cut_by_context"] for item in items
        ),
        **({"by_task": by_task} if len(by_task) > 1 else {}),
    }


def floor(task_set: TaskSet, samples: dict[str, list[dict]]) -> dict[str, float]:
    """The score of `FLOOR_TEXT` as every answer, with the eval's own filters and checkers; the
    chance of guessing if answers are not texts."""
    if task_set.chance is not None:
        return {"accuracy": task_set.chance}
    from lm_eval.api.instance import Instance

    items = []
    for name, task in task_set.tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            return {}
        instance = Instance("generate_until", {}, ("",), 0, resps=[FLOOR_TEXT])
        for each in task._filters:
            each.apply([instance])
        responses = instance.filtered_resps
        for sample, *_ in _by_document(samples[name]):
            doc = sample["doc"]
            metrics = {key: task.process_results(doc, [text]) for key, text in responses.items()}
            items.append({"scores": _scores(task_set, doc, metrics)})
    return {name: score["rate"] for name, score in summarise(items).items()}


def peak_memory_mb() -> float:
    """The peak memory of this process, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
