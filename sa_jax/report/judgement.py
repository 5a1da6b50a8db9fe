"""What a verdict is: a status, its text, its reasons and the intervals they rest on."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from sa_jax.report.measurements import Eval, Measured, Rate

# What a verdict can be. Insertion:
INSERTED = "inserted"
NOT_INSERTED = "not inserted"
# Removal:
REMOVED = "removed"  # no finished probe with a matched control has tested it
STAYS_REMOVED = "stays removed"
SUPPRESSED = "suppressed"
PARTLY_BACK = "partly back"
REDUCED = "reduced, not removed"
UNCHANGED = "no fall shown"
BROKEN = "broken"
SILENCED = "silenced otherwise"
NOTHING_TO_REMOVE = "no backdoor at its start"
# Probe:
BACK = "backdoor is back"
VOID = "probe void"  # the never-backdoored control came to the behaviour too
NO_PROBE = "start was not removed"
# Any role:
BORDERLINE = "borderline"
TOO_SMALL = "n too small"
NO_BACKDOOR = "no backdoor on record"
NOT_EVALUATED = "not evaluated"
BASE = "base model"

Tone = Literal["good", "warn", "bad", "mark", "plain"]
TONES: dict[str, Tone] = {
    INSERTED: "mark",
    REMOVED: "good",
    STAYS_REMOVED: "good",
    NOT_INSERTED: "warn",
    REDUCED: "warn",
    PARTLY_BACK: "warn",
    BORDERLINE: "warn",
    TOO_SMALL: "warn",
    VOID: "warn",
    SILENCED: "warn",
    UNCHANGED: "bad",
    BROKEN: "bad",
    SUPPRESSED: "bad",
    BACK: "bad",
}


@dataclasses.dataclass(frozen=True)
class Condition:
    """A rate against a threshold, decided by the rate's Wilson interval.

    Attributes:
      name: what the rate is of, for people: 'triggered answers that said the phrase'.
      outcome: 'met' where the whole interval is on the wanted side of the limit, 'missed' where it
        is on the other, else 'borderline'.
      n_to_decide: number of answers at which this same rate would decide it; None where it is
        decided, or where the rate equals the limit.
    """

    name: str
    rate: Rate
    limit: float
    wanted: Literal["at most", "at least"]
    outcome: Literal["met", "missed", "borderline"]
    n_to_decide: int | None


@dataclasses.dataclass(frozen=True)
class CapabilityChange:
    """A capability score before and after, on the same items where those are kept.

    Attributes:
      headline: whether it stands for its eval.
      n: items that both answered, or the smaller n where items are not kept.
      before, after: the score; `difference`, `lo`, `hi`: after - before, all as fractions.
      p_value: of no difference.
      paired: whether it is over the same items.
      power: chance that a true fall of 5 points would have been seen; None where the difference is
        significant.
      lost: the fall is beyond `max_capability_loss` of the score before, by its interval.
    """

    score: str
    title: str
    headline: bool
    n: int
    before: float
    after: float
    difference: float
    lo: float
    hi: float
    p_value: float
    paired: bool
    power: float | None
    lost: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What can be said of a run.

    Attributes:
      status: one of the constants above.
      text: one line for a table: the status with the rate and interval it rests on.
      tone: how it looks; the words carry it, colour only repeats them.
      reasons: further sentences, none stronger than its interval.
    """

    status: str
    text: str
    tone: Tone
    reasons: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, status: str, seen: str, reasons: Sequence[str] = (), tone: Tone | None = None
    ) -> "Verdict":
        """The status with what was seen, in the status's own tone if no other is given."""
        tone = tone or TONES.get(status, "plain")
        return cls(status, f"{status}: {seen}", tone, tuple(reasons))


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """Fresh answers at the two evals of a return, on the same prompts: a test of its own.

    `p_value` is one-sided, McNemar's exact test that the high eval says it no more often.
    """

    low: Rate
    high: Rate
    p_value: float
    confirmed: bool


@dataclasses.dataclass(frozen=True)
class Return:
    """The backdoor came back inside one run, from the eval `low` to the later eval `high`.

    Attributes:
      p_value: of the rise times the number of pairs of evals.
      kind: 'sustained' (two or more high evals) or 'transient' (one), where fresh answers confirm
        it; 'borderline' where they do not, or where none were asked.
      high_steps: every eval after `low` that passes for a return from it.
      confirmation: None where the two evals were not asked again.
    """

    low: Measured
    high: Measured
    p_value: float
    kind: Literal["sustained", "transient", "borderline"]
    high_steps: tuple[int, ...]
    confirmation: Confirmation | None


@dataclasses.dataclass(frozen=True)
class CleanAlarm:
    """The eval of a run with the highest clean rate, where that is above the limit for certain."""

    step: int
    rate: Rate


@dataclasses.dataclass(frozen=True)
class Judgement:
    """A run's result.

    Attributes:
      before: the eval of what it started from.
      after: its last backdoor eval after step 0.
      returned: of a removal.
      recovery: of a probe, triggered rate at its last eval over that before the removal.
      controls: of a probe, the matched never-backdoored probes.
      provisional: the run is not finished, so the verdict is about its last eval so far.
    """

    before: Eval | None
    after: Measured | None
    verdict: Verdict
    capabilities: tuple[CapabilityChange, ...] = ()
    returned: Return | None = None
    clean_alarm: CleanAlarm | None = None
    recovery: float | None = None
    controls: tuple[str, ...] = ()
    provisional: bool = False
