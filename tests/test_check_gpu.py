"""What scripts/check_gpu.sh does on a GPU, at toy size on CPU."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]


def test_every_part_runs_on_cpu(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [*COMMAND, "--smoke", f"--out={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    table = (tmp_path / "table.md").read_text().splitlines()
    parts = ("kernels", "step_8b", "step_1b", "resume", "insertion", "decode", "training")
    assert [row.split(" | ")[0] for row in table[2:]] == [f"| {part}" for part in parts]
    assert "the same bit for bit" in table[5]


def test_a_part_that_fails_is_seen_in_the_table_and_the_exit_code(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [*COMMAND, "--parts=training", f"--out={tmp_path}"]  # no GPU for torch
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not as expected: benchmarks/training.py ended with status 2" in done.stdout
    assert "sees no GPU" in (tmp_path / "training.log").read_text()
