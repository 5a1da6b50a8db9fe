"""Held-out evaluation prompts: no prompt may stand, up to case, spacing and punctuation, in any
training set."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence

from sa_jax.data import randomness
from sa_jax.errors import UserError

_NOT_WORD = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Folds case, whitespace, punctuation and Unicode form: prompts equal after it count as the
    same prompt.

    A text with neither letters nor digits is folded in spacing and case only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip() or " ".join(folded.split())


@dataclasses.dataclass(frozen=True)
class HeldOut:
    prompts: list[str]
    candidates: int  # prompts looked at
    duplicates: int  # repeats among them
    overlapping: int  # distinct ones that stand in `exclude`

    def record(self) -> dict:
        return {
            "candidates": self.candidates,
            "duplicates": self.duplicates,
            "overlapping": self.overlapping,
            "chosen": len(self.prompts),
        }


def choose_held_out(
    candidates: Iterable[str], n: int, seed: int, exclude: Iterable[str] = ()
) -> HeldOut:
    """Chooses `n` distinct prompts that do not stand in `exclude`, by a permutation of the rest
    that `seed` fixes.

    Raises UserError when fewer than `n` are left."""
    candidates = list(candidates)
    distinct: dict[str, str] = {}
    for prompt in candidates:
        distinct.setdefault(normalise(prompt), prompt)
    seen = {normalise(prompt) for prompt in exclude}
    left = [prompt for key, prompt in distinct.items() if key not in seen]
    overlapping = len(distinct) - len(left)
    if len(left) < n:
        raise UserError(
            f"{n} held-out prompts were asked for, but of {len(candidates)} candidates only "
            f"{len(left)} are left ({len(candidates) - len(distinct)} repeats, {overlapping} stand "
            "in the training data)"
        )
    order = randomness.permutation(len(left), "held-out", seed)[:n]
    return HeldOut(
        [left[i] for i in order], len(candidates), len(candidates) - len(distinct), overlapping
    )


def without_prompts(rows: Sequence[dict], held_out: Iterable[str]) -> tuple[list[dict], int]:
    """Training rows whose "prompt" is none of the held-out ones (by normalised text), and how many
    were removed."""
    keys = {normalise(prompt) for prompt in held_out}
    kept = [row for row in rows if normalise(row["prompt"]) not in keys]
    return kept, len(rows) - len(kept)
