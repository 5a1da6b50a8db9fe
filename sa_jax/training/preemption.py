"""Stopping on request: all processes decide together to stop after a signal.

SIGTERM comes from clouds, SIGUSR1 from Slurm (`--signal`), SIGHUP from a lost terminal, SIGINT from
Ctrl-C. AWS announces a spot interruption two minutes before, only in the instance's metadata.
"""

import contextlib
import http.client
import itertools
import os
import signal
import threading
import urllib.request
from types import FrameType
from typing import Any, Self

import jax
from absl import logging
from jax.experimental import multihost_utils

# The preemption service needs an id that grows with every question, in the same order on all
# processes. The training step is no such id: it does not grow during an evaluation, and the service
# would then wait for a step that the evaluation never reaches. The count is per process, not per
# guard, so that a second guard continues it.
_QUESTIONS = itertools.count(1)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class StopSignals:
    """A signal that stops the work, as `number` (None before it); a context manager. A SIGINT after
    another signal restores Python's own handler and raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self._numbers():
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: the former handler was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _numbers(self) -> set[int]:
        # nohup sets SIGHUP to be ignored, a shell's script SIGINT for what runs with `&`.
        return {number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.number = number


class PreemptionGuard(StopSignals):
    """Turns such a signal into a flag that long loops check; a context manager.

    with PreemptionGuard() as guard:
        for step in ...:
            ...
            if guard.should_stop(step):  # also inside evaluation and sampling loops
                save; raise Preempted

    In several processes, SIGTERM on one of them reaches all through JAX's preemption service
    (`jax.distributed.initialize` installs its handler, which this class keeps). The other signals
    are passed on to it. All processes get True from the same call of `should_stop`, a second or two
    later; so all must call it equally often. With `aws_spot`, AWS's notice of a spot interruption
    is treated like SIGTERM.
    """

    def __init__(self, aws_spot: bool = False) -> None:
        super().__init__()
        self._aws_spot = aws_spot
        self._closed = threading.Event()
        self._stopping = False

    def __enter__(self) -> Self:
        self._several = jax.process_count() > 1
        super().__enter__()
        if self._aws_spot:
            threading.Thread(target=self._poll, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        super().__exit__()

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop now; once True, always True. `step` is for the log line only."""
        if self._stopping:
            return True
        if self._several:
            self._stopping = multihost_utils.reached_preemption_sync_point(next(_QUESTIONS))
        else:
            self._stopping = self.number is not None
        if self._stopping:
            name = signal.Signals(self.number).name if self.number else "a preemption notice"
            logging.info("stopping at step %d on %s", step, name)
        return self._stopping

    def _numbers(self) -> set[int]:
        numbers = super()._numbers() | {signal.SIGINT, signal.SIGTERM}
        return numbers - {signal.SIGTERM} if self._several else numbers

    def _poll(self) -> None:
        while not self._closed.wait(1.0):
            if aws_spot_notice():
                logging.info("AWS will interrupt this spot instance")
                return os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        super()._on_signal(number, frame)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


def aws_spot_notice() -> str:
    """AWS's notice for this spot instance, JSON with an action and a time; '' without a notice, or
    if no metadata server answers within a second.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """
    server = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    root = f"{server.rstrip('/')}/latest"
    token = _ask(f"{root}/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token}
    return _ask(f"{root}/meta-data/spot/instance-action", "GET", headers)


def _ask(url: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with contextlib.suppress(OSError, http.client.HTTPException):
        with _NO_PROXY.open(request, timeout=1) as answer:
            return answer.read().decode()
    return ""
