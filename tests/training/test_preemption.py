"""Signals become one decision; several processes: see test_checkpoints.py."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sa_jax.training.preemption import PreemptionGuard

# libtpu, which other tests load, has SIGHUP ignored in its process, and children inherit that.
LOOP = """
    import signal, time
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from sa_jax.training.preemption import PreemptionGuard
    with PreemptionGuard() as guard:
        print("ready", flush=True)
        for step in range(10**6):
            time.sleep(0.01)
            {body}
"""
STOP = "if guard.should_stop(step): print('stopped', flush=True); raise SystemExit(75)"


def start(body: str) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP).format(body=body)],
        env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_the_loop_at_its_next_question(number):
    process = start(STOP)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (75, "stopped\n")


def test_a_second_interrupt_stops_at_once():
    """A loop that does not ask: the first SIGINT alone leaves it running."""
    process = start("pass")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors


def test_the_flag_stays_and_the_former_handlers_come_back():
    def former(*_):
        raise AssertionError

    original = signal.signal(signal.SIGTERM, former)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with PreemptionGuard() as guard:
            assert not guard.should_stop(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert guard.should_stop(2) and guard.should_stop(3)
        assert signal.getsignal(signal.SIGTERM) is former
        assert signal.getsignal(signal.SIGINT) is interrupt
        with PreemptionGuard() as guard:
            assert not guard.should_stop(4)  # a new guard starts afresh
    finally:
        signal.signal(signal.SIGTERM, original)


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), PreemptionGuard():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
