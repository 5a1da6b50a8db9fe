"""A function in a Python process of its own, for what may end its process: libtpu aborts on some
steps, and on some after others of another TPU generation.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from sa_jax import errors


class ProcessCrash(Exception):
    """The process ended without an answer: it aborted, or was killed as memory ran out."""


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), called in a new process; what it prints goes to standard error.

    The process ends with this one, whatever ends this one.

    Args:
      function: at the top of a module, which the process imports.
      arguments: JSON-able, like what comes back.

    Raises:
      ProcessCrash: the process ended without Python's say.
      UserError: the function's own.
      RuntimeError: anything else, shown on standard error.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    call = [function.__module__, function.__name__, arguments]
    try:
        with contextlib.suppress(BrokenPipeError):  # it has crashed already
            child.stdin.write(json.dumps(call).encode() + b"\n")
            child.stdin.flush()  # and stays open: the child takes its end for ours
        answer = child.stdout.read()
        code = child.wait()
    finally:
        child.kill()
        child.wait()
    if not answer:
        raise ProcessCrash(signal.Signals(-code).name if code < 0 else f"exit status {code}")
    found, error, message = json.loads(answer)
    if error is not None:
        raise getattr(errors, error, RuntimeError)(message)
    return found


def main() -> None:
    """Reads a call from standard input and writes its outcome to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C's one line is the caller's to print
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        module, name, arguments = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_caller, daemon=True).start()
        found = getattr(importlib.import_module(module), name)(*arguments)
        answer = json.dumps([found, None, None])
    except errors.UserError as error:
        answer = json.dumps([None, type(error).__name__, str(error)])
    except Exception:
        traceback.print_exc()
        answer = json.dumps([None, "", "the process failed: its error is above"])
    with output:
        output.write(answer.encode())


def _end_with_caller() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
