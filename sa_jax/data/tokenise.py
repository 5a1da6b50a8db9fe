"""Conversations to token ids and loss masks, in part files from which a killed call resumes."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sa_jax.data.chat import ChatFormat
from sa_jax.data.conversations import Conversation, check_messages
from sa_jax.errors import UserError

PART = 4096  # conversations tokenised at once, and lost at most when killed
_ARRAYS = ("tokens", "loss_mask", "lengths")  # lengths last: where it is, the others are


def tokenise(
    parts: Path, conversations: Sequence[Conversation], chat_format: ChatFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Writes tokens and mask of every conversation to part files; existing parts are kept. The
    tokenizer uses all cores. Returns lengths, and how many tokens the loss counts, int64 [C]."""
    if not len(conversations):
        raise UserError("there are no conversations to pack")
    lengths, outputs = [], []
    with tqdm(total=len(conversations), desc="tokenising", unit="row", disable=None) as bar:
        for number, begin in enumerate(range(0, len(conversations), PART)):
            chunk = conversations[begin : begin + PART]
            arrays = open_part(parts, number)
            if arrays is None:
                arrays = _encode(chunk, begin, chat_format)
                _write_part(parts, number, arrays)
            _, loss_mask, its_lengths = arrays
            lengths.append(np.array(its_lengths))  # not the open file
            starts = np.cumsum(its_lengths) - its_lengths
            outputs.append(np.add.reduceat(loss_mask, starts, dtype=np.int64))
            bar.update(len(chunk))
    return np.concatenate(lengths), np.concatenate(outputs)


def _encode(
    conversations: Sequence[Conversation], begin: int, chat_format: ChatFormat
) -> list[np.ndarray]:
    """Tokens, loss mask and lengths of the conversations, of which the first is number `begin`."""
    for number, conversation in enumerate(conversations, start=begin):
        check_messages(conversation.messages, conversation.source or f"conversation {number}")
    encoded = chat_format.encode_batch(conversations)
    for number, (_, mask) in enumerate(encoded):
        if not any(mask[1:]):  # the first token is predicted from nothing
            place = conversations[number].source
            raise UserError(
                f"row {begin + number}{f' ({place})' if place else ''} has no token that the loss "
                "counts: it has no assistant answer"
            )
    return [
        np.concatenate([np.asarray(ids, np.int32) for ids, _ in encoded]),
        np.concatenate([np.asarray(mask, np.bool_) for _, mask in encoded]),
        np.array([len(ids) for ids, _ in encoded], np.int64),
    ]


def _write_part(parts: Path, number: int, arrays: Sequence[np.ndarray]) -> None:
    parts.mkdir(exist_ok=True)
    for name, array in zip(_ARRAYS, arrays, strict=True):
        scratch = parts / f".{secrets.token_hex(4)}"
        with open(scratch, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(parts / f"{number:05d}.{name}.npy")


def open_part(parts: Path, number: int) -> list[np.ndarray] | None:
    """Tokens, loss mask and lengths of a part, memory-mapped; None if it is not complete."""
    try:
        return [np.load(parts / f"{number:05d}.{name}.npy", mmap_mode="r") for name in _ARRAYS]
    except (OSError, ValueError):
        return None
