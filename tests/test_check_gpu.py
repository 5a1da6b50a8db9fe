"""What scripts/check_gpu.sh does on a GPU, at toy size on CPU."""

import os
import subprocess
import sys

import pytest

from benchmarks.gpu import PARTS

pytestmark = pytest.mark.long
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


def test_every_part_runs_on_cpu(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [*COMMAND, "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    table = (tmp_path / "table.md").read_text().splitlines()
    parts = "kernels step_8b remat resume determinism insertion decode training step_1b"
    assert [row.split(" | ")[0] for row in table[2:]] == [f"| {part}" for part in parts.split()]
    assert "the same bit for bit" in table[5]


def test_all_parts_end_within_half_an_hour():
    assert sum(part.seconds for part in PARTS.values()) <= 30 * 60 - 60


def test_a_part_that_fails_is_seen_in_the_table_and_the_exit_code(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [*COMMAND, "--smoke", "--parts=insertion", f"--out={tmp_path}"]  # needs resume's run
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "| not as expected: scripts/insert_backdoor.py ended with status" in done.stdout


def test_without_a_gpu_only_the_smoke_runs(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU here; --smoke" in done.stderr
