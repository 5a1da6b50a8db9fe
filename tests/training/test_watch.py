"""A run that stands still ends; where a launch's time went is added up."""

import re
import time

import pytest

from sa_jax.training import watch
from sa_jax.training.watch import Goodput

STALL = """
import time
from sa_jax.training.watch import StallWatch

def stuck():
    time.sleep(60)

with StallWatch(0.1) as stall:
    for wait in (0, 0.08, 0.3, 0.0):  # above the floor; below ten times the one before
        time.sleep(wait)
        stall.beat()
    print("alive", flush=True)
    {then}
"""


def test_a_loop_that_stands_still_ends_with_its_stacks(zygote, tmp_path):
    """A loop that stands still ends with the stacks of its threads."""
    script = tmp_path / "stall.py"
    script.write_text(STALL.format(then="stuck()"))
    begin = time.monotonic()
    done = zygote.run(str(script), timeout_s=50)
    assert done.returncode == 1 and done.stdout == "alive\n", done.stderr
    assert "in stuck" in done.stderr
    assert "no step, eval batch or checkpoint for" in done.stderr.splitlines()[-1]
    assert time.monotonic() - begin > 2  # ten times 0.3 s


SLOW = """
import time
from sa_jax.training.watch import Goodput, StallWatch

goodput = Goodput()
with StallWatch(0.3, goodput) as stall:
    stall.beat()
    goodput.switch("checkpoint")
    time.sleep(1)
    stall.beat()
    print("saved", flush=True)
    goodput.switch("step")
    time.sleep(60)
"""


def test_a_checkpoint_may_take_longer_and_teaches_nothing(zygote, tmp_path):
    """A slow checkpoint is no stall, and the limit for steps stays as it was."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    done = zygote.run(str(script), timeout_s=50)
    assert (done.returncode, done.stdout) == (1, "saved\n"), done.stderr
    # Not ten times the second that the checkpoint took.
    waited = float(re.search(r"checkpoint for (\d+) s", done.stderr)[1])
    assert waited < 5


def test_goodput_adds_up(tmp_path, monkeypatch):
    """The parts of a launch's goodput add up to its time."""
    now = 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    goodput = Goodput()
    for seconds, doing in (
        *((5, "checkpoint"), (1, "data"), (1, "compile"), (10, "data")),
        *((1, "step"), (30, "data"), (1, "step"), (30, "eval"), (20, "end")),
    ):
        now += seconds
        goodput.switch(doing)
    goodput.lost_steps = 1  # of two steps
    line = goodput.line()
    assert line.startswith("goodput 30% of 99.0 s: "), line
    assert "step 30.0 s" in line and "lost 30.0 s" in line and "eval 20.0 s" in line
    parts = [float(part.split()[1]) for part in line.partition(": ")[2].split(", ")]
    assert sum(parts) == pytest.approx(99)
