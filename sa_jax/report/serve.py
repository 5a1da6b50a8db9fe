"""A live view of a report on this machine: it is written again when the run folders change."""

import functools
import hashlib
import http.server
import threading
from pathlib import Path

from absl import logging

from sa_jax.buckets import in_bucket
from sa_jax.errors import UsageError, UserError
from sa_jax.report.report import report
from sa_jax.report.run_folders import study_files
from sa_jax.report.thresholds import Thresholds

ADDRESS = "127.0.0.1"  # what a model said is nobody else's to read
POLL_SECONDS = 5.0


def write_or_serve(workdir: str, limits: Thresholds, port: int | None) -> None:
    """Writes the report and prints its path; with a port, also serves it until Ctrl-C."""
    if port is not None and in_bucket(workdir):
        raise UsageError(
            f"--serve: {workdir} is in a bucket; leave --serve out, and download report/"
        )
    print(f"report: {report(workdir, limits)}", flush=True)
    if port is not None:
        with Server(workdir, limits, port) as server:
            print(f"live at {server.url} (Ctrl-C stops it)", flush=True)
            server.serve_forever()


class Server(http.server.ThreadingHTTPServer):
    """Serves WORKDIR/report; a thread writes it again when a run folder has changed."""

    daemon_threads = True

    def __init__(self, workdir: str | Path, limits: Thresholds, port: int = 0) -> None:
        """`workdir` has a report already; port 0 is any that is free. UsageError if it is taken."""
        self._workdir, self._limits = Path(workdir), limits
        self.version = fingerprint(self._workdir)
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
            now = fingerprint(self._workdir)
            if now == self.version:
                return
            try:
                report(self._workdir, self._limits)
            finally:
                self.version = now
        except (UserError, OSError) as error:
            # A run folder may be half copied or half removed: the next look finds it whole.
            logging.warning("the report could not be updated: %s", error)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files of the report, and /version, only to pages of this machine."""

    server: Server

    def do_GET(self) -> None:
        if not self._asked_here():
            return
        if self.path == "/version":
            body = self.server.version.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if self._asked_here():
            super().do_HEAD()

    def _asked_here(self) -> bool:
        """Whether the request names this machine; refuses foreign names that resolve to it."""
        if self.headers.get("Host") in self.server.hosts:
            return True
        self.send_error(403, "this report is served to this machine alone")
        return False

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def list_directory(self, path: object) -> None:
        self.send_error(404, "no such page")

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: one line per request would hide the important ones."""


def fingerprint(workdir: Path) -> str:
    """A digest of the state of the run folders: size and time of every file that a report reads."""
    digest = hashlib.sha256()
    for path in study_files(workdir):
        try:
            state = path.stat()
        except OSError:  # it went between the listing and now
            continue
        digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
