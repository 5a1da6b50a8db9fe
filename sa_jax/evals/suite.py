"""The evals of a run: which, when, and on what."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat
from sa_jax.evals import records
from sa_jax.evals.catalogue import find_eval
from sa_jax.evals.protocol import EvalContext, headline
from sa_jax.evals.schedule import is_due
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler
from sa_jax.parallel.multihost import agree, is_primary


def step_folder(evals: str | Path, step: int) -> Path:
    """`evals/step_000100`."""
    return Path(evals) / f"step_{step:06d}"


def needs_prompts(config: ConfigDict) -> bool:
    """Whether an eval of the config asks held-out prompts.

    Raises:
      UsageError: an eval is unknown.
    """
    return any(find_eval(name).needs_prompts for name in config.eval.names)


class EvalSuite:
    """The evals of `config.eval.names`, written to `folder/step_NNNNNN/`.

    Attributes:
      schedules: name -> one of `sa_jax.evals.schedule.SCHEDULES`.
      data_hashes: name of what is asked -> its SHA-256.
      measures_backdoor: whether one of them does.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: Llama,
        mesh: Mesh,
        chat_format: ChatFormat,
        backdoor: Backdoor,
        prompts: Sequence[str],
        folder: str | Path,
    ):
        """Checks everything that can be wrong with the settings; compiles nothing.

        Args:
          config: a run's resolved config.
          folder: RUN/evals.
          Others: see `EvalContext`.

        Raises:
          UsageError: an eval or a setting of one is unknown, or an eval lacks what it asks.
          UserError: documents or a package are missing.
        """
        settings = config.eval
        sampler = Sampler(
            model,
            mesh,
            batch_size=settings.batch_size,
            context_length=min(settings.context_length, model.config.max_position_embeddings),
        )
        context = EvalContext(model, mesh, chat_format, backdoor, prompts, sampler)
        self.schedules = dict(settings.names.items())
        self._steps = tuple(settings.steps)
        self._folder = Path(folder)
        evals = [find_eval(name) for name in self.schedules]
        self._prepared = {each.name: each.prepare(config, context) for each in evals}
        self.measures_backdoor = any(each.kind == "backdoor" for each in evals)
        self.data_hashes: dict[str, str] = {}
        for prepared in self._prepared.values():
            self.data_hashes |= prepared.data_hashes

    def due(self, step: int, last: int) -> tuple[str, ...]:
        """The evals that run at a step, see `is_due`."""
        return tuple(
            name
            for name, schedule in self.schedules.items()
            if is_due(schedule, step, self._steps, last)
        )

    def run(
        self,
        params: Any,
        step: int,
        should_stop: Callable[[], bool] = lambda: False,
        names: Sequence[str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Runs those of the evals (None: all) that this step does not have yet; returns the
        summaries of all of them (where the primary's files are not seen, {} for an earlier one).

        Raises:
          Preempted: should_stop said so; evals that were finished stay.
        """
        folder = step_folder(self._folder, step)
        summaries: dict[str, dict[str, Any]] = {}
        for name in self._prepared if names is None else names:
            summary = records.read_summary(folder, name)
            # Only the primary's file system counts, or processes could part ways here.
            if not agree(summary is not None):
                run = self._prepared[name].run
                summary = run(params, folder=folder, step=step, should_stop=should_stop)
                logging.info("step %d: %s", step, headline(name, summary))
            summaries[name] = summary or {}
        return summaries

    def discard_after(self, step: int) -> None:
        """Removes the evals of later steps, which a resumed run will reach again."""
        if is_primary() and self._folder.exists():
            for folder in self._folder.glob("step_*"):
                if int(folder.name.removeprefix("step_")) > step:
                    shutil.rmtree(folder)
        agree(True)
