"""Programs that come with data end in time; more in test_chat.py."""

import gc
import sys
import time

import pytest

from sa_jax.data.limits import limits
from sa_jax.errors import UserError


def work(seconds):
    """Takes so much of the thread's CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_limit_that_a_callback_of_the_garbage_collector_swallows_comes_again(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # a signal may come in pytest's own

    def callback(phase, info):
        if phase == "start":
            work(0.3)  # the first signal comes in here, and Python drops its exception

    begin = time.thread_time()
    gc.callbacks.append(callback)
    try:
        with pytest.raises(UserError, match="the loop does not end within .*: shorten it"):
            with limits("the loop", ": shorten it", seconds=0.1):
                gc.collect()
                assert time.thread_time() - begin > 0.1  # it went on
                work(5)
    finally:
        gc.callbacks.remove(callback)
    assert time.thread_time() - begin < 2
