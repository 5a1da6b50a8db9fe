"""Signals become one decision; several processes: see test_checkpoints.py."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sa_jax.training.preemption import PreemptionGuard, aws_spot_notice
from tests.zygote import ROOT

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
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP).format(body=body)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_the_loop_at_its_next_question(number):
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP each stop a loop after its step."""
    process = start(STOP)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (75, "stopped\n")


def test_a_second_interrupt_stops_at_once():
    """A second Ctrl-C stops a loop at once.

    It does not ask: the first alone leaves it running.
    """
    process = start("pass")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors


def test_the_flag_stays_and_the_former_handlers_come_back():
    """A run that was told to stop stays so, and gives the former signal handlers back."""

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


class Metadata(BaseHTTPRequestHandler):
    """Of an AWS instance, which is taken back once `action` is set."""

    action = ""

    def do_PUT(self):
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "a token")

    def do_GET(self):
        assert self.path == "/latest/meta-data/spot/instance-action"
        assert self.headers["X-aws-ec2-metadata-token"] == "a token"
        self.answer(*((200, self.action) if self.action else (404, "")))

    def answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def test_a_spot_notice_of_aws_stops_the_loop(monkeypatch):
    """AWS's notice of a spot interruption stops a loop as SIGTERM does."""
    server = ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}/"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", address)
    try:
        with PreemptionGuard(aws_spot=True) as guard:
            assert aws_spot_notice() == "" and not guard.should_stop(1)
            monkeypatch.setattr(Metadata, "action", '{"action": "terminate"}')
            deadline = time.monotonic() + 10
            while not guard.should_stop(2):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        server.shutdown()
        server.server_close()
    assert aws_spot_notice() == ""  # nobody answers


def test_handlers_come_back_after_an_error():
    """An error in a loop gives the former signal handlers back."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), PreemptionGuard():
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
