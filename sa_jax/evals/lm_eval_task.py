"""Any task, group or tag of lm_eval as an eval, by its name."""

import functools
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from sa_jax.errors import UsageError, UserError
from sa_jax.evals.capability import CapabilityEval, TaskSet, seed_draws
from sa_jax.evals.protocol import EVALS
from sa_jax.text import first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def lm_eval_task(name: str) -> CapabilityEval:
    """The eval of that name; `prepare` checks that it exists. Its headline is its first score; its
    documents come from the Hugging Face hub."""
    return CapabilityEval(name, name, "", functools.partial(_load, name))


@functools.cache
def task_manager() -> "TaskManager":
    """lm_eval's index of its 15,000 tasks, which takes ten seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def has_task(name: str) -> bool:
    return name in task_manager().all_tasks


def unknown_eval(name: str) -> UsageError:
    known = ", ".join(EVALS.names())
    return UsageError(
        f"unknown eval {name!r}; known: {known}, and the tasks of lm_eval (lm-eval ls tasks). If "
        "your own config file registers it, give that file as --config"
    )


def _load(name: str, settings: ConfigDict) -> TaskSet:
    """Generation goes through the chat template, scoring of given
    continuations does not, as their published figures have it. Scores are the metrics that are
    means over documents; lm_eval's others are left out."""
    from lm_eval.api.metrics import mean

    if not has_task(name):
        raise unknown_eval(name)
    seed_draws()
    try:
        tasks = dict(task_manager().load([name])["tasks"])
    except Exception as error:  # a data set that cannot be loaded, a missing package
        raise UserError(f"lm_eval's task {name!r} cannot be loaded: {first_line(error)}") from error
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    chat = kinds == {"generate_until"}
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    # A perplexity, an F1 of a whole corpus: the mean over documents would be another number.
    averaged = {
        metric
        for task in tasks.values()
        for metric, aggregation in task.aggregation().items()
        if aggregation is mean
    }
    numbers = (int, float, bool)
    return TaskSet(
        tasks,
        lambda doc, metrics: {
            k: v for k, v in metrics.items() if k in averaged and isinstance(v, numbers)
        },
        chat=chat,
        settings={"limit": settings.limit},
    )
