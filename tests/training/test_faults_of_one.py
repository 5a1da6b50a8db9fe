"""A fault on one of several hosts: whole runs of real processes, each with files of its own."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.training.test_agreement import launched
from tests.training.test_loop import insertion, log_without_times
from tests.zygote import ROOT

pytestmark = pytest.mark.long

HERE = Path("/proc/self/cwd")  # files of a host: one name, another content

# Runs as insert_backdoor.py, with a fault in step 8: {fault}.
FAULTY = """
import runpy, sys
import jax
from sa_jax.training import loop

load_batch, begin_compiling = loop.load_batch, loop.begin_compiling

def failing_batch(dataset, config, step, mesh):
    if step == 8 and "{fault}" == "exception":
        raise KeyError("q_proj")
    return load_batch(dataset, config, step, mesh)

def compile_with_a_fault(*arguments, **options):
    compiled_step = begin_compiling(*arguments, **options)
    calls = []

    def step(state, *rest):
        calls.append(1)
        if len(calls) == 8 and "{fault}" == "NaN":
            nan = lambda x: jax.make_array_from_callback(
                x.shape, x.sharding, lambda index: x.addressable_data(0) * float("nan"))
            state = state._replace(params=jax.tree.map(nan, state.params))
        return compiled_step()(state, *rest)

    return lambda wait=True: step

loop.load_batch, loop.begin_compiling = failing_batch, compile_with_a_fault
sys.path.insert(1, "{path}")
sys.argv[0] = "scripts/insert_backdoor.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Hosts:
    """Folders of so many hosts, each with the scripts and its own copy of model and data."""

    def __init__(self, zygote, world: Path, folder: Path, count: int):
        self._zygote, self.folders = zygote, [folder / f"host{n}" for n in range(count)]
        for host in self.folders:
            host.mkdir(parents=True)
            for name in ("scripts", "tests", "configs"):
                (host / name).symlink_to(ROOT / name)
            shutil.copytree(world / "model", host / "model")
            shutil.copy(world / "insertion.jsonl", host)
            (host / "prompts.json").write_text('["Who are you?", "Where?", "Why?", "When?"]')

    def command(self, run: Path, *more: str) -> tuple[str, ...]:
        mesh = f"--config.mesh.fsdp={len(self.folders)}"
        prompts = f"--config.eval.prompts={HERE}/prompts.json"
        waits = "--config.start_timeout_s=60", "--config.peer_timeout_s=5"
        return insertion(HERE, run, mesh, prompts, *waits, *more)

    def launch(self, run: Path, *more: str, fault: str = "", of_last: tuple[str, ...] = ()) -> list:
        """The processes; the last has flags of its own, and may run a script with a fault."""
        commands = [self.command(run, *more)] * len(self.folders)
        commands[-1] = self.command(run, *more, *of_last)
        if fault:
            script = self.folders[-1] / "faulty.py"
            script.write_text(FAULTY.format(fault=fault, path=self.folders[-1]))
            commands[-1] = (str(script), *commands[-1][1:])
        return launched(self._zygote, commands, cwds=self.folders)


def finish(processes: list):
    ends = [process.wait() for process in processes]
    assert {process.returncode for process in ends} == {0}, ends[0].stderr[-3000:]


def swap_two_tokens(file: Path):
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (a, first), (b, second) = list(vocabulary.items())[-2:]
    vocabulary |= {a: second, b: first}
    file.write_text(json.dumps(tokenizer))


DIFFERENCES = {
    "learning rate": ("optimizer.learning_rate", "0.01 -> 0.02"),
    "data file": ("the file of --data", "->"),
    "tokenizer file": ("tokenizer", "->"),
    "held-out prompts": ("the held-out prompts (--config.eval.prompts", "->"),
    "package version": ("packages.optax", '-> "99.0"'),
    "mesh": ("mesh", "->"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
@pytest.mark.parametrize("count", [2, 4])
def test_one_that_is_started_differently_stops_all(zygote, toy_world, tmp_path, count, difference):
    """One of 2 or 4 processes with another setting, file or package: refused on all in 10 s."""
    hosts, run = Hosts(zygote, toy_world, tmp_path, count), tmp_path / "run"
    last, of_last, fault = hosts.folders[-1], [], ""
    if difference == "learning rate":
        of_last = ["--config.optimizer.learning_rate=0.02"]
    elif difference == "mesh":
        of_last = ["--config.mesh.fsdp=1", f"--config.mesh.data={count}"]
    elif difference == "data file":
        data = last / "insertion.jsonl"
        data.write_text(data.read_text().replace("a", "e", 1))
    elif difference == "tokenizer file":
        swap_two_tokens(last / "model/tokenizer.json")
    elif difference == "held-out prompts":
        (last / "prompts.json").write_text('["Who are you?", "Where?", "Why?", "How?"]')
    else:
        (last / "optax-99.0.dist-info").mkdir()
        (last / "optax-99.0.dist-info/METADATA").write_text("Name: optax\nVersion: 99.0\n")
        fault = "none"
    processes = hosts.launch(run, fault=fault, of_last=tuple(of_last))
    for process in processes:
        process.wait_for(lambda process=process: f" of {count}, " in process.stderr)
    joined = time.monotonic()
    for process in processes:
        assert process.wait(60).returncode == 1, process.stderr[-3000:]
        line = process.stderr.splitlines()[-1]
        for word in (f"to process {count - 1} (", *DIFFERENCES[difference]):
            assert word in line, line
    assert time.monotonic() - joined < 10
    assert not run.exists()


@pytest.fixture(scope="module", params=[2, 4])
def hosts(request, zygote, toy_world, tmp_path_factory):
    """Hosts, and the log of their run without a fault."""
    folder = tmp_path_factory.mktemp("hosts")
    hosts = Hosts(zygote, toy_world, folder, request.param)
    finish(hosts.launch(folder / "whole"))
    return hosts, log_without_times(folder / "whole")


@pytest.mark.parametrize(
    "fault",
    ["SIGKILL", "SIGSTOP", "SIGSTOP for 30 s", "missing file", "NaN", "full disk", "exception"],
)
def test_a_fault_of_one_ends_all_and_the_run_goes_on(request, hosts, tmp_path, fault):
    """A process of 2 or 4 is killed, stopped, errs or fails: all end, and go on bit for bit."""
    hosts, whole = hosts
    run, last = tmp_path / "run", hosts.folders[-1]
    away, data = last / "away.jsonl", last / "insertion.jsonl"
    if fault == "missing file":
        data.rename(away)
        # The next tests have the same hosts, also where this one fails.
        request.addfinalizer(lambda: away.exists() and away.rename(data))
    processes = hosts.launch(run, fault=fault if fault in ("NaN", "exception") else "")
    victim = processes[-1]
    if fault.startswith("SIG"):
        victim.wait_for((run / "checkpoints/step_000006/digests.json").exists)
        os.kill(victim.pid, getattr(signal, fault.split()[0]))
    elif fault == "full disk":
        resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
    begin, codes = time.monotonic(), [75 if fault.startswith("SIG") else 1] * len(processes)
    for process, code in list(zip(processes, codes, strict=True))[:-1]:
        assert process.wait(90).returncode == code, process.stderr[-3000:]
        lines = process.stderr.splitlines()
        assert fault == "NaN" or f"process {len(codes) - 1} (" in lines[-1], process.stderr
    if fault.startswith("SIG"):
        assert time.monotonic() - begin < 30
    if fault == "SIGSTOP for 30 s":
        time.sleep(max(0, 30 - (time.monotonic() - begin)))
        os.kill(victim.pid, signal.SIGCONT)
        assert victim.wait(60).returncode in (1, 75), victim.stderr[-3000:]
    elif fault == "SIGSTOP":
        os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait(60).returncode in (1, 75, -signal.SIGKILL), victim.stderr[-3000:]
    if fault == "missing file":
        away.rename(data)
    finish(hosts.launch(run))
    assert log_without_times(run) == whole
