"""A function in a Python process of its own, for what may end its process: libtpu aborts on some
steps, and on some after others of another TPU generation.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from sa_jax.errors import UserError


class ProcessCrash(Exception):
    """The process ended without an answer: it aborted, or was killed as memory ran out."""


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), called in a new process; what it prints goes to standard error.

    The process ends with this one, whatever ends this one.

    Args:
      function: of a module, so that the process can import it.
      arguments: picklable, like what comes back.

    Raises:
      ProcessCrash: the process ended without Python's say.
      UserError: the function's own.
      RuntimeError: anything else, shown on standard error.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        pickle.dump((function, arguments), child.stdin)
        child.stdin.flush()  # and stays open: the child takes its end for ours
        answer = child.stdout.read()
        code = child.wait()
    except BrokenPipeError:
        answer, code = b"", child.wait()
    finally:
        child.kill()
        child.wait()
    if not answer:
        raise ProcessCrash(signal.Signals(-code).name if code < 0 else f"exit status {code}")
    found, error = pickle.loads(answer)
    if error is not None:
        raise error
    return found


def main() -> None:
    """Reads a call from standard input and writes its outcome to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C's one line is the caller's to print
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        function, arguments = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_end_with_caller, daemon=True).start()
        answer = pickle.dumps((function(*arguments), None))
    except UserError as error:
        answer = pickle.dumps((None, error))
    except Exception:
        traceback.print_exc()
        answer = pickle.dumps((None, RuntimeError("the process failed: its error is above")))
    with output:
        output.write(answer)


def _end_with_caller() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
