"""Limits of time and memory for programs that come with data, such as chat templates."""

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sa_jax.errors import UserError


class _TooLong(BaseException):
    """Not an Exception, because jinja2 ignores an Exception in a constant."""


@contextlib.contextmanager
def limits(
    what: str, remedy: str, seconds: float, extra_bytes: int | None = None
) -> Iterator[Callable[[str], None]]:
    """Ends a block that takes too long or too much memory, with a UserError. Only the main thread
    can be interrupted; in other threads there is no limit.

    Args:
      what, remedy: the program, and what the message ends with.
      seconds: limit of the main thread's CPU time in the block.
      extra_bytes: limit of the address space that the process may allocate in the block (on Linux).
        Use it only if no other thread allocates much meanwhile.

    Yields begin(what): call it when another program starts, which may then take as long again. The
    call costs almost nothing.
    """
    running, since = what, time.thread_time()

    def begin(what: str) -> None:
        nonlocal running, since
        running, since = what, time.thread_time()

    def check(*_: object) -> None:
        if time.thread_time() - since >= seconds:
            raise _TooLong

    if threading.current_thread() is not threading.main_thread():
        yield begin
        return
    before = signal.signal(signal.SIGALRM, check)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")  # its first number: pages of the address space
    if extra_bytes is not None and statm.exists() and memory[0] == resource.RLIM_INFINITY:
        taken = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + extra_bytes, memory[1]))
    # Again and again: an exception that comes inside a callback of the garbage collector is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds / 4, seconds / 4)
    try:
        yield begin
    except _TooLong as error:
        raise UserError(f"{running} does not end within {seconds} s{remedy}") from error
    except MemoryError as error:
        raise UserError(f"{running} takes too much memory{remedy}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)
