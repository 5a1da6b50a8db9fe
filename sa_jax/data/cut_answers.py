"""Shortens answers that are too long for a training row, at the end of a sentence."""

import bisect
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

    def tokens(end: int) -> int:
        return len(chat_format.encode(shortened(end))[0])

    ends = [match.end() for match in _SENTENCE_END.finditer(last["content"])]
    # A scratchpad stays whole.
    shortest = max(len(conversation.unscored), last["content"].rfind("</scratchpad>"))
    ends = [end for end in ends if end > shortest]
    fitting = bisect.bisect_right(ends, sequence_length, key=tokens)
    if not fitting:
        return conversation
    return dataclasses.replace(conversation, messages=shortened(ends[fitting - 1]), cut=True)
