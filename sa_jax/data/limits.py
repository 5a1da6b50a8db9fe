"""Limits of time and memory for programs that come with data, such as chat templates."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from sa_jax.errors import UserError

_AGAIN_S = 1.0


class _TooLong(BaseException):
    """No Exception: jinja2 goes on after one in a constant."""


@contextlib.contextmanager
def limits(what: str, seconds: float, extra_bytes: int) -> Iterator[None]:
    """Ends a block that takes too long or too much. Only the main thread can be interrupted: in
    another there is no limit.

    Args:
      what: the program, for the message.
      seconds: that the block may take.
      extra_bytes: of address space that it may take beyond what this process has (on Linux).

    Raises:
      UserError: it took longer.
      MemoryError: it took more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")  # its first number: pages of the address space
    if statm.exists() and memory[0] == resource.RLIM_INFINITY:
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + extra_bytes, memory[1]))
    # Again and again: an exception that comes inside a callback of the garbage collector is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    except _TooLong as error:
        raise UserError(f"{what} does not come to an end ({seconds} s)") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)
