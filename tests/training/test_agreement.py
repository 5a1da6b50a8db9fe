"""What the processes of one launch tell each other before anything is trained."""

import pytest

from tests.training.test_loop import insertion
from tests.zygote import launched

PROGRAM = """
from sa_jax import cli
from sa_jax.errors import UserError
from sa_jax.parallel import multihost
from sa_jax.training.run_record import agree_on

def main():
    with multihost.joined():
        facts = {facts}
        if "missing" in facts:
            raise UserError(facts["missing"] + ": no such file")
        agree_on(facts)
    print("started")

cli.run(main, "")
"""


def launch(zygote, argvs):
    """`launched`, and waits for their ends."""
    return [process.wait() for process in launched(zygote, argvs)]


FACTS = {"config": {"steps": 2, "data_cache": "a"}, "environment": {"packages": {"jax": "1"}}}


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([{**FACTS, "config": {"steps": 2, "data_cache": "b"}}], None),
        ([{**FACTS, "config": {"steps": 3, "data_cache": "a"}}], ["process 1", "steps: 2 -> 3"]),
        ([FACTS, {**FACTS, "mesh": {"fsdp": 2}}], ["process 2", "mesh.fsdp: (absent) -> 2"]),
        ([{"missing": "rows.jsonl"}], ["process 1", "rows.jsonl: no such file"]),
    ],
)
def test_all_start_alike_or_none(zygote, tmp_path, others, words):
    """Processes that were started differently do not train, and say where they differ."""
    scripts = [tmp_path / f"start_{number}.py" for number in range(1 + len(others))]
    for script, facts in zip(scripts, [FACTS, *others], strict=True):
        script.write_text(PROGRAM.format(facts=facts))
    ended = launch(zygote, [(str(script),) for script in scripts])
    if words is None:
        assert [process.returncode for process in ended] == [0, 0], ended[0].stderr
        return
    assert {process.returncode for process in ended} == {1}, [p.stderr for p in ended]
    for process in ended:
        line = process.stderr.splitlines()[-1]
        # Who has the error says it without a name.
        assert all(word in line for word in words[1 if process is ended[-1] else 0 :]), line
        assert "started" not in process.stdout


def assert_refused(zygote, world, run, flag, values, difference):
    """Of two processes that have other values of a flag, neither trains, and nothing is written."""
    argvs = [insertion(world, run, f"{flag}={value}") for value in values]
    for process in launch(zygote, argvs):
        assert process.returncode == 1
        line = process.stderr.splitlines()[-1]
        assert "process 1" in line and difference in line
    assert not run.exists()


def test_two_processes_with_different_learning_rates_do_not_train(zygote, toy_world, tmp_path):
    """Two processes with different learning rates do not train, and write nothing."""
    flag, difference = "--config.optimizer.learning_rate", "optimizer.learning_rate: 0.1 -> 0.2"
    assert_refused(zygote, toy_world, tmp_path / "run", flag, (0.1, 0.2), difference)


def test_a_process_that_only_prints_stops_the_other(zygote, toy_world, tmp_path):
    """A process that would only print rows stops one that would train, and nothing is written."""
    flag, difference = "--print_examples", "print_examples: 0 -> 1"
    assert_refused(zygote, toy_world, tmp_path / "run", flag, (0, 1), difference)


SETTINGS = """
import jax
from sa_jax import cli
from sa_jax.parallel import multihost
from sa_jax.training.run_record import agree_on
from sa_jax.training.run_record import collect_environment

def main():
    jax.config.update("jax_threefry_partitionable", {partitionable})
    with multihost.joined():
        agree_on({{"environment": collect_environment()}})

cli.run(main, "")
"""


def test_processes_that_draw_other_random_numbers_do_not_train(zygote, tmp_path):
    """Processes whose jax draws other random numbers do not train: each would have its own copy of
    a weight that all of them should have."""
    scripts = [tmp_path / "start_0.py", tmp_path / "start_1.py"]
    for script, partitionable in zip(scripts, (True, False), strict=True):
        script.write_text(SETTINGS.format(partitionable=partitionable))
    for process in launch(zygote, [(str(script),) for script in scripts]):
        assert process.returncode == 1
        line = process.stderr.splitlines()[-1]
        assert "environment.jax_threefry_partitionable: true -> false" in line, line
