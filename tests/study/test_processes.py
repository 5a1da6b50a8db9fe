"""The server of cells: what a cell does never looks like the end of the runner."""

import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sa_jax.study.processes import Order, Server
from tests.test_script_start import CLEARED_PAGES


def test_a_closed_pipe_in_one_cell_fails_that_cell_alone(tmp_path):
    broken, other = tmp_path / "broken.py", tmp_path / "other.py"
    broken.write_text("raise BrokenPipeError")
    other.write_text("import time\ntime.sleep(600)")
    with contextlib.closing(Server()) as server:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        stays = server.start(Order([str(other)], str(tmp_path / "a/log"), str(tmp_path / "a")))
        fails = server.start(Order([str(broken)], str(tmp_path / "b/log"), str(tmp_path / "b")))
        deadline = time.monotonic() + 120
        while (status := server.poll(fails)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status == 1 and server.poll(stays) is None
    assert "BrokenPipeError" in (tmp_path / "b/log").read_text()


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason="needs Linux and root")
def test_a_process_number_that_comes_again_is_another_cell(tmp_path):
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    (tmp_path / "stays.py").write_text("import time; time.sleep(600)")

    def start(name):
        lock = tempfile.mkdtemp(dir=tmp_path)
        return server.start(Order([str(tmp_path / name)], str(tmp_path / "log"), lock))

    with contextlib.closing(Server()) as server:
        first = start("ends.py")
        while server.poll(first) is None:
            time.sleep(0.05)
        assert server.poll(first) == 3
        for _ in range(100):  # until no other process takes the number first
            LAST_PID.write_text(str(first - 1))
            if (pid := start("stays.py")) == first:
                break
            os.killpg(pid, signal.SIGKILL)
        assert pid == first and server.poll(pid) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_a_cell_on_cpu_keeps_freed_memory(tmp_path):
    (tmp_path / "cell.py").write_text(CLEARED_PAGES)
    with contextlib.closing(Server()) as server:
        cell = server.start(
            Order([str(tmp_path / "cell.py")], str(tmp_path / "log"), str(tmp_path))
        )
        while server.poll(cell) is None:
            time.sleep(0.05)
    blocks = 3 * 10 * 64 * 1024 // 4  # pages
    assert int((tmp_path / "log").read_text()) < blocks / 10
