"""If one process of a launch ends, all end, with one line that names it; none waits for it."""

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import platform
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # no public name for its store of keys; Orbax uses it alike

from sa_jax.errors import Preempted, UserError, end_process
from sa_jax.text import one_line

_NOTES = "sa_jax/peers/"
_ROUND_S = 1.0
_FAILED, _LOST = 1, 75  # exit codes, as sa_jax.cli has them
# How an error of XLA begins that the loss of a peer may have caused, whatever its Python type.
_OF_A_PEER = re.compile(
    r"(Unable to initialize backend '\w+': )?"
    "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS"
    "|FAILED_PRECONDITION):"
)
_WATCHES: list["_Peers"] = []  # of this process: one while it has peers


@contextlib.contextmanager
def start_within(timeout_s: float) -> Iterator[None]:
    """A context for jax.distributed.initialize, which waits until all processes have called it.

    Ends this process with one line and exit 1 after `timeout_s` seconds.
    """
    started = threading.Event()

    def watch() -> None:
        if started.wait(timeout_s):
            return
        # The first process, which the others ask, ends last.
        if distributed.global_state.service is not None and started.wait(5 * _ROUND_S):
            return
        address = distributed.global_state.coordinator_address  # None: not known yet
        where = f" at {address}" if address else ""
        end_process(
            _FAILED,
            f"error: not all processes joined{where} within {timeout_s:.0f} s "
            "(config.start_timeout_s of a run). Start the same command on every host, check that "
            "each can reach the first one's address and port (JAX_COORDINATOR_ADDRESS), and see "
            "the other logs",
        )

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        started.set()


@contextlib.contextmanager
def end_together(
    timeout_s: float, resumable: Callable[[], bool], open_devices: Callable[[], object]
) -> Iterator[None]:
    """A context in which an error or the silence of one process ends all within `timeout_s`.

    Once a second, each process writes a note to the store of jax.distributed, which process 0
    keeps, and reads the notes of the others. A process ends when another's note reports an error
    (exit 1), when a note has not changed for `timeout_s` seconds, or when the store is gone (exit
    75 if there is something to resume, else 1). The first process that sees a loss notes it, so
    that all name the same one. A process that was paused counts only the seconds in which it ran.
    Does nothing for a single process.

    Args:
      resumable: whether the same command would resume from a checkpoint.
      open_devices: called before the body. Meanwhile a process may be silent three times as long,
        because loading a backend may keep Python's lock.
    """
    if distributed.global_state.num_processes == 1:
        open_devices()
        yield
        return
    peers = _Peers(timeout_s, resumable)
    _WATCHES.append(peers)
    try:
        # Every process is heard first, so that one that falls silent can be named.
        peers.all_heard.wait(peers.patience_s)
        open_devices()
        peers.devices_are_open()
        yield
    except Preempted:
        peers.leave()
        raise
    except BaseException as error:
        if _OF_A_PEER.match(str(error)):
            time.sleep(peers.patience_s + 5 * _ROUND_S)  # a lost peer is found, and ends this
        of_user = isinstance(error, UserError)
        what = one_line(error if of_user else f"{type(error).__name__}: {error}")
        # What is closed on the way out may wait for a peer, which has ended.
        line = f"error: {what}" if of_user else traceback.format_exc()
        ending = threading.Timer(10 + timeout_s, end_process, (_FAILED, line))
        ending.daemon = True
        ending.start()
        peers.end_others(what)
        raise
    finally:
        _WATCHES.remove(peers)
    peers.leave()
    exits = threading.Event()
    threading.Thread(target=_exit_in_time, args=(exits, timeout_s), daemon=True).start()
    atexit.register(exits.set)


def _exit_in_time(exits: threading.Event, timeout_s: float) -> None:
    """Ends a process that is done: its jax would wait 100 s for a peer that was killed since."""
    exits.wait()
    time.sleep(timeout_s)
    os._exit(0)


class _Peers:
    """Two threads: one reads and writes the store, which may never answer; one counts seconds."""

    def __init__(self, timeout_s: float, resumable: Callable[[], bool]) -> None:
        self._timeout_s = timeout_s
        self._patience = 3 * max(2, round(timeout_s / _ROUND_S))  # rounds
        self._resumable = resumable
        self._me = distributed.global_state.process_id
        # `line` and `code`: how all processes end.
        self._note: dict[str, Any] = {
            "host": platform.node(),
            "beat": 0,
            "line": "",
            "code": 0,
            "left": False,
        }
        self._notes: dict[int, dict[str, Any]] = {}
        self._lost: set[int] = set()
        self._round = 0
        # In which round.
        self._heard = dict.fromkeys(range(distributed.global_state.num_processes), 0)
        self.all_heard = threading.Event()
        self._leaving = threading.Event()
        self._may_leave = threading.Event()
        _delay_aborts()
        for target in (self._talk, self._count):
            threading.Thread(target=target, daemon=True).start()

    @property
    def patience_s(self) -> float:
        return self._patience * _ROUND_S

    def devices_are_open(self) -> None:
        _delay_aborts()  # a backend may have a handler of its own
        for process in self._heard:
            self._heard[process] = self._round
        self._patience //= 3

    def leave(self, line: str = "", code: int = 0, stacks: bool = False) -> None:
        """Ends the watch; with a line, the other processes end too, with this line and code.

        Process 0 waits for them, because its store ends with it.
        """
        self._leaving.set()
        self._note |= {"line": line, "code": code, "stacks": stacks, "left": True}
        deadline = time.monotonic() + self.patience_s
        while not self._may_leave.wait(_ROUND_S) and time.monotonic() < deadline:
            # Process 0 may have read this note, and ended before its store could answer.
            if self._me != 0 and _store_gone():
                return

    def end_others(self, what: str, stacks: bool = False) -> None:
        """Leaves because of an error in this process."""
        self.leave(f"error: {self._name(self._me)} ended: {what}", _FAILED, stacks)

    def _talk(self) -> None:
        store: Any = distributed.global_state.client
        pause_s = 0.0  # the first beat at once
        while not self._may_leave.wait(pause_s):
            pause_s = _ROUND_S / 2
            self._note["beat"] += 1
            sent = dict(self._note)
            try:
                store.key_value_set(f"{_NOTES}{self._me}", json.dumps(sent), allow_overwrite=True)
                entries = store.key_value_dir_get(_NOTES)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is silent, or was for a moment
            for key, text in entries:
                process, note = int(key.rpartition("/")[2]), json.loads(text)
                if note != self._notes.get(process):
                    self._notes[process], self._heard[process] = note, self._round
            if self._notes.keys() == self._heard.keys():
                self.all_heard.set()
            left = {process for process, note in self._notes.items() if note["left"]}
            others_left = left | self._lost | {self._me} == self._heard.keys()
            if sent["left"] and (self._me != 0 or others_left):
                self._may_leave.set()

    def _count(self) -> None:
        while not self._leaving.wait(_ROUND_S):
            self._round += 1
            for process, note in dict(self._notes).items():
                if note["line"] and process != self._me:
                    if note["stacks"]:
                        faulthandler.dump_traceback()
                    self.leave()
                    end_process(note["code"], note["line"])
            unheard = {
                process: self._round - heard
                for process, heard in self._heard.items()
                if not self._notes.get(process, {}).get("left")
            }
            # Where its own note does not come back, the store is silent.
            silence = unheard.get(self._me, 0)
            if silence >= self._patience or (silence > 1 and _store_gone()):
                self._end_without(0)
            if silence > 1:
                continue  # while the store is silent, nothing is known of the others
            self._lost = {
                process for process, rounds in unheard.items() if rounds >= self._patience
            }
            for process in self._lost:
                self._end_without(process)

    def _end_without(self, process: int) -> None:
        setting = f"config.peer_timeout_s={self._timeout_s:.0f}"
        what = f"{self._name(process)} does not answer ({setting})"
        try:
            resumable = self._resumable()
        except OSError:  # the lost host may have served the run folder
            resumable = False
        code, kind = (_LOST, "stopped") if resumable else (_FAILED, "error")
        line = f"{kind}: {what}; see its log, and run the same command again on all hosts"
        if process != 0:
            self.leave(line, code)
            end_process(code, line)
        # It kept the notes. jax has printed how it lost it, and would abort.
        end_process(code, f"{line} (a stack trace above is jax's, of the same loss)")

    def _name(self, process: int) -> str:
        unheard = {0: distributed.global_state.coordinator_address, self._me: platform.node()}
        note = self._notes.get(process) or {"host": unheard.get(process, "not heard yet")}
        return f"process {process} ({note['host']})"


def _delay_aborts() -> None:
    """Lets every abort of this process sleep for 6 s first.

    When process 0 is gone, jax aborts, and says neither which host failed nor what to do; the
    watches here find the loss before. 6 is the number of SIGABRT. The handler is not Python,
    because the aborting thread may never get Python's lock. It stays after the end, because process
    0 may end a moment before the others.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _store_gone() -> bool:
    """Whether nothing listens any more at the address of process 0's store."""
    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ROUND_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # slow to answer, which is not gone
        return False
    return False


def end_all(what: str) -> NoReturn:
    """Ends this process and the others of its launch with an error, after the stacks of all their
    threads."""
    faulthandler.dump_traceback()
    for peers in _WATCHES:
        peers.end_others(what, stacks=True)
    end_process(_FAILED, f"error: {what}")
