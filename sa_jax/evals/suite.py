"""The evals of a run: which ones, at which steps, and on which data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sa_jax.buckets import as_path
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat
from sa_jax.evals import records
from sa_jax.evals.catalogue import find_eval
from sa_jax.evals.protocol import EvalContext, again, evaluate, headline
from sa_jax.evals.schedule import asks_again, is_due
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler
from sa_jax.parallel.multihost import agree, is_primary


def step_folder(evals: str | Path, step: int) -> Path:
    """`evals/step_000100`."""
    return as_path(evals) / f"step_{step:06d}"


def needs_prompts(config: ConfigDict) -> bool:
    """Whether an eval of the config asks held-out prompts; UsageError if one is unknown."""
    return any(find_eval(name).needs_prompts for name in config.eval.names)


class EvalSuite:
    """The evals of `config.eval.names`, written to `folder/step_NNNNNN/`."""

    def __init__(
        self,
        config: ConfigDict,
        model: Llama,
        mesh: Mesh,
        chat_format: ChatFormat,
        backdoor: Backdoor,
        prompts: Sequence[str],
        folder: str | Path,
        *,
        confirm: bool = False,
    ):
        """Checks all settings; compiles nothing, except what `Sampler` does. UsageError if an eval
        or a setting of one is unknown, or an eval lacks its questions; UserError if documents or a
        package are missing.

        Args:
          config: a run's resolved config.
          folder: RUN/evals.
          confirm: whether evals are asked again, see `sa_jax.evals.schedule`.
          Others: see `EvalContext`.
        """
        settings = config.eval
        sampler = Sampler(
            model,
            mesh,
            batch_size=settings.batch_size,
            context_length=min(settings.context_length, model.config.max_position_embeddings),
        )
        context = EvalContext(model, mesh, chat_format, backdoor, prompts, sampler)
        self.schedules = dict(settings.names.items())  # name -> one of `schedule.SCHEDULES`
        self._steps = tuple(settings.steps)
        self._folder = as_path(folder)
        self._confirm = confirm
        self._evals = {name: find_eval(name) for name in self.schedules}
        self.prepared = {name: each.prepare(config, context) for name, each in self._evals.items()}
        self.measures_backdoor = any(each.kind == "backdoor" for each in self._evals.values())

    @property
    def data_hashes(self) -> dict[str, str]:
        """Name of the data -> its SHA-256."""
        prepared = self.prepared.values()
        return {name: sha for each in prepared for name, sha in each.data_hashes.items()}

    def due(self, step: int, last: int) -> list[str]:
        """The evals that run at a step, see `is_due`."""
        return [
            name
            for name, schedule in self.schedules.items()
            if is_due(schedule, step, self._steps, last)
        ]

    def run(
        self,
        params: Any,
        step: int,
        should_stop: Callable[[], bool] = lambda: False,
        names: Sequence[str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Runs the evals (None: all) that this step does not have yet. Returns the summaries of all
        (in a process that cannot see the primary's files, {} for one that was run earlier).
        Preempted if should_stop said so; finished evals are kept."""
        folder = step_folder(self._folder, step)
        summaries: dict[str, dict[str, Any]] = {}
        for name in self.prepared if names is None else names:
            place: dict[str, Any] = {"folder": folder, "step": step, "should_stop": should_stop}
            eval_, prepared = self._evals[name], self.prepared[name]
            summary = records.read_summary(folder, name)
            # Only the primary's file system counts, or processes could part ways here.
            if not agree(summary is not None):
                summary = evaluate(eval_, prepared, params, **place)
                logging.info("step %d: %s", step, headline(name, summary))
            summaries[name] = summary or {}
            if agree(self._asks_again(name, step, summaries[name])):
                fresh = evaluate(eval_, prepared, params, **place, fresh=True)
                logging.info("step %d, asked again: %s", step, headline(name, fresh))
        return summaries

    def _asks_again(self, name: str, step: int, summary: Mapping[str, Any]) -> bool:
        """Whether the eval's questions must be asked again, and have not been yet."""
        if not self._confirm or not summary or self.prepared[name].run_again is None:
            return False
        if records.read_summary(step_folder(self._folder, step), again(name)) is not None:
            return False
        folders = records.step_folders(self._folder)
        earlier = [records.read_summary(folders[at], name) for at in folders if at < step]
        return asks_again([_counts(each) for each in earlier if each], *_counts(summary))

    def discard_after(self, step: int) -> None:
        """Removes the evals of later steps, which a resumed run will run again."""
        if is_primary():
            for at, folder in records.step_folders(self._folder).items():
                if at > step:
                    epath.Path(folder).rmtree()
        agree(True)


def _counts(summary: Mapping[str, Any]) -> tuple[int, int]:
    score = summary["scores"][summary["headline"]]
    return score["count"], score["n"]
