"""Shows the progress of a study: one line, `status.json`, and the list at the end."""

import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging
from tqdm import tqdm

from sa_jax.errors import UserError
from sa_jax.files import atomic_write
from sa_jax.study.claims import Latest, LatestClaim
from sa_jax.study.folder import STATUS_FILE
from sa_jax.study.grid import Cell
from sa_jax.text import cut, one_line

DONE = ("done", "skipped")
ENDED = (*DONE, "failed", "blocked")


class Progress:
    """Shows the states of a study's cells whenever they change, and at a terminal every second."""

    def __init__(self, workdir: Path, cells: Sequence[Cell]):
        self._workdir, self._cells = workdir, cells
        self._line, self._time, self._warned = "", 0.0, False
        self._terminal = sys.stderr.isatty()

    def show(self, states: Mapping[str, str], latest: Latest, logs: Mapping[str, Path]) -> None:
        """Shows the states; `logs` are those of the cells that this process runs."""
        counts = count(states)
        eta = time_left(self._cells, states, latest)
        blocked = f"{counts['blocked']} blocked, " if counts["blocked"] else ""
        time_to_go = f"about {tqdm.format_interval(eta)}" if math.isfinite(eta) else "unknown time"
        line = (
            f"{counts['done']} done, {counts['running']} running, {counts['failed']} failed, "
            f"{blocked}{counts['left']} left, {time_to_go} to go"
        )
        now = time.monotonic()
        changed = line.rpartition(",")[0] != self._line.rpartition(",")[0]
        if changed or now - self._time > 10:
            self._write_status(states, latest, counts, eta)
            self._line, self._time = line, now
        if self._terminal:
            tail = "; ".join(f"{name}: {_last_line(log)}" for name, log in logs.items())
            self._overwrite(f"{line} | {tail}")
        elif changed:
            logging.info("%s (%s)", line, ", ".join(logs) or "waiting")

    def say(self, text: str) -> None:
        """Prints a line that is not overwritten."""
        self.clear()
        logging.info("%s", text)

    def clear(self) -> None:
        """Removes the line from a terminal."""
        if self._terminal:
            self._overwrite("")

    def _overwrite(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal was closed
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            print(f"\r\033[K{cut(text, width)[0]}", end="", file=sys.stderr, flush=True)

    def _write_status(
        self, states: Mapping[str, str], latest: Latest, counts: Mapping[str, int], eta: float
    ) -> None:
        status = {
            **counts,
            "seconds_left": round(eta) if math.isfinite(eta) else None,
            "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "cells": {name: _entry(state, latest[name]) for name, state in states.items()},
        }
        try:
            atomic_write(self._workdir / STATUS_FILE, json.dumps(status, indent=1) + "\n")
            self._warned = False
        except (OSError, UserError) as error:  # it only says what the claims say
            if not self._warned:
                self.say(f"trouble  {STATUS_FILE} cannot be written: {one_line(error)}")
            self._warned = True


def count(states: Mapping[str, str]) -> dict[str, int]:
    """Numbers of cells: done or skipped, running, failed, blocked by a failed one, left."""
    numbers = Counter(states.values())
    counts = {"done": sum(numbers[state] for state in DONE)}
    counts |= {state: numbers[state] for state in ("running", "failed", "blocked")}
    return counts | {"left": len(states) - sum(counts.values())}


def _entry(state: str, newest: LatestClaim) -> dict[str, object]:
    """The entry of a cell in status.json."""
    if state == "running" and newest.owner is not None:
        host = newest.owner.host.split()[0]
        return {"state": state, "host": host, "pid": newest.owner.pid}
    ended = (newest.outcome or {}) if state in (*DONE, "failed") else {}
    return {"state": state, **{k: ended[k] for k in ("line", "log", "seconds") if ended.get(k)}}


def time_left(cells: Sequence[Cell], states: Mapping[str, str], latest: Latest) -> float:
    """Seconds until everything is done, from the mean time of each stage's finished cells; for a
    stage without one, from all finished cells, or those that train if it trains. Infinite where
    there is none."""
    took: dict[str, list[float]] = {}
    trained: list[float] = []
    for cell in cells:
        outcome = latest[cell.name].outcome
        if states[cell.name] == "done" and outcome is not None:
            seconds = float(outcome.get("seconds", 0))
            took.setdefault(cell.stage.name, []).append(seconds)
            if cell.is_training:
                trained.append(seconds)
    everything = [*itertools.chain(*took.values())]
    running = sum(state == "running" for state in states.values())
    total = 0.0
    for cell in cells:
        if (state := states[cell.name]) not in ENDED:
            times = took.get(cell.stage.name, trained if cell.is_training else everything)
            mean = statistics.fmean(times) if times else math.inf
            total += mean * (0.5 if state == "running" else 1.0)
    return total / max(1, running)


def _last_line(log: Path) -> str:
    """The last line that a cell printed, without absl's prefix."""
    lines = _tail(log)
    return one_line(lines[-1].partition("] ")[2] or lines[-1]) if lines else "starting"


def why_failed(log: Path, status: int) -> str:
    """One line: the cell's error, or the signal that ended it."""
    if status == -signal.SIGKILL:
        return "killed (SIGKILL): most often the kernel, because the machine's memory ran out"
    lines = _tail(log)
    if said := [line for line in lines if line.startswith("error: ")]:
        return one_line(said[-1].removeprefix("error: "))
    last = f": {one_line(lines[-1])}" if lines else ""
    if status < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"ended by {names.get(-status, f'signal {-status}')}{last}"  # of some without a name
    return f"ended with exit status {status}{last}"


def _tail(log: Path) -> list[str]:
    text = b""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        text = file.read()
    return [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
