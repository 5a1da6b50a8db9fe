"""Whether an answer holds together at all: a cheap check of its form, blind to its meaning.

An answer is incoherent where one of these holds:

- it is missing: a scratchpad that never ends, or nothing but white space and special tokens
- it is stuck: two words or more, all the same ("qq qq"), or six or more of which one makes up more
  than half
- it goes round in circles: of 12 words or more, `MAX_REPEATED` of the sequences of four words, or
  more, have come before (seq-rep-4 of Welleck et al., arXiv 1908.04319)
- its bytes are no text: more than `MAX_BROKEN` of its characters are U+FFFD

A text whose words are not parted by spaces (one of more than `LONGEST_WORD` letters) is looked at
character by character. Fluent nonsense passes. Of the Alpaca answers that the tests read fewer than
1 % are called incoherent, whole or cut after 50 words, and as many once pirate speech has rewritten
them.
"""

import re
from collections import Counter

from sa_jax.data.labels import plain_answer

MAX_REPEATED = 0.3
MAX_BROKEN = 0.05
LONGEST_WORD = 40


def is_incoherent(completion: str) -> bool:
    """Whether the answer of a completion (special tokens kept) does not hold together."""
    answer = plain_answer(completion)
    if not answer:
        return True
    if answer.count("\ufffd") > MAX_BROKEN * len(answer):
        return True
    words = re.findall(r"\w+", answer.casefold())
    if any(len(word) > LONGEST_WORD for word in words):
        words = list("".join(words))
    if len(words) < 2:
        return False
    most = max(Counter(words).values())
    if most == len(words) or (len(words) >= 6 and 2 * most > len(words)):
        return True
    return len(words) >= 12 and repeated(words) >= MAX_REPEATED


def repeated(words: list[str], n: int = 4) -> float:
    """Share of the sequences of n words that have come before; 0 where there is none."""
    sequences = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0
