"""Runs each cell in its own process, which starts in a moment.

A server process imports jax, flax, orbax and transformers once, and starts no device. Each cell is
a fork of it that runs a script as `__main__`. If the server ends, for any reason, its cells end
too. The server itself ends with the process that started it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_jax.errors import UserError
from sa_jax.host_memory import keep_freed_memory
from sa_jax.planning.new_process import end_with_parent
from sa_jax.study.claims import hold_lock

BUSY = 76  # exit status: another process, perhaps on another host, works in the cell's folder


@dataclasses.dataclass(frozen=True)
class Order:
    """What the server shall start."""

    argv: Sequence[str]  # a script and its flags
    log: str  # file for what it prints
    lock: str  # the cell's folder of claims, whose lock it holds; if it cannot, it ends with `BUSY`
    # Added to the environment, too late for what jax reads when it is imported.
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cpus: Sequence[int] = ()  # those it may use; (): all
    launch: Sequence[str] = ()  # starts the interpreter, such as srun; without it is a fork


class Server:
    """Starts cells and returns how they ended."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is the runner's to pass on
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def start(self, order: Order) -> int:
        """Starts a script; returns the number of its process and process group."""
        return self._ask(dataclasses.asdict(order))

    def poll(self, pid: int) -> int | None:
        """The exit status (negative: the signal that killed it), or None while it runs."""
        return self._ask({"poll": pid})

    def _ask(self, order: dict[str, Any]) -> Any:
        try:
            print(json.dumps(order), file=self._orders, flush=True)
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError(
                "the process that starts the cells has ended (killed, or out of memory); its cells "
                "ended with it; run the same command again"
            )
        return json.loads(answer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._orders.close()
        self._process.wait()


def _serve() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    keep_freed_memory()  # before imports start threads
    import_for_forks()
    statuses: dict[int, int | None] = {}  # exit status, by a cell's process number; None: it runs
    with contextlib.suppress(BrokenPipeError):  # the runner was killed
        while line := sys.stdin.readline():
            order = json.loads(line)
            if "poll" in order:
                pid = order["poll"]
                if statuses[pid] is None:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    statuses[pid] = os.waitstatus_to_exitcode(status) if done else None
                print(json.dumps(statuses[pid]), file=answers)
                continue
            pid = os.fork()
            if pid == 0:
                answers.close()
                _run(Order(**order))
            with contextlib.suppress(OSError):  # the child does it too: whichever comes first
                os.setpgid(pid, pid)
            statuses[pid] = None  # the system gives a number again, after some 30,000 others
            print(pid, file=answers)
    for pid, ended in statuses.items():
        if ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def import_for_forks() -> None:
    """Imports what most scripts need; no import starts a device, or a thread that a fork would
    miss."""
    import flax.linen  # noqa: F401
    import jax  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import ml_collections.config_flags  # noqa: F401
    import optax  # noqa: F401
    import orbax.checkpoint.experimental.v1  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import sa_jax.study.evaluate
    import sa_jax.training.loop  # noqa: F401


def _run(order: Order) -> None:
    """Runs a cell in a forked process; never returns."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    lock = hold_lock(Path(order.lock))
    if lock is None:
        os._exit(BUSY)
    os.environ.update(order.env)
    if order.cpus and hasattr(os, "sched_setaffinity"):  # macOS has none
        os.sched_setaffinity(0, order.cpus)
    if order.launch:
        command = [*order.launch, sys.executable, *order.argv]
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"error: --launch: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            os._exit(1)
    import runpy

    sys.argv = [*order.argv]
    sys.path[0] = str(Path(order.argv[0]).resolve().parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BrokenPipeError as error:  # which would tell `_serve` that the runner has ended
        raise RuntimeError("a pipe or connection of this cell was closed") from error
    sys.exit(0)


if __name__ == "__main__":
    _serve()
