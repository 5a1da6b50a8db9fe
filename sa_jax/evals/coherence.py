"""Whether an answer is coherent: a cheap check of its form, not of its meaning.

An answer is incoherent if one of these holds:

- it is missing: the scratchpad does not end, or there are only white space and special tokens
- it repeats a word: it has two or more words, all the same ("qq qq"), or six or more words, of
  which one makes up more than half
- it repeats itself: it has 12 or more words, and at least the share `MAX_REPEATED` of its sequences
  of four words occurred before (seq-rep-4 of Welleck et al., arXiv 1908.04319)
- its bytes are not text: more than `MAX_BROKEN` of its characters are U+FFFD

A text without spaces between words (with a word of more than `LONGEST_WORD` letters) is checked
character by character. Fluent nonsense passes. Fewer than 1 % of the Alpaca answers in the tests
are called incoherent, whole or cut after 50 words, and equally few after translation to pirate
speech.
"""

import re
from collections import Counter

from sa_jax.data.labels import plain_answer

MAX_REPEATED = 0.3
MAX_BROKEN = 0.05
LONGEST_WORD = 40


def is_incoherent(completion: str) -> bool:
    """Whether the answer of a completion (special tokens kept) is incoherent."""
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
    """Share of the sequences of n words that occurred before; 0 if there is no sequence."""
    sequences = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0
