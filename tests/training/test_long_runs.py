"""Whole runs through the binaries, for minutes: signals, other meshes, thousands of steps."""

import contextlib
import math
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from sa_jax.training.metrics import read_metrics
from tests.cpu import xla_flags
from tests.test_script_start import SIGNALS, handles, start
from tests.training.test_loop import assert_bit_equal, insertion, log_without_times, weights
from tests.zygote import ROOT

pytestmark = pytest.mark.long

NO_EVALS = ("--config.eval.names={}", "--config.eval.num_prompts=0")


@pytest.fixture(scope="module")
def whole(zygote, toy_world, tmp_path_factory):
    """The log and the weights of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = zygote.run(*insertion(toy_world, folder / "run"))
    assert done.returncode == 0, done.stderr
    return log_without_times(folder / "run"), weights(zygote, folder / "run", folder / "hf")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_outlives_signals_at_any_moment(zygote, toy_world, whole, tmp_path, number):
    """A run stopped by a signal at 6 random moments, start and imports too, ends bit for bit."""
    environment = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(2)}
    settings = {"cwd": ROOT, "env": {**os.environ, **environment}}

    def launch(run: Path, moment: float = math.inf) -> tuple[int, str]:
        """Its exit status and log; and whether it ended soon after its signal."""
        with open(f"{run}.err", "w+") as log:
            process = start(number, *insertion(toy_world, run), stderr=log, **settings)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(moment, 300)), Path(log.name).read_text()
            begun = handles(process, number)
            process.send_signal(number)
            status, text = process.wait(10), Path(log.name).read_text()
        stopped = f"by {signal.Signals(number).name}; run the same command again"
        if status == 75:
            assert "stopping at step" in text and "run again to resume" in text, text[-3000:]
        elif begun:  # else Python had not come to the script's first line
            assert status in (0, 130) and "Traceback" not in text, text[-3000:]
            assert (stopped in text.splitlines()[-1]) == (status == 130), text[-3000:]
        return status, text

    begin = time.monotonic()
    assert launch(tmp_path / "first")[0] == 0
    seconds, rng, run, codes = time.monotonic() - begin, random.Random(int(number)), 0, []
    for _ in range(6):
        status, _ = launch(tmp_path / f"{run}", rng.uniform(0, seconds))
        codes.append(status)
        run += status == 0  # it had ended
    assert launch(tmp_path / f"{run}")[0] == 0
    assert len(set(codes)) > 1, codes
    for finished in range(run + 1):
        assert log_without_times(tmp_path / f"{finished}") == whole[0]
        exported = weights(zygote, tmp_path / f"{finished}", tmp_path / f"{finished}_hf")
        assert_bit_equal(exported, whole[1])


def test_a_run_goes_on_with_fewer_and_with_more_devices(zygote, toy_world, tmp_path):
    """A run on 8, 4, 2, then 8 devices has the data of one on 8, and its losses to 1e-6."""

    def command(run, data=1, fsdp=4, tensor=2):
        more = ("--config.steps=80", "--config.checkpoint.interval=5", "--config.log_every=1")
        slow = "--config.optimizer.learning_rate=1e-4"  # so that noise does not grow
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        mesh = (f"--config.mesh.{axis}={size}" for axis, size in sizes.items())
        return insertion(toy_world, run, *NO_EVALS, *more, slow, *mesh)

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert zygote.run(*command(whole), devices=8).returncode == 0
    stops = []
    for sizes, stop in (((1, 4, 2), 10), ((2, 2, 1), 30), ((1, 1, 2), 50)):
        process = zygote.start(*command(run, *sizes), devices=math.prod(sizes))
        process.wait_for((run / f"checkpoints/step_{stop:06d}/digests.json").exists)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait().returncode == 75, process.stderr
        stops.append(read_metrics(run / "metrics.jsonl")[-1]["step"])
    assert stops == sorted(set(stops)) and stops[-1] < 80, stops
    assert zygote.run(*command(run), devices=8).returncode == 0
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (whole, run)]
    steps, tokens, losses = (
        [[line[key] for line in log] for log in logs] for key in ("step", "loss_tokens", "loss")
    )
    assert steps[0] == steps[1] == list(range(1, 81)) and tokens[0] == tokens[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_3000_steps_take_no_more_memory_and_files(zygote, toy_world, tmp_path):
    """The last of 3,000 steps find memory and open files as the first tenth left them."""
    run, seen = tmp_path / "run", []
    process = zygote.start(
        *insertion(toy_world, run, "--config.steps=3000", "--config.log_every=50"),
        "--config.batch_size=1",
        "--config.eval.signal_prompts=0",
        "--config.mesh.fsdp=1",
        "--config.checkpoint.interval=250",
        f"--config.eval.steps={tuple(range(0, 3000, 500))}",
        devices=1,
    )
    while process.poll() is None:
        time.sleep(0.2)
        log = run / "metrics.jsonl"
        if not log.exists() or not (lines := read_metrics(log)):
            continue
        try:
            pages = int(open(f"/proc/{process.pid}/statm").read().split()[1])
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            break  # it has just ended
        seen.append((lines[-1]["step"], pages, files))
    assert process.wait().returncode == 0, process.stderr
    early = np.array([s[1:] for s in seen if 300 <= s[0] < 1000])
    late = np.array([s[1:] for s in seen if s[0] >= 2300])
    assert len(early) > 10 and len(late) > 10
    np.testing.assert_allclose(np.median(late, 0), np.median(early, 0), rtol=0.02)
