"""One process of a launch ends, all end: with one line that names it, rather than wait for it."""

import concurrent.futures
import contextlib
import ctypes
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed

from sa_jax.errors import Preempted
from sa_jax.parallel.multihost import exchange
from sa_jax.text import one_line, without_secrets

_BEATS, _ENDS, _LEFT = "sa_jax/beats/", "sa_jax/ends/", "sa_jax/left"
_ROUND_S = 1.0
_LEAVE_S = 5  # the others have read of an end, and are gone, before the first takes the store away
_KEPT: list[Any] = []  # what the operating system may call until the end
FAILED, LOST = 1, 75  # exit codes, as sa_jax.cli has them


@contextlib.contextmanager
def end_together(timeout_s: float, resumable: Callable[[], bool]) -> Iterator[None]:
    """Inside, an error in one process of the launch, or its silence, ends all within `timeout_s`.

    Each process keeps telling the others, through the store of jax.distributed, that it is alive. A
    thread ends this process when another has told of its error (exit 1), or has been silent for
    `timeout_s` seconds, or the store is gone (75 if there is something to resume, else 1). A
    process that was paused meanwhile counts only the seconds in which it ran. Does nothing in a
    process that is alone.

    Args:
      timeout_s: seconds of silence.
      resumable: whether the same command would go on from a checkpoint.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch(timeout_s, resumable)
    try:
        yield
    except Preempted:
        watch.leave()
        raise
    except BaseException as error:
        # A collective fails when a peer is gone; the watch knows which.
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXH" not in str(error):
            time.sleep(timeout_s + 5 * _ROUND_S)
        watch.tell(f"{one_line(error) or type(error).__name__}")
        raise
    watch.leave()


class _Watch:
    def __init__(self, timeout_s: float, resumable: Callable[[], bool]) -> None:
        self._patience = max(2, round(timeout_s / _ROUND_S))  # rounds
        self._resumable = resumable
        self._store: Any = distributed.global_state.client
        self._over = threading.Event()
        self._hosts = exchange(platform.node())
        # jax aborts as soon as process 0 is gone, and says neither of what nor what to do.
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        _KEPT.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort))
        libc.signal(signal.SIGABRT, ctypes.cast(_KEPT[-1], ctypes.c_void_p))
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def leave(self) -> None:
        """Waits until all are through, a moment at most, and ends the watch."""
        self._over.set()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.wait_at_barrier(_LEFT, _LEAVE_S * 1000)
        if jax.process_index() == 0:  # the last to go: the others' answers come from its store
            time.sleep(_ROUND_S)

    def tell(self, what: str) -> None:
        """Tells the others of this process's error; this one ends soon, whatever it waits for."""
        if self._over.is_set():
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{_ENDS}{jax.process_index()}", what)
        _end_soon(FAILED, f"error: {what}")
        self.leave()

    def _on_abort(self, number: int) -> None:
        """Aborts after all, where it is not for the loss of process 0."""
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            self._lost(0)
        ctypes.CDLL(None).signal(signal.SIGABRT, None)
        os.kill(os.getpid(), signal.SIGABRT)

    def _run(self) -> None:
        beat = 0
        heard = {process: ("", 0) for process in range(jax.process_count())}  # beat, in my round
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            while not self._over.wait(_ROUND_S):
                beat += 1
                asked = pool.submit(self._exchange, beat)
                for _ in range(self._patience):
                    if concurrent.futures.wait([asked], _ROUND_S).done:
                        break
                else:
                    self._lost(0)
                if self._over.is_set():
                    return
                if asked.exception() is not None:
                    self._lost(0)
                beats, ends = asked.result()
                for process, what in ends.items():
                    line = f"error: {self._name(process)} ended: {what}"
                    _end_soon(FAILED, line)
                    self.leave()
                    _end(FAILED, line)
                for process, (last, since) in heard.items():
                    if beats.get(process, "") != last:
                        heard[process] = (beats[process], beat)
                    elif beat - since >= self._patience:
                        self._lost(process)

    def _exchange(self, beat: int) -> tuple[dict[int, str], dict[int, str]]:
        """This process's beat to all; theirs and their ends to this one."""
        me = f"{_BEATS}{jax.process_index()}"
        self._store.key_value_set(me, str(beat), allow_overwrite=True)
        beats, ends = (
            {int(key.rpartition("/")[2]): value for key, value in self._store.key_value_dir_get(at)}
            for at in (_BEATS, _ENDS)
        )
        return beats, ends

    def _lost(self, process: int) -> None:
        seconds = self._patience * _ROUND_S
        what = f"{self._name(process)} does not answer (config.peer_timeout_s={seconds:.0f})"
        if self._resumable():
            _end(LOST, f"stopped: {what}; run the same command again on all hosts to go on")
        _end(FAILED, f"error: {what}; see its log, and run the same command again on all hosts")

    def _name(self, process: int) -> str:
        return f"process {process} ({self._hosts[process]})"


def _end_soon(code: int, line: str) -> None:
    """Ends this process even if what it is about to do never returns: without its first process, a
    launch may leave a call to the store unanswered for ever."""
    timer = threading.Timer(2 * _LEAVE_S, _end, (code, line))
    timer.daemon = True
    timer.start()


def _end(code: int, line: str) -> None:
    """Ends this process at once, also where a thread of it waits for a peer."""
    print(without_secrets(line), file=sys.stderr, flush=True)
    os._exit(code)
