"""One process of a launch ends or falls silent: all end, with one line that names it."""

import os
import platform
import random
import signal
import time

import pytest

from tests.training.test_loop import assert_bit_equal, insertion, log_without_times, weights
from tests.zygote import launched

PROGRAM = """
import os
import time
from pathlib import Path
import jax
from sa_jax import cli
from sa_jax.errors import UserError
from sa_jax.parallel import multihost

def main():
    with multihost.joined(60, 3, lambda: {resumable}):
        for step in range(150):
            multihost.agree(True)
            Path(f"{folder}/started_{{jax.process_index()}}").touch()
            if jax.process_index() == {failing} and step == 5:
                {end}
            time.sleep(0.1)
            if step == {last}:
                return

cli.run(main, "")
"""
MISSING = 'raise UserError("rows.jsonl: no such file")'


STALL = """
                from sa_jax.training.watch import StallWatch
                with StallWatch(0.5) as stall:
                    stall.beat()
                    time.sleep(60)
"""


START = """
import os
import jax
from sa_jax import cli
from sa_jax.parallel import multihost

def end(*_):
    os.kill(os.getpid(), 9)

def main():
    if os.environ["JAX_PROCESS_ID"] == "{victim}":
        multihost.{step} = end
    with multihost.joined({patience}, 3):
        multihost.agree(True)

cli.run(main, "")
"""


@pytest.mark.parametrize(
    ("victim", "step", "patience", "words"),
    [
        # It never starts its store.
        pytest.param(0, "_join", 5, "not all processes joined", marks=pytest.mark.long),
        (1, "_join", 5, "not all processes joined"),
        (0, "_open_devices", 300, "process 0 ("),  # all have joined, and wait for its devices
        (1, "_open_devices", 300, f"process 1 ({platform.node()}) does not answer"),
    ],
)
def test_one_that_is_killed_at_the_start_ends_all(zygote, tmp_path, victim, step, patience, words):
    """A process that is killed before all have started ends the others with one line."""
    script = tmp_path / "start.py"
    script.write_text(START.format(victim=victim, step=step, patience=patience))
    processes = launched(zygote, [(str(script),)] * 2)
    killed = processes.pop(victim)
    assert killed.wait(60).returncode == -signal.SIGKILL
    begin = time.monotonic()
    ended_well(processes[0], 1, words)
    assert time.monotonic() - begin < 30


def started(zygote, tmp_path, count=2, *, failing=-1, end=MISSING, resumable=True, last=-1):
    script = tmp_path / "program.py"
    settings = {"failing": failing, "end": end, "resumable": resumable, "last": last}
    script.write_text(PROGRAM.format(folder=tmp_path, **settings))
    processes = launched(zygote, [(str(script),)] * count)
    for number, process in enumerate(processes):
        process.wait_for((tmp_path / f"started_{number}").exists)
    return processes


def ended_well(process, code, *words):
    """Its exit code and last line; and nothing of a Python program's end."""
    assert process.wait(60).returncode == code, process.stderr[-3000:]
    line = process.stderr.splitlines()[-1]
    assert all(word in line for word in words), process.stderr[-3000:]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(("failing", "count"), [pytest.param(0, 4, marks=pytest.mark.long), (1, 3)])
def test_an_error_of_one_ends_all(zygote, tmp_path, failing, count):
    """An error in one of 3 or 4 processes ends all of them with its line."""
    processes = started(zygote, tmp_path, count, failing=failing)
    begin = time.monotonic()
    for number, process in enumerate(processes):
        who = [] if number == failing else [f"process {failing} ("]
        ended_well(process, 1, *who, "rows.jsonl: no such file")
    assert time.monotonic() - begin < 30


@pytest.mark.long
@pytest.mark.parametrize("failing", [0, 3])
def test_a_bug_in_one_ends_all(zygote, tmp_path, failing):
    """An exception in one of 4 processes ends all, and the others name it."""
    processes = started(zygote, tmp_path, 4, failing=failing, end='raise KeyError("q_proj")')
    bug = processes.pop(failing)
    assert bug.wait(30).returncode == 1
    assert "Traceback" in bug.stderr
    for process in processes:
        ended_well(process, 1, f"process {failing} (", "KeyError: 'q_proj'")


LATE = """
import os
import time
import jax
from jax._src import distributed
from sa_jax import cli
from sa_jax.errors import UserError
from sa_jax.parallel import multihost

class LateStore:
    left = False

    def __init__(self, store):
        self.store = store

    def key_value_set(self, key, text, **options):
        self.store.key_value_set(key, text, **options)
        self.left = '"left": true' in text
        self.wait("key_value_set")

    def key_value_dir_get(self, folder):
        self.wait("key_value_dir_get")
        return self.store.key_value_dir_get(folder)

    def wait(self, call):
        if self.left and call == "{call}":
            time.sleep(2)

def main():
    join, open_devices, state = multihost._join, multihost._open_devices, distributed.global_state
    def join_late(*times):
        join(*times)
        state.client = LateStore(state.client)
    def open_with_the_store():
        state.client = state.client.store
        open_devices()
    if os.environ["JAX_PROCESS_ID"] == "1":
        multihost._join, multihost._open_devices = join_late, open_with_the_store
    with multihost.joined(60, 30):
        multihost.agree(True)
        raise UserError("rows.jsonl: no such file")

cli.run(main, "")
"""


@pytest.mark.parametrize("call", ["key_value_set", "key_value_dir_get"])
def test_an_error_of_all_ends_each_with_its_line(zygote, tmp_path, call):
    """The first process, which keeps the store, may end before the store has answered the last."""
    script = tmp_path / "late.py"
    script.write_text(LATE.format(call=call))
    for process in launched(zygote, [(str(script),)] * 2):
        ended_well(process, 1, "error: rows.jsonl: no such file")


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_stall_of_one_ends_all_with_their_stacks(zygote, tmp_path, count):
    """A process that stands still ends all, for one reason and with the stacks of each."""
    processes = started(zygote, tmp_path, count, failing=1, end=STALL)
    for number, process in enumerate(processes):
        who = [] if number == 1 else ["process 1 ("]
        ended_well(process, 1, *who, "no step, eval batch or checkpoint for")
        assert "most recent call first" in process.stderr


@pytest.mark.parametrize(
    ("lost", "number", "resumable", "count"),
    [
        (0, signal.SIGKILL, True, 2),
        (1, signal.SIGKILL, True, 2),
        *(
            pytest.param(lost, number, resumable, 4, marks=pytest.mark.long)
            for lost in (0, 2)
            for number, resumable in ((signal.SIGKILL, True), (signal.SIGSTOP, False))
        ),
    ],
)
def test_a_lost_process_ends_the_others(zygote, tmp_path, lost, number, resumable, count):
    """A process that is killed, or stopped for ever, ends the others, which all name it."""
    processes = started(zygote, tmp_path, count, resumable=resumable)
    pid = processes.pop(lost).pid
    try:
        os.kill(pid, number)
        kind = "stopped" if resumable else "error"
        words = f"{kind}: process {lost} ({platform.node()}) does not answer", "peer_timeout_s=3"
        for process in processes:
            ended_well(process, 75 if resumable else 1, *words)
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_an_abort_of_its_own_is_one(zygote, tmp_path):
    """A process that aborts is seen as lost by the others.

    Not only jax's abort for a lost first process, which is turned into a line.
    """
    processes = started(zygote, tmp_path, failing=1, end="os.abort()")
    assert processes[1].wait(30).returncode == -signal.SIGABRT
    ended_well(processes[0], 75, "process 1 (")


@pytest.mark.long
def test_one_that_is_killed_when_all_is_done_holds_nobody_up(zygote, tmp_path):
    """A process that is killed after its last step does not keep the others from their end."""
    script = tmp_path / "program.py"
    settings = {"failing": -1, "end": "pass", "resumable": True, "last": 1}
    text = PROGRAM.format(folder=tmp_path, **settings)
    last = "    if jax.process_index() == 1:\n        os.kill(os.getpid(), 9)\n"
    text = text.replace("                return", "                break")
    script.write_text(text.replace("\ncli.run", f"{last}\ncli.run"))
    processes = launched(zygote, [(str(script),)] * 2)
    assert processes[0].wait(30).returncode == 0, processes[0].stderr


@pytest.mark.long
def test_a_short_pause_ends_nobody(zygote, tmp_path):
    """A pause that is shorter than the limit ends nobody."""
    processes = started(zygote, tmp_path, last=20)
    os.kill(processes[1].pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(processes[1].pid, signal.SIGCONT)
    assert [process.wait(60).returncode for process in processes] == [0, 0]


@pytest.mark.long
def test_a_run_of_two_outlives_kills_bit_for_bit(zygote, toy_world, tmp_path):
    """Runs of two processes, killed 50 times in all, end bit for bit as one never killed."""

    def launch(run):
        waits = "--config.start_timeout_s=30", "--config.peer_timeout_s=3"
        return launched(zygote, [insertion(toy_world, run, *waits)] * 2)

    whole = tmp_path / "whole"
    begin = time.monotonic()
    assert [process.wait().returncode for process in launch(whole)] == [0, 0]
    seconds = time.monotonic() - begin
    exported = weights(zygote, whole, tmp_path / "whole_hf")
    rng, kills, run, launches = random.Random(0), 0, 0, 0
    while kills < 50:
        run += 1
        killed = tmp_path / f"{run}"
        codes = None
        while codes != [0, 0]:
            processes = launch(killed)
            launches += 1
            assert launches < 80
            victim = processes[rng.randrange(2)]
            deadline = time.monotonic() + rng.uniform(0.2, seconds)
            while time.monotonic() < deadline and victim.poll() is None:
                time.sleep(0.02)
            endings = [0, 75]  # 0: it had ended; 75: on a busy machine the other was silent
            if kills < 50 and victim.poll() is None:
                os.kill(victim.pid, signal.SIGKILL)
                kills += 1
                endings += [1, -signal.SIGKILL]
            codes = [process.wait(90).returncode for process in processes]
            assert set(codes) <= set(endings), [process.stderr[-3000:] for process in processes]
        assert log_without_times(killed) == log_without_times(whole)
        assert_bit_equal(weights(zygote, killed, tmp_path / f"{run}_hf"), exported)
