"""A live view of a report on this machine: it is written again when the run folders change."""

import contextlib
import functools
import http.server
import threading
from pathlib import Path
from typing import Any

from absl import logging

from sa_jax.buckets import in_bucket, size_and_time
from sa_jax.errors import UsageError, UserError
from sa_jax.report.report import report
from sa_jax.report.run_folders import study_files
from sa_jax.report.thresholds import Thresholds

ADDRESS = "127.0.0.1"  # what a model said is nobody else's to read
POLL_SECONDS = 5.0


def write_or_serve(workdir: str, limits: Thresholds, port: int | None) -> None:
    """Writes the report and prints its path; with a port, also serves it until Ctrl-C."""
    if port is not None and in_bucket(workdir):
        remedy = "leave --serve out, and download report/"
        raise UsageError(f"--serve: {workdir} is in a bucket; {remedy}")
    print(f"report: {report(workdir, limits)}", flush=True)
    if port is not None:
        with Server(workdir, limits, port) as server:
            print(f"live at {server.url} (Ctrl-C stops it)", flush=True)
            server.serve_forever()


class Server(http.server.ThreadingHTTPServer):
    """Serves WORKDIR/report; a thread writes it again when a run folder has changed."""

    def __init__(self, workdir: str | Path, limits: Thresholds, port: int = 0) -> None:
        """`workdir` has a report already; port 0 is any that is free. UsageError if it is taken."""
        self._workdir, self._limits = Path(workdir), limits
        self.state = fingerprint(self._workdir)
        self._stop = threading.Event()
        handler = functools.partial(_Handler, directory=str(self._workdir / "report"))
        try:
            super().__init__((ADDRESS, port), handler)
        except OSError as error:
            raise UsageError(f"--port={port}: {error.strerror}; choose another port") from None
        self.hosts = {f"{host}:{self.server_port}" for host in (ADDRESS, "localhost")}
        threading.Thread(target=self._renew, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_port}/"

    def server_close(self) -> None:
        self._stop.set()
        super().server_close()

    def _renew(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.renew()

    def renew(self) -> None:
        """Writes the report again if something has changed."""
        try:
            before = self.state
            self.state = fingerprint(self._workdir)
            if self.state != before:
                report(self._workdir, self._limits)
        except (UserError, OSError) as error:
            # A run folder may be half copied or half removed: the next look finds it whole.
            logging.warning("the report could not be updated: %s", error)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files of the report, only to pages of this machine."""

    server: Server

    def send_head(self) -> Any:
        """Answers only requests that name this machine, not a foreign name that resolves to it."""
        if self.headers.get("Host") in self.server.hosts:
            return super().send_head()
        self.send_error(403, "this report is served to this machine alone")
        return None

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def list_directory(self, path: object) -> None:
        self.send_error(404, "no such page")

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: one line per request would hide the important ones."""


def fingerprint(workdir: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file that a report reads."""
    state = {}
    for path in study_files(workdir):
        with contextlib.suppress(OSError):  # it went between the listing and now
            state[path] = size_and_time(path)
    return state
