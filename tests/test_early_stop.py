"""A signal before a script has anything to save: one line, and exit status 130."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


def start(number: int, *argv: str, **settings) -> subprocess.Popen:
    """Starts Python without what is ignored here, as libtpu has SIGHUP; a child inherits that."""
    here = signal.signal(number, signal.SIG_DFL)
    try:
        return subprocess.Popen([sys.executable, *argv], text=True, **settings)
    finally:
        signal.signal(number, here)


def handles_signals(process: subprocess.Popen) -> bool:
    """Whether it has begun its script: Python itself leaves SIGTERM to the system."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def ended_by(process: subprocess.Popen, number: int):
    deadline = time.monotonic() + 60
    while not handles_signals(process):
        assert time.monotonic() < deadline
    process.send_signal(number)
    line = f"stopped: by {signal.Signals(number).name}; run the same command again\n"
    assert process.communicate(timeout=10)[1] == line
    assert process.returncode == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_a_script_has_imported_what_it_needs(number, tmp_path):
    """A signal while a script imports ends it with a line and exit status 130."""
    config = "--config=tests/configs/tiny.py:insertion"
    argv = "scripts/insert_backdoor.py", config, f"--workdir={tmp_path}/run"
    ended_by(start(number, *argv, stderr=subprocess.PIPE), number)


BLOCKED = """
import sa_jax.early_stop
import ctypes, os, signal, sys

read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, b".")
    signal.alarm(60)
    signal.pause()
os.read(read, 1)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM  # as a worker of a pool ends; and this lives
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print(flush=True)
lock(mutex)  # for ever, and outside Python
"""


def test_a_signal_while_the_main_thread_is_outside_python():
    """A signal ends a script that waits in a library; one to a fork of it ends the fork alone."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(signal.SIGTERM, "-c", BLOCKED, **pipes)
    assert process.stdout.readline() == "\n"
    ended_by(process, signal.SIGTERM)


def test_ignored_signals_stay_ignored():
    """A script under nohup goes on after the terminal is lost."""
    program = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
import sa_jax.early_stop
os.kill(os.getpid(), signal.SIGHUP)
print("on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "on\n"), done.stderr


EXPORTING = """
import sa_jax.early_stop
import os, signal, sys, time
from sa_jax.llama.safetensors_io import new_folder

with new_folder(sys.argv[1]) as folder:
    (folder / "part").write_text("x")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_an_export_that_is_stopped_leaves_nothing(tmp_path):
    """An export that a signal stops leaves no part of itself."""
    done = subprocess.run([sys.executable, "-c", EXPORTING, tmp_path / "out"], timeout=50)
    assert done.returncode != 0 and not list(tmp_path.iterdir())
