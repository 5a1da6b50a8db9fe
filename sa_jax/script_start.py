"""What each script does before its imports: a signal ends it, on CPU it keeps freed memory, and on
a GPU it takes most of the memory.

A signal ends the process at once, with one line and exit status 130. Training, evals and generation
install their own handlers as soon as they have something to save (`training.preemption`); a study
does so while its cells run. The signals are the four that stop a run: SIGTERM, SIGINT, SIGUSR1 and
SIGHUP, if not ignored. A thread ends the process, because the main thread may be inside a compiler
or wait for other hosts for minutes, and Python runs signal handlers only between two instructions
of the main thread.
"""

import os
import signal
import threading
from types import FrameType

from sa_jax.host_memory import keep_freed_memory, use_most_of_a_gpu

EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Python writes the signal's number into the pipe of `_end_at_signal`, as it has a handler."""


def _end_at_signal(pipe: int) -> None:
    while True:
        number = os.read(pipe, 1)[0]
        if signal.getsignal(number) is _leave_to_thread:
            line = f"stopped: by {signal.Signals(number).name}; run the same command again\n"
            os.write(2, line.encode())
            os._exit(EXIT_INTERRUPTED)


def _restore_in_child() -> None:
    """A fork has no such thread, and its signals would end the parent."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _leave_to_thread:
            signal.signal(number, signal.SIG_DFL)


def _install() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_end_at_signal, args=(read,), daemon=True).start()
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_restore_in_child)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(number, _leave_to_thread)


use_most_of_a_gpu()
keep_freed_memory()  # before there is a thread
_install()
