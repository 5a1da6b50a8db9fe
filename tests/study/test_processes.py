"""The server of cells: what a cell does never looks like the end of the runner."""

import contextlib
import sys
import time

import pytest

from sa_jax.study.processes import Server
from tests.test_script_start import CLEARED_PAGES


def test_a_closed_pipe_in_one_cell_fails_that_cell_alone(tmp_path):
    broken, other = tmp_path / "broken.py", tmp_path / "other.py"
    broken.write_text("raise BrokenPipeError")
    other.write_text("import time\ntime.sleep(600)")
    with contextlib.closing(Server()) as server:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        stays = server.start([str(other)], log=tmp_path / "a/log", lock=tmp_path / "a")
        fails = server.start([str(broken)], log=tmp_path / "b/log", lock=tmp_path / "b")
        deadline = time.monotonic() + 120
        while (status := server.poll(fails)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status == 1 and server.poll(stays) is None
    assert "BrokenPipeError" in (tmp_path / "b/log").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_a_cell_on_cpu_keeps_freed_memory(tmp_path):
    (tmp_path / "cell.py").write_text(CLEARED_PAGES)
    with contextlib.closing(Server()) as server:
        cell = server.start([str(tmp_path / "cell.py")], log=tmp_path / "log", lock=tmp_path)
        while server.poll(cell) is None:
            time.sleep(0.05)
    blocks = 3 * 10 * 64 * 1024 // 4  # pages
    assert int((tmp_path / "log").read_text()) < blocks / 10
