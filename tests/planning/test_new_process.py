"""Calls in a new process, which may end in any way."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sa_jax.errors import UsageError
from sa_jax.planning.new_process import ProcessCrash, call_in_new_process


def double(x):
    print("said by the function")
    return os.getpid(), 2 * x


def end(how):
    if how == "usage":
        raise UsageError("one line")
    if how == "bug":
        raise KeyError("a bug")
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), how)


def test_the_result_is_returned_and_output_goes_to_stderr(capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    pid, doubled = call_in_new_process(double, [1, 2])
    assert doubled == [1, 2, 1, 2] and pid != os.getpid()
    printed = capfd.readouterr()
    assert printed.out == "" and "said by the function" in printed.err


def test_crashes_and_errors_are_distinguished(capfd):
    for number in (signal.SIGABRT, signal.SIGKILL):
        with pytest.raises(ProcessCrash, match=number.name):
            call_in_new_process(end, number)
    with pytest.raises(ProcessCrash, match="exit status 3"):
        call_in_new_process(end, "exit")
    with pytest.raises(UsageError, match="one line"):
        call_in_new_process(end, "usage")
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="its error is above"):
        call_in_new_process(end, "bug")
    assert "KeyError: 'a bug'" in capfd.readouterr().err


def sleep(file):
    with open(file, "w") as opened:
        opened.write(str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_caller(tmp_path, number):
    file = tmp_path / "pid"
    code = (
        "from sa_jax.planning.new_process import call_in_new_process\n"
        "from tests.planning.test_new_process import sleep\n"
        f"call_in_new_process(sleep, {str(file)!r})"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline and caller.poll() is None
        time.sleep(0.05)
    pid = int(file.read_text())
    if number == signal.SIGINT:  # as a terminal does, to both
        os.killpg(caller.pid, number)
    else:
        caller.send_signal(number)
    # One traceback at most: the caller's.
    assert caller.communicate(timeout=30)[1].count(b"Traceback") <= 1
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
