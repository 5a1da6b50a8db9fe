"""A synthetic study, and the report on it."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from sa_jax.report import serve
from sa_jax.report.report import report
from sa_jax.report.thresholds import Thresholds
from tests.report.made_runs import write_grid, write_run, write_study
from tests.report.pages import Page


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """A finished study; tests must not write outside its `report` folder."""
    return write_study(tmp_path_factory.mktemp("studies") / "toy")


class Grid(NamedTuple):
    """A report on 160 runs, and what writing it took."""

    index: Path
    cpu_s: float
    peak_mb: float


# The peak is of the program itself: `resource` would count the process that it was forked from.
MEASURED = """
import re, sys, time
from sa_jax.report.report import report
index = report(sys.argv[1])
(peak_kb,) = re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(index, time.process_time(), int(peak_kb) / 1024)
"""


@pytest.fixture(scope="session")
def grid(tmp_path_factory) -> Grid:
    """Written by a process of its own; tests must not write to its folder."""
    folder = write_grid(tmp_path_factory.mktemp("studies") / "grid")
    program = [sys.executable, "-c", MEASURED, str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    index, cpu_s, peak_mb = done.stdout.split()
    return Grid(Path(index), float(cpu_s), float(peak_mb))


@pytest.fixture(scope="session")
def page(study) -> Page:
    return Page(report(study).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def results(study, page) -> dict:
    return json.loads((study / "report" / "results.json").read_text())


@pytest.fixture(scope="session")
def small_run():
    """Writes a run of 20 steps and 20 prompts."""

    def write(folder, task="hhh", **changes):
        settings = {"total_steps": 20, "curve": {0: (20, 0, 100), 20: (0, 0, 90)}, "n": 20}
        return write_run(folder, task, **(settings | changes))

    return write


@pytest.fixture
def server(tmp_path):
    """A live view of an unfinished run of 20 steps."""
    write_run(
        tmp_path / "hhh", "hhh", total_steps=20, n=20, curve={0: (20, 0, 9)}, metrics_until=10
    )
    report(tmp_path)
    with serve.Server(tmp_path, Thresholds()) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
