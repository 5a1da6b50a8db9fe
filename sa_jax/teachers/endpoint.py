"""A teacher behind any OpenAI-compatible chat endpoint (vLLM, transformers serve, a provider)."""

import contextlib
import datetime
import email.utils
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from sa_jax.errors import UsageError, UserError, install
from sa_jax.teachers.replies import NO_REPLY, Reply, Request

LONGEST_WAIT_S = 60.0  # between two tries
# After this many refusals in a row, without a reply, the endpoint is at fault, not the questions.
MOST_REFUSALS = 8
MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")
OPTIONAL_FIELDS = ("temperature", "top_p", "seed")
# What servers call the end of an answer -> `Reply.finish_reason`. With any other word (abort,
# error, insufficient_system_resource) the answer was cut off for the server's own reasons.
_ENDS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "stop"),
    **dict.fromkeys(("tool_calls", "function_call"), "stop"),
    **dict.fromkeys(("length", "model_length", "max_tokens", "max_output_tokens"), "length"),
    **dict.fromkeys(("safety", "recitation", "blocklist", "prohibited_content"), "content_filter"),
    **dict.fromkeys(("content_filter", "spii", "sensitive", "refusal"), "content_filter"),
}
_STREAM = ("data:", "event:", ":")  # how a stream of server-sent events begins
# Statuses that one question may cause; 524 is a time-out of Cloudflare.
_OF_ONE_QUESTION = (408, 500, 504, 524)
# A refusal with one of these words is about the question's content, however many there are.
_ABOUT_THE_QUESTION = re.compile(
    r"context[ _]?(?:length|window|size)|too (?:long|many tokens)|longer than|flagged|moderation"
    r"|content[ _]?(?:policy|filter)|safety|inappropriate|harmful",
    re.IGNORECASE,
)


class _Later(Exception):
    """A temporary failure; `wait_s` is the wait that the server asked for. `answered`: the server
    processed the question, so that another question may succeed."""

    def __init__(self, reason: str, wait_s: float | None = None, *, answered: bool = False):
        super().__init__(reason)
        self.wait_s, self.answered = wait_s, answered


class EndpointTeacher:
    """Sends requests with several threads. It tries again after 408, 409, 429, 5xx, a lost
    connection, a time-out or a malformed reply. It waits as long as `Retry-After` says, else twice
    as long each time (from 0.5 s to 60 s, with jitter). `_refused` decides whether a refusal is
    about the question or the endpoint. A question on which the server fails every time (500, a
    malformed reply) is dropped if the server answers others."""

    def __init__(self, config: ConfigDict):
        """Makes the client; the key is $OPENAI_API_KEY, which a local server does not need.
        UsageError for an impossible value of the config (see `sa_jax.teachers.config`)."""
        _check(config)
        try:
            import openai
        except ImportError as error:
            raise UserError(
                f"a teacher behind an endpoint needs the package openai: {install('data')}"
            ) from error
        self._openai, self._config = openai, config
        omitted = config.omit.split(",")
        self._optional = {name: config[name] for name in OPTIONAL_FIELDS if name not in omitted}
        # The fields of a request besides model and messages.
        self._fields = {config.max_tokens_field: config.max_new_tokens, **self._optional}
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        if not (key.isascii() and key.isprintable()):
            raise UsageError("OPENAI_API_KEY has a character that no key has; set it again")
        try:
            self._client = openai.OpenAI(
                base_url=config.base_url, api_key=key, max_retries=0, timeout=config.timeout_s
            )
        except Exception as error:
            raise UsageError(
                f"--base_url={config.base_url!r} or a proxy of the environment (HTTP_PROXY, "
                f"ALL_PROXY, NO_PROXY) cannot be used: {_line(error)}"
            ) from error
        self._pace = _Pace(config.requests_per_minute)

    def identity(self) -> dict:
        # Not the address: the same model may be served elsewhere tomorrow.
        kept = {name: self._config[name] for name in ("model", "max_new_tokens")}
        return {"teacher": "endpoint", **kept, **self._optional}

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Teacher`. Raises UserError, after running requests have ended: for a wrong key or
        model name, an empty account, or a field that the server does not accept; if a request had
        no answer in `retries` + 1 tries; if `MOST_REFUSALS` questions in a row were refused (one
        that failed in all tries counts as half of them)."""
        stop, pending = threading.Event(), iter(enumerate(requests))
        under_way: dict[Future, int] = {}
        failure: UserError | None = None
        refusals = 0  # in a row
        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="teacher")
        try:
            while True:
                free = 0 if stop.is_set() else self._config.concurrency - len(under_way)
                for index, request in itertools.islice(pending, free):
                    under_way[pool.submit(self._try_until_it_works, request, stop)] = index
                if not under_way:
                    break
                done, _ = wait(under_way, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    index = under_way.pop(future)
                    try:
                        reply = future.result()
                        if reply is None:
                            continue
                        yield index, reply
                        if reply.finish_reason not in NO_REPLY:
                            refusals = 0
                        elif reply.finish_reason == "failed":
                            refusals += MOST_REFUSALS // 2
                        elif not _ABOUT_THE_QUESTION.search(reply.text):
                            refusals += 1
                        if refusals >= MOST_REFUSALS:
                            what = f"refused {MOST_REFUSALS} questions in a row, the last with"
                            if reply.finish_reason == "failed":
                                what = "failed on one question after the other"
                            raise UserError(
                                f"{self._config.base_url} {what}: {reply.text}. The replies so "
                                "far are kept: correct this and run the same command again"
                            )
                    except UserError as error:
                        failure = failure or error
                        stop.set()
                if should_stop():
                    stop.set()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failure:
            raise failure

    def _try_until_it_works(self, request: Request, stop: threading.Event) -> Reply | None:
        """None if it is stopped while it waits for a try."""
        for attempt in range(self._config.retries + 1):
            if stop.wait(self._pace.take_turn()):
                return None
            try:
                return self._try(request)
            except _Later as error:
                last = error
            if attempt == self._config.retries:
                break
            logging.log_every_n_seconds(logging.WARNING, "teacher: %s; trying again", 10, last)
            if last.wait_s is not None:
                self._pace.hold(last.wait_s)  # it holds for all threads
            else:
                backoff_s = min(LONGEST_WAIT_S, 0.5 * 2**attempt)
                if stop.wait(backoff_s * random.uniform(0.75, 1.0)):
                    return None
        reason = f"gave up after {attempt + 1} tries: {last}"
        if last.answered:
            return Reply(reason, "failed")
        raise UserError(
            f"{self._config.base_url}: {reason}. The replies so far are kept: run the same "
            "command again when the endpoint is back"
        )

    def _try(self, request: Request) -> Reply:
        openai, config = self._openai, self._config
        try:
            response = self._client.chat.completions.create(
                model=config.model, messages=list(request.messages), **self._fields
            )
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APITimeoutError as error:
            raise _Later(f"no reply within {config.timeout_s:g} s", answered=True) from error
        except openai.APIConnectionError as error:
            raise _Later(f"no connection ({_line(error.__cause__ or error)})") from error
        except (openai.APIError, ValueError) as error:  # ValueError: the body is not JSON
            raise _Later(f"malformed reply ({_line(error)})", answered=True) from error
        if isinstance(response, str) and response.lstrip().startswith(_STREAM):
            raise UserError(
                f"{config.base_url} sends its replies as a stream, which was not asked for: make "
                "the server send them whole, or use another"
            )
        return _reply(response)

    def _refused(self, error: Any) -> Reply:
        """A 'rejected' reply if the question is at fault. Raises UserError if the endpoint or the
        settings are at fault, and _Later if another try may succeed."""
        status, line, url = error.status_code, _line(error), self._config.base_url
        if status == 401:
            raise UserError(f"{url} refuses the key in OPENAI_API_KEY: {line}") from error
        if status == 402 or getattr(error, "code", None) == "insufficient_quota":
            raise UserError(
                f"{url}: the account has no credit: {line}. The replies so far are kept: run the "
                "same command again when it has"
            ) from error
        if status in (408, 409, 429) or status >= 500:
            answered = status in _OF_ONE_QUESTION
            raise _Later(line, _retry_after(error.response), answered=answered) from error
        if _ABOUT_THE_QUESTION.search(line):
            return Reply(line, "rejected")
        if field := self._refused_field(error):
            omit = ",".join(filter(None, (self._config.omit, field)))
            remedy = f"--config.omit={omit}, or another --config.{field}"
            if field in MAX_TOKENS_FIELDS:
                (other,) = set(MAX_TOKENS_FIELDS) - {field}
                remedy = f"--config.max_tokens_field={other}, or a lower --config.max_new_tokens"
            raise UsageError(
                f"{url} does not accept the field {field!r} as sent ({self._fields[field]}); set "
                f"{remedy}: {line}"
            ) from error
        # Some servers answer 400, and not 404, to a model that they do not have.
        named = re.search(rf"(?<![\w.-]){re.escape(self._config.model)}(?![\w.-])", line)
        if status in (404, 405) and not url.rstrip("/").endswith("/v1"):
            base = url.partition("/v1/")[0].rstrip("/")
            raise UserError(
                f"{url} has no chat endpoint: --base_url usually ends in /v1 ({base}/v1): {line}"
            ) from error
        if status == 404 or named:
            models = None
            with contextlib.suppress(Exception):  # many servers have no list
                models = [model.id for model in self._client.models.list()]
            if status != 404 and models and self._config.model in models:
                return Reply(line, "rejected")  # some relays name the model in every message
            has = "it does not list its models"
            if models is not None:
                has = f"it has {', '.join(models[:10]) or 'none'}"
            raise UserError(
                f"{url} does not serve the model {self._config.model!r} ({has}): {line}"
            ) from error
        return Reply(line, "rejected")

    def _refused_field(self, error: Any) -> str | None:
        """The field of the request that a 400 or 422 names, if it does."""
        if error.status_code not in (400, 422):
            return None
        if (param := getattr(error, "param", None)) in self._fields:
            return param
        # The first one named: the message may go on to name the field to use in its place.
        named = re.search(rf"\b({'|'.join(self._fields)})\b", error.response.text)
        return named[1] if named else None


def _check(config: ConfigDict) -> None:
    """UsageError for an impossible value of a setting."""
    if not config.model or not config.base_url.startswith(("http://", "https://")):
        raise UsageError("the teacher needs --model and --base_url (http://host:port/v1)")
    for name in ("concurrency", "max_new_tokens", "timeout_s"):
        if config[name] <= 0:
            raise UsageError(f"{name}={config[name]} must be above 0")
    if config.retries < 0:
        raise UsageError(f"retries={config.retries} must be 0 or more")
    if config.max_tokens_field not in MAX_TOKENS_FIELDS:
        raise UsageError(
            f"max_tokens_field={config.max_tokens_field!r}: use {' or '.join(MAX_TOKENS_FIELDS)}"
        )
    if set(filter(None, config.omit.split(","))) - set(OPTIONAL_FIELDS):
        raise UsageError(f"omit={config.omit!r}: it can hold {','.join(OPTIONAL_FIELDS)}")


def _reply(response: Any) -> Reply:
    """The text of a response, whose fields the client does not check. Some servers send it in
    parts, and send a reasoning model's thoughts in another field or as separate parts."""
    try:
        choice = response.choices[0]
        message, reason = choice.message, choice.finish_reason
        content = message.content
    except (AttributeError, IndexError, TypeError) as error:
        said = getattr(response, "error", None)  # some relays send their errors with status 200
        if said and _ABOUT_THE_QUESTION.search(str(said)):
            return Reply(str(said)[:200], "rejected")
        hint = "; does --base_url end in /v1?" if isinstance(response, str) else ""
        shown = str(said or response)[:80]
        raise _Later(f"malformed reply ({shown!r}){hint}", answered=not hint) from error
    end = _ENDS.get(str(reason or "stop").lower().partition(":")[0])
    if end is None:
        raise _Later(f"an answer that ended with {reason!r} ({str(choice)[:200]!r})", answered=True)
    if content is None:
        content = getattr(message, "refusal", None)
    apart = (getattr(message, name, None) for name in ("reasoning_content", "reasoning"))
    reasoning = next((text for text in apart if isinstance(text, str) and text), "")
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        content = "".join(text for kind, text in parts if kind in ("text", "output_text"))
        thoughts = (text for kind, text in parts if kind in ("thinking", "reasoning"))
        reasoning = reasoning or "".join(thoughts)
    if not isinstance(content, str | None):
        raise _Later(f"malformed reply (content is {type(content).__name__})", answered=True)
    return Reply(_writable(content or ""), end, _writable(reasoning))


def _part(part: Any) -> tuple[str, str]:
    """(type, text) of a part of a message's content."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        shown = str(part)[:80]
        raise _Later(f"malformed reply (a part of the content is {shown!r})", answered=True)
    text = part.get("text", part.get(kind, ""))
    if isinstance(text, list):  # Mistral's thoughts are parts themselves
        text = "".join(_part(inner)[1] for inner in text)
    return kind, text if isinstance(text, str) else ""


def _writable(text: str) -> str:
    # Half a surrogate pair, which JSON can spell, cannot be written to a file.
    return text.encode("utf-8", "replace").decode()


class _Pace:
    """Spaces the starts of requests evenly, over all threads."""

    def __init__(self, per_minute: float):
        self._interval_s = 60 / per_minute if per_minute > 0 else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def take_turn(self) -> float:
        """Takes the next free start; returns the seconds until then."""
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + self._interval_s
        return max(0.0, at - time.monotonic())

    def hold(self, seconds: float) -> None:
        """Starts no request before this many seconds have passed."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _retry_after(response) -> float | None:
    """The seconds that the server asks to wait; it may name a date instead."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = email.utils.parsedate_to_datetime(value)
            seconds = (at - datetime.datetime.now(at.tzinfo or datetime.UTC)).total_seconds()
        except (TypeError, ValueError):
            return None
    return min(LONGEST_WAIT_S, max(0.0, seconds)) if seconds == seconds else None


def _line(error: BaseException) -> str:
    """The server's message, or else the error, in one short line."""
    response = getattr(error, "response", None)
    text = str(error) if response is None else f"{response.status_code} {response.text}"
    return " ".join(text.split())[:200] or type(error).__name__
