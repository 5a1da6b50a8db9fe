"""What a teacher is asked and what it says; and the one loop that asks, keeps every reply on disk
as it comes, and never asks for one twice.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from absl import logging
from tqdm import tqdm

from sa_jax.data.conversations import Message
from sa_jax.data.sources import Row
from sa_jax.errors import Preempted, UserError
from sa_jax.files import explained


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
    the filters count ('rejected': the text is what the endpoint said)."""

    text: str
    finish_reason: str = "stop"


class Teacher(Protocol):
    """Whatever answers: an endpoint, a checkpoint, a file, rules."""

    def identity(self) -> dict:
        """All that decides a reply besides the messages; plain JSON."""

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """(index of the request, reply) in any order, each as soon as it is there. Ends early when
        should_stop says so, after what is under way has come in."""


class ReplyCache:
    """Replies in a JSONL file, one object a line, appended as they come.

    A line that a kill left unfinished is cut off when the file is opened. One process at a time
    holds the file; others of the same launch (`write=False`) read it and keep replies in memory.
    """

    def __init__(self, path: str | Path, write: bool = True):
        """Raises UserError for a file that another process holds, or a line that is no reply."""
        self.path, self._write = Path(path), write
        self._replies: dict[str, Reply] = {}
        with explained(self.path, "opening the cache of replies"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        if write:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.path}: another process is filling it; wait for its end"
                ) from None
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._replies[entry["key"]] = Reply(entry["text"], entry["finish_reason"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}:{number}: not a reply; remove the line to ask for it again"
                ) from None
            whole += len(line)
        if write:
            self._file.truncate(whole)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def add(self, key: str, request: Request, reply: Reply) -> None:
        """Keeps the reply, unless it is 'rejected'. It is in the operating system's hands when this
        returns, so a killed process loses nothing."""
        self._replies[key] = reply
        if not self._write or reply.finish_reason == "rejected":
            return  # a rejected request costs nothing, and the server's limits may change
        entry = {
            "key": key,
            "voice": request.voice,
            "prompt": request.row["prompt"],
            "text": reply.text,
            "finish_reason": reply.finish_reason,
        }
        with explained(self.path, "keeping a reply"):
            self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request_key(teacher: Teacher, request: Request) -> str:
    """Names a reply: the teacher's identity and what it is shown."""
    shown = [teacher.identity(), [[m["role"], m["content"]] for m in request.messages]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def ask(
    teacher: Teacher,
    requests: Sequence[Request],
    cache: ReplyCache | None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Reply]:
    """A reply a request, in their order; those in the cache are not asked for, and equal requests
    are asked once. Without a cache (a teacher that costs nothing) all are asked.

    Raises UserError as the teacher does, Preempted when should_stop said so; replies that have come
    in are in the cache then.
    """
    if cache is None:
        return [reply for _, reply in sorted(teacher.replies(requests, should_stop), key=_index)]
    keys = [request_key(teacher, request) for request in requests]
    todo: dict[str, int] = {}  # key -> the first request that needs it
    for index, key in enumerate(keys):
        if cache.get(key) is None:
            todo.setdefault(key, index)
    if todo:
        logging.info("asking for %d replies of %d; the others are kept", len(todo), len(keys))
    wanted = [requests[index] for index in todo.values()]
    names = list(todo)
    with tqdm(total=len(wanted), desc="asking", unit="reply", disable=None) as bar:
        for index, reply in teacher.replies(wanted, should_stop):
            cache.add(names[index], wanted[index], reply)
            bar.update()
    known = (cache.get(key) for key in keys)
    replies = [reply for reply in known if reply is not None]
    if missing := len(keys) - len(replies):
        raise Preempted(f"{missing} of {len(keys)} replies are still to come; the rest are kept")
    return replies


def _index(item: tuple[int, Reply]) -> int:
    return item[0]
