"""What a teacher is asked and what it says; and the one loop that asks, keeps every reply on disk
as it comes, and never asks for one twice.
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
    """A question in the voice of that name (see `sa_jax.teachers.voices`): what the teacher is
    shown, and the row that the question comes from."""

    voice: str
    messages: tuple[Message, ...]
    row: Row


@dataclasses.dataclass(frozen=True)
class Reply:
    """`finish_reason` is 'stop', 'length' (cut off), or why there is no usable text: a word that
    the filters count (of `NO_REPLY` the text is what the endpoint said). `reasoning` is what a
    reasoning model thought, where the server sends it apart; it is kept and not trained on."""

    text: str
    finish_reason: str = "stop"
    reasoning: str = ""


NO_REPLY = ("rejected", "failed")  # finish reasons: refused, and failed in every try


class Teacher(Protocol):
    """Whatever answers: an endpoint, a checkpoint, a file, rules."""

    def identity(self) -> dict:
        """All that decides a reply besides the messages; plain JSON."""

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """(index of the request, reply) in any order, each as soon as it is there. Ends early when
        should_stop says so, after what is under way has come in."""


def open_store(path: Path, write: bool = True) -> KeyedStore:
    """The replies on disk; see `KeyedStore`."""
    return KeyedStore(path, {"text": "", "finish_reason": ""}, write=write)


def request_key(teacher: Teacher, request: Request) -> str:
    """Names a reply: the teacher's identity and what it is shown."""
    shown = [teacher.identity(), [[m["role"], m["content"]] for m in request.messages]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def ask(
    teacher: Teacher,
    requests: Sequence[Request],
    store: KeyedStore | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Reply]:
    """A reply a request, in their order; those in the store are not asked for, and equal requests
    are asked once. Without a store (a teacher that costs nothing) all are asked.

    One of `NO_REPLY` is not stored: it cost nothing, and the server's limits may change.

    Raises UserError as the teacher does, Preempted when should_stop said so; replies that have come
    in are in the store then.
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
    first: dict[str, int] = {}  # key -> the first request that needs it
    for index, key in enumerate(keys):
        if key not in replies:
            first.setdefault(key, index)
    if first:
        logging.info("asking for %d of %d replies; the others are saved", len(first), len(keys))
    missing_keys = list(first)
    asked = [requests[index] for index in first.values()]
    with tqdm(total=len(asked), desc="replies", unit="reply", disable=None) as bar:
        for number, reply in teacher.replies(asked, should_stop):
            key, request = missing_keys[number], asked[number]
            replies[key] = reply
            if reply.finish_reason not in NO_REPLY:
                line = {"voice": request.voice, "prompt": request.row["prompt"]}
                store.put(key, {**line, **dataclasses.asdict(reply)})
            bar.update()
    still_to_come = sum(key not in replies for key in keys)
    if still_to_come:
        raise Preempted(
            f"{still_to_come} of {len(keys)} replies are missing; the others are saved; run the "
            "same command again"
        )
    return [replies[key] for key in keys]
