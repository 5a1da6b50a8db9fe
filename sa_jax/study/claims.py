"""Claims in the study's folder say who works on a cell, so that any number of machines share it.

A cell's claims are numbered. Claim 3 is the file `000003.claim`, created with O_EXCL, so that only
one process gets it. The process with the highest number owns the cell. It touches its file as a
heartbeat, and at the end writes `000003.end`, the outcome. A process that finds the owner dead, or
silent for too long, creates the next number. An owner that was only paused sees this number and
writes nothing more; if it still writes `000003.end`, nobody reads it. Each watcher measures the
heartbeat with its own clock, so clocks need not agree.

The process that runs a cell holds a lock on the file `lock` while it lives (`hold_lock`). This
keeps two processes out of one folder even if their runners disagree.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from sa_jax.errors import UserError
from sa_jax.files import atomic_write, check_types, parse_json, try_lock

TAKEOVER_S = 120.0  # an owner that is silent for so long loses its cell, by default
LOCK_WAIT_S = 15.0  # for a killed process to be gone
# Their fields, with values of the right types (see `check_types`).
_CLAIM = {"id": "", "record": {}, "parents": {}}
_OUTCOME = {"state": "", "seconds": 0.0}


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that can be recognised: `started` tells it from a later one of its number."""

    host: str  # machine, its boot, and the process namespace, in which `pid` means something
    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(_host(), pid, _started(pid))

    def runs(self) -> bool | None:
        """Whether the process still runs; None if that is not known, because it is on another host
        or its start time was not recorded."""
        is_here = self.host == _host() and bool(self.started)
        return _started(self.pid) == self.started if is_here else None


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; '' if it does not exist, or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@dataclasses.dataclass(frozen=True)
class LatestClaim:
    """The newest claim of a cell."""

    number: int = 0  # 0 for a cell that nobody has claimed
    id: str = ""  # unique to the claim
    owner: Process | None = None  # None if it cannot be read (yet)
    record: Mapping[str, Any] | None = None  # what determined the cell's result at the claim
    # Parent cell -> id of the claim under which that cell was done.
    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outcome: Mapping[str, Any] | None = None  # what the owner wrote at the end
    is_free: bool = True  # there is no claim, or its owner has ended, is dead or is silent

    @property
    def state(self) -> str:
        """'new', 'running', 'lost' (its owner is gone), or the outcome's state."""
        if self.outcome is not None:
            return str(self.outcome.get("state", "stopped"))
        if not self.number:
            return "new"
        return "lost" if self.is_free else "running"


Latest = Mapping[str, LatestClaim]  # by cell


class Claims:
    """The claims of a study's cells, for one process. An owner that is silent for `takeover_s` has
    lost its cell."""

    def __init__(self, folder: Path, takeover_s: float):
        self._folder, self.takeover_s = folder, takeover_s
        self._me = Process.of(os.getpid())
        self._last_beats: dict[str, tuple[tuple[int, int], float]] = {}  # (number, beat), our clock

    def latest(self, cell: str) -> LatestClaim:
        numbers: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            names = "\n".join(os.listdir(self._folder / cell))
            numbers = re.findall(r"^(\d{6})\.claim$", names, re.MULTILINE)
        if not numbers:
            return LatestClaim()
        newest = Claim(self._folder / cell, int(max(numbers)))
        claim = _read(newest.file, _CLAIM)
        owner = _process(claim.get("owner"))
        outcome = _read(newest.end_file, _OUTCOME) if newest.end_file.exists() else None
        return LatestClaim(
            newest.number,
            claim.get("id", ""),
            owner,
            claim.get("record"),
            claim.get("parents", {}),
            outcome,
            is_free=outcome is not None
            or (owner is not None and owner.runs() is False)
            or self._is_silent(cell, newest),
        )

    def _is_silent(self, cell: str, newest: "Claim") -> bool:
        beat = (newest.number, 0)
        with contextlib.suppress(FileNotFoundError):
            beat = (newest.number, newest.file.stat().st_mtime_ns)
        now = time.monotonic()
        seen, since = self._last_beats.get(cell, (beat, now))
        if seen != beat:
            since = now
        self._last_beats[cell] = (beat, since)
        return now - since > self.takeover_s

    def take(
        self, cell: str, newest: LatestClaim, record: Mapping[str, Any], parents: Mapping[str, str]
    ) -> "Claim | None":
        """The claim after the given one; None if another process was faster.

        A process of the last owner that still works on the cell is killed, if it is on this host.
        """
        claim = Claim(self._folder / cell, newest.number + 1)
        claim.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(claim.file, "x") as file:
                mine = {"id": secrets.token_hex(8), "owner": dataclasses.asdict(self._me)}
                json.dump(mine | {"record": record, "parents": parents}, file)
        except FileExistsError:
            return None
        kill_holder(claim.folder)
        return claim


class Claim:
    """A claim on a cell, and its files. The process that made it calls the methods."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self.file = folder / f"{number:06d}.claim"
        self.log = folder / f"{number:06d}.log"
        self.end_file = folder / f"{number:06d}.end"

    def beat(self) -> None:
        os.utime(self.file)

    def is_lost(self) -> bool:
        """Whether another process has taken the cell over, or someone has removed the claim."""
        names = os.listdir(self.folder) if self.folder.exists() else []
        return f"{self.number + 1:06d}.claim" in names or self.file.name not in names

    def end(self, outcome: Mapping[str, Any]) -> bool:
        """Writes the outcome; if the claim is lost, writes nothing and returns False. OSError if it
        cannot be written, also where the disk is full."""
        if self.is_lost():
            return False
        try:
            atomic_write(self.end_file, json.dumps(outcome, indent=1) + "\n")
        except UserError as error:
            raise OSError(str(error)) from error
        return True


def hold_lock(folder: Path) -> IO[str] | None:
    """Takes the lock of a cell for this process, also across exec; None if another holds it.

    The lock ends with the process. On file systems without locks it does nothing.
    """
    file = open(folder / "lock", "a+")
    os.set_inheritable(file.fileno(), True)
    deadline = time.monotonic() + LOCK_WAIT_S
    while not try_lock(file):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    file.truncate(0)
    json.dump(dataclasses.asdict(Process.of(os.getpid())), file)
    file.flush()
    return file


def kill_holder(folder: Path) -> None:
    """Kills the process group that works on a cell, if its leader runs on this host."""
    holder = _process(_read(folder / "lock", {}))
    if holder is not None and holder.runs():
        # The holder has ended meanwhile, or is another user's, whose lock then decides.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(holder.pid, signal.SIGKILL)


def _process(record: Any) -> Process | None:
    """The process in a record; None if the record has none."""
    try:
        check_types(record, {"host": "", "pid": 0, "started": ""}, "", whole=True)
        return Process(**record)
    except (UserError, TypeError):
        return None


def _read(path: Path, example: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object like the example; {} for a file that is missing, still being written, or of
    another form."""
    try:
        value = parse_json(path.read_text())
        check_types(value, dict(example), str(path))
    except (OSError, ValueError, UserError):
        return {}
    return value
