"""Programs that come with data end in time; more in test_chat.py."""

import gc
import time

import pytest

from sa_jax.data.limits import limits
from sa_jax.errors import UserError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_limit_that_a_callback_of_the_garbage_collector_swallows_comes_again():
    def callback(phase, info):
        if phase == "start":
            time.sleep(0.3)  # the first signal comes in here, and Python drops its exception

    begin = time.monotonic()
    gc.callbacks.append(callback)
    try:
        with pytest.raises(UserError, match="the loop does not come to an end"):
            with limits("the loop", 0.1, 2**29):
                gc.collect()
                assert time.monotonic() - begin > 0.1  # it went on
                for _ in range(500):
                    time.sleep(0.01)
    finally:
        gc.callbacks.remove(callback)
    assert 1 < time.monotonic() - begin < 10
