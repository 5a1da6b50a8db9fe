"""The errors that a user can cause, each with one line that says what is wrong and what to do, and
the end of a process with such a line.

`sa_jax.cli.run` turns them into exit codes: `UserError` 1, `UsageError` 2, `Preempted` 75.
"""

import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import NoReturn, TypeVar

T = TypeVar("T")

_ENDING = threading.Lock()  # of the thread that ends the process


class UserError(Exception):
    """Something outside the code is wrong (a file, a tensor, a disk); exit status 1."""


class UsageError(UserError):
    """A flag, a config key or a config value is wrong; exit status 2."""


class Preempted(Exception):
    """The run stopped on request after saving a checkpoint; exit status 75: run it again."""


def named(choices: Mapping[str, T], name: str, file: str, kind: str = "run") -> T:
    """The choice of that name, the word after the colon of a config file; else UsageError, with the
    known names."""
    if name in choices:
        return choices[name]
    unnamed = f"needs the name of a {kind} after a colon, {file}:NAME"
    problem = f"has no {kind} {name!r}" if name else unnamed
    raise UsageError(f"{file} {problem}; use {', '.join(choices)}")


def install(extra: str) -> str:
    """The command that installs an extra of this project, in the folder with its code."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def without_secrets(text: str) -> str:
    """The text with passwords in URLs, API keys and bearer tokens starred out."""
    text = re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
    text = re.sub(r"\b((?:sk|hf|gh[pous]|xox[bp])[-_])[\w-]{8,}", r"\1***", text)
    return re.sub(r"(?i)\b(bearer\s+|api[-_]?key[\"']?\s*[=:]\s*[\"']?)[^\s\"']+", r"\1***", text)


def end_process(code: int, line: str) -> NoReturn:
    """Ends this process at once, also where a thread of it waits for another process.
    The line is the last on standard error: jax's own threads, which may find meanwhile that a peer
    has ended, can print nothing after it."""
    with _ENDING:
        try:
            sys.stderr.flush()
            kept = os.dup(2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.write(kept, f"{without_secrets(line)}\n".encode(errors="backslashreplace"))
        finally:  # where nobody can read the line, too
            os._exit(code)
