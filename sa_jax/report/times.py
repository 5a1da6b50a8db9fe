"""When something first happened in a run: between two evals, or not by its end."""

import dataclasses
from collections.abc import Callable, Sequence

from sa_jax.report.measurements import Measured


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


def first_time(evals: Sequence[Measured], holds: Callable[[Measured], bool]) -> Span | None:
    """The first of a run's evals after step 0 at which `holds` is true; None without an eval."""
    if not evals:
        return None
    after = 0
    for point in evals:
        if holds(point):
            return Span(after, point.step)
        after = point.step
    return Span(after, None)
