"""Calls a function that may crash in a new Python process: libtpu aborts on some steps, and on some
others after it has compiled for another TPU generation.
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
    """The process ended without an answer: it aborted, or was killed when memory ran out."""


def call_in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), called in a new process, which prints to standard error.

    When this process ends, for any reason, the new one ends too.

    Args:
      function: defined at the top level of a module, which the new process imports.
      arguments: JSON-able, as is the result.

    Raises:
      ProcessCrash: the process crashed or was killed.
      UserError: the function raised it.
      RuntimeError: the function raised something else; its traceback is on standard error.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None  # both are pipes
    call = [function.__module__, function.__name__, arguments]
    try:
        with contextlib.suppress(BrokenPipeError):  # it has crashed already
            child.stdin.write(json.dumps(call).encode() + b"\n")
            child.stdin.flush()  # and stays open: the child exits when it is closed
        answer = child.stdout.read()
        code = child.wait()
    finally:
        child.kill()
        child.wait()
    if not answer:
        raise ProcessCrash(signal.Signals(-code).name if code < 0 else f"exit status {code}")
    result, error, message = json.loads(answer)
    if error is not None:
        raise getattr(errors, error, RuntimeError)(message)
    return result


def main() -> None:
    """Reads a call from standard input and writes its outcome to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the caller reports a Ctrl-C
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it may crash
    try:
        module, name, arguments = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_exit_with_caller, daemon=True).start()
        result = getattr(importlib.import_module(module), name)(*arguments)
        answer = json.dumps([result, None, None])
    except errors.UserError as error:
        answer = json.dumps([None, type(error).__name__, str(error)])
    except Exception:
        traceback.print_exc()
        answer = json.dumps([None, "", "the process failed: its error is above"])
    with output:
        output.write(answer.encode())
    sys.stderr.flush()
    os._exit(0)  # at its own end the interpreter would wait for the thread that reads stdin


def _exit_with_caller() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
