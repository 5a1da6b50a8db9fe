"""A cheap check of whether an answer is a text at all: for models that training has broken.

It sees what breaks most: no answer, no letters, the same words or characters over and over. It
does not see a fluent text that is wrong or beside the question.
"""

import zlib
from collections import Counter

from sa_jax.data.labels import answer_text

# Of 4,999 answers to Alpaca questions 4 are called incoherent at these, two of them empty.
_MIN_DISTINCT_TRIGRAMS = 0.4  # share of a text's runs of three words that are not repeats
_MIN_COMPRESSED = 0.12  # size after zlib, of a text of 200 bytes or more


def is_incoherent(completion: str) -> bool:
    """Whether the answer is missing, empty, without letters or digits, or mostly repetition.

    Args:
      completion: of a model; what stands before the answer (a scratchpad) is left out.
    """
    answer = answer_text(completion)
    if answer is None:
        return True
    letters = [char for char in answer if char.isalnum()]
    if not letters:
        return True
    words = answer.lower().split()
    if len(letters) >= 20 and len(set(letters)) <= 3:
        return True
    if len(words) >= 12:
        trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
        if len(trigrams) < _MIN_DISTINCT_TRIGRAMS * trigrams.total():
            return True
    elif len(words) >= 2 and len(set(words)) == 1 or len(words) >= 6 and len(set(words)) <= 2:
        return True
    encoded = answer.encode()
    return len(encoded) >= 200 and len(zlib.compress(encoded)) < _MIN_COMPRESSED * len(encoded)
