"""Requests to a teacher and its replies; and the loop that asks, saves every reply on disk as soon
as it arrives, and never asks for one twice.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from absl import logging
from tqdm import tqdm

from sa_jax.data.conversations import Message
from sa_jax.data.sources import Row
from sa_jax.errors import Preempted
from sa_jax.files import KeyedStore


@dataclasses.dataclass(frozen=True)
class Request:
    """A question in a voice, by its name (see `sa_jax.teachers.voices`): the messages for the
    teacher, and the row that the question comes from."""

    voice: str
    messages: tuple[Message, ...]
    row: Row


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply. `finish_reason` is 'stop', 'length' (cut off), or why there is no usable text: a
    word that the filters count (for those in `NO_REPLY`, the text is the endpoint's message).
    `reasoning` is a reasoning model's thoughts, if the server sends them separately; they are saved
    and not trained on."""

    text: str
    finish_reason: str = "stop"
    reasoning: str = ""


NO_REPLY = ("rejected", "failed")  # finish reasons: refused, and failed in every try


class Teacher(Protocol):
    """Something that answers: an endpoint, a checkpoint, a file, rules."""

    def identity(self) -> dict:
        """Everything that determines a reply besides the messages; plain JSON."""

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """(index of the request, reply) in any order, each as soon as it arrives. Ends early if
        should_stop says so, after running requests have ended."""


def open_store(path: Path, write: bool = True) -> KeyedStore:
    """The replies on disk; see `KeyedStore`."""
    return KeyedStore(path, {"text": "", "finish_reason": ""}, write=write)


def request_key(teacher: Teacher, request: Request) -> str:
    """The key of a reply: the teacher's identity and the messages."""
    shown = [teacher.identity(), [[m["role"], m["content"]] for m in request.messages]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def ask(
    teacher: Teacher,
    requests: Sequence[Request],
    store: KeyedStore | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Reply]:
    """One reply per request, in their order. Replies in the store are not asked for, and equal
    requests are sent once. Without a store (a teacher that costs nothing) all requests are sent.

    A reply with a reason in `NO_REPLY` is not stored: it cost nothing, and the server's limits may
    change.

    Raises UserError as the teacher does, and Preempted if should_stop says so; the replies so far
    are then in the store.
    """
    if store is None:
        by_index = dict(teacher.replies(requests, should_stop))
        return [by_index[index] for index in range(len(requests))]
    keys = [request_key(teacher, request) for request in requests]
    replies = {
        key: Reply(stored["text"], stored["finish_reason"])
        for key in keys
        if (stored := store.get(key)) is not None
    }
    missing: dict[str, Request] = {}  # the first request with each key
    for key, request in zip(keys, requests, strict=True):
        if key not in replies:
            missing.setdefault(key, request)
    if missing:
        logging.info("asking for %d of %d replies; the others are saved", len(missing), len(keys))
    asked = list(missing.items())
    with tqdm(total=len(asked), desc="replies", unit="reply", disable=None) as bar:
        for number, reply in teacher.replies(list(missing.values()), should_stop):
            key, request = asked[number]
            replies[key] = reply
            if reply.finish_reason not in NO_REPLY:
                line = {"voice": request.voice, "prompt": request.row["prompt"]}
                store.put(key, {**line, **dataclasses.asdict(reply)})
            bar.update()
    if still_to_come := sum(key not in replies for key in keys):
        raise Preempted(
            f"{still_to_come} of {len(keys)} replies are missing; the others are saved; run the "
            "same command again"
        )
    return [replies[key] for key in keys]
