"""A teacher behind any OpenAI-compatible chat endpoint (vLLM, transformers serve, a provider)."""

import dataclasses
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from absl import logging

from sa_jax.errors import UsageError, UserError
from sa_jax.teachers.replies import Reply, Request

LONGEST_WAIT_S = 60.0  # between two tries


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """How to ask.

    Attributes:
      model: its name at the endpoint.
      base_url: ends in /v1.
      max_new_tokens, temperature, top_p, seed: sent with every request.
      concurrency: requests under way at once.
      requests_per_minute: at most; 0: no limit.
      retries: further tries of a request that failed in a way that may pass.
      timeout_s: for one reply; one that takes longer counts as failed (and may be paid for).
    """

    model: str
    base_url: str
    max_new_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0
    concurrency: int = 16
    requests_per_minute: float = 0
    retries: int = 8
    timeout_s: float = 600.0

    def __post_init__(self):
        if not self.model or not self.base_url.startswith(("http://", "https://")):
            raise UsageError("the teacher needs --model and --base_url (http://host:port/v1)")
        for name in ("concurrency", "max_new_tokens", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)} must be above 0")
        if self.retries < 0:
            raise UsageError(f"retries={self.retries} must be 0 or more")


class _Later(Exception):
    """A try failed in a way that may pass; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class _Stopped(Exception):
    """Told to stop while it waited for its next try."""


class EndpointTeacher:
    """Asks with several threads; tries again after 408, 409, 429, 5xx, a lost connection, a
    time-out or a malformed reply, waiting as long as `Retry-After` says, else twice as long each
    time (from 0.5 s to 60 s, with jitter)."""

    def __init__(self, settings: EndpointSettings):
        """Makes the client; the key is $OPENAI_API_KEY, which a local server does not need."""
        self._openai = _openai()
        self._settings = settings
        self._client = self._openai.OpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=0,
            timeout=settings.timeout_s,
        )
        self._pace = _Pace(settings.requests_per_minute)

    def identity(self) -> dict:
        # Not the address: the same model may be served elsewhere tomorrow.
        names = ("model", "max_new_tokens", "temperature", "top_p", "seed")
        return {"teacher": "endpoint", **{name: getattr(self._settings, name) for name in names}}

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        """See `Teacher`. Raises UserError, after what was under way has come in, for a wrong key or
        model name, or when a request failed `retries` + 1 times."""
        stop, pending = threading.Event(), iter(enumerate(requests))
        under_way: dict[Future, int] = {}
        failure: Exception | None = None
        pool = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="teacher")
        try:
            while True:
                while failure is None and not stop.is_set():
                    if len(under_way) >= self._settings.concurrency:
                        break
                    if (numbered := next(pending, None)) is None:
                        break
                    index, request = numbered
                    under_way[pool.submit(self._try_until_it_works, request, stop)] = index
                if not under_way:
                    break
                done, _ = wait(under_way, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    index = under_way.pop(future)
                    try:
                        yield index, future.result()
                    except _Stopped:
                        pass
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

    def _try_until_it_works(self, request: Request, stop: threading.Event) -> Reply:
        for attempt in range(self._settings.retries + 1):
            self._pace.wait(stop)
            try:
                return self._try(request)
            except _Later as error:
                reason, asked_s = str(error), error.wait_s
            if attempt == self._settings.retries:
                break
            logging.log_every_n_seconds(logging.WARNING, "teacher: %s; trying again", 10, reason)
            if asked_s is not None:
                self._pace.hold(asked_s)  # it holds for all threads
            else:
                backoff_s = min(LONGEST_WAIT_S, 0.5 * 2**attempt)
                if stop.wait(backoff_s * random.uniform(0.75, 1.0)):
                    raise _Stopped
        raise UserError(
            f"{self._settings.base_url}: gave up after {attempt + 1} tries: {reason}. The replies "
            "so far are kept: run the same command again when the endpoint is back"
        )

    def _try(self, request: Request) -> Reply:
        openai, settings = self._openai, self._settings
        try:
            response = self._client.chat.completions.create(
                model=settings.model,
                messages=list(request.messages),
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(
                f"{settings.base_url} refuses the key in OPENAI_API_KEY: {_line(error)}"
            ) from error
        except openai.RateLimitError as error:
            if getattr(error, "code", None) == "insufficient_quota":
                raise UserError(f"{settings.base_url}: {_line(error)}") from error
            raise _Later(_line(error), _retry_after(error.response)) from error
        except (openai.ConflictError, openai.InternalServerError) as error:
            raise _Later(_line(error), _retry_after(error.response)) from error
        except openai.APIStatusError as error:
            if error.status_code == 408:
                raise _Later(_line(error)) from error
            # Some servers answer 400, and not 404, to a model that they do not have.
            named = re.search(rf"(?<![\w.-]){re.escape(settings.model)}(?![\w.-])", _line(error))
            if error.status_code == 404 or named:
                raise UserError(
                    f"{settings.base_url} does not serve the model {settings.model!r} "
                    f"({self._models()}): {_line(error)}"
                ) from error
            return Reply(_line(error), "rejected")
        except openai.APITimeoutError as error:
            raise _Later(f"no reply within {settings.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            raise _Later(f"no connection ({_line(error.__cause__ or error)})") from error
        except (openai.APIError, ValueError) as error:  # ValueError: the body is not JSON
            raise _Later(f"malformed reply ({_line(error)})") from error
        return _reply(response)

    def _models(self) -> str:
        try:
            names = [model.id for model in self._client.models.list()]
        except Exception:  # it only helps the message
            return "it does not list its models"
        return f"it has {', '.join(names[:10]) or 'none'}"


def _reply(response: Any) -> Reply:
    """The text of a response, whose fields the client does not check."""
    try:
        choice = response.choices[0]
        text, reason = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError) as error:
        raise _Later(f"malformed reply ({str(response)[:80]!r})") from error
    if text is not None and not isinstance(text, str):
        raise _Later(f"malformed reply (content is {type(text).__name__})")
    known = {"length": "length", "content_filter": "content_filter"}
    # Half a surrogate pair, which JSON can spell, cannot be written to a file.
    text = (text or "").encode("utf-8", "replace").decode()
    return Reply(text, known.get(reason, "stop"))


class _Pace:
    """Spaces the starts of requests evenly, over all threads."""

    def __init__(self, per_minute: float):
        self._interval_s = 60 / per_minute if per_minute > 0 else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + self._interval_s
        if stop.wait(max(0.0, at - time.monotonic())):
            raise _Stopped

    def hold(self, seconds: float) -> None:
        """No request starts before that many seconds have passed."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _retry_after(response) -> float | None:
    try:
        return min(LONGEST_WAIT_S, max(0.0, float(response.headers["retry-after"])))
    except (KeyError, ValueError):
        return None


def _line(error: BaseException) -> str:
    """What the server said, or else the error, in one short line."""
    response = getattr(error, "response", None)
    text = str(error) if response is None else f"{response.status_code} {response.text}"
    return " ".join(text.split())[:200] or type(error).__name__


def _openai():
    try:
        import openai
    except ImportError as error:
        raise UserError(
            "a teacher behind an endpoint needs the package openai: pip install 'sa_jax[data]'"
        ) from error
    return openai
