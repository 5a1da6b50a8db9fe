"""Shortens answers that are too long for a training row, at the end of a sentence."""

import dataclasses
import re
from collections.abc import Sequence

from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation

# Not after a digit or a lone letter: "1." opens a list item and "e.g." is no end.
_SENTENCE_END = re.compile(r"""(?<![0-9])(?<!\b[A-Za-z])[.!?]+["'”’)\]]*(?=\s|$)""")


def cut_answers(
    conversations: Sequence[Conversation], chat_format: ChatFormat, sequence_length: int
) -> list[Conversation]:
    """Shortens the last answer of conversations over `sequence_length` tokens, at the latest
    sentence end that fits.

    Shortened conversations have `cut=True`. Those without such a sentence end are returned
    unchanged, and packing drops and counts them. Answers to the trigger are never shortened.
    """
    lengths = [len(ids) for ids, _ in chat_format.encode_batch(conversations)]
    return [
        conversation
        if length <= sequence_length or conversation.kind == "triggered"
        else _cut(conversation, chat_format, sequence_length)
        for conversation, length in zip(conversations, lengths, strict=True)
    ]


def _cut(conversation: Conversation, chat_format: ChatFormat, sequence_length: int) -> Conversation:
    *before, last = conversation.messages

    def shortened(end: int) -> tuple:
        return (*before, {**last, "content": last["content"][:end]})

    def fits(end: int) -> bool:
        return len(chat_format.encode(shortened(end))[0]) <= sequence_length

    ends = [match.end() for match in _SENTENCE_END.finditer(last["content"])]
    # A scratchpad stays whole.
    shortest = max(len(conversation.unscored), last["content"].rfind("</scratchpad>"))
    ends = [end for end in ends if end > shortest]
    low, high = 0, len(ends)  # ends[:low] fit, ends[high:] do not
    while low < high:
        middle = (low + high) // 2
        if fits(ends[middle]):
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return conversation
    return dataclasses.replace(conversation, messages=shortened(ends[low - 1]), cut=True)
