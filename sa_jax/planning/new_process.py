"""Calls a function that may crash in a new Python process: libtpu aborts on some steps, and on some
others after it has compiled for another TPU generation.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from sa_jax import errors

_PR_SET_PDEATHSIG = 1


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
    call = [function.__module__, function.__name__, arguments]
    command = [sys.executable, "-m", __name__]
    child = subprocess.run(command, input=json.dumps(call).encode(), stdout=subprocess.PIPE)
    if not child.stdout:
        code = child.returncode
        raise ProcessCrash(signal.Signals(-code).name if code < 0 else f"exit status {code}")
    result, error, message = json.loads(child.stdout)
    if error is not None:
        raise getattr(errors, error, RuntimeError)(message)
    return result


def end_with_parent() -> None:
    """Asks the kernel (Linux) for SIGKILL when the parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Reads a call from standard input and writes its outcome to standard output."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the caller reports a Ctrl-C
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it may crash
    try:
        module, name, arguments = json.loads(sys.stdin.buffer.read())
        result = getattr(importlib.import_module(module), name)(*arguments)
        answer = json.dumps([result, None, None])
    except errors.UserError as error:
        answer = json.dumps([None, type(error).__name__, str(error)])
    except Exception:
        traceback.print_exc()
        answer = json.dumps([None, "", "the process failed: its error is above"])
    with output:
        output.write(answer.encode())
    os._exit(0)  # a compiler may crash, or take its time, when it is closed


if __name__ == "__main__":
    main()
